"""The small CLIP of the synthetic data set: its sizes and its contrastive training, from regions
and captions of all classes on separate images. Two minutes; killed, it begins again.
"""

from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from zsseg.clip import CLIP, ConvStem, VisionTransformer
from zsseg.images import read_image, to_tensor
from zsseg.prepare.shapes import NAMES, read_captions
from zsseg.regions import box_of, region_crops
from zsseg.tokenizer import Tokenizer
from zsseg.utils import atomic_write, mix_seed, progress

STEPS = 450
GROUPS = 4  # sets of distinct classes a step


def build_small_clip() -> CLIP:
    """A CLIP with a small backbone for a stem (plain patches learn too slowly) and the 514 byte
    tokens.
    """
    visual = VisionTransformer(48, ConvStem.stride, 96, 3, 64, [32, 64, 96, 128])
    return CLIP(visual, Tokenizer(514, 40), 64, 40, 514, 64, 2)


def train_small_clip(folder: Path, steps: int = STEPS) -> None:
    """Write `clip.pt` to the folder of the data set, unless it is there."""
    if (folder / "clip.pt").exists():
        return
    torch.manual_seed(mix_seed(0, 0))
    clip = build_small_clip().train()
    plain = nn.LayerNorm, nn.BatchNorm2d, nn.Embedding  # without weight decay
    groups = {0.05: [], 0.0: []}
    for module in clip.modules():
        groups[0.0 if isinstance(module, plain) else 0.05] += module.parameters(recurse=False)
    groups = [{"params": group, "weight_decay": decay} for decay, group in groups.items()]
    optimizer = torch.optim.AdamW(groups, fused=True)
    regions = read_regions(folder)
    for step in progress(range(steps), "train the small CLIP", steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / steps) ** 0.9
        samples = [sample(clip, regions, GROUPS * step + i) for i in range(GROUPS)]
        crops, captions = zip(*samples, strict=True)
        features = clip(torch.cat(crops), clip.tokenizer([*chain(*captions)]))
        image, text = (x.unflatten(0, (GROUPS, -1)) for x in features)  # [GROUPS, N, D]
        optimizer.zero_grad()
        contrastive_loss(image, text, clip.logit_scale).backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
    with atomic_write(folder / "clip.pt") as file:
        torch.save(clip.state_dict(), file)


def read_regions(folder: Path) -> list[list[tuple]]:
    """Of each class, all regions: (image uint8 [3, H, W], box int64 [4], caption)."""
    regions = [[] for _ in NAMES]
    for name, captions in read_captions(folder).items():
        if name.startswith("clip"):
            image = to_tensor(read_image(folder / "images" / "clip" / f"{name}.jpg"))
            labels = np.array(Image.open(folder / "labels" / "clip" / f"{name}.png"))
            for k, caption in captions.items():
                [box] = box_of(torch.from_numpy(labels == int(k))[None])
                regions[int(k)].append((image, box, caption))
    return regions


def sample(clip: CLIP, regions: list, n: int) -> tuple[Tensor, list[str]]:
    """Sample n: one region of every class (so no two of them match each other's caption), as crops
    fp32 [N, 3, R, R] and captions.

    A crop is the box around the region and a little more or less; nothing is masked in it, as in
    what the real CLIP was trained on.
    """
    rng = np.random.default_rng(mix_seed(0, 3, n))
    crops = []
    texts = []
    for choices in regions:
        image, box, caption = choices[int(rng.integers(len(choices)))]
        first, last = box.split(2)
        half = (last - first) * float(rng.uniform(0.9, 1.3)) / 2
        ends = [(first + last) / 2 + half * side for side in (-1, 1)]
        first, last = (end.long().clamp(0, image.shape[2]) for end in ends)
        box = torch.cat([first, last.maximum(first + 1)])[None]
        crop = region_crops(clip, image, torch.ones_like(image[:1]), box)
        crops.append(crop.flip(-1) if rng.random() < 0.5 else crop)
        texts.append(caption)
    return torch.cat(crops), texts


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of groups whose N pairs are all distinct: image, text [G, N, D] ->
    scalar.
    """
    image = scale.exp().clamp(max=100) * F.normalize(image, dim=-1)
    logits = image @ F.normalize(text, dim=-1).mT  # [G, N, N]
    target = torch.arange(logits.shape[-1]).expand(len(logits), -1)
    return (F.cross_entropy(logits.mT, target) + F.cross_entropy(logits, target)) / 2
