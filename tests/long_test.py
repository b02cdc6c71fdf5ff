"""Checks that take many minutes: `pytest -m long -n 0 -s`."""

import importlib
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import soak
from tests.conftest import REPOSITORY
from vqrae_jax import config as config_lib
from vqrae_jax.data import BadImages, open_source, train_batches
from vqrae_jax.tokenizer import build, init, train_state
from vqrae_jax.tokenizer.loss import make_train_step
from vqrae_jax.training import sharding

pytestmark = pytest.mark.long

NANO = ("--config.train.steps=40", "--config.train.batch_size=8", "--config.train.log_every=1",
        "--config.train.checkpoint_every=6", "--config.train.eval_every=20", "--config.eval.limit=64",
        "--config.optim.warmup_steps=5", "--config.model.quantizer.size=256")


def main(*arguments) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "vqrae_jax.main", *map(str, arguments)], cwd=REPOSITORY,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*arguments) -> str:
    process = main(*arguments)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def steps(workdir: Path) -> int:
    file = workdir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.parametrize("stage", [1, 2])
def test_five_kills_at_random_steps_leave_no_trace(stage, tmp_path):
    stage1, flags = tmp_path / "stage1", NANO
    if stage == 2:
        finish("--config=configs/nano_stage1.py", f"--workdir={stage1}", *NANO)
        flags = (*NANO, f"--config.init_from={stage1}")
    config = f"--config=configs/nano_stage{stage}.py"
    finish(config, f"--workdir={tmp_path / 'whole'}", *flags)
    expected = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    rng = random.Random(stage)
    for number in range(5):
        workdir, kill_at = tmp_path / f"killed{number}", rng.randrange(1, 40)
        process = main(config, f"--workdir={workdir}", *flags)
        while steps(workdir) < kill_at and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed_after = steps(workdir)
        restart = finish(config, f"--workdir={workdir}", *flags)
        # Kills before the first checkpoint start over.
        assert ("continuing at step" in restart) == (killed_after > 13) or killed_after in range(6, 14)
        assert (workdir / "metrics.jsonl").read_bytes() == expected, f"killed after {killed_after} lines"
        print(f"stage {stage}: killed after {killed_after} lines, continued identically")


def test_nothing_grows_in_20000_steps(tmp_path):
    """Memory, descriptors, threads, and the time of a step; see soak.py.

    The C library is told to give back what is free: else what it keeps grows, in an order that threads decide.
    """
    given_back = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "131072"}
    subprocess.run([sys.executable, "-m", "tests.soak", str(tmp_path)], cwd=REPOSITORY, check=True,
                   env={**os.environ, **given_back})
    seen = list(map(json.loads, (tmp_path / "soak.jsonl").read_text().splitlines()))
    grows = soak.growth(seen)
    assert grows["allocated"] < 1 and grows["process"] < 1 and grows["all"] < 1
    assert abs(grows["descriptors"]) < 1 and abs(grows["threads"]) < 0.5
    early, late = seen[len(seen) // 4:len(seen) // 2], seen[-len(seen) // 4:]
    assert statistics.median(line["step"] for line in late) < 1.5 * statistics.median(line["step"] for line in early)


def test_siglip_l_trains_and_evaluates_on_real_images_within_20_gb(shared_data, tmp_path):
    """Full size, random weights: one training step and one evaluation of a batch of 8 on a CPU."""
    process = main("--config=configs/siglip_l_stage1.py", f"--workdir={tmp_path / 'run'}",
                   f"--config.data.source=folder:{shared_data / 'imagenet_sample' / 'val256'}",
                   "--config.model.encoder.random_weights=True",
                   "--config.model.dtype=float32", "--config.model.quantizer.init=random", "--config.train.steps=1",
                   "--config.loss.perceptual.random_weights=True", "--config.gan.discriminator=none",
                   "--config.train.batch_size=8", "--config.optim.warmup_steps=0", "--config.eval.batch_size=8",
                   "--config.eval.limit=8", "--config.log.tensorboard=False")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(output, f"peak memory {peak:.1f} GiB")
    assert peak < 20e9 / 2**30
    for count in ("303,297,536", "1,049,600", "304,149,248"):
        assert count in output


def test_twenty_seeds_with_a_gan_in_bfloat16_meet_no_nan(shared_data):
    """200 steps each on CIFAR-10; the discriminator learns from step 60 and is used from step 80."""
    config = importlib.import_module("configs.nano_gan").get_config()
    config.data.source = f"tfds:cifar10@{shared_data / 'tfds'}"
    config.model.dtype = "bfloat16"
    config.train.update(steps=200, batch_size=8)
    config.optim.warmup_steps = 20
    config.gan.update(discriminator_start_step=60, start_step=80, ramp_steps=20)
    first = config_lib.parse(config)
    structure, mesh = build.structure(first), sharding.one_device()
    # Compiled once: what differs between the seeds are the initial values and the data.
    before, learning = (jax.jit(make_train_step(first, structure, phase), donate_argnums=0) for phase in ("", "gan"))
    source = open_source(first.data.source, training=True)
    for seed in range(20):
        config.seed = seed
        parsed = config_lib.parse(config)
        params, buffers = init.model_arrays(parsed, structure, mesh)
        batches = train_batches(source, image_size=64, batch_size=8, seed=seed, crop_scale_min=0.6, flip=True,
                                threads=1, workers=0, max_bad=0.0, bad_images=BadImages(None))
        tokens = [np.concatenate([next(batches)["image"] for _ in range(32)])]
        arrays = {**params, **buffers} | init.codebook_from_data(parsed, structure, {**params, **buffers}, tokens)
        state, frozen = train_state.init(parsed, structure, {path: arrays[path] for path in params},
                                         {path: arrays[path] for path in buffers}, *init.network_arrays(parsed, mesh))
        seen = []
        for i in range(200):
            state, metrics = (learning if i >= 60 else before)(state, frozen, {"image": next(batches)["image"]})
            seen.append(metrics)
        batches.close()
        seen = jax.device_get(seen)
        assert int(state.skipped) == 0
        assert all(np.isfinite(value) for metrics in seen for value in metrics.values())
        for leaf in jax.tree.leaves(jax.device_get(state)):
            assert np.all(np.isfinite(leaf))
        last = {name: f"{seen[-1][name]:.4f}" for name in ("loss/pixel", "loss/discriminator", "gan/adaptive_weight")}
        print(f"seed {seed}: no NaN; at the end {last}", flush=True)
