"""Metrics of a set of images: what each keeps of a batch, how it adds up, and the numbers that come of it.

A metric that every evaluation computes is a row of `METRICS`. Those that look through another network, such as FID, are
made by functions beside the table, for `tokenizer.instruments`. What is kept is independent of how the images are
batched, padded and spread over devices, up to rounding.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax.metrics import codes, frechet, inception_score
from vqrae_jax.metrics.codes import code_usage, perplexity
from vqrae_jax.metrics.features import cka_from_scatter, knn_top1, linear_probe_top1, zero_shot_top1
from vqrae_jax.metrics.pixels import psnr, ssim

__all__ = ["METRICS", "Batch", "Metric", "Statistics", "code_usage", "cosine_and_cka", "frechet_distance", "knn_top1",
           "linear_probe_top1", "mean_inception_score", "mean_of_images", "mean_of_rows", "perplexity", "psnr", "ssim",
           "zero_shot_top1"]

KNN_IMAGES = 10_000  # comparing each with each costs their number squared


@functools.partial(jax.tree_util.register_dataclass, meta_fields=("num_codes",), data_fields=(
    "images", "reconstructions", "features", "latents", "indices", "labels", "valid", "rank", "seen"))
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """What a model makes of a batch of images, and what other networks see in it.

    Attributes:
      images: `[B, H, W, 3]` float32 in [0, 1].
      reconstructions: likewise.
      features: `[B, N, d]` float32, continuous.
      latents: `[B, N, d]` float32, quantized, as the decoder sees them.
      indices: `[B, N]` int32, codes.
      num_codes: codes are in [0, num_codes); 1 where there are none.
      labels: `[B]` int32, -1 where unknown.
      valid: `[B]` bool; other rows are padding or bad images, and mean nothing.
      rank: `[B]` int32, the place of an image in a random order of the evaluation that is always the same.
      seen: by the name of another network what it makes of images and reconstructions.
    """

    images: jax.Array
    reconstructions: jax.Array
    features: jax.Array
    latents: jax.Array
    indices: jax.Array
    num_codes: int
    labels: jax.Array
    valid: jax.Array
    rank: jax.Array
    seen: Mapping[str, Any]


class Metric(NamedTuple):
    """A row of a table of metrics. It keeps sums on the devices, or rows of images on the host, or both.

    Attributes:
      finish: `(sums, rows) -> {name: number}`, both on the host, rows of all valid images in the order of the
        evaluation; empty where the metric means nothing, ValueError where it cannot be computed.
      init: `Batch of shapes -> tree of arrays`, the sums over no images.
      update: `(sums, Batch) -> sums`, compiled.
      rows: `Batch -> tree of arrays [B, ...]`, of which those of valid images are kept.
      most_rows: of more images only the rows of so many are kept, a random choice that is always the same.
      labelled: whether it is left out where images have no labels.
      per_image: whether `rows` is a number an image, of which a confidence interval can be made.
    """

    finish: Callable[[Any, Any], dict[str, float]]
    init: Callable[[Batch], Any] = lambda batch: ()
    update: Callable[[Any, Batch], Any] = lambda sums, batch: sums
    rows: Callable[[Batch], Any] = lambda batch: ()
    most_rows: int | None = None
    labelled: bool = False
    per_image: bool = False


def mean_of_images(name: str, of_images: Callable[[Any, Any], jax.Array]) -> Metric:
    """The mean over images of a number that each has, of the image and its reconstruction."""
    return mean_of_rows(name, lambda batch: of_images(batch.images, batch.reconstructions))


def mean_of_rows(name: str, rows: Callable[[Batch], jax.Array]) -> Metric:
    """The mean over images of a number that each has: `Batch -> [B]`."""
    return Metric(rows=rows, per_image=True,
                  finish=lambda sums, rows: {name: float(rows.mean(dtype=np.float64))})


Statistics = tuple[np.ndarray, np.ndarray]  # mean [d] and covariance [d, d] of features


def frechet_distance(name: str, reconstructions: Callable[[Batch], jax.Array],
                     reference: Callable[[Batch], jax.Array] | Statistics) -> Metric:
    """Frechet distance of the features of reconstructions; see `frechet.frechet_distance`.

    Args:
      name: of the number.
      reconstructions: their features, `[B, d]` float32.
      reference: those of the images, or what is known of other images.
    """
    sides = (reconstructions, reference) if callable(reference) else (reconstructions,)

    def finish(sums: Any, rows: Any) -> dict[str, float]:
        mine, *images = (frechet.statistics(frechet.moments(kept)) for kept in sums)
        return {name: frechet.frechet_distance(*mine, *(images[0] if callable(reference) else reference))}

    return Metric(
        init=lambda batch: tuple(frechet.init(jax.eval_shape(side, batch).shape[-1]) for side in sides),
        update=lambda sums, batch: tuple(frechet.update(kept, side(batch), batch.valid)
                                         for kept, side in zip(sums, sides, strict=True)),
        finish=finish)


def mean_inception_score(logits: Callable[[Batch], jax.Array], *, images: int) -> Metric:
    """Inception Score of the reconstructions, over splits of 5000 images; see the module `inception_score`.

    Args:
      logits: of the reconstructions, `[B, classes]` float32.
      images: how many the evaluation has, bad ones included.
    """
    split = inception_score.SPLIT
    return Metric(
        init=lambda batch: inception_score.init(-(-images // split), jax.eval_shape(logits, batch).shape[-1]),
        update=lambda sums, batch: inception_score.update(sums, logits(batch), batch.rank // split, batch.valid),
        finish=lambda sums, rows: {"inception_score": inception_score.finish(sums)[0]})


def cosine_and_cka(name: str, see: Callable[[Batch], tuple[jax.Array, jax.Array]]) -> dict[str, Metric]:
    """How alike the tokens of two encoders are: their mean cosine, token by token, and linear CKA over all tokens.

    Args:
      name: what the numbers' names begin with.
      see: both encoders' tokens, `[B, N, d]` float32.
    """
    def cosine(batch: Batch) -> jax.Array:
        x, y = (side / jnp.maximum(jnp.linalg.norm(side, axis=-1, keepdims=True), 1e-12) for side in see(batch))
        return jnp.sum(x * y, axis=-1).mean(axis=1)

    def init(batch: Batch) -> Any:
        return frechet.init(sum(side.shape[-1] for side in jax.eval_shape(see, batch)))

    def update(sums: Any, batch: Batch) -> Any:
        tokens = jnp.concatenate(see(batch), axis=-1)
        return frechet.update(sums, tokens.reshape(-1, tokens.shape[-1]), jnp.repeat(batch.valid, tokens.shape[1]))

    def finish(sums: Any, rows: Any) -> dict[str, float]:
        scatter = frechet.moments(sums).scatter
        return {f"{name}_cka": cka_from_scatter(scatter, len(scatter) // 2)}

    return {f"{name}_cosine": mean_of_rows(f"{name}_cosine", cosine),
            f"{name}_cka": Metric(init=init, update=update, finish=finish)}


def _knn(sums: Any, rows: dict[str, np.ndarray]) -> dict[str, float]:
    """Leave-one-out on the mean of the features; it takes two labels, and one of them twice.

    Of more than `KNN_IMAGES` images so many are chosen, and `knn_images` says so.
    """
    features, labels, images = rows["features"], rows["labels"], int(sums)
    if (labels < 0).any() or not 1 < len(np.unique(labels)) < len(labels):
        return {}
    return {"knn_top1": knn_top1(features, labels)} | ({"knn_images": len(labels)} if len(labels) < images else {})


METRICS: dict[str, Metric] = {
    "psnr": mean_of_images("psnr", psnr),
    "ssim": mean_of_images("ssim", ssim),
    "codes": Metric(init=lambda batch: codes.init(batch.indices.shape[1], batch.num_codes),
                    update=lambda sums, batch: codes.update(sums, batch.indices, batch.valid),
                    finish=lambda sums, rows: codes.numbers(codes.counts(sums))),
    "knn": Metric(init=lambda batch: np.int32(0), update=lambda sums, batch: sums + batch.valid.sum(),
                  rows=lambda batch: {"features": batch.features.mean(axis=1), "labels": batch.labels},
                  most_rows=KNN_IMAGES, labelled=True, finish=_knn),
}
