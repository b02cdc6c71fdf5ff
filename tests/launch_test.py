"""launch/: what each script would run, checked with commands that only record their arguments, and the notebook."""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.docs_test import wrong_commands

LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
# Whatever a user may write must arrive as written.
ARGUMENTS = ["--config=configs/nano_stage1.py", "--workdir=/mnt/my runs/it's 1",
             "--config.data.source=array_record:/mnt/train*.array_record", '$HOME "x" `y`; \\z', ""]


class Commands:
    """Commands that record how they are called. Each runs `body`, a line of bash, after that."""

    def __init__(self, folder: Path):
        self.folder, self._record = folder / "commands", folder / "record"
        self.folder.mkdir()
        self.environment = {"PATH": f"{self.folder}:/usr/bin:/bin", "HOME": str(folder), "COMMANDS": str(self.folder)}

    def add(self, name: str, body: str = ":") -> Path:
        file = self.folder / name
        file.write_text("#!/usr/bin/env bash\n"
                        f"{{ printf '%s\\0' \"${{0##*/}}\" \"$@\"; printf '\\1'; }} >>{self._record}\n{body}\n")
        file.chmod(0o755)
        return file

    def run(self, *command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(list(map(str, command)), cwd=cwd, env=self.environment | environment, timeout=60,
                              capture_output=True, text=True)

    def calls(self) -> list[list[str]]:
        """All calls so far, each a name and its arguments."""
        records = self._record.read_text().split("\1")[:-1] if self._record.exists() else []
        return [record.split("\0")[:-1] for record in records]


@pytest.fixture
def commands(tmp_path):
    return Commands(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_bash(script):
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_no_launch_file_sets_hyperparameters():
    files = [*SCRIPTS, LAUNCH / "gke.yaml", LAUNCH / "Dockerfile", LAUNCH / "colab.ipynb"]
    lines = [line for file in files for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    keys = {key for line in lines for key in re.findall(r"--config\.([\w.]+)", line.split("  # ")[0])}
    assert keys <= {"data.source", "init_from", "key"}  # the last is in a usage line


def test_scripts_give_xla_flags_that_it_knows():
    lines = [line for script in ("gpu.sh", "slurm.sh") for line in (LAUNCH / script).read_text().splitlines()]
    (given,) = {line for line in lines if line.startswith("export XLA_FLAGS=")}
    started = f'{given}; exec "$0" -c "import jax, os; jax.devices(); print(os.environ[\'XLA_FLAGS\'])"'
    ran = subprocess.run(["bash", "-c", started, sys.executable], capture_output=True, text=True,
                         env=os.environ | {"XLA_FLAGS": "--xla_gpu_deterministic_ops=true"})
    assert ran.returncode == 0, ran.stderr  # of one that it does not know, XLA dies
    assert ran.stdout.endswith("true --xla_gpu_deterministic_ops=true\n")  # the user's own comes last and counts


def test_launch_files_install_extras_that_exist():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    files = [*SCRIPTS, LAUNCH / "Dockerfile"]
    named = {extra for file in files for extra in re.findall(r"\.\[(\w+)\]|ACCELERATOR=(\w+)", file.read_text())}
    assert {"cuda", "tpu"} == {name for pair in named for name in pair if name} <= extras.keys()
    notebook = (LAUNCH / "colab.ipynb").read_text()
    assert all(requirement in notebook for requirement in extras["cuda"] + extras["tpu"])


def test_gpu_installs_once_and_hands_on_its_arguments(commands, tmp_path):
    clone = tmp_path / "a clone"
    (clone / "launch").mkdir(parents=True)
    script = shutil.copy(LAUNCH / "gpu.sh", clone / "launch")
    commands.add("python", 'if [ "$1" = -c ]; then [ -e installed ]; else echo "on $JAX_PLATFORMS$SLURM_JOB_ID"; fi')
    commands.add("pip", "touch installed")
    commands.add("python3", 'mkdir -p .venv/bin && cp "$COMMANDS"/{python,pip} .venv/bin')
    ran = commands.run("bash", script, *ARGUMENTS, cwd=tmp_path, SLURM_JOB_ID="7")
    assert (ran.returncode, ran.stdout) == (0, "on cuda,cpu\n"), ran.stderr
    probe, gpu = (["python", "-c", code] for code in ("import vqrae_jax, jax_cuda12_plugin", GPU_CHECK))
    train = ["python", "-m", "vqrae_jax.main", *ARGUMENTS]
    first = [["python3", "-m", "venv", ".venv"], probe, ["pip", "install", "--quiet", "--editable", ".[cuda]"], gpu,
             train]
    assert commands.calls() == first
    commands.run("bash", script, *ARGUMENTS, cwd=tmp_path)
    assert commands.calls() == [*first, probe, gpu, train]
    (clone / "installed").unlink()
    shutil.copy("/bin/true", clone / ".venv/bin/pip")
    ran = commands.run("bash", script, *ARGUMENTS, cwd=tmp_path)
    assert (ran.returncode, ran.stderr[:36]) == (1, "error: JAX finds no NVIDIA GPU: see ")


def test_measuring_downloads_nothing_and_keeps_an_environment_that_is_given(commands, tmp_path):
    clone = tmp_path / "a clone"
    (clone / "launch").mkdir(parents=True)
    script = shutil.copy(LAUNCH / "measure_gpu.sh", clone / "launch")
    body = ('case "$1 $2" in "-c "*) [ -e installed ];; "-m pip") touch installed;; "-m venv") mkdir -p .venv/bin &&'
            ' cp "$COMMANDS/python3" .venv/bin/python;; *) echo "on $JAX_PLATFORMS in $PYTHONPATH";; esac')
    commands.add("python3", body)
    ran = commands.run("bash", script, "--json=my file.json", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (0, f"on cuda,cpu in {clone}\n"), ran.stderr
    made, check, pip, gpu, (*measure, seconds, last) = commands.calls()
    offline = ["python", "-m", "pip", "install", "--quiet", "--no-index", "--find-links", "wheels"]
    assert made == ["python3", "-m", "venv", ".venv"] and check[:2] == gpu[:2] == ["python", "-c"]
    assert pip == [*offline, "--requirement", "requirements.txt", "jax[cuda13]", "torch"]
    assert measure == ["python", "launch/measure_gpu.py"] and last == "--json=my file.json"
    assert 500 < int(seconds.removeprefix("--seconds=")) <= 540
    (clone / "installed").unlink()
    commands.run("bash", script, cwd=tmp_path, PYTHON="python3")
    assert commands.calls()[6][1:] == [*offline[1:], "--requirement", "requirements.txt"], "its JAX is kept"
    ran = commands.run("bash", script, "wheels", cwd=tmp_path)
    assert commands.calls()[-1][:5] == ["python3", "-m", "pip", "wheel", "--wheel-dir"] and ran.returncode == 0


def test_ship_nano_packs_before_it_tokenizes_and_goes_on_where_it_ended(commands, tmp_path):
    clone = tmp_path / "a clone"
    (clone / "launch").mkdir(parents=True)
    script = shutil.copy(LAUNCH / "ship_nano.sh", clone / "launch")
    assert commands.run("bash", script, cwd=tmp_path).stderr == "error: give the folder where TFDS keeps CIFAR-10\n"
    (clone / ".venv/bin").mkdir(parents=True)
    made = 'case "$1" in launch/pack.py) out="${3#--out=}"; mkdir -p "$out"; touch "$out/model.safetensors";; esac'
    shutil.copy(commands.add("python", f'echo "$TFDS_DATA_DIR"; {made}'), clone / ".venv/bin")
    (tmp_path / "data").mkdir()
    ran = commands.run("bash", script, "data", cwd=tmp_path)
    assert ran.returncode == 0 and set(ran.stdout.splitlines()) == {str(tmp_path / "data")}, ran.stderr
    _, *calls = commands.calls()
    names = [call[1] if call[1] != "-m" else call[2].removeprefix("vqrae_jax.") for call in calls]
    assert names == ["main", "main", "launch/pack.py", "evaluate", "tokenize", "tokenize", "main", "launch/pack.py",
                     "generate"]
    wrong = wrong_commands("\n".join(["", *(f"    {shlex.join(call)}" for call in calls if call[1] == "-m")]))
    assert not wrong
    # What is there is not made again.
    for name in ("nano_shipped/metrics.json", "nano_samples_metrics.json"):
        (clone / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / "runs" / name).touch()
    commands.run("bash", script, "data", cwd=tmp_path)
    again = [call[2] for call in commands.calls()[len(calls) + 2:]]
    assert again == [f"vqrae_jax.{name}" for name in ("main", "main", "tokenize", "tokenize", "main")]


GPU_CHECK = 'import jax; jax.devices("cuda")'
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "12"}


def has_gpu(commands, folder, found: bool) -> None:
    (folder / ".venv/bin").mkdir(parents=True)
    shutil.copy(commands.add("python", "exit 0" if found else "exit 1"), folder / ".venv/bin")


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (75, True), (137, False)])
def test_slurm_runs_a_task_per_gpu_and_requeues_only_what_was_stopped(commands, tmp_path, status, requeued):
    commands.add("srun", f'echo "on $JAX_PLATFORMS"; exit {status}')
    commands.add("scontrol")
    has_gpu(commands, tmp_path, True)
    ran = commands.run("bash", LAUNCH / "slurm.sh", *ARGUMENTS, cwd=tmp_path, **SLURM)
    assert ran.stdout == "on cuda,cpu\n", ran.stderr
    assert ran.returncode == (0 if requeued else status)
    check, srun, *others = commands.calls()
    assert check == ["python", "-c", GPU_CHECK]
    assert srun == ["srun", "--kill-on-bad-exit=0", "--gpu-bind=none", "--cpus-per-task=12", ".venv/bin/python", "-m",
                    "vqrae_jax.main", *ARGUMENTS]
    assert others == ([["scontrol", "requeue", "7"]] if requeued else [])


def test_slurm_does_not_train_on_the_cpu(commands, tmp_path):
    commands.add("srun")
    has_gpu(commands, tmp_path, False)
    ran = commands.run("bash", LAUNCH / "slurm.sh", *ARGUMENTS, cwd=tmp_path, **SLURM)
    assert ran.returncode == 1 and ran.stderr.startswith("error: JAX finds no NVIDIA GPU on ")
    assert commands.calls() == [["python", "-c", GPU_CHECK]]


def test_slurm_refuses_other_than_a_task_per_gpu(commands, tmp_path):
    commands.add("srun")
    ran = commands.run("bash", LAUNCH / "slurm.sh", *ARGUMENTS, cwd=tmp_path, SLURM_GPUS_ON_NODE="8")
    assert ran.returncode == 1 and ran.stderr.startswith("error: --ntasks-per-node=1, but 8 GPUs a node")
    assert not commands.calls()


def test_slurm_directives_come_before_the_first_command():
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert directives and max(directives) < first_command, "sbatch ignores what comes later"


@pytest.fixture
def tpu_worker(commands, tmp_path):
    """Runs tpu_vm.sh with a gcloud that copies the code to one worker's home; gives that and the worker's script."""
    worker = tmp_path / "worker"
    worker.mkdir()
    commands.add("gcloud", f'[ "$4" != scp ] || cp "$5" {worker}/')
    ran = commands.run("bash", LAUNCH / "tpu_vm.sh", "my-slice", "us-west4-a", *ARGUMENTS, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    copy, start = commands.calls()
    where = ["--zone=us-west4-a", "--worker=all"]
    assert copy[4] == "scp" and copy[6:] == ["my-slice:", *where]
    assert not Path(copy[5]).exists(), "the archive was left behind"
    assert start[4:8] == ["ssh", "my-slice", *where]
    option, _, script = start[8].partition("=")
    assert option == "--command" and len(start) == 9
    return worker, script


@pytest.mark.parametrize("status", [0, 1])
def test_tpu_workers_install_and_run_the_same_command(commands, tpu_worker, status):
    worker, script = tpu_worker
    before = len(commands.calls())
    commands.add("python", f'echo "on $JAX_PLATFORMS in $PWD"; exit {status}')
    commands.add("uv", '[ "$1" != venv ] || { mkdir -p .venv/bin && cp "$COMMANDS/python" .venv/bin; }')
    ran = commands.run("bash", "-c", script, cwd=worker, HOME=str(worker))
    assert ran.returncode == status, ran.stderr
    assert ran.stdout == f"on tpu,cpu in {worker / 'vqrae_jax'}\n" == (worker / "vqrae_jax/train.log").read_text()
    install = ["uv", "pip", "install", "--quiet", "--editable", ".[tpu]"]
    train = ["python", "-m", "vqrae_jax.main", *ARGUMENTS]
    first = [["uv", "venv", "--quiet", "--python=3.12"], install, train]
    assert commands.calls()[before:] == first
    commands.run("bash", "-c", script, cwd=worker, HOME=str(worker))
    assert commands.calls()[before:] == [*first, install, train], "the second start keeps the environment"


def test_tpu_workers_and_the_image_get_the_same_files(tpu_worker):
    worker, _ = tpu_worker
    with tarfile.open(worker / "vqrae_jax.tgz") as archive:
        archived = {name.split("/")[0] for name in archive.getnames()}
    lines = [line.split() for line in (LAUNCH / "Dockerfile").read_text().splitlines()]
    assert archived == {name for line in lines if line[:1] == ["COPY"] for name in line[1:-1]}


def test_tpu_without_arguments_says_how(commands, tmp_path):
    ran = commands.run("bash", LAUNCH / "tpu_vm.sh", "my-slice", "us-west4-a", cwd=tmp_path)
    assert ran.returncode == 1 and ran.stderr.startswith("usage: ")


def test_gke_restarts_the_whole_set_and_fits_its_slice():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    jobset = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
    options = dict(argument.removeprefix("--").split("=", 1) for argument in container["args"])
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert (REPOSITORY / options["config"]).is_file()
    assert options["workdir"].startswith(mounts["shared"] + "/"), "the run's folder would die with the pod"
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}


def read_notebook(name: str):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install -e '.[test]'")
    content = nbformat.read(LAUNCH / name, as_version=4)
    nbformat.validate(content)
    return content


def run_notebook(notebook, folder: Path, tmp_path: Path, monkeypatch) -> tuple[str, list[str]]:
    """Runs a notebook in a folder; gives what its cells print, and their pictures."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install -e '.[test]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install -e '.[test]'")
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return "".join(output.get("text", "") for output in outputs), pictures


@pytest.fixture
def notebook():
    return read_notebook("colab.ipynb")


@pytest.mark.parametrize("name", ["colab.ipynb", "tour.ipynb"])
def test_notebooks_are_stored_without_outputs(name):
    cells = [cell for cell in read_notebook(name).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow
def test_the_tour_runs_in_a_clone_and_compares_its_runs(tmp_path, monkeypatch):
    for name in ("vqrae_jax", "configs", "launch"):
        shutil.copytree(REPOSITORY / name, tmp_path / "clone" / name, ignore=shutil.ignore_patterns("__pycache__"))
    notebook = read_notebook("tour.ipynb")
    settings, *_ = (cell for cell in notebook.cells if cell.cell_type == "code")
    assert "STEPS = 20" in settings.source
    settings.source = settings.source.replace("STEPS = 20", "STEPS = 5")
    text, pictures = run_notebook(notebook, tmp_path / "clone" / "launch", tmp_path, monkeypatch)
    for run in ("simvq", "one_photo", "signs"):
        assert (tmp_path / "clone/runs/tour" / run / "checkpoints/5").is_dir(), text
        assert re.search(rf"^{run} +\d+\.\d\d dB +\d+ of 512$", text, re.MULTILINE), text
    assert text.count("step 5/5  ") == 3, "progress is shown"
    assert "features (8, 64, 192) codes (8, 8, 8) of 512" in text
    assert re.search(r"^encoder +norm of the gradient \d", text, re.MULTILINE)
    assert len(pictures) == 4, text


def test_notebook_runs_from_an_empty_folder(notebook, tmp_path, monkeypatch):
    """Clones, trains a few steps, shows pictures and codes."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    origin, empty = tmp_path / "origin", tmp_path / "empty folder"
    origin.mkdir()
    empty.mkdir()
    for name in ("vqrae_jax", "configs"):
        shutil.copytree(REPOSITORY / name, origin / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "requirements.txt", origin)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false",
           "-C", origin]
    for arguments in (["init", "--quiet"], ["add", "--force", "."], ["commit", "--quiet", "--message=test"]):
        subprocess.run([*git, *arguments], check=True)

    settings, *_ = (cell for cell in notebook.cells if cell.cell_type == "code")
    options = {"train.steps": 2, "train.batch_size": 4, "train.log_every": 1, "optim.warmup_steps": 1,
               "eval.limit": 32, "eval.batch_size": 32, "eval.samples": 2, "model.quantizer.size": 64}
    settings.source = f"""REPOSITORY = {origin.as_uri()!r}
WORKDIR = "runs/my colab"
OPTIONS = {shlex.join(f"--config.{key}={value}" for key, value in options.items())!r}"""
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # all is installed: a test must not change its own environment
    text, pictures = run_notebook(notebook, empty, tmp_path, monkeypatch)
    assert (empty / "vqrae_jax/runs/my colab/checkpoints/2").is_dir(), text
    assert len(pictures) == 2, text
    assert "step 2: PSNR" in text and "of the codes in use" in text
    assert "(16, 8, 8) codes" in text and "different ones of 64" in text
