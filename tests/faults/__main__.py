"""`python -m tests.faults FIRST-LAST`, or numbers: lets verbs meet these faults, and prints what came of each."""

import sys
import tempfile
from pathlib import Path

from tests.faults.tool import FORBIDDEN, Fault, Tool, line, table

if __name__ == "__main__":
    spans = [argument.partition("-") for argument in sys.argv[1:]]
    numbers = [number for first, _, last in spans for number in range(int(first), int(last or first) + 1)]
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="vqrae_jax_faults_") as folder:
        tool = Tool(Path(folder))
        for number in numbers:
            outcomes.append(tool.suffer(Fault.of(number)))
            print(line(outcomes[-1]), flush=True)
    print(f"\n{table(outcomes)}")
    sys.exit(any(outcome.verdict in FORBIDDEN for outcome in outcomes))
