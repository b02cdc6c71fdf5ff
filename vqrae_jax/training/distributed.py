"""Several processes as one run: how they find each other, agree, and end when one of them is gone."""

import faulthandler
import itertools
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)
# How often `preempted` was asked: JAX tells the places at which processes can agree to stop by numbers.
_ASKED = itertools.count(1)
# What Gloo, NCCL and JAX's coordination service say where another process does not answer any more.
_OTHERS_ARE_GONE = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|Gloo|NCCL|[Cc]onnection|[Hh]eartbeat|"
                              "[Bb]arrier|[Cc]oordination")
_STATUS = re.compile("[A-Z_]+: ")  # with which all of JAX's own errors begin
# After so long the others miss a process that died silently, or one that does not come to the end.
TIMEOUT_SECONDS = 30


def start(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes of the run, if there are any; to be called before anything else of JAX.

    Args:
      coordinator_address: HOST:PORT of process 0; None, as are the others then, lets JAX look for a cluster.
      num_processes: how many processes the run has.
      process_id: which one this is, from 0.

    Raises:
      ValueError: only some are given, or the processes do not find each other.
    """
    explicit = (coordinator_address, num_processes, process_id)
    if any(value is not None for value in explicit) and None in explicit:
        raise ValueError("--coordinator_address, --num_processes and --process_id go together: give all three or none")
    try:
        # Told everything, JAX need not look around: under SLURM it would also take one GPU only for this process.
        jax.distributed.initialize(*explicit, heartbeat_timeout_seconds=TIMEOUT_SECONDS,
                                   shutdown_timeout_seconds=TIMEOUT_SECONDS,
                                   cluster_detection_method="deactivate" if None not in explicit else None)
    except ValueError as error:
        # So says JAX where it finds no cluster: this is the only process.
        if "coordinator_address should be defined" not in str(error):
            raise
        return
    except RuntimeError as error:
        raise ValueError(f"the processes did not find each other: {' '.join(str(error).split())}; a run of one process "
                         "needs --coordinator_address=localhost:12345 --num_processes=1 --process_id=0") from error
    # JAX ends this process by itself, with a message, when process 0 is gone: stacks of Python would only hide that.
    faulthandler.disable()
    if not is_first():
        logging.getLogger("vqrae_jax").setLevel(logging.WARNING)


def is_first() -> bool:
    """Whether this process is the one that writes what is written once: the config, metrics, pictures, log lines."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when every process is here; ends this one where another is gone."""
    with ends_with_the_others():
        multihost_utils.sync_global_devices(what)


def gather(tree: Any) -> Any:
    """Global arrays, whole, as NumPy arrays on every process; those of a process's own devices as they are there."""
    whole = lambda array: array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True)
    return jax.device_get(jax.tree.map(whole, tree))


def agreed(number: int) -> int:
    """The first process's number, in every process."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def preempted() -> bool:
    """Whether some process got SIGTERM and all agreed to stop here; every process asks at the same places."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(next(_ASKED))


@contextmanager
def ends_with_the_others() -> Iterator[None]:
    """Ends this process at once where JAX fails because another process of the run is gone.

    To clean up would take the other's help: whatever waits for all processes would wait until it times out.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # What fails while it runs JAX raises as ValueError where its result is read, with the same text.
        of_jax = isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error))
        if jax.process_count() == 1 or not of_jax or not _OTHERS_ARE_GONE.search(str(error)):
            raise
        reason = " ".join(str(error).split())[:200]
        log.error("error: another process of this run is gone (%s); start all of them again, and the run continues "
                  "from its last checkpoint", reason)
        os._exit(1)
