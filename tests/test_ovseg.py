"""OVSeg (Liang et al. 2023): the reference values of its own code in golden/ovseg/, and what they do
not reach.
"""

import numpy as np
import pytest
import recipe
import torch
import torch.nn.functional as F
from conftest import golden, keys, original_state, relative_error

from zsseg.backbone import SwinB
from zsseg.clip import build_clip
from zsseg.config import Config
from zsseg.maskformer import PIXEL_MEAN, PIXEL_STD
from zsseg.regions import mask_boxes, normalize, region_crops, resize_masks, token_masks
from zsseg.segmenter import Segmenter
from zsseg.tokenizer import Tokenizer
from zsseg.weights import import_original

MOST = 1e-4  # of the largest value of an array


def image_of(size: np.ndarray, seed: int) -> torch.Tensor:
    return torch.from_numpy(recipe.make_image(*size, int(seed))).permute(2, 0, 1).contiguous()


def state_of(name: str, arrays: dict[str, np.ndarray] = {}) -> dict[str, torch.Tensor]:  # noqa: B006
    """Stand-in weights; of `relative_position_index` nonsense, which nothing may read."""
    return original_state(keys(f"ovseg/{name}"), arrays)


@pytest.fixture(scope="module")
def backbone() -> SwinB:
    parts, dropped = import_original(state_of("ovseg_swin_keys.json"), "reference")
    assert all(name.endswith("relative_position_index") for name in dropped) and len(dropped) == 24
    state = {k.removeprefix("backbone."): v for k, v in parts["maskformer"].items()}
    model = SwinB()
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("case", ["odd", "wide"])
@torch.no_grad()
def test_swin(backbone, case):
    arrays = golden("ovseg/ovseg_swin.npz")
    image = image_of(arrays[f"{case}/image_size"], arrays["image_seed"])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    maps = backbone(((image - mean) / std)[None])
    for i, ours in enumerate(maps):
        name, channels, cells = f"{case}/res{i + 2}", (1, 2, 4, 4)[i], (8, 4, 2, 1)[i]
        assert ours.shape[1:] == tuple(arrays[f"{name}_shape"])
        part = ours[0, ::channels, ::cells, ::cells]
        assert relative_error(part, arrays[name]) < MOST
        assert relative_error(ours[0].mean((1, 2)), arrays[f"{name}_mean"]) < MOST
        assert relative_error(ours[0].std((1, 2), unbiased=False), arrays[f"{name}_std"]) < MOST


@pytest.mark.slow
@pytest.mark.usefixtures("vocabulary")
@torch.no_grad()
def test_clip_of_full_size():
    arrays = golden("ovseg/ovseg_clip.npz")
    clip = build_clip(state_of("ovseg_clip_vitl14_keys.json"))
    crops = normalize(torch.stack([image_of((224, 224), seed) for seed in arrays["image_seeds"]]))
    masks = torch.zeros(3, 224, 224, dtype=torch.uint8)
    for i, (y0, x0, y1, x1) in enumerate(arrays["mask_boxes"]):
        masks[i, y0:y1, x0:x1] = 1
    masks[tuple(arrays["mask_pixel"])] = 1
    whole = torch.tensor([[0, 0, 224, 224]]).expand(3, 4)
    shown = token_masks(resize_masks(masks, whole, 224, torch.arange(3)), clip.visual.stride)
    assert np.array_equal(shown.view(3, 16, 16).numpy(), arrays["token_mask"])
    features = clip.encode_image(crops, token_mask=shown)
    assert relative_error(features, arrays["image_features_prompt"]) < MOST
    assert relative_error(clip.encode_image(crops), arrays["image_features_plain"]) < MOST
    tokens = Tokenizer(49408, 77)([str(text) for text in arrays["texts"]])
    assert relative_error(clip.encode_text(tokens), arrays["text_features"]) < MOST


@pytest.fixture(scope="module")
def ovseg(vocabulary) -> tuple[dict[str, np.ndarray], Segmenter, torch.Tensor]:
    """The reference values of an image through the whole model, that model, and the image."""
    arrays, config = golden("ovseg/ovseg_eval.npz"), Config()
    config.model.backbone = "SwinB"
    config.clip.prompt, config.clip.ensemble_weight = "vild", 0.7
    config.clip.mask_threshold = float(arrays["mask_threshold"])
    parts, dropped = import_original(state_of("keys_ovseg_tinyclip.json", arrays), "reference")
    assert sum(map(len, parts.values())) + len(dropped) == len(
        keys("ovseg/keys_ovseg_tinyclip.json")
    )
    segmenter = Segmenter(config, parts["clip"])
    segmenter.load_learned(parts, "reference")
    segmenter.eval().set_classes([str(name) for name in arrays["class_names"]])
    return arrays, segmenter, image_of(arrays["image_size"], arrays["image_seed"])


def stored_masks(arrays: dict[str, np.ndarray]) -> torch.Tensor:
    masks = np.unpackbits(arrays["masks_packed"], axis=-1, count=int(arrays["image_size"][1]))
    return torch.from_numpy(masks)


@torch.no_grad()
def test_proposals(ovseg):
    arrays, segmenter, image = ovseg
    model = segmenter.maskformer
    embeds, masks = (x[-1, 0] for x in model.decode(model.prepare(image[None])))
    assert relative_error(embeds, arrays["pred_logits"]) < MOST
    assert relative_error(masks[:12], arrays["pred_masks_first12"]) < MOST
    assert relative_error(masks.mean((1, 2)), arrays["pred_masks_mean"]) < MOST
    assert relative_error(masks.std((1, 2), unbiased=False), arrays["pred_masks_std"]) < MOST
    text = torch.cat([segmenter.text_features, F.normalize(model.non_object)])
    assert relative_error(text, arrays["text_features"]) < MOST


def test_regions(ovseg):
    """From the stored masks, all of the later stages."""
    arrays, _, image = ovseg
    masks = stored_masks(arrays)
    boxes, valid = mask_boxes(masks)
    assert np.array_equal(valid.numpy(), arrays["valid"])
    index = valid.nonzero()[:, 0]
    crops = region_crops(image, masks, boxes, 224, index)
    assert relative_error(crops.mean((2, 3)), arrays["region_mean"]) < MOST
    assert relative_error(crops.std((2, 3)), arrays["region_std"]) < MOST
    assert relative_error(crops[:2, :, ::4, ::4], arrays["region_first_stride4"]) < MOST
    regions = resize_masks(masks, boxes, 224, index)
    assert relative_error(regions.double().mean((1, 2)), arrays["region_mask_mean"]) < 1e-12
    assert np.array_equal(regions[:2, ::4, ::4].numpy(), arrays["region_mask_first_stride4"])
    assert np.array_equal(token_masks(regions, 32).numpy(), arrays["token_mask"])


@pytest.mark.parametrize("prompt", [True, False])
def test_label_maps(ovseg, prompt, monkeypatch):
    arrays, segmenter, image = ovseg
    monkeypatch.setattr(segmenter.config, "mask_prompt", prompt)
    proposals = segmenter.propose(image)
    assert np.array_equal(segmenter.binary_masks(proposals).numpy(), stored_masks(arrays))
    assert np.array_equal(proposals.valid.numpy(), arrays["valid"])
    name = "clip_logits" if prompt else "clip_logits_prompt_off"
    boxes, valid = mask_boxes(stored_masks(arrays))
    masks = stored_masks(arrays)[valid]
    logits = segmenter.region_logits(image, masks, boxes[valid])
    assert relative_error(logits, arrays[name][:, :-1]) < MOST

    size = tuple(arrays["output_size"].tolist())
    cases = {"w07": 0.7, "w00": 0} if prompt else {"prompt_off_w07": 0.7}
    for case, weight in cases.items():
        scores = segmenter.ensemble(proposals, weight)
        if prompt:
            ours = segmenter.score_map(scores, proposals, size)[:, ::4, ::4]
            assert relative_error(ours, arrays[f"sem_seg_stride4_{case}"]) < MOST
        labels = segmenter.label_map(scores, proposals, size)[0].numpy()
        assert (labels == arrays[f"label_map_{case}"]).mean() >= 0.999
    labels = segmenter.label_map(proposals.class_probs, proposals, size)[0].numpy()
    assert (labels == arrays["label_map_head"]).mean() >= 0.999
    ours = segmenter.score_map(proposals.class_probs, proposals, size)[:, ::8, ::8]
    assert relative_error(ours, arrays["sem_seg_stride8_head"]) < MOST
