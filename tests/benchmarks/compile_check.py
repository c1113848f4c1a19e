"""Compile every kernel for GPUs that need not be there, and say what it takes: `python -m
tests.benchmarks.compile_check`.

A row for each kernel and architecture: registers a thread, bytes of spilled registers and of shared
memory, asynchronous copies in its code (cp.async; TMA), and the occupancy that follows: how many
of a multiprocessor's 64 warps can be resident; the instructions that a warp executes, and the
microseconds that an A100 or H100 needs to issue those of all warps. Then a row for each operation:
bytes that must be read or written, floating-point operations one by one and in products of
matrices, and the time that no H100 can beat.

Instructions are counted in the machine code: those of a loop as often as LOOPS says, others once,
taken branches or not. Where LOOPS does not fit the code, each counts once and there is no time.
"""

import dataclasses
import math
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from triton import cdiv
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, KernelInterface, create_function_from_signature

from kernels import assignment, mask_loss, mask_pool, matching_cost, region_crop, semantic_map

BLOCK_SHARED = {80: 166_912, 90: 232_448}  # bytes a block may have; the compiler does not check it
SHARED = {80: 167_936, 90: 233_472}  # bytes of a multiprocessor, of which each block costs 1,024
# Of an H100 SXM, a second:
BANDWIDTH = 3.35e12  # bytes
RATE = 33e12  # operations one by one: 132 multiprocessors x 128 x 1.98 GHz
PRODUCT_RATE = 990e12  # dense bf16 operations of the tensor cores
# Instructions that all multiprocessors of an A100 or H100 issue a second, each of a warp.
ISSUED = {80: 108 * 4 * 1.41e9, 90: 132 * 4 * 1.98e9}
COLUMNS = ("registers", "spilled", "shared", "copies", "tma", "warps", "instructions", "issue us")
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclasses.dataclass
class Sizes:
    """COCO: training at 640 x 640, four images a GPU, and inference on one of them."""

    L: int = 6
    B: int = 4
    Q: int = 100
    T: int = 31
    C: int = 171
    h: int = 160
    w: int = 160
    D: int = 512
    grid: int = 28  # cells of dense features a side
    side: int = 224  # of a crop
    dtype: torch.dtype = torch.bfloat16


@dataclasses.dataclass
class Launch:
    kernel: KernelInterface
    grid: tuple[int, ...]
    arguments: dict[str, object]  # in the kernel's order
    options: dict[str, int]  # num_warps, num_stages


def recorded(call: Callable[[], object]) -> list[Launch]:
    """What `call` would launch. Nothing runs, so that its tensors may be on the meta device."""
    found = []

    def record(kernel: KernelInterface, grid: tuple[int, ...]) -> Callable:
        def launch(*arguments: object, **options: object) -> None:
            names = iter(kernel.arg_names)
            given = {next(names): value for value in arguments}
            given |= {name: options.pop(name) for name in names}
            found.append(Launch(kernel, grid, given, options))

        return launch

    with patch.object(KernelInterface, "__getitem__", record):
        call()
    return found


def program(launch: Launch) -> tuple[str, ...]:
    """What Triton compiles a program for: types, constants, and what it knows of numbers."""
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):  # the interpreter's
        kernel = JITFunction(kernel.fn, **kernel.kwargs)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, known, options = bind(**launch.arguments, **launch.options)
    return kernel.fn.__name__, str(known), str(options)


def calls(s: Sizes) -> dict[str, Callable[[], object]]:
    """A call of every operation's launcher, on tensors without values."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    masks = new(s.B, s.L, s.Q, s.h, s.w, dtype=s.dtype).transpose(0, 1)  # as the network leaves it
    labels, coarse = (new(s.B, k * s.h, k * s.w, dtype=torch.uint8) for k in (4, 1))
    classes, counts = new(s.B, s.T, dtype=torch.int64), new(s.B, dtype=torch.int64)
    class_logits = new(s.L, s.B, s.Q, s.C + 1)
    cost_inputs = (class_logits, masks, coarse, classes)
    cost = new(s.L, s.B, s.T, s.Q).transpose(2, 3)
    matched, losses = new(s.L, s.B, s.T, dtype=torch.int64), new(s.L, s.B, s.T)
    sums, pairs = new(s.L, s.B, s.T, 4), (masks, matched, labels, classes)
    logits, size = new(s.Q, s.h, s.w), (4 * s.h, 4 * s.w)
    image, binary = new(3, *size, dtype=torch.uint8), new(s.Q, *size, dtype=torch.uint8)
    boxes, index = new(s.Q, 4, dtype=torch.int64), new(s.Q, dtype=torch.int64)
    crops = (image, binary, boxes, index, [0.5] * 3, [0.2] * 3, s.side, s.dtype)
    features = new(s.grid, s.grid, s.D, dtype=s.dtype)
    return {
        "matching_cost": lambda: matching_cost.launch(*cost_inputs, 20.0, 1.0),
        "assignment": lambda: assignment.launch(cost, counts),
        "mask_loss": lambda: mask_loss.launch_forward(*pairs),
        "mask_loss, backward": lambda: mask_loss.launch_backward(losses, losses, sums, *pairs),
        "region_masks": lambda: region_crop.launch_masks(logits, size, 0.5),
        "region_crop": lambda: region_crop.launch_crops(*crops),
        "semantic_map": lambda: semantic_map.launch(logits, new(s.Q, s.C), size, size),
        "mask_pool": lambda: mask_pool.launch(features, binary),
    }


def work(s: Sizes) -> dict[str, tuple[int, int, int]]:
    """{operation: (bytes that must be read or written, operations one by one, operations in
    products)}. A product of M x K and K x N counts as 2 M N K; an element of a loss as 20, of its
    gradient as 30, of a bilinear mean as 10, of a bicubic one as 100.
    """
    size = s.dtype.itemsize
    pixels = s.h * s.w
    queries = s.L * s.B * s.Q
    pairs = s.L * s.B * s.T
    planes = size * pairs * pixels + 16 * s.B * pixels  # of matched masks; labels as bytes
    inference = 4 * s.Q * pixels  # fp32 mask logits
    output = 4 * 16 * pixels
    full = s.Q * 16 * pixels
    crops = s.Q * 3 * s.side**2
    dense = s.grid**2 * s.D
    moved = {
        "matching_cost": size * queries * pixels + 4 * queries * (s.C + 1 + s.T) + s.B * pixels,
        "assignment": 4 * queries * s.T,
        "mask_loss": planes,
        "mask_loss, backward": planes + size * queries * pixels,
        "region_masks": inference + full,
        "region_crop": full + 3 * 16 * pixels + size * crops,
        "semantic_map": inference + 4 * s.Q * s.C + 2 * output,
        "mask_pool": full + size * dense + 4 * s.Q * s.D,
    }
    single = {
        "matching_cost": 20 * queries * pixels,
        "mask_loss": 20 * pairs * 16 * pixels,
        "mask_loss, backward": 30 * pairs * 16 * pixels,
        "region_masks": 10 * full,
        "region_crop": 100 * crops,
        "semantic_map": 10 * full,
        "mask_pool": full,
    }
    products = {
        "matching_cost": 4 * queries * pixels * s.T,
        "semantic_map": 2 * full * s.C,
        "mask_pool": 2 * s.Q * dense,
    }
    return {name: (moved[name], single.get(name, 0), products.get(name, 0)) for name in moved}


def floor(moved: int, single: int, products: int) -> float:
    """Milliseconds that an H100 needs at least."""
    return 1000 * max(moved / BANDWIDTH, single / RATE, products / PRODUCT_RATE)


# {kernel: (its arguments) -> how often a block runs each loop, on average, in the order of their
# first lines; of an inner loop, each time that it gets there}. Others have none, but for
# assignment_solve, whose depend on the costs, and mask_shares, whose the compiler unrolls in two
# ways. If a kernel's loops change, so must these.
LOOPS = {
    "matching_cost_sums_kernel": lambda a: [a["steps"]],
    "mask_loss_forward_kernel": lambda a: [(a["h"] + 1) / cdiv(a["h"] + 1, a["ROWS"])],
    "mask_loss_backward_kernel": lambda a: [a["h"] / cdiv(a["h"], a["ROWS"]) + 1],
    "region_boxes_kernel": lambda a: [cdiv(a["blocks"], a["BLOCK"])],
    "semantic_map_argmax_kernel": lambda a: [cdiv(a["C"], a["BLOCK_C"])],
    "mask_pool_kernel": lambda a: [cdiv(a["cells"], a["BLOCK_CELL"])],
}


def executed(code: str, trips: list[float]) -> tuple[int, bool]:
    """How many instructions of this listing a warp executes, and whether `trips` fits its loops,
    which end in branches backward; if not, each counts once.
    """
    found = re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]+?) *;", code)
    lines = [(int(address, 16), text) for address, text in found]
    # What follows are rare cases of divisions, and filling.
    end = max(address for address, text in lines if text.split()[-1] == "EXIT")
    lines = [(address, text) for address, text in lines if address <= end]
    jumps = ((re.search(r"BRA .*0x([0-9a-f]+)$", text), address) for address, text in lines)
    loops = sorted({(int(jump[1], 16), address) for jump, address in jumps if jump})
    loops = [(first, last) for first, last in loops if first <= last]
    if len(trips) != len(loops):
        return len(lines), False
    times = [(range(first, last + 1), n) for (first, last), n in zip(loops, trips, strict=True)]
    return round(sum(math.prod(n for r, n in times if a in r) for a, _ in lines)), True


def compiled(launch: Launch, architecture: int) -> dict[str, float]:
    """{column: number} of a kernel compiled for sm_<architecture> as this launch would have it:
    numbers that are 1 or multiples of 16 are known to the compiler, but for those that the kernel
    does not specialise. Raises what the compiler raises.
    """
    signature, constants, hints = {}, {}, {}
    for i, (name, value) in enumerate(launch.arguments.items()):
        parameter = launch.kernel.params[i]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or (special and isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        aligned = True
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            aligned = special and value % 16 == 0
        hints |= {(i,): [["tt.divisibility", 16]]} if aligned else {}
    result = triton.compile(
        ASTSource(launch.kernel, signature, constants, hints),
        target=GPUTarget("cuda", architecture, 32),
        options=launch.options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        run = lambda option: subprocess.check_output(
            [tool, option, file.name], stderr=subprocess.DEVNULL, text=True
        )
        usage, code = run("-res-usage"), run("-sass")
    used = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    shared, warps = result.metadata.shared, launch.options.get("num_warps", 4)
    trips = LOOPS.get(launch.kernel.__name__, lambda arguments: [])(launch.arguments)
    instructions, is_known = executed(code, trips)
    seconds = instructions * warps * math.prod(launch.grid) / ISSUED[architecture]
    numbers = (
        used["REG"],
        used["STACK"] + used["LOCAL"],
        shared,
        len(re.findall(r"cp\.async\.c[ag]\.", result.asm["ptx"])),
        len(re.findall(r"cp\.async\.bulk\.", result.asm["ptx"])),
        resident_warps(used["REG"], shared, warps, architecture),
        instructions,
        round(1e6 * seconds, 1) if is_known else math.nan,
    )
    return dict(zip(COLUMNS, numbers, strict=True))


def resident_warps(registers: int, shared: int, warps: int, architecture: int) -> int:
    """Of a multiprocessor's 64. It has four times 16,384 registers, dealt out 256 at a time."""
    a_warp = -(-registers * 32 // 256) * 256
    blocks = min(64, 4 * (16_384 // a_warp)) // warps
    return warps * min(blocks, SHARED[architecture] // (shared + 1024), 32)


def main() -> None:
    print("kernel\tsm", *COLUMNS, sep="\t")
    for call in calls(Sizes()).values():
        for launch in recorded(call):
            for architecture in (80, 90):
                numbers = compiled(launch, architecture).values()
                print(launch.kernel.__name__, architecture, *numbers, sep="\t", flush=True)
    print("\noperation\tMiB\tGFLOP\tGFLOP in products\tfloor on an H100 (us)")
    for name, (moved, single, products) in work(Sizes()).items():
        microseconds = 1000 * floor(moved, single, products)
        print(f"{name}\t{moved / 2**20:.1f}\t{single / 1e9:.1f}", end="\t")
        print(f"{products / 1e9:.1f}\t{microseconds:.1f}")


if __name__ == "__main__":
    main()
