"""Time every kernel against its plain version, eager and compiled: `python -m
tests.benchmarks.kernels [--csv FILE]`.

All get the same inputs, bf16 where training has them, at the sizes of
`tests.benchmarks.compile_check`, training with 8 targets an image and with 31; masks are ellipses.
Plain PyTorch computes in fp32; where it multiplies matrices, compiled with TF32, too, and the
matching cost by a single product in bf16. Median and 20% / 80% quantiles, how much faster than the
row above, effective GB/s of the bytes that must move and their share of this GPU's copy bandwidth,
the time that no H100 can beat, peak memory, and how far the result is from the eager one; first the
copy bandwidth and the bf16 matrix rate. On a CPU (`--device cpu`) the sizes are small and both are
plain PyTorch: that only shows that the benchmark runs.
"""

import argparse
import contextlib
import csv
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TextIO

import torch
import torch.nn.functional as F
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
TRAINING = ("matching_cost", "assignment", "mask_loss", "mask_loss, both ways")
PRODUCTS = ("matching_cost", "semantic_map", "mask_pool")  # the plain version multiplies matrices
ABOUT = ("device", "torch", "triton", "commit")
SMALL = {"L": 2, "B": 1, "Q": 10, "C": 40, "h": 16, "w": 16, "D": 32, "grid": 4, "side": 32}


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


def ellipses(count: int, h: int, w: int, device: str) -> Tensor:
    """Mask logits [count, h, w], 6 in the middle of an ellipse and -12 far from it: their boxes are
    parts of the image.
    """
    y, x = (torch.linspace(0, 1, n, device=device) for n in (h, w))
    centre, radius = torch.rand(2, 2, count, 1, 1, device=device)
    radius = 0.05 + 0.3 * radius
    distance = ((y[:, None] - centre[0]) / radius[0]) ** 2 + ((x - centre[1]) / radius[1]) ** 2
    return (6 - 6 * distance).clamp(min=-12)


def cost_by_one_product(
    logits: Tensor,
    masks: Tensor,
    labels: Tensor,
    classes: Tensor,
    focal_weight: float,
    dice_weight: float,
) -> Tensor:
    """`matcher.matching_cost` with all its sums from one product in bf16; the row of ones below the
    targets sums over all pixels.
    """
    target = (labels[:, None] == classes[:, :, None, None]).flatten(2)  # [B, T, hw]
    area = target.sum(-1).float()[:, None, None]  # [B, 1, 1, T]
    target = F.pad(target.bfloat16(), (0, 0, 0, 1), value=1.0)
    x = masks.transpose(0, 1).flatten(3).float()  # [B, L, Q, hw], dense
    p = x.sigmoid()
    positive = 0.25 * (1 - p) ** 2 * F.softplus(-x)
    negative = 0.75 * p**2 * F.softplus(x)
    rows = torch.stack([positive - negative, p], 1).bfloat16()  # [B, 2, L, Q, hw]
    sums = (rows.flatten(1, 3) @ target.mT).float().unflatten(1, rows.shape[1:4])
    focal = (sums[:, 0, ..., :-1] + negative.sum(-1, keepdim=True)) / x.shape[-1]
    dice = 1 - (2 * sums[:, 1, ..., :-1] + 1) / (sums[:, 1, ..., -1:] + area + 1)
    classes = classes[None, :, None].expand(len(logits), -1, logits.shape[2], -1)
    cost = focal_weight * focal + dice_weight * dice
    return cost.transpose(0, 1) - logits.float().softmax(-1).gather(-1, classes)


def cases(device: str, s: Sizes) -> dict[str, tuple[Callable, Callable]]:
    """{kernel: (plain, ours)}, and for the matching cost by one product, `one_product`, plain."""
    torch.manual_seed(0)
    make = lambda *shape, **given: torch.randn(*shape, device=device, **given)
    H, W = 4 * s.h, 4 * s.w
    logits = make(s.L, s.B, s.Q, s.C + 1)
    # As the network leaves them in memory.
    masks = ellipses(s.B * s.L * s.Q, s.h, s.w, device).to(s.dtype)
    masks = masks.view(s.B, s.L, s.Q, s.h, s.w).transpose(0, 1)
    patches = torch.randint(0, s.T, (s.B, 1, 8, 8), device=device).float()
    labels = F.interpolate(patches, (H, W))[:, 0].to(torch.uint8)
    classes = torch.stack([torch.randperm(s.T) for _ in range(s.B)]).to(device)
    coarse = labels[:, ::4, ::4].int().contiguous()
    counts = torch.full((s.B,), s.T, device=device)
    cost_inputs = (logits, masks, coarse, classes, 20.0, 1.0)
    cost = cost_by_one_product(*cost_inputs)
    cost = cost.transpose(2, 3).contiguous().transpose(2, 3)  # as the kernel leaves it
    matched = matcher.hungarian(cost, counts)[0]
    targets = matcher.Targets(labels, classes, counts)
    image = torch.randint(0, 256, (3, H, W), device=device, dtype=torch.uint8)
    single, size = masks[0, 0].float(), [H, W]  # as inference has them
    with plain():
        binary, boxes, _ = regions.region_masks(single, size, 0.5)
    binary, index = binary.byte(), torch.arange(s.Q, device=device)
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

    both_ways = lambda function: backward(lambda x: function(x, *pairs), masks)
    found = {
        "matching_cost": (
            lambda: matcher.matching_cost(logits, masks, targets, 20.0, 1.0),
            lambda: matching_cost(*cost_inputs),
        ),
        "assignment": (lambda: matcher.hungarian(cost, counts), lambda: assignment(cost, counts)),
        "mask_loss": (lambda: focal_and_dice(masks, *pairs), lambda: mask_loss(masks, *pairs)),
        "mask_loss, both ways": (both_ways(focal_and_dice), both_ways(mask_loss)),
        "region_crop": (plain_crops, lambda: region_crop(image, binary, boxes, index, *constants)),
        "region_masks": (
            lambda: regions.region_masks(single, size, 0.5),
            lambda: region_masks(single, size, 0.5),
        ),
        "semantic_map": (plain_map, lambda: semantic_map(single, scores, size, size, False)[:2]),
        "mask_pool": (
            lambda: regions.pool_features(features, binary),
            lambda: mask_pool(features, binary),
        ),
        "one_product": (lambda: cost_by_one_product(*cost_inputs),) * 2,
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
    print(f"{'kernel':34}{'provider':15}", *(f"{name[:10]:>10}" for name in NUMBERS))
    with open(args.csv, "w", newline="") if args.csv else contextlib.nullcontext() as file:
        if file:
            csv.writer(file).writerow(["kernel", "provider", *NUMBERS, *ABOUT])
        run(args, copy, about, file)


def run(args: argparse.Namespace, copy: float, about: dict[str, str], file: TextIO | None) -> None:
    """Measure every case; rows go to `file` as they come."""
    sizes = Sizes() if args.device == "cuda" else Sizes(**SMALL, dtype=torch.float32)
    for T in (8, 31):
        sizes = dataclasses.replace(sizes, T=T)
        amounts = work(sizes)
        found = cases(args.device, sizes)
        one_product, _ = found.pop("one_product")
        for kernel, (eager, ours) in found.items():
            if T == 31 and kernel not in TRAINING:  # as before
                continue
            both = ("mask_loss", "mask_loss, backward")
            parts = both if kernel == "mask_loss, both ways" else (kernel,)
            needed = [sum(amounts[part][i] for part in parts) for i in range(3)]
            # {provider: (function, precision of products in fp32)}
            providers = {"plain": (eager, "highest")}
            if args.device == "cuda" and not args.no_compile and kernel != "assignment":  # SciPy
                torch._dynamo.reset()  # no program for sizes of another case
                compiled = torch.compile(eager, dynamic=False)
                providers["compiled"] = compiled, "highest"
                if kernel in PRODUCTS:
                    providers["compiled, TF32"] = compiled, "high"
                if kernel == "matching_cost":
                    providers["compiled, bf16"] = torch.compile(one_product, dynamic=False), "high"
            providers["ours"] = ours, "highest"
            name = f"{kernel}, {T} targets" if kernel in TRAINING else kernel
            rows = measured(name, providers, needed, args.device, copy)
            for row in rows:
                if file:
                    csv.writer(file).writerow([*row, *about.values()])
                    file.flush()


def measured(
    name: str, providers: dict[str, tuple], needed: list, device: str, copy: float
) -> Iterator[list[str]]:
    """Measure and print the rows of a case, the first one the reference of the others."""
    eager, _ = providers["plain"]
    before = None
    for provider, (function, precision) in providers.items():
        try:
            with plain():
                expected = eager()
                torch.set_float32_matmul_precision(precision)
                (low, middle, high), peak = measure(function, device)
                apart = difference(function(), expected)
        except Exception as error:  # one that fails must not hide the others
            print(f"{name:34}{provider:15}failed: {repr(error)[:90]}", file=sys.stderr)
            continue
        finally:
            torch.set_float32_matmul_precision("highest")
        speed = needed[0] / middle / 1e6
        faster = (before or middle) / middle  # than the row above
        before = middle
        numbers = (middle, low, high, faster, speed, 100 * speed / copy, floor(*needed), peak)
        texts = [f"{x:.4g}" for x in numbers] + [f"{apart:.1e}"]
        print(f"{name:34}{provider:15}", *(f"{text:>10}" for text in texts), flush=True)
        yield [name, provider, *texts]


if __name__ == "__main__":
    main()
