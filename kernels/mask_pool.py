"""Mask pooling: the mean of dense features under each mask, straight from mask logits at stride 4.

A feature's cell counts as far as its pixels are in the mask. Neither full-size masks [Q, H, W] nor
their shares of the cells [Q, h' w'] exist in memory. Forward only: nothing trains through it.
"""

import torch
from torch import Tensor

from kernels.jit import cdiv, contiguous, jit, logit, on_device, tl

CONFIG = {"BLOCK_Q": 16, "BLOCK_CELL": 32, "BLOCK_W": 64, "BLOCK_D": 64}
CONFIG |= {"num_warps": 4, "num_stages": 3}


@jit
def mask_pool_sums_kernel(
    features_ptr,  # [rows, columns, D], any float
    logits_ptr,  # [Q, h, w], any float
    sums_ptr,  # out: fp32 [rows, tiles, Q, D]
    shares_ptr,  # out: fp32 [rows, tiles, Q]
    Q,
    D,
    h,
    w,
    H,
    W,
    rows,
    columns,
    logit_threshold,
    BLOCK_Q: tl.constexpr,
    BLOCK_CELL: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sums[q] = sum over cells of share[q, cell] features[cell], and the sum of the shares, where
    share is the mean over the cell's pixels of (bilinear mean of logits > logit_threshold); row i
    of cells has the pixel rows floor(i H / rows) to ceil((i + 1) H / rows), columns likewise. The
    block owns BLOCK_Q masks and BLOCK_CELL cells of one row.
    """
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row = tl.program_id(1)
    tile = tl.program_id(2)
    cell = tile * BLOCK_CELL + tl.arange(0, BLOCK_CELL)
    mask_q = q < Q
    mask_cell = cell < columns
    first_y = row * H // rows
    last_y = tl.cdiv((row + 1) * H, rows)
    first_x = tl.where(mask_cell, cell * W // columns, W)
    last_x = tl.where(mask_cell, tl.cdiv((cell + 1) * W, columns), 0)
    plane_ptrs = logits_ptr + (q.to(tl.int64) * h * w)[:, None]
    share = tl.zeros((BLOCK_Q, BLOCK_CELL), tl.float32)
    for start in tl.range(tl.min(first_x, 0), tl.max(last_x, 0), BLOCK_W, num_stages=1):
        x = start + tl.arange(0, BLOCK_W)
        at_x = tl.maximum((x.to(tl.float32) + 0.5) * 0.25 - 0.5, 0.0)
        u0 = tl.minimum(at_x.to(tl.int32), w - 1)
        u1 = tl.minimum(u0 + 1, w - 1)
        fx = (at_x - u0.to(tl.float32))[None, :]
        mask = mask_q[:, None] & (x < W)[None, :]
        count = tl.zeros((BLOCK_Q, BLOCK_W), tl.float32)
        for y in tl.range(first_y, last_y, num_stages=1):
            at_y = tl.maximum((y + 0.5) * 0.25 - 0.5, 0.0)
            v0 = tl.minimum(at_y.to(tl.int32), h - 1)
            v1 = tl.minimum(v0 + 1, h - 1)
            fy = at_y - v0
            a = tl.load(plane_ptrs + (v0 * w + u0)[None, :], mask=mask, other=0.0).to(tl.float32)
            b = tl.load(plane_ptrs + (v0 * w + u1)[None, :], mask=mask, other=0.0).to(tl.float32)
            c = tl.load(plane_ptrs + (v1 * w + u0)[None, :], mask=mask, other=0.0).to(tl.float32)
            d = tl.load(plane_ptrs + (v1 * w + u1)[None, :], mask=mask, other=0.0).to(tl.float32)
            upper = a * (1.0 - fx) + b * fx
            lower = c * (1.0 - fx) + d * fx
            count += tl.where(mask & (upper * (1.0 - fy) + lower * fy > logit_threshold), 1.0, 0.0)
        # Which pixel columns a cell has: counts are whole numbers, so fp16 holds them.
        belongs = (x[:, None] >= first_x[None, :]) & (x[:, None] < last_x[None, :])
        share = tl.dot(count.to(tl.float16), belongs.to(tl.float16), share)
    area = (last_y - first_y) * tl.maximum(last_x - first_x, 1)
    share = share / area.to(tl.float32)[None, :]
    part = row * tl.num_programs(2) + tile
    offs_q = part.to(tl.int64) * Q + q
    tl.store(shares_ptr + offs_q, tl.sum(share, 1), mask=mask_q)
    feature_ptrs = features_ptr + (row * columns + cell).to(tl.int64)[:, None] * D
    for start in tl.range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = mask_cell[:, None] & (d < D)[None, :]
        f = tl.load(feature_ptrs + d[None, :], mask=mask, other=0.0).to(tl.float32)
        acc = tl.dot(share, f, input_precision="tf32x3")
        mask = mask_q[:, None] & (d < D)[None, :]
        tl.store(sums_ptr + offs_q[:, None] * D + d[None, :], acc, mask=mask)


@on_device
def launch(
    features: Tensor, logits: Tensor, size: tuple[int, int], threshold: float
) -> tuple[Tensor, Tensor]:
    """features [h', w', D], mask logits [Q, h, w] at stride 4 of a padded image whose own size is
    `size` -> the mean feature under each mask fp32 [Q, D], 0 under an empty one, and valid [Q]: the
    mask has a pixel whose sigmoid is above the threshold.
    """
    (rows, columns, D), (Q, h, w) = features.shape, logits.shape
    features, logits = contiguous(features, logits)
    tiles = cdiv(columns, CONFIG["BLOCK_CELL"])
    sums = features.new_empty(rows, tiles, Q, D, dtype=torch.float32)
    shares = features.new_empty(rows, tiles, Q, dtype=torch.float32)
    if sums.numel():
        sizes = (Q, D, h, w, *size, rows, columns, logit(threshold))
        mask_pool_sums_kernel[(cdiv(Q, CONFIG["BLOCK_Q"]), rows, tiles)](
            features, logits, sums, shares, *sizes, **CONFIG
        )
    total = shares.sum((0, 1))
    return sums.sum((0, 1)) / total.where(total > 0, 1)[:, None], total > 0


@torch.library.custom_op("zsseg::mask_pool", mutates_args=(), device_types="cuda")
def mask_pool(
    features: Tensor, logits: Tensor, size: list[int], threshold: float
) -> tuple[Tensor, Tensor]:
    """See `launch`."""
    return launch(features, logits, tuple(size), threshold)


@mask_pool.register_fake
def _(features, logits, size, threshold):
    Q = len(logits)
    pooled = features.new_empty(Q, features.shape[-1], dtype=torch.float32)
    return pooled, logits.new_empty(Q, dtype=torch.bool)
