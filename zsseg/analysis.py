"""What limits the accuracy, the masks or the classes? Oracles replace one of them by the ground
truth.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from zsseg.config import Config
from zsseg.data import TestImages, stream
from zsseg.datasets import DataSet, dataset
from zsseg.distributed import Process
from zsseg.evaluate import gt_masks
from zsseg.files import MARK, PNG_MARK
from zsseg.files import result as written
from zsseg.metrics import confusion, metric_table, percent, ratio, split_keys, summarize
from zsseg.regions import mask_boxes
from zsseg.segmenter import Segmenter
from zsseg.utils import UserError, progress

ROWS = {
    "as_is": "as it is",
    "true_classes": "predicted masks, GT classes",
    "true_masks": "GT masks, predicted classes",
    "both": "GT masks, GT classes",
}
IOU_THRESHOLDS = (0.5, 0.7, 0.9)  # of the proposals' recall
MAX_CONFUSIONS = 10
BAR_COLOURS = ("#4477aa", "#ee6677", "#228833", "#bbbbbb")


def mask_iou(masks: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """IoU of masks bool [Q, H, W] with ground-truth masks bool [T, H, W], over the pixels `valid`
    bool [H, W]: fp32 [Q, T].
    """
    masks = (masks & valid).flatten(1).float()
    targets = targets.flatten(1).float()
    intersection = masks @ targets.T
    union = masks.sum(1)[:, None] + targets.sum(1) - intersection
    return intersection / union.clamp(min=1)


def oracle_labels(
    segmenter: Segmenter, image: Tensor, labels: Tensor, data: DataSet, autocast: Callable
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """One image, uint8 [3, H, W], with its ground truth int64 [h, w]: a label map for every row of
    ROWS, each ground-truth mask's best IoU [T], and its class and CLIP's [2, T].

    "true_classes": each ground-truth mask's proposal (best total IoU, one to one) gets its class,
    all others none. "true_masks": the pixels of a ground-truth mask get the class that its
    proposal's class probabilities and CLIP, on the ground-truth mask, decide together. Masks are
    those at network-input size: a class that vanishes there counts as wrong in both rows with
    ground-truth masks.
    """
    C, size = len(data.names), tuple(labels.shape)
    with autocast():
        proposals = segmenter.propose(image)
    classes, targets = gt_masks(image, labels, data.ignore)  # [T], [T, H, W]
    iou = mask_iou(segmenter.binary_masks(proposals), targets, targets.any(0))
    matched = linear_sum_assignment(-iou.cpu().numpy())
    query, target = (torch.from_numpy(index).to(image.device) for index in matched)
    overlaps = iou[query, target] > 0
    scores = torch.zeros_like(proposals.class_probs)
    scores[query, classes[target]] = overlaps.float()

    # A ground-truth mask without a proposal: only CLIP decides.
    head = proposals.class_probs.new_ones(len(classes), C)
    head[target[overlaps]] = proposals.class_probs[query[overlaps]]
    region = None
    if segmenter.clip is not None:
        with autocast():
            region = segmenter.region_logits(image, targets, mask_boxes(targets)[0]).softmax(-1)
    on_targets = replace(
        proposals,
        class_probs=head,
        clip_probs=region if segmenter.config.ensemble else None,
        valid=torch.ones_like(classes, dtype=torch.bool),
    )
    predicted = segmenter.ensemble(on_targets).argmax(1)

    # A class without a pixel at network-input size becomes another class.
    wrong = (torch.arange(max(data.ignore, C) + 1, device=image.device) + 1) % C
    maps = {
        "as_is": segmenter.label_map(segmenter.ensemble(proposals), proposals, size)[0],
        "true_classes": segmenter.label_map(scores, proposals, size)[0],
        "true_masks": wrong.scatter(0, classes, predicted)[labels],
        "both": wrong.scatter(0, classes, classes)[labels],
    }
    best = iou.amax(0) if len(iou) else iou.new_zeros(len(classes))
    by_clip = predicted if region is None else region.argmax(1)
    return maps, best, torch.stack([classes, by_clip])


@torch.inference_mode()
def oracle_analysis(
    segmenter: Segmenter,
    config: Config,
    root: Path,
    process: Process,
    split: str,
    seen: list[int] | None = None,
) -> dict:
    """The metrics of every row, the recall of the proposals, and CLIP's confusions on ground-truth
    masks, over a split; complete on the first process.

    `seen`: ids of the classes that count as seen in the ensemble; those that the set is trained on
    where None.
    """
    if not config.model.proposals:
        todo = "give a checkpoint with model.proposals = true"
        raise UserError("--budget", "needs mask proposals", todo)
    if config.eval.sizes or config.eval.flip or config.eval.window:
        todo = "leave eval.sizes, eval.flip and eval.window out"
        raise UserError("--budget", "measures one view of an image", todo)
    data = dataset(config.data)
    C = len(data.names)
    segmenter.eval().set_classes(data.names, data.trained if seen is None else seen)
    autocast = functools.partial(process.autocast, config.model.bf16)  # of the networks only
    matrices = {
        row: torch.zeros(C, C, dtype=torch.int64, device=process.device) for row in [*ROWS, "clip"]
    }
    best: list[float] = []  # IoU of each ground-truth mask with its best proposal

    images = TestImages(config.data, root, split)
    numbers = range(process.rank, len(images), process.world_size)
    batches = stream(images, numbers, 1, config.data.workers)
    label = process.progress_label(f"analyse {split}")
    for [([image], labels, _)] in progress(batches, label, len(numbers), process.is_main):
        image = image.to(process.device)
        labels = labels.to(process.device).long()
        if (labels == data.ignore).all():
            continue
        maps, iou, pairs = oracle_labels(segmenter, image, labels, data, autocast)
        for row, predicted in maps.items():
            matrices[row] += confusion(labels, predicted, C, data.ignore)
        matrices["clip"] += confusion(*pairs, C, -1)
        best += iou.tolist()
    for matrix in matrices.values():
        process.sum(matrix)
    return summarize_oracles(matrices, np.array(process.gather(best), np.float32), data)


def summarize_oracles(matrices: dict[str, Tensor], best: np.ndarray, data: DataSet) -> dict:
    """The result of `oracle_analysis` in percent; null where there is nothing to measure."""
    C = len(data.names)
    by_clip = matrices["clip"]
    right = by_clip.diag()
    confused = (by_clip - right.diag()).flatten().topk(min(MAX_CONFUSIONS, C * C))
    return {
        "program": MARK,
        **{row: summarize(matrices[row], data) for row in ROWS},
        "recall": {str(t): ratio(100 * (best >= t).sum(), len(best)) for t in IOU_THRESHOLDS},
        "average_best_overlap": ratio(100 * best.sum(dtype=np.float64), len(best)),
        "masks": len(best),
        "clip_accuracy": ratio(100 * int(right.sum()), int(by_clip.sum())),
        "confusions": [
            [data.names[i // C], data.names[i % C], count]
            for count, i in zip(*(part.tolist() for part in confused), strict=True)
            if count
        ],
    }


def write_analysis(result: dict, out: Path) -> None:
    """Write budget.json and budget.png, and print the table."""
    keys = split_keys(result["as_is"])
    main = "hIoU" if "hIoU" in keys else "mIoU"
    with written(out / "budget.json") as file:
        file.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    with written(out / "budget.png") as file:
        chart(result, keys).save(file, "PNG", pnginfo=PNG_MARK)

    rows = []
    for row, title in ROWS.items():
        ours, base = result[row][main], result["as_is"][main]
        gain = None if ours is None or base is None else ours - base
        rows.append((title, result[row] | {f"{main} gain": gain}))
    print(metric_table([*keys, f"{main} gain"], rows))
    recall = ", ".join(f"{percent(value)} at {t}" for t, value in result["recall"].items())
    best = percent(result["average_best_overlap"])
    print(f"recall of {result['masks']} ground-truth masks: {recall}; average best IoU {best}")
    print(f"CLIP on the ground-truth masks: {percent(result['clip_accuracy'])}% right")
    for name, predicted, count in result["confusions"]:
        print(f"  {count:5} x {name} taken for {predicted}")
    print(f"-> {out / 'budget.json'}, {out / 'budget.png'}")


def chart(result: dict, keys: list[str]) -> Image.Image:
    """Bars of the metrics of every row, and of the proposals' recall."""
    bars = {
        title: {k.removeprefix("mIoU_"): result[row][k] for k in keys}
        for row, title in ROWS.items()
    }
    bars["recall of the GT masks"] = {f"IoU {t}": value for t, value in result["recall"].items()}
    canvas = Image.new("RGB", (760, 20 + 96 * len(bars)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.font = ImageFont.load_default(14)
    for i, (title, values) in enumerate(bars.items()):
        y = 14 + 96 * i
        draw.text((12, y), title, "black")
        for colour, (name, value) in zip(BAR_COLOURS, values.items(), strict=False):
            end = 320 + 3.6 * (value or 0)
            draw.text((250, y), name, "black")
            draw.rectangle((320, y, end, y + 14), colour)
            draw.text((end + 6, y + 1), percent(value), "black")
            y += 20
    return canvas
