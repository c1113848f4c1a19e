"""How fast labels are counted and training crops are made, on images of VOC's size made on the
spot.

    python -m tests.benchmarks.data [--masks 10000] [--crops 400] [--workers N]

Baseline of the counts, from the same run: numpy.unique, one file at a time.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from zsseg.config import load_config
from zsseg.data import TrainImages, batches, collate, count_labels
from zsseg.images import read_values

SIZE = (500, 375)  # VOC's usual image
CONFIG = Path(__file__).parents[2] / "configs" / "voc_r50_single.toml"


def make_voc(folder: Path, images: int, masks: int) -> None:
    """`images` different images and label maps of VOC's size and about its bytes a file, linked
    `masks` times.
    """
    for name in ("JPEGImages", "SegmentationClassAug"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(masks):
        jpeg = folder / "JPEGImages" / f"{i:06}.jpg"
        png = folder / "SegmentationClassAug" / f"{i:06}.png"
        if i >= images:
            for file in (jpeg, png):
                os.link(file.with_stem(f"{i % images:06}"), file)
            continue
        noise = rng.integers(0, 256, (SIZE[1] // 5, SIZE[0] // 5, 3), dtype=np.uint8)
        noise = Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC)
        noise.filter(ImageFilter.DETAIL).save(jpeg, quality=94)
        blobs = rng.choice([0, 0, 0, 15, 7, 255, rng.integers(1, 21)], (8, 10)).astype(np.uint8)
        blobs = Image.fromarray(blobs).resize(SIZE, Image.Resampling.NEAREST)
        blobs.filter(ImageFilter.MedianFilter(9)).save(png)
    (folder / "train.txt").write_text("\n".join(f"{i:06}" for i in range(masks)))


def crops_per_second(samples: TrainImages, crops: int, workers: int) -> float:
    """Median over three runs, start-up of the workers left out."""
    rates = []
    for r in range(3):
        first = r * 10 * crops
        numbers = range(first, first + crops + 16 * workers)
        loaded = batches(samples, numbers, 16, workers, collate)
        for _ in range(workers):
            next(loaded)
        started = time.perf_counter()
        done = sum(len(images) for images, _ in loaded)
        rates.append(done / (time.perf_counter() - started))
    return statistics.median(rates)


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--masks", type=int, default=10_000)
    parser.add_argument("--crops", type=int, default=400)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    config = load_config(CONFIG)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "VOC2012"
        make_voc(folder, min(200, args.masks), args.masks)
        sizes = [file.stat().st_size for file in (folder / "JPEGImages").iterdir()]
        kilobytes = sum(sizes) / len(sizes) / 1000
        print(f"images of {SIZE[0]} x {SIZE[1]}, {kilobytes:.0f} kB each (VOC's: under 117)")

        labels = sorted((folder / "SegmentationClassAug").iterdir())
        tenth = labels[: max(args.masks // 10, 1)]
        lut = np.arange(256, dtype=np.uint8)
        started = time.perf_counter()
        for file in tenth:
            np.unique(lut[read_values(file, 8, SIZE)], return_counts=True)
        plain = (time.perf_counter() - started) * len(labels) / len(tenth)
        seconds = []
        for _ in range(2):  # the second time from the cache
            started = time.perf_counter()
            count_labels(config.data, Path(root), "train", args.workers)
            seconds.append(time.perf_counter() - started)
        print(
            f"label counts, {len(labels)} masks: numpy.unique {plain:.1f} s (from a tenth), "
            f"ours {seconds[0]:.1f} s, from the cache {seconds[1]:.2f} s"
        )
        rate = crops_per_second(TrainImages(config, Path(root)), args.crops, args.workers)
        each = f"{args.workers} workers, {rate / args.workers:.1f} each"
        print(f"training crops of {config.data.crop}: {rate:.1f} a second with {each}")


if __name__ == "__main__":
    main()
