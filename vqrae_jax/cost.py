"""What a model costs: floating-point operations by formula, and what a chip can do.

Counted are multiplications and additions of matmuls and convolutions, 2 m n k each, of the mathematics: what
rematerialisation computes again is not counted, nor are elementwise operations, the resizing of images and the power
iterations of spectral norms. A matmul whose weights learn costs its forward pass again for their gradient, and once
more where its input needs one.
"""

from typing import NamedTuple

from vqrae_jax import build, optim
from vqrae_jax.config import Config
from vqrae_jax.convert import huggingface
from vqrae_jax.models import perceptual
from vqrae_jax.models.discriminators import POOLED
from vqrae_jax.models.perceptual import ConvNeXtSpec
from vqrae_jax.models.vit import TransformerSpec, ViTSpec


class Chip(NamedTuple):
    """What one chip can do, from its maker's data sheet.

    Attributes:
      flops: bfloat16 floating-point operations a second (dense).
      memory: bytes of its memory.
      bandwidth: bytes a second to and from its memory.
      interconnect: bytes a second that it can send to its neighbours, over all links.
    """

    flops: float
    memory: float
    bandwidth: float
    interconnect: float


# By `jax.Device.device_kind`. https://cloud.google.com/tpu/docs/system-architecture-tpu-vm and NVIDIA's data sheets.
CHIPS = {
    "TPU v4": Chip(275e12, 32 * 2**30, 1228e9, 300e9),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 819e9, 200e9),
    "TPU v5": Chip(459e12, 95 * 2**30, 2765e9, 600e9),
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1640e9, 448e9),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * 2**30, 1555e9, 300e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * 2**30, 2039e9, 300e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80 * 2**30, 3350e9, 450e9),
    "NVIDIA H200": Chip(989e12, 141 * 2**30, 4800e9, 450e9),
}


class Flops(NamedTuple):
    """Floating-point operations of a model.

    Attributes:
      search: of the comparison of an image's tokens with all codes.
      encode: of an image to its codes; without `codes`.
      decode: of codes to an image; without `codes`, of which only those looked up are needed.
      train: of an image in a training step; without `codes`.
      codes: of making the codes from their codebook (SimVQ), once a call.
      train_codes: of the same in a training step, once a micro-batch.
    """

    search: int
    encode: int
    decode: int
    train: int
    codes: int
    train_codes: int

    def per_step(self, config: Config) -> int:
        """Of a whole training step."""
        return config.train.batch_size * self.train + config.train.accumulate * self.train_codes


def flops(config: Config, *, gan: bool) -> Flops:
    """The floating-point operations of a config's model.

    An encoder of which only a part learns counts as one that learns.

    Args:
      config: of the run.
      gan: whether the discriminator learns in the training step.
    """
    encoder_spec = huggingface.read_encoder_spec(build.encoder_path(config))
    spec, decoder = encoder_spec.vit, build.decoder_spec(config, encoder_spec)
    patch = config.model.decoder.patch_size or spec.patch_size
    grid = build.encoder_input_size(config) // spec.patch_size
    tokens, size = grid**2, grid * patch
    layers = config.model.encoder.layers or (spec.depth,)
    features = spec.width * (len(layers) if config.model.encoder.combine == "concat" else 1)
    _, params, _ = build.structure(config)
    frozen = all(optim.is_frozen(path, config.optim.lr_multipliers) for path in params if path.startswith("encoder/"))
    embed, blocks = _vit(spec, tokens, depth=max(layers))
    encoder = embed.forward + blocks.forward
    encoder_train = encoder if frozen else embed.backward(inputs=False) + blocks.backward()
    if config.loss.distill_weight:
        encoder_train += encoder

    into, search, out, row = _quantizer(config, features, tokens)
    codes = config.model.quantizer.size * row
    few = config.train.batch_size // config.train.accumulate * tokens < config.model.quantizer.size
    # Where tokens are few, the gradient is that of the chosen codes, made once more.
    chosen, train_codes = (2 * tokens * row, codes) if few else (0, 2 * codes)
    decoder_in = _Work(tokens * _dense(features, decoder.width))
    decoder_blocks = _blocks(decoder, tokens + config.model.decoder.cls_token, depth=decoder.depth)
    pixels = _Work(tokens * _dense(decoder.width, patch**2 * 3))
    decoder_train = decoder_blocks.backward() + pixels.backward()
    # Straight through the quantizer the gradient goes on only to something that learns.
    decoder_train += decoder_in.backward(inputs=not frozen or into.forward + out.forward > 0)
    if gan and config.gan.adaptive:
        decoder_train += 2 * pixels.forward
    quantizer_train = (chosen + into.backward(inputs=not frozen) + search
                       + out.backward(inputs=not frozen or into.forward > 0))

    losses = 0
    if config.loss.perceptual.lpips:
        losses += 3 * _vgg(size)  # the image, its reconstruction, and the gradient by that
    if config.loss.perceptual.convnext_s:
        losses += 3 * _convnext(build.CONVNEXT_SMALL)
    if gan:
        losses += _discriminator(config, size)
    return Flops(
        search=search,
        encode=encoder + into.forward + search,
        decode=out.forward + decoder_in.forward + decoder_blocks.forward + pixels.forward,
        train=encoder_train + quantizer_train + decoder_train + losses,
        codes=codes, train_codes=train_codes)


class _Work(NamedTuple):
    """Work of matmuls with weights, and of those without (attention), whose two inputs both need a gradient."""

    weighted: int
    weightless: int = 0

    @property
    def forward(self) -> int:
        return self.weighted + self.weightless

    def backward(self, *, inputs: bool = True, weights: bool = True) -> int:
        """Forward and backward pass together."""
        return self.weighted * (1 + weights + inputs) + 3 * self.weightless


def _dense(inputs: int, outputs: int) -> int:
    return 2 * inputs * outputs


def _blocks(spec: TransformerSpec, tokens: int, *, depth: int) -> _Work:
    weighted = 4 * _dense(spec.width, spec.width) + 2 * _dense(spec.width, spec.mlp_dim)
    return _Work(depth * tokens * weighted, depth * 4 * tokens**2 * spec.width)


def _vit(spec: ViTSpec, tokens: int, *, depth: int) -> tuple[_Work, _Work]:
    """Patch embedding, and blocks."""
    return (_Work(tokens * _dense(spec.patch_size**2 * 3, spec.width)),
            _blocks(spec, tokens + spec.prefix_tokens, depth=depth))


def _quantizer(config: Config, width: int, tokens: int) -> tuple[_Work, int, _Work, int]:
    """Per image: layers before the search, the search, layers after it; and what makes one code."""
    q = config.model.quantizer
    none = _Work(0)
    if q.kind == "none":
        return none, 0, none, 0
    if q.kind == "adapter_fsq":
        into = _dense(width, 512) + _dense(512, 512) + _dense(512, q.dim)
        out = _dense(2 * 128, width) + 2 * _dense(width, width) + _dense(q.dim, 128)
        return _Work(tokens * into), 0, _Work(tokens * out), 0
    projected = q.projection or q.dim != width
    into = _Work(tokens * _dense(width, q.dim)) if projected or q.input_projection else none
    out = _Work(tokens * _dense(q.dim, width)) if projected else none
    if q.kind == "fsq":
        return into, 0, out, 0
    search = tokens * _dense(q.dim, q.size)
    if q.kind == "ranked":
        search += tokens * _dense(q.dim, q.dim)
    return into, search, out, _dense(q.dim, q.dim) if q.kind == "simvq" else 0


def _conv(size: int, kernel: int, inputs: int, outputs: int) -> int:
    return size**2 * kernel**2 * _dense(inputs, outputs)


def _vgg(size: int) -> int:
    total, channels = 0, 3
    for stage, (width, depth) in enumerate(perceptual.VGG16):
        for _ in range(depth):
            total += _conv(size // 2**stage, 3, channels, width)
            channels = width
    return total


def _convnext(spec: ConvNeXtSpec) -> int:
    side = spec.image_size // 4
    total, channels = _conv(side, 1, 4 * 4 * 3, spec.widths[0]), spec.widths[0]
    for stage, (width, depth) in enumerate(zip(spec.widths, spec.depths, strict=True)):
        if stage:
            side //= 2
            total += _conv(side, 1, 4 * channels, width)
        total += depth * side**2 * (2 * 49 * width + 2 * _dense(width, 4 * width))
        channels = width
    return total + _dense(channels, 1000)


def _discriminator(config: Config, size: int) -> int:
    """Of an image in a step: its reconstruction for the decoder, image and reconstruction for the discriminator."""
    if config.gan.discriminator == "patchgan":
        c = config.gan.channels
        first = _Work(_conv(size, 5, 3, c))
        rest = _Work(_conv(size, 3, c, c) + _conv(size // 2, 3, c, 2 * c) + _conv(size // 4, 3, 2 * c, 4 * c)
                     + _conv(POOLED, 1, 4 * c, 4 * c) + _conv(POOLED, 5, 4 * c, 1))
        return (first.backward(weights=False) + rest.backward(weights=False)
                + 2 * (first.backward(inputs=False) + rest.backward()))
    spec = build.DINO_SPECS[config.gan.discriminator]
    tokens = (build.DINO_IMAGE_SIZE // spec.patch_size) ** 2
    backbone = _vit(spec, tokens, depth=spec.depth)
    _, networks, _ = build.networks(config)
    kernels = {path: tokens * 2 * value.size for path, value in networks.items()
               if path.startswith("discriminator/heads/") and path.endswith("kernel")}
    first = _Work(sum(work for path, work in kernels.items() if "/conv1/" in path))
    rest = _Work(sum(kernels.values()) - first.forward)
    return (sum(work.backward(weights=False) + 2 * work.forward for work in backbone)
            + first.backward(weights=False) + rest.backward(weights=False)
            + 2 * (first.backward(inputs=False) + rest.backward()))
