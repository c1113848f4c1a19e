"""Metrics: confusion matrices, what follows from them, and the tables that show it."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zsseg.config import Config
from zsseg.datasets import DataSet, dataset
from zsseg.utils import format_table, join_some, write_json


def confusion(labels: Tensor, predicted: Tensor, classes: int, ignore: int) -> Tensor:
    """Pixel counts int64 [C, C], rows true classes, columns predicted ones; `ignore` pixels are
    left out.
    """
    valid = labels != ignore
    pairs = labels[valid] * classes + predicted[valid]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


class Counts:
    """Pixels of each class, float64 [C]: predicted rightly, of the ground truth, and predicted; and
    from these IoU and accuracy in percent.
    """

    def __init__(self, hits: np.ndarray, gt: np.ndarray, predicted: np.ndarray, seen: list[int]):
        self.gt = gt
        self.iou = 100 * hits / np.maximum(gt + predicted - hits, 1)
        self.accuracy = 100 * hits / np.maximum(gt, 1)
        self.present = gt + predicted > 0
        self.seen = np.isin(np.arange(len(gt)), seen)  # bool [C]

    def mean_iou(self, classes: np.ndarray | bool = True) -> float | None:
        """The original's, of some classes, bool [C]: the sum over those with ground truth, divided
        by the number of those with ground truth or predictions.
        """
        return mean(self.iou, classes * (self.gt > 0), classes * self.present)


def mean(values: np.ndarray, weights: np.ndarray, divisors=None) -> float | None:
    """A mean over classes, weighted; None, not zero, if all weights are 0."""
    total = (weights if divisors is None else divisors).sum()
    return float((values * weights).sum() / total) if weights.any() else None


def harmonic_mean(seen: float | None, unseen: float | None) -> float | None:
    """0 if either is, None if one was not measured."""
    if seen is None or unseen is None:
        return None
    return 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0


# Every metric in percent, from Counts. metrics.json, wandb, tables and the page show all of them.
METRICS = {
    "mIoU_seen": lambda c: c.mean_iou(c.seen),
    "mIoU_unseen": lambda c: c.mean_iou(~c.seen),
    "hIoU": lambda c: harmonic_mean(c.mean_iou(c.seen), c.mean_iou(~c.seen)),
    "mIoU": lambda c: c.mean_iou(),
    "pAcc": lambda c: mean(c.accuracy, c.gt),
    "mIoU_gt": lambda c: mean(c.iou, c.gt > 0),
    "fwIoU": lambda c: mean(c.iou, c.gt),
    "mAcc": lambda c: mean(c.accuracy, c.gt > 0),
    "pAcc_seen": lambda c: mean(c.accuracy, c.gt * c.seen),
    "pAcc_unseen": lambda c: mean(c.accuracy, c.gt * ~c.seen),
}
SPLIT = ("mIoU_seen", "mIoU_unseen", "hIoU", "pAcc_seen", "pAcc_unseen")  # need unseen classes
# Not in the tables of data with unseen classes, which would be too wide.
DETAILS = ("mIoU_gt", "fwIoU", "mAcc", "pAcc_seen", "pAcc_unseen")
PARTS = {
    "head_only": "MaskFormer only",
    "clip_only": "CLIP only",
    "clip_objectness": "CLIP x objectness",
}


def summarize(matrix: Tensor, data: DataSet) -> dict:
    """METRICS of a confusion matrix, and IoU and accuracy `per_class`; None for what has no ground
    truth.
    """
    matrix = matrix.cpu().numpy().astype(np.float64)
    counts = Counts(matrix.diagonal(), matrix.sum(1), matrix.sum(0), data.seen)
    names = [name for name in METRICS if data.seen or name not in SPLIT]
    result = {name: METRICS[name](counts) for name in names}
    values = (counts.iou.tolist(), counts.accuracy.tolist(), counts.gt)
    result["per_class"] = {
        name: {"IoU": iou, "Acc": accuracy} if gt else {"IoU": None, "Acc": None}
        for name, iou, accuracy, gt in zip(data.names, *values, strict=True)
    }
    return result


def percent(value: float | None, width: int = 0) -> str:
    """A number in a table, "-" for what was not measured."""
    return f"{'-' if value is None else format(value, '.1f'):>{width}}"


def method(config: Config) -> str:
    """The part of the method, or all of it, that an evaluation measures."""
    if not config.model.proposals:
        return "one-stage baseline"
    if not config.clip.ensemble:
        return PARTS["head_only"]
    return "ensemble" if config.clip.ensemble_weight else PARTS["clip_only"]


def shown(result: dict) -> list[str]:
    """The metrics of a result that tables show."""
    return [k for k in METRICS if k in result and not ("hIoU" in result and k in DETAILS)]


def rows(result: dict, config: Config) -> tuple[list[str], list[tuple[str, dict]]]:
    """The metrics that a table shows, and its rows (title, metrics): the method's parts, and last
    the evaluation itself.
    """
    weights = {k: k.replace("weight_", "ensemble, weight ") for k in result if "weight_" in k}
    name = method(config)
    titles = PARTS | weights
    parts = [(title, result[k]) for k, title in titles.items() if k in result and title != name]
    return shown(result), [*parts, (name, result)]


def metric_table(keys: list[str], rows: Iterable[tuple[str, dict]]) -> str:
    """Metrics side by side: rows (title, {metric: percent})."""
    heads = ["", *(key.removeprefix("mIoU_") for key in keys)]
    return format_table(heads, ([title, *(percent(r[key]) for key in keys)] for title, r in rows))


def table(result: dict, config: Config) -> str:
    """The metrics as lines of text: those of each part side by side, then every class."""
    lines = [metric_table(*rows(result, config))]
    if clip := result.get("clip_true_masks"):
        values = {k.removeprefix("accuracy_"): v for k, v in clip.items() if k != "regions"}
        shown = ", ".join(f"{name} {percent(value)}" for name, value in values.items())
        lines.append(f"CLIP on the ground-truth masks ({clip['regions']}): {shown}")
    unseen = dataset(config.data).unseen
    cells = [
        f"{name[:15] + ' *' * (name in unseen):17} {percent(v['IoU'], 5)}"
        for name, v in result["per_class"].items()
    ]
    lines += ["", "IoU of each class" + " (* unseen)" * bool(unseen)]
    lines += ["  ".join(cells[i : i + 4]) for i in range(0, len(cells), 4)]
    return "\n".join(lines)


def report(result: dict, config: Config, out: Path) -> None:
    """Print the table of an evaluation, and what does not count in it, and write metrics.json."""
    data = dataset(config.data)
    print(table(result, config))
    without = [name for name, values in result["per_class"].items() if values["IoU"] is None]
    if without:
        count = f"{len(without)} of {len(data.names)} classes"
        names = join_some(without, 20)
        print(f"not measured, without a pixel of ground truth: {count}: {names}")
    if result["ignored"] >= 0.05:
        print(f"{result['ignored']:.1f}% of the pixels have no class and do not count")
    images = result["images"]
    split = config.data.split
    published = data.counts.get(split, images)
    note = f" (the published {split} split has {published})" if published != images else ""
    speed = f"{result['images_per_second']:.2f} images/s"
    write_json(out / "metrics.json", result)  # last: the numbers have cost more than a file
    print(f"{images} images{note}, {speed} -> {out / 'metrics.json'}")
