"""Peak memory and time of `eval.py` on one image, from a single pixel to 8192 x 8192, with the
847 words of ADE20K.

    python -m tests.benchmarks.memory [--sizes 1x1 640x480 ...] [--device cpu] [--limit 8]

R101c and a ViT-B/16 with random weights, 100 queries; every size is a process of its own, images
are written as JPEG and label maps as 16-bit TIFF. With --limit (GiB), a peak above it is an error.
The peak is that of the host.
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
    settings = [f"clip.weights={folder / 'clip.pt'}", "clip.prompt=single", "data.workers=0"]
    settings += ["clip.activation=quickgelu"]
    config = load_config(Path("configs/ade20k_full.toml"), settings)
    state = assemble(config, clip).learned_state()
    checkpoint.save(folder / "last.pt", config=asdict(config), model=state)


def write_image(root: Path, width: int, height: int) -> None:
    """Noise and labels in broad stripes."""
    rng = np.random.default_rng(0)
    for kind in ("images_detectron2", "annotations_detectron2"):
        (root / "ADE20K_2021_17_01" / kind / "validation").mkdir(parents=True)
    folders = [f"{kind}_detectron2/validation" for kind in ("images", "annotations")]
    image, labels = (root / "ADE20K_2021_17_01" / folder for folder in folders)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(image / "one.jpg")
    rows = (np.arange(height) * 847 // height).astype(np.uint16)
    stripes = Image.fromarray(np.repeat(rows[:, None], width, 1))
    stripes.save(labels / "one.tif", compression="tiff_adobe_deflate")


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
            root = folder / size
            write_image(root, *map(int, size.split("x")))
            words = ["eval.py", folder / "last.pt", "--root", root, "--out", root / "out"]
            words += ["--save-predictions", "--device", args.device]
            started = time.perf_counter()
            command = [sys.executable, *map(str, words)]
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(child.pid, 0)
            if status:
                raise SystemExit(f"{size}: eval.py failed")
            saved = np.array(Image.open(root / "out" / "predictions" / "one.png"))
            assert f"{saved.shape[1]}x{saved.shape[0]}" == size and saved.max() < 847
            peak = usage.ru_maxrss / 2**20
            print(f"{size:>12}{time.perf_counter() - started:9.1f}{peak:7.2f}", flush=True)
            if args.limit and peak > args.limit:
                raise SystemExit(f"{size}: {peak:.2f} GiB are more than {args.limit}")
    print(f"847 words, 100 queries, torch {torch.__version__}, {args.device}")


if __name__ == "__main__":
    main()
