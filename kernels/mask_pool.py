"""Mask pooling: the mean of dense features under each mask, soft or thresholded, forward and
backward.

One product of mask weights with features, in which the weights (a sigmoid, or a comparison) are
made on the fly from the logits, and their sum comes with it: no [Q, hw] weights in memory.
"""

import math

import torch
from torch import Tensor

from kernels.jit import cdiv, contiguous, jit, tl

SAFE = {"QUERIES": 32, "WIDTH": 64, "PIXELS": 32, "num_warps": 8}
# 4 warps hold too much each.
MASK_GRADIENT = {"QUERIES": 64, "WIDTH": 32, "PIXELS": 64, "num_warps": 8}
FEATURE_GRADIENT = {"QUERIES": 32, "WIDTH": 64, "PIXELS": 64, "num_warps": 4}


def logit(threshold: float) -> float:
    """Where the sigmoid is `threshold`."""
    return (
        math.inf
        if threshold >= 1
        else -math.inf
        if threshold <= 0
        else math.log(threshold / (1 - threshold))
    )


@jit
def weight(x, level, SOFT: tl.constexpr):
    if SOFT:
        e = tl.exp(-tl.abs(x))
        w = tl.where(x >= 0, 1.0, e) / (1.0 + e)
    else:
        w = tl.where(x > level, 1.0, 0.0)
    return w


@jit
def forward_kernel(
    features,  # [B, D, hw]
    masks,  # [B, Q, hw]
    sums,  # out: fp32 [S, B, Q, D]: of S parts of the pixels
    totals,  # out: fp32 [S, B, Q]: sum of the weights
    B,
    Q,
    D,
    HW,
    part,
    level,
    SOFT: tl.constexpr,
    QUERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
):
    width_tiles = tl.cdiv(D, WIDTH)
    query = (tl.program_id(0) // width_tiles) * QUERIES + tl.arange(0, QUERIES)
    d = (tl.program_id(0) % width_tiles) * WIDTH + tl.arange(0, WIDTH)
    image, split = tl.program_id(1), tl.program_id(2)
    mask_rows = masks + (image.to(tl.int64) * Q + query[:, None]) * HW
    feature_rows = features + (image.to(tl.int64) * D + d[None, :]) * HW
    acc = tl.zeros((QUERIES, WIDTH), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    first = split * part
    while first < tl.minimum((split + 1) * part, HW):
        pixel = first + tl.arange(0, PIXELS)
        inside = pixel < HW
        there = (query[:, None] < Q) & inside[None, :]
        x = tl.load(mask_rows + pixel[None, :], mask=there, other=0.0).to(tl.float32)
        w = tl.where(there, weight(x, level, SOFT), 0.0)
        f = tl.load(
            feature_rows + pixel[:, None], mask=inside[:, None] & (d[None, :] < D), other=0.0
        )
        if f.dtype == tl.float32:
            acc = tl.dot(w, f, acc, input_precision="tf32x3")
        else:
            acc = tl.dot(w.to(f.dtype), f, acc)
        total += tl.sum(w, 1)
        first += PIXELS
    base = (split * B + image).to(tl.int64) * Q + query
    tl.store(
        sums + base[:, None] * D + d[None, :], acc, mask=(query[:, None] < Q) & (d[None, :] < D)
    )
    first_tile = tl.where(tl.program_id(0) % width_tiles == 0, Q, 0)
    tl.store(totals + base, total, mask=query < first_tile)


@jit
def mask_gradient_kernel(
    features,
    masks,  # as in forward_kernel
    grad,  # fp32 [B, Q, D], of the pooled features, divided by the sum of the weights
    shift,  # fp32 [B, Q]: grad . pooled
    out,  # [B, Q, hw]
    Q,
    D,
    HW,
    QUERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
):
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    image = tl.program_id(2).to(tl.int64)
    acc = tl.zeros((QUERIES, PIXELS), tl.float32)
    first = 0
    while first < D:
        d = first + tl.arange(0, WIDTH)
        here = (query[:, None] < Q) & (d[None, :] < D)
        g = tl.load(grad + (image * Q + query[:, None]) * D + d[None, :], mask=here, other=0.0)
        here = (d[:, None] < D) & (pixel[None, :] < HW)
        f = tl.load(features + (image * D + d[:, None]) * HW + pixel[None, :], mask=here, other=0.0)
        acc = tl.dot(g, f.to(tl.float32), acc, input_precision="tf32x3")
        first += WIDTH
    there = (query[:, None] < Q) & (pixel[None, :] < HW)
    place = (image * Q + query[:, None]) * HW + pixel[None, :]
    x = tl.load(masks + place, mask=there, other=0.0).to(tl.float32)
    e = tl.exp(-tl.abs(x))
    slope = e / ((1.0 + e) * (1.0 + e))
    s = tl.load(shift + image * Q + query, mask=query < Q, other=0.0)
    tl.store(out + place, ((acc - s[:, None]) * slope).to(out.dtype.element_ty), mask=there)


@jit
def feature_gradient_kernel(
    masks,
    grad,  # as in mask_gradient_kernel
    out,  # [B, D, hw]
    Q,
    D,
    HW,
    level,
    SOFT: tl.constexpr,
    QUERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
):
    d = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    image = tl.program_id(2).to(tl.int64)
    acc = tl.zeros((WIDTH, PIXELS), tl.float32)
    first = 0
    while first < Q:
        query = first + tl.arange(0, QUERIES)
        there = (query[:, None] < Q) & (pixel[None, :] < HW)
        x = tl.load(
            masks + (image * Q + query[:, None]) * HW + pixel[None, :], mask=there, other=0.0
        ).to(tl.float32)
        w = tl.where(there, weight(x, level, SOFT), 0.0)
        here = (query[None, :] < Q) & (d[:, None] < D)
        g = tl.load(grad + (image * Q + query[None, :]) * D + d[:, None], mask=here, other=0.0)
        acc = tl.dot(g, w, acc, input_precision="tf32x3")
        first += QUERIES
    there = (d[:, None] < D) & (pixel[None, :] < HW)
    tl.store(
        out + (image * D + d[:, None]) * HW + pixel[None, :],
        acc.to(out.dtype.element_ty),
        mask=there,
    )


def launch_forward(features: Tensor, masks: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """features [B, D, h, w], mask logits [B, Q, h, w] -> the mean feature under each mask [B, Q,
    D], zero under an empty one, in the features' type, and the sum of each mask's weights [B, Q].

    A weight is sigmoid(mask) or, with a `threshold` from 0 to 1, whether that is above it
    (negative: soft).
    """
    B, D = features.shape[:2]
    Q, HW = masks.shape[1], masks.shape[2] * masks.shape[3]
    features, masks = contiguous(features, masks)
    parameters = dict(SAFE)
    tiles, pixels = (
        cdiv(Q, parameters["QUERIES"]) * cdiv(D, parameters["WIDTH"]),
        parameters["PIXELS"],
    )
    splits = max(min(cdiv(264, max(tiles * B, 1)), HW // (16 * pixels)), 1)
    part = cdiv(cdiv(HW, splits), pixels) * pixels
    splits = cdiv(HW, part)
    sums = features.new_zeros(splits, B, Q, D, dtype=torch.float32)
    totals = features.new_zeros(splits, B, Q, dtype=torch.float32)
    if sums.numel():
        forward_kernel[(tiles, B, splits)](
            features,
            masks,
            sums,
            totals,
            B,
            Q,
            D,
            HW,
            part,
            logit(max(threshold, 0.0)),
            SOFT=threshold < 0,
            **parameters,
        )
    total = totals.sum(0)
    return (sums.sum(0) / total.where(total > 0, 1)[..., None]).to(features.dtype), total


def launch_backward(
    grad: Tensor, pooled: Tensor, total: Tensor, features: Tensor, masks: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """Gradients of features and mask logits (zero where thresholded)."""
    B, D = features.shape[:2]
    Q, HW = masks.shape[1], masks.shape[2] * masks.shape[3]
    features, masks = contiguous(features, masks)
    scaled = (
        grad.float() / total.where(total > 0, 1)[..., None] * (total > 0)[..., None]
    ).contiguous()
    of_features, of_masks = (x.new_zeros(x.shape) for x in (features, masks))
    if not scaled.numel():
        return of_features, of_masks
    feature_gradient_kernel[
        (cdiv(D, FEATURE_GRADIENT["WIDTH"]), cdiv(HW, FEATURE_GRADIENT["PIXELS"]), B)
    ](
        masks,
        scaled,
        of_features,
        Q,
        D,
        HW,
        logit(max(threshold, 0.0)),
        SOFT=threshold < 0,
        **FEATURE_GRADIENT,
    )
    if threshold < 0:
        shift = (scaled * pooled.float()).sum(-1)
        mask_gradient_kernel[
            (cdiv(Q, MASK_GRADIENT["QUERIES"]), cdiv(HW, MASK_GRADIENT["PIXELS"]), B)
        ](features, masks, scaled, shift, of_masks, Q, D, HW, **MASK_GRADIENT)
    return of_features, of_masks


@torch.library.custom_op("zsseg::mask_pool", mutates_args=(), device_types="cuda")
def mask_pool_op(features: Tensor, masks: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """See `launch_forward`."""
    return launch_forward(features, masks, threshold)


@torch.library.custom_op("zsseg::mask_pool_backward", mutates_args=(), device_types="cuda")
def mask_pool_backward(
    grad: Tensor, pooled: Tensor, total: Tensor, features: Tensor, masks: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """See `launch_backward`."""
    return launch_backward(grad, pooled, total, features, masks, threshold)


@mask_pool_op.register_fake
def _(features, masks, threshold):
    B, Q = masks.shape[:2]
    return features.new_empty(B, Q, features.shape[1]), masks.new_empty(B, Q, dtype=torch.float32)


@mask_pool_backward.register_fake
def _(grad, pooled, total, features, masks, threshold):
    return features.new_empty(features.shape), masks.new_empty(masks.shape)


def setup_context(ctx, inputs, output):
    features, masks, ctx.threshold = inputs
    ctx.save_for_backward(*output, features, masks)


def backward(ctx, grad, _):
    return *mask_pool_backward(grad, *ctx.saved_tensors, ctx.threshold), None


mask_pool_op.register_autograd(backward, setup_context=setup_context)


def mask_pool(features: Tensor, masks: Tensor, threshold: float = -1.0) -> Tensor:
    """features [B, D, h, w], mask logits [B, Q, h, w] -> mean features [B, Q, D]. See
    `launch_forward`.
    """
    return mask_pool_op(features, masks, threshold)[0]
