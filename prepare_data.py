"""Prepare a data set below the data root, or verify it.

    python prepare_data.py shapes        generates the embedded data set and trains its small CLIP (minutes)
    python prepare_data.py voc           counts what you put there (also coco_stuff)
    python prepare_data.py voc --check   reads it all and prints the label histogram

Running it again changes nothing; killed half-way and run again it finishes.
"""

from pathlib import Path

import numpy as np

from train import train
from zsseg import checkpoint, run, shapes
from zsseg.config import load_config
from zsseg.data import DATASETS, dataset, find_pairs, read_labels, read_picture
from zsseg.run import progress


def main(argv: list[str]) -> None:
    parser = run.Parser(__doc__)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_root()
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--check", action="store_true", help="only verify: counts, unreadable files, label histogram")
    args = parser.parse_args(argv)
    if args.dataset == "shapes" and not args.check:
        prepare_shapes(args.root, args.workers)
    check(args.dataset, args.root, full=args.check)


def prepare_shapes(root: Path, workers: int) -> None:
    folder = root / dataset("shapes").folder
    shapes.generate(folder)
    if (folder / "clip.pt").exists():
        return
    last = folder / "clip" / "last.pt"
    config = load_config(str(Path(__file__).parent / "configs" / "shapes_clip.toml"), [f"data.workers={workers}"])
    train(config, root, last.parent, run.start("cpu"), checkpoint.load(last) if last.exists() else {})
    checkpoint.save(folder / "clip.pt", model=checkpoint.load(last)["model"])


def check(name: str, root: Path, full: bool) -> None:
    """Print the counts of each split; with `full`, read every file (a broken one is a UserError), print the histogram."""
    data = dataset(name)
    unseen = [data.values[data.names.index(n)] for n in data.unseen]
    for split in ("train", "val", "test") if name == "shapes" else ("train", "val"):
        pairs = find_pairs(name, root, split)
        print(f"{name} {split}: {len(pairs)} pictures")
        if not full:
            continue
        lut, names = data.lut(split == "train"), data.training_names if split == "train" else data.names
        pixels = np.zeros(256, np.int64)
        for image, label in progress(pairs, f"check {split}", len(pairs)):
            ids = read_labels(label, lut, read_picture(image).size)
            pixels += np.bincount(ids.ravel(), minlength=256)
            hidden = np.isin(np.array(read_picture(label, None)), unseen)
            if split == "train" and (ids[hidden] != data.ignore).any():
                raise AssertionError(f"{label}: a pixel of an unseen class survived")
        share = 100 * pixels / max(pixels.sum(), 1)
        for i, class_name in enumerate(names):
            print(f"  {class_name:24}{share[i]:7.2f} %")
        print(f"  {'ignored':24}{share[data.ignore]:7.2f} %")
        if split == "train" and data.unseen:
            print(f"  no pixel of the {len(data.unseen)} unseen classes: {', '.join(data.unseen)}")


if __name__ == "__main__":
    run.command(main)
