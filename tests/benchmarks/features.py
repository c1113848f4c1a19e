"""What kept features save: `python -m tests.benchmarks.features [--device cuda]`.

Images a second with a pass of the networks and from kept features, for 3, 171 and 847 classes; and
the time from a change of words to the new overlay's label map, as the page of `--serve` computes
it. R50 and ViT-B/16 with random weights, an image of 480 x 640, text features random (of words that
were asked for before).
"""

import argparse
import io
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from PIL import Image

from tests.recipe import make_image
from zsseg import clip
from zsseg.config import load_config
from zsseg.data import network_inputs
from zsseg.distributed import init_distributed
from zsseg.features import FeatureFiles, read_arrays, to_proposals
from zsseg.apps.predict import InputImage, Names
from zsseg.segmenter import Segmenter
from zsseg.apps.serve import Session
from zsseg.apps.vocabulary import Words


def seconds(action, rounds: int, device: torch.device) -> float:
    """Median of some rounds, after one that does not count."""
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times[1:])


def random_words(segmenter: Segmenter, count: int) -> None:
    """A vocabulary of random text features [C, D]."""
    features = F.normalize(torch.randn(count, segmenter.clip.embed_dim), dim=-1)
    device = next(segmenter.parameters()).device
    segmenter.names = [f"thing {i}" for i in range(count)]
    segmenter.seen = torch.arange(count, device=device) % 2 == 0
    segmenter.text_features = features.to(device)
    segmenter.region_text_features = segmenter.text_features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    process = init_distributed(args.device)
    torch.manual_seed(0)
    config = load_config(None, ["model.backbone=R50"])
    tower = clip.VisionTransformer(224, 16, 768, 12, 512)
    state = clip.CLIP(tower, 512, 77, 514, 512, 12).state_dict()
    segmenter = Segmenter(config, state).to(process.device).eval()
    process.describe(config.model.bf16)

    size = (480, 640)
    image = Image.fromarray(make_image(*size, 0))
    inputs = network_inputs(image, config.data)
    random_words(segmenter, 3)
    names = Names(["/images", "/images/a.jpg"])
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        files = FeatureFiles(Path(folder), names, "benchmark")
        item = InputImage(0, inputs, inputs[0], size, [0, 0])
        files.write(item, files.segment(segmenter, config, process, item))
        kept = files.file(0).stat().st_size / 2**20

        def label(proposals) -> None:
            segmenter.label_map(segmenter.ensemble(proposals), proposals, size)

        def from_features() -> None:
            proposals = to_proposals(read_arrays(files.file(0))).to(process.device)
            label(segmenter.classify(proposals))

        print(f"features of an image: {kept:.2f} MiB; images/s")
        print(f"{'classes':>8}{'a pass':>10}{'kept':>10}{'x':>8}")
        for count in (3, 171, 847):
            random_words(segmenter, count)
            fresh = seconds(
                lambda: label(files.segment(segmenter, config, process, item)),
                args.rounds,
                process.device,
            )
            again = seconds(from_features, args.rounds, process.device)
            print(f"{count:8}{1 / fresh:10.3f}{1 / again:10.2f}{fresh / again:8.1f}", flush=True)

    content = io.BytesIO()
    image.save(content, "PNG")
    vocabulary = [f"thing {i}" for i in range(21)]
    session = Session(segmenter, config, process, [], Words(vocabulary, {}, 21))
    number = session.add(content.getvalue())["image"]
    texts = [", ".join(vocabulary[:20]), ", ".join(vocabulary[1:])]

    def change() -> None:
        session.label(number, texts[0])
        texts.reverse()

    change()
    words = seconds(change, 4 * args.rounds, process.device)
    print(f"words to label map, 20 words, 640 x 480: {1000 * words:.0f} ms")


if __name__ == "__main__":
    main()
