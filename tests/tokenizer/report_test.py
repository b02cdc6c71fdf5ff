"""Reports: what is on the page, that it needs no other file, and that a browser shows it."""

import base64
import html
import io
import json
import math
import re
import shutil
import statistics
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from vqrae_jax.tokenizer import report, study_report
from vqrae_jax.tokenizer.report import Extremes, RunReport
from vqrae_jax.tokenizer.study_report import StudyRow
from vqrae_jax.training import reporting

SCRIPT = "<script>document.title = 'it ran'</script>"
RECIPE = {"data": "folder:/a & b", "num_images": 9, "weights": {"lpips": "6726825d" * 8}}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def images(number: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(number).random((number, side, side, 3), np.float32)


def extremes(number: int) -> Extremes:
    return Extremes(images(number), images(number), [f"{i}{SCRIPT}.png" for i in range(number)],
                    {"psnr": [20.0 + i for i in range(number)], "ssim": [0.5] * number})


def run(**changed) -> RunReport:
    robustness = [{"kind": kind, "share": share, "psnr": 20 - 9 * share, "fd_encoder": 80 + share}
                  for kind in ("random", "nearest") for share in (0.0, 0.01, 0.05, 0.1, 0.2)]
    return RunReport(**{
        "metrics": {"psnr": 21.4567, "code_perplexity": 12345.6, "num_images": 9}, "intervals": {"psnr": (21.1, 21.9)},
        "failed": {"lpips": f"its weights are not there {SCRIPT}"}, "images": images(4), "reconstructions": images(4),
        "worst": extremes(8), "best": extremes(8), "code_counts": np.array([5, 0, 100, 7]), "robustness": robustness,
        "curves": {"loss/total": ([1, 2, 3], [3.0, math.nan, 1.0])}, "differing": {"optim.lr": 0.001}, **changed})


class Page(HTMLParser):
    """A page as a reader meets it: its text, its pictures, and the tags."""

    def __init__(self, file):
        super().__init__()
        self.text, self.pictures, self.tags = "", [], []
        self.feed(file.read_text(encoding="utf-8"))
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        assert not {"href", "srcset", "onload", "onerror"} & attributes.keys()
        if tag == "img":
            self.pictures.append(attributes)

    def handle_data(self, data):
        self.text += data

    def decoded(self, kind: str) -> list[bytes]:
        start = f"data:{kind};base64,"
        return [base64.b64decode(picture["src"].removeprefix(start), validate=True)
                for picture in self.pictures if picture["src"].startswith(start)]


def written(tmp_path, **runs: RunReport) -> Page:
    report.write_report(tmp_path / "report.html", title="Title", recipe=RECIPE, runs=runs)
    return Page(tmp_path / "report.html")


def test_a_report_is_one_file_with_every_run_and_picture(tmp_path):
    page = written(tmp_path, first=run(), **{f"second {SCRIPT}": run(differing={"optim.lr": 0.0002})})
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "://" not in source and "url(" not in source and "@import" not in source
    # 4 originals once, 4 reconstructions and 2 x 8 pairs of each run.
    photographs = [Image.open(io.BytesIO(content)) for content in page.decoded("image/png")]
    assert [picture.size for picture in photographs] == [(16, 16)] * (4 + 2 * (4 + 32))
    np.testing.assert_array_equal(np.asarray(photographs[0]), np.round(images(4)[0] * 255).astype(np.uint8))
    charts = [ElementTree.fromstring(content) for content in page.decoded("image/svg+xml")]
    assert len(charts) == 1 + 2 + 1  # usage, robustness of two metrics, a curve
    assert all(float(chart.attrib["width"].removesuffix("pt")) * 96 / 72 <= 400 - 32 for chart in charts)
    assert len(photographs) + len(charts) == len(page.pictures)
    shown = [picture for picture in page.pictures if picture.get("class") == "pixels"]
    assert len(shown) == len(photographs) and all(picture["width"] == "128" for picture in shown)
    for text in ("Title", "data folder:/a & b · num_images 9", "weights.lpips", "6726825d" * 8, "first",
                 f"second {SCRIPT}", "optim.lr 0.001 0.0002", "psnr (dB ↑) 21.46 [21.10, 21.90]",
                 "code_perplexity (codes) 12,346", "lpips (↓) failed failed", f"its weights are not there {SCRIPT}",
                 f"psnr (dB ↑) 27.00 ssim (↑) 0.5000 7{SCRIPT}.png", "3 of 4 codes are used"):
        assert text in page.text


def test_a_run_has_one_colour_in_all_charts(tmp_path):
    page = written(tmp_path, first=run(curves={}), second=run(code_counts=np.zeros(0, int), robustness=[]))
    usage, psnr, fd, loss = (content.decode() for content in page.decoded("image/svg+xml"))
    swatches = re.findall(r'background: (#\w+)"></span>(\w+)', (tmp_path / "report.html").read_text())
    colours = {name: colour for colour, name in swatches}
    assert len(colours) == len(set(colours.values())) == 2 and len(set(swatches)) == 2
    for chart, there, missing in ((usage, "first", "second"), (psnr, "first", "second"), (fd, "first", "second"),
                                  (loss, "second", "first")):
        assert colours[there] in chart and colours[missing] not in chart


def test_what_a_run_does_not_have_is_left_out(tmp_path):
    page = written(tmp_path, only=run(
        metrics={"psnr": math.nan, "ssim": None}, intervals={"psnr": (math.nan, math.nan)},
        failed={"rfid": "its weights are not there"}, images=images(1), reconstructions=np.full((1, 16, 16, 3), np.nan),
        worst=extremes(1), best=extremes(1), code_counts=np.zeros(0, int), robustness=[], curves={}, differing={}))
    assert not page.decoded("image/svg+xml") and len(page.decoded("image/png")) == 6
    assert not np.asarray(Image.open(io.BytesIO(page.decoded("image/png")[1]))).any()
    assert "Codes" not in page.text and "Training" not in page.text
    for text in ("psnr (dB ↑) not finite", "ssim (↑) not finite", "rfid (↓) failed",
                 "rfid failed: its weights are not there"):
        assert text in page.text


def test_the_same_numbers_make_the_same_page(tmp_path):
    written(tmp_path, only=run())
    first = (tmp_path / "report.html").read_bytes()
    written(tmp_path, only=run())
    assert (tmp_path / "report.html").read_bytes() == first


def test_large_images_are_shown_no_wider_than_a_telephone_and_long_curves_stay_small(tmp_path):
    steps = list(range(100_000))
    curves = {"loss/total": (steps, [math.sin(x) for x in steps])}
    page = written(tmp_path, only=run(images=images(1, 512), curves=curves, code_counts=np.arange(1, 65536)))
    assert page.pictures[0]["width"] == "256" and "class" not in page.pictures[0]
    assert all(len(chart) < 100_000 for chart in page.decoded("image/svg+xml"))


def test_curves_are_those_of_metrics_jsonl_without_a_damaged_last_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(reporting.to_json({"step": 5, "grad_norm": 1.0, "grad_norm/decoder": 1.0, "loss/pixel": 0.5,
                                       "loss/total": math.inf, "lr/decoder": 1e-3, "code_usage_window": 0.25}) + "\n"
                    + reporting.to_json({"step": 10, "loss/pixel": 0.25, "loss/total": 2.0}) + "\n"
                    + reporting.to_json({"step": 10, "eval/psnr": 20.0, "eval/num_images": 9}) + "\n"
                    + '{"step": 15, "loss/pix')
    curves = report.curves(file)
    assert list(curves) == ["loss/total", "loss/pixel", "code_usage_window", "eval/psnr", "grad_norm"]
    assert curves["loss/pixel"] == ([5, 10], [0.5, 0.25]) and curves["eval/psnr"] == ([10], [20.0])
    assert math.isnan(curves["loss/total"][1][0]) and curves["loss/total"][1][1] == 2.0
    assert report.curves(tmp_path / "none.jsonl") == {}


PSNRS = [20.1, 20.4, 20.9]
ROWS = [StudyRow("a|b $\\x$ " + SCRIPT, [0, 1, 2], [{"psnr": value, "knn_top1": 0.5} for value in PSNRS]),
        StudyRow("one", [7], [{"psnr": 19.0}]),
        StudyRow("failed", [0, 1, 2], [{"psnr": 1.0}, {"psnr": 3.0}, {"psnr": math.nan}])]


def test_a_study_shows_means_and_sample_deviations():
    table = study_report.study_table(ROWS, ["psnr", "knn_top1"]).splitlines()
    assert table[0] == "|  | seeds | psnr (dB ↑) | knn_top1 (↑) |"
    assert table[2].endswith(f"| 3 | 20.47 ± {statistics.stdev(PSNRS):.2f} | 0.5000 ± 0.0000 |")
    assert table[2].startswith("| a\\|b")
    assert table[3] == "| one | 1 | 19.00 | - |"
    assert table[4] == "| failed | 3 | 2.000 ± 1.414 (2 of 3) | - |"  # a lost seed is seen
    content = json.loads(reporting.to_json(study_report.study_json(ROWS)))
    assert content[ROWS[0].name]["psnr"] == {"mean": statistics.fmean(PSNRS), "deviation": statistics.stdev(PSNRS),
                                             "values": {"0": 20.1, "1": 20.4, "2": 20.9}}
    assert content["one"] == {"psnr": {"mean": 19.0, "deviation": None, "values": {"7": 19.0}}}


def test_a_study_of_forty_rows_is_drawn_with_room_for_each(tmp_path):
    rows = [StudyRow(f"row_{i}", [0, 1], [{"psnr": float(i)}, {"psnr": i + 1.0}]) for i in range(40)]
    study_report.draw_study(tmp_path / "study.png", rows, ["psnr"])
    assert Image.open(tmp_path / "study.png").size[1] >= 40 * 25


def test_a_study_report_is_one_file(tmp_path):
    study_report.write_study_report(tmp_path / "study.html", title="Study", recipe=RECIPE, rows=ROWS,
                                    metrics=["psnr", "knn_top1"])
    page = Page(tmp_path / "study.html")
    assert "script" not in page.tags and "://" not in (tmp_path / "study.html").read_text(encoding="utf-8")
    assert len(page.decoded("image/svg+xml")) == len(page.pictures) == 1
    for row in ROWS:
        assert row.name in page.text
    assert "20.47 ± 0.40" in page.text and "2.000 ± 1.414 (2 of 3)" in page.text


def opened(page, profile) -> str:
    """What a browser makes of a page."""
    return subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
                           "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120).stdout


@pytest.fixture
def browser(tmp_path):
    (tmp_path / "probe.html").write_text("<script>document.write(6 * 7)</script>")
    if CHROMIUM is None or "42" not in opened(tmp_path / "probe.html", tmp_path / "profile"):
        pytest.skip("needs a Chromium that may read temporary files")
    return lambda page: opened(page, tmp_path / "profile")


@pytest.mark.parametrize("kind", ["report", "study"])
def test_a_browser_shows_all_pictures_and_nothing_overflows(tmp_path, browser, kind):
    name = "a_long_name_that_has_no_place_to_break_" * 3
    if kind == "report":
        recipe = {**RECIPE, "data": f"folder:/{name}"}
        report.write_report(tmp_path / "page.html", title=name, recipe=recipe, runs={
            name: run(failed={"rfid": name}, differing={name: name}), **{f"run {i}{SCRIPT}": run() for i in range(3)}})
    else:
        rows = [*ROWS, StudyRow(name, [0], [{}])]
        study_report.write_study_report(tmp_path / "page.html", title=name, recipe=RECIPE, rows=rows,
                                        metrics=[f"psnr{i}" for i in range(9)])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    # Without the policy that forbids them scripts in names would run, and with a listener errors are seen.
    page, policies = re.subn("<meta http-equiv=[^>]*>", "<script>errors = []; addEventListener('error', "
                             "event => errors.push(event.message || event.target.alt), true)</script>", page)
    assert policies == 1
    page = page.replace("<details>", "<details open>")
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{html.escape(page)}"></iframe>'
                     for width in (1200, 400))
    (tmp_path / "frames.html").write_text(f"""<!doctype html><meta charset="utf-8">{frames}<script>
        const look = ({{contentDocument: page, contentWindow: view}}) => ({{
            title: page.title, errors: view.errors, images: page.images.length, width: view.innerWidth,
            missing: [...page.images].filter(image => !image.complete || !image.naturalWidth).length,
            overflow: Math.max(0, page.documentElement.scrollWidth - page.documentElement.clientWidth)}});
        onload = () => document.body.textContent =
            "found" + JSON.stringify([...document.querySelectorAll("iframe")].map(look)) + "found";
        </script>""", encoding="utf-8")
    found = json.loads(html.unescape(browser(tmp_path / "frames.html").split("found")[1]))
    number = len(Page(tmp_path / "page.html").pictures)
    assert found == [{"title": name, "errors": [], "images": number, "width": width, "missing": 0, "overflow": 0}
                     for width in (1200, 400)]
