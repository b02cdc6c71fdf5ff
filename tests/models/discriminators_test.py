"""Discriminators against the same networks in plain PyTorch; what is done to their images against NumPy formulas."""

import dataclasses
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from vqrae_jax.models import flat
from vqrae_jax.models.discriminators import (
    DINO_S8,
    DINO_S16,
    DinoDiscriminator,
    PatchGAN,
    SpectralConv,
    adaptive_max_pool,
    augment_with,
    diff_augment,
    random_crop,
    round_to_8_bits,
)
from vqrae_jax.models.flat import Buffer
from vqrae_jax.weights.discriminators import load_dino_backbone, load_dino_heads

# A small DINO; its published position embeddings are for a grid of 4 x 4.
SPEC = dataclasses.replace(DINO_S8, width=32, depth=3, heads=2, mlp_dim=48)
GRID = 4


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="parity needs torch")


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


def assert_near(actual, expected, *, error: float = 1e-4) -> None:
    """Compares to `error` of the largest expected value, which must not be tiny, or of 1."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    scale = np.abs(expected).max()
    assert scale > 1e-3
    np.testing.assert_allclose(actual, expected, atol=error * min(1.0, scale), rtol=0)


def with_values(make, *parts, complete: bool = True):
    """The module that `make` would make, of these values by path; where not `complete`, absent ones are zeros."""
    graphdef, params, rest = flat.split(nnx.eval_shape(make))  # nothing is drawn or compiled
    values = {path: jnp.asarray(value) for part in parts for path, value in part.items()}
    for path, value in values.items():
        assert value.shape == (params | rest)[path].shape and value.dtype == jnp.float32, path
    absent = {path: jnp.zeros(value.shape) for path, value in (params | rest).items() if path not in values}
    assert not (absent and complete), absent.keys()
    return flat.merge(graphdef, values, absent)


def with_random_values(make):
    """The module that `make` would make, of random values that keep activations O(1), after three power iterations."""
    rng = np.random.default_rng(0)
    _, params, rest = flat.split(nnx.eval_shape(make))
    fan_in = lambda shape: np.prod(shape[-2:-1]) * (9 if shape[0] == 3 else 1)
    values = {path: np.float32(rng.normal(size=value.shape) / fan_in(value.shape) ** 0.5)
              for path, value in (params | rest).items()}
    module = with_values(make, values)
    for _ in range(3):
        module = with_values(make, values | module.next_buffers())
    return module


def small_dino(dtype=jnp.float32) -> DinoDiscriminator:
    return DinoDiscriminator(SPEC, image_size=16, layers=(1, 3), kernel_size=3, dtype=dtype, rngs=nnx.Rngs(0))


pool_to_16 = jax.jit(lambda x: adaptive_max_pool(x, 16))


def value_and_image_gradient(module: nnx.Module, images: np.ndarray, cotangent: np.ndarray):
    graphdef, state = nnx.split(module)

    @jax.jit
    def run(state, images):
        logits, pull = jax.vjp(lambda images: nnx.merge(graphdef, state)(images), images)
        return logits, pull(jnp.asarray(cotangent))[0]

    return run(state, jnp.asarray(images))


def torch_value_and_image_gradient(torch, model, images: np.ndarray, cotangent: np.ndarray):
    x = torch.from_numpy(images).permute(0, 3, 1, 2).requires_grad_()
    logits = model(x)
    (logits * torch.from_numpy(cotangent)).sum().backward()
    return logits.detach(), x.grad.permute(0, 2, 3, 1)


# PatchGAN


def torch_patchgan(torch, channels: int):
    """TiTok's discriminator in PyTorch, by input size: paddings are those of TensorFlow's "SAME"."""
    nn = torch.nn
    kernel = torch.tensor([1.0, 3, 3, 1])
    kernel = torch.outer(kernel, kernel) / 64

    def blur(x):
        odd = [side % 2 for side in x.shape[-2:]]
        x = nn.functional.pad(x, (1, 1 + odd[1], 1, 1 + odd[0]))
        return nn.functional.conv2d(x, kernel.expand(x.shape[1], 1, 4, 4), stride=2, groups=x.shape[1])

    class Stage(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(32, outputs)
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)

        def forward(self, x):
            return nn.functional.leaky_relu(self.norm(blur(self.conv(x))), 0.1)

    stages = [Stage(channels, channels), Stage(channels, 2 * channels), Stage(2 * channels, 4 * channels)]
    return nn.Sequential(nn.Conv2d(3, channels, 5, padding=2), nn.LeakyReLU(0.1), *stages, nn.AdaptiveMaxPool2d(16),
                         nn.Conv2d(4 * channels, 4 * channels, 1), nn.LeakyReLU(0.1),
                         nn.Conv2d(4 * channels, 1, 5, padding=2), nn.Flatten(1, 2))


@pytest.mark.parametrize("size", [64, 96, (99, 130)])
def test_patchgan_matches_torch_in_value_and_image_gradient(torch, size):
    torch.manual_seed(0)
    model = torch_patchgan(torch, 32)
    values = {}
    for ours, theirs in {"conv_in": 0, "stages/0": 2, "stages/1": 3, "stages/2": 4, "conv1": 6, "conv2": 8}.items():
        module = model[theirs]
        conv, name = (module.conv, f"{ours}/conv") if ours.startswith("stages") else (module, ours)
        values |= {f"{name}/kernel": conv.weight.detach().permute(2, 3, 1, 0).numpy(),
                   f"{name}/bias": conv.bias.detach().numpy()}
        if conv is not module:
            values |= {f"{ours}/norm/scale": module.norm.weight.detach().numpy(),
                       f"{ours}/norm/bias": module.norm.bias.detach().numpy()}
    discriminator = with_values(lambda: PatchGAN(channels=32, rngs=nnx.Rngs(0)), values)

    height, width = size if isinstance(size, tuple) else (size, size)
    images = random_images(2, height, width, 3)
    cotangent = np.random.default_rng(1).normal(size=(2, 16, 16)).astype(np.float32)
    logits, gradient = value_and_image_gradient(discriminator, images, cotangent)
    expected, expected_gradient = torch_value_and_image_gradient(torch, model, images, cotangent)
    assert logits.dtype == jnp.float32
    assert_near(logits, expected)
    assert_near(gradient, expected_gradient)


@pytest.mark.parametrize("n", [1, 5, 8, 12, 16, 20, 32, 40])
def test_adaptive_max_pool_takes_torchs_windows(n):
    x = np.random.default_rng(0).normal(size=(2, n, n + 1, 3)).astype(np.float32)
    window = lambda i, n: slice(int(np.floor(i * n / 16)), int(np.ceil((i + 1) * n / 16)))
    expected = np.stack([np.stack([x[:, window(i, n), window(j, n + 1)].max((1, 2)) for j in range(16)], axis=1)
                         for i in range(16)], axis=1)
    np.testing.assert_array_equal(pool_to_16(x), expected)


@pytest.mark.parametrize("n", [7, 12, 40])
def test_adaptive_max_pool_equals_torch(torch, n):
    x = random_images(2, n, n, 3)
    expected = torch.nn.functional.adaptive_max_pool2d(torch.from_numpy(x).permute(0, 3, 1, 2), 16).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(pool_to_16(x), expected)


@pytest.mark.parametrize("n", [12, 24, 37])
def test_the_gradient_of_a_pooled_norm_is_finite(n):
    """Of what is normalised for the pool and, rounded otherwise, once more for its gradient."""
    graphdef, params = nnx.split(nnx.GroupNorm(128, num_groups=32, use_fast_variance=False, rngs=nnx.Rngs(0)))
    images = np.random.default_rng(0).normal(size=(2, n, n, 128)).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradient(images):
        return jnp.sum(adaptive_max_pool(nnx.leaky_relu(nnx.merge(graphdef, params)(images), 0.1), 16) ** 2)

    assert np.isfinite(gradient(images)).all() and np.any(gradient(images))


def test_patchgan_has_titoks_shape_and_start():
    _, params, _ = flat.split(nnx.eval_shape(lambda: PatchGAN(rngs=nnx.Rngs(0))))
    assert [params[f"stages/{i}/conv/kernel"].shape for i in range(3)] == [
        (3, 3, 128, 128), (3, 3, 128, 256), (3, 3, 256, 512)]
    assert params["conv1/kernel"].shape == (1, 1, 512, 512) and params["conv2/kernel"].shape == (5, 5, 512, 1)
    params, rest = jax.jit(lambda: flat.split(PatchGAN(channels=32, rngs=nnx.Rngs(0)))[1:])()
    assert rest == {}
    for path, fan_in in {"conv_in": 75, "stages/2/conv": 9 * 64, "conv1": 128}.items():  # uniform in +-1/sqrt(fan in)
        for value in (params[f"{path}/kernel"], params[f"{path}/bias"]):
            assert np.abs(value).max() <= fan_in**-0.5
            assert np.std(value) * (3 * fan_in) ** 0.5 == pytest.approx(1, abs=0.2)
    with pytest.raises(ValueError, match="multiple of 32, not 48"):
        PatchGAN(channels=48, rngs=nnx.Rngs(0))


def test_bfloat16_is_near_float32_and_gives_float32():
    images = random_images(2, 16, 16, 3)
    small_patchgan = lambda dtype=jnp.float32: PatchGAN(channels=32, stages=2, dtype=dtype, rngs=nnx.Rngs(0))
    for make in (small_dino, small_patchgan):
        module = with_random_values(make)
        coarse = with_values(lambda make=make: make(jnp.bfloat16), *flat.split(module)[1:])
        exact, coarse = jax.jit(module)(images), jax.jit(coarse)(images)
        assert exact.dtype == coarse.dtype == jnp.float32
        assert 0 < np.abs(exact - coarse).max() < 0.05 * np.abs(exact).max()


# Spectral norm


@pytest.mark.parametrize("inputs, outputs, taps", [(6, 5, 1), (6, 4, 5), (7, 1, 1)])
def test_spectral_convolution_matches_torch(torch, inputs, outputs, taps):
    torch.manual_seed(0)
    conv = torch.nn.utils.spectral_norm(
        torch.nn.Conv1d(inputs, outputs, taps, padding=taps // 2, padding_mode="circular"))
    x = np.random.default_rng(0).normal(size=(2, 9, inputs)).astype(np.float32)
    theirs = torch.from_numpy(x).permute(0, 2, 1)
    conv.train()(theirs)  # its first u and v are random, and the singular value meaningless

    kernel = lambda weight: weight.detach().permute(2, 1, 0).numpy().copy()
    tap_by_tap = lambda v: v.reshape(inputs, taps).T.reshape(-1).numpy().copy()
    ours = with_values(lambda: SpectralConv(inputs, outputs, kernel_size=taps, rngs=nnx.Rngs(0)), {
        "kernel": kernel(conv.weight_orig), "bias": conv.bias.detach().numpy(), "u": conv.weight_u.numpy().copy(),
        "v": tap_by_tap(conv.weight_v)})
    graphdef, params, rest = flat.split(ours)
    assert params.keys() == {"kernel", "bias"} and rest.keys() == {"u", "v"}

    cotangent = np.random.default_rng(1).normal(size=(2, 9, outputs)).astype(np.float32)
    value = conv.eval()(theirs)
    (value.permute(0, 2, 1) * torch.from_numpy(cotangent)).sum().backward()
    y, pull = jax.vjp(lambda params, rest: flat.merge(graphdef, params, rest)(jnp.asarray(x)), params, rest)
    gradient, gradient_of_state = pull(jnp.asarray(cotangent))
    assert_near(y, value.detach().permute(0, 2, 1), error=1e-5)
    assert_near(gradient["kernel"], kernel(conv.weight_orig.grad), error=1e-5)
    assert_near(gradient["bias"], conv.bias.grad, error=1e-5)
    assert not gradient_of_state["u"].any() and not gradient_of_state["v"].any()

    state = ours.next_buffers()
    conv.train()(theirs)  # a power iteration
    assert_near(state["u"], conv.weight_u, error=1e-5)
    assert_near(state["v"], tap_by_tap(conv.weight_v), error=1e-5)
    np.testing.assert_array_equal(ours.u[...], rest["u"])  # nothing has changed by itself


def test_power_iterations_find_the_largest_singular_value():
    conv = SpectralConv(12, 10, kernel_size=3, rngs=nnx.Rngs(0))
    assert isinstance(conv.u, Buffer)
    matrix = np.asarray(conv.kernel[...], np.float64).reshape(36, 10)
    largest = np.linalg.svd(matrix, compute_uv=False)[0]
    sigma = lambda state: float(np.asarray(state["v"]) @ matrix @ np.asarray(state["u"]))
    assert sigma({"u": conv.u[...], "v": conv.v[...]}) == pytest.approx(largest, rel=0.02)  # from the start
    graphdef, params, rest = flat.split(conv)
    for _ in range(100):
        rest = flat.merge(graphdef, params, rest).next_buffers()
    assert sigma(rest) == pytest.approx(largest, rel=1e-5)


# DINO


def original_backbone(*, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of `SPEC` in the layout of DINO's release; none is hidden behind a zero or a one."""
    rng = np.random.default_rng(seed)
    d, m = SPEC.width, SPEC.mlp_dim
    shapes = {"cls_token": (1, 1, d), "pos_embed": (1, 1 + GRID**2, d), "patch_embed.proj.weight": (d, 3, 8, 8),
              "patch_embed.proj.bias": (d,), "norm.weight": (d,), "norm.bias": (d,)}
    for i in range(SPEC.depth):
        block = {"norm1": (d,), "attn.qkv": (3 * d, d), "attn.proj": (d, d), "norm2": (d,), "mlp.fc1": (m, d),
                 "mlp.fc2": (d, m)}
        for name, shape in block.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    fan_in = lambda shape: 1 if len(shape) == 3 else np.prod(shape[1:])
    weights = {name: np.float32(rng.normal(size=shape) / fan_in(shape) ** 0.5) for name, shape in shapes.items()}
    return {name: 1 + 0.3 * value if "norm" in name and name.endswith("weight") else value
            for name, value in weights.items()}


def transformers_backbone(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights in the layout of `transformers`, of a model with a classifier."""
    renames = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
               "patch_embed.proj": "embeddings.patch_embeddings.projection", "blocks.": "encoder.layer.",
               "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
               "norm1": "layernorm_before", "norm2": "layernorm_after"}
    renamed = {"classifier.weight": np.zeros((3, SPEC.width), np.float32)}
    for name, value in weights.items():
        for theirs, ours in renames.items():
            name = name.replace(theirs, ours)
        if "attn.qkv" in name:
            for part, third in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                renamed["vit." + name.replace("attn.qkv", f"attention.attention.{part}")] = third
        else:
            renamed["vit." + ("layer" + name if name.startswith("norm.") else name)] = value
    return renamed


def torch_dino_features(torch, weights: dict[str, np.ndarray], images, layers: tuple[int, ...], size: int):
    """What RAE's discriminator reads from a DINO ViT, `[B, d, N]` each: images `[B, 3, H, W]` in [0, 1]."""
    functional = torch.nn.functional
    w = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
    dense = lambda x, name: functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
    norm = lambda x, name: functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
    x = functional.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = functional.conv2d((x - mean) / std, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8)
    square = w["pos_embed"][:, 1:].reshape(1, GRID, GRID, -1).permute(0, 3, 1, 2)
    square = functional.interpolate(square, x.shape[-2:], mode="bilinear", align_corners=False)
    x = (x + square).flatten(2).transpose(1, 2)
    x = torch.cat([(w["cls_token"] + w["pos_embed"][:, :1]).expand(len(x), -1, -1), x], dim=1)
    features = {}
    for i in range(SPEC.depth):
        w[f"blocks.{i}.attn.qkv.bias"][SPEC.width:2 * SPEC.width] = 0  # as RAE does; no softmax notices
        qkv = dense(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").unflatten(-1, (3, SPEC.heads, -1))
        y = functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
        x = x + dense(y, f"blocks.{i}.attn.proj")
        y = functional.gelu(dense(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"), approximate="tanh")
        x = x + dense(y, f"blocks.{i}.mlp.fc2")
        features[i + 1] = x[:, 1:].transpose(1, 2)
    return [features[SPEC.depth], *(features[layer] for layer in layers)]


def torch_heads(torch, count: int, *, kernel_size: int):
    """Heads whose state dict has RAE's names, with random weights and u, v a few power iterations old."""
    nn = torch.nn

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = (nn.Parameter(torch.randn(SPEC.width)) for _ in range(2))

        def forward(self, x):  # InstanceNorm1d is batch norm of one sample
            return nn.functional.instance_norm(x, weight=self.weight, bias=self.bias, eps=1e-6)

    class Residual(nn.Module):
        def __init__(self, fn):
            super().__init__()
            self.fn = fn

        def forward(self, x):
            return (x + self.fn(x)) / 2**0.5

    def conv(outputs, taps):
        return nn.utils.spectral_norm(
            nn.Conv1d(SPEC.width, outputs, taps, padding=taps // 2, padding_mode="circular"))

    block = lambda taps: nn.Sequential(conv(SPEC.width, taps), Norm(), nn.LeakyReLU(0.2))
    heads = nn.ModuleList([nn.Sequential(block(1), Residual(block(kernel_size)), conv(1, 1)) for _ in range(count)])
    for head in heads:
        for _ in range(3):
            head.train()(torch.randn(2, SPEC.width, 16))
    return heads.eval()


def save_heads(torch, heads, file: Path, *, changes: dict | None = None) -> None:
    """A training checkpoint; `changes` replaces tensors of the discriminator, None removes one."""
    state = {f"heads.{name}": value for name, value in heads.state_dict().items()} | (changes or {})
    state = {name: value for name, value in state.items() if value is not None}
    torch.save({"step": 3, "model": {"weight": torch.zeros(2)}, "disc": state,
                "disc_optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}}, file)


@pytest.mark.parametrize("image_size, layers", [(32, (1, 3)), (48, (1,))])
def test_dino_discriminator_loaded_from_torch_files_gives_torchs_logits(torch, tmp_path, image_size, layers):
    torch.manual_seed(0)
    weights = original_backbone()
    heads = torch_heads(torch, 1 + len(layers), kernel_size=5)
    torch.save({name: torch.from_numpy(value) for name, value in weights.items()}, tmp_path / "dino.pth")
    save_heads(torch, heads, tmp_path / "last.pt")

    backbone = load_dino_backbone(tmp_path / "dino.pth", spec=SPEC, image_size=image_size)
    params, state = load_dino_heads(tmp_path / "last.pt")
    discriminator = with_values(
        lambda: DinoDiscriminator(SPEC, image_size=image_size, layers=layers, kernel_size=5, rngs=nnx.Rngs(0)),
        backbone, params, state)
    assert state.keys() == flat.split(discriminator)[2].keys()

    def model(x):
        features = torch_dino_features(torch, weights, x, layers, image_size)
        return torch.cat([head(x).flatten(1) for head, x in zip(heads, features, strict=True)], dim=1)

    images = random_images(2, 40, 40, 3)  # resized up and down
    cotangent = np.random.default_rng(1).normal(
        size=(2, (1 + len(layers)) * (image_size // 8) ** 2)).astype(np.float32)
    logits, gradient = value_and_image_gradient(discriminator, images, cotangent)
    expected, expected_gradient = torch_value_and_image_gradient(torch, model, images, cotangent)
    assert logits.dtype == jnp.float32
    assert_near(logits, expected)
    assert_near(gradient, expected_gradient)

    for path, value in discriminator.next_buffers().items():  # the paths that the state was loaded to
        assert value.shape == state[path].shape
    heads.train()
    with torch.no_grad():
        model(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert_near(discriminator.next_buffers()["heads/1/conv2/u"], heads[1][1].fn[0].weight_u)


def test_features_match_transformers(torch, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.ViTModel(transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8,
        hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(tmp_path)
    discriminator = with_values(lambda: DinoDiscriminator(SPEC, image_size=32, layers=(1, 2), rngs=nnx.Rngs(0)),
                                load_dino_backbone(tmp_path, spec=SPEC, image_size=32), complete=False)
    images = random_images(2, 32, 32, 3)
    last, first, second = discriminator.features(jnp.asarray(images))

    pixels = (images - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    with torch.no_grad():
        output = model(torch.from_numpy(pixels).permute(0, 3, 1, 2), output_hidden_states=True)
        assert_near(first, output.hidden_states[1][:, 1:])
        assert_near(second, output.hidden_states[2][:, 1:])
        assert_near(model.layernorm(torch.from_numpy(np.array(last))), output.last_hidden_state[:, 1:])


def test_only_heads_get_a_gradient():
    discriminator = with_random_values(small_dino)
    graphdef, params, rest = flat.split(discriminator)
    images = jnp.asarray(random_images(2, 16, 16, 3))
    loss = lambda params, images: jnp.sum(jnp.sin(flat.merge(graphdef, params, rest)(images)))
    gradient, image_gradient = jax.jit(jax.grad(loss, (0, 1)))(params, images)
    assert (np.abs(image_gradient).max(axis=(1, 2, 3)) > 1e-6).all()
    for path, value in gradient.items():
        if path.startswith("backbone/"):
            assert not value.any(), path
        elif "/conv" not in path or "kernel" in path:  # a convolution's bias before a norm does nothing
            assert np.abs(value).max() > 1e-6, path
    assert all(path.startswith("heads/") for path in rest) and rest.keys() == discriminator.next_buffers().keys()


def test_published_shapes():
    for spec, patch, count in ((DINO_S8, 8, 28), (DINO_S16, 16, 14)):
        make = lambda spec=spec: DinoDiscriminator(spec, image_size=224, rngs=nnx.Rngs(0))
        shapes = {path: value.shape for path, value in flat.split(nnx.eval_shape(make))[1].items()}
        assert shapes["backbone/patch_embedding/kernel"] == (3 * patch**2, 384)
        assert shapes["backbone/position_embedding"] == (count**2, 384)
        assert shapes["backbone/transformer/blocks/mlp/fc1/kernel"] == (12, 384, 1536)
        assert shapes["heads/4/conv2/kernel"] == (9, 384, 384) and "heads/5/conv2/kernel" not in shapes
    with pytest.raises(ValueError, match="odd kernel size, not 4"):
        SpectralConv(3, 3, kernel_size=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="one prefix token, cls, and not 5"):
        DinoDiscriminator(dataclasses.replace(SPEC, prefix_tokens=5), image_size=32, rngs=nnx.Rngs(0))


# Loading


@pytest.mark.parametrize("image_size", [32, 56])
def test_both_layouts_give_the_same_arrays(tmp_path, image_size):
    weights = original_backbone()
    save_file(weights, tmp_path / "dino.safetensors")
    save_file(transformers_backbone(weights), tmp_path / "model.safetensors")
    ours = load_dino_backbone(tmp_path / "dino.safetensors", spec=SPEC, image_size=image_size)
    again = load_dino_backbone(tmp_path, spec=SPEC, image_size=image_size)  # a folder
    expected = flat.split(nnx.eval_shape(lambda: DinoDiscriminator(SPEC, image_size=image_size, rngs=nnx.Rngs(0))))[1]
    assert ours.keys() == again.keys() == {path for path in expected if path.startswith("backbone/")}
    for path, value in ours.items():
        assert type(value) is np.ndarray and value.dtype == np.float32 and value.shape == expected[path].shape, path
        np.testing.assert_array_equal(again[path], value, err_msg=path)


def test_teacher_of_a_full_checkpoint_is_read(torch, tmp_path):
    teacher, student = ({f"{prefix}backbone.{name}": torch.from_numpy(value)
                         for name, value in original_backbone(seed=seed).items()}
                        for seed, prefix in ((0, ""), (1, "module.")))
    teacher["head.mlp.0.weight"] = torch.zeros(2, 2)
    torch.save({"student": student, "teacher": teacher, "epoch": 3}, tmp_path / "checkpoint.pth")
    save_file(original_backbone(), tmp_path / "plain.safetensors")
    ours, expected = (load_dino_backbone(tmp_path / name, spec=SPEC, image_size=32)
                      for name in ("checkpoint.pth", "plain.safetensors"))
    for path, value in expected.items():
        np.testing.assert_array_equal(ours[path], value, err_msg=path)


@pytest.mark.parametrize("changes, message", [
    ({"blocks.2.mlp.fc1.bias": None}, "tensor blocks.2.mlp.fc1.bias is missing"),
    ({"cls_token": None}, "tensor cls_token is missing"),
    ({"blocks.1.attn.qkv.weight": np.zeros((96, 31), np.float32)},
     r"tensor blocks.1.attn.qkv.weight has shape \(96, 31\), but \(96, 32\) is needed"),
    ({"patch_embed.proj.weight": np.zeros((32, 3, 16, 16), np.float32)}, r"patch_embed.proj.weight has shape.*8, 8\)"),
    ({"pos_embed": np.zeros((1, 16, 32), np.float32)}, "tensor pos_embed has 16 positions"),
    ({"pos_embed": np.zeros((17, 32), np.float32)}, r"pos_embed has shape \(17, 32\), but \(1, \*, 32\) is needed"),
    ({"blocks.3.norm1.weight": np.zeros(32, np.float32)}, "unexpected tensor blocks.3.norm1.weight"),
    ({"blocks.0.ls1.gamma": np.zeros(32, np.float32)}, "unexpected tensor blocks.0.ls1.gamma"),
])
def test_backbone_tensors_that_do_not_fit_are_named(tmp_path, changes, message):
    file = tmp_path / "dino.safetensors"
    weights = original_backbone() | changes
    save_file({name: value for name, value in weights.items() if value is not None}, file)
    with pytest.raises(ValueError, match=message) as error:
        load_dino_backbone(file, spec=SPEC, image_size=32)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_missing_files_say_how_to_get_them(tmp_path, monkeypatch):
    def offline(repo_id, **options):
        raise ConnectionError("no route to host")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for spec, patch in ((DINO_S8, 8), (DINO_S16, 16)):
        with pytest.raises(OSError, match=f"no DINO weights at .*`hf download facebook/dino-vits{patch}`.*"
                                          f"/dino/dino_deitsmall{patch}_pretrain/dino_deitsmall{patch}_pretrain.pth"):
            load_dino_backbone(tmp_path / "absent.pth", spec=spec, image_size=224)
    with pytest.raises(OSError, match="absent.pt does not exist"):
        load_dino_heads(tmp_path / "absent.pt")


def test_head_tensors_that_do_not_fit_are_named(torch, tmp_path):
    heads = torch_heads(torch, 2, kernel_size=3)
    file = tmp_path / "last.pt"
    torch.save({f"module.heads.{name}": value for name, value in heads.state_dict().items()}, file)
    plain, _ = load_dino_heads(file)
    save_heads(torch, heads, file)
    nested, _ = load_dino_heads(file)
    assert nested.keys() == plain.keys() and nested["heads/1/conv2/kernel"].shape == (3, 32, 32)
    for changes, message in [
        ({"heads.1.0.0.weight_u": None}, "tensor heads.1.0.0.weight_u is missing"),
        ({"heads.0.1.fn.1.bias": torch.zeros(31)}, r"heads.0.1.fn.1.bias has shape \(31,\), but \(32,\) is needed"),
        ({"heads.1.1.fn.0.weight_orig": torch.zeros(32, 32, 9)}, r"heads.1.1.fn.0.weight_orig.*\(32, 32, 3\) is need"),
        ({"heads.1.2.weight": torch.zeros(1)}, "unexpected tensor heads.1.2.weight"),
        ({"heads.3.2.bias": torch.zeros(1)}, "tensor heads.2.0.0.weight_orig is missing"),
    ]:
        save_heads(torch, heads, file, changes=changes)
        with pytest.raises(ValueError, match=message):
            load_dino_heads(file)
    torch.save({"weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="last.pt: tensor heads.0.0.0.weight_orig is missing"):
        load_dino_heads(file)


# What is done to images

NEUTRAL = 0.5  # as every random number: nothing moves, nothing changes colour


def numpy_augment(images: np.ndarray, numbers: np.ndarray, cutout: float) -> np.ndarray:
    """DiffAug one image and one pixel at a time, in [-1, 1]."""
    height, width = images.shape[1:3]
    result = []
    for image, (down, right, bright, saturation, contrast, row, column) in zip(
            2 * images.astype(np.float64) - 1, numbers.T, strict=True):
        most = (round(height / 8), round(width / 8))
        shift = [int(number * (2 * m + 1)) - m for number, m in zip((down, right), most, strict=True)]
        moved = np.zeros_like(image)
        for i in range(height):
            for j in range(width):
                source = i + shift[0], j + shift[1]
                if 0 <= source[0] < height and 0 <= source[1] < width:
                    moved[i, j] = image[source]
        x = moved + (bright - 0.5)
        grey = x.mean(-1, keepdims=True)
        x = grey + (x - grey) * (2 * saturation)
        x = x.mean() + (x - x.mean()) * (contrast + 0.5)
        if cutout:
            sides = [round(side * cutout) for side in (height, width)]
            starts = [int(number * (side + (1 - length % 2))) - length // 2
                      for number, side, length in zip((row, column), (height, width), sides, strict=True)]
            rows, columns = (slice(max(start, 0), start + length) for start, length in zip(starts, sides, strict=True))
            x[rows, columns] = 0
        result.append((x + 1) / 2)
    return np.stack(result)


@pytest.mark.parametrize("cutout", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("height, width", [(16, 16), (20, 13)])
def test_augmentation_is_the_formula(height, width, cutout):
    images = random_images(8, height, width, 3)
    numbers = np.random.default_rng(1).uniform(size=(7, 8)).astype(np.float32)
    numbers[:, 0], numbers[:, 1] = 0, 1 - 2**-23  # the ends of the range
    actual = augment_with(images, jnp.asarray(numbers), cutout=cutout)
    np.testing.assert_allclose(actual, numpy_augment(images, numbers, cutout), atol=2e-6)


def test_each_part_alone():
    images = random_images(2, 16, 16, 3)
    neutral = np.full((7, 2), NEUTRAL, np.float32)
    np.testing.assert_allclose(augment_with(images, neutral, cutout=0.0), images, atol=1e-6)

    def change(**rows):
        numbers = neutral.copy()
        for row, number in rows.items():
            numbers[int(row[1:])] = number
        return np.asarray(augment_with(images, numbers, cutout=0.25))[:, :6]  # above the rectangle

    np.testing.assert_allclose(change(_0=0.0)[:, 2:], images[:, :4], atol=1e-6)  # an eighth of 16 rows, and grey above
    np.testing.assert_allclose(change(_0=0.0)[:, :2], 0.5, atol=1e-6)
    np.testing.assert_allclose(change(_1=0.999)[:, :, :14], images[:, :6, 2:], atol=1e-6)
    np.testing.assert_allclose(change(_2=0.9), images[:, :6] + 0.2, atol=1e-6)
    np.testing.assert_allclose(change(_3=0.0), np.repeat(images[:, :6].mean(-1, keepdims=True), 3, -1), atol=1e-6)
    mean = images.mean((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(change(_4=0.0), (images[:, :6] + mean) / 2, atol=1e-6)
    expected = images.copy()
    expected[:, 6:10, 6:10] = 0.5
    np.testing.assert_allclose(augment_with(images, neutral, cutout=0.25), expected, atol=1e-6)


def test_augmentation_draws_from_the_key_for_each_image():
    images = np.repeat(random_images(1, 16, 16, 3), 4, axis=0)
    augment = jax.jit(lambda seed: diff_augment(images, jax.random.key(seed), cutout=0.2))
    first, again, other = augment(0), augment(0), augment(1)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01
    assert all(np.abs(first[i] - first[j]).max() > 0.01 for i in range(4) for j in range(i))


def test_augmentation_covers_its_range_evenly():
    size, batch = 16, 4000
    numbers = np.random.default_rng(0).uniform(size=(7, batch)).astype(np.float32)
    numbers[2:5] = NEUTRAL
    row, column = np.mgrid[:size, :size] / size
    images = np.broadcast_to(np.stack([row, column, row], axis=-1), (batch, size, size, 3)).astype(np.float32)
    moved = np.asarray(augment_with(images, numbers, cutout=0.0))
    shifts = np.rint((moved - images)[:, size // 2, size // 2, :2] * size)
    np.testing.assert_array_equal(np.unique(shifts), [-2, -1, 0, 1, 2])  # 12.5 % of 16
    shares = np.stack([(shifts == shift).mean(axis=0) for shift in range(-2, 3)])
    np.testing.assert_allclose(shares, 0.2, atol=0.04)

    cut = np.asarray(diff_augment(random_images(batch, size, size, 3), jax.random.key(0), cutout=0.5))
    grey = (cut == 0.5).all(axis=-1)
    areas = grey.sum(axis=(1, 2))
    # Even sides: a middle at 0 ... 16, so that 8 rows are cut off to 4 at either end; 12 of the 17 lie between.
    assert areas.min() == 4 * 4 and areas.max() == 8 * 8
    mean = np.mean([min(middle + 4, 16) - max(middle - 4, 0) for middle in range(17)])
    assert areas.mean() == pytest.approx(mean**2, rel=0.03)


def test_augmentation_passes_gradients_on():
    images, step = random_images(3, 12, 12, 3), random_images(3, 12, 12, 3, seed=1)
    weights = random_images(3, 12, 12, 3, seed=2)
    loss = jax.jit(jax.value_and_grad(
        lambda images: jnp.sum(diff_augment(images, jax.random.key(0), cutout=0.2) * weights)))
    before, gradient = loss(images)
    # Augmentation is affine in the image, so that a step of any size follows the gradient.
    assert float(loss(images + step)[0] - before) == pytest.approx(float(jnp.sum(gradient * step)), rel=1e-4)
    assert (np.abs(gradient).max(axis=(1, 2, 3)) > 0.1).all()


def test_random_crop_takes_one_window_for_the_batch():
    images = np.arange(2 * 7 * 9 * 3, dtype=np.float32).reshape(2, 7, 9, 3)
    crop = jax.jit(lambda seed: random_crop(images, 5, jax.random.key(seed)))
    seen = set()
    for seed in range(100):
        window = np.asarray(crop(seed))
        row, column = divmod(int(window[0, 0, 0, 0]) // 3, 9)
        np.testing.assert_array_equal(window, images[:, row:row + 5, column:column + 5])
        seen.add((row, column))
    assert seen == {(row, column) for row in range(3) for column in range(5)}
    np.testing.assert_array_equal(crop(3), crop(3))
    for size in (9, 20):
        np.testing.assert_array_equal(random_crop(images, size, jax.random.key(0)), images)
    assert random_crop(images, 8, jax.random.key(0)).shape == (2, 7, 8, 3)


def test_rounding_to_8_bits_is_what_a_file_holds():
    images = np.random.default_rng(0).uniform(-0.2, 1.2, size=(2, 8, 8, 3)).astype(np.float32)
    expected = np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)
    rounded = round_to_8_bits(jnp.asarray(images))
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, expected / 255, atol=1e-7)
    np.testing.assert_array_equal(round_to_8_bits(rounded), rounded)
