"""Whatever a file, a config or a flag holds: a result or a line that says what is wrong, within 20 s and 4 GB.

The inputs are good ones that were changed, and always the same. `pytest -m long -n 0 -s tests/fuzz` reads 5,000 of them
and prints a table.
"""

import importlib.util
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.child import Child
from tests.fuzz.corpus import CORPUS
from tests.fuzz.inputs import INPUTS

SHORT, LONG = 12, 220
LONG_OF = dict.fromkeys(("image", "config", "encoder", "tar"), 480)  # those that have most to go wrong


@pytest.fixture(scope="module")
def child():
    child = Child()
    yield child
    child.close()


def read_many(child: Child, kind: str, count: int, number: int) -> list:
    if kind.startswith("pytorch_f") and not importlib.util.find_spec("torch"):
        pytest.skip("PyTorch's files need torch")
    outcomes = []

    # Without the phase that makes a fault smaller: whoever wants it adds Phase.shrink.
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @seed(number)
    @given(INPUTS[kind]())
    def read(value):
        outcomes.append(child.read(kind, value))
        assert outcomes[-1].what != "fault", outcomes[-1].text

    read()
    return outcomes


@pytest.mark.parametrize("kind", INPUTS)
def test_hostile_input_is_read_or_refused_in_one_line(kind, child):
    read_many(child, kind, SHORT, 0)


@pytest.mark.parametrize(
    ("kind", "value"), [pytest.param(kind, value, id=name) for name, (kind, value) in CORPUS.items()]
)
def test_what_was_a_fault_once_is_refused(kind, value, child):
    outcome = child.read(kind, value)
    assert outcome.what == "refusal" or (kind == "image_folder" and outcome.what == "result"), outcome.text


@pytest.mark.long
def test_five_thousand_hostile_inputs(child):
    lines = [
        "| kind | inputs | results | refusals | stacks | slowest, s | most memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in INPUTS:
        found = read_many(child, kind, LONG_OF[kind] if kind in LONG_OF else LONG, 1)
        counts = Counter(outcome.what for outcome in found)
        lines.append(
            f"| {kind} | {len(found)} | {counts['result']} | {counts['refusal']} | {counts['fault']} | "
            f"{max(outcome.seconds for outcome in found):.1f} | {max(o.megabytes for o in found):.0f} |"
        )
        print(lines[-1], flush=True)
    print("\n".join(lines))
