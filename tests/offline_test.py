"""Nothing asks the network but for hub ids: not an import, not a training run, not the models that ship."""

import os
import shutil
import socket
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


def test_training_and_what_ships_need_no_network(tmp_path):
    command = [sys.executable, "-m", "tests.offline", "vqrae_jax.main", "--config=configs/nano_stage1.py",
               f"--workdir={tmp_path / 'run'}", "--config.train.steps=2", "--config.train.batch_size=8",
               "--config.optim.warmup_steps=1", "--config.eval.limit=8", "--config.eval.batch_size=8"]
    # Where the system lets us, there is no network at all, not even for libraries that are not Python.
    alone = ["unshare", "--net", "--map-root-user"]
    if shutil.which("unshare") and not subprocess.run([*alone, "true"], capture_output=True).returncode:
        command = [*alone, *command]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, "HF_HOME": str(
        tmp_path)}, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "psnr" in ran.stdout and "(1, 64, 64, 3)" in ran.stdout


def test_tests_have_no_network():
    with pytest.raises(socket.gaierror, match="this test has no network"):
        socket.create_connection(("example.org", 80))
