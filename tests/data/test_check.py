"""What prepare_data.py says: the check, missing and broken sources, half trees."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import trees
from conftest import fails_in_one_line
from PIL import Image
from test_commands import fails

import prepare_data
from zsseg.datasets import DATASETS, find_pairs
from zsseg.prompts import TEMPLATES
from zsseg.tokenizer import Tokenizer
from zsseg.utils import UserError


def files(root: Path) -> dict[str, bytes]:
    return {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}


def test_check_names_every_bad_file(tmp_path, capsys, monkeypatch):
    trees.ade20k(tmp_path)
    base = tmp_path / "ADEChallengeData2016"
    (base / "images/validation/ADE_val_00000001.jpg").write_bytes(b"junk")
    Image.new("L", (5, 5)).save(base / "annotations/validation/ADE_val_00000002.png")
    Image.new("RGB", (1, 1)).save(base / "annotations/validation/ADE_val_00000003.png")
    (base / "images/training/ADE_train_00000001.jpg").unlink()
    (base / "annotations/training/ADE_train_00000002.png").unlink()
    before = files(tmp_path)
    arguments = ["ade20k", "--root", tmp_path, "--check"]  # which writes nothing
    fails(
        capsys, monkeypatch, prepare_data.main, arguments, "5 files are broken or have no partner"
    )
    with pytest.raises(UserError):
        prepare_data.main([str(a) for a in arguments])
    text = capsys.readouterr().out
    for part in (
        "ADE_val_00000001.jpg: cannot be read",
        "ADE_val_00000002.png: is 5 x 5",
        "ADE_val_00000003.png: has 3",
        "ADE_train_00000001.png has no partner",
        "ADE_train_00000002.jpg has no partner",
    ):
        assert text.count(part) == 1, part
    assert files(tmp_path) == before


def test_check_of_a_listed_image_that_is_missing(tmp_path, capsys, monkeypatch):
    trees.voc(tmp_path)
    prepare_data.main(["voc", "--root", str(tmp_path)])
    (tmp_path / "VOCdevkit/VOC2012/JPEGImages/2007_000033.jpg").unlink()
    fails(
        capsys,
        monkeypatch,
        prepare_data.main,
        ["voc", "--root", tmp_path, "--check"],
        "1 file is broken",
    )


def test_partners_missing_on_one_side_are_left_out(tmp_path, capsys):
    """As the original does; the command says how many."""
    trees.coco_stuff(tmp_path)
    (tmp_path / "coco/val2017/000000000100.jpg").unlink()
    (tmp_path / "coco/stuffthingmaps/val2017/000000000101.png").unlink()
    prepare_data.main(["coco_stuff", "--root", str(tmp_path)])
    assert (
        "val: 2 images (published: 5000); 2 files without a partner are left out"
        in capsys.readouterr().out
    )
    assert [p.stem for p, _ in find_pairs("coco_stuff", tmp_path, "val")] == [
        "000000000102",
        "000000000103",
    ]


def test_ids_that_are_not_the_published_ones(tmp_path, capsys, monkeypatch):
    trees.voc(tmp_path)
    ids = "".join(f"{i}\n" for i in ("2007_000033", "2007_000042", "2007_000061"))
    digest = hashlib.sha256(ids.encode()).hexdigest()
    row = dataclasses.replace(
        DATASETS["voc"], counts={"train": 4, "val": 3}, digests={"train": "0" * 64, "val": digest}
    )
    monkeypatch.setitem(DATASETS, "voc", row)
    prepare_data.main(["voc", "--root", str(tmp_path)])
    text = capsys.readouterr().out
    assert "val: 3 images (published: 3), the published ids" in text
    assert "train: 4 images (published: 4), but NOT the published ids" in text


# --- broken sources


def break_mat(root: Path) -> str:
    file = root / "benchmark_RELEASE/dataset/cls/2008_000002.mat"
    file.write_bytes(file.read_bytes()[:200])
    return "2008_000002.mat"


def break_json(root: Path) -> str:
    file = root / "pcontext/trainval_merged.json"
    file.write_text(file.read_text()[:500])
    return "trainval_merged.json"


def break_runs(root: Path) -> str:
    file = root / "pcontext/trainval_merged.json"
    content = json.loads(file.read_text())
    content["annos_segmentation"][0]["segmentation"]["counts"] = [1]
    file.write_text(json.dumps(content))
    return "trainval_merged.json"


def break_seg(root: Path) -> str:
    file = next((root / "ADE20K_2021_17_01").rglob("ADE_val_00000001_seg.png"))
    file.unlink()
    return "ADE_val_00000001_seg.png"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("voc", break_mat),
        ("pcontext", break_json),
        ("pcontext", break_runs),
        ("ade20k_full", break_seg),
    ],
)
def test_a_broken_source_is_named(name, damage, tmp_path, capsys, monkeypatch):
    trees.BUILDERS[name](tmp_path)
    part = damage(tmp_path)
    fails(capsys, monkeypatch, prepare_data.main, [name, "--root", tmp_path], part)
    assert not list(tmp_path.rglob("*.tmp"))
    # It would mark the conversion as complete.
    assert not (DATASETS[name].folder(tmp_path) / "val.txt").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("height", 10**9),
        ("height", -1),
        ("height", "x"),
        ("file_name", "../../x?.jpg"),
        ("file_name", "a\0b.jpg"),
        ("phase", "test"),
        ("file_name", 300 * "a"),
        ("image_id", float("inf")),
        ("image_id", None),
    ],
)
def test_odd_annotations_are_named(key, value, tmp_path, capsys, monkeypatch):
    trees.pcontext(tmp_path)
    file = tmp_path / "pcontext" / "trainval_merged.json"
    content = json.loads(file.read_text())
    for image in content["images"]:
        image[key] = value
    file.write_text(json.dumps(content))
    fails(
        capsys,
        monkeypatch,
        prepare_data.main,
        ["pcontext", "--root", tmp_path],
        "trainval_merged.json",
    )


def test_every_name_fits_clip(vocabulary):
    tokenizer = Tokenizer(49408, 77)
    longest = max(
        TEMPLATES["imagenet"] + TEMPLATES["vild"] + TEMPLATES["single"],
        key=lambda t: len(tokenizer.encode(t)),
    )
    names = sorted({n for data in DATASETS.values() for n in data.names})
    assert tokenizer([longest.replace("{}", n) for n in names]).shape == (len(names), 77)
    assert max(len(tokenizer.encode(n)) for n in names) + 19 <= 77  # a learned prompt of 16 tokens


def test_registration_is_asked_for(tmp_path, capsys, monkeypatch):
    for name, part in (
        ("cityscapes", "gtFine_trainvaltest.zip"),
        ("ade20k_full", "ADE20K_2021_17_01"),
    ):
        fails(
            capsys,
            monkeypatch,
            prepare_data.main,
            [name, "--root", tmp_path],
            part,
            "register at https://",
            str(tmp_path),
        )
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", ["utf-16", "nothing else", "no images", "empty folders"])
def test_half_a_tree_is_no_data_set(bad, tmp_path, capsys, monkeypatch):
    """Only a list, or only folders, do not pass for data; a list in UTF-16, as some shells write
    it, is one.
    """
    monkeypatch.setenv("ZSSEG_CACHE", str(tmp_path / "cache"))
    rows = [dataclasses.replace(a, urls=["http://127.0.0.1:9/x"]) for a in DATASETS["voc"].archives]
    monkeypatch.setitem(DATASETS, "voc", dataclasses.replace(DATASETS["voc"], archives=rows))
    folder = tmp_path / "VOC2012"
    folder.mkdir()
    if bad == "empty folders":
        (folder / "JPEGImages").mkdir()
    else:
        (folder / "val.txt").write_text("2007_000033\n", "utf-16" if bad == "utf-16" else "utf-8")
    if bad == "no images":
        trees.save_map(np.zeros((3, 3)), folder / "SegmentationClassAug" / "2007_000033.png")
    fails(capsys, monkeypatch, prepare_data.main, ["voc", "--root", tmp_path], "voc", "127.0.0.1:9")
    if bad == "utf-16":
        with pytest.raises(UserError, match="1 file is broken"):
            prepare_data.main(["voc", "--root", str(tmp_path), "--check"])
        assert "JPEGImages/2007_000033.jpg: cannot be read" in capsys.readouterr().out


def test_masks_that_a_given_list_lacks_are_converted(tmp_path):
    """VOC's folders with somebody's lists, but without the masks of SBD: the lists stay, the masks
    come.
    """
    trees.voc(tmp_path)
    base = tmp_path / "VOCdevkit" / "VOC2012"
    (base / "train.txt").write_text("2008_000003\n2008_000002\n2007_000032\n")
    (base / "val.txt").write_text("2007_000033\n")
    prepare_data.main(["voc", "--root", str(tmp_path)])
    assert (base / "train.txt").read_text() == "2008_000003\n2008_000002\n2007_000032\n"
    assert all(p.exists() for pair in find_pairs("voc", tmp_path, "train") for p in pair)


def test_an_empty_folder_does_not_hide_the_data(tmp_path):
    trees.voc(tmp_path)
    (tmp_path / "VOC2012" / ".zsseg").mkdir(parents=True)
    assert DATASETS["voc"].folder(tmp_path) == tmp_path / "VOCdevkit" / "VOC2012"


def test_files_of_the_finder_and_linked_cities(tmp_path):
    expected = trees.cityscapes(tmp_path)
    (tmp_path / "cityscapes" / "gtFine" / "val" / "ulm" / "._x_gtFine_labelIds.png").write_bytes(
        b"?"
    )
    (tmp_path / "cityscapes" / "leftImg8bit" / "val" / "ulm" / "._x_leftImg8bit.png").write_bytes(
        b"?"
    )
    (tmp_path / "ulm").mkdir()
    for part in ("gtFine", "leftImg8bit"):
        (tmp_path / "cityscapes" / part / "val" / "ulm").rename(tmp_path / "ulm" / part)
        (tmp_path / "cityscapes" / part / "val" / "ulm").symlink_to(tmp_path / "ulm" / part)
    assert sorted(p.stem for p, _ in find_pairs("cityscapes", tmp_path, "val")) == sorted(expected)


def test_the_check_counts_what_it_hides(tmp_path, capsys):
    trees.voc(tmp_path)
    prepare_data.main(["voc", "--root", str(tmp_path)])
    hidden = sum(
        np.isin(np.array(Image.open(label)), range(16, 21)).sum()
        for _, label in find_pairs("voc", tmp_path, "train")
    )
    capsys.readouterr()
    prepare_data.main(["voc", "--root", str(tmp_path), "--check"])
    text = capsys.readouterr().out
    assert (
        hidden > 0
        and f"4 training targets: of {hidden} pixels of the 5 unseen classes (pottedplant, " in text
    )
    assert ", 0 survive" in text


@pytest.mark.slow
def test_the_command_itself(tmp_path):
    from conftest import command

    fails_in_one_line(command("prepare_data.py", "cityscapes", "--root", tmp_path), "register")
    fails_in_one_line(
        command("prepare_data.py", "citiscapes", "--root", tmp_path), "citiscapes", "cityscapes"
    )
