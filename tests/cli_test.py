"""Commands as a shell sees them: what they print, what they leave, how they fail."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import REFERENCE, REPOSITORY, tiny
from tests.verbs import assert_one_line_error, command
from vqrae_jax import config as config_lib
from vqrae_jax.tokenizer import task
from vqrae_jax.training import checkpoint, lock

NANO = ("vqrae_jax.main", "--config=configs/nano_stage1.py",
        f"--config.model.encoder.path={REFERENCE / 'siglip_vision'}")


@pytest.mark.parametrize(("arguments", "says"), [
    (["--workdir={tmp}", "--config.train.stepz=3"], "unknown config key train.stepz: did you mean train.steps? There "),
    (["--workdir={tmp}", "--config.optm.lr=3"], "unknown config key optm.lr: did you mean optim.lr or gan.lr? There "),
    (["--workdir={tmp}", "--config.train.steps=30"], "for a short run add --config.optim.warmup_steps=3"),
    (["--workdir={tmp}", "--config.train.steps=many"], "config.train.steps"),
    (["--workdir={tmp}", "--config.train.steps=0"], "error: config key train.steps must be at least 1, not 0"),
    (["--workdir={tmp}", "--config.data.image_size=60"],
     "error: config key data.image_size 60 is not divisible by the encoder's patch size 8"),
    (["--workdir=/proc/run"], "error: cannot write to /proc/run"),
    (["--workdir={tmp}", "--config.data.source=folder:/no/such/folder"], "error: no folder /no/such/folder"),
    (["--workdir={tmp}", "--config.data.source=folder:none"], "; --config.data.source=... says where"),
    (["--workdir={tmp}", "--config.data.source=folder:{tmp}"], "error: no image under"),
    (["--workdir={tmp}", "--config.data.source=tfds:nothing@{tmp}"], "error: no TFDS data set 'nothing'"),
    (["--workdir={tmp}", "--config.data.source=webdataset:x"], "error: unknown data 'webdataset:x'"),
    (["--workdir={tmp}", "--config.init_from={tmp}/none"],
     "is not the folder of a run; --config.init_from=... says where"),
    (["--workdir={tmp}", "--config.model.encoder.path={tmp}/none"], "; --config.model.encoder.path=... says where"),
    (["--workdir={tmp}", "--config.loss.perceptual_weight=1.0", "--config.loss.perceptual.convnext_s=1.0",
      "--config.loss.perceptual.convnext_s_weights=/none.pth"],
     "; --config.loss.perceptual.convnext_s_weights=... says where"),
    (["--workdir={tmp}", "--config=configs/nano_stag1.py"],
     "error: there is no config file configs/nano_stag1.py: did you mean configs/nano_stage1.py?"),
    (["--workdir={tmp}", "--config=nano_stage1"],
     "error: there is no config file nano_stage1: did you mean configs/nano_stage1.py?"),
    (["--workdir={tmp}", "--config.optim.lr_multipliers=(('encodr/.*',0.0),)"], "'encodr/.*' matches no parameter"),
    (["--workdir={tmp}", "--config.data.flip", "false"], "error: unexpected argument 'false': flags are given as"),
])
def test_main_fails_in_one_line_and_leaves_nothing(arguments, says, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert_one_line_error(command(*NANO, *(a.format(tmp=tmp_path) for a in arguments)), says)
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    # A start that fails reserves nothing: the folder takes another config.
    assert not [path for path in left if path.is_dir() and path.name.isdigit()]


@pytest.mark.parametrize(("verb", "arguments", "says"), [
    ("main", ["--config.prefix.dorp=0.2"], "unknown config key prefix.dorp: did you mean prefix.drop?"),
    ("main", ["--config.gan.lr=1.0"], "error: unknown config key gan.lr: did you mean optim.lr?"),
    ("main", ["--config.data.source=codes:{tmp}", "--workdir={tmp}/run"], "; --config.data.source=... says where"),
    ("bench", ["--case=encode"], "error: --case=encode cannot be measured with the config of a generator, only gen"),
    ("bench", ["--config.data.grid=0"], "error: config key data.grid is 0, whatever the codes have"),
    ("plan", ["--topology=v5e:2x2"], "error: config key data.classes is 0, whatever the codes have"),
])
def test_the_config_of_a_generator_has_other_keys(verb, arguments, says, tmp_path):
    if verb == "plan":
        pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install 'vqrae_jax[tpu]'")
    result = command(f"vqrae_jax.{verb}", "--config=configs/nano_generator.py",
                     *(argument.format(tmp=tmp_path) for argument in arguments))
    assert_one_line_error(result, says)


def test_a_run_needs_no_more_than_a_config(tmp_path):
    """The literal command, in a folder of the user's; a finished run says how good it is once more."""
    (tmp_path / "mine.py").write_text("from tests.conftest import tiny\ndef get_config(steps):\n    config = tiny()\n"
                                      "    config.train.steps = int(steps)\n    return config\n")
    for _ in range(2):
        result = command("vqrae_jax.main", "--config=mine.py:3", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "mine-3" in result.stdout and "psnr" in result.stdout
    assert "nothing left to do" in result.stderr
    assert checkpoint.has_checkpoint(tmp_path / "runs" / "mine-3")


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    with lock.held(tmp_path):
        assert_one_line_error(command(*NANO, f"--workdir={tmp_path}"), f"{tmp_path} is being trained in by process ")


def test_deterministic_reaches_xla_and_two_runs_are_equal(tmp_path):
    """A name that XLA does not know would end the process."""
    (tmp_path / "mine.py").write_text("import atexit, os\nfrom tests.conftest import tiny\ndef get_config():\n"
                                      "    config = tiny()\n    config.train.steps = 3\n    return config\n"
                                      "atexit.register(lambda: print('at the end', os.environ['XLA_FLAGS']))\n")
    run = lambda name, flags: command("vqrae_jax.main", "--config=mine.py", f"--workdir={name}", "--deterministic",
                                      cwd=tmp_path, XLA_FLAGS=flags)
    flags = "--xla_cpu_enable_fast_math=false"
    for name in ("one", "other"):
        result = run(name, flags)
        assert result.returncode == 0, result.stderr
        assert f"at the end {flags} --xla_gpu_deterministic_ops=true\n" in result.stdout
    assert (tmp_path / "one/metrics.jsonl").read_bytes() == (tmp_path / "other/metrics.jsonl").read_bytes()
    assert_one_line_error(run("one", "--xla_gpu_deterministic_ops=false"), "which contradicts --deterministic")


def test_all_verbs_are_listed_and_every_key_is_explained():
    listed = command("vqrae_jax").stdout
    for verb in ("main", "evaluate", "reconstruct", "convert", "plan", "bench"):
        assert f"  {verb} " in listed
        assert (REPOSITORY / "vqrae_jax" / f"{verb}.py").exists()
    for name, config_type in (("nano_stage1", config_lib.Config), ("nano_generator", config_lib.GeneratorConfig)):
        explained = command("vqrae_jax.main", f"--config=configs/{name}.py", "--config.optim.lr=0.5", "--help")
        assert explained.returncode == 0, explained.stderr
        rows = {line.split()[0]: line.split()[1:] for line in explained.stdout.splitlines()
                if line.startswith("--config.")}
        assert {key.removeprefix("--config.") for key in rows} == config_lib.keys(config_type).keys()
        assert rows["--config.optim.lr"] == ["float", "at", "least", "0.0", "0.0004", "0.5", "*"]
        assert rows["--config.seed"] == ["int", "at", "least", "0", "0", "0"]


@pytest.mark.parametrize(("line", "says"), [
    ("config.optim.learning_rate = 1.0", "unknown config key optim.learning_rate: did you mean optim.lr? There are "),
    ("config.optim.lr = 'fast'", "lr"),
    ("config.optim.lr = undefined", "undefined"),
    ("import nowhere", "nowhere"),
])
def test_a_config_file_that_fails_is_one_line(line, says, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from configs import nano_stage1\ndef get_config():\n    config = nano_stage1.get_config()\n"
                    f"    {line}\n    return config\n")
    assert_one_line_error(command("vqrae_jax.main", f"--config={file}", f"--workdir={tmp_path}/run"), says)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    result = command(*NANO, f"--workdir={tmp_path}")
    assert_one_line_error(result, "config.json is not the config of a run")
    assert (tmp_path / "config.json").read_text() == '{"model_type": "siglip"}'


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    config = tiny()
    config.eval.samples = 4
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    task.train(config_lib.parse(config), folder)
    return folder


def test_evaluate_prints_a_table_and_writes_numbers_and_a_picture(run, tmp_path):
    result = command("vqrae_jax.evaluate", f"--workdir={run}", f"--out={tmp_path}", "--limit=20")
    assert result.returncode == 0, result.stderr
    left_out = [line.partition(":")[0] for line in result.stderr.splitlines()]
    assert left_out == ["lpips is left out", "rfid is left out"]  # weights that are not there: a line each
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["num_images"] == 20
    assert set(metrics) >= {"psnr", "ssim", "code_usage", "code_perplexity", "knn_top1"}
    assert f"{metrics['psnr']:.4f}" in result.stdout
    picture = np.asarray(Image.open(tmp_path / "reconstructions.png"))
    assert picture.shape == (2 * (14 + 34), 4 * 34, 3)


def test_evaluate_writes_what_it_can_and_fails_where_a_flag_asks_for_more(run, tmp_path):
    result = command("vqrae_jax.evaluate", f"--workdir={run}", f"--out={tmp_path}", "--limit=8", "--norobustness",
                     "--inception=/nowhere/i.pth", "--fd=/nowhere/dinov2", f"--reference=folder:{tmp_path}/none")
    assert_one_line_error(result, "not all that was asked for could be measured: ")
    error = result.stderr.splitlines()[-1]
    assert all(f"{metric}: " in error for metric in ("rfid", "fd_dinov2", "fd_encoder")) and "lpips" not in error
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["failed"].keys() == {"rfid", "lpips", "fd_dinov2", "fd_encoder"}
    assert {"psnr", "ssim", "code_usage", "drift_cka"} <= metrics.keys() and "psnr" in result.stdout
    assert (tmp_path / "report.html").exists()


def test_verbs_take_the_weights_themselves(run, tmp_path):
    """Instead of their moving average, which is another model."""
    Image.new("RGB", (40, 40), "green").save(tmp_path / "green.png")
    psnr, shown = {}, {}
    for weights in ("ema", "raw"):
        flags, out = (f"--workdir={run}", f"--weights={weights}"), tmp_path / weights
        result = command("vqrae_jax.evaluate", *flags, f"--out={out}", "--limit=8")
        assert f"\ndata: embedded, held out; weights: {weights}; 8 images of 32 px; " in result.stdout, result.stderr
        metrics = json.loads((out / "metrics.json").read_text())
        psnr[weights] = metrics["psnr"]
        assert metrics["weights"] == weights
        shown[weights] = command("vqrae_jax.reconstruct", *flags, f"--out={out}.png", tmp_path / "green.png").stdout
        assert command("vqrae_jax.convert", "to-hf", *flags, f"--out={out}").returncode == 0
    assert psnr["ema"] != psnr["raw"]
    assert shown["ema"].splitlines()[0] != shown["raw"].splitlines()[0]


def test_evaluate_shows_the_held_out_images_of_a_folder_and_all_of_data_that_are_named(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(40):
        Image.new("RGB", (32, 32), (6 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    config, data = tiny(), f"folder:{tmp_path / 'images'}"
    config.train.update(steps=2, batch_size=2)
    config.optim.warmup_steps = 1
    config.data.update(source=data, holdout=0.2)
    shown = task.train(config_lib.parse(config), tmp_path / "run")
    for flags, part, count in (([], "held out", shown["num_images"]), ([f"--data={data}"], "all", 40)):
        result = command("vqrae_jax.evaluate", f"--workdir={tmp_path / 'run'}", *flags)
        assert f"\ndata: {data}, {part}; weights: ema; {count} images of 32 px; " in result.stdout
        metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
        assert (metrics["num_images"], metrics["part"]) == (count, part)
    assert 0 < shown["num_images"] < 20


def test_too_many_bad_images_end_in_one_line(run, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(20):
        file = tmp_path / "images" / f"{i}.png"
        Image.new("RGB", (32, 32)).save(file)
        if i % 5 == 1:
            file.write_text("no picture")
    data, out = f"folder:{tmp_path / 'images'}", tmp_path / "out"
    evaluate = ("vqrae_jax.evaluate", f"--workdir={run}", f"--data={data}", f"--out={out}")
    assert_one_line_error(command(*evaluate), f"{out}/bad_images.jsonl names them all; mend or remove them, or allow")
    assert command(*evaluate, "--max_bad=0.2").returncode == 0
    assert json.loads((out / "metrics.json").read_text())["num_images"] == 16
    train = (*NANO, f"--workdir={tmp_path / 'run'}", f"--config.data.source={data}", "--config.train.steps=4",
             "--config.optim.warmup_steps=0", "--config.model.quantizer.init=random")
    assert_one_line_error(command(*train), f"{tmp_path}/run/bad_images.jsonl names them all; mend or remove them, or")


def test_evaluate_puts_runs_side_by_side(run, tmp_path):
    other = shutil.copytree(run, run.parent / "tiny2")
    values = json.loads((other / "config.json").read_text())
    values["optim"]["lr"] = 3e-4
    del values["checksum"]  # as who changes it by hand
    (other / "config.json").write_text(json.dumps(values))
    result = command("vqrae_jax.evaluate", f"--workdir={run.parent}/ti*", f"--out={tmp_path}", "--limit=9")
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert list(written["runs"]) == ["tiny", "tiny2"]
    assert written["config"] == {"tiny": {"optim.lr": 1e-3}, "tiny2": {"optim.lr": 3e-4}}
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["optim.lr", "0.001", "0.0003"] in rows and ["num_images", "9", "9"] in rows
    assert_one_line_error(command("vqrae_jax.evaluate", f"--workdir={tmp_path}/no*"), "matches no folder of a run")
    assert np.asarray(Image.open(tmp_path / "reconstructions.png")).shape == (3 * (14 + 34), 4 * 34, 3)


def test_reconstruct_shows_originals_over_reconstructions(run, tmp_path):
    files = []
    for i, color in enumerate(("red", "blue", "green")):
        files.append(tmp_path / f"{i}.png")
        Image.new("RGB", (50 + 10 * i, 40), color).save(files[-1])
    result = command("vqrae_jax.reconstruct", f"--workdir={run}", f"--out={tmp_path / 'out' / 'r.png'}", *files)
    assert result.returncode == 0, result.stderr
    picture = np.asarray(Image.open(tmp_path / "out" / "r.png"))
    assert picture.shape == (2 * (14 + 34), 3 * 34, 3)
    np.testing.assert_array_equal(picture[14 + 17, 17], (255, 0, 0))
    np.testing.assert_array_equal(picture[14 + 17, 34 + 17], (0, 0, 255))


@pytest.mark.parametrize(("arguments", "says"), [
    (["vqrae_jax.evaluate", "--workdir={tmp}/typo"], "is not the folder of a run"),
    (["vqrae_jax.evaluate", "--workdir={run}", "--out={tmp}", "--data=folder:{tmp}"], "error: no image under"),
    (["vqrae_jax.evaluate", "--workdir={run}", "--step=7"], "holds the checkpoints"),
    (["vqrae_jax.evaluate", "--workdir={run}", "{run}"], "error: unexpected argument"),
    (["vqrae_jax.reconstruct", "--workdir={run}", "--out={tmp}/r.png"], "error: no images given"),
    (["vqrae_jax.reconstruct", "--workdir={run}", "--out={tmp}/r.png", "{tmp}/text.jpg"], "text.jpg"),
    (["vqrae_jax.reconstruct", "--workdir={run}", "--out={tmp}/r.png", "{tmp}/gone.jpg"], "gone.jpg"),
    (["vqrae_jax.reconstruct", "--workdir={run}", "--out={tmp}/r.jpg", "{tmp}/text.jpg"], "--out must end in .png"),
])
def test_other_commands_fail_in_one_line(arguments, says, run, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    if "--data" in " ".join(arguments):
        os.remove(tmp_path / "text.jpg")
    assert_one_line_error(command(*(a.format(tmp=tmp_path, run=run) for a in arguments)), says)
    assert not (tmp_path / "r.png").exists()
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(("raised", "code", "says"), [
    ("KeyboardInterrupt('stopped by a signal after step 3; the same command continues')", 75,
     "stopped by a signal after step 3; the same command continues"),
    ("KeyboardInterrupt()", 75, "interrupted"),
    ("FloatingPointError('20 steps in a row')", 1, "error: 20 steps in a row"),
    ("OSError('the disk is full')", 1, "error: the disk is full"),
])
def test_a_scheduler_can_tell_a_stopped_run_from_a_failed_one(raised, code, says, tmp_path):
    (tmp_path / "verb.py").write_text(f"from vqrae_jax import cli\ndef main(_):\n    raise {raised}\ncli.run(main)\n")
    result = command("verb", PYTHONPATH=str(tmp_path))
    assert (result.returncode, result.stderr.strip()) == (code, says)


@pytest.mark.parametrize(("raised", "code", "says"), [
    ("ValueError('no weights')", 1, "error: no weights"),
    ("KeyboardInterrupt('stopped by a signal')", 75, "stopped by a signal"),
])
def test_nobody_waits_for_a_compiler_whose_program_is_not_needed(raised, code, says, tmp_path):
    (tmp_path / "verb.py").write_text(f"""
import time
from vqrae_jax import cli
from vqrae_jax.training import compilation

class Step:
    def lower(self):
        return self

    def compile(self):
        time.sleep(600)

def main(_):
    compilation.begin(Step(), name="the step")
    raise {raised}

cli.run(main)
""")
    result = command("verb", PYTHONPATH=str(tmp_path))
    assert (result.returncode, result.stderr.strip()) == (code, says)


@pytest.mark.parametrize("verb", ["main", "evaluate", "reconstruct"])
def test_help_explains(verb):
    """In a process of its own, as a user starts it."""
    result = subprocess.run([sys.executable, "-m", f"vqrae_jax.{verb}", "--help"], cwd=REPOSITORY, capture_output=True,
                            text=True, timeout=300)
    assert "--workdir" in result.stdout
    assert f"vqrae_jax.{verb}" in result.stdout


def test_runs_for_images_of_different_sizes_are_refused_before_any_is_measured(tmp_path):
    for size in (32, 64):
        config = tiny()
        config.data.image_size = size
        (tmp_path / str(size)).mkdir()
        config_lib.save(config_lib.parse(config), tmp_path / str(size) / "config.json")  # no checkpoint is asked for
    result = command("vqrae_jax.evaluate", f"--workdir={tmp_path / '32'}", f"--workdir={tmp_path / '64'}")
    assert result.returncode == 1
    assert result.stderr == ("error: runs for images of different sizes, [32, 64], cannot be compared: one at a time\n")
    assert not (tmp_path / "32" / "evaluation").exists()
