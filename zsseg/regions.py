"""Region classification (Xu et al. 2021, section 3.3): masks -> masked crops -> CLIP features."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import masks_to_boxes

from kernels import region_crop as kernel
from kernels.jit import use_triton
from kernels.mask_pool import mask_pool

STRIDE = 4  # from mask logits to the padded network input


def mask_probabilities(logits, size):
    """Mask logits [Q, h, w] at stride 4 -> probabilities at network-input size, before padding: [Q,
    *size], fp32 or fp64.
    """
    H, W = size
    logits = logits[None].to(torch.promote_types(logits.dtype, torch.float32))
    return F.interpolate(logits, scale_factor=STRIDE, mode="bilinear")[0, :, :H, :W].sigmoid()


def box_of(masks):
    """Tight boxes of binary masks [P, H, W] -> int64 [P, 4]: x0, y0, x1, y1, ends excluded. Those
    of empty masks mean nothing.
    """
    boxes = masks_to_boxes(masks).long()
    boxes[:, 2:] += 1
    return boxes


def region_masks(logits, size, threshold):
    """Mask logits [Q, h, w] -> where the probability is above the threshold, bool or uint8 [Q,
    *size]; boxes [Q, 4] as of `box_of`; valid bool [Q]: the mask has a pixel.
    """
    if use_triton(logits):
        return kernel.region_masks(logits, size, threshold)
    masks = mask_probabilities(logits, size) > threshold
    return masks, box_of(masks), masks.flatten(1).any(1)


class Regions(NamedTuple):
    """The masks of an image, and those of them that CLIP is to name, none of which is empty."""

    masks: Tensor  # 0 or 1, [Q, H, W]
    boxes: Tensor  # int64 [Q, 4], see `box_of`
    index: Tensor  # int64 [P], their numbers


def region_crops(clip, image, masks, boxes, index=None):
    """Masked crops: image [3, H, W] in 0..255, masks [Q, H, W], boxes [Q, 4] -> [P, 3, R, R] of
    those in `index` [P] (None: all).

    The image inside the mask and CLIP's mean colour outside, normalised, cropped to the box,
    resized to R x R with bicubic interpolation (a = -0.75, half-pixel centres, no anti-aliasing).
    Filling with the mean before normalising is 0 after it. bf16 under autocast, else fp32.
    """
    R = clip.resolution
    dtype = torch.bfloat16 if torch.is_autocast_enabled(image.device.type) else torch.float32
    if index is None:
        index = torch.arange(len(masks), device=masks.device)
    if use_triton(image) and image.dtype == torch.uint8:
        return kernel.region_crop(image, masks.byte(), boxes, index, *clip.pixel_stats, R, dtype)
    image = clip.normalize(image)
    crops = []
    for i, (x0, y0, x1, y1) in zip(index.tolist(), boxes[index].tolist(), strict=True):
        region = image[None, :, y0:y1, x0:x1] * (masks[i, y0:y1, x0:x1] != 0)
        crops.append(F.interpolate(region, (R, R), mode="bicubic"))
    return torch.cat(crops).to(dtype)


def patch_masks(masks, boxes, resolution, patch):
    """Masks [P, H, W] cut to boxes [P, 4] and resized to R x R -> bool [P, R/p * R/p]: the patches
    of p x p with a pixel of the mask (Liang et al. 2023, section 3.3).
    """
    first = boxes[:, :2, None]
    length = boxes[:, 2:, None] - first  # [P, 2, 1]: of x and of y
    # The nearest pixel in fp32, like F.interpolate; exact arithmetic differs, e.g. for 62 pixels.
    source = length.float() / resolution * torch.arange(resolution, device=masks.device)
    x, y = (first + source.long().minimum(length - 1)).unbind(1)  # [P, R]
    index = torch.arange(len(masks), device=masks.device)
    cut = masks[index[:, None, None], y[:, :, None], x[:, None]]  # [P, R, R]
    return F.max_pool2d(cut.float(), patch).flatten(1) > 0


def encode_crops(clip, crops, batch_size, shown=None):
    """CLIP's features of crops [P, 3, R, R], `batch_size` at once: fp32 [P, D]; `shown` bool [P, T]
    are the patches with the region, for a CLIP with a mask prompt.

    The last batch is filled up to a quarter, a half, three quarters or a whole of the others, with
    its last crop: a compiled tower sees few sizes.
    """
    if crops.device.type == "cpu":
        # 8 of 224 x 224: more fall out of its caches.
        batch_size = min(batch_size, -(-8 * 224**2 // crops[0, 0].numel()))
    count = len(crops)
    missing = -count % max(batch_size // 4, 1)
    order = torch.arange(count + missing, device=crops.device).clamp(max=count - 1)
    features = []
    for part in order.split(batch_size):
        patches = None if shown is None else shown[part]
        features.append(clip.encode_image(crops[part], patches).float())
    return torch.cat(features)[:count]


def crop_features(clip, image, regions, config):
    """The paper's: CLIP on the masked crop of each region, with the mask prompt of a CLIP that has
    one.
    """
    masks, boxes, index = regions
    crops = region_crops(clip, image, masks, boxes, index)
    shown = None
    if config.mask_prompt and clip.has_mask_prompt:
        shown = patch_masks(masks[index], boxes[index], clip.resolution, clip.patch)
    return encode_crops(clip, crops, config.crop_batch_size, shown)


def pool_features(features, masks):
    """Mask pooling: features [h', w', D], masks [P, H, W] in 0..1 -> the mean feature under each
    mask [P, D], 0 for an empty one, fp32 or fp64.

    A feature counts as far as its part of the image is in the mask.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    share = F.adaptive_avg_pool2d(masks.to(features.dtype)[None], features.shape[:2])[0].flatten(1)
    total = share.sum(1, keepdim=True)
    return share @ features.flatten(0, 1) / total.where(total > 0, 1)


def pooled_features(clip, image, regions, config):
    """The mean of CLIP's dense features under each mask, from a single pass over the image: its
    shorter edge brought to about `dense_edge` pixels, both edges to multiples of CLIP's patch.
    """
    size = image.shape[-2:]
    scale = config.dense_edge / min(size) / clip.patch
    edges = [max(round(scale * s), 1) * clip.patch for s in size]
    resized = F.interpolate(clip.normalize(image)[None], edges, mode="bicubic", antialias=True)
    dense = clip.encode_dense(resized)[0]  # [h', w', D]
    pool = mask_pool if use_triton(dense) else pool_features
    return pool(dense, regions.masks.byte())[regions.index]


# `clip.regions`: (clip, image [3, H, W] in 0..255, regions, section clip) -> CLIP features [P, D]
# in fp32, of any length.
CLASSIFIERS = {"crops": crop_features, "pool": pooled_features}
