"""Text that users write: configurations, word lists, lists of files, paths."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, command
from own_data import CONFIG

from zsseg import utils
from zsseg.config import load_config
from zsseg.files import decode, split_lines
from zsseg.apps.predict import find_images
from zsseg.apps.vocabulary import read_words


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_as_editors_save_it(encoding, root, monkeypatch):
    (root / "b.toml").write_bytes(
        CONFIG.replace("\n", "\r\n").replace("grass", "猫").encode(encoding)
    )
    assert load_config(root / "b.toml").data.classes == ["cat", "dog", "猫"]
    (root / "words").write_bytes("cat\r\nsofa = couch\r\n".encode(encoding))
    assert read_words(str(root / "words")).names == ["cat", "sofa"]
    files = [root / "a/images/val/0.png", root / "a/images/val/1.png"]
    monkeypatch.setattr(
        sys,
        "stdin",
        type(
            "Input",
            (),
            {
                "buffer": type(
                    "B",
                    (),
                    {"read": staticmethod(lambda: "\r\n".join(map(str, files)).encode(encoding))},
                )
            },
        ),
    )
    assert find_images(["-"], root / "out")[1:] == [*map(str, files)]


def test_lines_end_at_newlines_alone():
    """A name may hold what str.splitlines takes for an end, and bytes that are no UTF-8."""
    names = ["a\x0bb", "a\x1cb", "a\u2028b", "a\x85b", " a ", "a\rb", os.fsdecode(b"\xff")]
    assert (
        split_lines(decode("\r\n".join(names).encode("utf-8", "surrogateescape") + b"\n")) == names
    )
    assert split_lines("") == [] and split_lines("a\n\nb") == ["a", "", "b"]


@pytest.mark.slow
def test_a_file_name_with_a_line_separator(root, trained):
    name = "a\u2028b\x0bc.png"
    shutil.copy(root / "a/images/val/0.png", root / name)
    (root / "list.txt").write_text(f"{root}/{name}\n", encoding="utf-8")
    words = (
        f"{sys.executable} eval.py {trained} --root {root} --images - --classes cat --out "
        f"{root}/o --device cpu"
    )
    words += f" < {root}/list.txt"
    done = subprocess.run(
        ["sh", "-c", words], cwd=ROOT, timeout=200, capture_output=True, text=True
    )
    assert done.returncode == 0 and (root / "o" / name).exists(), done.stderr


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("wrods.csv", "cannot be read"),
        ("lists/words.json", "cannot be read"),
        ("cat, words.txt", "looks like the name of a file"),
        ('["cat", "dog"]', "brackets or quotes"),
        ("'cat', 'dog'", "brackets or quotes"),
        ("/words", "cannot be read"),
        ("./words", "cannot be read"),
        ("tests/words", "cannot be read"),
        ("cat.png", "cannot be read"),
    ],
)
def test_words_that_mean_something_else(text, part):
    with pytest.raises(utils.UserError, match=part):
        read_words(text)


def test_words_with_unusual_signs_are_words():
    assert read_words("tv/monitor, St. Bernard, bull's eye, door (wooden), C++").names == [
        "tv/monitor",
        "St. Bernard",
        "bull's eye",
        "door (wooden)",
        "C++",
    ]


def test_home_is_a_tilde(root, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(root))
    done = command("eval.py", "--help")
    assert done.returncode == 0
    done = command(
        "prepare_data.py", "folder", "--config=~/a.toml", "--root=~", env={"HOME": str(root)}
    )
    assert done.returncode == 0 and "val: 2 images" in done.stdout, done.stderr
    config = load_config(root / "a.toml", ["data.folder=~/a", "clip.weights=~/clip.pt"])
    assert config.data.folder == f"{root}/a" and config.clip.weights == f"{root}/clip.pt"


def test_nobody_has_a_home(monkeypatch, capsys):
    monkeypatch.delenv("ZSSEG_CACHE")
    utils.home_cache.cache_clear()

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    folder = utils.cache_dir()
    assert (
        folder == utils.cache_dir()
        and str(os.getuid()) in folder.name
        and not folder.is_relative_to(ROOT)
    )
    assert capsys.readouterr().out.count("no home folder") == 1
    assert utils.path_of("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    utils.home_cache.cache_clear()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat\rdog\rgrass", ["cat", "dog", "grass"]),
        ("cat\tdog", None),
        ("cat; dog", None),
        ("0: cat\n1: dog", None),
        ("cat # a comment", None),
        ("1 = cat", None),
        ("3d printer\n2 of spades", ["3d printer", "2 of spades"]),
    ],
)
def test_word_files_of_other_kinds(text, names, tmp_path):
    (tmp_path / "words.txt").write_bytes(text.encode())
    if names:
        assert read_words(str(tmp_path / "words.txt")).names == names
    else:
        with pytest.raises(utils.UserError, match="is not a line of names"):
            read_words(str(tmp_path / "words.txt"))
    (tmp_path / "words.txt").write_bytes("cat\ndog".encode("utf-16-le"))
    with pytest.raises(utils.UserError, match="not UTF-8"):
        read_words(str(tmp_path / "words.txt"))
