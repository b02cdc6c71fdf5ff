"""Two processes in one run's folder: the second one says who is there, unless it is dead."""

import json
import os
import subprocess
import sys
import time

import pytest

from vqrae_jax.training import lock


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(lock, "DEAD_SECONDS", 0.1)


def leave(workdir, **holder):
    (workdir / "lock.json").write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": "yesterday", **holder}))


def test_a_folder_is_held_by_one_process(tmp_path, monkeypatch):
    with lock.held(tmp_path):
        assert (tmp_path / "lock.json").exists()
        monkeypatch.setattr(os, "getpid", lambda: 1)  # another one asks
        says = r"is being trained in by process \d+ on .* since 2\d+-.*: stop that one, or choose another --workdir"
        with pytest.raises(OSError, match=says), lock.held(tmp_path):
            pass
        monkeypatch.undo()
    assert not list(tmp_path.glob("lock*"))


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leave(tmp_path, host=lock.socket.gethostname(), pid=dead.pid)
    with lock.held(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("hours", [-5, 5])
def test_of_another_host_it_is_seen_whether_the_lock_is_still_touched(hours, tmp_path, monkeypatch):
    """By its own clock, which may be any: some file systems keep the time of who writes, not their own."""
    leave(tmp_path)
    there = lambda: time.time() + 3600 * hours
    os.utime(tmp_path / "lock.json", (there(), there()))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="by process 7 on elsewhere since yesterday"):
        patch.setattr(lock.time, "sleep", lambda seconds: os.utime(tmp_path / "lock.json", (there(), there())))
        with lock.held(tmp_path):
            pass
    with lock.held(tmp_path):
        pass


def test_half_a_lock_of_one_that_died_is_taken_over(tmp_path):
    (tmp_path / "lock.json").write_text('{"host": "else')
    os.utime(tmp_path / "lock.json", (1, 1))
    with lock.held(tmp_path):
        pass
