"""Label maps as images: one palette, one overlay and one legend for every command and page."""

import base64
import contextlib
import functools
import io
import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.functional import to_pil_image

from zsseg.utils import atomic_write, digest, expand_path, walk, warn

# By tests/benchmarks/palette.py, far from one another, from black, white and GREY, in CIEDE2000.
PALETTE = np.loadtxt(Path(__file__).with_name("palette.txt"), np.uint8)
DISTINCT = 33  # the first ones, which differ by 20 or more
GREY = 96  # of background words
ALPHA = 150  # of a class's colour over the photo, of 255
LUMINANCE = (0.2126, 0.7152, 0.0722, 0)  # of red, green and blue, as in CSS's grayscale()
STRIP_HEIGHT = 160  # pixels of each image in a comparison
GAP = 4  # pixels between them
ROWS = ("image", "ground truth", "prediction")  # of a comparison
FONTS = """\
/usr/share/fonts
/usr/local/share/fonts
~/.fonts
~/.local/share/fonts
/System/Library/Fonts
/Library/Fonts
C:/Windows/Fonts""".splitlines()


def palette(count):
    """The colours of a data set's classes and, last, black for ignored pixels: uint8 [count + 1,
    3]. Those of more than 255 repeat.
    """
    return np.pad(np.resize(PALETTE, (count, 3)), ((0, 1), (0, 0)))


def word_colours(words):
    """The colours of words, uint8 [C, 3]: each has the same in every list, as long as no other word
    there has a claim to it, which is decided by the words and not by their order.
    """
    pools = itertools.cycle([range(DISTINCT), range(DISTINCT, len(PALETTE))])
    colours = np.zeros((len(words), 3), np.uint8)
    free = []
    for key, i in sorted((int(digest(word), 16), i) for i, word in enumerate(words)):
        if not free:
            pool = next(pools)
            free = [*pool]
        place = min(free, key=lambda place: (place - key) % len(pool))
        free.remove(place)
        colours[i] = PALETTE[place]
    return colours


def tint(labels, colours, size):
    """A label map [h, w] as what is laid over a photo of `size` (width, height): RGBA of its
    `colours` uint8 [C, 3], with white outlines.
    """
    ids = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
    rgba = np.dstack([colours[ids], np.full(ids.shape, ALPHA, np.uint8)])
    rgba[:-1][np.diff(ids, axis=0) != 0] = 255
    rgba[:, :-1][np.diff(ids) != 0] = 255
    return Image.fromarray(rgba)


def overlay(photo, labels, colours):
    """A photo in grey, since its colours would mix with those of the legend, under its label map
    [h, w]; `colours` uint8 [C, 3].
    """
    grey = photo.convert("L", LUMINANCE).convert("RGBA")
    return Image.alpha_composite(grey, tint(labels, colours, photo.size)).convert("RGB")


def with_legend(image, legend):
    """An image with a legend on its right: (colour, text), in as many columns as it takes."""
    size = max(image.height // 36, 14)
    texts = [text for _, text in legend]
    letters = {letter for letter in "".join(texts) if not letter.isascii()}
    font = find_font("".join(sorted(letters)), size)
    width = 4 * size + int(max(map(font.getlength, texts), default=0))
    rows = max(image.height // (2 * size), 1)
    columns = -(-len(legend) // rows)
    canvas = ImageOps.expand(image, (0, 0, columns * width, 0), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (colour, text) in enumerate(legend):
        x = image.width + size + i // rows * width
        y = size // 2 + i % rows * 2 * size
        draw.rectangle((x, y, x + size, y + size), tuple(colour.tolist()))
        draw.text((x + 2 * size, y), text, "black", font)
    return canvas


@functools.cache
def find_font(letters, size):
    """The first font of this system that has all these letters beyond ASCII; Pillow's for none, and
    if there is no such font, which is said.
    """
    default = ImageFont.load_default(size)
    if not letters:
        return default
    files = itertools.chain(*map(walk, map(expand_path, FONTS)))
    for file in sorted(files, key=len):
        with contextlib.suppress(OSError):  # no font of any size
            font = ImageFont.truetype(file, size)
            missing, *drawn = (bytes(font.getmask(letter)) for letter in "\uffff" + letters)
            if missing not in drawn:
                return font
    warn("no font of this system has all letters of these words: legends show boxes")
    return default


def join(images, axis):
    """Images below one another (`axis` 0) or side by side (1), with gaps."""
    gap = [(0, GAP * (axis == i)) for i in range(3)]
    parts = [np.pad(image, gap, constant_values=255) for image in images]
    return Image.fromarray(np.concatenate(parts, axis))


def comparison(image, labels, predicted, classes):
    """ROWS below one another, each STRIP_HEIGHT pixels high, the last two as overlays, dark from id
    `classes` on (ignored).

    image: uint8 [3, H, W]. labels, predicted: class ids [h, w].
    """
    size = (max(STRIP_HEIGHT * image.shape[2] // image.shape[1], 1), STRIP_HEIGHT)
    photo = to_pil_image(image).resize(size)
    maps = torch.stack([labels, predicted]).clamp(max=classes).int().cpu().numpy()
    return join([photo, *(overlay(photo, ids, palette(classes)) for ids in maps)], 0)


def samples(comparisons, legend):
    """Comparisons side by side, with the names of the rows and a legend, see `with_legend`."""
    sheet = ImageOps.expand(join(comparisons, 1), (100, 0, 0, 0), "white")
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(ROWS):
        y = i * (STRIP_HEIGHT + GAP) + STRIP_HEIGHT // 2
        draw.text((GAP, y), name, "black", ImageFont.load_default(14))
    return with_legend(sheet, legend)


def save_label_map(labels, path, classes):
    """Write class ids [H, W] as a PNG of 8 bits, 16 above 255 classes. Raises UserError if that
    fails.
    """
    with atomic_write(path) as temporary:
        ids = labels.cpu().numpy().astype(np.min_scalar_type(classes))
        Image.fromarray(ids).save(temporary, "PNG")


def encode(image, format="PNG", **options):
    """The content of an image file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def base64_text(content):
    return base64.b64encode(content).decode()
