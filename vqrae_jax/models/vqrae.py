"""VQRAE: a pretrained encoder, a quantizer and a decoder (arXiv 2511.23386)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vqrae_jax.models.decoder import Decoder
from vqrae_jax.models.encoders import Encoder
from vqrae_jax.models.flat import Buffer
from vqrae_jax.models.quantizers import Quantized, Quantizer

LATENT_EPS = 1e-5


class Output(NamedTuple):
    """What one pass through the model yields.

    Attributes:
      images: `[B, H, W, 3]` float32, the reconstruction, about [0, 1] but not clipped to it.
      hidden: `[B, N, width]` float32, what the decoder's last linear layer made the images of.
      features: `[B, N, d]` float32, the encoder's continuous features.
      quantized: the features' codes; see `Quantized`.
    """

    images: jax.Array
    hidden: jax.Array
    features: jax.Array
    quantized: Quantized


class VQRAE(nnx.Module):
    """image -> encoder -> continuous features -> quantizer -> codes -> decoder -> image.

    Features and latents are tokens `[B, N, d]` in raster order of a square grid h x w. Latents and indices may also be
    given two-dimensionally, `[B, h, w, d]` and `[B, h, w]`.

    Args:
      encoder: images to features.
      quantizer: features to codes.
      decoder: codes to images.
      noise_tau: in training, features get Gaussian noise whose standard deviation is drawn per image from
        [0, noise_tau) (RAE, arXiv 2510.11690, section 4.3); 0 is off.
      latent_statistics: latents are handed out as (z_q - mean) / sqrt(var + 1e-5), with a mean and a variance per token
        and channel, and taken back so. What the decoder sees does not change: it is the scale that a generative model
        wants (RAE, section 3.1).
    """

    def __init__(self, *, encoder: Encoder, quantizer: Quantizer, decoder: Decoder, noise_tau: float = 0.0,
                 latent_statistics: bool = False):
        if encoder.grid != decoder.grid:
            raise ValueError(f"the encoder makes {encoder.grid} tokens a side, the decoder expects {decoder.grid}")
        self.encoder = encoder
        self.quantizer = quantizer
        self.decoder = decoder
        self.noise_tau = noise_tau
        shape = (encoder.grid**2, encoder.width)
        self.latent_mean = Buffer(jnp.zeros(shape)) if latent_statistics else None
        self.latent_var = Buffer(jnp.ones(shape)) if latent_statistics else None

    def __call__(self, images: jax.Array, *, train: bool, rng: jax.Array | None = None) -> Output:
        """`images` `[B, H, W, 3]`, float32 in [0, 1] or uint8; `rng`, a key, is needed for noise in training only."""
        features = tokens = self.encoder(images)
        if train and self.noise_tau:
            if rng is None:
                raise ValueError(f"noise with noise_tau {self.noise_tau} in training needs a key: give rng")
            level, noise = jax.random.split(rng)
            sigma = self.noise_tau * jax.random.uniform(level, (len(features), 1, 1))
            tokens = features + sigma * jax.random.normal(noise, features.shape)
        quantized = self.quantizer(tokens, train=train)
        hidden = self.decoder.hidden(self._denormalised(self._normalised(quantized.z_q)))
        return Output(self.decoder.to_images(hidden), hidden, features, quantized)

    def features(self, images: jax.Array) -> jax.Array:
        """Continuous features `[B, N, d]` float32."""
        return self.encoder(images)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Latents `[B, h, w, d]` float32, as `decode` takes them, and their indices `[B, h, w]` int32."""
        quantized = self.quantizer(self.encoder(images), train=False)
        shape = (len(images), self.encoder.grid, self.encoder.grid)
        return self._normalised(quantized.z_q).reshape(*shape, -1), quantized.indices.reshape(shape)

    def decode(self, z_q: jax.Array) -> jax.Array:
        """Latents `[B, h, w, d]` or `[B, N, d]` -> images `[B, H, W, 3]` float32, not clipped."""
        return self.decoder(self._denormalised(z_q.reshape(len(z_q), self.encoder.grid**2, self.encoder.width)))

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Indices `[B, h, w]` or `[B, N]` -> latents of the same leading shape, `[..., d]`, as `decode` takes them."""
        latents = self._normalised(self.quantizer.lookup(indices.reshape(len(indices), self.encoder.grid**2)))
        return latents.reshape(*indices.shape, latents.shape[-1])

    def _normalised(self, z: jax.Array) -> jax.Array:
        if self.latent_mean is None or self.latent_var is None:
            return z
        return (z - self.latent_mean[...]) * jax.lax.rsqrt(self.latent_var[...] + LATENT_EPS)

    def _denormalised(self, z: jax.Array) -> jax.Array:
        if self.latent_mean is None or self.latent_var is None:
            return z
        return z * jnp.sqrt(self.latent_var[...] + LATENT_EPS) + self.latent_mean[...]
