"""Label maps hold numbers, whatever a decoder of images makes of them; photographs are shown one
way only.
"""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zsseg.images import GREY, TURNED, read_image, read_samples, read_values, remarks_on
from zsseg.utils import UserError

VALUES = np.array([[0, 1, 2, 3, 1], [3, 2, 1, 0, 0]], np.uint8)


def grey_png(file: Path, values: np.ndarray, bits: int) -> None:
    """A grey PNG whose samples have `bits` bits, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b""
    for row in values:
        text = "".join(f"{int(v):0{bits}b}" for v in row)
        text += "0" * (-len(text) % 8)
        rows += b"\0" + bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def grey_tiff(
    file: Path, values: np.ndarray, bits: int, photometric: int, order: str = "<"
) -> None:
    """An uncompressed grey TIFF; photometric 0: its white is 0."""
    H, W = values.shape
    if bits < 8:
        texts = ["".join(f"{int(v):0{bits}b}" for v in row) for row in values]
        data = b"".join(
            int(t + "0" * (-len(t) % 8), 2).to_bytes(-(-len(t) // 8), "big") for t in texts
        )
    else:
        data = values.astype(f"{order}u{bits // 8}").tobytes()
    tags = [
        (256, 4, W),
        (257, 4, H),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, H),
        (279, 4, len(data)),
    ]
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, kind, 1)
        + (struct.pack(f"{order}HH", v, 0) if kind == 3 else struct.pack(f"{order}I", v))
        for tag, kind, v in tags
    )
    magic = b"II*\0" if order == "<" else b"MM\0*"
    data += b"\0" * (len(data) % 2)
    file.write_bytes(
        magic
        + struct.pack(f"{order}I", 8 + len(data))
        + data
        + struct.pack(f"{order}H", len(tags))
        + entries
        + b"\0" * 4
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_pngs_of_any_depth(bits, tmp_path):
    values = VALUES.astype(np.int64) % 2**bits + (12 if bits > 2 else 0) * (VALUES > 2)
    grey_png(tmp_path / "x.png", values, bits) if bits < 16 else Image.fromarray(
        values.astype(np.uint16)
    ).save(tmp_path / "x.png")
    assert np.array_equal(read_values(tmp_path / "x.png", 16), values)


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize(
    ("bits", "order"),
    [(1, "<"), (2, "<"), (4, "<"), (4, ">"), (8, "<"), (8, ">"), (16, "<"), (16, ">")],
)
def test_tiffs_of_any_depth_and_order(bits, order, photometric, tmp_path):
    """ImageJ writes 16 bits with the high byte first; some scanners call 0 white."""
    values = VALUES.astype(np.int64) % 2**bits + (700 if bits == 16 else 0)
    grey_tiff(tmp_path / "x.tif", values, bits, photometric, order)
    if (bits, order, photometric) == (16, ">", 0):  # which Pillow does not know
        with pytest.raises(UserError, match="cannot identify"):
            read_values(tmp_path / "x.tif", 16)
        return
    assert np.array_equal(read_values(tmp_path / "x.tif", 16), values)
    assert read_values(tmp_path / "x.tif", 16).dtype in (np.uint8, np.uint16)


@pytest.mark.parametrize(
    ("kind", "largest"),
    [("P2", 3), ("P5", 3), ("P5", 20), ("P2", 255), ("P5", 255), ("P5", 700), ("P2", 700)],
)
def test_pgms_with_a_largest_value_of_their_own(kind, largest, tmp_path):
    head = f"{kind}\n5 2\n{largest}\n".encode()
    wide = ">u2" if largest > 255 else "u1"
    body = (
        VALUES.astype(wide).tobytes()
        if kind == "P5"
        else " ".join(map(str, VALUES.ravel())).encode()
    )
    (tmp_path / "x.pgm").write_bytes(head + body)
    assert np.array_equal(read_values(tmp_path / "x.pgm", 16), VALUES)


def test_bitmaps_hold_their_samples(tmp_path):
    (tmp_path / "x.pbm").write_bytes(b"P1\n5 2\n0 1 0 1 1\n1 0 1 0 0\n")
    assert np.array_equal(read_values(tmp_path / "x.pbm", 8), VALUES % 2)
    for ending in ("bmp", "gif"):
        image = Image.fromarray(VALUES)
        image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200])
        image.save(tmp_path / f"x.{ending}")
        assert np.array_equal(read_values(tmp_path / f"x.{ending}", 8), VALUES), ending


def test_values_that_losses_changed_are_refused(tmp_path):
    for name, options in (("x.jpg", {}), ("y.tif", {"compression": "jpeg"})):
        Image.fromarray(VALUES).save(tmp_path / name, **options)
        with pytest.raises(
            UserError, match=r"[xy]\.(jpg|tif): is .*JPEG, which changes values; write PNG"
        ):
            read_values(tmp_path / name, 8)


def test_one_of_several_pages_is_refused(tmp_path):
    pages = [Image.fromarray(VALUES), Image.fromarray(VALUES[::-1].copy())]
    for name in ("x.tif", "x.gif", "x.png"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        with pytest.raises(UserError, match="contains 2 pages"):
            read_values(tmp_path / name, 8)


def test_a_palette_of_greys_is_remarked_on(tmp_path):
    """Optimisers of PNGs turn greys into indices in any order: what counts are the indices, and it
    is said.
    """
    for greys, remark in (([0, 1, 2, 3], ""), ([0, 255, 7, 3], GREY)):
        image = Image.fromarray(VALUES)
        image.putpalette([value for grey in greys for value in (grey, grey, grey)])
        image.save(tmp_path / "x.png")
        samples, actual = read_samples(tmp_path / "x.png")
        assert np.array_equal(samples, VALUES) and actual == remark
    image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.save(tmp_path / "x.png")
    assert read_samples(tmp_path / "x.png")[1] == ""


def test_images_are_read_one_way(tmp_path):
    """For measuring and training as for `--images`, the camera's turn apart, which is a setting."""
    Image.fromarray(np.full((2, 3), 0x8080, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.full((2, 3, 4), (9, 9, 9, 0), np.uint8)).save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3)).save(
        tmp_path / "turned.png", exif=exif
    )
    for name in ("deep.png", "clear.png"):
        assert np.array_equal(
            np.asarray(read_image(tmp_path / name)),
            np.asarray(read_image(tmp_path / name, shown=True)),
        )
    turned = [
        np.asarray(read_image(tmp_path / "turned.png", **how))
        for how in ({}, {"turn": True}, {"shown": True})
    ]
    assert (
        turned[0].shape == (2, 3, 3)
        and np.array_equal(turned[1], turned[2])
        and turned[1].shape == (3, 2, 3)
    )
    assert "exif_turn" in TURNED


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("turned", [1, 2, 3, 5, 6, 8])
def test_tiffs_that_say_they_are_turned(turned, compression, tmp_path):
    """Pillow turns them by itself: values and images are taken as they are stored, unless a turn
    is asked for.
    """
    options = {"compression": compression} if compression else {}
    Image.fromarray(VALUES).save(tmp_path / "x.tif", tiffinfo={274: turned}, **options)
    assert np.array_equal(read_values(tmp_path / "x.tif", 8), VALUES)
    stored = np.asarray(read_image(tmp_path / "x.tif"))[..., 0]
    assert np.array_equal(stored, VALUES)
    exif = Image.Exif()
    exif[0x0112] = turned
    Image.fromarray(VALUES).save(tmp_path / "x.png", exif=exif)
    expected = np.asarray(read_image(tmp_path / "x.png", turn=True))
    assert np.array_equal(np.asarray(read_image(tmp_path / "x.tif", turn=True)), expected)
    assert remarks_on(tmp_path / "x.tif") == (turned != 1, 0)


def test_a_bitmap_that_pillow_misreads_is_refused(tmp_path):
    """Two greys in eight bits: it takes bytes for bits."""
    image = Image.fromarray(VALUES % 2)
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.save(tmp_path / "x.bmp")
    content = bytearray((tmp_path / "x.bmp").read_bytes())
    content[46:50] = (2).to_bytes(4, "little")  # colours in the palette
    start = int.from_bytes(content[10:14], "little")
    content[10:14] = (54 + 8).to_bytes(4, "little")
    (tmp_path / "x.bmp").write_bytes(content[: 54 + 8] + content[start:])
    with pytest.raises(UserError, match="write PNG"):
        read_values(tmp_path / "x.bmp", 8)
