"""What a generator's mistakes will do: reconstructions from codes of which some were replaced."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vqrae_jax.metrics import frechet, psnr
from vqrae_jax.models import flat
from vqrae_jax.models.flat import Arrays
from vqrae_jax.tokenizer import evaluate, instruments
from vqrae_jax.tokenizer.evaluate import Batches
from vqrae_jax.tokenizer.inference import decode_codes
from vqrae_jax.tokenizer.instruments import View
from vqrae_jax.training import distributed, sharding

IMAGES = 5000  # at most; nine times decoding and looking at each is enough
SHARES = (0.01, 0.05, 0.1, 0.2)
MAX_CODES = 2**16  # whose nearest neighbours are looked for
_BLOCK = 1024


def robustness(graphdef: nnx.GraphDef, arrays: Arrays, mesh: Mesh, batches: Batches,
               view: View) -> list[dict[str, Any]]:
    """PSNR, and Frechet distance to the images, after replacing a share of the codes.

    Every code is replaced with the probability of the share, by one drawn at random from all others (`random`) or by
    the one whose vector, as the decoder sees it, is nearest (`nearest`): a generator's gross and its small mistakes.
    Which are replaced depends on the image's place in the evaluation alone, and at a greater share those of a smaller
    one are among them.

    Args:
      graphdef: of the model.
      arrays: its parameters and buffers.
      mesh: of the evaluation.
      batches: the images, as `data.eval_batches` yields them.
      view: the network whose features make the distance, `fd_encoder`.

    Returns:
      `{"kind", "share", "psnr", "fd_encoder"}` for every kind and share; of share 0, untouched codes, there is one, and
      its kind is "none".

    Raises:
      ValueError: the model has no codes, or too many.
    """
    num_codes = flat.merge(graphdef, arrays).quantizer.num_codes
    if not 1 < num_codes <= MAX_CODES:
        raise ValueError(f"robustness needs a model with 2 to {MAX_CODES} codes, and this one has {num_codes}")
    jit = lambda function: jax.jit(sharding.on(mesh, functools.partial(function, graphdef)))
    encode, decode, near = jit(_encode), jit(_decode), jit(_nearest_others)(arrays)
    cells: list[tuple[str, float]] = [("none", 0.0), *((kind, share) for kind in ("random", "nearest")
                                                       for share in SHARES)]
    values: dict[tuple[str, float], list[np.ndarray]] = {cell: [] for cell in cells}
    sums: dict[Any, Any] = {}
    for batch in evaluate.placed(batches, mesh):
        images, codes = encode(arrays, batch["image"])
        looks: dict[Any, jax.Array] = {"images": view.embedding(view.see(images))}
        for kind, share in cells:
            decoded, of_images = decode(arrays, images, codes, near, batch["position"], share, kind == "nearest")
            looks[kind, share] = view.embedding(view.see(decoded))
            of_images, valid = distributed.gather((of_images, batch["valid"]))
            values[kind, share].append(of_images[valid])
        sums = instruments.add(sums, looks, batch["valid"])
    found = instruments.finished(sums)
    return [{"kind": kind, "share": share, "psnr": float(np.concatenate(values[kind, share]).mean(dtype=np.float64)),
             "fd_encoder": frechet.frechet_distance(*found[kind, share], *found["images"])} for kind, share in cells]


def _encode(graphdef: nnx.GraphDef, arrays: Arrays, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """uint8 images to float32 in [0, 1], and their codes `[B, N]`."""
    images = images.astype(jnp.float32) / 255
    return images, flat.merge(graphdef, arrays).encode(images)[1].reshape(len(images), -1)


def _decode(graphdef: nnx.GraphDef, arrays: Arrays, images: jax.Array, codes: jax.Array, near: jax.Array,
            position: jax.Array, share: float, nearest: bool) -> tuple[jax.Array, jax.Array]:
    """Reconstructions from codes of which a share is replaced, and their PSNR."""
    codes = jax.vmap(functools.partial(_replaced, share=share, nearest=nearest, near=near))(codes, position)
    decoded = decode_codes(graphdef, arrays, codes)
    return decoded, psnr(images, decoded)


def _replaced(codes: jax.Array, position: jax.Array, *, share: float, nearest: bool, near: jax.Array) -> jax.Array:
    """One image's codes `[N]`."""
    which, by = jax.random.split(jax.random.fold_in(jax.random.key(0), position))
    others = (codes + jax.random.randint(by, codes.shape, 1, len(near))) % len(near)
    replaced = jax.random.uniform(which, codes.shape) < share
    return jnp.where(replaced, jnp.where(nearest, near[codes], others), codes)


def _nearest_others(graphdef: nnx.GraphDef, arrays: Arrays) -> jax.Array:
    """Of every code the other one whose vector is nearest, `[K]` int32."""
    quantizer = flat.merge(graphdef, arrays).quantizer
    vectors = quantizer.lookup(jnp.arange(quantizer.num_codes, dtype=jnp.int32))
    squares = jnp.sum(vectors**2, axis=-1)

    def of(code: jax.Array) -> jax.Array:
        distances = squares - 2 * jnp.matmul(vectors, vectors[code], precision=jax.lax.Precision.HIGHEST)
        return jnp.argmin(distances.at[code].set(jnp.inf)).astype(jnp.int32)

    return jax.lax.map(of, jnp.arange(quantizer.num_codes), batch_size=_BLOCK)
