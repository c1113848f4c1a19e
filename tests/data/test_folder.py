"""A data set of one's own: the README's walk-through with images made on the spot, layouts,
impossible descriptions.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command, tiny_clip_state
from PIL import Image

import prepare_data
from zsseg import checkpoint, utils
from zsseg.config import DataConfig, load_config
from zsseg.data import TestImages, TrainImages
from zsseg.datasets import dataset, find_pairs, has_split
from zsseg.label_statistics import label_statistics

SMALL = [
    "model.backbone=small",
    "model.weights=",
    "model.queries=8",
    "model.hidden=32",
    "model.decoder_layers=1",
    "train.steps=4",
    "train.batch_size=2",
    "data.workers=0",
    "data.crop=64",
    "data.short_edges=[64]",
    "data.test_short_edge=64",
    "clip.weights={root}/clip.pt",
    "clip.prompt=['a {}.']",
]


def walk_through() -> str:
    """The README's configuration of a data set of one's own."""
    [block] = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return block


@pytest.fixture
def root(tmp_path) -> Path:
    """The images that the walk-through describes: patches of animals, some pixels of values that
    it does not name.
    """
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 3)):
        for i in range(count):
            image, labels = (
                rng.integers(0, 256, (40, 60, 3), np.uint8),
                np.full((40, 60), 3, np.uint8),
            )
            labels[5:20, 5:20], labels[5:20, 30:50], labels[:2] = 1 + i % 2, 4, 9
            for part, array, ending in (("images", image, "jpg"), ("masks", labels, "png")):
                file = tmp_path / "animals" / part / split / f"{i}.{ending}"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(file)
    torch.save(tiny_clip_state(), tmp_path / "clip.pt")
    (tmp_path / "my.toml").write_text(walk_through())
    return tmp_path


def test_the_walk_through(root):
    """Checked, trained on and measured by the README's commands; `zebra` stays hidden."""
    settings = [x for setting in SMALL for x in ("--set", setting)]
    words = ["--root", root]
    checked = command("prepare_data.py", "folder", "--config", root / "my.toml", *words, "--check")
    assert checked.returncode == 0, checked.stderr
    assert "folder train: 5 images" in checked.stdout and "folder val: 3 images" in checked.stdout
    assert "ignored label values, of no class: 9" in checked.stdout
    assert "of 1500 pixels of the 1 unseen classes (zebra), 0 survive" in checked.stdout
    trained = command(
        "train.py",
        "--config",
        root / "my.toml",
        *words,
        *settings,
        "--out",
        root / "run",
        "--device",
        "cpu",
    )
    assert trained.returncode == 0, trained.stderr
    measured = command(
        "eval.py",
        root / "run" / "last.pt",
        *words,
        "--device",
        "cpu",
        "--save-predictions",
        "--report",
    )
    assert measured.returncode == 0, measured.stderr
    result = json.loads((root / "run" / "eval" / "metrics.json").read_text())
    assert (
        list(result["per_class"]) == ["cat", "dog", "grass", "zebra"]
        and {"mIoU_seen", "mIoU_unseen"} <= result.keys()
    )
    assert all(
        np.array(Image.open(f)).max() < 4 for f in (root / "run" / "eval" / "predictions").iterdir()
    )
    config = load_config(None, [], checkpoint.load(root / "run" / "last.pt")["config"])
    shown = {int(c) for n in range(20) for c in TrainImages(config, root)[n][2]}
    assert shown == {0, 1, 2}  # cat, dog, grass
    labels = TestImages(config.data, root, "val")[0][1]
    assert labels.unique().tolist() == [0, 2, 3, 255] and (labels[:2] == 255).all()


def described(*settings: str) -> DataConfig:
    layout = ["data.images={split}/{id}.jpg", "data.labels={split}/{id}.png"]
    return load_config(
        None, ["data.name=folder", "data.classes=['cat','dog']", *layout, *settings]
    ).data


def test_layouts(tmp_path):
    """Any ending, sub-folders, lists instead of folders, 16 bits."""
    for name in (
        "val/a.jpg",
        "val/deep/b.PNG",
        "val/c.webp",
        "val/.hidden.jpg",
        "masks/val/a.png",
        "masks/val/deep/b.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB" if name.startswith("val") else "L", (4, 4)).save(tmp_path / name)
    Image.fromarray(np.full((4, 4), 700, np.uint16)).save(tmp_path / "masks" / "val" / "c.png")
    config = described(
        "data.images={split}/{id}.*", "data.labels=masks/{split}/{id}.png", "data.values=[700,0]"
    )
    assert [p.name for p, _ in find_pairs(config, tmp_path, "val")] == ["a.jpg", "c.webp", "b.PNG"]
    labels = [TestImages(config, tmp_path, "val")[i][1].unique().tolist() for i in range(3)]
    assert labels == [[1], [0], [1]]
    (tmp_path / "test.txt").write_text("a\n")
    lists = described(
        "data.images=val/{id}.jpg", "data.labels=masks/val/{id}.png", "data.split=test"
    )
    assert find_pairs(lists, tmp_path, "test") == [
        (tmp_path / "val" / "a.jpg", tmp_path / "masks" / "val" / "a.png")
    ]
    assert (
        find_pairs(
            described(
                "data.folder=" + str(tmp_path / "val"),
                "data.images={id}.jpg",
                "data.labels={id}.png",
                "data.split=../test",
            ),
            tmp_path,
            "../test",
        )[0][0]
        == tmp_path / "val" / "a.jpg"
    )


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["data.classes=[]"], ["data.classes: is missing"]),
        (["data.classes=['a','a']"], ["data.classes: 'a' is given twice"]),
        (["data.unseen=['dgo']"], ["data.unseen: 'dgo' is not one", "did you mean dog?"]),
        (["data.unseen=['cow']"], ["give some of data.classes"]),
        (["data.unseen=['cat','dog']"], ["data.unseen", "not all"]),
        (["data.values=[1]"], ["data.values", "each of the 2"]),
        (["data.values=[1,1]"], ["data.values: 1 is given twice"]),
        (["data.values=[1,70000]"], ["65535"]),
        (["data.images="], ["data.images: is missing"]),
        (["data.images=images"], ["data.images", "{id}"]),
        (["data.images=p_{id}.jpg"], ["data.images"]),
        (["data.labels=masks/{id}.png"], ["data.labels", "{split}"]),
        (["data.split=nope"], ["'nope'", "data.images"]),
        (["data.folder=absent"], ["data.folder: no such folder"]),
    ],
)
def test_descriptions_that_cannot_be(settings, parts, tmp_path):
    with pytest.raises(utils.UserError) as error:
        find_pairs(config := described(*settings), tmp_path, config.split)
    assert all(part in str(error.value) for part in parts)


def test_paths_that_lead_nowhere_are_named(tmp_path):
    for file in ("images/val/a.jpg", "masks/val/a.png", "others/val/b.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    image = f"data.images: no 'val' file is {tmp_path}/image/val/*.jpg"
    for setting, part in (
        ("data.images=image/{split}/{id}.jpg", image),
        (
            "data.labels=mask/{split}/{id}.png",
            f"data.labels: no 'val' file is {tmp_path}/mask/val/*.png",
        ),
        (
            "data.labels=others/{split}/{id}.png",
            "data.labels: no 'val' label map has the id of an image",
        ),
    ):
        with pytest.raises(utils.UserError, match=re.escape(part)):
            find_pairs(
                described(
                    "data.images=images/{split}/{id}.jpg",
                    "data.labels=masks/{split}/{id}.png",
                    setting,
                ),
                tmp_path,
                "val",
            )
    complete = described(
        "data.images=images/{split}/{id}.jpg", "data.labels=masks/{split}/{id}.png"
    )
    assert len(find_pairs(complete, tmp_path, "val")) == 1
    (tmp_path / "images/val/a.JPG").touch()
    (tmp_path / "images/val/a.json").touch()  # no image
    assert not has_split(complete, tmp_path, "train")
    for on_image in (find_pairs, has_split):  # a split that is broken is not absent
        with pytest.raises(utils.UserError, match="has the id of"):
            on_image(
                described(
                    "data.images=images/{split}/{id}.*", "data.labels=masks/{split}/{id}.png"
                ),
                tmp_path,
                "val",
            )


def test_label_maps_may_lie_elsewhere(tmp_path):
    """Absolute paths, outside the data set's folder; ids in lists may hold spaces."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (5, 4)).save(tmp_path / "photos" / "IMG 1.jpg")
    Image.new("L", (5, 4)).save(tmp_path / "IMG 1.png")
    (tmp_path / "photos" / "val.txt").write_text("\nIMG 1\r\n\n")
    config = described(
        "data.folder=photos", "data.images={id}.jpg", f"data.labels={tmp_path}/{{id}}.png"
    )
    assert label_statistics(config, tmp_path, "val").histogram(2).tolist() == [20, 0, 0]


def test_prepare_data_wants_the_description(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare_data.py"])
    (tmp_path / "voc.toml").write_text('[data]\nname = "voc"\n')
    for words, part in (
        (["folder"], "--config: is missing"),
        (["vocc"], "did you mean voc?"),
        (["folder", "--config", str(tmp_path / "voc.toml")], "describes voc"),
    ):
        with pytest.raises(utils.UserError, match=re.escape(part)):
            prepare_data.main(words)


def test_other_data_sets_ignore_the_description():
    """So that a model trained on one's own data is measured on VOC by a `--set data.name=voc`."""
    assert dataset(described("data.name=voc")) is dataset("voc")
