"""Evaluates runs: PSNR, SSIM, code usage, kNN on the continuous features, and a picture.

    python -m vqrae_jax.evaluate --workdir=DIR [--data=SPEC] [--weights=ema|raw] [--out=DIR]

prints a table and writes `metrics.json` and `reconstructions.png`. Without --data the images are those of the first
run's `eval.source`, or all that were held out of its `data.source`. Given several times, or as a pattern such as
'runs/dim*', --workdir puts the runs side by side, on the same images, with the config keys in which they differ. Images
are resized bicubically to the run's size on the short side and cropped to the centre; original and reconstruction are
compared on exactly these pixels, as float32 in [0, 1].
"""

import glob
from pathlib import Path

from absl import flags

from vqrae_jax import cli
from vqrae_jax import config as config_lib
from vqrae_jax.data import BadImages, open_parts, open_source
from vqrae_jax.tokenizer import evaluate, runs
from vqrae_jax.training import distributed, reporting, sharding
from vqrae_jax.training.files import disk_errors


def main(_) -> None:
    _JOIN_PROCESSES()
    mesh = sharding.make_mesh(config_lib.Mesh())
    workdirs = [folder for pattern in _WORKDIR.value for folder in _folders(pattern)]
    names = _labels(workdirs)
    out = Path(_OUT.value or workdirs[0] / "evaluation")
    configs = [config_lib.load(workdir / "config.json") for workdir in workdirs]
    if len(sizes := {config.data.image_size for config in configs}) > 1:
        raise ValueError(f"runs for images of different sizes, {sorted(sizes)}, cannot be compared: one at a time")
    data, part = _DATA.value or configs[0].eval.source, "all"
    if data:
        source = open_source(data, training=False)
    else:
        data = configs[0].data.source
        training, held_out = open_parts(data, holdout=configs[0].data.holdout)
        source = evaluate.choose_source(configs[0], training, held_out)
        part = "held out" if source is held_out else part
    bad_file = out / "bad_images.jsonl"
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)  # before the work, and after what may be misspelt
        if distributed.is_first():
            bad_file.unlink(missing_ok=True)
    distributed.wait_for_all("start of evaluation")
    bad_images = BadImages(bad_file)
    columns, rows = {}, {}
    for name, workdir in zip(names, workdirs, strict=True):
        config, graphdef, arrays = runs.load_run(workdir, mesh, step=_STEP.value, weights=_WEIGHTS.value)
        max_bad = config.data.max_bad if _MAX_BAD.value is None else _MAX_BAD.value
        batches = evaluate.open_batches(config, source, bad_images, mesh, limit=_LIMIT.value, max_bad=max_bad)
        columns[name], pictures = evaluate.evaluate(evaluate.make_eval_step(graphdef, mesh), arrays, mesh, batches,
                                                    samples=configs[0].eval.samples)
        rows.setdefault("original", pictures["original"])
        rows[f"{name}  {columns[name]['psnr']:.2f} dB"] = pictures["reconstruction"]

    distributed.wait_for_all("end of evaluation")  # and what every process could not read is in the file
    if not distributed.is_first():
        return
    differing = config_lib.differing(dict(zip(names, configs, strict=True)))
    print(f"data: {data}, {part}; weights: {_WEIGHTS.value}")
    print(evaluate.table({name: {**differing[name], **columns[name]} for name in columns}))
    for name, reason in bad_images.names().items():
        print(f"left out: {name}: {reason}")
    shared = {"data": data, "part": part, "weights": _WEIGHTS.value, "left_out": bad_images.names()}
    content = {**columns[names[0]], **shared} if len(names) == 1 else {
        "runs": columns, "config": differing, **shared}
    with disk_errors(out):
        (out / "metrics.json").write_text(reporting.to_json(content, indent=2) + "\n")
        reporting.save_png(out / "reconstructions.png", reporting.image_rows(rows))
    print(f"wrote {out / 'metrics.json'} and {out / 'reconstructions.png'}")


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
    _WORKDIR = flags.DEFINE_multi_string("workdir", None, "folder of a run, or a pattern; several are compared",
                                         required=True)
    _DATA = flags.DEFINE_string("data", "", "SPEC of the images; empty is what the first run was evaluated on")
    _OUT = flags.DEFINE_string("out", "", "folder for the results; empty is WORKDIR/evaluation")
    _STEP = flags.DEFINE_integer("step", None, "which checkpoint; the last if not given")
    _WEIGHTS = cli.weights()
    _LIMIT = flags.DEFINE_integer("limit", 0, "only so many images, always the same; 0 is all", lower_bound=0)
    _MAX_BAD = flags.DEFINE_float("max_bad", None, "share of the images that may be unreadable; the run's data.max_bad "
                                  "if not given", lower_bound=0.0, upper_bound=1.0)
    _JOIN_PROCESSES = cli.join_processes()
    cli.run(main)
