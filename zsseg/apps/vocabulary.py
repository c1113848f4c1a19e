"""Vocabularies: what to look for in images, with synonyms and background words."""

import itertools
import os
import re
from dataclasses import dataclass

from zsseg.config import Config
from zsseg.utils import UserError, expand_path, no_such_file, plural, print_main, read_text

OTHER = "other"  # what background words are shown as
MAX_CLASSES = 2**16 - 1  # that a label map of 16 bits has room for
FULL_WIDTH = str.maketrans("，；：＝、\r", ",;:=,\n")
BACKGROUND = re.compile(rf"(?:^|[,;\n])\s*{OTHER}s?\s*:", re.IGNORECASE)
FILE = re.compile(r"(~|\.{0,2}/)[^,;=\n]*|[^,;=\n]*\.\w{2,5}")
# Brackets, quotes, tabs, comments behind a name, numbers or dashes before it.
NO_NAME = re.compile(r"""[][{}<>"|\t]|\s#|^['`-]|^\d+[.:)]\s""")


@dataclass
class Words:
    """A vocabulary: the classes that are shown, then the background words, which are predicted like
    them.
    """

    names: list[str]
    synonyms: dict[str, list[str]]  # {name: other words for it}: their text features are averaged
    shown: int

    @property
    def shown_names(self) -> list[str]:
        """The names of the ids in a label map."""
        has_background = self.shown < len(self.names)
        return self.names[: self.shown] + [OTHER] * has_background

    def among(self, trained: list[str]) -> list[int]:
        """The ids of the words that are among the names of trained classes, however they are spaced
        and capitalised.
        """
        normalise = lambda name: re.sub(r"[\W_]", "", name.casefold()) or name
        seen = set(map(normalise, trained))
        texts = ([name, *self.synonyms.get(name, [])] for name in self.names)
        return [i for i, names in enumerate(texts) if seen & set(map(normalise, names))]


def words_of(data) -> Words:
    """The classes of a `datasets.DataSet`."""
    return Words(data.names, {}, len(data.names))


def trained_names(content: dict, config: Config) -> list[str]:
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


def seen_classes(data, content: dict, config: Config) -> list[int]:
    """The class ids of a measured `datasets.DataSet` that count as seen.

    Of the user's own data those whose names were trained on, as for any words. Of a data set of the
    table, those of the training if it is the same, else those of its own split; without a split all
    of its classes are unseen.
    """
    trained = trained_names(content, config)
    if data.name == "folder":
        return words_of(data).among(trained)
    if "trained" in content and content["config"]["data"]["name"] == data.name:
        return [i for i, name in enumerate(data.names) if name in trained]
    return data.seen


def read_words(text: str) -> Words:
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
    todo = "give a text file, or the words themselves"
    if os.path.isfile(file):
        print_main(f"--classes: words from the file {file}")
        words = parse_words(read_text(file, f"--classes {file}", todo), in_file=True)
    elif FILE.fullmatch(text.strip()):
        raise no_such_file(f"--classes {text}", file, todo)
    else:
        words = parse_words(text)
    if len(words.names) == 1:
        todo = f"separate names by commas, or add '; {OTHER}: ...' for what is something else"
        print_main(f"1 class, which every pixel gets: {words.names[0]!r} ({todo})")
    return words


def parse_words(text: str, in_file: bool = False) -> Words:
    """The words in a text as `read_words` describes them; nothing is read. Classes are separated by
    commas, semicolons and line breaks; in several lines, or `in_file`, the commas of a line that
    begins with `name =` separate its synonyms.
    """
    from zsseg.tokenizer import check_names  # imports torch

    text = text.translate(FULL_WIDTH).strip()
    in_lines = in_file or "\n" in text
    classes: list[str] = []  # each: its name and, after =, its synonyms
    background: list[str] = []
    for line in re.split("[;\n]", BACKGROUND.sub(f"\n{OTHER}:", text)):
        if line.lstrip().startswith("#"):
            continue
        if line.startswith(f"{OTHER}:"):
            background += re.split("[,=]", line.removeprefix(f"{OTHER}:"))
        elif in_lines and "=" in line.partition(",")[0]:
            classes.append(line.replace(",", "="))
        else:
            classes += line.split(",")
    clean = lambda words: [" ".join(re.split(" +", w.strip())) for w in words if w.strip()]
    rows = [row for row in (clean(entry.split("=")) for entry in classes) if row]
    background = clean(background)
    if not 0 < len(rows) <= MAX_CLASSES:
        why = f"contain {plural(len(rows), 'name')}"
        raise UserError("classes", why, f"give 1 to {MAX_CLASSES}, e.g. 'cat, dog, grass'")
    words = [*itertools.chain(*rows), *background, *[OTHER] * bool(background)]
    for word in words:
        if NO_NAME.search(word) or FILE.fullmatch(word):
            todo = "write only names: cat, dog, grass"
            raise UserError(f"class {word!r}", "is a file or a list in another format", todo)
    check_names(words, "class")
    synonyms = {name: others for name, *others in rows if others}
    return Words([row[0] for row in rows] + background, synonyms, len(rows))
