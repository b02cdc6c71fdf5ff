"""What tests share: tiny encoders in the layout of real checkpoints, and the folder of real images."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

# Many tests compile the same tiny step; they and the processes they start share one cache. Set before JAX is imported.
_cache = tempfile.TemporaryDirectory(prefix="vqrae_jax_test_cache_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _cache.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Nearly all the time of tests is that of compiling what then runs a few times. CI runs the parity tests with 0 as well.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

from tests import offline  # noqa: E402
from vqrae_jax import config as config_lib  # noqa: E402
from vqrae_jax.models import perceptual  # noqa: E402
from vqrae_jax.models.discriminators import DISCRIMINATORS, PatchGAN, dino  # noqa: E402
from vqrae_jax.models.perceptual import ConvNeXtSpec  # noqa: E402
from vqrae_jax.models.vit import ViTSpec  # noqa: E402
from vqrae_jax.training.reporting import Reporter  # noqa: E402

offline.refuse()
REPOSITORY = Path(__file__).parents[1]
REFERENCE = Path(__file__).parent / "reference"


@pytest.fixture
def shared_data() -> Path:
    """The folder of real images that developers have beside the repository."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: real images are not part of the repository")
    return folder


@pytest.fixture
def tiny_config():
    """See `tiny`."""
    return tiny()


def tiny():
    """A config that trains in seconds: a tiny random SigLIP, 16 tokens, 32 codes."""
    config = config_lib.default()
    config.train.update(steps=6, batch_size=4, log_every=1, checkpoint_every=2, eval_every=100)
    config.data.update(image_size=32, threads=1)
    config.eval.update(batch_size=8, limit=16, samples=2)
    config.model.encoder.path = str(REFERENCE / "siglip_vision")
    config.model.quantizer.update(size=32, dim=32)
    config.optim.update(lr=1e-3, end_lr=1e-4, warmup_steps=2, ema_decay=0.9)
    config.optim.lr_multipliers = (("encoder/.*", 0.0),)
    config.log.update(tensorboard=False, compilation_cache="")
    # Not those of this machine, with which evaluations would take minutes.
    config.eval.inception = "/nowhere/inception.pth"
    config.loss.perceptual.lpips_vgg16 = "/nowhere/vgg16.pth"
    return config


@contextlib.contextmanager
def optimizations(*, on: bool):
    """What is compiled inside is compiled as users compile, or as tests do by default."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", not on)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@contextlib.contextmanager
def killed_in_step(step: int):
    """Around a run: it dies when it reports this step, and keeps what it saved before."""
    class Killed(BaseException):
        pass

    write = Reporter.write

    def dies(self, at, *arguments):
        if at == step:
            raise Killed
        write(self, at, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):  # of its own: other patches stay
        patch.setattr(Reporter, "write", dies)
        yield


@pytest.fixture
def encoder_folder(tmp_path) -> Path:
    """A tiny SigLIP checkpoint that a test may change."""
    return Path(shutil.copytree(REFERENCE / "siglip_vision", tmp_path / "encoder"))


@pytest.fixture
def tiny_networks():
    """The losses' networks at toy size, or compiling them would take minutes."""
    spec = ViTSpec(width=16, depth=2, heads=2, mlp_dim=32, activation="gelu_tanh", patch_size=8, prefix_tokens=1)
    with pytest.MonkeyPatch.context() as patch:  # of its own: a test's `undo` leaves it alone
        patch.setattr(perceptual, "VGG16", ((4, 1), (4, 1)))
        patch.setattr(perceptual, "CONVNEXT_SMALL", ConvNeXtSpec(depths=(1, 1), widths=(8, 8), image_size=16))
        for name in ("dino_s8", "dino_s16"):
            patch.setitem(DISCRIMINATORS, name, dino(spec, image_size=32, layers=(1,), kernel_size=3))
        small = lambda gan, **options: PatchGAN(channels=gan.channels, stages=1, **options)
        patch.setitem(DISCRIMINATORS, "patchgan", DISCRIMINATORS["patchgan"]._replace(build=small))
        yield


@pytest.fixture(scope="session")
def torch_fidelity():
    """Imports modules of torch-fidelity by their names."""
    from tests.make_inception_references import torch_fidelity

    try:
        torch_fidelity("version")
    except ImportError as error:
        pytest.skip(f"parity needs torch and torch-fidelity ({error})")
    return torch_fidelity
