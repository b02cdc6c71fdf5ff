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


def _knn(kept: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Leave-one-out over all images, on the mean of their features; it takes two labels, and one of them twice."""
    features, labels = _joined(kept)
    if labels.min() < 0 or not 1 < len(np.unique(labels)) < len(labels):
        return {}
    return {"knn_top1": knn_top1(features, labels)}


METRICS: dict[str, Metric] = {
    "psnr": mean_of_images("psnr", psnr),
    "ssim": mean_of_images("ssim", ssim),
    "codes": Metric(measure=_count_codes, update=_sum, finish=_codes),
    "knn": Metric(measure=lambda batch: (batch.features.mean(axis=1), batch.labels), update=_rows, finish=_knn),
}
