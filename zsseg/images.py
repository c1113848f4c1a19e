"""Image files: photographs as RGB, label maps as the numbers in the file; the networks' inputs."""

import contextlib
import io
import os

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from zsseg.utils import UserError

# Pillow's others are other programs' files, or programs themselves (PostScript).
FORMATS = "BMP GIF JPEG JPEG2000 PNG PPM TGA TIFF WEBP"
# Bits of the files whose samples Pillow leaves as stored, or stretches.
LABEL_BITS = {"PNG 1": 8, "PNG L": 8, "PNG P": 8}
LABEL_BITS |= {"PNG I": 16, "PNG I;16": 16, "TIFF I;16": 16, "TIFF I;16B": 16}
STRETCH = {"L;2": 85, "L;4": 17}  # what it multiplies those of 2 and 4 bits with


def is_image_name(name):
    ending = os.path.splitext(name)[1].lower()
    return Image.registered_extensions().get(ending) in FORMATS.split()


@contextlib.contextmanager
def open_image(file, what):
    """An image file, opened and not decoded yet. Errors while it is read, also that it has more
    pixels than Pillow allows, are a UserError that names it.
    """
    name = f"this {what}" if isinstance(file, io.BytesIO) else f"{what} {file}"
    try:
        with Image.open(file, formats=FORMATS.split()) as image:
            yield image
    except (OSError, SyntaxError, ValueError, LookupError, Image.DecompressionBombError) as error:
        # Its text would name the file object.
        why = "no image" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(name, f"cannot be read ({why})", "give another") from None


def read_image(file, turn=False):
    """An image in RGB: transparent parts on white, 16 bits reduced to 8.

    `turn`: as its EXIF entry says, which viewers do. Raises UserError for a missing or broken file.
    """
    with open_image(file, "image") as image:
        if turn:
            with contextlib.suppress(Exception):  # broken EXIF data turn nothing
                image = ImageOps.exif_transpose(image)
        return as_rgb(image)


def as_rgb(image):
    """An image in RGB, 16 bits reduced to 8, transparent parts on white; ValueError for one of
    fractions.
    """
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its numbers are not those of an image, but fractions")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_values(file, bits, size=None):
    """The numbers in a label map, as stored: uint8 or uint16 [H, W].

    Either a PNG of one channel (grey, or the indices of a palette) or a TIFF of 16 bits, with at
    most `bits` bits. `size`: its image's (width, height). Raises UserError.
    """
    with open_image(file, "label map") as image:
        kind = f"{image.format} {image.mode}"
        if getattr(image, "n_frames", 1) > 1:
            kind += " of several pages"
        if LABEL_BITS.get(kind, 99) > bits:
            todo = f"write PNG, one channel of {'8' if bits == 8 else '8 or 16'} bits"
            raise UserError(f"label map {file}", f"is {kind}", todo)
        if size and image.size != size:
            why = "is {} x {}, its image {} x {}".format(*image.size, *size)
            todo = "make them one size, or set data.exif_turn if the camera turned the image"
            raise UserError(f"label map {file}", why, todo)
        stretch = STRETCH.get(image.tile[0].args, 1)
        values = np.array(image)
    return values.astype(f"uint{LABEL_BITS[kind]}") // stretch


def read_pair(image_file, label_file, lut, turn):
    """An image, see `read_image`, and its label map through `lut` [256 or 65536]: [H, W] of its
    dtype. Raises UserError.
    """
    image = read_image(image_file, turn)
    return image, lut[read_values(label_file, 8 if len(lut) == 256 else 16, image.size)]


def to_tensor(image):
    """uint8 [H, W, 3] -> [3, H, W], contiguous."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def test_size(width, height, short, longest):
    """(width, height) with the short edge resized to `short`, the long one to at most `longest`
    (detectron2's rule).
    """
    scale = min(short / min(width, height), longest / max(width, height))
    return tuple(max(int(scale * side + 0.5), 1) for side in (width, height))


def network_inputs(image, data_config, short_edges=()):
    """uint8 [3, h, w] at each network-input size: with these shorter edges, else with
    `data.test_short_edge`.
    """
    edges = short_edges or [data_config.test_short_edge]
    sizes = [test_size(*image.size, edge, data_config.max_size) for edge in edges]
    return [to_tensor(image.resize(size, Image.Resampling.BILINEAR)) for size in sizes]
