"""The mask proposer: sizes, invariances, compilation."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config

from zsseg.config import ModelConfig
from zsseg.maskformer import MaskFormer, sine_positions


def build(**options: object) -> MaskFormer:
    torch.manual_seed(0)
    config = tiny_config().model
    for key, value in options.items():
        setattr(config, key, value)
    return MaskFormer(config, 64)


@pytest.mark.parametrize("size", [(1, 1), (31, 65), (64, 64)])
def test_masks_are_at_stride_4_of_the_padded_image(size):
    model = build()
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    embeds, masks = model(model.prepare(images), F.normalize(torch.randn(5, 64), dim=-1))
    padded = [-(-s // 32) * 8 for s in size]
    assert embeds.shape == (3, 2, 8, 6) and masks.shape == (3, 2, 8, *padded)
    embeds, masks = model.eval().decode(model.prepare(images))
    assert embeds.shape == (1, 2, 8, 64) and masks.shape == (1, 2, 8, *padded)


def test_images_of_a_batch_do_not_see_each_other():
    model = build().eval()
    images = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        together, alone = (
            model.decode(model.prepare(images)),
            model.decode(model.prepare(images[1:2])),
        )
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a[:, 1:2], b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_padding_is_zero_after_normalising():
    """An image and the same one already padded with the mean colour are one input."""
    model = build().eval()
    image = torch.randint(0, 256, (1, 3, 40, 64)).float()
    padded = model.pixel_mean.expand(1, 3, 64, 64).clone()
    padded[:, :, :40] = image
    one, two = model.prepare(image), model.prepare(padded)
    assert (
        one.shape == (1, 3, 64, 64)
        and not one[:, :, 40:].any()
        and torch.allclose(one, two, atol=1e-6)
    )


def test_class_logits_are_scaled_cosines_with_no_object_last():
    model = build()
    text = F.normalize(torch.randn(5, 64), dim=-1)
    embeds = torch.stack([text[2] * 7, model.non_object[0].detach() * 3])
    logits = model.classify(embeds, text)
    assert logits.shape == (2, 6)
    assert logits.detach()[[0, 1], [2, 5]].tolist() == pytest.approx([100, 100], rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.classify(embeds, text), logits)


def test_positions_count_from_one_y_before_x():
    positions = sine_positions(3, 2, 8, torch.device("cpu")).view(3, 2, 8)
    y = 2 / (3 + 1e-6) * 2 * torch.pi  # second row
    wanted = [torch.tensor(v) for v in (y, y / 10000 ** (2 / 4))]
    assert torch.allclose(positions[1, :, 0], wanted[0].sin()) and torch.allclose(
        positions[1, :, 3], wanted[1].cos()
    )
    assert torch.equal(positions[0, 1, :4], positions[0, 0, :4]) and torch.equal(
        positions[2, 1, 4:], positions[0, 1, 4:]
    )


def test_every_parameter_learns():
    model = build()
    logits, masks = model(
        model.prepare(torch.rand(2, 3, 64, 64) * 255), F.normalize(torch.randn(5, 64), dim=-1)
    )
    (logits.sum() + masks.square().sum()).backward()
    silent = {
        k for k, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    }
    # The queries start at zero, so the first self-attention has nothing to weigh yet, only its
    # biases to learn.
    assert silent == {f"layers.0.{k}.weight" for k in ("self_attn.out_proj", "norm1")} | {
        "layers.0.self_attn.in_proj_weight"
    }


@pytest.mark.parametrize("backbone", ["R50"])  # test_compile.py compiles the small one
def test_compiles_without_a_graph_break(backbone):
    sizes = {
        "hidden": 32,
        "queries": 4,
        "heads": 2,
        "feedforward": 32,
        "decoder_layers": 2,
        "class_hidden": 16,
    }
    config = ModelConfig(backbone, dropout=0.0, small_widths=[8, 8, 8, 8], **sizes)
    torch.manual_seed(0)
    model = MaskFormer(config, 16)
    images, text = torch.rand(2, 3, 64, 64) * 255, F.normalize(torch.randn(3, 16), dim=-1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for ours, wanted in zip(compiled(images, text), model(images, text), strict=True):
        assert torch.allclose(ours, wanted, rtol=1e-3, atol=1e-3)


def test_bf16_autocast_stays_close():
    model = build().eval()
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        _, exact = model.decode(model.prepare(images))
        with torch.autocast("cpu", torch.bfloat16):
            _, rough = model.decode(model.prepare(images))
    assert float((exact - rough.float()).abs().max() / exact.abs().max()) < 0.1
