"""Time every kernel against its plain version and torch.compile of that: `python -m
tests.benchmarks.kernels [--csv FILE]`.

Median and 20% / 80% quantiles, effective GB/s of the bytes that must move and their share of this
GPU's copy bandwidth, peak memory; first the copy bandwidth and the bf16 matrix rate. On a CPU
(`--device cpu`) the sizes are small and both are plain PyTorch: that only shows that the benchmark
runs.
"""

import argparse
import contextlib
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TextIO

import torch
from torch import Tensor

from kernels.assignment import assignment
from kernels.jit import Switch
from kernels.mask_loss import mask_loss
from kernels.mask_pool import mask_pool
from kernels.matching_cost import matching_cost
from kernels.region_crop import region_crop, region_masks
from kernels.semantic_map import semantic_map
from zsseg import matcher, regions
from zsseg.losses import focal_and_dice
from zsseg.segmenter import best_class

FIELDS = (
    "kernel",
    "provider",
    "median_ms",
    "low_ms",
    "high_ms",
    "GB_per_s",
    "percent_of_copy",
    "peak_MiB",
    "device",
    "torch",
    "triton",
    "commit",
)


def measure(
    function: Callable[[], object], device: str, duration: int = 200
) -> tuple[list[float], float]:
    """Milliseconds (20%, median, 80%) of about `duration` ms of runs, and the peak of memory beyond
    the inputs in MiB.
    """
    if device == "cpu":
        function()
        times = []
        for _ in range(3):
            started = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - started))
        return [min(times), statistics.median(times), max(times)], 0.0
    from triton.testing import do_bench

    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return do_bench(function, warmup=25, rep=duration, quantiles=[0.2, 0.5, 0.8]), peak


def backward(
    losses: Callable[..., tuple[Tensor, ...] | Tensor], *inputs: Tensor
) -> Callable[[], object]:
    """Forward and gradients of the sum of what `losses` gives."""
    inputs = [x.detach().requires_grad_() for x in inputs]

    def run() -> tuple[Tensor, ...]:
        out = losses(*inputs)
        return torch.autograd.grad(
            sum(x.float().sum() for x in (out if isinstance(out, tuple) else (out,))), inputs
        )

    return run


def cases(device: str) -> dict[str, tuple[Callable, Callable, int]]:
    """{kernel: (plain, ours, bytes that must be read or written)}, at the sizes of training and
    inference.
    """
    torch.manual_seed(0)
    small = device == "cpu"
    L, B, Q, C, T = (2, 1, 10, 12, 4) if small else (6, 4, 100, 172, 40)
    h = w = 16 if small else 160
    kind = torch.float32 if small else torch.bfloat16
    logits, masks = (
        torch.randn(L, B, Q, C, device=device),
        torch.randn(L, B, Q, h, w, device=device, dtype=kind),
    )
    labels = torch.randint(0, T, (B, 4 * h, 4 * w), device=device, dtype=torch.uint8)
    classes = torch.stack([torch.randperm(T) for _ in range(B)]).to(device)
    coarse = labels[:, ::4, ::4].int().contiguous()
    counts = torch.full((B,), T, device=device)
    cost = torch.randn(L, B, Q, T, device=device)
    matched = matcher.hungarian(cost, counts)[0]
    image = torch.randint(0, 256, (3, 4 * h, 4 * w), device=device, dtype=torch.uint8)
    single, cut = masks[0, 0].float(), [4 * h, 4 * w]  # as inference has them
    side, index = 32 if small else 224, torch.arange(Q, device=device)
    with plain():
        foregrounds, boxes, _ = regions.region_masks(single, cut, 0.5)
    sizes = ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28], side, kind)
    scores = torch.rand(Q, 847 if not small else 12, device=device)
    features = torch.randn(B, 32 if small else 512, h, w, device=device, dtype=kind)
    targets = matcher.Targets(labels, classes, counts)
    read = lambda *tensors: sum(t.numel() * t.element_size() for t in tensors)
    gradient = lambda function: backward(lambda x: function(x, matched, labels, classes), masks)
    pool = lambda function: backward(function, features, masks[0])
    ours = lambda function, other: function if device == "cuda" else other  # the kernels want a GPU

    def plain_cost() -> Tensor:
        with plain():
            return matcher.matching_cost(logits, masks, targets, 20.0, 1.0)

    def plain_masks() -> tuple[Tensor, ...]:
        with plain():
            return regions.region_masks(single, cut, 0.5)

    def plain_crops() -> Tensor:
        with plain():
            return regions.region_crops(image, foregrounds, boxes, side)

    def plain_map() -> tuple[Tensor, Tensor]:
        return best_class(single, scores, tuple(cut), tuple(cut))

    def pooled(features: Tensor, masks: Tensor) -> Tensor:
        weights = masks.float().sigmoid().flatten(2)  # [B, Q, hw]
        return torch.einsum("bqn,bdn->bqd", weights, features.float().flatten(2)) / weights.sum(
            -1, keepdim=True
        )

    return {
        "matching_cost": (
            plain_cost,
            ours(lambda: matching_cost(logits, masks, coarse, classes, 20.0, 1.0), plain_cost),
            read(masks, logits),
        ),
        "assignment": (
            lambda: matcher.hungarian(cost, counts),
            ours(lambda: assignment(cost, counts), lambda: matcher.hungarian(cost, counts)),
            read(cost),
        ),
        "mask_loss, both ways": (
            gradient(focal_and_dice),
            gradient(ours(mask_loss, focal_and_dice)),
            2 * L * B * T * h * w * masks.element_size() + 2 * read(labels),
        ),
        "region_crop": (
            plain_crops,
            ours(lambda: region_crop(image, foregrounds, index, boxes, *sizes), plain_crops),
            read(foregrounds) + Q * 3 * side**2 * masks.element_size(),
        ),
        "region_masks": (
            plain_masks,
            ours(lambda: region_masks(single, cut, 0.5), plain_masks),
            read(single, foregrounds),
        ),
        "semantic_map": (
            plain_map,
            ours(lambda: semantic_map(single, scores, cut, cut, False), plain_map),
            read(single, scores) + 4 * cut[0] * cut[1],
        ),
        "mask_pool, both ways": (
            pool(pooled),
            pool(ours(mask_pool, pooled)),
            3 * read(features, masks[0]),
        ),
    }


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """In here, CUDA tensors go to plain PyTorch, too."""
    before, Switch.on = Switch.on, False
    try:
        yield
    finally:
        Switch.on = before


def machine(device: str) -> dict[str, str]:
    def package(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return ""

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": package("triton"),
        "commit": commit,
    }


def bounds(device: str) -> tuple[float, float]:
    """What this GPU can do at best: copying in GB/s, and multiplying bf16 matrices in TFLOP/s."""
    n = 2**20 if device == "cpu" else 2**28
    x, y = torch.empty(n, device=device), torch.empty(n, device=device)
    (_, copy, _), _ = measure(lambda: y.copy_(x), device)
    k = 256 if device == "cpu" else 8192
    a = torch.randn(k, k, device=device, dtype=torch.bfloat16)
    (_, product, _), _ = measure(lambda: a @ a, device)
    return 8 * n / copy / 1e6, 2 * k**3 / product / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--csv", help="write the rows there, too")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile of the plain versions out"
    )
    args = parser.parse_args()
    copy, product = bounds(args.device)
    print(f"copy {copy:.0f} GB/s, bf16 product {product:.1f} TFLOP/s")
    about = machine(args.device)
    with open(args.csv, "w", newline="") if args.csv else contextlib.nullcontext() as file:
        if file:
            csv.writer(file).writerow(FIELDS)
        run(args, copy, about, file)


def run(args: argparse.Namespace, copy: float, about: dict[str, str], file: TextIO | None) -> None:
    """Measure every case; rows go to `file` as they come."""
    for kernel, (plain, ours, moved) in cases(args.device).items():
        providers = {"plain": plain, "torch.compile": torch.compile(plain), "ours": ours}
        # SciPy cannot be compiled, nor a loop over boxes whose sizes the host must read.
        if args.no_compile or args.device == "cpu" or kernel in ("assignment", "region_crop"):
            del providers["torch.compile"]
        for provider, function in providers.items():
            try:
                (low, median, high), peak = measure(function, args.device)
            except Exception as error:  # one that fails must not hide the others
                print(f"{kernel:22}{provider:15}failed: {repr(error)[:90]}", file=sys.stderr)
                continue
            speed = moved / median / 1e6
            share = 100 * speed / copy
            print(
                f"{kernel:22}{provider:15}{median:10.3f} ms  [{low:.3f} {high:.3f}] {speed:8.0f} "
                f"GB/s {share:5.1f}%"
                f" {peak:8.0f} MiB",
                flush=True,
            )
            if file:
                numbers = (f"{x:.4f}" for x in (median, low, high))
                row = [
                    kernel,
                    provider,
                    *numbers,
                    f"{speed:.1f}",
                    f"{share:.1f}",
                    f"{peak:.0f}",
                    *about.values(),
                ]
                csv.writer(file).writerow(row)
                file.flush()


if __name__ == "__main__":
    main()
