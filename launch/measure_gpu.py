"""Measures one GPU, row by row, until the time is over: what `launch/measure_gpu.sh` runs.

    python launch/measure_gpu.py --json=gpu.json [--seconds=N] [--only=ROW ...] [--config=FILE ...] [--batch=N]

The same command goes on with the rows that are missing. `vqrae_jax/cost/gpu.py` says what they are.
"""

import json
import platform
import time
from importlib import metadata
from pathlib import Path

import jax
from absl import flags

from vqrae_jax import cli, files
from vqrae_jax.cost import gpu

LEAST_SECONDS = 30  # with less no row is begun
MOST_SHARE = 0.3  # of --seconds that a row may take


def versions() -> dict[str, str]:
    """What results depend on beside our code; results of different ones are not mixed."""
    found = {"python": platform.python_version()}
    for package in ("vqrae_jax", "jax", "jaxlib", "torch"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none"
    said = [*Path("/proc/driver/nvidia").glob("version"), *Path("/proc/driver/nvidia").glob("gpus/*/information")]
    found["driver"] = " / ".join(" ".join(file.read_text().splitlines()[0].split()) for file in said)
    return found


def main(_) -> None:
    started, file = time.monotonic(), Path(_JSON.value)
    if not file.parent.is_dir():  # before the work
        raise FileNotFoundError(f"--json={file}: there is no folder {file.parent}")
    jax.config.update("jax_platforms", "cpu")  # of this process: the GPU is for those that it starts
    measured, setting = {}, {"versions": versions(), "batch": _BATCH.value}
    if file.exists():
        before = json.loads(file.read_text())
        measured = before.pop("rows")
        if before != setting:
            raise ValueError(f"{file} holds measurements of other versions, another machine or batch: give another "
                             "--json")
    for key, config, name in gpu.rows(_CONFIG.value):
        if _ONLY.value and name not in _ONLY.value:
            continue
        left = _SECONDS.value - (time.monotonic() - started)
        if key not in measured or "error" in measured[key]:
            if left < LEAST_SECONDS:
                measured[key] = {"error": "not run: no time was left, the same command goes on with it"}
            else:
                try:
                    measured[key] = gpu.measure(config, name, batch=_BATCH.value, repeats=_REPEATS.value,
                                                against=None if _AGAINST.value == "none" else _AGAINST.value,
                                                seconds=min(left, MOST_SHARE * _SECONDS.value))
                except ValueError as error:
                    measured[key] = {"error": str(error)}
            with files.disk_errors(file.parent), files.whole(file) as unfinished:  # each time: nothing is lost
                unfinished.write_text(json.dumps({**setting, "rows": measured}, indent=2) + "\n")
        print(gpu.line(key, measured[key]), flush=True)


if __name__ == "__main__":
    _CONFIG = flags.DEFINE_multi_string(
        "config", ["configs/siglip2_so400m_256_stage1.py", "configs/siglip_l_stage1.py"], "files of configs/")
    _JSON = flags.DEFINE_string("json", "gpu.json", "file for the results")
    _SECONDS = flags.DEFINE_float("seconds", 540, "after which no row goes on", lower_bound=0)
    _ONLY = flags.DEFINE_multi_enum("only", None, list(gpu.ROWS), "only this row; may be repeated")
    _BATCH = flags.DEFINE_integer("batch", 64, "images at once; some rows take a part of it", lower_bound=1)
    _REPEATS = flags.DEFINE_integer("repeats", 7, "runs that count", lower_bound=1)
    _AGAINST = flags.DEFINE_enum("against", "torch.compile", ["torch.compile", "torch", "none"], "what takes turns")
    cli.run(main)
