"""Measure the launch parameters of the kernels on this GPU: `python -m kernels.tune`.

Every combination of the parameters below that gives the result of the safe ones is timed at the benchmark's sizes; what is
fastest goes to kernels/tuning.json under the GPU's name, the kernel, its dtype and its size, where `kernels.jit.tuned` finds
it. What is not in there runs with safe parameters. There are no decorators: launching a kernel never measures anything.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from kernels import bench, jit

# {kernel: parameters and the values to try}
SPACE = {
    "matching_cost": {"ROWS": [32, 64, 128], "COLUMNS": [32, 64], "PIXELS": [32], "num_warps": [4, 8]},
    "mask_loss.forward": {"CELLS": [128, 256, 512], "num_warps": [4, 8]},
    "mask_loss.backward": {"CELLS": [128, 256, 512], "num_warps": [4, 8]},
    "mask_pool": {"QUERIES": [32, 64], "WIDTH": [64, 128], "PIXELS": [32, 64], "num_warps": [4]},
    "region_crop.masks": {"ROWS": [8, 16], "COLUMNS": [64, 128], "num_warps": [4]},
    "region_crop.crops": {"PIXELS": [128, 256, 512], "num_warps": [4]},
    "semantic_map": {"PIXELS": [32, 64, 128], "CLASSES": [32, 64], "num_warps": [4, 8]},
}
GAIN = 0.97  # a new choice must take less than this share of the best time so far: timings are not exact


def choices(kernel: str) -> Iterator[dict[str, int]]:
    for values in itertools.product(*SPACE[kernel].values()):
        yield dict(zip(SPACE[kernel], values, strict=True))


def results(function: Callable[[], object]) -> list[Tensor]:
    out = function()
    return [t.double() for t in (out if isinstance(out, tuple) else (out,))]


def equal(ours: list[Tensor], safe: list[Tensor]) -> bool:
    """The same up to the rounding of sums in another order, which may decide a class between equals."""
    close = [(a - b).abs() <= 1e-3 * b.abs().max() for a, b in zip(ours, safe, strict=True) if b.numel()]
    return all(float(c.double().mean()) >= 0.9999 for c in close)


def tune(function: Callable[[], object], device: str) -> None:
    """Put the fastest parameters of every kernel that `function` launches into the table."""
    entries = jit.table().setdefault(jit.device_name(torch.device(device)), {})
    jit.asked.clear()
    function()
    for key in sorted(jit.asked):
        entries.pop(key, None)
    safe = results(function)
    for key in sorted(jit.asked):
        best, best_time = None, bench.measure(function, device, 50)[0][1]
        print(f"{key}: safe {best_time:.4f} ms", end="", flush=True)
        for choice in choices(key.split()[0]):
            entries[key] = choice
            try:
                if equal(results(function), safe) and (time := bench.measure(function, device, 50)[0][1]) < GAIN * best_time:
                    best, best_time = choice, time
            except Exception as error:  # too many registers or too much shared memory for this GPU
                print(f" ({choice} failed: {type(error).__name__})", end="")
        entries.pop(key)
        if best is not None:
            entries[key] = best
        print(f" -> {best or 'safe'} {best_time:.4f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("tuning.json"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("kernels.tune: there is no GPU here to measure")
    for name, (_, ours, _) in bench.cases("cuda").items():
        if name != "assignment":  # one warp a problem: nothing to choose
            tune(ours, "cuda")
            args.out.write_text(json.dumps(jit.table(), indent=1) + "\n")
    print(f"{args.out}: used from now on if it is kernels/tuning.json, so copy it there where it is not")


if __name__ == "__main__":
    main()
