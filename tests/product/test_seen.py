"""Which classes count as seen in the ensemble: those that the segmenter was trained on."""

import json

import pytest
from conftest import PROCESS
from own_data import measure

from zsseg.apps.vocabulary import seen_classes
from zsseg.config import load_config
from zsseg.datasets import dataset
from zsseg.evaluate import evaluate
from zsseg.weights import load_checkpoint, load_segmenter


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ([], [0, 1, 2]),  # own data without `unseen`: all that were trained on
        (["data.unseen=['grass']"], [0, 1, 2]),  # this run was trained on it, whatever it is called
        (["data.classes=['Grass','zebra','cat']"], [0, 2]),  # by their names
    ],
)
def test_own_classes_that_were_trained_on_are_seen(root, trained, settings, seen):
    config = load_config(root / "a.toml", settings)
    assert seen_classes(dataset(config.data), load_checkpoint(trained), config) == seen


def test_of_another_set_its_own_split_counts(root, trained):
    """And of a set without one no class is seen; the original's checkpoints were not trained on
    own data.
    """
    content, config = load_checkpoint(trained), load_config(root / "a.toml")
    assert seen_classes(dataset("ade20k"), content, config) == []
    assert seen_classes(dataset("voc"), content, config) == dataset("voc").seen
    assert seen_classes(dataset(config.data), {"model": {}}, config) == []


def test_the_weight_of_the_ensemble_of_own_data(root, trained):
    """Measuring takes head^w CLIP^(1-w) for all classes: what w' = 1 - w gives where all are taken
    for unseen.
    """
    numbers = []
    for weight, seen in ((0.7, None), (0.3, [])):
        config = load_config(root / "a.toml", [f"clip.ensemble_weight={weight}"])
        segmenter = load_segmenter(load_checkpoint(trained), config, root, "last.pt").eval()
        result = evaluate(segmenter, config, root, PROCESS, "val", seen=seen)
        numbers.append((result["mIoU"], result["per_class"]))
        assert segmenter.seen.tolist() == [seen is None] * 3
    assert numbers[0] == numbers[1]
    done = measure(trained, root, "--out", root / "o", "--set", "clip.ensemble_weight=0.7")
    assert done.returncode == 0, done.stderr
    result = json.loads((root / "o" / "metrics.json").read_text())
    assert result["per_class"] == numbers[0][1]
