"""Data sets of one's own: which files match, names that are one to CLIP, lists, mistakes."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import command, fails_in_one_line, tiny_config
from own_data import CONFIG, blocks, check, described, save_pair, train
from PIL import Image

import prepare_data
from zsseg import utils
from zsseg.config import load_config
from zsseg.data import TestImages
from zsseg.datasets import dataset, find_listing, find_pairs
from zsseg.files import walk
from zsseg.label_statistics import label_statistics
from zsseg.tokenizer import check_names
from zsseg.apps.vocabulary import read_words


def test_hidden_folders_hold_no_data(root):
    for part in ("images", "masks"):
        for split in ("train", "val"):
            (root / "a" / part / split / ".ipynb_checkpoints").mkdir()
            if part == "images" or split == "val":  # also on one side only
                shutil.copy(
                    root / f"a/{part}/{split}/0.png",
                    root / f"a/{part}/{split}/.ipynb_checkpoints/0-checkpoint.png",
                )
    done = check(root)
    assert (
        done.returncode == 0
        and "val: 2 images\n" in done.stdout
        and "train: 4 images\n" in done.stdout
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
    ("images", "labels", "files", "ids"),
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
def test_layouts_that_the_rules_accept_are_found(images, labels, files, ids, tmp_path):
    for file in files:
        (tmp_path / "val" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / file).touch()
    listing = find_listing(
        described(f"data.images={images}", f"data.labels={labels}"), tmp_path, "val"
    )
    assert (
        len(listing.pairs) == ids
        and not listing.unpaired
        and not listing.duplicates
        and not listing.unmatched
    )
    assert all(image != label for image, label in listing.pairs)


def test_a_file_without_a_partner_is_named_once(tmp_path):
    for file in ("a.png", "a_mask.png", "b_mask.png", "c.png", "d.tif"):
        (tmp_path / "val" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / file).touch()
    listing = find_listing(
        described("data.images={split}/{id}.png", "data.labels={split}/{id}_mask.png"),
        tmp_path,
        "val",
    )
    assert [p.name for p, _ in listing.pairs] == ["a.png"]
    assert sorted(f.name for f in listing.unpaired) == ["b_mask.png", "c.png"] and [
        Path(f).name for f in listing.unmatched
    ] == ["d.tif"]


def test_images_are_not_their_own_labels(tmp_path):
    with pytest.raises(utils.UserError, match=r"data\.labels"):
        find_pairs(
            described("data.images={split}/{id}.png", "data.labels={split}/{id}.png"),
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
    with pytest.raises(utils.UserError, match="is the same to CLIP as"):
        check_names(names)
    with pytest.raises(utils.UserError, match="is the same to CLIP as"):
        dataset(load_config(root / "a.toml", [f"data.classes=[{listed}]"]).data)
    with pytest.raises(utils.UserError, match=r"stands twice|is the same to CLIP as"):
        read_words(", ".join(names).replace("&amp;", "&"))


@pytest.mark.slow
def test_a_list_requires_ids(root, tmp_path):
    for file in ("JPEGImages/x.jpg", "SegmentationClassAug/x.png"):
        (tmp_path / "VOC2012" / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / "VOC2012" / file)
    for line in ("/JPEGImages/x.jpg /SegmentationClassAug/x.png", "x.jpg", "x -1", "JPEGImages\\x"):
        for split in ("train", "val"):
            (tmp_path / "VOC2012" / f"{split}.txt").write_text(f"{line}\n")
        offline = {"ZSSEG_CACHE": str(tmp_path / "cache")}
        fails_in_one_line(
            command("prepare_data.py", "voc", "--root", tmp_path, env=offline),
            ".txt: requires ids, one a line",
            "{id}",
        )
        assert not (tmp_path / "cache").exists()  # nothing was asked of the network
    for split in ("train", "val"):
        (tmp_path / "VOC2012" / f"{split}.txt").write_bytes(b"\xef\xbb\xbfx\r\nx\r\n")
    assert len(find_pairs("voc", tmp_path, "val")) == 2
    assert find_listing("voc", tmp_path, "val").remarks == [
        "1 duplicate line in val.txt, counted twice"
    ]


def test_turned_images_are_named(root):
    exif = Image.Exif()
    exif[0x0112] = 3
    save_pair(root, "train", "0", blocks(), exif=exif)
    exif[0x0112] = 6
    save_pair(root, "val", "0", blocks(), exif=exif)
    done = check(root)
    assert done.returncode == 0 and done.stdout.count("the camera turned the image (EXIF)") == 2
    assert str(root / "a/images/train/0.png") in done.stdout
    Image.fromarray(blocks().T.copy()).save(root / "a/masks/val/0.png")
    done = check(root)
    fails_in_one_line(done, "1 file is broken")
    assert "or set data.exif_turn" in done.stdout
    config = load_config(root / "a.toml", ["data.exif_turn=true"]).data
    image, labels, _ = TestImages(config, root, "val")[0]
    assert labels.shape == (60, 48) and image[0].shape[1] > image[0].shape[2]
    assert not len(label_statistics(config, root, "train").remarks)


def test_ten_mistakes_at_once_are_all_named(root):
    a = root / "a"
    for i in range(4, 14):
        save_pair(root, "train", str(i), np.minimum(blocks(), 1))
    for i in range(4):
        save_pair(root, "train", str(i), np.minimum(blocks(), 1))
    (a / "images/train/4.png").write_bytes(b"")  # 1: an empty image
    # 2: a cut label map.
    (a / "masks/train/5.png").write_bytes((a / "masks/train/5.png").read_bytes()[:60])
    Image.new("L", (10, 10)).save(a / "masks/train/6.png")  # 3: of another size
    Image.new("RGB", (60, 48)).save(a / "masks/train/7.png")  # 4: in colours
    (a / "masks/train/8.png").unlink()  # 5: an image without labels
    (a / "images/train/9.png").unlink()  # 6: labels without an image
    # 7: a value of no class.
    Image.fromarray(np.where(blocks() > 0, 200, 0).astype(np.uint8)).save(a / "masks/train/10.png")
    # 8: no pixel of "grass" in train, by the above
    exif = Image.Exif()
    exif[0x0112] = 3
    save_pair(root, "train", "11", np.minimum(blocks(), 1), exif=exif)  # 9: turned by the camera
    shutil.copy(a / "images/train/12.png", a / "images/train/12.jpeg")  # 10: fits no pattern
    shutil.copy(a / "images/train/13.png", a / "images/val/1.png")  # 11: in two splits
    image = Image.fromarray(np.minimum(blocks(), 1))
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.save(a / "masks/train/3.png")  # 12: greys that are no indices
    # 13: losses, under a wrong name.
    Image.fromarray(blocks()).convert("L").save(a / "masks/train/2.png", "JPEG")
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
        "1 image is in another split, too",
        "the palette is grey but not in order",
        "masks/train/2.png: is JPEG",
        "1 label map shows no class at all",
        "1 hidden file or folder left out",
    ):
        assert part in done.stdout, part


def test_the_check_goes_on_after_what_ends_other_commands(root, capsys):
    """Two files of one id, and a missing split."""
    shutil.copy(root / "a/images/val/0.png", root / "a/images/val/0.webp")
    shutil.rmtree(root / "a/images/train")
    text = CONFIG.replace("images/{split}/{id}.png", "images/{split}/{id}.*")
    (root / "a.toml").write_text(text)
    with pytest.raises(utils.UserError, match="2 files are broken"):
        prepare_data.main(
            ["folder", "--config", str(root / "a.toml"), "--root", str(root), "--check"]
        )
    text = capsys.readouterr().out
    assert "has the id of" in text and "val: 2 images" in text and "no 'train' file is" in text


def test_batch_norm_wants_more_than_one_value(root):
    done = train(root, "--set", "train.batch_size=1", "--set", "data.crop=32")
    fails_in_one_line(done, "train.batch_size", "batch norm")
    assert tiny_config().train.batch_size > 1
