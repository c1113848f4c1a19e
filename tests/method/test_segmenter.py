"""The ensemble, score maps, test-time augmentation, and what must not change the result."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_segmenter

from zsseg import segmenter as module
from zsseg.distributed import Process
from zsseg.segmenter import Proposals, windows
from zsseg.utils import UserError


def random_image(height: int = 50, width: int = 70) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def random_proposals(C: int = 3) -> Proposals:
    torch.manual_seed(0)
    valid = torch.arange(8) % 2 == 0
    features = torch.randn(8, 64), torch.randn(4, 64)
    probs = torch.rand(8, C), torch.rand(8, C)
    return Proposals(torch.randn(8, 8, 8), (30, 31), valid, *features, *probs)


@pytest.mark.parametrize("size", [(1, 1), (33, 64), (50, 71), (64, 64)])
def test_any_size_gives_a_label_map_of_any_size(segmenter, size):
    found = segmenter.segment([random_image(*size)], (37, 91))
    assert found.labels.shape == found.scores.shape == (37, 91) and (found.scores >= 0).all()
    assert found.labels.dtype == torch.int64 and 0 <= found.labels.min() <= found.labels.max() < 3


def test_ensemble_weights_seen_and_unseen_the_other_way_round(segmenter):
    """p^w c^(1-w) and p^(1-w) c^w; w = 0: CLIP on the valid masks; without a split all are
    unseen, and so with `ensemble_seen = false`, which changes no split.
    """
    proposals = random_proposals()
    p, c, valid = proposals.class_probs, proposals.clip_probs, proposals.valid
    scores = segmenter.ensemble(proposals, 0.7)
    assert torch.allclose(scores[:, :2], p[:, :2] ** 0.7 * c[:, :2] ** 0.3)
    assert torch.allclose(scores[:, 2], p[:, 2] ** 0.3 * c[:, 2] ** 0.7)
    alone = segmenter.ensemble(proposals, 0)
    assert torch.equal(alone[valid], c[valid]) and (alone[~valid] == 0).all()
    segmenter.config.ensemble_seen = False
    assert torch.allclose(segmenter.ensemble(proposals, 0.8), p**0.2 * c**0.8)
    assert segmenter.seen.tolist() == [True, True, False]
    segmenter.config.ensemble_seen = True
    segmenter.set_classes(segmenter.names)
    assert torch.allclose(segmenter.ensemble(proposals, 0.8), p**0.2 * c**0.8)


def test_score_maps_are_sums_over_masks(segmenter, monkeypatch):
    """However many classes are computed at once."""
    proposals = random_proposals(5)
    scores, size = torch.rand(8, 5), (40, 45)
    masks = F.interpolate(proposals.mask_logits[None], (32, 32), mode="bilinear")[0].sigmoid()
    maps = torch.einsum("qc,qhw->chw", scores, masks[:, :30, :31])
    wanted = F.interpolate(maps[None], size, mode="bilinear")[0]
    found = segmenter.label_map(scores, proposals, size, all_scores=True)[2]
    assert torch.allclose(found, wanted, atol=1e-5)
    for classes_at_once in (1, 2, 5, 64):
        pixels = 30 * 31 + 40 * 45
        monkeypatch.setattr(module, "MAX_SCORE_BYTES", 4 * pixels * classes_at_once)
        labels, best, _ = segmenter.label_map(scores, proposals, size)
        assert torch.equal(labels, wanted.argmax(0)) and torch.allclose(best, wanted.amax(0))


SETTINGS = ["clip.regions=crops", "clip.regions=pool", "clip.ensemble=false"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_words_may_change_after_the_pass(setting):
    """Bit-exact: neither masks nor features depend on the words."""
    segmenter = tiny_segmenter(setting)
    earlier = segmenter.propose(random_image())
    segmenter.set_classes(["cat", "a dog"], [1], {"cat": ["kitten"]})
    late, fresh = segmenter.classify(earlier), segmenter.propose(random_image())
    assert earlier.class_probs.shape[1] == 3 and late.class_probs.shape[1] == 2
    assert torch.equal(late.class_probs, fresh.class_probs)
    assert torch.equal(segmenter.ensemble(late), segmenter.ensemble(fresh))
    again = segmenter.segment([random_image()], (50, 70), proposals=earlier)
    assert torch.equal(again.labels, segmenter.segment([random_image()], (50, 70)).labels)


def test_a_synonym_shares_in_the_feature_and_every_word_is_encoded_once(segmenter, monkeypatch):
    segmenter.set_classes(["sofa", "couch", "dog"])
    sofa, couch, dog = segmenter.text_features
    monkeypatch.setattr(segmenter.prompt, "forward", None)  # encodes nothing
    segmenter.set_classes([" sofa", "dog"], synonyms={"sofa ": ["couch"]})
    wanted = torch.stack([F.normalize(sofa + couch, dim=0), dog])
    assert torch.allclose(segmenter.text_features, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "synonyms", "message"),
    [
        (["cat", "cat "], {}, "is given twice"),
        ("cat", {}, "'cat'; give a list"),
        (["cat", "very " * 90], {}, "tokens"),
        (["cat"], {"cat": "kitten"}, "lists of words"),
        (["cat"], {"dog": ["puppy"]}, "names of classes"),
        (["cat", "dog"], {"cat": ["dog"]}, "is given twice"),
    ],
)
def test_refused_words_change_nothing(segmenter, names, synonyms, message):
    before = segmenter.text_features
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            segmenter.set_classes(names, [], synonyms)
        assert segmenter.names == ["star", "tree", "brick"] and segmenter.text_features is before
        assert segmenter.seen.tolist() == [True, True, False]


def test_a_part_may_be_missing(segmenter):
    """Invalid queries leave the class to the head, and so does `ensemble = false`."""
    segmenter.config.mask_threshold = 1.0  # no pixel exceeds it
    proposals = segmenter.propose(random_image())
    assert not proposals.valid.any() and (proposals.clip_probs == 1).all()
    assert not segmenter.ensemble(proposals, 0).any()
    segmenter.config.ensemble = False
    proposals = segmenter.propose(random_image())
    assert proposals.clip_probs is None
    assert segmenter.ensemble(proposals) is proposals.class_probs


def test_class_order_only_renames_the_classes():
    segmenter = tiny_segmenter()
    maps = []
    for order, seen in ((segmenter.names, [0, 1]), (segmenter.names[::-1], [1, 2])):
        segmenter.set_classes(order, seen)
        maps.append(segmenter.score_map(random_image(), (50, 70)))
    assert torch.allclose(maps[0], maps[1].flip(0), rtol=1e-4, atol=1e-6)


def test_regions_may_have_another_prompt():
    separate = tiny_segmenter("clip.region_prompt=learned", "clip.prompt_prefix=3")
    segmenter = tiny_segmenter()
    segmenter.maskformer.load_state_dict(separate.maskformer.state_dict())
    assert torch.equal(separate.text_features, segmenter.text_features)
    texts = separate.region_text_features, separate.text_features
    assert not torch.allclose(*texts, atol=1e-3)
    ours, other = separate.propose(random_image()), segmenter.propose(random_image())
    assert torch.equal(ours.class_probs, other.class_probs)
    assert not torch.equal(ours.clip_probs, other.clip_probs)
    assert {*separate.learned_state()} == {"maskformer", "region_prompt"}


def test_on_a_cpu_bf16_is_for_clip_alone():
    """The masks are those of fp32; CLIP's probabilities are near, in another precision."""
    segmenter, image, dtypes = tiny_segmenter(), random_image(), set()
    plain = segmenter.propose(image)
    layer = segmenter.clip.visual.transformer.resblocks[0].mlp.c_fc
    hook = layer.register_forward_hook(lambda m, x, y: dtypes.add(y.dtype))
    with Process(torch.device("cpu")).autocast("on"):
        rough = segmenter.propose(image)
    hook.remove()
    assert dtypes == {torch.bfloat16}
    assert torch.equal(rough.mask_logits, plain.mask_logits)
    assert torch.equal(rough.class_probs, plain.class_probs)
    assert 0 < (rough.clip_probs - plain.clip_probs).abs().max() < 0.05
    segmenter.accelerate(torch.bfloat16)  # the same roundings but for QuickGELU's factor
    with Process(torch.device("cpu")).autocast("on"):
        fast = segmenter.propose(image)
    assert 0 < (fast.clip_probs - rough.clip_probs).abs().max() < 0.05
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.is_mkldnn


@pytest.mark.parametrize("backbone", ["small", "R101c"])
def test_networks_that_are_made_fast_give_the_same(backbone):
    """Folded norms and factors, packed weights."""
    segmenter, image = tiny_segmenter(f"model.backbone={backbone}"), random_image(64, 96)
    state = segmenter.maskformer.state_dict()
    for name in (name for name in state if ".bn" in name and "tracked" not in name):
        state[name] = torch.rand_like(state[name]) + 0.1
    segmenter.maskformer.load_state_dict(state)
    plain = segmenter.propose(image)
    segmenter.accelerate(torch.float32)
    fast = segmenter.propose(image)
    assert torch.allclose(fast.mask_logits, plain.mask_logits, rtol=1e-3, atol=1e-3)
    assert torch.allclose(fast.class_probs, plain.class_probs, atol=1e-4)
    assert torch.allclose(fast.clip_probs, plain.clip_probs, atol=1e-4)
    assert not any(p.requires_grad for p in segmenter.parameters() if p.ndim > 1)


# Test-time augmentation


@pytest.mark.parametrize(("length", "side"), [(1, 30), (64, 64), (130, 64), (200, 64), (9, 0)])
def test_windows_cover_the_image_and_overlap(length, side):
    found = windows(length, side, 50)
    count, places = np.zeros(length, int), np.zeros(50, int)
    for window, place in found:
        assert window.stop - window.start == min(side or length, length)
        assert place.start / 50 <= window.start / length < window.stop / length <= place.stop / 50
        count[window] += 1
        places[place] += 1
    assert count.min() >= 1 <= places.min() and (len(found) == 1) == (length <= (side or length))


@pytest.mark.parametrize("regions", ["crops", "pool"])
def test_views_are_the_mean_over_sizes_of_the_mean_over_windows(regions):
    """However many windows a size has; and of mirror images."""
    segmenter = tiny_segmenter(f"clip.regions={regions}", "clip.dense_edge=32")
    images, size, sums = [random_image(64, 64), random_image(64, 96)], (50, 61), []
    for image in images:
        total, count = torch.zeros(3, *size), torch.zeros(size)
        for columns, place in windows(image.shape[2], 64, 61):
            for flip in (False, True):
                part = image[:, :, columns]
                shape = (50, place.stop - place.start)
                maps = segmenter.score_map(part.flip(-1) if flip else part, shape)
                total[..., place] += maps.flip(-1) if flip else maps
                count[:, place] += 1
        sums.append(total / count)
    assert count.max() == 6
    mean = (sums[0] + sums[1]) / 2
    found = segmenter.segment(images, size, flip=True, window=64)
    assert torch.allclose(found.scores, mean.amax(0), atol=1e-6)
    assert (found.labels == mean.argmax(0)).float().mean() > 0.999 and not found.variants
