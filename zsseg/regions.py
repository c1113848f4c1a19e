"""Region classification (Xu et al. 2021): binary masks -> masked crops -> CLIP class logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import region_crop as kernel
from zsseg import clip as clip_module
from zsseg.clip import CLIP


def mask_boxes(masks: Tensor, expand_ratio: float = 1.0) -> tuple[Tensor, Tensor]:
    """Tight boxes of binary masks [Q, H, W] -> int64 [Q, 4] as x0, y0, x1, y1 (ends excluded), and valid [Q] bool.

    Boxes are scaled by `expand_ratio` about their centre and clipped; an empty mask gets the whole picture and
    valid = False.
    """
    boxes, valid = kernel.reference_boxes(masks)
    return expand_boxes(boxes, expand_ratio, masks.shape[-2:]), valid


def expand_boxes(boxes: Tensor, ratio: float, size: tuple[int, int]) -> Tensor:
    """Boxes [Q, 4] scaled about their centre, clipped to a picture of `size` (height, width), at least a pixel wide."""
    if ratio == 1:
        return boxes
    first, last = boxes[:, :2], boxes[:, 2:]
    limit = boxes.new_tensor([size[1], size[0]])
    centre, half = (first + last) / 2, (last - first) * ratio / 2
    first, last = ((centre + s * half).long().clamp(min=0).minimum(limit) for s in (-1, 1))
    return torch.cat([first, torch.maximum(last, first + 1)], 1)


def normalize(pictures: Tensor) -> Tensor:
    """RGB in 0..255 [..., 3, H, W] as CLIP wants it, fp32."""
    mean, std = (torch.tensor(v, device=pictures.device).view(3, 1, 1) for v in (clip_module.MEAN, clip_module.STD))
    return (pictures / 255 - mean) / std


def region_crops(image: Tensor, masks: Tensor, boxes: Tensor, resolution: int, index: Tensor | None = None) -> Tensor:
    """What CLIP sees of each region: image [3, H, W] in 0..255, masks [Q, H, W], boxes [Q, 4] -> [P, 3, R, R].

    The picture inside the mask and CLIP's mean colour outside, normalised, cropped to the box, resized to R x R with
    bicubic interpolation (a = -0.75, half-pixel centres, no anti-aliasing). Filling with the mean before normalising
    is 0 after it. `index` [P] chooses among the masks; without it, P = Q. bf16 under autocast, else fp32.
    """
    index = torch.arange(len(masks), device=masks.device) if index is None else index
    kind = torch.bfloat16 if torch.is_autocast_enabled(image.device.type) else torch.float32
    sizes = (list(clip_module.MEAN), list(clip_module.STD), resolution)
    if image.is_cuda and image.dtype != torch.uint8:
        return kernel.reference_crops(image, masks[index] != 0, boxes[index], *sizes).to(kind)
    return kernel.region_crop(image, masks.to(torch.uint8), index, boxes, *sizes, kind)


def classify_crops(clip: CLIP, crops: Tensor, text: Tensor, chunk: int = 0, few_sizes: bool = False) -> Tensor:
    """CLIP's logits, 100 x cosine: crops [P, 3, R, R], text features [C, D] -> fp32 [P, C].

    `chunk` crops go through CLIP at once; 0: 100 of 224 x 224 on a GPU, 8 on a CPU. With `few_sizes`, for a compiled CLIP,
    the last chunk is filled up to a whole, a half, a quarter or an eighth of `chunk`.
    """
    if not len(crops):
        return text.new_zeros(0, len(text))
    chunk = chunk or max((100 if crops.is_cuda else 8) * 224**2 // crops.shape[-1] ** 2, 1)
    features = []
    for part in crops.split(chunk):
        count = len(part)
        if few_sizes:
            size = min(s for s in (chunk, chunk // 2, chunk // 4, chunk // 8) if s >= count)
            part = F.pad(part, (0, 0, 0, 0, 0, 0, 0, size - count))
        features.append(clip.encode_image(part)[:count].float())
    features = torch.cat(features)
    with torch.autocast(text.device.type, enabled=False):
        return 100 * F.normalize(features, dim=-1) @ text.float().T
