"""Data sets (a table of what differs between them), the test-time pictures, and the endless training streams.

A sample of a training stream is a function of (seed, sample number) alone, so resuming needs one integer.
"""

import functools
import json
import os
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from zsseg.config import Config, DataConfig
from zsseg.losses import Targets
from zsseg.regions import mask_boxes, region_crops
from zsseg.run import UserError, seed_of

NAMES = tomllib.loads((Path(__file__).parent / "names.toml").read_text())
COLOURS, SHAPES = ("red", "green", "blue", "yellow", "purple"), ("disc", "square", "triangle", "cross")
WALLS = ("striped wall", "checked wall", "dotted wall", "speckled wall")
THINGS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
SHAPES_UNSEEN = ("red square", "green cross", "blue disc", "yellow triangle", "purple square")


@dataclass(frozen=True)
class DataSet:
    """One row of the table. Label values become class ids through `lut`; ids run from 0, `ignore` is no class."""
    names: list[str]
    unseen: tuple[str, ...]
    values: list[int]  # the label value of each class
    folder: str  # below the data root
    pairs: Callable[[Path, str], list[tuple[Path, Path]]]  # (folder, split) -> (picture, label map) files
    ignore: int = 255

    @property
    def seen(self) -> list[int]:
        """Ids of the classes that are trained on; none where there is no seen/unseen split."""
        return [i for i, n in enumerate(self.names) if n not in self.unseen] if self.unseen else []

    @property
    def training_names(self) -> list[str]:
        return [self.names[i] for i in self.seen] or self.names

    def lut(self, training: bool = False) -> np.ndarray:
        """Label value -> class id, uint8 [256]; in training -> index among the seen classes, unseen ones -> `ignore`."""
        table = np.full(256, self.ignore, np.uint8)
        names = self.training_names if training else self.names
        table[[self.values[self.names.index(n)] for n in names]] = np.arange(len(names))
        return table


def listed_pairs(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """VOC: ids in `<split>.txt`."""
    ids = (folder / f"{split}.txt").read_text().split()
    return [(folder / "JPEGImages" / f"{i}.jpg", folder / "SegmentationClassAug" / f"{i}.png") for i in ids]


def globbed_pairs(images: str, labels: str, folder: Path, split: str) -> list[tuple[Path, Path]]:
    """Every label map of a folder with the picture of the same stem."""
    files = sorted((folder / labels.format(split)).glob("*.png"))
    return [(folder / images.format(split) / f"{file.stem}.jpg", file) for file in files]


VOC, COCO = NAMES["voc"], NAMES["coco_stuff"]
DATASETS = {
    "shapes": DataSet([*THINGS, *WALLS], SHAPES_UNSEEN, list(range(24)), "shapes",
                      functools.partial(globbed_pairs, "images/{}", "labels/{}")),
    "voc": DataSet(VOC["names"], tuple(VOC["unseen"]), list(range(1, 21)), "VOC2012", listed_pairs),
    "coco_stuff": DataSet(COCO["names"], tuple(COCO["unseen"]), [v for v in range(182) if v not in COCO["unused_values"]],
                          "coco", functools.partial(globbed_pairs, "{}2017", "stuffthingmaps/{}2017")),
}  # fmt: skip


def dataset(name: str) -> DataSet:
    if name not in DATASETS:
        raise UserError("data.name", f"is {name!r}", f"choose one of {', '.join(DATASETS)}")
    return DATASETS[name]


def find_pairs(name: str, root: Path, split: str) -> list[tuple[Path, Path]]:
    """The (picture, label map) files of a split; UserError where there are none."""
    data = dataset(name)
    try:
        pairs = data.pairs(root / data.folder, split)
    except OSError:
        pairs = []
    if not pairs:
        todo = "run prepare_data.py shapes" if name == "shapes" else "put it there in the README's layout"
        raise UserError(f"data set {name}", f"no {split!r} pictures in {root / data.folder}", f"{todo}, or give --root")
    return pairs


def read_picture(file: Path, mode: str | None = "RGB", what: str = "picture") -> Image.Image:
    """A picture, whole and in `mode` (None: as it is). A missing or broken file is a UserError that names it."""
    try:
        with Image.open(file) as image:
            image.load()
            if mode and image.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits a channel")
            return image.convert(mode) if mode else image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{what} {file}", f"cannot be read ({error})", "replace the file") from None


def read_labels(file: Path, lut: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label map through `lut`: [H, W]; `size` is its picture's (width, height)."""
    values = np.array(read_picture(file, None, "label map"))
    if values.dtype != np.uint8 or values.ndim != 2:
        raise UserError(f"label map {file}", "is not an 8-bit single-channel picture", "replace the file")
    if values.shape[::-1] != size:
        sizes = f"is {values.shape[1]} x {values.shape[0]}, its picture {size[0]} x {size[1]}"
        raise UserError(f"label map {file}", sizes, "make the two the same size")
    return lut[values]


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 [3, H, W], contiguous."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def test_size(width: int, height: int, short: int, longest: int) -> tuple[int, int]:
    """(width, height) after bringing the short edge to `short`, the long one to at most `longest` (detectron2's rule)."""
    scale = short / min(width, height)
    w, h = (short, scale * height) if width <= height else (scale * width, short)
    if max(w, h) > longest:
        w, h = (x * longest / max(w, h) for x in (w, h))
    return max(int(w + 0.5), 1), max(int(h + 0.5), 1)


class TestPictures(Dataset):
    """Item i: (picture uint8 [3, h, w] at network-input size, class ids int64 [H, W] at its own size, stem)."""
    def __init__(self, config: DataConfig, root: Path, split: str):
        self.config, self.lut = config, dataset(config.name).lut()
        self.pairs = find_pairs(config.name, root, split)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, str]:
        image_file, label_file = self.pairs[i]
        image = read_picture(image_file)
        labels = torch.from_numpy(read_labels(label_file, self.lut, image.size)).long()
        size = test_size(*image.size, self.config.test_short_edge, self.config.max_size)
        return to_tensor(image.resize(size, Image.Resampling.BILINEAR)), labels, image_file.stem


def augment(image: Tensor, labels: Tensor, config: DataConfig, ignore: int) -> tuple[Tensor, Tensor]:
    """The augmentation of training, on uint8 [3, H, W] and [H, W] -> [3, S, S] and [S, S], S = config.crop.

    Shortest edge, random crop (as much as there is), colour jitter, flip, padding at the right and bottom.
    """
    S, both = config.crop, [tv_tensors.Image(image), tv_tensors.Mask(labels)]  # v2 samples masks by nearest
    edge = config.short_edges[int(torch.randint(len(config.short_edges), ()))]
    width, height = test_size(*labels.shape[::-1], edge, config.max_size)
    h, w = min(height, S), min(width, S)
    top, left = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
    both = [TF.crop(TF.resize(x, [height, width]), top, left, h, w) for x in both]
    if config.color_jitter:
        both[0] = ssd_jitter(both[0])
    if torch.rand(()) < 0.5:
        both = [TF.horizontal_flip(x) for x in both]
    image, labels = (TF.pad(x, [0, 0, S - w, S - h], fill=f) for x, f in zip(both, (128, ignore), strict=True))
    return image.as_subclass(Tensor), labels.as_subclass(Tensor)


def ssd_jitter(image: Tensor) -> Tensor:
    """SSD's colour jitter: brightness, contrast, saturation, hue, each with p = 0.5; contrast before or after by coin."""
    coins, u = torch.rand(5).tolist(), (2 * torch.rand(4) - 1).tolist()
    steps = [
        lambda x: (x.float() + 32 * u[0]).clamp(0, 255).to(torch.uint8),  # SSD adds and multiplies; torchvision blends
        lambda x: (x.float() * (1 + u[1] / 2)).clamp(0, 255).to(torch.uint8),
        lambda x: TF.adjust_saturation(x, 1 + u[2] / 2),
        lambda x: TF.adjust_hue(x, 0.05 * u[3]),  # in turns: 18 degrees
    ]
    for i in (0, 1, 2, 3) if coins[4] < 0.5 else (0, 2, 3, 1):
        if coins[i] < 0.5:
            image = steps[i](image)
    return image


class TrainPictures(Dataset):
    """Sample n of an endless stream: the pictures in a fresh order every epoch, augmented.

    Item: (picture uint8 [3, S, S], ids among the training classes uint8 [S, S], classes present int64 [T]).
    """
    def __init__(self, config: Config, root: Path):
        self.data, self.seed = dataset(config.data.name), config.train.seed
        self.pairs = find_pairs(config.data.name, root, "train")
        self.config, self.lut = config.data, self.data.lut(training=True)
        self.epoch, self.shuffled = -1, np.empty(0)

    def order(self, epoch: int) -> np.ndarray:
        if epoch != self.epoch:
            self.epoch, self.shuffled = epoch, np.random.default_rng(seed_of(self.seed, 1, epoch)).permutation(len(self.pairs))
        return self.shuffled

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        epoch, i = divmod(n, len(self.pairs))
        image_file, label_file = self.pairs[self.order(epoch)[i]]
        image = read_picture(image_file)
        labels = read_labels(label_file, self.lut, image.size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, 2, n))
            picture, mask = augment(to_tensor(image), torch.from_numpy(labels), self.config, self.data.ignore)
        classes = mask.unique().long()
        return picture, mask, classes[classes != self.data.ignore]


def collate(samples: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Targets]:
    """Pictures uint8 [B, 3, S, S] and their targets, padded to the largest number of classes."""
    images, labels, classes = zip(*samples, strict=True)
    counts = torch.tensor([len(c) for c in classes])
    classes = torch.stack([F.pad(c, (0, int(counts.max()) - len(c))) for c in classes])  # [B, T]
    return torch.stack(images), Targets(torch.stack(labels), classes, counts)


class RegionsWithCaptions(Dataset):
    """Sample n: one region of every class (so no two of them match each other's caption), for contrastive training.

    Item: (crops fp32 [N, 3, R, R], captions, a list of N). Half of the regions are masked crops, half plain boxes.
    """
    def __init__(self, config: Config, root: Path):
        self.seed, self.resolution = config.train.seed, config.contrast.resolution
        data = dataset(config.data.name)
        pairs = find_pairs(config.data.name, root, "clip")
        self.images = [to_tensor(read_picture(image)) for image, _ in pairs]
        sizes = [(image.shape[2], image.shape[1]) for image in self.images]
        self.labels = [torch.from_numpy(read_labels(p[1], data.lut(), s)) for p, s in zip(pairs, sizes, strict=True)]
        captions = json.loads((root / data.folder / "captions.json").read_text())
        self.captions = [{int(k): v for k, v in captions[label.stem].items()} for _, label in pairs]
        self.where = [[i for i, c in enumerate(self.captions) if k in c] for k in range(len(data.names))]

    def __getitem__(self, n: int) -> tuple[Tensor, list[str]]:
        rng = np.random.default_rng(seed_of(self.seed, 3, n))
        crops, texts = [], []
        for k, where in enumerate(self.where):
            i = int(rng.choice(where))
            mask = rough_mask(self.labels[i] == k, rng)[None]
            boxes, _ = mask_boxes(mask, float(rng.uniform(0.9, 1.3)))
            seen = mask if rng.random() < 0.5 else torch.ones_like(mask)
            crop = region_crops(self.images[i], seen, boxes, self.resolution)
            crops.append(crop.flip(-1) if rng.random() < 0.5 else crop)
            texts.append(self.captions[i][k])
        return torch.cat(crops), texts


def rough_mask(mask: Tensor, rng: np.random.Generator) -> Tensor:
    """A mask [H, W] as a segmenter might propose it: blurred, cut at a random level, never empty."""
    height, width = mask.shape
    coarse = F.avg_pool2d(mask[None, None].float(), int(rng.choice([1, 2, 4])))
    smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)[0, 0]
    return smooth > min(float(rng.uniform(0.15, 0.75)), 0.9 * float(smooth.max()))


class Guarded(Dataset):
    """Hands a UserError over as an item: a worker process would turn it into a traceback."""
    def __init__(self, samples: Dataset):
        self.samples = samples

    def __getitem__(self, n: int) -> object:
        try:
            return self.samples[n]
        except UserError as error:
            return error


def guarded(collate_fn: Callable, samples: list) -> object:
    errors = [s for s in samples if isinstance(s, UserError)]
    return errors[0] if errors else collate_fn(samples)


def stream(samples: Dataset, numbers: Iterable[int], batch_size: int, workers: int, collate_fn: Callable = list) -> Iterator:
    """Batches of the samples with these numbers, in order."""
    loader = DataLoader(Guarded(samples), batch_size, sampler=numbers, num_workers=min(workers, os.cpu_count() or 1),
                        collate_fn=functools.partial(guarded, collate_fn), pin_memory=torch.cuda.is_available())  # fmt: skip
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch
