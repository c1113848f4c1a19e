"""No file of the user's is ever replaced: results go into folders that are new or ours."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, fails_in_one_line
from own_data import blocks, save_pair
from PIL import Image

from zsseg.visualize import palette, save_label_map


def run(checkpoint: Path, root: Path, *more: object):
    config = ("--config", root / "a.toml")
    return command("eval.py", checkpoint, *config, "--root", root, "--device", "cpu", *more)


def test_label_maps_never_replace_images(root, trained):
    """Beside the checkpoint lies a folder of the user's images, as it often does, and the whole
    folder is asked for, again and over its own results.
    """
    work = root / "work"
    (work / "images").mkdir(parents=True)
    shutil.copy(trained, work / "last.pt")
    shutil.copy(root / "a/images/val/0.png", work / "images" / "x.png")
    before = (work / "images" / "x.png").read_bytes()
    for images in (work / "images", work, work):
        assert run(work / "last.pt", root, "--images", images).returncode == 0
    assert (work / "images" / "x.png").read_bytes() == before
    found = sorted(p.relative_to(work).as_posix() for p in work.rglob("x.json"))
    assert found == ["segmented/images/x.json", "segmented/x.json"]


@pytest.mark.parametrize("options", [[], ["--images"], ["--images", "--features"]])
def test_a_folder_of_others_is_refused_before_the_work_begins(options, root, trained):
    mine = root / "mine"
    mine.mkdir()
    (mine / "0.png").write_text("mine")
    words = ["--images", root / "a/images/val"] if options else ["--save-predictions"]
    out = root / "o" if "--features" in options else mine
    words += ["--features", mine] if "--features" in options else []
    result = run(trained, root, *words, "--out", out)
    fails_in_one_line(result, "contains files that are not this program's")
    assert [*mine.iterdir()] == [mine / "0.png"] and (mine / "0.png").read_text() == "mine"
    assert "evaluate val" not in result.stdout and "segment " not in result.stdout
    (root / "file").touch()
    fails_in_one_line(run(trained, root, *words, "--out", root / "file" / "o"), "cannot be written")


def test_results_of_the_same_images_are_made_anew(root, trained):
    """But what was only corrected by hand stays with --resume."""
    words = ("--images", root / "a/images/val", "--out", root / "o")
    assert run(trained, root, *words).returncode == 0
    whole = (root / "o/0.png").read_bytes()
    (root / "o/0.png").write_bytes(b"corrected")
    assert run(trained, root, *words, "--resume").returncode == 0
    assert (root / "o/0.png").read_bytes() == b"corrected"
    assert run(trained, root, *words).returncode == 0
    assert (root / "o/0.png").read_bytes() == whole


def test_results_of_another_image_are_not_replaced(root, trained):
    """Two folders whose images have the same names, as cameras give them."""
    for folder in ("cam1", "cam2"):
        (root / folder).mkdir()
        shutil.copy(root / "a/images/val/0.png", root / folder / "0001.png")
    words = ("--out", root / "o", "--images")
    assert run(trained, root, *words, root / "cam1").returncode == 0
    before = (root / "o" / "0001.json").read_bytes()
    for more in ([], ["--resume"]):
        result = run(trained, root, *words, root / "cam2", *more)
        fails_in_one_line(result, "the result of another image", "cam1/0001.png")
    assert (root / "o" / "0001.json").read_bytes() == before
    shutil.rmtree(root / "cam1")
    assert run(trained, root, *words, root / "cam2").returncode == 0
    assert "cam2" in json.loads((root / "o" / "0001.json").read_text())["image"]


def test_predictions_of_equal_names(root, trained):
    for kind in ("images", "masks"):
        shutil.rmtree(root / "a" / kind / "val")
    save_pair(root, "val", "one/7", blocks())
    save_pair(root, "val", "two/7", blocks()[::-1].copy())
    assert run(trained, root, "--out", root / "o", "--save-predictions").returncode == 0
    files = (root / "o/predictions").rglob("*.png")
    names = sorted(file.relative_to(root / "o/predictions").as_posix() for file in files)
    assert names == ["one/7.png", "two/7.png"]


@pytest.mark.parametrize(("classes", "dtype"), [(2, "u1"), (255, "u1"), (256, "u2"), (848, "u2")])
def test_label_maps_have_every_id(classes, dtype, tmp_path):
    ids = torch.arange(classes).view(1, -1)
    save_label_map(ids, tmp_path / "map.png", classes, palette(classes)[:-1])
    stored = np.array(Image.open(tmp_path / "map.png"))
    assert stored.astype(np.int64).tolist() == ids.tolist()
    assert stored.dtype.itemsize == np.dtype(dtype).itemsize


def test_colours_differ():
    colours = palette(171)
    assert len(np.unique(colours, axis=0)) >= 150 and colours[-1].tolist() == [0, 0, 0]
