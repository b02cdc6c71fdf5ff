"""One process trains in a run's folder: the lock that says which."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vqrae_jax.files import disk_errors

BEAT_SECONDS = 10.0  # the holder touches the file so often
DEAD_SECONDS = 60.0  # who has not for so long is taken for dead, where its host cannot be asked


@contextmanager
def held(workdir: Path) -> Iterator[Callable[[], None]]:
    """Holds a run's folder, which it creates, as long as the block runs; yields what releases it before.

    A lock that a dead process left is taken over: on this host its process is looked for; of another host it is waited
    whether the file is still touched. Times are compared by the clock of the file system alone.

    Raises:
      OSError: another process holds the folder; the message says which. Or the folder cannot be written.
    """
    file, over = workdir / "lock.json", threading.Event()
    mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})

    def release() -> None:
        over.set()
        with contextlib.suppress(OSError):
            if file.read_text() == mine:  # and not of one that took this process for dead
                file.unlink()

    with disk_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        while not _created(file, mine):
            _wait_for_the_dead(file)
    threading.Thread(target=_beat, args=(file, over), daemon=True).start()
    try:
        yield release
    finally:
        release()


def _created(file: Path, content: str) -> bool:
    try:
        with file.open("x") as new:
            new.write(content)
    except FileExistsError:
        return False
    return True


def _beat(file: Path, over: threading.Event) -> None:
    while not over.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):  # a file system that is away: if it stays away, the run will say so
            os.utime(file)


def _wait_for_the_dead(file: Path) -> None:
    """Returns once the lock is gone, or its holder is dead and its lock removed; raises where it is alive."""
    try:
        content, seen = file.read_text(), file.stat().st_mtime
        holder = _parsed(content)
        alive = _is_alive(holder["pid"]) if holder["host"] == socket.gethostname() else None
        while alive is None:
            if file.stat().st_mtime != seen:
                alive = True
            elif _clock(file.parent) - seen > DEAD_SECONDS:
                alive = False
            else:
                time.sleep(BEAT_SECONDS / 10)
        if alive:
            raise OSError(f"{file.parent} is being trained in by process {holder['pid']} on {holder['host']} since "
                          f"{holder['since']}: stop that one, or choose another --workdir")
        # Another one may have taken it over by now: what is moved away is looked at once more.
        removed = file.rename(file.with_name(f"lock.{socket.gethostname()}.{os.getpid()}.json"))
        if removed.read_text() != content:
            removed.rename(file)
        else:
            removed.unlink()
    except FileNotFoundError:
        return


def _parsed(content: str) -> dict[str, Any]:
    try:
        return json.loads(content)
    except json.JSONDecodeError:  # being written, or by one that died at that
        return {"host": "an unknown host", "pid": "unknown", "since": "just now"}


def _clock(folder: Path) -> float:
    """The time of a folder's file system."""
    probe = folder / f"lock.{socket.gethostname()}.{os.getpid()}.clock"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # that of a container before this one: this process holds nothing yet
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
