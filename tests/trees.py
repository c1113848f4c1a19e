"""Small data sets in their official layouts, with awkward files among them, and archives of them.

Every builder draws label values from a fixed seed and returns {image stem: class ids [H, W]} of
the test split, worked out value by value from the publishers' descriptions, not from the project's
tables.
"""

import io
import itertools
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from zsseg.datasets import DATASETS

SIZES = [(37, 53), (64, 48), (1, 1), (50, 33)]  # (height, width)


def image(file: Path, size: tuple[int, int], variant: int, seed: int) -> None:
    """A JPEG: colour, grey, CMYK, or colour with an EXIF note that asks to turn it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size[::-1]).convert(["RGB", "L", "CMYK", "RGB"][variant])
    exif = Image.Exif()
    if variant == 3:
        exif[0x0112] = 6  # turn by 90 degrees
    image.save(file, **({"quality": 90, "exif": exif} if file.suffix == ".jpg" else {}))


def values_like(rng, allowed: list[int], size: tuple[int, int], variant: int) -> np.ndarray:
    """A map of blocks; variant 1 has a class of one pixel, variant 2 only the last value."""
    if variant == 2:
        return np.full(size, allowed[-1])
    small = rng.choice(allowed, (4, 4))
    height, width = size
    values = small[np.arange(height)[:, None] * 4 // height, np.arange(width) * 4 // width]
    if variant == 1:
        values[height // 2, width // 2] = allowed[0]
    return values


def save_map(values: np.ndarray, file: Path, palette: bool = False) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8))
    if palette:
        image.putpalette([i * 7 % 256 for i in range(768)])
    image.save(file)


def by_value(values: np.ndarray, ids: dict[int, int], ignore: int = 255) -> np.ndarray:
    return np.vectorize(lambda value: ids.get(int(value), ignore))(values)


def voc(root: Path, folder: str = "VOCdevkit/VOC2012", sbd: str = "benchmark_RELEASE/dataset"):
    """VOC train 2, val 3; SBD has two others and, differently, one of train and one of val."""
    rng, base, expected = np.random.default_rng(1), root / folder, {}
    train, val = ["2007_000032", "2007_000039"], ["2007_000033", "2007_000042", "2007_000061"]
    extra = {"train": ["2008_000002", "2007_000042"], "val": ["2008_000003", "2007_000032"]}
    (root / sbd / "cls").mkdir(parents=True, exist_ok=True)
    (base / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
    for i, name in enumerate([*train, *val, "2008_000002", "2008_000003"]):
        size = SIZES[i % 4]
        image(base / "JPEGImages" / f"{name}.jpg", size, i % 4, i)
        values = values_like(rng, [*range(21), 255], size, i % 3)
        if name in train + val:
            save_map(values, base / "SegmentationClass" / f"{name}.png", palette=True)
        if name in val:
            expected[name] = by_value(values, {k: k - 1 for k in range(1, 21)})
        if name in extra["train"] + extra["val"]:
            mask = values_like(np.random.default_rng(50 + i), list(range(21)), size, 0)
            mask[:] = 17 if name == "2008_000003" else mask  # nothing but an unseen class
            content = {"Segmentation": mask.astype(np.uint8), "Boundaries": np.zeros((20, 1))}
            savemat(root / sbd / "cls" / f"{name}.mat", {"GTcls": content}, do_compression=True)
    for split, ids in (("train", train), ("val", val)):
        (base / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(ids) + "\n")
        (root / sbd / f"{split}.txt").write_text("\n".join(extra[split]) + "\n")
    return expected


def beside(base: Path, images: str, labels: str, splits: dict, allowed: list, ids: dict):
    """Images and label maps by patterns; `splits`: {folder: ids}, the last is the test split."""
    rng = np.random.default_rng(2)
    for split, stems in splits.items():
        expected = {}
        for i, stem in enumerate(stems):
            file = base / images.format(split=split, id=stem)
            image(file, SIZES[i % 4], i % 4 if file.suffix == ".jpg" else 0, i)
            values = values_like(rng, allowed, SIZES[i % 4], i % 3)
            save_map(values, base / labels.format(split=split, id=stem))
            expected[file.stem] = by_value(values, ids)
    return expected


def coco_stuff(root: Path) -> dict[str, np.ndarray]:
    gaps = [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]
    ids_of = {v: i for i, v in enumerate(v for v in range(182) if v not in gaps)}
    splits = {"train2017": [f"{i:012}" for i in range(3)]}
    splits["val2017"] = [f"{i:012}" for i in range(100, 104)]
    patterns = ("{split}/{id}.jpg", "stuffthingmaps/{split}/{id}.png")
    return beside(root / "coco", *patterns, splits, [*range(182), 255], ids_of)


def ade20k(root: Path) -> dict[str, np.ndarray]:
    base = root / "ADEChallengeData2016"
    splits = {"training": [f"ADE_train_{i:08}" for i in (1, 2, 3)]}
    splits["validation"] = [f"ADE_val_{i:08}" for i in (1, 2, 3)]
    patterns = ("images/{split}/{id}.jpg", "annotations/{split}/{id}.png")
    ids_of = {k: k - 1 for k in range(1, 151)}
    return beside(base, *patterns, splits, list(range(150, -1, -1)), ids_of)


def cityscapes(root: Path) -> dict[str, np.ndarray]:
    """With maps of instances beside those of labels."""
    used = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    cities = [f"{city}/{city}_{i:06}_000019" for i, city in enumerate(["aachen", "ulm", "ulm"])]
    ids_of = {value: k for k, value in enumerate(used)}
    images = "leftImg8bit/{split}/{id}_leftImg8bit.png"
    splits = {"train": cities, "val": cities}
    for kind in ("instanceIds", "labelIds"):
        patterns = (images, f"gtFine/{{split}}/{{id}}_gtFine_{kind}.png")
        allowed = list(range(33, -1, -1))
        expected = beside(root / "cityscapes", *patterns, splits, allowed, ids_of)
    return expected


def ade20k_full(root: Path) -> dict[str, np.ndarray]:
    """Also an image of 600 x 700, which is made smaller, and one of 255, here a class."""
    objects = DATASETS["ade20k_full"].objects
    rng, expected, base = np.random.default_rng(4), {}, root / "ADE20K_2021_17_01"
    scenes = {"train": "training/urban/street", "val": "validation/home_or_hotel/bedroom"}
    for short, scene in scenes.items():
        for i, size in enumerate([(37, 53), (600, 700), (520, 300), (41, 41)]):
            name = f"ADE_{short}_{i + 1:08}"
            folder = base / "images" / "ADE" / scene
            image(folder / f"{name}.jpg", size, i, i)
            values = values_like(rng, [0, 3157, 5, *objects], size, 0)
            if i == 3:
                values[:] = objects[255]
            instances = rng.integers(0, 256, size)
            colours = np.stack([values // 256 * 10 + 3, values % 256, instances], -1)
            Image.fromarray(colours.astype(np.uint8)).save(folder / f"{name}_seg.png")
            save_map(values % 2, folder / f"{name}_parts_1.png")
            save_map(values % 2, folder / name / "instance_000_ADE.png")
            if size == (600, 700):  # the shorter side becomes 512: the nearest pixel
                columns = (np.arange(597) * (700 / 597)).astype(int)
                values = values[(np.arange(512) * 600 // 512)[:, None], columns]
            if short == "val":
                expected[name] = by_value(values, {o: k for k, o in enumerate(objects)}, 65535)
    (base / "index_ade20k.pkl").write_bytes(b"not needed, and not opened")
    return expected


def encode_runs(mask: np.ndarray, compressed: bool) -> dict:
    """COCO's run lengths of a mask, one run at a time."""
    groups = [(value, len([*run])) for value, run in itertools.groupby(mask.T.ravel())]
    runs = [0] * bool(groups[0][0]) + [length for _, length in groups]
    if compressed:
        text = ""
        for i, run in enumerate(runs):
            x = run - runs[i - 2] if i > 2 else run
            more = True
            while more:
                bits = x & 31
                x >>= 5
                more = x != (-1 if bits & 16 else 0)
                text += chr(48 + bits + (32 if more else 0))
        runs = text
    return {"size": list(mask.shape), "counts": runs}


CONTEXT = """2 9 18 19 22 23 25 31 33 34 44 45 46 59 65 68 72 80 85 98 104 105 113 115 144 158 159
162 187 189 207 220 232 258 259 260 284 295 296 308 324 326 347 349 354 355 360 366 368 397 415 416
420 424 427 440 445 454 458"""


def pcontext(root: Path, folder: str = "pcontext") -> dict[str, np.ndarray]:
    ids_of = {int(value): i for i, value in enumerate(CONTEXT.split())}
    rng, expected, images, annotations = np.random.default_rng(5), {}, [], []
    for i, phase in enumerate(["train", "val", "val", "train", "val", "test"]):
        size, name = SIZES[i % 4], f"2008_{i + 2:06}"
        image(root / folder / "JPEGImages" / f"{name}.jpg", size, i % 4, i)
        key = int(name.replace("_", ""))
        row = {"image_id": key, "file_name": f"{name}.jpg", "phase": phase}
        images.append(row | {"height": size[0], "width": size[1]})
        values = np.zeros(size, int)
        for j in range(0 if i == 4 else 3):  # the last image of val has no annotation at all
            mask = rng.random(size) < (0.5 if j < 2 else 0.2)
            category = int(rng.choice([*ids_of, 1, 459]))
            runs = encode_runs(mask, j % 2 == 0)
            annotations.append({"image_id": key, "category_id": category, "segmentation": runs})
            values[mask] = category
        if phase == "val":
            expected[name] = by_value(values, ids_of)
    rng.shuffle(images)
    content = {"images": images, "annos_segmentation": annotations, "categories": []}
    (root / folder / "trainval_merged.json").write_text(json.dumps(content))
    return expected


def pcontext_full(root: Path, folder: str = "pcontext") -> dict[str, np.ndarray]:
    """The files of `pcontext`, without whose masks it does, and a .mat for every image."""
    pcontext(root, folder)
    rng, expected = np.random.default_rng(7), {}
    content = json.loads((root / folder / "trainval_merged.json").read_text())
    (root / folder / "trainval").mkdir(exist_ok=True)
    for row in content["images"]:
        name, size = row["file_name"].removesuffix(".jpg"), (row["height"], row["width"])
        values = values_like(rng, [459, *[0] * 90, *range(1, 460)], size, int(name[-1]) % 3)
        mat = root / folder / "trainval" / f"{name}.mat"
        savemat(mat, {"LabelMap": values.astype(np.uint16)}, do_compression=True)
        if row["phase"] == "val":
            expected[name] = np.where(values == 0, 65535, values - 1)
    return expected


BUILDERS = (voc, coco_stuff, ade20k, ade20k_full, pcontext, pcontext_full, cityscapes)
BUILDERS = {builder.__name__: builder for builder in BUILDERS}


def pack(folder: Path, archive: Path, *names: str) -> Path:
    """An archive of what is in `folder` (or of some of it), of the format that its ending says."""
    files = {f.relative_to(folder): f for f in sorted(folder.rglob("*")) if f.is_file()}
    some = (path for path in files if not names or path.parts[0] in names)
    return write(archive, {path.as_posix(): files[path].read_bytes() for path in some})


def write(archive: Path, files: dict[str, bytes], link: str = "") -> Path:
    """An archive of these files, which need not be harmless; `link`: one that is a link to /etc."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as content:
            for name, text in files.items():
                content.writestr(name, text)
        return archive
    with tarfile.open(archive, "w:gz" if archive.suffix in (".tgz", ".gz") else "w") as content:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            if name == link:
                info.size, info.type, info.linkname = 0, tarfile.SYMTYPE, "/etc"
            content.addfile(info, io.BytesIO(text))
    return archive
