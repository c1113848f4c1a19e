"""Vocabularies: what to look for in images, with synonyms and background words."""

import itertools
import json
import os
import re
from dataclasses import dataclass, field

from zsseg.config import load_config
from zsseg.utils import UserError, expand_path, read_text

OTHER = "other"  # what background words are shown as
MAX_CLASSES = 2**16 - 1  # that a label map of 16 bits has room for
BACKGROUND = re.compile(rf"(?:^|(?<=,))\s*{OTHER}s?\s*:", re.IGNORECASE)
WIDE = str.maketrans("，、،；؛：＝", ",,,;;:=")
# A name in quotes, as JSON writes it, between separators
QUOTED = r'"(?:[^"\\\n]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*"'
QUOTED = re.compile(rf"(?<![^,;:=，、،；؛：＝\n])[ \t]*({QUOTED})[ \t]*(?![^,;:=，、،；؛：＝\n])")
# Paths, names of files, brackets, quotes, colons, tabs; comments behind a name; bullets, numbers or
# letters of a list before it
NO_NAME = r"""^[~./]|\.\w{2,5}$|[][{}<>"“”„«»‘‚‹›「」|:\t]|\s#|^[-'`*•·◦▪●+#–—①-⑳]"""
NO_NAME = re.compile(NO_NAME + r"|^\(?(\w|\d+)[.)]\s|^[01]\s")
PLAIN = re.compile(r"[^\W\d_]([\w ()'/+&.-]*[\w)'+.])?")  # names that need no quotes


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
    def note(self):
        """What to say of a single class, which may be a list in another format; else ""."""
        if len(self.names) > 1:
            return ""
        todo = f"separate names by commas, and give the rest after {OTHER}:"
        return f"1 class: {self.names[0]!r}, which every pixel gets; {todo}"

    @property
    def rows(self):
        """All words for each class, its name first."""
        return [[name, *self.synonyms.get(name, [])] for name in self.names]

    @property
    def shown_names(self):
        """The names of the ids in a label map."""
        return self.names[: self.shown] + [OTHER] * (self.shown < len(self.names))

    def without(self, off):
        """The words but for some of the classes that are shown. UserError if none is left."""
        names = [name for name in self.names[: self.shown] if name not in off]
        if not names:
            raise UserError("classes", "are all switched off", "leave one on")
        synonyms = {name: words for name, words in self.synonyms.items() if name in names}
        return Words(names + self.names[self.shown :], synonyms, len(names))

    def among(self, trained):
        """The ids of the words that are among the names of trained classes, however they are spaced
        and capitalised.
        """
        normalise = lambda name: re.sub(r"[\W_]", "", name.casefold()) or name
        seen = set(map(normalise, trained))
        return [i for i, row in enumerate(self.rows) if seen & set(map(normalise, row))]


def trained_names(content, config):
    """The names of the classes that a checkpoint's segmenter was trained on: they count as seen in
    the ensemble.

    The original's checkpoints do not tell; `config` does, whose data set was trained on as a whole,
    has a seen/unseen split or is only measured.
    """
    if "trained" in content:
        return content["trained"]
    from zsseg.datasets import dataset

    data = dataset(config.data)
    if config.data.train_on == "all":
        return data.names
    return [data.names[i] for i in data.seen]


def seen_classes(data, content, config):
    """The class ids of a measured `datasets.DataSet` that count as seen.

    Of the set that a checkpoint of ours was trained on those of its split, as in the evaluation of
    its training; of other data of the user's those whose names were trained on; of any other set
    those of its own split. Without a split all classes of the first are seen, none of the last.
    """
    from zsseg.datasets import dataset

    if content.get("trained") and data == dataset(load_config(base=content.get("config")).data):
        return data.trained
    if data.name == "folder":
        return Words(data.names).among(trained_names(content, config))
    return data.seen


def read_words(text):
    """The words themselves, "cat, sofa = couch, dog; other: sky, wall", or a text file of them, one
    class a line:

        cat
        "bread, sliced"            in quotes nothing separates
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


def parse_words(text, in_file=False):
    """The words in a text as `read_words` describes them; nothing is read. Classes are separated by
    commas, semicolons and line breaks, all but in "quotes"; in several lines, or `in_file`, the
    commas of a line that begins with `name =` separate its synonyms.
    """
    quoted = {}  # what stands in the text for a name in quotes, and the name

    def stand_in(match):
        key = f"\0{len(quoted)}"
        quoted[key] = json.loads(match[1], strict=False)
        return key

    lines = text.replace("\0", " ").strip().splitlines()
    in_lines = in_file or len(lines) > 1
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    text = QUOTED.sub(stand_in, text).translate(WIDE)
    classes = []  # each: its name and, after =, its synonyms
    background = []
    for line in re.split("[\n;]", text):
        line, *other = BACKGROUND.split(line)
        background += ",".join(other).split(",")
        if in_lines and "=" in line.partition(",")[0]:
            line = line.replace(",", "=")
        classes += line.split(",")
    rows = [[word.strip() for word in entry.split("=") if word.strip()] for entry in classes]
    rows = [row for row in rows if row]
    shown = len(rows)
    if not 0 < shown <= MAX_CLASSES:
        todo = f"give 1 to {MAX_CLASSES}, e.g. 'cat, dog, grass'"
        raise UserError("classes", f"are {shown}", todo)
    rows += [[word.strip()] for word in background if word.strip()]
    for word in itertools.chain(*rows):
        if NO_NAME.search(word):
            why = "is no name, but a file or a list in another format"
            todo = "check the path, or write names: cat, dog, grass"
            raise UserError(f"class {word!r}", why, todo)
    from zsseg.tokenizer import check_names  # imports torch

    rows = [[quoted.get(word, word) for word in row] for row in rows]
    check_names(itertools.chain(*rows), "class")
    synonyms = {name: others for name, *others in rows if others}
    return Words([row[0] for row in rows], synonyms, shown)


def format_words(words):
    """As `parse_words` reads them."""

    def write(name):
        plain = PLAIN.fullmatch(name) and not NO_NAME.search(name)
        return name if plain else json.dumps(name, ensure_ascii=False)

    rows = [" = ".join(map(write, row)) for row in words.rows]
    if words.shown < len(rows):
        rows[words.shown] = f"{OTHER}: {rows[words.shown]}"
    return ", ".join(rows)
