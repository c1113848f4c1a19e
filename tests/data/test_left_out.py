"""Whatever is dropped is counted and said: files, labels, pixels, classes, pages."""

import json
import shutil

import numpy as np
import pytest
from conftest import command
from own_data import CONFIG, blocks, check, measure, save_pair, train
from PIL import Image

import prepare_data
from zsseg import utils
from zsseg.config import load_config
from zsseg.data import training_statistics
from zsseg.apps.predict import find_images


@pytest.mark.parametrize(
    ("labels", "lines"),
    [
        (
            np.where(blocks() > 0, 255, 0),
            [
                "no pixel in train of 1 class of 2: dog",
                "255 (",
                "did you mean data.values = [0, 255]?",
            ],
        ),
        (
            blocks() + 1,
            ["no pixel in train of 1 class of 2: cat", "did you mean data.values = [1, 2]?"],
        ),
        (
            np.minimum(blocks(), 1) + 40 * (blocks() == 2),
            ["ignored label values, of no class: 41 (17 %)"],
        ),
        (np.where(blocks() == 2, 255, blocks()), ["ignored label values, of no class: 255 (17 %)"]),
    ],
)
def test_labels_that_count_for_nothing_are_said(labels, lines, root, capsys):
    """In training, and by --check."""
    for i in range(4):
        save_pair(root, "train", str(i), labels.astype(np.uint8))
    (root / "a.toml").write_text(CONFIG.replace('"cat", "dog", "grass"', '"cat", "dog"'))
    training_statistics(load_config(root / "a.toml").data, root)
    trained = capsys.readouterr().out
    prepare_data.main(["folder", "--config", str(root / "a.toml"), "--root", str(root), "--check"])
    checked = capsys.readouterr().out
    for line in lines:
        assert line in trained and line in checked


def test_a_few_unlabelled_pixels_are_usual(root, capsys):
    labels = blocks()
    labels[0] = 255
    for i in range(4):
        save_pair(root, "train", str(i), labels)
    training_statistics(load_config(root / "a.toml").data, root)
    assert "look at" not in capsys.readouterr().out


def test_measuring_says_what_does_not_count(root, trained):
    labels = np.where(blocks() == 2, 77, blocks()).astype(np.uint8)
    for i in range(2):
        save_pair(root, "val", str(i), labels)
    shutil.copy(root / "a/images/val/0.png", root / "a/images/val/alone.png")
    done = measure(trained, root, "--out", root / "o")
    assert "not measured, without a pixel of ground truth: 1 of 3 classes: grass" in done.stdout
    assert "16.7% of the pixels have no class and do not count" in done.stdout
    assert done.stdout.splitlines()[-1] == "left out: 1 file without a partner in val"
    assert json.loads((root / "o" / "metrics.json").read_text())["ignored"] == pytest.approx(
        100 / 6
    )


def test_training_says_what_it_leaves_out(root):
    save_pair(root, "train", "empty", np.full((48, 60), 255, np.uint8))
    (root / "a/masks/train/0.png").write_bytes(b"no image")
    (root / "a/masks/train/1.png").unlink()
    shutil.copy(root / "a/images/train/2.png", root / "a/images/train/2.JPG")
    done = train(root)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("left out: ")
    for part in (
        "1 file without a partner in train",
        "1 label map that cannot be read",
        "1 training image without a class that is trained on",
        "neither data.images nor data.labels",
    ):
        assert part in last


def test_files_of_a_folder_that_are_no_images_are_counted(root, trained):
    folder = root / "f"
    (folder / ".thumbnails").mkdir(parents=True)
    shutil.copy(root / "a/images/val/0.png", folder / "a.png")
    for name in ("b.heic", "c.HEIC", "d.dng", "IMG_7", ".e.png"):
        (folder / name).write_bytes(b"x")
    done = command(
        "eval.py",
        trained,
        "--root",
        root,
        "--images",
        folder,
        "--classes",
        "cat, dog",
        "--device",
        "cpu",
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert (
        "4 files that Pillow does not read as images (2 .heic, 1 .dng, 1 without an ending)" in last
    )
    assert "2 hidden files and folders" in last and "not found: " in done.stdout


def test_images_among_the_results_are_counted(root, capsys):
    (root / "p" / "segmented").mkdir(parents=True)
    for name in (
        "a.png",
        "segmented/b.png",
        "segmented/c.png",
        "segmented/c.json",
        "segmented/c.overlay.jpg",
    ):
        shutil.copy(root / "a/images/val/0.png", root / "p" / name)
    utils.LEFT_OUT.clear()
    assert len(find_images([str(root / "p")], root / "p" / "segmented")) == 2
    utils.print_left_out()
    assert capsys.readouterr().out == f"left out: 1 image in {root}/p/segmented, where results go\n"


def test_patterns_say_what_they_leave_out(root, capsys):
    (root / "p" / "sub").mkdir(parents=True)
    shutil.copy(root / "a/images/val/0.png", root / "p" / "x.png")
    (root / "p" / "l.png").symlink_to(root / "p" / "x.png")
    utils.LEFT_OUT.clear()
    assert len(find_images([str(root / "p" / "*")], root / "o")) == 2
    utils.print_left_out()
    text = capsys.readouterr().out
    assert "1 folder that" in text and "1 link to images" in text


def test_frames_and_pages_are_counted(root, trained):
    pages = [Image.fromarray(np.full((20, 30, 3), 50 * i, np.uint8)) for i in range(3)]
    (root / "p").mkdir()
    pages[0].save(root / "p" / "x.tif", save_all=True, append_images=pages[1:])
    pages[0].save(root / "a/images/val/0.png", save_all=True, append_images=pages[1:2])
    done = command(
        "eval.py",
        trained,
        "--root",
        root,
        "--images",
        root / "p",
        "--classes",
        "cat",
        "--device",
        "cpu",
    )
    assert done.returncode == 0 and "left out: 2 pages or frames of images" in done.stdout
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(root / "a/masks/val/0.png")
    assert (
        "the image has more than one page or frame; the first is read (1 file" in check(root).stdout
    )
