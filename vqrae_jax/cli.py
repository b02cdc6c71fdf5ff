"""How every command starts and fails: one line that says what is wrong, and a non-zero exit code."""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging

_TRACEBACK = flags.DEFINE_bool("traceback", False, "show where an error was raised, for reports of bugs")


def run(main: Callable[[Sequence[str]], Any]) -> None:
    """Runs `main(argv)` with parsed flags; turns expected errors into one line on stderr and exit code 1.

    Expected are bad values (ValueError), files (OSError), and a training run that stops itself (FloatingPointError).
    Anything else is a bug and shows its traceback; `--traceback` shows it for all.
    """
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse_flags)


def _parse_flags(argv: Sequence[str]) -> Sequence[str]:
    try:
        return flags.FLAGS(list(argv), known_only=False)
    # A config file is arbitrary Python that runs while flags are parsed.
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
        if "--traceback" in argv:
            raise
        _fail(error)


def _guarded(main: Callable[[Sequence[str]], Any], argv: Sequence[str]) -> None:
    # Libraries (Orbax above all) log through absl; the user sees their warnings and our progress.
    absl_logging.set_verbosity(absl_logging.WARNING)
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
    except KeyboardInterrupt:
        sys.exit("interrupted")


def _fail(error: BaseException) -> NoReturn:
    # str(KeyError) would quote its message.
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    sys.exit(f"error: {' '.join(str(message).split()) or type(error).__name__}")
