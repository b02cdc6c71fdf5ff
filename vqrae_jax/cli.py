"""How every command starts and fails: one line that says what is wrong, the last on stderr, and an exit code."""

import contextlib
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from vqrae_jax import config as config_lib
from vqrae_jax import console
from vqrae_jax.training import compilation, distributed, reporting
from vqrae_jax.training.signals import STOPPED

# Without process 0 the others are aborted by JAX, with its stacks: those that fail for the same reason say so before.
FIRST_LEAVES_LAST_SECONDS = 2
_LOG = logging.getLogger("vqrae_jax")
flags.DEFINE_bool("traceback", False, "show where an error was raised, and what libraries say, for reports of bugs")
flags.disclaim_key_flags()  # a verb's help shows what is defined for it below


def config_file() -> flags.FlagHolder:
    """Defines --config=FILE and --config.key=value; its value is a ConfigDict for `config.parse`."""
    config = config_flags.DEFINE_config_file("config", help_string="a file of configs/, with arguments after a colon; "
                                             "with --help its keys are listed", lock_config=True)
    flags.mark_flag_as_required("config")
    return config


def join_processes() -> Callable[[], None]:
    """Defines the flags of a verb that several processes may run together; the result makes them find each other."""
    address = flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of process 0, for runs of several processes; found by itself on Cloud "
        "TPU, SLURM, Open MPI and Kubernetes (with pip install 'jax[k8s]')")
    processes = flags.DEFINE_integer("num_processes", None, "how many processes the run has", lower_bound=1)
    process = flags.DEFINE_integer("process_id", None, "which one this is, from 0", lower_bound=0)
    return lambda: distributed.start(address.value, processes.value, process.value)


def deterministic() -> Callable[[], None]:
    """Defines --deterministic; the result sees to it, and is to be called before anything else of JAX."""
    flag = flags.DEFINE_bool("deterministic", False, "on GPUs every run gives the same bits, at some cost in speed: "
                             "XLA chooses no kernel by its time, and adds up in a fixed order; CPUs and TPUs need no "
                             "flag")
    return lambda: compilation.deterministic() if flag.value else None


def weights() -> flags.FlagHolder:
    """Defines the flag of a verb that loads a run."""
    return flags.DEFINE_enum("weights", "ema", ["ema", "raw"], "of a run: the moving average of the weights, or the "
                             "weights themselves; the same where optim.ema_decay is 0")


def run(main: Callable[[Sequence[str]], Any], *, arguments: bool = False) -> None:
    """Runs `main(argv)` with parsed flags; turns expected errors into one line on stderr and exit code 1.

    Without `arguments` whatever is no flag is an error: `--config.data.flip false` would else set nothing.

    Expected are bad values (ValueError), files (OSError), a full memory, and a training run that stops itself
    (FloatingPointError). Anything else is a bug, whose line says so. What libraries write to stderr is not shown; with
    `--traceback` it is, as is where an error was raised. A run that a signal stopped has the exit code
    `signals.STOPPED`, so that a scheduler can tell it from one that failed.
    """

    def checked(argv: Sequence[str]) -> Any:
        if argv[1:] and not arguments:
            raise ValueError(f"unexpected argument {argv[1]!r}: flags are given as --name=value")
        return main(argv)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as SIGINT does, it raises KeyboardInterrupt
    stderr = None if _asks_for_traceback(sys.argv) else console.Stderr()
    absl_logging.set_verbosity(absl_logging.ERROR)
    _LOG.setLevel(logging.INFO)
    _LOG.propagate = False
    _LOG.addHandler(reporting.Lines(stderr.stream if stderr else sys.stderr))
    _tell_of_an_idle_accelerator()
    try:
        app.run(checked, flags_parser=_parse_flags)
    except KeyboardInterrupt as stop:
        _say(str(stop) or "interrupted", stderr)
        if not str(stop) or compilation.under_way():
            _leave(STOPPED)
        sys.exit(STOPPED)  # all processes stop here
    except SystemExit as end:
        if isinstance(end.code, str):  # of a config file
            _say(f"error: {_text(end)}", stderr)
            _leave(1)
        raise
    except Exception as error:
        if stderr is None:
            raise
        _say(f"error: {_explained(error, stderr)}", stderr)
        _leave(1)


def _tell_of_an_idle_accelerator() -> None:
    """What JAX warns of when it looks for devices is said by us: a run on the CPU by mistake takes weeks."""

    class Idle(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said = " ".join(record.getMessage().split())
            if re.search("Falling back|failed to initialize", said):
                _LOG.warning("JAX does not use this machine's accelerator (%s): docs/cluster-and-plan.md says what to "
                             "install, and JAX_PLATFORMS=cpu chooses the CPU", said)

    jax_log = logging.getLogger("jax._src.xla_bridge")
    jax_log.setLevel(logging.WARNING)
    jax_log.addHandler(Idle())


def _asks_for_traceback(argv: Sequence[str]) -> bool:
    """Whether --traceback is among the arguments, which must be known before they are parsed."""
    return any(argument.lstrip("-") in ("traceback", "traceback=true") for argument in argv[1:])


def _parse_flags(argv: Sequence[str]) -> Sequence[str]:
    try:
        _check_config_flags(argv)
        if "--help" in argv:
            _help([argument for argument in argv if argument != "--help"])
        return flags.FLAGS(list(argv), known_only=False)
    except Exception as error:  # a config file is arbitrary Python that runs while flags are parsed
        if _asks_for_traceback(argv):
            raise
        raise ValueError(_text(error)) from error


def _check_config_flags(argv: Sequence[str]) -> None:
    """Says plainly what ml_collections says of a file that is not there and of a key that there is not."""
    given = [argument.partition("=")[::2] for argument in argv]
    files = [value for name, value in given if name == "--config"]
    changed = [name.removeprefix("--config.") for name, _ in given if name.startswith("--config.")]
    for file in files:
        config_lib.check_file(file.partition(":")[0])
    if files and changed:
        values = config_lib.call_file(files[-1], "get_config", "config")
        for key in changed:
            config_lib.check_key(key, config_lib.type_of(values))


def _help(argv: Sequence[str]) -> NoReturn:
    """The verb's own words and flags, and where a config file is given all its keys; ends the process."""
    app.usage(shorthelp=True, writeto_stdout=True)
    if any(argument.startswith("--config=") for argument in argv):
        with contextlib.suppress(flags.IllegalFlagValueError):  # another flag that the verb needs is missing
            flags.FLAGS(list(argv))
        flag: Any = flags.FLAGS["config"]
        config = config_lib.parse(flag.value)
        print(f"\n{config_flags.get_config_filename(flag)} says, with * where it is not the default:\n")
        rows = [(f"--config.{name}", key.type, key.range, repr(key.default), repr(value),
                 "*" if value != key.default else "")
                for name, key in config_lib.keys(type(config)).items() for value in [config_lib.value_of(config, name)]]
        rows.insert(0, ("key", "type", "range", "default", "here", ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    sys.exit(0)


def _explained(error: Exception, stderr: console.Stderr) -> str:
    """What is wrong, in one line."""
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return ("the accelerator's memory is full: add --config.train.accumulate=N for smaller batches, "
                "--config.model.remat=full or a lower --config.eval.batch_size; a run may continue with any of them; "
                "tokenize and detokenize take a lower --batch_size")
    if isinstance(error, MemoryError):
        return f"this machine's memory is full ({_text(error)}): use smaller batches, or a machine with more"
    expected = isinstance(error, ValueError | OSError | FloatingPointError)
    if expected or (isinstance(error, RuntimeError) and "Unable to initialize backend" in str(error)):
        return _text(error)
    package = os.path.dirname(__file__) + os.sep
    place = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(package)][-1]
    what = " ".join(traceback.format_exception_only(error)[0].split())
    kept = stderr.end(error)
    report = f"{kept}, which says more" if kept else "what the same command shows with --traceback"
    return f"a bug: {what} in {os.path.basename(place.filename)}:{place.lineno}; please report it, with {report}"


def _text(error: BaseException) -> str:
    """What an error says, in one line."""
    # str(KeyError) would quote its message.
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    message = message.replace("\\n", "\n").replace("\\'", "'")  # a KeyError inside a KeyError
    lines = message.strip().splitlines() or [type(error).__name__]
    # absl hands on the traceback of a config file as part of a message.
    text = lines[-1] if "Traceback" in message else " ".join(lines)
    return " ".join(text.split())


def _say(message: str, stderr: console.Stderr | None) -> None:
    """Says the last line of stderr."""
    _LOG.error("%s", message)
    if stderr:
        stderr.end()


def _leave(code: int) -> NoReturn:
    """Ends this process, without waiting for a compiler or for others of the same run, who may wait for this one."""
    together = jax.distributed.is_initialized()
    if not together and not compilation.under_way():
        sys.exit(code)
    sys.stdout.flush()
    for worker in multiprocessing.active_children():
        worker.terminate()
    if together and jax.process_index() == 0:
        time.sleep(FIRST_LEAVES_LAST_SECONDS)
    os._exit(code)
