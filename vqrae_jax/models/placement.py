"""Hints to XLA where arrays are while a step runs on many devices; without a mesh around them they do nothing.

A model does not know the axes of a mesh. It knows that the batch is split over all devices, whatever their arrangement,
and that a parameter, wherever it is kept, is whole where it is used. Said at every dense layer and at the code search,
this is all that keeps XLA from splitting tokens by their width, or codes among the devices.
"""

import jax
from jax.sharding import PartitionSpec


def split_batch(x: jax.Array) -> jax.Array:
    """`x` with its first dimension, images or tokens, split over all devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, PartitionSpec(mesh.axis_names))


def whole(x: jax.Array) -> jax.Array:
    """`x` with a copy on every device."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, PartitionSpec())
