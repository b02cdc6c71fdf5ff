"""Packed models: what a run becomes, what takes it by folder and by name, and what is refused. And those that ship."""

import dataclasses
import runpy
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vqrae_jax
from tests.conftest import REPOSITORY, tiny
from tests.generator.generate_test import write_generator
from tests.generator.tiny import random_arrays
from vqrae_jax import config as config_lib
from vqrae_jax.data.codes import Description
from vqrae_jax.generator import runs as generator_runs
from vqrae_jax.tokenizer import build, codes, inference, init, runs, samples
from vqrae_jax.training import sharding
from vqrae_jax.weights import huggingface, packed

pack = runpy.run_path(str(REPOSITORY / "launch" / "pack.py"))["pack"]
MESH = sharding.one_device()


def with_card(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("# A model of random weights\n")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer whose encoder learned and a generator, as runs, and packed as the model `small`."""
    folder = tmp_path_factory.mktemp("packed")
    values = tiny()
    values.loss.distill_weight = 1.0
    values.optim.lr_multipliers = (("encoder/.*", 0.3),)
    config = config_lib.parse(values)
    structure = build.structure(config)
    params, buffers = random_arrays(structure.params), random_arrays(structure.buffers)
    runs.write_run(folder / "tokenizer", config, params, buffers)
    pack(folder / "tokenizer", with_card(folder / "models" / "small" / "tokenizer"))
    _, _, rounded = runs.load_run(folder / "models" / "small" / "tokenizer", MESH)
    description = Description(
        data="embedded", source={"images": 1}, num_classes=2, tokenizer=runs.digest(rounded), weights="ema",
        codebook_size=32, grid=(4, 4), image_size=32, views=1, batch_size=8, shard_size=1, recipe={}, records=1,
        labels=1, captions=0, bad_images=0)
    write_generator(folder / "generator", description, Path("/nowhere"))
    pack(folder / "generator", with_card(folder / "models" / "small" / "generator"))
    return folder


@pytest.fixture
def small(folder, tmp_path, monkeypatch) -> Path:
    """The models ship, and one works in an empty folder."""
    monkeypatch.setattr(packed, "SHIPPED", folder / "models")
    monkeypatch.chdir(tmp_path)
    return folder / "models" / "small"


def rounded(arrays):
    return {path: np.asarray(array).astype(np.float16).astype(np.float32) for path, array in arrays.items()}


def test_a_packed_tokenizer_is_the_run_with_rounded_weights(folder, small):
    config, graphdef, arrays = runs.load_run(folder / "tokenizer", MESH)
    buffers = {path: np.asarray(arrays.pop(path)) for path in build.structure(config).buffers}
    assert buffers and any((value != rounded({"": value})[""]).any() for value in buffers.values())
    expected = rounded(arrays) | buffers
    loaded, _, found = runs.load_run(small / "tokenizer", MESH)
    assert loaded == config and found.keys() == expected.keys()
    for path, array in found.items():
        assert array.dtype == jnp.float32
        np.testing.assert_array_equal(array, expected[path], err_msg=path)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    model, same = vqrae_jax.load(small / "tokenizer"), inference.Tokenizer(config, graphdef, expected)
    np.testing.assert_array_equal(model.encode_to_indices(images), same.encode_to_indices(images))


def test_a_name_stands_for_what_ships_wherever_a_run_does(folder, small, tmp_path):
    name, digest = Path("small"), runs.digest(runs.load_run(small / "tokenizer", MESH)[2])
    # Samples become images, by the tokenizer whose rounded weights they are of.
    generator = vqrae_jax.load_generator("small")
    expected = rounded(generator_runs.load_run(folder / "generator", MESH).params)
    for path, array in generator_runs.load_run(name, MESH).params.items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)
    [images] = samples.Decoder(name, generator.codes, MESH).images(np.asarray(generator.sample(2, batch_size=2)))
    assert images.shape == (2, 32, 32, 3)
    with pytest.raises(ValueError, match="codes of another tokenizer"):
        samples.Decoder(folder / "tokenizer", generator.codes, MESH)
    # Images become codes.
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "images" / "red.png")
    made = codes.tokenize(name, f"folder:{tmp_path / 'images'}", tmp_path / "codes", views=1, weights="ema",
                          batch_size=2, shard_size=1, max_bad=None)
    assert made.tokenizer == digest and made.recipe["weights"] == {"small": digest}
    # What evaluations compare with is the pretrained encoder, of which the packed folder has no copy.
    config, _, arrays = runs.load_run(name, MESH)
    pretrained = huggingface.load_encoder_params(build.encoder_path(config), image_size=32, final_norm="affine")
    for path, array in runs.pretrained_encoder(name, config, arrays, MESH).items():
        np.testing.assert_array_equal(array, pretrained[path], err_msg=path)
    # A run comes first.
    shutil.copytree(folder / "tokenizer", "small")
    assert runs.digest(runs.load_run(name, MESH)[2]) != digest


def test_a_run_starts_from_a_packed_model(small, tiny_config):
    tiny_config.init_from = "small"
    config = config_lib.parse(tiny_config)
    params, buffers = init.initial_arrays(config, build.structure(config), pytest.fail, MESH)
    assert runs.digest(params | buffers) == runs.digest(runs.load_run(Path("small"), MESH)[2])


def test_what_is_no_packed_model_is_refused_in_a_line(folder, small, tmp_path):
    def refused(path, says, load=vqrae_jax.load, kind: type[Exception] = ValueError, **options):
        with pytest.raises(kind, match=says) as caught:
            load(path, **options)
        assert "\n" not in str(caught.value)

    refused(small / "generator", "is the run of a generator, where that of a tokenizer is needed")
    refused(small / "tokenizer", "is the run of a tokenizer", vqrae_jax.load_generator)
    refused(small / "tokenizer", "leave out step, and weights", weights="raw")
    refused(small / "generator", "leave out step, and weights", vqrae_jax.load_generator, step=3)
    for task, load in (("tokenizer", vqrae_jax.load), ("generator", vqrae_jax.load_generator)):
        broken = Path(shutil.copytree(small / task, tmp_path / task))
        weights = broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        refused(broken, r"is damaged \(model.safetensors has .* bytes instead of", load)
        weights.unlink()
        refused(broken, "holds no checkpoint", load, OSError)
    config = dataclasses.replace(runs.load_run(small / "tokenizer", MESH)[0], seed=1)
    smaller = dataclasses.replace(config.model, quantizer=dataclasses.replace(config.model.quantizer, size=16))
    other = Path(shutil.copytree(small / "tokenizer", tmp_path / "other"))
    config_lib.save(dataclasses.replace(config, model=smaller), other / "config.json")
    refused(other, "tensor quantizer/codebook has shape", vqrae_jax.load)


def test_packing_loses_nothing(folder, small, tmp_path):
    with pytest.raises(ValueError, match="holds a model already"):
        pack(folder / "tokenizer", small / "tokenizer")
    with pytest.raises(FileNotFoundError, match="holds no README.md"):
        pack(folder / "tokenizer", tmp_path)
    config, _, arrays = runs.load_run(folder / "tokenizer", MESH)
    buffers = {path: arrays.pop(path) for path in build.structure(config).buffers}
    wide = {**arrays, "decoder/pixels/bias": arrays["decoder/pixels/bias"] + 1e6}
    with pytest.raises(ValueError, match="parameter decoder/pixels/bias has values that float16 cannot hold"):
        packed.write(with_card(tmp_path / "wide"), wide, buffers)
    assert not packed.is_packed(tmp_path / "wide")


def test_nano_ships_with_the_package():
    nano = packed.SHIPPED / "nano"
    if missing := [task for task in ("tokenizer", "generator") if not packed.is_packed(nano / task)]:
        pytest.skip(f"the nano {missing[0]} is not in {nano}: launch/ship_nano.sh makes it")
    assert sum(file.stat().st_size for file in nano.rglob("*") if file.is_file()) < 16e6
    tokenizer, generator = vqrae_jax.load("nano"), vqrae_jax.load_generator("nano")
    assert generator.codes.tokenizer == runs.digest(runs.load_run(Path("nano"), MESH)[2])
    images = tokenizer.decode_from_indices(generator.sample(2, cfg=2.0, batch_size=2))
    assert images.shape == (2, 64, 64, 3) and np.std(images) > 0.05
    again = tokenizer.reconstruct(np.asarray(images))
    assert np.mean(np.square(again - images)) < 0.02
    for task in ("tokenizer", "generator"):
        config = (nano / task / "config.json").read_text()
        assert "@" not in config and "/work" not in config, "a path of one machine"
