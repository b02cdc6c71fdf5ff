"""How much of a codebook is in use, and how evenly."""

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax.metrics import accumulate

MAX_COUNTS = 2**26  # uses are counted by position where positions times codes are no more: 512 MiB


def code_usage(counts: jax.Array) -> jax.Array:
    """The share of codes used at least once, in [0, 1]: `[K] -> []` float32."""
    return jnp.mean((counts > 0).astype(jnp.float32))


def perplexity(counts: jax.Array) -> jax.Array:
    """exp of the entropy of the usage histogram, in [1, K]: `[K] -> []` float32; K means all codes alike."""
    counts = counts.astype(jnp.float32)
    return jnp.exp(jnp.sum(jax.scipy.special.entr(counts / jnp.maximum(jnp.sum(counts), 1.0))))


def init(tokens: int, num_codes: int) -> accumulate.Sums:
    """The uses of codes in no images, by position where that is not too much.

    Args:
      tokens: N of an image.
      num_codes: K.
    """
    positions = tokens if tokens * num_codes <= MAX_COUNTS else 1
    return accumulate.init(jax.ShapeDtypeStruct((positions, num_codes), jnp.float32))


def update(sums: accumulate.Sums, indices: jax.Array, valid: jax.Array) -> accumulate.Sums:
    """Adds the codes `[B, N]` of the images that are `[B]` valid."""
    positions, num_codes = sums.high.shape
    cells = indices + num_codes * (jnp.arange(indices.shape[1]) % positions)
    uses = jnp.broadcast_to(valid[:, None], indices.shape).astype(jnp.float32)
    counted = jax.ops.segment_sum(uses.reshape(-1), cells.reshape(-1), positions * num_codes)
    return accumulate.add(sums, counted.reshape(positions, num_codes))


def counts(sums: accumulate.Sums) -> np.ndarray:
    """The uses, `[N, K]` int64, or `[1, K]` of all positions together."""
    return np.rint(accumulate.total(sums)).astype(np.int64)


def entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy of histograms in bits: `[..., K] -> [...]` float64; 0 where nothing was counted."""
    shares = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    return 0.0 - np.sum(shares * np.log2(np.where(shares > 0, shares, 1)), axis=-1)


def share_of_codes(counts: np.ndarray, *, uses: float) -> float:
    """The least share of the codes `[K]` that together make up this share of all uses."""
    most_used = np.cumsum(np.sort(counts)[::-1])
    return float(np.searchsorted(most_used, uses * most_used[-1]) + 1) / len(counts)


def numbers(counts: np.ndarray) -> dict[str, float]:
    """The metrics of a set of images from what `counts` gave; none where there are no codes."""
    positions, num_codes = counts.shape
    if num_codes == 1:
        return {}
    uses = counts.sum(0)
    bits = float(entropy(uses))
    by_position = {"code_bits_by_position": float(entropy(counts).mean())} if positions > 1 else {}
    return {"code_usage": float(np.mean(uses > 0)), "code_perplexity": 2**bits, "code_bits": bits, **by_position,
            "codes_of_90_percent": share_of_codes(uses, uses=0.9)}
