"""What limits the accuracy, the masks or the classes? Oracles replace one of them by the ground
truth.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from zsseg.config import Config
from zsseg.data import TestImages
from zsseg.datasets import DataSet, dataset
from zsseg.distributed import Process
from zsseg.evaluate import name_gt_masks, own_images
from zsseg.metrics import confusion, metric_table, percent, shown, summarize
from zsseg.segmenter import Segmenter
from zsseg.utils import UserError, write_json

ROWS = {
    "as_is": "as it is",
    "true_classes": "predicted masks, GT classes",
    "true_masks": "GT masks, predicted classes",
    "both": "GT masks, GT classes",
}
IOU_THRESHOLDS = (0.5, 0.7, 0.9)  # of the proposals' recall
MAX_CONFUSIONS = 10


def mask_iou(masks: Tensor, targets: Tensor) -> Tensor:
    """IoU of masks bool [Q, H, W] with ground-truth masks bool [T, H, W], over the pixels of all
    these: fp32 [Q, T].
    """
    masks = (masks & targets.any(0)).flatten(1).float()
    targets = targets.flatten(1).float()
    intersection = masks @ targets.T
    union = masks.sum(1)[:, None] + targets.sum(1) - intersection
    return intersection / union.clamp(min=1)


def oracle_labels(
    segmenter: Segmenter, image: Tensor, labels: Tensor, data: DataSet, autocast: Callable
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """One image, uint8 [3, H, W], with its ground truth int64 [h, w]: a label map for every row of
    ROWS, and of each ground-truth mask the best IoU, the class, and CLIP's class [T].

    "true_classes": each ground-truth mask's proposal (best total IoU, one to one) gets its class,
    all others none. "true_masks": the pixels of a ground-truth mask get the class that its
    proposal's class probabilities and CLIP, on the ground-truth mask, decide together. Masks are
    those at network-input size: a class that vanishes there counts as wrong in both rows with
    ground-truth masks.
    """
    C = len(data.names)
    size = tuple(labels.shape)
    with autocast():
        proposals = segmenter.propose(image)
        classes, targets, region = name_gt_masks(segmenter, image, labels, data.ignore)
    scores = segmenter.ensemble(proposals)
    iou = mask_iou(segmenter.binary_masks(proposals), targets)
    matched = linear_sum_assignment(-iou.cpu().numpy())
    query, target = (torch.from_numpy(index).to(image.device) for index in matched)
    overlaps = iou[query, target] > 0
    true_scores = torch.zeros_like(scores)
    true_scores[query, classes[target]] = overlaps.float()

    # A ground-truth mask without a proposal: only CLIP decides.
    head = proposals.class_probs
    if head is not None:
        head = torch.ones(len(classes), C, device=image.device)
        head[target[overlaps]] = proposals.class_probs[query[overlaps]]
    on_targets = replace(
        proposals,
        class_probs=head,
        clip_probs=None if proposals.clip_probs is None else region,
        valid=torch.ones_like(classes, dtype=torch.bool),
    )
    predicted = segmenter.ensemble(on_targets).argmax(1)

    # A class without a pixel at network-input size becomes another class.
    wrong = (torch.arange(max(data.ignore, C) + 1, device=image.device) + 1) % C
    maps = {
        "as_is": segmenter.label_map(scores, proposals, size)[0],
        "true_classes": segmenter.label_map(true_scores, proposals, size)[0],
        "true_masks": wrong.scatter(0, classes, predicted)[labels],
        "both": wrong.scatter(0, classes, classes)[labels],
    }
    return maps, iou.amax(0), classes, predicted if region is None else region.argmax(1)


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
    masks, over a split, in percent, None for nothing to measure; complete on the first process.

    `seen`: ids of the classes that count as seen in the ensemble; None: those that the set is
    trained on.
    """
    options = config.eval
    if not config.model.proposals or options.sizes or options.flip or options.window:
        todo = "leave eval.sizes, eval.flip and eval.window out; the one-stage baseline has none"
        raise UserError("--budget", "measures the proposals of one view of an image", todo)
    data = dataset(config.data)
    C = len(data.names)
    segmenter.eval().set_classes(data.names, data.trained if seen is None else seen)
    autocast = lambda: process.autocast(config.model.bf16)  # of the networks only
    zeros = lambda: torch.zeros(C, C, dtype=torch.int64, device=process.device)
    matrices = {row: zeros() for row in [*ROWS, "clip"]}
    overlaps = []  # IoU of each ground-truth mask with its best proposal

    images = TestImages(config.data, root, split)
    own = own_images(images, process, config.data.workers, f"analyse {split}")
    for _, [image], labels, _ in own:
        if (labels == data.ignore).all():
            continue
        maps, iou, *pairs = oracle_labels(segmenter, image, labels, data, autocast)
        for row, predicted in maps.items():
            matrices[row] += confusion(labels, predicted, C, data.ignore)
        matrices["clip"] += confusion(*pairs, C, -1)
        overlaps += iou.tolist()
    for matrix in matrices.values():
        process.sum(matrix)

    return summarize_oracles(matrices, torch.tensor(process.gather(overlaps)), data)


def summarize_oracles(matrices: dict[str, Tensor], overlaps: Tensor, data: DataSet) -> dict:
    """The result of `oracle_analysis`."""
    C = len(data.names)
    share = lambda values: 100 * float(values.double().mean()) if len(values) else None
    by_clip = matrices["clip"]
    confused = (by_clip - by_clip.diag().diag()).flatten().topk(min(MAX_CONFUSIONS, C * C))
    return {
        **{row: summarize(matrices[row], data) for row in ROWS},
        "recall": {str(t): share(overlaps >= t) for t in IOU_THRESHOLDS},
        "average_best_overlap": share(overlaps),
        "masks": len(overlaps),
        "clip_accuracy": summarize(by_clip, data)["pAcc"],
        "confusions": [
            [data.names[i // C], data.names[i % C], count]
            for count, i in zip(*(part.tolist() for part in confused), strict=True)
            if count
        ],
    }


def write_analysis(result: dict, out: Path) -> None:
    """Write budget.json, and print the table."""
    write_json(out / "budget.json", result)
    rows = [(title, result[row]) for row, title in ROWS.items()]
    print(metric_table(shown(result["as_is"]), rows))
    recall = ", ".join(f"{percent(value)} at {t}" for t, value in result["recall"].items())
    best = percent(result["average_best_overlap"])
    print(f"recall of {result['masks']} ground-truth masks: {recall}; average best IoU {best}")
    print(f"CLIP on the ground-truth masks: {percent(result['clip_accuracy'])}% right")
    for name, predicted, count in result["confusions"]:
        print(f"  {count:5} x {name} predicted as {predicted}")
    print(f"-> {out / 'budget.json'}")
