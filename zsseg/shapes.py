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

COLOURS, SHAPES = (
    ("red", "green", "blue", "yellow", "purple"),
    ("disc", "square", "triangle", "cross"),
)
THINGS, WALLS = DATASETS["shapes"].names[:20], DATASETS["shapes"].names[20:]
SIDE = 64
# Images; a split's seed is its position here.
SPLITS = {"clip": 1200, "train": 1200, "val": 200, "test": 300}
RGB = dict(
    zip(
        COLOURS,
        [(205, 50, 45), (60, 165, 70), (50, 85, 205), (225, 200, 50), (140, 60, 165)],
        strict=True,
    )
)
CAPTIONS = (
    "a photo of a {}.",
    "an image of a {}.",
    "a sculpture of a {}.",
    "there is a {} here.",
    "a {}.",
)
VISIBLE = 0.5  # a thing of which less than this share is visible is drawn again


def outline(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points of the unit frame lie inside a shape; all four have about the same area."""
    if shape == "disc":
        return x**2 + y**2 < 0.8
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.8
    if shape == "triangle":
        return (y < 0.8) & (y > 2.1 * abs(x) - 1.1)
    return (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 1)


def wall(kind: str, rng: np.random.Generator) -> np.ndarray:
    """A greyish texture [64, 64, 3]."""
    y, x = np.mgrid[:SIDE, :SIDE] + rng.uniform(0, 10, 2)[:, None, None]
    period = rng.uniform(5, 8)
    if kind == "striped wall":
        pattern = np.sin(2 * np.pi * y / period) > 0
    elif kind == "checked wall":
        pattern = np.sin(np.pi * x / period) * np.sin(np.pi * y / period) > 0
    elif kind == "dotted wall":
        pattern = (x % period - period / 2) ** 2 + (y % period - period / 2) ** 2 < (
            0.32 * period
        ) ** 2
    else:
        pattern = rng.random((SIDE // 2, SIDE // 2)).repeat(2, 0).repeat(2, 1) < 0.3
    dark, light = (
        rng.uniform(70, 110) + rng.uniform(-15, 15, 3),
        rng.uniform(140, 180) + rng.uniform(-15, 15, 3),
    )
    return np.where(pattern[..., None], dark, light)


def draw(split: str, index: int) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Image uint8 [64, 64, 3], class ids uint8 [64, 64] and a caption for every class in it."""
    rng = np.random.default_rng(mix_seed(list(SPLITS).index(split), index))
    y, x = np.mgrid[:SIDE, :SIDE]
    while True:
        kind = int(rng.integers(len(WALLS)))
        image, labels = (
            wall(WALLS[kind], rng),
            np.full((SIDE, SIDE), len(THINGS) + kind, np.uint8),
        )
        things = rng.choice(len(THINGS), int(rng.integers(2, 5)), replace=False)
        area = {}
        for thing in things:
            colour, shape = divmod(int(thing), len(SHAPES))
            angle, scale = rng.uniform(-0.25, 0.25), rng.uniform(9, 15)
            cx, cy = rng.uniform(10, SIDE - 10, 2)
            u = ((x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)) / scale
            v = ((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) / scale
            inside = outline(SHAPES[shape], u, v)
            labels[inside], area[thing] = thing, inside.sum()
            shade = 1 + 0.15 * u[inside, None] * rng.uniform(-1, 1)
            image[inside] = (np.array(RGB[COLOURS[colour]]) + rng.uniform(-20, 20, 3)) * shade
        if all((labels == thing).sum() >= VISIBLE * area[thing] for thing in things):
            break
    image = np.clip(image + rng.normal(0, 5, image.shape), 0, 255).astype(np.uint8)
    names = [*THINGS, *WALLS]
    captions = {
        int(k): CAPTIONS[rng.integers(len(CAPTIONS))].format(names[k]) for k in np.unique(labels)
    }
    return image, labels, captions


def generate(folder: Path) -> None:
    """Write `images/`, `labels/` and `captions.json`; what is complete is left alone."""
    if (folder / "captions.json").exists():  # written last
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
