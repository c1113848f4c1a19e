"""Word lists: classes, synonyms, background words, which of them were trained on."""

import pytest
import torch

from zsseg.config import load_config
from zsseg.datasets import dataset
from zsseg.utils import UserError
from zsseg.apps.vocabulary import read_words, trained_names


@pytest.mark.parametrize(
    ("text", "names", "synonyms", "shown"),
    [
        ("cat, dog,grass", ["cat", "dog", "grass"], {}, 3),
        (
            "cat, sofa = couch = settee, dog,",
            ["cat", "sofa", "dog"],
            {"sofa": ["couch", "settee"]},
            3,
        ),
        ("cat; Other: sky, wall ; dog", ["cat", "dog", "sky", "wall"], {}, 2),
        ("other", ["other"], {}, 1),
        (
            "file:cat\r\ndog\n\n# a comment = none\n  hot   dog  \n",
            ["cat", "dog", "hot dog"],
            {},
            3,
        ),
        (
            "file:cat, dog\nsofa = couch, settee\nother: sky, wall",
            ["cat", "dog", "sofa", "sky", "wall"],
            {"sofa": ["couch", "settee"]},
            3,
        ),
    ],
)
def test_word_lists(text, names, synonyms, shown, tmp_path):
    if text.startswith("file:"):
        (tmp_path / "words").write_text("\ufeff" + text.removeprefix("file:"), encoding="utf-8")
        text = str(tmp_path / "words")
    words = read_words(text)
    assert (words.names, words.synonyms, words.shown) == (names, synonyms, shown)
    assert words.shown_names == names[:shown] + ["other"] * (shown < len(names))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "contains no word"),
        (" ,; = ", "contains no word"),
        ("other: sky", "contains no word"),
        ("cat, Cat", "'Cat': is the same to CLIP as 'cat'"),
        ("sofa = couch; couch", "stands twice"),
        ("cat; other: cat", "stands twice"),
        ("other; other: sky", "'other': stands twice"),
        ("absent.txt", "No such file"),
        ("cat, dog, other: sky", "'other: sky': is inside a list"),
        (", ".join(map(str, range(70_000))), "room for 65535"),
    ],
)
def test_word_lists_that_cannot_be(text, part):
    with pytest.raises(UserError, match=part):
        read_words(text)


@pytest.mark.parametrize("line", ["cat, sofa = couch", "= couch"])
def test_a_line_of_synonyms_has_one_name(line, tmp_path):
    (tmp_path / "words").write_text(line)
    with pytest.raises(UserError, match="no single name before ="):
        read_words(str(tmp_path / "words"))


def test_words_that_were_trained_on_are_seen():
    voc = dataset("voc")
    words = read_words(
        "Dining Table; couch = sofa; tv; grass = potted-plant; Aeroplane; other: motor_bike"
    )
    # Sofa and pottedplant are unseen.
    assert words.among([voc.names[i] for i in voc.seen]) == [0, 4, 5]
    ade = load_config(None, ["data.name=ade20k"])
    assert trained_names({}, ade) == []  # the original's checkpoints are only measured there
    # No split: all.
    assert read_words("wall, brick").among(
        trained_names({"config": {"data": {"name": "ade20k"}}}, ade)
    ) == [0]


def test_synonyms_are_averaged(segmenter):
    segmenter.set_classes(["sofa", "couch", "settee", "cat"])
    each = segmenter.text_features
    segmenter.set_classes(["sofa", "cat"], [], {"sofa": ["couch", "settee"]})
    wanted = torch.nn.functional.normalize(torch.stack([each[:3].mean(0), each[3]]), dim=-1)
    assert torch.allclose(segmenter.text_features, wanted, atol=1e-6) and torch.equal(
        segmenter.region_text_features, segmenter.text_features
    )
