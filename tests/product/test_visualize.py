"""What is shown is what was computed: colours, overlays, legends, comparisons."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from tests.benchmarks.palette import ciede2000, lab, spread
from zsseg import visualize
from zsseg.utils import warn
from zsseg.visualize import PALETTE, find_font, overlay, palette, with_legend, word_colours

WORDS = ["cat", "dog", "grass", "tree", "sky", "road", "wall", "car", "person", "horse"]


def test_colours_are_far_apart():
    """By CIEDE2000, whose formula is held to its authors' values."""
    pairs = [(50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425]
    pairs += [(22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373]
    pairs += [(50, 2.5, 0), (58, 24, 15), 19.4535]
    for one, other, difference in zip(*[iter(pairs)] * 3, strict=True):
        assert ciede2000(np.array(one), np.array(other)) == pytest.approx(difference, abs=1e-4)
    assert visualize.DISTINCT >= 25 and spread(PALETTE[: visualize.DISTINCT]) >= 20
    assert len(PALETTE) == 255 and spread(PALETTE) >= 8
    for taken in (0, 255, visualize.GREY):
        assert ciede2000(lab(PALETTE), lab((taken,) * 3)).min() > 8
    assert palette(300)[-1].tolist() == [0, 0, 0] and len(palette(300)) == 301


def test_a_word_has_its_colour_wherever_it_stands():
    """In any order, and mostly beside any other words; no two of up to 255 have the same."""
    alone = {word: tuple(word_colours([word])[0]) for word in WORDS}
    for order in itertools.islice(itertools.permutations(WORDS[:5]), 40):
        colours = dict(zip(order, map(tuple, word_colours(order)), strict=True))
        assert colours == dict(zip(WORDS, map(tuple, word_colours(WORDS[:5])), strict=False))
    pairs = [[a, b] for a, b in itertools.permutations(WORDS, 2)]
    same = [tuple(word_colours(pair)[1]) == alone[pair[1]] for pair in pairs]
    assert np.mean(same) > 0.95
    for count in (33, 34, 255):
        assert len(np.unique(word_colours([f"word {i}" for i in range(count)]), axis=0)) == count
    few, many = ([f"word {i}" for i in range(count)] for count in (33, 36))
    assert (word_colours(few) == word_colours(many)[:33]).all(1).sum() > 16
    assert word_colours([f"word {i}" for i in range(300)]).shape == (300, 3)


def test_overlays_are_over_grey():
    """So that a class looks alike on every ground of the same lightness; white outlines."""
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (30, 40, 1), np.uint8).repeat(3, 2)
    labels = np.zeros((15, 20), np.uint16)
    labels[5:, 10:] = 300
    colours = palette(301)[:-1]
    tinted = np.array(overlay(Image.fromarray(grey), labels, colours)).astype(int)
    assert (tinted[20, 19] == 255).all() and (tinted[9, 30] == 255).all()
    share = visualize.ALPHA / 255
    for y, x in ((3, 3), (20, 30)):
        expected = (1 - share) * grey[y, x] + share * colours[labels[y // 2, x // 2]]
        assert np.abs(tinted[y, x] - expected).max() <= 1.5
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 200
    drawn = np.array(overlay(Image.fromarray(red), np.zeros((4, 4), np.uint8), colours)).astype(int)
    assert (drawn - share * colours[0]).std() < 1  # nothing of the red is left


def test_legends_are_complete():
    colours = palette(50)[:-1]
    legend = [(colour, f"a class with a long name {i}") for i, colour in enumerate(colours)]
    canvas = with_legend(Image.new("RGB", (40, 60)), legend)
    pixels = {tuple(pixel) for pixel in np.array(canvas)[:, 40:].reshape(-1, 3)}
    assert canvas.height == 60 and {tuple(colour) for colour in colours} <= pixels
    assert with_legend(Image.new("RGB", (40, 60)), []).size == (40, 60)


def test_letters_of_legends(capsys):
    """A font of the system that has them; where none has, that is said."""
    missing = lambda font: bytes(font.getmask("\uffff"))
    default = ImageFont.load_default(14).getname()
    assert find_font("", 14).getname() == default
    find_font.cache_clear()
    warn.cache_clear()
    find_font("\U00011a3a", 14)  # of a script that hardly any font has
    assert "legends show boxes" in capsys.readouterr().out
    font = find_font("ñü", 14)
    if font.getname() == default:
        pytest.skip("no font beyond ASCII here")
    assert missing(font) not in [bytes(font.getmask(letter)) for letter in "ñü"]


def test_samples_have_rows_gaps_and_a_legend():
    rng = np.random.default_rng(0)
    strips = []
    for width in (30, 60):
        image = torch.tensor(rng.integers(0, 255, (3, 40, width), np.uint8))
        labels = torch.tensor(rng.choice([0, 1, 255], (20, width)))
        strips.append(visualize.comparison(image, labels, labels.clamp(max=1), 2))
    height, gap = visualize.STRIP_HEIGHT, visualize.GAP
    assert [strip.size for strip in strips] == [(w, 3 * (height + gap)) for w in (120, 240)]
    sheet = np.array(visualize.samples(strips, [(palette(2)[1], "tree *")]))
    assert (sheet[height : height + gap] == 255).all()  # from side to side
    assert (sheet[:, -1] == 255).all() and (sheet[height // 2 :][:14, :100] < 255).any()
    left = np.array(strips[0])
    top = 100 + 120
    assert np.array_equal(sheet[:, 100:top], left) and (sheet[:, top : top + gap] == 255).all()
    assert (sheet == palette(2)[1]).all(-1)[:, 468:].any()
