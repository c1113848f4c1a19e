"""Label map at the picture's own size from mask logits at stride 4 and class probabilities
(MaskFormer, Cheng et al. 2021).

score[c] = sum over q of classes[q, c] * sigmoid(upsampled logits[q]), resized to the original size,
argmax. Resizing is linear, so the kernel resamples the sigmoids of a tile of output pixels,
multiplies them with the class matrix tile by tile and keeps a running maximum: neither [Q, H, W]
nor [C, H, W] exists.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.jit import cdiv, contiguous, jit, power_of_two, tl

SAFE = {"PIXELS": 64, "CLASSES": 32, "num_warps": 8}


@jit
def source(index, scale, size):
    """PyTorch's bilinear sampling (half-pixel centres): lower neighbour, upper neighbour, share of
    the upper.
    """
    position = tl.maximum((index.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    low = tl.minimum(position.to(tl.int32), size - 1)
    return low, tl.minimum(low + 1, size - 1), position - low.to(tl.float32)


@jit
def kernel(
    logits,  # fp32 [h * w, QUERIES], padded with a large negative number
    high,
    low,  # fp16 [QUERIES, columns], the class matrix in two pieces, padded with 0
    labels,  # out: int32 [Ho * Wo]
    top_scores,  # out: fp32 [Ho * Wo]
    scores,  # out, where SCORES: fp32 [C, Ho * Wo]
    h,
    w,
    H,
    W,
    Ho,
    Wo,
    C,
    columns,
    scale_y,
    scale_x,
    QUERIES: tl.constexpr,
    PIXELS: tl.constexpr,
    CLASSES: tl.constexpr,
    SCORES: tl.constexpr,
):
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    there = pixel < Ho * Wo
    query = tl.arange(0, QUERIES)
    y0, y1, fy = source(pixel // Wo, scale_y, H)
    x0, x1, fx = source(pixel % Wo, scale_x, W)
    masks = tl.zeros((PIXELS, QUERIES), tl.float32)
    tap = 0
    while tap < 4:  # the four network-input pixels around the output pixel
        below, right = tap // 2, tap % 2
        y, x = tl.where(below == 1, y1, y0), tl.where(right == 1, x1, x0)
        share = tl.where(below == 1, fy, 1.0 - fy) * tl.where(right == 1, fx, 1.0 - fx)
        v0, v1, gy = source(y, 0.25, h)
        u0, u1, gx = source(x, 0.25, w)
        z = tl.zeros((PIXELS, QUERIES), tl.float32)
        corner = 0
        while corner < 4:  # one load at a time: four at once spill registers
            v, gv = tl.where(corner < 2, v0, v1), tl.where(corner < 2, 1.0 - gy, gy)
            u, gu = tl.where(corner % 2 == 0, u0, u1), tl.where(corner % 2 == 0, 1.0 - gx, gx)
            z += (
                tl.load(logits + (v * w + u)[:, None] * QUERIES + query[None, :])
                * (gv * gu)[:, None]
            )
            corner += 1
        masks += share[:, None] * (1.0 / (1.0 + tl.exp(-z)))
        tap += 1
    masks_high = masks.to(tl.float16)
    masks_low = (masks - masks_high.to(tl.float32)).to(tl.float16)
    best = tl.full((PIXELS, CLASSES), -1.0, tl.float32)
    first = tl.zeros((PIXELS, CLASSES), tl.int32)
    start = 0
    while start < columns:
        column = start + tl.arange(0, CLASSES)
        a = tl.load(high + query[:, None] * columns + column[None, :])
        b = tl.load(low + query[:, None] * columns + column[None, :])
        score = tl.dot(masks_high, a, tl.dot(masks_high, b, tl.dot(masks_low, a)))
        if SCORES:
            place = column[None, :].to(tl.int64) * (Ho * Wo) + pixel[:, None]
            tl.store(scores + place, score, mask=there[:, None] & (column[None, :] < C))
        better = (score > best) & (column[None, :] < C)
        best = tl.where(better, score, best)
        first = tl.where(better, start, first)
        start += CLASSES
    top = tl.max(best, 1)
    label = first + tl.arange(0, CLASSES)[None, :]
    tl.store(labels + pixel, tl.min(tl.where(best == top[:, None], label, C), 1), mask=there)
    tl.store(top_scores + pixel, top, mask=there)


def launch(
    logits: Tensor,
    classes: Tensor,
    cut: tuple[int, int],
    size: tuple[int, int],
    want_scores: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Label map int64 `size`, the score of each pixel's class `size`, and all scores [C, *size]
    (empty unless wanted).

    Of equal scores the first class counts.
    """
    (Q, h, w), C, (Ho, Wo) = logits.shape, classes.shape[1], size
    parameters = dict(SAFE)
    queries, columns = (
        max(power_of_two(Q), 16),
        cdiv(C, parameters["CLASSES"]) * parameters["CLASSES"],
    )
    padded = logits.new_full((h * w, queries), -1e4, dtype=torch.float32)
    padded[:, :Q] = logits.flatten(1).T
    unit = (
        2.0 ** classes.float().abs().max().clamp(min=1e-30).log2().ceil()
        if Q
        else classes.new_ones(())
    )
    matrix = F.pad(classes.float() / unit, (0, columns - C, 0, queries - Q))
    high = matrix.half()
    low = (matrix - high.float()).half()
    labels = torch.zeros(Ho * Wo, dtype=torch.int32, device=logits.device)
    scores, top = padded.new_empty((C, Ho, Wo) if want_scores else (0,)), padded.new_empty(Ho, Wo)
    padded, high, low = contiguous(padded, high, low)
    kernel[(cdiv(Ho * Wo, parameters["PIXELS"]),)](
        padded,
        high,
        low,
        labels,
        top,
        scores,
        h,
        w,
        *cut,
        Ho,
        Wo,
        C,
        columns,
        cut[0] / Ho,
        cut[1] / Wo,
        QUERIES=queries,
        SCORES=want_scores,
        **parameters,
    )
    return labels.view(Ho, Wo).long(), top * unit, scores * unit


@torch.library.custom_op("zsseg::semantic_map", mutates_args=(), device_types="cuda")
def semantic_map(
    logits: Tensor, classes: Tensor, cut: list[int], size: list[int], want_scores: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `launch`."""
    return launch(logits, classes, tuple(cut), tuple(size), want_scores)


@semantic_map.register_fake
def _(logits, classes, cut, size, want_scores):
    labels, top = (
        logits.new_empty(size, dtype=torch.int64),
        logits.new_empty(size, dtype=torch.float32),
    )
    return (
        labels,
        top,
        logits.new_empty((classes.shape[1], *size) if want_scores else (0,), dtype=torch.float32),
    )
