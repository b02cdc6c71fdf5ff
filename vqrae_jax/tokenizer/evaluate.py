"""The tokenizer's evaluation on a set of images. What it measures are rows of `metrics.METRICS` and of instruments."""

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vqrae_jax.config import Config, keys
from vqrae_jax.data import BadImages, Source, eval_batches, open_source
from vqrae_jax.metrics import METRICS, Batch, Metric
from vqrae_jax.models import flat
from vqrae_jax.models.flat import Arrays
from vqrae_jax.training import distributed, reporting, sharding, signals

log = logging.getLogger(__name__)
Batches = Iterable[dict[str, Any]]
_FINITE = "finite"  # beside the rows of metrics: whether an image's reconstruction is


class Seen(NamedTuple):
    """What a model makes of a batch; the fields are those of `metrics.Batch`."""

    images: jax.Array
    reconstructions: jax.Array
    features: jax.Array
    latents: jax.Array
    indices: jax.Array


class Instrument(NamedTuple):
    """A network that metrics look through.

    Attributes:
      look: `(Seen, what the instruments before it saw) -> tree of arrays`, compiled; metrics find it in `Batch.seen`
        under the instrument's name.
      metrics: what is measured with it, by name.
      weights: the files that it was read from, `{file: sha256}`.
    """

    look: Callable[[Seen, Mapping[str, Any]], Any]
    metrics: Mapping[str, Metric]
    weights: Mapping[str, str]


class Evaluation(NamedTuple):
    """What was measured on a set of images.

    Attributes:
      metrics: numbers by name, and `num_images`.
      failed: why a metric has no number.
      per_image: of the metrics that are a mean over images the numbers of all images, `[n]`.
      sums: what metrics kept, by their rows' names.
      places: of the images in the source, `[n]` int64.
      originals: the first images, float32 `[samples, H, W, 3]` in [0, 1].
      reconstructions: likewise.
    """

    metrics: dict[str, float]
    failed: dict[str, str]
    per_image: dict[str, np.ndarray]
    sums: dict[str, Any]
    places: np.ndarray
    originals: np.ndarray
    reconstructions: np.ndarray


def choose_source(config: Config, training: Source, held_out: Source) -> Source:
    """The images of a config's evaluations: those of `eval.source`, or else the held-out ones.

    Args:
      config: of the run.
      training: the images that it trains on.
      held_out: those that it does not train on; where these are none, it is the training images, and the log says so.
    """
    if config.eval.source:
        return open_source(config.eval.source, training=False)
    if len(held_out):
        return held_out
    log.warning("of %s no image is held out (data.holdout is %g of %d images): evaluation shows images that were "
                "trained on", config.data.source, config.data.holdout, len(training))
    return training


def open_batches(config: Config, source: Source, bad_images: BadImages, mesh: Mesh, *,
                 limit: int, max_bad: float) -> Batches:
    """This process's share of the images of a source, at a config's size.

    Args:
      config: of the run; `eval.batch_size` is rounded up to a multiple of the devices, `data.threads` threads read.
      source: of the images.
      bad_images: collects the images that cannot be read.
      mesh: whose devices evaluate.
      limit: > 0 takes only so many images, always the same.
      max_bad: share of the images that may be bad.
    """
    batch_size = math.ceil(config.eval.batch_size / mesh.size) * mesh.size
    return eval_batches(source, image_size=config.data.image_size, batch_size=batch_size // jax.process_count(),
                        bad_images=bad_images, max_bad=max_bad, threads=config.data.threads, limit=limit or None,
                        shard_index=jax.process_index(), shard_count=jax.process_count())


def placed(batches: Batches, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    """The global batches of which every process gives its share, on the devices; ends where a signal asks for it.

    Each also has `position`, `[B]` int32: the places of its images in the evaluation, which go on in the padding.
    """
    for number, local in enumerate(batches):
        signals.stop_if_preempted()
        size = len(local["valid"])
        first = (number * jax.process_count() + jax.process_index()) * size
        yield sharding.put_batch(mesh, {**local, "position": np.arange(first, first + size, dtype=np.int32)})


class Evaluator:
    """Evaluates arrays of one model; compiles once.

    Args:
      graphdef: of the model.
      mesh: the devices, which take a share of every batch.
      metrics: rows of tables of metrics, by name.
      instruments: what else looks at the images, by name, with metrics of their own.
    """

    def __init__(self, graphdef: nnx.GraphDef, mesh: Mesh, metrics: Mapping[str, Metric] = METRICS,
                 instruments: Mapping[str, Instrument] = MappingProxyType({})):
        self._graphdef, self._mesh, self._instruments = graphdef, mesh, instruments
        self._metrics = {**metrics, **{name: metric for instrument in instruments.values()
                                       for name, metric in instrument.metrics.items()}}
        self._see = jax.jit(sharding.on(mesh, functools.partial(see, graphdef)))
        self._rank = jax.jit(lambda ranks, position: ranks[jnp.minimum(position, len(ranks) - 1)])
        self._update = jax.jit(sharding.on(mesh, self._updated), donate_argnums=0,
                               out_shardings=(sharding.replicated(mesh), sharding.batch_sharding(mesh)))

    def _updated(self, sums: dict[str, Any], batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
        rows = {name: self._metrics[name].rows(batch) for name in sums}
        finite = jnp.isfinite(batch.reconstructions).all((1, 2, 3))
        return ({name: self._metrics[name].update(kept, batch) for name, kept in sums.items()},
                {**rows, _FINITE: finite})

    def __call__(self, arrays: Arrays, batches: Batches, *, images: int, labelled: bool, samples: int) -> Evaluation:
        """Evaluates a model on all images of `batches`, those of all processes.

        Args:
          arrays: all the model's parameters and buffers.
          batches: as `data.eval_batches` yields them.
          images: how many there are, bad ones included.
          labelled: whether they have labels.
          samples: how many images to keep for a picture, from the first batches.

        Raises:
          ValueError: no image could be read.
        """
        metrics = {name: metric for name, metric in self._metrics.items() if labelled or not metric.labelled}
        ranks = np.append(np.random.default_rng(0).permutation(images), images).astype(np.int32)  # padding: the last
        ranks = sharding.put(self._mesh, {"ranks": ranks}, ((".*", ()),))["ranks"]
        num_codes = flat.merge(self._graphdef, arrays).quantizer.num_codes
        sums, rows, pictures, places = None, [], [], []
        for given in reporting.shown(placed(batches, self._mesh), of=images, size=lambda given: len(given["valid"])):
            seen = self._see(arrays, given["image"])
            looked: dict[str, Any] = {}
            for name, instrument in self._instruments.items():
                looked[name] = instrument.look(seen, looked)
            batch = Batch(**seen._asdict(), num_codes=num_codes, labels=given["label"], valid=given["valid"],
                          rank=self._rank(ranks, given["position"]), seen=looked)
            sums = self._zeros(metrics, batch) if sums is None else sums
            sums, measured = self._update(sums, batch)
            # Images are large: they are gathered only as long as the picture needs some.
            missing = samples - sum(len(shown[0]) for shown in pictures)
            shown = (seen.images, seen.reconstructions) if missing > 0 else None
            measured, valid, rank, place, shown = distributed.gather(
                (measured, given["valid"], batch.rank, given["index"], shown))
            keep = {_FINITE: valid, **{name: valid & (rank < (metric.most_rows or images))
                                       for name, metric in metrics.items()}}
            rows.append({name: jax.tree.map(lambda values, keep=keep[name]: values[keep], measured[name])
                         for name in measured})
            places.append(place[valid])
            if shown:
                pictures.append([side[valid][:missing] for side in shown])
        if not sum(map(len, places)):
            raise ValueError("none of the images can be read")
        joined: dict[str, Any] = jax.tree.map(lambda *values: np.concatenate(values), *rows)
        finite = joined.pop(_FINITE)
        kept = jax.tree.map(lambda array: np.asarray(array.addressable_data(0)), sums)
        numbers, failed = _finished(metrics, kept, joined, finite)
        originals, reconstructions = (np.concatenate(side) for side in zip(*pictures, strict=True))
        return Evaluation(numbers | {"num_images": len(finite)}, failed,
                          {name: joined[name] for name, metric in metrics.items() if metric.per_image}, kept,
                          np.concatenate(places), originals, reconstructions)

    def pictures(self, arrays: Arrays, batches: Batches) -> tuple[np.ndarray, np.ndarray]:
        """Images and their reconstructions, float32 `[n, H, W, 3]` in [0, 1]."""
        sides = []
        for given in placed(batches, self._mesh):
            seen = self._see(arrays, given["image"])
            *shown, valid = distributed.gather((seen.images, seen.reconstructions, given["valid"]))
            sides.append([side[valid] for side in shown])
        images, reconstructions = (np.concatenate(side) for side in zip(*sides, strict=True))
        return images, reconstructions

    def _zeros(self, metrics: Mapping[str, Metric], batch: Batch) -> dict[str, Any]:
        shapes = jax.eval_shape(lambda batch: batch, batch)
        return jax.jit(lambda: {name: metric.init(shapes) for name, metric in metrics.items()},
                       out_shardings=sharding.replicated(self._mesh))()


def see(graphdef: nnx.GraphDef, arrays: Arrays, images: jax.Array) -> Seen:
    """What a model makes of uint8 images `[B, H, W, 3]`."""
    images = images.astype(jnp.float32) / 255
    output = flat.merge(graphdef, arrays)(images, train=False)
    return Seen(images, jnp.clip(output.images, 0, 1), output.features, output.quantized.z_q, output.quantized.indices)


def _finished(metrics: Mapping[str, Metric], sums: dict[str, Any], rows: dict[str, Any],
              finite: np.ndarray) -> tuple[dict[str, float], dict[str, str]]:
    numbers, failed = {}, {}
    for name, metric in metrics.items():
        try:
            made = metric.finish(sums[name], rows[name])
        except ValueError as error:
            failed[name] = str(error)
            continue
        numbers |= made
        failed |= {number: "is not a number" for number, value in made.items() if math.isnan(value)}
    if not finite.all():
        cause = f"{(~finite).sum()} of {len(finite)} reconstructions are not finite"
        failed = {name: f"{reason}: {cause}" for name, reason in failed.items()}
    return numbers, failed


def table(columns: dict[str, dict[str, Any]]) -> str:
    """`{run: {metric or config key: value}}` as text, one column a run."""
    names = list(dict.fromkeys(name for metrics in columns.values() for name in metrics))
    rows = [["", *columns]] + [[name, *(_cell(metrics, name) for metrics in columns.values())] for name in names]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) if i else cell.ljust(width)
                               for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows)


def _cell(values: dict[str, Any], name: str) -> str:
    if name not in values:
        return "-"
    is_metric = isinstance(values[name], float) and name not in keys()
    return f"{values[name]:.4f}" if is_metric else str(values[name])
