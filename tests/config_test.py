"""Configs: wrong keys and values are named; every key is used; every shipped config can be built."""

import ast
import dataclasses
import importlib
import json
from pathlib import Path

import pytest

from vqrae_jax import build
from vqrae_jax import config as config_lib

REPOSITORY = Path(__file__).parents[1]
SHIPPED = sorted(file.stem for file in (REPOSITORY / "configs").glob("*.py"))


def changed(**changes):
    values = json.loads(json.dumps(dataclasses.asdict(config_lib.Config())))
    for key, value in changes.items():
        *sections, name = key.split("__")
        section = values
        for part in sections:
            section = section[part]
        section[name] = value
    return values


@pytest.mark.parametrize(("changes", "says"), [
    ({"train__stepz": 3}, "unknown config key train.stepz"),
    ({"optim__lr": "fast"}, "config key optim.lr must be of type float, not 'fast'"),
    ({"optim__lr": float("inf")}, "config key optim.lr must be a finite number, not inf"),
    ({"optim__b2": 1.0}, "config key optim.b2 must be between 0.0 and 0.999999, not 1.0"),
    ({"model__quantizer__kind": "fsq"}, "FSQ needs levels"),
    ({"train__steps": 2.5}, "config key train.steps must be of type int"),
    ({"train__steps": True}, "config key train.steps must be of type int"),
    ({"train__batch_size": 0}, "config key train.batch_size must be at least 1, not 0"),
    ({"data__crop_scale_min": 1.5}, "config key data.crop_scale_min must be between 0.001 and 1.0, not 1.5"),
    ({"model__quantizer__kind": "vqgan"}, "model.quantizer.kind must be one of simvq, ema, fsq, not 'vqgan'"),
    ({"model__quantizer": 3}, "config key model.quantizer must hold keys, not 3"),
    ({"model__quantizer__levels": [8, 8]}, "model.quantizer.levels (8, 8) has no meaning for simvq, only for fsq"),
    ({"model__quantizer__restart_threshold": 1.0}, "restart_threshold 1.0 has no meaning for simvq, only for ema"),
    ({"optim__lr_multipliers": [["encoder/(", 0.0]]}, "'encoder/(' is not a pattern"),
    ({"optim__lr_multipliers": [["encoder/.*", -1.0]]}, "negative factor -1.0"),
    ({"optim__lr_multipliers": [["encoder/.*"]]}, "must have 2 entries"),
    ({"optim__end_lr": 1.0}, "optim.end_lr 1.0 must not exceed optim.lr 0.0004"),
    ({"optim__warmup_steps": 100_000}, "optim.warmup_steps 100000 must be below train.steps 100000"),
    ({"train__accumulate": 3}, "train.batch_size 256 is not divisible by train.accumulate 3"),
])
def test_a_wrong_key_or_value_is_named(changes, says):
    with pytest.raises(ValueError, match="config key") as error:
        config_lib.parse(changed(**changes))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_key_is_named():
    values = changed()
    del values["optim"]["lr"]
    with pytest.raises(ValueError, match="config key optim.lr is missing"):
        config_lib.parse(values)


def test_saved_configs_load_unchanged(tmp_path):
    config = config_lib.parse(changed(optim__lr_multipliers=[["encoder/.*", 0.1]], optim__lr=1))
    config_lib.save(config, tmp_path / "config.json")
    assert config_lib.load(tmp_path / "config.json") == config
    assert config.optim.lr_multipliers == (("encoder/.*", 0.1),)
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        config_lib.load(tmp_path / "elsewhere" / "config.json")


def test_differences_are_named():
    assert config_lib.differences(config_lib.Config(), config_lib.parse(changed(optim__lr=1e-3))) == [
        "optim.lr: 0.0004 -> 0.001"]


def test_every_key_is_read_by_something():
    aliases = {"q": "quantizer", "o": "optim", "weights": "loss"}
    read = set()
    for file in (REPOSITORY / "vqrae_jax").rglob("*.py"):
        if file.name == "config.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                section = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                read.add((aliases.get(section, section), node.attr))

    def keys(section, name):
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            yield from keys(value, field.name) if dataclasses.is_dataclass(value) else [(name, field.name)]

    assert not set(keys(config_lib.Config(), "config")) - read


# The shapes of the encoders that the shipped configs name; the values of their config.json files on the hub.
HUB_CONFIGS = {
    "google/siglip-large-patch16-384": {
        "model_type": "siglip", "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1024, "num_hidden_layers": 24,
            "num_attention_heads": 16, "intermediate_size": 4096, "image_size": 384, "patch_size": 16}},
    "facebook/dinov2-with-registers-base": {
        "model_type": "dinov2_with_registers", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "mlp_ratio": 4, "image_size": 518, "patch_size": 14, "num_register_tokens": 4, "hidden_act": "gelu",
        "layer_norm_eps": 1e-6},
}

# Learned by the encoder, the quantizer and the decoder; numbers of codebook state.
PARAMETERS = {
    "nano_stage1": (1_829_184, 2 * 192 * 64 + 192 + 64 + 64 * 64 + 64, 1_853_952, 2048 * 64),
    # SigLIP-L's vision tower at 224 without head: that at 384 (303,688,704 in transformers) less 380 positions, less
    # the LayerNorm's scale and bias. SimVQ's one linear layer; RAE's ViT-L decoder.
    "siglip_l_stage1": (303_688_704 - 380 * 1024 - 2 * 1024, 1024 * 1024 + 1024, 304_149_248, 16384 * 1024),
    # DINOv2-B: patches, positions of 16x16 tokens, cls and 4 registers, 12 blocks with layer scale, no LayerNorm's
    # affine. RAE's ViT-XL: linear in, cls, 28 blocks, LayerNorm, pixels.
    "dinov2_b": (14 * 14 * 3 * 768 + 768 + (256 + 5) * 768 + 12 * (12 * 768**2 + 15 * 768), 0,
                 768 * 1152 + 2 * 1152 + 28 * (4 * 1152**2 + 2 * 1152 * 4096 + 9 * 1152 + 4096) + 2 * 1152
                 + 1152 * 768 + 768, 8192 * 768 * 2 + 8192),
}


def shipped(name: str, tmp_path: Path) -> config_lib.Config:
    """A shipped config whose encoder is a folder that holds only the shape of the one on the hub."""
    config = importlib.import_module(f"configs.{name}").get_config()
    if config.model.encoder.path in HUB_CONFIGS:
        folder = tmp_path / "encoder"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(HUB_CONFIGS[config.model.encoder.path]))
        config.model.encoder.path = str(folder)
    return config_lib.parse(config)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_build_at_full_size(name, tmp_path):
    config = shipped(name, tmp_path)
    _, params, codebook = build.structure(config)
    counts = [sum(value.size for path, value in params.items() if path.startswith(part))
              for part in ("encoder/", "quantizer/", "decoder/")]
    counts.append(sum(value.size for value in codebook.values()))
    assert tuple(counts) == PARAMETERS[name.replace("stage2", "stage1")]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_say_how_to_run_them(name):
    doc = importlib.import_module(f"configs.{name}").__doc__ or ""
    assert f"--config=configs/{name}.py" in doc
    assert "--workdir=" in doc
    body = (REPOSITORY / "configs" / f"{name}.py").read_text().split("def get_config")[1]
    assert len(body.splitlines()) <= 30


@pytest.mark.parametrize(("key", "value", "says"), [
    ("image_size", 60, "config key data.image_size 60 is not divisible by the encoder's patch size 8"),
    ("image_size", 64, None),
])
def test_sizes_that_do_not_fit_are_named(key, value, says, tiny_config):
    setattr(tiny_config.data, key, value)
    if says is None:
        build.structure(config_lib.parse(tiny_config))
        return
    with pytest.raises(ValueError, match="config key") as error:
        build.structure(config_lib.parse(tiny_config))
    assert says in str(error.value)
