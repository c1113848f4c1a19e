"""Label maps as images."""

import base64
import colorsys
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from zsseg.utils import atomic_write

NEAREST = Image.Resampling.NEAREST
STRIP_HEIGHT = 160  # pixels of each image in a comparison


def palette(count: int) -> np.ndarray:
    """`count` distinct colours and, last, black for ignored pixels: uint8 [count + 1, 3]."""
    colours = [(0, 0, 0)] * (count + 1)
    for i in range(count):
        # Golden-ratio steps of the hue keep neighbours apart.
        colours[i] = colorsys.hsv_to_rgb(0.618034 * i % 1, 0.75, 0.95 - 0.175 * (i // 7 % 3))
    return (255 * np.array(colours)).astype(np.uint8)


def label_type(classes: int) -> type:
    """The type of ids in a label map: 8 bits, 16 above 255 classes."""
    return np.uint8 if classes <= 255 else np.uint16


def comparison_strip(image: Tensor, labels: Tensor, predicted: Tensor, classes: int) -> np.ndarray:
    """Image, ground truth (`classes`: ignored) and prediction below one another, each STRIP_HEIGHT
    pixels high: uint8 [3 * STRIP_HEIGHT, width, 3].

    image: uint8 [3, H, W]. labels, predicted: class ids [h, w].
    """
    width = round(STRIP_HEIGHT * image.shape[2] / image.shape[1])
    size = (min(max(width, 1), 4 * STRIP_HEIGHT), STRIP_HEIGHT)
    colours = palette(classes)
    parts = [image.permute(1, 2, 0).numpy(), colours[labels.numpy()], colours[predicted.numpy()]]
    return np.concatenate([np.array(Image.fromarray(p).resize(size, NEAREST)) for p in parts])


def save_label_map(
    labels: Tensor | np.ndarray, path: Path, classes: int, colours: np.ndarray | None = None
) -> None:
    """Class ids as a PNG of 8 bits, 16 above 255 classes; those of 8 bits with a palette if
    `colours` uint8 [C, 3] are given. Raises UserError if it cannot be written.
    """
    if isinstance(labels, Tensor):
        labels = labels.cpu().numpy()
    image = Image.fromarray(labels.astype(label_type(classes)))
    if colours is not None and image.mode == "L":
        image.putpalette(colours.tobytes())
    with atomic_write(path) as temporary:
        image.save(temporary, "PNG")


def overlay(
    image: np.ndarray, labels: np.ndarray, colours: np.ndarray, legend: list[tuple[int, str]]
) -> Image.Image:
    """The image uint8 [H, W, 3] in grey, tinted and outlined by its label map [H, W], and on its
    right a legend.

    `legend`: (class id, text) from the top to as far down as there is room; `colours` uint8 [C, 3].
    """
    # In grey, since its colours would mix with those of the legend.
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    tinted = (0.5 * grey + 0.5 * colours[labels]).astype(np.uint8)
    edges = (np.diff(labels, axis=axis, append=labels.take([-1], axis)) for axis in (0, 1))
    tinted[np.logical_or(*edges)] = 255

    H, W = labels.shape
    size = max(H // 36, 14)
    font = ImageFont.load_default(size)
    line = 2 * size
    legend = legend[: max(H // line - 1, 1)]
    width = 4 * size + max((int(font.getlength(text)) for _, text in legend), default=0)
    canvas = Image.new("RGB", (W + width, max(H, 2 * line)), "white")
    canvas.paste(Image.fromarray(tinted))
    draw = ImageDraw.Draw(canvas)
    for i, (category, text) in enumerate(legend):
        y = size // 2 + line * i
        colour = tuple(colours[category].tolist())
        draw.rectangle((W + size, y, W + 2 * size, y + size), colour)
        draw.text((W + 3 * size, y + size // 2), text, "black", font, "lm")
    return canvas


def base64_image(image: Image.Image, image_format: str) -> str:
    """The content of an image file in base64."""
    file = io.BytesIO()
    image.save(file, image_format)
    return base64.b64encode(file.getvalue()).decode()
