"""The crop that CLIP gets of each region, straight from mask logits at stride 4 and the image's
bytes (Xu et al. 2021).

Three kernels: the first upsamples the logits bilinearly, compares them with the threshold, writes
the mask as bytes and each block's bounds; the second makes boxes of these; the third samples
the masked, normalised image inside every box bicubically. The host learns nothing in between, so
that there is no sync.
"""

import math

import torch
from torch import Tensor

from kernels.jit import SIZES, cdiv, contiguous, jit, logit, on_device, tl, upsampled

# Two kernels make masks and boxes: a single one, a block for each of 100 masks, would leave a
# quarter of an H100's 132 multiprocessors without work.
MASKS = {"BLOCK_V": 8, "BLOCK_W": 128, "num_warps": 4, "num_stages": 1}
BOXES = {"BLOCK": 64, "num_warps": 1, "num_stages": 1}
CROPS = {"BLOCK": 256, "num_warps": 4, "num_stages": 1}
CUBIC = -0.75  # PyTorch's


@jit(do_not_specialize=SIZES)
def region_masks_kernel(
    logits_ptr,  # [Q, h, w], any float
    masks_ptr,  # out: uint8 [Q, H, W]
    bounds_ptr,  # out: int32 [Q, 4, blocks]: x0, y0, -x1, -y1 of each block; W, H, 0, 0 if empty
    h,
    w,
    H,
    W,
    logit_threshold,
    BLOCK_V: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """mask = (bilinear mean of logits > logit_threshold), and its bounds. The block owns the pixels
    between BLOCK_V pairs of logit rows, BLOCK_W columns of them, so that four share their loads.
    """
    query = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V))[:, None]
    x = (tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W))[None, :]
    upper, lower = upsampled(logits_ptr + query * h * w, row, x, h, w)
    y0 = tl.zeros((BLOCK_V, BLOCK_W), tl.int32) + H
    y1 = tl.zeros((BLOCK_V, BLOCK_W), tl.int32)
    for k in tl.static_range(4):
        y = row * 4 - 2 + k
        mask = (y >= 0) & (y < H) & (x < W)
        z = upper * (0.875 - k * 0.25) + lower * (0.125 + k * 0.25)
        inside = mask & (z > logit_threshold)
        tl.store(masks_ptr + query * H * W + (y * W + x), inside.to(tl.uint8), mask=mask)
        y0 = tl.minimum(y0, tl.where(inside, y, H))
        y1 = tl.where(inside, -1 - y, y1)
    blocks = tl.num_programs(0) * tl.num_programs(1)
    block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    out_ptr = bounds_ptr + query * 4 * blocks + block
    tl.store(out_ptr, tl.min(tl.where(y0 < H, x, W)))
    tl.store(out_ptr + blocks, tl.min(y0))
    tl.store(out_ptr + 2 * blocks, tl.min(tl.where(y0 < H, -1 - x, 0)))
    tl.store(out_ptr + 3 * blocks, tl.min(y1))


@jit(do_not_specialize=SIZES)
def region_boxes_kernel(
    bounds_ptr,  # int32 [Q, 4, blocks], see above
    boxes_ptr,  # out: int64 [Q, 4]: x0, y0, x1, y1
    valid_ptr,  # out: bool [Q]
    H,
    W,
    blocks,
    BLOCK: tl.constexpr,
):
    """The bounds of one mask's blocks, joined."""
    query = tl.program_id(0)
    side = tl.arange(0, 4)
    box = tl.zeros((4,), tl.int32) + 2**30
    for start in tl.range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)[None, :]
        ptrs = bounds_ptr + (query * 4 + side[:, None]) * blocks + block
        box = tl.minimum(box, tl.min(tl.load(ptrs, mask=block < blocks, other=2**30), 1))
    valid = tl.min(box) < 0
    whole = tl.where(side == 2, W, tl.where(side == 3, H, 0))
    box = tl.where(valid, tl.abs(box), whole)
    tl.store(boxes_ptr + query * 4 + side, box.to(tl.int64))
    tl.store(valid_ptr + query, valid)


@jit
def cubic(t, k: tl.constexpr, A: tl.constexpr):
    """Weight of tap k (0..3) of the cubic convolution at the share t between taps 1 and 2."""
    if k == 0:
        d = t + 1.0
        return ((A * d - 5.0 * A) * d + 8.0 * A) * d - 4.0 * A
    if k == 1:
        return ((A + 2.0) * t - (A + 3.0)) * t * t + 1.0
    if k == 2:
        d = 1.0 - t
        return ((A + 2.0) * d - (A + 3.0)) * d * d + 1.0
    d = 2.0 - t
    return ((A * d - 5.0 * A) * d + 8.0 * A) * d - 4.0 * A


@jit(do_not_specialize=SIZES)
def region_crop_kernel(
    image_ptr,  # uint8 [3, H, W]
    masks_ptr,  # uint8 [Q, H, W]
    boxes_ptr,  # int64 [Q, 4]
    index_ptr,  # int64 [P]: the mask of each crop
    crops_ptr,  # out: [P, 3, side, side]
    r_scale,
    g_scale,
    b_scale,
    r_shift,
    g_shift,
    b_shift,  # the normalised image is byte * scale + shift
    H,
    W,
    side,
    BLOCK: tl.constexpr,
    A: tl.constexpr,
):
    """crop = sum over 4 x 4 taps of weight_y weight_x mask normalised image, in all three colours.
    The block owns BLOCK pixels of one crop.
    """
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    crop = tl.program_id(1).to(tl.int64)
    mask = pixel < side * side
    query = tl.load(index_ptr + crop)
    x0 = tl.load(boxes_ptr + query * 4).to(tl.int32)
    y0 = tl.load(boxes_ptr + query * 4 + 1).to(tl.int32)
    width = tl.load(boxes_ptr + query * 4 + 2).to(tl.int32) - x0
    height = tl.load(boxes_ptr + query * 4 + 3).to(tl.int32) - y0
    # Divided exactly, as PyTorch does: 2 ulp more or less move the samples.
    step_y = tl.div_rn(height.to(tl.float32), side + 0.0)
    step_x = tl.div_rn(width.to(tl.float32), side + 0.0)
    at_y = ((pixel // side).to(tl.float32) + 0.5) * step_y - 0.5
    at_x = ((pixel % side).to(tl.float32) + 0.5) * step_x - 0.5
    floor_y = tl.floor(at_y)
    floor_x = tl.floor(at_x)
    ty = at_y - floor_y
    tx = at_x - floor_x
    r = tl.zeros((BLOCK,), tl.float32)
    g = tl.zeros((BLOCK,), tl.float32)
    b = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(4):
        y = tl.minimum(tl.maximum(floor_y.to(tl.int32) + (i - 1), 0), height - 1) + y0
        wy = cubic(ty, i, A)
        for j in tl.static_range(4):
            x = tl.minimum(tl.maximum(floor_x.to(tl.int32) + (j - 1), 0), width - 1) + x0
            inside = mask & (tl.load(masks_ptr + (query * H + y) * W + x, mask=mask, other=0) != 0)
            weight = tl.where(inside, wy * cubic(tx, j, A), 0.0)
            tap_ptrs = image_ptr + y * W + x
            red = tl.load(tap_ptrs, mask=inside, other=0).to(tl.float32)
            green = tl.load(tap_ptrs + H * W, mask=inside, other=0).to(tl.float32)
            blue = tl.load(tap_ptrs + 2 * H * W, mask=inside, other=0).to(tl.float32)
            r += weight * (red * r_scale + r_shift)
            g += weight * (green * g_scale + g_shift)
            b += weight * (blue * b_scale + b_shift)
    out_ptrs = crops_ptr + crop * 3 * side * side + pixel
    dtype = crops_ptr.dtype.element_ty
    tl.store(out_ptrs, r.to(dtype), mask=mask)
    tl.store(out_ptrs + side * side, g.to(dtype), mask=mask)
    tl.store(out_ptrs + 2 * side * side, b.to(dtype), mask=mask)


@on_device
def launch_masks(logits, size, threshold):
    """logits [Q, h, w] -> masks uint8 [Q, *size], 1 where the sigmoid of the upsampled logits is
    above threshold; tight boxes int64 [Q, 4] as x0, y0, x1, y1 (ends excluded; of an empty mask the
    whole), and valid bool [Q]: the mask is not empty.
    """
    (Q, h, w), (H, W) = logits.shape, size
    tiles = (cdiv(W, MASKS["BLOCK_W"]), cdiv(H + 2, 4 * MASKS["BLOCK_V"]))
    blocks = math.prod(tiles)
    masks = logits.new_empty(Q, H, W, dtype=torch.uint8)
    bounds = logits.new_empty(Q, 4, blocks, dtype=torch.int32)
    boxes = logits.new_empty(Q, 4, dtype=torch.int64)
    valid = logits.new_empty(Q, dtype=torch.bool)
    if Q:
        sizes = (h, w, H, W, logit(threshold))
        region_masks_kernel[(*tiles, Q)](logits.contiguous(), masks, bounds, *sizes, **MASKS)
        region_boxes_kernel[(Q,)](bounds, boxes, valid, H, W, blocks, **BOXES)
    return masks, boxes, valid


@on_device
def launch_crops(image, masks, boxes, index, mean, std, side, dtype):
    """Crops [P, 3, side, side] of (image / 255 - mean) / std around the masks `index`, bicubic, 0
    outside them.

    image uint8 [3, H, W]; masks uint8 [Q, H, W], boxes int64 [Q, 4] as of `launch_masks`; index
    int64 [P].
    """
    H, W = image.shape[-2:]
    P = len(index)
    crops = image.new_empty(P, 3, side, side, dtype=dtype)
    if P:
        scale = [1 / (255 * s) for s in std]
        shift = [-m / s for m, s in zip(mean, std, strict=True)]
        region_crop_kernel[(cdiv(side * side, CROPS["BLOCK"]), P)](
            *contiguous(image, masks, boxes, index),
            *(crops, *scale, *shift, H, W, side),
            **{"A": CUBIC, **CROPS},
        )
    return crops


@torch.library.custom_op("zsseg::region_masks", mutates_args=(), device_types="cuda")
def region_masks(
    logits: Tensor, size: list[int], threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `launch_masks`."""
    return launch_masks(logits, size, threshold)


@region_masks.register_fake
def _(logits, size, threshold):
    Q = logits.shape[0]
    masks = logits.new_empty(Q, *size, dtype=torch.uint8)
    return masks, logits.new_empty(Q, 4, dtype=torch.int64), logits.new_empty(Q, dtype=torch.bool)


@torch.library.custom_op("zsseg::region_crop", mutates_args=(), device_types="cuda")
def region_crop(
    image: Tensor,
    masks: Tensor,
    boxes: Tensor,
    index: Tensor,
    mean: list[float],
    std: list[float],
    side: int,
    dtype: torch.dtype,
) -> Tensor:
    """See `launch_crops`."""
    return launch_crops(image, masks, boxes, index, mean, std, side, dtype)


@region_crop.register_fake
def _(image, masks, boxes, index, mean, std, side, dtype):
    return image.new_empty(index.shape[0], 3, side, side, dtype=dtype)
