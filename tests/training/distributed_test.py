"""Several real processes on this machine, joined over loopback, are one run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict
from PIL import Image

from tests.conftest import REPOSITORY
from tests.verbs import command
from vqrae_jax import config as config_lib
from vqrae_jax import files
from vqrae_jax.tokenizer import task
from vqrae_jax.training import checkpoint, distributed, verified

STEPS = 16


@pytest.fixture
def config_file(tiny_config, tmp_path) -> Path:
    tiny_config.train.update(steps=STEPS, batch_size=8, checkpoint_every=4, eval_every=8)
    tiny_config.eval.limit = 27  # the last batch is not full
    tiny_config.model.quantizer.init = "kmeans"
    return write_config(tiny_config, tmp_path / "tiny.py")


def write_config(values: ConfigDict, file: Path) -> Path:
    text = f"from ml_collections import ConfigDict\n\nget_config = lambda: ConfigDict({values.to_dict()!r})\n"
    file.write_text(text)
    return file


@pytest.fixture
def config(config_file, tiny_config) -> config_lib.Config:
    return config_lib.parse(tiny_config)


def run_together(module: str, processes: int, *flags: str, of_the_last: Sequence[str] = (),
                 patches: Sequence[str] = ()) -> list[subprocess.Popen]:
    """Starts the processes of a run; `patches` are statements, one for each process, that it begins with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # As `python -m`, but a process that is gone is missed sooner than after half a minute.
    start = ("import runpy, sys; from vqrae_jax.training import checkpoint, distributed; "
             "distributed.TIMEOUT_SECONDS = 6; {}; "
             f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)")
    return [subprocess.Popen(
        [sys.executable, "-c", start.format(patches[i] if patches else "pass"),
         f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={processes}",
         f"--process_id={i}", *flags, *(of_the_last if i == processes - 1 else ())],
        cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for i in range(processes)]


def start(config_file: Path, workdir: Path, processes: int, *flags: str, of_the_last: Sequence[str] = (),
          patches: Sequence[str] = ()) -> list[subprocess.Popen]:
    return run_together("vqrae_jax.main", processes, f"--config={config_file}", f"--workdir={workdir}", *flags,
                        of_the_last=of_the_last, patches=patches)


def finish(processes: list[subprocess.Popen]) -> list[str]:
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def metrics(workdir: Path) -> list[dict]:
    file = workdir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for(condition: Callable[[], bool], processes: list[subprocess.Popen]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end and all(process.poll() is None for process in processes), [
            process.communicate()[0] for process in processes if process.poll() is not None]
        time.sleep(0.02)


def check_equal(ours: list[dict], theirs: list[dict]) -> None:
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for name, value in other.items():
            # A quantizer's gradient that is nothing but rounding, as at a k-means start, has no relative size.
            tolerance = {"rel": 1e-5, "abs": 1e-6 if name.startswith("grad_norm") else 0.0}
            assert mine[name] == pytest.approx(value, **tolerance), (mine["step"], name)


def test_two_processes_equal_one_and_survive_the_loss_of_one(config_file, config, tmp_path):
    alone, together, moved = (tmp_path / name for name in ("alone", "together", "moved"))
    task.train(config, alone)

    processes = start(config_file, together, 2)
    wait_for(lambda: checkpoint.has_checkpoint(together), processes)
    processes[1].kill()
    killed = time.monotonic()
    output, _ = processes[0].communicate(timeout=60)
    processes[1].communicate()
    assert time.monotonic() - killed < 60
    assert processes[0].returncode not in (0, None)
    assert "another process of this run is gone" in output or "another task died" in output, output
    shutil.copytree(together, moved)

    # The second one is told an old state of the folder, as network file systems do: the first one decides.
    first, second = finish(start(config_file, together, 2, patches=["pass", "checkpoint.steps = lambda workdir: []"]))
    # Whether a later one than that of step 4 was whole when the process died is a matter of milliseconds.
    last = max(int(path.name) for path in (moved / "checkpoints").iterdir() if path.name.isdigit())
    assert f"continuing at step {last}\n" in first and f"step {STEPS}/{STEPS}" in first
    assert "step" not in second  # only the first process speaks
    check_equal(metrics(together), metrics(alone))
    # Each has written the checksums of its own files.
    saved = together / "checkpoints" / str(STEPS)
    names = files.read_checksums(saved)
    assert names and {"ocdbt.process_0", "ocdbt.process_1"} <= {part for name in names for part in name.split("/")}
    assert not verified.damage(saved)
    # What two processes saved, one continues.
    task.train(config, moved)
    check_equal(metrics(moved), metrics(alone))


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_continues_what_any_other_began(count, config_file, config, tmp_path):
    alone, whole, broken = (tmp_path / name for name in ("alone", "whole", "broken"))
    task.train(config, alone)
    finish(start(config_file, whole, count))
    check_equal(metrics(whole), metrics(alone))

    # Killed and started again as it was: not a bit differs.
    processes = start(config_file, broken, count)
    wait_for(lambda: checkpoint.has_checkpoint(broken), processes)
    processes[0].kill()
    for process in processes:
        process.communicate(timeout=60)
    finish(start(config_file, broken, count))
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()

    # SIGTERM to one of them stops all at the same step; one process, with its parameters split, goes on.
    stopped = tmp_path / "stopped"
    processes = start(config_file, stopped, count, "--config.train.checkpoint_every=1000")
    wait_for(lambda: len(metrics(stopped)) >= 3, processes)
    processes[-1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [75] * count, outputs
    assert "stopped by a signal after step" in outputs[0]
    task.train(config, stopped)
    check_equal(metrics(stopped), metrics(alone))


@pytest.mark.parametrize(("kind", "says", "is_gone"), [
    (jax.errors.JaxRuntimeError, "UNKNOWN: Gloo AllGather failed: Read error [127.0.0.1]:56977: Connection reset by "
     "peer", True),
    (jax.errors.JaxRuntimeError, "DEADLINE_EXCEEDED: Barrier timed out", True),
    (jax.errors.JaxRuntimeError, "INTERNAL: cuDNN launch failure", False),
    (jax.errors.JaxRuntimeError, "INVALID_ARGUMENT: a bug of ours", False),
    # So JAX says it where the result of what failed is read.
    (ValueError, "UNKNOWN: Gloo AllGather failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Read error "
     "[127.0.0.1]:32663: Connection reset by peer", True),
    (ValueError, "the encoder has no connection of that name", False),
])
def test_not_every_error_means_that_another_process_is_gone(kind, says, is_gone, monkeypatch, caplog):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", lambda code: sys.exit(code))
    with pytest.raises(SystemExit if is_gone else kind), distributed.ends_with_the_others():
        raise kind(says)
    assert ("another process of this run is gone" in caplog.text) == is_gone


def test_a_process_that_fails_says_why_and_ends_the_others(config_file, tmp_path):
    processes = start(config_file, tmp_path / "run", 2, of_the_last=["--config.data.source=folder:/nowhere"])
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert processes[1].returncode == 1 and processes[0].returncode not in (0, None)
    # Ours, or JAX's own where it misses the heartbeat before Gloo gives up.
    assert "another process of this run is gone" in outputs[0] or "another task died" in outputs[0]
    assert outputs[1].strip().splitlines()[-1].startswith("error: no folder /nowhere")


def test_evaluation_by_two_processes_names_every_image_it_left_out(config, tmp_path):
    task.train(config, tmp_path / "run")
    (tmp_path / "images").mkdir()
    for i in range(16):
        file = tmp_path / "images" / f"{i:02d}.png"
        Image.new("RGB", (32, 32), (i, 0, 0)).save(file)
        if i in (1, 5):
            file.write_text("this is no picture")
    finish(run_together("vqrae_jax.evaluate", 2, f"--workdir={tmp_path / 'run'}", f"--out={tmp_path}",
                        f"--data=folder:{tmp_path / 'images'}"))
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["num_images"] == 14
    assert sorted(Path(name).name for name in result["left_out"]) == ["01.png", "05.png"]


@pytest.mark.parametrize(("flags", "says"), [
    (["--num_processes=2"], "--coordinator_address, --num_processes and --process_id go together"),
    (["--workdir=gs://bucket/run"], "--workdir=gs://bucket/run is no folder"),
    (["--config.mesh.fsdp=3"], "mesh.data -1 and mesh.fsdp 3 do not fit 1 device"),
])
def test_what_cannot_start_says_so(flags, says, config_file, tmp_path):
    process = command("vqrae_jax.main", f"--config={config_file}", f"--workdir={tmp_path / 'run'}", *flags)
    assert process.returncode == 1
    assert says in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1
