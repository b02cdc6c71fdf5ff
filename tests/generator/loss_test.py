"""The generator's loss, by hand; what may be seen by what; and the step on micro-batches and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.generator.tiny import CODES, batch, parsed, text_model, tiny
from vqrae_jax.generator import build, loss, train_state
from vqrae_jax.models import flat


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


def sequence(vocabulary, given, row):
    """A row's tokens, one by one, and where its codes are predicted."""
    text = [int(token) for token in given["caption"][row][given["pads"][row]:]] if "caption" in given else []
    label = given["label"][row]
    begin = vocabulary.text + vocabulary.codes + (label if label >= 0 else vocabulary.classes)
    codes = [vocabulary.text + int(code) for code in given["codes"][row].reshape(-1)]
    return [*text, begin, *codes[:-1]], len(text)


@pytest.mark.parametrize("name", ["by_class", "captioned"])
def test_the_loss_is_the_cross_entropy_of_codes_behind_their_prefix(name, request):
    tested = request.getfixturevalue(name)
    given = batch(4, captions=name == "captioned")
    found = tested.predict(given)
    for row in range(4):
        tokens, first = sequence(tested.vocabulary, given, row)
        logits = np.asarray(tested.model.logits(tested.model.hidden(jnp.asarray([tokens]))), np.float64)[0, first:]
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


def steps(config, number, given, *, params=None):
    """Metrics of steps on one batch, and the parameters after them."""
    structure = build.structure(config, CODES)
    _, made, _ = flat.split(build.language_model(config, structure.spec, nnx.Rngs(0)))
    state, frozen = train_state.init(config, made if params is None else params)
    step, seen = jax.jit(loss.make_train_step(config, structure)), []
    for _ in range(number):
        state, metrics = step(state, frozen, given)
        seen.append({name: float(value) for name, value in metrics.items()})
    return seen, state


def test_micro_batches_make_the_same_step():
    config = tiny(drop=0.5)
    given = batch(8)
    whole, state = steps(parsed(config), 3, given)
    config.train.accumulate = 4
    split, split_state = steps(parsed(config), 3, given)
    for ours, theirs in zip(split, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for path, value in state.params.items():
        np.testing.assert_allclose(value, split_state.params[path], rtol=1e-3, atol=2e-5)


def test_frozen_parameters_stay_and_dropout_is_drawn_anew_in_every_step():
    config = tiny()
    config.model.dropout = 0.3
    config.optim.lr_multipliers = (("token_embedding", 0.0), ("blocks/.*", 0.0))
    config.optim.lr, config.optim.end_lr = 1e-9, 0.0  # so that nothing but dropout makes a difference
    seen, state = steps(parsed(config), 3, batch(8))
    assert len({metrics["loss"] for metrics in seen}) == 3
    assert set(state.params) == {"head/kernel", "norm/scale"}
    again, _ = steps(parsed(config), 3, batch(8))
    assert seen == again


def test_a_step_that_is_not_finite_changes_nothing():
    config, given = parsed(tiny()), batch(8)
    structure = build.structure(config, CODES)
    _, params, _ = flat.split(build.language_model(config, structure.spec, nnx.Rngs(0)))
    broken = params | {"norm/scale": params["norm/scale"].at[0].set(jnp.nan)}
    (metrics,), state = steps(config, 1, given, params=broken)
    assert (int(state.step), int(state.skipped), metrics["skipped_in_a_row"]) == (1, 1, 1)
    np.testing.assert_array_equal(state.params["head/kernel"], params["head/kernel"])
