"""Make the README's images from a run on the synthetic data set: `python -m
tests.benchmarks.screens runs/shapes`.

shapes.jpg is samples.png of an evaluation, report.png by `--report` and serve.png by `--serve` in a
real Chromium; to tests/screens/.
"""

import argparse
import tempfile
import threading
from pathlib import Path

from PIL import Image

import eval as evaluation
from tests.chromium import chromium, window
from zsseg.apps.api import load
from zsseg.apps.serve import Session, open_server
from zsseg.apps.vocabulary import parse_words

SCREENS = Path(__file__).resolve().parents[1] / "screens"
IMAGE = "test00003"
WORDS = "cup, ring; other: sky"


def save(image: Image.Image, name: str) -> None:
    """With all its colours: fewer would make two classes alike."""
    image.convert("RGB").save(SCREENS / name, optimize=True, quality=90)


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
        save(Image.open(out / "measured" / "samples.png"), "shapes.jpg")

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
            page.locator("main").screenshot(path=shot)
        save(Image.open(shot), "serve.png")
        server.shutdown()
        with window(browser, 1000) as page:
            page.goto((out / "measured" / "report.html").as_uri())
            page.screenshot(path=shot, full_page=True)
            card = page.locator(".card").first.bounding_box()  # its row is the last that is shown
        bottom = int(card["y"] + card["height"]) + 12
        save(Image.open(shot).crop((0, 0, 1000, bottom)), "report.png")


if __name__ == "__main__":
    main()
