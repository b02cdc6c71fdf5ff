"""Checkpoints of the PyTorch system in, Hugging Face folders out.

The PyTorch model is written down here once more, in NumPy and float64, over tensors by its names: quantizers, latent
statistics and decoder. Its encoders are `transformers`' where PyTorch is installed; without it, tokens come from
`load_encoder`, which tests/encoders_test.py compares with PyTorch's.
"""

import dataclasses
import functools
import json
import logging
import os
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.special import erf

import vqrae_jax
from tests.conftest import REFERENCE
from tests.verbs import command
from vqrae_jax import config as config_lib
from vqrae_jax.models import flat
from vqrae_jax.tokenizer import build, convert, runs
from vqrae_jax.training import sharding
from vqrae_jax.weights import huggingface, pytorch

SIGLIP = REFERENCE / "siglip_vision"
MEAN, STD = np.array([0.4, 0.5, 0.6]), np.array([0.3, 0.2, 0.25])  # of the reference folders
GRID, HEADS, DEPTH, CODES = 4, 2, 2, 24
WIDTH, DECODER_WIDTH, MLP = 32, 16, 24
LEVELS = (4, 3, 5)


def sincos(width: int, grid: int) -> np.ndarray:
    """MAE's fixed positions, with a row of zeros for cls: columns first, sines before cosines."""
    rows = [np.zeros(width)]
    omega = [1 / 10000 ** (i / (width / 4)) for i in range(width // 4)]
    for row in range(grid):
        for column in range(grid):
            rows.append([f(x * o) for x in (column, row) for f in (np.sin, np.cos) for o in omega])
    return np.array(rows)


class Torch:
    """Random tensors with the names and shapes of the PyTorch system."""

    def __init__(self, seed: int = 0, width: int = WIDTH):
        self.rng, self.width, self.tensors = np.random.default_rng(seed), width, {}

    def add(self, name: str, *shape: int, scale: float = 1.0, offset: float = 0.0) -> np.ndarray:
        self.tensors[name] = np.float32(offset + scale * self.rng.normal(size=shape))
        return self.tensors[name]

    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool = True, gain: float = 1.0) -> None:
        self.add(f"{name}.weight", outputs, inputs, scale=gain * inputs**-0.5)
        if bias:
            self.add(f"{name}.bias", outputs, scale=0.3)

    def norm(self, name: str, width: int) -> None:
        self.add(f"{name}.weight", width, scale=0.3, offset=1)
        self.add(f"{name}.bias", width, scale=0.3)

    def decoder(self, prefix: str = "decoder.", *, patch_size: int = 8, fixed_positions: bool = False) -> None:
        w = DECODER_WIDTH
        self.linear(prefix + "decoder_embed", self.width, w)
        self.add(prefix + "decoder_pos_embed", 1, GRID**2 + 1, w)
        if fixed_positions:
            self.tensors[prefix + "decoder_pos_embed"] = np.float32(sincos(w, GRID)[None])
        self.add(prefix + "trainable_cls_token", 1, 1, w)
        for i in range(DEPTH):
            block = f"{prefix}decoder_layers.{i}."
            for name in ("query", "key", "value"):
                self.linear(f"{block}attention.attention.{name}", w, w)
            self.linear(block + "attention.output.dense", w, w)
            self.linear(block + "intermediate.dense", w, MLP)
            self.linear(block + "output.dense", MLP, w)
            self.norm(block + "layernorm_before", w)
            self.norm(block + "layernorm_after", w)
        self.norm(prefix + "decoder_norm", w)
        self.linear(prefix + "decoder_pred", w, 3 * patch_size**2, gain=0.5)

    def ema_vq(self) -> None:
        self.add("quantizer.embedding", CODES, self.width)
        self.add("quantizer.ema_w", CODES, self.width)
        counts = np.abs(self.add("quantizer.ema_cluster_size", CODES, scale=20))
        self.tensors["quantizer.ema_cluster_size"] = counts * (np.arange(CODES) % 3 > 0)

    def simvq(self, *, z_proj: bool = True) -> None:
        self.add("quantizer.embedding.weight", CODES, self.width, scale=self.width**-0.5)
        self.add("quantizer.ema_cluster_size", CODES)
        self.add("quantizer.l2_norm_scale", offset=10)
        self.linear("quantizer.embedding_proj", self.width, self.width, gain=self.width**0.5)
        if z_proj:
            self.linear("quantizer.z_proj", self.width, self.width)

    def old_simvq(self) -> None:
        self.add("quantizer.embedding", CODES, self.width)
        self.add("quantizer.ema_w", CODES, self.width)
        self.add("quantizer.ema_cluster_size", CODES)
        self.linear("quantizer.input_proj", self.width, self.width, bias=False)
        self.linear("quantizer.codebook_proj", self.width, self.width, bias=False)

    def fsq(self) -> None:
        half = (np.array(LEVELS) - 1) / 2
        grids = np.meshgrid(*(np.arange(level) - h for level, h in zip(LEVELS, half, strict=True)), indexing="ij")
        self.tensors |= {"quantizer.codebook": np.float32(np.stack([g.ravel() for g in grids], -1)),
                         "quantizer.basis": np.array([15, 5, 1]), "quantizer.scales": np.float32(half)}
        self.norm("fsq_projection.norm", self.width)
        self.linear("fsq_projection.net.0", self.width, 512)
        self.linear("fsq_projection.net.2", 512, 512)
        self.linear("fsq_projection.net.4", 512, len(LEVELS), gain=4)
        self.add("fsq_projection.post_gain", len(LEVELS), scale=0.3, offset=1.2)
        self.add("fsq_unprojection.fourier.B", len(LEVELS), 128, scale=10)
        self.linear("fsq_unprojection.mlp.0", 256, self.width)
        self.norm("fsq_unprojection.mlp.1", self.width)
        self.linear("fsq_unprojection.mlp.3", self.width, self.width)
        self.norm("fsq_unprojection.mlp.4", self.width)
        self.linear("fsq_unprojection.mlp.6", self.width, self.width)

    def statistics(self) -> dict[str, np.ndarray]:
        return {"mean": np.float32(self.rng.normal(size=(self.width, GRID, GRID))),
                "var": np.float32(self.rng.uniform(0.2, 3, (self.width, GRID, GRID)))}


# ---- the PyTorch system's forward pass

def linear(t, name, x):
    y = x @ np.float64(t[f"{name}.weight"]).T
    return y + t[f"{name}.bias"] if f"{name}.bias" in t else y


def layer_norm(t, name, x, eps):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * t[f"{name}.weight"] + t[f"{name}.bias"]


def gelu(x):
    return x * (1 + erf(x / 2**0.5)) / 2


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def nearest(z, codes):
    return ((z[..., None, :] - codes) ** 2).sum(-1).argmin(-1)


def quantize(t, z, *, l2: bool = True):
    """Tokens [B, N, d] -> what is decoded, [B, N, d], and indices [B, N] (None without a quantizer)."""
    if "quantizer.scales" in t:
        x = layer_norm(t, "fsq_projection.norm", z, 1e-5)
        x = gelu(linear(t, "fsq_projection.net.0", x))
        x = gelu(linear(t, "fsq_projection.net.2", x))
        x = np.tanh(linear(t, "fsq_projection.net.4", x)) * t["fsq_projection.post_gain"] * t["quantizer.scales"]
        digits = np.clip(np.round(x + t["quantizer.scales"]), 0, 2 * t["quantizer.scales"])
        phases = 2 * np.pi * (digits - t["quantizer.scales"]) @ np.float64(t["fsq_unprojection.fourier.B"])
        x = linear(t, "fsq_unprojection.mlp.0", np.concatenate([np.sin(phases), np.cos(phases)], -1))
        x = linear(t, "fsq_unprojection.mlp.3", gelu(layer_norm(t, "fsq_unprojection.mlp.1", x, 1e-5)))
        x = linear(t, "fsq_unprojection.mlp.6", gelu(layer_norm(t, "fsq_unprojection.mlp.4", x, 1e-5)))
        return x, np.int64(digits @ t["quantizer.basis"])
    if "quantizer.embedding.weight" in t:
        codes = linear(t, "quantizer.embedding_proj", t["quantizer.embedding.weight"])
        z = linear(t, "quantizer.z_proj", z) if "quantizer.z_proj.weight" in t else z
        if l2:
            codes, z = unit(codes), unit(z)
        indices = nearest(z, codes)
        return codes[indices], indices
    if "quantizer.input_proj.weight" in t:
        keys = unit(linear(t, "quantizer.codebook_proj", t["quantizer.embedding"]))
        indices = (unit(linear(t, "quantizer.input_proj", z)) @ keys.T).argmax(-1)
        return t["quantizer.embedding"][indices], indices
    if "quantizer.embedding" in t:
        indices = nearest(z, np.float64(t["quantizer.embedding"]))
        return t["quantizer.embedding"][indices], indices
    return z, None


def decode(t, z, prefix="decoder."):
    """[B, N, d] -> [B, H, W, 3]."""
    x = linear(t, prefix + "decoder_embed", z)
    cls = np.broadcast_to(t[prefix + "trainable_cls_token"], (len(x), 1, x.shape[-1]))
    x = np.concatenate([cls, x], axis=1) + t[prefix + "decoder_pos_embed"]
    heads = lambda y: y.reshape(*y.shape[:2], HEADS, -1).transpose(0, 2, 1, 3)
    for i in range(DEPTH):
        block = f"{prefix}decoder_layers.{i}."
        y = layer_norm(t, block + "layernorm_before", x, 1e-12)
        q, k, v = (heads(linear(t, f"{block}attention.attention.{name}", y)) for name in ("query", "key", "value"))
        weights = np.exp(q @ k.transpose(0, 1, 3, 2) / q.shape[-1] ** 0.5)
        y = (weights / weights.sum(-1, keepdims=True)) @ v
        x = x + linear(t, block + "attention.output.dense", y.transpose(0, 2, 1, 3).reshape(x.shape))
        y = gelu(linear(t, block + "intermediate.dense", layer_norm(t, block + "layernorm_after", x, 1e-12)))
        x = x + linear(t, block + "output.dense", y)
    x = linear(t, prefix + "decoder_pred", layer_norm(t, prefix + "decoder_norm", x, 1e-12))[:, 1:]
    p = round((x.shape[-1] / 3) ** 0.5)
    x = x.reshape(len(x), GRID, GRID, p, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(len(x), GRID * p, GRID * p, 3)
    return np.clip(x * STD + MEAN, 0, 1)


def assert_same(model, t, tokens, images, *, prefix="decoder.", statistics=None, l2=True):
    """Indices must be equal, latents and reconstructions agree to 1e-4, however they are asked for."""
    z_q, indices = quantize(t, np.float64(tokens), l2=l2)
    expected = decode(t, z_q, prefix)
    latents = z_q
    if statistics:
        mean, var = (np.broadcast_to(statistics[name], (z_q.shape[-1], GRID, GRID)) for name in ("mean", "var"))
        as_tokens = lambda x: x.reshape(len(x), -1).T
        latents = (z_q - as_tokens(mean)) / np.sqrt(as_tokens(var) + 1e-5)
    actual, actual_indices = model.encode(images)
    np.testing.assert_allclose(actual, latents.reshape(len(images), GRID, GRID, -1), atol=1e-4)
    np.testing.assert_allclose(model.reconstruct(images), expected, atol=1e-4)
    np.testing.assert_allclose(model.decode(actual), expected, atol=1e-4)
    assert expected.std() > 0.05
    if indices is not None:
        assert len(np.unique(indices)) > 3
        np.testing.assert_array_equal(np.reshape(actual_indices, indices.shape), indices)
        np.testing.assert_allclose(model.decode_from_indices(indices), expected, atol=1e-4)


# ---- files and models

def save(tensors: dict[str, np.ndarray], file: Path) -> Path:
    save_file({name: np.array(value, order="C") for name, value in tensors.items()}, file)
    return file


def from_torch(file: Path, workdir: Path, encoder: Path = SIGLIP, **options):
    convert.from_torch(file, workdir, encoder=str(encoder), decoder_heads=HEADS, **options)
    return vqrae_jax.load(workdir)


def read(file: Path, encoder: Path = SIGLIP, **options) -> pytorch.Imported:
    return pytorch.read_model(file, encoder=str(encoder), **{"decoder_heads": HEADS, **options})


def images(side: int) -> np.ndarray:
    return np.random.default_rng(1).random((2, side, side, 3), np.float32)


def tokens_of(folder: Path, x: np.ndarray, final_norm="plain", side: int = 32) -> np.ndarray:
    return np.asarray(vqrae_jax.load_encoder(folder, image_size=side, final_norm=final_norm)(x))


@pytest.fixture
def ema_file(tmp_path) -> Path:
    """A VQRAE with EMA VQ, as .safetensors."""
    model = Torch()
    model.decoder()
    model.ema_vq()
    return save(model.tensors, tmp_path / "model.safetensors")


FAMILIES = {
    "ema_vq": (lambda t: t.ema_vq(), {}),
    "simvq": (lambda t: t.simvq(), {}),
    "simvq_without_z_proj": (lambda t: t.simvq(z_proj=False), {}),
    "simvq_euclidean": (lambda t: t.simvq(), {"simvq_l2_norm": False}),
    "simvq_euclidean_without_z_proj": (lambda t: t.simvq(z_proj=False), {"simvq_l2_norm": False}),
    "old_simvq": (lambda t: t.old_simvq(), {}),
    "fsq": (lambda t: t.fsq(), {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_what_it_computed_in_pytorch(family, tmp_path):
    add, options = FAMILIES[family]
    model = Torch()
    model.decoder()
    add(model)
    ours = from_torch(save(model.tensors, tmp_path / "model.safetensors"), tmp_path / "run", **options)
    x = images(32)
    assert_same(ours, model.tensors, tokens_of(SIGLIP, x), x, l2=not options)
    assert ours.config.model.encoder.final_norm == "plain"
    assert ours.config.model.decoder.learned_positions


def test_latent_statistics_are_applied(tmp_path):
    """From a file, whole and broadcast, and from the checkpoint itself."""
    model = Torch()
    model.decoder()
    model.ema_vq()
    x = images(32)
    tokens = tokens_of(SIGLIP, x)
    statistics = model.statistics()
    file = save(model.tensors, tmp_path / "model.safetensors")
    ours = from_torch(file, tmp_path / "file", latent_statistics=save(statistics, tmp_path / "stats.safetensors"))
    assert_same(ours, model.tensors, tokens, x, statistics=statistics)

    inside = save(model.tensors | {"latent_mean": statistics["mean"], "latent_var": statistics["var"]},
                  tmp_path / "inside.safetensors")
    both = read(inside).buffers
    np.testing.assert_array_equal(both["latent_mean"], statistics["mean"].reshape(WIDTH, -1).T)
    np.testing.assert_array_equal(both["latent_var"], statistics["var"].reshape(WIDTH, -1).T)
    with pytest.raises(ValueError, match="latent statistics of its own"):
        read(inside, latent_statistics=tmp_path / "stats.safetensors")

    per_channel = save({"var": statistics["var"][None, :, :1, :1]}, tmp_path / "channel.safetensors")
    only_var = read(file, latent_statistics=per_channel).buffers
    np.testing.assert_array_equal(only_var["latent_mean"], np.zeros((GRID**2, WIDTH)))
    np.testing.assert_array_equal(only_var["latent_var"], np.tile(statistics["var"][:, 0, 0], (GRID**2, 1)))

    wrong = save({"mean": np.zeros((WIDTH, 5, 5), np.float32)}, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=r"wrong.safetensors: tensor mean has shape \(32, 5, 5\), which does not fit"):
        read(file, latent_statistics=wrong)
    with pytest.raises(ValueError, match="model.safetensors: unexpected tensor decoder.decoder_embed.bias: lat"):
        read(file, latent_statistics=file)


def test_an_rae_and_its_decoder_alone(tmp_path):
    """No quantizer; fixed positions; pixels of another size than the encoder's; the affine final norm by flag."""
    model = Torch()
    model.decoder("", patch_size=6, fixed_positions=True)
    x = images(24)
    tokens = tokens_of(SIGLIP, x, "affine")
    ours = from_torch(save(model.tensors, tmp_path / "decoder.safetensors"), tmp_path / "alone", encoder_norm="affine")
    assert_same(ours, model.tensors, tokens, x, prefix="")
    assert ours.image_size == 24
    assert not ours.config.model.decoder.learned_positions

    whole = {f"decoder.{name}": value for name, value in model.tensors.items()}
    imported = read(save(whole, tmp_path / "rae.safetensors"), encoder_norm="affine")
    alone = read(tmp_path / "decoder.safetensors", encoder_norm="affine")
    assert imported.params.keys() == alone.params.keys()
    for path, value in imported.params.items():
        np.testing.assert_array_equal(value, alone.params[path])


def test_the_position_of_cls_counts(tmp_path):
    """The decoder's positions begin with a row for cls, which is not always zero."""
    model = Torch()
    model.decoder("", fixed_positions=True)
    model.tensors["decoder_pos_embed"][0, 0] = 0.5
    imported = read(save(model.tensors, tmp_path / "m.safetensors"))
    np.testing.assert_allclose(imported.params["decoder/cls"], model.tensors["trainable_cls_token"][0] + 0.5)
    assert "decoder/position_embedding" not in imported.params


# ---- the encoder inside a checkpoint

# Of each family: what its wrapper puts before names, what the folder puts there, and the last LayerNorm.
WRAPPERS = {"siglip_vision": ("encoder.model.", "", "post_layernorm."),
            "dinov2_with_registers": ("encoder.encoder.", "", "layernorm."),
            "dinov3_vit": ("encoder.encoder.", "", "norm."), "vit_mae": ("encoder.model.", "vit.", "layernorm.")}


def stage_2(tmp_path, name: str = "siglip_vision", *, affine: bool) -> tuple[Torch, Path]:
    """A model whose encoder learned, and a Hugging Face folder that holds the same encoder."""
    folder = tmp_path / "learned"
    folder.mkdir()
    for file in ("config.json", "preprocessor_config.json"):
        (folder / file).write_bytes((REFERENCE / name / file).read_bytes())
    model = Torch(width=huggingface.read_encoder_spec(folder).vit.width)
    learned = {key: value + np.float32(0.02 * model.rng.normal(size=value.shape))
               for key, value in load_file(REFERENCE / name / "model.safetensors").items()}
    save(learned, folder / "model.safetensors")
    wrapper, prefix, norm = WRAPPERS[name]
    for key, value in learned.items():
        plain = key.removeprefix(prefix)
        if key.startswith(prefix) and (affine or not plain.startswith(norm)):
            model.tensors[wrapper + plain] = value
    model.decoder()
    model.simvq()
    return model, folder


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_learned_encoder_is_used(name, affine, tmp_path):
    model, learned = stage_2(tmp_path, name, affine=affine)
    file = save(model.tensors, tmp_path / "model.safetensors")
    final_norm, other = ("affine", "plain") if affine else ("plain", "affine")
    with pytest.raises(ValueError, match=f"--encoder-norm={other} contradicts .*model.safetensors"):
        read(file, REFERENCE / name, encoder_norm=other)
    imported = read(file, REFERENCE / name)
    assert imported.final_norm == final_norm
    expected = huggingface.load_encoder_params(learned, image_size=32, final_norm=final_norm)
    assert {f"encoder/{path}" for path in expected} == {p for p in imported.params if p.startswith("encoder/")}
    for path, value in expected.items():
        np.testing.assert_array_equal(imported.params[f"encoder/{path}"], value)


def test_a_learned_encoder_computes_what_it_computed(tmp_path):
    model, learned = stage_2(tmp_path, affine=False)
    x = images(32)
    ours = from_torch(save(model.tensors, tmp_path / "model.safetensors"), tmp_path / "run")
    assert_same(ours, model.tensors, tokens_of(learned, x), x)
    assert np.abs(tokens_of(learned, x) - tokens_of(SIGLIP, x)).max() > 0.05


def test_training_goes_on_from_an_import(tmp_path, caplog):
    """With the flags that the import prints; and without them it is refused."""
    model = Torch()
    model.decoder()
    model.simvq()
    with caplog.at_level(logging.INFO, logger="vqrae_jax"):
        from_torch(save(model.tensors, tmp_path / "model.safetensors"), tmp_path / "imported")
    flags = next(message for message in caplog.messages if message.startswith("to train on"))
    flags = shlex.split(flags)[8:]
    nano = ["--config=configs/nano_stage2.py", f"--workdir={tmp_path / 'run'}", "--config.train.steps=2",
            "--config.train.batch_size=2", "--config.optim.warmup_steps=0", "--config.eval.limit=2",
            "--config.log.tensorboard=False"]
    train = functools.partial(command, "vqrae_jax.main", *nano)
    refused = train(flags[0], "--config.model.quantizer.input_projection=True")
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("error: ")
    trained = train(*flags)
    assert trained.returncode == 0, trained.stderr
    for part in ("encoder", "quantizer", "decoder"):
        assert f"{part}: " in trained.stderr
    assert "initialised" not in trained.stderr


@pytest.mark.parametrize("name", ["siglip", "dinov2_with_registers", "dinov3_vit", "vit_mae"])
def test_transformers_encoders_by_the_systems_own_names(name, tmp_path):
    """The wrappers of the PyTorch system around live models, every parameter random, and a whole EMA VQ model."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    import transformers

    from tests.make_encoder_references import randomize

    folder = REFERENCE / name
    wrapper = torch.nn.Module()
    if name == "siglip":
        wrapper.model = transformers.SiglipModel.from_pretrained(folder).vision_model
        norm, options = wrapper.model.post_layernorm, {"interpolate_pos_encoding": True}
    elif name == "vit_mae":
        wrapper.model = transformers.ViTMAEForPreTraining.from_pretrained(folder, mask_ratio=0.0).vit
        norm, options = wrapper.model.layernorm, {"interpolate_pos_encoding": True}
    elif name == "dinov2_with_registers":
        wrapper.encoder = transformers.Dinov2WithRegistersModel.from_pretrained(folder)
        norm, options = wrapper.encoder.layernorm, {}
    else:  # there the system looks for a layernorm that does not exist, and so strips nothing
        wrapper.encoder = transformers.DINOv3ViTModel.from_pretrained(folder)
        norm, options = None, {}
    tower = wrapper.eval()._modules["encoder" if hasattr(wrapper, "encoder") else "model"]
    randomize(tower, seed=5)
    if norm is not None:
        norm.elementwise_affine, norm.weight, norm.bias = False, None, None
    x = images(32)
    pixels = torch.from_numpy(np.float32((x - MEAN) / STD)).permute(0, 3, 1, 2)
    if name == "vit_mae":
        options["noise"] = torch.arange(GRID**2).repeat(len(x), 1)
    with torch.no_grad():
        tokens = tower(pixels, **options).last_hidden_state[:, -(GRID**2):].numpy()

    model = Torch(width=tokens.shape[-1])
    model.decoder()
    model.ema_vq()
    model.tensors |= {f"encoder.{key}": value.numpy() for key, value in wrapper.state_dict().items()}
    ours = from_torch(save(model.tensors, tmp_path / "model.safetensors"), tmp_path / "run", folder)
    np.testing.assert_allclose(ours.features(x), tokens, atol=1e-4)
    assert_same(ours, model.tensors, tokens, x)
    assert ours.config.model.encoder.final_norm == ("affine" if name == "dinov3_vit" else "plain")


# ---- files as training leaves them

def test_names_of_wrappers_and_training_checkpoints(ema_file, tmp_path):
    """DistributedDataParallel, torch.compile, and the averaged weights among optimizer and discriminator."""
    tensors = load_file(ema_file)
    expected = read(ema_file)
    noise = {name: value + 1 for name, value in tensors.items()}
    wrapped = {f"module._orig_mod.{name}": value for name, value in tensors.items()}
    nested = {f"model.{name}": value for name, value in noise.items()}
    nested |= {f"ema.module.{name}": value for name, value in tensors.items()}
    nested |= {"optimizer.state.0.exp_avg": np.zeros(3, np.float32), "disc.head.weight": np.zeros(3, np.float32)}
    only_model = {f"model.{name}": value for name, value in tensors.items()}
    for case in (wrapped, nested, only_model):
        imported = read(save(case, tmp_path / "case.safetensors"))
        for path, value in expected.params.items():
            np.testing.assert_array_equal(imported.params[path], value)
        for path, value in expected.buffers.items():
            np.testing.assert_array_equal(imported.buffers[path], value)
    with pytest.raises(ValueError, match="tensor other.x is unexpected in the checkpoint of a training run"):
        read(save(nested | {"other.x": np.zeros(1, np.float32)}, tmp_path / "case.safetensors"))
    with pytest.raises(ValueError, match="tensor quantizer.embedding is there twice"):
        read(save(tensors | {"module.quantizer.embedding": tensors["quantizer.embedding"]}, tmp_path / "c.safetensors"))


def test_an_average_that_left_out_the_codebook_gets_the_trained_one(ema_file, tmp_path):
    """One trainer averages parameters only: its average keeps the random codebook it was created with, never used."""
    tensors = load_file(ema_file)
    first = np.random.default_rng(3).normal(size=tensors["quantizer.embedding"].shape).astype(np.float32)
    never = {"quantizer.embedding": first, "quantizer.ema_w": first,
             "quantizer.ema_cluster_size": np.zeros(CODES, np.float32)}
    case = {f"ema.{name}": value for name, value in (tensors | never).items()}
    case |= {f"model.{name}": value + (0 if name.startswith("quantizer") else 1) for name, value in tensors.items()}
    imported = read(save(case, tmp_path / "case.safetensors"))
    np.testing.assert_array_equal(imported.buffers["quantizer/codebook"], tensors["quantizer.embedding"])
    np.testing.assert_array_equal(imported.params["decoder/pixels/bias"], tensors["decoder.decoder_pred.bias"])
    assert any("never updated" in note for note in imported.notes)


@pytest.mark.parametrize("untrained", [True, False])
def test_an_ema_codebook_survives_its_next_update(untrained, ema_file, tmp_path):
    """The first update of an imported EMA VQ moves no code that the batch does not use, however rare it was."""
    tensors = load_file(ema_file)
    if untrained:
        tensors["quantizer.ema_cluster_size"] = np.zeros(CODES, np.float32)
        tensors["quantizer.ema_w"] = tensors["quantizer.embedding"]
    model = from_torch(save(tensors, tmp_path / "case.safetensors"), tmp_path / "run")
    _, graphdef, arrays = runs.load_run(tmp_path / "run", sharding.one_device())
    quantizer = flat.merge(graphdef, arrays).quantizer
    codes = np.asarray(quantizer.codes())
    np.testing.assert_array_equal(codes, tensors["quantizer.embedding"])
    z = np.repeat(codes[:1], 50, axis=0)
    state = quantizer.next_buffers(quantizer(z, train=True).stats, rng=jax.random.key(0))
    np.testing.assert_allclose(state["codebook"], codes, rtol=0.02)
    assert model.num_codes == CODES


@pytest.mark.parametrize("wrap", [False, True])
def test_pytorch_files(wrap, ema_file, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    tensors = {name: torch.from_numpy(value) for name, value in load_file(ema_file).items()}
    content = {f"module.{name}": value for name, value in tensors.items()}
    if wrap:
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([parameter])
        parameter.sum().backward()
        optimizer.step()
        content = {"step": 7, "model": {name: value * 2 for name, value in tensors.items()}, "ema": content,
                   "optimizer": optimizer.state_dict(), "scheduler": None}
    torch.save(content, tmp_path / "model.pt")
    torch.save({"mean": None, "var": torch.full((1, WIDTH, 1, 1), 4.0)}, tmp_path / "stat.pt")
    imported, expected = read(tmp_path / "model.pt", latent_statistics=tmp_path / "stat.pt"), read(ema_file)
    for path, value in expected.params.items():
        np.testing.assert_array_equal(imported.params[path], value)
    np.testing.assert_array_equal(imported.buffers["latent_mean"], np.zeros((GRID**2, WIDTH)))
    np.testing.assert_array_equal(imported.buffers["latent_var"], np.full((GRID**2, WIDTH), 4))


class Malicious:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mknod, (self.file,)


def test_a_malicious_pickle_runs_nothing(ema_file, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    trap = tmp_path / "trap"
    tensors = {name: torch.from_numpy(value) for name, value in load_file(ema_file).items()}
    torch.save(tensors | {"bad": Malicious(trap)}, tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert trap.exists()  # it works where it is trusted
    trap.unlink()
    for options in ({"file": tmp_path / "model.pt"}, {"file": ema_file, "latent_statistics": tmp_path / "model.pt"}):
        with pytest.raises(OSError, match=r"model.pt holds more than tensors \(.*\) and was not read"):
            read(**options)
        assert not trap.exists()


# ---- faults

@pytest.mark.parametrize("name", [
    "quantizer.embedding", "quantizer.ema_cluster_size", "decoder.decoder_pos_embed", "decoder.trainable_cls_token",
    "decoder.decoder_layers.1.attention.attention.key.bias", "decoder.decoder_pred.weight",
])
def test_a_tensor_that_is_missing_or_misshaped_is_named(name, ema_file, tmp_path):
    tensors = load_file(ema_file)
    without = {key: value for key, value in tensors.items() if key != name}
    with pytest.raises(ValueError, match=rf"\.safetensors: tensor {name} is missing$"):
        read(save(without, tmp_path / "without.safetensors"))
    larger = np.pad(tensors[name], [(0, 1)] * (tensors[name].ndim - 1) + [(0, 3)])
    with pytest.raises(ValueError, match=rf"\.safetensors: tensor {name} ") as error:
        read(save(tensors | {name: larger}, tmp_path / "larger.safetensors"))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=rf"\.safetensors: tensor {name} "):
        read(save(tensors | {name: tensors[name][None]}, tmp_path / "deeper.safetensors"))


@pytest.mark.parametrize("name", ["quantizer.z", "decoder.mask_token", "decoder.decoder_layers.0.ls1", "what",
                                  "decoder.decoder_layers.7.intermediate.dense.bias"])
def test_a_tensor_too_many_is_named(name, ema_file, tmp_path):
    tensors = load_file(ema_file) | {name: np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=rf"\.safetensors: tensor {name} is unexpected|decoder_layers.2.* is missing"):
        read(save(tensors, tmp_path / "more.safetensors"))


@pytest.mark.parametrize(("name", "edit", "says"), [
    ("encoder.model.embeddings.patch_embedding.bias", None, "is missing, which SiglipVisionModel has"),
    ("encoder.model.post_layernorm.bias", None, "is missing"),
    ("encoder.model.encoder.layers.2.mlp.fc1.weight", lambda x: x[:-1], "has shape (47, 32)"),
    ("encoder.model.encoder.layers.9.mlp.fc1.weight", lambda x: np.zeros(2, np.float32), "is unexpected"),
])
def test_faults_of_an_encoder_are_named(name, edit, says, tmp_path):
    model, _ = stage_2(tmp_path, affine=True)
    tensor = model.tensors.pop(name, None)
    if edit:
        model.tensors[name] = np.ascontiguousarray(edit(tensor))
    with pytest.raises(ValueError, match="model.safetensors: ") as error:
        read(save(model.tensors, tmp_path / "model.safetensors"))
    assert name in str(error.value)
    assert says in str(error.value)


def test_contradictions_are_errors(ema_file, tmp_path):
    model = Torch()
    model.decoder()
    model.simvq()
    simvq = save(model.tensors, tmp_path / "simvq.safetensors")
    assert any("assumed: give --nosimvq-l2-norm" in note for note in read(simvq).notes)
    euclidean = {name: value for name, value in model.tensors.items() if "l2_norm_scale" not in name}
    euclidean = save(euclidean, tmp_path / "euclidean.safetensors")  # an early version of that SimVQ knew no other
    assert read(simvq).quantizer["l2_normalize"]
    assert not read(euclidean).quantizer["l2_normalize"]
    with pytest.raises(ValueError, match="--simvq-l2-norm contradicts"):
        read(euclidean, simvq_l2_norm=True)
    with pytest.raises(ValueError, match="--simvq-l2-norm has no meaning for .*, which has EMA VQ"):
        read(ema_file, simvq_l2_norm=True)
    with pytest.raises(ValueError, match="--decoder-heads=3 does not divide the decoder's width 16"):
        read(ema_file, decoder_heads=3)
    with pytest.raises(ValueError, match="decoder_embed.weight takes tokens of width 32, but the encoder .* makes 24"):
        read(ema_file, REFERENCE / "dinov3_vit")
    narrow = Torch(width=24)
    narrow.decoder()
    narrow.add("encoder.model.embeddings.class_embedding", 1, 1, 24)
    with pytest.raises(ValueError, match="no encoder of that system is an InternVisionModel"):
        read(save(narrow.tensors, tmp_path / "narrow.safetensors"), REFERENCE / "intern_vit")
    model.tensors["quantizer.l2_norm_scale"] = np.float32(-1)
    with pytest.raises(ValueError, match="l2_norm_scale is -1.0"):
        read(save(model.tensors, tmp_path / "negative.safetensors"))
    fsq = Torch()
    fsq.decoder()
    fsq.fsq()
    fsq.tensors["quantizer.basis"] = np.array([1, 4, 12])  # the other order of digits
    with pytest.raises(ValueError, match=r"tensor quantizer.basis is not that of levels \(4, 3, 5\)"):
        read(save(fsq.tensors, tmp_path / "fsq.safetensors"))


def test_unreadable_files(ema_file, tmp_path):
    with pytest.raises(OSError, match="none.pt does not exist"):
        read(tmp_path / "none.pt")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(ema_file.read_bytes()[:500])
    with pytest.raises(OSError, match="broken.safetensors is damaged or truncated"):
        read(broken)
    model, _ = stage_2(tmp_path, affine=True)
    only_encoder = {name: value for name, value in model.tensors.items() if name.startswith("encoder.")}
    with pytest.raises(ValueError, match="tensor decoder.decoder_embed.bias is missing, and .* more"):
        read(save(only_encoder, tmp_path / "model.safetensors"))


# ---- the commands, and what leads back

convert_command = functools.partial(command, "vqrae_jax.convert")


def test_the_command_line(ema_file, tmp_path):
    """A whole way: a checkpoint becomes a run, and the run's encoder a folder; what is there is not overwritten."""
    run, out = tmp_path / "run", tmp_path / "hf"
    into = ["from-torch", f"--checkpoint={ema_file}", f"--encoder={SIGLIP}", f"--workdir={run}"]
    result = convert_command(*into, "--decoder-heads=2", "--encoder-norm=affine")
    assert result.returncode == 0, result.stderr
    for said in ("EMA VQ, 24 codes", "width 16, depth 2, heads 2, mlp_dim 24", f"weights of {SIGLIP}",
                 "parameters: encoder ", f"vqrae_jax.reconstruct --workdir={run}"):
        assert said in result.stderr
    result = convert_command("to-hf", f"--workdir={run}", "--out", out)
    assert result.returncode == 0, result.stderr
    x = images(32)
    np.testing.assert_allclose(tokens_of(out, x, "affine"), vqrae_jax.load(run).features(x), atol=1e-5)
    for arguments, says in (
            ([*into, "--decoder_heads=2"], "run holds a run already: choose another --workdir"),
            ([*into], "from-torch needs --decoder-heads")):
        result = convert_command(*arguments)
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("error: ")
        assert says in result.stderr


@pytest.mark.parametrize(("name", "final_norm"), [
    ("siglip_vision", "plain"), ("dinov2", "affine"), ("dinov2_with_registers", "plain"), ("dinov3_vit", "plain"),
    ("vit_mae", "affine"), ("intern_vit", "affine")])
def test_a_run_leads_back_to_hugging_face(name, final_norm, tmp_path):
    """Parameters exactly, tokens as `transformers` computes them from the folder; at another size than the original."""
    config = config_lib.default()
    patch_size = huggingface.read_encoder_spec(REFERENCE / name).vit.patch_size
    config.data.image_size = side = 4 * patch_size
    config.model.encoder.update(path=str(REFERENCE / name), final_norm=final_norm)
    config.model.quantizer.kind = "ema"
    config.model.quantizer.update(size=8, dim=huggingface.read_encoder_spec(REFERENCE / name).vit.width)
    config.optim.lr_multipliers = (("encoder/.*", 0.0),)
    config = config_lib.parse(config)
    structure = build.structure(config)
    zeros = lambda shapes: {path: np.zeros(value.shape, np.float32) for path, value in shapes.items()}
    loaded = huggingface.load_encoder_params(REFERENCE / name, image_size=side, final_norm=final_norm)
    learned = {f"encoder/{path}": value + np.float32(0.01) for path, value in loaded.items()}
    arrays = jax.tree.map(jnp.asarray, (zeros(structure.params) | learned, zeros(structure.buffers)))
    runs.write_run(tmp_path / "run", config, *arrays)

    convert.to_hf(tmp_path / "run", tmp_path / "hf")
    again = huggingface.load_encoder_params(tmp_path / "hf", final_norm=final_norm)
    assert again.keys() == loaded.keys()
    for path, value in again.items():
        np.testing.assert_array_equal(value, learned[f"encoder/{path}"])
    spec = huggingface.read_encoder_spec(REFERENCE / name)
    assert huggingface.read_encoder_spec(tmp_path / "hf") == dataclasses.replace(spec, image_size=side)
    with pytest.raises(ValueError, match="hf holds a model already"):
        convert.to_hf(tmp_path / "run", tmp_path / "hf")

    pytest.importorskip("torch", reason="tokens in transformers need torch: pip install torch")
    from tests.make_encoder_references import load_model, torch_tokens
    x = images(side)
    tokens = torch_tokens(load_model(tmp_path / "hf"), x, side)
    np.testing.assert_allclose(vqrae_jax.load(tmp_path / "run").features(x), tokens, atol=1e-4)


def test_features_of_other_layers_are_pointed_out(ema_file, tmp_path, caplog):
    from_torch(ema_file, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    values = json.loads(file.read_text())
    values["model"]["encoder"]["layers"] = [2]
    del values["checksum"]  # as who changes it by hand
    file.write_text(json.dumps(values))
    with caplog.at_level(logging.INFO, "vqrae_jax"):
        convert.to_hf(tmp_path / "run", tmp_path / "hf")
    assert "the run's features are those of layers (2,), not the folder's last_hidden_state" in caplog.text
