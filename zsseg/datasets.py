"""The data sets: one table of what differs between them, and their files.

Official label files are read as they are; a look-up table turns their values into class ids when
they are read. What the segmenter must not see becomes the ignore value right there.
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
from zsseg.utils import UserError, did_you_mean, did_you_mean_file, left_out, print_once, several


class MissingSplit(UserError):
    """There is nothing of a split: no file, no list."""


@dataclass(frozen=True)
class Archive:
    """An official file: where it is downloaded, how it is recognised, which of its folders go
    where.
    """

    file: str
    # (folder or file in the archive, its place below the data set's folder).
    take: list[tuple[str, str]]
    # The first that answers; none: registration is needed.
    urls: list[str] = field(default_factory=list)
    bytes: int = 0  # 0: not published
    checksum: str = ""  # "sha256:..." or "sha1:..."; "": not published


@dataclass(frozen=True)
class DataSet:
    """One row of the table, `datasets.toml`. Class ids run from 0; `ignore` is no class."""

    name: str
    names: list[str]
    folders: list[str]  # below the data root; the first that exists is used
    images: str  # below the folder; {split} and {id} are filled in, an id may hold a sub-folder
    labels: list[str]  # the same; of several, the first file that exists
    splits: dict[str, str]  # our name of a split -> its folder's name
    values: list[int]  # the label value of each class
    unseen: list[str] = field(default_factory=list)
    lists: bool = False  # ids stand in <split>.txt; else every label map that has an image counts
    bits: int = 8  # of a label value; 16-bit data sets may hold 8-bit files
    ignore: int = 255
    counts: dict[str, int] = field(default_factory=dict)  # images of each split, as published
    # SHA-256 of a split's sorted ids, one a line.
    digests: dict[str, str] = field(default_factory=dict)
    objects: list[int] = field(default_factory=list)  # ADE20K-847: object index of each class
    archives: list[Archive] = field(default_factory=list)
    register: str = ""  # what to do where nothing may be downloaded

    @property
    def seen(self) -> list[int]:
        """Ids of the classes that are trained on; none where there is no seen/unseen split."""
        return [i for i, n in enumerate(self.names) if n not in self.unseen] if self.unseen else []

    @property
    def trained(self) -> list[int]:
        """Ids of the classes that are trained on: the seen ones, or all where there is no such
        split.
        """
        return self.seen or list(range(len(self.names)))

    @property
    def training_names(self) -> list[str]:
        return [self.names[i] for i in self.trained]

    def lut(self, training: bool = False) -> np.ndarray:
        """Label value -> class id [2**bits]; in training -> index among the seen classes, unseen
        ones -> `ignore`.
        """
        table = np.full(2**self.bits, self.ignore, np.uint8 if self.ignore < 256 else np.int32)
        ids = self.trained if training else range(len(self.names))
        table[[self.values[i] for i in ids]] = np.arange(len(ids))
        return table

    def folder(self, root: Path) -> Path:
        """The first of `folders` that holds anything."""
        return next(
            (root / f for f in self.folders if any((root / f).glob("[!.]*"))),
            root / self.folders[0],
        )

    def listing(self, folder: Path, split: str) -> "Listing":
        """The files of a split, as listed or found. Raises OSError without a list, UserError for
        one that names no ids.
        """
        return self.listed(folder, split) if self.lists else self.found(folder, split)

    def listed(self, folder: Path, split: str) -> "Listing":
        known, pairs = image_endings(), []
        lines = split_lines(decode((folder / f"{split}.txt").read_bytes()))
        lines = [line for line in lines if line.strip()]
        for number, line in enumerate(lines):
            name, image = line, folder / self.images.format(id=line)
            if not image.exists():  # a name may begin or end with a space, but lists rather do
                name = lines[number] = line.strip()
                image = folder / self.images.format(id=name)
            words = name.split()
            columns = len(words) > 1 and (
                re.fullmatch(r"[-+]?[\d.]+", words[-1]) or any("/" in word for word in words)
            )
            columns = columns or "," in name or name[0] in "#\"'`[{" or name[-1] in "\"'`]}"
            files = any(os.path.splitext(word)[1].lower() in known for word in words)
            if not image.exists() and (columns or files or "\\" in name or name.startswith("/")):
                wants = f"wants ids, one a line, not {name[:100]!r}"
                raise UserError(
                    f"list {folder / split}.txt",
                    wants,
                    f"an id is what stands for {{id}} in {self.images}",
                )
            labels = [folder / pattern.format(id=name) for pattern in self.labels]
            pairs.append((image, next((p for p in labels if p.exists()), labels[0])))
        twice = sum(count - 1 for count in Counter(lines).values())
        remark = f"{several(twice, 'line')} of {split}.txt stand there twice, and count twice"
        return Listing(pairs, remarks=[remark] if twice else [])

    def found(self, folder: Path, split: str) -> "Listing":
        """Files below the folder whose paths fit the patterns; an image and a label map of one id
        are a pair.
        """
        hidden, others = [], []
        images = self.fitting(folder, split, self.images, hidden, others)
        labels = self.fitting(folder, split, self.labels[0], hidden, [])
        # A file that fits both patterns is what it has a partner for: a.png and a_mask.png are an
        # image and its label map.
        files_of = [Counter(part.values()) for part in (images, labels)]
        for file in images.keys() & labels.keys():
            is_labels = files_of[0][labels[file]] > (images[file] == labels[file])
            is_image = files_of[1][images[file]] > (images[file] == labels[file])
            if is_labels:
                del images[file]
            elif is_image:
                del labels[file]
        by_id, twins = ({}, {}), []
        for part, files in zip(by_id, (images, labels), strict=True):
            for file, name in files.items():
                if name in part:
                    twins.append(
                        UserError(f"file {file}", f"has the id of {part[name]}", "keep one")
                    )
                part.setdefault(name, Path(file))
        pairs = [(by_id[0][i], by_id[1][i]) for i in sorted(by_id[0].keys() & by_id[1].keys())]
        alone = {by_id[0].get(i, by_id[1].get(i)) for i in by_id[0].keys() ^ by_id[1].keys()}
        strangers = [file for file in others if file not in labels] if self.name == "folder" else []
        return Listing(pairs, sorted(alone), twins, strangers, hidden, (len(images), len(labels)))

    def fitting(
        self, folder: Path, split: str, pattern: str, hidden: list[str], others: list[str]
    ) -> dict[str, str]:
        """{file: id} of those that fit a pattern; images by their ending that do not are put into
        `others`.
        """
        before, after = pattern.replace("{split}", self.splits.get(split, split)).split("{id}")
        known, found, base = image_endings(), {}, folder / before
        for file in walk(base, hidden=hidden) if base.is_dir() else ():
            name = file[len(os.path.join(base, "")) :].replace(os.sep, "/")
            ending = os.path.splitext(name)[1].lower()
            fits = ending in known if after == ".*" else name.endswith(after)
            name = name[: -len(ending)] if after == ".*" else name.removesuffix(after)
            if fits and name:
                found[file] = name
            elif ending in known or ending in IMAGE_LIKE:
                others.append(file)
        return found


@dataclass
class Listing:
    """The files of a split."""

    pairs: list[tuple[Path, Path]]  # (image, label map), sorted by id as listed or found
    # On one side only; a listed file that is not there is an error.
    alone: list[Path] = field(default_factory=list)
    twins: list[UserError] = field(default_factory=list)  # two files of one id
    # That look like images and fit no pattern (one's own data).
    others: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    counts: tuple[int, int] = (0, 0)  # images, label maps
    remarks: list[str] = field(default_factory=list)

    def left_out(self, split: str) -> list[str]:
        """What is not used of the files that are there, a line each."""
        lines = (
            [f"{several(len(self.alone), 'file')} without a partner in {split}"]
            if self.alone
            else []
        )
        if self.others:
            what = several(len(self.others), "file that fits", "files that fit")
            lines.append(
                f"{what} neither data.images nor data.labels in {split} ({endings(self.others)})"
            )
        return lines


def endings(files: Iterable[str]) -> str:
    """How file names end, the most frequent first: "3 .heic, 1 .dng"."""
    counts = Counter(os.path.splitext(file)[1].lower() for file in files)
    order = sorted(counts, key=lambda ending: (-counts[ending], ending == "", ending))
    more = f" and {len(order) - 5} more kinds" if len(order) > 5 else ""
    return (
        ", ".join(f"{counts[ending]} {ending or 'without an ending'}" for ending in order[:5])
        + more
    )


def read_table(file: Path) -> dict[str, DataSet]:
    rows = tomllib.loads(file.read_text(encoding="utf-8"))
    for row in rows.values():
        row.setdefault("values", list(range(len(row["names"]))))
        row["archives"] = [Archive(**archive) for archive in row.get("archives", [])]
    return {name: DataSet(name, **row) for name, row in rows.items()}


DATASETS = read_table(Path(__file__).parent / "datasets.toml")


def dataset(wanted: str | DataConfig) -> DataSet:
    """A row of the table, by its name or as a configuration wants it, which may also describe a
    data set of its own.
    """
    name = wanted if isinstance(wanted, str) else wanted.name
    if name == "folder" and isinstance(wanted, DataConfig):
        return own_dataset(wanted)
    if name not in DATASETS:
        known = [*DATASETS, "folder"]
        raise UserError(
            "data.name",
            f"is {name!r}",
            did_you_mean(name, known, f"choose one of {', '.join(known)}"),
        )
    return DATASETS[name]


def own_dataset(config: DataConfig) -> DataSet:
    """The user's own data set; UserError where its description cannot be right."""
    values = config.values or list(range(len(config.classes)))
    for name in config.unseen:
        if name not in config.classes:
            todo = did_you_mean(name, config.classes, "give some of data.classes")
            raise UserError("data.unseen", f"{name!r} is none of data.classes", todo)
    for key, items in (("classes", config.classes), ("unseen", config.unseen), ("values", values)):
        for item, count in Counter(items).items():
            if count > 1:
                raise UserError(f"data.{key}", f"{item!r} stands twice", "name each once")
    check_names(config.classes)
    lists = "{split}" not in config.images
    rules = {
        "data.images": (
            config.images.count("{id}") == 1
            and not (lists and config.images.endswith(".*"))
            and config.images.split("{id}")[0][-1:] in ("", "/"),
            'write e.g. "images/{split}/{id}.jpg"',
        ),
        "data.labels": (
            config.labels.count("{id}") == 1
            and lists == ("{split}" not in config.labels)
            and config.labels.split("{id}")[0][-1:] in ("", "/")
            and config.labels != config.images
            and not (lists and config.labels.endswith(".*")),
            'write e.g. "masks/{split}/{id}.png", with {split} as in data.images',
        ),
        "data.classes": (len(config.classes) > 0, "name every class"),
        "data.unseen": (
            len(config.unseen) < len(config.classes),
            "give some of data.classes, not all",
        ),
        "data.values": (
            len(values) == len(config.classes) and all(0 <= value < 2**16 for value in values),
            f"give each of the {len(config.classes)} classes a value of its own, from 0 to 65535",
        ),
    }
    for name, (right, todo) in rules.items():
        if not right:
            given = getattr(config, name.removeprefix("data."))
            raise UserError(
                name, f"is {given}" if given else "is missing (data.name is folder)", todo
            )
    splits = {split: split for split in ("train", "val", "test", config.split)}
    ignore = 255 if len(config.classes) <= 255 else 65535
    return DataSet(
        "folder",
        config.classes,
        [config.folder or "."],
        config.images,
        [config.labels],
        splits,
        values,
        config.unseen,
        lists,
        16,
        ignore,
    )


def training_set(config: DataConfig) -> DataSet:
    """The data set as training sees it: with `train_on = "all"` no class is unseen."""
    data = dataset(config)
    return replace(data, unseen=[]) if config.train_on == "all" else data


def find_listing(wanted: str | DataConfig, root: Path, split: str) -> Listing:
    """The files of a split; UserError where there are none."""
    data = dataset(wanted)
    if split not in data.splits:
        raise MissingSplit(
            "data.split",
            f"is {split!r}",
            f"{data.name} has {', '.join(data.splits)}: --set data.split=...",
        )
    folder = data.folder(root)
    try:
        listing = data.listing(folder, split)
    except FileNotFoundError:
        listing = Listing([])
    except OSError as error:
        raise UserError(
            f"list {folder / split}.txt", f"cannot be read ({error})", "replace the file"
        ) from None
    if not listing.pairs and data.name == "folder":
        raise nothing_found(data, folder, split, listing)
    if not listing.pairs:
        command = f"run prepare_data.py {data.name}" + " --train" * (
            split == "train" and data.name != "shapes"
        )
        raise MissingSplit(
            f"data set {data.name}",
            f"no {split!r} images in {folder}",
            f"{command}, or give --root",
        )
    return listing


def find_pairs(wanted: str | DataConfig, root: Path, split: str) -> list[tuple[Path, Path]]:
    """The (image, label map) files of a split. The command says at its end which files it has left
    out.

    UserError where there are none, or where two have the same id.
    """
    listing = find_listing(wanted, root, split)
    for line in listing.left_out(split):
        left_out(line)
    for line in listing.remarks:
        print_once(f"look at: {line}")
    if listing.twins:
        raise listing.twins[0]
    return listing.pairs


def nothing_found(data: DataSet, folder: Path, split: str, listing: Listing) -> UserError:
    """What is wrong with a data set of the user's own of which a split has no pair of files."""
    if not folder.is_dir():
        return UserError(
            "data.folder",
            f"no such folder {folder}",
            did_you_mean_file(folder, "correct it, or give --root"),
        )
    if data.lists:
        return MissingSplit(
            f"list {folder / split}.txt",
            f"names no {split!r} image, or is not there",
            "write one id a line",
        )
    counts, pattern = listing.counts, (data.images, data.labels[0])
    key, i = ("data.labels", 1) if counts[0] and not counts[1] else ("data.images", 0)
    if all(counts):
        return UserError(
            "data.labels",
            f"no {split!r} label map has the id of an image",
            "see data.images and data.labels",
        )
    place = folder / pattern[i].replace("{split}", split).replace("{id}", "*")
    kind = UserError if any(counts) else MissingSplit
    return kind(key, f"no {split!r} file is {place}", "correct it, or data.folder, or give --root")


def has_split(wanted: str | DataConfig, root: Path, split: str) -> bool:
    try:
        find_pairs(wanted, root, split)
    except MissingSplit:
        return False
    return True
