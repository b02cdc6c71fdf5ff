"""The formula of floating-point operations, against what JAX traces and XLA counts."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from vqrae_jax import build, cost
from vqrae_jax import config as config_lib
from vqrae_jax import step as step_lib
from vqrae_jax.models import flat


def traced(jaxpr) -> int:
    """Multiplications and additions of all matmuls and convolutions of a program, loops multiplied out."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracting)
            total += 2 * depth * equation.outvars[0].aval.size
        elif equation.primitive.name == "conv_general_dilated":
            spec = equation.params["dimension_numbers"].rhs_spec
            kernel = equation.invars[1].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(kernel) // kernel[spec[0]]
        inner = [traced(part.jaxpr if hasattr(part, "jaxpr") else part)
                 for value in equation.params.values() for part in (value if isinstance(value, tuple) else (value,))
                 if hasattr(part, "jaxpr") or hasattr(part, "eqns")]
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * (max(inner) if equation.primitive.name == "cond" else sum(inner))
    return total


@pytest.mark.parametrize("changes", [
    {},
    {"optim.lr_multipliers": (), "loss.distill_weight": 1.0, "train.accumulate": 2},
])
def test_the_formula_is_what_the_programs_do(changes, tiny_config, tiny_networks):
    tiny_config.model.quantizer.dim = 24
    tiny_config.update_from_flattened_dict(changes)
    config = config_lib.parse(tiny_config)
    graphdef, params, codebook = build.structure(config)
    arrays = {**params, **codebook}
    images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    formula = cost.flops(config, gan=False)

    reconstruct = jax.make_jaxpr(lambda arrays, x: flat.merge(graphdef, arrays)(x, train=False).images)(arrays, images)
    assert traced(reconstruct.jaxpr) == 4 * (formula.encode + formula.decode) + formula.codes

    parts = build.parts(config, graphdef)
    _, networks, network_state = build.networks(config)
    state = jax.eval_shape(lambda *a: step_lib.init_state(config, parts, *a), params, codebook, networks, network_state)
    train_step = functools.partial(step_lib.make_train_step(config, parts), gan=False)
    step = jax.make_jaxpr(train_step)(*state, jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.uint8))
    assert traced(step.jaxpr) == formula.per_step(config)
