"""Runs of a generator as users meet them: exact continuation, captions, what a folder holds, wrong codes."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tests.conftest import killed_in_step
from tests.generator.tiny import CODES, TEXT, WORDS, batch, parsed, text_model, tiny
from tests.verbs import assert_one_line_error, command
from vqrae_jax import config as config_lib
from vqrae_jax.data import codes as codes_data
from vqrae_jax.data.codes import CodesRecord, Description
from vqrae_jax.generator import build, evaluate, init, loss, runs, task
from vqrae_jax.models import flat
from vqrae_jax.training import sharding
from vqrae_jax.weights import qwen3

IMAGES, VIEWS = 96, 2


def write_codes(folder: Path, *, seed: int = 0, captions: bool = False, **changes) -> Path:
    """A folder of codes that class and half of the image say, but for some noise, and captions that name the class."""
    rng = np.random.default_rng(seed)
    description = Description(**{
        "data": "embedded", "source": {"images": IMAGES, "digests": [str(seed)]}, "num_classes": CODES.classes,
        "tokenizer": "abc", "weights": "ema", "codebook_size": CODES.size, "grid": (CODES.grid, CODES.grid),
        "image_size": 32, "views": VIEWS, "batch_size": 1, "shard_size": IMAGES, "recipe": {}, **changes})
    records = []
    for index in range(IMAGES):
        label = index % CODES.classes
        codes = 7 * label + (np.arange(CODES.grid**2) >= 8) + np.zeros((VIEWS, 1), int)
        codes = np.where(rng.random(codes.shape) < 0.2, rng.integers(0, CODES.size, codes.shape), codes)
        codes = codes.reshape(VIEWS, CODES.grid, CODES.grid).astype(description.dtype)
        caption = f"a {WORDS[5 + label]} on the table under a chair"[:None if index % 2 else 5] if captions else ""
        records.append(CodesRecord(codes, label, f"image{index}", caption))
    begun = codes_data.begin(folder, description)
    codes_data.write_shard(description.shards(folder)[0], records)
    codes_data.end(folder, begun)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_codes(tmp_path_factory.mktemp("codes") / "by_class")


def config_of(folder: Path, **options):
    config = tiny(**options)
    config.data.update(source=f"codes:{folder}", holdout=0.2)
    return config


def lines(workdir: Path) -> list[str]:
    return (workdir / "metrics.jsonl").read_text().splitlines()


@pytest.fixture(scope="module")
def config(folder):
    """Of a run with all that is random in a step: dropped prefixes and dropout; its embeddings are frozen."""
    config = config_of(folder)
    config.train.update(steps=60, batch_size=32, accumulate=2, log_every=20, checkpoint_every=20, eval_every=30)
    config.model.dropout = 0.05
    config.eval.limit = 0
    config.optim.update(lr=1e-2, ema_decay=0.8, lr_multipliers=(("token_embedding", 0.0),))
    return parsed(config)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """A run that nothing interrupted, which tests only read, and its result."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, task.train(config, workdir)


def test_a_continued_run_equals_one_that_never_stopped(config, whole, tmp_path, caplog):
    caplog.set_level("INFO", "vqrae_jax")
    workdir, result = whole
    with killed_in_step(60):  # after the checkpoint of step 40
        task.train(config, tmp_path)
    assert task.train(config, tmp_path) == result
    assert "continuing at step 40" in caplog.text
    assert lines(tmp_path) == lines(workdir)
    chex.assert_trees_all_equal(*(runs.load_run(folder, sharding.one_device(), weights="raw").params
                                  for folder in (tmp_path, workdir)))


def test_a_run_leaves_what_it_promises(config, whole):
    workdir, _ = whole
    records = [json.loads(line) for line in lines(workdir)]
    assert [r["step"] for r in records if "loss" in r] == [20, 40, 60]
    assert [r["step"] for r in records if "eval/nats" in r] == [30, 60]
    assert np.asarray(Image.open(workdir / "samples" / "0000060.png")).shape == (2 * (14 + 34), 34, 3)
    loaded, raw = (runs.load_run(workdir, sharding.one_device(), weights=weights) for weights in ("ema", "raw"))
    assert (loaded.codes.tokenizer, loaded.structure.codes, loaded.config) == ("abc", CODES, config)
    start = init.params(config, loaded.structure, sharding.one_device())
    same = {path for path, value in loaded.params.items() if np.array_equal(value, start[path])}
    assert same == {"token_embedding"}
    assert np.any(raw.params["head/kernel"] != loaded.params["head/kernel"])


def test_what_can_be_learned_is_learned_and_measured_on_images_that_were_not_trained_on(whole):
    _, result = whole
    # A fifth of the codes is uniform noise, and by chance as expected once in 24 times.
    bound = -(0.8 + 0.2 / 24) * np.log(0.8 + 0.2 / 24) - 0.2 * 23 / 24 * np.log(0.2 / 24)
    assert bound - 0.2 < result["nats"] < bound + 0.4
    assert result["nats"] < result["nats_by_position"] - 0.5 < result["nats_unigram"] - 0.7
    assert 0.6 < result["top1"] < result["top5"] <= 1
    assert result["bits_per_pixel"] == pytest.approx(result["nats"] / np.log(2) * 16 / 32**2)
    assert np.mean([result[f"nats_quarter{i}"] for i in (1, 2, 3, 4)]) == pytest.approx(result["nats"])
    assert 0 < result["num_images"] < 40
    assert result["train_nats"] < result["nats"]


def test_numbers_are_those_of_the_images(folder, tmp_path):
    """Of batches that are padded; and of histograms by hand."""
    config = parsed(config_of(folder))
    made = task.GeneratorTask(config, tmp_path)
    evaluator = evaluate.Evaluator(made.structure, sharding.one_device())
    _, params, _ = flat.split(build.language_model(config, made.structure.spec, nnx.Rngs(0)))
    given = batch(12)
    padded = [{name: np.concatenate([value[at:at + 8], np.zeros_like(value[:max(0, at - 4)])])
               for name, value in given.items()} | {"valid": np.arange(8) < 12 - at} for at in (0, 8)]
    found = evaluator(params, padded)
    model = flat.merge(made.structure.graphdef, params)
    expected = jax.jit(lambda given: loss.predict(model, made.structure.vocabulary, given, rng=None))(given)
    assert found.images == 12
    np.testing.assert_allclose(found.nats, np.asarray(expected.nats, np.float64).mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.top[5], (expected.rank < 5).mean(0), rtol=1e-6)
    counts = evaluator.counts(padded)
    for position, row in enumerate(given["codes"].reshape(12, -1).T):
        np.testing.assert_array_equal(counts[position], np.bincount(row, minlength=CODES.size))
    # Two codes, two positions: the first code three times, once at the second position.
    rulers = evaluate.rulers(np.array([[2, 0], [1, 1]]), np.array([[1, 0], [0, 1]]))
    unigram = np.array([3 + 1, 1 + 1]) / (4 + 2)
    assert rulers["nats_unigram"] == pytest.approx(-np.log(unigram).mean())
    first, second = (2 + 2 * unigram[0]) / (2 + 2), (1 + 2 * unigram[1]) / (2 + 2)
    assert rulers["nats_by_position"] == pytest.approx(-np.log([first, second]).mean())


def test_captions_are_learned_behind_a_text_model_and_the_run_needs_its_folder_only(tmp_path):
    pytest.importorskip("tokenizers", reason="captions need tokenizers")
    folder = write_codes(tmp_path / "codes", captions=True)
    text = text_model(tmp_path / "text")
    config = config_of(folder, captions=text)
    config.train.steps = 3
    made = task.GeneratorTask(parsed(config), tmp_path / "run")
    captions = next(made.batches())
    words = {tuple(row[pads:]) for row, pads in zip(captions["caption"], captions["pads"], strict=True)}
    token = {word: i for i, word in enumerate(("?", *WORDS))}
    assert {(1, token["cat"], 9, 2, 11), (1, token["cat"])} & words
    assert all(len(row) in (2, 5) for row in words)  # short captions, and long ones that were cut
    start = made.init(sharding.one_device())[0].params
    theirs = qwen3.load_lm_params(text, TEXT)
    np.testing.assert_array_equal(start["token_embedding"][:TEXT.vocabulary], theirs["token_embedding"])
    np.testing.assert_allclose(start["token_embedding"][-1], theirs["token_embedding"].mean(0), atol=1e-7)
    task.train(parsed(config), tmp_path / "run")
    shutil.rmtree(text)
    assert next(task.GeneratorTask(parsed(config), tmp_path / "run").batches())["caption"].shape == (8, 5)
    loaded = runs.load_run(tmp_path / "run", sharding.one_device())
    assert loaded.structure.vocabulary == build.Vocabulary(TEXT.vocabulary, CODES.size, 0)
    assert loaded.params["token_embedding"].shape[0] == TEXT.vocabulary + CODES.size + 1


@pytest.mark.parametrize(("keys", "says"), [
    ({"data.source": "codes:{tmp}"}, r"is no folder of codes.*; --config.data.source=... says where"),
    ({"data.source": "embedded"}, r"unknown data 'embedded': give codes:DIR"),
    ({"data.grid": 8}, r"config key data.grid is 8, but codes:.* has 4"),
    ({"data.size": 32}, r"config key data.size is 32, but codes:.* has 24"),
    ({"data.classes": 4}, r"config key data.classes is 4, but codes:.* has 3"),
    ({"eval.source": "codes:{other}"}, r"eval.source: codes:.* are not codes of the tokenizer .*: other tokenizer$"),
    ({"prefix.kind": "caption", "model.path": "{text}"}, r"prefix.kind is caption, but the images of .* no captions"),
    ({"model.path": "{tmp}"}, r"config.json.*; --config.model.path=... says where"),
    ({"prefix.kind": "caption"}, r"config key prefix.kind is caption, but a text has no tokens without a Qwen3"),
    ({"prefix.longest": 3}, r"config key prefix.longest 3 has no meaning for class, only for caption"),
    ({"model.new_rows": "normal"}, r"config key model.new_rows 'normal' has no meaning for one without, only for"),
    ({"model.path": "{text}", "model.width": 32}, r"config key model.width 32 has no meaning for a model with a path"),
    ({"model.kv_heads": 3}, r"config key model.heads 4 is not divisible by model.kv_heads 3"),
    ({"optim.lr_multipliers": (("blokcs/.*", 0.0),)}, r"'blokcs/.\*' matches no parameter; paths look like blocks/"),
    ({"task": "tokenizer"}, r"config key task is 'tokenizer', but this is for a generator"),
])
def test_what_is_wrong_is_one_line_before_anything_is_written(keys, says, folder, tmp_path):
    config = config_of(folder)
    if "model.path" in keys:
        config.model = config_lib.generator().model
        text_model(tmp_path / "text")
    if "{other}" in str(keys):
        write_codes(tmp_path / "other", tokenizer="another")
    for key, value in keys.items():
        *sections, name = key.split(".")
        section = config[sections[0]] if sections else config
        value = value.format(tmp=tmp_path, text=tmp_path / "text", other=tmp_path / "other") if isinstance(
            value, str) else value
        section[name] = value
    with pytest.raises((ValueError, OSError), match=says) as error:
        task.train(parsed(config), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def damaged(file: Path, how: str) -> None:
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif how == "flipped":  # in a third of the records, by their names
        file.write_bytes(re.sub(rb"image(?=[1-3][0-9])", b"imagf", file.read_bytes()))


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "flags", "says"), [
    ("gone", [], "lacks 1 of 1 files of codes, for example codes-00000-of-00001.array_record: give the"),
    ("cut", [], "(codes-00000-of-00001.array_record has 1,000 bytes instead of "),
    ("flipped", [], "(the content of codes-00000-of-00001.array_record has changed): give the command tokenize"),
    ("none", ["--config.prefix.longest=49"], "prefix.longest 49 and an image of 16 codes are more than the 64 "),
])
def test_training_fails_in_one_line(damage, flags, says, tmp_path):
    pytest.importorskip("tokenizers", reason="captions need tokenizers")
    codes, text = write_codes(tmp_path / "codes", captions=True), text_model(tmp_path / "text")
    damaged(codes / "codes-00000-of-00001.array_record", damage)
    (tmp_path / "mine.py").write_text(f"""
from pathlib import Path
from tests.generator import tiny

def get_config():
    config = tiny.tiny(captions=Path({str(text)!r}))
    config.data.source = {f"codes:{codes}"!r}
    return config
""")
    result = command("vqrae_jax.main", f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}", *flags)
    assert_one_line_error(result, says)
    if damage != "none":
        assert "give the command tokenize that made it once more" in result.stderr


def test_a_caption_and_an_image_must_fit_the_text_model(tmp_path):
    config = tiny(captions=text_model(tmp_path))
    config.prefix.longest = TEXT.max_positions - CODES.grid**2 + 1
    with pytest.raises(ValueError, match="config key prefix.longest 49 and an image of 16 codes are more than the 64 "):
        build.structure(parsed(config), CODES)


def test_a_label_that_is_no_class_ends_the_run(tmp_path):
    folder = write_codes(tmp_path / "codes", num_classes=None)
    config = config_of(folder)
    with pytest.raises(ValueError, match="config key data.classes is 0, but codes:.* does not say how many classes"):
        task.train(parsed(config), tmp_path / "run")
    config.data.classes = 2
    batches = task.GeneratorTask(parsed(config), tmp_path / "run").batches()
    with pytest.raises(ValueError, match="an image has the label 2, but there are 2 classes"):
        next(batches)


def test_a_run_goes_on_with_its_codes_wherever_they_lie_and_with_no_others(config, whole, folder, tmp_path):
    at = lambda place: dataclasses.replace(config, data=dataclasses.replace(config.data, source=f"codes:{place}"))
    with pytest.raises(ValueError, match="does not hold the codes that the run in .* was trained on: other tokenizer;"):
        task.train(at(write_codes(tmp_path / "other", tokenizer="another")), whole[0])
    task.GeneratorTask(at(shutil.copytree(folder, tmp_path / "moved")), whole[0])


def test_a_run_of_one_task_is_not_taken_for_one_of_the_other(tmp_path):
    config_lib.save(config_lib.GeneratorConfig(), tmp_path / "config.json")
    with pytest.raises(ValueError, match="is the run of a generator, where that of a tokenizer is needed"):
        config_lib.load(tmp_path / "config.json")
    values = json.loads((tmp_path / "config.json").read_text())
    del values["task"], values["checksum"]  # as before there was a second one
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="is the run of a tokenizer, where that of a generator is needed"):
        config_lib.load(tmp_path / "config.json", config_lib.GeneratorConfig)
