"""The formula of floating-point operations, against what JAX traces and XLA counts."""

import math

import jax
import jax.numpy as jnp
import pytest

from tests.generator.tiny import CODES
from tests.generator.tiny import tiny as tiny_generator
from vqrae_jax import config as config_lib
from vqrae_jax.cost.flops import flops, generator_work
from vqrae_jax.generator import build as generator_build
from vqrae_jax.generator import loss as generator_loss
from vqrae_jax.generator import task as generator_task
from vqrae_jax.generator import train_state as generator_state
from vqrae_jax.models import flat
from vqrae_jax.tokenizer import build, train_state
from vqrae_jax.tokenizer.loss import make_train_step, phase_of
from vqrae_jax.tokenizer.task import abstract_batch
from vqrae_jax.training import sharding


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
        inner = [traced(program.jaxpr if hasattr(program, "jaxpr") else program)
                 for value in equation.params.values() for program in (value if isinstance(value, tuple) else (value,))
                 if hasattr(program, "jaxpr") or hasattr(program, "eqns")]
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * (max(inner) if equation.primitive.name == "cond" else sum(inner))
    return total


def parsed(tiny_config, changes: dict) -> config_lib.Config:
    tiny_config.model.quantizer.dim = 24
    tiny_config.update_from_flattened_dict(changes)
    return config_lib.parse(tiny_config)


LEARNING = {"optim.lr_multipliers": ()}
PATCHGAN = {"gan.discriminator": "patchgan", "gan.channels": 32, "gan.adaptive": True}
DINO = {"gan.discriminator": "dino_s16", "gan.random_weights": True}
ENCODER = {"loss.perceptual_weight": 1.0, "loss.perceptual.encoder": 1.0}
PERCEPTUAL = {"loss.perceptual_weight": 1.0, "loss.perceptual.lpips": 1.0, "loss.perceptual.convnext_s": 1.0}


# What the formula leaves out and a traced step has: the last layer's output, dead, beside the adaptive weight; the
# resizing of images; the spectral norms and recomputed attention weights of a DINO.
@pytest.mark.parametrize(("changes", "learning_parts", "tolerance"), [
    ({}, 1, 0),
    ({**LEARNING, "loss.distill_weight": 1.0, "train.accumulate": 2}, 2, 0),
    ({"model.quantizer.size": 512, "model.quantizer.dim": 32, "model.encoder.layers": (1, 3)}, 1, 0),
    ({"optim.lr_multipliers": (("encoder/.*", 1.0), ("encoder.*", 0.0))}, 2, 0),
    ({"optim.lr_multipliers": (("enc.*/kernel", 0.0), ("encoder.*", 0.0))}, 1, 0),
    ({**LEARNING, "model.quantizer.kind": "ema", **PATCHGAN}, 2, 1e-3),
    ({**LEARNING, **PERCEPTUAL}, 2, 1e-2),
    ({**LEARNING, **DINO}, 2, 2e-2),
    (ENCODER, 2, 0),
    ({**LEARNING, **ENCODER}, 3, 0),
])
def test_the_formula_is_what_a_step_does(changes, learning_parts, tolerance, tiny_config):
    config = parsed(tiny_config, changes)
    phase = phase_of(config, config.train.steps)
    structure, mesh = build.structure(config), sharding.one_device()
    state = train_state.abstract(config, structure, mesh)
    step = jax.make_jaxpr(make_train_step(config, structure, phase))(*state, abstract_batch(config, mesh))
    # Attention computes its weights once more in the backward pass: three blocks, 16 tokens, 32 wide, 4 images.
    again = learning_parts * 3 * 2 * 16**2 * 32 * 4
    work = flops(config, structure, phase)
    # And an accelerator may search twice, where bfloat16 leaves too many codes.
    formula = work.per_step(config) + again + config.train.batch_size * work.search
    assert formula == pytest.approx(traced(step.jaxpr), rel=tolerance, abs=0)


def test_the_formula_is_what_a_generators_step_does():
    """But for attention, of which the formula counts what a token may see, and the program, which has no mask, all."""
    config = tiny_generator()
    config.train.accumulate = 2
    config = config_lib.parse(config, config_lib.GeneratorConfig)
    structure, mesh = generator_build.structure(config, CODES), sharding.one_device()
    step = jax.make_jaxpr(generator_loss.make_train_step(config, structure))(
        *generator_state.abstract(config, structure, mesh), generator_task.abstract_batch(config, structure, mesh))
    spec, tokens = structure.spec, CODES.grid**2
    matmul = 2 * tokens**2 * spec.depth * spec.heads * spec.head_dim  # queries with keys, or weights with values
    seen = (tokens + 1) / (2 * tokens)
    # Two of them forward, and backward five, of which one makes the weights once more.
    formula = generator_work(config, structure).backward() + 7 * matmul - 6 * seen * matmul
    assert traced(step.jaxpr) == config.train.batch_size * formula


def test_xla_counts_the_same_where_nothing_is_a_loop(tiny_config):
    """One block each: XLA counts the body of a loop once. It counts elementwise operations too."""
    config = parsed(tiny_config, {"model.encoder.layers": (1,), "model.decoder.shape": "custom",
                                  "model.decoder.width": 512, "model.decoder.depth": 1, "model.decoder.heads": 4,
                                  "model.decoder.mlp_dim": 2048, "model.quantizer.kind": "none"})
    structure = build.structure(config)
    reconstruct = jax.jit(lambda arrays, x: flat.merge(structure.graphdef, arrays)(x, train=False).images)
    lowered = reconstruct.lower(structure.params | structure.buffers, jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32))
    formula = flops(config, structure, "")
    assert lowered.compile().cost_analysis()["flops"] == pytest.approx(4 * (formula.encode + formula.decode), rel=0.03)
