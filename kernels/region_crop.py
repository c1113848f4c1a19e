"""The crop that CLIP gets of each region, straight from mask logits at stride 4 and the image's
bytes (Xu et al. 2021).

Two kernels: the first upsamples the logits bilinearly, compares them with the threshold, writes the
mask as bytes and each row block's bounds; the second samples the masked, normalised image inside
every box bicubically. The host learns nothing in between, so that there is no sync.
"""

import torch
from torch import Tensor

from kernels.jit import cdiv, contiguous, jit, logit, on_device, tl

STRIDE = 4  # of the logits, to the padded network input
MASKS = {"BLOCK_H": 16, "BLOCK_W": 64, "num_warps": 4, "num_stages": 1}
CROPS = {"BLOCK": 256, "num_warps": 4, "num_stages": 1}
CUBIC = -0.75  # PyTorch's


@jit
def region_masks_kernel(
    logits_ptr,  # [Q, h, w], any float
    masks_ptr,  # out: uint8 [Q, H, W]
    bounds_ptr,  # out: int32 [Q, blocks, 4]: x0, y0, x1, y1 of each row block; x1 = 0 where empty
    h,
    w,
    H,
    W,
    blocks,
    logit_threshold,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """mask = (bilinear mean of logits > logit_threshold), and its bounds. The block owns BLOCK_H
    rows of one mask, and goes through them BLOCK_W columns at a time.
    """
    query = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    y = block * BLOCK_H + tl.arange(0, BLOCK_H)
    at_y = tl.maximum((y.to(tl.float32) + 0.5) * 0.25 - 0.5, 0.0)
    v0 = tl.minimum(at_y.to(tl.int32), h - 1)
    v1 = tl.minimum(v0 + 1, h - 1)
    fy = (at_y - v0.to(tl.float32))[:, None]
    upper_ptrs = logits_ptr + query * h * w + v0[:, None] * w
    lower_ptrs = logits_ptr + query * h * w + v1[:, None] * w
    out_ptrs = masks_ptr + (query * H + y[:, None]) * W
    x0 = tl.zeros((BLOCK_H,), tl.int32) + W
    x1 = tl.zeros((BLOCK_H,), tl.int32)
    for start in tl.range(0, W, BLOCK_W):
        x = start + tl.arange(0, BLOCK_W)
        at_x = tl.maximum((x.to(tl.float32) + 0.5) * 0.25 - 0.5, 0.0)
        u0 = tl.minimum(at_x.to(tl.int32), w - 1)
        u1 = tl.minimum(u0 + 1, w - 1)[None, :]
        fx = (at_x - u0.to(tl.float32))[None, :]
        u0 = u0[None, :]
        mask = (y[:, None] < H) & (x[None, :] < W)
        a = tl.load(upper_ptrs + u0, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(upper_ptrs + u1, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(lower_ptrs + u0, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(lower_ptrs + u1, mask=mask, other=0.0).to(tl.float32)
        upper = a * (1.0 - fx) + b * fx
        lower = c * (1.0 - fx) + d * fx
        inside = mask & (upper * (1.0 - fy) + lower * fy > logit_threshold)
        tl.store(out_ptrs + x[None, :], inside.to(tl.uint8), mask=mask)
        x0 = tl.minimum(x0, tl.min(tl.where(inside, x[None, :], W), 1))
        x1 = tl.maximum(x1, tl.max(tl.where(inside, x[None, :] + 1, 0), 1))
    out_ptr = bounds_ptr + (query * blocks + block) * 4
    tl.store(out_ptr, tl.min(x0, 0))
    tl.store(out_ptr + 1, tl.min(tl.where(x1 > 0, y, H), 0))
    tl.store(out_ptr + 2, tl.max(x1, 0))
    tl.store(out_ptr + 3, tl.max(tl.where(x1 > 0, y + 1, 0), 0))


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


@jit
def region_crop_kernel(
    image_ptr,  # uint8 [3, H, W]
    masks_ptr,  # uint8 [P, H, W]
    boxes_ptr,  # int32 [P, 4]
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
    x0 = tl.load(boxes_ptr + crop * 4)
    y0 = tl.load(boxes_ptr + crop * 4 + 1)
    width = tl.load(boxes_ptr + crop * 4 + 2) - x0
    height = tl.load(boxes_ptr + crop * 4 + 3) - y0
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
            inside = mask & (tl.load(masks_ptr + (crop * H + y) * W + x, mask=mask, other=0) != 0)
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
def launch_masks(
    logits: Tensor, size: tuple[int, int], threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [Q, h, w] -> masks uint8 [Q, *size], 1 where the sigmoid of the upsampled logits is
    above threshold; tight boxes int64 [Q, 4] as x0, y0, x1, y1 (ends excluded; of an empty mask the
    whole), and valid [Q]: the mask is not empty.
    """
    (Q, h, w), (H, W) = logits.shape, size
    blocks = cdiv(H, MASKS["BLOCK_H"])
    masks = torch.empty(Q, H, W, dtype=torch.uint8, device=logits.device)
    bounds = torch.empty(Q, blocks, 4, dtype=torch.int32, device=logits.device)
    if Q:
        sizes = (h, w, H, W, blocks, logit(threshold))
        region_masks_kernel[(blocks, Q)](logits.contiguous(), masks, bounds, *sizes, **MASKS)
    x0, y0 = bounds[..., :2].amin(1).unbind(1)
    x1, y1 = bounds[..., 2:].amax(1).unbind(1)
    valid = x1 > 0
    boxes = (x0.where(valid, 0), y0.where(valid, 0), x1.where(valid, W), y1.where(valid, H))
    return masks, torch.stack(boxes, 1).long(), valid


@on_device
def launch_crops(
    image: Tensor,
    masks: Tensor,
    boxes: Tensor,
    mean: list[float],
    std: list[float],
    side: int,
    dtype: torch.dtype,
) -> Tensor:
    """Crops [P, 3, side, side] of (image / 255 - mean) / std around each mask, bicubic, 0 outside
    it.

    image uint8 [3, H, W], masks uint8 [P, H, W], boxes [P, 4] as of `launch_masks`.
    """
    H, W = image.shape[-2:]
    P = len(masks)
    crops = torch.empty(P, 3, side, side, dtype=dtype, device=image.device)
    if not P:
        return crops
    scale = [1 / (255 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    image, masks, boxes = contiguous(image, masks, boxes.int())
    numbers = (*scale, *shift, H, W, side)
    region_crop_kernel[(cdiv(side * side, CROPS["BLOCK"]), P)](
        image, masks, boxes, crops, *numbers, A=CUBIC, **CROPS
    )
    return crops


@torch.library.custom_op("zsseg::region_masks", mutates_args=(), device_types="cuda")
def region_masks(
    logits: Tensor, size: list[int], threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `launch_masks`."""
    return launch_masks(logits, tuple(size), threshold)


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
    mean: list[float],
    std: list[float],
    side: int,
    dtype: torch.dtype,
) -> Tensor:
    """See `launch_crops`."""
    return launch_crops(image, masks, boxes, mean, std, side, dtype)


@region_crop.register_fake
def _(image, masks, boxes, mean, std, side, dtype):
    return image.new_empty(masks.shape[0], 3, side, side, dtype=dtype)
