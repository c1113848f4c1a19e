"""How fast labels are counted and training crops are made, on images of VOC's size made on the
spot.

    python -m tests.benchmarks.data [--masks 10000] [--crops 400] [--workers N]

Baselines from the same run: counting with numpy.unique one file at a time; the whole image
resized and then cropped, colours jittered in floating point by torchvision's operators.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import functional as TF

from zsseg.config import load_config
from zsseg.data import TrainImages, collate, stream, test_size
from zsseg.datasets import dataset
from zsseg.images import read_image, read_labels
from zsseg.label_statistics import label_statistics

SIZE = (500, 375)  # VOC's usual image


def make_voc(root: Path, images: int, masks: int) -> None:
    """`images` different images and label maps of VOC's size and about its bytes a file, linked
    `masks` times.
    """
    folder = root / "VOC2012"
    for name in ("JPEGImages", "SegmentationClassAug"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(masks):
        jpeg, png = (
            folder / "JPEGImages" / f"{i:06}.jpg",
            folder / "SegmentationClassAug" / f"{i:06}.png",
        )
        if i >= images:
            for file in (jpeg, png):
                os.link(file.with_stem(f"{i % images:06}"), file)
            continue
        noise = Image.fromarray(
            rng.integers(0, 256, (SIZE[1] // 5, SIZE[0] // 5, 3), dtype=np.uint8)
        )
        noise.resize(SIZE, Image.Resampling.BICUBIC).filter(ImageFilter.DETAIL).save(
            jpeg, quality=94
        )
        blobs = rng.choice([0, 0, 0, 15, 7, 255, rng.integers(1, 21)], (8, 10)).astype(np.uint8)
        Image.fromarray(blobs).resize(SIZE, Image.Resampling.NEAREST).filter(
            ImageFilter.MedianFilter(9)
        ).save(png)
    (folder / "train.txt").write_text("\n".join(f"{i:06}" for i in range(masks)))


class WholeImages(TrainImages):
    """The same augmentation without its two short cuts."""

    def __getitem__(self, n: int):
        rng, (image_file, label_file) = np.random.default_rng(n), self.pairs[n % len(self.pairs)]
        image = read_image(image_file)
        labels = read_labels(label_file, self.lut, image.size)
        S = self.config.crop
        width, height = test_size(
            *image.size, int(rng.choice(self.config.short_edges)), self.config.max_size
        )
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        mask = Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST)
        h, w = min(height, S), min(width, S)
        top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        image, mask = (x.crop((left, top, left + w, top + h)) for x in (image, mask))
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        coins, u = rng.random(4) < 0.5, rng.uniform(-1, 1, 4)
        x = (x + u[0] * 32 / 255).clamp(0, 1) if coins[0] else x
        x = (x * (1 + u[1] / 2)).clamp(0, 1) if coins[1] else x
        x = TF.adjust_saturation(x, 1 + u[2] / 2) if coins[2] else x
        x = TF.adjust_hue(x, 0.05 * u[3]) if coins[3] else x
        x = TF.pad((x * 255).byte(), [0, 0, S - w, S - h], fill=128)
        mask = TF.pad(torch.from_numpy(np.array(mask))[None], [0, 0, S - w, S - h], fill=255)[0]
        classes = mask.unique().long()
        return x, mask, classes[classes != 255]


def crops_per_second(samples: TrainImages, crops: int, workers: int, repeats: int = 3) -> float:
    """Median over `repeats` of a run, start-up of the workers left out."""
    rates = []
    for r in range(repeats):
        first = r * 10 * crops
        batches = stream(samples, range(first, first + crops + 16 * workers), 16, workers, collate)
        for _ in range(workers):
            next(batches)
        started = time.perf_counter()
        done = sum(len(images) for images, _ in batches)
        rates.append(done / (time.perf_counter() - started))
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--masks", type=int, default=10_000)
    parser.add_argument("--crops", type=int, default=400)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_voc(root, min(200, args.masks), args.masks)
        jpegs = [f.stat().st_size for f in (root / "VOC2012" / "JPEGImages").iterdir()]
        print(
            f"images of {SIZE[0]} x {SIZE[1]}, {sum(jpegs) / len(jpegs) / 1000:.0f} kB each "
            f"(VOC's: under 117)"
        )
        labels = sorted((root / "VOC2012" / "SegmentationClassAug").iterdir())
        lut = dataset("voc").lut()
        few, started = labels[: max(args.masks // 10, 1)], time.perf_counter()
        for file in few:
            np.unique(read_labels(file, lut, SIZE), return_counts=True)
        plain = (time.perf_counter() - started) * len(labels) / len(few)
        started = time.perf_counter()
        label_statistics("voc", root, "train", args.workers)
        counted = time.perf_counter() - started
        started = time.perf_counter()
        label_statistics("voc", root, "train", args.workers)
        print(
            f"label statistics, {len(labels)} masks: numpy.unique {plain:.1f} s (from a tenth), "
            f"ours {counted:.1f} s, "
            f"from the cache {time.perf_counter() - started:.2f} s"
        )
        config = load_config(str(Path(__file__).parents[2] / "configs" / "voc_r50_single.toml"))
        for name, samples in (("whole images, float jitter", WholeImages), ("ours", TrainImages)):
            rate = crops_per_second(samples(config, root), args.crops, args.workers)
            print(
                f"training crops of {config.data.crop}, {name}: {rate:.1f} a second with "
                f"{args.workers} workers, "
                f"{rate / args.workers:.1f} each"
            )


if __name__ == "__main__":
    main()
