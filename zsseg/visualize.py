"""Label maps as images."""

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from zsseg.files import PNG_MARK, result


def palette(count: int) -> np.ndarray:
    """`count` distinct colours and, last, black for ignored pixels: uint8 [count + 1, 3]."""
    colours = [
        # Golden-ratio steps of the hue keep neighbours apart.
        colorsys.hsv_to_rgb(0.618034 * i % 1, 0.75, 0.95 - 0.175 * (i // 7 % 3))
        for i in range(count)
    ]
    return (255 * np.array([*colours, (0, 0, 0)])).astype(np.uint8)


def comparison_strip(
    image: Tensor, labels: Tensor, predicted: Tensor, classes: int, height: int = 160
) -> np.ndarray:
    """Image, ground truth (`classes` where ignored) and prediction below one another, each `height`
    pixels high: uint8 [3 * height, width, 3].

    image: uint8 [3, H, W]. labels, predicted: class ids [h, w].
    """
    width = round(height * image.shape[2] / image.shape[1])
    size = (min(max(width, 1), 4 * height), height)
    label_maps = (m.numpy().astype(label_type(classes)) for m in (labels, predicted))
    images = [image.permute(1, 2, 0).numpy(), *(palette(classes)[m] for m in label_maps)]
    nearest = Image.Resampling.NEAREST
    return np.concatenate([np.array(Image.fromarray(i).resize(size, nearest)) for i in images])


def label_type(classes: int) -> type:
    """Of the ids in a label map: 8 bits, 16 above 255 classes."""
    return np.uint8 if classes <= 255 else np.uint16


def save_label_map(
    labels: Tensor | np.ndarray, path: Path, classes: int, colours: np.ndarray | None = None
) -> None:
    """Class ids as a PNG of 8 bits, 16 above 255 classes; those of 8 bits with a palette where
    there are `colours` uint8 [C, 3].
    """
    if isinstance(labels, Tensor):
        labels = labels.cpu().numpy()
    image = Image.fromarray(labels.astype(label_type(classes)))
    if colours is not None and image.mode == "L":
        image.putpalette(colours.tobytes())
    with result(path) as temporary:
        image.save(temporary, "PNG", pnginfo=PNG_MARK)


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
    across = labels[:, 1:] != labels[:, :-1]
    down = labels[1:] != labels[:-1]
    for part, edge in (
        (tinted[:, 1:], across),
        (tinted[:, :-1], across),
        (tinted[1:], down),
        (tinted[:-1], down),
    ):
        part[edge] = 255

    H, W = labels.shape
    size = max(H // 36, 14)
    font = ImageFont.load_default(size)
    line = 2 * size
    max_lines = max(H // line - 1, 1)
    if len(legend) > max_lines:
        legend = [*legend[: max_lines - 1], (-1, f"and {len(legend) - max_lines + 1} more")]
    width = 3 * size + max((int(font.getlength(text)) for _, text in legend), default=0)
    canvas = Image.new("RGB", (W + width + size, max(H, line * (len(legend) + 1))), "white")
    canvas.paste(Image.fromarray(tinted))
    draw = ImageDraw.Draw(canvas)
    for i, (category, text) in enumerate(legend):
        y = size // 2 + line * i
        if category >= 0:
            draw.rectangle((W + size, y, W + 2 * size, y + size), tuple(colours[category].tolist()))
        draw.text((W + 3 * size, y + size // 2), text, "black", font, "lm")
    return canvas
