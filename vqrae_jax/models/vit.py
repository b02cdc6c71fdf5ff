"""The vision transformer that every encoder and the decoder are made of.

Dense layers flatten their tokens to `[B*N, d]` and attention works on `[B*heads, N, d_head]`: the same
mathematics as over `[B, N, d]`, but XLA compiles plain two-dimensional matmuls to much faster CPU code,
above all in the backward pass, and loses nothing on TPU or GPU.

The blocks' parameters are stacked on a leading `depth` axis and scanned over, so that compile time does
not grow with depth and one path pattern names a parameter of every layer.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vqrae_jax.models import placement
from vqrae_jax.models.flops import Work, dense
from vqrae_jax.models.placement import split_batch, whole

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of images in [0, 1]

Activation = Literal["gelu", "gelu_tanh"]
FinalNorm = Literal["affine", "plain"]
Rope = tuple[np.ndarray | jax.Array, np.ndarray | jax.Array]  # cos and sin of angles
Remat = Callable[..., bool]
AnyBlock = TypeVar("AnyBlock", bound=nnx.Module)

# What is kept for the backward pass by default: results of matmuls. LayerNorms, GELUs and the attention weights are
# computed anew, which costs less than writing and reading them, on a CPU as on a chip.
SAVE_MATMULS = jax.checkpoint_policies.save_only_these_names("qkv", "attended", "out", "fc1")
REMAT_POLICIES = {  # by the names that configs have for them
    "none": jax.checkpoint_policies.everything_saveable,
    "minimal": SAVE_MATMULS,
    "full": jax.checkpoint_policies.nothing_saveable,
}
# Tokens from which on a TPU attends by a kernel: fewer bytes are moved and kept from there on (docs/measurements.md).
LONG = 512
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerSpec:
    """The shape of a stack of pre-LayerNorm transformer blocks.

    Attributes:
      width: token width d.
      depth: number of blocks.
      heads: attention heads; must divide `width`.
      mlp_dim: hidden width of the MLP.
      activation: `gelu` (erf, as in DINOv2 and MAE) or `gelu_tanh` (SigLIP).
      norm_eps: epsilon of every LayerNorm.
      layer_scale: whether each residual branch is multiplied by a learned vector (DINOv2).
    """

    width: int
    depth: int
    heads: int
    mlp_dim: int
    activation: Activation = "gelu"
    norm_eps: float = 1e-6
    layer_scale: bool = False

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")


class Linear(nnx.Module):
    """`y = x @ kernel + bias` over the last axis: `[..., in] -> [..., out]`, computed in `dtype`."""

    def __init__(self, in_features: int, out_features: int, *, use_bias: bool = True, dtype=jnp.float32,
                 kernel_init=nnx.initializers.xavier_uniform(), rngs: nnx.Rngs):
        kernel = kernel_init(rngs.params(), (in_features, out_features), jnp.float32)
        self.kernel = nnx.Param(kernel, cast_to=dtype)
        self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32), cast_to=dtype) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens, kernel = split_batch(x.reshape(-1, x.shape[-1])), self.kernel[...].astype(self.dtype)
        y = tokens.astype(self.dtype) @ whole(kernel)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        return split_batch(y).reshape(*x.shape[:-1], y.shape[-1])


def layer_norm(width: int, *, eps: float, affine: bool = True, dtype=jnp.float32, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm whose statistics are float32 and two-pass, as torch computes them."""
    return nnx.LayerNorm(width, epsilon=eps, use_bias=affine, use_scale=affine, dtype=dtype,
                         use_fast_variance=False, rngs=rngs)


def check_positions(grid: int, width: int) -> None:
    """Raises ValueError where a table of positions, made on the host, would fill its memory: 128^2 of 4096 are fine."""
    if grid * grid * width > 2**26:
        raise ValueError(f"{grid} x {grid} tokens of width {width} are more than any model has")


def rope_table(head_dim: int, grid: int, *, theta: float, prefix_tokens: int) -> Rope:
    """cos and sin of the angles by which queries and keys are turned, `[prefix_tokens + grid**2, head_dim]` float32.

    DINOv3's rotary positions (arXiv 2508.10104; `DINOv3ViTRopePositionEmbedding` of transformers): the first half of
    the angles belongs to the row, the second to the column of the patch's centre in [-1, 1], each times
    2 pi theta^(-4i / head_dim). `head_dim` is a multiple of 4. Prefix tokens are not turned.
    """
    check_positions(grid, head_dim)
    frequencies = 2 * np.pi * theta ** -(np.arange(head_dim // 4) * 4 / head_dim)
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    centre = lambda i: (2 * i[:, None] + 1) / grid - 1
    angles = np.concatenate([centre(rows) * frequencies, centre(columns) * frequencies], axis=1)
    angles = np.pad(np.tile(angles, 2), ((prefix_tokens, 0), (0, 0)))
    return np.cos(angles, dtype=np.float32), np.sin(angles, dtype=np.float32)


def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Turns every pair (i, i + head_dim/2) of `[..., N, head_dim]` by its angle, in the type of `x`."""
    cos, sin = (jnp.asarray(table, x.dtype) for table in rope)
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def attend(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v with the softmax in float32, `[G, N, d] -> [G, N, d]` three times.

    With `causal` a query sees the keys of its own and of earlier positions; there are as many of one as of the other.

    The backward pass computes the weights anew, as FlashAttention does (arXiv 2205.14135), so that nothing of size
    N x N outlives the layer. Where they take the shapes (16-bit floats, d a multiple of 8 up to 128) both passes are
    kernels in which nothing of that size exists at all: on NVIDIA GPUs cuDNN's flash attention, on TPUs JAX's splash
    attention from `LONG` tokens on.
    """
    return _attend(q, k, v, causal)


def _attend_forward(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool):

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        logits = _matmul("bqd,bkd->bqk", q * q.shape[-1]**-0.5, k)
        if causal:
            logits = _without_later(logits, queries=1, keys=2)
        weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        # Divided by their sum only afterwards, on d instead of N columns.
        y = _matmul("bqk,bkd->bqd", weights.astype(v.dtype), v) / jnp.sum(weights, axis=-1, keepdims=True)
        return y.astype(v.dtype)

    available = _kernels(q)  # pyright: ignore[reportGeneralTypeIssues]  # it takes this for a circle
    kernels: dict[str, Any] = {name: functools.partial(kernel, causal=causal) for name, kernel in available.items()}
    y = jax.lax.platform_dependent(q, k, v, **kernels, default=plain) if kernels else plain(q, k, v)
    y = checkpoint_name(y, "attended")
    return y, (q, k, v, y)


def _attend_backward(causal: bool, residuals, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:

    def plain(q, k, v, y, dy) -> tuple[jax.Array, jax.Array, jax.Array]:
        q = q * q.shape[-1]**-0.5
        # Keys before queries throughout: so the large matrices are never read transposed, but for dq.
        logits = _matmul("bkd,bqd->bkq", k, q)
        if causal:
            logits = _without_later(logits, queries=2, keys=1)
        weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
        weights = weights / jnp.sum(weights, axis=1, keepdims=True)
        dv = jnp.einsum("bkq,bqd->bkd", weights.astype(v.dtype), dy)
        mean = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)
        dlogits = (weights * (_matmul("bkd,bqd->bkq", v, dy) - mean[:, None])).astype(q.dtype)
        dq = jnp.einsum("bkq,bkd->bqd", dlogits, k) * q.shape[-1]**-0.5
        return dq, jnp.einsum("bkq,bqd->bkd", dlogits, q), dv

    def pulled_back(kernel):
        return lambda q, k, v, y, dy: jax.vjp(functools.partial(kernel, causal=causal), q, k, v)[1](dy)

    kernels: dict[str, Any] = {name: pulled_back(kernel) for name, kernel in _kernels(residuals[0]).items()}
    arrays: Any = (*residuals, dy)
    return jax.lax.platform_dependent(*arrays, **kernels, default=plain) if kernels else plain(*arrays)


_attend = jax.custom_vjp(lambda q, k, v, causal: _attend_forward(q, k, v, causal)[0], nondiff_argnums=(3,))
_attend.defvjp(_attend_forward, _attend_backward)


def _matmul(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _without_later(logits: jax.Array, *, queries: int, keys: int) -> jax.Array:
    """Minus infinity where a key's position is after the query's; `queries` and `keys` are their axes."""
    position = lambda axis: jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis)
    return jnp.where(position(keys) <= position(queries), logits, -jnp.inf)


def _kernels(q: jax.Array) -> dict[str, Callable[..., jax.Array]]:
    """What attends in place of XLA's matmuls, by platform."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[-1] % 8 or q.shape[-1] > 128:
        return {}
    kernels = {}
    if _has_cudnn():  # without it, it cannot even be traced
        kernels["cuda"] = _cudnn
    # Over which devices the program is split must be known.
    if q.shape[1] >= LONG and placement.on_mesh() and len(q) % placement.devices() == 0:
        kernels["tpu"] = _splash
    return kernels


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
    q, k, v = (x[:, :, None] for x in (q, k, v))  # one head, for heads are part of the batch
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")[:, :, 0]


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
    # Not above: to import Pallas takes long, and only long sequences need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    tokens, head_dim = q.shape[1:]
    padding = -tokens % 128  # a TPU's lanes; keys there are seen by no query, and what such queries see is cut off
    side = tokens + padding
    block = next(size for size in (512, 384, 256, 128) if side % size == 0)
    seen = np.broadcast_to(np.arange(side) < tokens, (side, side))
    mask = masks.MultiHeadMask([masks.NumpyMask(np.tril(seen) if causal else seen)])
    kernel = kernels.make_splash_mha_single_device(mask, block_sizes=kernels.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block))

    def rows(*arrays: jax.Array) -> jax.Array:
        padded = (jnp.pad(x, ((0, 0), (0, padding), (0, 0)))[:, None] for x in arrays)
        y: Any = jax.vmap(kernel)(*padded)  # of one head: heads are part of the batch
        return y[:, 0, :tokens]

    return placement.on_each_device(rows, q * head_dim**-0.5, k, v)


_CUDNN = contextvars.ContextVar("cudnn", default=True)


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """What is first traced inside has plain attention on NVIDIA GPUs as well: to measure what cuDNN's brings."""
    token = _CUDNN.set(False)
    try:
        yield
    finally:
        _CUDNN.reset(token)


def _has_cudnn() -> bool:
    if not _CUDNN.get() or jax.default_backend() != "gpu" or "cuda" not in jax.devices()[0].client.platform_version:
        return False
    return float(jax.local_devices()[0].compute_capability) >= 8  # Ampere: earlier ones lack its flash attention


class Attention(nnx.Module):
    """Multi-head self-attention, `[B, N, d] -> [B, N, d]`, softmax in float32.

    Without `key_bias` there is no parameter in its place: under rotary positions it would change the result.
    """

    def __init__(self, spec: TransformerSpec, *, key_bias: bool = True, dtype, rngs: nnx.Rngs):
        self.heads = spec.heads
        self.qkv = Linear(spec.width, 3 * spec.width, use_bias=key_bias, dtype=dtype, rngs=rngs)
        self.query_value_bias = None if key_bias else nnx.Param(jnp.zeros(2 * spec.width), cast_to=dtype)
        self.out = Linear(spec.width, spec.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, rope: Rope | None = None) -> jax.Array:
        batch, tokens, width = x.shape
        head_dim = width // self.heads
        qkv = checkpoint_name(self.qkv(x), "qkv")
        if self.query_value_bias is not None:
            query, value = jnp.split(self.query_value_bias[...].astype(qkv.dtype), 2)
            qkv = qkv + jnp.concatenate([query, jnp.zeros_like(query), value])
        qkv = qkv.reshape(batch, tokens, 3, self.heads, head_dim)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4).reshape(3, batch * self.heads, tokens, head_dim)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        y = attend(q, k, v)
        y = y.reshape(batch, self.heads, tokens, head_dim).transpose(0, 2, 1, 3)
        return checkpoint_name(self.out(y.reshape(batch, tokens, width)), "out")


@functools.partial(jax.checkpoint, prevent_cse=False)
def gelu(x: jax.Array) -> jax.Array:
    """GELU by erf, as PyTorch computes it: x/2 (1 + erf(x / sqrt 2)) in float32, `[...]` in the type of `x`.

    `jax.nn.gelu` has erfc in its place, which runs half as fast on a CPU and takes long to compile for a TPU. Of a
    scanned layer the backward pass keeps `x` only, and not what is float32 in between.
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


class Mlp(nnx.Module):
    """Two dense layers with a GELU between, `[B, N, d] -> [B, N, d]`."""

    def __init__(self, spec: TransformerSpec, *, dtype, rngs: nnx.Rngs):
        self.fc1 = Linear(spec.width, spec.mlp_dim, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(spec.mlp_dim, spec.width, dtype=dtype, rngs=rngs)
        self.activation = jax.nn.gelu if spec.activation == "gelu_tanh" else gelu

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.activation(checkpoint_name(self.fc1(x), "fc1")))


class Block(nnx.Module):
    """One pre-LayerNorm transformer block, `[B, N, d] -> [B, N, d]`."""

    def __init__(self, spec: TransformerSpec, *, key_bias: bool = True, dtype, rngs: nnx.Rngs):
        self.norm1 = layer_norm(spec.width, eps=spec.norm_eps, dtype=dtype, rngs=rngs)
        self.attention = Attention(spec, key_bias=key_bias, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(spec.width, eps=spec.norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(spec, dtype=dtype, rngs=rngs)
        ones = lambda: nnx.Param(jnp.ones(spec.width), cast_to=dtype) if spec.layer_scale else None
        self.scale1, self.scale2 = ones(), ones()

    def __call__(self, x: jax.Array, rope: Rope | None = None) -> jax.Array:
        x = x + _scaled(self.attention(self.norm1(x), rope), self.scale1)
        return x + _scaled(self.mlp(self.norm2(x)), self.scale2)


def stack(make_block: Callable[[nnx.Rngs], AnyBlock], depth: int, rngs: nnx.Rngs) -> AnyBlock:
    """`depth` blocks as one module, whose parameters have a leading axis for them."""
    return nnx.vmap(make_block, in_axes=0, out_axes=0)(rngs.split(depth))


def scan(run: Callable[[Any, jax.Array, Any], jax.Array], blocks: nnx.Module, x: jax.Array, inputs: Any = None, *,
         layers: slice = slice(None), remat: Remat) -> jax.Array:
    """`x = run(block, x, inputs)` for one block after another.

    Args:
      run: a block's work.
      blocks: as `stack` makes them.
      x: tokens.
      inputs: a tree of arrays; a block gets its entry of their leading axis.
      layers: the blocks that run.
      remat: see `Transformer`.
    """
    graphdef, stacked = nnx.split(blocks)
    body = lambda x, layer: (run(nnx.merge(graphdef, layer[0]), x, layer[1]), None)
    chosen = jax.tree.map(lambda leaf: leaf[layers], (stacked, inputs))
    return jax.lax.scan(jax.checkpoint(body, policy=remat, prevent_cse=False), x, chosen)[0]


def _scaled(x: jax.Array, scale: nnx.Param | None) -> jax.Array:
    return x if scale is None else x * scale[...].astype(x.dtype)


class Transformer(nnx.Module):
    """`depth` blocks and a final LayerNorm, `[B, N, d] -> [B, N, d]`; the result is float32.

    `final_norm="plain"` has no scale and bias: every token leaves with zero mean and unit variance. With None there is
    no final LayerNorm at all. `rope`, where given, turns the queries and keys of every block. `remat`, a policy of
    `jax.checkpoint_policies`, says what of a block is kept for the backward pass, which recomputes the rest.
    """

    def __init__(self, spec: TransformerSpec, *, final_norm: FinalNorm | None = "affine", key_bias: bool = True,
                 remat: Remat = SAVE_MATMULS, dtype=jnp.float32, rngs: nnx.Rngs):
        make_block = lambda rngs: Block(spec, key_bias=key_bias, dtype=dtype, rngs=rngs)
        self.blocks = stack(make_block, spec.depth, rngs)
        make_norm = lambda: layer_norm(spec.width, eps=spec.norm_eps, affine=final_norm == "affine", rngs=rngs)
        self.norm = make_norm() if final_norm is not None else None
        self.depth, self.remat, self.dtype = spec.depth, remat, dtype

    def __call__(self, x: jax.Array, rope: Rope | None = None) -> jax.Array:
        (x,) = self.hidden_states(x, [self.depth], rope)
        return self.normalize(x)

    def normalize(self, x: jax.Array) -> jax.Array:
        """The final LayerNorm, where there is one; the result is float32 in any case."""
        x = x.astype(jnp.float32)
        return x if self.norm is None else self.norm(x)

    def hidden_states(self, x: jax.Array, layers: Sequence[int], rope: Rope | None = None) -> list[jax.Array]:
        """The tokens after each of `layers`, without the final LayerNorm: `[B, N, d]` in the compute dtype each.

        Layers are numbered as `transformers` numbers `hidden_states`: 0 is the input, `depth` the last block's output.
        They must ascend. Blocks after the last of them are not run.
        """
        run = lambda block, x, _: block(x, rope)
        states, x, done = [], x.astype(self.dtype), 0
        for layer in layers:
            x = scan(run, self.blocks, x, layers=slice(done, layer), remat=self.remat)
            states.append(x)
            done = layer
        return states


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTSpec(TransformerSpec):
    """A transformer that reads images.

    Attributes:
      patch_size: side of a patch in pixels.
      prefix_tokens: 0, or 1 + number of register tokens; they are dropped from the output.
      rope_theta: base of rotary positions (DINOv3), which take the place of position embeddings and key biases.
      has_final_norm: whether a LayerNorm follows the last block (not so in InternViT).
    """

    patch_size: int
    prefix_tokens: int = 0
    rope_theta: float | None = None
    has_final_norm: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.rope_theta is not None and (head_dim := self.width // self.heads) % 4:
            raise ValueError(f"rotary positions need a head width that is a multiple of 4, not {head_dim}")


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """`[B, H, W, C] -> [B, H/p * W/p, p*p*C]`; patches in raster order, each as (row, column, channel)."""
    batch, height, width, channels = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"image size {height}x{width} is not divisible by patch size {patch_size}")
    x = images.reshape(batch, height // patch_size, patch_size, width // patch_size, patch_size, channels)
    tokens = (height // patch_size) * (width // patch_size)  # not -1, which an empty batch leaves open
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, tokens, patch_size * patch_size * channels)


def unpatchify(patches: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """The inverse of `patchify` for three channels: `[B, h*w, p*p*3] -> [B, h*p, w*p, 3]`."""
    batch, _, size = patches.shape
    patch_size = round((size // 3) ** 0.5)
    x = patches.reshape(batch, *grid, patch_size, patch_size, 3)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, grid[0] * patch_size, grid[1] * patch_size, 3)


class ViT(nnx.Module):
    """Pixels to tokens: patch embedding, learned or rotary positions, blocks, final LayerNorm.

    `__call__` maps normalised images `[B, image_size, image_size, 3]` to `[B, N, d]` float32 with
    N = (image_size / patch_size)**2; cls and register tokens take part in attention and are dropped at the end.
    `remat`: see `Transformer`.

    Raises:
      ValueError: the patch size does not divide the image size; `final_norm="plain"` where there is no final LayerNorm.
    """

    def __init__(self, spec: ViTSpec, *, image_size: int, final_norm: FinalNorm = "affine",
                 remat: Remat = SAVE_MATMULS, dtype=jnp.float32, rngs: nnx.Rngs):
        if image_size % spec.patch_size:
            raise ValueError(f"image size {image_size} is not divisible by the encoder's patch size {spec.patch_size}")
        if final_norm == "plain" and not spec.has_final_norm:
            raise ValueError("final_norm 'plain' cannot apply: this encoder has no final LayerNorm; use 'affine', "
                             "which hands over the last block's output")
        self.spec = spec
        self.grid = image_size // spec.patch_size
        normal = nnx.initializers.normal(0.02)
        self.patch_embedding = Linear(spec.patch_size**2 * 3, spec.width, dtype=dtype, rngs=rngs)
        learned = spec.rope_theta is None
        table = lambda tokens: nnx.Param(normal(rngs.params(), (tokens, spec.width)), cast_to=dtype)
        self.position_embedding = table(self.grid**2) if learned else None
        # The cls token's own position embedding is folded into it when weights are loaded.
        self.prefix = table(spec.prefix_tokens) if spec.prefix_tokens else None
        self.transformer = Transformer(spec, final_norm=final_norm if spec.has_final_norm else None,
                                       key_bias=learned, remat=remat, dtype=dtype, rngs=rngs)

    def embed(self, images: jax.Array) -> jax.Array:
        """Patch embeddings plus learned positions, `[B, N, d]`, before any attention and without prefix tokens."""
        x = self.patch_embedding(patchify(images, self.spec.patch_size))
        return x if self.position_embedding is None else x + self.position_embedding[...].astype(x.dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        (x,) = self.features(images, [self.spec.depth])
        return x

    def features(self, images: jax.Array, layers: Sequence[int]) -> list[jax.Array]:
        """The patch tokens after each of `layers` and the final LayerNorm, `[B, N, d]` float32 each.

        Layers are numbered as in `Transformer.hidden_states`; the same LayerNorm serves all of them.
        """
        return [tokens[:, self.spec.prefix_tokens:] for tokens in self.tokens(images, layers)]

    def tokens(self, images: jax.Array, layers: Sequence[int]) -> list[jax.Array]:
        """As `features`, with the prefix tokens in front: cls, then registers. `[B, prefix_tokens + N, d]` each."""
        spec, rope = self.spec, None
        if spec.rope_theta is not None:
            rope = rope_table(spec.width // spec.heads, self.grid, theta=spec.rope_theta,
                              prefix_tokens=spec.prefix_tokens)
        x = self.embed(images)
        if self.prefix is not None:
            prefix = jnp.broadcast_to(self.prefix[...].astype(x.dtype), (x.shape[0], *self.prefix.shape))
            x = jnp.concatenate([prefix, x], axis=1)
        states = self.transformer.hidden_states(x, layers, rope)
        return [self.transformer.normalize(state) for state in states]


def blocks_work(spec: TransformerSpec, tokens: int, *, depth: int) -> Work:
    """Operations of `depth` blocks for an image of so many tokens."""
    weighted = 4 * dense(spec.width, spec.width) + 2 * dense(spec.width, spec.mlp_dim)
    return Work(depth * tokens * weighted, depth * 4 * tokens**2 * spec.width)


def vit_work(spec: ViTSpec, tokens: int, *, depth: int) -> tuple[Work, Work]:
    """Operations of the patch embedding and of `depth` blocks for an image of so many patches."""
    return (Work(tokens * dense(spec.patch_size**2 * 3, spec.width)),
            blocks_work(spec, tokens + spec.prefix_tokens, depth=depth))
