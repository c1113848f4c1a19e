"""`--features DIR`: other words without another pass of the networks."""

import shutil

import numpy as np
import pytest
from conftest import command, fails_in_one_line
from PIL import Image

from zsseg.segmenter import Segmenter


@pytest.fixture
def segment(trained, tmp_path, monkeypatch):
    """A function of (name of the output, options): segments the images in tmp_path, and returns how
    many passed the networks.
    """
    images = trained.parents[1] / "a/images/train"
    shutil.copytree(images, tmp_path / "images")
    passed = []
    propose = Segmenter.propose
    monkeypatch.setattr(Segmenter, "propose", lambda *a: passed.append(1) or propose(*a))

    def segment(out: str, *more: object) -> int:
        passed.clear()
        words = (trained, "--root", trained.parents[1], "--device", "cpu", *more)
        done = command("eval.py", *words, "--images", tmp_path / "images", "--out", tmp_path / out)
        assert done.returncode == 0, done.stderr
        return len(passed)

    return segment


def test_other_words_cost_no_pass(segment, tmp_path):
    """And their label maps are those of a fresh pass."""
    cache = ("--features", tmp_path / "f")
    words = ("--classes", "cat, sofa = couch; other: sky")
    assert segment("fresh", *words) == 4
    assert segment("cached", *cache, "--classes", "dog") == 4
    assert segment("cached", *cache, *words) == 0
    for file in (tmp_path / "fresh").glob("*.png"):
        assert np.array_equal(Image.open(file), Image.open(tmp_path / "cached" / file.name))


def test_what_is_missing_or_broken_or_changed_is_computed(segment, tmp_path):
    cache = tmp_path / "f"
    words = ("--features", cache, "--classes", "cat, dog")
    assert segment("o", *words) == 4
    file, other, *_ = sorted(file for file in cache.iterdir() if file.name != ".zsseg")
    content = file.read_bytes()
    file.write_bytes(content[:-9])
    other.unlink()
    assert segment("o", *words) == 2 and segment("o", *words) == 0
    images = tmp_path / "images"
    shutil.copy(images / "1.png", images / "new.png")
    shutil.copystat(images / "0.png", images / "new.png")
    (images / "new.png").replace(images / "0.png")  # another image of this name and time
    assert segment("o", *words) == 1
    assert segment("o", *words, "--set", "clip.mask_threshold=0.4") == 4


def test_what_cannot_be_cached_is_refused(trained, tmp_path):
    words = ("eval.py", trained, "--images", trained.parents[1] / "a/images/val")
    for setting in ("eval.flip=true", "eval.sizes=[64]", "eval.window=64", "model.proposals=false"):
        refused = command(*words, "--features", tmp_path / "f", "--set", setting)
        fails_in_one_line(refused, "--features", "one view an image")
    assert not (tmp_path / "f").exists()
