"""Which code is nearest to a token, and k-means, which asks that."""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from vqrae_jax.models.placement import split_batch, whole

Search = Literal["euclidean", "cosine"]

MAX_SCORES = 2**25  # entries of the [tokens, codes] matrix that exist at once by default: 128 MiB
BLOCK_CODES = 512
KMEANS_ITERATIONS = 10


def nearest_code(z: jax.Array, codes: jax.Array, *, metric: Search = "euclidean",
                 block_tokens: int | None = None) -> jax.Array:
    """The index of the code nearest to each token, the first one on ties: `[N, e], [K, e] -> [N]` int32.

    Ranks by |c|^2 / 2 - z.c, which orders codes as |z - c|^2 does, or by -z.c / |c| for "cosine" (a token's own
    length changes no ranking). Computed in float32; no gradient flows. Codes are compared `BLOCK_CODES` at a time, so
    that on a CPU the scores stay in its cache, and memory does not grow with the number of codes.

    Args:
      z: tokens, any float dtype.
      codes: the codebook.
      metric: "euclidean" or "cosine".
      block_tokens: tokens compared at once, over all devices; None keeps their scores below `MAX_SCORES` entries.
    """
    z = split_batch(jax.lax.stop_gradient(z).astype(jnp.float32))
    codes = whole(jax.lax.stop_gradient(codes).astype(jnp.float32))
    if metric == "cosine":
        codes = codes / norm(codes)
        offsets = jnp.zeros(len(codes))
    else:
        offsets = 0.5 * jnp.sum(codes**2, axis=-1)
    tokens, dim = z.shape
    size = len(codes)
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

    blocks = math.ceil(tokens / (block_tokens or MAX_SCORES // width))
    if blocks <= 1:
        return search(z)
    block = math.ceil(tokens / blocks)
    z = jnp.pad(z, ((0, block * blocks - tokens), (0, 0)))
    # A block takes every `blocks`-th token, not a run of them: where tokens are sharded over devices, each device then
    # has its share of every block.
    indices = jax.lax.map(search, z.reshape(block, blocks, dim).swapaxes(0, 1))
    return indices.swapaxes(0, 1).reshape(-1)[:tokens]


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
