"""One process trains in a run's folder: the lock that says which."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vqrae_jax.files import disk_errors

log = logging.getLogger(__name__)
BEAT_SECONDS = 10.0  # the holder touches the file so often
DEAD_SECONDS = 60.0  # where that is not seen for so long, and the holder's host cannot be asked, it is taken for dead


@contextmanager
def held(workdir: Path) -> Iterator[Callable[[], None]]:
    """Holds a run's folder, which it creates, as long as the block runs; yields what releases it before.

    A lock that a dead process left is taken over: on this host its process is looked for; of another host it is waited
    whether the file is still touched. What it was touched at is never compared with a clock, for that may be another
    host's.

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
        content, touched = _look(file)
        holder = _parsed(content)
        alive = _is_alive(holder["pid"]) if holder["host"] == socket.gethostname() else None
        until = time.monotonic() + DEAD_SECONDS
        if alive is None:
            log.info("process %s on %s trains in %s, or left its lock there: looking for a sign of life for %.0f s",
                     holder["pid"], holder["host"], file.parent, DEAD_SECONDS)
        while alive is None:
            time.sleep(BEAT_SECONDS / 10)
            now = _look(file)
            if now[0] != content:
                return  # another one was sooner, or it had not been written to its end
            if now[1] != touched:
                alive = True
            elif time.monotonic() > until:
                alive = False
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


def _look(file: Path) -> tuple[str, int]:
    """Content and time of a lock, which is opened for that: only then network file systems ask their server."""
    with file.open() as opened:
        return opened.read(), os.fstat(opened.fileno()).st_mtime_ns


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
