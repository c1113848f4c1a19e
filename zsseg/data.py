"""What the networks read: test images, the endless streams of training samples, label counts.

A sample of a training stream is a function of (seed, sample number) only, so resuming
needs one integer.
"""

import atexit
import contextlib
import functools
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, DataLoader, Dataset

from zsseg.datasets import dataset, find_listing, find_pairs, training_set
from zsseg.images import network_inputs, read_image, read_pair, read_values, test_size
from zsseg.matcher import Targets
from zsseg.utils import (
    SIGNALS,
    UserError,
    atomic_write,
    digest,
    join_some,
    mix_seed,
    parallel,
    plural,
    warn,
)

MAX_BROKEN = 100  # samples in a row that may be broken before training stops


class TestImages(Dataset):
    """Item i: (image uint8 [3, h, w] at each input size, class ids uint8 or int32 [H, W] at the
    image's own size, name), the name being the file's without its ending, with folders if need be.

    The shorter edge is each of `edges`, or else `data.test_short_edge`. `lut`: label value -> class
    id.
    """

    def __init__(self, data_config, root, split, edges=()):
        self.config = data_config
        self.lut = dataset(data_config).lut()
        self.edges = edges
        self.pairs = find_pairs(data_config, root, split)
        files = [image.with_suffix("") for image, _ in self.pairs]
        self.names = [file.name for file in files]
        if len({*self.names}) < len(files):
            base = os.path.commonpath([file.parent for file in files])
            self.names = [os.path.relpath(file, base) for file in files]

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        image, labels = read_pair(*self.pairs[i], self.lut, self.config.exif_turn)
        inputs = network_inputs(image, self.config, self.edges)
        return inputs, torch.from_numpy(labels), self.names[i]


# --- training samples


def augment(image, labels, data_config, ignore, rng):
    """Training augmentation: RGB image and class ids [H, W] -> uint8 [3, S, S] and ids [S, S],
    S = data.crop.

    Resize of the short edge, random crop, colour jitter, flip, padding at the right and bottom.
    """
    S = data_config.crop
    W, H = image.size
    width, height = test_size(W, H, rng.choice(data_config.short_edges), data_config.max_size)
    h = min(height, S)
    w = min(width, S)
    top = rng.integers(height - h + 1)
    left = rng.integers(width - w + 1)

    # Only the crop is resized. Pillow's filter still reads the pixels around it, so the result is
    # the same as for the full image.
    box = (left * W / width, top * H / height, (left + w) * W / width, (top + h) * H / height)
    image = image.resize((w, h), Image.Resampling.BILINEAR, box)
    # Labels: `nearest` of F.interpolate, as in the original, whose roundings are left out
    rows = np.arange(top, top + h) * H // height
    cols = np.arange(left, left + w) * W // width
    if data_config.color_jitter:
        image = ssd_jitter(image, rng)

    pixels = np.full((3, S, S), 128, np.uint8)
    mask = np.full((S, S), ignore, labels.dtype)
    step = -1 if rng.random() < 0.5 else 1  # flip
    pixels[:, :h, :w] = np.asarray(image)[:, ::step].transpose(2, 0, 1)
    mask[:h, :w] = labels[np.ix_(rows, cols[::step])]
    return torch.from_numpy(pixels), torch.from_numpy(mask)


def ssd_jitter(image, rng):
    """SSD's colour jitter: brightness, contrast, saturation and hue, each with p = 0.5; contrast
    comes before or after saturation and hue with equal probability.
    """
    *drawn, contrast_first = rng.random(5) < 0.5
    brightness, contrast, saturation, hue = drawn * rng.uniform(-1, 1, 4)  # 0: none
    values = np.arange(256.0)
    hues = (values + round(256 * 18 / 360 * hue)) % 256
    colours = [hues, values * (1 + saturation / 2), values]
    steps = [
        (brightness, "RGB", 3 * [values + 32 * brightness]),
        (contrast, "RGB", 3 * [values * (1 + contrast / 2)]),
    ]
    steps.insert(1 + contrast_first, (saturation or hue, "HSV", colours))  # as SSD does, in 8 bits
    for amount, space, tables in steps:
        if amount:
            table = np.concatenate(tables).clip(0, 255).astype(np.uint8).tolist()
            image = image.convert(space).point(table)
    return image.convert("RGB")


class EndlessSamples(Dataset):
    """The base of an endless stream: sample n shows one of `items`, tuples of an image file and
    more, in a fresh order every epoch. Subclasses set `items` and `seed` and define `load(n)`.
    """

    def __len__(self):
        return len(self.items)

    def item(self, n):
        """What sample n shows."""
        epoch, i = divmod(n, len(self.items))
        return self.items[permutation(mix_seed(self.seed, 1, epoch), len(self.items))[i]]

    def source(self, n):
        """The image of sample n, for messages."""
        return str(self.item(n)[0])

    def __getitem__(self, n):
        """Sample n or, if its files are broken, which is said, the next that can be read: still a
        function of n only. Too many broken ones in a row raise the last one's UserError.
        """
        for k in range(n, n + MAX_BROKEN):
            try:
                return self.load(k)
            except UserError as error:
                last = error
                print_once(f"warning: replaced by the next sample: {error}")
        raise last


# On any process: only the one whose sample it is meets a broken file.
print_once = functools.cache(print)


@functools.lru_cache(maxsize=2)
def permutation(seed, length):
    """The order of an epoch, cached until the next one: int64 [length]."""
    return np.random.default_rng(seed).permutation(length)


class TrainImages(EndlessSamples):
    """The training images, augmented; those that show no class that is trained on are left out.

    Item: (image uint8 [3, S, S], ids among the training classes [S, S], classes present int64 [T]).
    `pseudo`: a folder of label maps to train on instead of the data set's.
    """

    def __init__(self, config, root, pseudo=None):
        self.config = config.data
        self.seed = config.train.seed
        self.data = training_set(config.data)
        images = TestImages(self.config, root, "train")
        if pseudo is None:
            self.lut = self.data.lut(training=True)
            self.items = [*compress(images.pairs, shown_classes(config, root).any(1))]
        else:  # label maps of class ids, by `zsseg.self_training`
            self.lut = np.arange(self.data.ignore + 1, dtype=self.data.lut().dtype)
            named = zip(images.pairs, images.names, strict=True)
            self.items = [(image, pseudo / f"{name}.png") for (image, _), name in named]

    def load(self, n):
        image, labels = read_pair(*self.item(n), self.lut, self.config.exif_turn)
        rng = np.random.default_rng(mix_seed(self.seed, 2, n))
        pixels, mask = augment(image, labels, self.config, self.data.ignore, rng)
        classes = mask.unique().long()
        return pixels, mask, classes[classes != self.data.ignore]


def collate(samples):
    """Images uint8 [B, 3, S, S] and their targets, padded to the largest number of classes T."""
    images, labels, classes = zip(*samples, strict=True)
    counts = torch.tensor([*map(len, classes)])
    classes = pad_sequence(classes, batch_first=True)  # [B, T]
    return torch.stack(images), Targets(torch.stack(labels), classes, counts)


# --- label counts


def count_labels(data_config, root, split, workers=4, check=False):
    """Pixels of each class and, last, of no class in every label map of a split, int64 [n, C + 1],
    -1 for a map that cannot be read; and the errors of those.

    Counted once, and again when the data set or a label map has changed; with `check` always, and
    the images are read, too. AssertionError if training would see a pixel of an unseen class.
    """
    data = dataset(data_config)
    listing = find_listing(data_config, root, split)
    version = digest(data, [label for _, label in listing.pairs])
    cache = listing.folder / f".labels.{split.replace('/', '.')}.npz"
    with contextlib.suppress(Exception), np.load(cache) as content:  # broken ones raise anything
        if str(content["version"]) == version and not check:
            return content["counts"], content["errors"].tolist()
    C = len(data.names)
    full = data.lut()
    leaks = (data.lut(training=True) != data.ignore) & ~np.isin(full, data.trained)  # none
    errors = []

    def count(pair):
        image, label = pair
        try:
            size = read_image(image, data_config.exif_turn).size if check else None
            values = read_values(label, data.bits, size)
        except UserError as error:
            gone = [file.parent for file in pair if not file.parent.is_dir()]
            errors.append(f"no folder {gone[0]}" if gone else str(error))
            return np.full(C + 1, -1)
        if leaks[values].any():
            raise AssertionError(f"{label}: a pixel of an unseen class survives")
        # The ignore value is the largest.
        return np.bincount(np.minimum(full[values], C).ravel(), minlength=C + 1)

    counts = np.stack([*parallel(count, listing.pairs, workers, f"count {data.name} {split}")])
    if not check:
        # The folder may be read-only.
        with contextlib.suppress(UserError), atomic_write(cache) as path, open(path, "wb") as file:
            np.savez_compressed(file, version=version, counts=counts, errors=np.array(errors, str))
    return counts, errors


def shown_classes(config, root):
    """Whether each training image shows each class that is trained on, bool [n, T]; says what is
    left out and which classes no image shows. Raises UserError if that are all.
    """
    counts, errors = count_labels(config.data, root, "train", config.data.workers)
    if errors:
        warn(f"{plural(len(errors), 'label map')} left out: {join_some(errors, 3)}")
    data = training_set(config.data)
    shown = counts[:, data.trained] > 0
    absent = [*compress(data.training_names, ~shown.any(0))]
    if not shown.any():
        why = "no training image shows a class that is trained on"
        raise UserError(f"data set {data.name}", why, "check data.values")
    if absent:
        count = f"{len(absent)} of {len(data.trained)} classes"
        warn(f"no pixel in train of {count}: {join_some(absent, 20)}")
    return shown


# --- loading


# Kill workers when the main process ends: they block its signals, and multiprocessing's own
# handler, which runs after this one, would wait for them forever.
atexit.register(lambda: [child.kill() for child in multiprocessing.active_children()])


@dataclass
class Batches(Dataset):
    """Batches by list of sample numbers. An item is a UserError if a sample cannot be read: worker
    processes cannot raise it.
    """

    samples: Dataset
    collate_fn: Callable

    def __getitem__(self, numbers):
        try:
            return self.collate_fn([self.samples[n] for n in numbers])
        except UserError as error:
            return error


def batches(samples, numbers, batch_size, workers, collate_fn=list):
    """Batches of the samples with these numbers, in order, as `collate_fn` makes them of a list;
    with `batch_size` None the samples themselves.

    A broken sample raises its UserError. Workers ignore the signals that ask a run to stop: only
    the main process, which still needs the batches, handles a scheduler's signals to all.
    """
    loader = DataLoader(
        Batches(samples, collate_fn),
        batch_size=None,
        sampler=BatchSampler(numbers, batch_size or 1, drop_last=False),
        num_workers=min(workers, os.cpu_count()),
        pin_memory=torch.cuda.is_available(),
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    iterator = iter(loader)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        for item in iterator:
            if isinstance(item, UserError):
                raise item
            yield item if batch_size else item[0]
    finally:
        del iterator  # left to the garbage collection, its workers would end 10 seconds later
