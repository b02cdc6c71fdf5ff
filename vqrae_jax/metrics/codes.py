"""How much of a codebook is in use."""

import jax
import jax.numpy as jnp


def code_usage(counts: jax.Array) -> jax.Array:
    """The share of codes used at least once, in [0, 1]: `[K] -> []` float32."""
    return jnp.mean((counts > 0).astype(jnp.float32))


def perplexity(counts: jax.Array) -> jax.Array:
    """exp of the entropy of the usage histogram, in [1, K]: `[K] -> []` float32; K means all codes alike."""
    counts = counts.astype(jnp.float32)
    return jnp.exp(jnp.sum(jax.scipy.special.entr(counts / jnp.maximum(jnp.sum(counts), 1.0))))
