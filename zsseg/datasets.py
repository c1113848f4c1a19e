"""The data sets: one table of what differs between them, their files, and what is in their label maps.

Official label files are read as they are; a look-up table turns their values into class ids when they are read. What the
segmenter must not see becomes the ignore value right there.
"""

import contextlib
import functools
import hashlib
import os
import tomllib
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from zsseg.config import DataConfig
from zsseg.run import UserError, cache_dir, nearest, nearest_file, parallel, replacing

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `read_picture` has limits of its own


class Absent(UserError):
    """There is nothing of a split: no file, no list."""


@dataclass(frozen=True)
class Archive:
    """An official file: where it is downloaded, how it is recognised, which of its folders go where."""
    file: str
    take: list[tuple[str, str]]  # (folder or file in the archive, its place below the data set's folder)
    urls: list[str] = field(default_factory=list)  # the first that answers; none: registration is needed
    bytes: int = 0  # 0: not published
    checksum: str = ""  # "sha256:..." or "sha1:..."; "": not published


@dataclass(frozen=True)
class DataSet:
    """One row of the table, `datasets.toml`. Class ids run from 0; `ignore` is no class."""
    name: str
    names: list[str]
    folders: list[str]  # below the data root; the first that exists is used
    pictures: str  # below the folder; {split} and {id} are filled in, an id may hold a sub-folder
    labels: list[str]  # the same; of several, the first file that exists
    splits: dict[str, str]  # our name of a split -> its folder's name
    values: list[int]  # the label value of each class
    unseen: list[str] = field(default_factory=list)
    lists: bool = False  # ids stand in <split>.txt; else every label map that has a picture counts
    bits: int = 8  # of a label value; 16-bit data sets may hold 8-bit files
    ignore: int = 255
    counts: dict[str, int] = field(default_factory=dict)  # pictures of each split, as published
    digests: dict[str, str] = field(default_factory=dict)  # SHA-256 of a split's sorted ids, one a line
    objects: list[int] = field(default_factory=list)  # ADE20K-847: object index of each class
    archives: list[Archive] = field(default_factory=list)
    register: str = ""  # what to do where nothing may be downloaded

    @property
    def seen(self) -> list[int]:
        """Ids of the classes that are trained on; none where there is no seen/unseen split."""
        return [i for i, n in enumerate(self.names) if n not in self.unseen] if self.unseen else []

    @property
    def trained(self) -> list[int]:
        """Ids of the classes that are trained on: the seen ones, or all where there is no such split."""
        return self.seen or list(range(len(self.names)))

    @property
    def training_names(self) -> list[str]:
        return [self.names[i] for i in self.trained]

    def lut(self, training: bool = False) -> np.ndarray:
        """Label value -> class id [2**bits]; in training -> index among the seen classes, unseen ones -> `ignore`."""
        table = np.full(2**self.bits, self.ignore, np.uint8 if self.ignore < 256 else np.int32)
        ids = self.trained if training else range(len(self.names))
        table[[self.values[i] for i in ids]] = np.arange(len(ids))
        return table

    def folder(self, root: Path) -> Path:
        """The first of `folders` that holds anything."""
        return next((root / f for f in self.folders if any((root / f).glob("[!.]*"))), root / self.folders[0])

    def found(self, folder: Path, split: str) -> tuple[dict[str, Path], dict[str, Path]]:
        """The pictures and the label maps of a split that are there, by id."""
        files, known = [], picture_endings()
        for pattern in (self.pictures, self.labels[0]):
            before, after = pattern.replace("{split}", self.splits.get(split, split)).split("{id}")
            names = {}
            for parent, _, found in os.walk(folder / before, followlinks=True):
                below = Path(parent).relative_to(folder / before)
                for f in found:
                    if f.startswith(".") or not (Path(f).suffix.lower() in known if after == ".*" else f.endswith(after)):
                        continue
                    name = (below / (Path(f).stem if after == ".*" else f.removesuffix(after))).as_posix()
                    if name in names:
                        raise UserError(f"file {Path(parent, f)}", f"has the id of {names[name]}", "keep one")
                    names[name] = Path(parent, f)
            files.append(names)
        return files[0], files[1]

    def pairs(self, folder: Path, split: str) -> list[tuple[Path, Path]]:
        """The (picture, label map) files of a split, sorted by id as listed or found. Raises OSError without a list."""
        if not self.lists:
            pictures, labels = self.found(folder, split)
            return [(pictures[i], labels[i]) for i in sorted(pictures.keys() & labels.keys())]
        pairs = []
        lines = (folder / f"{split}.txt").read_text("utf-8-sig").splitlines()
        for name in filter(None, map(str.strip, lines)):
            labels = [folder / pattern.format(id=name) for pattern in self.labels]
            pairs.append((folder / self.pictures.format(id=name), next((p for p in labels if p.exists()), labels[0])))
        return pairs

    def unpaired(self, folder: Path, split: str) -> list[Path]:
        """Files of a split that are there on one side only. A listed file that is missing is an error when it is read."""
        if self.lists:
            return []
        pictures, labels = self.found(folder, split)
        return sorted(pictures.get(i, labels.get(i)) for i in pictures.keys() ^ labels.keys())


def read_table(file: Path) -> dict[str, DataSet]:
    rows = tomllib.loads(file.read_text(encoding="utf-8"))
    for row in rows.values():
        row.setdefault("values", list(range(len(row["names"]))))
        row["archives"] = [Archive(**archive) for archive in row.get("archives", [])]
    return {name: DataSet(name, **row) for name, row in rows.items()}


DATASETS = read_table(Path(__file__).parent / "datasets.toml")


def dataset(wanted: str | DataConfig) -> DataSet:
    """A row of the table, by its name or as a configuration wants it, which may also describe a data set of its own."""
    name = wanted if isinstance(wanted, str) else wanted.name
    if name == "folder" and isinstance(wanted, DataConfig):
        return own_dataset(wanted)
    if name not in DATASETS:
        known = [*DATASETS, "folder"]
        raise UserError("data.name", f"is {name!r}", nearest(name, known, f"choose one of {', '.join(known)}"))
    return DATASETS[name]


def own_dataset(config: DataConfig) -> DataSet:
    """The user's own data set; UserError where its description cannot be right."""
    values = config.values or list(range(len(config.classes)))
    for name in config.unseen:
        if name not in config.classes:
            todo = nearest(name, config.classes, "give some of data.classes")
            raise UserError("data.unseen", f"{name!r} is none of data.classes", todo)
    for key, items in (("classes", config.classes), ("unseen", config.unseen), ("values", values)):
        for item, count in Counter(items).items():
            if count > 1:
                raise UserError(f"data.{key}", f"{item!r} stands twice", "name each once")
    lists = "{split}" not in config.pictures
    rules = {
        "data.pictures": (config.pictures.count("{id}") == 1 and not (lists and config.pictures.endswith(".*"))
                          and config.pictures.split("{id}")[0][-1:] in ("", "/"),
                          'write e.g. "images/{split}/{id}.jpg"'),
        "data.labels": (config.labels.count("{id}") == 1 and lists == ("{split}" not in config.labels)
                        and config.labels.split("{id}")[0][-1:] in ("", "/"),
                        'write e.g. "masks/{split}/{id}.png", with {split} as in data.pictures'),
        "data.classes": (len(config.classes) > 0, "name every class"),
        "data.unseen": (len(config.unseen) < len(config.classes), "give some of data.classes, not all"),
        "data.values": (len(values) == len(config.classes) and all(0 <= value < 2**16 for value in values),
                        f"give each of the {len(config.classes)} classes a value of its own, from 0 to 65535"),
    }  # fmt: skip
    for name, (right, todo) in rules.items():
        if not right:
            given = getattr(config, name.removeprefix("data."))
            raise UserError(name, f"is {given}" if given else "is missing (data.name is folder)", todo)
    splits = {split: split for split in ("train", "val", "test", config.split)}
    ignore = 255 if len(config.classes) <= 255 else 65535
    return DataSet("folder", config.classes, [config.folder or "."], config.pictures, [config.labels], splits, values,
                   config.unseen, lists, 16, ignore)  # fmt: skip


def training_set(config: DataConfig) -> DataSet:
    """The data set as training sees it: with `train_on = "all"` no class is unseen."""
    data = dataset(config)
    return replace(data, unseen=[]) if config.train_on == "all" else data


def find_pairs(wanted: str | DataConfig, root: Path, split: str) -> list[tuple[Path, Path]]:
    """The (picture, label map) files of a split; UserError where there are none."""
    data = dataset(wanted)
    if split not in data.splits:
        raise Absent("data.split", f"is {split!r}", f"{data.name} has {', '.join(data.splits)}: --set data.split=...")
    folder = data.folder(root)
    try:
        pairs = data.pairs(folder, split)
    except FileNotFoundError:
        pairs = []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"list {folder / split}.txt", f"cannot be read ({error})", "replace the file") from None
    if not pairs and data.name == "folder":
        raise nothing_found(data, folder, split)
    if not pairs:
        command = f"run prepare_data.py {data.name}" + " --train" * (split == "train" and data.name != "shapes")
        raise Absent(f"data set {data.name}", f"no {split!r} pictures in {folder}", f"{command}, or give --root")
    return pairs


def nothing_found(data: DataSet, folder: Path, split: str) -> UserError:
    """What is wrong with a data set of the user's own of which a split has no pair of files."""
    if not folder.is_dir():
        return UserError("data.folder", f"no such folder {folder}", nearest_file(folder, "correct it, or give --root"))
    if data.lists:
        return Absent(f"list {folder / split}.txt", f"names no {split!r} picture, or is not there", "write one id a line")
    counts, pattern = [len(files) for files in data.found(folder, split)], (data.pictures, data.labels[0])
    key, i = ("data.labels", 1) if counts[0] and not counts[1] else ("data.pictures", 0)
    if all(counts):
        return UserError("data.labels", f"no {split!r} label map has the id of a picture", "see data.pictures and data.labels")
    place = folder / pattern[i].replace("{split}", split).replace("{id}", "*")
    kind = UserError if any(counts) else Absent
    return kind(key, f"no {split!r} file is {place}", "correct it, or data.folder, or give --root")


def has_split(wanted: str | DataConfig, root: Path, split: str) -> bool:
    try:
        find_pairs(wanted, root, split)
    except Absent:
        return False
    return True


@functools.cache
def picture_endings() -> set[str]:
    """Of the files that Pillow reads as pictures, without those that need another program."""
    Image.init()
    others = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
    return {ending for ending, kind in Image.EXTENSION.items() if kind in Image.OPEN and kind not in others}


def read_picture(file: Path, mode: str | None = "RGB", what: str = "picture", shown: bool = False) -> Image.Image:
    """A picture, whole and in `mode` (None: as it is), never turned (label maps are not turned either).

    With `shown`, as a viewer would show it: turned as its camera says, transparent parts on white, 16 bits brought to 8.
    A missing or broken file is a UserError that names it.
    """
    try:
        with Image.open(file) as image:
            if not shown and image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow itself refuses twice as many
                raise ValueError(f"{image.width} x {image.height} is more than {Image.MAX_IMAGE_PIXELS} pixels")
            if image.format == "EPS":
                raise ValueError("PostScript is a program, and is not run")
            image.load()
            if shown:
                image = as_shown(image)
            if mode and image.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits a channel")
            return image.convert(mode) if mode else image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{what} {file}", f"cannot be read ({error})", "replace the file") from None


def as_shown(image: Image.Image) -> Image.Image:
    """See `read_picture`."""
    with contextlib.suppress(Exception):  # where the camera's notes are broken, nothing is turned
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def read_values(file: Path, bits: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """The label values [H, W] of a map, uint8 or uint16. `size`: its picture's (width, height). Raises UserError."""
    values = np.array(read_picture(file, None, "label map"))
    if values.dtype == bool:  # a 1-bit picture
        values = values.astype(np.uint8)
    if bits == 16 and values.dtype == np.int32 and values.size and 0 <= values.min() <= values.max() < 65536:
        values = values.astype(np.uint16)  # how Pillow opens some 16-bit files
    if values.ndim != 2 or values.dtype not in ((np.uint8,) if bits == 8 else (np.uint8, np.uint16)):
        found = f"has {values.shape[2]} channels" if values.ndim == 3 else f"holds values of type {values.dtype}"
        raise UserError(f"label map {file}", found, f"write one channel of {'8' if bits == 8 else '8 or 16'} bits")
    if size and values.shape[::-1] != size:
        sizes = f"is {values.shape[1]} x {values.shape[0]}, its picture {size[0]} x {size[1]}"
        raise UserError(f"label map {file}", sizes, "make the two the same size")
    return values


def read_labels(file: Path, lut: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label map through `lut`: [H, W] of the table's type; `size` is its picture's (width, height)."""
    return lut[read_values(file, 8 if len(lut) == 256 else 16, size)]


@dataclass
class LabelStatistics:
    """Which classes are in which picture of a split, by pixels. Row C of the classes is the ignore value."""
    image: np.ndarray  # int32, one entry for each class of each picture
    category: np.ndarray  # int32, 0..C
    pixels: np.ndarray  # int64
    broken: np.ndarray  # a line for each label map that cannot be read, which counts as empty

    def histogram(self, classes: int) -> np.ndarray:
        """Pixels of each class and, last, of the ignore value: int64 [classes + 1]."""
        histogram = np.zeros(classes + 1, np.int64)
        np.add.at(histogram, self.category, self.pixels)
        return histogram

    def pictures_with(self, categories: list[int]) -> np.ndarray:
        """Indices of the pictures that show at least one of the classes."""
        return np.unique(self.image[np.isin(self.category, categories)])


def count_classes(file: Path, data: DataSet, tables: tuple[np.ndarray, ...], size: tuple | None = None) -> np.ndarray:
    """(class, pixels) rows of one label map, int64 [n, 2]; `tables` are the data set's for evaluation and training.

    Raises AssertionError where the training table would let an unseen class through, UserError for a bad file.
    """
    full, training = tables
    values = read_values(file, data.bits, size)
    pixels = np.bincount(values.ravel())
    there = pixels.nonzero()[0]
    ids, trained = full[there].astype(np.int64), training[there]
    kept = trained != data.ignore
    hidden = [data.values[data.names.index(n)] for n in data.unseen]
    if np.isin(there[kept], hidden).any() or not np.array_equal(np.array(data.trained)[trained[kept]], ids[kept]):
        raise AssertionError(f"{file}: a pixel of an unseen class survived")
    ids[ids == data.ignore] = len(data.names)
    classes, index = np.unique(ids, return_inverse=True)
    return np.stack([classes, np.bincount(index, pixels[there], len(classes)).astype(np.int64)], 1)


def count_split(pairs: list, count: Callable, workers: int, name: str) -> LabelStatistics:
    """The statistics of (picture, label map) pairs by `count`, which gives a pair's rows as `count_classes` does.

    What it raises as UserError is listed, and the pair counts as empty.
    """
    broken = []

    def attempt(pair: tuple[Path, Path]) -> np.ndarray:
        try:
            return count(pair)
        except UserError as error:
            broken.append(str(error))
            return np.empty((0, 2), np.int64)

    rows = list(parallel(attempt, pairs, workers, name))
    table = np.concatenate([np.empty((0, 2), np.int64), *rows])
    image = np.repeat(np.arange(len(rows), dtype=np.int32), [len(r) for r in rows])
    return LabelStatistics(image, table[:, 0].astype(np.int32), table[:, 1], np.array(sorted(broken), str))


def label_statistics(wanted: str | DataConfig, root: Path, split: str, workers: int = 4) -> LabelStatistics:
    """The statistics of a split: from the cache while files and tables are the same, else counted now.

    The cache lies beside the data, below $ZSSEG_CACHE where that cannot be written.
    """
    data, pairs = dataset(wanted), find_pairs(wanted, root, split)
    tables, folder = (data.lut(), data.lut(training=True)), data.folder(root)
    version, changed = statistics_version(tables, folder, pairs)
    caches = folder / ".zsseg" / f"{split}.npz", cache_dir() / "statistics" / f"{version}.npz"
    for cache in caches:
        if cached := read_statistics(cache, version, changed):
            return cached
    statistics = count_split(pairs, lambda pair: count_classes(pair[1], data, tables), workers, f"count {data.name} {split}")
    for cache in caches if not len(statistics.broken) else ():  # what is broken today may be mended tomorrow
        try:
            with replacing(cache) as temporary, open(temporary, "wb") as file:
                np.savez(file, version=version, **vars(statistics))
            break
        except UserError:
            continue
    return statistics


def statistics_version(tables: tuple[np.ndarray, ...], folder: Path, pairs: list[tuple[Path, Path]]) -> tuple[str, int]:
    """A digest of the look-up tables and of every label map's name and size, and when the last of the maps changed."""
    digest, changed = hashlib.sha256(b"".join(table.tobytes() for table in tables)), 0
    for _, file in pairs:
        stat = file.stat() if file.exists() else None
        digest.update(f"{os.path.relpath(file, folder)} {stat and stat.st_size}\n".encode())
        changed = max(changed, stat.st_mtime_ns if stat else 0)
    return digest.hexdigest(), changed


def read_statistics(file: Path, version: str, changed: int) -> LabelStatistics | None:
    try:
        with np.load(file, allow_pickle=False) as content:
            if str(content["version"]) == version and file.stat().st_mtime_ns >= changed:
                return LabelStatistics(*(content[k] for k in ("image", "category", "pixels", "broken")))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # absent, from another version of the program, or broken: as good as none
    return None
