"""Any words: what to look for in pictures, with synonyms and background words."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from zsseg.datasets import DataSet
from zsseg.run import UserError

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
    """A list of words, or a text file of them. Lines end at a line break or `;`, and each is one of

        cat, dog, grass            three classes
        sofa = couch, settee       one class with synonyms
        other: sky, wall           background words
        # a comment

    Raises UserError for a file that cannot be read, for no word at all, and for a word that stands twice.
    """
    if os.path.isfile(text) or text.strip().endswith(".txt"):
        try:
            text = Path(text).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
            raise UserError(f"--classes {text}", why, "give a text file, one class a line, or the words themselves") from None
    classes, background = [], []  # a class is a list of names, its own first
    split = lambda text, signs=",": [word for part in re.split(f"[{signs}]", text) if (word := " ".join(part.split()))]
    for line in re.split(r"[\n;]", text):
        line = line.strip()
        if line.startswith("#"):
            continue
        if line.casefold().startswith(f"{OTHER}:"):
            background += split(line[len(OTHER) + 1 :], ",=")
        elif "=" in line:
            name, _, rest = line.partition("=")
            if len(split(name)) != 1:
                raise UserError(f"--classes: {line!r}", "has no single name before =", "write one class with synonyms a line")
            classes.append([*split(name), *split(rest, ",=")])
        else:
            classes += [[word] for word in split(line)]
    if not classes:
        raise UserError("--classes", "holds no word", "write e.g. --classes 'cat, dog, grass'")
    known = {OTHER} if background else set()
    for word in (w for words in [*classes, background] for w in words):
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
