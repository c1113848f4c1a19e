"""Set-prediction training (MaskFormer, Cheng et al. 2021): matching cost, assignment, losses; CLIP's contrastive loss."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import matching_cost as matching
from kernels.assignment import assignment
from kernels.mask_loss import mask_loss
from zsseg.run import Process


@dataclass
class Targets:
    """What is in each picture, padded to the largest count T; the mask of a target is `labels == class`."""
    labels: Tensor  # [B, H, W], class ids and the ignore value
    classes: Tensor  # [B, T] int64, padded with 0
    counts: Tensor  # [B] int64, on the CPU


def matching_cost(logits: Tensor, masks: Tensor, targets: Targets, focal_weight: float, dice_weight: float) -> Tensor:
    """Cost of every query for every target: -p[class] + focal + dice, all layers and pictures at once.

    logits [L, B, Q, C+1], masks [L, B, Q, h, w] -> fp32 [L, B, Q, T]; columns beyond a picture's count mean nothing.
    Label maps are brought to h x w by nearest sampling.
    """
    labels = F.interpolate(targets.labels[:, None].float(), masks.shape[-2:], mode="nearest")[:, 0].int()  # [B, h, w]
    return matching.matching_cost(logits, masks, labels, targets.classes, focal_weight, dice_weight)


def assign(cost: Tensor, counts: Tensor) -> Tensor:
    """Minimum-cost assignment per layer and picture: cost [L, B, Q, T] -> the query of each target, int64 [L, B, T].

    -1 where a target is padding, or is left without a query because there are fewer queries than targets. Costs that are
    not finite count as a million; the loss itself shows what was not finite.
    """
    return assignment(cost, counts.to(cost.device, non_blocking=True))[0]


def class_loss(logits: Tensor, matched: Tensor, classes: Tensor, no_object_weight: float, process: Process) -> Tensor:
    """Weighted cross-entropy of each layer [L]: unmatched queries are the no-object class.

    The weighted mean runs over the global batch, so that processes that average gradients equal one large process.
    """
    L, B, Q, C = logits.shape
    truth = torch.full((L, B, Q + 1), C - 1, device=logits.device)  # the extra query takes what has no match
    truth = truth.scatter(2, matched.where(matched >= 0, Q), classes.expand(L, -1, -1))[..., :Q]
    weight = torch.ones(C, device=logits.device)
    weight[-1] = no_object_weight
    losses = F.cross_entropy(logits.float().flatten(0, 2), truth.flatten(), weight, reduction="none")
    total = process.sum(weight[truth].sum((1, 2)).detach()) / process.world  # [L]
    return losses.view(L, B, Q).sum((1, 2)) / total


def mask_losses(masks: Tensor, matched: Tensor, targets: Targets, num_masks: Tensor) -> tuple[Tensor, Tensor]:
    """Focal and dice loss [L] each of the matched pairs, at the label map's size, summed and divided by `num_masks`."""
    focal, dice = mask_loss(masks, matched, targets.labels, targets.classes)  # [L, B, T]
    return focal.sum((1, 2)) / num_masks, dice.sum((1, 2)) / num_masks


def segmentation_losses(logits: Tensor, masks: Tensor, targets: Targets, focal_weight: float, dice_weight: float,
                        no_object_weight: float, process: Process) -> dict[str, Tensor]:  # fmt: skip
    """The weighted loss terms of every decoder layer: {"class": [L], "focal": [L], "dice": [L]}; their sum is the loss.

    logits [L, B, Q, C+1], masks [L, B, Q, h, w]. A batch without targets still gives every output a gradient.
    """
    with torch.no_grad():
        matched = assign(matching_cost(logits, masks, targets, focal_weight, dice_weight), targets.counts)
    num_masks = process.sum(targets.counts.sum().to(logits.device, torch.float32)) / process.world
    focal, dice = mask_losses(masks, matched, targets, num_masks.clamp(min=1))
    unused = 0 * masks.float().mean((1, 2, 3, 4))
    return {
        "class": class_loss(logits, matched, targets.classes, no_object_weight, process),
        "focal": focal_weight * focal + unused,
        "dice": dice_weight * dice,
    }


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of groups whose N pairs are all distinct: image, text [G, N, D] -> scalar."""
    logits = scale.exp().clamp(max=100) * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).mT  # [G, N, N]
    truth = torch.arange(logits.shape[-1], device=logits.device).expand(len(logits), -1)
    return (F.cross_entropy(logits.mT, truth) + F.cross_entropy(logits, truth)) / 2
