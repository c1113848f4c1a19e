"""Whatever comes in: tokenizer, options, run lengths, label maps and regions against plain
definitions.
"""

import html
import io
import math
import string
import unicodedata
from dataclasses import asdict

import ftfy
import numpy as np
import pytest
import torch
import trees
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from zsseg import data as images
from zsseg.clip import MEAN, STD
from zsseg.config import Config, load_config, matches
from zsseg.prepare.convert import decode_runs
from zsseg.images import read_image, read_values
from zsseg.regions import expand_boxes, mask_boxes, region_crops
from zsseg.tokenizer import Tokenizer
from zsseg.utils import UserError

settings.register_profile("zsseg", max_examples=200, deadline=None, derandomize=True, database=None)
settings.load_profile("zsseg")

# --- tokenizer

TEXT = st.text(st.characters(exclude_categories=("Cs", "Cn", "Co")), max_size=30)
ODD = [
    "don't",
    "WE'LL",
    "caf\u00e9",
    "&amp;lt;",
    "red  disc",
    "42nd",
    "x-ray!!'s",
    "\u2019",
    "\u00c3\u00a9",
    "\n",
]
WORDS = st.lists(st.sampled_from(ODD), max_size=5).map(" ".join)


def plain_words(text: str) -> list[str]:
    """Contractions, runs of letters, single digits, runs of anything else but space; character by
    character.
    """
    kind = lambda c: (
        "space"
        if c.isspace()
        else {"L": "letter", "N": "number"}.get(unicodedata.category(c)[0], "other")
    )
    words, i = [], 0
    while i < len(text):
        ending = next(
            (
                text[i + 1 : i + 1 + len(e)]
                for e in ("s", "t", "re", "ve", "m", "ll", "d")
                if text[i] == "'" and text[i + 1 : i + 1 + len(e)].casefold() == e
            ),
            None,
        )
        end = i + 1
        if ending is not None:
            end += len(ending)
        elif kind(text[i]) in ("letter", "other"):
            while end < len(text) and kind(text[end]) == kind(text[i]):
                end += 1
        if kind(text[i]) != "space":
            words.append(text[i:end])
        i = end
    return words


def plain_merges(tokenizer: Tokenizer, word: str) -> list[int]:
    """Every merge that could apply, in the order of the list: a part is always older than what it
    becomes part of.
    """
    parts = [tokenizer.symbol_of_byte[b] for b in word.encode()]
    parts[-1] += "</w>"
    spans = ["".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)]
    pairs = {
        (a, b)
        for whole in spans
        for cut in range(1, len(whole))
        for a, b in [(whole[:cut], whole[cut:])]
    }
    for pair in sorted(pairs & tokenizer.rank.keys(), key=tokenizer.rank.get):
        i = 0
        while i + 1 < len(parts):
            if (parts[i], parts[i + 1]) == pair:
                parts[i : i + 2] = ["".join(pair)]
            i += 1
    return [tokenizer.index[part] for part in parts]


@pytest.fixture(scope="module")
def tokenizer(vocabulary) -> Tokenizer:
    return Tokenizer(49408, 77)


@given(TEXT | WORDS)
def test_tokens_are_those_of_the_definition(tokenizer, text):
    clean = " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()
    assert tokenizer.encode(text) == [
        i for word in plain_words(clean) for i in plain_merges(tokenizer, word)
    ]


@given(st.lists(TEXT, min_size=1, max_size=3), st.integers(3, 40))
def test_rows_of_tokens_have_a_start_an_end_and_zeros(texts, context):
    tokenizer = Tokenizer(514, context)
    if max(len(tokenizer.encode(text)) for text in texts) + 2 > context:
        with pytest.raises(UserError, match=f"CLIP reads {context}"):
            tokenizer(texts)
        return
    for text, row in zip(texts, tokenizer(texts).tolist(), strict=True):
        end = row.index(513)
        assert row[0] == 512 and not any(row[end + 1 :])
        assert row[1:end] == tokenizer.encode(text)


# --- options

FIELDS = [f"{section}.{key}" for section, keys in asdict(Config()).items() for key in keys]
VALUES = st.recursive(
    st.integers(-5, 2**40) | st.floats() | st.booleans() | st.text(string.printable, max_size=8),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


def is_right_or_named(overrides: list[str]) -> None:
    try:
        config = load_config(None, overrides)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert load_config(None, base=asdict(config)) == config
    hints = {section: type(getattr(config, section)).__annotations__ for section in asdict(config)}
    assert all(
        matches(v, hints[s][k]) for s, part in asdict(config).items() for k, v in part.items()
    )


@given(st.lists(st.tuples(st.sampled_from(FIELDS), VALUES), max_size=3))
def test_a_value_is_taken_or_refused_in_a_line(settings):
    is_right_or_named(
        [
            f"{name}={str(value).lower() if isinstance(value, bool) else value!r}"
            for name, value in settings
        ]
    )


@given(st.lists(st.text(string.printable, max_size=30), max_size=2))
def test_any_override_is_taken_or_refused_in_a_line(texts):
    is_right_or_named(texts)


@given(
    st.text(string.printable, max_size=60)
    | st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3).map(
        lambda d: "\n".join(f"{k} = {v!r}" for k, v in d.items())
    )
)
def test_any_file_is_taken_or_refused_in_a_line(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "fuzz.toml"
    file.write_text(text, encoding="utf-8", newline="")
    try:
        load_config(str(file))
    except UserError as error:
        assert "\n" not in str(error)


# --- labels


@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(0, 2**32),
    st.sampled_from([0, 0.05, 0.5, 1]),
    st.booleans(),
)
def test_run_lengths_come_back(height, width, seed, density, compressed):
    mask = np.random.default_rng(seed).random((height, width)) < density
    assert np.array_equal(decode_runs(trees.encode_runs(mask, compressed)), mask)


@given(
    st.lists(st.integers(-2, 40), min_size=2, max_size=2),
    st.text(max_size=12) | st.lists(st.integers(-1, 50), max_size=6),
)
def test_run_lengths_are_a_mask_or_a_value_error(size, counts):
    try:
        mask = decode_runs({"size": size, "counts": counts})
    except ValueError:
        return
    assert mask.shape == tuple(size) and mask.dtype == bool


@given(
    st.sampled_from(["1", "L", "P", "I;16", "I", "F", "LA", "RGB", "RGBA", "CMYK"]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(["PNG", "TIFF", "BMP"]),
    st.sampled_from([8, 16]),
    st.integers(0, 400),
    st.booleans(),
)
def test_any_label_map_is_values_or_named(
    tmp_path_factory, mode, width, height, kind, bits, cut, whole
):
    """Any mode, whole or cut anywhere: single-channel values of at most `bits` bits, or one line
    with the file's name.
    """
    file, content = tmp_path_factory.getbasetemp() / f"fuzz.{kind.lower()}", io.BytesIO()
    try:
        Image.new(mode, (width, height), 1).save(content, kind)
    except (OSError, ValueError):  # a mode that this kind of file does not know
        return
    file.write_bytes(content.getvalue() if whole else content.getvalue()[:cut])
    for read in (lambda: read_values(file, bits), lambda: np.array(read_image(file))):
        try:
            values = read()
        except UserError as error:
            assert file.name in str(error) and "\n" not in str(error)
            continue
        assert values.shape[:2] == (height, width)
        assert values.dtype in (
            (np.uint8,) if bits == 8 or values.ndim == 3 else (np.uint8, np.uint16)
        )


# --- regions


def slow_cubic(line: list[float], size: int) -> list[float]:
    """A line of values resampled to `size` by cubic convolution (Keys 1981, a = -0.75), edges
    repeated.
    """
    a, result = -0.75, []

    def weight(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    for i in range(size):
        at = (i + 0.5) * len(line) / size - 0.5
        taps = range(math.floor(at) - 1, math.floor(at) + 3)
        result.append(sum(weight(at - t) * line[min(max(t, 0), len(line) - 1)] for t in taps))
    return result


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 2**32),
    st.sampled_from([0.05, 0.5, 1]),
    st.integers(1, 6),
)
def test_boxes_and_crops_are_the_slow_loops(height, width, seed, density, side):
    rng = np.random.default_rng(seed)
    image, mask = rng.integers(0, 256, (3, height, width)), rng.random((height, width)) < density
    boxes, valid = mask_boxes(torch.from_numpy(mask)[None])
    rows, columns = mask.nonzero()
    assert bool(valid[0]) == mask.any()
    if not mask.any():
        assert boxes[0].tolist() == [0, 0, width, height]
        return
    x0, y0, x1, y1 = boxes[0].tolist()
    assert [x0, y0, x1, y1] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    crop = region_crops(torch.from_numpy(image), torch.from_numpy(mask)[None], boxes, side)[0]
    for channel in range(3):
        values = (image[channel] / 255 - MEAN[channel]) / STD[channel] * mask
        lines = [slow_cubic(list(row), side) for row in values[y0:y1, x0:x1]]
        wanted = np.array([slow_cubic(list(column), side) for column in zip(*lines, strict=True)]).T
        assert np.allclose(crop[channel].numpy(), wanted, atol=1e-4)


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 20), st.data())
def test_expanded_boxes_stay_inside_and_keep_a_pixel(height, width, ratio, data):
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    a, b, c, d = expand_boxes(torch.tensor([[x0, y0, x1, y1]]), ratio, (height, width))[0].tolist()
    assert 0 <= a < c <= width and 0 <= b < d <= height
    if ratio >= 1:
        assert a <= x0 and b <= y0 and c >= min(x1, width) - 1 and d >= min(y1, height) - 1


@given(st.integers(1, 10**5), st.integers(1, 10**5), st.integers(1, 900), st.integers(1, 3000))
def test_sizes_stay_in_their_limits(width, height, short, longest):
    w, h = images.test_size(width, height, short, longest)
    assert 1 <= min(w, h) <= max(short, 1) and max(w, h) <= max(longest, 1)
