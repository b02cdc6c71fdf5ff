"""Trained models for use: images to features and codes, codes to images."""

import functools
import os
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from vqrae_jax.config import Config
from vqrae_jax.models import flat
from vqrae_jax.models.encoders import Encoder
from vqrae_jax.models.flat import Arrays
from vqrae_jax.models.quantizers import Quantizer
from vqrae_jax.models.vit import FinalNorm
from vqrae_jax.tokenizer import build, runs
from vqrae_jax.training import sharding
from vqrae_jax.training.checkpoint import Weights
from vqrae_jax.weights import huggingface

# What rounding may add to images in [0, 1]. Resampling overshoots by a hundred times as much, and wants to be clipped.
_TOLERANCE = 1e-3
_MAX_LISTED_CODES = 2**20


class Tokenizer:
    """A trained VQRAE. Images are `[B, H, W, 3]`, float in [0, 1] or uint8, of the size it was trained for.

    Its methods can be called, and differentiated with respect to images and latents, inside `jax.jit`, `jax.grad` and
    `jax.shard_map` of the caller's. There the values of images and codes are not known, and their ranges not checked.

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
        self._arrays = sharding.off_mesh(arrays)
        self._grid = model.encoder.grid
        self._features = jax.jit(lambda arrays, images: flat.merge(graphdef, arrays).features(images))
        self._encode = jax.jit(lambda arrays, images: flat.merge(graphdef, arrays).encode(images))
        self._codebook = jax.jit(lambda arrays: flat.merge(graphdef, arrays).quantizer.lookup(
            jnp.arange(self.num_codes, dtype=jnp.int32)))
        self._decode_codes = jax.jit(functools.partial(decode_codes, graphdef))
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
        codes = codes if isinstance(codes, Tracer) else np.asarray(codes)
        if not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"codes must be integers, not {codes.dtype}")
        if codes.shape[1:] not in ((self._grid, self._grid), (self._grid**2,)):
            raise ValueError(f"codes must be [B, {self._grid}, {self._grid}] or [B, {self._grid**2}], "
                             f"not {codes.shape}")
        if isinstance(codes, np.ndarray) and len(wrong := np.argwhere((codes < 0) | (codes >= self.num_codes))):
            at = tuple(int(i) for i in wrong[0])
            raise ValueError(f"code {codes[at]} at {at} is out of range: this model has codes 0 to "
                             f"{self.num_codes - 1}")
        return self._decode_codes(self._arrays, jnp.asarray(codes, jnp.int32))

    def codebook(self) -> jax.Array:
        """The vectors that codes stand for, `[num_codes, d]` float32, as the decoder sees them: after all projections.

        `codebook()[codes]` are the latents that `encode` gives and `decode` takes, up to rounding; so
        `decode(probabilities @ codebook())` shows, with a gradient, the mean of what a generator thinks likely. In a
        model with `latent_statistics` latents are these vectors normalised by position, and only
        `decode_from_indices` makes images of codes.

        Raises:
          ValueError: the model has no codes, or more than 2^20, which FSQ can have.
        """
        if self.num_codes > _MAX_LISTED_CODES:
            raise ValueError(f"this model has {self.num_codes} codes, too many to list: decode_from_indices takes any")
        return self._codebook(self._arrays)

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
        _check_range(images)
        return images.astype(jnp.float32)


def encode_codes(graphdef: nnx.GraphDef, arrays: Arrays, images: jax.Array) -> jax.Array:
    """Images, uint8 `[B, H, W, 3]`, to their codes, `[B, h, w]` int32: pure, to be compiled for any mesh."""
    return flat.merge(graphdef, arrays).encode(images.astype(jnp.float32) / 255)[1]


def decode_codes(graphdef: nnx.GraphDef, arrays: Arrays, codes: jax.Array) -> jax.Array:
    """Codes to images: what `Tokenizer.decode_from_indices` does after its checks, for a sampler to call.

    It is pure, and can be part of a compiled function whose batch is split over a mesh (`sharding.on` it); the arrays
    are then those that `runs.load_run` puts there, and an argument of that function, or they would be constants of it.

    Args:
      graphdef: of the model.
      arrays: all its parameters and buffers.
      codes: `[B, h, w]` or `[B, N]` int32 in [0, num_codes), which is not checked.

    Returns:
      `[B, H, W, 3]` float32 in [0, 1].
    """
    model = flat.merge(graphdef, arrays)
    # Compiled as one, the end of the one and the beginning of the other could round differently from `decode` alone.
    z_q = jax.lax.optimization_barrier(model.lookup(codes))
    return jnp.clip(model.decode(z_q), 0, 1)


def _check_range(images: jax.Array) -> None:
    """Refuses values beyond [0, 1] or not finite, where they are known: not inside `jax.jit` and its like."""
    fine = jnp.all((images >= -_TOLERANCE) & (images <= 1 + _TOLERANCE))
    if not isinstance(fine, Tracer) and not fine:
        values = np.asarray(images, np.float32)
        raise ValueError(f"float images must be in [0, 1], but these are between {values.min():.4g} and "
                         f"{values.max():.4g}: divide by 255 what has 256 levels, and clip what resampling overshot")


def read_images(files: str | os.PathLike | Iterable[str | os.PathLike], size: int) -> np.ndarray:
    """Image files as a tokenizer takes them, made exactly as evaluation makes them.

    The short side is resized to `size` with an antialiased bicubic filter, then the centre square is kept. EXIF
    orientation, transparency and 16-bit values are taken care of.

    Args:
      files: one or several.
      size: side of the result; `Tokenizer.image_size`.

    Returns:
      uint8 `[B, size, size, 3]`, RGB, in the order of the files.

    Raises:
      OSError: a file cannot be read.
      ValueError: a file is no image, or damaged; the message names it. Or there are no files.
    """
    files = [files] if isinstance(files, str | os.PathLike) else list(files)
    if not files:
        raise ValueError("no images given")
    return np.stack([_read_image(Path(file), size) for file in files])


def _read_image(file: Path, size: int) -> np.ndarray:
    # Not at the top: Grain, which comes with it, defines flags, and `import vqrae_jax` should define none.
    from vqrae_jax.data import resize_and_center_crop

    try:
        return resize_and_center_crop(file.read_bytes(), size=size)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def load(workdir: str | os.PathLike, *, step: int | None = None, weights: Weights = "ema",
         quantizer: Quantizer | None = None) -> Tokenizer:
    """The model of a run's folder.

    Args:
      workdir: the folder, or that of a packed model, or `nano`, the one that ships with this package and was trained on
        CIFAR-10.
      step: which checkpoint; None is the last.
      weights: `ema` is the moving average of the weights, `raw` the weights as they were trained. In a run without
        averages (`optim.ema_decay` 0) both are the same.
      quantizer: of a run that was trained with one given as an object: that object, or one like it.

    Raises:
      OSError: not the folder of a run, or no checkpoint in it, or not that one; or files are damaged.
      ValueError: other `weights`; the run needs `quantizer`, or takes none; it is that of a generator.
    """
    return Tokenizer(*runs.load_run(Path(workdir), sharding.one_device(), step=step, weights=weights,
                                    quantizer=quantizer))


def load_encoder(hf_dir_or_hub_id: str | os.PathLike, image_size: int | None = None,
                 final_norm: FinalNorm = "affine") -> Encoder:
    """A pretrained encoder: `load_encoder(path)(images)` gives `[B, N, d]` float32 features.

    Args:
      hf_dir_or_hub_id: a Hugging Face folder, the id of a model on the hub, or `nano`, the one that ships with this
        package.
      image_size: side of the image that the encoder sees (others are resized to it); None is its native one.
      final_norm: `affine` keeps the last LayerNorm's scale and bias, as Hugging Face does; `plain` leaves them out.

    Raises:
      OSError: files are missing or damaged.
      ValueError: an unsupported model, a tensor that does not fit, or a size the patch does not divide.
    """
    path = os.fspath(hf_dir_or_hub_id)
    return huggingface.build_encoder(build.NANO if path == "nano" else path, image_size=image_size,
                                     final_norm=final_norm)
