"""Focal and dice loss of matched masks at the label map's size (MaskFormer, Cheng et al. 2021),
forward and backward.

The logits lie at stride R of the label map and are upsampled bilinearly. Between four neighbouring
logits lies a cell of R x R pixels: the kernel reads the four corners once and visits the cell's
pixels in registers, so that no full-size float tensor exists. Backwards every cell keeps four
corner sums, and a second kernel adds the four cells around each logit: no atomics.
"""

import torch
from torch import Tensor

from kernels.jit import cdiv, contiguous, jit, tl

RATIOS = (2, 4, 8)  # of label map to logits; see `fits`
SAFE = {"CELLS": 256, "num_warps": 4}
ALPHA = 0.25


@jit
def corner_values(source, y0, y1, x0, x1, w, there):
    """The logits at the four corners of each cell."""
    a = tl.load(source + y0 * w + x0, mask=there, other=0.0).to(tl.float32)
    b = tl.load(source + y0 * w + x1, mask=there, other=0.0).to(tl.float32)
    c = tl.load(source + y1 * w + x0, mask=there, other=0.0).to(tl.float32)
    d = tl.load(source + y1 * w + x1, mask=there, other=0.0).to(tl.float32)
    return a, b, c, d


@jit
def sigmoid_parts(x):
    """p, 1 - p and log(1 + exp(-|x|)), each without cancellation."""
    e = tl.exp(-tl.abs(x))
    return (
        tl.where(x >= 0, 1.0, e) / (1.0 + e),
        tl.where(x >= 0, e, 1.0) / (1.0 + e),
        tl.log(1.0 + e),
    )


@jit
def forward_kernel(
    masks,  # [L, B, Q, h, w], any float
    matched,  # int64 [L, B, T]
    labels,  # [B, H, W], integers
    classes,  # int32 [B, T]
    sums,  # out: fp32 [L*B*T, tiles, 4], zeros: focal, p . t, p, t
    B,
    Q,
    T,
    h,
    w,
    tiles,
    R: tl.constexpr,
    CELLS: tl.constexpr,
):
    pair, tile = tl.program_id(1), tl.program_id(0)
    image = (pair // T) % B
    query = tl.load(matched + pair)
    if query >= 0:
        wanted = tl.load(classes + image * T + pair % T)
        source = masks + ((pair // T).to(tl.int64) * Q + query) * h * w
        cell = tile * CELLS + tl.arange(0, CELLS)
        there = cell < (h + 1) * (w + 1)
        # The corner above and to the left; -1 at the border.
        i, j = (cell // (w + 1) - 1, cell % (w + 1) - 1)
        y0, y1 = tl.maximum(i, 0), tl.minimum(i + 1, h - 1)
        x0, x1 = tl.maximum(j, 0), tl.minimum(j + 1, w - 1)
        a, b, c, d = corner_values(source, y0, y1, x0, x1, w, there)
        focal = tl.zeros((CELLS,), tl.float32)
        overlap = tl.zeros((CELLS,), tl.float32)
        p_sum = tl.zeros((CELLS,), tl.float32)
        t_sum = tl.zeros((CELLS,), tl.float32)
        for k in tl.static_range(R * R):
            fy, fx = (k // R + 0.5) / R, (k % R + 0.5) / R
            y, x = i * R + R // 2 + k // R, j * R + R // 2 + k % R
            inside = there & (y >= 0) & (y < h * R) & (x >= 0) & (x < w * R)
            label = tl.load(
                labels + (image.to(tl.int64) * h * R + y) * w * R + x, mask=inside, other=0
            ).to(tl.int32)
            t = label == wanted
            z = (a * (1 - fx) + b * fx) * (1 - fy) + (c * (1 - fx) + d * fx) * fy
            p, q, soft = sigmoid_parts(z)
            loss = tl.where(
                t,
                0.25 * q * q * (soft + tl.maximum(-z, 0.0)),
                0.75 * p * p * (soft + tl.maximum(z, 0.0)),
            )
            focal += tl.where(inside, loss, 0.0)
            overlap += tl.where(inside & t, p, 0.0)
            p_sum += tl.where(inside, p, 0.0)
            t_sum += tl.where(inside & t, 1.0, 0.0)
        base = sums + (pair.to(tl.int64) * tiles + tile) * 4
        tl.store(base, tl.sum(focal, 0))
        tl.store(base + 1, tl.sum(overlap, 0))
        tl.store(base + 2, tl.sum(p_sum, 0))
        tl.store(base + 3, tl.sum(t_sum, 0))


@jit
def backward_kernel(
    masks,
    matched,
    labels,
    classes,  # as in forward_kernel
    weights,  # fp32 [L*B*T, 3]: factors of d focal, of t and of 1 in d dice / d p
    corners,  # out: fp32 [L*B*T, 4, cells]
    B,
    Q,
    T,
    h,
    w,
    R: tl.constexpr,
    CELLS: tl.constexpr,
):
    pair, tile = tl.program_id(1), tl.program_id(0)
    image = (pair // T) % B
    query = tl.load(matched + pair)
    if query >= 0:
        wanted = tl.load(classes + image * T + pair % T)
        of_focal = tl.load(weights + pair * 3)
        of_target = tl.load(weights + pair * 3 + 1)
        of_all = tl.load(weights + pair * 3 + 2)
        source = masks + ((pair // T).to(tl.int64) * Q + query) * h * w
        cells = (h + 1) * (w + 1)
        cell = tile * CELLS + tl.arange(0, CELLS)
        there = cell < cells
        i, j = cell // (w + 1) - 1, cell % (w + 1) - 1
        y0, y1 = tl.maximum(i, 0), tl.minimum(i + 1, h - 1)
        x0, x1 = tl.maximum(j, 0), tl.minimum(j + 1, w - 1)
        a, b, c, d = corner_values(source, y0, y1, x0, x1, w, there)
        ga = tl.zeros((CELLS,), tl.float32)
        gb = tl.zeros((CELLS,), tl.float32)
        gc = tl.zeros((CELLS,), tl.float32)
        gd = tl.zeros((CELLS,), tl.float32)
        for k in tl.static_range(R * R):
            fy, fx = (k // R + 0.5) / R, (k % R + 0.5) / R
            y, x = i * R + R // 2 + k // R, j * R + R // 2 + k % R
            inside = there & (y >= 0) & (y < h * R) & (x >= 0) & (x < w * R)
            label = tl.load(
                labels + (image.to(tl.int64) * h * R + y) * w * R + x, mask=inside, other=0
            ).to(tl.int32)
            t = label == wanted
            z = (a * (1 - fx) + b * fx) * (1 - fy) + (c * (1 - fx) + d * fx) * fy
            p, q, soft = sigmoid_parts(z)
            positive = -0.25 * q * q * (2.0 * p * (soft + tl.maximum(-z, 0.0)) + q)
            negative = 0.75 * p * p * (2.0 * q * (soft + tl.maximum(z, 0.0)) + p)
            g = (
                of_focal * tl.where(t, positive, negative)
                + (tl.where(t, of_target, 0.0) + of_all) * p * q
            )
            g = tl.where(inside, g, 0.0)
            ga += g * (1 - fx) * (1 - fy)
            gb += g * fx * (1 - fy)
            gc += g * (1 - fx) * fy
            gd += g * fx * fy
        # At the border both corners are the same logit: fold the one outside into the one inside.
        top, bottom, left, right = i < 0, i >= h - 1, j < 0, j >= w - 1
        gc, ga = tl.where(top, gc + ga, gc), tl.where(top, 0.0, ga)
        gd, gb = tl.where(top, gd + gb, gd), tl.where(top, 0.0, gb)
        ga, gc = tl.where(bottom, ga + gc, ga), tl.where(bottom, 0.0, gc)
        gb, gd = tl.where(bottom, gb + gd, gb), tl.where(bottom, 0.0, gd)
        gb, ga = tl.where(left, gb + ga, gb), tl.where(left, 0.0, ga)
        gd, gc = tl.where(left, gd + gc, gd), tl.where(left, 0.0, gc)
        ga, gb = tl.where(right, ga + gb, ga), tl.where(right, 0.0, gb)
        gc, gd = tl.where(right, gc + gd, gc), tl.where(right, 0.0, gd)
        out = corners + pair.to(tl.int64) * 4 * cells + cell
        tl.store(out, ga, mask=there)
        tl.store(out + cells, gb, mask=there)
        tl.store(out + 2 * cells, gc, mask=there)
        tl.store(out + 3 * cells, gd, mask=there)


@jit
def combine_kernel(
    corners,  # fp32 [L*B*T, 4, cells]
    matched,  # int64 [L, B, T]
    grad,  # in and out: [L, B, Q, h, w], zeros; a query is matched at most once
    Q,
    T,
    h,
    w,
    PIXELS: tl.constexpr,
):
    pair = tl.program_id(1)
    query = tl.load(matched + pair)
    if query >= 0:
        pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
        there = pixel < h * w
        y, x = pixel // w, pixel % w
        cells = (h + 1) * (w + 1)
        # The cell above and to the left.
        base = corners + pair.to(tl.int64) * 4 * cells + y * (w + 1) + x
        total = tl.load(base + 3 * cells, mask=there, other=0.0)
        total += tl.load(base + 2 * cells + 1, mask=there, other=0.0)
        total += tl.load(base + cells + w + 1, mask=there, other=0.0)
        total += tl.load(base + w + 2, mask=there, other=0.0)
        out = grad + ((pair // T).to(tl.int64) * Q + query) * h * w + pixel
        tl.store(out, total.to(grad.dtype.element_ty), mask=there)


def fits(masks: Tensor, labels: Tensor) -> bool:
    """The label map is a small whole number of times the logits' size, the same both ways."""
    h, w = masks.shape[-2:]
    return any(labels.shape[-2:] == (R * h, R * w) for R in RATIOS)


def launch_forward(
    masks: Tensor, matched: Tensor, labels: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """masks [L, B, Q, h, w], matched [L, B, T] (query of each target or -1), labels [B, H, W],
    classes [B, T] -> focal and dice loss of each pair, fp32 [L, B, T], 0 where there is no match;
    and the sums [L, B, T, 4] for `backward`.
    """
    L, B, Q, h, w = masks.shape
    T = classes.shape[1]
    masks, matched, labels, classes = contiguous(masks, matched, labels, classes.int())
    parameters = dict(SAFE)
    tiles = cdiv((h + 1) * (w + 1), parameters["CELLS"])
    sums = masks.new_zeros(L, B, T, tiles, 4, dtype=torch.float32)
    if sums.numel():
        forward_kernel[(tiles, L * B * T)](
            masks,
            matched,
            labels,
            classes,
            sums,
            B,
            Q,
            T,
            h,
            w,
            tiles,
            R=labels.shape[-1] // w,
            **parameters,
        )
    sums = sums.sum(3)
    focal, overlap, p, t = sums.unbind(-1)
    dice = (1 - (2 * overlap + 1) / (p + t + 1)) * (matched >= 0)
    return focal / labels[0].numel(), dice, sums


def launch_backward(
    grad_focal: Tensor,
    grad_dice: Tensor,
    sums: Tensor,
    masks: Tensor,
    matched: Tensor,
    labels: Tensor,
    classes: Tensor,
) -> Tensor:
    """The gradient of the masks [L, B, Q, h, w]."""
    L, B, Q, h, w = masks.shape
    T = classes.shape[1]
    masks, matched, labels, classes = contiguous(masks, matched, labels, classes.int())
    grad = masks.new_zeros(masks.shape)
    if not sums.numel():
        return grad
    _, overlap, p, t = sums.unbind(-1)
    D = p + t + 1
    weights = torch.stack(
        [grad_focal / labels[0].numel(), -2 * grad_dice / D, grad_dice * (2 * overlap + 1) / D**2],
        -1,
    )
    cells = (h + 1) * (w + 1)
    corners = sums.new_empty(L, B, T, 4, cells)
    parameters = dict(SAFE)
    backward_kernel[(cdiv(cells, parameters["CELLS"]), L * B * T)](
        masks,
        matched,
        labels,
        classes,
        weights.float().contiguous(),
        corners,
        B,
        Q,
        T,
        h,
        w,
        R=labels.shape[-1] // w,
        **parameters,
    )
    combine_kernel[(cdiv(h * w, 1024), L * B * T)](
        corners, matched, grad, Q, T, h, w, PIXELS=1024, num_warps=4
    )
    return grad


@torch.library.custom_op("zsseg::mask_loss", mutates_args=(), device_types="cuda")
def mask_loss_op(
    masks: Tensor, matched: Tensor, labels: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `launch_forward`."""
    return launch_forward(masks, matched, labels, classes)


@torch.library.custom_op("zsseg::mask_loss_backward", mutates_args=(), device_types="cuda")
def mask_loss_backward(
    grad_focal: Tensor,
    grad_dice: Tensor,
    sums: Tensor,
    masks: Tensor,
    matched: Tensor,
    labels: Tensor,
    classes: Tensor,
) -> Tensor:
    """See `launch_backward`."""
    return launch_backward(grad_focal, grad_dice, sums, masks, matched, labels, classes)


@mask_loss_op.register_fake
def _(masks, matched, labels, classes):
    focal, dice = (masks.new_empty(matched.shape, dtype=torch.float32) for _ in range(2))
    return focal, dice, masks.new_empty(*matched.shape, 4, dtype=torch.float32)


@mask_loss_backward.register_fake
def _(grad_focal, grad_dice, sums, masks, matched, labels, classes):
    return masks.new_empty(masks.shape)


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[2], *inputs)


def backward(ctx, grad_focal, grad_dice, _):
    return mask_loss_backward(grad_focal, grad_dice, *ctx.saved_tensors), None, None, None


mask_loss_op.register_autograd(backward, setup_context=setup_context)


def mask_loss(
    masks: Tensor, matched: Tensor, labels: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor]:
    """Focal and dice loss of each pair, fp32 [L, B, T]; differentiable in the masks. See
    `launch_forward` and `fits`.
    """
    return mask_loss_op(masks, matched, labels, classes)[:2]
