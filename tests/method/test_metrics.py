"""Metrics against counting by hand, and the tables that show them."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import tiny_config

from zsseg import metrics
from zsseg.datasets import DataSet
from zsseg.metrics import confusion, report, summarize

PLAIN = DataSet("plain", ["a", "b", "c", "d"], [], "", [], {}, [0, 1, 2, 3])
SPLIT = dataclasses.replace(PLAIN, unseen=["c", "d"])


def test_metrics_of_random_maps():
    rng = np.random.default_rng(0)
    labels, predicted = rng.choice([0, 1, 2, 3, 255], (40, 50)), rng.integers(0, 4, (40, 50))
    matrix = confusion(torch.from_numpy(labels), torch.from_numpy(predicted), 4, 255)
    assert matrix.sum() == (labels != 255).sum() and matrix.dtype == torch.int64
    result = summarize(matrix, SPLIT)
    valid = labels != 255
    right = labels == predicted
    sides = [((labels == c) & valid, (predicted == c) & valid) for c in range(4)]
    ious = [100 * (a & b).sum() / (a | b).sum() for a, b in sides]
    seen, unseen = np.mean(ious[:2]), np.mean(ious[2:])
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


def test_nothing_measured_is_null_and_all_wrong_is_zero():
    ignored = torch.full((3, 3), 255)
    nothing = summarize(confusion(ignored, torch.zeros(3, 3, dtype=torch.int64), 4, 255), SPLIT)
    assert all(value is None for key, value in nothing.items() if key != "per_class")
    matrix = torch.diag(torch.tensor([7, 7, 0, 0]))
    matrix[0, 2] = 7  # no ground truth of c, though it is predicted
    result = summarize(matrix, SPLIT)
    assert result["mIoU_unseen"] is None is result["hIoU"] and result["pAcc_unseen"] is None
    assert result["mIoU_seen"] == pytest.approx(75)
    assert result["per_class"]["c"] == {"IoU": None, "Acc": None}
    assert result["mIoU"] == pytest.approx((50 + 100) / 3)  # METHOD: with gt or predictions
    assert result["mIoU_gt"] == pytest.approx((50 + 100) / 2)
    assert not {"hIoU", "pAcc_seen"} & summarize(matrix, PLAIN).keys()
    missed = summarize(matrix.T.contiguous(), SPLIT)
    assert missed["mIoU_unseen"] == 0 == missed["hIoU"]
    for values in (nothing, result):
        json.dumps(values, allow_nan=False)
        assert "-" in metrics.metric_table(metrics.rows(values))


def test_the_table_and_the_file(tmp_path, capsys):
    """A metric is an entry of METRICS: all are 100 where all is right."""
    result = summarize(torch.eye(4, dtype=torch.int64) * 7, SPLIT)
    assert all(result[name] == 100 for name in metrics.METRICS)
    result["per_class"]["b"] = {"IoU": None, "Acc": None}
    result = result | {"head_only": result, "weight_0.3": result}
    result |= {"ignored": 12.34, "images": 3, "images_per_second": 2.0}
    report(result, tiny_config(), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-5].split() == ["seen", "unseen", "hIoU", "mIoU", "pAcc"]
    titles = ["head only", "weight_0.3", "as configured"]
    assert [line.split("  ")[0] for line in lines[-4:-1]] == titles
    assert "not measured, without a pixel of ground truth: b" in lines
    assert "12.3% of the pixels have no class and do not count" in lines
    assert json.loads((tmp_path / "metrics.json").read_text()) == result
