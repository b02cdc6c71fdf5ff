"""What it means when a file cannot be written."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT)


@contextmanager
def disk_errors(workdir: Path) -> Iterator[None]:
    """Turns a failed write into one line that says what to do."""
    try:
        yield
    except (OSError, ValueError) as error:
        # TensorStore reports a full disk inside a ValueError.
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise OSError(f"the disk is full: {workdir} could not be written; the last complete checkpoint is kept, "
                          "free some space and start again to continue from it") from error
        if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
            raise OSError(f"cannot write to {workdir}: {error.strerror}; choose a folder you may write to") from error
        raise
