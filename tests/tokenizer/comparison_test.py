"""Runs measured with every metric: whatever the batches, devices and processes, and whatever is missing.

All networks are toys, read from files in the layout of real ones.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file

from tests.conftest import REFERENCE, REPOSITORY, tiny
from vqrae_jax import config as config_lib
from vqrae_jax.metrics.intervals import bootstrap
from vqrae_jax.models import inception as inception_model
from vqrae_jax.models import perceptual
from vqrae_jax.models.inception import InceptionOutput
from vqrae_jax.tokenizer import comparison, instruments, recipe, task
from vqrae_jax.tokenizer.comparison import Comparison, Options, Result
from vqrae_jax.training import distributed, sharding
from vqrae_jax.weights import inception, siglip

IMAGES, CLASSES, FEATURES = 50, 5, 6


class ToyInception(nnx.Module):
    """In the layout of `InceptionV3`, with a single convolution."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv2d_1a_3x3 = inception_model._Conv(3, FEATURES, (3, 3), stride=2, dtype=jnp.float32, rngs=rngs)
        self.fc = nnx.Param(jnp.zeros((FEATURES, 7)))

    def __call__(self, images):
        features = self.conv2d_1a_3x3((images - 128) / 128).mean((1, 2))
        return InceptionOutput(features, jnp.matmul(features, self.fc[...], precision=jax.lax.Precision.HIGHEST))


def words(texts: list[str], length: int) -> np.ndarray:
    """Token ids of texts, of which only the words count."""
    ids = np.ones((len(texts), length), np.int32)
    for row, text in zip(ids, texts, strict=True):
        tokens = [sum(word.encode()) % 30 for word in text.split()][:length]
        row[:len(tokens)] = tokens
    return ids


@contextlib.contextmanager
def toy_networks(folder: Path) -> Iterator[None]:
    """Networks that are toys, whose files are in a folder, and a tokenizer that needs no file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(perceptual, "VGG16", ((4, 1), (4, 1)))
        for module in (instruments, inception):
            patch.setattr(module, "InceptionV3", ToyInception)
        patch.setattr(comparison, "FEATURES", FEATURES)
        patch.setattr(siglip, "load_tokenizer", lambda path, length: lambda texts: words(texts, length))
        yield


def write_networks(folder: Path) -> None:
    """Random weights for `toy_networks`."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape).astype(np.float32)
    positive = lambda *shape: rng.uniform(0.5, 1.5, shape).astype(np.float32)
    save_file({"Conv2d_1a_3x3.conv.weight": 3 * normal(FEATURES, 3, 3, 3), "fc.weight": 9 * normal(7, FEATURES),
               **{f"Conv2d_1a_3x3.bn.{name}": positive(FEATURES) for name in (
                   "weight", "bias", "running_mean", "running_var")}}, folder / "inception.safetensors")
    save_file({"net.slice1.0.weight": normal(4, 3, 3, 3), "net.slice1.0.bias": positive(4),
               "net.slice2.5.weight": normal(4, 4, 3, 3), "net.slice2.5.bias": positive(4),
               "lin0.model.1.weight": positive(1, 4, 1, 1), "lin1.model.1.weight": positive(1, 4, 1, 1)},
              folder / "vgg16.safetensors")
    (folder / "names.txt").write_text("".join(f"{name}\n" for name in ("red fox", "sea", "old tree", "sky", "snow")))


def write_images(folder: Path, count: int, seed: int) -> None:
    """Images of classes that differ a little in colour and pattern."""
    rng, classes = np.random.default_rng(seed), np.random.default_rng(99).uniform(60, 190, (CLASSES, 4, 4, 3))
    for i in range(count):
        pattern = classes[i % CLASSES] + rng.normal(0, 60, (4, 4, 3))
        file = folder / f"class{i % CLASSES}" / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = pattern.repeat(8, 0).repeat(8, 1) + rng.normal(0, 20, (32, 32, 3))
        Image.fromarray(np.uint8(np.clip(pixels, 0, 255))).save(file)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """A folder with a run whose encoder learns, sets of images, and networks."""
    folder = tmp_path_factory.mktemp("lab")
    write_networks(folder)
    for name, count, seed in (("data", IMAGES, 0), ("train", 60, 1), ("others", 30, 2)):
        write_images(folder / name, count, seed)
    config = tiny()
    config.model.encoder.path = str(REFERENCE / "siglip_pair")
    config.model.quantizer.update(size=32, dim=24)
    config.optim.lr_multipliers = ()
    config.loss.distill_weight = 1.0
    config.train.steps = 4
    config.eval.inception = str(folder / "inception.safetensors")
    config.loss.perceptual.lpips_vgg16 = str(folder / "vgg16.safetensors")
    with toy_networks(folder):
        task.train(config_lib.parse(config), folder / "run")
        yield folder


def everything(lab: Path, **changes) -> Options:
    """Options that ask for all there is."""
    return Options(**{"data": f"folder:{lab / 'data'}", "fd": (str(REFERENCE / "siglip"),),
                      "probe": f"folder:{lab / 'train'}", "classes": str(lab / "names.txt"), **changes})


def compared(workdir: Path, options: Options, out: Path, mesh=None) -> tuple[Comparison, Result]:
    config = config_lib.load(workdir / "config.json")
    made = Comparison(config, options, mesh or sharding.one_device(), out)
    return made, made.measure(workdir)


def numbers(result: Result) -> dict[str, float]:
    """All that was measured."""
    assert not result.failed
    perturbed = {f"robustness_{cell['kind']}_{cell['share']}_{name}": cell[name]
                 for cell in result.robustness for name in ("psnr", "fd_encoder")}
    return {**result.metrics, **perturbed, "counts": result.code_counts.tolist(),
            "worst": [Path(name).name for name in result.worst.names]}


def measured(lab: Path, workdir: Path, out: Path, *, devices: int, batch_size: int) -> dict[str, float]:
    """All metrics of the lab's images, and distances to other images, in batches of a size on some devices."""
    copy = Path(shutil.copytree(workdir, out / f"run{jax.process_index()}"))
    content = json.loads((copy / "config.json").read_text())
    content["eval"]["batch_size"] = batch_size
    (copy / "config.json").write_text(json.dumps(content))
    mesh = sharding.make_mesh(config_lib.Mesh(), jax.devices()[:devices])
    _, result = compared(copy, everything(lab), out, mesh)
    reference = {"reference": f"folder:{lab / 'others'}", "robustness": False, "probe": "", "classes": ""}
    _, to_others = compared(copy, everything(lab, **reference), out, mesh)
    others = {f"{name}_to_others": value for name, value in to_others.metrics.items() if name in (
        "rfid", "fd_encoder", "fd_siglip")}
    return numbers(result) | others


@pytest.fixture(scope="module")
def expected(lab, tmp_path_factory) -> dict[str, float]:
    """All numbers, of one device and batches of a size that leaves padding in the last one."""
    return measured(lab, lab / "run", tmp_path_factory.mktemp("expected"), devices=1, batch_size=64)


def assert_same(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    apart = {}
    for name, value in expected.items():
        if isinstance(value, list):
            assert found[name] == value, name
        else:
            apart[name] = abs(found[name] - value) / abs(value) if value else abs(found[name])
    if os.environ.get("SHOW_DIFFERENCES"):
        print(json.dumps(apart))
    allowed = lambda name: 1e-4 if "fd_" in name or "fid" in name else 1e-6
    assert not {name: value for name, value in apart.items() if not value <= allowed(name)}


def test_every_metric_is_measured_and_means_something(expected):
    assert set(expected) >= {
        "psnr", "ssim", "lpips", "rfid", "inception_score", "fd_encoder", "fd_siglip", "drift_cosine", "drift_cka",
        "code_usage", "code_perplexity", "code_bits", "code_bits_by_position", "codes_of_90_percent", "knn_top1",
        "zero_shot_encoder", "zero_shot_features", "probe_images", "num_images", "rfid_to_others", *(
            f"probe_{kind}_{of}" for kind in ("linear", "knn") for of in (
                "encoder", "features", "latents", "reconstructions"))}
    assert expected["num_images"] == IMAGES and expected["probe_images"] == 60
    assert all(value > 1e-3 for value in expected.values() if isinstance(value, float))
    assert 1 / CLASSES < expected["probe_linear_encoder"] <= 1 and 0 < expected["drift_cosine"] < 1 - 1e-5
    assert expected["rfid_to_others"] != expected["rfid"]


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batches_of_any_size_give_the_same_numbers(batch_size, lab, expected, tmp_path):
    assert_same(measured(lab, lab / "run", tmp_path, devices=1, batch_size=batch_size), expected)


def start(*arguments: object, environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "tests.tokenizer.comparison_test", *map(str, arguments)],
                            env=os.environ | environment, cwd=REPOSITORY)


def test_any_number_of_devices_gives_the_same_numbers(lab, expected, tmp_path):
    process = start(lab, tmp_path, "--devices=2,8", environment={
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8"})
    assert process.wait(timeout=300) == 0
    for devices in ("2", "8"):
        assert_same(json.loads((tmp_path / f"{devices}.json").read_text()), expected)


def test_two_processes_give_the_same_numbers(lab, expected, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [start(lab, tmp_path / str(i), "--devices=2", f"--address={address}", f"--process={i}", environment={})
                 for i in (0, 1)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    for i in range(2):
        assert_same(json.loads((tmp_path / str(i) / "2.json").read_text()), expected)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("lab", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--devices", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--address")
    parser.add_argument("--process", type=int)
    given = parser.parse_args()
    if given.address:
        distributed.start(given.address, 2, given.process)
    with toy_networks(given.lab):
        for number in given.devices:
            folder = given.out / f"devices{number}"
            folder.mkdir(parents=True)
            found = measured(given.lab, given.lab / "run", folder, devices=number, batch_size=7)
            (given.out / f"{number}.json").write_text(json.dumps(found))
