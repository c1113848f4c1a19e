"""What a data set contains: counts beside the published ones, broken files, the label histogram."""

import hashlib
from pathlib import Path

import numpy as np

from zsseg.config import DataConfig
from zsseg.data import count_labels, label_counter
from zsseg.datasets import DataSet, Listing, MissingSplit, Pair, dataset, find_listing
from zsseg.images import read_image
from zsseg.utils import UserError, parallel, plural


def summarize(config: DataConfig, root: Path, workers: int, check: bool) -> None:
    """Print what each split contains. `check`: read every file and print all problems, which are
    then a UserError.
    """
    data = dataset(config)
    problems = 0
    images = {}
    for split in data.splits:
        try:
            listing = find_listing(config, root, split)
        except UserError as error:
            if isinstance(error, MissingSplit) and split != config.split:
                print(f"{data.name} {split}: none")
                continue
            if not check:
                raise
            print(f"{data.name} {split}:\n  broken: {error}")
            problems += 1
            continue
        print(describe(data, listing, split), flush=True)
        for remark in listing.remarks:
            print(f"  left out: {remark}")
        if check:
            problems += check_split(config, split, listing, workers, images)
        elif split == "train":
            count_labels(config, root, "train", workers)  # now, since training needs it
    if problems:
        why = f"{plural(problems, 'problem')} (listed above)"
        raise UserError(f"data set {data.name}", why, "replace these files")


def describe(data: DataSet, listing: Listing, split: str) -> str:
    """Counts of a split beside the published ones."""
    count = len(listing.pairs)
    text = f"{data.name} {split}: {count} images"
    if published := data.counts.get(split):
        text += f" (published: {published})"
        if count == published and split in data.digests:
            ids = "".join(sorted(f"{image.stem}\n" for image, _ in listing.pairs))
            same = hashlib.sha256(ids.encode()).hexdigest() == data.digests[split]
            text += f", {'' if same else 'but NOT '}the published ids"
    return text


def check_split(
    config: DataConfig, split: str, listing: Listing, workers: int, others: dict[bytes, Path]
) -> int:
    """Read every file of a split and print what it contains; the number of files that are broken
    or have no partner.

    `others`: SHA-256 of an image -> its file, of the splits before; this split's are added.
    """
    data = dataset(config)
    count = label_counter(data)
    broken = [f"{file} has no partner" for file in listing.unpaired]
    digests = {}

    def read(pair: Pair) -> np.ndarray | int:
        image, labels = pair
        try:
            size = read_image(image, turn=config.exif_turn).size
            digests[hashlib.sha256(image.read_bytes()).digest()] = image
            return count(labels, size)
        except UserError as error:
            broken.append(str(error))
            return 0

    pixels = sum(parallel(read, listing.pairs, workers, f"check {data.name} {split}"))
    pixels = np.broadcast_to(pixels, len(data.names) + 1)  # 0 if all are broken
    share = 100 * pixels / max(pixels.sum(), 1)
    for name, percent in zip([*data.names, "ignored"], share, strict=True):
        print(f"  {name[:40]:40}{percent:7.2f} %")
    if split == "train" and data.unseen:
        hidden = sum(pixels[data.names.index(name)] for name in data.unseen)
        classes = f"the {len(data.unseen)} unseen classes ({', '.join(data.unseen)})"
        # label_counter raises an error otherwise.
        print(f"  training targets: of {hidden} pixels of {classes}, 0 survive")
    if twice := sorted(digests.keys() & others.keys(), key=digests.get):
        images = plural(len(twice), "image is", "images are")
        example = f"{digests[twice[0]]} is {others[twice[0]]}"
        print(f"  look at: {images} in another split, too: {example}")
    others |= digests
    for line in sorted(broken):
        print(f"  broken: {line}")
    return len(broken)
