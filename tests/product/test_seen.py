"""Which classes count as seen in the ensemble: those that the segmenter was trained on."""

import json

from conftest import PROCESS
from own_data import measure

from zsseg import checkpoint
from zsseg.build import build_segmenter
from zsseg.config import load_config
from zsseg.datasets import dataset
from zsseg.evaluate import evaluate
from zsseg.apps.vocabulary import seen_classes


def test_classes_that_were_trained_on_are_seen(root, trained):
    """Own data without `unseen`: all of them. Only of another set that has no split is none
    seen.
    """
    content, config = checkpoint.load(trained), load_config(root / "a.toml")
    own = dataset(config.data)
    assert own.seen == [] and seen_classes(own, content, config) == [0, 1, 2]
    assert seen_classes(dataset("ade20k"), content, config) == []
    assert seen_classes(dataset("voc"), content, config) == dataset("voc").seen
    # The original's checkpoints were not trained on it.
    assert seen_classes(own, {"model": {}}, config) == []
    held = load_config(root / "a.toml", ["data.unseen=['grass']"])
    assert seen_classes(
        dataset(held.data), content | {"config": {"data": vars(held.data)}}, held
    ) == [0, 1]


def test_the_weight_of_the_ensemble_of_own_data(root, trained):
    """Measuring takes head^w CLIP^(1-w) for all classes: what w' = 1 - w gives where all are taken
    for unseen.
    """
    numbers = {}
    for name, more in (
        ("seen", ["clip.ensemble_weight=0.7"]),
        ("unseen", ["clip.ensemble_weight=0.3"]),
    ):
        config = load_config(root / "a.toml", more)
        segmenter = build_segmenter(config, root, checkpoint.load(trained)["model"]).eval()
        result = evaluate(
            segmenter, config, root, PROCESS, "val", seen=None if name == "seen" else []
        )
        numbers[name] = (result["mIoU"], result["per_class"])
        assert segmenter.seen.tolist() == [name == "seen"] * 3
    assert numbers["seen"] == numbers["unseen"]
    assert (
        measure(trained, root, "--out", root / "o", "--set", "clip.ensemble_weight=0.7").returncode
        == 0
    )
    assert json.loads((root / "o" / "metrics.json").read_text())["per_class"] == numbers["seen"][1]


def test_seen_classes_are_compared_by_their_names(root, trained):
    content = checkpoint.load(trained)
    config = load_config(root / "a.toml", ["data.classes=['Grass','zebra','cat']"])
    assert seen_classes(dataset(config.data), content, config) == [0, 2]
