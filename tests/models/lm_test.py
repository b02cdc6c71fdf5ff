"""The language model against `transformers`, from committed references and live, its cache, and its folders."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.conftest import REFERENCE
from vqrae_jax.models import flat
from vqrae_jax.models.lm import LanguageModel, LMSpec, lm_work
from vqrae_jax.weights import qwen3

NAMES = ("qwen3", "qwen3_tied")  # the second is in shards


@functools.cache
def graphdef(spec: LMSpec, **options) -> nnx.GraphDef:
    # With dropout, which must do nothing without a key.
    return flat.split(nnx.eval_shape(lambda: LanguageModel(spec, dropout=0.2, rngs=nnx.Rngs(0), **options)))[0]


def load(folder: Path):
    spec = qwen3.read_lm_spec(folder)
    return graphdef(spec), {path: jnp.asarray(value) for path, value in qwen3.load_lm_params(folder, spec).items()}


@functools.partial(jax.jit, static_argnums=0)
def whole(graphdef, params, tokens) -> jax.Array:
    """The logits of whole sequences."""
    model = flat.merge(graphdef, params)
    return model.logits(model.hidden(tokens))


@functools.partial(jax.jit, static_argnums=0)
def step(graphdef, params, tokens, cache):
    model = flat.merge(graphdef, params)
    hidden, cache = model.step(tokens, cache, model.unstacked())
    return model.logits(hidden), cache


def by_steps(graphdef, params, tokens, *, prefix: int, size: int, pads=None) -> np.ndarray:
    """The logits of sequences of which the prefix comes at once and the rest token by token."""
    cache = flat.merge(graphdef, params).init_cache(len(tokens), size, pads)
    found = []
    for part in np.split(tokens, range(prefix, tokens.shape[1]), axis=1):
        logits, cache = step(graphdef, params, part, cache)
        found.append(logits)
    assert cache.length == tokens.shape[1]
    return np.concatenate(found, axis=1)


def assert_matches(folder: Path, expected) -> None:
    graphdef, params = load(folder)
    tokens, logits = expected["tokens"], expected["logits"]
    actual = whole(graphdef, params, tokens)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, logits, atol=1e-4, rtol=0)
    compiled = step._cache_size()
    stepwise = by_steps(graphdef, params, tokens, prefix=1, size=16)
    np.testing.assert_allclose(stepwise, logits, atol=1e-4, rtol=0)
    assert step._cache_size() <= compiled + 1, "a step is compiled anew at another position"


@pytest.mark.parametrize("name", NAMES)
def test_every_logit_matches_committed_pytorch_ones(name):
    expected = np.load(REFERENCE / name / "logits.npz")
    assert np.std(expected["logits"]) > 0.3
    assert_matches(REFERENCE / name, expected)


@pytest.fixture
def references():
    pytest.importorskip("torch", reason="live parity needs torch")
    from tests import make_lm_references
    return make_lm_references


@pytest.mark.parametrize("name", NAMES)
def test_every_logit_matches_live_pytorch(name, references, tmp_path):
    assert_matches(tmp_path, references.make_reference(name, folder=tmp_path, seed=100))


def test_padding_on_the_left_of_the_cache_is_as_padding_on_the_right():
    graphdef, params = load(REFERENCE / "qwen3")
    lengths = (3, 8)
    right, left = np.random.default_rng(0).integers(0, 40, (2, 2, 11))
    for row, length in enumerate(lengths):
        left[row, 11 - length:] = right[row, :length]
    expected = whole(graphdef, params, right)
    actual = by_steps(graphdef, params, left, prefix=5, size=16, pads=np.array([8, 3]))
    assert np.isfinite(actual).all()
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(actual[row, 11 - length:], expected[row, :length], atol=1e-5)


def test_embeddings_may_stand_for_tokens():
    graphdef, params = load(REFERENCE / "qwen3_tied")
    expected = np.load(REFERENCE / "qwen3_tied" / "logits.npz")
    embeddings = flat.merge(graphdef, params).embed(expected["tokens"])
    np.testing.assert_allclose(whole(graphdef, params, embeddings), expected["logits"], atol=1e-4)


def test_more_tokens_than_positions_are_an_error():
    model = flat.merge(*load(REFERENCE / "qwen3"))
    for call in (lambda: model.hidden(np.zeros((1, 65), int)), lambda: model.init_cache(1, 65),
                 lambda: model.enlarge(model.init_cache(1, 60), 5)):
        with pytest.raises(ValueError, match="65 tokens are more than the 64 positions that the language model has"):
            call()


def test_dropout_is_that_of_its_key():
    graphdef, params = load(REFERENCE / "qwen3")
    tokens = np.load(REFERENCE / "qwen3" / "logits.npz")["tokens"]
    hidden = jax.jit(lambda seed: flat.merge(graphdef, params).hidden(tokens, rng=jax.random.key(seed)))
    first, again, other = (hidden(seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.mean(np.abs(first - other)) > 0.1


def test_bfloat16_gives_float32_logits_near_those_of_float32():
    folder = REFERENCE / "qwen3_tied"
    spec, (_, params) = qwen3.read_lm_spec(folder), load(folder)
    expected = np.load(folder / "logits.npz")
    actual = whole(graphdef(spec, dtype=jnp.bfloat16), params, expected["tokens"])
    assert actual.dtype == np.float32
    assert 0.01 < np.abs(actual - expected["logits"]).max() < 0.1 * np.std(expected["logits"])


def test_operations_are_those_of_the_kernels():
    spec = qwen3.read_lm_spec(REFERENCE / "qwen3")
    kernels = sum(value.size for path, value in load(REFERENCE / "qwen3")[1].items() if path.endswith("kernel"))
    assert lm_work(spec, 1, predicted=1) == (2 * kernels, 4 * spec.depth * spec.heads * spec.head_dim)
    assert lm_work(spec, 3, predicted=3).weightless == 6 * lm_work(spec, 1, predicted=1).weightless


@pytest.fixture
def folder(tmp_path) -> Path:
    """A private copy, to be damaged."""
    return Path(shutil.copytree(REFERENCE / "qwen3", tmp_path / "qwen3"))


def edit_tensors(folder: Path, **tensors) -> None:
    """Replaces tensors of model.safetensors; None removes one."""
    file = folder / "model.safetensors"
    edited = load_file(file) | {name.replace("/", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in edited.items() if tensor is not None}, file)


@pytest.mark.parametrize("options, message", [
    ({"model_type": "qwen2"}, "config.json: model_type='qwen2' is not supported, only qwen3$"),
    ({"attention_bias": True}, "attention_bias=True is not supported, only False$"),
    ({"use_sliding_window": True}, "use_sliding_window=True is not supported, only False$"),
    ({"layer_types": ["sliding_attention"] * 3}, "layer_types is not supported, only full_attention in all 3 layers$"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'$"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.factor is not supported, only rope_theta$"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type='yarn' is not supported, only 'default'$"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, not 1$"),
    ({"num_key_value_heads": 3},
     "num_attention_heads, num_key_value_heads and head_dim: heads 4 is not divisible by kv_heads 3$"),
    ({"head_dim": 5}, "and head_dim: rotary positions need an even head_dim, not 5$"),
    ({"head_dim": 2.5}, "config.json: head_dim must be a whole number between 1 and 4096, not 2.5$"),
])
def test_what_a_config_asks_for_in_vain_is_named(folder, options, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | options))
    with pytest.raises(ValueError, match=message):
        qwen3.read_lm_spec(folder)


def test_older_configs_say_the_base_of_positions_elsewhere(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    for options, theta in (({"rope_theta": 1000000, "rope_scaling": None}, 1e6), ({}, 1e4)):
        (folder / "config.json").write_text(json.dumps(config | options))
        assert qwen3.read_lm_spec(folder).rope_theta == theta


@pytest.mark.parametrize("tensors, message", [
    ({"model/layers/1/mlp/up_proj/weight": None},
     "tensor model.layers.1.mlp.up_proj.weight is missing, which Qwen3ForCausalLM has$"),
    ({"lm_head/weight": None}, "tensor lm_head.weight is missing, which Qwen3ForCausalLM has$"),
    ({"model/layers/3/mlp/up_proj/weight": np.zeros((28, 24), np.float32)},
     "model.safetensors: tensor model.layers.3.mlp.up_proj.weight is unexpected: Qwen3ForCausalLM does not have it$"),
    ({"model/norm/weight": np.zeros(23, np.float32)},
     r"tensor model.norm.weight has shape \(23,\), but config.json implies \(24,\)$"),
])
def test_tensors_that_do_not_fit_are_named(folder, tensors, message):
    edit_tensors(folder, **tensors)
    with pytest.raises(ValueError, match=message):
        qwen3.load_lm_params(folder, qwen3.read_lm_spec(folder))


def test_a_damaged_or_missing_file_is_named(tmp_path):
    folder = Path(shutil.copytree(REFERENCE / "qwen3_tied", tmp_path / "shards"))
    spec, file = qwen3.read_lm_spec(folder), sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(OSError, match=f"{file.name} is damaged or truncated .*: download it again$"):
        qwen3.load_lm_params(folder, spec)
    file.unlink()
    with pytest.raises(OSError, match=f"{file.name} does not exist$"):
        qwen3.load_lm_params(folder, spec)


def test_the_copy_that_tied_folders_may_hold_is_not_read(folder):
    spec = dataclasses.replace(qwen3.read_lm_spec(folder), tied=True)
    assert "head/kernel" not in qwen3.load_lm_params(folder, spec)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_is_the_same_bit_by_bit(name, tmp_path):
    spec = qwen3.read_lm_spec(REFERENCE / name)
    params = qwen3.load_lm_params(REFERENCE / name, spec)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        qwen3.save_lm(tmp_path / "saved", spec, params, dtype)
        assert qwen3.read_lm_spec(tmp_path / "saved") == spec
        saved = qwen3.load_lm_params(tmp_path / "saved", spec)
        assert saved.keys() == params.keys()
        for path, value in params.items():
            np.testing.assert_array_equal(saved[path], value.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("edit, message", [
    (lambda params: params.pop("norm/scale"), "parameter norm/scale is missing: cannot save a Qwen3ForCausalLM"),
    (lambda params: params.update(extra=np.zeros(1)), "parameter extra is unknown: cannot save a Qwen3ForCausalLM"),
    (lambda params: params.update({"norm/scale": np.zeros(1)}),
     r"parameter norm/scale has shape \(1,\), but spec implies \(24,\)"),
])
def test_what_cannot_be_saved_is_named(edit, message, tmp_path):
    spec = qwen3.read_lm_spec(REFERENCE / "qwen3")
    params = qwen3.load_lm_params(REFERENCE / "qwen3", spec)
    edit(params)
    with pytest.raises(ValueError, match=message):
        qwen3.save_lm(tmp_path, spec, params, np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_what_was_extended_and_saved(name, references, tmp_path):
    spec = qwen3.read_lm_spec(REFERENCE / name)
    params, spec = qwen3.extend_vocabulary(qwen3.load_lm_params(REFERENCE / name, spec), spec, 3, init="normal", seed=0)
    qwen3.save_lm(tmp_path, spec, params, np.float32)
    tokens = np.array([[0, 41, 39, 40, 42, 7]])
    np.testing.assert_allclose(whole(graphdef(spec), params, tokens), references.torch_logits(tmp_path, tokens),
                               atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_new_tokens_begin_as_the_mean_or_at_random_and_old_ones_stay(name):
    spec = qwen3.read_lm_spec(REFERENCE / name)
    params = qwen3.load_lm_params(REFERENCE / name, spec)
    mean, extended = qwen3.extend_vocabulary(params, spec, 300, init="mean", seed=0)
    normal, _ = qwen3.extend_vocabulary(params, spec, 300, init="normal", seed=0)
    again, _ = qwen3.extend_vocabulary(params, spec, 300, init="normal", seed=0)
    other, _ = qwen3.extend_vocabulary(params, spec, 300, init="normal", seed=1)
    assert extended == dataclasses.replace(spec, vocabulary=340)
    of_tokens = {"token_embedding": lambda x: x} | ({} if spec.tied else {"head/kernel": lambda x: x.T})
    for path, value in params.items():
        if path not in of_tokens:
            assert mean[path] is value
            continue
        old, by_mean, by_normal = (of_tokens[path](arrays[path]) for arrays in (params, mean, normal))
        assert by_mean.shape == (340, 24) and by_mean.dtype == np.float32
        np.testing.assert_array_equal(by_mean[:40], old)
        np.testing.assert_array_equal(by_normal[:40], old)
        np.testing.assert_allclose(by_mean[40:], np.tile(old.mean(axis=0), (300, 1)), atol=1e-6)
        assert abs(by_normal[40:].mean()) < 1e-3 and by_normal[40:].std() == pytest.approx(0.02, rel=0.05)
        np.testing.assert_array_equal(again[path], normal[path])
        assert not np.array_equal(other[path], normal[path])
    with pytest.raises(ValueError, match="init 'zero' is unknown: use mean or normal"):
        qwen3.extend_vocabulary(params, spec, 1, init="zero", seed=0)  # pyright: ignore[reportArgumentType]
