"""How well a generator predicts codes: of images that it trained on and of others, and against histograms of codes.

The loss at a position says how much of an image is decided there: it falls with what is known already (the "entropy
cliff": the first codes cost most), which is why all positions are kept apart. What a model has learned is what it is
better than two rulers by, which look at no other code: how often each occurs, and how often it occurs at its position.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vqrae_jax.generator.build import Structure
from vqrae_jax.generator.loss import predict
from vqrae_jax.metrics import accumulate
from vqrae_jax.metrics import codes as code_metrics
from vqrae_jax.models import flat
from vqrae_jax.models.flat import Arrays
from vqrae_jax.training import sharding, signals

Batches = Iterable[dict[str, np.ndarray]]
LIKELIEST = (1, 5)


class Positions(NamedTuple):
    """Means over images at every position, `[N]` float64 each.

    Attributes:
      nats: -log of the probability of the code.
      top: by k, the share of images whose code was among the k likeliest.
      images: how many they are.
    """

    nats: np.ndarray
    top: Mapping[int, np.ndarray]
    images: int


class Evaluator:
    """Evaluates parameters of one model; compiles once.

    Args:
      structure: of the model.
      mesh: the devices, which take a share of every batch.
    """

    def __init__(self, structure: Structure, mesh: Mesh):
        self._structure, self._mesh = structure, mesh
        self._tokens = structure.codes.grid**2
        everywhere = sharding.replicated(mesh)
        jit = functools.partial(jax.jit, donate_argnums=0, out_shardings=everywhere)
        self._everywhere = lambda make: jax.jit(make, out_shardings=everywhere)()
        self._predicted = jit(sharding.on(mesh, functools.partial(_predicted, structure)))
        self._counted = jit(sharding.on(mesh, _counted))

    def __call__(self, params: Arrays, batches: Batches) -> Positions:
        """The means over the valid rows of batches, which all processes share.

        Args:
          params: all of the model.
          batches: those of `loss.predict`, with `valid` `[B]`.
        """
        positions = jax.ShapeDtypeStruct((self._tokens,), jnp.float32)
        sums = self._everywhere(lambda: accumulate.init({
            "nats": positions, "images": jax.ShapeDtypeStruct((), jnp.float32),
            "top": dict.fromkeys(LIKELIEST, positions)}))
        for batch in self._placed(batches):
            sums = self._predicted(sums, params, batch)
        total = accumulate.total(_on_host(sums))
        images = int(total["images"])
        return Positions(total["nats"] / images, {k: right / images for k, right in total["top"].items()}, images)

    def counts(self, batches: Batches) -> np.ndarray:
        """How often each code stands at each position of valid rows; see `metrics.codes.counts`."""
        sums = self._everywhere(lambda: code_metrics.init(self._tokens, self._structure.codes.size))
        for batch in self._placed(batches):
            sums = self._counted(sums, batch)
        return code_metrics.counts(_on_host(sums))

    def _placed(self, batches: Batches) -> Iterable[dict[str, jax.Array]]:
        for batch in batches:
            signals.stop_if_preempted()
            yield sharding.put_batch(self._mesh, batch)


def _on_host(sums: accumulate.Sums) -> accumulate.Sums:
    return jax.tree.map(lambda array: np.asarray(array.addressable_data(0)), sums)


def _predicted(structure: Structure, sums: accumulate.Sums, params: Arrays,
               batch: dict[str, jax.Array]) -> accumulate.Sums:
    predicted = predict(flat.merge(structure.graphdef, params), structure.vocabulary, batch, rng=None)
    over_images = lambda values: jnp.sum(jnp.where(batch["valid"][:, None], values, 0), axis=0)
    return accumulate.add(sums, {
        "nats": over_images(predicted.nats), "images": jnp.sum(batch["valid"]),
        "top": {k: over_images(predicted.rank < k) for k in LIKELIEST}})


def _counted(sums: accumulate.Sums, batch: dict[str, jax.Array]) -> accumulate.Sums:
    return code_metrics.update(sums, batch["codes"].reshape(len(batch["codes"]), -1), batch["valid"])


def rulers(training: np.ndarray, validation: np.ndarray) -> dict[str, float]:
    """Nats a token of histograms of training codes on validation codes.

    `nats_unigram` is that of one histogram, in which each of the K codes counts once more than it was seen (Laplace);
    `nats_by_position` that of one at each position, to which the first is added with a weight of K uses (a Dirichlet
    prior). Where positions were not counted apart there is only the first.

    Args:
      training: uses of codes, `[N, K]`, or `[1, K]` of all positions together.
      validation: likewise.
    """
    size = training.shape[1]
    unigram = (training.sum(0) + 1) / (training.sum() + size)
    cross_entropy = lambda shares: float(-np.sum(validation * np.log(shares)) / validation.sum())
    found = {"nats_unigram": cross_entropy(unigram)}
    if len(training) > 1:
        found["nats_by_position"] = cross_entropy(
            (training + size * unigram) / (training.sum(1, keepdims=True) + size))
    return found


def metrics(held_out: Positions, trained_on: Positions, rulers: Mapping[str, float], *,
            pixels: int) -> dict[str, float]:
    """The metrics of an evaluation.

    `nats` (a token), `bits_per_token`, `bits_per_pixel`, `top1`, `top5`, and nats by quarter of the image are those of
    held-out images, `num_images` of them; `train_nats`, `train_top1` and `train_top5` those of images that were trained
    on: what these are better by was learned by heart.

    Args:
      held_out: of images that were not trained on.
      trained_on: of images that were.
      rulers: see there.
      pixels: of an image.
    """
    nats, tokens = float(held_out.nats.mean()), len(held_out.nats)
    quarters = np.array_split(held_out.nats, 4)
    mean = lambda found: {"nats": float(found.nats.mean()), **{
        f"top{k}": float(right.mean()) for k, right in found.top.items()}}
    bits = nats / math.log(2)
    return {**mean(held_out), "bits_per_token": bits, "bits_per_pixel": bits * tokens / pixels,
            **{f"nats_quarter{number}": float(quarter.mean()) for number, quarter in enumerate(quarters, 1)},
            **{f"train_{name}": value for name, value in mean(trained_on).items()}, **rulers,
            "num_images": held_out.images}


def picture(found: Mapping[str, Positions], *, grid: int, size: int, most: float) -> dict[str, np.ndarray]:
    """Nats by position as maps, `{caption: [1, size, size, 3] float32}`: black is 0, white is `most` or more."""
    rows = {}
    for name, positions in found.items():
        side = max(1, size // grid)
        shades = np.clip(positions.nats / most, 0, 1).reshape(grid, grid).astype(np.float32)
        caption = f"{name}: {positions.nats.min():.2f} to {positions.nats.max():.2f}"
        rows[caption] = np.broadcast_to(np.kron(shades, np.ones((side, side), np.float32))[None, ..., None],
                                        (1, grid * side, grid * side, 3))
    return rows
