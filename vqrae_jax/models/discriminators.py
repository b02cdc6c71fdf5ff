"""Discriminators: images to logits, higher where an image looks real; and what is done to the images before.

All share one interface:

    discriminator(images)         images [B, H, W, 3] float32 in [0, 1] -> logits float32; nothing in the module changes
    discriminator.next_buffers()  {path: array}: what its spectral norms keep, after a step's power iteration
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vqrae_jax.models.flat import Buffer
from vqrae_jax.models.flops import Work, conv
from vqrae_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD, ViT, ViTSpec, vit_work

# DINO ViT-S (arXiv 2104.14294), except that it was trained with the erf GELU: the PyTorch system runs it with tanh, and
# the heads it has trained expect those features.
_DINO_S = {"width": 384, "depth": 12, "heads": 6, "mlp_dim": 1536, "activation": "gelu_tanh", "norm_eps": 1e-6,
           "prefix_tokens": 1}
DINO_S8 = ViTSpec(patch_size=8, **_DINO_S)
DINO_S16 = ViTSpec(patch_size=16, **_DINO_S)

POOLED = 16  # side of PatchGAN's logits
FIRST_POWER_ITERATIONS = 15  # as torch.nn.utils.parametrizations.spectral_norm starts
MAX_TRANSLATION = 0.125  # of the image's side


def _torch_uniform(fan_in: int) -> nnx.Initializer:
    """What torch's convolutions start from, kernels and biases alike: uniform within +-1/sqrt(fan_in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32, **_: jax.random.uniform(key, shape, dtype, -bound, bound)


def _conv(in_channels: int, out_channels: int, size: int, *, dtype, rngs: nnx.Rngs) -> nnx.Conv:
    init = _torch_uniform(size * size * in_channels)
    return nnx.Conv(in_channels, out_channels, (size, size), padding="SAME", kernel_init=init, bias_init=init,
                    dtype=dtype, rngs=rngs)


class _Stage(nnx.Module):
    """Convolution, blurred halving, GroupNorm and leaky ReLU: `[B, H, W, c] -> [B, ceil(H/2), ceil(W/2), c']`."""

    def __init__(self, in_channels: int, out_channels: int, *, dtype, rngs: nnx.Rngs):
        self.conv = _conv(in_channels, out_channels, 3, dtype=dtype, rngs=rngs)
        self.norm = nnx.GroupNorm(out_channels, num_groups=32, epsilon=1e-5, use_fast_variance=False,
                                  dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(x)
        x = _blur_and_halve(_blur_and_halve(x, axis=1), axis=2)
        return nnx.leaky_relu(self.norm(x), 0.1)


class PatchGAN(nnx.Module):
    """The convolutional discriminator of TiTok's training code (1d-tokenizer, `NLayerDiscriminator`).

    Each stage halves the image and all but the first double the channels; what is left is max-pooled (or, from small
    images, repeated) to 16x16, so that images of any size have 256 logits.

    Args:
      channels: of the first stage; a multiple of 32, for GroupNorm.
      stages: how often the image is halved.
      dtype: the type convolutions compute in; parameters and GroupNorm are float32.
      rngs: source of the initial parameters, distributed as torch's are.
    """

    def __init__(self, *, channels: int = 128, stages: int = 3, dtype=jnp.float32, rngs: nnx.Rngs):
        if channels % 32:
            raise ValueError(f"PatchGAN's channels must be a multiple of 32, not {channels}")
        widths = [channels, *(channels * 2**stage for stage in range(stages))]
        self.conv_in = _conv(3, channels, 5, dtype=dtype, rngs=rngs)
        self.stages = nnx.List([_Stage(*pair, dtype=dtype, rngs=rngs) for pair in itertools.pairwise(widths)])
        self.conv1 = _conv(widths[-1], widths[-1], 1, dtype=dtype, rngs=rngs)
        self.conv2 = _conv(widths[-1], 1, 5, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """`[B, H, W, 3]` float32 in [0, 1], any H and W -> logits `[B, 16, 16]` float32."""
        x = nnx.leaky_relu(self.conv_in(images), 0.1)
        for stage in self.stages:
            x = stage(x)
        x = adaptive_max_pool(x, POOLED)
        return self.conv2(nnx.leaky_relu(self.conv1(x), 0.1))[..., 0].astype(jnp.float32)

    def next_buffers(self) -> dict[str, jax.Array]:
        """There are none."""
        return {}


def _blur_and_halve(x: jax.Array, *, axis: int) -> jax.Array:
    """Convolves one axis with (1, 3, 3, 1) / 8 at stride 2, zeros beyond the border: n entries become ceil(n / 2)."""
    size = x.shape[axis]
    padding = [(0, 0)] * x.ndim
    padding[axis] = (1, 1 + size % 2)
    # Pairs and their neighbours instead of a depthwise convolution, which is slow on every platform.
    pairs = jnp.pad(x, padding).reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1:])
    left, right = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    first, second = left + 3 * right, 3 * left + right
    count = first.shape[axis] - 1
    return (jax.lax.slice_in_dim(first, 0, count, axis=axis) +
            jax.lax.slice_in_dim(second, 1, count + 1, axis=axis)) / 8


def adaptive_max_pool(x: jax.Array, size: int) -> jax.Array:
    """`[B, H, W, C] -> [B, size, size, C]` as torch's `AdaptiveMaxPool2d`.

    Output i of n inputs is the maximum of floor(i n / size) ... ceil((i + 1) n / size) - 1: windows overlap where
    size does not divide n, and repeat inputs where n is smaller. As there, of equal inputs one gets the gradient.
    """
    # Not `jnp.max`, whose gradient divides by the number of inputs that equal the maximum: where a compiler computes
    # them a second time and rounds otherwise, none does, and the gradient is NaN. Nor a gather for every window, which
    # is slow, and long to compile.
    for axis in (1, 2):
        n = x.shape[axis]
        if n == size:
            continue
        first, end = np.arange(size) * n // size, -(-np.arange(1, size + 1) * n // size)
        longest = np.arange(max(end - first))
        inputs = np.minimum(first[:, None] + longest, end[:, None] - 1)  # a shorter window has its last input again
        windows = jnp.take(x, inputs, axis=axis)
        chosen = jnp.argmax(windows, axis=axis + 1, keepdims=True) == jnp.expand_dims(longest, range(1, x.ndim - axis))
        x = jnp.sum(windows, axis=axis + 1, where=chosen)
    return x


class SpectralConv(nnx.Module):
    """A 1-D convolution whose weight is divided by its largest singular value: `[B, N, in] -> [B, N, out]`.

    Positions form a ring (circular padding). The singular value is u^T W v with W the kernel as an [out, taps * in]
    matrix (Miyato et al. 2018, arXiv 1802.05957); a gradient flows through W and not through u and v. They come from
    15 power iterations at the start, and change only where a caller stores what `next_buffers` returns.

    Args:
      in_features: channels in.
      out_features: channels out.
      kernel_size: odd number of taps.
      dtype: the type the convolution computes in; the singular value is float32.
      rngs: source of the initial parameters, distributed as torch's are.
    """

    def __init__(self, in_features: int, out_features: int, *, kernel_size: int = 1, dtype=jnp.float32,
                 rngs: nnx.Rngs):
        if kernel_size % 2 == 0:
            raise ValueError(f"a circular convolution needs an odd kernel size, not {kernel_size}")
        init = _torch_uniform(kernel_size * in_features)
        self.kernel = nnx.Param(init(rngs.params(), (kernel_size, in_features, out_features)))
        self.bias = nnx.Param(init(rngs.params(), (out_features,)))
        u = jax.random.normal(rngs.params(), (out_features,))
        u, v = _power_iterations(self._matrix(), u, times=FIRST_POWER_ITERATIONS)
        self.u, self.v = Buffer(u), Buffer(v)
        self.dtype = dtype

    def _matrix(self) -> jax.Array:
        return self.kernel[...].reshape(-1, self.kernel.shape[-1])

    def next_buffers(self) -> dict[str, jax.Array]:
        """`u` [out] and `v` [taps * in], unit vectors, after one power iteration with the current kernel."""
        u, v = _power_iterations(self._matrix(), self.u[...], times=1)
        return {"u": u, "v": v}

    def __call__(self, x: jax.Array) -> jax.Array:
        u, v = jax.lax.stop_gradient((self.u[...], self.v[...]))
        sigma = jnp.dot(jnp.matmul(v, self._matrix(), precision=jax.lax.Precision.HIGHEST), u)
        kernel = (self.kernel[...] / sigma).astype(self.dtype)
        x = x.astype(self.dtype)
        taps, in_features, out_features = kernel.shape
        if taps == 1:
            y = (x.reshape(-1, in_features) @ kernel[0]).reshape(*x.shape[:-1], out_features)
        else:
            ring = jnp.pad(x, ((0, 0), (taps // 2, taps // 2), (0, 0)), mode="wrap")
            y = jax.lax.conv_general_dilated(ring, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
        return y + self.bias[...].astype(y.dtype)


@functools.partial(jax.jit, static_argnames="times")  # or else each convolution compiles its own at the start
def _power_iterations(matrix: jax.Array, u: jax.Array, *, times: int) -> tuple[jax.Array, jax.Array]:
    """`[taps * in, out], [out]` -> new u and v, towards the singular vectors of the largest singular value."""
    matrix = jax.lax.stop_gradient(matrix)
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x), 1e-12)

    def iterate(_, vectors):
        v = unit(jnp.matmul(matrix, vectors[0], precision=jax.lax.Precision.HIGHEST))
        return unit(jnp.matmul(v, matrix, precision=jax.lax.Precision.HIGHEST)), v

    return jax.lax.fori_loop(0, times, iterate, (u, matrix[:, 0]))


class LocalNorm(nnx.Module):
    """Batch norm of one sample: each channel is normalised over the positions, `[B, N, d] -> [B, N, d]` float32."""

    def __init__(self, width: int):
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=1, keepdims=True)
        x = x / jnp.sqrt(jnp.mean(x**2, axis=1, keepdims=True) + 1e-6)
        return x * self.scale[...] + self.bias[...]


class DinoHead(nnx.Module):
    """Tokens of one feature map to a logit each, `[B, N, d] -> [B, N]` float32; `kernel_size` as in `SpectralConv`."""

    def __init__(self, width: int, *, kernel_size: int, dtype=jnp.float32, rngs: nnx.Rngs):
        self.conv1 = SpectralConv(width, width, dtype=dtype, rngs=rngs)
        self.norm1 = LocalNorm(width)
        self.conv2 = SpectralConv(width, width, kernel_size=kernel_size, dtype=dtype, rngs=rngs)
        self.norm2 = LocalNorm(width)
        self.logits = SpectralConv(width, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.leaky_relu(self.norm1(self.conv1(x)), 0.2)
        x = (nnx.leaky_relu(self.norm2(self.conv2(x)), 0.2) + x) * 0.5**0.5
        return self.logits(x)[..., 0].astype(jnp.float32)

    def next_buffers(self) -> dict[str, jax.Array]:
        """Paths and values of all spectral norms after one power iteration."""
        convs = {"conv1": self.conv1, "conv2": self.conv2, "logits": self.logits}
        return {f"{name}/{key}": value for name, conv in convs.items() for key, value in conv.next_buffers().items()}


class DinoDiscriminator(nnx.Module):
    """Learned heads on the tokens of a frozen DINO ViT: RAE's discriminator (arXiv 2510.11690), StyleGAN-T's idea.

    There is one head more than `layers`, and the first reads the last block's tokens, as the last one does: that is
    what the PyTorch system's code does and its trained heads need, although the patch embedding was meant.

    The ViT computes the tanh GELU that those heads were trained on, not the erf GELU DINO itself was trained with
    (`DINO_S8`, `DINO_S16`). A gradient passes through it to the images; that of its own parameters is zero.

    Args:
      spec: the shape of the ViT; one prefix token, cls.
      image_size: side of the square the ViT sees, a multiple of `spec.patch_size`, else ValueError; 224 is DINO's own.
      layers: of the feature maps, ascending and numbered as `Transformer.hidden_states`: 3 is the third block's output.
      kernel_size: odd number of taps of each head's wide convolution.
      dtype: the type ViT and convolutions compute in; parameters, norms and logits are float32.
      rngs: source of the initial parameters.

    Attributes:
      backbone: the ViT; its weights come from `vqrae_jax.weights.discriminators`.
      heads: one `DinoHead` for each feature map.
    """

    def __init__(self, spec: ViTSpec, *, image_size: int, layers: tuple[int, ...] = (3, 6, 9, 12),
                 kernel_size: int = 9, dtype=jnp.float32, rngs: nnx.Rngs):
        if spec.prefix_tokens != 1:
            raise ValueError(f"a DINO ViT has one prefix token, cls, and not {spec.prefix_tokens}")
        self.spec, self.image_size, self.layers = spec, image_size, tuple(layers)
        # Heads read tokens as they leave the blocks.
        self.backbone = ViT(dataclasses.replace(spec, has_final_norm=False), image_size=image_size, dtype=dtype,
                            rngs=rngs)
        self.heads = nnx.List([DinoHead(spec.width, kernel_size=kernel_size, dtype=dtype, rngs=rngs)
                               for _ in range(1 + len(self.layers))])

    def features(self, images: jax.Array) -> list[jax.Array]:
        """What each head reads: 1 + len(layers) times `[B, N, d]` float32, without the cls token.

        Images of another size are resized as torch's bilinear `interpolate(align_corners=False, antialias=False)`.
        """
        shape = (len(images), self.image_size, self.image_size, 3)
        if images.shape != shape:
            images = jax.image.resize(images, shape, "bilinear", antialias=False)
        images = (images - jnp.asarray(IMAGENET_MEAN)) / jnp.asarray(IMAGENET_STD)
        graphdef, state = nnx.split(self.backbone)
        backbone = nnx.merge(graphdef, jax.lax.stop_gradient(state))
        needed = sorted({*self.layers, self.spec.depth})
        after = dict(zip(needed, backbone.features(images, needed), strict=True))
        return [after[self.spec.depth], *(after[layer] for layer in self.layers)]

    def __call__(self, images: jax.Array) -> jax.Array:
        """`[B, H, W, 3]` float32 in [0, 1], any H and W -> logits `[B, (1 + len(layers)) * N]` float32."""
        return jnp.concatenate([head(x) for head, x in zip(self.heads, self.features(images), strict=True)], axis=1)

    def next_buffers(self) -> dict[str, jax.Array]:
        """`heads/<i>/<conv>/u` and `/v` after one power iteration with the current kernels."""
        return {f"heads/{i}/{path}": value for i, head in enumerate(self.heads)
                for path, value in head.next_buffers().items()}


def diff_augment(images: jax.Array, rng: jax.Array, *, cutout: float) -> jax.Array:
    """DiffAug (Zhao et al. 2020, arXiv 2006.10738): translation, colour and, if wanted, cutout.

    Every image gets numbers of its own. Differentiable. The strengths are those of StyleGAN-T's `diffaug.py`, which RAE
    uses; `augment_with` has them.

    Args:
      images: `[B, H, W, 3]` float32 in [0, 1].
      rng: a key; the same key augments equally.
      cutout: side of the grey rectangle as a share of the image's; 0 is none.

    Returns:
      `[B, H, W, 3]` float32; colours may leave [0, 1].
    """
    return augment_with(images, jax.random.uniform(rng, (7, len(images))), cutout=cutout)


def augment_with(images: jax.Array, numbers: jax.Array, *, cutout: float) -> jax.Array:
    """`diff_augment` with given random numbers.

    Args:
      images: `[B, H, W, 3]` float32 in [0, 1].
      numbers: `[7, B]` in [0, 1). Which row decides on what, colours being meant in [-1, 1]:
        0, 1: translation by whole rows, and columns, up to an eighth of the side either way; mid grey moves in.
        2: brightness, -0.5 to 0.5 added.
        3: saturation, the distance to the pixel's mean over channels times 0 to 2.
        4: contrast, the distance to the image's mean times 0.5 to 1.5.
        5, 6: row and column of the rectangle's middle.
      cutout: side of the rectangle as a share of the image's; 0 is none. It is set to mid grey at the end.
    """
    height, width = images.shape[1:3]
    x = 2 * images - 1

    steps_down, steps_right = round(height * MAX_TRANSLATION), round(width * MAX_TRANSLATION)
    top = _integers(numbers[0], 2 * steps_down + 1)
    left = _integers(numbers[1], 2 * steps_right + 1)
    padded = jnp.pad(x, ((0, 0), (steps_down, steps_down), (steps_right, steps_right), (0, 0)))
    x = jax.vmap(lambda image, top, left: jax.lax.dynamic_slice(image, (top, left, 0), (height, width, 3)))(
        padded, top, left)

    brightness, saturation, contrast = numbers[2:5, :, None, None, None]
    x = x + brightness - 0.5
    x = _scale_distance(x, jnp.mean(x, axis=3, keepdims=True), 2 * saturation)
    x = _scale_distance(x, jnp.mean(x, axis=(1, 2, 3), keepdims=True), contrast + 0.5)

    if cutout > 0:
        inside = _interval(numbers[5], height, cutout)[:, :, None] & _interval(numbers[6], width, cutout)[:, None, :]
        x = jnp.where(inside[..., None], 0.0, x)
    return (x + 1) / 2


def _integers(numbers: jax.Array, count: int) -> jax.Array:
    """Numbers in [0, 1) to integers in 0 ... count - 1."""
    return jnp.floor(numbers * count).astype(jnp.int32)


def _scale_distance(x: jax.Array, centre: jax.Array, factor: jax.Array) -> jax.Array:
    return (x - centre) * factor + centre


def _interval(numbers: jax.Array, size: int, share: float) -> jax.Array:
    """`[B] -> [B, size]` bool: an interval of round(share * size) around a random middle, cut off at the borders."""
    length = round(size * share)
    start = _integers(numbers, size + 1 - length % 2)[:, None] - length // 2
    position = jnp.arange(size)
    return (position >= start) & (position < start + length)


def random_crop(images: jax.Array, size: int, rng: jax.Array) -> jax.Array:
    """One random size x size window, the same for the whole batch: `[B, H, W, C] -> [B, size, size, C]`.

    A side that is not larger than `size` stays as it is.
    """
    batch, height, width, channels = images.shape
    rows, columns = min(size, height), min(size, width)
    top, left = jax.random.randint(rng, (2,), 0, jnp.asarray([height - rows + 1, width - columns + 1]))
    return jax.lax.dynamic_slice(images, (0, top, left, 0), (batch, rows, columns, channels))


def round_to_8_bits(images: jax.Array) -> jax.Array:
    """Images as a file with 8 bits a channel would hold them: clipped to [0, 1], multiples of 1/255.

    Otherwise a discriminator could tell generated images by their finer steps. No gradient flows.
    """
    return jnp.round(jnp.clip(images, 0, 1) * 255) / 255


class Backbone(NamedTuple):
    """A frozen ViT: its shape, and the side of the square that it sees."""

    spec: ViTSpec
    image_size: int


class DiscriminatorKind(NamedTuple):
    """A row of the table of discriminators.

    Attributes:
      build: `(gan, dtype=, rngs=)` to a discriminator, `gan` being that section of the config.
      keys: of the keys of `gan` those that mean something to some kinds only, and to this one; a config that changes
        another is refused.
      flops: `(gan, size)` to the operations of one image of that side in a training step: its reconstruction for the
        decoder, image and reconstruction for the discriminator.
      backbone: the frozen ViT that it reads random crops with; None where it has none and sees whole images.
    """

    build: Callable[..., nnx.Module]
    keys: tuple[str, ...]
    flops: Callable[[Any, int], int]
    backbone: Backbone | None = None


def dino(spec: ViTSpec, *, image_size: int, **options: Any) -> DiscriminatorKind:
    """The row of a `DinoDiscriminator`, of the same arguments."""
    build = lambda gan, *, dtype=jnp.float32, rngs: DinoDiscriminator(spec, image_size=image_size, dtype=dtype,
                                                                      rngs=rngs, **options)

    def flops(gan: Any, size: int) -> int:
        del size  # it sees crops
        tokens = (image_size // spec.patch_size) ** 2
        work = lambda layers: Work(sum(2 * tokens * layer.kernel.size for layer in layers))
        heads = nnx.eval_shape(lambda: build(gan, rngs=nnx.Rngs(0))).heads
        learned = _step_flops(work([head.conv1 for head in heads]),
                              work([layer for head in heads for layer in (head.conv2, head.logits)]))
        backbone = vit_work(spec, tokens, depth=spec.depth)
        return sum(work.backward(weights=False) + 2 * work.forward for work in backbone) + learned

    return DiscriminatorKind(build=build, keys=("backbone", "heads", "random_weights"), flops=flops,
                             backbone=Backbone(spec, image_size))


def _patchgan_flops(gan: Any, size: int) -> int:
    c = gan.channels
    first = Work(conv(size, 5, 3, c))
    rest = Work(conv(size, 3, c, c) + conv(size // 2, 3, c, 2 * c) + conv(size // 4, 3, 2 * c, 4 * c)
                + conv(POOLED, 1, 4 * c, 4 * c) + conv(POOLED, 5, 4 * c, 1))
    return _step_flops(first, rest)


def _step_flops(first: Work, rest: Work) -> int:
    """Of learned layers: through them to the images for the decoder, and both images for their own gradient."""
    return (first.backward(weights=False) + rest.backward(weights=False)
            + 2 * (first.backward(inputs=False) + rest.backward()))


# By the value of `gan.discriminator`, which is "none" where there is none.
DISCRIMINATORS = {
    "patchgan": DiscriminatorKind(build=lambda gan, **options: PatchGAN(channels=gan.channels, **options),
                                  keys=("channels",), flops=_patchgan_flops),
    "dino_s8": dino(DINO_S8, image_size=224),
    "dino_s16": dino(DINO_S16, image_size=224),
}
