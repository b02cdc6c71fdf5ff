"""What SIGTERM and SIGINT mean to a run: it stops as soon as nothing can be lost, and the same command continues it."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from vqrae_jax.foreign import one_line
from vqrae_jax.training import distributed

log = logging.getLogger(__name__)
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command continues
MESSAGE = "stopped by a signal; the same command continues"


def stop_if_preempted() -> None:
    """Raises KeyboardInterrupt where all processes agreed to stop here, in the midst of what need not be finished."""
    if distributed.preempted():
        raise KeyboardInterrupt(MESSAGE)


class StopSignal:
    """While this context is open, a signal stops the run at once, or is noted where it is `deferred`.

    At once means for SIGTERM that a thread ends the process, after `finish`, with the exit code `STOPPED`: Python's
    main thread may be in a compiler for minutes, where it runs no handler, and what other libraries do would not
    survive an exception out of nowhere. SIGINT raises KeyboardInterrupt, as ever, for in a notebook the kernel must
    live. A second signal does not wait any more.

    Only a process's main thread may have handlers; elsewhere, in some notebooks, nothing happens. Neither does it in a
    run of several processes, which have to stop at the same place: there JAX notes SIGTERM, and all agree where
    (`distributed.preempted`); compiling is not interrupted.

    Attributes:
      finish: waits for what is being written, and cleans up, before a thread ends the process.
    """

    def __init__(self):
        self.finish: Callable[[], object] = lambda: None
        self._received = self._deferring = False

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
        elif number == signal.SIGINT:
            raise KeyboardInterrupt(MESSAGE)

    def _watch(self) -> None:
        """A thread of its own: the interpreter writes the numbers of signals to the pipe even while it is busy."""
        terminated = False
        while number := os.read(self._read, 1):
            if number[0] != signal.SIGTERM:
                continue
            if terminated or not self._deferring:
                self._end()
            terminated = True
            log.warning("got SIGTERM: stopping after this step")
        os.close(self._read)

    def _end(self) -> None:
        code = STOPPED
        try:
            self.finish()
            log.error(MESSAGE)
        except Exception as error:
            code = 1
            log.error("error: %s", one_line(error))
        for worker in multiprocessing.active_children():
            worker.terminate()
        os._exit(code)
