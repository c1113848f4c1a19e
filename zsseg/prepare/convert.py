"""Label files that cannot be read in place: the .mat of SBD and of Context's 459 classes, the run
lengths in JSON of its 59, the colours of ADE20K-847.

Every output file is written under a temporary name first and is not written again when it exists,
so that a conversion that was killed continues where it was.
"""

import contextlib
import fnmatch
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms.functional import resize

from zsseg.datasets import DATASETS, listed_ids, read_ids
from zsseg.images import read_image, to_tensor
from zsseg.utils import UserError, atomic_write, parallel, walk


@contextlib.contextmanager
def naming(file):
    """Errors inside are those of a file that contains something else: UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # SciPy raises many types, and JSON may contain anything
        raise UserError(
            f"file {file}", f"cannot be read ({error!r:.200})", "replace the file"
        ) from None


def write_ids(file, ids):
    """Write a list of ids unless it has some."""
    if not listed_ids(file):
        with atomic_write(file) as temporary:
            temporary.write_text("\n".join(ids) + "\n", "utf-8")


def voc_trainaug(folder, find_sbd, workers):
    """Write `SegmentationClassAug/` and the lists from VOC's own files and SBD's, for whose folder
    `find_sbd` is asked if it is needed.

    train = (VOC train + SBD train + SBD val) - VOC val, 10,582 images, or as a list says. An image
    that VOC segmented keeps VOC's mask (with its void borders); SBD's are for the others, and never
    for val.
    """
    official = folder / "ImageSets" / "Segmentation"
    lists = [folder / "train.txt", *official.glob("train*aug.txt")]
    train = next(filter(None, map(listed_ids, lists)), None)
    val = listed_ids(folder / "val.txt") or read_ids(official / "val.txt")
    if not train:
        sbd = find_sbd()
        files = (official / "train.txt", sbd / "train.txt", sbd / "val.txt")
        train = sorted({i for file in files for i in read_ids(file)} - {*val})

    masks = folder / "SegmentationClassAug"
    both = (folder / "SegmentationClass", masks)
    missing = [i for i in train if not any((part / f"{i}.png").exists() for part in both)]
    if missing:
        convert_mats(find_sbd() / "cls", missing, "GTcls", masks, workers)
    write_ids(folder / "train.txt", train)
    write_ids(folder / "val.txt", val)


def convert_mats(source, ids, name, target, workers):
    """The label map `name` of each <id>.mat, or its field Segmentation, -> <id>.png, as stored,
    unless that exists.
    """
    from scipy.io import loadmat  # only when needed: it takes a second to import

    def convert(i):
        file = source / f"{i}.mat"
        if not (target / f"{i}.png").exists():
            with naming(file):
                values = loadmat(file, variable_names=[name])[name]
                values = values["Segmentation"][0, 0] if values.dtype.names else values
                if values.dtype.kind != "u":
                    raise TypeError(f"{name} is of {values.dtype}")
                save(values, target / f"{i}.png")

    list(parallel(convert, ids, workers, f"convert {name}"))


def save(values, file, format="PNG", **options):
    with atomic_write(file) as temporary:
        Image.fromarray(values).save(temporary, format, **options)


def decode_runs(segmentation):
    """COCO's run-length mask, {"size": [h, w], "counts": list or compressed text} -> bool [h, w].

    The runs go down the columns, background first. Raises ValueError for runs that do not make up
    the image.
    """
    height, width = segmentation["size"]
    counts = segmentation["counts"]
    if isinstance(counts, str):
        counts = decompress(counts)
    if sum(counts) != height * width:
        raise ValueError("run lengths that do not add up to the image")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def decompress(text):
    """COCO's compressed run lengths: 5 bits a character from 48 on, low bits first; the 6th bit
    says that more follow; two's complement; from the third on, differences to the run before the
    last.
    """
    runs = []
    value = shift = 0
    for character in text.encode("ascii"):
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) and 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def pascal_context(folder, workers):
    """`trainval_merged.json` -> `labels/<id>.png`, 16-bit category ids painted in the file's order,
    and the lists. Raises UserError for a file that contains something else.
    """
    file = folder / "trainval_merged.json"
    annotations = defaultdict(list)

    def convert(image):
        target = folder / "labels" / f"{Path(image['file_name']).stem}.png"
        if not target.exists():
            values = np.zeros((image["height"], image["width"]), np.uint16)
            for annotation in annotations[int(image["image_id"])]:
                values[decode_runs(annotation["segmentation"])] = annotation["category_id"]
            save(values, target)
        return target.stem

    with naming(file):
        content = json.loads(file.read_bytes())
        for annotation in content["annos_segmentation"]:
            annotations[int(annotation["image_id"])].append(annotation)
        for split in ("train", "val"):
            images = [image for image in content["images"] if image["phase"] == split]
            ids = sorted(parallel(convert, images, workers, f"convert Context {split}"))
            if not ids:
                raise ValueError(f"no image of phase {split}")
            write_ids(folder / f"{split}.txt", ids)


def ade20k_full(folder, workers, train):
    """`images/ADE/**/<id>.jpg` and `<id>_seg.png` -> `images_detectron2/` and
    `annotations_detectron2/`, as MaskFormer does.

    Where both sides are longer than 512 the shorter one becomes 512: images bilinearly, label maps
    by nearest. The name of a file tells its split; `train`: convert the training images, too.
    """
    data = DATASETS["ade20k_full"]
    # From object indices, 256 * (red // 10) + green, to class ids.
    lut = np.full(65536, data.ignore, np.uint16)
    lut[data.objects] = np.arange(len(data.objects))

    def convert(file):
        jpeg = Path(file)
        split = "validation" if "_val_" in jpeg.stem else "training"
        target = folder / f"annotations_detectron2/{split}/{jpeg.stem}.tif"
        if target.exists():
            return
        segmentation = jpeg.with_name(f"{jpeg.stem}_seg.png")
        colours = np.array(read_image(segmentation), int)
        pixels = np.array(read_image(jpeg))
        values = lut[colours[..., 0] // 10 * 256 + colours[..., 1]]
        H, W = values.shape
        if pixels.shape != colours.shape:
            why = f"has {values.shape} pixels, its image {pixels.shape[:2]}"
            raise UserError(f"label map {segmentation}", why, "make the two the same size")
        if min(H, W) > 512:
            h, w = (round(side / min(H, W) * 512) for side in (H, W))
            pixels = resize(to_tensor(pixels), (h, w), antialias=False).permute(1, 2, 0).numpy()
            rows = np.arange(h) * H // h
            cols = np.arange(w) * W // w
            values = values[np.ix_(rows, cols)]
        save(pixels, folder / f"images_detectron2/{split}/{jpeg.stem}.jpg", "JPEG")
        save(values, target, "TIFF", compression="tiff_deflate")

    jpegs = fnmatch.filter(walk(folder / "images"), "*.jpg" if train else "*_val_*.jpg")
    list(parallel(convert, jpegs, workers, "convert ADE20K"))
