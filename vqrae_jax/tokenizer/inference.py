"""Trained models for use: images to features and codes, codes to images."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vqrae_jax.config import Config
from vqrae_jax.models import flat
from vqrae_jax.models.encoders import Encoder
from vqrae_jax.models.flat import Arrays
from vqrae_jax.models.vit import FinalNorm
from vqrae_jax.tokenizer import runs
from vqrae_jax.tokenizer.runs import Weights
from vqrae_jax.training import sharding
from vqrae_jax.weights import huggingface


class Tokenizer:
    """A trained VQRAE. Images are `[B, H, W, 3]`, float32 in [0, 1] or uint8, of the size it was trained for.

    Attributes:
      config: of the run it comes from.
      image_size: side of its images in pixels.
      num_codes: codes are in [0, num_codes); 1 for an autoencoder without codes.
    """

    def __init__(self, config: Config, graphdef: nnx.GraphDef, arrays: Arrays):
        self.config = config
        self.image_size = config.data.image_size
        model = flat.merge(graphdef, arrays)
        self.num_codes = model.quantizer.num_codes
        # On their device and not on a mesh of ours, so that it works inside a mesh of the user's.
        self._arrays = {path: jnp.asarray(array).addressable_data(0) for path, array in arrays.items()}
        self._grid = model.encoder.grid
        self._features = jax.jit(lambda arrays, images: flat.merge(graphdef, arrays).features(images))
        self._encode = jax.jit(lambda arrays, images: flat.merge(graphdef, arrays).encode(images))
        self._lookup = jax.jit(lambda arrays, codes: flat.merge(graphdef, arrays).lookup(codes))
        self._decode = jax.jit(lambda arrays, z_q: jnp.clip(flat.merge(graphdef, arrays).decode(z_q), 0, 1))

    def features(self, images) -> jax.Array:
        """Continuous features for understanding: `[B, N, d]` float32, tokens in raster order."""
        return self._features(self._arrays, self._checked(images))

    def encode(self, images) -> tuple[jax.Array, jax.Array]:
        """Quantized latents `[B, h, w, d]` float32, as the decoder sees them, and their codes `[B, h, w]` int32."""
        return self._encode(self._arrays, self._checked(images))

    def encode_to_indices(self, images) -> jax.Array:
        """Codes `[B, h, w]` int32, for generation.

        Raises:
          ValueError: the model is an autoencoder without codes.
        """
        if self.num_codes == 1:
            raise ValueError("this model has no codes: its latents are continuous, see encode and decode")
        return self.encode(images)[1]

    def decode(self, z_q) -> jax.Array:
        """Latents `[B, h, w, d]` or `[B, N, d]` -> images `[B, H, W, 3]` float32 in [0, 1]."""
        return self._decode(self._arrays, jnp.asarray(z_q))

    def decode_from_indices(self, codes) -> jax.Array:
        """Codes `[B, h, w]` or `[B, N]` -> images `[B, H, W, 3]` float32 in [0, 1].

        Raises:
          ValueError: codes that are no integers, of another shape, or out of range.
        """
        codes = np.asarray(codes)
        if not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"codes must be integers, not {codes.dtype}")
        if codes.shape[1:] not in ((self._grid, self._grid), (self._grid**2,)):
            raise ValueError(f"codes must be [B, {self._grid}, {self._grid}] or [B, {self._grid**2}], "
                             f"not {codes.shape}")
        wrong = np.argwhere((codes < 0) | (codes >= self.num_codes))
        if len(wrong):
            at = tuple(int(i) for i in wrong[0])
            raise ValueError(f"code {codes[at]} at {at} is out of range: this model has codes 0 to "
                             f"{self.num_codes - 1}")
        return self.decode(self._lookup(self._arrays, jnp.asarray(codes, jnp.int32)))

    def reconstruct(self, images) -> jax.Array:
        """`decode(encode(images)[0])`, and, bit for bit, `decode_from_indices(encode_to_indices(images))`."""
        return self.decode(self.encode(images)[0])

    def _checked(self, images) -> jax.Array:
        images = jnp.asarray(images)
        if images.shape[1:] != (self.image_size, self.image_size, 3):
            raise ValueError(f"images must be [B, {self.image_size}, {self.image_size}, 3], not {images.shape}")
        if images.dtype == jnp.uint8:
            return images.astype(jnp.float32) / 255
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images must be float in [0, 1] or uint8, not {images.dtype}")
        return images.astype(jnp.float32)


def load(workdir: str | os.PathLike, *, step: int | None = None, weights: Weights = "ema") -> Tokenizer:
    """The model of a run's folder.

    Args:
      workdir: the folder.
      step: which checkpoint; None is the last.
      weights: `ema` is the moving average of the weights, `raw` the weights as they were trained. In a run without
        averages (`optim.ema_decay` 0) both are the same.

    Raises:
      OSError: not the folder of a run, or no checkpoint in it, or not that one.
      ValueError: other `weights`.
    """
    return Tokenizer(*runs.load_run(Path(workdir), sharding.one_device(), step=step, weights=weights))


def load_encoder(hf_dir_or_hub_id: str | os.PathLike, image_size: int | None = None,
                 final_norm: FinalNorm = "affine") -> Encoder:
    """A pretrained encoder: `load_encoder(path)(images)` gives `[B, N, d]` float32 features.

    Args:
      hf_dir_or_hub_id: a Hugging Face folder, or the id of a model on the hub.
      image_size: side of the image that the encoder sees (others are resized to it); None is its native one.
      final_norm: `affine` keeps the last LayerNorm's scale and bias, as Hugging Face does; `plain` leaves them out.

    Raises:
      OSError: files are missing or damaged.
      ValueError: an unsupported model, a tensor that does not fit, or a size the patch does not divide.
    """
    return huggingface.build_encoder(os.fspath(hf_dir_or_hub_id), image_size=image_size, final_norm=final_norm)
