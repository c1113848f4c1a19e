"""Results never take the place of a file that this program did not write, or of one another's."""

import os
import shutil
import threading
from pathlib import Path

import pytest
from conftest import command, fails_in_one_line
from own_data import blocks, measure, save_pair, train, training, wait_for_steps
from PIL import Image

from zsseg import utils
from zsseg.prepare import shapes
from zsseg.config import load_config
from zsseg.data import TestImages, unique_names
from zsseg.files import atomic_write, is_ours, refuse_foreign, result, set_aside
from zsseg.apps.predict import Names, note_failed


def test_label_maps_never_replace_images(root, trained):
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
        # Before it has taken its time.
        assert "evaluate val" not in result.stdout and (out / name).read_text() == "mine"
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
                with atomic_write(file) as temporary:
                    temporary.write_text(text * 1000)
        except utils.UserError as error:
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
    with atomic_write(file) as temporary:
        temporary.write_text("new")
    assert os.listdir(tmp_path) == ["x"] and file.read_text() == "new"


def test_results_need_the_mark_and_links_are_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    for name in ("mine", "link", "dangling", "folder"):
        with pytest.raises(utils.UserError, match=name), result(tmp_path / name) as file:
            file.write_text("ours")
    assert (tmp_path / "mine").read_text() == "mine"
    refuse_foreign(tmp_path / "absent")
    set_aside(tmp_path, ("absent",))


def test_lists_of_failures_are_kept_by_other_runs(tmp_path):
    """Those of images that this run was given, or that are gone, are out of date."""
    a, b, c = (str(tmp_path / name) for name in ("a.jpg", "b.jpg", "c.jpg"))
    for file in (a, b, c):
        Path(file).touch()
    names = Names([str(tmp_path), a, b])
    list_of_failures = tmp_path / "failed.txt"
    list_of_failures.write_text(f"{a}: broken\n{c}: broken\n/gone.jpg: broken\n")
    note_failed(tmp_path, names, [f"{b}: cut"])
    assert list_of_failures.read_text() == f"{b}: cut\n{c}: broken\n"
    list_of_failures.write_text("my notes\n")
    with pytest.raises(utils.UserError, match=r"failed\.txt"):
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
    ) == ["one/7.png", "two/7.png"]
    config = load_config(root / "a.toml").data
    assert TestImages(config, root, "val").names == ["one/7", "two/7"]


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


@pytest.mark.slow
def test_results_of_another_image_are_not_replaced(root, trained):
    """Two folders whose images have the same names, as cameras give them; equal sizes and dates
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
            "the result of another image",
            "cam1/0001.png",
        )
    assert (root / "o" / "0001.json").read_bytes() == before


def test_drawing_replaces_no_image(tmp_path, monkeypatch):
    file = tmp_path / "shapes/images/train/train00000.jpg"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"mine")
    monkeypatch.setattr(shapes, "SPLITS", {"train": 1})
    with pytest.raises(utils.UserError, match=r"train00000\.jpg"):
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


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(root):
    """The second ends in a line; when the first is gone, however it ended, its folder is free."""
    with training(root, "train.steps=100000", "data.workers=1") as process:
        wait_for_steps(root)
        fails_in_one_line(train(root), "another run is writing there")
        process.kill()
    assert train(root).returncode == 0


def test_results_that_cannot_be_written_are_noticed_first(root, trained, monkeypatch):
    (root / "file").touch()
    done = measure(trained, root, "--out", root / "file" / "o")
    fails_in_one_line(done, "cannot be written")
    assert "evaluate val" not in done.stdout
    assert not list(root.glob("o*"))


def test_measuring_leaves_no_trace_where_it_ends_early(root, trained):
    (root / "a/images/val/1.png").write_bytes(b"no image")
    assert measure(trained, root, "--out", root / "o").returncode == 2 and not (root / "o").exists()
