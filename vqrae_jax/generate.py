"""Samples of a generator as pictures, and how good they are.

    python -m vqrae_jax.generate --workdir=GENERATOR_RUN --tokenizer=RUN --num=N --out=FILE.png

--out=FILE.png is a picture with captions; FILE.npz holds `arr_0`, uint8 [N, H, W, 3], and `arr_1`, the classes, as
ADM's evaluator reads them; any other name is a folder of PNG files. With --reference their Frechet distance to other
images is taken, beside that of reconstructions and of codes that know nothing of each other, for a table and
`OUT_metrics.json`.

The same command continues after an interruption, and ends with the same bytes. Several processes may share the work.
"""

import functools
from pathlib import Path

from absl import flags

from vqrae_jax import cli
from vqrae_jax import config as config_lib
from vqrae_jax.generator import generate, runs, sampling
from vqrae_jax.generator.inference import Generator
from vqrae_jax.tokenizer import runs as tokenizer_runs
from vqrae_jax.tokenizer import samples
from vqrae_jax.tokenizer.evaluate import table
from vqrae_jax.tokenizer.recipe import line
from vqrae_jax.training import distributed, sharding


def main(_) -> None:
    _DETERMINISTIC()
    _JOIN_PROCESSES()
    mesh = sharding.make_mesh(config_lib.Mesh())
    # Of what ships, too: two models of one name lie in two folders.
    workdir, tokenizer = runs.folder(Path(_WORKDIR.value)), tokenizer_runs.folder(Path(_TOKENIZER.value))
    out = Path(_OUT.value)
    options = sampling.Options(**{name: flag.value for name, flag in _OPTIONS.items()})
    run = runs.load_run(workdir, mesh, step=_STEP.value, weights=_WEIGHTS.value)
    decoder = samples.Decoder(tokenizer, run.codes, mesh)
    measured = samples.Options(**{name: flag.value for name, flag in _MEASURED.items()})
    measure = samples.Measurement(decoder, measured) if measured.reference else None
    weights = {str(workdir): tokenizer_runs.digest(run.params), str(tokenizer): run.codes.tokenizer}
    generator = Generator(run, mesh)
    work = generate.Samples(generator, _NUM.value, classes=_classes(), prompts=_PROMPT.value, options=options,
                            batch_size=_BATCH_SIZE.value, out=out, weights=weights)
    codes = work.codes()
    work.write(decoder.images(codes))
    if distributed.is_first():
        print(f"wrote {out}")
    if measure:
        independent = functools.partial(generate.independent_codes, generator, mesh, len(codes), options.seed)
        found = measure(codes, work.labels, independent)
        if distributed.is_first():
            recipe = samples.write(found, decoder, measured, weights, of=str(workdir), request=work.request, out=out)
            print(table(found.columns))
            print(line(recipe))
    work.end()


def _classes() -> list[int] | None:
    if wrong := [name for name in _CLASSES.value or () if not name.isdecimal()]:
        raise ValueError(f"--classes takes numbers with commas between them, not {wrong[0]!r}")
    return None if _CLASSES.value is None else list(map(int, _CLASSES.value))


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "folder of a generator's run, or nano", required=True)
    _TOKENIZER = flags.DEFINE_string("tokenizer", None, "folder of the run whose codes it learned, or nano",
                                     required=True)
    _NUM = flags.DEFINE_integer("num", None, "how many images", required=True)
    _OUT = flags.DEFINE_string("out", None, "FILE.png, FILE.npz or a folder", required=True)
    _CLASSES = flags.DEFINE_list("classes", None, "of the images, in turn; all of them if not given")
    _PROMPT = flags.DEFINE_multi_string("prompt", None, "caption, of a generator that takes some; several in turn")
    _OPTIONS = {
        "cfg": flags.DEFINE_float("cfg", sampling.Options.cfg, "scale of classifier-free guidance; 1 is none"),
        "schedule": flags.DEFINE_enum("schedule", sampling.Options.schedule, ["constant", "linear", "power_cosine"],
                                      "how guidance comes to its scale from the first code to the last"),
        "power": flags.DEFINE_float("power", sampling.Options.power, "of power_cosine"),
        "temperature": flags.DEFINE_float("temperature", sampling.Options.temperature, "of the softmax; 0 is greedy"),
        "top_k": flags.DEFINE_integer("top_k", sampling.Options.top_k, "only so many likeliest codes; 0 is all"),
        "top_p": flags.DEFINE_float("top_p", sampling.Options.top_p, "only the likeliest codes that together have this "
                                    "probability"),
        "seed": flags.DEFINE_integer("seed", sampling.Options.seed, "of what is drawn")}
    _BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "images at once", lower_bound=1)
    _STEP = flags.DEFINE_integer("step", None, "which checkpoint of the generator; the last if not given")
    _WEIGHTS = cli.weights()
    _MEASURED = {
        "reference": flags.DEFINE_string("reference", "", "SPEC of images that samples are compared with"),
        "probe": flags.DEFINE_string("probe", "", "SPEC of images with labels, to which a linear probe is fitted that "
                                     "tells the classes of samples"),
        "probe_limit": flags.DEFINE_integer("probe_limit", samples.Options.probe_limit, "only so many of them",
                                            lower_bound=1),
        "neighbours": flags.DEFINE_integer("neighbours", 0, "so many samples are shown over the nearest training "
                                           "images", lower_bound=0),
        "inception": flags.DEFINE_string("inception", "", "weights of the papers' Inception; empty is the tokenizer's "
                                         "eval.inception")}
    _DETERMINISTIC = cli.deterministic()
    _JOIN_PROCESSES = cli.join_processes()
    cli.run(main)
