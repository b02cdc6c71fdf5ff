"""Stderr of a verb: one line says what is wrong, whatever libraries say, and progress is one line on a terminal."""

import logging
import os
import pty
import re
import select
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.verbs import assert_one_line_error, command
from vqrae_jax.training import reporting

# Every way to stderr that is not ours: hooks of the interpreter, logging, C, another process, the end of this one.
NOISE = """
import asyncio, atexit, logging, os, subprocess, sys, threading, warnings
from absl import logging as absl_logging
from vqrae_jax import cli

class Unraisable:
    def __del__(self):
        raise RuntimeError("noise")

async def never_retrieved():
    async def fails():
        raise RuntimeError("noise")
    tasks = [asyncio.create_task(fails())]
    await asyncio.sleep(0)

def main(_):
    fails = threading.Thread(target=lambda: 1 / 0)
    fails.start()
    fails.join()
    Unraisable()
    asyncio.run(never_retrieved())
    try:
        1 / 0
    except ZeroDivisionError:
        absl_logging.exception("noise")
        logging.getLogger("orbax").exception("noise")
    warnings.warn("noise")
    os.write(2, b"E1128 07:48:44.044308 1396 client.cc:12] noise\\n")
    subprocess.run([sys.executable, "-S", "-c", "1 / 0"])
    atexit.register(lambda: 1 / 0)
    logging.getLogger("vqrae_jax.data").warning("a warning of ours")
    raise OSError("the disk is full")

cli.run(main)
"""
FULL_DISK = """
import resource
from pathlib import Path
from tests.training import toy
from vqrae_jax import cli
from vqrae_jax.training import loop

def main(_):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    loop.run(toy.NextCharacter(toy.config(10)), Path("run"))

cli.run(main)
"""


def verb(text: str, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """A verb that does what the text says."""
    (folder / "verb.py").write_text(text)
    return command("verb", *flags, cwd=folder, PYTHONPATH=str(folder))


def test_what_libraries_say_is_shown_only_with_traceback(tmp_path):
    result = verb(NOISE, tmp_path)
    assert (result.returncode, result.stderr) == (1, "a warning of ours\nerror: the disk is full\n")
    shown = verb(NOISE, tmp_path, "--traceback").stderr
    assert shown.count("Traceback") >= 8 and "client.cc:12] noise" in shown and "OSError: the disk is full" in shown


def test_a_really_full_disk_is_one_line(tmp_path):
    result = verb(FULL_DISK, tmp_path)
    assert_one_line_error(result, "the disk is full: ")
    assert "RESOURCE_EXHAUSTED" not in result.stderr and "never retrieved" not in result.stderr, result.stderr


def test_a_bug_is_one_line_that_says_where_and_a_file_that_says_more(tmp_path):
    bug = "from vqrae_jax import cli\nfrom vqrae_jax.training import reporting\n"
    result = verb(f"{bug}cli.run(lambda _: reporting.duration(None))\n", tmp_path)
    assert_one_line_error(result, "error: a bug: TypeError: ")
    found = re.search(r" in reporting\.py:\d+; please report it, with (\S+\.log), which says more$", result.stderr[:-1])
    assert found, result.stderr
    kept = Path(found[1])
    assert "Traceback (most recent call last)" in kept.read_text()
    kept.unlink()


@pytest.mark.parametrize(("ends", "says"), [
    ("os.abort()", "Aborted"),
    ("os.write(2, b'F1128 07:48:44.0 1396 a.cc:1] Check failed: x\\n*** stack trace: ***\\n  @ 0x1\\n'), os._exit(6)",
     "Check failed: x")])
def test_a_process_that_a_library_ends_leaves_a_line(ends, says, tmp_path):
    (tmp_path / "verb.py").write_text(f"import os\nfrom vqrae_jax import cli\ncli.run(lambda _: ({ends}))\n")
    result = subprocess.run([sys.executable, "verb.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                            env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert result.returncode not in (0, 1)
    found = re.fullmatch(rf"error: .* ended this process: {says}; (\S+) holds what it said\n", result.stderr)
    assert found, result.stderr
    Path(found[1]).unlink()


def test_an_accelerator_that_jax_does_not_use_is_told_of(tmp_path):
    text = ("import logging\nfrom vqrae_jax import cli\n"
            "log = lambda _: logging.getLogger('jax._src.xla_bridge').warning('No GPU. Falling back to %s.', 'cpu')\n"
            "cli.run(log)\n")
    assert verb(text, tmp_path).stderr.startswith("JAX does not use this machine's accelerator (No GPU. Falling back")


@pytest.fixture(params=["terminal", "pipe"])
def written(request, monkeypatch):
    """Adds what writes our log to a terminal or a pipe; the result of a call is what came out there."""
    out, into = pty.openpty() if request.param == "terminal" else os.pipe()
    if request.param == "terminal":
        termios.tcsetwinsize(into, (24, 80))
    stream = os.fdopen(into, "w")
    handler, log = reporting.Lines(stream), logging.getLogger("vqrae_jax")
    monkeypatch.setattr(log, "handlers", [handler])
    monkeypatch.setattr(log, "level", logging.INFO)
    log.manager._clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
    for pause in ("_SECONDS", "_LIVE_SECONDS"):
        monkeypatch.setattr(reporting, pause, -1)

    def all_of_it() -> str:
        found = b""
        while select.select([out], [], [], 0.5)[0]:  # a terminal gives it in parts
            found += os.read(out, 1 << 16)
        return found.decode().replace("\r\n", "\n")

    yield lambda: (request.param, all_of_it())
    log.manager._clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
    stream.close()
    os.close(out)


def test_progress_is_overwritten_on_a_terminal_and_lines_in_a_pipe(written):
    for batch in reporting.shown([[1, 2], [3, 4], [5, 6], [7]], of=7, size=len):
        if batch == [5, 6]:
            logging.getLogger("vqrae_jax").info("an evaluation")
    where, text = written()
    lines = text.split("\n")
    assert re.search("4 of 7 images, .* images/s, 0 min .* to go", text) and "7 of 7 images" in text
    if where == "pipe":
        assert len(lines) == 5 and lines[2] == "an evaluation" and "\r" not in text
    else:
        screen = [line.split("\r")[-1].strip() for line in lines]
        assert screen == ["an evaluation", ""], text  # and nothing is left of progress
        assert "\n6 of 7" not in text and "6 of 7" in lines[1]
