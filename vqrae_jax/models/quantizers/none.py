"""No quantization at all."""

import jax
import jax.numpy as jnp

from vqrae_jax.models.flops import QuantizerWork
from vqrae_jax.models.quantizers.base import Quantized, Quantizer, QuantizerKind
from vqrae_jax.models.quantizers.search import count_uses


class Identity(Quantizer):
    """No quantization: the decoder sees the tokens themselves, as in a representation autoencoder (arXiv 2510.11690).

    All tokens count as uses of one code, index 0, that nothing can be looked up from.
    """

    num_codes = 1

    def codes(self) -> jax.Array:
        """Raises ValueError: there are none."""
        raise ValueError("this model has no codes: its latents are continuous, so decode what encode returns")

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Raises ValueError: there are no codes."""
        del indices
        return self.codes()

    def __call__(self, z: jax.Array, *, train: bool) -> Quantized:
        del train  # the same in training and out of it
        indices = jnp.zeros(z.shape[:-1], jnp.int32)
        return Quantized(z.astype(jnp.float32), indices, {}, {"counts": count_uses(indices, self.num_codes)})


NONE = QuantizerKind(build=lambda **_: Identity(), keys=(), work=lambda **_: QuantizerWork())
