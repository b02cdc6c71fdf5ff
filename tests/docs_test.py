"""README.md and docs/: links lead somewhere, commands and config keys exist, Python runs."""

import dataclasses
import functools
import importlib
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from tests import extension_test
from tests.conftest import REPOSITORY, tiny
from tests.verbs import command
from vqrae_jax import config as config_lib
from vqrae_jax.models.vqrae import VQRAE
from vqrae_jax.tokenizer import inference, task

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.py"))  # their docstrings name commands
MARK = "<!-- needs weights -->"  # on the line before a block of Python that is not run
# A page may name keys that are no more: <!-- gone keys: model.old_name, data.other -->
GONE = re.compile(r"<!-- gone keys: (.*?) -->")
OLD_NAMES = ("old key", "in 0.3")  # heads of columns that hold other names than those of this version


class Page(NamedTuple):
    """A page of Markdown, taken apart: blocks are (language, code, line before); prose is all but the blocks."""

    blocks: list[tuple[str, str, str]]
    prose: str

    @property
    def inline(self) -> list[str]:
        return re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", self.prose)


def read(text: str) -> Page:
    blocks, prose, block = [], [], None
    lines = [*text.splitlines(), ""]
    for number, line in enumerate(lines):
        before = lines[number - 1] if number else ""
        if block and block[0] == "indented" and not line.startswith("    "):
            blocks.append((block[0], "\n".join(block[2:]), block[1]))
            block = None
        if block and block[0] != "indented" and line.startswith("```"):
            blocks.append((block[0], "\n".join(block[2:]), block[1]))
            block = None
        elif block:
            block.append(line.removeprefix("    ") if block[0] == "indented" else line)
        elif line.startswith("```"):
            block = [line[3:], before]
        elif line.startswith("    ") and not before.strip():
            block = ["indented", before, line.removeprefix("    ")]
        else:
            prose.append(line)
    assert block is None, "a block is not closed"
    return Page(blocks, "\n".join(prose))


def anchors(text: str) -> set[str]:
    """Of all headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", read(text).prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def wrong_links(text: str, folder: Path) -> list[str]:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", read(text).prose):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = folder / name
        if name and not file.exists():
            wrong.append(f"{target}: there is no such file")
        elif anchor and anchor not in anchors(file.read_text() if name else text):
            wrong.append(f"{target}: there is no such heading")
    return wrong


def commands(text: str) -> list[list[str]]:
    """What of the page is a command of ours, as its words: in blocks that are not Python, and between backticks."""
    page = read(text)
    lines = [line for language, code, _ in page.blocks if not language.startswith("python")
             for line in code.replace("\\\n", " ").splitlines()]
    found = []
    for line in [*lines, *(" ".join(code.split()) for code in page.inline)]:
        if not re.search(r"python3? -m vqrae_jax|launch/\w+\.sh", line):
            continue
        for part in re.split(r"\s(?:&&|\||;)\s", line):
            words = shlex.split(part, comments=True)
            for at, word in enumerate(words):
                if re.fullmatch(r"launch/\w+\.sh", word):
                    found.append(words[at:])
                if word == "-m" and words[at + 1].split(".")[0] == "vqrae_jax":
                    found.append(words[at + 1:])
    return found


@functools.cache
def flags(verb: str) -> set[str]:
    """All flags that a verb takes, as its --helpfull lists them."""
    lines = command(f"vqrae_jax.{verb}", "--helpfull").stdout.splitlines()
    return {found[1] for line in lines if (found := re.match(r"\s+(?:-\w,)?--(?:\[no\])?([\w-]+):", line))} | {"help"}


def is_placeholder(word: str) -> bool:
    return "..." in word or word.startswith("$") or re.fullmatch(r"[A-Z_]+(\.\w+)?", word) is not None


def wrong_commands(text: str) -> list[str]:
    return [f"{' '.join(words)}: {fault}" for words in commands(text) if (fault := _fault(*words))]


def _fault(program: str, *words: str) -> str:
    words = tuple(word.replace("--[no]", "--").strip("[]") for word in words)
    if program.startswith("launch/"):
        if not (REPOSITORY / program).exists():
            return f"there is no {program}"
        verb, arguments = "main", True
    elif program == "vqrae_jax":
        return "" if (REPOSITORY / "vqrae_jax" / "__main__.py").exists() else "the package cannot be run"
    else:
        verb = program.removeprefix("vqrae_jax.")
        file = REPOSITORY / "vqrae_jax" / f"{verb}.py"
        source = file.read_text() if file.exists() else ""
        if "cli.run(" not in source:
            return f"there is no verb {verb}"
        arguments = "arguments=True" in source
        if verb == "convert" and f'"{words[0]}": (' not in source:
            return f"there is no convert {words[0]}"
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            if not arguments and not is_placeholder(word):
                return f"{word} is no flag"
        elif name not in flags(verb) and name.split(".")[0] != "config":
            return f"there is no flag --{name}"
        elif name == "config" and not is_placeholder(value) and not (REPOSITORY / value.split(":")[0]).is_file():
            return f"there is no config {value}"
        elif not equals and name == "config":
            return "--config needs a value"
    return ""


def wrong_keys(text: str) -> list[str]:
    """The config keys that a page names, between backticks or as --config.key in a command, and that do not exist.

    What is called with parentheses is a function of that name in Python.
    """
    gone = {key for keys in GONE.findall(text) for key in keys.replace(",", " ").split()}
    page = read(_without_old_names(text))
    sections = "|".join(dict.fromkeys(field.name for config in config_lib.CONFIGS.values()
                                      for field in dataclasses.fields(config)))
    named = [name for code in page.inline if not re.search(r"-m vqrae_jax", code)
             for name in re.findall(rf"(?<![\w./-])((?:{sections})\.[a-z]\w*(?:\.[a-z]\w*)*)\b(?!\()", code)]
    given = [name.rstrip(".") for name in re.findall(r"--config\.([\w.]+)", text)]
    wrong = [key for key in [*named, *given] if not _exists(key)]
    still = [f"{key} is not gone" for key in gone if _exists(key)]
    return sorted({key for key in wrong if key not in gone} | set(still))


def _without_old_names(text: str) -> str:
    """Drops the first column of tables that map old names to new ones."""
    kept, old = [], False
    for line in text.splitlines():
        cells = line.split("|")
        old = line.startswith("|") and (old or cells[1].strip() in OLD_NAMES)
        kept.append("|".join(cells[2:]) if old else line)
    return "\n".join(kept)


def _exists(name: str) -> bool:
    """Whether a dotted name is a key or a section of the config, or else, for some pages speak of code, in a module."""
    if name == "key":  # stands for any
        return True
    if any(key == name or key.startswith(f"{name}.") for config in config_lib.CONFIGS.values()
           for key in config_lib.keys(config)):
        return True
    section, _, rest = name.partition(".")
    return rest == "py" or any(
        hasattr(place, rest.split(".")[0]) for place in _namesakes(section))


def _namesakes(section: str) -> tuple[object, ...]:
    """What else than a section of the config is called so."""
    modules = {"data": ("data",), "loss": ("tokenizer.loss", "generator.loss"), "gan": ("tokenizer.gan",),
               "optim": ("training.optim",), "task": ("tokenizer.task",), "prefix": ("generator.prefix",)}
    if section == "model":  # as examples call it
        return inference.Tokenizer, VQRAE
    return tuple(importlib.import_module(f"vqrae_jax.{module}") for module in modules[section]) \
        if section in modules else ()


def name_of(file: Path) -> str:
    return str(file.relative_to(REPOSITORY))


@pytest.mark.parametrize("file", PAGES, ids=name_of)
def test_links_resolve(file):
    assert not wrong_links(file.read_text(), file.parent)


@pytest.mark.parametrize("file", [*PAGES, *CONFIGS], ids=name_of)
def test_commands_parse(file):
    text = file.read_text() if file in PAGES else file.read_text().split('"""')[1]
    assert not wrong_commands(text)
    assert file in PAGES or commands(text), "a config's docstring says its command"


@pytest.mark.parametrize("file", PAGES, ids=name_of)
def test_config_keys_exist(file):
    assert not wrong_keys(file.read_text())


def test_the_readme_is_one_page_that_leads_to_all_others():
    text = (REPOSITORY / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for file in PAGES[1:]:
        assert f"](docs/{file.name}" in text


@pytest.mark.parametrize(("check", "right", "wrong", "says"), [
    (wrong_links, "[x](README.md#two-commands)", "[x](READMI.md)", "READMI.md: there is no such file"),
    (wrong_links, "# A b: c\n[x](#a-b-c)", "# A b\n[x](#a-c)", "#a-c: there is no such heading"),
    (wrong_links, "[x](docs/architecture.md#the-words)", "[x](docs/architecture.md#words)", "there is no such heading"),
    (wrong_commands, "`bash launch/gpu.sh --workdir=DIR`", "`bash launch/cpu.sh`", "there is no launch/cpu.sh"),
    (wrong_commands, "`sbatch --nodes=2 launch/slurm.sh`", "`bash launch/gpu.sh --wrkdir=x`", "no flag --wrkdir"),
    (wrong_commands, "\n    python -m vqrae_jax.evaluate --workdir=x\n", "\n    python -m vqrae_jax.eval\n",
     "no verb eval"),
    (wrong_commands, "`python -m vqrae_jax.main [--config=FILE ...]`", "```sh\npython3 -m vqrae_jax.main --conf=x\n```",
     "no flag --conf"),
    (wrong_commands, "`python -m vqrae_jax.main --config=configs/ablation.py:dim=384`",
     "`python -m vqrae_jax.main --config=configs/ablatoin.py:dim=384`", "no config configs/ablatoin.py"),
    (wrong_commands, "`python -m vqrae_jax.reconstruct --workdir=x a.jpg`",
     "`python -m vqrae_jax.evaluate --workdir x`", "x is no flag"),
    (wrong_commands, "`python -m vqrae_jax.convert from-torch --[no]simvq-l2-norm`",
     "`python -m vqrae_jax.convert\nfrom-tensorflow`", "no convert from-tensorflow"),
    (wrong_commands, "\n    A=1 python -m vqrae_jax.plan \\\n        --search && ls --all\n",
     "\n    ls && python -m vqrae_jax.plan \\\n        --serch\n", "no flag --serch"),
    (wrong_keys, "`optim.lr = 1` `gan.*` `loss.perceptual`", "`optim.learning_rate`", "optim.learning_rate"),
    (wrong_keys, "\n    python -m x --config.train.steps=3\n", "\n    python -m x --config.train.step=3\n",
     "train.step"),
    (wrong_keys, "`model.quantizer.codes()` `loss.py` `loss.gradients` `config.data`", "`model.quantizer.codes`",
     "model.quantizer.codes"),
    (wrong_keys, "| old key | here |\n|--|--|\n| `data.old` | `data.flip` |",
     "| old key | here |\n|--|--|\n| `data.old` | `data.flop` |", "data.flop"),
    (wrong_keys, "<!-- gone keys: data.old -->\n`data.old`", "<!-- gone keys: data.flip -->", "data.flip is not gone"),
])
def test_the_checks_find_faults(check, right, wrong, says):
    arguments = (REPOSITORY,) if check is wrong_links else ()
    assert not check(right, *arguments)
    [fault] = check(wrong, *arguments)
    assert says in fault


# Python: blocks run in order, in one namespace a page; those with a name are examples, which extension_test.py runs.


def python_blocks(text: str) -> list[str]:
    return [code for language, code, before in read(text).blocks if language == "python" and before != MARK]


def run_blocks(text: str, name: str) -> None:
    namespace = {"__name__": name}
    for code in python_blocks(text):
        exec(compile(code, name, "exec"), namespace)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What a reader's folder holds: the configs, two runs, two pictures."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "configs").symlink_to(REPOSITORY / "configs")
    for name, color in (("cat.jpg", "red"), ("dog.jpg", "blue")):
        Image.new("RGB", (80, 70), color).save(folder / name)
    config = tiny()
    config.train.update(steps=2, checkpoint_every=2)
    config.optim.warmup_steps = 1
    task.train(config_lib.parse(config), folder / "runs" / "nano_stage1")
    (folder / "runs" / "nano_stage2").symlink_to("nano_stage1")
    return folder


@pytest.mark.parametrize("file", [file for file in PAGES if python_blocks(file.read_text())], ids=name_of)
def test_python_runs(file, folder, monkeypatch):
    monkeypatch.chdir(folder)
    run_blocks(file.read_text(), file.name)


def test_python_that_fails_is_found():
    run_blocks(f"```python\nx = 1\n```\n\n```python\nassert x == 1\n```\n{MARK}\n```python\nassert x == 2\n```", "page")
    with pytest.raises(AssertionError):
        run_blocks("```python\nx = 1\n```\n\n```python\nassert x == 2\n```", "page")


def test_examples_with_a_name_are_run_by_another_test():
    named = {language.removeprefix("python ") for file in PAGES for language, _, _ in read(file.read_text()).blocks
             if language.startswith("python ")}
    source = Path(extension_test.__file__).read_text()
    assert named == extension_test.EXAMPLES.keys() == {name for name in named if f'example("{name}")' in source}
