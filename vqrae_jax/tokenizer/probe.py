"""What a run's representations know of labels: kNN and a linear probe, fitted to images of their own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vqrae_jax.metrics import Batch, Metric, knn_top1, linear_probe_top1
from vqrae_jax.models import flat
from vqrae_jax.models.flat import Arrays
from vqrae_jax.tokenizer.evaluate import Batches, placed
from vqrae_jax.tokenizer.instruments import ENCODER, View
from vqrae_jax.training import distributed, sharding

IMAGES = 50_000  # at most, to be asked about: their features are kept
# What is asked about, and what the classifiers are then fitted to: a reconstruction is shown to the pretrained encoder
# in the place of its original.
REPRESENTATIONS = {"encoder": "encoder", "features": "features", "latents": "latents", "reconstructions": "encoder"}


def probe(train: dict[str, np.ndarray]) -> Metric:
    """`probe_linear_x` and `probe_knn_x`, the accuracy of both classifiers on means over tokens.

    x is `encoder` (the pretrained encoder's features), `features` (this run's, continuous), `latents` (quantized, as
    the decoder sees them) and `reconstructions` (the pretrained encoder's features of reconstructions).

    Args:
      train: as `representations` gives it.
    """
    def rows(batch: Batch) -> dict[str, jax.Array]:
        images, reconstructions = (tokens.mean(axis=1) for tokens in batch.seen[ENCODER])
        return {"encoder": images, "features": batch.features.mean(axis=1), "latents": batch.latents.mean(axis=1),
                "reconstructions": reconstructions, "labels": batch.labels}

    def finish(sums: Any, rows: dict[str, np.ndarray]) -> dict[str, float]:
        rows = _labelled(rows)
        numbers: dict[str, float] = {}
        for name, fitted in REPRESENTATIONS.items():
            given, asked = (train[fitted], train["labels"]), (rows[name], rows["labels"])
            numbers[f"probe_linear_{name}"] = linear_probe_top1(*given, *asked)
            numbers[f"probe_knn_{name}"] = knn_top1(*asked, reference=given)
        return numbers | {"num_probe_images": len(train["labels"])}

    return Metric(rows=rows, finish=finish, most_rows=IMAGES, labelled=True)


def representations(graphdef: nnx.GraphDef, arrays: Arrays, mesh: Mesh, batches: Batches,
                    view: View | None) -> dict[str, np.ndarray]:
    """Means over tokens of what a run and its pretrained encoder make of images with labels.

    Args:
      graphdef: of the model.
      arrays: its parameters and buffers.
      mesh: of the evaluation.
      batches: the images, as `data.eval_batches` yields them.
      view: the pretrained encoder; None where it is the run's own, whose features are then both.

    Returns:
      `encoder`, `features` and `latents`, `[n, d]` float32, and `labels` `[n]`.

    Raises:
      ValueError: no image has a label.
    """
    see = jax.jit(sharding.on(mesh, functools.partial(_see, graphdef)))
    kept = []
    for batch in placed(batches, mesh):
        images, seen = see(arrays, batch["image"])
        seen["encoder"] = view.embedding(view.see(images)) if view else seen["features"]
        rows, valid = distributed.gather(({**seen, "labels": batch["label"]}, batch["valid"]))
        kept.append({name: values[valid] for name, values in rows.items()})
    return _labelled(jax.tree.map(lambda *values: np.concatenate(values), *kept))


def _see(graphdef: nnx.GraphDef, arrays: Arrays, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    model, images = flat.merge(graphdef, arrays), images.astype(jnp.float32) / 255
    features = model.features(images)
    latents = model.quantizer(features, train=False).z_q
    return images, {"features": features.mean(axis=1), "latents": latents.mean(axis=1)}


def _labelled(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    has_label = rows["labels"] >= 0
    if not has_label.any():
        raise ValueError("a probe needs images with labels")
    return {name: values[has_label] for name, values in rows.items()}
