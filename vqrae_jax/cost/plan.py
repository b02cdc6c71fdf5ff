"""What a training step needs of a TPU slice that need not be there: memory, operations, and what chips exchange.

Memory is what the TPU compiler assigns on each chip; operations come from the formula in flops.py; the bytes that chips
exchange are counted in the compiled program, loops multiplied out. The step's time is a lower bound, not a measurement.

For GPUs there is no such compiler. Their arguments are exact, from shapes and shardings; temporaries are memory.py's
estimate for one GPU's share of the batch, with attention as it is without cuDNN; what GPUs exchange is not known.
"""

import dataclasses
import functools
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh

from vqrae_jax import config as config_lib
from vqrae_jax.config import Config, GeneratorConfig, TaskConfig
from vqrae_jax.cost import flops, memory
from vqrae_jax.cost.flops import CHIPS
from vqrae_jax.foreign import one_line
from vqrae_jax.generator import build as generator_build
from vqrae_jax.generator import loss as generator_loss
from vqrae_jax.generator import task as generator_task
from vqrae_jax.generator import train_state as generator_state
from vqrae_jax.models import flat
from vqrae_jax.tokenizer import build, loss, task, train_state
from vqrae_jax.training import compilation, sharding
from vqrae_jax.training.compilation import GIB
from vqrae_jax.training.task import TrainStep

# A float32 matmul at highest precision takes so many bfloat16 passes on a TPU.
HIGHEST_PASSES = 6
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8,
         "s64": 8, "u64": 8}
# Names of GPUs in --topology, with a colon and their number behind.
GPUS = {"a100-40gb": "NVIDIA A100-SXM4-40GB", "a100-80gb": "NVIDIA A100-SXM4-80GB", "h100": "NVIDIA H100 80GB HBM3",
        "h200": "NVIDIA H200", "b200": "NVIDIA B200"}
# What a compiler assigns to temporaries over memory.py's figure: 1.0 to 2.6 for eleven steps compiled for TPU v5e, the
# median being 1.46 (docs/cluster-and-plan.md).
COMPILED_OVER_ESTIMATED = 1.5
HALVES = ("TPU7x",)  # of whose devices a chip has two
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One compiled step. Sizes are GiB a chip; `temporaries_gib` are activations and what else comes and goes.

    `fits` is the compiler's verdict; where the step does not fit, `hbm_gib_per_chip` is what it would have needed, and
    what only a compiled program tells is None. `estimated` is whether there was no compiler: nothing was compiled then,
    and `temporaries_gib` is an estimate. `chips` counts devices, of which a TPU7x has two.
    `search_share` is the code search's part of `compute_seconds`.
    """

    estimated: bool
    topology: str
    chip: str
    chips: int
    batch: int
    accumulate: int
    remat: str
    mesh: dict[str, int]
    parameters: dict[str, int]
    parameters_gib: float
    optimizer_gib: float
    temporaries_gib: float | None
    hbm_gib_per_chip: float
    hbm_limit_gib: float
    fits: bool
    compile_seconds: float
    model_flops_per_image: int
    model_flops_per_step: int
    collective_gib_per_step: dict[str, float] | None
    compute_seconds: float
    search_share: float
    collective_seconds: float | None


class Subject(NamedTuple):
    """What is planned of a config, whatever its task.

    Attributes:
      abstract: `mesh -> (state, frozen arrays, batch)`, as `Task.abstract` gives them.
      train_step: the most expensive one.
      parameters: `(state, frozen arrays) -> ` numbers of parameters by part.
      averages: of a state, what the optimizer keeps, and moving averages.
      per_image: operations of an image.
      per_step: of a step.
      search: of a step, those of the code search: one bfloat16 pass, after which few codes are compared elementwise.
      at_highest: of a step, those of float32 matmuls at highest precision.
    """

    abstract: Callable[[Mesh | AbstractMesh], tuple[Any, Any, Any]]
    train_step: TrainStep
    parameters: Callable[[Any, Any], dict[str, int]]
    averages: Callable[[Any], Any]
    per_image: int
    per_step: int
    search: int
    at_highest: int


def subject(config: TaskConfig) -> Subject:
    """What is planned of a config; with a discriminator, the step in which it learns."""
    return _generator(config) if isinstance(config, GeneratorConfig) else _tokenizer(config)


def _tokenizer(config: Config) -> Subject:
    phase, structure = loss.phase_of(config, config.train.steps), build.structure(config)
    work, model = flops.flops(config, structure, phase), _sizes({**structure.params, **structure.buffers})
    return Subject(
        abstract=lambda mesh: (*train_state.in_training(config, structure, mesh), task.abstract_batch(config, mesh)),
        train_step=loss.make_train_step(config, structure, phase),
        parameters=lambda state, frozen: {
            **{part: model[part] for part in ("encoder", "quantizer", "decoder")},
            "discriminator": _size(state.gan.params), "frozen networks": _size(frozen.networks),
            "teacher": _size(frozen.teacher)},
        averages=lambda state: (state.opt_state, state.gan.opt_state, state.ema),
        per_image=work.train, per_step=work.per_step(config),
        search=config.train.batch_size * work.search, at_highest=config.train.accumulate * work.train_codes)


def _generator(config: GeneratorConfig) -> Subject:
    structure = generator_build.structure(config, generator_build.planned_codes(config))
    per_image, model = flops.generator_work(config, structure).backward(), _sizes(structure.params)
    return Subject(
        abstract=lambda mesh: (*generator_state.in_training(config, structure, mesh),
                               generator_task.abstract_batch(config, structure, mesh)),
        train_step=generator_loss.make_train_step(config, structure), parameters=lambda state, frozen: model,
        averages=lambda state: (state.opt_state, state.ema),
        per_image=per_image, per_step=config.train.batch_size * per_image, search=0, at_highest=0)


def _sizes(arrays: flat.Arrays) -> dict[str, int]:
    """Numbers in arrays by part."""
    return {part: _size({path: value for path, value in arrays.items() if flat.part(path) == part})
            for part in flat.parts(arrays)}


def _size(arrays: flat.Arrays) -> int:
    return sum(value.size for value in arrays.values())


class Slice(NamedTuple):
    """What a step is planned for.

    Attributes:
      kind: of its devices, one of `CHIPS`.
      size: how many there are.
      devices: those of the TPU compiler; None for GPUs.
    """

    kind: str
    size: int
    devices: list[Any] | None

    def mesh(self, mesh: config_lib.Mesh) -> Mesh | AbstractMesh:
        if self.devices is None:
            return sharding.abstract_mesh(mesh, self.size)
        return sharding.make_mesh(mesh, self.devices)


def slice_of(topology: str) -> Slice:
    """A TPU slice, `v5e:4x4`, or so many GPUs, `h100:8`.

    Raises:
      ValueError: no TPU compiler, or no such slice or GPU.
    """
    name, _, size = topology.partition(":")
    if name in GPUS:
        if not re.fullmatch(r"[1-9]\d{0,5}", size):
            raise ValueError(f"--topology={topology}: how many GPUs? They look like {name}:8")
        return Slice(GPUS[name], int(size), None)
    devices = topology_devices(topology)
    return Slice(devices[0].device_kind, len(devices), devices)


def topology_devices(name: str) -> list[Any]:
    """The devices of a TPU slice, `v5e:4x4`, without the slice.

    Raises:
      ValueError: no TPU compiler, or no such slice.
    """
    # Or the compiler would ask what this machine is, complain that it is no TPU, and lock the chips of one that is.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_ID": "0",
                   "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
                   "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
    try:
        devices = list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise ValueError(f"--topology={name}: {one_line(error)}; names look like v5e:4x4, and the compiler comes with "
                         f"pip install 'vqrae_jax[tpu]'; GPUs are {', '.join(GPUS)}, as in h100:8") from None
    known = [kind for kind in CHIPS if kind.startswith("TPU")]
    kind, chips = devices[0].device_kind, {tuple(device.coords) for device in devices}
    if kind not in known or (len(chips) < len(devices) and kind not in HALVES):
        raise ValueError(f"--topology={name}: {kind!r} cannot be planned, only chips that are one device each, or "
                         f"TPU7x, of the kinds {', '.join(known)}")
    return devices


def plan(config: TaskConfig, topology: str) -> Plan:
    """Compiles the training step of a config for a slice; for GPUs, estimates what it needs.

    Raises:
      ValueError: a slice that is not there, or a mesh or batch that does not fit it.
    """
    chips = slice_of(topology)
    chip = CHIPS[chips.kind]
    mesh = chips.mesh(config.mesh)
    sharding.check_batch_size(mesh, config)
    planned = subject(config)
    state, frozen, batch = planned.abstract(mesh)
    optimizer = _bytes_per_chip(planned.averages(state))
    arguments = _bytes_per_chip((state, frozen))
    started = time.perf_counter()
    if chips.devices is None:
        temporaries: int | None = _estimated(config, chips.size, state)
        used, exchanged = arguments + temporaries, None
    else:
        lowered = sharding.jit_step(planned.train_step, mesh, state).trace(state, frozen, batch).lower()
        used, exchanged = _compiled(lowered, arguments)
        temporaries = None if exchanged is None else used - arguments
    seconds = time.perf_counter() - started
    passes = planned.per_step + (HIGHEST_PASSES - 1) * planned.at_highest
    return Plan(
        estimated=chips.devices is None, topology=topology, chip=chips.kind, chips=chips.size,
        batch=config.train.batch_size, accumulate=config.train.accumulate, remat=config.model.remat,
        mesh=dict(mesh.shape), parameters=planned.parameters(state, frozen),
        parameters_gib=(arguments - optimizer) / GIB, optimizer_gib=optimizer / GIB,
        temporaries_gib=None if temporaries is None else temporaries / GIB,
        hbm_gib_per_chip=used / GIB, hbm_limit_gib=chip.memory / GIB,
        fits=temporaries is not None and used <= chip.memory,
        compile_seconds=seconds, model_flops_per_image=planned.per_image, model_flops_per_step=planned.per_step,
        collective_gib_per_step=None if exchanged is None else {
            name: count / GIB for name, count in exchanged.items()},
        compute_seconds=passes / (chip.flops * chips.size), search_share=planned.search / passes,
        collective_seconds=None if exchanged is None else sum(exchanged.values()) / chip.interconnect)


def _compiled(lowered: Any, arguments: int) -> tuple[int, dict[str, int] | None]:
    """Bytes of a chip's memory in use, and of what it sends; None where the step does not fit.

    Args:
      lowered: the step.
      arguments: bytes of those.
    """
    try:
        compiled: Any = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # The compiler names everything it would have used, or temporaries only.
        found = re.search(r"Used ([\d.]+)([MG]) of [\d.]+[MG] hbm|temporaries \(([\d.]+)([MG])\)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not found:
            raise
        size, unit = found[1] or found[3], found[2] or found[4]
        return int(float(size) * {"M": 2**20, "G": GIB}[unit]) + (arguments if found[3] else 0), None
    analysis = compiled.memory_analysis()
    return (compilation.memory_in_use(analysis) + analysis.generated_code_size_in_bytes,
            collective_bytes(compiled.as_text()))


def _estimated(config: TaskConfig, chips: int, state: Any) -> int:
    """Bytes of a chip's temporaries, from the program of its share of the batch.

    What has the shape of a parameter, above all its gradient, is split as that is.
    """
    shares = {(leaf.shape, leaf.dtype): math.prod(leaf.sharding.shard_shape(leaf.shape)) / max(leaf.size, 1)
              for leaf in jax.tree.leaves(state)}

    def size(array: Any) -> int:
        known = (array.shape, array.dtype)
        return round(memory.nbytes(array) * (shares[known] if known in shares else 1))

    train = dataclasses.replace(config.train, batch_size=config.train.batch_size // chips)
    planned, mesh = subject(dataclasses.replace(config, train=train)), sharding.abstract_mesh(config_lib.Mesh(), 1)
    arguments = planned.abstract(mesh)
    step = sharding.jit_step(planned.train_step, mesh, arguments[0])
    return round(COMPILED_OVER_ESTIMATED * memory.temporaries(step.trace(*arguments).jaxpr.jaxpr, size))


def _bytes_per_chip(tree: Any) -> int:
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))


def collective_bytes(hlo: str) -> dict[str, int]:
    """Bytes that a chip sends in one run of a compiled program, by operation; bodies of loops times their trip count.

    A ring is assumed: of n chips, each sends n - 1 shares of what is gathered or reduced and scattered. An all-reduce
    is counted as twice its operands, an all-to-all as its operands, as if n were large.

    Args:
      hlo: `compiled.as_text()`.
    """
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = header[2]
            entry = name if header[1] else entry
            computations[name] = []
        elif name and line.startswith(" "):
            computations[name].append(line)

    def trip_count(loop: str) -> int:
        """The constant that a scan's condition compares its counter with; 1 where the number depends on data."""
        condition = re.search(r"condition=%([\w.\-]+)", loop)
        assert condition
        lines = "\n".join(computations[condition[1]])
        return max((int(constant) for constant in re.findall(r" [su]32\[\]\S* constant\((\d+)\)", lines)),
                   default=1)

    @functools.cache
    def sent(computation: str) -> dict[str, tuple[str, int]]:
        """Each transfer's kind and bytes. A TPU's transfer spans several fusions, which name the same channel."""
        types, found = {}, {}
        for line in computations[computation]:
            operation = re.search(r"%([\w.\-]+) = (.*?) ([\w\-]+)\(([^)]*)\)", line)
            if not operation:
                continue
            name, types[name], operator, operands = operation[1], *operation.group(2, 3, 4)
            kind = operator.removesuffix("-start")
            if kind in COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", line)
                size = sum(_bytes(types[operand]) for operand in re.findall(r"%([\w.\-]+)", operands))
                result = _bytes(types[name]) - (size if operator.endswith("-start") else 0)  # it lists both
                if computation.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"  # the result is cut inside
                elif kind in ("all-gather", "reduce-scatter"):
                    size = abs(result - size)
                elif kind == "all-reduce":
                    size *= 2
                found[channel[1] if channel else name] = kind, size
                continue  # what it calls only adds two numbers
            attributes = "calls|to_apply|body|branch_computations|true_computation|false_computation"
            called = re.findall(rf"(?:{attributes})=\{{?((?:%[\w.\-]+(?:, )?)+)", line)
            inner = [sent(name) for name in re.findall(r"%([\w.\-]+)", " ".join(called))]
            if operator == "conditional":
                inner = [max(inner, key=lambda branch: sum(size for _, size in branch.values()))]
            scope, times = (f"{name}/", trip_count(line)) if operator == "while" else ("", 1)
            found |= {scope + channel: (kind, times * size)
                      for transfers in inner for channel, (kind, size) in transfers.items()}
        return found

    total: dict[str, int] = dict.fromkeys(COLLECTIVES, 0)
    for kind, size in sent(entry).values():
        total[kind] += size
    return {kind: size for kind, size in total.items() if size}


def _bytes(shapes: str) -> int:
    """Bytes of all arrays of an HLO type."""
    return sum(BYTES[dtype] * math.prod(map(int, filter(None, dimensions.split(","))))
               for dtype, dimensions in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes))


def candidates(config: TaskConfig, chips: int) -> list[TaskConfig]:
    """Variants of a config from the fastest to the most frugal: meshes, then rematerialisation, then accumulation."""
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if chips % size == 0]
    found = []
    for accumulate in (1, 2, 4, 8, 16):
        for remat in ("minimal", "full"):
            for fsdp in sizes:
                if config.train.batch_size % (accumulate * chips) == 0:
                    found.append(dataclasses.replace(
                        config, mesh=config_lib.Mesh(data=-1, fsdp=fsdp),
                        train=dataclasses.replace(config.train, accumulate=accumulate),
                        model=dataclasses.replace(config.model, remat=remat)))
    return found


def search(config: TaskConfig, topology: str, report: Callable[[str], None]) -> Plan | None:
    """The first of `candidates` that fits, trying only those whose state alone leaves room; None if none does.

    What each that was tried needs goes to `report`, a line of text.
    """
    chips = slice_of(topology)
    once = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=1))
    sharding.check_batch_size(chips.mesh(config_lib.Mesh()), once)
    limit = CHIPS[chips.kind].memory
    planned = subject(config)
    needed: dict[tuple[int, str], float] = {}
    for candidate in candidates(config, chips.size):
        abstract, frozen, _ = planned.abstract(chips.mesh(candidate.mesh))
        state = _bytes_per_chip((abstract, frozen))
        accumulate, remat = candidate.train.accumulate, candidate.model.remat
        # Gradients shrink with the mesh as parameters do, activations with the micro-batch at best in proportion: what
        # then is still too much is not tried.
        gradients = _bytes_per_chip(abstract.params)
        activations = [used * before / accumulate for (before, kind), used in needed.items() if kind == remat]
        if state + gradients + min(activations, default=0) > limit:
            continue
        result = plan(candidate, topology)
        report(_row(result))
        if result.fits:
            return result
        needed[accumulate, remat] = result.hbm_gib_per_chip * GIB - state - gradients
    return None


def _row(result: Plan) -> str:
    verdict = "fits" if result.fits else "does not fit"
    mesh = " x ".join(f"{axis} {size}" for axis, size in result.mesh.items())
    return (f"{mesh}, accumulate {result.accumulate}, remat {result.remat}: {result.hbm_gib_per_chip:.2f} of "
            f"{result.hbm_limit_gib:.0f} GiB, {verdict} "
            f"({'estimated' if result.estimated else 'compiled'} in {result.compile_seconds:.0f} s)")


def table(result: Plan) -> str:
    """The plan as text."""
    gib = lambda value: "-" if value is None else f"{value:.2f} GiB"
    search = f"; {result.search_share:.1%} of it the code search" if result.search_share else ""
    rows = [
        (f"{result.topology}", f"{result.chips} chips ({result.chip}), {_row(result)}"),
        ("images a step", f"{result.batch}, {result.batch // (result.chips * result.accumulate)} a chip at a time"),
        *((f"parameters, {part}", f"{count:,}") for part, count in result.parameters.items() if count),
        ("a chip holds", f"parameters {gib(result.parameters_gib)}, optimizer and averages "
                         f"{gib(result.optimizer_gib)}, activations and temporaries {gib(result.temporaries_gib)}"),
        ("model FLOPs", f"{result.model_flops_per_image / 1e12:.3f} T an image, "
                        f"{result.model_flops_per_step / 1e15:.3f} P a step"),
        ("a chip sends", ", ".join(f"{kind} {gib(size)}" for kind, size in result.collective_gib_per_step.items())
         if result.collective_gib_per_step else "-"),
        ("a step at least", f"{result.compute_seconds:.3f} s if all matmuls ran at the chip's peak (bfloat16{search})"),
        ("", "-" if result.collective_seconds is None else
         f"{result.collective_seconds:.3f} s if all that is sent used every link at full speed"),
    ]
    return "\n".join(f"{name:<28}{value}" for name, value in rows)
