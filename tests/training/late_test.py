"""Two hosts whose clocks are hours apart, each of which sees seconds later what the other one wrote."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.tokenizer.codes_test import contents
from tests.training.distributed_test import check_equal, finish, metrics, run_together, write_config
from vqrae_jax import config as config_lib
from vqrae_jax.files import read_checksums
from vqrae_jax.tokenizer import codes, task
from vqrae_jax.training import verified

pytestmark = pytest.mark.slow


def together(module: str, folder: Path, *flags: str) -> list[str]:
    """Runs a verb in two processes with a late `folder`; which files are whose follows from their names."""
    folder.mkdir(exist_ok=True)
    late = lambda others, hours: (f"from tests.training import late; late.install({str(folder)!r}, {others!r}, "
                                  f"seconds=2, hours={hours})")
    seconds = r"process_1|-0000[13]-of"
    firsts = rf"^(?!.*({seconds}|\.part))"
    return finish(run_together(module, 2, *flags, patches=[late(seconds, 0), late(firsts, -5)]))


def test_training_is_that_of_one_host(tiny_config, tmp_path):
    tiny_config.train.update(steps=4, batch_size=8, checkpoint_every=2, eval_every=4)
    task.train(config_lib.parse(tiny_config), tmp_path / "alone")
    config_file = write_config(tiny_config, tmp_path / "tiny.py")
    workdir = tmp_path / "shared" / "run"
    for says in ("training to step 4\n", "continuing at step 2\n"):
        outputs = together("vqrae_jax.main", tmp_path / "shared", f"--config={config_file}", f"--workdir={workdir}")
        assert says in outputs[0], outputs
        check_equal(metrics(workdir), metrics(tmp_path / "alone"))
        for step in (2, 4):
            assert not verified.damage(workdir / "checkpoints" / str(step))
        expected = read_checksums(workdir / "checkpoints" / "4")
        assert any("ocdbt.process_1" in name for name in expected), "those of the second process are missing"
        shutil.rmtree(workdir / "checkpoints" / "4")


def test_codes_are_those_of_one_host(tiny_config, tmp_path):
    tiny_config.train.update(steps=3)
    task.train(config_lib.parse(tiny_config), tmp_path / "run")
    (tmp_path / "images").mkdir()
    for i in range(12):
        Image.new("RGB", (32, 32), (20 * i, 0, 0)).save(tmp_path / "images" / f"{i:02d}.png")
    data, shared = f"folder:{tmp_path / 'images'}", tmp_path / "shared"
    codes.tokenize(tmp_path / "run", data, tmp_path / "alone", views=1, weights="ema", batch_size=4, shard_size=4,
                   max_bad=None)
    together("vqrae_jax.tokenize", shared, f"--workdir={tmp_path / 'run'}", f"--data={data}",
             f"--out={shared / 'codes'}", "--batch_size=4", "--shard_size=4")
    assert contents(shared / "codes") == contents(tmp_path / "alone")
