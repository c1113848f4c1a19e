"""The Python interface: six lines, and what they give."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT, succeed
from PIL import Image

from zsseg import load, utils


def test_six_lines(trained, tmp_path):
    """The label map of `--images`, from a file, an array and a Pillow image, and the score of each
    pixel's class. Words that are refused change nothing.
    """
    root = trained.parents[1]
    file = root / "a/images/val/0.png"
    segmenter = load(trained, root=root, device="cpu")
    assert segmenter.names == ["cat", "dog", "grass"]  # the data set's
    segmenter.set_classes(["Cat", "tree", "sky"], {"sky": ["brick"]})
    assert segmenter.segmenter.seen.tolist() == [True, False, False]
    labels, scores = segmenter(file, return_scores=True)
    assert labels.dtype == np.uint8 and labels.shape == scores.shape == (48, 60)
    words = ("--classes", "Cat, tree, sky = brick", "--device", "cpu", "--out", tmp_path / "o")
    succeed("eval.py", trained, "--root", root, "--images", file, *words)
    assert np.array_equal(np.array(Image.open(tmp_path / "o/0.png")), labels)
    for found in json.loads((tmp_path / "o/0.json").read_text())["classes"]:
        assert scores[labels == found["id"]].mean() == pytest.approx(found["score"], abs=1e-4)
    for names, *synonyms in (["cat"], [[]], [["cat", "very " * 90]], [["cat"], {"sofa": ["x"]}]):
        with pytest.raises(utils.UserError):
            segmenter.set_classes(names, *synonyms)
    for names in ([], "", ["cat", "cat"]):
        with pytest.raises(utils.UserError):
            segmenter(file, classes=names)
    segmenter.names.append("x")  # the caller's own list
    segmenter.set_classes(name for name in ["Cat", "tree", "sky"])
    assert segmenter.names == ["Cat", "tree", "sky"]
    image = Image.open(file)
    for other in (str(file), image, np.array(image)):
        assert np.array_equal(segmenter(other), labels)


def test_images_of_other_sizes_and_modes(trained):
    settings = ["eval.flip=true", "clip.ensemble=false"]
    segmenter = load(trained, root=trained.parents[1], device="cpu", settings=settings)
    segmenter.set_classes([f"thing {i}" for i in range(300)])
    assert segmenter(np.zeros((1, 1, 3), np.uint8)).dtype == np.uint16
    assert segmenter(np.zeros((31, 50), np.uint8)).shape == (31, 50)
    assert segmenter(Image.new("RGBA", (20, 30))).shape == (30, 20)
    for image in (np.zeros((3, 4, 5), np.uint8), np.zeros((4, 4, 3)), "nowhere.jpg"):
        with pytest.raises((TypeError, utils.UserError)):
            segmenter(image)


def test_threads_take_turns(trained):
    """Each with its own words."""
    root = trained.parents[1]
    segmenter = load(trained, root=root, device="cpu")
    file = root / "a/images/val/0.png"
    lists = [["cat", "dog"], ["tree", "sky", "Cat"], [f"thing {i}" for i in range(300)]]
    expected = [segmenter(file, classes=names) for names in lists]
    assert [labels.dtype for labels in expected] == [np.uint8, np.uint8, np.uint16]
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda i: segmenter(file, classes=lists[i % 3]), range(18))]
    assert all(np.array_equal(labels, expected[i % 3]) for i, labels in enumerate(found))


def test_a_device_that_is_not_here():
    for device in ("gpu", "cuda:99"):
        with pytest.raises(utils.UserError, match=f"device {device}: is not here"):
            load("nowhere.pt", device=device)


def test_the_readme_s_lines(trained, tmp_path, monkeypatch):
    """From another folder than the repository's, and whatever torchrun has left in the environment."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    [block] = [block for block in blocks if "load(" in block]
    (tmp_path / "runs/shapes").mkdir(parents=True)
    (tmp_path / "runs/shapes/last.pt").symlink_to(trained)
    root = tmp_path / "datasets"
    shutil.copytree(trained.parents[1] / "a", root / "a")
    shutil.copy(trained.parents[1] / "clip.pt", root)
    photo = root / "shapes/images/test/test00006.jpg"
    photo.parent.mkdir(parents=True)
    Image.open(root / "a/images/val/0.png").save(photo)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    names: dict = {}
    exec(block, names)
    assert names["labels"].shape == names["scores"].shape == (48, 60) and names["labels"].max() < 3
