"""The six data sets from their official files: labels, lists, conversions, statistics, the
check.
"""

import dataclasses
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from conftest import PROCESS, tiny_config
from PIL import Image

import prepare_data
from zsseg import label_statistics as label_statistics_module
from zsseg.clip import CLIP, MEAN, STD, VisionTransformer
from zsseg.prepare.convert import decode_runs, resize_bilinear
from zsseg.data import TestImages, TrainImages
from zsseg.datasets import DATASETS, find_pairs
from zsseg.evaluate import evaluate
from zsseg.images import read_image, read_labels
from zsseg.label_statistics import count_classes, label_statistics
from zsseg.prompt_learning import Regions
from zsseg.segmenter import Segmenter
from zsseg.utils import UserError

TestImages.__test__ = False
NAMES = list(trees.BUILDERS)


def files(root: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(f.relative_to(root)): (f.read_bytes(), f.stat().st_mtime_ns)
        for f in root.rglob("*")
        if f.is_file()
    }


@pytest.mark.parametrize("name", NAMES)
def test_official_files_become_class_ids(name, tmp_path, capsys):
    """Every pixel of the test split, odd sizes and modes included; a second run changes nothing."""
    expected = trees.BUILDERS[name](tmp_path)
    prepare_data.main([name, "--root", str(tmp_path)])
    assert (
        f"{name} val: {len(expected)} images (published: {DATASETS[name].counts['val']})"
        in capsys.readouterr().out
    )
    images = TestImages(tiny_config(f"data.name={name}").data, tmp_path, "val")
    assert sorted(expected) == [pair[0].stem for pair in images.pairs]
    for i in range(len(images)):
        [image], labels, stem = images[i]
        assert np.array_equal(labels.numpy(), expected[stem]), stem
        assert image.shape[0] == 3 and min(image.shape[1:]) == 64
    before = files(tmp_path)
    prepare_data.main([name, "--root", str(tmp_path)])
    assert files(tmp_path) == before
    prepare_data.main([name, "--root", str(tmp_path), "--check"])
    assert DATASETS[name].names[0] in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_on_each_data_set(name, tmp_path):
    """Metrics and saved label maps of a complete run equal counting by hand."""
    expected = trees.BUILDERS[name](tmp_path)
    prepare_data.main([name, "--root", str(tmp_path)])
    torch.manual_seed(0)
    clip = CLIP(VisionTransformer(32, 16, 64, 1, 16), 16, 160, 514, 64, 1)
    settings = [
        f"data.name={name}",
        "data.split=val",
        "eval.compare=false",
        "clip.mask_threshold=0.3",
    ]
    config = tiny_config(*settings, "clip.ensemble_weight=0.5")
    data = DATASETS[name]
    result = evaluate(
        Segmenter(config, clip.state_dict()),
        config,
        tmp_path,
        PROCESS,
        "val",
        tmp_path / "out",
        True,
    )
    hit, gt, predicted = (np.zeros(len(data.names)) for _ in range(3))
    for stem, labels in expected.items():
        saved = np.array(Image.open(tmp_path / "out" / "predictions" / f"{stem}.png"))
        assert saved.shape == labels.shape and saved.dtype == (
            np.uint16 if name == "ade20k_full" else np.uint8
        )
        valid = labels != data.ignore
        for c in range(len(data.names)):
            hit[c] += ((labels == c) & (saved == c)).sum()
            gt[c] += (labels == c).sum()
            predicted[c] += ((saved == c) & valid).sum()
    iou = 100 * hit / np.maximum(gt + predicted - hit, 1)
    assert result["images"] == len(expected) and ("hIoU" in result) == (
        name in ("voc", "coco_stuff")
    )
    assert result["mIoU"] == pytest.approx(iou[gt > 0].sum() / (gt + predicted > 0).sum())
    assert result["mIoU_gt"] == pytest.approx(iou[gt > 0].mean())


def test_trainaug_is_voc_and_sbd_without_val(tmp_path):
    trees.voc(tmp_path)
    prepare_data.main(["voc", "--root", str(tmp_path)])
    base = tmp_path / "VOCdevkit" / "VOC2012"
    train = (base / "train.txt").read_text().split()
    # 2007_000042 is VOC's val.
    assert train == ["2007_000032", "2007_000039", "2008_000002", "2008_000003"]
    assert (base / "val.txt").read_text().split() == ["2007_000033", "2007_000042", "2007_000061"]
    assert sorted(f.stem for f in (base / "SegmentationClassAug").iterdir()) == [
        "2008_000002",
        "2008_000003",
    ]
    pairs = {p.stem: label for p, label in find_pairs("voc", tmp_path, "train")}
    assert pairs["2007_000032"].parent.name == "SegmentationClass"  # VOC's own mask, not SBD's
    expected = trees.values_like(np.random.default_rng(55), list(range(21)), *trees.SIZES[1], 0)
    assert np.array_equal(np.array(Image.open(pairs["2008_000002"])), expected)


def test_the_readme_layout_is_taken_as_it_is(tmp_path):
    folder = tmp_path / "VOC2012"
    trees.voc(tmp_path / "source")
    shutil.copytree(tmp_path / "source/VOCdevkit/VOC2012/JPEGImages", folder / "JPEGImages")
    shutil.copytree(
        tmp_path / "source/VOCdevkit/VOC2012/SegmentationClass", folder / "SegmentationClassAug"
    )
    for split in ("train", "val"):
        shutil.copy(
            tmp_path / f"source/VOCdevkit/VOC2012/ImageSets/Segmentation/{split}.txt", folder
        )
    before = files(tmp_path)
    prepare_data.main(["voc", "--root", str(tmp_path)])
    after = files(tmp_path)
    assert (
        after.keys() - before.keys() == {"VOC2012/.zsseg/train.npz"}
        and before.items() <= after.items()
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_test_split_alone_is_enough(name, tmp_path, capsys):
    trees.BUILDERS[name](tmp_path)
    if name in ("voc", "pcontext"):
        prepare_data.main([name, "--root", str(tmp_path)])
        (DATASETS[name].folder(tmp_path) / "train.txt").unlink()
    else:
        for folder in tmp_path.rglob("train*"):
            if folder.is_dir():
                shutil.rmtree(folder)
    prepare_data.main([name, "--root", str(tmp_path)])
    text = capsys.readouterr().out
    assert (
        f"{name} train: none (only training needs it; --train fetches it)" in text
        and f"{name} val: " in text
    )
    with pytest.raises(UserError, match=f"run prepare_data.py {name} --train"):
        find_pairs(name, tmp_path, "train")


def test_images_are_not_turned_and_not_misread(tmp_path):
    """EXIF asks for a quarter turn that the label map did not get; grey and CMYK become RGB."""
    for mode in range(4):
        trees.image(tmp_path / f"{mode}.jpg", 30, 40, mode, 0)
        image = read_image(tmp_path / f"{mode}.jpg")
        assert image.size == (40, 30) and image.mode == "RGB"
    grey = np.array(read_image(tmp_path / "1.jpg"))
    assert (grey[..., 0] == grey[..., 1]).all()
    plain, turned, cmyk = (
        np.array(read_image(tmp_path / f"{k}.jpg")).astype(int) for k in (0, 3, 2)
    )
    assert np.array_equal(plain, turned)
    assert np.abs(plain - cmyk).mean() < 8 < np.abs(plain - (255 - plain)).mean()  # not inverted


@pytest.mark.parametrize("name", ["voc", "coco_stuff"])
def test_no_unseen_class_is_in_what_training_reads(name, tmp_path):
    trees.BUILDERS[name](tmp_path)
    prepare_data.main([name, "--root", str(tmp_path)])
    data = DATASETS[name]
    samples = TrainImages(tiny_config(f"data.name={name}"), tmp_path)
    unseen = [data.values[data.names.index(n)] for n in data.unseen]
    dropped = len(find_pairs(name, tmp_path, "train")) - len(samples.pairs)
    assert dropped >= 1  # images without any seen class
    unseen_pixels = 0
    for n, (image, label) in enumerate(samples.pairs):
        raw = np.array(Image.open(label))
        ids = read_labels(label, samples.lut, read_image(image).size)
        unseen_pixels += np.isin(raw, unseen).sum()
        assert (ids[np.isin(raw, unseen)] == 255).all() and (ids != 255).any()
        kept = ids != 255
        names = np.array(data.names)[np.searchsorted(data.values, raw[kept])]
        assert (np.array(data.training_names)[ids[kept]] == names).all()
        number = samples.order(0).tolist().index(n)
        assert set(samples[number][2].tolist()) <= set(np.unique(ids[kept]).tolist())
    assert unseen_pixels > 0
    everything = TrainImages(tiny_config(f"data.name={name}", "data.train_on=all"), tmp_path)
    assert everything.lut.tolist() == data.lut().tolist()
    # COCO's third image has no class at all.
    assert len(everything.pairs) == len(samples.pairs) + (name == "voc")


def test_one_region_samples(tmp_path):
    """The box of a class, its mask, a crop that always shows some of it; never an unseen class."""
    trees.voc(tmp_path)
    prepare_data.main(["voc", "--root", str(tmp_path)])
    samples = Regions(tiny_config("data.name=voc", "prompts.samples_per_class=1"), tmp_path, 32)
    classes = [c for _, c in samples.regions]
    assert len(set(classes)) == len(classes) and max(classes) < 15
    many = Regions(tiny_config("data.name=voc"), tmp_path, 32)
    assert len(many.regions) > len(samples.regions)
    for n in range(3 * len(many.regions)):
        crop, category = many[n]
        assert (
            crop.shape == (3, 32, 32)
            and crop.dtype == torch.float32
            and 0 <= category < 15
            and crop.any()
        )
    assert all(np.array_equal(a, b) for a, b in zip(many[3], many[3], strict=True))


def test_a_region_and_its_mask_move_together(tmp_path):
    """On images whose colour is their label; a region of a few single pixels is never missed."""
    folder = tmp_path / "VOC2012"
    (folder / "JPEGImages").mkdir(parents=True)
    labels = np.zeros((375, 500), np.uint8)
    labels[50:200, 100:330], labels[60:90, 150:300] = 7, 3
    labels[10, 20] = labels[370, 480] = 5
    labels[300, 200:210] = 5
    trees.save_map(labels, folder / "SegmentationClassAug" / "a.png")
    Image.fromarray(labels * 30).convert("RGB").save(
        folder / "JPEGImages" / "a.jpg", quality=100, subsampling=0
    )
    (folder / "train.txt").write_text("a")
    samples = Regions(tiny_config("data.name=voc"), tmp_path, 64)
    assert sorted(c for _, c in samples.regions) == [2, 4, 6]
    for n in range(240):
        crop, category = samples[n]
        mask = crop.abs().sum(0) > 0  # what is outside is 0
        assert mask.any(), n
        if category != 4:
            red = 255 * (crop[0] * STD[0] + MEAN[0])
            assert ((red - 30 * (category + 1)).abs() < 40)[mask].float().mean() > 0.8


# --- run lengths


def test_run_lengths_known_text():
    """A 5 x 4 mask with one pixel set at row 1, column 2: runs 11, 1, 8."""
    mask = decode_runs({"size": [5, 4], "counts": ";18"})
    assert mask.sum() == 1 and mask[1, 2]


@pytest.mark.parametrize(
    ("size", "counts"),
    [
        ([3, 5], [2**62] * 4 + [15]),
        ([2**20, 2**20], [2**40]),
        ([2, 2], [3]),
        ([2, 2], [5, -1]),
        ([2, 2], "\x01"),
        ([2, 2], "zz"),
        ([2, 2], "é"),
    ],
)
def test_run_lengths_that_cannot_be(size, counts):
    with pytest.raises(ValueError, match=r"run length|run-length|ascii|sensible size"):
        decode_runs({"size": size, "counts": counts})


# --- statistics


def test_statistics_count_and_are_counted_once(tmp_path, monkeypatch):
    trees.coco_stuff(tmp_path)
    data, split = DATASETS["coco_stuff"], "val"
    statistics = label_statistics("coco_stuff", tmp_path, split)
    expected = np.zeros(172, int)
    for i, (image, label) in enumerate(find_pairs("coco_stuff", tmp_path, split)):
        ids = read_labels(label, data.lut(), read_image(image).size)
        classes, pixels = np.unique(np.where(ids == 255, 171, ids), return_counts=True)
        rows = statistics.image == i
        assert statistics.category[rows].tolist() == classes.tolist()
        assert statistics.pixels[rows].tolist() == pixels.tolist()
        np.add.at(expected, classes, pixels)
        assert (i in statistics.images_with([int(classes[0])])) and (
            len(classes) > 1
            or classes[0] != 171
            or i not in statistics.images_with(list(range(171)))
        )
    assert statistics.histogram(171).tolist() == expected.tolist()

    def forbidden(*args: object, **options: object):
        raise RuntimeError("counted again")

    real = label_statistics_module.count_classes
    monkeypatch.setattr(label_statistics_module, "count_classes", forbidden)
    cached = label_statistics("coco_stuff", tmp_path, split)
    assert all(np.array_equal(vars(cached)[k], v) for k, v in vars(statistics).items())
    cache = tmp_path / "coco" / ".zsseg" / "val.npz"
    monkeypatch.setitem(DATASETS, "coco_stuff", dataclasses.replace(data, unseen=["person"]))
    with pytest.raises(RuntimeError, match="counted again"):  # another table
        label_statistics("coco_stuff", tmp_path, split)
    monkeypatch.setitem(DATASETS, "coco_stuff", data)
    label = find_pairs("coco_stuff", tmp_path, split)[0][1]
    os.utime(label, ns=(0, cache.stat().st_mtime_ns + 10**9))  # a label map that changed
    with pytest.raises(RuntimeError, match="counted again"):
        label_statistics("coco_stuff", tmp_path, split)
    os.utime(label)
    monkeypatch.setattr(label_statistics_module, "count_classes", real)
    cache.write_bytes(cache.read_bytes()[:100])
    again = label_statistics("coco_stuff", tmp_path, split)
    assert again.histogram(171).tolist() == expected.tolist()


def test_statistics_of_a_read_only_root(tmp_path, monkeypatch):
    """They go to the cache instead."""
    trees.ade20k(tmp_path / "root")
    monkeypatch.setenv("ZSSEG_CACHE", str(tmp_path / "cache"))
    real, tried = label_statistics_module.atomic_write, []

    def refuse(path: Path):
        tried.append(path)
        if path.is_relative_to(tmp_path / "root"):
            raise UserError("file", "cannot be written", "")
        return real(path)

    monkeypatch.setattr(label_statistics_module, "atomic_write", refuse)
    for tries in (2, 0):
        tried.clear()
        assert (
            label_statistics("ade20k", tmp_path / "root", "val").histogram(150).sum()
            == 37 * 53 + 64 * 48 + 1
        )
        assert len(tried) == tries
    assert not (tmp_path / "root" / "ADEChallengeData2016" / ".zsseg").exists()
    assert len(list((tmp_path / "cache" / "statistics").iterdir())) == 1


def test_a_leak_in_one_table_is_noticed(tmp_path):
    data = DATASETS["voc"]
    Image.fromarray(np.array([[1, 16]], np.uint8)).save(tmp_path / "a.png")
    full, training = data.lut(), data.lut(training=True)
    assert count_classes(
        (tmp_path / "a.jpg", tmp_path / "a.png"), data, (full, training)
    ).rows.tolist() == [[0, 1], [15, 1]]
    # An unseen class let through; a seen class under another's number.
    for value, wrong in ((16, 3), (1, 1)):
        table = training.copy()
        table[value] = wrong
        with pytest.raises(AssertionError, match=r"a\.png"):
            count_classes((tmp_path / "a.jpg", tmp_path / "a.png"), data, (full, table))


@pytest.mark.parametrize(
    ("shape", "digest"),
    [((601, 733, 3), "169572b832"), ((1200, 513, 3), "f04f5db6c6"), ((777, 1024), "2b3b5ccb14")],
)
def test_images_are_made_smaller_as_opencv_does(shape, digest):
    """SHA-256 of what cv2.resize (OpenCV 5.0, INTER_LINEAR) gives."""
    numbers = np.arange(np.prod(shape), dtype=np.uint64) * np.uint64(2654435761) >> np.uint64(7)
    height, width = (round(side / min(shape[:2]) * 512) for side in shape[:2])
    small = resize_bilinear((numbers % 256).astype(np.uint8).reshape(shape), height, width)
    assert small.shape[:2] == (height, width) and hashlib.sha256(
        small.tobytes()
    ).hexdigest().startswith(digest)
