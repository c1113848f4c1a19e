"""Data sets (a table of what differs between them), the test-time pictures, and the endless training streams.

A sample of a training stream is a function of (seed, sample number) alone, so resuming needs one integer.
"""

import functools
import json
import os
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
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from zsseg.config import Config, DataConfig
from zsseg.losses import Targets
from zsseg.regions import mask_boxes, region_crops
from zsseg.run import UserError, seed_of

# --- the table ---------------------------------------------------------------------------------------------------

VOC = (
    "aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,person,pottedplant,"
    "sheep,sofa,train,tvmonitor"
)
COCO_STUFF = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,"
    "wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,"
    "chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,"
    "toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush,banner,blanket,branch,"
    "bridge,building-other,bush,cabinet,cage,cardboard,carpet,ceiling-other,ceiling-tile,cloth,clothes,clouds,"
    "counter,cupboard,curtain,desk-stuff,dirt,door-stuff,fence,floor-marble,floor-other,floor-stone,floor-tile,"
    "floor-wood,flower,fog,food-other,fruit,furniture-other,grass,gravel,ground-other,hill,house,leaves,light,mat,"
    "metal,mirror-stuff,moss,mountain,mud,napkin,net,paper,pavement,pillow,plant-other,plastic,platform,playingfield,"
    "railing,railroad,river,road,rock,roof,rug,salad,sand,sea,shelf,sky-other,skyscraper,snow,solid-other,stairs,"
    "stone,straw,structural-other,table,tent,textile-other,towel,tree,vegetable,wall-brick,wall-concrete,wall-other,"
    "wall-panel,wall-stone,wall-tile,wall-wood,water-other,waterdrops,window-blind,window-other,wood"
)
COCO_STUFF_UNSEEN = (
    "cow,giraffe,suitcase,frisbee,skateboard,carrot,scissors,cardboard,clouds,grass,playingfield,river,road,tree,"
    "wall-concrete"
)
COCO_STUFF_GAPS = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)  # label values that no class has
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

    @functools.cached_property
    def lut(self) -> np.ndarray:
        table = np.full(256, self.ignore, np.uint8)
        table[self.values] = np.arange(len(self.names))
        return table

    @functools.cached_property
    def training_lut(self) -> np.ndarray:
        """Label value -> index among the seen classes; pixels of unseen ones become `ignore` before anything else."""
        table = np.full(256, self.ignore, np.uint8)
        seen = self.seen or range(len(self.names))
        table[[self.values[i] for i in seen]] = np.arange(len(seen))
        return table

    @property
    def training_names(self) -> list[str]:
        return [self.names[i] for i in self.seen] or self.names


def listed_pairs(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """VOC: ids in `<split>.txt`."""
    ids = (folder / f"{split}.txt").read_text().split()
    return [(folder / "JPEGImages" / f"{i}.jpg", folder / "SegmentationClassAug" / f"{i}.png") for i in ids]


def globbed_pairs(images: str, labels: str, folder: Path, split: str) -> list[tuple[Path, Path]]:
    """Every label map of a folder with the picture of the same stem."""
    files = sorted((folder / labels.format(split)).glob("*.png"))
    return [(folder / images.format(split) / f"{file.stem}.jpg", file) for file in files]


def coco_values() -> list[int]:
    return [v for v in range(182) if v not in COCO_STUFF_GAPS]


DATASETS = {
    "shapes": DataSet([*THINGS, *WALLS], SHAPES_UNSEEN, list(range(24)), "shapes",
                      functools.partial(globbed_pairs, "images/{}", "labels/{}")),
    "voc": DataSet(VOC.split(","), tuple(VOC.split(",")[15:]), list(range(1, 21)), "VOC2012", listed_pairs),
    "coco_stuff": DataSet(COCO_STUFF.split(","), tuple(COCO_STUFF_UNSEEN.split(",")), coco_values(), "coco",
                          functools.partial(globbed_pairs, "{}2017", "stuffthingmaps/{}2017")),
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
    except OSError as error:
        raise UserError(f"data set {name}", f"cannot read {error.filename}", f"run prepare_data.py {name} or give --root") from None
    if not pairs:
        where = root / data.folder
        raise UserError(f"data set {name}", f"no {split!r} label maps in {where}", f"run prepare_data.py {name} or give --root")
    return pairs


# --- files -------------------------------------------------------------------------------------------------------


def read_picture(file: Path) -> Image.Image:
    """An RGB picture. A missing or broken file is a UserError that names it."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"picture {file}", f"cannot be read ({error})", "replace the file") from None


def read_labels(file: Path, lut: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label map through `lut`: [H, W]; `size` is its picture's (width, height)."""
    try:
        with Image.open(file) as image:
            values = np.array(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"label map {file}", f"cannot be read ({error})", "replace the file") from None
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


# --- evaluation --------------------------------------------------------------------------------------------------


class TestPictures(Dataset):
    """Item i: (picture uint8 [3, h, w] at network-input size, class ids int64 [H, W] at its own size, stem)."""

    def __init__(self, config: DataConfig, root: Path, split: str):
        self.config, self.data = config, dataset(config.name)
        self.pairs = find_pairs(config.name, root, split)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, str]:
        image_file, label_file = self.pairs[i]
        image = read_picture(image_file)
        labels = torch.from_numpy(read_labels(label_file, self.data.lut, image.size)).long()
        size = test_size(*image.size, self.config.test_short_edge, self.config.max_size)
        return to_tensor(image.resize(size, Image.Resampling.BILINEAR)), labels, image_file.stem


# --- augmentation ------------------------------------------------------------------------------------------------


class CropAtMost(v2.Transform):
    """A random crop of `size` x `size`, smaller where the picture is."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def make_params(self, inputs: list) -> dict:
        height, width = TF.get_size(inputs[0])
        h, w = min(height, self.size), min(width, self.size)
        top, left = (int(torch.randint(n + 1, ())) for n in (height - h, width - w))
        return {"top": top, "left": left, "height": h, "width": w}

    def transform(self, item: Tensor, params: dict) -> Tensor:
        return TF.crop(item, **params)


class SSDJitter(v2.Transform):
    """SSD's colour jitter: brightness, contrast, saturation, hue, each with p = 0.5; contrast before or after by coin."""

    def make_params(self, inputs: list) -> dict:
        draws = torch.rand(9).tolist()
        keys = ("brightness", "contrast", "saturation", "hue")
        ranges = ((-32, 32), (0.5, 1.5), (0.5, 1.5), (-0.05, 0.05))  # hue in turns: 18 degrees
        values = [low + (high - low) * u for (low, high), u in zip(ranges, draws[4:8], strict=True)]
        used = {k: v for k, v, coin in zip(keys, values, draws[:4], strict=True) if coin < 0.5}
        order = ["brightness", "contrast", "saturation", "hue"]
        if draws[8] < 0.5:
            order = ["brightness", "saturation", "hue", "contrast"]
        return {"steps": [(name, used[name]) for name in order if name in used]}

    def transform(self, item: Tensor, params: dict) -> Tensor:
        if not isinstance(item, tv_tensors.Image):
            return item
        for name, value in params["steps"]:
            if name in ("saturation", "hue"):
                item = getattr(TF, f"adjust_{name}")(item, value)
            else:  # SSD adds brightness and multiplies contrast, torchvision blends
                changed = item.float() + value if name == "brightness" else item.float() * value
                item = tv_tensors.Image(changed.clamp(0, 255).to(torch.uint8))
        return item


class PadTo(v2.Transform):
    """Padding at the right and bottom to `size` x `size`: 128 in the picture, `ignore` in the label map."""

    def __init__(self, size: int, ignore: int):
        super().__init__()
        self.size, self.ignore = size, ignore

    def transform(self, item: Tensor, params: dict) -> Tensor:
        height, width = TF.get_size(item)
        fill = 128 if isinstance(item, tv_tensors.Image) else self.ignore
        return TF.pad(item, [0, 0, self.size - width, self.size - height], fill=fill)


def augmentation(config: DataConfig, ignore: int) -> v2.Compose:
    """METHOD section 3, on (tv_tensors.Image, tv_tensors.Mask)."""
    steps = [v2.RandomShortestSize(config.short_edges, config.max_size), CropAtMost(config.crop)]
    if config.color_jitter:
        steps.append(SSDJitter())
    return v2.Compose([*steps, v2.RandomHorizontalFlip(), PadTo(config.crop, ignore)])


# --- training streams --------------------------------------------------------------------------------------------


class TrainPictures(Dataset):
    """Sample n of an endless stream: the pictures in a fresh order every epoch, augmented.

    Item: (picture uint8 [3, S, S], ids among the training classes uint8 [S, S], classes present int64 [T]).
    """

    def __init__(self, config: Config, root: Path):
        self.data, self.seed = dataset(config.data.name), config.train.seed
        self.pairs = find_pairs(config.data.name, root, "train")
        self.augment = augmentation(config.data, self.data.ignore)
        self.order = functools.lru_cache(2)(self.order)

    def order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng(seed_of(self.seed, 1, epoch)).permutation(len(self.pairs))

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        epoch, i = divmod(n, len(self.pairs))
        image_file, label_file = self.pairs[self.order(epoch)[i]]
        image = read_picture(image_file)
        labels = read_labels(label_file, self.data.training_lut, image.size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, 2, n))
            picture, mask = self.augment(tv_tensors.Image(to_tensor(image)), tv_tensors.Mask(torch.from_numpy(labels)))
        classes = mask.unique().long()
        return picture.as_subclass(Tensor), mask.as_subclass(Tensor), classes[classes != self.data.ignore]


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
        self.labels = [
            torch.from_numpy(read_labels(label, data.lut, tuple(image.shape[:0:-1])))
            for (_, label), image in zip(pairs, self.images, strict=True)
        ]
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
