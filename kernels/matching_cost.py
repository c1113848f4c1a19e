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
    SIZES,
    cdiv,
    contiguous,
    jit,
    multiprocessors,
    next_power_of_2,
    on_device,
    plane_contiguous,
    sigmoid_parts,
    tl,
)

SUMS = {"BLOCK_Q": 64, "BLOCK_HW": 32, "num_warps": 4, "num_stages": 4}
LOGITS_HELD = 4096  # class logits that a block of the second kernel holds


@jit
def dot_exact(a, b, acc):
    """acc + a b in fp32's accuracy on tensor cores, where b [K, N] is exact in fp16: a [M, K], fp32
    below 65,504, is multiplied in two fp16 pieces.
    """
    high = a.to(tl.float16)
    low = (a - high.to(tl.float32)).to(tl.float16)
    b = b.to(tl.float16)
    # In the other order the compiler computes `a` twice, in the layouts of two memories.
    return tl.dot(low, b, tl.dot(high, b, acc))


@jit(do_not_specialize=SIZES)
def matching_cost_sums_kernel(
    masks_ptr,  # [L, B, Q, hw], any float, the pixels dense
    labels_ptr,  # int32 [B, hw]
    classes_ptr,  # int32 [B, T]
    sums_ptr,  # out: fp32 [S, B, 2, L*Q + 1, T + 1], of S parts of the pixels
    B,
    Q,
    T,
    HW,
    rows,
    steps,
    stride_l,
    stride_b,
    stride_q,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HW: tl.constexpr,
):
    """With p = sigmoid(x), over one part of the pixels n, `steps` tiles,

        focal[q, t] = sum_n positive[q, n] target[t, n] + negative[q, n] (1 - target[t, n])
        overlap[q, t] = sum_n p[q, n] target[t, n]

    where positive = 0.25 (1 - p)^2 softplus(-x) is a pixel's loss if the target is 1 there, and
    negative = 0.75 p^2 softplus(x) if it is 0. Target T is 1 at all pixels, so that its overlap is
    the area sum_n p; in the row after the last stand the targets' areas. The block owns BLOCK_Q of
    the L*Q rows and BLOCK_T targets of one image, for one part.
    """
    tiles_t = tl.cdiv(T + 1, BLOCK_T)
    tile_q = tl.program_id(0) // tiles_t
    image = tl.program_id(1).to(tl.int64)
    row = tile_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    t = tl.program_id(0) % tiles_t * BLOCK_T + tl.arange(0, BLOCK_T)
    known = tl.minimum(row, rows - 1)
    offs_row = (known // Q).to(tl.int64) * stride_l + (known % Q).to(tl.int64) * stride_q
    x_ptrs = masks_ptr + image * stride_b + offs_row[:, None]
    target_class = tl.load(classes_ptr + image * T + t, mask=t < T, other=-1)
    focal = tl.zeros((BLOCK_Q, BLOCK_T), tl.float32)
    overlap = tl.zeros((BLOCK_Q, BLOCK_T), tl.float32)
    area = tl.zeros((BLOCK_HW, BLOCK_T), tl.float32)
    first = tl.program_id(2) * steps * BLOCK_HW
    for start in tl.range(first, tl.minimum(first + steps * BLOCK_HW, HW), BLOCK_HW):
        n = start + tl.arange(0, BLOCK_HW)
        x = tl.load(x_ptrs + n[None, :], mask=(n < HW)[None, :], other=0.0).to(tl.float32)
        label = tl.load(labels_ptr + image * HW + n, mask=n < HW, other=0)
        target = (label[:, None] == target_class[None, :]) | (t == T)[None, :]
        inside = (n < HW)[:, None]
        p, q, log1pexp = sigmoid_parts(x)
        positive = q * q * (log1pexp + tl.maximum(-x, 0.0))
        negative = p * p * (log1pexp + tl.maximum(x, 0.0))
        # The losses' factors are exact in fp16, so that they stand here; 4 undoes the first.
        share = tl.where(target & inside, 0.25, 0.0)  # [BLOCK_HW, BLOCK_T]
        focal = dot_exact(positive, share, focal)
        overlap = dot_exact(p, share, overlap)
        area += share
        share = tl.where(target, 0.0, 0.75)
        focal = dot_exact(negative, tl.where(inside, share, 0.0), focal)
    base = tl.program_id(2) * tl.num_programs(1) + image
    out_ptrs = sums_ptr + base * 2 * (rows + 1) * (T + 1) + t
    mask = (row < rows)[:, None] & (t <= T)[None, :]
    offs = row[:, None].to(tl.int64) * (T + 1)
    tl.store(out_ptrs[None, :] + offs, focal, mask=mask)
    out_ptrs += (rows + 1) * (T + 1)
    tl.store(out_ptrs[None, :] + offs, 4.0 * overlap, mask=mask)
    # The same in every tile of rows: the first one writes.
    mask = (t <= T) & (tile_q == 0)
    tl.store(out_ptrs + rows * (T + 1), 4.0 * tl.sum(area, 0), mask=mask)


@jit(do_not_specialize=SIZES)
def matching_cost_combine_kernel(
    logits_ptr,  # [L, B, Q, C], any float; C counts the no-object column
    classes_ptr,  # int32 [B, T]
    sums_ptr,  # fp32 [B, 2, L*Q + 1, T + 1], of matching_cost_sums_kernel
    cost_ptr,  # out: fp32 [L, B, T, Q]
    B,
    Q,
    T,
    C,
    rows,
    focal_factor,
    dice_weight,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """cost[q, t] = -softmax(logits[q])[class of t] + focal_factor focal[q, t]
    + dice_weight (1 - (2 overlap[q, t] + 1) / (mask area[q] + target area[t] + 1)). The block owns
    BLOCK_Q of the L*Q rows and BLOCK_T targets of one image, with all classes.
    """
    row = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    image = tl.program_id(1).to(tl.int64)
    t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_row = row < rows
    mask = mask_row[:, None] & (t < T)[None, :]
    sums_ptr += image * 2 * (rows + 1) * (T + 1)
    offs = row[:, None] * (T + 1) + t[None, :]
    focal = tl.load(sums_ptr + offs, mask=mask, other=0.0)
    sums_ptr += (rows + 1) * (T + 1)
    overlap = tl.load(sums_ptr + offs, mask=mask, other=0.0)
    mask_area = tl.load(sums_ptr + row * (T + 1) + T, mask=mask_row, other=0.0)
    target_area = tl.load(sums_ptr + rows * (T + 1) + t, mask=t < T, other=0.0)
    dice = 1.0 - (2.0 * overlap + 1.0) / (mask_area[:, None] + target_area[None, :] + 1.0)
    plane = row // Q * B + image  # of [L, B]
    logit_ptrs = logits_ptr + (plane * Q + row % Q)[:, None] * C
    c = tl.arange(0, BLOCK_C)[None, :]
    z = tl.load(logit_ptrs + c, mask=mask_row[:, None] & (c < C), other=float("-inf"))
    top = tl.where(mask_row, tl.max(z, 1).to(tl.float32), 0.0)[:, None]
    total = tl.sum(tl.exp(z.to(tl.float32) - top), 1)
    target_class = tl.load(classes_ptr + image * T + t, mask=t < T, other=0)
    z = tl.load(logit_ptrs + target_class[None, :], mask=mask, other=0.0).to(tl.float32)
    cost = focal_factor * focal + dice_weight * dice - tl.exp(z - top) / total[:, None]
    tl.store(cost_ptr + (plane[:, None] * T + t[None, :]) * Q + (row % Q)[:, None], cost, mask=mask)


@on_device
def launch(logits, masks, labels, classes, focal_weight, dice_weight):
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
    BLOCK_T = 32 if T < 32 else 64
    tiles = cdiv(rows, SUMS["BLOCK_Q"]) * cdiv(T + 1, BLOCK_T)
    # As many parts of the pixels as keep all blocks resident, three a multiprocessor, each of at
    # least 8 tiles.
    parts = max(3 * multiprocessors(masks.device) // (tiles * B), 1)
    steps = max(cdiv(cdiv(HW, SUMS["BLOCK_HW"]), parts), 8)
    parts = cdiv(HW, steps * SUMS["BLOCK_HW"])
    sums = cost.new_empty(parts, B, 2, rows + 1, T + 1)
    sizes = (B, Q, T, HW, rows, steps, *masks.stride()[:3])
    matching_cost_sums_kernel[(tiles, B, parts)](
        masks, labels, classes, sums, *sizes, BLOCK_T=BLOCK_T, **SUMS
    )
    sums = sums.sum(0)
    BLOCK_C = next_power_of_2(C)
    blocks = {"BLOCK_Q": max(min(LOGITS_HELD // BLOCK_C, 16), 1), "BLOCK_T": 32, "BLOCK_C": BLOCK_C}
    grid = (cdiv(rows, blocks["BLOCK_Q"]), B, cdiv(T, blocks["BLOCK_T"]))
    sizes = (B, Q, T, C, rows, focal_weight / HW, dice_weight)
    matching_cost_combine_kernel[grid](logits, classes, sums, cost, *sizes, **blocks)
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
