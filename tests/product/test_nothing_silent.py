"""What users of such systems report: files overwritten, data dropped, numbers of nothing, all
without a word.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROCESS, ROOT, command, fails_in_one_line, tiny_clip_state, tiny_config
from PIL import Image

import prepare_data
from train import Segment
from zsseg import checkpoint, run, shapes, weights
from zsseg.config import load_config
from zsseg.data import TestPictures, training_statistics, unique_names
from zsseg.datasets import dataset, find_listing, find_pairs
from zsseg.evaluate import evaluate
from zsseg.files import (
    decode,
    is_ours,
    refuse_foreign,
    replacing,
    result,
    set_aside,
    split_lines,
    walk,
)
from zsseg.label_statistics import label_statistics
from zsseg.metrics import summarize, table
from zsseg.pictures import Names, find_pictures, note_failed
from zsseg.segmenter import build_segmenter, load_segmenter
from zsseg.tokenizer import check_names
from zsseg.words import read_words, seen_classes

CONFIG = """
[data]
name = "folder"
folder = "a"
pictures = "images/{split}/{id}.png"
labels = "masks/{split}/{id}.png"
classes = ["cat", "dog", "grass"]
crop = 64
short_edges = [64]
test_short_edge = 64
workers = 0
[model]
backbone = "small"
queries = 8
hidden = 32
decoder_layers = 1
[clip]
weights = "{root}/clip.pt"
prompt = ["a {}."]
[train]
steps = 4
batch_size = 2
eval_every = 0
"""


def save_pair(root: Path, split: str, name: str, labels: np.ndarray, **options: object) -> None:
    shades = np.array([80, 40, 90])
    for kind, array in (
        ("images", (labels[..., None] % 3 * shades + 30).astype(np.uint8)),
        ("masks", labels),
    ):
        file = root / "a" / kind / split / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(file, **(options if kind == "images" else {}))


def blocks() -> np.ndarray:
    labels = np.zeros((48, 60), np.uint8)
    labels[:, 20:40], labels[24:, 40:] = 1, 2
    return labels


@pytest.fixture
def root(tmp_path) -> Path:
    """Four pictures to train on and two to measure, with labels 0, 1, 2 in blocks, and a small
    CLIP.
    """
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            save_pair(tmp_path, split, str(i), blocks())
    torch.save(tiny_clip_state(), tmp_path / "clip.pt")
    (tmp_path / "a.toml").write_text(CONFIG)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The checkpoint of a run on such pictures; its files stand as a run leaves them."""
    folder = tmp_path_factory.mktemp("trained")
    for split in ("train", "val"):
        save_pair(folder, split, "0", blocks())
    torch.save(tiny_clip_state(), folder / "clip.pt")
    (folder / "a.toml").write_text(CONFIG)
    done = command(
        "train.py",
        "--config",
        folder / "a.toml",
        "--root",
        folder,
        "--out",
        folder / "run",
        "--device",
        "cpu",
    )
    assert done.returncode == 0, done.stderr
    return folder / "run" / "last.pt"


def train(root: Path, *more: object):
    return command(
        "train.py",
        "--config",
        root / "a.toml",
        "--root",
        root,
        "--out",
        root / "r",
        "--device",
        "cpu",
        *more,
    )


def measure(model: Path, root: Path, *more: object):
    return command(
        "eval.py", model, "--config", root / "a.toml", "--root", root, "--device", "cpu", *more
    )


def check(root: Path, *more: object):
    return command(
        "prepare_data.py", "folder", "--config", root / "a.toml", "--root", root, "--check", *more
    )


def described(*settings: str):
    return load_config(None, ["data.name=folder", "data.classes=['cat','dog']", *settings]).data


# --- output never takes the place of what this program did not write
# -----------------------------------------------


def test_label_maps_never_replace_pictures(root, trained):
    """Beside the checkpoint lies a folder images/ of the user's, as it often does, and the current
    folder is asked for.
    """
    work = root / "work"
    (work / "images").mkdir(parents=True)
    shutil.copy(trained, work / "last.pt")
    shutil.copy(root / "a/images/val/0.png", work / "images" / "x.png")
    before = (work / "images" / "x.png").read_bytes()
    segment = lambda *more: command(
        "eval.py",
        work / "last.pt",
        "--root",
        root,
        "--classes",
        "cat, dog",
        "--device",
        "cpu",
        *more,
    )
    assert segment("--images", work / "images").returncode == 0
    assert segment("--images", work).returncode == 0  # again, and over its own results
    assert (work / "images" / "x.png").read_bytes() == before
    assert sorted(p.relative_to(work).as_posix() for p in work.rglob("x.json")) == [
        "segmented/images/x.json",
        "segmented/x.json",
    ]
    for ending, content in (
        (".png", before),
        (".json", b'{"my": "notes"}'),
        (".overlay.jpg", b"mine"),
    ):
        out = root / f"out{ending}"
        out.mkdir()
        (out / f"x{ending}").write_bytes(content)
        fails_in_one_line(
            segment("--images", work / "images", "--out", out),
            f"x{ending}",
            "not one that this program wrote",
        )
        assert (out / f"x{ending}").read_bytes() == content and len(list(out.iterdir())) == 1


def test_a_result_that_somebody_corrected_is_no_result(root, trained):
    segment = (
        "eval.py",
        trained,
        "--root",
        root,
        "--classes",
        "cat",
        "--device",
        "cpu",
        "--images",
        root / "a/images/val",
    )
    segment = (*segment, "--out", root / "o")
    assert command(*segment).returncode == 0
    Image.open(root / "o" / "0.png").transpose(Image.Transpose.ROTATE_180).save(
        root / "o" / "0.png"
    )
    before = (root / "o" / "0.png").read_bytes()
    fails_in_one_line(command(*segment), "0.png", "not one that this program wrote")
    assert (root / "o" / "0.png").read_bytes() == before


@pytest.mark.slow
def test_measuring_replaces_its_own_files_alone(root, trained):
    out = root / "o"
    (out / "predictions").mkdir(parents=True)
    for name in ("metrics.json", "report.html", "samples.png", "predictions/0.png"):
        (out / name).write_text("mine")
        options = ["--report"] * (name == "report.html") + ["--save-predictions"] * ("/" in name)
        result = measure(trained, root, "--out", out, *options)
        fails_in_one_line(result, name)
        assert (
            "evaluate val" not in result.stdout and (out / name).read_text() == "mine"
        )  # before it has taken its time
        (out / name).unlink()
    for _ in range(2):
        assert (
            measure(trained, root, "--out", out, "--save-predictions", "--report").returncode == 0
        )
    assert all(is_ours(file) for file in out.rglob("*") if file.is_file())


def test_exported_programs_replace_no_other_files(root, trained):
    export = ("eval.py", trained, "--root", root, "--classes", "cat", "--export", root / "o")
    (root / "o").mkdir()
    (root / "o" / "example.py").write_text("mine")
    fails_in_one_line(command(*export), "example.py")
    assert (root / "o" / "example.py").read_text() == "mine"


def test_a_run_sets_aside_what_is_there(root):
    (root / "r").mkdir()
    for name in ("metrics.jsonl", "best.pt"):
        (root / "r" / name).write_text("mine")
    (root / "r" / "best.1.pt").write_text("mine, too")
    done = train(root)
    assert (
        done.returncode == 0 and "best.pt was there already; it is kept as best.2.pt" in done.stdout
    )
    assert {f.name for f in (root / "r").iterdir() if f.read_bytes().startswith(b"mine")} == {
        "metrics.1.jsonl",
        "best.1.pt",
        "best.2.pt",
    }


def test_writers_of_one_file_do_not_meet(tmp_path):
    """As the jobs of an array with one --out: each file is whole, and none is left over."""
    file, errors = tmp_path / "x", []

    def write(text: str) -> None:
        try:
            for _ in range(50):
                with replacing(file) as temporary:
                    temporary.write_text(text * 1000)
        except run.UserError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (
        not errors
        and os.listdir(tmp_path) == ["x"]
        and len(set(file.read_text())) == 1
        and file.stat().st_size == 1000
    )
    (tmp_path / ".x.tmp").write_text("a kill has left this")
    with replacing(file) as temporary:
        temporary.write_text("new")
    assert os.listdir(tmp_path) == ["x"] and file.read_text() == "new"


def test_results_need_the_mark_and_links_are_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    for name in ("mine", "link", "dangling", "folder"):
        with pytest.raises(run.UserError, match=name), result(tmp_path / name) as file:
            file.write_text("ours")
    assert (tmp_path / "mine").read_text() == "mine"
    refuse_foreign(tmp_path / "absent")
    set_aside(tmp_path, ("absent",))


def test_lists_of_failures_are_kept_by_other_runs(tmp_path):
    """Those of pictures that this run was given, or that are gone, are out of date."""
    a, b, c = (str(tmp_path / name) for name in ("a.jpg", "b.jpg", "c.jpg"))
    for file in (a, b, c):
        Path(file).touch()
    names = Names([str(tmp_path), a, b])
    list_of_failures = tmp_path / "failed.txt"
    list_of_failures.write_text(f"{a}: broken\n{c}: broken\n/gone.jpg: broken\n")
    note_failed(tmp_path, names, [f"{b}: cut"])
    assert list_of_failures.read_text() == f"{b}: cut\n{c}: broken\n"
    list_of_failures.write_text("my notes\n")
    with pytest.raises(run.UserError, match=r"failed\.txt"):
        note_failed(tmp_path, names, [])
    assert list_of_failures.read_text() == "my notes\n"


def test_predictions_of_equal_names(root, trained):
    for split in ("val",):
        shutil.rmtree(root / "a/images" / split)
        shutil.rmtree(root / "a/masks" / split)
        save_pair(root, split, "one/7", blocks())
        save_pair(root, split, "two/7", blocks()[::-1].copy())
    assert measure(trained, root, "--out", root / "o", "--save-predictions").returncode == 0
    assert sorted(
        p.relative_to(root / "o/predictions").as_posix()
        for p in (root / "o/predictions").rglob("*.png")
    ) == [
        "one/7.png",
        "two/7.png",
    ]
    config = load_config(root / "a.toml").data
    assert TestPictures(config, root, "val").names == ["one/7", "two/7"]


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["p/a.jpg", "p/b/c.jpg"], ["a", "c"]),
        (["p/a/1.jpg", "p/b/1.jpg"], ["a/1", "b/1"]),
        (["p/a.jpg", "p/a.png"], ["a.jpg", "a.png"]),
        (["/p/a.jpg", "/p/a.jpg"], ["a", "a"]),
    ],
)
def test_unique_names(files, names):
    assert unique_names([Path(f) for f in files]) == names


# --- one list with two meanings


def test_classes_that_were_trained_on_are_seen(root, trained):
    """Own data without `unseen`: all of them. Only of another set that has no split is none
    seen.
    """
    content, config = checkpoint.load(trained), load_config(root / "a.toml")
    own = dataset(config.data)
    assert own.seen == [] and seen_classes(own, content, config) == [0, 1, 2]
    assert seen_classes(dataset("ade20k"), content, config) == []
    assert seen_classes(dataset("voc"), content, config) == dataset("voc").seen
    assert (
        seen_classes(own, {"model": {}}, config) == []
    )  # the original's checkpoints were not trained on it
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


# --- whatever is dropped is counted and said


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
    (root / "a/masks/train/0.png").write_bytes(b"no picture")
    (root / "a/masks/train/1.png").unlink()
    shutil.copy(root / "a/images/train/2.png", root / "a/images/train/2.JPG")
    done = train(root)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("left out: ")
    for part in (
        "1 file without a partner in train",
        "1 label map that cannot be read",
        "1 training picture without a class that is trained on",
        "neither data.pictures nor data.labels",
    ):
        assert part in last


def test_files_of_a_folder_that_are_no_pictures_are_counted(root, trained):
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
        "4 files that Pillow does not read as pictures (2 .heic, 1 .dng, 1 without an ending)"
        in last
    )
    assert "2 hidden files and folders" in last and "not found: " in done.stdout


def test_pictures_among_the_results_are_counted(root, capsys):
    (root / "p" / "segmented").mkdir(parents=True)
    for name in (
        "a.png",
        "segmented/b.png",
        "segmented/c.png",
        "segmented/c.json",
        "segmented/c.overlay.jpg",
    ):
        shutil.copy(root / "a/images/val/0.png", root / "p" / name)
    run.LEFT_OUT.clear()
    assert len(find_pictures([str(root / "p")], root / "p" / "segmented")) == 2
    run.say_left_out()
    assert (
        capsys.readouterr().out == f"left out: 1 picture in {root}/p/segmented, where results go\n"
    )


# --- nothing to measure is no zero


def test_metrics_of_nothing_are_null():
    data = dataset(
        load_config(
            None,
            [
                "data.name=folder",
                "data.classes=['a','b','c']",
                "data.unseen=['c']",
                "data.pictures={split}/{id}.png",
                "data.labels={split}/{id}_.png",
            ],
        ).data
    )
    empty = summarize(torch.zeros(3, 3, dtype=torch.int64), data)
    assert all(empty[k] is None for k in empty if k != "per_class")
    half = torch.tensor(
        [[8, 0, 2], [0, 10, 0], [0, 0, 0]]
    )  # no ground truth of c, though it is predicted
    found = summarize(half, data)
    assert found["mIoU_unseen"] is None and found["hIoU"] is None and found["pAcc_unseen"] is None
    assert found["mIoU_seen"] == pytest.approx(90) and found["mIoU_gt"] == pytest.approx(90)
    assert found["mIoU"] == pytest.approx(
        (80 + 100) / 3
    )  # METHOD: divided by those with ground truth or predictions
    missed = summarize(torch.tensor([[10, 0, 0], [0, 10, 0], [5, 0, 0]]), data)
    assert missed["mIoU_unseen"] == 0 and missed["hIoU"] == 0  # measured, and all wrong
    for metrics in (empty, found):
        json.loads(json.dumps(metrics, allow_nan=False))
        assert "-" in table(metrics)


def test_best_is_chosen_by_what_was_measured():
    score = lambda **result: Segment.score(None, result)
    assert score(hIoU=None, mIoU=35.9) > score(hIoU=None, mIoU=27.0) > score(hIoU=None, mIoU=None)
    assert score(hIoU=0.0, mIoU=35.9) > score(hIoU=0.0, mIoU=27.0)
    assert score(hIoU=1.0, mIoU=5.0) > score(hIoU=0.9, mIoU=50.0)
    assert score(mIoU=3.0) > score(mIoU=2.0) and score(mIoU=None) == [-math.inf, -math.inf]


def test_the_best_of_a_run_without_unseen_ground_truth(root):
    for i in range(2):
        save_pair(root, "val", str(i), np.minimum(blocks(), 1))
    done = train(root, "--set", "train.eval_every=1", "--set", "data.unseen=['grass']")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (root / "r" / "metrics.jsonl").read_text().splitlines()]
    scores = {
        line["step"]: line["val/mIoU"] for line in lines if "val/mIoU" in line and line["step"] < 4
    }
    assert (
        all(line["val/hIoU"] is None for line in lines if "val/hIoU" in line) and len(scores) == 3
    )
    best = max(scores.values())
    assert checkpoint.load(root / "r" / "best.pt")["step"] == next(
        step for step in scores if scores[step] == best
    )


def test_weights_that_are_not_finite_are_named(root, trained):
    content = checkpoint.load(trained)
    name = next(iter(content["model"]["maskformer"]))
    content["model"]["maskformer"][name][:] = math.nan
    torch.save(content, root / "nan.pt")
    fails_in_one_line(measure(root / "nan.pt", root), "nan.pt", name, "not finite")
    clip = torch.load(root / "clip.pt")
    clip["visual.proj"][0, 0] = math.inf
    torch.save(clip, root / "clip.pt")
    fails_in_one_line(measure(trained, root), "clip.pt", "visual.proj", "not finite")


def test_scores_that_are_not_finite_give_no_labels(root, trained):
    """Weights that are finite, and too large for what is computed with them."""
    content = checkpoint.load(trained)
    for name, tensor in content["model"]["maskformer"].items():
        if name.startswith("mask_embed"):
            tensor.fill_(3e38)
    torch.save(content, root / "large.pt")
    fails_in_one_line(
        measure(root / "large.pt", root, "--out", root / "o"),
        "scores that are not finite",
        "2 pictures",
    )
    segment = (
        "eval.py",
        root / "large.pt",
        "--root",
        root,
        "--images",
        root / "a/images/val",
        "--classes",
        "cat",
    )
    fails_in_one_line(
        command(*segment, "--out", root / "s", "--device", "cpu"), "not finite", "0.png"
    )
    assert not (root / "o").exists() and not list((root / "s").iterdir())


# --- results before printing


def real(*words: object, **options: object) -> subprocess.CompletedProcess:
    """A command as a process of its own, whose streams are what is tested."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        **options,
    )


@pytest.mark.slow
def test_letters_that_the_terminal_does_not_know(root, trained):
    (root / "a.toml").write_text(CONFIG.replace("grass", "猫"), encoding="utf-8")
    latin = os.environ | {"PYTHONIOENCODING": "latin-1"}
    words = (
        "eval.py",
        trained,
        "--config",
        root / "a.toml",
        "--root",
        root,
        "--out",
        root / "o",
        "--device",
        "cpu",
    )
    done = real(*words, env=latin)
    assert done.returncode == 0, done.stderr
    assert (
        "\\u732b" in done.stdout
        and "猫" in json.loads((root / "o" / "metrics.json").read_text())["per_class"]
    )
    done = real(
        "prepare_data.py",
        "folder",
        "--config",
        root / "a.toml",
        "--root",
        root,
        "--check",
        env=latin,
    )
    assert done.returncode == 0 and "\\u732b" in done.stdout


@pytest.mark.slow
def test_nobody_reads_what_a_run_prints(root):
    words = [
        sys.executable,
        "train.py",
        "--config",
        root / "a.toml",
        "--root",
        root,
        "--out",
        root / "r",
        "--device",
        "cpu",
    ]
    words = [
        *map(str, words),
        "--set",
        "train.steps=60",
        "--set",
        "train.checkpoint_every=1000",
        "--set",
        "log.every=1",
    ]
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        process.stderr.close()
        assert process.wait(timeout=200) == 0
    assert (
        checkpoint.load(root / "r" / "last.pt")["step"] == 60
        and (root / "r" / "metrics.json").exists()
    )


@pytest.mark.slow
@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&- <&-", "> /dev/full"])
def test_streams_that_are_closed_or_full(streams, root, trained):
    words = (
        f"{sys.executable} eval.py {trained} --config {root}/a.toml --root {root} --out {root}/o "
        f"--device cpu {streams}"
    )
    assert subprocess.run(["sh", "-c", words], cwd=ROOT, timeout=200).returncode == 0
    assert json.loads((root / "o" / "metrics.json").read_text())["images"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_is_closed(ignored, root):
    """SIGHUP asks for a checkpoint, as SIGTERM does; under nohup it is nobody's concern."""
    steps = 40 if ignored else 100_000
    words = [
        sys.executable,
        "train.py",
        "--config",
        root / "a.toml",
        "--root",
        root,
        "--out",
        root / "r",
        "--device",
        "cpu",
    ]
    words = [
        *map(str, words),
        "--set",
        f"train.steps={steps}",
        "--set",
        "train.checkpoint_every=1000000",
        "--set",
        "log.every=1",
    ]
    start = (lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if ignored else None
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=start
    ) as process:
        file, until = root / "r" / "metrics.jsonl", time.time() + 120
        while not (file.exists() and file.stat().st_size) and time.time() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=120) == 0
    step = checkpoint.load(root / "r" / "last.pt")["step"]
    assert step == steps if ignored else 0 < step < steps


def test_a_broken_picture_in_an_evaluation_on_the_way_costs_no_step(root):
    (root / "a/images/val/1.png").write_bytes(b"no picture")
    done = train(root, "--set", "train.eval_every=2", "--set", "train.checkpoint_every=1000")
    fails_in_one_line(done, "1.png", "the weights are in", "--resume goes on")
    assert checkpoint.load(root / "r" / "last.pt")["step"] == 2


# --- one rule, one place


def test_hidden_folders_hold_no_data(root):
    for kind in ("images", "masks"):
        for split in ("train", "val"):
            (root / "a" / kind / split / ".ipynb_checkpoints").mkdir()
            if kind == "images" or split == "val":  # also on one side only
                shutil.copy(
                    root / f"a/{kind}/{split}/0.png",
                    root / f"a/{kind}/{split}/.ipynb_checkpoints/0-checkpoint.png",
                )
    done = check(root)
    assert (
        done.returncode == 0
        and "val: 2 pictures\n" in done.stdout
        and "train: 4 pictures\n" in done.stdout
    )
    assert "hidden files and folders left out: " in done.stdout


def test_the_walk_ends_and_finds_each_file_by_each_of_its_names(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "1").touch()
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "c").symlink_to(tmp_path / "a" / "b")
    hidden = []
    (tmp_path / ".git").mkdir()
    assert [os.path.relpath(f, tmp_path) for f in walk(tmp_path, hidden=hidden)] == ["a/b/1", "c/1"]
    assert hidden == [str(tmp_path / ".git")]
    assert [*walk(tmp_path / "a", skip=str(tmp_path / "a" / "b"))] == []


@pytest.mark.parametrize(
    ("pictures", "labels", "files", "ids"),
    [
        (
            "{split}/{id}/img.png",
            "{split}/{id}/label.png",
            ["7/img.png", "7/label.png", "8/img.png", "8/label.png"],
            2,
        ),  # labelme
        (
            "{split}/{id}.png",
            "{split}/{id}_mask.png",
            ["a.png", "a_mask.png", "b.png", "b_mask.png"],
            2,
        ),
        ("{split}/{id}_img.png", "{split}/{id}.png", ["a_img.png", "a.png"], 1),
        ("{split}/{id}.*", "{split}/{id}.png", ["a.jpg", "a.png", "b.webp", "b.png"], 2),
        ("{split}/{id}/rgb/0.png", "{split}/{id}/gt/0.png", ["x/y/rgb/0.png", "x/y/gt/0.png"], 1),
    ],
)
def test_layouts_that_the_rules_accept_are_found(pictures, labels, files, ids, tmp_path):
    for file in files:
        (tmp_path / "val" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / file).touch()
    listing = find_listing(
        described(f"data.pictures={pictures}", f"data.labels={labels}"), tmp_path, "val"
    )
    assert (
        len(listing.pairs) == ids and not listing.alone and not listing.twins and not listing.others
    )
    assert all(picture != label for picture, label in listing.pairs)


def test_a_label_map_without_a_picture_is_alone_once(tmp_path):
    for file in ("a.png", "a_mask.png", "b_mask.png", "c.png", "d.tif"):
        (tmp_path / "val" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / file).touch()
    listing = find_listing(
        described("data.pictures={split}/{id}.png", "data.labels={split}/{id}_mask.png"),
        tmp_path,
        "val",
    )
    assert [p.name for p, _ in listing.pairs] == ["a.png"]
    assert sorted(f.name for f in listing.alone) == ["b_mask.png", "c.png"] and [
        Path(f).name for f in listing.others
    ] == ["d.tif"]


def test_pictures_are_not_their_own_labels(tmp_path):
    with pytest.raises(run.UserError, match=r"data\.labels"):
        find_pairs(
            described("data.pictures={split}/{id}.png", "data.labels={split}/{id}.png"),
            tmp_path,
            "val",
        )


@pytest.mark.parametrize(
    "names",
    [
        ["cat", "Cat"],
        ["hot dog", "hot  dog"],
        ["tv &amp; radio", "TV & radio"],
        ["caf\u00e9", "CAF\u00c9"],
    ],
)
def test_names_that_are_one_to_clip(names, root):
    pytest.importorskip("ftfy")
    listed = ", ".join(f"'{name}'" for name in names)
    with pytest.raises(run.UserError, match="is the same to CLIP as"):
        check_names(names)
    with pytest.raises(run.UserError, match="is the same to CLIP as"):
        dataset(load_config(root / "a.toml", [f"data.classes=[{listed}]"]).data)
    with pytest.raises(run.UserError, match="stands twice"):
        read_words(", ".join(names).replace("&amp;", "&"))


@pytest.mark.slow
def test_a_list_of_two_columns_wants_ids(root, tmp_path):
    for file in ("JPEGImages/x.jpg", "SegmentationClassAug/x.png"):
        (tmp_path / "VOC2012" / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / "VOC2012" / file)
    for line in ("/JPEGImages/x.jpg /SegmentationClassAug/x.png", "x.jpg", "x -1", "JPEGImages\\x"):
        for split in ("train", "val"):
            (tmp_path / "VOC2012" / f"{split}.txt").write_text(f"{line}\n")
        offline = {"ZSSEG_CACHE": str(tmp_path / "cache")}
        fails_in_one_line(
            command("prepare_data.py", "voc", "--root", tmp_path, env=offline),
            ".txt: wants ids, one a line",
            "{id}",
        )
        assert not (tmp_path / "cache").exists()  # nothing was asked of the network
    for split in ("train", "val"):
        (tmp_path / "VOC2012" / f"{split}.txt").write_bytes(b"\xef\xbb\xbfx\r\nx\r\n")
    assert len(find_pairs("voc", tmp_path, "val")) == 2
    assert find_listing("voc", tmp_path, "val").remarks == [
        "1 line of val.txt stand there twice, and count twice"
    ]


# --- text that users write


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_as_editors_save_it(encoding, root, monkeypatch):
    (root / "b.toml").write_bytes(
        CONFIG.replace("\n", "\r\n").replace("grass", "猫").encode(encoding)
    )
    assert load_config(root / "b.toml").data.classes == ["cat", "dog", "猫"]
    (root / "words").write_bytes("cat\r\nsofa = couch\r\n".encode(encoding))
    assert read_words(str(root / "words")).names == ["cat", "sofa"]
    files = [root / "a/images/val/0.png", root / "a/images/val/1.png"]
    monkeypatch.setattr(
        sys,
        "stdin",
        type(
            "Input",
            (),
            {
                "buffer": type(
                    "B",
                    (),
                    {"read": staticmethod(lambda: "\r\n".join(map(str, files)).encode(encoding))},
                )
            },
        ),
    )
    assert find_pictures(["-"], root / "out")[1:] == [*map(str, files)]


def test_lines_end_at_newlines_alone():
    """A name may hold what str.splitlines takes for an end, and bytes that are no UTF-8."""
    names = ["a\x0bb", "a\x1cb", "a\u2028b", "a\x85b", " a ", "a\rb", os.fsdecode(b"\xff")]
    assert (
        split_lines(decode("\r\n".join(names).encode("utf-8", "surrogateescape") + b"\n")) == names
    )
    assert split_lines("") == [] and split_lines("a\n\nb") == ["a", "", "b"]


@pytest.mark.slow
def test_a_file_name_with_a_line_separator(root, trained):
    name = "a\u2028b\x0bc.png"
    shutil.copy(root / "a/images/val/0.png", root / name)
    (root / "list.txt").write_text(f"{root}/{name}\n", encoding="utf-8")
    words = (
        f"{sys.executable} eval.py {trained} --root {root} --images - --classes cat --out "
        f"{root}/o --device cpu"
    )
    words += f" < {root}/list.txt"
    done = subprocess.run(
        ["sh", "-c", words], cwd=ROOT, timeout=200, capture_output=True, text=True
    )
    assert done.returncode == 0 and (root / "o" / name).exists(), done.stderr


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("wrods.csv", "cannot be read"),
        ("lists/words.json", "cannot be read"),
        ("cat, words.txt", "looks like the name of a file"),
        ('["cat", "dog"]', "brackets or quotes"),
        ("'cat', 'dog'", "brackets or quotes"),
        ("/tmp/words", "cannot be read"),
        ("./words", "cannot be read"),
        ("tests/words", "cannot be read"),
        ("cat.png", "cannot be read"),
    ],
)
def test_words_that_mean_something_else(text, part):
    with pytest.raises(run.UserError, match=part):
        read_words(text)


def test_words_with_unusual_signs_are_words():
    assert read_words("tv/monitor, St. Bernard, bull's eye, door (wooden), C++").names == [
        "tv/monitor",
        "St. Bernard",
        "bull's eye",
        "door (wooden)",
        "C++",
    ]


def test_home_is_a_tilde(root, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(root))
    done = command("eval.py", "--help")
    assert done.returncode == 0
    done = command(
        "prepare_data.py", "folder", "--config=~/a.toml", "--root=~", env={"HOME": str(root)}
    )
    assert done.returncode == 0 and "val: 2 pictures" in done.stdout, done.stderr
    config = load_config(root / "a.toml", ["data.folder=~/a", "clip.weights=~/clip.pt"])
    assert config.data.folder == f"{root}/a" and config.clip.weights == f"{root}/clip.pt"


def test_nobody_has_a_home(monkeypatch, capsys):
    monkeypatch.delenv("ZSSEG_CACHE")
    run.home_cache.cache_clear()

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    folder = run.cache_dir()
    assert (
        folder == run.cache_dir()
        and str(os.getuid()) in folder.name
        and not folder.is_relative_to(ROOT)
    )
    assert capsys.readouterr().out.count("no home folder") == 1
    assert run.path_of("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    run.home_cache.cache_clear()


# --- checkpoints of others


def test_checkpoints_with_numbers_and_arrays_of_numpy(tmp_path):
    content = {
        "score": np.float64(0.5),
        "step": np.int64(7),
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "model": {"w": np.ones((2, 2)), "flags": np.array([True, False])},
        "list": [np.float32(2), (np.int8(1),)],
    }
    torch.save(content, tmp_path / "np.pt")
    found = checkpoint.load(tmp_path / "np.pt")
    assert found["score"] == 0.5 and found["step"] == 7 and found["list"] == [2.0, (1,)]
    assert (
        torch.equal(found["array"], torch.arange(6.0).reshape(2, 3))
        and found["model"]["w"].dtype == torch.float64
    )
    assert found["model"]["flags"].tolist() == [True, False]


def test_what_cannot_be_read_is_named(tmp_path):
    torch.save({"model": {}, "config": Path("x")}, tmp_path / "path.pt")
    torch.save({"model": {}, "array": np.array(["text"])}, tmp_path / "text.pt")
    for name, part in (("path.pt", "pathlib"), ("text.pt", "")):
        with pytest.raises(run.UserError, match=rf"{name}: .*{part}"):
            checkpoint.load(tmp_path / name)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_state_dicts_are_unwrapped(prefix, root, trained, capsys):
    content = checkpoint.load(trained)
    before = content["model"]["maskformer"]
    content["model"]["maskformer"] = {prefix + k: v for k, v in before.items()}
    torch.save(content, root / "wrapped.pt")
    assert measure(root / "wrapped.pt", root, "--out", root / "o").returncode == 0
    clip = {prefix + k: v for k, v in torch.load(root / "clip.pt").items()}
    torch.save({"epoch": 3, "state_dict": clip}, root / "trainer.pt")  # as OpenCLIP's trainer saves
    assert (
        weights.load_clip_state(str(root / "trainer.pt"), root).keys()
        == torch.load(root / "clip.pt").keys()
    )


def test_training_starts_from_a_segmenter(root, trained):
    """All that fits is loaded, whatever the classes are: the head compares with texts."""
    (root / "b.toml").write_text(CONFIG.replace('"cat", "dog", "grass"', '"sheep", "road", "tree"'))
    words = (
        "train.py",
        "--config",
        root / "b.toml",
        "--root",
        root,
        "--device",
        "cpu",
        "--set",
        f"train.init={trained}",
    )
    done = command(
        *words, "--out", root / "r", "--set", "train.lr=1e-30", "--set", "train.weight_decay=0"
    )
    assert done.returncode == 0, done.stderr
    before, after = (
        checkpoint.load(file)["model"]["maskformer"] for file in (trained, root / "r" / "last.pt")
    )
    assert f"train.init {trained}: {len(before)} tensors loaded, 0 dropped" in done.stdout
    same = [
        torch.equal(before[k], after[k])
        for k in before
        if "running" not in k and "num_batches" not in k
    ]
    assert all(same) and len(same) > 50
    done = command(*words, "--out", root / "wider", "--set", "model.queries=9")
    assert done.returncode == 0 and "start afresh: " in done.stdout and "query" in done.stdout
    fails_in_one_line(
        command(*words, "--out", root / "x", "--set", "train.init=nowhere.pt"),
        "train.init nowhere.pt",
        "no such file",
    )
    torch.save({"model": {"maskformer": {"x": torch.zeros(1)}}, "config": {}}, root / "other.pt")
    fails_in_one_line(
        command(*words, "--out", root / "x", "--set", f"train.init={root}/other.pt"),
        "holds no weight that fits",
    )


def test_clips_that_are_not_openai_s(root, monkeypatch, capsys):
    """GELU instead of QuickGELU, heads of another width: nothing in the file tells."""
    from zsseg.clip import CLIP, VisionTransformer, build_clip

    torch.manual_seed(0)
    made = CLIP(
        VisionTransformer(32, 16, 160, 2, 64, heads=2, activation="gelu"),
        64,
        40,
        514,
        64,
        1,
        "gelu",
    ).eval()
    state, image = made.state_dict(), torch.randn(2, 3, 32, 32)
    torch.save(state, root / "laion.pt")
    with torch.no_grad():
        wanted = made.encode_image(image)
        assert torch.allclose(build_clip(state, "gelu", 2).encode_image(image), wanted, atol=1e-6)
        for other in (build_clip(state, "quickgelu", 2), build_clip(state, "gelu", 4)):
            assert not torch.allclose(other.encode_image(image), wanted, atol=1e-4)
    with pytest.raises(run.UserError, match=r"clip\.heads: is 3"):
        build_clip(state, "gelu", 3)
    words = [
        "train.py",
        "--config",
        root / "a.toml",
        "--root",
        root,
        "--device",
        "cpu",
        "--set",
        f"clip.weights={root}/laion.pt",
    ]
    words += ["--set", "clip.heads=2"]
    done = command(*words, "--out", root / "r1")
    assert done.returncode == 0 and "taken for one with quickgelu and 2 heads" in done.stdout, (
        done.stderr
    )
    done = command(*words, "--set", "clip.activation=gelu", "--out", root / "r2")
    assert done.returncode == 0 and "taken for" not in done.stdout
    recorded = checkpoint.load(root / "r2" / "last.pt")["config"]["clip"]
    assert recorded["activation"] == "gelu" and recorded["heads"] == 2
    assert checkpoint.load(root / "r1" / "last.pt")["config"]["clip"]["activation"] == "quickgelu"
    digest = weights.hashlib.sha256((root / "laion.pt").read_bytes()).hexdigest()
    monkeypatch.setitem(weights.KNOWN_ACTIVATIONS, "gelu", (digest[:8],))
    config = load_config(root / "a.toml", [f"clip.weights={root}/laion.pt"])
    assert weights.find_shape(config.clip, state, root) == ("gelu", 0)


def test_text_features_depend_on_activation_heads_and_vocabulary(root, monkeypatch):
    """What the cache is asked by must hold all that its content follows from."""
    from zsseg.clip import build_clip
    from zsseg.prompts import FixedPrompt, text_features
    from zsseg.tokenizer import Tokenizer

    state, prompt = tiny_clip_state(), FixedPrompt(["a {}."])
    tokenizer = Tokenizer(514, 40)
    found = [
        text_features(build_clip(state, activation), tokenizer, prompt, ["cat"])
        for activation in ("quickgelu", "gelu")
    ]
    assert not torch.equal(*found)
    plain = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: plain(text[::-1]))  # another vocabulary
    assert not torch.equal(text_features(build_clip(state), tokenizer, prompt, ["cat"]), found[0])


def test_label_statistics_follow_every_change(root):
    """A label map that is replaced by one of the same size and an older date, as `cp -p` and
    archives do.
    """
    config = load_config(root / "a.toml").data
    before = label_statistics(config, root, "train").histogram(3)
    file = root / "a/masks/train/0.png"
    size, dates = file.stat().st_size, file.stat()
    other = (blocks() + 1) % 3
    Image.fromarray(other).save(file)
    file.write_bytes(file.read_bytes().ljust(size, b"\0")[: max(size, file.stat().st_size)])
    os.utime(file, ns=(dates.st_atime_ns, dates.st_mtime_ns - 10**12))
    after = label_statistics(config, root, "train").histogram(3)
    assert after.tolist() != before.tolist()


@pytest.mark.slow
def test_pseudo_labels_follow_pictures_and_settings(root, trained):
    """They are numbered: one picture more, and each would belong to another."""
    settings = ["--set", "data.unseen=['grass']"]
    assert train(root, *settings).returncode == 0
    words = [*settings, "--set", "data.train_on=all", "--set", f"train.teacher={root}/r/last.pt"]
    own = (
        "train.py",
        "--config",
        root / "a.toml",
        "--root",
        root,
        "--out",
        root / "self",
        "--device",
        "cpu",
        *words,
    )
    assert command(*own).returncode == 0
    (root / "self" / "last.pt").unlink()
    (root / "self" / "best.pt").unlink()
    assert command(*own).returncode == 0  # as they were
    for name in ("last.pt", "best.pt", "previous.pt"):
        (root / "self" / name).unlink(missing_ok=True)
    save_pair(root, "train", "00", blocks())
    fails_in_one_line(command(*own), "pseudo labels", "other pictures")


# --- a folder with ten mistakes


def test_turned_pictures_are_named(root):
    exif = Image.Exif()
    exif[0x0112] = 3
    save_pair(root, "train", "0", blocks(), exif=exif)
    exif[0x0112] = 6
    save_pair(root, "val", "0", blocks(), exif=exif)
    done = check(root)
    assert done.returncode == 0 and done.stdout.count("the camera turned the picture (EXIF)") == 2
    assert str(root / "a/images/train/0.png") in done.stdout
    Image.fromarray(blocks().T.copy()).save(root / "a/masks/val/0.png")
    done = check(root)
    fails_in_one_line(done, "1 file is broken")
    assert "or set data.exif_turn" in done.stdout
    config = load_config(root / "a.toml", ["data.exif_turn=true"]).data
    image, labels, _ = TestPictures(config, root, "val")[0]
    assert labels.shape == (60, 48) and image[0].shape[1] > image[0].shape[2]
    assert not len(label_statistics(config, root, "train").remarks)


def test_ten_mistakes_at_once_are_all_named(root):
    a = root / "a"
    for i in range(4, 14):
        save_pair(root, "train", str(i), np.minimum(blocks(), 1))
    for i in range(4):
        save_pair(root, "train", str(i), np.minimum(blocks(), 1))
    (a / "images/train/4.png").write_bytes(b"")  # 1: an empty picture
    (a / "masks/train/5.png").write_bytes(
        (a / "masks/train/5.png").read_bytes()[:60]
    )  # 2: a cut label map
    Image.new("L", (10, 10)).save(a / "masks/train/6.png")  # 3: of another size
    Image.new("RGB", (60, 48)).save(a / "masks/train/7.png")  # 4: in colours
    (a / "masks/train/8.png").unlink()  # 5: a picture without labels
    (a / "images/train/9.png").unlink()  # 6: labels without a picture
    Image.fromarray(np.where(blocks() > 0, 200, 0).astype(np.uint8)).save(
        a / "masks/train/10.png"
    )  # 7: a value of no class
    # 8: no pixel of "grass" in train, by the above
    exif = Image.Exif()
    exif[0x0112] = 3
    save_pair(root, "train", "11", np.minimum(blocks(), 1), exif=exif)  # 9: turned by the camera
    shutil.copy(a / "images/train/12.png", a / "images/train/12.jpeg")  # 10: fits no pattern
    shutil.copy(a / "images/train/13.png", a / "images/val/1.png")  # 11: in two splits
    picture = Image.fromarray(np.minimum(blocks(), 1))
    picture.putpalette([0, 0, 0, 255, 255, 255])
    picture.save(a / "masks/train/3.png")  # 12: greys that are no indices
    Image.fromarray(blocks()).convert("L").save(
        a / "masks/train/2.png", "JPEG"
    )  # 13: losses, under a wrong name
    save_pair(root, "train", "1", np.full((48, 60), 255, np.uint8))  # 14: no class at all
    (a / "images/train/.thumbs").mkdir()  # 15
    done = check(root)
    fails_in_one_line(done, "7 files are broken or have no partner")
    for part in (
        "images/train/4.png: cannot be read",
        "masks/train/5.png: cannot be read",
        "masks/train/6.png: is 10 x 10",
        "masks/train/7.png: has 3 channels",
        "images/train/8.png has no partner",
        "masks/train/9.png has no partner",
        "of no class: 200 (",
        "no pixel in train of 1 class of 3: grass",
        "images/train/11.png)",
        "(1 .jpeg)",
        "1 picture is in another split, too",
        "the palette is grey but not in order",
        "masks/train/2.png: is JPEG",
        "1 label map shows no class at all",
        "1 hidden file or folder left out",
    ):
        assert part in done.stdout, part


def test_the_check_goes_on_after_what_ends_other_commands(root, capsys):
    """Two files of one id, and a split that is not there."""
    shutil.copy(root / "a/images/val/0.png", root / "a/images/val/0.webp")
    shutil.rmtree(root / "a/images/train")
    text = CONFIG.replace("images/{split}/{id}.png", "images/{split}/{id}.*")
    (root / "a.toml").write_text(text)
    with pytest.raises(run.UserError, match="2 files are broken"):
        prepare_data.main(
            ["folder", "--config", str(root / "a.toml"), "--root", str(root), "--check"]
        )
    text = capsys.readouterr().out
    assert "has the id of" in text and "val: 2 pictures" in text and "no 'train' file is" in text


def test_batch_norm_wants_more_than_one_value(root):
    done = train(root, "--set", "train.batch_size=1", "--set", "data.crop=32")
    fails_in_one_line(done, "train.batch_size", "batch norm")
    assert tiny_config().train.batch_size > 1


# --- what a second reading found


@pytest.mark.slow
def test_results_of_another_picture_are_not_replaced(root, trained):
    """Two folders whose pictures have the same names, as cameras give them; equal sizes and dates
    do not make them equal.
    """
    for folder in ("cam1", "cam2"):
        (root / folder).mkdir()
        shutil.copy(root / "a/images/val/0.png", root / folder / "0001.png")
        os.utime(root / folder / "0001.png", ns=(10**18, 10**18))
    segment = lambda *more: command(
        "eval.py",
        trained,
        "--root",
        root,
        "--classes",
        "cat",
        "--out",
        root / "o",
        "--device",
        "cpu",
        *more,
    )
    assert segment("--images", root / "cam1").returncode == 0
    before = (root / "o" / "0001.json").read_bytes()
    for more in ([], ["--resume"]):
        fails_in_one_line(
            segment("--images", root / "cam2", *more),
            "the result of another picture",
            "cam1/0001.png",
        )
    assert (root / "o" / "0001.json").read_bytes() == before


def test_drawing_replaces_no_picture(tmp_path, monkeypatch):
    file = tmp_path / "shapes/images/train/train00000.jpg"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"mine")
    monkeypatch.setattr(shapes, "SPLITS", {"train": 1})
    with pytest.raises(run.UserError, match=r"train00000\.jpg"):
        shapes.generate(tmp_path / "shapes")
    assert file.read_bytes() == b"mine"
    file.unlink()
    shapes.generate(tmp_path / "shapes")


def test_label_maps_of_others_are_no_pseudo_labels(root):
    assert train(root, "--set", "data.unseen=['grass']").returncode == 0
    (root / "self" / "pseudo").mkdir(parents=True)
    shutil.copy(root / "a/masks/train/0.png", root / "self" / "pseudo" / "000000.png")
    words = [
        "--set",
        "data.unseen=['grass']",
        "--set",
        "data.train_on=all",
        "--set",
        f"train.teacher={root}/r/last.pt",
    ]
    fails_in_one_line(train(root, "--out", root / "self", *words), "pseudo labels")


def test_another_clip_has_heads_of_its_own(root, trained):
    content = checkpoint.load(trained)
    content["config"]["clip"] |= {"heads": 3, "activation": "gelu"}
    torch.save(tiny_clip_state(1), root / "other.pt")
    config = load_config(None, [f"clip.weights={root}/other.pt"], content["config"])
    segmenter = load_segmenter(content, config, root, "x")
    assert {block.attn.heads for block in segmenter.clip.visual.transformer.resblocks} == {1}
    assert config.clip.activation == "quickgelu" and config.clip.heads == 0


def test_patterns_say_what_they_leave_out(root, capsys):
    (root / "p" / "sub").mkdir(parents=True)
    shutil.copy(root / "a/images/val/0.png", root / "p" / "x.png")
    (root / "p" / "l.png").symlink_to(root / "p" / "x.png")
    run.LEFT_OUT.clear()
    assert len(find_pictures([str(root / "p" / "*")], root / "o")) == 2
    run.say_left_out()
    text = capsys.readouterr().out
    assert "1 folder that" in text and "1 link to pictures" in text


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
    assert done.returncode == 0 and "left out: 2 pages or frames of pictures" in done.stdout
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(root / "a/masks/val/0.png")
    assert (
        "the picture has more than one page or frame; the first is read (1 file"
        in check(root).stdout
    )


def test_nothing_measured_makes_no_best(root):
    for i in range(2):
        save_pair(root, "val", str(i), np.full((48, 60), 255, np.uint8))
    assert train(root, "--set", "train.eval_every=1").returncode == 0
    assert checkpoint.load(root / "r" / "best.pt")["step"] == 4


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(root):
    """The second ends in a line; when the first is gone, however it ended, its folder is free."""
    words = [
        sys.executable,
        "train.py",
        "--config",
        root / "a.toml",
        "--root",
        root,
        "--out",
        root / "r",
        "--device",
        "cpu",
    ]
    words = [
        *map(str, words),
        "--set",
        "train.steps=100000",
        "--set",
        "log.every=1",
        "--set",
        "data.workers=1",
    ]
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        file, until = root / "r" / "metrics.jsonl", time.time() + 120
        while not (file.exists() and file.stat().st_size) and time.time() < until:
            time.sleep(0.1)
        fails_in_one_line(train(root), "another run is writing there")
        process.kill()
    assert train(root).returncode == 0


def test_a_resumed_run_starts_from_its_own_weights(root):
    assert train(root).returncode == 0
    done = train(root, "--resume", "--set", "train.init=nowhere.pt", "--set", "train.steps=5")
    assert done.returncode == 0 and "train.init is not read again" in done.stdout, done.stderr


def test_checkpoints_all_of_numpy(root, trained):
    numpy = lambda part: {k: v.numpy() for k, v in part.items()}
    content = checkpoint.load(trained)
    content["model"] = {part: numpy(state) for part, state in content["model"].items()}
    torch.save(content, root / "np.pt")
    torch.save(numpy(torch.load(root / "clip.pt")), root / "clip.pt")
    assert measure(root / "np.pt", root, "--out", root / "o").returncode == 0
    torch.save({"model": {"x": np.zeros((0, 3)), "y": np.array(7)}}, root / "odd.pt")
    found = checkpoint.load(root / "odd.pt")["model"]
    assert found["x"].shape == (0, 3) and isinstance(found["y"], torch.Tensor) and found["y"] == 7
    torch.save({"model": {"x": np.zeros(2, np.complex64)}}, root / "odd.pt")
    with pytest.raises(run.UserError, match="holds an array of kind 'c8'"):
        checkpoint.load(root / "odd.pt")


def test_an_original_with_further_entries_starts_a_training(root, trained):
    """What fits is loaded; all else is named."""
    content = checkpoint.load(trained)
    original = {
        "clip_adapter.non_object_embedding": content["model"]["maskformer"]["non_object"],
        "extra.thing": torch.zeros(2),
    }
    torch.save({"model": original}, root / "model_final.pth")
    done = train(root, "--set", f"train.init={root}/model_final.pth")
    assert done.returncode == 0, done.stderr
    assert (
        "1 tensors loaded, 1 dropped: extra.thing" in done.stdout and "start afresh" in done.stdout
    )


def test_seen_classes_are_compared_by_their_names(root, trained):
    content = checkpoint.load(trained)
    config = load_config(root / "a.toml", ["data.classes=['Grass','zebra','cat']"])
    assert seen_classes(dataset(config.data), content, config) == [0, 2]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat\rdog\rgrass", ["cat", "dog", "grass"]),
        ("cat\tdog", None),
        ("cat; dog", None),
        ("0: cat\n1: dog", None),
        ("cat # a comment", None),
        ("1 = cat", None),
        ("3d printer\n2 of spades", ["3d printer", "2 of spades"]),
    ],
)
def test_word_files_of_other_kinds(text, names, tmp_path):
    (tmp_path / "words.txt").write_bytes(text.encode())
    if names:
        assert read_words(str(tmp_path / "words.txt")).names == names
    else:
        with pytest.raises(run.UserError, match="is not a line of names"):
            read_words(str(tmp_path / "words.txt"))
    (tmp_path / "words.txt").write_bytes("cat\ndog".encode("utf-16-le"))
    with pytest.raises(run.UserError, match="not UTF-8"):
        read_words(str(tmp_path / "words.txt"))


def test_results_that_cannot_be_written_are_noticed_first(root, trained, monkeypatch):
    (root / "file").touch()
    done = measure(trained, root, "--out", root / "file" / "o")
    fails_in_one_line(done, "cannot be written")
    assert "evaluate val" not in done.stdout
    assert not list(root.glob("o*"))


def test_measuring_leaves_no_trace_where_it_ends_early(root, trained):
    (root / "a/images/val/1.png").write_bytes(b"no picture")
    assert measure(trained, root, "--out", root / "o").returncode == 2 and not (root / "o").exists()
