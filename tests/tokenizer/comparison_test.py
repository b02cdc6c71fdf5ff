"""Runs measured with every metric: whatever the batches, devices and processes, and whatever is missing.

All networks are toys, read from files in the layout of real ones.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
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
from safetensors.numpy import load_file, save_file

from tests.conftest import REFERENCE, REPOSITORY, tiny
from vqrae_jax import config as config_lib
from vqrae_jax.models import inception as inception_model
from vqrae_jax.models import perceptual
from vqrae_jax.models.inception import InceptionOutput
from vqrae_jax.tokenizer import build, comparison, init, instruments, recipe, runs
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


def write_run(lab: Path, workdir: Path, *, factor: float = 1.0) -> None:
    """A run whose encoder learned, as chance has it; all its parameters are multiplied by a factor."""
    config = tiny()
    config.model.encoder.path = str(REFERENCE / "siglip_pair")
    config.model.quantizer.update(size=32, dim=24, init="random")
    config.optim.update(lr_multipliers=(), ema_decay=0.0)
    config.eval.inception = str(lab / "inception.safetensors")
    config.loss.perceptual.lpips_vgg16 = str(lab / "vgg16.safetensors")
    config = config_lib.parse(config)
    arrays = init.model_arrays(config, build.structure(config), sharding.one_device())
    rng = np.random.default_rng(0)
    params, buffers = ({path: jnp.asarray(factor * (array + rng.normal(0, 0.03, array.shape)), jnp.float32)
                        for path, array in jax.device_get(side).items()} for side in arrays)
    runs.write_run(workdir, config, params, buffers)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Path]:
    """A folder with a run, sets of images, and networks."""
    folder = tmp_path_factory.mktemp("lab")
    write_networks(folder)
    for name, count, seed in (("data", IMAGES, 0), ("train", 60, 1), ("others", 30, 2)):
        write_images(folder / name, count, seed)
    with toy_networks(folder):
        write_run(folder, folder / "run")
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


def measured(lab: Path, out: Path, *, devices: int, batch_size: int, to_others: bool = True) -> dict[str, float]:
    """All metrics of the lab's images, and distances to other images, in batches of a size on some devices."""
    copy = Path(shutil.copytree(lab / "run", out / f"run{jax.process_index()}"))
    content = json.loads((copy / "config.json").read_text())
    content["eval"]["batch_size"] = batch_size
    del content["checksum"]
    (copy / "config.json").write_text(json.dumps(content))
    mesh = sharding.make_mesh(config_lib.Mesh(), jax.devices()[:devices])
    _, result = compared(copy, everything(lab), out, mesh)
    found = numbers(result)
    if to_others:
        reference = {"reference": f"folder:{lab / 'others'}", "robustness": False, "probe": "", "classes": ""}
        _, result = compared(copy, everything(lab, **reference), out, mesh)
        found |= {f"{name}_to_others": result.metrics[name] for name in ("rfid", "fd_encoder", "fd_siglip")}
    return found


@pytest.fixture(scope="module")
def expected(lab, tmp_path_factory) -> dict[str, float]:
    """All numbers, of one device and batches of a size that leaves padding in the last one."""
    return measured(lab, tmp_path_factory.mktemp("expected"), devices=1, batch_size=64)


def assert_same(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    apart = {}
    for name, value in expected.items():
        if isinstance(value, list):
            assert found[name] == value, name
        else:
            apart[name] = abs(found[name] - value) / abs(value) if value else abs(found[name])
    print(json.dumps(apart))  # pytest -rP shows it
    allowed = lambda name: 1e-4 if "fd_" in name or "fid" in name else 1e-6
    assert not {name: value for name, value in apart.items() if not value <= allowed(name)}


def test_every_metric_is_measured_and_means_something(expected):
    assert set(expected) >= {
        "psnr", "ssim", "lpips", "rfid", "inception_score", "fd_encoder", "fd_siglip", "drift_cosine", "drift_cka",
        "code_usage", "code_perplexity", "code_bits", "code_bits_by_position", "codes_of_90_percent", "knn_top1",
        "zero_shot_encoder", "zero_shot_features", "num_probe_images", "num_images", "rfid_to_others", *(
            f"probe_{kind}_{of}" for kind in ("linear", "knn") for of in (
                "encoder", "features", "latents", "reconstructions"))}
    assert expected["num_images"] == IMAGES and expected["num_probe_images"] == 60
    assert all(value > 1e-3 for value in expected.values() if isinstance(value, float))
    assert 1 / CLASSES < expected["probe_linear_encoder"] <= 1 and 0 < expected["drift_cosine"] < 1 - 1e-5
    assert expected["rfid_to_others"] != expected["rfid"]


def without_others(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if not name.endswith("_to_others")}


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_batches_of_any_size_give_the_same_numbers(batch_size, lab, expected, tmp_path):
    found = measured(lab, tmp_path, devices=1, batch_size=batch_size, to_others=False)
    assert_same(found, without_others(expected))


def start(*arguments: object, environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "tests.tokenizer.comparison_test", *map(str, arguments)],
                            env=os.environ | environment, cwd=REPOSITORY)


@pytest.mark.slow
def test_any_number_of_devices_gives_the_same_numbers(lab, expected, tmp_path):
    process = start(lab, tmp_path, "--devices=2,8", environment={
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8"})
    assert process.wait(timeout=300) == 0
    for devices in ("2", "8"):
        assert_same(json.loads((tmp_path / f"{devices}.json").read_text()), without_others(expected))


@pytest.mark.slow
def test_two_processes_give_the_same_numbers(lab, expected, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [start(lab, tmp_path / str(i), "--devices=2", f"--address={address}", f"--process={i}", environment={})
                 for i in (0, 1)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    for i in range(2):
        assert_same(json.loads((tmp_path / str(i) / "2.json").read_text()), expected)


def written(made: Comparison, result: Result, out: Path) -> dict:
    """metrics.json as a strict reader sees it; the other files are there too."""
    def refuse(constant):
        raise AssertionError(f"metrics.json holds {constant}, which is no JSON")

    made.write({"run": result}, out)
    assert "<html" in (out / "report.html").read_text() and (out / "reconstructions.png").exists()
    content = json.loads((out / "metrics.json").read_text(), parse_constant=refuse)
    assert content["failed"] == result.failed
    assert all(reason and "\n" not in reason for reason in content["failed"].values())
    assert all(name in (out / "report.html").read_text() for name in content["failed"])
    return content


OWN = {"psnr", "ssim", "knn_top1", "code_usage", "code_perplexity", "drift_cosine", "drift_cka"}  # takes no other file


def test_what_is_missing_costs_itself_only(lab, tmp_path):
    workdir = Path(shutil.copytree(lab / "run", tmp_path / "run"))
    content = json.loads((workdir / "config.json").read_text())
    content["eval"]["inception"] = "/nowhere/inception.pth"
    content["loss"]["perceptual"]["lpips_vgg16"] = "/nowhere/vgg16.pth"
    del content["checksum"]
    (workdir / "config.json").write_text(json.dumps(content))
    made, result = compared(workdir, everything(lab, fd=("/nowhere/dinov2",), probe="folder:/nowhere/train",
                                                classes="/nowhere/names.txt"), tmp_path)
    found = written(made, result, tmp_path)
    assert found.keys() >= OWN | {"fd_encoder", "robustness"} and found["robustness"]
    assert result.failed.keys() == {"rfid", "lpips", "fd_dinov2", "probe", "zero_shot"}
    for metric, says in (("rfid", "/nowhere/inception.pth: get them with `curl"), ("lpips", "/nowhere/vgg16.pth"),
                         ("fd_dinov2", "/nowhere/dinov2"), ("probe", "/nowhere/train"), ("zero_shot", "names.txt")):
        assert says in result.failed[metric]
    # Only what a flag asked for is an error.
    missing = made.missing({"run": result})
    assert all(f"{metric}: " in missing for metric in ("fd_dinov2", "probe", "zero_shot"))
    assert "rfid" not in missing and "lpips" not in missing


def test_a_network_that_is_asked_for_by_a_flag_is_missed(lab, tmp_path):
    made = Comparison(config_lib.load(lab / "run" / "config.json"), everything(
        lab, inception="/nowhere/inception.pth", vgg16="/nowhere/vgg16.pth"), sharding.one_device(), tmp_path)
    assert made.failed.keys() == {"rfid", "lpips"}
    assert "rfid: no Inception weights at /nowhere" in made.missing({}) and "lpips: " in made.missing({})


def test_a_reference_of_other_images_is_a_spec_or_its_statistics(lab, expected, tmp_path):
    """And a recipe says which, with every file that was read."""
    config = config_lib.load(lab / "run" / "config.json")
    source = f"folder:{lab / 'others'}"
    mesh, options = sharding.one_device(), everything(lab, reference=source, fd=(), robustness=False)
    mean, cov = Comparison(config, options, mesh, tmp_path)._statistics["rfid"]
    np.savez(tmp_path / "others.npz", mu=mean, sigma=cov)
    made, result = compared(lab / "run", dataclasses.replace(options, reference=str(tmp_path / "others.npz")), tmp_path)
    assert not result.failed and result.metrics["rfid"] == pytest.approx(expected["rfid_to_others"], rel=1e-6)
    assert result.metrics["fd_encoder"] == pytest.approx(expected["fd_encoder"], rel=1e-6)  # which has no file

    content = written(made, result, tmp_path)
    assert content["intervals"].keys() == {"psnr", "ssim", "lpips", "drift_cosine"}
    assert all(low < content[name] < high for name, (low, high) in content["intervals"].items())
    found = content["recipe"]
    sha256 = lambda file: hashlib.sha256(file.read_bytes()).hexdigest()
    for file in (lab / "inception.safetensors", lab / "vgg16.safetensors", REFERENCE / "siglip_pair/model.safetensors",
                 tmp_path / "others.npz"):
        assert found["weights"].pop(str(file)) == sha256(file)
    assert found["weights"].keys() == {str(lab / "run"), str(lab / "run" / "pretrained encoder")}
    assert all(len(digest) == 64 for digest in found["weights"].values())
    assert found | {"weights": ...} == {
        "data": f"folder:{lab / 'data'}", "part": "all", "images": IMAGES, "image_size": 32, "crop": "centre",
        "resampling": found["resampling"], "pixels": found["pixels"],
        "reference": f"the same images, of rfid {tmp_path / 'others.npz'}",
        "run_weights": "ema", "weights": ..., "configs": {"run": sha256(lab / "run" / "config.json")},
        "options": recipe.plain(made._options), "version": recipe.version(), "commit": recipe.commit()}
    assert "bicubic" in found["resampling"] and "8 bits for rfid" in found["pixels"] and found["version"]


@pytest.mark.parametrize(("reference", "says", "lost"), [
    ("folder:/nowhere", "no folder /nowhere", {"rfid", "fd_encoder", "fd_siglip"}),
    ("{tmp}/gone.npz", "gone.npz does not exist", {"rfid"}),
    ("{tmp}/wide.npz", "holds statistics of 7 features, but 6 are needed", {"rfid"}),
    ("folder:{tmp}/one", "a covariance takes at least 2 images, not 1", {"rfid", "fd_encoder", "fd_siglip"}),
])
def test_a_reference_that_cannot_be_taken_costs_its_distances(reference, says, lost, lab, tmp_path):
    np.savez(tmp_path / "wide.npz", mu=np.zeros(7), sigma=np.eye(7))
    write_images(tmp_path / "one", 1, 0)
    made = Comparison(config_lib.load(lab / "run" / "config.json"), everything(
        lab, reference=reference.format(tmp=tmp_path)), sharding.one_device(), tmp_path)
    assert made.failed.keys() == lost and all(says in reason for reason in made.failed.values())
    assert all(f"{metric}: " in made.missing({}) for metric in lost)


def test_an_inception_score_needs_no_reference(lab, expected, tmp_path):
    _, result = compared(lab / "run", everything(lab, reference="folder:/nowhere", probe="", classes="",
                                                 robustness=False), tmp_path)
    assert result.failed.keys() == {"rfid", "fd_encoder", "fd_siglip"} and not result.failed.keys() & result.metrics
    for name in ("inception_score", "drift_cka", "lpips"):
        assert result.metrics[name] == pytest.approx(expected[name], rel=1e-6)


def test_a_run_that_is_not_finite_is_evaluated_all_the_same(lab, tmp_path):
    write_run(lab, tmp_path / "run", factor=np.nan)
    made, result = compared(tmp_path / "run", everything(lab, fd=(), probe="", classes=""), tmp_path)
    content = written(made, result, tmp_path)
    assert content["failed"].keys() == {"psnr", "ssim", "lpips", "rfid", "inception_score", "fd_encoder",
                                        "drift_cosine", "drift_cka", "knn", "robustness"}
    assert "50 of 50 reconstructions are not finite" in content["failed"]["psnr"]
    assert content["psnr"] is None and content["code_usage"] == 1 / 32 and content["num_images"] == IMAGES
    assert not content["intervals"] and not made.missing({"run": result})


def test_a_single_image_has_no_distances(lab, tmp_path):
    """And labels of one class teach nothing."""
    write_images(tmp_path / "one", 1, 0)
    shutil.copytree(lab / "train" / "class1", tmp_path / "train" / "class1")
    made, result = compared(lab / "run", everything(lab, data=f"folder:{tmp_path / 'one'}",
                                                    probe=f"folder:{tmp_path / 'train'}"), tmp_path)
    content = written(made, result, tmp_path)
    distances = {"rfid", "fd_encoder", "fd_siglip", "robustness"}
    assert content["failed"].keys() == distances | {"probe"}
    assert all("at least 2 images, not 1" in content["failed"][name] for name in distances)
    assert "needs images of at least two classes" in content["failed"]["probe"]
    assert content.keys() >= OWN - {"knn_top1"} | {"lpips", "inception_score", "zero_shot_features"}
    assert "knn_top1" not in content
    missing = made.missing({"run": result})
    assert "fd_siglip: " in missing and "probe: " in missing and "fd_encoder" not in missing


def test_weights_with_a_tensor_missing_or_of_another_network_are_named(lab, tmp_path):
    config, mesh = config_lib.load(lab / "run" / "config.json"), sharding.one_device()
    without = load_file(lab / "inception.safetensors")
    del without["fc.weight"]
    save_file(without, tmp_path / "inception.safetensors")
    encoder = Path(shutil.copytree(REFERENCE / "siglip", tmp_path / "encoder_with_less"))
    less = load_file(encoder / "model.safetensors")
    del less["vision_model.post_layernorm.weight"]
    save_file(less, encoder / "model.safetensors")
    (tmp_path / "empty").mkdir()
    made = Comparison(config, everything(lab, inception=str(tmp_path / "inception.safetensors"), fd=(
        str(encoder), str(tmp_path / "empty"), str(REFERENCE / "siglip")), vgg16=str(lab / "inception.safetensors")),
        mesh, tmp_path)
    assert made.failed.keys() == {"rfid", "lpips", "fd_encoder_with_less", "fd_empty"}
    assert "tensor fc.weight is missing" in made.failed["rfid"]
    assert "tensor post_layernorm.weight is missing" in made.failed["fd_encoder_with_less"]
    assert "inception.safetensors" in made.failed["lpips"] and "empty" in made.failed["fd_empty"]
    assert all("\n" not in reason for reason in made.failed.values())
    made = Comparison(config, everything(lab, inception=str(lab / "vgg16.safetensors")), mesh, tmp_path)
    assert "vgg16.safetensors: unexpected tensor " in made.failed["rfid"]


def test_class_names_must_be_as_many_as_labels(lab, tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    made, result = compared(lab / "run", everything(lab, classes=str(tmp_path / "names.txt"), probe="", fd=(),
                                                    robustness=False), tmp_path)
    assert result.failed.keys() == {"zero_shot_encoder", "zero_shot_features"}
    assert "labels are between 0 and 4, but there are 2 classes" in result.failed["zero_shot_features"]
    assert made.missing({"run": result}).count("zero_shot_") == 2 and result.metrics.keys() >= OWN | {"rfid", "lpips"}
    config = config_lib.load(lab / "run" / "config.json")
    encoder = dataclasses.replace(config.model.encoder, path=str(REFERENCE / "siglip_vision"))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, encoder=encoder))
    with pytest.raises(ValueError, match="siglip_vision has no text tower"):
        instruments.zero_shot(config, lab / "names.txt", sharding.one_device())


def test_a_probe_without_labels_or_without_the_pretrained_encoder_is_said(lab, tmp_path, monkeypatch):
    shutil.copytree(lab / "data" / "class0", tmp_path / "unlabelled")
    config = config_lib.load(lab / "run" / "config.json")
    data = f"folder:{tmp_path / 'unlabelled'}"
    made = Comparison(config, everything(lab, data=data), sharding.one_device(), tmp_path)
    assert made.failed == dict.fromkeys(["probe", "zero_shot"], f"the images of {data} have no labels")

    def gone(*arguments):
        raise FileNotFoundError("the encoder is gone")

    monkeypatch.setattr(runs, "pretrained_encoder", gone)
    made, result = compared(lab / "run", everything(lab, fd=()), tmp_path)
    assert result.failed == {"fd_encoder": "the encoder is gone", **dict.fromkeys(
        ["probe", "zero_shot", "robustness"], "it takes the pretrained encoder: the encoder is gone")}
    assert result.metrics.keys() >= {"psnr", "ssim", "lpips", "rfid", "knn_top1"}
    assert "probe: " in made.missing({"run": result})


@pytest.mark.parametrize("names", [("encoder",), ("a/vit", "b/ViT")])
def test_distances_that_would_be_called_alike_are_refused(names, lab, tmp_path):
    with pytest.raises(ValueError, match="--fd: .* would be called alike.*rename or link"):
        Comparison(config_lib.load(lab / "run" / "config.json"), Options(fd=names), sharding.one_device(), tmp_path)


def test_worst_and_best_images_are_those_of_the_numbers(lab, tmp_path):
    _, result = compared(lab / "run", Options(data=f"folder:{lab / 'data'}", robustness=False), tmp_path)
    for extremes in (result.worst, result.best):
        assert len(extremes.names) == len(set(extremes.names)) == 8
        error = ((extremes.originals - extremes.reconstructions).astype(np.float64)**2).mean((1, 2, 3))
        np.testing.assert_allclose(-10 * np.log10(error), extremes.values["psnr"], rtol=1e-5)
        for original, name in zip(extremes.originals, extremes.names, strict=True):
            np.testing.assert_allclose(np.asarray(Image.open(name)) / 255, original, atol=1e-6)
    assert result.worst.values["psnr"] == sorted(result.worst.values["psnr"])
    assert result.best.values["psnr"] == sorted(result.best.values["psnr"], reverse=True)
    assert result.worst.values["psnr"][-1] < result.metrics["psnr"] < result.best.values["psnr"][-1]


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
            found = measured(given.lab, folder, devices=number, batch_size=7,
                             to_others=given.address is not None)
            (given.out / f"{number}.json").write_text(json.dumps(found))
