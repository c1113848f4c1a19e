"""Nothing to measure is no zero, and NaN is no number. (Of metrics: tests/method/test_metrics.)"""

import math

import numpy as np
import torch
from conftest import command, fails_in_one_line, logged
from own_data import blocks, measure, save_pair, train

from train import SegmentTask
from zsseg.weights import load_checkpoint


def test_the_best_of_a_run_is_chosen_by_what_was_measured(root):
    """By hIoU, then mIoU; without unseen ground truth, by mIoU alone; the last if nothing was."""
    score = lambda **result: SegmentTask.score(None, result)
    assert score(hIoU=1.0, mIoU=5.0) > score(hIoU=0.9, mIoU=50.0) > score(hIoU=None, mIoU=90.0)
    assert score(hIoU=None, mIoU=2.0) > score(hIoU=None, mIoU=None) == []
    for i in range(2):
        save_pair(root, "val", str(i), np.minimum(blocks(), 1))
    train(root, "--set", "train.eval_every=1", "--set", "data.unseen=['grass']")
    measured = [line for line in logged(root / "r") if "val/mIoU" in line]
    assert all(line["val/hIoU"] is None for line in measured)
    scores = {line["step"]: line["val/mIoU"] for line in measured if line["step"] < 4}
    first = next(step for step in scores if scores[step] == max(scores.values()))
    assert len(scores) == 3 and load_checkpoint(root / "r" / "best.pt")["step"] == first


def test_weights_and_scores_that_are_not_finite_give_no_labels(root, trained):
    """The weights are named; finite ones may be too large for what is computed with them."""
    content = load_checkpoint(trained)
    mask_embed = [k for k in content["model"]["maskformer"] if k.startswith("mask_embed")]
    for value, parts in ((math.nan, (mask_embed[0], "NaN/Inf")), (3e38, ("finite", "2 images"))):
        for name in mask_embed:
            content["model"]["maskformer"][name].fill_(value)
        torch.save(content, root / "bad.pt")
        fails_in_one_line(measure(root / "bad.pt", root, "--out", root / "o"), *parts)
    assert not (root / "o" / "metrics.json").exists()
    words = ["--root", root, "--images", root / "a/images/val", "--classes", "cat", "--out"]
    done = command("eval.py", root / "bad.pt", *words, root / "s", "--device", "cpu")
    fails_in_one_line(done, "not finite", "0.png")
    assert not list((root / "s").glob("*.png"))
    clip = torch.load(root / "clip.pt")
    clip["visual.proj"][0, 0] = math.inf
    torch.save(clip, root / "clip.pt")
    fails_in_one_line(measure(trained, root), "clip.pt", "visual.proj", "NaN/Inf")
