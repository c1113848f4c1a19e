"""Prepare a data set below the data root, or verify it.

    python prepare_data.py shapes        draws the synthetic data set and trains its small CLIP
    python prepare_data.py voc           downloads Pascal VOC 2012 and SBD, computes "trainaug"
    python prepare_data.py voc --check   reads every file: counts, broken files, label histogram
    python prepare_data.py folder --config my.toml --check   the same for a data set of your own

What lies below the root in its official layout is used as it is; else it is downloaded where that
is allowed (to $ZSSEG_CACHE, else ~/.cache/zsseg) or one line says what to put where. Running it
again changes nothing; killed half-way and run again it finishes.
"""

import hashlib
from pathlib import Path

import numpy as np

from train import train
from zsseg import checkpoint, command_line, convert, shapes
from zsseg.config import DataConfig, load_config
from zsseg.datasets import (
    DATASETS,
    Archive,
    DataSet,
    Listing,
    MissingSplit,
    dataset,
    find_listing,
    find_pairs,
)
from zsseg.distributed import init_distributed
from zsseg.download import check_file, fetch, unpack
from zsseg.faults import load_last
from zsseg.files import atomic_write, release
from zsseg.images import read_image, read_labels, read_values
from zsseg.label_statistics import (
    Count,
    LabelStatistics,
    count_classes,
    count_split,
    label_statistics,
)
from zsseg.utils import UserError, cache_dir, path_of, several


def main(argv: list[str]) -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument(
        "dataset",
        choices=[*DATASETS, "folder"],
        help="ade20k_full and cityscapes want a registration",
    )
    parser.add_argument(
        "--config", metavar="FILE", type=path_of, help="TOML file that describes data set folder"
    )
    parser.add_root()
    parser.add_argument("--workers", type=int, default=4, help="threads that read and convert (4)")
    parser.add_argument(
        "--train",
        action="store_true",
        help="get the training images, too, where only the test split is there",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only verify: counts, unreadable files, label histogram",
    )
    args = parser.parse_args(argv)
    config = load_config(args.config).data if args.config else DataConfig(name=args.dataset)
    if config.name != args.dataset or (args.dataset == "folder" and not args.config):
        why = f"describes {config.name}" if args.config else "is missing"
        raise UserError("--config", why, f'give a file with [data] name = "{args.dataset}"')
    if args.check:
        check(config, args.root, args.workers)
        return
    if args.dataset == "shapes":
        prepare_shapes(args.root, args.workers)
    elif args.dataset != "folder":
        prepare(args.dataset, args.root, args.workers, args.train)
    summarize(config, args.root, args.workers)


def prepare_shapes(root: Path, workers: int) -> None:
    folder = root / dataset("shapes").folders[0]
    shapes.generate(folder)
    if (folder / "clip.pt").exists():
        return
    last = folder / "clip" / "last.pt"
    config = load_config(
        str(Path(__file__).parent / "configs" / "shapes_clip.toml"), [f"data.workers={workers}"]
    )
    there = last.exists() or last.with_name("previous.pt").exists()
    try:
        finished = train(
            config,
            root,
            last.parent,
            init_distributed("cpu"),
            load_last(last.parent) if there else {},
        )
    finally:
        release(last.parent)
    if not finished:
        raise SystemExit("run it again to go on")
    checkpoint.save(folder / "clip.pt", model=checkpoint.load(last)["model"])


def prepare(name: str, root: Path, workers: int, train: bool) -> None:
    """Bring the official files into the layout that is read, unless it is there.

    A test split alone is taken as it is (evaluation needs no more) unless `train` asks for both.
    """
    data = dataset(name)
    folder = data.folder(root)
    if name == "ade20k_full" and (folder / "images").is_dir():
        convert.ade20k_full(folder, workers, train)  # skips what is there
    needed = (
        ["train", "val"] if train or (data.lists and (folder / "train.txt").exists()) else ["val"]
    )
    if all(is_there(name, root, split) for split in needed):
        return
    if name == "voc":
        obtain(data.archives[0], name, root, folder)
        places = (
            folder / "SBD",
            root / "SBD",
            root / "sbd",
            root / "benchmark_RELEASE" / "dataset",
        )
        sbd = next((p for p in places if (p / "cls").is_dir()), places[0])
        if sbd == places[0]:
            obtain(data.archives[1], name, root, folder)
        convert.voc_trainaug(folder, sbd, workers)
    elif not data.archives:
        raise UserError(f"data set {name}", f"nothing in {folder}", data.register)
    else:
        for archive in data.archives:
            obtain(archive, name, root, folder)
    if name == "pcontext":
        convert.pascal_context(folder, workers)
    if not is_there(name, root, "val"):
        raise UserError(
            f"data set {name}",
            f"{folder} is not complete",
            "move it away, or put in the official files",
        )


def is_there(name: str, root: Path, split: str) -> bool:
    """The split has files; where they are listed, most of them are there (--check names the
    others).
    """
    try:
        pairs = find_pairs(name, root, split)
    except MissingSplit:
        return False
    files = {
        f
        for folder in {f.parent for pair in pairs for f in pair}
        if folder.is_dir()
        for f in folder.iterdir()
    }
    return sum(image in files and label in files for image, label in pairs) > len(pairs) / 2


def obtain(archive: Archive, name: str, root: Path, folder: Path) -> None:
    """Unpack an archive that lies below the root or in the cache, else download it first."""
    if all((folder / outside).exists() for _, outside in archive.take):
        return
    what, cached = (f"data set {name}, {archive.file}", cache_dir() / "downloads" / archive.file)
    file = next((p for p in (root / archive.file, folder / archive.file) if p.is_file()), cached)
    if file != cached:
        check_file(file, archive.checksum, what, archive.bytes, delete=False)
    elif archive.urls:
        fetch(archive.urls, file, archive.checksum, what, archive.bytes)
    elif not file.exists():
        raise UserError(
            f"data set {name}",
            f"no {archive.file} in {root}, nothing in {folder}",
            dataset(name).register,
        )
    inside, outside = archive.take[0]
    if inside:
        unpack(file, archive.take, folder, what, verified=bool(archive.checksum))
    elif file != folder / outside:  # a single file
        with atomic_write(folder / outside) as temporary:
            temporary.write_bytes(file.read_bytes())


def present(config: DataConfig, root: Path) -> list[str]:
    """The splits that are there; the one that is measured on must be."""
    splits = []
    for split in dataset(config).splits:
        try:
            find_listing(config, root, split)
            splits.append(split)
        except MissingSplit:
            if split == config.split:
                raise
            if split == "train":
                fetched = "" if config.name == "folder" else "; --train fetches it"
                print(f"{config.name} train: none (only training needs it{fetched})")
    return splits


def describe(data: DataSet, listing: Listing, split: str) -> str:
    """Counts of a split beside the published ones."""
    pairs = listing.pairs
    text = f"{data.name} {split}: {len(pairs)} images"
    if published := data.counts.get(split):
        text += f" (published: {published})"
        if len(pairs) == published and split in data.digests:
            digest = hashlib.sha256(
                "".join(sorted(f"{p.stem}\n" for p, _ in pairs)).encode()
            ).hexdigest()
            text += (
                ", the published ids"
                if digest == data.digests[split]
                else ", but NOT the published ids"
            )
    if count := len(listing.unpaired):
        text += (
            f"; {several(count, 'file')} without a partner {'is' if count == 1 else 'are'} left "
            f"out (--check names them)"
        )
    return text


def summarize(config: DataConfig, root: Path, workers: int) -> None:
    """Print what is there; count the labels of the training split, which training needs."""
    data = dataset(config)
    for split in present(config, root):
        text = describe(data, find_listing(config, root, split), split)
        if split == "train" and data.unseen:
            statistics = label_statistics(config, root, split, workers)
            if count := len(statistics.broken):
                why = f"{count} broken label maps, the first: {statistics.broken[0]}"
                raise UserError(f"data set {data.name}", why, "--check")
            text += f"; {len(statistics.images_with(data.trained))} show a class that is trained on"
        print(text)


def check(config: DataConfig, root: Path, workers: int) -> None:
    """Read every file of every split and print what is wrong, all of it; broken and lonely files
    are then a UserError.
    """
    data, problems, contents = dataset(config), 0, {}
    for split in data.splits:
        try:
            listing = find_listing(config, root, split)
        except UserError as error:
            if split == config.split or not isinstance(error, MissingSplit):
                print(f"{data.name} {split}:\n  broken: {error}")
                problems += 1
            elif split == "train":
                print(f"{data.name} train: none (only training needs it)")
            continue
        problems += check_split(config, root, split, listing, workers, contents)
    if problems:
        have = "has" if problems == 1 else "have"
        why = (
            f"{several(problems, 'file is', 'files are')} broken or {have} no partner (listed "
            f"above)"
        )
        raise UserError(f"data set {config.name}", why, "replace them")


def check_split(
    config: DataConfig,
    root: Path,
    split: str,
    listing: Listing,
    workers: int,
    contents: dict[bytes, str],
) -> int:
    """Print what is in a split; the number of files that are broken or have no partner.

    `contents`: what the images of other splits hold, as digests.
    """
    data = dataset(config)
    tables = data.lut(), data.lut(training=True)
    unseen = [data.values[data.names.index(n)] for n in data.unseen]
    broken = [str(error) for error in listing.duplicates] + [
        f"{file} has no partner" for file in listing.unpaired
    ]
    # Of each label map: pixels of unseen classes, and how many of them a target would show.
    hidden, survivors = ([], [])
    digests: dict[bytes, str] = {}

    def count(pair: tuple[Path, Path]) -> Count:
        size = read_image(pair[0], turn=config.exif_turn).size
        with open(pair[0], "rb") as file:
            digests[hashlib.file_digest(file, "sha256").digest()] = str(pair[0])
        found = count_classes(pair, data, tables, size, config.exif_turn)
        # By the function that training reads with, against the values in the file.
        values = read_values(pair[1], data.bits)
        targets = read_labels(pair[1], tables[1], size)[np.isin(values, unseen)]
        hidden.append(len(targets))
        survivors.append(int((targets != data.ignore).sum()))
        return found

    statistics = count_split(listing.pairs, count, workers, f"check {data.name} {split}")
    broken += statistics.broken.tolist()
    pixels = statistics.histogram(len(data.names))
    print(describe(data, listing, split))
    share = 100 * pixels / max(pixels.sum(), 1)
    for label, percent in zip([*data.names, "ignored"], share, strict=True):
        print(f"  {label[:40]:40}{percent:7.2f} %")
    if split == "train" and unseen:
        print(
            f"  {len(hidden)} training targets: of {sum(hidden)} pixels of the {len(unseen)} "
            f"unseen classes "
            f"({', '.join(data.unseen)}), {sum(survivors)} survive"
        )
    remarks = remarks_on(data, split, listing, statistics, digests, contents)
    contents |= digests
    for line in remarks:
        print(f"  look at: {line}")
    for line in sorted(broken):
        print(f"  broken: {line}")
    return len(broken)


def remarks_on(
    data: DataSet,
    split: str,
    listing: Listing,
    statistics: LabelStatistics,
    digests: dict[bytes, str],
    contents: dict[bytes, str],
) -> list[str]:
    """What may be a mistake in a split, a line each; `digests`: its images' contents."""
    empty = (
        len(listing.pairs)
        - len(statistics.images_with(list(range(len(data.names)))))
        - len(statistics.broken)
    )
    twice = sorted(digests.keys() & contents.keys(), key=digests.get)
    remarks = statistics.possible_mistakes(data, split) + listing.remarks + listing.left_out(split)
    if empty:
        remarks.append(f"{several(empty, 'label map shows', 'label maps show')} no class at all")
    if twice:
        example = f"{digests[twice[0]]} is {contents[twice[0]]}"
        remarks.append(
            f"{several(len(twice), 'image is', 'images are')} in another split, too: {example}"
        )
    if listing.hidden:
        count = several(len({*listing.hidden}), "hidden file or folder", "hidden files and folders")
        remarks.append(f"{count} left out: {listing.hidden[0]}")
    return remarks


if __name__ == "__main__":
    command_line.command(main)
