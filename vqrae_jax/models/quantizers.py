"""Quantizers: continuous tokens to discrete codes and back.

All share one interface:

    quantizer(z, train=...) -> Quantized   z [..., width]; nothing in the module changes
    quantizer.lookup(indices)              [...] int32 -> [..., width] float32: exactly the forward pass's z_q
    quantizer.codes()                      [K, e] float32: the codes that are looked up, in code space
    quantizer.num_codes                    K
    quantizer.loss_weights                 {name: weight} of each loss, with the keys of Quantized.losses
    quantizer.next_state(stats, rng=...)   {name: array}: its state after a training step with these statistics
    quantizer.moving_state                 names of what next_state changes: a weight EMA averages them too

`width` d is the tokens' width, `dim` e the codes'. Where they differ, a linear layer leads into code space and another
one out of it. Search, losses and statistics are float32, and every matmul here asks for full float32 precision: TPUs
and GPUs otherwise round the operands, and the nearest code is decided by small differences.
"""

import math
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vqrae_jax.models.placement import split_batch, whole
from vqrae_jax.models.vit import Linear, gelu, layer_norm

Search = Literal["euclidean", "cosine"]
Gradient = Literal["straight_through", "rotation"]

MAX_SCORES = 2**25  # entries of the [tokens, codes] matrix that exist at once by default: 128 MiB
BLOCK_CODES = 512
KMEANS_ITERATIONS = 10


class CodebookState(nnx.Variable):
    """What a quantizer keeps but no gradient learns: frozen codes and projections, EMA codes and their statistics."""


class Quantized(NamedTuple):
    """What a quantizer makes of tokens `[..., d]`.

    Attributes:
      z_q: `[..., d]` float32, what the decoder sees; equals `lookup(indices)`; its gradient passes on to the tokens.
      indices: `[...]` int32 in [0, num_codes).
      losses: float32 scalars, plain means; the quantizer's `loss_weights` say what each counts for in training.
      stats: `counts` [K] int32, the uses of each code by these tokens; from `EMAVQ` in training also what
        `update_ema_codebook` needs.
    """

    z_q: jax.Array
    indices: jax.Array
    losses: dict[str, jax.Array]
    stats: dict[str, jax.Array]


class Quantizer(nnx.Module):
    """The interface that this file's docstring lists; by default without losses and with nothing that moves."""

    moving_state: ClassVar[tuple[str, ...]] = ()
    num_codes: int

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each of `Quantized.losses`."""
        return {}

    def codes(self) -> jax.Array:
        """The codes that are looked up, `[K, e]` float32."""
        raise NotImplementedError

    def lookup(self, indices: jax.Array) -> jax.Array:
        """What the decoder sees for given codes: `[...] int32 -> [..., d] float32`. The range is not checked."""
        raise NotImplementedError

    def next_state(self, stats: dict[str, jax.Array], *, rng: jax.Array) -> dict[str, jax.Array]:
        """The state that a training step whose global batch had these statistics changes: none."""
        del stats, rng
        return {}

    def __call__(self, z: jax.Array, *, train: bool) -> Quantized:
        """Tokens `[..., d]` of any float dtype to their codes."""
        raise NotImplementedError


class Identity(Quantizer):
    """No quantization: the decoder sees the tokens themselves, as in a representation autoencoder (arXiv 2510.11690).

    All tokens count as uses of one code, index 0, that nothing can be looked up from.
    """

    num_codes = 1

    def codes(self) -> jax.Array:
        """Raises ValueError: there are none."""
        raise ValueError("this model has no codes: its latents are continuous, so decode what encode returns")

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Raises ValueError: there are no codes."""
        del indices
        return self.codes()

    def __call__(self, z: jax.Array, *, train: bool) -> Quantized:
        del train  # the same in training and out of it
        indices = jnp.zeros(z.shape[:-1], jnp.int32)
        return Quantized(z.astype(jnp.float32), indices, {}, {"counts": _count(indices, self.num_codes)})


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
        codes = codes / _norm(codes)
        offsets = jnp.zeros(len(codes))
    else:
        offsets = 0.5 * jnp.sum(codes**2, axis=-1)
    tokens, dim = z.shape
    size = len(codes)
    width = min(size, BLOCK_CODES)
    count = math.ceil(size / width)
    padding = count * width - size
    parts = (jnp.pad(codes, ((0, padding), (0, 0))).reshape(count, width, dim),
             jnp.pad(offsets, (0, padding), constant_values=jnp.inf).reshape(count, width),
             jnp.arange(count, dtype=jnp.int32) * width)

    def search(block):

        def compare(best, part):
            best_score, best_index = best
            codes, offsets, first = part
            scores = offsets - jnp.matmul(block, codes.T, precision=jax.lax.Precision.HIGHEST)
            score = jnp.min(scores, axis=-1, keepdims=True)
            # Two plain reductions: XLA's CPU code for argmin is several times slower. NaN equals nothing: clipped.
            places = jnp.where(scores == score, jnp.arange(width, dtype=jnp.int32), width - 1)
            score, index = score[:, 0], first + jnp.min(places, axis=-1)
            return (jnp.minimum(score, best_score), jnp.where(score < best_score, index, best_index)), None

        start = (jnp.full(len(block), jnp.inf), jnp.zeros(len(block), jnp.int32))
        return jax.lax.scan(compare, start, parts)[0][1]

    blocks = math.ceil(tokens / (block_tokens or MAX_SCORES // width))
    if blocks <= 1:
        return search(z)
    block = math.ceil(tokens / blocks)
    z = jnp.pad(z, ((0, block * blocks - tokens), (0, 0)))
    # A block takes every `blocks`-th token, not a run of them: where tokens are sharded over devices, each device then
    # has its share of every block.
    indices = jax.lax.map(search, z.reshape(block, blocks, dim).swapaxes(0, 1))
    return indices.swapaxes(0, 1).reshape(-1)[:tokens]


@jax.custom_jvp
def with_gradient_of(value: jax.Array, source: jax.Array) -> jax.Array:
    """`value`, bit for bit, to which gradients arrive as if it were `source` (the straight-through estimator)."""
    del source
    return value


@with_gradient_of.defjvp
def _with_gradient_of_jvp(primals, tangents):
    return primals[0], tangents[1]


def rotate_onto(z: jax.Array, q: jax.Array) -> jax.Array:
    """z turned and stretched onto q by a map that counts as a constant: `[..., e], [..., e] -> [..., e]`.

    As a straight-through estimator it carries q's gradient to z with the angle between them kept, instead of copying
    it: the rotation trick, Fifty et al. 2024 (arXiv 2410.06424), section 4.
    """
    constant_z, q = jax.lax.stop_gradient((z, q))
    unit_z, unit_q = constant_z / _norm(constant_z), q / _norm(q)
    middle = unit_z + unit_q
    middle = middle / _norm(middle)
    dot = lambda a, b: jnp.sum(a * b, axis=-1, keepdims=True)
    rotated = z - 2 * dot(z, middle) * middle + 2 * dot(z, unit_z) * unit_q
    return rotated * (_norm(q) / _norm(constant_z))


def _norm(x: jax.Array) -> jax.Array:
    # The bound lies inside the square root, whose derivative at zero is infinite.
    return jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def _project(layer: Callable[[jax.Array], jax.Array] | None, x: jax.Array) -> jax.Array:
    if layer is None:
        return x
    with jax.default_matmul_precision("highest"):
        return layer(x)


def _linear(inputs: int, outputs: int, *, rngs: nnx.Rngs) -> Linear:
    # lecun_normal keeps the rms of its input, so tokens of rms 1 stay so whatever the two widths are.
    return Linear(inputs, outputs, kernel_init=nnx.initializers.lecun_normal(), rngs=rngs)


def _count(indices: jax.Array, num_codes: int) -> jax.Array:
    return jax.ops.segment_sum(jnp.ones(indices.size, jnp.int32), indices.reshape(-1), num_segments=num_codes)


class _CodebookQuantizer(Quantizer):
    """What quantizers with a codebook have in common: all but where the codes come from and what trains them."""

    def __init__(self, *, width: int, size: int, dim: int, project: bool | None, search: Search,
                 commitment_weight: float, gradient: Gradient, block_tokens: int | None, rngs: nnx.Rngs,
                 input_projection: bool = False):
        if search not in get_args(Search):
            raise ValueError(f"unknown code search {search!r}: choose one of {', '.join(get_args(Search))}")
        if gradient not in get_args(Gradient):
            raise ValueError(f"unknown quantizer gradient {gradient!r}: choose one of {', '.join(get_args(Gradient))}")
        if project is False and width != dim:
            raise ValueError(f"tokens of width {width} need a projection to reach codes of dim {dim}: "
                             "leave project unset, or make the two equal")
        project = width != dim if project is None else project
        if project and input_projection:
            raise ValueError("input_projection has no use after a projection into code space: "
                             "turn it off, or make dim equal width and leave project unset")
        identity = lambda key, shape, dtype=jnp.float32, out_sharding=None: jnp.eye(*shape, dtype=dtype)
        if input_projection:
            self.project_in = Linear(dim, dim, kernel_init=identity, rngs=rngs)
        else:
            self.project_in = _linear(width, dim, rngs=rngs) if project else None
        self.project_out = _linear(dim, width, rngs=rngs) if project else None
        self.num_codes = size
        self.search: Search = search
        self.commitment_weight = commitment_weight
        self.gradient = gradient
        self.block_tokens = block_tokens

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each of `Quantized.losses`."""
        return {"commitment": self.commitment_weight}

    def lookup(self, indices: jax.Array) -> jax.Array:
        """What the decoder sees for given codes: `[...] int32 -> [..., d] float32`. The range is not checked."""
        return _project(self.project_out, self._chosen(self.codes(), indices))

    def _chosen(self, codes: jax.Array, indices: jax.Array) -> jax.Array:
        """`codes[indices]` for all codes, `[K, e], [...] -> [..., e]`, with a gradient to what made them."""
        return codes[indices]

    def _to_code_space(self, z: jax.Array) -> jax.Array:
        return _project(self.project_in, z.astype(jnp.float32))

    def _nearest(self, z: jax.Array, codes: jax.Array) -> jax.Array:
        return nearest_code(z, codes, metric=self.search, block_tokens=self.block_tokens)

    def _quantize(self, z: jax.Array) -> tuple[Quantized, jax.Array, jax.Array]:
        """Returns the result with the commitment loss only, the tokens and the codes chosen, both `[..., e]`."""
        z = self._to_code_space(z)
        codes = self.codes()
        indices = self._nearest(z.reshape(-1, z.shape[-1]), codes).reshape(z.shape[:-1])
        chosen = self._chosen(codes, indices)
        constant = jax.lax.stop_gradient(chosen)
        source = rotate_onto(z, constant) if self.gradient == "rotation" else z
        z_q = _project(self.project_out, with_gradient_of(constant, source))
        losses = {"commitment": jnp.mean((z - constant) ** 2)}
        return Quantized(z_q, indices, losses, {"counts": _count(indices, self.num_codes)}), z, chosen

    def _centres(self, z: jax.Array, *, iterations: int, rng: jax.Array) -> jax.Array:
        return kmeans(self._to_code_space(z), self.num_codes, iterations=iterations, rng=rng, metric=self.search,
                      block_tokens=self.block_tokens)


class SimVQ(_CodebookQuantizer):
    """Frozen random codes C and one learned linear map W: the codes are C W + b (arXiv 2411.02038).

    Every code moves when W learns, so unused codes can come back; but W is one linear map, and from a random C it does
    not spread codes over strongly clustered tokens: start those with `init_from_data`. W learns from the loss
    "codebook" = mean (sg(z) - q)^2, of weight 1, and the tokens from "commitment" = mean (z - sg(q))^2.

    Cosine search only ranks: what is returned is the row of C W + b with its own length, which the codebook loss pulls
    to the tokens' length, so the decoder sees codes on the scale of tokens. `l2_normalize` instead divides tokens and
    rows by their lengths before anything else: search, losses, gradient and output are those of vectors of length 1.
    Such codes have rms e^-0.5: a decoder pretrained on tokens of rms 1 sees inputs sqrt(e) times too small.

    Args:
      width: tokens' width d.
      size: number of codes K.
      dim: codes' width e.
      init_std: standard deviation of C; None is e^-0.5, as published: codes of length 1.
      project: linear layers d -> e before and e -> d after; None where the widths differ.
      search: "euclidean" or "cosine".
      input_projection: a learned e -> e layer before the search that starts as the identity; without `project`.
      l2_normalize: tokens, after any projection, and codes have length 1; with "euclidean" search, which then ranks as
        "cosine" does.
      commitment_weight: beta, the weight of the commitment loss.
      gradient: how z_q's gradient reaches the tokens, "straight_through" or "rotation" (see `rotate_onto`).
      block_tokens: see `nearest_code`.
    """

    def __init__(self, *, width: int, size: int, dim: int, init_std: float | None = None, project: bool | None = None,
                 search: Search = "euclidean", input_projection: bool = False, l2_normalize: bool = False,
                 commitment_weight: float = 0.25, gradient: Gradient = "straight_through",
                 block_tokens: int | None = None, rngs: nnx.Rngs):
        if l2_normalize and search == "cosine":
            raise ValueError("l2_normalize already ranks codes by their cosine: leave search \"euclidean\"")
        super().__init__(width=width, size=size, dim=dim, project=project, search=search,
                         commitment_weight=commitment_weight, gradient=gradient, block_tokens=block_tokens, rngs=rngs,
                         input_projection=input_projection)
        self.l2_normalize = l2_normalize
        std = dim**-0.5 if init_std is None else init_std
        self.codebook = CodebookState(std * jax.random.normal(rngs.params(), (size, dim)))
        self.projection = _linear(dim, dim, rngs=rngs)

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each of `Quantized.losses`."""
        return {"codebook": 1.0, **super().loss_weights}

    def codes(self) -> jax.Array:
        """The rows of C W + b, `[K, e]` float32, of length 1 with `l2_normalize`."""
        return self._normalized(_project(self.projection, self.codebook[...]))

    def _chosen(self, codes: jax.Array, indices: jax.Array) -> jax.Array:
        if indices.size >= self.num_codes:
            return codes[indices]
        # Fewer tokens than codes: rows of C, then W, whose gradient needs no [K, e] array to scatter into.
        return self._normalized(_project(self.projection, self.codebook[...][indices]))

    def _to_code_space(self, z: jax.Array) -> jax.Array:
        return self._normalized(super()._to_code_space(z))

    def _normalized(self, x: jax.Array) -> jax.Array:
        return x / _norm(x) if self.l2_normalize else x

    def __call__(self, z: jax.Array, *, train: bool) -> Quantized:
        del train  # the same in training and out of it
        quantized, z, chosen = self._quantize(z)
        codebook_loss = jnp.mean((jax.lax.stop_gradient(z) - chosen) ** 2)
        return quantized._replace(losses={"codebook": codebook_loss, **quantized.losses})

    def init_from_data(self, z: jax.Array, *, rng: jax.Array, iterations: int = KMEANS_ITERATIONS) -> dict:
        """Values that make the codes the k-means centres of tokens `[N, d]`, N >= K; for `nnx.update(self, values)`.

        C becomes the centres and W the identity: W is square, so nothing is lost by starting it there. With
        `l2_normalize` they are the centres of the normalised tokens.
        """
        centres = self._centres(z, iterations=iterations, rng=rng)
        dim = centres.shape[-1]
        return {"codebook": centres, "projection": {"kernel": jnp.eye(dim), "bias": jnp.zeros(dim)}}


class EMAVQ(_CodebookQuantizer):
    """Codes that are moving averages of the tokens that chose them (van den Oord et al. 2017, appendix A.1).

    The codes change only through `update_ema_codebook`; the one loss is "commitment" = mean (z - sg(q))^2. Arguments as
    for `SimVQ` and `update_ema_codebook`.

    State: `codebook` [K, e], `counts` [K] and `sums` [K, e], float32, with codebook = sums / counts from the start.
    """

    moving_state: ClassVar[tuple[str, ...]] = ("codebook", "counts", "sums")

    def __init__(self, *, width: int, size: int, dim: int, project: bool | None = None, search: Search = "euclidean",
                 commitment_weight: float = 0.25, gradient: Gradient = "straight_through", decay: float = 0.99,
                 eps: float = 1e-5, restart_threshold: float = 0.0, block_tokens: int | None = None, rngs: nnx.Rngs):
        super().__init__(width=width, size=size, dim=dim, project=project, search=search,
                         commitment_weight=commitment_weight, gradient=gradient, block_tokens=block_tokens, rngs=rngs)
        self.decay, self.eps, self.restart_threshold = decay, eps, restart_threshold
        self._set_state(jax.random.normal(rngs.params(), (size, dim)))

    def _set_state(self, codebook: jax.Array) -> None:
        self.codebook = CodebookState(codebook)
        self.counts = CodebookState(jnp.ones(len(codebook)))
        self.sums = CodebookState(jnp.copy(codebook))  # a buffer of its own: an aliased one cannot be donated

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

    def next_state(self, stats: dict[str, jax.Array], *, rng: jax.Array) -> dict[str, jax.Array]:
        """`codebook`, `counts` and `sums` after a training step whose global batch had these statistics."""
        state = {"codebook": self.codebook[...], "counts": self.counts[...], "sums": self.sums[...]}
        return update_ema_codebook(state, stats, decay=self.decay, eps=self.eps,
                                   restart_threshold=self.restart_threshold, rng=rng)

    def init_from_data(self, z: jax.Array, *, rng: jax.Array, iterations: int = KMEANS_ITERATIONS) -> dict:
        """Values that make the codes the k-means centres of tokens `[N, d]`, N >= K; for `nnx.update(self, values)`."""
        centres = self._centres(z, iterations=iterations, rng=rng)
        return {"codebook": centres, "counts": jnp.ones(len(centres)), "sums": jnp.copy(centres)}


class RankedVQ(_CodebookQuantizer):
    """Fixed codes that are found by fixed keys, as in a discrete key-value bottleneck (arXiv 2207.11240).

    A token z chooses the code whose key has the highest cosine with z Q, and becomes that row of the codebook as it is.
    Nothing here learns: the choice passes no gradient to Q or the keys, so they are state; tokens learn from
    "commitment" = mean (z - sg(q))^2. It exists for checkpoints of the first SimVQ of hugoycj/RAE, where
    keys = C Wc^T with a second matrix Wc.

    A random start draws codes of rms 1, the scale of tokens after a LayerNorm, and keys = C Q, so that a code's key
    says something about the code. (That SimVQ drew codes near zero and two unrelated matrices, and could not leave
    either.)

    State: `codebook` [K, e], `keys` [K, p], of any length, and `queries` [e, p], which is Q; float32.

    Args:
      width: tokens' width d, which must equal
      dim: codes' width e: there is no projection to or from code space.
      size: number of codes K.
      key_dim: keys' width p; None is e.
      commitment_weight: beta, the weight of the commitment loss.
      gradient: see `SimVQ`.
      block_tokens: see `nearest_code`.
    """

    def __init__(self, *, width: int, size: int, dim: int, key_dim: int | None = None, commitment_weight: float = 0.25,
                 gradient: Gradient = "straight_through", block_tokens: int | None = None, rngs: nnx.Rngs):
        if width != dim:
            raise ValueError(f"RankedVQ has no projection: dim {dim} must equal the tokens' width {width}")
        super().__init__(width=width, size=size, dim=dim, project=False, search="cosine",
                         commitment_weight=commitment_weight, gradient=gradient, block_tokens=block_tokens, rngs=rngs)
        codebook = jax.random.normal(rngs.params(), (size, dim))
        queries = nnx.initializers.lecun_normal()(rngs.params(), (dim, dim if key_dim is None else key_dim))
        self.codebook = CodebookState(codebook)
        self.keys = CodebookState(jnp.matmul(codebook, queries, precision=jax.lax.Precision.HIGHEST))
        self.queries = CodebookState(queries)

    def codes(self) -> jax.Array:
        """The codebook, `[K, e]` float32."""
        return self.codebook[...]

    def _nearest(self, z: jax.Array, codes: jax.Array) -> jax.Array:
        del codes
        return super()._nearest(jnp.matmul(z, self.queries[...], precision=jax.lax.Precision.HIGHEST), self.keys[...])

    def __call__(self, z: jax.Array, *, train: bool) -> Quantized:
        del train  # the same in training and out of it
        return self._quantize(z)[0]


def add_stats(first: dict[str, jax.Array], second: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The statistics of two micro-batches of one step together; candidates for restarts come from the second."""
    both = {name: first[name] + second[name] for name in first}
    return both | {"candidates": second["candidates"]} if "candidates" in first else both


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


class _ScalarQuantizer(Quantizer):
    """What `FSQ` and `AdapterFSQ` have in common: a code is a row of digits, its index their mixed-radix number."""

    project_in: Callable[[jax.Array], jax.Array] | None
    project_out: Callable[[jax.Array], jax.Array] | None

    def __init__(self, levels: tuple[int, ...]):
        self.levels = tuple(levels)
        self.num_codes = math.prod(self.levels)
        if not self.levels or min(self.levels) < 2 or self.num_codes > 2**31 - 1:
            raise ValueError(f"FSQ levels {self.levels} must be at least 2 each, with a product that fits int32")

    def _place_values(self) -> np.ndarray:
        raise NotImplementedError

    def _values(self, digits: jax.Array) -> jax.Array:
        """A code's coordinates, from its digits."""
        raise NotImplementedError

    def _codes_at(self, indices: jax.Array) -> jax.Array:
        shifted = indices[..., None] // jnp.asarray(self._place_values(), jnp.int32)
        return self._values(shifted % jnp.asarray(self.levels, jnp.int32))

    def codes(self) -> jax.Array:
        """Every code, `[K, len(levels)]` float32."""
        return self._codes_at(jnp.arange(self.num_codes, dtype=jnp.int32))

    def lookup(self, indices: jax.Array) -> jax.Array:
        """What the decoder sees for given codes: `[...] int32 -> [..., d] float32`. The range is not checked."""
        return _project(self.project_out, self._codes_at(indices))

    def _quantized(self, digits: jax.Array, source: jax.Array) -> tuple[Quantized, jax.Array]:
        """The result without losses, its gradient passed on to `source`, and the codes, both `[..., len(levels)]`."""
        indices = jnp.sum(digits * jnp.asarray(self._place_values(), jnp.int32), axis=-1, dtype=jnp.int32)
        codes = self._codes_at(indices)
        z_q = _project(self.project_out, with_gradient_of(codes, source))
        return Quantized(z_q, indices, {}, {"counts": _count(indices, self.num_codes)}), codes


class FSQ(_ScalarQuantizer):
    """Finite scalar quantization: every coordinate is rounded to a few levels (arXiv 2309.15505, appendix A.1).

    A code has one coordinate per entry of `levels`, in [-1, 1] (for an even number of levels -1, ..., 1 - 2 / level);
    its index is the mixed-radix number of its coordinates, the first one changing fastest. There is no codebook and
    no loss; the linear layers learn through the rounding.

    Args:
      width: tokens' width d; where it is not len(levels), linear layers lead to the coordinates and back.
      levels: levels per coordinate, each at least 2; their product is the number of codes.
    """

    def __init__(self, *, width: int, levels: tuple[int, ...], rngs: nnx.Rngs):
        super().__init__(levels)
        dim = len(self.levels)
        self.project_in = _linear(width, dim, rngs=rngs) if width != dim else None
        self.project_out = _linear(dim, width, rngs=rngs) if width != dim else None

    def _place_values(self) -> np.ndarray:
        return np.cumprod([1, *self.levels[:-1]])

    def _values(self, digits: jax.Array) -> jax.Array:
        half = jnp.asarray(self.levels, jnp.int32) // 2
        return (digits - half).astype(jnp.float32) / half.astype(jnp.float32)

    def _bound(self, z: jax.Array) -> jax.Array:
        """Squashes each coordinate so that rounding yields its number of levels, -(l // 2) at the lowest."""
        levels = np.asarray(self.levels)
        half = (levels - 1) * (1 - 1e-3) / 2
        offset = np.where(levels % 2 == 1, 0.0, 0.5)
        shift, half, offset = (jnp.asarray(v, jnp.float32) for v in (np.tan(offset / half), half, offset))
        return jnp.tanh(z + shift) * half - offset

    def __call__(self, z: jax.Array, *, train: bool) -> Quantized:
        del train  # the same in training and out of it
        bounded = self._bound(_project(self.project_in, z.astype(jnp.float32)))
        half = jnp.asarray(self.levels, jnp.int32) // 2
        digits = jnp.round(jax.lax.stop_gradient(bounded)).astype(jnp.int32) + half
        return self._quantized(digits, bounded / half.astype(jnp.float32))[0]


class AdapterFSQ(_ScalarQuantizer):
    """Finite scalar quantization between two MLPs, as the FSQ models of hugoycj/RAE have it.

    An MLP makes coordinates gain * tanh(.), with a learned gain per coordinate; multiplied by (l - 1) / 2 and rounded
    they are the code: -(l-1)/2, ..., (l-1)/2, half-integers where the number of levels l is even. Its index is the
    mixed-radix number of the levels, the LAST coordinate changing fastest. A second MLP reads the sines and cosines of
    2 pi code B for a fixed random B (Fourier features, arXiv 2006.10739). The rounding, and the clipping of coordinates
    beyond the last level, copy the gradient; the loss "commitment" = mean (scaled coordinates - sg(code))^2, of weight
    1, pulls those back.

    State: `project_out/frequencies` [len(levels), frequencies] float32, which is B, of standard deviation 10.

    Args:
      width: tokens' width d.
      levels: levels per coordinate, each at least 2; their product is the number of codes.
      hidden_dim: hidden width of the first MLP; that of the second one is d.
      frequencies: columns of B.
    """

    def __init__(self, *, width: int, levels: tuple[int, ...], hidden_dim: int = 512, frequencies: int = 128,
                 rngs: nnx.Rngs):
        super().__init__(levels)
        self.project_in = _ToCoordinates(width, hidden_dim, len(self.levels), rngs=rngs)
        self.project_out = _FromCoordinates(len(self.levels), frequencies, width, rngs=rngs)

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each of `Quantized.losses`."""
        return {"commitment": 1.0}

    def _place_values(self) -> np.ndarray:
        return np.cumprod([1, *self.levels[:0:-1]])[::-1]

    def _half(self) -> jax.Array:
        return (jnp.asarray(self.levels, jnp.float32) - 1) / 2

    def _values(self, digits: jax.Array) -> jax.Array:
        return digits.astype(jnp.float32) - self._half()

    def __call__(self, z: jax.Array, *, train: bool) -> Quantized:
        del train  # the same in training and out of it
        scaled = _project(self.project_in, z.astype(jnp.float32)) * self._half()
        digits = jnp.round(jnp.clip(jax.lax.stop_gradient(scaled) + self._half(), 0, 2 * self._half()))
        quantized, codes = self._quantized(digits.astype(jnp.int32), scaled)
        return quantized._replace(losses={"commitment": jnp.mean((scaled - codes) ** 2)})


class _ToCoordinates(nnx.Module):
    """Tokens `[..., width]` to coordinates `[..., dim]` within plus and minus `gain`."""

    def __init__(self, width: int, hidden_dim: int, dim: int, *, rngs: nnx.Rngs):
        self.norm = layer_norm(width, eps=1e-5, rngs=rngs)
        self.fc1 = _linear(width, hidden_dim, rngs=rngs)
        self.fc2 = _linear(hidden_dim, hidden_dim, rngs=rngs)
        self.fc3 = _linear(hidden_dim, dim, rngs=rngs)
        self.gain = nnx.Param(jnp.full(dim, 3.0, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = gelu(self.fc1(self.norm(x)))
        x = gelu(self.fc2(x))
        return jnp.tanh(self.fc3(x)) * self.gain[...]


class _FromCoordinates(nnx.Module):
    """Coordinates `[..., dim]` to tokens `[..., width]` by way of their Fourier features."""

    def __init__(self, dim: int, frequencies: int, width: int, *, rngs: nnx.Rngs):
        self.frequencies = CodebookState(10.0 * jax.random.normal(rngs.params(), (dim, frequencies)))
        self.fc1 = _linear(2 * frequencies, width, rngs=rngs)
        self.norm1 = layer_norm(width, eps=1e-5, rngs=rngs)
        self.fc2 = _linear(width, width, rngs=rngs)
        self.norm2 = layer_norm(width, eps=1e-5, rngs=rngs)
        self.fc3 = _linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        phases = (2 * jnp.pi * x) @ self.frequencies[...]
        x = self.fc1(jnp.concatenate([jnp.sin(phases), jnp.cos(phases)], axis=-1))
        x = self.fc2(gelu(self.norm1(x)))
        return self.fc3(gelu(self.norm2(x)))


def kmeans(z: jax.Array, k: int, *, iterations: int = KMEANS_ITERATIONS, rng: jax.Array, metric: Search = "euclidean",
           block_tokens: int | None = None) -> jax.Array:
    """k cluster centres of tokens by Lloyd's algorithm, started at k random tokens: `[N, e] -> [k, e]` float32.

    A centre that no token is nearest to moves to a random token. With "cosine" tokens are assigned by direction, and a
    centre is still the mean of its tokens.

    Raises:
      ValueError: fewer tokens than centres.
    """
    if len(z) < k:
        raise ValueError(f"k-means cannot place {k} centres among {len(z)} tokens: give it at least {k} tokens")
    z = jax.lax.stop_gradient(z).astype(jnp.float32)
    sample = lambda key: z[jax.random.choice(key, len(z), (k,), replace=False)]

    def iterate(centres, key):
        nearest = nearest_code(z, centres, metric=metric, block_tokens=block_tokens)
        counts = _count(nearest, k)[:, None]
        means = jax.ops.segment_sum(z, nearest, num_segments=k) / jnp.maximum(counts, 1).astype(jnp.float32)
        return jnp.where(counts > 0, means, sample(key)), None

    first, *rest = jax.random.split(rng, iterations + 1)
    return jax.lax.scan(iterate, sample(first), jnp.stack(rest))[0] if rest else sample(first)


def code_usage(counts: jax.Array) -> jax.Array:
    """The share of codes used at least once, in [0, 1]: `[K] -> []` float32."""
    return jnp.mean((counts > 0).astype(jnp.float32))


def perplexity(counts: jax.Array) -> jax.Array:
    """exp of the entropy of the usage histogram, in [1, K]: `[K] -> []` float32; K means all codes alike."""
    counts = counts.astype(jnp.float32)
    return jnp.exp(jnp.sum(jax.scipy.special.entr(counts / jnp.maximum(jnp.sum(counts), 1.0))))
