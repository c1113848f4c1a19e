"""The synthetic data set: 96 x 96 images of stickers on textured ground, from fixed seeds.

Every fifth class of two alphabetical lists is unseen: the segmenter gets neither its masks nor its
name. A class is a silhouette or a texture with a plain noun for a name. The colour, pattern, size
and angle of a thing say nothing about its class, so no unseen class is made of seen ones.
The small CLIP is trained on images of its own (split "clip").
"""

import colorsys
import json
import tomllib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from zsseg.datasets import DATASETS
from zsseg.files import MARK, PNG_MARK, read_text, result
from zsseg.utils import UserError, mix_seed, progress

NAMES = DATASETS["shapes"].names
THINGS = NAMES[:20]
STUFF = NAMES[20:]
SIDE = 96  # pixels
SPLITS = {"clip": 2000, "train": 2000, "val": 200, "test": 300}  # images; the order gives the seeds
CAPTIONS = (
    "a photo of a {}.",
    "an image of a {}.",
    "a drawing of a {}.",
    "there is a {} here.",
    "a {}.",
    "{}",
)
MIN_VISIBLE = 0.75  # an image with a thing of which a smaller share is visible is drawn again
RIM = 1  # pixels of white around a thing, as around a sticker
RARE = 0.25  # how often an unseen class is drawn for training, compared with a seen one
TODO = "move it away, or give another --root"
FINE = 4  # a silhouette is drawn with 4 x 4 points a pixel
DRAWING = tomllib.loads((Path(__file__).parent / "shapes.toml").read_text("utf-8"))


def outline(kind: str, values: list[float]) -> np.ndarray:
    """Points [N, 2] of a part of a silhouette, see shapes.toml."""
    if kind == "polygon":
        return np.reshape(values, (-1, 2))
    x, y, rx, ry, *ends = values
    angles = np.radians(np.linspace(*(ends or (0, 360)), 33))
    points = np.stack([np.cos(angles), np.sin(angles)], 1)
    if kind == "box":
        points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    return points * (rx, ry) + (x, y)


def silhouette(
    name: str, x: float, y: float, scale: float, angle: float
) -> tuple[np.ndarray, np.ndarray]:
    """The share of every pixel that a thing covers, with and without the rim around it, float64
    [96, 96] each.
    """
    canvas = Image.new("L", (SIDE * FINE, SIDE * FINE))
    pen = ImageDraw.Draw(canvas)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    for kind, *values in DRAWING["silhouettes"][name]:
        points = (outline(kind.removeprefix("-"), values) @ turn * scale + (x, y)) * FINE
        pen.polygon([tuple(p) for p in points.tolist()], fill=0 if kind[0] == "-" else 255)
    cover = canvas.reduce(FINE)
    wide = cover.filter(ImageFilter.MaxFilter(2 * RIM + 1))
    return np.asarray(wide) / 255, np.asarray(cover) / 255


def colour(rng: np.random.Generator, hue: float, spread: float, *rest: float) -> np.ndarray:
    """A colour near a hue of 0 to 1, of saturation and value near `rest`; float64 [3], 0..255."""
    hsv = [(hue + rng.uniform(-spread, spread)) % 1]
    hsv += [np.clip(part + rng.uniform(-0.1, 0.1), 0, 1) for part in rest]
    return 255 * np.array(colorsys.hsv_to_rgb(*hsv))


def noise(rng: np.random.Generator, *cells: int) -> np.ndarray:
    """Smooth noise of 0 to 1 with that many cells down and across, float64 [96, 96]."""
    coarse = Image.fromarray(rng.integers(0, 256, cells, np.uint8))
    return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255


def texture(name: str, rng: np.random.Generator) -> np.ndarray:
    """A piece of ground, float64 [96, 96, 3]."""
    y, x = np.mgrid[:SIDE, :SIDE] + rng.uniform(0, 50, 2)[:, None, None]
    base, other = (colour(rng, *values) for values in DRAWING["colours"][name])
    if name == "brick":
        high = rng.uniform(7, 11)
        row = y // high
        amount = (y % high < 1.6) | ((x + row % 2 * high) % (2 * high) < 1.6)
        amount = np.maximum(amount, 0.3 * noise(rng, 12, 6))
    elif name == "grass":
        amount = noise(rng, 12, 48) ** 2
    elif name == "sand":
        amount = 0.4 * noise(rng, 4, 3) + 0.6 * (rng.random((SIDE, SIDE)) < 0.15)
    elif name == "sky":
        amount = np.clip(2 * noise(rng, 5, 4) - 0.7, 0, 1)
    else:
        wave = y + 2 * np.sin(x / rng.uniform(3, 5)) + 3 * noise(rng, 6, 4)
        amount = np.sin(2 * np.pi * wave / rng.uniform(7, 11)) * 0.5 + 0.5
    return base + (other - base) * amount[..., None]


def paint(rng: np.random.Generator) -> np.ndarray:
    """The surface of a thing, whatever it is: any colour, plain or with a pattern; float64 [96, 96,
    3].
    """
    hue = rng.random()
    base = colour(rng, hue, 0, 0.85, 0.85)
    other = colour(rng, hue, 0.06, 0.8, 0.65)
    angle, period = rng.uniform(0, np.pi), rng.uniform(6, 10)
    y, x = np.mgrid[:SIDE, :SIDE]
    along, across = (x * np.cos(a) + y * np.sin(a) for a in (angle, angle + np.pi / 2))
    kind = rng.integers(4)
    if kind == 0:
        amount = np.zeros((SIDE, SIDE))
    elif kind == 1:
        amount = along % period < period / 2
    elif kind == 2:
        amount = (along % period - period / 2) ** 2 + (across % period - period / 2) ** 2 < 5
    else:
        amount = noise(rng, 4, 4)
    return base + (other - base) * amount[..., None]


def share(names: tuple[str, ...], split: str) -> np.ndarray:
    """How often each class is drawn; unseen ones are rare in training, as in COCO-Stuff."""
    rare = [split == "train" and name in DATASETS["shapes"].unseen for name in names]
    weight = np.where(rare, RARE, 1)
    return weight / weight.sum()


def draw(split: str, index: int) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Image uint8 [96, 96, 3], class ids uint8 [96, 96] and a caption for every class in it."""
    rng = np.random.default_rng(mix_seed(list(SPLITS).index(split), index))
    things_share, stuff_share = share(THINGS, split), share(STUFF, split)
    ground = int(rng.choice(len(STUFF), p=stuff_share))
    while True:
        labels = np.full((SIDE, SIDE), len(THINGS) + ground, np.uint8)
        count = int(rng.integers(2, 4))
        things = rng.choice(len(THINGS), count, replace=False, p=things_share).tolist()
        covers = []
        for thing in things:
            where = (*rng.uniform(22, SIDE - 22, 2), rng.uniform(18, 27), rng.uniform(-0.3, 0.3))
            covers.append(silhouette(THINGS[thing], *where))
            labels[covers[-1][0] > 0.5] = thing
        areas = [(wide > 0.5).sum() for wide, _ in covers]
        visible = [(labels == thing).sum() for thing in things]
        if all(v >= MIN_VISIBLE * a for v, a in zip(visible, areas, strict=True)):
            break
    image = texture(STUFF[ground], rng)
    for wide, cover in covers:
        image[2:, 1:] *= 1 - 0.4 * wide[:-2, :-1, None]  # its shadow
        image += (245 - image) * wide[..., None]
        image += (paint(rng) - image) * cover[..., None]
    image = np.clip(image, 0, 255).astype(np.uint8)
    captions = {k: str(rng.choice(CAPTIONS)).format(NAMES[k]) for k in np.unique(labels).tolist()}
    return image, labels, captions


def generate(folder: Path) -> None:
    """Write `images/`, `labels/` and, last, `captions.json`, unless all are there.

    UserError where what is there shows other classes.
    """
    done = folder / "captions.json"
    captions = {"program": MARK, "classes": list(NAMES)}
    if done.exists():
        if f'"classes": {json.dumps(captions["classes"])}' not in read_text(done, str(done), TODO):
            raise UserError(f"data set {folder}", "was drawn by another version", TODO)
        return
    for split, count in SPLITS.items():
        for index in progress(range(count), f"draw {split}", count):
            image, labels, captions[f"{split}{index:05}"] = draw(split, index)
            with result(folder / "images" / split / f"{split}{index:05}.jpg") as file:
                Image.fromarray(image).save(file, "JPEG", quality=80, subsampling=0, comment=MARK)
            with result(folder / "labels" / split / f"{split}{index:05}.png") as file:
                Image.fromarray(labels).save(file, "PNG", pnginfo=PNG_MARK)
    with result(done) as file:
        file.write_text(json.dumps(captions), "utf-8")
