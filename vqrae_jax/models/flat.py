"""Modules as flat dictionaries `{path: array}` and back.

A path joins attribute names by "/", for example `encoder/vit/transformer/blocks/mlp/fc1/kernel`. Patterns for freezing,
learning rates and sharding, checkpoints and weight conversion all speak of parameters by these paths.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import nnx

Arrays = dict[str, jax.Array]


class Buffer(nnx.Variable):
    """What a module keeps but no gradient learns: frozen codes, moving statistics, singular vectors."""


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Arrays, Arrays]:
    """A module's structure, its parameters, and its buffers."""
    graphdef, params, buffers = nnx.split(module, nnx.Param, ...)
    return graphdef, _arrays(params), _arrays(buffers)


def merge(graphdef: nnx.GraphDef, *dictionaries: Mapping[str, jax.Array]) -> Any:
    """The module again, from dictionaries that together hold all its paths; a later one overrides an earlier one."""
    arrays = {path: value for arrays in dictionaries for path, value in arrays.items()}
    # Entries of an nnx.List have numbers for names.
    key = lambda path: tuple(int(name) if name.isdigit() else name for name in path.split("/"))
    leaves = [(key(path), value) for path, value in arrays.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def cast_types(graphdef: nnx.GraphDef, *dictionaries: Mapping[str, Any]) -> dict[str, Any]:
    """The types to which a module casts its parameters before it does anything else with them, `{path: dtype}`.

    A module says so where it makes one, `nnx.Param(value, cast_to=dtype)`. While such a parameter does not learn it can
    as well be kept in that type: with the same result, and in less memory. (Where a processor has no bfloat16, XLA may
    leave out the cast of a float32 one, `xla_allow_excess_precision`, and then has another rounding.) Those that are
    not in here are used as they are. The dictionaries, of arrays or shapes, are those of `merge`.
    """
    params = nnx.to_flat_state(nnx.state(merge(graphdef, *dictionaries), nnx.Param))
    return {_path(path): variable.cast_to for path, variable in params if variable.has_metadata("cast_to")}


def with_types(shapes: Mapping[str, Any], types: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes, of which those that are in `types` have another one."""
    return {path: shape.update(dtype=types[path]) if path in types else shape for path, shape in shapes.items()}


def prefixed(prefix: str, tree: Mapping) -> Arrays:
    """Nested dictionaries as a flat one whose paths start with `prefix`."""
    flat = {}
    for name, value in tree.items():
        flat |= prefixed(f"{prefix}{name}/", value) if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def under(prefix: str, arrays: Mapping[str, jax.Array]) -> Arrays:
    """The entries whose paths start with `prefix`, without it."""
    return {path.removeprefix(prefix): value for path, value in arrays.items() if path.startswith(prefix)}


def part(path: str) -> str:
    """The first name of a path, what users call a part of the model: `encoder`, `quantizer`, `decoder`, ..."""
    return path.split("/")[0]


def parts(paths: Iterable[str]) -> list[str]:
    """The parts that paths belong to, sorted."""
    return sorted({part(path) for path in paths})


def _arrays(state: nnx.State) -> Arrays:
    return {_path(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def _path(names: Iterable[Any]) -> str:
    return "/".join(map(str, names))
