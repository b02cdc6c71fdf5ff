"""Runs verbs as a shell does, `python -m vqrae_jax.main ...`, in processes forked from one that imported everything.

A process of its own would import JAX and its libraries anew, two seconds of work for a message of a millisecond.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import REPOSITORY

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["vqrae_jax.cli", "vqrae_jax.tokenizer.task", "vqrae_jax.cost.bench",
                                "vqrae_jax.cost.plan", "vqrae_jax.weights.pytorch", "ml_collections.config_flags",
                                "tensorflow_datasets", "tests.verbs"])


def command(module: str, *arguments: object, timeout: float = 300, cwd: Path = REPOSITORY,
            **environment: str) -> subprocess.CompletedProcess:
    """`python -m module arguments`, in the repository's folder if not in another."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = SERVER.Process(target=_run, args=(module, list(map(str, arguments)), cwd, environment, out, err))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired([module, *map(str, arguments)], timeout)
        return subprocess.CompletedProcess([module, *map(str, arguments)], process.exitcode, out.read_text(),
                                           err.read_text())


def assert_one_line_error(result: subprocess.CompletedProcess, says: str) -> None:
    """A verb failed, and its last line says why, its only error."""
    assert result.returncode == 1
    assert "Traceback" not in result.stderr, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert errors[0] == result.stderr.splitlines()[-1]
    assert says in errors[0]


def _run(module: str, arguments: list[str], cwd: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    os.environ.update(environment)
    os.chdir(cwd)
    for stream, file in ((sys.stdout, out), (sys.stderr, err)):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, stream.fileno())
    sys.argv[1:] = arguments
    sys.path[:0] = ["", str(REPOSITORY), *environment.get("PYTHONPATH", "").split(os.pathsep)]  # as `python -m` does
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
