"""The ensemble, the score maps and what must not change the result."""

import subprocess

import pytest
import torch
from conftest import tiny_clip_state, tiny_config

import eval as evaluation
from zsseg import distributed
from zsseg.distributed import Process
from zsseg.segmenter import Proposals, Segmenter
from zsseg.utils import UserError


def random_image(height: int = 50, width: int = 70) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize("size", [(1, 1), (33, 64), (50, 71), (64, 64)])
def test_any_size_gives_a_label_map_of_any_size(segmenter, size):
    labels = segmenter(random_image(*size), (37, 91))
    assert labels.shape == (37, 91) and labels.dtype == torch.int64
    assert labels.min() >= 0 and labels.max() < 3


def test_ensemble_weights_seen_and_unseen_the_other_way_round(segmenter):
    torch.manual_seed(0)
    head, region = torch.rand(8, 3), torch.rand(8, 3)
    valid = torch.arange(8) % 2 == 0
    proposals = Proposals(torch.randn(8, 8, 8), (30, 31), head, region, valid)
    scores = segmenter.ensemble(proposals, 0.7)
    assert torch.allclose(scores[:, :2], head[:, :2] ** 0.7 * region[:, :2] ** 0.3)
    assert torch.allclose(scores[:, 2], head[:, 2] ** 0.3 * region[:, 2] ** 0.7)
    alone = segmenter.ensemble(proposals, 0)
    assert torch.equal(alone[valid], region[valid]) and (alone[~valid] == 0).all()
    maps = segmenter.score_map(alone, proposals, (30, 31))
    few = Proposals(
        proposals.mask_logits[valid], (30, 31), head[valid], region[valid], valid[valid]
    )
    assert torch.allclose(maps, segmenter.score_map(region[valid], few, (30, 31)), rtol=1e-5)
    assert torch.equal(segmenter.label_map(alone, proposals, (30, 31))[0], maps.argmax(0))


@pytest.mark.parametrize(
    "setting", ["clip.regions=crops", "clip.regions=pool", "clip.ensemble=false"]
)
def test_words_may_change_after_the_pass(setting):
    """Bit-exact: neither masks nor features depend on the words."""
    torch.manual_seed(0)
    segmenter = Segmenter(tiny_config(setting), tiny_clip_state()).eval()
    segmenter.set_classes(["star", "tree", "brick"], [0, 1])
    earlier = segmenter.propose(random_image())
    segmenter.set_classes(["cat", "a dog"], [1], {"cat": ["kitten"]})
    late, fresh = segmenter.classify(earlier), segmenter.propose(random_image())
    assert earlier.class_probs.shape[1] == 3 and late.class_probs.shape[1] == 2
    assert torch.equal(late.class_probs, fresh.class_probs)
    assert torch.equal(segmenter.ensemble(late), segmenter.ensemble(fresh))


def test_without_a_split_all_classes_count_as_unseen(segmenter):
    segmenter.set_classes(["star", "tree"])
    head, region = torch.rand(8, 2), torch.rand(8, 2)
    scores = segmenter.ensemble(
        Proposals(torch.rand(8, 8, 8), (30, 31), head, region, torch.ones(8).bool()), 0.8
    )
    assert torch.allclose(scores, head**0.2 * region**0.8)


def test_invalid_queries_leave_the_class_to_the_head(segmenter):
    segmenter.config.mask_threshold = 1.0  # no pixel exceeds it
    proposals = segmenter.propose(random_image())
    assert not proposals.valid.any() and (proposals.clip_probs == 1).all()
    assert segmenter.score_map(segmenter.ensemble(proposals, 0), proposals, (5, 5)).abs().sum() == 0


def test_ensemble_can_be_switched_off(segmenter):
    segmenter.config.ensemble = False
    proposals = segmenter.propose(random_image())
    assert proposals.clip_probs is None
    assert segmenter.ensemble(proposals) is proposals.class_probs


def test_class_order_only_renames_the_classes(segmenter):
    names = segmenter.names
    maps = []
    for order, seen in ((names, [0, 1]), (names[::-1], [1, 2])):
        segmenter.set_classes(order, seen)
        proposals = segmenter.propose(random_image())
        maps.append(segmenter.score_map(segmenter.ensemble(proposals), proposals, (50, 70)))
    first, second = maps
    assert torch.allclose(first, second.flip(0), rtol=1e-4, atol=1e-6)


def test_regions_may_have_a_prompt_of_their_own(segmenter):
    from conftest import tiny_clip_state, tiny_config

    from zsseg.segmenter import Segmenter

    config = tiny_config("clip.region_prompt=learned", "clip.prompt_prefix=3")
    separate = Segmenter(config, tiny_clip_state()).eval()
    separate.maskformer.load_state_dict(segmenter.maskformer.state_dict())
    separate.set_classes(segmenter.names, [0, 1])
    assert torch.equal(separate.text_features, segmenter.text_features) and not torch.allclose(
        separate.region_text_features, separate.text_features, atol=1e-3
    )
    ours, other = separate.propose(random_image()), segmenter.propose(random_image())
    assert torch.equal(ours.class_probs, other.class_probs) and not torch.equal(
        ours.clip_probs, other.clip_probs
    )
    parts = separate.learned_state()
    assert set(parts) == {"maskformer", "region_prompt"}
    again = Segmenter(config, tiny_clip_state(1))
    again.load_learned(parts, "test")
    assert torch.equal(again.region_prompt.prefix, separate.region_prompt.prefix)
    with pytest.raises(UserError, match="no learned region_prompt"):
        again.load_learned({"maskformer": parts["maskformer"]}, "test")


@pytest.mark.parametrize(
    ("names", "message"),
    [(["cat", " "], "class 1: has no name"), (["cat", "cat "], "stands twice")],
)
def test_names_are_checked(segmenter, names, message):
    with pytest.raises(UserError, match=message):
        segmenter.set_classes(names)


def test_on_a_cpu_bf16_is_for_clip_alone(segmenter):
    """The masks are those of fp32; CLIP's probabilities are near, in another precision."""
    image, dtypes = random_image(), set()
    plain = segmenter.propose(image)
    hook = segmenter.clip.visual.transformer.resblocks[0].mlp.c_fc.register_forward_hook(
        lambda m, x, y: dtypes.add(y.dtype)
    )
    with Process(torch.device("cpu")).autocast("on"):
        rough = segmenter.propose(image)
    hook.remove()
    assert dtypes == {torch.bfloat16}
    assert torch.equal(rough.mask_logits, plain.mask_logits) and torch.equal(
        rough.class_probs, plain.class_probs
    )
    assert 0 < (rough.clip_probs - plain.clip_probs).abs().max() < 0.05


@pytest.mark.parametrize(
    ("amx", "avx512", "kernels", "has"),
    [
        (True, False, "AVX512", True),
        (False, True, "AVX512", True),
        (False, False, "AVX512", False),
        (True, True, "AVX2", False),
        (True, True, "DEFAULT", False),
    ],
)
def test_bf16_is_on_by_itself_where_the_cpu_multiplies_in_it(
    monkeypatch, capsys, amx, avx512, kernels, has
):
    """And PyTorch may use it; in training only where it is asked for."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kernels)
    process = Process(torch.device("cpu"))
    for setting, training, expected in (
        ("auto", False, has),
        ("auto", True, False),
        ("on", False, True),
        ("on", True, True),
        ("off", False, False),
    ):
        assert process.bf16(setting, training) == expected
        process.describe(setting, training)
        line = capsys.readouterr().out
        assert kernels in line and ("bf16" in line) == expected, line
    assert Process(torch.device("cuda", 0)).bf16("auto", training=True)


@pytest.mark.slow  # Inductor
@pytest.mark.parametrize(
    ("compiler", "images", "compiled"), [("", 1000, True), ("false", 1000, False), ("", 999, False)]
)
def test_on_a_cpu_clip_is_compiled_for_many_images(
    segmenter, monkeypatch, capsys, compiler, images, compiled
):
    """Where there is a C++ compiler; elsewhere the run goes on without, and says so."""
    distributed.can_compile.cache_clear()
    if compiler:
        monkeypatch.setattr(
            torch, "compile", lambda f: lambda x: subprocess.run([compiler], check=True)
        )
    evaluation.compile_for(images, segmenter, tiny_config(), Process(torch.device("cpu")))
    assert segmenter.clip.bucketed == compiled
    assert (segmenter.clip.visual._compiled_call_impl is not None) == compiled
    assert segmenter.maskformer.inference == segmenter.maskformer.decode
    assert ("not compiled" in capsys.readouterr().out) == bool(compiler)
    distributed.can_compile.cache_clear()
