"""Label map at the image's own size from mask logits at stride 4 and class probabilities
(MaskFormer, Cheng et al. 2021).

score[c] = sum over q of classes[q, c] * sigmoid(upsampled logits[q]), resized to the original size,
argmax. The first kernel writes the sigmoids at network-input size. Resizing is linear, so that the
last resamples those of a tile of output pixels, multiplies them with the class matrix and keeps a
running maximum: [C, H, W] does not exist.
"""

import math

import torch
from torch import Tensor

from kernels.jit import (
    SIZES,
    between,
    cdiv,
    contiguous,
    jit,
    neighbours,
    next_power_of_2,
    on_device,
    sigmoid_parts,
    tl,
    upsampled,
)

PROBABILITIES = {"BLOCK_V": 8, "BLOCK_W": 128, "num_warps": 4, "num_stages": 1}
BLOCK_C = 32
MAX_QUERIES = 512  # see `is_supported`
HELD = 2**12  # probabilities that a block of the last kernel holds, queries x pixels


@jit(do_not_specialize=SIZES)
def probabilities_kernel(
    logits_ptr,  # [Q, h, w], any float
    p_ptr,  # out: fp32 [Q, H, W]
    h,
    w,
    H,
    W,
    BLOCK_V: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """p = sigmoid(bilinear mean of logits). The block owns pixels as in `region_masks_kernel`."""
    q = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V))[:, None]
    x = (tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W))[None, :]
    upper, lower = upsampled(logits_ptr + q * h * w, row, x, h, w)
    for k in tl.static_range(4):
        y = row * 4 - 2 + k
        p, _, _ = sigmoid_parts(upper * (0.875 - k * 0.25) + lower * (0.125 + k * 0.25))
        tl.store(p_ptr + q * H * W + (y * W + x), p, mask=(y >= 0) & (y < H) & (x < W))


@jit
def pieces(x):
    """2^15 x, for x in 0..1, as the sum of two fp16 numbers: 22 bits, down to 2^-40."""
    x *= 32768.0
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@jit(do_not_specialize=SIZES)
def class_pieces_kernel(
    classes_ptr,  # [Q, C], any float, in 0..1
    matrix_ptr,  # out: fp16 [2, columns, BLOCK_Q], padded with 0
    Q,
    C,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The class matrix in two pieces, transposed."""
    q = tl.arange(0, BLOCK_Q)[None, :]
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    part = tl.load(classes_ptr + q * C + c, mask=(q < Q) & (c < C), other=0.0)
    high, low = pieces(part.to(tl.float32))
    out_ptrs = matrix_ptr + c * BLOCK_Q + q
    tl.store(out_ptrs, high)
    tl.store(out_ptrs + tl.num_programs(0) * BLOCK_C * BLOCK_Q, low)


@jit(do_not_specialize=SIZES)
def semantic_map_argmax_kernel(
    p_ptr,  # fp32 [Q, H, W]
    matrix_ptr,  # fp16 [2, columns, BLOCK_Q], see above
    labels_ptr,  # out: int64 [Ho, Wo]
    top_ptr,  # out: fp32 [Ho, Wo]
    scores_ptr,  # out, where SCORES: fp32 [C, Ho, Wo]
    Q,
    H,
    W,
    Ho,
    Wo,
    C,
    step_y,
    step_x,
    SCORES: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """label[n] = argmax over c of sum_q m[n, q] classes[q, c], and that maximum, with m[n, q] the
    bilinear mean of p at output pixel n. The block owns BLOCK_HW output pixels: it makes their m
    for all queries once, and goes through the classes.
    """
    pixel = tl.program_id(0) * BLOCK_HW + tl.arange(0, BLOCK_HW)
    mask = pixel < Ho * Wo
    q = tl.arange(0, BLOCK_Q)
    planes = (tl.minimum(q, Q - 1) * (H * W))[:, None]  # the last one again is multiplied by 0
    y0, y1, share_y = neighbours((pixel // Wo)[None, :], step_y, H)
    x0, x1, share_x = neighbours((pixel % Wo)[None, :], step_x, W)
    upper = between(p_ptr, planes + y0 * W, x0, x1, share_x) * (1.0 - share_y)
    lower = between(p_ptr, planes + y1 * W, x0, x1, share_x) * share_y
    m_high, m_low = pieces(tl.trans(upper + lower))
    best = tl.full((BLOCK_HW,), -1.0, tl.float32)
    label = tl.zeros((BLOCK_HW,), tl.int32)
    for start in tl.range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[None, :]
        class_ptrs = matrix_ptr + c * BLOCK_Q + q[:, None]
        high = tl.load(class_ptrs)
        low = tl.load(class_ptrs + tl.cdiv(C, BLOCK_C) * BLOCK_C * BLOCK_Q)
        # The product of two pieces each, less that of the two small ones: fp32's accuracy.
        score = tl.dot(m_high, high, tl.dot(m_low, high, tl.dot(m_high, low)))
        score *= 1.0 / (32768.0 * 32768.0)
        if SCORES:
            offs = c.to(tl.int64) * (Ho * Wo) + pixel[:, None]
            tl.store(scores_ptr + offs, score, mask=mask[:, None] & (c < C))
        score = tl.where(c < C, score, -1.0)
        top, index = tl.max(score, 1, return_indices=True)  # of equal scores the first
        label = tl.where(top > best, start + index, label)
        best = tl.maximum(top, best)
    tl.store(labels_ptr + pixel, label.to(tl.int64), mask=mask)
    tl.store(top_ptr + pixel, best, mask=mask)


def is_supported(logits, input_size):
    """Whether a tile of 16 pixels of all masks [Q, h, w] fits a block, and int32 their places."""
    Q = len(logits)
    return 0 < Q <= MAX_QUERIES and Q * math.prod(input_size) < 2**31


@on_device
def launch(logits, classes, input_size, size, want_scores=False):
    """Label map int64 `size`, the score of each pixel's class fp32 `size`, and all scores
    [C, *size] (empty without `want_scores`).

    logits [Q, h, w]; classes [Q, C] in 0..1. Of equal scores the first class counts.
    """
    logits, classes = contiguous(logits, classes)
    (Q, h, w), C, (H, W), (Ho, Wo) = logits.shape, classes.shape[1], input_size, size
    # In fp16 it would take half the memory, and p would be off by 2^-12 of itself.
    p = logits.new_empty(Q, H, W, dtype=torch.float32)
    labels = logits.new_empty(Ho, Wo, dtype=torch.int64)
    top = p.new_empty(Ho, Wo)
    scores = p.new_empty((C, Ho, Wo) if want_scores else (0,))
    grid = (cdiv(W, PROBABILITIES["BLOCK_W"]), cdiv(H + 2, 4 * PROBABILITIES["BLOCK_V"]), Q)
    probabilities_kernel[grid](logits, p, h, w, H, W, **PROBABILITIES)
    BLOCK_Q = max(next_power_of_2(Q), 16)
    tiles = cdiv(C, BLOCK_C)
    matrix = classes.new_empty(2, tiles * BLOCK_C, BLOCK_Q, dtype=torch.float16)
    class_pieces_kernel[(tiles,)](classes, matrix, Q, C, BLOCK_Q, BLOCK_C)
    BLOCK_HW = max(min(HELD // BLOCK_Q, 64), 16)
    semantic_map_argmax_kernel[(cdiv(Ho * Wo, BLOCK_HW),)](
        *(p, matrix, labels, top, scores, Q, H, W, Ho, Wo, C, H / Ho, W / Wo),
        *(want_scores, BLOCK_HW, BLOCK_Q, BLOCK_C),
        num_stages=2,
    )
    return labels, top, scores


@torch.library.custom_op("zsseg::semantic_map", mutates_args=(), device_types="cuda")
def semantic_map(
    logits: Tensor, classes: Tensor, input_size: list[int], size: list[int], want_scores: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `launch`."""
    return launch(logits, classes, input_size, size, want_scores)


@semantic_map.register_fake
def _(logits, classes, input_size, size, want_scores):
    labels = logits.new_empty(size, dtype=torch.int64)
    top = logits.new_empty(size, dtype=torch.float32)
    shape = (classes.shape[1], *size) if want_scores else (0,)
    return labels, top, logits.new_empty(shape, dtype=torch.float32)
