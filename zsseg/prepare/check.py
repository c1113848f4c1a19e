"""What a data set contains: counts beside the published ones, broken files, the label histogram."""

from zsseg.data import count_labels
from zsseg.datasets import MissingSplit, dataset, find_listing
from zsseg.utils import UserError, plural


def summarize(config, root, workers, check):
    """Print what each split contains. `check`: read every file and print all problems, which are
    then a UserError.
    """
    data = dataset(config)
    problems = []
    for split in data.splits:
        try:
            listing = find_listing(config, root, split)
        except MissingSplit as error:
            if split == config.split:
                raise error
            print(f"{data.name} {split}: none")
            continue
        line = f"{data.name} {split}: {len(listing.pairs)} images"
        if split in data.counts:
            line += f" (published: {data.counts[split]})"
        if alone := len(listing.unpaired):
            line += f", {plural(alone, 'file')} without a partner left out"
        print(line, flush=True)
        if check:
            problems += check_split(config, root, split, listing, workers)
        elif split == "train":
            _, broken = count_labels(config, root, "train", workers)  # training needs it
            problems += broken
            for line in broken:
                print(f"  broken: {line}")
    if problems:
        why = f"{plural(len(problems), 'problem')} (listed above)"
        raise UserError(f"data set {data.name}", why, "replace these files")


def check_split(config, root, split, listing, workers):
    """Read every file of a split and print what it contains. Returns a line for each file that is
    broken or has no partner.
    """
    data = dataset(config)
    counts, broken = count_labels(config, root, split, workers, check=True)
    broken += [f"{file} has no partner" for file in listing.unpaired]
    pixels = counts.clip(0).sum(0)
    share = 100 * pixels / max(pixels.sum(), 1)
    for name, percent in zip([*data.names, "ignored"], share, strict=True):
        print(f"  {name[:40]:40}{percent:7.2f} %")
    if split == "train" and data.unseen:
        hidden = sum(pixels[data.names.index(name)] for name in data.unseen)
        classes = f"the {len(data.unseen)} unseen classes ({', '.join(data.unseen)})"
        # count_labels raises an error otherwise.
        print(f"  training targets: of {hidden} pixels of {classes}, 0 survive")
    for line in sorted(broken):
        print(f"  broken: {line}")
    return broken
