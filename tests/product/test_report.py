"""The page of `eval.py --report`: its numbers, its images, and what a browser makes of it."""

import base64
import io
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from chromium import browser, window  # noqa: F401  a fixture
from conftest import PROCESS, succeed
from PIL import Image

from zsseg.apps import report
from zsseg.config import load_config
from zsseg.datasets import dataset
from zsseg.distributed import Process
from zsseg.metrics import confusion, summarize

HOSTILE = "</script><img src=x onerror=alert(1)>"
NAMES = ["sky", HOSTILE, "<!--<script>", "a & b"]
MANY = [f"plane {i}" for i in range(50)]
BOX = "all => all.map(e => e.getBoundingClientRect()).map(b => [b.left, b.top, b.right, b.bottom])"
LOOK = """["body", "section", "h2", "button"].map(e => getComputedStyle(document.querySelector(e)))
    .map(s => [s.background, s.color, s.border, s.borderRadius, s.fontFamily, s.fontSize])"""


def shown(numbers: Iterable[int], names: list[str] = NAMES) -> report.Report:
    """A report that was shown random images, each a function of its number, every second one tall,
    of a data set of the user's own.
    """
    words = ["data.name=folder", "data.images=p/{split}/{id}.png", "data.labels=l/{split}/{id}.png"]
    words += [f"data.classes={json.dumps(names)}", f"data.unseen={json.dumps(names[3:4])}"]
    page = report.Report(load_config(None, words), PROCESS)
    C = len(names)
    for number in numbers:
        rng = np.random.default_rng(number)
        image = torch.tensor(rng.integers(0, 256, (3, 48 * 15 ** (number % 2), 72), np.uint8))
        labels = torch.tensor(rng.choice([*range(C), 255], (24, 36)))
        wrong = torch.tensor(rng.random((24, 36)) < rng.random()) | (labels == 255)
        predicted = torch.tensor(rng.integers(0, C, (24, 36))).where(wrong, labels)
        matrix = confusion(labels, predicted, C, 255)
        page(number, f"{number} {HOSTILE}", image, labels, predicted, matrix)
    return page


def read(out: Path) -> dict:
    """What a page knows, as its script reads it."""
    pattern = r'<script type="application/json" id="data">(.*?)</script>'
    return json.loads(re.search(pattern, (out / "report.html").read_text("utf-8")).group(1))


def written(page: report.Report, out: Path) -> dict:
    result = summarize(page.matrix, page.data) | {"images": 3}
    page.write(result, out / "run" / "last.pt", 7, out)
    return read(out)


def test_the_worst_and_the_best_are_stored(monkeypatch, tmp_path):
    """In whatever order they come, by one process or by two; images without ground truth are not."""
    monkeypatch.setattr(report, "MAX_CARDS", 3)
    one = shown(range(12))
    assert one.cards == shown(reversed(range(12))).cards and len(one.cards) == 6
    ignored = torch.full((8, 8), 255)
    one(99, "nothing", torch.zeros(3, 8, 8), ignored, ignored * 0, torch.zeros_like(one.matrix))
    expected = written(one, tmp_path)
    scores = [score for score, *_ in expected["worst"] + expected["best"]]
    assert scores == sorted(scores) and len(scores) == 6
    parts = [shown(range(rank, 12, 2)) for rank in (0, 1)]
    monkeypatch.setattr(Process, "gather", lambda self, cards: cards + parts[1].cards)
    monkeypatch.setattr(Process, "sum", lambda self, matrix: matrix + parts[1].matrix)
    found = written(parts[0], tmp_path)
    assert all(found[key] == expected[key] for key in ("worst", "best", "confusions"))


def test_confusions_are_those_of_counting_again():
    matrix = np.array([[50, 30, 0], [5, 20, 5], [0, 0, 0]])  # the third class is only predicted
    found = report.confusions(matrix)[:3]
    assert [row[:3] for row in found] == [[0, 1, 30], [1, 0, 5], [1, 2, 5]]
    assert [row[3] for row in found] == pytest.approx([100 * 30 / 85, 100 * 5 / 60, 100 * 5 / 60])


def test_the_command_writes_the_page(shapes_run, shapes_root, tmp_path):
    words = ("--root", shapes_root, "--device", "cpu", "--out", tmp_path, "--report")
    done = succeed("eval.py", shapes_run / "last.pt", *words)
    assert f"-> {tmp_path / 'report.html'}" in done.stdout
    one = read(tmp_path)
    assert len(one["worst"]) == len(one["best"]) == 4
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert one["rows"][-1] == ["as configured", [metrics[key] for key in one["keys"]]]
    assert one["per_class"] == [values["IoU"] for values in metrics["per_class"].values()]
    assert one["unseen"] == dataset("shapes").unseen and "4 images" in one["facts"][1]
    assert len(one["curves"]["loss"]) == 4 and one["curves"]["val/mIoU"]
    assert Image.open(io.BytesIO(base64.b64decode(one["worst"][0][2]["picture"]))).format == "PNG"
    text = (tmp_path / "report.html").read_text("utf-8")
    assert not re.search(r"(?:src|href)=|url\(|@import|fetch\(|XMLHttp|innerHTML|eval\(", text)


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_the_page_in_a_browser(browser, tmp_path, width, height):  # noqa: F811
    """Complete and in serve.html's look at each size; names are text; many classes are searched."""
    (tmp_path / "run").mkdir()
    lines = [json.dumps({"step": i, "loss": 1.0, "val/mIoU": 10.0 * i}) for i in range(1, 2001)]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "lo']))
    page = written(shown(range(3)), tmp_path)
    loss = page["curves"]["loss"]  # a kill has cut a line, and most of thousands are left out
    assert loss[0] == [2000, 1.0] and 400 < len(loss) <= 600
    with window(browser, width, dark=width == 390) as view:
        view.set_viewport_size({"width": width, "height": height})
        texts = lambda selector: view.locator(selector).all_inner_texts()
        boxes = lambda selector: view.locator(selector).evaluate_all(BOX)
        view.goto(report.TEMPLATE.with_name("serve.html").as_uri())
        look = view.evaluate(LOOK)
        view.goto((tmp_path / "report.html").as_uri())
        assert view.evaluate(LOOK) == look
        assert view.evaluate("document.documentElement.scrollWidth") == width
        for a, b in itertools.combinations(boxes("body :not(:has(*), svg *, .legend *)"), 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)
        assert (gains := texts("#confusions td:nth-child(2)")) == sorted(gains, key=float)[::-1]
        assert all(box[2] <= width for box in boxes("#confusions td:nth-child(2), .bars b, img"))
        assert len(texts("section")) == 5 and view.locator("polyline").count() == 2
        assert texts("#metrics tr.main td") == [f"{v:.1f}" for v in page["rows"][-1][1]]
        assert sorted(texts(".bars li > span:first-child")) == sorted(NAMES)
        assert texts("#classes h3") == ["seen (3)", "unseen (1)"]
        third = "i => Math.abs(i.width * i.naturalHeight / i.height / i.naturalWidth - 3) < 0.1"
        assert view.evaluate(f"[...document.images].every({third})")
        assert not texts("img[src=x], main script") and HOSTILE in texts(".title")[0]
        scores = texts(".card strong")
        view.click("button:text('best first')")
        assert texts(".card strong") == scores[::-1] == sorted(scores, key=float)[::-1]
        written(shown(range(2), MANY), tmp_path)
        view.reload()
        assert max(bottom - top for _, top, _, bottom in boxes(".card")) <= height / 2
        view.fill("input[type=search]", "Plane 4")
        assert view.locator(".bars li:visible").count() == 11
