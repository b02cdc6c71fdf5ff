"""Arithmetic of 48 bits on accelerators, which have no float64: every number is the exact sum of two float32.

`(high, low)` with |low| at most half a unit in the last place of `high`. Sums and products are those of Dekker, A
floating-point technique for extending the available precision, Numerische Mathematik 18 (1971), with the error of a
float32 sum by Knuth (The Art of Computer Programming, volume 2, section 4.2.2, theorem B).

XLA does not reorder float32 additions, which would break them. It does join a product with an addition, without
rounding the product: so no error is taken of a product that needs rounding, only of sums of products that do not.
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
    """The sum over the last axis, `[..., n] -> [...]`, to (n / 128 + 128) 2^-44 of the sum of absolute values."""
    *outer, size = a[0].shape
    lanes = min(size, 128)
    padding = [(0, 0)] * len(outer) + [(0, -size % lanes)]
    high, low = (jnp.pad(x, padding).reshape(*outer, -1, lanes) for x in a)
    for _ in range(2):  # two short sums in turn, for rounding grows with the number of terms
        high, low = jax.lax.reduce((high, low), (jnp.float32(0), jnp.float32(0)), add, (len(outer),))
    return high, low


def exact_sum(a: jax.Array, b: jax.Array) -> Pair:
    """a + b of float32, without any error."""
    high = a + b
    virtual = high - a
    return high, (a - (high - virtual)) + (b - virtual)


def _exact_product(a: jax.Array, b: jax.Array) -> Pair:
    """a b of float32, to 2^-47 of it, by halves of 12 bits each, whose products float32 holds."""
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    high, first = _normal(a1 * b1, a1 * b2)
    high, second = _normal(high, a2 * b1)
    return high, first + second + a2 * b2


def _halves(x: jax.Array) -> Pair:
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=11)
    return high, x - high


def _normal(high: jax.Array, low: jax.Array) -> Pair:
    """The same sum, where |low| is below |high|, with `low` as small as it can be."""
    total = high + low
    return total, low - (total - high)
