"""The language model that learns images as sequences of codes: Qwen3's architecture (arXiv 2505.09388).

A pre-RMSNorm transformer with SwiGLU, rotary positions, and grouped queries that are normalised, as are the keys. Its
blocks are stacked and scanned over, and matmuls have the forms they have in `vit`, for the reasons given there. It is
compared with `Qwen3ForCausalLM` of transformers, whose weights `weights.qwen3` reads and writes.

It is our own code because no library that has Qwen3 in JAX can be had alone and beside a current JAX: bonsai needs JAX
before 0.9 and has no release, tunix comes with kernels for TPUs and imports all of its reinforcement learning, EasyDeL
needs ray and fastapi.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vqrae_jax.models import vit
from vqrae_jax.models.flops import Work, dense
from vqrae_jax.models.placement import split_batch, whole
from vqrae_jax.models.vit import SAVE_MATMULS, Linear, Remat, Rope, attend, rotate

# Queries [B, heads, N, head_dim], keys and values [B, kv_heads, N, head_dim] -> [B, heads, N, head_dim]; what is kept.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMSpec:
    """The shape of a language model: what a Qwen3's config.json says.

    Attributes:
      vocabulary: tokens are in [0, vocabulary).
      width: token width d.
      depth: number of blocks.
      heads: of queries.
      kv_heads: of keys and values; each serves heads / kv_heads of the queries.
      head_dim: width of a head, even; heads * head_dim need not be `width`.
      mlp_dim: hidden width of the MLP.
      rope_theta: base of the rotary positions.
      norm_eps: epsilon of every RMSNorm.
      tied: whether the token embeddings are the kernel of the last layer as well.
      max_positions: the longest sequence.

    Raises:
      ValueError: `kv_heads` does not divide `heads`, or an odd `head_dim`.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float
    norm_eps: float
    tied: bool
    max_positions: int

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.head_dim}")


class Cache(NamedTuple):
    """The keys and values of the tokens so far, in arrays whose shapes do not depend on how many these are.

    Attributes:
      keys: of every block, `[B, kv_heads, head_dim, size]` in the compute dtype, turned by their positions.
      values: of every block, `[B, kv_heads, size, head_dim]`.
      length: int32, places that are taken, the same in all rows.
      pads: `[B]` int32, the first places of a row that hold no token of it.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array
    pads: jax.Array


class Attention(nnx.Module):
    """Grouped-query attention but for attention itself, of which there are two kinds: whole and cached."""

    def __init__(self, spec: LMSpec, *, dtype, rngs: nnx.Rngs):
        self.head_dim = spec.head_dim
        self.query = _linear(spec.width, spec.heads * spec.head_dim, dtype=dtype, rngs=rngs)
        self.key_value = _linear(spec.width, 2 * spec.kv_heads * spec.head_dim, dtype=dtype, rngs=rngs)
        self.query_norm, self.key_norm = (_rms_norm(spec.head_dim, spec, dtype=dtype, rngs=rngs) for _ in range(2))
        self.out = _linear(spec.heads * spec.head_dim, spec.width, dtype=dtype, rngs=rngs)

    def project(self, x: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tokens `[B, N, d]` -> queries `[B, heads, N, head_dim]`, keys and values `[B, kv_heads, N, head_dim]`."""
        by_head = lambda x: x.reshape(*x.shape[:-1], -1, self.head_dim)
        q = by_head(checkpoint_name(self.query(x), "qkv"))
        k, v = jnp.split(by_head(checkpoint_name(self.key_value(x), "qkv")), 2, axis=-2)
        q, k, v = (x.swapaxes(1, 2) for x in (self.query_norm(q), self.key_norm(k), v))
        return rotate(q, rope), rotate(k, rope), v

    def join(self, y: jax.Array) -> jax.Array:
        """What the heads found, `[B, heads, N, head_dim] -> [B, N, d]`."""
        y = y.swapaxes(1, 2)
        return checkpoint_name(self.out(y.reshape(*y.shape[:2], -1)), "out")


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), `[B, N, d] -> [B, N, d]` (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, spec: LMSpec, *, dtype, rngs: nnx.Rngs):
        self.gate_up = _linear(spec.width, 2 * spec.mlp_dim, dtype=dtype, rngs=rngs)
        self.down = _linear(spec.mlp_dim, spec.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = jnp.split(checkpoint_name(self.gate_up(x), "fc1"), 2, axis=-1)
        return self.down(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """One pre-RMSNorm transformer block."""

    def __init__(self, spec: LMSpec, *, dropout: float, dtype, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (_rms_norm(spec.width, spec, dtype=dtype, rngs=rngs) for _ in range(2))
        self.attention = Attention(spec, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(spec, dtype=dtype, rngs=rngs)
        self.dropout = dropout

    def __call__(self, x: jax.Array, rope: Rope, attend: Attend, rng: jax.Array | None = None) -> tuple[jax.Array, Any]:
        """`[B, N, d] -> [B, N, d]`, and what `attend` keeps; `rng` is a key for dropout, None is without."""
        first, second = (None, None) if rng is None else jax.random.split(rng)
        y, kept = attend(*self.attention.project(self.norm1(x), rope))
        x = x + _drop(self.attention.join(y), self.dropout, first)
        return x + _drop(self.mlp(self.norm2(x)), self.dropout, second), kept


class LanguageModel(nnx.Module):
    """Tokens to the logits of the tokens that follow them.

    Whole sequences go through `hidden`. Where their lengths differ they are padded on the right, where no token sees
    it. Those that are sampled token by token go through `step`, which keeps their keys and values in a cache; they are
    padded on the left, so that the next tokens of all have the same place.

    Args:
      spec: the shape.
      dropout: share of what the embeddings and every residual branch give that becomes 0 in training.
      remat: see `vit.Transformer`.
      dtype: the type the blocks compute in; parameters are float32, and so are norms, softmax and logits.
      rngs: source of the initial parameters: N(0, 0.02).
    """

    def __init__(self, spec: LMSpec, *, dropout: float, remat: Remat = SAVE_MATMULS, dtype=jnp.float32,
                 rngs: nnx.Rngs):
        self.spec, self.dropout, self.remat, self.dtype = spec, dropout, remat, dtype
        self.token_embedding = nnx.Param(_NORMAL(rngs.params(), (spec.vocabulary, spec.width)), cast_to=dtype)
        make_block = lambda rngs: Block(spec, dropout=dropout, dtype=dtype, rngs=rngs)
        self.blocks = vit.stack(make_block, spec.depth, rngs)
        self.norm = _rms_norm(spec.width, spec, dtype=jnp.float32, rngs=rngs)
        self.head = None if spec.tied else _linear(spec.width, spec.vocabulary, dtype=dtype, rngs=rngs)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Tokens `[B, N]` int32 -> `[B, N, d]` in the compute dtype."""
        # Of float32, or gradients of a token that occurs often were added up in 16 bits.
        return split_batch(whole(self.token_embedding[...])[tokens]).astype(self.dtype)

    def hidden(self, inputs: jax.Array, *, rng: jax.Array | None = None) -> jax.Array:
        """What the last layer makes logits of, for every position of whole sequences.

        Args:
          inputs: tokens `[B, N]` int32, or embeddings `[B, N, d]` such as those of `embed`.
          rng: a key for dropout in training; None is without dropout.

        Returns:
          `[B, N, d]` float32, after the last RMSNorm. What is at or after a row's padding means nothing.

        Raises:
          ValueError: sequences longer than `spec.max_positions`.
        """
        self._check_length(inputs.shape[1])
        rope = _rope(jnp.arange(inputs.shape[1]), self.spec)
        keys = None
        if rng is not None:
            rng, blocks_rng = jax.random.split(rng)
            keys = jax.random.split(blocks_rng, self.spec.depth)
        x = _drop(self._embedded(inputs), self.dropout, rng)
        run = lambda block, x, rng: block(x, rope, _attend_causally, rng)[0]
        x = vit.scan(run, self.blocks, x, keys, remat=self.remat)
        return self.norm(x.astype(jnp.float32))

    def logits(self, hidden: jax.Array, tokens: slice = slice(None)) -> jax.Array:
        """`[..., d] -> [..., vocabulary]` float32: those of the token that comes next, as far as it is in `tokens`."""
        kernel = self.token_embedding[tokens].T if self.head is None else self.head.kernel[:, tokens]
        x = split_batch(hidden.reshape(-1, hidden.shape[-1])).astype(self.dtype)
        logits = jnp.matmul(x, whole(kernel.astype(self.dtype)), preferred_element_type=jnp.float32)
        return split_batch(logits).reshape(*hidden.shape[:-1], kernel.shape[-1])

    def init_cache(self, batch: int, size: int, pads: jax.Array | None = None) -> Cache:
        """The cache of sequences that have not begun.

        Args:
          batch: number B of sequences.
          size: places for tokens, padding included. Every token costs as much as if all were taken, so a long sequence
            begins with few and gets more by `enlarge`.
          pads: `[B]` int32, how many places on the left of each row are padding; None where there is none.

        Raises:
          ValueError: more places than `spec.max_positions`.
        """
        self._check_length(size)
        spec = self.spec
        empty = lambda *shape: tuple(jnp.zeros((batch, spec.kv_heads, *shape), self.dtype) for _ in range(spec.depth))
        return Cache(empty(spec.head_dim, size), empty(size, spec.head_dim), jnp.zeros((), jnp.int32),
                     jnp.zeros(batch, jnp.int32) if pads is None else jnp.asarray(pads, jnp.int32))

    def enlarge(self, cache: Cache, places: int) -> Cache:
        """A cache with so many more places.

        Raises:
          ValueError: they are then more than `spec.max_positions`.
        """
        self._check_length(cache.values[0].shape[2] + places)
        more = lambda arrays, axis: tuple(
            jnp.pad(x, [(0, places if i == axis else 0) for i in range(x.ndim)]) for x in arrays)
        return cache._replace(keys=more(cache.keys, 3), values=more(cache.values, 2))

    def unstacked(self) -> list[Block]:
        """The blocks one by one, for `step`; their parameters are copies."""
        graphdef, stacked = nnx.split(self.blocks)
        return [nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], stacked)) for i in range(self.spec.depth)]

    def step(self, inputs: jax.Array, cache: Cache, blocks: Sequence[Block]) -> tuple[jax.Array, Cache]:
        """The next tokens of every sequence: one, or in one go all those of a prefix.

        Args:
          inputs: tokens `[B, T]` int32, padding included, or embeddings `[B, T, d]`; T is 1 while sampling.
          cache: of the tokens before. The caller sees to it that T places are left: it is not an error here.
          blocks: those of `unstacked`, made before a loop over tokens. A scan over the stack would copy the parameters
            of every block, and its part of the cache, for every token.

        Returns:
          `[B, T, d]` float32 as from `hidden`, of which `logits` makes those of the tokens after each, and the cache
          with these tokens in it.
        """
        at = cache.length + jnp.arange(inputs.shape[1])
        # Positions count from the first token that is no padding.
        cos, sin = _rope(jnp.maximum(at - cache.pads[:, None], 0), self.spec)
        rope = cos[:, None], sin[:, None]  # the same for all heads
        place, at, pads = jnp.arange(cache.values[0].shape[2]), at[:, None], cache.pads[:, None, None]
        # Padding sees itself, or its softmax were of nothing.
        seen = (place >= pads) & (place <= at) | (place == at)
        x, keys, values = self._embedded(inputs), list(cache.keys), list(cache.values)
        for i, block in enumerate(blocks):

            def attend(q: jax.Array, k: jax.Array, v: jax.Array, i=i):
                k = jax.lax.dynamic_update_slice_in_dim(keys[i], k.swapaxes(2, 3), cache.length, axis=3)
                v = jax.lax.dynamic_update_slice_in_dim(values[i], v, cache.length, axis=2)
                return _attend_cached(q, k, v, seen), (k, v)

            x, (keys[i], values[i]) = block(x, rope, attend)
        cache = Cache(tuple(keys), tuple(values), cache.length + inputs.shape[1], cache.pads)
        return self.norm(x.astype(jnp.float32)), cache

    def _embedded(self, inputs: jax.Array) -> jax.Array:
        return self.embed(inputs) if inputs.ndim == 2 else inputs.astype(self.dtype)

    def _check_length(self, length: int) -> None:
        if length > self.spec.max_positions:
            raise ValueError(f"{length} tokens are more than the {self.spec.max_positions} positions that the language "
                             "model has")


_NORMAL = nnx.initializers.normal(0.02)  # Qwen3's and LlamaGen's


def _linear(inputs: int, outputs: int, *, dtype, rngs: nnx.Rngs) -> Linear:
    return Linear(inputs, outputs, use_bias=False, kernel_init=_NORMAL, dtype=dtype, rngs=rngs)


def _rms_norm(width: int, spec: LMSpec, *, dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm whose statistics are float32."""
    return nnx.RMSNorm(width, epsilon=spec.norm_eps, dtype=dtype, rngs=rngs)


def _drop(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
    """`x`, of whose entries a share of `rate` is 0 and the others are larger for it; all of them without `rng`."""
    if rng is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(rng, 1 - rate, x.shape), x / (1 - rate), 0)


def _rope(positions: jax.Array, spec: LMSpec) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position times theta^(-2i / head_dim), `[..., head_dim]` float32 (RoFormer, arXiv 2104.09864)."""
    frequencies = spec.rope_theta ** -(jnp.arange(0, spec.head_dim, 2, dtype=jnp.float32) / spec.head_dim)
    angles = jnp.tile(positions[..., None] * frequencies, 2)
    return jnp.cos(angles), jnp.sin(angles)


def _attend_causally(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
    """Attention of whole sequences: every token sees itself and those before it."""
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    return attend(flat(q), flat(k), flat(v), causal=True).reshape(q.shape), None


def _attend_cached(q: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array) -> jax.Array:
    """Attention of new tokens to those of a cache, where they are themselves.

    Args:
      q: `[B, heads, T, head_dim]`.
      keys: `[B, kv_heads, head_dim, size]`, so that XLA's code for CPUs reads them in order.
      values: `[B, kv_heads, size, head_dim]`.
      seen: `[B, T, size]`, which places a token sees; at least one.

    Returns:
      `[B, heads, T, head_dim]`.
    """
    # The queries that share keys stand in one matrix with these.
    grouped = (q * q.shape[-1]**-0.5).reshape(*keys.shape[:2], -1, q.shape[-1])
    logits = jnp.einsum("bhqd,bhdk->bhqk", grouped, keys, preferred_element_type=jnp.float32)
    seen = jnp.tile(seen, (1, q.shape[1] // keys.shape[1], 1))[:, None]
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1).astype(values.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, values).reshape(q.shape)


def lm_work(spec: LMSpec, tokens: int, *, predicted: int) -> Work:
    """Operations for a sequence of so many tokens, of which so many are given logits.

    Of attention only pairs of a token and one before it, or itself, are counted.
    """
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    block = dense(spec.width, q + 2 * kv) + dense(q, spec.width) + 3 * dense(spec.width, spec.mlp_dim)
    return Work(spec.depth * tokens * block + predicted * dense(spec.width, spec.vocabulary),
                spec.depth * 2 * tokens * (tokens + 1) * q)
