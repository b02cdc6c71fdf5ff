"""WebDataset's tar shards become ArrayRecord files, one of each tar.

A tar is not trusted: nothing in it names a file that is written, and nothing in it decides how much memory is used.
"""

import dataclasses
import gzip
import hashlib
import itertools
import json
import logging
import os
import re
import tarfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import BinaryIO, NamedTuple, get_type_hints

from vqrae_jax import files
from vqrae_jax.data.records import Report, load_examples, read_report, serialize_example, written
from vqrae_jax.data.sources import IMAGE_SUFFIXES
from vqrae_jax.data.transforms import decode_image

log = logging.getLogger(__name__)
_KINDS = {suffix[1:]: "image" for suffix in IMAGE_SUFFIXES} | {kind: kind for kind in ("cls", "txt", "json")}
_MAX_BYTES = {"image": 64 << 20, "cls": 1 << 10, "txt": 64 << 10, "json": 1 << 20}
_MAX_HEADER_BYTES = 64 << 10  # with its extensions: long names, PAX records, maps of sparse files
_MAX_PADDING_BYTES = 64 << 20  # of zeros a gzip file has without end
_ENDS = 64 << 10
_SHOWN = 500  # characters of a name in a report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted:
    """What became of one tar; the last line of its report.

    Attributes:
      tar: name of the file, without its folder.
      bytes: its size.
      sha256: of the file's first and last 64 KiB, by which a changed tar is noticed.
      images: records that were written.
      labels: how many of them have a label.
      captions: how many of them have a caption.
      bad: members that were left out, each a line of the report.
      damage: why the tar could not be read to its end; None when it could.
    """

    tar: str
    bytes: int
    sha256: str
    images: int
    labels: int
    captions: int
    bad: int
    damage: str | None


def convert(tars: Sequence[Path], out: Path, *, threads: int) -> Iterator[Converted]:
    """Makes `out/NAME.array_record` and the report `out/NAME.jsonl` of each tar `NAME.tar`, plain or gzipped.

    A sample is the neighbouring members with one key, as WebDataset names them: KEY.EXT, where KEY is the path without
    dots in its last part. Its image (jpg, jpeg, png, webp, bmp, tif, tiff) becomes a record that `ArrayRecordSource`
    reads: the very bytes; as label the integer in KEY.cls, or else `label` or `cls` of KEY.json; as caption the UTF-8
    text of KEY.txt, or else `caption` or `text` of KEY.json, without white space around it. All other members are
    ignored. Left out and named in the report are images that cannot be decoded, links and devices in the place of
    files, second images of a key, and what is larger than 64 MiB (image), 1 MiB (json), 64 KiB (txt) or 1 KiB (cls). Of
    a damaged tar what comes before the damage is kept.

    Both files appear under their names when they are complete. Tars that have theirs are not read again: the same
    call after an interruption ends with the same files as an uninterrupted one. One tar is held to be another than the
    finished one by its size and its first and last 64 KiB.

    Args:
      tars: files whose names differ also without their folders.
      out: folder; it is created, and nothing is written outside of it.
      threads: tars that are read at once; each needs memory for a decoded image.

    Returns:
      an iterator over the tars as they are finished, beginning with those that were finished before.

    Raises:
      ValueError: two tars would become the same file, or a finished file was made of another tar.
      OSError: a tar cannot be opened, or `out` cannot be written; says so when the disk is full.
    """
    outputs: dict[Path, Path] = {}
    for tar in tars:
        output = out / f"{_stem(tar)}.array_record"
        if output in outputs:
            raise ValueError(f"{outputs[output]} and {tar} would both become {output}: convert them into two folders")
        outputs[output] = tar
    load_examples()
    out.mkdir(parents=True, exist_ok=True)
    found = {output: _finished(tar, output) for output, tar in outputs.items() if output.exists()}
    finished = {output: converted for output, converted in found.items() if converted}
    return _convert_all({output: tar for output, tar in outputs.items() if output not in finished},
                        list(finished.values()), threads)


def _stem(tar: Path) -> str:
    name = re.sub(r"\.(tar|tar\.gz|tgz)$", "", tar.name, flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")[:150] or "_"


def _fingerprint(tar: Path) -> tuple[int, str]:
    """Size, and SHA-256 of both ends: the middle of a terabyte is not read only to find that it is done."""
    with tar.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(file.read(_ENDS))
        file.seek(max(0, size - _ENDS))
        digest.update(file.read(_ENDS))
    return size, digest.hexdigest()


def _finished(tar: Path, output: Path) -> Converted | None:
    """What became of a tar before, None where its records are damaged."""
    try:
        last, records = read_report(output)
        converted = Converted(**last)
        for name, kind in get_type_hints(Converted).items():
            if not isinstance(getattr(converted, name), kind):
                raise TypeError(f"{name} is not of type {kind}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{output} is there, but not the report of how this version made it: choose another folder, "
                         "or remove the file") from error
    if (converted.bytes, converted.sha256) != _fingerprint(tar):
        raise ValueError(f"{output} was made of another {converted.tar} than {tar}: choose another folder, or remove "
                         "the file to have it made anew")
    if records and (how := files.damage(output.parent, {output.name: records})):
        log.warning("%s is damaged (%s): it is made anew", output, how)
        return None
    return converted


def _convert_all(outputs: dict[Path, Path], finished: Sequence[Converted], threads: int) -> Iterator[Converted]:
    yield from finished
    stop = threading.Event()
    # Decoding leaves Python's lock, and threads end with their process, however that ends.
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(_convert_tar, tar, output, stop) for output, tar in outputs.items()]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _convert_tar(tar: Path, output: Path, stop: threading.Event) -> Converted:
    fingerprint = _fingerprint(tar)
    with written(output) as (writer, lines):
        report = _Reading(lines)
        for features in _samples(tar, report):
            if stop.is_set():
                raise CancelledError
            writer.write(serialize_example(features))
            report.images += 1
            report.labels += "label" in features
            report.captions += "caption" in features
        converted = Converted(tar=tar.name, bytes=fingerprint[0], sha256=fingerprint[1], images=report.images,
                              labels=report.labels, captions=report.captions, bad=report.bad, damage=report.damage)
        lines.last = dataclasses.asdict(converted)
        if _fingerprint(tar) != fingerprint:
            raise OSError(f"{tar} changed while it was read: give the same command again when it is complete")
    return converted


class _Reading:
    """What happens while a tar is read."""

    def __init__(self, lines: Report):
        self._lines = lines
        self.images = self.labels = self.captions = self.bad = 0
        self.damage: str | None = None

    def leave_out(self, name: str, reason: str) -> None:
        self.bad += 1
        self._lines.add({"name": name[:_SHOWN], "reason": reason})


class _Member(NamedTuple):
    """A member that belongs to a sample; with a fault in the place of the data when it is to be left out."""

    name: str
    key: str
    kind: str
    data: bytes = b""
    fault: str | None = None


def _samples(tar: Path, report: _Reading) -> Iterator[dict[str, bytes | int]]:
    """The good images with their labels and captions, as features of an example."""
    for _, group in itertools.groupby(_members(tar, report), key=lambda member: member.key):
        sample: dict[str, _Member] = {}
        for member in group:
            if member.kind in sample:
                report.leave_out(member.name,
                                 f"its key has such a part already, {sample[member.kind].name[:_SHOWN]}")
            else:
                sample[member.kind] = member
        if "image" not in sample:
            continue
        try:
            decode_image(sample["image"].data)
        except ValueError as error:
            report.leave_out(sample["image"].name, str(error))
            continue
        features: dict[str, bytes | int] = {"image": sample["image"].data}
        for kind, read, what in (("cls", lambda data: _label(int(data)), "no label"),
                                 ("txt", lambda data: _caption(data.decode()), "no caption"),
                                 ("json", _label_and_caption, "no label and no caption")):
            if kind in sample:
                try:
                    features = read(sample[kind].data) | features  # what was said first counts
                except (ValueError, RecursionError) as error:
                    report.leave_out(sample[kind].name, f"{what}: {' '.join(str(error).split())}")
        yield features


def _label(label: int) -> dict[str, bytes | int]:
    if not 0 <= label < 1 << 31:
        raise ValueError("it is not in [0, 2^31)")
    return {"label": label}


def _caption(text: str) -> dict[str, bytes | int]:
    return {"caption": text.strip().encode()} if text.strip() else {}


def _label_and_caption(data: bytes) -> dict[str, bytes | int]:
    fields, found = json.loads(data), {}
    if not isinstance(fields, dict):
        return found
    for kind, of, names in ((int, _label, ("label", "cls")), (str, _caption, ("caption", "text"))):
        said = [fields[name] for name in names if name in fields and type(fields[name]) is kind]
        found |= of(said[0]) if said else {}
    return found


class _Bounded:
    """A file of which at most `allowed` bytes are read: `tarfile` believes headers that say how long they are.

    `last` is what was read last.
    """

    def __init__(self, file: BinaryIO | gzip.GzipFile):
        self._file = file
        self.allowed = 0
        self.last = b""

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.allowed:
            raise tarfile.ReadError("a header of an impossible size")
        self.allowed -= size
        self.last = self._file.read(size)
        return self.last

    def seek(self, position: int) -> int:
        return self._file.seek(position)

    def tell(self) -> int:
        return self._file.tell()


def _members(tar: Path, report: _Reading) -> Iterator[_Member]:
    """The members of a tar that belong to samples, in order, up to the first damage."""
    with tar.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        members = _read_tar(_Bounded(gzip.GzipFile(fileobj=raw) if zipped else raw))
        while True:
            try:
                member = next(members, None)
            except Exception as error:  # `tarfile` and `gzip` raise almost anything on corrupt input
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the disk or the network, not the tar
                report.damage = " ".join(str(error).split()) or type(error).__name__
                return
            if member is None:
                return
            if member.fault is None:
                yield member
            else:
                report.leave_out(member.name, member.fault)


def _read_tar(file: _Bounded) -> Iterator[_Member]:
    file.allowed = _MAX_HEADER_BYTES
    tar = tarfile.TarFile(fileobj=file)  # pyright: ignore[reportArgumentType]
    while (entry := tar.next()) is not None:
        tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # it would remember all
        if entry.size < 0:
            raise tarfile.ReadError("a member of negative size")
        folder, _, base = entry.name.rpartition("/")
        stem, _, extension = base.partition(".")
        extension = extension.lower()
        member = _Member(entry.name, f"{folder}/{stem}", _KINDS[extension] if extension in _KINDS else "")
        if stem and member.kind:
            if not entry.isreg() or entry.issparse():
                yield member._replace(fault="not a plain file")
            elif entry.size > _MAX_BYTES[member.kind]:
                yield member._replace(fault=f"{entry.size} bytes, more than {_MAX_BYTES[member.kind]}")
            else:
                file.allowed = entry.size
                file.seek(entry.offset_data)
                data = file.read(entry.size)
                if len(data) < entry.size:
                    raise tarfile.ReadError("unexpected end of data")
                yield member._replace(data=data)
        elif stem and extension.endswith(IMAGE_SUFFIXES):
            fault = f"for WebDataset the extension is all after the first dot, {extension[:_SHOWN]}"
            yield member._replace(fault=fault)
        file.allowed = _MAX_HEADER_BYTES
    # `tarfile` takes a header that it cannot read for the end; and the checksum of a gzip file comes last.
    if len(file.last) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it ends without an end mark: cut off?")
    for _ in range(_MAX_PADDING_BYTES // _MAX_HEADER_BYTES):
        if not file.last:
            return
        if file.last.strip(b"\0"):
            raise tarfile.ReadError(f"from byte {tar.offset} on it is no tar")
        file.allowed = _MAX_HEADER_BYTES
        file.read(_MAX_HEADER_BYTES)
    raise tarfile.ReadError(f"more than {_MAX_PADDING_BYTES} bytes of padding behind its end mark")
