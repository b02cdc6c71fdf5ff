"""The device mesh, and which device holds what: the only file that knows the names of the mesh's axes.

    data   copies of the model; each takes its share of every batch
    fsdp   parameters, optimizer state and moving averages are split along it (ZeRO 3, arXiv 1910.02054), and each of
           its devices takes a share of the batch as well

Shardings are declared where arrays are made and where the step is compiled; in between XLA propagates them. So models
and steps are written for one device. In a run of several processes every process makes the same calls.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from vqrae_jax import config as config_lib

# (path pattern, dimensions): along fsdp an array is split in the first of these dimensions that the axis divides.
# The first pattern that matches a whole path counts; moments and averages end in the path of their parameter.
Rules = tuple[tuple[str, tuple[int, ...]], ...]
RULES: Rules = (
    (r".*/blocks/.*kernel", (1, 2)),  # stacked over depth, which is scanned over: every step needs a whole layer
    (r".*kernel", (-1, -2)),
    (r".*token_embedding", (-2, -1)),
    (r".*", ()),  # biases, norms, positions, counters
)

Tree = TypeVar("Tree")


def make_mesh(mesh: config_lib.Mesh, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a config, over all devices of all processes, or those given.

    Raises:
      ValueError: the axes do not multiply to the number of devices; the message names the key.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(mesh, len(devices))
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes), devices=devices)


def abstract_mesh(mesh: config_lib.Mesh, devices: int) -> AbstractMesh:
    """The mesh of a config over so many devices, none of which is there: enough for shapes and shardings.

    Raises:
      ValueError: as `make_mesh`.
    """
    sizes = _sizes(mesh, devices)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))


def _sizes(mesh: config_lib.Mesh, devices: int) -> dict[str, int]:
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp}
    known = math.prod(size for size in sizes.values() if size > 0)
    if -1 in sizes.values():
        sizes = {axis: devices // known if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise ValueError(f"config keys mesh.data {mesh.data} and mesh.fsdp {mesh.fsdp} do not fit {devices} "
                         f"device{'s' if devices > 1 else ''}: their product must be that number, -1 is the rest")
    return sizes


def one_device() -> Mesh:
    """The mesh of a process by itself: its first device."""
    return make_mesh(config_lib.Mesh(), jax.local_devices()[:1])


def off_mesh(arrays: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Arrays of `one_device()`, or of the host, without that mesh, so that they work inside a mesh of the user's."""
    return {path: jnp.asarray(array).addressable_data(0) for path, array in arrays.items()}


def of(mesh: Mesh | AbstractMesh, tree: Any, rules: Rules) -> Any:
    """The sharding of every array in a tree of arrays or shapes, by its path in `rules`."""
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(_name(path), leaf.shape, mesh.shape["fsdp"], rules)), tree)


def placed(mesh: Mesh | AbstractMesh, shapes: Any, rules: Rules) -> Any:
    """A tree of shapes with the sharding of each."""
    # Said explicitly, or Orbax would look for the devices that a checkpoint was saved from.
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes,
                        of(mesh, shapes, rules))


def made(init: Callable[..., Any], mesh: Mesh, rules: Rules, *arrays: Any) -> Any:
    """What `init(*arrays)` makes, every device making its own share."""
    # What draws runs once: on a CPU, LLVM would optimize its random bits for longer than that takes.
    cheaper = mesh.devices.flat[0].platform == "cpu" and not jax.config.read("jax_disable_most_optimizations")
    return jax.jit(init, out_shardings=of(mesh, jax.eval_shape(init, *arrays), rules),
                   compiler_options={"xla_backend_optimization_level": 1} if cheaper else None)(*arrays)


def cast(arrays: Tree, shapes: Tree) -> Tree:
    """Arrays in the types of shapes and where these are; those that have their type already are not copied."""
    leaves, structure = jax.tree.flatten(arrays)
    wanted = jax.tree.leaves(shapes)
    changed = {i: leaf for i, leaf in enumerate(leaves) if leaf.dtype != wanted[i].dtype}
    if not changed:
        return arrays
    # One program for all: to compile one for every shape would take seconds.
    converted = jax.jit(lambda arrays: {i: array.astype(wanted[i].dtype) for i, array in arrays.items()},
                        out_shardings={i: wanted[i].sharding for i in changed})(changed)
    return structure.unflatten(converted[i] if i in converted else leaf for i, leaf in enumerate(leaves))


def put(mesh: Mesh, arrays: Mapping[str, Any], rules: Rules) -> dict[str, jax.Array]:
    """The host's arrays `{path: array}`, the same in every process, on the devices."""
    place = lambda array, sharding: jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    return jax.tree.map(place, dict(arrays), of(mesh, dict(arrays), rules))


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _spec(name: str, shape: tuple[int, ...], fsdp: int, rules: Rules) -> PartitionSpec:
    dimensions = next(dimensions for pattern, dimensions in rules if re.fullmatch(pattern, name))
    for dimension in dimensions:
        if -len(shape) <= dimension < len(shape) and shape[dimension] % fsdp == 0:
            split: list[str | None] = [None] * len(shape)
            split[dimension] = "fsdp"
            return PartitionSpec(*split)
    return PartitionSpec()


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The first dimension split over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def put_batch(mesh: Mesh, tree: Any) -> Any:
    """A global batch, of which every process gives its own rows: `[B / processes, ...]` each -> `[B, ...]`."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), tree)


def jit_step(train_step: Callable[..., Any], mesh: Mesh | AbstractMesh, state: Any) -> Any:
    """A training step, compiled so that the new state lies where the old one did, in its memory.

    Args:
      train_step: of a task.
      mesh: of the run.
      state: arrays, or shapes with shardings.
    """
    return jax.jit(on(mesh, train_step), donate_argnums=0,
                   out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), replicated(mesh)))


def on(mesh: Mesh | AbstractMesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function to be jitted that is traced with the mesh around it, which the hints of `models.placement` need."""

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def check_batch_size(mesh: Mesh | AbstractMesh, config: config_lib.Run) -> None:
    """Raises ValueError where a micro-batch cannot be split evenly over the devices."""
    micro = config.train.batch_size // config.train.accumulate
    if micro % mesh.size:
        raise ValueError(f"config key train.batch_size {config.train.batch_size} over train.accumulate "
                         f"{config.train.accumulate} gives micro-batches of {micro}, which {mesh.size} devices cannot "
                         f"share: it must be a multiple of {mesh.size * config.train.accumulate}")
