"""What of a tokenizer changes in training and what does not: how both start, and where they lie on a mesh."""

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vqrae_jax.config import Config
from vqrae_jax.models import flat
from vqrae_jax.models.flat import Arrays
from vqrae_jax.models.quantizers import QUANTIZERS
from vqrae_jax.tokenizer import build
from vqrae_jax.tokenizer.build import Structure
from vqrae_jax.tokenizer.gan import Gan, GanState, learns
from vqrae_jax.training import optim, sharding


class TrainState(NamedTuple):
    """Everything that changes during training.

    Attributes:
      step: int32, batches seen, skipped ones included.
      params: the learned parameters.
      buffers: the model's buffers, frozen codes as well as moving ones.
      opt_state: of the optimizer.
      ema: moving average of `params` and of the buffers that move; empty when it is off.
      gan: of the discriminator.
      code_counts: [K] int32, uses of each code since the last multiple of `train.log_every` steps.
      skipped: int32, steps whose loss or gradient was not finite, and which changed nothing.
      skipped_in_a_row: int32, how many of those came last.
    """

    step: jax.Array
    params: Arrays
    buffers: Arrays
    opt_state: optax.OptState
    ema: Arrays
    gan: GanState
    code_counts: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


class Frozen(NamedTuple):
    """Everything that does not change; it is saved as it was given, and trained with as `in_training` says.

    Attributes:
      params: the model's frozen parameters.
      teacher: the encoder as it was at the start, under the paths it has in the model; empty where no loss
        needs a copy.
      networks: parameters and buffers of the perceptual loss's networks, and the parameters of the discriminator's
        backbone, under their names.
    """

    params: Arrays
    teacher: Arrays
    networks: Arrays


def init(config: Config, structure: Structure, params: Arrays, buffers: Arrays, network_params: Arrays,
         network_buffers: Arrays) -> tuple[TrainState, Frozen]:
    """Splits arrays into what learns and what is frozen, and starts optimizers, EMA and teacher.

    Args:
      config: of the run.
      structure: its model's.
      params: all the model's parameters.
      buffers: its buffers.
      network_params: parameters of the losses' networks, discriminator included.
      network_buffers: their buffers.

    Raises:
      ValueError: distillation of an encoder that is frozen.
    """
    multipliers = config.optim.lr_multipliers
    learned = {path: value for path, value in params.items() if not optim.is_frozen(path, multipliers)}
    frozen = {path: value for path, value in params.items() if path not in learned}
    # Copies: an array that stands in two places cannot be donated.
    copy = lambda arrays: jax.tree.map(jnp.copy, arrays)
    quantizer = flat.merge(structure.graphdef, params, buffers).quantizer
    averaged = {**learned, **{path: buffers[path] for path in flat.prefixed(
        "quantizer/", dict.fromkeys(quantizer.moving_buffers))}}
    encoder = {path: value for path, value in params.items() if flat.part(path) == "encoder"}
    if config.loss.distill_weight and not build.encoder_learns(config, params):
        raise ValueError("config key loss.distill_weight has no effect on an encoder that is frozen: "
                         "set it to 0, or let optim.lr_multipliers give the encoder a rate")
    zero = lambda shape=(): jnp.zeros(shape, jnp.int32)
    state = TrainState(
        step=zero(), params=learned, buffers=dict(buffers),
        opt_state=optim.from_config(config.optim, steps=config.train.steps).init(learned),
        ema=copy(averaged) if config.optim.ema_decay else {},
        gan=Gan(config, structure).init(network_params, network_buffers),
        code_counts=zero((quantizer.num_codes,)), skipped=zero(), skipped_in_a_row=zero())
    kept = {path: value for path, value in network_buffers.items() if flat.part(path) != "discriminator"}
    return state, Frozen(
        params=frozen, teacher=copy(encoder) if build.has_teacher(config, params) else {},
        networks=kept | {path: value for path, value in network_params.items() if not learns(path)})


def abstract(config: Config, structure: Structure, mesh: Mesh) -> tuple[TrainState, Frozen]:
    """Shapes of a run's state as it is saved, and its place on a mesh; nothing is allocated."""
    shapes = jax.eval_shape(functools.partial(init, config, structure), structure.params, structure.buffers,
                            structure.networks.params, structure.networks.buffers)
    return sharding.placed(mesh, shapes, rules(config))


def in_training(config: Config, structure: Structure, mesh: Mesh) -> tuple[TrainState, Frozen]:
    """As `abstract`, but frozen arrays have the types to which their modules cast them; see `flat.cast_types`."""
    state, frozen = abstract(config, structure, mesh)
    types, networks = flat.cast_types(structure.graphdef, structure.params, structure.buffers), structure.networks
    for name, graphdef in networks.graphdefs.items():
        arrays = flat.under(f"{name}/", {**networks.params, **networks.buffers})
        types |= flat.prefixed(f"{name}/", flat.cast_types(graphdef, arrays))
    return state, Frozen(*(flat.with_types(arrays, types) for arrays in frozen))


def made(config: Config, structure: Structure, mesh: Mesh, *arrays: Arrays) -> tuple[TrainState, Frozen]:
    """`init` on a mesh, every device making its own share."""
    return sharding.made(functools.partial(init, config, structure), mesh, rules(config), *arrays)


def rules(config: Config) -> sharding.Rules:
    """Along which dimensions the arrays of a tokenizer are split over the devices of a copy; see `sharding.of`."""
    sharded = QUANTIZERS[config.model.quantizer.kind].sharded
    return ((r".*(networks|discriminator)/.*", ()),  # small
            *((rf".*quantizer/{re.escape(name)}", dimensions) for name, dimensions in sharded.items()),
            *sharding.RULES)


def items(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds: the model, and what only training needs; the names are those of version 0.1."""
    fields = state._asdict()
    model = {"params": fields.pop("params"), "codebook": fields.pop("buffers"), "ema": fields.pop("ema")}
    gan_fields = state.gan._asdict()
    return {"model": model, "training": fields | {"gan": {"state": gan_fields.pop("buffers"), **gan_fields}}}


def from_items(saved: Mapping[str, Any]) -> TrainState:
    """The inverse of `items`."""
    model, training = dict(saved["model"]), dict(saved["training"])
    gan_fields = dict(training.pop("gan"))
    return TrainState(buffers=model.pop("codebook"), gan=GanState(buffers=gan_fields.pop("state"), **gan_fields),
                      **model, **training)
