"""The data sets in their official layouts, and what prepare_data.py says."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import trees
from conftest import command, fails_in_one_line, process, tiny_config
from own_data import files_below as files
from own_data import touch
from PIL import Image
from scipy.io import savemat

from zsseg.data import TestImages as Images  # pytest would take it for a test
from zsseg.datasets import DATASETS, find_listing, find_pairs
from zsseg.prepare.convert import decode_runs
from zsseg.utils import UserError

VOC = "VOCdevkit/VOC2012"


def prepare(name: str, root: Path, *more: str):
    env = {"ZSSEG_CACHE": str(root / "cache")}  # which is not there unless something was requested
    return command("prepare_data.py", name, "--root", root, *more, env=env)


@pytest.mark.parametrize("name", trees.BUILDERS)
def test_official_files_become_class_ids(name, tmp_path):
    """Every pixel of the test split, odd sizes and modes included; a second run changes nothing."""
    expected = trees.BUILDERS[name](tmp_path)
    first = prepare(name, tmp_path)
    published = DATASETS[name].counts["val"]
    assert f"{name} val: {len(expected)} images (published: {published})" in first.stdout
    images = Images(tiny_config(f"data.name={name}").data, tmp_path, "val")
    assert sorted(expected) == images.names
    for i in range(len(images)):
        [image], labels, stem = images[i]
        assert np.array_equal(labels.numpy(), expected[stem]), stem
        assert image.shape[0] == 3 and min(image.shape[1:]) == 64
    before = files(tmp_path)
    assert prepare(name, tmp_path).returncode == 0
    checked = prepare(name, tmp_path, "--check")
    assert checked.returncode == 0 and f"  {DATASETS[name].names[0]} " in checked.stdout
    assert files(tmp_path) == before
    # A test split alone is enough.
    if DATASETS[name].lists:
        (find_listing(name, tmp_path, "val").folder / "train.txt").unlink()
    for folder in [f for f in tmp_path.rglob("train*") if f.is_dir() and f.name != "trainval"]:
        shutil.rmtree(folder, ignore_errors=True)
    done = prepare(name, tmp_path)
    assert f"{name} train: none" in done.stdout and f"{name} val: " in done.stdout
    with pytest.raises(UserError, match=f"run prepare_data.py {name} --train"):
        find_pairs(name, tmp_path, "train")


def test_trainaug_is_voc_and_sbd_without_val(tmp_path):
    """With SBD where mmsegmentation puts it."""
    trees.voc(tmp_path, sbd="VOCdevkit/VOCaug/dataset")
    assert prepare("voc", tmp_path).returncode == 0
    base = tmp_path / VOC
    train = (base / "train.txt").read_text().split()  # 2007_000042 is VOC's val
    assert train == ["2007_000032", "2007_000039", "2008_000002", "2008_000003"]
    assert (base / "val.txt").read_text().split() == ["2007_000033", "2007_000042", "2007_000061"]
    assert sorted(f.stem for f in (base / "SegmentationClassAug").iterdir()) == train[2:]
    pairs = {p.stem: label for p, label in find_pairs("voc", tmp_path, "train")}
    assert pairs["2007_000032"].parent.name == "SegmentationClass"  # VOC's own mask, not SBD's
    expected = trees.values_like(np.random.default_rng(55), list(range(21)), trees.SIZES[1], 0)
    assert np.array_equal(np.array(Image.open(pairs["2008_000002"])), expected)


@pytest.mark.parametrize("given", ["masks", "lists", "train_aug"])
def test_what_is_given_of_voc_is_taken_as_it_is(given, tmp_path):
    """The README's layout; somebody's lists without SBD's masks; masks and a list without SBD."""
    base = tmp_path / VOC
    trees.voc(tmp_path)
    official = base / "ImageSets" / "Segmentation"
    if given == "lists":
        (base / "train.txt").write_text("2008_000003\n2008_000002\n2007_000032\n")
        (base / "val.txt").write_text("2007_000033\n")
    else:
        shutil.copytree(base / "SegmentationClass", base / "SegmentationClassAug")
        shutil.rmtree(tmp_path / "benchmark_RELEASE")
        places = {"masks": base / "train.txt", "train_aug": official / "train_aug.txt"}
        shutil.copy(official / "train.txt", places[given])
    before = files(tmp_path)
    done = prepare("voc", tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "cache").exists() and before.items() <= files(tmp_path).items()
    assert all(p.exists() for pair in find_pairs("voc", tmp_path, "train") for p in pair)


LEFT_OVERS = [  # the folder in which all is, and empty files beside it
    ("voc", VOC, ["VOC2012/JPEGImages/notes.txt", "VOC2012/SegmentationClass/x.png"]),
    ("voc", VOC, ["VOC2012/notes.txt", "VOC2012/val.txt", f"{VOC}/val.txt", f"{VOC}/train.txt"]),
    ("voc", VOC, ["SBD/cls/notes.txt", f"{VOC}/SBD/cls/notes.txt", "sbd/val.txt"]),
    ("pcontext", "VOCdevkit/VOC2010", ["pcontext/JPEGImages/x.jpg", "VOC2010/train.txt"]),
    ("pcontext_full", "VOC2010", ["pcontext/trainval/2008_000003.mat", "VOC2010/val.txt"]),
]


@pytest.mark.parametrize(("name", "folder", "others"), LEFT_OVERS)
def test_a_left_over_is_no_data_set(name, folder, others, tmp_path):
    expected = trees.BUILDERS[name](tmp_path, folder)
    touch(tmp_path, *others)
    done = prepare(name, tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "cache").exists() and f"{name} train: none" not in done.stdout
    pairs = find_pairs(name, tmp_path, "val")
    assert [image.stem for image, _ in pairs] == sorted(expected)
    first = tmp_path / DATASETS[name].folders[0]  # gets the train split and a list without files
    for file in [f for pair in find_pairs(name, tmp_path, "train") for f in pair]:
        place = file.relative_to(tmp_path / folder)
        touch(first, place)
        shutil.copy(file, first / place)
    shutil.copy(tmp_path / folder / "train.txt", first)
    (first / "val.txt").write_text("2007_999999\n")
    assert find_listing(name, tmp_path, "train").folder == first
    assert find_pairs(name, tmp_path, "val") == pairs


def test_half_of_an_archive_is_no_data_set(tmp_path, monkeypatch):
    """A folder that is missing is filled; of half a one a file without a partner is named."""
    trees.coco_stuff(tmp_path)
    row = DATASETS["coco_stuff"]
    rows = [dataclasses.replace(a, urls=[], checksum="") for a in row.archives]
    monkeypatch.setitem(DATASETS, "coco_stuff", dataclasses.replace(row, archives=rows))
    trees.pack(tmp_path / "coco", tmp_path / "val2017.zip", "val2017")
    shutil.rmtree(tmp_path / "coco/val2017")
    assert prepare("coco_stuff", tmp_path).returncode == 0
    for i in (100, 101, 103):
        (tmp_path / f"coco/val2017/{i:012}.jpg").unlink()
    fails_in_one_line(prepare("coco_stuff", tmp_path), "not complete", f"{100:012}.png has no part")


@pytest.mark.parametrize("order", [("pcontext", "pcontext_full"), ("pcontext_full", "pcontext")])
def test_context_s_59_and_459_classes_share_a_folder(order, tmp_path):
    """One after the other, from an archive; what a kill left is completed."""
    expected = [trees.BUILDERS[name](tmp_path) for name in order]
    base = tmp_path / "pcontext"
    trees.pack(base, tmp_path / "trainval.tar.gz", "trainval")
    shutil.rmtree(base / "trainval")
    for lost in ("absent", "labels/2008_000003.png", "labels_full/2008_000004.png"):
        (base / lost).unlink(missing_ok=True)
        for name, maps in zip(order, expected, strict=True):
            assert prepare(name, tmp_path).returncode == 0
            images = Images(tiny_config(f"data.name={name}").data, tmp_path, "val")
            for _, labels, stem in map(images.__getitem__, range(len(maps))):
                assert np.array_equal(labels.numpy(), maps[stem])
    shutil.rmtree(base / "labels_full")
    (base / "trainval_merged.json").unlink()
    assert prepare("pcontext_full", tmp_path).returncode == 0
    assert (np.array(Image.open(base / "labels_full/2008_000004.png")) == np.uint16(459)).all()
    shutil.rmtree(base / "labels")
    fails_in_one_line(prepare("pcontext", tmp_path, "--check"), "1 problem ")  # the folder


def test_check_names_every_bad_file(tmp_path):
    trees.ade20k(tmp_path)
    base = tmp_path / "ADEChallengeData2016"
    shutil.copytree(base / "images/training", base / "images/validation/.thumbs")  # hidden
    (base / "images/validation/ADE_val_00000001.jpg").write_bytes(b"junk")
    Image.new("L", (5, 6)).save(base / "annotations/validation/ADE_val_00000002.png")
    Image.new("RGB", (1, 1)).save(base / "annotations/validation/ADE_val_00000003.png")
    (base / "images/training/ADE_train_00000001.jpg").unlink()
    (base / "annotations/training/ADE_train_00000002.png").unlink()
    Image.new("L", (1, 1)).save(base / "annotations/training/ADE_train_00000003.png", "JPEG")
    before = files(tmp_path)
    done = prepare("ade20k", tmp_path, "--check")  # which writes nothing
    fails_in_one_line(done, "6 problems (listed above)")
    parts = ["val_00000001.jpg: cannot be read", "val_00000003.png: is PNG RGB"]
    parts += ["val_00000002.png: is 5 x 6, its image 48 x 64; make them one size, or set data.exif"]
    parts += ["train_00000001.png has no partner", "train_00000002.jpg has no partner"]
    parts += ["train_00000003.png: is JPEG L"]
    assert [done.stdout.count(f"ADE_{part}") for part in parts] == [1] * 6, done.stdout
    assert "  flag                                       0.00 %" in done.stdout
    assert files(tmp_path) == before
    said = prepare("ade20k", tmp_path).stdout  # the original leaves them out, too
    assert "train: 1 image (published: 20210), 2 files without a partner left out" in said


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:200])


def edited(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def images(**values: object):
    return lambda file: edited(file, lambda c: [image.update(values) for image in c["images"]])


BAD_RUNS = lambda content: content["annos_segmentation"][0]["segmentation"].update(counts=[1])
CHANGES = [lambda file: edited(file, BAD_RUNS), images(phase="test"), images(height=-1)]
CHANGES += [images(height="x"), images(file_name="a\0b.jpg"), images(file_name=300)]
CHANGES += [images(image_id=float("inf")), images(image_id=None)]
FLOATS = lambda file: savemat(file, {"LabelMap": np.full((2, 2), 1.5)})
MATS = ("voc", "pcontext_full")
DAMAGES = [(name, "2008_000002.mat", d) for name in MATS for d in (cut, Path.unlink, FLOATS)]
DAMAGES += [("ade20k_full", "ADE_val_00000001_seg.png", Path.unlink)]
DAMAGES += [("pcontext_full", "trainval_merged.json", cut)]
DAMAGES += [("pcontext", "trainval_merged.json", change) for change in (cut, *CHANGES)]


@pytest.mark.parametrize(("name", "part", "damage"), DAMAGES)
def test_a_broken_source_is_named(name, part, damage, tmp_path):
    trees.BUILDERS[name](tmp_path)
    damage(next(tmp_path.rglob(part)))
    for _ in range(2):  # what is there by now is not taken for the data set
        fails_in_one_line(prepare(name, tmp_path), part)
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("part", ["list", "masks", "folders"])
def test_half_a_tree_is_no_data_set(part, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    rows = [dataclasses.replace(a, urls=["http://127.0.0.1:9/x"]) for a in DATASETS["voc"].archives]
    monkeypatch.setitem(DATASETS, "voc", dataclasses.replace(DATASETS["voc"], archives=rows))
    folder = tmp_path / "VOC2012"
    (folder / "JPEGImages").mkdir(parents=True)
    if part != "folders":
        (folder / "val.txt").write_text("2007_000033\n")
    if part == "masks":
        trees.save_map(np.zeros((3, 3)), folder / "SegmentationClassAug" / "2007_000033.png")
    fails_in_one_line(prepare("voc", tmp_path), "voc", "127.0.0.1:9")
    if part == "list":
        done = prepare("voc", tmp_path, "--check")
        fails_in_one_line(done, "1 problem ")
        assert f"no folder {folder / 'SegmentationClassAug'}" in done.stdout
        (folder / "val.txt").write_text("2007_000033\n", "utf-16")
        fails_in_one_line(prepare("voc", tmp_path), "val.txt: is not UTF-8 text; save it as UTF-8")


def test_a_list_requires_ids(tmp_path, capsys):
    folder = tmp_path / "VOC2012"
    for file in ("JPEGImages/x.jpg", "SegmentationClassAug/x.png"):
        trees.save_map(np.zeros((4, 4)), folder / file)
    for line in ("/JPEGImages/x.jpg /SegmentationClassAug/x.png", "x.jpg", "x -1", "JPEGImages\\x"):
        (folder / "val.txt").write_text(f"{line}\n")
        fails_in_one_line(prepare("voc", tmp_path), "val.txt: ", " is no id", "{id}")
        assert not (tmp_path / "cache").exists()  # nothing was asked of the network
    (folder / "val.txt").write_bytes(b"\xef\xbb\xbfx\r\n x\r\n./x\na//y\na/y\na/../x\nz\n")
    assert len(Images(tiny_config("data.name=voc").data, tmp_path, "val")) == 3
    said = capsys.readouterr().out
    assert said.count("val.txt names 2 images more than once, e.g. x; each counts once") == 1


def test_hidden_files_and_linked_cities(tmp_path):
    expected = trees.cityscapes(tmp_path)
    base = tmp_path / "cityscapes"
    for part, ending in (("gtFine", "gtFine_labelIds"), ("leftImg8bit", "leftImg8bit")):
        (base / part / "val" / "ulm" / f"._x_{ending}.png").write_bytes(b"?")
        target = tmp_path / "ulm" / part
        target.parent.mkdir(exist_ok=True)
        (base / part / "val" / "ulm").rename(target)
        (base / part / "val" / "ulm").symlink_to(target)
    assert sorted(p.stem for p, _ in find_pairs("cityscapes", tmp_path, "val")) == sorted(expected)


def test_the_command_line(tmp_path):
    """Registration is asked for; what is mistyped or missing is answered before torch is loaded."""
    for name, part in (("cityscapes", "gtFine_trainvaltest.zip"), ("ade20k_full", "no ADE20K_20")):
        fails_in_one_line(prepare(name, tmp_path), part, "register at https://", str(tmp_path))
    assert not list(tmp_path.iterdir())
    fails_in_one_line(prepare("voc", tmp_path, "--workers", "-3"), "--workers is -3")
    (tmp_path / "voc.toml").write_text('[data]\nname = "voc"\n')
    fails_in_one_line(prepare("folder", tmp_path), "data.images: is missing", "--config")
    described = prepare("folder", tmp_path, "--config", tmp_path / "voc.toml")
    fails_in_one_line(described, "describes voc")
    fails_in_one_line(process("prepare_data.py", "citiscapes"), "did you mean cityscapes?")
    for name, match in (("vok", r"did you mean voc\?"), ("pets", "choose one of shapes, voc, ")):
        with pytest.raises(UserError, match=match):
            find_pairs(name, tmp_path, "val")


def test_run_lengths_known_text_and_those_that_cannot_be():
    """A 5 x 4 mask with one pixel set at row 1, column 2: runs 11, 1, 8. Others: `pcontext`."""
    mask = decode_runs({"size": [5, 4], "counts": ";18"})
    assert mask.sum() == 1 and mask[1, 2]
    bad = [([3, 5], [2**62] * 4 + [15]), ([2, 2], [3])]
    bad += [([2, 2], counts) for counts in ([5, -1], "\x01", "zz", "é")]
    for size, counts in bad:
        with pytest.raises(ValueError, match=r"run length|repeats|ascii"):
            decode_runs({"size": size, "counts": counts})
