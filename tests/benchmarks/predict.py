"""How fast images come in and results go out: `python -m tests.benchmarks.predict`.

Reading and writing are measured on one core, without a network: a machine needs so many cores for
each of them as its GPU segments images a second, divided by the number printed. The last line
is the whole job with the small model of the synthetic data set (random weights).
"""

import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from tests.recipe import make_image, make_labels
from zsseg import distributed
from zsseg.config import Config, load_config
from zsseg.apps.predict import InputImages, Names, Results, find_images, segment_images
from zsseg.segmenter import Segmenter
from zsseg.prepare.shapes_clip import build_small_clip
from zsseg.apps.vocabulary import read_words

ROOT = Path(__file__).resolve().parents[2]
WORDS = read_words(", ".join(f"thing {i}" for i in range(20)))


def times(action, items: range) -> float:
    """Median seconds of action(item)."""
    seconds = []
    for item in items:
        started = time.perf_counter()
        action(item)
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def host(folder: Path, size: tuple[int, int], count: int) -> None:
    """Print the images a second of reading and of writing, for photos of a size (width,
    height).
    """
    photos = folder / f"{size[0]}"
    photos.mkdir()
    for i in range(count):
        Image.fromarray(make_image(480, 640, i)).resize(size).save(photos / f"{i}.jpg", quality=90)
    names = Names(find_images([str(photos)], folder / "out"))
    samples = InputImages(names.files, Config())
    results = Results(folder / "out", names, WORDS, "")
    labels = make_labels(480, 640, range(20), ignore=0).astype(np.uint8)
    labels = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
    counts = np.bincount(labels.ravel()).tolist()
    pixels = {i: count for i, count in enumerate(counts) if count}
    whole = [samples[i] for i in range(count)]
    read = times(lambda i: samples[i], range(count))
    write = times(lambda i: results.write(whole[i], labels, pixels, counts), range(count))
    print(
        f"{size[0]} x {size[1]}, a core: reads {1 / read:.1f} images/s, writes {1 / write:.1f} "
        f"(label map, overlay, JSON)"
    )


def whole_job(folder: Path, count: int, repeats: int) -> None:
    """Print the images a second of the synthetic data set's model."""
    config = load_config(str(ROOT / "configs" / "shapes.toml"), ["data.workers=1"])
    torch.manual_seed(0)
    segmenter = Segmenter(config, build_small_clip(config.contrast).state_dict()).eval()
    segmenter.set_classes(WORDS.names)
    photos = folder / "small"
    photos.mkdir()
    for i in range(count):
        Image.fromarray(make_image(64, 64, i)).save(photos / f"{i}.png")
    names, process = (
        Names(find_images([str(photos)], folder / "whole")),
        distributed.init_distributed("cpu"),
    )
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            results = Results(folder / "whole", names, WORDS, "")
            segment_images(segmenter, config, results, process, False)
        seconds.append(time.perf_counter() - started)
    print(
        f"synthetic data set's model, {torch.get_num_threads()} threads: "
        f"{count / median(seconds):.1f} images/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10, help="photos of each size")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        host(Path(folder), (640, 480), args.count)
        host(Path(folder), (4000, 3000), args.count)
        whole_job(Path(folder), 20 * args.count, 3)


if __name__ == "__main__":
    main()
