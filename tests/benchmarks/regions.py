"""A full-size picture end to end (480 x 640, R101c, ViT-B/16, 100 queries, random weights): crops in batches against
one region at a time, and against all crops in one batch.

    python -m tests.benchmarks.regions [--rounds 3] [--device cuda]

The versions run in turn in this process and give the same label map; medians are printed.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from kernels.region_crop import reference_masks
from zsseg import clip, run
from zsseg.clip import CLIP, VisionTransformer
from zsseg.config import load_config
from zsseg.regions import mask_boxes, region_crops
from zsseg.segmenter import Segmenter


def build(device: torch.device) -> Segmenter:
    torch.manual_seed(0)
    model = CLIP(VisionTransformer(224, 16, 768, 12, 512), 512, 77, 514, 512, 12)
    segmenter = Segmenter(load_config(), model.state_dict()).to(device).eval()
    segmenter.set_classes([f"thing {i}" for i in range(20)], list(range(15)))
    return segmenter


def one_by_one(segmenter: Segmenter, image: torch.Tensor, masks: torch.Tensor, boxes: torch.Tensor,
               index: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """The plain way: fill, crop, normalise, resize and classify each region by itself."""
    mean, std = (torch.tensor(v, device=image.device).view(3, 1, 1) for v in (clip.MEAN, clip.STD))
    rows = []
    for mask, (x0, y0, x1, y1) in zip(masks[index].bool(), boxes[index].tolist(), strict=True):
        region = torch.where(mask[y0:y1, x0:x1], image[:, y0:y1, x0:x1] / 255, mean)
        crop = F.interpolate(((region - mean) / std)[None], (224, 224), mode="bicubic", align_corners=False)
        rows.append(100 * F.normalize(segmenter.clip.encode_image(crop), dim=-1) @ segmenter.region_text.T)
    return torch.cat(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = run.start(args.device).device
    segmenter = build(device)
    image = torch.randint(0, 256, (3, 480, 640), dtype=torch.uint8, device=device)
    batched = type(segmenter).region_logits

    def timed(logits, chunk: int) -> tuple[float, torch.Tensor]:
        type(segmenter).region_logits, segmenter.config.chunk = torch.inference_mode()(logits), chunk
        started = time.perf_counter()
        labels = segmenter(image, (480, 640)).cpu()
        return time.perf_counter() - started, labels

    segmenter.config.ensemble = False
    proposals = segmenter.propose(image)
    binary = reference_masks(proposals.logits, proposals.size, 0.5)
    segmenter.config.ensemble = True
    boxes, valid = mask_boxes(binary)
    versions = {"one region at a time": (one_by_one, 0), "one batch of all": (batched, 1000), "in chunks (ours)": (batched, 0)}
    times, maps = {name: [] for name in versions}, {}
    for version in versions.values():
        timed(*version)  # warm-up
    for _ in range(args.rounds):
        for name, version in versions.items():
            seconds, maps[name] = timed(*version)
            times[name].append(seconds)
    started = time.perf_counter()
    region_crops(image, binary[valid], boxes[valid], 224)
    cropping = time.perf_counter() - started
    same = torch.stack(list(maps.values())).diff(dim=0).eq(0).double().mean()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}: {int(valid.sum())} valid regions, equal labels {100 * same:.2f}%")
    for key, values in times.items():
        print(f"{key:24}{statistics.median(values):8.2f} s a picture (median of {args.rounds})")
    print(f"of which cropping       {cropping:8.2f} s")


if __name__ == "__main__":
    main()
