"""Nothing to measure is no zero, and NaN is no number. (Of metrics: tests/method/test_metrics.)"""

import json
import math

import numpy as np
import torch
from conftest import command, fails_in_one_line
from own_data import blocks, measure, save_pair, train

from train import SegmentTask
from zsseg.weights import load_checkpoint


def test_best_is_chosen_by_what_was_measured():
    score = lambda **result: SegmentTask.score(None, result)
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
    measured = [line for line in lines if "val/mIoU" in line]
    assert all(line["val/hIoU"] is None for line in measured)
    scores = {line["step"]: line["val/mIoU"] for line in measured if line["step"] < 4}
    first = next(step for step in scores if scores[step] == max(scores.values()))
    assert len(scores) == 3 and load_checkpoint(root / "r" / "best.pt")["step"] == first


def test_nothing_measured_makes_no_best(root):
    for i in range(2):
        save_pair(root, "val", str(i), np.full((48, 60), 255, np.uint8))
    assert train(root, "--set", "train.eval_every=1").returncode == 0
    assert load_checkpoint(root / "r" / "best.pt")["step"] == 4


def test_weights_that_are_not_finite_are_named(root, trained):
    content = load_checkpoint(trained)
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
    content = load_checkpoint(trained)
    for name, tensor in content["model"]["maskformer"].items():
        if name.startswith("mask_embed"):
            tensor.fill_(3e38)
    torch.save(content, root / "large.pt")
    done = measure(root / "large.pt", root, "--out", root / "o")
    fails_in_one_line(done, "scores that are not finite", "2 images")
    assert not (root / "o" / "metrics.json").exists()
    words = ["--root", root, "--images", root / "a/images/val", "--classes", "cat", "--out"]
    done = command("eval.py", root / "large.pt", *words, root / "s", "--device", "cpu")
    fails_in_one_line(done, "not finite", "0.png")
    assert not list((root / "s").glob("*.png"))
