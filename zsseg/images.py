"""Image files: photographs as RGB, label maps as the numbers in the file."""

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from zsseg.utils import UserError

# `open_image` has its own limit.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
ORIENTATION = 0x0112  # the EXIF entry that says how the camera was held
# Endings of images that Pillow does not read, or only with more packages.
IMAGE_LIKE = frozenset(
    ".heic .heif .hif .avif .jxl .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .pef .srw .raw .psd "  # noqa: SIM905
    ".svg .exr .hdr .webp .jp2 .eps .xcf .mpo".split()
)
# Pillow leaves their samples as they are, or in a way that can be undone.
LABEL_FORMATS = ("PNG", "TIFF", "BMP", "DIB", "GIF", "PPM")
FIRST_PAGE = "the image has more than one page or frame; the first is read"
TURNED = (
    "the camera turned the image (EXIF), which is not applied; labels drawn on the turned one "
    "require data.exif_turn = true"
)
GREY = "the palette is grey but not in order; the labels are its indices, not its greys"


@functools.cache
def image_endings() -> set[str]:
    """Of the files that Pillow reads without another program."""
    Image.init()
    formats = Image.OPEN.keys() - {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
    return {ending for ending, format in Image.EXTENSION.items() if format in formats}


@contextlib.contextmanager
def open_image(file: Path, what: str, limited: bool = True) -> Iterator[Image.Image]:
    """An image file, opened and not decoded yet; errors while it is read are a UserError that names
    it. `limited`: at most Image.MAX_IMAGE_PIXELS, else Pillow's own limit of twice as many.
    """
    try:
        with contextlib.ExitStack() as stack:
            image = stack.enter_context(Image.open(file))
            # Pillow turns a TIFF that is mapped from its file wrongly.
            if image.format == "TIFF" and orientation(image) != 1:
                content = (
                    file if isinstance(file, io.BytesIO) else io.BytesIO(Path(file).read_bytes())
                )
                image = stack.enter_context(Image.open(content))
            if limited and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                size = f"{image.width} x {image.height}"
                raise ValueError(f"{size} is more than {Image.MAX_IMAGE_PIXELS} pixels")
            if image.format == "EPS":
                raise ValueError("PostScript is a program, and is not run")
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{what} {file}", f"cannot be read ({error})", "replace the file") from None


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, not turned, where there is none."""
    with contextlib.suppress(Exception):  # broken EXIF data raise anything
        if (value := image.getexif().get(ORIENTATION, 1)) in range(1, 9):
            return value
    return 1


def as_stored(image: Image.Image, turned: int) -> Image.Image:
    """A decoded image with its pixels as they are in the file: Pillow turns TIFFs by itself."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # of `Image.Transpose`
    return image.transpose(undo[turned]) if image.format == "TIFF" and turned != 1 else image


def remarks_on(file: Path) -> tuple[bool, int]:
    """(Whether its EXIF entry turns or mirrors an image, the number of pages or frames after the
    first, which is the one that is read); (False, 0) where it cannot be read.
    """
    with contextlib.suppress(UserError), open_image(file, "image", limited=False) as image:
        # The further images of an MPO are a telephone's previews.
        pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        return orientation(image) != 1, pages - 1
    return False, 0


def read_image(file: Path, shown: bool = False, turn: bool = False) -> Image.Image:
    """An image in RGB: transparent parts on white, 16 bits reduced to 8.

    `turn`: turned as its EXIF entry says. `shown`: that too, and of up to twice as many pixels. A
    missing or broken file is a UserError that names it.
    """
    with open_image(file, "image", limited=not shown) as image:
        turned = orientation(image)
        image.load()
        if turn or shown:
            with contextlib.suppress(Exception):  # broken EXIF data turn nothing
                image = ImageOps.exif_transpose(image)
        else:
            image = as_stored(image, turned)
        return as_rgb(image)


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


def read_samples(file: Path) -> tuple[np.ndarray, str]:
    """The numbers in a label map as they are in the file [H, W] (or [H, W, channels]), and a remark
    where they may surprise.

    Pillow stretches samples of fewer than 8 bits to 0..255, inverts TIFFs whose white is 0, and
    scales PGMs to their largest value. All of that is undone here; what cannot be undone, as JPEG's
    losses, is a UserError.
    """
    what = f"label map {file}"
    remark = ""
    with open_image(file, "label map") as image:
        pages = getattr(image, "n_frames", 1)
        # Asking a PNG would decode it, and Pillow turns only TIFFs.
        turned = orientation(image) if image.format == "TIFF" else 1
        compressed = "jpeg" in str(image.info.get("compression"))
        if image.format not in LABEL_FORMATS or compressed:
            lossy = "compressed as JPEG" if compressed else image.format
            raise UserError(what, f"is {lossy}, which changes values", "write PNG")
        if pages > 1:
            raise UserError(what, f"contains {pages} pages", "write one label map a file")
        if image.format in ("BMP", "DIB") and image.mode == "1" and bits_of_bmp(file) != 1:
            why = "is a BMP of two greys in more than one bit, which Pillow misreads"
            raise UserError(what, why, "write PNG")
        if not image.tile:
            raise ValueError("it contains no pixels")
        decoder, _, _, arguments = image.tile[0]
        if not isinstance(arguments, tuple):
            arguments = (arguments,)
        image.load()
        values = np.array(as_stored(image, turned))
        if image.mode == "P":
            greys = np.array(image.getpalette("RGB")).reshape(-1, 3)
            used = np.unique(values)
            used = used[used < len(greys)]
            is_grey = (greys[used] == greys[used, :1]).all()
            remark = GREY if is_grey and (greys[used, 0] != used).any() else ""

    if values.dtype == bool:
        values = values.astype(np.uint8)
    if decoder.startswith("ppm") and image.mode in ("L", "I"):  # scaled to the type's largest value
        full = 255 if image.mode == "L" else 65535
        values = np.rint(values * (arguments[-1] / full)).astype(values.dtype)
    elif packed := re.fullmatch(r"[1L];?([24]?)(I?)R?", str(arguments[0])):
        if packed[2]:  # inverted
            values = (1 if image.mode == "1" else 255) - values
        values = values // {"2": 85, "4": 17, "": 1}[packed[1]]
    return values, remark


def bits_of_bmp(file: Path) -> int:
    """Bits per pixel, from the header of a Windows bitmap."""
    with open(file, "rb") as content:
        return int.from_bytes(content.read(30)[28:], "little")


def check_values(
    values: np.ndarray, file: Path, bits: int, size: tuple[int, int] | None = None
) -> np.ndarray:
    """The numbers of `read_samples` as label values [H, W], uint8 or uint16. `size`: the image's
    (width, height). Raises UserError.
    """
    what = f"label map {file}"
    # Pillow opens some 16-bit files as int32, others with the high byte first.
    if bits == 16 and values.dtype in (np.int32, ">u2"):
        narrow = values.astype(np.uint16)
        values = narrow if np.array_equal(narrow, values) else values
    why = ""
    if values.ndim == 3:
        why = f"has {values.shape[2]} channels"
    elif values.dtype not in ([np.uint8] if bits == 8 else [np.uint8, np.uint16]):
        why = f"contains values of type {values.dtype}"
    if why:
        todo = f"write one channel of {'8' if bits == 8 else '8 or 16'} bits"
        raise UserError(what, why, todo)
    if size and values.shape[::-1] != size:
        why = f"is {values.shape[1]} x {values.shape[0]}, its image {size[0]} x {size[1]}"
        turn = ", or set data.exif_turn if its camera turned the image"
        todo = f"make the two the same size{turn if values.shape == size else ''}"
        raise UserError(what, why, todo)
    return values


def read_values(file: Path, bits: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """The label values [H, W] of a file, uint8 or uint16. `size`: its image's (width, height).
    Raises UserError.
    """
    return check_values(read_samples(file)[0], file, bits, size)


def read_labels(file: Path, lut: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label map through `lut`: [H, W] of its dtype. `size`: its image's (width, height)."""
    return lut[read_values(file, 8 if len(lut) == 256 else 16, size)]
