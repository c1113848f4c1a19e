"""Vocabularies: what to look for in images, with synonyms and background words."""

import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path

from zsseg.config import Config, load_config
from zsseg.datasets import DataSet, dataset
from zsseg.files import read_text, split_lines
from zsseg.tokenizer import check_names
from zsseg.utils import UserError, did_you_mean_file, path_of, print_main

OTHER = "other"  # what background words are shown as
ENDINGS = (
    r"txt|text|[ct]sv|jsonl?|toml|ya?ml|xml|md|rtf|docx?|xlsx?|ods|names|list|lst|dat|data"
    r"|jpe?g|png|tiff?|webp|pth?|pkl"
)
FILE = re.compile(rf"^(~|\.{{0,2}}/)|\.({ENDINGS})\s*$", re.IGNORECASE)
# Columns, numbers before names, comments behind them.
OTHER_FORMAT = re.compile(r"\t|;|\s#|^\s*\d+\s*[:=)]|^\s*\d+\s*,\s*\D")
OPENING, CLOSING = "[{(<\"'`“‘„«", "]}>\"'`”’»"


@dataclass
class Words:
    """A vocabulary: the classes that are shown, then the background words, which are predicted like
    them.
    """

    names: list[str]
    synonyms: dict[str, list[str]]  # of a name: their text features are averaged with its own
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
        seen = set(map(normalise, trained))
        texts = ([name, *self.synonyms.get(name, [])] for name in self.names)
        return [i for i, names in enumerate(texts) if seen & set(map(normalise, names))]


def normalise(name: str) -> str:
    """Letters and digits only, in lower case."""
    return re.sub(r"[\W_]", "", name.casefold()) or name


def words_of(data: DataSet) -> Words:
    """The classes of a data set."""
    return Words(data.names, {}, len(data.names))


def training_set_of(content: dict) -> DataSet:
    """The data set of a checkpoint's training."""
    return dataset(load_config(base=content["config"]).data)


def trained_names(content: dict, config: Config) -> list[str]:
    """The names of the classes that a checkpoint's segmenter was trained on: they count as seen in
    the ensemble.

    Of a data set without a seen/unseen split these are all. The original's checkpoints do not tell
    what they were trained on; for them `config` does, whose data set has a split or is only
    measured.
    """
    if "config" in content:
        return training_set_of(content).training_names
    data = dataset(config.data)
    return [data.names[i] for i in data.seen]


def seen_classes(data: DataSet, content: dict, config: Config) -> list[int]:
    """The class ids of a measured data set that count as seen.

    Of one's own data those whose names were trained on, as for any words. Of a data set of the
    table, those of the training where it is the same; else those of its own split: none where there
    is no such split (all its classes are unseen).
    """
    if "config" not in content:
        return data.seen
    if data.name == "folder":
        return words_of(data).among(trained_names(content, config))
    trained = training_set_of(content)
    return trained.trained if data.name == trained.name else data.seen


def is_path(text: str) -> bool:
    """Whether somebody who writes this means a file rather than a word ("tv/monitor")."""
    return bool(FILE.search(text)) or ("/" in text and os.path.isdir(os.path.dirname(text)))


def split(text: str, signs: str) -> list[str]:
    """The words between any of these signs, each with single spaces; empty ones are left out."""
    words = (" ".join(part.split()) for part in re.split(f"[{signs}]", text))
    return [word for word in words if word]


def read_words(text: str) -> Words:
    """The words themselves, "cat, sofa = couch, dog; other: sky, wall", or a text file of them, one
    class a line:

        cat
        sofa = couch, settee       with synonyms
        other: sky, wall           background words
        # a comment

    Raises UserError for a file that cannot be read, for no word at all, for a duplicate, and for
    what looks as if something else was meant: the name of a file, or a list in another format.
    """
    file = path_of(text.strip())
    in_file = os.path.isfile(file) or ("," not in text and is_path(text))
    return parse_words(read_lines(file, text) if in_file else text.split(";"), in_file)


def parse_words(lines: list[str], in_file: bool = False) -> Words:
    """The words in lines as `read_words` describes them; nothing is read."""
    classes: list[list[str]] = []  # the names of each, its own first
    background: list[str] = []
    for line in map(str.strip, lines):
        name, equals, _ = line.partition("=")
        if line.casefold().startswith(f"{OTHER}:"):
            background += split(line[len(OTHER) + 1 :], ",=")
        elif in_file and equals:
            if len(split(name, ",")) != 1:
                todo = "write one class with synonyms a line"
                raise UserError(f"--classes: {line!r}", "has no single name before =", todo)
            classes.append(split(line, ",="))
        else:
            classes += filter(None, (split(entry, "=") for entry in line.split(",")))
    if not classes:
        raise UserError("--classes", "contains no word", "write e.g. --classes 'cat, dog, grass'")
    words = [*itertools.chain(*classes), *background]
    check_words(words + [OTHER] * bool(background))
    if len(classes) >= 2**16:
        why = f"contains {len(classes)} classes"
        raise UserError("--classes", why, "label maps have room for 65535")
    synonyms = {name: others for name, *others in classes if others}
    return Words([names[0] for names in classes] + background, synonyms, len(classes))


def read_lines(file: Path, text: str) -> list[str]:
    """The lines of a word file that are no comments."""
    print_main(f"--classes: words from the file {file}")
    todo = did_you_mean_file(file, "give a text file, or the words themselves")
    lines = split_lines(read_text(file, f"--classes {text}", todo))
    lines = [line for line in lines if not line.strip().startswith("#")]
    for line in filter(OTHER_FORMAT.search, lines):
        todo = "write one name, and comments on lines of their own"
        raise UserError(f"--classes: {line!r}", "is not a line of names", todo)
    return lines


def check_words(words: list[str]) -> None:
    """UserError for duplicates, and for words that look as if something else was meant."""
    for word in words:
        if word.casefold().startswith(f"{OTHER}:"):
            why = "is inside a list"
            todo = f"start with {OTHER}: after ; or on a new line"
        elif is_path(word):
            why = "looks like the name of a file"
            todo = "give only that, or only words"
        elif word[0] in OPENING or word[-1] in CLOSING:
            why = "has brackets or quotes"
            todo = "write only the words: cat, dog, grass"
        else:
            continue
        raise UserError(f"--classes: {word!r}", why, todo)
    check_names(words, "--classes:")
