"""Mask pooling: the mean of dense features under each mask, from binary masks as `region_masks`
writes them.

A feature's cell counts as far as its pixels are in the mask. The first kernel reads each mask once
and writes these shares; the second multiplies them with the features. Forward only: nothing trains
through it.
"""

import torch
from torch import Tensor

from kernels.jit import SIZES, cdiv, contiguous, jit, on_device, tl

SHARES = {"BLOCK_Q": 16, "BLOCK_CELL": 16, "BLOCK_W": 64, "num_warps": 8, "num_stages": 1}
POOL = {"BLOCK_Q": 16, "BLOCK_CELL": 32, "BLOCK_D": 32, "num_warps": 4, "num_stages": 3}


@jit(do_not_specialize=SIZES)
def mask_shares_kernel(
    masks_ptr,  # uint8 [Q, H, W], 0 or 1
    shares_ptr,  # out: fp32 [Q, rows, columns]
    Q,
    H,
    W,
    rows,
    columns,
    BLOCK_Q: tl.constexpr,
    BLOCK_CELL: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """share = mean of the mask over the cell's pixels; row i of cells has the pixel rows
    floor(i H / rows) to ceil((i + 1) H / rows), columns likewise. The block owns BLOCK_Q masks and
    BLOCK_CELL cells of one row.
    """
    q = (tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q))[:, None]
    row = tl.program_id(1)
    cell = (tl.program_id(2) * BLOCK_CELL + tl.arange(0, BLOCK_CELL))[None, :]
    first_y = row * H // rows
    last_y = tl.cdiv((row + 1) * H, rows)
    first_x = tl.where(cell < columns, cell * W // columns, W)
    last_x = tl.where(cell < columns, tl.cdiv((cell + 1) * W, columns), 0)
    plane_ptrs = masks_ptr + q.to(tl.int64) * H * W
    share = tl.zeros((BLOCK_Q, BLOCK_CELL), tl.float32)
    for start in tl.range(tl.min(first_x), tl.max(last_x), BLOCK_W):
        x = start + tl.arange(0, BLOCK_W)
        mask = (q < Q) & (x < W)[None, :]
        count = tl.zeros((BLOCK_Q, BLOCK_W), tl.int32)
        for y in tl.range(first_y, last_y, loop_unroll_factor=4):  # loads wait together
            count += tl.load(plane_ptrs + y * W + x[None, :], mask=mask, other=0)
        # Which pixel columns a cell has. Whole numbers up to 2,048 are exact in fp16.
        belongs = (x[:, None] >= first_x) & (x[:, None] < last_x)
        share = tl.dot(count.to(tl.float16), belongs.to(tl.float16), share)
    area = (last_y - first_y) * (last_x - first_x)
    mask = (q < Q) & (cell < columns)
    tl.store(shares_ptr + (q * rows + row) * columns + cell, share / area, mask=mask)


@jit(do_not_specialize=SIZES)
def mask_pool_kernel(
    features_ptr,  # [cells, D], any float
    shares_ptr,  # fp32 [Q, cells]
    pooled_ptr,  # out: fp32 [Q, D]
    Q,
    D,
    cells,
    BLOCK_Q: tl.constexpr,
    BLOCK_CELL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """pooled[q] = sum over cells of share[q, cell] features[cell], divided by the sum of shares; 0
    where that is 0.
    """
    q = (tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q))[:, None]
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    pooled = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_Q, BLOCK_CELL), tl.float32)
    for start in tl.range(0, cells, BLOCK_CELL):
        cell = start + tl.arange(0, BLOCK_CELL)
        mask = (q < Q) & (cell < cells)[None, :]
        share = tl.load(shares_ptr + q * cells + cell[None, :], mask=mask, other=0.0)
        mask = (cell < cells)[:, None] & (d < D)
        f = tl.load(features_ptr + cell[:, None] * D + d, mask=mask, other=0.0).to(tl.float32)
        pooled = tl.dot(share, f, pooled, input_precision="tf32x3")
        total += share
    total = tl.sum(total, 1)[:, None]
    pooled /= tl.where(total > 0, total, 1.0)
    tl.store(pooled_ptr + q * D + d, pooled, mask=(q < Q) & (d < D))


@on_device
def launch(features, masks):
    """features [h', w', D], masks uint8 [Q, H, W], 0 or 1 -> the mean feature under each mask fp32
    [Q, D], 0 under an empty one.
    """
    features, masks = contiguous(features, masks)
    (rows, columns, D), (Q, H, W) = features.shape, masks.shape
    shares = features.new_empty(Q, rows, columns, dtype=torch.float32)
    pooled = features.new_empty(Q, D, dtype=torch.float32)
    if Q:
        tiles = (cdiv(Q, SHARES["BLOCK_Q"]), rows, cdiv(columns, SHARES["BLOCK_CELL"]))
        mask_shares_kernel[tiles](masks, shares, Q, H, W, rows, columns, **SHARES)
        tiles = (cdiv(Q, POOL["BLOCK_Q"]), cdiv(D, POOL["BLOCK_D"]))
        mask_pool_kernel[tiles](features, shares, pooled, Q, D, rows * columns, **POOL)
    return pooled


@torch.library.custom_op("zsseg::mask_pool", mutates_args=(), device_types="cuda")
def mask_pool(features: Tensor, masks: Tensor) -> Tensor:
    """See `launch`."""
    return launch(features, masks)


@mask_pool.register_fake
def _(features, masks):
    return features.new_empty(len(masks), features.shape[-1], dtype=torch.float32)
