"""Losses: arrays in, float32 scalars out."""

import jax
import jax.numpy as jnp


def l1(x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean absolute difference over all elements, in float32."""
    return jnp.mean(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)))


def l2(x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean squared difference over all elements, in float32.

    The pixel loss, and, between continuous features of student and frozen teacher, the distillation loss
    ||Z_I - T(X)||^2 (VQRAE, arXiv 2511.23386, section 3.3).
    """
    return jnp.mean(jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32)))
