"""Losses: arrays in, float32 scalars out; and tables of them. A new one is a function and a row."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


def l1(x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean absolute difference over all elements, in float32."""
    return jnp.mean(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)))


def l2(x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean squared difference over all elements, in float32.

    The pixel loss, and, between continuous features of student and frozen teacher, the distillation loss
    ||Z_I - T(X)||^2 (VQRAE, arXiv 2511.23386, section 3.3).
    """
    return jnp.mean(jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32)))


def hinge_discriminator(real: jax.Array, fake: jax.Array) -> jax.Array:
    """(mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2 over logits of any shape (VQGAN, arXiv 2012.09841)."""
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def vanilla_discriminator(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Half the binary cross-entropy of telling real from fake logits (Goodfellow et al. 2014, equation 1)."""
    return 0.5 * (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake)))


def linear_generator(fake: jax.Array) -> jax.Array:
    """-mean logits of the fakes, what VQGAN pairs with either discriminator loss."""
    return -jnp.mean(fake)


def non_saturating_generator(fake: jax.Array) -> jax.Array:
    """-mean log sigmoid of the fakes' logits (Goodfellow et al. 2014, section 3)."""
    return jnp.mean(jax.nn.softplus(-fake))


def lecam(real: jax.Array, fake: jax.Array, average_real: jax.Array, average_fake: jax.Array) -> jax.Array:
    """max(0, real - average_fake)^2 + max(0, average_real - fake)^2 over mean logits and their moving averages.

    TiTok's form of the regularisation of Tseng et al. 2021 (arXiv 2104.03310).
    """
    return jnp.square(jax.nn.relu(real - average_fake)) + jnp.square(jax.nn.relu(average_real - fake))


# By the values of the config keys loss.pixel, gan.discriminator_loss and gan.generator_loss.
PIXEL_LOSSES = {"l1": l1, "l2": l2}
DISCRIMINATOR_LOSSES = {"hinge": hinge_discriminator, "vanilla": vanilla_discriminator}
GENERATOR_LOSSES = {"linear": linear_generator, "non_saturating": non_saturating_generator}


class ImageLoss(NamedTuple):
    """A row of the table of losses of a reconstruction's pixels.

    Attributes:
      weight: what it counts, from the config's section `loss`.
      value: `(loss, reconstructions, images) -> scalar`, `loss` being that section and images `[B, H, W, 3]` float32.
    """

    weight: Callable[[Any], float]
    value: Callable[[Any, jax.Array, jax.Array], jax.Array]


# By the name under which it is reported.
IMAGE_LOSSES = {
    "pixel": ImageLoss(weight=lambda loss: loss.pixel_weight,
                       value=lambda loss, reconstructions, images: PIXEL_LOSSES[loss.pixel](reconstructions, images)),
}
