"""The training loop: data, step, report, evaluate, save. It knows of what is trained only what `Task` says."""

import logging
import signal
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from vqrae_jax.training import checkpoint, distributed, reporting, sharding
from vqrae_jax.training.task import Batches, Task

log = logging.getLogger(__name__)


def run(task: Task, workdir: Path) -> dict[str, float]:
    """Trains until `train.steps`, continuing where the folder's last checkpoint ends.

    A run that was killed and continued gives the same parameters and metrics as one that was not.

    Args:
      task: what is trained.
      workdir: the run's folder; see checkpoint.py for what is in it.

    Returns:
      the metrics of the evaluation at the end; empty if no step was left.

    Raises:
      ValueError, OSError: a config, data or a folder that cannot work, before training starts.
      KeyboardInterrupt: a signal stopped the run, after it was saved.
      FloatingPointError: `train.max_skipped` steps in a row had a loss or gradient that was not finite.
    """
    config = task.config
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(mesh, config)
    abstract_state, abstract_frozen = task.abstract(mesh)
    batches = task.batches()  # before there is a folder: data that cannot be trained on leaves none behind
    checkpoint.open_run(workdir, config, task.write_files)
    for line in task.describe():
        log.info("%s", line)
    # Whatever ends this block, saving in the background is waited for.
    with (closing(checkpoint.Checkpoints(workdir, task.items(abstract_state), task.best)) as checkpoints,
          closing(batches)):
        if steps := checkpoints.steps():
            frozen = checkpoint.load_frozen(workdir, abstract_frozen)
            items, position = checkpoints.restore(steps[-1], task.items(abstract_state))
            state = task.state(items)
            batches.set_state(position)
        else:
            state, frozen = task.init(mesh)
            checkpoint.save_frozen(workdir, frozen)
        with (closing(reporting.Reporter(workdir, config, unit=task.unit, first_step=int(state.step))) as reporter,
              distributed.ends_with_the_others()):
            result = _loop(task, mesh, state, frozen, batches, checkpoints, reporter)
    # The first process may have pictures and curves to write: JAX ends those that wait for it too long at their exit.
    distributed.wait_for_all("end of training")
    return result


def _loop(task: Task, mesh: Mesh, state: Any, frozen: Any, batches: Batches, checkpoints: checkpoint.Checkpoints,
          reporter: reporting.Reporter) -> dict[str, float]:
    """Steps from `state` to the end; returns the metrics of the last evaluation, empty if no step was left."""
    train, result = task.config.train, {}
    save = lambda metrics: checkpoints.save(int(state.step), task.items(state), batches.get_state(), metrics)
    if int(state.step) >= train.steps:
        if state.skipped_in_a_row >= train.max_skipped:
            raise _not_finite(state, checkpoints.workdir)
        log.info("step %d of %d is reached: nothing left to do", state.step, train.steps)
    else:
        log.info("training to step %d; the first step takes longer, for it is compiled", train.steps)
    compiled, evaluate = {}, task.evaluator(mesh)
    with _StopSignal() as stop:
        for step in range(int(state.step) + 1, train.steps + 1):
            phase = task.phase(step)
            if phase not in compiled:
                compiled[phase] = sharding.jit_step(task.train_step(phase), mesh, state)
            asked = time.perf_counter()
            batch = next(batches)
            if state.step.is_ready():  # else the devices still had work, and nothing waited for this batch
                reporter.waited_for_data(time.perf_counter() - asked)
            state, metrics = compiled[phase](state, frozen, sharding.put_batch(mesh, batch))
            last, stopping, evaluated = step == train.steps, stop.requested(step), {}
            evaluating = step % train.eval_every == 0 or last
            saving = step % train.checkpoint_every == 0 or last or stopping
            if step % train.log_every == 0 or last:
                metrics = {name: float(value) for name, value in metrics.items()}
                reporter.train(step, metrics, task.shown(metrics))
                if state.skipped_in_a_row >= train.max_skipped:
                    save({})
                    raise _not_finite(state, checkpoints.workdir)
            if evaluating or saving:
                jax.block_until_ready(state)  # or the steps under way would count as time of the evaluation
            reporter.pause()
            if evaluating:
                result, rows = evaluate(state, frozen)
                reporter.evaluation(step, result, rows)
                evaluated = result
            if saving:
                save(evaluated)
            reporter.resume()
            if stopping and not last:
                raise KeyboardInterrupt(f"stopped by a signal after step {step}; the same command continues")
    return result


def _not_finite(state: Any, workdir: Path) -> FloatingPointError:
    return FloatingPointError(
        f"{state.skipped_in_a_row} steps in a row up to step {state.step} had a loss or gradient that was not finite; "
        f"{workdir} keeps the last good state: lower optim.lr and start a new run from it")


class _StopSignal:
    """Notes SIGTERM and SIGINT, so that the loop can save and end between two steps; a second one ends at once."""

    def __init__(self):
        self._received = False

    def __enter__(self):
        # Only a process's main thread may have handlers; a notebook may run elsewhere. Several processes have to stop
        # at the same step: there JAX notes SIGTERM and agrees on one.
        alone = threading.current_thread() is threading.main_thread() and jax.process_count() == 1
        numbers = (signal.SIGTERM, signal.SIGINT) if alone else ()
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_):
        self._restore()

    def requested(self, step: int) -> bool:
        """Whether the run has to stop after this step."""
        return self._received or distributed.preempted(step)

    def _note(self, number, frame):
        self._received = True
        self._restore()

    def _restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)
