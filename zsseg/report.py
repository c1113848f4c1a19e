"""An evaluation on one page that holds its images and fetches nothing: report.html."""

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
from zsseg.metrics import method, rows
from zsseg.published import nearest
from zsseg.utils import git_commit
from zsseg.visualize import palette

TEMPLATE = Path(__file__).with_name("report.html")
KEPT = 16  # worst images, and as many best ones
EDGE = 320  # longest, of an image on the page
TOP = 12  # confusions
POINTS = 600  # of a curve, at most
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
    ("Learning rate", False, {"lr": "rate"}),
]


class Report:
    """What `evaluate` shows: the confusion matrix of all images, and the worst and the best of
    them, ready for the page.
    """

    def __init__(self, config: Config, process: Process):
        self.config, self.process, self.data = config, process, dataset(config.data)
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
        """See `evaluate`. An image's score is the mean IoU of the classes in its truth; without
        any, it is left out.
        """
        self.matrix += matrix
        counts = matrix.cpu().numpy()
        truth, found = counts.sum(1), counts.sum(0)
        if not (there := truth > 0).any():
            return
        iou = 100 * counts.diagonal() / np.maximum(truth + found - counts.diagonal(), 1)
        score = float(iou[there].mean())
        place = bisect.bisect(self.cards, (score, number))
        if len(self.cards) == 2 * KEPT and place == KEPT:
            return  # neither among the worst nor among the best
        # The most frequent ones first; a palette has 255 colours besides "no label".
        classes = [
            int(c) for c in np.argsort(-truth - found, kind="stable") if truth[c] + found[c]
        ][:255]
        known = labels != self.data.ignore
        maps = [
            map_uri(m.where(known, -1).cpu().numpy(), classes, len(truth))
            for m in (labels, predicted)
        ]
        card = {
            "name": name,
            "score": score,
            "image": image_uri(image),
            "truth": maps[0],
            "prediction": maps[1],
            "classes": [[c, float(iou[c]) if there[c] else None] for c in classes],
        }
        self.cards = ends([*self.cards[:place], (score, number, card), *self.cards[place:]])

    def gather(self) -> None:
        """Bring what all processes were shown to the first one."""
        self.process.sum(self.matrix)
        self.cards = ends(sorted(self.process.gather(self.cards)))

    def write(self, result: dict, checkpoint: str, step: int | None, out: Path) -> None:
        """Write OUT/report.html about the metrics `result` of a checkpoint saved after `step`
        (None: the configured one).

        It also shows OUT/budget.json, where that belongs to these metrics, and the metrics.jsonl
        beside the checkpoint.
        """
        config, data, matrix = self.config, self.data, self.matrix.cpu().numpy()
        keys, parts = rows(result, method(config))
        page = {
            "name": "/".join(Path(checkpoint).absolute().parts[-2:]),
            "facts": facts(config, result, step or config.train.steps),
            "config": asdict(config),
            "classes": data.names,
            "seen": data.seen,
            "pixels": matrix.sum(1).tolist(),
            "colours": [
                f"#{r:02x}{g:02x}{b:02x}" for r, g, b in palette(len(data.names))[:-1].tolist()
            ],
            "per_class": [[v["IoU"], v["Acc"]] for v in result["per_class"].values()],
            "metrics": {
                "keys": keys,
                "rows": [[title, {k: values[k] for k in keys}] for title, values in parts],
            },
            "paper": paper(result, config),
            "true_masks": result.get("clip_true_masks"),
            "confusions": confusions(matrix),
            "budget": read_budget(out / "budget.json", Path(checkpoint), result),
            "curves": curves(Path(checkpoint).parent / "metrics.jsonl"),
            "images": [card for _, _, card in self.cards],
            "kept": KEPT,
        }
        # So that no name can end the script block.
        text = json.dumps(page, allow_nan=False).replace("<", "\\u003c")
        with written(out / "report.html") as file:
            file.write_text(TEMPLATE.read_text("utf-8").replace("{{data}}", text), "utf-8")
        print(f"-> {out / 'report.html'}")


def ends(cards: list) -> list:
    """The first and the last KEPT."""
    return cards[:KEPT] + cards[KEPT:][-KEPT:]


def data_uri(image: Image.Image, kind: str, **options: object) -> str:
    image.save(buffer := io.BytesIO(), kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def image_uri(image: Tensor) -> str:
    """uint8 [3, h, w] as a small JPEG."""
    small = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    small.thumbnail((EDGE, EDGE))
    return data_uri(small, "JPEG", quality=85)


def map_uri(labels: np.ndarray, classes: list[int], count: int) -> str:
    """Class ids [H, W] of `count` classes as a small PNG: `classes` in their colours, the others,
    and -1, transparent.
    """
    index = np.zeros(count + 1, np.uint8)  # the last is that of -1
    index[classes] = np.arange(1, len(classes) + 1)
    small = Image.fromarray(index[labels])
    small.putpalette(palette(count)[[-1, *classes]].tobytes())
    small.thumbnail((EDGE, EDGE), Image.Resampling.NEAREST)
    return data_uri(small, "PNG", transparency=0)


def facts(config: Config, result: dict, step: int) -> list[tuple[str, str]]:
    """What the head of the page says of the evaluation."""
    data, model, clip = config.data, config.model, config.clip
    shown = lambda prompt: (
        prompt
        if isinstance(prompt, str)
        else prompt[0] + f" and {len(prompt) - 1} more" * (len(prompt) > 1)
    )
    found = {
        "data": f"{data.name}, {data.split} split",
        "images": f"{result['images']:,}",
        "speed": f"{result['images_per_second']:.2f} images/s",
        "commit": git_commit().replace(git_commit()[12:40], ""),
        "backbone": model.backbone,
        "trained on": (
            f"{data.train_on} classes, {step:,} steps of {config.train.batch_size} images"
        ),
    }
    if model.class_head == "text":
        found |= {
            "CLIP": clip.weights,
            "prompt": shown(clip.prompt),
            "prompt of the regions": shown(clip.region_prompt),
        }
        found["ensemble weight"] = f"{clip.ensemble_weight:g}" if clip.ensemble else "no ensemble"
    return [(k, v) for k, v in found.items() if v]


def paper(result: dict, config: Config) -> dict | None:
    """The nearest published row, None where there is none."""
    if not (found := nearest(config)):
        return None
    row, differing = found
    return {
        "name": row["name"],
        "config": f"configs/{row['config']}.toml",
        "differing": differing,
        "values": {k: v for k, v in row.items() if k in result},
    }


def gains(matrix: np.ndarray) -> np.ndarray:
    """By how many points mIoU (`summarize`'s) would rise if the pixels of class i taken for j were
    right: [C, C].
    """
    matrix = matrix.astype(np.float64)
    hit, truth, found = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    union, there = truth + found - hit, truth > 0
    iou = hit / np.maximum(union, 1)
    more = matrix / np.maximum(union, 1)[:, None]  # of i: the union stays
    # Of j, the union shrinks,
    more += np.where(there, hit / np.maximum(union - matrix, 1) - iou, 0)
    # or j counts no more, as it is neither in the truth nor predicted.
    gone = ~there & (found == matrix) & (matrix > 0)
    total, counted = iou[there].sum(), (union > 0).sum()
    gain = 100 * ((total + more) / np.maximum(counted - gone, 1) - total / max(counted, 1))
    np.fill_diagonal(gain, 0)
    return gain


def confusions(matrix: np.ndarray) -> list[tuple]:
    """The TOP confusions that cost most: (class, taken for, pixels, their share of the class in
    percent, points of mIoU).
    """
    gain, share = gains(matrix), 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    pairs = [divmod(int(k), len(matrix)) for k in np.argsort(-gain, axis=None, kind="stable")[:TOP]]
    return [
        (i, j, *(float(table[i, j]) for table in (matrix, share, gain)))
        for i, j in pairs
        if gain[i, j] > 0
    ]


def read_budget(file: Path, checkpoint: Path, result: dict) -> dict | None:
    """The error budget that `eval.py --budget` wrote, with titles of its rows; None unless it
    belongs to these metrics.
    """
    try:
        if file.stat().st_mtime < checkpoint.stat().st_mtime:
            return None
        found = json.loads(file.read_text("utf-8"))
        same = [part["per_class"].keys() for part in (found["as_is"], result)]
        if same[0] != same[1] or abs((found["as_is"]["mIoU"] or 0) - (result["mIoU"] or 0)) > 0.1:
            return None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    keys = [k for k in ("mIoU_seen", "mIoU_unseen", "hIoU", "mIoU") if k in result]
    return found | {
        "keys": keys,
        "rows": [[title, {k: found[row][k] for k in keys}] for row, title in ROWS.items()],
    }


def curves(file: Path) -> list[dict]:
    """The charts of what a run logged; a line has at most POINTS (step, value). What is broken or
    not finite is left out.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for line in read_lines(file):
        for key, value in line.items():
            if isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(key, []).append((line["step"], value))
    charts = []
    for title, log, names in CHARTS:
        lines = {name: series[key] for key, name in names.items() if len(series.get(key, ())) > 1}
        if lines:
            charts.append(
                {
                    "title": title,
                    "log": log,
                    "lines": [[name, thinned(points)] for name, points in lines.items()],
                }
            )
    return charts


def thinned(points: list[tuple[float, float]]) -> list[list[float]]:
    """Means of neighbours, so that at most POINTS are left."""
    parts = np.array_split(np.array(points), min(POINTS, len(points)))
    return [[float(f"{v:.6g}") for v in part.mean(0)] for part in parts]
