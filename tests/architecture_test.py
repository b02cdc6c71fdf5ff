"""The arrows of the map in docs/architecture.md: who may import whom."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vqrae_jax"

MAP = Path(__file__).parents[1] / "docs" / "architecture.md"
VERBS = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__", "cli", "config", "console", "files", "foreign"}


def arrows() -> dict[str, set[str]]:
    """The import graph that the map shows: `room -> what it may import`."""
    block = re.search(r"```imports\n(.*?)```", MAP.read_text(), re.DOTALL)
    assert block, f"{MAP} has no block of imports"
    found = {}
    for line in block[1].strip().splitlines():
        room, _, targets = line.partition(" -> ")
        found[room.strip()] = set(targets.replace(",", " ").split()) - {"nothing"}
    return found


def room(module: str) -> str:
    """The room of the map that a module of ours is in, from its dotted name."""
    first = [*module.split("."), "__init__"][1]
    return "verbs" if first in VERBS else first


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            assert node.module
            if node.module == "vqrae_jax":
                found |= {f"vqrae_jax.{alias.name}" for alias in node.names}
            elif node.module.startswith("vqrae_jax."):
                found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "vqrae_jax"}
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_follow_the_map(file):
    ours = room(".".join(["vqrae_jax", *file.relative_to(PACKAGE).with_suffix("").parts]))
    wrong = {module for module in imported(file) if room(module) not in arrows()[ours] | {ours}}
    assert not wrong, f"{file} imports {wrong}"
    if ours == "verbs":  # a verb is flags and one call
        assert not {module for module in imported(file) if room(module) == "verbs"}


def test_every_arrow_of_the_map_is_there():
    drawn = {(source, target) for source, targets in arrows().items() for target in targets}
    real = {(room(".".join(["vqrae_jax", *file.relative_to(PACKAGE).with_suffix("").parts])), room(module))
            for file in PACKAGE.rglob("*.py") for module in imported(file)}
    assert drawn == {(source, target) for source, target in real if source != target}


def test_the_map_has_no_cycle():
    done = set()
    while done != arrows().keys():
        ready = {name for name, targets in arrows().items() if name not in done and targets <= done}
        assert ready, f"a cycle among {arrows().keys() - done}"
        done |= ready


def test_importing_the_package_defines_no_flags_and_touches_no_device():
    code = ("import sys, vqrae_jax; from absl import flags; from jax._src import xla_bridge; "
            "ours = [m for m in flags.FLAGS.flags_by_module_dict() if m.startswith('vqrae_jax')]; "
            "assert not ours and not xla_bridge._backends, (ours, xla_bridge._backends); "
            "assert not {'grain', 'matplotlib'} & sys.modules.keys(), 'with one come flags, the other takes time'; "
            "assert callable(vqrae_jax.train)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_pytorch_and_tensorflow_are_no_run_time_dependency():
    for file in PACKAGE.rglob("*.py"):
        names = {alias.name.split(".")[0] for node in ast.walk(ast.parse(file.read_text()))
                 if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module.split(".")[0] for node in ast.walk(ast.parse(file.read_text()))
                  if isinstance(node, ast.ImportFrom) and node.module}
        # They read PyTorch's own files, compare with it, and split texts into tokens as SigLIP does, where the library
        # is installed, and say so where it is not.
        allowed = {PACKAGE / "weights" / "tensors.py": {"torch"}, PACKAGE / "weights" / "siglip.py": {"transformers"},
                   PACKAGE / "cost" / "pytorch.py": {"torch", "transformers"}}
        assert not names & {"torch", "tensorflow", "transformers", "chex"} - allowed.get(file, set()), file
