"""What cached features save: `python -m tests.benchmarks.features [--device cuda]`.

Images a second with a pass of the networks and from the cache, for 3, 171 and 847 classes; and the
time from a change of words to the label map on the page of `--serve`. R50 and ViT-B/16 with random
weights, an image of 480 x 640, words that were asked for before.
"""

import argparse
import io
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from PIL import Image

from tests.recipe import make_image
from zsseg.apps.predict import cached_proposals, segment_image
from zsseg.apps.serve import Session
from zsseg.apps.vocabulary import Words
from zsseg.clip import CLIP, VisionTransformer
from zsseg.config import load_config
from zsseg.distributed import init_distributed
from zsseg.images import network_inputs
from zsseg.maskformer import MaskFormer
from zsseg.prompts import build_prompt
from zsseg.segmenter import Segmenter
from zsseg.tokenizer import Tokenizer

ROUNDS = 3
SIZE = (480, 640)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    process = init_distributed(parser.parse_args().device)
    torch.manual_seed(0)
    config = load_config(None, ["model.backbone=R50"])
    tower = VisionTransformer(224, 16, 768, 12, 512)
    clip = CLIP(tower, Tokenizer(514, 77), 512, 77, 514, 512, 12).requires_grad_(False)
    maskformer = MaskFormer(config.model, clip.embed_dim, clip.scale)
    prompt = build_prompt(config.clip.prompt, clip.width)
    segmenter = Segmenter(maskformer, clip, prompt, config.clip).to(process.device).eval()
    model = (segmenter, config, process)
    process.describe(config.model.bf16)

    image = Image.fromarray(make_image(*SIZE, 0))
    inputs = network_inputs(image, config.data)
    segmenter.set_classes(["thing"])
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        place = (Path(folder, "features"), "")
        with process.autocast(config.model.bf16):
            cached_proposals(segmenter, inputs[0], *place)
        print(f"features of an image: {place[0].stat().st_size / 2**20:.2f} MiB; images/s")
        print(f"{'classes':>8}{'a pass':>10}{'cached':>10}{'x':>8}")

        def from_cache() -> None:
            proposals = cached_proposals(segmenter, inputs[0], *place)
            segment_image(*model, inputs, SIZE, proposals=proposals)

        for count in (3, 171, 847):
            segmenter.set_classes([f"thing {i}" for i in range(count)])
            fresh = seconds(lambda: segment_image(*model, inputs, SIZE), ROUNDS, process.device)
            again = seconds(from_cache, ROUNDS, process.device)
            print(f"{count:8}{1 / fresh:10.3f}{1 / again:10.2f}{fresh / again:8.1f}", flush=True)

    content = io.BytesIO()
    image.save(content, "PNG")
    vocabulary = [f"thing {i}" for i in range(21)]
    session = Session(*model, [], Words(vocabulary, {}, 21))
    number = session.add(content.getvalue())["image"]
    texts = [", ".join(vocabulary[:20]), ", ".join(vocabulary[1:])]

    def change() -> None:
        session.label(number, texts[0])
        texts.reverse()

    words = seconds(change, 4 * ROUNDS, process.device)
    print(f"words to label map, 20 words, 640 x 480: {1000 * words:.0f} ms")


if __name__ == "__main__":
    main()
