"""Hints to XLA where arrays are while a step runs on many devices.

Without a mesh around them they do nothing, nor in one of a user's own whose axes are not left to XLA.

A model does not know the axes of a mesh. It knows that the batch is split over all devices, whatever their arrangement,
and that a parameter, wherever it is kept, is whole where it is used. Said at every dense layer and at the code search,
this is all that keeps XLA from splitting tokens by their width, or codes among the devices.
"""

import jax
from jax.sharding import AxisType, PartitionSpec


def split_batch(x: jax.Array) -> jax.Array:
    """`x` with its first dimension, images or tokens, split over all devices."""
    return _hint(x, PartitionSpec(jax.sharding.get_abstract_mesh().axis_names))


def whole(x: jax.Array) -> jax.Array:
    """`x` with a copy on every device."""
    return _hint(x, PartitionSpec())


def devices() -> int:
    """Over how many devices `split_batch` splits."""
    return jax.sharding.get_abstract_mesh().size if _hints() else 1


def _hint(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, spec) if _hints() else x


def _hints() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and all(kind == AxisType.Auto for kind in mesh.axis_types)
