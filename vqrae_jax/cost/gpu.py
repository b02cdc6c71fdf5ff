"""What one GPU does with our models: a table of rows for `bench`, and what only a GPU can answer.

`launch/measure_gpu.sh` measures them one after the other. Rows of time and memory are `bench` cases; "parity" compares
the GPU with the CPU, and "determinism" runs with each other.

The two are a program of their own, `python -m vqrae_jax.cost.gpu JSON`. The JSON holds `what`, "parity" or "losses",
`file` and `changes` (a config) and `deterministic`; it prints JSON.
"""

import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax import config as config_lib
from vqrae_jax.config import Config
from vqrae_jax.cost import bench
from vqrae_jax.foreign import one_line
from vqrae_jax.models import flat
from vqrae_jax.tokenizer import build, init
from vqrae_jax.tokenizer.inference import Tokenizer
from vqrae_jax.training import compilation, sharding

STEPS = 5  # of which "determinism" compares the losses


class Row(NamedTuple):
    """What is measured of a config.

    Attributes:
      case: of `bench`, "parity" or "determinism".
      divisor: of the batch.
      pixels: losses of pixels, codes and features alone, without perceptual networks: what pytorch.py has.
      plain_attention: without cuDNN's.
    """

    case: str
    divisor: int = 1
    pixels: bool = False
    plain_attention: bool = False


ROWS = {  # the most important first; batches are such that both frameworks fit 80 GB at once
    "train_stage1_pixels": Row("train_stage1", pixels=True),
    "parity": Row("parity", divisor=8),
    "encode": Row("encode", pixels=True),
    "decode": Row("decode", pixels=True),
    "search": Row("search", pixels=True),
    "train_stage1_plain_attention": Row("train_stage1", pixels=True, plain_attention=True),
    "train_stage2_gan": Row("train_stage2_gan", divisor=2),
    "train_stage2_pixels": Row("train_stage2", divisor=4, pixels=True),
    "determinism": Row("determinism", divisor=8),
    "train_stage1": Row("train_stage1"),
    "train_stage2": Row("train_stage2", divisor=2),
}


def rows(files: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """All rows of several configs, the most important first: name of config and row, the config's file, the row."""
    for name in ROWS:
        for file in files[:1] if name == "search" else files:  # it has codes of the same width whatever the config
            yield f"{Path(file).stem} {name}", file, name


def measure(file: str, name: str, *, batch: int, repeats: int, against: str | None,
            seconds: float) -> dict[str, Any]:
    """What is found for a row, to be written as JSON.

    Args:
      file: of the config.
      name: one of `ROWS`.
      batch: images, before the row's divisor.
      repeats: runs that count.
      against: as for `bench.measure`.
      seconds: after which it is given up.

    Raises:
      ValueError: it cannot be measured, or not in time; the message is one line.
    """
    row = ROWS[name]
    changes = {"model.encoder.random_weights": True, "loss.perceptual.random_weights": True, "train.accumulate": 1,
               "train.batch_size": max(1, batch // row.divisor), "model.remat": "minimal"}
    if row.pixels:
        changes["loss.perceptual_weight"] = 0.0
    measured = {"batch": changes["train.batch_size"]}
    if row.case == "parity":
        [found] = _children("parity", file, changes | {"model.dtype": "float32"}, (False,), seconds)
        return measured | found
    if row.case == "determinism":
        runs = _children("losses", file, changes, (True, True, False, False), seconds)
        return measured | {"deterministic": _agreement(*runs[:2]), "default": _agreement(*runs[2:])}
    config = config_lib.load_config(file, **changes)
    command = [sys.executable, "-m", "vqrae_jax.bench", f"--config={file}", f"--child={row.case}",
               f"--batch={measured['batch']}", *(f"--config.{key}={value}" for key, value in changes.items()),
               f"--{'' if row.plain_attention else 'no'}plain_attention"]
    if row.plain_attention or not row.pixels or row.case not in bench.AGAINST:
        against = None
    absent = against is not None and importlib.util.find_spec("torch") is None
    result = bench.measure(config, row.case, command, repeats=repeats, against=None if absent else against,
                           seconds=seconds)
    return measured | result | ({"torch_error": "no PyTorch"} if absent else {})


def line(name: str, result: dict[str, Any]) -> str:
    """What was found for a row, or why nothing was, as one line of text."""
    if "error" in result:
        text = result["error"]
    elif "search_equal" in result:
        codes = ", ".join(f"{precision}: features within {found['features']:.1e}, pixels {found['pixels']:.1e}, "
                          f"{found['codes_equal']:.3%} of the codes equal"
                          for precision, found in result.items() if isinstance(found, dict))
        text = f"{result['search_equal']:.3%} of {result['codes']} indices equal for equal features; {codes}"
    elif "deterministic" in result:
        text = "; ".join(f"{kind}: losses {'equal' if found['losses'] else 'differ'}, weights "
                         f"{'equal' if found['weights'] else 'differ'} after {STEPS} steps"
                         for kind, found in result.items() if isinstance(found, dict))
    else:
        text = f"{result['batch']:4d} at once {bench.line('', result).strip()}"
    return f"{name:55s} {text}"


def _children(what: str, file: str, changes: dict[str, Any], deterministic: Sequence[bool],
              seconds: float) -> list[dict[str, Any]]:
    """What several processes of this program find, which run at the same time."""
    jobs = [json.dumps({"what": what, "file": file, "changes": changes, "deterministic": is_deterministic})
            for is_deterministic in deterministic]
    children = [bench.Child([sys.executable, "-m", "vqrae_jax.cost.gpu", job], what, seconds=seconds,
                            environment={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}) for job in jobs]
    try:
        return [json.loads(child.read()) for child in children]
    finally:
        for child in children:
            child.stop()


def _agreement(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {"losses": one["losses"] == other["losses"], "weights": one["weights"] == other["weights"],
            "runs": [one["losses"], other["losses"]]}


def _images(config: Config) -> np.ndarray:
    size = config.data.image_size
    return np.random.default_rng(0).integers(0, 256, (config.train.batch_size, size, size, 3), np.uint8)


def parity(config: Config) -> dict[str, Any]:
    """The same float32 weights and images on the first device and on the CPU.

    Features and pixels are compared by their largest difference, features relative to their root mean square. "default"
    multiplies as JAX does by itself, on GPUs in TF32, and "highest" in float32. `search_equal` is the share of equal
    indices for the CPU's features.
    """
    images, structure = _images(config), build.structure(config)
    params, buffers = init.model_arrays(config, structure, sharding.one_device())
    arrays = sharding.off_mesh(params | buffers)
    places = (jax.devices("cpu")[0], jax.local_devices()[0])
    models = [Tokenizer(config, structure.graphdef, jax.device_put(arrays, place)) for place in places]
    found: dict[str, Any] = {"device": places[1].device_kind}
    for precision in ("default", "highest"):
        with jax.default_matmul_precision(precision):
            (cpu, features), (codes, others) = ([np.asarray(f(model)) for model in models] for f in (
                lambda model: model.features(images), lambda model: model.encode_to_indices(images)))
            pixels = [np.asarray(model.decode_from_indices(codes)) for model in models]
        found[precision] = {
            "features": float(np.abs(cpu - features).max() / np.sqrt(np.mean(cpu**2))),
            "pixels": float(np.abs(pixels[0] - pixels[1]).max()), "codes_equal": float(np.mean(codes == others))}
    search = jax.jit(lambda arrays, z: flat.merge(structure.graphdef, arrays).quantizer(z, train=False).indices)
    indices = [np.asarray(search(jax.device_put(arrays, place), jax.device_put(cpu, place))) for place in places]
    return found | {"codes": codes.size, "search_equal": float(np.mean(indices[0] == indices[1]))}


def losses(config: Config) -> dict[str, Any]:
    """The losses of a few steps with everything that learns, as hexadecimal floats, and a checksum of the weights."""
    step, state = bench.training(bench.stage(config, "train_stage2_gan"), _images(config))
    found = []
    for _ in range(STEPS):
        state, metrics = step(state)
        found.append(float(metrics["loss/total"]).hex())
    bits = lambda x: jnp.sum(jax.lax.bitcast_convert_type(x, jnp.uint32))
    return {"losses": found, "weights": {path: int(bits(value)) for path, value in state.params.items()}}


def main() -> None:
    job = json.loads(sys.argv[1])
    if job["deterministic"]:
        compilation.deterministic()
    config = config_lib.load_config(job["file"], **job["changes"])
    assert isinstance(config, Config)
    try:
        print(json.dumps({"parity": parity, "losses": losses}[job["what"]](config)), flush=True)
    except RuntimeError as error:  # of XLA, above all where memory is full: many lines
        sys.exit(one_line(error))


if __name__ == "__main__":
    main()
