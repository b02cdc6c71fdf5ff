"""Files that are there as a whole or not at all, whose damage is noticed, and what it means when one cannot be written.

The checksum is XXH3 (Y. Collet, https://github.com/Cyan4973/xxHash) with 128 bits: it finds damage, at the speed of
memory, and is no protection from an attacker.
"""

import contextlib
import errno
import glob
import json
import mmap
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

CHECKSUMS = "checksums.json"
LATE_SECONDS = 60.0  # after so long a network file system shows every host what another one wrote
_CHECKSUM = "checksum"  # the key of a JSON file that holds that of the others
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT)
_READ_AT_ONCE = 1 << 20


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a failed write into one line that says what to do; for blocks that read nothing which may be missing."""
    try:
        with disk_full(folder):
            yield
    except OSError as error:
        if error.errno in _CANNOT_WRITE:
            raise OSError(f"cannot write to {folder}: {error.strerror}; choose a folder you may write to") from error
        raise


@contextmanager
def disk_full(folder: Path) -> Iterator[None]:
    """The same, only where the disk is full."""
    try:
        yield
    except (OSError, ValueError) as error:
        # TensorStore reports a full disk inside a ValueError.
        if getattr(error, "errno", None) in _FULL or "No space left" in str(error) or "File too large" in str(error):
            raise OSError(f"the disk is full: {folder} could not be written; what is complete is kept, free some space "
                          "and give the same command again to continue from it") from error
        raise


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Yields where to write a file, which has its own name when the block has ended and it is on the disk.

    Whatever ends the block otherwise leaves what was there before. What a killed process left is removed by the next
    one that writes the same file. Should two write it at once, the slower one fails rather than spoils it.

    Raises:
      OSError: it cannot be written.
    """
    unfinished = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")
    for left in file.parent.glob(f"{glob.escape(file.name)}.{'?' * 32}.part"):
        left.unlink(missing_ok=True)
    try:
        yield unfinished
        with unfinished.open("rb") as opened:
            os.fsync(opened.fileno())
        unfinished.replace(file)
    except FileNotFoundError as error:
        if error.filename == str(unfinished):
            raise OSError(f"{file} was being written by another process as well: let only one write it") from error
        raise
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object as a whole, with the checksum of its other keys as its last one.

    Raises:
      OSError: it cannot be written.
    """
    with whole(file) as unfinished:
        unfinished.write_text(json.dumps(sealed(content), indent=2) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """Reads what `write_json` wrote; also an object without a checksum, as earlier versions wrote it.

    Raises:
      OSError: it cannot be read.
      ValueError: it is damaged.
    """
    try:
        return unsealed(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): restore it from a copy; if it was changed on purpose, remove "
                         f'its key "{_CHECKSUM}"') from None


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the checksum of its keys as one more."""
    return {**content, _CHECKSUM: _of_json(content)}


def unsealed(text: str | bytes) -> dict[str, Any]:
    """The JSON object of which `sealed` made another, or one without a checksum.

    Raises:
      ValueError: it is damaged.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    if _CHECKSUM in content and content.pop(_CHECKSUM) != _of_json(content):
        raise ValueError("its content is not that of its checksum")
    return content


def _of_json(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def wait_for(paths: Sequence[Path]) -> None:
    """Returns when all are there that another host wrote, or when they would be if it had."""
    until = time.monotonic() + LATE_SECONDS
    while not all(path.exists() for path in paths) and time.monotonic() < until:
        time.sleep(0.5)


class Checksum(NamedTuple):
    """What is remembered of a file.

    Attributes:
      bytes: its size.
      xxh3: of its content, 32 hexadecimal digits.
    """

    bytes: int
    xxh3: str


def checksum(file: Path) -> Checksum:
    """Of a file as it is now; OSError where it cannot be read."""
    found, size = xxhash.xxh3_128(), 0
    # Memory of the system's, for what is freed of the C library's teaches it to keep as much.
    with file.open("rb", buffering=0) as opened, mmap.mmap(-1, _READ_AT_ONCE) as space, memoryview(space) as buffer:
        while read := opened.readinto(buffer):
            found.update(buffer[:read])
            size += read
    return Checksum(size, found.hexdigest())


def checksums(folder: Path, files: Iterable[Path]) -> dict[str, Checksum]:
    """Of some files of a folder, by their paths in it; several are read at once."""
    paths = sorted(files)
    with ThreadPoolExecutor(4) as pool:
        return dict(zip((path.relative_to(folder).as_posix() for path in paths), pool.map(checksum, paths),
                        strict=True))


def write_checksums(folder: Path, found: Mapping[str, Checksum]) -> None:
    """Writes a folder's `checksums.json`."""
    write_json(folder / CHECKSUMS, {"files": {name: of._asdict() for name, of in found.items()}})


def add_checksums(folder: Path) -> None:
    """Writes the `checksums.json` of a small folder that is complete."""
    of = [path for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS]
    write_checksums(folder, checksums(folder, of))


def check(folder: Path) -> None:
    """Looks at all files of a folder that has a `checksums.json`.

    Raises:
      OSError: the machine cannot read them.
      ValueError: one is damaged.
    """
    expected = read_checksums(folder)
    if expected and (how := damage(folder, expected)):
        raise ValueError(f"{folder} is damaged ({how}): restore it from a copy")


def read_checksums(folder: Path) -> dict[str, Checksum] | None:
    """Reads what `write_checksums` wrote, None where there is nothing.

    Raises:
      OSError: it cannot be read.
      ValueError: it is damaged.
    """
    try:
        return {name: Checksum(**of) for name, of in read_json(folder / CHECKSUMS)["files"].items()}
    except FileNotFoundError:
        return None
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CHECKSUMS} is damaged: {error}") from None


def damage(folder: Path, expected: Mapping[str, Checksum]) -> str:
    """How files of a folder differ from what they should be, in words; empty where they do not.

    Raises:
      OSError: the machine cannot read one of them, which says nothing of the file.
    """

    def of(name: str) -> str:
        try:
            found = checksum(folder / name)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return f"{name} is missing"
        if found.bytes != expected[name].bytes:
            return f"{name} has {found.bytes:,} bytes instead of {expected[name].bytes:,}"
        return "" if found == expected[name] else f"the content of {name} has changed"

    with ThreadPoolExecutor(4) as pool:
        wrong = list(filter(None, pool.map(of, sorted(expected))))
    return wrong[0] + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "") if wrong else ""
