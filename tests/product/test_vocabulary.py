"""Word lists: classes, synonyms, background words, which of them were trained on."""

import json

import pytest
from conftest import PROCESS
from own_data import CONFIG, measure

from zsseg.apps import vocabulary
from zsseg.apps.vocabulary import Words, format_words, parse_words, read_words
from zsseg.config import load_config
from zsseg.datasets import DATASETS, dataset
from zsseg.evaluate import evaluate
from zsseg.utils import UserError
from zsseg.weights import load_checkpoint, load_segmenter

LINES = "cat, dog\n# a comment = none\nsofa = couch, settee\n\nothers : sky, wall\n  hot dog  "
QUOTED = '"a, b" = "c=d", "19\\" tv"; other: "x; y"'
ODD = "tv/monitor, St. Bernard, bull's eye, door (wooden), C++, 3d printer"


@pytest.mark.parametrize(
    ("text", "names", "synonyms", "shown"),
    [
        ("cat, sofa=couch = settee,dog,", ["cat", "sofa", "dog"], {"sofa": ["couch", "settee"]}, 3),
        ("cat; Other: sky, wall ; dog", ["cat", "dog", "sky", "wall"], {}, 2),
        ("cat, dog, other: sky", ["cat", "dog", "sky"], {}, 2),
        (LINES, ["cat", "dog", "sofa", "hot dog", "sky", "wall"], {"sofa": ["couch", "settee"]}, 4),
        (ODD, ODD.split(", "), {}, 6),
        ("猫，狗、草；other：天＝空", ["猫", "狗", "草", "天＝空"], {}, 3),
        ("cat\ndog\u2028bird\r\n", ["cat", "dog", "bird"], {}, 3),
        (QUOTED, ["a, b", '19" tv', "x; y"], {"a, b": ["c=d"]}, 2),
        ('"cat",\n"dog: big"', ["cat", "dog: big"], {}, 2),
        ("18 wheeler, 3 seater sofa, sofa", ["18 wheeler", "3 seater sofa", "sofa"], {}, 3),
    ],
)
def test_word_lists_typed_or_in_a_file(text, names, synonyms, shown, tmp_path):
    names = [name.replace("＝", "=") for name in names]
    words = parse_words(text)
    assert (words.names, words.synonyms, words.shown) == (names, synonyms, shown)
    assert words.shown_names == names[:shown] + ["other"] * (shown < len(names))
    assert parse_words(format_words(words)) == words and not words.note
    if ";" not in text and "settee," not in text:
        (tmp_path / "words").write_text("\ufeff" + text.replace("\n", "\r\n"), "utf-8")
        assert read_words(str(tmp_path / "words")) == words
    (tmp_path / "words").write_text("sofa = couch, settee")
    assert read_words(str(tmp_path / "words")).synonyms == {"sofa": ["couch", "settee"]}


def test_names_of_every_data_set_read_back_as_they_are_written():
    odd = ["a, b", "other: x", "1. q", 'say "x"', "#c", "7 up", "Ünï", "हिन्दी", "a\\nb", "[x]"]
    lists = [odd, *(data.names for data in DATASETS.values())]
    for names in lists:
        words = Words(names, {names[0]: ["c = d", "7"]}, len(names) - 1)
        assert parse_words(format_words(words)) == words


@pytest.mark.parametrize(
    "text", ["cat", "cat dog grass", "cat. dog.", "猫 狗", "7 up", "cat & dog"]
)
def test_of_one_class_it_is_said_what_was_taken_for_it(text):
    assert f"1 class: {text!r}, which every pixel gets" in parse_words(text).note
    assert not parse_words(f"{text}; other: sky").note


def test_words_that_are_switched_off():
    words = parse_words("cat, sofa = couch, dog; other: sky")
    assert words.without(["sofa", "sky", "gone"]) == parse_words("cat, dog; other: sky")
    assert words.without(["cat"]).synonyms == {"sofa": ["couch"]}
    with pytest.raises(UserError, match="leave one on"):
        words.without(["cat", "sofa", "dog"])


@pytest.mark.parametrize(
    ("part", "texts"),
    [
        ("are 0; give 1 to 65535", ["", " ,; = ", "other: sky"]),
        ("are 70000; give 1 to 65535", [", ".join(map(str, range(70_000)))]),
        ("'Cat': is the same to CLIP as 'cat'", ["cat, Cat"]),
        ("is the same to CLIP", ["cat, \u200bcat", "c\u00adat; cat"]),
        ("is given twice", ["sofa = couch; couch", "cat; other: cat", 'cat, "cat"']),
        ("empty to CLIP", ['cat, ""']),
        ("is no name, but a file", ["wrods.csv", "a/w.json", "/words", "./words", "cat, a.txt"]),
        ("is no name", ['["cat"]', "'cat', 'dog'", "cat | dog", "- cat", "1. cat", "0: cat"]),
        ("is no name", ["cat\tdog", "cat # a note", "0 cat", "1 cat\n2 dog", "* cat\n* dog"]),
        ("is no name", ["“cat”, “dog”", "+ cat", "(1) cat, (2) dog", "① cat", "the other: cat"]),
        ("is no name", ["cat, background: sky", "其他：天", '19" tv', '"cat" dog, bird']),
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
    # The original's checkpoints are only measured there.
    assert vocabulary.trained_names({}, ade) == []
    assert vocabulary.trained_names({"trained": ["wall"]}, ade) == ["wall"]
    full = load_config(None, ["data.name=voc", "data.train_on=all"])
    assert vocabulary.trained_names({}, full) == voc.names


def test_a_measured_set_s_seen_classes():
    """Those of its split, whatever was trained on: evaluations of one checkpoint are alike."""
    voc = dataset("voc")
    config = load_config(None, ["data.name=voc"])
    content = {"trained": voc.names, "config": {"data": {"name": "voc", "train_on": "all"}}}
    for kind in ("voc", "coco_stuff"):
        content["config"]["data"]["name"] = kind
        assert vocabulary.seen_classes(voc, content, config) == voc.seen
    assert vocabulary.seen_classes(voc, {}, config) == voc.seen
    assert vocabulary.seen_classes(dataset("ade20k"), content, config) == []
    content["config"]["data"]["name"] = "ade20k"
    assert vocabulary.seen_classes(dataset("ade20k"), content, config) == [*range(150)]


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ([], [0, 1, 2]),  # own data without `unseen`: all that were trained on
        (["data.unseen=['grass']"], [0, 1, 2]),  # this run was trained on it, whatever it is called
        (["data.classes=['Grass','zebra','cat']"], [0, 2]),  # by their names
    ],
)
def test_own_classes_that_were_trained_on_are_seen(root, trained, settings, seen):
    config = load_config(root / "a.toml", settings)
    assert vocabulary.seen_classes(dataset(config.data), load_checkpoint(trained), config) == seen
    if not settings:  # the original's checkpoints were not trained on it
        assert vocabulary.seen_classes(dataset(config.data), {"model": {}}, config) == []


def test_the_weight_of_the_ensemble_of_own_data(root, trained):
    """Measuring takes head^w CLIP^(1-w) for all classes: what w' = 1 - w gives where all are taken
    for unseen.
    """
    numbers = []
    for weight, seen in ((0.7, None), (0.3, [])):
        config = load_config(root / "a.toml", [f"clip.ensemble_weight={weight}"])
        segmenter = load_segmenter(load_checkpoint(trained), config, root, "last.pt").eval()
        result = evaluate(segmenter, config, root, PROCESS, "val", seen=seen)
        numbers.append(result["per_class"])
    done = measure(trained, root, "--out", root / "o", "--set", "clip.ensemble_weight=0.7")
    assert done.returncode == 0, done.stderr
    measured = json.loads((root / "o" / "metrics.json").read_text())["per_class"]
    assert numbers[0] == numbers[1] == measured


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_text_as_editors_save_it(encoding, root):
    text = CONFIG.replace("\n", "\r\n").replace("grass", "猫")
    (root / "b.toml").write_bytes(text.encode(encoding))
    assert load_config(root / "b.toml").data.classes == ["cat", "dog", "猫"]
    (root / "words").write_bytes("cat\r\nsofa = couch\r\n".encode(encoding))
    assert read_words(str(root / "words")).names == ["cat", "sofa"]
    for content in ("cat".encode("utf-16"), b"caf\xe9"):
        (root / "words").write_bytes(content)
        with pytest.raises(UserError, match="not UTF-8"):
            read_words(str(root / "words"))
