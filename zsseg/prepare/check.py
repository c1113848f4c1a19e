"""What a data set contains: counts beside the published ones, broken files, the label histogram."""

from zsseg.data import count_labels
from zsseg.datasets import MissingSplit, dataset, find_listing, training_set
from zsseg.utils import UserError, plural


def summarize(config, root, workers, check):
    """Print what each split contains. `check`: read every file and print all problems, which are
    then a UserError.
    """
    data = dataset(config)
    problems = set()
    for split in data.splits:
        try:
            listing = find_listing(config, root, split)
        except MissingSplit:
            if split == config.split:
                raise
            print(f"{data.name} {split}: none")
            continue
        line = f"{data.name} {split}: {plural(len(listing.pairs), 'image')}"
        if split in data.counts:
            line += f" (published: {data.counts[split]})"
        if listing.unpaired:
            line += f", {plural(len(listing.unpaired), 'file')} without a partner left out"
        print(line)
        if check or split == "train":  # training needs it
            counts, broken = count_labels(config, root, split, workers, check)
            if check:
                broken += [f"{file} has no partner" for file in listing.unpaired]
                print_shares(config, split, counts.clip(0).sum(0))
            for line in sorted({*broken}):
                print(f"  broken: {line}")
            problems.update(broken)
    if problems:
        why = f"{plural(len(problems), 'problem')} (listed above)"
        raise UserError(f"data set {data.name}", why, "replace these files")


def print_shares(config, split, pixels):
    """The share of every class, given the pixels of each and, last, of none, int64 [C + 1]."""
    data = training_set(config)
    share = 100 * pixels / max(pixels.sum(), 1)
    for name, percent in zip([*data.names, "ignored"], share, strict=True):
        print(f"  {name[:40]:40}{percent:7.2f} %")
    if split == "train" and data.unseen:
        hidden = sum(pixels[data.names.index(name)] for name in data.unseen)
        count = len(data.unseen)
        # count_labels raises an error otherwise.
        print(
            f"  training targets: of {hidden} pixels of the {count} unseen"
            f" class{'es' * (count != 1)} ({', '.join(data.unseen)}), 0 survive"
        )
