"""A verb in a process of its own, in which something goes wrong at the n-th thing it does with files of its folder.

What Python does with files goes through functions that are replaced here; what libraries do in C++, TensorStore above
all, does not, and meets only what is done to the whole process or to its disk.
"""

import builtins
import contextlib
import ctypes
import errno
import io
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tests import verbs
from vqrae_jax.data import faults, pipeline, webdataset
from vqrae_jax.training import distributed, update

FILLER = "filler"  # a file that takes the rest of a disk
READ_ONLY, REMOUNT = 1, 32  # of sys/mount.h


class Plan(NamedTuple):
    """What goes wrong in a process; every number was drawn before.

    Attributes:
      kind: a name of `ACTIONS` or `EXCEPTIONS`; empty for nothing.
      at: of which thing done with files it is.
      seconds: how long after that.
      more: how often, how far, how many bytes: what else a kind was given.
      nan: number of the batch of training whose gradient is not finite, or -1.
    """

    kind: str = ""
    at: int = 0
    seconds: float = 0.0
    more: int = 0
    nan: int = -1


def start(module: str, arguments: list[str], folder: Path, logs: Path, plan: Plan) -> Any:
    """Starts `python -m module arguments` in a folder; `logs` will hold `out`, `err`, and the count `operations`."""
    logs.mkdir(parents=True)
    process = verbs.SERVER.Process(target=_run, args=(module, arguments, folder, logs, plan))
    process.start()
    return process


def _run(module: str, arguments: list[str], folder: Path, logs: Path, plan: Plan) -> None:
    distributed.TIMEOUT_SECONDS = 6
    watch = Watch(folder, plan)
    watch.install()
    if plan.nan >= 0:
        _break_batch(plan.nan)
    try:
        verbs.run(module, arguments, folder, {}, logs / "out", logs / "err")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what comes now meets the test's own process, and no verb
        (logs / "operations").write_text(str(watch.count))


class Watch:
    """Counts what is done with files of a folder, and begins a fault when its turn comes."""

    def __init__(self, folder: Path, plan: Plan):
        self.count = 0
        self._folder, self._plan = str(folder), plan
        self._lock, self._begun = threading.Lock(), threading.Event()
        self._fails = 0  # how many more operations, or reads of data, do

    def install(self) -> None:
        """Replaces the functions that Python's libraries open, read, write and move files with."""
        watch, real_open, plain = self, io.open, {name: getattr(os, name) for name in (
            "open", "mkdir", "unlink", "remove", "rename", "replace", "rmdir", "listdir", "scandir", "utime", "read",
            "write", "fsync")}

        class File(io.FileIO):
            def readinto(self, buffer):
                watch.operation(self.name)
                return super().readinto(buffer)

            def readall(self):
                watch.operation(self.name)
                return super().readall()

            def read(self, size=-1):
                watch.operation(self.name)
                return super().read(size)

            def write(self, data):
                watch.operation(self.name)
                return super().write(data)

        def open_watched(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True,
                         opener=None):
            if not watch.watches(file):
                return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
            watch.operation(file)
            raw = File(file, "".join(letter for letter in mode if letter not in "bt"), closefd, opener)
            if buffering == 0:
                return raw
            buffered = (io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter)(
                raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        def watched(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(path=".", *arguments, **options):
                if "dir_fd" not in options and watch.watches(path):
                    watch.operation(path)
                return function(path, *arguments, **options)
            return call

        builtins.open = io.open = open_watched
        for name, function in plain.items():
            setattr(os, name, watched(function))
        retried, decode = faults.retried, webdataset.decode_image
        faults.retried = lambda *arguments: watch.read_data() or retried(*arguments)
        webdataset.decode_image = lambda *arguments: watch.read_data() or decode(*arguments)

    def watches(self, file: Any) -> bool:
        """Whether a path, or what a descriptor is open for, lies in the folder."""
        if isinstance(file, int):
            try:
                return os.readlink(f"/proc/self/fd/{file}").startswith(self._folder + "/")
            except OSError:
                return False
        return os.path.abspath(os.fsdecode(file)).startswith(self._folder + "/")

    def operation(self, file: Any) -> None:
        """Something is about to be done with a file; OSError where it fails."""
        with self._lock:
            self.count += 1
            turn = self.count == self._plan.at
        if turn and self._plan.seconds:
            threading.Timer(self._plan.seconds, self._begin).start()
        elif turn:
            self._begin()
        if self._plan.kind == "eio" and self._fails > 0:
            self._fails -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))

    def read_data(self) -> None:
        """A thread is about to read an image."""
        if self._plan.kind in EXCEPTIONS and self._fails > 0:
            self._fails -= 1
            raise EXCEPTIONS[self._plan.kind]

    def _begin(self) -> None:
        self._fails = self._plan.more
        if self._plan.kind in ACTIONS:
            ACTIONS[self._plan.kind](self._folder, self._plan.more)


def _terminate_twice(folder: str, milliseconds: int) -> None:
    def second() -> None:
        time.sleep(milliseconds / 1000)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=second, daemon=True).start()
    os.kill(os.getpid(), signal.SIGTERM)


def _fill(folder: str, left: int) -> None:
    """The rest of the disk, but for some bytes; without a disk of its own, files of more are refused."""
    if not os.path.ismount(folder):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, resource.RLIM_INFINITY))
        return
    with contextlib.suppress(OSError):
        file = os.open(f"{folder}/{FILLER}", os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):
            while os.write(file, bytes(1 << 16)):
                pass
        os.ftruncate(file, max(0, os.fstat(file).st_size - left))


def remount(folder: str, read_only: bool) -> None:
    """Makes a disk read-only or writable; as long as a file is being written it cannot become read-only."""
    libc, until = ctypes.CDLL(None, use_errno=True), time.monotonic() + 5
    while libc.mount(None, folder.encode(), None, REMOUNT | (READ_ONLY if read_only else 0), None):
        if time.monotonic() > until:
            return
        time.sleep(0.001)


def _allow_no_more_files(folder: str, spare: int) -> None:
    """Only so many files more than are open."""
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + spare, free + spare))


def _jump(folder: str, seconds: int) -> None:
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + seconds * 10**9


ACTIONS: dict[str, Callable[[str, int], None]] = {
    "kill": lambda folder, more: os.kill(os.getpid(), signal.SIGKILL),
    "sigterm": lambda folder, more: os.kill(os.getpid(), signal.SIGTERM),
    "sigterm_twice": _terminate_twice,
    "disk_full": _fill,
    "read_only": lambda folder, more: remount(folder, True),
    "emfile": _allow_no_more_files,
    "clock": _jump,
    "stopped": lambda folder, more: os.kill(os.getpid(), signal.SIGSTOP),
}
EXCEPTIONS: dict[str, Exception] = {
    "runtime_error": RuntimeError("of a library that reads data"), "memory_error": MemoryError(),
    "key_error": KeyError("of a library that reads data")}


def _break_batch(number: int) -> None:
    """The gradient of a batch becomes NaN: one that is nothing but zeros, which no other is."""
    accumulate, following = update.accumulate, pipeline.TrainIterator.__next__

    def broken(gradients, batch, *arguments, **options):
        means, statistics = accumulate(gradients, batch, *arguments, **options)
        zeros = jnp.all(jax.tree.leaves(batch)[0] == 0)
        return jax.tree.map(lambda x: x * jnp.where(zeros, jnp.nan, 1), means), statistics

    def zeroed(self):
        batch = following(self)
        first = min(batch)
        return batch | {first: batch[first] * 0} if self.get_state()["next_batch"] == number else batch

    update.accumulate, pipeline.TrainIterator.__next__ = broken, zeroed


