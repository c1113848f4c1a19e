"""Vocabularies: what to look for in images, with synonyms and background words."""

import itertools
import os
import re
from dataclasses import dataclass, field

from zsseg.utils import UserError, expand_path, read_text

OTHER = "other"  # what background words are shown as
MAX_CLASSES = 2**16 - 1  # that a label map of 16 bits has room for
BACKGROUND = re.compile(rf"\b{OTHER}s?\s*:", re.IGNORECASE)
# Paths, names of files, brackets, quotes, tabs, comments behind a name, numbers or dashes before it
NO_NAME = re.compile(r"""^[~./]|\.\w{2,5}$|[][{}<>"|\t]|\s#|^['`-]|^\d+[.:)]\s""")


@dataclass
class Words:
    """A vocabulary: the classes that are shown, then the background words, which are predicted like
    them.
    """

    names: list[str]
    # {name: other words for it}: their text features are averaged
    synonyms: dict[str, list[str]] = field(default_factory=dict)
    shown: int = MAX_CLASSES

    @property
    def shown_names(self):
        """The names of the ids in a label map."""
        return self.names[: self.shown] + [OTHER] * (self.shown < len(self.names))

    def among(self, trained):
        """The ids of the words that are among the names of trained classes, however they are spaced
        and capitalised.
        """
        normalise = lambda name: re.sub(r"[\W_]", "", name.casefold()) or name
        seen = set(map(normalise, trained))
        texts = ([name, *self.synonyms.get(name, [])] for name in self.names)
        return [i for i, names in enumerate(texts) if seen & set(map(normalise, names))]


def trained_names(content, config):
    """The names of the classes that a checkpoint's segmenter was trained on: they count as seen in
    the ensemble.

    The original's checkpoints do not tell; `config` does, whose data set has a seen/unseen split or
    is only measured.
    """
    if "trained" in content:
        return content["trained"]
    from zsseg.datasets import dataset

    data = dataset(config.data)
    return [data.names[i] for i in data.seen]


def seen_classes(data, content, config):
    """The class ids of a measured `datasets.DataSet` that count as seen.

    Of the user's own data, and of the set that a checkpoint of ours was trained on, those whose
    names were trained on, as for any words. Of another set those of its own split; without a split
    all of its classes are unseen.
    """
    own = "trained" in content and content["config"]["data"]["name"] == data.name
    if own or data.name == "folder":
        return Words(data.names).among(trained_names(content, config))
    return data.seen


def read_words(text) -> Words:
    """The words themselves, "cat, sofa = couch, dog; other: sky, wall", or a text file of them, one
    class a line:

        cat
        sofa = couch, settee       with synonyms
        other: sky, wall           background words
        # a comment

    Raises UserError for a file that cannot be read, for no word at all, for a duplicate, and for
    what looks like the name of a file or a list in another format.
    """
    file = expand_path(text.strip())
    if not os.path.isfile(file):
        return parse_words(text)
    todo = "give a text file, or the words themselves"
    return parse_words(read_text(file, f"--classes {file}", todo), in_file=True)


def parse_words(text, in_file=False) -> Words:
    """The words in a text as `read_words` describes them; nothing is read. Classes are separated by
    commas, semicolons and line breaks; in several lines, or `in_file`, the commas of a line that
    begins with `name =` separate its synonyms.
    """
    classes = []  # each: its name and, after =, its synonyms
    background = []
    in_lines = in_file or "\n" in text.strip()
    lines = [line for line in re.split("[\r\n]", text) if not line.strip().startswith("#")]
    for line in ";".join(lines).split(";"):
        line, *other = BACKGROUND.split(line)
        background += ",".join(other).split(",")
        if in_lines and "=" in line.partition(",")[0]:
            line = line.replace(",", "=")
        classes += line.split(",")
    rows = [[word.strip() for word in entry.split("=") if word.strip()] for entry in classes]
    rows = [row for row in rows if row]
    background = [word.strip() for word in background if word.strip()]
    if not 0 < len(rows) <= MAX_CLASSES:
        todo = f"give 1 to {MAX_CLASSES}, e.g. 'cat, dog, grass'"
        raise UserError("classes", f"are {len(rows)}", todo)
    words = [*itertools.chain(*rows), *background]
    for word in filter(NO_NAME.search, words):
        why = "is no name, but a file or a list in another format"
        raise UserError(f"class {word!r}", why, "check the path, or write names: cat, dog, grass")
    from zsseg.tokenizer import check_names  # imports torch

    check_names(words, "class")
    synonyms = {name: others for name, *others in rows if others}
    return Words([row[0] for row in rows] + background, synonyms, len(rows))
