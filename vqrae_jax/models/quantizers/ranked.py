"""Fixed codes that are found by fixed keys: the PyTorch system's first SimVQ."""

import jax
import jax.numpy as jnp
from flax import nnx

from vqrae_jax.models.flat import Buffer
from vqrae_jax.models.flops import QuantizerWork, dense
from vqrae_jax.models.quantizers.base import Quantized, QuantizerKind
from vqrae_jax.models.quantizers.codebook import CodebookQuantizer, Gradient, codebook_work


class RankedVQ(CodebookQuantizer):
    """Fixed codes that are found by fixed keys, as in a discrete key-value bottleneck (arXiv 2207.11240).

    A token z chooses the code whose key has the highest cosine with z Q, and becomes that row of the codebook as it is.
    Nothing here learns: the choice passes no gradient to Q or the keys, so they are buffers; tokens learn from
    "commitment" = mean (z - sg(q))^2. It exists for checkpoints of the first SimVQ of hugoycj/RAE, where
    keys = C Wc^T with a second matrix Wc.

    A random start draws codes of rms 1, the scale of tokens after a LayerNorm, and keys = C Q, so that a code's key
    says something about the code. (That SimVQ drew codes near zero and two unrelated matrices, and could not leave
    either.)

    Buffers: `codebook` [K, e], `keys` [K, p], of any length, and `queries` [e, p], which is Q; float32.

    Args:
      width: tokens' width d, which must equal
      dim: codes' width e: there is no projection to or from code space.
      size: number of codes K.
      key_dim: keys' width p; None is e.
      commitment_weight: beta, the weight of the commitment loss.
      gradient: see `SimVQ`.
      block_tokens: see `nearest_code`.
    """

    def __init__(self, *, width: int, size: int, dim: int, key_dim: int | None = None, commitment_weight: float = 0.25,
                 gradient: Gradient = "straight_through", block_tokens: int | None = None, rngs: nnx.Rngs):
        if width != dim:
            raise ValueError(f"RankedVQ has no projection: dim {dim} must equal the tokens' width {width}")
        super().__init__(width=width, size=size, dim=dim, project=False, search="cosine",
                         commitment_weight=commitment_weight, gradient=gradient, block_tokens=block_tokens, rngs=rngs)
        codebook = jax.random.normal(rngs.params(), (size, dim))
        queries = nnx.initializers.lecun_normal()(rngs.params(), (dim, dim if key_dim is None else key_dim))
        self.codebook = Buffer(codebook)
        self.keys = Buffer(jnp.matmul(codebook, queries, precision=jax.lax.Precision.HIGHEST))
        self.queries = Buffer(queries)

    def codes(self) -> jax.Array:
        """The codebook, `[K, e]` float32."""
        return self.codebook[...]

    def _nearest(self, z: jax.Array, codes: jax.Array) -> jax.Array:
        del codes
        return super()._nearest(jnp.matmul(z, self.queries[...], precision=jax.lax.Precision.HIGHEST), self.keys[...])

    def __call__(self, z: jax.Array, *, train: bool) -> Quantized:
        del train  # the same in training and out of it
        return self._quantize(z)[0]


def _work(*, tokens: int, dim: int, **keys) -> QuantizerWork:
    work = codebook_work(tokens=tokens, dim=dim, **keys)
    return work._replace(search=work.search + tokens * dense(dim, dim))


RANKED = QuantizerKind(build=RankedVQ, keys=("gradient", "commitment_weight"), work=_work,
                       sharded={"codebook": (0, 1), "keys": (0, 1)})
