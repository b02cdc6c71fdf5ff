"""Networks that perceptual losses and metrics compare images with: LPIPS on VGG16, and ConvNeXt's logits.

Both map images to something of which `distance` takes two, so that a training step runs the network once for the
target, without a gradient, and once for the reconstruction. Weights come from `vqrae_jax.weights.perceptual`. A run's
own encoder is one more such network, of whose features `token_distance` takes two.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vqrae_jax.models.flops import conv, dense
from vqrae_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD, Linear, gelu, layer_norm, patchify

# Width and number of convolutions of VGG16's stages (arXiv 1409.1556, configuration D).
VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))

# Of images in [-1, 1]; `ScalingLayer` of the lpips package.
_LPIPS_SHIFT, _LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(nnx.Module):
    """Learned perceptual image patch similarity with VGG16, version 0.1 (arXiv 1801.03924, equation 1).

    Args:
      dtype: the type the convolutions compute in; parameters, normalisation and distance are float32.
      rngs: source of the initial parameters.
    """

    def __init__(self, *, dtype=jnp.float32, rngs: nnx.Rngs):
        stages, channels = [], 3
        for width, depth in VGG16:
            stage = []
            for _ in range(depth):
                stage.append(nnx.Conv(channels, width, (3, 3), padding=1, dtype=dtype, rngs=rngs,
                                      kernel_metadata={"cast_to": dtype}, bias_metadata={"cast_to": dtype}))
                channels = width
            stages.append(nnx.List(stage))
        self.stages = nnx.List(stages)
        self.weights = nnx.List([nnx.Param(jax.random.uniform(rngs.params(), (width,))) for width, _ in VGG16])

    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        """What `distance` compares.

        Args:
          images: `[B, H, W, 3]` float32 in [0, 1]; H and W at least 16, else ValueError.

        Returns:
          relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 (`[B, H/2**i, W/2**i, C]` float32), every channel vector of
          which has length 1, or 0 where it was 0.
        """
        if min(images.shape[1:3]) < 16:
            raise ValueError(f"LPIPS needs images of at least 16x16 pixels, not {images.shape[1]}x{images.shape[2]}")
        x = (2 * images - 1 - jnp.asarray(_LPIPS_SHIFT, jnp.float32)) / jnp.asarray(_LPIPS_SCALE, jnp.float32)
        features = []
        for i, stage in enumerate(self.stages):
            x = _max_pool(x) if i else x
            for convolution in stage:
                x = jax.nn.relu(convolution(x))
            features.append(_unit_length(x.astype(jnp.float32)))
        return tuple(features)

    def distance(self, x: tuple[jax.Array, ...], y: tuple[jax.Array, ...]) -> jax.Array:
        """LPIPS of images with features `x` and `y`, `[B]` float32: 0 for equal images, and symmetric."""
        # Products and sums instead of a matmul, whose float32 a TPU or GPU would round.
        distances = [jnp.sum((a - b)**2 * w[...], axis=-1).mean((1, 2))
                     for a, b, w in zip(x, y, self.weights, strict=True)]
        return sum(distances[1:], start=distances[0])


def _unit_length(x: jax.Array) -> jax.Array:
    # The lpips package adds its epsilon after the root, whose gradient is infinite at 0.
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-10)


def token_distance(x: jax.Array, y: jax.Array) -> jax.Array:
    """1 - the cosine of the tokens of each place, mean over places: `[B, N, d]` float32 twice -> `[B]` in [0, 2].

    A perceptual loss on the tokens of a ViT is PeCo's (arXiv 2111.12710), that vectors of length 1 are compared is
    LPIPS's. Half their squared distance is computed, which is exactly 0 for equal tokens.
    """
    return 0.5 * jnp.sum((_unit_length(x) - _unit_length(y))**2, axis=-1).mean(axis=1)


def _max_pool(x: jax.Array) -> jax.Array:
    """2x2 with stride 2, an odd last row or column left out, as torch. 30 times faster on a CPU in the backward pass
    than `reduce_window`."""
    height, width = (side // 2 * 2 for side in x.shape[1:3])
    rows = jnp.maximum(x[:, 0:height:2], x[:, 1:height:2])
    return jnp.maximum(rows[:, :, 0:width:2], rows[:, :, 1:width:2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvNeXtSpec:
    """The shape of a ConvNeXt.

    Attributes:
      depths: number of blocks of each stage.
      widths: channels of each stage.
      image_size: side of the square image it sees; a multiple of 4 * 2**(number of stages - 1).
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    image_size: int = 224


CONVNEXT_SMALL = ConvNeXtSpec(depths=(3, 3, 27, 3), widths=(96, 192, 384, 768))


class ConvNeXt(nnx.Module):
    """ConvNeXt (arXiv 2201.03545), a classifier of ImageNet, whose logits TiTok's perceptual loss compares.

    The blocks of a stage are stacked and scanned over, so that compile time does not grow with depth.

    Args:
      spec: its shape.
      dtype: the type the stages compute in; parameters, LayerNorm statistics and the head are float32.
      rngs: source of the initial parameters.
    """

    def __init__(self, spec: ConvNeXtSpec, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.image_size = spec.image_size
        self.stem = Linear(4 * 4 * 3, spec.widths[0], dtype=dtype, rngs=rngs)
        self.stem_norm = layer_norm(spec.widths[0], eps=1e-6, dtype=dtype, rngs=rngs)
        self.downsamples = nnx.List([_Downsample(inputs, width, dtype=dtype, rngs=rngs)
                                     for inputs, width in zip(spec.widths, spec.widths[1:], strict=False)])
        make_blocks = nnx.vmap(lambda rngs, width: _Block(width, dtype=dtype, rngs=rngs), in_axes=(0, None))
        self.stages = nnx.List([make_blocks(rngs.split(depth), width)
                                for depth, width in zip(spec.depths, spec.widths, strict=True)])
        self.norm = layer_norm(spec.widths[-1], eps=1e-6, rngs=rngs)
        self.head = Linear(spec.widths[-1], 1000, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of ImageNet's classes, `[B, 1000]` float32.

        Args:
          images: `[B, H, W, 3]` float32 in [0, 1] of any H and W. They are resized to `image_size`, as
            `torch.nn.functional.interpolate(mode="bilinear", antialias=True)` does.
        """
        size = self.image_size
        if images.shape[1:3] != (size, size):
            images = jax.image.resize(images, (images.shape[0], size, size, 3), "linear", antialias=True)
        x = (images - jnp.asarray(IMAGENET_MEAN, jnp.float32)) / jnp.asarray(IMAGENET_STD, jnp.float32)
        x = self.stem_norm(self.stem(_patch_grid(x, 4)))
        for i, blocks in enumerate(self.stages):
            x = self.downsamples[i - 1](x) if i else x
            graphdef, stacked = nnx.split(blocks)
            run_block = lambda x, params, graphdef=graphdef: (nnx.merge(graphdef, params)(x), None)
            x, _ = jax.lax.scan(run_block, x, stacked)
        return self.head(self.norm(x.astype(jnp.float32).mean((1, 2))))

    def distance(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Mean squared difference of the logits, `[B]` float32 (TiTok, arXiv 2406.07550: `PerceptualLoss`)."""
        return jnp.mean((x - y)**2, axis=-1)


class _Downsample(nnx.Module):
    """LayerNorm and a 2x2 convolution with stride 2, `[B, H, W, C] -> [B, H/2, W/2, width]`."""

    def __init__(self, channels: int, width: int, *, dtype, rngs: nnx.Rngs):
        self.norm = layer_norm(channels, eps=1e-6, dtype=dtype, rngs=rngs)
        self.embedding = Linear(2 * 2 * channels, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.embedding(_patch_grid(self.norm(x), 2))


class _Block(nnx.Module):
    """Depthwise convolution, LayerNorm and MLP with a scaled residual, `[B, H, W, C] -> [B, H, W, C]`."""

    def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
        self.depthwise = _Depthwise(width, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(width, eps=1e-6, dtype=dtype, rngs=rngs)
        self.fc1 = Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(4 * width, width, dtype=dtype, rngs=rngs)
        self.scale = nnx.Param(jnp.full(width, 1e-6, jnp.float32), cast_to=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.fc2(gelu(self.fc1(self.norm(self.depthwise(x)))))
        return x + y * self.scale[...].astype(y.dtype)


class _Depthwise(nnx.Module):
    """A 7x7 convolution of each channel by itself, zero padding, `[B, H, W, C] -> [B, H, W, C]` in `dtype`."""

    def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (7, 7, width), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32), cast_to=dtype)
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return _depthwise(x.astype(self.dtype), self.kernel[...]) + self.bias[...].astype(self.dtype)


def _shifted_sum(x: jax.Array, kernel: jax.Array) -> jax.Array:
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0)))
    taps = [padded[:, i:i + height, j:j + width] * kernel[i, j] for i in range(7) for j in range(7)]
    return sum(taps[1:], start=taps[0]).astype(x.dtype)  # the kernel is float32, and with it the sum


# XLA fuses the sum into one loop, 20 times faster on a CPU than its grouped convolution, which accelerators do well.
# The derivative by x is the same sum with the kernel turned round; JAX's own, a sum of paddings, takes twice as long
# to compile and to run.
_depthwise_on_cpu = jax.custom_vjp(_shifted_sum)


def _depthwise_backward(saved, cotangent):
    x, kernel = saved
    _, pull_back = jax.vjp(lambda kernel: _shifted_sum(x, kernel), kernel)
    return _shifted_sum(cotangent, kernel[::-1, ::-1]), *pull_back(cotangent)


_depthwise_on_cpu.defvjp(lambda x, kernel: (_shifted_sum(x, kernel), (x, kernel)), _depthwise_backward)


def _grouped_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel[:, :, None].astype(x.dtype), (1, 1), "SAME",
                                        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1])


def _depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x, kernel, cpu=_depthwise_on_cpu, default=_grouped_convolution)


def _patch_grid(x: jax.Array, size: int) -> jax.Array:
    """`[B, H, W, C] -> [B, H/size, W/size, size*size*C]`: what a convolution of that size and stride sees."""
    return patchify(x, size).reshape(x.shape[0], x.shape[1] // size, x.shape[2] // size, -1)


def lpips_flops(size: int) -> int:
    """Operations of LPIPS's network for an image of that side."""
    total, channels = 0, 3
    for stage, (width, depth) in enumerate(VGG16):
        for _ in range(depth):
            total += conv(size // 2**stage, 3, channels, width)
            channels = width
    return total


def convnext_flops(spec: ConvNeXtSpec) -> int:
    """Operations of a ConvNeXt for an image of any size."""
    side = spec.image_size // 4
    total, channels = conv(side, 1, 4 * 4 * 3, spec.widths[0]), spec.widths[0]
    for stage, (width, depth) in enumerate(zip(spec.widths, spec.depths, strict=True)):
        if stage:
            side //= 2
            total += conv(side, 1, 4 * channels, width)
        total += depth * side**2 * (2 * 49 * width + 2 * dense(width, 4 * width))
        channels = width
    return total + dense(channels, 1000)


class NetworkKind(NamedTuple):
    """A row of the table of networks that perceptual losses compare images with.

    Attributes:
      build: `(dtype=, rngs=)` to a module that maps images to something of which its `distance` takes two.
      flops: its operations for an image of a given side.
    """

    build: Callable[..., nnx.Module]
    flops: Callable[[int], int]


# By name: the key of `loss.perceptual` that holds its share, and of `weights.perceptual.LOADERS`.
NETWORKS = {
    "lpips": NetworkKind(build=LPIPS, flops=lpips_flops),
    "convnext_s": NetworkKind(build=lambda **options: ConvNeXt(CONVNEXT_SMALL, **options),
                              flops=lambda size: convnext_flops(CONVNEXT_SMALL)),
}

# The run's own encoder is no row: its weights, its operations and its features of the images are the run's anyway.
ENCODER = "encoder"
SHARES = (*NETWORKS, ENCODER)  # the keys of `loss.perceptual` that hold shares
