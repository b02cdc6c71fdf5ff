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

    The error of each addition is Knuth's two-sum (The Art of Computer Programming, volume 2, section 4.2.2, theorem B).
    Integers below 2**24 are added exactly up to sums of 2**48.
    """
    high = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), acc.high, values)
    low = jax.tree.map(lambda low, a, b, total: low + _rounding(a, b.astype(jnp.float32), total), acc.low, acc.high,
                       values, high)
    return Sums(high, low)


def _rounding(a: jax.Array, b: jax.Array, total: jax.Array) -> jax.Array:
    """What `total`, float32 a + b, is short of the exact sum."""
    virtual = total - a
    return (a - (total - virtual)) + (b - virtual)


def merge(a: Sums, b: Sums) -> Sums:
    """The sum of two sums."""
    return add(add(a, b.high), b.low)


def total(acc: Sums) -> Any:
    """The tree of sums as float64 NumPy arrays; what is infinite or NaN in any term is so in its sum."""
    def both(high: Any, low: Any) -> np.ndarray:
        high, low = np.asarray(high, np.float64), np.asarray(low, np.float64)
        return np.where(np.isfinite(high), high + low, high)

    return jax.tree.map(both, *jax.device_get(acc))
