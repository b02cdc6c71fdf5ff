"""LPIPS and ConvNeXt against PyTorch, and their weights in every layout they are published in."""

import functools
import os
import re

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from vqrae_jax.models import flat, perceptual
from vqrae_jax.models.perceptual import LPIPS, ConvNeXt, ConvNeXtSpec
from vqrae_jax.weights import perceptual as convert
from vqrae_jax.weights import tensors

TINY = ConvNeXtSpec(depths=(1, 3), widths=(8, 16), image_size=64)
# VGG16's convolutions in torchvision's `features`, and the slice of the lpips package that each is in.
SLICES = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vqrae_jax"


@pytest.fixture
def tiny_vgg16(monkeypatch):
    """Conversion does not depend on the widths; with the real ones a file has 60 MB."""
    monkeypatch.setattr(perceptual, "VGG16", ((4, 2), (5, 2), (6, 3), (7, 3), (8, 3)))


def random_images(size, *, batch=2, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=(batch, size, size, 3)).astype(np.float32)


def vgg16_tensors(seed=0) -> dict[str, np.ndarray]:
    """A random VGG16 under torchvision's names, without its classifier; features keep their magnitude."""
    rng, found, channels = np.random.default_rng(seed), {}, 3
    widths = [width for width, depth in perceptual.VGG16 for _ in range(depth)]
    for number, width in zip(SLICES, widths, strict=True):
        kernel = rng.normal(size=(width, channels, 3, 3)) * (2 / (9 * channels)) ** 0.5
        found[f"features.{number}.weight"] = kernel.astype(np.float32)
        found[f"features.{number}.bias"] = rng.normal(size=width).astype(np.float32) * 0.1
        channels = width
    return found


def linear_tensors(seed=1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"lin{i}.model.1.weight": rng.uniform(size=(1, width, 1, 1)).astype(np.float32)
            for i, (width, _) in enumerate(perceptual.VGG16)}


def full_lpips(trunk, linear) -> dict[str, np.ndarray]:
    """As the lpips package saves its module: with a second copy of the 1x1 weights, and its constants."""
    renamed = {re.sub(r"features\.(\d+)", lambda m: f"net.slice{SLICES[int(m[1])]}.{m[1]}", name): value
               for name, value in trunk.items()}
    copies = {re.sub(r"lin(\d)", r"lins.\1", name): value for name, value in linear.items()}
    constants = {f"scaling_layer.{name}": np.zeros((1, 3, 1, 1), np.float32) for name in ("shift", "scale")}
    return renamed | linear | copies | constants


def save(found, file):
    if file.suffix == ".safetensors":
        save_file({name: np.ascontiguousarray(value) for name, value in found.items()}, file)
    else:
        torch = pytest.importorskip("torch", reason="a PyTorch file needs torch")
        torch.save({name: torch.from_numpy(value) for name, value in found.items()}, file)
    return str(file)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        assert actual[path].dtype == np.float32
        np.testing.assert_array_equal(actual[path], value, err_msg=path)


def merged(module: nnx.Module, params) -> nnx.Module:
    graphdef, expected, rest = flat.split(module)
    assert not rest and {path: p.shape for path, p in params.items()} == {path: p.shape for path, p in expected.items()}
    return flat.merge(graphdef, {path: jnp.asarray(value) for path, value in params.items()})


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    """Random convolutions of a magnitude like VGG16's, and the shipped 1x1 weights."""
    found = vgg16_tensors()
    conv = lambda number: {"kernel": found[f"features.{number}.weight"].transpose(2, 3, 1, 0),
                           "bias": found[f"features.{number}.bias"]}
    numbers = iter(SLICES)
    params = {f"stages/{i}/{j}/{leaf}": value for i, (_, depth) in enumerate(perceptual.VGG16) for j in range(depth)
              for leaf, value in conv(next(numbers)).items()}
    linear = load_file(convert.LPIPS_WEIGHTS)
    params |= {f"weights/{i}": linear[f"lin{i}.model.1.weight"].reshape(-1) for i in range(5)}
    return merged(nnx.eval_shape(lambda: LPIPS(rngs=nnx.Rngs(0))), params)


def with_dtype(lpips: LPIPS, dtype) -> LPIPS:
    _, params, _ = flat.split(lpips)
    return merged(nnx.eval_shape(lambda: LPIPS(dtype=dtype, rngs=nnx.Rngs(0))), params)


def compare(module: nnx.Module, x, y):
    """What `module` makes of `x`, the distances of `x` and `y`, and the gradient of their sum by `y`."""
    return _compare(*nnx.split(module), jnp.asarray(x), jnp.asarray(y))


@functools.partial(jax.jit, static_argnums=0)
def _compare(graphdef, state, x, y):  # compiled once for a network, a type and a size, however many tests use it
    module = nnx.merge(graphdef, state)
    values, pull_back = jax.vjp(lambda y: module.distance(module(x), module(y)), y)
    return module(x), values, *pull_back(jnp.ones_like(values))


def torch_lpips(torch, x, y):
    """LPIPS of NCHW images in [0, 1] with the networks of the fixture `lpips`, as the package computes it."""
    found = {name: torch.from_numpy(value).to(x.dtype)
             for name, value in (vgg16_tensors() | load_file(convert.LPIPS_WEIGHTS)).items()}
    shift = torch.tensor([-.030, -.088, -.188], dtype=x.dtype)[None, :, None, None]
    scale = torch.tensor([.458, .448, .450], dtype=x.dtype)[None, :, None, None]

    def features(images):
        h, last = (2 * images - 1 - shift) / scale, 1
        for number, part in SLICES.items():
            if part != last:
                yield h
                h, last = torch.nn.functional.max_pool2d(h, 2), part
            weight, bias = found[f"features.{number}.weight"], found[f"features.{number}.bias"]
            h = torch.relu(torch.nn.functional.conv2d(h, weight, bias, padding=1))
        yield h

    normalize = lambda h: h / (torch.sqrt(torch.sum(h**2, dim=1, keepdim=True)) + 1e-10)
    return sum(torch.nn.functional.conv2d((normalize(a) - normalize(b))**2, found[f"lin{i}.model.1.weight"])
               .mean((1, 2, 3)) for i, (a, b) in enumerate(zip(features(x), features(y), strict=True)))


def package_lpips(torch, x, y):
    package = pytest.importorskip("lpips", reason="the lpips package is not installed")
    module = package.LPIPS(net="vgg", pnet_rand=True, verbose=False)  # with its own 1x1 weights
    trunk = full_lpips(vgg16_tensors(), {})
    trunk = {name: torch.from_numpy(value) for name, value in trunk.items() if name.startswith("net.")}
    assert not module.load_state_dict(trunk, strict=False).unexpected_keys
    return module.to(x.dtype)(x, y, normalize=True)[:, 0, 0, 0]


@pytest.mark.parametrize("reference", [torch_lpips, package_lpips])
@pytest.mark.parametrize("size, dtype", [(32, "float32"), (64, "float32"), (32, "float64")])
def test_lpips_and_its_gradient_match_pytorch(reference, size, dtype, lpips):
    torch = pytest.importorskip("torch", reason="parity needs torch")
    x = random_images(size, batch=4)
    y = np.clip(x + 0.2 * np.random.default_rng(1).normal(size=x.shape), 0, 1).astype(dtype)
    nchw = lambda a: torch.from_numpy(a.transpose(0, 3, 1, 2).astype(dtype))
    torch_y = nchw(y).requires_grad_()
    expected = reference(torch, nchw(x), torch_y)
    expected.sum().backward()
    expected, expected_gradient = expected.detach().numpy(), torch_y.grad.numpy().transpose(0, 2, 3, 1)

    with jax.enable_x64(dtype == "float64"):
        _, values, gradient = compare(with_dtype(lpips, dtype), x.astype(dtype), y)
        values, gradient = np.asarray(values), np.asarray(gradient)
    difference = np.abs(values - expected).max()
    largest = lambda a: np.abs(a).max((1, 2, 3))
    gradient_difference = largest(gradient - expected_gradient) / largest(expected_gradient)
    print(f"\nLPIPS {size} {dtype}: {expected}, difference {difference:.1e}, "
          f"of the gradient, relative, image by image, {gradient_difference}")
    assert values.shape == (4,) and values.dtype == np.float32 and expected.min() > 0.01
    assert difference <= 1e-4
    # A ReLU or a maximum that rounding tips over changes the gradient of its receptive field: now and then in float32.
    assert (gradient_difference.max() if dtype == "float64" else np.median(gradient_difference)) <= 1e-4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lpips_of_equal_and_of_constant_images_has_a_finite_gradient(dtype, lpips):
    model = with_dtype(lpips, dtype)
    noise = random_images(32, batch=1)[0]
    images = np.stack([noise, np.zeros_like(noise), np.ones_like(noise), np.full_like(noise, 0.5)])
    _, values, gradient = compare(model, images, images)
    assert np.abs(values).max() < 1e-12 and np.abs(gradient).max() < 1e-6
    _, values, gradient = compare(model, images[[1, 2, 3, 0]], images)
    assert values.min() > 0.01 and np.isfinite(gradient).all() and np.abs(gradient).max((1, 2, 3)).min() > 0


def test_lpips_where_hardly_a_channel_is_active_has_a_finite_gradient(tiny_vgg16):
    graphdef, abstract, _ = flat.split(nnx.eval_shape(lambda: LPIPS(rngs=nnx.Rngs(0))))

    @jax.jit
    def value_and_grad(params, y):
        model = flat.merge(graphdef, params)
        target = tuple(jnp.ones_like(f) for f in model(y))
        return jax.value_and_grad(lambda y: model.distance(target, model(y)).sum())(y)

    for weight in (1.0, 1e-12, 1e-25, 0.0):  # the square of 1e-25 is 0
        params = {path: jnp.full(value.shape, weight) for path, value in abstract.items()}
        value, gradient = value_and_grad(params, random_images(16))
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_lpips_in_bfloat16_is_near(lpips):
    x, y = random_images(32, batch=4), random_images(32, batch=4, seed=1)
    _, expected, _ = compare(lpips, x, y)
    features, values, gradient = compare(with_dtype(lpips, jnp.bfloat16), x, y)
    print(f"\nLPIPS in bfloat16: {values}, in float32: {expected}")
    assert {f.dtype for f in features} | {values.dtype, gradient.dtype} == {jnp.dtype("float32")}
    np.testing.assert_allclose(values, expected, rtol=0.02)


def test_lpips_features_have_unit_length_and_the_layers_sizes(lpips):
    features = jax.jit(lpips)(random_images(40))
    assert [f.shape for f in features] == [(2, 40, 40, 64), (2, 20, 20, 128), (2, 10, 10, 256), (2, 5, 5, 512),
                                           (2, 2, 2, 512)]  # an odd side is rounded down
    for f in features:
        np.testing.assert_allclose(np.linalg.norm(f, axis=-1), 1, atol=1e-5)
    with pytest.raises(ValueError, match="at least 16x16 pixels, not 15x15"):
        lpips(random_images(15))


@pytest.fixture(scope="module")
def convnext_reference():
    """(torch module, its tensors): a tiny ConvNeXt of `transformers` all of whose parameters are random."""
    torch = pytest.importorskip("torch", reason="parity needs torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    model = transformers.ConvNextForImageClassification(transformers.ConvNextConfig(
        num_stages=len(TINY.depths), depths=list(TINY.depths), hidden_sizes=list(TINY.widths), num_labels=1000,
        layer_norm_eps=1e-6)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
            if name.endswith("layer_scale_parameter"):
                parameter.add_(1)
    return model, {name: value.numpy().copy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("size, image_size", [(64, 64), (40, 64), (256, 224)])
def test_convnext_and_its_gradient_match_pytorch(size, image_size, convnext_reference, tmp_path):
    import torch
    reference, found = convnext_reference
    spec = ConvNeXtSpec(depths=TINY.depths, widths=TINY.widths, image_size=image_size)
    params = convert.load_convnext_small(save(found, tmp_path / "model.safetensors"), spec=spec)
    model = merged(nnx.eval_shape(lambda: ConvNeXt(spec, rngs=nnx.Rngs(0))), params)
    height = size if size == image_size else size - 8
    x, y = random_images(size)[:, :height], 0.5 * random_images(size, seed=1)[:, :height]

    def torch_logits(images):
        images = torch.nn.functional.interpolate(images, size=image_size, mode="bilinear", align_corners=False,
                                                 antialias=True)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return reference((images - mean[:, None, None]) / std[:, None, None]).logits

    nchw = lambda a: torch.from_numpy(a.transpose(0, 3, 1, 2).copy())
    torch_y = nchw(y).requires_grad_()
    torch_x_logits, torch_y_logits = torch_logits(nchw(x)), torch_logits(torch_y)
    expected = ((torch_x_logits - torch_y_logits)**2).mean(1)
    expected.sum().backward()
    expected_gradient = torch_y.grad.numpy().transpose(0, 2, 3, 1)

    logits, values, gradient = compare(model, x, y)
    differences = {
        "logits": float(np.abs(logits - torch_x_logits.detach().numpy()).max()),
        "distance": float(np.abs(values / expected.detach().numpy() - 1).max()),
        "gradient": float(np.abs(gradient - expected_gradient).max() / np.abs(expected_gradient).max())}
    print(f"\nConvNeXt {size}->{image_size}: logits to {np.abs(logits).max():.2f}, distance {expected.tolist()}, "
          f"differences {differences}")
    assert logits.shape == (2, 1000) and logits.dtype == values.dtype == jnp.float32 and values.shape == (2,)
    assert max(differences.values()) <= 1e-4


def test_the_distance_of_tokens_is_1_minus_their_cosine():
    tokens = np.random.default_rng(0).normal(size=(2, 3, 5, 7)).astype(np.float32)
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    distance = jax.jit(perceptual.token_distance)
    np.testing.assert_allclose(distance(*tokens), 1 - np.mean(np.sum(unit[0] * unit[1], axis=-1), axis=-1), rtol=1e-5)
    assert np.all(np.asarray(distance(tokens[0], tokens[0])) == 0)
    np.testing.assert_allclose(distance(tokens[0], -2 * tokens[0]), 2, rtol=1e-5)
    zero = np.zeros_like(tokens[0])  # no direction at all
    assert np.all(np.isfinite(jax.grad(lambda x: perceptual.token_distance(x, zero).sum())(zero)))


def test_convnext_in_bfloat16_is_near_and_finite(convnext_reference, tmp_path):
    _, found = convnext_reference
    params = convert.load_convnext_small(save(found, tmp_path / "model.safetensors"), spec=TINY)
    exact, coarse = (merged(nnx.eval_shape(lambda dtype=dtype: ConvNeXt(TINY, dtype=dtype, rngs=nnx.Rngs(0))), params)
                     for dtype in (jnp.float32, jnp.bfloat16))
    images = np.concatenate([random_images(64, batch=1), np.full((1, 64, 64, 3), 0.5, np.float32)])
    expected, *_ = compare(exact, images, images)
    logits, values, gradient = compare(coarse, images, images[::-1])
    assert np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()
    assert logits.dtype == values.dtype == gradient.dtype == jnp.float32
    assert values.min() > 0 and np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    _, values, gradient = compare(coarse, images, images)
    assert np.abs(values).max() < 1e-6 and np.isfinite(gradient).all()


def test_the_depthwise_convolution_and_both_its_derivatives_are_those_of_xla():
    rng = np.random.default_rng(0)
    x, kernel = jnp.asarray(rng.normal(size=(2, 9, 5, 3))), jnp.asarray(rng.normal(size=(7, 7, 3)))
    reference = lambda x, kernel: jax.lax.conv_general_dilated(
        x, kernel[:, :, None], (1, 1), "SAME", feature_group_count=3, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    @functools.partial(jax.jit, static_argnums=0)
    def run(convolve, x, kernel):
        y, pull_back = jax.vjp(convolve, x, kernel)
        return y, *pull_back(jnp.cos(x))

    for actual, expected in zip(run(perceptual._depthwise, x, kernel), run(reference, x, kernel), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_the_shipped_weights_are_those_of_lpips_0_1():
    weights = load_file(convert.LPIPS_WEIGHTS)
    assert {name: value.shape for name, value in weights.items()} == {
        f"lin{i}.model.1.weight": (1, width, 1, 1) for i, (width, _) in enumerate(perceptual.VGG16)}
    assert all(value.min() > 0 for value in weights.values())
    # Sums of the package's weights/v0.1/vgg.pth.
    np.testing.assert_allclose([value.sum() for _, value in sorted(weights.items())],
                               [6.925992, 8.858334, 17.515005, 51.521324, 47.034855], rtol=1e-6)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_every_layout_of_vgg16_gives_the_same_arrays(suffix, tiny_vgg16, tmp_path):
    trunk, linear = vgg16_tensors(), linear_tensors()
    expected = {f"weights/{i}": linear[f"lin{i}.model.1.weight"].reshape(-1) for i in range(5)}
    numbers = iter(SLICES)
    for i, (_, depth) in enumerate(perceptual.VGG16):
        for j in range(depth):
            number = next(numbers)
            expected[f"stages/{i}/{j}/kernel"] = trunk[f"features.{number}.weight"].transpose(2, 3, 1, 0)
            expected[f"stages/{i}/{j}/bias"] = trunk[f"features.{number}.bias"]
    merged(nnx.eval_shape(lambda: LPIPS(rngs=nnx.Rngs(0))), expected)  # these are all its paths

    linear_file = save(linear, tmp_path / f"linear{suffix}")
    unused = np.zeros((2, 3), np.float32)
    torchvision = save(trunk | {"classifier.0.weight": unused, "classifier.6.bias": unused},
                       tmp_path / f"torchvision{suffix}")
    assert_same(convert.load_lpips(torchvision, linear_file), expected)
    (tmp_path / "timm").mkdir()
    save(trunk | {"pre_logits.fc1.weight": unused, "head.fc.bias": unused},
         tmp_path / "timm" / {".safetensors": "model.safetensors", ".pth": "pytorch_model.bin"}[suffix])
    assert_same(convert.load_lpips(str(tmp_path / "timm"), linear_file), expected)
    full = save(full_lpips(trunk, linear), tmp_path / f"full{suffix}")
    assert_same(convert.load_lpips(full), expected)
    assert_same(convert.load_lpips(full), expected)  # from the cache


def test_the_shipped_weights_are_the_default(tmp_path, monkeypatch):
    widths = [width for width, _ in perceptual.VGG16]
    monkeypatch.setattr(perceptual, "VGG16", tuple((width, 1) for width in widths))
    monkeypatch.setattr(convert, "_VGG16_NUMBERS", ((0,), (5,), (10,), (17,), (24,)))
    channels = [3, *widths]
    found = {}
    for number, i, o in zip((0, 5, 10, 17, 24), channels, widths, strict=False):
        found |= {f"features.{number}.weight": np.zeros((o, i, 3, 3), np.float32),
                  f"features.{number}.bias": np.zeros(o, np.float32)}
    params = convert.load_lpips(save(found, tmp_path / "vgg.safetensors"))
    for i in range(5):
        np.testing.assert_array_equal(params[f"weights/{i}"],
                                      load_file(convert.LPIPS_WEIGHTS)[f"lin{i}.model.1.weight"][0, :, 0, 0])


def convnext_layouts(found) -> dict[str, dict[str, np.ndarray]]:
    """Tensors of `transformers` under the names of the others as well."""
    rules = {
        "torchvision": [
            (r"convnext\.embeddings\.patch_embeddings", "features.0.0"),
            (r"convnext\.embeddings\.layernorm", "features.0.1"),
            (r"convnext\.encoder\.stages\.(\d)\.downsampling_layer", lambda m: f"features.{2 * int(m[1])}"),
            (r"convnext\.encoder\.stages\.(\d)\.layers\.(\d+)", lambda m: f"features.{2 * int(m[1]) + 1}.{m[2]}"),
            ("dwconv", "block.0"), ("pwconv1", "block.3"), ("pwconv2", "block.5"), ("_scale_parameter", "_scale"),
            ("classifier", "classifier.2"), (r"convnext\.layernorm", "classifier.0"), ("layernorm", "block.2")],
        "timm": [
            (r"convnext\.embeddings\.patch_embeddings", "stem.0"), (r"convnext\.embeddings\.layernorm", "stem.1"),
            (r"convnext\.encoder\.", ""), ("downsampling_layer", "downsample"), (r"\.layers\.", ".blocks."),
            ("dwconv", "conv_dw"), ("pwconv1", "mlp.fc1"), ("pwconv2", "mlp.fc2"), ("layer_scale_parameter", "gamma"),
            ("classifier", "head.fc"), (r"convnext\.layernorm", "head.norm"), ("layernorm", "norm")]}
    layouts = {"transformers": found}
    for layout, substitutions in rules.items():
        layouts[layout] = {}
        for name, value in found.items():
            for pattern, replacement in substitutions:
                name = re.sub(pattern, replacement, name)
            layouts[layout][name] = value[:, None, None] if name.endswith("layer_scale") else value
    return layouts


def test_every_layout_of_convnext_gives_the_same_arrays(convnext_reference, tmp_path):
    layouts = convnext_layouts(convnext_reference[1])
    # As they are published.
    assert {"features.0.0.weight", "features.1.0.block.0.weight", "features.3.2.layer_scale", "features.2.1.bias",
            "features.3.0.block.5.weight", "classifier.0.weight", "classifier.2.bias"} <= layouts["torchvision"].keys()
    assert {"stem.0.weight", "stages.0.blocks.0.conv_dw.weight", "stages.1.downsample.1.bias", "head.norm.weight",
            "stages.1.blocks.2.gamma", "stages.1.blocks.1.mlp.fc2.weight", "head.fc.bias"} <= layouts["timm"].keys()
    expected = convert.load_convnext_small(save(layouts["transformers"], tmp_path / "a.safetensors"), spec=TINY)
    merged(nnx.eval_shape(lambda: ConvNeXt(TINY, rngs=nnx.Rngs(0))), expected)
    for layout, found in layouts.items():
        for suffix in (".safetensors", ".pth"):
            file = save(found, tmp_path / f"{layout}{suffix}")
            assert_same(convert.load_convnext_small(file, spec=TINY), expected)


@pytest.mark.parametrize("changes, message", [
    ({"features.14.bias": None}, "tensor features.14.bias is missing$"),
    ({"features.14.bias": None, "features.0.bias": None}, "features.0.bias is missing, and 1 more"),
    ({"features.0.weight": None}, "not a VGG16, for tensor features.0.weight or net.slice1.0.weight is missing"),
    ({"features.28.bias": np.zeros(9, np.float32)}, r"features.28.bias has shape \(9,\), but \(8,\) is needed"),
    ({"features.1.running_mean": np.zeros(4, np.float32)}, "unexpected tensor features.1.running_mean"),
])
def test_tensors_of_vgg16_that_do_not_fit_are_named(changes, message, tiny_vgg16, tmp_path, cache):
    found = {name: value for name, value in (vgg16_tensors() | changes).items() if value is not None}
    with pytest.raises(ValueError, match=f"vgg.safetensors: .*{message}"):
        convert.load_lpips(save(found, tmp_path / "vgg.safetensors"))
    assert not cache.exists()


@pytest.mark.parametrize("changes, message", [
    ({"lin2.model.1.weight": None}, "tensor lin2.model.1.weight is missing$"),
    ({"lin2.model.1.weight": np.zeros(6, np.float32)}, r"lin2.model.1.weight has shape \(6,\), but \(1, 6, 1, 1\)"),
    ({"lin5.model.1.weight": np.zeros(6, np.float32)}, "unexpected tensor lin5.model.1.weight"),
])
def test_weights_of_lpips_that_do_not_fit_are_named(changes, message, tiny_vgg16, tmp_path):
    vgg16 = save(vgg16_tensors(), tmp_path / "vgg.safetensors")
    found = {name: value for name, value in (linear_tensors() | changes).items() if value is not None}
    with pytest.raises(ValueError, match=f"linear.safetensors: .*{message}"):
        convert.load_lpips(vgg16, save(found, tmp_path / "linear.safetensors"))


@pytest.mark.parametrize("changes, message", [
    ({"classifier.bias": None}, "tensor classifier.bias is missing$"),
    ({"convnext.embeddings.patch_embeddings.weight": None},
     "not a ConvNeXt, for tensor features.0.0.weight or stem.0.weight or convnext.embeddings.patch_embeddings.weight"),
    ({"classifier.bias": np.zeros(10, np.float32)}, r"classifier.bias has shape \(10,\), but \(1000,\) is needed"),
    ({"convnext.encoder.stages.0.layers.1.dwconv.bias": np.zeros(8, np.float32)},
     "unexpected tensor convnext.encoder.stages.0.layers.1.dwconv.bias"),
])
def test_tensors_of_convnext_that_do_not_fit_are_named(changes, message, convnext_reference, tmp_path):
    found = {name: value for name, value in (convnext_reference[1] | changes).items() if value is not None}
    with pytest.raises(ValueError, match=f"model.safetensors: .*{message}"):
        convert.load_convnext_small(save(found, tmp_path / "model.safetensors"), spec=TINY)


def test_an_absent_file_is_one_line_with_the_command_that_gets_it(tiny_vgg16, tmp_path, monkeypatch):
    def message(load, *args):
        with pytest.raises(OSError) as error:
            load(*args)
        assert "\n" not in str(error.value)
        return str(error.value)

    vgg16 = "`hf download timm/vgg16.tv_in1k model.safetensors`"
    url = "https://download.pytorch.org/models/convnext_small-0c510722.pth"
    absent = str(tmp_path / "absent.pth")
    assert vgg16 in message(convert.load_lpips, absent) and absent in message(convert.load_lpips, absent)
    assert vgg16 in message(convert.load_lpips, "")
    assert vgg16 in message(convert.load_lpips, str(tmp_path))  # a folder without weights
    assert f"`curl -L -o {absent} --create-dirs {url}`" in message(convert.load_convnext_small, absent)
    assert f"`curl -L -o FILE --create-dirs {url}`" in message(convert.load_convnext_small, "")
    assert "leave the path empty" in message(
        convert.load_lpips, save(vgg16_tensors(), tmp_path / "vgg.safetensors"), absent)

    def offline(repo_id, **options):
        raise ConnectionError("no route to host\nlong explanation")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert vgg16 in message(convert.load_lpips, "timm/vgg16.tv_in1k")


class Converter:
    """Counts its calls; what it makes depends on the file."""

    calls = 0

    def __call__(self, file):
        self.calls += 1
        return {"a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T, "size": np.array(len(file.read_bytes()))}


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "source.bin"
    file.write_bytes(b"12345")
    return file


def test_a_file_is_converted_once_for_its_content_and_name(source, tmp_path):
    converter = Converter()
    first = tensors.cached(source, converter, name="x")
    second = tensors.cached(source, converter, name="x")
    assert converter.calls == 1
    np.testing.assert_array_equal(first["a/kernel"], [[0, 3], [1, 4], [2, 5]])
    for path, value in first.items():
        np.testing.assert_array_equal(second[path], value)
        assert second[path].dtype == value.dtype
    tensors.cached(source.rename(tmp_path / "moved"), converter, name="x")
    assert converter.calls == 1
    tensors.cached(tmp_path / "moved", converter, name="y")
    assert converter.calls == 2
    (tmp_path / "moved").write_bytes(b"123456")
    assert tensors.cached(tmp_path / "moved", converter, name="x")["size"] == 6
    assert converter.calls == 3


@pytest.mark.parametrize("content", [b"", b"garbage", "truncated"])
def test_a_damaged_cache_is_replaced(content, source, cache):
    converter = Converter()
    tensors.cached(source, converter, name="x")
    (kept,) = cache.iterdir()
    good = kept.read_bytes()
    kept.write_bytes(good[:-3] if content == "truncated" else content)
    assert tensors.cached(source, converter, name="x")["size"] == 5
    assert converter.calls == 2 and kept.read_bytes() == good
    tensors.cached(source, converter, name="x")
    assert converter.calls == 2


def test_a_cache_that_cannot_be_written_is_done_without(source, cache, tmp_path, monkeypatch):
    converter = Converter()

    def full(*args):
        raise OSError("no space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert tensors.cached(source, converter, name="x")["size"] == 5
    assert list(cache.iterdir()) == []  # and leaves nothing behind
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert tensors.cached(source, converter, name="x")["size"] == 5
    assert converter.calls == 2


def test_without_xdg_cache_home_the_cache_is_in_the_home_folder(source, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    tensors.cached(source, Converter(), name="x")
    (kept,) = (tmp_path / "home" / ".cache" / "vqrae_jax").iterdir()
    assert re.fullmatch(r"x-[0-9a-f]{32}\.safetensors", kept.name)


def test_the_networks_are_read_from_the_cache(tiny_vgg16, convnext_reference, tmp_path, monkeypatch):
    vgg16 = save(vgg16_tensors(), tmp_path / "vgg.safetensors")
    linear = save(linear_tensors(), tmp_path / "linear.safetensors")
    convnext = save(convnext_reference[1], tmp_path / "convnext.safetensors")
    load = lambda: convert.load_lpips(vgg16, linear) | convert.load_convnext_small(convnext, spec=TINY)
    expected = load()

    def forbidden(file):
        raise AssertionError(f"{file} is read again")
    monkeypatch.setattr(tensors, "read", forbidden)
    assert_same(load(), expected)
    narrower = ConvNeXtSpec(depths=TINY.depths, widths=(8, 8))
    with pytest.raises(AssertionError, match="convnext.safetensors is read again"):
        convert.load_convnext_small(convnext, spec=narrower)
