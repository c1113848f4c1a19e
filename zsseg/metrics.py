"""Metrics of semantic segmentation from exact integer confusion matrices, and their table."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zsseg.config import Config
from zsseg.datasets import DataSet, dataset
from zsseg.utils import first_of

PIXELS = 2**24  # of an image that are counted at once


def confusion(labels: Tensor, predicted: Tensor, classes: int, ignore: int) -> Tensor:
    """Pixel counts int64 [C, C], rows target classes, columns predicted ones, without pixels of
    the label `ignore`. Labels and predictions: int64 [H, W].
    """
    matrix = torch.zeros(classes * classes, dtype=torch.int64, device=labels.device)
    for target, prediction in zip(
        labels.flatten().split(PIXELS), predicted.flatten().split(PIXELS), strict=True
    ):
        valid = target != ignore
        pairs = target[valid] * classes + prediction[valid]
        matrix += torch.bincount(pairs, minlength=classes * classes)
    return matrix.view(classes, classes)


def summarize(matrix: Tensor, data: DataSet) -> dict:
    """All metrics of a confusion matrix, in percent; null where there is no ground truth to
    measure.

    mIoU is the original's: the sum over classes with ground truth, divided by the number of classes
    with ground truth or predictions; mIoU_gt divides by those with ground truth. hIoU is the
    harmonic mean of seen and unseen mIoU.
    """
    matrix = matrix.cpu().numpy().astype(np.float64)
    correct = np.diag(matrix)
    target = matrix.sum(1)
    union = target + matrix.sum(0) - correct
    measured = target > 0
    iou = 100 * correct / np.maximum(union, 1)
    accuracy = 100 * correct / np.maximum(target, 1)

    def ratio(a: float, b: float) -> float | None:
        return float(a / b) if b else None  # nothing to measure is no zero

    def over(chosen: np.ndarray) -> tuple[float | None, float | None]:
        """mIoU and pixel accuracy of some classes."""
        with_target = measured & chosen
        miou = ratio(iou[with_target].sum(), with_target.any() and (union[chosen] > 0).sum())
        return miou, ratio(100 * correct[chosen].sum(), target[chosen].sum())

    miou, pixel_accuracy = over(np.ones_like(measured))
    result = {
        "mIoU": miou,
        "mIoU_gt": ratio(iou[measured].sum(), measured.sum()),
        "fwIoU": ratio((iou * target).sum(), target.sum()),
        "mAcc": ratio(accuracy[measured].sum(), measured.sum()),
        "pAcc": pixel_accuracy,
    }
    if data.seen:
        is_seen = np.isin(np.arange(len(target)), data.seen)
        seen, result["pAcc_seen"] = over(is_seen)
        unseen, result["pAcc_unseen"] = over(~is_seen)
        result |= {"mIoU_seen": seen, "mIoU_unseen": unseen, "hIoU": harmonic_mean(seen, unseen)}
    result["per_class"] = {
        name: {"IoU": ratio(iou[i], measured[i]), "Acc": ratio(accuracy[i], measured[i])}
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
    missing = [name for name, values in result["per_class"].items() if values["IoU"] is None]
    if missing:
        print(
            f"not measured, without a pixel of ground truth: {len(missing)} of {len(data.names)} "
            f"classes: {first_of(missing, 20)}"
        )
    if result["ignored"] >= 0.05:
        print(f"{result['ignored']:.1f}% of the pixels have no class and do not count")
    split = config.data.split
    published = data.counts.get(split, result["images"])
    note = f" (the published {split} split has {published})"
    print(
        f"{result['images']} images{note if published != result['images'] else ''}, "
        f"{result['images_per_second']:.2f} images/s -> {out / 'metrics.json'}"
    )


def percent(value: float | None, width: int) -> str:
    """A number of a table, "-" where nothing was measured."""
    return f"{'-' if value is None else format(value, '.1f'):>{width}}"


def method(config: Config) -> str:
    """What the evaluation is, as it was configured."""
    if not config.clip.ensemble:
        return "MaskFormer only"
    return "CLIP only" if config.clip.ensemble_weight == 0 else "ensemble"


def rows(result: dict, name: str) -> tuple[tuple[str, ...], list[tuple[str, dict]]]:
    """The metrics that a table shows, and its rows (title, metrics): the method's parts, and last
    the evaluation itself.
    """
    titles = {
        "head_only": "MaskFormer only",
        "clip_only": "CLIP only",
        "clip_objectness": "CLIP x objectness",
    }
    for key in result:
        if key.startswith("weight_"):
            titles[key] = f"ensemble, weight {key.removeprefix('weight_')}"
    keys = ("mIoU", "mIoU_gt", "fwIoU", "mAcc", "pAcc")
    if "hIoU" in result:
        keys = ("mIoU_seen", "mIoU_unseen", "hIoU", "mIoU", "pAcc")
    parts = [(title, result[key]) for key, title in titles.items() if key in result]
    return keys, [part for part in parts if part[0] != name] + [(name, result)]


def table(result: dict, name: str = "ensemble", unseen: list[str] = ()) -> str:
    """The metrics as lines of text: seen, unseen and hIoU of each part side by side, then every
    class.
    """
    keys, parts = rows(result, name)
    lines = [f"{'':24}" + "".join(f"{key.removeprefix('mIoU_'):>9}" for key in keys)]
    for title, values in parts:
        lines.append(f"{title:24}" + "".join(percent(values[key], 9) for key in keys))
    if clip := result.get("clip_true_masks"):
        cells = [percent(clip[k], 9) for k in ("accuracy_seen", "accuracy_unseen") if k in clip]
        lines.append(
            f"{'CLIP on GT masks':24}{''.join(cells)}   all {percent(clip['accuracy'], 0)} "
            f"(accuracy, {clip['regions']} regions)"
        )
    lines += ["", "IoU of each class (* unseen)" if unseen else "IoU of each class"]
    cells = [
        f"{name[:15] + (' *' if name in unseen else ''):17} {percent(values['IoU'], 5)}"
        for name, values in result["per_class"].items()
    ]
    lines += ["  ".join(cells[i : i + 4]) for i in range(0, len(cells), 4)]
    return "\n".join(lines)
