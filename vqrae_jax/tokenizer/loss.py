"""The tokenizer's losses, their gradient, and its training step.

    train_step(state, frozen, batch) -> (state, metrics)

What learns is in `TrainState`; what does not is in `Frozen`, an argument of its own that is neither donated nor saved
with every checkpoint. Which parameters are frozen is decided by their paths (`optim.lr_multipliers`), so the two stages
are two configs and nothing here asks for the stage.

`loss_function` is the same loss outside of training, for a notebook.

All losses are one table, `{name: (weight, value)}`: gradient and report both follow from it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vqrae_jax import config as config_lib
from vqrae_jax.config import Config
from vqrae_jax.metrics.codes import code_usage, perplexity
from vqrae_jax.models import flat
from vqrae_jax.models.encoders import Encoder
from vqrae_jax.models.flat import Arrays
from vqrae_jax.models.losses import IMAGE_LOSSES, l2
from vqrae_jax.models.perceptual import ENCODER, token_distance
from vqrae_jax.models.placement import split_batch
from vqrae_jax.models.quantizers import with_gradient_of
from vqrae_jax.models.vqrae import VQRAE, Output
from vqrae_jax.tokenizer import build, init, slices
from vqrae_jax.tokenizer.build import Structure, perceptual_shares
from vqrae_jax.tokenizer.gan import Gan
from vqrae_jax.tokenizer.train_state import Frozen, TrainState
from vqrae_jax.training import optim, sharding, update
from vqrae_jax.training.task import TrainStep
from vqrae_jax.training.update import Losses, Metrics

# `(fakes, other_cotangent, decoder=, hidden=)`: `Gan.weighted_loss` with everything else given.
Generator = Callable[..., tuple[tuple[jax.Array, jax.Array], jax.Array, Metrics]]


def image_losses(config: Config, structure: Structure, networks: Arrays, images: jax.Array, reconstruction: jax.Array,
                 *, encoder: Encoder, features: jax.Array) -> tuple[Losses, Metrics]:
    """Losses of the reconstruction's pixels, and further metrics.

    Args:
      config: of the run.
      structure: its model's.
      networks: frozen arrays of the losses' networks.
      images: `[B, H, W, 3]` float32 in [0, 1].
      reconstruction: likewise, but not clipped.
      encoder: the run's encoder as it began.
      features: what it makes of the images, `[B, N, d]` float32.
    """
    losses: Losses = {name: (row.weight(config.loss), row.value(config.loss, reconstruction, images))
                      for name, row in IMAGE_LOSSES.items()}
    shares, distances = perceptual_shares(config), {}
    for name in shares:
        if name == ENCODER:
            network, distance, target = encoder, token_distance, features
        else:
            network = flat.merge(structure.networks.graphdefs[name], flat.under(f"{name}/", networks))
            distance, target = network.distance, jax.lax.stop_gradient(network(images))
        see = jax.checkpoint(network) if config.loss.perceptual.remat else network
        distances[name] = jnp.mean(distance(see(reconstruction), target))
    if shares:
        losses["perceptual"] = (config.loss.perceptual_weight,
                                jnp.sum(jnp.stack([shares[name] * distances[name] for name in shares])))
    return losses, {f"loss/{name}": distance for name, distance in distances.items()}


def latent_losses(config: Config, model: VQRAE, output: Output, features: jax.Array) -> Losses:
    """Losses of codes and features; `features` are those of the encoder as it began, `[B, N, d]` float32."""
    losses: Losses = {name: (config.loss.vq_weight * model.quantizer.loss_weights[name], value)
                      for name, value in output.quantized.losses.items()}
    if config.loss.distill_weight:
        # ||Z_I - T(X)||^2 (VQRAE, arXiv 2511.23386, section 3.3).
        losses["distill"] = (config.loss.distill_weight, l2(output.features, features))
    return losses


def model_loss(config: Config, structure: Structure, model: VQRAE, teacher: Encoder | None, networks: Arrays,
               images: jax.Array, *, noise_rng: jax.Array | None, generator: Generator | None):
    """The model's whole loss, a scalar; metrics, statistics of the codes, and the reconstruction.

    Losses of the reconstruction are differentiated with respect to its pixels; what is pulled back through the decoder
    is the sum of these cotangents. So the adaptive GAN weight, which needs the gradients of two losses at the decoder's
    last layer, costs no second pass through it.

    Args:
      config: of the run.
      structure: its model's.
      model: what learns.
      teacher: the encoder as it began; None where the model's own is frozen, or no loss needs it.
      networks: frozen arrays of the losses' networks.
      images: `[B, H, W, 3]` float32 in [0, 1].
      noise_rng: a key for the noise on features; None where there is none.
      generator: what the decoder gains from the discriminator; None before that learns.
    """
    output = model(images, train=True, rng=noise_rng)
    fakes = jax.lax.stop_gradient(output.images)
    encoder = jax.lax.stop_gradient(teacher or model.encoder)
    features = jax.lax.stop_gradient(teacher(images) if teacher else output.features)

    def of_pixels(fakes: jax.Array, images: jax.Array, features: jax.Array):
        losses, metrics = image_losses(config, structure, networks, images, fakes, encoder=encoder, features=features)
        return update.total(losses), (losses, metrics)

    def of_slice(rows: tuple[jax.Array, jax.Array, jax.Array]):
        cotangent, means = jax.grad(of_pixels, has_aux=True)(*rows)
        return means, cotangent

    count = slices.count_for(images)
    (losses, metrics), cotangent = slices.in_slices(of_slice, (fakes, images, features), count=count)
    cotangent = cotangent.reshape(fakes.shape) / count
    if generator:
        losses["gan"], gan_cotangent, gan_metrics = generator(fakes, cotangent, decoder=model.decoder,
                                                              hidden=output.hidden)
        cotangent, metrics = cotangent + losses["gan"][0] * gan_cotangent, metrics | gan_metrics
    of_latents = latent_losses(config, model, output, features)
    surrogate = update.total(of_latents) + jnp.sum(jax.lax.stop_gradient(cotangent) * output.images)

    losses |= of_latents
    total = update.total(losses)
    metrics |= {**update.reported(losses), "loss/total": total}
    return with_gradient_of(total, surrogate), (jax.lax.stop_gradient(metrics), output.quantized.stats, fakes)


def loss_function(config: Config) -> Callable[..., tuple[jax.Array, Metrics]]:
    """The whole loss that a run of this config optimises, `loss(model, images, rng=None) -> (value, metrics)`.

    `nnx.value_and_grad(loss, has_aux=True)(model, images)` differentiates it. As a function of parameters it is
    `lambda params: loss(nnx.merge(graphdef, params, rest), images)`, with `graphdef, params, rest = nnx.split(model,
    nnx.Param, ...)`.

    `model` is from `create(config)`, or any VQRAE of that shape; `images` are `[B, H, W, 3]`, float32 in [0, 1] or
    uint8; `rng` is a key, needed where `model.noise_tau` is not 0. `metrics` are those of `make_train_step` that start
    with `loss/`, `weight/` and `weighted/`. All parameters get a gradient, also those that `optim.lr_multipliers`
    freezes.

    Two things of a run are not here: the discriminator's part, which belongs to a state of training (the loss is that
    before `gan.discriminator_start_step`), and the moving codes of an EMA VQ, which follow no gradient. The teacher of
    distillation and of `loss.perceptual.encoder` is the encoder of `create(config)`: that of the run, unless
    `init_from` brings another. Where the config freezes the encoder, the latter takes the model's own.

    Raises:
      OSError, ValueError: weights of the encoder or of the perceptual loss that cannot be read.
    """
    config = dataclasses.replace(config, gan=config_lib.Gan())
    structure, mesh = build.structure(config), sharding.one_device()
    params, buffers = init.network_arrays(config, mesh)
    networks = sharding.off_mesh({**params, **buffers})
    teacher = init.create(config).encoder if build.has_teacher(config, structure.params) else None

    def loss(model: VQRAE, images: jax.Array, rng: jax.Array | None = None) -> tuple[jax.Array, Metrics]:
        images = jnp.asarray(images)
        images = images.astype(jnp.float32) / (255 if images.dtype == jnp.uint8 else 1)
        value, (metrics, _, _) = model_loss(config, structure, model, teacher, networks, images, noise_rng=rng,
                                            generator=None)
        return value, metrics

    return loss


def phase_of(config: Config, step: int) -> str:
    """The phase of the `step`-th step, counted from 1: "gan" once the discriminator learns, "" before."""
    return "gan" if config.gan.discriminator != "none" and step > config.gan.discriminator_start_step else ""


def make_train_step(config: Config, structure: Structure, phase: str) -> TrainStep:
    """The training step of a config.

    Args:
      config: of the run.
      structure: its model's.
      phase: from `phase_of`. Without "gan" the step holds nothing of the discriminator.

    Returns:
      `train_step(state, frozen, batch) -> (state, metrics)`, to be jitted with `state` donated. `batch["image"]` is
      uint8 `[B, H, W, 3]`, the global batch. A step whose loss or gradient is not finite changes nothing but the
      counters.

      Metrics are float32 scalars: `loss/x` the raw losses, `weight/x` their weights, `weighted/x` the products, whose
      sum is `loss/total` (without `discriminator` and `lecam`, which are the discriminator's own), all of them means
      over micro-batches; `grad_norm`, also by part; `lr/part`; usage and perplexity of codes, in the batch and since
      the last multiple of `train.log_every` steps; and the discriminator's under `gan/`.
    """
    optimizer = optim.from_config(config.optim, steps=config.train.steps)
    rates = optim.rates(config.optim, steps=config.train.steps)
    gan = Gan(config, structure)

    def train_step(state: TrainState, frozen: Frozen, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        rng, restart_rng = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
        quantizer = lambda params: flat.merge(structure.graphdef, params, frozen.params, state.buffers).quantizer
        (grads, gan_grads, scalars), stats = update.accumulate(
            lambda images, rng: gradients(config, structure, state, frozen, images, rng=rng, phase=phase),
            batch["image"], rng, count=config.train.accumulate, add=quantizer(state.params).add_stats)
        finite, (norm, _) = update.all_finite(scalars, grads, gan_grads)

        def new_state() -> TrainState:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params: Any = optax.apply_updates(state.params, updates)
            moved = quantizer(params).next_buffers(stats, rng=restart_rng)
            buffers = state.buffers | flat.prefixed("quantizer/", moved)
            ema = optim.moving_average(state.ema, {**params, **buffers}, decay=config.optim.ema_decay,
                                       updates=optim.updates_made(state.opt_state))
            new_gan = gan.updated(state.gan, frozen.networks, gan_grads, scalars) if phase == "gan" else state.gan
            return state._replace(params=params, buffers=buffers, opt_state=opt_state, ema=ema, gan=new_gan)

        counts = jnp.where(state.step % config.train.log_every == 0, 0, state.code_counts) + stats["counts"]
        new = update.guarded(state, finite, new_state)._replace(code_counts=counts)
        lr = optim.rates_by_part(rates, grads, state.opt_state)
        if phase == "gan":
            lr |= optim.rates_by_part(lambda path: gan.schedule(), gan_grads, state.gan.opt_state)
        return new, {
            **scalars,
            "code_usage_batch": code_usage(stats["counts"]),
            "code_perplexity_batch": perplexity(stats["counts"]),
            "code_usage_window": code_usage(counts),
            "code_perplexity_window": perplexity(counts),
            "grad_norm": norm,
            **{f"grad_norm/{part}": norm for part, norm in update.norms_by_part(grads | gan_grads).items()},
            **{f"lr/{part}": rate for part, rate in lr.items()},
            "skipped_steps": new.skipped,
            "skipped_in_a_row": new.skipped_in_a_row,
        }

    return train_step


def gradients(config: Config, structure: Structure, state: TrainState, frozen: Frozen, images: jax.Array, *,
              rng: jax.Array, phase: str):
    """Of one micro-batch: gradients of the model and of the discriminator, and metrics; and the codes' statistics."""
    images = split_batch(images).astype(jnp.float32) / 255
    noise_rng, generator_rng, real_rng, fake_rng = jax.random.split(rng, 4)
    generator = functools.partial(Gan(config, structure).weighted_loss, state.gan, frozen.networks, step=state.step,
                                  rng=generator_rng) if phase == "gan" else None

    def loss(params: Arrays):
        arrays = (params, frozen.params, state.buffers)
        model = flat.merge(structure.graphdef, *arrays)
        teacher = flat.merge(structure.graphdef, *arrays, frozen.teacher).encoder if frozen.teacher else None
        return model_loss(config, structure, model, teacher, frozen.networks, images, noise_rng=noise_rng,
                          generator=generator)

    grads, (metrics, stats, fakes) = jax.grad(loss, has_aux=True)(state.params)
    if phase != "gan":
        return (grads, {}, metrics), stats
    gan_grads, gan_metrics = Gan(config, structure).gradients(
        state.gan, frozen.networks, images, fakes, rngs=(real_rng, fake_rng))
    return (grads, gan_grads, metrics | gan_metrics), stats
