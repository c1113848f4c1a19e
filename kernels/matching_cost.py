"""Matching cost of every query for every target (MaskFormer, Cheng et al. 2021), all layers and
images in one launch.

`-p[class] + focal_weight * focal + dice_weight * dice`, from mask logits and label maps at stride
4. No [Q, hw] intermediate is stored: a tile of logits becomes its focal terms in registers,
and products with the 0/1 targets (compared on the fly from label map and class) accumulate over the
pixels.
"""

import torch
from torch import Tensor

from kernels.jit import (
    cdiv,
    contiguous,
    dot_exact,
    jit,
    multiprocessors,
    next_power_of_2,
    on_device,
    plane_contiguous,
    sigmoid_parts,
    tl,
)

SUMS = {"BLOCK_Q": 64, "BLOCK_HW": 32, "num_warps": 4, "num_stages": 3, "maxnreg": 168}
LOGITS_HELD = 8192  # class logits that a block of the second kernel holds


@jit
def matching_cost_sums_kernel(
    masks_ptr,  # [L, B, Q, hw], any float, the pixels dense
    labels_ptr,  # int32 [B, hw]
    classes_ptr,  # int32 [B, T]
    focal_ptr,  # out: fp32 [S, B, L*Q, T], of S parts of the pixels
    overlap_ptr,  # out: fp32 [S, B, L*Q, T]
    mask_area_ptr,  # out: fp32 [S, B, L*Q]
    target_area_ptr,  # out: fp32 [S, B, T]
    B,
    Q,
    T,
    HW,
    rows,
    part,
    stride_l,
    stride_b,
    stride_q,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HW: tl.constexpr,
):
    """With p = sigmoid(x), over one part of the pixels n,

        focal[q, t] = sum_n negative[q, n] + sum_n (positive - negative)[q, n] target[t, n]
        overlap[q, t] = sum_n p[q, n] target[t, n]

    where positive = 0.25 (1 - p)^2 softplus(-x) is a pixel's loss if the target is 1 there, and
    negative = 0.75 p^2 softplus(x) if it is 0; and the areas sum_n p, sum_n target. The block owns
    BLOCK_Q of the L*Q rows and BLOCK_T targets of one image, for one part.
    """
    tiles_t = tl.cdiv(T, BLOCK_T)
    tile_q = tl.program_id(0) // tiles_t
    tile_t = tl.program_id(0) % tiles_t
    image = tl.program_id(1)
    split = tl.program_id(2)
    row = tile_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_row = row < rows
    mask_t = t < T
    offs_row = (row // Q).to(tl.int64) * stride_l + (row % Q).to(tl.int64) * stride_q
    x_ptrs = masks_ptr + image.to(tl.int64) * stride_b + offs_row[:, None]
    label_ptrs = labels_ptr + image.to(tl.int64) * HW
    target_class = tl.load(classes_ptr + image * T + t, mask=mask_t, other=-1)
    acc_focal = tl.zeros((BLOCK_Q, BLOCK_T), tl.float32)
    acc_overlap = tl.zeros((BLOCK_Q, BLOCK_T), tl.float32)
    acc_negative = tl.zeros((BLOCK_Q,), tl.float32)
    acc_p = tl.zeros((BLOCK_Q,), tl.float32)
    acc_target = tl.zeros((BLOCK_T,), tl.float32)
    for start in tl.range(split * part, tl.minimum((split + 1) * part, HW), BLOCK_HW):
        n = start + tl.arange(0, BLOCK_HW)
        mask_n = n < HW
        mask = mask_row[:, None] & mask_n[None, :]
        # Far below any threshold, so that p and both losses of the padding are 0.
        x = tl.load(x_ptrs + n[None, :], mask=mask, other=float("-inf")).to(tl.float32)
        label = tl.load(label_ptrs + n, mask=mask_n, other=-2)
        target = (label[:, None] == target_class[None, :]).to(tl.float32)  # [BLOCK_HW, BLOCK_T]
        p, q, log1pexp = sigmoid_parts(x)
        positive = 0.25 * q * q * (log1pexp + tl.maximum(-x, 0.0))
        positive = tl.where(mask, positive, 0.0)
        negative = 0.75 * p * p * (log1pexp + tl.maximum(x, 0.0))
        acc_focal = dot_exact(positive - negative, target, acc_focal)
        acc_overlap = dot_exact(p, target, acc_overlap)
        acc_negative += tl.sum(negative, 1)
        acc_p += tl.sum(p, 1)
        acc_target += tl.sum(target, 0)
    base = (split * B + image).to(tl.int64)
    mask = mask_row[:, None] & mask_t[None, :]
    offs = (base * rows + row[:, None]) * T + t[None, :]
    tl.store(focal_ptr + offs, acc_focal + acc_negative[:, None], mask=mask)
    tl.store(overlap_ptr + offs, acc_overlap, mask=mask)
    # The same in every tile of the other axis: the first one writes.
    tl.store(mask_area_ptr + base * rows + row, acc_p, mask=mask_row & (tile_t == 0))
    tl.store(target_area_ptr + base * T + t, acc_target, mask=mask_t & (tile_q == 0))


@jit
def matching_cost_combine_kernel(
    logits_ptr,  # [L, B, Q, C], any float; C counts the no-object column
    classes_ptr,  # int32 [B, T]
    focal_ptr,
    overlap_ptr,
    mask_area_ptr,
    target_area_ptr,  # of matching_cost_sums_kernel
    cost_ptr,  # out: fp32 [L, B, T, Q]
    B,
    Q,
    T,
    C,
    HW,
    rows,
    splits,
    focal_weight,
    dice_weight,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """cost[q, t] = -softmax(logits[q])[class of t] + focal_weight focal[q, t] / hw
    + dice_weight (1 - (2 overlap[q, t] + 1) / (mask area[q] + target area[t] + 1)),
    the sums being those over the parts. The block owns BLOCK_Q of the L*Q rows of one image, with
    all targets and all classes.
    """
    row = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    image = tl.program_id(1)
    t = tl.arange(0, BLOCK_T)
    mask_row = row < rows
    mask_t = t < T
    mask = mask_row[:, None] & mask_t[None, :]
    focal = tl.zeros((BLOCK_Q, BLOCK_T), tl.float32)
    overlap = tl.zeros((BLOCK_Q, BLOCK_T), tl.float32)
    mask_area = tl.zeros((BLOCK_Q,), tl.float32)
    target_area = tl.zeros((BLOCK_T,), tl.float32)
    for split in tl.range(0, splits):
        base = (split * B + image).to(tl.int64)
        offs = (base * rows + row[:, None]) * T + t[None, :]
        focal += tl.load(focal_ptr + offs, mask=mask, other=0.0)
        overlap += tl.load(overlap_ptr + offs, mask=mask, other=0.0)
        mask_area += tl.load(mask_area_ptr + base * rows + row, mask=mask_row, other=0.0)
        target_area += tl.load(target_area_ptr + base * T + t, mask=mask_t, other=0.0)
    dice = 1.0 - (2.0 * overlap + 1.0) / (mask_area[:, None] + target_area[None, :] + 1.0)
    layer = row // Q
    index = ((layer * B + image) * Q + row % Q).to(tl.int64)  # of [L, B, Q]
    c = tl.arange(0, BLOCK_C)
    mask_c = mask_row[:, None] & (c[None, :] < C)
    logit_ptrs = logits_ptr + index[:, None] * C
    z = tl.load(logit_ptrs + c[None, :], mask=mask_c, other=float("-inf")).to(tl.float32)
    top = tl.where(mask_row, tl.max(z, 1), 0.0)
    total = tl.sum(tl.exp(z - top[:, None]), 1)
    target_class = tl.load(classes_ptr + image * T + t, mask=mask_t, other=0)
    z = tl.load(logit_ptrs + target_class[None, :], mask=mask, other=0.0).to(tl.float32)
    p = tl.exp(z - top[:, None]) / total[:, None]
    cost = -p + focal_weight * focal / HW + dice_weight * dice
    offs = ((layer * B + image)[:, None].to(tl.int64) * T + t[None, :]) * Q + (row % Q)[:, None]
    tl.store(cost_ptr + offs, cost, mask=mask)


@on_device
def launch(
    logits: Tensor,
    masks: Tensor,
    labels: Tensor,
    classes: Tensor,
    focal_weight: float,
    dice_weight: float,
) -> Tensor:
    """logits [L, B, Q, C+1], masks [L, B, Q, h, w], labels [B, h, w], classes [B, T] -> fp32 [L, B,
    Q, T], the queries of a target side by side in memory: so the assignment reads them.

    Columns beyond an image's number of targets mean nothing.
    """
    L, B, Q, h, w = masks.shape
    T, C, HW, rows = classes.shape[1], logits.shape[-1], h * w, L * Q
    cost = masks.new_empty(L, B, T, Q, dtype=torch.float32)
    if not cost.numel():
        return cost.transpose(2, 3)
    logits, labels, classes = contiguous(logits, labels.int(), classes.int())
    masks = plane_contiguous(masks)
    BLOCK_T = min(max(next_power_of_2(T), 16), 64)
    tiles = cdiv(rows, SUMS["BLOCK_Q"]) * cdiv(T, BLOCK_T)
    # Enough parts of the pixels for two blocks a multiprocessor, each of at least 8 tiles.
    splits = cdiv(2 * multiprocessors(masks.device), tiles * B)
    splits = max(min(splits, HW // (8 * SUMS["BLOCK_HW"])), 1)
    part = cdiv(cdiv(HW, splits), SUMS["BLOCK_HW"]) * SUMS["BLOCK_HW"]
    splits = cdiv(HW, part)
    focal, overlap = (cost.new_empty(splits, B, rows, T) for _ in range(2))
    mask_area, target_area = (cost.new_empty(splits, B, n) for n in (rows, T))
    sums = (focal, overlap, mask_area, target_area)
    sizes = (B, Q, T, HW, rows, part, *masks.stride()[:3])
    matching_cost_sums_kernel[(tiles, B, splits)](
        masks, labels, classes, *sums, *sizes, BLOCK_T=BLOCK_T, **SUMS
    )
    BLOCK_C = next_power_of_2(C)
    BLOCK_Q = max(min(LOGITS_HELD // BLOCK_C, 16), 1)
    sizes = (B, Q, T, C, HW, rows, splits)
    matching_cost_combine_kernel[(cdiv(rows, BLOCK_Q), B)](
        logits,
        classes,
        *sums,
        cost,
        *sizes,
        focal_weight,
        dice_weight,
        BLOCK_Q=BLOCK_Q,
        BLOCK_T=next_power_of_2(T),
        BLOCK_C=BLOCK_C,
        num_warps=4,
    )
    return cost.transpose(2, 3)


@torch.library.custom_op("zsseg::matching_cost", mutates_args=(), device_types="cuda")
def matching_cost(
    logits: Tensor,
    masks: Tensor,
    labels: Tensor,
    classes: Tensor,
    focal_weight: float,
    dice_weight: float,
) -> Tensor:
    """See `launch`."""
    return launch(logits, masks, labels, classes, focal_weight, dice_weight)


@matching_cost.register_fake
def _(logits, masks, labels, classes, focal_weight, dice_weight):
    L, B, Q = masks.shape[:3]
    cost = masks.new_empty(L, B, classes.shape[1], Q, dtype=torch.float32)
    return cost.transpose(2, 3)
