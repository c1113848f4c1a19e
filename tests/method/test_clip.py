"""CLIP beyond the reference values: sizes, invariances."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_clip_state

from zsseg.clip import CLIP, ModifiedResNet, VisionTransformer, build_clip, resize_positions
from zsseg.tokenizer import Tokenizer
from zsseg.utils import UserError

TOKENIZER = Tokenizer(514, 40)


def small_resnet() -> ModifiedResNet:
    torch.manual_seed(0)
    return ModifiedResNet([1, 2, 1, 1], 8, 64, 16).eval()


def test_sizes_are_read_off_the_state_dict():
    clip = build_clip(tiny_clip_state(), TOKENIZER)
    assert (clip.resolution, clip.patch, clip.embed_dim, clip.width) == (48, 16, 64, 64)
    assert clip.token_embedding.num_embeddings == 514 and clip.tokenizer is TOKENIZER
    assert not clip.training and not any(p.requires_grad for p in clip.parameters())
    small = CLIP(small_resnet(), Tokenizer(514, 10), 16, 10, 514, 64, 1)
    again = build_clip(small.state_dict(), Tokenizer(514, 10))
    assert (again.resolution, again.patch, len(again.visual.layer2)) == (64, 32, 2)
    half = {k: v.half() for k, v in tiny_clip_state().items()} | {"vocab_size": torch.tensor(514)}
    assert build_clip(half, TOKENIZER).text_projection.dtype == torch.float32


def test_what_the_weights_do_not_tell_belongs_to_the_object():
    state = tiny_clip_state()
    plain = build_clip(state, TOKENIZER)
    other = build_clip(state, TOKENIZER, mean=[0.5] * 3, std=[0.25] * 3, scale=10.0)
    assert plain.state_dict().keys() == other.state_dict().keys() == state.keys()
    image = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    assert torch.allclose(other.normalize(image), (image / 255 - 0.5) / 0.25)
    mean, std = plain.pixel_stats
    assert torch.allclose(plain.normalize(image)[2], (image[2] / 255 - mean[2]) / std[2])
    features = torch.randn(4, 64)
    text = F.normalize(torch.randn(3, 64), dim=-1)
    logits = plain.logits(features, text)
    assert torch.allclose(logits, 100 * F.normalize(features, dim=-1) @ text.T, atol=1e-4)
    assert torch.allclose(logits, 10 * other.logits(features, text))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain.logits(features, text), logits)


def test_what_is_not_a_clip_is_refused():
    state = tiny_clip_state()
    odd = ("ln_final.weight", "something", "text_projection")
    wrong = [[1], *(state | {name: torch.zeros(3)} for name in odd)]
    for part in ("visual.ln_post.weight", "transformer.", ""):
        wrong.append({k: v for k, v in state.items() if not k.startswith(part)})
    for content in wrong:
        with pytest.raises(UserError, match="not a CLIP state dict"):
            build_clip(content, TOKENIZER)
    with pytest.raises(UserError, match=r"divisible by num_heads.*clip\.heads"):
        build_clip(state, TOKENIZER, heads=5)


@torch.no_grad()
def test_other_resolutions_interpolate_the_positions(small_clip):
    small = CLIP(small_resnet(), TOKENIZER, 16, 40, 514, 64, 1)
    for clip, size in ((small_clip, (64, 32)), (small, (128, 64))):
        images = torch.randn(2, 3, *size)
        assert clip.encode_image(images).shape == (2, clip.embed_dim)
        assert clip.encode_dense(images).shape == (2, 4, 2, clip.embed_dim)
    positions = torch.randn(10, 8)
    assert torch.equal(resize_positions(positions, torch.Size([3, 3])), positions)
    resized = resize_positions(positions, torch.Size([6, 3]))
    assert resized.shape == (19, 8) and torch.equal(resized[0], positions[0])


@torch.no_grad()
def test_texts_do_not_see_each_other_nor_what_follows_their_end(small_clip):
    tokens = TOKENIZER(["a star", "a", "a photo of a yellow triangle."])
    together = small_clip.encode_text(tokens)
    alone = torch.cat([small_clip.encode_text(t[None]) for t in tokens])
    assert torch.allclose(together, alone, atol=1e-5)
    changed = tokens.clone()
    changed[:, -1] = 7
    for other in (changed, tokens[:, :34]):
        assert torch.allclose(together, small_clip.encode_text(other), atol=1e-6)


@torch.no_grad()
def test_towers_compile_without_a_graph_break(small_clip):
    images = torch.randn(2, 3, 64, 64)
    plain = VisionTransformer(64, 16, 64, 2, 16).eval()
    for tower in (small_clip.visual, plain, small_resnet()):
        compiled = torch.compile(tower, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(images), tower(images), atol=1e-5)
