"""The official files of a data set: found below the data root, or downloaded and unpacked."""

import shutil
from pathlib import Path

from zsseg.datasets import MissingSplit, dataset, find_listing, listed_ids
from zsseg.download import fetch
from zsseg.prepare import convert
from zsseg.prepare.archives import unpack
from zsseg.utils import UserError, atomic_write, cache_dir

SBD_FOLDERS = ("SBD", "sbd", "benchmark_RELEASE/dataset", "VOCdevkit/VOCaug/dataset")


def prepare(name, root, workers, train):
    """Bring the official files into the layout that is read, unless they are in it.

    A test split is enough (evaluation needs no more) unless `train` asks for both.
    """
    data = dataset(name)
    folder = fullest([root / name for name in data.folders], "*/*")
    if name == "ade20k_full":
        convert.ade20k_full(folder, workers, train)  # skips what it has written before
    both = train or (data.lists and listed_ids(folder / "train.txt"))
    splits = ("val", "train") if both else ("val",)
    if not lack(name, root, splits):
        return

    # SBD, the last, is asked for when it is needed; Context's annotations, the first, are the lists
    # of all 459 classes.
    full = name == "pcontext_full"
    listed = full and all(listed_ids(folder / f"{split}.txt") for split in splits)
    for archive in data.archives[listed : 1 if name == "voc" else None]:
        obtain(archive, data, root, folder)

    def find_sbd():
        """The folder with most masks of SBD; without any it is downloaded."""
        sbd = fullest([folder / "SBD", *(root / name for name in SBD_FOLDERS)], "cls/*.mat")
        if not any(sbd.glob("cls/*.mat")):  # which are unpacked last
            obtain(data.archives[1], data, root, folder)
        return sbd

    if name == "voc":
        convert.voc_trainaug(folder, find_sbd, workers)
    if name.startswith("pcontext") and not listed:
        convert.pascal_context(folder, workers)
    if full:
        ids = [i for split in ("train", "val") for i in listed_ids(folder / f"{split}.txt")]
        convert.convert_mats(folder / "trainval", ids, "LabelMap", folder / "labels_full", workers)
    if why := lack(name, root, splits):
        todo = "move it away, or put in the official files"
        raise UserError(f"data set {name}", f"{folder} is not complete: {why}", todo)


def fullest(folders, pattern):
    """The folder with the most files of a pattern, the first of equals."""
    return max(folders, key=lambda folder: len([*folder.glob(pattern)]))


def lack(name, root, splits):
    """What the splits lack, or "": a listed file, or more partners than there are pairs."""
    for split in splits:
        try:
            listing = find_listing(name, root, split)
        except MissingSplit as error:
            return error.args[1]
        if listing.missing:
            return f"no {listing.missing[0]}"
        if len(listing.unpaired) > len(listing.pairs):
            return f"{listing.unpaired[0]} has no partner"
    return ""


def obtain(archive, data, root, folder):
    """Unpack an archive, or copy a single file, from the root or the cache, to which it is
    downloaded if it is in neither.
    """
    missing = {
        folder / path: inside for inside, path in archive.take if not (folder / path).exists()
    }
    if not missing:
        return
    files = [parent / archive.file for parent in (root, folder, cache_dir() / "downloads")]
    file = next(filter(Path.is_file, files), files[-1])
    if not (archive.urls or file.is_file()):
        raise UserError(f"data set {data.name}", f"no {archive.file} in {root}", data.register)
    what = f"data set {data.name}, {archive.file}"
    fetch(archive.urls, file, archive.checksum, what)
    if archive.take[0][0]:
        unpack(file, missing, folder / ".unpacking", what)
    else:
        with atomic_write(*missing) as temporary:
            shutil.copyfile(file, temporary)
