"""The arrays that a tokenizer starts from: pretrained, another run's, found in the data by k-means, or random."""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vqrae_jax import config as config_lib
from vqrae_jax.config import Config
from vqrae_jax.models import flat
from vqrae_jax.models.discriminators import DISCRIMINATORS
from vqrae_jax.models.flat import Arrays
from vqrae_jax.models.placement import split_batch
from vqrae_jax.models.quantizers import Quantizer
from vqrae_jax.models.vqrae import VQRAE
from vqrae_jax.tokenizer import build, runs, train_state
from vqrae_jax.tokenizer.build import Structure
from vqrae_jax.training import sharding, signals, update
from vqrae_jax.training.task import Batches
from vqrae_jax.weights import discriminators, huggingface, perceptual
from vqrae_jax.weights.huggingface import EncoderSpec

log = logging.getLogger(__name__)
KMEANS_TOKENS_PER_CODE = 8


def create(config: Config) -> VQRAE:
    """An untrained model of a config, as an NNX module to call, differentiate and look into.

    It is what a run of the config starts from as far as no data and no other run is needed: the encoder has its
    pretrained weights (unless `model.encoder.random_weights`), everything else is drawn from `seed`. What a run would
    find by k-means (`model.quantizer.init`) or take from `init_from` is random here too.

    `create(config)(images, train=False)` is a `models.vqrae.Output`; images are `[B, H, W, 3]`, float32 in [0, 1] or
    uint8, and `data.image_size` is H and W.

    Raises:
      ValueError: sizes that do not fit each other; the message names the config key.
      OSError: the encoder's config or weights cannot be read.
    """
    structure = build.structure(config)
    params, buffers = model_arrays(config, structure, sharding.one_device())
    return flat.merge(structure.graphdef, sharding.off_mesh({**params, **buffers}))


def model_arrays(config: Config, structure: Structure, mesh: Mesh,
                 quantizer: Quantizer | None = None) -> tuple[Arrays, Arrays]:
    """Parameters and buffers of a new model: pretrained encoder, the given quantizer, everything else from `seed`.

    Args:
      config: of the run.
      structure: its model's.
      mesh: where the arrays are to be. No array is whole elsewhere.
      quantizer: the object where `model.quantizer.kind` is "own".
    """
    given, given_buffers = {}, {}
    if not config.model.encoder.random_weights:
        with config_lib.says_where("model.encoder.path"):
            loaded = huggingface.load_encoder_params(build.encoder_path(config), image_size=structure.input_size,
                                                     final_norm=config.model.encoder.final_norm)
        given = flat.prefixed("encoder/", loaded)
    if quantizer is not None:
        # Copies on the host: the run's own arrays are donated to its steps.
        theirs = [{path: np.array(value) for path, value in arrays.items()} for arrays in flat.split(quantizer)[1:]]
        given, given_buffers = given | flat.prefixed("quantizer/", theirs[0]), flat.prefixed("quantizer/", theirs[1])

    def init():
        _, params, buffers = flat.split(build.model(config, structure.encoder, nnx.Rngs(config.seed), quantizer))
        return _without((params, buffers), (given, given_buffers))

    params, buffers = sharding.made(init, mesh, train_state.rules(config))
    put = lambda arrays: sharding.put(mesh, arrays, train_state.rules(config))
    return params | put(given), buffers | put(given_buffers)


def network_arrays(config: Config, mesh: Mesh) -> tuple[Arrays, Arrays]:
    """Parameters and buffers of the losses' networks at the start: pretrained weights, everything else from `seed`.

    Args:
      config: of the run.
      mesh: where they are to be.

    Raises:
      OSError: weights that are not there; the message says how to get them.
      ValueError: weights of another network.
    """
    make = lambda: build.split(build.loss_networks(config, nnx.Rngs(config.seed)))[1:]
    loaded, loaded_buffers = {}, {}
    if not config.loss.perceptual.random_weights:
        for name in build.perceptual_networks(config):
            keys = [key for key in config_lib.keys() if key.startswith(f"loss.perceptual.{name}_")]
            with config_lib.says_where(*keys):
                loaded |= flat.prefixed(f"{name}/", perceptual.LOADERS[name](config.loss.perceptual))
    kind = config.gan.discriminator
    if kind in discriminators.LOADERS and (backbone := DISCRIMINATORS[kind].backbone):
        with config_lib.says_where("gan.backbone", "gan.heads"):
            theirs = [flat.prefixed("discriminator/", arrays)
                      for arrays in discriminators.LOADERS[kind](config.gan, backbone)]
        for ours, arrays in zip(jax.eval_shape(make), theirs, strict=True):
            _check_heads(config, ours, arrays)
        loaded, loaded_buffers = loaded | theirs[0], theirs[1]
    params, buffers = sharding.made(lambda: _without(make(), (loaded, loaded_buffers)), mesh,
                                    train_state.rules(config))
    put = lambda arrays: sharding.put(mesh, arrays, train_state.rules(config))
    return params | put(loaded), buffers | put(loaded_buffers)


def _without(made: Sequence[Arrays], given: Sequence[Mapping[str, Any]]) -> tuple[Arrays, ...]:
    """What was made and is not given, which a compiler then leaves out with all that it was made of."""
    return tuple({path: value for path, value in arrays.items() if path not in known}
                 for arrays, known in zip(made, given, strict=True))


def _check_heads(config: Config, ours: Arrays, theirs: dict[str, Any]) -> None:
    """Refuses trained heads of another shape; there are none, or all of them."""
    shapes = [{path: value.shape for path, value in arrays.items() if path.startswith("discriminator/heads/")}
              for arrays in (ours, theirs)]
    for path in sorted(shapes[0].keys() | shapes[1].keys()) if config.gan.heads else ():
        if path not in shapes[0] or path not in shapes[1] or shapes[0][path] != shapes[1][path]:
            raise ValueError(f"config key gan.heads: {config.gan.heads} does not fit this discriminator at {path}")


def initial_arrays(config: Config, structure: Structure, open_batches: Callable[[], Batches], mesh: Mesh,
                   quantizer: Quantizer | None = None) -> tuple[Arrays, Arrays]:
    """Parameters and buffers that a run starts from.

    Args:
      config: of the run.
      structure: its model's.
      open_batches: opens the training data, for a start by k-means.
      mesh: where the arrays are to be.
      quantizer: the object where `model.quantizer.kind` is "own".
    """
    shapes = {**structure.params, **structure.buffers}
    restored = _restored_arrays(config, structure, mesh, quantizer) if config.init_from else {}
    initial = restored
    if not shapes.keys() <= restored.keys():
        params, buffers = model_arrays(config, structure, mesh, quantizer)
        initial = params | buffers | restored
    if config.model.latent_statistics and "latent_mean" not in restored:
        raise ValueError("config key model.latent_statistics needs a run to take them from: set init_from")
    if config.model.quantizer.init == "kmeans" and not any(flat.part(path) == "quantizer" for path in restored):
        batches = open_batches()  # an iterator of its own: training starts at batch 0
        needed = math.ceil(KMEANS_TOKENS_PER_CODE * config.model.quantizer.size / structure.tokens)
        # Of a batch with more images than are needed, the first ones: a run of any number of processes has the same.
        share = mesh.size * config.train.accumulate
        count = min(config.train.batch_size, math.ceil(needed / share) * share)
        first = jax.jit(lambda images: images[:count], out_shardings=sharding.batch_sharding(mesh))
        images = []
        for _ in range(math.ceil(needed / count)):
            signals.stop_if_preempted()
            images.append(first(sharding.put_batch(mesh, next(batches)["image"])))
        batches.close()
        initial = initial | sharding.on(mesh, codebook_from_data)(config, structure, initial, images)
        log.info("codebook initialised by k-means on %d tokens", sum(map(len, images)) * structure.tokens)
    return ({path: initial[path] for path in structure.params}, {path: initial[path] for path in structure.buffers})


def codebook_from_data(config: Config, structure: Structure, arrays: Arrays, images: Sequence[jax.Array]) -> Arrays:
    """New values for the quantizer's arrays that make its codes the k-means centres of the encoder's features.

    Args:
      config: of the run, whose batches are split into `train.accumulate` micro-batches.
      structure: its model's.
      arrays: all the model's parameters and buffers.
      images: batches of uint8 `[B, H, W, 3]` whose features are clustered.
    """

    @jax.jit
    def features(arrays, images):
        model, micro = flat.merge(structure.graphdef, arrays), update.micro_batches(images, config.train.accumulate)
        tokens = jax.lax.map(lambda images: model.features(split_batch(images)), micro)
        return tokens.swapaxes(0, 1).reshape(-1, tokens.shape[-1])

    tokens = jnp.concatenate([features(arrays, batch) for batch in images])
    cluster = jax.jit(lambda arrays, tokens: flat.merge(structure.graphdef, arrays).quantizer.init_from_data(
        tokens, rng=jax.random.key(config.seed)))
    return flat.prefixed("quantizer/", cluster(arrays, tokens))


def _restored_arrays(config: Config, structure: Structure, mesh: Mesh, quantizer: Quantizer | None) -> Arrays:
    """Another run's arrays as far as this model has them, in whole parts: encoder, quantizer, decoder, statistics.

    Raises:
      ValueError: a part that both have differs; the message names the first array.
    """
    workdir = runs.folder(Path(config.init_from))
    with config_lib.says_where("init_from"):
        other = config_lib.load(workdir / "config.json")
        theirs_is_own = other.model.quantizer.kind == "own"
        _, _, arrays = runs.load_run(workdir, mesh, quantizer=quantizer if theirs_is_own else None)
    shapes = {**structure.params, **structure.buffers}
    theirs, ours = set(flat.parts(arrays)), set(flat.parts(shapes))
    for path in sorted(path for path in arrays.keys() | shapes.keys() if flat.part(path) in theirs & ours):
        if path not in shapes:
            raise ValueError(f"init_from: {config.init_from} has {path}, which this config's model has not")
        if path not in arrays:
            raise ValueError(f"init_from: {config.init_from} has no {path}, which this config's model has")
        if arrays[path].shape != shapes[path].shape:
            raise ValueError(f"init_from: {config.init_from} has {path} of shape {arrays[path].shape}, "
                             f"this config's model {shapes[path].shape}")
    other_encoder = huggingface.read_encoder_spec(workdir / "encoder")
    meanings = _meaning(other, other_encoder), _meaning(config, structure.encoder)
    for part in sorted(theirs & ours & meanings[0].keys(), key=list(meanings[0]).index):
        for key, value in meanings[0][part].items():
            if value != meanings[1][part][key]:
                raise ValueError(f"init_from: {config.init_from} has {key} {value!r}, this config "
                                 f"{meanings[1][part][key]!r}: with the same {part} it would be another model")
    for names, what in ((theirs & ours, "restored"), (theirs - ours, "left out")):
        for name in sorted(names):
            count = sum(flat.part(path) == name for path in arrays)
            log.info("%s: %d arrays %s from %s", name, count, what, config.init_from)
    for name in sorted(ours - theirs):
        log.info("%s: initialised, for %s has none", name, config.init_from)
    if config.gan.discriminator != "none":
        log.info("discriminator: initialised; it is not taken over from another run")
    elif other.gan.discriminator != "none":
        log.info("discriminator: that of %s left out", config.init_from)
    return {path: arrays[path] for path in shapes if flat.part(path) in theirs}


# Keys of the config that do not change what restored arrays compute, or that their shapes tell. `patch_size` and the
# decoder's shape have several spellings of one value, and stage 2 may spell them otherwise; so has `projection`, which
# is on by itself where the widths differ.
_WITHOUT_MEANING = {
    "encoder": ("path", "input_size", "random_weights", "layers"),  # layers: below, for the last has two spellings
    "quantizer": ("projection", "gradient", "init", "commitment_weight", "decay", "restart_threshold"),
    "decoder": ("shape", "width", "depth", "heads", "mlp_dim", "patch_size"),  # the shape's fields are compared
}


def _meaning(config: Config, spec: EncoderSpec) -> dict[str, dict[str, Any]]:
    """By part, what its arrays mean beyond their shapes: two models that differ in it compute different things.

    Size, type of computation, noise and what only training reads may differ; everything else that a spec or a section
    of the config says is compared, what comes later included.
    """
    fields = lambda value, name, without=(): {name(field.name): getattr(value, field.name)
                                              for field in dataclasses.fields(value) if field.name not in without}
    meaning = {part: fields(getattr(config.model, part), f"model.{part}.{{}}".format, without)
               for part, without in _WITHOUT_MEANING.items()}
    meaning["encoder"] |= {"model.encoder.layers": config.model.encoder.layers or (spec.vit.depth,),
                           **fields(spec, "the encoder's {}".format, ("model_type", "vit", "image_size")),
                           **fields(spec.vit, "the encoder's {}".format)}
    meaning["decoder"] |= fields(build.decoder_spec(config, spec), "the decoder's {}".format)
    return meaning
