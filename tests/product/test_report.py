"""The page of `eval.py --report`: its numbers, its images, what it refuses to show, and in a
browser that clicks it.
"""

import base64
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import PROCESS, ROOT, command, tiny_config
from PIL import Image

import eval as evaluation
import train
from zsseg.apps import report
from zsseg.config import Config, load_config
from zsseg.datasets import dataset, find_pairs
from zsseg.distributed import Process
from zsseg.images import read_values
from zsseg.metrics import confusion, summarize
from zsseg.visualize import palette

HOSTILE = "</script><img src=x onerror=alert(1)>"
NAMES = ["sky", HOSTILE, "<!--<script>", "a & b"]


def read(page: Path) -> dict:
    """What a page knows, as its script reads it."""
    return json.loads(
        re.search(
            r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8")
        ).group(1)
    )


def shown(images: Iterator[int], config: Config) -> report.Report:
    """A report that was shown random images, each a function of its number."""
    data, page = dataset(config.data), report.Report(config, PROCESS)
    C, ignore = len(data.names), data.ignore
    for number in images:
        rng = np.random.default_rng(number)
        labels = rng.choice([*range(C), ignore], (24, 36))
        predicted = np.where(
            rng.random((24, 36)) < rng.random(), labels.clip(0, C - 1), rng.integers(0, C, (24, 36))
        )
        image, labels, predicted = (
            rng.integers(0, 256, (3, 48, 72), np.uint8),
            torch.tensor(labels),
            torch.tensor(predicted),
        )
        page(
            number,
            f"{number} {HOSTILE}",
            torch.tensor(image),
            labels,
            predicted,
            confusion(labels, predicted, C, ignore),
        )
    return page


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def written(page: report.Report, out: Path, checkpoint: Path | None = None) -> dict:
    result = summarize(page.matrix, page.data) | {
        "images": len(page.cards),
        "images_per_second": 1.5,
    }
    page.write(result, str(checkpoint or out / HOSTILE.replace("/", "") / "last.pt"), 7, out)
    return read(out / "report.html")


def own(*settings: str) -> Config:
    """A data set of the user's own, whose names are up to no good."""
    words = ["data.name=folder", "data.images=p/{split}/{id}.png", "data.labels=l/{split}/{id}.png"]
    return load_config(None, [*words, f"data.classes={json.dumps(NAMES)}", *settings])


@pytest.fixture(scope="module")
def trained(shapes_root, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train.train(tiny_config("train.steps=3", "train.eval_every=1"), shapes_root, out, PROCESS, {})
    return out


@pytest.fixture(scope="module")
def made(trained, shapes_root, tmp_path_factory) -> Path:
    """A report with an error budget."""
    out = tmp_path_factory.mktemp("out")
    evaluation.main(
        [
            str(trained / "last.pt"),
            "--root",
            str(shapes_root),
            "--out",
            str(out),
            "--budget",
            "--report",
        ]
    )
    return out


def test_gains_are_those_of_counting_again():
    """Every pair, with a class that is nowhere and one that is only predicted, and vanishes when
    that is put right.
    """
    rng, data = (
        np.random.default_rng(0),
        dataset(own('data.classes=["a","b","c","d","e","f"]').data),
    )
    matrix = rng.integers(0, 50, (6, 6)) * (rng.random((6, 6)) < 0.7)
    matrix[4], matrix[5], matrix[:, 4], matrix[:, 5] = 0, 0, 0, 0
    matrix[1, 5] = 9
    before, gains = summarize(torch.from_numpy(matrix), data)["mIoU"], report.miou_gain(matrix)
    for i, j in np.ndindex(6, 6):
        right = matrix.copy()
        right[i, j], right[i, i] = (
            0 if i != j else matrix[i, i],
            matrix[i, i] + (matrix[i, j] if i != j else 0),
        )
        assert gains[i, j] == pytest.approx(
            summarize(torch.from_numpy(right), data)["mIoU"] - before, abs=1e-9
        ), (i, j)
    i, j, pixels, share, gain = report.confusions(matrix)[0]
    assert (
        gain == gains.max() == gains[i, j]
        and pixels == matrix[i, j]
        and share == 100 * pixels / matrix[i].sum()
    )
    assert report.confusions(np.diag([3, 4])) == []


def test_the_worst_and_the_best_are_kept(monkeypatch):
    """In whatever order they come, by one process or by two; equal scores by their number."""
    config = own()
    every = shown(range(12), config).cards
    assert every == sorted(every, key=lambda card: card[:2]) and len(every) == 12
    monkeypatch.setattr(report, "MAX_CARDS", 3)
    expected = every[:3] + every[-3:]
    assert shown(range(12), config).cards == shown(reversed(range(12)), config).cards == expected
    parts = [shown(range(rank, 12, 2), config) for rank in (0, 1)]
    monkeypatch.setattr(Process, "gather", lambda self, cards: cards + parts[1].cards)
    parts[0].gather()
    assert parts[0].cards == expected
    assert torch.equal(parts[0].matrix + parts[1].matrix, shown(range(12), config).matrix)
    page, ignored = shown([5], config), torch.full((8, 8), 255)
    page(
        4,
        "nothing",
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        ignored,
        ignored,
        torch.zeros(4, 4, dtype=torch.int64),
    )
    assert [number for _, number, _ in page.cards] == [5]


def test_a_card_shows_its_maps():
    page = shown([3], own('data.unseen=["sky"]'))
    (score, _, card), matrix = page.cards[0], page.matrix.numpy()
    iou = 100 * matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())
    assert score == pytest.approx(iou.mean()) and dict(card["classes"]) == pytest.approx(
        dict(enumerate(iou))
    )
    images = {k: decoded(card[k]) for k in ("image", "gt", "prediction")}
    assert (
        images["image"].size == (72, 48)
        and images["image"].format == "JPEG"
        and images["gt"].mode == "P"
    )
    labels = np.random.default_rng(3).choice([0, 1, 2, 3, 255], (24, 36))
    truth, known = np.array(images["gt"].convert("RGBA")), labels != 255
    assert (truth[..., 3] == 255 * known).all() and (
        truth[known][:, :3] == palette(4)[labels[known]]
    ).all()
    assert (np.array(images["prediction"].convert("RGBA"))[..., 3] == 255 * known).all()
    assert decoded(report.image_uri(torch.zeros(3, 40, 1000, dtype=torch.uint8))).size == (320, 13)


def test_more_classes_than_a_palette_holds():
    labels = torch.arange(800).repeat_interleave(2).view(40, 40)
    page = report.Report(load_config(str(ROOT / "configs" / "ade20k_full.toml")), PROCESS)
    page(
        0,
        "all",
        torch.zeros(3, 40, 40, dtype=torch.uint8),
        labels,
        labels,
        confusion(labels, labels, 847, 65535),
    )
    truth = np.array(decoded(page.cards[0][2]["gt"]).convert("RGBA"))
    assert (truth[..., 3] > 0).sum() == 2 * 255 and page.cards[0][0] == 100


def test_curves_leave_out_what_is_broken(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert report.curves(file) == []
    lines = [
        {"step": i, "loss": 10 / i, "class": 1.0, "class/layer_0": 5.0, "lr": 1e-3, "speed/x": 1}
        for i in range(1, 2001)
    ]
    broken = [
        '{"step": 3, "lo',
        "[1, 2]",
        "7",
        '{"loss": 3}',
        '{"step": "x", "loss": 1}',
        '{"step": 5, "loss": NaN}',
        '{"step": 5, "loss": "high"}',
        '{"step": 6, "skipped": 1, "images": ["a"]}',
        "\x00",
    ]
    file.write_text(
        "\n".join([*broken, *map(json.dumps, lines), '{"step": 2000, "val/mIoU": 3.0}'])
    )
    charts = report.curves(file)
    assert [(c["title"], [name for name, _ in c["lines"]]) for c in charts] == [
        ("Loss of all layers", ["loss"]),
        ("Loss of the last layer", ["class"]),
        ("Learning rate", ["lr"]),
    ]
    line = charts[0]["lines"][0][1]
    assert len(line) == 600 and line[0] == pytest.approx(
        [2.5, np.mean([10, 5, 10 / 3, 2.5])], rel=1e-5
    )
    assert line == sorted(line) and line[-1][0] > 1997


def test_a_budget_of_something_else_is_not_shown(made, trained, tmp_path):
    """Older than the checkpoint, of other numbers, broken, or none."""
    result, checkpoint, file = (
        json.loads((made / "metrics.json").read_text()),
        trained / "last.pt",
        tmp_path / "budget.json",
    )
    assert report.read_analysis(file, checkpoint, result) is None
    file.write_text((made / "budget.json").read_text())
    assert report.read_analysis(file, checkpoint, result)["rows"][0][1]["mIoU"] == result["mIoU"]
    assert report.read_analysis(file, checkpoint, result | {"mIoU": result["mIoU"] + 1}) is None
    assert report.read_analysis(file, checkpoint, result | {"per_class": {}}) is None
    os.utime(file, (0, 0))
    assert report.read_analysis(file, checkpoint, result) is None
    for text in ("{", "[]", "{}", '{"as_is": 3}'):
        file.write_text(text)
        assert report.read_analysis(file, checkpoint, result) is None


def test_the_command_writes_the_same_page_with_two_processes(made, trained, shapes_root, tmp_path):
    words = [
        trained / "last.pt",
        "--root",
        shapes_root,
        "--device",
        "cpu",
        "--out",
        tmp_path,
        "--report",
    ]
    result = command("eval.py", *words, processes=2, env={"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0 and f"-> {tmp_path / 'report.html'}" in result.stdout, (
        result.stderr
    )
    one, two = read(made / "report.html"), read(tmp_path / "report.html")
    assert one.pop("analysis")["masks"] > 0 and two.pop("analysis") is None
    one["overview"], two["overview"] = (
        [item for item in page["overview"] if item[0] != "speed"] for page in (one, two)
    )
    assert one == two and len(one["images"]) == 4 and one["published"] is None
    metrics = json.loads((made / "metrics.json").read_text())
    assert [name for name, _ in one["metrics"]["rows"]] == [
        "MaskFormer only",
        "CLIP only",
        "CLIP x objectness",
        "ensemble",
    ]
    assert one["metrics"]["rows"][-1][1] == {k: metrics[k] for k in one["metrics"]["keys"]}
    assert one["per_class"] == [[v["IoU"], v["Acc"]] for v in metrics["per_class"].values()]
    assert one["clip_on_gt"] == metrics["clip_true_masks"] and one["seen"] == dataset("shapes").seen
    assert dict(one["overview"])["trained on"] == "seen classes, 3 steps of 4 images"
    data = dataset("shapes")
    labels = [
        read_values(label, 8)
        for _, label in find_pairs("shapes", shapes_root, tiny_config().data.split)
    ]
    truth = np.bincount(
        np.concatenate([data.lut()[values].ravel() for values in labels]), minlength=256
    )
    assert one["pixels"] == truth[:25].tolist()
    assert one["colours"] == ["#" + bytes(colour.tolist()).hex() for colour in palette(25)[:-1]]
    assert [chart["title"] for chart in one["curves"]] == [title for title, *_ in report.CHARTS]
    assert (
        dict(one["curves"][0]["lines"])["loss"][-1][0] == 3 and len(one["curves"][2]["lines"]) == 4
    )
    text = (made / "report.html").read_text()
    assert len(text) < 10e6 and not re.search(
        r"(?:src|href)=|url\(|@import|fetch\(|XMLHttp|innerHTML|eval\(", text
    )


def test_the_paper_stands_beside_its_data_set_only(tmp_path):
    config = load_config(str(ROOT / "configs" / "voc_r101c.toml"), ["clip.ensemble_weight=0.5"])
    page = written(shown(range(3), config), tmp_path)
    assert page["published"]["values"] == {
        "pAcc": 90.0,
        "mIoU_seen": 83.5,
        "mIoU_unseen": 72.5,
        "hIoU": 77.5,
    }
    assert (
        page["published"]["differing"] == ["clip.ensemble_weight: 0.5 (0.7)"]
        and ["CLIP", "ViT-B/16"] in page["overview"]
    )
    supervised = own("model.class_head=linear", "clip.ensemble=false", "data.train_on=all")
    page = written(shown(range(3), supervised), tmp_path)
    assert (
        page["published"] is None
        and page["seen"] == []
        and page["metrics"]["rows"][0][0] == "MaskFormer only"
    )
    assert "mAcc" in page["metrics"]["keys"] and not {"CLIP", "prompt"} & {
        name for name, _ in page["overview"]
    }


# --- in a browser


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium")
    with Browser() as chromium:
        yield chromium
        assert chromium.complaints() == []


OPACITY = "getComputedStyle(document.querySelector('.map')).opacity"
SCORES = "[...document.querySelectorAll('.card strong')].map(node => Number(node.textContent))"
SECTIONS = "[...document.querySelectorAll('section')].map(node => node.id)"


@pytest.mark.parametrize("width", [1280, 390, 360])
def test_the_page_fits_and_is_complete(browser, made, width):
    browser.open(made / "report.html", width, dark=width == 360)
    assert (
        browser.value("document.documentElement.scrollWidth")
        <= browser.value("window.innerWidth")
        == width
    )
    assert browser.value(SECTIONS) == [
        "metrics",
        "classes",
        "confusions",
        "budget",
        "training",
        "gallery",
    ]
    metrics = json.loads((made / "metrics.json").read_text())
    row = browser.value(
        "[...document.querySelectorAll('#metrics tr.main > *')].map(node => node.textContent)"
    )
    assert row == [
        "ensemble",
        *(f"{metrics[k]:.1f}" for k in ("mIoU_seen", "mIoU_unseen", "hIoU", "mIoU", "pAcc")),
    ]
    data, texts = (
        dataset("shapes"),
        "[...document.querySelectorAll('#classes %s')].map(node => node.textContent)",
    )
    bars = dict(
        zip(
            browser.value(texts % "li > span:first-child"),
            browser.value(texts % "li > b"),
            strict=True,
        )
    )
    assert bars == {
        k: "–" if v["IoU"] is None else f"{v['IoU']:.1f}" for k, v in metrics["per_class"].items()
    }
    assert browser.value(texts % "h3") == ["seen (20)", "unseen (5)"]
    tagged = (
        "[...document.querySelectorAll('#confusions .class, .card .class')].map(n => "
        "n.lastChild.textContent)"
    )
    assert all(
        name.endswith(" unseen") == (name.removesuffix(" unseen") in data.unseen)
        for name in browser.value(tagged)
    )
    assert {name.removesuffix(" unseen") for name in browser.value(tagged)} & set(data.unseen)
    hint = browser.value("document.querySelector('#classes li').title")
    accuracy = metrics["per_class"][next(iter(bars))]["Acc"]
    assert hint.startswith(f"{next(iter(bars))}: accuracy {accuracy:.1f}, ")
    assert browser.value("document.querySelectorAll('#training polyline').length") == 9
    assert browser.value(
        "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
    )
    assert (
        browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    ) == (width != 360)
    assert browser.value(
        "[...document.querySelectorAll('input')].every(input => input.labels.length)"
    )


def test_the_controls_do_what_they_say(browser, made):
    browser.open(made / "report.html")
    scores = browser.value(SCORES)
    assert scores == sorted(scores) and len(set(scores)) > 1
    browser.click("input[value=best]")
    assert browser.value(SCORES) == scores[::-1]
    # A group of radio buttons is one stop of the Tab key, the arrows choose.
    browser.press("ArrowLeft")
    assert browser.value(SCORES) == scores
    assert browser.value(OPACITY) == "0.6"
    browser.click("#opacity", 0.02)
    assert browser.value(OPACITY) == "0"
    browser.click("#opacity", 0.98)
    browser.press("ArrowLeft")
    assert (
        browser.value(OPACITY) == "0.99"
        and browser.value("document.querySelector('output').textContent") == " 99%"
    )
    visible = (
        "['truth', 'prediction'].filter(kind => "
        "document.querySelector(`.view.${kind}`).offsetWidth > 0)"
    )
    for value, kinds in (
        ("truth", ["truth"]),
        ("prediction", ["prediction"]),
        ("both", ["truth", "prediction"]),
    ):
        browser.click(f"input[value={value}]")
        assert browser.value(visible) == kinds
    browser.click("summary")
    assert browser.value(
        "document.querySelector('.settings').innerText.includes('ensemble_weight')"
    )
    browser.click("nav a:last-child")
    assert browser.value("location.hash") == "#gallery"


def test_names_are_text(browser, tmp_path):
    """Of classes, images and checkpoints. Curves that never change are drawn; what has no data
    has no section.
    """
    run = tmp_path / HOSTILE.replace("/", "")
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, "loss": 1.0, "lr": 0}) + "\n" for i in (1, 2))
    )
    written(shown(range(3), own('data.unseen=["a & b"]')), tmp_path)
    browser.open(tmp_path / "report.html", 390)
    assert browser.value("document.querySelectorAll('img[src=x], main script').length") == 0
    assert (
        browser.value("document.querySelector('h1').textContent")
        == f"{HOSTILE.replace('/', '')}/last.pt"
    )
    assert browser.value("document.querySelector('.card figcaption span').textContent").endswith(
        f" {HOSTILE}"
    )
    names = browser.value(
        "[...document.querySelectorAll('#classes .bars li > span:first-child')].map(n => "
        "n.textContent)"
    )
    assert sorted(names) == sorted(NAMES)
    assert browser.value(SECTIONS) == ["metrics", "classes", "confusions", "training", "gallery"]
    assert browser.value("document.documentElement.scrollWidth") <= 390


def test_many_classes_can_be_searched(browser, tmp_path):
    written(shown(range(2), load_config(str(ROOT / "configs" / "ade20k.toml"))), tmp_path)
    browser.open(tmp_path / "report.html")
    count = "[...document.querySelectorAll('#classes li')].filter(item => item.offsetHeight).length"
    assert browser.value(count) == 40 and "training" not in browser.value(SECTIONS)
    browser.click("input[type=search]")
    browser.call("Input.insertText", text="Plane")
    names = [name for name in dataset("ade20k").names if "plane" in name]
    assert browser.value(count) == len(names) > 0
    browser.open(tmp_path / "report.html")
    browser.click("#classes button")
    assert browser.value(count) == 150
