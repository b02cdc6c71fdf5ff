"""SIGTERM at moments when no Python runs: the process compiles, clusters or evaluates."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from vqrae_jax.training import signals

# A call that does not come back to Python, as a compiler's does not.
BUSY = """
import sys
import jax, jax.numpy as jnp
from pathlib import Path
from tests.training import toy
from vqrae_jax.training import loop

forever = jax.jit(lambda: jax.lax.while_loop(lambda x: x >= 0, lambda x: x * 0.5, 1.0)).lower().compile()

class Busy(toy.NextCharacter):
    def init(self, mesh):
        return self.busy("init") or super().init(mesh)

    def train_step(self, phase):
        return self.busy("compile") or super().train_step(phase)

    def evaluator(self, mesh):
        evaluate = super().evaluator(mesh)
        return lambda *state: self.busy("evaluate") or evaluate(*state)

    def busy(self, moment):
        if sys.argv[2] == moment:
            print("busy", flush=True)
            jax.block_until_ready(forever())

loop.run(Busy(toy.config(20)), Path(sys.argv[1]))
"""


def run(workdir: Path, moment: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", BUSY, str(workdir), moment], cwd=REPOSITORY, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def metrics_of_a_whole_run(workdir: Path) -> str:
    process = run(workdir, "")
    assert process.communicate(timeout=60) and process.returncode == 0
    return (workdir / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> str:
    return metrics_of_a_whole_run(tmp_path_factory.mktemp("signals"))


@pytest.mark.parametrize("moment", ["init", "compile", "evaluate"])
def test_a_busy_process_ends_and_loses_nothing(moment, tmp_path, whole):
    process = run(tmp_path, moment)
    assert process.stdout is not None and process.stdout.readline() == "busy\n"
    time.sleep(0.5)  # until it has left Python
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == signals.STOPPED, errors
    assert errors.splitlines()[-1] == f"ERROR:vqrae_jax.training.signals:{signals.MESSAGE}"
    assert not (tmp_path / "lock.json").exists()
    assert [path.name for path in (tmp_path / "checkpoints").glob("*")] == (["10"] if moment == "evaluate" else [])
    assert metrics_of_a_whole_run(tmp_path) == whole


def test_an_interrupt_is_noted_or_obeyed():
    send = lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(0))
    before = signal.getsignal(signal.SIGINT)
    with signals.StopSignal() as stop:
        with pytest.raises(KeyboardInterrupt):
            send()
        with stop.deferred():
            assert not stop.requested()
            send()
            assert stop.requested()
            with pytest.raises(KeyboardInterrupt), stop.at_once():
                raise AssertionError("never begun")
            with pytest.raises(KeyboardInterrupt):
                send()  # a second one
    assert signal.getsignal(signal.SIGINT) is before
