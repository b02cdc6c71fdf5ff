"""What the plan verb says, of a tiny model on a real TPU slice's compiler where it is installed."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import REFERENCE, REPOSITORY
from tests.verbs import command
from vqrae_jax import config as config_lib
from vqrae_jax.cost import plan

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                    reason="the TPU compiler is not installed: pip install 'vqrae_jax[tpu]'")
FLAGS = ["--config=configs/nano_stage2.py", f"--config.model.encoder.path={REFERENCE / 'siglip_vision'}",
         "--config.data.image_size=32", "--config.model.quantizer.size=64", "--config.mesh.data=2",
         "--config.mesh.fsdp=2"]


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return command("vqrae_jax.plan", *flags)


@needs_compiler
def test_a_step_is_compiled_for_a_slice_that_is_not_there(tmp_path):
    process = run(*FLAGS, "--topology=v5e:2x2", "--batch=16", f"--json={tmp_path / 'plan.json'}")
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "plan.json").read_text())
    assert result.keys() >= {"chips", "batch", "hbm_gib_per_chip", "hbm_limit_gib", "fits", "compile_seconds",
                             "model_flops_per_image", "parameters"}
    assert (result["chips"], result["batch"], result["fits"]) == (4, 16, True)
    assert result["mesh"] == {"data": 2, "fsdp": 2}
    assert 0 < result["hbm_gib_per_chip"] < 1
    assert result["collective_gib_per_step"]["all-gather"] > 0  # parameters that are split
    assert result["collective_gib_per_step"]["all-reduce"] > 0  # gradients
    assert "fits" in process.stdout


def test_gpus_are_estimated_without_a_compiler(tmp_path):
    process = run(*FLAGS, "--topology=h100:4", "--batch=16", f"--json={tmp_path / 'plan.json'}")
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "plan.json").read_text())
    assert (result["estimated"], result["chip"], result["chips"]) == (True, "NVIDIA H100 80GB HBM3", 4)
    assert (result["mesh"], result["fits"]) == ({"data": 2, "fsdp": 2}, True)
    parts = [result[name] for name in ("parameters_gib", "optimizer_gib", "temporaries_gib")]
    assert min(parts) > 0 and result["hbm_gib_per_chip"] == pytest.approx(sum(parts))
    assert "estimated" in process.stdout


@needs_compiler
def test_what_does_not_fit_says_by_how_much():
    process = run(*FLAGS, "--topology=v5e:2x2", "--batch=262144")
    assert process.returncode == 0, process.stderr
    needed = float(re.search(r"([\d.]+) of 16 GiB, does not fit", process.stdout)[1])
    assert needed > 16


def test_search_goes_from_the_fastest_to_the_most_frugal():
    assert [(c.train.accumulate, c.model.remat, c.mesh.fsdp) for c in plan.candidates(config_lib.Config(), 4)][:7] == [
        (1, "minimal", 1), (1, "minimal", 2), (1, "minimal", 4), (1, "full", 1), (1, "full", 2), (1, "full", 4),
        (2, "minimal", 1)]


@pytest.mark.parametrize(("flags", "says"), [
    (["--topology=v5e:3x3"], "--topology=v5e:3x3: "),
    (["--topology=nonsense"], "--topology=nonsense: "),
    (["--topology=h100"], "--topology=h100: how many GPUs? They look like h100:8"),
    (["--topology=v5e:2x2", "--json=/no/where.json"], "--json=/no/where.json: there is no folder /no"),
    pytest.param(["--topology=v3:2x2"], "--topology=v3:2x2: 'TPU v3' cannot be planned", marks=needs_compiler),
    pytest.param(["--topology=v4:2x2x1"], "--topology=v4:2x2x1: 'TPU v4' cannot be planned", marks=needs_compiler),
])
def test_a_slice_that_does_not_exist_is_named(flags, says):
    process = run(*FLAGS, *flags)
    assert process.returncode == 1
    assert says in process.stderr
    assert process.stderr.strip().splitlines()[-1].startswith("error: ")


def test_bytes_that_chips_send_are_counted_with_the_trips_of_loops():
    """A loop of 5 trips that gathers 4 KiB, and an addition of 1 KiB over all devices."""
    script = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from vqrae_jax.cost import plan
mesh = jax.make_mesh((8,), ("fsdp",), (AxisType.Auto,))
at = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
whole = lambda w: jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
def f(x, w):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ whole(w)), None), x, w)
    return x.sum(0)
step = jax.jit(f, out_shardings=NamedSharding(mesh, P()))
compiled = step.lower(at((64, 32), "fsdp"), at((5, 32, 32), None, "fsdp")).compile()
print(plan.collective_bytes(compiled.as_text()))
"""
    process = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, text=True, capture_output=True, check=True,
                             env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"})
    assert process.stdout.strip() == str({"all-gather": 5 * 7 * 32 * 4 * 4, "all-reduce": 2 * 32 * 4})


def test_each_transfer_is_counted_once_and_with_all_its_arrays():
    """As compilers write them: several arrays in one, a result cut inside a fusion, one transfer in two fusions."""
    hlo = """HloModule step

%start (p: f32[4,32]) -> (f32[4,32], f32[16,32]) {
  %p = f32[4,32]{1,0:T(8,128)} parameter(0)
  %gathered = f32[16,32]{1,0:T(8,128)} all-gather(%p), channel_id=1, dimensions={0}
  ROOT %sent = (f32[4,32]{1,0}, f32[16,32]{1,0}) custom-call(%gathered), custom_call_target="AsyncCollectiveStart"
}

%done (p.1: f32[4,32]) -> f32[16,32] {
  %p.1 = f32[4,32]{1,0:T(8,128)} parameter(0)
  ROOT %gathered.1 = f32[16,32]{1,0:T(8,128)} all-gather(%p.1), channel_id=1, dimensions={0}
}

%all-reduce-scatter.1 (p.2: f32[16,32]) -> f32[4,32] {
  %p.2 = f32[16,32]{1,0} parameter(0)
  %summed = f32[16,32]{1,0} all-reduce(%p.2), channel_id=2, to_apply=%add
  ROOT %cut = f32[4,32]{1,0} dynamic-slice(%summed), dynamic_slice_sizes={4,32}
}

ENTRY %main (x: f32[4,32], y: bf16[8]) -> f32[] {
  %x = f32[4,32]{1,0} parameter(0)
  %y = bf16[8]{0} parameter(1)
  %first = (f32[4,32]{1,0}, f32[16,32]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %second = f32[16,32]{1,0} fusion(%x), kind=kCustom, calls=%done
  %scattered = f32[4,32]{1,0} fusion(%second), kind=kCustom, calls=%all-reduce-scatter.1
  %part = f32[1,32]{1,0} reduce-scatter(%scattered), channel_id=3, dimensions={0}, to_apply=%add
  %both = (f32[4,32]{1,0}, bf16[8]{0}) all-reduce(%x, %y), channel_id=4, to_apply=%add
  %again = (f32[4,32]{1,0}, f32[16,32]{1,0}) all-gather-start(%x), channel_id=5, dimensions={0}
}
"""
    gathered, cut, scattered = 3 * 4 * 32 * 4, 16 * 32 * 4, 3 * 32 * 4
    assert plan.collective_bytes(hlo) == {
        "all-gather": 2 * gathered, "all-reduce": 2 * (4 * 32 * 4 + 8 * 2), "reduce-scatter": cut + scattered}
