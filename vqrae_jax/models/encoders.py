"""Pretrained vision encoders: images in, continuous features out. Their weights come from `vqrae_jax.weights`."""

import functools
import operator
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vqrae_jax.models.vit import SAVE_MATMULS, FinalNorm, Remat, ViT, ViTSpec

Combine = Literal["sum", "concat"]


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
        side = self.grid * self.patch_size
        images = resize_bicubic(images, self.image_size)[:, :side, :side]
        images = (images - jnp.asarray(self.mean, jnp.float32)) / jnp.asarray(self.std, jnp.float32)
        states = self.vit.features(images, self.layers)
        return functools.reduce(operator.add, states) if self.combine == "sum" else jnp.concatenate(states, axis=-1)


def resize_bicubic(images: jax.Array, size: int, *, antialias: bool = False) -> jax.Array:
    """`[..., H, W, C] -> [..., size, size, C]`, as `torch.nn.functional.interpolate` resizes.

    The torch call is `interpolate(mode="bicubic", align_corners=False, antialias=antialias)`; as there, values may
    overshoot the range of the input, and nothing happens where the size is already right.
    """
    if images.shape[-3:-1] == (size, size):
        return images
    shape = (*images.shape[:-3], size, size, images.shape[-1])
    return jax.image.resize(images, shape, jax.image.ResizeMethod.CUBIC_PYTORCH, antialias=antialias)


def interpolate_positions(positions: jax.Array | np.ndarray, grid: int, *, antialias: bool) -> jax.Array:
    """Resamples position embeddings of a square grid to another one: `[n*n, d] -> [grid*grid, d]`, float32.

    The Hugging Face models resample bicubically with align_corners=False; `antialias` is True for DINOv2 with
    registers only, and matters when the grid shrinks or (another cubic kernel) grows.
    """
    side = round(len(positions) ** 0.5)
    square = jnp.asarray(positions, jnp.float32).reshape(side, side, -1)
    return resize_bicubic(square, grid, antialias=antialias).reshape(grid * grid, -1)
