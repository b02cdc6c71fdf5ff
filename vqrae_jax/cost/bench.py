"""Measures speed and memory of encode, decode, train steps, input pipeline, tokenize and generate; random weights."""

import contextlib
import dataclasses
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vqrae_jax import config as config_lib
from vqrae_jax.config import Config, GeneratorConfig, TaskConfig
from vqrae_jax.cost import flops
from vqrae_jax.data import BadImages, open_source
from vqrae_jax.data.codes import Description
from vqrae_jax.generator import build as generator_build
from vqrae_jax.generator import init as generator_init
from vqrae_jax.generator import sampling
from vqrae_jax.models import flat
from vqrae_jax.models.quantizers import EMAVQ
from vqrae_jax.models.vit import without_cudnn
from vqrae_jax.tokenizer import build, codes, init, train_state
from vqrae_jax.tokenizer.inference import Tokenizer
from vqrae_jax.tokenizer.loss import make_train_step, phase_of
from vqrae_jax.tokenizer.task import open_train_batches
from vqrae_jax.training import sharding

FRAMEWORKS = ("torch", "torch.compile")  # what takes turns, the second compiled
SEARCH_DIM = 1536  # of the code search alone: the width of so400m's codes
INPUT_BATCHES = 50  # a run of the input pipeline, or it would show what was read ahead
TOKENIZE_BATCHES = 16  # a run of tokenize at most: more than are read ahead
CASES = {  # by task
    "tokenizer": ("encode", "decode", "search", "train_stage1", "train_stage2", "train_stage2_gan", "input",
                  "tokenize"),
    "generator": ("generate_one", "generate")}
AGAINST = ("encode", "decode", "search", "train_stage1", "train_stage2", *CASES["generator"])  # what pytorch.py has


def stage(config: Config, case: str) -> Config:
    """The config whose training step is a case: stage 1, stage 2, or stage 2 with a PatchGAN that learns and is used.

    Everything else is as given. The schedules' warm-up may end after training: no step here gets that far.
    """
    frozen = (("encoder/.*", 0.0),) if case == "train_stage1" else ()
    gan = config_lib.Gan()
    if case == "train_stage2_gan":
        gan = dataclasses.replace(gan, discriminator="patchgan")
    return dataclasses.replace(
        config, gan=gan, optim=dataclasses.replace(config.optim, lr_multipliers=frozen, end_lr_multipliers=()),
        loss=dataclasses.replace(config.loss, distill_weight=0.0 if frozen else 1.0))


def model_flops(config: TaskConfig, case: str) -> int | None:
    """Model FLOPs of one run of a case; None where most of its time may go to something else: input, tokenize."""
    if isinstance(config, GeneratorConfig):
        structure = generator_build.structure(config, generator_build.planned_codes(config))
        return _drawn(config, case) * flops.generator_work(config, structure).forward
    staged, batch = stage(config, case), config.train.batch_size
    structure = build.structure(staged)
    work = flops.flops(staged, structure, phase_of(staged, staged.train.steps))
    if case == "search":
        return 2 * batch * structure.tokens * config.model.quantizer.size * SEARCH_DIM
    if case.startswith("train"):
        return work.per_step(staged)
    return {"encode": batch * work.encode + work.codes, "decode": batch * work.decode}.get(case)


def prepare(config: TaskConfig, case: str) -> tuple[int, Callable[[], Any]]:
    """A function that does the work of a case once, to the end; and with how many images it does that."""
    if isinstance(config, GeneratorConfig):
        return _generate(config, _drawn(config, case))
    batch, size, rng = config.train.batch_size, config.data.image_size, np.random.default_rng(0)
    if case == "input":
        # A file, for there may be workers.
        batches = open_train_batches(config, open_source(config.data.source, training=True), BadImages(os.devnull))
        return INPUT_BATCHES * batch, lambda: [next(batches) for _ in range(INPUT_BATCHES)]
    images = rng.integers(0, 256, (batch, size, size, 3), np.uint8)
    if case.startswith("train"):
        return batch, _repeat(*training(stage(config, case), images))
    structure = build.structure(config)
    if case == "search":
        return batch, _search(batch * structure.tokens, config.model.quantizer.size)
    params, buffers = init.model_arrays(config, structure, sharding.one_device())
    if case == "tokenize":
        return _tokenize(config, structure, params | buffers)
    tokenizer = Tokenizer(config, structure.graphdef, params | buffers)
    if case == "encode":
        images = jnp.asarray(images)
        return batch, lambda: jax.block_until_ready(tokenizer.encode_to_indices(images))
    indices = rng.integers(0, tokenizer.num_codes, (batch, structure.tokens))
    return batch, lambda: jax.block_until_ready(tokenizer.decode_from_indices(indices))


def _tokenize(config: Config, structure: build.Structure, arrays: flat.Arrays) -> tuple[int, Callable[[], Any]]:
    """What the command does to the images of a shard, from the data source to the file, which is then removed."""
    batch, source = config.train.batch_size, open_source(config.data.source, training=True)
    images = min(TOKENIZE_BATCHES * batch, len(source))
    mesh, model = sharding.one_device(), flat.merge(structure.graphdef, arrays)
    shard = Description(
        data=config.data.source, source={"images": images}, num_classes=source.num_classes, tokenizer="", weights="raw",
        codebook_size=model.quantizer.num_codes, grid=(model.encoder.grid,) * 2, image_size=config.data.image_size,
        views=1, batch_size=batch, shard_size=images, recipe={})
    encode = codes.encoder(mesh, structure.graphdef, arrays)

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            codes.write_shards(encode, source, shard, Path(folder), [0], batch_size=batch,
                               max_bad=config.data.max_bad, threads=config.data.threads)

    return images, run


def _drawn(config: GeneratorConfig, case: str) -> int:
    """Images that are sampled at once."""
    return 1 if case == "generate_one" else config.train.batch_size


def _generate(config: GeneratorConfig, images: int) -> tuple[int, Callable[[], Any]]:
    """Sampling without guidance, behind the first class or the longest caption."""
    structure, mesh = generator_build.structure(config, generator_build.planned_codes(config)), sharding.one_device()
    cast = jax.jit(functools.partial(sampling.cast, structure))
    params = cast(generator_init.params(config, structure, mesh))
    batch = {"label": np.zeros(images, np.int32), "number": np.arange(images, dtype=np.int32)}
    if longest := generator_build.longest_caption(config):
        batch |= {"caption": np.zeros((images, longest), np.int32), "pads": np.zeros(images, np.int32)}
    draw = sampling.draw_of(sampling.Options(), structure.codes.grid**2)
    sample = jax.jit(sharding.on(mesh, functools.partial(sampling.sample, structure, top_k=0)))
    batch = sharding.put_batch(mesh, batch)
    return images, lambda: jax.block_until_ready(sample(params, batch, draw))


def _search(tokens: int, size: int) -> Callable[[], Any]:
    graphdef, _, buffers = flat.split(EMAVQ(width=SEARCH_DIM, size=size, dim=SEARCH_DIM, rngs=nnx.Rngs(0)))

    def quantize(buffers, z):
        quantizer = flat.merge(graphdef, buffers)
        quantized = quantizer(z, train=True)
        return quantizer.next_buffers(quantized.stats, rng=jax.random.key(0)), quantized.z_q, quantized.indices

    z = jax.random.normal(jax.random.key(1), (tokens, SEARCH_DIM))
    return _repeat(jax.jit(quantize, donate_argnums=0), buffers, z)


def training(config: Config, images: np.ndarray) -> tuple[Callable[[Any], tuple[Any, Any]], Any]:
    """A training step on the same images every time, `state -> (state, metrics)`, and the state it starts from."""
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(mesh, config)
    structure = build.structure(config)
    arrays = (*init.model_arrays(config, structure, mesh), *init.network_arrays(config, mesh))
    state, frozen = train_state.made(config, structure, mesh, *arrays)
    frozen = sharding.cast(frozen, train_state.in_training(config, structure, mesh)[1])
    step = sharding.jit_step(make_train_step(config, structure, phase_of(config, config.train.steps)), mesh, state)
    return lambda state: step(state, frozen, sharding.put_batch(mesh, {"image": images})), state


def _repeat(function: Callable[..., tuple], state: Any, *arguments: Any) -> Callable[[], Any]:
    """Calls a function with the state that it last returned first, which may be donated."""
    held = [state]

    def run() -> None:
        state, *_ = jax.block_until_ready(function(held.pop(), *arguments))
        held.append(state)

    return run


def serve(config: TaskConfig, case: str, *, plain_attention: bool) -> None:
    """The child: its platform; a run's images; a line in, one run's seconds out; at the end peak memory and device.

    With `plain_attention` NVIDIA GPUs do without cuDNN's.
    """
    print(jax.default_backend(), flush=True)
    images, run = prepare(config, case)
    with without_cudnn() if plain_attention else contextlib.nullcontext():
        run()  # traces and compiles it
    print(images, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)
    device = jax.local_devices()[0]
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print((device.memory_stats() or {}).get("peak_bytes_in_use", own), device.device_kind, jax.device_count(), sep="\t")


class Child:
    """A process that runs a case whenever it is told to.

    Args:
      command: of the process.
      what: it is called in errors.
      seconds: after which it is killed; None is never.
      environment: variables beside those of this process.
    """

    def __init__(self, command: list[str], what: str, *, seconds: float | None = None,
                 environment: dict[str, str] | None = None):
        self._what, self._seconds = what, seconds
        self._stderr = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr,
                                         text=True, env=os.environ | (environment or {}))
        self._started = time.monotonic()
        self._timer = threading.Timer(seconds or 0, self._process.kill)
        if seconds is not None:
            self._timer.start()

    def run(self) -> float:
        """Seconds of one run."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended, and `read` says how
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return float(self.read())

    def end(self) -> list[str]:
        """What the process says at its end: its peak memory in bytes first."""
        assert self._process.stdin
        self._process.stdin.close()
        last = self.read().split("\t")
        self._process.wait()
        return last

    def stop(self) -> None:
        """Ends the process if it is there still."""
        self._timer.cancel()
        self._process.kill()
        self._process.wait()

    def read(self) -> str:
        """The next line that it says.

        Raises:
          ValueError: it ended without one, for its own reasons or because its time was over.
        """
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            if self._seconds is not None and time.monotonic() - self._started >= self._seconds:
                raise ValueError(f"{self._what} had not finished after {self._seconds:.0f} s")
            self._stderr.seek(0)
            said = self._stderr.read()
            sys.stderr.write(said)  # for --traceback
            *_, last = ["without a word", *said.splitlines()]
            raise ValueError(f"{self._what} ended with exit code {code}: {last}")
        return line.rstrip("\n")


def pytorch_job(config: TaskConfig, case: str, *, compiled: bool) -> dict[str, Any]:
    """What pytorch.py is told to run the same case, but for the device.

    Raises:
      ValueError: a model that pytorch.py does not have.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    job = {"case": case, "threads": cores, "dtype": config.model.dtype, "compile": compiled}
    return job | (_generator_job(config, case) if isinstance(config, GeneratorConfig) else _tokenizer_job(config))


def _generator_job(config: GeneratorConfig, case: str) -> dict[str, Any]:
    if config.model.dtype != "float32":
        raise ValueError(f"--against=torch samples in float32, and config key model.dtype is {config.model.dtype}")
    structure = generator_build.structure(config, generator_build.planned_codes(config))
    return {"batch": _drawn(config, case), "lm": dataclasses.asdict(structure.spec),
            "prefix": generator_build.longest_caption(config) + 1, "tokens": structure.codes.grid**2}


def _tokenizer_job(config: Config) -> dict[str, Any]:
    model, structure = config.model, build.structure(config)
    spec, decoder, patch_size = structure.encoder, structure.decoder, structure.encoder.vit.patch_size
    if (model.quantizer.kind != "simvq" or spec.vit.prefix_tokens or spec.vit.layer_scale
            or model.decoder.patch_size not in (0, patch_size)
            or config.loss.perceptual_weight or config.train.accumulate > 1):
        raise ValueError("--against=torch knows a SigLIP-like encoder, SimVQ and a plain decoder, without perceptual "
                         "losses or accumulation: see configs/bench_medium.py")
    o = config.optim
    return {"batch": config.train.batch_size, "image_size": config.data.image_size, "patch_size": patch_size,
            "codes": model.quantizer.size, "code_dim": model.quantizer.dim, "search_dim": SEARCH_DIM,
            "encoder": dataclasses.asdict(spec.vit), "decoder": dataclasses.asdict(decoder),
            "cls_token": model.decoder.cls_token,
            "optimizer": dict(lr=o.lr, b1=o.b1, b2=o.b2, weight_decay=o.weight_decay, clip_norm=o.clip_norm,
                              ema_decay=o.ema_decay)}


def measure(config: TaskConfig, case: str, command: list[str], *, repeats: int, against: str | None,
            seconds: float | None = None) -> dict[str, Any]:
    """Runs a case, in turns with PyTorch where wanted; returns what is written as JSON.

    Args:
      config: of the model.
      case: one of `CASES` of its task.
      command: starts a process that calls `serve` with both.
      repeats: runs that count.
      against: of `FRAMEWORKS`, what takes turns. Where that fails, "torch_error" of the result says why.
      seconds: after which a process is killed; None is never.

    Raises:
      ValueError: it cannot be run, or not in time.
    """
    work = model_flops(config, case)  # a model that cannot be is one line, of this process
    job = pytorch_job(config, case, compiled=against == "torch.compile") if against and case in AGAINST else None
    children, result = {}, {}

    def each(say: Callable[[Child], Any]) -> dict[str, Any]:
        """What every process says; PyTorch's is stopped where it fails."""
        said = {}
        for name, child in list(children.items()):
            try:
                said[name] = say(child)
            except ValueError as error:
                if name == "jax":
                    raise
                result["torch_error"] = str(error)
                children.pop(name).stop()
        return said

    with contextlib.ExitStack() as stack:

        def start(name: str, command: list[str], environment: dict[str, str] | None = None) -> None:
            # PyTorch's time is over before ours, which then is not lost.
            limit = seconds and seconds * (1.0 if name == "jax" else 0.7)
            children[name] = Child(command, f"{name}, {case},", seconds=limit, environment=environment)
            stack.callback(children[name].stop)

        # JAX would take most of a GPU's memory for itself.
        start("jax", command, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if job else None)
        platform = children["jax"].read()
        if job:  # on the same device; both make themselves ready at once
            job["device"] = "cuda" if platform == "gpu" else "cpu"
            start("torch", [sys.executable, str(Path(__file__).parent / "pytorch.py"), json.dumps(job)])
        images = int(each(Child.read)["jax"])
        each(Child.run)  # the second run: memory has found its size
        runs = [each(Child.run) for _ in range(repeats)]
        ends = each(Child.end)
    times = {name: [run[name] for run in runs] for name in children}
    median = {name: statistics.median(values) for name, values in times.items()}
    peak, kind, devices = ends["jax"]
    result |= {"seconds": median["jax"], "images_per_second": images / median["jax"], "peak_bytes": int(peak),
               "device": kind, "runs": times["jax"]}
    if work:
        result["flops_per_second"] = work / median["jax"]
        if chip := flops.CHIPS.get(kind):
            used = int(devices) if case.startswith("train") else 1  # the others know no mesh
            result["share_of_peak"] = result["flops_per_second"] / (chip.flops * used)
    if "torch" in children:
        result |= {"torch_seconds": median["torch"], "torch_peak_bytes": int(ends["torch"][0]),
                   "torch_runs": times["torch"], "ratio": median["torch"] / median["jax"]}
    return result


def line(case: str, result: dict[str, Any]) -> str:
    """A result as one line of text."""
    text = (f"{case:17s}{result['seconds']:9.3f} s {result['images_per_second']:9.2f} images/s "
            f"{result['peak_bytes'] / 2**20:7.0f} MiB")
    if "flops_per_second" in result:
        text += f" {result['flops_per_second'] / 1e9:9.0f} GFLOP/s"
    if "share_of_peak" in result:
        text += f" {result['share_of_peak']:6.1%} of peak"
    if "ratio" in result:
        text += (f"   torch {result['torch_seconds']:.3f} s, {result['torch_peak_bytes'] / 2**20:.0f} MiB: "
                 f"{result['ratio']:.2f}x")
    if "torch_error" in result:
        text += f"   {result['torch_error']}"
    return text
