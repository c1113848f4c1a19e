"""A data set of one's own: the README's walk-through, layouts, mistakes."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, command, overrides, succeed
from own_data import described, touch
from PIL import Image

from zsseg.config import load_config
from zsseg.data import TestImages as Images  # pytest would take it for a test
from zsseg.data import TrainImages
from zsseg.datasets import MissingSplit, find_listing, find_pairs
from zsseg.utils import UserError


def test_the_walk_through(shapes_root, tmp_path):
    """Checked, trained on and measured by the README's commands, on a few synthetic images; the
    umbrellas stay hidden. The commands that end a training work as they stand.
    """
    [text] = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "my.toml").write_text(text)
    (tmp_path / "all.toml").write_text('base = "my"\n[data]\ntrain_on = "all"')  # shows umbrellas
    config, root = ["--config", tmp_path / "my.toml"], ["--root", shapes_root]
    for name, survive in (("my", True), ("all", False)):
        words = ["--config", tmp_path / f"{name}.toml", *root, "--check"]
        said = command("prepare_data.py", "folder", *words).stdout
        assert "folder train: 10 images" in said and "folder val: 6 images" in said
        hidden = r"of [1-9]\d* pixels of the 1 unseen class \(umbrella\), 0 survive"
        assert bool(re.search(hidden, said)) == survive
    run = tmp_path / "run"
    device = ["--device", "cpu"]
    trained = succeed("train.py", *config, *overrides(*TINY), "--out", run, *root, *device)
    words, page, report = trained.stdout.splitlines()[-3:]
    assert "--classes 'lightning, tree, sand, umbrella'" in words and " --serve " in page
    for line in (words, report):
        succeed(*shlex.split(line)[1:], *device)
    assert (run / "segmented" / "val00000.overlay.jpg").exists()
    assert (run / "eval" / "report.html").exists()
    succeed("eval.py", run / "last.pt", "--save-predictions", *root, *device)
    result = json.loads((run / "eval" / "metrics.json").read_text())
    assert list(result["per_class"]) == ["lightning", "tree", "sand", "umbrella"]
    assert {"mIoU_seen", "mIoU_unseen"} <= result.keys()
    maps = [*(run / "eval" / "predictions").iterdir()]
    assert len(maps) == 6 and all(np.array(Image.open(f)).max() < 4 for f in maps)
    config = load_config(tmp_path / "my.toml", TINY)
    samples = TrainImages(config, shapes_root)
    assert {int(c) for n in range(20) for c in samples[n][2]} == {0, 1, 2}  # all but umbrella
    labels = Images(config.data, shapes_root, "val")[1][1]
    assert labels.unique().tolist() == [0, 2, 255]  # lightning, sand, all else


def listing(images: str, labels: str, root: Path, *settings: str, split: str = "val"):
    config = described(f"data.images={images}", f"data.labels={labels}", *settings)
    return find_listing(config, root, split)


LAYOUTS = [
    ("{split}/{id}/img.png", "{split}/{id}/label.png", "val/7/img.png val/7/label.png"),  # labelme
    ("{split}/{id}.*", "m/{split}/{id}.png", "val/a.jpg m/val/a.png"),
    ("{split}/{id}.*", "m/{split}/{id}.png", "val/x/b.PNG m/val/x/b.png"),
    ("{split}/{id}/rgb/0.png", "{split}/{id}/gt/0.png", "val/x/y/rgb/0.png val/x/y/gt/0.png"),
    ("{id}.jpg", "masks/{id}.png", "a.jpg masks/a.png"),
]


@pytest.mark.parametrize(("images", "labels", "files"), LAYOUTS)
def test_layouts(images, labels, files, tmp_path):
    """Any ending, sub-folders, lists; hidden files and folders hold no data."""
    touch(tmp_path, *files.split(), *(f".x/{f}" for f in files.split()))
    touch(tmp_path, *(re.sub(r"/(\w+\.\w+)$", r"/.x/\1", f) for f in files.split()))
    (tmp_path / "val.txt").write_text("a\n")
    found = listing(images, labels, tmp_path)
    assert found.pairs == [tuple(tmp_path / f for f in files.split())] and not found.unpaired


SPLIT = ["data.images={split}/{id}.jpg", "data.labels={split}/{id}.png"]
IMPOSSIBLE = [
    (["data.classes=[]"], "data.classes: is missing"),
    (["data.classes=['a','a']"], "'a'"),
    (["data.classes=['cat','Cat']"], "to CLIP"),
    (["data.classes=['cat','\u200b']"], "empty to CLIP"),
    (["data.unseen=['dgo']"], "data.unseen: is ['dgo']; did you mean dog?"),
    (["data.unseen=['cow']"], "give some of data.classes"),
    (["data.unseen=['cat','dog']"], "not all"),
    (["data.values=[1]"], "each of the 2"),
    (["data.values=[1,1]"], "its own value"),
    (["data.values=[1,70000]"], "65535"),
    (["data.images="], "data.images: is missing"),
    (["data.images=images"], "{id}"),
    (["data.images=p_{id}.jpg"], "data.images: is p_{id}.jpg"),
    (["data.images=images/{dir}/{id}.png"], "data.images: is images/{dir}/{id}.png"),
    (["data.labels=m/{split}/{id}}.png"], "data.labels: is "),
    (["data.folder={dir}"], "data.folder: no such"),
    (["data.labels=masks/{id}.png"], "write {split} as in data.images"),
    (["data.split=nope"], "no pair of files "),
    (["data.folder=absent"], "data.folder: no such"),
]


@pytest.mark.parametrize(("settings", "part"), IMPOSSIBLE)
def test_descriptions_that_cannot_be(settings, part, tmp_path):
    config = described(*SPLIT, *settings)
    with pytest.raises(UserError) as error:
        find_pairs(config, tmp_path, config.split)
    assert part in str(error.value)


def test_a_string_is_no_list(tmp_path):
    """From Python, where nothing has checked it."""
    for more in ({"classes": "abc"}, {"classes": ["a", "b", "c"], "unseen": "ab"}):
        with pytest.raises(UserError, match="list"):
            find_pairs(replace(described(*SPLIT), **more), tmp_path, "val")


def test_a_split_of_another_name_is_named(tmp_path):
    """Roboflow's `valid`."""
    touch(tmp_path, "valid/images/a.jpg", "valid/masks/a.png", "training/images/a.jpg")
    for split, near in (("val", "valid"), ("train", "training"), ("test", "")):
        with pytest.raises(UserError, match=r"data\.split") as error:
            listing("{split}/images/{id}.jpg", "{split}/masks/{id}.png", tmp_path, split=split)
        assert (f"did you mean {near}?" in str(error.value)) == bool(near)


def test_files_that_cannot_be(tmp_path):
    touch(tmp_path, "images/val/a.jpg", "masks/val/a.png", "others/val/b.png")
    good = images, labels = ("images/{split}/{id}.*", "masks/{split}/{id}.png")
    for bad in (("image/{split}/{id}.jpg", labels), (images, "others/{split}/{id}.png")):
        with pytest.raises(
            UserError, match=re.escape("no pair of files {} and {} in".format(*bad))
        ):
            listing(*bad, tmp_path)
    assert len(listing(*good, tmp_path).pairs) == 1
    with pytest.raises(MissingSplit):
        listing(*good, tmp_path, split="train")
    touch(tmp_path, "images/val/a.json", "images/val/a.JPG")  # the first is no image
    with pytest.raises(UserError, match="has the id of") as error:
        listing(*good, tmp_path)
    assert not isinstance(error.value, MissingSplit)  # a split that is broken is not absent
