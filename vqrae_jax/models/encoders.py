"""Pretrained vision encoders: images in, continuous features out. Their weights come from `vqrae_jax.weights`."""

import functools
import math
import operator
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vqrae_jax.models.vit import SAVE_MATMULS, FinalNorm, Remat, ViT, ViTSpec

Combine = Literal["sum", "concat"]
Pool = Literal["cls", "mean"]


class Encoder(nnx.Module):
    """A ViT together with the preprocessing its weights were trained with.

    Args:
      spec: the shape of the ViT.
      image_size: side of the square image the ViT sees. Where `spec.patch_size` does not divide it, the pixels to the
        right of and below the last whole patch stay unused, as in the Hugging Face models.
      mean: per-channel mean subtracted from images in [0, 1].
      std: per-channel standard deviation they are then divided by.
      final_norm: `affine` keeps the last LayerNorm's scale and bias (as Hugging Face models do), `plain` has none.
        Encoders without that LayerNorm know `affine` only, and hand over tokens as they are.
      layers: the blocks whose tokens make the features, each after the last LayerNorm; 1 is the first block. They
        must ascend. Empty: the last block.
      combine: how the tokens of several layers become features: their `sum`, or side by side (`concat`).
      remat: see `Transformer`.
      dtype: the type the ViT computes in; parameters are float32.
      rngs: source of the initial parameters.

    Attributes:
      width: feature width d, which is the ViT's, times the number of layers where they are concatenated.
      patch_size: side of a patch in pixels.
      grid: tokens per side; an image becomes N = grid**2 tokens in raster order.

    Raises:
      ValueError: layers that do not exist or ascend, an unknown `combine`, or a `final_norm` that cannot apply.
    """

    def __init__(self, spec: ViTSpec, *, image_size: int, mean: tuple[float, float, float],
                 std: tuple[float, float, float], final_norm: FinalNorm = "affine", layers: tuple[int, ...] = (),
                 combine: Combine = "sum", remat: Remat = SAVE_MATMULS, dtype=jnp.float32, rngs: nnx.Rngs):
        if list(layers) != sorted(set(layers) & set(range(1, spec.depth + 1))):
            raise ValueError(f"layers {tuple(layers)} must ascend within 1 and {spec.depth}, the encoder's depth")
        if combine not in get_args(Combine):
            raise ValueError(f"combine {combine!r} is unknown: use {' or '.join(get_args(Combine))}")
        self.image_size = image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.layers, self.combine = tuple(layers) or (spec.depth,), combine
        self.width = spec.width * (len(self.layers) if combine == "concat" else 1)
        self.patch_size, self.grid = spec.patch_size, image_size // spec.patch_size
        self.vit = ViT(spec, image_size=self.grid * spec.patch_size, final_norm=final_norm, remat=remat, dtype=dtype,
                       rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Features of a batch of images.

        Args:
          images: `[B, H, W, 3]`, float32 in [0, 1] or uint8, of any H and W; they are resized to `image_size`.

        Returns:
          `[B, N, width]` float32: the patch tokens after the last LayerNorm, without cls and register tokens.
        """
        if images.dtype == jnp.uint8:
            images = images.astype(jnp.float32) / 255
        states = self.vit.features(self._seen(resize_bicubic(images, self.image_size)), self.layers)
        return functools.reduce(operator.add, states) if self.combine == "sum" else jnp.concatenate(states, axis=-1)

    def embedding(self, images: jax.Array, pool: Pool | None = None) -> jax.Array:
        """One vector for each image, as Frechet distances compare: the last block's tokens after the last LayerNorm.

        With DINOv2-L at `image_size=224` and the cls token this is the embedding of FD-DINOv2 (Stein et al. 2023,
        arXiv 2306.04675), whose code (layer6ai-labs/dgm-eval) resizes 8-bit images with Pillow, as
        `resize_bicubic_8bit` does. It differs from theirs in one thing: position embeddings are resampled as
        `transformers` does it, without the offset of 0.1 patches of DINOv2's own code.

        Args:
          images: `[B, H, W, 3]`, uint8, or float32 in [0, 1], which is rounded to 256 levels; of any H and W.
          pool: `cls` takes the class token, `mean` the mean of the patch tokens. None is `cls` where the encoder has
            that token (DINOv2, DINOv3, MAE, InternViT), and `mean` where not (SigLIP).

        Returns:
          `[B, d]` float32; d is the ViT's width.

        Raises:
          ValueError: an unknown `pool`, or `cls` of an encoder without a class token.
        """
        prefix = self.vit.spec.prefix_tokens
        pool = pool if pool is not None else "cls" if prefix else "mean"
        if pool not in get_args(Pool):
            raise ValueError(f"pool {pool!r} is unknown: use {' or '.join(get_args(Pool))}")
        if pool == "cls" and not prefix:
            raise ValueError("pool 'cls' cannot apply: this encoder has no class token; use 'mean'")
        images = self._seen(resize_bicubic_8bit(images, self.image_size))
        (tokens,) = self.vit.tokens(images, [self.vit.spec.depth])
        return tokens[:, 0] if pool == "cls" else jnp.mean(tokens[:, prefix:], axis=1)

    def _seen(self, images: jax.Array) -> jax.Array:
        """What the ViT is given of images in [0, 1] that have its size: whole patches, standardised."""
        side = self.grid * self.patch_size
        return (images[:, :side, :side] - jnp.asarray(self.mean, jnp.float32)) / jnp.asarray(self.std, jnp.float32)


def resize_bicubic(images: jax.Array, size: int, *, antialias: bool = False) -> jax.Array:
    """`[..., H, W, C] -> [..., size, size, C]`, as `torch.nn.functional.interpolate` resizes.

    The torch call is `interpolate(mode="bicubic", align_corners=False, antialias=antialias)`; as there, values may
    overshoot the range of the input, and nothing happens where the size is already right.
    """
    if images.shape[-3:-1] == (size, size):
        return images
    shape = (*images.shape[:-3], size, size, images.shape[-1])
    return jax.image.resize(images, shape, jax.image.ResizeMethod.CUBIC_PYTORCH, antialias=antialias)


def resize_bicubic_8bit(images: jax.Array | np.ndarray, size: int) -> jax.Array:
    """`[..., H, W, C] -> [..., size, size, C]` float32 on the 256 levels of [0, 1]: bit for bit Pillow's resizing.

    Pillow resizes 8-bit images with an antialiased bicubic filter, in fixed-point arithmetic, and rounds to 8 bits
    after the columns and again after the rows. Images are uint8, or float in [0, 1], which is rounded to the levels
    first; one with a value that is not finite becomes NaN everywhere.
    """
    images = jnp.asarray(images)
    levels = images if images.dtype == jnp.uint8 else jnp.clip(jnp.round(images * 255), 0, 255)
    levels = levels.astype(jnp.int32)
    for axis in (-2, -3):
        if levels.shape[axis] != size:
            at, weights = _pillow_taps(levels.shape[axis], size)
            weights = np.expand_dims(weights, (2, 3) if axis == -3 else 2)
            summed = sum(jnp.take(levels, at[:, tap], axis=axis) * weights[:, tap] for tap in range(at.shape[1]))
            levels = jnp.clip((summed + 2**(_PILLOW_BITS - 1)) >> _PILLOW_BITS, 0, 255)
    finite = jnp.all(jnp.isfinite(images), axis=(-3, -2, -1), keepdims=True)  # integers cannot say so
    return jnp.where(finite, levels.astype(jnp.float32) / 255, jnp.nan)


_PILLOW_BITS = 22  # of the fraction of a weight; sums of 8-bit values then fit 32 bits


def _pillow_taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels of a row of `old` make each of `new`, and their fixed-point weights: `[new, taps]` int32 twice.

    The kernel is Keys' with a = -0.5, stretched where the image shrinks and cut off at its border.
    """
    stretch = max(old / new, 1.0)
    centre = (np.arange(new)[:, None] + 0.5) * (old / new)
    first = np.maximum(np.trunc(centre - 2 * stretch + 0.5), 0)
    end = np.minimum(np.trunc(centre + 2 * stretch + 0.5), old)
    at = first + np.arange(math.ceil(2 * stretch) * 2 + 1)
    x = np.abs((at - centre + 0.5) * (1 / stretch))
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(at < end, np.where(x < 1, near, np.where(x < 2, far, 0)), 0)
    weights = weights * (1 / weights.sum(axis=1, keepdims=True)) * 2**_PILLOW_BITS
    return np.minimum(at, old - 1).astype(np.int32), np.trunc(weights + np.copysign(0.5, weights)).astype(np.int32)


def interpolate_positions(positions: jax.Array | np.ndarray, grid: int, *, antialias: bool) -> jax.Array:
    """Resamples position embeddings of a square grid to another one: `[n*n, d] -> [grid*grid, d]`, float32.

    The Hugging Face models resample bicubically with align_corners=False; `antialias` is True for DINOv2 with
    registers only, and matters when the grid shrinks or (another cubic kernel) grows.
    """
    side = round(len(positions) ** 0.5)
    square = jnp.asarray(positions, jnp.float32).reshape(side, side, -1)
    return resize_bicubic(square, grid, antialias=antialias).reshape(grid * grid, -1)
