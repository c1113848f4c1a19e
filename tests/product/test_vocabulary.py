"""Word lists: classes, synonyms, background words, which of them were trained on."""

import pytest

from zsseg.apps.vocabulary import parse_words, read_words, seen_classes, trained_names
from zsseg.config import load_config
from zsseg.datasets import dataset
from zsseg.utils import UserError

LINES = "cat, dog\n# a comment = none\nsofa = couch, settee\n\nothers : sky, wall\n  hot dog  "
ODD = "tv/monitor, St. Bernard, bull's eye, door (wooden), C++, 3d printer"


@pytest.mark.parametrize(
    ("text", "names", "synonyms", "shown"),
    [
        ("cat, sofa=couch = settee,dog,", ["cat", "sofa", "dog"], {"sofa": ["couch", "settee"]}, 3),
        ("cat; Other: sky, wall ; dog", ["cat", "dog", "sky", "wall"], {}, 2),
        ("cat, dog, other: sky", ["cat", "dog", "sky"], {}, 2),
        (LINES, ["cat", "dog", "sofa", "hot dog", "sky", "wall"], {"sofa": ["couch", "settee"]}, 4),
        (ODD, ODD.split(", "), {}, 6),
    ],
)
def test_word_lists_typed_or_in_a_file(text, names, synonyms, shown, tmp_path):
    words = parse_words(text)
    assert (words.names, words.synonyms, words.shown) == (names, synonyms, shown)
    assert words.shown_names == names[:shown] + ["other"] * (shown < len(names))
    if ";" not in text and "settee," not in text:
        (tmp_path / "words").write_text("\ufeff" + text.replace("\n", "\r\n"), "utf-8")
        assert read_words(str(tmp_path / "words")) == words
    (tmp_path / "words").write_text("sofa = couch, settee")
    assert read_words(str(tmp_path / "words")).synonyms == {"sofa": ["couch", "settee"]}


@pytest.mark.parametrize(
    ("part", "texts"),
    [
        ("are 0; give 1 to 65535", ["", " ,; = ", "other: sky"]),
        ("are 70000; give 1 to 65535", [", ".join(map(str, range(70_000)))]),
        ("'Cat': is the same to CLIP as 'cat'", ["cat, Cat"]),
        ("is given twice", ["sofa = couch; couch", "cat; other: cat"]),
        ("is no name, but a file", ["wrods.csv", "a/w.json", "/words", "./words", "cat, a.txt"]),
        ("is no name", ['["cat"]', "'cat', 'dog'", "cat | dog", "- cat", "1. cat", "0: cat"]),
        ("is no name", ["cat\tdog", "cat # a note"]),
    ],
)
def test_word_lists_that_cannot_be(texts, part):
    for text in texts:
        with pytest.raises(UserError, match=part):
            read_words(text)


def test_words_that_were_trained_on_are_seen():
    voc = dataset("voc")
    text = "Dining Table; couch = sofa; tv; grass = potted-plant; Aeroplane; other: motor_bike"
    # Sofa and pottedplant are unseen.
    assert read_words(text).among([voc.names[i] for i in voc.seen]) == [0, 4, 5]
    ade = load_config(None, ["data.name=ade20k"])
    assert trained_names({}, ade) == []  # the original's checkpoints are only measured there
    assert trained_names({"trained": ["wall"]}, ade) == ["wall"]


def test_a_measured_set_s_seen_classes():
    """Those of the training on the same set; one's own data by name; else the set's own split."""
    voc = dataset("voc")
    config = load_config(None, ["data.name=voc"])
    content = {"trained": voc.names[:2], "config": {"data": {"name": "voc"}}}
    assert seen_classes(voc, content, config) == [0, 1]
    assert seen_classes(voc, {}, config) == voc.seen
    content["config"]["data"]["name"] = "coco_stuff"
    assert seen_classes(voc, content, config) == voc.seen
    assert seen_classes(dataset("ade20k"), content, config) == []
