"""Any words: what to look for in pictures, with synonyms and background words."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from zsseg.datasets import DataSet
from zsseg.run import UserError, nearest_file

OTHER = "other"  # what background words are shown as


@dataclass
class Words:
    """A vocabulary: the classes that are shown, then the background words, which are predicted like them."""
    names: list[str]
    synonyms: dict[str, list[str]]  # of a name: their text features are averaged with its own
    shown: int

    @property
    def shown_names(self) -> list[str]:
        """The names of the ids in a label map."""
        return [*self.names[: self.shown], *([OTHER] if self.shown < len(self.names) else [])]

    def trained(self, data: DataSet) -> list[int]:
        """The ids of the words that are seen classes of a data set, however they are spaced and capitalised."""
        plain = lambda name: re.sub(r"[\W_]", "", name.casefold())
        seen = {plain(data.names[i]) for i in data.seen}
        texts = ([name, *self.synonyms.get(name, [])] for name in self.names)
        return [i for i, names in enumerate(texts) if seen & {*map(plain, names)}]


def read_words(text: str) -> Words:
    """The words themselves, "cat, sofa = couch, dog; other: sky, wall", or a text file of them, one class a line:

        cat
        sofa = couch, settee       with synonyms
        other: sky, wall           background words
        # a comment

    Raises UserError for a file that cannot be read, for no word at all, and for a word that stands twice.
    """
    lines = text.split(";")
    if in_file := os.path.isfile(text) or text.strip().endswith(".txt"):
        try:
            lines = Path(text).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
            raise UserError(f"--classes {text}", why, nearest_file(text, "give a text file, or the words themselves")) from None
    classes, background = [], []  # a class is a list of names, its own first
    split = lambda text, signs: [word for part in re.split(f"[{signs}]", text) if (word := " ".join(part.split()))]
    for line in map(str.strip, lines):
        if line.casefold().startswith(f"{OTHER}:"):
            background += split(line[len(OTHER) + 1 :], ",=")
        elif in_file and "=" in line and not line.startswith("#"):
            classes.append(split(line, ",="))
            if len(split(line.partition("=")[0], ",")) != 1:
                raise UserError(f"--classes: {line!r}", "has no single name before =", "write one class with synonyms a line")
        elif not (in_file and line.startswith("#")):
            classes += [names for entry in line.split(",") if (names := split(entry, "="))]
    if not classes:
        raise UserError("--classes", "holds no word", "write e.g. --classes 'cat, dog, grass'")
    known = {OTHER} if background else set()
    for word in (w for words in [*classes, background] for w in words):
        if word.casefold().startswith(f"{OTHER}:"):
            raise UserError(f"--classes: {word!r}", "stands within a list", f"start with {OTHER}: after ; or on a new line")
        if word.casefold() in known:
            raise UserError(f"--classes: {word!r}", "stands twice", "give every word one place")
        known.add(word.casefold())
    if len(classes) >= 2**16:
        raise UserError("--classes", f"holds {len(classes)} classes", "label maps have room for 65535")
    names = [words[0] for words in classes] + background
    return Words(names, {words[0]: words[1:] for words in classes if words[1:]}, len(classes))


def words_of(data: DataSet) -> Words:
    """The classes of a data set."""
    return Words(data.names, {}, len(data.names))
