"""From a config, and what is known of the codes, to the language model, and to what its tokens mean."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vqrae_jax.config import GeneratorConfig
from vqrae_jax.models import flat
from vqrae_jax.models.flat import Arrays
from vqrae_jax.models.lm import LanguageModel, LMSpec
from vqrae_jax.models.vit import DTYPES, REMAT_POLICIES
from vqrae_jax.weights import qwen3

if TYPE_CHECKING:
    from vqrae_jax.data.codes import Description  # with the data comes Grain, which defines flags

ASSETS = Path(__file__).parents[1] / "assets"
NORM_EPS = 1e-6  # Qwen3's, of every size


class Codes(NamedTuple):
    """What a generator has to know of the codes that it learns.

    Attributes:
      grid: tokens a side; an image is grid**2 of them, in raster order.
      size: codes are in [0, size).
      classes: labels are in [0, classes); 0 where captions take their place.
    """

    grid: int
    size: int
    classes: int


class Vocabulary(NamedTuple):
    """What the tokens of the language model mean: first come those of text, then the codes, then those that begin.

    The token that begins an image says of which class it is, or, the last of all, nothing: so begins an image of no
    class in particular, and every image that has a caption in front of it.

    Attributes:
      text: number of tokens of text; 0 without a text model.
      codes: of the codebook.
      classes: of the classes; 0 with captions.
    """

    text: int
    codes: int
    classes: int

    @property
    def size(self) -> int:
        """Number of all tokens."""
        return self.text + self.codes + self.classes + 1

    @property
    def code(self) -> slice:
        """Which tokens are codes, in their order."""
        return slice(self.text, self.text + self.codes)

    def begin(self, label: jax.Array) -> jax.Array:
        """The token that begins an image of a class; label -1 is none."""
        return self.text + self.codes + jnp.where(label < 0, self.classes, label)


class Structure(NamedTuple):
    """What a config says of a model; shapes are `jax.ShapeDtypeStruct`s by path, and nothing is allocated.

    Attributes:
      codes: what it learns.
      vocabulary: what its tokens mean.
      spec: its shape.
      graphdef: of the language model.
      params: shapes of its parameters.
    """

    codes: Codes
    vocabulary: Vocabulary
    spec: LMSpec
    graphdef: nnx.GraphDef
    params: Arrays


def structure(config: GeneratorConfig, codes: Codes) -> Structure:
    """The structure of a config's model; of the disk only the config.json of `model.path` is read.

    Raises:
      ValueError: a caption and an image are longer than what the model of `model.path` takes.
      OSError: that model's config cannot be read.
    """
    model, longest = config.model, codes.grid**2 + longest_caption(config)
    if model.path:
        pretrained = qwen3.read_lm_spec(model_path(config))
        if longest > pretrained.max_positions:
            raise ValueError(f"config key prefix.longest {longest_caption(config)} and an image of {codes.grid**2} "
                             f"codes are more than the {pretrained.max_positions} positions of {model.path}")
        vocabulary = Vocabulary(pretrained.vocabulary, codes.size, codes.classes)
        spec = dataclasses.replace(pretrained, vocabulary=vocabulary.size)
    else:
        vocabulary = Vocabulary(0, codes.size, codes.classes)
        spec = LMSpec(vocabulary=vocabulary.size, width=model.width, depth=model.depth, heads=model.heads,
                      kv_heads=model.kv_heads, head_dim=model.head_dim, mlp_dim=model.mlp_dim,
                      rope_theta=model.rope_theta, norm_eps=NORM_EPS, tied=model.tied_embeddings, max_positions=longest)
    graphdef, params, _ = flat.split(nnx.eval_shape(lambda: language_model(config, spec, nnx.Rngs(config.seed))))
    return Structure(codes, vocabulary, spec, graphdef, params)


def longest_caption(config: GeneratorConfig) -> int:
    """The most tokens of text that stand before an image."""
    return config.prefix.longest if config.prefix.kind == "caption" else 0


def model_path(config: GeneratorConfig) -> str:
    """The folder or hub id of the pretrained language model; for random weights the shapes of some ship."""
    shape = ASSETS / "language_models" / config.model.path.replace("/", "--")
    return str(shape) if config.model.random_weights and shape.is_dir() else config.model.path


def language_model(config: GeneratorConfig, spec: LMSpec, rngs: nnx.Rngs) -> LanguageModel:
    """The model of a shape, with random weights."""
    return LanguageModel(spec, dropout=config.model.dropout, remat=REMAT_POLICIES[config.model.remat],
                         dtype=DTYPES[config.model.dtype], rngs=rngs)


def planned_codes(config: GeneratorConfig) -> Codes:
    """The codes that a config expects, where there are none yet.

    Raises:
      ValueError: it does not say all that is to be known of them.
    """
    data, by_class = config.data, config.prefix.kind == "class"
    for name in ("grid", "size", *(("classes",) if by_class else ())):
        if not getattr(data, name):
            raise ValueError(f"config key data.{name} is 0, whatever the codes have, but none are read here: set it")
    return Codes(data.grid, data.size, data.classes if by_class else 0)


def known_codes(config: GeneratorConfig, description: "Description") -> Codes:
    """The codes of a folder.

    Args:
      config: of the run.
      description: of the folder.

    Raises:
      ValueError: they are not what the config expects, or have nothing of which it makes a prefix; the message names
        the key.
    """
    data, kind, height = config.data, config.prefix.kind, description.grid[0]
    found = {"grid": height, "size": description.codebook_size, "classes": description.num_classes or data.classes}
    for name, value in found.items():
        if (wanted := getattr(data, name)) not in (0, value):
            raise ValueError(f"config key data.{name} is {wanted}, but {data.source} has {value}")
    if not (description.labels if kind == "class" else description.captions):
        raise ValueError(f"config key prefix.kind is {kind}, but the images of {data.source} have no "
                         f"{'labels' if kind == 'class' else 'captions'}")
    if kind == "class" and not found["classes"]:
        raise ValueError(f"config key data.classes is 0, but {data.source} does not say how many classes its labels "
                         "tell apart: set it")
    return Codes(found["grid"], found["size"], found["classes"] if kind == "class" else 0)
