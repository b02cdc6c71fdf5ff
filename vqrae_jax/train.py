"""The training loop: data, step, report, evaluate, save."""

import functools
import logging
import math
import signal
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from vqrae_jax import build, checkpoint, distributed, evaluate, optim, reporting, sharding
from vqrae_jax import step as step_lib
from vqrae_jax.config import Config
from vqrae_jax.data import BadImages, Source, TrainIterator, train_batches
from vqrae_jax.models.flat import Arrays
from vqrae_jax.step import Frozen, TrainState

log = logging.getLogger(__name__)
KMEANS_TOKENS_PER_CODE = 8


def run(config: Config, workdir: Path) -> dict[str, float]:
    """Trains until `train.steps`, continuing where the folder's last checkpoint ends.

    A run that was killed and continued gives the same parameters and metrics as one that was not.

    Args:
      config: the run's config.
      workdir: the run's folder; see checkpoint.py for what is in it.

    Returns:
      the metrics of the evaluation at the end.

    Raises:
      ValueError, OSError: a config, data or a folder that cannot work, before training starts.
      KeyboardInterrupt: a signal stopped the run, after it was saved.
      FloatingPointError: `train.max_skipped` steps in a row had a loss or gradient that was not finite.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(mesh, config)
    graphdef, param_shapes, codebook_shapes = checkpoint.structure(workdir, config)
    for key in ("lr_multipliers", "end_lr_multipliers"):
        optim.check_patterns(param_shapes, getattr(config.optim, key), key=f"optim.{key}")
    bad_images = BadImages(workdir / "bad_images.jsonl")
    source = build.data_source(config.data.source, training=True)
    batches = _open_batches(config, source, bad_images)
    eval_source = build.data_source(evaluate.spec(config), training=False)

    checkpoint.open_run(workdir, config)
    parts = build.parts(config, graphdef)
    _describe(config, param_shapes, codebook_shapes)
    # Whatever ends this block, saving in the background is waited for.
    with closing(checkpoint.Checkpoints(workdir)) as checkpoints, closing(batches):
        if steps := checkpoints.steps():
            abstract, abstract_frozen = checkpoint.abstract_state(config, parts, param_shapes, codebook_shapes, mesh)
            frozen = checkpoint.load_frozen(workdir, abstract_frozen)
            state, data_state = checkpoints.restore(steps[-1], abstract)
            batches.set_state(data_state)
        else:
            place = lambda tree: sharding.of(mesh, tree)
            networks = build.network_arrays(config, place)
            params, codebook = _initial_arrays(config, graphdef, param_shapes, codebook_shapes, source, bad_images,
                                               mesh)
            init = functools.partial(step_lib.init_state, config, parts)
            state, frozen = build.initialised(init, place, params, codebook, *networks)
            del params, codebook, networks
            checkpoint.save_frozen(workdir, frozen)
        train_step = sharding.jit_step(step_lib.make_train_step(config, parts), mesh, state)
        eval_step = jax.jit(sharding.on(mesh, step_lib.make_eval_step(graphdef)))
        with (closing(reporting.Reporter(workdir, config, first_step=int(state.step))) as reporter,
              distributed.ends_with_the_others()):
            result = _loop(config, mesh, train_step, eval_step, state, frozen, batches, eval_source, checkpoints,
                           reporter, bad_images)
    # The first process may have pictures and curves to write: JAX ends those that wait for it too long at their exit.
    distributed.wait_for_all("end of training")
    if bad := bad_images.names():
        names = ", ".join(list(bad)[:5]) + (", ..." if len(bad) > 5 else "")
        log.warning("%d images could not be read and were left out: %s; see %s", len(bad), names, bad_images.path)
    return result


def _loop(config: Config, mesh: Mesh, train_step: step_lib.TrainStep, eval_step: step_lib.EvalStep, state: TrainState,
          frozen: Frozen, batches: TrainIterator, eval_source: Source, checkpoints: checkpoint.Checkpoints,
          reporter: reporting.Reporter, bad_images: BadImages) -> dict[str, float]:
    """Steps from `state` to the end; returns the metrics of the last evaluation, empty if no step was left."""
    result = {}
    if int(state.step) >= config.train.steps:
        if state.skipped_in_a_row >= config.train.max_skipped:
            raise _not_finite(state, checkpoints.workdir)
        log.info("step %d of %d is reached: nothing left to do", state.step, config.train.steps)
    else:
        log.info("training to step %d; the first step takes longer, for it is compiled", config.train.steps)
    with _StopSignal() as stop:
        for step in range(int(state.step) + 1, config.train.steps + 1):
            gan = config.gan.discriminator != "none" and step > config.gan.discriminator_start_step
            asked = time.perf_counter()
            images = next(batches)["image"]
            last_step: Any = state.step
            if last_step.is_ready():  # else the devices still had work, and nothing waited for these images
                reporter.waited_for_data(time.perf_counter() - asked)
            state, metrics = train_step(state, frozen, sharding.put_batch(mesh, images), gan=gan)
            last, psnr, stopping = step == config.train.steps, None, stop.requested(step)
            evaluating = step % config.train.eval_every == 0 or last
            saving = step % config.train.checkpoint_every == 0 or last or stopping
            if step % config.train.log_every == 0 or last:
                metrics = {name: float(value) for name, value in metrics.items()}
                reporter.train(step, metrics)
                if metrics["skipped_in_a_row"] >= config.train.max_skipped:
                    checkpoints.save(state, batches.get_state(), psnr=None)
                    raise _not_finite(state, checkpoints.workdir)
            if evaluating or saving:
                jax.block_until_ready(state)  # or the steps under way would count as time of the evaluation
            reporter.pause()
            if evaluating:
                arrays = {**frozen.params, **state.params, **state.codebook, **state.ema}
                result, pictures = evaluate.evaluate(
                    eval_step, arrays, mesh,
                    evaluate.open_batches(config, eval_source, bad_images, mesh, limit=config.eval.limit),
                    samples=config.eval.samples)
                reporter.evaluation(step, result, reporting.image_rows(pictures))
                psnr = result["psnr"]
            if saving:
                checkpoints.save(state, batches.get_state(), psnr=psnr)
            reporter.resume()
            if stopping and not last:
                raise KeyboardInterrupt(f"stopped by a signal after step {step}; the same command continues")
    return result


def _not_finite(state: TrainState, workdir: Path) -> FloatingPointError:
    return FloatingPointError(
        f"{state.skipped_in_a_row} steps in a row up to step {state.step} had a loss or gradient that was not finite; "
        f"{workdir} keeps the last good state: lower optim.lr and start a new run with init_from that folder")


def _open_batches(config: Config, source: Source, bad_images: BadImages) -> TrainIterator:
    data, processes = config.data, jax.process_count()
    return train_batches(
        source, image_size=data.image_size, batch_size=config.train.batch_size // processes, seed=config.seed,
        crop_scale_min=data.crop_scale_min, flip=data.flip, threads=data.threads, workers=data.workers,
        bad_images=bad_images, shard_index=jax.process_index(), shard_count=processes)


def _initial_arrays(config: Config, graphdef: nnx.GraphDef, param_shapes: Arrays, codebook_shapes: Arrays,
                    source: Source, bad_images: BadImages, mesh: Mesh) -> tuple[Arrays, Arrays]:
    """Parameters and codebook state that a run starts from: another run's, or pretrained and random ones."""
    restored = _restored_arrays(config, {**param_shapes, **codebook_shapes}, mesh) if config.init_from else {}
    initial = restored
    if not param_shapes.keys() | codebook_shapes.keys() <= restored.keys():
        params, codebook = build.initial_arrays(config, lambda tree: sharding.of(mesh, tree))
        initial = params | codebook | restored
    params = {path: initial[path] for path in param_shapes}
    codebook = {path: initial[path] for path in codebook_shapes}
    if config.model.latent_statistics and "latent_mean" not in restored:
        raise ValueError("config key model.latent_statistics needs a run to take them from: set init_from")
    if config.model.quantizer.init == "kmeans" and not any(path.startswith("quantizer/") for path in restored):
        batches = _open_batches(config, source, bad_images)  # an iterator of its own: training starts at batch 0
        tokens = build.tokens_per_image(config)
        needed = KMEANS_TOKENS_PER_CODE * config.model.quantizer.size
        images = [sharding.put_batch(mesh, next(batches)["image"])
                  for _ in range(math.ceil(needed / (tokens * config.train.batch_size)))]
        batches.close()
        values = sharding.on(mesh, step_lib.codebook_from_data)(config, graphdef, {**params, **codebook}, images)
        params = {path: values.get(path, value) for path, value in params.items()}
        codebook = {path: values.get(path, value) for path, value in codebook.items()}
        log.info("codebook initialised by k-means on %d tokens", sum(map(len, images)) * tokens)
    return params, codebook


def _restored_arrays(config: Config, shapes: Arrays, mesh: Mesh) -> Arrays:
    """Another run's arrays as far as this model has them, in whole parts: encoder, quantizer, decoder, statistics.

    Raises:
      ValueError: a part that both have differs; the message names the first array.
    """
    other, _, arrays = checkpoint.load_run(Path(config.init_from), mesh)
    part_of = lambda path: path.split("/")[0]
    theirs, ours = {part_of(path) for path in arrays}, {part_of(path) for path in shapes}
    for path in sorted(path for path in arrays.keys() | shapes.keys() if part_of(path) in theirs & ours):
        if path not in shapes:
            raise ValueError(f"init_from: {config.init_from} has {path}, which this config's model has not")
        if path not in arrays:
            raise ValueError(f"init_from: {config.init_from} has no {path}, which this config's model has")
        if arrays[path].shape != shapes[path].shape:
            raise ValueError(f"init_from: {config.init_from} has {path} of shape {arrays[path].shape}, "
                             f"this config's model {shapes[path].shape}")
    meanings = build.meaning(checkpoint.self_contained(Path(config.init_from), other)), build.meaning(config)
    for part in theirs & ours & meanings[0].keys():
        for key, value in meanings[0][part].items():
            if value != meanings[1][part][key]:
                raise ValueError(f"init_from: {config.init_from} has {key} {value!r}, this config "
                                 f"{meanings[1][part][key]!r}: with the same {part} it would be another model")
    for names, what in ((theirs & ours, "restored"), (theirs - ours, "left out")):
        for name in sorted(names):
            count = sum(part_of(path) == name for path in arrays)
            log.info("%s: %d arrays %s from %s", name, count, what, config.init_from)
    for name in sorted(ours - theirs):
        log.info("%s: initialised, for %s has none", name, config.init_from)
    if config.gan.discriminator != "none":
        log.info("discriminator: initialised; it is not taken over from another run")
    elif other.gan.discriminator != "none":
        log.info("discriminator: that of %s left out", config.init_from)
    return {path: arrays[path] for path in shapes if part_of(path) in theirs}


def _describe(config: Config, params: Arrays, codebook: Arrays) -> None:
    """Logs the number of parameters by part, and how many of them learn."""
    _, networks, _ = build.networks(config)
    learns = lambda path: (not optim.is_frozen(path, config.optim.lr_multipliers) if path in params
                           else path.startswith("discriminator/") and not path.startswith(step_lib.BACKBONE))
    for part in dict.fromkeys(path.split("/")[0] for path in [*params, *codebook, *networks]):
        sizes = {path: array.size for path, array in {**params, **networks}.items() if path.startswith(part + "/")}
        learned = sum(size for path, size in sizes.items() if learns(path))
        state = sum(array.size for path, array in codebook.items() if path.split("/")[0] == part)
        log.info("%-13s %12s parameters, %12s of them learn%s", part, f"{sum(sizes.values()):,}", f"{learned:,}",
                     f"; {state:,} numbers of codebook state" if state else "")


class _StopSignal:
    """Notes SIGTERM and SIGINT, so that the loop can save and end between two steps; a second one ends at once."""

    def __init__(self):
        self._received = False

    def __enter__(self):
        # Only a process's main thread may have handlers; a notebook may run elsewhere. Several processes have to stop
        # at the same step: there JAX notes SIGTERM and agrees on one.
        alone = threading.current_thread() is threading.main_thread() and jax.process_count() == 1
        numbers = (signal.SIGTERM, signal.SIGINT) if alone else ()
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_):
        self._restore()

    def requested(self, step: int) -> bool:
        """Whether the run has to stop after this step."""
        return self._received or distributed.preempted(step)

    def _note(self, number, frame):
        self._received = True
        self._restore()

    def _restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)
