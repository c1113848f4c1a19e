"""Set-prediction training (MaskFormer, Cheng et al. 2021): class, focal and dice loss; per-pixel
and contrastive losses.

Everything here is plain PyTorch; CUDA tensors go to a kernel that computes the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import mask_loss
from kernels.jit import use_triton
from zsseg.distributed import Process
from zsseg.matcher import Targets, assign, matching_cost

ALPHA = 0.25  # of the focal loss (Lin et al. 2017), with gamma 2


def loss_normalizers(
    counts: Tensor, queries: int, no_object_weight: float, process: Process
) -> Tensor:
    """What the losses are divided by, [2]: the number of masks, and the queries' class weights.

    Both are means over the processes of the global batch, so that processes that average gradients
    equal one large process. They follow from the counts alone, so that no loss has to wait for
    other processes.
    """
    matched = counts.clamp(max=queries)
    local = torch.stack([counts.sum(), (matched + no_object_weight * (queries - matched)).sum()])
    masks, weights = process.sum(local.float()) / process.world_size
    return torch.stack([masks.clamp(min=1), weights.clamp(min=1e-6)])


def class_loss(
    logits: Tensor, matched: Tensor, classes: Tensor, no_object_weight: float, total: Tensor
) -> Tensor:
    """Weighted cross-entropy of each layer [L], divided by `total`: unmatched queries are the
    no-object class.
    """
    L, B, Q, C = logits.shape
    # The extra query takes what has no match.
    truth = torch.full((L, B, Q + 1), C - 1, device=logits.device)
    truth = truth.scatter(2, matched.where(matched >= 0, Q), classes.expand(L, -1, -1))[..., :Q]
    weight = torch.where(truth == C - 1, no_object_weight, 1.0).flatten()
    losses = weight * F.cross_entropy(
        logits.float().flatten(0, 2), truth.flatten(), reduction="none"
    )
    return losses.view(L, B, Q).sum((1, 2)) / total


def mask_losses(
    masks: Tensor, matched: Tensor, targets: Targets, num_masks: Tensor
) -> tuple[Tensor, Tensor]:
    """Focal and dice loss [L] each of the matched pairs, at the label map's size, summed and
    divided by `num_masks`.
    """
    if use_triton(masks) and mask_loss.is_supported(masks, targets.labels):
        focal, dice = mask_loss.mask_loss(masks, matched, targets.labels, targets.classes)
    else:
        focal, dice = focal_and_dice(masks, matched, targets.labels, targets.classes)
    return focal.sum((1, 2)) / num_masks, dice.sum((1, 2)) / num_masks


def focal_and_dice(
    masks: Tensor, matched: Tensor, labels: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor]:
    """mask logits [L, B, Q, h, w], matched [L, B, T] (query of each target or -1), labels [B, H,
    W], classes [B, T] -> focal and dice loss of each pair [L, B, T], 0 where there is no match.
    fp32, or fp64 where the masks are.
    """
    T, (h, w) = classes.shape[1], masks.shape[-2:]
    dtype = torch.promote_types(masks.dtype, torch.float32)
    if not T:
        return (masks[:, :, :0, 0, 0].to(dtype),) * 2  # so that the masks get a gradient, of zeros
    t = labels[:, None] == classes[:, :, None, None]  # [B, T, H, W]
    alpha = torch.where(t, ALPHA, 1 - ALPHA).to(dtype)
    focal, dice = [], []
    for layer_masks, query in zip(masks, matched, strict=True):
        index = query.clamp(min=0)[..., None, None].expand(-1, -1, h, w)
        x = layer_masks.gather(1, index).to(dtype)  # [B, T, h, w]
        # [B, T, H, W]
        x = F.interpolate(x, labels.shape[-2:], mode="bilinear", align_corners=False)
        x_true = torch.where(t, x, -x)  # the logit of what is true
        missed = (-x_true).sigmoid()  # 1 - p of it
        loss = -(alpha * missed**2 * F.logsigmoid(x_true)).mean((2, 3))
        p = x.sigmoid()
        ratio = (2 * (p * t).sum((2, 3)) + 1) / (p.sum((2, 3)) + t.sum((2, 3)) + 1)
        focal.append(torch.where(query >= 0, loss, 0))
        dice.append(torch.where(query >= 0, 1 - ratio, 0))
    return torch.stack(focal), torch.stack(dice)


def segmentation_losses(
    logits: Tensor,
    masks: Tensor,
    targets: Targets,
    normalizers: Tensor,
    focal_weight: float,
    dice_weight: float,
    no_object_weight: float,
) -> dict[str, Tensor]:
    """The weighted loss terms of every decoder layer: {"class": [L], "focal": [L], "dice": [L]};
    their sum is the loss.

    logits [L, B, Q, C+1], masks [L, B, Q, h, w], `normalizers` [2] from `loss_normalizers`.
    A batch without targets still gives every output a gradient. A matching cost that is not finite
    makes the loss NaN. Nothing is read by the host, so that torch.compile takes it whole and a GPU
    never waits.
    """
    num_masks, weights = normalizers
    with torch.no_grad():
        matched, bad = assign(
            matching_cost(logits, masks, targets, focal_weight, dice_weight), targets.counts
        )
    focal, dice = mask_losses(masks, matched, targets, num_masks)
    # So that every gradient is NaN, too.
    focal = focal * torch.where(bad.any(1), torch.nan, 1.0)
    return {
        "class": class_loss(logits, matched, targets.classes, no_object_weight, weights),
        "focal": focal_weight * focal,
        "dice": dice_weight * dice,
    }


def per_pixel_loss(logits: Tensor, labels: Tensor, ignore: int) -> Tensor:
    """Cross-entropy at the label maps' size: logits [B, C, h, w], labels [B, H, W] -> the mean over
    the pixels that count.

    0 where none does.
    """
    full = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(full, labels.long(), ignore_index=ignore, reduction="sum")
    return total / (labels != ignore).sum().clamp(min=1)
