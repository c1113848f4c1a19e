"""Label maps as images."""

import base64
import colorsys
import io

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from zsseg.utils import atomic_write

NEAREST = Image.Resampling.NEAREST
STRIP_HEIGHT = 160  # pixels of each image in a comparison


def palette(count):
    """`count` distinct colours and, last, black for ignored pixels: uint8 [count + 1, 3]."""
    # Golden-ratio steps of the hue keep neighbours apart.
    hsv = [(0.618034 * i % 1, 0.75, 0.95 - 0.175 * (i // 7 % 3)) for i in range(count)]
    rgb = [colorsys.hsv_to_rgb(*colour) for colour in hsv]
    return (255 * np.array([*rgb, (0, 0, 0)])).astype(np.uint8)


def comparison_strip(image, labels, predicted, classes):
    """Image, ground truth (black from id `classes` on: ignored) and prediction below one another,
    each STRIP_HEIGHT pixels high: uint8 [3 * STRIP_HEIGHT, width, 3].

    image: uint8 [3, H, W]. labels, predicted: class ids [h, w].
    """
    size = (max(STRIP_HEIGHT * image.shape[2] // image.shape[1], 1), STRIP_HEIGHT)
    maps = palette(classes)[torch.stack([labels, predicted]).clamp(max=classes).cpu()]
    parts = [image.permute(1, 2, 0).cpu().numpy(), *maps]
    return np.concatenate([Image.fromarray(part).resize(size, NEAREST) for part in parts])


def save_label_map(labels, path, classes, colours=None):
    """Class ids as a PNG of 8 bits, 16 above 255 classes; those of 8 bits with a palette if there
    are `colours` uint8 [C, 3]. Raises UserError if it cannot be written.
    """
    labels = torch.as_tensor(labels).cpu().numpy().astype(np.min_scalar_type(classes))
    image = Image.fromarray(labels)
    if colours is not None and image.mode == "L":
        image.putpalette(colours.tobytes())
    with atomic_write(path) as temporary:
        image.save(temporary, "PNG")


def overlay(image, labels, colours, legend):
    """The image uint8 [H, W, 3] in grey, tinted and outlined by its label map [H, W], and on its
    right a legend: (class id, text) from the top to as far down as there is room; `colours` uint8
    [C, 3].
    """
    # In grey, since its colours would mix with those of the legend.
    tinted = ((image.mean(2, keepdims=True) + colours[labels]) / 2).astype(np.uint8)
    tinted[:-1][np.diff(labels, axis=0) != 0] = 255
    tinted[:, :-1][np.diff(labels) != 0] = 255

    H, W = labels.shape
    size = max(H // 36, 14)
    font = ImageFont.load_default(size)
    width = max(font.getlength(text) for _, text in legend)
    canvas = Image.new("RGB", (W + 4 * size + int(width), H), "white")
    canvas.paste(Image.fromarray(tinted))
    draw = ImageDraw.Draw(canvas)
    for y, (i, text) in zip(range(size // 2, H, 2 * size), legend, strict=False):
        draw.rectangle((W + size, y, W + 2 * size, y + size), tuple(colours[i].tolist()))
        draw.text((W + 3 * size, y), text, "black", font)
    return canvas


def base64_image(image):
    """The content of a PNG file in base64."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
