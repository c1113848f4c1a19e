"""CLIP's tokenizer: lower-case byte-pair encoding (Sennrich et al. 2016)."""

import html
import math
from functools import cache
from itertools import pairwise

import torch

from zsseg.utils import UserError

BYTES_ONLY = 514  # vocabulary size with no merges: 256 bytes, 256 ending a word, start, end


def clean(text):
    """Text as CLIP reads it: broken encodings and HTML's entities mended, one space between words,
    lower case.
    """
    import ftfy  # slow to import

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def check_names(names, what="class name"):
    """Class names without surrounding white space; UserError if there are none, if one has nothing
    to see, or if two are one to CLIP.
    """
    if isinstance(names, str) or not names:
        raise UserError(f"{what}s", f"are {names!r}", "give a list of at least one name")
    names = [name.strip() for name in names]
    known = {}
    for i, name in enumerate(names):
        read = "".join(filter(str.isprintable, clean(name)))  # marks that nobody sees tell nothing
        if not read.strip():
            raise UserError(f"{what} {i}", f"is {name!r}, empty to CLIP", "give every class a name")
        if read in known:
            twin = known[read]
            why = "is given twice" if twin == name else f"is the same to CLIP as {twin!r}"
            raise UserError(f"{what} {name!r}", why, "give every class another name")
        known[read] = name
    return names


WORD = r"'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Lower-case byte-pair encoding.

    merges: pairs of symbols, best first; as many as `vocab_size` has room for beside the bytes,
    start and end: vocab_size - `BYTES_ONLY`.
    """

    def __init__(self, vocab_size, context_length, merges=()):
        self.context_length = context_length
        # Bytes that print badly are written as characters that follow all bytes.
        odd = [b for b in range(256) if not chr(b).isprintable() or chr(b) == " "]
        self.table = {b: 256 + i for i, b in enumerate(odd)}
        symbols = sorted(chr(self.table.get(b, b)) for b in range(256))
        words = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in merges]
        self.index = {word: i for i, word in enumerate(words)}
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.start = vocab_size - 2
        self.end = vocab_size - 1
        self._merge = cache(self._merge)

    def encode(self, text):
        """Token ids of `text` without start and end."""
        import regex  # \p classes, which `re` lacks

        ids = []
        for word in regex.findall(WORD, clean(text), regex.IGNORECASE):
            ids += self._merge(word.encode().decode("latin-1").translate(self.table))
        return ids

    def _merge(self, word):
        """Join the pair of lowest rank everywhere, left to right, until no known pair is left."""
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: self.rank.get(pair, math.inf))
            if best not in self.rank:
                break
            joined = parts[:1]
            for part in parts[1:]:
                if (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts = joined
        return [self.index[part] for part in parts]

    def __call__(self, texts):
        """Texts -> int64 [N, context_length], zero-padded. UserError if a text does not fit."""
        rows = []
        for text in texts:
            ids = [self.start, *self.encode(text), self.end]
            missing = self.context_length - len(ids)
            if missing < 0:
                why = f"has {len(ids)} tokens, CLIP reads {self.context_length}"
                raise UserError(f"text {text!r}", why, "shorten the class name or the prompt")
            rows.append(ids + [0] * missing)
        return torch.tensor(rows)
