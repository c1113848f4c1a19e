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
    counts: Tensor  # [B] int64

    def to(self, device: torch.device) -> "Targets":
        return Targets(*(t.to(device, non_blocking=True) for t in (self.labels, self.classes, self.counts)))

    def pin_memory(self) -> "Targets":
        return Targets(*(t.pin_memory() for t in (self.labels, self.classes, self.counts)))

    def padded(self) -> "Targets":
        """T raised to 15, 31, 63 or more: a compiled program serves one T, and the matching kernel a power of two less one."""
        T = self.classes.shape[1]
        wide = T if T == 64 else max(2 ** T.bit_length() - 1, 15)  # 64 is what the assignment kernel still takes
        return Targets(self.labels, F.pad(self.classes, (0, wide - T)), self.counts)


def matching_cost(logits: Tensor, masks: Tensor, targets: Targets, focal_weight: float, dice_weight: float) -> Tensor:
    """Cost of every query for every target: -p[class] + focal + dice, all layers and pictures at once.

    logits [L, B, Q, C+1], masks [L, B, Q, h, w] -> fp32 [L, B, Q, T]; columns beyond a picture's count mean nothing.
    Label maps are brought to h x w by nearest sampling.
    """
    labels = F.interpolate(targets.labels[:, None].float(), masks.shape[-2:], mode="nearest")[:, 0].int()  # [B, h, w]
    return matching.matching_cost(logits, masks, labels, targets.classes, focal_weight, dice_weight)


def assign(cost: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum-cost assignment per layer and picture: cost [L, B, Q, T] -> the query of each target, int64 [L, B, T].

    -1 where a target is padding, or is left without a query because there are fewer queries than targets. Costs that are
    not finite count as a million; bool [L, B] says where there were any.
    """
    return assignment(cost, counts)


def normalizers(counts: Tensor, queries: int, no_object_weight: float, process: Process) -> Tensor:
    """What the losses are divided by, [2]: the number of masks, and the queries' class weights.

    Both are means over the processes of the global batch, so that processes that average gradients equal one large
    process. They follow from the counts alone, so that no loss has to wait for other processes.
    """
    matched = counts.clamp(max=queries)
    local = torch.stack([counts.sum(), (matched + no_object_weight * (queries - matched)).sum()])
    masks, weights = process.sum(local.float()) / process.world
    return torch.stack([masks.clamp(min=1), weights.clamp(min=1e-6)])


def class_loss(logits: Tensor, matched: Tensor, classes: Tensor, no_object_weight: float, total: Tensor) -> Tensor:
    """Weighted cross-entropy of each layer [L], divided by `total`: unmatched queries are the no-object class."""
    L, B, Q, C = logits.shape
    truth = torch.full((L, B, Q + 1), C - 1, device=logits.device)  # the extra query takes what has no match
    truth = truth.scatter(2, matched.where(matched >= 0, Q), classes.expand(L, -1, -1))[..., :Q]
    weight = torch.where(truth == C - 1, no_object_weight, 1.0).flatten()
    losses = weight * F.cross_entropy(logits.float().flatten(0, 2), truth.flatten(), reduction="none")
    return losses.view(L, B, Q).sum((1, 2)) / total


def mask_losses(masks: Tensor, matched: Tensor, targets: Targets, num_masks: Tensor) -> tuple[Tensor, Tensor]:
    """Focal and dice loss [L] each of the matched pairs, at the label map's size, summed and divided by `num_masks`."""
    focal, dice = mask_loss(masks, matched, targets.labels, targets.classes)  # [L, B, T]
    return focal.sum((1, 2)) / num_masks, dice.sum((1, 2)) / num_masks


def segmentation_losses(logits: Tensor, masks: Tensor, targets: Targets, scales: Tensor, focal_weight: float,
                        dice_weight: float, no_object_weight: float) -> dict[str, Tensor]:  # fmt: skip
    """The weighted loss terms of every decoder layer: {"class": [L], "focal": [L], "dice": [L]}; their sum is the loss.

    logits [L, B, Q, C+1], masks [L, B, Q, h, w], `scales` [2] from `normalizers`. A batch without targets still gives every
    output a gradient. A matching cost that is not finite makes the loss NaN. Nothing is read by the host, so that
    torch.compile takes it whole and a GPU never waits.
    """
    num_masks, weights = scales
    masks = masks.contiguous()  # once for all operators: the network's product leaves [B, L, Q, h, w] in memory
    with torch.no_grad():
        matched, bad = assign(matching_cost(logits, masks, targets, focal_weight, dice_weight), targets.counts)
    focal, dice = mask_losses(masks, matched, targets, num_masks)
    unused = torch.where(bad.any(1), torch.nan, 0.0) * masks.float().mean((1, 2, 3, 4))
    return {
        "class": class_loss(logits, matched, targets.classes, no_object_weight, weights),
        "focal": focal_weight * focal + unused,
        "dice": dice_weight * dice,
    }


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of groups whose N pairs are all distinct: image, text [G, N, D] -> scalar."""
    logits = scale.exp().clamp(max=100) * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).mT  # [G, N, N]
    truth = torch.arange(logits.shape[-1], device=logits.device).expand(len(logits), -1)
    return (F.cross_entropy(logits.mT, truth) + F.cross_entropy(logits, truth)) / 2


def per_pixel_loss(logits: Tensor, labels: Tensor, ignore: int) -> Tensor:
    """Cross-entropy at the label maps' size: logits [B, C, h, w], labels [B, H, W] -> the mean over the pixels that count.

    0 where none does.
    """
    full = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(full, labels.long(), ignore_index=ignore, reduction="sum")
    return total / (labels != ignore).sum().clamp(min=1)
