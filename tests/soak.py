"""A run of 20,000 steps in small: does anything grow?

    python -m tests.soak FOLDER [STEPS]

trains a tiny config in FOLDER, with a worker process, images that cannot be read, checkpoints, evaluations and
pictures, and looks at memory, descriptors, threads and the time of a step every hundred steps. FOLDER/soak.jsonl has
what it saw, FOLDER/soak.png the curves, and the table is printed. It takes 5 to 15 minutes, and needs Linux with glibc.
"""

import ctypes
import functools
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from tests.conftest import tiny
from vqrae_jax import config as config_lib
from vqrae_jax.tokenizer import report, task
from vqrae_jax.training.reporting import Reporter

STEPS, EVERY, WARM_UP = 20_000, 100, 0.2
IMAGES, BAD = 300, 8  # of the source, and how many of them cannot be read
PANELS = {"allocated": "allocated by the process, MB", "process": "memory of the process, MB",
          "all": "with its worker, MB", "descriptors": "descriptors",
          "threads": "threads", "step": "a step, ms", "cpu": "processor time of a step, ms"}


def train(folder: Path, steps: int) -> list[dict[str, float]]:
    """Trains, and gives what was seen every `EVERY` steps: a value of every panel, and `step_number`."""
    images, seen = folder / "images", []
    images.mkdir(parents=True, exist_ok=True)
    for i in range(IMAGES):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{i:03d}.png")
        if i < BAD:
            (images / f"{i:03d}.png").write_bytes((images / f"{i:03d}.png").read_bytes()[:100 * i])
    values = tiny()
    values.data.update(source=f"folder:{images}", workers=1, max_bad=0.1, holdout=0.1)
    values.train.update(steps=steps, log_every=EVERY, checkpoint_every=2 * EVERY, eval_every=5 * EVERY)
    values.log.tensorboard = True
    write, spent = Reporter.write, time.process_time()

    def look(reporter, step, metrics, timings):
        nonlocal spent
        write(reporter, step, metrics, timings)
        if timings:  # of a training step, where the evaluation and the save before it are included in `cpu` alone
            pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
            before, spent = spent, time.process_time()
            seen.append({"step_number": step, "allocated": _allocated(), "process": _megabytes(pids[0]),
                         "all": sum(map(_megabytes, pids)),
                         "descriptors": len(os.listdir("/proc/self/fd")),
                         "threads": len(os.listdir("/proc/self/task")),
                         "step": 1000 * values.train.batch_size / timings["images_per_second"],
                         "cpu": 1000 * (spent - before) / EVERY})
            with (folder / "soak.jsonl").open("a") as file:
                file.write(json.dumps(seen[-1]) + "\n")

    Reporter.write = functools.wraps(write)(look)
    try:
        task.train(config_lib.parse(values), folder / "run")
    finally:
        Reporter.write = write
    return seen


def _megabytes(pid: int) -> float:
    """What a process holds in memory beside files, of which the kernel takes pages back as it likes."""
    status = Path(f"/proc/{pid}/status").read_text()
    held = re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.MULTILINE)
    return sum(map(int, held)) / 1000


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def _allocated() -> float:
    """What the process has allocated and not freed, in MB; the C library holds more, of which it makes what is next."""
    call = ctypes.CDLL(None).mallinfo2
    call.restype = _MallInfo
    of = call()
    return (of.uordblks + of.hblkhd) / 1e6


def growth(seen: list[dict[str, float]]) -> dict[str, float]:
    """Of every panel, what it grows by in 1,000 steps after the warm-up: the slope of the line of least squares."""
    late = [line for line in seen if line["step_number"] > WARM_UP * seen[-1]["step_number"]]
    steps = [line["step_number"] / 1000 for line in late]
    return {name: statistics.linear_regression(steps, [line[name] for line in late]).slope for name in PANELS}


def draw(file: Path, seen: list[dict[str, float]]) -> None:
    """The curves as a PNG."""
    with matplotlib.rc_context(report.STYLE):
        figure = Figure(figsize=(11, 5), layout="constrained")
        panels = figure.subplots(2, 4).ravel()
        steps, slopes = [line["step_number"] for line in seen], growth(seen)
        for axes, (name, title) in zip(panels, PANELS.items(), strict=False):
            values = [line[name] for line in seen]
            axes.plot(steps, values, linewidth=0.8)
            axes.axvline(WARM_UP * steps[-1], color="grey", linewidth=0.6, linestyle=":")
            axes.set_title(f"{title}\n{slopes[name]:+.3f} per 1,000 steps", fontsize=9)
            axes.set(ylim=(0, 1.15 * np.percentile(values, 99)), xlabel="step")
        panels[-1].set_visible(False)
        figure.savefig(file, format="png", dpi=110)


def main(folder: Path, steps: int) -> None:
    seen = train(folder, steps)
    draw(folder / "soak.png", seen)
    slopes = growth(seen)
    for name, title in PANELS.items():
        late = [line[name] for line in seen if line["step_number"] > WARM_UP * steps]
        print(f"{title:24}  from {min(late):8.2f} to {max(late):8.2f}, {slopes[name]:+.4f} per 1,000 steps")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else STEPS)
