"""What the project does with input of each kind, short of arrays of models."""

import contextlib
import itertools
import os
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from vqrae_jax import cli
from vqrae_jax import config as config_lib
from vqrae_jax import main as main_verb
from vqrae_jax.config import Config, GeneratorConfig
from vqrae_jax.data import CodesSource, FolderSource, codes, decode_image, sources, webdataset
from vqrae_jax.data.sources import ArrayRecordSource
from vqrae_jax.data.transforms import random_resized_crop, resize_and_center_crop
from vqrae_jax.generator import build as generator_build
from vqrae_jax.generator import train_state as generator_state
from vqrae_jax.generator.task import GeneratorTask
from vqrae_jax.tokenizer import build, report, study, train_state
from vqrae_jax.tokenizer.task import TokenizerTask
from vqrae_jax.training import optim, sharding
from vqrae_jax.training.reporting import Reporter
from vqrae_jax.weights import huggingface, packed, pytorch, qwen3, siglip, tensors, text

RECORDS = 64  # of a file that are read


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def image(folder: Path, value: tuple[str, bytes]) -> None:
    how, data = value
    if how == "crop":
        random_resized_crop(data, np.random.default_rng(0), size=32)
    elif how == "centre":
        resize_and_center_crop(data, size=32)
    else:
        decode_image(data)


def encoder(folder: Path, value: tuple[dict[str, bytes], int | None, str]) -> None:
    files, image_size, final_norm = value
    write(folder, files)
    huggingface.read_encoder_spec(folder)
    huggingface.weight_files(folder)
    huggingface.load_encoder_params(folder, image_size=image_size, final_norm=final_norm)


def language_model(folder: Path, value: tuple[dict[str, bytes], str]) -> None:
    files, words = value
    write(folder, files)
    spec = qwen3.read_lm_spec(folder)
    text.load_text_tokenizer(folder, spec.vocabulary)(words)
    qwen3.load_lm_params(folder, spec)
    (folder / "out").mkdir()
    text.save_tokenizer(
        folder / "out", text=folder, first=spec.vocabulary, shown=["<code_0>"], special=["<begin>"], longest=8
    )


def siglip_heads(folder: Path, files: dict[str, bytes]) -> None:
    siglip.load_siglip_heads(write(folder, files))


def safetensors(folder: Path, value: tuple[bytes, dict[str, tuple[int, ...]]]) -> None:
    content, shapes = value
    write(folder, {packed.WEIGHTS: content})
    packed.read(
        folder,
        {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()},
        step=None,
        weights="ema",
    )


def pytorch_file(folder: Path, content: bytes) -> None:
    tensors.read(write(folder, {"model.pt": content}) / "model.pt")


def pytorch_model(folder: Path, value: tuple[str, bytes, str, int]) -> None:
    name, content, encoder, heads = value
    pytorch.read_model(write(folder, {name: content}) / name, encoder=encoder, decoder_heads=heads)


def tar(folder: Path, value: tuple[str, bytes]) -> None:
    name, content = value
    inside = folder / "inside"
    for _ in range(2):  # the second time it is finished
        list(webdataset.convert([write(inside, {name: content}) / name], inside / "out", threads=1))
    assert os.listdir(folder) == ["inside"] and set(os.listdir(inside)) == {name, "out"}


def tar_report(folder: Path, value: tuple[bytes, bytes]) -> None:
    content, damaged = value
    file = write(folder, {"a.tar": content}) / "a.tar"
    list(webdataset.convert([file], folder / "out", threads=1))
    (folder / "out" / "a.jsonl").write_bytes(damaged)
    list(webdataset.convert([file], folder / "out", threads=1))


def _read_all(source) -> None:
    """Every record, as the pipeline does: one that is refused is left out."""
    list(itertools.islice(itertools.chain.from_iterable(names for _, names in sources._local_names(source)), RECORDS))
    for index in range(min(len(source), RECORDS)):
        with contextlib.suppress(ValueError, OSError):
            record = source[index]
            sources.Record(record[0], np.int32(record.label), source.name(index), record.caption)


def array_record(folder: Path, content: bytes) -> None:
    write(folder, {"a.array_record": content})
    _read_all(ArrayRecordSource(f"{folder}/*"))


def codes_folder(folder: Path, files: dict[str, bytes]) -> None:
    source = CodesSource(write(folder, files))
    _read_all(source)
    for index in range(min(len(source), RECORDS)):
        with contextlib.suppress(ValueError, OSError):
            source[index].codes[0].astype(np.int32)
    codes.end(folder, source.description)
    config = config_lib.parse(config_lib.generator(), GeneratorConfig)
    generator_build.structure(config, generator_build.known_codes(config, source.description))


def image_folder(folder: Path, names: list[tuple[str, str]]) -> None:
    for name, kind in names:
        with contextlib.suppress(OSError, ValueError):  # not every name can be there
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(path):  # a pipe would take nothing
                continue
            if kind == "pipe":
                os.mkfifo(path)
            elif kind == "folder":
                path.mkdir()
            elif kind.startswith("link:"):
                path.symlink_to(kind[5:])
            else:
                path.write_bytes(b"none")
    source = FolderSource(folder)
    _read_all(source)
    sources.hold_out(source, 0.5)


def tokenizer_run(folder: Path, files: dict[str, bytes]) -> None:
    write(folder, files)
    (folder / "checkpoints" / "3").mkdir(parents=True)  # without arrays, which are not read
    config_lib.task_of(folder / "config.json")
    config = config_lib.load(folder / "config.json", Config)
    task = TokenizerTask(config, folder)
    task.abstract(_check(config, task.structure.params))
    task.bad_images.record(name="a", reason="b")
    task.bad_images.summary()
    report.curves(folder / "metrics.jsonl")
    Reporter(folder, config, unit="images", first_step=3, saved_lines=None).close()


def generator_run(folder: Path, files: dict[str, bytes]) -> None:
    write(folder, files)
    (folder / "checkpoints" / "3").mkdir(parents=True)
    config = config_lib.load(folder / "config.json", GeneratorConfig)
    task = GeneratorTask(config, folder)
    task.abstract(_check(config, task.structure.params))


def config(folder: Path, values: dict) -> None:
    _build(config_lib.parse(values))


def config_file(folder: Path, source: str) -> None:
    file = write(folder, {"configs/x.py": source.encode(errors="surrogatepass")}) / "configs" / "x.py"
    _build(config_lib.load_config(file))


def command_line(folder: Path, arguments: list[str]) -> None:
    """As `cli.run` parses them, which turns whatever fails there into a line."""
    given = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=given, lock_config=True)
    argv = ["main", *arguments]
    try:
        cli._check_config_flags(argv)
        given(argv)
        values = given["config"].value
    except Exception as error:
        raise ValueError("refused while flags are parsed") from error
    parsed = config_lib.parse(values)
    main_verb.default_workdir(config_flags.get_config_filename(given["config"]))
    _build(parsed)


def study_file(folder: Path, source: str) -> None:
    file = write(folder, {"study.py": source.encode(errors="surrogatepass")}) / "study.py"
    study.cells(study.read(str(file)), folder)


def _build(parsed: config_lib.Run) -> None:
    if isinstance(parsed, Config):
        _tokenizer(parsed)
    else:
        _generator(parsed, generator_build.planned_codes(parsed))


def _check(parsed: config_lib.Run, params) -> jax.sharding.Mesh:
    mesh = sharding.make_mesh(parsed.mesh)
    sharding.check_batch_size(mesh, parsed)
    for key in ("lr_multipliers", "end_lr_multipliers"):
        optim.check_patterns(params, getattr(parsed.optim, key), key=f"optim.{key}")
    return mesh


def _tokenizer(parsed: Config) -> None:
    structure = build.structure(parsed)
    train_state.abstract(parsed, structure, _check(parsed, structure.params))


def _generator(parsed: GeneratorConfig, known: generator_build.Codes) -> None:
    structure = generator_build.structure(parsed, known)
    generator_state.abstract(parsed, structure, _check(parsed, structure.params))


READERS = {
    name: reader
    for name, reader in list(globals().items())
    if callable(reader)
    and name
    in (
        "image",
        "encoder",
        "language_model",
        "siglip_heads",
        "safetensors",
        "pytorch_file",
        "pytorch_model",
        "tar",
        "tar_report",
        "array_record",
        "codes_folder",
        "image_folder",
        "tokenizer_run",
        "generator_run",
        "config",
        "config_file",
        "command_line",
        "study_file",
    )
}
