"""Sums over many batches that lose nothing: float32 on the devices, float64 on the host at the end.

A float32 sum of a million equal terms is wrong in its third digit. Here every addition's rounding error is kept beside
the sum, which takes no type that accelerators do not have.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Sums(NamedTuple):
    """A running sum of trees of arrays: `high + low` of each leaf.

    Attributes:
      high: tree of float32 arrays, the sum as float32 has it.
      low: the same tree, what rounding took from it.
    """

    high: Any
    low: Any


def init(shapes: Any) -> Sums:
    """The empty sum of values with the shapes of a tree of arrays or `jax.ShapeDtypeStruct`s."""
    zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
    return Sums(zeros(), zeros())


def add(acc: Sums, values: Any) -> Sums:
    """`acc` with a tree of values added, as float32: pure, and made to be called under `jax.jit`.

    The pair of float32 numbers has 48 bits. The error of each addition is Knuth's (The Art of Computer Programming,
    volume 2, section 4.2.2, theorem B). It is added to `low`, which then moves into `high` what float32 can hold there:
    otherwise `low` would grow, and lose digits itself. Integers below 2**24 are added exactly up to sums of 2**48.
    """
    both = jax.tree.map(_add, acc.high, acc.low, values)
    return Sums(*jax.tree.transpose(jax.tree.structure(acc.high), jax.tree.structure((0, 0)), both))


def _add(high: jax.Array, low: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    high, error = _exact_sum(high, value.astype(jnp.float32))
    return _exact_sum(high, low + error)


def _exact_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 a + b, and what it is short of the exact sum: 0 where that is not finite."""
    total = a + b
    virtual = total - a
    return total, jnp.where(jnp.isfinite(total), (a - (total - virtual)) + (b - virtual), 0)


def merge(a: Sums, b: Sums) -> Sums:
    """The sum of two sums."""
    return add(add(a, b.high), b.low)


def total(acc: Sums) -> Any:
    """The tree of sums as float64 NumPy arrays; what is infinite or NaN in any term is so in its sum."""
    return jax.tree.map(lambda high, low: np.asarray(high, np.float64) + low, *jax.device_get(acc))
