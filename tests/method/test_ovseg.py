"""OVSeg (Liang et al. 2023): the reference values of its own code in golden/ovseg/, and what they do
not reach.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, golden, keys, original_state, tiny_clip_state, tiny_config
from recipe import check_proposals, random_image
from recipe import relative_error as error

from zsseg.backbone import BACKBONES
from zsseg.clip import build_clip
from zsseg.config import ClipConfig, Config, load_config
from zsseg.maskformer import MaskFormer
from zsseg.regions import Regions, box_of, crop_features, patch_masks, region_crops
from zsseg.segmenter import Segmenter
from zsseg.tokenizer import Tokenizer
from zsseg.weights import import_original, load_segmenter, load_tokenizer

MOST = 1e-4  # of the largest value of an array
Arrays = dict[str, np.ndarray]


def state_of(name: str, arrays=()) -> dict[str, torch.Tensor]:
    """Stand-in weights; as `relative_position_index` nonsense, which nothing may read."""
    return original_state(keys(f"ovseg/{name}"), arrays)


@pytest.fixture(scope="module")
def ovseg(vocabulary) -> tuple[Arrays, Segmenter, torch.Tensor]:
    """The reference values of an image through the whole model, that model, and the image."""
    arrays = golden("ovseg/ovseg_eval.npz")
    config = Config()
    config.model.backbone = "SwinB"
    config.clip.ensemble_weight = 0.7
    config.clip.mask_threshold = float(arrays["mask_threshold"])
    config.clip.prompt = "vild"
    content = {"model": state_of("keys_ovseg_tinyclip.json", arrays)}
    segmenter = load_segmenter(content, config, Path(), "reference").eval()
    segmenter.set_classes([str(name) for name in arrays["class_names"]])
    return arrays, segmenter, random_image(arrays["image_size"], arrays["image_seed"])


@pytest.mark.parametrize("case", ["odd", "wide"])
@torch.no_grad()
def test_swin(ovseg, case):
    arrays = golden("ovseg/ovseg_swin.npz")
    model = ovseg[1].maskformer
    image = random_image(arrays[f"{case}/image_size"], arrays["image_seed"])
    maps = model.backbone(((image - model.pixel_mean) / model.pixel_std)[None])
    for i, ours in enumerate(maps):
        name = f"{case}/res{i + 2}"
        channels, cells = (1, 2, 4, 4)[i], (8, 4, 2, 1)[i]
        assert ours.shape[1:] == tuple(arrays[f"{name}_shape"])
        assert error(ours[0, ::channels, ::cells, ::cells], arrays[name]) < MOST
        assert error(ours[0].mean((1, 2)), arrays[f"{name}_mean"]) < MOST
        assert error(ours[0].std((1, 2), unbiased=False), arrays[f"{name}_std"]) < MOST


@pytest.mark.slow
@pytest.mark.usefixtures("vocabulary")
@torch.no_grad()
def test_clip_of_full_size():
    arrays = golden("ovseg/ovseg_clip.npz")
    tokenizer = load_tokenizer(49408, 77)
    clip = build_clip(state_of("ovseg_clip_vitl14_keys.json"), tokenizer)
    crops = torch.stack([random_image((224, 224), seed) for seed in arrays["image_seeds"]])
    crops = clip.normalize(crops)
    masks = torch.zeros(3, 224, 224, dtype=torch.uint8)
    for i, (y0, x0, y1, x1) in enumerate(arrays["mask_boxes"]):
        masks[i, y0:y1, x0:x1] = 1
    masks[tuple(arrays["mask_pixel"])] = 1
    whole = torch.tensor([[0, 0, 224, 224]]).expand(3, 4)
    shown = patch_masks(masks, whole, 224, clip.patch)
    assert np.array_equal(shown.view(3, 16, 16).numpy(), arrays["token_mask"])
    assert error(clip.encode_image(crops, shown), arrays["image_features_prompt"]) < MOST
    assert error(clip.encode_image(crops), arrays["image_features_plain"]) < MOST
    tokens = tokenizer([str(text) for text in arrays["texts"]])
    assert error(clip.encode_text(tokens), arrays["text_features"]) < MOST


def stored_regions(arrays: Arrays) -> tuple[torch.Tensor, torch.Tensor]:
    """The original's masks that are not empty [P, H, W], and their boxes."""
    masks = np.unpackbits(arrays["masks_packed"], axis=-1, count=int(arrays["image_size"][1]))
    masks = torch.from_numpy(masks)
    assert np.array_equal(masks.flatten(1).any(1).numpy(), arrays["valid"])
    masks = masks[torch.from_numpy(arrays["valid"])]
    return masks, box_of(masks)


def test_proposals(ovseg):
    arrays, segmenter, image = ovseg
    check_proposals(segmenter, image, arrays)


def test_regions(ovseg):
    """What CLIP is given, from the stored masks."""
    arrays, segmenter, image = ovseg
    masks, boxes = stored_regions(arrays)
    crops = region_crops(segmenter.clip, image, masks, boxes)
    assert error(crops.mean((2, 3)), arrays["region_mean"]) < MOST
    assert error(crops.std((2, 3)), arrays["region_std"]) < MOST
    assert error(crops[:2, :, ::4, ::4], arrays["region_first_stride4"]) < MOST
    resized = patch_masks(masks, boxes, 224, 1).view(-1, 224, 224)
    assert error(resized.double().mean((1, 2)), arrays["region_mask_mean"]) < 1e-12
    assert np.array_equal(resized[:2, ::4, ::4].numpy(), arrays["region_mask_first_stride4"])
    assert np.array_equal(patch_masks(masks, boxes, 224, 32).numpy(), arrays["token_mask"])


def test_label_maps(ovseg, monkeypatch):
    """CLIP's logits from the stored masks, score maps and label maps from our own: with and without
    the mask prompt, CLIP only, the head only.
    """
    arrays, segmenter, image = ovseg
    masks, boxes = stored_regions(arrays)
    size = tuple(arrays["output_size"].tolist())
    proposals = segmenter.propose(image)
    valid = proposals.valid
    assert np.array_equal(segmenter.binary_masks(proposals)[valid].numpy(), masks)
    found = {"w07": segmenter.ensemble(proposals), "w00": segmenter.ensemble(proposals, 0)}
    found["head"] = proposals.class_probs

    logits = segmenter.region_logits(image, masks, boxes)
    assert error(logits, arrays["clip_logits"][:, :-1]) < MOST
    monkeypatch.setattr(segmenter.config, "mask_prompt", False)
    logits = segmenter.region_logits(image, masks, boxes)
    assert error(logits, arrays["clip_logits_prompt_off"][:, :-1]) < MOST
    proposals.clip_probs = torch.ones_like(proposals.clip_probs)
    proposals.clip_probs[valid] = logits.softmax(-1)
    found["prompt_off_w07"] = segmenter.ensemble(proposals)

    for case, scores in found.items():
        labels, _, ours = segmenter.label_map(scores, proposals, size, all_scores=True)
        assert (labels.numpy() == arrays[f"label_map_{case}"]).mean() >= 0.998
        for step in (4, 8):
            if (stored := arrays.get(f"sem_seg_stride{step}_{case}")) is not None:
                assert error(ours[:, ::step, ::step], stored) < MOST


@pytest.mark.parametrize("entry", ["swinB_vitL14", "R101c_vitB16"])
def test_every_key_of_the_published_files_is_used_or_listed(entry):
    sizes = keys("ovseg/ovseg_upstream_keys.json", entry)
    state = {name: torch.empty(shape, device="meta") for name, shape in sizes.items()}
    parts, dropped = import_original(state, "reference")
    assert sum(map(len, parts.values())) + len(dropped) == len(sizes)
    assert all(name.endswith(("index", "_mean", "_std", "empty_weight")) for name in dropped)
    name = {"swinB_vitL14": "ovseg_swinb", "R101c_vitB16": "ovseg_r101c"}[entry]
    config = load_config(ROOT / "configs" / f"{name}.toml")
    with torch.device("meta"):
        clip = build_clip(parts["clip"], Tokenizer(49408, 77))
        maskformer = MaskFormer(config.model, clip.embed_dim)
    for ours, part in ((maskformer, "maskformer"), (clip, "clip")):
        own = {name: tensor.shape for name, tensor in ours.state_dict().items()}
        assert own == {name: tensor.shape for name, tensor in parts[part].items()}
    assert clip.has_mask_prompt and len(clip.visual.mask_embedding) == 3


def test_norms_and_position_biases_of_swin_do_not_decay():
    import train

    config = tiny_config("model.backbone=SwinB")
    with torch.device("meta"):
        model = torch.nn.ModuleDict({"backbone": BACKBONES[config.model.backbone](config.model)})
    names = {id(p): name for name, p in model.named_parameters()}
    for group in train.build_optimizer(model, config).param_groups:
        assert group["lr"] == pytest.approx(config.train.lr * config.train.backbone_lr)
        for parameter in group["params"]:
            name = names[id(parameter)]
            plain = "norm" in name or "table" in name or ".0.2." in name
            assert (group["weight_decay"] == 0) == plain, name


def features(state: dict, masks: torch.Tensor, image: torch.Tensor, **options) -> torch.Tensor:
    """`crop_features` of a CLIP."""
    clip = build_clip(state, Tokenizer(514, 40))
    regions = Regions(masks, box_of(masks), torch.arange(len(masks)))
    with torch.no_grad():
        return crop_features(clip, image, regions, ClipConfig(**options))


@pytest.fixture
def stripes() -> tuple[torch.Tensor, torch.Tensor]:
    """Five regions, one of them empty in its middle, of an image."""
    torch.manual_seed(0)
    masks = torch.zeros(5, 40, 56, dtype=torch.uint8)
    for i, mask in enumerate(masks):
        mask[i : 40 - i, 3 * i :: 7] = 1
    masks[4, 8:30, 16:50] = 0
    return masks, torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8)


def test_the_mask_prompt_replaces_empty_patches(stripes):
    masks, image = stripes
    state = tiny_clip_state() | {"visual.mask_embedding": torch.randn(2, 9, 96)}
    whole = features(state, *stripes)
    for size in (1, 2, 3, 8):
        assert torch.allclose(features(state, *stripes, crop_batch_size=size), whole, atol=1e-5)
    off = features(state, *stripes, mask_prompt=False)
    plain = features(tiny_clip_state(), *stripes)
    assert torch.equal(off, plain) and not torch.allclose(whole[4], plain[4], atol=1e-2)
    full = (torch.ones_like(masks), image)  # nothing is replaced
    off = features(state, *full, mask_prompt=False)
    assert torch.allclose(features(state, *full), off, atol=1e-5)
    row = torch.randn(3, 1, 96)  # one for all patches
    one, all_ = (state | {"visual.mask_embedding": row.repeat(1, n, 1)} for n in (1, 9))
    assert torch.equal(features(one, *stripes), features(all_, *stripes))
