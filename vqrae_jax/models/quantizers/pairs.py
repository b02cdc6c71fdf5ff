"""Arithmetic of 48 bits on accelerators, which have no float64: every number is the exact sum of two float32.

`(high, low)` with |low| at most half a unit in the last place of `high`. Sums and products are those of Dekker, A
floating-point technique for extending the available precision, Numerische Mathematik 18 (1971), with the error of a
float32 sum by Knuth (The Art of Computer Programming, volume 2, section 4.2.2, theorem B). Each has a relative error of
at most 2^-44 where its terms have one sign. A compiler that reorders float32 additions would break them: XLA does not,
and what it may do, to join a product with an addition without rounding between them, changes nothing where the products
are exact, as all are here.
"""

import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]


def add(a: Pair, b: Pair) -> Pair:
    """a + b, to 2^-44 of |a| + |b|."""
    high, error = exact_sum(a[0], b[0])
    return _normal(high, error + (a[1] + b[1]))


def subtract(a: Pair, b: Pair) -> Pair:
    """a - b, to 2^-44 of |a| + |b|; exact where both are float32, their `low` 0."""
    return add(a, (-b[0], -b[1]))


def multiply(a: Pair, b: Pair) -> Pair:
    """a b, to 2^-44 of it where it is above 1e-30: smaller ones lose digits."""
    high, error = _exact_product(a[0], b[0])
    return _normal(high, error + (a[0] * b[1] + a[1] * b[0]))


def total(a: Pair) -> Pair:
    """The sum over the last axis, `[..., n] -> [...]`, to (n / 32 + 32) 2^-44 of the sum of absolute values."""
    *outer, size = a[0].shape
    padding = [(0, 0)] * len(outer) + [(0, -size % 32)]
    high, low = (jnp.pad(x, padding).reshape(*outer, -1, 32) for x in a)
    for _ in range(2):  # two short sums in turn, for rounding grows with the number of terms
        high, low = jax.lax.reduce((high, low), (jnp.float32(0), jnp.float32(0)), add, (len(outer),))
    return high, low


def exact_sum(a: jax.Array, b: jax.Array) -> Pair:
    """a + b of float32, without any error."""
    high = a + b
    virtual = high - a
    return high, (a - (high - virtual)) + (b - virtual)


def _exact_product(a: jax.Array, b: jax.Array) -> Pair:
    """a b of float32, without any error, of halves with 12 bits each, whose products float32 holds."""
    high = a * b
    halves = lambda x: (jax.lax.reduce_precision(x, 8, 11), x - jax.lax.reduce_precision(x, 8, 11))
    (a1, a2), (b1, b2) = halves(a), halves(b)
    return high, ((a1 * b1 - high) + a1 * b2 + a2 * b1) + a2 * b2


def _normal(high: jax.Array, low: jax.Array) -> Pair:
    """The same sum, where |low| is below |high|, with `low` as small as it can be."""
    total = high + low
    return total, low - (total - high)
