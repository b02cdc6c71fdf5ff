"""Which code is nearest to a token, and k-means, which asks that."""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from vqrae_jax.models.placement import devices, split_batch, whole
from vqrae_jax.models.quantizers import pairs

Search = Literal["euclidean", "cosine"]

MAX_SCORES = 2**25  # entries of the [tokens, codes] matrix that exist at once by default: 128 MiB
BLOCK_CODES = 512
FEW = 32  # codes that are compared exactly at less than the price of a float32 search on a TPU
KMEANS_ITERATIONS = 10


def nearest_code(z: jax.Array, codes: jax.Array, *, metric: Search = "euclidean",
                 block_tokens: int | None = None) -> jax.Array:
    """The index of the code nearest to each token, the first one on ties: `[N, e], [K, e] -> [N]` int32.

    Ranks by |c|^2 / 2 - z.c, which orders codes as |z - c|^2 does, or by -z.c / |c| for "cosine" (a token's own
    length changes no ranking). No gradient flows. Where a token or any code is not finite, some index below K.

    On a CPU the ranks are float32: `search_float32`. On accelerators they are exact, at the price of one bfloat16
    matmul: `search_exactly`. So indices differ between the two where float32 cannot tell codes apart, whose squared
    distances from the token then differ by at most e 2^-22 (|z||c| + |c|^2), and usually by a hundredth of that.

    Args:
      z: tokens, any float dtype.
      codes: the codebook.
      metric: "euclidean" or "cosine".
      block_tokens: tokens compared at once, over all devices; None keeps their scores below `MAX_SCORES` entries, on
        an accelerator those of each device.
    """
    z = split_batch(jax.lax.stop_gradient(z).astype(jnp.float32))
    codes = whole(jax.lax.stop_gradient(codes).astype(jnp.float32))
    options = {"metric": metric, "block_tokens": block_tokens}
    return jax.lax.platform_dependent(z, codes, cpu=functools.partial(search_float32, **options),
                                      default=functools.partial(search_exactly, **options))


def search_float32(z: jax.Array, codes: jax.Array, *, metric: Search, block_tokens: int | None) -> jax.Array:
    """`nearest_code` by one float32 matmul, of which near ties are as float32 rounds them.

    Codes are compared `BLOCK_CODES` at a time, so that on a CPU the scores stay in its cache, and memory does not grow
    with the number of codes.
    """
    if metric == "cosine":
        codes = codes / norm(codes)
        offsets = jnp.zeros(len(codes))
    else:
        offsets = 0.5 * jnp.sum(codes**2, axis=-1)
    size, dim = codes.shape
    width = min(size, BLOCK_CODES)
    count = math.ceil(size / width)
    padding = count * width - size
    stacked = (jnp.pad(codes, ((0, padding), (0, 0))).reshape(count, width, dim),
               jnp.pad(offsets, (0, padding), constant_values=jnp.inf).reshape(count, width),
               jnp.arange(count, dtype=jnp.int32) * width)

    def search(block):

        def compare(best, block_of_codes):
            best_score, best_index = best
            codes, offsets, first = block_of_codes
            scores = offsets - jnp.matmul(block, codes.T, precision=jax.lax.Precision.HIGHEST)
            score = jnp.min(scores, axis=-1, keepdims=True)
            # Two plain reductions: XLA's CPU code for argmin is several times slower. NaN equals nothing: clipped.
            places = jnp.where(scores == score, jnp.arange(width, dtype=jnp.int32), width - 1)
            score, index = score[:, 0], first + jnp.min(places, axis=-1)
            return (jnp.minimum(score, best_score), jnp.where(score < best_score, index, best_index)), None

        start = (jnp.full(len(block), jnp.inf), jnp.zeros(len(block), jnp.int32))
        return jax.lax.scan(compare, start, stacked)[0][1]

    return _in_blocks(search, z, block_tokens or MAX_SCORES // width, padding=0)


def search_exactly(z: jax.Array, codes: jax.Array, *, metric: Search, block_tokens: int | None) -> jax.Array:
    """`nearest_code` as if without rounding: a bfloat16 matmul leaves a few codes, which are then compared in 48 bits.

    1. Tokens and codes are moved by the mean of the codes, which changes no ranking and makes them, and with them what
       rounding does, as small as it can be. ("cosine": only codes, which have length 1.)
    2. With z and c rounded to bfloat16 z', c', the scores |c|^2 / 2 - z'.c' take one pass of a matrix unit. By Cauchy
       and Schwarz they are wrong by at most

           |z - z'| |c| + |z'| |c - c'| + (e + 16) 2^-22 (|z||c| + |c|^2 / 2)

       where all lengths are those of the numbers at hand. The last term is what float32 does. Sums of e products in any
       order err by e 2^-24 |z||c| (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1), or
       twice that where hardware truncates instead of rounding, as tensor cores do (Fasi, Higham, Mikaitis and Pranesh,
       PeerJ Computer Science 7:e330, 2021); the rest is for what else is rounded on the way. ("cosine": and
       2^-18 |z|, for codes were divided by their lengths.)
    3. A code may be the nearest if its score less its error is no greater than the least score plus error. On random
       codes of width 1536 that leaves 3 of 16384, 18 at worst; on k-means of features one, 5 at worst.
    4. These are compared, one after the other, in pairs of float32 numbers: see `_nearer`.

    All tokens of a block do as many comparisons as the one with most codes left. Where these are more than `FEW`, the
    block is searched again in float32 (six passes on a TPU) and the same bound without its first two terms, which
    leaves fewer to compare: as many as there are codes that float32 might confuse.

    Squares of distances must be within the range of float32: a code longer than 1e18 may not be found, and among codes
    that are all shorter than 1e-12 digits are lost.
    """
    size, dim = codes.shape
    squares = None
    if metric == "cosine":
        # Powers of two change no digit, and of lengths near 1 no square overflows.
        # A token of length 0 becomes NaN, to which nothing is compared: its index is 0.
        z, codes = z / _power_of_two(_length(z)[:, None]), codes / _power_of_two(norm(codes))
        squares = _dot((codes, jnp.zeros(())), (codes, jnp.zeros(())))
        ranked, weights = codes / jnp.sqrt(jnp.maximum(squares[0], 1e-24))[:, None], jnp.ones(size)
    else:  # a mean that a few long codes cannot move
        lengths = _length(codes)
        ranked, weights = codes, 1 / jnp.maximum(lengths, jnp.median(lengths) + 1e-15) ** 2
    centre = jnp.sum(weights[:, None] * ranked, axis=0) / jnp.sum(weights)
    moved = ranked - centre
    lengths = _length(moved)
    offsets = jnp.zeros(size) if metric == "cosine" else 0.5 * lengths**2
    rounded = _to_bfloat16(moved)
    residuals = _length(moved - rounded.astype(jnp.float32))
    float32_error, normalising_error = (dim + 16) * 2**-22, 2**-18 if metric == "cosine" else 0
    words = math.ceil(size / 32)

    def candidates(z, rounded_z, rounded, residuals, precision):
        """Which codes may be the nearest, `[T, words]` uint32: bit b of word w is that of code b * words + w."""
        products = jnp.matmul(rounded_z, rounded.T, precision=precision, preferred_element_type=jnp.float32)
        rounded_z = rounded_z.astype(jnp.float32)
        of_z, of_rounded_z = _length(z - rounded_z) + float32_error * _length(z), _length(rounded_z)
        error = of_z[:, None] * lengths + of_rounded_z[:, None] * (residuals + normalising_error)
        error = error + float32_error * offsets
        scores = offsets - products
        near = scores - error <= jnp.min(scores + error, axis=-1, keepdims=True)
        near = jnp.pad(near, ((0, 0), (0, 32 * words - size))).reshape(-1, 32, words)
        return jnp.sum(near.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32)[:, None], axis=1, dtype=jnp.uint32)

    def search(z):
        tokens = z if metric == "cosine" else z - centre
        bits = candidates(tokens, _to_bfloat16(tokens), rounded, residuals, jax.lax.Precision.DEFAULT)
        again = lambda: candidates(tokens, tokens, moved, jnp.zeros(size), jax.lax.Precision.HIGHEST)
        bits = jax.lax.cond(_most(bits) > FEW, again, lambda: bits)

        def compare(_, state):
            """Takes the next of each token's candidates, and keeps it where it is nearer than the best so far."""
            bits, best = state
            places = jnp.arange(words, dtype=jnp.int32)
            place = jnp.min(jnp.where(bits > 0, places, words - 1), axis=-1, keepdims=True)
            word = jnp.sum(jnp.where(places == place, bits, 0), axis=-1, dtype=jnp.uint32)
            bit = jax.lax.population_count((word & -word) - 1).astype(jnp.int32)  # of the lowest that is set
            code = jnp.where(word > 0, bit * words + place[:, 0], best)
            gain = _nearer(z, codes[code], codes[best], squares and (squares[0][best], squares[1][best]))
            best = jnp.where((gain > 0) | ((gain == 0) & (code < best)), code, best)
            return jnp.where(places == place, bits & (bits - 1), bits), best

        return jax.lax.fori_loop(0, _most(bits), compare, (bits, jnp.zeros(len(z), jnp.int32)))[1]

    # Nothing may be nearest to NaN, where to zeros, by cosine, all may.
    return _in_blocks(search, z, block_tokens or devices() * max(MAX_SCORES // size, 1), padding=jnp.nan)


def _nearer(z: jax.Array, a: jax.Array, b: jax.Array, square: pairs.Pair | None) -> jax.Array:
    """Above zero where a is nearer to z than b, below it where b is, zero where both are equally near: `[T, e] -> [T]`.

    With d = a - b, |z - b|^2 - |z - a|^2 is d.(2 z - a - b), of which 48-bit sums and products are wrong by less than
    2^-36 |d| |2 z - a - b|. By cosine, where z.a and z.b have one sign, a's is the larger in size if
    (z.a)^2 |b|^2 - (z.b)^2 |a|^2 > 0, which is z.b (2 z.d |b|^2 - z.b d.(a + b)) + (z.d)^2 |b|^2. Both are made of d,
    for then what a and b have in common takes no digits of what they have not.

    Args:
      z: tokens.
      a: a code for each.
      b: another.
      square: |b|^2 for "cosine", None for "euclidean".
    """
    add, multiply, subtract = pairs.add, pairs.multiply, pairs.subtract
    token, code, other = ((x, jnp.zeros(())) for x in (z, a, b))
    d, both = subtract(code, other), add(code, other)
    if square is None:
        return _dot(d, subtract(add(token, token), both))[0]
    of_b, of_d = _dot(token, other), _dot(token, d)
    change = subtract(multiply(add(of_d, of_d), square), multiply(of_b, _dot(d, both)))
    larger, _ = add(multiply(of_b, change), multiply(multiply(of_d, of_d), square))
    sign, sign_of_a = jnp.sign(of_b[0]), jnp.sign(add(of_b, of_d)[0])
    return jnp.where(sign * sign_of_a > 0, sign * larger, of_d[0])


def _dot(a: pairs.Pair, b: pairs.Pair) -> pairs.Pair:
    return pairs.total(pairs.multiply(a, b))


def _in_blocks(search: Callable[[jax.Array], jax.Array], z: jax.Array, block_tokens: int, padding: float) -> jax.Array:
    """`search` of so many tokens at once, `[N, e] -> [N]`; `padding` makes the last block whole."""
    tokens, dim = z.shape
    blocks = math.ceil(tokens / block_tokens)
    if blocks <= 1:
        return search(z)
    block = math.ceil(tokens / blocks)
    z = jnp.pad(z, ((0, block * blocks - tokens), (0, 0)), constant_values=padding)
    # A block takes every `blocks`-th token, not a run of them: where tokens are sharded over devices, each device then
    # has its share of every block.
    indices = jax.lax.map(search, z.reshape(block, blocks, dim).swapaxes(0, 1))
    return indices.swapaxes(0, 1).reshape(-1)[:tokens]


def _power_of_two(x: jax.Array) -> jax.Array:
    """The largest power of two that is not above x, a positive float32; 0 for 0."""
    exponent = jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7F800000
    return jax.lax.bitcast_convert_type(exponent, jnp.float32)


def _to_bfloat16(x: jax.Array) -> jax.Array:
    # A plain cast and back may be optimised away, and the difference from x with it.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16)


def _length(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x, axis=-1))


def _most(bits: jax.Array) -> jax.Array:
    """The largest number of bits that are set in a row."""
    return jnp.max(jnp.sum(jax.lax.population_count(bits), axis=-1)).astype(jnp.int32)


def kmeans(z: jax.Array, k: int, *, iterations: int = KMEANS_ITERATIONS, rng: jax.Array, metric: Search = "euclidean",
           block_tokens: int | None = None) -> jax.Array:
    """k cluster centres of tokens by Lloyd's algorithm, started at k random tokens: `[N, e] -> [k, e]` float32.

    An iteration takes 2 N k e operations, of which each device does its share, for the tokens are split over them. A
    centre that no token is nearest to moves to a random token. With "cosine" tokens are assigned by direction, and a
    centre is still the mean of its tokens.

    Raises:
      ValueError: fewer tokens than centres.
    """
    if len(z) < k:
        raise ValueError(f"k-means cannot place {k} centres among {len(z)} tokens: give it at least {k} tokens")
    z = split_batch(jax.lax.stop_gradient(z).astype(jnp.float32))
    sample = lambda key: z[jax.random.choice(key, len(z), (k,), replace=False)]

    def iterate(centres, key):
        nearest = nearest_code(z, centres, metric=metric, block_tokens=block_tokens)
        counts = count_uses(nearest, k)[:, None]
        means = jax.ops.segment_sum(z, nearest, num_segments=k) / jnp.maximum(counts, 1).astype(jnp.float32)
        return jnp.where(counts > 0, means, sample(key)), None

    first, *rest = jax.random.split(rng, iterations + 1)
    return jax.lax.scan(iterate, sample(first), jnp.stack(rest))[0] if rest else sample(first)


def norm(x: jax.Array) -> jax.Array:
    """Lengths of vectors, `[..., e] -> [..., 1]`, at least 1e-12."""
    # The bound lies inside the square root, whose derivative at zero is infinite.
    return jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def count_uses(indices: jax.Array, num_codes: int) -> jax.Array:
    """How often each code is used: `[...] -> [num_codes]`, int32."""
    return jax.ops.segment_sum(jnp.ones(indices.size, jnp.int32), indices.reshape(-1), num_segments=num_codes)
