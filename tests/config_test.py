"""Configs: wrong keys and values are named; every key is used; every shipped config can be built."""

import ast
import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest

import vqrae_jax
from vqrae_jax import config as config_lib
from vqrae_jax.generator import build as generator_build
from vqrae_jax.models.perceptual import SHARES
from vqrae_jax.models.quantizers import QUANTIZERS
from vqrae_jax.tokenizer import build

REPOSITORY = Path(__file__).parents[1]
SHIPPED = sorted(file.stem for file in (REPOSITORY / "configs").glob("*.py"))
GENERATORS = [name for name in SHIPPED if importlib.import_module(f"configs.{name}").get_config().task == "generator"]
TOKENIZERS = [name for name in SHIPPED if name not in GENERATORS]


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
    ({"train__stepz": 3}, "unknown config key train.stepz: did you mean train.steps? There are train.steps, train."),
    ({"optim__learning_rate": 3}, "unknown config key optim.learning_rate: did you mean optim.lr? There are optim.lr"),
    ({"optim__lr": "fast"}, "config key optim.lr must be of type float, not 'fast'"),
    ({"optim__lr": float("inf")}, "config key optim.lr must be a finite number, not inf"),
    ({"optim__b2": 1.0}, "config key optim.b2 must be between 0.0 and 0.999999, not 1.0"),
    ({"model__quantizer__kind": "fsq"}, "FSQ needs levels"),
    ({"train__steps": 2.5}, "config key train.steps must be of type int"),
    ({"train__steps": True}, "config key train.steps must be of type int"),
    ({"train__batch_size": 0}, "config key train.batch_size must be at least 1, not 0"),
    ({"data__crop_scale_min": 1.5}, "config key data.crop_scale_min must be between 0.001 and 1.0, not 1.5"),
    ({"model__quantizer__kind": "vqgan"},
     "model.quantizer.kind must be one of simvq, ema, fsq, adapter_fsq, ranked, own, none, not 'vqgan'"),
    ({"model__quantizer": 3}, "config key model.quantizer must hold keys, not 3"),
    ({"model__quantizer__levels": [8, 8]},
     "model.quantizer.levels (8, 8) has no meaning for simvq, only for fsq and adapter_fsq"),
    ({"model__quantizer__restart_threshold": 1.0}, "restart_threshold 1.0 has no meaning for simvq, only for ema"),
    ({"optim__lr_multipliers": [["encoder/(", 0.0]]}, "'encoder/(' is not a pattern"),
    ({"optim__lr_multipliers": [["encoder/.*", -1.0]]}, "negative factor -1.0"),
    ({"optim__lr_multipliers": [["encoder/.*"]]}, "must have 2 entries"),
    ({"optim__end_lr": 1.0}, "optim.end_lr 1.0 must not exceed optim.lr 0.0004"),
    ({"optim__warmup_steps": 100_000}, "optim.warmup_steps 100000 must be below train.steps 100000"),
    ({"gan__discriminator": "patchgan", "gan__discriminator_start_step": 9, "gan__start_step": 8},
     "gan.start_step 8 is before gan.discriminator_start_step 9"),
    ({"gan__discriminator": "patchgan", "gan__channels": 48}, "gan.channels 48 must be a multiple of 32"),
    ({"gan__discriminator": "patchgan", "gan__start_step": 100_000}, "gan.start_step 100000 must be below train.steps"),
    ({"gan__cutout": 0.5}, "gan.cutout 0.5 has no effect without gan.augment"),
    ({"model__encoder__combine": "concat"}, "model.encoder.combine has no effect without model.encoder.layers"),
    ({"gan__heads": "disc.pt"}, "gan.heads 'disc.pt' has no meaning for none, only for dino_s8 and dino_s16"),
    ({"gan__discriminator": "dino_s8", "gan__warmup_steps": 100_000}, "gan.warmup_steps 100000 must be below"),
    ({"loss__perceptual_weight": 1.0}, "needs a network: set loss.perceptual.lpips or loss.perceptual.convnext_s or "
     "loss.perceptual.encoder above 0"),
    ({"loss__perceptual__lpips": 1.0}, "loss.perceptual_weight is 0, but loss.perceptual names a network"),
    ({"model__decoder__shape": "custom", "model__decoder__width": 8}, "model.decoder.depth is 0, but a custom shape"),
    ({"model__decoder__depth": 8}, "model.decoder.depth 8 has no meaning for symmetric, only for custom"),
    ({"model__quantizer__kind": "fsq", "model__quantizer__l2_normalize": True}, "l2_normalize True has no meaning"),
    ({"optim__end_lr_multipliers": [["(", 1.0]]}, "optim.end_lr_multipliers: '(' is not a pattern"),
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


def test_a_file_from_before_a_key_existed_has_its_default(tmp_path):
    config_lib.save(config_lib.parse(changed(optim__lr=1e-3)), tmp_path / "config.json")
    values = json.loads((tmp_path / "config.json").read_text())
    del values["checksum"], values["gan"], values["loss"]["perceptual"]["remat"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert config_lib.load(tmp_path / "config.json") == config_lib.parse(changed(optim__lr=1e-3))
    values["gams"] = {}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="unknown config key gams"):
        config_lib.load(tmp_path / "config.json")


def test_a_run_from_before_images_were_held_out_trained_on_all(tmp_path):
    values = changed()
    del values["data"]["holdout"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert config_lib.load(tmp_path / "config.json") == config_lib.parse(changed(data__holdout=0.0))


@pytest.mark.parametrize("name", SHIPPED)
def test_an_evaluation_during_training_is_limited(name):
    assert 0 < importlib.import_module(f"configs.{name}").get_config().eval.limit <= 5000


def test_differences_are_named():
    new = config_lib.parse(changed(optim__lr=1e-3, train__steps=7, train__accumulate=2, optim__warmup_steps=4))
    assert config_lib.differences(config_lib.Config(), new) == (
        {"optim.lr": (0.0004, 0.001), "optim.warmup_steps": (2000, 4)},
        {"train.steps": (100_000, 7), "train.accumulate": (1, 2)})


def test_a_short_trial_is_told_all_the_flags_it_needs():
    gan = {"gan__discriminator": "patchgan", "gan__discriminator_start_step": 350, "gan__start_step": 450,
           "gan__warmup_steps": 20}
    with pytest.raises(ValueError, match=r"for a short run add (.*)") as error:
        config_lib.parse(changed(train__steps=30, **gan))
    flags = dict(flag.removeprefix("--config.").split("=") for flag in str(error.value).split("add ")[1].split())
    assert flags.keys() == {"optim.warmup_steps", "gan.start_step", "gan.discriminator_start_step", "gan.warmup_steps"}
    shorter = {key.replace(".", "__"): int(value) for key, value in flags.items()}
    assert config_lib.parse(changed(train__steps=30, **{**gan, **shorter})).train.steps == 30


def test_every_key_is_read_by_something():
    aliases = {"d": "decoder"}
    # Handed to their builders by name.
    read = {("quantizer", name) for kind in QUANTIZERS.values() for name in ("size", "dim", *kind.keys)}
    read |= {("perceptual", name) for name in SHARES}
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

    declared = {key for config in config_lib.CONFIGS.values() for key in keys(config(), "config")}
    assert not declared - read


def dense(inputs, outputs):
    return inputs * outputs + outputs


def blocks(width, depth, mlp_dim, *, layer_scale=False, key_bias=True):
    """Parameters of transformer blocks: attention, MLP, two LayerNorms, two layer scales."""
    return depth * (4 * dense(width, width) + dense(width, mlp_dim) + dense(mlp_dim, width) + 4 * width
                    + 2 * width * layer_scale - width * (not key_bias))


def decoder(inputs, width, depth, mlp_dim, patch_size, *, cls=0):
    return dense(inputs, width) + cls * width + blocks(width, depth, mlp_dim) + 2 * width + dense(
        width, patch_size**2 * 3)


SO400M = dense(16 * 16 * 3, 1152) + blocks(1152, 27, 4304) + 2 * 1152
SO400M_DECODER = decoder(1152, 1152, 27, 4304, 16)
SIMVQ_1536 = lambda width: dense(width, 1536) + dense(1536, 1536) + dense(1536, width)
INTERNVIT = dense(14 * 14 * 3, 1024) + (1024 + 1) * 1024 + blocks(1024, 24, 4096, layer_scale=True)
DINOV2_B = dense(14 * 14 * 3, 768) + (256 + 5) * 768 + blocks(768, 12, 3072, layer_scale=True)
ADAPTERS = (2 * 768 + dense(768, 512) + dense(512, 512) + dense(512, 5) + 5
            + dense(256, 768) + 2 * dense(768, 768) + 4 * 768)

# Learned by the encoder, the quantizer and the decoder; numbers in buffers.
PARAMETERS = {
    "nano_stage1": (1_829_184, 2 * 192 * 64 + 192 + 64 + 64 * 64 + 64, 1_853_952, 2048 * 64),
    "bench_medium": (21_687_936, 384 * 384 + 384, 21_737_856, 16384 * 384),
    # SigLIP-L's vision tower at 224 without head: that at 384 (303,688,704 in transformers) less 380 positions, less
    # the LayerNorm's scale and bias. SimVQ's one linear layer; RAE's ViT-L decoder.
    "siglip_l_stage1": (303_688_704 - 380 * 1024 - 2 * 1024, 1024 * 1024 + 1024, 304_149_248, 16384 * 1024),
    "siglip2_so400m_256_stage1": (SO400M + 256 * 1152, SIMVQ_1536(1152), SO400M_DECODER, 16384 * 1536),
    "siglip2_so400m_512_stage1": (SO400M + 1024 * 1152, SIMVQ_1536(1152), SO400M_DECODER, 16384 * 1536),
    "internvit_300m_448_stage1": (INTERNVIT, SIMVQ_1536(1024), decoder(1024, 1024, 24, 4096, 14), 16384 * 1536),
    "dinov2_b": (DINOV2_B, 0, decoder(768, 1152, 28, 4096, 16, cls=1), 8192 * 768 * 2 + 8192),
    "dinov3_l": (dense(16 * 16 * 3, 1024) + 7 * 1024 + blocks(1024, 24, 4096, layer_scale=True, key_bias=False),
                 2 * dense(1024, 1024), decoder(1024, 1152, 28, 4096, 16, cls=1), 64000 * 1024),
    "siglip_fsq": (dense(16 * 16 * 3, 768) + 196 * 768 + blocks(768, 12, 3072), ADAPTERS,
                   decoder(768, 1152, 28, 4096, 16, cls=1), 5 * 128),
}
SAME = {"nano_gan": "nano_stage1", "nano_cifar10_stage1": "nano_stage1", "dinov2_b_decxl": "dinov2_b",
        "ablation": "siglip2_so400m_256_stage1"}


def shipped(name: str) -> config_lib.Config:
    """A shipped config whose encoder has random weights, so that nothing is fetched."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.model.encoder.random_weights = True
    return config_lib.parse(config)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_shipped_configs_build_at_full_size(name):
    config = shipped(name)
    structure = build.structure(config)
    counts = [sum(value.size for path, value in structure.params.items() if path.startswith(part))
              for part in ("encoder/", "quantizer/", "decoder/")]
    counts.append(sum(value.size for value in structure.buffers.values()))
    name = name.replace("stage2", "stage1")
    assert tuple(counts) == PARAMETERS[SAME[name] if name in SAME else name]


def lm_parameters(vocabulary, width, depth, queries, key_values, head_dim, mlp_dim, *, tied):
    """Of a language model of Qwen3's architecture; two norms of a block, of queries and keys, and the last one."""
    block = width * (queries + 2 * key_values) + queries * width + 3 * width * mlp_dim + 2 * width + 2 * head_dim
    return vocabulary * width * (1 if tied else 2) + depth * block + width


LANGUAGE_MODELS = {
    "nano_generator": lm_parameters(2048 + 8 + 1, 192, 5, 192, 192, 64, 512, tied=False),
    "nano_cifar10_generator": lm_parameters(2048 + 8 + 1, 192, 5, 192, 192, 64, 512, tied=False),
    "generator_l": lm_parameters(16384 + 1000 + 1, 1024, 24, 1024, 1024, 64, 2816, tied=False),
    # Qwen3-0.6B has 596,049,920; new are the codes and the token that begins an image.
    "qwen3_0p6b_text": 596_049_920 + (16384 + 1) * 1024,
}


@pytest.mark.parametrize("name", GENERATORS)
def test_shipped_generators_build_at_full_size(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.model.random_weights = True  # of Qwen3 the shape ships
    config.data.classes = config.data.classes or 8
    config = config_lib.parse(config, config_lib.GeneratorConfig)
    structure = generator_build.structure(config, generator_build.planned_codes(config))
    assert sum(value.size for value in structure.params.values()) == LANGUAGE_MODELS[name]


# What LlamaGen's paper says of its models (arXiv 2406.06525, section 3.1 and Table 2).
LLAMAGEN_L = {"model.depth": 24, "model.width": 1024, "model.heads": 16, "optim.lr": 1e-4, "optim.end_lr": 1e-4,
              "optim.b1": 0.9, "optim.b2": 0.95, "optim.weight_decay": 0.05, "optim.clip_norm": 1.0,
              "model.dropout": 0.1, "prefix.drop": 0.1, "train.batch_size": 256, "data.classes": 1000,
              "data.size": 16384}


def test_the_large_generator_is_llamagens_recipe_to_the_letter():
    config = importlib.import_module("configs.generator_l").get_config()
    for key, value in LLAMAGEN_L.items():
        section, name = key.split(".")
        assert config[section][name] == value, key
    assert config.train.steps * config.train.batch_size == pytest.approx(300 * 1_281_167, rel=1e-3)


def test_the_ablation_takes_arguments():
    get_config = importlib.import_module("configs.ablation").get_config
    config = get_config("dim=384,size=4096,strategy=distilled")
    assert (config.model.quantizer.dim, config.model.quantizer.size, config.loss.distill_weight) == (384, 4096, 1.0)
    config_lib.parse(config)
    for wrong in ("dims=3", "dim=many", "strategy=none"):
        with pytest.raises(ValueError, match="give dim=N, size=N or strategy=frozen|joint|distilled"):
            get_config(wrong)


# What the paper's Table 7 says, key by key, for its three encoders.
TABLE_7 = {"optim.b1": 0.9, "optim.b2": 0.999, "optim.weight_decay": 1e-4, "optim.clip_norm": 1.0,
           "optim.warmup_steps": 2000, "model.dtype": "bfloat16", "model.quantizer.size": 16384,
           "model.quantizer.dim": 1536, "loss.perceptual_weight": 1.1, "loss.perceptual.convnext_s": 1.0,
           "loss.perceptual.lpips": 0.0, "data.flip": True}
STAGE_1 = {"optim.lr": 4e-4, "optim.end_lr": 1e-4, "gan.discriminator": "none", "loss.distill_weight": 0.0}
STAGE_2 = {"optim.lr": 1e-4, "optim.end_lr": 1e-5, "gan.discriminator": "patchgan", "loss.distill_weight": 1.0,
           "gan.weight": 0.1, "gan.lr": 4e-5, "gan.discriminator_loss": "hinge"}


@pytest.mark.parametrize(("name", "says"), [
    ("siglip2_so400m_256_stage1", {"train.steps": 100_000, "train.batch_size": 1024, "data.image_size": 256}),
    ("siglip2_so400m_512_stage1", {"train.steps": 100_000, "train.batch_size": 1024, "data.image_size": 512}),
    ("internvit_300m_448_stage1", {"train.steps": 45_000, "train.batch_size": 768, "data.image_size": 448}),
    ("siglip2_so400m_256_stage2", {"train.steps": 70_000, "train.batch_size": 1024, "gan.start_step": 50_000}),
    ("siglip2_so400m_512_stage2", {"train.steps": 70_000, "train.batch_size": 1024, "gan.start_step": 50_000}),
    ("internvit_300m_448_stage2", {"train.steps": 60_000, "train.batch_size": 768, "gan.start_step": 30_000}),
])
def test_the_papers_recipes_to_the_letter(name, says):
    config = importlib.import_module(f"configs.{name}").get_config()
    for key, value in {**TABLE_7, **(STAGE_1 if "stage1" in name else STAGE_2), **says}.items():
        section = config
        for part in key.split("."):
            section = section[part]
        assert section == value, key


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_say_how_to_run_them(name):
    doc = importlib.import_module(f"configs.{name}").__doc__ or ""
    assert f"--config=configs/{name}.py" in doc
    assert "--workdir=" in doc or "vqrae_jax.bench" in doc
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


def test_a_config_file_is_loaded_from_anywhere_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).resolve() != REPOSITORY])
    path, modules = list(sys.path), set(sys.modules)
    config = vqrae_jax.load_config(REPOSITORY / "configs/nano_stage2.py", **{"optim.lr": 3e-4, "train.steps": 70})
    assert isinstance(config, config_lib.Config)
    assert (config.optim.lr, config.train.steps, config.init_from) == (3e-4, 70, "runs/nano_stage1")
    assert sys.path == path
    assert not {name for name in sys.modules if name.split(".")[0] == "configs"} - modules
    ablation = vqrae_jax.load_config(f"{REPOSITORY}/configs/ablation.py:dim=384,size=4096")
    assert (ablation.model.quantizer.dim, ablation.model.quantizer.size) == (384, 4096)


def test_a_config_file_and_what_it_imports_are_read_anew(tmp_path):
    """Two repositories, and an edit between two calls, as in a notebook."""
    for repository, steps in (("a", 60), ("b", 70)):
        folder = tmp_path / repository / "settings"
        folder.mkdir(parents=True)
        (folder / "base.py").write_text(f"STEPS = {steps}  # of {repository}\n")
        (folder / "mine.py").write_text("from settings import base\nfrom vqrae_jax import config as config_lib\n"
                                        "def get_config():\n    config = config_lib.default()\n"
                                        "    config.train.steps = base.STEPS\n"
                                        "    config.optim.warmup_steps = 1\n    return config\n")
        assert vqrae_jax.load_config(folder / "mine.py").train.steps == steps
    (tmp_path / "b/settings/base.py").write_text("STEPS = 12345\n")
    assert vqrae_jax.load_config(tmp_path / "b/settings/mine.py").train.steps == 12345


@pytest.mark.parametrize(("file", "changes", "says"), [
    ("nano_stage3.py", {}, r"there is no config file .*nano_stage3.py: did you mean .*nano_stage2.py\?"),
    ("nano_stage1.py", {"optim.learning_rate": 1.0},
     r"unknown config key optim.learning_rate: did you mean optim.lr\? There are optim.lr"),
    ("nano_stage1.py", {"lr": 1.0}, r"unknown config key lr: did you mean optim.lr or gan.lr\? There are task, seed, "),
    ("nano_stage1.py", {"model.quantiser.size": 8},
     r"model.quantiser.size: did you mean model.quantizer.size\? There are task, seed"),
    ("nano_stage1.py", {"optim.warmup": 8}, r"optim.warmup: did you mean optim.warmup_steps\?"),
    ("nano_stage1.py", {"model.quantizer.size": "big"}, r"model.quantizer.size must be of type int, not 'big'"),
    ("nano_stage1.py:dim=3", {}, r"nano_stage1.py takes no arguments, but 'dim=3' follows its name"),
    ("../tests/tiny.py", {}, r"tiny.py is no config file: it defines no get_config"),
    ("../README.md", {}, r"README.md is no config file: it must be a Python file"),
])
def test_what_is_wrong_with_a_config_file_or_key_is_one_line(file, changes, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says) as error:
        vqrae_jax.load_config(REPOSITORY / "configs" / file, **changes)
    assert "\n" not in str(error.value)
