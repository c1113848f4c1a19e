"""Set-prediction training (MaskFormer, Cheng et al. 2021): matching cost, assignment, losses; CLIP's contrastive loss."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

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
    L, _, Q = masks.shape[:3]
    h, w = masks.shape[-2:]
    labels = F.interpolate(targets.labels[:, None].float(), (h, w), mode="nearest")  # [B, 1, h, w]
    truth = (labels == targets.classes[:, :, None, None]).flatten(2).float()  # [B, T, hw]
    x = masks.float().flatten(3)  # [L, B, Q, hw]
    p = x.sigmoid()
    positive = 0.25 * (1 - p) ** 2 * F.softplus(-x)
    negative = 0.75 * p**2 * F.softplus(x)
    focal = torch.einsum("lbqn,btn->lbqt", positive, truth) + torch.einsum("lbqn,btn->lbqt", negative, 1 - truth)
    overlap = torch.einsum("lbqn,btn->lbqt", p, truth)
    dice = 1 - (2 * overlap + 1) / (p.sum(-1)[..., None] + truth.sum(-1)[:, None] + 1)
    index = targets.classes[None, :, None].expand(L, -1, Q, -1)  # [L, B, Q, T]
    probability = logits.float().softmax(-1).gather(-1, index)
    return -probability + focal_weight * focal / (h * w) + dice_weight * dice


def assign(cost: Tensor, counts: Tensor) -> Tensor:
    """Minimum-cost assignment per layer and picture: cost [L, B, Q, T] -> the query of each target, int64 [L, B, T].

    -1 where a target is padding, or is left without a query because there are fewer queries than targets.
    """
    L, B, _, T = cost.shape
    matched = torch.full((L, B, T), -1, dtype=torch.int64)
    costs = cost.nan_to_num(1e6, 1e6, -1e6).cpu().numpy()  # one transfer; the loss itself shows what was not finite
    for layer in range(L):
        for image, count in enumerate(counts.tolist()):
            query, target = linear_sum_assignment(costs[layer, image, :, :count])
            matched[layer, image, torch.from_numpy(target)] = torch.from_numpy(query)
    return matched.to(cost.device)


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
    real = torch.arange(targets.classes.shape[1]) < targets.counts[:, None]  # [B, T], on the CPU: no sync
    image, target = (i.to(masks.device) for i in real.nonzero(as_tuple=True))  # [N] pairs
    truth = (targets.labels[image] == targets.classes[image, target][:, None, None]).flatten(1).float()  # [N, HW]
    focal, dice = [], []
    for layer_masks, layer_matched in zip(masks, matched, strict=True):
        query = layer_matched[image, target]  # [N]
        x = layer_masks[image, query.clamp(min=0)].float()  # [N, h, w]
        x = F.interpolate(x[:, None], targets.labels.shape[-2:], mode="bilinear", align_corners=False).flatten(1)
        has_query = (query >= 0).float()
        focal.append((sigmoid_focal_loss(x, truth, 0.25, 2).mean(1) * has_query).sum())
        p = x.sigmoid()
        ratio = (2 * (p * truth).sum(1) + 1) / (p.sum(1) + truth.sum(1) + 1)
        dice.append(((1 - ratio) * has_query).sum())
    return torch.stack(focal) / num_masks, torch.stack(dice) / num_masks


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
