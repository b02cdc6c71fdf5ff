"""Evaluates runs: pixels, codes, features, distributions, and what happens to damaged codes.

    python -m vqrae_jax.evaluate --workdir=DIR [--data=SPEC] [--reference=SPEC] [--probe=SPEC] [--out=DIR]

prints a table and writes `metrics.json`, `reconstructions.png` and `report.html`. Without --data the images are those
of the first run's `eval.source`, or all that were held out of its `data.source`. Given several times, or as a pattern
such as 'runs/dim*', --workdir puts the runs side by side, on the same images, with the config keys in which they
differ. Images are resized bicubically to the run's size on the short side and cropped to the centre; original and
reconstruction are compared on exactly these pixels. A metric whose weights are not there is left out, and a line says
how to get them.
"""

import glob
from pathlib import Path

from absl import flags

from vqrae_jax import cli
from vqrae_jax import config as config_lib
from vqrae_jax.tokenizer import evaluate, recipe, runs
from vqrae_jax.tokenizer.comparison import Comparison, Options
from vqrae_jax.training import distributed, sharding


def main(_) -> None:
    _JOIN_PROCESSES()
    mesh = sharding.make_mesh(config_lib.Mesh())
    workdirs = [folder for pattern in _WORKDIR.value for folder in _folders(pattern)]
    names = _labels(workdirs)
    out = Path(_OUT.value or workdirs[0] / "evaluation")
    configs = [config_lib.load(runs.folder(workdir) / "config.json") for workdir in workdirs]
    if len(sizes := {config.data.image_size for config in configs}) > 1:  # before the work
        raise ValueError(f"runs for images of different sizes, {sorted(sizes)}, cannot be compared: one at a time")
    options = Options(**{name: flag.value for name, flag in _OPTIONS.items()})
    comparison = Comparison(configs[0], options, mesh, out)
    results = {name: comparison.measure(workdir) for name, workdir in zip(names, workdirs, strict=True)}
    distributed.wait_for_all("end of evaluation")  # and what every process could not read is in the file
    if not distributed.is_first():
        return
    differing = config_lib.differing({name: result.config for name, result in results.items()})
    print(evaluate.table({name: {**differing[name], **result.metrics} for name, result in results.items()}))
    print(recipe.line(comparison.recipe(results)))
    for name, reason in comparison.bad_images.names().items():
        print(f"left out: {name}: {reason}")
    comparison.write(results, out)
    print(f"wrote {out / 'metrics.json'}, {out / 'reconstructions.png'} and {out / 'report.html'}")
    if missing := comparison.missing(results):
        raise ValueError(f"not all that was asked for could be measured: {missing}")


def _folders(pattern: str) -> list[Path]:
    """The folder itself, or the runs that match."""
    if Path(pattern).is_dir() or not glob.has_magic(pattern):
        return [Path(pattern)]
    found = [Path(folder) for folder in sorted(glob.glob(pattern)) if (Path(folder) / "config.json").exists()]
    if not found:
        raise FileNotFoundError(f"--workdir={pattern} matches no folder of a run")
    return found


def _labels(workdirs: list[Path]) -> list[str]:
    names = [workdir.resolve().name for workdir in workdirs]
    return names if len(set(names)) == len(names) else [str(workdir) for workdir in workdirs]


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_multi_string("workdir", None, "folder of a run, or nano, or a pattern; several are "
                                         "compared", required=True)
    _OUT = flags.DEFINE_string("out", "", "folder for the results; empty is WORKDIR/evaluation")
    _OPTIONS = {
        "data": flags.DEFINE_string("data", "", "SPEC of the images; empty is what the first run was evaluated on"),
        "reference": flags.DEFINE_string("reference", "", "SPEC of the images that Frechet distances compare with, or "
                                         "an .npz file with Inception's mu and sigma; empty is the originals"),
        "fd": flags.DEFINE_multi_string("fd", [], "encoder, a folder or hub id, for another Frechet distance"),
        "probe": flags.DEFINE_string("probe", "", "SPEC of images with labels to fit kNN and a linear probe to"),
        "classes": flags.DEFINE_string("classes", "", "file of class names, one a line in the order of the labels, for "
                                       "zero-shot accuracy with the text tower of a SigLIP encoder"),
        "probe_limit": flags.DEFINE_integer("probe_limit", Options.probe_limit, "only so many images of --probe",
                                            lower_bound=1),
        "inception": flags.DEFINE_string("inception", "", "weights of the papers' Inception; empty is eval.inception"),
        "vgg16": flags.DEFINE_string("vgg16", "", "VGG16's weights for LPIPS, a file, a folder or a hub id; empty is "
                                     "loss.perceptual.lpips_vgg16, if it is on this machine"),
        "robustness": flags.DEFINE_bool("robustness", True, "measure what replaced codes do"),
        "step": flags.DEFINE_integer("step", None, "which checkpoint; the last if not given"),
        "weights": cli.weights(),
        "limit": flags.DEFINE_integer("limit", 0, "only so many images, always the same; 0 is all", lower_bound=0),
        "max_bad": flags.DEFINE_float("max_bad", None, "share of the images that may be unreadable; the run's "
                                      "data.max_bad if not given", lower_bound=0.0, upper_bound=1.0)}
    _JOIN_PROCESSES = cli.join_processes()
    cli.run(main)
