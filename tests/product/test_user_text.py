"""Text that users write: configurations, word lists, lists of files, paths."""

import io
import os
import sys

import pytest
from conftest import command
from own_data import CONFIG

from zsseg.apps.predict import find_images
from zsseg.apps.vocabulary import read_words
from zsseg.config import load_config
from zsseg.utils import UserError, expand_path, split_lines


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


def test_lines_end_at_newlines_alone(tmp_path, monkeypatch):
    """A file's name may hold what str.splitlines takes for an end, and bytes that are no UTF-8."""
    names = ["a\x0bb", "a\x1cb", "a\u2028b", "a\x85b", " a ", os.fsdecode(b"\xff")]
    assert split_lines("\r\n".join(names) + "\n") == names
    content = b"\n".join(os.fsencode(tmp_path / name) for name in names) + b"\n\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    found = find_images(["-"], tmp_path / "out")
    assert found == sorted((str(tmp_path / name), name) for name in names)


def test_home_is_a_tilde(root):
    home = {"HOME": str(root)}
    done = command("prepare_data.py", "folder", "--config=~/a.toml", "--root=~", env=home)
    assert done.returncode == 0 and "val: 2 images" in done.stdout, done.stderr
    nobody = "~nobody-of-this-name/x"
    assert str(expand_path(nobody)) == nobody
