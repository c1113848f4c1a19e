"""Shared by the kernels: Triton if it is installed, the switch, devices, strides, numerics."""

import functools
import math
import os
from collections.abc import Callable

import torch
from torch import Tensor

try:
    import triton.language as tl
    from triton import cdiv, jit, knobs, next_power_of_2
    from triton.language.extra import libdevice

    FAST = tl.constexpr(not knobs.runtime.interpret)  # the interpreter has no libdevice
except ImportError:  # not on this platform: plain PyTorch serves
    cdiv = next_power_of_2 = None

    def jit(function=None, **options):
        return function or jit

    class tl:
        constexpr = None  # all that a definition needs


# Arguments that serve index arithmetic only: one program for all of their values.
SIZES = ["Q", "C", "h", "w", "H", "W", "Ho", "Wo", "rows", "columns", "cells", "blocks"]
SIZES += ["B", "T", "steps"]

# Whether CUDA tensors go to the kernels, or to plain PyTorch.
ENABLED = cdiv is not None and os.environ.get("ZSSEG_KERNELS", "1") != "0"


def use_triton(tensor: Tensor) -> bool:
    """Whether a kernel, instead of plain PyTorch, is to work on this tensor."""
    return tensor.is_cuda and ENABLED


def on_device(launch: Callable) -> Callable:
    """Launch on the first tensor's device: Triton takes the current one."""

    @functools.wraps(launch)
    def launch_there(tensor: Tensor, *arguments, **options):
        with torch.cuda.device_of(tensor):
            return launch(tensor, *arguments, **options)

    return launch_there


def multiprocessors(device: torch.device) -> int:
    """How many blocks run at the same time at least; an H100's 132 without a device."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def plane_contiguous(x: Tensor) -> Tensor:
    """x [..., h, w] with every h x w plane dense in memory; the planes may lie in any order, so
    that nearly always nothing is copied.
    """
    return x if x.stride()[-2:] == (x.shape[-1], 1) else x.contiguous()


def logit(probability: float) -> float:
    """Where the sigmoid is `probability`; infinite beyond 0 and 1."""
    if not 0 < probability < 1:
        return math.copysign(math.inf, probability - 0.5)
    return math.log(probability / (1 - probability))


@jit
def sigmoid_parts(x):
    """p = sigmoid(x), 1 - p and log(1 + exp(-|x|)), without cancellation in p and 1 - p."""
    # The fast functions err by some units in the last place, but the logarithm, of 1 + e, by 4e-7
    # wherever it is. A loss in which that is much has a factor (1 - p)^2 or p^2 = e^2 with it, and
    # is nothing beside losses that count.
    if FAST:
        e = libdevice.fast_expf(-tl.abs(x))
        major = libdevice.fast_dividef(1.0, 1.0 + e)
        log1pexp = libdevice.fast_logf(1.0 + e)
    else:
        e = tl.exp(-tl.abs(x))
        major = 1.0 / (1.0 + e)
        log1pexp = tl.log(1.0 + e)
    minor = e * major
    return tl.where(x >= 0, major, minor), tl.where(x >= 0, minor, major), log1pexp


@jit
def neighbours(index, step, size):
    """PyTorch's bilinear sampling at pixels `step` apart (half-pixel centres): the neighbour below,
    the one above, share of the latter.
    """
    position = tl.maximum((index.to(tl.float32) + 0.5) * step - 0.5, 0.0)
    low = tl.minimum(position.to(tl.int32), size - 1)
    return low, tl.minimum(low + 1, size - 1), position - low.to(tl.float32)


@jit
def between(ptr, rows, u0, u1, share):
    """Of rows, which begin `rows` elements behind ptr, the mean of columns u0 and u1, fp32."""
    left = tl.load(ptr + (rows + u0)).to(tl.float32)
    return left * (1.0 - share) + tl.load(ptr + (rows + u1)).to(tl.float32) * share


@jit
def upsampled(plane_ptr, row, x, h, w):
    """Mask logits [h, w] at stride 4, upsampled along x: the rows above and below the pixel rows
    4 row - 2 to 4 row + 1. In pixel row 4 row - 2 + k the lower one's share is (2 k + 1) / 8.
    """
    u0, u1, share = neighbours(x, 0.25, w)
    upper = between(plane_ptr, tl.maximum(row - 1, 0) * w, u0, u1, share)
    return upper, between(plane_ptr, tl.minimum(row, h - 1) * w, u0, u1, share)
