"""Evaluates runs: PSNR, SSIM, code usage, kNN on the continuous features, and a picture.

    python -m vqrae_jax.evaluate --workdir=DIR [--data=SPEC] [--out=DIR]

prints a table and writes `metrics.json` and `reconstructions.png`. Given several times, --workdir puts the runs side by
side, on the same images. Images are resized bicubically to the run's size on the short side and cropped to the centre;
original and reconstruction are compared on exactly these pixels, as float32 in [0, 1].
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh

from vqrae_jax import build, checkpoint, cli, distributed, reporting, sharding, step
from vqrae_jax import config as config_lib
from vqrae_jax.config import Config
from vqrae_jax.data import BadImages, Source, eval_batches
from vqrae_jax.metrics import knn_top1
from vqrae_jax.models.flat import Arrays
from vqrae_jax.models.quantizers import code_usage, perplexity

Batch = dict[str, Any]


def spec(config: Config) -> str:
    """The SPEC of a config's evaluation images."""
    return config.eval.source or config.data.source


def open_batches(config: Config, source: Source, bad_images: BadImages, mesh: Mesh, *, limit: int) -> Iterable[Batch]:
    """This process's share of the images of a source, at a config's size.

    Args:
      config: of the run; `eval.batch_size` is rounded up to a multiple of the devices.
      source: of the images.
      bad_images: collects the images that cannot be read.
      mesh: whose devices evaluate.
      limit: > 0 takes only so many images, always the same.
    """
    batch_size = math.ceil(config.eval.batch_size / mesh.size) * mesh.size
    return eval_batches(source, image_size=config.data.image_size, batch_size=batch_size // jax.process_count(),
                        bad_images=bad_images, limit=limit or None, shard_index=jax.process_index(),
                        shard_count=jax.process_count())


def evaluate(eval_step: step.EvalStep, arrays: Arrays, mesh: Mesh, batches: Iterable[Batch],
             *, samples: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Evaluates a model on all images of `batches`, those of all processes.

    Args:
      eval_step: jitted, from `step.make_eval_step`.
      arrays: all the model's parameters and codebook state.
      mesh: the devices that hold them, and take a share of every batch.
      batches: as `data.eval_batches` yields them.
      samples: how many images to keep for a picture, from the first batches.

    Returns:
      metrics and pictures. Metrics: `psnr` (dB) and `ssim`, means over images; where there are codes, `code_usage`, the
      share of them that any image hit, and `code_perplexity`, exp of the entropy of their usage histogram; `knn_top1`,
      leave-one-out over the images on the mean of their continuous features (only where there are at least two labels,
      and one of them twice); `num_images`. Pictures: `original` and `reconstruction`, float32 `[samples, H, W, 3]` in
      [0, 1].

    Raises:
      ValueError: no image could be read.
    """
    psnr, ssim, features, labels, originals, reconstructions = [], [], [], [], [], []
    counts, kept = np.zeros((), np.int64), 0
    for local in batches:
        batch = sharding.put_batch(mesh, {name: local[name] for name in ("image", "valid", "label")})
        result = eval_step(arrays, batch["image"], batch["valid"])
        if kept >= samples:
            del batch["image"], result["images"]  # large, and no longer needed by all processes
        batch, result = distributed.gather((batch, result))
        valid = batch["valid"]
        psnr.append(result["psnr"][valid])
        ssim.append(result["ssim"][valid])
        features.append(result["features"][valid])
        labels.append(batch["label"][valid])
        counts = counts + result["counts"].astype(np.int64)
        if kept < samples:
            originals.append(batch["image"][valid][:samples - kept].astype(np.float32) / 255)
            reconstructions.append(result["images"][valid][:samples - kept])
            kept += len(originals[-1])
    if not sum(map(len, psnr)):
        raise ValueError("none of the images can be read")
    psnr, ssim, features, labels = (np.concatenate(parts) for parts in (psnr, ssim, features, labels))
    metrics = {
        "psnr": float(psnr.mean(dtype=np.float64)),
        "ssim": float(ssim.mean(dtype=np.float64)),
    }
    if len(counts) > 1:
        metrics["code_usage"] = float(code_usage(jnp.asarray(counts)))
        metrics["code_perplexity"] = float(perplexity(jnp.asarray(counts)))
    if labels.min() >= 0 and 1 < len(np.unique(labels)) < len(labels):
        metrics["knn_top1"] = knn_top1(features, labels)
    metrics["num_images"] = len(psnr)
    return metrics, {"original": np.concatenate(originals), "reconstruction": np.concatenate(reconstructions)}


def table(columns: dict[str, dict[str, float]]) -> str:
    """`{run: metrics}` as text, one column a run."""
    names = list(dict.fromkeys(name for metrics in columns.values() for name in metrics))
    rows = [["", *columns]] + [[name, *(_cell(metrics, name) for metrics in columns.values())] for name in names]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) if i else cell.ljust(width)
                               for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows)


def _cell(metrics: dict[str, float], name: str) -> str:
    if name not in metrics:
        return "-"
    return str(metrics[name]) if name == "num_images" else f"{metrics[name]:.4f}"


def main(_) -> None:
    distributed.start()
    mesh = sharding.make_mesh(config_lib.Mesh())
    workdirs = [Path(workdir) for workdir in _WORKDIR.value]
    names = _labels(workdirs)
    out = Path(_OUT.value or workdirs[0] / "evaluation")
    configs = [config_lib.load(workdir / "config.json") for workdir in workdirs]
    if len(sizes := {config.data.image_size for config in configs}) > 1:
        raise ValueError(f"runs for images of different sizes, {sorted(sizes)}, cannot be compared: one at a time")
    data = _DATA.value or spec(configs[0])
    source, bad_file = build.data_source(data, training=False), out / "bad_images.jsonl"
    with checkpoint.disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)  # before the work, and after what may be misspelt
        if distributed.is_first():
            bad_file.unlink(missing_ok=True)
    distributed.wait_for_all("start of evaluation")
    bad_images = BadImages(bad_file)
    columns, rows = {}, {}
    for name, workdir in zip(names, workdirs, strict=True):
        config, graphdef, arrays = checkpoint.load_run(workdir, mesh, step=_STEP.value)
        batches = open_batches(config, source, bad_images, mesh, limit=_LIMIT.value)
        columns[name], pictures = evaluate(jax.jit(sharding.on(mesh, step.make_eval_step(graphdef))), arrays, mesh,
                                           batches, samples=configs[0].eval.samples)
        rows.setdefault("original", pictures["original"])
        rows[f"{name}  {columns[name]['psnr']:.2f} dB"] = pictures["reconstruction"]

    distributed.wait_for_all("end of evaluation")  # and what every process could not read is in the file
    if not distributed.is_first():
        return
    print(f"data: {data}")
    print(table(columns))
    for name, reason in bad_images.names().items():
        print(f"left out: {name}: {reason}")
    shared = {"data": data, "left_out": bad_images.names()}
    content = {**columns[names[0]], **shared} if len(names) == 1 else {"runs": columns, **shared}
    with checkpoint.disk_errors(out):
        (out / "metrics.json").write_text(reporting.to_json(content, indent=2) + "\n")
        reporting.save_png(out / "reconstructions.png", reporting.image_rows(rows))
    print(f"wrote {out / 'metrics.json'} and {out / 'reconstructions.png'}")


def _labels(workdirs: list[Path]) -> list[str]:
    names = [workdir.resolve().name for workdir in workdirs]
    return names if len(set(names)) == len(names) else [str(workdir) for workdir in workdirs]


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_multi_string("workdir", None, "folder of a run; several are compared", required=True)
    _DATA = flags.DEFINE_string("data", "", "SPEC of the images; empty is what the first run's config says")
    _OUT = flags.DEFINE_string("out", "", "folder for the results; empty is WORKDIR/evaluation")
    _STEP = flags.DEFINE_integer("step", None, "which checkpoint; the last if not given")
    _LIMIT = flags.DEFINE_integer("limit", 0, "only so many images, always the same; 0 is all", lower_bound=0)
    cli.run(main)
