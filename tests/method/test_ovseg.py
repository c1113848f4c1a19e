"""OVSeg (Liang et al. 2023): the reference values of its own code in golden/ovseg/, and what they do
not reach.
"""

import numpy as np
import pytest
import recipe
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    golden,
    keys,
    original_state,
    relative_error,
    tiny_clip_state,
    tiny_config,
)
from torchvision.models import swin_b
from torchvision.models.swin_transformer import ShiftedWindowAttention

import train
from zsseg import backbone as backbones
from zsseg.backbone import Swin, WindowAttention, load_backbone
from zsseg.build import build_segmenter
from zsseg.clip import build_clip
from zsseg.config import ClipConfig, Config, load_config
from zsseg.distributed import Process
from zsseg.features import features_digest
from zsseg.maskformer import PIXEL_MEAN, PIXEL_STD
from zsseg.regions import (
    crop_features,
    mask_boxes,
    normalize,
    region_crops,
    resize_masks,
    token_masks,
)
from zsseg.segmenter import Segmenter
from zsseg.tokenizer import Tokenizer
from zsseg.utils import UserError
from zsseg.weights import import_original

MOST = 1e-4  # of the largest value of an array


def image_of(size: np.ndarray, seed: int) -> torch.Tensor:
    return torch.from_numpy(recipe.make_image(*size, int(seed))).permute(2, 0, 1).contiguous()


def state_of(name: str, arrays: dict[str, np.ndarray] = {}) -> dict[str, torch.Tensor]:  # noqa: B006
    """Stand-in weights; as `relative_position_index` nonsense, which nothing may read."""
    return original_state(keys(f"ovseg/{name}"), arrays)


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


@pytest.mark.parametrize("case", ["odd", "wide"])
@torch.no_grad()
def test_swin(ovseg, case):
    arrays = golden("ovseg/ovseg_swin.npz")
    image = image_of(arrays[f"{case}/image_size"], arrays["image_seed"])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    maps = ovseg[1].maskformer.backbone(((image - mean) / std)[None])
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
    """What CLIP is given, from the stored masks."""
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


def test_label_maps(ovseg, monkeypatch):
    """CLIP's logits from the stored masks, score maps and label maps from our own: with and without
    the mask prompt, CLIP alone, the head alone.
    """
    arrays, segmenter, image = ovseg
    masks, size = stored_masks(arrays), tuple(arrays["output_size"].tolist())
    proposals = segmenter.propose(image)
    assert np.array_equal(segmenter.binary_masks(proposals).numpy(), masks)
    assert np.array_equal(proposals.valid.numpy(), arrays["valid"])
    found = {"w07": segmenter.ensemble(proposals), "w00": segmenter.ensemble(proposals, 0)}
    found["head"] = proposals.class_probs

    boxes, _ = mask_boxes(masks)
    index = proposals.valid.nonzero()[:, 0]
    logits = segmenter.region_logits(image, masks, boxes, index)
    assert relative_error(logits, arrays["clip_logits"][:, :-1]) < MOST
    monkeypatch.setattr(segmenter.config, "mask_prompt", False)
    logits = segmenter.region_logits(image, masks, boxes, index)
    assert relative_error(logits, arrays["clip_logits_prompt_off"][:, :-1]) < MOST
    proposals.clip_probs = proposals.clip_probs.clone()
    proposals.clip_probs[proposals.valid] = logits.softmax(-1)
    found["prompt_off_w07"] = segmenter.ensemble(proposals)

    for case, scores in found.items():
        labels = segmenter.label_map(scores, proposals, size)[0].numpy()
        assert (labels == arrays[f"label_map_{case}"]).mean() >= 0.998
        ours = segmenter.score_map(scores, proposals, size)
        for step in (4, 8):
            if (stored := arrays.get(f"sem_seg_stride{step}_{case}")) is not None:
                assert relative_error(ours[:, ::step, ::step], stored) < MOST


@pytest.mark.parametrize(
    "entry, name", [("swinB_vitL14", "ovseg_swinb"), ("R101c_vitB16", "ovseg_r101c")]
)
def test_every_key_of_the_published_files_is_used_or_listed(entry, name):
    sizes = keys("ovseg/ovseg_upstream_keys.json", entry)
    state = {name: torch.empty(shape, device="meta") for name, shape in sizes.items()}
    parts, dropped = import_original(state, "reference")
    config = load_config(ROOT / "configs" / f"{name}.toml")
    assert sum(map(len, parts.values())) + len(dropped) == len(sizes)
    assert all(name.endswith(("index", "_mean", "_std", "empty_weight")) for name in dropped)
    with torch.device("meta"):
        segmenter = Segmenter(config, parts["clip"])
    for ours, part in ((segmenter.maskformer, "maskformer"), (segmenter.clip, "clip")):
        own = {name: tensor.shape for name, tensor in ours.state_dict().items()}
        assert own == {name: tensor.shape for name, tensor in parts[part].items()}
    assert len(segmenter.clip.visual.mask_embedding) == 3


@pytest.mark.parametrize("shift", [0, 6])
def test_attention_is_that_of_torchvision_where_that_shifts(shift):
    torch.manual_seed(0)
    theirs = ShiftedWindowAttention(32, [12, 12], [shift, shift], 2)
    ours = WindowAttention(32, [12, 12], [shift, shift], 2)
    state = theirs.state_dict()
    state.pop("relative_position_index")
    ours.load_state_dict(state)
    x = torch.randn(2, 30, 17, 32)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-4 * float(b.grad.abs().max()))
    single = torch.randn(1, 12, 5, 32)
    assert torch.allclose(ours(single), theirs(single), atol=1e-6) == (shift == 0)


def small_swin() -> Swin:
    torch.manual_seed(0)
    return Swin(32, (2, 2, 2, 2))


@pytest.mark.parametrize("size", [(1, 1), (33, 50), (100, 7)])
def test_swin_takes_images_of_any_size(size):
    model = small_swin()
    maps = model(torch.randn(2, 3, *size))
    sides = [-(-s // 4) for s in size]
    for x, channels in zip(maps, model.channels, strict=True):
        assert x.shape == (2, channels, *sides)
        sides = [(s + 1) // 2 for s in sides]
    sum(x.square().mean() for x in maps).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_swin_learns_as_its_authors_let_it():
    """Norms and position biases do not decay."""
    config = tiny_config()
    model = torch.nn.ModuleDict({"backbone": small_swin()})
    names = {id(p): name for name, p in model.named_parameters()}
    for group in train.build_optimizer(model, config).param_groups:
        assert group["lr"] == pytest.approx(config.train.lr * config.train.backbone_lr)
        for parameter in group["params"]:
            name = names[id(parameter)]
            plain = "norm" in name or "table" in name or ".0.2." in name
            assert (group["weight_decay"] == 0) == plain, name


def without_norms(model: Swin) -> set[str]:
    return {name for name in model.state_dict() if not name.startswith("norm")}


def test_initial_weights_of_swin(tmp_path, capsys):
    """Every tensor of torchvision's file and of Swin's own is used, or said."""
    with torch.device("meta"):
        own, theirs = Swin().state_dict(), swin_b().state_dict()
        names = without_norms(Swin())
    assert names == {k for k in own if k in theirs and "index" not in k}
    for name in names:
        assert (own[name].shape == theirs[name].shape) == ("table" not in name)
    official = {k.removeprefix("backbone.") for k in keys("ovseg/ovseg_swin_keys.json")}
    official = {k for k in official if not k.startswith("norm")}
    assert len(official) - 24 == len(names)

    model = small_swin()
    torchvision = {k: torch.full_like(v, 0.5) for k, v in model.state_dict().items() if k in names}
    torchvision["features.1.0.attn.relative_position_bias_table"] = torch.zeros(169, 1)
    torchvision |= {"norm.weight": torch.ones(256), "head.bias": torch.ones(1000)}
    torch.save(torchvision, tmp_path / "torchvision.pth")
    load_backbone(model, "SwinB", str(tmp_path / "torchvision.pth"))
    assert (model.features[1][1].attn.qkv.weight == 0.5).all()
    text = capsys.readouterr().out
    for part in ("3 dropped: features.1.0.attn.relative", "norm.weight", "head.bias"):
        assert part in text
    assert "9 of the model's tensors are not in it" in text and "norm0.weight" in text

    state = {
        "patch_embed.proj.weight": torch.full((32, 3, 4, 4), 0.25),
        "layers.2.blocks.1.mlp.fc2.bias": torch.full((128,), 0.25),
        "layers.1.downsample.norm.weight": torch.full((256,), 0.25),
        "layers.0.blocks.1.attn_mask": torch.ones(64, 144, 144),
        "layers.0.blocks.1.attn.relative_position_index": torch.zeros(144, 144),
        "head.weight": torch.ones(10, 256),
    }
    torch.save({"model": state}, tmp_path / "swin.pth")
    load_backbone(model, "SwinB", str(tmp_path / "swin.pth"))
    for tensor in (
        model.features[0][0].weight,
        model.features[5][1].mlp[3].bias,
        model.features[4].norm.weight,
    ):
        assert (tensor == 0.25).all()
    assert "3 tensors loaded, 3 dropped: " in capsys.readouterr().out
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match="holds no weight that fits"):
        load_backbone(model, "SwinB", str(tmp_path / "resnet.pth"))


def test_masks_are_resized_as_torch_does():
    """For every side below 700: in exact arithmetic some of them would be a pixel off."""
    torch.manual_seed(0)
    mask = torch.randint(0, 2, (1, 700, 9), dtype=torch.uint8)
    sides = torch.arange(1, 700)
    boxes = torch.stack([0 * sides + 2, 0 * sides + 1, 0 * sides + 7, sides + 1], 1)
    ours = resize_masks(mask.expand(len(sides), -1, -1), boxes, 224, torch.arange(len(sides)))
    for side, found in zip(sides.tolist(), ours, strict=True):
        cut = mask[None, :, 1 : side + 1, 2:7].float()
        assert torch.equal(found, F.interpolate(cut, (224, 224), mode="nearest")[0, 0] != 0)


def prompted_clip(depth: int = 2, tokens: int = 9) -> dict[str, torch.Tensor]:
    """The small CLIP of 9 patches with a mask prompt."""
    state = tiny_clip_state()
    return state | {"visual.mask_embedding": torch.randn(depth, tokens, 96)}


def half_masks() -> tuple[torch.Tensor, ...]:
    """An image and five regions of it, one of them empty in its middle."""
    torch.manual_seed(0)
    masks = torch.zeros(5, 40, 56, dtype=torch.uint8)
    for i, mask in enumerate(masks):
        mask[i : 40 - i, 3 * i :: 7] = 1
    masks[4, 8:30, 16:50] = 0
    return torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8), masks, mask_boxes(masks)[0]


@torch.no_grad()
def test_the_mask_prompt_through_chunks_and_buckets():
    image, masks, boxes = half_masks()
    clip, index = build_clip(prompted_clip()), torch.tensor([4, 0, 1, 2, 3])
    whole = crop_features(clip, image, masks, boxes, index, ClipConfig())
    for chunk, bucketed in ((1, False), (2, False), (3, True), (8, True)):
        clip.bucketed = bucketed
        parts = crop_features(clip, image, masks, boxes, index, ClipConfig(chunk=chunk))
        assert torch.allclose(parts, whole, atol=1e-5)
    clip.bucketed = False  # as `plain`: a batch of another size may round otherwise
    off = crop_features(clip, image, masks, boxes, index, ClipConfig(mask_prompt=False))
    plain = crop_features(build_clip(tiny_clip_state()), image, masks, boxes, index, ClipConfig())
    assert torch.equal(off, plain)
    assert not torch.allclose(whole[0], plain[0], atol=1e-2)
    full = torch.ones_like(masks)
    boxes = mask_boxes(full)[0]
    on, off = (
        crop_features(clip, image, full, boxes, index, ClipConfig(mask_prompt=prompt))
        for prompt in (True, False)
    )
    assert torch.allclose(on, off, atol=1e-5)  # nothing is replaced


@torch.no_grad()
def test_one_row_of_a_mask_prompt_serves_all_patches():
    image, masks, boxes = half_masks()
    state = prompted_clip(3, 1)
    repeated = state | {
        "visual.mask_embedding": state["visual.mask_embedding"].expand(-1, 9, -1).clone()
    }
    a, b = (
        crop_features(build_clip(s), image, masks, boxes, torch.arange(5), ClipConfig())
        for s in (state, repeated)
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("depth, tokens", [(4, 9), (0, 9), (2, 16)])
def test_a_mask_prompt_that_does_not_fit(depth, tokens):
    with pytest.raises(UserError, match="mask prompt of shape"):
        build_clip(prompted_clip(depth, tokens))


def test_kept_features_depend_on_the_mask_prompt(segmenter):
    digests = {
        features_digest(
            segmenter, tiny_config(f"clip.mask_prompt={prompt}"), Process(torch.device("cpu"))
        )
        for prompt in ("true", "false")
    }
    assert len(digests) == 2


def test_no_class_counts_as_seen(segmenter):
    segmenter.config.ensemble_seen = False
    segmenter.set_classes(["cat", "dog"], [0])
    assert not segmenter.seen.any()


@pytest.mark.slow
def test_compiled(monkeypatch):
    """Each part as one program, and what it computes stays."""
    torch._dynamo.reset()
    monkeypatch.setitem(backbones.BACKBONES, "SwinB", lambda config: small_swin())
    config = tiny_config("model.backbone=SwinB", "model.decoder_layers=1", "model.bf16=off")
    segmenter = Segmenter(config, prompted_clip()).eval()
    segmenter.set_classes(["star", "tree", "brick"])
    images = [torch.randint(0, 256, (3, *size)) for size in ((64, 64), (40, 130), (96, 50))]
    eager = [segmenter.propose(image) for image in images]
    segmenter.maskformer.compiled = True
    segmenter.maskformer.compile(fullgraph=True, backend="aot_eager")
    segmenter.clip.bucketed = True
    segmenter.clip.visual.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    for image, expected in zip(images, eager, strict=True):
        found = segmenter.propose(image)
        assert torch.allclose(found.mask_logits, expected.mask_logits, rtol=1e-3, atol=1e-3)
        assert torch.allclose(found.clip_probs, expected.clip_probs, atol=1e-4)


@pytest.mark.parametrize(
    "name, weight, threshold, sizes, lr",
    [
        ("ovseg_swinb", 0.7, 0.4, (640, 2560), 6e-5),
        ("ovseg_swinb_ade20k", 0.7, 0.4, (640, 2560), 6e-5),
        ("ovseg_swinb_ade20k_full", 0.7, 0.4, (640, 2560), 6e-5),
        ("ovseg_swinb_pcontext", 0.6, 0.4, (640, 2560), 6e-5),
        ("ovseg_swinb_voc", 0.45, 0.4, (640, 2560), 6e-5),
        ("ovseg_r101c", 0.7, 0.5, (512, 2048), 2e-4),
        ("ovseg_r101c_ade20k", 0.7, 0.5, (512, 2048), 2e-4),
    ],
)
def test_configurations(name, weight, threshold, sizes, lr):
    config = load_config(ROOT / "configs" / f"{name}.toml")
    clip, data = config.clip, config.data
    assert (clip.ensemble_weight, clip.mask_threshold, clip.prompt) == (weight, threshold, "vild")
    assert (data.test_short_edge, data.max_size, config.train.lr) == (*sizes, lr)
    assert data.train_on == "all" and clip.mask_prompt and not clip.ensemble_seen
    assert config.train.steps == 120_000 and config.train.batch_size == 32


def test_a_mask_adapted_clip_is_a_file(tmp_path):
    """As OpenCLIP's trainer writes it; a segmenter trains and evaluates with its mask prompt."""
    state = prompted_clip()
    content = {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 5}
    torch.save(content, tmp_path / "adapted.pt")
    config = tiny_config(f"clip.weights={tmp_path / 'adapted.pt'}")
    found = build_segmenter(config, tmp_path).clip.visual.mask_embedding
    assert torch.equal(found, state["visual.mask_embedding"]) and not found.requires_grad
