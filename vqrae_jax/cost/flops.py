"""What a model costs: floating-point operations by formula, and what a chip can do.

Counted are multiplications and additions of matmuls and convolutions, 2 m n k each, of the mathematics: what
rematerialisation computes again is not counted, nor are elementwise operations, the resizing of images and the power
iterations of spectral norms. A matmul whose weights learn costs its forward pass again for their gradient, and once
more where its input needs one.
"""

import dataclasses
from typing import NamedTuple

from vqrae_jax.config import Config, GeneratorConfig
from vqrae_jax.generator import build as generator_build
from vqrae_jax.models.discriminators import DISCRIMINATORS
from vqrae_jax.models.flops import Work, dense
from vqrae_jax.models.lm import lm_work
from vqrae_jax.models.perceptual import ENCODER, NETWORKS
from vqrae_jax.models.quantizers import QUANTIZERS
from vqrae_jax.models.vit import blocks_work, vit_work
from vqrae_jax.tokenizer import build
from vqrae_jax.tokenizer.build import Structure, quantizer_keys


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


# By `jax.Device.device_kind`. https://cloud.google.com/tpu/docs/system-architecture-tpu-vm and NVIDIA's data sheets, of
# B200 that of DGX B200. A TPU7x has two devices, each of which is half of it.
CHIPS = {
    "TPU v4": Chip(275e12, 32 * 2**30, 1228e9, 300e9),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 819e9, 200e9),
    "TPU v5": Chip(459e12, 95 * 2**30, 2765e9, 600e9),
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1640e9, 448e9),
    "TPU7x": Chip(2307e12 / 2, 96 * 2**30, 7380e9 / 2, 300e9),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * 2**30, 1555e9, 300e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * 2**30, 2039e9, 300e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80 * 2**30, 3350e9, 450e9),
    "NVIDIA H200": Chip(989e12, 141 * 2**30, 4800e9, 450e9),
    "NVIDIA B200": Chip(2250e12, 180 * 2**30, 8000e9, 900e9),
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


def flops(config: Config, structure: Structure, phase: str) -> Flops:
    """The floating-point operations of a config's model.

    An encoder of which only some layers learn counts as one that learns.

    Args:
      config: of the run.
      structure: its model's.
      phase: of the training step: "gan" if the discriminator learns.
    """
    spec, decoder, tokens = structure.encoder.vit, structure.decoder, structure.tokens
    patch = config.model.decoder.patch_size or spec.patch_size
    layers = config.model.encoder.layers or (spec.depth,)
    features = spec.width * (len(layers) if config.model.encoder.combine == "concat" else 1)
    frozen = not build.encoder_learns(config, structure.params)
    embed, blocks = vit_work(spec, tokens, depth=max(layers))
    encoder = embed.forward + blocks.forward
    encoder_train = encoder if frozen else embed.backward(inputs=False) + blocks.backward()
    if build.has_teacher(config, structure.params):
        encoder_train += encoder

    kind = QUANTIZERS[config.model.quantizer.kind]
    into, search, out, row = kind.work(width=features, tokens=tokens, **quantizer_keys(config))
    codes = config.model.quantizer.size * row
    few = config.train.batch_size // config.train.accumulate * tokens < config.model.quantizer.size
    # Where tokens are few, the gradient is that of the chosen codes, made once more.
    chosen, train_codes = (2 * tokens * row, codes) if few else (0, 2 * codes)
    decoder_in = Work(tokens * dense(features, decoder.width))
    decoder_blocks = blocks_work(decoder, tokens + config.model.decoder.cls_token, depth=decoder.depth)
    pixels = Work(tokens * dense(decoder.width, patch**2 * 3))
    decoder_train = decoder_blocks.backward() + pixels.backward()
    # Straight through the quantizer the gradient goes on only to something that learns.
    decoder_train += decoder_in.backward(inputs=not frozen or into.forward + out.forward > 0)
    if phase == "gan" and config.gan.adaptive:
        decoder_train += 2 * pixels.forward
    quantizer_train = (chosen + into.backward(inputs=not frozen) + search
                       + out.backward(inputs=not frozen or into.forward > 0))

    size = config.data.image_size
    # The image, its reconstruction, and the gradient by that; the encoder has seen the image already.
    losses = sum(3 * NETWORKS[name].flops(size) for name in build.perceptual_networks(config))
    if ENCODER in build.perceptual_shares(config):
        losses += embed.backward(weights=False) + blocks.backward(weights=False)
    if phase == "gan":
        losses += DISCRIMINATORS[config.gan.discriminator].flops(config.gan, size)
    return Flops(
        search=search,
        encode=encoder + into.forward + search,
        decode=out.forward + decoder_in.forward + decoder_blocks.forward + pixels.forward,
        train=encoder_train + quantizer_train + decoder_train + losses,
        codes=codes, train_codes=train_codes)


def generator_work(config: GeneratorConfig, structure: generator_build.Structure) -> Work:
    """The operations of an image of a generator: forward those of sampling it, backward those of a training step.

    A model of which only some parameters learn counts as one that learns. Embeddings are looked up, which is free.
    """
    tokens = structure.codes.grid**2
    spec = dataclasses.replace(structure.spec, vocabulary=structure.vocabulary.codes)  # of which logits are computed
    return lm_work(spec, generator_build.longest_caption(config) + tokens, predicted=tokens)
