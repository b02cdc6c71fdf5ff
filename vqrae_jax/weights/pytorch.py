"""Checkpoints of the PyTorch code base hugoycj/RAE: VQRAE and RAE models, and RAE's decoders alone.

Its tensors are described as data: our module -> theirs, with sizes as letters. The sizes, the kind of quantizer and
all else that tensors determine is read off them; every tensor of a file is accounted for.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vqrae_jax.models.decoder import sincos_positions
from vqrae_jax.models.vit import FinalNorm
from vqrae_jax.weights import huggingface, tensors
from vqrae_jax.weights.huggingface import EncoderSpec, Params
from vqrae_jax.weights.tensors import Tensors

# Its wrappers strip the last LayerNorm of scale and bias, but for these families, where they do not find it.
_AFFINE = ("dinov3_vit",)

# In memory, and so in such a checkpoint, transformers 5 names some modules otherwise than in its own files.
_DINOV2_NAMES = {"attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
                 "attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense"}
_MAE_NAMES = _DINOV2_NAMES | {"layers.": "encoder.layer.", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
_NAMES = {"dinov2": _DINOV2_NAMES, "dinov2_with_registers": _DINOV2_NAMES, "vit_mae": _MAE_NAMES}

# Sizes: d of latents, w of the decoder, m of its MLP, t its tokens with cls, p pixel values a token, k codes,
# c coordinates of an FSQ code, h hidden in its adapter, f Fourier frequencies and 2f both sines and cosines.
Shape = tuple[str, ...]
_FIXED = {"h": 512, "f": 128, "2f": 256}  # the same in every model of that system
# Our module -> (theirs, size of the input, size of the output); a LayerNorm has no input; several are concatenated.
Layers = dict[str, tuple[str | tuple[str, ...], str, str]]

_DECODER: Layers = {
    "embedding": ("decoder_embed", "d", "w"),
    "transformer/norm": ("decoder_norm", "", "w"),
    "pixels": ("decoder_pred", "w", "p"),
}
_BLOCK: Layers = {
    "norm1": ("layernorm_before", "", "w"),
    "norm2": ("layernorm_after", "", "w"),
    "attention/qkv": (tuple(f"attention.attention.{x}" for x in ("query", "key", "value")), "w", "w"),
    "attention/out": ("attention.output.dense", "w", "w"),
    "mlp/fc1": ("intermediate.dense", "w", "m"),
    "mlp/fc2": ("output.dense", "m", "w"),
}
_DECODER_TENSORS: dict[str, Shape] = {"decoder_pos_embed": ("1", "t", "w"), "trainable_cls_token": ("1", "1", "w")}
_STATISTICS = {"latent_mean": 0, "latent_var": 1}  # where one of them is absent

_WRAPPERS = {"module", "_orig_mod"}  # what DistributedDataParallel and torch.compile put into names
_MODELS = ("ema", "model")  # of a training checkpoint, the one to prefer first
_TRAINING = {"optimizer", "scheduler", "disc", "disc_optimizer", "disc_scheduler", "step", "epoch"}
EMA_EPS = 1e-5  # of the smoothed counts, there as here


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantizer:
    """One kind of quantizer of that system.

    Attributes:
      title: its name for people.
      marks: pattern of tensor names that tell it from those after it in `QUANTIZERS`.
      tensors: those that are not layers.
      layers: our modules below `quantizer/`.
      optional: what names begin with of which all or none may be there.
      arrays: tensors -> further parameters, and state, below `quantizer/`.
      values: tensors -> values of the config section model.quantizer.
    """

    title: str
    marks: str
    tensors: dict[str, Shape]
    layers: Layers = dataclasses.field(default_factory=dict)
    optional: tuple[str, ...] = ()
    arrays: Callable[[Tensors], tuple[Params, Params]]
    values: Callable[[Tensors], dict[str, Any]]


def _size_of(codebook: np.ndarray) -> dict[str, int]:
    return {"size": codebook.shape[0], "dim": codebook.shape[1]}


def _consistent_ema(codebook: np.ndarray, counts: np.ndarray) -> Params:
    """The state of an `EMAVQ` whose next update leaves unused codes where they are.

    The codebook is the truth: codes that (almost) never were used get the count 1, for that system starts counts at 0,
    and its next update would divide their sums by next to nothing; then sums follow from codes and smoothed counts.
    """
    counts = np.where(counts < 100 * EMA_EPS, np.float32(1), counts)
    total = counts.sum(dtype=np.float64)
    smoothed = (counts + EMA_EPS) / (total + len(counts) * EMA_EPS) * total
    return {"codebook": codebook, "counts": counts, "sums": (codebook * smoothed[:, None]).astype(np.float32)}


def _levels(scales: np.ndarray) -> tuple[int, ...]:
    return tuple(int(level) for level in np.round(2 * scales + 1))


_FSQ = Quantizer(
    title="FSQ between two MLPs",
    marks=r"fsq_.*|quantizer\.(scales|basis|codebook)",
    tensors={"quantizer.codebook": ("k", "c"), "quantizer.basis": ("c",), "quantizer.scales": ("c",),
             "fsq_projection.post_gain": ("c",), "fsq_unprojection.fourier.B": ("c", "f")},
    layers={
        "project_in/norm": ("fsq_projection.norm", "", "d"),
        "project_in/fc1": ("fsq_projection.net.0", "d", "h"),
        "project_in/fc2": ("fsq_projection.net.2", "h", "h"),
        "project_in/fc3": ("fsq_projection.net.4", "h", "c"),
        "project_out/fc1": ("fsq_unprojection.mlp.0", "2f", "d"),
        "project_out/norm1": ("fsq_unprojection.mlp.1", "", "d"),
        "project_out/fc2": ("fsq_unprojection.mlp.3", "d", "d"),
        "project_out/norm2": ("fsq_unprojection.mlp.4", "", "d"),
        "project_out/fc3": ("fsq_unprojection.mlp.6", "d", "d"),
    },
    arrays=lambda t: ({"project_in/gain": t["fsq_projection.post_gain"]},
                      {"project_out/frequencies": t["fsq_unprojection.fourier.B"]}),
    values=lambda t: {"kind": "adapter_fsq", "levels": _levels(t["quantizer.scales"]),
                      **_size_of(t["quantizer.codebook"])},
)
_SIMVQ = Quantizer(
    title="SimVQ",
    marks=r"quantizer\.(embedding\.weight|embedding_proj\..*|z_proj\..*|l2_norm_scale)",
    tensors={"quantizer.embedding.weight": ("k", "d"), "quantizer.ema_cluster_size": ("k",),
             "quantizer.l2_norm_scale": ()},
    layers={"projection": ("quantizer.embedding_proj", "d", "d"), "project_in": ("quantizer.z_proj", "d", "d")},
    optional=("quantizer.z_proj.", "quantizer.l2_norm_scale"),
    arrays=lambda t: ({}, {"codebook": t["quantizer.embedding.weight"]}),
    values=lambda t: {"kind": "simvq", "input_projection": "quantizer.z_proj.weight" in t,
                      **_size_of(t["quantizer.embedding.weight"])},
)
_OLD_SIMVQ = Quantizer(
    title="the first SimVQ, whose projections only rank codes",
    marks=r"quantizer\.(input_proj|codebook_proj)\..*",
    tensors={"quantizer.embedding": ("k", "d"), "quantizer.input_proj.weight": ("d", "d"),
             "quantizer.codebook_proj.weight": ("d", "d"), "quantizer.ema_cluster_size": ("k",),
             "quantizer.ema_w": ("k", "d")},
    arrays=lambda t: ({}, {"codebook": t["quantizer.embedding"], "queries": t["quantizer.input_proj.weight"].T,
                           "keys": t["quantizer.embedding"] @ t["quantizer.codebook_proj.weight"].T}),
    values=lambda t: {"kind": "ranked", **_size_of(t["quantizer.embedding"])},
)
_EMA_VQ = Quantizer(
    title="EMA VQ",
    marks=r"quantizer\..*",
    tensors={"quantizer.embedding": ("k", "d"), "quantizer.ema_cluster_size": ("k",), "quantizer.ema_w": ("k", "d")},
    arrays=lambda t: ({}, _consistent_ema(t["quantizer.embedding"], t["quantizer.ema_cluster_size"])),
    values=lambda t: {"kind": "ema", **_size_of(t["quantizer.embedding"])},
)
_NONE = Quantizer(
    title="no quantizer",
    marks=r".*",
    tensors={},
    arrays=lambda t: ({}, {}),
    values=lambda t: {"kind": "none"},
)
QUANTIZERS = (_FSQ, _SIMVQ, _OLD_SIMVQ, _EMA_VQ, _NONE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported:
    """A model from a checkpoint.

    Attributes:
      params: `{path: float32 array}` of all the model's parameters.
      buffers: the same of its buffers.
      quantizer: values of the config section model.quantizer.
      decoder: values of the config section model.decoder.
      latent_statistics: value of model.latent_statistics.
      final_norm: value of model.encoder.final_norm.
      input_size: value of model.encoder.input_size.
      image_size: value of data.image_size.
      notes: what was found, one line each, for people.
    """

    params: Params
    buffers: Params
    quantizer: dict[str, Any]
    decoder: dict[str, Any]
    latent_statistics: bool
    final_norm: FinalNorm
    input_size: int
    image_size: int
    notes: tuple[str, ...]


def read_model(file: Path, *, encoder: str, decoder_heads: int, encoder_norm: FinalNorm | None = None,
               latent_statistics: Path | None = None, simvq_l2_norm: bool | None = None) -> Imported:
    """Reads a VQRAE or RAE checkpoint, or an RAE decoder.

    Args:
      file: `.safetensors`, or what `torch.save` wrote: the model's tensors, or a training checkpoint, of which the
        moving average is taken where there is one.
      encoder: Hugging Face folder or hub id of the encoder; its weights are read only if the file has none of its own.
      decoder_heads: attention heads of the decoder, which no tensor tells.
      encoder_norm: whether the encoder's last LayerNorm has scale and bias; None is what the file says, or `plain`.
      latent_statistics: a PyTorch file with the tensors `mean` and `var`, or one of them.
      simvq_l2_norm: whether codes and tokens of a SimVQ are divided by their lengths; None is yes where the model knows
        of that, for that system has always done so since.

    Raises:
      OSError: a file is missing, damaged or not to be trusted.
      ValueError: a tensor is missing, unknown or of another shape, or an argument contradicts the file.
    """
    spec = huggingface.read_encoder_spec(encoder)
    found, notes = _model_tensors(file)
    of_encoder = {name: found.pop(name) for name in list(found) if name.startswith("encoder.")}
    quantizer = next((q for q in QUANTIZERS if any(re.fullmatch(q.marks, name) for name in found)), _NONE)
    prefix = "" if any(name.startswith(("decoder_", "trainable_cls_token")) for name in found) else "decoder."
    blocks = prefix + "decoder_layers."
    depth = len({name.removeprefix(blocks).split(".")[0] for name in found if name.startswith(blocks)})

    statistics = {name: found.pop(name) for name in _STATISTICS if name in found}
    shapes = _decoder_shapes(prefix, depth) | _quantizer_shapes(quantizer, found)
    sizes = _check(found, shapes, file)
    if sizes["d"] != spec.vit.width:
        raise ValueError(f"{file}: tensor {prefix}decoder_embed.weight takes tokens of width {sizes['d']}, but the "
                         f"encoder {encoder} makes {spec.vit.width}: give --encoder the one it was trained with")
    grid = _side(sizes["t"] - 1, f"{file}: tensor {prefix}decoder_pos_embed has {sizes['t'] - 1} tokens besides cls")
    patch_size = _side(sizes["p"] / 3, f"{file}: tensor {prefix}decoder_pred.bias has {sizes['p']} values, 3 a pixel")
    if sizes["w"] % decoder_heads:
        raise ValueError(f"--decoder-heads={decoder_heads} does not divide the decoder's width {sizes['w']}")
    if latent_statistics and statistics:
        raise ValueError(f"{file} holds latent statistics of its own: leave out --latent-stats")
    statistics = _statistics(latent_statistics, file, statistics, width=sizes["d"], grid=grid)

    input_size = grid * spec.vit.patch_size
    if of_encoder:
        final_norm, params = _encoder(of_encoder, spec, grid=grid, file=file)
        if encoder_norm not in (None, final_norm):
            raise ValueError(f"--encoder-norm={encoder_norm} contradicts {file}, whose encoder's last LayerNorm has "
                             f"{'a' if final_norm == 'affine' else 'no'} scale and bias: leave it out")
        notes.append(f"encoder: weights of {file}, final norm {final_norm}")
    else:
        final_norm = encoder_norm or ("affine" if spec.model_type in _AFFINE else "plain")
        params = huggingface.load_encoder_params(encoder, image_size=input_size, final_norm=final_norm)
        notes.append(f"encoder: weights of {encoder}, for {file} has none; final norm {final_norm}")
    params = {f"encoder/{path}": value for path, value in params.items()}

    decoder, learned_positions = _decoder(found, prefix, depth=depth, grid=grid)
    params |= decoder
    layers = {ours: layer for ours, layer in quantizer.layers.items() if f"{layer[0]}.weight" in found}
    more, buffers = quantizer.arrays(found)
    more |= _arrays(layers, found, prefix="")
    values = quantizer.values(found)
    if quantizer is _FSQ:
        _check_fsq(found, file)
    if quantizer is _SIMVQ:
        values["l2_normalize"], how = _l2_normalize(found, simvq_l2_norm, file)
        notes.append(f"quantizer: SimVQ {how}, {values['size']} codes of width {values['dim']}, "
                     f"{'with' if values['input_projection'] else 'without'} input projection")
    elif simvq_l2_norm is not None:
        raise ValueError(f"--simvq-l2-norm has no meaning for {file}, which has {quantizer.title}")
    else:
        notes.append(f"quantizer: {quantizer.title}" + (f", {values['size']} codes" if buffers else ""))
    shape = {"width": sizes["w"], "depth": depth, "heads": decoder_heads, "mlp_dim": sizes["m"]}
    notes.append(f"decoder: {', '.join(f'{name} {value}' for name, value in shape.items())}; {grid}x{grid} tokens of "
                 f"{patch_size}x{patch_size} pixels, {'learned' if learned_positions else 'sin-cos'} positions"
                 f"{', latent statistics' if statistics else ''}")
    return Imported(
        params=params | {f"quantizer/{path}": value for path, value in more.items()},
        buffers={f"quantizer/{path}": value for path, value in buffers.items()} | statistics,
        quantizer=values,
        decoder={"shape": "custom", "patch_size": patch_size, "cls_token": True,
                 "learned_positions": learned_positions, **shape},
        latent_statistics=bool(statistics), final_norm=final_norm, input_size=input_size,
        image_size=grid * patch_size, notes=tuple(notes))


def _model_tensors(file: Path) -> tuple[Tensors, list[str]]:
    """The tensors of one model, by the names that its own class gives them, and notes on the choice."""
    found, notes = {}, []
    for name, tensor in tensors.read(file).items():
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if plain in found:
            raise ValueError(f"{file}: tensor {plain} is there twice, once as {name}")
        found[plain] = tensor
    groups: dict[str, Tensors] = {}
    for name, tensor in found.items():
        group, _, rest = name.partition(".")
        groups.setdefault(group, {})[rest] = tensor
    models = [group for group in _MODELS if group in groups]
    if not models:
        return found, notes
    if unknown := sorted(groups.keys() - {*_MODELS, *_TRAINING}):
        name = f"{unknown[0]}.{next(iter(groups[unknown[0]]))}"
        raise ValueError(f"{file}: tensor {name} is unexpected in the checkpoint of a training run")
    chosen = groups[models[0]]
    notes.append(f"weights: {'their moving average' if models[0] == 'ema' else 'as trained'} ({models[0]} in {file})")
    # One trainer of that system averages parameters only: its averaged model keeps the codebook it was created with.
    buffers = codes, counts, sums = "quantizer.embedding", "quantizer.ema_cluster_size", "quantizer.ema_w"
    if len(models) == 2 and all(name in groups[model] for name in buffers for model in models):
        as_created = not chosen[counts].any() and np.array_equal(chosen[codes], chosen[sums])
        if as_created and groups["model"][counts].any():
            chosen |= {name: groups["model"][name] for name in buffers}
            notes.append("codebook: that of the trained model, for the averaged model's was never updated")
    return chosen, notes


def _decoder_shapes(prefix: str, depth: int) -> dict[str, Shape]:
    shapes = {prefix + name: shape for name, shape in _DECODER_TENSORS.items()} | _layer_shapes(_DECODER, prefix)
    for i in range(max(depth, 1)):
        shapes |= _layer_shapes(_BLOCK, f"{prefix}decoder_layers.{i}.")
    return shapes


def _quantizer_shapes(quantizer: Quantizer, found: Iterable[str]) -> dict[str, Shape]:
    shapes = quantizer.tensors | _layer_shapes(quantizer.layers, "")
    absent = tuple(group for group in quantizer.optional if not any(name.startswith(group) for name in found))
    return {name: shape for name, shape in shapes.items() if not name.startswith(absent)}


def _layer_shapes(layers: Layers, prefix: str) -> dict[str, Shape]:
    shapes = {}
    for names, inputs, outputs in layers.values():
        for name in (names,) if isinstance(names, str) else names:
            shapes |= {f"{prefix}{name}.weight": (outputs, inputs) if inputs else (outputs,),
                       f"{prefix}{name}.bias": (outputs,)}
    return shapes


def _check(found: Tensors, shapes: Mapping[str, Shape], file: Path) -> dict[str, int]:
    """The sizes that most tensors agree on; a ValueError names a tensor that is missing, unknown or of another size."""
    for names, fault in ((shapes.keys() - found.keys(), "is missing"), (found.keys() - shapes.keys(), "is unexpected")):
        if names:
            first, *others = sorted(names)
            raise ValueError(f"{file}: tensor {first} {fault}" + (f", and {len(others)} more" if others else ""))
    votes: dict[str, Counter] = {}
    for name, shape in shapes.items():
        if found[name].ndim == len(shape):
            for letter, size in zip(shape, found[name].shape, strict=True):
                votes.setdefault(letter, Counter())[size] += 1
    sizes = {letter: count.most_common(1)[0][0] for letter, count in votes.items()} | _FIXED | {"1": 1}
    for name, shape in shapes.items():
        expected = tuple(sizes.get(letter, 0) for letter in shape)
        if found[name].shape != expected:
            raise ValueError(f"{file}: tensor {name} has shape {found[name].shape}, but {expected} fits the others")
    return sizes


def _side(area: float, what: str) -> int:
    side = round(area**0.5)
    if side**2 != area:
        raise ValueError(f"{what}, which is no square")
    return side


def _arrays(layers: Layers, found: Tensors, *, prefix: str) -> Params:
    arrays = {}
    for ours, (names, inputs, _) in layers.items():
        names = (names,) if isinstance(names, str) else names
        weight, bias = (np.concatenate([found[f"{prefix}{name}.{leaf}"] for name in names])
                        for leaf in ("weight", "bias"))
        arrays |= {f"{ours}/kernel": weight.T} if inputs else {f"{ours}/scale": weight}
        arrays[f"{ours}/bias"] = bias
    return arrays


def _decoder(found: Tensors, prefix: str, *, depth: int, grid: int) -> tuple[Params, bool]:
    """The decoder's parameters, and whether its positions are others than the fixed ones."""
    params = _arrays(_DECODER, found, prefix=prefix)
    blocks = [_arrays(_BLOCK, found, prefix=f"{prefix}decoder_layers.{i}.") for i in range(depth)]
    params |= {f"transformer/blocks/{path}": np.stack([block[path] for block in blocks]) for path in blocks[0]}
    cls_position, positions = np.split(found[f"{prefix}decoder_pos_embed"][0], [1])
    params["cls"] = found[f"{prefix}trainable_cls_token"][0] + cls_position
    learned = bool(np.abs(positions - sincos_positions(positions.shape[1], grid)).max() > 1e-5)
    if learned:
        params["position_embedding"] = positions
    return {f"decoder/{path}": value for path, value in params.items()}, learned


def _check_fsq(found: Tensors, file: Path) -> None:
    levels = _levels(found["quantizer.scales"])
    digits = np.indices(levels).reshape(len(levels), -1).T
    codes = digits - (np.array(levels) - 1) / 2
    basis = np.cumprod([1, *levels[:0:-1]])[::-1]
    # Loosely, for averaging a constant buffer for many steps makes it drift by some 1e-4.
    for name, expected in (("quantizer.codebook", codes), ("quantizer.basis", basis),
                           ("quantizer.scales", (np.array(levels) - 1) / 2)):
        if found[name].shape != expected.shape or np.abs(found[name] - expected).max() > 1e-2:
            raise ValueError(f"{file}: tensor {name} is not that of levels {levels}, which quantizer.scales gives")


def _l2_normalize(found: Tensors, wanted: bool | None, file: Path) -> tuple[bool, str]:
    if "quantizer.l2_norm_scale" not in found:
        if wanted:
            raise ValueError(f"--simvq-l2-norm contradicts {file}: a SimVQ without tensor quantizer.l2_norm_scale is "
                             "Euclidean")
        return False, "with Euclidean codes (it has no quantizer.l2_norm_scale)"
    if wanted is False:
        return False, "with Euclidean codes, as --nosimvq-l2-norm says"
    scale = float(found["quantizer.l2_norm_scale"])
    if not scale > 0:
        raise ValueError(f"{file}: tensor quantizer.l2_norm_scale is {scale}, with which the farthest code wins")
    return True, "with codes of length 1" + ("" if wanted else " (assumed: give --nosimvq-l2-norm if it has others)")


def _statistics(stats_file: Path | None, file: Path, statistics: Tensors, *, width: int, grid: int) -> Params:
    """`latent_mean` and `latent_var` `[N, d]`; nothing if neither file has any."""
    if stats_file:
        file, found = stats_file, tensors.read(stats_file)
        if unknown := sorted(found.keys() - {"mean", "var"}):
            raise ValueError(f"{file}: unexpected tensor {unknown[0]}: latent statistics are mean and var")
        if not found:
            raise ValueError(f"{file} holds neither a tensor mean nor var")
        statistics = {f"latent_{name}": value for name, value in found.items()}
    if not statistics:
        return {}
    arrays = {name: np.full((grid**2, width), value, np.float32) for name, value in _STATISTICS.items()}
    for name, value in statistics.items():
        try:
            square = np.broadcast_to(value, (1, width, grid, grid))
        except ValueError:
            raise ValueError(f"{file}: tensor {name.removeprefix('latent_') if stats_file else name} has shape "
                             f"{value.shape}, which does not fit latents of shape {(width, grid, grid)}") from None
        arrays[name] = square.reshape(width, -1).T.astype(np.float32)
    return arrays


def _encoder(found: Tensors, spec: EncoderSpec, *, grid: int, file: Path) -> tuple[FinalNorm, Params]:
    """The encoder of a model whose encoder learned, for its grid; a last LayerNorm without tensors is plain."""
    family = huggingface.FAMILIES[spec.model_type]
    wrapper = "encoder.model." if any(name.startswith("encoder.model.") for name in found) else "encoder.encoder."
    if not (norm := huggingface.final_norm_tensors(spec)):
        raise ValueError(f"{file}: no encoder of that system is an {family.architecture}: give --encoder the one it "
                         "was trained with")
    by_key = {}
    for name, tensor in found.items():
        key = name.removeprefix(wrapper).removeprefix(family.prefix)
        for in_memory, in_file in _NAMES.get(spec.model_type, {}).items():
            key = key.replace(in_memory, in_file)
        by_key[key] = (f"{file}: tensor {name}", tensor)
    final_norm: FinalNorm = "affine" if by_key.keys() & norm else "plain"
    return final_norm, huggingface.params_from_tensors(
        by_key, spec, image_size=grid * spec.vit.patch_size, final_norm=final_norm,
        origin=f"{file}: tensor {wrapper}")
