"""Set-prediction training (MaskFormer, Cheng et al. 2021, section 3.2): class, focal and dice loss;
the one-stage baseline's cross-entropy.

Plain PyTorch; CUDA tensors go to a kernel that computes the same.
"""

import torch
import torch.nn.functional as F

from kernels import mask_loss
from kernels.jit import use_triton
from zsseg.matcher import assign, matching_cost


def loss_normalizers(counts, num_queries, no_object_weight, sum, world_size):
    """The divisors of the losses, fp32 [2]: the number of masks, and of the queries' class weights.

    Both are means over the processes of the global batch (`sum` adds them up), so that processes
    that average gradients equal one large process. They follow from the counts [B] alone, so that
    no loss has to wait for other processes.
    """
    matched = counts.clamp(max=num_queries)
    weights = matched + no_object_weight * (num_queries - matched)
    local = torch.stack([counts.sum(), weights.sum()])
    masks, weights = sum(local.float()) / world_size
    return torch.stack([masks.clamp(min=1), weights.clamp(min=1e-6)])


def class_loss(class_logits, mask_logits, matched, targets, normalizers, train):
    """Weighted cross-entropy; the target of an unmatched query is the no-object class."""
    L, B, Q, C = class_logits.shape
    target = torch.full((L, B, Q + 1), C - 1, device=class_logits.device)
    query = matched.where(matched >= 0, Q)  # column Q collects unmatched targets
    target = target.scatter(2, query, targets.classes.expand(L, -1, -1))[..., :Q]
    weight = torch.where(target == C - 1, train.no_object_weight, 1.0)
    logits = class_logits.float().flatten(0, 2)
    losses = F.cross_entropy(logits, target.flatten(), reduction="none").view_as(weight)
    return {"class": (weight * losses).sum((1, 2)) / normalizers[1]}


def mask_losses(class_logits, mask_logits, matched, targets, normalizers, train):
    """Focal and dice loss of the matched pairs, at the label map's size."""
    compute = focal_and_dice
    if use_triton(mask_logits) and mask_loss.is_supported(mask_logits, targets.labels):
        compute = mask_loss.mask_loss
    focal, dice = compute(mask_logits, matched, targets.labels, targets.classes)
    return {
        "focal": train.focal_weight * (focal.sum((1, 2)) / normalizers[0]),
        "dice": train.dice_weight * (dice.sum((1, 2)) / normalizers[0]),
    }


def focal_and_dice(masks, matched, labels, classes):
    """mask logits [L, B, Q, h, w], matched [L, B, T] (query of each target or -1), labels [B, H,
    W], classes [B, T] -> focal and dice loss of each pair [L, B, T], 0 for unmatched targets; fp32,
    or fp64 for fp64 masks.
    """
    dtype = torch.promote_types(masks.dtype, torch.float32)
    if not classes.shape[1]:
        return (masks[:, :, :0, 0, 0].to(dtype),) * 2  # so that the masks get a gradient, of zeros
    t = (labels[:, None] == classes[:, :, None, None]).to(dtype)  # [B, T, H, W]
    alpha = 0.75 - 0.5 * t  # of the focal loss (Lin et al. 2017); gamma is 2
    sign = 1 - 2 * t
    area = t.sum((2, 3))
    losses = []
    for layer_masks, query in zip(masks, matched, strict=True):
        index = query.clamp(min=0)[..., None, None]
        x = layer_masks.take_along_dim(index, 1).to(dtype)  # [B, T, h, w]
        # The logit and the probability of what is false
        x = sign * F.interpolate(x, labels.shape[-2:], mode="bilinear")
        missed = x.sigmoid()
        focal = (alpha * missed**2 * F.softplus(x)).mean((2, 3))
        # Mask and target overlap in the area less what is missed of it, and differ in all that is
        # missed.
        overlap = area - (missed * t).sum((2, 3))
        ratio = (2 * overlap + 1) / (2 * overlap + missed.sum((2, 3)) + 1)
        losses.append(torch.where(query >= 0, torch.stack([focal, 1 - ratio]), 0))
    return torch.stack(losses, 1).unbind()


# Each maps class logits [L, B, Q, C+1], mask logits [L, B, Q, h, w], the query of each target
# [L, B, T] (or -1), Targets, normalizers [2] and the section `train` to {name: [L]}: weighted terms
# of every decoder layer, which are summed up and logged by their names.
LOSSES = {"class": class_loss, "mask": mask_losses}


def segmentation_losses(class_logits, mask_logits, targets, normalizers, train):
    """All weighted loss terms of every decoder layer, {"class": [L], "focal": [L], "dice": [L]};
    their sum is the loss. Shapes as for LOSSES; `normalizers` from `loss_normalizers`.

    A batch without targets still gives every output a gradient. A matching cost that is not finite
    makes the losses NaN. The host reads nothing, so that torch.compile takes it whole and a GPU
    never waits.
    """
    with torch.no_grad():
        cost = matching_cost(
            class_logits, mask_logits, targets, train.focal_weight, train.dice_weight
        )
        matched, bad = assign(cost, targets.counts)
    factor = torch.where(bad.any(1), torch.nan, 1.0)  # [L]; every gradient is NaN, too
    losses = {}
    for loss in LOSSES.values():
        terms = loss(class_logits, mask_logits, matched, targets, normalizers, train)
        losses |= {name: factor * term for name, term in terms.items()}
    return losses


def per_pixel_loss(logits, labels, count):
    """Cross-entropy of logits [B, C, H, W] and labels [B, H, W], the sum over the pixels with a
    class, whose labels are below C, divided by `count`.
    """
    C = logits.shape[1]
    labels = labels.long().clamp(max=C)
    return F.cross_entropy(logits, labels, ignore_index=C, reduction="sum") / count
