"""The data sets: one table of what differs between them, and their files.

Official label files are read as they are, through a look-up table from label values to class ids.
For training, the table maps unseen classes to the ignore value.
"""

import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from zsseg.config import DataConfig
from zsseg.files import decode, split_lines, walk
from zsseg.images import IMAGE_LIKE, image_endings
from zsseg.tokenizer import check_names
from zsseg.utils import (
    UserError,
    did_you_mean,
    did_you_mean_file,
    first_of,
    left_out,
    print_once,
    several,
)


class MissingSplit(UserError):
    """A split has no files and no list."""


@dataclass(frozen=True)
class Archive:
    """An official file: where it is downloaded from, what is unpacked of it."""

    file: str
    # (folder or file in the archive, path below the data set's folder).
    take: list[tuple[str, str]]
    # Tried in order; without any the user has to register.
    urls: list[str] = field(default_factory=list)
    bytes: int = 0  # 0: not published
    checksum: str = ""  # "sha256:..." or "sha1:..."; "": not published


@dataclass(frozen=True)
class DataSet:
    """One row of the table `datasets.toml`. Class ids are 0, 1, ...; `ignore` is not a class."""

    name: str
    names: list[str]
    folders: list[str]  # below the data root; the first that exists is used
    images: str  # below the folder, with {split} and {id}; an id may contain sub-folders
    labels: list[str]  # the same; the first file that exists is used
    splits: dict[str, str]  # name of a split -> its folder's name
    values: list[int]  # the label value of each class
    unseen: list[str] = field(default_factory=list)
    lists: bool = False  # ids are listed in <split>.txt; else all pairs of files are used
    bits: int = 8  # of a label value; 16-bit data sets may have 8-bit files
    ignore: int = 255
    counts: dict[str, int] = field(default_factory=dict)  # images of each split, as published
    # SHA-256 of a split's sorted ids, one a line.
    digests: dict[str, str] = field(default_factory=dict)
    objects: list[int] = field(default_factory=list)  # ADE20K-847: object index of each class
    archives: list[Archive] = field(default_factory=list)
    register: str = ""  # what to do where nothing may be downloaded

    @property
    def seen(self) -> list[int]:
        """Ids of the seen classes; empty without a seen/unseen split."""
        return [i for i, n in enumerate(self.names) if n not in self.unseen] if self.unseen else []

    @property
    def trained(self) -> list[int]:
        """Ids of the classes that are trained on: the seen ones, or all without such a split."""
        return self.seen or list(range(len(self.names)))

    @property
    def training_names(self) -> list[str]:
        return [self.names[i] for i in self.trained]

    def lut(self, training: bool = False) -> np.ndarray:
        """Label value -> class id: uint8 or int32 [2**bits]. For training: -> index in `trained`,
        with unseen classes as `ignore`.
        """
        table = np.full(2**self.bits, self.ignore, np.uint8 if self.ignore < 256 else np.int32)
        ids = self.trained if training else range(len(self.names))
        table[[self.values[i] for i in ids]] = np.arange(len(ids))
        return table

    def folder(self, root: Path) -> Path:
        """The first of `folders` that is not empty."""
        folders = [root / name for name in self.folders]
        return next((f for f in folders if any(f.glob("[!.]*"))), folders[0])

    def listing(self, folder: Path, split: str) -> "Listing":
        """The files of a split, as its list names them or as they match the patterns."""
        return self.read_list(folder, split) if self.lists else self.match_files(folder, split)

    def read_list(self, folder: Path, split: str) -> "Listing":
        """The files of the ids in <split>.txt, if there is one. Raises UserError for a list that
        cannot be read or does not contain ids.
        """
        file = folder / f"{split}.txt"
        pairs = []
        ids = read_lines(file) if file.exists() else []
        for i, line in enumerate(ids):
            image = folder / self.images.format(id=line)
            if not image.exists():  # an id may begin or end with a space, but rarely does
                ids[i] = line.strip()
                image = folder / self.images.format(id=ids[i])
                if not image.exists() and is_no_id(ids[i]):
                    raise UserError(
                        f"list {file}",
                        f"requires ids, one a line, not {ids[i][:100]!r}",
                        f"an id is what {{id}} stands for in {self.images}",
                    )
            labels = [folder / pattern.format(id=ids[i]) for pattern in self.labels]
            pairs.append((image, next((path for path in labels if path.exists()), labels[0])))

        duplicates = len(ids) - len({*ids})
        remark = f"{several(duplicates, 'duplicate line')} in {file.name}, counted twice"
        return Listing(pairs, remarks=[remark] if duplicates else [])

    def match_files(self, folder: Path, split: str) -> "Listing":
        """Files whose paths match the patterns; an image and a label map of one id are a pair."""
        hidden, duplicates = [], []
        images, unmatched = self.match(folder, split, self.images, hidden)
        labels, _ = self.match(folder, split, self.labels[0], hidden)

        # A file that matches both patterns is what it has a partner for: a.png and a_mask.png are
        # an image and its label map.
        num_images = Counter(images.values())
        num_labels = Counter(labels.values())
        for file in images.keys() & labels.keys():
            itself = images[file] == labels[file]
            if num_images[labels[file]] > itself:
                del images[file]
            elif num_labels[images[file]] > itself:
                del labels[file]

        image_of = by_id(images, duplicates)
        label_of = by_id(labels, duplicates)
        both = sorted(image_of.keys() & label_of.keys())
        return Listing(
            [(image_of[i], label_of[i]) for i in both],
            sorted({(image_of | label_of)[i] for i in image_of.keys() ^ label_of.keys()}),
            duplicates,
            [file for file in unmatched if file not in labels and self.name == "folder"],
            hidden,
            (len(images), len(labels)),
        )

    def match(
        self, folder: Path, split: str, pattern: str, hidden: list[str]
    ) -> tuple[dict[str, str], list[str]]:
        """({file: id} of those that match a pattern, files that look like images and do not)."""
        before, after = pattern.replace("{split}", self.splits.get(split, split)).split("{id}")
        base = os.path.join(folder / before, "")
        matched, unmatched = {}, []
        for file in walk(base, hidden=hidden) if os.path.isdir(base) else ():
            name = file.removeprefix(base)
            ending = os.path.splitext(name)[1]
            is_image = ending.lower() in image_endings()
            suffix = ending if after == ".*" else after
            if name.endswith(suffix) and name != suffix and (is_image or after != ".*"):
                matched[file] = name.removesuffix(suffix)
            elif is_image or ending.lower() in IMAGE_LIKE:
                unmatched.append(file)
        return matched, unmatched


@dataclass
class Listing:
    """The files of a split."""

    pairs: list[tuple[Path, Path]]  # (image, label map), as listed or sorted by id
    # Without a partner; a listed file that does not exist is an error instead.
    unpaired: list[Path] = field(default_factory=list)
    duplicates: list[UserError] = field(default_factory=list)  # second files of an id
    # Files of the user's data set that look like images and match no pattern.
    unmatched: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)  # files and folders that begin with a dot
    counts: tuple[int, int] = (0, 0)  # images, label maps
    remarks: list[str] = field(default_factory=list)

    def left_out(self, split: str) -> list[str]:
        """What is not used of the files, a line each."""
        lines = []
        if self.unpaired:
            lines.append(f"{several(len(self.unpaired), 'file')} without a partner in {split}")
        if self.unmatched:
            what = several(len(self.unmatched), "file that matches", "files that match")
            where = f"neither data.images nor data.labels in {split}"
            lines.append(f"{what} {where} ({endings(self.unmatched)})")
        return lines


def is_no_id(line: str) -> bool:
    """Whether a line of a list rather is a file name, columns or another format."""
    words = line.split()
    return bool(
        re.search(r"""^[/#"'`[{]|[,\\]|["'`\]}]$|\s[-+]?[\d.]+$|/.*\s|\s.*/""", line)
        or any(os.path.splitext(word)[1].lower() in image_endings() for word in words)
    )


def by_id(files: dict[str, str], duplicates: list[UserError]) -> dict[str, Path]:
    """{file: id} -> {id: first file}; an error for each further one is added to `duplicates`."""
    first = {}
    for file, name in files.items():
        if name in first:
            duplicates.append(UserError(f"file {file}", f"has the id of {first[name]}", "keep one"))
        first.setdefault(name, Path(file))
    return first


def read_lines(file: Path) -> list[str]:
    """The lines of a list without the empty ones. Raises UserError."""
    try:
        lines = split_lines(decode(file.read_bytes()))
    except OSError as error:
        raise UserError(f"list {file}", f"cannot be read ({error})", "replace the file") from None
    return [line for line in lines if line.strip()]


def endings(files: Iterable[str]) -> str:
    """How file names end, the most frequent first: "3 .heic, 1 .dng"."""
    names = sorted(os.path.splitext(file)[1].lower() or "without an ending" for file in files)
    return first_of([f"{count} {ending}" for ending, count in Counter(names).most_common()], 5)


def read_table(file: Path) -> dict[str, DataSet]:
    rows = tomllib.loads(file.read_text(encoding="utf-8"))
    for row in rows.values():
        row.setdefault("values", list(range(len(row["names"]))))
        row["archives"] = [Archive(**archive) for archive in row.get("archives", [])]
    return {name: DataSet(name, **row) for name, row in rows.items()}


DATASETS = read_table(Path(__file__).parent / "datasets.toml")


def dataset(name_or_config: str | DataConfig) -> DataSet:
    """A row of the table, or the data set that a configuration describes ("folder")."""
    config = None if isinstance(name_or_config, str) else name_or_config
    name = config.name if config else name_or_config
    if config and name == "folder":
        return own_dataset(config)
    if name not in DATASETS:
        names = [*DATASETS, "folder"]
        todo = did_you_mean(name, names, f"choose one of {', '.join(names)}")
        raise UserError("data.name", f"is {name!r}", todo)
    return DATASETS[name]


def own_dataset(config: DataConfig) -> DataSet:
    """The user's own data set; UserError where its description cannot be right."""
    classes = config.classes
    values = config.values or list(range(len(classes)))
    for name in config.unseen:
        if name not in classes:
            todo = did_you_mean(name, classes, "give some of data.classes")
            raise UserError("data.unseen", f"{name!r} is not one of data.classes", todo)
    for key, items in (("classes", classes), ("unseen", config.unseen), ("values", values)):
        for item, count in Counter(items).items():
            if count > 1:
                raise UserError(f"data.{key}", f"{item!r} is given twice", "name each once")
    check_names(classes)

    lists = "{split}" not in config.images
    same_split = lists == ("{split}" not in config.labels)
    rules = [
        ("images", is_pattern(config.images), 'write e.g. "images/{split}/{id}.jpg"'),
        (
            "labels",
            is_pattern(config.labels) and same_split and config.labels != config.images,
            'write e.g. "masks/{split}/{id}.png", with {split} as in data.images',
        ),
        ("classes", classes, "name every class"),
        ("unseen", len(config.unseen) < len(classes), "give some of data.classes, not all"),
        (
            "values",
            len(values) == len(classes) and all(0 <= value < 2**16 for value in values),
            f"give each of the {len(classes)} classes a value of its own, from 0 to 65535",
        ),
    ]
    for key, valid, todo in rules:
        if not valid:
            given = getattr(config, key)
            why = f"is {given}" if given else "is missing (data.name is folder)"
            raise UserError(f"data.{key}", why, todo)
    return DataSet(
        name="folder",
        names=classes,
        folders=[config.folder or "."],
        images=config.images,
        labels=[config.labels],
        splits={split: split for split in ("train", "val", "test", config.split)},
        values=values,
        unseen=config.unseen,
        lists=lists,
        bits=16,
        ignore=255 if len(classes) <= 255 else 65535,
    )


def is_pattern(path: str) -> bool:
    """Whether {id} is in it once, after a slash; lists (without {split}) need an ending, too."""
    before, *after = path.split("{id}")
    any_ending = path.endswith(".*") and "{split}" not in path
    return len(after) == 1 and before[-1:] in ("", "/") and not any_ending


def training_set(config: DataConfig) -> DataSet:
    """The data set as training sees it: with `train_on = "all"` no class is unseen."""
    data = dataset(config)
    return replace(data, unseen=[]) if config.train_on == "all" else data


def find_listing(name_or_config: str | DataConfig, root: Path, split: str) -> Listing:
    """The files of a split; UserError where there are none."""
    data = dataset(name_or_config)
    if split not in data.splits:
        todo = f"{data.name} has {', '.join(data.splits)}: --set data.split=..."
        raise MissingSplit("data.split", f"is {split!r}", todo)
    folder = data.folder(root)
    listing = data.listing(folder, split)
    if not listing.pairs:
        raise no_pairs(data, folder, split, listing)
    return listing


def find_pairs(name_or_config: str | DataConfig, root: Path, split: str) -> list[tuple[Path, Path]]:
    """The (image, label map) files of a split; what is left out is said at the command's end.

    UserError where there are none, or where two have the same id.
    """
    listing = find_listing(name_or_config, root, split)
    for line in listing.left_out(split):
        left_out(line)
    for line in listing.remarks:
        print_once(f"look at: {line}")
    if listing.duplicates:
        raise listing.duplicates[0]
    return listing.pairs


def no_pairs(data: DataSet, folder: Path, split: str, listing: Listing) -> UserError:
    """What is wrong with a data set of which a split has no pair of files."""
    if data.name != "folder":
        train = " --train" if split == "train" and data.name != "shapes" else ""
        todo = f"run prepare_data.py {data.name}{train}, or give --root"
        return MissingSplit(f"data set {data.name}", f"no {split!r} images in {folder}", todo)
    if not folder.is_dir():
        todo = did_you_mean_file(folder, "correct it, or give --root")
        return UserError("data.folder", f"no such folder {folder}", todo)
    if data.lists:
        why = f"names no {split!r} image, or does not exist"
        return MissingSplit(f"list {folder / split}.txt", why, "write one id a line")

    num_images, num_labels = listing.counts
    if num_images and num_labels:
        why = f"no {split!r} label map has the id of an image"
        return UserError("data.labels", why, "see data.images and data.labels")
    key = "labels" if num_images else "images"
    pattern = data.labels[0] if num_images else data.images
    path = folder / pattern.replace("{split}", split).replace("{id}", "*")
    error = UserError if num_images or num_labels else MissingSplit
    todo = "correct it, or data.folder, or give --root"
    return error(f"data.{key}", f"no {split!r} file is {path}", todo)


def has_split(name_or_config: str | DataConfig, root: Path, split: str) -> bool:
    try:
        find_pairs(name_or_config, root, split)
    except MissingSplit:
        return False
    return True
