"""The Inception-v3 of the papers' FID and Inception Score: TensorFlow's network of 2015-12-05, with TF1's resize.

It differs from other Inception-v3s in its weights (1008 outputs) and in its poolings: averages leave padding out, and
the last block takes a maximum. torch-fidelity's `FeatureExtractorInceptionV3` is the same network in PyTorch, with the
same names of blocks and branches. Weights come from `vqrae_jax.weights.inception`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vqrae_jax.models.flat import Buffer

IMAGE_SIZE, FEATURES, CLASSES = 299, 2048, 1008
# Where its weights are looked for. The last part of the published name is how its SHA-256 starts, PyTorch's convention.
WEIGHTS = "~/.cache/vqrae_jax/weights-inception-2015-12-05-6726825d.pth"


class InceptionOutput(NamedTuple):
    """What metrics read of a batch of images.

    Attributes:
      features: `[B, 2048]` float32, >= 0: the graph's `pool_3`, of which the Frechet distance is taken.
      logits: `[B, 1008]` float32, without the bias of the last layer. The Inception Score is taken of their softmax,
        in ADM's evaluator (`softmax/logits/MatMul`) and in torch-fidelity (`logits_unbiased`).
    """

    features: jax.Array
    logits: jax.Array


def to_uint8_levels(images: jax.Array) -> jax.Array:
    """Images as a file with 8 bits a channel would hold them: float in [0, 1] -> float32 integers in 0 ... 255."""
    return jnp.round(jnp.clip(images.astype(jnp.float32), 0, 1) * 255)


def resize_tf1(images: jax.Array, size: int) -> jax.Array:
    """TensorFlow 1's `resize_bilinear` with `align_corners=False`: no half-pixel centres, no antialiasing.

    Row i of the result lies at i * H / size, between two rows of the image; likewise columns. Downscaling leaves pixels
    out. The FID of other resizes is another number (Parmar et al. 2022, arXiv 2104.11222).

    Args:
      images: `[B, H, W, C]` float, or uint8.
      size: side of the square result.

    Returns:
      `[B, size, size, C]` float32 in the images' range.
    """
    # The kernel's own order: columns first, and sums that need no matmul, whose float32 a TPU or GPU would round.
    return _interpolate(_interpolate(images.astype(jnp.float32), size, axis=2), size, axis=1)


def _interpolate(x: jax.Array, size: int, *, axis: int) -> jax.Array:
    at = np.arange(size, dtype=np.float32) * np.float32(x.shape[axis] / size)
    lower = at.astype(np.int32)
    upper = np.minimum(lower + 1, x.shape[axis] - 1)
    share = np.expand_dims(at - lower.astype(np.float32), [i for i in range(x.ndim) if i != axis])
    below = jnp.take(x, lower, axis=axis)
    return below + (jnp.take(x, upper, axis=axis) - below) * share


class InceptionV3(nnx.Module):
    """Inception-v3 (arXiv 1512.00567) as in TensorFlow's `classify_image_graph_def.pb`.

    Its 94 convolutions make 11.4e9 operations for an image of any size.

    Args:
      dtype: the type the convolutions compute in; parameters, batch norm, pool3 and logits are float32.
      rngs: source of the initial parameters.
    """

    def __init__(self, *, dtype=jnp.float32, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.conv2d_1a_3x3 = _Conv(3, 32, (3, 3), stride=2, padding="VALID", **options)
        self.conv2d_2a_3x3 = _Conv(32, 32, (3, 3), padding="VALID", **options)
        self.conv2d_2b_3x3 = _Conv(32, 64, (3, 3), **options)
        self.conv2d_3b_1x1 = _Conv(64, 80, (1, 1), **options)
        self.conv2d_4a_3x3 = _Conv(80, 192, (3, 3), padding="VALID", **options)
        self.mixed_5b = _BlockA(192, 32, **options)
        self.mixed_5c = _BlockA(256, 64, **options)
        self.mixed_5d = _BlockA(288, 64, **options)
        self.mixed_6a = _BlockB(288, **options)
        self.mixed_6b = _BlockC(128, **options)
        self.mixed_6c = _BlockC(160, **options)
        self.mixed_6d = _BlockC(160, **options)
        self.mixed_6e = _BlockC(192, **options)
        self.mixed_7a = _BlockD(768, **options)
        self.mixed_7b = _BlockE(1280, pool=_mean_pool, **options)
        self.mixed_7c = _BlockE(2048, pool=_max_pool, **options)
        self.fc = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (FEATURES, CLASSES), jnp.float32))

    def __call__(self, images: jax.Array) -> InceptionOutput:
        """Runs the network.

        Args:
          images: `[B, H, W, 3]` uint8, or float holding such integers (see `to_uint8_levels`); any H and W.
        """
        x = (resize_tf1(images, IMAGE_SIZE) - 128) / 128
        x = self.conv2d_2b_3x3(self.conv2d_2a_3x3(self.conv2d_1a_3x3(x)))
        x = self.conv2d_4a_3x3(self.conv2d_3b_1x1(_halve(x)))
        x = self.mixed_5d(self.mixed_5c(self.mixed_5b(_halve(x))))
        x = self.mixed_6e(self.mixed_6d(self.mixed_6c(self.mixed_6b(self.mixed_6a(x)))))
        x = self.mixed_7c(self.mixed_7b(self.mixed_7a(x)))
        features = x.astype(jnp.float32).mean((1, 2))
        return InceptionOutput(features, jnp.matmul(features, self.fc[...], precision=jax.lax.Precision.HIGHEST))


class _Conv(nnx.Module):
    """Convolution without bias, batch norm with its kept statistics, ReLU: `[B, H, W, C] -> [B, H', W', width]`."""

    def __init__(self, channels: int, width: int, size: tuple[int, int], *, stride: int = 1, padding: str = "SAME",
                 dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), (*size, channels, width), jnp.float32))
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.mean, self.variance = Buffer(jnp.zeros(width)), Buffer(jnp.ones(width))
        self.stride, self.padding, self.dtype = stride, padding, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        # Numbers that are compared between papers: float32 stays float32 on a TPU or GPU.
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype), self.kernel[...].astype(self.dtype), (self.stride, self.stride), self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=jax.lax.Precision.HIGHEST)
        scale = self.scale[...] * jax.lax.rsqrt(self.variance[...] + 1e-3)
        return jax.nn.relu(x * scale + (self.bias[...] - self.mean[...] * scale)).astype(self.dtype)


def _join(*branches: jax.Array) -> jax.Array:
    return jnp.concatenate(branches, axis=-1)


def _mean_pool(x: jax.Array) -> jax.Array:
    return nnx.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _max_pool(x: jax.Array) -> jax.Array:
    return nnx.max_pool(x, (3, 3), (1, 1), "SAME")


def _halve(x: jax.Array) -> jax.Array:
    return nnx.max_pool(x, (3, 3), (2, 2), "VALID")


class _BlockA(nnx.Module):
    """`[B, 35, 35, channels] -> [B, 35, 35, 224 + pool_width]`."""

    def __init__(self, channels: int, pool_width: int, **options):
        self.branch1x1 = _Conv(channels, 64, (1, 1), **options)
        self.branch5x5_1 = _Conv(channels, 48, (1, 1), **options)
        self.branch5x5_2 = _Conv(48, 64, (5, 5), **options)
        self.branch3x3dbl_1 = _Conv(channels, 64, (1, 1), **options)
        self.branch3x3dbl_2 = _Conv(64, 96, (3, 3), **options)
        self.branch3x3dbl_3 = _Conv(96, 96, (3, 3), **options)
        self.branch_pool = _Conv(channels, pool_width, (1, 1), **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return _join(self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)),
                     self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))), self.branch_pool(_mean_pool(x)))


class _BlockB(nnx.Module):
    """`[B, 35, 35, channels] -> [B, 17, 17, channels + 480]`."""

    def __init__(self, channels: int, **options):
        self.branch3x3 = _Conv(channels, 384, (3, 3), stride=2, padding="VALID", **options)
        self.branch3x3dbl_1 = _Conv(channels, 64, (1, 1), **options)
        self.branch3x3dbl_2 = _Conv(64, 96, (3, 3), **options)
        self.branch3x3dbl_3 = _Conv(96, 96, (3, 3), stride=2, padding="VALID", **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return _join(self.branch3x3(x), self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))), _halve(x))


class _BlockC(nnx.Module):
    """`[B, 17, 17, 768] -> [B, 17, 17, 768]`, of which `width` channels are inside the branches."""

    def __init__(self, width: int, **options):
        self.branch1x1 = _Conv(768, 192, (1, 1), **options)
        self.branch7x7_1 = _Conv(768, width, (1, 1), **options)
        self.branch7x7_2 = _Conv(width, width, (1, 7), **options)
        self.branch7x7_3 = _Conv(width, 192, (7, 1), **options)
        self.branch7x7dbl_1 = _Conv(768, width, (1, 1), **options)
        self.branch7x7dbl_2 = _Conv(width, width, (7, 1), **options)
        self.branch7x7dbl_3 = _Conv(width, width, (1, 7), **options)
        self.branch7x7dbl_4 = _Conv(width, width, (7, 1), **options)
        self.branch7x7dbl_5 = _Conv(width, 192, (1, 7), **options)
        self.branch_pool = _Conv(768, 192, (1, 1), **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return _join(self.branch1x1(x), self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
                     self.branch7x7dbl_5(self.branch7x7dbl_4(double)), self.branch_pool(_mean_pool(x)))


class _BlockD(nnx.Module):
    """`[B, 17, 17, channels] -> [B, 8, 8, channels + 512]`."""

    def __init__(self, channels: int, **options):
        self.branch3x3_1 = _Conv(channels, 192, (1, 1), **options)
        self.branch3x3_2 = _Conv(192, 320, (3, 3), stride=2, padding="VALID", **options)
        self.branch7x7x3_1 = _Conv(channels, 192, (1, 1), **options)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7), **options)
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1), **options)
        self.branch7x7x3_4 = _Conv(192, 192, (3, 3), stride=2, padding="VALID", **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        factored = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return _join(self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(factored), _halve(x))


class _BlockE(nnx.Module):
    """`[B, 8, 8, channels] -> [B, 8, 8, 2048]`."""

    def __init__(self, channels: int, *, pool, **options):
        self.branch1x1 = _Conv(channels, 320, (1, 1), **options)
        self.branch3x3_1 = _Conv(channels, 384, (1, 1), **options)
        self.branch3x3_2a = _Conv(384, 384, (1, 3), **options)
        self.branch3x3_2b = _Conv(384, 384, (3, 1), **options)
        self.branch3x3dbl_1 = _Conv(channels, 448, (1, 1), **options)
        self.branch3x3dbl_2 = _Conv(448, 384, (3, 3), **options)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3), **options)
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1), **options)
        self.branch_pool = _Conv(channels, 192, (1, 1), **options)
        self.pool = pool

    def __call__(self, x: jax.Array) -> jax.Array:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return _join(self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single),
                     self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(self.pool(x)))
