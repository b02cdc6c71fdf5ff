"""Encoders against PyTorch `transformers`: from committed references, and live with fresh weights where torch is."""

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

from vqrae_jax.convert import huggingface
from vqrae_jax.models.encoders import Encoder, interpolate_positions, resize_bicubic
from vqrae_jax.models.vit import ViTSpec

REFERENCE = Path(__file__).parent / "reference"
NAMES = ("siglip_vision", "siglip", "dinov2", "dinov2_with_registers", "vit_mae")
SIGLIP_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
                "image_size": 384, "patch_size": 16}


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
    from . import make_encoder_references
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
    _, larger, smaller = references.CASES[name][1]
    assert_tokens_match(tmp_path / name, {key: tokens[key] for key in (f"plain_{larger}", f"affine_{smaller}")})


@pytest.mark.parametrize("size", [32, 45, 100])
def test_images_are_resized_as_torch_does(size):
    torch = pytest.importorskip("torch")
    images = np.random.default_rng(0).uniform(size=(2, 45, 45, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(images).permute(0, 3, 1, 2), (size, size),
                                               mode="bicubic", align_corners=False, antialias=False)
    np.testing.assert_allclose(resize_bicubic(images, size), expected.permute(0, 2, 3, 1), atol=1e-5)


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


@pytest.mark.parametrize("name, final_norm", [(name, "affine") for name in NAMES] + [("siglip_vision", "plain")])
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
    import transformers
    spec = dataclasses.replace(huggingface.read_encoder_spec(REFERENCE / name),
                               image_size=references.CASES[name][1][1])  # a run at another size than the source's
    params = huggingface.load_encoder_params(REFERENCE / name, image_size=spec.image_size)
    huggingface.save_encoder(params, spec=spec, out_dir=tmp_path)
    model_class = getattr(transformers, huggingface.FAMILIES[spec.model_type].architecture)
    options = {"mask_ratio": 0.0} if name == "vit_mae" else {}
    model, info = model_class.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert set(info["missing_keys"]) <= {"embeddings.mask_token"}  # unused in inference
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
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
    encoder = nnx.eval_shape(lambda: Encoder(spec.vit, image_size=spec.image_size, mean=spec.mean, std=spec.std,
                                             final_norm="plain", rngs=nnx.Rngs(0)))
    expected = {"/".join(path): variable.shape for path, variable in nnx.to_flat_state(nnx.state(encoder))}
    params = huggingface.load_encoder_params(REFERENCE / name, final_norm="plain")
    assert {path: value.shape for path, value in params.items()} == expected
    assert "vit/transformer/blocks/attention/qkv/kernel" in params
    assert all(type(value) is np.ndarray and value.dtype == np.float32 for value in params.values())


def test_mean_and_std_come_from_the_folder_or_else_the_family(folder):
    assert huggingface.read_encoder_spec(folder).std == (0.3, 0.2, 0.25)
    file = folder / "preprocessor_config.json"
    file.write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    with pytest.raises(ValueError, match="preprocessor_config.json: image_std must be a list of 3 numbers"):
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
    ({"post_layernorm/weight": None}, "tensor post_layernorm.weight is missing$"),
    ({"post_layernorm/weight": None, "post_layernorm/bias": None}, "post_layernorm.bias is missing, and 1 more"),
    ({"encoder/layers/3/mlp/fc1/bias": np.zeros(48, np.float32)}, "unexpected tensor encoder.layers.3.mlp.fc1.bias"),
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


@pytest.mark.parametrize("name, options, message", [
    ("dinov2", {"use_swiglu_ffn": True}, "config.json: use_swiglu_ffn=True is not supported"),
    ("vit_mae", {"qkv_bias": False}, "config.json: qkv_bias=False is not supported"),
    ("dinov2", {"hidden_act": "relu"}, "config.json: hidden_act='relu' is not supported"),
    ("dinov2", {"image_size": [35, 42]}, r"config.json: image_size=\[35, 42\] is not supported, only squares"),
    ("siglip", {"model_type": "siglip2"}, "config.json: model_type 'siglip2' is not supported"),
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
    assert huggingface.read_encoder_spec(folder).image_size == 44
    with pytest.raises(ValueError, match="image_size 44 is not a multiple"):
        huggingface.build_encoder(folder)
    tokens = np.load(folder / "tokens.npz")
    assert_tokens_match(folder, {"affine_40": tokens["affine_40"]})


def test_hub_model_without_a_network_is_a_one_line_error(monkeypatch):
    def offline(repo_id, **options):
        raise ConnectionError("no route to host\nlong explanation")
    monkeypatch.setattr(huggingface, "snapshot_download", offline)
    with pytest.raises(OSError, match="some/model is not a folder.*give the local folder") as error:
        huggingface.build_encoder("some/model")
    assert "\n" not in str(error.value)


def test_reading_the_spec_from_the_hub_asks_for_no_weights(monkeypatch):
    asked = []
    def download(repo_id, *, allow_patterns):
        asked.append(allow_patterns)
        return str(REFERENCE / "dinov2")
    monkeypatch.setattr(huggingface, "snapshot_download", download)
    huggingface.read_encoder_spec("some/model")
    assert not any("safetensors" in pattern for pattern in asked[0])
    huggingface.load_encoder_params("some/model")
    assert "model.safetensors" in asked[1]


@pytest.mark.parametrize("model_type", huggingface.FAMILIES)
def test_defaults_are_those_of_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type)
    for option, value in huggingface.FAMILIES[model_type].defaults.items():
        assert getattr(config, option) == value, option


def siglip_large_parameters() -> int:
    spec = ViTSpec(width=1024, depth=24, heads=16, mlp_dim=4096, activation="gelu_tanh", patch_size=16)
    encoder = nnx.eval_shape(lambda: Encoder(spec, image_size=384, mean=(0.5,) * 3, std=(0.5,) * 3, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(encoder)))


def test_siglip_large_has_as_many_parameters_as_the_original():
    assert siglip_large_parameters() == 303_688_704


def test_siglip_large_has_as_many_parameters_as_pytorch():
    torch = pytest.importorskip("torch")
    import transformers
    with torch.device("meta"):
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP_LARGE, vision_use_head=False))
    assert siglip_large_parameters() == sum(parameter.numel() for parameter in model.parameters())
