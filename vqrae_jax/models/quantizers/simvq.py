"""SimVQ: frozen codes under one learned linear map."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from vqrae_jax.models.flat import Buffer
from vqrae_jax.models.quantizers.base import Quantized, QuantizerKind, apply_layer, linear
from vqrae_jax.models.quantizers.codebook import CodebookQuantizer, Gradient, codebook_work
from vqrae_jax.models.quantizers.search import KMEANS_ITERATIONS, Search, norm


class SimVQ(CodebookQuantizer):
    """Frozen random codes C and one learned linear map W: the codes are C W + b (arXiv 2411.02038).

    Every code moves when W learns, so unused codes can come back; but W is one linear map, and from a random C it does
    not spread codes over strongly clustered tokens: start those with `init_from_data`. W learns from the loss
    "codebook" = mean (sg(z) - q)^2, of weight 1, and the tokens from "commitment" = mean (z - sg(q))^2.

    Cosine search only ranks: what is returned is the row of C W + b with its own length, which the codebook loss pulls
    to the tokens' length, so the decoder sees codes on the scale of tokens. `l2_normalize` instead divides tokens and
    rows by their lengths before anything else: search, losses, gradient and output are those of vectors of length 1.
    Such codes have rms e^-0.5: a decoder pretrained on tokens of rms 1 sees inputs sqrt(e) times too small.

    Args:
      width: tokens' width d.
      size: number of codes K.
      dim: codes' width e.
      init_std: standard deviation of C; None is e^-0.5, as published: codes of length 1.
      project: linear layers d -> e before and e -> d after; None where the widths differ.
      search: "euclidean" or "cosine".
      input_projection: a learned e -> e layer before the search that starts as the identity; without `project`.
      l2_normalize: tokens, after any projection, and codes have length 1; with "euclidean" search, which then ranks as
        "cosine" does.
      commitment_weight: beta, the weight of the commitment loss.
      gradient: how z_q's gradient reaches the tokens, "straight_through" or "rotation" (see `rotate_onto`).
      block_tokens: see `nearest_code`.
    """

    def __init__(self, *, width: int, size: int, dim: int, init_std: float | None = None, project: bool | None = None,
                 search: Search = "euclidean", input_projection: bool = False, l2_normalize: bool = False,
                 commitment_weight: float = 0.25, gradient: Gradient = "straight_through",
                 block_tokens: int | None = None, rngs: nnx.Rngs):
        if l2_normalize and search == "cosine":
            raise ValueError("l2_normalize already ranks codes by their cosine: leave search \"euclidean\"")
        super().__init__(width=width, size=size, dim=dim, project=project, search=search,
                         commitment_weight=commitment_weight, gradient=gradient, block_tokens=block_tokens, rngs=rngs,
                         input_projection=input_projection)
        self.l2_normalize = l2_normalize
        std = dim**-0.5 if init_std is None else init_std
        self.codebook = Buffer(std * jax.random.normal(rngs.params(), (size, dim)))
        self.projection = linear(dim, dim, rngs=rngs)

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each of `Quantized.losses`."""
        return {"codebook": 1.0, **super().loss_weights}

    def codes(self) -> jax.Array:
        """The rows of C W + b, `[K, e]` float32, of length 1 with `l2_normalize`."""
        return self._normalized(apply_layer(self.projection, self.codebook[...]))

    def _chosen(self, codes: jax.Array, indices: jax.Array) -> jax.Array:
        if indices.size >= self.num_codes:
            return codes[indices]
        # Fewer tokens than codes: rows of C, then W, whose gradient needs no [K, e] array to scatter into.
        return self._normalized(apply_layer(self.projection, self.codebook[...][indices]))

    def _to_code_space(self, z: jax.Array) -> jax.Array:
        return self._normalized(super()._to_code_space(z))

    def _normalized(self, x: jax.Array) -> jax.Array:
        return x / norm(x) if self.l2_normalize else x

    def __call__(self, z: jax.Array, *, train: bool) -> Quantized:
        del train  # the same in training and out of it
        quantized, z, chosen = self._quantize(z)
        codebook_loss = jnp.mean((jax.lax.stop_gradient(z) - chosen) ** 2)
        return quantized._replace(losses={"codebook": codebook_loss, **quantized.losses})

    def init_from_data(self, z: jax.Array, *, rng: jax.Array, iterations: int = KMEANS_ITERATIONS) -> dict:
        """Values that make the codes the k-means centres of tokens `[N, d]`, N >= K; for `nnx.update(self, values)`.

        C becomes the centres and W the identity: W is square, so nothing is lost by starting it there. With
        `l2_normalize` they are the centres of the normalised tokens.
        """
        centres = self._centres(z, iterations=iterations, rng=rng)
        dim = centres.shape[-1]
        return {"codebook": centres, "projection": {"kernel": jnp.eye(dim), "bias": jnp.zeros(dim)}}


SIMVQ = QuantizerKind(
    build=lambda *, projection, **keys: SimVQ(project=projection or None, **keys),
    keys=("projection", "input_projection", "l2_normalize", "search", "gradient", "commitment_weight"),
    work=functools.partial(codebook_work, learned_codes=True), sharded={"codebook": (0, 1)}, from_data=True)
