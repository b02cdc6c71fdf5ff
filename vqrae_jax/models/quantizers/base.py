"""What every quantizer is, what it returns, and a row of the table of them."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import jax
from flax import nnx

from vqrae_jax.models.flops import QuantizerWork
from vqrae_jax.models.vit import Linear


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
    """The interface that the package's docstring lists; by default without losses and with nothing that moves."""

    moving_buffers: ClassVar[tuple[str, ...]] = ()
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

    def next_buffers(self, stats: dict[str, jax.Array], *, rng: jax.Array) -> dict[str, jax.Array]:
        """The buffers that a training step whose global batch had these statistics changes: none."""
        del stats, rng
        return {}

    @staticmethod
    def add_stats(first: dict[str, jax.Array], second: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The statistics of two micro-batches of one step together: sums."""
        return {name: first[name] + second[name] for name in first}

    def __call__(self, z: jax.Array, *, train: bool) -> Quantized:
        """Tokens `[..., d]` of any float dtype to their codes."""
        raise NotImplementedError


class QuantizerKind(NamedTuple):
    """A row of the table of quantizers: all that the rest of the package asks about one by name.

    Attributes:
      build: `(width=, rngs=, size=, dim=, **keys)` to a quantizer of tokens of that width.
      keys: of the keys of `model.quantizer` those that mean something to it, besides `size` and `dim`; `build` and
        `work` get their values, and a config that changes any other is refused.
      work: `(width=, tokens=, size=, dim=, **keys)` to its operations for that many tokens.
      sharded: `{buffer: dimensions}`, along which a buffer may be split over devices, the first that fits; buffers
        that are not named are whole on every device.
      from_data: whether it has `init_from_data`, and so whether `model.quantizer.init` may be "kmeans".
    """

    build: Callable[..., Quantizer]
    keys: tuple[str, ...]
    work: Callable[..., QuantizerWork]
    sharded: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    from_data: bool = False


def linear(inputs: int, outputs: int, *, rngs: nnx.Rngs) -> Linear:
    """The layer that leads into code space, or out of it."""
    # lecun_normal keeps the rms of its input, so tokens of rms 1 stay so whatever the two widths are.
    return Linear(inputs, outputs, kernel_init=nnx.initializers.lecun_normal(), rngs=rngs)


def apply_layer(layer: Callable[[jax.Array], jax.Array] | None, x: jax.Array) -> jax.Array:
    """`layer(x)` with matmuls in full float32 precision; `x` where there is no layer."""
    if layer is None:
        return x
    with jax.default_matmul_precision("highest"):
        return layer(x)


@jax.custom_jvp
def with_gradient_of(value: jax.Array, source: jax.Array) -> jax.Array:
    """`value`, bit for bit, to which gradients arrive as if it were `source` (the straight-through estimator)."""
    del source
    return value


@with_gradient_of.defjvp
def _with_gradient_of_jvp(primals, tangents):
    return primals[0], tangents[1]
