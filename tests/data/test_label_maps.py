"""Label maps are numbers, whatever a decoder makes of them; photographs are read one way only."""

import contextlib
import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zsseg.images import is_image_name, read_image, read_pair, read_values
from zsseg.images import test_size as size_at_test
from zsseg.utils import UserError

VALUES = np.array([[0, 1, 2, 3, 1], [3, 2, 1, 0, 0]], np.uint8)


def grey_png(file: Path, values: np.ndarray, bits: int) -> None:
    """A grey PNG whose samples have `bits` bits, which Pillow does not write."""
    samples = np.unpackbits(values.astype(">u2")[..., None].view(np.uint8), axis=-1)[..., -bits:]
    rows = np.packbits(samples.reshape(len(values), -1), axis=1)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    data = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())
    for chunk in (b"IHDR" + header, b"IDAT" + data, b"IEND"):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    file.write_bytes(content)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_pngs_of_any_depth_hold_their_samples(bits, tmp_path):
    values = (VALUES.astype(np.int64) + {1: 0, 2: 0, 4: 12, 8: 250, 16: 700}[bits]) % 2**bits
    grey_png(tmp_path / "x.png", values, bits)
    read = read_values(tmp_path / "x.png", 16, (5, 2))
    assert np.array_equal(read, values) and read.dtype == (np.uint16 if bits == 16 else np.uint8)


def test_palettes_and_tiffs_hold_numbers(tmp_path):
    """Of a palette the indices count; TIFFs have 16 bits, in either order."""
    image = Image.fromarray(VALUES)
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.save(tmp_path / "x.png")
    assert np.array_equal(read_values(tmp_path / "x.png", 8), VALUES)
    for mode, order in (("I;16", "<u2"), ("I;16B", ">u2")):
        values = VALUES.astype(np.uint16) + 700
        Image.frombytes(mode, (5, 2), values.astype(order)).save(tmp_path / "x.tif")
        assert np.array_equal(read_values(tmp_path / "x.tif", 16), values)
        lut = np.arange(65536, dtype=np.int32) - 700
        assert np.array_equal(read_pair(*2 * [tmp_path / "x.tif"], lut, False)[1], VALUES)


REFUSED = [
    ("x.png", "L", {"format": "JPEG"}, "is JPEG L; write PNG, one channel of 8 bits"),
    ("x.bmp", "L", {}, "is BMP L"),
    ("x.tif", "L", {}, "is TIFF L"),
    ("x.png", "RGB", {}, "is PNG RGB"),
    ("x.png", "I;16", {}, "is PNG I;16; write PNG, one channel of 8 bits"),
    ("x.png", "L", {"save_all": True, "append_images": [Image.new("L", (5, 2))]}, "several pages"),
]


@pytest.mark.parametrize(("name", "mode", "options", "part"), REFUSED)
def test_what_may_not_hold_its_values_is_refused(name, mode, options, part, tmp_path):
    Image.new(mode, (5, 2), 1).save(tmp_path / name, **options)
    with pytest.raises(UserError, match=re.escape(f"label map {tmp_path / name}: is ")) as error:
        read_values(tmp_path / name, 8)
    assert part in str(error.value)


def test_bad_files_are_named(tmp_path):
    Image.fromarray(VALUES).save(tmp_path / "small.png")
    todo = r"small\.png: is 5 x 2, its image 2 x 5; make them one size, or set data\.exif_turn"
    with pytest.raises(UserError, match=todo):
        read_values(tmp_path / "small.png", 8, (2, 5))
    (tmp_path / "x.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n")
    for name in ("absent.png", "x.eps"):
        with pytest.raises(UserError, match=f"image {tmp_path / name}: cannot be read"):
            read_image(tmp_path / name)
        with pytest.raises(UserError, match=f"label map {tmp_path / name}: cannot be read"):
            read_values(tmp_path / name, 8)
    with pytest.raises(UserError, match=r"this image: cannot be read \(no image\); give another"):
        read_image(io.BytesIO(b"no image"))
    assert is_image_name("a.JPEG") and not is_image_name("a.eps") and not is_image_name("jpg")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
@pytest.mark.filterwarnings("ignore")
def test_any_file_is_read_or_named(kind, tmp_path):
    """Any mode, whole or cut anywhere."""
    file = tmp_path / f"x.{kind.lower()}"
    for mode in ("1", "L", "P", "I;16", "I", "F", "LA", "RGB", "RGBA", "CMYK"):
        content = io.BytesIO()
        with contextlib.suppress(OSError, ValueError):  # this kind of file does not know it
            Image.new(mode, (7, 5), 1).save(content, kind)
        for end in (*range(0, 400, 7), None):
            file.write_bytes(content.getvalue()[:end])
            for read in (lambda: read_values(file, 16), lambda: np.array(read_image(file))):
                try:
                    assert read().shape[:2] == (5, 7)
                except UserError as error:
                    assert file.name in str(error) and "\n" not in str(error)


def test_images_of_other_modes(tmp_path):
    """RGB: 16 bits reduced to 8, transparent parts white; fractions are refused."""
    file = tmp_path / "x.png"
    for mode, colour in (("L", 7), ("P", 7), ("1", 1), ("CMYK", (1, 2, 3, 4))):
        Image.new(mode, (3, 2), colour).save(file, "JPEG" if mode == "CMYK" else "PNG")
        assert read_image(file).mode == "RGB"
    for mode, colour in (("RGBA", (7, 7, 7, 0)), ("LA", (7, 0))):
        Image.new(mode, (3, 2), colour).save(file)
        assert (np.asarray(read_image(file)) == 255).all()
    Image.new("I;16", (3, 2), 300).save(file)
    assert np.asarray(read_image(file)).tolist() == 2 * [3 * [3 * [300 // 257]]]
    Image.fromarray(np.full((2, 3), 0.5, np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=r"x\.tif: cannot be read \(its numbers are not those of"):
        read_image(tmp_path / "x.tif")


def test_the_camera_s_turn_is_a_setting(tmp_path):
    """For measuring as stored, unless data.exif_turn is set; `--images` turns."""
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    for turned, expected in ((2, pixels[:, ::-1]), (6, np.rot90(pixels, -1))):
        exif = Image.Exif()
        exif[0x0112] = turned
        Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
        assert np.array_equal(np.asarray(read_image(tmp_path / "x.png")), pixels)
        assert np.array_equal(np.asarray(read_image(tmp_path / "x.png", turn=True)), expected)


def test_sizes_at_test_time():
    sizes = {(640, 480): (683, 512), (170, 230): (512, 693), (1000, 10): (2048, 20)}
    assert {size: size_at_test(*size, 512, 2048) for size in sizes} == sizes
    assert size_at_test(10000, 1, 640, 2560) == (2560, 1)
