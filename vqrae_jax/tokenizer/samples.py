"""What codes look like that no image was encoded to, and how like images that is: samples of a generator, and rulers.

A Frechet distance of samples says little alone. Beside it stand, of as many images, that of the tokenizer's
reconstructions, for no generator of its codes can be expected to be better (the floor), and that of codes drawn
independently of each other (the ceiling).
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vqrae_jax.data import BadImages, Source, faults, open_source, part
from vqrae_jax.data.codes import Description
from vqrae_jax.files import disk_errors, whole
from vqrae_jax.metrics import Statistics, frechet, inception_score, linear_probe_top1
from vqrae_jax.tokenizer import build, evaluate, instruments, probe, recipe, runs
from vqrae_jax.tokenizer.inference import decode_codes, encode_codes
from vqrae_jax.tokenizer.instruments import View
from vqrae_jax.training import distributed, reporting, sharding
from vqrae_jax.weights import tensors

log = logging.getLogger(__name__)
ENCODER, FID = "fd_encoder", "fid"  # distances, and so the views of which they are taken
BY_POSITION = "codes_by_position"  # the ceiling
NEAREST_OF = 5000  # images at most whose nearest training image is looked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and on what; each is a flag of `generate`.

    Attributes:
      reference: SPEC of the images that distributions are compared with; empty is no measurement.
      probe: SPEC of images with labels that a classifier is fitted to, which then says of what class samples are; empty
        is none.
      probe_limit: only so many of them, always the same.
      neighbours: so many samples are shown over the training images that are nearest to them.
      inception: weights of the papers' Inception; empty is the tokenizer's `eval.inception`.
    """

    reference: str = ""
    probe: str = ""
    probe_limit: int = 50_000
    neighbours: int = 0
    inception: str = ""


# image [B, H, W, 3] float32 in [0, 1], label [B], valid [B], and position [B] in the set.
Batch = dict[str, jax.Array]


class Decoder:
    """A tokenizer's run, for codes that something else made.

    Args:
      workdir: its folder.
      codes: what they are, and of which tokenizer.
      mesh: the devices.

    Raises:
      OSError: there is no such run.
      ValueError: its weights are others.
    """

    def __init__(self, workdir: Path, codes: Description, mesh: Mesh):
        self.workdir, self.codes, self.mesh = workdir, codes, mesh
        self.config, self.graphdef, self.arrays = runs.load_run(workdir, mesh, weights=codes.weights)
        if runs.digest(self.arrays) != codes.tokenizer:
            raise ValueError(f"the generator learned codes of another tokenizer than that of {workdir}, or this was "
                             f"trained on since: give the run with the weights whose sha256 is {codes.tokenizer[:16]}"
                             "...")
        jit = lambda function: jax.jit(sharding.on(mesh, functools.partial(function, self.graphdef)))
        self._encode, self._decode = jit(encode_codes), jit(decode_codes)

    def images(self, codes: np.ndarray) -> Iterator[np.ndarray]:
        """Codes `[n, h, w]` int32 as images, `[B, H, W, 3]` float32 in [0, 1] at a time, whole on every process."""
        for batch in self.decoded(codes, np.full(len(codes), -1)):
            image, valid = distributed.gather((batch["image"], batch["valid"]))
            yield image[valid]

    def decoded(self, codes: np.ndarray, labels: np.ndarray) -> Iterator[Batch]:
        """Codes and their labels `[n]` as full batches on the devices."""
        size = math.ceil(self.config.eval.batch_size / self.mesh.size) * self.mesh.size
        share = size // jax.process_count()
        for first in range(jax.process_index() * share, len(codes) + jax.process_index() * share, size):
            mine = np.arange(first, first + share)
            rows = np.minimum(mine, len(codes) - 1)
            batch = sharding.put_batch(self.mesh, {
                "codes": codes[rows].astype(np.int32), "label": labels[rows].astype(np.int32),
                "valid": mine < len(codes), "position": mine.astype(np.int32)})
            yield {"image": self._decode(self.arrays, batch.pop("codes")), **batch}

    def reconstruct(self, images: jax.Array) -> jax.Array:
        """uint8 `[B, H, W, 3]` on the devices to what becomes of them, float32 in [0, 1]."""
        return self._decode(self.arrays, self._encode(self.arrays, images))


class Look(NamedTuple):
    """What was seen in a set of images.

    Attributes:
      statistics: by view.
      score: Inception Score; None without Inception.
      features: `[n, d]` float32, means over the tokens of the pretrained encoder.
      labels: `[n]`, -1 where unknown.
    """

    statistics: dict[str, Statistics]
    score: float | None
    features: np.ndarray
    labels: np.ndarray


class Found(NamedTuple):
    """What was measured.

    Attributes:
      columns: numbers by the name of the set of images: `samples` and the rulers.
      failed: why something has no number, in one line each.
      neighbours: rows of a picture; empty without.
      weights: `{what was read: its sha256}`.
    """

    columns: dict[str, dict[str, float]]
    failed: dict[str, str]
    neighbours: dict[str, np.ndarray]
    weights: dict[str, str]


class Measurement:
    """Measures samples as images, beside the rulers. All that is needed is opened at once, before there are samples.

    Args:
      decoder: of the codes.
      options: what to measure.

    Raises:
      OSError, ValueError: images or networks are not there. Without Inception there is no FID, and a line says so,
        unless an option asked for it.
    """

    def __init__(self, decoder: Decoder, options: Options):
        self._decoder, self._options, self._bad_images = decoder, options, BadImages(None)
        config, mesh = decoder.config, decoder.mesh
        self._failed: dict[str, str] = {}
        self._views: dict[str, View] = {ENCODER: instruments.pretrained_view(
            decoder.workdir, config, decoder.arrays, decoder.graphdef, mesh)}
        try:
            self._views[FID] = instruments.inception_view(options.inception or config.eval.inception, mesh)
        except (OSError, ValueError) as error:
            if options.inception or faults.machine_failed(error):
                raise
            self._leave_out(FID, error)
        self._reference = open_source(options.reference, training=False)
        self._probe = open_source(options.probe, training=True) if options.probe else None
        self._trained_on = open_source(decoder.codes.data, training=True) if options.neighbours else None

    def __call__(self, codes: np.ndarray, labels: np.ndarray, independent: Callable[[], np.ndarray]) -> Found:
        """Measures samples.

        Args:
          codes: of the samples, `[n, h, w]` int32.
          labels: the classes that were asked for, `[n]`; -1 is none.
          independent: makes codes that know nothing of each other, `[n, h, w]`; where it cannot, with OSError or
            ValueError, a line says so, and this ruler is left out.

        Raises:
          OSError, ValueError: images cannot be read, or there are too few of them.
        """
        decoder, options = self._decoder, self._options
        against = instruments.statistics(self._views, self._open(self._reference), decoder.mesh)
        some = min(len(codes), len(self._reference))
        looks = {"samples": self._look(decoder.decoded(codes, labels), len(codes)),
                 "reconstructions": self._look(self._some(decoder.reconstruct, some), some),
                 "originals": self._look(self._some(lambda images: images.astype(jnp.float32) / 255, some), some)}
        try:
            without = independent()
            looks[BY_POSITION] = self._look(decoder.decoded(without, np.full(len(without), -1)), len(without))
        except (OSError, ValueError) as error:
            if faults.machine_failed(error):
                raise
            self._leave_out(BY_POSITION, error)
        columns: dict[str, dict[str, float]] = {
            name: {distance: frechet.frechet_distance(*seen, *against[distance])
                   for distance, seen in look.statistics.items()} for name, look in looks.items()}
        for name, look in looks.items():
            columns[name] |= {} if look.score is None else {"inception_score": look.score}
        if self._probe:
            self._classify(self._probe, looks, columns)
        rows = {}
        if self._trained_on:
            rows = self._nearest(self._trained_on, codes[:options.neighbours], looks, columns)
        for name, look in looks.items():
            columns[name]["num_images"] = len(look.labels)
        weights = {file: digest for view in self._views.values() for file, digest in view.weights.items()}
        return Found(columns, self._failed, rows, weights)

    def _leave_out(self, what: str, error: Exception) -> None:
        self._failed[what] = " ".join(str(error).split())
        log.warning("%s is left out: %s", what, self._failed[what])

    def _open(self, source: Source, limit: int = 0) -> evaluate.Batches:
        config = self._decoder.config
        return evaluate.open_batches(config, source, self._bad_images, self._decoder.mesh, limit=limit,
                                     max_bad=config.data.max_bad)

    def _some(self, make: Callable[[jax.Array], jax.Array], number: int) -> Iterator[Batch]:
        """What is made of so many reference images."""
        for batch in evaluate.placed(self._open(self._reference, number), self._decoder.mesh):
            yield batch | {"image": make(batch["image"])}

    def _look(self, batches: Iterable[Batch], number: int) -> Look:
        sums: dict[str, frechet.MomentSums] = {}
        score, rows = None, []
        for batch in batches:
            seen = {name: view.see(batch["image"]) for name, view in self._views.items()}
            looks = {name: view.embedding(seen[name]) for name, view in self._views.items()}
            sums = instruments.add(sums, looks, batch["valid"])
            if FID in seen:
                logits, split = seen[FID].logits, inception_score.SPLIT
                score = inception_score.init(-(-number // split), logits.shape[-1]) if score is None else score
                score = _update_score(score, logits, batch["position"] // split, batch["valid"])
            *kept, valid = distributed.gather((looks[ENCODER], batch["label"], batch["valid"]))
            rows.append([values[valid] for values in kept])
        features, labels = (np.concatenate(side) for side in zip(*rows, strict=True))
        mean = None if score is None else inception_score.finish(score)[0]
        return Look(instruments.finished(sums), mean, features, labels)

    def _classify(self, source: Source, looks: dict[str, Look], columns: dict[str, dict[str, float]]) -> None:
        """Adds the share of images that a linear probe puts into their class, where they have one.

        It is fitted to the pretrained encoder's features of images, whatever it then classifies.
        """
        decoder = self._decoder
        learns = build.encoder_learns(decoder.config, decoder.arrays)
        fitted = probe.representations(decoder.graphdef, decoder.arrays, decoder.mesh,
                                       self._open(source, self._options.probe_limit),
                                       self._views[ENCODER] if learns else None)
        for name, look in looks.items():
            known = look.labels >= 0
            if known.any():
                columns[name]["probe_linear"] = linear_probe_top1(
                    fitted["encoder"], fitted["labels"], look.features[known], look.labels[known])

    def _nearest(self, source: Source, shown: np.ndarray, looks: dict[str, Look],
                 columns: dict[str, dict[str, float]]) -> dict[str, np.ndarray]:
        """Adds how near the nearest training image is, the mean cosine, and gives some samples with theirs.

        Those of images that were not trained on say how near they are that know nothing of the training images.
        """
        view, unit = self._views[ENCODER], lambda x: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        asked = {name: unit(look.features[:NEAREST_OF]) for name, look in looks.items()}
        best = {name: np.full(len(features), -2.0) for name, features in asked.items()}
        places = np.zeros(len(asked["samples"]), np.int64)
        for batch in evaluate.placed(self._open(source), self._decoder.mesh):
            embedding = view.embedding(view.see(batch["image"].astype(jnp.float32) / 255))
            embedding, valid, index = distributed.gather((embedding, batch["valid"], batch["index"]))
            others = unit(embedding[valid])
            for name, features in asked.items() if valid.any() else ():
                cosines = features @ others.T
                if name == "samples":
                    places = np.where(cosines.max(1) > best[name], index[valid][cosines.argmax(1)], places)
                best[name] = np.maximum(best[name], cosines.max(1))
        for name in looks:
            columns[name]["nearest_cosine"] = float(best[name].mean())
        nearest = []
        for batch in evaluate.placed(self._open(part(source, places[:len(shown)])), self._decoder.mesh):
            image, valid = distributed.gather((batch["image"], batch["valid"]))
            nearest.append(image[valid].astype(np.float32) / 255)
        return {"samples": np.concatenate(list(self._decoder.images(shown))),
                "nearest training images": np.concatenate(nearest)}


_update_score = jax.jit(inception_score.update, donate_argnums=0)


def write(found: Found, decoder: Decoder, options: Options, weights: Mapping[str, str], *, of: str,
          request: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Writes what was found, beside the samples: `OUT_metrics.json`, and `OUT_neighbours.png` if there are any.

    Args:
      found: see there.
      decoder: of the samples.
      options: of the measurement.
      weights: `{run that takes part: sha256 of its weights}`.
      of: the generator's run.
      request: what was sampled.
      out: where the samples are.

    Returns:
      the recipe in `OUT_metrics.json`.
    """
    samples, *rulers = found.columns
    made = recipe.recipe(
        decoder.config, data=f"samples of {of}", part="all", images=int(found.columns[samples]["num_images"]),
        reference=options.reference, weights={**weights, **found.weights}, run_weights=decoder.codes.weights,
        options={**recipe.plain(options), **request},
        configs={run: tensors.sha256(Path(run) / "config.json") for run in weights})
    name = out.name.removesuffix(".png").removesuffix(".npz")
    with disk_errors(out.parent):
        if found.neighbours:
            reporting.save_png(out.with_name(f"{name}_neighbours.png"), reporting.image_rows(found.neighbours))
        with whole(out.with_name(f"{name}_metrics.json")) as unfinished:
            unfinished.write_text(reporting.to_json({
                **found.columns[samples], "rulers": {name: found.columns[name] for name in rulers},
                "failed": found.failed, "recipe": made}, indent=2) + "\n")
    return made
