"""The tokenizer's evaluation on a set of images. Its metrics are the table of `vqrae_jax.metrics`."""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vqrae_jax.config import Config, keys
from vqrae_jax.data import BadImages, Source, eval_batches, open_source
from vqrae_jax.metrics import METRICS, Batch
from vqrae_jax.models import flat
from vqrae_jax.models.flat import Arrays
from vqrae_jax.training import distributed, sharding, signals

log = logging.getLogger(__name__)
# `(arrays, images, labels, valid) -> ({metric: measured}, reconstructions)`; see `make_eval_step`.
EvalStep = Callable[[Arrays, jax.Array, jax.Array, jax.Array], tuple[dict[str, Any], jax.Array]]

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
                 limit: int, max_bad: float) -> Iterable[dict[str, Any]]:
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


def make_eval_step(graphdef: nnx.GraphDef, mesh: Mesh) -> EvalStep:
    """The evaluation step, compiled: `eval_step(arrays, images, labels, valid) -> (measured, reconstructions)`.

    `arrays` are all the model's parameters and buffers, `images` uint8 `[B, H, W, 3]`, `labels` int32 `[B]`, `valid`
    bool `[B]`. What each of `METRICS` measures is by name; reconstructions are float32 `[B, H, W, 3]` in [0, 1].
    """

    def eval_step(arrays: Arrays, images: jax.Array, labels: jax.Array, valid: jax.Array):
        images = images.astype(jnp.float32) / 255
        model = flat.merge(graphdef, arrays)
        output = model(images, train=False)
        batch = Batch(images=images, reconstructions=jnp.clip(output.images, 0, 1), features=output.features,
                      indices=output.quantized.indices, num_codes=model.quantizer.num_codes, labels=labels, valid=valid)
        return {name: metric.measure(batch) for name, metric in METRICS.items()}, batch.reconstructions

    return jax.jit(sharding.on(mesh, eval_step))


def evaluate(eval_step: EvalStep, arrays: Arrays, mesh: Mesh, batches: Iterable[dict[str, Any]],
             *, samples: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Evaluates a model on all images of `batches`, those of all processes.

    Args:
      eval_step: from `make_eval_step`.
      arrays: all the model's parameters and buffers.
      mesh: the devices that hold them, and take a share of every batch.
      batches: as `data.eval_batches` yields them.
      samples: how many images to keep for a picture, from the first batches.

    Returns:
      metrics and pictures. Metrics: the numbers of every row of `METRICS`, and `num_images`. Pictures: `original` and
      `reconstruction`, float32 `[samples, H, W, 3]` in [0, 1].

    Raises:
      ValueError: no image could be read.
    """
    kept: dict[str, Any] = dict.fromkeys(METRICS)
    originals, reconstructions, count = [], [], 0
    for local in batches:
        signals.stop_if_preempted()
        batch = sharding.put_batch(mesh, {name: local[name] for name in ("image", "label", "valid")})
        measured, decoded = eval_step(arrays, batch["image"], batch["label"], batch["valid"])
        # Images are large: they are gathered only as long as the picture needs some.
        pictures = (batch["image"], decoded) if sum(map(len, originals)) < samples else None
        measured, valid, pictures = distributed.gather((measured, batch["valid"], pictures))
        kept = {name: metric.update(kept[name], measured[name], valid) for name, metric in METRICS.items()}
        count += int(valid.sum())
        if pictures:
            missing = samples - sum(map(len, originals))
            originals.append(pictures[0][valid][:missing].astype(np.float32) / 255)
            reconstructions.append(pictures[1][valid][:missing])
    if not count:
        raise ValueError("none of the images can be read")
    metrics = {name: number for key, metric in METRICS.items() for name, number in metric.finish(kept[key]).items()}
    return metrics | {"num_images": count}, {
        "original": np.concatenate(originals), "reconstruction": np.concatenate(reconstructions)}


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
