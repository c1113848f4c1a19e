"""Image files: photographs as RGB, label maps as the numbers in the file; the networks' inputs."""

import contextlib
import functools
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from zsseg.config import DataConfig
from zsseg.utils import UserError

ORIENTATION = 0x0112  # the EXIF and TIFF entry that says how the camera was held
# Of other programs, or programs themselves (PostScript).
NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
# Bits of the files whose samples Pillow leaves as stored, or stretches.
LABEL_BITS = {"PNG 1": 8, "PNG L": 8, "PNG P": 8}
LABEL_BITS |= {"PNG I": 16, "PNG I;16": 16, "TIFF I;16": 16, "TIFF I;16B": 16}
STRETCH = {"L;2": 85, "L;4": 17}  # what it multiplies those of 2 and 4 bits with


@functools.cache
def formats_by_ending() -> dict[str, str]:
    """{".jpg": "JPEG", ...} of the files that Pillow reads without another program."""
    Image.init()
    formats = Image.OPEN.keys() - NOT_READ
    return {ending: name for ending, name in Image.EXTENSION.items() if name in formats}


def is_image_name(name: str | Path) -> bool:
    return os.path.splitext(name)[1].lower() in formats_by_ending()


@contextlib.contextmanager
def open_image(file: Path | io.BytesIO, what: str, shown: bool = False) -> Iterator[Image.Image]:
    """An image file, opened and not decoded yet.

    Errors while it is read are a UserError that names it. At most Image.MAX_IMAGE_PIXELS, with
    `shown` Pillow's own limit of twice as many.
    """
    in_memory = isinstance(file, io.BytesIO)
    name = f"this {what}" if in_memory else f"{what} {file}"
    formats = {*formats_by_ending().values()}
    try:
        with contextlib.ExitStack() as stack:
            # Open already: Pillow would map a TIFF into memory, and then turns it wrongly.
            content = file if in_memory else stack.enter_context(open(file, "rb"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = stack.enter_context(Image.open(content, formats=[*formats]))
            pixels = image.width * image.height
            if pixels > Image.MAX_IMAGE_PIXELS and not shown:
                raise ValueError(f"more than {Image.MAX_IMAGE_PIXELS} pixels")
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Its text would name the file object.
        why = "no image" if isinstance(error, UnidentifiedImageError) else error
        todo = "give another" if in_memory else "replace the file"
        raise UserError(name, f"cannot be read ({why})", todo) from None


def read_image(file: Path | io.BytesIO, shown: bool = False, turn: bool = False) -> Image.Image:
    """An image in RGB: transparent parts on white, 16 bits reduced to 8.

    `turn`: turned as its EXIF entry says. `shown`: that too, and of up to twice as many pixels.
    Raises UserError for a missing or broken file.
    """
    with open_image(file, "image", shown) as image:
        if turn or shown:
            with contextlib.suppress(Exception):  # broken EXIF data turn nothing
                image = ImageOps.exif_transpose(image)
        elif image.format == "TIFF" and is_turned(image):
            raise ValueError("a TIFF that says it is turned: set data.exif_turn, or write PNG")
        return as_rgb(image)


def is_turned(image: Image.Image) -> bool:
    """Whether an EXIF entry turns or mirrors it; of TIFFs, whose pixels Pillow turns on its own,
    the entry that it follows.
    """
    return image.getexif().get(ORIENTATION, 1) != 1


def as_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB, 16 bits reduced to 8, transparent parts on white; ValueError for one of
    fractions.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).clip(0, 65535)
        image = Image.fromarray((values // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its numbers are not those of an image, but fractions")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_values(file: Path, bits: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """The numbers in a label map, as stored: uint8 or uint16 [H, W].

    Either a PNG of one channel (grey, or the indices of a palette) or a TIFF of 16 bits, with at
    most `bits` bits. `size`: its image's (width, height). Raises UserError.
    """
    with open_image(file, "label map") as image:
        kind = f"{image.format} {image.mode}"
        if (pages := getattr(image, "n_frames", 1)) > 1:
            kind += f" of {pages} pages"
        if image.format == "TIFF" and is_turned(image):
            kind += " that says it is turned"
        if LABEL_BITS.get(kind, 99) > bits:
            todo = f"write PNG, one channel of {'8' if bits == 8 else '8 or 16'} bits"
            raise UserError(f"label map {file}", f"is {kind}", todo)
        if size and image.size != size:
            why = f"is {image.width} x {image.height}, its image {size[0]} x {size[1]}"
            turn = ", or set data.exif_turn if its camera turned the image"
            todo = f"make the two the same size{turn if image.size == size[::-1] else ''}"
            raise UserError(f"label map {file}", why, todo)
        if not image.tile:
            raise ValueError("it contains no pixels")
        stretch = STRETCH.get(image.tile[0].args, 1)
        values = np.array(image)
    return values.astype(np.uint8 if LABEL_BITS[kind] == 8 else np.uint16) // stretch


def read_labels(file: Path, lut: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label map through `lut` [256 or 65536]: [H, W] of its dtype. `size`: its image's (width,
    height).
    """
    return lut[read_values(file, 8 if len(lut) == 256 else 16, size)]


def to_tensor(image: Image.Image | np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> [3, H, W], contiguous."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def test_size(width: int, height: int, short: int, longest: int) -> tuple[int, int]:
    """(width, height) with the short edge resized to `short`, the long one to at most `longest`
    (detectron2's rule).
    """
    scale = short / min(width, height)
    w, h = (short, scale * height) if width <= height else (scale * width, short)
    if max(w, h) > longest:
        w, h = (x * longest / max(w, h) for x in (w, h))
    return max(int(w + 0.5), 1), max(int(h + 0.5), 1)


def network_inputs(
    image: Image.Image, data_config: DataConfig, short_edges: list[int] = ()
) -> list[Tensor]:
    """uint8 [3, h, w] at each network-input size: with these shorter edges, else with
    `data.test_short_edge`.
    """
    edges = short_edges or [data_config.test_short_edge]
    sizes = [test_size(*image.size, edge, data_config.max_size) for edge in edges]
    return [to_tensor(image.resize(size, Image.Resampling.BILINEAR)) for size in sizes]
