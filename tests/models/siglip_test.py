"""SigLIP's heads against `transformers`, from committed references and live, and class names against images."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import REFERENCE
from vqrae_jax.metrics.features import zero_shot_top1
from vqrae_jax.models.siglip import SiglipHeads, class_embeddings
from vqrae_jax.weights import huggingface, siglip

PAIR = REFERENCE / "siglip_pair"
WORDS = ["<pad>", "</s>", "<unk>", "a", "photo", "of", "cat", "dog", "green", "tree", "frog"]


def images() -> np.ndarray:
    return np.float32(np.load(REFERENCE / "images.npy")) / 255


def assert_matches(folder: Path, expected) -> None:
    heads = siglip.load_siglip_heads(folder)
    features = huggingface.build_encoder(folder)(images())
    embeddings = heads.image_embedding(features), heads.text_embedding(expected["token_ids"])
    for actual, name in zip((*embeddings, heads.logits(*embeddings)),
                            ("image_embeds", "text_embeds", "logits_per_image"), strict=True):
        assert actual.shape == expected[name].shape and actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected[name], atol=1e-4, rtol=0, err_msg=name)
    plain = huggingface.build_encoder(folder, final_norm="plain")(images())
    np.testing.assert_allclose(heads.image_embedding(plain, final_norm="plain"), expected["image_embeds"], atol=1e-4)


def test_embeddings_and_logits_match_committed_pytorch_ones():
    expected = np.load(PAIR / "embeddings.npz")
    assert np.ptp(expected["logits_per_image"]) > 0.1
    assert_matches(PAIR, expected)


def test_embeddings_and_logits_match_live_pytorch(tmp_path):
    pytest.importorskip("torch", reason="live parity needs torch")
    from tests import make_encoder_references
    token_ids = np.random.default_rng(1).integers(0, 30, (4, 12))
    expected = make_encoder_references.make_pair_reference(images=images(), token_ids=token_ids, folder=tmp_path,
                                                           seed=9)
    assert_matches(tmp_path, expected | {"token_ids": token_ids})


def test_features_of_another_width_cannot_be_pooled():
    with pytest.raises(ValueError, match="features are 48 wide, but SigLIP's pooling head takes the 24 of the last"):
        siglip.load_siglip_heads(PAIR).image_embedding(np.zeros((1, 25, 48), np.float32))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A private copy, to be damaged, with a tokenizer that knows a few words."""
    folder = Path(shutil.copytree(PAIR, tmp_path / "pair"))
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path, **options) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    # One that adds the wrong things: what a text begins and ends with must not depend on it.
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<unk> $A",
                                                                        special_tokens=[("<unk>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", "pad_token": "<pad>",
               "eos_token": "</s>", "unk_token": "<unk>"} | options
    (folder / "tokenizer_config.json").write_text(json.dumps(options))


def test_texts_are_lower_case_without_punctuation_ended_and_padded_on_the_right(folder):
    tokenize = siglip.load_tokenizer(folder, 6)
    ids = tokenize(["A photo of (a) Cat!", "green_tree,  frog", "a a a a a a a a", ""])
    assert ids.dtype == np.int32
    assert ids.tolist() == [[3, 4, 5, 3, 6, 1], [8, 9, 10, 1, 0, 0], [3, 3, 3, 3, 3, 1], [1, 0, 0, 0, 0, 0]]


def test_a_class_is_the_mean_of_its_name_in_all_templates(folder):
    heads, tokenize = siglip.load_siglip_heads(folder), siglip.load_tokenizer(folder, 12)
    names, templates = ["cat", "Green Frog"], ("a photo of a {}.", "{}")
    found = class_embeddings(heads, tokenize, names, templates)
    texts = [["a photo of a cat", "cat"], ["a photo of a green frog", "green frog"]]
    units = [np.asarray(heads.text_embedding(tokenize(group))) for group in texts]
    np.testing.assert_allclose(np.linalg.norm(units, axis=-1), 1, atol=1e-6)
    expected = np.stack([unit.mean(axis=0) / np.linalg.norm(unit.mean(axis=0)) for unit in units])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not np.allclose(found[0], units[0][0], atol=1e-3)
    assert zero_shot_top1(found, found, np.array([0, 1])) == 1


def test_the_templates_are_openai_s_eighty():
    templates = siglip.openai_templates()
    assert len(set(templates)) == 80
    assert all(template.count("{}") == 1 and template == template.strip() for template in templates)
    assert templates[0] == "a bad photo of a {}." and templates[-1] == "a tattoo of the {}."


@pytest.mark.parametrize("names, templates, message", [
    ([], ["{}"], "names of at least two classes, not 0"),
    (["cat"], ["{}"], "names of at least two classes, not 1"),
    (["cat", " "], ["{}"], "the name of class 1 is empty"),
    (["cat", "dog"], [], "needs templates, each with {}"),
    (["cat", "dog"], ["a photo"], "needs templates, each with {}"),
])
def test_names_and_templates_that_say_nothing_are_errors(names, templates, message):
    with pytest.raises(ValueError, match=message):
        class_embeddings(siglip.load_siglip_heads(PAIR), lambda texts: np.zeros((len(texts), 12), int), names,
                         templates)


@pytest.mark.parametrize("ids", [np.full((1, 12), 30), np.full((1, 12), -1), np.zeros((1, 11), int)])
def test_a_tokenizer_of_another_model_is_an_error(ids):
    with pytest.raises(ValueError, match="takes 12 below 30: its files are those of another model"):
        class_embeddings(siglip.load_siglip_heads(PAIR), lambda texts: ids, ["cat", "dog"], ["{}"])


@pytest.mark.parametrize("name", ["siglip_vision", "dinov2"])
def test_a_folder_without_text_tower_is_named(name):
    with pytest.raises(ValueError, match=f"{name} has no text tower: zero-shot needs a whole SigLIP model"):
        siglip.load_siglip_heads(REFERENCE / name)


def test_towers_that_cannot_be_compared_are_named():
    with pytest.raises(ValueError, match="text_config.projection_size and vision_config.hidden_size: text "
                                         "embeddings of width 16 cannot be compared with image embeddings of width 32"):
        siglip.load_siglip_heads(REFERENCE / "siglip")


def drop(folder: Path, pattern: str) -> None:
    file = folder / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if not name.startswith(pattern)}, file)


@pytest.mark.parametrize("pattern, message", [
    ("text_model.", "has no text tower"),
    ("vision_model.head.", "has no pooling head"),
    ("text_model.head.bias", "tensor text_model.head.bias is missing, which SiglipModel has$"),
    ("text_model.encoder.layers.1.mlp", "encoder.layers.1.mlp.fc1.bias is missing, which SiglipModel has, and 3 more"),
    ("vision_model.post_layernorm", "post_layernorm.bias is missing, which SiglipModel has, and 1 more"),
])
def test_tensors_that_are_missing_are_named(folder, pattern, message):
    drop(folder, pattern)
    with pytest.raises(ValueError, match=message):
        siglip.load_siglip_heads(folder)


@pytest.mark.parametrize("options, message", [
    ({"vocab_size": 31}, r"token_embedding.weight has shape \(30, 16\), but config.json implies \(31, 16\)"),
    ({"num_hidden_layers": 1}, "text_model.encoder.layers.1.* is unexpected: SiglipModel does not have it"),
    ({"num_attention_heads": 3}, "text_config.hidden_size and num_attention_heads: width 16 is not divisible"),
    ({"hidden_act": "relu"}, "text_config.hidden_act='relu' is not supported"),
    ({"max_position_embeddings": None}, "text_config.max_position_embeddings must be a whole number"),
])
def test_options_of_the_text_tower_that_do_not_fit_are_named(folder, options, message):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= options
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        siglip.load_siglip_heads(folder)


def test_the_projection_is_as_wide_as_the_tower_where_the_config_does_not_say(folder):
    config = json.loads((folder / "config.json").read_text())
    for value in (None, 24):
        config["text_config"]["projection_size"] = value
        (folder / "config.json").write_text(json.dumps(config))
        if value:
            assert isinstance(siglip.load_siglip_heads(folder), SiglipHeads)
        else:
            with pytest.raises(ValueError, match="text embeddings of width 16"):
                siglip.load_siglip_heads(folder)


def test_without_transformers_the_error_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(OSError, match="needs transformers and sentencepiece: pip install transformers sentencepiece"):
        siglip.load_tokenizer(folder, 6)


def test_a_tokenizer_that_cannot_be_had_is_named(folder):
    save_tokenizer(folder, tokenizer_class="SiglipTokenizer")
    pytest.importorskip("transformers")
    if not importlib.util.find_spec("sentencepiece"):
        with pytest.raises(OSError, match="needs transformers and sentencepiece: pip install .*SentencePiece"):
            siglip.load_tokenizer(folder, 6)
    save_tokenizer(folder, pad_token=None)
    with pytest.raises(ValueError, match="has no padding token"):
        siglip.load_tokenizer(folder, 6)
    save_tokenizer(folder, eos_token=None)
    with pytest.raises(ValueError, match="has no end-of-sequence token"):
        siglip.load_tokenizer(folder, 6)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(OSError, match="the tokenizer of .* cannot be read .*download it again") as error:
        siglip.load_tokenizer(folder, 6)
    assert "\n" not in str(error.value)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(OSError, match=r"has no tokenizer \(tokenizer.json, spiece.model, tokenizer.model\)"):
        siglip.load_tokenizer(folder, 6)
