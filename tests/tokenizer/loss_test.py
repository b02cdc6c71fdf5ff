"""The training step: which parameters learn, in every shipped config, and what a step does to the rest."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vqrae_jax
from tests.config_test import TOKENIZERS
from tests.tiny import Run, reduced
from vqrae_jax import config as config_lib
from vqrae_jax.models import flat, losses
from vqrae_jax.models.discriminators import DISCRIMINATORS, PatchGAN
from vqrae_jax.models.quantizers import Quantizer
from vqrae_jax.tokenizer import gan, init, slices
from vqrae_jax.tokenizer.build import perceptual_shares
from vqrae_jax.tokenizer.loss import gradients, make_train_step
from vqrae_jax.training import optim, update

pytestmark = pytest.mark.usefixtures("tiny_networks")

# Per config: patterns of what changes in ten steps; everything else must stay as it is, bit for bit.
SIMVQ = ("quantizer/(projection|project_in|project_out)/.*", "decoder/.*")
LEARNS = {
    "nano_stage1": SIMVQ,
    "nano_gan": SIMVQ,
    "nano_cifar10_stage1": SIMVQ,
    "nano_cifar10_stage2": (*SIMVQ, "encoder/.*"),
    "nano_stage2": (*SIMVQ, "encoder/.*"),
    "siglip_l_stage1": SIMVQ,
    "siglip_l_stage2": (*SIMVQ, "encoder/.*"),
    "siglip2_so400m_256_stage1": SIMVQ,
    "siglip2_so400m_256_stage2": (*SIMVQ, "encoder/.*"),
    "siglip2_so400m_512_stage1": SIMVQ,
    "siglip2_so400m_512_stage2": (*SIMVQ, "encoder/.*"),
    "internvit_300m_448_stage1": SIMVQ,
    "internvit_300m_448_stage2": (*SIMVQ, "encoder/.*"),
    "ablation": SIMVQ,
    "bench_medium": SIMVQ,
    "dinov3_l": SIMVQ,
    "dinov2_b": ("quantizer/(codebook|counts|sums)", "decoder/.*"),
    "dinov2_b_decxl": ("quantizer/(codebook|counts|sums)", "decoder/.*"),
    "siglip_fsq": ("quantizer/(?!.*frequencies).*", "decoder/.*"),
}


def structural(value):
    """What of a config decides which computation a step is: of numbers that scale it only whether they are 0."""
    if isinstance(value, float):
        return value > 0
    if isinstance(value, dict):
        return tuple(structural(entry) for entry in value.values())
    return tuple(map(structural, value)) if isinstance(value, list | tuple) else value


def distinct() -> dict[str, tuple[config_lib.Config, list[str]]]:
    """The shipped configs whose steps at toy size differ, each with the names of those that are the same.

    A loss's network is in the step of the first that has it: what it is to one model, it is to all.
    """
    groups, seen = {}, set()
    for name in TOKENIZERS:
        config = reduced(name)
        key = structural([dataclasses.asdict(section) for section in (config.model, config.loss, config.gan)]
                         + [config.optim.lr_multipliers, config.optim.ema_decay, config.train.accumulate])
        groups.setdefault(key, (config, []))[1].append(name)
    for key, (config, names) in groups.items():
        networks = structural([dataclasses.asdict(config.loss.perceptual), config.gan.discriminator])
        if networks in seen:
            loss = dataclasses.replace(config.loss, perceptual_weight=0.0, perceptual=config_lib.Perceptual())
            groups[key] = dataclasses.replace(config, gan=config_lib.Gan(), loss=loss), names
        seen.add(networks)
    return {names[0]: (config, names) for config, names in groups.values()}


FAST = ("dinov2_b", "nano_gan", "siglip_fsq", "siglip_l_stage2", "siglip2_so400m_256_stage2")


@pytest.mark.parametrize(("config", "names"), [
    pytest.param(*case, id=name, marks=[] if name in FAST else [pytest.mark.slow])
    for name, case in distinct().items()])
def test_exactly_the_promised_parameters_learn(config, names):
    """Without weight decay, so that a parameter changes only if it has a gradient."""
    name, *_ = names
    assert len({LEARNS[other] for other in names}) == 1
    run = Run(dataclasses.replace(config, optim=dataclasses.replace(config.optim, weight_decay=0.0)))
    learns = lambda path: optim.is_frozen(path, tuple((pattern, 0.0) for pattern in LEARNS[name]))
    before = {**run.params, **run.buffers}
    assert run.state.opt_state[1].mu.keys() == run.state.params.keys() == run.params.keys() - run.frozen.params.keys()
    # A weak type becomes a strong one in the first step, and the second compiles everything once more.
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((run.state, run.frozen)))
    run.train(10)
    after = {**run.frozen.params, **run.state.params, **run.state.buffers}
    assert after.keys() == before.keys()
    for path in sorted(before):
        same = np.array_equal(before[path], after[path])
        assert same != learns(path), f"{path} {'did not learn' if same else 'changed'} in {name}"
    for path, value in run.frozen.teacher.items():
        np.testing.assert_array_equal(value, before[path])
    for path, value in run.frozen.networks.items():
        np.testing.assert_array_equal(value, run.networks[path])
    # The last bias moves real and fake logits alike, which a hinge that none of them has passed does not feel.
    for path, value in run.state.gan.params.items():
        assert path.endswith("conv2/bias") or np.any(value != run.networks[path]), f"{path} did not learn in {name}"
    assert bool(run.frozen.teacher) == ("stage2" in name)
    assert (run.phase == "gan") == (config.gan.discriminator != "none") == bool(run.state.gan.params)


def test_the_step_is_traced_once(tiny_config):
    chex.clear_trace_counter()
    run = Run(config_lib.parse(tiny_config))
    step = jax.jit(chex.assert_max_traces(run.step, n=1))
    for i in range(3):
        run.state, _ = step(run.state, run.frozen, run.batch(i))
    assert int(run.state.step) == 3


@pytest.mark.parametrize("kind", ["simvq", "ema"])
def test_accumulated_micro_batches_equal_one_batch(kind, tiny_config):
    tiny_config.model.quantizer.kind = kind
    tiny_config.optim.update(weight_decay=0.0, clip_norm=0.0, warmup_steps=0)
    whole = Run(config_lib.parse(tiny_config))
    tiny_config.train.accumulate = 2
    split = Run(config_lib.parse(tiny_config))
    metrics, parted = whole.train(1), split.train(1)
    for name in metrics:
        assert metrics[name] == pytest.approx(parted[name], rel=1e-4), name
    # Adam's first step is lr * sign of the gradient, which rounding may turn where it is almost zero.
    for path, value in whole.state.buffers.items():
        np.testing.assert_allclose(value, split.state.buffers[path], rtol=1e-5, atol=1e-6)


def test_losses_are_reported_as_they_are_optimised(tiny_config):
    tiny_config.loss.update(pixel_weight=2.0, vq_weight=0.5, distill_weight=3.0)
    tiny_config.optim.lr_multipliers = ()
    run = Run(config_lib.parse(tiny_config))
    metrics = run.train(3)
    assert {name: metrics[f"weight/{name}"] for name in ("pixel", "codebook", "commitment", "distill")} == {
        "pixel": 2.0, "codebook": 0.5, "commitment": 0.125, "distill": 3.0}
    weighted = {name.removeprefix("weighted/"): value for name, value in metrics.items() if "weighted/" in name}
    for name, value in weighted.items():
        assert value == pytest.approx(metrics[f"weight/{name}"] * metrics[f"loss/{name}"], rel=1e-5)
    assert metrics["loss/total"] == pytest.approx(sum(weighted.values()), rel=1e-5)
    assert metrics["loss/commitment"] == pytest.approx(metrics["loss/codebook"], rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(
        sum(metrics[f"grad_norm/{part}"] ** 2 for part in ("encoder", "quantizer", "decoder")) ** 0.5, rel=1e-5)


def test_distillation_compares_the_student_with_its_teacher(tiny_config):
    """Zero where they are the same, and a step of distillation alone brings the student closer."""
    tiny_config.loss.update(pixel_weight=0.0, vq_weight=0.0, distill_weight=1.0)
    tiny_config.optim.update(lr_multipliers=(), weight_decay=0.0, warmup_steps=0, lr=1e-4, end_lr=1e-4)
    run = Run(config_lib.parse(tiny_config))
    _, metrics = run.jitted(run.state, run.frozen, run.batch())
    assert float(metrics["weighted/distill"]) == 0.0
    moved = {path: value * 1.05 if path.startswith("encoder/") else value for path, value in run.state.params.items()}
    state = run.state._replace(params=moved)
    distances = []
    for _ in range(5):
        state, metrics = run.jitted(state, run.frozen, run.batch())
        distances.append(float(metrics["weighted/distill"]))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > distances[-1] > 0


@pytest.mark.parametrize("learns", [False, True])
def test_the_encoders_perceptual_loss_is_that_of_the_encoder_as_it_began(learns, tiny_config):
    """Its gradient reaches what made the reconstruction and nothing else; a frozen encoder is held once."""
    tiny_config.loss.update(vq_weight=0.0, perceptual_weight=3.0)
    tiny_config.loss.perceptual.encoder = 0.5
    if learns:
        tiny_config.optim.lr_multipliers = ()
    run = Run(config_lib.parse(tiny_config))
    assert bool(run.frozen.teacher) == learns
    assert not run.frozen.networks
    moved = {path: value * 1.05 if path.startswith("encoder/") else value for path, value in run.state.params.items()}
    state = run.state._replace(params=moved)
    images = run.batch()["image"]
    (grads, _, metrics), _ = jax.jit(lambda state: gradients(
        run.config, run.structure, state, run.frozen, images, rng=jax.random.key(0), phase=""))(state)
    encoder = flat.merge(run.structure.graphdef, run.params, run.buffers).encoder

    def expected(params):
        x = images.astype(np.float32) / 255
        y = flat.merge(run.structure.graphdef, run.params, params, run.buffers)(x, train=True).images
        tokens = [z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in (encoder(x), encoder(y))]
        distance = 1 - jnp.mean(jnp.sum(tokens[0] * tokens[1], axis=-1))
        return losses.l2(y, x) + 3 * distance, distance

    wanted, distance = jax.jit(jax.grad(expected, has_aux=True))(moved)
    assert float(metrics["loss/encoder"]) == pytest.approx(float(distance), rel=1e-5)
    assert float(metrics["weighted/perceptual"]) == pytest.approx(3 * float(distance), rel=1e-5)
    for path in moved:
        np.testing.assert_allclose(grads[path], wanted[path], rtol=1e-3, atol=1e-3 * np.abs(wanted[path]).max(),
                                   err_msg=path)


def test_distilling_a_frozen_encoder_is_refused(tiny_config):
    tiny_config.loss.distill_weight = 1.0
    with pytest.raises(ValueError, match=r"loss.distill_weight has no effect on an encoder that is frozen"):
        Run(config_lib.parse(tiny_config))


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tiny_config):
    tiny_config.model.quantizer.kind = "ema"
    run = Run(config_lib.parse(tiny_config))
    run.train(2)
    broken = dict(run.state.params)
    broken["decoder/pixels/bias"] = broken["decoder/pixels/bias"].at[0].set(jnp.nan)
    state, metrics = run.jitted(run.state._replace(params=broken), run.frozen, run.batch())
    chex.assert_trees_all_equal(state.params, broken)
    for name in ("buffers", "ema", "opt_state"):
        chex.assert_trees_all_equal(getattr(state, name), getattr(run.state, name))
    assert int(state.step) == 3
    assert (float(metrics["skipped_steps"]), float(metrics["skipped_in_a_row"])) == (1, 1)
    state, metrics = run.jitted(state._replace(params=run.state.params), run.frozen, run.batch())
    assert (float(metrics["skipped_steps"]), float(metrics["skipped_in_a_row"])) == (1, 0)
    assert np.isfinite(float(metrics["loss/total"]))


def test_the_weight_average_starts_at_the_weights_and_includes_the_codebook(tiny_config):
    tiny_config.model.quantizer.kind = "ema"
    run = Run(config_lib.parse(tiny_config))
    averaged = lambda state: {**state.params, **state.buffers}
    before = averaged(run.state)
    chex.assert_trees_all_equal(run.state.ema, before)
    run.train(2)
    run.state, _ = run.jitted(run.state, run.frozen, run.batch())
    run.state = run.state._replace(step=run.state.step + 5)  # as if as many had been skipped: no updates
    first = run.state
    run.train(1)
    for path, value in averaged(run.state).items():
        expected = 4 / 13 * first.ema[path] + 9 / 13 * value  # the fourth update
        np.testing.assert_allclose(run.state.ema[path], expected, rtol=1e-5, atol=1e-7)
    assert np.any(run.state.ema["quantizer/codebook"] != before["quantizer/codebook"])
    tiny_config.model.quantizer.kind = "simvq"
    run = Run(config_lib.parse(tiny_config))
    assert run.state.ema.keys() == run.state.params.keys()  # frozen codes need no average


def test_the_weight_average_of_a_short_run_is_near_its_weights(tiny_config):
    tiny_config.optim.update(ema_decay=0.9999, warmup_steps=0)
    run = Run(config_lib.parse(tiny_config))
    started = run.state.params
    run.train(6)
    distance = lambda x, y: sum(float(np.sum((np.asarray(x[path]) - y[path]) ** 2)) for path in x) ** 0.5
    moved = distance(run.state.params, started)
    assert distance(run.state.ema, run.state.params) < 0.3 * moved
    assert moved > 0


def test_learning_rates_differ_by_path(tiny_config):
    tiny_config.optim.update(lr=1e-3, end_lr=1e-3, warmup_steps=0, weight_decay=0.0, clip_norm=0.0,
                             lr_multipliers=(("encoder/.*/norm.*", 0.0), ("encoder/.*", 0.1)))
    run = Run(config_lib.parse(tiny_config))
    run.train(1)
    # Adam's first step moves every entry with a gradient by the learning rate.
    moved = lambda path: float(np.max(np.abs(run.state.params[path] - run.params[path])))
    assert moved("decoder/pixels/kernel") == pytest.approx(1e-3, rel=1e-2)
    assert moved("encoder/vit/patch_embedding/kernel") == pytest.approx(1e-4, rel=1e-2)
    assert "encoder/vit/transformer/blocks/norm1/scale" in run.frozen.params
    with pytest.raises(ValueError, match=r"'encodr/\.\*' matches no parameter"):
        optim.check_patterns(run.params, (("encodr/.*", 0.0),), key="optim.lr_multipliers")


def test_codebook_from_data_is_a_codebook_of_the_encoders_tokens(tiny_config):
    tiny_config.model.quantizer.kind = "ema"
    run = Run(config_lib.parse(tiny_config))
    arrays = {**run.params, **run.buffers}
    images = [run.batch(seed, size=8)["image"] for seed in range(4)]
    values = init.codebook_from_data(run.config, run.structure, arrays, images)
    assert values.keys() == {"quantizer/codebook", "quantizer/counts", "quantizer/sums"}
    loss = lambda arrays: flat.merge(run.structure.graphdef, arrays)(images[0], train=False).quantized.losses
    assert loss({**arrays, **values})["commitment"] < 0.7 * loss(arrays)["commitment"]


def adversarial(config, **changes):
    config.gan.update(discriminator="patchgan", channels=32, weight=0.5, lr=1e-3, end_lr=1e-3, **changes)
    return config


LOSSES = ("pixel", "perceptual", "vq", "distill", "gan")


@pytest.mark.parametrize("on", [
    *(pytest.param([name], marks=pytest.mark.slow) for name in LOSSES), LOSSES], ids="+".join)
def test_each_loss_reaches_exactly_the_promised_parts(on, tiny_config):
    """By itself, and all together: a step's gradient is the sum of the losses', so that no other mixture is new."""
    tiny_config.loss.update(pixel_weight=float("pixel" in on), vq_weight=float("vq" in on),
                            distill_weight=float("distill" in on), perceptual_weight=float("perceptual" in on))
    if "perceptual" in on:
        tiny_config.loss.perceptual.update(convnext_s=1.0, random_weights=True)
    if "gan" in on:
        adversarial(tiny_config)
    tiny_config.optim.lr_multipliers = ()
    run = Run(config_lib.parse(tiny_config))
    if "distill" in on:  # at the start the student is its teacher
        moved = {path: value * 1.05 if path.startswith("encoder/") else value
                 for path, value in run.state.params.items()}
        run.state = run.state._replace(params=moved)
    metrics = run.train(1)
    from_pixels = bool({"pixel", "perceptual", "gan"} & set(on))
    promised = {"decoder": from_pixels, "encoder": from_pixels or bool({"vq", "distill"} & set(on)),
                "quantizer": "vq" in on}
    for part, learns in promised.items():
        assert (metrics[f"grad_norm/{part}"] > 0) == learns, f"{part} with {on}: {metrics}"
    assert (metrics.get("grad_norm/discriminator", 0.0) > 0) == ("gan" in on)
    assert np.isfinite(metrics["loss/total"])


def test_the_adaptive_weight_is_the_ratio_of_two_whole_gradients(tiny_config):
    """And the step's gradient is that of the losses' weighted sum, differentiated in one go, micro-batch by
    micro-batch."""
    tiny_config.optim.lr_multipliers = ()
    tiny_config.loss.update(vq_weight=0.0, perceptual_weight=2.0)
    tiny_config.loss.perceptual.update(convnext_s=3.0, lpips=1.0, random_weights=True, remat=True)
    tiny_config.train.accumulate = accumulate = 2
    run = Run(config_lib.parse(adversarial(tiny_config, adaptive=True)))
    images = run.batch()["image"].astype(np.float32) / 255
    network = lambda name: flat.merge(run.structure.networks.graphdefs[name], flat.under(f"{name}/", run.networks))
    discriminator = network("discriminator")
    reconstruct = lambda params, micro: flat.merge(
        run.structure.graphdef, params, run.buffers)(micro, train=True).images

    def perceptual_loss(x, y):
        distances = {name: jnp.mean((net := network(name)).distance(net(x), net(y)))
                     for name in perceptual_shares(run.config)}
        return (3 * distances["convnext_s"] + distances["lpips"]) / 4

    @jax.jit
    def expected(micro):
        loss = lambda params: losses.l2(x := reconstruct(params, micro), micro) + 2 * perceptual_loss(x, micro)
        first = jax.grad(loss)(run.params)
        second = jax.grad(lambda params: losses.linear_generator(discriminator(reconstruct(params, micro))))(run.params)
        norm = lambda grads: jnp.linalg.norm(grads["decoder/pixels/kernel"])
        weight = norm(first) / norm(second)
        return weight, jax.tree.map(lambda a, b: a + 0.5 * weight * b, first, second)

    wanted = [expected(images[i::accumulate]) for i in range(accumulate)]
    weight, wanted_grads = jax.tree.map(lambda *values: sum(values) / accumulate, *wanted)
    one = lambda images, rng: gradients(run.config, run.structure, run.state, run.frozen, images, rng=rng, phase="gan")
    (grads, _, scalars), _ = jax.jit(lambda: update.accumulate(
        one, run.batch()["image"], jax.random.key(0), count=accumulate, add=Quantizer.add_stats))()
    assert float(scalars["gan/adaptive_weight"]) == pytest.approx(float(weight), rel=1e-3)
    assert float(scalars["weight/gan"]) == pytest.approx(0.5 * float(weight), rel=1e-3)
    for path in run.params:
        scale = np.abs(wanted_grads[path]).max()
        np.testing.assert_allclose(grads[path], wanted_grads[path], rtol=1e-3, atol=1e-3 * scale, err_msg=path)


def test_the_public_loss_is_that_of_the_training_step(tiny_config):
    """With a teacher and networks; of a config whose discriminator learns later: what its first phase optimises."""
    tiny_config.optim.lr_multipliers = ()
    tiny_config.loss.update(distill_weight=2.0, perceptual_weight=0.5)
    tiny_config.loss.perceptual.update(convnext_s=3.0, lpips=1.0, encoder=2.0, random_weights=True)
    run = Run(config_lib.parse(adversarial(tiny_config, discriminator_start_step=2, start_step=3)))
    moved = {path: value * 1.05 if path.startswith("encoder/") else value for path, value in run.state.params.items()}
    state = run.state._replace(params=moved)  # a student that has left its teacher
    images = run.batch()["image"]
    (expected, _, metrics), _ = jax.jit(lambda state: gradients(
        run.config, run.structure, state, run.frozen, images, rng=jax.random.key(0), phase=""))(state)
    assert metrics["loss/distill"] > 0 and metrics["loss/perceptual"] > 0

    model = flat.merge(run.structure.graphdef, moved, run.buffers)
    loss = vqrae_jax.loss_function(run.config)
    (value, reported), grads = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(model, images.astype(np.float32) / 255)
    assert float(value) == pytest.approx(float(metrics["loss/total"]), rel=1e-6)
    assert reported.keys() == metrics.keys()
    chex.assert_trees_all_close(reported, metrics, rtol=1e-5)
    by_path = {"/".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(grads)}
    chex.assert_trees_all_close(by_path, expected, rtol=1e-4, atol=1e-6)

    # And as a pure function of the parameters.
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    pure = jax.eval_shape(jax.grad(lambda params: loss(nnx.merge(graphdef, params, rest), images)[0]), params)
    chex.assert_trees_all_equal_shapes(nnx.to_pure_dict(pure), nnx.to_pure_dict(grads))


def test_a_created_model_is_what_a_run_starts_from(tiny_config):
    run = Run(config_lib.parse(tiny_config))
    tiny_config.model.quantizer.init = "kmeans"  # needs data, and init_from a run
    tiny_config.init_from = "no/such/run"
    model = vqrae_jax.create(config_lib.parse(tiny_config))
    _, params, buffers = flat.split(model)
    chex.assert_trees_all_close({**params, **buffers}, {**run.params, **run.buffers}, atol=1e-6)
    images = run.batch()["image"].astype(np.float32) / 255
    output = model(images, train=False)
    assert output.images.shape == (4, 32, 32, 3) and output.quantized.indices.shape == (4, 16)
    encoder = vqrae_jax.load_encoder(tiny_config.model.encoder.path, image_size=32)
    np.testing.assert_allclose(output.features, encoder(images), atol=1e-5)
    assert model.quantizer.codes().shape == (32, 32) and len(model.decoder.transformer.blocks.mlp.fc1.kernel[...]) > 0


def test_the_gan_starts_when_the_config_says_and_costs_nothing_before(tiny_config):
    plain = Run(config_lib.parse(tiny_config))
    tiny_config.train.steps = 20
    run = Run(config_lib.parse(adversarial(tiny_config, discriminator_start_step=2, start_step=4, ramp_steps=3)))
    lowered = lambda run, phase: jax.jit(make_train_step(run.config, run.structure, phase)).lower(
        run.state, run.frozen, run.batch())
    steps = {phase: lowered(run, phase) for phase in ("", "gan")}
    flops = lambda step: step.cost_analysis()["flops"]
    assert flops(steps[""]) == flops(lowered(plain, "")) < flops(steps["gan"])
    steps = {phase: step.compile() for phase, step in steps.items()}
    weights = []
    for step in range(9):
        before = run.state.gan.params
        learns = step >= 2
        run.state, metrics = steps["gan" if learns else ""](run.state, run.frozen, run.batch(step))
        changed = any(np.any(before[path] != run.state.gan.params[path]) for path in before)
        assert changed == learns
        weights.append(float(metrics.get("weight/gan", -1.0)))
    assert weights == pytest.approx([-1, -1, 0, 0, 0.125, 0.25, 0.375, 0.5, 0.5])


def test_the_discriminator_learns_to_tell_reconstructions_from_images(tiny_config):
    tiny_config.optim.update(lr=0.0, end_lr=0.0, weight_decay=0.0)
    run = Run(config_lib.parse(adversarial(tiny_config, lecam_weight=0.001, augment=True, cutout=0.2)))
    metrics = [run.train(1), run.train(30)]
    assert metrics[1]["loss/discriminator"] < 0.7 * metrics[0]["loss/discriminator"]
    assert metrics[1]["gan/logits_real"] > metrics[1]["gan/logits_fake"]
    assert np.all(run.state.gan.mean_logits != 0)


def test_a_frozen_backbone_and_its_heads(tiny_config):
    """The DINO discriminator: the backbone is frozen, heads and their power iteration move."""
    adversarial(tiny_config)
    tiny_config.gan.update(discriminator="dino_s8", random_weights=True, channels=128, augment=True)
    run = Run(config_lib.parse(tiny_config))
    before = run.state.gan
    backbone = {path for path in run.frozen.networks if path.startswith(gan.BACKBONE)}
    assert backbone
    assert backbone.isdisjoint(before.params)
    run.train(2)
    for path, value in before.params.items():
        assert np.any(value != run.state.gan.params[path]), path
    assert before.buffers
    for path, value in before.buffers.items():
        assert path.endswith("logits/u") or np.any(value != run.state.gan.buffers[path]), path  # one number: +-1


def test_a_discriminator_that_is_not_finite_skips_the_step(tiny_config):
    run = Run(config_lib.parse(adversarial(tiny_config)))
    run.train(1)
    path = next(iter(run.state.gan.params))
    broken = run.state._replace(gan=run.state.gan._replace(
        params=run.state.gan.params | {path: run.state.gan.params[path] * jnp.nan}))
    state, metrics = run.jitted(broken, run.frozen, run.batch())
    chex.assert_trees_all_equal(state.params, run.state.params)
    chex.assert_trees_all_equal(state.gan, broken.gan)
    assert float(metrics["skipped_steps"]) == 1


def test_the_discriminator_sees_reconstructions_rounded_to_8_bits(tiny_config):
    """As it sees real images, or it would tell them apart by that."""
    run = Run(config_lib.parse(adversarial(tiny_config)))
    images = run.batch()["image"].astype(np.float32) / 255
    fakes = np.float32(np.random.default_rng(1).integers(0, 255, images.shape) + 0.1) / 255
    rngs = jax.random.split(jax.random.key(0))
    loss = jax.jit(lambda fakes: gan.Gan(run.config, run.structure).gradients(
        run.state.gan, run.frozen.networks, images, fakes, rngs=rngs)[1]["loss/discriminator"])
    assert loss(fakes) == loss(fakes + np.float32(0.2 / 255)) != loss(fakes + np.float32(1 / 255))


@pytest.mark.parametrize("side", [256, 512, 2048])
def test_slices_give_the_mean_and_every_row_in_its_place(side):
    """Of batches whose images are as large as `side` says; what is computed with is small."""
    images = jax.ShapeDtypeStruct((48, side, side, 3), np.float32)
    count = slices.count_for(images)
    assert count == {256: 3, 512: 12, 2048: 48}[side]
    x, y = np.random.default_rng(0).normal(size=(2, 48, 2, 3)).astype(np.float32)
    loss = lambda x, y: jnp.mean(jnp.sin(x * y)**2)
    means, rows = jax.jit(lambda batch: slices.in_slices(lambda rows: jax.value_and_grad(loss)(*rows), batch,
                                                         count=count))((x, y))
    value, gradient = jax.value_and_grad(loss)(x, y)
    np.testing.assert_allclose(means, value, rtol=1e-6)
    np.testing.assert_allclose(rows.reshape(x.shape) / count, gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_slices_change_neither_gradients_nor_metrics(tiny_config, monkeypatch):
    """However few images the networks of the image losses see at a time: here one, of a batch of four."""
    small = lambda gan, **options: PatchGAN(channels=32, stages=1, **options)  # it compiles in no time
    monkeypatch.setitem(DISCRIMINATORS, "patchgan", DISCRIMINATORS["patchgan"]._replace(build=small))
    tiny_config.loss.update(perceptual_weight=2.0)
    tiny_config.loss.perceptual.encoder = 1.0
    run = Run(config_lib.parse(adversarial(tiny_config, adaptive=True, augment=True)))
    images = run.batch()["image"]

    def step():
        (grads, gan_grads, metrics), _ = jax.jit(lambda images: gradients(
            run.config, run.structure, run.state, run.frozen, images, rng=jax.random.key(0), phase="gan"))(images)
        return grads, gan_grads, metrics

    whole = step()
    monkeypatch.setattr(slices, "PIXELS", 1)
    assert slices.count_for(images) == len(images)
    scale = jax.tree.map(lambda x: np.abs(x).max(), whole)
    close = lambda x, y, scale: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * scale)
    jax.tree.map(close, step(), whole, scale)


def test_usage_is_counted_over_a_window(tiny_config):
    tiny_config.train.log_every = 3
    run = Run(config_lib.parse(tiny_config))
    tokens = 4 * 16
    seen = []
    for i in range(5):
        run.state, _ = run.jitted(run.state, run.frozen, run.batch(i))
        seen.append(int(run.state.code_counts.sum()))
    assert seen == [tokens, 2 * tokens, 3 * tokens, tokens, 2 * tokens]


def test_an_end_rate_of_its_own(tiny_config):
    """Table 7: the encoder stays at 1e-5 while the decoder comes down from 1e-4 to it."""
    tiny_config.train.steps = 10
    tiny_config.optim.update(lr=1e-4, end_lr=1e-5, warmup_steps=0, lr_multipliers=(("encoder/.*", 0.1),),
                             end_lr_multipliers=(("encoder/.*", 1.0),))
    run = Run(config_lib.parse(tiny_config))
    rates = [run.train(1) for _ in range(10)]
    assert [r["lr/encoder"] for r in rates] == pytest.approx([1e-5] * 10)
    assert rates[0]["lr/decoder"] == pytest.approx(1e-4)
    assert 1e-5 < rates[-1]["lr/decoder"] < 2e-5


@pytest.mark.parametrize(("loss", "real", "fake", "expected"), [
    (losses.hinge_discriminator, [2.0, 0.5], [-3.0, 0.0], 0.5 * (0.25 + 0.5)),
    (losses.vanilla_discriminator, [0.0], [0.0], np.log(2)),
])
def test_discriminator_losses(loss, real, fake, expected):
    assert float(loss(jnp.array(real), jnp.array(fake))) == pytest.approx(expected)


def test_generator_losses():
    fake = jnp.array([1.0, -2.0])
    assert float(losses.linear_generator(fake)) == pytest.approx(0.5)
    expected = np.mean(np.log1p(np.exp(-np.array([1.0, -2.0]))))
    assert float(losses.non_saturating_generator(fake)) == pytest.approx(expected)
    assert float(losses.lecam(*map(jnp.float32, (2.0, -1.0, 0.5, 1.5)))) == pytest.approx(0.5**2 + 1.5**2)
