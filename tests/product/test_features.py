"""`--features DIR`: other words without another pass of the networks."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import command, fails_in_one_line
from PIL import Image

from zsseg.segmenter import Segmenter

WORDS = ("--classes", "cat, sofa = couch; other: sky")


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (50, 70)), ("b.jpg", (64, 40)), ("c.png", (33, 90))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """One entry for each image that passed the networks."""
    passed = []
    propose = Segmenter.propose
    monkeypatch.setattr(Segmenter, "propose", lambda *a: passed.append(1) or propose(*a))
    return passed


def segment(trained: Path, photos: Path, out: str, *more: object):
    words = (trained, "--root", trained.parents[1], "--device", "cpu", "--images", photos)
    return command("eval.py", *words, "--out", photos.parent / out, *more)


def maps(folder: Path) -> dict[str, list]:
    return {f.stem: np.array(Image.open(f)).tolist() for f in sorted(folder.glob("*.png"))}


def test_other_words_cost_no_pass(trained, photos, tmp_path, passes):
    """And their label maps are those of a fresh pass."""
    cache = ("--features", tmp_path / "f")
    assert segment(trained, photos, "x", *WORDS).returncode == 0
    assert segment(trained, photos, "a", *cache, "--classes", "dog").returncode == 0
    assert len(passes) == 6
    late = segment(trained, photos, "b", *cache, *WORDS, "--set", "clip.prompt=imagenet")
    assert late.returncode == 0 and len(passes) == 6, late.stderr
    assert segment(trained, photos, "c", *cache, *WORDS).returncode == 0 and len(passes) == 6
    assert maps(tmp_path / "c") == maps(tmp_path / "x") and len(maps(tmp_path / "x")) == 3


def test_what_is_missing_or_broken_or_changed_is_computed(trained, photos, tmp_path, passes):
    cache = tmp_path / "f"

    def count(*more: object) -> int:
        passes.clear()
        done = segment(trained, photos, "o", "--features", cache, *WORDS, *more)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("broken, computed again") == broken
        return len(passes)

    broken = 0
    assert count() == 3 and count() == 0
    files = sorted(file for file in cache.iterdir() if file.name != ".zsseg")
    files[0].unlink()
    assert count() == 1
    good = files[0].read_bytes()
    broken = 1
    for content in (good[:-9], b"", good[:-9] + bytes([good[-9] ^ 1]) + good[-8:], b"x" * 99):
        files[0].write_bytes(content)
        assert count() == 1 and files[0].read_bytes() == good
    broken = 0
    shutil.copy(photos / "b.jpg", photos / "a.jpg")
    shutil.copystat(photos / "a.png", photos / "a.jpg")
    (photos / "a.jpg").replace(photos / "a.png")  # another image of this name and time
    assert count() == 1
    assert count("--set", "clip.mask_threshold=0.4") == 3
    (photos / "c.png").unlink()
    assert count() == 2


def test_what_cannot_be_cached_is_refused(trained, photos, tmp_path):
    cache = ("--features", tmp_path / "f")
    for setting in ("eval.flip=true", "eval.sizes=[64]", "eval.window=64", "model.proposals=false"):
        refused = segment(trained, photos, "o", *cache, *WORDS, "--set", setting)
        fails_in_one_line(refused, "--features", "one view an image")
    assert not (tmp_path / "f").exists() and not (tmp_path / "o").exists()
