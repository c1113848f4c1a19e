"""Focal and dice loss of matched masks at the label map's size (MaskFormer, Cheng et al. 2021),
forward and backward.

The logits lie at stride R of the label map and are upsampled bilinearly in registers: no full-size
float tensor exists, and no buffer but the gradient itself is as large as the logits. Nothing is
added atomically, so that results do not depend on the order of blocks.

A cell is the R x R pixels between four neighbouring logits (fewer at the border, where two or four
of its corners are one logit). Cell i, j has the logits i - 1 and i, j - 1 and j at its corners. A
lane marches down a column of cells and takes the lower corners along as the next cell's upper ones.
"""

import torch
from torch import Tensor

from kernels.jit import SIZES, cdiv, contiguous, jit, on_device, plane_contiguous, sigmoid_parts, tl

RATIOS = (2, 4)  # of label map to logits; see `is_supported`
# A block is one warp, so that no lane waits at a barrier for its neighbour's column.
BLOCKS = {"BLOCK": 32, "ROWS": 32, "num_warps": 1, "num_stages": 1}


@jit
def pair_of(matched_ptr, classes_ptr, B, T):
    """This block's pair: its number, layer, image, query (or -1) and class."""
    pair = tl.program_id(0).to(tl.int64)
    image = pair // T % B
    target_class = tl.load(classes_ptr + image * T + pair % T)
    return pair, pair // T // B, image, tl.load(matched_ptr + pair), target_class


@jit
def corners(plane_ptr, i, j, h, w):
    """The logits i, j - 1 and i, j, held to the plane."""
    row_ptr = plane_ptr + tl.minimum(tl.maximum(i, 0), h - 1) * w
    left = tl.load(row_ptr + tl.minimum(tl.maximum(j - 1, 0), w - 1))
    return left.to(tl.float32), tl.load(row_ptr + tl.minimum(j, w - 1)).to(tl.float32)


@jit
def pixel(labels_ptr, target_class, y, x, H, W, z):
    """Whether it is a target, the probability of what is true and of what is not, and the softplus
    of minus the true one's logit.

    A pixel outside is no target, and certain: it adds 0 to all losses and gradients.
    """
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    label = tl.load(labels_ptr + y * W + x, mask=inside, other=0)
    t = inside & (label.to(tl.int32) == target_class)
    z = tl.where(inside, z, float("-inf"))
    s = tl.where(t, z, -z)
    hit, missed, log1pexp = sigmoid_parts(s)
    return t, hit, missed, log1pexp + tl.maximum(-s, 0.0)


@jit(do_not_specialize=SIZES)
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
    stride_l,
    stride_b,
    stride_q,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """sum over the pixels of focal(z, t), p t, p and t of each matched pair, where z is the
    upsampled logit, p = sigmoid(z), t = (label == class) and

        focal = 0.25 (1 - p)^2 softplus(-z) if t else 0.75 p^2 softplus(z).

    The block owns ROWS x BLOCK cells of one pair.
    """
    pair, layer, image, query, target_class = pair_of(matched_ptr, classes_ptr, B, T)
    if query >= 0:
        plane_ptr = masks_ptr + layer * stride_l + image * stride_b + query * stride_q
        labels_ptr += image * h * R * w * R
        tiles_w = tl.cdiv(w + 1, BLOCK)
        first = tl.program_id(1) // tiles_w * ROWS
        j = tl.program_id(1) % tiles_w * BLOCK + tl.arange(0, BLOCK)
        focal = tl.zeros((BLOCK,), tl.float32)
        overlap = tl.zeros((BLOCK,), tl.float32)
        area = tl.zeros((BLOCK,), tl.float32)
        target_area = tl.zeros((BLOCK,), tl.float32)
        c, d = corners(plane_ptr, first - 1, j, h, w)
        for i in tl.range(first, tl.minimum(first + ROWS, h + 1), num_stages=1):
            a, b = c, d
            c, d = corners(plane_ptr, i, j, h, w)
            for k in tl.static_range(R * R):
                fy = (k // R + 0.5) / R
                left = a + fy * (c - a)
                z = left + (k % R + 0.5) / R * (b + fy * (d - b) - left)
                y = i * R + (k // R - R // 2)
                x = j * R + (k % R - R // 2)
                t, hit, missed, softplus = pixel(labels_ptr, target_class, y, x, h * R, w * R, z)
                focal += tl.where(t, 0.25, 0.75) * missed * missed * softplus
                overlap += tl.where(t, hit, 0.0)
                area += tl.where(t, hit, missed)
                target_area += tl.where(t, 1.0, 0.0)
        out_ptr = sums_ptr + (pair * tl.num_programs(1) + tl.program_id(1)) * 4
        tl.store(out_ptr, tl.sum(focal, 0))
        tl.store(out_ptr + 1, tl.sum(overlap, 0))
        tl.store(out_ptr + 2, tl.sum(area, 0))
        tl.store(out_ptr + 3, tl.sum(target_area, 0))


@jit(do_not_specialize=SIZES)
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
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Every pixel's

        g = factor0 d focal / d z + (factor1 t + factor2) p (1 - p)

    goes to the four corners of its cell, by their shares in z. The block owns ROWS rows and
    BLOCK - 1 columns of the logits of one pair, and visits all cells that have any for a corner.
    """
    pair, layer, image, query, target_class = pair_of(matched_ptr, classes_ptr, B, T)
    if query >= 0:
        d_focal = tl.load(factors_ptr + pair * 3)
        d_false = tl.load(factors_ptr + pair * 3 + 2)
        d_true = tl.load(factors_ptr + pair * 3 + 1) + d_false
        plane_ptr = masks_ptr + layer * stride_l + image * stride_b + query * stride_q
        grad_ptr += layer * grad_stride_l + image * grad_stride_b + query * grad_stride_q
        labels_ptr += image * h * R * w * R
        tiles_w = tl.cdiv(w, BLOCK - 1)
        first = tl.program_id(1) // tiles_w * ROWS
        lane = tl.arange(0, BLOCK)
        j = tl.program_id(1) % tiles_w * (BLOCK - 1) + lane
        own = (lane < BLOCK - 1) & (j < w)
        c, d = corners(plane_ptr, first - 1, j, h, w)
        of_c = tl.zeros((BLOCK,), tl.float32)  # the gradient
        of_d = tl.zeros((BLOCK,), tl.float32)
        for i in tl.range(first, tl.minimum(first + ROWS, h) + 1, num_stages=1):
            a, b = c, d
            c, d = corners(plane_ptr, i, j, h, w)
            of_a, of_b = of_c, of_d
            of_c = tl.zeros((BLOCK,), tl.float32)
            of_d = tl.zeros((BLOCK,), tl.float32)
            for ky in tl.static_range(R):
                fy = (ky + 0.5) / R
                y = i * R + (ky - R // 2)
                left = a + fy * (c - a)
                right = b + fy * (d - b)
                of_left = tl.zeros((BLOCK,), tl.float32)
                of_right = tl.zeros((BLOCK,), tl.float32)
                for kx in tl.static_range(R):
                    fx = (kx + 0.5) / R
                    z = left + fx * (right - left)
                    x = j * R + (kx - R // 2)
                    t, hit, missed, softplus = pixel(
                        labels_ptr, target_class, y, x, h * R, w * R, z
                    )
                    g = tl.where(t, -0.25 * d_focal, 0.75 * d_focal)
                    g *= missed * (2.0 * hit * softplus + missed)
                    g = missed * (g + tl.where(t, d_true, d_false) * hit)
                    of_left += g * (1.0 - fx)
                    of_right += g * fx
                # At the border the upper and the lower corner are one.
                share = tl.where(i == h, 1.0, 1.0 - fy)
                of_a += share * of_left
                of_b += share * of_right
                share = tl.where(i == 0, 1.0, fy)
                of_c += share * of_left
                of_d += share * of_right
            # And so are the left and the right one.
            of_b += tl.where(j == 0, of_a, 0.0)
            of_a += tl.where(j == w, of_b, 0.0)
            grad = of_b + tl.gather(of_a, tl.minimum(lane + 1, BLOCK - 1), 0)
            grad = grad.to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + (i - 1) * w + j, grad, mask=own & (i > first))


def is_supported(masks, labels):
    """The label map is a small whole number of times the logits' size, the same both ways."""
    h, w = masks.shape[-2:]
    return any(labels.shape[-2:] == (R * h, R * w) for R in RATIOS)


def prepared(masks, matched, labels, classes):
    """The tensors and numbers that both kernels take."""
    masks = plane_contiguous(masks)
    tensors = (masks, *contiguous(matched, labels, classes.int()))
    return tensors, (masks.shape[1], classes.shape[1], *masks.shape[3:], *masks.stride()[:3])


@on_device
def launch_forward(masks, matched, labels, classes):
    """masks [L, B, Q, h, w], matched [L, B, T] (query of each target or -1), labels [B, H, W],
    classes [B, T] -> focal and dice loss of each pair, fp32 [L, B, T], 0 where there is no match;
    and the sums [L, B, T, 4] for `backward`.
    """
    h, w = masks.shape[3:]
    tensors, sizes = prepared(masks, matched, labels, classes)
    tiles = cdiv(h + 1, BLOCKS["ROWS"]) * cdiv(w + 1, BLOCKS["BLOCK"])
    sums = masks.new_zeros(*matched.shape, tiles, 4, dtype=torch.float32)
    if matched.numel():
        mask_loss_forward_kernel[(matched.numel(), tiles)](
            *tensors, sums, *sizes, R=labels.shape[-1] // w, **BLOCKS
        )
    sums = sums.sum(3)
    focal, overlap, p, t = sums.unbind(-1)
    dice = (1 - (2 * overlap + 1) / (p + t + 1)) * (matched >= 0)
    return focal / labels.shape[1:].numel(), dice, sums


@on_device
def launch_backward(grad_focal, grad_dice, sums, masks, matched, labels, classes):
    """The gradient of the masks [L, B, Q, h, w], in their layout in memory."""
    h, w = masks.shape[3:]
    tensors, sizes = prepared(masks, matched, labels, classes)
    grad = torch.zeros_like(tensors[0])
    _, overlap, p, t = sums.unbind(-1)
    D = p + t + 1
    d_focal = grad_focal / labels.shape[1:].numel()
    d_all = grad_dice * (2 * overlap + 1) / D**2
    factors = torch.stack([d_focal, -2 * grad_dice / D, d_all], -1).float().contiguous()
    tiles = cdiv(h, BLOCKS["ROWS"]) * cdiv(w, BLOCKS["BLOCK"] - 1)
    if matched.numel():
        mask_loss_backward_kernel[(matched.numel(), tiles)](
            *tensors, factors, grad, *sizes, *grad.stride()[:3], R=labels.shape[-1] // w, **BLOCKS
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
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[2], *inputs)


def backward(ctx, grad_focal, grad_dice, _):
    return mask_loss_backward(grad_focal, grad_dice, *ctx.saved_tensors), None, None, None


mask_loss_op.register_autograd(backward, setup_context=setup_context)


def mask_loss(masks, matched, labels, classes):
    """Focal and dice loss of each pair, fp32 [L, B, T]; differentiable in the masks. See
    `launch_forward` and `is_supported`.
    """
    return mask_loss_op(masks, matched, labels, classes)[:2]
