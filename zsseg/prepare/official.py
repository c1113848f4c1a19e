"""The official files of a data set: found below the data root, or downloaded and unpacked."""

import contextlib
import shutil

from zsseg.datasets import MissingSplit, dataset, find_listing, listed_ids
from zsseg.download import check_file, fetch
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
    if name == "ade20k_full" and (folder / "images").is_dir():
        convert.ade20k_full(folder, workers, train)  # skips what it has written before
    both = train or (data.lists and listed_ids(folder / "train.txt"))
    splits = ("val", "train") if both else ("val",)
    if not (why := lack(name, root, splits)):
        return
    if not data.archives:
        raise UserError(f"data set {name}", why, data.register)

    # SBD, the last, is asked for when it is needed; Context's annotations, the first, are the lists
    # of all 459 classes.
    full = name == "pcontext_full"
    listed = full and all(listed_ids(folder / f"{split}.txt") for split in splits)
    for archive in data.archives[listed : 1 if name == "voc" else None]:
        obtain(archive, data, root, folder)
    if name == "voc":
        convert.voc_trainaug(folder, lambda file: find_sbd(file, data, root, folder), workers)
    if name.startswith("pcontext") and not listed:
        convert.pascal_context(folder, workers)
    if full:
        convert.pascal_context_full(folder, workers)
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


def find_sbd(file, data, root, folder):
    """The folder with most masks of SBD, if it holds `file`, a pattern; else it is downloaded."""
    folders = [folder / "SBD", *(root / name for name in SBD_FOLDERS)]
    sbd = fullest(folders, "cls/*.mat")
    if any(sbd.glob(file)):
        return sbd
    obtain(data.archives[1], data, root, folder)
    return folders[0]


def obtain(archive, data, root, folder):
    """Unpack an archive, or copy a single file, from the root or the cache, to which it is
    downloaded if it is in neither.
    """
    targets = [folder / path for _, path in archive.take]
    for target in targets:
        with contextlib.suppress(OSError):
            target.rmdir()  # an empty folder is none
    if all(target.exists() for target in targets):
        return
    what = f"data set {data.name}, {archive.file}"
    file = cache_dir() / "downloads" / archive.file
    given = [path for path in (root / archive.file, folder / archive.file) if path.is_file()]
    if given:
        file = given[0]
        check_file(file, archive.checksum, what, archive.bytes)
    elif archive.urls:
        fetch(archive.urls, file, archive.checksum, what, archive.bytes)
    else:
        raise UserError(f"data set {data.name}", f"no {archive.file} in {root}", data.register)
    if archive.take[0][0]:
        unpack(file, archive.take, folder, what)
    else:
        with atomic_write(targets[0]) as temporary:
            shutil.copyfile(file, temporary)
