"""Exported programs give what the segmenter gives, in a process that has no zsseg."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, tiny_clip_state, tiny_config
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim

from kernels.region_crop import region_masks
from zsseg.prepare import shapes
from zsseg.backbone import Swin
from zsseg.clip import ModifiedResNet, cosine_logits
from zsseg.config import Config
from zsseg.data import test_size as network_size
from zsseg.data import to_tensor
from zsseg.datasets import dataset
from zsseg.export import CROPS, Tower, export, write
from zsseg.regions import encode_crops, mask_boxes, region_crops
from zsseg.segmenter import Segmenter
from zsseg.utils import UserError
from zsseg.apps.vocabulary import read_words, words_of

TINY = ("model.decoder_layers=1", "data.test_short_edge=96", "data.max_size=128")
SIZES = ((97, 131), (64, 96), (1, 1), (40, 16))
# What the process does that has nothing but the exported folders: the programs on saved inputs,
# then example.py as it is.
ELSEWHERE = """
import json, os, runpy, sys, torch
os.chdir("whole")
sys.argv[1:] = ["photo.jpg"]
example = runpy.run_path("example.py", run_name="__main__")
programs = {name: example[name] for name in ("proposer", "clip")}
programs["resnet"] = torch.export.load("../resnet.pt2").module(check_guards=False)
found = {}
for name, cases in torch.load("../programs.pt").items():
    pairs = [pair for x, outputs in cases for pair in zip(programs[name](x), outputs, strict=True)]
    assert all(ours.shape == theirs.shape for ours, theirs in pairs), name
    found[name] = max(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs)
photo = example["Image"].open("photo.jpg")
for changes, labels in torch.load("../variants.pt"):
    settings = example["settings"] | changes
    clip = programs["clip"] if settings["clip"] else None
    found[str(changes)] = float((example["segment"](photo, settings, programs["proposer"], clip) != labels).float().mean())
rough = torch.export.load("../rough.pt2").module(check_guards=False)
crops = torch.load("../programs.pt")["clip"][-1][0]
found["bf16"] = [float((example["segment"](photo, settings, programs["proposer"], rough) != labels).float().mean()),
                 float((rough(crops) - programs["clip"](crops)).abs().max())]
print(json.dumps([found, sorted({"zsseg", "kernels", "torchvision"} & set(sys.modules))]))
"""


def with_visual(visual: nn.Module) -> dict[str, Tensor]:
    """The small CLIP with another image tower."""
    text = {k: v for k, v in tiny_clip_state().items() if not k.startswith("visual.")}
    return text | {f"visual.{k}": v for k, v in visual.state_dict().items()}


def build(config: Config, clip: dict[str, Tensor] | None) -> Segmenter:
    """An untrained segmenter that is decided about masks and classes: without what all queries, and
    all crops, share.
    """
    torch.manual_seed(0)
    segmenter, data = Segmenter(config, clip).eval(), dataset("shapes")
    segmenter.set_classes(data.names, data.seen)
    if clip is None:
        return segmenter
    photo = Image.fromarray(shapes.draw("test", 5)[0])
    image = to_tensor(photo.resize(network_size(150, 70, 96, 128), Image.Resampling.BILINEAR))
    queries = []
    hook = segmenter.maskformer.norm.register_forward_hook(lambda *found: queries.append(found[2]))
    segmenter.propose(image)
    hook.remove()
    with torch.no_grad():
        for head, scale in (
            (segmenter.maskformer.mask_embed, 400),
            (segmenter.maskformer.class_embed, 4),
        ):
            head[-1].bias -= head(queries[0]).mean((0, 1, 2))
            head[-1].weight *= scale
            head[-1].bias *= scale
        proposals = segmenter.propose(image)
        masks = segmenter.binary_masks(proposals)
        crops = region_crops(image, masks, mask_boxes(masks)[0], segmenter.clip.visual.resolution)
        usual = F.normalize(segmenter.clip.encode_image(crops).mean(0), dim=0)
        text, regions = torch.randn(2, *segmenter.text_features.shape)
        segmenter.text_features = F.normalize(text, dim=-1)
        segmenter.region_text_features = F.normalize(
            regions - (regions @ usual)[:, None] * usual, dim=-1
        )
    return segmenter


def of_proposer(segmenter: Segmenter) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """Inputs and what the segmenter's own way makes of them."""
    images = [torch.randint(0, 256, (3, *size)) for size in SIZES]
    found = [(image[None].float(), segmenter.propose(image)) for image in images]
    return [(x, (proposals.class_probs, proposals.mask_logits)) for x, proposals in found]


def of_clip(segmenter: Segmenter) -> list[tuple[Tensor, Tensor]]:
    """The same for CLIP."""
    R = segmenter.clip.visual.resolution
    crops = [torch.randn(count, 3, R, R) for count in (1, 5)]
    return [
        (c, cosine_logits(encode_crops(segmenter.clip, c), segmenter.region_text_features))
        for c in crops
    ]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """Exported programs, inputs with what must come of them, and a photo with its label maps."""
    root = tmp_path_factory.mktemp("exported")
    for name in ("whole", "supervised"):
        (root / name).mkdir()
    Image.fromarray(shapes.draw("test", 5)[0]).resize((150, 70)).save(root / "whole" / "photo.jpg")
    photo = Image.open(root / "whole" / "photo.jpg")
    image = to_tensor(photo.resize(network_size(150, 70, 96, 128), Image.Resampling.BILINEAR))
    settings = (
        "clip.mask_threshold=0.998",
        "clip.expand_ratio=1.3",
        "clip.region_prompt=single",
        "model.bf16=off",
    )
    config, variants = tiny_config(*TINY, *settings), []
    segmenter = build(config, tiny_clip_state())
    for changes in (
        {"clip": None},
        {"ensemble_weight": 0.0, "mask_threshold": 0.9, "expand_ratio": 1.0},
        {"ensemble_weight": 0.4, "mask_threshold": 0.999},
        {},
    ):
        segmenter.config = replace(
            config.clip, **({"ensemble": False} if "clip" in changes else changes)
        )
        variants.append((changes, segmenter(image, (70, 150))))
    torch.save(variants, root / "variants.pt")
    cases = {"proposer": of_proposer(segmenter), "clip": of_clip(segmenter)}
    write(
        Tower(segmenter, True),
        [crops for crops, _ in cases["clip"]][::-1],
        {0: Dim.DYNAMIC},
        root / "rough.pt2",
    )
    segmenter.compile_parts()  # as for many images: export is not to see it
    export(segmenter, config, words_of(dataset("shapes")), root / "whole")

    settings = ("model.class_head=linear", "data.train_on=all", "clip.ensemble=false")
    config = tiny_config(*TINY, *settings)
    (root / "supervised" / "clip.pt2").write_text("of an earlier export, written by zsseg")
    export(build(config, None), config, words_of(dataset("shapes")), root / "supervised")

    segmenter = build(tiny_config(*TINY), with_visual(ModifiedResNet([1, 1, 1, 1], 16, 64, 64)))
    cases["resnet"] = of_clip(segmenter)
    write(
        Tower(segmenter, False),
        [crops for crops, _ in cases["resnet"]][::-1],
        {0: Dim.DYNAMIC},
        root / "resnet.pt2",
    )
    torch.save(cases, root / "programs.pt")
    return root


@pytest.mark.slow
def test_programs_and_the_example_run_without_the_project(exported):
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE],
        cwd=exported,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    *lines, last = result.stdout.splitlines()
    differences, modules = json.loads(last)
    assert modules == [] and len(differences) == 3 + 4 + 1
    pixels, logits = differences.pop("bf16")
    assert pixels <= 0.02 and 1e-4 < logits < 1  # another precision, nearly the same labels
    variants = torch.load(exported / "variants.pt")
    for changes, labels in variants:
        assert differences.pop(str(changes)) == 0 and len(labels.unique()) > 1
    assert len({str(labels.tolist()) for _, labels in variants}) == 4
    assert all(difference <= 1e-5 for difference in differences.values()), differences
    labels = np.array(Image.open(exported / "whole" / "labels.png"))
    assert labels.dtype == np.uint8 and np.array_equal(labels, variants[-1][1])
    assert len(lines) == len(np.unique(labels))  # a class a line


@pytest.mark.slow
def test_files_and_settings(exported):
    data = dataset("shapes")
    for name, with_clip in (("whole", True), ("supervised", False)):
        settings = json.loads((exported / name / "settings.json").read_text())
        assert (
            settings["names"] == settings["shown_names"] == data.names
            and settings["seen"] == data.seen
        )
        assert (settings["short_edge"], settings["longest_edge"]) == (96, 128)
        assert ("ensemble_weight" in settings) == bool(settings["clip"]) == with_clip
        assert (exported / name / "clip.pt2").exists() == with_clip
    visual = sum(v.nbytes for k, v in tiny_clip_state().items() if k.startswith("visual."))
    program = torch.export.load(exported / "whole" / "clip.pt2")
    kept = sum(v.nbytes for v in {**program.state_dict, **program.constants}.values())
    assert kept < visual + 2**16  # no text tower, which is larger than that
    assert str(ROOT).encode() not in (exported / "whole" / "proposer.pt2").read_bytes()


@pytest.mark.parametrize(
    ("setting", "part"),
    [("clip.regions=pool", "clip.regions: is pool"), ("model.proposals=false", "per-pixel")],
)
def test_what_cannot_be_exported(tmp_path, setting, part):
    config = tiny_config(setting)
    segmenter = Segmenter(config, tiny_clip_state()).eval()
    words = read_words("star")
    segmenter.set_classes(words.names)
    with pytest.raises(UserError, match=part):
        export(segmenter, config, words, tmp_path)
    assert not list(tmp_path.iterdir())


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Kernel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return region_masks(x, [4, 4], 0.5)[1]


def test_a_program_that_differs_is_noticed(tmp_path):
    inputs = [torch.rand(count, 4, 4) for count in CROPS]
    with pytest.raises(RuntimeError, match="differs from the module"):
        write(Noise(), inputs, {0: Dim.DYNAMIC}, tmp_path / "noise.pt2")
    assert not list(tmp_path.iterdir())
    with pytest.raises(AssertionError, match="zsseg"):
        write(Kernel(), inputs, {0: Dim.DYNAMIC}, tmp_path / "kernel.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_swin_is_exported_for_images_of_all_sizes(tmp_path):
    """`write` compares the program with the module on all of them."""

    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Swin(32, (2, 1, 1, 1))

        def forward(self, image: Tensor) -> tuple[Tensor, ...]:
            H, W = image.shape[-2:]
            return tuple(self.backbone(F.pad(image, (0, -W % 32, 0, -H % 32))))

    torch.manual_seed(0)
    images = [torch.randn(1, 3, *size) for size in SIZES]
    write(Maps(), images, {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}, tmp_path / "swin.pt2")


def test_a_mask_prompt_is_exported(tmp_path):
    settings = ("clip.ensemble_weight=0.95", "clip.ensemble_seen=false", "model.bf16=off")
    config = tiny_config(*TINY, *settings)
    torch.manual_seed(0)
    clip = tiny_clip_state() | {"visual.mask_embedding": torch.randn(2, 9, 96)}
    segmenter = build(config, clip)
    photo = Image.fromarray(shapes.draw("test", 5)[0]).resize((150, 70))
    image = to_tensor(photo.resize(network_size(150, 70, 96, 128), Image.Resampling.BILINEAR))
    found = F.normalize(segmenter.propose(image).region_features, dim=-1)
    own = found - found.mean(0)  # what tells each region from the others
    usual = F.normalize(found.mean(0), dim=0)
    own = F.normalize(own - (own @ usual)[:, None] * usual, dim=-1)
    segmenter.region_text_features = own.repeat(25, 1)[: len(segmenter.names)]
    export(segmenter, config, words_of(dataset("shapes")), tmp_path)
    example = runpy.run_path(str(tmp_path / "example.py"))
    described = json.loads((tmp_path / "settings.json").read_text())
    programs = [
        torch.export.load(tmp_path / name).module(check_guards=False)
        for name in ("proposer.pt2", "clip.pt2")
    ]
    labels = example["segment"](photo, described, *programs)
    assert len(labels.unique()) > 1
    assert (labels == segmenter(image, (70, 150))).float().mean() >= 0.999
    segmenter.config = replace(segmenter.config, mask_prompt=False)
    assert (labels == segmenter(image, (70, 150))).float().mean() < 0.99
