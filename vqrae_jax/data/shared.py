"""Numbers and names that a process and its workers hold in memory once, for there may be millions of them."""

import mmap
import os
import weakref
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np


class SharedArray:
    """A one-dimensional array whose pickle says only where it lies: whoever unpickles it sees the same memory.

    That is an anonymous file in memory, which is gone when the last process that has it open ends, however that ends. A
    pickle can be read on the same machine as long as the process lives that wrote it. Where the system has no such
    files (macOS), it holds a copy.

    Attributes:
      values: the numbers, read-only; a part of them is no copy.
    """

    values: memoryview

    def __init__(self, numbers: np.ndarray):
        self.values, self._descriptor = numbers.data.toreadonly(), None
        if hasattr(os, "memfd_create") and len(numbers):
            descriptor = os.memfd_create("vqrae_jax")
            with open(descriptor, "wb", closefd=False) as file:
                file.write(self.values)
            self._map(descriptor, self.values.format)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Any:
        return self.values[index]

    def _map(self, descriptor: int, kind: Any) -> None:
        self.values = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)).cast(kind)
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._descriptor is None:
            return SharedArray, (np.asarray(self.values),)
        return _attached, (f"/proc/{os.getpid()}/fd/{self._descriptor}", self.values.format)


def _attached(path: str, kind: str) -> SharedArray:
    array = SharedArray.__new__(SharedArray)
    array._map(os.open(path, os.O_RDONLY), kind)
    return array


class SharedNames:
    """Names of files, as one run of bytes and where each ends.

    Args:
      names: are read once.
    """

    def __init__(self, names: Iterable[str]):
        text, ends = bytearray(), array("q")
        for name in names:
            text += os.fsencode(name)
            ends.append(len(text))
        self._ends = SharedArray(np.frombuffer(ends, np.int64))
        del ends
        self._text = SharedArray(np.frombuffer(text, np.uint8))

    def __len__(self) -> int:
        return len(self._ends.values)

    def __getitem__(self, index: int) -> str:
        start = self._ends.values[index - 1] if index else 0
        return os.fsdecode(bytes(self._text.values[start:self._ends.values[index]]))

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))
