"""Reads that fail by a fault of the machine, and not of the image: they are tried again, and then end the run."""

import errno
import os
import re
import resource
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

RETRY_AFTER_SECONDS = (0.1, 0.5, 2.0)

# The file is gone, or never was one. Whatever else the system says is no matter of the image.
_OF_THE_IMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
_THIS_TIME = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE}
_OF_THE_MACHINE = (MemoryError, ConnectionError, PermissionError, TimeoutError)  # which may have a text only
_REMEDIES = {
    **dict.fromkeys((errno.EMFILE, errno.ENFILE),
                    "allow more open files (ulimit -n), or read fewer and larger files"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "let this user read it"),
    errno.ENOMEM: "lower data.threads or data.workers",
}


def retried(read: Callable[[], Result], name: str) -> Result:
    """Reads; once more after each of `RETRY_AFTER_SECONDS` where the machine fails.

    Args:
      read: to be called.
      name: what it reads, for the message.

    Raises:
      MachineError: the machine still failed at the last time.
      Exception: whatever else `read` raises.
    """
    pauses = iter(RETRY_AFTER_SECONDS)
    while True:
        try:
            return read()
        except (OSError, MemoryError) as error:
            if not _is_of_the_machine(error):
                raise
            seconds = next(pauses, None)
            if seconds is None:
                raise _machine_error(error, name) from error
        time.sleep(seconds)


class MachineError(OSError):
    """The machine cannot read an image, which says nothing of the image; the message is one line."""


def _machine_error(error: OSError | MemoryError, name: str) -> MachineError:
    number = error.errno if isinstance(error, OSError) else errno.ENOMEM
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    remedy = _REMEDIES[number] if number in _REMEDIES else "look after the disk, the mount or the network"
    return MachineError(f"cannot read {name}: {reason}; that is no fault of the image: {remedy}, then give the same "
                        "command again")


def _is_of_the_machine(error: OSError | MemoryError) -> bool:
    if isinstance(error, _OF_THE_MACHINE):
        return True
    return error.errno is not None and error.errno not in _OF_THE_IMAGE


def machine_failed(error: BaseException) -> bool:
    """Whether something that is there could not be read this time: no reason to go on without it, and to say so.

    What a user may not read, and what lies behind a network that is not there, are good reasons. An error that was
    raised from another one counts as that.
    """
    if isinstance(error, (MachineError, MemoryError)) or (isinstance(error, OSError) and error.errno in _THIS_TIME):
        return True
    return error.__cause__ is not None and machine_failed(error.__cause__)


def from_text(error: Exception) -> OSError | ValueError:
    """What a reader in C++ means by a RuntimeError: `open() failed: Too many open files; opening FILE`, or bad data.

    Returns:
      an OSError with the system's number, or a ValueError; to be raised.
    """
    text = " ".join(str(error).split())
    failed = re.search(r"failed: ([^;]+)", text)
    numbers = {os.strerror(number): number for number in errno.errorcode}
    if failed and failed[1] in numbers:
        return OSError(numbers[failed[1]], text)
    return ValueError(f"corrupt record: {text}")


def allow_open_files() -> None:
    """Raises the limit of open files as far as this user may: shards stay open, one file each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # macOS has another limit below the hard one
            pass
