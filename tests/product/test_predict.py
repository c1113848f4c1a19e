"""Any images, any words: finding images, what is written, resuming, cached features, mistakes."""

import io
import json
import os
import re
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command, fails_in_one_line, process, succeed
from own_data import files_below as results
from PIL import Image

import eval as evaluation
from zsseg.apps import predict
from zsseg.apps.predict import find_images
from zsseg.images import read_image
from zsseg.segmenter import Segmenter
from zsseg.utils import UserError, split_lines
from zsseg.visualize import with_legend, word_colours

MAX_FUNCTIONS = 162
MAX_FILES = 18
PHOTOS = ["a.jpg", "a.png", "deep16", "more/deep/ünïcode", "more/one pixel", "more/palette"]


@pytest.fixture
def photos(tmp_path) -> Path:
    """Images of odd kinds and sizes, two broken ones, things that are no images."""
    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)
    (folder / "more" / "deep").mkdir(parents=True)

    def noise(*size: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))

    noise(50, 70).save(folder / "a.jpg")
    noise(31, 33).convert("L").save(folder / "a.png")  # shares its name with another
    noise(40, 40).quantize(8).save(folder / "more" / "palette.gif")
    noise(1, 1).save(folder / "more" / "one pixel.bmp")
    noise(20, 90).convert("CMYK").save(folder / "more" / "deep" / "ünïcode.TIF")
    Image.fromarray(rng.integers(0, 65536, (30, 40), np.uint16)).save(folder / "deep16.png")
    (folder / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:300])
    (folder / "more" / "not.png").write_text("no image")
    (folder / "notes.txt").write_text("no image either")
    (folder / ".hidden.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "more" / "loop").symlink_to(folder)
    return folder


def segment(model: Path, out: Path, *more: object, run=succeed):
    words = ("--root", model.parents[1], "--device", "cpu", "--out", out)
    return run("eval.py", model, *words, *more)


# --- finding images


def test_images_are_found_and_their_results_named(photos, tmp_path):
    """Hidden files are ignored, links followed once; files are what somebody names."""
    found = find_images([str(photos)], tmp_path / "out")
    assert sorted(name for _, name in found) == sorted([*PHOTOS, "cut", "more/not"])
    shutil.copy(photos / "a.png", photos / "a.jpg.png")
    names = [name for _, name in find_images([str(photos)], tmp_path / "out")]
    assert len({*names}) == len(names) == 9
    notes = photos / "notes.txt"
    assert find_images([str(notes), str(notes)], tmp_path / "out") == [(str(notes), "notes")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image is there"):
        find_images([str(tmp_path / "empty")], tmp_path / "out")
    (photos / "more.png").mkdir()  # beside it, more.jpg cannot have its label map there
    shutil.copy(photos / "a.jpg", photos / "more.jpg")
    assert "more.jpg" in [name for _, name in find_images([str(photos)], tmp_path / "out")]


def test_images_where_results_go_are_refused(photos, tmp_path, monkeypatch):
    """And left out of the folder around."""
    monkeypatch.chdir(photos)
    (photos / "more" / "out").mkdir()
    shutil.copy("a.png", "more/out/b.png")
    assert len(find_images(["."], Path("more/out"))) == 8
    assert len(find_images(["."], tmp_path / "out")) == 9
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a.jpg")))
    for given, out in (("a.jpg", "."), ("more", "more"), ("more/out", "more"), ("-", ".")):
        with pytest.raises(UserError, match="are where results go"):
            find_images([given], Path(out))


def test_lines_end_at_newlines_alone(tmp_path, monkeypatch):
    """A file's name may hold what str.splitlines takes for an end, and bytes that are no UTF-8."""
    names = ["a\x0bb", "a\x1cb", "a\u2028b", "a\x85b", " a ", os.fsdecode(b"\xff")]
    assert split_lines("\r\n".join(names) + "\n") == names
    content = b"\n".join(os.fsencode(tmp_path / name) for name in names) + b"\n\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    found = find_images(["-"], tmp_path / "out")
    assert found == sorted((str(tmp_path / name), name) for name in names)


# --- segmenting


def test_a_photo_passes_few_functions(trained, photos, tmp_path):
    """A house that one can read: all that happens between the command and the results."""
    calls = set()

    def profile(frame, event, _):
        code = frame.f_code
        is_function = code.co_flags & 1 and not code.co_name.startswith("<")  # no class body
        if event == "call" and is_function and code.co_filename.startswith(f"{ROOT}/"):
            calls.add((code.co_filename, code.co_qualname))

    options = ["--images", photos / "a.jpg", "--classes", "cat, dog, grass", "--device", "cpu"]
    words = [trained, "--root", trained.parents[1], *options, "--out", tmp_path / "out"]
    sys.setprofile(profile)
    threading.setprofile(profile)
    try:
        evaluation.main([*map(str, words)])
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    calls = {call for call in calls if "/tests/" not in call[0]}
    assert len(calls) <= MAX_FUNCTIONS, sorted(calls)
    assert len({file for file, _ in calls}) <= MAX_FILES, sorted({file for file, _ in calls})


def test_every_image_gets_its_files(trained, photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    drawn = []
    draw = lambda image, legend: drawn.append(legend) or with_legend(image, legend)
    monkeypatch.setattr(predict, "with_legend", draw)
    words = ("--images", photos, "--classes", "cat, couch = sofa; other: sky, dog")
    done = segment(trained, out, *words, run=command)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 3 and lines[-1].startswith("error: images: 2 of 8 cannot be read")
    assert "cut.jpg: cannot be read" in done.stderr and "not.png: " in done.stderr
    endings = (".png", ".overlay.jpg", ".json")
    assert {*results(out)} == {name + ending for name in PHOTOS for ending in endings}
    for name in PHOTOS:
        content = json.loads((out / f"{name}.json").read_text("utf-8"))
        classes = content["classes"]
        photo = Image.open(out / f"{name}.png")
        assert photo.size == read_image(Path(content["image"]), turn=True).size
        ids, pixels = np.unique(photo, return_counts=True)
        assert {c["id"]: c["pixels"] for c in classes} == dict(zip(ids, pixels, strict=True))
        assert [c["pixels"] for c in classes] == sorted(pixels.tolist(), reverse=True)
        assert {(c["id"], c["name"]) for c in classes} <= {*enumerate(["cat", "couch", "other"])}
        assert sum(c["share"] for c in classes) == pytest.approx(1)
        edge = predict.OVERLAY_EDGE
        assert max(Image.open(out / f"{name}.overlay.jpg").size) >= edge
        colours = np.array(photo.getpalette()).reshape(-1, 3).tolist()
        assert colours == [*word_colours(["cat", "couch"]).tolist(), [96, 96, 96]]
        texts = [(colours[c["id"]], f"{c['name']}  {100 * c['share']:.1f}%") for c in classes]
        assert texts in [[(colour.tolist(), text) for colour, text in legend] for legend in drawn]
    shutil.copy(photos / "a.jpg", photos / "cut.jpg")
    (photos / "more" / "not.png").unlink()
    before = results(out)
    again = segment(trained, out, *words, "--resume")
    assert "1 image in" in again.stdout
    assert before.items() < results(out).items() and (out / "cut.json").exists()


@pytest.mark.parametrize("settings", [[], ["--set=eval.flip=true", "--set=eval.sizes=[64,96]"]])
def test_the_data_set_s_images_come_out_as_in_evaluation(settings, trained, tmp_path):
    images = trained.parents[1] / "a/images/val"
    segment(trained, tmp_path / "a", "--save-predictions", *settings)
    segment(trained, tmp_path / "b", "--images", images, *settings)
    for file in (tmp_path / "a" / "predictions").iterdir():
        other = Image.open(tmp_path / "b" / file.name)
        assert np.array_equal(Image.open(file), other), file.name


def test_scores_are_those_of_the_label_map():
    """The mean over a class's pixels; of "other", over all background words'."""
    labels = torch.tensor([[0, 1, 2], [0, 3, 3]])
    scores = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.5, 0.7]])
    ids, classes = predict.count_classes(labels, scores, ["a", "b", "other"])
    assert ids.tolist() == [[0, 1, 2], [0, 2, 2]] and ids.dtype == np.uint8
    assert [(c["name"], c["pixels"]) for c in classes] == [("other", 3), ("a", 2), ("b", 1)]
    assert [c["score"] for c in classes] == pytest.approx([0.5, 0.2, 0.2])


def test_resuming_segments_what_is_missing(trained, tmp_path):
    """Results of other words, settings, weights or images do not count as done, those corrected by
    hand do; what is made again is the same.
    """
    out = tmp_path / "out"
    images = tmp_path / "images"
    shutil.copytree(trained.parents[1] / "a/images/train", images)
    model = shutil.copy(trained, tmp_path)

    def count(*more: object, words: str = "cat, dog") -> int:
        options = ("--root", trained.parents[1], "--images", images, "--classes", words)
        done = segment(Path(model), out, *options, *more)
        return int(re.search(r"^(\d+) images? in", done.stdout, re.M).group(1))

    assert count() == 4 and count("--resume") == 0
    whole = results(out)
    (out / "0.json").unlink()
    (out / "1.json").write_text("[]")
    (out / "2.json").write_text('{"image": ')
    (out / "3.png").unlink()
    assert count("--resume") == 4 and results(out) == whole
    (out / "1.png").write_bytes(b"corrected")
    assert count("--resume") == 0 and (out / "1.png").read_bytes() == b"corrected"
    assert count() == 4 and results(out) == whole
    # Of the same name, size and time: another image all the same
    shutil.copy2(images / "3.png", tmp_path / "3.png")
    os.replace(tmp_path / "3.png", images / "3.png")
    assert count("--resume") == 1
    assert count("--resume", "--set", "clip.mask_threshold=0.6") == 4
    assert count("--resume", words="cat, dogs") == 4
    os.utime(model)
    assert count("--resume", words="cat, dogs") == 4


def test_many_words_are_sixteen_bits(trained, photos, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("\n".join(f"thing {i}" for i in range(300)))
    segment(trained, tmp_path / "out", "--images", photos / "a.jpg", "--classes", words)
    labels = np.array(Image.open(tmp_path / "out" / "a.png"))
    classes = json.loads((tmp_path / "out" / "a.json").read_text())["classes"]
    assert labels.dtype == np.uint16
    assert {(c["id"], c["name"]) for c in classes} == {(i, f"thing {i}") for i in np.unique(labels)}


@pytest.mark.slow
def test_two_processes_leave_what_one_leaves(trained, photos, tmp_path):
    """And three find what the two have left over."""
    root = trained.parents[1]
    words = ["eval.py", trained, "--root", root, "--device", "cpu", "--set", "data.workers=2"]
    words += ["--images", photos, "--classes", "cat, dog", "--out"]
    for processes in (1, 2):
        done = process(*words, tmp_path / str(processes), processes=processes)
        assert done.returncode == 2 and "2 of 8 cannot be read" in done.stderr, done.stderr
    whole = results(tmp_path / "1")
    assert results(tmp_path / "2") == whole and len(whole) == 3 * len(PHOTOS)
    for file in sorted((tmp_path / "2").rglob("*.json"))[1:5]:
        file.unlink()
    done = process(*words, tmp_path / "2", "--resume", processes=3)
    assert "4 images in" in done.stdout, done.stderr
    assert results(tmp_path / "2") == whole


# --- cached features


@pytest.fixture
def passes(trained, tmp_path, monkeypatch):
    """A function of (name of the output, options): segments the images in tmp_path, and returns how
    many passed the networks.
    """
    images = trained.parents[1] / "a/images/train"
    shutil.copytree(images, tmp_path / "images")
    passed = []
    propose = Segmenter.propose
    monkeypatch.setattr(Segmenter, "propose", lambda *a: passed.append(1) or propose(*a))

    def passes(out: str, *more: object) -> int:
        passed.clear()
        segment(trained, tmp_path / out, "--images", tmp_path / "images", *more)
        return len(passed)

    return passes


def test_other_words_cost_no_pass(passes, tmp_path):
    """And their label maps are those of a fresh pass."""
    cache = ("--features", tmp_path / "f")
    words = ("--classes", "cat, sofa = couch; other: sky")
    assert passes("fresh", *words) == 4
    assert passes("cached", *cache, "--classes", "dog") == 4
    assert passes("cached", *cache, *words) == 0
    for file in (tmp_path / "fresh").glob("*.png"):
        assert np.array_equal(Image.open(file), Image.open(tmp_path / "cached" / file.name))


def test_what_is_missing_or_broken_or_changed_is_computed(passes, tmp_path):
    cache = tmp_path / "f"
    words = ("--features", cache, "--classes", "cat, dog")
    assert passes("o", *words) == 4
    file, other, *_ = sorted(file for file in cache.iterdir() if file.name != ".zsseg")
    content = file.read_bytes()
    file.write_bytes(content[:-9])
    other.unlink()
    assert passes("o", *words) == 2 and passes("o", *words) == 0
    images = tmp_path / "images"
    shutil.copy(images / "1.png", images / "new.png")
    shutil.copystat(images / "0.png", images / "new.png")
    (images / "new.png").replace(images / "0.png")  # another image of this name and time
    assert passes("o", *words) == 1
    assert passes("o", *words, "--set", "clip.mask_threshold=0.4") == 4


def test_what_cannot_be_cached_is_refused(trained, tmp_path):
    words = ("--images", trained.parents[1] / "a/images/val", "--features", tmp_path / "f")
    for setting in ("eval.flip=true", "eval.sizes=[64]", "eval.window=64", "model.proposals=false"):
        refused = segment(trained, tmp_path / "o", *words, "--set", setting, run=command)
        fails_in_one_line(refused, "--features", "one view an image")
    assert not (tmp_path / "f").exists()


# --- mistakes


def test_mistakes(trained, photos, tmp_path):
    out = tmp_path / "out"
    for more, part in [
        (["--images", tmp_path / "photo"], "did you mean"),
        (["--images", photos, "--classes", "cat, cat"], "given twice"),
        (["--images", photos, "--classes", "a very long name " * 9], "tokens"),
        (["--images", photos, "--budget"], "not allowed with"),
        (["--images", photos, "--serve"], "not allowed with"),
        (["--report", "--budget"], "not allowed with"),
        (["--save-predictions", "--budget"], "is for measuring"),
        (["--serve", "0", "--features", out], "add --images"),
        (["--classes", "cat"], "add --images"),
        (["--resume"], "add --images"),
        (["--imges", photos], "did you mean --images?"),
    ]:
        fails_in_one_line(segment(trained, out, *more, run=command), part)
    assert [file.name for file in out.iterdir()] == [".zsseg"]


def test_published_rows_stand_under_what_is_measured():
    for row in evaluation.PUBLISHED["row"]:
        config = evaluation.load_config(row["config"], [*row.get("set", []), "data.workers=1"])
        assert f"published ({row['name']}): " in evaluation.published_row(config)
    config = evaluation.load_config("voc_r101c", ["clip.ensemble_weight=0.1"])
    assert evaluation.published_row(config) == ""
