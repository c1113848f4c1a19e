"""What every kernel file shares: Triton where there is one, the switch, small arithmetic."""

from torch import Tensor

try:
    import triton.language as tl
    from triton import jit
except ImportError:  # not on this platform: plain PyTorch serves

    def jit(function):
        return function

    class tl:
        constexpr = None  # all that a definition needs


class Switch:
    """Whether CUDA tensors go to the kernels (`model.kernels`): decided once, when a command
    starts.
    """

    on = True


def use_triton(tensor: Tensor) -> bool:
    """Whether a kernel, instead of plain PyTorch, is to work on this tensor."""
    return Switch.on and tensor.is_cuda


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() for t in tensors]
