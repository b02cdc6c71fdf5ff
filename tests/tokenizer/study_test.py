"""Studies: what is missing is trained and measured, whatever stopped it before; and study files with mistakes."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, killed_in_step
from tests.tokenizer.comparison_test import write_images
from tests.verbs import command
from vqrae_jax import config as config_lib
from vqrae_jax.tokenizer import report, study
from vqrae_jax.tokenizer.comparison import Options
from vqrae_jax.tokenizer.study import Row, Study
from vqrae_jax.training import sharding

FILES = ("table.md", "table.json", "study.png", "report.html")
CONFIG = """from tests.conftest import tiny

def get_config():
    config = tiny()
    config.train.update(steps=2, batch_size=2, eval_every=100, checkpoint_every=2)
    config.optim.warmup_steps = 1
    config.eval.update(limit=4, batch_size=4)
    config.model.quantizer.init = "random"
    return config
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Study:
    """Two rows of two seeds, of which the second starts from the first and would be evaluated on other images."""
    folder = tmp_path_factory.mktemp("study")
    write_images(folder / "train", 20, 0)
    write_images(folder / "other", 8, 1)
    (folder / "small.py").write_text(CONFIG)
    row = Row(config=str(folder / "small.py"), seeds=(0, 1))
    goes_on = {"train.steps": 4, "eval.source": f"folder:{folder / 'other'}"}
    return Study(title="Two rows", data=f"folder:{folder / 'train'}", probe=True,
                 rows={"start": row, "goes on": dataclasses.replace(row, init_from="start", changes=goes_on)},
                 metrics=("psnr", "code_usage", "probe_knn_latents"),
                 options=Options(limit=6, probe_limit=12, robustness=False))


def run(given: Study, out: Path, **options) -> None:
    study.run(given, out, sharding.one_device(), **options)


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    run(small, out)
    return out


@pytest.fixture
def does_nothing(monkeypatch):
    """From now on nothing may be trained or measured."""
    def refuse(*arguments, **options):
        raise AssertionError("trained or measured once more")

    monkeypatch.setattr(study.task, "train", refuse)
    monkeypatch.setattr(study, "Comparison", refuse)


def test_a_study_leaves_runs_tables_and_pictures(small, undisturbed):
    assert all((undisturbed / name).stat().st_size for name in FILES)
    table = json.loads((undisturbed / "table.json").read_text())
    assert list(table["rows"]) == ["start", "goes on"]
    for row, seed in itertools.product(table["rows"], (0, 1)):
        workdir = undisturbed / "runs" / row / f"seed{seed}"
        config = config_lib.load(workdir / "config.json")
        assert (config.seed, config.data.source) == (seed, small.data)
        assert config.init_from == (str(undisturbed / "runs" / "start" / f"seed{seed}") if row == "goes on" else "")
        measured = json.loads((workdir / "evaluation" / "metrics.json").read_text())
        assert measured["num_images"] == 6 and measured["data"] == small.data
        for metric in small.metrics:
            assert table["rows"][row][metric]["values"][str(seed)] == measured[metric]
        assert (workdir / "evaluation" / "report.html").exists()
    assert table["recipe"]["options"]["probe"] == small.data
    psnr = table["rows"]["start"]["psnr"]
    assert psnr["mean"] == pytest.approx(sum(psnr["values"].values()) / 2) and psnr["deviation"] > 0
    lines = (undisturbed / "table.md").read_text().splitlines()
    assert "| start | 2 |" in lines[2] and "±" in lines[2] and len(lines) == 4


def test_a_complete_study_trains_and_measures_nothing_and_checks_its_columns(small, undisturbed, does_nothing):
    before = {name: (undisturbed / name).read_bytes() for name in FILES}
    run(small, undisturbed)
    assert {name: (undisturbed / name).read_bytes() for name in FILES} == before
    with pytest.raises(ValueError, match="the study shows 'pnsr', which is no metric: there are psnr, ssim,"):
        run(dataclasses.replace(small, metrics=("pnsr",)), undisturbed)
    with pytest.raises(AssertionError, match="once more"):  # other options are other numbers
        run(dataclasses.replace(small, options=dataclasses.replace(small.options, limit=5)), undisturbed)


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_to_the_same_table(small, undisturbed, tmp_path, monkeypatch):
    run(small, tmp_path, only=1)
    assert [path.name for path in (tmp_path / "runs").glob("*/*")] == ["seed1"]
    assert not any((tmp_path / name).exists() for name in FILES)
    with killed_in_step(3):  # of the third run
        run(small, tmp_path)

    class Killed(BaseException):
        pass

    def dies(*arguments, **options):
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(report, "write_report", dies)
        run(small, tmp_path)
    trained = []
    train = study.task.train
    monkeypatch.setattr(study.task, "train", lambda config, workdir: trained.append(workdir) or train(config, workdir))
    run(small, tmp_path)
    assert trained == [tmp_path / "runs" / "goes on" / "seed1"]  # the others were whole
    assert (tmp_path / "table.json").read_bytes() == (undisturbed / "table.json").read_bytes()
    assert (tmp_path / "table.md").read_bytes() == (undisturbed / "table.md").read_bytes()
    assert all((tmp_path / "runs" / row / f"seed{seed}" / "evaluation" / "report.html").exists()
               for row in small.rows for seed in (0, 1))


@pytest.mark.parametrize("only", [-1, 4])
def test_a_run_that_there_is_not_cannot_be_the_only_one(only, small, tmp_path, does_nothing):
    with pytest.raises(ValueError, match=f"the study has the runs 0 to 3, not {only}"):
        run(small, tmp_path, only=only)


def test_a_run_whose_start_is_not_trained_to_its_end_is_refused(small, tmp_path, does_nothing):
    with pytest.raises(ValueError, match=r"run 3 starts from run 1 \(start, seed 1\), which is not trained to its end"):
        run(small, tmp_path, only=3)


def write_study(file: Path, body: str) -> Path:
    file.write_text("from vqrae_jax.tokenizer.study import Row, Study\n\ndef get_study():\n"
                    "    a = Row(config='configs/nano_stage1.py')\n"
                    f"    return {body}\n")
    return file


@pytest.mark.parametrize(("body", "says"), [
    ("{'rows': a}", "get_study() must return a vqrae_jax.tokenizer.study.Study, not {'rows': "),
    ("Study(title='', rows={'a': a, 'b': Row(config='', init_from='c')}, data='embedded', metrics=('psnr',))",
     "b starts from 'c', which is no row before it"),
    ("Study(title='', rows={'b': Row(config='', init_from='a'), 'a': a}, data='embedded', metrics=('psnr',))",
     "b starts from 'a', which is no row before it"),
    ("Study(title='', rows={'a': a, 'b': Row(config='', init_from='a', seeds=(0, 3))}, data='embedded', "
     "metrics=('psnr',))", "b starts from a, which has no seed 3"),
    ("Study(title='', rows={'a/b': a}, data='embedded', metrics=('psnr',))", "the row 'a/b' needs another name"),
    ("Study(title='', rows={}, data='embedded', metrics=('psnr',))", "a study needs at least one row"),
    ("Study(title='', rows={'a': a}, data='embedded', metrics=())", "one of metrics"),
    ("Study(title='', row={'a': a}, data='embedded', metrics=('psnr',))", "TypeError: Study.__init__() got an"),
    ("nothing", "NameError: name 'nothing' is not defined"),
])
def test_a_study_file_with_a_mistake_is_one_line(body, says, tmp_path):
    file = write_study(tmp_path / "mine.py", body)
    with pytest.raises(ValueError) as error:
        study.read(str(file))
    assert str(error.value).startswith(f"{file}: ") and says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("changes", "says"), [
    ({"train.stepz": 3}, "unknown config key train.stepz: did you mean train.steps?"),
    ({"train.steps": 0}, "train.steps must be at least 1"),
])
def test_a_row_that_is_no_config_is_said_before_anything_is_trained(changes, says, small, tmp_path, does_nothing):
    rows = {**small.rows, "bad": Row(config=small.rows["start"].config, changes=changes)}
    with pytest.raises(ValueError, match=says) as error:
        run(dataclasses.replace(small, rows=rows), tmp_path)
    assert str(error.value).startswith("row bad of the study: ")


def test_the_verb_says_in_one_line_what_is_wrong(tmp_path):
    flags = ("vqrae_jax.study", f"--out={tmp_path / 'out'}")
    shutil.copy(REPOSITORY / "configs" / "studies" / "strategy.py", tmp_path / "strategy.py")
    mine = write_study(tmp_path / "mine.py", "nothing")
    for arguments, says in (
            ([f"--study={tmp_path}/strateg.py"], f"there is no study file {tmp_path}/strateg.py: did you mean "
                                                 f"{tmp_path}/strategy.py?"),
            ([f"--study={mine}"], f"{mine}: NameError: name 'nothing' is not defined"),
            ([f"--study={tmp_path}/strategy.py", "--data=embedded", "--only=18"],
             "the study has the runs 0 to 17, not 18")):
        result = command(*flags, *arguments)
        assert result.returncode == 1 and result.stderr.splitlines() == [f"error: {says}"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs" / "studies").glob("*.py")), ids=lambda file: file.stem)
def test_shipped_studies_are_grids_of_valid_configs(file, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    given = study.read(str(file))
    cells = study.cells(given, tmp_path)
    assert len({cell.workdir for cell in cells}) == len(cells) == sum(len(row.seeds) for row in given.rows.values())
    for number, cell in enumerate(cells):
        row = given.rows[cell.row]
        assert cell.config.seed == cell.seed and cell.config.data.source == given.data
        assert all(config_lib.value_of(cell.config, key) == value for key, value in row.changes.items())
        if row.init_from:
            assert cell.config.init_from in [str(earlier.workdir) for earlier in cells[:number]]
