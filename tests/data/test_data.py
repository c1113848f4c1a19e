"""Images, label maps, augmentation and the training streams."""

import colorsys
import json
import pickle

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image

from zsseg.prepare import shapes
from zsseg.data import TestImages, TrainImages, augment, collate, ssd_jitter, stream, test_size
from zsseg.datasets import DATASETS, find_pairs
from zsseg.images import read_image, read_labels
from zsseg.prepare.shapes_clip import RegionsWithCaptions
from zsseg.utils import UserError

test_size.__test__ = TestImages.__test__ = False  # pytest would take them for tests


@pytest.mark.parametrize(
    ("size", "short", "longest", "expected"),
    [
        ((640, 480), 512, 2048, (683, 512)),
        ((170, 230), 512, 2048, (512, 693)),
        ((230, 190), 512, 2048, (620, 512)),
        ((1, 1), 512, 2048, (512, 512)),
        ((1000, 10), 512, 2048, (2048, 20)),
        ((10000, 1), 640, 2560, (2560, 1)),
    ],
)
def test_sizes_at_test_time(size, short, longest, expected):
    assert test_size(*size, short, longest) == expected


def test_no_pixel_and_no_name_of_an_unseen_class_reaches_the_segmenter(shapes_root):
    """Through everything that training reads: images of the data set do show unseen things,
    targets never do.
    """
    data = DATASETS["shapes"]
    config = tiny_config()
    samples = TrainImages(config, shapes_root)
    assert (
        set(samples.data.training_names).isdisjoint(data.unseen)
        and len(samples.data.training_names) == 20
    )
    unseen = [data.names.index(n) for n in data.unseen]
    hidden = 0
    for i, (image, label) in enumerate(samples.pairs):
        raw = np.array(Image.open(label))
        mapped = read_labels(label, data.lut(training=True), read_image(image).size)
        hidden += np.isin(raw, unseen).sum()
        assert (mapped[np.isin(raw, unseen)] == data.ignore).all()
        kept = mapped != data.ignore
        assert (
            np.array(data.training_names)[mapped[kept]] == np.array(data.names)[raw[kept]]
        ).all()
        _, labels, classes = samples[i]
        assert classes.max() < 20 and set(classes.tolist()) == set(labels.unique().tolist()) - {
            data.ignore
        }
    assert hidden > 0


def test_a_sample_is_a_function_of_its_number(shapes_root):
    """Order of access, the global generator and workers change nothing."""
    samples = TrainImages(tiny_config(), shapes_root)
    first = [samples[n] for n in (0, 25, 7)]
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = [TrainImages(tiny_config(), shapes_root)[n] for n in (7, 0, 25)]
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first, (again[1], again[2], again[0]), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for (image, targets), n in zip(
        stream(samples, [0, 25, 7, 8], 2, 2, collate), (0, 7), strict=True
    ):
        assert torch.equal(image[0], samples[n][0]) and targets.counts[0] == len(samples[n][2])
    other = TrainImages(tiny_config("train.seed=1"), shapes_root)
    assert any(not torch.equal(other[n][0], samples[n][0]) for n in range(4))


def test_every_image_comes_once_an_epoch(shapes_root):
    samples = TrainImages(tiny_config(), shapes_root)
    N = len(samples.pairs)
    orders = [samples.order(e).tolist() for e in range(3)]
    assert all(sorted(o) == list(range(N)) for o in orders) and orders[0] != orders[1]


def test_collate_pads_the_classes():
    item = lambda *c: (torch.zeros(3, 2, 2), torch.zeros(2, 2), torch.tensor(c, dtype=torch.int64))
    _, targets = collate([item(3, 5), item(), item(1)])
    assert targets.classes.tolist() == [[3, 5], [0, 0], [1, 0]] and targets.counts.tolist() == [
        2,
        0,
        1,
    ]
    assert collate([item()])[1].classes.shape == (1, 0)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (33, 200), (64, 64), (301, 77)])
def test_augmentation_moves_image_and_labels_together(size):
    """A pixels whose colour is its label keeps that property wherever no border was
    interpolated.
    """
    labels = np.zeros(size, np.uint8)
    labels[size[0] // 2 :, size[1] // 3 :] = 7
    image = Image.fromarray(labels * 20).convert("RGB")
    config = tiny_config(
        "data.short_edges=[40, 90]", "data.crop=64", "data.color_jitter=false"
    ).data
    rng = np.random.default_rng(0)
    for _ in range(5):
        pixels, mask = augment(image, labels, config, 255, rng)
        assert (
            pixels.shape == (3, 64, 64)
            and mask.shape == (64, 64)
            and pixels.dtype == mask.dtype == torch.uint8
        )
        padding = mask == 255
        assert (pixels[:, padding] == 128).all() and set(mask.unique().tolist()) <= {0, 7, 255}
        # A corner rectangle.
        assert (
            not padding[0, 0] and (~padding).sum() == (~padding[0]).sum() * (~padding[:, 0]).sum()
        )
        agree = (pixels[0][~padding].int() - 20 * mask[~padding].int()).abs() < 10
        assert agree.float().mean() > 0.9


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (97, 301), (1000, 20)])
def test_the_crop_is_resized_as_a_part_of_the_whole(size):
    """Resizing only what the crop shows gives the pixels of resizing it all, and nearest labels are
    Pillow's.
    """
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    labels = rng.integers(0, 20, size, dtype=np.uint8)
    config = tiny_config(
        "data.short_edges=[40, 320, 700]", "data.crop=128", "data.color_jitter=false"
    ).data
    for seed in range(8):
        pixels, mask = augment(image, labels, config, 255, np.random.default_rng(seed))
        draws = np.random.default_rng(seed)
        width, height = test_size(
            *image.size, int(draws.choice(config.short_edges)), config.max_size
        )
        h, w = min(height, 128), min(width, 128)
        top, left = int(draws.integers(height - h + 1)), int(draws.integers(width - w + 1))
        flipped = draws.random() < 0.5
        for ours, theirs, method in (
            (pixels.permute(1, 2, 0), image, "BILINEAR"),
            (mask, Image.fromarray(labels), "NEAREST"),
        ):
            full = np.array(theirs.resize((width, height), Image.Resampling[method]))[
                top : top + h, left : left + w
            ]
            apart = (full[:, ::-1] if flipped else full).astype(int) - ours[:h, :w].numpy()
            assert (apart != 0).mean() < (1e-3 if method == "BILINEAR" else 1e-9) and np.abs(
                apart
            ).max() <= 1, (method, seed)


def test_jitter_is_ssd_s():
    """A grey image has neither saturation nor hue; a pure red one has no contrast or brightness
    left to hide them.
    """
    rng = np.random.default_rng(0)
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    means = np.array([np.array(ssd_jitter(grey, rng)).mean() for _ in range(300)])
    # (100 - 32) / 2 and (100 + 32) * 1.5.
    assert 34 - 1 <= means.min() < 45 and 170 < means.max() <= 198 + 1
    assert 0.17 < (means == 100).mean() < 0.33  # neither brightness nor contrast: a quarter
    red = Image.new("RGB", (2, 2), (200, 60, 60))
    pixels = np.array([np.array(ssd_jitter(red, rng))[0, 0] for _ in range(300)]).astype(float)
    hue_moved = pixels[:, 1] != pixels[:, 2]  # green and blue part only when the hue turns
    spread = (pixels[:, 0] - pixels[:, 1:].mean(1))[~hue_moved] / 140
    assert 0.35 < hue_moved.mean() < 0.6 and spread.min() < 0.6 and spread.max() > 1.3
    dull = Image.new("RGB", (2, 2), (130, 50, 50))  # nothing of it is clipped
    pixels = np.array([np.array(ssd_jitter(dull, rng))[0, 0] for _ in range(300)]) / 255
    hues = np.array([colorsys.rgb_to_hsv(*p)[0] for p in pixels])
    turned = 360 * np.abs((hues + 0.5) % 1 - 0.5)
    assert 15 < turned.max() < 20  # degrees


def test_voc_and_coco_layouts(tmp_path):
    voc, coco = tmp_path / "VOC2012", tmp_path / "coco"
    for folder in (
        voc / "JPEGImages",
        voc / "SegmentationClassAug",
        coco / "val2017",
        coco / "stuffthingmaps/val2017",
    ):
        folder.mkdir(parents=True)
    photo, values = (
        Image.new("RGB", (6, 4), (10, 20, 30)),
        np.array([[0, 1, 15, 16, 20, 255]] * 4, np.uint8),
    )
    photo.save(voc / "JPEGImages" / "a.jpg")
    # VOC's own masks have a palette; the index is what counts.
    palette = Image.fromarray(values).convert("P")
    palette.putdata(values.ravel().tolist())
    palette.save(voc / "SegmentationClassAug" / "a.png")
    (voc / "val.txt").write_text("a\n")
    photo.save(coco / "val2017" / "b.jpg")
    Image.fromarray(np.array([[0, 10, 11, 12, 181, 255]] * 4, np.uint8)).save(
        coco / "stuffthingmaps/val2017/b.png"
    )
    config = tiny_config("data.name=voc").data
    [image], labels, stem = TestImages(config, tmp_path, "val")[0]
    assert (stem, image.shape, image.is_contiguous()) == ("a", (3, 64, 96), True)
    assert labels[0].tolist() == [255, 0, 14, 15, 19, 255]
    data = DATASETS["voc"]
    trained = read_labels(voc / "SegmentationClassAug" / "a.png", data.lut(training=True), (6, 4))
    assert trained[0].tolist() == [255, 0, 14, 255, 255, 255]
    config = tiny_config("data.name=coco_stuff").data
    assert TestImages(config, tmp_path, "val")[0][1][0].tolist() == [0, 10, 255, 11, 170, 255]


def test_bad_files_are_named(tmp_path, shapes_root):
    lut = DATASETS["voc"].lut()
    (tmp_path / "broken.jpg").write_bytes(
        (shapes_root / "shapes/images/val/val00000.jpg").read_bytes()[:700]
    )
    with pytest.raises(UserError, match=r"broken\.jpg"):
        read_image(tmp_path / "broken.jpg")
    with pytest.raises(UserError, match=r"absent\.png"):
        read_labels(tmp_path / "absent.png", lut, (4, 4))
    Image.new("L", (5, 4)).save(tmp_path / "small.png")
    with pytest.raises(UserError, match=r"small\.png: is 5 x 4, its image 6 x 4"):
        read_labels(tmp_path / "small.png", lut, (6, 4))
    Image.new("RGB", (6, 4)).save(tmp_path / "colour.png")
    with pytest.raises(UserError, match="has 3 channels; write one channel of 8 bits"):
        read_labels(tmp_path / "colour.png", lut, (6, 4))
    with pytest.raises(UserError, match=r"prepare_data\.py voc"):
        find_pairs("voc", tmp_path, "val")
    with pytest.raises(UserError, match="no 'val' images"):
        find_pairs("coco_stuff", tmp_path, "val")
    with pytest.raises(UserError, match=r"did you mean voc\?"):
        find_pairs("vok", tmp_path, "val")
    with pytest.raises(UserError, match="choose one of shapes, voc, "):
        find_pairs("pets", tmp_path, "val")


def test_samples_survive_pickling(shapes_root):
    """Workers are started by pickling wherever processes are not forked."""
    for samples in (
        TrainImages(tiny_config(), shapes_root),
        TestImages(tiny_config().data, shapes_root, "val"),
    ):
        ours, again = samples[1][0], pickle.loads(pickle.dumps(samples))[1][0]
        assert torch.equal(torch.stack([*again]), torch.stack([*ours]))
    regions = RegionsWithCaptions(tiny_config(task="clip"), shapes_root)
    assert torch.equal(pickle.loads(pickle.dumps(regions))[1][0], regions[1][0])


def test_images_of_other_modes(tmp_path):
    for mode, colour in (("L", 7), ("RGBA", (7, 7, 7, 0)), ("LA", (7, 0)), ("P", 7), ("1", 1)):
        Image.new(mode, (3, 2), colour).save(tmp_path / "x.png")
        assert read_image(tmp_path / "x.png").mode == "RGB"
    Image.new("I;16", (3, 2), 300).save(tmp_path / "x.png")
    assert np.asarray(read_image(tmp_path / "x.png")).tolist() == 2 * [3 * [3 * [300 // 257]]]
    Image.fromarray(np.full((2, 3), 0.5, np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(
        UserError, match=r"x\.tif: cannot be read \(its numbers are not those of an image"
    ):
        read_image(tmp_path / "x.tif")


def test_shapes_are_deterministic_and_their_splits_differ():
    for split in shapes.SPLITS:
        one, two = shapes.draw(split, 3), shapes.draw(split, 3)
        assert (
            np.array_equal(one[0], two[0]) and np.array_equal(one[1], two[1]) and one[2] == two[2]
        )
    images = [shapes.draw(split, 0)[0].tobytes() for split in shapes.SPLITS]
    assert len(set(images)) == len(images)


def test_shapes_show_two_or_three_things_on_one_ground():
    counts = []
    for i in range(40):
        image, labels, captions = shapes.draw("test", i)
        present = np.unique(labels).tolist()
        counts.append((sum(p < 20 for p in present), sum(p >= 20 for p in present)))
        assert image.shape == (96, 96, 3) and image.dtype == labels.dtype == np.uint8
        assert sorted(captions) == present
        assert all(shapes.NAMES[k] in text for k, text in captions.items())
    assert set(counts) == {(2, 1), (3, 1)}


def test_unseen_classes_are_rare_in_training_alone():
    unseen = [shapes.NAMES.index(n) for n in DATASETS["shapes"].unseen]
    shares = {}
    for split in ("train", "val"):
        present = [c for i in range(60) for c in np.unique(shapes.draw(split, i)[1]).tolist()]
        shares[split] = np.isin(present, unseen).mean()
    assert 0 < shares["train"] < 0.12 and 0.14 < shares["val"] < 0.3


def test_no_class_of_shapes_is_made_of_others():
    data = DATASETS["shapes"]
    assert (len(shapes.THINGS), len(shapes.STUFF)) == (20, 5)
    for names in (shapes.THINGS, shapes.STUFF):  # every fifth one, whatever it is
        assert sorted(names) == list(names)
        assert [n for n in names if n in data.unseen] == list(names)[4::5]
    assert not any(a in b for a in data.names for b in data.names if a != b)
    masks = np.stack([shapes.silhouette(n, 48, 48, 44, 0)[1] > 0.5 for n in shapes.THINGS])
    masks = masks.reshape(20, -1).astype(int)
    both = masks @ masks.T
    one = masks.sum(1)
    iou = both / (one + one[:, None] - both)
    assert np.triu(iou, 1).max() < 0.8 and (one > 0.1 * 96 * 96).all()


def test_the_surface_of_a_thing_says_nothing_about_its_class():
    """The mean hue of each class is spread over the circle."""
    hues = {}
    for i in range(150):
        image, labels, _ = shapes.draw("clip", i)
        hsv = np.asarray(Image.fromarray(image).convert("HSV"))
        for thing in set(np.unique(labels).tolist()) & set(range(20)):
            angle = hsv[labels == thing][:, 0] / 256 * 2 * np.pi
            hues.setdefault(thing, []).append(np.exp(1j * angle).mean())
    assert sorted(hues) == list(range(20))
    assert all(abs(np.mean(found)) < 0.6 for found in hues.values())


def test_generating_again_changes_nothing(shapes_root):
    files = {f: f.stat().st_mtime_ns for f in shapes_root.rglob("*.*")}
    shapes.generate(shapes_root / "shapes")
    assert files == {f: f.stat().st_mtime_ns for f in shapes_root.rglob("*.*")}


def test_a_data_set_of_other_classes_is_not_taken_for_this_one(tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps({"train00000": {"0": "a red disc."}}))
    with pytest.raises(UserError, match="drawn by another version"):
        shapes.generate(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["captions.json"]


def test_a_contrastive_sample_has_every_class_once(shapes_root):
    samples = RegionsWithCaptions(tiny_config(task="clip"), shapes_root)
    crops, captions = samples[5]
    names = shapes.NAMES
    assert crops.shape == (25, 3, 48, 48) and all(
        n in text for n, text in zip(names, captions, strict=True)
    )
    again, same = samples[5]
    assert torch.equal(crops, again) and captions == same


def test_the_small_clip_sees_no_masked_crop(shapes_root):
    """Outside its mask a masked crop is 0, as normalised."""
    crops, _ = RegionsWithCaptions(tiny_config(task="clip"), shapes_root)[0]
    assert (crops == 0).float().mean() < 1e-3
