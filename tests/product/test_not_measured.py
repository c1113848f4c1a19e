"""Nothing to measure is no zero, and NaN is no number."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import command, fails_in_one_line
from own_data import blocks, measure, save_pair, train

from train import Segment
from zsseg import checkpoint
from zsseg.config import load_config
from zsseg.datasets import dataset
from zsseg.metrics import summarize, table


def test_metrics_of_nothing_are_null():
    data = dataset(
        load_config(
            None,
            [
                "data.name=folder",
                "data.classes=['a','b','c']",
                "data.unseen=['c']",
                "data.images={split}/{id}.png",
                "data.labels={split}/{id}_.png",
            ],
        ).data
    )
    empty = summarize(torch.zeros(3, 3, dtype=torch.int64), data)
    assert all(empty[k] is None for k in empty if k != "per_class")
    # No ground truth of c, though it is predicted.
    half = torch.tensor([[8, 0, 2], [0, 10, 0], [0, 0, 0]])
    result = summarize(half, data)
    assert (
        result["mIoU_unseen"] is None and result["hIoU"] is None and result["pAcc_unseen"] is None
    )
    assert result["mIoU_seen"] == pytest.approx(90) and result["mIoU_gt"] == pytest.approx(90)
    # METHOD: divided by those with ground truth or predictions.
    assert result["mIoU"] == pytest.approx((80 + 100) / 3)
    missed = summarize(torch.tensor([[10, 0, 0], [0, 10, 0], [5, 0, 0]]), data)
    assert missed["mIoU_unseen"] == 0 and missed["hIoU"] == 0  # measured, and all wrong
    for metrics in (empty, result):
        json.loads(json.dumps(metrics, allow_nan=False))
        assert "-" in table(metrics)


def test_best_is_chosen_by_what_was_measured():
    score = lambda **result: Segment.score(None, result)
    assert score(hIoU=None, mIoU=35.9) > score(hIoU=None, mIoU=27.0) > score(hIoU=None, mIoU=None)
    assert score(hIoU=0.0, mIoU=35.9) > score(hIoU=0.0, mIoU=27.0)
    assert score(hIoU=1.0, mIoU=5.0) > score(hIoU=0.9, mIoU=50.0)
    assert score(mIoU=3.0) > score(mIoU=2.0) and score(mIoU=None) == [-math.inf, -math.inf]


def test_the_best_of_a_run_without_unseen_ground_truth(root):
    for i in range(2):
        save_pair(root, "val", str(i), np.minimum(blocks(), 1))
    done = train(root, "--set", "train.eval_every=1", "--set", "data.unseen=['grass']")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (root / "r" / "metrics.jsonl").read_text().splitlines()]
    scores = {
        line["step"]: line["val/mIoU"] for line in lines if "val/mIoU" in line and line["step"] < 4
    }
    assert (
        all(line["val/hIoU"] is None for line in lines if "val/hIoU" in line) and len(scores) == 3
    )
    best = max(scores.values())
    assert checkpoint.load(root / "r" / "best.pt")["step"] == next(
        step for step in scores if scores[step] == best
    )


def test_weights_that_are_not_finite_are_named(root, trained):
    content = checkpoint.load(trained)
    name = next(iter(content["model"]["maskformer"]))
    content["model"]["maskformer"][name][:] = math.nan
    torch.save(content, root / "nan.pt")
    fails_in_one_line(measure(root / "nan.pt", root), "nan.pt", name, "NaN/Inf")
    clip = torch.load(root / "clip.pt")
    clip["visual.proj"][0, 0] = math.inf
    torch.save(clip, root / "clip.pt")
    fails_in_one_line(measure(trained, root), "clip.pt", "visual.proj", "NaN/Inf")


def test_scores_that_are_not_finite_give_no_labels(root, trained):
    """Weights that are finite, and too large for what is computed with them."""
    content = checkpoint.load(trained)
    for name, tensor in content["model"]["maskformer"].items():
        if name.startswith("mask_embed"):
            tensor.fill_(3e38)
    torch.save(content, root / "large.pt")
    fails_in_one_line(
        measure(root / "large.pt", root, "--out", root / "o"),
        "scores that are not finite",
        "2 images",
    )
    segment = (
        "eval.py",
        root / "large.pt",
        "--root",
        root,
        "--images",
        root / "a/images/val",
        "--classes",
        "cat",
    )
    fails_in_one_line(
        command(*segment, "--out", root / "s", "--device", "cpu"), "not finite", "0.png"
    )
    assert not (root / "o").exists() and not list((root / "s").iterdir())


def test_nothing_measured_makes_no_best(root):
    for i in range(2):
        save_pair(root, "val", str(i), np.full((48, 60), 255, np.uint8))
    assert train(root, "--set", "train.eval_every=1").returncode == 0
    assert checkpoint.load(root / "r" / "best.pt")["step"] == 4
