"""Label files that cannot be read in place: SBD's .mat, Context's run lengths in JSON, the colours
of ADE20K-847.

Every output file is written under a temporary name first and left alone when it is there, so that a
conversion which was killed goes on where it was.
"""

import json
import os
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from zsseg.datasets import dataset
from zsseg.files import atomic_write, decode, split_lines
from zsseg.images import read_image
from zsseg.utils import UserError, parallel

LARGEST = 2**28  # pixels


def read_ids(file: Path) -> list[str]:
    try:
        lines = split_lines(decode(file.read_bytes()))
    except OSError as error:
        raise UserError(f"list {file}", f"cannot be read ({error})", "replace the file") from None
    return [line.strip() for line in lines if line.strip()]


def write_ids(file: Path, ids: list[str]) -> None:
    """Write a list of ids unless there is one."""
    if file.exists():
        return
    with atomic_write(file) as temporary:
        temporary.write_text("".join(f"{i}\n" for i in ids), "utf-8", "surrogateescape")


def voc_trainaug(folder: Path, sbd: Path, workers: int) -> None:
    """Write `SegmentationClassAug/`, `train.txt` and, last, `val.txt` from VOC's own files and
    SBD's.

    train = (VOC train + SBD train + SBD val) - VOC val, 10,582 images. An image that VOC
    segmented keeps VOC's mask (with its void borders); SBD's are for the others, and never for val.
    """
    lists = [folder / f"{split}.txt" for split in ("train", "val")]
    if all(file.exists() for file in lists):  # somebody's own: only masks are missing
        both, val = set(read_ids(lists[0])), []
    else:
        train, val = (read_ids(folder / "ImageSets" / "Segmentation" / file.name) for file in lists)
        both = {*train, *read_ids(sbd / "train.txt"), *read_ids(sbd / "val.txt")} - set(val)
    missing = sorted(i for i in both if not (folder / "SegmentationClass" / f"{i}.png").exists())

    def convert(name: str) -> None:
        target = folder / "SegmentationClassAug" / f"{name}.png"
        if not target.exists():
            save(read_sbd(sbd / "cls" / f"{name}.mat"), target)

    list(parallel(convert, missing, workers, "convert SBD"))
    write_ids(lists[0], sorted(both))
    write_ids(lists[1], val)  # last: it says that all is there


def read_sbd(file: Path) -> np.ndarray:
    """SBD's class mask: uint8 [H, W], 0 background, 1..20; there is no void."""
    from scipy.io import loadmat  # here: it takes a second to import

    try:
        values = loadmat(file, variable_names=["GTcls"])["GTcls"][0]["Segmentation"][0]
    except Exception as error:  # SciPy raises many kinds for a broken file
        raise UserError(
            f"SBD file {file}",
            f"cannot be read ({error or type(error).__name__})",
            "replace the file",
        ) from None
    if values.ndim != 2 or values.dtype != np.uint8:
        raise UserError(f"SBD file {file}", "holds no 8-bit class mask", "replace the file")
    return values


def save(values: np.ndarray, file: Path, kind: str = "PNG", **options: object) -> None:
    with atomic_write(file) as temporary:
        Image.fromarray(values).save(temporary, kind, **options)


def decode_runs(segmentation: dict) -> np.ndarray:
    """COCO's run-length mask, {"size": [h, w], "counts": list or compressed text} -> bool [h, w].

    The runs go down the columns, background first. Compressed: 5 bits a character from 48 on, low
    bits first, the 6th says that more follow, two's complement; from the third on, differences to
    the run before the last. Raises ValueError where they do not add up to the image.
    """
    height, width = segmentation["size"]
    if not 0 < height * width <= LARGEST:
        raise ValueError("an image of no sensible size")
    counts = segmentation["counts"]
    if isinstance(counts, str):
        runs, value, shift = [], 0, 0
        for character in counts.encode("ascii"):
            bits = character - 48
            if not 0 <= bits < 64:
                raise ValueError("not a run-length text")
            value |= (bits & 31) << shift
            shift += 5
            if not bits & 32:
                value -= (bits & 16) and 1 << shift
                runs.append(value + (runs[-2] if len(runs) > 2 else 0))
                value = shift = 0
        counts = runs
    counts = np.array(counts, np.int64)
    if (
        counts.ndim != 1
        or (counts < 0).any()
        or (counts > height * width).any()
        or counts.sum() != height * width
    ):
        raise ValueError("run lengths that do not add up to the image")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def pascal_context(folder: Path, workers: int) -> None:
    """`trainval_merged.json` -> `labels/<id>.png`, 16-bit category ids painted in the file's order,
    and, last, the lists.
    """
    file = folder / "trainval_merged.json"
    try:
        content = json.loads(file.read_bytes())
        images = {
            int(i["image_id"]): i for i in content["images"] if i["phase"] in ("train", "val")
        }
        if "val" not in {image["phase"] for image in images.values()}:
            raise ValueError("no image of phase val")
        annotations = defaultdict(list)
        for annotation in content["annos_segmentation"]:
            annotations[int(annotation["image_id"])].append(annotation)
        stems = {key: Path(image["file_name"]).stem for key, image in images.items()}
        if not all(re.fullmatch(r"[\w-]{1,100}", stem) for stem in stems.values()):
            raise ValueError("file names that are none")
    except Exception as error:  # any JSON may be in it
        raise UserError(
            f"annotations {file}", f"cannot be read ({error!r:.200})", "replace the file"
        ) from None
    del content

    def convert(key: int) -> None:
        target = folder / "labels" / f"{stems[key]}.png"
        if target.exists():
            return
        try:
            height, width = images[key]["height"], images[key]["width"]
            if not 0 < height * width <= LARGEST:
                raise ValueError("a target of no sensible size")
            values = np.zeros((height, width), np.uint16)
            for annotation in annotations[key]:
                values[decode_runs(annotation["segmentation"])] = annotation["category_id"]
        except Exception as error:
            why = f"holds no valid masks of {stems[key]} ({error!r:.200})"
            raise UserError(f"annotations {file}", why, "replace the file") from None
        save(values, target)

    list(parallel(convert, sorted(images), workers, "convert Context"))
    for split in ("train", "val"):
        write_ids(
            folder / f"{split}.txt",
            sorted(stems[k] for k, image in images.items() if image["phase"] == split),
        )


def ade20k_full(folder: Path, workers: int, train: bool = False) -> None:
    """`images/ADE/**/<id>.jpg` and `<id>_seg.png` -> `images_detectron2/` and
    `annotations_detectron2/`, as MaskFormer does.

    Where both sides are longer than 512 the shorter one becomes 512: images bilinearly, label maps
    by nearest. The split that a file belongs to stands in its name; `train`: convert the training
    images, too.
    """
    data = dataset("ade20k_full")
    table = np.full(65536, data.ignore, np.uint16)
    table[data.objects] = np.arange(len(data.objects))

    def convert(jpeg: Path) -> None:
        name, segmentation = jpeg.stem, jpeg.with_name(f"{jpeg.stem}_seg.png")
        split = data.splits["val" if is_val(name) else "train"]
        target = folder / data.images.format(split=split, id=name)
        labels = folder / data.labels[0].format(split=split, id=name)
        if target.exists() and labels.exists():
            return
        colours = np.array(read_image(segmentation, None, "label map"))
        if colours.ndim != 3 or colours.dtype != np.uint8:
            raise UserError(
                f"label map {segmentation}", "is not a colour image", "replace the file"
            )
        image = read_image(jpeg, None)
        image = image if image.mode in ("L", "RGB") else image.convert("RGB")
        red, green = colours[..., 0].astype(np.int64), colours[..., 1]
        values = table[red // 10 * 256 + green]
        if image.size != values.shape[::-1]:
            why = (
                f"is {values.shape[1]} x {values.shape[0]}, its target {image.width} x "
                f"{image.height}"
            )
            raise UserError(f"label map {segmentation}", why, "make the two the same size")
        if min(image.size) > 512:
            height, width = (round(side / min(image.size) * 512) for side in values.shape)
            image = Image.fromarray(resize_bilinear(np.array(image), height, width))
            H, W = values.shape
            rows, columns = (
                np.floor(np.arange(n) * (1 / (n / m))).astype(int)
                for n, m in ((height, H), (width, W))
            )
            values = values[rows[:, None], columns]
        if not target.exists():
            save(np.array(image), target, "JPEG")
        save(values, labels, "TIFF", compression="tiff_deflate")

    def is_val(name: str) -> bool:
        return name.split("_")[1:2] == ["val"]

    jpegs = []
    for parent, below, files in os.walk(folder / "images"):
        names = {
            f.removesuffix(".jpg") for f in files if f.endswith(".jpg") and not f.startswith(".")
        }
        jpegs += [Path(parent) / f"{n}.jpg" for n in sorted(names) if train or is_val(n)]
        below[:] = sorted(set(below) - names)  # a folder of the image's name holds its instances
    list(parallel(convert, jpegs, workers, "convert ADE20K"))


def resize_bilinear(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3] -> the same at height x width, bit for bit as OpenCV's
    INTER_LINEAR.

    No anti-aliasing; weights in steps of 1/2048, and the vertical sum in 16-bit pieces as its
    vector code does.
    """

    def taps(size: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        position = ((np.arange(new) + 0.5) * (1 / (new / size)) - 0.5).astype(np.float32)
        first = np.floor(position).astype(int)
        share = np.where((first < 0) | (first >= size - 1), 0, position - first).astype(np.float32)
        first = first.clip(0, size - 1)
        weights = np.rint(np.stack([1 - share, share]) * 2048).astype(np.int32)
        return first, (first + 1).clip(max=size - 1), weights

    pixels = pixels.astype(np.int32).reshape(*pixels.shape[:2], -1)  # [H, W, channels]
    left, right, (a0, a1) = taps(pixels.shape[1], width)
    # [H, width, channels], times 2048
    rows = pixels[:, left] * a0[:, None] + pixels[:, right] * a1[:, None]
    upper, lower, (b0, b1) = taps(pixels.shape[0], height)
    total = ((rows[upper] >> 4) * b0[:, None, None] >> 16) + (
        (rows[lower] >> 4) * b1[:, None, None] >> 16
    )
    return (total + 2 >> 2).astype(np.uint8).squeeze()
