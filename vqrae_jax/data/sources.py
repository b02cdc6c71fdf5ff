"""Random-access image sources. All can be pickled: Grain starts its workers with `spawn`."""

import bisect
import dataclasses
import functools
import glob
import hashlib
import importlib.resources
import itertools
import math
import os
import pathlib
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, Literal, NamedTuple, NoReturn, Protocol, TypeVar, runtime_checkable

import numpy as np
from PIL import Image

from vqrae_jax.data import faults
from vqrae_jax.data.codes import CodesSource
from vqrae_jax.data.records import RecordFiles, caption_of, label_of, parse_example
from vqrae_jax.data.shared import SharedArray, SharedNames

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class Record(NamedTuple):
    """One image as it is stored.

    Attributes:
      image: the encoded file, or an uint8 array `[H, W, 3]`.
      label: class index, -1 where it is unknown.
      name: what messages call this image; unique in its source.
      caption: what it shows, in words; empty where that is unknown.
    """

    image: bytes | np.ndarray
    label: int
    name: str
    caption: str = ""


Item = TypeVar("Item", covariant=True)


@runtime_checkable
class Source(Protocol[Item]):
    """What the pipeline reads from; the same index always gives the same record, a `Record` or a `CodesRecord`.

    A source may also have `local_names()`, an iterator over the images' names without where the source lies: `hold_out`
    goes by them, and by `name` where there is none.

    Attributes:
      num_classes: labels lie in [0, num_classes); None where the source has no labels.
    """

    @property
    def num_classes(self) -> int | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item:
        """The record at `index` in [0, len).

        Raises:
          ValueError, FileNotFoundError: the image is bad, or gone.
          OSError: the machine cannot read it (too many open files, no permission, an I/O error): it is tried again, and
            then ends the run.
        """
        ...

    def name(self, index: int) -> str:
        """`self[index].name`, known even where the record cannot be read."""
        ...


# Colour photographs that are files of the scikit-image wheel, so that nothing is fetched.
_PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)


@functools.cache
def _photo(name: str) -> np.ndarray:
    """A photograph of scikit-image, uint8 `[H, W, 3]`."""
    path = pathlib.Path(str(importlib.resources.files("skimage") / "data" / name))
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: pip install --force-reinstall scikit-image")
    return np.asarray(Image.open(path).convert("RGB"))


class EmbeddedSource:
    """Random square crops of eight photographs that scikit-image installs: no network, no files of one's own.

    The label is the photograph: index i shows photograph i mod 8. Of every photograph the right third is held out:
    validation crops lie inside it and training crops inside the left two thirds, so that no pixel is in both.
    A crop's side is uniform in [s/2, s], s = min(height, width / 3), for both splits. Which crop an index shows depends
    on (split, index) only.

    Args:
      split: `train` or `validation`.
    """

    def __init__(self, split: Literal["train", "validation"]):
        sizes = {"train": 4096, "validation": 512}
        if split not in sizes:
            raise ValueError(f"the embedded source has the splits {sorted(sizes)}, not {split!r}")
        self.split = split
        self.num_classes = len(_PHOTOS)
        self._size = sizes[split]

    def __len__(self) -> int:
        return self._size

    def name(self, index: int) -> str:
        return f"embedded/{self.split}/{index}"

    def __getitem__(self, index: int) -> Record:
        label = index % len(_PHOTOS)
        photo = _photo(_PHOTOS[label])
        third = photo.shape[1] // 3
        region = photo[:, -third:] if self.split == "validation" else photo[:, :-third]
        rng = np.random.default_rng((self.split == "validation", index))
        longest = min(photo.shape[0], third)
        side = int(rng.integers(longest // 2, longest, endpoint=True))
        top = int(rng.integers(region.shape[0] - side, endpoint=True))
        left = int(rng.integers(region.shape[1] - side, endpoint=True))
        return Record(region[top:top + side, left:left + side], label, self.name(index))


class ArraySource:
    """Images that are in memory.

    Args:
      images: a sequence of uint8 arrays `[H, W, 3]`, of any sizes, or of pairs of such an array and its label, a class
        index; or one array `[N, H, W, 3]`.

    Raises:
      ValueError: there is none, one is of another type or shape, or only some have labels; the message names the first.
    """

    def __init__(self, images: Sequence[Any]):
        pairs = [image if isinstance(image, tuple) else (image, -1) for image in images]
        if not pairs:
            raise ValueError("source has no images")
        for index, pair in enumerate(pairs):
            image, label = pair if len(pair) == 2 else (pair, -1)
            if not (isinstance(image, np.ndarray) and isinstance(label, int | np.integer) and image.dtype == np.uint8
                    and image.shape[2:] == (3,) and image.size):
                found = images[index]
                found = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else type(found).__name__
                raise ValueError(f"source: image {index} must be an uint8 array [H, W, 3], or (array, int): it is "
                                 f"{found}")
            if (label < 0) != (pairs[0][1] < 0):
                raise ValueError(f"source: images 0 and {index}: only one of them has a label")
        self._images = pairs
        self.num_classes = 1 + max(int(label) for _, label in pairs) if pairs[0][1] >= 0 else None

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return f"image {index}"

    def __getitem__(self, index: int) -> Record:
        image, label = self._images[index]
        return Record(image, int(label), self.name(index))


def as_source(images: Any) -> Source:
    """`images` itself if it has the methods of `Source`, else the `ArraySource` of it."""
    return images if isinstance(images, Source) else ArraySource(images)


class FolderSource:
    """The images under a folder, at any depth, sorted by relative path; hidden files and folders are left out.

    When every image lies in a subfolder, its label is the rank of its top-level subfolder; otherwise all labels are -1.

    Names take their bytes and 8 more, once for all processes that read: 27 million of 23 characters 0.8 GB.

    Args:
      path: the folder.

    Raises:
      FileNotFoundError: when the folder does not exist or holds no image.
      OSError: when a subfolder cannot be listed.
    """

    def __init__(self, path: str | os.PathLike):
        faults.allow_open_files()
        self.path = os.fspath(path)
        if not os.path.isdir(self.path):
            raise FileNotFoundError(f"no folder {self.path}: give an existing folder of images")
        # A stretch is neighbouring images of one folder; subfolders may lie between it and the folder's next one.
        folders, ends = [], []

        def names() -> Iterator[str]:
            for count, (folder, name) in enumerate(_images(self.path, "", set())):
                if not folders or folders[-1] != folder:
                    folders.append(folder)
                    ends.append(count)
                ends[-1] = count + 1
                yield name

        self._names = SharedNames(names())
        if not folders:
            raise FileNotFoundError(f"no image under {self.path}: expected files ending in {', '.join(IMAGE_SUFFIXES)}")
        tops = [folder.split(os.sep)[0] for folder in folders]
        self.class_names = sorted(set(tops)) if all(tops) else None
        self.num_classes = None if self.class_names is None else len(self.class_names)
        label_of = {name: label for label, name in enumerate(self.class_names or ())}
        self._labels = SharedArray(np.array([label_of[top] if label_of else -1 for top in tops], np.int32))
        self._ends, self._folders = SharedArray(np.array(ends, np.int64)), SharedNames(folders)

    def __len__(self) -> int:
        return len(self._names)

    def local_names(self) -> Iterator[str]:
        """The paths relative to the folder, which may have been moved."""
        start = 0
        for folder, end in zip(self._folders, self._ends.values, strict=True):
            for index in range(start, end):
                yield os.path.join(folder, self._names[index])
            start = end

    def name(self, index: int) -> str:
        return os.path.join(self.path, self._folders[self._stretch(index)], self._names[index])

    def __getitem__(self, index: int) -> Record:
        name = self.name(index)
        return Record(_read_file(name), self._labels.values[self._stretch(index)], name)

    def _stretch(self, index: int) -> int:
        return bisect.bisect_right(self._ends.values, index)


def _read_file(path: str) -> bytes:
    """The content of a plain file: a pipe waits for who writes into it, and a device does not end."""
    with open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not a readable image: no plain file")
        return file.read()


def _images(path: str, folder: str, visited: set[str]) -> Iterator[tuple[str, str]]:
    """Folder and name of each image in a folder and under it, sorted by the parts of their paths.

    Args:
      path: where all folders lie.
      folder: relative to it.
      visited: folders that have had their turn, as they are without links.
    """
    real = os.path.realpath(os.path.join(path, folder))
    if real in visited:  # links may lead back
        return
    visited.add(real)
    names, subfolders = [], set()
    with os.scandir(os.path.join(path, folder)) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                subfolders.add(entry.name)
            elif not entry.name.lower().endswith(IMAGE_SUFFIXES):
                continue
            names.append(entry.name)
    # No list of all names is sorted: a folder comes where its name is among those of the files beside it.
    names.sort(reverse=True)
    while names:
        name = names.pop()
        if name in subfolders:
            yield from _images(path, os.path.join(folder, name), visited)
        else:
            yield folder, name


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if faults.machine_failed(error):
            raise  # or a whole folder of images would be missing, without a word
        return False  # a link that leads nowhere


def _tfds_builder(name: str, data_dir: str | os.PathLike | None) -> tuple[Any, pathlib.Path]:
    """The read-only builder of a prepared data set, and its folder."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import constants

    data_dir = os.path.expanduser(os.fspath(constants.DATA_DIR if data_dir is None else data_dir))
    folder = pathlib.Path(data_dir) / name
    versions = [path for path in folder.glob("*/features.json") if tfds.core.Version.is_valid(path.parent.name)]
    if not (folder / "features.json").exists():
        if not versions:
            raise FileNotFoundError(
                f"no TFDS data set {name!r} under {data_dir}: prepare it on a machine with TensorFlow, "
                f"tfds build {name} --data_dir={data_dir} --file_format=array_record")
        folder = max((path.parent for path in versions), key=lambda path: tfds.core.Version(path.name))
    return tfds.builder_from_directory(folder), folder


def tfds_splits(name: str, data_dir: str | os.PathLike | None = None) -> list[str]:
    """The splits of a prepared TFDS data set; arguments and errors as for `TfdsSource`."""
    return sorted(_tfds_builder(name, data_dir)[0].info.splits)


class TfdsSource:
    """A prepared TensorFlow Datasets data set in ArrayRecord format, read without TensorFlow and without network.

    Args:
      name: data set, with its config or version where needed: `cifar10`, `imagenet2012_subset/10pct`, `cifar10/3.0.2`.
        Without a version the newest one on disk is read.
      split: `train`, `test[:10%]`, ...
      data_dir: where TFDS keeps its data; None is TFDS' own default (`TFDS_DATA_DIR` or ~/tensorflow_datasets).

    Raises:
      FileNotFoundError: when the data set is not under `data_dir`.
      ValueError: when it has no such split, no feature `image`, or is not in ArrayRecord format.
    """

    def __init__(self, name: str, split: str, data_dir: str | os.PathLike | None = None):
        import tensorflow_datasets as tfds

        faults.allow_open_files()
        builder, folder = _tfds_builder(name, data_dir)
        features = builder.info.features
        if "image" not in features:
            raise ValueError(f"the TFDS data set {folder} has no feature 'image', only {sorted(features)}")
        try:
            # The encoded bytes come out, so that every source goes through the same decoder.
            self._data = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"cannot read split {split!r} of {folder}: {' '.join(str(error).split())}") from error
        self.num_classes = features["label"].num_classes if "label" in features else None
        self._prefix = f"{name}/{split}"

    def __len__(self) -> int:
        return len(self._data)

    def name(self, index: int) -> str:
        return f"{self._prefix}/{index}"

    def __getitem__(self, index: int) -> Record:
        from google.protobuf.message import DecodeError

        try:
            example = self._data[index]
        except RuntimeError as error:
            raise faults.from_text(error) from error
        except DecodeError as error:
            raise ValueError(f"corrupt record: {' '.join(str(error).split())}") from error
        return Record(example["image"], -1 if self.num_classes is None else int(example["label"]), self.name(index))


class ArrayRecordSource(RecordFiles):
    """Records of ArrayRecord files, in the order of the sorted file names.

    A record is either a serialized `tf.train.Example` with a bytes feature `image` or `image/encoded` and, optionally,
    an int64 feature `label` or `image/class/label` and a UTF-8 feature `caption`, or just the bytes of an encoded
    image.

    Args:
      pattern: a path in which `*`, `?` and `**` stand for anything.

    Raises:
      FileNotFoundError: when no file matches.
      ValueError: when a file is not an ArrayRecord file.
      OSError: when a file cannot be opened.
    """

    num_classes = None

    def __init__(self, pattern: str):
        paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if not paths:
            raise FileNotFoundError(f"no file matches {pattern}: give ArrayRecord files, as data/train-*.array_record")
        super().__init__(paths)

    def __getitem__(self, index: int) -> Record:
        record = self.read(index)
        # Field 1, length-delimited: so begins every Example, and no image format.
        if not record.startswith(b"\x0a"):
            return Record(record, -1, self.name(index))
        features = parse_example(record)
        images = [features[key] for key in ("image", "image/encoded") if key in features]
        if not images or len(images[0]) != 1 or not isinstance(images[0][0], bytes):
            raise ValueError("a tf.train.Example without one 'image' or 'image/encoded' of bytes, only "
                             f"{sorted(features)}")
        label = label_of(features, "label", "image/class/label")
        return Record(images[0][0], label, self.name(index), caption_of(features))


@dataclasses.dataclass(frozen=True)
class _Rest:
    """The indices in [0, size) without some, ascending; of those that are left nothing is kept, for they are many.

    Attributes:
      size: of the range.
      before: uint32, how many are left before each that is missing, ascending.
    """

    size: int
    before: SharedArray

    def __len__(self) -> int:
        return self.size - len(self.before)

    def __getitem__(self, place: int) -> int:
        return place + bisect.bisect_right(self.before.values, place)


@dataclasses.dataclass(frozen=True)
class _Part(Generic[Item]):
    """Some images of a source."""

    source: Source[Item]
    indices: SharedArray | _Rest

    @property
    def num_classes(self) -> int | None:
        return self.source.num_classes

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def __getitem__(self, index: int) -> Item:
        return self.source[self.indices[index]]


def part(source: Source[Item], indices: np.ndarray) -> Source[Item]:
    """Some images of a source, in the order of their indices."""
    return _Part(source, SharedArray(indices.astype(np.uint32)))


def hold_out(source: Source[Item], share: float) -> tuple[Source[Item], Source[Item]]:
    """Parts a source into images to train on and images that are never trained on.

    An image is held out when the hash of its name, as a number in [0, 1), is below `share`. So it stays in its part
    when other images come or go, and when the source is moved: its name is that of the source's `local_names`, where
    it has them.

    Args:
      source: of the images.
      share: of the images that are held out, in [0, 0.5]; of few images it may be none. They are never all of them.

    Returns:
      the images to train on and the held-out ones, in the order that they have in the source.
    """
    held_out = np.fromiter(_held_out(source, share) if share else (), np.int64)
    if len(held_out) in (0, len(source)):
        return source, part(source, held_out[:0])
    before = (held_out - np.arange(len(held_out))).astype(np.uint32)
    return _Part(source, _Rest(len(source), SharedArray(before))), part(source, held_out)


def _held_out(source: Source, share: float) -> Iterator[int]:
    """The indices of the images that `hold_out` holds out, ascending."""
    below = math.ceil(share * 2**48).to_bytes(6, "big")
    numbers = itertools.count()
    # Of millions of names a microsecond each counts: what many begin with is hashed once.
    for start, rests in _local_names(source):
        begun = hashlib.blake2b(start, digest_size=6)
        for rest, index in zip(rests, numbers, strict=False):
            name = begun.copy()
            name.update(rest)
            if name.digest() < below:
                yield index


def _local_names(source: Source) -> Iterator[tuple[bytes, Iterable[bytes]]]:
    """What some names begin with, and how each of them goes on."""
    if isinstance(source, RecordFiles):
        yield from source.names_by_file()
        return
    names = getattr(source, "local_names", lambda: map(source.name, range(len(source))))
    yield b"", (name.encode(errors="surrogatepass") for name in names())


def _tfds_spec(rest: str) -> tuple[str, str, str | None]:
    """Data set, split, which may be empty, and folder."""
    name_and_split, _, data_dir = rest.partition("@")
    name, _, split = name_and_split.partition(":")
    return name, split, data_dir or None


def _tfds_held_out(rest: str) -> list[str]:
    """The splits that hold out images, best first; none where the SPEC names the split that it means."""
    name, split, data_dir = _tfds_spec(rest)
    return [] if split else [held_out for held_out in ("validation", "test") if held_out in tfds_splits(name, data_dir)]


def _open_tfds(rest: str, *, training: bool) -> Source:
    name, split, data_dir = _tfds_spec(rest)
    if not split:
        split = "train" if training else (*_tfds_held_out(rest), "train")[0]
    return TfdsSource(name, split=split, data_dir=data_dir)


def _refuse_own(rest: str, *, training: bool) -> NoReturn:
    raise ValueError("the images of this run are an object, which no config can name: give --data=SPEC to evaluate it "
                     "on others, or in Python the object to vqrae_jax.train as source=")


class SourceKind(NamedTuple):
    """A row of the table of sources.

    Attributes:
      spec: how a SPEC of this kind is written; empty if nobody may.
      open: `(what follows the colon, training=) -> Source`.
      holds_out: `(what follows the colon) -> bool`, whether the data themselves hold images out, which `open` gives
        when it is not for training.
      of: what it has: images, for a tokenizer, or codes, for a generator.
    """

    spec: str
    open: Callable[..., Source]
    holds_out: Callable[[str], bool] = lambda rest: False
    of: Literal["images", "codes"] = "images"


# By the first word of a SPEC.
SOURCES = {
    "embedded": SourceKind(
        "embedded", lambda rest, *, training: EmbeddedSource("train" if training else "validation"), lambda rest: True),
    "folder": SourceKind("folder:PATH", lambda rest, *, training: FolderSource(rest)),
    "tfds": SourceKind("tfds:NAME[:SPLIT][@DATA_DIR]", _open_tfds, lambda rest: bool(_tfds_held_out(rest))),
    "array_record": SourceKind("array_record:GLOB", lambda rest, *, training: ArrayRecordSource(rest)),
    "codes": SourceKind("codes:DIR", lambda rest, *, training: CodesSource(rest), of="codes"),
    "own": SourceKind("", _refuse_own),  # an object, given to `vqrae_jax.train`
}


def open_source(spec: str, *, training: bool, of: Literal["images", "codes"] = "images") -> Source:
    """Opens all images of `embedded`, `folder:PATH`, `tfds:NAME[:SPLIT][@DATA_DIR]` or `array_record:GLOB`.

    Where a SPEC names no split, training reads `train`, and evaluation what is held out: `validation` or else `test`.
    With `of="codes"` it is all codes of `codes:DIR`.

    Raises:
      ValueError: not a SPEC, or no such split.
      OSError: the data is not there.
    """
    kind, rest = _kind(spec, of)
    return kind.open(rest, training=training)


def open_parts(spec: str, *, holdout: float, of: Literal["images", "codes"] = "images") -> tuple[Source, Source]:
    """Opens the images to train on and those that are held out, reading once what the data consist of.

    `embedded`, and a TFDS data set of which no split is named and which has `validation` or `test`, hold out images of
    their own. Of everything else it is `hold_out`'s choice.

    Args:
      spec: as for `open_source`.
      holdout: share of the images that `hold_out` holds out.
      of: as for `open_source`.

    Raises:
      ValueError, OSError: as from `open_source`.
    """
    kind, rest = _kind(spec, of)
    if kind.holds_out(rest):
        return kind.open(rest, training=True), kind.open(rest, training=False)
    return hold_out(kind.open(rest, training=True), holdout)


def _kind(spec: str, of: str) -> tuple[SourceKind, str]:
    """The row of a SPEC, and what follows the colon."""
    name, _, rest = spec.partition(":")
    kind = SOURCES[name] if name in SOURCES else None
    if kind is None or kind.of != of or bool(rest) != (":" in kind.spec):
        *others, last = (kind.spec for kind in SOURCES.values() if kind.spec and kind.of == of)
        raise ValueError(f"unknown data {spec!r}: give {', '.join(others)}{' or ' if others else ''}{last}")
    return kind, rest
