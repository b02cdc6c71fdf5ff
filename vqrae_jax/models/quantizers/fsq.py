"""Finite scalar quantization, plain and between two MLPs."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vqrae_jax.models.flat import Buffer
from vqrae_jax.models.flops import QuantizerWork, Work, dense
from vqrae_jax.models.quantizers.base import Quantized, Quantizer, QuantizerKind, apply_layer, linear, with_gradient_of
from vqrae_jax.models.quantizers.search import count_uses
from vqrae_jax.models.vit import gelu, layer_norm

HIDDEN_DIM, FREQUENCIES = 512, 128  # of the PyTorch system's adapters


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
        return apply_layer(self.project_out, self._codes_at(indices))

    def _quantized(self, digits: jax.Array, source: jax.Array) -> tuple[Quantized, jax.Array]:
        """The result without losses, its gradient passed on to `source`, and the codes, both `[..., len(levels)]`."""
        indices = jnp.sum(digits * jnp.asarray(self._place_values(), jnp.int32), axis=-1, dtype=jnp.int32)
        codes = self._codes_at(indices)
        z_q = apply_layer(self.project_out, with_gradient_of(codes, source))
        return Quantized(z_q, indices, {}, {"counts": count_uses(indices, self.num_codes)}), codes


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
        self.project_in = linear(width, dim, rngs=rngs) if width != dim else None
        self.project_out = linear(dim, width, rngs=rngs) if width != dim else None

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
        bounded = self._bound(apply_layer(self.project_in, z.astype(jnp.float32)))
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

    Buffers: `project_out/frequencies` [len(levels), frequencies] float32, which is B, of standard deviation 10.

    Args:
      width: tokens' width d.
      levels: levels per coordinate, each at least 2; their product is the number of codes.
      hidden_dim: hidden width of the first MLP; that of the second one is d.
      frequencies: columns of B.
    """

    def __init__(self, *, width: int, levels: tuple[int, ...], hidden_dim: int = HIDDEN_DIM,
                 frequencies: int = FREQUENCIES, rngs: nnx.Rngs):
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
        scaled = apply_layer(self.project_in, z.astype(jnp.float32)) * self._half()
        digits = jnp.round(jnp.clip(jax.lax.stop_gradient(scaled) + self._half(), 0, 2 * self._half()))
        quantized, codes = self._quantized(digits.astype(jnp.int32), scaled)
        return quantized._replace(losses={"commitment": jnp.mean((scaled - codes) ** 2)})


class _ToCoordinates(nnx.Module):
    """Tokens `[..., width]` to coordinates `[..., dim]` within plus and minus `gain`."""

    def __init__(self, width: int, hidden_dim: int, dim: int, *, rngs: nnx.Rngs):
        self.norm = layer_norm(width, eps=1e-5, rngs=rngs)
        self.fc1 = linear(width, hidden_dim, rngs=rngs)
        self.fc2 = linear(hidden_dim, hidden_dim, rngs=rngs)
        self.fc3 = linear(hidden_dim, dim, rngs=rngs)
        self.gain = nnx.Param(jnp.full(dim, 3.0, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = gelu(self.fc1(self.norm(x)))
        x = gelu(self.fc2(x))
        return jnp.tanh(self.fc3(x)) * self.gain[...]


class _FromCoordinates(nnx.Module):
    """Coordinates `[..., dim]` to tokens `[..., width]` by way of their Fourier features."""

    def __init__(self, dim: int, frequencies: int, width: int, *, rngs: nnx.Rngs):
        self.frequencies = Buffer(10.0 * jax.random.normal(rngs.params(), (dim, frequencies)))
        self.fc1 = linear(2 * frequencies, width, rngs=rngs)
        self.norm1 = layer_norm(width, eps=1e-5, rngs=rngs)
        self.fc2 = linear(width, width, rngs=rngs)
        self.norm2 = layer_norm(width, eps=1e-5, rngs=rngs)
        self.fc3 = linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        phases = (2 * jnp.pi * x) @ self.frequencies[...]
        x = self.fc1(jnp.concatenate([jnp.sin(phases), jnp.cos(phases)], axis=-1))
        x = self.fc2(gelu(self.norm1(x)))
        return self.fc3(gelu(self.norm2(x)))


def _checked(build: Callable[..., _ScalarQuantizer]) -> Callable[..., _ScalarQuantizer]:
    """Refuses a number and a width of codes that are not those of the levels."""

    def checked(*, size: int, dim: int, levels: tuple[int, ...], **keys) -> _ScalarQuantizer:
        quantizer = build(levels=levels, **keys)
        if (size, dim) != (quantizer.num_codes, len(levels)):
            raise ValueError(f"config keys model.quantizer.size {size} and dim {dim} must be the product and the "
                             f"number of model.quantizer.levels {levels}: {quantizer.num_codes} and {len(levels)}")
        return quantizer

    return checked


def _fsq_work(*, width: int, tokens: int, dim: int, **_) -> QuantizerWork:
    layer = Work(tokens * dense(width, dim)) if dim != width else Work()
    return QuantizerWork(into=layer, out=layer)


def _adapter_work(*, width: int, tokens: int, dim: int, **_) -> QuantizerWork:
    into = dense(width, HIDDEN_DIM) + dense(HIDDEN_DIM, HIDDEN_DIM) + dense(HIDDEN_DIM, dim)
    out = dense(2 * FREQUENCIES, width) + 2 * dense(width, width) + dense(dim, FREQUENCIES)
    return QuantizerWork(into=Work(tokens * into), out=Work(tokens * out))


FSQ_KIND = QuantizerKind(build=_checked(FSQ), keys=("levels",), work=_fsq_work)
ADAPTER_FSQ = QuantizerKind(build=_checked(AdapterFSQ), keys=("levels",), work=_adapter_work)
