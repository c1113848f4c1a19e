"""Make the README's images from a run on the synthetic data set: `python -m
tests.benchmarks.screens runs/shapes`.

shapes.png from the first images of the test split, overlay.png by `eval.py --images`, report.png
from `eval.py --budget --report` and serve.png from
`eval.py --serve` in headless Chromium; to tests/screens/.
"""

import argparse
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import eval as evaluation
from tests.browser import Browser
from zsseg.apps.api import checkpoint_and_config, load
from zsseg.build import load_segmenter
from zsseg.data import to_tensor
from zsseg.datasets import dataset, find_pairs
from zsseg.distributed import init_distributed
from zsseg.images import read_image, read_values
from zsseg.apps.serve import Session, open_port
from zsseg.visualize import comparison_strip, palette
from zsseg.apps.vocabulary import parse_words, trained_names

SCREENS = Path(__file__).resolve().parents[1] / "screens"
IMAGE = "test00006"
WORDS = "bottle, umbrella; other: sand"


def save(image: Image.Image, name: str) -> None:
    """As a PNG of few colours, which is small."""
    SCREENS.mkdir(exist_ok=True)
    image.quantize(256, kmeans=2, dither=Image.Dither.NONE).save(SCREENS / name, optimize=True)


def grid(args: argparse.Namespace, count: int = 9) -> Image.Image:
    """Test images, their ground truth and their prediction below one another, and a legend."""
    data = dataset("shapes")
    segmenter = load(args.run / "last.pt", root=args.root, device="cpu")
    side = 120
    strips = []
    shown = set()
    for image_file, label_file in find_pairs("shapes", args.root, "test")[:count]:
        image = read_image(image_file)
        labels = torch.from_numpy(read_values(label_file, 8).astype(np.int64))
        predicted = torch.from_numpy(segmenter(image).astype(np.int64))
        shown |= {*labels.unique().tolist(), *predicted.unique().tolist()}
        strip = comparison_strip(to_tensor(image), labels, predicted, len(data.names), side)
        strips.append(Image.fromarray(strip))
    canvas = Image.new("RGB", (count * (side + 4), 3 * side + 44), "white")
    for i, strip in enumerate(strips):
        canvas.paste(strip, (i * (side + 4), 0))
    pen = ImageDraw.Draw(canvas)
    columns = -(-len(shown) // 2)
    for i, c in enumerate(sorted(shown)):
        x = i % columns * canvas.width // columns
        y = 3 * side + 6 + i // columns * 19
        pen.rectangle((x, y, x + 12, y + 12), fill=tuple(palette(len(data.names))[c].tolist()))
        pen.text((x + 16, y), data.names[c] + (" *" if c not in data.seen else ""), fill="black")
    return canvas


def page_of_words(args: argparse.Namespace, file: Path, shot: Path) -> None:
    """The page of `--serve` after a photo and words, as a screenshot."""
    content, config = checkpoint_and_config(args.run / "last.pt", None, [])
    process = init_distributed("cpu")
    segmenter = load_segmenter(content, config, args.root, args.run).eval()
    words = parse_words(WORDS.split(";"))
    server = open_port(0)
    server.session = Session(segmenter, config, process, trained_names(content, config), words)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with Browser() as browser:
        browser.open(f"http://127.0.0.1:{server.server_address[1]}/", 900)
        browser.value(
            f"load(new File([Uint8Array.from({list(file.read_bytes())})], 'a.jpg')).then(() => 1)"
        )
        while not browser.value("document.querySelectorAll('#pixel li').length"):
            time.sleep(0.1)
        browser.screenshot(shot)
    server.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--root", type=Path, default=Path("datasets"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        save(grid(args), "shapes.png")
        common = [str(args.run / "last.pt"), "--root", str(args.root), "--out", out]
        file = args.root / "shapes" / "images" / "test" / f"{IMAGE}.jpg"
        evaluation.main([*common, "--images", str(file), "--classes", WORDS])
        overlay = Image.open(Path(out) / f"{IMAGE}.overlay.jpg")
        canvas = Image.new("RGB", (490 + overlay.width, 480), "white")
        canvas.paste(Image.open(file).resize((480, 480)))
        canvas.paste(overlay, (490, 0))
        save(canvas, "overlay.png")
        page_of_words(args, file, Path(out) / "serve.png")
        save(Image.open(Path(out) / "serve.png").convert("RGB").crop((0, 0, 900, 750)), "serve.png")
        evaluation.main([*common, "--budget", "--report"])
        with Browser() as browser:
            browser.open(Path(out) / "report.html", 1000)
            top = int(
                browser.value(
                    "[...document.querySelectorAll('h2')].at(-1).getBoundingClientRect().top + "
                    "scrollY"
                )
            )
            browser.screenshot(Path(out) / "page.png")
        page = Image.open(Path(out) / "page.png").convert("RGB")
        parts = Image.new("RGB", (2 * page.width, 1500), "white")  # the head and the images
        for i, start in enumerate((0, top)):
            parts.paste(
                page.crop((0, start, page.width, start + parts.height)), (i * page.width, 0)
            )
        save(parts.resize((page.width, parts.height // 2), Image.Resampling.LANCZOS), "report.png")


if __name__ == "__main__":
    main()
