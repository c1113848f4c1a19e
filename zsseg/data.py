"""What the networks read: test images and the endless streams of training samples.

A sample of a training stream is a function of (seed, sample number) only, so resuming
needs one integer.
"""

import atexit
import functools
import multiprocessing.util
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from zsseg.config import Config, DataConfig
from zsseg.datasets import dataset, find_pairs, training_set
from zsseg.images import read_image, read_labels
from zsseg.label_statistics import LabelStatistics, label_statistics
from zsseg.matcher import Targets
from zsseg.utils import SIGNALS, UserError, left_out, mix_seed, print_main, several

MAX_REPLACEMENTS = 100  # samples in a row that may be broken before training stops


def to_tensor(image: Image.Image | np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> [3, H, W], contiguous."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def test_size(width: int, height: int, short: int, longest: int) -> tuple[int, int]:
    """(width, height) with the short edge resized to `short`, the long one to at most `longest`
    (detectron2's rule).
    """
    scale = short / min(width, height)
    w, h = (short, scale * height) if width <= height else (scale * width, short)
    if max(w, h) > longest:
        w, h = (x * longest / max(w, h) for x in (w, h))
    return max(int(w + 0.5), 1), max(int(h + 0.5), 1)


def network_inputs(
    image: Image.Image, config: DataConfig, short_edges: list[int] = ()
) -> list[Tensor]:
    """uint8 [3, h, w] at each network-input size: with these shorter edges, one of
    `data.test_short_edge` where there are none.
    """
    edges = short_edges or [config.test_short_edge]
    sizes = [test_size(*image.size, edge, config.max_size) for edge in edges]
    return [to_tensor(image.resize(size, Image.Resampling.BILINEAR)) for size in sizes]


class TestImages(Dataset):
    """Item i: (image uint8 [3, h, w] at each input size, class ids uint8 or int32 [H, W] at the
    image's own size, name).

    The shorter edge is each of `edges`, or else `data.test_short_edge`.
    """

    def __init__(self, config: DataConfig, root: Path, split: str, edges: list[int] = ()):
        self.config = config
        self.lut = dataset(config).lut()
        self.edges = edges
        self.pairs = find_pairs(config, root, split)
        self.names = unique_names([image for image, _ in self.pairs])

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[list[Tensor], Tensor, str]:
        image_file, label_file = self.pairs[i]
        image = read_image(image_file, turn=self.config.exif_turn)
        labels = torch.from_numpy(read_labels(label_file, self.lut, image.size))
        return network_inputs(image, self.config, self.edges), labels, self.names[i]


def unique_names(files: list[Path]) -> list[str]:
    """A different name for each file: its stem or, where stems are not unique, its path below their
    common folder without or with its ending.
    """
    files = [Path(os.path.abspath(file)) for file in files]
    base = os.path.commonpath([file.parent for file in files])
    paths = [os.path.relpath(file, base) for file in files]
    stems = [os.path.splitext(path)[0] for path in paths]
    for names in ([file.stem for file in files], stems):
        if len({*names}) == len({*files}):
            return names
    return paths  # a.jpg and a.png


def augment(
    image: Image.Image,
    labels: np.ndarray,
    config: DataConfig,
    ignore: int,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Training augmentation: RGB image and class ids [H, W] -> uint8 [3, S, S] and ids [S, S],
    S = config.crop.

    Resize of the short edge, random crop, colour jitter, flip, padding at the right and bottom.
    """
    S = config.crop
    W, H = image.size
    width, height = test_size(W, H, int(rng.choice(config.short_edges)), config.max_size)
    h = min(height, S)
    w = min(width, S)
    top = int(rng.integers(height - h + 1))
    left = int(rng.integers(width - w + 1))

    # Only the crop is resized. Pillow's filter still reads the pixels around it, so the result is
    # the same as for the full image.
    box = (left * W / width, top * H / height, (left + w) * W / width, (top + h) * H / height)
    image = image.resize((w, h), Image.Resampling.BILINEAR, box)
    rows = np.minimum((np.arange(top, top + h) + 0.5) * H / height, H - 1).astype(int)  # nearest
    cols = np.minimum((np.arange(left, left + w) + 0.5) * W / width, W - 1).astype(int)
    if config.color_jitter:
        image = ssd_jitter(image, rng)

    pixels = np.full((S, S, 3), 128, np.uint8)
    mask = np.full((S, S), ignore, labels.dtype)
    step = -1 if rng.random() < 0.5 else 1  # flip
    pixels[:h, :w] = np.asarray(image)[:, ::step]
    mask[:h, :w] = labels[rows[:, None], cols[::step]]
    return to_tensor(pixels), torch.from_numpy(mask)


def ssd_jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """SSD's colour jitter: brightness, contrast, saturation and hue, each with p = 0.5; contrast
    comes before or after saturation and hue with equal probability.
    """
    brightness, contrast, saturation, hue, contrast_first = rng.random(5) < 0.5
    u = rng.uniform(-1, 1, 4)
    values = np.arange(256.0)

    def apply(image: Image.Image, *luts: np.ndarray) -> Image.Image:
        return image.point(np.concatenate(luts).clip(0, 255).astype(np.uint8).tolist())

    contrast_luts = 3 * [values * (1 + u[1] / 2)]
    if brightness:
        image = apply(image, *3 * [values + 32 * u[0]])
    if contrast and contrast_first:
        image = apply(image, *contrast_luts)
    if saturation or hue:  # as SSD does, in 8-bit HSV
        hue_lut = (values + round(256 * 18 / 360 * u[3])) % 256 if hue else values
        saturation_lut = values * (1 + u[2] / 2) if saturation else values
        image = apply(image.convert("HSV"), hue_lut, saturation_lut, values).convert("RGB")
    if contrast and not contrast_first:
        image = apply(image, *contrast_luts)
    return image


def training_statistics(config: DataConfig, root: Path) -> LabelStatistics:
    """The label statistics of the training split. Prints possible mistakes in the labels and the
    label maps that cannot be read, which are left out.
    """
    statistics = label_statistics(config, root, "train", config.workers)
    for line in statistics.possible_mistakes(training_set(config), "train"):
        print_main(f"look at: {line}")
    for line in statistics.broken[:20]:
        print_main(f"left out: {line}")
    if count := len(statistics.broken):
        names = f"; prepare_data.py {config.name} --check names them" if count > 20 else ""
        left_out(f"{several(count, 'label map')} that cannot be read{names}")
    return statistics


@functools.lru_cache(maxsize=1)
def permutation(seed: int, length: int) -> np.ndarray:
    """The order of an epoch, kept until the next one: int64 [length]."""
    return np.random.default_rng(seed).permutation(length)


class TrainImages(Dataset):
    """Sample n of an endless stream: the images in a fresh order every epoch, augmented.

    Item: (image uint8 [3, S, S], ids among the training classes [S, S], classes present int64 [T]).
    An image that shows no class that is trained on is left out. `pseudo` is a folder of label maps
    to train on instead of the data set's.
    """

    def __init__(self, config: Config, root: Path, pseudo: Path | None = None):
        self.config = config.data
        self.seed = config.train.seed
        self.data = training_set(config.data)
        pairs = find_pairs(config.data, root, "train")
        if pseudo is None:
            self.lut = self.data.lut(training=True)
            statistics = training_statistics(config.data, root)
            self.pairs = [pairs[i] for i in statistics.images_with(self.data.trained)]
            if without := len(pairs) - len(self.pairs) - len(statistics.broken):
                left_out(f"{several(without, 'training image')} without a class that is trained on")
        else:  # label maps of class ids, by `zsseg.self_training`
            C = len(self.data.names)
            self.lut = replace(self.data, values=list(range(C)), bits=8 if C <= 255 else 16).lut()
            self.pairs = [(image, pseudo / f"{i:06}.png") for i, (image, _) in enumerate(pairs)]
        if not self.pairs:
            why = "no training image shows a class that is trained on"
            raise UserError(f"data set {config.data.name}", why, "check it")

    def order(self, epoch: int) -> np.ndarray:
        return permutation(mix_seed(self.seed, 1, epoch), len(self.pairs))

    def pair(self, n: int) -> tuple[Path, Path]:
        """The files of sample n."""
        epoch, i = divmod(n, len(self.pairs))
        return self.pairs[self.order(epoch)[i]]

    def source(self, n: int) -> str:
        return str(self.pair(n)[0])

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        image_file, label_file = self.pair(n)
        image = read_image(image_file, turn=self.config.exif_turn)
        labels = read_labels(label_file, self.lut, image.size)
        rng = np.random.default_rng(mix_seed(self.seed, 2, n))
        pixels, mask = augment(image, labels, self.config, self.data.ignore, rng)
        classes = mask.unique().long()
        return pixels, mask, classes[classes != self.data.ignore]


def collate(samples: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Targets]:
    """Images uint8 [B, 3, S, S] and their targets, padded to the largest number of classes T."""
    images, labels, classes = zip(*samples, strict=True)
    counts = torch.tensor([len(c) for c in classes])
    classes = pad_sequence(classes, batch_first=True)  # [B, T]
    return torch.stack(images), Targets(torch.stack(labels), classes, counts)


class Sample(NamedTuple):
    """A sample and the errors on the way to it, since worker processes cannot raise a UserError."""

    value: object  # None for a broken sample
    errors: list[UserError]


class SafeDataset(Dataset):
    """Samples as `Sample`; with `replace`, the next one that can be read replaces a broken one."""

    def __init__(self, samples: Dataset, replace: bool = False):
        self.samples = samples
        self.tries = MAX_REPLACEMENTS + 1 if replace else 1

    def __getitem__(self, n: int) -> Sample:
        errors = []
        for k in range(self.tries):
            try:
                return Sample(self.samples[n + k], errors)
            except UserError as error:
                errors.append(error)
        return Sample(None, errors)


def safe_collate(collate_fn: Callable, samples: list[Sample]) -> Sample:
    """A batch as one `Sample`; its value is None if that of a sample is."""
    values = [sample.value for sample in samples]
    errors = [error for sample in samples for error in sample.errors]
    broken = any(value is None for value in values)
    return Sample(None if broken else collate_fn(values), errors)


@atexit.register
def end_workers() -> None:
    """Kill workers when the main process ends: they block its signals, and multiprocessing's own
    handler, which runs after this one, would wait for them forever.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or PyTorch would report their death
    for child in multiprocessing.active_children():
        child.kill()


def stream(
    samples: Dataset,
    numbers: Iterable[int],
    batch_size: int,
    workers: int,
    collate_fn: Callable = list,
    broken: Callable[[UserError], None] | None = None,
) -> Iterator:
    """Batches of the samples with these numbers, in order.

    A broken sample raises its UserError. With `broken`, that is called with the error, and the next
    sample of the (endless) stream is used instead: still a function of the number only. Too many
    broken samples in a row raise the error nevertheless.
    """
    workers = min(workers, os.cpu_count() or 1)
    prefetch = 2 if broken else 1  # images to be evaluated may be huge
    loader = DataLoader(
        SafeDataset(samples, broken is not None),
        batch_size,
        sampler=numbers,
        num_workers=workers,
        collate_fn=functools.partial(safe_collate, collate_fn),
        prefetch_factor=prefetch if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    # Only the main process, which still needs the batches, handles a scheduler's signals to the
    # whole job: workers start with these signals blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    iterator = iter(loader)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        for batch, errors in iterator:
            for error in errors if broken else ():
                broken(error)
            if batch is None:
                raise errors[-1]
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # the system has killed one
            raise
        todo = "give it more shared memory (docker run --shm-size=8g), or --set data.workers=0"
        raise UserError("data.workers", str(error).partition("\n")[0], todo) from None
