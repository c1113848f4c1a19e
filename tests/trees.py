"""Small data sets in their official layouts, with awkward files among them, and archives of them.

Every builder draws label values from a fixed seed and returns {image stem: class ids [H, W]} of
the test split, worked out value by value from the publishers' descriptions, not from the project's
tables.
"""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from zsseg.datasets import DATASETS

SIZES = [(37, 53), (64, 48), (1, 1), (50, 33)]  # (height, width)
IGNORE = 255


def image(file: Path, height: int, width: int, variant: int, seed: int) -> None:
    """A JPEG: colour, grey, CMYK, or colour with an EXIF note that asks to turn it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((width, height))
    options = {}
    if variant == 1:
        image = image.convert("L")
    elif variant == 2:
        image = image.convert("CMYK")
    elif variant == 3:
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees
        options["exif"] = exif
    image.save(file, **({"quality": 90} | options if file.suffix == ".jpg" else {}))


def values_like(
    rng: np.random.Generator, allowed: list[int], height: int, width: int, variant: int
) -> np.ndarray:
    """A label map of blocks; variant 1 has a class of a single pixel, variant 2 has only the
    last allowed value.
    """
    if variant == 2:
        return np.full((height, width), allowed[-1])
    small = rng.choice(allowed, (4, 4))
    values = small[np.arange(height)[:, None] * 4 // height, np.arange(width) * 4 // width]
    if variant == 1:
        values[height // 2, width // 2] = allowed[0]
    return values


def save_map(values: np.ndarray, file: Path, palette: bool = False) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8))
    if palette:
        coloured = Image.new("P", image.size)
        coloured.putdata(values.ravel().tolist())
        coloured.putpalette([i * 7 % 256 for i in range(768)])
        image = coloured
    image.save(file)


def voc(
    root: Path, folder: str = "VOCdevkit/VOC2012", sbd: str = "benchmark_RELEASE/dataset"
) -> dict[str, np.ndarray]:
    """VOC train 2, val 3; SBD annotates two others and, differently, one of train and one of
    val.
    """
    rng, base, expected = np.random.default_rng(1), root / folder, {}
    allowed = [0, *range(1, 21), 255]
    ids = {
        "train": ["2007_000032", "2007_000039"],
        "val": ["2007_000033", "2007_000042", "2007_000061"],
    }
    extra = {"train": ["2008_000002", "2007_000042"], "val": ["2008_000003", "2007_000032"]}
    for i, name in enumerate([*ids["train"], *ids["val"], "2008_000002", "2008_000003"]):
        height, width = SIZES[i % 4]
        image(base / "JPEGImages" / f"{name}.jpg", height, width, i % 4, i)
        values = values_like(rng, allowed, height, width, i % 3)
        if name in ids["train"] + ids["val"]:
            save_map(values, base / "SegmentationClass" / f"{name}.png", palette=True)
        if name in ids["val"]:
            expected[name] = np.where((values == 0) | (values == 255), IGNORE, values - 1)
        if name in extra["train"] + extra["val"]:
            mask = values_like(
                np.random.default_rng(50 + i), list(range(21)), height, width, 0
            ).astype(np.uint8)
            mask[:] = 17 if name == "2008_000003" else mask  # nothing but an unseen class
            content = {
                "Segmentation": mask,
                "CategoriesPresent": np.unique(mask),
                "Boundaries": np.zeros((20, 1)),
            }
            (root / sbd / "cls").mkdir(parents=True, exist_ok=True)
            savemat(root / sbd / "cls" / f"{name}.mat", {"GTcls": content}, do_compression=True)
    for split in ("train", "val"):
        (base / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (base / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(
            "\n".join(ids[split]) + "\n"
        )
        (root / sbd / f"{split}.txt").write_text("\n".join(extra[split]) + "\n")
    return expected


def coco_stuff(root: Path) -> dict[str, np.ndarray]:
    gaps, expected = [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90], {}
    rng = np.random.default_rng(2)
    for split, count in (("train", 3), ("val", 4)):
        for i in range(count):
            (height, width), name = SIZES[i % 4], f"{i + 100 * (split == 'val'):012}"
            image(root / "coco" / f"{split}2017" / f"{name}.jpg", height, width, i % 4, i)
            values = values_like(rng, [*range(182), 255], height, width, i % 3)
            save_map(values, root / "coco" / "stuffthingmaps" / f"{split}2017" / f"{name}.png")
            if split == "val":
                ids = values - sum((values > gap).astype(int) for gap in gaps)
                expected[name] = np.where(np.isin(values, [*gaps, 255]), IGNORE, ids)
    return expected


def ade20k(root: Path) -> dict[str, np.ndarray]:
    rng, expected = np.random.default_rng(3), {}
    for split, short in (("training", "train"), ("validation", "val")):
        for i in range(3):
            (height, width), name = SIZES[i], f"ADE_{short}_{i + 1:08}"
            image(
                root / "ADEChallengeData2016" / "images" / split / f"{name}.jpg",
                height,
                width,
                i + 1,
                i,
            )
            values = values_like(rng, list(range(150, -1, -1)), height, width, i)
            save_map(values, root / "ADEChallengeData2016" / "annotations" / split / f"{name}.png")
            if short == "val":
                expected[name] = np.where(values == 0, IGNORE, values - 1)
    return expected


def ade20k_full(root: Path) -> dict[str, np.ndarray]:
    """Also an image of 600 x 700, which is made smaller, and one of class 255, which is a class, not
    the ignore value.
    """
    objects = DATASETS["ade20k_full"].objects
    ids_of = {o: i for i, o in enumerate(objects)}
    rng, expected = np.random.default_rng(4), {}
    for short, split, scene in (
        ("train", "training", "urban/street"),
        ("val", "validation", "home_or_hotel/bedroom"),
    ):
        for i, (height, width) in enumerate([(37, 53), (600, 700), (520, 300), (41, 41)]):
            name = f"ADE_{short}_{i + 1:08}"
            folder = root / "ADE20K_2021_17_01" / "images" / "ADE" / split / scene
            image(folder / f"{name}.jpg", height, width, i, i)
            values = values_like(rng, [0, 3157, 5, *objects], height, width, 0)
            if i == 3:
                values[:] = objects[255]
            colours = np.stack(
                [values // 256 * 10 + 3, values % 256, rng.integers(0, 256, values.shape)], -1
            )
            Image.fromarray(colours.astype(np.uint8)).save(folder / f"{name}_seg.png")
            save_map(values % 2, folder / f"{name}_parts_1.png")
            save_map(values % 2, folder / name / "instance_000_ADE.png")
            if height == 600:  # the shorter side becomes 512: nearest by OpenCV's rule
                rows, columns = (
                    np.arange(512) * 600 // 512,
                    (np.arange(597) * (700 / 597)).astype(int),
                )
                values = values[rows[:, None], columns]
            if short == "val":
                expected[name] = np.vectorize(lambda v: ids_of.get(v, 65535))(values)
    (root / "ADE20K_2021_17_01" / "index_ade20k.pkl").write_bytes(b"not needed, and not opened")
    return expected


def encode_runs(mask: np.ndarray, compressed: bool) -> dict:
    """COCO's run lengths of a mask, one run at a time."""
    flat, runs, current = mask.T.ravel(), [], False
    count = 0
    for value in flat:
        if value != current:
            runs.append(count)
            current, count = value, 0
        count += 1
    runs.append(count)
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


def pcontext(root: Path, folder: str = "pcontext") -> dict[str, np.ndarray]:
    listed = [
        2,
        9,
        18,
        19,
        22,
        23,
        25,
        31,
        33,
        34,
        44,
        45,
        46,
        59,
        65,
        68,
        72,
        80,
        85,
        98,
        104,
        105,
        113,
        115,
        144,
        158,
        159,
        162,
        187,
        189,
        207,
        220,
        232,
        258,
        259,
        260,
        284,
        295,
        296,
        308,
        324,
        326,
        347,
        349,
        354,
        355,
        360,
        366,
        368,
        397,
        415,
        416,
        420,
        424,
        427,
        440,
        445,
        454,
        458,
    ]
    rng, expected, images, annotations = np.random.default_rng(5), {}, [], []
    for i, phase in enumerate(["train", "val", "val", "train", "val", "test"]):
        (height, width), name = SIZES[i % 4], f"2008_{i + 2:06}"
        image(root / folder / "JPEGImages" / f"{name}.jpg", height, width, i % 4, i)
        key = int(name.replace("_", ""))
        images.append(
            {
                "image_id": key,
                "file_name": f"{name}.jpg",
                "height": height,
                "width": width,
                "phase": phase,
            }
        )
        values = np.zeros((height, width), int)
        for j in range(0 if i == 4 else 3):  # the last image of val has no annotation at all
            mask = rng.random((height, width)) < (0.5 if j < 2 else 0.2)
            category = int(rng.choice([*listed, 1, 459]))
            annotations.append(
                {
                    "image_id": key,
                    "category_id": category,
                    "segmentation": encode_runs(mask, j % 2 == 0),
                }
            )
            values[mask] = category
        if phase == "val":
            expected[name] = np.vectorize(lambda v: listed.index(v) if v in listed else IGNORE)(
                values
            )
    rng.shuffle(images)
    content = {"images": images, "annos_segmentation": annotations, "categories": []}
    (root / folder / "trainval_merged.json").write_text(json.dumps(content))
    return expected


def cityscapes(root: Path) -> dict[str, np.ndarray]:
    ids_of = {
        7: 0,
        8: 1,
        11: 2,
        12: 3,
        13: 4,
        17: 5,
        19: 6,
        20: 7,
        21: 8,
        22: 9,
        23: 10,
        24: 11,
        25: 12,
        26: 13,
        27: 14,
        28: 15,
        31: 16,
        32: 17,
        33: 18,
    }
    rng, expected = np.random.default_rng(6), {}
    for split in ("train", "val"):
        for i, city in enumerate(["aachen", "ulm", "ulm"]):
            stem, (height, width) = f"{city}_{i:06}_000019", SIZES[i]
            image(
                root / "cityscapes" / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png",
                height,
                width,
                0,
                i,
            )
            values = values_like(rng, list(range(33, -1, -1)), height, width, i)
            for variant in ("labelIds", "instanceIds"):
                save_map(
                    values,
                    root / "cityscapes" / "gtFine" / split / city / f"{stem}_gtFine_{variant}.png",
                )
            if split == "val":
                expected[f"{stem}_leftImg8bit"] = np.vectorize(lambda v: ids_of.get(v, IGNORE))(
                    values
                )
    return expected


BUILDERS = {f.__name__: f for f in (voc, coco_stuff, ade20k, ade20k_full, pcontext, cityscapes)}


def pack(folder: Path, archive: Path, *names: str) -> Path:
    """An archive of what is in `folder` (or of some of it), of the format that its ending says."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    files = sorted(
        f
        for f in folder.rglob("*")
        if f.is_file() and (not names or f.relative_to(folder).parts[0] in names)
    )
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as content:
            for file in files:
                content.write(file, file.relative_to(folder).as_posix())
    else:
        with tarfile.open(archive, "w:gz" if archive.suffix == ".tgz" else "w") as content:
            for file in files:
                content.add(file, file.relative_to(folder).as_posix())
    return archive


def hostile(archive: Path, name: str, link: bool = False) -> Path:
    """An archive with one good file and one that leads outside."""
    content = b"owned"
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as z:
            z.writestr("good/a.txt", "good")
            z.writestr(name, content)
        return archive
    with tarfile.open(archive, "w") as t:
        info = tarfile.TarInfo("good/a.txt")
        info.size = 4
        t.addfile(info, io.BytesIO(b"good"))
        info = tarfile.TarInfo(name)
        info.size = 0 if link else len(content)
        if link:
            info.type, info.linkname = tarfile.SYMTYPE, "/etc"
        t.addfile(info, io.BytesIO(content))
    return archive
