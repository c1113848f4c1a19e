"""Focal and dice loss of matched masks at the label map's size (MaskFormer, Cheng et al. 2021),
forward and backward.

The logits lie at stride R of the label map and are upsampled bilinearly, a tile at a time in
registers: no full-size float tensor exists, and no buffer but the gradient itself is as large as
the logits. Nothing is added atomically, so that results do not depend on the order of blocks.
"""

import torch
from torch import Tensor

from kernels.jit import cdiv, contiguous, jit, on_device, plane_contiguous, sigmoid_parts, tl

RATIOS = (2, 4, 8)  # of label map to logits; see `is_supported`
FORWARD = {"BLOCK_CELLS": 256, "num_warps": 4, "num_stages": 1}
BACKWARD = {"num_warps": 4, "num_stages": 1}


@jit
def mask_loss_forward_kernel(
    masks_ptr,  # [L, B, Q, h, w], any float, the pixels dense
    matched_ptr,  # int64 [L, B, T]
    labels_ptr,  # [B, H, W], integers
    classes_ptr,  # int32 [B, T]
    sums_ptr,  # out: fp32 [L*B*T, tiles, 4], zeros
    B,
    T,
    h,
    w,
    tiles,
    stride_l,
    stride_b,
    stride_q,
    R: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
):
    """sum over the pixels of focal(z, t), p t, p and t of each matched pair, where z is the
    upsampled logit, p = sigmoid(z), t = (label == class) and

        focal = 0.25 (1 - p)^2 softplus(-z) if t else 0.75 p^2 softplus(z).

    The block owns BLOCK_CELLS cells of one pair: the R x R pixels between four neighbouring logits
    (fewer at the border), which are read once.
    """
    pair = tl.program_id(0)
    tile = tl.program_id(1)
    layer = (pair // T) // B
    image = (pair // T) % B
    query = tl.load(matched_ptr + pair)
    if query >= 0:
        target_class = tl.load(classes_ptr + image * T + pair % T)
        plane_ptr = masks_ptr + layer.to(tl.int64) * stride_l + image.to(tl.int64) * stride_b
        plane_ptr += query * stride_q
        labels_ptr += image.to(tl.int64) * h * R * w * R
        cell = tile * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
        mask = cell < (h + 1) * (w + 1)
        # The corner above and to the left; -1 at the border.
        i = cell // (w + 1) - 1
        j = cell % (w + 1) - 1
        upper = tl.maximum(i, 0) * w
        lower = tl.minimum(i + 1, h - 1) * w
        left = tl.maximum(j, 0)
        right = tl.minimum(j + 1, w - 1)
        a = tl.load(plane_ptr + upper + left, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(plane_ptr + upper + right, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(plane_ptr + lower + left, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(plane_ptr + lower + right, mask=mask, other=0.0).to(tl.float32)
        acc_focal = tl.zeros((BLOCK_CELLS,), tl.float32)
        acc_overlap = tl.zeros((BLOCK_CELLS,), tl.float32)
        acc_p = tl.zeros((BLOCK_CELLS,), tl.float32)
        acc_t = tl.zeros((BLOCK_CELLS,), tl.float32)
        for k in tl.static_range(R * R):
            fy = (k // R + 0.5) / R
            fx = (k % R + 0.5) / R
            y = i * R + R // 2 + k // R
            x = j * R + R // 2 + k % R
            inside = mask & (y >= 0) & (y < h * R) & (x >= 0) & (x < w * R)
            label = tl.load(labels_ptr + y * (w * R) + x, mask=inside, other=0)
            t = label.to(tl.int32) == target_class
            z = (a * (1 - fx) + b * fx) * (1 - fy) + (c * (1 - fx) + d * fx) * fy
            p, q, log1pexp = sigmoid_parts(z)
            positive = 0.25 * q * q * (log1pexp + tl.maximum(-z, 0.0))
            negative = 0.75 * p * p * (log1pexp + tl.maximum(z, 0.0))
            acc_focal += tl.where(inside, tl.where(t, positive, negative), 0.0)
            acc_overlap += tl.where(inside & t, p, 0.0)
            acc_p += tl.where(inside, p, 0.0)
            acc_t += tl.where(inside & t, 1.0, 0.0)
        out_ptr = sums_ptr + (pair.to(tl.int64) * tiles + tile) * 4
        tl.store(out_ptr, tl.sum(acc_focal, 0))
        tl.store(out_ptr + 1, tl.sum(acc_overlap, 0))
        tl.store(out_ptr + 2, tl.sum(acc_p, 0))
        tl.store(out_ptr + 3, tl.sum(acc_t, 0))


@jit
def upsampling_weights(pixel, logit, size, R: tl.constexpr):
    """Share of each logit in each pixel along one axis, [pixels, logits]: PyTorch's bilinear
    weights, max(0, 1 - |s - logit|) with s the pixel's place among the logits, held to the first
    and the last one.
    """
    s = (pixel.to(tl.float32) + 0.5) / R - 0.5
    s = tl.minimum(tl.maximum(s, 0.0), size - 1.0)
    return tl.maximum(1.0 - tl.abs(s[:, None] - logit.to(tl.float32)[None, :]), 0.0)


@jit
def mask_loss_backward_kernel(
    masks_ptr,  # [L, B, Q, h, w], any float, the pixels dense
    matched_ptr,  # int64 [L, B, T]
    labels_ptr,  # [B, H, W], integers
    classes_ptr,  # int32 [B, T]
    factors_ptr,  # fp32 [L*B*T, 3]: of d focal, of t and of 1 in d dice / d p
    grad_ptr,  # out: as masks, zeros; a query is matched at most once
    B,
    T,
    h,
    w,
    stride_l,
    stride_b,
    stride_q,
    grad_stride_l,
    grad_stride_b,
    grad_stride_q,
    R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """grad = Uy^T G Ux, with X the logits, Z = Uy X Ux^T their upsampling, and at every pixel

        G = factor0 d focal / d z + (factor1 t + factor2) p (1 - p).

    The block owns (BLOCK_H - 2) x (BLOCK_W - 2) logits of one matched pair. It reads the logits
    around them, too, and visits all pixels that any of its own has a share in: R times every R-th
    row.
    """
    pair = tl.program_id(0)
    tiles_w = tl.cdiv(w, BLOCK_W - 2)
    layer = (pair // T) // B
    image = (pair // T) % B
    query = tl.load(matched_ptr + pair)
    if query >= 0:
        target_class = tl.load(classes_ptr + image * T + pair % T)
        d_focal = tl.load(factors_ptr + pair * 3)
        d_target = tl.load(factors_ptr + pair * 3 + 1)
        d_all = tl.load(factors_ptr + pair * 3 + 2)
        plane = layer.to(tl.int64) * stride_l + image.to(tl.int64) * stride_b + query * stride_q
        grad_plane = layer.to(tl.int64) * grad_stride_l + image.to(tl.int64) * grad_stride_b
        grad_plane += query * grad_stride_q
        labels_ptr += image.to(tl.int64) * h * R * w * R
        first_i = (tl.program_id(1) // tiles_w) * (BLOCK_H - 2) - 1
        first_j = (tl.program_id(1) % tiles_w) * (BLOCK_W - 2) - 1
        i = first_i + tl.arange(0, BLOCK_H)
        j = first_j + tl.arange(0, BLOCK_W)
        known = (i >= 0)[:, None] & (i < h)[:, None] & (j >= 0)[None, :] & (j < w)[None, :]
        offs = i[:, None] * w + j[None, :]
        X = tl.load(masks_ptr + plane + offs, mask=known, other=0.0).to(tl.float32)
        # From the first logit's centre on.
        x = first_j * R + R // 2 + tl.arange(0, BLOCK_W * R)
        Ux = upsampling_weights(x, j, w, R)
        X_wide = tl.dot(X, tl.trans(Ux), input_precision="tf32x3")
        acc = tl.zeros((BLOCK_H, BLOCK_W * R), tl.float32)
        for phase in tl.range(0, R, num_stages=1):
            y = i * R + R // 2 + phase
            Uy = upsampling_weights(y, i, h, R)
            Z = tl.dot(Uy, X_wide, input_precision="tf32x3")
            inside = (y >= 0)[:, None] & (y < h * R)[:, None] & (x >= 0)[None, :]
            inside = inside & (x < w * R)[None, :]
            label = tl.load(labels_ptr + y[:, None] * (w * R) + x[None, :], mask=inside, other=0)
            t = label.to(tl.int32) == target_class
            p, q, log1pexp = sigmoid_parts(Z)
            positive = -0.25 * q * q * (2.0 * p * (log1pexp + tl.maximum(-Z, 0.0)) + q)
            negative = 0.75 * p * p * (2.0 * q * (log1pexp + tl.maximum(Z, 0.0)) + p)
            G = d_focal * tl.where(t, positive, negative)
            G += (tl.where(t, d_target, 0.0) + d_all) * p * q
            G = tl.where(inside, G, 0.0)
            acc = tl.dot(tl.trans(Uy), G, acc, input_precision="tf32x3")
        grad = tl.dot(acc, Ux, input_precision="tf32x3")
        own_i = (i > first_i) & (i < first_i + BLOCK_H - 1) & (i < h)
        own_j = (j > first_j) & (j < first_j + BLOCK_W - 1) & (j < w)
        own = own_i[:, None] & own_j[None, :]
        grad = grad.to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + grad_plane + offs, grad, mask=own)


def is_supported(masks: Tensor, labels: Tensor) -> bool:
    """The label map is a small whole number of times the logits' size, the same both ways."""
    h, w = masks.shape[-2:]
    return any(labels.shape[-2:] == (R * h, R * w) for R in RATIOS)


@on_device
def launch_forward(
    masks: Tensor, matched: Tensor, labels: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """masks [L, B, Q, h, w], matched [L, B, T] (query of each target or -1), labels [B, H, W],
    classes [B, T] -> focal and dice loss of each pair, fp32 [L, B, T], 0 where there is no match;
    and the sums [L, B, T, 4] for `backward`.
    """
    L, B, _, h, w = masks.shape
    T = classes.shape[1]
    masks = plane_contiguous(masks)
    matched, labels, classes = contiguous(matched, labels, classes.int())
    tiles = cdiv((h + 1) * (w + 1), FORWARD["BLOCK_CELLS"])
    sums = masks.new_zeros(L, B, T, tiles, 4, dtype=torch.float32)
    if sums.numel():
        sizes = (B, T, h, w, tiles, *masks.stride()[:3])
        mask_loss_forward_kernel[(L * B * T, tiles)](
            masks, matched, labels, classes, sums, *sizes, R=labels.shape[-1] // w, **FORWARD
        )
    sums = sums.sum(3)
    focal, overlap, p, t = sums.unbind(-1)
    dice = (1 - (2 * overlap + 1) / (p + t + 1)) * (matched >= 0)
    return focal / labels.shape[1:].numel(), dice, sums


@on_device
def launch_backward(
    grad_focal: Tensor,
    grad_dice: Tensor,
    sums: Tensor,
    masks: Tensor,
    matched: Tensor,
    labels: Tensor,
    classes: Tensor,
) -> Tensor:
    """The gradient of the masks [L, B, Q, h, w], in their layout in memory."""
    L, B, _, h, w = masks.shape
    T = classes.shape[1]
    masks = plane_contiguous(masks)
    matched, labels, classes = contiguous(matched, labels, classes.int())
    grad = torch.zeros_like(masks)
    if not sums.numel():
        return grad
    _, overlap, p, t = sums.unbind(-1)
    D = p + t + 1
    d_focal = grad_focal / labels.shape[1:].numel()
    d_all = grad_dice * (2 * overlap + 1) / D**2
    factors = torch.stack([d_focal, -2 * grad_dice / D, d_all], -1).float().contiguous()
    R = labels.shape[-1] // w
    BLOCK_H = BLOCK_W = 16
    tiles = cdiv(h, BLOCK_H - 2) * cdiv(w, BLOCK_W - 2)
    sizes = (B, T, h, w, *masks.stride()[:3], *grad.stride()[:3])
    blocks = {"R": R, "BLOCK_H": BLOCK_H, "BLOCK_W": BLOCK_W, **BACKWARD}
    if R <= 4:
        blocks["maxnreg"] = 128  # four blocks a multiprocessor; wider tiles would spill
    mask_loss_backward_kernel[(L * B * T, tiles)](
        masks, matched, labels, classes, factors, grad, *sizes, **blocks
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
    return torch.empty_like(plane_contiguous(masks))


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[2], *inputs)


def backward(ctx, grad_focal, grad_dice, _):
    return mask_loss_backward(grad_focal, grad_dice, *ctx.saved_tensors), None, None, None


mask_loss_op.register_autograd(backward, setup_context=setup_context)


def mask_loss(
    masks: Tensor, matched: Tensor, labels: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor]:
    """Focal and dice loss of each pair, fp32 [L, B, T]; differentiable in the masks. See
    `launch_forward` and `is_supported`.
    """
    return mask_loss_op(masks, matched, labels, classes)[:2]
