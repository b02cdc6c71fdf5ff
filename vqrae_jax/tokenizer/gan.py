"""Adversarial training: a discriminator that learns beside the model, and what the decoder gains from it."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vqrae_jax.config import Config
from vqrae_jax.models import flat
from vqrae_jax.models.decoder import Decoder
from vqrae_jax.models.discriminators import DISCRIMINATORS, diff_augment, random_crop, round_to_8_bits
from vqrae_jax.models.flat import Arrays
from vqrae_jax.models.losses import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, lecam
from vqrae_jax.models.placement import split_batch
from vqrae_jax.tokenizer import slices
from vqrae_jax.tokenizer.build import Structure
from vqrae_jax.training import optim, update
from vqrae_jax.training.update import Losses, Metrics

BACKBONE = "discriminator/backbone/"


class GanState(NamedTuple):
    """What of the discriminator changes; empty without one.

    Attributes:
      params: its learned parameters, under `discriminator/`.
      buffers: the vectors of its spectral normalisation, likewise.
      opt_state: of its optimizer.
      mean_logits: [2], moving averages of its mean logits of real and of fake images.
    """

    params: Arrays
    buffers: Arrays
    opt_state: optax.OptState
    mean_logits: jax.Array


def learns(path: str) -> bool:
    """Whether a path among those of the losses' networks is the discriminator's to learn."""
    return path.startswith("discriminator/") and not path.startswith(BACKBONE)


@dataclasses.dataclass(frozen=True)
class Gan:
    """The discriminator of a config.

    Attributes:
      config: of the run.
      structure: of its model and networks.
    """

    config: Config
    structure: Structure

    def init(self, params: Arrays, buffers: Arrays) -> GanState:
        """The state at the start, from all parameters and buffers of the losses' networks."""
        learned = {path: value for path, value in params.items() if learns(path)}
        return GanState(params=learned, buffers={path: value for path, value in buffers.items()
                                                 if flat.part(path) == "discriminator"},
                        opt_state=self.optimizer().init(learned) if learned else (),
                        mean_logits=jnp.zeros(2, jnp.float32))

    def schedule(self) -> optax.Schedule:
        """The discriminator's learning rate, over the steps in which it learns."""
        gan = self.config.gan
        return optim.warmup_cosine(lr=gan.lr, end_lr=gan.end_lr, warmup_steps=gan.warmup_steps,
                                   steps=self.config.train.steps - gan.discriminator_start_step)

    def optimizer(self) -> optax.GradientTransformation:
        """The discriminator's optimizer."""
        gan, schedule = self.config.gan, self.schedule()
        return optim.adamw(lambda path: schedule, b1=gan.b1, b2=gan.b2, weight_decay=gan.weight_decay,
                           clip_norm=gan.clip_norm)

    def augmented(self, images: jax.Array, rng: jax.Array) -> jax.Array:
        """What the discriminator sees of images, real or fake: random crops and DiffAug, as the config wants."""
        gan = self.config.gan
        crop_rng, augment_rng = jax.random.split(rng)
        if backbone := DISCRIMINATORS[gan.discriminator].backbone:
            images = random_crop(images, backbone.image_size, crop_rng)
        return diff_augment(images, augment_rng, cutout=gan.cutout) if gan.augment else images

    def ramp(self, step: jax.Array) -> jax.Array:
        """The share of the weight at a step: 0 before `gan.start_step`, then rising to 1 over `gan.ramp_steps`."""
        since = step - self.config.gan.start_step
        return jnp.where(since < 0, 0.0, jnp.clip((since + 1) / (self.config.gan.ramp_steps + 1), 0.0, 1.0))

    def generator_loss(self, state: GanState, networks: Arrays, fakes: jax.Array, *,
                       rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the decoder gains from being taken for real, and its gradient with respect to the reconstructions."""
        discriminator = self._discriminator(state.params, state, networks)
        loss = jax.value_and_grad(lambda seen: GENERATOR_LOSSES[self.config.gan.generator_loss](discriminator(seen)))
        seen, pull_back = jax.vjp(lambda fakes: self.augmented(fakes, rng), fakes)
        count = slices.count_for(seen)
        value, cotangent = slices.in_slices(loss, seen, count=count)
        return value, pull_back(cotangent.reshape(seen.shape) / count)[0]

    def weighted_loss(self, state: GanState, networks: Arrays, fakes: jax.Array, other_cotangent: jax.Array, *,
                      decoder: Decoder, hidden: jax.Array, step: jax.Array,
                      rng: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array, Metrics]:
        """The generator's weight and loss, the loss's gradient with respect to the reconstructions, and metrics.

        Args:
          state: of the discriminator.
          networks: frozen arrays of the losses' networks.
          fakes: reconstructions `[B, H, W, 3]`, as constants.
          other_cotangent: the gradient of all other losses with respect to them, for the adaptive weight.
          decoder: the decoder that made them.
          hidden: the tokens that its last layer made them of.
          step: batches seen before this one.
          rng: a key.
        """
        ramp = self.ramp(step)

        def loss(fakes: jax.Array) -> tuple[jax.Array, jax.Array]:
            value, cotangent = self.generator_loss(state, networks, fakes, rng=rng)
            return value, slices.flat(cotangent)

        # While only the discriminator learns, the decoder's pass through it is left out.
        value, cotangent = jax.lax.cond(
            ramp > 0, loss, lambda fakes: (jnp.zeros(()), jnp.zeros_like(slices.flat(fakes))), fakes)
        cotangent = cotangent.reshape(fakes.shape)
        weight, metrics = self.config.gan.weight * ramp, {}
        if self.config.gan.adaptive:
            adaptive = adaptive_weight(decoder, hidden, other_cotangent, cotangent,
                                       largest=self.config.gan.max_adaptive_weight)
            weight, metrics["gan/adaptive_weight"] = weight * adaptive, adaptive
        return (weight, value), cotangent, metrics

    def gradients(self, state: GanState, networks: Arrays, images: jax.Array, fakes: jax.Array, *,
                  rngs: tuple[jax.Array, jax.Array]) -> tuple[Arrays, Metrics]:
        """Of the discriminator's loss on real images and on reconstructions, rounded to 8 bits like real ones; metrics.

        Args:
          state: of the discriminator.
          networks: frozen arrays of the losses' networks.
          images: `[B, H, W, 3]` float32 in [0, 1].
          fakes: likewise.
          rngs: a key for either.
        """
        # One pass, a real image beside each reconstruction: every image is normalised by itself.
        both = jnp.stack([self.augmented(images, rngs[0]), self.augmented(round_to_8_bits(fakes), rngs[1])], axis=1)
        loss = functools.partial(self._discriminator_loss, state=state, networks=networks)
        # LeCam's is no mean over images, but a function of the whole batch's mean logits.
        count = 1 if self.config.gan.lecam_weight else slices.count_for(both)
        of_slice = lambda both: (jax.grad(loss, has_aux=True)(state.params, both), jnp.zeros(len(both)))
        return slices.in_slices(of_slice, both, count=count)[0]

    def _discriminator_loss(self, params: Arrays, both: jax.Array, *, state: GanState,
                            networks: Arrays) -> tuple[jax.Array, Metrics]:
        """The loss on pairs `[B, 2, H, W, 3]` of a real image and a reconstruction, and metrics."""
        gan = self.config.gan
        logits = self._discriminator(params, state, networks)(split_batch(both.reshape(-1, *both.shape[2:])))
        real, fake = jnp.moveaxis(logits.reshape(len(both), 2, *logits.shape[1:]), 1, 0)
        losses: Losses = {"discriminator": (1.0, DISCRIMINATOR_LOSSES[gan.discriminator_loss](real, fake))}
        if gan.lecam_weight:
            losses["lecam"] = (gan.lecam_weight, lecam(jnp.mean(real), jnp.mean(fake), *state.mean_logits))
        return update.total(losses), update.reported(losses) | {
            "gan/logits_real": jnp.mean(real), "gan/logits_fake": jnp.mean(fake)}

    def updated(self, state: GanState, networks: Arrays, gradients: Arrays, metrics: Metrics) -> GanState:
        """The discriminator's state after a step with these gradients and metrics of `gradients`."""
        updates, opt_state = self.optimizer().update(gradients, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        discriminator = self._discriminator(params, state, networks)
        mean_logits = jnp.stack([metrics["gan/logits_real"], metrics["gan/logits_fake"]])
        decay = self.config.gan.lecam_decay
        return GanState(params=params,
                        buffers=state.buffers | flat.prefixed("discriminator/", discriminator.next_buffers()),
                        opt_state=opt_state,
                        mean_logits=decay * state.mean_logits + (1 - decay) * mean_logits)

    def _discriminator(self, params: Arrays, state: GanState, networks: Arrays) -> Any:
        arrays = flat.under("discriminator/", {**networks, **params, **state.buffers})
        return flat.merge(self.structure.networks.graphdefs["discriminator"], arrays)


def adaptive_weight(decoder: Decoder, hidden: jax.Array, other_cotangent: jax.Array, gan_cotangent: jax.Array, *,
                    largest: float) -> jax.Array:
    """|d other losses / d w| / (|d generator's loss / d w| + 1e-6) in [0, largest], w the decoder's last matrix.

    VQGAN, arXiv 2012.09841, equation 7. It costs two small matmuls and no pass through the decoder.

    Args:
      decoder: whose `to_images` is that layer.
      hidden: the tokens that this layer saw.
      other_cotangent: gradient of the other losses with respect to the pixels.
      gan_cotangent: that of the generator's loss.
      largest: the clamp.
    """
    graphdef, arrays, _ = flat.split(decoder)
    last_layer = lambda kernel: flat.merge(graphdef, arrays, {"pixels/kernel": kernel}).to_images(hidden)
    _, pull_back = jax.vjp(last_layer, arrays["pixels/kernel"])
    norms = [jnp.linalg.norm(pull_back(cotangent)[0]) for cotangent in (other_cotangent, gan_cotangent)]
    return jnp.clip(norms[0] / (norms[1] + 1e-6), 0.0, largest)
