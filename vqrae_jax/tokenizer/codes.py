"""A data set as codes, and codes as images: what the commands `tokenize` and `detokenize` do."""

import dataclasses
import functools
import itertools
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vqrae_jax import config as config_lib
from vqrae_jax.data import (
    VIEWS,
    BadImages,
    CodesRecord,
    CodesSource,
    Source,
    codes,
    fingerprint,
    open_source,
    views_batches,
)
from vqrae_jax.data.codes import Description
from vqrae_jax.data.records import load_examples, report_path
from vqrae_jax.files import disk_errors, wait_for
from vqrae_jax.models import flat
from vqrae_jax.models.flat import Arrays
from vqrae_jax.tokenizer import recipe, runs
from vqrae_jax.tokenizer.inference import decode_codes, encode_codes
from vqrae_jax.tokenizer.runs import Weights
from vqrae_jax.training import distributed, reporting, sharding
from vqrae_jax.weights import tensors

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Encode = Callable[[np.ndarray], jax.Array]


def tokenize(workdir: str | os.PathLike, data: str, out: str | os.PathLike, *, views: int, weights: Weights,
             batch_size: int, shard_size: int, max_bad: float | None) -> Description:
    """Makes a folder of codes, `data.codes`, of all images of a data set, or goes on with it.

    The images of a shard are encoded in the same batches whatever was done before, on every device as many at once, and
    every shard appears as a whole. So the folder ends with the same bytes after any interruptions and for any number of
    devices and processes of one kind. Of several processes each makes other shards, on its own devices.

    Args:
      workdir: the tokenizer's run, as `runs.load_run` takes it.
      data: SPEC of the images; where it names no split, those to train on.
      out: the folder.
      views: of each image, one of `data.VIEWS`: 1 is the centre, 2 are it and its mirror image, 10 are
        `data.ten_crops`.
      weights: as for `runs.load_run`.
      batch_size: views that a device encodes at once, rounded down to whole images, but one at least; 0 is the run's
        `eval.batch_size`.
      shard_size: images of a file, rounded up to whole batches of a device.
      max_bad: greatest share of images that may be unreadable; None is the run's `data.max_bad`.

    Raises:
      ValueError: other `views`; the model has no codes, too many images or all are bad, or the folder has other codes.
      OSError: a run, data, or the folder cannot be read or written.
    """
    if views not in VIEWS:
        raise ValueError(f"views must be {' or '.join(map(str, VIEWS))}, not {views}")
    workdir, out = Path(workdir), Path(out)
    mesh = sharding.make_mesh(config_lib.Mesh(), jax.local_devices())
    config, graphdef, arrays = runs.load_run(workdir, mesh, weights=weights)
    model = flat.merge(graphdef, arrays)
    if model.quantizer.num_codes == 1:
        raise ValueError(f"the model of {workdir} has no codes: its latents are continuous")
    batch_size = batch_size or config.eval.batch_size
    images = max(1, batch_size // views)
    source = open_source(data, training=True)
    digest = runs.digest(arrays)
    made = recipe.recipe(
        config, data=data, part="all", images=len(source), reference="none", weights={str(workdir): digest},
        options={"views": views, "batch_size": batch_size}, run_weights=weights,
        configs={str(workdir): tensors.sha256(runs.folder(workdir) / "config.json")})
    made |= {"pixels": "8 bits", "crop": VIEWS[views].crop}
    planned = Description(
        data=data, source=fingerprint(source), num_classes=source.num_classes, tokenizer=digest, weights=weights,
        codebook_size=model.quantizer.num_codes, grid=(model.encoder.grid,) * 2, image_size=config.data.image_size,
        views=views, batch_size=batch_size, shard_size=-(-shard_size // images) * images, recipe=made)
    with disk_errors(out):
        if distributed.is_first():
            codes.begin(out, planned)
        distributed.wait_for_all("begin")
        wait_for([out / codes.DESCRIPTION])
        if not (out / codes.DESCRIPTION).exists():
            raise OSError(f"{out} is not the same folder for all processes: put it on a file system that they share")
        begun = codes.begin(out, planned)
    shards = begun.shards(out)
    mine = range(jax.process_index(), len(shards), jax.process_count())
    whole = codes.whole_shards(shards[number] for number in mine)
    missing = [number for number, there in zip(mine, whole, strict=True) if not there]
    if missing:
        max_bad = config.data.max_bad if max_bad is None else max_bad
        with disk_errors(out):
            write_shards(encoder(mesh, graphdef, arrays), source, begun, out, missing, batch_size=images * mesh.size,
                         max_bad=max_bad, threads=config.data.threads)
    # By looking, for what waits in XLA for others gives up after a while.
    while not all(shard.exists() for shard in shards):
        time.sleep(1)
    wait_for(list(map(report_path, shards)))  # written before the shards, but not always seen before them
    with disk_errors(out):
        if distributed.is_first():
            codes.end(out, begun)
        distributed.wait_for_all("end")
    while (complete := codes.read_description(out)).records is None:  # the first process has written it
        time.sleep(1)
    if not complete.records:
        raise ValueError(f"none of the {len(source)} images of {data} can be read: {out}/*.jsonl say why")
    return complete


def encoder(mesh: Mesh, graphdef: nnx.GraphDef, arrays: Arrays) -> Encode:
    """A tokenizer's encoder, compiled for a mesh: uint8 images `[B, S, S, 3]` to codes `[B, h, w]` int32."""
    encode = jax.jit(sharding.on(mesh, functools.partial(encode_codes, graphdef)))
    return lambda images: encode(arrays, sharding.put_batch(mesh, images))


def write_shards(encode: Encode, source: Source, begun: Description, out: Path, numbers: Sequence[int], *,
                 batch_size: int, max_bad: float, threads: int) -> None:
    """Makes some shards of a folder that was begun: reads images, encodes them, writes their codes, all at once.

    Args:
      encode: see `encoder`.
      source: of the images.
      begun: the folder's description.
      out: the folder.
      numbers: of the shards, ascending.
      batch_size: images at once, with all their views.
      max_bad, threads: as for `data.views_batches`.

    Raises:
      ValueError, OSError: images cannot be read, or shards cannot be written.
    """
    load_examples()  # before the threads
    shards, encoded = begun.shards(out), _encoded(encode, source, begun, numbers, batch_size=batch_size,
                                                  max_bad=max_bad, threads=threads)
    with ThreadPoolExecutor(1) as pool:  # the devices do not wait for the disk
        writing = None
        for number, group in itertools.groupby(encoded, key=lambda row: row[0] // begun.shard_size):
            images = [image for _, image in group]
            if writing:
                writing.result()
            writing = pool.submit(codes.write_shard, shards[number], images)
        if writing:
            writing.result()


def _encoded(encode: Encode, source: Source, begun: Description, numbers: Sequence[int], *, batch_size: int,
             max_bad: float, threads: int) -> Iterator[tuple[int, CodesRecord | codes.LeftOut]]:
    """The place of every image of some shards, in order, and what becomes of it."""
    ends = [min(len(source), (number + 1) * begun.shard_size) for number in numbers]
    indices = np.concatenate([np.arange(number * begun.shard_size, end)
                              for number, end in zip(numbers, ends, strict=True)])
    bad_images = BadImages(None)
    batches = views_batches(source, indices, image_size=begun.image_size, views=begun.views, batch_size=batch_size,
                            bad_images=bad_images, max_bad=max_bad, threads=threads)

    def begin(batch: dict[str, np.ndarray]) -> jax.Array:
        pixels = batch.pop("image")
        return encode(pixels.reshape(-1, *pixels.shape[2:]))

    for batch, made in reporting.shown(_ahead(batches, begin), of=len(indices),
                                       size=lambda item: len(item[0]["index"])):
        made = np.asarray(made).astype(begun.dtype).reshape(-1, begun.views, *begun.grid)
        reasons = {} if batch["valid"].all() else bad_images.names()
        for row in np.flatnonzero(batch["index"] >= 0):
            index = int(batch["index"][row])
            name = source.name(index)
            yield index, (CodesRecord(made[row], int(batch["label"][row]), name, batch["caption"][row])
                          if batch["valid"][row] else codes.LeftOut(name, reasons[name]))


def detokenize(workdir: str | os.PathLike, folder: str | os.PathLike, out: str | os.PathLike, *,
               batch_size: int) -> int:
    """Makes PNG files of a folder of codes, or goes on with that.

    They are `NUMBER_NAME.png`, by the place of the record and the last part of the image's name, or
    `NUMBER_NAME_viewN.png` where there are several. Their pixels are those that `Tokenizer.reconstruct` gives of the
    same views, as many at once as `batch_size` says, rounded to 8 bits: of other numbers XLA adds up in another order,
    and where a value is halfway, which is rare, it is rounded to the other side.

    Args:
      workdir: the run of the tokenizer that made the codes.
      folder: of the codes.
      out: the folder of the images.
      batch_size: images that a device decodes at once; 0 is what it encoded at once.

    Returns:
      how many images there are.

    Raises:
      ValueError: the codes are of another tokenizer, or damaged; or `out` has images of others.
      OSError: a folder cannot be read or written.
    """
    workdir, out, source = Path(workdir), Path(out), CodesSource(folder)
    description = source.description
    mesh = sharding.make_mesh(config_lib.Mesh())
    _, graphdef, arrays = runs.load_run(workdir, mesh, weights=description.weights)
    if runs.digest(arrays) != description.tokenizer:
        raise ValueError(f"the codes of {folder} are of another tokenizer than that of {workdir}, or it was trained on "
                         f"since: give the run with the weights whose sha256 is {description.tokenizer[:16]}...")
    batch_size = batch_size or description.batch_size
    with disk_errors(out):
        codes.begin(out, dataclasses.replace(description, batch_size=batch_size))
    decode = jax.jit(sharding.on(mesh, functools.partial(decode_codes, graphdef)))
    every = batch_size * mesh.size

    def begin(batch: list[tuple[Path, np.ndarray]]) -> jax.Array:
        grids = np.zeros((every, *description.grid), np.int32)
        grids[:len(batch)] = [grid for _, grid in batch]
        return decode(arrays, sharding.put_batch(mesh, grids))

    batches = _batched(_files(source, out), every)
    missing = (batch for batch in batches if not all(file.exists() for file, _ in batch))
    images = description.views * len(source)
    with ThreadPoolExecutor() as pool:
        for batch, made in reporting.shown(_ahead(missing, begin), of=images, size=lambda item: len(item[0])):
            pictures = reporting.to_8_bits(np.asarray(made)[:len(batch)])
            with disk_errors(out):
                list(pool.map(reporting.save_png, [file for file, _ in batch], pictures))
    return images


def _files(source: CodesSource, out: Path) -> Iterator[tuple[Path, np.ndarray]]:
    """Where the image of every view goes, and its codes."""
    for index in range(len(source)):
        record = source[index]
        stem = f"{index:08d}_{re.sub('[^A-Za-z0-9._-]', '_', Path(record.name).stem)[:100]}"
        for view, grid in enumerate(record.codes):
            yield out / (f"{stem}.png" if len(record.codes) == 1 else f"{stem}_view{view}.png"), grid


def _batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _ahead(batches: Iterable[Item], begin: Callable[[Item], jax.Array]) -> Iterator[tuple[Item, jax.Array]]:
    """Batches with what devices make of them, of which a next one is always begun before one is waited for."""
    before = None
    for batch in batches:
        begun = batch, begin(batch)
        if before:
            yield before
        before = begun
    if before:
        yield before
