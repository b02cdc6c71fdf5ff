"""What keeps the networks of the image losses from filling the memory: they see a few images at a time.

A transformer's activations are small beside those of a network that keeps a hundred channels for every pixel. Such
networks see each image by itself, and the losses are means over images; so a batch goes through them in slices, one
after the other, each with its backward pass, and nothing is computed twice.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from vqrae_jax.models import placement
from vqrae_jax.training import update

PIXELS = 2**20  # of a slice on each device: 16 images of 256 x 256, enough to keep any chip busy

Means = TypeVar("Means")


def count_for(images: jax.Array) -> int:
    """The least number of equal slices of `[B, ..., H, W, 3]` that leave each device at most `PIXELS`, or one row."""
    devices = placement.devices()
    rows = len(images) // devices
    if rows * devices < len(images):
        return 1  # no run's batch; it does not lie evenly on the devices in the first place
    most = max(1, PIXELS // math.prod(images.shape[1:-1]))
    return next((count for count in range(1, rows + 1) if rows % count == 0 and rows // count <= most), 1)


def in_slices(function: Callable[[Any], tuple[Means, jax.Array]], batch: Any, *,
              count: int) -> tuple[Means, jax.Array]:
    """`function(batch)` from what it makes of slices of the batch.

    Args:
      function: `rows -> (means over the rows, an array of an entry for each row)`.
      batch: a tree of arrays `[B, ...]`.
      count: number of slices, which divides B.

    Returns:
      A tree of means, and the rows of the whole batch, `flat`.
    """

    def of_slice(rows: Any) -> tuple[Means, jax.Array]:
        means, made = function(jax.tree.map(lambda x, like: x.reshape(-1, *like.shape[1:]), rows, batch))
        return means, flat(made)

    if count == 1:
        return of_slice(batch)
    means, rows = jax.lax.map(of_slice, update.micro_batches(jax.tree.map(flat, batch), count))
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), means), update.whole_batch(rows)


def flat(rows: jax.Array) -> jax.Array:
    """`[B, ...] -> [B, n]`, for what goes into a loop or a branch and comes out of it.

    There a TPU takes an array as it is written, and pads the last dimension to a multiple of 128: images with their
    three colours would be 43 times as large.
    """
    return rows.reshape(len(rows), -1)
