"""The Python interface: six lines, and what they give."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, command, original_state
from PIL import Image

from zsseg import load, utils


@pytest.fixture(scope="module")
def model(shapes_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("predict")
    settings = [
        w
        for s in (
            "train.steps=2",
            "train.batch_size=2",
            "data.workers=0",
            "train.eval_every=0",
            "model.queries=8",
            "data.short_edges=[64]",
            "data.crop=64",
            "data.test_short_edge=64",
        )
        for w in ("--set", s)
    ]
    words = (
        "train.py",
        "--config",
        ROOT / "configs/shapes.toml",
        "--root",
        shapes_root,
        "--out",
        out,
        "--device",
        "cpu",
    )
    done = command(*words, *settings)
    assert done.returncode == 0, done.stderr
    return out / "last.pt"


def test_six_lines(model, shapes_root, tmp_path):
    """The label map of `--images`, from a file, an array and a Pillow image, and the score of each
    pixel's class.
    """
    file = next((shapes_root / "shapes/images/test").iterdir())
    names = ["star", "tree", "sky"]
    segmenter = load(model, root=shapes_root, device="cpu")
    assert len(segmenter.names) == 25  # the data set's
    segmenter.set_classes(names, {"sky": ["brick"]})
    labels, scores = segmenter(file, return_scores=True)
    assert (
        labels.dtype == np.uint8 and labels.shape == scores.shape == (96, 96) and (scores > 0).all()
    )
    image = Image.open(file)
    assert all(
        np.array_equal(segmenter(other), labels) for other in (str(file), image, np.array(image))
    )
    words = "star, tree, sky = brick"
    done = command(
        "eval.py",
        model,
        "--root",
        shapes_root,
        "--images",
        file,
        "--classes",
        words,
        "--out",
        tmp_path / "o",
        "--device",
        "cpu",
    )
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.array(Image.open(tmp_path / "o" / f"{file.stem}.png")), labels)
    found = {
        c["id"]: c["score"]
        for c in json.loads((tmp_path / "o" / f"{file.stem}.json").read_text())["classes"]
    }
    for category, score in found.items():
        assert scores[labels == category].mean() == pytest.approx(score, abs=1e-4)


def test_images_of_other_sizes_and_modes(model, shapes_root):
    segmenter = load(
        model, root=shapes_root, device="cpu", settings=["eval.flip=true", "clip.ensemble=false"]
    )
    segmenter.set_classes([f"thing {i}" for i in range(300)])
    assert segmenter(np.zeros((1, 1, 3), np.uint8)).dtype == np.uint16
    assert segmenter(np.zeros((31, 50), np.uint8)).shape == (31, 50)
    assert segmenter(Image.new("RGBA", (20, 30))).shape == (30, 20)


def test_what_is_no_image_is_said(model, shapes_root):
    segmenter = load(model, root=shapes_root, device="cpu")
    for image in (
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
        "nowhere.jpg",
    ):
        with pytest.raises(utils.UserError):
            segmenter(image)
    with pytest.raises(utils.UserError, match="no such file"):
        load("nowhere.pt")


def test_an_original_checkpoint_needs_its_configuration(tmp_path):
    torch.save({"model": original_state({})}, tmp_path / "model_final.pth")
    with pytest.raises(utils.UserError, match="contains no configuration"):
        load(tmp_path / "model_final.pth")


def test_trained_classes_count_as_seen(model, shapes_root):
    segmenter = load(model, root=shapes_root, device="cpu")
    segmenter.set_classes(["Star", "cup", "zebra"])  # cup is unseen in shapes
    assert segmenter.segmenter.seen.tolist() == [True, False, False]


def test_the_readme_s_lines(model, shapes_root, tmp_path, monkeypatch):
    [block] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "runs/shapes").mkdir(parents=True)
    (tmp_path / "runs/shapes/last.pt").symlink_to(model)
    shutil.copytree(shapes_root, tmp_path / "datasets")
    images = tmp_path / "datasets/shapes/images/test"
    shutil.copy(next(images.iterdir()), images / "test00006.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block, names)
    assert names["labels"].shape == names["scores"].shape == (96, 96) and names["labels"].max() < 3
