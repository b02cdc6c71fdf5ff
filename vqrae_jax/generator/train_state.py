"""What of a generator changes in training and what does not: how both start, and where they lie on a mesh."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vqrae_jax.config import GeneratorConfig
from vqrae_jax.generator.build import Structure
from vqrae_jax.models import flat
from vqrae_jax.models.flat import Arrays
from vqrae_jax.training import optim, sharding


class TrainState(NamedTuple):
    """Everything that changes during training.

    Attributes:
      step: int32, batches seen, skipped ones included.
      params: the learned parameters.
      opt_state: of the optimizer.
      ema: moving average of `params`; empty when it is off.
      skipped: int32, steps whose loss or gradient was not finite, and which changed nothing.
      skipped_in_a_row: int32, how many of those came last.
    """

    step: jax.Array
    params: Arrays
    opt_state: optax.OptState
    ema: Arrays
    skipped: jax.Array
    skipped_in_a_row: jax.Array


class Frozen(NamedTuple):
    """Everything that does not change: the parameters whose learning rate is 0.

    They are saved as they were given, and trained with as `in_training` says.
    """

    params: Arrays


def init(config: GeneratorConfig, params: Arrays) -> tuple[TrainState, Frozen]:
    """Splits all parameters of a model into what learns and what is frozen, and starts optimizer and average."""
    learned = {path: value for path, value in params.items() if not optim.is_frozen(path, config.optim.lr_multipliers)}
    frozen = {path: value for path, value in params.items() if path not in learned}
    zero = lambda: jnp.zeros((), jnp.int32)
    state = TrainState(
        step=zero(), params=learned, opt_state=optim.from_config(config.optim, steps=config.train.steps).init(learned),
        # A copy: an array that stands in two places cannot be donated.
        ema=jax.tree.map(jnp.copy, learned) if config.optim.ema_decay else {}, skipped=zero(), skipped_in_a_row=zero())
    return state, Frozen(frozen)


def abstract(config: GeneratorConfig, structure: Structure, mesh: Mesh) -> tuple[TrainState, Frozen]:
    """Shapes of a run's state as it is saved, and its place on a mesh; nothing is allocated."""
    return sharding.placed(mesh, jax.eval_shape(functools.partial(init, config), structure.params), sharding.RULES)


def in_training(config: GeneratorConfig, structure: Structure, mesh: Mesh) -> tuple[TrainState, Frozen]:
    """As `abstract`, but frozen arrays have the types to which their modules cast them; see `flat.cast_types`."""
    state, frozen = abstract(config, structure, mesh)
    return state, Frozen(flat.with_types(frozen.params, flat.cast_types(structure.graphdef, structure.params)))


def made(config: GeneratorConfig, mesh: Mesh, params: Arrays) -> tuple[TrainState, Frozen]:
    """`init` on a mesh, every device making its own share."""
    return sharding.made(functools.partial(init, config), mesh, sharding.RULES, params)


def items(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds: the model, and what only training needs."""
    fields = state._asdict()
    return {"model": {"params": fields.pop("params"), "ema": fields.pop("ema")}, "training": fields}


def from_items(saved: Mapping[str, Any]) -> TrainState:
    """The inverse of `items`."""
    return TrainState(**saved["model"], **saved["training"])
