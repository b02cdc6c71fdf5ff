"""Tar shards to ArrayRecord: what is kept, what is left out, and what no tar can bring about."""

import gzip
import io
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import REPOSITORY
from vqrae_jax.convert import from_webdataset
from vqrae_jax.data import ArrayRecordSource, BadImages, eval_batches, webdataset


def jpeg(value: int, size=(8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, value).save(buffer, "JPEG")
    return buffer.getvalue()


GOOD = [jpeg(value) for value in range(8)]


def member(name: str, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def write_tar(path: Path, members, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for info, data in itertools.starmap(member, members) if isinstance(members, dict) else members:
            tar.addfile(info, io.BytesIO(data))
    return path


def shard(path: Path, *, first: int = 0, count: int = 4) -> Path:
    """Good images with the labels 10, 11, ..."""
    return write_tar(path, [member(f"{i:05d}.{kind}", data) for i in range(first, first + count)
                            for kind, data in (("cls", b"%d" % (10 + i)), ("jpg", GOOD[i % 8]))])


def convert(tars, out: Path, threads: int = 1) -> list[webdataset.Converted]:
    return list(webdataset.convert([tars] if isinstance(tars, Path) else tars, out, threads=threads))


def records(out: Path) -> list[tuple[bytes, int]]:
    source = ArrayRecordSource(f"{out}/*.array_record")
    return [(source[i].image, source[i].label) for i in range(len(source))]


def left_out(report: Path) -> dict[str, str]:
    *lines, _ = map(json.loads, report.read_text().splitlines())
    return {line["name"]: line["reason"] for line in lines}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# What is kept


def test_images_stay_byte_for_byte_and_keep_their_labels(tmp_path):
    members = [
        member("a/0.jpg", GOOD[0]), member("a/0.cls", b" 7\n"), member("a/0.txt", " une légende\n".encode()),
        member("a/1.cls", b"2147483647"), member("a/1.JPEG", GOOD[1]),  # the label first
        member("a/2.json", b'{"label": 3, "cls": 4, "text": "x"}'), member("a/2.jpg", GOOD[2]),
        member("b/2.json", b'{"cls": 4, "width": 8}'), member("b/2.jpg", GOOD[3]),  # another folder, another key
        member("b/3.cls", b"5"), member("b/3.jpg", GOOD[4]), member("b/3.json", b'{"label": 6}'),
        member("b/4.jpg", GOOD[5]), member("b/4.json", b'{"label": "dog", "caption": "y", "text": "x"}'),
        member("b/4.txt", b" "),
        member("b", type=tarfile.DIRTYPE), member("b/5.txt", b"no image"), member("b/6.jpg", GOOD[6]),
    ]
    write_tar(tmp_path / "x.tar", members)
    write_tar(tmp_path / "y.tar.gz", members, "w:gz")
    x, y = convert([tmp_path / "x.tar", tmp_path / "y.tar.gz"], tmp_path / "out")
    assert (x.images, x.labels, x.bad, x.damage) == (y.images, y.labels, y.bad, y.damage) == (7, 5, 0, None)
    expected = list(zip(GOOD[:7], [7, 2147483647, 3, 4, 5, -1, -1], strict=True))
    assert records(tmp_path / "out") == expected * 2
    source = ArrayRecordSource(f"{tmp_path}/out/x.array_record")
    assert [source[i].caption for i in range(7)] == ["une légende", "", "x", "", "", "y", ""] and x.captions == 3
    (batch,) = eval_batches(ArrayRecordSource(f"{tmp_path}/out/x.array_record"), image_size=8, batch_size=7,
                            bad_images=BadImages(None), max_bad=0.0, threads=1)
    assert batch["valid"].all() and batch["image"][:, 0, 0, 0].tolist() == list(range(7))


def test_bad_members_are_named_and_counted(tmp_path):
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)).save(noise, "JPEG")
    bomb = io.BytesIO()
    Image.new("1", (20000, 10000)).save(bomb, "PNG")
    tar = write_tar(tmp_path / "x.tar", [
        member("0.jpg", GOOD[0]), member("0.cls", b"dog"),
        member("1.jpg", noise.getvalue()[:-200]), member("1.cls", b"1"),
        member("2.jpg"), member("3.png", b"text"), member("4.png", bomb.getvalue()),
        member("5.jpg", GOOD[1]), member("5.png", GOOD[2]), member("5.jpg", GOOD[3]), member("5.cls", b"-1"),
        member("6.left.jpg", GOOD[4]), member("7.jpg", GOOD[5]), member("7.json", b"[" * 200_000),
        member("8.jpg", GOOD[6]), member("8.cls", b"1" * 2000), member("8.txt", b"\xff"),
        member("\udcff\n.jpg", b"no image"),
    ])
    (converted,) = convert(tar, tmp_path / "out")
    bad = left_out(tmp_path / "out" / "x.jsonl")
    for name, reason in {
        "0.cls": "no label", "1.jpg": "truncated", "2.jpg": "empty", "3.png": "unknown format", "4.png": "pixels",
        "5.png": "has such a part already, 5.jpg", "5.jpg": "has such a part already", "5.cls": "not in [0",
        "6.left.jpg": "left.jpg", "7.json": "no label", "8.cls": "2000 bytes, more than 1024", "8.txt": "no caption",
        "\udcff\n.jpg": "unknown format",
    }.items():
        assert reason in bad.pop(name) and not bad.get(name)
    assert not bad
    assert (converted.images, converted.labels, converted.bad, converted.damage) == (4, 0, 13, None)
    assert records(tmp_path / "out") == [(image, -1) for image in (GOOD[0], GOOD[1], GOOD[5], GOOD[6])]


# What no tar can bring about


def test_a_malicious_tar_writes_nothing_elsewhere(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(GOOD[7])
    members = [
        member("../../escaped.jpg", GOOD[0]), member("../../escaped.cls", b"1"), member(f"{tmp_path}/a.jpg", GOOD[1]),
        member("out/x.array_record", b"spoilt"), member("..", type=tarfile.DIRTYPE), member("/", type=tarfile.DIRTYPE),
        member("l.jpg", type=tarfile.SYMTYPE, linkname=str(tmp_path / "secret.jpg")),
        member("h.jpg", type=tarfile.LNKTYPE, linkname="../../escaped.jpg"),
        member("c.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5), member("f.jpg", type=tarfile.FIFOTYPE),
        member("folder.jpg", type=tarfile.DIRTYPE), member("link", type=tarfile.SYMTYPE, linkname=str(tmp_path)),
        member("link/b.jpg", GOOD[2]), member("n" * 4000 + ".jpg", GOOD[3]), member("m" * 4000 + ".jpg", b"no image"),
    ]
    write_tar(tmp_path / "tars" / "x.tar", members)
    names = ["..tar", "...tar.gz", ".x.tar", "$(touch escaped) [a]*?.tar", "\n.tar", "x" * 250 + ".tar"]
    tars = [shard(tmp_path / "tars" / name) for name in names]
    (tmp_path / "tars" / "x.tar").rename(tmp_path / "tars" / "y.TAR")
    before = contents(tmp_path)
    out = tmp_path / "out" / "deep"
    *_, converted = convert([*tars[2:], tmp_path / "tars" / "y.TAR"], out)
    convert(tars[:1], tmp_path / "dots"), convert(tars[1:2], tmp_path / "dots2")
    assert converted.images == 4 and converted.labels == 1 and converted.damage is None
    bad = left_out(out / "y.jsonl")
    assert {name: bad[name] for name in ("l.jpg", "h.jpg", "c.jpg", "f.jpg", "folder.jpg")} == dict.fromkeys(
        ("l.jpg", "h.jpg", "c.jpg", "f.jpg", "folder.jpg"), "not a plain file")
    assert max(map(len, bad)) == 500 and converted.bad == len(bad) == 6
    made = {path: data for path, data in contents(tmp_path).items() if path not in before}
    stems = ["x", "__touch_escaped___a___", "_", "x" * 150, "y"]
    assert sorted(made) == sorted(
        [f"out/deep/{stem}.{kind}" for stem in stems for kind in ("array_record", "jsonl")]
        + [f"{folder}/_.{kind}" for folder in ("dots", "dots2") for kind in ("array_record", "jsonl")])
    assert {path: contents(tmp_path)[path] for path in before} == before


@pytest.mark.parametrize(("bomb", "bad", "damage"), [
    ([member("1.jpg", bytes(80 << 20))], 1, None),
    ([member("1.bin", bytes(80 << 20))], 0, None),
    ([member("pax", bytes(80 << 20), type=tarfile.XHDTYPE)], 0, "impossible size"),
    ([member("name", bytes(80 << 20), type=tarfile.GNUTYPE_LONGNAME)], 0, "impossible size"),
    ([member("map.jpg", b"9999999\n" + b"0\n" * (8 << 20),
             pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})], 0, "impossible size"),
], ids=["image", "other", "pax", "name", "sparse"])
def test_memory_is_bounded_whatever_a_gzipped_tar_says(bomb, bad, damage, tmp_path):
    with gzip.open(tmp_path / "x.tar.gz", "wb", compresslevel=1) as file:
        for info, data in (member("0.jpg", GOOD[0]), *bomb, member("2.jpg", GOOD[2])):
            file.write(info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512))
        file.write(bytes(1024))
    tracemalloc.start()
    try:
        (converted,) = convert(tmp_path / "x.tar.gz", tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert converted.bad == bad and converted.images == (2 if damage is None else 1)
    assert converted.damage is None if damage is None else damage in converted.damage


def test_sizes_that_lie(tmp_path):
    for number, size in enumerate((-512, -(1 << 40), 1 << 40, 5000)):
        info, _ = member("1.jpg", size=size)
        data = member("0.jpg", GOOD[0])[0].tobuf() + GOOD[0] + bytes(-len(GOOD[0]) % 512) + info.tobuf()
        (tmp_path / f"{number}.tar").write_bytes(data + bytes(1024))
        (converted,) = convert(tmp_path / f"{number}.tar", tmp_path / "out")
        assert converted.images == 1 and (converted.damage or converted.bad)


# Damage


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_of_a_damaged_tar_the_beginning_is_kept(suffix, tmp_path):
    whole = shard(tmp_path / f"whole{suffix}", count=8)
    if suffix == ".tar.gz":
        data = gzip.compress(whole.read_bytes(), 0)  # stored, so that a byte's place is known
        cases = {"checksum": data[:-8] + bytes(8), "cut": data[:9000], "end": data[:-5]}
    else:
        data = whole.read_bytes()
        sample = 4 * 512  # headers and contents of KEY.cls and KEY.jpg
        assert len(GOOD[0]) <= 512
        cases = {
            "header": data[: 4 * sample] + b"\7" * 512 + data[4 * sample + 512:],
            "in_data": data[: 4 * sample + 3 * 512 + 100], "in_header": data[: 4 * sample + 100],
            "between": data[: 4 * sample], "joined": data + data, "empty": b"", "text": b"no tar" * 1000,
            "zeros_only": bytes(10240),
        }
    for name, damaged in cases.items():
        (tmp_path / f"{name}{suffix}").write_bytes(damaged)
        (converted,) = convert(tmp_path / f"{name}{suffix}", tmp_path / name)
        images = {"checksum": 8, "end": 8, "joined": 8, "empty": 0, "text": 0, "zeros_only": 0, "cut": None}
        expected = images[name] if name in images else 4
        if expected is not None:
            assert converted.images == expected, name
        assert (converted.damage is None) == (name == "zeros_only") and "\n" not in (converted.damage or "")
        assert [image for image, _ in records(tmp_path / name)] == GOOD[: converted.images]


def test_no_flipped_byte_does_more_than_damage(tmp_path):
    good = write_tar(tmp_path / "x.tar", [member("a" * 200 + ".jpg", GOOD[0]), member("1.jpg", GOOD[1])]).read_bytes()
    rng = np.random.default_rng(0)
    for number in range(150):
        data = bytearray(good)
        for place in rng.integers(0, 4096, size=3):
            data[place] = rng.integers(256)
        (tmp_path / f"{number}.tar").write_bytes(data)
        (converted,) = convert(tmp_path / f"{number}.tar", tmp_path / "out")
        assert converted.images <= 2


# Interruption


def test_an_interrupted_conversion_continues_to_the_same_files(tmp_path, monkeypatch):
    tars = [shard(tmp_path / f"{i}.tar", first=4 * i) for i in range(3)]
    convert(tars, tmp_path / "whole", threads=2)
    out, decode, seen = tmp_path / "out", webdataset.decode_image, []

    noticed = threading.Event()

    def interrupt(*_):
        noticed.set()
        raise KeyboardInterrupt

    def interrupted(data):
        seen.append(data)
        if len(seen) == 7:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            assert noticed.wait(60)
        return decode(data)

    before = signal.signal(signal.SIGINT, interrupt)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(webdataset, "decode_image", interrupted)
        convert(tars, out)
    signal.signal(signal.SIGINT, before)
    assert sorted(contents(out)) == ["0.array_record", "0.jsonl"]  # nothing unfinished under a final name, or at all
    (out / "1.jsonl").write_text('{"name": "of a process that was killed between the two files"}\n')
    made = (out / "0.array_record").stat()
    (out / f"1.array_record.{'0' * 32}.part").write_bytes(b"left by a process that was killed")
    first, *_ = convert(tars, out, threads=2)
    assert first.tar == "0.tar" and (out / "0.array_record").stat().st_mtime_ns == made.st_mtime_ns
    assert contents(out) == contents(tmp_path / "whole")
    assert [label for _, label in records(out)] == [*range(10, 22)]


def test_kill_9_and_the_same_command_again(tmp_path):
    shard(tmp_path / "a.tar")
    slow = jpeg(50, size=(1500, 1500))
    write_tar(tmp_path / "b.tar", [member(f"{i}.jpg", slow) for i in range(40)])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "vqrae_jax.convert", "from-webdataset", f"--tars={tmp_path}/*.tar", f"--out={out}",
               "--threads=1"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE)
    while not list(out.glob("b.*.part")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (out / "a.array_record").exists() and not (out / "b.array_record").exists()
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    last = again.stderr.splitlines()[-1]
    assert last == ("44 images (4 with a label, 0 with a caption) in 2 files, 0 bad members and 0 damaged tars "
                    f"(see {out}/*.jsonl); to use them: --config.data.source='array_record:{out}/*.array_record'")
    convert([tmp_path / "a.tar", tmp_path / "b.tar"], tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_of_two_that_convert_one_tar_neither_spoils_the_file(tmp_path, monkeypatch):
    tar, out, decode = shard(tmp_path / "x.tar"), tmp_path / "out", webdataset.decode_image

    def decode_late(data):
        monkeypatch.setattr(webdataset, "decode_image", decode)
        convert(tar, out)
        return decode(data)

    monkeypatch.setattr(webdataset, "decode_image", decode_late)
    with pytest.raises(OSError, match="another process"):
        convert(tar, out)
    assert sorted(contents(out)) == ["x.array_record", "x.jsonl"] and len(records(out)) == 4


# Refusals


def test_tars_that_would_become_one_file_are_refused(tmp_path):
    tars = [shard(tmp_path / "a" / "0.tar"), shard(tmp_path / "b" / "0.tar", first=4)]
    for pair in (tars, [tars[0], shard(tmp_path / "a" / "0.tar.gz")]):
        with pytest.raises(ValueError, match=r"a/0.tar and .*0.tar.* would both become .*0.array_record") as error:
            convert(pair, tmp_path / "out")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    convert(tars[0], tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="made of another 0.tar than"):
        convert(tars[1], tmp_path / "out")
    data = bytearray(tars[0].read_bytes())
    data[600] ^= 1
    tars[0].write_bytes(data)
    with pytest.raises(ValueError, match="made of another 0.tar than"):
        convert(tars[0], tmp_path / "out")
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "0.jsonl").unlink()
    with pytest.raises(ValueError, match="not the report"):
        convert(tars[1], tmp_path / "out")
    # Somebody else's files of these names stay as they are.
    (tmp_path / "out" / "0.jsonl").write_text('{"mine": 1}\n')
    theirs = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="not the report"):
        convert(tars[1], tmp_path / "out")
    assert contents(tmp_path / "out") == theirs


def test_damaged_records_are_made_anew(tmp_path, caplog):
    tar, records = shard(tmp_path / "x.tar"), tmp_path / "out" / "x.array_record"
    convert(tar, tmp_path / "out")
    whole, data = contents(tmp_path / "out"), bytearray(records.read_bytes())
    data[len(data) // 2] ^= 1
    records.write_bytes(data)
    convert(tar, tmp_path / "out")
    assert contents(tmp_path / "out") == whole
    assert "is damaged (the content of x.array_record has changed): it is made anew" in caplog.text


def test_a_tar_that_grows_meanwhile_is_no_finished_one(tmp_path, monkeypatch):
    tar, decode = shard(tmp_path / "x.tar"), webdataset.decode_image

    def decode_and_grow(data):
        with tar.open("ab") as file:
            file.write(bytes(512))
        return decode(data)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"x.tar changed while it was read"):
        patch.setattr(webdataset, "decode_image", decode_and_grow)
        convert(tar, tmp_path / "out")
    assert not contents(tmp_path / "out")


def test_a_full_disk_costs_nothing_that_is_finished(tmp_path, monkeypatch):
    from array_record.python import array_record_module

    convert(shard(tmp_path / "a.tar"), tmp_path / "out")
    shard(tmp_path / "b.tar")
    before, real = contents(tmp_path / "out"), array_record_module.ArrayRecordWriter
    with monkeypatch.context() as patch:
        patch.setattr(array_record_module, "ArrayRecordWriter", lambda path, options: real("/dev/full", options))
        with pytest.raises(OSError, match="the disk is full: .*out.* give the same command again") as error:
            from_webdataset(f"{tmp_path}/*.tar", tmp_path / "out", threads=2)
        assert "\n" not in str(error.value)
    assert contents(tmp_path / "out") == before
    convert([tmp_path / "a.tar", tmp_path / "b.tar"], tmp_path / "out")
    assert len(records(tmp_path / "out")) == 8


def test_the_command_says_what_to_do(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match="no file matches .*x-"):
        from_webdataset(f"{tmp_path}/x-*", tmp_path / "out", threads=1)
    write_tar(tmp_path / "none.tar", [member("0.txt", b"text")])
    with pytest.raises(ValueError, match="no good image in 1 tars"):
        from_webdataset(f"{tmp_path}/none.tar", tmp_path / "out", threads=1)
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(OSError, match=r"folder\.tar"):
        from_webdataset(f"{tmp_path}/folder.tar", tmp_path / "out", threads=1)
    tar = shard(tmp_path / "cut.tar")
    os.truncate(tar, 3000)
    with caplog.at_level(logging.INFO, "vqrae_jax"):
        from_webdataset(str(tar), tmp_path / "out[1]", threads=1)
    assert "cut.tar is damaged" in caplog.text
    assert "1 images (1 with a label, 0 with a caption) in 1 files, 0 bad" in caplog.messages[-1]
    source = ArrayRecordSource(caplog.messages[-1].partition("array_record:")[2].rstrip("'"))
    assert len(source) == 1 and source[0].label == 10
