"""What limits the accuracy, the masks or the classes? Oracles replace one of them by the ground
truth.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from zsseg.datasets import dataset
from zsseg.evaluate import own_images
from zsseg.metrics import confusion, metric_table, percent, summarize
from zsseg.regions import box_of
from zsseg.utils import UserError, write_json

ROWS = {
    "as_is": "as it is",
    "true_classes": "predicted masks, GT classes",
    "true_masks": "GT masks, predicted classes",
    "both": "GT masks, GT classes",
}
IOU_THRESHOLDS = (0.5, 0.7, 0.9)  # of the proposals' recall


def mask_iou(masks, targets):
    """IoU of masks bool [Q, H, W] with ground-truth masks bool [T, H, W], over the pixels of all
    these: fp32 [Q, T].
    """
    masks = (masks & targets.any(0)).flatten(1).float()
    targets = targets.flatten(1).float()
    intersection = masks @ targets.T
    union = masks.sum(1)[:, None] + targets.sum(1) - intersection
    return intersection / union.clamp(min=1)


def count_oracles(segmenter, image, labels, data, autocast):
    """Of one image, uint8 [3, H, W], with its ground truth int64 [h, w]: the confusion matrices of
    ROWS and, last, of CLIP's classes of the T ground-truth masks, [5, C, C]; the best IoU of each
    of these masks, [T].

    "true_classes": each ground-truth mask's proposal (best total IoU, one to one) gets its class,
    all others none. "true_masks": the pixels of a ground-truth mask get the class that its
    proposal's class probabilities and CLIP, on the ground-truth mask, decide together. Masks are
    those at network-input size: a class that vanishes there counts as wrong in both rows with
    ground-truth masks.
    """
    C = len(data.names)
    size = tuple(labels.shape)
    small = F.interpolate(labels[None, None].float(), image.shape[1:], mode="nearest")[0].long()
    classes = small[small != data.ignore].unique()
    targets = small == classes[:, None, None]
    with autocast:  # of the networks only
        proposals = segmenter.propose(image)
        clip_probs = segmenter.region_logits(image, targets, box_of(targets)).softmax(-1)
    scores = segmenter.ensemble(proposals)
    iou = mask_iou(segmenter.binary_masks(proposals), targets)
    overlaps = iou.cpu().numpy()
    pairs = np.stack(linear_sum_assignment(overlaps, maximize=True))
    query, target = pairs[:, overlaps[*pairs] > 0]
    true_scores = torch.zeros_like(scores)
    true_scores[query, classes[target]] = 1

    clip = None if proposals.clip_probs is None else clip_probs
    head = proposals.class_probs
    if head is not None:
        # A ground-truth mask without a proposal: only CLIP decides.
        head = scores.new_ones(len(classes), C)
        head[target] = proposals.class_probs[query]
    on_targets = replace(proposals, valid=classes >= 0, clip_probs=clip, class_probs=head)
    predicted = segmenter.ensemble(on_targets).argmax(1)

    # A class without a pixel at network-input size becomes another class.
    wrong = (torch.arange(data.ignore + 1, device=image.device) + 1) % C
    maps = [segmenter.label_map(s, proposals, size)[0] for s in (scores, true_scores)]
    maps += [wrong.scatter(0, classes, found)[labels] for found in (predicted, classes)]
    counts = [confusion(labels, found, C, data.ignore) for found in maps]
    return torch.stack([*counts, confusion(classes, clip_probs.argmax(1), C, -1)]), iou.amax(0)


@torch.inference_mode()
def oracle_analysis(segmenter, config, root, process, split, seen):
    """The metrics of every row, the recall of the proposals, and CLIP's accuracy on ground-truth
    masks, over a split, in percent, None for nothing to measure; complete on the first process.

    `seen`: ids of the classes that count as seen in the ensemble.
    """
    if config.eval.views or not config.model.proposals or segmenter.clip is None:
        why = "measures the proposals of one view of an image, and CLIP"
        raise UserError("--budget", why, "leave out eval.sizes, eval.flip and eval.window")
    data = dataset(config.data)
    segmenter.eval().set_classes(data.names, seen)
    autocast = process.autocast(config.model.bf16)
    matrices = 0  # int64 [5, C, C]
    overlaps = []  # IoU of each ground-truth mask with its best proposal
    for _, _, [image], labels in own_images(config, root, process, split, "analyse"):
        counts, iou = count_oracles(segmenter, image, labels, data, autocast)
        matrices = matrices + counts.cpu()
        overlaps += iou.tolist()
    *matrices, by_clip = sum(process.gather([matrices]))
    overlaps = torch.tensor(process.gather(overlaps))

    share = lambda values: 100 * float(values.double().mean()) if len(values) else None
    return {
        **{row: summarize(matrix, data) for row, matrix in zip(ROWS, matrices, strict=True)},
        "recall": {str(t): share(overlaps >= t) for t in IOU_THRESHOLDS},
        "average_best_overlap": share(overlaps),
        "masks": len(overlaps),
        "clip_accuracy": summarize(by_clip, data)["pAcc"],
    }


def write_analysis(result, out):
    """Write budget.json, and print the table."""
    write_json(out / "budget.json", result)
    print(metric_table([(title, result[row]) for row, title in ROWS.items()]))
    recall = ", ".join(f"{percent(value)} at {t}" for t, value in result["recall"].items())
    best = f"average best IoU {percent(result['average_best_overlap'])}"
    print(f"recall of {result['masks']} ground-truth masks: {recall}; {best}")
    print(f"CLIP names {percent(result['clip_accuracy'])}% of them rightly")
    print(f"-> {out / 'budget.json'}")
