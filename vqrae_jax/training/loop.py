"""The training loop: data, step, report, save, evaluate. It knows of what is trained only what `Task` says."""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vqrae_jax.config import Changes, Run
from vqrae_jax.training import checkpoint, compilation, distributed, lock, optim, reporting, sharding
from vqrae_jax.training.signals import StopSignal
from vqrae_jax.training.task import Batches, Task

log = logging.getLogger(__name__)


def run(task: Task, workdir: Path) -> dict[str, float]:
    """Trains until `train.steps`, continuing where the folder's last checkpoint ends.

    A run that was killed and continued gives the same parameters and metrics as one that was not.

    Args:
      task: what is trained.
      workdir: the run's folder; see checkpoint.py for what is in it.

    Returns:
      the metrics of the evaluation at the end, also where no step was left.

    Raises:
      ValueError, OSError: a config, data or a folder that cannot work, before training starts; another process trains
        in this folder.
      KeyboardInterrupt: a signal stopped the run; nothing is lost.
      FloatingPointError: `train.max_skipped` steps in a row had a loss or gradient that was not finite.
    """
    config, took = task.config, reporting.Parts()
    compilation.keep_programs(config.log.compilation_cache)
    with ExitStack() as stack:  # whatever ends the run, it is unwound in the reverse order
        stack.enter_context(distributed.ends_with_the_others())  # what fails while the run starts or is unwound
        stop = stack.enter_context(StopSignal())
        mesh = sharding.make_mesh(config.mesh)
        sharding.check_batch_size(mesh, config)
        abstract_state, abstract_frozen, abstract_batch = task.abstract(mesh)
        batches = stack.enter_context(closing(task.batches()))  # before there is a folder: bad data leaves none behind
        release = lambda: None
        if distributed.is_first():
            release = stop.finish = stack.enter_context(lock.held(workdir))
        changes = checkpoint.open_run(workdir, config, task.write_files)
        for line in task.describe():
            log.info("%s", line)
        saved_step, saved_lines = checkpoint.newest_whole(workdir), None
        checkpoints = stack.enter_context(closing(checkpoint.Checkpoints(
            workdir, lambda steps: reporter.best_step(task.best, steps))))
        stop.finish = lambda: (checkpoints.wait(), release())
        took.end("preparations")
        # All before the first step: what does not fit into memory must not strand the run when its turn comes. And
        # while arrays are read or made, which needs no compiler for long.
        phases = dict.fromkeys(map(task.phase, range((saved_step or 0) + 1, config.train.steps + 1)))
        programs = {phase: compilation.begin(
            sharding.jit_step(task.train_step(phase), mesh, abstract_state), abstract_state, abstract_frozen,
            abstract_batch, name=f"the {phase} training step".replace("  ", " ")) for phase in phases}
        took.end("tracing")
        if saved_step is None:
            state, frozen = task.init(mesh)
            checkpoint.save_frozen(workdir, frozen)
            frozen = sharding.cast(frozen, abstract_frozen)  # what is saved is not rounded
        else:
            frozen = checkpoint.load_frozen(workdir, abstract_frozen)
            items, position, saved_lines = checkpoints.restore(saved_step, task.items(abstract_state))
            state = task.state(items)
            batches.set_state(position)
            _log_changes(config, changes, saved_step)
        reporter = stack.enter_context(closing(reporting.Reporter(
            workdir, config, unit=task.unit, first_step=saved_step or 0, saved_lines=saved_lines)))
        stack.enter_context(distributed.ends_with_the_others())  # before anything that is unwound waits for them
        took.end("arrays")
        result = _loop(task, mesh, state, frozen, batches, programs, checkpoints, reporter, stop, took)
    # The first process may have pictures and curves to write: JAX ends those that wait for it too long at their exit.
    distributed.wait_for_all("end of training")
    return result


def _loop(task: Task, mesh: Mesh, state: Any, frozen: Any, batches: Batches, programs: dict[str, Callable[[], Any]],
          checkpoints: checkpoint.Checkpoints, reporter: reporting.Reporter, stop: StopSignal,
          took: reporting.Parts) -> dict[str, float]:
    """Steps from `state` to the end; returns the metrics of the evaluation there."""
    train, first = task.config.train, int(state.step) + 1
    steps = range(first, train.steps + 1)
    save = lambda: checkpoints.save(int(state.step), task.items(state), batches.get_state(), reporter.lines())
    if not steps:
        if state.skipped_in_a_row >= train.max_skipped:
            raise _not_finite(state, checkpoints.workdir)
        log.info("step %d of %d is reached: nothing left to do", state.step, train.steps)
    compiled = {phase: program() for phase, program in programs.items()}
    took.end("compiling beside that")
    evaluate = task.evaluator(mesh)

    def report_evaluation(step: int) -> None:
        result, rows = evaluate(state, frozen)
        reporter.evaluation(step, result, rows)

    # Of a step that was saved, the run may have ended before its evaluation.
    due = first > 1 and ((first - 1) % train.eval_every == 0 or not steps)
    if due and not distributed.agreed(first - 1 in reporter.evaluations):
        report_evaluation(first - 1)
        took.end("an evaluation")
    if steps:
        log.info("training to step %d", train.steps)
    with stop.deferred():
        for step in steps:
            reporter.resume()
            last = step == train.steps
            asked = time.perf_counter()
            batch = next(batches)
            if state.step.is_ready():  # else the devices still had work, and nothing waited for this batch
                reporter.waited_for_data(time.perf_counter() - asked)
            state, metrics = compiled[task.phase(step)](state, frozen, sharding.put_batch(mesh, batch))
            if step == first:
                jax.block_until_ready(state)
                took.end("the step")
                log.info("the first step ended %s after the start", took)
            if step % train.log_every == 0 or last:
                metrics = {name: float(value) for name, value in metrics.items()}
                reporter.train(step, metrics, task.shown(metrics))
                if state.skipped_in_a_row >= train.max_skipped:
                    save()
                    raise _not_finite(state, checkpoints.workdir)
            stopping, evaluating = stop.requested(), step % train.eval_every == 0 or last
            saving = step % train.checkpoint_every == 0 or evaluating or stopping
            if saving:
                jax.block_until_ready(state)  # or the steps under way would count as time of the evaluation
            reporter.pause()
            if saving:
                save()  # before the evaluation, which a signal may cut short
            if stopping:
                raise KeyboardInterrupt(f"stopped by a signal after step {step}; the same command continues")
            if evaluating:
                with stop.at_once():
                    report_evaluation(step)
    return reporter.evaluations[int(state.step)] if int(state.step) in reporter.evaluations else {}


def _log_changes(config: Run, changes: Changes, step: int) -> None:
    """Says what a run that continues does differently from now on."""
    for key, (old, new) in changes.items():
        log.info("%s: %r -> %r from step %d on", key, old, new, step)
    if "train.steps" in changes:
        old, new = (np.asarray(optim.rates(config.optim, steps=steps)("")(step)) for steps in changes["train.steps"])
        log.info("the learning rate goes on at %.3g instead of %.3g and reaches optim.end_lr %.3g at step %d", new, old,
                 config.optim.end_lr, config.train.steps)


def _not_finite(state: Any, workdir: Path) -> FloatingPointError:
    return FloatingPointError(
        f"{state.skipped_in_a_row} steps in a row up to step {state.step} had a loss or gradient that was not finite; "
        f"{workdir} keeps the last good state: lower optim.lr and start a new run from it")
