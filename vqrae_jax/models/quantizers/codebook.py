"""What quantizers with a codebook have in common: all but where the codes come from and what trains them."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from vqrae_jax.models.flops import QuantizerWork, Work, dense
from vqrae_jax.models.quantizers.base import Quantized, Quantizer, apply_layer, linear, with_gradient_of
from vqrae_jax.models.quantizers.search import Search, count_uses, kmeans, nearest_code, norm
from vqrae_jax.models.vit import Linear

Gradient = Literal["straight_through", "rotation"]


class CodebookQuantizer(Quantizer):
    """A search among codes that a subclass's `codes` makes; arguments as for `SimVQ`."""

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
            self.project_in = linear(width, dim, rngs=rngs) if project else None
        self.project_out = linear(dim, width, rngs=rngs) if project else None
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
        return apply_layer(self.project_out, self._chosen(self.codes(), indices))

    def _chosen(self, codes: jax.Array, indices: jax.Array) -> jax.Array:
        """`codes[indices]` for all codes, `[K, e], [...] -> [..., e]`, with a gradient to what made them."""
        return codes[indices]

    def _to_code_space(self, z: jax.Array) -> jax.Array:
        return apply_layer(self.project_in, z.astype(jnp.float32))

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
        z_q = apply_layer(self.project_out, with_gradient_of(constant, source))
        losses = {"commitment": jnp.mean((z - constant) ** 2)}
        return Quantized(z_q, indices, losses, {"counts": count_uses(indices, self.num_codes)}), z, chosen

    def _centres(self, z: jax.Array, *, iterations: int, rng: jax.Array) -> jax.Array:
        return kmeans(self._to_code_space(z), self.num_codes, iterations=iterations, rng=rng, metric=self.search,
                      block_tokens=self.block_tokens)


def rotate_onto(z: jax.Array, q: jax.Array) -> jax.Array:
    """z turned and stretched onto q by a map that counts as a constant: `[..., e], [..., e] -> [..., e]`.

    As a straight-through estimator it carries q's gradient to z with the angle between them kept, instead of copying
    it: the rotation trick, Fifty et al. 2024 (arXiv 2410.06424), section 4.
    """
    constant_z, q = jax.lax.stop_gradient((z, q))
    unit_z, unit_q = constant_z / norm(constant_z), q / norm(q)
    middle = unit_z + unit_q
    middle = middle / norm(middle)
    dot = lambda a, b: jnp.sum(a * b, axis=-1, keepdims=True)
    rotated = z - 2 * dot(z, middle) * middle + 2 * dot(z, unit_z) * unit_q
    return rotated * (norm(q) / norm(constant_z))


def codebook_work(*, width: int, tokens: int, size: int, dim: int, projection: bool = False,
                  input_projection: bool = False, learned_codes: bool = False, **_) -> QuantizerWork:
    """Operations of a `CodebookQuantizer`; `learned_codes` are the rows of a codebook times a square matrix."""
    projected = projection or dim != width
    return QuantizerWork(
        into=Work(tokens * dense(width, dim)) if projected or input_projection else Work(),
        search=tokens * dense(dim, size),
        out=Work(tokens * dense(dim, width)) if projected else Work(),
        code=dense(dim, dim) if learned_codes else 0)
