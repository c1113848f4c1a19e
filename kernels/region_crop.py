"""What CLIP sees of each region, straight from mask logits at stride 4 and the picture's bytes (Xu
et al. 2021).

Two kernels: the first upsamples the logits bilinearly, compares them with the threshold, writes the
mask as bytes and each row block's bounds; the second samples the masked, normalised image inside
every box bicubically. The host learns nothing in between, so that there is no sync.
"""

import math

import torch
from torch import Tensor

from kernels.jit import cdiv, contiguous, jit, tl

STRIDE = 4  # of the logits, to the padded network input
SAFE_MASKS = {"ROWS": 16, "COLUMNS": 64, "num_warps": 4}
SAFE_CROPS = {"PIXELS": 256, "num_warps": 4}
CUBIC = -0.75  # PyTorch's


@jit
def mask_kernel(
    logits,  # [Q, h, w], any float
    masks,  # out: uint8 [Q, H, W]
    bounds,  # out: int32 [Q, blocks, 4]: x0, y0, x1, y1 of each row block; x1 = 0 where it is empty
    h,
    w,
    H,
    W,
    blocks,
    level,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    query, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    y = block * ROWS + tl.arange(0, ROWS)
    at_y = tl.maximum((y.to(tl.float32) + 0.5) * 0.25 - 0.5, 0.0)
    v0 = tl.minimum(at_y.to(tl.int32), h - 1)
    v1, fy = tl.minimum(v0 + 1, h - 1), at_y - v0.to(tl.float32)
    x0, x1 = W + tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS,), tl.int32)
    start = 0
    while start < W:
        x = start + tl.arange(0, COLUMNS)
        at_x = tl.maximum((x.to(tl.float32) + 0.5) * 0.25 - 0.5, 0.0)
        u0 = tl.minimum(at_x.to(tl.int32), w - 1)
        u1, fx = tl.minimum(u0 + 1, w - 1), at_x - u0.to(tl.float32)
        there = (y[:, None] < H) & (x[None, :] < W)
        base = logits + query * h * w
        a = tl.load(base + v0[:, None] * w + u0[None, :], mask=there, other=0.0).to(tl.float32)
        b = tl.load(base + v0[:, None] * w + u1[None, :], mask=there, other=0.0).to(tl.float32)
        c = tl.load(base + v1[:, None] * w + u0[None, :], mask=there, other=0.0).to(tl.float32)
        d = tl.load(base + v1[:, None] * w + u1[None, :], mask=there, other=0.0).to(tl.float32)
        upper, lower = (
            a * (1.0 - fx)[None, :] + b * fx[None, :],
            c * (1.0 - fx)[None, :] + d * fx[None, :],
        )
        inside = there & (upper * (1.0 - fy)[:, None] + lower * fy[:, None] > level)
        tl.store(masks + (query * H + y[:, None]) * W + x[None, :], inside.to(tl.uint8), mask=there)
        x0 = tl.minimum(x0, tl.min(tl.where(inside, x[None, :], W), 1))
        x1 = tl.maximum(x1, tl.max(tl.where(inside, x[None, :] + 1, 0), 1))
        start += COLUMNS
    out = bounds + (query * blocks + block) * 4
    tl.store(out, tl.min(x0, 0))
    tl.store(out + 1, tl.min(tl.where(x1 > 0, y, H), 0))
    tl.store(out + 2, tl.max(x1, 0))
    tl.store(out + 3, tl.max(tl.where(x1 > 0, y + 1, 0), 0))


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
def crop_kernel(
    image,  # uint8 [3, H, W]
    masks,  # uint8 [Q, H, W]
    index,  # int32 [P]: the mask of each crop
    boxes,  # int32 [Q, 4]
    r_scale,
    g_scale,
    b_scale,
    r_shift,
    g_shift,
    b_shift,  # the normalised image is byte * scale + shift
    crops,  # out: [P, 3, side, side]
    H,
    W,
    side,
    PIXELS: tl.constexpr,
    A: tl.constexpr,
):
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    crop = tl.program_id(1).to(tl.int64)
    query = tl.load(index + crop).to(tl.int64)
    there = pixel < side * side
    x0, y0 = tl.load(boxes + query * 4), tl.load(boxes + query * 4 + 1)
    width, height = tl.load(boxes + query * 4 + 2) - x0, tl.load(boxes + query * 4 + 3) - y0
    py = ((pixel // side).to(tl.float32) + 0.5) * (height.to(tl.float32) / side) - 0.5
    px = ((pixel % side).to(tl.float32) + 0.5) * (width.to(tl.float32) / side) - 0.5
    floor_y, floor_x = tl.floor(py), tl.floor(px)
    ty, tx = py - floor_y, px - floor_x
    r = tl.zeros((PIXELS,), tl.float32)
    g = tl.zeros((PIXELS,), tl.float32)
    b = tl.zeros((PIXELS,), tl.float32)
    for i in tl.static_range(4):
        y = tl.minimum(tl.maximum(floor_y.to(tl.int32) + (i - 1), 0), height - 1) + y0
        wy = cubic(ty, i, A)
        for j in tl.static_range(4):
            x = tl.minimum(tl.maximum(floor_x.to(tl.int32) + (j - 1), 0), width - 1) + x0
            inside = tl.load(masks + (query * H + y) * W + x, mask=there, other=0) != 0
            weight = tl.where(inside, wy * cubic(tx, j, A), 0.0)
            place = image + y * W + x
            r += weight * (
                tl.load(place, mask=there & inside, other=0).to(tl.float32) * r_scale + r_shift
            )
            g += weight * (
                tl.load(place + H * W, mask=there & inside, other=0).to(tl.float32) * g_scale
                + g_shift
            )
            b += weight * (
                tl.load(place + 2 * H * W, mask=there & inside, other=0).to(tl.float32) * b_scale
                + b_shift
            )
    out = crops + crop * 3 * side * side + pixel
    kind = crops.dtype.element_ty
    tl.store(out, r.to(kind), mask=there)
    tl.store(out + side * side, g.to(kind), mask=there)
    tl.store(out + 2 * side * side, b.to(kind), mask=there)


def launch_masks(
    logits: Tensor, size: tuple[int, int], threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [Q, h, w] -> masks uint8 [Q, *size], 1 where the sigmoid of the upsampled logits is
    above threshold; tight boxes int64 [Q, 4] as x0, y0, x1, y1 (ends excluded; of an empty mask the
    whole), and valid [Q]: the mask is not empty.
    """
    (Q, h, w), (H, W) = logits.shape, size
    level = (
        math.inf
        if threshold >= 1
        else -math.inf
        if threshold <= 0
        else math.log(threshold / (1 - threshold))
    )
    parameters = dict(SAFE_MASKS)
    blocks = cdiv(H, parameters["ROWS"])
    masks = torch.empty(Q, H, W, dtype=torch.uint8, device=logits.device)
    bounds = torch.empty(Q, blocks, 4, dtype=torch.int32, device=logits.device)
    if Q:
        (logits,) = contiguous(logits)
        mask_kernel[(blocks, Q)](logits, masks, bounds, h, w, H, W, blocks, level, **parameters)
    # [Q] each
    (x0, y0), (x1, y1) = (bounds[..., :2].amin(1).unbind(1), bounds[..., 2:].amax(1).unbind(1))
    valid = x1 > 0
    boxes = (x0.where(valid, 0), y0.where(valid, 0), x1.where(valid, W), y1.where(valid, H))
    return masks, torch.stack(boxes, 1).long(), valid


def launch_crops(
    image: Tensor,
    masks: Tensor,
    index: Tensor,
    boxes: Tensor,
    mean: list[float],
    std: list[float],
    side: int,
    kind: torch.dtype,
) -> Tensor:
    """Crops [P, 3, side, side] of the masks that `index` [P] names, 0 outside the mask: of (image /
    255 - mean) / std, bicubic.

    image uint8 [3, H, W], masks uint8 [Q, H, W], boxes [Q, 4] of all masks.
    """
    H, W = image.shape[-2:]
    crops = torch.empty(len(index), 3, side, side, dtype=kind, device=image.device)
    if not len(index):
        return crops
    scale, shift = [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
    image, masks, index, boxes = contiguous(image, masks, index.int(), boxes.int())
    parameters = dict(SAFE_CROPS)
    crop_kernel[(cdiv(side * side, parameters["PIXELS"]), len(index))](
        image, masks, index, boxes, *scale, *shift, crops, H, W, side, A=CUBIC, **parameters
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
    index: Tensor,
    boxes: Tensor,
    mean: list[float],
    std: list[float],
    side: int,
    kind: torch.dtype,
) -> Tensor:
    """See `launch_crops`."""
    return launch_crops(image, masks, index, boxes, mean, std, side, kind)


@region_crop.register_fake
def _(image, masks, index, boxes, mean, std, side, kind):
    return image.new_empty(index.shape[0], 3, side, side, dtype=kind)
