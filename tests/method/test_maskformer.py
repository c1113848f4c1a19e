"""The mask proposer: sizes and invariances."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config

from kernels.frozen import FrozenBatchNorm2d, convolve, freeze
from zsseg.backbone import BACKBONES
from zsseg.datasets import dataset
from zsseg.maskformer import MaskFormer
from zsseg.utils import UserError
from zsseg.weights import assemble, load_segmenter

TEXT = F.normalize(torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), dim=-1)


def build(*settings: str, scale: float = 100.0) -> MaskFormer:
    torch.manual_seed(0)
    return MaskFormer(tiny_config(*settings).model, 64, scale=scale)


def random_images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@pytest.mark.parametrize("size", [(1, 1), (31, 65), (64, 64)])
def test_masks_are_at_stride_4_of_the_padded_image(size):
    model = build()
    images = random_images(2, 3, *size)
    logits, masks = model(model.prepare(images), TEXT)
    padded = [-(-s // 32) * 8 for s in size]
    assert logits.shape == (3, 2, 8, 6) and masks.shape == (3, 2, 8, *padded)
    mask_logits, features = model.eval().propose(images[0])
    assert mask_logits.shape == (8, *padded) and features.shape == (8, 64)


@pytest.mark.parametrize("size", [(1, 1), (33, 50), (96, 128)])
@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_say_how_wide_their_maps_are(name, size):
    with torch.device("meta"):
        backbone = BACKBONES[name](tiny_config(f"model.backbone={name}").model)
        maps = backbone(torch.empty(2, 3, *size))
    strides = (4, 8, 8, 8) if name == "small" else (4, 8, 16, 32)
    for x, channels, stride in zip(maps, backbone.channels, strides, strict=True):
        assert x.shape == (2, channels, *[-(-side // stride) for side in size])


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other_and_bf16_stays_close():
    model = build().eval()
    images = model.prepare(random_images(3, 3, 64, 96))
    together = model.decode(images)
    for a, b in zip(together, model.decode(images[1:2]), strict=True):
        assert torch.allclose(a[:, 1:2], b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    with torch.autocast("cpu", torch.bfloat16):
        _, rough = model.decode(images)
    assert float((together[1] - rough.float()).abs().max() / together[1].abs().max()) < 0.1


def test_padding_is_zero_after_normalising():
    """An image and the same one already padded with the mean colour are one input."""
    model = build()
    image = random_images(1, 3, 40, 64).float()
    padded = model.pixel_mean.expand(1, 3, 64, 64).clone()
    padded[:, :, :40] = image
    one = model.prepare(image)
    assert one.shape == (1, 3, 64, 64) and not one[:, :, 40:].any()
    assert torch.allclose(one, model.prepare(padded), atol=1e-6)


def test_class_logits_are_scaled_cosines_with_no_object_last():
    model = build(scale=50.0)
    embeds = torch.stack([TEXT[2] * 7, model.non_object[0].detach() * 3])
    logits = model.classify(embeds, TEXT)
    assert logits.shape == (2, 6)
    assert logits.detach()[[0, 1], [2, 5]].tolist() == pytest.approx([50, 50], rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.classify(embeds, TEXT), logits)


def test_a_linear_head_has_the_classes_of_its_training():
    """However many others there are."""
    config = tiny_config("model.class_head=linear", "clip.ensemble=false", "data.train_on=all")
    segmenter, names = assemble(config, None), dataset("shapes").names
    content = {"config": asdict(config), "model": segmenter.learned_state(), "trained": names}
    for others in (names[::-1], [f"word {i}" for i in range(25)], names[1:]):
        with pytest.raises(UserError, match="for other classes than these"):
            segmenter.set_classes(others)
        with pytest.raises(UserError, match="for other classes than these"):
            load_segmenter(content | {"trained": others}, config, Path(), "last.pt")
    assert segmenter.names == load_segmenter(content, config, Path(), "last.pt").names == names


def test_every_parameter_learns():
    model = build()
    logits, masks = model(model.prepare(random_images(2, 3, 64, 64)), TEXT)
    (logits.sum() + masks.square().sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    silent = {name for name, g in gradients.items() if g is None or not g.abs().sum() > 0}
    # The queries start at zero, so the first self-attention has nothing to weigh yet, only its
    # biases to learn.
    names = ("self_attn.out_proj.weight", "norm1.weight", "self_attn.in_proj_weight")
    assert silent == {f"layers.0.{name}" for name in names}


def test_a_frozen_norm_is_applied_once():
    """Whoever applies it, before `freeze` and after."""
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d(3, 5, 3, bias=False), FrozenBatchNorm2d(5)
    norm.load_state_dict({name: torch.rand(5) + 0.5 for name in norm.state_dict()})
    network = torch.nn.Sequential(conv, norm)
    x = torch.randn(2, 3, 8, 8)
    expected = network(x)
    assert torch.allclose(convolve(conv, norm, x), expected, atol=1e-5)
    freeze(network, torch.float32)
    assert torch.allclose(network(x), expected, atol=1e-4)
    assert torch.allclose(convolve(conv, norm, x), expected, atol=1e-5)
