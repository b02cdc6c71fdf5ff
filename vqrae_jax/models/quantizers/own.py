"""The kind of a quantizer that is no row of the table: an object, given to `vqrae_jax.train`."""

from typing import NoReturn

import jax
import jax.numpy as jnp
from flax import nnx

from vqrae_jax.models.quantizers.base import Quantizer, QuantizerKind


def _refuse(**_) -> NoReturn:
    raise ValueError("the quantizer of this run is an object, which no config can name: in Python, give it to "
                     "vqrae_jax.train or vqrae_jax.load as quantizer=")


def size_and_dim(quantizer: Quantizer) -> tuple[int, int]:
    """The number of its codes and their width.

    Raises:
      ValueError: it is no `Quantizer`, or its `codes` are not `[num_codes, dim]`.
    """
    name = type(quantizer).__name__
    if not isinstance(quantizer, Quantizer):
        raise ValueError(f"quantizer: {name} is no vqrae_jax.models.quantizers.Quantizer: derive it from that class, "
                         "which says what a quantizer has")
    shape = jax.eval_shape(lambda: quantizer.codes()).shape
    if len(shape) != 2 or shape[0] != quantizer.num_codes or shape[0] < 2:
        raise ValueError(f"quantizer: {name}.codes() has shape {list(shape)}: it must be [num_codes, dim], and "
                         f"num_codes, which is {quantizer.num_codes}, at least 2")
    return shape


def check(quantizer: Quantizer, *, width: int) -> None:
    """Refuses an object that is no quantizer of tokens of this width.

    Raises:
      ValueError: the message names what does not follow the interface.
    """
    name, (size, _) = type(quantizer).__name__, size_and_dim(quantizer)
    for path, leaf in nnx.to_flat_state(nnx.state(quantizer)):
        if not isinstance(leaf, nnx.Variable):
            raise ValueError(f"quantizer: {name}.{'.'.join(map(str, path))} is a bare array: make it an nnx.Param, "
                             "which learns, or a vqrae_jax.models.flat.Buffer, which is kept")
    tokens = (2, 3, width)
    try:
        made = jax.eval_shape(lambda: quantizer(jnp.zeros(tokens), train=True))
    except (TypeError, ValueError) as error:
        raise ValueError(f"quantizer: {name} cannot take the encoder's tokens, whose width is {width}: "
                         f"{' '.join(str(error).split())}") from error
    for what, found, shape in (("z_q", made.z_q.shape, tokens), ("indices", made.indices.shape, tokens[:-1]),
                               ("stats[\"counts\"]", made.stats["counts"].shape, (size,))):
        if found != shape:
            raise ValueError(f"quantizer: {name} makes {what} of shape {list(found)} from tokens {list(tokens)}: it "
                             f"must be {list(shape)}")
    if made.losses.keys() != quantizer.loss_weights.keys():
        raise ValueError(f"quantizer: {name} makes the losses {sorted(made.losses)}, but its loss_weights are of "
                         f"{sorted(quantizer.loss_weights)}")


OWN = QuantizerKind(build=_refuse, keys=(), work=_refuse)
