"""Measuring: parts and weights from one pass, processes, test-time augmentation, the error
budget.
"""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PROCESS, command, tiny_config, tiny_segmenter
from PIL import Image

from zsseg import analysis
from zsseg.analysis import mask_iou, oracle_analysis, write_analysis
from zsseg.datasets import dataset, find_pairs
from zsseg.distributed import Process
from zsseg.evaluate import evaluate


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


def test_predictions_do_not_depend_on_the_truth(shapes_run, shapes_root, tmp_path):
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
    for name, root in (("a", shapes_root), ("b", other)):
        words = ["--root", root, "--out", tmp_path / name, "--device", "cpu", "--save-predictions"]
        done = command("eval.py", shapes_run / "last.pt", *words, "--set", "data.split=test")
        assert done.returncode == 0, done.stderr
        files = sorted((tmp_path / name / "predictions").iterdir())
        maps.append([file.read_bytes() for file in files])
        scores.append(json.loads((tmp_path / name / "metrics.json").read_text())["pAcc"])
    assert len(maps[0]) == 4 and maps[0] == maps[1] and scores[0] != scores[1]


@pytest.mark.parametrize(
    "setting", ["clip.ensemble=true", "clip.ensemble=false", "model.proposals=false"]
)
def test_a_process_without_images_sums_the_same_counts(setting, shapes_root, monkeypatch):
    """More processes than images: the ones without any must not wait for sums that the others do
    not make.
    """
    settings = ["eval.weights=[0.5]"] if setting == "clip.ensemble=true" else []
    config = tiny_config(setting, "eval.compare=true", *settings)
    sums, sent = [], []
    count = lambda self, tensor: sums[-1].append(tuple(tensor.shape)) or tensor
    monkeypatch.setattr(Process, "sum", count)
    send = lambda self, build: sent.append(build()) or sent[0]
    monkeypatch.setattr(Process, "broadcast", send)
    for process in (Process(PROCESS.device, 0, 5), Process(PROCESS.device, 4, 5)):
        sums.append([])
        evaluate(tiny_segmenter(setting), config, shapes_root, process, "test")
    matrices = {"clip.ensemble=true": 5, "clip.ensemble=false": 2}.get(setting, 1)
    assert sums[0] == sums[1] and sums[0].count((25, 25)) == matrices


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
    wrong = sum(count for *_, count in result["confusions"])
    assert result["masks"] * (1 - result["clip_accuracy"] / 100) >= wrong > 0
    write_analysis(result, tmp_path)
    assert "GT masks, predicted classes" in capsys.readouterr().out
    assert json.loads((tmp_path / "budget.json").read_text()) == result


def test_with_perfect_masks_only_classes_cost(shapes_root, monkeypatch):
    """A segmenter whose proposals are the ground-truth masks: GT classes give 100."""
    settings = ("model.num_queries=25", "data.test_short_edge=96")
    segmenter, config = tiny_segmenter(*settings), tiny_config(*settings)
    truth = {}
    original = analysis.count_oracles
    propose = segmenter.propose

    def remember(segmenter, image, labels, *rest):
        truth["labels"] = labels
        return original(segmenter, image, labels, *rest)

    def perfect(image):
        proposals = propose(image)
        size = proposals.mask_logits.shape[-2:]
        small = F.interpolate(truth["labels"][None, None].float(), size, mode="nearest")[0]
        proposals.mask_logits = 40 * (small == torch.arange(25)[:, None, None]).float() - 20
        return proposals

    monkeypatch.setattr(analysis, "count_oracles", remember)
    monkeypatch.setattr(segmenter, "propose", perfect)
    seen = dataset(config.data).seen
    result = oracle_analysis(segmenter, config, shapes_root, PROCESS, "test", seen)
    assert result["true_classes"]["mIoU_gt"] > 75 > result["as_is"]["mIoU_gt"]
    assert result["average_best_overlap"] > 75
