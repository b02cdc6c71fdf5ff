"""Weights of the DINO discriminator from PyTorch: the published ViT, and heads that the PyTorch system has trained."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vqrae_jax.models.discriminators import Backbone
from vqrae_jax.models.vit import ViTSpec
from vqrae_jax.weights import tensors

Params = dict[str, np.ndarray]

# Our modules -> theirs; `{}` is the block's number, several names are concatenated. First the layout of the original
# release and of timm, then that of `transformers`.
_ORIGINAL: dict[str, tuple[str, ...]] = {
    "cls": ("cls_token",),
    "positions": ("pos_embed",),
    "patch_embedding": ("patch_embed.proj",),
    "norm1": ("blocks.{}.norm1",),
    "attention/qkv": ("blocks.{}.attn.qkv",),
    "attention/out": ("blocks.{}.attn.proj",),
    "norm2": ("blocks.{}.norm2",),
    "mlp/fc1": ("blocks.{}.mlp.fc1",),
    "mlp/fc2": ("blocks.{}.mlp.fc2",),
}
_TRANSFORMERS: dict[str, tuple[str, ...]] = {
    "cls": ("embeddings.cls_token",),
    "positions": ("embeddings.position_embeddings",),
    "patch_embedding": ("embeddings.patch_embeddings.projection",),
    "norm1": ("encoder.layer.{}.layernorm_before",),
    "attention/qkv": tuple(f"encoder.layer.{{}}.attention.attention.{x}" for x in ("query", "key", "value")),
    "attention/out": ("encoder.layer.{}.attention.output.dense",),
    "norm2": ("encoder.layer.{}.layernorm_after",),
    "mlp/fc1": ("encoder.layer.{}.intermediate.dense",),
    "mlp/fc2": ("encoder.layer.{}.output.dense",),
}
_UNUSED_BY_FEATURES = r"(norm|fc_norm|layernorm|head|pooler|classifier)\..*"

# Parts of one of our heads -> theirs.
_HEAD_CONVS = {"conv1": "0.0", "conv2": "1.fn.0", "logits": "2"}
_HEAD_NORMS = {"norm1": "0.1", "norm2": "1.fn.1"}


class _Tensors:
    """The tensors of a file, each to be taken once, by name and expected shape."""

    def __init__(self, file: Path, found: tensors.Tensors):
        self.file, self._left = file, dict(found)

    def names(self) -> list[str]:
        return sorted(self._left)

    def take(self, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """Raises ValueError where the tensor is missing or has another shape; None stands for any length."""
        if name not in self._left:
            raise ValueError(f"{self.file}: tensor {name} is missing")
        value = self._left.pop(name)
        if len(value.shape) != len(shape) or any(b not in (a, None) for a, b in zip(value.shape, shape, strict=True)):
            expected = str(tuple(shape)).replace("None", "*")
            raise ValueError(f"{self.file}: tensor {name} has shape {value.shape}, but {expected} is needed")
        return value

    def refuse_rest(self, *, unused: str) -> None:
        """Raises ValueError where a tensor is left whose name does not match `unused`."""
        for name in self.names():
            if not re.fullmatch(unused, name):
                raise ValueError(f"{self.file}: unexpected tensor {name}, which this network does not have")


def _nested(found: tensors.Tensors, entry: str, *prefixes: str) -> tensors.Tensors:
    """The tensors below `entry`, where a checkpoint holds it beside others, with each of `prefixes` removed in turn."""
    if any(name.startswith(entry) for name in found):
        found = {name.removeprefix(entry): value for name, value in found.items() if name.startswith(entry)}
    for prefix in prefixes:
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def load_dino_backbone(path_or_id: str | Path, *, spec: ViTSpec, image_size: int) -> Params:
    """Reads a published DINO ViT for a `DinoDiscriminator` at `image_size`.

    Position embeddings are resampled bilinearly to the run's grid, as RAE's discriminator does it (the family's
    `transformers` model would do it bicubically). RAE zeroes the keys' bias; that changes no softmax, so it is kept.

    Args:
      path_or_id: a file, a folder, or the id of a hub model. The layout is that of DINO's own release (also of its
        full checkpoints, of which the teacher is read) and timm, or that of `transformers`.
      spec: the shape of the ViT.
      image_size: side of the images the ViT will see.

    Returns:
      {path: float32 array}, the paths being those of `flat.split(DinoDiscriminator(...))` that start with `backbone/`.

    Raises:
      OSError: there is no such file; the message says how to get it. Or it is damaged.
      ValueError: a tensor is missing, has another shape than spec implies, or has no known use.
    """
    try:
        file = tensors.local_file(path_or_id)
    except OSError as error:
        name = f"dino_deitsmall{spec.patch_size}_pretrain"
        raise OSError(f"no DINO weights at {path_or_id}: run `hf download facebook/dino-vits{spec.patch_size}` and "
                      f"give that id, or `curl -O https://dl.fbaipublicfiles.com/dino/{name}/{name}.pth` and give that "
                      f"file ({error})") from error
    shape = f"{spec.width}x{spec.depth}-patch{spec.patch_size}-{image_size}"
    params = tensors.cached(file, lambda file: _read_backbone(file, spec, image_size), name=f"dino-{shape}")
    return {f"backbone/{path}": value for path, value in params.items()}


def _read_backbone(file: Path, spec: ViTSpec, image_size: int) -> Params:
    found = _nested(tensors.read(file), "teacher.", "module.", "backbone.", "vit.")
    source = _Tensors(file, found)
    names = _TRANSFORMERS if any(name.startswith("embeddings.") for name in found) else _ORIGINAL
    width, patch = spec.width, spec.patch_size

    def dense(path: str, block: int, outputs: int, inputs: int) -> Params:
        sources = [name.format(block) for name in names[path]]
        outputs //= len(sources)
        return {f"{path}/kernel": np.concatenate([source.take(f"{x}.weight", (outputs, inputs)) for x in sources]).T,
                f"{path}/bias": np.concatenate([source.take(f"{x}.bias", (outputs,)) for x in sources])}

    def norm(path: str, block: int) -> Params:
        name = names[path][0].format(block)
        return {f"{path}/scale": source.take(f"{name}.weight", (width,)),
                f"{path}/bias": source.take(f"{name}.bias", (width,))}

    blocks = [norm("norm1", i) | dense("attention/qkv", i, 3 * width, width) | dense("attention/out", i, width, width) |
              norm("norm2", i) | dense("mlp/fc1", i, spec.mlp_dim, width) | dense("mlp/fc2", i, width, spec.mlp_dim)
              for i in range(spec.depth)]
    (patches,), (cls,), (positions,) = (names[x] for x in ("patch_embedding", "cls", "positions"))
    table = source.take(positions, (1, None, width))[0]
    side = round((len(table) - 1) ** 0.5)
    if side**2 + 1 != len(table):
        raise ValueError(f"{file}: tensor {positions} has {len(table)} positions, not those of cls and of a square")
    kernel = source.take(f"{patches}.weight", (width, 3, patch, patch))
    params = {
        "patch_embedding/kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, width),
        "patch_embedding/bias": source.take(f"{patches}.bias", (width,)),
        "position_embedding": _resample(table[1:].reshape(side, side, width), image_size // patch),
        "prefix": source.take(cls, (1, 1, width))[0] + table[:1],
        **{f"transformer/blocks/{path}": np.stack([block[path] for block in blocks]) for path in blocks[0]},
    }
    source.refuse_rest(unused=_UNUSED_BY_FEATURES)
    return params


def _resample(positions: np.ndarray, grid: int) -> np.ndarray:
    """`[n, n, d] -> [grid*grid, d]`, as torch's bilinear `interpolate(align_corners=False)`."""
    width = positions.shape[-1]
    if positions.shape[0] != grid:
        positions = np.asarray(jax.image.resize(positions, (grid, grid, width), "bilinear", antialias=False))
    return positions.reshape(grid * grid, width)


def load_dino_heads(file: str | Path) -> tuple[Params, Params]:
    """Reads the heads of a discriminator that the PyTorch system has trained.

    Args:
      file: the discriminator's state dict, or a training checkpoint that holds it under "disc".

    Returns:
      {path: float32 array} twice: parameters, and the spectral norms' vectors. The paths are those of
      `flat.split(DinoDiscriminator(...))` that start with `heads/`; number, width and kernel size are the file's.

    Raises:
      OSError: there is no such file, or it is damaged.
      ValueError: a tensor is missing, does not fit the others, or has no known use.
    """
    file = Path(file).expanduser()
    source = _Tensors(file, _nested(tensors.read(file), "disc.", "module."))
    numbers = [int(match[1]) for name in source.names() if (match := re.match(r"heads\.(\d+)\.", name))]
    params, state = {}, {}
    width, wide = None, None  # the first head's tensors settle both
    for i in range(max(numbers, default=0) + 1):
        for layer, name in _HEAD_CONVS.items():
            ours, theirs = f"heads/{i}/{layer}", f"heads.{i}.{name}"
            outputs, taps = (1 if layer == "logits" else width), (wide if layer == "conv2" else 1)
            weight = source.take(f"{theirs}.weight_orig", (outputs, width, taps))
            outputs, width, taps = weight.shape
            wide = taps if layer == "conv2" else wide
            params[f"{ours}/kernel"] = weight.transpose(2, 1, 0)
            params[f"{ours}/bias"] = source.take(f"{theirs}.bias", (outputs,))
            state[f"{ours}/u"] = source.take(f"{theirs}.weight_u", (outputs,))
            vector = source.take(f"{theirs}.weight_v", (width * taps,))
            # Theirs goes channel by channel, ours tap by tap.
            state[f"{ours}/v"] = vector.reshape(width, taps).T.reshape(-1)
        for layer, name in _HEAD_NORMS.items():
            params[f"heads/{i}/{layer}/scale"] = source.take(f"heads.{i}.{name}.weight", (width,))
            params[f"heads/{i}/{layer}/bias"] = source.take(f"heads.{i}.{name}.bias", (width,))
    source.refuse_rest(unused="")
    return params, state


def _load_dino(gan: Any, backbone: Backbone) -> tuple[Params, Params]:
    params, buffers = {}, {}
    if not gan.random_weights:
        spec = backbone.spec
        params |= load_dino_backbone(gan.backbone or f"facebook/dino-vits{spec.patch_size}", spec=spec,
                                     image_size=backbone.image_size)
    if gan.heads:
        heads, head_buffers = load_dino_heads(gan.heads)
        params, buffers = params | heads, buffers | head_buffers
    return params, buffers


# By the names of `models.discriminators.DISCRIMINATORS`, of those that start from weights: the config's section `gan`
# and the frozen ViT -> parameters and buffers.
LOADERS: dict[str, Callable[[Any, Backbone], tuple[Params, Params]]] = {"dino_s8": _load_dino, "dino_s16": _load_dino}
