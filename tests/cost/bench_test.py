"""The `bench` verb: its cases, and PyTorch and transformers beside them."""

import importlib
import json
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from tests.conftest import REFERENCE
from tests.generator.tiny import tiny as tiny_generator
from tests.verbs import command
from vqrae_jax import config as config_lib
from vqrae_jax.cost import bench

TINY = [f"--config.model.encoder.path={REFERENCE / 'siglip_vision'}", "--config.model.quantizer.size=32",
        "--config.model.quantizer.dim=32", "--config.data.image_size=32", "--batch=4", "--repeats=1"]
GENERATOR = ("vqrae_jax.bench", "--config=configs/nano_generator.py", "--batch=3", "--repeats=1",
             *(f"--config.{key}" for key in ("data.grid=4", "data.size=24", "model.width=32", "model.depth=1",
                                             "model.heads=2", "model.kv_heads=2", "model.mlp_dim=48")))


def run(*arguments: str) -> subprocess.CompletedProcess:
    return command("vqrae_jax.bench", "--config=configs/bench_medium.py", *TINY, *arguments)


def test_it_measures_every_kind_of_case_and_writes_json(tmp_path):
    file = tmp_path / "out.json"
    done = run("--case=tokenize", "--case=train_stage1", "--case=input", "--config.data.workers=1", f"--json={file}")
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())
    printed = [line.split()[0] for line in done.stdout.splitlines()]
    assert list(results) == printed == ["tokenize", "train_stage1", "input"]
    for case, result in results.items():
        images = 4 * {"input": bench.INPUT_BATCHES, "tokenize": bench.TOKENIZE_BATCHES}.get(case, 1)
        assert result["images_per_second"] == pytest.approx(images / result["seconds"])
        assert result["peak_bytes"] > 2**20
        assert ("flops_per_second" in result) == (case == "train_stage1")


def test_a_generator_samples_a_batch_or_one_image(tmp_path):
    file = tmp_path / "out.json"
    done = command(*GENERATOR, "--case=generate", f"--json={file}")
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())["generate"]
    assert result["images_per_second"] * result["seconds"] == pytest.approx(3)
    assert result["flops_per_second"] > 0
    config = tiny_generator()
    config.data.update(grid=4, size=24, classes=3)
    batch, one = (bench.model_flops(config_lib.parse(config), case) for case in ("generate", "generate_one"))
    assert batch == 8 * one


@pytest.mark.slow
def test_transformers_takes_turns(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    file = tmp_path / "out.json"
    done = command(*GENERATOR, "--case=generate", "--against=torch", f"--json={file}")
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())["generate"]
    assert result["ratio"] == pytest.approx(result["torch_seconds"] / result["seconds"])


def test_what_is_measured_is_not_lost_when_a_later_case_fails(tmp_path):
    file = tmp_path / "out.json"
    done = run("--case=encode", "--case=input", "--data=folder:/nowhere", f"--json={file}")
    assert done.returncode == 1
    assert list(json.loads(file.read_text())) == ["encode"]
    done = run("--case=decode", f"--json={tmp_path}/nowhere/out.json")
    assert (done.returncode, done.stdout) == (1, "")
    assert "nowhere/out.json" in done.stderr.splitlines()[-1]


def test_pytorch_takes_turns(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    file = tmp_path / "out.json"
    done = run("--case=decode", "--against=torch", f"--json={file}")
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())["decode"]
    assert result["ratio"] == pytest.approx(result["torch_seconds"] / result["seconds"])


def test_a_model_that_pytorch_does_not_have_is_refused_in_one_line():
    done = run("--case=encode", "--against=torch", "--config.train.accumulate=2")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: --against=torch knows")


def test_the_stages_differ_in_what_learns():
    config = config_lib.parse(importlib.import_module("configs.bench_medium").get_config())
    one, two, gan = (bench.stage(config, f"train_stage{name}") for name in ("1", "2", "2_gan"))
    assert (one.loss.distill_weight, one.gan.discriminator, two.optim.lr_multipliers) == (0.0, "none", ())
    assert two.loss.distill_weight > 0
    assert (two.gan.discriminator, gan.gan.discriminator) == ("none", "patchgan")
    flops = [bench.model_flops(config, f"train_stage{name}") for name in ("1", "2", "2_gan")]
    assert sorted(flops) == flops
    assert len(set(flops)) == 3


def test_pytorch_computes_the_same_model():
    """A block of both, with the same weights: attention and MLP agree."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from flax import nnx

    from vqrae_jax.cost import pytorch
    from vqrae_jax.models import flat
    from vqrae_jax.models.vit import Block, TransformerSpec

    spec = TransformerSpec(width=16, depth=1, heads=2, mlp_dim=32, activation="gelu_tanh")
    block = Block(spec, dtype=np.float32, rngs=nnx.Rngs(0))
    _, arrays, _ = flat.split(block)
    theirs = pytorch.Block(SimpleNamespace(**vars(spec)))
    names = {"norm1": theirs.norm1, "norm2": theirs.norm2, "attention/qkv": theirs.attention.qkv,
             "attention/out": theirs.attention.out, "mlp/fc1": theirs.mlp[0], "mlp/fc2": theirs.mlp[2]}
    with torch.no_grad():
        for name, module in names.items():
            weight = arrays[f"{name}/scale"] if "norm" in name else arrays[f"{name}/kernel"].T
            module.weight.copy_(torch.from_numpy(np.array(weight)))
            module.bias.copy_(torch.from_numpy(np.array(arrays[f"{name}/bias"])))
        x = np.random.default_rng(0).standard_normal((2, 9, 16), np.float32)
        np.testing.assert_allclose(block(x), theirs(torch.from_numpy(x)), atol=2e-5)
