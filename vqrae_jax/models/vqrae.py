"""VQRAE: a pretrained encoder, a quantizer and a decoder (arXiv 2511.23386)."""

from typing import NamedTuple

import jax
from flax import nnx

from vqrae_jax.models.decoder import Decoder
from vqrae_jax.models.encoders import Encoder
from vqrae_jax.models.quantizers import EMAVQ, FSQ, Quantized, SimVQ

Quantizer = SimVQ | EMAVQ | FSQ


class Output(NamedTuple):
    """What one pass through the model yields.

    Attributes:
      images: `[B, H, W, 3]` float32, the reconstruction, about [0, 1] but not clipped to it.
      features: `[B, N, d]` float32, the encoder's continuous features.
      quantized: the features' codes; see `Quantized`.
    """

    images: jax.Array
    features: jax.Array
    quantized: Quantized


class VQRAE(nnx.Module):
    """image -> encoder -> continuous features -> quantizer -> codes -> decoder -> image.

    Features and latents are tokens `[B, N, d]` in raster order of a square grid h x w. Latents and indices may also be
    given two-dimensionally, `[B, h, w, d]` and `[B, h, w]`.
    """

    def __init__(self, *, encoder: Encoder, quantizer: Quantizer, decoder: Decoder):
        if encoder.grid != decoder.grid:
            raise ValueError(f"the encoder makes {encoder.grid} tokens a side, the decoder expects {decoder.grid}")
        self.encoder = encoder
        self.quantizer = quantizer
        self.decoder = decoder

    def __call__(self, images: jax.Array, *, train: bool) -> Output:
        """`images` `[B, H, W, 3]`, float32 in [0, 1] or uint8."""
        features = self.encoder(images)
        quantized = self.quantizer(features, train=train)
        return Output(self.decoder(quantized.z_q), features, quantized)

    def features(self, images: jax.Array) -> jax.Array:
        """Continuous features `[B, N, d]` float32."""
        return self.encoder(images)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Latents `[B, h, w, d]` float32, as the decoder sees them, and their indices `[B, h, w]` int32."""
        quantized = self.quantizer(self.encoder(images), train=False)
        shape = (len(images), self.encoder.grid, self.encoder.grid)
        return quantized.z_q.reshape(*shape, -1), quantized.indices.reshape(shape)

    def decode(self, z_q: jax.Array) -> jax.Array:
        """Latents `[B, h, w, d]` or `[B, N, d]` -> images `[B, H, W, 3]` float32, not clipped."""
        return self.decoder(z_q.reshape(len(z_q), self.encoder.grid**2, self.encoder.width))

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Indices `[B, h, w]` or `[B, N]` -> latents of the same leading shape, `[..., d]`."""
        return self.quantizer.lookup(indices)
