"""A second task for the loop, which shares nothing with the tokenizer: a next-character model of one sentence.

`python -m tests.training.toy WORKDIR STEPS [COMPILATION_CACHE]` trains it.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqrae_jax import config as config_lib
from vqrae_jax.training import loop, optim, sharding, update
from vqrae_jax.training.task import Best

TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog and runs away ", np.uint8)


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    skipped: jax.Array
    skipped_in_a_row: jax.Array


class Frozen(NamedTuple):
    embedding: dict


class Batches:
    """Random places of the text; which ones depends on the number of the batch only."""

    def __init__(self, size: int):
        self.size, self.next_batch = size, 0

    def __next__(self) -> dict[str, np.ndarray]:
        at = np.random.default_rng(self.next_batch).integers(0, len(TEXT) - 1, self.size)
        self.next_batch += 1
        return {"character": TEXT[at], "next": TEXT[at + 1]}

    def get_state(self) -> dict[str, int]:
        return {"next_batch": self.next_batch}

    def set_state(self, state: dict[str, int]) -> None:
        self.next_batch = state["next_batch"]

    def close(self) -> None:
        pass


class NextCharacter:
    best, unit = Best("bits", higher=False), "characters"

    def __init__(self, config: config_lib.Run):
        self.config, self.optimizer = config, optim.from_config(config.optim, steps=config.train.steps)

    def describe(self) -> list[str]:
        return ["a bigram model"]

    def write_files(self, workdir: Path) -> None:
        (workdir / "text.bin").write_bytes(TEXT.tobytes())

    def _init(self) -> tuple[State, Frozen]:
        zero, params = jnp.zeros((), jnp.int32), {"logits/kernel": jnp.zeros((32, 256))}
        embedding = {"embedding": jax.random.normal(jax.random.key(self.config.seed), (256, 32))}
        return State(zero, params, self.optimizer.init(params), zero, zero), Frozen(embedding)

    def abstract(self, mesh):
        letters = jax.ShapeDtypeStruct((self.config.train.batch_size,), np.uint8,
                                       sharding=sharding.batch_sharding(mesh))
        return (*sharding.placed(mesh, jax.eval_shape(self._init), sharding.RULES),
                {"character": letters, "next": letters})

    def init(self, mesh):
        return sharding.made(self._init, mesh, sharding.RULES)

    def items(self, state: State) -> dict:
        return {"everything": state._asdict()}

    def state(self, items: dict) -> State:
        return State(**items["everything"])

    def batches(self) -> Batches:
        return Batches(self.config.train.batch_size)

    def phase(self, step: int) -> str:
        return "second half" if step > self.config.train.steps // 2 else ""

    def _loss(self, params, frozen: Frozen, batch) -> jax.Array:
        logits = frozen.embedding["embedding"][batch["character"]] @ params["logits/kernel"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["next"].astype(jnp.int32)))

    def train_step(self, phase: str):
        def gradients(params, frozen, batch):
            def loss(params):
                losses = {"next": (2.0 if phase else 1.0, self._loss(params, frozen, batch))}
                return update.total(losses), update.reported(losses)
            return jax.grad(loss, has_aux=True)(params)

        def train_step(state: State, frozen: Frozen, batch):
            (grads, metrics), _ = update.accumulate(
                lambda micro, rng: (gradients(state.params, frozen, micro), ()), batch, jax.random.key(0),
                count=self.config.train.accumulate, add=lambda first, second: ())
            finite, _ = update.all_finite(metrics, grads)

            def new_state() -> State:
                updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
                return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)

            return update.guarded(state, finite, new_state), metrics

        return train_step

    def evaluator(self, mesh):
        batch = {"character": TEXT[:-1], "next": TEXT[1:]}
        loss = jax.jit(self._loss)
        return lambda state, frozen: ({"bits": float(loss(state.params, frozen, batch)) / np.log(2)}, {})

    def shown(self, metrics: dict[str, float]) -> str:
        return f"loss {metrics['loss/next']:.3f}"


def config(steps: int, compilation_cache: str = "") -> config_lib.Run:
    train = config_lib.Train(steps=steps, batch_size=8, accumulate=2, log_every=1, checkpoint_every=10, eval_every=10)
    return config_lib.Run(train=train, log=config_lib.Log(tensorboard=False, compilation_cache=compilation_cache),
                          optim=config_lib.Optim(lr=0.1, end_lr=0.01, warmup_steps=2))


if __name__ == "__main__":
    loop.run(NextCharacter(config(int(sys.argv[2]), *sys.argv[3:])), Path(sys.argv[1]))
