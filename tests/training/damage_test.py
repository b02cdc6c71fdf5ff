"""Run folders that were damaged: what is whole is used, and what is not is named."""

import itertools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import killed_in_step, tiny
from tests.training import toy
from vqrae_jax import config as config_lib
from vqrae_jax import files
from vqrae_jax.tokenizer import runs, task
from vqrae_jax.training import checkpoint, loop, sharding, verified

STEPS = 50


def flip(file: Path, rng: np.random.Generator, bits: int = 3) -> None:
    data = bytearray(file.read_bytes())
    for place in rng.choice(8 * len(data), min(bits, 8 * len(data)), replace=False):
        data[place // 8] ^= 1 << place % 8
    file.write_bytes(data)


def cut(file: Path, rng: np.random.Generator) -> None:
    file.write_bytes(file.read_bytes()[:rng.integers(file.stat().st_size)])


def swap(file: Path, rng: np.random.Generator) -> None:
    """With one that has the same name or size in the same part of the run's folder, or any other there."""
    run = next(parent for parent in file.parents if (parent / "config.json").exists())
    top = file.relative_to(run).parts[0]
    others = [path for path in sorted((run / top if (run / top).is_dir() else run).rglob("*"))
              if path.is_file() and path != file]
    alike = [path for path in others if path.name == file.name or path.stat().st_size == file.stat().st_size]
    other = (alike or others)[rng.integers(len(alike or others))]
    before = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(before)


DAMAGES: dict[str, Callable[[Path, np.random.Generator], object]] = {
    "a bit": lambda file, rng: flip(file, rng, 1),
    "three bits": flip,
    "cut": cut,
    "emptied": lambda file, rng: file.write_bytes(b""),
    "missing": lambda file, rng: file.unlink(),
    "swapped": swap,
}


def lines(workdir: Path) -> list[str]:
    return (workdir / "metrics.jsonl").read_text().splitlines()


def trained(workdir: Path, steps: int = STEPS) -> Path:
    loop.run(toy.NextCharacter(toy.config(steps)), workdir)
    return workdir


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("damage") / "whole")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """The same run, as it was after 30 steps, with a checkpoint of step 20 and one of step 30."""
    workdir = tmp_path_factory.mktemp("damage") / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        evaluator = toy.NextCharacter.evaluator

        def dies(self, mesh):
            evaluate = evaluator(self, mesh)

            def evaluated(state, frozen):
                if state.step == 30:
                    raise KeyboardInterrupt
                return evaluate(state, frozen)
            return evaluated

        patch.setattr(toy.NextCharacter, "evaluator", dies)
        with pytest.raises(KeyboardInterrupt):
            trained(workdir)
    assert checkpoint.steps(workdir) == [20, 30]
    return workdir


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("file", ["data", "checksums", "position"])
def test_a_run_goes_back_to_the_newest_whole_checkpoint_and_says_so(kind, file, whole, stopped, tmp_path, caplog):
    workdir = Path(shutil.copytree(stopped, tmp_path / "run"))
    newest = workdir / "checkpoints" / "30"
    damaged = {"data": max(newest.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size),
               "checksums": newest / files.CHECKSUMS, "position": newest / "data" / "metadata"}[file]
    DAMAGES[kind](damaged, np.random.default_rng(0))
    if (file, kind) == ("checksums", "swapped"):  # then neither of the two is what its checksums say
        with pytest.raises(ValueError, match="no checkpoint of .* is whole"):
            trained(workdir)
        return
    with caplog.at_level(logging.INFO, "vqrae_jax"):
        trained(workdir)
    assert lines(workdir) == lines(whole)
    if (file, kind) == ("checksums", "missing"):  # it looks as one of an earlier version
        assert "30 has no checksums, as versions before 0.7 wrote it: it is read unchecked" in caplog.text
        return
    assert "continuing at step 20\n" in caplog.text
    said = [line for line in caplog.messages if "checkpoint 30 of" in line]
    assert len(said) == 1 and "is damaged" in said[0] and "it is now 30.damaged, and may be removed" in said[0]
    # What was made again is whole.
    assert not verified.damage(workdir / "checkpoints" / "50")


def test_a_whole_checkpoint_is_not_removed_because_a_damaged_one_is_newer(stopped, tmp_path):
    workdir = Path(shutil.copytree(stopped, tmp_path / "run"))
    (workdir / "checkpoints" / "30" / "data" / "metadata").write_text('{"next_batch": 3}')
    trained(workdir, 22)
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"20", "22", "30.damaged"}
    assert not verified.damage(workdir / "checkpoints" / "20")


def test_where_nothing_is_whole_one_line_says_so_and_nothing_is_touched(stopped, tmp_path):
    workdir = Path(shutil.copytree(stopped, tmp_path / "run"))
    for step in (20, 30):
        (workdir / "checkpoints" / str(step) / "everything" / "_METADATA").unlink()
    before = sorted(workdir.rglob("*"))
    says = r"no checkpoint of .*run is whole \(30: everything/_METADATA is missing; 20: everything/_METADATA is miss"
    with pytest.raises(ValueError, match=says) as error:
        trained(workdir)
    assert "\n" not in str(error.value) and sorted(workdir.rglob("*")) == before
    frozen = Path(shutil.copytree(stopped, tmp_path / "frozen"))
    flip(max((frozen / "frozen").rglob("d/*"), key=lambda path: path.stat().st_size), np.random.default_rng(0))
    with pytest.raises(ValueError, match="frozen is damaged .* which all checkpoints of the run need: restore it"):
        trained(frozen)


@pytest.mark.parametrize("kind", DAMAGES)
def test_metrics_that_were_damaged_are_those_of_the_checkpoint(kind, whole, stopped, tmp_path, caplog):
    workdir = Path(shutil.copytree(stopped, tmp_path / "run"))
    if kind == "swapped":
        (workdir / "metrics.jsonl").write_text((workdir / "metrics.jsonl").read_text().replace("7", "8", 1))
    else:
        DAMAGES[kind](workdir / "metrics.jsonl", np.random.default_rng(0))
    trained(workdir)
    assert lines(workdir) == lines(whole)
    assert "metrics.jsonl is damaged: it goes on as it was at step 30" in caplog.text


def test_a_run_from_before_checksums_goes_on_with_a_note(whole, stopped, tmp_path, caplog):
    workdir = Path(shutil.copytree(stopped, tmp_path / "run"))
    for file in workdir.rglob(files.CHECKSUMS):
        file.unlink()
    for log_item in workdir.glob("checkpoints/*/log"):
        shutil.rmtree(log_item)
    values = json.loads((workdir / "config.json").read_text())
    del values["checksum"]
    (workdir / "config.json").write_text(json.dumps(values))
    trained(workdir)
    assert lines(workdir) == lines(whole)
    assert caplog.text.count("has no checksums, as versions before 0.7 wrote it: it is read unchecked") >= 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A run of a tokenizer with an average of its weights and frozen arrays; tests only read it."""
    workdir = tmp_path_factory.mktemp("damage") / "tokenizer"
    task.train(config_lib.parse(tiny()), workdir)
    assert checkpoint.steps(workdir)[-2:] == [4, 6]
    return workdir


def load(workdir: Path) -> str:
    config, _, arrays = runs.load_run(workdir, sharding.one_device())
    return f"{config} {runs.digest(arrays)}"


def test_a_damaged_checkpoint_is_not_loaded_and_a_whole_one_is_named(tokenizer, tmp_path):
    workdir = Path(shutil.copytree(tokenizer, tmp_path / "run"))
    flip(max((workdir / "checkpoints" / "6" / "model").rglob("d/*"), key=lambda path: path.stat().st_size),
         np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"checkpoint 6 of .* is damaged \(the content of model/.* has changed\): "
                                         "choose step 4, which is whole, or move .*checkpoints/6 away to have it"):
        load(workdir)
    runs.load_run(workdir, sharding.one_device(), step=4)
    shutil.rmtree(workdir / "checkpoints" / "4")
    config = tiny()
    config.init_from = str(workdir)
    with pytest.raises(ValueError, match="checkpoint 6 of .*: no other one is whole, restore it from a copy"):
        task.train(config_lib.parse(config), tmp_path / "next")


def damaged_runs(run: Path, folder: Path, count: int, seed: int):
    """Copies of a run, in each of which one thing is damaged: number, kind, file, folder."""
    rng = np.random.default_rng(seed)
    kinds = itertools.cycle(DAMAGES)
    every = [path.relative_to(run) for path in sorted(run.rglob("*")) if path.is_file()]
    for number, kind in zip(range(count), kinds, strict=False):
        workdir = Path(shutil.copytree(run, folder / "run"))
        file = every[rng.integers(len(every))]
        while not (workdir / file).stat().st_size and kind != "missing":
            file = every[rng.integers(len(every))]
        DAMAGES[kind](workdir / file, rng)
        yield number, kind, file, workdir
        shutil.rmtree(workdir)


@pytest.mark.parametrize("count", [18, pytest.param(500, marks=pytest.mark.long)])
def test_damaged_runs_are_loaded_as_if_whole_or_refused_in_a_line(count, tokenizer, tmp_path):
    expected, found = load(tokenizer), Counter()
    for number, kind, file, workdir in damaged_runs(tokenizer, tmp_path, count, seed=0):
        try:
            assert load(workdir) == expected, f"{number}: {kind} of {file} changed what is loaded"
            found[kind, "equal"] += 1
        except (ValueError, OSError) as error:
            assert "\n" not in str(error), error
            found[kind, "refused in a line"] += 1
    show(found)


@pytest.mark.parametrize("count", [3, pytest.param(60, marks=pytest.mark.long)])
def test_damaged_runs_are_continued_as_if_whole_or_refused_in_a_line(count, tokenizer, tmp_path):
    with killed_in_step(5):
        task.train(config_lib.parse(tiny()), tmp_path / "stopped")
    assert checkpoint.steps(tmp_path / "stopped") == [2, 4]
    expected, found = load(tokenizer), Counter()
    for number, kind, file, workdir in damaged_runs(tmp_path / "stopped", tmp_path, count, seed=1):
        try:
            task.train(config_lib.parse(tiny()), workdir)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error), error
            assert file.parts[0] not in ("checkpoints", "metrics.jsonl") or kind == "swapped", error
            found[kind, f"refused in a line: {file.parts[0]}"] += 1
            continue
        assert load(workdir) == expected, f"{number}: {kind} of {file} changed what is learned"
        assert lines(workdir) == lines(tokenizer), f"{number}: {kind} of {file} changed the metrics"
        found[kind, "equal"] += 1
    show(found)


def show(found: Counter) -> None:
    print("\n| damage | outcome | runs |\n|---|---|---|")
    for (kind, outcome), number in sorted(found.items()):
        print(f"| {kind} | {outcome} | {number} |")
