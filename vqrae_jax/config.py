"""The typed configuration of a run: every key, its type, range and default, declared once.

Config files are `ml_collections.ConfigDict`s that start from `default()` and change a few values; `parse` turns one
into the frozen dataclasses below, which the rest of the package reads. Nothing else in the package has defaults.

`Run` is what training any task reads; `Config`, the tokenizer's, and `GeneratorConfig` add their own sections, and the
key `task` says which of the two a set of values is. Where a key chooses from a table, such as that of the quantizers,
the table says what there is.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import math
import os
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import ml_collections

from vqrae_jax import files
from vqrae_jax.foreign import one_line, shown
from vqrae_jax.models import inception
from vqrae_jax.models.decoder import DECODER_SHAPES
from vqrae_jax.models.discriminators import DISCRIMINATORS
from vqrae_jax.models.losses import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, PIXEL_LOSSES
from vqrae_jax.models.perceptual import SHARES
from vqrae_jax.models.quantizers import QUANTIZERS

BELOW_ONE = 1 - 1e-6  # a moving average of decay 1 would never move


def _key(default: Any, *, low: float | None = None, high: float | None = None, among: tuple[Any, ...] = (),
         free: bool = False, earlier: Any = None) -> Any:
    """A key of the config.

    Args:
      default: its default.
      low: the least value it may have.
      high: the greatest.
      among: tables, or tuples, of the names that it may be.
      free: whether it may change when a run continues. Of most such keys the parameters of later steps do not depend;
        of the others it is said beside them what becomes of the run.
      earlier: what runs did that are older than the key, where that is not the default.
    """
    earlier = default if earlier is None else earlier
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "among": among, "free": free,
                                                        "earlier": earlier})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """How devices are arranged; the product is their number, and -1 stands for the rest of them.

    Another mesh makes sums in another order: a run that continues on one agrees but for rounding.
    """

    data: int = _key(-1, low=-1, free=True)  # copies of the model
    fsdp: int = _key(1, low=-1, free=True)  # devices over which a copy is split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    steps: int = _key(100_000, low=1, free=True)  # another end bends the schedules of the steps that are left
    batch_size: int = _key(256, low=1)  # global: over all devices and accumulation steps
    accumulate: int = _key(1, low=1, free=True)  # micro-batches per optimizer step; sums are made in another order
    log_every: int = _key(50, low=1, free=True)
    checkpoint_every: int = _key(1000, low=1, free=True)
    eval_every: int = _key(5000, low=1, free=True)
    max_skipped: int = _key(20, low=1, free=True)  # non-finite steps in a row, seen when logging, that stop the run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    # embedded | folder:PATH | tfds:NAME[:SPLIT][@DATA_DIR] | array_record:GLOB; may move, but must hold the same images
    source: str = _key("embedded", free=True)
    image_size: int = _key(256, low=8, high=2**14)
    crop_scale_min: float = _key(0.8, low=1e-3, high=1.0)  # least share of the area that a random crop keeps
    flip: bool = True
    # Share of the images that is never trained on and that evaluation shows, where the data hold out none themselves.
    holdout: float = _key(0.01, low=0.0, high=0.5, earlier=0.0)
    max_bad: float = _key(0.01, low=0.0, high=1.0, free=True)  # share of images that may be unreadable
    threads: int = _key(4, low=0, free=True)
    workers: int = _key(0, low=0, free=True)  # processes; 0 decodes in the training process's threads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    source: str = _key("", free=True)  # all its images; empty: the held-out part of data.source, see data.holdout
    batch_size: int = _key(64, low=1, free=True)
    limit: int = _key(5000, low=0, free=True)  # images per evaluation during training; 0 is all
    samples: int = _key(8, low=1, free=True)  # images in the picture
    # Weights of the papers' Inception, for rFID: torch-fidelity's file, or a safetensors file of the same tensors.
    inception: str = _key(inception.WEIGHTS, free=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    path: str = _key("nano", free=True)  # a Hugging Face folder or hub id, or `nano`, which ships with the package
    input_size: int = _key(0, low=0, high=2**14)  # side of the image the encoder sees; 0 is data.image_size
    final_norm: Literal["affine", "plain"] = "affine"
    layers: tuple[int, ...] = ()  # whose tokens are the features, 1 is the first block's; empty: the last
    combine: Literal["sum", "concat"] = "sum"  # of several layers
    random_weights: bool = False  # read only the shape from path: for tests and measurements


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantizer:
    kind: str = _key("simvq", among=(QUANTIZERS,))  # none: an autoencoder, no codes; own: an object given to train
    size: int = _key(16384, low=2, high=2**24)  # number of codes; FSQ: the product of its levels
    dim: int = _key(1536, low=1, high=2**16)  # width of a code; FSQ: the number of its levels
    levels: tuple[int, ...] = ()  # FSQ only
    projection: bool = False  # linear layers around the codebook even where dim equals the encoder's width
    input_projection: bool = False  # SimVQ: an identity-initialised layer before the search
    l2_normalize: bool = False  # SimVQ: tokens and codes of length 1
    search: Literal["euclidean", "cosine"] = "euclidean"
    gradient: Literal["straight_through", "rotation"] = "straight_through"
    init: Literal["random", "kmeans"] = "random"  # kmeans: on the encoder's features of the first images
    commitment_weight: float = _key(0.25, low=0.0)
    decay: float = _key(0.99, low=0.0, high=BELOW_ONE)  # EMA VQ
    restart_threshold: float = _key(0.0, low=0.0)  # EMA VQ: codes used less per step are moved; 0 is off


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    shape: str = _key("symmetric", among=(("symmetric",), DECODER_SHAPES, ("custom",)))
    width: int = _key(0, low=0, high=2**16)  # custom only, as are the next three
    depth: int = _key(0, low=0, high=2**10)
    heads: int = _key(0, low=0, high=2**10)
    mlp_dim: int = _key(0, low=0, high=2**18)
    patch_size: int = _key(0, low=0, high=2**10)  # side of the square of pixels a token becomes; 0 is the encoder's
    cls_token: bool = False
    learned_positions: bool = False  # position embeddings that start as sin-cos and learn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    dtype: Literal["float32", "bfloat16"] = "float32"  # of computation; what learns and all files are float32
    # What of a block the backward pass recomputes: nothing, all but the matmuls, or everything but the block's input.
    remat: Literal["none", "minimal", "full"] = _key("minimal", free=True)
    noise_tau: float = _key(0.0, low=0.0)  # of the noise on features in training (RAE); codes want none
    latent_statistics: bool = False  # latents are handed out normalised per channel and position
    encoder: Encoder = Encoder()
    quantizer: Quantizer = Quantizer()
    decoder: Decoder = Decoder()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perceptual:
    """Networks whose distance is the perceptual loss: the mean of theirs, weighted by their shares."""

    lpips: float = _key(0.0, low=0.0)  # share of LPIPS on VGG16
    convnext_s: float = _key(0.0, low=0.0)  # share of the distance of ConvNeXt-S's logits
    encoder: float = _key(0.0, low=0.0)  # share of the distance of the run's own encoder's features, as it began
    # Weights, which a run reads once, when it starts: a file, a folder or a hub id.
    lpips_vgg16: str = _key("timm/vgg16.tv_in1k", free=True)
    lpips_linear: str = _key("", free=True)  # LPIPS's own 1x1 weights; empty: those that ship with the package
    convnext_s_weights: str = _key("~/.cache/vqrae_jax/convnext_small-0c510722.pth", free=True)
    random_weights: bool = False  # for tests and measurements
    remat: bool = False  # recompute the networks' activations in the backward pass, to save memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    pixel: str = _key("l2", among=(PIXEL_LOSSES,))
    pixel_weight: float = _key(1.0, low=0.0)
    perceptual_weight: float = _key(0.0, low=0.0)
    perceptual: Perceptual = Perceptual()
    vq_weight: float = _key(1.0, low=0.0)
    distill_weight: float = _key(0.0, low=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gan:
    discriminator: str = _key("none", among=(("none",), DISCRIMINATORS))
    weight: float = _key(0.1, low=0.0)  # of the generator's loss
    adaptive: bool = False  # times the ratio of the two losses' gradients at the decoder's last layer
    max_adaptive_weight: float = _key(1e4, low=0.0)
    discriminator_start_step: int = _key(0, low=0)  # when the discriminator begins to learn
    start_step: int = _key(0, low=0)  # when the decoder begins to learn from it
    ramp_steps: int = _key(0, low=0)  # over which the weight then rises from 0
    discriminator_loss: str = _key("hinge", among=(DISCRIMINATOR_LOSSES,))
    generator_loss: str = _key("linear", among=(GENERATOR_LOSSES,))
    lecam_weight: float = _key(0.0, low=0.0)
    lecam_decay: float = _key(0.999, low=0.0, high=BELOW_ONE)
    augment: bool = False  # DiffAug
    cutout: float = _key(0.0, low=0.0, high=1.0)  # side of DiffAug's hole as a share of the image's
    channels: int = _key(128, low=32, high=2**12)  # PatchGAN: of the first layer, a multiple of 32
    # DINO: weights of the frozen ViT, read once: a file, a folder or a hub id; empty: the published ones
    backbone: str = _key("", free=True)
    heads: str = _key("", free=True)  # DINO: a PyTorch checkpoint with trained heads; empty: new ones
    random_weights: bool = False  # DINO: for tests and measurements
    lr: float = _key(4e-5, low=0.0)
    end_lr: float = _key(0.0, low=0.0)
    warmup_steps: int = _key(0, low=0)
    b1: float = _key(0.9, low=0.0, high=BELOW_ONE)
    b2: float = _key(0.999, low=0.0, high=BELOW_ONE)
    weight_decay: float = _key(0.0, low=0.0)
    clip_norm: float = _key(0.0, low=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodesData:
    source: str = _key("", free=True)  # codes:DIR, which `tokenize` made; may move, but must hold the same codes
    # What the codes must be; 0 is whatever they are. With all three a step can be planned where there are no codes yet.
    grid: int = _key(0, low=0, high=2**10)  # tokens a side
    size: int = _key(0, low=0, high=2**24)  # of the codebook
    classes: int = _key(0, low=0, high=2**24)  # that labels tell apart
    # Share of the images whose codes are never trained on and that evaluation shows.
    holdout: float = _key(0.01, low=0.0, high=0.5)
    max_bad: float = _key(0.01, low=0.0, high=1.0, free=True)  # share of records that may be unreadable
    threads: int = _key(4, low=0, free=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodesEval:
    source: str = _key("", free=True)  # codes:DIR, all its images; empty: the held-out part of data.source
    batch_size: int = _key(64, low=1, free=True)
    limit: int = _key(5000, low=0, free=True)  # images, of those trained on and of the others each; 0 is all


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A transformer of the Qwen3 architecture: that of `path` with its weights, or one of its own shape."""

    path: str = _key("", free=True)  # a Qwen3 folder or hub id, whose weights and text tokens are taken; empty: none
    random_weights: bool = False  # read only the shape from path: for tests and measurements
    # How the embeddings of tokens begin that path has not: at the mean of those it has, or N(0, 0.02).
    new_rows: Literal["mean", "normal"] = "mean"
    width: int = _key(768, low=1, high=2**16)  # without path only, as are the next seven
    depth: int = _key(12, low=1, high=2**10)
    heads: int = _key(12, low=1, high=2**10)
    kv_heads: int = _key(12, low=1, high=2**10)  # of keys and values, each for heads / kv_heads queries
    head_dim: int = _key(64, low=2, high=2**12)
    mlp_dim: int = _key(2048, low=1, high=2**18)
    tied_embeddings: bool = False  # one matrix takes tokens in and gives their logits
    rope_theta: float = _key(10_000.0, low=1.0)
    dropout: float = _key(0.0, low=0.0, high=0.9)  # of embeddings and of what each attention and MLP adds
    dtype: Literal["float32", "bfloat16"] = "float32"  # of computation; what learns and all files are float32
    # What of a block the backward pass recomputes: nothing, all but the matmuls, or everything but the block's input.
    remat: Literal["none", "minimal", "full"] = _key("minimal", free=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix:
    """What stands before an image's codes: its class's token, or its caption and a token that says an image begins."""

    kind: Literal["class", "caption"] = "class"
    longest: int = _key(64, low=1, high=2**20)  # caption: tokens of text that are kept
    drop: float = _key(0.1, low=0.0, high=1.0)  # share of images in training whose prefix is the empty one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = _key(4e-4, low=0.0)
    end_lr: float = _key(1e-4, low=0.0)
    warmup_steps: int = _key(2000, low=0)
    b1: float = _key(0.9, low=0.0, high=BELOW_ONE)
    b2: float = _key(0.999, low=0.0, high=BELOW_ONE)
    weight_decay: float = _key(1e-4, low=0.0)
    clip_norm: float = _key(1.0, low=0.0)  # of the global gradient; 0 is off
    # (path pattern, factor on lr): the first pattern that matches a whole path counts; 0 freezes.
    lr_multipliers: tuple[tuple[str, float], ...] = ()
    # The same for end_lr; where none matches, the factor on lr counts.
    end_lr_multipliers: tuple[tuple[str, float], ...] = ()
    ema_decay: float = _key(0.9999, low=0.0, high=BELOW_ONE)  # of the weights, less at the start; 0 is off


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    tensorboard: bool = _key(True, free=True)
    wandb: bool = _key(False, free=True)
    # Folder of compiled programs, which later starts read instead of compiling; empty is off.
    compilation_cache: str = _key("~/.cache/vqrae_jax/compiled", free=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What training any task reads."""

    task: str = ""  # which one it is
    seed: int = _key(0, low=0)
    mesh: Mesh = Mesh()
    train: Train = Train()
    optim: Optim = Optim()
    log: Log = Log()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Run):
    """What training a tokenizer reads."""

    task: Literal["tokenizer"] = "tokenizer"
    init_from: str = _key("", free=True)  # a run folder, or nano, whose weights to start from, read once
    data: Data = Data()
    eval: Eval = Eval()
    model: Model = Model()
    loss: Loss = Loss()
    gan: Gan = Gan()


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorConfig(Run):
    """What training a generator reads."""

    task: Literal["generator"] = "generator"
    data: CodesData = CodesData()
    eval: CodesEval = CodesEval()
    model: LanguageModel = LanguageModel()
    prefix: Prefix = Prefix()


TaskConfig = Config | GeneratorConfig
CONFIGS: Mapping[str, type[TaskConfig]] = {"tokenizer": Config, "generator": GeneratorConfig}
ConfigType = TypeVar("ConfigType", bound=Run)


def default() -> ml_collections.ConfigDict:
    """Every key of a tokenizer with its default, for a config file to change; unknown keys and types are refused."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config()))


def generator() -> ml_collections.ConfigDict:
    """The same of a generator."""
    return ml_collections.ConfigDict(dataclasses.asdict(GeneratorConfig()))


def type_of(values: ml_collections.ConfigDict | dict[str, Any]) -> type[TaskConfig]:
    """Which config a set of values is, by its key `task`; without one a tokenizer's, which was all there was once.

    Raises:
      ValueError: there is no such task.
    """
    task: Any = values["task"] if "task" in values else Config.task
    if not isinstance(task, str) or task not in CONFIGS:
        raise ValueError(f"config key task must be one of {', '.join(CONFIGS)}, not {shown(task)}")
    return CONFIGS[task]


@typing.overload
def parse(values: ml_collections.ConfigDict | dict[str, Any], config_type: type[ConfigType]) -> ConfigType: ...
@typing.overload
def parse(values: ml_collections.ConfigDict | dict[str, Any]) -> TaskConfig: ...


def parse(values: ml_collections.ConfigDict | dict[str, Any], config_type: type[Run] | None = None) -> Run:
    """Checks a complete set of values and returns it typed.

    Args:
      values: of all keys.
      config_type: which task's config is wanted; None is any.

    Raises:
      ValueError: a key is unknown, missing, of the wrong type or out of range, two keys contradict each other, or it is
        another task's.
    """
    values = _plain(values)
    config_type = config_type or type_of(values)
    if "task" in values and values["task"] != config_type.task:
        raise ValueError(f"config key task is {shown(values['task'])}, but this is for a {config_type.task}")
    config = _parse_section(config_type, values, prefix="", root=config_type)
    _check_run(config)
    if isinstance(config, Config):
        _check_tokenizer(config)
    if isinstance(config, GeneratorConfig):
        _check_generator(config)
    _check_schedules(config)
    return config


def _plain(values: Any) -> dict[str, Any]:
    if isinstance(values, ml_collections.ConfigDict):
        return values.to_dict()
    if not isinstance(values, dict):
        raise ValueError(f"a config must be an ml_collections.ConfigDict, or a dictionary, not {shown(values)}")
    return values


def load_config(file: str | os.PathLike, **changes: Any) -> TaskConfig:
    """The config of a Python file, perhaps with keys changed: `load_config("configs/x.py", **{"optim.lr": 1e-4})`.

    What the file imports from its own repository, such as `from configs import nano_stage1`, is found wherever the
    current directory is, and read anew by every call.

    Args:
      file: its path; what follows a colon are arguments for its `get_config`: `configs/ablation.py:dim=384,size=4096`.
      changes: values by dotted key.

    Raises:
      FileNotFoundError: there is no such file; the message names one of a similar name beside it.
      ValueError: it has no `get_config`, or a key is unknown, of the wrong type or out of range, or two keys
        contradict each other.
    """
    values = _plain(call_file(os.fspath(file), "get_config", "config"))
    for key, value in changes.items():
        check_key(key, type_of(values))
        *sections, last = key.split(".")
        functools.reduce(dict.__getitem__, sections, values)[last] = value
    return parse(values)


def call_file(file: str, function: str, what: str) -> Any:
    """What a function of a Python file returns, given what follows a colon behind the file's name.

    Args:
      file: its path, perhaps with arguments.
      function: `get_config` or `get_study`.
      what: the file is, in messages.

    Raises:
      FileNotFoundError: there is no such file; the message names one of a similar name beside it.
      ValueError: it fails, or defines no such function, or one without arguments.
    """
    name, colon, arguments = file.partition(":")
    check_file(name, what)
    path = Path(name).expanduser().resolve()
    with _importable(path):
        spec = importlib.util.spec_from_file_location(f"{what} {path}", path)
        if spec is None or spec.loader is None:
            raise ValueError(f"{name} is no {what} file: it must be a Python file that defines {function}()")
        module = importlib.util.module_from_spec(spec)
        with _named(name):
            spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise ValueError(f"{name} is no {what} file: it defines no {function}()")
        make = getattr(module, function)
        if colon and not inspect.signature(make).parameters:
            raise ValueError(f"{name} takes no arguments, but {shown(arguments)} follows its name")
        with _named(name):
            return make(arguments) if colon else make()


@contextlib.contextmanager
def _named(file: str) -> Iterator[None]:
    """Makes a line of whatever a file of Python raises; what is one already stays so."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError | OSError) and str(error) == one_line(error):
            raise
        raise ValueError(f"{file}: {type(error).__name__}: {one_line(error)}") from error


def check_file(name: str, what: str = "config") -> None:
    """Raises FileNotFoundError where there is no such file; the message names one of a similar name."""
    file = Path(name).expanduser()
    if file.is_file():
        return
    others = [str(other) for folder in (file.parent, Path("configs")) for other in sorted(folder.glob("*.py"))]
    near = difflib.get_close_matches(name, others, n=1)
    raise FileNotFoundError(f"there is no {what} file {name}" + (f": did you mean {near[0]}?" if near else ""))


@contextlib.contextmanager
def _importable(file: Path) -> Iterator[None]:
    """Lets a config file import from its own repository; afterwards `sys.path` and the imported modules are as before.

    The repository is the nearest folder above it with a `pyproject.toml` or `.git`, else what holds the file's folder.
    """
    root = next((folder for folder in file.parents if any((folder / name).exists() for name in (
        "pyproject.toml", ".git"))), file.parent.parent)
    package = file.relative_to(root).parts[0]
    modules = {name for name in sys.modules if name.split(".")[0] == package}
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))
        for name in [name for name in sys.modules if name.split(".")[0] == package and name not in modules]:
            del sys.modules[name]


def save(config: Run, file: Path) -> None:
    """Writes the resolved config as JSON."""
    files.write_json(file, dataclasses.asdict(config))


def load(file: Path, config_type: type[ConfigType] = Config) -> ConfigType:
    """Reads what `save` wrote; keys that came later than the file have the values by which it was made.

    Args:
      file: `config.json` in the folder of a run.
      config_type: which task's config it must be.

    Raises:
      OSError, ValueError: the file, or the key, that cannot be read; the run is of another task.
    """
    values = _read(file)
    task = values["task"] if "task" in values else Config.task  # without one of a version that had but one
    if isinstance(task, str) and task in CONFIGS and task != config_type.task:
        raise ValueError(f"{file.parent} is the run of a {task}, where that of a {config_type.task} is needed")
    try:
        return parse(_with_defaults(_earlier(config_type), values), config_type)
    except ValueError as error:
        raise ValueError(f"{file} is not the config of a run of this version: {error}") from None


def task_of(file: Path) -> str:
    """Of which task a run is, by its config.json; raises as `load` does."""
    values = _read(file)
    try:
        return type_of(values).task
    except ValueError as error:
        raise ValueError(f"{file} is not the config of a run of this version: {error}") from None


def _read(file: Path) -> dict[str, Any]:
    try:
        return files.read_json(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} does not exist: {file.parent} is not the folder of a run") from None


def _earlier(section: type) -> dict[str, Any]:
    """What each key stood for before it existed."""
    value = lambda field: field.metadata["earlier"] if field.metadata else field.default
    return {field.name: _earlier(type(field.default)) if dataclasses.is_dataclass(field.default) else value(field)
            for field in dataclasses.fields(section)}


def _with_defaults(defaults: Any, values: Any) -> Any:
    if not isinstance(defaults, dict) or not isinstance(values, dict):
        return values
    return {**defaults, **{key: _with_defaults(defaults[key], value) if key in defaults else value
                           for key, value in values.items()}}


Changes = dict[str, tuple[Any, Any]]  # by key, the old value and the new one


def differences(old: Run, new: Run) -> tuple[Changes, Changes]:
    """In what two configs of a type differ: of the keys that a run has to keep, and of those free to change."""
    changed = {key: (value_of(old, key), value_of(new, key)) for key in keys(type(old))
               if value_of(old, key) != value_of(new, key)}
    free = {key: change for key, change in changed.items() if keys(type(old))[key].free}
    return {key: change for key, change in changed.items() if key not in free}, free


class Key(typing.NamedTuple):
    """A key of a config type, for people to read.

    Attributes:
      type: `int`, `tuple of (str, float)`, ...
      range: `at least 1`, `simvq | ema`, ...; empty where anything of its type goes.
      default: its default.
      free: whether it may change when a run continues.
    """

    type: str
    range: str
    default: Any
    free: bool


@functools.cache
def keys(config_type: type[Run] = Config) -> Mapping[str, Key]:
    """Every key of a config type by its full name, in the order of declaration."""
    return dict(_keys(config_type, prefix=""))


def _keys(section: type, *, prefix: str) -> Iterator[tuple[str, Key]]:
    types = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        hint, limits = types[field.name], field.metadata
        if dataclasses.is_dataclass(hint):
            yield from _keys(typing.cast(type, hint), prefix=f"{prefix}{field.name}.")
            continue
        if typing.get_origin(hint) is Literal:
            kind, allowed = "str", " | ".join(typing.get_args(hint))
        else:
            kind = _type_name(hint)
            allowed = " | ".join(name for names in limits["among"] for name in names) if limits else ""
            allowed = allowed or (_bounds(limits["low"], limits["high"]) if limits else "")
        yield prefix + field.name, Key(kind, allowed, field.default, bool(limits) and limits["free"])


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is not tuple:
        return hint.__name__
    entries = [_type_name(entry) for entry in typing.get_args(hint) if entry is not ...]
    return f"tuple of {entries[0]}" if ... in typing.get_args(hint) else f"({', '.join(entries)})"


def _bounds(low: float | None, high: float | None) -> str:
    if high is not None:
        return f"between {low} and {high}"
    return "" if low is None else f"at least {low}"


def value_of(config: Run, key: str) -> Any:
    """The value of a key by its full name, such as `train.steps`."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def check_key(key: str, config_type: type[Run] = Config) -> None:
    """Raises ValueError where a config type has neither such a key nor a section of that name."""
    if not any(known == key or known.startswith(f"{key}.") for known in keys(config_type)):
        raise ValueError(f"unknown config key {key}: {_instead_of(key, config_type)}")


def _instead_of(key: str, config_type: type[Run]) -> str:
    """What to write instead of a key that there is not."""
    known, last = list(keys(config_type)), key.rpartition(".")[2]
    section = key.rpartition(".")[0]
    beside = [name for name in known if name.rpartition(".")[0] == section]
    initials = lambda name: "".join(word[:1] for word in name.split("_"))

    def likeness(name: str) -> tuple[bool, float]:
        other = name.rpartition(".")[2]
        related = last in other or other in last or last == initials(other) or other == initials(last)
        return related, difflib.SequenceMatcher(None, key, name).ratio()

    same = [name for name in known if name.rpartition(".")[2] == last]
    nearest = same or [max(beside if "." in key and beside else known, key=likeness)]
    there = ", ".join(beside if "." in key and beside else dict.fromkeys(name.partition(".")[0] for name in known))
    return f"did you mean {' or '.join(nearest)}? There are {there}"


@contextlib.contextmanager
def says_where(*keys: str) -> Iterator[None]:
    """Lets the error of a file that is not there or cannot be read name the flags that point to it."""
    try:
        yield
    except OSError as error:
        flags = " or ".join(f"--config.{key}=..." for key in keys)
        raise type(error)(f"{error}; {flags} says where") from error


def differing(configs: Mapping[str, Run]) -> dict[str, dict[str, Any]]:
    """Of configs of a type by name: `{name: {key: value}}` of the keys that have not the same value in all."""
    unequal = [key for key in keys(type(next(iter(configs.values()))))
               if len({value_of(config, key) for config in configs.values()}) > 1]
    return {name: {key: value_of(config, key) for key in unequal} for name, config in configs.items()}


def _parse_section(section: type, values: Any, *, prefix: str, root: type[Run]) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"config key {prefix.rstrip('.')} must hold keys, not {shown(values)}")
    fields = {field.name: field for field in dataclasses.fields(section)}
    if unknown := sorted(map(str, values.keys() - fields.keys())):
        raise ValueError(f"unknown config key {prefix}{shown(unknown[0])[1:-1]}: "
                         f"{_instead_of(prefix + unknown[0], root)}")
    if missing := sorted(fields.keys() - values.keys()):
        raise ValueError(f"config key {prefix}{missing[0]} is missing")
    types = typing.get_type_hints(section)
    return section(**{name: _parse_value(types[name], values[name], field.metadata, name=prefix + name, root=root)
                   for name, field in fields.items()})


def _parse_value(hint: Any, value: Any, limits: Mapping[str, Any], *, name: str, root: type[Run]) -> Any:
    if dataclasses.is_dataclass(hint):
        return _parse_section(typing.cast(type, hint), value, prefix=name + ".", root=root)
    value = _convert(hint, value, name=name)
    if not limits:
        return value
    if limits["among"] and not any(value in names for names in limits["among"]):
        names = [name for names in limits["among"] for name in names]
        raise ValueError(f"config key {name} must be one of {', '.join(names)}, not {shown(value)}")
    low, high = limits["low"], limits["high"]
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"config key {name} must be {_bounds(low, high)}, not {shown(value)}")
    return value


def _convert(hint: Any, value: Any, *, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"config key {name} must be one of {', '.join(arguments)}, not {shown(value)}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        hints = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(hints) != len(value):
            raise ValueError(f"config key {name} must have {len(hints)} entries, not {shown(value)}")
        return tuple(_convert(entry_hint, entry, name=name) for entry_hint, entry in zip(hints, value, strict=True))
    if type(value) is int and abs(value) >= 2**31:  # JAX counts with 32 bits
        raise ValueError(f"config key {name} must be less than 2^31, not {shown(value)}")
    if hint is float and type(value) is int:
        return float(value)
    if origin is tuple or type(value) is not hint:
        expected = "tuple" if origin is tuple else hint.__name__
        raise ValueError(f"config key {name} must be of type {expected}, not {shown(value)}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"config key {name} must be a finite number, not {value}")
    return value


def _check_run(config: Run) -> None:
    train = config.train
    if train.batch_size % train.accumulate:
        raise ValueError(f"config key train.batch_size {train.batch_size} is not divisible by "
                         f"train.accumulate {train.accumulate}")
    if 0 in (config.mesh.data, config.mesh.fsdp) or config.mesh.data == config.mesh.fsdp == -1:
        raise ValueError(f"config keys mesh.data {config.mesh.data} and mesh.fsdp {config.mesh.fsdp} must be numbers "
                         "of devices, one of them may be -1, the rest")
    _check_rates("optim", config.optim)
    for key in ("lr_multipliers", "end_lr_multipliers"):
        _check_multipliers(f"optim.{key}", getattr(config.optim, key))


_CUSTOM_SHAPE = {"custom": ("width", "depth", "heads", "mlp_dim")}


def _check_tokenizer(config: Config) -> None:
    quantizer, decoder, gan = config.model.quantizer, config.model.decoder, config.gan
    _check_kinds("model.quantizer", quantizer, quantizer.kind, {
        name: (*kind.keys, *(("init",) if kind.from_data else ())) for name, kind in QUANTIZERS.items()})
    _check_kinds("model.decoder", decoder, decoder.shape, _CUSTOM_SHAPE)
    _check_kinds("gan", gan, gan.discriminator, {name: kind.keys for name, kind in DISCRIMINATORS.items()})
    if "levels" in QUANTIZERS[quantizer.kind].keys and not quantizer.levels:
        raise ValueError("config key model.quantizer.levels is empty, but FSQ needs levels")
    for name in _CUSTOM_SHAPE["custom"]:
        if decoder.shape == "custom" and not getattr(decoder, name):
            raise ValueError(f"config key model.decoder.{name} is 0, but a custom shape needs it")
    if gan.cutout and not gan.augment:
        raise ValueError(f"config key gan.cutout {gan.cutout} has no effect without gan.augment")
    if config.model.encoder.combine != "sum" and not config.model.encoder.layers:
        raise ValueError("config key model.encoder.combine has no effect without model.encoder.layers")
    shares = sum(getattr(config.loss.perceptual, name) for name in SHARES)
    if config.loss.perceptual_weight and not shares:
        raise ValueError(f"config key loss.perceptual_weight {config.loss.perceptual_weight} needs a network: set "
                         f"{' or '.join(f'loss.perceptual.{name}' for name in SHARES)} above 0")
    if shares and not config.loss.perceptual_weight:
        raise ValueError("config key loss.perceptual_weight is 0, but loss.perceptual names a network")
    if gan.discriminator != "none":
        if gan.start_step < gan.discriminator_start_step:
            raise ValueError(f"config key gan.start_step {gan.start_step} is before gan.discriminator_start_step "
                             f"{gan.discriminator_start_step}: the decoder would learn from an untrained discriminator")
        if gan.channels % 32:
            raise ValueError(f"config key gan.channels {gan.channels} must be a multiple of 32")
        _check_rates("gan", gan)


_OWN_SHAPE = ("width", "depth", "heads", "kv_heads", "head_dim", "mlp_dim", "tied_embeddings", "rope_theta")


def _check_generator(config: GeneratorConfig) -> None:
    model, prefix = config.model, config.prefix
    _check_kinds("model", model, "a model with a path" if model.path else "one without", {
        "a model with a path": ("new_rows",), "one without": _OWN_SHAPE})
    _check_kinds("prefix", prefix, prefix.kind, {"class": (), "caption": ("longest",)})
    if prefix.kind == "caption" and not model.path:
        raise ValueError("config key prefix.kind is caption, but a text has no tokens without a Qwen3: set model.path")
    if model.heads % model.kv_heads:
        raise ValueError(f"config key model.heads {model.heads} is not divisible by model.kv_heads {model.kv_heads}")
    if model.head_dim % 2:
        raise ValueError(f"config key model.head_dim {model.head_dim} must be even: rotary positions turn pairs")


def _check_kinds(section: str, values: Any, kind: str, keys_by_kind: dict[str, tuple[str, ...]]) -> None:
    """Keys that mean something to some kinds only must keep their defaults for the others."""
    for name in dict.fromkeys(name for keys in keys_by_kind.values() for name in keys):
        kinds = [other for other, keys in keys_by_kind.items() if name in keys]
        value = getattr(values, name)
        if kind not in kinds and value != getattr(type(values)(), name):
            raise ValueError(f"config key {section}.{name} {shown(value)} has no meaning for {kind}, "
                             f"only for {' and '.join(kinds)}")


def _check_schedules(config: Run) -> None:
    """A run must be longer than what it schedules in steps; the message has the flags that make a short trial."""
    steps, optim = config.train.steps, config.optim
    shorter = {"optim.warmup_steps": steps // 10} if optim.warmup_steps >= steps else {}
    if isinstance(config, Config) and config.gan.discriminator != "none":
        gan, begins = config.gan, config.gan.discriminator_start_step
        if gan.start_step >= steps:  # the decoder would never learn from the discriminator
            shorter |= {"gan.start_step": steps // 2}
            if begins > steps // 2:
                begins = shorter["gan.discriminator_start_step"] = steps // 2
        if gan.warmup_steps >= steps - begins:
            shorter |= {"gan.warmup_steps": (steps - begins) // 10}
    if shorter:
        too_long = ", ".join(f"{key} {value_of(config, key)}" for key in shorter)
        flags = " ".join(f"--config.{key}={value}" for key, value in shorter.items())
        raise ValueError(f"config key{'s' if len(shorter) > 1 else ''} {too_long} must be below train.steps {steps}, "
                         f"or what is left of them: for a short run add {flags}")


def _check_rates(section: str, values: Optim | Gan) -> None:
    if values.end_lr > values.lr:
        raise ValueError(f"config key {section}.end_lr {values.end_lr} must not exceed {section}.lr {values.lr}")


def _check_multipliers(key: str, multipliers: tuple[tuple[str, float], ...]) -> None:
    for pattern, factor in multipliers:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"config key {key}: {shown(pattern)} is not a pattern: {error}") from None
        if factor < 0:
            raise ValueError(f"config key {key}: {shown(pattern)} has the negative factor {factor}")
