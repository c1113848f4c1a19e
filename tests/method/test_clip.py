"""Tokenizer and CLIP beyond the reference values."""

import pytest
import torch
from conftest import tiny_clip_state

from zsseg import clip as C
from zsseg.clip import CLIP, ModifiedResNet, VisionTransformer, build_clip
from zsseg.tokenizer import Tokenizer
from zsseg.utils import UserError
from zsseg.weights import load_clip_state, read_torchscript


def test_byte_vocabulary_needs_no_file(monkeypatch, tmp_path):
    monkeypatch.setenv("ZSSEG_VOCAB", str(tmp_path / "absent"))
    tokenizer = Tokenizer(514, 12)
    a, z = ord("a") - ord("!"), ord("z") - ord("!")
    assert tokenizer(["az A"]).tolist() == [[512, a, z + 256, a + 256, 513, 0, 0, 0, 0, 0, 0, 0]]
    # Two bytes, the last one ends the word.
    assert tokenizer.encode("é")[0] < 256 <= tokenizer.encode("é")[1] < 512
    with pytest.raises(UserError, match=r"ZSSEG_VOCAB=.*absent: no such file"):
        Tokenizer(49408, 77)


def test_every_byte_has_its_own_token():
    tokenizer = Tokenizer(514, 77)
    assert (
        sorted(tokenizer.index.values()) == list(range(512))
        and len(set(tokenizer.symbol_of_byte.values())) == 256
    )


def test_a_text_that_does_not_fit_is_named():
    tokenizer = Tokenizer(514, 8)
    assert tokenizer(["abcdef"])[0, -1] == 513
    with pytest.raises(UserError, match="text 'abcdefg': has 9 tokens, CLIP reads 8"):
        tokenizer(["abcdefg"])


def test_broken_vocabulary_is_named(monkeypatch, tmp_path):
    (tmp_path / "vocab.gz").write_bytes(b"not gzip")
    monkeypatch.setenv("ZSSEG_VOCAB", str(tmp_path / "vocab.gz"))
    with pytest.raises(UserError, match=r"vocab\.gz cannot be read|vocab\.gz: cannot be read"):
        Tokenizer(49408, 77)


def test_sizes_are_read_off_the_state_dict():
    clip = build_clip(tiny_clip_state())
    assert (clip.visual.resolution, clip.visual.stride, clip.context_length) == (48, 16, 40)
    assert clip.token_embedding.num_embeddings == 514
    assert sum(p.numel() for p in clip.parameters()) < 1_200_000
    assert not clip.training and not any(p.requires_grad for p in clip.parameters())
    small = CLIP(ModifiedResNet([1, 2, 1, 1], 8, 64, 16), 16, 10, 514, 64, 1)
    again = build_clip(small.state_dict())
    assert again.visual.resolution == 64 and len(again.visual.layer2) == 2
    half = {k: v.half() if v.is_floating_point() else v for k, v in tiny_clip_state().items()}
    assert build_clip(half).text_projection.dtype == torch.float32


@pytest.mark.parametrize("damage", ["drop", "shape", "extra", "flat", "list", "empty"])
def test_what_is_not_a_clip_is_refused(damage):
    state = tiny_clip_state()
    if damage == "drop":
        del state["visual.ln_post.weight"]
    elif damage == "shape":
        state["ln_final.weight"] = torch.zeros(3)
    elif damage == "extra":
        state["something"] = torch.zeros(3)
    elif damage == "flat":
        state["text_projection"] = torch.zeros(3)
    else:
        state = [1] if damage == "list" else {}
    with pytest.raises(UserError, match="not a CLIP state dict"):
        build_clip(state)


def test_other_resolutions_interpolate_the_positions(small_clip):
    vit, resnet = small_clip.visual, ModifiedResNet([1, 1, 1, 1], 8, 64, 16).eval()
    for tower, size, grid in ((vit, (64, 32), (4, 2)), (resnet, (128, 64), (4, 2))):
        images = torch.randn(2, 3, *size)
        assert tower(images).shape == (2, tower(images, dense=True).shape[-1])
        assert tower(images, dense=True).shape[:3] == (2, *grid)


def test_towers_compile_without_a_graph_break():
    images = torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    for tower in (
        build_clip(tiny_clip_state()).visual,
        VisionTransformer(32, 8, 64, 2, 16).eval(),
        ModifiedResNet([1, 1, 1, 1], 8, 32, 16).eval(),
    ):
        with torch.no_grad():
            compiled = torch.compile(tower, fullgraph=True, backend="eager")
            assert torch.allclose(compiled(images), tower(images), atol=1e-5)


class Scripted(torch.nn.Module):
    """Looks like a CLIP archive: nested modules, half precision, a shared storage, a method that
    must never run.
    """

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        for name, tensor in state.items():
            module, *path = self, *name.split(".")[:-1]
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_buffer(name.split(".")[-1], tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_openai_archives_are_read_for_their_tensors(tmp_path):
    state = {k: v.half() if v.is_floating_point() else v for k, v in tiny_clip_state().items()}
    state["input_resolution"] = torch.tensor(32)
    base = torch.arange(12.0)
    views = {"view": base.view(3, 4).T[1:], "scalar": torch.tensor(2.5)}
    torch.jit.script(Scripted(state | views)).save(tmp_path / "clip.pt")
    read = read_torchscript(tmp_path / "clip.pt", "archive")
    assert read.keys() == (state | views).keys()
    assert all(torch.equal(read[k], v) for k, v in (state | views).items())
    torch.jit.script(Scripted(state)).save(tmp_path / "clip.pt")
    clip = build_clip(load_clip_state("{root}/clip.pt", tmp_path))
    assert torch.equal(clip.text_projection, state["text_projection"].float())


def test_unknown_or_broken_weights_are_named(tmp_path):
    with pytest.raises(UserError, match="ViT-B/16"):
        load_clip_state("ViT-B-16", tmp_path)
    (tmp_path / "clip.pt").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"clip\.pt: cannot be read"):
        load_clip_state(str(tmp_path / "clip.pt"), tmp_path)


def test_a_batch_of_texts_equals_one_by_one(small_clip):
    tokens = Tokenizer(514, 40)(["a star", "a", "a photo of a yellow triangle."])
    with torch.no_grad():
        together = small_clip.encode_text(tokens)
        alone = torch.cat([small_clip.encode_text(t[None]) for t in tokens])
    assert torch.allclose(together, alone, atol=1e-5)


def test_causal_mask_hides_what_follows_the_end(small_clip):
    tokens = Tokenizer(514, 40)(["a star"])
    changed = tokens.clone()
    changed[0, -1] = 7
    with torch.no_grad():
        assert torch.allclose(
            small_clip.encode_text(tokens), small_clip.encode_text(changed), atol=1e-6
        )


@pytest.mark.parametrize("size", [(32, 32), (37, 50)])
def test_patches_are_a_convolution(size):
    images, weight = torch.randn(2, 3, *size), torch.randn(24, 3, 8, 8)
    assert torch.allclose(
        C.patch_tokens(images, weight),
        torch.nn.functional.conv2d(images, weight, stride=8),
        atol=1e-4,
    )


def test_the_last_block_for_the_first_tokens_alone():
    torch.manual_seed(0)
    transformer, x = C.Transformer(128, 3), torch.randn(2, 7, 128)
    for first, mask in ((1, None), (3, torch.full((7, 7), -torch.inf).triu(1))):
        alone = transformer(x, mask, first)
        assert alone.shape == (2, first, 128) and torch.allclose(
            alone, transformer(x, mask)[:, :first], atol=1e-5
        )


def test_attention_is_pytorch_s():
    torch.manual_seed(0)
    ours, theirs, x = (
        C.Attention(128, 2),
        torch.nn.MultiheadAttention(128, 2, batch_first=True),
        torch.randn(2, 7, 128),
    )
    assert [k for k, _ in ours.named_parameters()] == [k for k, _ in theirs.named_parameters()]
    theirs.load_state_dict(ours.state_dict())
    mask = torch.full((7, 7), -torch.inf).triu(1)
    for m in (None, mask):
        assert torch.allclose(ours(x, m), theirs(x, x, x, attn_mask=m)[0], atol=1e-5)


def test_region_tokens_see_their_patches_alone(small_clip):
    """A token over everything is the image's own class token; pixels far from a region do not
    reach it in one block.
    """
    visual = small_clip.visual
    torch.manual_seed(0)
    image, everything = torch.randn(1, 3, 48, 64), torch.ones(1, 48, 64)
    masks = torch.cat([everything, torch.zeros(2, 48, 64)])
    masks[1, :16, :16] = masks[2, :6, :6] = 1  # one patch; less than half of it
    tokens = visual.region_tokens(image, masks)
    assert (
        tokens.shape == (3, 64)
        and torch.isfinite(tokens).all()
        and torch.allclose(tokens[1], tokens[2], atol=1e-5)
    )
    # Whatever the other regions.
    assert torch.allclose(visual.region_tokens(image, masks[1:2])[0], tokens[1], atol=1e-5)
    assert visual.stride == 16 and not torch.allclose(tokens[0], tokens[1], atol=1e-2)
