"""A folder of codes: what a tokenizer makes of a data set, and a generator learns from.

    codes.json                            what the codes are of; see `Description`
    codes-00000-of-00013.array_record     a `tf.train.Example` an image: see `CodesRecord`
    codes-00000-of-00013.jsonl            images that were left out and why, and a last line of counts and checksums
    checksums.json                        of the files of records; the others have their own
"""

import dataclasses
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from vqrae_jax import files
from vqrae_jax.data.records import (
    RecordFiles,
    caption_of,
    label_of,
    parse_example,
    read_report,
    report_path,
    serialize_example,
    written,
)
from vqrae_jax.foreign import Options, shown

log = logging.getLogger(__name__)
DESCRIPTION = "codes.json"
_ANEW = "remove that file and give the command tokenize that made it once more, and it makes it anew"
Weights = Literal["ema", "raw"]
_MOST_SHARDS = 99_999  # their names have five digits
_AT_THE_END = ("records", "labels", "captions", "bad_images")


class CodesRecord(NamedTuple):
    """The codes of one image.

    They are stored as the bytes feature `codes` of a `tf.train.Example`, little-endian, the views one after the other;
    beside it are `name`, `label` unless it is -1, and `caption` unless it is empty.

    Attributes:
      codes: uint16 or uint32 `[views, h, w]`.
      label: class index, -1 where it is unknown.
      name: of the image in its source.
      caption: what it shows, in words; empty where that is unknown.
    """

    codes: np.ndarray
    label: int
    name: str
    caption: str


class LeftOut(NamedTuple):
    """An image that could not be read, and why."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """What the codes of a folder are of; the content of its `codes.json`.

    Attributes:
      data: SPEC of the images.
      source: their number and digests of some, see `fingerprint`.
      num_classes: labels are in [0, num_classes); None where the source does not know.
      tokenizer: sha256 of the weights that made the codes.
      weights: which of the run's they are, "ema" or "raw".
      codebook_size: codes are in [0, codebook_size).
      grid: height and width of the codes of a view.
      image_size: side of the images in pixels.
      views: of each image.
      batch_size: views that a device encoded at once, on which the last bits of an encoder may depend.
      shard_size: images of a shard, good and bad.
      recipe: all else that the codes depend on.
      records, labels, captions: how many there are; None as long as the folder is not complete.
      bad_images: how many images were left out.
    """

    data: str
    source: dict[str, Any]
    num_classes: int | None
    tokenizer: str
    weights: Weights
    codebook_size: int
    grid: tuple[int, int]
    image_size: int
    views: int
    batch_size: int
    shard_size: int
    recipe: dict[str, Any]
    records: int | None = None
    labels: int | None = None
    captions: int | None = None
    bad_images: int | None = None

    @property
    def dtype(self) -> np.dtype:
        """Of stored codes: little-endian uint16 where they fit, else uint32."""
        return np.dtype("<u2" if self.codebook_size <= 1 << 16 else "<u4")

    def shards(self, folder: Path) -> list[Path]:
        """The files of records, in order."""
        count = math.ceil(self.source["images"] / self.shard_size)
        return [folder / f"codes-{number:05d}-of-{count:05d}.array_record" for number in range(count)]


def read_description(folder: Path) -> Description:
    """The description of a folder of codes, complete or not.

    Raises:
      OSError: there is none.
      ValueError: it is damaged, or of another version.
    """
    file = folder / DESCRIPTION
    if not file.exists():
        raise FileNotFoundError(f"{folder} is no folder of codes, for it holds no {DESCRIPTION}: give one that the "
                                "command tokenize made")
    given = Options(files.read_json(file), f"{file}: ")
    names = {field.name for field in dataclasses.fields(Description)}
    if unknown := sorted(given.values.keys() - names):
        raise ValueError(f"{file} does not describe codes of this version: {shown(unknown[0])} is unknown")
    count = lambda name: given.whole(name, 0, 2**40)
    known = lambda name: None if given.values.get(name) is None else count(name)
    shard_size, images = given.whole("shard_size", 1, 2**31), given.section("source").whole("images", 1, 2**40)
    if images > shard_size * _MOST_SHARDS:
        raise ValueError(f"{file}: {images} images are more than {_MOST_SHARDS} shards of shard_size {shard_size}")
    return Description(
        data=given.text("data"), source=dict(given.section("source").values), num_classes=known("num_classes"),
        tokenizer=given.text("tokenizer"), weights=given.one_of("weights", get_args(Weights)),
        codebook_size=given.whole("codebook_size", 1, 2**32), grid=given.pair("grid", 1, 2**10),
        image_size=given.whole("image_size", 1, 2**14), views=given.whole("views", 1, 2**10),
        batch_size=given.whole("batch_size", 1, 2**31), shard_size=shard_size,
        recipe=dict(given.section("recipe").values),
        **{name: known(name) for name in _AT_THE_END})


def write_description(folder: Path, description: Description) -> None:
    """Writes `codes.json`, at once."""
    files.write_json(folder / DESCRIPTION, dataclasses.asdict(description))


def begin(folder: Path, planned: Description) -> Description:
    """Makes a folder for codes, or finds the one that was begun.

    Args:
      folder: of the codes.
      planned: of the codes that are to be there, without what is known at the end.

    Returns:
      the description that is there now, perhaps complete.

    Raises:
      ValueError: the folder holds other codes; or shards, and nothing that says what they are.
      OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / DESCRIPTION).exists():
        begun = read_description(folder)
        free = ("recipe", *_AT_THE_END)
        if differing := [field.name for field in dataclasses.fields(Description) if field.name not in free
                         and getattr(begun, field.name) != getattr(planned, field.name)]:
            raise ValueError(f"{folder} holds files that were made with other {', '.join(differing)}: give the same "
                             "command as for them, or choose another folder")
        return begun
    if any(folder.glob("codes-*.array_record")):
        raise ValueError(f"{folder} holds codes without their {DESCRIPTION}: choose another folder")
    write_description(folder, planned)
    return planned


def write_shard(path: Path, images: Sequence[CodesRecord | LeftOut]) -> None:
    """Writes a shard and its report; OSError where that fails, which says so when the disk is full."""
    records = [image for image in images if isinstance(image, CodesRecord)]
    with written(path) as (writer, report):
        for record in records:
            features: dict[str, bytes | int] = {"codes": record.codes.tobytes(), "name": os.fsencode(record.name)}
            features |= {} if record.label < 0 else {"label": record.label}
            features |= {"caption": record.caption.encode()} if record.caption else {}
            writer.write(serialize_example(features))
        for image in images:
            if isinstance(image, LeftOut):
                report.add(image._asdict())
        report.last = {"records": len(records), "labels": sum(record.label >= 0 for record in records),
                  "captions": sum(record.caption != "" for record in records),
                  "bad_images": len(images) - len(records)}


def whole_shards(shards: Iterable[Path]) -> Iterator[bool]:
    """Of each shard whether it is there and whole; names those that are damaged."""
    for shard in shards:
        found = shard.exists()
        if found:
            try:
                _, records = read_report(shard)
                how = files.damage(shard.parent, {shard.name: records}) if records else ""
            except ValueError as error:
                how = str(error)
            if how:
                log.warning("%s is damaged (%s): it is made anew", shard, how)
                found = False
        yield found


def end(folder: Path, begun: Description) -> Description:
    """Completes the description when all shards are there, and writes the checksums of their files.

    Raises:
      ValueError: a shard's report is missing or damaged.
      OSError: the description cannot be written.
    """
    counts, found = dict.fromkeys(_AT_THE_END, 0), {}
    for shard in begun.shards(folder):
        try:
            last, found[shard.name] = read_report(shard)
            counts = {name: count + last[name] for name, count in counts.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{report_path(shard)} is missing or damaged: remove it and {shard.name}, and give the "
                             "same command again") from error
    if all(found.values()):
        files.write_checksums(folder, found)
    complete = dataclasses.replace(begun, **counts)
    write_description(folder, complete)
    return complete


class CodesSource(RecordFiles):
    """The records of a folder of codes, in the order of its images.

    Args:
      folder: that the command `tokenize` made.

    Attributes:
      description: what the codes are of.
      num_classes: labels are in [0, num_classes); None where that is unknown.

    Raises:
      OSError: there are no codes in it, or not all.
      ValueError: a file is damaged.
    """

    def __init__(self, folder: str | os.PathLike):
        self.description = read_description(Path(folder))
        self.num_classes = self.description.num_classes
        shards = self.description.shards(Path(folder))
        missing = [shard.name for shard in shards if not shard.exists()]
        if missing or self.description.records is None:
            lacks = (f"{len(missing)} of {len(shards)} files of codes, for example {missing[0]}" if missing
                     else f"the end of its {DESCRIPTION}")
            raise FileNotFoundError(f"{folder} lacks {lacks}: give the command tokenize that made it once more, and it "
                                    "makes what is missing")
        expected = files.read_checksums(Path(folder))
        if expected is None:
            log.warning("%s has no %s, as versions before 0.7 wrote it: it is read unchecked", folder, files.CHECKSUMS)
        elif how := files.damage(Path(folder), expected):
            raise ValueError(f"{folder} is damaged ({how}): give the command tokenize that made it once more, and it "
                             "makes that anew")
        try:
            super().__init__(list(map(str, shards)))
        except ValueError as error:
            raise ValueError(f"{error}: {_ANEW}") from error
        if len(self) != self.description.records:
            raise ValueError(f"{folder} holds {len(self)} records, not the {self.description.records} that its "
                             f"{DESCRIPTION} names: it is damaged, make it anew")

    def __getitem__(self, index: int) -> CodesRecord:
        description = self.description
        try:
            features = parse_example(self.read(index))
            codes = np.frombuffer(features["codes"][0], description.dtype)
            codes = codes.reshape(description.views, *description.grid)
            if codes.max() >= description.codebook_size:
                raise ValueError(f"code {codes.max()} is not below {description.codebook_size}")
            label = label_of(features, "label")
            return CodesRecord(codes, label, os.fsdecode(features["name"][0]), caption_of(features))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{self.name(index)} is damaged ({error}): {_ANEW}") from error
