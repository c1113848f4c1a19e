"""Boxes, crops and pooled features against loops over pixels, and at the edges."""

import pytest
import torch
import torch.nn.functional as F

from zsseg.config import ClipConfig
from zsseg.regions import CLASSIFIERS, Regions, box_of, encode_crops, region_masks


@pytest.mark.parametrize("size", [(1, 1), (7, 13), (64, 48)])
def test_boxes_are_tight(size):
    torch.manual_seed(0)
    H, W = size
    logits = torch.randn(20, -(-H // 32) * 8, -(-W // 32) * 8) * 3 - 4
    logits[0], logits[1] = 9, -9
    masks, boxes, valid = region_masks(logits, size, 0.5)
    assert masks.shape == (20, H, W) and valid.tolist() == [bool(m.any()) for m in masks]
    assert valid[0] and not valid[1]
    for mask, box in zip(masks[valid], boxes[valid], strict=True):
        ys, xs = torch.nonzero(mask, as_tuple=True)
        ends = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert torch.equal(box, ends)
    assert box_of(masks[:0]).shape == (0, 4)


def test_batches_do_not_change_the_features(small_clip, monkeypatch):
    """And a tower sees few sizes."""
    torch.manual_seed(0)
    crops, sizes = torch.randn(13, 3, 48, 48), set()
    whole = small_clip.encode_image(crops)
    small_clip.visual.register_forward_hook(lambda m, x, y: sizes.add(len(x[0])))
    for batch_size in (1, 3, 8, 64):
        assert torch.allclose(encode_crops(small_clip, crops, batch_size), whole, atol=1e-4)
    for count in range(1, 14):
        encode_crops(small_clip, crops[:count], 8)
    assert sizes == {1, 2, 3, 4, 6, 8, 16}


def test_pooled_features_are_the_mean_of_the_patches_under_the_mask(small_clip):
    torch.manual_seed(0)
    config = ClipConfig(dense_edge=128)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    masks = torch.zeros(3, 64, 64, dtype=torch.bool)
    masks[0], masks[1, :32], masks[2, 5, 9] = True, True, True
    features = CLASSIFIERS["pool"](small_clip, image, Regions(masks, None, torch.arange(3)), config)
    big = F.interpolate(
        small_clip.normalize(image)[None], (128, 128), mode="bicubic", antialias=True
    )
    dense = small_clip.encode_dense(big)[0]  # a patch is 8 pixels of the image
    for i, patches in enumerate((dense, dense[:4], dense[0, 1:2])):
        assert torch.allclose(features[i], patches.flatten(0, -2).mean(0), atol=1e-4)
