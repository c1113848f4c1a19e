"""What every kernel file shares: Triton where there is one, the switch, small arithmetic."""

import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

try:
    import triton.language as tl
    from triton import jit
except ImportError:  # not on this platform: the references serve

    def jit(function):
        return function

    class tl:
        constexpr = None  # all that a definition needs


class Switch:
    """Whether GPU tensors go to the kernels; off, the references serve there, too (`model.kernels`)."""
    on = True


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


@cache
def table() -> dict[str, dict[str, dict[str, int]]]:
    """{GPU: {"kernel dtype size": launch parameters}} as `kernels.tune` wrote it; none without it."""
    file = Path(__file__).with_name("tuning.json")
    return json.loads(file.read_text()) if file.exists() else {}


@cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


asked: set[str] = set()  # every key that was looked up


def tuned(kernel: str, tensor: Tensor, size: int, **safe: int) -> dict[str, int]:
    """Launch parameters of a kernel on this tensor's GPU, for its dtype and a size (rounded up to a power of two): those
    measured at the nearest size, else `safe`, which fit every GPU since sm_80.
    """
    name, wanted = f"{kernel} {str(tensor.dtype).removeprefix('torch.')} ", power_of_two(size)
    asked.add(f"{name}{wanted}")
    entries = table().get(device_name(tensor.device), {})
    sizes = [int(key.removeprefix(name)) for key in entries if key.startswith(name)]
    if not sizes:
        return safe
    return safe | entries[f"{name}{min(sizes, key=lambda s: max(s, wanted) / min(s, wanted))}"]


def contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() for t in tensors]
