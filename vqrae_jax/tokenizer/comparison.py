"""Runs measured with all metrics on the same images, side by side: what `evaluate` and `study` do."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from vqrae_jax import config as config_lib
from vqrae_jax.config import Config
from vqrae_jax.data import BadImages, Source, faults, open_parts, open_source, part
from vqrae_jax.files import disk_errors, whole
from vqrae_jax.metrics import METRICS, Statistics
from vqrae_jax.metrics.codes import counts
from vqrae_jax.metrics.frechet import read_statistics
from vqrae_jax.metrics.intervals import bootstrap
from vqrae_jax.models.flat import Arrays
from vqrae_jax.models.inception import FEATURES
from vqrae_jax.tokenizer import build, evaluate, instruments, probe, recipe, report, robustness, runs
from vqrae_jax.tokenizer.evaluate import Evaluation, Instrument
from vqrae_jax.tokenizer.instruments import ENCODER, INCEPTION, LPIPS_VGG, ZERO_SHOT, View
from vqrae_jax.training import distributed, reporting
from vqrae_jax.training.checkpoint import Weights
from vqrae_jax.weights import tensors

log = logging.getLogger(__name__)
_FD_ENCODER = "fd_encoder"  # the Frechet distance on a run's own pretrained encoder
_EXTREMES = 8  # images that came out worst, and best, in the report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and on what; each is a flag of `evaluate`.

    Attributes:
      data: SPEC of the images; empty is what the first run was evaluated on.
      reference: SPEC of the images that distributions are compared with, or an .npz file of Inception's statistics;
        empty is the originals.
      fd: encoders, folders or hub ids, on whose features another Frechet distance is taken.
      probe: SPEC of images with labels that classifiers are fitted to; empty is no probe.
      probe_limit: only so many of them, always the same: their features are kept.
      classes: file of class names, one a line in the order of the labels, for zero-shot accuracy with the text tower of
        a SigLIP encoder; empty is none.
      inception: weights of the papers' Inception; empty is the first run's `eval.inception`.
      vgg16: weights for LPIPS; empty is the first run's `loss.perceptual.lpips_vgg16`, which is not downloaded.
      robustness: whether to measure reconstructions from codes of which some are replaced.
      limit: only so many images, always the same; 0 is all.
      max_bad: share of the images that may be unreadable; None is the run's `data.max_bad`.
      step: which checkpoint; None is the last.
      weights: of a run, its averages or the weights themselves.
    """

    data: str = ""
    reference: str = ""
    fd: tuple[str, ...] = ()
    probe: str = ""
    probe_limit: int = 50_000
    classes: str = ""
    inception: str = ""
    vgg16: str = ""
    robustness: bool = True
    limit: int = 0
    max_bad: float | None = None
    step: int | None = None
    weights: Weights = "ema"


class Result(NamedTuple):
    """What was measured of a run.

    Attributes:
      workdir: its folder.
      config: its config.
      metrics: numbers by name.
      intervals: 95 % bootstrap intervals of the metrics that are means over images.
      failed: why a metric has no number, in one line each.
      robustness: see `robustness.robustness`; empty where it was not measured.
      code_counts: `[K]`, uses of each code; empty without codes.
      originals: the first images, `[n, H, W, 3]` float32 in [0, 1].
      reconstructions: likewise.
      worst: images by PSNR, the worst first.
      best: likewise, the best first.
      weights: `{what was read: its sha256}`.
    """

    workdir: Path
    config: Config
    metrics: dict[str, Any]
    intervals: dict[str, tuple[float, float]]
    failed: dict[str, str]
    robustness: list[dict[str, Any]]
    code_counts: np.ndarray
    originals: np.ndarray
    reconstructions: np.ndarray
    worst: report.Extremes
    best: report.Extremes
    weights: dict[str, str]


class Comparison:
    """Measures runs on the same images with the same networks, which are read once.

    A metric whose network or data is missing is left out, with one line in the log and in `failed`; the others are
    measured all the same.

    Args:
      config: of the first run, which says of what images and where networks are.
      options: what to measure.
      mesh: the devices.
      out: folder for the names of images that cannot be read, which is made once the images are found.

    Attributes:
      bad_images: those that could not be read.
      failed: why what does not depend on a run could not be measured.
      data: SPEC of the images.
      part: which of them.
      images: how many there are, bad ones included.
      image_size: of the runs.

    Raises:
      ValueError, OSError: the images are not there.
    """

    def __init__(self, config: Config, options: Options, mesh: Mesh, out: Path):
        self._config, self._options, self._mesh, self.image_size = config, options, mesh, config.data.image_size
        self.data, self.part, self._source = _open(config, options.data)
        self.bad_images = _empty(out / "bad_images.jsonl")
        self.failed: dict[str, str] = {}
        self.images = min(options.limit or len(self._source), len(self._source))
        self._labelled = self._source.num_classes is not None
        tried = functools.partial(self._tried, self.failed)
        for metric in self._of_labels() if not self._labelled else ():
            self._note(self.failed, metric, f"the images of {self.data} have no labels")
        self._probe = tried("probe", lambda: open_source(options.probe, training=True)) if options.probe else None
        self._lpips = tried("lpips", lambda: instruments.lpips(config, mesh, options.vgg16))
        path = options.inception or config.eval.inception
        others = {f"fd_{instruments.fd_name(path)}": path for path in options.fd}
        if _FD_ENCODER in others or len(others) < len(options.fd):
            raise ValueError(f"--fd: distances on {', '.join(options.fd)} would be called alike, or {_FD_ENCODER}, for "
                             "the last parts of the paths name them: rename or link the folders")
        views = {"rfid": tried("rfid", lambda: instruments.inception_view(path, mesh)), **{
            metric: tried(metric, lambda path=path: instruments.encoder_view(path, mesh))
            for metric, path in others.items()}}
        self._views = {metric: view for metric, view in views.items() if view}
        self._reference: Source | None = None
        self._statistics = self._read_reference() if options.reference else {}

    def _read_reference(self) -> dict[str, Statistics]:
        """What reconstructions are compared with instead of the images, by metric."""
        reference = self._options.reference
        of_inception = reference.endswith(".npz")
        try:
            if of_inception:
                return {"rfid": read_statistics(reference, FEATURES)}
            self._reference = open_source(reference, training=False)
            return self._seen(self._views)
        except (OSError, ValueError) as error:
            if faults.machine_failed(error):
                raise
            for metric in ["rfid"] if of_inception else [*self._views, _FD_ENCODER]:
                self._note(self.failed, metric, error)
            return {}

    def _seen(self, views: Mapping[str, View]) -> dict[str, Statistics]:
        """Statistics of the reference images."""
        if not views or self._reference is None:
            return {}
        return instruments.statistics(views, self._batches(self._config, self._reference), self._mesh)

    def _of_labels(self) -> list[str]:
        """Metrics that a flag asks for and that take labels and the pretrained encoder."""
        asked = {"probe": self._options.probe, "zero_shot": self._options.classes}
        return [metric for metric, given in asked.items() if given]

    def _batches(self, config: Config, source: Source, limit: int = 0) -> evaluate.Batches:
        max_bad = config.data.max_bad if self._options.max_bad is None else self._options.max_bad
        return evaluate.open_batches(config, source, self.bad_images, self._mesh, limit=limit, max_bad=max_bad)

    def _tried(self, failed: dict[str, str], metric: str, make: Callable[[], Any]) -> Any:
        """What `make` makes, or None where it cannot, which is noted; what the machine cannot read ends all."""
        try:
            return make()
        except (OSError, ValueError) as error:
            if faults.machine_failed(error):
                raise
            self._note(failed, metric, error)
            return None

    def _note(self, failed: dict[str, str], metric: str, reason: Exception | str) -> None:
        failed[metric] = " ".join(str(reason).split())
        log.warning("%s is left out: %s", metric, failed[metric])

    def measure(self, workdir: Path) -> Result:
        """Measures a run.

        Raises:
          OSError, ValueError: it cannot be loaded, or its images have another size; or no image can be read.
        """
        options, mesh = self._options, self._mesh
        config, graphdef, arrays = runs.load_run(workdir, mesh, step=options.step, weights=options.weights)
        if config.data.image_size != self.image_size:
            raise ValueError(f"runs for images of different sizes, {self.image_size} and {config.data.image_size} in "
                             f"{workdir}, cannot be compared: one at a time")
        failed = dict(self.failed)
        tried = functools.partial(self._tried, failed)
        view = tried(_FD_ENCODER, lambda: instruments.pretrained_view(workdir, config, arrays, graphdef, mesh))
        need_view = [*self._of_labels(), *(["robustness"] if options.robustness else [])]
        for metric in [metric for metric in need_view if metric not in failed and not view]:
            self._note(failed, metric, f"it takes the pretrained encoder: {failed[_FD_ENCODER]}")
        metrics, perturbed = dict(METRICS), None
        if view and self._probe and self._labelled:
            limited = self._batches(config, self._probe, options.probe_limit)
            other = view if build.encoder_learns(config, arrays) else None
            if fitted := tried("probe", lambda: probe.representations(graphdef, arrays, mesh, limited, other)):
                metrics["probe"] = probe.probe(fitted)
        found = self._instruments(config, arrays, view, tried)
        evaluator = evaluate.Evaluator(graphdef, mesh, metrics, found)
        evaluation = evaluator(
            arrays, self._batches(config, self._source, options.limit), images=self.images, labelled=self._labelled,
            samples=self._config.eval.samples)
        for metric, reason in evaluation.failed.items():
            self._note(failed, metric, reason)
        if view and options.robustness:
            some = self._batches(config, self._source, min(self.images, robustness.IMAGES))
            perturbed = tried("robustness", lambda: robustness.robustness(graphdef, arrays, mesh, some, view))
        uses = counts(evaluation.sums["codes"]).sum(axis=0)
        worst, best = self._extremes(config, evaluator, arrays, evaluation)
        return Result(
            runs.folder(workdir), config, evaluation.metrics,
            {name: bootstrap(values) for name, values in evaluation.per_image.items() if np.isfinite(values).all()},
            failed, perturbed or [], uses if len(uses) > 1 else uses[:0], evaluation.originals,
            evaluation.reconstructions, worst, best,
            {str(workdir): runs.digest(arrays), **{file: digest for instrument in found.values()
                                                   for file, digest in instrument.weights.items()}})

    def _instruments(self, config: Config, arrays: Arrays, view: View | None,
                     tried: Callable[..., Any]) -> dict[str, Instrument]:
        """All instruments for a run; `view` is its own encoder."""
        found = {LPIPS_VGG: self._lpips} if self._lpips else {}
        for metric, shared in self._views.items():
            name, more = (INCEPTION, instruments.inception_metrics(self.images)) if metric == "rfid" else (metric, {})
            distance = None if metric in self.failed else metric  # of a reference that is not there
            if distance or more:
                found[name] = instruments.of_view(name, shared, distance, self._statistics.get(metric), more)
        if view:
            distance = None if _FD_ENCODER in self.failed else _FD_ENCODER
            given = self._seen({_FD_ENCODER: view}).get(_FD_ENCODER) if distance else None
            learns = build.encoder_learns(config, arrays)
            own = lambda seen: view.see(seen.images) if learns else seen.features
            found[ENCODER] = instruments.of_view(ENCODER, view, distance, given, instruments.encoder_metrics(), own)
            if self._options.classes and self._labelled:
                classes = Path(self._options.classes)
                zero_shot = tried("zero_shot", lambda: instruments.zero_shot(config, classes, self._mesh))
                found |= {ZERO_SHOT: zero_shot} if zero_shot else {}
        return found

    def _extremes(self, config: Config, evaluator: evaluate.Evaluator, arrays: Arrays,
                  evaluation: Evaluation) -> tuple[report.Extremes, report.Extremes]:
        """The images with the least and the greatest PSNR, read once more; what is not a number is worst."""
        psnr = evaluation.per_image["psnr"]
        order = np.argsort(np.where(np.isnan(psnr), -np.inf, psnr), kind="stable")
        chosen = [order[:_EXTREMES], order[::-1][:_EXTREMES]]
        places = np.concatenate(chosen)
        again = part(self._source, evaluation.places[places])
        originals, reconstructions = evaluator.pictures(arrays, self._batches(config, again))
        values = {name: of_images[places].tolist() for name, of_images in evaluation.per_image.items()}
        names = [again.name(i) for i in range(len(again))]
        of = lambda some: report.Extremes(originals[some], reconstructions[some], names[some],
                                          {name: of_images[some] for name, of_images in values.items()})
        return of(slice(0, len(chosen[0]))), of(slice(len(chosen[0]), None))

    def recipe(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """What the numbers of runs were measured on, for `metrics.json`."""
        weights = {file: digest for result in results.values() for file, digest in result.weights.items()}
        if self._statistics and self._reference is None:
            weights[self._options.reference] = tensors.sha256(Path(self._options.reference).expanduser())
        return recipe.recipe(
            self._config, data=self.data, part=self.part, reference=self._reference_name(),
            images=next(iter(results.values())).metrics["num_images"], weights=weights,
            options=recipe.plain(self._options),
            configs={name: tensors.sha256(result.workdir / "config.json") for name, result in results.items()},
            run_weights=self._options.weights)

    def _reference_name(self) -> str:
        reference = self._options.reference
        return f"the same images, of rfid {reference}" if reference.endswith(".npz") else reference or "the same images"

    def missing(self, results: Mapping[str, Result]) -> str:
        """What of the metrics that a flag asks for could not be measured, and why, in one line."""
        options, failed = self._options, {**self.failed, **{
            metric: reason for result in results.values() for metric, reason in result.failed.items()}}
        by_flag = [(options.inception, ["rfid", "inception_score"]), (options.reference, ["rfid", _FD_ENCODER]),
                   (options.vgg16, ["lpips"]), (options.probe, ["probe"]),
                   (options.classes, ["zero_shot", "zero_shot_encoder", "zero_shot_features"]),
                   (options.fd, [f"fd_{instruments.fd_name(path)}" for path in options.fd])]
        asked = {metric for flag, metrics in by_flag if flag for metric in metrics}
        return "; ".join(f"{metric}: {reason}" for metric, reason in failed.items() if metric in asked)

    def write(self, results: Mapping[str, Result], out: Path) -> None:
        """Writes `metrics.json`, `reconstructions.png` and `report.html` into a folder."""
        differing = config_lib.differing({name: result.config for name, result in results.items()})
        made = self.recipe(results)
        columns = {name: _content(result) for name, result in results.items()}
        content = {**next(iter(columns.values()))} if len(columns) == 1 else {"runs": columns, "config": differing}
        content |= {"data": self.data, "part": self.part, "weights": self._options.weights,
                    "left_out": self.bad_images.names(), "recipe": made}
        first = next(iter(results.values()))
        rows = {"original": first.originals, **{
            f"{name}  {result.metrics['psnr']:.2f} dB": result.reconstructions for name, result in results.items()}}
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            reporting.save_png(out / "reconstructions.png", reporting.image_rows(rows))
            report.write_report(out / "report.html", title=" · ".join(results), recipe=made, runs={
                name: report.RunReport(
                    result.metrics, result.intervals, result.failed, result.originals, result.reconstructions,
                    result.worst, result.best, result.code_counts, result.robustness,
                    report.curves(result.workdir / "metrics.jsonl"), differing[name])
                for name, result in results.items()})
            # The last: where it is, everything is.
            with whole(out / "metrics.json") as unfinished:
                unfinished.write_text(reporting.to_json(content, indent=2) + "\n")


def _content(result: Result) -> dict[str, Any]:
    return {**result.metrics, "intervals": result.intervals, "robustness": result.robustness, "failed": result.failed}


def _empty(file: Path) -> BadImages:
    """A record of bad images in a file that begins anew; its folder is made."""
    with disk_errors(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        if distributed.is_first():
            file.unlink(missing_ok=True)
    distributed.wait_for_all("start of evaluation")
    return BadImages(file)


def _open(config: Config, data: str) -> tuple[str, str, Source]:
    """SPEC, part and images of an evaluation."""
    if spec := data or config.eval.source:
        return spec, "all", open_source(spec, training=False)
    training, held_out = open_parts(config.data.source, holdout=config.data.holdout)
    source = evaluate.choose_source(config, training, held_out)
    return config.data.source, "held out" if source is held_out else "all", source
