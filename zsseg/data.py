"""What the networks read: test-time images and the endless training streams.

A sample of a training stream is a function of (seed, sample number) alone, so resuming needs one
integer.
"""

import atexit
import functools
import multiprocessing.util
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zsseg.config import Config, DataConfig
from zsseg.datasets import DataSet, dataset, find_pairs, training_set
from zsseg.images import read_image, read_labels
from zsseg.label_statistics import LabelStatistics, label_statistics
from zsseg.matcher import Targets
from zsseg.utils import SIGNALS, UserError, left_out, mix_seed, print_main, several

MAX_REPLACEMENTS = 100  # samples in a row that may be broken before training stops


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 [3, H, W], contiguous."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def test_size(width: int, height: int, short: int, longest: int) -> tuple[int, int]:
    """(width, height) after bringing the short edge to `short`, the long one to at most `longest`
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
    """Item i: (image uint8 [3, h, w] at each network-input size, class ids uint8 or int32 [H, W] at
    its own size, name).

    There is one size, with shorter edge `data.test_short_edge`, unless `edges` gives others.
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
    """A name for every file that no other one has: its stem or, where one is not unique, its path
    below their folder.
    """
    files = [Path(os.path.abspath(file)) for file in files]
    names = [file.stem for file in files]
    if len(set(names)) < len(set(files)):
        base = os.path.commonpath([file.parent for file in files])
        names = [file.relative_to(base).with_suffix("").as_posix() for file in files]
    if len(set(names)) < len(set(files)):  # a.jpg and a.png
        names = [file.relative_to(base).as_posix() for file in files]
    return names


def augment(
    image: Image.Image,
    labels: np.ndarray,
    config: DataConfig,
    ignore: int,
    rng: np.random.Generator,
):
    """The augmentation of training: RGB image and class ids [H, W] -> uint8 [3, S, S] and ids [S,
    S], S = config.crop.

    Shortest edge, random crop (as much as there is), colour jitter, flip, padding at the right and
    bottom.
    """
    S, (W, H) = config.crop, image.size
    width, height = test_size(W, H, int(rng.choice(config.short_edges)), config.max_size)
    h, w = min(height, S), min(width, S)
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    # Only what the crop shows is resized; Pillow's filter still reads the image around it, so the
    # pixels are the same.
    box = (left * W / width, top * H / height, (left + w) * W / width, (top + h) * H / height)
    image = image.resize((w, h), Image.Resampling.BILINEAR, box)
    rows = np.minimum((np.arange(top, top + h) + 0.5) * H / height, H - 1).astype(int)  # nearest
    columns = np.minimum((np.arange(left, left + w) + 0.5) * W / width, W - 1).astype(int)
    if config.color_jitter:
        image = ssd_jitter(image, rng)
    canvas, mask = np.full((S, S, 3), 128, np.uint8), np.full((S, S), ignore, labels.dtype)
    step = -1 if rng.random() < 0.5 else 1  # mirrored
    canvas[:h, :w] = np.asarray(image)[:, ::step]
    mask[:h, :w] = labels[rows[:, None], columns[::step]]
    return torch.from_numpy(canvas).permute(2, 0, 1).contiguous(), torch.from_numpy(mask)


def ssd_jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """SSD's colour jitter: brightness, contrast, saturation, hue, each with p = 0.5; contrast
    before or after by coin.
    """
    brightness, contrast, saturation, hue, first = rng.random(5) < 0.5
    u = rng.uniform(-1, 1, 4)
    values, full = np.arange(256.0), 3 * [range(256)]

    def by_table(image: Image.Image, *channels: np.ndarray) -> Image.Image:
        return image.point(
            np.concatenate([np.clip(c, 0, 255) for c in channels]).astype(np.uint8).tolist()
        )

    if brightness:
        image = by_table(image, *3 * [values + 32 * u[0]])
    if contrast and first:
        image = by_table(image, *3 * [values * (1 + u[1] / 2)])
    if saturation or hue:  # as SSD does, in 8-bit HSV
        turn = (values + round(256 * 18 / 360 * u[3])) % 256 if hue else full[0]
        stretch = values * (1 + u[2] / 2) if saturation else full[1]
        image = by_table(image.convert("HSV"), turn, stretch, full[2]).convert("RGB")
    if contrast and not first:
        image = by_table(image, *3 * [values * (1 + u[1] / 2)])
    return image


def training_statistics(config: DataConfig, root: Path) -> LabelStatistics:
    """Which classes the training images show.

    What may be a mistake in the labels is said; label maps that cannot be read are named, and left
    out.
    """
    statistics = label_statistics(config, root, "train", config.workers)
    for line in statistics.oddities(training_set(config), "train"):
        print_main(f"look at: {line}")
    for line in statistics.broken[:20]:
        print_main(f"left out: {line}")
    if count := len(statistics.broken):
        names = f"; prepare_data.py {config.name} --check names them" if count > 20 else ""
        left_out(f"{several(count, 'label map')} that cannot be read{names}")
    return statistics


class TrainImages(Dataset):
    """Sample n of an endless stream: the images in a fresh order every epoch, augmented.

    Item: (image uint8 [3, S, S], ids among the training classes [S, S], classes present int64 [T]).
    An image that shows no class that is trained on is left out. `pseudo` is a folder of label maps
    to train on instead of the data set's.
    """

    def __init__(self, config: Config, root: Path, pseudo: Path | None = None):
        self.data, self.seed = training_set(config.data), config.train.seed
        pairs, self.lut = find_pairs(config.data, root, "train"), self.data.lut(training=True)
        if pseudo is None:
            statistics = training_statistics(config.data, root)
            self.pairs = [pairs[i] for i in statistics.images_with(self.data.trained)]
            if without := len(pairs) - len(self.pairs) - len(statistics.broken):
                left_out(f"{several(without, 'training image')} without a class that is trained on")
        else:  # class ids of all classes, by `zsseg.selftrain`
            self.pairs = [(image, pseudo / f"{i:06}.png") for i, (image, _) in enumerate(pairs)]
            self.lut = identity(self.data)
        if not self.pairs:
            raise UserError(
                f"data set {config.data.name}",
                "no training image shows a class that is trained on",
                "check it",
            )
        self.config = config.data
        self.epoch, self.shuffled = -1, np.empty(0)

    def order(self, epoch: int) -> np.ndarray:
        if epoch != self.epoch:
            self.epoch, self.shuffled = (
                epoch,
                np.random.default_rng(mix_seed(self.seed, 1, epoch)).permutation(len(self.pairs)),
            )
        return self.shuffled

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        epoch, i = divmod(n, len(self.pairs))
        image_file, label_file = self.pairs[self.order(epoch)[i]]
        image = read_image(image_file, turn=self.config.exif_turn)
        labels = read_labels(label_file, self.lut, image.size)
        rng = np.random.default_rng(mix_seed(self.seed, 2, n))
        pixels, mask = augment(image, labels, self.config, self.data.ignore, rng)
        classes = mask.unique().long()
        return pixels, mask, classes[classes != self.data.ignore]

    def source(self, n: int) -> str:
        """The image that sample n shows."""
        epoch, i = divmod(n, len(self.pairs))
        return str(self.pairs[self.order(epoch)[i]][0])


def identity(data: DataSet) -> np.ndarray:
    """The table for label maps that hold class ids already."""
    table = np.full(256 if len(data.names) <= 255 else 65536, data.ignore, data.lut().dtype)
    table[: len(data.names)] = np.arange(len(data.names))
    return table


def collate(samples: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Targets]:
    """Images uint8 [B, 3, S, S] and their targets, padded to the largest number of classes."""
    images, labels, classes = zip(*samples, strict=True)
    counts = torch.tensor([len(c) for c in classes])
    classes = torch.stack([F.pad(c, (0, int(counts.max()) - len(c))) for c in classes])  # [B, T]
    return torch.stack(images), Targets(torch.stack(labels), classes, counts)


class Sample(NamedTuple):
    """A sample, or what became of it: a worker process would turn a UserError into a traceback."""

    value: object  # None where there is none
    errors: list[UserError]


class SafeDataset(Dataset):
    """Samples as `Sample`; with `replace`, the next whole one takes the place of a broken one."""

    def __init__(self, samples: Dataset, replace: bool = False):
        self.samples, self.tries = samples, MAX_REPLACEMENTS + 1 if replace else 1

    def __getitem__(self, n: int) -> Sample:
        errors = []
        for k in range(self.tries):
            try:
                return Sample(self.samples[n + k], errors)
            except UserError as error:
                errors.append(error)
        return Sample(None, errors)


def guarded(collate_fn: Callable, samples: list[Sample]) -> tuple[object, list[UserError]]:
    errors = [error for sample in samples for error in sample.errors]
    whole = all(sample.value is not None for sample in samples)
    return collate_fn([sample.value for sample in samples]) if whole else None, errors


@atexit.register
def end_workers() -> None:
    """Workers leave signals to the main process, so that at its end, above all after an error, they
    must be killed: what multiprocessing has registered to do then, after this, would wait for them
    forever.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or PyTorch would complain of their death
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

    A broken sample raises its UserError. With `broken`, that gets the error, and the next sample of
    the (endless) stream is taken instead: still a function of the number alone. Too many broken
    ones in a row are an error all the same.
    """
    workers = min(workers, os.cpu_count() or 1)
    loader = DataLoader(
        SafeDataset(samples, broken is not None),
        batch_size,
        sampler=numbers,
        num_workers=workers,
        collate_fn=functools.partial(guarded, collate_fn),
        prefetch_factor=(2 if broken else 1)
        if workers
        else None,  # images to be measured may be huge
        pin_memory=torch.cuda.is_available(),
    )
    # What a scheduler sends to a whole job is the main process's to answer, which still needs the
    # batches: workers start with
    # these signals blocked, and stay so.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    iterator = iter(loader)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for batch, errors in alive(iterator):
        for error in errors if broken else ():
            broken(error)
        if batch is None:
            raise errors[-1]
        yield batch


def alive(batches: Iterator) -> Iterator:
    """The batches; a worker process that the system has killed is a UserError."""
    try:
        yield from batches
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        todo = "give it more shared memory (docker run --shm-size=8g), or --set data.workers=0"
        raise UserError("data.workers", str(error).partition("\n")[0], todo) from None
