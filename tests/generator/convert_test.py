"""Generators as Hugging Face folders: logits and tokens as `transformers` has them, and the way back."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from tests.generator.tiny import CODES, TEXT, parsed, random_arrays, text_model, tiny
from tests.verbs import command
from vqrae_jax import config as config_lib
from vqrae_jax import convert as verb
from vqrae_jax import files
from vqrae_jax.data.codes import Description
from vqrae_jax.generator import build, convert, runs, train_state
from vqrae_jax.generator.build import Vocabulary
from vqrae_jax.models import flat
from vqrae_jax.training import checkpoint, sharding
from vqrae_jax.weights import qwen3

KINDS = ("class", "caption")
pytest.importorskip("tokenizers", reason="the folder's tokenizer needs tokenizers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of both kinds of generators a run, `class` and `caption`, and its Hugging Face folder, `class_hf`."""
    folder = tmp_path_factory.mktemp("convert")
    text = text_model(folder / "text")
    (text / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer", "pad_token": "?"}))
    for kind in KINDS:
        config = tiny(captions=text if kind == "caption" else None)
        config.optim.lr_multipliers = (("blocks/mlp/.*", 0.0),)
        write_run(folder / kind, parsed(config))
        convert.to_hf(folder / kind, folder / f"{kind}_hf")
    return folder


def write_run(workdir: Path, config: config_lib.GeneratorConfig) -> None:
    """A run of random weights, whose averages are other ones."""
    codes = Description(data="embedded", source={"images": 9}, num_classes=CODES.classes, tokenizer="abc",
                        weights="ema", codebook_size=CODES.size, grid=(CODES.grid, CODES.grid), image_size=32, views=1,
                        batch_size=1, shard_size=9, recipe={"version": "x"}, records=9, labels=9, captions=9,
                        bad_images=0)
    structure = build.structure(config, build.known_codes(config, codes))
    state, frozen = train_state.init(config, random_arrays(structure.params))
    state = state._replace(ema={path: value + 0.01 for path, value in state.ema.items()})
    checkpoint.write_run(workdir, config, lambda out: runs.write_files(out, config, codes), train_state.items(state),
                         frozen)


def load(workdir: Path, weights="ema") -> runs.Loaded:
    return runs.load_run(workdir, sharding.one_device(), weights=weights)


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert found[path].dtype == np.float32
        np.testing.assert_array_equal(found[path], value)


@pytest.mark.parametrize(("kind", "prompt"), [("class", "<class_1>"), ("caption", "a red cat<begin_image>")])
def test_transformers_computes_the_same_and_draws_an_image_of_codes(kind, prompt, folder):
    torch = pytest.importorskip("torch", reason="logits of transformers need torch: pip install torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    run, hf = load(folder / kind), folder / f"{kind}_hf"
    model, info = transformers.AutoModelForCausalLM.from_pretrained(hf, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
    ours = jax.jit(lambda tokens: (module := flat.merge(run.structure.graphdef, run.params)).logits(
        module.hidden(tokens)))
    prefix = len(tokenizer(prompt)["input_ids"])
    tokens = np.random.default_rng(0).integers(0, run.structure.vocabulary.size, (2, CODES.grid**2 + prefix - 1))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
        drawn = model.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False).numpy()
    assert np.std(theirs) > 0.3
    np.testing.assert_allclose(ours(tokens), theirs, atol=1e-4, rtol=0)
    code = run.structure.vocabulary.code
    assert drawn.shape == (1, prefix + CODES.grid**2)
    likeliest = np.argmax(ours(np.tile(drawn[:, :-1], (2, 1)))[0, prefix - 1:, code], axis=-1)
    np.testing.assert_array_equal(drawn[0, prefix:], code.start + likeliest)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_model(kind, folder):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    vocabulary, hf = load(folder / kind).structure.vocabulary, folder / f"{kind}_hf"
    assert vocabulary == Vocabulary(TEXT.vocabulary if kind == "caption" else 0, CODES.size,
                                    CODES.classes if kind == "class" else 0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
    of = lambda text: tokenizer(text)["input_ids"]
    assert len(tokenizer) == vocabulary.size == transformers.AutoConfig.from_pretrained(hf).vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(vocabulary.size))
    codes = list(range(vocabulary.size)[vocabulary.code])
    names = [f"<code_{code}>" for code in range(CODES.size)]
    assert of("".join(names)) == of(" ".join(names)) == codes
    for name, label in [("<begin_image>", -1), *((f"<class_{i}>", i) for i in range(vocabulary.classes))]:
        begin = int(vocabulary.begin(np.int32(label)))
        assert of(f"{name}<code_3>") == [begin, codes[3]]
        shown = tokenizer.decode([begin, *codes[:3]], skip_special_tokens=True)
        assert shown.replace(" ", "") == "<code_0><code_1><code_2>"
    if kind == "caption":
        old = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "text" / "tokenizer.json"))
        for text in ("a red cat on the table", "unheard of"):
            assert of(f"{text}<begin_image>") == [*old(text)["input_ids"], codes[-1] + 1]
        rows = tokenizer(["cat<begin_image>", "a cat<begin_image>"], padding=True)
        assert [row[-1] for row in rows["input_ids"]] == [codes[-1] + 1] * 2
        assert rows["attention_mask"] == [[0, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_back_leads_to_the_same_bits(kind, folder, tmp_path, monkeypatch):
    run = folder / kind
    convert.from_hf(folder / f"{kind}_hf", tmp_path / "ema")
    monkeypatch.setattr(qwen3, "SHARD_BYTES", 20_000)
    convert.to_hf(run, tmp_path / "hf", step=0, weights="raw")
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 1
    convert.from_hf(tmp_path / "hf", tmp_path / "raw")
    for weights in ("ema", "raw"):
        expected, found = load(run, weights), load(tmp_path / weights)
        assert_same(found.params, expected.params)
        assert found.codes == expected.codes
        for name in ("config.json", *(("text/tokenizer.json", "text/config.json") if kind == "caption" else ())):
            assert (tmp_path / weights / name).read_bytes() == (run / name).read_bytes()
    assert np.any(load(tmp_path / "ema").params["norm/scale"] != load(tmp_path / "raw").params["norm/scale"])
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "ema", "raw"}  # nothing unfinished stays


def test_weights_that_became_bfloat16_come_back_with_the_values_they_have(folder, tmp_path):
    run, hf = load(folder / "class"), shutil.copytree(folder / "class_hf", tmp_path / "hf")
    qwen3.save_lm(hf, qwen3.read_lm_spec(hf), run.params, ml_dtypes.bfloat16)
    convert.from_hf(hf, tmp_path / "run")
    assert_same(load(tmp_path / "run").params, {
        path: np.asarray(value).astype(ml_dtypes.bfloat16).astype(np.float32) for path, value in run.params.items()})


def test_the_command_line_goes_there_and_back(folder, tmp_path):
    hf, run = tmp_path / "hf", tmp_path / "run"
    result = command("vqrae_jax.convert", "to-hf", f"--workdir={folder / 'class'}", f"--out={hf}", "--step=0")
    assert result.returncode == 0, result.stderr
    assert "an image is 16 codes behind <class_0> and so on" in result.stderr
    result = command("vqrae_jax.convert", "from-hf", f"--checkpoint={hf}", f"--workdir={run}")
    assert result.returncode == 0, result.stderr
    assert f"wrote {run}" in result.stderr
    assert_same(load(run).params, load(folder / "class").params)


def edit(file: Path, **changes) -> None:
    content = files.read_json(file) | changes
    file.write_text(json.dumps(content))


def taken(folder: Path, name: str) -> None:
    """Makes the text tokenizer of a run one that has a token of that name."""
    file = folder / "caption" / "text" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"][name] = len(content["model"]["vocab"])
    file.write_text(json.dumps(content))
    files.add_checksums(file.parent)


@pytest.mark.parametrize(("damage", "says"), [
    (lambda at: (at / "out").mkdir() or (at / "out" / "notes.txt").touch(), "out is not empty: choose another --out$"),
    (lambda at: (at / "out").touch(), "cannot write to .*out: Not a directory; choose a folder you may write to$"),
    (lambda at: (at / "caption" / "config.json").unlink(), "caption is not the folder of a run$"),
    (lambda at: (at / "caption" / "config.json").write_text("[]"),
     r"config.json is damaged \(it is no JSON object\): restore it from a copy; if it was changed on purpose, remove"),
    (lambda at: edit(at / "caption" / "config.json", task="chess"), "config.json is not .* key task must be one of"),
    (lambda at: (at / "caption" / "text" / "tokenizer.json").unlink(),
     r"text is damaged \(tokenizer.json is missing\): restore it from a copy$"),
    (lambda at: (at / "caption" / "text" / "tokenizer.json").write_text("{"),
     r"text is damaged \(tokenizer.json has 1 bytes instead of [0-9,]+\): restore it from a copy$"),
    (lambda at: taken(at, "<code_7>"), "has a token <code_7> already: it cannot be that of a code or of a class as"),
])
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(damage, says, folder, tmp_path):
    shutil.copytree(folder / "caption", tmp_path / "caption")
    damage(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError), match=says) as error:
        verb.to_hf(tmp_path / "caption", tmp_path / "out", step=None, weights="ema")
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("damage", "says"), [
    (lambda hf: shutil.rmtree(hf / "vqrae_jax"), "vqrae_jax does not exist: only a generator that to-hf wrote leads"),
    (lambda hf: (hf / "vqrae_jax" / "codes.json").write_text("{"), "codes.json is damaged"),
    (lambda hf: (hf / "model.safetensors").unlink(), "model.safetensors does not exist$"),
    (lambda hf: (hf / "model.safetensors").write_bytes(b"x"), "model.safetensors is damaged or truncated"),
    (lambda hf: edit(hf / "config.json", rms_norm_eps=1e-5, vocab_size=29), "class_hf/vqrae_jax: other vocabulary, n"),
    (lambda hf: edit(hf / "config.json", model_type="llama"), "model_type='llama' is not supported, only qwen3$"),
])
def test_what_does_not_lead_back_is_one_line_before_anything_is_written(damage, says, folder, tmp_path):
    hf = shutil.copytree(folder / "class_hf", tmp_path / "class_hf")
    damage(hf)
    with pytest.raises((ValueError, OSError), match=says) as error:
        convert.from_hf(hf, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(folder):
    with pytest.raises(ValueError, match="class holds a run already: choose another --workdir$"):
        convert.from_hf(folder / "class_hf", folder / "class")
