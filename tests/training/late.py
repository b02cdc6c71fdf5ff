"""For child processes: a file system that shows late what other hosts write, and a clock that is not theirs."""

import builtins
import io
import os
import re
import time
from pathlib import Path


def install(folder: str, others: str, *, seconds: float, hours: float) -> None:
    """Makes new files below a folder appear `seconds` after this process first looked for them, or in their folder.

    Args:
      folder: that several processes write to.
      others: a pattern of paths in it that are others' where Python has not seen this process make them, for what
        libraries write in C++ nobody tells.
      seconds: for which they stay away.
      hours: that the clock of this process is ahead.
    """
    root, theirs, now = os.path.realpath(folder), re.compile(others), time.time
    seen = {str(path) for path in Path(root).rglob("*")}  # is there already, or this process made it
    asked: dict[str, float] = {}
    stat, lstat, scandir, listdir, real_open, os_open = os.stat, os.lstat, os.scandir, os.listdir, io.open, os.open

    def absolute(path) -> str:
        return "" if isinstance(path, int) else os.path.abspath(os.fsdecode(path))

    def hidden(path) -> bool:
        path = absolute(path)
        if not path.startswith(root + os.sep):
            return False
        parts = path.removeprefix(root + os.sep).split(os.sep)
        for place in (os.path.join(root, *parts[:i + 1]) for i in range(len(parts))):
            if place in seen or not theirs.search(place) or not os.access(place, os.F_OK):
                continue
            if time.monotonic() < asked.setdefault(place, time.monotonic()) + seconds:
                return True
        return False

    def unless_hidden(call):
        def called(path=".", *arguments, **options):
            if hidden(path):
                raise FileNotFoundError(2, "No such file or directory", str(path))
            return call(path, *arguments, **options)
        return called

    def opened(path, mode="r", *arguments, **options):
        if {*mode} & {*"wax+"}:
            seen.add(absolute(path))
        elif hidden(path):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real_open(path, mode, *arguments, **options)

    def making(call, place):
        def called(*arguments, **options):
            result = call(*arguments, **options)
            seen.add(absolute(arguments[place]))
            return result
        return called

    class Entries:
        """What `os.scandir` gives, less what is hidden."""

        def __init__(self, entries):
            self.entries = entries

        def __iter__(self):
            return (entry for entry in self.entries if not hidden(entry.path))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.close()

        def __next__(self):
            return next(entry for entry in self.entries if not hidden(entry.path))

        def close(self):
            self.entries.close()

    for name, call in (("stat", stat), ("lstat", lstat)):
        setattr(os, name, unless_hidden(call))
    os.open = lambda path, flags, *arguments, **options: (
        os_open if flags & (os.O_CREAT | os.O_WRONLY) else unless_hidden(os_open))(path, flags, *arguments, **options)
    os.scandir = lambda path=".": Entries(unless_hidden(scandir)(path))
    os.listdir = lambda path=".": [name for name in unless_hidden(listdir)(path)
                                   if isinstance(path, int) or not hidden(os.path.join(os.fsdecode(path), name))]
    builtins.open = io.open = opened
    os.mkdir = making(os.mkdir, 0)
    os.rename, os.replace = making(os.rename, 1), making(os.replace, 1)
    time.time = lambda: now() + 3600 * hours
