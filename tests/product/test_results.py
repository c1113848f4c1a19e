"""No file of the user's is ever replaced: results go into folders that are new or ours."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import fails_in_one_line
from own_data import blocks, save_pair
from own_data import measure as run
from PIL import Image

from zsseg import utils
from zsseg.visualize import save_label_map


@pytest.mark.parametrize("option", ["--save-predictions", "--images", "--features"])
def test_a_folder_of_others_is_refused_before_the_work_begins(option, root, trained):
    mine = root / "mine"
    mine.mkdir()
    (mine / "0.png").write_text("mine")
    images = () if option == "--save-predictions" else ("--images", root / "a/images/val")
    more = {"--save-predictions": [option], "--images": [], "--features": [option, mine]}[option]
    out = root / "o" if option == "--features" else mine
    result = run(trained, root, *images, *more, "--out", out)
    fails_in_one_line(result, "contains files that are not this program's")
    assert [*mine.iterdir()] == [mine / "0.png"] and (mine / "0.png").read_text() == "mine"
    assert "evaluate val" not in result.stdout and "segment " not in result.stdout


def test_results_never_take_the_place_of_others(root, trained):
    """A whole folder is asked for, with the checkpoint and the results in it; then other images of
    the same names, as cameras give them.
    """
    work = root / "work"
    for folder in ("cam1", "cam2"):
        (work / folder).mkdir(parents=True)
        shutil.copy(root / "a/images/val/0.png", work / folder / "0001.png")
    shutil.copy(trained, work / "last.pt")
    before = (work / "cam1/0001.png").read_bytes()
    for images in (work, work, work / "cam1"):
        assert run(work / "last.pt", root, "--images", images).returncode == 0
    assert (work / "cam1/0001.png").read_bytes() == before
    out = work / "segmented"
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("0001.png"))
    assert found == ["0001.png", "cam1/0001.png", "cam2/0001.png"]

    before = (out / "0001.json").read_bytes()
    for more in ([], ["--resume"]):
        result = run(work / "last.pt", root, "--images", work / "cam2", *more)
        fails_in_one_line(result, "the result of another image", "cam1/0001.png")
    assert (out / "0001.json").read_bytes() == before
    shutil.rmtree(work / "cam1")
    assert run(work / "last.pt", root, "--images", work / "cam2").returncode == 0
    assert "cam2" in json.loads((out / "0001.json").read_text())["image"]


def test_predictions_of_equal_names(root, trained):
    for kind in ("images", "masks"):
        shutil.rmtree(root / "a" / kind / "val")
    save_pair(root, "val", "one/7", blocks())
    save_pair(root, "val", "two/7", blocks()[::-1].copy())
    assert run(trained, root, "--out", root / "o", "--save-predictions").returncode == 0
    predictions = root / "o/predictions"
    names = sorted(path.relative_to(predictions).as_posix() for path in predictions.rglob("*.png"))
    assert names == ["one/7.png", "two/7.png"]


@pytest.mark.parametrize(("classes", "dtype"), [(2, "u1"), (255, "u1"), (256, "u2"), (848, "u2")])
def test_label_maps_have_every_id(classes, dtype, tmp_path):
    ids = torch.arange(classes).view(1, -1)
    save_label_map(ids, tmp_path / "map.png", classes)
    stored = np.array(Image.open(tmp_path / "map.png"))
    assert stored.astype(np.int64).tolist() == ids.tolist()
    assert stored.dtype.itemsize == np.dtype(dtype).itemsize


def test_the_time_left_is_of_the_recent_pace(monkeypatch, capsys):
    """Thirty seconds for each of the first two items, then a tenth: a mean since the start would
    promise minutes.
    """
    times = np.cumsum([0, 30, 30, *198 * [0.1]]).tolist()
    monkeypatch.setattr(utils.time, "perf_counter", iter(times).__next__)
    assert [*utils.progress(range(200), "x", 200)] == [*range(200)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "x 1/200, 0.0/s, 1:39:30 left"
    assert lines[2].endswith("/200, 10.0/s, 0:00:10 left") and len(lines) == 4
