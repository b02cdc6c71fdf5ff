"""The generator's loss, its gradient, and its training step.

    train_step(state, frozen, batch) -> (state, metrics)

A sequence is a prefix (a caption, if there are captions, and the token that begins an image) and the image's codes in
raster order. What is learned is which code comes next. Text is not: of it only codes are wanted.

The softmax is over the codes and not over the whole vocabulary: what follows the prefix is known to be a code, as it is
in sampling, and the rows of a text model, ten times as many, are spared. So does LlamaGen (arXiv 2406.06525), whose
last layer has codes only.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqrae_jax.config import GeneratorConfig
from vqrae_jax.generator.build import Structure, Vocabulary
from vqrae_jax.generator.train_state import Frozen, TrainState
from vqrae_jax.models import flat
from vqrae_jax.models.flat import Arrays
from vqrae_jax.models.lm import LanguageModel
from vqrae_jax.models.placement import split_batch
from vqrae_jax.training import optim, update
from vqrae_jax.training.task import TrainStep
from vqrae_jax.training.update import Metrics

Batch = dict[str, jax.Array]


class Predicted(NamedTuple):
    """How well every code of every image was predicted, `[B, N]` each.

    Attributes:
      nats: float32, -log of the probability that the code was given.
      rank: int32, how many codes were held to be likelier.
    """

    nats: jax.Array
    rank: jax.Array


def predict(model: LanguageModel, vocabulary: Vocabulary, batch: Batch, rng: jax.Array | None) -> Predicted:
    """Gives every code a probability, from the prefix and the codes before it.

    Args:
      model: the language model.
      vocabulary: what its tokens mean.
      batch: `codes` int32 `[B, h, w]`, `label` int32 `[B]`, -1 where it is unknown; with captions also `caption` int32
        `[B, T]`, tokens of text on the right, and `pads` int32 `[B]`, how many places on the left are none.
      rng: a key for dropout; None is without.
    """
    codes = batch["codes"].reshape(len(batch["codes"]), -1)
    inputs = jnp.concatenate([vocabulary.begin(batch["label"])[:, None], vocabulary.text + codes[:, :-1]], axis=1)
    first = jnp.zeros(len(codes), jnp.int32)
    if "caption" in batch:
        # A row begins with its caption: padding goes to the end, where no code can see it.
        first = batch["caption"].shape[1] - batch["pads"]
        inputs = jnp.concatenate([batch["caption"], inputs], axis=1)
        places = (batch["pads"][:, None] + jnp.arange(inputs.shape[1])) % inputs.shape[1]
        inputs = jnp.take_along_axis(inputs, places, axis=1)
    hidden = model.hidden(split_batch(inputs), rng=rng)
    if "caption" in batch:
        hidden = jnp.take_along_axis(hidden, (first[:, None] + jnp.arange(codes.shape[1]))[..., None], axis=1)
    logits = model.logits(hidden, vocabulary.code)
    chosen = jnp.take_along_axis(logits, codes[..., None], axis=-1)
    nats = jax.nn.logsumexp(logits, axis=-1) - chosen[..., 0]
    return Predicted(nats, jnp.sum(logits > chosen, axis=-1))


def without_prefix(config: GeneratorConfig, batch: Batch, rng: jax.Array) -> Batch:
    """A batch in which a share `prefix.drop` of the images begin as those of no class and without caption.

    So one model learns both distributions that classifier-free guidance needs (arXiv 2207.12598).
    """
    dropped = jax.random.bernoulli(rng, config.prefix.drop, batch["label"].shape)
    changed = batch | {"label": jnp.where(dropped, -1, batch["label"])}
    if "caption" in batch:
        changed["pads"] = jnp.where(dropped, batch["caption"].shape[1], batch["pads"])
    return changed


def make_train_step(config: GeneratorConfig, structure: Structure) -> TrainStep:
    """The training step of a config.

    Returns:
      `train_step(state, frozen, batch) -> (state, metrics)`, to be jitted with `state` donated. `batch` is that of
      `predict`, the global one. A step whose loss or gradient is not finite changes nothing but the counters.

      Metrics are float32 scalars, means over all codes of the batch: `loss`, what is minimised, in nats a token, and
      `bits_per_token`; `top1` and `top5`, the share of codes that were held to be the likeliest, or among the five
      likeliest; `grad_norm`; `lr`, of the fastest parameters.
    """
    optimizer = optim.from_config(config.optim, steps=config.train.steps)
    rates = optim.rates(config.optim, steps=config.train.steps)

    def gradients(params: Arrays, frozen: Frozen, batch: Batch, rng: jax.Array) -> tuple[Arrays, Metrics]:
        def loss(params: Arrays):
            model = flat.merge(structure.graphdef, params, frozen.params)
            predicted = predict(model, structure.vocabulary, batch, rng)
            return jnp.mean(predicted.nats), means(predicted)

        return jax.grad(loss, has_aux=True)(params)

    def train_step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        drop_rng, rng = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
        # Before it is split: which prefixes are dropped does not depend on the number of micro-batches.
        batch = without_prefix(config, batch, drop_rng)
        (grads, metrics), _ = update.accumulate(
            lambda micro, rng: (gradients(state.params, frozen, micro, rng), ()), batch, rng,
            count=config.train.accumulate, add=lambda first, second: ())
        finite, (norm,) = update.all_finite(metrics, grads)

        def new_state() -> TrainState:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params: Any = optax.apply_updates(state.params, updates)
            ema = optim.moving_average(state.ema, params, decay=config.optim.ema_decay,
                                       updates=optim.updates_made(state.opt_state))
            return state._replace(params=params, opt_state=opt_state, ema=ema)

        new = update.guarded(state, finite, new_state)
        lr = optim.rates_by_part(rates, grads, state.opt_state)
        return new, {**metrics, "grad_norm": norm, "lr": jnp.max(jnp.stack(list(lr.values()))),
                     "skipped_steps": new.skipped, "skipped_in_a_row": new.skipped_in_a_row}

    return train_step


def means(predicted: Predicted) -> Metrics:
    """The metrics of a batch."""
    nats = jnp.mean(predicted.nats)
    return {"loss": nats, "bits_per_token": nats / np.log(2).astype(np.float32),
            **{f"top{k}": jnp.mean(predicted.rank < k, dtype=jnp.float32) for k in (1, 5)}}
