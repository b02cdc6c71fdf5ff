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
Rows = TypeVar("Rows")


def count_for(images: jax.Array) -> int:
    """The least number of equal slices of `[B, ..., H, W, 3]` that leave each device at most `PIXELS`, or one row."""
    devices = placement.devices()
    rows = len(images) // devices
    if rows * devices < len(images):
        return 1  # no run's batch; it does not lie evenly on the devices in the first place
    most = max(1, PIXELS // math.prod(images.shape[1:-1]))
    return next((count for count in range(1, rows + 1) if rows % count == 0 and rows // count <= most), 1)


def in_slices(function: Callable[[Any], tuple[Means, Rows]], batch: Any, *, count: int) -> tuple[Means, Rows]:
    """`function(batch)` from what it makes of slices of the batch.

    Args:
      function: `rows -> (means over the rows, something of each row)`, two trees of arrays.
      batch: a tree of arrays `[B, ...]`.
      count: number of slices, which divides B.
    """
    if count == 1:
        return function(batch)
    means, rows = jax.lax.map(function, update.micro_batches(batch, count))
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), means), update.whole_batch(rows)
