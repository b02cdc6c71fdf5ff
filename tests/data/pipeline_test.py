"""The input pipeline: what is read, in what order, and what a bad image costs."""

import errno
import gc
import hashlib
import io
import json
import math
import os
import pathlib
import pickle
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.conftest import REPOSITORY
from vqrae_jax.data import (
    ArrayRecordSource,
    BadImages,
    EmbeddedSource,
    FolderSource,
    TfdsSource,
    decode_image,
    eval_batches,
    faults,
    hold_out,
    open_parts,
    random_resized_crop,
    resize_and_center_crop,
    train_batches,
)
from vqrae_jax.data.records import serialize_example

SHARED = REPOSITORY.parent / "shared" / "data"
RED, GREEN, BLUE, GREY = (230, 20, 30), (10, 200, 40), (20, 30, 220), (100, 100, 100)


def quadrants(height: int = 32, width: int = 48) -> np.ndarray:
    """Red over green on the left, blue over grey on the right."""
    image = np.empty((height, width, 3), np.uint8)
    image[: height // 2, : width // 2], image[height // 2 :, : width // 2] = RED, GREEN
    image[: height // 2, width // 2 :], image[height // 2 :, width // 2 :] = BLUE, GREY
    return image


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colours(image: np.ndarray) -> np.ndarray:
    """The centres of the four quadrants: top left, bottom left, top right, bottom right."""
    height, width = image.shape[:2]
    return np.stack([image[y, x] for x in (width // 4, 3 * width // 4) for y in (height // 4, 3 * height // 4)])


def jpeg(colour=RED, size=(40, 30)) -> bytes:
    return encode(Image.new("RGB", size, colour), "JPEG", quality=95)


def noise(kind: str) -> bytes:
    return encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)), kind)


class Numbers:
    """Image i is the constant colour i, its label i."""

    def __init__(self, size: int, bad: tuple[int, ...] = ()):
        self.size, self.bad, self.num_classes = size, bad, size

    def __len__(self):
        return self.size

    def name(self, index):
        return f"number {index}"

    def __getitem__(self, index):
        from vqrae_jax.data import Record

        image = b"no image" if index in self.bad else np.full((9, 9, 3), index, np.uint8)
        return Record(image, index, self.name(index))


def training(source, bad_images=None, **changes):
    options = dict(image_size=16, batch_size=4, seed=3, crop_scale_min=0.3, flip=True, threads=2, workers=0,
                   max_bad=0.01)
    return train_batches(source, bad_images=bad_images or BadImages(None), **(options | changes))


def evaluation(source, bad_images=None, **changes):
    options = dict(image_size=8, batch_size=4, max_bad=0.01, threads=2)
    return eval_batches(source, bad_images=bad_images or BadImages(None), **(options | changes))


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


# Decoding


def test_lossless_formats_keep_every_pixel():
    image = quadrants()
    for kind, options in [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})]:
        np.testing.assert_array_equal(decode_image(encode(Image.fromarray(image), kind, **options)), image)


def test_cmyk_jpeg_is_not_inverted():
    decoded = decode_image(encode(Image.fromarray(quadrants()).convert("CMYK"), "JPEG", quality=95))
    np.testing.assert_allclose(colours(decoded).astype(int), [RED, GREEN, BLUE, GREY], atol=6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_grey_images(mode):
    ramp = np.array([[0, 60, 128, 255]], np.uint8)
    if mode == "I;16":
        image, expected = Image.fromarray(ramp.astype(np.uint16) * 257), ramp
    elif mode == "1":
        image, expected = Image.fromarray(ramp > 100), np.where(ramp > 100, 255, 0)
    else:
        image, expected = Image.fromarray(ramp).convert(mode), ramp
    for kind in ("PNG",) if mode == "LA" else ("PNG", "TIFF"):
        decoded = decode_image(encode(image, kind))
        assert decoded.dtype == np.uint8
        np.testing.assert_array_equal(decoded, np.repeat(expected[..., None], 3, axis=-1))


def test_16_bit_rgb_is_scaled_not_clipped():
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = b"\0" + np.array([[300, 30000, 65535], [0, 257, 514]], ">u2").tobytes()
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    png += chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(decode_image(png), [[[1, 117, 255], [0, 1, 2]]])


def test_transparent_pixels_become_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0] = (*RED, 255)
    rgba[1] = (0, 0, 0, 0)
    expected = np.array([[RED, RED], [(255,) * 3] * 2])
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(rgba), "PNG")), expected)
    palette = Image.fromarray(expected.astype(np.uint8)).quantize(2)
    index = palette.getpixel((0, 1))
    np.testing.assert_array_equal(decode_image(encode(palette, "PNG")), expected)
    palette.putpalette([0 if i // 3 == index else v for i, v in enumerate(palette.getpalette())])
    np.testing.assert_array_equal(decode_image(encode(palette, "PNG", transparency=index)), expected)


@pytest.mark.parametrize("orientation, rotate", [(3, 2), (6, 1), (8, 3)])
def test_exif_orientation_is_applied(orientation, rotate):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.rot90(quadrants(), rotate))  # what a camera held that way writes
    decoded = decode_image(encode(stored, "JPEG", quality=95, exif=exif.tobytes()))
    assert decoded.shape == (32, 48, 3)
    np.testing.assert_allclose(colours(decoded).astype(int), [RED, GREEN, BLUE, GREY], atol=6)


@pytest.mark.parametrize("data, says", [
    (b"", "empty"),
    (b"just some text", "unknown format"),
    (noise("JPEG")[:-200], "truncated"),
    (noise("JPEG")[:100], "not a readable image"),
    (noise("PNG")[:3000], "truncated"),
    (noise("PNG").replace(b"IDAT", b"IDXT"), "not a readable image"),
    (encode(Image.new("F", (2, 2)), "TIFF"), "float"),
    (np.zeros((4, 4), np.uint8), r"\[H, W, 3\]"),
])
def test_bad_data_is_a_one_line_value_error(data, says):
    with pytest.raises(ValueError, match=says) as error:
        decode_image(data)
    assert "\n" not in str(error.value)


def test_decompression_bombs_are_refused():
    bomb = encode(Image.new("1", (20000, 10000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(ValueError, match="200000000 pixels.*exceeds limit"):
        decode_image(bomb)


# Cropping


@pytest.mark.parametrize("shape", [(100, 67), (67, 100), (33, 64), (500, 64), (31, 37)])
def test_center_crop_is_resize_then_crop(shape):
    # Smooth and away from 0 and 255: Pillow rounds and clips after each axis, and which one comes first may differ.
    noise = Image.fromarray(np.random.default_rng(0).integers(50, 200, (12, 12, 3), np.uint8))
    image = np.asarray(noise.resize(shape[::-1], Image.Resampling.BICUBIC))
    height, width = (int(64 * side / min(shape)) for side in shape)
    whole = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    top, left = round((height - 64) / 2), round((width - 64) / 2)
    expected = whole[top : top + 64, left : left + 64].astype(int)
    np.testing.assert_allclose(resize_and_center_crop(image, size=64).astype(int), expected, atol=2)


def test_center_crop_edge_cases():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    np.testing.assert_array_equal(resize_and_center_crop(image, size=64), image)
    np.testing.assert_array_equal(resize_and_center_crop(image[:1, :1], size=8), np.tile(image[:1, :1], (8, 8, 1)))
    assert resize_and_center_crop(np.zeros((1, 50_000, 3), np.uint8), size=64).shape == (64, 64, 3)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 2), (40, 60), (600, 400)])
def test_random_crop_of_any_shape(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    crops = [random_resized_crop(image, np.random.default_rng(i), size=32, scale=(0.1, 1.0)) for i in range(20)]
    assert {crop.shape for crop in crops} == {(32, 32, 3)} and {crop.dtype for crop in crops} == {np.dtype(np.uint8)}


def test_random_crop_keeps_the_asked_share_of_the_area():
    rows = np.tile(np.arange(100, dtype=np.uint8)[:, None, None] * 2, (1, 100, 3))
    columns = rows.transpose(1, 0, 2)
    shares = []
    for seed in range(100):
        sides = []
        for image, axis in ((rows, 0), (columns, 1)):
            crop = random_resized_crop(image, np.random.default_rng(seed), size=50, scale=(0.25, 0.5))
            sides.append((int(crop.max(axis)[0, 0]) - int(crop.min(axis)[0, 0])) / 2 + 1)
        shares.append(sides[0] * sides[1] / 100**2)
    assert 0.2 < min(shares) < 0.3 and 0.45 < max(shares) < 0.55


def places(height: int, width: int) -> np.ndarray:
    """Red tells the column, green the row."""
    y, x = np.mgrid[:height, :width] + 0.5
    return np.stack([255 * x / width, 255 * y / height, np.full_like(x, 99)], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size, shrinks", [(400, {1}), (200, {1, 2}), (60, {2, 4, 8})])
def test_a_jpeg_is_decoded_as_finely_as_its_crop_needs(orientation, size, shrinks, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = places(701, 903)  # no multiple of 8
    data = encode(Image.fromarray(image), "JPEG", quality=95, subsampling=0, exif=exif.tobytes())
    whole, used = decode_image(data), set()
    resize = Image.Image.resize

    def watched(self, size, resample, box):
        shrink = round(whole.shape[1] / self.width)
        assert (self.width, self.height) == tuple(math.ceil(side / shrink) for side in whole.shape[1::-1])
        assert shrink == 1 or min(box[2] - box[0], box[3] - box[1]) >= 1.25 * size[0]
        used.add(shrink)
        return resize(self, size, resample, box)

    for seed in range(8):
        expected = random_resized_crop(whole, np.random.default_rng(seed), size=size, scale=(0.08, 1.0))
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "resize", watched)
            crop = random_resized_crop(data, np.random.default_rng(seed), size=size, scale=(0.08, 1.0))
        # A crop of everything that is shifted by a pixel of the result differs by 255 / size.
        tolerance = 0.6 if orientation == 1 else max(0.6, 0.4 * 255 / size)
        assert np.abs(crop.astype(float) - expected).mean(axis=(0, 1)).max() < tolerance
        if used == {1}:
            np.testing.assert_array_equal(crop, expected)
    assert used == shrinks


@pytest.mark.parametrize("name", ["hubble_deep_field.jpg", "retina.jpg"])
def test_decoding_fewer_frequencies_does_not_show(name):
    from vqrae_jax.data import sources

    data = encode(Image.fromarray(sources._photo(name)), "JPEG", quality=90)
    for seed in range(5):
        full = random_resized_crop(decode_image(data), np.random.default_rng(seed), size=256, scale=(0.8, 1.0))
        crop = random_resized_crop(data, np.random.default_rng(seed), size=256, scale=(0.8, 1.0))
        assert 0 < np.mean((crop.astype(float) - full) ** 2) < 255**2 / 10**3.8  # 38 dB


def test_crops_of_encoded_images_fail_as_decoding_does():
    big = encode(Image.fromarray(places(600, 600)), "JPEG")
    for data in (b"", b"just some text", big[:-300], noise("PNG")[:3000]):
        with pytest.raises(ValueError, match="not a readable image") as error:
            decode_image(data)
        with pytest.raises(ValueError) as same:
            random_resized_crop(data, np.random.default_rng(0), size=20)
        assert "bytes not processed" in str(error.value) or str(same.value) == str(error.value)
    with pytest.raises(ValueError, match=r"\[H, W, 3\]"):
        random_resized_crop(np.zeros((4, 4), np.uint8), np.random.default_rng(0), size=20)


# Sources


def test_embedded_splits_share_no_pixel(monkeypatch):
    from vqrae_jax.data import sources

    # Photographs whose pixels tell their column.
    width = 300
    coded = np.tile(np.arange(width)[None, :, None] * np.array([1, 0, 0]), (200, 1, 1))
    monkeypatch.setattr(sources, "_photo", lambda name: coded)
    used = {split: {int(column) for i in range(400) for column in np.unique(EmbeddedSource(split)[i].image[..., 0])}
            for split in ("train", "validation")}
    assert max(used["train"]) < min(used["validation"]) and len(used["train"]) > 150 and len(used["validation"]) > 90


def test_embedded_is_labelled_deterministic_and_needs_no_network():
    train, validation = EmbeddedSource("train"), EmbeddedSource("validation")
    assert (len(train), len(validation)) == (4096, 512)
    first = [train[i] for i in range(24)]
    assert [record.label for record in first] == list(range(train.num_classes)) * 3
    assert len({record.image.tobytes() for record in first}) == 24
    assert all(record.image.min() >= 0 and record.image.shape[0] >= 64 for record in first)
    copy = pickle.loads(pickle.dumps(train))
    np.testing.assert_array_equal(copy[11].image, train[11].image)
    with pytest.raises(ValueError, match="'test'"):
        EmbeddedSource("test")


def test_folder_labels_and_order(tmp_path):
    for name in ["b/2.PNG", "b/deep/1.jpeg", "a/x.webp", "a-b/x.tiff", "a/notes.txt", "a/._x.jpg", ".hidden/x.jpg"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg())
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    source = FolderSource(tmp_path)
    found = [(str(pathlib.Path(record.name).relative_to(tmp_path)), record.label) for record in source]
    assert found == [("a/x.webp", 0), ("a-b/x.tiff", 1), ("b/2.PNG", 2), ("b/deep/1.jpeg", 2)]
    assert source.num_classes == 3 and source.class_names == ["a", "a-b", "b"]
    (tmp_path / "top.jpg").write_bytes(jpeg())
    assert {record.label for record in FolderSource(tmp_path)} == {-1} and FolderSource(tmp_path).num_classes is None


def names_by_walk_and_sort(path) -> list[str]:
    """As it was done when all names were a list."""
    names, visited = [], set()
    for folder, subfolders, files in os.walk(path, followlinks=True):
        if os.path.realpath(folder) in visited:
            subfolders.clear()
            continue
        visited.add(os.path.realpath(folder))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        names += [os.path.relpath(os.path.join(folder, name), path) for name in files
                  if name.lower().endswith((".jpg", ".png")) and not name.startswith(".")]
    return sorted(names, key=lambda name: name.split(os.sep))


def test_folders_are_read_once_in_the_order_of_their_names_parts(tmp_path, monkeypatch):
    for name in ["b.jpg", "b/x.jpg", "b-c/x.jpg", "b/a.jpg", "b/a/1.png", "b/a-/2.png", "b/c.jpg", "b/.h/x.jpg",
                 "c.png", "a.jpg/in.png", "é/\udcff.jpg", "é/ü.jpg", "é/z.JPG", "é/text", "z/deep/er/x.png", "B/y.jpg"]:
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "w.jpg").write_bytes(b"")
    for link, target in [("aa", "elsewhere"), ("z/again", "elsewhere"), ("b/up", "root"), ("broken.jpg", "nowhere"),
                         ("linked.jpg", "root/c.png"), ("self", "root/self")]:
        (tmp_path / "root" / link).symlink_to(tmp_path / target)
    listed, scandir = [], os.scandir
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", lambda path: listed.append(os.path.realpath(path)) or scandir(path))
        source = FolderSource(tmp_path / "root")
    assert len(listed) == len(set(listed))
    expected = names_by_walk_and_sort(tmp_path / "root")
    assert list(source.local_names()) == expected and len(expected) == 17
    assert [source.name(i) for i in range(len(source))] == [str(tmp_path / "root" / name) for name in expected]


def test_workers_share_the_names_of_a_folder(tmp_path):
    write_images(tmp_path, 400)
    parts = open_parts(f"folder:{tmp_path}", holdout=0.1)
    assert len(pickle.dumps(parts)) < 3000  # where they are, not what they are
    before = os.listdir("/proc/self/fd")
    again = pickle.loads(pickle.dumps(parts))
    for part, copy in zip(parts, again, strict=True):
        assert [copy.name(i) for i in range(len(copy))] == [part.name(i) for i in range(len(part))]
    names = [parts[0].name(i) for i in range(5)]
    del parts, part  # the copies hold the memory
    assert [again[0].name(i) for i in range(5)] == names
    assert pickle.loads(pickle.dumps(again))[0].name(3) == names[3]
    del again, copy
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) < len(before)


def test_worker_processes_read_a_part_of_a_folder(tmp_path):
    write_images(tmp_path / "images", 40)
    part = open_parts(f"folder:{tmp_path / 'images'}", holdout=0.2)[0]
    expected = take(training(part), 3)
    batches = training(part, BadImages(tmp_path / "bad.jsonl"), workers=1, threads=0)
    assert_same(expected, take(batches, 3))
    batches.close()


def test_missing_data_says_what_to_do(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.array_record").write_text("no records")
    cases = [
        (lambda: FolderSource(tmp_path / "nowhere"), FileNotFoundError, "nowhere"),
        (lambda: FolderSource(tmp_path / "empty"), FileNotFoundError, r"no image.*\.webp"),
        (lambda: TfdsSource("cifar10", split="train", data_dir=tmp_path), FileNotFoundError, f"{tmp_path}.*tfds build"),
        (lambda: ArrayRecordSource(f"{tmp_path}/x-*"), FileNotFoundError, "x-"),
        (lambda: ArrayRecordSource(f"{tmp_path}/text*"), ValueError, "ArrayRecord"),
    ]
    for make, kind, says in cases:
        with pytest.raises(kind, match=says) as error:
            make()
        assert "\n" not in str(error.value)


def test_tfds_without_tensorflow():
    data_dir = SHARED / "tfds"
    if not (data_dir / "cifar10").exists():
        pytest.skip(f"no CIFAR-10 in {data_dir}")
    source = TfdsSource("cifar10", split="test", data_dir=data_dir)
    assert len(source) == 10_000 and source.num_classes == 10
    record = pickle.loads(pickle.dumps(source))[17]
    assert record.name == "cifar10/test/17" and record.label == 9 and isinstance(record.image, bytes)
    assert decode_image(record.image).shape == (32, 32, 3)
    assert "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match="'validation'.*'train', 'test'"):
        TfdsSource("cifar10", split="validation", data_dir=data_dir)


def write_array_record(path, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_array_record_of_examples_and_of_plain_images(tmp_path):
    from tensorflow_datasets.proto import tf_example_pb2

    def example(**features):
        proto = tf_example_pb2.Example()
        for key, value in features.items():
            feature = proto.features.feature[key.replace("__", "/")]
            if isinstance(value, bytes):
                feature.bytes_list.value.append(value)
            else:
                feature.int64_list.value.append(value)
        return proto.SerializeToString()

    write_array_record(tmp_path / "a.array_record", [example(image=jpeg(RED), label=7), jpeg(GREEN)])
    write_array_record(tmp_path / "b.array_record", [
        example(image__encoded=jpeg(BLUE), image__class__label=300), example(image=jpeg(GREY)), example(picture=b"x")])
    source = pickle.loads(pickle.dumps(ArrayRecordSource(f"{tmp_path}/*.array_record")))
    assert len(source) == 5
    records = [source[i] for i in range(4)]
    assert [record.label for record in records] == [7, -1, 300, -1]
    pixels = [decode_image(record.image)[5, 5].astype(int) for record in records]
    np.testing.assert_allclose(pixels, [RED, GREEN, BLUE, GREY], atol=4)
    with pytest.raises(ValueError, match="picture"):
        source[4]


def test_a_corrupt_array_record_costs_its_images_only(tmp_path):
    path = tmp_path / "x.array_record"
    write_array_record(path, [noise("PNG")] * 8)
    data = bytearray(path.read_bytes())
    data[20_000:20_100] = bytes(100)
    path.write_bytes(data)
    bad_images = BadImages(None)
    (batch,) = evaluation(ArrayRecordSource(str(path)), bad_images, image_size=50, batch_size=8)
    assert batch["valid"].sum() == 7
    (reason,) = bad_images.names().values()
    assert "corrupt record" in reason


# Held-out images


def write_images(folder, count) -> None:
    for i in range(count):
        (folder / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        (folder / f"class{i % 3}" / f"{i}.jpg").write_bytes(jpeg())


def local_names(part, folder) -> set[str]:
    return {os.path.relpath(part.name(i), folder) for i in range(len(part))}


def test_held_out_images_stay_held_out_when_files_are_added_and_the_folder_moves(tmp_path):
    write_images(tmp_path / "first", 300)
    training, held_out = open_parts(f"folder:{tmp_path / 'first'}", holdout=0.1)
    assert len(training) + len(held_out) == 300 and 10 < len(held_out) < 60
    assert training.num_classes == held_out.num_classes == 3
    assert held_out[0].name == held_out.name(0) and {held_out[i].label for i in range(len(held_out))} == {0, 1, 2}
    before = [local_names(part, tmp_path / "first") for part in (training, held_out)]
    assert not before[0] & before[1]
    (tmp_path / "first").rename(tmp_path / "second")
    write_images(tmp_path / "second", 400)
    parts = open_parts(f"folder:{tmp_path / 'second'}", holdout=0.1)
    after = [local_names(part, tmp_path / "second") for part in parts]
    assert before[0] < after[0] and before[1] < after[1]
    # Whoever holds out more keeps what was held out.
    assert after[1] < local_names(open_parts(f"folder:{tmp_path / 'second'}", holdout=0.3)[1], tmp_path / "second")


def test_held_out_records_stay_held_out_when_shards_are_added(tmp_path):
    def labels(part):
        return {part[i].label for i in range(len(part))}

    for shard in ("b", "c"):
        write_array_record(tmp_path / f"{shard}.array_record",
                           [serialize_example({"image": jpeg(), "label": ord(shard) * 1000 + i}) for i in range(100)])
    before = open_parts(f"array_record:{tmp_path}/*", holdout=0.1)
    assert len(before[0]) + len(before[1]) == 200 and 5 < len(before[1]) < 40
    write_array_record(tmp_path / "a.array_record",
                       [serialize_example({"image": jpeg(), "label": i}) for i in range(77)])
    after = open_parts(f"array_record:{tmp_path}/*", holdout=0.1)
    assert labels(before[0]) < labels(after[0]) and labels(before[1]) < labels(after[1])


@pytest.mark.parametrize("share", [0.07, 0.5])
def test_held_out_are_the_images_that_earlier_versions_held_out(tmp_path, share):
    for shard, count in (("a", 120), ("b", 1), ("c", 79)):
        write_array_record(tmp_path / f"{shard}.array_record", [jpeg()] * count)
    for source, folder in ((ArrayRecordSource(f"{tmp_path}/*"), f"{tmp_path}/"), (Numbers(200), "")):
        names = [source.name(i).removeprefix(folder) for i in range(200)]
        hashes = [hashlib.blake2b(name.encode(), digest_size=6).digest() for name in names]
        chosen = np.array([int.from_bytes(value, "big") / 2**48 < share for value in hashes])
        for part, expected in zip(hold_out(source, share), (~chosen, chosen), strict=True):
            assert [part.name(i).removeprefix(folder) for i in range(len(part))] == np.array(names)[expected].tolist()


def test_sources_with_a_held_out_part_of_their_own_keep_it():
    training, held_out = open_parts("embedded", holdout=0.1)
    assert (len(training), len(held_out)) == (4096, 512)
    assert training.name(0) == "embedded/train/0" and held_out.name(0) == "embedded/validation/0"


def test_of_a_tfds_set_its_own_split_is_held_out_and_of_a_named_split_a_part(shared_data):
    training, held_out = open_parts(f"tfds:cifar10@{shared_data / 'tfds'}", holdout=0.1)
    assert (training.name(0), held_out.name(0), len(held_out)) == ("cifar10/train/0", "cifar10/test/0", 10_000)
    training, held_out = open_parts(f"tfds:cifar10:test@{shared_data / 'tfds'}", holdout=0.1)
    assert len(training) + len(held_out) == 10_000 and 800 < len(held_out) < 1200


def test_parts_can_be_pickled_and_something_is_left_to_train_on():
    training, held_out = hold_out(Numbers(200), 0.2)
    again, held_out_again = pickle.loads(pickle.dumps((training, held_out)))
    assert [again.name(i) for i in range(len(again))] == [training.name(i) for i in range(len(training))]
    assert held_out_again[3].label == held_out[3].label
    for share in (0.0, 0.2):
        training, held_out = hold_out(Numbers(200), share)
        assert len(pickle.dumps(held_out)) < 4 * len(held_out) + 1000
    for seed in range(20):  # of some the only image would be held out
        one = Numbers(1)
        one.name = f"{seed} {{}}".format
        training, held_out = hold_out(one, 0.5)
        assert (len(training), len(held_out)) == (1, 0)


# Training


def test_every_epoch_is_a_new_permutation():
    labels = np.concatenate([batch["label"] for batch in take(training(Numbers(20)), 15)]).reshape(3, 20)
    assert [sorted(epoch) for epoch in labels.tolist()] == [list(range(20))] * 3
    assert not (labels[0] == labels[1]).all() and not (labels[1] == labels[2]).all()
    other_seed = np.concatenate([batch["label"] for batch in take(training(Numbers(20), seed=4), 5)])
    assert not (other_seed == labels).all(axis=1).any()


@pytest.mark.parametrize("size, batch_size", [(1, 1), (1, 4), (3, 8)])
def test_a_source_smaller_than_a_batch(size, batch_size):
    labels = np.concatenate([b["label"] for b in take(training(Numbers(size), batch_size=batch_size), 6)])
    assert len(labels) == 6 * batch_size and set(labels) == set(range(size))


def test_batches_have_the_promised_types_and_stay_the_same():
    source = EmbeddedSource("train")
    batches = take(training(source), 4)
    assert batches[0]["image"].shape == (4, 16, 16, 3) and batches[0]["image"].dtype == np.uint8
    assert batches[0]["label"].shape == (4,) and batches[0]["label"].dtype == np.int32
    assert_same(batches, take(training(source), 4))
    assert_same(batches, take(training(source, threads=0), 4))
    assert not np.array_equal(batches[0]["image"], next(training(source, seed=4))["image"])


def test_batches_are_read_ahead():
    class Watched(Numbers):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    def wait_for_reads(source, count):
        deadline = time.monotonic() + 20
        while source.reads < count:
            assert time.monotonic() < deadline, f"{source.reads} images read, not {count}"
            time.sleep(0.01)

    source = Watched(20)
    batches = training(source, threads=1)
    batches.start_prefetch()
    wait_for_reads(source, 8)  # two batches before any is asked for
    next(batches)
    wait_for_reads(source, 12)
    batches.close()


def test_the_global_batch_does_not_depend_on_the_number_of_shards():
    whole = take(training(Numbers(30), batch_size=6), 7)
    shards = [take(training(Numbers(30), batch_size=2, shard_index=i, shard_count=3), 7) for i in range(3)]
    joined = [{key: np.concatenate([shard[n][key] for shard in shards]) for key in whole[n]} for n in range(7)]
    assert_same(whole, joined)


def test_worker_processes_change_nothing(tmp_path):
    source = Numbers(20, bad=(3, 4))
    expected = take(training(source), 12)
    bad_images = BadImages(tmp_path / "bad.jsonl")
    batches = training(source, bad_images, workers=2, threads=1)
    assert_same(expected[:3], take(batches, 3))
    state = batches.get_state()
    batches.close()
    assert set(bad_images.names()) == {"number 3", "number 4"}  # found in other processes
    batches = training(source, bad_images, workers=2, threads=0)
    batches.set_state(state)
    assert_same(expected[3:12], take(batches, 9))
    batches.close()
    with pytest.raises(ValueError, match="path"):
        training(source, workers=1)


def test_a_new_process_continues_exactly(tmp_path):
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")
    batches = training(FolderSource(tmp_path / "images"))
    assert batches.get_state() == {"next_batch": 0}
    take(batches, 5)
    state = json.dumps(batches.get_state())
    expected = take(batches, 6)  # into the next epochs
    program = f"""if True:
        import json, numpy as np
        from vqrae_jax.data import BadImages, FolderSource, train_batches
        batches = train_batches(FolderSource({str(tmp_path / "images")!r}), image_size=16, batch_size=4, seed=3,
                                crop_scale_min=0.3, flip=True, threads=1, workers=0, max_bad=0.01,
                                bad_images=BadImages(None))
        batches.set_state(json.loads({state!r}))
        batches = [next(batches) for _ in range(6)]
        np.savez({str(tmp_path / "out.npz")!r}, **{{k: np.stack([b[k] for b in batches]) for k in batches[0]}})
    """
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)
    continued = np.load(tmp_path / "out.npz")
    assert_same(expected, [{key: continued[key][n] for key in continued} for n in range(6)])
    batches.set_state(json.loads(state))  # and back, in place
    assert_same(expected, take(batches, 6))


def test_a_program_that_never_closes_its_workers_ends_quietly(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(f"""if __name__ == "__main__":
        from vqrae_jax.data import BadImages, EmbeddedSource, train_batches
        batches = train_batches(EmbeddedSource("train"), image_size=16, batch_size=4, seed=3, crop_scale_min=0.3,
                                flip=True, threads=1, workers=1, max_bad=0.01,
                                bad_images=BadImages({str(tmp_path / "bad")!r}))
        next(batches)
    """)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr


def test_iterator_is_checkpointed_by_grains_own_handler(tmp_path):
    import grain
    from etils import epath

    batches = training(Numbers(20))
    take(batches, 3)
    handler = grain.checkpoint.CheckpointHandler()
    handler.save(epath.Path(tmp_path), batches)
    restored = handler.restore(epath.Path(tmp_path), training(Numbers(20)))
    assert_same(take(batches, 3), take(restored, 3))


# Bad images


def folder_with_bad_images(path) -> dict[str, str]:
    """Six good images among three bad ones; returns the bad names and a word of the reason for each."""
    rotated = Image.Exif()
    rotated[0x0112] = 6
    files = {
        "a_good.jpg": jpeg(RED),
        "b_text.jpg": b"this is a text file",
        "c_rotated.jpg": encode(Image.fromarray(np.rot90(quadrants(), 1)), "JPEG", quality=95, exif=rotated.tobytes()),
        "d_truncated.jpeg": noise("JPEG")[:-200],
        "e_one_pixel.png": encode(Image.new("RGB", (1, 1), BLUE), "PNG"),
        "f_grey.jpg": encode(Image.new("L", (50, 20), 77), "JPEG"),
        "g_cmyk.jpg": encode(Image.new("RGB", (20, 50), GREEN).convert("CMYK"), "JPEG"),
        "h_empty.png": b"",
        "i_palette.png": encode(Image.new("RGB", (20, 20), GREY).quantize(4), "PNG"),
    }
    for name, data in files.items():
        (path / name).write_bytes(data)
    return {"b_text.jpg": "unknown", "d_truncated.jpeg": "truncated", "h_empty.png": "empty"}


def test_evaluation_skips_and_names_bad_images(tmp_path):
    expected = folder_with_bad_images(tmp_path)
    bad_images = BadImages(None)
    batches = list(evaluation(FolderSource(tmp_path), bad_images, image_size=32))
    images, valid, index = (np.concatenate([b[key] for b in batches]) for key in ("image", "valid", "index"))
    assert images.shape == (12, 32, 32, 3)
    assert index.tolist() == [*range(9), -1, -1, -1]
    assert index[valid].tolist() == [0, 2, 4, 5, 6, 8]
    for position, colour in [(0, RED), (4, BLUE), (5, (77,) * 3), (6, GREEN), (8, GREY)]:
        np.testing.assert_allclose(images[position, 16, 16].astype(int), colour, atol=6)
    np.testing.assert_allclose(colours(images[2]).astype(int), [RED, GREEN, BLUE, GREY], atol=6)
    assert len(bad_images.names()) == 3
    for name, reason in bad_images.names().items():
        assert expected[pathlib.Path(name).name] in reason


def test_training_replaces_and_counts_bad_images(tmp_path):
    names = set(folder_with_bad_images(tmp_path))
    bad_images = BadImages(None)
    take(training(FolderSource(tmp_path), bad_images), 9)
    assert {pathlib.Path(name).name for name in bad_images.names()} == names
    labels = np.concatenate([b["label"] for b in take(training(Numbers(20, bad=(0, 5, 19))), 50)])
    assert set(labels) == set(range(20)) - {0, 5, 19}


def test_noting_bad_images_leaves_no_file_open(tmp_path):
    bad_images = BadImages(tmp_path / "bad_images.jsonl")
    bad_images.record(name="first", reason="bad")
    before = os.listdir("/proc/self/fd")
    for i in range(20):
        bad_images.record(name=str(i), reason="bad")
    assert len(os.listdir("/proc/self/fd")) <= len(before) + 1  # other threads may hold one
    assert len(bad_images.names()) == 21


def test_a_file_that_vanished_is_a_bad_image(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(jpeg())
    source = FolderSource(tmp_path)
    (tmp_path / "b.jpg").unlink()
    bad_images = BadImages(None)
    take(training(source, bad_images), 2)
    assert [pathlib.Path(name).name for name in bad_images.names()] == ["b.jpg"]


def test_bad_images_survive_the_process_and_are_named_once(tmp_path):
    path = tmp_path / "bad.jsonl"
    first, second = BadImages(path), BadImages(path)
    first.record(name="a\tb\n\udcff.jpg", reason="truncated")
    first.record(name="a\tb\n\udcff.jpg", reason="truncated")
    second.record(name="a\tb\n\udcff.jpg", reason="again")
    second.record(name="c", reason="text")
    with path.open("a") as file:
        file.write('{"name": "killed whi')
    expected = {"a\tb\n\udcff.jpg": "truncated", "c": "text"}
    assert first.names() == second.names() == BadImages(path).names() == expected
    third = BadImages(path)
    third.record(name="c", reason="text")
    assert len(path.read_text().splitlines()) == 4 and third.names() == expected


@pytest.mark.parametrize("make", [training, evaluation])
def test_only_bad_images_end_in_an_error(make):
    with pytest.raises(ValueError, match="none of the 3 images.*number 0: not a readable image") as error:
        for _ in make(Numbers(3, bad=(0, 1, 2))):
            pass
    assert "\n" not in str(error.value)


# Too many bad images


@pytest.mark.parametrize("make", [training, evaluation])
def test_more_bad_images_than_allowed_stop_the_run(make, tmp_path):
    source = Numbers(100, bad=tuple(range(0, 100, 4)))
    bad_images = BadImages(tmp_path / "bad_images.jsonl")
    with pytest.raises(ValueError, match=rf"[4-9] of \d+ images .* number \d+: not a readable image: unknown format; "
                       rf"{tmp_path}/bad_images.jsonl names .* than 0.01 .*--config.data.max_bad=") as error:
        take(iter(make(source, bad_images)), 25)
    assert "\n" not in str(error.value)
    take(iter(make(source, max_bad=0.5)), 25)


def test_a_few_bad_images_are_tolerated_however_often_they_are_met():
    take(training(Numbers(20, bad=(0, 5, 19))), 50)
    list(evaluation(Numbers(20, bad=(0, 5, 19))))
    many = Numbers(200, bad=(0, 50, 100, 150))
    with pytest.raises(ValueError, match=r"4 of \d+ images"):
        take(training(many), 150)
    take(training(many, max_bad=0.05), 300)  # each counts once, whatever the epoch


def test_where_all_are_bad_not_all_are_tried():
    source = Numbers(10_000, bad=tuple(range(10_000)))
    bad_images = BadImages(None)
    with pytest.raises(ValueError, match="101 of 10000 images cannot be read"):
        next(training(source, bad_images, threads=0, batch_size=1))
    assert len(bad_images.names()) <= 102


# Faults of the machine


class Failing(Numbers):
    """Reading image 3 fails so many times."""

    def __init__(self, size, error, times):
        super().__init__(size)
        self.error, self.times = error, times

    def __getitem__(self, index):
        if index == 3 and self.times:
            self.times -= 1
            raise self.error
        return super().__getitem__(index)

    def __setstate__(self, state):  # in a worker process
        faults.RETRY_AFTER_SECONDS = (0, 0)
        self.__dict__.update(state)


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(faults, "RETRY_AFTER_SECONDS", (0, 0))


FAULTS = [OSError(getattr(errno, name), os.strerror(getattr(errno, name))) for name in (
    "EMFILE", "ENFILE", "EIO", "ESTALE", "EACCES", "EPERM", "ETIMEDOUT", "ENOMEM", "ECONNRESET")]


@pytest.mark.parametrize("fault", [*FAULTS, MemoryError(), TimeoutError("too late")], ids=repr)
def test_a_fault_of_the_machine_is_tried_again_and_then_ends_the_run(fault, no_pauses):
    expected = take(training(Numbers(8)), 8)
    bad_images = BadImages(None)
    assert_same(expected, take(training(Failing(8, fault, times=2), bad_images), 8))
    assert all(batch["valid"].all() for batch in evaluation(Failing(8, fault, times=2), bad_images))
    for make in (training, evaluation):
        with pytest.raises(OSError, match="^cannot read number 3: .*; that is no fault of the image: ") as error:
            take(iter(make(Failing(8, fault, times=-1), bad_images)), 2)
        assert "\n" not in str(error.value)
    assert not bad_images.names()


def test_a_fault_in_a_worker_process_ends_the_run_in_the_same_line(tmp_path):
    source = Failing(8, OSError(errno.EIO, os.strerror(errno.EIO)), times=-1)
    batches = training(source, BadImages(tmp_path / "bad.jsonl"), workers=1, threads=1)
    with pytest.raises(OSError, match="^cannot read number 3: Input/output error; that is no fault of the image: look"):
        take(batches, 2)
    batches.close()
    assert not (tmp_path / "bad.jsonl").exists()


@pytest.fixture
def shards(tmp_path) -> str:
    for i in range(40):
        write_array_record(tmp_path / f"{i:02}.array_record", [serialize_example({"image": jpeg(), "label": i})])
    return f"{tmp_path}/*.array_record"


@pytest.fixture
def few_descriptors():
    """Twenty more than are open; a function that sets this anew."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_more_shards_than_descriptors_are_no_bad_images(shards, few_descriptors, no_pauses):
    source, bad_images = ArrayRecordSource(shards), BadImages(None)
    few_descriptors()
    with pytest.raises(OSError, match=r"cannot read .*/\d\d.array_record/0: .*Too many open files.*\(ulimit -n\)"):
        list(evaluation(source, bad_images))
    assert not bad_images.names()


@pytest.mark.parametrize("kind", ["array_record", "folder"])
def test_as_many_files_may_be_open_as_the_system_allows(kind, shards, tmp_path, few_descriptors):
    (tmp_path / "x.jpg").write_bytes(jpeg())
    few_descriptors()
    open_parts(f"array_record:{shards}" if kind == "array_record" else f"folder:{tmp_path}", holdout=0.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == hard


def test_a_shard_that_vanished_is_bad_images(shards, tmp_path):
    source, bad_images = ArrayRecordSource(shards), BadImages(None)
    (tmp_path / "07.array_record").unlink()
    assert sum(batch["valid"].sum() for batch in evaluation(source, bad_images)) == 39
    assert list(bad_images.names()) == [f"{tmp_path}/07.array_record/0"]


# Evaluation


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("size, limit", [(10, None), (12, None), (20, 7), (1, None), (5, 100)])
def test_evaluation_covers_each_image_exactly_once(shards, size, limit):
    parts = [list(evaluation(Numbers(size), limit=limit, shard_index=i, shard_count=shards)) for i in range(shards)]
    assert len({len(part) for part in parts}) == 1
    assert {batch["image"].shape for part in parts for batch in part} == {(4, 8, 8, 3)}
    in_order = [batch for group in zip(*parts, strict=True) for batch in group]
    joined = {key: np.concatenate([batch[key] for batch in in_order]) for key in in_order[0]}
    expected = list(range(size))
    if (size, limit) == (20, 7):
        expected = joined["index"][joined["valid"]].tolist()
        assert len(set(expected)) == 7
        assert expected == sorted(expected)
        assert max(expected) > 12  # spread over the source, not its beginning
    assert joined["index"][joined["valid"]].tolist() == expected
    assert joined["label"][joined["valid"]].tolist() == expected
    assert joined["image"][joined["valid"]][:, 0, 0, 0].tolist() == expected
    assert (joined["index"][~joined["valid"]] == -1).all() and (joined["label"][~joined["valid"]] == -1).all()


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="no images"):
        training(Numbers(0))
    with pytest.raises(ValueError, match="crop_scale_min.*0"):
        training(Numbers(2), crop_scale_min=0.0)
    with pytest.raises(ValueError, match="shard_index 3"):
        training(Numbers(2), shard_index=3, shard_count=3)
    with pytest.raises(ValueError, match="limit"):
        evaluation(Numbers(2), limit=0)
