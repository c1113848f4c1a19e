"""Make the README's images from a run on the synthetic data set: `python -m
tests.benchmarks.screens runs/shapes`.

shapes.png from the samples of an evaluation, overlay.png by `eval.py --images`, report.png by
`--report` and serve.png by `--serve` in a real Chromium; to tests/screens/.
"""

import argparse
import tempfile
import threading
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

import eval as evaluation
from tests.chromium import chromium, window
from zsseg.apps.api import load
from zsseg.apps.serve import Session, open_server
from zsseg.apps.vocabulary import parse_words
from zsseg.datasets import dataset
from zsseg.visualize import palette

SCREENS = Path(__file__).resolve().parents[1] / "screens"
IMAGE = "test00006"
WORDS = "bottle, umbrella; other: sand"


def save(image: Image.Image, name: str) -> None:
    """As a PNG of few colours, which is small."""
    image = image.convert("RGB").quantize(256, kmeans=2, dither=Image.Dither.NONE)
    image.save(SCREENS / name, optimize=True)


def with_legend(samples: Image.Image, columns: int = 9) -> Image.Image:
    """All classes below the samples; the unseen ones have a star."""
    data = dataset("shapes")
    rows = -(-len(data.names) // columns)
    canvas = ImageOps.expand(samples, (0, 0, 0, 19 * rows + 6), "white")
    pen = ImageDraw.Draw(canvas)
    for i, name in enumerate(data.names):
        x = i % columns * canvas.width // columns
        y = samples.height + 6 + i // columns * 19
        pen.rectangle((x, y, x + 12, y + 12), tuple(palette(len(data.names))[i].tolist()))
        pen.text((x + 16, y), name + " *" * (name in data.unseen), "black")
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--root", type=Path, default=Path("datasets"))
    args = parser.parse_args()
    checkpoint = args.run / "last.pt"
    file = args.root / "shapes" / "images" / "test" / f"{IMAGE}.jpg"
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        out = Path(folder)
        common = [str(checkpoint), "--root", str(args.root), "--device", "cpu", "--out"]
        evaluation.main([*common, str(out / "measured"), "--report"])
        save(with_legend(Image.open(out / "measured" / "samples.png")), "shapes.png")
        words = ["--images", str(file), "--classes", WORDS]
        evaluation.main([*common, str(out / "words"), *words])
        overlay = Image.open(out / "words" / f"{IMAGE}.overlay.jpg")
        canvas = Image.new("RGB", (490 + overlay.width, 480), "white")
        canvas.paste(Image.open(file).resize((480, 480)))
        canvas.paste(overlay, (490, 0))
        save(canvas, "overlay.png")

        found = load(checkpoint, root=args.root, device="cpu")
        server = open_server(0, found.config)
        parts = (found.segmenter, found.config, found.process, found.trained)
        session = Session(*parts, parse_words(WORDS))
        threading.Thread(target=server.run, args=[session], daemon=True).start()
        shot = out / "shot.png"
        with window(browser, 900) as page:
            page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
            page.wait_for_load_state("networkidle")
            page.locator("#file").set_input_files(file)
            page.wait_for_selector("#pixel li")
            page.screenshot(path=shot)
        save(Image.open(shot).crop((0, 0, 900, 750)), "serve.png")
        server.shutdown()
        with window(browser, 1000) as page:
            page.goto((out / "measured" / "report.html").as_uri())
            page.screenshot(path=shot, full_page=True)
        save(Image.open(shot).crop((0, 0, 1000, 1500)), "report.png")


if __name__ == "__main__":
    main()
