"""Samples as files: what an interruption costs, what they hold, how they are measured, and what is refused."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vqrae_jax
from tests import conftest
from tests.generator.tiny import WORDS, parsed, random_arrays, text_model
from tests.generator.tiny import tiny as tiny_generator
from tests.verbs import assert_one_line_error, command
from vqrae_jax import config as config_lib
from vqrae_jax.data import codes as codes_data
from vqrae_jax.data.codes import CodesRecord, Description
from vqrae_jax.generator import build, generate, runs, train_state
from vqrae_jax.generator.inference import Generator
from vqrae_jax.generator.sampling import Options
from vqrae_jax.tokenizer import build as tokenizer_build
from vqrae_jax.tokenizer import runs as tokenizer_runs
from vqrae_jax.tokenizer import samples
from vqrae_jax.training import checkpoint, sharding
from vqrae_jax.training.reporting import to_8_bits

CLASSES, IMAGES, CODES = 2, 24, 32
ENCODER = samples.ENCODER


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer and a generator of random weights, images of two classes, and codes."""
    folder = tmp_path_factory.mktemp("generate")
    rng = np.random.default_rng(0)
    for index in range(IMAGES):
        file = folder / "images" / "ab"[index % CLASSES] / f"{index:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        shade = rng.integers(0, 128, (32, 32, 3), np.uint8) + np.uint8(127 * (index % CLASSES))
        Image.fromarray(shade).save(file)
    config = config_lib.parse(conftest.tiny())
    structure = tokenizer_build.structure(config)
    params, buffers = random_arrays(structure.params), random_arrays(structure.buffers)
    tokenizer_runs.write_run(folder / "tokenizer", config, params, buffers)
    digest = tokenizer_runs.digest(params | buffers)
    description = Description(
        data=f"folder:{folder / 'images'}", source={"images": IMAGES}, num_classes=CLASSES, tokenizer=digest,
        weights="ema", codebook_size=CODES, grid=(4, 4), image_size=32, views=1, batch_size=8, shard_size=IMAGES,
        recipe={})
    begun = codes_data.begin(folder / "codes", description)
    codes_data.write_shard(begun.shards(folder / "codes")[0], [
        CodesRecord(rng.integers(0, 8, (1, 4, 4)).astype("<u2"), index % CLASSES, f"{index:02d}", "")
        for index in range(IMAGES)])
    write_generator(folder / "generator", codes_data.end(folder / "codes", begun), folder / "codes")
    return folder


def write_generator(workdir: Path, description: Description, codes: Path, **options) -> None:
    values = tiny_generator(**options)
    values.data.update(source=f"codes:{codes}", holdout=0.2)
    config = parsed(values)
    structure = build.structure(config, build.known_codes(config, description))
    state, frozen = train_state.init(config, random_arrays(structure.params))
    checkpoint.write_run(workdir, config, lambda folder: runs.write_files(folder, config, description),
                         train_state.items(state), frozen)


@pytest.fixture(scope="module")
def generator(folder) -> Generator:
    return vqrae_jax.load_generator(folder / "generator")


@pytest.fixture(scope="module")
def decoder(folder, generator) -> samples.Decoder:
    return samples.Decoder(folder / "tokenizer", generator.codes, sharding.one_device())


def sampled(generator, decoder, out: Path, num=7, **changes) -> np.ndarray:
    """What the command does."""
    options = {"classes": None, "prompts": None, "options": Options(cfg=2.0, seed=1), "batch_size": 2, "weights": {}}
    work = generate.Samples(generator, num, out=out, **options | changes)
    codes = work.codes()
    work.write(decoder.images(codes))
    work.end()
    return codes


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_samples_that_were_interrupted_are_the_same_to_the_byte(generator, decoder, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    codes = sampled(generator, decoder, whole / "samples.npz")
    draw, calls = Generator.draw, itertools.count()

    def dies(self, *arguments):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return draw(self, *arguments)

    monkeypatch.setattr(Generator, "draw", dies)
    with pytest.raises(KeyboardInterrupt):
        sampled(generator, decoder, parts / "samples.npz")
    assert set(contents(parts)) == {f"samples.npz.unfinished/{name}" for name in (
        "request.json", "000000.npz", "000001.npz")}
    # Other flags are no continuation.
    with pytest.raises(ValueError, match=r"begun with other cfg, seed: give the same flags to go on with them, or "):
        sampled(generator, decoder, parts / "samples.npz", options=Options())

    def breaks(batches):
        yield next(iter(batches))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # the second time while it writes
        images = decoder.images
        patch.setattr(decoder, "images", lambda codes: breaks(images(codes)))
        sampled(generator, decoder, parts / "samples.npz")
    drawn = next(calls)
    sampled(generator, decoder, parts / "samples.npz")
    assert next(calls) == drawn + 1  # nothing was drawn twice
    assert contents(parts) == contents(whole) and list(contents(whole)) == ["samples.npz"]

    with np.load(whole / "samples.npz") as found:  # as ADM's evaluator does
        assert set(found) == {"arr_0", "arr_1"}
        np.testing.assert_array_equal(found["arr_1"], [0, 1, 0, 1, 0, 1, 0])
        assert found["arr_0"].dtype == np.uint8 and found["arr_0"].shape == (7, 32, 32, 3)
        images = found["arr_0"]
    model = vqrae_jax.load(decoder.workdir)
    expected = to_8_bits(np.asarray(model.decode_from_indices(codes)))
    assert np.abs(images.astype(int) - expected).max() <= 1
    np.testing.assert_array_equal(codes, generator.sample(7, cfg=2.0, seed=1))


def test_a_folder_and_a_picture_show_the_same_images(generator, decoder, tmp_path):
    sampled(generator, decoder, tmp_path / "out", num=12, classes=[1, 0, 1])
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files][:4] == [
        "00000000_class1.png", "00000001_class0.png", "00000002_class1.png", "00000003_class1.png"]
    assert len(files) == 12
    sampled(generator, decoder, tmp_path / "out.png", num=12, classes=[1, 0, 1])
    shown = np.asarray(Image.open(tmp_path / "out.png"))
    assert shown.shape == (2 * (14 + 34), 10 * 34, 3)  # ten in a row, under a caption each
    for number in (0, 9, 11):
        row, column = divmod(number, 10)
        tile = shown[row * 48 + 15:row * 48 + 47, column * 34 + 1:column * 34 + 33]
        np.testing.assert_array_equal(tile, np.asarray(Image.open(files[number])))
    assert (shown[48:, 2 * 34:] == 255).all()
    with pytest.raises(ValueError, match=r"out is not empty: choose another folder"):
        sampled(generator, decoder, tmp_path / "out")


def test_samples_are_measured_between_their_rulers(folder, generator, decoder):
    """Codes of the reference images are what reconstructions are, and get the same numbers."""
    spec = f"folder:{folder / 'images'}"
    measure = samples.Measurement(decoder, samples.Options(reference=spec, probe=spec, neighbours=3))
    model = vqrae_jax.load(decoder.workdir)
    files = sorted((folder / "images").rglob("*.png"))
    codes = np.concatenate([model.encode_to_indices(vqrae_jax.read_images(files[at:at + 8], 32))
                            for at in range(0, IMAGES, 8)])
    labels = np.array([int(file.parent.name == "b") for file in files])
    independent = generate.independent_codes(generator, sharding.one_device(), IMAGES, seed=0)
    found = measure(codes, labels, lambda: independent)
    ours, floor, ceiling, originals = (found.columns[name] for name in (
        "samples", "reconstructions", samples.BY_POSITION, "originals"))
    assert ours == pytest.approx(floor, rel=1e-4, abs=1e-4)
    assert originals[ENCODER] < 1e-3 < floor[ENCODER] and originals["probe_linear"] == 1
    assert originals["nearest_cosine"] == pytest.approx(1) and ceiling["nearest_cosine"] < 1
    assert "probe_linear" not in ceiling and ceiling["num_images"] == IMAGES
    assert "inception" in found.failed[samples.FID]
    assert {name: images.shape for name, images in found.neighbours.items()} == dict.fromkeys(
        ("samples", "nearest training images"), (3, 32, 32, 3))
    # Where the training codes are gone, that ruler is left out; and classes that were not asked for are wrong.
    gone = vqrae_jax.load_generator(folder / "generator")
    data = dataclasses.replace(gone.config.data, source="codes:/nowhere")
    gone.config = dataclasses.replace(gone.config, data=data)
    found = measure(codes, 1 - labels, lambda: generate.independent_codes(gone, sharding.one_device(), IMAGES, 0))
    assert samples.BY_POSITION not in found.columns and "/nowhere" in found.failed[samples.BY_POSITION]
    assert found.columns["samples"]["probe_linear"] == pytest.approx(1 - ours["probe_linear"])


def test_independent_codes_have_the_histogram_of_training_codes(folder, generator):
    drawn = generate.independent_codes(generator, sharding.one_device(), 4000, seed=3)
    source = codes_data.CodesSource(folder / "codes")
    everything = np.stack([source[i].codes[0] for i in range(IMAGES)])
    for row, column in ((0, 0), (3, 1)):
        shares = np.bincount(drawn[:, row, column], minlength=CODES) / 4000
        of_all = np.bincount(everything[:, row, column], minlength=CODES) / IMAGES
        assert set(np.flatnonzero(shares)) <= set(np.flatnonzero(of_all))
        np.testing.assert_allclose(shares, of_all, atol=0.15)  # a fifth is held out
    pairs = np.corrcoef(drawn[:, 0, 0], drawn[:, 0, 1])[0, 1]
    assert abs(pairs) < 0.1


def test_the_command_samples_and_measures(folder, tmp_path):
    out = tmp_path / "made" / "samples.png"
    spec = f"folder:{folder / 'images'}"
    run = command("vqrae_jax.generate", f"--workdir={folder / 'generator'}", f"--tokenizer={folder / 'tokenizer'}",
                  f"--out={out}", "--batch_size=4", "--num=5", "--classes=1,0", "--top_p=0.9", f"--reference={spec}",
                  f"--probe={spec}", "--neighbours=2")
    assert run.returncode == 0, run.stderr
    assert f"wrote {out}" in run.stdout and "reconstructions" in run.stdout and ENCODER in run.stdout
    assert {file.name for file in out.parent.iterdir()} == {
        "samples.png", "samples_metrics.json", "samples_neighbours.png"}
    content = json.loads((out.parent / "samples_metrics.json").read_text())
    assert content["num_images"] == 5 and content[ENCODER] > 0
    assert set(content["rulers"]) == {"reconstructions", "originals", samples.BY_POSITION}
    recipe = content["recipe"]
    assert recipe["reference"] == spec and recipe["options"]["top_p"] == 0.9 and recipe["options"]["num"] == 5
    assert {str(folder / "generator"), str(folder / "tokenizer")} <= set(recipe["weights"])


def test_another_tokenizer_is_refused(folder, generator):
    others = dataclasses.replace(generator.codes, tokenizer="0123456789abcdef" * 4)
    with pytest.raises(ValueError, match=r"codes of another tokenizer than that of .*sha256 is 0123456789abcdef\.\.\."):
        samples.Decoder(folder / "tokenizer", others, sharding.one_device())


@pytest.fixture(scope="module")
def others(folder) -> Path:
    """Generators of captions, and of classes without empty prefixes; and a tokenizer of other weights."""
    pytest.importorskip("tokenizers", reason="captions need tokenizers")
    description, codes = codes_data.read_description(folder / "codes"), folder / "codes"
    write_generator(folder / "captions", dataclasses.replace(description, captions=IMAGES), codes,
                    captions=text_model(folder / "text"))
    write_generator(folder / "guided_never", description, codes, drop=0.0)
    config = config_lib.parse(conftest.tiny())
    structure = tokenizer_build.structure(config)
    params = {path: 2 * value for path, value in random_arrays(structure.params).items()}
    tokenizer_runs.write_run(folder / "another", config, params, random_arrays(structure.buffers))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("run", "flags", "says"), [
    ("generator", ["--num=0"], "error: num must be at least 1, not 0"),
    ("generator", ["--classes=0,2"], "error: class 2 does not exist: this generator has the classes 0 to 1"),
    ("generator", ["--tokenizer={folder}/another"], "error: the generator learned codes of another tokenizer than"),
    ("guided_never", ["--cfg=2"], "error: cfg is 2, but guidance needs a generator that has learned the empty prefix"),
    ("captions", [f"--prompt={' '.join(WORDS[:6])}"], "error: a prompt has 6 tokens, but this generator takes 5: "),
])
def test_what_cannot_be_had_is_refused_in_one_line(run, flags, says, others, tmp_path):
    result = command("vqrae_jax.generate", f"--workdir={others / run}", f"--tokenizer={others / 'tokenizer'}",
                     f"--out={tmp_path / 'out.png'}", "--num=2", *(flag.format(folder=others) for flag in flags))
    assert_one_line_error(result, says)
    assert not list(tmp_path.iterdir())
