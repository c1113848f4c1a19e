"""Image files: photographs as a viewer shows them, label maps as the numbers that they hold."""

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

# `open_image` has limits of its own.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
ORIENTATION = 0x0112  # the EXIF entry that says how the camera was held
# Of images that Pillow does not read, or not without more packages.
IMAGE_LIKE = frozenset(
    ".heic .heif .hif .avif .jxl .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .pef .srw .raw .psd "  # noqa: SIM905
    ".svg .exr .hdr .webp .jp2 .eps .xcf .mpo".split()
)
# Whose samples come through Pillow, or can be had back.
LABEL_FORMATS = ("PNG", "TIFF", "BMP", "DIB", "GIF", "PPM")
FIRST_PAGE = "the image has more than one page or frame; the first is read"
TURNED = (
    "the camera turned the image (EXIF), which is not applied; labels drawn on the turned one "
    "want data.exif_turn = true"
)
GREY = "the palette is grey but not in order; what counts are its indices, not its greys"


@functools.cache
def image_endings() -> set[str]:
    """Of the files that Pillow reads as images, without those that need another program."""
    Image.init()
    others = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
    return {
        ending
        for ending, kind in Image.EXTENSION.items()
        if kind in Image.OPEN and kind not in others
    }


@contextlib.contextmanager
def open_image(file: Path, what: str, limited: bool = True) -> Iterator[Image.Image]:
    """An image file that is open and not decoded yet; what goes wrong while it is read is a
    UserError that names it.
    """
    try:
        with contextlib.ExitStack() as stack:
            image = stack.enter_context(Image.open(file))
            # Mapped from the file, Pillow would turn it wrongly.
            if image.format == "TIFF" and orientation(image) != 1:
                image = stack.enter_context(Image.open(io.BytesIO(Path(file).read_bytes())))
            # Pillow itself refuses twice as many.
            if limited and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(
                    f"{image.width} x {image.height} is more than {Image.MAX_IMAGE_PIXELS} pixels"
                )
            if image.format == "EPS":
                raise ValueError("PostScript is a program, and is not run")
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{what} {file}", f"cannot be read ({error})", "replace the file") from None


def orientation(image: Image.Image) -> int:
    """How the camera was held, 1 to 8; 1, not turned, where it does not say."""
    with contextlib.suppress(Exception):  # broken notes raise anything
        if (value := image.getexif().get(ORIENTATION, 1)) in range(1, 9):
            return value
    return 1


def as_stored(image: Image.Image, turned: int) -> Image.Image:
    """A decoded image with its pixels where the file has them: Pillow turns TIFFs by itself."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # of `Image.Transpose`
    return image.transpose(undo[turned]) if image.format == "TIFF" and turned != 1 else image


def remarks_on(file: Path) -> tuple[bool, int]:
    """Whether a viewer would turn or mirror an image, and how many pages or frames it has beside
    the first, which is the one that is read (a telephone's previews do not count); nothing where it
    cannot be read.
    """
    with contextlib.suppress(UserError), open_image(file, "image", limited=False) as image:
        return orientation(image) != 1, getattr(
            image, "n_frames", 1
        ) - 1 if image.format != "MPO" else 0
    return False, 0


def read_image(
    file: Path,
    mode: str | None = "RGB",
    what: str = "image",
    shown: bool = False,
    turn: bool = False,
) -> Image.Image:
    """An image, whole and in `mode`: transparent parts on white, 16 bits brought to 8. None: as it
    is in the file.

    `turn`: as its camera says. `shown`: that too, and of up to twice as many pixels. A missing or
    broken file is a UserError that names it.
    """
    with open_image(file, what, limited=not shown) as image:
        turned = orientation(image)
        image.load()
        if not (turn or shown):
            image = as_stored(image, turned)
        if mode is None:
            return image
        if turn or shown:
            # Where the camera's notes are broken, nothing is turned.
            with contextlib.suppress(Exception):
                image = ImageOps.exif_transpose(image)
        return as_rgb(image, mode)


def as_rgb(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """An image in `mode`, 16 bits brought to 8, transparent parts on white; ValueError for one of
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
    return image.convert(mode)


def read_samples(file: Path) -> tuple[np.ndarray, str]:
    """The numbers in a label map as the file holds them [H, W] (or [H, W, channels]), and a remark
    where they may surprise.

    Pillow decodes images: it stretches samples of fewer than 8 bits to 0..255, inverts TIFFs whose
    white is 0, and scales PGMs to their largest value. All of that is undone here; what cannot be
    undone, as JPEG's losses, is a UserError.
    """
    what = f"label map {file}"
    with open_image(file, "label map") as image:
        pages = getattr(image, "n_frames", 1)
        # It would decode a PNG, and Pillow turns TIFFs alone.
        turned = orientation(image) if image.format == "TIFF" else 1
        if image.format not in LABEL_FORMATS or "jpeg" in str(image.info.get("compression")):
            kind = image.format if image.format not in LABEL_FORMATS else "compressed as JPEG"
            raise UserError(what, f"is {kind}, which changes values", "write PNG")
        if pages > 1:
            raise UserError(what, f"holds {pages} pages", "write one label map a file")
        if image.format in ("BMP", "DIB") and image.mode == "1" and bits_of_bmp(file) != 1:
            raise UserError(
                what,
                "is a BMP of two greys in more than one bit, which Pillow misreads",
                "write PNG",
            )
        if not image.tile:
            raise ValueError("it holds no pixels")
        decoder, arguments = image.tile[0][0], image.tile[0][3]
        arguments = arguments if isinstance(arguments, tuple) else (arguments,)
        image.load()
        values, remark = np.array(as_stored(image, turned)), ""
        if image.mode == "P":
            greys = np.array(image.getpalette("RGB")).reshape(-1, 3)
            used = np.unique(values)
            used = used[used < len(greys)]
            is_grey = (greys[used] == greys[used, :1]).all()
            remark = GREY if is_grey and (greys[used, 0] != used).any() else ""
    if values.dtype == bool:
        values = values.astype(np.uint8)
    if decoder.startswith("ppm") and image.mode in ("L", "I"):  # scaled to the type's largest value
        full, largest = 255 if image.mode == "L" else 65535, arguments[-1]
        values = np.rint(values * (largest / full)).astype(values.dtype)
    elif packed := re.fullmatch(r"[1L];?([24]?)(I?)R?", str(arguments[0])):
        values = (1 if image.mode == "1" else 255) - values if packed[2] else values
        values = values // {"2": 85, "4": 17, "": 1}[packed[1]]
    return values, remark


def bits_of_bmp(file: Path) -> int:
    """The bits of a pixel, as a Windows bitmap says."""
    with open(file, "rb") as content:
        return int.from_bytes(content.read(30)[28:], "little")


def check_values(
    values: np.ndarray, file: Path, bits: int, size: tuple[int, int] | None = None
) -> np.ndarray:
    """`read_samples`' numbers as label values [H, W], uint8 or uint16. `size`: the image's
    (width, height).
    """
    if values.dtype.kind == "u" and values.itemsize == 2:
        values = values.astype(np.uint16)  # whichever byte came first in the file
    if (
        bits == 16
        and values.dtype == np.int32
        and values.size
        and 0 <= values.min() <= values.max() < 65536
    ):
        values = values.astype(np.uint16)  # how Pillow opens some 16-bit files
    if values.ndim != 2 or values.dtype not in (
        (np.uint8,) if bits == 8 else (np.uint8, np.uint16)
    ):
        found = (
            f"has {values.shape[2]} channels"
            if values.ndim == 3
            else f"holds values of type {values.dtype}"
        )
        raise UserError(
            f"label map {file}",
            found,
            f"write one channel of {'8' if bits == 8 else '8 or 16'} bits",
        )
    if size and values.shape[::-1] != size:
        sizes = f"is {values.shape[1]} x {values.shape[0]}, its image {size[0]} x {size[1]}"
        turned = (
            ", or set data.exif_turn if its camera turned the image" if values.shape == size else ""
        )
        raise UserError(f"label map {file}", sizes, f"make the two the same size{turned}")
    return values


def read_values(file: Path, bits: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """The label values [H, W] of a map, uint8 or uint16. `size`: its image's (width, height).
    Raises UserError.
    """
    return check_values(read_samples(file)[0], file, bits, size)


def read_labels(file: Path, lut: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label map through `lut`: [H, W] of the table's type; `size` is its image's (width,
    height).
    """
    return lut[read_values(file, 8 if len(lut) == 256 else 16, size)]
