"""The arrows of the map in the README: who may import whom."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vqrae_jax"

# A module may import those on its right, and what these may import.
ALLOWED = {
    "main": {"cli", "config", "train", "evaluate", "distributed"},
    "reconstruct": {"cli", "inference", "reporting", "data", "metrics", "checkpoint"},
    "inference": {"checkpoint", "config", "convert", "models", "sharding"},
    "train": {"build", "step", "data", "checkpoint", "evaluate", "optim", "reporting", "config", "models",
              "sharding", "distributed"},
    "evaluate": {"build", "step", "data", "checkpoint", "reporting", "cli", "config", "metrics", "models",
                 "sharding", "distributed"},
    "reporting": {"checkpoint", "config", "distributed"},
    "checkpoint": {"build", "step", "config", "convert", "models", "sharding", "distributed"},
    "convert.__main__": {"cli", "checkpoint", "build", "config", "convert", "inference", "data", "sharding"},
    "plan": {"cli", "build", "config", "cost", "sharding", "step", "checkpoint"},
    "bench.__main__": {"cli", "build", "config", "cost", "sharding", "step", "data", "models", "inference", "convert"},
    "bench": set(),
    "cost": {"build", "config", "convert", "models", "optim"},
    "build": {"models", "losses", "optim", "step", "config", "convert", "data"},
    "step": {"losses", "optim", "metrics", "config", "models"},
    "convert": {"models"},
    "sharding": {"config"},
    "distributed": set(),
    "metrics": set(),
    "losses": set(),
    "optim": set(),
    "config": set(),
    "cli": set(),
    "data": set(),
    "models": set(),
}


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            assert node.module
            if node.module == "vqrae_jax":
                found |= {alias.name for alias in node.names}
            elif node.module.startswith("vqrae_jax."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("vqrae_jax.")}
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_follow_the_map(file):
    parts = file.relative_to(PACKAGE).parts
    # A package's verb stands above the package.
    part = f"{parts[0]}.__main__" if parts[1:] == ("__main__.py",) else parts[0].removesuffix(".py")
    if part == "__init__":
        assert imported(file) == {"inference"}
        return
    wrong = imported(file) - ALLOWED[part] - {part}
    assert not wrong, f"{file} imports {wrong}"


def test_the_map_has_no_cycle():
    done = set()
    while done != ALLOWED.keys():
        ready = {part for part, targets in ALLOWED.items() if part not in done and targets <= done}
        assert ready, f"a cycle among {ALLOWED.keys() - done}"
        done |= ready


def test_pytorch_and_tensorflow_are_no_run_time_dependency():
    for file in PACKAGE.rglob("*.py"):
        names = {alias.name.split(".")[0] for node in ast.walk(ast.parse(file.read_text()))
                 if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module.split(".")[0] for node in ast.walk(ast.parse(file.read_text()))
                  if isinstance(node, ast.ImportFrom) and node.module}
        # They read PyTorch's own files, and compare with it, where it is installed, and say so where it is not.
        allowed = {"torch"} if file in (PACKAGE / "convert" / "tensors.py", PACKAGE / "bench" / "pytorch.py") else set()
        assert not names & {"torch", "tensorflow", "transformers", "chex"} - allowed, file
