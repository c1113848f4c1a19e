"""Region classification (Xu et al. 2021): binary masks -> masked crops -> CLIP class logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import region_crop as kernel
from kernels.jit import use_triton
from kernels.mask_pool import mask_pool as mask_pool_kernel
from zsseg.clip import CLIP, MEAN, STD, cosine_logits
from zsseg.config import ClipConfig
from zsseg.utils import out_of_memory, print_main

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


def normalize(images: Tensor) -> Tensor:
    """RGB in 0..255 [..., 3, H, W] as CLIP takes it, fp32."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
    return (images / 255 - mean) / std


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
        masks = masks.to(torch.uint8)
        return kernel.region_crop(
            image, masks, index, boxes, list(MEAN), list(STD), resolution, dtype
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


def resize_masks(masks: Tensor, boxes: Tensor, resolution: int, index: Tensor) -> Tensor:
    """Masks [Q, H, W] cut to boxes [Q, 4] and resized to R x R, the nearest pixel as
    `F.interpolate` finds it: bool [P, R, R] of those that `index` [P] chooses.
    """
    first, end = boxes[index, :, None].unflatten(1, (2, 2)).unbind(1)  # [P, 2, 1]: of x and of y
    # In fp32, as there: for a side of 62 and others, exact arithmetic gives another pixel.
    step = (end - first).float() / resolution
    place = (step * torch.arange(resolution, device=masks.device)).long()  # [P, 2, R]
    x, y = (first + place.minimum(end - first - 1)).unbind(1)
    return masks[index[:, None, None], y[:, :, None], x[:, None]] != 0


def token_masks(regions: Tensor, patch: int) -> Tensor:
    """Masks bool [P, R, R] -> bool [P, R/p * R/p]: the patches of p x p with a pixel of the mask
    (Liang et al. 2023, section 3.3).
    """
    side = regions.shape[-1] // patch
    return regions.view(-1, side, patch, side, patch).any(4).any(2).flatten(1)


def resize_for_clip(clip: CLIP, image: Tensor, edge: int) -> Tensor:
    """An image [3, H, W] in 0..255 for a pass over the whole of it: normalised [1, 3, H',
    W'], the shorter edge about `edge`, both a multiple of CLIP's stride.
    """
    scale, step = edge / min(image.shape[-2:]), clip.visual.stride
    size = [max(round(scale * s / step), 1) * step for s in image.shape[-2:]]
    return F.interpolate(normalize(image)[None], size, mode="bicubic", antialias=True)


def dense_logits(clip: CLIP, image: Tensor, text: Tensor, edge: int) -> Tensor:
    """100 x cosine of every patch's feature: image [3, H, W] in 0..255, text features [C, D] ->
    fp32 [C, h', w'].
    """
    dense = clip.encode_image(resize_for_clip(clip, image, edge), dense=True)[0]  # [h', w', D]
    return cosine_logits(dense, text).permute(2, 0, 1)


def dense_features(clip: CLIP, image: Tensor, edge: int) -> Tensor:
    """CLIP's feature of every patch, [h', w', D]: image [3, H, W] in 0..255, its shorter edge
    brought to about `edge` pixels; the last block's values where CLIP is a ViT.
    """
    image = resize_for_clip(clip, image, edge)
    if hasattr(clip.visual, "values"):
        return clip.visual.values(image)[0]
    return clip.encode_image(image, dense=True)[0]


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


def uses_mask_prompt(clip: CLIP, config: ClipConfig) -> bool:
    """Whether region crops go through CLIP with their masks."""
    return config.mask_prompt and clip.visual.mask_embedding is not None


def crop_features(
    clip: CLIP, image: Tensor, masks: Tensor, boxes: Tensor, index: Tensor, config: ClipConfig
) -> Tensor:
    """The paper's: CLIP's feature of the masked crop of each region; of a CLIP with a mask prompt,
    what that puts in the place of empty patches, too (`clip.mask_prompt`).
    """
    crops = region_crops(image, masks, boxes, clip.visual.resolution, index)
    token_mask = None
    if uses_mask_prompt(clip, config):
        regions = resize_masks(masks, boxes, clip.visual.resolution, index)
        token_mask = token_masks(regions, clip.visual.stride)
    return encode_crops(clip, crops, config.chunk, token_mask)


def pooled_features(
    clip: CLIP, image: Tensor, masks: Tensor, boxes: Tensor, index: Tensor, config: ClipConfig
) -> Tensor:
    """The mean of CLIP's dense features under each mask, from a single pass over the image."""
    return pool_features(dense_features(clip, image, config.dense_edge), masks[index])[0]


def token_features(
    clip: CLIP, image: Tensor, masks: Tensor, boxes: Tensor, index: Tensor, config: ClipConfig
) -> Tensor:
    """A class token for each region (`VisionTransformer.region_tokens`), from a single pass over
    the image, its shorter edge about `clip.dense_edge` pixels.
    """
    image = resize_for_clip(clip, image, config.dense_edge)
    return clip.visual.region_tokens(image, masks[index].float())


# `clip.regions`: (clip, image [3, H, W] in 0..255, masks [Q, H, W], boxes [Q, 4], index [P] of the
# regions among them, config) -> CLIP features [P, D] of any length.
CLASSIFIERS = {"crops": crop_features, "pool": pooled_features, "tokens": token_features}


def batch_size(clip: CLIP, device: torch.device, chunk: int = 0) -> int:
    """Crops that go through CLIP at once: `chunk`, or as much as 100 of 224 x 224 on a GPU, 8 on a
    CPU; never more than memory was found to have room for.
    """
    pixels = (100 if device.type == "cuda" else 8) * 224**2
    size = chunk or max(pixels // clip.visual.resolution**2, 1)
    size = min(size, clip.max_batch or size)
    # The largest compiled program need not serve more crops than there are queries.
    return min(size, 128) if clip.bucketed else size


def encode_crops(
    clip: CLIP, crops: Tensor, chunk: int = 0, token_mask: Tensor | None = None
) -> Tensor:
    """CLIP's features of crops [P, 3, R, R], fp32 [P, D], `chunk` crops at once (see `batch_size`);
    with a mask prompt where `token_mask` [P, T] is given.

    With `clip.bucketed`, for a compiled CLIP, the last batch is filled up to a whole, a half, a
    quarter or an eighth of the others. Out of memory, the batch size is halved permanently.
    """
    if not len(crops):
        return crops.new_zeros(0, clip.embed_dim, dtype=torch.float32)
    size = batch_size(clip, crops.device, chunk)
    features = []
    done = 0
    while done < len(crops):
        batch = crops[done : done + size]
        shown = None if token_mask is None else token_mask[done : done + size]
        count = len(batch)
        if clip.bucketed:
            filled = min(s for s in (size, size // 2, size // 4, size // 8) if s >= count)
            batch = F.pad(batch, (0, 0, 0, 0, 0, 0, 0, filled - count))
            shown = None if shown is None else F.pad(shown, (0, 0, 0, filled - count))
        try:
            features.append(clip.encode_image(batch, token_mask=shown)[:count].float())
            done += count
        except RuntimeError as error:
            if size == 1 or not out_of_memory(error):
                raise
            size //= 2
            clip.max_batch = size
            print_main(f"out of memory: {size} crops at once from here on")
    return torch.cat(features)
