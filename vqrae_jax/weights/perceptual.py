"""Weights of the perceptual networks from PyTorch: VGG16 with LPIPS's 1x1 weights, and ConvNeXt-S.

The same network is published under different names. A layout is data: their name of each of our modules. Which one a
file has is read off its tensors.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from vqrae_jax.models.perceptual import CONVNEXT_SMALL, LPIPS, ConvNeXt, ConvNeXtSpec
from vqrae_jax.weights import tensors

Params = dict[str, np.ndarray]

# From version 0.1 of the lpips package, under its own names; its licence lies beside it.
LPIPS_WEIGHTS = Path(__file__).parents[1] / "assets" / "lpips_v0.1.safetensors"
_WEIGHT = "lin{}.model.1.weight"

# The numbers of VGG16's convolutions in torchvision's `features`, ReLUs and poolings being counted too, by stage.
_VGG16_NUMBERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
# The first tensor, and the name of each. torchvision and timm; the lpips package and taming-transformers.
_VGG16_LAYOUTS = {"features.0.weight": "features.{number}", "net.slice1.0.weight": "net.slice{slice}.{number}"}
# Classifiers; the constants of LPIPS, and a second copy of its 1x1 weights that the package saves.
_VGG16_UNUSED = r"(classifier|pre_logits|head|scaling_layer|lins)\..*"


def load_lpips(vgg16: str, linear: str = "") -> Params:
    """Reads the weights of `LPIPS`.

    Args:
      vgg16: a file, a folder, or the id of a hub model with VGG16 in the layout of torchvision or timm, or with a whole
        LPIPS as the lpips package and taming-transformers save it.
      linear: where the 1x1 weights come from if `vgg16` has none; "" for the published ones, which are shipped.

    Returns:
      {path: float32 array}, the paths being those of `flat.split(LPIPS(...))`.

    Raises:
      OSError: there is no such file, and the message says how to get it; or it is damaged.
      ValueError: a tensor is missing, has another shape, or has no known use; the message names it.
    """
    file = vgg16_file(vgg16)
    params = tensors.cached(file, _read_vgg16, name="vgg16")
    if "weights/0" in params:
        return params
    if not linear:
        return params | _read_linear(LPIPS_WEIGHTS)
    file = _local_file(linear, "1x1 weights of LPIPS", "leave the path empty for those that are shipped")
    return params | tensors.cached(file, _read_linear, name="lpips")


def vgg16_file(path_or_id: str, *, download: bool = True) -> Path:
    """The file of VGG16's weights; arguments as of `tensors.local_file`, errors as of `load_lpips`."""
    return _local_file(path_or_id, "VGG16", "get it with `hf download timm/vgg16.tv_in1k model.safetensors`",
                       download=download)


def _read_vgg16(file: Path) -> Params:
    """The parameters of `LPIPS`, without the 1x1 weights where the file has none."""
    found = tensors.read(file)
    layout = _layout(file, found, _VGG16_LAYOUTS, "VGG16")
    params = tensors.zeros(lambda: LPIPS(rngs=nnx.Rngs(0)))
    if _WEIGHT.format(0) not in found:
        params = {path: array for path, array in params.items() if not path.startswith("weights/")}
    views = _weight_views(params)
    for path, array in params.items():
        if path.startswith("stages/"):
            stage, i = map(int, path.split("/")[1:3])
            name = layout.format(slice=stage + 1, number=_VGG16_NUMBERS[stage][i])
            suffix, view = (".bias", array) if array.ndim == 1 else (".weight", array.transpose(3, 2, 0, 1))
            views[name + suffix] = view
    tensors.fill(views, found, file, unused=_VGG16_UNUSED)
    return params


def _read_linear(file: Path) -> Params:
    params = tensors.zeros(lambda: LPIPS(rngs=nnx.Rngs(0)))
    params = {path: array for path, array in params.items() if path.startswith("weights/")}
    tensors.fill(_weight_views(params), tensors.read(file), file)
    return params


def _weight_views(params: Params) -> Params:
    return {_WEIGHT.format(path.removeprefix("weights/")): array[None, :, None, None]
            for path, array in params.items() if path.startswith("weights/")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layout:
    """How a library names ConvNeXt's tensors.

    Attributes:
      scale_shape: of a block's layer scale.
      names: our module, or parameter -> theirs. `stage` and `block` are numbers, `stage` that after a downsampling;
        `twice` is twice the stage, `next` is one more.
    """

    scale_shape: tuple[int, ...]
    names: dict[str, str]


_TORCHVISION = _Layout(
    scale_shape=(-1, 1, 1),
    names={
        "stem": "features.0.0",
        "stem_norm": "features.0.1",
        "downsamples/norm": "features.{twice}.0",
        "downsamples/embedding": "features.{twice}.1",
        "stages/depthwise": "features.{next}.{block}.block.0",
        "stages/norm": "features.{next}.{block}.block.2",
        "stages/fc1": "features.{next}.{block}.block.3",
        "stages/fc2": "features.{next}.{block}.block.5",
        "stages/scale": "features.{next}.{block}.layer_scale",
        "norm": "classifier.0",
        "head": "classifier.2",
    },
)

_TIMM = _Layout(
    scale_shape=(-1,),
    names={
        "stem": "stem.0",
        "stem_norm": "stem.1",
        "downsamples/norm": "stages.{stage}.downsample.0",
        "downsamples/embedding": "stages.{stage}.downsample.1",
        "stages/depthwise": "stages.{stage}.blocks.{block}.conv_dw",
        "stages/norm": "stages.{stage}.blocks.{block}.norm",
        "stages/fc1": "stages.{stage}.blocks.{block}.mlp.fc1",
        "stages/fc2": "stages.{stage}.blocks.{block}.mlp.fc2",
        "stages/scale": "stages.{stage}.blocks.{block}.gamma",
        "norm": "head.norm",
        "head": "head.fc",
    },
)

_TRANSFORMERS = _Layout(
    scale_shape=(-1,),
    names={
        "stem": "convnext.embeddings.patch_embeddings",
        "stem_norm": "convnext.embeddings.layernorm",
        "downsamples/norm": "convnext.encoder.stages.{stage}.downsampling_layer.0",
        "downsamples/embedding": "convnext.encoder.stages.{stage}.downsampling_layer.1",
        "stages/depthwise": "convnext.encoder.stages.{stage}.layers.{block}.dwconv",
        "stages/norm": "convnext.encoder.stages.{stage}.layers.{block}.layernorm",
        "stages/fc1": "convnext.encoder.stages.{stage}.layers.{block}.pwconv1",
        "stages/fc2": "convnext.encoder.stages.{stage}.layers.{block}.pwconv2",
        "stages/scale": "convnext.encoder.stages.{stage}.layers.{block}.layer_scale_parameter",
        "norm": "convnext.layernorm",
        "head": "classifier",
    },
)

_CONVNEXT_LAYOUTS = {f"{layout.names['stem']}.weight": layout for layout in (_TORCHVISION, _TIMM, _TRANSFORMERS)}


def load_convnext_small(path_or_id: str, *, spec: ConvNeXtSpec = CONVNEXT_SMALL) -> Params:
    """Reads the weights of a `ConvNeXt`.

    Args:
      path_or_id: a file, a folder, or the id of a hub model, in the layout of torchvision, timm or transformers.
        TiTok's loss is made with torchvision's weights, IMAGENET1K_V1.
      spec: the shape it must have.

    Returns:
      {path: float32 array}, the paths being those of `flat.split(ConvNeXt(spec, ...))`.

    Raises:
      OSError: there is no such file, and the message says how to get it; or it is damaged.
      ValueError: a tensor is missing, has another shape, or has no known use; the message names it.
    """
    target = path_or_id if path_or_id.endswith(".pth") else "FILE"
    file = _local_file(path_or_id, "ConvNeXt-S", f"get it with `curl -L -o {target} --create-dirs "
                                                 "https://download.pytorch.org/models/convnext_small-0c510722.pth`")
    name = "-".join(["convnext", *map(str, spec.depths + spec.widths)])
    return tensors.cached(file, lambda file: _read_convnext(file, spec), name=name)


def _read_convnext(file: Path, spec: ConvNeXtSpec) -> Params:
    found = tensors.read(file)
    layout = _layout(file, found, _CONVNEXT_LAYOUTS, "ConvNeXt")
    params, views = tensors.zeros(lambda: ConvNeXt(spec, rngs=nnx.Rngs(0))), {}
    for path, array in params.items():
        kind, *names = path.split("/")
        stage = int(names.pop(0)) + (kind == "downsamples") if kind in ("stages", "downsamples") else 0
        ours = "/".join([kind, *names])
        module, _, leaf = ours.rpartition("/")
        name = layout.names[ours] if ours in layout.names else layout.names[module] + (
            ".bias" if leaf == "bias" else ".weight")
        for block, view in enumerate(array if kind == "stages" else [array]):
            if ours == "stages/scale":
                view = view.reshape(layout.scale_shape)
            elif ours == "stages/depthwise/kernel":
                view = view[:, :, None].transpose(3, 2, 0, 1)
            elif ours in ("stem/kernel", "downsamples/embedding/kernel"):
                size = 4 if kind == "stem" else 2
                view = view.reshape(size, size, -1, view.shape[-1]).transpose(3, 2, 0, 1)
            elif leaf == "kernel":
                view = view.T
            views[name.format(stage=stage, twice=2 * stage, next=2 * stage + 1, block=block)] = view
    tensors.fill(views, found, file)
    return params


def _local_file(path_or_id: str, what: str, remedy: str, *, download: bool = True) -> Path:
    if not path_or_id:
        raise OSError(f"no file with {what} is given: {remedy}")
    try:
        return tensors.local_file(path_or_id, download=download)
    except OSError as error:
        raise OSError(f"no {what} at {path_or_id}: {remedy} ({error})") from error


def _layout(file: Path, found: Mapping[str, np.ndarray], layouts: Mapping[str, Any], what: str) -> Any:
    """The layout whose first tensor, the key of `layouts`, the file has."""
    for name, layout in layouts.items():
        if name in found:
            return layout
    raise ValueError(f"{file}: not a {what}, for tensor {' or '.join(layouts)} is missing")


# By the names of `models.perceptual.NETWORKS`: the config's section `loss.perceptual` -> parameters.
LOADERS: dict[str, Callable[[Any], Params]] = {
    "lpips": lambda perceptual: load_lpips(perceptual.lpips_vgg16, perceptual.lpips_linear),
    "convnext_s": lambda perceptual: load_convnext_small(perceptual.convnext_s_weights, spec=CONVNEXT_SMALL),
}
