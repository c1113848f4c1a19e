"""Segment an image with the exported programs beside this file (written by zsseg): python
example.py photo.jpg

Needs PyTorch, numpy and Pillow alone. Prints the classes found and their shares of the image, and
writes labels.png, class ids (numbers of `shown_names` in settings.json), to the current folder,
where it replaces what it wrote itself alone.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

HERE = Path(__file__).resolve().parent
PART = 8  # crops, and classes of the score map, at once: a matter of memory


def span(hit: Tensor, ratio: float) -> slice:
    """The rows (or columns) of a box, from where the mask has a pixel: bool [H] (or [W])."""
    places = hit.nonzero()[:, 0]
    first, last = places[0], places[-1] + 1
    centre, half = (first + last) / 2, (last - first) * ratio / 2
    first, last = (int((centre + side * half).long().clamp(0, len(hit))) for side in (-1, 1))
    return slice(first, max(last, first + 1))


def open_image(file: str) -> Image.Image:
    """As a viewer shows it: turned as the camera says, transparent parts on white, 8 bits a
    channel.
    """
    image = ImageOps.exif_transpose(Image.open(file))
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


@torch.inference_mode()
def segment(photo: Image.Image, s: dict, proposer: Callable, clip: Callable | None) -> Tensor:
    """RGB image -> class ids int64 [height, width]; s: settings.json."""
    (W, H), short, longest = photo.size, s["short_edge"], s["longest_edge"]
    w, h = (short, short / W * H) if W <= H else (short / H * W, short)
    w, h = (
        max(int((side if max(w, h) <= longest else side * longest / max(w, h)) + 0.5), 1)
        for side in (w, h)
    )
    image = (
        torch.from_numpy(np.array(photo.resize((w, h), Image.Resampling.BILINEAR)))
        .permute(2, 0, 1)
        .float()
    )
    scores, logits = proposer(image[None])  # [Q, C], [Q, h/4, w/4]
    padded = [4 * side for side in logits.shape[1:]]
    masks = F.interpolate(logits[None], padded, mode="bilinear", align_corners=False)[
        0, :, :h, :w
    ].sigmoid()
    if clip:
        R, mean, std = (
            s["clip"]["resolution"],
            *(torch.tensor(s["clip"][k]).view(3, 1, 1) for k in ("mean", "std")),
        )
        regions, normal, crops = masks > s["mask_threshold"], (image / 255 - mean) / std, []
        valid = regions.flatten(1).any(1)
        for region in regions[valid]:
            rows, columns = (span(region.any(axis), s["expand_ratio"]) for axis in (1, 0))
            crop = (normal * region)[None, :, rows, columns]
            crops.append(F.interpolate(crop, (R, R), mode="bicubic", align_corners=False))
            if s["clip"]["mask_channel"]:
                cut = region[None, None, rows, columns].float()
                cut = F.interpolate(cut, (R, R), mode="nearest")
                crops[-1] = torch.cat([crops[-1], cut], 1)
        opinion, w = torch.ones_like(scores), s["ensemble_weight"]
        if crops:
            opinion[valid] = torch.cat(
                [clip(part) for part in torch.cat(crops).split(PART)]
            ).softmax(-1)
        power = torch.full((len(s["names"]),), 1 - w)
        power[s["seen"]] = w
        scores = scores**power * opinion ** (1 - power) if w else opinion * valid[:, None]
    best, labels = torch.full((H, W), -1.0), torch.zeros(H, W, dtype=torch.int64)
    for first in range(0, len(s["names"]), PART):
        part = torch.einsum("qc,qhw->chw", scores[:, first : first + PART], masks)
        value, index = F.interpolate(part[None], (H, W), mode="bilinear", align_corners=False)[
            0
        ].max(0)
        best, labels = torch.maximum(best, value), labels.where(value <= best, first + index)
    return labels.clamp(max=len(s["shown_names"]) - 1)  # background words come last


def error(text: str) -> NoReturn:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def is_ours(file: Path, mark: str) -> bool:
    """Whether an image says that this program wrote it."""
    try:
        return Image.open(file).info.get("Software") == mark
    except OSError:
        return False


if __name__ == "__main__":
    if len(sys.argv) != 2:
        error("command line: one image is wanted; python example.py photo.jpg")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    settings, out, mark = (
        json.loads((HERE / "settings.json").read_text("utf-8")),
        Path("labels.png"),
        PngInfo(),
    )
    if out.exists() and not is_ours(out, settings["program"]):
        error(
            "labels.png: is there, and not one that this program wrote; move it, or go to another "
            "folder"
        )
    try:
        photo = open_image(sys.argv[1])
    except (OSError, ValueError, SyntaxError) as problem:
        error(f"image {sys.argv[1]}: cannot be read ({problem}); give another one")
    # Or the smallest images are refused.
    load = lambda name: torch.export.load(HERE / name).module(check_guards=False)
    proposer, clip = load("proposer.pt2"), load("clip.pt2") if settings["clip"] else None
    found = segment(photo, settings, proposer, clip)
    mark.add_text("Software", settings["program"])
    kind = np.uint8 if len(settings["shown_names"]) <= 255 else np.uint16
    Image.fromarray(found.numpy().astype(kind)).save(out, pnginfo=mark)
    for count, i in sorted(
        zip(*(x.tolist() for x in found.unique(return_counts=True)[::-1]), strict=True),
        reverse=True,
    ):
        print(f"{count / found.numel():6.1%} {settings['shown_names'][i]}")
