"""Runs as users meet them: exact continuation, stage 2 from stage 1, bad images, full disks, other people's folders."""

import dataclasses
import json
import logging
import re
import shutil
from collections import Counter
from pathlib import Path

import chex
import grain
import jax
import numpy as np
import pytest
from PIL import Image

import vqrae_jax
from tests.config_test import TOKENIZERS
from tests.conftest import REFERENCE, killed_in_step, tiny
from tests.tiny import Run, reduced
from vqrae_jax import config as config_lib
from vqrae_jax.data import BadImages, FolderSource, open_source
from vqrae_jax.tokenizer import build, convert, evaluate, init, runs, task, train_state
from vqrae_jax.training import checkpoint, sharding
from vqrae_jax.weights import huggingface

pytestmark = pytest.mark.usefixtures("tiny_networks")


def lines(workdir: Path) -> list[str]:
    return (workdir / "metrics.jsonl").read_text().splitlines()


def arrays(workdir: Path, **options):
    return runs.load_run(workdir, sharding.one_device(), **options)[2]


def stage2(config, stage1: Path):
    config.init_from = str(stage1)
    config.loss.distill_weight = 1.0
    config.optim.lr_multipliers = (("encoder/.*", 0.5),)
    return config


@pytest.fixture(scope="module")
def stage1_run(tmp_path_factory) -> Path:
    """A run that tests only read."""
    workdir, config = tmp_path_factory.mktemp("task") / "stage1", tiny()
    config.model.dtype = "bfloat16"
    task.train(config_lib.parse(config), workdir)
    return workdir


def test_a_run_leaves_what_it_promises(tiny_config, tmp_path):
    tiny_config.log.tensorboard = True
    tiny_config.train.update(eval_every=3)
    result = task.train(config_lib.parse(tiny_config), tmp_path)
    records = [json.loads(line) for line in lines(tmp_path)]
    assert [r["step"] for r in records if "loss/total" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "eval/psnr" in r] == [3, 6]
    assert records[-1]["eval/psnr"] == result["psnr"]
    assert result["num_images"] == 16
    assert set(result) >= {"psnr", "ssim", "code_usage", "code_perplexity", "knn_top1"}
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["0000003.png", "0000006.png"]
    assert list(tmp_path.glob("events.out.tfevents*"))
    assert config_lib.load(tmp_path / "config.json") == config_lib.parse(tiny_config)


def test_a_continued_run_equals_one_that_never_stopped(tiny_config, tmp_path, stage1_run, caplog):
    """All there is to save: a teacher, averages, and a discriminator that has learned before the run dies."""
    caplog.set_level("INFO", "vqrae_jax")
    stage2(tiny_config, stage1_run)
    tiny_config.model.dtype = "bfloat16"
    tiny_config.gan.update(discriminator="patchgan", channels=32, adaptive=True, discriminator_start_step=1,
                           start_step=3, lecam_weight=0.1, augment=True)
    tiny_config.model.quantizer.kind = "simvq"
    tiny_config.train.update(eval_every=3, checkpoint_every=2)
    config = config_lib.parse(tiny_config)
    task.train(config, tmp_path / "whole")

    with killed_in_step(5):  # after the checkpoint of step 4, and with half a line in its metrics
        task.train(config, tmp_path / "parts")
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss/total": 0.1, "lo')
    task.train(config, tmp_path / "parts")

    assert "continuing at step 4" in caplog.text
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    chex.assert_trees_all_equal(arrays(tmp_path / "parts"), arrays(tmp_path / "whole"))
    # Trained with in bfloat16, the encoder of stage 1 and the teacher of stage 2 are on disk as they were given.
    given = huggingface.load_encoder_params(REFERENCE / "siglip_vision", image_size=32)
    for workdir in (stage1_run, tmp_path / "parts"):
        kept = runs.pretrained_encoder(workdir, config_lib.load(workdir / "config.json"), arrays(workdir),
                                       sharding.one_device())
        chex.assert_trees_all_equal(kept, given)
    records = [json.loads(line) for line in lines(tmp_path / "whole")]
    assert [r["step"] for r in records if "loss/discriminator" in r] == [2, 3, 4, 5, 6]
    assert [r["weight/gan"] > 0 for r in records if "weight/gan" in r] == [False, False, True, True, True]


def test_a_run_is_loaded_with_its_averaged_weights_from_its_folder_alone(tiny_config, tmp_path, encoder_folder):
    tiny_config.model.encoder.path = str(encoder_folder)
    task.train(config_lib.parse(tiny_config), tmp_path / "run")
    shutil.rmtree(encoder_folder)
    model = vqrae_jax.load(tmp_path / "run")
    images = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    codes = model.encode_to_indices(images)
    np.testing.assert_array_equal(model.reconstruct(images), model.decode_from_indices(codes))
    assert vqrae_jax.load(tmp_path / "run", step=4).num_codes == 32
    with pytest.raises(FileNotFoundError, match=r"holds the checkpoints \[4, 6\], not 3"):
        vqrae_jax.load(tmp_path / "run", step=3)
    tiny_config.optim.ema_decay = 0.0
    with pytest.raises(ValueError, match=r"optim.ema_decay: 0.9 -> 0.0"):
        task.train(config_lib.parse(tiny_config), tmp_path / "run")


def test_averages_or_the_weights_themselves_are_loaded_and_nothing_else_is_read(tiny_config, tmp_path, monkeypatch):
    tiny_config.model.quantizer.kind = "ema"  # whose buffers move, and are averaged as well
    tiny_config.optim.lr_multipliers = ((".*/position_embedding", 0.0),)
    config = config_lib.parse(tiny_config)
    run = Run(config)
    run.train(3)
    monkeypatch.setattr(train_state, "init", lambda *_: (run.state, run.frozen))
    runs.write_run(tmp_path, config, run.params, run.buffers)
    monkeypatch.undo()
    read, load_item = [], checkpoint.load_item
    def noted(*arguments):
        items = load_item(*arguments)
        read.extend(path for item in items.values() for path, value in item.items() if value is not checkpoint.NOT_READ)
        return items
    monkeypatch.setattr(checkpoint, "load_item", noted)
    raw = {**run.frozen.params, **run.state.params, **run.state.buffers}
    for weights, expected in (("ema", raw | run.state.ema), ("raw", raw)):
        chex.assert_trees_all_equal(arrays(tmp_path, weights=weights), expected)
        assert sorted(read) == sorted(run.state.params | run.state.buffers)  # each once
        read.clear()
    assert np.any(run.state.ema["decoder/embedding/kernel"] != raw["decoder/embedding/kernel"])
    chex.assert_trees_all_equal(arrays(tmp_path), raw | run.state.ema)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    averaged, as_trained = (vqrae_jax.load(tmp_path, weights=weights).reconstruct(images) for weights in ("ema", "raw"))
    assert np.any(averaged != as_trained)
    convert.to_hf(tmp_path, tmp_path / "hf", weights="raw")
    for path, value in huggingface.load_encoder_params(tmp_path / "hf", image_size=32).items():
        np.testing.assert_array_equal(value, raw[f"encoder/{path}"])
    with pytest.raises(ValueError, match="weights must be ema or raw, not 'mean'"):
        vqrae_jax.load(tmp_path, weights="mean")


def test_weights_of_a_run_without_averages_are_the_weights(tiny_config, tmp_path):
    tiny_config.optim.ema_decay = 0.0
    config = config_lib.parse(tiny_config)
    run = Run(config)
    runs.write_run(tmp_path, config, run.params, run.buffers)
    for weights in ("ema", "raw"):
        chex.assert_trees_all_equal(arrays(tmp_path, weights=weights), {**run.params, **run.buffers})


def test_stage_2_starts_where_stage_1_ended(tiny_config, tmp_path, stage1_run):
    stage2(tiny_config, stage1_run)
    tiny_config.train.steps = 3
    task.train(config_lib.parse(tiny_config), tmp_path / "stage2")
    before, after = arrays(stage1_run), arrays(tmp_path / "stage2")
    assert before.keys() == after.keys()
    first = json.loads(lines(tmp_path / "stage2")[0])
    assert first["loss/distill"] == 0.0  # the teacher is the student before its first step
    assert np.any(before["encoder/vit/patch_embedding/kernel"] != after["encoder/vit/patch_embedding/kernel"])
    tiny_config.model.quantizer.size = 64
    with pytest.raises(ValueError, match=r"init_from: .* has quantizer/codebook of shape \(32, 32\), .* \(64, 32\)"):
        task.train(config_lib.parse(tiny_config), tmp_path / "other")
    tiny_config.init_from = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        task.train(config_lib.parse(tiny_config), tmp_path / "another")
    # A start that failed before its first checkpoint does not reserve the folder for its mistake.
    tiny_config.init_from = str(stage1_run)
    tiny_config.model.quantizer.size = 32
    task.train(config_lib.parse(tiny_config), tmp_path / "another")


@pytest.mark.parametrize("stage2", [
    pytest.param(name, marks=[] if name == "nano_stage2" else [pytest.mark.slow])
    for name in sorted(TOKENIZERS) if name.endswith("stage2")])
def test_every_shipped_stage_2_starts_from_its_stage_1(stage2, tmp_path, caplog):
    stage1 = reduced(stage2.replace("stage2", "stage1"))
    run = Run(stage1)
    runs.write_run(tmp_path / "stage1", stage1, run.params, run.buffers)
    config = dataclasses.replace(reduced(stage2), init_from=str(tmp_path / "stage1"))
    structure = build.structure(config)
    with caplog.at_level(logging.INFO, logger="vqrae_jax"):
        started = init.initial_arrays(config, structure, lambda: None, sharding.one_device())
    chex.assert_trees_all_equal(started, (run.params, run.buffers))
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("vqrae_jax")]
    said = [line.split(" from ")[0] for line in messages]
    paths = [*structure.params, *structure.buffers]
    expected = [f"{part}: {sum(path.startswith(part) for path in paths)} arrays restored"
                for part in ("decoder", "encoder", "quantizer")]
    assert said[:3] == expected
    discriminators = [c.gan.discriminator != "none" for c in (stage1, config)]
    assert messages[3:] == {
        (False, False): [], (False, True): ["discriminator: initialised; it is not taken over from another run"],
        (True, False): [f"discriminator: that of {config.init_from} left out"]}[*discriminators]


def test_a_run_without_codes_lends_encoder_and_decoder(tiny_config, tmp_path, caplog):
    """An RAE, such as an imported one: its quantizer is initialised; and a codebook that is not wanted is left out."""
    codes = config_lib.parse(tiny_config)
    tiny_config.model.quantizer.kind = "none"
    continuous = config_lib.parse(tiny_config)
    for config, name in ((continuous, "rae"), (codes, "vqrae")):
        run = Run(config)
        runs.write_run(tmp_path / name, config, run.params, run.buffers)
    model = vqrae_jax.load(tmp_path / "rae")
    images = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    np.testing.assert_array_equal(model.encode(images)[0].reshape(2, 16, 32), model.features(images))
    np.testing.assert_array_equal(model.decode(model.features(images)), model.reconstruct(images))
    with pytest.raises(ValueError, match="this model has no codes"):
        model.encode_to_indices(images)
    for config, origin, says in ((codes, "rae", "quantizer: initialised"), (continuous, "vqrae", "arrays left out")):
        config = dataclasses.replace(config, init_from=str(tmp_path / origin), seed=5)
        with caplog.at_level(logging.INFO, logger="vqrae_jax"):
            started, _ = init.initial_arrays(config, build.structure(config), lambda: None, sharding.one_device())
        assert any(says in message for message in caplog.messages)
        lent = arrays(tmp_path / origin)
        for path, value in started.items():
            assert path.startswith("quantizer/") or np.array_equal(value, lent[path]), path


@pytest.mark.parametrize(("section", "key", "value"), [
    ("quantizer", "l2_normalize", True), ("quantizer", "search", "cosine"), ("encoder", "layers", (1, 2))])
def test_arrays_that_would_mean_something_else_are_not_taken_over(section, key, value, tiny_config, tmp_path):
    """The shapes are the same, the model is not."""
    config = config_lib.parse(tiny_config)
    run = Run(config)
    runs.write_run(tmp_path / "first", config, run.params, run.buffers)
    tiny_config.init_from = str(tmp_path / "first")
    tiny_config.model[section][key] = value
    with pytest.raises(ValueError, match=f"init_from: .* has model.{section}.{key} .*, this config "):
        task.train(config_lib.parse(tiny_config), tmp_path / "second")


def started_from(first: config_lib.Config, second: config_lib.Config, folder: Path):
    """The arrays that a second run starts with from those of a first one; and those."""
    run = Run(first)
    runs.write_run(folder, first, run.params, run.buffers)
    second = dataclasses.replace(second, init_from=str(folder))
    return init.initial_arrays(second, build.structure(second), lambda: None, sharding.one_device()), run


@pytest.mark.parametrize(("name", "file", "option", "values", "says"), [
    ("siglip_vision", "config", "num_attention_heads", (4, 8), "the encoder's heads 4, this config 8"),
    ("siglip_vision", "config", "hidden_act", ("gelu_pytorch_tanh", "gelu"),
     "the encoder's activation 'gelu_tanh', this config 'gelu'"),
    ("siglip_vision", "config", "layer_norm_eps", (1e-6, 1e-5), "the encoder's norm_eps 1e-06, this config 1e-05"),
    ("dinov3_vit", "config", "rope_theta", (100.0, 10.0), "the encoder's rope_theta 100.0, this config 10.0"),
    ("siglip_vision", "preprocessor_config", "image_std", ([0.3, 0.2, 0.25], [0.3, 0.2, 0.5]),
     r"the encoder's std \(0.3, 0.2, 0.25\), this config \(0.3, 0.2, 0.5\)"),
], ids=["heads", "activation", "norm_eps", "rope_theta", "std"])
def test_an_encoder_that_computes_something_else_is_refused(name, file, option, values, says, tiny_config, tmp_path):
    """Arrays of the same shapes, and another line in the encoder's files."""
    configs = []
    for i, value in enumerate(values):
        folder = Path(shutil.copytree(REFERENCE / name, tmp_path / str(i)))
        content = json.loads((folder / f"{file}.json").read_text())
        (folder / f"{file}.json").write_text(json.dumps(content | {option: value}))
        tiny_config.model.encoder.update(path=str(folder), random_weights=True)
        tiny_config.model.quantizer.dim = huggingface.read_encoder_spec(folder).vit.width
        configs.append(config_lib.parse(tiny_config))
    with pytest.raises(ValueError, match=f"^init_from: .* has {says}: with the same encoder it would be"):
        started_from(*configs, tmp_path / "run")


def test_fsq_of_other_levels_is_another_quantizer(tiny_config, tmp_path):
    tiny_config.model.quantizer.update(kind="adapter_fsq", levels=(4, 2, 4), size=32, dim=3)
    first = config_lib.parse(tiny_config)
    tiny_config.model.quantizer.levels = (2, 4, 4)
    with pytest.raises(ValueError, match=r"has model.quantizer.levels \(4, 2, 4\), this config \(2, 4, 4\)"):
        started_from(first, config_lib.parse(tiny_config), tmp_path / "run")


def test_what_only_training_reads_and_other_words_for_the_same_may_differ(tiny_config, tmp_path):
    tiny_config.model.quantizer.dim = 8
    first = config_lib.parse(tiny_config)
    tiny_config.model.update(noise_tau=0.5, remat="full", dtype="bfloat16")
    tiny_config.model.encoder.update(layers=(3,), input_size=32)
    tiny_config.model.quantizer.update(projection=True, gradient="rotation", commitment_weight=1.0)
    tiny_config.model.decoder.update(shape="custom", width=32, depth=3, heads=4, mlp_dim=48, patch_size=8)
    with pytest.raises(ValueError, match="has the decoder's activation 'gelu_tanh', this config 'gelu'"):
        started_from(first, config_lib.parse(tiny_config), tmp_path / "first")
    tiny_config.model.decoder.update(shape="symmetric", width=0, depth=0, heads=0, mlp_dim=0)
    started, run = started_from(first, config_lib.parse(tiny_config), tmp_path / "second")
    chex.assert_trees_all_equal(started, (run.params, run.buffers))


def noisy(seed: int, mode: str, size=(40, 36)) -> Image.Image:
    depth = {"L": 1, "RGB": 3, "CMYK": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], depth), np.uint8)
    return Image.fromarray(pixels.squeeze(), mode)


@pytest.fixture
def mixed_folder(tmp_path) -> Path:
    """Good images, odd ones that can be read, and two that cannot."""
    folder = tmp_path / "images"
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for i in range(4):
            noisy(i, "RGB").save(folder / label / f"good{i}.jpg")
    noisy(10, "L").save(folder / "cat" / "grey.jpg")
    noisy(11, "CMYK").save(folder / "cat" / "cmyk.jpg")
    noisy(12, "RGB").quantize(16).save(folder / "cat" / "palette.png")
    Image.fromarray(np.full((40, 40), 30000, np.uint16)).save(folder / "cat" / "deep.png")
    Image.new("RGB", (1, 1), "red").save(folder / "dog" / "dot.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    noisy(13, "RGB").save(folder / "dog" / "rotated.jpg", exif=exif)
    whole = (folder / "cat" / "good0.jpg").read_bytes()
    (folder / "dog" / "truncated.jpg").write_bytes(whole[:len(whole) // 2])
    (folder / "dog" / "text.jpg").write_text("this is no picture")
    return folder


def test_bad_images_cost_themselves_only(tiny_config, tmp_path, mixed_folder):
    tiny_config.data.source = f"folder:{mixed_folder}"
    tiny_config.eval.limit = 0
    tiny_config.train.steps = 8
    result = task.train(config_lib.parse(tiny_config), tmp_path / "run")
    assert result["num_images"] == 14
    named = [json.loads(line)["name"] for line in (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()]
    assert sorted(Path(name).name for name in named) == ["text.jpg", "truncated.jpg"]
    table = evaluate.table({"run": result})
    assert "num_images" in table


def test_data_that_moved_must_hold_the_same_images(tiny_config, tmp_path, mixed_folder, caplog):
    caplog.set_level("INFO", "vqrae_jax")
    tiny_config.data.update(source=f"folder:{mixed_folder}", max_bad=1.0)

    def goes_on(steps, **data):
        tiny_config.train.steps = steps
        tiny_config.data.update(**data)
        return task.train(config_lib.parse(tiny_config), tmp_path / "run")

    goes_on(3)
    moved = mixed_folder.rename(tmp_path / "moved")
    goes_on(4, source=f"folder:{moved}")
    assert f"data.source: 'folder:{mixed_folder}' -> 'folder:{moved}' from step 3 on" in caplog.text
    assert len(lines(tmp_path / "run")) == 6  # four steps, and evaluations at both ends
    shutil.copytree(moved, tmp_path / "other")
    noisy(99, "RGB").save(tmp_path / "other" / "cat" / "good0.jpg")
    with pytest.raises(ValueError, match=r"other does not hold the images .*: 1 of \d+ images that were looked"):
        goes_on(5, source=f"folder:{tmp_path / 'other'}")
    (moved / "cat" / "good0.jpg").unlink()
    goes_on(5, source=f"folder:{moved}")
    assert re.search(r"changed since this run began \(\d+ images instead of \d+\): it goes on with them", caplog.text)


def test_a_run_that_does_not_fit_into_memory_may_go_on_in_smaller_pieces(tiny_config, tmp_path):
    tiny_config.train.steps = 3
    task.train(config_lib.parse(tiny_config), tmp_path)
    tiny_config.train.update(steps=5, accumulate=2)
    tiny_config.model.remat = "full"
    result = task.train(config_lib.parse(tiny_config), tmp_path)
    assert len(lines(tmp_path)) == 7 and result == task.train(config_lib.parse(tiny_config), tmp_path)


def test_evaluation_numbers_are_those_of_the_images(tiny_config, tmp_path):
    """PSNR over all images, recomputed from the public methods; padding of the last batch counts nowhere."""
    tiny_config.eval.update(batch_size=5, limit=12)
    result = task.train(config_lib.parse(tiny_config), tmp_path)
    model = vqrae_jax.load(tmp_path)
    bad = BadImages(None)
    batches = list(evaluate.open_batches(model.config, open_source("embedded", training=False), bad,
                                         sharding.one_device(), limit=12, max_bad=0.0))
    images = np.concatenate([b["image"][b["valid"]] for b in batches])
    assert len(images) == result["num_images"] == 12
    error = (np.asarray(model.reconstruct(images), np.float64) - images / 255) ** 2
    assert result["psnr"] == pytest.approx(np.mean(-10 * np.log10(error.mean(axis=(1, 2, 3)))), abs=1e-3)
    counts = np.bincount(np.asarray(model.encode_to_indices(images)).reshape(-1), minlength=32)
    share = counts[counts > 0] / counts.sum()
    assert result["code_usage"] == pytest.approx((counts > 0).mean())
    assert result["code_perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)


def recording(function, calls):
    """The function, which notes its arguments."""
    def recorded(*arguments, **options):
        calls.append(options or arguments)
        return function(*arguments, **options)
    return recorded


@pytest.mark.parametrize("threads", [0, 7])
def test_evaluation_reads_with_the_threads_of_the_config(threads, tiny_config, monkeypatch):
    asked = []
    monkeypatch.setattr(grain, "ReadOptions", recording(grain.ReadOptions, asked))
    tiny_config.data.threads = threads
    batches = evaluate.open_batches(config_lib.parse(tiny_config), open_source("embedded", training=False),
                                    BadImages(None), sharding.one_device(), limit=8, max_bad=0.0)
    assert sum(batch["valid"].sum() for batch in batches) == 8
    assert [options["num_threads"] for options in asked] == [threads]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Forty images, some of which are held out at a share of 0.2."""
    (tmp_path / "images").mkdir()
    for i in range(40):
        noisy(i, "RGB").save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


def test_evaluation_shows_images_that_were_not_trained_on(tiny_config, tmp_path, folder, monkeypatch):
    opened, read = [], []
    monkeypatch.setattr(FolderSource, "__init__", recording(FolderSource.__init__, opened))
    monkeypatch.setattr(FolderSource, "__getitem__", recording(FolderSource.__getitem__, read))
    tiny_config.data.update(source=f"folder:{folder}", holdout=0.2)
    tiny_config.train.update(steps=30, eval_every=30)
    config = config_lib.parse(tiny_config)
    result = task.train(config, tmp_path / "run")
    assert len(opened) == 1  # a walk through millions of files is not done twice
    reads = Counter(index for _, index in read)
    once = {index for index, count in reads.items() if count == 1}  # by the evaluation
    assert set(reads) == set(range(40)) and 0 < len(once) == result["num_images"] < 16
    assert min(reads[index] for index in set(range(40)) - once) >= 3  # in as many epochs


def test_an_explicit_evaluation_source_is_shown_whole(tiny_config, tmp_path, folder):
    tiny_config.data.update(source=f"folder:{folder}", holdout=0.2)
    tiny_config.eval.update(source=f"folder:{folder}", limit=0)
    tiny_config.train.steps = 3
    assert task.train(config_lib.parse(tiny_config), tmp_path / "run")["num_images"] == 40


def test_where_nothing_is_held_out_evaluation_says_what_it_shows(tiny_config, tmp_path, folder, caplog):
    tiny_config.data.update(source=f"folder:{folder}", holdout=0.0)
    tiny_config.eval.limit = 0
    tiny_config.train.steps = 3
    assert task.train(config_lib.parse(tiny_config), tmp_path / "run")["num_images"] == 40
    assert "no image is held out (data.holdout is 0 of 40 images)" in caplog.text


def test_kmeans_start_uses_more_codes_than_a_random_one(tiny_config, tmp_path):
    tiny_config.train.update(steps=3)
    random = task.train(config_lib.parse(tiny_config), tmp_path / "random")
    tiny_config.model.quantizer.init = "kmeans"
    kmeans = task.train(config_lib.parse(tiny_config), tmp_path / "kmeans")
    assert kmeans["code_perplexity"] > random["code_perplexity"]
    assert jax.tree.all(jax.tree.map(lambda x: np.all(np.isfinite(x)), arrays(tmp_path / "kmeans")))
