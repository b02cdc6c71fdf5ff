"""After any fault of the machine, the disk, files or processes the same command ends as if there had been none."""

from pathlib import Path

import pytest

from tests.faults.tool import FORBIDDEN, KINDS, Fault, Tool, line, table


@pytest.fixture(scope="module")
def tool(tmp_path_factory) -> Tool:
    return Tool(tmp_path_factory.mktemp("faults"))


@pytest.mark.long
def test_two_hundred_faults_lose_nothing(tmp_path):
    tool, outcomes = Tool(tmp_path), []
    for number in range(200):
        outcomes.append(tool.suffer(Fault.of(number)))
        print(line(outcomes[-1]), flush=True)
    print(table(outcomes))
    assert not [line(outcome) for outcome in outcomes if outcome.verdict in FORBIDDEN]
