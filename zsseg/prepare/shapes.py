"""The synthetic data set: 96 x 96 images of stickers on textured ground, from fixed seeds.

Every fifth class of two alphabetical lists is unseen: the segmenter gets neither its masks nor its
name. A class is a silhouette or a texture with a plain noun for a name. The colour, pattern, size
and angle of a thing say nothing about its class, so no unseen class is made of seen ones.
The small CLIP is trained on separate images (split "clip").
"""

import colorsys
import contextlib
import json
import tomllib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from zsseg.datasets import DATASETS
from zsseg.utils import (
    UserError,
    atomic_write,
    claim_folder,
    mix_seed,
    progress,
    read_text,
    write_json,
)

NAMES = DATASETS["shapes"].names
UNSEEN = DATASETS["shapes"].unseen
THINGS = NAMES[:20]
STUFF = NAMES[20:]
SIDE = 96  # pixels
SPLITS = {"clip": 2000, "train": 2000, "val": 200, "test": 300}  # images; the order gives the seeds
MIN_VISIBLE = 0.75  # an image with a thing of which a smaller share is visible is drawn again
RIM = 1  # pixels of white around a thing, as around a sticker
RARE = 0.25  # how often an unseen class is drawn for training, compared with a seen one
FINE = 4  # a silhouette is drawn with 4 x 4 points a pixel
BOX = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
DRAWING = tomllib.loads((Path(__file__).parent / "shapes.toml").read_text("utf-8"))


def outline(kind: str, values: list[float]) -> np.ndarray:
    """Points [N, 2] of a part of a silhouette, see shapes.toml."""
    if kind == "polygon":
        return np.reshape(values, (-1, 2))
    x, y, rx, ry, *ends = values
    angles = np.radians(np.linspace(*(ends or (0, 360)), 33))
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    return (BOX if kind == "box" else circle) * (rx, ry) + (x, y)


def silhouette(name: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The share of every pixel that a thing somewhere in the image covers, with and without the rim
    around it, float64 [96, 96] each.
    """
    centre = rng.uniform(22, SIDE - 22, 2)
    scale = rng.uniform(18, 27)
    angle = rng.uniform(-0.3, 0.3)
    turn = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    canvas = Image.new("L", (SIDE * FINE, SIDE * FINE))
    pen = ImageDraw.Draw(canvas)
    for kind, *values in DRAWING["silhouettes"][name]:
        points = (outline(kind.removeprefix("-"), values) @ turn * scale + centre) * FINE
        pen.polygon(points.ravel().tolist(), fill=0 if kind[0] == "-" else 255)
    cover = canvas.reduce(FINE)
    wide = cover.filter(ImageFilter.MaxFilter(2 * RIM + 1))
    return np.asarray(wide) / 255, np.asarray(cover) / 255


def colour(rng: np.random.Generator, hue: float, spread: float, *rest: float) -> np.ndarray:
    """A colour near a hue of 0 to 1, of saturation and value near `rest`; float64 [3], 0..255."""
    hue += rng.uniform(-spread, spread)
    rest = np.clip(rest + rng.uniform(-0.1, 0.1, 2), 0, 1)
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, *rest))


def noise(rng: np.random.Generator, *cells: int) -> np.ndarray:
    """Smooth noise of 0 to 1 with that many cells down and across, float64 [96, 96]."""
    coarse = Image.fromarray(rng.integers(0, 256, cells, np.uint8))
    return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255


def texture(name: str, rng: np.random.Generator) -> np.ndarray:
    """A piece of ground, float64 [96, 96, 3]."""
    y, x = np.mgrid[:SIDE, :SIDE] + rng.uniform(0, 50, 2)[:, None, None]
    base, other = (colour(rng, *values) for values in DRAWING["colours"][name])
    match name:
        case "brick":
            high = rng.uniform(7, 11)
            row = y // high
            amount = (y % high < 1.6) | ((x + row % 2 * high) % (2 * high) < 1.6)
            amount = np.maximum(amount, 0.3 * noise(rng, 12, 6))
        case "grass":
            amount = noise(rng, 12, 48) ** 2
        case "sand":
            amount = 0.4 * noise(rng, 4, 3) + 0.6 * (rng.random((SIDE, SIDE)) < 0.15)
        case "sky":
            amount = np.clip(2 * noise(rng, 5, 4) - 0.7, 0, 1)
        case "water":
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
    angle = rng.uniform(0, np.pi)
    period = rng.uniform(6, 10)
    y, x = np.mgrid[:SIDE, :SIDE]
    along, across = (x * np.cos(a) + y * np.sin(a) for a in (angle, angle + np.pi / 2))
    middle = period / 2
    stripes = along % period - middle
    match rng.integers(4):
        case 0:
            amount = np.zeros((SIDE, SIDE))
        case 1:
            amount = stripes < 0
        case 2:
            amount = stripes**2 + (across % period - middle) ** 2 < 5
        case 3:
            amount = noise(rng, 4, 4)
    return base + (other - base) * amount[..., None]


def draw(split: str, index: int) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Image uint8 [96, 96, 3], class ids uint8 [96, 96] and a caption for every class in it."""
    rng = np.random.default_rng(mix_seed(list(SPLITS).index(split), index))
    # Unseen classes are rare in training, as in COCO-Stuff.
    share = np.array([RARE if split == "train" and name in UNSEEN else 1 for name in NAMES])
    things_share, stuff_share = (part / part.sum() for part in np.split(share, [len(THINGS)]))
    ground = int(rng.choice(len(STUFF), p=stuff_share))
    while True:
        labels = np.full((SIDE, SIDE), len(THINGS) + ground, np.uint8)
        count = int(rng.integers(2, 4))
        things = rng.choice(len(THINGS), count, replace=False, p=things_share).tolist()
        covers = {thing: silhouette(THINGS[thing], rng) for thing in things}
        areas = {thing: wide > 0.5 for thing, (wide, _) in covers.items()}
        for thing, area in areas.items():
            labels[area] = thing
        if all((labels == k).sum() >= MIN_VISIBLE * area.sum() for k, area in areas.items()):
            break

    image = texture(STUFF[ground], rng)
    for wide, cover in covers.values():
        image[2:, 1:] *= 1 - 0.4 * wide[:-2, :-1, None]  # its shadow
        image += (245 - image) * wide[..., None]
        image += (paint(rng) - image) * cover[..., None]
    image = np.clip(image, 0, 255).astype(np.uint8)
    texts = {k: str(rng.choice(DRAWING["captions"])) for k in np.unique(labels).tolist()}
    return image, labels, {k: text.format(NAMES[k]) for k, text in texts.items()}


def read_captions(folder: Path) -> dict[str, dict[str, str]]:
    """What `generate` writes last: {name of an image: {class id: caption}}. Raises UserError for a
    data set of other classes.
    """
    todo = "move it away, or give another --root"
    text = read_text(folder / "captions.json", f"data set {folder}", todo)
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        captions = json.loads(text)
        if captions.pop("classes") == list(NAMES):
            return captions
    raise UserError(f"data set {folder}", "was drawn by another version", todo)


def generate(folder: Path) -> None:
    """Write `images/`, `labels/` and, last, `captions.json`, unless all are there.

    UserError for a data set of other classes, and for a folder with other files.
    """
    if (folder / "captions.json").exists():
        read_captions(folder)
        return
    claim_folder(folder)
    captions = {"classes": list(NAMES)}
    for split, count in SPLITS.items():
        for index in progress(range(count), f"draw {split}", count):
            name = f"{split}{index:05}"
            image, labels, captions[name] = draw(split, index)
            with atomic_write(folder / "images" / split / f"{name}.jpg") as file:
                Image.fromarray(image).save(file, "JPEG", quality=80, subsampling=0)
            with atomic_write(folder / "labels" / split / f"{name}.png") as file:
                Image.fromarray(labels).save(file, "PNG")
    write_json(folder / "captions.json", captions)
