"""Peak memory and time of `eval.py --images` on one image, from a single pixel to 8192 x 8192, with
847 words.

    python -m tests.benchmarks.memory [--sizes 1x1 640x480 ...] [--device cpu] [--limit 8]

R101c and a ViT-B/16 with random weights, 100 queries; every size is another process. With --limit
(GiB), a peak above it is an error. The peak is that of the host.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.benchmarks.ladder import random_clip

SIZES = ("1x1", "3x8192", "8192x3", "640x480", "2048x1024", "8192x8192")


def write_model(folder: Path) -> None:
    """A segmenter and a CLIP with random weights."""
    from zsseg import checkpoint
    from zsseg.config import load_config
    from zsseg.weights import assemble

    clip = random_clip()
    torch.save(clip.state_dict(), folder / "clip.pt")
    weights = [f"clip.weights={folder / 'clip.pt'}", "clip.activation=quickgelu"]
    config = load_config(None, ["data.name=ade20k_full", "clip.prompt=single", *weights])
    state = assemble(config, clip).learned_state()
    checkpoint.save(folder / "last.pt", config=asdict(config), model=state)


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="WxH")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--limit", type=float, help="GiB that no size may exceed")
    args = parser.parse_args()
    print(f"{'image':>12}{'seconds':>9}{'GiB':>7}")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_model(folder)
        for size in args.sizes:
            width, height = map(int, size.split("x"))
            noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(noise).save(folder / f"{size}.png")
            words = ["eval.py", folder / "last.pt", "--images", folder / f"{size}.png"]
            words += ["--out", folder / "out", "--device", args.device]
            started = time.perf_counter()
            command = [sys.executable, *map(str, words)]
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(child.pid, 0)
            saved = folder / "out" / f"{size}.png"
            if status or Image.open(saved).size != (width, height):
                raise SystemExit(f"{size}: eval.py failed")
            peak = usage.ru_maxrss / 2**20
            print(f"{size:>12}{time.perf_counter() - started:9.1f}{peak:7.2f}", flush=True)
            if args.limit and peak > args.limit:
                raise SystemExit(f"{size}: {peak:.2f} GiB are more than {args.limit}")


if __name__ == "__main__":
    main()
