"""What research changes, in a few lines: a backbone, a proposer, a region classifier."""

import torch
import torch.nn.functional as F
from conftest import tiny_clip_state, tiny_config
from torch import nn

from zsseg import backbone, regions
from zsseg.segmenter import Segmenter

NAMES = ["star", "tree", "brick"]
IMAGE = torch.randint(0, 256, (3, 50, 70), generator=torch.Generator().manual_seed(3)).byte()


def test_another_backbone(monkeypatch):
    class Patches(nn.Module):
        """Four maps, each by one convolution over patches."""

        channels = (8, 16, 24, 32)

        def __init__(self):
            super().__init__()
            strides = (4, 8, 16, 32)
            self.stages = nn.ModuleList(
                nn.Conv2d(3, c, s, s) for c, s in zip(self.channels, strides, strict=True)
            )

        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            return [stage(images) for stage in self.stages]

    monkeypatch.setitem(backbone.BACKBONES, "patches", lambda config: Patches())
    config = tiny_config()
    config.model.backbone = "patches"
    segmenter = Segmenter(config, tiny_clip_state()).eval()
    segmenter.set_classes(NAMES, [0, 1])
    assert segmenter(IMAGE, (50, 70)).shape == (50, 70)
    segmenter.train().maskformer(
        segmenter.maskformer.prepare(IMAGE[None]), segmenter.text_features
    )[0].sum().backward()
    assert segmenter.maskformer.backbone.stages[3].weight.grad.abs().sum() > 0


def test_a_proposer_that_is_not_maskformer():
    """A grid of squares without class features: CLIP names every cell."""

    def grid(image: torch.Tensor) -> tuple:
        h, w = (-(-side // 32) * 8 for side in image.shape[-2:])
        cells = torch.arange(h)[:, None] // 8 * (w // 8) + torch.arange(w) // 8
        masks = F.one_hot(cells).permute(2, 0, 1).float()  # [Q, h, w]
        return 40 * masks - 20, None

    settings = tiny_config("clip.ensemble_weight=0")
    segmenter = Segmenter(settings, tiny_clip_state(), proposer=grid).eval()
    segmenter.set_classes(NAMES)
    proposals = segmenter.propose(IMAGE)
    labels = segmenter(IMAGE, (50, 70))

    assert segmenter.maskformer is None and proposals.valid.all()
    for q in range(6):
        y, x = q // 3 * 32, q % 3 * 32
        cell = labels[y + 4 : min(y + 28, 50), x + 4 : min(x + 28, 70)]
        assert cell.numel() == 0 or (cell == proposals.clip_probs[q].argmax()).all()


def test_another_region_classifier(monkeypatch):
    """The mean colour of a region, as CLIP's image feature of a plain image of that colour."""

    def mean_colour(clip, image, masks, boxes, index, config):
        means = [image[:, mask.bool()].float().mean(1) for mask in masks[index]]
        side = clip.visual.resolution
        images = torch.stack(means)[:, :, None, None].expand(-1, -1, side, side)
        return regions.encode_crops(clip, regions.normalize(images), config.chunk)

    monkeypatch.setitem(regions.CLASSIFIERS, "mean", mean_colour)
    config = tiny_config()
    config.clip.regions = "mean"
    segmenter = Segmenter(config, tiny_clip_state()).eval()
    segmenter.set_classes(NAMES, [0, 1])
    plain = torch.full((3, 50, 70), 128, dtype=torch.uint8)
    masks = torch.zeros(2, 50, 70, dtype=torch.uint8)
    masks[0, :20], masks[1, 30:] = 1, 1
    logits = segmenter.region_logits(plain, masks, None)
    assert logits.shape == (2, 3) and torch.allclose(logits[0], logits[1], atol=1e-3)
    assert segmenter(IMAGE, (50, 70)).shape == (50, 70)
