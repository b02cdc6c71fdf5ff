"""The measurements of one GPU, on the CPU with a tiny model."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REFERENCE, REPOSITORY
from vqrae_jax import config as config_lib
from vqrae_jax.cost import bench, gpu

TINY = f'''
from configs import nano_stage1

def get_config():
    config = nano_stage1.get_config()
    config.model.encoder.path = "{REFERENCE / "siglip_vision"}"
    config.model.quantizer.update(size=32, dim=16)
    config.data.image_size = 32
    config.mesh.fsdp = FSDP
    return config
'''
SERVES = 'import sys; print("cpu\\n4", flush=True); [print(0.5, flush=True) for _ in sys.stdin]; print("7\\tcpu\\t1")'


@pytest.fixture
def tiny(tmp_path):
    """A function that writes a config and gives its file."""

    def write(name: str, fsdp: int = 1) -> str:
        file = tmp_path / f"{name}.py"
        file.write_text(TINY.replace("FSDP", str(fsdp)))
        return str(file)

    return write


def run(tmp_path, *arguments: str) -> tuple[list[str], dict]:
    """Lines that are printed, and what is written."""
    done = subprocess.run([sys.executable, "launch/measure_gpu.py", f"--json={tmp_path / 'gpu.json'}", *arguments],
                          cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), json.loads((tmp_path / "gpu.json").read_text())


def test_a_row_that_fails_says_so_and_what_is_there_is_kept(tiny, tmp_path):
    broken, works = tiny("broken", fsdp=-7), tiny("works")
    arguments = [f"--config={broken}", f"--config={works}", "--batch=8", "--only=encode"]
    lines, found = run(tmp_path, *arguments, "--seconds=0")
    assert list(found["rows"]) == ["broken encode", "works encode"] and found["versions"]["jax"]
    assert all("not run" in row["error"] for row in found["rows"].values())
    kept = found["rows"]["works encode"] = {"batch": 8, "seconds": 2, "images_per_second": 4, "peak_bytes": 7}
    (tmp_path / "gpu.json").write_text(json.dumps(found))
    lines, found = run(tmp_path, *arguments)
    assert "mesh.fsdp" in found["rows"]["broken encode"]["error"] and "mesh.fsdp" in lines[0]
    assert found["rows"]["works encode"] == kept and "4.00 images/s" in lines[1]


@pytest.mark.slow
def test_every_row_can_be_measured(tiny, tmp_path):
    lines, found = run(tmp_path, f"--config={tiny('works')}", "--batch=8", "--repeats=1", "--against=torch",
                       "--seconds=3000")
    assert not [row for row in found["rows"].values() if "error" in row], lines
    assert len(lines) == len(gpu.ROWS)
    parity, determinism = (found["rows"][f"works {name}"] for name in ("parity", "determinism"))
    assert parity["search_equal"] == parity["highest"]["codes_equal"] == 1
    assert determinism["deterministic"]["losses"] and determinism["deterministic"]["weights"]


def test_parity_sees_a_difference(tiny, monkeypatch):
    features, wrong_by = gpu.Tokenizer.features, iter((0.0, 0.1, 0.0, 0.0))  # the last two are at highest precision
    monkeypatch.setattr(gpu.Tokenizer, "features", lambda self, images: features(self, images) + next(wrong_by))
    found = gpu.parity(config_lib.load_config(tiny("works"), **{"train.batch_size": 2}))
    assert found["default"]["features"] > 0.01
    assert (found["highest"]["features"], found["highest"]["codes_equal"], found["search_equal"]) == (0, 1, 1)


def test_where_pytorch_fails_our_figures_stay(tiny, monkeypatch):
    config = config_lib.load_config(tiny("works"))
    monkeypatch.setattr(bench, "pytorch_job", lambda *_, **__: {"case": "encode"})
    result = bench.measure(config, "encode", [sys.executable, "-c", SERVES], repeats=2, against="torch")
    assert (result["images_per_second"], result["peak_bytes"], result["runs"]) == (8, 7, [0.5, 0.5])
    assert result["torch_error"].startswith("torch, encode, ended with exit code 1: ")
    assert "ratio" not in result and result["torch_error"] in bench.line("encode", result)


def test_a_case_that_hangs_is_ended():
    child = bench.Child([sys.executable, "-c", "import time; time.sleep(600)"], "it", seconds=0.2)
    with pytest.raises(ValueError, match="it had not finished after 0 s"):
        child.read()
    child.stop()
