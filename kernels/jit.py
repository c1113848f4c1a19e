"""Shared by the kernels: Triton if it is installed, the switch, devices, strides, numerics."""

import functools
import math
import os
from collections.abc import Callable

import torch
from torch import Tensor

try:
    import triton.language as tl
    from triton import cdiv, jit, next_power_of_2
except ImportError:  # not on this platform: plain PyTorch serves
    cdiv = next_power_of_2 = None

    def jit(function):
        return function

    class tl:
        constexpr = None  # all that a definition needs


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
    """p = sigmoid(x), 1 - p and log(1 + exp(-|x|)), each without cancellation."""
    e = tl.exp(-tl.abs(x))
    p = tl.where(x >= 0, 1.0, e) / (1.0 + e)
    q = tl.where(x >= 0, e, 1.0) / (1.0 + e)
    return p, q, tl.log(1.0 + e)


@jit
def dot_exact(a, b, acc):
    """acc + a b in fp32's accuracy on tensor cores, where b [K, N] is exact in fp16: a [M, K], fp32
    below 65,504, is multiplied in two fp16 pieces.
    """
    high = a.to(tl.float16)
    low = (a - high.to(tl.float32)).to(tl.float16)
    b = b.to(tl.float16)
    return tl.dot(high, b, tl.dot(low, b, acc))
