"""The tokenizer's losses, their gradient, and its training step.

    train_step(state, frozen, batch) -> (state, metrics)

What learns is in `TrainState`; what does not is in `Frozen`, an argument of its own that is neither donated nor saved
with every checkpoint. Which parameters are frozen is decided by their paths (`optim.lr_multipliers`), so the two stages
are two configs and nothing here asks for the stage.

All losses are one table, `{name: (weight, value)}`: gradient and report both follow from it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from vqrae_jax.config import Config
from vqrae_jax.metrics.codes import code_usage, perplexity
from vqrae_jax.models import flat
from vqrae_jax.models.flat import Arrays
from vqrae_jax.models.losses import IMAGE_LOSSES, l2
from vqrae_jax.models.placement import split_batch
from vqrae_jax.models.vqrae import VQRAE, Output
from vqrae_jax.tokenizer.build import Structure, perceptual_shares
from vqrae_jax.tokenizer.gan import Gan
from vqrae_jax.tokenizer.train_state import Frozen, TrainState
from vqrae_jax.training import optim, update
from vqrae_jax.training.task import TrainStep
from vqrae_jax.training.update import Losses, Metrics


def image_losses(config: Config, structure: Structure, frozen: Frozen, images: jax.Array,
                 reconstruction: jax.Array) -> tuple[Losses, Metrics]:
    """Losses of the reconstruction's pixels, and further metrics; images are `[B, H, W, 3]` float32."""
    losses: Losses = {name: (row.weight(config.loss), row.value(config.loss, reconstruction, images))
                      for name, row in IMAGE_LOSSES.items()}
    shares, distances = perceptual_shares(config), {}
    for name in shares:
        network = flat.merge(structure.networks.graphdefs[name], flat.under(f"{name}/", frozen.networks))
        features = jax.checkpoint(network) if config.loss.perceptual.remat else network
        distances[name] = jnp.mean(network.distance(features(reconstruction), jax.lax.stop_gradient(network(images))))
    if shares:
        losses["perceptual"] = (config.loss.perceptual_weight,
                                jnp.sum(jnp.stack([shares[name] * distances[name] for name in shares])))
    return losses, {f"loss/{name}": distance for name, distance in distances.items()}


def latent_losses(config: Config, model: VQRAE, output: Output, teacher: VQRAE | None, images: jax.Array) -> Losses:
    """Losses of codes and features."""
    losses: Losses = {name: (config.loss.vq_weight * model.quantizer.loss_weights[name], value)
                      for name, value in output.quantized.losses.items()}
    if teacher:
        # ||Z_I - T(X)||^2 (VQRAE, arXiv 2511.23386, section 3.3).
        losses["distill"] = (config.loss.distill_weight,
                             l2(output.features, jax.lax.stop_gradient(teacher.features(images))))
    return losses


def model_loss(config: Config, structure: Structure, params: Arrays, state: TrainState, frozen: Frozen,
               images: jax.Array, *, phase: str, noise_rng: jax.Array, augment_rng: jax.Array):
    """A scalar with the gradient of the model's whole loss; metrics, statistics of the codes, and the reconstruction.

    Losses of the reconstruction are differentiated with respect to its pixels; what is pulled back through the decoder
    is the sum of these cotangents. So the adaptive GAN weight, which needs the gradients of two losses at the decoder's
    last layer, costs no second pass through it.
    """
    model = flat.merge(structure.graphdef, params, frozen.params, state.buffers)
    teacher = flat.merge(structure.graphdef, params, frozen.params, state.buffers,
                         frozen.teacher) if config.loss.distill_weight else None
    output = model(images, train=True, rng=noise_rng)
    fakes = jax.lax.stop_gradient(output.images)

    def of_pixels(fakes: jax.Array):
        losses, metrics = image_losses(config, structure, frozen, images, fakes)
        return update.total(losses), (losses, metrics)

    cotangent, (losses, metrics) = jax.grad(of_pixels, has_aux=True)(fakes)
    if phase == "gan":
        losses["gan"], gan_cotangent, gan_metrics = Gan(config, structure).weighted_loss(
            state.gan, frozen.networks, fakes, cotangent, decoder=model.decoder, hidden=output.hidden, step=state.step,
            rng=augment_rng)
        cotangent, metrics = cotangent + losses["gan"][0] * gan_cotangent, metrics | gan_metrics
    of_latents = latent_losses(config, model, output, teacher, images)
    surrogate = update.total(of_latents) + jnp.sum(jax.lax.stop_gradient(cotangent) * output.images)

    losses |= of_latents
    metrics |= {**update.reported(losses), "loss/total": update.total(losses)}
    return surrogate, (jax.lax.stop_gradient(metrics), output.quantized.stats, fakes)


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
    loss = lambda params: model_loss(config, structure, params, state, frozen, images, phase=phase,
                                     noise_rng=noise_rng, augment_rng=generator_rng)
    grads, (metrics, stats, fakes) = jax.grad(loss, has_aux=True)(state.params)
    if phase != "gan":
        return (grads, {}, metrics), stats
    gan_loss = lambda params: Gan(config, structure).discriminator_loss(
        params, state.gan, frozen.networks, images, fakes, rngs=(real_rng, fake_rng))
    gan_grads, gan_metrics = jax.grad(gan_loss, has_aux=True)(state.gan.params)
    return (grads, gan_grads, metrics | gan_metrics), stats
