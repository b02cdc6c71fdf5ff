"""Pretrains the nano encoder that ships with the package: a SigLIP-shaped ViT for 64-pixel images.

It stands for the pretrained foundation model wherever a real one cannot be downloaded. Supervised on CIFAR-10's
training split only (32-pixel images upscaled to 64), with random crops, flips and dropped patches (as in FLIP,
arXiv 2212.00794), AdamW for vectors and Muon for matrices (https://kellerjordan.github.io/posts/muon/).

    python launch/pretrain_nano.py --data_dir=~/tensorflow_datasets --out=vqrae_jax/assets/nano

The classifier is thrown away; what is saved is the vision tower in Hugging Face format.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon

from vqrae_jax import metrics
from vqrae_jax.data import sources, transforms
from vqrae_jax.models.vit import Linear, ViT, ViTSpec
from vqrae_jax.weights import huggingface

_DATA_DIR = flags.DEFINE_string("data_dir", "~/tensorflow_datasets", "where TFDS keeps CIFAR-10")
_OUT = flags.DEFINE_string("out", "vqrae_jax/assets/nano", "the Hugging Face folder to write")
_EPOCHS = flags.DEFINE_integer("epochs", 12, "passes over the 50,000 training images")
_BATCH = flags.DEFINE_integer("batch_size", 256, "images per step")
_LR = flags.DEFINE_float("lr", 3e-3, "peak learning rate; matrices' updates are scaled to Adam's rms")
_SEED = flags.DEFINE_integer("seed", 0, "initialisation, data order and augmentation")

_ENCODER = huggingface.EncoderSpec(
    model_type="siglip_vision_model", image_size=64, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
    vit=ViTSpec(width=192, depth=4, heads=6, mlp_dim=768, patch_size=8, activation="gelu_tanh"))
# Few patches make early steps cheap; the last steps see all of them, as evaluation does.
_PATCHES_SEEN = ((0.55, 16), (0.90, 32), (1.0, 64))  # (until this share of training, patches of each image)


def load_cifar10(split: str) -> tuple[np.ndarray, np.ndarray]:
    """All images of a split, uint8 [N, 32, 32, 3], and labels, int32 [N]."""
    source = sources.TfdsSource("cifar10", split=split, data_dir=_DATA_DIR.value)
    records = [source[i] for i in range(len(source))]
    return np.stack([transforms.decode_image(r.image) for r in records]), np.array([r.label for r in records], np.int32)


def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random 32-pixel crops of the images padded by 4, half of them mirrored."""
    count = len(images)
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    rows = rng.integers(0, 9, count)[:, None] + np.arange(32)
    columns = rng.integers(0, 9, count)[:, None] + np.arange(32)
    columns = np.where(rng.random(count)[:, None] < 0.5, columns, columns[:, ::-1])
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


class Classifier(nnx.Module):
    """A ViT that may see only some of the patches, and a linear classifier on its mean token."""

    def __init__(self, rngs: nnx.Rngs):
        self.vit = ViT(_ENCODER.vit, image_size=_ENCODER.image_size, rngs=rngs)
        self.head = Linear(_ENCODER.vit.width, 10, rngs=rngs)

    def __call__(self, images: jax.Array, kept: jax.Array) -> jax.Array:
        """`images` [B, 64, 64, 3] in [0, 1], `kept` int32 [B, M] patch positions -> logits [B, 10]."""
        tokens = self.vit.embed((images - _ENCODER.mean[0]) / _ENCODER.std[0])
        tokens = jnp.take_along_axis(tokens, kept[:, :, None], axis=1)
        return self.head(self.vit.transformer(tokens).mean(axis=1))


def upscale(images: jax.Array) -> jax.Array:
    """uint8 [B, 32, 32, 3] -> float32 [B, 64, 64, 3] in [0, 1]."""
    scaled = jax.image.resize(images.astype(jnp.float32) / 255, (len(images), 64, 64, 3), "cubic")
    return jnp.clip(scaled, 0, 1)


def main(_):
    images, labels = load_cifar10("train")
    graphdef, params = nnx.split(Classifier(nnx.Rngs(_SEED.value)))
    steps_per_epoch = len(images) // _BATCH.value
    steps = _EPOCHS.value * steps_per_epoch
    schedule = optax.warmup_cosine_decay_schedule(0.0, _LR.value, 300, steps, 1e-6)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(schedule, weight_decay=0.05, consistent_rms=0.2,
             # Stacked blocks: one matrix per layer on axes 1 and 2.
             muon_weight_dimension_numbers=lambda p: jax.tree.map(
                 lambda x: MuonDimensionNumbers((1,), (2,)) if x.ndim == 3 else None, p)))
    opt_state = optimizer.init(params)

    def loss_fn(params, batch, labels, kept):
        logits = nnx.merge(graphdef, params)(upscale(batch), kept)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.1)
        return optax.softmax_cross_entropy(logits, targets).mean(), (logits.argmax(-1) == labels).mean()

    @jax.jit
    def train_step(params, opt_state, batch, labels, kept):
        (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, labels, kept)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, accuracy

    rng = np.random.default_rng(_SEED.value)
    start, step = time.time(), 0
    for epoch in range(_EPOCHS.value):
        order = rng.permutation(len(images))
        for first in range(0, steps_per_epoch * _BATCH.value, _BATCH.value):
            index = order[first:first + _BATCH.value]
            patches = next(count for share, count in _PATCHES_SEEN if step < share * steps)
            kept = rng.random((len(index), 64)).argsort(axis=1)[:, :patches].astype(np.int32)
            params, opt_state, loss, accuracy = train_step(
                params, opt_state, augment(images[index], rng), labels[index], kept)
            step += 1
            if step % 50 == 0:
                print(f"epoch {epoch} step {step}/{steps} loss {float(loss):.3f} accuracy {float(accuracy):.3f} "
                      f"{time.time() - start:.0f} s", flush=True)

    flat = {"vit/" + "/".join(path): np.asarray(value[...]) for path, value in nnx.to_flat_state(params["vit"])}
    huggingface.save_encoder(flat, spec=_ENCODER, out_dir=_OUT.value, dtype=np.float16)
    encoder = huggingface.build_encoder(_OUT.value)
    encode = jax.jit(lambda batch: encoder(upscale(batch)).mean(axis=1))
    features = lambda images: np.concatenate([encode(images[i:i + 500]) for i in range(0, len(images), 500)])
    test_images, test_labels = load_cifar10("test")
    train_features, test_features = features(images), features(test_images)
    print("kNN top-1 (k=20, 50,000 references):",
          metrics.knn_top1(test_features, test_labels, reference=(train_features, labels)))
    print("linear probe top-1:", metrics.linear_probe_top1(train_features, labels, test_features, test_labels))


if __name__ == "__main__":
    app.run(main)
