"""The synthetic data set: 64 x 64 images of coloured shapes before textured walls, generated from
fixed seeds.

Five colour x shape combinations are unseen: the segmenter gets neither their masks nor their names,
while every colour and every shape is seen in other combinations. The small CLIP is trained on
images of its own (split "clip").
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from zsseg.datasets import DATASETS
from zsseg.files import MARK, PNG_MARK, result
from zsseg.utils import mix_seed, progress

RGB = {
    "red": (205, 50, 45),
    "green": (60, 165, 70),
    "blue": (50, 85, 205),
    "yellow": (225, 200, 50),
    "purple": (140, 60, 165),
}
SHAPES = ("disc", "square", "triangle", "cross")
NAMES = DATASETS["shapes"].names
THINGS = NAMES[:20]  # every colour with every shape
WALLS = NAMES[20:]
SIDE = 64  # pixels
SPLITS = {"clip": 1200, "train": 1200, "val": 200, "test": 300}  # images; the order gives the seeds
CAPTIONS = (
    "a photo of a {}.",
    "an image of a {}.",
    "a sculpture of a {}.",
    "there is a {} here.",
    "a {}.",
)
MIN_VISIBLE = 0.5  # an image with a thing of which a smaller share is visible is drawn again


def shape_mask(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points of the unit frame belong to a shape; all four have about the same area."""
    if shape == "disc":
        return x**2 + y**2 < 0.8
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.8
    if shape == "triangle":
        return (y < 0.8) & (y > 2.1 * abs(x) - 1.1)
    return (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 1)


def draw_wall(name: str, rng: np.random.Generator) -> np.ndarray:
    """A greyish texture, float64 [64, 64, 3]."""
    y, x = np.mgrid[:SIDE, :SIDE] + rng.uniform(0, 10, 2)[:, None, None]
    period = rng.uniform(5, 8)
    if name == "striped wall":
        pattern = np.sin(2 * np.pi * y / period) > 0
    elif name == "checked wall":
        pattern = np.sin(np.pi * x / period) * np.sin(np.pi * y / period) > 0
    elif name == "dotted wall":
        dx, dy = (v % period - period / 2 for v in (x, y))
        pattern = dx**2 + dy**2 < (0.32 * period) ** 2
    else:
        pattern = rng.random((SIDE // 2, SIDE // 2)).repeat(2, 0).repeat(2, 1) < 0.3
    dark = rng.uniform(70, 110) + rng.uniform(-15, 15, 3)
    light = rng.uniform(140, 180) + rng.uniform(-15, 15, 3)
    return np.where(pattern[..., None], dark, light)


def draw(split: str, index: int) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Image uint8 [64, 64, 3], class ids uint8 [64, 64] and a caption for every class in it."""
    rng = np.random.default_rng(mix_seed(list(SPLITS).index(split), index))
    y, x = np.mgrid[:SIDE, :SIDE]
    while True:
        wall = int(rng.integers(len(WALLS)))
        image = draw_wall(WALLS[wall], rng)
        labels = np.full((SIDE, SIDE), len(THINGS) + wall, np.uint8)
        things = rng.choice(len(THINGS), int(rng.integers(2, 5)), replace=False).tolist()
        area = {}
        for thing in things:
            colour, shape = THINGS[thing].split()
            angle = rng.uniform(-0.25, 0.25)
            scale = rng.uniform(9, 15)
            cx, cy = rng.uniform(10, SIDE - 10, 2)
            u = ((x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)) / scale
            v = ((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) / scale
            mask = shape_mask(shape, u, v)
            labels[mask] = thing
            area[thing] = mask.sum()
            shade = 1 + 0.15 * u[mask, None] * rng.uniform(-1, 1)
            image[mask] = (np.array(RGB[colour]) + rng.uniform(-20, 20, 3)) * shade
        if all((labels == thing).sum() >= MIN_VISIBLE * area[thing] for thing in things):
            break
    image = np.clip(image + rng.normal(0, 5, image.shape), 0, 255).astype(np.uint8)
    captions = {k: str(rng.choice(CAPTIONS)).format(NAMES[k]) for k in np.unique(labels).tolist()}
    return image, labels, captions


def generate(folder: Path) -> None:
    """Write `images/`, `labels/` and, last, `captions.json`, unless all are there."""
    if (folder / "captions.json").exists():
        return
    captions = {}
    for split, count in SPLITS.items():
        for index in progress(range(count), f"draw {split}", count):
            image, labels, captions[f"{split}{index:05}"] = draw(split, index)
            with result(folder / "images" / split / f"{split}{index:05}.jpg") as file:
                Image.fromarray(image).save(file, "JPEG", quality=80, subsampling=0, comment=MARK)
            with result(folder / "labels" / split / f"{split}{index:05}.png") as file:
                Image.fromarray(labels).save(file, "PNG", pnginfo=PNG_MARK)
    with result(folder / "captions.json") as file:
        file.write_text(json.dumps({"program": MARK} | captions), "utf-8")
