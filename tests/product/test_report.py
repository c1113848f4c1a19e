"""The page of `eval.py --report`: its numbers, its images, and what a browser makes of it."""

import base64
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from chromium import browser, window  # noqa: F401  a fixture
from conftest import PROCESS, ROOT, command
from PIL import Image

from zsseg.apps import report
from zsseg.config import Config, load_config
from zsseg.datasets import dataset
from zsseg.distributed import Process
from zsseg.metrics import confusion, summarize

HOSTILE = "</script><img src=x onerror=alert(1)>"
NAMES = ["sky", HOSTILE, "<!--<script>", "a & b"]


def own(*settings: str) -> Config:
    """A data set of the user's own, whose names are up to no good."""
    words = ["data.name=folder", "data.images=p/{split}/{id}.png", "data.labels=l/{split}/{id}.png"]
    return load_config(None, [*words, f"data.classes={json.dumps(NAMES)}", *settings])


def shown(numbers: Iterable[int], config: Config) -> report.Report:
    """A report that was shown random images, each a function of its number."""
    page = report.Report(config, PROCESS)
    C = len(page.data.names)
    ignore = page.data.ignore
    for number in numbers:
        rng = np.random.default_rng(number)
        image = torch.tensor(rng.integers(0, 256, (3, 48, 72), np.uint8))
        labels = torch.tensor(rng.choice([*range(C), ignore], (24, 36)))
        wrong = torch.tensor(rng.random((24, 36)) < rng.random()) | (labels == ignore)
        predicted = torch.tensor(rng.integers(0, C, (24, 36))).where(wrong, labels)
        matrix = confusion(labels, predicted, C, ignore)
        page(number, f"{number} {HOSTILE}", image, labels, predicted, matrix)
    return page


def read(file: Path) -> dict:
    """What a page knows, as its script reads it."""
    pattern = r'<script type="application/json" id="data">(.*?)</script>'
    return json.loads(re.search(pattern, file.read_text("utf-8")).group(1))


def written(page: report.Report, out: Path) -> dict:
    result = summarize(page.matrix, page.data) | {"images": 3}
    page.write(result, out / "run" / "last.pt", 7, out)
    return read(out / "report.html")


def test_the_worst_and_the_best_are_stored(monkeypatch, tmp_path):
    """In whatever order they come, by one process or by two; images without ground truth are not."""
    monkeypatch.setattr(report, "MAX_CARDS", 3)
    one = shown(range(12), own())
    assert [number for _, number, _ in one.cards] != [*range(6)] and len(one.cards) == 6
    assert one.cards == sorted(one.cards, key=lambda card: card[:2])
    assert shown(reversed(range(12)), own()).cards == one.cards
    ignored = torch.full((8, 8), one.data.ignore)
    one(99, "nothing", torch.zeros(3, 8, 8), ignored, ignored * 0, torch.zeros_like(one.matrix))
    assert len(one.cards) == 6
    expected = written(one, tmp_path)
    parts = [shown(range(rank, 12, 2), own()) for rank in (0, 1)]
    monkeypatch.setattr(Process, "gather", lambda self, cards: cards + parts[1].cards)
    monkeypatch.setattr(Process, "sum", lambda self, matrix: matrix + parts[1].matrix)
    found = written(parts[0], tmp_path)
    for key in ("worst", "best", "confusions"):
        assert found[key] == expected[key]


def test_confusions_are_those_of_counting_again():
    matrix = np.array([[50, 30, 0], [5, 20, 5], [0, 0, 0]])  # the third class is only predicted
    found = report.confusions(matrix)[:3]
    assert [row[:3] for row in found] == [[0, 1, 30], [1, 0, 5], [1, 2, 5]]
    gains = [100 * (80 - 50) / 85, 100 * 5 / 60, 100 * 5 / 60]
    assert [gain for *_, gain in found] == pytest.approx(gains)


def test_curves_of_a_run(tmp_path):
    """A line that a kill has cut is left out; of thousands of steps some are, but not the last."""
    file = tmp_path / "metrics.jsonl"
    assert not any(report.curves(file).values())
    lines = [json.dumps({"step": i, "loss": 10 / i}) for i in range(1, 2001)]
    file.write_text("\n".join([*lines, '{"step": 2000, "val/mIoU": 3.0}', '{"step": 3, "lo']))
    curves = report.curves(file)
    assert curves["loss"][0] == (2000, 0.005) and 400 < len(curves["loss"]) <= 600
    assert curves["val/mIoU"] == [(2000, 3.0)] and curves["val/hIoU"] == []


def test_the_command_writes_the_page(shapes_run, shapes_root, tmp_path):
    words = ("--root", shapes_root, "--device", "cpu", "--out", tmp_path, "--report")
    done = command("eval.py", shapes_run / "last.pt", *words)
    assert done.returncode == 0 and f"-> {tmp_path / 'report.html'}" in done.stdout, done.stderr
    one = read(tmp_path / "report.html")
    assert len(one["worst"]) == len(one["best"]) == 4
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert one["rows"][-1] == ["ensemble", [metrics[key] for key in one["keys"]]]
    assert one["per_class"] == [values["IoU"] for values in metrics["per_class"].values()]
    assert one["unseen"] == dataset("shapes").unseen and "4 images" in one["facts"][1]
    assert len(one["curves"]["loss"]) == 4 and one["curves"]["val/mIoU"]
    picture = base64.b64decode(one["worst"][0][2]["picture"])
    assert Image.open(io.BytesIO(picture)).format == "PNG"
    text = (tmp_path / "report.html").read_text("utf-8")
    assert not re.search(r"(?:src|href)=|url\(|@import|fetch\(|XMLHttp|innerHTML|eval\(", text)


@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_in_a_browser(browser, tmp_path, width):  # noqa: F811
    """Complete at each width; names are text; images in both orders."""
    (tmp_path / "run").mkdir()
    lines = [json.dumps({"step": i, "loss": 1.0, "val/mIoU": 10.0 * i}) for i in (1, 2)]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines))
    page = written(shown(range(3), own('data.unseen=["a & b"]')), tmp_path)
    with window(browser, width, dark=width == 360) as view:
        texts = lambda selector: view.locator(selector).all_inner_texts()
        view.goto((tmp_path / "report.html").as_uri())
        assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")
        back = view.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (back == "rgb(255, 255, 255)") == (width != 360)
        assert len(texts("section")) == 5 and view.locator("polyline").count() == 2
        assert texts("#metrics tr.main td") == [f"{v:.1f}" for v in page["rows"][-1][1]]
        assert sorted(texts(".bars li > span:first-child")) == sorted(NAMES)
        assert texts("#classes h3") == ["seen (3)", "unseen (1)"]
        assert view.locator("img[src=x], main script").count() == 0
        assert view.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert HOSTILE in texts(".card figcaption span")[0]
        scores = texts(".card strong")
        view.click("button:text('best first')")
        assert texts(".card strong") == scores[::-1] == sorted(scores, key=float)[::-1]


def test_many_classes_can_be_searched(browser, tmp_path):  # noqa: F811
    config = load_config(ROOT / "configs" / "ade20k.toml")
    written(shown(range(2), config), tmp_path)
    with window(browser) as view:
        view.goto((tmp_path / "report.html").as_uri())
        assert view.locator("#training").count() == 0
        view.fill("input[type=search]", "Plane")
        names = [name for name in dataset("ade20k").names if "plane" in name]
        assert view.locator(".bars li:visible").count() == len(names) > 0
