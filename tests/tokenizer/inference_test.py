"""The whole model: codes to pixels round trips, latents' shapes, decoders."""

import os
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from PIL import Image

import vqrae_jax
from tests.conftest import REPOSITORY
from tests.tiny import Run
from vqrae_jax import config as config_lib
from vqrae_jax.data import BadImages, eval_batches, open_source
from vqrae_jax.models import flat
from vqrae_jax.models.decoder import VIT_B, VIT_L, VIT_XL, Decoder, sincos_positions
from vqrae_jax.models.vit import patchify, unpatchify
from vqrae_jax.tokenizer import build, inference, init, runs
from vqrae_jax.training import sharding

QUANTIZERS = {
    "simvq": {"kind": "simvq"},
    "simvq_cosine": {"kind": "simvq", "search": "cosine", "input_projection": True},
    "simvq_projected_rotation": {"kind": "simvq", "dim": 24, "gradient": "rotation"},
    "ema": {"kind": "ema"},
    "ema_projected": {"kind": "ema", "projection": True},
    "fsq": {"kind": "fsq", "levels": (4, 4, 2), "size": 32, "dim": 3},
    "adapter_fsq": {"kind": "adapter_fsq", "levels": (4, 4, 2), "size": 32, "dim": 3},
    "simvq_l2": {"kind": "simvq", "l2_normalize": True, "input_projection": True},
    "ranked": {"kind": "ranked"},
}


def random_model(config):
    """Structure, parameters and buffers of a config's model."""
    structure = build.structure(config)
    return structure, *init.model_arrays(config, structure, sharding.one_device())


def tokenizer(config) -> inference.Tokenizer:
    config = config_lib.parse(config)
    structure, params, buffers = random_model(config)
    return inference.Tokenizer(config, structure.graphdef, {**params, **buffers})


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_model_works_inside_a_mesh_of_the_users(kind, tiny_config, images):
    model = tokenizer(tiny_config)
    expected = np.asarray(model.reconstruct(images))
    with jax.set_mesh(jax.make_mesh((1,), ("users",), (getattr(AxisType, kind),))):
        np.testing.assert_array_equal(model.reconstruct(images), expected)


def test_a_model_works_inside_shard_map(tiny_config, images):
    model = tokenizer(tiny_config)
    mesh, split = jax.make_mesh((1,), ("users",), (AxisType.Auto,)), PartitionSpec("users")
    mapped = jax.shard_map(model.features, mesh=mesh, in_specs=split, out_specs=split)
    chex.assert_trees_all_close(mapped(images), model.features(images), atol=1e-6)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_codes_to_pixels_is_the_reconstruction_bit_for_bit(quantizer, tiny_config, images):
    tiny_config.model.quantizer.update(QUANTIZERS[quantizer])
    model = tokenizer(tiny_config)
    z_q, codes = model.encode(images)
    chex.assert_shape(codes, (3, 4, 4))
    chex.assert_type(codes, np.int32)
    chex.assert_shape(z_q, (3, 4, 4, 32))
    assert len(np.unique(codes)) > 1
    reconstruction = np.asarray(model.reconstruct(images))
    chex.assert_shape(reconstruction, (3, 32, 32, 3))
    assert reconstruction.min() >= 0
    assert reconstruction.max() <= 1
    np.testing.assert_array_equal(model.encode_to_indices(images), codes)
    np.testing.assert_array_equal(reconstruction, model.decode_from_indices(codes))
    np.testing.assert_array_equal(reconstruction, model.decode(z_q))
    # Tokens may come as a sequence, too, and other codes give another picture.
    np.testing.assert_array_equal(reconstruction, model.decode_from_indices(np.reshape(codes, (3, 16))))
    np.testing.assert_array_equal(reconstruction, model.decode(np.reshape(z_q, (3, 16, 32))))
    assert np.abs(reconstruction - model.decode_from_indices((np.asarray(codes) + 1) % 32)).max() > 1e-3


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_training_sees_what_decoding_shows(quantizer, tiny_config, images):
    """The straight-through output of the training pass holds the values that `lookup` gives, exactly."""
    tiny_config.model.quantizer.update(QUANTIZERS[quantizer])
    config = config_lib.parse(tiny_config)
    structure, params, buffers = random_model(config)
    model = flat.merge(structure.graphdef, params, buffers)
    output = model(images, train=True)
    np.testing.assert_array_equal(output.quantized.z_q, model.lookup(output.quantized.indices))


def test_wrong_input_is_named(tiny_config, images):
    model = tokenizer(tiny_config)
    codes = np.asarray(model.encode_to_indices(images))
    for wrong, at in ((32, (0, 1, 2)), (-1, (2, 3, 3))):
        broken = codes.copy()
        broken[at] = wrong
        with pytest.raises(ValueError, match=f"code {wrong} at .* is out of range: this model has codes 0 to 31") as e:
            model.decode_from_indices(broken)
        assert str(at) in str(e.value)
    with pytest.raises(ValueError, match="codes must be integers, not float32"):
        model.decode_from_indices(codes.astype(np.float32))
    with pytest.raises(ValueError, match=r"codes must be \[B, 4, 4\] or \[B, 16\]"):
        model.decode_from_indices(codes[:, :3])
    with pytest.raises(ValueError, match=r"not \(3, 2, 8\)"):
        model.decode_from_indices(codes.reshape(3, 2, 8))
    chex.assert_shape(model.decode_from_indices(codes[:0]), (0, 32, 32, 3))
    with pytest.raises(ValueError, match=r"images must be \[B, 32, 32, 3\], not \(3, 16, 32, 3\)"):
        model.features(images[:, ::2])
    with pytest.raises(ValueError, match="float in .* or uint8, not int32"):
        model.features(images.astype(np.int32))


@pytest.mark.parametrize(("change", "says"), [
    (lambda x: x * 255, "between 0 and 255: divide by 255"), (lambda x: x * 2 - 1, "between -1 and 1"),
    (lambda x: x + 0.01, "between 0.01 and 1.01"), (lambda x: x / (x > 0.5), "between nan and nan"),
    (lambda x: np.where(x > 0.999, np.inf, x), "and inf")])
def test_float_images_beyond_their_range_are_refused(change, says, tiny_config):
    model = tokenizer(tiny_config)
    images = np.linspace(0, 1, 2 * 32 * 32 * 3, dtype=np.float32).reshape(2, 32, 32, 3)
    with np.errstate(all="ignore"):
        wrong = change(images)
    for method in (model.features, model.encode, model.encode_to_indices, model.reconstruct):
        with pytest.raises(ValueError, match=says):
            method(wrong)
    model.features(images * 1.0005 - 0.0002)  # rounding
    chex.assert_shape(model.features(images[:0]), (0, 16, 32))


def test_methods_work_inside_transformations_of_the_users(tiny_config, images):
    """And where values are not known there is nothing to check."""
    model = tokenizer(tiny_config)
    x = images.astype(np.float32) / 255
    codes = model.encode_to_indices(x)
    np.testing.assert_array_equal(jax.jit(model.encode_to_indices)(x), codes)
    jax.jit(model.features)(255 * x)
    for method, argument in ((model.features, x), (model.features, images), (model.reconstruct, x),
                             (model.decode_from_indices, codes)):
        chex.assert_trees_all_close(jax.jit(method)(argument), method(argument), atol=1e-5)
    with pytest.raises(ValueError, match=r"codes must be \[B, 4, 4\] or \[B, 16\]"):
        jax.jit(model.decode_from_indices)(codes[:, :2])
    for method in (model.features, model.reconstruct):  # the latter through the codes, straight through
        gradient = jax.grad(lambda x, method=method: (method(x) ** 2).mean())(x)
        assert np.isfinite(gradient).all() and np.any(gradient)
    of_latents = jax.jit(jax.grad(lambda z: model.decode(z).mean()))(model.encode(x)[0])
    assert np.isfinite(of_latents).all() and np.any(of_latents)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_codebook_holds_what_codes_stand_for(quantizer, tiny_config, images):
    tiny_config.model.quantizer.update(QUANTIZERS[quantizer])
    model = tokenizer(tiny_config)
    z_q, codes = model.encode(images)
    codebook = model.codebook()
    chex.assert_shape(codebook, (32, 32))
    chex.assert_type(codebook, np.float32)
    np.testing.assert_allclose(codebook[codes], z_q, atol=1e-5)
    certain = jax.nn.one_hot(codes, 32)
    loss = lambda probabilities: model.decode(probabilities @ codebook).mean()
    np.testing.assert_allclose(loss(certain), model.reconstruct(images).mean(), rtol=1e-4)
    assert np.any(jax.grad(loss)(certain))


def test_there_is_no_codebook_of_no_codes_and_of_too_many(tiny_config):
    tiny_config.model.quantizer.kind = "none"
    with pytest.raises(ValueError, match="this model has no codes"):
        tokenizer(tiny_config).codebook()
    tiny_config.model.quantizer.update(kind="fsq", levels=(128, 128, 128), size=128**3, dim=3)
    with pytest.raises(ValueError, match="this model has 2097152 codes, too many to list"):
        tokenizer(tiny_config).codebook()


def test_images_are_read_as_evaluation_reads_them(tmp_path):
    noise = np.random.default_rng(0)
    for i, size in enumerate(((40, 70, 3), (64, 33, 3), (32, 32, 4))):
        Image.fromarray(noise.integers(0, 256, size, np.uint8)).save(tmp_path / f"{i}.png")
    files = sorted(tmp_path.iterdir())
    source = open_source(f"folder:{tmp_path}", training=False)
    batch, = eval_batches(source, image_size=32, batch_size=3, bad_images=BadImages(None),
                          max_bad=0.0, threads=1)
    images = vqrae_jax.read_images(files, 32)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, batch["image"])
    for one in (files[1], str(files[1]), [str(files[1])]):
        np.testing.assert_array_equal(vqrae_jax.read_images(one, 32), images[1:2])
    np.testing.assert_array_equal(vqrae_jax.read_images(iter(files), 32), images)
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"/text.jpg: not a readable image"):
        vqrae_jax.read_images([files[0], tmp_path / "text.jpg"], 32)
    with pytest.raises(FileNotFoundError, match=r"gone.jpg"):
        vqrae_jax.read_images(tmp_path / "gone.jpg", 32)
    with pytest.raises(ValueError, match="no images given"):
        vqrae_jax.read_images([], 32)


def test_the_encoder_that_ships_is_loaded_by_its_name():
    encoder = vqrae_jax.load_encoder("nano")
    chex.assert_shape(encoder(np.zeros((1, 64, 64, 3), np.uint8)), (1, 64, 192))


def test_importing_and_loading_say_nothing(tiny_config, tmp_path):
    """Not even a warning of another library, in a process of its own that shows them all."""
    config = config_lib.parse(tiny_config)
    run = Run(config)
    runs.write_run(tmp_path, config, run.params, run.buffers)
    program = (f"import vqrae_jax; vqrae_jax.load({str(tmp_path)!r}).codebook(); "
               "vqrae_jax.load_encoder('nano')")
    result = subprocess.run([sys.executable, "-W", "always", "-c", program], cwd=REPOSITORY, capture_output=True,
                            text=True, timeout=300, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_uint8_and_float_images_are_the_same(tiny_config, images):
    model = tokenizer(tiny_config)
    as_float = images.astype(np.float32) / 255
    np.testing.assert_allclose(model.features(images), model.features(as_float), atol=1e-5)
    chex.assert_shape(model.features(images), (3, 16, 32))


def test_output_resolution_follows_the_decoder_patch(tiny_config, images):
    """A 24-pixel input of 9 tokens becomes a 36-pixel output when each token is 12 pixels wide."""
    tiny_config.data.image_size = 36
    tiny_config.model.encoder.input_size = 24
    with pytest.raises(ValueError, match="config key model.decoder.patch_size 8 times 3 tokens a side gives 24"):
        tokenizer(tiny_config)
    tiny_config.model.decoder.patch_size = 12
    model = tokenizer(tiny_config)
    images = np.random.default_rng(0).random((2, 36, 36, 3), np.float32)
    chex.assert_shape(model.encode_to_indices(images), (2, 3, 3))
    chex.assert_shape(model.reconstruct(images), (2, 36, 36, 3))


@pytest.mark.parametrize(("spec", "millions"), [(VIT_B, 86.2), (VIT_L, 304.1), (VIT_XL, 414.7)])
def test_rae_decoder_sizes(spec, millions):
    make = lambda: Decoder(spec, latent_width=768, grid=16, patch_size=16, mean=(0.5,) * 3, std=(0.5,) * 3,
                           cls_token=True, rngs=nnx.Rngs(0))
    _, params, _ = flat.split(nnx.eval_shape(make))
    count = sum(value.size for value in params.values())
    pytest.importorskip("torch", reason="counts torch's own decoder: pip install torch")
    from torch import device
    from transformers import ViTMAEConfig
    from transformers.models.vit_mae.modeling_vit_mae import ViTMAEDecoder

    with device("meta"):
        torch_decoder = ViTMAEDecoder(ViTMAEConfig(
            hidden_size=768, decoder_hidden_size=spec.width, decoder_num_hidden_layers=spec.depth,
            decoder_num_attention_heads=spec.heads, decoder_intermediate_size=spec.mlp_dim, patch_size=16), 256)
    # MAE's decoder has a mask token where RAE's has a cls token, and both have fixed positions.
    expected = sum(p.numel() for name, p in torch_decoder.named_parameters() if name != "decoder_pos_embed")
    assert count == expected
    assert count == pytest.approx(millions * 1e6, rel=0.01)


def test_sincos_positions_are_maes():
    """Against numbers worked out by hand from the formula: width 8 has two frequencies, 1 and 1/100."""
    positions = sincos_positions(8, 3)
    row, column = 2, 1
    angles = lambda x: [np.sin(x), np.sin(x / 100), np.cos(x), np.cos(x / 100)]
    np.testing.assert_allclose(positions[row * 3 + column], angles(column) + angles(row), rtol=1e-6)
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        sincos_positions(6, 3)


def test_patches_are_row_column_channel():
    image = np.arange(4 * 4 * 3).reshape(1, 4, 4, 3)
    patches = np.asarray(patchify(jax.numpy.asarray(image), 2))
    np.testing.assert_array_equal(patches[0, 1], image[0, :2, 2:].reshape(-1))
    np.testing.assert_array_equal(unpatchify(patches, (2, 2)), image)


def test_bfloat16_computes_in_bfloat16_and_searches_in_float32(tiny_config, images):
    full = tokenizer(tiny_config)
    tiny_config.model.dtype = "bfloat16"
    half = tokenizer(tiny_config)
    features = np.asarray(half.features(images))
    assert features.dtype == np.float32
    difference = np.abs(features - full.features(images)).max()
    assert 1e-4 < difference < 0.2
    chex.assert_type(half.reconstruct(images), np.float32)


def test_latent_statistics_scale_what_is_handed_out_and_not_the_picture(tiny_config, images):
    plain = tokenizer(tiny_config)
    tiny_config.model.latent_statistics = True
    config = config_lib.parse(tiny_config)
    structure, params, buffers = random_model(config)
    rng = np.random.default_rng(0)
    mean, var = rng.normal(size=(16, 32)).astype(np.float32), rng.uniform(0.5, 2, (16, 32)).astype(np.float32)
    arrays = {**params, **buffers, "latent_mean": mean, "latent_var": var}
    model = inference.Tokenizer(config, structure.graphdef, arrays)
    z_q, codes = model.encode(images)
    expected = (np.asarray(plain.encode(images)[0]).reshape(3, 16, 32) - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(np.reshape(z_q, (3, 16, 32)), expected, atol=1e-5)
    np.testing.assert_array_equal(codes, plain.encode_to_indices(images))
    np.testing.assert_allclose(model.reconstruct(images), plain.reconstruct(images), atol=1e-5)
    np.testing.assert_array_equal(model.reconstruct(images), model.decode_from_indices(codes))


def test_learned_positions_start_as_the_fixed_ones(tiny_config, images):
    fixed = tokenizer(tiny_config).reconstruct(images)
    tiny_config.model.decoder.learned_positions = True
    params = build.structure(config_lib.parse(tiny_config)).params
    assert params["decoder/position_embedding"].shape == (16, 32)
    np.testing.assert_allclose(tokenizer(tiny_config).reconstruct(images), fixed, atol=1e-6)


def test_noise_is_for_training_only_and_scales_with_tau(tiny_config, images):
    tiny_config.model.quantizer.kind = "none"
    tiny_config.model.noise_tau = 0.8
    config = config_lib.parse(tiny_config)
    structure, params, buffers = random_model(config)
    model = flat.merge(structure.graphdef, params, buffers)
    many = np.concatenate([images] * 20)
    noise = np.asarray((out := model(many, train=True, rng=jax.random.key(0))).quantized.z_q - out.features)
    level = noise.std(axis=(1, 2))
    assert 0 < level.min() < 0.2  # a level of its own for each image, uniform in [0, 0.8)
    assert 0.6 < level.max() < 0.85
    np.testing.assert_array_equal((out := model(images, train=False)).quantized.z_q, out.features)
    with pytest.raises(ValueError, match="needs a key"):
        model(images, train=True)


def test_features_of_several_layers_side_by_side(tiny_config, images):
    tiny_config.model.encoder.update(layers=(1, 2), combine="concat")
    tiny_config.model.quantizer.dim = 16
    model = tokenizer(tiny_config)
    chex.assert_shape(model.features(images), (3, 16, 64))
    chex.assert_shape(model.encode(images)[0], (3, 4, 4, 64))
    chex.assert_shape(model.reconstruct(images), (3, 32, 32, 3))
