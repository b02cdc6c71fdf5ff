"""The networks that metrics look through: LPIPS, the papers' Inception, and encoders, a run's own and others."""

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from vqrae_jax import metrics
from vqrae_jax.config import Config
from vqrae_jax.metrics import Statistics, frechet
from vqrae_jax.models import flat
from vqrae_jax.models.flat import Arrays
from vqrae_jax.models.inception import InceptionV3, to_uint8_levels
from vqrae_jax.models.perceptual import LPIPS
from vqrae_jax.models.siglip import class_embeddings
from vqrae_jax.tokenizer import build, runs
from vqrae_jax.tokenizer.evaluate import Batches, Instrument, Seen, placed
from vqrae_jax.training import sharding
from vqrae_jax.weights import huggingface, inception, perceptual, siglip, tensors

ENCODER, INCEPTION, LPIPS_VGG, ZERO_SHOT = "encoder", "inception", "lpips", "zero_shot"  # names of instruments
DGM_EVAL_SIZE = 224  # at which dgm-eval shows images to DINOv2, whose native size is 518


class View(NamedTuple):
    """A network that looks at images, of which a Frechet distance is taken.

    Attributes:
      see: `[B, H, W, 3]` float32 in [0, 1] to a tree of arrays `[B, ...]`, compiled.
      embedding: what `see` gave to `[B, d]` float32, of which the distance is taken.
      weights: `{what was read: its sha256}`.
    """

    see: Callable[[jax.Array], Any]
    embedding: Callable[[Any], jax.Array]
    weights: Mapping[str, str]


def _compiled(module: nnx.Module, mesh: Mesh, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call(module, *images)`, compiled, with a copy of the module on every device."""
    graphdef, params, buffers = flat.split(module)
    return _bound(graphdef, sharding.put(mesh, params | buffers, ((".*", ()),)), mesh, call)


def _bound(graphdef: nnx.GraphDef, arrays: Arrays, mesh: Mesh, call: Callable[..., Any]) -> Callable[..., Any]:
    """Likewise of a module whose arrays are on the devices of a mesh.

    What is seen in an image that is not finite is NaN. It would be so by itself, but for ReLUs, to which XLA's maximum
    on a CPU gives 0 for NaN in some programs: such images had a Frechet distance.
    """
    def see(arrays: Arrays, *images: jax.Array) -> Any:
        finite = functools.reduce(jnp.logical_and, (
            jnp.isfinite(image).all(range(1, image.ndim)) for image in images))
        only_finite = lambda seen: jnp.where(finite.reshape(-1, *[1] * (seen.ndim - 1)), seen, jnp.nan)
        return jax.tree.map(only_finite, call(flat.merge(graphdef, arrays), *images))

    return functools.partial(jax.jit(sharding.on(mesh, see)), arrays)


def _module(make: Callable[[], nnx.Module], arrays: Mapping[str, Any]) -> Any:
    """A module of given arrays; none of its own are made."""
    return flat.merge(nnx.split(nnx.eval_shape(make))[0], arrays)


def lpips(config: Config, mesh: Mesh, vgg16: str = "") -> Instrument:
    """LPIPS with VGG16, version 0.1, of an image and its reconstruction; the mean over images.

    Args:
      config: of the run, whose `loss.perceptual` says where the weights are.
      mesh: of the evaluation.
      vgg16: where VGG16's weights are instead: a file, a folder or a hub id, which may be downloaded.

    Raises:
      OSError, ValueError: there are none, or not those.
    """
    keys = config.loss.perceptual
    file = perceptual.vgg16_file(vgg16 or keys.lpips_vgg16, download=bool(vgg16))
    module = _module(lambda: LPIPS(rngs=nnx.Rngs(0)), perceptual.load_lpips(str(file), keys.lpips_linear))
    distance = _compiled(module, mesh, lambda module, x, y: module.distance(module(x), module(y)))
    return Instrument(
        look=lambda seen, looked: distance(seen.images, seen.reconstructions),
        metrics={"lpips": metrics.mean_of_rows("lpips", lambda batch: batch.seen[LPIPS_VGG])},
        weights={str(file): tensors.sha256(file)})


def inception_view(path: str, mesh: Mesh) -> View:
    """The Inception of the papers, which sees images rounded to 8 bits.

    Raises:
      OSError, ValueError: there are no such weights, or not those.
    """
    module = _module(lambda: InceptionV3(rngs=nnx.Rngs(0)), inception.load_inception(path))
    see = _compiled(module, mesh, lambda module, images: module(to_uint8_levels(images)))
    file = Path(path).expanduser()
    return View(see, lambda output: output.features, {str(file): tensors.sha256(file)})


def encoder_view(path_or_id: str, mesh: Mesh) -> View:
    """Any encoder, at its native size, but DINOv2 at 224, as dgm-eval has it (Stein et al. 2023, arXiv 2306.04675).

    Raises:
      OSError, ValueError: there is no such encoder.
    """
    of_dgm_eval = huggingface.read_encoder_spec(path_or_id).model_type.startswith("dinov2")
    encoder = huggingface.build_encoder(path_or_id, image_size=DGM_EVAL_SIZE if of_dgm_eval else None)
    see = _compiled(encoder, mesh, lambda module, images: module.embedding(images))
    return View(see, lambda embedding: embedding,
                {str(file): tensors.sha256(file) for file in huggingface.weight_files(path_or_id)})


def pretrained_view(workdir: Path, config: Config, arrays: Arrays, graphdef: nnx.GraphDef, mesh: Mesh) -> View:
    """A run's own encoder as it was before training, at the size that the run uses it at; it sees tokens.

    Args:
      workdir: the run's folder.
      config: of the run.
      arrays: of its model.
      graphdef: likewise.
      mesh: of the evaluation.

    Raises:
      OSError, ValueError: it is not to be found.
    """
    encoder = runs.pretrained_encoder(workdir, config, arrays, mesh)
    of_encoder = nnx.graphdef(flat.merge(graphdef, arrays).encoder)
    see = _bound(of_encoder, encoder, mesh, lambda module, images: module(images))
    return View(see, lambda tokens: tokens.mean(axis=1), {str(workdir / "pretrained encoder"): runs.digest(encoder)})


def fd_name(path_or_id: str) -> str:
    """`facebook/dinov2-large` -> `dinov2_large`."""
    return re.sub(r"\W+", "_", Path(path_or_id).name.lower())


def of_view(name: str, view: View, distance: str | None, reference: Statistics | None,
            more: Mapping[str, metrics.Metric], see_images: Callable[[Seen], Any] | None = None) -> Instrument:
    """The Frechet distance on a view, and other metrics of it.

    Args:
      name: of the instrument; metrics find what it saw of images and of reconstructions under it.
      view: the network.
      distance: what the distance is called; None is no distance.
      reference: what reconstructions are compared with; None is the images.
      more: other metrics, by name.
      see_images: what the view makes of the images, where other metrics need it or the run's model has made it.
    """
    see_images = see_images or (lambda seen: () if reference else view.see(seen.images))
    of = lambda side: lambda batch: view.embedding(batch.seen[name][side])
    distances = {distance: metrics.frechet_distance(distance, of(1), reference or of(0))} if distance else {}
    return Instrument(look=lambda seen, looked: (see_images(seen), view.see(seen.reconstructions)),
                      metrics={**distances, **more}, weights=view.weights)


def inception_metrics(images: int) -> dict[str, metrics.Metric]:
    """The Inception Score."""
    logits = lambda batch: batch.seen[INCEPTION][1].logits
    return {"inception_score": metrics.mean_inception_score(logits, images=images)}


def encoder_metrics() -> dict[str, metrics.Metric]:
    """How far a run's encoder has drifted from the pretrained one."""
    return metrics.cosine_and_cka("drift", lambda batch: (batch.seen[ENCODER][0], batch.features))


def zero_shot(config: Config, classes: Path, mesh: Mesh) -> Instrument:
    """Zero-shot accuracy of a SigLIP encoder, with the OpenAI templates: `zero_shot_encoder` and `zero_shot_features`.

    Args:
      config: of the run, whose `model.encoder.path` has a text tower.
      classes: a file of class names, one a line, in the order of the labels.
      mesh: of the evaluation.

    Raises:
      OSError, ValueError: there are no such files, no text tower, no tokenizer, or fewer than two classes.
    """
    path, final_norm = build.encoder_path(config), config.model.encoder.final_norm
    names = [name.strip() for name in classes.read_text().splitlines() if name.strip()]
    heads = siglip.load_siglip_heads(path)
    asked = class_embeddings(heads, siglip.load_tokenizer(path, heads.text_spec.length), names,
                             siglip.openai_templates())
    embed = _compiled(heads, mesh, lambda heads, tokens: heads.image_embedding(tokens, final_norm=final_norm))

    def accuracy(name: str, of: Callable[[Any], jax.Array]) -> metrics.Metric:
        return metrics.Metric(
            rows=lambda batch: {"embeddings": of(batch.seen[ZERO_SHOT]), "labels": batch.labels}, labelled=True,
            finish=lambda sums, rows: {name: metrics.zero_shot_top1(rows["embeddings"], asked, rows["labels"])})

    return Instrument(
        look=lambda seen, looked: (embed(looked[ENCODER][0]), embed(seen.features)),
        metrics={"zero_shot_encoder": accuracy("zero_shot_encoder", lambda seen: seen[0]),
                 "zero_shot_features": accuracy("zero_shot_features", lambda seen: seen[1])},
        weights={str(file): tensors.sha256(file) for file in huggingface.weight_files(path)})


def statistics(views: Mapping[str, View], batches: Batches, mesh: Mesh) -> dict[str, Statistics]:
    """What views see in reference images.

    Raises:
      ValueError: features that are not finite, or fewer than two images.
    """
    sums: dict[Any, frechet.MomentSums] = {}
    for batch in placed(batches, mesh):
        images = batch["image"].astype(jnp.float32) / 255
        looks = {name: view.embedding(view.see(images)) for name, view in views.items()}
        sums = add(sums, looks, batch["valid"])
    return finished(sums)


def add(sums: Mapping[Any, frechet.MomentSums], looks: Mapping[Any, jax.Array],
        valid: jax.Array) -> dict[Any, frechet.MomentSums]:
    """`sums`, at first empty, with a batch's embeddings `[B, d]` added to those of the same name."""
    return {name: _add(sums[name] if name in sums else frechet.init(embedding.shape[-1]), embedding, valid)
            for name, embedding in looks.items()}


_add = jax.jit(frechet.update, donate_argnums=0)


def finished(sums: Mapping[Any, frechet.MomentSums]) -> dict[Any, Statistics]:
    """Mean and covariance of each; ValueError as from `statistics`."""
    return {name: frechet.statistics(frechet.moments(kept)) for name, kept in sums.items()}
