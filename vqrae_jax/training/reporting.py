"""What a run tells: progress, metrics.jsonl, TensorBoard, pictures, and Weights & Biases on request."""

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from vqrae_jax.config import Run
from vqrae_jax.files import disk_errors, whole
from vqrae_jax.training import distributed
from vqrae_jax.training.task import Best

log = logging.getLogger(__name__)
_EVALUATION = "eval/"
_SECONDS = 10  # between two lines of `shown`
_LIVE_SECONDS = 0.5  # the same on a terminal, where a line is overwritten
Item = TypeVar("Item")


@contextlib.contextmanager
def progress_shown() -> Iterator[None]:
    """Lets progress reach stderr where logging is as Python leaves it, with the root logger's level above INFO."""
    logger = logging.getLogger("vqrae_jax")
    if logger.handlers or logger.level or logger.isEnabledFor(logging.INFO):
        yield
        return
    handler, propagate = _Progress(), logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        logger.propagate = propagate


class Lines(logging.StreamHandler):
    """Writes a line a record. On a terminal, progress is one more line below them, which is overwritten.

    Args:
      stream: where to; sys.stderr if None.
    """

    def __init__(self, stream: TextIO | None = None):
        super().__init__(stream)
        self._progress = None

    def show(self, text: str) -> None:
        """Shows how far something is, instead of what was shown before."""
        with self.lock or contextlib.nullcontext():
            if self._progress is None:
                self._progress = tqdm(bar_format="{desc}", file=self.stream, leave=False, dynamic_ncols=True)
            self._progress.set_description_str(text)

    def clear(self) -> None:
        """Shows no progress any more."""
        with self.lock or contextlib.nullcontext():
            if self._progress is not None:
                self._progress.close()
            self._progress = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            self.clear()  # the last line
        with tqdm.external_write_mode(self.stream) if self._progress is not None else contextlib.nullcontext():
            super().emit(record)


class _Progress(Lines):
    """Writes what the root logger's level keeps from its handlers, if it has any; the rest goes there as ever."""

    def emit(self, record: logging.LogRecord) -> None:
        root = logging.getLogger()
        if root.handlers and record.levelno >= root.level:
            root.handle(record)
        else:
            super().emit(record)


def _terminal() -> Lines | None:
    """What writes on a terminal, if something does that shows progress."""
    if not log.isEnabledFor(logging.INFO):
        return None
    # A terminal may not know its size, as in some containers; lines then.
    is_one = lambda stream: stream.isatty() and all(os.get_terminal_size(stream.fileno()))
    return next((handler for handler in logging.getLogger("vqrae_jax").handlers
                 if isinstance(handler, Lines) and is_one(handler.stream)), None)


class Parts:
    """How long something took, from when this is made, and its parts: `12.3 s (arrays 8.1 s, the step 4.2 s)`."""

    def __init__(self):
        self._ends = [("", time.perf_counter())]

    def end(self, part: str) -> None:
        """Says that a part ends here, which began where the one before it ended."""
        self._ends.append((part, time.perf_counter()))

    def __str__(self) -> str:
        parts = [f"{part} {end - begin:.1f} s" for (_, begin), (part, end) in itertools.pairwise(self._ends)]
        return f"{self._ends[-1][1] - self._ends[0][1]:.1f} s ({', '.join(parts)})"


class Reporter:
    """Writes a run's metrics. `metrics.jsonl` holds only what is a function of config and step, never times.

    So the file of a run that was killed and continued is the same, byte for byte, as that of one that was not. Lines of
    steps after `first_step`, which an interrupted run may have left, are dropped at the start; if the others do not
    begin with `saved_lines`, those of the checkpoint, the file was damaged, and begins anew with these. Throughput is
    reported in `unit` ("images") a second, `train.batch_size` of them a step.

    Attributes:
      evaluations: the metrics of every evaluation so far, by step.
    """

    def __init__(self, workdir: Path, config: Run, *, unit: str, first_step: int, saved_lines: list[str] | None):
        self._unit = unit
        self._workdir, self._config, self._writes = workdir, config, distributed.is_first()
        self._file = workdir / "metrics.jsonl"
        self._tensorboard = self._wandb = None
        lines = lines_until(self._file, first_step)
        if saved_lines is not None and lines[:len(saved_lines)] != saved_lines:
            log.warning("%s is damaged: it goes on as it was at step %d", self._file, first_step)
            lines = saved_lines
        self.evaluations = {line["step"]: evaluation for line in map(json.loads, lines)
                            if (evaluation := _evaluation(line))}
        if self._writes and (lines or self._file.exists()):
            with disk_errors(workdir):
                with whole(self._file) as replacement:
                    replacement.write_text("".join(lines))
        if config.log.tensorboard and self._writes:
            with _not_imported("torch"):  # tensorboardX would take two seconds to import it, for the name of one type
                from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(workdir), purge_step=first_step + 1)
        if config.log.wandb and self._writes:
            self._wandb = _start_wandb(workdir, config)
        self._step, self._seconds, self._waited, self._resumed_at = first_step, 0.0, 0.0, time.perf_counter()

    def pause(self) -> None:
        """Stops the clock that throughput is measured with, while something other than training runs."""
        self._seconds += time.perf_counter() - self._resumed_at

    def resume(self) -> None:
        """Starts it again."""
        self._resumed_at = time.perf_counter()

    def waited_for_data(self, seconds: float) -> None:
        """Notes time in which the devices had nothing to do but to wait for data."""
        self._waited += seconds

    def train(self, step: int, metrics: Mapping[str, float], shown: str) -> None:
        """Reports a training step: metrics to the files, and `shown`, throughput and time to go to the terminal."""
        self.pause()
        steps = step - self._step
        rate = steps * self._config.train.batch_size / max(self._seconds, 1e-9)
        waited = self._waited / max(self._seconds, 1e-9)
        left = (self._config.train.steps - step) * self._seconds / max(steps, 1)
        self.write(step, metrics, {f"{self._unit}_per_second": rate, "data_wait": waited})
        at, speed, to_go = f"step {step}/{self._config.train.steps}", f"{rate:.0f} {self._unit}/s", duration(left)
        terminal = _terminal()
        if terminal and left:
            terminal.show(f"{at}  {speed}  {to_go} to go  {shown}")
        else:
            if terminal:
                terminal.clear()
            log.info("%s  %s  %s, waiting for data %.0f %%  %s to go", at, shown, speed, 100 * waited, to_go)
        self._step, self._seconds, self._waited = step, 0.0, 0.0
        self.resume()

    def evaluation(self, step: int, metrics: Mapping[str, float], rows: Mapping[str, np.ndarray]) -> None:
        """Reports an evaluation, and saves its picture, if it has rows of `image_rows`, under samples/."""
        self.evaluations[step] = dict(metrics)
        if not self._writes:
            return
        self.write(step, {f"{_EVALUATION}{name}": value for name, value in metrics.items()}, {})
        if rows:
            picture = image_rows(rows)
            with disk_errors(self._workdir):
                save_png(self._workdir / "samples" / f"{step:07d}.png", picture)
            if self._tensorboard:
                self._tensorboard.add_image("samples", picture, step, dataformats="HWC")
        shown = "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
        log.info("step %d  evaluation  %s", step, shown)

    def write(self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """One line of metrics.jsonl; TensorBoard and Weights & Biases get `timings` too."""
        if not self._writes:
            return
        with disk_errors(self._workdir), self._file.open("a") as file:
            file.write(to_json({"step": step, **metrics}) + "\n")
        if self._tensorboard:
            for name, value in {**metrics, **timings}.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log({**metrics, **timings}, step=step)

    def lines(self) -> list[str]:
        """Those of metrics.jsonl."""
        if not self._writes or not self._file.exists():
            return []
        return self._file.read_text().splitlines(keepends=True)  # whole, for this process wrote or looked at them

    def best_step(self, best: Best, steps: Iterable[int]) -> int | None:
        """Which of some steps had the best evaluation; None if none was evaluated."""
        values = {step: self.evaluations[step][best.metric] for step in steps if step in self.evaluations}
        return (max if best.higher else min)(values, key=values.__getitem__, default=None)

    def close(self) -> None:
        if terminal := _terminal():
            terminal.clear()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def to_json(content: Mapping[str, Any], *, indent: int | None = None) -> str:
    """JSON of metrics at full precision; what is not finite, which JSON cannot say, becomes null."""
    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: finite(entry) for name, entry in value.items()}
        if isinstance(value, list | tuple):
            return [finite(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(content), indent=indent)


def lines_until(file: Path, last_step: float) -> list[str]:
    """The lines of metrics.jsonl up to a step, or to one that is damaged or that a killed process left incomplete."""
    kept = []
    for line in file.read_text(errors="replace").splitlines(keepends=True) if file.exists() else ():
        try:
            values = json.loads(line)
            step = values["step"]
            if step is None or not all(value is None or type(value) in (int, float) for value in values.values()):
                break
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
            break
        if step <= last_step:
            kept.append(line)
    return kept


def _evaluation(line: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a line of metrics.jsonl that reports an evaluation; what is null was not finite."""
    return {name.removeprefix(_EVALUATION): math.nan if value is None else value
            for name, value in line.items() if name.startswith(_EVALUATION)}


@contextlib.contextmanager
def _not_imported(module: str) -> Iterator[None]:
    """While it lasts, what would import a module goes on without it, unless the process has it already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules[module]


def _start_wandb(workdir: Path, config: Run):
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("config key log.wandb is set, but wandb is not installed: pip install wandb") from None
    import dataclasses

    # One id per run folder: a continued run continues its curves, and another folder of the same name does not.
    path = workdir.absolute()
    return wandb.init(dir=str(workdir), id=f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}",
                      name=path.name, resume="allow", config=dataclasses.asdict(config))


def shown(batches: Iterable[Item], *, of: int, size: Callable[[Item], int], done: int = 0) -> Iterator[Item]:
    """Batches, and from time to time a line that says how many images are done, and how fast.

    Args:
      batches: what takes time to come.
      of: images in all.
      size: how many a batch has; of the last one it may be more.
      done: images that were there before.
    """
    terminal = _terminal()
    show, pause = (terminal.show, _LIVE_SECONDS) if terminal else (log.info, _SECONDS)
    start = said = time.perf_counter()
    first, made = None, done
    try:
        for batch in batches:
            now = time.perf_counter()
            made = min(of, made + size(batch))
            if first is None:
                start, first = now, made  # which is compiled, apart
            elif now > said + pause:
                said, rate = now, (made - first) / (now - start)
                show(f"{made:,} of {of:,} images, {rate:.1f} images/s, {duration((of - made) / rate)} to go")
            yield batch
    finally:
        if terminal:
            terminal.clear()


def duration(seconds: float) -> str:
    """Seconds in hours, minutes and seconds, for people."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def image_rows(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """A picture of captioned rows of images: `{caption: [N, H, W, 3] float in [0, 1]} -> uint8 [h, w, 3]`.

    NaN is black.
    """
    strips = []
    for caption, images in rows.items():
        framed = np.pad(to_8_bits(images), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
        strip = np.concatenate(list(framed), axis=1)
        bar = Image.new("RGB", (strip.shape[1], 14), "white")
        ImageDraw.Draw(bar).text((3, 1), caption, fill="black")
        strips += [np.asarray(bar), strip]
    return np.concatenate(strips)


def to_8_bits(images: np.ndarray) -> np.ndarray:
    """Float in [0, 1] as uint8; what lies beyond is clipped, and NaN is 0."""
    return np.round(np.clip(np.nan_to_num(images), 0, 1) * 255).astype(np.uint8)


def save_png(file: Path, picture: np.ndarray) -> None:
    """Writes uint8 `[H, W, 3]` as a PNG, at once, creating its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as unfinished:
        Image.fromarray(picture).save(unfinished, "PNG")
