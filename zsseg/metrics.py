"""Evaluation: exact integer confusion matrices over all processes, the metrics, a table, a picture."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from zsseg.config import Config
from zsseg.data import TestPictures, stream
from zsseg.datasets import DataSet, dataset
from zsseg.draw import column, save_label_map
from zsseg.files import MARK, PNG_MARK, refuse_foreign
from zsseg.files import result as written
from zsseg.regions import mask_boxes
from zsseg.run import Process, UserError, progress
from zsseg.segmenter import Proposals, Segmenter
from zsseg.views import all_finite, label_map, segment_views

PIXELS = 2**24  # of an image that are counted at once


def confusion(labels: Tensor, predicted: Tensor, classes: int, ignore: int) -> Tensor:
    """Pixel counts int64 [C, C], rows true classes, columns predicted ones; `ignore` pixels are left out."""
    matrix = torch.zeros(classes * classes, dtype=torch.int64, device=labels.device)
    for true, found in zip(labels.flatten().split(PIXELS), predicted.flatten().split(PIXELS), strict=True):
        known = true != ignore
        matrix += torch.bincount(true[known] * classes + found[known], minlength=classes * classes)
    return matrix.view(classes, classes)


def summarize(matrix: Tensor, data: DataSet) -> dict:
    """All metrics of a confusion matrix, in percent; null where there is no ground truth to measure.

    mIoU is the original's: the sum over classes with ground truth, divided by the number of classes with ground truth
    or predictions; mIoU_gt divides by those with ground truth. hIoU is the harmonic mean of seen and unseen mIoU.
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
    result = {"mIoU": miou, "mIoU_gt": ratio(iou[there].sum(), there.sum()), "fwIoU": ratio((iou * truth).sum(), truth.sum()),
              "mAcc": ratio(accuracy[there].sum(), there.sum()), "pAcc": pixels}  # fmt: skip
    if data.seen:
        is_seen = np.isin(np.arange(len(truth)), data.seen)
        seen, result["pAcc_seen"] = part(is_seen)
        unseen, result["pAcc_unseen"] = part(~is_seen)
        result |= {"mIoU_seen": seen, "mIoU_unseen": unseen, "hIoU": harmonic_mean(seen, unseen)}
    result["per_class"] = {
        name: {"IoU": float(iou[i]) if there[i] else None, "Acc": float(accuracy[i]) if there[i] else None}
        for i, name in enumerate(data.names)
    }
    return result


def harmonic_mean(seen: float | None, unseen: float | None) -> float | None:
    """hIoU; 0 where either is, null where one was not measured."""
    if seen is None or unseen is None:
        return None
    return 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0


@torch.inference_mode()
def evaluate(segmenter: Segmenter, config: Config, root: Path, process: Process, split: str, out: Path | None = None,
             save_predictions: bool = False, look: Callable | None = None, seen: list[int] | None = None) -> dict:  # fmt: skip
    """Metrics of a split, its images shared among the processes; with `out`, written to metrics.json there, with a grid of
    images (rank 0).

    `seen`: ids of the classes that count as seen in the ensemble; those that the set is trained on where None.
    `look(number, name, image, labels, predicted, matrix)` is shown every image of this process: its number in the split,
    uint8 [3, h, w] at network-input size, class ids int64 [H, W] true (with `ignore`) and predicted, pixel counts [C, C].
    """
    data, wanted = dataset(config.data), config.eval
    pictures = TestPictures(config.data, root, split, wanted.sizes)
    C = len(data.names)
    if save_predictions:  # now, not in the middle
        process.agree(lambda: refuse_foreign(*(out / "predictions" / f"{name}.png" for name in pictures.names)))
    segmenter.set_classes(data.names, data.trained if seen is None else seen)
    segmenter.eval()
    ignored = torch.zeros((), dtype=torch.int64, device=process.device)
    broken = torch.zeros((), dtype=torch.int64, device=process.device)  # images with scores that are not finite
    matrices = {"": torch.zeros(C, C, dtype=torch.int64, device=process.device)}
    regions = torch.zeros(2, 2, dtype=torch.int64, device=process.device)  # seen, unseen x right, all
    numbers = range(process.rank, len(pictures), process.world)
    batches = stream(pictures, numbers, 1, config.data.workers)
    compare = (wanted.compare or bool(wanted.weights)) and segmenter.clip is not None
    samples, started = [], time.perf_counter()
    shown = progress(batches, process.share_of(f"evaluate {split}"), len(numbers), process.is_main)
    for number, [(images, labels, name)] in zip(numbers, shown, strict=True):
        images, labels = [image.to(process.device) for image in images], labels.to(process.device).long()
        with process.autocast(config.model.bf16):
            views = segment_views(segmenter, images, tuple(labels.shape), wanted.flip, wanted.window)
            if wanted.compare and compare:
                regions += true_mask_accuracy(segmenter, images[0], labels, data)
        scores = [{"": segmenter.ensemble(view.proposals)} for view in views]
        if compare:
            scores = [s | segmenter.variants(v.proposals, wanted.weights) for s, v in zip(scores, views, strict=True)]
        broken += ~all_finite(views, [s[""] for s in scores])
        ignored += (labels == data.ignore).sum()
        for row in scores[0]:
            predicted, _ = label_map(segmenter, views, [s[row] for s in scores], tuple(labels.shape))
            matrix = confusion(labels, predicted, C, data.ignore)
            matrices[row] = matrices.get(row, 0) + matrix
            if row:
                continue
            if look:
                look(number, name, images[0], labels, predicted, matrix)
            if save_predictions:
                save_label_map(predicted, out / "predictions" / f"{name}.png", C)
            if process.is_main and len(samples) < 8:
                samples.append(column(images[0].cpu(), labels.where(labels != data.ignore, C).cpu(), predicted.cpu(), C))
    seconds = torch.tensor(time.perf_counter() - started, device=process.device, dtype=torch.float64)
    if compare and not numbers:  # more processes than images
        regions_too = config.clip.ensemble and config.model.proposals
        names = segmenter.variants(Proposals.nothing(C, regions_too, process.device), wanted.weights)
        matrices |= {name: torch.zeros_like(matrices[""]) for name in names}
    for tensor in (*matrices.values(), regions, seconds, ignored, broken):
        process.sum(tensor)
    if broken:
        why = f"gives scores that are not finite in {int(broken)} of {len(pictures)} pictures"
        raise UserError("the model", why, "check its weights, or set model.bf16=off")
    pixels = int(matrices[""].sum()) + int(ignored)
    result = summarize(matrices.pop(""), data) | {"ignored": 100 * int(ignored) / max(pixels, 1)}
    result |= {"images": len(pictures), "images_per_second": len(pictures) * process.world / float(seconds)}
    result |= {name: summarize(matrix, data) for name, matrix in matrices.items()}
    if wanted.compare and compare:
        right, total = regions.T.tolist()
        result["clip_true_masks"] = {"accuracy": 100 * sum(right) / sum(total) if sum(total) else None, "regions": sum(total)}
        if data.seen:
            seen, unseen = (100 * r / n if n else None for r, n in zip(right, total, strict=True))
            result["clip_true_masks"] |= {"accuracy_seen": seen, "accuracy_unseen": unseen}
    if out is not None and process.is_main:
        try:
            with written(out / "metrics.json") as file:
                file.write_text(json.dumps({"program": MARK} | result, indent=1, allow_nan=False) + "\n")
        except UserError:  # the numbers have cost more than a file
            print(table(result, method(config), data.unseen))
            raise
        with written(out / "samples.png") as file:
            Image.fromarray(np.concatenate(samples, 1)).save(file, "PNG", pnginfo=PNG_MARK)
    return result


def true_masks(image: Tensor, labels: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """The classes of a label map [T] and their masks at the network-input size of `image` [3, H, W]: bool [T, H, W]."""
    labels = F.interpolate(labels[None, None].float(), image.shape[-2:], mode="nearest")[0, 0].long()
    classes = labels.unique()
    classes = classes[classes != ignore]
    return classes, labels == classes[:, None, None]


def true_mask_accuracy(segmenter: Segmenter, image: Tensor, labels: Tensor, data: DataSet) -> Tensor:
    """CLIP alone on the ground-truth mask of every class present: int64 [2, 2], rows seen and unseen, right and all."""
    classes, masks = true_masks(image, labels, data.ignore)
    right = segmenter.region_logits(image, masks, mask_boxes(masks)[0]).argmax(1) == classes
    seen = segmenter.seen[classes]
    return torch.stack([torch.stack([(right & chosen).sum(), chosen.sum()]) for chosen in (seen, ~seen)])


def report(result: dict, config: Config, out: Path) -> None:
    """Print the table of what is in `metrics.json`, and what does not count in it."""
    data = dataset(config.data)
    print(table(result, method(config), data.unseen))
    without = [name for name, values in result["per_class"].items() if values["IoU"] is None]
    if without:
        names = ", ".join(without[:20]) + f" and {len(without) - 20} more" * (len(without) > 20)
        print(f"not measured, without a pixel of ground truth: {len(without)} of {len(data.names)} classes: {names}")
    if result["ignored"] >= 0.05:
        print(f"{result['ignored']:.1f}% of the pixels have no class and do not count")
    published = data.counts.get(config.data.split, result["images"])
    note = f" (the published {config.data.split} split has {published})" if published != result["images"] else ""
    print(f"{result['images']} images{note}, {result['images_per_second']:.2f} images/s -> {out / 'metrics.json'}")


def percent(value: float | None, width: int) -> str:
    """A number of a table, "-" where nothing was measured."""
    return f"{'-' if value is None else format(value, '.1f'):>{width}}"


def method(config: Config) -> str:
    """What the evaluation is, as it was configured."""
    return {None: "head alone", 0: "CLIP alone"}.get(config.clip.ensemble_weight if config.clip.ensemble else None, "ensemble")


def rows(result: dict, name: str) -> tuple[tuple[str, ...], list[tuple[str, dict]]]:
    """The metrics that a table shows, and its rows (title, metrics): the method's parts, and last the evaluation itself."""
    titles = {"head_only": "head alone", "clip_only": "CLIP alone", "clip_objectness": "CLIP x objectness"}
    titles |= {k: f"ensemble, weight {k.removeprefix('weight_')}" for k in result if k.startswith("weight_")}
    split = "hIoU" in result
    keys = ("mIoU_seen", "mIoU_unseen", "hIoU", "mIoU", "pAcc") if split else ("mIoU", "mIoU_gt", "fwIoU", "mAcc", "pAcc")
    return keys, [(title, result[k]) for k, title in titles.items() if k in result and title != name] + [(name, result)]


def table(result: dict, name: str = "ensemble", unseen: list[str] = ()) -> str:
    """The metrics as lines of text: seen, unseen and hIoU of each part side by side, then every class."""
    keys, parts = rows(result, name)
    lines = ["".join([f"{'':24}", *(f"{k.removeprefix('mIoU_'):>9}" for k in keys)])]
    lines += ["".join([f"{title:24}", *(percent(values[k], 9) for k in keys)]) for title, values in parts]
    if clip := result.get("clip_true_masks"):
        shown = [clip[k] for k in ("accuracy_seen", "accuracy_unseen") if k in clip]
        text = "".join(percent(v, 9) for v in shown)
        text += f"   all {percent(clip['accuracy'], 0)} (accuracy, {clip['regions']} regions)"
        lines.append(f"{'CLIP on the true masks':24}{text}")
    cells = [f"{name[:15] + ' *' * (name in unseen):17} {percent(v['IoU'], 5)}" for name, v in result["per_class"].items()]
    head = "IoU of each class" + " (* unseen)" * bool(unseen)
    return "\n".join([*lines, "", head, *("  ".join(cells[i : i + 4]) for i in range(0, len(cells), 4))])
