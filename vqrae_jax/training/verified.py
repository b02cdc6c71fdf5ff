"""Orbax checkpoints with a checksum for every file, written by the process that wrote it and checked by who reads it.

A checkpoint is a folder of items, each a folder of arrays or of a JSON file. Its `checksums.json` is in it before the
folder has its name; Orbax's own two files beside the items, which nothing is read from, are not in there.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from vqrae_jax import files
from vqrae_jax.foreign import one_line
from vqrae_jax.training import distributed

log = logging.getLogger(__name__)
_PART = "checksums.process_{}.json"


def checkpointer(committed: Callable[[Path], None] = lambda folder: None) -> ocp.AsyncCheckpointer:
    """What writes checkpoints in the background.

    Args:
      committed: called by the first process, in the background, with a checkpoint that is complete but for its name.
    """
    return ocp.AsyncCheckpointer(_Handler(committed))


def arguments(arrays: Mapping[str, Any], texts: Mapping[str, Any]) -> ocp.args.Composite:
    """What is to be written: trees of arrays, and JSON objects, by the names of their items."""
    return _Arguments(**{name: ocp.args.StandardSave(tree) for name, tree in arrays.items()},
                      **{name: ocp.args.JsonSave(dict(content)) for name, content in texts.items()})


class _Handler(ocp.CompositeCheckpointHandler):
    """Orbax's handler of several items, with checksums."""

    def __init__(self, committed: Callable[[Path], None]):
        super().__init__()
        self._committed = committed

    async def async_save(self, directory: Any, args: Any) -> list[Any]:
        # Orbax waits for one after the other: the last one finds all of this process's files written.
        return [*(await super().async_save(directory, args) or ()), _OwnChecksums(Path(directory))]

    def finalize(self, directory: Any) -> None:
        """In the first process, when all have written theirs, and before the checkpoint counts."""
        folder, found = Path(directory), {}
        parts = [folder / _PART.format(process) for process in range(jax.process_count())]
        files.wait_for(parts)
        for part in parts:
            found |= files.read_json(part)
        files.wait_for([folder / name for name in found])  # Orbax looks at some of all processes' files
        super().finalize(directory)
        # An item's folder had a temporary name.
        final = lambda name: "/".join(part.partition(ocp.utils.TMP_DIR_SUFFIX)[0] for part in name.split("/"))
        found = {final(name): files.Checksum(*of) for name, of in found.items()}
        files.wait_for([folder / name for name in found])
        written = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
        found |= files.checksums(folder, [path for name, path in written.items() if name not in found])
        files.write_checksums(folder, {name: found[name] for name in sorted(written)})
        for part in parts:
            part.unlink()
        self._committed(folder)


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
class _Arguments(ocp.args.Composite):
    """Says to Orbax whose they are."""


class _OwnChecksums:
    """Orbax's future: waited for, it writes the checksums of the files that this process alone has written."""

    def __init__(self, folder: Path):
        self._folder = folder

    def result(self, timeout: float | None = None) -> None:
        del timeout
        process = jax.process_index()
        mine = [path for path in _files(self._folder) if {f"ocdbt.process_{process}", f"process_{process}"} &
                {*path.relative_to(self._folder).parts}]
        files.write_json(self._folder / _PART.format(process), files.checksums(self._folder, mine))

    def cancel(self) -> None:
        """Nothing runs that could be cancelled."""


def _files(folder: Path) -> Iterator[Path]:
    """All files of a checkpoint's items."""
    return (path for path in folder.glob("*/**/*") if path.is_file())


def damage(folder: Path, items: Sequence[str] | None = None, *, shared: bool = False) -> str:
    """How a checkpoint differs from what was written, in words; empty where it does not.

    One without checksums, as versions before 0.7 wrote it, is taken for whole, with a note.

    Args:
      folder: of the checkpoint.
      items: which are looked at; None for all.
      shared: every process reads a share of the files, and all get an answer; they must call this together.

    Raises:
      OSError: the machine cannot read, which says nothing of the checkpoint.
    """
    processes, process = (jax.process_count(), jax.process_index()) if shared else (1, 0)
    there = (folder / files.CHECKSUMS).exists()
    if processes > 1 and (there := bool(distributed.agreed(there))):
        files.wait_for([folder / files.CHECKSUMS])
    if not there:
        if process == 0:
            log.warning("%s has no checksums, as versions before 0.7 wrote it: it is read unchecked", folder)
        return ""
    try:
        expected = files.read_checksums(folder)
        if expected is None:  # another process sees them
            raise ValueError(f"{files.CHECKSUMS} is missing")
    except ValueError as error:
        found = str(error)
    else:
        names = [name for name in sorted(expected) if items is None or name.partition("/")[0] in items]
        if processes > 1:
            files.wait_for([folder / name for name in names])
        found = files.damage(folder, {name: expected[name] for name in names[process::processes]})
    if processes > 1:
        damaged = np.ravel(multihost_utils.process_allgather(np.int32(bool(found))))
        found = found or (f"as process {int(damaged.argmax())} of the run found" if damaged.any() else "")
    return found


def read_arrays(folder: Path, name: str, abstract: Any) -> Any:
    """An item of arrays; it should have been looked at with `damage`.

    Args:
      folder: of the checkpoint.
      name: of the item.
      abstract: shapes, dtypes and shardings of all its arrays. Those that have `ocp.PLACEHOLDER` in their place stay on
        the disk, and have it in the result as well.

    Raises:
      ValueError: it is damaged, or holds other arrays.
      OSError: it cannot be read.
    """
    restore = ocp.args.PyTreeRestore(abstract, ocp.checkpoint_utils.construct_restore_args(abstract))
    try:
        # Not by a Checkpointer, which misses in an item what is in its checkpoint.
        with closing(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(epath.Path((folder / name).absolute()), args=restore)
    except (OSError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # whatever Orbax, TensorStore and their parsers say of a file they do not understand
        raise ValueError(f"{folder / name} cannot be read: {one_line(error)}") from error


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """An item of JSON, None where the checkpoint has no such item; ValueError where it is damaged."""
    try:
        return json.loads((folder / name / "metadata").read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{folder / name} is damaged: {error}") from None
