"""What the label maps of a split contain: pixels of each class, cached beside the data, and
possible mistakes.
"""

import hashlib
import os
import zipfile
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zsseg import images
from zsseg.config import DataConfig
from zsseg.datasets import DataSet, dataset, find_pairs
from zsseg.files import atomic_write
from zsseg.images import FIRST_PAGE, TURNED, check_values, read_image, read_samples, remarks_on
from zsseg.utils import UserError, cache_dir, first_of, parallel, several


@dataclass
class LabelStatistics:
    """Pixels of each class in each image of a split. Category C is the ignore value."""

    image: np.ndarray  # int32, one entry for each class of each image
    category: np.ndarray  # int32, 0..C
    pixels: np.ndarray  # int64
    broken: np.ndarray  # a line for each label map that cannot be read, which counts as empty
    values: np.ndarray  # int32, the label values that occur, ascending
    value_pixels: np.ndarray  # int64, of each
    remarks: np.ndarray  # (remark, file) on single files: str [n, 2]

    def histogram(self, classes: int) -> np.ndarray:
        """Pixels of each class and, last, of the ignore value: int64 [classes + 1]."""
        histogram = np.zeros(classes + 1, np.int64)
        np.add.at(histogram, self.category, self.pixels)
        return histogram

    def images_with(self, categories: list[int]) -> np.ndarray:
        """Indices of the images that show at least one of the classes."""
        return np.unique(self.image[np.isin(self.category, categories)])

    def possible_mistakes(self, data: DataSet, split: str) -> list[str]:
        """Classes without a pixel, values of no class, remarks on files: a line each."""
        lines = []
        pixels = self.histogram(len(data.names))
        used = data.trained if split == "train" else range(len(data.names))
        absent = [data.names[i] for i in used if not pixels[i]]
        if absent:
            count = f"{several(len(absent), 'class', 'classes')} of {len(used)}"
            lines.append(f"no pixel in {split} of {count}: {first_of(absent, 20)}")

        unnamed = ~np.isin(self.values, data.values)
        values = self.values[unnamed]
        percent = 100 * self.value_pixels[unnamed] / max(self.value_pixels.sum(), 1)
        usual = (values == 255) & (percent <= 5)
        # The labels of the other data sets are known to be right.
        if data.name == "folder" and len(values) and (absent or not usual.all()):
            shares = [f"{v} ({share:.2g} %)" for v, share in zip(values, percent, strict=True)]
            text = first_of(shares, 20) + self.guess_values(data)
            lines.append(f"ignored label values, of no class: {text}")

        for remark, count in Counter(self.remarks[:, 0].tolist()).items():
            files = self.remarks[self.remarks[:, 0] == remark, 1].tolist()
            lines.append(f"{remark} ({several(count, 'file')}: {first_of(files, 3)})")
        return lines

    def guess_values(self, data: DataSet) -> str:
        """What data.values probably should be, if they should be others."""
        values = {*self.values.tolist()}
        C = len(data.names)
        if values == {0, 255} and C == 2 and data.values != [0, 255]:
            return "; did you mean data.values = [0, 255]?"
        if data.values == list(range(C)) and 0 not in values and C in values:
            return f"; did you mean data.values = {list(range(1, C + 1))}?"
        return ""


class Count(NamedTuple):
    """What is in one label map."""

    rows: np.ndarray  # (class, pixels), int64 [n, 2]
    values: np.ndarray  # (value, pixels), int64 [m, 2]
    remarks: list[tuple[str, str]] = ()  # (remark, file)


def count_classes(
    pair: tuple[Path, Path],
    data: DataSet,
    luts: tuple[np.ndarray, np.ndarray],
    turn: bool = False,
    digests: dict[bytes, Path] | None = None,
) -> Count:
    """The classes of an (image, label map) pair; `luts` are the data set's for evaluation and
    training.

    `turn`: the image is turned as its EXIF entry says. With `digests`, the image is read, too, its
    size is compared, and its SHA-256 is added. Raises AssertionError where the training table would
    let an unseen class through, UserError for a bad file.
    """
    image, file = pair
    full, training = luts
    size = None
    if digests is not None:
        size = read_image(image, turn=turn).size
        digests[hashlib.sha256(image.read_bytes()).digest()] = image
    samples, remark = read_samples(file)
    pixels = np.bincount(check_values(samples, file, data.bits, size).ravel())
    values = pixels.nonzero()[0]
    pixels = pixels[values]

    ids = full[values].astype(np.int64)
    trained = training[values]
    kept = trained != data.ignore
    unseen = [data.values[data.names.index(name)] for name in data.unseen]
    same = np.array_equal(np.array(data.trained)[trained[kept]], ids[kept])
    # Both: the tables for evaluation and training may be wrong together.
    if not same or np.isin(values[kept], unseen).any():
        raise AssertionError(f"{file}: a pixel of an unseen class survived")

    ids[ids == data.ignore] = len(data.names)
    histogram = np.bincount(ids, pixels).astype(np.int64)
    classes = histogram.nonzero()[0]

    remarks = [(remark, str(file))] if remark else []
    if data.name == "folder":  # the others are known to be labelled as they are stored
        turned, pages = remarks_on(image)
        if turned and not turn:
            remarks.append((TURNED, str(image)))
        if pages:
            remarks.append((FIRST_PAGE, str(image)))
    rows = np.stack([classes, histogram[classes]], 1)
    return Count(rows, np.stack([values, pixels], 1), remarks)


def count_split(
    pairs: list[tuple[Path, Path]],
    data: DataSet,
    turn: bool,
    workers: int,
    name: str,
    digests: dict[bytes, Path] | None = None,
) -> LabelStatistics:
    """The statistics of (image, label map) pairs; see `count_classes`, whose UserErrors are listed.
    A pair with an error counts as empty.
    """
    luts = (data.lut(), data.lut(training=True))
    broken = []
    empty = np.empty((0, 2), np.int64)

    def attempt(pair: tuple[Path, Path]) -> Count:
        try:
            return count_classes(pair, data, luts, turn, digests)
        except UserError as error:
            broken.append(str(error))
            return Count(empty, empty)

    counts = list(parallel(attempt, pairs, workers, name))
    rows = np.concatenate([empty, *(c.rows for c in counts)])
    value_rows = np.concatenate([empty, *(c.values for c in counts)])
    pixels = np.bincount(value_rows[:, 0], value_rows[:, 1]).astype(np.int64)
    values = pixels.nonzero()[0]
    return LabelStatistics(
        image=np.repeat(np.arange(len(counts), dtype=np.int32), [len(c.rows) for c in counts]),
        category=rows[:, 0].astype(np.int32),
        pixels=rows[:, 1],
        broken=np.array(sorted(broken), str),
        values=values.astype(np.int32),
        value_pixels=pixels[values],
        remarks=np.array([remark for c in counts for remark in c.remarks], str).reshape(-1, 2),
    )


def label_statistics(
    name_or_config: str | DataConfig, root: Path, split: str, workers: int = 4
) -> LabelStatistics:
    """The statistics of a split: from the cache while files, tables and this program are the same,
    else counted now.

    The cache lies beside the data, below $ZSSEG_CACHE where that cannot be written.
    """
    data = dataset(name_or_config)
    pairs = find_pairs(name_or_config, root, split)
    turn = isinstance(name_or_config, DataConfig) and name_or_config.exif_turn
    folder = data.folder(root)
    settings = data.lut().tobytes() + data.lut(training=True).tobytes() + bytes([turn])
    version = files_version(folder, pairs, settings)
    caches = folder / ".zsseg" / f"{split}.npz", cache_dir() / "statistics" / f"{version}.npz"
    for cache in caches:
        if cached := read_statistics(cache, version):
            return cached

    statistics = count_split(pairs, data, turn, workers, f"count {data.name} {split}")
    if len(statistics.broken):  # these files may be replaced
        return statistics
    for cache in caches:
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
        state = stat and (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        line = f"{os.path.relpath(file, folder)} {state}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def read_statistics(file: Path, version: str) -> LabelStatistics | None:
    """What is cached in a file; None where it is missing, broken, or of another version."""
    try:
        with np.load(file, allow_pickle=False) as content:
            if str(content["version"]) == version:
                return LabelStatistics(*(content[f.name] for f in fields(LabelStatistics)))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    return None
