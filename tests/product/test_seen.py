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
    if not settings:  # the original's checkpoints were not trained on it
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
        numbers.append(result["per_class"])
    done = measure(trained, root, "--out", root / "o", "--set", "clip.ensemble_weight=0.7")
    assert done.returncode == 0, done.stderr
    measured = json.loads((root / "o" / "metrics.json").read_text())["per_class"]
    assert numbers[0] == numbers[1] == measured
