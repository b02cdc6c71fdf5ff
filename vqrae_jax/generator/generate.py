"""Samples on disk: what the command `generate` does, and can go on with after an interruption.

Codes come first, and are kept in a folder beside what is to be written, a file a batch. When all are there they are
decoded, with a function that somebody who knows of tokenizers gives, and written as pictures.
"""

import dataclasses
import itertools
import math
import shutil
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from vqrae_jax.data import BadImages, codes_eval_batches, hold_out, open_source
from vqrae_jax.files import disk_errors, read_json, wait_for, whole, write_json
from vqrae_jax.generator import evaluate
from vqrae_jax.generator.inference import Generator
from vqrae_jax.generator.sampling import Options
from vqrae_jax.generator.task import RULER_IMAGES
from vqrae_jax.training import distributed, reporting, signals

COLUMNS = 10  # of a picture
_REQUEST = "request.json"


class Samples:
    """Images to be sampled, and the folder where their codes are kept until they are written.

    Args:
      generator: the model.
      num: how many.
      classes: see `Generator.sample`.
      prompts: likewise.
      options: how codes are drawn.
      batch_size: images at once, rounded up to a multiple of the devices.
      out: where pictures will be: FILE.png, FILE.npz, or a folder.
      weights: hashes of the weights that take part, for no others may continue.

    Attributes:
      labels: `[num]` int64, the class of each image, -1 with prompts.
      names: of each image's class, or its prompt.
      request: what was asked for, as JSON.

    Raises:
      ValueError: there are no such images, or something else is where they would be.
      OSError: the folder cannot be written.
    """

    def __init__(self, generator: Generator, num: int, *, classes: Sequence[int] | None, prompts: Sequence[str] | None,
                 options: Options, batch_size: int, out: Path, weights: dict[str, str]):
        generator.check(num, options)
        self._generator, self._num, self._options, self._out = generator, num, options, out
        self._prefixes = generator.prefixes(classes, prompts)
        self._size = generator.batch_size(min(batch_size, num))
        turn = np.arange(num) % len(self._prefixes.names)
        self.labels = self._prefixes.arrays["label"][turn].astype(np.int64)
        self.names = [self._prefixes.names[number] for number in turn]
        self._folder = out.with_name(f"{out.name}.unfinished")
        self.request = {"num": num, "prefixes": self._prefixes.names, **dataclasses.asdict(options),
                        "batch_size": self._size, "weights": weights}
        with disk_errors(self._folder):
            if distributed.is_first():
                self._begin()
            distributed.wait_for_all("begin of samples")

    def _begin(self) -> None:
        file = self._folder / _REQUEST
        if file.exists():
            begun = read_json(file)
            if differing := [name for name in self.request if (name, self.request[name]) not in begun.items()]:
                raise ValueError(f"{self._folder} holds samples that were begun with other {', '.join(differing)}: "
                                 "give the same flags to go on with them, or remove that folder to begin anew")
            return
        if self._out.is_dir() and any(self._out.iterdir()):
            raise ValueError(f"{self._out} is not empty: choose another folder for the images")
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(file, self.request)

    def codes(self) -> np.ndarray:
        """All images' codes, `[num, h, w]` int32: what is on disk already is read, the others are drawn."""
        files = [self._folder / f"{number:06d}.npz" for number in range(math.ceil(self._num / self._size))]
        there = distributed.agreed(next((i for i, file in enumerate(files) if not file.exists()), len(files)))
        wait_for(files[:there])
        found = [_read(file) for file in files[:there]]
        numbers = itertools.islice(self._generator.batches(self._num, self._size), there, None)
        drawn = (self._generator.draw(self._prefixes, of_batch, self._options) for of_batch in numbers)
        shown = reporting.shown(drawn, done=there * self._size, size=len, of=self._num)
        for file, codes in zip(files[there:], shown, strict=True):
            found.append(codes)
            if distributed.is_first():
                with disk_errors(self._folder), whole(file) as unfinished, unfinished.open("wb") as opened:
                    np.savez(opened, codes=codes)  # which has a checksum
            signals.stop_if_preempted()
        return np.concatenate(found)[:self._num]

    def write(self, batches: Iterable[np.ndarray]) -> None:
        """Writes the pictures.

        Args:
          batches: of all images in order, `[B, H, W, 3]` float32 in [0, 1]; every process goes through them.
        """
        if not distributed.is_first():
            for _ in batches:
                pass
            return
        folder = self._out if kind(self._out) == "folder" else self._out.parent
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if kind(self._out) == "picture":
                reporting.save_png(self._out, picture(np.concatenate(list(batches)), self.names))
            elif kind(self._out) == "arrays":
                write_npz(self._out, map(reporting.to_8_bits, batches), self.labels)
            else:
                images = itertools.chain.from_iterable(map(reporting.to_8_bits, batches))
                for number, (image, label) in enumerate(zip(images, self.labels, strict=True)):
                    of_class = f"_class{label}" if label >= 0 else ""
                    reporting.save_png(self._out / f"{number:08d}{of_class}.png", image)

    def end(self) -> None:
        """Removes what was kept to go on with."""
        distributed.wait_for_all("end of samples")
        if distributed.is_first():
            shutil.rmtree(self._folder)


def _read(file: Path) -> np.ndarray:
    """Codes that were drawn before."""
    try:
        with np.load(file) as arrays:
            return arrays["codes"]
    except (EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged ({error}): remove it and give the same command again") from None


def kind(out: Path) -> Literal["picture", "arrays", "folder"]:
    """What is written under a name."""
    kinds: dict[str, Literal["picture", "arrays"]] = {".png": "picture", ".npz": "arrays"}
    return "folder" if out.is_dir() or out.suffix.lower() not in kinds else kinds[out.suffix.lower()]


def picture(images: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Images `[n, H, W, 3]` float in [0, 1] in rows of `COLUMNS`, each under its name: uint8 `[h, w, 3]`."""
    tiles = [reporting.image_rows({name: image[None]}) for name, image in zip(names, images, strict=True)]
    columns = min(COLUMNS, len(tiles))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    return np.concatenate([np.concatenate(tiles[first:first + columns], axis=1)
                           for first in range(0, len(tiles), columns)])


def write_npz(file: Path, batches: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """Writes what ADM's evaluator reads: `arr_0`, all images, uint8 `[N, H, W, 3]`, and `arr_1`, their labels.

    Fifty thousand of 256 pixels a side are 10 GB: they go to the file batch by batch, uncompressed as `numpy.savez` has
    them.
    """
    with whole(file) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as entry:
            for number, batch in enumerate(batches):
                if not number:
                    np.lib.format.write_array_header_1_0(entry, {
                        "descr": "|u1", "fortran_order": False, "shape": (len(labels), *batch.shape[1:])})
                entry.write(np.ascontiguousarray(batch).data)
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as entry:
            np.lib.format.write_array(entry, labels)


def independent_codes(generator: Generator, mesh: Mesh, num: int, seed: int) -> np.ndarray:
    """Codes that know only of their position: each drawn from the histogram of the training codes there.

    What a generator has to be better than. Where positions were not counted apart, for they are too many, they are all
    drawn from one histogram.

    Args:
      generator: of which `data.source` must still be there.
      mesh: the devices that count.
      num: how many images.
      seed: of what is drawn.

    Returns:
      `[num, h, w]` int32.

    Raises:
      OSError, ValueError: the codes are not there, or they are others.
    """
    config = generator.config
    source: Any = open_source(config.data.source, training=True, of="codes")
    if source.description.tokenizer != generator.codes.tokenizer:
        raise ValueError(f"{config.data.source} holds codes of another tokenizer than those the generator learned")
    training, _ = hold_out(source, config.data.holdout)
    counts = evaluate.Evaluator(generator.structure, mesh).counts(codes_eval_batches(
        training, grid=(generator.grid, generator.grid), bad_images=BadImages(None), max_bad=config.data.max_bad,
        batch_size=generator.batch_size(config.eval.batch_size) // jax.process_count(), threads=config.data.threads,
        shard_index=jax.process_index(), shard_count=jax.process_count(), limit=RULER_IMAGES))
    drawn = np.random.default_rng(seed).random((num, generator.grid**2))
    ends = np.cumsum(counts, axis=1)
    positions = zip(drawn.T, itertools.cycle(ends))
    codes = np.stack([np.searchsorted(end, of_images * end[-1], side="right") for of_images, end in positions], axis=1)
    return codes.astype(np.int32).reshape(num, generator.grid, generator.grid)
