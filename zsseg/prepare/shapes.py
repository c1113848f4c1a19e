"""The synthetic data set: 64 x 64 images of stickers on textured ground, from fixed seeds.

Every fifth class of two alphabetical lists is unseen: the segmenter gets neither its masks nor its
name. A class is a silhouette or a texture with a plain noun for a name. The colour, pattern, size
and angle of a thing say nothing about its class, so no unseen class is made of seen ones.
The small CLIP is trained on separate images (split "clip").
"""

import colorsys
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import default_rng
from PIL import Image, ImageDraw, ImageFilter

from zsseg.data import batches
from zsseg.datasets import DATASETS
from zsseg.prepare.convert import save
from zsseg.utils import UserError, claim_folder, mix_seed, progress, read_table, write_json

NAMES = DATASETS["shapes"].names
UNSEEN = DATASETS["shapes"].unseen
THINGS = 20  # the first classes; the others are textures
SIDE = 64  # pixels
SPLITS = {"clip": 2000, "train": 2000, "val": 200, "test": 300}  # images; the order gives the seeds
MIN_VISIBLE = 0.75  # an image with a thing of which a smaller share is visible is drawn again
FINE = 4  # a silhouette is drawn with 4 x 4 points a pixel
DRAWING = read_table("prepare/shapes.toml")


def outline(kind, values):
    """Points [N, 2] of a part of a silhouette, see shapes.toml."""
    if "polygon" in kind:
        return np.reshape(values, (-1, 2))
    x, y, rx, ry, *ends = values
    angles = np.radians(np.linspace(*(ends or (0, 360)), 33))
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], 1)


def silhouette(name, rng):
    """The share of every pixel that a thing somewhere in the image covers, with and without a rim
    of a pixel: float64 [2, 64, 64].
    """
    centre = rng.uniform(15, SIDE - 15, 2)
    scale = rng.uniform(12, 18)
    angle = rng.uniform(-0.3, 0.3)
    turn = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    canvas = Image.new("L", (SIDE * FINE, SIDE * FINE))
    pen = ImageDraw.Draw(canvas)
    for kind, *values in DRAWING["silhouettes"][name]:
        points = (outline(kind, values) @ turn * scale + centre) * FINE
        pen.polygon(points.ravel().tolist(), fill=0 if kind[0] == "-" else 255)
    cover = canvas.reduce(FINE)
    return np.stack([cover.filter(ImageFilter.MaxFilter(3)), cover]) / 255


def colour(rng, hue, spread, *rest):
    """A colour near a hue of 0 to 1, of saturation and value near `rest`; float64 [3], 0..255."""
    hue += rng.uniform(-spread, spread)
    rest = np.clip(rest + rng.uniform(-0.1, 0.1, 2), 0, 1)
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, *rest))


def noise(rng, *cells):
    """Smooth noise of 0 to 1 with that many cells down and across, float64 [64, 64]."""
    coarse = Image.fromarray(rng.integers(0, 256, cells, np.uint8))
    return np.asarray(coarse.resize((SIDE, SIDE))) / 255


def texture(name, rng):
    """A piece of ground, float64 [64, 64, 3]."""
    y, x = np.mgrid[:SIDE, :SIDE] + rng.uniform(0, 50, (2, 1, 1))
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


def paint(rng):
    """The surface of a thing, whatever it is: any colour, plain or with a pattern; float64 [64, 64,
    3].
    """
    hue = rng.random()
    base = colour(rng, hue, 0, 0.85, 0.85)
    other = colour(rng, hue, 0.06, 0.8, 0.65)
    angle = rng.uniform(0, np.pi)
    period = rng.uniform(6, 10)
    y, x = np.mgrid[:SIDE, :SIDE]
    along, across = (
        (x * np.cos(a) + y * np.sin(a)) % period - period / 2 for a in (angle, angle + np.pi / 2)
    )
    patterns = [0 * x, along < 0, along**2 + across**2 < 5]  # plain, stripes, dots, or clouds
    kind = rng.integers(4)
    amount = noise(rng, 4, 4) if kind == 3 else patterns[kind]
    return base + (other - base) * amount[..., None]


def draw(split, index):
    """Image uint8 [64, 64, 3], class ids uint8 [64, 64] and a caption for every class in it."""
    rng = default_rng(mix_seed(list(SPLITS).index(split), index))
    # Unseen classes are rare in training, as in COCO-Stuff.
    share = np.array([0.25 if split == "train" and name in UNSEEN else 1 for name in NAMES])
    things_share, stuff_share = (part / part.sum() for part in np.split(share, [THINGS]))
    ground = THINGS + rng.choice(len(stuff_share), p=stuff_share)
    while True:
        labels = np.full((SIDE, SIDE), ground, np.uint8)
        things = rng.choice(THINGS, rng.integers(2, 4), replace=False, p=things_share)
        covers = np.stack([silhouette(NAMES[k], rng) for k in things])  # [N, 2, 64, 64]
        areas = covers[:, 0] > 0.5
        for k, area in zip(things, areas, strict=True):
            labels[area] = k
        shown = (labels == things[:, None, None]).sum((1, 2))
        if (shown >= MIN_VISIBLE * areas.sum((1, 2))).all():
            break

    image = texture(NAMES[ground], rng)
    for wide, cover in covers[..., None]:
        image[2:, 1:] *= 1 - 0.4 * wide[:-2, :-1]  # its shadow
        image += (245 - image) * wide
        image += (paint(rng) - image) * cover
    image = image.clip(0, 255).astype(np.uint8)
    present = np.unique(labels).tolist()
    return image, labels, {k: rng.choice(DRAWING["captions"]).format(NAMES[k]) for k in present}


@dataclass
class Drawings:
    """Item i: an image of a split, drawn and written: its name, and a caption for every class."""

    folder: Path
    split: str

    def __getitem__(self, index):
        name = f"{self.split}{index:05}"
        image, labels, captions = draw(self.split, index)
        stem = f"{self.split}/{name}"
        save(image, self.folder / f"images/{stem}.jpg", "JPEG", quality=80, subsampling=0)
        save(labels, self.folder / f"labels/{stem}.png")
        return name, captions


def generate(folder, workers=0):
    """Write `images/`, `labels/` and, last, `captions.json`, {name of an image: {class id:
    caption}}, unless that exists. UserError for a folder with other files, or with a data set of
    other classes or of another size.
    """
    file = folder / "captions.json"
    captions = {"classes": NAMES, "side": SIDE}
    if file.exists():
        if not captions.items() <= json.loads(file.read_bytes()).items():
            todo = "move it away, or give another --root"
            raise UserError(f"data set {folder}", "was drawn by an earlier version", todo)
        return
    claim_folder(folder)
    for split, count in SPLITS.items():
        drawn = batches(Drawings(folder, split), range(count), None, workers)
        captions |= progress(drawn, f"draw {split}", count)
    write_json(file, captions)
