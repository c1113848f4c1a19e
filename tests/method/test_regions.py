"""Boxes and crops against loops over pixels, and at the edges."""

import pytest
import torch
import torch.nn.functional as F

from zsseg import clip as C
from zsseg.clip import cosine_logits
from zsseg.regions import encode_crops, mask_boxes, region_crops


def literal_box(mask: torch.Tensor) -> list[int]:
    ys, xs = torch.nonzero(mask, as_tuple=True)
    return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]


@pytest.mark.parametrize("size", [(1, 1), (7, 13), (64, 48)])
def test_boxes_are_tight(size):
    torch.manual_seed(0)
    masks = torch.rand(20, *size) > 0.97
    masks[0] = True
    masks[1] = False
    masks[2] = False
    masks[2, -1, -1] = True  # a single pixel in the corner
    boxes, valid = mask_boxes(masks)
    assert valid.tolist() == [bool(m.any()) for m in masks]
    for mask, box in zip(masks[valid], boxes[valid], strict=True):
        assert box.tolist() == literal_box(mask)
    assert not valid[1] and boxes[1].tolist() == [0, 0, size[1], size[0]]


def test_expanded_boxes_keep_their_centre_and_stay_inside():
    masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    masks[0, 10:20, 20:40] = True
    masks[1, 0:4, 56:60] = True
    boxes, _ = mask_boxes(masks, 1.5)
    assert boxes.tolist() == [[15, 7, 45, 22], [55, 0, 60, 5]]
    resize_for_clip, _ = mask_boxes(masks, 0.01)
    assert ((resize_for_clip[:, 2:] - resize_for_clip[:, :2]) >= 1).all()


@pytest.mark.parametrize("box", [(0, 0, 30, 20), (3, 5, 4, 6), (10, 2, 29, 19)])
def test_crop_is_fill_normalise_resize(box):
    """The paper's order of steps: fill outside with the mean colour, cut, normalise, resize."""
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    mask = torch.rand(20, 30) > 0.5
    x0, y0, x1, y1 = box
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (C.MEAN, C.STD))
    filled = torch.where(mask, image / 255, mean)[:, y0:y1, x0:x1]
    wanted = F.interpolate(
        ((filled - mean) / std)[None], (32, 32), mode="bicubic", align_corners=False
    )
    crop = region_crops(image, mask[None], torch.tensor([box]), 32)
    assert torch.allclose(crop, wanted, atol=1e-5)


def test_outside_the_mask_is_zero_after_normalising():
    image = torch.full((3, 16, 16), 200, dtype=torch.uint8)
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    crop = region_crops(image, mask, torch.tensor([[0, 0, 16, 16]]), 8)
    assert (crop == 0).all()


def test_no_regions(small_clip):
    image, masks = torch.zeros(3, 8, 8), torch.zeros(0, 8, 8, dtype=torch.bool)
    crops = region_crops(image, masks, torch.zeros(0, 4, dtype=torch.int64), 32)
    assert encode_crops(small_clip, crops, 10).shape == (0, 64)


def test_chunks_do_not_change_the_logits(small_clip):
    torch.manual_seed(0)
    crops, text = torch.randn(7, 3, 32, 32), F.normalize(torch.randn(5, 64), dim=-1)
    whole = cosine_logits(encode_crops(small_clip, crops), text)
    assert torch.allclose(whole, cosine_logits(encode_crops(small_clip, crops, 3), text), atol=1e-3)
    assert whole.abs().max() <= 100.01
