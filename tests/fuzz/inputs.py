"""Hostile input of each kind: what is good, changed in a way or two. Bytes, folders, values and text; no files yet."""

import copy
import dataclasses
import functools
import gzip
import io
import itertools
import json
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save

from tests import conftest
from tests.conftest import REFERENCE
from tests.generator import tiny
from vqrae_jax import config as config_lib
from vqrae_jax.data import CodesRecord, codes
from vqrae_jax.data.records import serialize_example, written

Files = dict[str, bytes]
SPECIAL = [
    0,
    1,
    -1,
    2,
    3,
    7,
    127,
    128,
    255,
    256,
    2**15,
    2**16,
    2**20,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**48,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    10**400,
    -(2**31),
    -(2**63),
]
TEXTS = [
    "",
    " ",
    "\0",
    "a\nb",
    "nano",
    "../..",
    "/dev/zero",
    "~",
    "é" * 40,
    "\ud800",
    "1e999",
    "NaN",
    "None",
    "x" * 5000,
    "(" * 200,
    "[0-9",
    "codes:.",
    "folder:.",
    "tfds:x",
    "array_record:*",
    "embedded",
    ":",
    "%s%n",
    "{}",
]

numbers = st.sampled_from(SPECIAL) | st.integers(-10, 300) | st.floats()
scalars = st.none() | st.booleans() | numbers | st.sampled_from(TEXTS) | st.text(max_size=8)
anything = (
    st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
        max_leaves=6,
    )
    | st.just([[[[[]]]]])
    | st.builds(lambda value, times: [value] * times, scalars, st.sampled_from([2, 3, 1000]))
)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Bytes as a disk, a network or somebody who means it leaves them."""
    data, size = bytearray(content), len(content)
    place = lambda: draw(st.integers(0, max(0, size - 1)) | st.integers(0, min(64, max(0, size - 1))))
    how = draw(
        st.sampled_from(
            ["bits", "bits", "number", "number", "cut", "empty", "zeros", "remove", "repeat", "append", "other"]
        )
    )
    if how == "bits" and data:
        for _ in range(draw(st.integers(1, 8))):
            data[place()] ^= 1 << draw(st.integers(0, 7))
    elif how == "number":
        width = draw(st.sampled_from([2, 4, 8]))
        number = draw(st.sampled_from(SPECIAL)) % (1 << 8 * width)
        at = place()
        data[at : at + width] = number.to_bytes(width, draw(st.sampled_from(["little", "big"])))
    elif how == "cut":
        del data[place() :]
    elif how == "empty":
        data.clear()
    elif how == "zeros":
        at = place()
        data[at : at + draw(st.sampled_from([1, 16, 512, 4096]))] = bytes(16)
    elif how == "remove":
        at = place()
        del data[at : at + draw(st.sampled_from([1, 4, 100]))]
    elif how == "repeat":
        at = place()
        data[at:at] = data[at : at + draw(st.sampled_from([1, 16, 1000]))]
    elif how == "append":
        data += draw(st.binary(min_size=1, max_size=64))
    elif how == "other":
        return draw(st.binary(max_size=64))
    return bytes(data)


@st.composite
def changed(draw, value: Any) -> Any:
    """JSON, or the values of a config, with one or two entries replaced, removed, added, or put elsewhere."""
    value = copy.deepcopy(value)
    fresh = lambda: copy.deepcopy(draw(anything))  # one that stands in two places could be put into itself
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        places = list(_places(value))
        if not places or draw(st.integers(0, 39)) == 0:
            return fresh()
        holder, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["scalar", "scalar", "anything", "remove", "add", "number", "nested"]))
        if how == "scalar":
            holder[key] = draw(scalars)
        elif how == "anything":
            holder[key] = fresh()
        elif how == "number":
            holder[key] = draw(numbers)
        elif how == "remove":
            del holder[key]
        elif how == "nested":
            holder[key] = draw(st.sampled_from([lambda x: [x], lambda x: {"a": x}, str]))(holder[key])
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=8) | st.just("name"))] = fresh()
        else:
            holder.append(fresh())
    return value


def _places(value: Any):
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from _places(entry)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


@st.composite
def damaged_file(draw, name: str, content: bytes) -> bytes:
    """As the kind of file suggests, or as bytes."""
    if draw(st.integers(0, 5)):
        if name.endswith(".json"):
            return as_json(draw(changed(json.loads(content))))
        if name.endswith(".jsonl") and content:
            lines = content.splitlines()
            at = draw(st.integers(0, len(lines) - 1))
            lines[at] = as_json(draw(changed(json.loads(lines[at]))))
            return b"\n".join(lines) + b"\n"
        if name.endswith(".safetensors"):
            return draw(safetensors_header(content))
    return draw(damaged(content))


@st.composite
def damaged_files(draw, files: Files) -> Files:
    """A folder of which one file, sometimes two, is damaged or missing."""
    files = dict(files)
    for name in draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=2, unique=True)):
        if name in files and draw(st.integers(0, 19)) == 0:
            del files[name]
        elif name in files:
            files[name] = draw(damaged_file(name, files[name]))
    return files


@st.composite
def safetensors_header(draw, content: bytes) -> bytes:
    size = struct.unpack("<Q", content[:8])[0]
    header = draw(changed(json.loads(content[8 : 8 + size])))
    encoded = draw(st.sampled_from([as_json(header), as_json(header) + b" " * 8, b"[" * 3000]))
    length = draw(st.just(len(encoded)) | st.sampled_from([0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1]))
    return struct.pack("<Q", length) + encoded + content[8 + size :]


def folder_files(folder: Path, *names: str) -> Files:
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


# Images

_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")
_FORMATS = {
    "JPEG": {},
    "PNG": {},
    "WEBP": {},
    "BMP": {},
    "TIFF": {},
    "GIF": {},
    "PPM": {},
    "ICO": {},
    "TGA": {},
    "PCX": {},
    "JPEG2000": {},
    "SGI": {},
    "AVIF": {},
    "DDS": {},
}


def _in_mode(mode: str, size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(len(mode)).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    if mode == "LAB":
        return Image.frombytes("LAB", size, pixels.tobytes())
    for via in ((), ("L",), ("RGBA",), ("LA",), ("P",)):
        try:
            found = image
            for step in (*via, mode):
                found = found.convert(step)
            return found
        except ValueError:
            continue
    raise ValueError(mode)


@functools.cache
def good_images() -> dict[str, bytes]:
    """By name; every format in every mode that it has, and what formats have besides."""
    found = {}

    def add(name: str, image: Image.Image, kind: str, **options) -> None:
        buffer = io.BytesIO()
        try:
            image.save(buffer, kind, **options)
        except (OSError, ValueError, KeyError, TypeError):
            return  # no such mode
        found[name] = buffer.getvalue()

    for kind in _FORMATS:
        for mode in _MODES:
            for size in ((13, 7), (64, 48)):
                with_mode = _in_mode(mode, size)
                add(f"{kind} {mode} {size}", with_mode, kind)
    rgb, small = _in_mode("RGB", (40, 30)), _in_mode("P", (9, 9))
    for compression in ("tiff_lzw", "tiff_deflate", "group4", "jpeg", "packbits", "tiff_adobe_deflate", "zstd"):
        add(
            f"TIFF {compression}", rgb.convert("1") if compression == "group4" else rgb, "TIFF", compression=compression
        )
    frames = [_in_mode("RGB", (16, 16)), _in_mode("RGB", (16, 16)).rotate(90)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "AVIF"):
        add(f"{kind} animated", frames[0], kind, save_all=True, append_images=frames[1:])
    add("PNG transparent palette", small, "PNG", transparency=3)
    add("PNG transparent grey", small.convert("L"), "PNG", transparency=3)
    add("GIF transparent", small, "GIF", transparency=0)
    add("JPEG progressive", rgb, "JPEG", progressive=True, icc_profile=b"not a profile" * 9)
    add("WEBP lossless", rgb.convert("RGBA"), "WEBP", lossless=True)
    for orientation in (*range(10), 255):
        exif = Image.Exif()
        exif[274] = orientation
        for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
            add(f"{kind} orientation {orientation}", rgb, kind, exif=exif.tobytes())
    for odd in (
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0\0\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x05\0\1\0\0\0\x08\0\0\0" * 40,
        b"II",
        b"",
    ):
        for kind in ("JPEG", "PNG", "WEBP"):
            add(f"{kind} exif {odd[:30]!r}", rgb, kind, exif=odd)
    return found


def png(width: int, height: int, depth: int, colour: int, data: bytes) -> bytes:
    chunk = lambda name, content: (
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    )
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


@st.composite
def bombs(draw) -> bytes:
    """Headers that promise more than there is, and files of kilobytes that are hundreds of millions of pixels."""
    width, height = draw(
        st.sampled_from(
            [
                (2**31 - 1, 2**31 - 1),
                (2**16, 2**16),
                (1, 2**31 - 1),
                (2**31 - 1, 1),
                (13000, 13000),
                (178_000_000, 1),
                (1, 178_000_000),
                (65535, 1365),
                (0, 5),
            ]
        )
    )
    depth, colour = draw(st.sampled_from([(1, 0), (8, 0), (16, 0), (8, 2), (16, 2), (1, 3), (8, 4), (8, 6), (16, 6)]))
    kind = draw(st.sampled_from(["png", "png whole", "png text", "gif", "bmp", "ppm", "tiff"]))
    if kind == "png whole":
        pixels = min(width * height, 178_000_000)
        channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
        rows = pixels // max(1, min(width, pixels))
        zeros = (width * channels * depth // 8 + 2) * rows if width * height <= pixels else 1 << 20
        return png(width, height, depth, colour, _deflated_zeros(min(zeros, 2 << 30)))
    if kind == "png text":  # a compressed text
        good = good_images()["PNG RGB (13, 7)"]
        text = b"a\0\0" + _deflated_zeros(1 << 30)
        return (
            good[:33]
            + struct.pack(">I", len(text))
            + b"zTXt"
            + text
            + struct.pack(">I", zlib.crc32(b"zTXt" + text))
            + (good[33:])
        )
    if kind == "png":
        return png(width, height, depth, colour, zlib.compress(bytes(1000)))
    if kind == "gif":
        return (
            b"GIF89a"
            + struct.pack("<HHBBB", width % 65536, height % 65536, 0xF7, 0, 0)
            + bytes(768)
            + (b"," + struct.pack("<HHHHB", 0, 0, width % 65536, height % 65536, 0) + b"\x08\x01\x00\x00;")
        )
    if kind == "bmp":
        return (
            b"BM"
            + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
            + bytes(99)
        )
    if kind == "ppm":
        return b"P%d %d %d 255\n" % (draw(st.integers(1, 7)), width, height) + bytes(99)
    entry = lambda tag, value: struct.pack("<HHII", tag, 4, 1, value % 2**32)
    tags = [(256, width), (257, height), (258, depth), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 99)]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(itertools.starmap(entry, tags)) + bytes(103)


@functools.cache
def _deflated_zeros(size: int) -> bytes:
    """A zlib stream of so many zeros; its blocks are all the same."""
    deflate = zlib.compressobj(9, wbits=-15)
    block = deflate.compress(bytes(1 << 20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    rest = zlib.compressobj(9, wbits=-15)
    end = rest.compress(bytes(size & (1 << 20) - 1)) + rest.flush()
    return b"\x78\xda" + block * (size >> 20) + end + struct.pack(">I", size % 65521 << 16 | 1)  # its Adler-32


@st.composite
def images(draw) -> tuple[str, bytes]:
    how = draw(st.sampled_from(["crop", "centre", "decode"]))
    choice = draw(st.integers(0, 19))
    if choice == 0:
        return how, draw(bombs())
    content = good_images()[draw(st.sampled_from(sorted(good_images())))]
    return how, content if choice < 4 else draw(damaged(content))


# Hugging Face folders

ENCODERS = ("siglip_vision", "siglip", "dinov2", "dinov2_with_registers", "dinov3_vit", "intern_vit", "vit_mae")


def sharded(files: Files) -> Files:
    """The same weights behind an index."""
    content = files["model.safetensors"]
    size = struct.unpack("<Q", content[:8])[0]
    names = [name for name in json.loads(content[8 : 8 + size]) if name != "__metadata__"]
    shard = "model-00001-of-00001.safetensors"
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
    return {name: data for name, data in files.items() if name != "model.safetensors"} | {
        shard: content,
        "model.safetensors.index.json": as_json(index),
    }


_WEIGHTS = ("config.json", "preprocessor_config.json", "model.safetensors")


@st.composite
def encoders(draw) -> tuple[Files, int | None, str]:
    files = folder_files(REFERENCE / draw(st.sampled_from(ENCODERS)), *_WEIGHTS)
    files = sharded(files) if draw(st.integers(0, 3)) == 0 else files
    return (
        draw(damaged_files(files)),
        draw(st.sampled_from([None, 32, 16, 0, 56, 2**14])),
        draw(st.sampled_from(["affine", "plain"])),
    )


@functools.cache
def _text_model() -> Files:
    with tempfile.TemporaryDirectory() as folder:
        tiny.text_model(Path(folder))
        return {
            **folder_files(Path(folder), "config.json", "model.safetensors", "tokenizer.json"),
            "tokenizer_config.json": as_json({"tokenizer_class": "PreTrainedTokenizerFast"}),
        }


@st.composite
def language_models(draw) -> tuple[Files, str]:
    files = _text_model()
    files = sharded(files) if draw(st.integers(0, 3)) == 0 else files
    return draw(damaged_files(files)), draw(
        st.sampled_from([text for text in TEXTS if text != "\ud800"]) | st.text(max_size=20)
    )


def siglips():
    return damaged_files(folder_files(REFERENCE / "siglip_pair", *_WEIGHTS))


# Tensors

_TENSORS = {
    "a/kernel": np.ones((3, 4), np.float16),
    "a/bias": np.zeros(4, np.float32),
    "codes": np.zeros((2, 2), np.float32),
}


@st.composite
def safetensors_files(draw) -> tuple[bytes, dict[str, tuple[int, ...]]]:
    tensors = draw(
        st.sampled_from(
            [
                _TENSORS,
                {**_TENSORS, "more": np.ones(3, np.int64)},
                {**_TENSORS, "codes": np.zeros((0, 2), np.float32)},
                {**_TENSORS, "a/bias": np.zeros(4, np.bool_)},
                {**_TENSORS, "a/bias": np.zeros((), np.float64)},
            ]
        )
    )
    content = save(tensors)
    return (
        draw(st.just(content) | safetensors_header(content) | damaged(content)),
        {name: array.shape for name, array in _TENSORS.items()},
    )


@functools.cache
def _torch_files() -> list[bytes]:
    import torch

    made = []
    for value in (
        {"ema": {"a.weight": torch.ones(3, 4)}, "model": {"a.weight": torch.ones(3, 4)}, "step": 3},
        [torch.ones(2), {"a": (torch.zeros(1), None)}],
        torch.arange(3),
        {"a": 1},
        {1: torch.ones(1)},
        {"a": torch.ones(2, dtype=torch.bfloat16)},
        {"a": torch.ones(2, dtype=torch.complex64)},
        {"a": torch.ones(2, 2).to_sparse()},
        {"a": torch.empty(2, device="meta")},
        {"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
        {"a": Path("b")},
    ):
        for zipped in (True, False):
            buffer = io.BytesIO()
            torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
            made.append(buffer.getvalue())
    loop: list = []
    loop.append(loop)
    buffer = io.BytesIO()
    torch.save(loop, buffer)
    return [*made, buffer.getvalue()]


@st.composite
def pytorch_files(draw) -> bytes:
    content = draw(st.sampled_from(_torch_files()))
    return draw(st.just(content) | damaged(content) | _repickled(content) | _repickled(content))


@st.composite
def _repickled(draw, content: bytes) -> bytes:
    """A zip file of PyTorch's with another pickle in it, its checksum being right."""
    import zipfile

    try:
        parts = zipfile.ZipFile(io.BytesIO(content))
    except zipfile.BadZipFile:
        return draw(damaged(content))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        chosen = draw(st.sampled_from(parts.namelist()))
        for name in parts.namelist():
            data = parts.read(name)
            out.writestr(name, draw(damaged(data)) if name in (chosen, "archive/data.pkl") else data)
    return buffer.getvalue()


@functools.cache
def _torch_models() -> list[dict[str, np.ndarray]]:
    from tests.convert_test import Torch

    made = []
    for kind in ("ema_vq", "simvq", "old_simvq", "fsq", "none"):
        torch = Torch()
        torch.decoder()
        if kind != "none":
            getattr(torch, kind)()
        made.append(torch.tensors)
    return made


@st.composite
def pytorch_models(draw) -> tuple[str, bytes, str, int]:
    tensors = dict(draw(st.sampled_from(_torch_models())))
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(tensors)))
        array = tensors.pop(name)
        how = draw(st.sampled_from(["drop", "rename", "shape", "type", "values", "scalar", "prefix", "more"]))
        if how == "rename":
            tensors[draw(st.text(max_size=9) | st.just("ema." + name) | st.just("module." + name))] = array
        elif how == "shape":
            shape = draw(st.lists(st.integers(0, 5), max_size=4))
            tensors[name] = np.ones(shape, array.dtype)
        elif how == "type":
            tensors[name] = array.astype(draw(st.sampled_from([np.int64, np.uint8, np.bool_, np.float16, np.float64])))
        elif how == "values":
            with np.errstate(all="ignore"):
                tensors[name] = (array * np.float64(draw(st.sampled_from([0, -1, np.nan, np.inf, 1e30, 1e9])))).astype(
                    array.dtype
                )
        elif how == "scalar":
            tensors[name] = np.float32(draw(st.floats(width=32))).reshape(())
        elif how == "prefix":
            prefix = draw(st.sampled_from(["ema", "model", "disc", "encoder.model", "encoder.encoder"]))
            tensors = {f"{prefix}.{key}": value for key, value in {**tensors, name: array}.items()}
        elif how == "more":
            tensors |= {name: array, f"decoder.decoder_layers.{draw(st.integers(0, 10**9))}.x": array}
    content = save({key: np.ascontiguousarray(value) for key, value in tensors.items()})
    return (
        "model.safetensors",
        draw(st.sampled_from([content, content, content, content[:-9]])),
        str(
            REFERENCE
            / draw(st.sampled_from(["siglip_vision", "siglip_vision", "siglip_vision", "dinov3_vit", "intern_vit"]))
        ),
        draw(st.sampled_from([2, 2, 2, 2, 3, 16])),
    )


# Tars and records


def tar_of(members: list[tuple[str, bytes, dict[str, Any]]], kind: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, data, fields in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@st.composite
def plain_tars(draw) -> bytes:
    some = [good_images()[name] for name in ("JPEG RGB (13, 7)", "PNG RGBA (13, 7)", "GIF animated")]
    names = st.sampled_from(
        [
            "0001.jpg",
            "0001.png",
            "0001.cls",
            "0001.json",
            "0001.txt",
            "../x.jpg",
            "/etc/x.jpg",
            "a/b.c.jpg",
            "é" * 150 + ".jpg",
            ".jpg",
            "0001.",
            "a\nb.jpg",
            "\udcff.png",
            "0002.JPEG",
        ]
    )
    data = st.sampled_from(
        [
            *some,
            b"3",
            b"-1",
            b"9" * 5000,
            b'{"label": 1, "caption": "a"}',
            b"[" * 10**5,
            b'{"cls": 1e999}',
            b"\xff\xfe",
            b"",
            b"a caption",
            b'{"label": 100000000000000000000, "text": "\\ud800"}',
        ]
    )
    fields = st.sampled_from(
        [
            {},
            {},
            {},
            {"type": tarfile.SYMTYPE, "linkname": "../../x"},
            {"type": tarfile.LNKTYPE, "linkname": "0001.jpg"},
            {"type": tarfile.CHRTYPE},
            {"type": tarfile.DIRTYPE},
            {"type": tarfile.FIFOTYPE},
            {"type": b"S"},
            {"mtime": 2**40},
            {"pax_headers": {"size": "99999999999999", "path": "x.jpg"}},
            {
                "pax_headers": {
                    "GNU.sparse.major": "1",
                    "GNU.sparse.minor": "0",
                    "GNU.sparse.realsize": "99999999999",
                    "GNU.sparse.name": "0001.jpg",
                }
            },
            {"pax_headers": {"GNU.sparse.map": "0,5,9999999999,1", "GNU.sparse.size": "nan"}},
        ]
    )
    members = draw(st.lists(st.tuples(names, data, fields), max_size=4))
    return tar_of(members, draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])))


@st.composite
def tar_header(draw, content: bytes) -> bytes:
    """One field of the first header overwritten, its checksum being right."""
    header = bytearray(content[:512])
    start, end = draw(
        st.sampled_from(
            [
                (0, 100),
                (100, 108),
                (124, 136),
                (136, 148),
                (156, 157),
                (157, 257),
                (257, 265),
                (345, 500),
                (386, 482),
                (482, 495),
            ]
        )
    )
    value = draw(
        st.binary(max_size=end - start)
        | st.sampled_from(
            [
                b"7" * (end - start),
                b"\x80" + b"\xff" * (end - start - 1),
                b"\xff" * (end - start),
                b"-1",
                b"x",
                b"g",
                b"L",
                b"S",
                b"K",
                b"\x80" + bytes(max(0, end - start - 2)) + b"\x01",
            ]
        )
    )
    header[start:end] = value[: end - start].ljust(end - start, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content[512:]


@functools.cache
def _zeros_gzipped() -> bytes:
    return gzip.compress(bytes(64 << 20))


@st.composite
def tars(draw) -> tuple[str, bytes]:
    content = draw(plain_tars())
    how = draw(st.integers(0, 9))
    if how < 4:
        content = draw(tar_header(content))
    elif how < 7:
        content = draw(damaged(content))
    name = draw(st.sampled_from(["a.tar", "a.tar.gz", "..tar", "é.tgz"]))
    if draw(st.integers(0, 3)) == 0:
        content = gzip.compress(content)
        if draw(st.booleans()):
            content = draw(damaged(content))
        elif draw(st.integers(0, 4)) == 0:
            content += _zeros_gzipped() * draw(st.sampled_from([1, 100]))
    return name, content


@st.composite
def tar_reports(draw) -> tuple[bytes, bytes]:
    content = tar_of([("0001.jpg", good_images()["JPEG RGB (13, 7)"], {})])
    report = {
        "tar": "a.tar",
        "bytes": len(content),
        "sha256": "0",
        "images": 1,
        "labels": 0,
        "captions": 0,
        "bad": 0,
        "damage": None,
    }
    return content, draw(
        damaged_file("a.jsonl", as_json({"name": "x", "reason": "y"}) + b"\n" + as_json(report) + b"\n")
    )


def _array_record(records: list[bytes]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.array_record"
        with written(path) as (writer, _):
            for record in records:
                writer.write(record)
        return path.read_bytes()


@functools.cache
def _array_records() -> list[bytes]:
    image = good_images()["JPEG RGB (13, 7)"]
    return [
        _array_record([serialize_example({"image": image, "label": i, "caption": b"a"}) for i in range(3)]),
        _array_record([image] * 20),
        _array_record([]),
    ]


@st.composite
def examples(draw) -> bytes:
    """A `tf.train.Example` with other features than it should have, or damaged."""
    value = st.binary(max_size=9) | st.integers(-(2**63), 2**63 - 1) | st.just(np.arange(6, dtype="<u2").tobytes())
    names = ("image", "image/encoded", "label", "image/class/label", "caption", "codes", "name", "other")
    content = serialize_example(draw(st.dictionaries(st.sampled_from(names), value, max_size=5)))
    return draw(st.just(content) | damaged(content))


@st.composite
def array_records(draw) -> bytes:
    if draw(st.integers(0, 2)) == 0:
        return _array_record(draw(st.lists(examples(), min_size=1, max_size=3)))
    return draw(damaged(draw(st.sampled_from(_array_records()))))


_DESCRIPTION = codes.Description(
    data="embedded",
    source={"images": 5, "digests": ["0" * 16] * 5},
    num_classes=7,
    tokenizer="ab",
    weights="ema",
    codebook_size=300,
    grid=(4, 4),
    image_size=32,
    views=2,
    batch_size=4,
    shard_size=3,
    recipe={"data": "embedded"},
)


@functools.cache
def good_codes() -> Files:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begun = codes.begin(folder, _DESCRIPTION)
        records = [CodesRecord(np.full((2, 4, 4), 7 * i, np.uint16), i, f"image {i}", "a" * i) for i in range(5)]
        for number, shard in enumerate(begun.shards(folder)):
            codes.write_shard(shard, records[3 * number : 3 * number + 3])
        codes.end(folder, begun)
        return {path.name: _without_checksum(path.name, path.read_bytes()) for path in folder.iterdir()}


def _without_checksum(name: str, content: bytes) -> bytes:
    """What is wrong with a file's values shall not end at its checksum."""
    if not name.endswith(".json"):
        return content
    return as_json({key: value for key, value in json.loads(content).items() if key != "checksum"})


@st.composite
def codes_folders(draw) -> Files:
    files = draw(damaged_files(good_codes()))
    if draw(st.integers(0, 5)) == 0:  # records with other features
        shard = next(name for name in sorted(good_codes()) if name.endswith(".array_record"))
        files[shard] = _array_record([draw(examples()) for _ in range(3)])
    return files


@st.composite
def image_folders(draw) -> list[tuple[str, str]]:
    names = st.sampled_from(
        [
            "a.jpg",
            "b.png",
            "c/a.jpg",
            "c/b.webp",
            "d.jpg/e.jpg",
            ".hidden.jpg",
            "\udcff.jpg",
            "a\nb.jpg",
            "x" * 250 + ".jpg",
            "c.jpg",
            "e/f/g/h.jpg",
            "é/ü.png",
        ]
    )
    kinds = st.sampled_from(
        ["file", "file", "folder", "pipe", "link:.", "link:..", "link:/dev/zero", "link:a.jpg", "link:none"]
    )
    return draw(st.lists(st.tuples(names, kinds), max_size=6))


# Runs, configs and studies


def _lines(*lines: dict[str, Any]) -> bytes:
    return b"".join(as_json(line) + b"\n" for line in lines)


@functools.cache
def good_tokenizer_run() -> Files:
    values = conftest.tiny()
    values.model.encoder.path = "encoder"
    encoder = folder_files(REFERENCE / "siglip_vision", "config.json", "preprocessor_config.json")
    return {
        "config.json": as_json(dataclasses.asdict(config_lib.parse(values))),
        "metrics.jsonl": _lines(
            {"step": 1, "loss/total": 1.5},
            {"step": 2, "eval/psnr": 9.0, "eval/num_images": 3},
            {"step": 3, "loss/total": None},
            {"step": 4, "loss/total": 1.0},
        ),
        "images.json": as_json({"images": 4096, "digests": ["0" * 16] * 16}),
        "bad_images.jsonl": _lines({"name": "x", "reason": "y"}, {"name": "z", "reason": "y"}),
        **{f"encoder/{name}": content for name, content in encoder.items()},
    }


@functools.cache
def _generator_run(captions: bool) -> Files:
    values = tiny.tiny()
    values.data.source = "codes:codes"
    files = {f"codes/{name}": content for name, content in good_codes().items()} | {
        "codes.json": good_codes()["codes.json"]
    }
    if captions:
        values = tiny.tiny(captions=Path("text"))
        values.data.source = "codes:codes"
        files |= {f"text/{name}": content for name, content in _text_model().items() if name != "model.safetensors"}
    return {
        **files,
        "config.json": as_json(dataclasses.asdict(config_lib.parse(values))),
        "metrics.jsonl": _lines({"step": 1, "loss": 1.5}),
    }


def tokenizer_runs():
    return damaged_files(good_tokenizer_run())


def generator_runs():
    return st.sampled_from([False, True]).flatmap(lambda captions: damaged_files(_generator_run(captions)))


def _config_values() -> list[dict[str, Any]]:
    codes_known = tiny.tiny()
    codes_known.data.update(grid=4, size=24, classes=3)
    gan = conftest.tiny()
    gan.gan.update(discriminator="patchgan", channels=32)
    fsq = conftest.tiny()
    fsq.model.quantizer.update(kind="fsq", levels=(4, 4, 2), size=32, dim=3)
    return [values.to_dict() for values in (conftest.tiny(), gan, fsq, codes_known)]


def configs():
    return st.sampled_from(_config_values()).flatmap(changed)


@st.composite
def _assignment(draw, values: dict[str, Any]) -> tuple[str, Any]:
    """A dotted key and what it is set to."""
    keys = sorted(_keys(values))
    return draw(
        st.sampled_from(keys) | st.sampled_from(["x", "train", "train.x", "model.x.y", "", "optim.lr.x"])
    ), draw(anything)


def _keys(values: dict[str, Any], prefix: str = ""):
    for name, value in values.items():
        yield from _keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]


@st.composite
def config_files(draw) -> str:
    values = draw(st.sampled_from(_config_values()))
    which = "generator" if values["task"] == "generator" else "default"
    lines = [f"    config.{key} = {value!r}" for key, value in draw(st.lists(_assignment(values), max_size=2))]
    body = draw(
        st.sampled_from(
            [
                "config.train.x += 1",
                "raise KeyError('a')",
                "raise OSError(3)",
                "return None",
                "return 3",
                "return [config]",
                "return dict(config.train)",
                "1 / 0",
                "def",
                "assert False",
                "",
                "return config.to_dict()",
                "import nothing.at.all",
                "config.unlock()",
                "return config.copy_and_resolve_references()",
                "raise ValueError('a\\nb')",
            ]
        )
    )
    head = draw(
        st.sampled_from(
            [
                "def get_config():",
                "def get_config():",
                "def get_config(a):",
                "def get_study():",
                "get_config = 3",
                "def get_config(*, a):",
                "\0",
            ]
        )
    )
    return "\n".join(
        [
            "from vqrae_jax import config as c",
            head,
            f"    config = c.{which}()",
            *lines,
            f"    {body}",
            "    return config",
            "",
        ]
    )


@st.composite
def command_lines(draw) -> list[str]:
    root = conftest.REPOSITORY
    given = [
        f"--config={root}/configs/"
        + draw(
            st.sampled_from(
                [
                    "nano_stage1.py",
                    "nano_generator.py",
                    "ablation.py:dim=384",
                    "ablation.py:dim=x",
                    "ablation.py:" + "=" * 9,
                    "nano_stage1.py:a",
                    "none.py",
                    "",
                    "nano_stage1.py:",
                ]
            )
        )
    ]
    for _ in range(draw(st.integers(0, 3))):
        key, value = draw(_assignment(draw(st.sampled_from(_config_values()))))
        given.append(
            draw(
                st.sampled_from(
                    [
                        "--config.{}={}",
                        "--config.{}={}",
                        "--config.{}",
                        "--noconfig.{}",
                        "--config.{}==={}",
                        "--{}={}",
                        "config.{}={}",
                    ]
                )
            ).format(key, value)
        )
    return [argument for argument in given if "\0" not in argument]  # no process has such an argument


@st.composite
def study_files(draw) -> str:
    row = {
        "config": str(conftest.REPOSITORY / "configs" / "nano_stage1.py"),
        "changes": {"train.steps": 300},
        "seeds": [0, 1],
    }
    study = {
        "title": "a",
        "rows": {"first": row, "second": {**row, "init_from": "first"}},
        "data": "embedded",
        "metrics": ["psnr"],
        "probe": False,
    }
    given = draw(changed(study))
    body = draw(st.sampled_from(["return s"] * 8 + ["return None", "raise KeyError(1)", "1 / 0", "return S"]))
    return "\n".join(
        [
            "from vqrae_jax.tokenizer.study import Row, Study",
            "nan, inf = float('nan'), float('inf')",
            "def get_study():",
            f"    given = {given!r}",
            "    S = Study",
            "    if isinstance(given, dict) and isinstance(given.get('rows'), dict):",
            "        given['rows'] = {k: Row(**r) if isinstance(r, dict) else r for k, r in given['rows'].items()}",
            "    s = Study(**given)",
            f"    {body}",
            "",
        ]
    )


INPUTS: dict[str, Callable[[], st.SearchStrategy]] = {
    "image": images,
    "encoder": encoders,
    "language_model": language_models,
    "siglip_heads": siglips,
    "safetensors": safetensors_files,
    "pytorch_file": pytorch_files,
    "pytorch_model": pytorch_models,
    "tar": tars,
    "tar_report": tar_reports,
    "array_record": array_records,
    "codes_folder": codes_folders,
    "image_folder": image_folders,
    "tokenizer_run": tokenizer_runs,
    "generator_run": generator_runs,
    "config": configs,
    "config_file": config_files,
    "command_line": command_lines,
    "study_file": study_files,
}
