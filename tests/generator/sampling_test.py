"""Sampling against the model without a cache and against NumPy; what a sample depends on; what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.generator.tiny import CODES, WORDS, parsed, random_arrays, text_model, tiny
from vqrae_jax.generator import build, sampling
from vqrae_jax.generator.inference import Generator
from vqrae_jax.generator.runs import Loaded
from vqrae_jax.generator.sampling import Options
from vqrae_jax.models import flat
from vqrae_jax.training import sharding

TOKENS = CODES.grid**2
PROMPTS = [" ".join(WORDS[:length]) for length in (0, 2, 5, 4)]


def generator(config) -> Generator:
    """A model with random weights."""
    structure = build.structure(config, CODES._replace(classes=0) if config.prefix.kind == "caption" else CODES)
    return Generator(Loaded(config, None, structure, random_arrays(structure.params)), sharding.one_device())


@pytest.fixture(scope="module")
def by_class():
    return generator(parsed(tiny()))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    pytest.importorskip("tokenizers", reason="captions need tokenizers")
    return generator(parsed(tiny(captions=text_model(tmp_path_factory.mktemp("text")))))


@pytest.fixture(autouse=True)
def growing_cache(monkeypatch):
    monkeypatch.setattr(sampling, "_LEAST_PLACES", 1)


def without_cache(tested: Generator, num: int, options: Options, prompts=None) -> np.ndarray:
    """Codes from whole sequences, a row and a token at a time, with the arithmetic of NumPy."""
    model, vocabulary = flat.merge(tested.structure.graphdef, tested._params), tested.structure.vocabulary
    width = TOKENS + tested.config.prefix.longest * bool(prompts)
    forward = jax.jit(lambda tokens: model.logits(model.hidden(tokens), vocabulary.code)[0])

    def logits(tokens):  # padding on the right is seen by nothing before it
        return np.asarray(forward(np.int32([tokens + [0] * (width - len(tokens))])), np.float64)[len(tokens) - 1]

    rows, prefixes = [], tested.prefixes(None, prompts)
    for number in range(num):
        arrays = prefixes.of(number)
        text = arrays["caption"][arrays["pads"]:].tolist() if prompts else []
        begin, empty = (int(vocabulary.begin(label)) for label in (arrays["label"], np.int32(-1)))
        codes = []
        for position in range(TOKENS):
            tokens = [vocabulary.text + code for code in codes]
            seen = logits([*text, begin, *tokens])
            if options.cfg != 1:
                other = logits([empty, *tokens])
                seen = other + float(sampling.guidance_scales(options, TOKENS)[position]) * (seen - other)
            key = functools.reduce(jax.random.fold_in, (number, position), jax.random.key(options.seed))
            codes.append(int(np.argmax(seen + options.temperature * np.asarray(jax.random.gumbel(key, seen.shape)))))
        rows.append(codes)
    return np.reshape(rows, (num, CODES.grid, CODES.grid))


@pytest.mark.parametrize("options", [Options(temperature=0.0), Options(seed=3),
                                     Options(cfg=2.5, schedule="power_cosine", temperature=0.7)],
                         ids=["greedy", "random", "guided"])
def test_codes_are_those_of_the_model_without_a_cache(by_class, options):
    found = by_class.sample(5, **vars(options))
    assert found.dtype == jnp.int32 and found.shape == (5, CODES.grid, CODES.grid)
    np.testing.assert_array_equal(found, without_cache(by_class, 5, options))
    assert len(np.unique(found)) > 5


def test_captions_stand_before_an_image(captioned):
    options = Options(cfg=2.0)
    found = captioned.sample(4, prompts=PROMPTS, **vars(options))
    np.testing.assert_array_equal(found, without_cache(captioned, 4, options, PROMPTS))
    # No prompt at all is the empty one.
    np.testing.assert_array_equal(found[0], captioned.sample(4, **vars(options))[0])


def test_an_image_depends_on_its_number_and_the_seed_alone(by_class):  # on several devices: see sharding_test
    options = {"cfg": 1.5, "top_k": 9, "top_p": 0.9, "seed": 2}
    found = by_class.sample(8, **options)
    for size in (1, 3):
        np.testing.assert_array_equal(found, by_class.sample(8, batch_size=size, **options))
    np.testing.assert_array_equal(found[:3], by_class.sample(3, **options))
    others = by_class.sample(8, **options | {"seed": 4})
    assert np.mean(others != found) > 0.5
    assert len({tuple(image.reshape(-1).tolist()) for image in np.asarray(found)}) == 8


def test_classes_take_turns(by_class):
    found = by_class.sample(5, classes=[2, 0], temperature=0.0)
    np.testing.assert_array_equal(found[:3], found[2:])
    np.testing.assert_array_equal(found[:2], by_class.sample(5, temperature=0.0)[jnp.array([2, 0])])


def test_guidance_of_one_costs_nothing(by_class):
    np.testing.assert_array_equal(by_class.sample(5, cfg=1.0, schedule="linear"), by_class.sample(5))
    batch = by_class.prefixes(None, None).of(np.arange(4)) | {"number": np.arange(4)}

    def operations(options):
        draw = sampling.draw_of(options, TOKENS)
        return by_class._sample.lower(by_class._params, batch, draw, top_k=0).cost_analysis()["flops"]

    assert operations(Options(cfg=1.0)) == operations(Options()) < 0.6 * operations(Options(cfg=2.0))


def test_schedules_begin_at_one_and_end_at_the_scale():
    scales = {schedule: sampling.guidance_scales(Options(cfg=4.0, schedule=schedule, power=2.0), 8)
              for schedule in ("constant", "linear", "power_cosine")}
    np.testing.assert_array_equal(scales["constant"], np.full(8, 4.0))
    np.testing.assert_allclose(scales["linear"], 1 + 3 * np.arange(1, 9) / 8)
    # RAR's `generate`, at step 0, 2 and 7 of 8: 1 - cos of 0, pi / 16 and 49 pi / 64.
    np.testing.assert_allclose(scales["power_cosine"][[0, 2, 7]], [
        1, 1 + 1.5 * (1 - np.cos(np.pi / 16)), 1 + 1.5 * (1 - np.cos(49 * np.pi / 64))], rtol=1e-6)


def shares_in_numpy(logits, temperature, top_k, top_p):
    """Probabilities after temperature, top-k and top-p, in the order of `transformers`."""
    order = np.argsort(-logits, kind="stable")[:top_k or None]
    p = np.exp(logits[order] / temperature)
    p /= p.sum()
    kept = np.arange(len(p)) <= np.searchsorted(np.cumsum(p), top_p)
    shares = np.zeros(len(logits))
    shares[order[kept]] = p[kept] / p[kept].sum()
    return shares


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [
    (1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 5, 1.0), (1.5, 0, 0.8), (0.7, 6, 0.9), (1.0, 0, 1e-6), (1.0, 100, 1.0)])
def test_draws_have_the_probabilities_of_numpy(temperature, top_k, top_p):
    logits, draws = np.random.default_rng(0).normal(0, 1.5, 12).astype(np.float32), 8000
    expected = shares_in_numpy(logits.astype(np.float64), temperature, top_k, top_p)
    chosen = jax.jit(functools.partial(sampling.choose, top_k=top_k))(
        np.tile(logits, (draws, 1)), jax.random.split(jax.random.key(0), draws), temperature=np.float32(temperature),
        top_p=None if top_p == 1 else np.float32(top_p))
    shares = np.bincount(chosen, minlength=12) / draws
    assert not shares[expected == 0].any()
    np.testing.assert_allclose(shares, expected, atol=5 * np.sqrt(0.25 / draws))


def test_parameters_that_were_cast_give_the_same_logits():
    config = tiny()
    config.model.dtype = "bfloat16"
    structure = build.structure(parsed(config), CODES)
    params = random_arrays(structure.params)
    run = jax.jit(lambda params: (model := flat.merge(structure.graphdef, params)).logits(
        model.hidden(jnp.arange(16)[None]), structure.vocabulary.code))
    cast = sampling.cast(structure, params)
    np.testing.assert_array_equal(run(params), run(cast))
    assert sum(x.nbytes for x in cast.values()) < 0.52 * sum(x.nbytes for x in params.values())


@pytest.mark.parametrize(("call", "message"), [
    ({"num": 0}, "num must be at least 1, not 0"),
    ({"classes": [1, 3]}, "class 3 does not exist: this generator has the classes 0 to 2"),
    ({"classes": [-1]}, "class -1 does not exist"),
    ({"classes": []}, "no classes given"),
    ({"prompts": ["a cat"]}, "this generator takes classes, not prompts"),
    ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
    ({"top_p": 1.5}, "top_p must be above 0 and at most 1, not 1.5"),
    ({"temperature": -1.0}, "temperature must be at least 0, not -1.0"),
    ({"schedule": "cosine"}, "schedule must be constant or linear or power_cosine, not cosine"),
    ({"seed": -1}, "seed must be in"),
])
def test_what_cannot_be_sampled_is_refused_in_one_line(by_class, call, message):
    with pytest.raises(ValueError, match=message) as error:
        by_class.sample(**{"num": 2} | call)
    assert "\n" not in str(error.value)


def test_what_a_model_has_not_learned_is_refused(captioned, tmp_path):
    with pytest.raises(ValueError, match=r"a prompt has 6 tokens, but this generator takes 5: 'a the red"):
        captioned.sample(1, prompts=[" ".join(WORDS[:6])])
    with pytest.raises(ValueError, match="this generator takes prompts, not classes"):
        captioned.sample(1, classes=[0])
    never = generator(parsed(tiny(drop=0.0)))
    never.check(1, Options())
    with pytest.raises(ValueError, match=r"cfg is 2, but guidance needs .* prefix.drop of this one is 0"):
        never.sample(1, cfg=2.0)
    with pytest.raises(ValueError, match="give prompts: this generator has not learned to do without"):
        generator(parsed(tiny(captions=text_model(tmp_path), drop=0.0))).sample(1)
