"""Metrics against counting by hand."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import tiny_config

from zsseg import metrics
from zsseg.config import load_config
from zsseg.datasets import DataSet
from zsseg.metrics import confusion, summarize, table

PLAIN = DataSet("plain", ["a", "b", "c", "d"], [], "", [], {}, [0, 1, 2, 3])
SPLIT = dataclasses.replace(PLAIN, unseen=["c", "d"])


def literal_iou(labels: np.ndarray, predicted: np.ndarray, c: int) -> float:
    valid = labels != 255
    both = ((labels == c) & (predicted == c) & valid).sum()
    either = (((labels == c) | (predicted == c)) & valid).sum()
    return 100 * both / either


def test_confusion_and_iou_on_random_maps():
    rng = np.random.default_rng(0)
    labels, predicted = rng.choice([0, 1, 2, 3, 255], (40, 50)), rng.integers(0, 4, (40, 50))
    matrix = confusion(torch.from_numpy(labels), torch.from_numpy(predicted), 4, 255)
    assert matrix.sum() == (labels != 255).sum() and matrix.dtype == torch.int64
    result = summarize(matrix, SPLIT)
    ious = [literal_iou(labels, predicted, c) for c in range(4)]
    seen, unseen = np.mean(ious[:2]), np.mean(ious[2:])
    valid = labels != 255
    right = labels == predicted
    weights = [(labels == c).sum() / valid.sum() for c in range(4)]
    wanted = {
        "mIoU": np.mean(ious),
        "mIoU_gt": np.mean(ious),
        "mIoU_seen": seen,
        "mIoU_unseen": unseen,
        "hIoU": 2 * seen * unseen / (seen + unseen),
        "pAcc": 100 * right[valid].mean(),
        "pAcc_seen": 100 * right[valid & (labels < 2)].mean(),
        "pAcc_unseen": 100 * right[valid & (labels >= 2)].mean(),
        "mAcc": np.mean([100 * right[labels == c].mean() for c in range(4)]),
        "fwIoU": np.dot(weights, ious),
    }
    assert [v["IoU"] for v in result.pop("per_class").values()] == pytest.approx(ious)
    assert result == pytest.approx(wanted)


def test_a_class_predicted_but_absent_counts_in_the_originals_rule_only():
    matrix = torch.zeros(4, 4, dtype=torch.int64)
    matrix[0, 0], matrix[0, 3] = 75, 25  # class 3 has no ground truth
    result = summarize(matrix, PLAIN)
    assert result["mIoU"] == pytest.approx(75 / 2) and result["mIoU_gt"] == pytest.approx(75)
    assert result["per_class"]["d"] == {"IoU": None, "Acc": None}
    assert "hIoU" not in result and "pAcc_seen" not in result


def test_nothing_measured_is_null_and_all_wrong_is_zero():
    ignored = torch.full((3, 3), 255)
    nothing = summarize(confusion(ignored, torch.zeros(3, 3, dtype=torch.int64), 4, 255), SPLIT)
    assert all(value is None for key, value in nothing.items() if key != "per_class")
    matrix = torch.diag(torch.tensor([7, 7, 0, 0]))
    matrix[0, 2] = 7  # no ground truth of c, though it is predicted
    result = summarize(matrix, SPLIT)
    assert result["mIoU_unseen"] is None is result["hIoU"] and result["pAcc_unseen"] is None
    assert result["mIoU_seen"] == pytest.approx(75)
    assert result["mIoU"] == pytest.approx((50 + 100) / 3)  # METHOD: with gt or predictions
    missed = summarize(matrix.T.contiguous(), SPLIT)
    assert missed["mIoU_unseen"] == 0 == missed["hIoU"]
    for values in (nothing, result):
        json.loads(json.dumps(values, allow_nan=False))
        assert "-" in table(values, tiny_config()).splitlines()[1]


def test_a_perfect_prediction_is_100():
    labels = torch.arange(4).repeat(5, 1)
    result = summarize(confusion(labels, labels, 4, 255), SPLIT)
    assert all(result[name] == 100 for name in metrics.METRICS)


def test_the_table_shows_the_parts_side_by_side():
    result = summarize(torch.eye(4, dtype=torch.int64) * 7, SPLIT)
    accuracy = {"accuracy": 91.25, "regions": 12, "accuracy_seen": 93.0}
    result |= {"head_only": result, "weight_0.3": result, "clip_true_masks": accuracy}
    lines = table(result, tiny_config()).splitlines()
    assert lines[0].split() == ["seen", "unseen", "hIoU", "mIoU", "pAcc"]
    starts = ["MaskFormer only", "ensemble, weight 0.3", "ensemble", "CLIP on the ground-truth"]
    assert all(line.startswith(start) for line, start in zip(lines[1:5], starts, strict=True))
    assert "91.2" in lines[4] and "d " in lines[-1]
    for setting, title in (
        ("model.proposals=false", "one-stage baseline"),
        ("clip.ensemble=false", "MaskFormer only"),
        ("clip.ensemble_weight=0", "CLIP only"),
    ):
        assert metrics.method(load_config(None, [setting])) == title
