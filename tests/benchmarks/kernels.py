"""Time every kernel against its plain version, eager and compiled: `python -m
tests.benchmarks.kernels [--csv FILE]`.

All get the same inputs, bf16 where training has them, at the sizes of
`tests.benchmarks.compile_check`. Median and 20% / 80% quantiles, how much faster than the row above,
effective GB/s of the bytes that must move and their share of this GPU's copy bandwidth, the time
that no H100 can beat, peak memory, and how far the result is from the eager one; first the copy
bandwidth and the bf16 matrix rate. On a CPU (`--device cpu`) the sizes are small and both are plain
PyTorch: that only shows that the benchmark runs.
"""

import argparse
import contextlib
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TextIO

import torch
from torch import Tensor

from kernels import jit
from kernels.assignment import assignment
from kernels.mask_loss import mask_loss
from kernels.mask_pool import mask_pool
from kernels.matching_cost import matching_cost
from kernels.region_crop import region_crop, region_masks
from kernels.semantic_map import semantic_map
from tests.benchmarks.compile_check import Sizes, floor, work
from zsseg import clip, matcher, regions
from zsseg.losses import focal_and_dice
from zsseg.utils import git_commit

NUMBERS = ("median_ms", "low_ms", "high_ms", "times_faster", "GB_per_s", "percent_of_copy")
NUMBERS += ("h100_floor_ms", "peak_MiB", "difference")
ABOUT = ("device", "torch", "triton", "commit")
SMALL = {"L": 2, "B": 1, "Q": 10, "T": 4, "C": 11, "h": 16, "w": 16, "D": 32, "grid": 4, "side": 32}


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


def backward(losses: Callable[[Tensor], tuple[Tensor, ...]], masks: Tensor) -> Callable:
    """Forward and the gradient of the sum of what `losses` gives."""
    masks = masks.detach().requires_grad_()
    return lambda: torch.autograd.grad(sum(x.float().sum() for x in losses(masks)), masks)


def difference(ours: object, plain: object) -> float:
    """The largest over the results: of numbers the largest difference, relative to the largest
    number; of indices, masks and labels the share that is another.
    """
    ours, plain = (x if isinstance(x, tuple) else (x,) for x in (ours, plain))
    worst = 0.0
    for a, b in zip(ours, plain, strict=False):
        if b.is_floating_point():
            scale = b.abs().max().float().clamp(min=1e-30)
            worst = max(worst, float((a.float() - b.float()).abs().max() / scale))
        else:
            worst = max(worst, float((a != b).float().mean()))
    return worst


def cases(device: str, s: Sizes) -> dict[str, tuple[Callable, Callable]]:
    """{kernel: (plain, ours)}."""
    torch.manual_seed(0)
    make = lambda *shape, **given: torch.randn(*shape, device=device, **given)
    H, W = 4 * s.h, 4 * s.w
    logits = make(s.L, s.B, s.Q, s.C + 1)
    # As the network leaves them in memory.
    masks = make(s.B, s.L, s.Q, s.h, s.w, dtype=s.dtype).transpose(0, 1)
    labels = torch.randint(0, s.T, (s.B, H, W), device=device, dtype=torch.uint8)
    classes = torch.stack([torch.randperm(s.T) for _ in range(s.B)]).to(device)
    coarse = labels[:, ::4, ::4].int().contiguous()
    counts = torch.full((s.B,), s.T, device=device)
    cost = make(s.L, s.B, s.T, s.Q).transpose(2, 3)
    matched = matcher.hungarian(cost, counts)[0]
    targets = matcher.Targets(labels, classes, counts)
    image = torch.randint(0, 256, (3, H, W), device=device, dtype=torch.uint8)
    single, size = masks[0, 0].float(), [H, W]  # as inference has them
    with plain():
        binary, boxes, _ = regions.region_masks(single, size, 0.5)
    constants = ([*clip.MEAN], [*clip.STD], s.side, s.dtype)
    scores = torch.rand(s.Q, s.C, device=device)
    features = make(s.grid, s.grid, s.D, dtype=s.dtype)
    pairs = (matched, labels, classes)

    def plain_crops() -> Tensor:
        """All crops by one gather of 4 x 4 taps, without a loop over boxes."""
        mean, std = (torch.tensor(x, device=device)[:, None, None] for x in constants[:2])
        return gathered_crops((image / 255 - mean) / std, binary, boxes, s.side).to(s.dtype)

    def plain_map() -> tuple[Tensor, Tensor]:
        """One product of all classes and masks."""
        maps = torch.einsum("qc,qhw->chw", scores, regions.mask_probabilities(single, size))
        return maps.max(0)[::-1]

    def plain_pool() -> Tensor:
        masks = regions.mask_probabilities(single, size) > 0.5
        return regions.pool_features(features, masks)

    cost_inputs = (logits, masks, coarse, classes, 20.0, 1.0)
    both_ways = lambda function: backward(lambda x: function(x, *pairs), masks)
    found = {
        "matching_cost": (
            lambda: matcher.matching_cost(logits, masks, targets, 20.0, 1.0),
            lambda: matching_cost(*cost_inputs),
        ),
        "assignment": (lambda: matcher.hungarian(cost, counts), lambda: assignment(cost, counts)),
        "mask_loss": (lambda: focal_and_dice(masks, *pairs), lambda: mask_loss(masks, *pairs)),
        "mask_loss, both ways": (both_ways(focal_and_dice), both_ways(mask_loss)),
        "region_crop": (plain_crops, lambda: region_crop(image, binary, boxes, *constants)),
        "region_masks": (
            lambda: regions.region_masks(single, size, 0.5),
            lambda: region_masks(single, size, 0.5),
        ),
        "semantic_map": (plain_map, lambda: semantic_map(single, scores, size, size, False)[:2]),
        "mask_pool": (plain_pool, lambda: mask_pool(features, single, size, 0.5)[0]),
    }
    if device == "cpu":  # the kernels want a GPU
        found = {name: (plain, plain) for name, (plain, _) in found.items()}
    return found


def gathered_crops(image: Tensor, masks: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Bicubic crops [P, 3, side, side] of a normalised image [3, H, W], 0 outside masks [P, H, W]:
    the fair plain version of the kernel, see `regions.region_crops`.
    """
    first, length = boxes[:, :2, None], (boxes[:, 2:] - boxes[:, :2])[..., None]
    at = (torch.arange(side, device=image.device) + 0.5) * (length / side) - 0.5  # [P, 2, side]
    share = at - at.floor()
    taps = at.floor().long()[..., None] + torch.arange(-1, 3, device=image.device)
    taps = taps.clamp(min=0).minimum(length[..., None] - 1) + first[..., None]
    d = (share[..., None] - torch.arange(-1, 3, device=image.device)).abs()
    near = (1.25 * d - 2.25) * d * d + 1
    far = ((-0.75 * d + 3.75) * d - 6) * d + 3
    weights = torch.where(d <= 1, near, far)
    (x, y), (wx, wy) = taps.unbind(1), weights.unbind(1)
    number = torch.arange(len(boxes), device=image.device)[:, None, None]
    crops = 0
    for i in range(4):
        for j in range(4):
            place = y[:, :, None, i], x[:, None, :, j]
            weight = wy[:, :, None, i] * wx[:, None, :, j] * (masks[(number, *place)] != 0)
            crops = crops + weight * image[(slice(None), *place)]
    return crops.transpose(0, 1)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """In here, CUDA tensors go to plain PyTorch, too."""
    before, jit.ENABLED = jit.ENABLED, False
    try:
        yield
    finally:
        jit.ENABLED = before


def machine(device: str) -> dict[str, str]:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return dict(zip(ABOUT, (name, torch.__version__, triton, git_commit()[:12]), strict=True))


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
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device)
    parser.add_argument("--csv", help="write the rows there, too")
    text = "leave torch.compile of the plain versions out"
    parser.add_argument("--no-compile", action="store_true", help=text)
    args = parser.parse_args()
    copy, product = bounds(args.device)
    print(f"copy {copy:.0f} GB/s, bf16 product {product:.1f} TFLOP/s")
    about = machine(args.device)
    print(f"{'kernel':22}{'provider':15}", *(f"{name[:10]:>10}" for name in NUMBERS))
    with open(args.csv, "w", newline="") if args.csv else contextlib.nullcontext() as file:
        if file:
            csv.writer(file).writerow(["kernel", "provider", *NUMBERS, *ABOUT])
        run(args, copy, about, file)


def run(args: argparse.Namespace, copy: float, about: dict[str, str], file: TextIO | None) -> None:
    """Measure every case; rows go to `file` as they come."""
    sizes = Sizes() if args.device == "cuda" else Sizes(**SMALL, dtype=torch.float32)
    amounts = work(sizes)
    for kernel, (eager, ours) in cases(args.device, sizes).items():
        both = ("mask_loss", "mask_loss, backward")
        parts = both if kernel == "mask_loss, both ways" else (kernel,)
        needed = [sum(amounts[part][i] for part in parts) for i in range(3)]
        providers = {"plain": eager, "torch.compile": torch.compile(eager), "ours": ours}
        if args.no_compile or args.device == "cpu" or kernel == "assignment":  # that is SciPy
            del providers["torch.compile"]
        before = None
        for provider, function in providers.items():
            try:
                with plain():
                    (low, middle, high), peak = measure(function, args.device)
                    apart = difference(function(), eager())
            except Exception as error:  # one that fails must not hide the others
                print(f"{kernel:22}{provider:15}failed: {repr(error)[:90]}", file=sys.stderr)
                continue
            speed = needed[0] / middle / 1e6
            faster = (before or middle) / middle  # than the row above
            before = middle
            numbers = (middle, low, high, faster, speed, 100 * speed / copy, floor(*needed), peak)
            texts = [f"{x:.4g}" for x in numbers] + [f"{apart:.1e}"]
            print(f"{kernel:22}{provider:15}", *(f"{text:>10}" for text in texts), flush=True)
            if file:
                csv.writer(file).writerow([kernel, provider, *texts, *about.values()])
                file.flush()


if __name__ == "__main__":
    main()
