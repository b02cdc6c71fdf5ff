"""One program on every mesh: eight simulated devices, in a process of their own."""

import functools
import json
import os
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests import exact_search
from tests.conftest import REPOSITORY, optimizations
from vqrae_jax import config as config_lib
from vqrae_jax.models import flat
from vqrae_jax.models.quantizers.search import kmeans, search_exactly
from vqrae_jax.tokenizer import build, init, train_state
from vqrae_jax.tokenizer.inference import decode_codes
from vqrae_jax.tokenizer.loss import make_train_step
from vqrae_jax.training import checkpoint, sharding

STEPS, BATCH, TOKENS, CODES = 20, 16, 16 * 16, 48
KINDS = {
    "simvq": {"meshes": ((1, 1), (2, 4), (1, 8)), "accumulate": 1, "quantizer": {"kind": "simvq", "dim": 40}},
    "simvq, more meshes": {"meshes": ((1, 1), (8, 1), (4, 2)), "accumulate": 1,
                           "quantizer": {"kind": "simvq", "dim": 40}},
    "ema": {"meshes": ((1, 1), (2, 4)), "accumulate": 2,
            "quantizer": {"kind": "ema", "dim": 32, "restart_threshold": 0.5}},
}
MOVES = {"move": ((1, 1), (1, 8), (2, 4), (1, 1)), "move on": ((1, 1), (2, 1), (8, 1), (1, 2), (1, 1))}
LONG = {"simvq, more meshes", "move on"}


def make_config(values: dict, *, kind: str, mesh: tuple[int, int]) -> config_lib.Config:
    """Everything that is sharded takes part: a learning encoder with its teacher, averages, a codebook."""
    values["train"].update(steps=STEPS, batch_size=BATCH, log_every=1, accumulate=KINDS[kind]["accumulate"])
    values["model"]["quantizer"].update(size=CODES, **KINDS[kind]["quantizer"])
    values["loss"]["distill_weight"] = 1.0
    values["optim"]["lr_multipliers"] = []
    values["mesh"].update(data=mesh[0], fsdp=mesh[1])
    return config_lib.parse(values)


def make_mesh(config: config_lib.Config) -> jax.sharding.Mesh:
    return sharding.make_mesh(config.mesh, jax.devices()[:config.mesh.data * config.mesh.fsdp])


def start(config: config_lib.Config):
    """The step, compiled, and what it is called with."""
    mesh = make_mesh(config)
    structure = build.structure(config)
    state, frozen = train_state.made(config, structure, mesh, *init.model_arrays(config, structure, mesh), {}, {})
    images = np.random.default_rng(0).integers(0, 256, (BATCH, 32, 32, 3), np.uint8)
    batch = sharding.put_batch(mesh, {"image": images})
    step = sharding.jit_step(make_train_step(config, structure, phase=""), mesh, state)
    return step.trace(state, frozen, batch).lower().compile(), state, frozen, batch


def train(config: config_lib.Config) -> dict:
    """Losses and uses of codes of each step, indices at the end, and the compiled step."""
    compiled, state, frozen, batch = start(config)
    mesh, graphdef = make_mesh(config), build.structure(config).graphdef
    losses, counts = [], []
    for _ in range(STEPS):
        state, metrics = compiled(state, frozen, batch)
        losses.append({name: float(value) for name, value in metrics.items() if name.startswith("loss/")})
        counts.append(state.code_counts.tolist())
    encode = jax.jit(sharding.on(mesh, lambda arrays, images: flat.merge(graphdef, arrays).encode(images)[1]))
    arrays = {**state.params, **state.buffers}
    indices = encode(arrays, batch["image"])
    images = jax.jit(sharding.on(mesh, functools.partial(decode_codes, graphdef)))(arrays, indices)
    cluster = jax.jit(sharding.on(mesh, lambda tokens: kmeans(tokens, CODES, rng=jax.random.key(0))))
    tokens = jax.ShapeDtypeStruct((TOKENS, 8), jnp.float32, sharding=sharding.batch_sharding(mesh))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 3]
    return {"losses": losses, "counts": counts, "indices": np.asarray(indices).tolist(),
            "brightness": np.asarray(images).mean((1, 2, 3)).tolist(),
            "decoded_at_once": images.sharding.shard_shape(images.shape)[0], "hlo": compiled.as_text(),
            "kmeans": cluster.lower(tokens).compile().as_text(),
            "moments": [leaf.shape for leaf in moments],
            "shard_shapes": [leaf.sharding.shard_shape(leaf.shape) for leaf in moments]}


def move(configs: list[config_lib.Config], folder: Path) -> None:
    """Saves a state and what is frozen from each mesh and restores both on the next: not a bit may change.

    What is frozen can as well be read in the types that a step takes.
    """
    compiled, state, frozen, batch = start(configs[0])
    state, _ = compiled(state, frozen, batch)
    expected = jax.device_get((state, frozen))
    for i, config in enumerate(configs[1:]):
        checkpoint.save_frozen(folder / str(i), frozen)
        with closing(checkpoint.Checkpoints(folder / str(i))) as checkpoints:
            checkpoints.save(1, train_state.items(state), {"next_batch": 1}, [])
        mesh = make_mesh(config)
        structure = build.structure(config)
        abstract, abstract_frozen = train_state.abstract(config, structure, mesh)
        with closing(checkpoint.Checkpoints(folder / str(i))) as checkpoints:
            items, *_ = checkpoints.restore(1, train_state.items(abstract))
        state = train_state.from_items(items)
        frozen = checkpoint.load_frozen(folder / str(i), abstract_frozen)
        chex.assert_trees_all_equal(jax.device_get((state, frozen)), expected)
        used = train_state.in_training(config, structure, mesh)[1]
        cast, read = sharding.cast(frozen, used), checkpoint.load_frozen(folder / str(i), used)
        assert jnp.dtype(jnp.bfloat16) in {leaf.dtype for leaf in jax.tree.leaves(cast)}
        chex.assert_trees_all_equal(jax.device_get(cast), jax.device_get(read))
        assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves((state, frozen, cast, read)))
        chex.assert_trees_all_equal(*(jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (cast, read)))


def search() -> None:
    """The search of accelerators finds on eight devices what float64 does, and only counts travel between them."""
    z, codes = exact_search.draw("random", TOKENS, 12, CODES, np.random.default_rng(0))
    mesh = sharding.make_mesh(config_lib.Mesh(data=2, fsdp=4), jax.devices())
    exactly = functools.partial(search_exactly, metric="euclidean", block_tokens=TOKENS // 2)
    compiled = jax.jit(sharding.on(mesh, exactly)).lower(sharding.put_batch(mesh, z), codes).compile()
    np.testing.assert_array_equal(compiled(sharding.put_batch(mesh, z), codes),
                                  exact_search.float64_search(z, codes, "euclidean"))
    collectives = r"= (\S+) (?:all-reduce|all-gather|all-to-all|collective-permute)\("
    moved = set(re.findall(collectives, str(compiled.as_text())))
    assert moved == {"u32[]"}


def in_a_process_with_eight_devices(*arguments: object, module: str = "tests.training.sharding_test") -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True,
                   env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
                   cwd=REPOSITORY)


def marked(kinds):
    return [pytest.param(kind, marks=[pytest.mark.long] if kind in LONG else []) for kind in kinds]


@pytest.fixture(scope="module", params=marked(sorted(KINDS)))
def on_each_mesh(request, tmp_path_factory):
    """What `train` returns on each mesh."""
    out = tmp_path_factory.mktemp("sharding") / "runs.json"
    in_a_process_with_eight_devices(request.param, out)
    return {tuple(mesh): run for mesh, run in json.loads(out.read_text())}


def test_arrays_are_drawn_to_the_bits_that_an_optimized_program_draws():
    """`made` asks LLVM for less than users' other programs get."""
    key = jax.random.key(0)
    draw = lambda: {"kernel": jax.random.truncated_normal(key, -2, 2, (100, 64)),
                    "bias": jax.random.normal(key, (64,)), "codes": jax.random.uniform(key, (1001, 7), minval=-1)}
    with optimizations(on=True):
        chex.assert_trees_all_equal(sharding.made(draw, sharding.one_device(), sharding.RULES), jax.jit(draw)())


def test_losses_and_codes_are_the_same_on_every_mesh(on_each_mesh):
    expected = on_each_mesh[1, 1]
    for run in on_each_mesh.values():
        for ours, theirs in zip(run["losses"], expected["losses"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        assert run["counts"] == expected["counts"]
        assert run["indices"] == expected["indices"]
        assert run["brightness"] == pytest.approx(expected["brightness"], rel=1e-5)


def test_no_device_ever_holds_all_of_what_is_split(on_each_mesh):
    for (data, fsdp), run in on_each_mesh.items():
        assert run["decoded_at_once"] == BATCH // (data * fsdp)
        for shape, shard in zip(run["moments"], run["shard_shapes"], strict=True):
            assert np.prod(shard) * fsdp == np.prod(shape)
            if fsdp > 1:  # a layer at a time is gathered, never the stack of all
                whole = re.escape(f"f32[{','.join(map(str, shape))}]")
                assert not re.search(rf"= [^=]*{whole}[^=]* all-gather", run["hlo"])
        scores = set(re.findall(rf"f32\[(\d+),{CODES}\]", run["hlo"]))
        assert scores, "the search left no matrix of scores in the program: this test looks in the wrong place"
        assert max(map(int, scores)) <= TOKENS // (data * fsdp)
        compared = re.findall(rf"f32\[(\d+),{CODES}\]\S* dot\(", run["kmeans"])
        assert set(map(int, compared)) == {TOKENS // (data * fsdp)}


@pytest.mark.parametrize("moves", marked(MOVES))
def test_a_checkpoint_moves_between_meshes_bit_by_bit(moves, tmp_path):
    in_a_process_with_eight_devices(moves, tmp_path)
    assert len(list(tmp_path.glob("*/checkpoints/1"))) == len(MOVES[moves]) - 1


def test_the_search_of_accelerators_is_the_same_on_a_mesh():
    in_a_process_with_eight_devices("search")


def test_every_axis_and_rule_says_what_it_means():
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"))
    rules = train_state.rules(config_lib.Config(model=config_lib.Model(quantizer=config_lib.Quantizer(kind="ema"))))
    spec = lambda name, shape: sharding.of(mesh, {name: jax.ShapeDtypeStruct(shape, jnp.float32)}, rules)[name].spec
    kernel = "decoder/transformer/blocks/mlp/fc1/kernel"
    assert spec(f"opt_state/1/mu/{kernel}", (2, 32, 64)) == PartitionSpec(None, "fsdp", None)
    assert spec(f"params/{kernel}", (2, 30, 64)) == PartitionSpec(None, None, "fsdp")
    assert spec("params/quantizer/project_in/kernel", (32, 40)) == PartitionSpec(None, "fsdp")
    assert spec("buffers/quantizer/codebook", (48, 40)) == PartitionSpec("fsdp", None)
    assert spec("params/decoder/transformer/blocks/mlp/fc1/bias", (2, 64)) == PartitionSpec()
    assert spec("params/token_embedding", (48, 40)) == PartitionSpec("fsdp", None)
    assert spec("params/token_embedding", (49, 40)) == PartitionSpec(None, "fsdp")
    assert spec("gan/params/discriminator/conv1/kernel", (1, 1, 64, 64)) == PartitionSpec()
    assert spec("opt_state/1/mu/quantizer/project_in/kernel", (32, 40)) == PartitionSpec(None, "fsdp")
    assert spec("ema/quantizer/sums", (48, 40)) == PartitionSpec("fsdp", None)
    assert sharding.batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp"))


@pytest.mark.parametrize(("mesh", "says"), [
    ((2, 1), "mesh.data 2 and mesh.fsdp 1 do not fit 1 device:"),
    ((-1, 3), "mesh.data -1 and mesh.fsdp 3 do not fit 1 device:"),
])
def test_a_mesh_that_does_not_fit_is_named(mesh, says):
    with pytest.raises(ValueError, match="config keys") as error:
        sharding.make_mesh(config_lib.Mesh(data=mesh[0], fsdp=mesh[1]), jax.devices()[:1])
    assert says in str(error.value)


if __name__ == "__main__":
    import dataclasses

    from tests.conftest import REFERENCE

    if sys.argv[1:] == ["search"]:
        search()
        sys.exit()
    kind, out = sys.argv[1:]
    values = json.loads(json.dumps(dataclasses.asdict(config_lib.Config())))
    values["data"]["image_size"] = 32
    values["model"]["encoder"]["path"] = str(REFERENCE / "siglip_vision")
    values["optim"].update(lr=1e-3, warmup_steps=2, ema_decay=0.9)
    if kind in MOVES:
        values["model"]["dtype"] = "bfloat16"
        move([make_config(values, kind="simvq", mesh=mesh) for mesh in MOVES[kind]], Path(out))
    else:
        results = [(mesh, train(make_config(values, kind=kind, mesh=mesh))) for mesh in KINDS[kind]["meshes"]]
        Path(out).write_text(json.dumps(results))
