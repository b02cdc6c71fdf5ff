"""What SigLIP has beside its vision encoder: the head that pools images, the text tower, and the logits of a pair.

With them features of the encoder are compared with class names (zero-shot classification). SigLIP: Zhai et al. 2023,
arXiv 2303.15343; SigLIP 2 at a fixed resolution has the same architecture (Tschannen et al. 2025, arXiv 2502.14786).
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vqrae_jax.models.vit import FinalNorm, Linear, Mlp, Transformer, TransformerSpec, attend, layer_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSpec(TransformerSpec):
    """A transformer that reads text.

    Attributes:
      vocabulary: token ids are in [0, vocabulary).
      length: tokens of a text, with the padding, which SigLIP was trained to read too.
      projection: width e of the embedding.
    """

    vocabulary: int
    length: int
    projection: int


class PoolingHead(nnx.Module):
    """One vector of an image's tokens, `[B, N, d] -> [B, d]`: a learned query attends to them, then an MLP."""

    def __init__(self, spec: TransformerSpec, *, rngs: nnx.Rngs):
        self.heads = spec.heads
        self.probe = nnx.Param(nnx.initializers.xavier_uniform()(rngs.params(), (1, 1, spec.width)))
        self.qkv = Linear(spec.width, 3 * spec.width, rngs=rngs)
        self.out = Linear(spec.width, spec.width, rngs=rngs)
        self.norm = layer_norm(spec.width, eps=spec.norm_eps, rngs=rngs)
        self.mlp = Mlp(spec, rngs=rngs, dtype=jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        batch, _, width = tokens.shape
        by_head = lambda x: x.reshape(batch, -1, self.heads, width // self.heads).transpose(0, 2, 1, 3).reshape(
            batch * self.heads, -1, width // self.heads)
        query = jnp.broadcast_to(self.qkv(self.probe[...])[..., :width], (batch, 1, width))
        _, key, value = jnp.split(self.qkv(tokens), 3, axis=-1)
        x = self.out(attend(by_head(query), by_head(key), by_head(value)).reshape(batch, width))
        return x + self.mlp(self.norm(x))


class TextTower(nnx.Module):
    """Texts to vectors: token ids `[T, length]` -> `[T, projection]` float32, the last position's, bidirectional."""

    def __init__(self, spec: TextSpec, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.token_embedding = nnx.Param(normal(rngs.params(), (spec.vocabulary, spec.width)))
        self.position_embedding = nnx.Param(normal(rngs.params(), (spec.length, spec.width)))
        self.transformer = Transformer(spec, rngs=rngs)
        self.head = Linear(spec.width, spec.projection, rngs=rngs)

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        x = self.transformer(self.token_embedding[...][token_ids] + self.position_embedding[...])
        return self.head(x[:, -1])


class SiglipHeads(nnx.Module):
    """From an encoder's features to embeddings, and from texts to embeddings that they can be compared with.

    Everything is computed in float32.

    Args:
      vision: the shape of the vision encoder; `depth` does not matter.
      text: the shape of the text tower.
      rngs: source of the initial parameters.

    Raises:
      ValueError: embeddings of images and texts would not have the same width.
    """

    def __init__(self, vision: TransformerSpec, text: TextSpec, *, rngs: nnx.Rngs):
        if text.projection != vision.width:
            raise ValueError(f"text embeddings of width {text.projection} cannot be compared with image embeddings of "
                             f"width {vision.width}")
        self.text_spec = text
        self.final_norm_scale = nnx.Param(jnp.ones(vision.width))
        self.final_norm_bias = nnx.Param(jnp.zeros(vision.width))
        self.pooling = PoolingHead(vision, rngs=rngs)
        self.text = TextTower(text, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.zeros(1))
        self.logit_bias = nnx.Param(jnp.zeros(1))

    def image_embedding(self, tokens: jax.Array, *, final_norm: FinalNorm = "affine") -> jax.Array:
        """Features of the encoder, pretrained or fine-tuned, as unit vectors.

        Args:
          tokens: `[B, N, d]`, the last block's patch tokens after the last LayerNorm, in any order.
          final_norm: the encoder's. `plain` tokens first get the scale and the bias of the pretrained LayerNorm, which
            the head was trained on, so that they are what `affine` would have been.

        Returns:
          `[B, e]` float32 of length 1.

        Raises:
          ValueError: features of another width, such as those of several layers.
        """
        width = self.final_norm_scale.shape[0]
        if tokens.shape[-1] != width:
            raise ValueError(f"features are {tokens.shape[-1]} wide, but SigLIP's pooling head takes the {width} of "
                             "the last layer alone: zero-shot needs an encoder with model.encoder.layers empty")
        if final_norm == "plain":
            tokens = tokens * self.final_norm_scale[...] + self.final_norm_bias[...]
        return _unit(self.pooling(tokens))

    def text_embedding(self, token_ids: jax.Array) -> jax.Array:
        """Token ids `[T, length]` int32 -> `[T, e]` float32 of length 1."""
        return _unit(self.text(token_ids))

    def logits(self, images: jax.Array, texts: jax.Array) -> jax.Array:
        """Embeddings `[B, e]`, `[T, e]` -> `[B, T]`; a pair belongs together with probability sigmoid(logit)."""
        similarity = jnp.matmul(images, texts.T, precision=jax.lax.Precision.HIGHEST)
        return similarity * jnp.exp(self.logit_scale[...]) + self.logit_bias[...]


def class_embeddings(heads: SiglipHeads, tokenize: Callable[[list[str]], np.ndarray], names: Sequence[str],
                     templates: Sequence[str]) -> np.ndarray:
    """What images are compared with in zero-shot classification: a unit vector for each class.

    It is the mean of the unit vectors of the class name in all templates, made a unit vector again, as CLIP's
    evaluation has it (Radford et al. 2021, arXiv 2103.00020, section 3.1.4).

    Args:
      heads: the text tower.
      tokenize: texts -> token ids `[T, length]`, as `weights.siglip.load_tokenizer` makes it.
      names: of the classes, in the order of their labels.
      templates: each with `{}` where the name goes.

    Returns:
      `[C, e]` float32.

    Raises:
      ValueError: fewer than two classes, an empty name, a template without `{}` or no template at all, or token ids
        that the text tower does not have.
    """
    if len(names) < 2:
        raise ValueError(f"zero-shot needs the names of at least two classes, not {len(names)}")
    if not all(name.strip() for name in names):
        raise ValueError(f"zero-shot: the name of class {[bool(name.strip()) for name in names].index(False)} is empty")
    if not templates or not all("{}" in template for template in templates):
        raise ValueError("zero-shot needs templates, each with {} where the name of the class goes")
    graphdef, state = nnx.split(heads)
    mean = jax.jit(lambda state, ids: _unit(jnp.mean(nnx.merge(graphdef, state).text_embedding(ids), axis=0)))
    embeddings = []
    for name in names:  # a class at a time: one shape, hence one program
        ids = tokenize([template.replace("{}", name) for template in templates])
        # Taking a row that does not exist is no error in JAX.
        if ids.shape[1] != heads.text_spec.length or ids.min() < 0 or ids.max() >= heads.text_spec.vocabulary:
            raise ValueError(f"the tokenizer makes {ids.shape[1]} ids up to {ids.max()} of a text, but the text tower "
                             f"takes {heads.text_spec.length} below {heads.text_spec.vocabulary}: its files are those "
                             "of another model")
        embeddings.append(np.asarray(mean(state, ids)))
    return np.stack(embeddings)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
