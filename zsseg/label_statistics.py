"""What is in the label maps of a split: its classes by pixels, kept beside the data, and what may
be a mistake in it.
"""

import hashlib
import os
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zsseg import images
from zsseg.config import DataConfig
from zsseg.datasets import DataSet, dataset, find_pairs
from zsseg.files import atomic_write
from zsseg.images import FIRST_PAGE, TURNED, check_values, read_samples, remarks_on
from zsseg.utils import UserError, cache_dir, first_of, parallel, several


@dataclass
class LabelStatistics:
    """Which classes are in which image of a split, by pixels. Row C of the classes is the ignore
    value.
    """

    image: np.ndarray  # int32, one entry for each class of each image
    category: np.ndarray  # int32, 0..C
    pixels: np.ndarray  # int64
    broken: np.ndarray  # a line for each label map that cannot be read, which counts as empty
    values: np.ndarray  # int32, the values that stand in the label maps, ascending
    value_pixels: np.ndarray  # int64, of each
    remarks: np.ndarray  # (what is odd, file) of single files: str [n, 2]

    def histogram(self, classes: int) -> np.ndarray:
        """Pixels of each class and, last, of the ignore value: int64 [classes + 1]."""
        histogram = np.zeros(classes + 1, np.int64)
        np.add.at(histogram, self.category, self.pixels)
        return histogram

    def images_with(self, categories: list[int]) -> np.ndarray:
        """Indices of the images that show at least one of the classes."""
        return np.unique(self.image[np.isin(self.category, categories)])

    def oddities(self, data: DataSet, split: str) -> list[str]:
        """What may be a mistake, a line each: classes without a pixel, values of no class, files
        that are read unexpectedly.
        """
        lines, pixels = [], self.histogram(len(data.names))
        used = data.trained if split == "train" else range(len(data.names))
        without = [data.names[i] for i in used if not pixels[i]]
        if without:
            names = first_of(without, 20)
            lines.append(
                f"no pixel in {split} of {several(len(without), 'class', 'classes')} of "
                f"{len(used)}: {names}"
            )
        known, total = {*data.values}, max(int(self.value_pixels.sum()), 1)
        others = [
            (int(v), 100 * int(n) / total)
            for v, n in zip(self.values, self.value_pixels, strict=True)
            if v not in known
        ]
        usual = not [v for v, share in others if v != 255 or share > 5]
        # The others' values are known to be right.
        if others and (without or not usual) and data.name == "folder":
            shares = ", ".join(f"{v} ({share:.2g} %)" for v, share in others[:20]) + " ..." * (
                len(others) > 20
            )
            lines.append(f"ignored label values, of no class: {shares}{self.meant(data)}")
        for what, count in Counter(self.remarks[:, 0].tolist()).items():
            names = self.remarks[self.remarks[:, 0] == what, 1].tolist()
            lines.append(
                f"{what} ({several(count, 'file')}: {', '.join(names[:3])}{' ...' * (count > 3)})"
            )
        return lines

    def meant(self, data: DataSet) -> str:
        """A guess at data.values, where they are probably others."""
        there, C = {*self.values.tolist()}, len(data.names)
        if there == {0, 255} and C == 2 and data.values != [0, 255]:
            return "; did you mean data.values = [0, 255]?"
        if data.values == list(range(C)) and 0 not in there and C in there:
            return f"; did you mean data.values = {list(range(1, C + 1))}?"
        return ""


class Count(NamedTuple):
    """What is in one label map."""

    rows: np.ndarray  # (class, pixels), int64 [n, 2]
    values: np.ndarray  # (value, pixels), int64 [m, 2]
    remarks: list[tuple[str, str]] = ()  # (what is odd, file)


def count_classes(
    pair: tuple[Path, Path],
    data: DataSet,
    tables: tuple,
    size: tuple | None = None,
    turn: bool = False,
) -> Count:
    """The classes of a (image, label map) pair; `tables` are the data set's for evaluation and
    training.

    `turn`: images are turned as their camera says. Raises AssertionError where the training table
    would let an unseen class through, UserError for a bad label map.
    """
    full, training = tables
    image, file = pair
    samples, remark = read_samples(file)
    pixels = np.bincount(check_values(samples, file, data.bits, size).ravel())
    there = pixels.nonzero()[0]
    ids, trained = full[there].astype(np.int64), training[there]
    kept = trained != data.ignore
    hidden = [data.values[data.names.index(n)] for n in data.unseen]
    if np.isin(there[kept], hidden).any() or not np.array_equal(
        np.array(data.trained)[trained[kept]], ids[kept]
    ):
        raise AssertionError(f"{file}: a pixel of an unseen class survived")
    ids[ids == data.ignore] = len(data.names)
    classes, index = np.unique(ids, return_inverse=True)
    rows = np.stack([classes, np.bincount(index, pixels[there], len(classes)).astype(np.int64)], 1)
    remarks = [(remark, str(file))] if remark else []
    if data.name == "folder":  # the others are known to be labelled as they are stored
        turned, pages = remarks_on(image)
        remarks += [(TURNED, str(image))] if turned and not turn else []
        remarks += [(FIRST_PAGE, str(image))] if pages else []
    return Count(rows, np.stack([there, pixels[there]], 1), remarks)


def count_split(pairs: list, count: Callable, workers: int, name: str) -> LabelStatistics:
    """The statistics of (image, label map) pairs by `count`, which gives a pair's `Count`.

    What it raises as UserError is listed, and the pair counts as empty.
    """
    broken, empty = [], np.empty((0, 2), np.int64)

    def attempt(pair: tuple[Path, Path]) -> Count:
        try:
            return count(pair)
        except UserError as error:
            broken.append(str(error))
            return Count(empty, empty)

    counts = list(parallel(attempt, pairs, workers, name))
    rows = np.concatenate([empty, *(c.rows for c in counts)])
    image = np.repeat(np.arange(len(counts), dtype=np.int32), [len(c.rows) for c in counts])
    pixels = np.zeros(65536, np.int64)
    for c in counts:
        pixels[c.values[:, 0]] += c.values[:, 1]
    there = pixels.nonzero()[0]
    remarks = np.array([remark for c in counts for remark in c.remarks], str).reshape(-1, 2)
    return LabelStatistics(
        image,
        rows[:, 0].astype(np.int32),
        rows[:, 1],
        np.array(sorted(broken), str),
        there.astype(np.int32),
        pixels[there],
        remarks,
    )


def label_statistics(
    wanted: str | DataConfig, root: Path, split: str, workers: int = 4
) -> LabelStatistics:
    """The statistics of a split: from the cache while files, tables and this program are the same,
    else counted now.

    The cache lies beside the data, below $ZSSEG_CACHE where that cannot be written.
    """
    data, pairs = dataset(wanted), find_pairs(wanted, root, split)
    tables, folder = (data.lut(), data.lut(training=True)), data.folder(root)
    turn = isinstance(wanted, DataConfig) and wanted.exif_turn
    version = files_version(
        folder, pairs, b"".join(table.tobytes() for table in tables) + bytes([turn])
    )
    caches = folder / ".zsseg" / f"{split}.npz", cache_dir() / "statistics" / f"{version}.npz"
    for cache in caches:
        if cached := read_statistics(cache, version):
            return cached
    count = lambda pair: count_classes(pair, data, tables, turn=turn)
    statistics = count_split(pairs, count, workers, f"count {data.name} {split}")
    # What is broken today may be mended tomorrow.
    for cache in caches if not len(statistics.broken) else ():
        try:
            with atomic_write(cache) as temporary, open(temporary, "wb") as file:
                np.savez(file, version=version, **vars(statistics))
            break
        except UserError:
            continue
    return statistics


def files_version(folder: Path, pairs: list[tuple[Path, Path]], settings: bytes) -> str:
    """A digest of settings, of every file's name, size and times of change, and of the code that
    reads them.
    """
    digest = hashlib.sha256(settings)
    for code in (__file__, images.__file__):
        digest.update(Path(code).read_bytes())
    for file in (file for pair in pairs for file in pair):
        stat = file.stat() if file.exists() else None
        line = (
            f"{os.path.relpath(file, folder)} "
            f"{stat and (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)}\n"
        )
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def read_statistics(file: Path, version: str) -> LabelStatistics | None:
    try:
        with np.load(file, allow_pickle=False) as content:
            if str(content["version"]) == version:
                return LabelStatistics(*(content[f.name] for f in fields(LabelStatistics)))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # absent, from another version of the program, or broken: as good as none
    return None
