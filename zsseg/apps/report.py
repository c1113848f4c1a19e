"""An evaluation on one page that contains its images and fetches nothing: report.html."""

import base64
import bisect
import io
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zsseg.analysis import ROWS
from zsseg.config import Config
from zsseg.datasets import dataset
from zsseg.distributed import Process
from zsseg.files import result as written
from zsseg.log import read_lines
from zsseg.metrics import marginals, mean_iou, method, rows, split_keys
from zsseg.published import nearest
from zsseg.utils import first_of, git_commit
from zsseg.visualize import palette

TEMPLATE = Path(__file__).with_name("report.html")
MAX_CARDS = 16  # worst images, and as many best ones
MAX_EDGE = 320  # of an image on the page
MAX_CONFUSIONS = 12
MAX_POINTS = 600  # of a curve
# (title, whether its scale is logarithmic, {key in metrics.jsonl: name of its line})
CHARTS = [
    ("Loss of all layers", True, {"loss": "loss"}),
    ("Loss of the last layer", True, {"class": "class", "focal": "focal", "dice": "dice"}),
    (
        "Validation, percent",
        False,
        {
            "val/mIoU_seen": "seen",
            "val/mIoU_unseen": "unseen",
            "val/hIoU": "hIoU",
            "val/mIoU": "mIoU",
        },
    ),
    ("Learning rate", False, {"lr": "lr"}),
]


class Report:
    """The `on_image` of `evaluate`: the confusion matrix of all images, and the worst and the best
    of them, ready for the page.
    """

    def __init__(self, config: Config, process: Process):
        self.config = config
        self.process = process
        self.data = dataset(config.data)
        C = len(self.data.names)
        self.matrix = torch.zeros(C, C, dtype=torch.int64, device=process.device)
        self.cards: list[tuple[float, int, dict]] = []  # (score, number, what is shown), sorted

    def __call__(
        self,
        number: int,
        name: str,
        image: Tensor,
        labels: Tensor,
        predicted: Tensor,
        matrix: Tensor,
    ) -> None:
        """See `evaluate`. An image's score is the mean IoU of the classes in its ground truth;
        without any, it is left out.
        """
        self.matrix += matrix
        hits, gt, pred = marginals(matrix.cpu().numpy())
        if not gt.any():
            return
        iou = 100 * hits / np.maximum(gt + pred - hits, 1)
        score = float(iou[gt > 0].mean())
        index = bisect.bisect(self.cards, (score, number))
        if len(self.cards) == 2 * MAX_CARDS and index == MAX_CARDS:
            return  # neither among the worst nor among the best

        # The most frequent ones first; a palette has 255 colours besides "no label".
        order = np.argsort(-gt - pred, kind="stable")
        classes = order[(gt + pred)[order] > 0][:255].tolist()
        valid = labels != self.data.ignore
        maps = (m.where(valid, -1).cpu().numpy() for m in (labels, predicted))
        gt_map, predicted_map = (map_uri(m, classes, len(gt)) for m in maps)
        card = {
            "name": name,
            "score": score,
            "image": image_uri(image),
            "gt": gt_map,
            "prediction": predicted_map,
            "classes": [[c, float(iou[c]) if gt[c] else None] for c in classes],
        }
        self.cards.insert(index, (score, number, card))
        del self.cards[MAX_CARDS:-MAX_CARDS]

    def gather(self) -> None:
        """Bring what all processes were shown to the first one."""
        self.process.sum(self.matrix)
        self.cards = sorted(self.process.gather(self.cards))
        del self.cards[MAX_CARDS:-MAX_CARDS]

    def write(self, result: dict, checkpoint: str, step: int | None, out: Path) -> None:
        """Write OUT/report.html, on the first process, about the metrics `result` of a checkpoint
        saved after `step` (None: the configured one).

        It also shows OUT/budget.json, where that belongs to these metrics, and the metrics.jsonl
        beside the checkpoint.
        """
        self.gather()
        if not self.process.is_main:
            return
        checkpoint = Path(checkpoint)
        config, data = self.config, self.data
        matrix = self.matrix.cpu().numpy()
        keys, parts = rows(result, method(config))
        page = {
            "name": "/".join(checkpoint.absolute().parts[-2:]),
            "overview": overview(config, result, step or config.train.steps),
            "config": asdict(config),
            "classes": data.names,
            "seen": data.seen,
            "pixels": matrix.sum(1).tolist(),
            "colours": ["#" + bytes(colour).hex() for colour in palette(len(data.names))[:-1]],
            "per_class": [[v["IoU"], v["Acc"]] for v in result["per_class"].values()],
            "metrics": metric_rows(keys, parts),
            "published": nearest(result, config),
            "clip_on_gt": result.get("clip_true_masks"),
            "confusions": confusions(matrix),
            "analysis": read_analysis(out / "budget.json", checkpoint, result),
            "curves": curves(checkpoint.parent / "metrics.jsonl"),
            "images": [card for _, _, card in self.cards],
            "max_cards": MAX_CARDS,
        }
        # So that no name can end the script block.
        text = json.dumps(page, allow_nan=False).replace("<", "\\u003c")
        with written(out / "report.html") as file:
            file.write_text(TEMPLATE.read_text("utf-8").replace("{{data}}", text), "utf-8")
        print(f"-> {out / 'report.html'}")


def metric_rows(keys: list[str], parts: list[tuple[str, dict]]) -> dict:
    return {"keys": keys, "rows": [[title, {k: part[k] for k in keys}] for title, part in parts]}


def data_uri(image: Image.Image, file_format: str, **options: object) -> str:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    content = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{file_format.lower()};base64,{content}"


def image_uri(image: Tensor) -> str:
    """uint8 [3, h, w] as a small JPEG."""
    small = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    small.thumbnail((MAX_EDGE, MAX_EDGE))
    return data_uri(small, "JPEG", quality=85)


def map_uri(labels: np.ndarray, classes: list[int], count: int) -> str:
    """Class ids [H, W] of `count` classes as a small PNG: `classes` in their colours, the others,
    and -1, transparent.
    """
    index = np.zeros(count + 1, np.uint8)  # the last is that of -1
    index[classes] = np.arange(1, len(classes) + 1)
    small = Image.fromarray(index[labels])
    small.putpalette(palette(count)[[-1, *classes]].tobytes())
    small.thumbnail((MAX_EDGE, MAX_EDGE), Image.Resampling.NEAREST)
    return data_uri(small, "PNG", transparency=0)


def overview(config: Config, result: dict, step: int) -> list[tuple[str, str]]:
    """What the head of the page says of the evaluation; empty values are left out."""
    data, model, clip = config.data, config.model, config.clip
    commit, dash, dirty = git_commit().partition("-")
    training = f"{step:,} steps of {config.train.batch_size} images"
    values = {
        "data": f"{data.name}, {data.split} split",
        "images": f"{result['images']:,}",
        "speed": f"{result['images_per_second']:.2f} images/s",
        "commit": commit[:12] + dash + dirty,
        "backbone": model.backbone,
        "trained on": f"{data.train_on} classes, {training}",
    }
    if model.class_head == "text":
        values["CLIP"] = clip.weights
        for name, prompt in (
            ("prompt", clip.prompt),
            ("prompt of the regions", clip.region_prompt),
        ):
            values[name] = prompt if isinstance(prompt, str) else first_of(prompt, 1)
        weight = f"{clip.ensemble_weight:g}"
        values["ensemble weight"] = weight if clip.ensemble else "no ensemble"
    return [(name, value) for name, value in values.items() if value]


def miou_gain(matrix: np.ndarray) -> np.ndarray:
    """By how many points mIoU would rise if the pixels of class i that are taken for j were right:
    [C, C].
    """
    hits, gt, predicted = marginals(matrix)
    before = mean_iou(hits, gt, predicted)
    gain = np.zeros(matrix.shape)
    one_hot = np.eye(len(matrix), dtype=matrix.dtype)
    errors = matrix - np.diag(hits)
    for i, j in np.argwhere(errors):
        added, removed = errors[i, j] * one_hot[[i, j]]
        gain[i, j] = mean_iou(hits + added, gt, predicted + added - removed) - before
    return gain


def confusions(matrix: np.ndarray) -> list[tuple]:
    """The confusions that cost most: (class, taken for, pixels, their share of the class in
    percent, points of mIoU).
    """
    gain = miou_gain(matrix)
    worst = np.argsort(-gain, axis=None, kind="stable")[:MAX_CONFUSIONS].tolist()
    pairs = [divmod(k, len(matrix)) for k in worst]
    return [
        (i, j, int(matrix[i, j]), float(100 * matrix[i, j] / matrix[i].sum()), float(gain[i, j]))
        for i, j in pairs
        if gain[i, j] > 0
    ]


def read_analysis(file: Path, checkpoint: Path, result: dict) -> dict | None:
    """What `eval.py --budget` wrote, with titles of its rows; None unless it belongs to these
    metrics.
    """
    try:
        if file.stat().st_mtime < checkpoint.stat().st_mtime:
            return None
        analysis = json.loads(file.read_text("utf-8"))
        base = analysis["as_is"]
        if base["per_class"].keys() != result["per_class"].keys():
            return None
        if abs((base["mIoU"] or 0) - (result["mIoU"] or 0)) > 0.1:
            return None
        parts = [(title, analysis[row]) for row, title in ROWS.items()]
        return analysis | metric_rows(split_keys(result), parts)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def curves(file: Path) -> list[dict]:
    """The charts of what a run logged; a line has at most MAX_POINTS (step, value). What is broken,
    NaN or infinite is left out.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for line in read_lines(file):
        for key, value in line.items():
            if isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(key, []).append((line["step"], value))
    charts = []
    for title, log, names in CHARTS:
        lines = [
            [name, downsample(series[key])]
            for key, name in names.items()
            if len(series.get(key, ())) > 1
        ]
        if lines:
            charts.append({"title": title, "log": log, "lines": lines})
    return charts


def downsample(points: list[tuple[float, float]]) -> list[list[float]]:
    """Means of neighbours, so that at most MAX_POINTS are left."""
    parts = np.array_split(np.array(points), min(MAX_POINTS, len(points)))
    return [[float(f"{v:.6g}") for v in part.mean(0)] for part in parts]
