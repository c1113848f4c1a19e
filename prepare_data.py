"""Prepare a data set below the data root, or verify it.

    python prepare_data.py shapes        draws the synthetic data set and trains its small CLIP
    python prepare_data.py voc           downloads Pascal VOC 2012 and SBD, computes "trainaug"
    python prepare_data.py voc --check   reads every file: counts, broken files, label histogram
    python prepare_data.py folder --config my.toml --check   the same for a data set of your own

Files below the root in their official layout are used as they are; else they are downloaded where
that is allowed (to $ZSSEG_CACHE, else ~/.cache/zsseg) or one line says what to put where. Running
it again changes nothing; killed half-way and run again it finishes.
"""

from zsseg.config import DataConfig, load_config
from zsseg.utils import UserError, command, did_you_mean, parser, read_table


def main(argv):
    args = parse(argv)
    config = load_config(args.config).data if args.config else DataConfig(name=args.dataset)
    if config.name != args.dataset:
        todo = f'give a file with [data] name = "{args.dataset}"'
        raise UserError("--config", f"describes {config.name}", todo)

    # These take seconds to import.
    from zsseg.prepare import check, official, shapes, shapes_clip

    if args.dataset == "shapes" and not args.check:
        folder = args.root / "shapes"
        shapes.generate(folder, args.workers)
        shapes_clip.train_small_clip(folder)
    elif args.dataset != "folder" and not args.check:
        official.prepare(args.dataset, args.root, args.workers, args.train)
    check.summarize(config, args.root, args.workers, args.check)


def parse(argv):
    options = parser(__doc__)
    names = [*read_table("datasets.toml"), "folder"]
    add = options.add_argument
    add("dataset", metavar="DATASET", help=f"one of {', '.join(names)}")
    add("--workers", type=int, default=4, help="threads that read and convert (4)")
    add("--train", action="store_true", help="training images, too, if only the test split exists")
    add("--check", action="store_true", help="only verify: counts, broken files, label histogram")
    args = options.parse_args(argv)
    if args.dataset not in names:
        todo = did_you_mean(args.dataset, names, f"choose one of {', '.join(names)}")
        raise UserError("command line", f"no data set {args.dataset}", todo)
    if args.workers < 0:
        options.error(f"--workers is {args.workers}, not 0 or more")
    return args


if __name__ == "__main__":
    command(main)
