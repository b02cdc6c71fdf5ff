"""The generator's loss, by hand; what may be seen by what; and the step on micro-batches and on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.generator.tiny import CODES, batch, parsed, text_model, tiny
from vqrae_jax.generator import build, init, loss, train_state
from vqrae_jax.training import sharding


class Model:
    """A config's model with random weights."""

    def __init__(self, config):
        self.config = config
        self.structure = build.structure(config, CODES)
        self.vocabulary = self.structure.vocabulary
        self.model = build.language_model(config, self.structure.spec, nnx.Rngs(1))
        # Embeddings of 0.02 make everything alike: here every token is to matter.
        self.model.token_embedding[...] *= 50
        self.predict = jax.jit(lambda batch: loss.predict(self.model, self.vocabulary, batch, rng=None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return text_model(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def by_class():
    return Model(parsed(tiny()))


@pytest.fixture(scope="module")
def captioned(folder):
    return Model(parsed(tiny(captions=folder)))


def sequences(vocabulary, given):
    """Every row's tokens, one by one, and where its codes are predicted."""
    for row, codes in enumerate(given["codes"].reshape(len(given["codes"]), -1)):
        text = given["caption"][row][given["pads"][row]:] if "caption" in given else []
        label = given["label"][row]
        begin = vocabulary.text + vocabulary.codes + (label if label >= 0 else vocabulary.classes)
        yield [*text, begin, *(vocabulary.text + codes[:-1])], len(text)


@pytest.mark.parametrize("name", ["by_class", "captioned"])
def test_the_loss_is_the_cross_entropy_of_codes_behind_their_prefix(name, request):
    tested = request.getfixturevalue(name)
    given = batch(4, captions=name == "captioned")
    found = tested.predict(given)
    expected = jax.jit(lambda tokens: tested.model.logits(tested.model.hidden(tokens)))
    for row, (tokens, first) in enumerate(sequences(tested.vocabulary, given)):
        logits = np.asarray(expected(np.asarray([tokens], np.int32))[0, first:], np.float64)
        logits = logits[:, tested.vocabulary.text:tested.vocabulary.text + tested.vocabulary.codes]
        codes = given["codes"][row].reshape(-1)
        chosen = logits[np.arange(len(codes)), codes]
        np.testing.assert_allclose(found.nats[row], np.log(np.exp(logits).sum(1)) - chosen, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found.rank[row], (logits > chosen[:, None]).sum(1))


def test_a_code_is_seen_by_later_codes_only(by_class):
    given = batch(1)
    before = by_class.predict(given).nats[0]
    for place in (3, CODES.grid**2 - 1):
        codes = given["codes"].copy()
        codes.reshape(-1)[place] += 1
        after = by_class.predict(given | {"codes": codes}).nats[0]
        np.testing.assert_array_equal(before[:place], after[:place])
        assert np.all(before[place + 1:] != after[place + 1:])


def test_a_caption_is_seen_and_its_padding_is_not(captioned):
    given = batch(4, captions=True)
    assert 0 < given["pads"][0] < given["caption"].shape[1]
    before = captioned.predict(given).nats
    padding = np.arange(given["caption"].shape[1]) < given["pads"][:, None]
    other = captioned.predict(given | {"caption": np.where(padding, 7, given["caption"])}).nats
    np.testing.assert_array_equal(before, other)
    other = captioned.predict(given | {"caption": np.where(padding, given["caption"], 7)}).nats
    np.testing.assert_array_equal(np.any(before != other, axis=1), given["pads"] < given["caption"].shape[1])


@pytest.mark.parametrize("captions", [False, True])
def test_a_share_of_prefixes_is_replaced_by_the_empty_one(captions, folder):
    config = parsed(tiny(captions=folder if captions else None, drop=0.25))
    given = batch(1000, captions=captions)
    changed = loss.without_prefix(config, given, jax.random.key(0))
    name, empty = ("pads", given["caption"].shape[1]) if captions else ("label", -1)
    dropped = np.asarray(changed[name]) != given[name]
    assert set(np.asarray(changed[name])[dropped].tolist()) == {empty}
    assert 0.2 < dropped[given[name] != empty].mean() < 0.3
    np.testing.assert_array_equal(changed["codes"], given["codes"])


@functools.cache
def compiled(accumulate: int):
    """A config's step, and the state that it starts from; half of all prefixes are dropped."""
    config = tiny(drop=0.5)
    config.train.accumulate = accumulate
    config = parsed(config)
    structure, mesh = build.structure(config, CODES), sharding.one_device()
    state, frozen = train_state.made(config, mesh, init.params(config, structure, mesh))
    return jax.jit(loss.make_train_step(config, structure)), state, frozen


def test_micro_batches_make_the_same_step():
    seen = []
    for accumulate in (1, 4):
        step, state, frozen = compiled(accumulate)
        for _ in range(3):
            state, metrics = step(state, frozen, batch(8))
        seen.append((state.params, {name: float(value) for name, value in metrics.items()}))
    (params, metrics), (split_params, split_metrics) = seen
    assert split_metrics == pytest.approx(metrics, rel=1e-5)
    for path, value in params.items():
        np.testing.assert_allclose(split_params[path], value, rtol=1e-3, atol=2e-5)


def test_a_step_that_is_not_finite_changes_nothing():
    step, state, frozen = compiled(1)
    broken = state._replace(params=state.params | {"norm/scale": state.params["norm/scale"].at[0].set(jnp.nan)})
    after, metrics = step(broken, frozen, batch(8))
    assert (int(after.step), int(after.skipped), int(metrics["skipped_in_a_row"])) == (1, 1, 1)
    np.testing.assert_array_equal(after.params["head/kernel"], state.params["head/kernel"])
