"""Tokenizer, class names and prompts beyond the reference values."""

import pytest
import torch
import torch.nn.functional as F

from zsseg.prompts import TEMPLATES, FixedPrompt, LearnedPrompt, build_prompt
from zsseg.tokenizer import Tokenizer, check_names, clean
from zsseg.utils import UserError

A, B, Z = (ord(c) - ord("!") for c in "abz")  # ids of single bytes


def test_bytes_are_tokens_and_the_last_one_ends_the_word():
    tokenizer = Tokenizer(514, 12)
    assert tokenizer(["az A"]).tolist() == [[512, A, Z + 256, A + 256, 513, *[0] * 7]]
    first, last = tokenizer.encode("é")  # two bytes
    assert first < 256 <= last < 512
    assert sorted(tokenizer.index.values()) == list(range(512))


def test_merges_are_applied_by_rank_from_left_to_right():
    tokenizer = Tokenizer(517, 12, [("a", "b"), ("ab", "ab"), ("b", "a")])
    assert (tokenizer.start, tokenizer.end) == (515, 516)
    # "ab" is better than "ba", and "abab" is made of two; "b</w>" is no "b".
    assert tokenizer.encode("abababz") == [513, 512, Z + 256]
    assert tokenizer.encode("bab") == [514, B + 256]
    assert len(Tokenizer(515, 12, [("a", "a")]).encode("aaaz")) == 3
    assert tokenizer.encode("don't") == Tokenizer(514, 12).encode("don 't")


def test_a_text_that_does_not_fit_is_named(small_clip):
    tokenizer = Tokenizer(514, 8)
    assert tokenizer(["abcdef"])[0, -1] == 513
    with pytest.raises(UserError, match="text 'abcdefg': has 9 tokens, CLIP reads 8"):
        tokenizer(["abcdefg"])
    long = "a" * 35
    with pytest.raises(UserError, match=f"x {long} .': has 41 tokens, CLIP reads 40; shorten the"):
        LearnedPrompt(64, prefix=3)(small_clip, ["a", long])


def test_text_is_mended_as_clip_s_own_code_does():
    texts = (" Potted\t Plant\n", "rock &amp;amp; roll", "schÃ¶n", "ｃａｔ", "猫")
    assert [*map(clean, texts)] == ["potted plant", "rock & roll", "schön", "cat", "猫"]


@pytest.mark.parametrize(
    "names, why",
    [
        ("cat", "class names: are 'cat'; give a list"),
        ([], "class names: are []"),
        (["cat", " "], "class name 1: is '', empty to CLIP"),
        (["\u200b"], "empty to CLIP"),
        (["cat", "dog", "cat "], "class name 'cat': is given twice"),
        (["Cat", "cat"], "class name 'cat': is the same to CLIP as 'Cat'"),
        (["a  b", "a b"], "is the same to CLIP as"),
    ],
)
def test_names_that_clip_cannot_tell_apart_are_refused(names, why):
    with pytest.raises(UserError) as error:
        check_names(names)
    assert why in str(error.value)
    written = ["Cat", "wall-other", "dirt, earth"]
    assert check_names([f" {name}" for name in written]) == written


def test_templates():
    sizes = {name: len(templates) for name, templates in TEMPLATES.items()}
    assert sizes == {"single": 1, "imagenet": 80, "vild": 14}
    for name, templates in TEMPLATES.items():
        assert len(set(templates)) == len(templates)
        assert all(t.count("{}") == 1 and t == t.strip() for t in templates)
        assert build_prompt(name, 64).templates == templates
    assert TEMPLATES["single"] == ["a sculpture of a {}."]
    assert TEMPLATES["vild"][1] == "This is a photo of a {}"
    assert TEMPLATES["imagenet"][-1] == "a tattoo of the {}."
    for templates in (["a photo of a cat"], []):
        with pytest.raises(UserError, match=r"has no \{\} for the class name"):
            build_prompt(templates, 64)
    with pytest.raises(UserError, match=r"has no \{\} for"):
        FixedPrompt("a photo of a {}.")  # letters
    for spec in ("vild2", "a photo of a {}."):
        with pytest.raises(UserError, match=r"clip\.prompt: is .*; choose single, imagenet, vild"):
            build_prompt(spec, 64)


@torch.no_grad()
def test_fixed_prompts_are_a_mean_of_directions(small_clip):
    templates = ["a {}.", "the big {} in the scene, a {}", "{}"]
    names = ["star", "a {} brick"]
    features = FixedPrompt(templates)(small_clip, names)
    assert features.shape == (2, 64)
    for feature, name in zip(features, names, strict=True):
        texts = [template.replace("{}", name) for template in templates]
        single = F.normalize(small_clip.encode_text(small_clip.tokenizer(texts)), dim=-1)
        assert torch.allclose(feature, F.normalize(single.mean(0), dim=0), atol=1e-5)


def test_a_learned_prompt_stands_between_start_and_name(small_clip):
    prompt = build_prompt("learned", small_clip.width, prefix=3)
    tokens, ends = prompt.layout(small_clip, ["az", "a"])
    dot = small_clip.tokenizer.encode(".")
    assert tokens[0, 4:8].tolist() == [A, Z + 256, *dot, 513]
    assert ends.tolist() == [7, 6] and not tokens[1, 7:].any()
    x = prompt.embed(small_clip, tokens)
    assert x.shape == (2, 8, 64) and torch.equal(x[0, 1:4], prompt.prefix)
    assert torch.equal(x[1, [0, 4]], small_clip.token_embedding.weight[[512, A + 256]])
    features = prompt(small_clip, ["az", "a"])
    assert torch.allclose(features.norm(dim=-1), torch.ones(2))
    features[0, 0].backward()
    assert [name for name, p in prompt.named_parameters() if p.grad.abs().sum() > 0] == ["prefix"]
    assert all(p.grad is None for p in small_clip.parameters())
