"""A process that reads hostile input under limits of time and memory, and says what came of it."""

import contextlib
import os
import resource
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tests.verbs import SERVER

SECONDS, BYTES = 20, 4 << 30
LONGEST = 2000  # characters of a message: who gives a file of a megabyte does not want it back as a line


class Outcome(NamedTuple):
    """What came of an input.

    Attributes:
      what: a result; a refusal in one line; or a fault, which is everything else.
      text: the refusal's message, or what the fault is.
      seconds: of a processor that it took.
      megabytes: the most memory that the process had meanwhile.
    """

    what: Literal["result", "refusal", "fault"]
    text: str
    seconds: float
    megabytes: float


class Child:
    """Reads one input after the other in one process, for its imports take seconds; another follows one that died."""

    def __init__(self):
        self._process = self._pipe = None

    def read(self, kind: str, value: Any) -> Outcome:
        """What comes of an input of a kind of `tests.fuzz.readers.READERS`."""
        if self._process is None:
            self._pipe, theirs = SERVER.Pipe()
            self._process = SERVER.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
            self._pipe.recv()  # it is there
        started = time.perf_counter()
        try:
            self._pipe.send((kind, value))
            # On a machine that does other work as well, its own seconds count; but for those in which it waits.
            while time.perf_counter() - started < 3 * SECONDS:
                if self._pipe.poll(1):
                    return self._pipe.recv()
            fault = f"no answer within {3 * SECONDS} s"
        except (EOFError, ConnectionError):
            self._process.join()
            fault = f"the process died with exit code {self._process.exitcode}"
        self.close()
        return Outcome("fault", fault, time.perf_counter() - started, 0)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
        self._process = self._pipe = None


def _serve(pipe) -> None:
    import huggingface_hub.constants

    from tests.fuzz.readers import READERS

    huggingface_hub.constants.HF_HUB_OFFLINE = True  # a wrong path is no reason to ask the hub
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send(None)
    while True:
        try:
            kind, value = pipe.recv()
        except EOFError:
            return
        with contextlib.suppress(OSError):  # not every kernel lets the peak be forgotten
            Path("/proc/self/clear_refs").write_text("5")
        started = time.process_time()
        with tempfile.TemporaryDirectory(prefix="vqrae_jax_fuzz_") as folder:
            what, text = _read(READERS[kind], Path(folder).resolve(), value)
            os.chdir("/")
        seconds = time.process_time() - started
        if seconds > SECONDS:
            what, text = "fault", f"it took {seconds:.0f} s"
        pipe.send(Outcome(what, text, seconds, _peak()))


def _read(reader, folder: Path, value: Any) -> tuple[Literal["result", "refusal", "fault"], str]:
    os.chdir(folder)
    try:
        reader(folder, value)
    except (ValueError, OSError) as error:
        message = str(error)
        fault = (
            "has several lines"
            if len(message.splitlines()) > 1
            else "is empty"
            if not message.strip()
            else f"has {len(message)} characters"
            if len(message) > LONGEST
            else ""
        )
        return ("fault", f"the message {fault}: {traceback.format_exc()[-4000:]}") if fault else ("refusal", message)
    except BaseException:
        return "fault", traceback.format_exc()[-4000:]
    return "result", ""


def _peak() -> float:
    """Megabytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1e3
