"""Batches for training and evaluation, with Grain.

A training batch is a function of its number in the run, and of nothing else: not of threads, worker processes, hosts,
restarts, or of which images turned out to be bad before it. So the whole state of the iterator is that number.
"""

import atexit
import dataclasses
import functools
import json
import math
import os
import pathlib
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from vqrae_jax.data import faults
from vqrae_jax.data.codes import CodesRecord
from vqrae_jax.data.sources import Record, Source
from vqrae_jax.data.transforms import VIEWS, random_flip, random_resized_crop, resize_and_center_crop

Example = dict[str, Any]  # arrays of one image, which batches stack
ReadCaption = Callable[[str], Example]

TOLERATED_BAD_IMAGES = 3  # whatever share they are: one of thirty is no reason to stop


class BadImages:
    """The images that could not be read, and why.

    Args:
      path: a file of JSON lines that is appended to, by worker processes and by continued runs alike. With None the
        record lives in this process only.
    """

    def __init__(self, path: str | os.PathLike | None):
        self.path = None if path is None else pathlib.Path(path)
        self._reasons: dict[str, str] = {}
        self._reasons = self.names()

    def record(self, *, name: str, reason: str) -> None:
        """Notes a bad image; once per image, however often it is met."""
        if name in self._reasons:
            return
        self._reasons[name] = reason
        if self.path is not None:
            line = json.dumps({"name": name, "reason": reason}) + "\n"
            # One write of a file opened for appending: lines of several processes do not mix.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)

    def names(self) -> dict[str, str]:
        """`{name: reason}` of all bad images that were met so far, by any process."""
        if self.path is None or not self.path.exists():
            return dict(self._reasons)
        reasons = {}
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
                name, reason = entry["name"], entry["reason"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # the process was killed while it wrote this line; the image will be met again
            reasons.setdefault(str(name), str(reason))
        return reasons

    def summary(self) -> str:
        """How many there are and what some are called, in one line; empty where there are none."""
        if not (bad := list(self.names())):
            return ""
        return (f"{len(bad)} images could not be read and were left out: {', '.join(bad[:5])}"
                f"{', ...' if len(bad) > 5 else ''}; see {self.path}")


def _read(source: Source, index: int, bad_images: BadImages, make: Callable[[Any], Example]) -> Example | None:
    """What is made of a record, or None when it is bad.

    Raises:
      faults.MachineError: it cannot be read, which says nothing of the image.
    """
    try:
        return make(faults.retried(lambda: source[index], source.name(index)))
    except faults.MachineError:
        raise
    except (OSError, ValueError) as error:
        bad_images.record(name=source.name(index), reason=str(error))
        return None


def _check(source: Source, *, batch_size: int, shard_index: int, shard_count: int) -> None:
    if len(source) == 0:
        raise ValueError("the data source has no images")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index {shard_index} is not in [0, {shard_count})")


def _all_bad(source: Source, count: int, bad_images: BadImages) -> ValueError:
    example = _example(source, 0, bad_images)
    return ValueError(f"none of the {count} images of the data source can be read, {example}")


def _example(source: Source, index: int, bad_images: BadImages) -> str:
    """Name and reason of a bad image."""
    name, reasons = source.name(index), bad_images.names()
    return f"for example {name}: {reasons[name]}" if name in reasons else f"for example {name}"


def _check_bad(source: Source, index: int, bad_images: BadImages, *, bad: int, read: int, max_bad: float) -> None:
    """Ends the run when too many images are bad.

    Args:
      source: of the images.
      index: of a bad one.
      bad_images: what is known of it.
      bad: how many are bad.
      read: of how many that were read.
      max_bad: share of the images that may be bad; `TOLERATED_BAD_IMAGES` may be in any case.

    Raises:
      ValueError: they are more.
    """
    if bad > max(TOLERATED_BAD_IMAGES, max_bad * read):
        see = "" if bad_images.path is None else f"; {bad_images.path} names them all"
        raise ValueError(f"{bad} of {read} images cannot be read, {_example(source, index, bad_images)}{see}; mend or "
                         f"remove them, or allow a greater share than {max_bad:g} with --config.data.max_bad=... "
                         "(evaluate, tokenize: --max_bad=...)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TrainExample:
    """Index in the source -> what `make(record, rng=...)` makes of it, and the index again where it is bad, else -1."""

    source: Source
    make: Callable[..., Example]
    bad_images: BadImages
    max_bad: float

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        make = functools.partial(self.make, rng=rng)
        example = _read(self.source, index, self.bad_images, make)
        return {**(example or self._stand_in(rng, make)), "bad": np.int64(-1 if example else index)}

    def _stand_in(self, rng: np.random.Generator, make: Callable[[Any], Example]) -> Example:
        # A random other image stands in, rather than a shorter stream: later batches must not depend on this one.
        start = int(rng.integers(len(self.source)))
        for offset in range(len(self.source)):
            index = (start + offset) % len(self.source)
            example = _read(self.source, index, self.bad_images, make)
            if example is not None:
                return example
            # Of millions that are all bad not all are tried.
            _check_bad(self.source, index, self.bad_images, bad=offset + 1, read=len(self.source), max_bad=self.max_bad)
        raise _all_bad(self.source, len(self.source), self.bad_images)


def _crop_and_flip(record: Record, *, rng: np.random.Generator, image_size: int, crop_scale_min: float,
                   flip: bool) -> Example:
    image = random_resized_crop(record.image, rng, size=image_size, scale=(crop_scale_min, 1.0))
    return {"image": random_flip(image, rng) if flip else image, "label": np.int32(record.label)}


def _one_view(record: CodesRecord, *, rng: np.random.Generator, read_caption: ReadCaption | None) -> Example:
    return _codes_example(record, int(rng.integers(len(record.codes))), read_caption)


def _codes_example(record: CodesRecord, view: int, read_caption: ReadCaption | None) -> Example:
    caption = {} if read_caption is None else read_caption(record.caption)
    return {"codes": record.codes[view].astype(np.int32), "label": np.int32(record.label), **caption}


class TrainIterator(grain.DatasetIterator):
    """An endless, checkpointable iterator over a random-access dataset of batches; made by `train_batches`.

    Its state is `{"next_batch": n}`, the same on every host and for any number of threads, workers and hosts.
    """

    def __init__(self, batches: grain.MapDataset, *, batch_size: int, threads: int, workers: int, shard_index: int,
                 shard_count: int, check_bad: Callable[..., None]):
        super().__init__()
        self._batches = batches
        self._batch_size = batch_size
        self._threads = threads
        self._workers = workers
        self._shard_index = shard_index
        self._shard_count = shard_count
        self._check_bad = check_bad
        self._next_batch = 0
        self._first_batch = 0  # since when bad images are counted
        self._bad: set[int] = set()
        self._iterator = None
        # A run that ends by an exception must not leave workers and shared memory behind.
        atexit.register(_close_if_alive, weakref.ref(self))

    def start_prefetch(self) -> None:
        """Starts to read ahead, where threads or workers are there to do it."""
        self._start()

    def _start(self) -> grain.DatasetIterator:
        self._assert_not_closed()
        if self._iterator is None:
            batches = self._batches[self._next_batch * self._shard_count + self._shard_index::self._shard_count]
            read_options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=max(2, self._threads))
            workers = grain.multiprocessing.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
            if self._workers and not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain reads flags to start workers; outside of `absl.app` nobody parsed
            self._iterator = iter(batches.to_iter_dataset(read_options).mp_prefetch(workers))
            self._iterator.start_prefetch()
        return self._iterator

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._start())
        self._next_batch += 1
        if new := set(batch.pop("bad").tolist()) - self._bad - {-1}:
            self._bad |= new
            drawn = (self._next_batch - self._first_batch) * self._batch_size
            self._check_bad(min(new), bad=len(self._bad), drawn=drawn)
        return batch

    def get_state(self) -> dict[str, int]:
        return {"next_batch": self._next_batch}

    def set_state(self, state: dict[str, int]) -> None:
        self._stop()
        self._next_batch = self._first_batch = state["next_batch"]
        self._bad = set()

    def close(self) -> None:
        """Ends the workers; the iterator cannot be used any more."""
        self._stop()
        super().close()

    def _stop(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __str__(self) -> str:
        return f"TrainIterator(next_batch={self._next_batch})"


def _close_if_alive(reference: "weakref.ref[TrainIterator]"):
    iterator = reference()
    if iterator is not None:
        iterator.close()


def train_batches(
    source: Source,
    *,
    image_size: int,
    batch_size: int,
    seed: int,
    crop_scale_min: float,
    flip: bool,
    threads: int,
    workers: int,
    bad_images: BadImages,
    max_bad: float,
    shard_index: int = 0,
    shard_count: int = 1,
) -> TrainIterator:
    """Augmented batches without end; every epoch is shuffled anew.

    The global batch of step n consists of the images n*B ... (n+1)*B - 1 of the shuffled stream, B = batch_size *
    shard_count, and each shard holds `batch_size` consecutive ones of them: the same global batch for any number of
    shards. In place of a bad image stands another one, drawn at random.

    Args:
      source: where the images come from; it may hold less than one batch.
      image_size: side of the images.
      batch_size: images per batch of this shard (process).
      seed: shuffling and augmentation depend on it and on the position in the stream.
      crop_scale_min: smallest share of an image's area that a random crop keeps, in (0, 1].
      flip: whether images are mirrored at random.
      threads: threads of each process that reads; each makes a whole batch. 0 reads only when a batch is asked for.
      workers: processes that read; 0 reads in this process. Decoding leaves Python's lock, so that workers pay only
        for small images on many cores.
      bad_images: collects the images that cannot be read; needs a path when `workers` > 0.
      max_bad: greatest share of bad images among those drawn, each counted once; a handful is always tolerated.
      shard_index: which shard (`jax.process_index()`).
      shard_count: number of shards (`jax.process_count()`).

    Returns:
      an iterator of `{"image": uint8 [batch_size, image_size, image_size, 3], "label": int32 [batch_size]}` with
      `get_state`, `set_state` and `close`.

    Raises:
      ValueError: on impossible arguments; and, from the iterator, when too many images, or all, are bad.
      OSError: from the iterator, in one line, when the machine cannot read an image that may be good.
    """
    if not 0 < crop_scale_min <= 1:
        raise ValueError(f"crop_scale_min must be in (0, 1], got {crop_scale_min}")
    make = functools.partial(_crop_and_flip, image_size=image_size, crop_scale_min=crop_scale_min, flip=flip)
    return _endless(source, make, batch_size=batch_size, seed=seed, threads=threads, workers=workers,
                    bad_images=bad_images, max_bad=max_bad, shard_index=shard_index, shard_count=shard_count)


def codes_train_batches(
    source: Source[CodesRecord],
    *,
    batch_size: int,
    seed: int,
    threads: int,
    workers: int,
    bad_images: BadImages,
    max_bad: float,
    read_caption: ReadCaption | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
) -> TrainIterator:
    """Batches of codes without end, for a generator, in the order and with the properties of `train_batches`.

    Of a record with several views one is drawn each time it comes.

    Args:
      source: of the codes, as `open_source` gives it.
      batch_size, seed, threads, workers, bad_images, max_bad, shard_index, shard_count: as for `train_batches`.
      read_caption: makes arrays of a caption, as a tokenizer of text does, that the batch then has as well; it is
        called in the threads or workers that read, and pickled for the latter.

    Returns:
      an iterator of `{"codes": int32 [batch_size, h, w], "label": int32 [batch_size]}`, labels -1 where unknown, with
      `get_state`, `set_state` and `close`.

    Raises:
      ValueError, OSError: as from `train_batches`.
    """
    make = functools.partial(_one_view, read_caption=read_caption)
    return _endless(source, make, batch_size=batch_size, seed=seed, threads=threads, workers=workers,
                    bad_images=bad_images, max_bad=max_bad, shard_index=shard_index, shard_count=shard_count)


def _endless(source: Source, make: Callable[..., Example], *, batch_size: int, seed: int, threads: int, workers: int,
             bad_images: BadImages, max_bad: float, shard_index: int, shard_count: int) -> TrainIterator:
    _check(source, batch_size=batch_size, shard_index=shard_index, shard_count=shard_count)
    if workers and bad_images.path is None:
        raise ValueError("worker processes can report bad images only through a file: give BadImages a path")
    # Two independent streams. Grain's shuffle adds the epoch to its seed: raw seeds 0 and 1 would share their epochs.
    shuffle_seed, augment_seed = (int(word) for word in np.random.SeedSequence(seed).generate_state(2))
    example = _TrainExample(source=source, make=make, bad_images=bad_images, max_bad=max_bad)
    stream = grain.MapDataset.range(len(source)).shuffle(shuffle_seed).repeat().random_map(example, seed=augment_seed)
    batches = stream.batch(batch_size, drop_remainder=True)

    def check_bad(index: int, *, bad: int, drawn: int) -> None:
        _check_bad(source, index, bad_images, bad=bad, read=min(drawn, len(source)), max_bad=max_bad)

    return TrainIterator(batches, batch_size=batch_size, threads=threads, workers=workers, shard_index=shard_index,
                         shard_count=shard_count, check_bad=check_bad)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OrderedExample:
    """Position among the chosen records, or in the padding -> what `make` makes of it, and whether it is there."""

    source: Source
    chosen: np.ndarray
    make: Callable[[Any], Example]
    missing: Example
    bad_images: BadImages

    def __call__(self, position: int) -> Example:
        index = int(self.chosen[position]) if position < len(self.chosen) else -1
        example = _read(self.source, index, self.bad_images, self.make) if index >= 0 else None
        return {**(example or self.missing), "valid": np.bool_(example is not None), "index": np.int64(index)}


def _ordered(source: Source, chosen: np.ndarray, make: Callable[[Any], Example], missing: Example, *, batch_size: int,
             bad_images: BadImages, max_bad: float, threads: int, shard_index: int,
             shard_count: int) -> Generator[dict[str, np.ndarray], None, tuple[int, int]]:
    """Batches of the chosen records in order, each once; returns how many are bad, and of how many."""
    padded = math.ceil(len(chosen) / (batch_size * shard_count)) * batch_size * shard_count
    example = _OrderedExample(source=source, chosen=chosen, make=make, missing=missing, bad_images=bad_images)
    batches = grain.MapDataset.range(padded).map(example).batch(batch_size)[shard_index::shard_count]
    read_options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))
    bad, read = 0, 0
    for batch in batches.to_iter_dataset(read_options):
        there = batch["index"] >= 0
        missed = batch["index"][there & ~batch["valid"]]
        bad, read = bad + len(missed), read + int(there.sum())
        if len(missed):
            _check_bad(source, int(missed[0]), bad_images, bad=bad, read=read, max_bad=max_bad)
        yield batch
    return bad, read


def _chosen(source: Source, limit: int | None) -> np.ndarray:
    """The indices of a limited evaluation, ascending."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, got {limit}")
    # Not the first ones: in a folder these may all be of one class.
    return np.sort(np.random.default_rng(0).permutation(len(source))[:limit])


def _centre(record: Record, *, image_size: int) -> Example:
    image = resize_and_center_crop(record.image, size=image_size)
    return {"image": image, "label": np.int32(record.label)}


def eval_batches(
    source: Source,
    *,
    image_size: int,
    batch_size: int,
    bad_images: BadImages,
    max_bad: float,
    threads: int,
    shard_index: int = 0,
    shard_count: int = 1,
    limit: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """The images in order, each once, resized and centre-cropped; every batch is full, every shard has as many.

    Padding and bad images have valid = False, label -1 and black pixels. Global batch n, its shards one after the
    other, holds the positions n*B ... (n+1)*B - 1 of the evaluation set, B = batch_size * shard_count.

    Args:
      source: where the images come from.
      image_size: side of the images.
      batch_size: images per batch of this shard (process).
      bad_images: collects the images that cannot be read.
      max_bad: greatest share of bad images among those read; a handful is always tolerated.
      threads: threads that read; each makes a whole batch. 0 reads only when a batch is asked for.
      shard_index: which shard (`jax.process_index()`).
      shard_count: number of shards (`jax.process_count()`).
      limit: only so many images, a random choice that is always the same; None is all.

    Returns:
      an iterator of `{"image": uint8 [B, S, S, 3], "label": int32 [B], "valid": bool [B], "index": int64 [B]}` with
      B = batch_size; `index` is the position in the source, -1 for padding.

    Raises:
      ValueError: on impossible arguments; and, from the iterator, when too many images are bad, and after the last
        batch of an only shard, when no image could be read.
      OSError: from the iterator, in one line, when the machine cannot read an image that may be good.
    """
    missing = {"image": np.zeros((image_size, image_size, 3), np.uint8), "label": np.int32(-1)}
    return _evaluation(source, functools.partial(_centre, image_size=image_size), missing, batch_size=batch_size,
                       bad_images=bad_images, max_bad=max_bad, threads=threads, shard_index=shard_index,
                       shard_count=shard_count, limit=limit)


def codes_eval_batches(
    source: Source[CodesRecord],
    *,
    grid: tuple[int, int],
    batch_size: int,
    bad_images: BadImages,
    max_bad: float,
    threads: int,
    read_caption: ReadCaption | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    limit: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """The codes of records in order, each once, of several views the first; otherwise as `eval_batches`.

    Args:
      source: of the codes, as `open_source` gives it.
      grid: height and width of the codes.
      read_caption: as for `codes_train_batches`.
      batch_size, bad_images, max_bad, threads, shard_index, shard_count, limit: as for `eval_batches`.

    Returns:
      an iterator of `{"codes": int32 [B, h, w], "label": int32 [B], "valid": bool [B], "index": int64 [B]}`; where
      `valid` is false codes are 0, labels -1, and the caption the empty one.

    Raises:
      ValueError, OSError: as from `eval_batches`; ValueError also where no record can be read.
    """
    make = functools.partial(_codes_example, view=0, read_caption=read_caption)
    missing = make(CodesRecord(np.zeros((1, *grid), np.uint16), -1, "", ""))
    return _evaluation(source, make, missing, batch_size=batch_size, bad_images=bad_images, max_bad=max_bad,
                       threads=threads, shard_index=shard_index, shard_count=shard_count, limit=limit)


def _evaluation(source: Source, make: Callable[[Any], Example], missing: Example, *, batch_size: int,
                bad_images: BadImages, max_bad: float, threads: int, shard_index: int, shard_count: int,
                limit: int | None) -> Iterator[dict[str, np.ndarray]]:
    _check(source, batch_size=batch_size, shard_index=shard_index, shard_count=shard_count)
    chosen = _chosen(source, limit)

    def iterate():
        bad, read = yield from _ordered(
            source, chosen, make, missing, batch_size=batch_size, bad_images=bad_images, max_bad=max_bad,
            threads=threads, shard_index=shard_index, shard_count=shard_count)
        # One of several shards may well be without a good image, and the others would wait for it for ever.
        if shard_count == 1 and bad == read:
            raise _all_bad(source, len(chosen), bad_images)

    return iterate()


def _views(record: Record, *, image_size: int, views: int) -> Example:
    return {"image": VIEWS[views].make(record.image, size=image_size), "label": np.int32(record.label),
            "caption": np.array(record.caption, object)}


def views_batches(source: Source, indices: np.ndarray, *, image_size: int, views: int, batch_size: int,
                  bad_images: BadImages, max_bad: float, threads: int) -> Iterator[dict[str, np.ndarray]]:
    """Some images of a source in order, to be made into codes; every batch is full.

    Args:
      source: where the images come from.
      indices: which of them, ascending.
      image_size: side of the images.
      views: of each image, one of `VIEWS`.
      batch_size, bad_images, max_bad, threads: as for `eval_batches`.

    Returns:
      an iterator of `{"image": uint8 [B, views, S, S, 3], "label": int32 [B], "caption": str [B], "valid": bool [B],
      "index": int64 [B]}`; captions are an array of objects.

    Raises:
      ValueError, OSError: from the iterator, as from that of `eval_batches`, but not where all images are bad.
    """
    make = functools.partial(_views, image_size=image_size, views=views)
    missing = make(Record(np.zeros((image_size, image_size, 3), np.uint8), -1, ""))
    return _ordered(source, indices, make, missing, batch_size=batch_size, bad_images=bad_images, max_bad=max_bad,
                    threads=threads, shard_index=0, shard_count=1)
