"""The generator on meshes of eight simulated devices, in a process of their own."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.generator.tiny import CODES, batch, parsed, tiny
from tests.training.sharding_test import in_a_process_with_eight_devices
from vqrae_jax.generator import build, init, loss, train_state
from vqrae_jax.generator.inference import Generator
from vqrae_jax.generator.runs import Loaded
from vqrae_jax.training import sharding

STEPS = 3
MESHES = {"two": ((1, 1), (4, 2)), "others": ((1, 1), (8, 1), (1, 8))}


def train(mesh_shape: tuple[int, int]) -> dict:
    """Metrics of each step, how much of the moments of kernels and embeddings is on a device, and samples."""
    config = tiny()
    config.mesh.update(data=mesh_shape[0], fsdp=mesh_shape[1])
    config.model.update(width=64, mlp_dim=64, heads=8, kv_heads=8, dropout=0.1)
    config = parsed(config)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:mesh_shape[0] * mesh_shape[1]])
    structure = build.structure(config, CODES)
    state, frozen = train_state.made(config, mesh, init.params(config, structure, mesh))
    step = sharding.jit_step(loss.make_train_step(config, structure), mesh, state)
    shares = {path: array.size / array.addressable_shards[0].data.size for path, array in state.opt_state[1].mu.items()
              if path.endswith(("kernel", "embedding"))}
    # Before the step takes the state's arrays for the next one.
    params = jax.tree.map(lambda value: 20 * value, {**frozen.params, **state.params})
    codes = Generator(Loaded(config, None, structure, params), mesh).sample(8, cfg=2.0, top_k=9)
    given, seen = sharding.put_batch(mesh, batch(8)), []
    for _ in range(STEPS):
        state, metrics = step(state, frozen, given)
        seen.append({name: float(value) for name, value in metrics.items()})
    return {"metrics": seen, "shares": shares, "codes": np.asarray(codes).tolist()}


@pytest.mark.slow
@pytest.mark.parametrize("meshes", MESHES)
def test_losses_and_samples_are_the_same_on_every_mesh(meshes, tmp_path):
    out = tmp_path / "runs.json"
    in_a_process_with_eight_devices(meshes, out, module="tests.generator.sharding_test")
    runs = {tuple(mesh): run for mesh, run in json.loads(out.read_text())}
    for (_, fsdp), run in runs.items():
        for ours, theirs in zip(run["metrics"], runs[1, 1]["metrics"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        assert set(run["shares"].values()) == {fsdp}
        assert run["codes"] == runs[1, 1]["codes"]


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps([(mesh, train(mesh)) for mesh in MESHES[sys.argv[1]]]))
