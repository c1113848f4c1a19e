"""The data sets: one table of what differs between them, and their files.

Official label files are read as they are, through a look-up table from label values to class ids.
For training, the table maps unseen classes to the ignore value.
"""

import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from zsseg.images import is_image_name
from zsseg.tokenizer import check_names
from zsseg.utils import (
    UserError,
    did_you_mean,
    no_such_file,
    plural,
    read_table,
    read_text,
    split_lines,
    walk,
    warn,
)

# {id} once, at the beginning or after a slash, and no brace but those of {split}
PATTERN = re.compile(r"(([^{}]|\{split\})*/)?\{id\}([^{}]|\{split\})*")


class MissingSplit(UserError):
    """A split has no files and no list."""


@dataclass(frozen=True)
class Archive:
    """An official file: where it is downloaded from, what is unpacked of it."""

    file: str
    # (folder or file in the archive, path below the data set's folder)
    take: list[tuple[str, str]]
    # Tried in order; without any the user has to register.
    urls: list[str] = field(default_factory=list)
    checksum: str = ""  # "sha256:..." or "sha1:..."; "": not published


@dataclass(frozen=True)
class DataSet:
    """One row of the table `datasets.toml`. Class ids are 0, 1, ...; `ignore` is not a class."""

    name: str
    names: list[str]
    folders: list[str]  # below the data root; the first that holds a split's files is used
    images: str  # below the folder, with {split} and {id}; an id may contain sub-folders
    labels: list[str]  # the same; the first file that exists is used
    splits: dict[str, str]  # name of a split -> its folder's name
    values: list[int]  # the label value of each class
    unseen: list[str] = field(default_factory=list)
    lists: bool = False  # ids are listed in <split>.txt; else all pairs of files are used
    bits: int = 8  # of a label value; 16-bit data sets may have 8-bit files
    ignore: int = 255
    counts: dict[str, int] = field(default_factory=dict)  # images of each split, as published
    objects: list[int] = field(default_factory=list)  # ADE20K-847: object index of each class
    archives: list[Archive] = field(default_factory=list)
    register: str = ""  # what to do where nothing may be downloaded

    @property
    def trained(self):
        """Ids of the classes that targets show: all but the unseen ones. What a run is trained on
        says its `training_set`.
        """
        return [i for i, name in enumerate(self.names) if name not in self.unseen]

    @property
    def seen(self):
        """Ids of the seen classes; empty without a seen/unseen split."""
        return self.trained if self.unseen else []

    @property
    def training_names(self):
        return [self.names[i] for i in self.trained]

    def lut(self, training=False):
        """Label value -> class id: uint8 or int32 [2**bits]. For training: -> index in `trained`,
        with unseen classes as `ignore`.
        """
        table = np.full(2**self.bits, self.ignore, np.uint8 if self.ignore < 256 else np.int32)
        ids = self.trained if training else range(len(self.names))
        table[[self.values[i] for i in ids]] = np.arange(len(ids))
        return table

    def read_list(self, folder, split):
        """The files of the ids in <split>.txt, if it exists: each once, which is said, however
        often and in whatever spelling it is listed. Raises UserError for a list that contains
        something else.
        """
        file = folder / f"{split}.txt"
        counts = Counter(map(os.path.normpath, listed_ids(file)))
        if twice := [name for name, count in counts.items() if count > 1]:
            warn(
                f"list {file} names {plural(len(twice), 'image')} more than once,"
                f" e.g. {twice[0]}; each counts once"
            )
        pairs = []
        for name in counts:
            image = folder / self.images.replace("{id}", name)
            if not (re.fullmatch(r"[\w/-]+", name) or image.exists()):
                todo = f"write what {{id}} stands for in {self.images}, one a line"
                raise UserError(f"list {file}", f"{name[:100]!r} is no id: no {image}", todo)
            labels = [folder / pattern.replace("{id}", name) for pattern in self.labels]
            pairs.append((image, next(filter(Path.exists, labels), labels[0])))
        return pairs

    def match(self, folder, split, pattern):
        """{id: file} of those that match a pattern. Raises UserError for two files of an id."""
        before, after = pattern.replace("{split}", self.splits[split]).split("{id}")
        base = f"{folder / before}/"
        matched = {}
        for file in walk(base):
            any_image = after == ".*" and is_image_name(file)
            suffix = os.path.splitext(file)[1] if any_image else after
            name = file.removeprefix(base).removesuffix(suffix)
            if name in matched:
                raise UserError(f"file {file}", f"has the id of {matched[name]}", "keep one")
            if name and file.endswith(suffix):
                matched[name] = Path(file)
        return matched


@dataclass
class Listing:
    """The files of a split."""

    folder: Path  # of the data set
    pairs: list[tuple[Path, Path]]  # (image, label map), as listed, or sorted by id
    unpaired: list[Path]  # files without a partner
    missing: list[Path]  # listed files that do not exist


def read_ids(file):
    """The lines of a list but the empty ones. Raises UserError."""
    lines = split_lines(read_text(file, f"list {file}", "replace the file"))
    return [line.strip() for line in lines if line.strip()]


def listed_ids(file):
    """`read_ids`, none if there is no list."""
    return read_ids(file) if file.exists() else []


DATASETS = {}
for name, row in read_table("datasets.toml").items():
    row.setdefault("values", list(range(len(row["names"]))))
    row["archives"] = [Archive(**archive) for archive in row.get("archives", [])]
    DATASETS[name] = DataSet(name, **row)


def dataset(name_or_config):
    """A row of the table, or the data set that a configuration describes ("folder")."""
    name = getattr(name_or_config, "name", name_or_config)
    if name == "folder":
        return own_dataset(name_or_config)
    if name not in DATASETS:
        names = [*DATASETS, "folder"]
        todo = did_you_mean(name, names, f"choose one of {', '.join(names)}")
        raise UserError("data.name", f"is {name!r}", todo)
    return DATASETS[name]


def own_dataset(config):
    """The user's own data set; UserError if its description cannot be right."""
    classes = config.classes
    values = config.values or list(range(len(classes)))
    lists = "{split}" not in config.images
    stray = "".join({*config.unseen} - {*classes})
    some = did_you_mean(stray, classes, "give some of data.classes, not all, in a list")
    ids = f"give each of the {len(classes)} classes its own value, from 0 to 65535"
    unique = {*values} & {*range(2**16)}
    rules = (
        ("images", PATTERN.fullmatch(config.images), 'write e.g. "images/{split}/{id}.jpg"'),
        ("labels", PATTERN.fullmatch(config.labels), 'write e.g. "masks/{split}/{id}.png"'),
        ("labels", lists == ("{split}" not in config.labels), "write {split} as in data.images"),
        ("classes", classes, "name every class"),
        ("unseen", not isinstance(config.unseen, str) and {*config.unseen} < {*classes}, some),
        ("values", len(unique) == len(values) == len(classes), ids),
    )
    for key, valid, todo in rules:
        if not valid:
            missing = "missing (data.name is folder, which --config describes)"
            raise UserError(f"data.{key}", f"is {getattr(config, key) or missing}", todo)
    check_names(classes)
    return DataSet(
        name="folder",
        names=classes,
        folders=[config.folder],
        images=config.images,
        labels=[config.labels],
        splits={split: split for split in ("train", "val", "test", config.split)},
        values=values,
        unseen=config.unseen,
        lists=lists,
        bits=16,
        ignore=255 if len(classes) <= 255 else 65535,
    )


def training_set(config):
    """The data set as training sees it: with `train_on = "all"` no class is unseen."""
    data = dataset(config)
    return replace(data, unseen=[]) if config.train_on == "all" else data


def find_listing(name_or_config, root, split):
    """The files of a split, of the folder that lacks the fewest. Raises UserError if none holds any
    or lists any.
    """
    data = dataset(name_or_config)
    if split not in data.splits:
        todo = f"{data.name} has {', '.join(data.splits)}: --set data.split=..."
        raise MissingSplit("data.split", f"is {split!r}", todo)
    found = []
    for folder in (root / name for name in data.folders):
        images = labels = {}
        if data.lists:
            pairs = data.read_list(folder, split)
        else:
            images = data.match(folder, split, data.images)
            labels = data.match(folder, split, data.labels[0])
            pairs = [(images[i], labels[i]) for i in sorted(images.keys() & labels.keys())]
        files = images | labels
        unpaired = sorted(files[i] for i in images.keys() ^ labels.keys())
        missing = [file for pair in pairs for file in pair if data.lists and not file.exists()]
        found.append(Listing(folder, pairs, unpaired, missing))
    best = min(found, key=lambda f: (not f.pairs, len(f.missing), -len(f.pairs)))
    if best.pairs:
        return best
    if data.name != "folder":
        train = " --train" if split == "train" else ""
        todo = f"run prepare_data.py {data.name}{train}, or give another data root"
        raise MissingSplit(f"data set {data.name}", f"no {split!r} images in {root}", todo)
    if not folder.is_dir():
        raise no_such_file("data.folder", folder, "correct it, or give another data root")
    # The split may be there by another name.
    beside = {path.name for path in (folder / data.images.partition("{split}")[0]).glob("*")}
    near = did_you_mean(split, beside - {split}, "")
    todo = f"{near} correct data.images, data.labels or data.split, or give another data root"
    listed = f"{split}.txt" if data.lists else split
    why = f"no pair of files {data.images} and {data.labels[0]} in {folder} for {listed}"
    error = UserError if unpaired else MissingSplit
    raise error("data.images", why, todo)


def find_pairs(name_or_config, root, split):
    """The (image, label map) files of a split; says how many files are left out. Raises UserError
    if it has none.
    """
    listing = find_listing(name_or_config, root, split)
    if left := listing.unpaired:
        warn(f"left out: {plural(len(left), 'file')} without a partner in {split}, e.g. {left[0]}")
    return listing.pairs
