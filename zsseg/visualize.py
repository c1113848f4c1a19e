"""Label maps as images."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from zsseg.files import PNG_MARK, result


def palette(count: int) -> np.ndarray:
    """`count` distinct colours and, last, black for ignored pixels: uint8 [count + 1, 3]."""
    hue = (np.arange(count) * 0.618034) % 1  # golden-ratio steps keep neighbours apart
    value = 0.95 - 0.35 * ((np.arange(count) // 7) % 3) / 2
    phase = (hue[:, None] * 6 + np.array([5, 3, 1])) % 6
    rgb = value[:, None] * (1 - 0.75 * np.clip(np.minimum(phase, 4 - phase), 0, 1))
    return np.concatenate([(255 * rgb).astype(np.uint8), np.zeros((1, 3), np.uint8)])


def column(
    image: Tensor, labels: Tensor, predicted: Tensor, classes: int, height: int = 160
) -> np.ndarray:
    """Image, truth (`classes` where ignored) and prediction below one another, each `height`
    pixels high.
    """
    colours, width = (
        palette(classes),
        min(max(round(height * image.shape[2] / image.shape[1]), 1), 4 * height),
    )
    small = lambda array: np.array(
        Image.fromarray(array).resize((width, height), Image.Resampling.NEAREST)
    )
    kind = np.uint8 if classes <= 255 else np.int32
    maps = [colours[small(m.numpy().astype(kind))] for m in (labels, predicted)]
    return np.concatenate([small(image.permute(1, 2, 0).numpy()), *maps])


def label_type(classes: int) -> type:
    """Of the ids in a label map: 8 bits, 16 above 255 classes."""
    return np.uint8 if classes <= 255 else np.uint16


def save_label_map(
    predicted: Tensor | np.ndarray, path: Path, classes: int, colours: np.ndarray | None = None
) -> None:
    """Class ids as a PNG of 8 bits, 16 above 255 classes; those of 8 bits with a palette where
    there are `colours`.
    """
    image = Image.fromarray(
        np.asarray(
            predicted.cpu() if isinstance(predicted, Tensor) else predicted, label_type(classes)
        )
    )
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
    H, W = labels.shape
    size = max(H // 36, 14)
    font = ImageFont.load_default(size)
    # Or its colours would mix with those of the legend.
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    tinted = (0.5 * grey + 0.5 * colours[labels]).astype(np.uint8)
    edge, across, down = (
        np.zeros_like(labels, bool),
        labels[:, 1:] != labels[:, :-1],
        labels[1:] != labels[:-1],
    )
    for part, different in (
        (edge[:, 1:], across),
        (edge[:, :-1], across),
        (edge[1:], down),
        (edge[:-1], down),
    ):
        part |= different
    tinted[edge] = 255
    row = 2 * size
    rows = max(H // row - 1, 1)
    if len(legend) > rows:
        legend = [*legend[: rows - 1], (-1, f"and {len(legend) - rows + 1} more")]
    width = 3 * size + max((int(font.getlength(text)) for _, text in legend), default=0)
    canvas = Image.new("RGB", (W + width + size, max(H, row * (len(legend) + 1))), "white")
    canvas.paste(Image.fromarray(tinted))
    draw = ImageDraw.Draw(canvas)
    for i, (category, text) in enumerate(legend):
        y = size // 2 + row * i
        if category >= 0:
            draw.rectangle((W + size, y, W + 2 * size, y + size), tuple(colours[category].tolist()))
        draw.text((W + 3 * size, y + size // 2), text, "black", font, "lm")
    return canvas
