"""The loop trains any task: here one that knows no image and no code."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.conftest import REPOSITORY
from tests.training import toy
from vqrae_jax import config as config_lib
from vqrae_jax.training import checkpoint, compilation, loop, sharding
from vqrae_jax.training.reporting import Reporter

STEPS = 120


def lines(workdir: Path) -> list[str]:
    return (workdir / "metrics.jsonl").read_text().splitlines()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("toy") / "whole"
    result = loop.run(toy.NextCharacter(toy.config(STEPS)), workdir)
    assert result["bits"] < 4.0  # 8 at the start, when every byte is as likely as any other
    return workdir


def test_a_run_of_any_task_leaves_what_its_task_says(whole):
    records = [json.loads(line) for line in lines(whole)]
    assert [r["step"] for r in records if "loss/next" in r] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records if "eval/bits" in r] == list(range(10, STEPS + 1, 10))
    assert [r["weight/next"] for r in records if "weight/next" in r] == [1.0] * (STEPS // 2) + [2.0] * (STEPS // 2)
    assert (whole / "text.bin").read_bytes() == toy.TEXT.tobytes()
    assert not (whole / "samples").exists()  # it has no pictures
    # The best is the one of the fewest bits.
    bits = {r["step"]: r["eval/bits"] for r in records if "eval/bits" in r}
    kept = {int(path.name) for path in (whole / "checkpoints").iterdir()}
    assert kept == {STEPS - 10, STEPS, min(bits, key=bits.__getitem__)}


def test_a_killed_process_continues_exactly(whole, tmp_path):
    """kill -9 at a moment nobody chose, here the first after a checkpoint is seen on disk."""
    process = subprocess.Popen([sys.executable, "-m", "tests.training.toy", str(tmp_path), str(STEPS)], cwd=REPOSITORY)
    deadline = time.monotonic() + 120
    while not checkpoint.has_checkpoint(tmp_path) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert checkpoint.has_checkpoint(tmp_path)
    assert len(lines(tmp_path)) < len(lines(whole))
    loop.run(toy.NextCharacter(toy.config(STEPS)), tmp_path)
    assert lines(tmp_path) == lines(whole)


def test_a_signal_stops_any_task_between_two_steps(whole, tmp_path, monkeypatch):
    report = Reporter.train

    def interrupt(self, step, *rest):
        report(self, step, *rest)
        if step == STEPS // 2:  # the next step is of another phase, and this one is to be evaluated
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Reporter, "train", interrupt)
    with pytest.raises(KeyboardInterrupt, match=f"after step {STEPS // 2}; the same command continues"):
        loop.run(toy.NextCharacter(toy.config(STEPS)), tmp_path)
    monkeypatch.undo()
    loop.run(toy.NextCharacter(toy.config(STEPS)), tmp_path)
    assert lines(tmp_path) == lines(whole)


def test_last_and_best_checkpoints_are_kept_and_a_restart_remembers_which_was_best(tmp_path, monkeypatch):
    bits = iter([5.0, 1.0, 4.0, 2.0, 3.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr(toy.NextCharacter, "evaluator", lambda self, mesh: lambda *_: ({"bits": next(bits)}, {}))
    report = Reporter.train

    def interrupt(self, step, *rest):
        report(self, step, *rest)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Reporter, "train", interrupt)
    train = config_lib.Train(steps=8, batch_size=8, log_every=1, checkpoint_every=1, eval_every=1)
    task = toy.NextCharacter(dataclasses.replace(toy.config(8), train=train))
    kept = lambda: sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    with pytest.raises(KeyboardInterrupt):
        loop.run(task, tmp_path)
    assert kept() == [2, 4, 5]
    loop.run(task, tmp_path)
    assert kept() == [2, 7, 8]


def test_an_unfinished_checkpoint_is_ignored(whole, tmp_path, caplog):
    caplog.set_level("INFO", "vqrae_jax")
    shutil.copytree(whole, tmp_path / "run")
    unfinished = tmp_path / "run" / "checkpoints" / f"{STEPS + 10}.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "everything").write_text("half")
    last = json.loads(lines(whole)[-1])
    assert loop.run(toy.NextCharacter(toy.config(STEPS)), tmp_path / "run") == {"bits": last["eval/bits"]}
    assert f"continuing at step {STEPS}\n" in caplog.text
    assert "nothing left to do" in caplog.text
    assert not unfinished.exists()


def test_a_full_disk_says_so_and_keeps_the_last_checkpoint(whole, tmp_path, monkeypatch):
    save = ocp.AsyncCheckpointer.save

    def full(self, folder, *arguments, **options):
        if folder.name == "30":
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, folder, *arguments, **options)

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", full)
    with pytest.raises(OSError, match="the disk is full: .* what is complete is kept"):
        loop.run(toy.NextCharacter(toy.config(STEPS)), tmp_path)
    monkeypatch.undo()
    assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == 20
    loop.run(toy.NextCharacter(toy.config(STEPS)), tmp_path)
    assert lines(tmp_path) == lines(whole)


def test_a_folder_of_another_config_is_refused(whole):
    before = {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()}
    other = dataclasses.replace(toy.config(STEPS), seed=1)
    with pytest.raises(ValueError, match="another config: seed: 0 -> 1; choose another --workdir"):
        loop.run(toy.NextCharacter(other), whole)
    assert before == {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()}


def test_a_phase_that_cannot_be_compiled_ends_the_run_before_its_first_step(tmp_path):
    class TooLarge(toy.NextCharacter):
        def train_step(self, phase):
            if phase == "second half":
                raise ValueError("too large")
            return super().train_step(phase)

    with pytest.raises(ValueError, match="too large"):
        loop.run(TooLarge(toy.config(STEPS)), tmp_path)
    assert not checkpoint.has_checkpoint(tmp_path)


class Memory(NamedTuple):
    argument_size_in_bytes: int = 3 * 2**30
    output_size_in_bytes: int = 2 * 2**30
    alias_size_in_bytes: int = 2 * 2**30
    temp_size_in_bytes: int = 4 * 2**30


def test_a_program_that_is_too_large_for_a_device_says_so():
    compilation.check_memory(Memory(), {"bytes_limit": 7 * 2**30}, name="the step")
    compilation.check_memory(Memory(), None, name="the step")
    compilation.check_memory(None, {"bytes_limit": 7 * 2**30}, name="the step")
    with pytest.raises(ValueError, match=r"the step needs 7.0 GiB of a device that has 6.0 GiB: .*accumulate=N"):
        compilation.check_memory(Memory(), {"bytes_limit": 6 * 2**30}, name="the step")


def test_compiled_programs_are_kept_for_the_next_start(tmp_path, monkeypatch):
    run = lambda name: subprocess.run(
        [sys.executable, "-m", "tests.training.toy", str(tmp_path / name), "10", str(tmp_path / "cache")],
        cwd=REPOSITORY, capture_output=True, text=True, check=True)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    run("first")
    steps = lambda: {file: file.stat().st_mtime_ns for file in tmp_path.glob("cache/*/jit_train_step-*-cache")}
    written = steps()
    assert len(written) == 2  # phases
    run("second")
    assert steps() == written
    assert lines(tmp_path / "first") == lines(tmp_path / "second")


def test_the_number_of_steps_may_be_raised_and_lowered(tmp_path, caplog):
    caplog.set_level("INFO", "vqrae_jax")
    run = lambda steps: loop.run(toy.NextCharacter(toy.config(steps)), tmp_path)
    run(20)
    run(40)
    assert len(re.findall(r"the first step ended \d.*\(.*arrays \d.*\) after the start", caplog.text)) == 2
    assert "train.steps: 20 -> 40 from step 20 on" in caplog.text
    assert "the learning rate goes on at 0.0587 instead of 0.01 and reaches optim.end_lr 0.01 at step 40" in caplog.text
    records = [json.loads(line) for line in lines(tmp_path)]
    assert [r["step"] for r in records if "loss/next" in r] == list(range(1, 41))
    # A run that has more steps than it shall have is finished, and says how good it is.
    assert run(30) == {"bits": records[-1]["eval/bits"]}


def test_a_run_that_died_in_an_evaluation_makes_up_for_it(whole, tmp_path, monkeypatch):
    evaluator = toy.NextCharacter.evaluator
    for step in (10, STEPS):
        def dies(self, mesh, at=step):
            evaluate = evaluator(self, mesh)

            def evaluated(state, frozen):
                if state.step == at:
                    raise KeyboardInterrupt
                return evaluate(state, frozen)
            return evaluated

        monkeypatch.setattr(toy.NextCharacter, "evaluator", dies)
        with pytest.raises(KeyboardInterrupt):
            loop.run(toy.NextCharacter(toy.config(STEPS)), tmp_path)
        monkeypatch.undo()
    result = loop.run(toy.NextCharacter(toy.config(STEPS)), tmp_path)
    assert lines(tmp_path) == lines(whole)
    assert result == {"bits": json.loads(lines(whole)[-1])["eval/bits"]}


def test_what_is_frozen_is_used_in_the_type_that_the_task_says_and_saved_as_it_was(tmp_path):
    used = []

    class Half(toy.NextCharacter):
        def abstract(self, mesh):
            state, frozen, batch = super().abstract(mesh)
            return state, toy.Frozen({path: x.update(dtype=np.float16) for path, x in frozen.embedding.items()}), batch

        def _loss(self, params, frozen, batch):
            used.append(frozen.embedding["embedding"].dtype)
            return super()._loss(params, frozen, batch)

        def evaluator(self, mesh):
            return lambda state, frozen: ({"bits": float(np.sum(frozen.embedding["embedding"], dtype=np.float32))}, {})

    first, second = (loop.run(Half(toy.config(steps)), tmp_path) for steps in (3, 5))
    assert set(used) == {np.dtype(np.float16)}
    assert first == second  # the same, cast where they were made or where they were read
    task = toy.NextCharacter(toy.config(3))
    mesh = sharding.one_device()
    saved = checkpoint.load_frozen(tmp_path, task.abstract(mesh)[1])
    np.testing.assert_array_equal(saved.embedding["embedding"], task.init(mesh)[1].embedding["embedding"])


def test_a_step_that_is_not_finite_is_skipped_and_too_many_stop_the_run(tmp_path, monkeypatch):
    batch = toy.Batches.__next__

    class Broken(toy.NextCharacter):
        def _loss(self, params, frozen, batch):
            # Byte 0 is in no batch but broken ones.
            return super()._loss(params, frozen, batch) / (batch["character"][0] != 0)

    def broken_from_step_11(self):
        values = batch(self)
        return values if self.next_batch <= 10 else values | {"character": np.zeros_like(values["character"])}

    monkeypatch.setattr(toy.Batches, "__next__", broken_from_step_11)
    with pytest.raises(FloatingPointError, match="20 steps in a row up to step 30"):
        loop.run(Broken(toy.config(STEPS)), tmp_path)
    abstract, *_ = Broken(toy.config(STEPS)).abstract(sharding.one_device())
    with closing(checkpoint.Checkpoints(tmp_path)) as saved:
        last, *_ = saved.restore(30, {"everything": abstract._asdict()})
    assert np.all(np.isfinite(last["everything"]["params"]["logits/kernel"]))  # the last good state
    for _ in range(2):  # where no step is left, a restart says the same
        with pytest.raises(FloatingPointError, match="20 steps in a row up to step 30"):
            loop.run(Broken(toy.config(30)), tmp_path / "to the end")
    records = [json.loads(line) for line in lines(tmp_path)]
    assert [r["loss/next"] is None for r in records if "loss/next" in r] == [False] * 10 + [True] * 20


def test_the_log_is_opened_without_pytorch_which_takes_seconds_to_import(tmp_path):
    (tmp_path / "torch.py").write_text("print('imported')")
    program = ("import pathlib; from vqrae_jax import config; from vqrae_jax.training.reporting import Reporter\n"
               "Reporter(pathlib.Path('run'), config.Config(), unit='images', first_step=0, saved_lines=None).close()\n"
               "print('closed'); import torch")
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True,
                         env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert ran.stdout == "closed\nimported\n"
    assert list((tmp_path / "run").glob("events.out.tfevents*"))
