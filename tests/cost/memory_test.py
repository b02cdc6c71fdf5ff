"""The estimate of a step's memory, on programs of which one can say what they need."""

import jax
import jax.numpy as jnp

from vqrae_jax.cost import memory

KIB = jax.ShapeDtypeStruct((256,), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((16, 16), jnp.float32)


def kib(function, *arguments) -> float:
    return memory.temporaries(jax.jit(function).trace(*arguments).jaxpr.jaxpr, memory.nbytes) / 1024


def test_what_is_read_later_lives_until_then():
    assert kib(lambda x: x @ x, SQUARE) == 0  # an argument and the result
    assert kib(lambda x: (x @ x) @ x, SQUARE) == 1
    assert kib(lambda x: (y := x @ x) @ (y @ x), SQUARE) == 2
    assert kib(lambda x: ((x @ x) @ x) @ x, SQUARE) == 2  # the second is made of the first, which then goes


def test_elementwise_operations_are_part_of_what_reads_them():
    assert kib(lambda x: jnp.sum(jnp.exp(x) * 2 + 1), KIB) == 0
    assert kib(lambda x: jnp.cumsum(y := jnp.exp(x)) + y, KIB) == 1 + 1
    assert kib(lambda x: jax.jit(jnp.exp)(x).reshape(16, 16) @ jnp.ones((16, 16)), KIB) == 0


def test_a_loop_keeps_what_its_backward_pass_reads():

    def loss(x, w, policy):
        body = jax.checkpoint(lambda x, w: ((x @ w) @ w, None), policy=policy)
        return jnp.sum(jax.lax.scan(body, x, w)[0])

    weights = jax.ShapeDtypeStruct((100, 16, 16), jnp.float32)
    needs = {name: kib(jax.grad(lambda x, w: loss(x, w, policy), (0, 1)), SQUARE, weights)  # noqa: B023
             for name, policy in (("all", jax.checkpoint_policies.everything_saveable),
                                  ("none", jax.checkpoint_policies.nothing_saveable))}
    assert 100 <= needs["none"] < 110  # a layer's input
    assert 200 <= needs["all"] < 210  # and the product inside it
