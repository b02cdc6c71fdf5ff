"""The decoder: tokens back to pixels through a ViT with fixed sin-cos positions."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vqrae_jax.models.vit import SAVE_MATMULS, Linear, Remat, Transformer, TransformerSpec, check_positions, unpatchify

# RAE's decoders (arXiv 2510.11690), whose checkpoints have these shapes.
_RAE = {"activation": "gelu", "norm_eps": 1e-12}
VIT_B = TransformerSpec(width=768, depth=12, heads=12, mlp_dim=3072, **_RAE)
VIT_L = TransformerSpec(width=1024, depth=24, heads=16, mlp_dim=4096, **_RAE)
VIT_XL = TransformerSpec(width=1152, depth=28, heads=16, mlp_dim=4096, **_RAE)
DECODER_SHAPES = {"vit_b": VIT_B, "vit_l": VIT_L, "vit_xl": VIT_XL}  # model.decoder.shape


def sincos_positions(width: int, grid: int) -> np.ndarray:
    """Fixed 2-D sin-cos position embeddings, `[grid*grid, width]` float32.

    The first half of the width encodes the column, the second the row; each half is the sines, then the cosines, of
    the position times 10000^(-i / (width/4)) (MAE's `get_2d_sincos_pos_embed`, arXiv 2111.06377).

    Raises:
      ValueError: width is not a multiple of 4, or the embeddings are of a size that is no model's.
    """
    check_positions(grid, width)
    if width % 4:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4, not {width}")
    frequencies = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    encode = lambda x: np.concatenate([np.sin(x[:, None] * frequencies), np.cos(x[:, None] * frequencies)], axis=1)
    rows, columns = np.divmod(np.arange(grid * grid, dtype=np.float64), grid)
    return np.concatenate([encode(columns), encode(rows)], axis=1).astype(np.float32)


class Decoder(nnx.Module):
    """Latent tokens to images.

    Linear in, position embeddings, pre-LayerNorm blocks, a last LayerNorm, and a linear layer to `patch_size**2 * 3`
    pixels a token; then the inverse of the encoder's normalisation.

    Args:
      spec: the shape of the transformer; the same as the encoder's makes the model symmetric.
      latent_width: width d of the tokens.
      grid: tokens per side.
      patch_size: side of the square of pixels a token becomes; images have grid * patch_size pixels a side.
      mean: added per channel to the output, after multiplying by
      std: per channel.
      cls_token: whether a learned token takes part in attention, as in RAE's decoders.
      learned_positions: position embeddings start as sin-cos and learn; otherwise they stay so.
      remat: see `Transformer`.
      dtype: the type the blocks compute in; parameters are float32.
      rngs: source of the initial parameters.
    """

    def __init__(self, spec: TransformerSpec, *, latent_width: int, grid: int, patch_size: int,
                 mean: tuple[float, float, float], std: tuple[float, float, float], cls_token: bool = False,
                 learned_positions: bool = False, remat: Remat = SAVE_MATMULS, dtype=jnp.float32, rngs: nnx.Rngs):
        self.grid, self.patch_size, self.width = grid, patch_size, spec.width
        self.mean, self.std = tuple(mean), tuple(std)
        self.embedding = Linear(latent_width, spec.width, dtype=dtype, rngs=rngs)
        # Not zeros: under a LayerNorm with eps 1e-12 a zero token takes all of the first steps' gradient norm.
        normal = nnx.initializers.normal(0.02)
        self.cls = nnx.Param(normal(rngs.params(), (1, spec.width)), cast_to=dtype) if cls_token else None
        positions = lambda: nnx.Param(jnp.asarray(sincos_positions(spec.width, grid)), cast_to=dtype)
        self.position_embedding = positions() if learned_positions else None
        self.transformer = Transformer(spec, remat=remat, dtype=dtype, rngs=rngs)
        self.pixels = Linear(spec.width, patch_size**2 * 3, rngs=rngs)

    def __call__(self, z: jax.Array) -> jax.Array:
        """`[B, grid*grid, latent_width] -> [B, H, W, 3]` float32, about [0, 1] but not clipped to it."""
        return self.to_images(self.hidden(z))

    def hidden(self, z: jax.Array) -> jax.Array:
        """`[B, grid*grid, latent_width] -> [B, grid*grid, width]` float32: what the last linear layer sees."""
        positions = sincos_positions(self.width, self.grid) if self.position_embedding is None \
            else self.position_embedding[...]
        x = self.embedding(z)
        x = x + jnp.asarray(positions, x.dtype)
        if self.cls is not None:
            cls = jnp.broadcast_to(self.cls[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([cls, x], axis=1)
        return self.transformer(x)[:, 0 if self.cls is None else 1:]

    def to_images(self, hidden: jax.Array) -> jax.Array:
        """The last linear layer: `[B, grid*grid, width] -> [B, H, W, 3]` float32."""
        images = unpatchify(self.pixels(hidden), (self.grid, self.grid))
        return images * jnp.asarray(self.std, jnp.float32) + jnp.asarray(self.mean, jnp.float32)
