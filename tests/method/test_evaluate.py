"""Measuring: parts and weights from one pass, the error budget."""

import contextlib
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PROCESS, tiny_config, tiny_segmenter
from PIL import Image

from zsseg.analysis import count_oracles, mask_iou, oracle_analysis, write_analysis
from zsseg.datasets import dataset, find_pairs
from zsseg.evaluate import evaluate
from zsseg.metrics import summarize


def test_a_sweep_equals_separate_evaluations(shapes_root):
    config = tiny_config("eval.weights=[0.2, 0.5]", "eval.compare=true")
    once = evaluate(tiny_segmenter(), config, shapes_root, PROCESS, "test")
    for setting, name in (
        ("clip.ensemble_weight=0.2", "weight_0.2"),
        ("clip.ensemble_weight=0.5", "weight_0.5"),
        ("clip.ensemble_weight=0.0", "clip_only"),
        ("clip.ensemble=false", "head_only"),
    ):
        config = tiny_config(setting, "eval.compare=false")
        alone = evaluate(tiny_segmenter(setting), config, shapes_root, PROCESS, "test")
        assert {k: alone[k] for k in once[name]} == once[name], name
    segmenter = tiny_segmenter()
    segmenter.set_classes(["star", "tree"], [0])
    proposals = segmenter.propose(torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8))
    objectness = proposals.class_probs.sum(1, keepdim=True) * proposals.valid[:, None]
    found = segmenter.variants(proposals, [])["clip_objectness"]
    assert torch.allclose(found, proposals.clip_probs * objectness)


def test_predictions_do_not_depend_on_the_truth(shapes_root, tmp_path):
    """The score is only ever computed against true labels, and nothing of them reaches the
    prediction.
    """
    other = tmp_path / "root"
    shutil.copytree(shapes_root, other)
    for _, label in find_pairs(tiny_config().data, other, "test"):
        values = np.asarray(Image.open(label))
        changed = np.where(values == 255, 255, (values + 7) % 25).astype(np.uint8)
        Image.fromarray(changed).save(label)
    maps, scores = [], []
    for root in (shapes_root, other):
        keep = lambda number, name, image, labels, predicted, matrix: maps.append(predicted)
        segmenter = tiny_segmenter("model.num_queries=32")
        result = evaluate(segmenter, tiny_config(), root, PROCESS, "test", on_image=keep)
        scores.append(result["per_class"])
    assert len(maps) == 8 and all(map(torch.equal, maps[:4], maps[4:]))
    assert scores[0] != scores[1] and torch.stack(maps).unique().numel() > 1


# The error budget


def test_overlaps_are_iou_over_known_pixels():
    ours, truth = torch.zeros(2, 4, 4, dtype=torch.bool), torch.zeros(2, 4, 4, dtype=torch.bool)
    ours[0, :2], ours[1, 3], truth[0, 1:3] = True, True, True
    truth[1] = ~truth[0]
    assert mask_iou(ours, truth)[:, 0].tolist() == pytest.approx([4 / 12, 0])
    truth[1, 0] = False
    assert float(mask_iou(ours, truth)[0, 0]) == pytest.approx(4 / 8)


def test_the_budget_s_oracles(shapes_root, tmp_path, capsys):
    config, segmenter = tiny_config(), tiny_segmenter()
    seen = dataset(config.data).seen
    result = oracle_analysis(segmenter, config, shapes_root, PROCESS, "test", seen)
    plain = evaluate(segmenter, config, shapes_root, PROCESS, "test")
    assert result["as_is"] == {k: plain[k] for k in result["as_is"]}
    assert all(result["both"][k] == 100 for k in ("mIoU_gt", "pAcc"))
    assert result["both"]["mIoU_seen"] == 100 and 0 <= result["true_classes"]["mIoU"] <= 100
    assert result["recall"]["0.5"] >= result["recall"]["0.7"] >= result["recall"]["0.9"]
    assert result["masks"] > 0 and 0 <= result["clip_accuracy"] < 100
    write_analysis(result, tmp_path)
    assert "GT masks, predicted classes" in capsys.readouterr().out
    assert json.loads((tmp_path / "budget.json").read_text()) == result


def test_with_perfect_masks_only_classes_cost():
    """GT classes then give nearly 100; those of an untrained segmenter do not."""
    segmenter, data = tiny_segmenter("model.num_queries=25"), dataset("shapes")
    segmenter.set_classes(data.names, data.seen)
    labels = torch.arange(9).view(3, 3).repeat_interleave(32, 0).repeat_interleave(32, 1)
    image = torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8)
    proposals = segmenter.propose(image)
    small = F.interpolate(labels[None, None].float(), proposals.mask_logits.shape[1:])[0]
    proposals.mask_logits = 40 * (small == torch.arange(25)[:, None, None]).float() - 20
    segmenter.propose = lambda image: proposals
    counts, overlaps = count_oracles(segmenter, image, labels, data, contextlib.nullcontext())
    as_is, true_classes, *_ = (summarize(matrix, data)["mIoU_gt"] for matrix in counts)
    assert true_classes > 90 > as_is and overlaps.min() > 0.9
