"""Random faults of machine, disk, files and processes, after each of which a verb has to end as if there had been none.

    python -m tests.faults 0-199

A fault's number is the seed of all there is to it: the verb, the kind, the moment and the place. The verb is started,
meets the fault, and its cause is removed; then the same command is given until it ends. What may come of it:

    same    all that the verb makes is, to the byte, what it makes without a fault, and nothing was made twice
    said    the same, after one line had said what is needed and that was done

and what may not: `lost`, `wrong`, `stack` (or no line, or two), `hang`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image

from tests import conftest
from tests.faults import child
from tests.faults.child import Plan
from tests.generator import tiny as tiny_generator
from vqrae_jax.training.signals import STOPPED

FORBIDDEN = ("lost", "wrong", "stack", "hang")
TIMEOUT_SECONDS, RESTARTS, DISK = 300, 4, "32m"
IMAGES, STEPS = 24, 8


class Verb(NamedTuple):
    """A command, run in a folder of its own.

    Attributes:
      module: as `python -m` takes it.
      flags: of the command.
      inputs: what the folder holds before, by its name among the material.
      out: the folder that it writes.
      trains: whether `out` is a run's folder; else all its files count.
    """

    module: str
    flags: tuple[str, ...]
    inputs: tuple[str, ...]
    out: str = "out"
    trains: bool = False


VERBS = {
    "train tokenizer": Verb("vqrae_jax.main", ("--config=tokenizer.py", "--workdir=out"), ("tokenizer.py", "images"),
                            trains=True),
    "tokenize": Verb("vqrae_jax.tokenize", ("--workdir=tokenizer", "--data=folder:images", "--out=out",
                                            "--batch_size=4", "--shard_size=8"), ("tokenizer", "images")),
    "train generator": Verb("vqrae_jax.main", ("--config=generator.py", "--workdir=out"), ("generator.py", "codes"),
                            trains=True),
    "generate": Verb("vqrae_jax.generate", ("--workdir=generator", "--tokenizer=tokenizer", "--num=8",
                                            "--batch_size=2", "--out=out/samples.npz"), ("generator", "tokenizer")),
    "from-webdataset": Verb("vqrae_jax.convert", ("from-webdataset", "--tars=tars/*.tar", "--out=out", "--threads=2"),
                            ("tars",)),
    "evaluate": Verb("vqrae_jax.evaluate", ("--workdir=tokenizer", "--data=folder:images", "--out=out", "--limit=8",
                                            "--norobustness"), ("tokenizer", "images")),
}
BECOMES = {"train tokenizer": "tokenizer", "tokenize": "codes", "train generator": "generator"}  # of the material
TRAIN = tuple(name for name, verb in VERBS.items() if verb.trains)
READ_DATA = tuple(name for name in VERBS if name != "generate")
TOGETHER = (*TRAIN, "tokenize")
DAMAGES = ("flipped bit", "truncated", "emptied", "missing")
KINDS = {
    "kill -9": tuple(VERBS), "SIGTERM": tuple(VERBS), "SIGTERM twice": tuple(VERBS), "disk full": tuple(VERBS),
    "read-only": tuple(VERBS), "EIO": tuple(VERBS), "EMFILE": tuple(VERBS), **dict.fromkeys(DAMAGES, tuple(VERBS)),
    "one of two stopped": TOGETHER, "one of two dead": TOGETHER, "clock jumps": tuple(VERBS), "NaN in a batch": TRAIN,
    "exception in a data thread": READ_DATA,
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """What a number stands for.

    Attributes:
      number: the seed.
      kind: of `KINDS`.
      verb: of `VERBS`.
      moment: in [0, 1), of all that the verb does with files.
      rng: for what else there is to choose.
    """

    number: int
    kind: str
    verb: str
    moment: float
    rng: np.random.Generator

    @classmethod
    def of(cls, number: int) -> "Fault":
        rng = np.random.default_rng(number)
        kind = str(rng.choice(list(KINDS)))
        return cls(number, kind, str(rng.choice(KINDS[kind])), rng.random(), rng)

    def plan(self, operations: int) -> Plan:
        """For the process that meets the fault."""
        rng, at = self.rng, 1 + int(self.moment * operations)
        plan = Plan(at=at, seconds=float(rng.choice([0.0, rng.uniform(0, 0.5)])))
        match self.kind:
            case "kill -9" | "one of two dead":
                return plan._replace(kind="kill")
            case "SIGTERM":
                return plan._replace(kind="sigterm")
            case "SIGTERM twice":
                return plan._replace(kind="sigterm_twice", more=int(rng.integers(300)))
            case "disk full":
                return plan._replace(kind="disk_full", more=int(rng.integers(200_000)))
            case "read-only":
                return plan._replace(kind="read_only")
            case "EIO":  # once, a few times, or for good
                return plan._replace(kind="eio", seconds=0.0, more=int(rng.choice([1, 3, 10**9])))
            case "EMFILE":
                return plan._replace(kind="emfile", more=int(rng.integers(8)))
            case "one of two stopped":
                return plan._replace(kind="stopped")
            case "clock jumps":
                return plan._replace(kind="clock", more=int(rng.choice([-1, 1])) * int(10 ** rng.uniform(1, 8)))
            case "exception in a data thread":
                return plan._replace(kind=str(rng.choice(list(child.EXCEPTIONS))), more=1)
            case "NaN in a batch":  # and a kill, which it has to survive
                return plan._replace(kind="kill", nan=int(rng.choice([3, 6])))
        # What is damaged is complete, or was left by a kill at a moment when there is something.
        late = 1 + int((0.4 + 0.6 * self.moment) * operations)
        return plan._replace(at=late, kind="kill" if rng.random() < 0.5 else "")


class Ended(NamedTuple):
    """How a process did: its exit code, None where it had to be killed, and what it said on stderr."""

    code: int | None
    err: str


class Whole(NamedTuple):
    """A verb without a fault: what it made, and how much each process did with files."""

    results: dict[str, str]
    operations: list[int]


class Outcome(NamedTuple):
    fault: Fault
    verdict: str
    why: str
    seconds: float


class Tool:
    """Makes what verbs need, once; and lets them meet faults.

    Args:
      folder: for everything.
    """

    def __init__(self, folder: Path):
        self._folder, self._material = folder, folder / "material"
        self._material.mkdir()
        _write_config(self._material / "tokenizer.py", _tokenizer_config())
        _write_config(self._material / "generator.py", _generator_config())
        rng = np.random.default_rng(0)
        for number in range(IMAGES):
            file = self._material / "images" / "ab"[number % 2] / f"{number:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(1, 256, (32, 32, 3), np.uint8)).save(file)
        (self._material / "tars").mkdir()
        for number in range(3):
            with tarfile.open(self._material / "tars" / f"{number}.tar", "w") as tar:
                for image in sorted((self._material / "images").rglob("*.png"))[number::3]:
                    tar.add(image, f"{image.stem}.png")
        self._whole = functools.cache(self._without_fault)

    def suffer(self, fault: Fault) -> Outcome:
        """Lets a verb meet a fault, and says what came of it."""
        started = time.monotonic()
        verdict, why = self._verdict(fault)
        return Outcome(fault, verdict, why, time.monotonic() - started)

    def whole(self, name: str, processes: int, nan: int) -> Whole:
        """A verb without a fault, or with nothing but a broken batch."""
        if name in ("tokenize", "evaluate", "generate"):
            self._whole("train tokenizer", 1, -1)
        if name in ("train generator", "generate"):
            self.whole("tokenize", 1, -1)
        if name == "generate":
            self._whole("train generator", 1, -1)
        return self._whole(name, processes, nan)

    def _without_fault(self, name: str, processes: int, nan: int) -> Whole:
        with self._place(f"{name} {processes} {nan}", VERBS[name], disk=False) as (folder, logs):
            ended = _finish(_start(VERBS[name], folder, logs, [Plan(nan=nan)] * processes), logs)
            assert all(one.code == 0 for one in ended), ended
            if name in BECOMES and not (self._material / BECOMES[name]).exists():
                shutil.copytree(folder / "out", self._material / BECOMES[name])
            return Whole(_results(VERBS[name], folder),
                         [int((logs / str(i) / "operations").read_text()) for i in range(processes)])

    @contextlib.contextmanager
    def _place(self, name: str, verb: Verb, *, disk: bool) -> Iterator[tuple[Path, Path]]:
        """A folder with what a verb needs, a disk of its own where that is wanted and may be; and one for logs."""
        folder, logs = self._folder / name / "folder", self._folder / name / "logs"
        folder.mkdir(parents=True)
        mounted = disk and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], capture_output=True).returncode
        try:
            for item in verb.inputs:
                copy = shutil.copytree if (self._material / item).is_dir() else shutil.copy
                copy(self._material / item, folder / item)
            yield folder, logs
        finally:
            if mounted:
                subprocess.run(["umount", "--lazy", folder], check=True)
            shutil.rmtree(folder.parent)

    def _verdict(self, fault: Fault) -> tuple[str, str]:
        verb, processes = VERBS[fault.verb], 2 if "of two" in fault.kind else 1
        whole = self.whole(fault.verb, processes, -1)
        victim = int(fault.rng.integers(processes))
        plan = fault.plan(whole.operations[victim])
        whole = self.whole(fault.verb, processes, plan.nan)
        again = [Plan(nan=plan.nan)] * processes
        plans = [plan if number == victim else other for number, other in enumerate(again)]
        disk = fault.kind in ("disk full", "read-only")
        with self._place(f"fault {fault.number}", verb, disk=disk) as (folder, logs):
            of_a_signal = {"SIGTERM": [-signal.SIGTERM], "SIGTERM twice": [-signal.SIGTERM]}
            killed = [-signal.SIGKILL] if plan.kind == "kill" else of_a_signal.get(fault.kind, [])
            stopped_seconds = float(fault.rng.choice([1, 9]))
            ended = _finish(_start(verb, folder, logs / "0", plans), logs / "0", stopped_seconds)
            for one in ended:
                if bad := _bad_end(one, killed, of_two=processes == 2):
                    return bad, f"at the fault: {_tail(one)}"
            if disk and os.path.ismount(folder):
                child.remount(str(folder), False)
                (folder / child.FILLER).unlink(missing_ok=True)
            damaged = _damage(fault, verb, folder) if fault.kind in DAMAGES else None
            if all(one.code == 0 for one in ended) and not damaged:
                return _compare(whole.results, _results(verb, folder))
            before, said = _made(verb, folder, damaged), ""
            for number in range(1, RESTARTS + 1):
                ended = _finish(_start(verb, folder, logs / str(number), again), logs / str(number))
                if all(one.code == 0 for one in ended):
                    break
                for one in ended:
                    if bad := _bad_end(one, [], of_two=processes == 2):
                        return bad, f"at restart {number}{damaged or ''}: {_tail(one)}"
                said = ended[0].err.strip().splitlines()[-1]
                if not _obey(said, folder):
                    if not damaged:
                        return "lost", f"the cause is gone, and still: {said}"
                    damaged.undo()
            else:
                return "lost", f"restart {RESTARTS} fails: {said}"
            if lost := _lost(verb, folder, before, ended[0].err):
                return "lost", f"{lost}{damaged or ''}; {said}"
            verdict, why = _compare(whole.results, _results(verb, folder))
            if verdict == "same":
                return ("said", said) if said else ("same", str(damaged or "").strip())
            return verdict, f"{why}{damaged or ''}; {said}"


def _tokenizer_config() -> Any:
    config = conftest.tiny()
    config.train.update(steps=STEPS, checkpoint_every=2, eval_every=4)
    config.data.update(source="folder:images", holdout=0.2)
    config.eval.update(batch_size=4, limit=4)
    return config


def _generator_config() -> Any:
    config = tiny_generator.tiny()
    config.train.update(steps=STEPS, batch_size=4, checkpoint_every=2, eval_every=4)
    config.data.update(source="codes:codes", holdout=0.2)
    config.eval.update(batch_size=4, limit=4)
    return config


def _write_config(file: Path, config: Any) -> None:
    file.write_text(f"from ml_collections import ConfigDict\n\nget_config = lambda: ConfigDict({config.to_dict()!r})\n")


def _start(verb: Verb, folder: Path, logs: Path, plans: list[Plan]) -> list[Any]:
    flags: list[list[str]] = [[]]
    if len(plans) > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"--coordinator_address=127.0.0.1:{free.getsockname()[1]}"
        flags = [[address, f"--num_processes={len(plans)}", f"--process_id={number}"] for number in range(len(plans))]
    return [child.start(verb.module, [*verb.flags, *of_process], folder, logs / str(number), plan)
            for number, (plan, of_process) in enumerate(zip(plans, flags, strict=True))]


def _finish(processes: list[Any], logs: Path, stopped_seconds: float = 0.0) -> list[Ended]:
    """Waits for processes; one that is stopped goes on after so many seconds."""
    end, stopped_at = time.monotonic() + TIMEOUT_SECONDS, {}
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        for process in processes:
            if _state(process.pid) == "T":
                if time.monotonic() - stopped_at.setdefault(process.pid, time.monotonic()) > stopped_seconds:
                    os.kill(process.pid, signal.SIGCONT)
        next((process for process in processes if process.is_alive()), processes[0]).join(0.05)
    hung = [process.is_alive() for process in processes]
    for process in processes:
        process.kill()
        process.join()
    errors = [logs / str(number) / "err" for number in range(len(processes))]
    # Of one that a library aborted another process says the last line.
    until = time.monotonic() + 10
    aborted = [file for process, file in zip(processes, errors, strict=True) if process.exitcode == -signal.SIGABRT]
    while time.monotonic() < until and not all(file.exists() and file.read_text().strip() for file in aborted):
        time.sleep(0.1)
    return [Ended(None if hangs else process.exitcode, file.read_text() if file.exists() else "")
            for process, hangs, file in zip(processes, hung, errors, strict=True)]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _bad_end(ended: Ended, killed: list[int], *, of_two: bool) -> str:
    """Why a process should not have ended so; empty if it may."""
    if ended.code is None:
        return "hang"
    if "Traceback" in ended.err or "Exception ignored" in ended.err:
        return "stack"
    if ended.code in (0, STOPPED, *killed):
        return ""
    if of_two and re.search("another task died|JAX distributed service detected fatal errors", ended.err):
        return ""  # JAX's own words, before ours could come
    lines = ended.err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return "" if ended.code == 1 and len(errors) == 1 and lines[-1] == errors[0] else "stack"


def _tail(ended: Ended) -> str:
    return f"exit code {ended.code}: {' | '.join(ended.err.strip().splitlines()[-40:])}"[-3000:]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.exists() else []


def _results(verb: Verb, folder: Path) -> dict[str, str]:
    """Digests of all that a verb made."""
    digest = lambda data: hashlib.sha256(data).hexdigest()
    out = folder / verb.out
    if not verb.trains:
        return {str(file.relative_to(out)): digest(file.read_bytes()) for file in _files(out)}
    last = out / "checkpoints" / str(max(_steps(out)))
    found = {"metrics.jsonl": digest((out / "metrics.jsonl").read_bytes()), "step": last.name,
             "data": digest(json.dumps(json.loads((last / "data" / "metadata").read_text())).encode())}
    with ocp.PyTreeCheckpointer() as checkpointer:
        for place in [file.parent for of in (last, out / "frozen") for file in of.rglob("_METADATA")]:
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
                                    checkpointer.metadata(place).item_metadata.tree)
            arrays = checkpointer.restore(place, restore_args=as_numpy)  # two devices saved some, and here is one
            found |= {f"{place.relative_to(out)} {'/'.join(path)}": digest(value)
                      for path, value in _leaves(arrays) if value is not None}
    return found


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], bytes | None]]:
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from _leaves(value, (*path, str(key)))
    else:
        yield path, None if tree is None else np.asarray(tree).tobytes()


def _compare(expected: dict[str, str], found: dict[str, str]) -> tuple[str, str]:
    if differing := [name for name in expected | found if expected.get(name) != found.get(name)]:
        return "wrong", f"{', '.join(differing[:4])} differ ({len(differing)} of {len(expected)})"
    return "same", ""


def _steps(out: Path) -> list[int]:
    return [int(path.name) for path in (out / "checkpoints").glob("*") if path.name.isdigit()]


def _made(verb: Verb, folder: Path, damaged: "Damage | None") -> dict[str, Any]:
    """What is whole, and must not be made once more."""
    out, file = folder / verb.out, damaged.file if damaged else Path("nothing")
    if verb.trains:
        of_steps = {step: out / "checkpoints" / str(step) for step in _steps(out)}
        return {"step": max((step for step, place in of_steps.items() if place not in file.parents), default=-1)}
    return {str(path): path.stat().st_mtime_ns for path in out.glob("*.array_record")
            if path.with_suffix("") != file.with_suffix("")}


def _lost(verb: Verb, folder: Path, before: dict[str, Any], said: str) -> str:
    """What of that was made once more all the same; empty if nothing was."""
    if not verb.trains:
        return ", ".join(f"{path} was made again" for path, at in before.items() if Path(path).stat().st_mtime_ns != at)
    continued = re.findall(r"continuing at step (\d+)", said)
    at = int(continued[-1]) if continued else -1
    return f"it began at step {at}, and {before['step']} was there" if at < before["step"] else ""


class Damage(NamedTuple):
    """A file that was whole, and what it held."""

    file: Path
    what: str
    held: bytes

    def undo(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_bytes(self.held)

    def __str__(self) -> str:
        return f" ({self.what}: {'/'.join(self.file.parts[-5:])})"


def _damage(fault: Fault, verb: Verb, folder: Path) -> Damage | None:
    """Damages a file of what the verb wrote, or of a run that it reads; None where there is nothing yet."""
    read = [item for item in verb.inputs if item in ("tokenizer", "generator", "codes")]
    place = verb.out if verb.trains or not read or fault.rng.random() < 0.6 else str(fault.rng.choice(read))
    files = [file for file in _files(folder / place) if file.name != "lock.json" and not file.name.endswith(".part")]
    files = [file for file in files if fault.kind == "missing" or file.stat().st_size]
    if not files:
        return None
    file = files[int(fault.rng.integers(len(files)))]
    held = file.read_bytes()
    at = int(fault.rng.integers(len(held))) if held else 0
    if fault.kind == "flipped bit":
        bit = 1 << int(fault.rng.integers(8))
        file.write_bytes(held[:at] + bytes([held[at] ^ bit]) + held[at + 1:])
    elif fault.kind == "missing":
        file.unlink()
    else:
        file.write_bytes(held[:at] if fault.kind == "truncated" else b"")
    return Damage(file, f"{fault.kind} at {at}", held)


def _obey(said: str, folder: Path) -> bool:
    """Removes what a line says is to be removed, of the folder; whether there was something."""
    if not (asked := re.search(r"remove (?:that|the) (?:folder|file)|remove it(?: and ([^\s,]+))?", said)):
        return False
    named = [folder / path for path in re.findall(r"[^\s:,;()]*/[^\s:,;()]+", said)]
    places = [path for path in named if path.exists()][:1]
    places += [path.with_name(asked[1]) for path in places if asked[1]]
    for place in places:
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    return bool(places)


def table(outcomes: Iterable[Outcome]) -> str:
    """Markdown: verdicts by kind and verb, and below what was forbidden."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for outcome in outcomes:
        for cell in ((outcome.fault.kind, outcome.fault.verb), (outcome.fault.kind, "all"),
                     ("all", outcome.fault.verb), ("all", "all")):
            counts.setdefault(cell, Counter())[outcome.verdict] += 1
    shown = lambda cell: ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts[cell].items()))
    columns = [*VERBS, "all"]
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for kind in [*KINDS, "all"]:
        lines.append(f"| {kind} | {' | '.join(shown((kind, v)) if (kind, v) in counts else '' for v in columns)} |")
    return "\n".join(lines)


def line(outcome: Outcome) -> str:
    fault = outcome.fault
    return (f"{fault.number}: {fault.kind}, {fault.verb}, at {fault.moment:.3f}: {outcome.verdict} "
            f"({outcome.seconds:.1f} s) {outcome.why}")
