"""How every command starts and fails: one line that says what is wrong, and a non-zero exit code."""

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging

from vqrae_jax.training import distributed

# Without process 0 the others are aborted by JAX, with its stacks: those that fail for the same reason say so before.
FIRST_LEAVES_LAST_SECONDS = 2
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command continues
_TRACEBACK = flags.DEFINE_bool("traceback", False, "show where an error was raised, for reports of bugs")


def join_processes() -> Callable[[], None]:
    """Defines the flags of a verb that several processes may run together; the result makes them find each other."""
    address = flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of process 0, for runs of several processes; found by itself on Cloud "
        "TPU, SLURM, Open MPI and Kubernetes (with pip install 'jax[k8s]')")
    processes = flags.DEFINE_integer("num_processes", None, "how many processes the run has", lower_bound=1)
    process = flags.DEFINE_integer("process_id", None, "which one this is, from 0", lower_bound=0)
    return lambda: distributed.start(address.value, processes.value, process.value)


def weights() -> flags.FlagHolder:
    """Defines the flag of a verb that loads a run."""
    return flags.DEFINE_enum("weights", "ema", ["ema", "raw"], "of a run: the moving average of the weights, or the "
                             "weights themselves; the same where optim.ema_decay is 0")


def run(main: Callable[[Sequence[str]], Any], *, arguments: bool = False) -> None:
    """Runs `main(argv)` with parsed flags; turns expected errors into one line on stderr and exit code 1.

    Without `arguments` whatever is no flag is an error: `--config.data.flip false` would else set nothing.

    Expected are bad values (ValueError), files (OSError), and a training run that stops itself (FloatingPointError).
    Anything else is a bug and shows its traceback; `--traceback` shows it for all. A run that a signal stopped has the
    exit code `STOPPED`, so that a scheduler can tell it from one that failed.
    """

    def checked(argv: Sequence[str]) -> Any:
        if argv[1:] and not arguments:
            raise ValueError(f"unexpected argument {argv[1]!r}: flags are given as --name=value")
        return main(argv)

    app.run(lambda argv: _guarded(checked, argv), flags_parser=_parse_flags)


def _parse_flags(argv: Sequence[str]) -> Sequence[str]:
    try:
        return flags.FLAGS(list(argv), known_only=False)
    except Exception as error:  # a config file is arbitrary Python that runs while flags are parsed
        if any(argument.startswith("--traceback") for argument in argv):
            raise
        # ml_collections names only the last part of an unknown key.
        culprits = [flag for flag in (argument.split("=")[0] for argument in argv)
                    if flag.startswith("--") and repr(flag.rpartition(".")[2]) in str(error).replace("\\'", "'")]
        _fail(error, *culprits)


def _guarded(main: Callable[[Sequence[str]], Any], argv: Sequence[str]) -> None:
    # Libraries (Orbax above all) log through absl; the user sees their errors and our progress.
    absl_logging.set_verbosity(absl_logging.ERROR)
    log = logging.getLogger("vqrae_jax")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(logging.StreamHandler())
    try:
        main(argv)
    except (ValueError, OSError, FloatingPointError) as error:
        if _TRACEBACK.value:
            raise
        _fail(error)
    except KeyboardInterrupt as stop:
        if not str(stop):
            _leave("interrupted", STOPPED)
        print(stop, file=sys.stderr)  # all processes stop here
        sys.exit(STOPPED)
    except RuntimeError as error:
        if _TRACEBACK.value:
            raise
        if "Unable to initialize backend" in str(error):
            _fail(error)
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _fail(MemoryError("the accelerator's memory is full: lower train.batch_size or eval.batch_size, or raise "
                          "train.accumulate"))


def _fail(error: BaseException, *context: str) -> NoReturn:
    # str(KeyError) would quote its message.
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    message = message.replace("\\n", "\n").replace("\\'", "'")  # a KeyError inside a KeyError
    lines = message.strip().splitlines() or [type(error).__name__]
    # absl hands on the traceback of a config file as part of a message.
    text = lines[-1] if "Traceback" in message else " ".join(lines)
    _leave("error: " + ": ".join([*context, " ".join(text.split())]), 1)


def _leave(message: str, code: int) -> NoReturn:
    """Says why and ends this process, without waiting for others of the same run, which may be waiting for it."""
    print(message, file=sys.stderr, flush=True)
    if not jax.distributed.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    if jax.process_index() == 0:
        time.sleep(FIRST_LEAVES_LAST_SECONDS)
    os._exit(code)
