"""Region classification (Xu et al. 2021): binary masks -> masked crops -> CLIP class logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from zsseg import clip as clip_module
from zsseg.clip import CLIP


def mask_boxes(masks: Tensor, expand_ratio: float = 1.0) -> tuple[Tensor, Tensor]:
    """Tight boxes of binary masks [Q, H, W] -> int64 [Q, 4] as x0, y0, x1, y1 (ends excluded), and valid [Q] bool.

    Boxes are scaled by `expand_ratio` about their centre and clipped; an empty mask gets the whole picture and
    valid = False.
    """
    height, width = masks.shape[-2:]
    ends = []
    for line, size in ((masks.any(1), width), (masks.any(2), height)):  # [Q, W], [Q, H]
        first = line.int().argmax(1)
        last = size - line.flip(1).int().argmax(1)  # an empty line gives 0 and size
        if expand_ratio != 1:
            centre, half = (first + last) / 2, (last - first) * expand_ratio / 2
            first, last = ((centre + s * half).long().clamp(0, size) for s in (-1, 1))
        ends.append((first, torch.maximum(last, first + 1)))
    (x0, x1), (y0, y1) = ends
    return torch.stack([x0, y0, x1, y1], 1), masks.flatten(1).any(1)


def normalize(pictures: Tensor) -> Tensor:
    """RGB in 0..255 [..., 3, H, W] as CLIP wants it, fp32."""
    mean, std = (torch.tensor(v, device=pictures.device).view(3, 1, 1) for v in (clip_module.MEAN, clip_module.STD))
    return (pictures / 255 - mean) / std


def region_crops(image: Tensor, masks: Tensor, boxes: Tensor, resolution: int) -> Tensor:
    """What CLIP sees of each region: image [3, H, W] in 0..255, masks [P, H, W], boxes [P, 4] -> [P, 3, R, R].

    The picture inside the mask and CLIP's mean colour outside, normalised, cropped to the box, resized to R x R with
    bicubic interpolation (a = -0.75, half-pixel centres, no anti-aliasing). Filling with the mean before normalising
    is 0 after it.
    """
    image = normalize(image)
    size = (resolution, resolution)
    crops = image.new_empty(len(masks), 3, *size)
    for crop, mask, (x0, y0, x1, y1) in zip(crops, masks, boxes.tolist(), strict=True):
        region = image[:, y0:y1, x0:x1] * mask[y0:y1, x0:x1]
        crop[:] = F.interpolate(region[None], size, mode="bicubic", align_corners=False)[0]
    return crops


def classify_crops(clip: CLIP, crops: Tensor, text: Tensor, chunk: int = 0) -> Tensor:
    """CLIP's logits, 100 x cosine: crops [P, 3, R, R], text features [C, D] -> fp32 [P, C].

    `chunk` crops go through CLIP at once; 0: 100 of 224 x 224 on a GPU, 8 on a CPU, where one large batch is slower
    (tests/benchmarks/regions.py).
    """
    if not len(crops):
        return text.new_zeros(0, len(text))
    chunk = chunk or max((100 if crops.is_cuda else 8) * 224**2 // crops.shape[-1] ** 2, 1)
    features = torch.cat([clip.encode_image(part).float() for part in crops.split(chunk)])
    with torch.autocast(text.device.type, enabled=False):
        return 100 * F.normalize(features, dim=-1) @ text.float().T
