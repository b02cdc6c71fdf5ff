"""ArrayRecord files of `tf.train.Example`s: how they are read, and how each is written as a whole or not at all."""

import bisect
import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import xxhash

from vqrae_jax import files
from vqrae_jax.data import faults


class RecordFiles:
    """The records of ArrayRecord files, as bytes, in the order of the files.

    Args:
      paths: of the files.

    Raises:
      ValueError: when a file is not an ArrayRecord file.
      OSError: when a file cannot be opened.
    """

    def __init__(self, paths: Sequence[str]):
        load_examples()
        self._paths = list(paths)
        faults.allow_open_files()
        with ThreadPoolExecutor(min(len(self._paths), 64)) as pool:  # the files may be far away
            self._files: list[Any] = list(pool.map(_open, self._paths))
        self._ends = list(itertools.accumulate(map(len, self._files)))

    def __setstate__(self, state: dict[str, Any]) -> None:
        load_examples()
        self.__dict__ |= state

    def __len__(self) -> int:
        return self._ends[-1]

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the file, and position in it."""
        file = bisect.bisect_right(self._ends, index)
        return file, index - (self._ends[file - 1] if file else 0)

    def names_by_file(self) -> Iterator[tuple[bytes, Iterable[bytes]]]:
        """What the names in a file begin with, the file's name without where it lies, and how each goes on."""
        for path, file in zip(self._paths, self._files, strict=True):
            start = f"{os.path.basename(path)}/".encode(errors="surrogatepass")
            yield start, (b"%d" % position for position in range(len(file)))

    def name(self, index: int) -> str:
        """Path of a record's file, and position in it."""
        file, position = self._place(index)
        return f"{self._paths[file]}/{position}"

    def read(self, index: int) -> bytes:
        """A record; ValueError where it is damaged."""
        file, position = self._place(index)
        try:
            return self._files[file][position]
        except RuntimeError as error:
            raise faults.from_text(error) from error


def _open(path: str) -> Any:
    import grain

    def open_file() -> Any:
        try:
            return grain.sources.ArrayRecordDataSource([path])
        except RuntimeError as error:
            raise faults.from_text(error) from error

    try:
        return faults.retried(open_file, path)
    except ValueError as error:
        raise ValueError(f"cannot read {path} as ArrayRecord: {error}") from error


def load_examples() -> Any:
    """The module that has `tf.train.Example`; to be called before there are threads that read or write some.

    It comes with TensorFlow Datasets, which replaces Python's `__import__` as long as it is being imported: meanwhile
    other threads cannot import.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2


def serialize_example(features: Mapping[str, bytes | int]) -> bytes:
    """A `tf.train.Example` with one value a feature; the same bytes for the same features."""
    example = load_examples().Example()
    for name, value in features.items():
        feature = example.features.feature[name]
        (feature.bytes_list if isinstance(value, bytes) else feature.int64_list).value.append(value)
    return example.SerializeToString(deterministic=True)


def parse_example(record: bytes) -> dict[str, list[Any]]:
    """The values of each feature of a `tf.train.Example` that holds bytes or integers; ValueError if it is none."""
    from google.protobuf.message import DecodeError

    try:
        features = load_examples().Example.FromString(record).features.feature
    except DecodeError as error:
        raise ValueError(f"not a tf.train.Example: {error}") from error
    return {name: [*feature.bytes_list.value, *feature.int64_list.value] for name, feature in features.items()}


def label_of(features: Mapping[str, list[Any]], *names: str) -> int:
    """The label among the features of an example by its first name, -1 if it has none; ValueError if out of range."""
    values = next((features[name] for name in names if name in features), [])
    label = values[0] if values and isinstance(values[0], int) else -1
    if not -1 <= label < 2**31:
        raise ValueError(f"the label {label} is not in [0, 2^31)")
    return label


def caption_of(features: Mapping[str, list[Any]]) -> str:
    """The caption among the features of an example, empty where there is none."""
    values = features["caption"] if "caption" in features else []
    return values[0].decode(errors="replace") if len(values) == 1 and isinstance(values[0], bytes) else ""


@contextlib.contextmanager
def written(output: Path) -> Iterator[tuple[Any, "Report"]]:
    """A file of records and the report of how it was made, `report_path(output)`.

    Both appear under their names when the block has ended, the records last: where they are, both are complete. What a
    process that was killed left of them is removed.

    Yields:
      an ArrayRecordWriter, and the report.

    Raises:
      OSError: they cannot be written; says so when the disk is full.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    with files.disk_full(output.parent), files.whole(output) as records, \
            files.whole(report_path(output)) as unfinished_report, unfinished_report.open("w") as opened:
        report = Report(opened)
        try:
            # Random access wants groups of one; encoded images and codes do not become smaller.
            writer = ArrayRecordWriter(str(records), "group_size:1,uncompressed")
            try:
                yield writer, report
            finally:
                writer.close()
        except RuntimeError as error:
            raise OSError(f"cannot write to {output.parent}: {' '.join(str(error).split())}") from error
        report.close(files.checksum(records))


class Report:
    """The report beside a file of records: JSON lines.

    Attributes:
      last: the last line, which says in numbers what there is; it gets the checksums of the records and of the lines
        before it.
    """

    def __init__(self, file: TextIO):
        self._file, self._lines = file, xxhash.xxh3_128()
        self.last: dict[str, Any] = {}

    def add(self, line: Mapping[str, Any]) -> None:
        """Writes a line."""
        text = json.dumps(line) + "\n"
        self._lines.update(text.encode())
        self._file.write(text)

    def close(self, records: files.Checksum) -> None:
        """Writes the last line."""
        last = {**self.last, "file": records._asdict(), "lines": self._lines.hexdigest()}
        self._file.write(json.dumps(files.sealed(last)) + "\n")


def read_report(output: Path) -> tuple[dict[str, Any], files.Checksum | None]:
    """The last line of the report of a file of records.

    Args:
      output: the file of records, which is not looked at.

    Returns:
      the line, and the checksum of the file of records, None where an earlier version wrote them.

    Raises:
      OSError: the machine cannot read it.
      ValueError: it is missing or damaged.
    """
    report = report_path(output)
    try:
        *others, text = report.read_text().splitlines(keepends=True)
        last = files.unsealed(text)
        if "file" not in last:
            return last, None
        if last.pop("lines") != xxhash.xxh3_128_hexdigest("".join(others).encode()):
            raise ValueError("its content is not that of its checksum")
        expected = files.Checksum(**last.pop("file"))
    except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{report} is missing or damaged: {error}") from error
    return last, expected


def report_path(output: Path) -> Path:
    """Of the report beside a file of records; see `Report`."""
    return output.with_suffix(".jsonl")
