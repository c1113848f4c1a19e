"""Any words: what to look for in images, with synonyms and background words."""

import os
import re
from dataclasses import dataclass

from zsseg.config import Config, load_config
from zsseg.datasets import DataSet, dataset
from zsseg.files import read_text, split_lines
from zsseg.tokenizer import clean
from zsseg.utils import UserError, did_you_mean_file, path_of, print_main

OTHER = "other"  # what background words are shown as
ENDINGS = (
    r"txt|text|[ct]sv|jsonl?|toml|ya?ml|xml|md|rtf|docx?|xlsx?|ods|names|list|lst|dat|data"
    r"|jpe?g|png|tiff?|webp|pth?|pkl"
)
FILE = re.compile(rf"^(~|\.{{0,2}}/)|\.({ENDINGS})\s*$", re.IGNORECASE)
# Columns, numbers before names, comments behind them.
ODD = re.compile(r"\t|;|\s#|^\s*\d+\s*[:=)]|^\s*\d+\s*,\s*\D")
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
        return [*self.names[: self.shown], *([OTHER] if self.shown < len(self.names) else [])]

    def among(self, trained: list[str]) -> list[int]:
        """The ids of the words that are among the names of trained classes, however they are spaced
        and capitalised.
        """
        plain = lambda name: re.sub(r"[\W_]", "", name.casefold()) or name
        seen = {*map(plain, trained)}
        texts = ([name, *self.synonyms.get(name, [])] for name in self.names)
        return [i for i, names in enumerate(texts) if seen & {*map(plain, names)}]


def trained_names(content: dict, config: Config) -> list[str]:
    """The names of the classes that a checkpoint's segmenter was trained on: they count as seen in
    the ensemble.

    Of a data set without a seen/unseen split these are all. The original's checkpoints do not tell
    what they were trained on; there `config` does, whose data set has a split or is only measured.
    """
    if "config" not in content:
        data = dataset(config.data)
        return [data.names[i] for i in data.seen]
    data = dataset(load_config(None, [], content["config"]).data)
    return data.training_names


def seen_classes(data: DataSet, content: dict, config: Config) -> list[int]:
    """The class ids of a measured data set that count as seen.

    Of one's own data those whose names were trained on, as for any words. Of a data set of the
    table, those of the training where it is the same; else those of its own split: none where there
    is no such split (all its classes are unseen).
    """
    if "config" in content:
        trained = dataset(load_config(None, [], content["config"]).data)
        if data.name == "folder":
            return words_of(data).among(trained.training_names)
        if data.name == trained.name:
            return trained.trained
    return data.seen


def is_path(text: str) -> bool:
    """Whether somebody who writes this means a file rather than a word ("tv/monitor")."""
    return bool(FILE.search(text)) or ("/" in text and os.path.isdir(os.path.dirname(text)))


def read_words(text: str) -> Words:
    """The words themselves, "cat, sofa = couch, dog; other: sky, wall", or a text file of them, one
    class a line:

        cat
        sofa = couch, settee       with synonyms
        other: sky, wall           background words
        # a comment

    Raises UserError for a file that cannot be read, for no word at all, for a word that stands
    twice, and for one that looks as if something else was meant: the name of a file, or a list of
    another kind.
    """
    lines = text.split(";")
    file = path_of(text.strip())
    if in_file := os.path.isfile(file) or ("," not in text and is_path(text)):
        print_main(f"--classes: words from the file {file}")
        todo = did_you_mean_file(file, "give a text file, or the words themselves")
        lines = split_lines(read_text(file, f"--classes {text}", todo))
        if odd := next(
            (line for line in lines if ODD.search(line) and not line.strip().startswith("#")), None
        ):
            raise UserError(
                f"--classes: {odd!r}",
                "is not a line of names",
                "write one name, and comments apart",
            )
    classes, background = [], []  # a class is a list of names, its own first
    split = lambda text, signs: [
        word for part in re.split(f"[{signs}]", text) if (word := " ".join(part.split()))
    ]
    for line in map(str.strip, lines):
        if line.casefold().startswith(f"{OTHER}:"):
            background += split(line[len(OTHER) + 1 :], ",=")
        elif in_file and "=" in line and not line.startswith("#"):
            classes.append(split(line, ",="))
            if len(split(line.partition("=")[0], ",")) != 1:
                raise UserError(
                    f"--classes: {line!r}",
                    "has no single name before =",
                    "write one class with synonyms a line",
                )
        elif not (in_file and line.startswith("#")):
            classes += [names for entry in line.split(",") if (names := split(entry, "="))]
    if not classes:
        raise UserError("--classes", "holds no word", "write e.g. --classes 'cat, dog, grass'")
    check_words(classes, background)
    names = [words[0] for words in classes] + background
    return Words(names, {words[0]: words[1:] for words in classes if words[1:]}, len(classes))


def check_words(classes: list[list[str]], background: list[str]) -> None:
    """UserError for a word that stands twice, or looks as if something else was meant."""
    known = {OTHER} if background else set()
    for word in (w for words in [*classes, background] for w in words):
        if word.casefold().startswith(f"{OTHER}:"):
            raise UserError(
                f"--classes: {word!r}",
                "stands within a list",
                f"start with {OTHER}: after ; or on a new line",
            )
        if is_path(word):
            raise UserError(
                f"--classes: {word!r}",
                "looks like the name of a file",
                "give that alone, or words alone",
            )
        if word[0] in OPENING or word[-1] in CLOSING:
            raise UserError(
                f"--classes: {word!r}",
                "has brackets or quotes",
                "write the words alone: cat, dog, grass",
            )
        if clean(word) in known:
            raise UserError(f"--classes: {word!r}", "stands twice", "give every word one place")
        known.add(clean(word))
    if len(classes) >= 2**16:
        raise UserError(
            "--classes", f"holds {len(classes)} classes", "label maps have room for 65535"
        )


def words_of(data: DataSet) -> Words:
    """The classes of a data set."""
    return Words(data.names, {}, len(data.names))
