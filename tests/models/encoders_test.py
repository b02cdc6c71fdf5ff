"""Encoders against PyTorch `transformers`: from committed references, and live with fresh weights where torch is."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests.conftest import REFERENCE
from vqrae_jax.models import flat
from vqrae_jax.models.encoders import Encoder, interpolate_positions, resize_bicubic, resize_bicubic_8bit
from vqrae_jax.weights import huggingface

FINAL_NORM = ("siglip_vision", "siglip", "dinov2", "dinov2_with_registers", "vit_mae", "siglip_so400m", "dinov3_vit")
NAMES = (*FINAL_NORM, "intern_vit")


def reference_images() -> np.ndarray:
    return np.float32(np.load(REFERENCE / "images.npy")) / 255


def features(encoder: Encoder, images: np.ndarray) -> jax.Array:
    return _features(*nnx.split(encoder), images)


@functools.partial(jax.jit, static_argnums=0)
def _features(graphdef, state, images):  # compiled once for each architecture, however many tests use it
    return nnx.merge(graphdef, state)(images)


def assert_tokens_match(folder: Path, expected: dict[str, np.ndarray]) -> None:
    """Compares every token at every size and final LayerNorm in `expected` ("<final_norm>_<image_size>")."""
    for key, tokens in expected.items():
        final_norm, image_size = key.split("_")
        encoder = huggingface.build_encoder(folder, image_size=int(image_size), final_norm=final_norm)
        actual = features(encoder, reference_images())
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, tokens, atol=1e-4, rtol=0, err_msg=f"{folder.name} {key}")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A private copy of a small SigLIP folder, to be damaged."""
    return Path(shutil.copytree(REFERENCE / "siglip_vision", tmp_path / "siglip"))


@pytest.fixture
def references():
    pytest.importorskip("torch", reason="live parity needs torch")
    from tests import make_encoder_references
    return make_encoder_references


def edit_config(folder: Path, **options) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | options))


def edit_tensors(folder: Path, **tensors) -> None:
    """Replaces tensors of model.safetensors; None removes one."""
    file = folder / "model.safetensors"
    edited = load_file(file) | {name.replace("/", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in edited.items() if tensor is not None}, file)


@pytest.mark.parametrize("name", NAMES)
def test_every_token_matches_committed_pytorch_tokens(name):
    assert_tokens_match(REFERENCE / name, np.load(REFERENCE / name / "tokens.npz"))


@pytest.mark.parametrize("name", NAMES)
def test_every_token_matches_live_pytorch(name, references, tmp_path):
    tokens = references.make_reference(name, images=reference_images(), folder=tmp_path / name, seed=100)
    native, larger, smaller = references.CASES[name][1]
    keys = (f"plain_{larger}", f"affine_{smaller}") if name in FINAL_NORM else (f"affine_{native}", f"affine_{smaller}")
    assert_tokens_match(tmp_path / name, {key: tokens[key] for key in keys})


@pytest.mark.parametrize("name", ["siglip_vision", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit_mae",
                                  "intern_vit"])
def test_hidden_layers_match_live_pytorch(name, references):
    spec = huggingface.read_encoder_spec(REFERENCE / name)
    # Some of these folders hold a whole model, whose head PyTorch needs as well.
    model = references.load_model(REFERENCE / name)
    states = references.torch_layers(model, reference_images(), spec.image_size)
    assert len(states) == spec.vit.depth + 1
    layers = (1, spec.vit.depth)
    encoder = huggingface.build_encoder(REFERENCE / name, layers=layers, combine="concat")
    expected = np.concatenate([states[layer] for layer in layers], axis=-1)
    assert encoder.width == expected.shape[-1]
    np.testing.assert_allclose(features(encoder, reference_images()), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["dinov3_vit", "intern_vit"])
def test_features_of_a_layer_are_those_of_an_encoder_that_ends_there(name):
    spec = huggingface.read_encoder_spec(REFERENCE / name)
    graphdef, _, _ = flat.split(nnx.eval_shape(lambda: Encoder(
        dataclasses.replace(spec.vit, depth=1), image_size=spec.image_size, mean=spec.mean, std=spec.std,
        rngs=nnx.Rngs(0))))
    params = huggingface.load_encoder_params(REFERENCE / name)
    params = {path: jnp.asarray(value[:1] if "/blocks/" in path else value) for path, value in params.items()}
    images, layers = reference_images(), (1, spec.vit.depth)
    first = features(flat.merge(graphdef, params), images)
    last = features(huggingface.build_encoder(REFERENCE / name), images)
    concatenated = huggingface.build_encoder(REFERENCE / name, layers=layers, combine="concat")
    assert concatenated.width == 2 * spec.vit.width
    np.testing.assert_allclose(features(concatenated, images), np.concatenate([first, last], axis=-1), atol=1e-5)
    added = huggingface.build_encoder(REFERENCE / name, layers=layers)
    assert added.width == spec.vit.width
    np.testing.assert_allclose(features(added, images), first + last, atol=1e-5)


@pytest.mark.parametrize("options, message", [
    ({"layers": (0, 3)}, r"layers \(0, 3\) must ascend within 1 and 3"),
    ({"layers": (4,)}, r"layers \(4,\) must ascend within 1 and 3"),
    ({"layers": (2, 1)}, r"layers \(2, 1\) must ascend"),
    ({"layers": (2, 2)}, r"layers \(2, 2\) must ascend"),
    ({"layers": (1, 2), "combine": "mean"}, "combine 'mean' is unknown: use sum or concat"),
])
def test_layers_that_cannot_be_had_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        huggingface.build_encoder(REFERENCE / "siglip_vision", **options)


@pytest.mark.parametrize("size", [32, 45, 100])
def test_images_are_resized_as_torch_does(size):
    torch = pytest.importorskip("torch")
    images = np.random.default_rng(0).uniform(size=(2, 45, 45, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(images).permute(0, 3, 1, 2), (size, size),
                                               mode="bicubic", align_corners=False, antialias=False)
    np.testing.assert_allclose(resize_bicubic(images, size), expected.permute(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize("shape, size", [((45, 45), 45), ((45, 45), 32), ((64, 64), 224), ((61, 130), 56)])
def test_8_bit_images_are_resized_bit_for_bit_as_pillow_does(shape, size):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    edges = np.where(rng.random((2, *shape, 3)) < 0.5, 0, 255).astype(np.uint8)  # overshoots
    images = np.concatenate([noise, edges])
    expected = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in images]
    resized = resize_bicubic_8bit(images, size)
    assert resized.dtype == jnp.float32
    np.testing.assert_array_equal(np.rint(np.asarray(resized) * 255), np.stack(expected))
    floats = np.float32(images) / 255 + rng.uniform(-0.4, 0.4, images.shape).astype(np.float32) / 255
    np.testing.assert_array_equal(resize_bicubic_8bit(floats, size), resized)
    floats[1, 3, 4, 0], floats[2, 0, 0, 1] = np.nan, np.inf
    np.testing.assert_array_equal(np.isnan(resize_bicubic_8bit(floats, size)).all(axis=(1, 2, 3)),
                                  [False, True, True, False])


def embeddings(encoder: Encoder, images: np.ndarray, pool=None) -> np.ndarray:
    graphdef, state = nnx.split(encoder)
    return np.asarray(jax.jit(lambda state: nnx.merge(graphdef, state).embedding(jnp.asarray(images), pool))(state))


def test_class_tokens_match_committed_pytorch_ones():
    references = np.load(REFERENCE / "embeddings.npz")
    images = np.load(REFERENCE / "images.npy")
    assert len(references) == 5
    for key, expected in references.items():
        name, image_size = key.rsplit("_", 1)
        encoder = huggingface.build_encoder(REFERENCE / name, image_size=int(image_size))
        actual = embeddings(encoder, images)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0, err_msg=key)
        np.testing.assert_array_equal(embeddings(encoder, np.float32(images) / 255), actual)


@pytest.mark.parametrize("name", ["dinov2", "dinov3_vit"])
def test_class_tokens_match_live_pytorch(name, references, tmp_path):
    images, size = np.load(REFERENCE / "images.npy"), references.CASES[name][1][1]
    references.make_reference(name, images=reference_images(), folder=tmp_path / name, seed=7)
    expected = references.torch_cls(references.load_model(tmp_path / name), images, size)
    encoder = huggingface.build_encoder(tmp_path / name, image_size=size)
    np.testing.assert_allclose(embeddings(encoder, images), expected, atol=1e-4, rtol=0)


def test_the_mean_embedding_is_that_of_the_features_where_nothing_is_resized():
    images = np.load(REFERENCE / "images.npy")[:, :40, :40]
    for name, default in {"siglip_vision": "mean", "dinov2_with_registers": "cls"}.items():
        encoder = huggingface.build_encoder(REFERENCE / name)
        mean = embeddings(encoder, images, "mean")
        np.testing.assert_allclose(mean, features(encoder, images).mean(axis=1), atol=1e-6)
        np.testing.assert_array_equal(embeddings(encoder, images), embeddings(encoder, images, default))
        assert default == "mean" or not np.allclose(embeddings(encoder, images), mean, atol=0.1)


def test_a_pooling_that_cannot_be_had_is_named():
    encoder = huggingface.build_encoder(REFERENCE / "siglip_vision")
    with pytest.raises(ValueError, match="pool 'cls' cannot apply: this encoder has no class token; use 'mean'"):
        encoder.embedding(reference_images(), "cls")
    with pytest.raises(ValueError, match="pool 'max' is unknown: use cls or mean"):
        encoder.embedding(reference_images(), "max")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("grid", [16, 37, 45])
def test_positions_are_interpolated_as_torch_does(grid, antialias):
    torch = pytest.importorskip("torch")
    positions = np.random.default_rng(0).normal(size=(37 * 37, 8)).astype(np.float32)
    square = torch.from_numpy(positions).reshape(1, 37, 37, 8).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(square, (grid, grid), mode="bicubic", align_corners=False,
                                               antialias=antialias)
    actual = interpolate_positions(positions, grid, antialias=antialias)
    # float32 sample coordinates of a 37-wide table are good to about 1e-6 of a cell.
    np.testing.assert_allclose(actual, expected.permute(0, 2, 3, 1).reshape(-1, 8), atol=2e-5)


def test_uint8_images_of_another_size_and_shape_are_accepted():
    encoder = huggingface.build_encoder(REFERENCE / "siglip_vision", dtype=jnp.bfloat16)
    images = np.load(REFERENCE / "images.npy")[:, :33]
    tokens = features(encoder, images)
    assert tokens.shape == (2, encoder.grid**2, encoder.width) == (2, 25, 32) and tokens.dtype == jnp.float32
    np.testing.assert_allclose(tokens, features(encoder, images.astype(np.float32) / 255), atol=0.05)  # bfloat16


@pytest.mark.parametrize("registers", [0, 7])
def test_number_of_registers_comes_from_the_config(registers, references, tmp_path):
    import transformers
    model = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(
        **references.SMALL, mlp_ratio=1, num_register_tokens=registers))
    references.randomize(model, seed=registers)
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": references.MEAN, "image_std": references.STD}))
    assert_tokens_match(tmp_path, {"affine_40": references.torch_tokens(model, reference_images(), 40)})


def test_registers_missing_from_the_config_or_miscounted_are_errors(tmp_path):
    folder = Path(shutil.copytree(REFERENCE / "dinov2_with_registers", tmp_path / "dino"))
    edit_config(folder, num_register_tokens=4)
    with pytest.raises(ValueError, match=r"embeddings.register_tokens has shape \(1, 3, 32\).*\(1, 4, 32\)"):
        huggingface.load_encoder_params(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["num_register_tokens"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json: option num_register_tokens is missing"):
        huggingface.read_encoder_spec(folder)


@pytest.mark.parametrize("name, final_norm", [(name, "affine") for name in NAMES] +
                         [("siglip_vision", "plain"), ("dinov3_vit", "plain")])
def test_saving_and_loading_is_exact(name, final_norm, tmp_path):
    spec = huggingface.read_encoder_spec(REFERENCE / name)
    params = huggingface.load_encoder_params(REFERENCE / name, final_norm=final_norm)
    huggingface.save_encoder(params, spec=spec, out_dir=tmp_path)
    assert huggingface.read_encoder_spec(tmp_path) == spec
    again = huggingface.load_encoder_params(tmp_path, final_norm=final_norm)
    assert again.keys() == params.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)
    if final_norm == "plain":
        norm = huggingface.load_encoder_params(tmp_path)
        assert (norm["vit/transformer/norm/scale"] == 1).all() and (norm["vit/transformer/norm/bias"] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_what_we_save(name, references, tmp_path):
    spec = dataclasses.replace(huggingface.read_encoder_spec(REFERENCE / name),
                               image_size=references.CASES[name][1][1])  # a run at another size than the source's
    params = huggingface.load_encoder_params(REFERENCE / name, image_size=spec.image_size)
    huggingface.save_encoder(params, spec=spec, out_dir=tmp_path)
    model = references.load_model(tmp_path)
    assert_tokens_match(tmp_path, {
        f"affine_{spec.image_size}": references.torch_tokens(model, reference_images(), spec.image_size)})


def test_saving_names_the_parameter_that_does_not_fit(tmp_path):
    spec = huggingface.read_encoder_spec(REFERENCE / "vit_mae")
    params = huggingface.load_encoder_params(REFERENCE / "vit_mae")
    with pytest.raises(ValueError, match="vit/prefix is missing"):
        huggingface.save_encoder({k: v for k, v in params.items() if k != "vit/prefix"}, spec=spec, out_dir=tmp_path)
    with pytest.raises(ValueError, match="decoder/kernel is unknown"):
        huggingface.save_encoder(params | {"decoder/kernel": np.zeros(3)}, spec=spec, out_dir=tmp_path)
    with pytest.raises(ValueError, match=r"vit/prefix has shape \(5, 32\), but spec implies \(1, 32\)"):
        huggingface.save_encoder(params | {"vit/prefix": np.zeros((5, 32))}, spec=spec, out_dir=tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_loaded_paths_and_shapes_are_those_of_the_module(name):
    spec = huggingface.read_encoder_spec(REFERENCE / name)
    final_norm = "plain" if name in FINAL_NORM else "affine"
    encoder = nnx.eval_shape(lambda: Encoder(spec.vit, image_size=spec.image_size, mean=spec.mean, std=spec.std,
                                             final_norm=final_norm, rngs=nnx.Rngs(0)))
    expected = {"/".join(path): variable.shape for path, variable in nnx.to_flat_state(nnx.state(encoder))}
    params = huggingface.load_encoder_params(REFERENCE / name, final_norm=final_norm)
    assert not any(path.startswith("vit/transformer/norm") for path in params)
    assert {path: value.shape for path, value in params.items()} == expected
    assert "vit/transformer/blocks/attention/qkv/kernel" in params
    assert all(type(value) is np.ndarray and value.dtype == np.float32 for value in params.values())


def test_mean_and_std_come_from_the_folder_or_else_the_family(folder):
    assert huggingface.read_encoder_spec(folder).std == (0.3, 0.2, 0.25)
    file = folder / "preprocessor_config.json"
    file.write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    with pytest.raises(ValueError, match="preprocessor_config.json: option image_std is missing"):
        huggingface.read_encoder_spec(folder)
    file.unlink()
    assert huggingface.read_encoder_spec(folder).mean == (0.5, 0.5, 0.5)


def test_sharded_and_bfloat16_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, shard in enumerate([names[::2], names[1::2]]):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name].astype(ml_dtypes.bfloat16) for name in shard}, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    params = huggingface.load_encoder_params(folder)
    for path, value in huggingface.load_encoder_params(REFERENCE / "siglip_vision").items():
        np.testing.assert_array_equal(params[path], value.astype(ml_dtypes.bfloat16).astype(np.float32), err_msg=path)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(OSError, match="model-00002-of-00002.safetensors does not exist"):
        huggingface.load_encoder_params(folder)


@pytest.mark.parametrize("tensors, message", [
    ({"post_layernorm/weight": None}, "tensor post_layernorm.weight is missing, which SiglipVisionModel has$"),
    ({"post_layernorm/weight": None, "post_layernorm/bias": None},
     "post_layernorm.bias is missing, which SiglipVisionModel has, and 1 more"),
    ({"encoder/layers/3/mlp/fc1/bias": np.zeros(48, np.float32)},
     r"tensor .*encoder.layers.3.mlp.fc1.bias is unexpected"),
    ({"post_layernorm/bias": np.zeros(31, np.float32)}, r"post_layernorm.bias has shape \(31,\).*implies \(32,\)"),
])
def test_tensors_that_do_not_fit_are_named(folder, tensors, message):
    edit_tensors(folder, **tensors)
    with pytest.raises(ValueError, match=message):
        huggingface.load_encoder_params(folder)


def test_damaged_or_unreadable_files_are_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OSError, match="model.safetensors is damaged or truncated"):
        huggingface.load_encoder_params(folder)
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="model.safetensors does not exist; pytorch_model.bin is a pickle.*save"):
        huggingface.load_encoder_params(folder)
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        huggingface.read_encoder_spec(folder)
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match="config.json does not exist"):
        huggingface.read_encoder_spec(folder)


WRONG = [3, 0, -1, 2.5, 1e300, 1099511627776, float("nan"), "x", "", None, True, [], [3], {}, {"a": 1}]


@pytest.mark.parametrize("name", NAMES)
def test_whatever_a_foreign_file_says_is_a_model_or_an_error_of_one_line(name, tmp_path):
    """Every option with every kind of mistake."""
    folder = Path(shutil.copytree(REFERENCE / name, tmp_path / name))
    defaults = huggingface.FAMILIES[huggingface.read_encoder_spec(folder).model_type].defaults
    refused = set()
    for file in (folder / "config.json", folder / "preprocessor_config.json"):
        original = json.loads(file.read_text()) if file.exists() else {"image_mean": [0] * 3, "image_std": [1] * 3}
        more = defaults if file.name == "config.json" else ()
        for option in {*original, *original.get("vision_config", {}), *more}:
            for value in WRONG:
                edited = json.loads(json.dumps(original))
                inside = edited["vision_config"] if option not in edited and "vision_config" in edited else edited
                inside[option] = value
                file.write_text(json.dumps(edited))
                try:
                    huggingface.read_encoder_spec(folder)
                except ValueError as error:
                    assert str(error).startswith(f"{file}: ") and option in str(error) and "\n" not in str(error)
                    assert len(str(error)) < len(str(file)) + 300
                    refused.add(option)
        file.write_text(json.dumps(original))
    assert refused >= {*defaults, "model_type", "image_mean", "image_std"}


@pytest.mark.parametrize(("file", "content", "says"), [
    ("preprocessor_config.json", '{"image_mean": 3, "image_std": [1, 1, 1]}',
     "image_mean must be a list of 3 numbers between 0 and 1, not 3"),
    ("preprocessor_config.json", '{"image_mean": [0, 0, 0], "image_std": [1, 1, 0]}',
     "image_std must be a list of 3 numbers between 0.001 and 10, not [1, 1, 0]"),
    ("config.json", {"layer_norm_eps": "x"}, "layer_norm_eps must be a number between 0 and 1, not 'x'"),
    ("config.json", {"layer_norm_eps": -1e-6}, "layer_norm_eps must be a number between 0 and 1, not -1e-06"),
    ("config.json", {"num_hidden_layers": 1099511627776},
     "num_hidden_layers must be a whole number between 1 and 1024, not 1099511627776"),
    ("config.json", {"hidden_size": 0}, "hidden_size must be a whole number between 1 and 65536, not 0"),
    ("config.json", {"hidden_size": [32]}, "hidden_size must be a whole number between 1 and 65536, not [32]"),
    ("config.json", {"intermediate_size": None},
     "intermediate_size must be a whole number between 1 and 262144, not None"),
    ("config.json", {"hidden_act": ["gelu"]}, "hidden_act=['gelu'] is not supported, only gelu, gelu_pytorch_tanh"),
    ("config.json", {"patch_size": [8, 8, 8]}, "patch_size must be a whole number between 1 and 1024, not [8, 8, 8]"),
    ("config.json", {"patch_size": 41}, "patch_size 41 is larger than image_size 40"),
    ("config.json", {"num_attention_heads": 5},
     "hidden_size and num_attention_heads: width 32 is not divisible by heads 5"),
    ("config.json", {"model_type": {}}, "model_type={} is not supported, only siglip, "),
    ("config.json", '{"model_type": "siglip", "vision_config": 3}', "vision_config must be a JSON object, not 3"),
    ("config.json", '{"model_type": "siglip", "vision_config": {"hidden_size": "wide"}}',
     "vision_config.hidden_size must be a whole number between 1 and 65536, not 'wide'"),
    ("config.json", "[1, 2]", "must hold a JSON object, not [1, 2]"),
    ("config.json", "null", "must hold a JSON object, not None"),
    ("config.json", b'{"model_type": "\xff\xfe"}', "is not valid JSON"),
    ("config.json", "[" * 100_000, "is not valid JSON"),
    ("model.safetensors.index.json", '{"weight_map": ["a"]}', "weight_map must be a JSON object, not ['a']"),
    ("model.safetensors.index.json", '{"weight_map": {"a": 3}}', "weight_map.a must be a string, not 3"),
])
def test_foreign_files_of_other_types_and_sizes_are_named(folder, file, content, says):
    if isinstance(content, dict):
        edit_config(folder, **content)
    else:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        huggingface.load_encoder_params(folder)
    assert str(error.value).startswith(f"{folder / file}")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, options, message", [
    ("dinov2", {"use_swiglu_ffn": True}, "config.json: use_swiglu_ffn=True is not supported"),
    ("vit_mae", {"qkv_bias": False}, "config.json: qkv_bias=False is not supported"),
    ("dinov2", {"hidden_act": "relu"}, "config.json: hidden_act='relu' is not supported"),
    ("dinov2", {"image_size": [35, 42]}, r"config.json: image_size=\[35, 42\] is not supported, only squares"),
    ("siglip", {"model_type": "siglip2"}, "config.json: model_type='siglip2' is not supported"),
    ("dinov3_vit", {"use_gated_mlp": True}, "config.json: use_gated_mlp=True is not supported"),
    ("dinov3_vit", {"key_bias": True}, "config.json: key_bias=True is not supported, only False"),
    ("dinov3_vit", {"mlp_bias": False}, "config.json: mlp_bias=False is not supported, only True"),
    ("intern_vit", {"qk_normalization": True}, "config.json: qk_normalization=True is not supported"),
    ("intern_vit", {"norm_type": "rms_norm"}, "config.json: norm_type='rms_norm' is not supported"),
    ("intern_vit", {"qkv_bias": False}, "config.json: qkv_bias=False is not supported"),
])
def test_unsupported_options_are_named(name, options, message, tmp_path):
    folder = Path(shutil.copytree(REFERENCE / name, tmp_path / name))
    edit_config(folder, **options)
    with pytest.raises(ValueError, match=message):
        huggingface.read_encoder_spec(folder)


def test_image_size_that_the_patch_does_not_divide(folder):
    with pytest.raises(ValueError, match="image_size 44 is not a multiple of the encoder's patch size 8: use image_"
                                         "size=40 or 48"):
        huggingface.build_encoder(folder, image_size=44)


def test_published_size_that_the_patch_does_not_divide(folder):
    """As siglip-so400m-patch14-384: 27 x 27 positions, the last pixels unused by the original."""
    edit_config(folder, image_size=44)
    tokens = np.load(folder / "tokens.npz")
    assert_tokens_match(folder, {"affine_40": tokens["affine_40"]})
    encoder, images = huggingface.build_encoder(folder), reference_images()
    assert (encoder.image_size, encoder.grid) == (44, 5)
    same_pixels = features(huggingface.build_encoder(folder, image_size=40), images[:, :40, :40])
    np.testing.assert_array_equal(features(encoder, images), same_pixels)
    with pytest.raises(ValueError, match="image_size 45 is not a multiple.*use image_size=40 or 48"):
        huggingface.build_encoder(folder, image_size=45)


def test_dinov3_has_no_key_bias_that_could_learn(tmp_path):
    folder = Path(shutil.copytree(REFERENCE / "dinov3_vit", tmp_path / "dinov3"))
    params = huggingface.load_encoder_params(folder)
    attention = "vit/transformer/blocks/attention/"
    assert {path: value.shape for path, value in params.items() if path.startswith(attention + "q")} == \
        {attention + "qkv/kernel": (2, 24, 72), attention + "query_value_bias": (2, 48)}
    assert "vit/position_embedding" not in params
    edit_tensors(folder, **{"layer/0/attention/k_proj/bias": np.ones(24, np.float32)})
    with pytest.raises(ValueError, match="tensor layer.0.attention.k_proj.bias is unexpected"):
        huggingface.load_encoder_params(folder)


def test_dinov3_layers_under_either_name(tmp_path):
    """The hub's files say `layer.0`, the modules of newer transformers `model.layer.0`."""
    folder = Path(shutil.copytree(REFERENCE / "dinov3_vit", tmp_path / "dinov3"))
    tensors = load_file(folder / "model.safetensors")
    assert "layer.0.attention.q_proj.weight" in tensors and "norm.weight" in tensors
    save_file({"model." * name.startswith("layer") + name: tensor for name, tensor in tensors.items()},
              folder / "model.safetensors")
    params = huggingface.load_encoder_params(folder)
    for path, value in huggingface.load_encoder_params(REFERENCE / "dinov3_vit").items():
        np.testing.assert_array_equal(params[path], value, err_msg=path)


def test_rotary_positions_need_a_head_width_that_is_a_multiple_of_4(tmp_path):
    folder = Path(shutil.copytree(REFERENCE / "dinov3_vit", tmp_path / "dinov3"))
    edit_config(folder, num_attention_heads=4)
    with pytest.raises(ValueError, match="a head width that is a multiple of 4, not 6"):
        huggingface.read_encoder_spec(folder)


def test_intern_vit_has_no_final_norm_to_make_plain():
    for load in (huggingface.build_encoder, huggingface.load_encoder_params):
        with pytest.raises(ValueError, match="'plain' cannot apply: this encoder has no final LayerNorm; use 'affine'"):
            load(REFERENCE / "intern_vit", final_norm="plain")


def test_intern_vit_inside_a_chat_model(tmp_path):
    folder = Path(shutil.copytree(REFERENCE / "intern_vit", tmp_path / "chat"))
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}  # as on the hub
    others = {name: np.zeros(3, np.float32) for name in ("language_model.model.norm.weight", "mlp1.0.weight")}
    save_file({f"vision_model.{name}": tensor for name, tensor in tensors.items()} | others,
              folder / "model.safetensors")
    vision = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "internvl_chat", "vision_config": vision}))
    assert huggingface.read_encoder_spec(folder) == huggingface.read_encoder_spec(REFERENCE / "intern_vit")
    assert_tokens_match(folder, np.load(folder / "tokens.npz"))
    (folder / "preprocessor_config.json").unlink()
    assert huggingface.read_encoder_spec(folder).mean == huggingface.IMAGENET_MEAN
    # A config that says nothing means the 6B model.
    (folder / "config.json").write_text('{"model_type": "internvl_chat"}')
    with pytest.raises(ValueError, match="qkv_bias=False is not supported"):
        huggingface.read_encoder_spec(folder)


def test_saved_intern_vit_refers_to_the_code_on_the_hub(tmp_path):
    spec = huggingface.read_encoder_spec(REFERENCE / "intern_vit")
    huggingface.save_encoder(huggingface.load_encoder_params(REFERENCE / "intern_vit"), spec=spec, out_dir=tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    code = "OpenGVLab/InternViT-300M-448px--"
    assert config["auto_map"] == {"AutoConfig": code + "configuration_intern_vit.InternVisionConfig",
                                  "AutoModel": code + "modeling_intern_vit.InternVisionModel"}
    original = load_file(REFERENCE / "intern_vit/model.safetensors")
    assert {name: tensor.shape for name, tensor in load_file(tmp_path / "model.safetensors").items()} == \
        {name: tensor.shape for name, tensor in original.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_written_by_torch(dtype, folder):
    torch = pytest.importorskip("torch", reason="writes the file")
    from safetensors import torch as safetensors_torch
    file = folder / "model.safetensors"
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in safetensors_torch.load_file(file).items()}
    safetensors_torch.save_file(tensors, file)
    params = huggingface.load_encoder_params(folder)
    rounded = tensors["post_layernorm.weight"].float().numpy()
    np.testing.assert_array_equal(params["vit/transformer/norm/scale"], rounded)
    assert {value.dtype for value in params.values()} == {np.dtype(np.float32)}


def test_hub_model_without_a_network_is_a_one_line_error(monkeypatch):
    def offline(repo_id, **options):
        raise ConnectionError("no route to host\nlong explanation")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(OSError, match="some/model is not a folder.*give the local folder") as error:
        huggingface.build_encoder("some/model")
    assert "\n" not in str(error.value)


def test_reading_the_spec_from_the_hub_asks_for_no_weights(monkeypatch):
    asked = []
    def download(repo_id, *, allow_patterns, local_files_only):
        assert not local_files_only
        asked.append(allow_patterns)
        return str(REFERENCE / "dinov2")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    huggingface.read_encoder_spec("some/model")
    assert not any("safetensors" in pattern for pattern in asked[0])
    huggingface.load_encoder_params("some/model")
    assert "model.safetensors" in asked[1]


@pytest.mark.parametrize("model_type", sorted(huggingface.FAMILIES.keys() - {"intern_vit_6b"}))  # not in transformers
def test_defaults_are_those_of_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type)
    for option, value in huggingface.FAMILIES[model_type].defaults.items():
        assert getattr(config, option) == value, option


_SO400M = {"model_type": "siglip_vision_model", "hidden_size": 1152, "num_hidden_layers": 27,
           "num_attention_heads": 16, "intermediate_size": 4304}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}

# What the hub's config.json say, tokens per side at the native size, and the number of parameters.
PUBLISHED = {
    "siglip-large-patch16-384": (
        _LARGE | {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 16}, 24, 303_688_704),
    "siglip-so400m-patch14-384": (_SO400M | {"image_size": 384, "patch_size": 14}, 27, 412_987_248),
    "siglip2-so400m-patch16-256": (_SO400M | {"image_size": 256, "patch_size": 16}, 16, 412_649_712),
    "siglip2-so400m-patch16-512": (_SO400M | {"image_size": 512, "patch_size": 16}, 32, 413_534_448),
    "dinov3-vitl16-pretrain-lvd1689m": (
        _LARGE | {"model_type": "dinov3_vit", "image_size": 224, "patch_size": 16, "num_register_tokens": 4,
                  "rope_theta": 100.0, "layer_norm_eps": 1e-5, "key_bias": False}, 14, 303_128_576),
    "InternViT-300M-448px": (
        _LARGE | {"model_type": "intern_vit_6b", "image_size": 448, "patch_size": 14, "qkv_bias": True,
                  "qk_normalization": False, "norm_type": "layer_norm", "layer_norm_eps": 1e-6}, 32, 304_011_264),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_encoders_have_as_many_tokens_and_parameters_as_the_originals(name, tmp_path):
    config, grid, parameters = PUBLISHED[name]
    assert published_encoder(config, tmp_path) == (grid, parameters)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_encoders_have_as_many_parameters_as_pytorch(name, references):
    import torch
    import transformers
    config, _, parameters = PUBLISHED[name]
    options = {name: value for name, value in config.items() if name != "model_type"}
    with torch.device("meta"):
        if config["model_type"] == "siglip_vision_model":
            model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**options, vision_use_head=False))
        elif config["model_type"] == "dinov3_vit":
            model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**options))
        else:
            model = references.InternViT(**options)
    # We have neither the token that stands for masked patches, nor a cls token apart from its position.
    unused = {"dinov3_vit": 1, "intern_vit_6b": 1, "siglip_vision_model": 0}[config["model_type"]]
    count = sum(parameter.numel() for parameter in model.parameters()) - unused * config["hidden_size"]
    assert count == parameters


def published_encoder(config: dict, folder: Path) -> tuple[int, int]:
    """(tokens per side, parameters) at the native size."""
    (folder / "config.json").write_text(json.dumps(config))
    spec = huggingface.read_encoder_spec(folder)
    encoder = nnx.eval_shape(lambda: Encoder(spec.vit, image_size=spec.image_size, mean=spec.mean, std=spec.std,
                                             rngs=nnx.Rngs(0)))
    return encoder.grid, sum(leaf.size for leaf in jax.tree.leaves(nnx.state(encoder)))
