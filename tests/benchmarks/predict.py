"""How fast images come in and results go out: `python -m tests.benchmarks.predict`.

Reading and writing are measured on one core, without a network: a machine needs so many cores for
each of them as its GPU segments images a second, divided by the number printed.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from tests.recipe import make_image, make_labels
from zsseg.apps.predict import colours_of, count_classes, read_photo, write_results
from zsseg.apps.vocabulary import parse_words
from zsseg.config import Config

WORDS = parse_words(", ".join(f"thing {i}" for i in range(20)))


def seconds(action, items: range) -> float:
    """Median seconds of action(item)."""
    times = []
    for item in items:
        started = time.perf_counter()
        action(item)
        times.append(time.perf_counter() - started)
    return median(times)


def measure(folder: Path, size: tuple[int, int], count: int) -> None:
    """Print the images a second of reading and of writing, for photos of a size (width, height)."""
    for i in range(count):
        image = Image.fromarray(make_image(480, 640, i)).resize(size)
        image.save(folder / f"{i}.jpg", quality=90)
    labels = make_labels(480, 640, range(20), ignore=0).astype(np.uint8)
    labels = np.array(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
    tensor = torch.from_numpy(labels).long()
    ids, classes = count_classes(tensor, tensor.float(), WORDS.shown_names)
    _, _, _, preview = read_photo(str(folder / "0.jpg"), Config())
    results = (ids, preview, colours_of(WORDS), {"classes": classes})
    read = seconds(lambda i: read_photo(str(folder / f"{i}.jpg"), Config()), range(count))
    write = seconds(lambda i: write_results(folder / f"{i}", *results), range(count))
    speeds = f"reads {1 / read:.1f} images/s, writes {1 / write:.1f} (label map, overlay, JSON)"
    print(f"{size[0]} x {size[1]}, a core: {speeds}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10, help="photos of each size")
    args = parser.parse_args()
    for size in ((640, 480), (4000, 3000)):
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), size, args.count)


if __name__ == "__main__":
    main()
