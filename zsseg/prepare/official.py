"""The official files of a data set: found below the data root, or downloaded and unpacked."""

import shutil

from zsseg.datasets import MissingSplit, dataset, find_listing
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
    folder = data.folder(root)
    if name == "ade20k_full" and (folder / "images").is_dir():
        convert.ade20k_full(folder, workers, train)  # skips what it has written before
    both = train or (data.lists and (folder / "train.txt").exists())
    if has_files(name, root, "val") and (not both or has_files(name, root, "train")):
        return
    if not data.archives:
        raise UserError(f"data set {name}", f"nothing in {folder}", data.register)

    archives = data.archives[:1] if name == "voc" else data.archives
    for archive in archives:
        obtain(archive, data, root, folder)
    if name == "voc":
        convert.voc_trainaug(folder, lambda: find_sbd(data, root, folder), workers)
    elif name == "pcontext":
        convert.pascal_context(folder, workers)
    if not has_files(name, root, "val"):
        todo = "move it away, or put in the official files"
        raise UserError(f"data set {name}", f"{folder} is not complete", todo)


def has_files(name, root, split):
    """Whether most of the files of a split exist (--check names the others), of VOC all: its
    masks are converted one by one.
    """
    try:
        pairs = find_listing(name, root, split).pairs
    except MissingSplit:
        return False
    found = sum(image.exists() and label.exists() for image, label in pairs)
    return found >= (len(pairs) if name == "voc" else len(pairs) / 2)


def find_sbd(data, root, folder):
    """SBD's folder: one below the root, else it is downloaded."""
    folders = [folder / "SBD", *(root / name for name in SBD_FOLDERS)]
    for sbd in folders:
        if (sbd / "cls").is_dir():
            return sbd
    obtain(data.archives[1], data, root, folder)
    return folders[0]


def obtain(archive, data, root, folder):
    """Unpack an archive from the root or the cache, to which it is downloaded if it is in
    neither.
    """
    targets = [folder / path for _, path in archive.take]
    if all(target.exists() for target in targets):
        return
    what = f"data set {data.name}, {archive.file}"
    is_archive = archive.take[0][0] != ""
    file = cache_dir() / "downloads" / archive.file if is_archive else targets[0]
    given = [path for path in (root / archive.file, folder / archive.file) if path.is_file()]
    if given:
        file = given[0]
        check_file(file, archive.checksum, what, archive.bytes)
    elif archive.urls:
        fetch(archive.urls, file, archive.checksum, what, archive.bytes)
    elif not file.exists():
        why = f"no {archive.file} in {root}, nothing in {folder}"
        raise UserError(f"data set {data.name}", why, data.register)
    if is_archive:
        unpack(file, archive.take, folder, what)
    elif file != targets[0]:
        with atomic_write(targets[0]) as temporary:
            shutil.copyfile(file, temporary)
