"""Matching cost of every query for every target (MaskFormer, Cheng et al. 2021), all layers and
images in one launch.

`-p[class] + focal_weight * focal + dice_weight * dice`, from mask logits and label maps at stride
4. The kernel keeps no [Q, hw] intermediate in memory: a tile of logits becomes its focal terms in
registers, and products with the 0/1 targets (compared on the fly from label map and class)
accumulate over the pixels.
"""

import torch
from torch import Tensor

from kernels.jit import cdiv, contiguous, jit, power_of_two, tl

SAFE = {"ROWS": 64, "COLUMNS": 64, "PIXELS": 32, "num_warps": 8}


@jit
def partial_kernel(
    masks,  # [L, B, Q, hw], any float
    labels,  # int32 [B, hw]
    classes,  # int32 [B, T]
    focal,  # out: fp32 [S, B, L*Q, columns], the sums of S parts of the pixels
    overlap,  # out: the same for p . t; column T holds the sum of p
    area,  # out: fp32 [S, B, columns], the sum of t
    B,
    Q,
    T,
    HW,
    rows,
    columns,
    part,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    column_tiles = tl.cdiv(columns, COLUMNS)
    row_tile = tl.program_id(0) // column_tiles
    image, split = tl.program_id(1), tl.program_id(2)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    start = (((row // Q) * B + image) * Q + row % Q).to(tl.int64) * HW
    wanted = tl.load(classes + image * T + column, mask=column < T, other=-1)
    focal_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    overlap_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    area_sum = tl.zeros((COLUMNS,), tl.float32)
    first = split * part
    while first < tl.minimum((split + 1) * part, HW):
        pixel = first + tl.arange(0, PIXELS)
        inside = pixel < HW
        there = (row[:, None] < rows) & inside[None, :]
        x = tl.load(masks + start[:, None] + pixel[None, :], mask=there, other=0.0).to(tl.float32)
        label = tl.load(labels + image.to(tl.int64) * HW + pixel, mask=inside, other=-2)
        # [PIXELS, COLUMNS], exact
        t = ((label[:, None] == wanted[None, :]) | (column[None, :] == T)).to(tl.float16)
        e = tl.exp(-tl.abs(x))
        p = tl.where(x >= 0, 1.0, e) / (1.0 + e)
        q = tl.where(x >= 0, e, 1.0) / (1.0 + e)  # 1 - p without cancellation
        soft = tl.log(1.0 + e)
        positive = 0.25 * q * q * (soft + tl.maximum(-x, 0.0))
        negative = 0.75 * p * p * (soft + tl.maximum(x, 0.0))
        p = tl.where(there, p, 0.0)
        negative = tl.where(there, negative, 0.0)
        other = 1.0 - t.to(tl.float32)
        # The targets are exact in fp16, so two fp16 pieces of the other factor give fp32's accuracy
        # on tensor cores.
        focal_sum = split_dot(positive, t, focal_sum)
        focal_sum = split_dot(negative, other.to(tl.float16), focal_sum)
        overlap_sum = split_dot(p, t, overlap_sum)
        area_sum += tl.sum(tl.where(inside[:, None], t.to(tl.float32), 0.0), 0)
        first += PIXELS
    base = (split * B + image).to(tl.int64)
    there = (row[:, None] < rows) & (column[None, :] < columns)
    out = (base * rows + row[:, None]) * columns + column[None, :]
    tl.store(focal + out, focal_sum, mask=there)
    tl.store(overlap + out, overlap_sum, mask=there)
    tl.store(
        area + base * columns + column, area_sum, mask=column < tl.where(row_tile == 0, columns, 0)
    )


@jit
def split_dot(a, b, total):
    high = a.to(tl.float16)
    low = (a - high.to(tl.float32)).to(tl.float16)
    return tl.dot(high, b, tl.dot(low, b, total))


@jit
def finish_kernel(
    logits,  # [L, B, Q, C], any float; C counts the no-object column
    classes,  # int32 [B, T]
    focal,
    overlap,
    area,  # of partial_kernel
    cost,  # out: fp32 [L, B, Q, T]
    B,
    Q,
    T,
    C,
    HW,
    rows,
    columns,
    splits,
    focal_weight,
    dice_weight,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    image = tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    here = row < rows
    there = here[:, None] & (column[None, :] < columns)
    focal_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    overlap_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    area_sum = tl.zeros((COLUMNS,), tl.float32)
    split = 0
    while split < splits:
        base = (split * B + image).to(tl.int64)
        place = (base * rows + row[:, None]) * columns + column[None, :]
        focal_sum += tl.load(focal + place, mask=there, other=0.0)
        overlap_sum += tl.load(overlap + place, mask=there, other=0.0)
        area_sum += tl.load(area + base * columns + column, mask=column < columns, other=0.0)
        split += 1
    p_sum = tl.sum(tl.where(column[None, :] == T, overlap_sum, 0.0), 1)  # [ROWS]
    dice = 1.0 - (2.0 * overlap_sum + 1.0) / (p_sum[:, None] + area_sum[None, :] + 1.0)
    index = ((row // Q) * B + image) * Q + row % Q
    kind = tl.arange(0, CLASSES)
    z = tl.load(
        logits + index[:, None].to(tl.int64) * C + kind[None, :],
        mask=here[:, None] & (kind[None, :] < C),
        other=-float("inf"),
    ).to(tl.float32)
    top = tl.max(z, 1)
    total = tl.sum(tl.exp(z - top[:, None]), 1)
    wanted = tl.load(classes + image * T + column, mask=column < T, other=0)
    kept = here[:, None] & (column[None, :] < T)
    chosen = tl.load(
        logits + index[:, None].to(tl.int64) * C + wanted[None, :], mask=kept, other=0.0
    ).to(tl.float32)
    probability = tl.exp(chosen - top[:, None]) / total[:, None]
    result = -probability + focal_weight * focal_sum / HW + dice_weight * dice
    tl.store(cost + index[:, None].to(tl.int64) * T + column[None, :], result, mask=kept)


def launch(
    logits: Tensor,
    masks: Tensor,
    labels: Tensor,
    classes: Tensor,
    focal_weight: float,
    dice_weight: float,
) -> Tensor:
    """logits [L, B, Q, C+1], masks [L, B, Q, h, w], labels [B, h, w], classes [B, T] -> fp32 [L, B,
    Q, T].

    Columns beyond an image's number of targets mean nothing.
    """
    L, B, Q, h, w = masks.shape
    T, C, HW, rows = classes.shape[1], logits.shape[-1], h * w, L * Q
    cost = masks.new_empty(L, B, Q, T, dtype=torch.float32)
    if not cost.numel():
        return cost
    logits, masks, labels, classes = contiguous(logits, masks, labels.int(), classes.int())
    columns = max(power_of_two(T + 1), 16)  # one more than targets: it sums p
    parameters = dict(SAFE)
    parameters["COLUMNS"] = min(columns, parameters["COLUMNS"])
    row_tiles, column_tiles, pixels = (
        cdiv(rows, parameters["ROWS"]),
        cdiv(columns, parameters["COLUMNS"]),
        parameters["PIXELS"],
    )
    # Enough parts of the pixels to fill the device, each of at least 16 tiles.
    splits = max(min(cdiv(264, row_tiles * column_tiles * B), HW // (16 * pixels)), 1)
    part = cdiv(cdiv(HW, splits), pixels) * pixels
    splits = cdiv(HW, part)
    focal, overlap = (cost.new_empty(splits, B, rows, columns) for _ in range(2))
    area = cost.new_empty(splits, B, columns)
    partial_kernel[(row_tiles * column_tiles, B, splits)](
        masks, labels, classes, focal, overlap, area, B, Q, T, HW, rows, columns, part, **parameters
    )
    finish_kernel[(cdiv(rows, 16), B)](
        logits,
        classes,
        focal,
        overlap,
        area,
        cost,
        B,
        Q,
        T,
        C,
        HW,
        rows,
        columns,
        splits,
        focal_weight,
        dice_weight,
        ROWS=16,
        COLUMNS=columns,
        CLASSES=power_of_two(C),
        num_warps=4,
    )
    return cost


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
    return masks.new_empty(*masks.shape[:3], classes.shape[1], dtype=torch.float32)
