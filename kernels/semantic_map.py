"""Label map at the image's own size from mask logits at stride 4 and class probabilities
(MaskFormer, Cheng et al. 2021).

score[c] = sum over q of classes[q, c] * sigmoid(upsampled logits[q]), resized to the original size,
argmax. Resizing is linear, so the kernel resamples the sigmoids of a tile of output pixels,
multiplies them with the class matrix tile by tile and keeps a running maximum: neither [Q, H, W]
nor [C, H, W] exists.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.jit import cdiv, jit, next_power_of_2, on_device, tl

MAX_QUERIES = 512  # see `is_supported`
MASKS_HELD = 8192  # probabilities that a block holds, pixels x queries
CONFIG = {"BLOCK_C": 32, "num_warps": 8, "num_stages": 3}


@jit
def bilinear_source(index, scale, size):
    """PyTorch's bilinear sampling (half-pixel centres): lower neighbour, upper neighbour, share of
    the upper.
    """
    position = tl.maximum((index.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    low = tl.minimum(position.to(tl.int32), size - 1)
    return low, tl.minimum(low + 1, size - 1), position - low.to(tl.float32)


@jit
def semantic_map_argmax_kernel(
    logits_ptr,  # fp32 [h * w, BLOCK_Q], padded with a large negative number
    high_ptr,
    low_ptr,  # fp16 [BLOCK_Q, columns]: the class matrix in two pieces, padded with 0
    labels_ptr,  # out: int32 [Ho * Wo]
    top_ptr,  # out: fp32 [Ho * Wo]
    scores_ptr,  # out, where SCORES: fp32 [C, Ho * Wo]
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
    BLOCK_HW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SCORES: tl.constexpr,
):
    """label[n] = argmax over c of sum_q m[n, q] classes[q, c], and that maximum, with m[n, q] the
    bilinear mean of sigmoid(bilinear mean of logits) at output pixel n. The block owns BLOCK_HW
    output pixels: it makes their m for all BLOCK_Q queries once, and goes through the classes.
    """
    pixel = tl.program_id(0) * BLOCK_HW + tl.arange(0, BLOCK_HW)
    mask = pixel < Ho * Wo
    q = tl.arange(0, BLOCK_Q)
    y0, y1, fy = bilinear_source(pixel // Wo, scale_y, H)
    x0, x1, fx = bilinear_source(pixel % Wo, scale_x, W)
    m = tl.zeros((BLOCK_HW, BLOCK_Q), tl.float32)
    # The four network-input pixels around the output pixel, one at a time, as the four logits
    # around each: all at once spill registers.
    for tap in tl.range(0, 4, num_stages=1):
        y = tl.where(tap < 2, y0, y1)
        x = tl.where(tap % 2 == 0, x0, x1)
        share = tl.where(tap < 2, 1.0 - fy, fy) * tl.where(tap % 2 == 0, 1.0 - fx, fx)
        v0, v1, gy = bilinear_source(y, 0.25, h)
        u0, u1, gx = bilinear_source(x, 0.25, w)
        z = tl.zeros((BLOCK_HW, BLOCK_Q), tl.float32)
        for corner in tl.range(0, 4, num_stages=1):
            v = tl.where(corner < 2, v0, v1)
            u = tl.where(corner % 2 == 0, u0, u1)
            part = tl.where(corner < 2, 1.0 - gy, gy) * tl.where(corner % 2 == 0, 1.0 - gx, gx)
            logit = tl.load(logits_ptr + (v * w + u)[:, None] * BLOCK_Q + q[None, :])
            z += logit * part[:, None]
        m += share[:, None] / (1.0 + tl.exp(-z))
    m_high = m.to(tl.float16)
    m_low = (m - m_high.to(tl.float32)).to(tl.float16)
    best = tl.full((BLOCK_HW,), -1.0, tl.float32)
    label = tl.zeros((BLOCK_HW,), tl.int32)
    for start in tl.range(0, columns, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        offs = q[:, None] * columns + c[None, :]
        high = tl.load(high_ptr + offs)
        low = tl.load(low_ptr + offs)
        # The product of two fp16 pieces each, less that of the two small ones: fp32's accuracy.
        score = tl.dot(m_high, high, tl.dot(m_high, low, tl.dot(m_low, high)))
        if SCORES:
            offs = c[None, :].to(tl.int64) * (Ho * Wo) + pixel[:, None]
            tl.store(scores_ptr + offs, score, mask=mask[:, None] & (c[None, :] < C))
        score = tl.where(c[None, :] < C, score, -1.0)
        top, index = tl.max(score, 1, return_indices=True)  # of equal scores the first
        label = tl.where(top > best, start + index, label)
        best = tl.maximum(top, best)
    tl.store(labels_ptr + pixel, label, mask=mask)
    tl.store(top_ptr + pixel, best, mask=mask)


def is_supported(logits: Tensor) -> bool:
    """Whether a tile of 16 pixels of all masks fits a block: logits [Q, h, w]."""
    return logits.shape[0] <= MAX_QUERIES


@on_device
def launch(
    logits: Tensor,
    classes: Tensor,
    input_size: tuple[int, int],
    size: tuple[int, int],
    want_scores: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Label map int64 `size`, the score of each pixel's class `size`, and all scores [C, *size]
    (empty without `want_scores`).

    Of equal scores the first class counts.
    """
    (Q, h, w), C, (Ho, Wo) = logits.shape, classes.shape[1], size
    BLOCK_Q = max(next_power_of_2(Q), 16)
    BLOCK_HW = min(MASKS_HELD // BLOCK_Q, 64)
    columns = cdiv(C, CONFIG["BLOCK_C"]) * CONFIG["BLOCK_C"]
    padded = logits.new_full((h * w, BLOCK_Q), -1e4, dtype=torch.float32)
    padded[:, :Q] = logits.flatten(1).T
    # Scaled to 1 at most, or small scores would lose digits in fp16.
    unit = F.pad(classes.float(), (0, 1)).amax().clamp(min=1e-30)
    matrix = F.pad(classes.float() / unit, (0, columns - C, 0, BLOCK_Q - Q))
    high = matrix.half()
    low = (matrix - high.float()).half()
    labels = torch.empty(Ho, Wo, dtype=torch.int32, device=logits.device)
    top = padded.new_empty(Ho, Wo)
    scores = padded.new_empty((C, Ho, Wo) if want_scores else (0,))
    out = (labels, top, scores)
    sizes = (h, w, *input_size, Ho, Wo, C, columns, input_size[0] / Ho, input_size[1] / Wo)
    blocks = {"BLOCK_HW": BLOCK_HW, "BLOCK_Q": BLOCK_Q, **CONFIG}
    if BLOCK_Q <= 128:
        blocks["maxnreg"] = 128  # two blocks a multiprocessor; with more queries it would spill
    semantic_map_argmax_kernel[(cdiv(Ho * Wo, BLOCK_HW),)](
        padded, high, low, *out, *sizes, SCORES=want_scores, **blocks
    )
    return labels.long(), top * unit, scores * unit


@torch.library.custom_op("zsseg::semantic_map", mutates_args=(), device_types="cuda")
def semantic_map(
    logits: Tensor, classes: Tensor, input_size: list[int], size: list[int], want_scores: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `launch`."""
    return launch(logits, classes, tuple(input_size), tuple(size), want_scores)


@semantic_map.register_fake
def _(logits, classes, input_size, size, want_scores):
    labels = logits.new_empty(size, dtype=torch.int64)
    top = logits.new_empty(size, dtype=torch.float32)
    shape = (classes.shape[1], *size) if want_scores else (0,)
    return labels, top, logits.new_empty(shape, dtype=torch.float32)
