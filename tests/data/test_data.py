"""Training samples, label counts and the loading of both."""

import colorsys
import itertools
import multiprocessing
import os
import pickle
import time
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trees
from conftest import process, tiny_config
from own_data import blocks, described, save_pair
from PIL import Image

from zsseg import data as data_module
from zsseg.config import load_config
from zsseg.data import TestImages as Images  # pytest would take it for a test
from zsseg.data import TrainImages, augment, batches, collate, count_labels
from zsseg.datasets import DATASETS, find_pairs
from zsseg.images import read_pair
from zsseg.images import test_size as size_at_test
from zsseg.utils import SIGNALS, UserError, warn


@pytest.mark.parametrize("name", ["shapes", "voc", "coco_stuff"])
def test_no_pixel_and_no_name_of_an_unseen_class_reaches_the_segmenter(name, request, tmp_path):
    """Through everything that training reads: images do show unseen things, targets never do."""
    if name == "shapes":
        root = request.getfixturevalue("shapes_root")
    else:
        root = tmp_path
        trees.BUILDERS[name](root)
        from prepare_data import main

        main([name, "--root", str(root)])
    data = DATASETS[name]
    config = tiny_config(f"data.name={name}", "data.color_jitter=false")
    samples = TrainImages(config, root)
    names = np.array(samples.data.training_names)
    assert {*names}.isdisjoint(data.unseen) and len(names) == len(data.names) - len(data.unseen)
    unseen = [data.values[data.names.index(n)] for n in data.unseen]
    hidden = 0
    for n in range(len(samples)):
        image, label = samples.item(n)
        raw = np.array(Image.open(label))
        _, ids = read_pair(image, label, samples.lut, False)
        hidden += np.isin(raw, unseen).sum()
        kept = ids != data.ignore
        assert not np.isin(raw[kept], unseen).any() and kept.any()
        true = np.array(data.names)[np.searchsorted(data.values, raw[kept])]
        assert (names[ids[kept]] == true).all()
        _, labels, classes = samples[n]
        assert {*classes.tolist()} == {*labels.unique().tolist()} - {data.ignore}
        assert {*classes.tolist()} <= {*np.unique(ids[kept]).tolist()}
    assert hidden > 0
    everything = TrainImages(tiny_config(f"data.name={name}", "data.train_on=all"), root)
    assert np.array_equal(everything.lut, data.lut())
    assert len(everything) == len(samples) + (name == "voc")  # one shows only unseen classes


def test_a_leak_ends_the_counting(tmp_path, monkeypatch):
    """An unseen class that the table of training lets through."""
    trees.coco_stuff(tmp_path)
    data = DATASETS["coco_stuff"]
    luts = [data.lut(), data.lut(training=True)]
    value = data.values[data.names.index(data.unseen[0])]
    luts[True][value] = 3
    monkeypatch.setattr(type(data), "lut", lambda self, training=False: luts[training])
    for _, label in find_pairs("coco_stuff", tmp_path, "train"):
        Image.fromarray(np.full_like(Image.open(label), value)).save(label)
    with pytest.raises(AssertionError, match=r"\.png: a pixel of an unseen class survives"):
        count_labels(tiny_config("data.name=coco_stuff").data, tmp_path, "train")


# --- samples


def test_a_sample_is_a_function_of_its_number(shapes_root):
    """Order of access, the global generator, pickling and workers change nothing; every image comes
    once an epoch.
    """
    samples = TrainImages(tiny_config(), shapes_root)
    first = {n: samples[n] for n in (0, 25, 7)}
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = pickle.loads(pickle.dumps(TrainImages(tiny_config(), shapes_root)))
    for n in (7, 0, 25):
        assert all(torch.equal(x, y) for x, y in zip(first[n], again[n], strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    loaded = list(batches(samples, [0, 25, 7, 8, 9], 2, 2, collate))
    assert [len(images) for images, _ in loaded] == [2, 2, 1]
    for (image, targets), n in zip(loaded, (0, 7, 9), strict=True):
        assert torch.equal(image[0], samples[n][0]) and targets.counts[0] == len(samples[n][2])
    other = TrainImages(tiny_config("train.seed=1"), shapes_root)
    assert any(not torch.equal(other[n][0], samples[n][0]) for n in range(4))
    N = len(samples)
    epochs = [[samples.source(e * N + i) for i in range(N)] for e in range(3)]
    assert all({*epoch} == {str(image) for image, _ in samples.items} for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_collate_pads_the_classes():
    item = lambda *c: (torch.zeros(3, 2, 2), torch.zeros(2, 2), torch.tensor(c, dtype=torch.int64))
    _, targets = collate([item(3, 5), item(), item(1)])
    assert targets.classes.tolist() == [[3, 5], [0, 0], [1, 0]]
    assert targets.counts.tolist() == [2, 0, 1]
    assert collate([item()])[1].classes.shape == (1, 0)


def test_the_crop_is_resized_as_a_part_of_the_whole():
    """Resizing only what the crop shows gives the pixels of resizing it all, but for roundings, and
    the labels of F.interpolate's nearest where that rounds rightly; the rest is padding.
    """
    rng = np.random.default_rng(0)
    sizes = [(375, 500, 512), (480, 640, 320), (1, 9, 7), (800, 533, 639), (366, 500, 896)]
    sizes += [(1, 1, 40), (1, 500, 90), (33, 200, 100), (64, 64, 127)]
    for seed, (H, W, short) in enumerate(sizes + rng.integers(1, 800, (40, 3)).tolist()):
        image = Image.fromarray(rng.integers(0, 256, (H, W, 3), dtype=np.uint8))
        labels = np.arange(H * W, dtype=np.int32).reshape(H, W)
        settings = [f"data.short_edges=[{short}]", "data.max_size=2048", "data.color_jitter=false"]
        config = tiny_config("data.crop=128", *settings).data
        pixels, mask = augment(image, labels, config, -1, np.random.default_rng(seed))
        draws = np.random.default_rng(seed)
        width, height = size_at_test(W, H, int(draws.choice(config.short_edges)), 2048)
        h, w = min(height, 128), min(width, 128)
        top, left = int(draws.integers(height - h + 1)), int(draws.integers(width - w + 1))
        flipped = draws.random() < 0.5
        resized = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
        whole = torch.from_numpy(labels)[None, None].double()
        nearest = F.interpolate(whole, (height, width), mode="nearest")[0, 0].numpy()
        if seed >= len(sizes):
            rows = np.arange(height)[:, None] * H // height
            nearest = labels[rows, np.arange(width) * W // width]
        for ours, full, most in ((pixels.permute(1, 2, 0), resized, 2), (mask, nearest, 0)):
            part = full[top : top + h, left : left + w].astype(int)
            apart = (part[:, ::-1] if flipped else part) - ours[:h, :w].numpy()
            assert np.abs(apart).max() <= most, (H, W, short)
        padding = torch.ones(128, 128, dtype=bool)
        padding[:h, :w] = False
        assert (pixels[:, padding] == 128).all() and (mask[padding] == -1).all()
        assert pixels.dtype == torch.uint8 and pixels.is_contiguous()


def test_jitter_is_ssd_s():
    """A grey image has neither saturation nor hue."""
    rng = np.random.default_rng(0)

    def draw(*colour: int) -> np.ndarray:
        image = Image.new("RGB", (1, 1), colour)
        return np.array([data_module.ssd_jitter(image, rng) for _ in range(300)])[:, 0, 0]

    means = draw(100, 100, 100).mean(1)
    # (100 - 32) / 2 and (100 + 32) * 1.5.
    assert 34 - 1 <= means.min() < 45 and 170 < means.max() <= 198 + 1
    assert 0.17 < (means == 100).mean() < 0.33  # neither brightness nor contrast: a quarter
    pixels = draw(200, 60, 60).astype(float)
    hue_moved = pixels[:, 1] != pixels[:, 2]  # green and blue part only when the hue turns
    spread = (pixels[:, 0] - pixels[:, 1:].mean(1))[~hue_moved] / 140
    assert 0.35 < hue_moved.mean() < 0.6 and spread.min() < 0.6 and spread.max() > 1.3
    hues = np.array([colorsys.rgb_to_hsv(*p)[0] for p in draw(130, 50, 50) / 255])  # not clipped
    turned = 360 * np.abs((hues + 0.5) % 1 - 0.5)
    assert 15 < turned.max() < 20  # degrees


def test_test_images_have_names_of_their_own(root):
    config = load_config(root / "a.toml").data
    images = Images(config, root, "val", [32, 64])
    assert images.names == ["0", "1"] and len(images) == 2
    inputs, labels, name = images[1]
    assert [tuple(x.shape) for x in inputs] == [(3, 32, 40), (3, 64, 80)] and name == "1"
    assert np.array_equal(labels.numpy(), blocks())
    for name in ("one/7", "two/7"):
        save_pair(root, "val", name, blocks())
    images = Images(config, root, "val")
    assert images.names == ["0", "1", "one/7", "two/7"]
    images.lut[:] = 255
    assert (images[0][1] == 255).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_test_image_is_an_error_of_the_user(workers, root):
    with pytest.raises(IndexError):  # this one is the program's
        list(batches([], range(2), None, workers))
    images = Images(load_config(root / "a.toml").data, root, "val")
    images.pairs[1][0].write_bytes(b"junk")
    read = batches(images, range(2), None, workers)
    assert next(read)[2] == "0"
    with pytest.raises(UserError, match=r"val/1\.png: cannot be read"):
        next(read)


def test_workers_leave_signals_to_the_main_process(root):
    samples = TrainImages(load_config(root / "a.toml"), root)
    before = multiprocessing.active_children()
    read = batches(samples, range(1000), 2, 2, collate)
    next(read)
    children = [child for child in multiprocessing.active_children() if child not in before]
    for child, number in itertools.product(children, SIGNALS):
        os.kill(child.pid, number)
    time.sleep(0.2)
    assert len(children) == 2 and all(child.is_alive() for child in children)
    next(read)
    read.close()


def test_a_program_error_does_not_wait_for_its_workers(root):
    script = root / "ends.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{os.getcwd()!r}]\nfrom zsseg.data import batches, collate\n"
        "item = __import__('torch').zeros(2)\nread = batches([3 * (item,)] * 99, range(99), 2, 2, collate)\n"
        "next(read)\nraise KeyError('a bug')\n"
    )
    done = process(script)
    assert done.returncode == 1 and "a bug" in done.stderr


# --- label counts


def test_counts_are_those_of_the_files_and_cached(tmp_path, monkeypatch):
    trees.coco_stuff(tmp_path)
    data = DATASETS["coco_stuff"]
    config = tiny_config("data.name=coco_stuff").data
    counts, _ = count_labels(config, tmp_path, "val")
    assert counts.shape == (4, 172) and counts.dtype == np.int64
    for row, (image, label) in zip(counts, find_pairs("coco_stuff", tmp_path, "val"), strict=True):
        _, ids = read_pair(image, label, data.lut(), False)
        assert row.tolist() == [(ids == i).sum() for i in [*range(171), 255]]

    read = Mock(wraps=data_module.read_values)
    monkeypatch.setattr(data_module, "read_values", read)

    def again(reads: int) -> None:
        """The same, after so many label maps have been read."""
        assert np.array_equal(count_labels(config, tmp_path, "val")[0], counts)
        assert read.call_count == reads

    again(0)
    # Replaced by one of the same size and an older date, as `cp -p` and archives do.
    stat = label.stat()
    label.write_bytes(label.read_bytes())
    os.utime(label, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again(4)
    [cache] = (tmp_path / "coco").glob(".labels.val.npz")
    cache.write_bytes(cache.read_bytes()[:100])
    again(8)
    again(8)
    refused = Mock(side_effect=UserError("file", "cannot be written", ""))
    monkeypatch.setattr(data_module, "atomic_write", refused)  # a folder that is read-only
    cache.unlink()
    again(12)


def test_what_training_leaves_out_is_said(root, capsys):
    save_pair(root, "train", "empty", np.full((48, 60), 255, np.uint8))
    (root / "a/masks/train/0.png").write_bytes(b"no image")
    (root / "a/masks/train/1.png").unlink()
    warn.cache_clear()
    samples = TrainImages(load_config(root / "a.toml", ["data.unseen=['grass']"]), root)
    assert sorted(image.stem for image, _ in samples.items) == ["2", "3"]
    text = capsys.readouterr().out
    assert "left out: 1 file without a partner in train, e.g. " in text
    assert "warning: 1 label map left out: label map " in text
    (root / "a/masks/train/0.png").unlink()  # mended: counted again
    config = load_config(root / "a.toml", ["data.values=[1, 2, 3]"])
    assert not count_labels(config.data, root, "train")[1]
    data_module.shown_classes(config, root)
    assert "no pixel in train of 1 of 3 classes: grass" in capsys.readouterr().out
    with pytest.raises(UserError, match="no training image shows a class that is trained on"):
        TrainImages(load_config(root / "a.toml", ["data.values=[71, 72, 73]"]), root)


def test_label_maps_of_16_bits_and_other_folders(tmp_path):
    """Absolute paths, outside the data set's folder; ids in lists may hold spaces."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (5, 4)).save(tmp_path / "photos" / "IMG 1.jpg")
    Image.fromarray(np.full((4, 5), 700, np.uint16)).save(tmp_path / "IMG 1.png")
    (tmp_path / "photos" / "val.txt").write_bytes(b"\xef\xbb\xbf\nIMG 1\r\n\n")
    labels = f"data.labels={tmp_path}/{{id}}.png"
    config = described("data.folder=photos", "data.images={id}.jpg", labels, "data.values=[700,0]")
    assert count_labels(config, tmp_path, "val")[0].tolist() == [[20, 0, 0]]
