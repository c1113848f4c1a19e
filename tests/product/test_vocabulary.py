"""Word lists: classes, synonyms, background words, which of them were trained on."""

import pytest

from zsseg.apps.vocabulary import parse_words, read_words, seen_classes, trained_names
from zsseg.config import load_config
from zsseg.datasets import dataset
from zsseg.utils import UserError

LINES = "cat, dog\n# a comment = none\nsofa = couch, settee\n\nothers : sky, wall\n  hot   dog  "
LISTS = [
    ("cat, dog,grass", ["cat", "dog", "grass"], {}, 3),
    ("cat, sofa = couch = settee, dog,", ["cat", "sofa", "dog"], {"sofa": ["couch", "settee"]}, 3),
    ("cat; Other: sky, wall ; dog", ["cat", "dog", "sky", "wall"], {}, 2),
    ("cat, dog, other: sky", ["cat", "dog", "sky"], {}, 2),
    ("other", ["other"], {}, 1),
    ("猫，狗；草", ["猫", "狗", "草"], {}, 3),
    (LINES, ["cat", "dog", "sofa", "hot dog", "sky", "wall"], {"sofa": ["couch", "settee"]}, 4),
    (
        "tv/monitor, St. Bernard, bull's eye, door (wooden), C++, 3d printer",
        ["tv/monitor", "St. Bernard", "bull's eye", "door (wooden)", "C++", "3d printer"],
        {},
        6,
    ),
]


@pytest.mark.parametrize(("text", "names", "synonyms", "shown"), LISTS)
def test_word_lists_typed_or_in_a_file(text, names, synonyms, shown, tmp_path):
    words = parse_words(text)
    assert (words.names, words.synonyms, words.shown) == (names, synonyms, shown)
    assert words.shown_names == names[:shown] + ["other"] * (shown < len(names))
    if ";" not in text:
        (tmp_path / "words").write_text("\ufeff" + text.replace("\n", "\r\n"), "utf-8")
        assert read_words(str(tmp_path / "words")) == words


def test_one_word_is_said(tmp_path, capsys):
    (tmp_path / "words").write_text("sofa = couch, settee")
    assert read_words(str(tmp_path / "words")).synonyms == {"sofa": ["couch", "settee"]}
    read_words("cat dog grass")
    assert "1 class, which every pixel gets: 'cat dog grass'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "contain 0 names"),
        (" ,; = ", "contain 0 names"),
        ("other: sky", "contain 0 names"),
        ("cat, Cat", "'Cat': is the same to CLIP as 'cat'"),
        ("sofa = couch; couch", "is given twice"),
        ("cat; other: cat", "is given twice"),
        ("other; other: sky", "'other': is given twice"),
        (", ".join(map(str, range(70_000))), "give 1 to 65535"),
        ("wrods.csv", "no such file"),
        ("lists/words.json", "no such file"),
        ("/words", "no such file"),
        ("./words", "no such file"),
        ("cat, words.txt", "is a file or a list in another format"),
        *((text, "another format") for text in ('["cat"]', "'cat', 'dog'", "cat | dog", "- cat")),
        *((text, "another format") for text in ("1. cat", "0: cat", "cat\tdog", "cat # a note")),
    ],
)
def test_word_lists_that_cannot_be(text, part):
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
