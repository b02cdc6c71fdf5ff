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
    return {"/".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}
