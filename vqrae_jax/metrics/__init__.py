"""Metrics of a set of images: what each keeps of a batch, how it adds up, and the numbers that come of it.

A new one is a function beside these and a row in `METRICS`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax.metrics.codes import code_usage, perplexity
from vqrae_jax.metrics.features import knn_top1, linear_probe_top1
from vqrae_jax.metrics.pixels import psnr, ssim

__all__ = ["METRICS", "Batch", "Metric", "code_usage", "knn_top1", "linear_probe_top1", "mean_of_images", "perplexity",
           "psnr", "ssim"]

KNN_IMAGES = 10_000  # comparing each with each costs their number squared


class Batch(NamedTuple):
    """What a model makes of a batch of images.

    Attributes:
      images: `[B, H, W, 3]` float32 in [0, 1].
      reconstructions: likewise.
      features: `[B, N, d]` float32, continuous.
      indices: `[B, N]` int32, codes.
      num_codes: codes are in [0, num_codes); 1 where there are none.
      labels: `[B]` int32, -1 where unknown.
      valid: `[B]` bool; other rows are padding or bad images, and mean nothing.
    """

    images: jax.Array
    reconstructions: jax.Array
    features: jax.Array
    indices: jax.Array
    num_codes: int
    labels: jax.Array
    valid: jax.Array


class Metric(NamedTuple):
    """A row of the table of metrics.

    Attributes:
      measure: `Batch -> tree of arrays`, what is kept of it; computed on the devices, which images need not leave.
      update: `(kept so far, what `measure` gave as NumPy arrays, valid) -> kept`; at first nothing is kept: None.
      finish: `kept -> {name: number}`, empty where the metric means nothing.
    """

    measure: Callable[[Batch], Any]
    update: Callable[[Any, Any, np.ndarray], Any]
    finish: Callable[[Any], dict[str, float]]


def _rows(kept: list[Any] | None, measured: Any, valid: np.ndarray) -> list[Any]:
    """Keeps each valid image's values."""
    kept = [] if kept is None else kept
    kept.append(jax.tree.map(lambda values: values[valid], measured))
    return kept


def _sum(kept: Any, measured: Any, valid: np.ndarray) -> Any:
    """Keeps the sum of what was measured."""
    del valid  # the measurement left the others out
    return jax.tree.map(lambda values: values.astype(np.int64), measured) if kept is None else \
        jax.tree.map(np.add, kept, measured)


def _joined(kept: list[Any]) -> Any:
    return jax.tree.map(lambda *values: np.concatenate(values), *kept)


def mean_of_images(name: str, of_images: Callable[[Any, Any], jax.Array]) -> Metric:
    """The mean over images of a number that each has."""
    return Metric(measure=lambda batch: of_images(batch.images, batch.reconstructions), update=_rows,
                  finish=lambda kept: {name: float(_joined(kept).mean(dtype=np.float64))})


def _count_codes(batch: Batch) -> jax.Array:
    uses = jnp.broadcast_to(batch.valid[:, None], batch.indices.shape).astype(jnp.int32)
    return jax.ops.segment_sum(uses.reshape(-1), batch.indices.reshape(-1), batch.num_codes)


def _codes(counts: np.ndarray) -> dict[str, float]:
    """Over all images: the share of codes that any of them hit, and exp of the entropy of the usage histogram."""
    if len(counts) == 1:  # there are no codes
        return {}
    return {"code_usage": float(code_usage(jnp.asarray(counts))),
            "code_perplexity": float(perplexity(jnp.asarray(counts)))}


class _LabelledFeatures:
    """The features of images that have a label; of more than `KNN_IMAGES`, a random choice that is always the same.

    Each image draws a number, and those that drew the least stay, in their order.

    Attributes:
      images: how many images there were.
      labelled: how many of them had a label.
    """

    def __init__(self):
        self.images = self.labelled = 0
        self._rng, self._rows, self._count = np.random.default_rng(0), [], 0

    def add(self, features: np.ndarray, labels: np.ndarray) -> None:
        has_label = labels >= 0
        count = int(has_label.sum())
        self.images, self.labelled, self._count = self.images + len(labels), self.labelled + count, self._count + count
        if count:
            self._rows.append((self._rng.random(count), features[has_label], labels[has_label]))
        if self._count > 2 * KNN_IMAGES:
            self.choose()

    def choose(self) -> tuple[np.ndarray, np.ndarray]:
        """Features and labels of the images that stay."""
        draws, features, labels = _joined(self._rows)
        stay = np.sort(np.argsort(draws)[:KNN_IMAGES])
        self._rows, self._count = [(draws[stay], features[stay], labels[stay])], len(stay)
        return features[stay], labels[stay]


def _keep_labelled(kept: _LabelledFeatures | None, measured: Any, valid: np.ndarray) -> _LabelledFeatures:
    kept = _LabelledFeatures() if kept is None else kept
    kept.add(*(values[valid] for values in measured))
    return kept


def _knn(kept: _LabelledFeatures) -> dict[str, float]:
    """Leave-one-out over all images, on the mean of their features; it takes two labels, and one of them twice.

    Of more than `KNN_IMAGES` so many are chosen, and `knn_images` says so.
    """
    if kept.labelled < kept.images:
        return {}
    features, labels = kept.choose()
    if not 1 < len(np.unique(labels)) < len(labels):
        return {}
    return {"knn_top1": knn_top1(features, labels)} | ({"knn_images": len(labels)} if len(labels) < kept.images else {})


METRICS: dict[str, Metric] = {
    "psnr": mean_of_images("psnr", psnr),
    "ssim": mean_of_images("ssim", ssim),
    "codes": Metric(measure=_count_codes, update=_sum, finish=_codes),
    "knn": Metric(measure=lambda batch: (batch.features.mean(axis=1), batch.labels), update=_keep_labelled,
                  finish=_knn),
}
