"""Any images, any words: finding images, what is written, resuming, several processes,
mistakes.
"""

import io
import json
import os
import re
import runpy
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, fails_in_one_line, tiny_clip_state, tiny_config
from PIL import Image
from test_commands import TINY, fails

import eval as evaluation
from zsseg import checkpoint
from zsseg.apps import predict
from zsseg.data import test_size as network_size
from zsseg.data import to_tensor
from zsseg.datasets import dataset
from zsseg.images import read_image
from zsseg.apps.predict import Names, find_images
from zsseg.segmenter import Segmenter
from zsseg.utils import UserError
from zsseg.visualize import overlay, palette


@pytest.fixture(scope="module")
def model(shapes_root, tmp_path_factory) -> Path:
    """A segmenter after two steps: good for nothing, but it proposes different things in different
    images.
    """
    out = tmp_path_factory.mktemp("model")
    settings = ["--set", "train.steps=2", "--set", "eval.compare=false"]
    result = command("train.py", *TINY, *settings, "--root", shapes_root, "--out", out)
    assert result.returncode == 0, result.stderr
    return out / "last.pt"


@pytest.fixture
def photos(tmp_path) -> Path:
    """Images of odd kinds and sizes, two broken ones, things that are no images."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    (folder / "more" / "deep").mkdir(parents=True)
    noise = lambda *size: Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
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


WHOLE = ["a.jpg", "a.png", "deep16", "more/deep/ünïcode", "more/one pixel", "more/palette"]


def arguments(model: Path, root: Path, out: Path, *more: object) -> list[str]:
    return [
        *map(
            str,
            (
                model,
                "--root",
                root,
                "--out",
                out,
                "--device",
                "cpu",
                "--set",
                "data.workers=0",
                *more,
            ),
        )
    ]


def results(out: Path) -> dict[str, bytes]:
    return {
        f.relative_to(out).as_posix(): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()
    }


# --- finding images


def test_names_are_unique_and_short(photos, tmp_path):
    names = Names(find_images([str(photos)], tmp_path / "out"))
    assert sorted(names[i] for i in range(len(names))) == sorted([*WHOLE, "cut", "more/not"])
    shutil.copy(photos / "a.png", photos / "a.jpg.png")
    names = Names(find_images([str(photos)], tmp_path / "out"))
    assert len({names[i] for i in range(len(names))}) == len(names) == 9


def test_files_patterns_and_lists(photos, tmp_path, monkeypatch):
    found = lambda *given: find_images([*map(str, given)], tmp_path / "out")
    # Who names a file means it.
    assert found(photos / "notes.txt") == [str(photos), str(photos / "notes.txt")]
    assert found(photos / "a.*") == [str(photos), str(photos / "a.jpg"), str(photos / "a.png")]
    assert len(found(photos / "**" / "*.gif")) == 2
    assert found(photos / "a.jpg", photos / "more" / "not.png", photos / "a.jpg")[0] == str(photos)
    files = [str(photos / "a.jpg"), str(photos / "nowhere.jpg")]
    for text in ("\n".join(files) + "\n\n", "\0".join(files)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert found("-") == [str(photos), *files]
    inside = photos / "more" / "out"
    (inside / "x").mkdir(parents=True)
    shutil.copy(photos / "a.png", inside / "x" / "a.png")
    # Not its own results.
    assert len(find_images([str(photos)], inside)) == 9 and len(found(photos)) == 10


def test_results_never_take_the_place_of_images(photos, tmp_path, monkeypatch):
    """What lies where results go is none of the images of a pattern, and an error where it is
    asked for.
    """
    monkeypatch.chdir(photos)
    (photos / "more" / "out" / "x").mkdir(parents=True)
    shutil.copy("a.png", "more/out/x/a.overlay.png")
    assert (
        find_images(["**/*.png"], Path("more/out"))
        == find_images(["**/*.png"], Path("elsewhere"))[:-1]
    )
    for given, out in (
        ("a.jpg", "."),
        (".", "."),
        ("more", "more"),
        ("more/out/x", "more"),
        ("more/out/x/*.png", "more/out"),
    ):
        with pytest.raises(UserError, match="where results go"):
            find_images([given], Path(out))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a.jpg")))
    with pytest.raises(UserError, match="where results go"):
        find_images(["-"], photos)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(UserError, match="cannot be read again"):
        find_images(["-"], tmp_path / "out")


def test_a_folder_that_cannot_be_read_is_an_error(photos, tmp_path, monkeypatch):
    scan = predict.os.scandir  # root may read everything, so the system's refusal is put in here

    def refuse(folder):
        if str(folder).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(predict.os, "scandir", refuse)
    with pytest.raises(UserError, match=r"folder .*deep: cannot be read \(Permission denied\)"):
        find_images([str(photos)], tmp_path / "out")


@pytest.mark.parametrize("given", ["phot", "*.xyz", "empty"])
def test_where_there_are_no_images(given, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"did you mean .*photos\?" if given == "phot" else "contains no image"
    ):
        find_images([str(tmp_path / given)], tmp_path / "out")


def test_images_are_read_as_they_are_shown(tmp_path):
    sides = np.zeros((4, 6, 3), np.uint8)
    sides[:, :3] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown a quarter turn clockwise
    Image.fromarray(sides).save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").size == (6, 4)
    turned = np.asarray(read_image(tmp_path / "turned.png", shown=True))
    assert turned.shape == (6, 4, 3) and (turned[:3] == 200).all() and not turned[3:].any()
    Image.fromarray(np.full((2, 2, 4), (9, 9, 9, 0), np.uint8)).save(tmp_path / "clear.png")
    assert np.asarray(read_image(tmp_path / "clear.png", shown=True)).min() == 255
    Image.new("1", (9500, 9500)).save(tmp_path / "large.png")  # of 90 million pixels
    assert read_image(tmp_path / "large.png", shown=True).size == (9500, 9500)
    with pytest.raises(UserError, match="more than"):
        read_image(tmp_path / "large.png")
    Image.fromarray(np.array([[0, 65535, 32896]], np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(read_image(tmp_path / "deep.png", shown=True))[0, :, 0].tolist() == [
        0,
        255,
        128,
    ]


# --- segmenting


def test_every_image_gets_its_files(model, shapes_root, photos, tmp_path, monkeypatch, capsys):
    words = "star, couch = sofa; other: sky, brick"
    out, legends, draw = tmp_path / "out", {}, predict.overlay

    def spy(image, labels, colours, legend):
        assert image.shape[:2] == labels.shape and 480 <= max(labels.shape) <= 1280
        legends[labels.tobytes()] = image.shape, colours.tolist(), legend
        return draw(image, labels, colours, legend)

    monkeypatch.setattr(predict, "overlay", spy)
    failing = arguments(model, shapes_root, out, "--images", photos, "--classes", words)
    fails(capsys, monkeypatch, evaluation.main, failing, "2 of 8 failed", "cut.jpg", "failed.txt")
    failed = (out / "failed.txt").read_text().splitlines()
    assert (
        len(failed) == 2
        and "cut.jpg: cannot be read" in failed[0]
        and "not.png: cannot be read" in failed[1]
    )
    assert set(results(out)) == {
        "failed.txt",
        *(n + e for n in WHOLE for e in (".png", ".overlay.jpg", ".json")),
    }
    for name in WHOLE:
        content = json.loads((out / f"{name}.json").read_text())
        labels = np.array(photo := Image.open(out / f"{name}.png"))
        colours = [*palette(3)[:2].tolist(), [96, 96, 96]]
        assert photo.mode == "P" and labels.shape == (content["height"], content["width"])
        assert photo.getpalette()[:9] == [value for colour in colours for value in colour]
        assert labels.shape == read_image(Path(content["image"]), shown=True).size[::-1]
        ids, pixels = np.unique(labels, return_counts=True)
        assert {c["id"]: c["pixels"] for c in content["classes"]} == dict(
            zip(ids.tolist(), pixels.tolist(), strict=True)
        )
        assert {c["name"] for c in content["classes"]} <= {
            "star",
            "couch",
            "other",
        } and ids.max() <= 2
        assert sum(c["share"] for c in content["classes"]) == pytest.approx(1)
        scale = max(480 / max(labels.shape), 1)
        small = Image.fromarray(labels).resize(
            [max(round(scale * n), 1) for n in labels.shape[::-1]], Image.Resampling.NEAREST
        )
        shape, coloured, legend = legends[np.asarray(small).tobytes()]
        assert shape == (*small.size[::-1], 3) and coloured == colours
        assert legend == [
            (c["id"], f"{c['name']}  {100 * c['pixels'] / labels.size:.1f}%")
            for c in content["classes"]
        ]
        assert Image.open(out / f"{name}.overlay.jpg").size > small.size
        assert [c["pixels"] for c in content["classes"]] == sorted(
            (c["pixels"] for c in content["classes"]), reverse=True
        )
    mended = photos / "cut.jpg"
    shutil.copy(photos / "a.jpg", mended)
    (photos / "more" / "not.png").unlink()
    before = results(out)
    evaluation.main([*failing, "--resume"])
    assert (out / "cut.json").exists()
    after = results(out)
    assert "failed.txt" not in after and before.items() - after.items() == {
        ("failed.txt", before["failed.txt"])
    }


def test_the_data_set_s_images_come_out_as_in_evaluation(model, shapes_root, tmp_path):
    """Also with test-time augmentation."""
    for name, settings in (
        ("plain", []),
        ("views", ["--set", "eval.flip=true", "--set", "eval.sizes=[64,96]"]),
    ):
        folder = tmp_path / name
        evaluation.main(
            arguments(model, shapes_root, folder / "a", "--save-predictions", *settings)
        )
        images = shapes_root / "shapes" / "images" / "test"
        evaluation.main(arguments(model, shapes_root, folder / "b", "--images", images, *settings))
        for file in (folder / "a" / "predictions").iterdir():
            assert np.array_equal(
                np.array(Image.open(file)), np.array(Image.open(folder / "b" / file.name))
            ), file.name


def test_scores_are_those_of_the_label_map(model, shapes_root, photos, tmp_path, monkeypatch):
    """The mean over a class's pixels of the score of the class that each was given; of "other", all
    background words'.
    """
    data, given, fix = dataset("shapes"), [], Segmenter.set_classes
    text = f"{data.names[0]}, disc = round thing; other: {', '.join(data.names[1:])}"
    monkeypatch.setattr(Segmenter, "set_classes", lambda *words: given.append(words) or fix(*words))
    content, random = checkpoint.load(model), torch.Generator().manual_seed(0)
    for name, weights in content["model"]["maskformer"].items():
        if name.startswith(("mask_embed", "class_embed")) and weights.ndim == 2:
            weights.copy_(torch.randn(weights.shape, generator=random))  # queries that differ
    checkpoint.save(tmp_path / "wild.pt", **content)
    wild = arguments(
        tmp_path / "wild.pt", shapes_root, tmp_path / "out", "--set", "clip.ensemble=false"
    )
    evaluation.main([*wild, "--images", str(photos / "a.jpg"), "--classes", text])
    [(segmenter, *words)] = given
    assert words[0] == [data.names[0], "disc", *data.names[1:]] and words[2] == {
        "disc": ["round thing"]
    }
    assert words[1] == [
        i for i, name in enumerate(words[0]) if name != "disc" and name not in data.unseen
    ]
    image = read_image(photos / "a.jpg").resize(
        network_size(70, 50, 64, 128), Image.Resampling.BILINEAR
    )
    proposals = segmenter.propose(to_tensor(image))
    labels, top = segmenter.label_map(segmenter.ensemble(proposals), proposals, (50, 70))
    found = json.loads((tmp_path / "out" / "a.json").read_text())["classes"]
    assert {c["id"] for c in found} == set(labels.clamp(max=2).unique().tolist()) and len(found) > 1
    for c in found:
        assert c["score"] == pytest.approx(
            float(top[labels.clamp(max=2) == c["id"]].mean()), abs=1e-4
        )


def test_resuming_segments_what_is_missing(model, shapes_root, tmp_path, capsys):
    """Results of other words, settings, weights or images do not count as done; and what is made
    again is the same.
    """
    out, images = tmp_path / "out", tmp_path / "images"
    shutil.copytree(shapes_root / "shapes" / "images" / "train", images)
    run = arguments(model, shapes_root, out, "--images", images, "--classes", "star, wall")
    evaluation.main(run)
    whole = results(out)
    assert len(whole) == 30
    (out / "train00003.json").unlink()
    (out / "train00004.png").unlink()
    (out / "train00008.json").write_text('{"program": "written by zsseg"')
    written = {n: (out / n).stat().st_mtime_ns for n in whole if (out / n).exists()}
    capsys.readouterr()
    evaluation.main([*run, "--resume"])
    text = capsys.readouterr().out
    assert results(out) == whole and "3 images in" in text and "7 done before" in text
    again = {n[5:10] for n in written if (out / n).stat().st_mtime_ns != written[n]}
    assert again == {"00003", "00004", "00008"}
    summary(text, out)

    def segmented(*words: str) -> int:
        evaluation.main([*words, "--resume"])
        return int(re.search(r"^(\d+) images? in", capsys.readouterr().out, re.M).group(1))

    os.utime(images / "train00005.jpg")
    assert segmented(*run) == 1 and segmented(*run) == 0
    assert segmented(*run, "--set", "clip.mask_threshold=0.6") == 10
    assert segmented(*run[:-1], "star, walls") == 10
    content = checkpoint.load(model)
    next(iter(content["model"]["maskformer"].values())).add_(0.1)
    checkpoint.save(tmp_path / "other.pt", **content)
    assert segmented(str(tmp_path / "other.pt"), *run[1:-1], "star, walls") == 10
    clip = tmp_path / "clip.pt"
    state = torch.load(shapes_root / "shapes" / "clip.pt")
    torch.save(state | {"visual.proj": state["visual.proj"] * 1.01}, clip)
    assert segmented(*run[:-1], "star, walls", "--set", f"clip.weights={clip}") == 10
    moved = images.rename(tmp_path / "moved")
    run[run.index(str(images))] = str(moved)
    last = [*run[:-1], "star, walls", "--set", f"clip.weights={clip}"]
    assert segmented(*last) == 0
    os.replace(moved / "train00007.jpg", moved / "train00001.jpg")  # an older file, another image
    assert segmented(*last) == 1
    assert json.loads((out / "train00001.json").read_text())["image"] == str(
        moved / "train00001.jpg"
    )


def summary(text: str, out: Path) -> None:
    """The table at the end must be what the JSONs say, done before or not, the largest share
    first.
    """
    rows = re.findall(r"^(\S.*?) +(\d+\.\d)% +(\d+)$", text, re.M)
    classes = [c for file in out.glob("*.json") for c in json.loads(file.read_text())["classes"]]
    total, names = sum(c["pixels"] for c in classes), {c["name"] for c in classes}
    wanted = {
        name: (
            f"{100 * sum(c['pixels'] for c in classes if c['name'] == name) / total:.1f}",
            str(sum(c["name"] == name for c in classes)),
        )
        for name in names
    }
    assert {name: rest for name, *rest in rows} == {name: [*rest] for name, rest in wanted.items()}
    assert [float(share) for _, share, _ in rows] == sorted(
        (float(share) for _, share, _ in rows), reverse=True
    )
    count, seconds, rate = re.search(
        r"^(\d+) images in (\S+) s, (\S+) images/s", text, re.M
    ).groups()
    assert float(rate) == pytest.approx(
        int(count) / float(seconds), abs=0.06 * float(rate) / float(seconds)
    )


def test_many_words_are_sixteen_bits(model, shapes_root, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("\n".join(f"thing {i}" for i in range(300)))
    image = shapes_root / "shapes" / "images" / "test" / "test00001.jpg"
    evaluation.main(
        arguments(model, shapes_root, tmp_path / "out", "--images", image, "--classes", words)
    )
    labels = np.array(Image.open(tmp_path / "out" / "test00001.png"))
    content = json.loads((tmp_path / "out" / "test00001.json").read_text())
    assert labels.dtype == np.uint16 and {c["id"] for c in content["classes"]} == set(
        np.unique(labels).tolist()
    )
    assert all(c["name"] == f"thing {c['id']}" for c in content["classes"])


def test_overlays_have_room_for_what_there_is_room_for():
    image, colours = np.zeros((60, 40, 3), np.uint8), palette(50)[:-1]
    labels = np.zeros((60, 40), np.uint8)
    labels[20:40] = 7
    canvas = np.array(
        overlay(image, labels, colours, [(i, f"a class with a long name {i}") for i in range(50)])
    )
    assert canvas.shape[0] <= 90 and canvas.shape[1] > 150
    assert (canvas[30, 20] == (0.5 * colours[7]).astype(np.uint8)).all() and (
        canvas[20, 5] == 255
    ).all()


@pytest.mark.slow
def test_two_processes_leave_what_one_leaves(model, shapes_root, photos, tmp_path):
    """And three find what the two have left over."""
    outs = []
    # Longer than its results' names may be.
    shutil.copy(photos / "a.jpg", photos / ("猫" * 80 + ".jpg"))
    run = lambda out, processes, *more: command(
        "eval.py",
        *arguments(model, shapes_root, out, "--images", photos, "--classes", "star, wall", *more),
        processes=processes,
        env={"OMP_NUM_THREADS": "1"} | env,
    )
    env = {}
    for processes in (1, 2):
        result = run(tmp_path / str(processes), processes)
        fails_in_one_line(result, "2 of 9 failed", "cut.jpg")
        outs.append(results(tmp_path / str(processes)))
    assert outs[0] == outs[1] and len(outs[0]) == 1 + 3 * (len(WHOLE) + 1)
    assert re.search(r"^segment, the first of 2 processes 5/5, ", result.stdout, re.M)
    left = sorted((tmp_path / "2").rglob("*.json"))[1:6]
    for file in left:
        file.unlink()
    env = {"TORCHELASTIC_MAX_RESTARTS": "3"}  # by which an error would start it all over again
    result = run(tmp_path / "2", 3, "--resume")
    assert result.returncode == 0 and "error: images: 2 of 9 failed" in result.stderr, result.stderr
    assert (
        "segment, the first of 3 processes 3/3" in result.stdout
        and "2 done before" in result.stdout
    )
    assert results(tmp_path / "2") == outs[0]


@pytest.mark.slow
def test_exported_programs_find_what_images_finds(
    model, shapes_root, photos, tmp_path, monkeypatch, capsys
):
    """`--export` with words of the user's own, background words among them, on images of odd
    kinds.
    """
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 60, 4), np.uint8)).save(
        photos / "clear.png"
    )
    files = [photos / "clear.png", photos / "deep16.png"]
    words = ["--classes", "star, tree = azure box; other: brick, grass"]
    out, programs, found = tmp_path / "out", tmp_path / "programs", set()
    evaluation.main(arguments(model, shapes_root, out, "--images", *files, *words))
    evaluation.main(arguments(model, shapes_root, out, "--export", programs, *words))
    monkeypatch.chdir(tmp_path)
    names = Names(find_images(map(str, files), out))
    for i, file in enumerate(names.files):
        monkeypatch.setattr(sys, "argv", ["example.py", file])
        capsys.readouterr()
        runpy.run_path(str(programs / "example.py"), run_name="__main__")
        content = json.loads((out / f"{names[i]}.json").read_text())
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(None, 1)[1] for line in lines] == [c["name"] for c in content["classes"]]
        assert np.array_equal(
            np.array(Image.open("labels.png")), np.array(Image.open(out / f"{names[i]}.png"))
        ), file
        found |= {c["name"] for c in content["classes"]}
    assert "other" in found


def test_mistakes(model, shapes_root, photos, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    mistakes = [
        (["--images", tmp_path / "photo"], "did you mean"),
        (["--images", photos, "--classes", "cat, cat"], "stands twice"),
        (["--images", photos, "--classes", "a very long name " * 9], "tokens"),
        (["--images", photos, "--budget"], "measure nothing"),
        (["--classes", "cat"], "add --images or --export"),
        (["--imges", photos], "did you mean --images?"),
        (["--resume"], "add --images"),
        (["--images", photos, "--export", tmp_path / "programs"], "two things"),
    ]
    for more, part in mistakes:
        fails(capsys, monkeypatch, evaluation.main, arguments(model, shapes_root, out, *more), part)
    result = command(
        "eval.py", *arguments(model, shapes_root, out, "--images", tmp_path / "photo"), processes=2
    )
    fails_in_one_line(result, "no such file or folder")
    assert not out.exists()


def test_a_supervised_model_knows_its_own_classes_only(
    shapes_root, photos, tmp_path, capsys, monkeypatch
):
    config = tiny_config("model.class_head=linear", "data.train_on=all", "clip.ensemble=false")
    segmenter = Segmenter(config, tiny_clip_state())
    checkpoint.save(tmp_path / "linear.pt", model=segmenter.learned_state(), config=asdict(config))
    run = arguments(
        tmp_path / "linear.pt", shapes_root, tmp_path / "out", "--images", photos / "a.jpg"
    )
    fails(capsys, monkeypatch, evaluation.main, [*run, "--classes", "cat, dog"], "model.class_head")
    evaluation.main(run)
    assert {
        c["name"] for c in json.loads((tmp_path / "out" / "a.json").read_text())["classes"]
    } <= {*dataset("shapes").names}
