"""Metrics: confusion matrices, what follows from them, and the tables that show it."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zsseg.config import Config
from zsseg.datasets import DataSet, dataset
from zsseg.utils import first_of, format_table

MAX_PIXELS = 2**24  # of an image that are counted at once
PARTS = {
    "head_only": "MaskFormer only",
    "clip_only": "CLIP only",
    "clip_objectness": "CLIP x objectness",
}


def confusion(labels: Tensor, predicted: Tensor, classes: int, ignore: int) -> Tensor:
    """Pixel counts int64 [C, C], rows true classes, columns predicted ones; `ignore` pixels are
    left out.
    """
    matrix = torch.zeros(classes * classes, dtype=torch.int64, device=labels.device)
    parts = (tensor.flatten().split(MAX_PIXELS) for tensor in (labels, predicted))
    for label, prediction in zip(*parts, strict=True):
        valid = label != ignore
        pairs = label[valid] * classes + prediction[valid]
        matrix += torch.bincount(pairs, minlength=classes * classes)
    return matrix.view(classes, classes)


def ratio(a: float, b: float) -> float | None:
    """a / b; None, not zero, where there is nothing to measure."""
    return float(a / b) if b else None


def marginals(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a confusion matrix [C, C], each class's pixels that are right, of the ground truth, and
    predicted: [C].
    """
    return matrix.diagonal(), matrix.sum(1), matrix.sum(0)


def mean_iou(hits: np.ndarray, gt: np.ndarray, predicted: np.ndarray) -> float | None:
    """The original's mIoU in percent, from `marginals`; None without ground truth."""
    if not gt.any():
        return None
    union = gt + predicted - hits
    iou = 100 * hits / np.maximum(union, 1)
    return float(iou[gt > 0].sum() / (union > 0).sum())


def summarize(matrix: Tensor, data: DataSet) -> dict:
    """All metrics of a confusion matrix, in percent; null where there is no ground truth to
    measure.

    mIoU is the original's: the sum over classes with ground truth, divided by the number of classes
    with ground truth or predictions; mIoU_gt divides by those with ground truth. hIoU is the
    harmonic mean of seen and unseen mIoU.
    """
    matrix = matrix.cpu().numpy().astype(np.float64)
    hits, gt, predicted = marginals(matrix)
    has_gt = gt > 0
    iou = 100 * hits / np.maximum(gt + predicted - hits, 1)
    accuracy = 100 * hits / np.maximum(gt, 1)

    def part(classes: np.ndarray) -> tuple[float | None, float | None]:
        """mIoU and pixel accuracy of some classes, bool [C]."""
        miou = mean_iou(hits[classes], gt[classes], predicted[classes])
        return miou, ratio(100 * hits[classes].sum(), gt[classes].sum())

    miou, pixel_accuracy = part(np.ones_like(has_gt))
    result = {
        "mIoU": miou,
        "mIoU_gt": ratio(iou[has_gt].sum(), has_gt.sum()),
        "fwIoU": ratio((iou * gt).sum(), gt.sum()),
        "mAcc": ratio(accuracy[has_gt].sum(), has_gt.sum()),
        "pAcc": pixel_accuracy,
    }
    if data.seen:
        is_seen = np.isin(np.arange(len(gt)), data.seen)
        seen, result["pAcc_seen"] = part(is_seen)
        unseen, result["pAcc_unseen"] = part(~is_seen)
        result |= {"mIoU_seen": seen, "mIoU_unseen": unseen, "hIoU": harmonic_mean(seen, unseen)}
    result["per_class"] = {
        name: {
            "IoU": float(iou[i]) if has_gt[i] else None,
            "Acc": float(accuracy[i]) if has_gt[i] else None,
        }
        for i, name in enumerate(data.names)
    }
    return result


def harmonic_mean(seen: float | None, unseen: float | None) -> float | None:
    """hIoU; 0 where either is, null where one was not measured."""
    if seen is None or unseen is None:
        return None
    return 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0


def report(result: dict, config: Config, out: Path) -> None:
    """Print the table of what is in `metrics.json`, and what does not count in it."""
    data = dataset(config.data)
    print(table(result, method(config), data.unseen))
    without = [name for name, values in result["per_class"].items() if values["IoU"] is None]
    if without:
        count = f"{len(without)} of {len(data.names)} classes"
        names = first_of(without, 20)
        print(f"not measured, without a pixel of ground truth: {count}: {names}")
    if result["ignored"] >= 0.05:
        print(f"{result['ignored']:.1f}% of the pixels have no class and do not count")
    images, split = result["images"], config.data.split
    published = data.counts.get(split, images)
    note = f" (the published {split} split has {published})" if published != images else ""
    speed = f"{result['images_per_second']:.2f} images/s"
    print(f"{images} images{note}, {speed} -> {out / 'metrics.json'}")


def percent(value: float | None, width: int = 0) -> str:
    """A number in a table, "-" where nothing was measured."""
    return f"{'-' if value is None else format(value, '.1f'):>{width}}"


def method(config: Config) -> str:
    """What the evaluation is, as it was configured."""
    if not config.clip.ensemble:
        return PARTS["head_only"]
    return PARTS["clip_only"] if config.clip.ensemble_weight == 0 else "ensemble"


def split_keys(result: dict) -> list[str]:
    """The mIoU of a result and, where there is a seen/unseen split, its parts."""
    return [k for k in ("mIoU_seen", "mIoU_unseen", "hIoU", "mIoU") if k in result]


def rows(result: dict, name: str) -> tuple[list[str], list[tuple[str, dict]]]:
    """The metrics that a table shows, and its rows (title, metrics): the method's parts, and last
    the evaluation itself.
    """
    weights = (k for k in result if k.startswith("weight_"))
    titles = PARTS | {k: f"ensemble, weight {k.removeprefix('weight_')}" for k in weights}
    parts = [(title, result[k]) for k, title in titles.items() if k in result and title != name]
    split = split_keys(result)
    keys = [*split, "pAcc"] if "hIoU" in split else ["mIoU", "mIoU_gt", "fwIoU", "mAcc", "pAcc"]
    return keys, [*parts, (name, result)]


def metric_table(keys: list[str], rows: Iterable[tuple[str, dict]]) -> str:
    """Metrics side by side: rows (title, {metric: percent})."""
    heads = ["", *(key.removeprefix("mIoU_") for key in keys)]
    return format_table(heads, ([title, *(percent(r[key]) for key in keys)] for title, r in rows))


def table(result: dict, name: str = "ensemble", unseen: list[str] = ()) -> str:
    """The metrics as lines of text: seen, unseen and hIoU of each part side by side, then every
    class.
    """
    lines = [metric_table(*rows(result, name))]
    if clip := result.get("clip_true_masks"):
        values = {k.removeprefix("accuracy_"): v for k, v in clip.items() if k != "regions"}
        shown = ", ".join(f"{name} {percent(value)}" for name, value in values.items())
        lines.append(f"CLIP on the ground-truth masks ({clip['regions']}): {shown}")
    cells = [
        f"{name[:15] + ' *' * (name in unseen):17} {percent(v['IoU'], 5)}"
        for name, v in result["per_class"].items()
    ]
    lines += ["", "IoU of each class" + " (* unseen)" * bool(unseen)]
    lines += ["  ".join(cells[i : i + 4]) for i in range(0, len(cells), 4)]
    return "\n".join(lines)
