"""Metrics: confusion matrices, what follows from them, and the tables that show it."""

from types import SimpleNamespace

import numpy as np
import torch

from zsseg.datasets import dataset
from zsseg.utils import format_table, join_some, write_json


def confusion(labels, predicted, classes, ignore):
    """Pixel counts int64 [C, C], rows true classes, columns predicted ones; `ignore` pixels are
    left out. A GPU is not waited for.
    """
    cells = classes**2
    pairs = torch.where(labels == ignore, cells, labels * classes + predicted).flatten()
    counts = pairs.new_zeros(cells + 1).scatter_add(0, pairs, torch.ones_like(pairs))
    return counts[:-1].view(classes, classes)


def mean(values, weights):
    """A mean over classes, weighted; None, not zero, if all weights are 0."""
    return float(np.average(values, weights=weights)) if weights.any() else None


def mean_iou(counts, classes):
    """The original's, of some classes, bool [C]: over those with ground truth or predictions; None
    if none has ground truth.
    """
    return mean(counts.iou, classes & counts.present & (classes & (counts.gt > 0)).any())


def harmonic_mean(seen, unseen):
    """0 if either is, None if one was not measured."""
    if seen is None or unseen is None:
        return None
    return 2 * seen * unseen / (seen + unseen or 1)


# Every metric in percent, from what `summarize` counts of each class [C]. metrics.json, wandb,
# tables and the page show all of them.
METRICS = {
    "mIoU_seen": lambda c: mean_iou(c, c.seen),
    "mIoU_unseen": lambda c: mean_iou(c, ~c.seen),
    "hIoU": lambda c: harmonic_mean(mean_iou(c, c.seen), mean_iou(c, ~c.seen)),
    "mIoU": lambda c: mean_iou(c, c.present),
    "pAcc": lambda c: mean(c.accuracy, c.gt),
    "mIoU_gt": lambda c: mean(c.iou, c.gt > 0),
    "fwIoU": lambda c: mean(c.iou, c.gt),
    "mAcc": lambda c: mean(c.accuracy, c.gt > 0),
    "pAcc_seen": lambda c: mean(c.accuracy, c.gt * c.seen),
    "pAcc_unseen": lambda c: mean(c.accuracy, c.gt * ~c.seen),
}
SPLIT = "mIoU_seen mIoU_unseen hIoU pAcc_seen pAcc_unseen"  # need unseen classes
# Not in the tables of data with unseen classes, which would be too wide.
DETAILS = "mIoU_gt fwIoU mAcc pAcc_seen pAcc_unseen"
PARTS = {"head_only": "head only", "clip_only": "CLIP only", "clip_objectness": "CLIP x objectness"}


def summarize(matrix, data):
    """METRICS of a confusion matrix, and IoU and accuracy `per_class`; None for what has no ground
    truth.
    """
    matrix = matrix.cpu().numpy().astype(np.float64)
    hits = matrix.diagonal()
    gt = matrix.sum(1)  # pixels
    union = gt + matrix.sum(0) - hits
    iou = 100 * hits / np.maximum(union, 1)
    accuracy = 100 * hits / np.maximum(gt, 1)
    seen = np.isin(np.arange(len(gt)), data.seen)
    counts = SimpleNamespace(gt=gt, iou=iou, accuracy=accuracy, present=union > 0, seen=seen)
    result = {k: f(counts) for k, f in METRICS.items() if data.seen or k not in SPLIT.split()}
    pairs = np.where(gt > 0, [iou, accuracy], None).T
    result["per_class"] = {
        name: {"IoU": iou, "Acc": accuracy}
        for name, (iou, accuracy) in zip(data.names, pairs, strict=True)
    }
    return result


def percent(value):
    """A number in a table, "-" for what was not measured."""
    return "-" if value is None else f"{value:.1f}"


def shown(result):
    """The metrics of a result that tables show."""
    return [k for k in METRICS if k in result and not ("hIoU" in result and k in DETAILS.split())]


def rows(result):
    """The rows of a table (title, metrics): the method's parts, and last the evaluation itself."""
    parts = [(PARTS.get(k, k), v) for k, v in result.items() if k in PARTS or "weight_" in k]
    return [*parts, ("as configured", result)]


def metric_table(rows):
    """Metrics side by side: rows (title, {metric: percent})."""
    keys = shown(rows[-1][1])
    heads = [key.removeprefix("mIoU_") for key in keys]
    cells = [[title, *(percent(result[key]) for key in keys)] for title, result in rows]
    return format_table(["", *heads], cells)


def report(result, config, out):
    """Print the IoU of every class, what does not count, and the metrics; write metrics.json."""
    unseen = dataset(config.data).unseen
    ious = {name: values["IoU"] for name, values in result["per_class"].items()}
    cells = [[name + " *" * (name in unseen), percent(iou)] for name, iou in ious.items()]
    print(format_table(["class (*: unseen)", "IoU"], cells))
    if without := [name for name, iou in ious.items() if iou is None]:
        print(f"not measured, without a pixel of ground truth: {join_some(without, 20)}")
    if result["ignored"] >= 0.05:
        print(f"{result['ignored']:.1f}% of the pixels have no class and do not count")
    print(metric_table(rows(result)))
    write_json(out / "metrics.json", result)  # last: the numbers have cost more than a file
    speed = f"{result['images_per_second']:.2f} images/s"
    print(f"{result['images']} images, {speed} -> {out / 'metrics.json'}")
