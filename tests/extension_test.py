"""What docs/extending.md says about adding things is run, from outside the package."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vqrae_jax
from tests.conftest import REFERENCE, REPOSITORY
from tests.tiny import Run
from vqrae_jax import config as config_lib
from vqrae_jax.cost import plan
from vqrae_jax.cost.flops import flops
from vqrae_jax.data import SOURCES
from vqrae_jax.metrics import METRICS
from vqrae_jax.models.discriminators import DISCRIMINATORS
from vqrae_jax.models.losses import IMAGE_LOSSES
from vqrae_jax.models.perceptual import NETWORKS
from vqrae_jax.models.quantizers import QUANTIZERS
from vqrae_jax.tokenizer import build, task, train_state
from vqrae_jax.weights.huggingface import FAMILIES

TABLES = (SOURCES, METRICS, DISCRIMINATORS, IMAGE_LOSSES, NETWORKS, QUANTIZERS, FAMILIES)
PAGE = (REPOSITORY / "docs" / "extending.md").read_text()
EXAMPLES = dict(re.findall(r"```python (\w+)\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture
def example():
    """Runs an example of the page; afterwards the tables are as they were."""
    before = [dict(table) for table in TABLES]
    yield lambda name: exec(EXAMPLES[name], {"__name__": name})
    for table, rows in zip(TABLES, before, strict=True):
        table.clear()
        table.update(rows)


def test_a_quantizer_from_outside_trains_checkpoints_loads_and_plans(example, tiny_config, tmp_path):
    with pytest.raises(ValueError, match=r"model.quantizer.kind must be one of simvq, .*, none, not 'random'"):
        tiny_config.model.quantizer.kind = "random"
        config_lib.parse(tiny_config)
    example("quantizer")
    tiny_config.model.quantizer.decay = 0.5
    with pytest.raises(ValueError, match=r"model.quantizer.decay 0.5 has no meaning for random, only for ema"):
        config_lib.parse(tiny_config)
    tiny_config.model.quantizer.decay = config_lib.Quantizer().decay
    tiny_config.model.quantizer.dim = 8
    config = config_lib.parse(tiny_config)
    result = task.train(config, tmp_path / "run")
    assert result["code_usage"] > 0
    assert task.train(config, tmp_path / "run") == result  # continues, and nothing is left to do

    model = vqrae_jax.load(tmp_path / "run")
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    codes = model.encode_to_indices(images)
    assert codes.shape == (2, 4, 4)
    np.testing.assert_array_equal(model.decode_from_indices(codes), model.reconstruct(images))

    # It is planned like any other: its layers and its search count, its buffer is split.
    structure = build.structure(config)
    assert flops(config, structure, "").search == 16 * 2 * 8 * 32
    mesh = jax.sharding.AbstractMesh((1, 4), ("data", "fsdp"))
    state, _ = train_state.abstract(config, structure, mesh)
    sharding = state.buffers["quantizer/directions"].sharding
    assert sharding.shard_shape((32, 8)) == (8, 8)


def test_a_quantizer_from_outside_is_compiled_for_a_tpu(example, tiny_config):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install 'vqrae_jax[tpu]'")
    example("quantizer")
    tiny_config.model.quantizer.kind = "random"
    tiny_config.mesh.fsdp = 4
    assert plan.plan(config_lib.parse(tiny_config), "v5e:2x2").fits


def test_a_scalar_loss_from_outside_is_optimised_and_reported(example, tiny_config):
    without = Run(config_lib.parse(tiny_config)).train(1)
    example("scalar_loss")
    metrics = Run(config_lib.parse(tiny_config)).train(1)
    assert metrics["weight/edges"] == 0.5
    assert metrics["loss/edges"] > 0
    assert metrics["loss/total"] == pytest.approx(without["loss/total"] + metrics["weighted/edges"], rel=1e-5)
    assert metrics["grad_norm/decoder"] != pytest.approx(without["grad_norm/decoder"], rel=1e-3)


def test_a_network_and_a_discriminator_from_outside_train(example, tiny_config):
    example("network_loss")  # a network with a buffer
    example("discriminator")
    tiny_config.loss.perceptual_weight = 1.0
    tiny_config.loss.perceptual.update(lpips=1.0, random_weights=True)
    tiny_config.gan.discriminator = "one_layer"
    run = Run(config_lib.parse(tiny_config))
    metrics = run.train(2)
    assert metrics["loss/lpips"] == metrics["loss/perceptual"] > 0
    assert metrics["grad_norm/discriminator"] > 0
    assert flops(run.config, run.structure, "gan").train > flops(run.config, run.structure, "").train


def test_a_source_and_a_metric_from_outside_are_used(example, tiny_config, tmp_path):
    example("source")
    example("metric")
    example("metric_of_sums")
    tiny_config.data.source = "noise:24"
    tiny_config.train.steps = 3
    tiny_config.eval.limit = 0
    result = task.train(config_lib.parse(tiny_config), tmp_path)
    assert result["num_images"] == 24
    assert 0.1 < result["mae"] < 0.4  # of images that are noise
    assert 0 < max(abs(result[f"shift_{channel}"]) for channel in ("red", "green", "blue")) < result["mae"]
    tiny_config.data.source = "nois:24"
    with pytest.raises(ValueError, match=r"give embedded, .*, array_record:GLOB or noise:COUNT"):
        task.train(config_lib.parse(tiny_config), tmp_path / "other")


def test_an_encoder_family_from_outside_is_loaded(example, tmp_path):
    folder = Path(shutil.copytree(REFERENCE / "siglip_vision", tmp_path / "encoder"))
    expected = vqrae_jax.load_encoder(folder)(np.zeros((1, 32, 32, 3), np.uint8))
    values = json.loads((folder / "config.json").read_text()) | {"model_type": "my_vision_model"}
    (folder / "config.json").write_text(json.dumps(values))
    tensors = load_file(folder / "model.safetensors")
    save_file({"tower." + name.removeprefix("vision_model."): value for name, value in tensors.items()},
              folder / "model.safetensors")
    with pytest.raises(ValueError, match="my_vision_model"):
        vqrae_jax.load_encoder(folder)
    example("encoder_family")
    np.testing.assert_array_equal(vqrae_jax.load_encoder(folder)(np.zeros((1, 32, 32, 3), np.uint8)), expected)
