"""Prepare a data set below the data root, or verify it.

    python prepare_data.py shapes        draws the synthetic data set and trains its small CLIP
    python prepare_data.py voc           downloads Pascal VOC 2012 and SBD, computes "trainaug"
    python prepare_data.py voc --check   reads every file: counts, broken files, label histogram
    python prepare_data.py folder --config my.toml --check   the same for a data set of your own

Files below the root in their official layout are used as they are; else they are downloaded where
that is allowed (to $ZSSEG_CACHE, else ~/.cache/zsseg) or one line says what to put where. Running
it again changes nothing; killed half-way and run again it finishes.
"""

import hashlib
import shutil
from pathlib import Path

import numpy as np

from train import train
from zsseg import checkpoint, command_line
from zsseg.prepare import convert, shapes
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
from zsseg.label_statistics import count_split, label_statistics
from zsseg.utils import UserError, cache_dir, path_of, several


def main(argv: list[str]) -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument(
        "dataset",
        choices=[*DATASETS, "folder"],
        help="ade20k_full and cityscapes require a registration",
    )
    parser.add_argument(
        "--config", metavar="FILE", type=path_of, help="TOML file that describes data set folder"
    )
    parser.add_root()
    parser.add_argument("--workers", type=int, default=4, help="threads that read and convert (4)")
    parser.add_argument(
        "--train",
        action="store_true",
        help="get the training images, too, where only the test split exists",
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

    if args.dataset == "shapes" and not args.check:
        prepare_shapes(args.root, args.workers)
    elif args.dataset != "folder" and not args.check:
        prepare(args.dataset, args.root, args.workers, args.train)
    summarize(config, args.root, args.workers, args.check)


def prepare_shapes(root: Path, workers: int) -> None:
    """Draw the synthetic data set and train its CLIP, each unless it is complete."""
    folder = root / dataset("shapes").folders[0]
    shapes.generate(folder)
    if (folder / "clip.pt").exists():
        return
    out = folder / "clip"
    config_file = Path(__file__).parent / "configs" / "shapes_clip.toml"
    config = load_config(str(config_file), [f"data.workers={workers}"])
    resume = (out / "last.pt").exists() or (out / "previous.pt").exists()
    try:
        content = load_last(out) if resume else {}
        finished = train(config, root, out, init_distributed("cpu"), content)
    finally:
        release(out)
    if not finished:
        raise SystemExit("run it again to go on")
    checkpoint.save(folder / "clip.pt", model=checkpoint.load(out / "last.pt")["model"])


def prepare(name: str, root: Path, workers: int, train: bool) -> None:
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
    if name == "voc":
        obtain(data.archives[0], name, root, folder)
        folders = [root / path for path in ("SBD", "sbd", "benchmark_RELEASE/dataset")]
        sbd = next((f for f in [folder / "SBD", *folders] if (f / "cls").is_dir()), None)
        if sbd is None:
            sbd = folder / "SBD"
            obtain(data.archives[1], name, root, folder)
        convert.voc_trainaug(folder, sbd, workers)
    else:
        for archive in data.archives:
            obtain(archive, name, root, folder)
    if name == "pcontext":
        convert.pascal_context(folder, workers)
    if not has_files(name, root, "val"):
        todo = "move it away, or put in the official files"
        raise UserError(f"data set {name}", f"{folder} is not complete", todo)


def has_files(name: str, root: Path, split: str) -> bool:
    """Whether most of the files of a split exist (--check names the others)."""
    try:
        pairs = find_pairs(name, root, split)
    except MissingSplit:
        return False
    return sum(image.exists() and label.exists() for image, label in pairs) > len(pairs) / 2


def obtain(archive: Archive, name: str, root: Path, folder: Path) -> None:
    """Unpack an archive from the root or the cache; if it is in neither, download it first."""
    if all((folder / path).exists() for _, path in archive.take):
        return
    what = f"data set {name}, {archive.file}"
    file = cache_dir() / "downloads" / archive.file
    given = next((p for p in (root / archive.file, folder / archive.file) if p.is_file()), None)
    if given:
        file = given
        check_file(file, archive.checksum, what, archive.bytes, delete=False)
    elif archive.urls:
        fetch(archive.urls, file, archive.checksum, what, archive.bytes)
    elif not file.exists():
        why = f"no {archive.file} in {root}, nothing in {folder}"
        raise UserError(f"data set {name}", why, dataset(name).register)

    inside, path = archive.take[0]
    if inside:
        unpack(file, archive.take, folder, what, verified=bool(archive.checksum))
    elif file != folder / path:  # a single file
        with atomic_write(folder / path) as temporary:
            shutil.copyfile(file, temporary)


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
    if count := len(listing.unpaired):
        are = "is" if count == 1 else "are"
        files = several(count, "file")
        text += f"; {files} without a partner {are} left out (--check names them)"
    return text


def summarize(config: DataConfig, root: Path, workers: int, check: bool) -> None:
    """Print what each split contains. `check`: read every file and print all problems; broken files
    and files without a partner are then a UserError.
    """
    data = dataset(config)
    problems = 0
    contents = {}
    for split in data.splits:
        try:
            listing = find_listing(config, root, split)
        except UserError as error:
            if isinstance(error, MissingSplit) and split != config.split:
                if split == "train":
                    fetch = "" if data.name == "folder" else "; --train fetches it"
                    print(f"{data.name} train: none (only training needs it{fetch})")
                continue
            if not check:
                raise
            print(f"{data.name} {split}:\n  broken: {error}")
            problems += 1
            continue
        print(describe(data, listing, split), flush=True)
        if check:
            problems += check_split(config, split, listing, workers, contents)
        elif split == "train" and data.unseen:
            count_training_images(config, root, workers)
    if problems:
        have = "has" if problems == 1 else "have"
        files = several(problems, "file is", "files are")
        why = f"{files} broken or {have} no partner (listed above)"
        raise UserError(f"data set {config.name}", why, "replace them")


def count_training_images(config: DataConfig, root: Path, workers: int) -> None:
    """Count the labels of the training split now, since training needs the statistics."""
    statistics = label_statistics(config, root, "train", workers)
    if count := len(statistics.broken):
        why = f"{count} broken label maps, the first: {statistics.broken[0]}"
        raise UserError(f"data set {config.name}", why, "--check")
    images = statistics.images_with(dataset(config).trained)
    print(f"  {len(images)} images show a class that is trained on")


def check_split(
    config: DataConfig, split: str, listing: Listing, workers: int, contents: dict[bytes, Path]
) -> int:
    """Print what is in a split; the number of files that are broken or have no partner.

    `contents`: SHA-256 of an image -> its file, of the splits before; this split's are added.
    """
    data = dataset(config)
    digests = {}
    name = f"check {data.name} {split}"
    statistics = count_split(listing.pairs, data, config.exif_turn, workers, name, digests)
    pixels = statistics.histogram(len(data.names))
    share = 100 * pixels / max(pixels.sum(), 1)
    for label, percent in zip([*data.names, "ignored"], share, strict=True):
        print(f"  {label[:40]:40}{percent:7.2f} %")
    if split == "train" and data.unseen:
        values = statistics.values
        unseen = np.isin(values, [data.values[data.names.index(name)] for name in data.unseen])
        survive = unseen & (data.lut(training=True)[values] != data.ignore)
        total, left = (statistics.value_pixels[mask].sum() for mask in (unseen, survive))
        targets = f"{len(listing.pairs) - len(statistics.broken)} training targets"
        classes = f"{len(data.unseen)} unseen classes ({', '.join(data.unseen)})"
        print(f"  {targets}: of {total} pixels of the {classes}, {left} survive")

    remarks = statistics.possible_mistakes(data, split) + listing.remarks + listing.left_out(split)
    shown = len(statistics.images_with(list(range(len(data.names)))))
    if empty := len(listing.pairs) - shown - len(statistics.broken):
        remarks.append(f"{several(empty, 'label map shows', 'label maps show')} no class at all")
    if twice := sorted(digests.keys() & contents.keys(), key=digests.get):
        example = f"{digests[twice[0]]} is {contents[twice[0]]}"
        images = several(len(twice), "image is", "images are")
        remarks.append(f"{images} in another split, too: {example}")
    if hidden := {*listing.hidden}:
        files = several(len(hidden), "hidden file or folder", "hidden files and folders")
        remarks.append(f"{files} left out: {listing.hidden[0]}")
    contents |= digests

    broken = [str(error) for error in listing.duplicates]
    broken += [f"{file} has no partner" for file in listing.unpaired]
    broken += statistics.broken.tolist()
    for line in remarks:
        print(f"  look at: {line}")
    for line in sorted(broken):
        print(f"  broken: {line}")
    return len(broken)


if __name__ == "__main__":
    command_line.command(main)
