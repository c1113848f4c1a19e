"""The ensemble, the score maps and what must not change the result."""

import pytest
import torch

from zsseg.run import UserError
from zsseg.segmenter import Proposals


def picture(height: int = 50, width: int = 70) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize("size", [(1, 1), (33, 64), (50, 71), (64, 64)])
def test_any_size_gives_a_label_map_of_any_size(segmenter, size):
    labels = segmenter(picture(*size), (37, 91))
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
    few = Proposals(proposals.logits[valid], (30, 31), head[valid], region[valid], valid[valid])
    assert torch.allclose(maps, segmenter.score_map(region[valid], few, (30, 31)), rtol=1e-5)
    assert torch.equal(segmenter.label_map(alone, proposals, (30, 31))[0], maps.argmax(0))


def test_without_a_split_all_classes_count_as_unseen(segmenter):
    segmenter.set_classes(["red disc", "blue square"])
    head, region = torch.rand(8, 2), torch.rand(8, 2)
    scores = segmenter.ensemble(Proposals(torch.rand(8, 8, 8), (30, 31), head, region, torch.ones(8).bool()), 0.8)
    assert torch.allclose(scores, head**0.2 * region**0.8)


def test_invalid_queries_leave_the_class_to_the_head(segmenter):
    segmenter.config.mask_threshold = 1.0  # no pixel exceeds it
    proposals = segmenter.propose(picture())
    assert not proposals.valid.any() and (proposals.region == 1).all()
    assert segmenter.score_map(segmenter.ensemble(proposals, 0), proposals, (5, 5)).abs().sum() == 0


def test_ensemble_can_be_switched_off(segmenter):
    segmenter.config.ensemble = False
    proposals = segmenter.propose(picture())
    assert proposals.region is None
    assert segmenter.ensemble(proposals) is proposals.head


def test_class_order_only_renames_the_classes(segmenter):
    names = segmenter.names
    maps = []
    for order, seen in ((names, [0, 1]), (names[::-1], [1, 2])):
        segmenter.set_classes(order, seen)
        proposals = segmenter.propose(picture())
        maps.append(segmenter.score_map(segmenter.ensemble(proposals), proposals, (50, 70)))
    first, second = maps
    assert torch.allclose(first, second.flip(0), rtol=1e-4, atol=1e-6)


def test_regions_may_have_a_prompt_of_their_own(segmenter):
    from conftest import tiny_clip_state, tiny_config

    from zsseg.segmenter import Segmenter

    config = tiny_config("clip.region_prompt=learned", "clip.prompt_prefix=3", "clip.prompt_suffix=2")
    separate = Segmenter(config, tiny_clip_state()).eval()
    separate.maskformer.load_state_dict(segmenter.maskformer.state_dict())
    separate.set_classes(segmenter.names, [0, 1])
    assert torch.equal(separate.text, segmenter.text) and not torch.allclose(separate.region_text, separate.text, atol=1e-3)
    ours, other = separate.propose(picture()), segmenter.propose(picture())
    assert torch.equal(ours.head, other.head) and not torch.equal(ours.region, other.region)
    parts = separate.learned_state()
    assert set(parts) == {"maskformer", "region_prompt"}
    again = Segmenter(config, tiny_clip_state(1))
    again.load_learned(parts, "test")
    assert torch.equal(again.region_prompt.suffix, separate.region_prompt.suffix)
    with pytest.raises(UserError, match="no learned region_prompt"):
        again.load_learned({"maskformer": parts["maskformer"]}, "test")


@pytest.mark.parametrize(("names", "message"), [(["cat", " "], "class 1: has no name"), (["cat", "cat "], "stands twice")])
def test_names_are_checked(segmenter, names, message):
    with pytest.raises(UserError, match=message):
        segmenter.set_classes(names)
