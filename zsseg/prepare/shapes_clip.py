"""The small CLIP of the synthetic data set: its sizes and its contrastive training, from regions
and captions of all classes on separate images. Two minutes; killed, it begins again.
"""

import json

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from zsseg.checkpoint import save
from zsseg.clip import CLIP, ConvStem, VisionTransformer
from zsseg.datasets import find_pairs
from zsseg.images import read_image, to_tensor
from zsseg.prepare.shapes import NAMES
from zsseg.regions import region_crops
from zsseg.tokenizer import Tokenizer
from zsseg.utils import mix_seed, progress

STEPS = 450
GROUPS = 4  # sets of distinct classes a step


def build_small_clip():
    """A CLIP with a small backbone for a stem (plain patches learn too slowly) and the 514 byte
    tokens.
    """
    visual = VisionTransformer(48, ConvStem.stride, 96, 3, 64, [32, 64, 96, 128])
    return CLIP(visual, Tokenizer(514, 40), 64, 40, 514, 64, 2)


def train_small_clip(folder, steps=STEPS, seed=0):
    """Write `clip.pt` to the folder of the data set, unless it is there."""
    if (folder / "clip.pt").exists():
        return
    torch.manual_seed(mix_seed(seed, 0))
    clip = build_small_clip()
    plain = (nn.LayerNorm, nn.BatchNorm2d, nn.Embedding)  # without weight decay
    groups = []
    for module in clip.modules():
        decay = 0.0 if isinstance(module, plain) else 0.05
        groups.append({"params": [*module.parameters(recurse=False)], "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, fused=True)
    regions = read_regions(folder)
    classes = torch.arange(len(NAMES)).expand(GROUPS, -1)
    for step in progress(range(steps), "train the small CLIP", steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / steps) ** 0.9
        crops, captions = zip(*draw_samples(clip, regions, seed, step), strict=True)
        features = clip.encode_image(torch.cat(crops)), clip.encode_text(clip.tokenizer(captions))
        image, text = (F.normalize(x.unflatten(0, (GROUPS, -1)), dim=-1) for x in features)
        logits = clip.logit_scale.exp().clamp(max=100) * image @ text.mT  # [GROUPS, N, N]
        loss = F.cross_entropy(logits.mT, classes) + F.cross_entropy(logits, classes)
        optimizer.zero_grad()
        (loss / 2).backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
    save(folder / "clip.pt", **clip.state_dict())


def read_regions(folder):
    """Of each class, all regions: (image uint8 [3, H, W], corners fp32 [2, 2] of its box,
    caption).
    """
    texts = json.loads((folder / "captions.json").read_bytes())
    regions = [[] for _ in NAMES]
    for image_file, label_file in find_pairs("shapes", folder.parent, "clip"):
        image = to_tensor(read_image(image_file))
        labels = np.array(Image.open(label_file))
        for k, caption in texts[image_file.stem].items():
            box = Image.fromarray(labels == int(k)).getbbox()
            regions[int(k)].append((image, torch.tensor(box).view(2, 2).float(), caption))
    return regions


def draw_samples(clip, regions, seed, step):
    """Of a step: for every group one region of every class, so that no two of them match each
    other's caption: crop fp32 [1, 3, R, R], caption.

    A crop is the box around the region and a little more or less; nothing is masked in it, as in
    what the real CLIP was trained on.
    """
    for n in range(GROUPS * step, GROUPS * step + GROUPS):
        rng = np.random.default_rng(mix_seed(seed, 3, n))
        for choices in regions:
            image, corners, caption = choices[rng.integers(len(choices))]
            centre = corners.mean(0)
            corners = centre + (corners - centre) * rng.uniform(0.9, 1.3)
            first, last = corners.long().clamp(0, image.shape[2])
            box = torch.cat([first, last.maximum(first + 1)])[None]
            crop = region_crops(clip, image, torch.ones_like(image[:1]), box)
            yield crop.flip(-1) if rng.random() < 0.5 else crop, caption
