"""VQ whose codes are moving averages."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vqrae_jax.models.flat import Buffer
from vqrae_jax.models.quantizers.base import Quantized, QuantizerKind
from vqrae_jax.models.quantizers.codebook import CodebookQuantizer, Gradient, codebook_work
from vqrae_jax.models.quantizers.search import KMEANS_ITERATIONS, Search


class EMAVQ(CodebookQuantizer):
    """Codes that are moving averages of the tokens that chose them (van den Oord et al. 2017, appendix A.1).

    The codes change only through `update_ema_codebook`; the one loss is "commitment" = mean (z - sg(q))^2. Arguments as
    for `SimVQ` and `update_ema_codebook`.

    Buffers: `codebook` [K, e], `counts` [K] and `sums` [K, e], float32, with codebook = sums / counts from the start.
    """

    moving_buffers: ClassVar[tuple[str, ...]] = ("codebook", "counts", "sums")

    def __init__(self, *, width: int, size: int, dim: int, project: bool | None = None, search: Search = "euclidean",
                 commitment_weight: float = 0.25, gradient: Gradient = "straight_through", decay: float = 0.99,
                 eps: float = 1e-5, restart_threshold: float = 0.0, block_tokens: int | None = None, rngs: nnx.Rngs):
        super().__init__(width=width, size=size, dim=dim, project=project, search=search,
                         commitment_weight=commitment_weight, gradient=gradient, block_tokens=block_tokens, rngs=rngs)
        self.decay, self.eps, self.restart_threshold = decay, eps, restart_threshold
        self._set_buffers(jax.random.normal(rngs.params(), (size, dim)))

    def _set_buffers(self, codebook: jax.Array) -> None:
        self.codebook = Buffer(codebook)
        self.counts = Buffer(jnp.ones(len(codebook)))
        self.sums = Buffer(jnp.copy(codebook))  # an array of its own: an aliased one cannot be donated

    def codes(self) -> jax.Array:
        """The codebook, `[K, e]` float32."""
        return self.codebook[...]

    def __call__(self, z: jax.Array, *, train: bool) -> Quantized:
        quantized, z, _ = self._quantize(z)
        if not train:
            return quantized
        tokens = jax.lax.stop_gradient(z).reshape(-1, z.shape[-1])
        sums = jax.ops.segment_sum(tokens, quantized.indices.reshape(-1), num_segments=self.num_codes)
        # Scattered positions, the same every step; an even stride would meet the same few columns of each image.
        positions = np.random.default_rng(0).permutation(len(tokens))[:self.num_codes]
        return quantized._replace(stats={**quantized.stats, "sums": sums, "candidates": tokens[positions]})

    @staticmethod
    def add_stats(first: dict[str, jax.Array], second: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The statistics of two micro-batches of one step: sums, but for `candidates`, which are the second's."""
        return CodebookQuantizer.add_stats(first, second) | {"candidates": second["candidates"]}

    def next_buffers(self, stats: dict[str, jax.Array], *, rng: jax.Array) -> dict[str, jax.Array]:
        """`codebook`, `counts` and `sums` after a training step whose global batch had these statistics."""
        state = {"codebook": self.codebook[...], "counts": self.counts[...], "sums": self.sums[...]}
        return update_ema_codebook(state, stats, decay=self.decay, eps=self.eps,
                                   restart_threshold=self.restart_threshold, rng=rng)

    def init_from_data(self, z: jax.Array, *, rng: jax.Array, iterations: int = KMEANS_ITERATIONS) -> dict:
        """Values that make the codes the k-means centres of tokens `[N, d]`, N >= K; for `nnx.update(self, values)`."""
        centres = self._centres(z, iterations=iterations, rng=rng)
        return {"codebook": centres, "counts": jnp.ones(len(centres)), "sums": jnp.copy(centres)}


def update_ema_codebook(state: dict[str, jax.Array], stats: dict[str, jax.Array], *, decay: float = 0.99,
                        eps: float = 1e-5, restart_threshold: float = 0.0, rng: jax.Array) -> dict[str, jax.Array]:
    """One exponential-moving-average step of an `EMAVQ` codebook: a new state; nothing is changed in place.

    counts and sums move towards the batch's by 1 - decay; codebook = sums / smoothed counts, with Laplace smoothing
    (n + eps) / (total + K eps) * total (van den Oord et al. 2017; Sonnet's VectorQuantizerEMA).

    Args:
      state: `codebook` [K, e], `counts` [K], `sums` [K, e], float32.
      stats: of the whole global batch, from `EMAVQ.__call__(..., train=True)`.
      decay: of the moving averages.
      eps: of the smoothing.
      restart_threshold: codes whose moving count falls below it are moved to random tokens of the batch, each to
        another one; 0 is off. In uses per step: an evenly used code has tokens / K.
      rng: a key that chooses the tokens.
    """
    stats = jax.lax.stop_gradient(stats)
    counts = decay * state["counts"] + (1 - decay) * stats["counts"].astype(jnp.float32)
    sums = decay * state["sums"] + (1 - decay) * stats["sums"]
    size, total = len(counts), jnp.sum(counts)
    smoothed = (counts + eps) / (total + size * eps) * total
    codebook = sums / smoothed[:, None]
    if restart_threshold > 0:
        candidates = stats["candidates"]
        dead = counts < restart_threshold
        turn = jnp.cumsum(dead) - 1  # the dead codes' numbers; those beyond the candidates wait for another step
        restart = dead & (turn < len(candidates))
        order = jax.random.permutation(rng, len(candidates))
        fresh = candidates[order[jnp.clip(turn, 0, len(candidates) - 1)]]
        # A restarted code begins with an average code's count: with its old one it would die again at once.
        count = jnp.maximum(total / size, restart_threshold)
        counts = jnp.where(restart, count, counts)
        sums = jnp.where(restart[:, None], count * fresh, sums)
        codebook = jnp.where(restart[:, None], fresh, codebook)
    return {"codebook": codebook, "counts": counts, "sums": sums}


EMA = QuantizerKind(
    build=lambda *, projection, **keys: EMAVQ(project=projection or None, **keys),
    keys=("projection", "search", "gradient", "commitment_weight", "decay", "restart_threshold"),
    work=codebook_work, sharded={"codebook": (0, 1), "sums": (0, 1)}, from_data=True)
