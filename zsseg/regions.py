"""Region classification (Xu et al. 2021): binary masks -> masked crops -> CLIP class logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import region_crop as kernel
from kernels.jit import use_triton
from kernels.mask_pool import mask_pool as mask_pool_kernel
from zsseg import clip as clip_module
from zsseg.clip import CLIP, cosine_logits
from zsseg.run import out_of_memory, say

STRIDE = 4  # from mask logits to the padded network input


def mask_probabilities(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask logits [Q, h, w] at stride 4 -> probabilities at network-input size, before padding: [Q,
    *size], fp32 or fp64.
    """
    padded = (STRIDE * logits.shape[1], STRIDE * logits.shape[2])
    logits = logits[None].to(torch.promote_types(logits.dtype, torch.float32))
    return F.interpolate(logits, padded, mode="bilinear", align_corners=False)[
        0, :, : size[0], : size[1]
    ].sigmoid()


def region_masks(
    logits: Tensor, size: tuple[int, int], threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask logits [Q, h, w] -> where the probability is above the threshold, 0 or 1, uint8 [Q,
    *size]; boxes and valid as `mask_boxes` gives them.
    """
    if use_triton(logits):
        return kernel.region_masks(logits, list(size), threshold)
    masks = mask_probabilities(logits, size) > threshold
    return masks.to(torch.uint8), *mask_boxes(masks)


def mask_boxes(masks: Tensor, expand_ratio: float = 1.0) -> tuple[Tensor, Tensor]:
    """Tight boxes of binary masks [Q, H, W] -> int64 [Q, 4] as x0, y0, x1, y1 (ends excluded), and
    valid [Q] bool.

    Boxes are scaled by `expand_ratio` about their centre and clipped; an empty mask gets the whole
    image and valid = False.
    """
    H, W = masks.shape[-2:]
    ends = []
    for line, length in ((masks.bool().any(1), W), (masks.bool().any(2), H)):  # [Q, W], [Q, H]
        first = line.int().argmax(1)
        ends.append((first, length - line.flip(1).int().argmax(1)))
    (x0, x1), (y0, y1) = ends
    boxes = torch.stack([x0, y0, x1, y1], 1)
    return expand_boxes(boxes, expand_ratio, (H, W)), masks.flatten(1).bool().any(1)


def expand_boxes(boxes: Tensor, ratio: float, size: tuple[int, int]) -> Tensor:
    """Boxes [Q, 4] scaled about their centre, clipped to an image of `size` (height, width), at
    least a pixel wide.
    """
    if ratio == 1:
        return boxes
    first, last = boxes[:, :2], boxes[:, 2:]
    limit = boxes.new_tensor([size[1], size[0]])
    centre, half = (first + last) / 2, (last - first) * ratio / 2
    first, last = ((centre + s * half).long().clamp(min=0).minimum(limit) for s in (-1, 1))
    return torch.cat([first, torch.maximum(last, first + 1)], 1)


def normalize(pictures: Tensor) -> Tensor:
    """RGB in 0..255 [..., 3, H, W] as CLIP wants it, fp32."""
    mean, std = (
        torch.tensor(v, device=pictures.device).view(3, 1, 1)
        for v in (clip_module.MEAN, clip_module.STD)
    )
    return (pictures / 255 - mean) / std


def region_crops(
    image: Tensor, masks: Tensor, boxes: Tensor, resolution: int, index: Tensor | None = None
) -> Tensor:
    """What CLIP sees of each region: image [3, H, W] in 0..255, masks [Q, H, W], boxes [Q, 4] ->
    [P, 3, R, R].

    The image inside the mask and CLIP's mean colour outside, normalised, cropped to the box,
    resized to R x R with bicubic interpolation (a = -0.75, half-pixel centres, no anti-aliasing).
    Filling with the mean before normalising is 0 after it. `index` [P] chooses among the masks;
    without it, P = Q. bf16 under autocast, else fp32.
    """
    index = torch.arange(len(masks), device=masks.device) if index is None else index
    dtype = torch.bfloat16 if torch.is_autocast_enabled(image.device.type) else torch.float32
    if use_triton(image) and image.dtype == torch.uint8:
        mean, std = list(clip_module.MEAN), list(clip_module.STD)
        return kernel.region_crop(
            image, masks.to(torch.uint8), index, boxes, mean, std, resolution, dtype
        )
    image = normalize(image)
    crops = image.new_empty(len(index), 3, resolution, resolution)
    for crop, mask, (x0, y0, x1, y1) in zip(
        crops, masks[index] != 0, boxes[index].tolist(), strict=True
    ):
        region = image[:, y0:y1, x0:x1] * mask[y0:y1, x0:x1]
        crop[:] = F.interpolate(
            region[None], (resolution, resolution), mode="bicubic", align_corners=False
        )[0]
    return crops.to(dtype)


def shrunk(clip: CLIP, image: Tensor, edge: int) -> Tensor:
    """An image [3, H, W] in 0..255 as a pass over the whole of it wants it: normalised [1, 3, H',
    W'], the shorter edge about `edge`, both a multiple of CLIP's stride.
    """
    scale, step = edge / min(image.shape[-2:]), clip.visual.stride
    size = [max(round(scale * s / step), 1) * step for s in image.shape[-2:]]
    return F.interpolate(normalize(image)[None], size, mode="bicubic", antialias=True)


def dense_logits(clip: CLIP, image: Tensor, text: Tensor, edge: int) -> Tensor:
    """100 x cosine of every patch's feature: image [3, H, W] in 0..255, text features [C, D] ->
    fp32 [C, h', w'].
    """
    dense = clip.encode_image(shrunk(clip, image, edge), dense=True)[0]  # [h', w', D]
    return cosine_logits(dense, text).permute(2, 0, 1)


def dense_features(clip: CLIP, image: Tensor, edge: int) -> Tensor:
    """CLIP's feature of every patch, [h', w', D]: image [3, H, W] in 0..255, its shorter edge
    brought to about `edge` pixels; the last block's values where CLIP is a ViT.
    """
    picture = shrunk(clip, image, edge)
    if hasattr(clip.visual, "values"):
        return clip.visual.values(picture)[0]
    return clip.encode_image(picture, dense=True)[0]


def pool_features(features: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Mask pooling: features [h', w', D], masks [P, H, W] in 0..1 -> the mean feature under each
    mask [P, D], 0 under an empty one, fp32 or fp64, and valid [P]: the mask is not empty.

    A feature counts as far as its part of the image is in the mask.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    share = F.adaptive_avg_pool2d(masks.to(features.dtype)[None], features.shape[:2])[0]
    total = share.sum((1, 2))
    sums = share.flatten(1) @ features.flatten(0, 1)  # [P, h'w'] @ [h'w', D]
    return sums / total.where(total > 0, 1)[:, None], total > 0


def mask_pool(
    features: Tensor, logits: Tensor, size: tuple[int, int], threshold: float
) -> tuple[Tensor, Tensor]:
    """`pool_features` under the masks of the mask logits [P, h, w]: see `region_masks`."""
    if use_triton(features):
        return mask_pool_kernel(features, logits, list(size), threshold)
    return pool_features(features, mask_probabilities(logits, size) > threshold)


def classify_in_one_pass(
    clip: CLIP, image: Tensor, masks: Tensor, text: Tensor, way: str, edge: int
) -> Tensor:
    """CLIP's logits of regions from a single pass over the image: image [3, H, W] in 0..255, masks
    [P, H, W] in 0..1, text features [C, D] -> fp32 [P, C].

    The picture's shorter edge is brought to about `edge` pixels. "pool": the mean of the dense
    features under each mask. "tokens": a class token for each region
    (`VisionTransformer.region_tokens`).
    """
    if not len(masks):
        return text.new_zeros(0, len(text))
    if way == "tokens":
        features = clip.visual.region_tokens(shrunk(clip, image, edge), masks.float())
    else:
        features, _ = pool_features(dense_features(clip, image, edge), masks)
    return cosine_logits(features, text)


def crops_at_once(resolution: int, device: torch.device, chunk: int = 0) -> int:
    """Crops in a batch of CLIP's: `chunk`, or as much as 100 of 224 x 224 on a GPU, 8 on a CPU."""
    return chunk or max((100 if device.type == "cuda" else 8) * 224**2 // resolution**2, 1)


def classify_crops(
    clip: CLIP, crops: Tensor, text: Tensor, chunk: int = 0, few_sizes: bool = False
) -> Tensor:
    """CLIP's logits, 100 x cosine: crops [P, 3, R, R], text features [C, D] -> fp32 [P, C].

    `chunk` crops go through CLIP at once; 0: what suits the device. With `few_sizes`, for a
    compiled CLIP, the last chunk is filled up to a whole, a half, a quarter or an eighth of
    `chunk`. Where memory ends, chunks are halved for good.
    """
    if not len(crops):
        return text.new_zeros(0, len(text))
    chunk = crops_at_once(crops.shape[-1], crops.device, chunk)
    chunk = min(chunk, clip.most_crops or chunk)
    # The largest program need not serve more crops than there are queries.
    chunk = min(chunk, 128) if few_sizes else chunk
    features, done = [], 0
    while done < len(crops):
        part = crops[done : done + chunk]
        count = len(part)
        if few_sizes:
            size = min(s for s in (chunk, chunk // 2, chunk // 4, chunk // 8) if s >= count)
            part = F.pad(part, (0, 0, 0, 0, 0, 0, 0, size - count))
        try:
            features.append(clip.encode_image(part)[:count].float())
            done += count
        except RuntimeError as error:
            if chunk == 1 or not out_of_memory(error):
                raise
            chunk = clip.most_crops = chunk // 2
            say(f"out of memory: {chunk} crops at once from here on")
    return cosine_logits(torch.cat(features), text)
