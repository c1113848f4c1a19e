"""Evaluation: exact integer confusion matrices over all processes, the metrics, a table, a
image.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zsseg.config import Config
from zsseg.datasets import DataSet, dataset
from zsseg.utils import first_of

PIXELS = 2**24  # of an image that are counted at once


def confusion(labels: Tensor, predicted: Tensor, classes: int, ignore: int) -> Tensor:
    """Pixel counts int64 [C, C], rows true classes, columns predicted ones; `ignore` pixels are
    left out.
    """
    matrix = torch.zeros(classes * classes, dtype=torch.int64, device=labels.device)
    for true, found in zip(
        labels.flatten().split(PIXELS), predicted.flatten().split(PIXELS), strict=True
    ):
        known = true != ignore
        matrix += torch.bincount(true[known] * classes + found[known], minlength=classes * classes)
    return matrix.view(classes, classes)


def summarize(matrix: Tensor, data: DataSet) -> dict:
    """All metrics of a confusion matrix, in percent; null where there is no ground truth to
    measure.

    mIoU is the original's: the sum over classes with ground truth, divided by the number of classes
    with ground truth or predictions; mIoU_gt divides by those with ground truth. hIoU is the
    harmonic mean of seen and unseen mIoU.
    """
    matrix = matrix.cpu().numpy().astype(np.float64)
    hit, truth, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    there, touched = truth > 0, truth + predicted > 0
    iou = 100 * hit / np.maximum(truth + predicted - hit, 1)
    accuracy = 100 * hit / np.maximum(truth, 1)

    def ratio(a: float, b: float) -> float | None:
        return float(a / b) if b else None  # nothing to measure is no zero

    def part(chosen: np.ndarray) -> tuple[float | None, float | None]:
        measured = (there & chosen).any()  # without ground truth there is nothing to be right about
        miou = ratio(iou[there & chosen].sum(), measured and (touched & chosen).sum())
        return miou, ratio(100 * hit[chosen].sum(), truth[chosen].sum())

    miou, pixels = part(np.ones_like(there))
    result = {
        "mIoU": miou,
        "mIoU_gt": ratio(iou[there].sum(), there.sum()),
        "fwIoU": ratio((iou * truth).sum(), truth.sum()),
        "mAcc": ratio(accuracy[there].sum(), there.sum()),
        "pAcc": pixels,
    }
    if data.seen:
        is_seen = np.isin(np.arange(len(truth)), data.seen)
        seen, result["pAcc_seen"] = part(is_seen)
        unseen, result["pAcc_unseen"] = part(~is_seen)
        result |= {"mIoU_seen": seen, "mIoU_unseen": unseen, "hIoU": harmonic_mean(seen, unseen)}
    result["per_class"] = {
        name: {
            "IoU": float(iou[i]) if there[i] else None,
            "Acc": float(accuracy[i]) if there[i] else None,
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
        names = first_of(without, 20)
        print(
            f"not measured, without a pixel of ground truth: {len(without)} of {len(data.names)} "
            f"classes: {names}"
        )
    if result["ignored"] >= 0.05:
        print(f"{result['ignored']:.1f}% of the pixels have no class and do not count")
    published = data.counts.get(config.data.split, result["images"])
    note = (
        f" (the published {config.data.split} split has {published})"
        if published != result["images"]
        else ""
    )
    print(
        f"{result['images']} images{note}, {result['images_per_second']:.2f} images/s -> "
        f"{out / 'metrics.json'}"
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
    titles |= {
        k: f"ensemble, weight {k.removeprefix('weight_')}"
        for k in result
        if k.startswith("weight_")
    }
    split = "hIoU" in result
    keys = (
        ("mIoU_seen", "mIoU_unseen", "hIoU", "mIoU", "pAcc")
        if split
        else ("mIoU", "mIoU_gt", "fwIoU", "mAcc", "pAcc")
    )
    return keys, [
        (title, result[k]) for k, title in titles.items() if k in result and title != name
    ] + [(name, result)]


def table(result: dict, name: str = "ensemble", unseen: list[str] = ()) -> str:
    """The metrics as lines of text: seen, unseen and hIoU of each part side by side, then every
    class.
    """
    keys, parts = rows(result, name)
    lines = ["".join([f"{'':24}", *(f"{k.removeprefix('mIoU_'):>9}" for k in keys)])]
    lines += [
        "".join([f"{title:24}", *(percent(values[k], 9) for k in keys)]) for title, values in parts
    ]
    if clip := result.get("clip_true_masks"):
        shown = [clip[k] for k in ("accuracy_seen", "accuracy_unseen") if k in clip]
        text = "".join(percent(v, 9) for v in shown)
        text += f"   all {percent(clip['accuracy'], 0)} (accuracy, {clip['regions']} regions)"
        lines.append(f"{'CLIP on the true masks':24}{text}")
    cells = [
        f"{name[:15] + ' *' * (name in unseen):17} {percent(v['IoU'], 5)}"
        for name, v in result["per_class"].items()
    ]
    head = "IoU of each class" + " (* unseen)" * bool(unseen)
    return "\n".join(
        [*lines, "", head, *("  ".join(cells[i : i + 4]) for i in range(0, len(cells), 4))]
    )
