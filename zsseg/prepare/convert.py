"""Label files that cannot be read in place: SBD's .mat, Context's run lengths in JSON, the colours
of ADE20K-847.

Every output file is written under a temporary name first and is not written again when it exists,
so that a conversion that was killed continues where it was.
"""

import json
import os
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from zsseg.datasets import dataset, read_lines
from zsseg.files import atomic_write
from zsseg.images import open_image
from zsseg.utils import UserError, parallel

MAX_PIXELS = 2**28


def read_ids(file: Path) -> list[str]:
    return [line.strip() for line in read_lines(file)]


def write_ids(file: Path, ids: list[str]) -> None:
    """Write a list of ids unless there is one."""
    if not file.exists():
        with atomic_write(file) as temporary:
            temporary.write_text("".join(f"{i}\n" for i in ids), "utf-8", "surrogateescape")


def voc_trainaug(folder: Path, sbd: Path, workers: int) -> None:
    """Write `SegmentationClassAug/`, `train.txt` and, last, `val.txt` from VOC's own files and
    SBD's.

    train = (VOC train + SBD train + SBD val) - VOC val, 10,582 images. An image that VOC
    segmented keeps VOC's mask (with its void borders); SBD's are for the others, and never for val.
    """
    train_list = folder / "train.txt"
    val_list = folder / "val.txt"
    if train_list.exists() and val_list.exists():  # the user's own: only masks are missing
        train = {*read_ids(train_list)}
        val = []
    else:
        official = folder / "ImageSets" / "Segmentation"
        val = read_ids(official / "val.txt")
        lists = (official / "train.txt", sbd / "train.txt", sbd / "val.txt")
        train = {i for file in lists for i in read_ids(file)} - {*val}

    def convert(name: str) -> None:
        target = folder / "SegmentationClassAug" / f"{name}.png"
        if not target.exists():
            save(read_sbd(sbd / "cls" / f"{name}.mat"), target)

    missing = sorted(i for i in train if not (folder / "SegmentationClass" / f"{i}.png").exists())
    list(parallel(convert, missing, workers, "convert SBD"))
    write_ids(train_list, sorted(train))
    write_ids(val_list, val)  # last: it marks the conversion as complete


def read_sbd(file: Path) -> np.ndarray:
    """SBD's class mask: uint8 [H, W], 0 background, 1..20; there is no void."""
    from scipy.io import loadmat  # only when needed: it takes a second to import

    try:
        values = loadmat(file, variable_names=["GTcls"])["GTcls"][0]["Segmentation"][0]
        if values.ndim != 2 or values.dtype != np.uint8:
            raise ValueError("not an 8-bit class mask")
    except Exception as error:  # SciPy raises many types for a broken file
        why = f"cannot be read ({error or type(error).__name__})"
        raise UserError(f"SBD file {file}", why, "replace the file") from None
    return values


def save(values: np.ndarray, file: Path, format: str = "PNG", **options: object) -> None:
    with atomic_write(file) as temporary:
        Image.fromarray(values).save(temporary, format, **options)


def decode_runs(segmentation: dict) -> np.ndarray:
    """COCO's run-length mask, {"size": [h, w], "counts": list or compressed text} -> bool [h, w].

    The runs go down the columns, background first. Raises ValueError where they do not add up to
    the image.
    """
    height, width = segmentation["size"]
    check_size(height, width)
    counts = segmentation["counts"]
    counts = decompress(counts) if isinstance(counts, str) else counts
    if any(count < 0 for count in counts) or sum(counts) != height * width:
        raise ValueError("run lengths that do not add up to the image")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def decompress(text: str) -> list[int]:
    """COCO's compressed run lengths: 5 bits a character from 48 on, low bits first; the 6th bit
    says that more follow; two's complement; from the third on, differences to the run before the
    last.
    """
    runs = []
    value = shift = 0
    for character in text.encode("ascii"):
        bits = character - 48
        if not 0 <= bits < 64:
            raise ValueError("not a run-length text")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) and 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def check_size(height: int, width: int) -> None:
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError("an image of no sensible size")


def pascal_context(folder: Path, workers: int) -> None:
    """`trainval_merged.json` -> `labels/<id>.png`, 16-bit category ids painted in the file's order,
    and, last, the lists.
    """
    file = folder / "trainval_merged.json"
    images = {}
    annotations = defaultdict(list)
    try:
        content = json.loads(file.read_bytes())
        for image in content["images"]:
            if image["phase"] in ("train", "val"):
                stem = Path(image["file_name"]).stem
                if not re.fullmatch(r"[\w-]{1,100}", stem):
                    raise ValueError("a file name that cannot be one")
                size = (image["height"], image["width"])
                images[int(image["image_id"])] = (stem, image["phase"], size)
        if "val" not in {phase for _, phase, _ in images.values()}:
            raise ValueError("no image of phase val")
        for annotation in content["annos_segmentation"]:
            annotations[int(annotation["image_id"])].append(annotation)
    except Exception as error:  # any JSON may be in it
        why = f"cannot be read ({error!r:.200})"
        raise UserError(f"annotations {file}", why, "replace the file") from None
    del content

    def convert(key: int) -> None:
        stem, _, size = images[key]
        target = folder / "labels" / f"{stem}.png"
        if target.exists():
            return
        try:
            check_size(*size)
            values = np.zeros(size, np.uint16)
            for annotation in annotations[key]:
                values[decode_runs(annotation["segmentation"])] = annotation["category_id"]
        except Exception as error:
            why = f"contains no valid masks of {stem} ({error!r:.200})"
            raise UserError(f"annotations {file}", why, "replace the file") from None
        save(values, target)

    list(parallel(convert, sorted(images), workers, "convert Context"))
    for split in ("train", "val"):
        ids = sorted(stem for stem, phase, _ in images.values() if phase == split)
        write_ids(folder / f"{split}.txt", ids)


def ade20k_full(folder: Path, workers: int, train: bool = False) -> None:
    """`images/ADE/**/<id>.jpg` and `<id>_seg.png` -> `images_detectron2/` and
    `annotations_detectron2/`, as MaskFormer does.

    Where both sides are longer than 512 the shorter one becomes 512: images bilinearly, label maps
    by nearest. The name of a file tells its split; `train`: convert the training images, too.
    """
    data = dataset("ade20k_full")
    lut = np.full(65536, data.ignore, np.uint16)
    lut[data.objects] = np.arange(len(data.objects))

    def convert(jpeg: Path) -> None:
        split = data.splits["val" if is_val(jpeg.stem) else "train"]
        target = folder / data.images.format(split=split, id=jpeg.stem)
        labels = folder / data.labels[0].format(split=split, id=jpeg.stem)
        if not (target.exists() and labels.exists()):
            image, values = read_ade20k(jpeg, lut)
            if not target.exists():
                save(image, target, "JPEG")
            save(values, labels, "TIFF", compression="tiff_deflate")

    def is_val(stem: str) -> bool:
        return stem.split("_")[1:2] == ["val"]

    jpegs = []
    for parent, folders, files in os.walk(folder / "images"):
        stems = {
            f.removesuffix(".jpg") for f in files if f.endswith(".jpg") and not f.startswith(".")
        }
        jpegs += [Path(parent) / f"{stem}.jpg" for stem in sorted(stems) if train or is_val(stem)]
        # A folder of the image's name contains its instances.
        folders[:] = sorted({*folders} - stems)
    list(parallel(convert, jpegs, workers, "convert ADE20K"))


def read_ade20k(jpeg: Path, lut: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 [h, w] or [h, w, 3] and class ids uint16 [h, w], resized; `lut` [65536] maps
    object indices, 256 * (red // 10) + green, to class ids.
    """
    segmentation = jpeg.with_name(f"{jpeg.stem}_seg.png")
    what = f"label map {segmentation}"
    with open_image(segmentation, "label map") as image:
        colours = np.array(image)
    if colours.ndim != 3 or colours.dtype != np.uint8:
        raise UserError(what, "is not a colour image", "replace the file")
    with open_image(jpeg, "image") as image:
        pixels = np.array(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    values = lut[colours[..., 0].astype(int) // 10 * 256 + colours[..., 1]]
    H, W = values.shape
    if pixels.shape[:2] != (H, W):
        why = f"is {W} x {H}, its image {pixels.shape[1]} x {pixels.shape[0]}"
        raise UserError(what, why, "make the two the same size")
    if min(H, W) > 512:
        h, w = (round(side / min(H, W) * 512) for side in (H, W))
        pixels = resize_bilinear(pixels, h, w)
        rows = np.floor(np.arange(h) * (1 / (h / H))).astype(int)
        cols = np.floor(np.arange(w) * (1 / (w / W))).astype(int)
        values = values[rows[:, None], cols]
    return pixels, values


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
