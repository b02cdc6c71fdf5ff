"""Whatever a file, a config or a flag holds: a result or a line that says what is wrong, within 20 s and 4 GB.

The inputs are good ones that were changed, and always the same. `pytest -m long -n 0 -s tests/fuzz` reads 5,000 of them
and prints a table.
"""

import importlib.util
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.child import Child, Outcome
from tests.fuzz.corpus import CORPUS
from tests.fuzz.inputs import INPUTS

SHORT, LONG = 12, 220
LONG_OF = dict.fromkeys(("image", "config", "encoder", "tar"), 480)  # those that have most to go wrong
AS_DATA = ("image_folder", "tar")  # what is wrong with a part of these costs that part


@pytest.fixture(scope="module")
def child():
    child = Child()
    yield child
    child.close()


def read_many(child: Child, kind: str, count: int, number: int) -> list[Outcome]:
    """What came of `count` inputs of a kind, which are others for another number."""
    if kind == "pytorch_file":
        pytest.importorskip("torch", reason="PyTorch's files need torch")
    outcomes = []

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @seed(number)
    @given(INPUTS[kind]())
    def read(value):
        outcomes.append(child.read(kind, value))

    read()
    return outcomes


def faults(outcomes: list[Outcome]) -> str:
    """What is not allowed, each kind of it once."""
    return "\n\n".join(dict.fromkeys(outcome.text for outcome in outcomes if outcome.what == "fault"))


@pytest.mark.parametrize("kind", INPUTS)
def test_hostile_input_is_read_or_refused_in_one_line(kind, child):
    found = read_many(child, kind, SHORT, 0)
    assert found and not faults(found), faults(found)


@pytest.mark.parametrize("name", CORPUS)
def test_what_was_a_fault_once_is_none(name, child):
    kind, value = CORPUS[name]
    outcome = child.read(kind, value)
    assert outcome.what == ("result" if kind in AS_DATA else "refusal"), outcome.text


@pytest.mark.long
def test_five_thousand_hostile_inputs(child):
    print("\n| kind | inputs | results | refusals | stacks | slowest, s | most memory, MB |\n|" + "---|" * 7)
    every = []
    for kind in INPUTS:
        if kind == "pytorch_file" and not importlib.util.find_spec("torch"):
            continue
        found = read_many(child, kind, LONG_OF[kind] if kind in LONG_OF else LONG, 1)
        counts = Counter(outcome.what for outcome in found)
        print(
            f"| {kind} | {len(found)} | {counts['result']} | {counts['refusal']} | {counts['fault']} | "
            f"{max(outcome.seconds for outcome in found):.1f} | {max(o.megabytes for o in found):.0f} |",
            flush=True,
        )
        every += found
    assert not faults(every), faults(every)
