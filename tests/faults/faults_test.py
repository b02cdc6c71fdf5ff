"""After any fault of the machine, the disk, files or processes the same command ends as if there had been none."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.faults.tool import FORBIDDEN, KINDS, Fault, Outcome, Tool, line, table

# One of each kind, to verbs that compile little.
FEW = (142, 34, 60, 112, 54, 184, 141, 102, 88, 76, 5, 4, 10, 96, 18, 7)


def test_a_fault_of_each_kind_loses_nothing(tmp_path):
    assert {outcome.fault.kind for outcome in suffered(FEW, tmp_path)} == set(KINDS)


@pytest.mark.long
def test_two_hundred_faults_lose_nothing(tmp_path):
    print(table(suffered(range(200), tmp_path)))


def suffered(numbers: Iterable[int], folder: Path) -> list[Outcome]:
    """What came of faults, which is nothing forbidden."""
    tool, outcomes = Tool(folder), []
    for number in numbers:
        outcomes.append(tool.suffer(Fault.of(number)))
        print(line(outcomes[-1]), flush=True)
    assert not [line(outcome) for outcome in outcomes if outcome.verdict in FORBIDDEN]
    return outcomes
