"""What research changes, in a few lines each."""

import json
import re
import sys
import types

import numpy as np
import own_data
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, logged, overrides, tiny_clip_state, tiny_config, tiny_segmenter
from torch import nn

from zsseg import backbone, losses, metrics, regions
from zsseg.clip import build_clip
from zsseg.log import scalars
from zsseg.prompts import build_prompt
from zsseg.segmenter import Segmenter
from zsseg.tokenizer import Tokenizer
from zsseg.weights import assemble

NAMES = ["star", "tree", "brick"]
IMAGE = torch.randint(0, 256, (3, 50, 70), generator=torch.Generator().manual_seed(3)).byte()
GRID = """
import torch
import torch.nn.functional as F

def propose(image):
    h, w = (-(-side // 32) * 8 for side in image.shape[-2:])
    cells = torch.arange(h)[:, None] // 8 * (w // 8) + torch.arange(w) // 8
    return 40 * F.one_hot(cells).permute(2, 0, 1).float() - 20, None
"""


def proposed_by(proposer, names=NAMES, seen=(0, 1)) -> Segmenter:
    config = tiny_config().clip
    clip = tiny_segmenter().clip
    prompt = build_prompt(config.prompt, clip.width)
    segmenter = Segmenter(None, clip, prompt, config, proposer=proposer).eval()
    segmenter.set_classes(list(names), seen)
    return segmenter


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """The module `grids`: a proposer of squares of 32 x 32 without class features."""
    (tmp_path / "grids.py").write_text(GRID)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "grids", raising=False)
    import grids

    return grids.propose


def test_another_clip_is_another_object():
    """Its pixels, temperature and words reach whatever they should, and nothing else needs to
    know.
    """

    class Backwards(Tokenizer):
        def encode(self, text):
            return super().encode(text)[::-1]

    half = (0.5,) * 3
    other = build_clip(tiny_clip_state(), Backwards(514, 40), mean=half, std=half, scale=10.0)
    found = []
    for clip in (tiny_segmenter().clip, other):
        parts = (tiny_segmenter().maskformer, clip, tiny_segmenter().prompt, tiny_config().clip)
        segmenter = Segmenter(*parts).eval()
        segmenter.set_classes(NAMES)
        found.append((segmenter, segmenter.propose(IMAGE)))
    (ours, first), (segmenter, second) = found
    grey = torch.full((3, 8, 8), 127.5)
    crop = regions.region_crops(other, grey, torch.ones(1, 8, 8), torch.tensor([[0, 0, 8, 8]]))
    assert crop.abs().max() < 1e-6 and torch.equal(first.mask_logits, second.mask_logits)
    assert not torch.allclose(ours.text_features, segmenter.text_features, atol=1e-3)
    logits = segmenter.region_text_features @ F.normalize(second.region_features, dim=-1).T
    assert torch.allclose(second.clip_probs[second.valid], (10 * logits.T).softmax(-1), atol=1e-5)


def test_a_proposer_without_class_features(grid):
    """At the default ensemble weight CLIP alone names the masks: which classes are seen changes
    nothing.
    """
    segmenter = proposed_by(grid)
    assert segmenter.config.ensemble and 0 < segmenter.config.ensemble_weight < 1
    proposals = segmenter.propose(IMAGE)
    labels = segmenter.segment([IMAGE], (50, 70), weights=[0.3]).labels
    for q in range(6):
        y, x = q // 3 * 32, q % 3 * 32
        cell = labels[y + 4 : min(y + 28, 50), x + 4 : min(x + 28, 70)]
        assert cell.numel() == 0 or (cell == proposals.clip_probs[q].argmax()).all()
    for seen in ([], [2], [0, 1, 2]):
        segmenter.set_classes(NAMES, seen)
        assert torch.equal(segmenter.segment([IMAGE], (50, 70)).labels, labels)


@pytest.mark.usefixtures("grid")
def test_a_proposer_by_name_in_every_command(root):
    words = ["-", root, "--set", "model.proposer=grids:propose", "--out"]
    own_data.measure(*words, root / "measured")
    assert json.loads((root / "measured" / "metrics.json").read_text())["images"] == 2
    photo = root / "a" / "images" / "val" / "0.png"
    own_data.measure(*words, root / "photos", "--images", photo, "--classes", "cat, dog")
    assert (root / "photos" / "0.png").exists()


def test_the_sam_proposer_of_the_readme(monkeypatch):
    """The README's text, with a stand-in of the interface of segment_anything's (and sam2's)
    automatic mask generator.
    """

    class Generator:
        def __init__(self, model):
            assert isinstance(model, nn.Module)

        def generate(self, image):
            assert image.shape == (50, 70, 3) and image.dtype == np.uint8
            left = np.zeros(image.shape[:2], bool)
            left[:, :35] = True
            return [{"segmentation": mask, "area": mask.sum()} for mask in (left, ~left)]

    registry = dict.fromkeys(["vit_h", "vit_l", "vit_b"], lambda checkpoint: nn.Identity())
    content = {"SamAutomaticMaskGenerator": Generator, "sam_model_registry": registry}
    stand_in = types.SimpleNamespace(**content)
    monkeypatch.setitem(sys.modules, "segment_anything", stand_in)
    readme = (ROOT / "README.md").read_text()
    block = {}
    exec(re.search(r"```python\n(# sam_masks.*?)```", readme, re.DOTALL)[1], block)
    segmenter = proposed_by(block["propose"])
    masks = segmenter.binary_masks(segmenter.propose(IMAGE))
    assert masks[-2, :46, :32].all() and masks[-1, :46, 38:66].all()
    assert not (masks[-2] & masks[-1]).any()
    assert len(segmenter.segment([IMAGE], (50, 70)).labels.unique()) <= 2


def test_another_region_classifier(monkeypatch):
    """The mean colour of a region, as CLIP's image feature of a plain image of that colour. It gets
    masks, boxes and the numbers of those that are not empty.
    """
    given = []

    def mean_colour(clip, image, regions_, config):
        given.append(regions_)
        colours = [image[:, mask.bool()].float().mean(1) for mask in regions_.masks[regions_.index]]
        images = torch.stack(colours)[:, :, None, None].expand(-1, -1, *[clip.resolution] * 2)
        return regions.encode_crops(clip, clip.normalize(images), config.crop_batch_size)

    monkeypatch.setitem(regions.CLASSIFIERS, "mean", mean_colour)
    segmenter = tiny_segmenter()
    segmenter.config.regions = "mean"
    masks = torch.zeros(2, 50, 70, dtype=torch.bool)
    masks[0, :20], masks[1, 30:] = True, True
    plain = torch.full((3, 50, 70), 128, dtype=torch.uint8)
    logits = segmenter.region_logits(plain, masks, regions.box_of(masks))
    assert logits.shape == (2, 3) and torch.allclose(logits[0], logits[1], atol=1e-3)
    masks = torch.tensor([9.0, -9])[:, None, None].expand(2, 16, 24)
    segmenter.proposer = lambda image: (masks, None)
    assert segmenter.segment([IMAGE], (50, 70)).labels.shape == (50, 70)
    assert given[1].masks.shape == (2, 50, 70) and given[1].index.tolist() == [0]
    assert given[1].boxes[0].tolist() == [0, 0, 70, 50]


def test_another_backbone(monkeypatch):
    class Patches(nn.Module):
        """Four maps, each by one convolution over patches."""

        channels = (8, 16, 24, 32)

        def __init__(self):
            super().__init__()
            pairs = zip(self.channels, (4, 8, 16, 32), strict=True)
            self.stages = nn.ModuleList(nn.Conv2d(3, c, s, s) for c, s in pairs)

        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            return [stage(images) for stage in self.stages]

    monkeypatch.setitem(backbone.BACKBONES, "patches", lambda config: Patches())
    config = tiny_config()
    config.model.backbone = "patches"
    segmenter = assemble(config, tiny_segmenter().clip).eval()
    segmenter.set_classes(NAMES, [0, 1])
    assert segmenter.segment([IMAGE], (50, 70)).labels.shape == (50, 70)
    model = segmenter.maskformer.train()
    model(model.prepare(IMAGE[None]), segmenter.text_features)[0].sum().backward()
    assert model.backbone.stages[3].weight.grad.abs().sum() > 0


def test_another_loss(root, monkeypatch):
    """One entry that reads `config.train`: it is minimised and logged by its name."""

    def area(class_logits, mask_logits, matched, targets, normalizers, train):
        return {"area": train.dice_weight * mask_logits.sigmoid().mean((1, 2, 3, 4))}

    monkeypatch.setitem(losses.LOSSES, "area", area)
    own_data.train(root, *overrides("train.steps=1", "train.focal_weight=0", "log.every=1"))
    line = logged(root / "r")[0]
    assert 0 < line["area"] < 1 and line["focal"] == 0
    assert line["loss"] == pytest.approx(line["class"] + line["dice"] + line["area"], rel=1e-4)


def test_another_metric(root, trained, monkeypatch):
    """One entry that JSON, table, page and wandb show."""
    worst = lambda counts: float(counts.iou[counts.gt > 0].min())
    monkeypatch.setitem(metrics.METRICS, "worst", worst)
    done = own_data.measure(trained, root, "--out", root / "e", "--report")
    result = json.loads((root / "e" / "metrics.json").read_text())
    assert result["worst"] == min(values["IoU"] for values in result["per_class"].values())
    assert "worst" in done.stdout.split("ensemble")[0]
    assert '"worst"' in (root / "e" / "report.html").read_text()
    assert scalars({"val": result})["val/worst"] == result["worst"]
