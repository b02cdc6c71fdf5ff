"""An estimate of what a step keeps in memory beside its arguments, from its jaxpr, where no compiler is at hand.

A walk over the program in its order, adding up what has been computed and is still to be read. What XLA does is
imitated in four ways: elementwise operations whose result is read once are part of what reads it; reshapes and updates
in place are the memory that they start from; calls are part of their caller; and the results of the whole step lie
where the donated state was. Neither layouts nor the order that a compiler chooses are known.
"""

import collections
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# By the names of JAX's primitives.
_SAME_MEMORY = {"reshape", "squeeze", "expand_dims", "name", "copy", "optimization_barrier", "sharding_constraint",
                "bitcast_convert_type"}
_UPDATES = {"dynamic_update_slice", "scatter", "scatter-add"}
_FUSED = {"abs", "add", "add_any", "and", "broadcast_in_dim", "ceil", "clamp", "convert_element_type", "cos", "div",
          "eq", "erf", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "iota", "is_finite", "le",
          "log", "log1p", "log2", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "one_minus_square", "or",
          "pow", "rem", "round", "rsqrt", "select_n", "shift_left", "shift_right_logical", "sign", "sin", "slice",
          "sqrt", "square", "sub", "tanh", "transpose", "xor"}
_CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2", "custom_jvp_call",
          "custom_vjp_call"}
_LOOPS = {"scan", "while", "cond"}


class _Operation(NamedTuple):
    """An operation: its name, the memory it reads, the memory it makes with its type, and the bodies of a loop."""

    name: str
    reads: frozenset[int]
    makes: dict[int, Any]
    bodies: list[Jaxpr]


def nbytes(array: Any) -> int:
    """Bytes of what has this `shape` and `dtype`; of a random key eight."""
    return math.prod(array.shape) * (array.dtype.itemsize if isinstance(array.dtype, np.dtype) else 8)


def temporaries(program: Jaxpr, size: Callable[[Any], int]) -> int:
    """The most bytes that live at once in a program beside its arguments and results.

    Args:
      program: `jax.jit(f).trace(...).jaxpr.jaxpr`.
      size: bytes of an array with this `shape` and `dtype`, such as `nbytes`.
    """
    fresh, memory = itertools.count(), {}
    operations = list(_operations(program, memory, fresh))
    not_ours = {memory[variable] for variable in (*program.invars, *program.constvars)}
    not_ours |= {memory[variable] for variable in program.outvars if not isinstance(variable, Literal)}
    counts = collections.Counter(name for operation in operations for name in operation.reads)
    once = {name for name, count in counts.items() if count == 1} - not_ours

    # Backwards: when each is read for the last time. What is fused is not stored, and what it reads lives on instead.
    last: dict[int, int] = {}
    fused: set[int] = set()
    for at, operation in reversed(list(enumerate(operations))):
        until = at
        if operation.name in _FUSED and operation.makes.keys() <= once:
            fused |= operation.makes.keys()
            until = max(last[name] for name in operation.makes)
        last |= {name: max(last[name], until) if name in last else until for name in operation.reads}

    live = most = 0
    held: dict[int, int] = {}
    ends: dict[int, list[int]] = {at: [] for at in range(len(operations))}
    for name, at in last.items():
        ends[at].append(name)
    for at, operation in enumerate(operations):
        for name, array in operation.makes.items():
            if name in last and name not in not_ours and name not in fused and name not in held:
                held[name] = size(array)
                live += held[name]
        most = max(most, live + max((temporaries(body, size) for body in operation.bodies), default=0))
        live -= sum(held.pop(name) for name in ends[at] if name in held)
    return most


def _operations(program: Jaxpr, memory: dict[Any, int], fresh: Iterator[int]) -> Iterator[_Operation]:
    """A program's operations in order, calls replaced by what they do.

    Args:
      program: which.
      memory: of each variable; those that are not there yet are added.
      fresh: numbers for it.
    """

    def of(variable: Any) -> int:
        if isinstance(variable, Literal):
            return next(fresh)
        if variable not in memory:
            memory[variable] = next(fresh)
        return memory[variable]

    for variable in (*program.invars, *program.constvars):
        of(variable)
    for equation in program.eqns:
        name = equation.primitive.name
        if name in _CALLS:
            called = next(_jaxprs(equation.params))
            inside = dict(zip(called.invars, map(of, equation.invars), strict=True))
            yield from _operations(called, inside, fresh)
            memory |= {outer: next(fresh) if isinstance(inner, Literal) else inside[inner]
                       for outer, inner in zip(equation.outvars, called.outvars, strict=True)}
            continue
        if name in _SAME_MEMORY | _UPDATES:
            memory |= dict(zip(equation.outvars, map(of, equation.invars), strict=False))
        if name not in _SAME_MEMORY:
            reads = frozenset(of(variable) for variable in equation.invars if not isinstance(variable, Literal))
            yield _Operation(name, reads, {of(variable): variable.aval for variable in equation.outvars},
                             list(_jaxprs(equation.params)) if name in _LOOPS else [])


def _jaxprs(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item
