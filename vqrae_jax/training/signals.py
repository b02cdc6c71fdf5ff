"""What SIGTERM and SIGINT mean to a run: it stops as soon as nothing can be lost, and the same command continues it."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from vqrae_jax.training import distributed

log = logging.getLogger(__name__)
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command continues
# Python runs no handler while its main thread compiles or computes: after so long the process ends without it.
PATIENCE_SECONDS = 3.0
MESSAGE = "stopped by a signal; the same command continues"


class StopSignal:
    """While this context is open, a signal raises KeyboardInterrupt at once, or is noted where it is `deferred`.

    SIGTERM also ends a process whose main thread does not come back to Python for `PATIENCE_SECONDS`, because it
    compiles, say; then `finish` is called and the exit code is `STOPPED`. SIGINT waits, for in a notebook the kernel
    would die. A second signal always raises.

    Only a process's main thread may have handlers; elsewhere, in some notebooks, nothing happens. Neither does it in a
    run of several processes, which have to stop at the same place: there JAX notes SIGTERM, and all agree where
    (`distributed.preempted`); compiling is not interrupted.

    Attributes:
      finish: waits for what is being written, before the process ends.
    """

    def __init__(self, finish: Callable[[], None] = lambda: None):
        self.finish = finish
        self._received = self._deferring = False
        self._obeyed = threading.Event()

    def __enter__(self) -> "StopSignal":
        alone = threading.current_thread() is threading.main_thread() and jax.process_count() == 1
        self._before = {}
        if alone:
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._before_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
        if self._before:
            signal.set_wakeup_fd(self._before_wakeup)
            os.close(self._write)  # ends the thread
        self._before = {}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A block in which a signal is only noted, for `requested` to tell."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within a `deferred` block, one that may be cut short."""
        self._deferring = False
        try:
            if self._received:
                raise KeyboardInterrupt(MESSAGE)
            yield
        finally:
            self._deferring = True

    def requested(self) -> bool:
        """Whether the run has to stop; every process of a run asks at the same places."""
        return self._received or distributed.preempted()

    def _note(self, number, frame) -> None:
        if self._deferring and not self._received:
            self._received = True
            return
        self._obeyed.set()
        raise KeyboardInterrupt(MESSAGE)

    def _watch(self) -> None:
        """A thread of its own: the interpreter writes the numbers of signals to the pipe even while it is busy."""
        while number := os.read(self._read, 1):
            if number[0] != signal.SIGTERM:
                continue
            if self._deferring:
                log.warning("got SIGTERM: stopping after this step")
            elif not self._obeyed.wait(PATIENCE_SECONDS) and not self._deferring:
                self.finish()
                print(MESSAGE, file=sys.stderr, flush=True)
                os._exit(STOPPED)
        os.close(self._read)
