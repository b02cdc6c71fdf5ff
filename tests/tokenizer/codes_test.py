"""A data set as codes and back: what is written, what an interruption costs, and what is refused."""

import io
import json
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vqrae_jax
from tests.conftest import tiny
from tests.tiny import Run
from tests.training.distributed_test import finish, run_together
from tests.verbs import assert_one_line_error, command
from vqrae_jax import config as config_lib
from vqrae_jax.data import CodesSource, ten_crops, webdataset
from vqrae_jax.data import codes as data_codes
from vqrae_jax.tokenizer import codes, runs
from vqrae_jax.training.reporting import to_8_bits

IMAGES, BAD, BATCH = 19, 6, 4  # two whole shards of 8 and one of 3 images; of 18 good ones


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two runs of random weights that differ in one array, and a folder of images of which one is bad."""
    folder = tmp_path_factory.mktemp("codes")
    run = Run(config_lib.parse(tiny()))
    runs.write_run(folder / "run0", run.config, run.params, run.buffers)
    name = "decoder/pixels/bias"
    runs.write_run(folder / "run1", run.config, run.params | {name: run.params[name] + 1e-3}, run.buffers)
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        file = folder / "images" / "ab"[i > 9] / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(file)
        if i == BAD:
            file.write_text("this is no picture")
    return folder


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """Their codes."""
    tokenize(folder, folder / "whole")
    return folder / "whole"


def tokenize(folder: Path, out: Path, **changes) -> data_codes.Description:
    options = {"data": f"folder:{folder / 'images'}", "views": 1, "weights": "ema", "batch_size": BATCH,
               "shard_size": 7, "max_bad": None} | changes
    return codes.tokenize(folder / "run0", out=out, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def good_images(folder: Path) -> list[np.ndarray]:
    files = sorted((folder / "images").rglob("*.png"))
    return [vqrae_jax.read_images(file, 32)[0] for i, file in enumerate(files) if i != BAD]


def in_batches(images: list[np.ndarray], function) -> np.ndarray:
    """As many at once as the commands take, for on that the last bits depend."""
    padded = np.stack(images + [images[0]] * (-len(images) % BATCH))
    made = [np.asarray(function(padded[i:i + BATCH])) for i in range(0, len(padded), BATCH)]
    return np.concatenate(made)[:len(images)]


def test_there_and_back_is_the_reconstruction(folder, whole, tmp_path):
    model, images = vqrae_jax.load(folder / "run0"), good_images(folder)
    source = CodesSource(whole)
    records = [source[i] for i in range(len(source))]
    assert [record.codes.dtype for record in records] == [np.uint16] * (IMAGES - 1)
    np.testing.assert_array_equal([record.codes[0] for record in records], in_batches(images, model.encode_to_indices))
    good = [i for i in range(IMAGES) if i != BAD]
    assert [record.label for record in records] == [int(i > 9) for i in good]
    assert [Path(record.name).stem for record in records] == [f"{i:02d}" for i in good]
    # The bad one is named, and everything counted.
    *bad, counts = map(json.loads, (whole / "codes-00000-of-00003.jsonl").read_text().splitlines())
    assert [Path(line["name"]).stem for line in bad] == [f"{BAD:02d}"] and "not a readable image" in bad[0]["reason"]
    assert counts.keys() > {"file", "lines", "checksum"}
    assert {name: count for name, count in counts.items() if name not in ("file", "lines", "checksum")} == {
        "records": 7, "labels": 7, "captions": 0, "bad_images": 1}
    made = json.loads((whole / "codes.json").read_text())
    assert {name: made[name] for name in ("records", "labels", "captions", "bad_images", "num_classes", "grid",
                                          "codebook_size", "views", "shard_size")} == {
        "records": 18, "labels": 18, "captions": 0, "bad_images": 1, "num_classes": 2, "grid": [4, 4],
        "codebook_size": 32, "views": 1, "shard_size": 8}

    out = tmp_path / "images"
    assert codes.detokenize(folder / "run0", whole, out, batch_size=0) == 18
    files = sorted(out.glob("*.png"))
    assert [file.name for file in files] == [f"{number:08d}_{i:02d}.png" for number, i in enumerate(good)]
    expected = to_8_bits(in_batches(images, model.reconstruct))
    np.testing.assert_array_equal([np.asarray(Image.open(file)) for file in files], expected)
    # What is missing is made once more, and what is there left alone.
    before = contents(out)
    made_at = files[0].stat().st_mtime_ns
    files[-1].unlink()
    codes.detokenize(folder / "run0", whole, out, batch_size=0)
    assert contents(out) == before and files[0].stat().st_mtime_ns == made_at


def test_three_interruptions_leave_no_trace(folder, whole, tmp_path, monkeypatch):
    write_shard, end, out = data_codes.write_shard, data_codes.end, tmp_path / "out"

    def dies(*_):
        raise KeyboardInterrupt

    def second_dies(path, *arguments):
        if path.name.startswith("codes-00001"):
            path.with_name(f"{path.name}.{'0' * 32}.part").write_bytes(b"left by a process that was killed")
            raise KeyboardInterrupt
        write_shard(path, *arguments)

    for name, patched, shards in (("begin", dies, 0), ("write_shard", second_dies, 1), ("end", dies, 3)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(data_codes, name, patched)
            tokenize(folder, out)
        assert len(list(out.glob("*.array_record"))) == shards
        if shards:
            with pytest.raises(FileNotFoundError, match="give the command tokenize that made it once more"):
                CodesSource(out)
    kept = (out / "codes-00000-of-00003.array_record").stat().st_mtime_ns
    tokenize(folder, out)
    assert contents(out) == contents(whole)
    assert (out / "codes-00000-of-00003.array_record").stat().st_mtime_ns == kept
    assert end is data_codes.end


def test_a_full_disk_loses_nothing(folder, whole, tmp_path, monkeypatch):
    from array_record.python import array_record_module

    real = array_record_module.ArrayRecordWriter
    full = lambda path, options: real("/dev/full" if "codes-00001" in path else path, options)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is full: .* same command") as error:
        patch.setattr(array_record_module, "ArrayRecordWriter", full)
        tokenize(folder, tmp_path)
    assert "\n" not in str(error.value)
    assert "codes-00000-of-00003.array_record" in contents(tmp_path)
    tokenize(folder, tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_ten_views_of_captioned_images(folder, tmp_path):
    """A tar of WebDataset becomes records, and these become codes that have its captions."""
    rng, images = np.random.default_rng(0), []
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i in range(3):
            images.append(rng.integers(0, 256, (40, 48, 3), np.uint8))
            file = io.BytesIO()
            Image.fromarray(images[-1]).save(file, "PNG")
            for name, data in ((f"{i}.png", file.getvalue()), (f"{i}.txt", f"picture {i}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    list(webdataset.convert([tmp_path / "x.tar"], tmp_path / "records", threads=1))
    made = tokenize(folder, tmp_path / "codes", data=f"array_record:{tmp_path}/records/*.array_record", views=10,
                    batch_size=10)
    assert (made.records, made.captions, made.labels, made.num_classes) == (3, 3, 0, None)
    source, model = CodesSource(tmp_path / "codes"), vqrae_jax.load(folder / "run0")
    for i, image in enumerate(images):
        assert (source[i].label, source[i].caption) == (-1, f"picture {i}")
        np.testing.assert_array_equal(source[i].codes, model.encode_to_indices(ten_crops(image, size=32)))
    assert codes.detokenize(folder / "run0", tmp_path / "codes", tmp_path / "images", batch_size=16) == 30
    assert len(list((tmp_path / "images").glob("00000002_2_view?.png"))) == 10


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_does_not_belong_together_is_refused(folder, whole, tmp_path):
    with pytest.raises(ValueError, match="are of another tokenizer than that of .*run1, or it was trained on") as error:
        codes.detokenize(folder / "run1", whole, tmp_path / "images", batch_size=0)
    one_line(error)
    assert not (tmp_path / "images").exists()
    for change, says in (({"views": 10}, "other views"), ({"batch_size": 2}, "other batch_size"),
                         ({"data": "embedded"}, "other data, source, num_classes")):
        with pytest.raises(ValueError, match=f"holds files that were made with {says}"):
            tokenize(folder, whole, **change)
    with pytest.raises(FileNotFoundError, match=r"is no folder of codes, for it holds no codes.json"):
        codes.detokenize(folder / "run0", folder / "images", tmp_path / "images", batch_size=0)
    with pytest.raises(ValueError, match="unknown data 'codes:.*': give embedded, folder:PATH"):
        tokenize(folder, tmp_path / "again", data=f"codes:{whole}")


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "another's"])
def test_a_damaged_shard_is_named(damage, folder, whole, tmp_path):
    copy = Path(shutil.copytree(whole, tmp_path / "codes"))
    shard = copy / "codes-00001-of-00003.array_record"
    data = bytearray(shard.read_bytes())
    if damage == "cut":
        shard.write_bytes(data[:len(data) // 2])
    elif damage == "flipped":
        at = data.index(b"images/b")
        data[at] ^= 1
        shard.write_bytes(data)
    elif damage == "gone":
        shard.unlink()
    else:
        shutil.copy(copy / "codes-00002-of-00003.array_record", shard)
    with pytest.raises((ValueError, OSError), match="damaged|cannot read|lacks 1 of 3 files") as error:
        codes.detokenize(folder / "run0", copy, tmp_path / "images", batch_size=0)
    assert "codes" in one_line(error)
    assert "give the command tokenize that made it once more" in str(error.value)
    if damage == "flipped":
        tokenize(folder, copy)
        assert contents(copy) == contents(whole)
        shard.with_suffix(".jsonl").unlink()
        tokenize(folder, copy)
        assert contents(copy) == contents(whole)


def flags(folder: Path, out: Path) -> list[str]:
    return [f"--workdir={folder / 'run0'}", f"--data=folder:{folder / 'images'}", f"--out={out}",
            f"--batch_size={BATCH}", "--shard_size=7"]


@pytest.mark.slow
def test_two_processes_of_two_devices_equal_one_of_one(folder, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    first, second = finish(run_together("vqrae_jax.tokenize", 2, *flags(folder, tmp_path)))
    assert "18 images (18 with a label, 0 with a caption) as 4 x 4 codes" in first and "codes" not in second
    assert contents(tmp_path) == contents(whole)


DIES = """
import itertools, os, runpy, signal
from vqrae_jax.data import codes

serialize, records = codes.serialize_example, itertools.count(1)

def dies(features):
    if next(records) == int(os.environ["DIES_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return serialize(features)

codes.serialize_example = dies
runpy.run_module("vqrae_jax.tokenize", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_kill_9_at_three_random_records_leaves_no_trace(folder, whole, tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    out, rng = tmp_path / "out", np.random.default_rng()
    # Shards have 7, 8 and 3 good images, and those that are there are not made again.
    for shards, (first, last) in enumerate(((1, 7), (8, 15), (9, 11))):
        record = rng.integers(first, last, endpoint=True)
        killed = command("dies", *flags(folder, out), PYTHONPATH=str(tmp_path), DIES_AT=str(record))
        assert killed.returncode == -signal.SIGKILL, (record, killed.stderr)
        assert len(list(out.glob("*.array_record"))) == shards and list(out.glob("*.part"))
    again = command("vqrae_jax.tokenize", *flags(folder, out))
    assert again.returncode == 0, again.stderr
    assert "left out: 1 images that cannot be read" in again.stdout
    assert contents(out) == contents(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("run", "damage", "says"), [
    ("run1", "none", "are of another tokenizer than that of "),
    ("run0", "gone", "lacks 1 of 3 files of codes, for example codes-00001-of-00003.array_record: give the command "),
    ("run0", "flipped", "array_record has changed): give the command tokenize that made it once more"),
])
def test_detokenize_fails_in_one_line(run, damage, says, folder, whole, tmp_path):
    shard = Path(shutil.copytree(whole, tmp_path / "codes")) / "codes-00001-of-00003.array_record"
    if damage == "gone":
        shard.unlink()
    if damage == "flipped":
        shard.write_bytes(shard.read_bytes().replace(b"images/b", b"images/c", 1))
    result = command("vqrae_jax.detokenize", f"--workdir={folder / run}", f"--codes={shard.parent}",
                     f"--out={tmp_path / 'images'}")
    assert_one_line_error(result, says)
