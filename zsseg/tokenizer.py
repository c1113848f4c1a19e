"""CLIP's tokenizer: lower-case byte-pair encoding (Sennrich et al. 2016)."""

import gzip
import html
import math
import os
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from zsseg.download import fetch
from zsseg.utils import UserError, cache_dir, path_of

BYTES_ONLY = 514  # vocabulary size with no merges: 256 bytes, 256 ending a word, start, end
VOCABULARY = (
    "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
    "sha256:924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
)


def byte_symbols() -> dict[int, str]:
    """The printable character that stands for each byte, in vocabulary order; values that print
    badly come last.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def read_merges(count: int) -> list[tuple[str, str]]:
    """The first `count` merges of OpenAI's vocabulary file ($ZSSEG_VOCAB, else the cache, else
    downloaded).
    """
    given = os.environ.get("ZSSEG_VOCAB")
    path = path_of(given) if given else cache_dir() / "bpe_simple_vocab_16e6.txt.gz"
    if given and not path.is_file():
        raise UserError(
            f"ZSSEG_VOCAB={given}", "no such file", "unset it or name bpe_simple_vocab_16e6.txt.gz"
        )
    if not given:
        fetch([VOCABULARY[0]], path, VOCABULARY[1], "BPE vocabulary")
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(
            f"BPE vocabulary {path}", f"cannot be read ({error})", "delete it to download it again"
        ) from None
    merges = [tuple(line.split()) for line in lines[1 : count + 1]]  # the first line is a version
    if len(merges) < count or any(len(m) != 2 for m in merges):
        raise UserError(
            f"BPE vocabulary {path}",
            f"holds fewer than {count} merges",
            "delete it to download it again",
        )
    return merges


def clean(text: str) -> str:
    """Text as CLIP reads it: broken encodings and HTML's entities mended, one space between words,
    lower case.
    """
    # Else there is nothing to mend.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def check_names(names: list[str], what: str = "class name") -> list[str]:
    """Class names without surrounding white space; UserError where one is missing, or two are one
    to CLIP.
    """
    names, before = [name.strip() for name in names], {}
    for i, name in enumerate(names):
        if not (read := clean(name)):
            raise UserError(f"class {i}", "has no name", "give every class a name")
        if read in before:
            same = (
                "stands twice"
                if before[read] == name
                else f"is the same to CLIP as {before[read]!r}"
            )
            raise UserError(f"{what} {name!r}", same, "give every class a name of its own")
        before[read] = name
    return names


class Tokenizer:
    """Lower-case byte-pair encoding. The vocabulary size says how many merges there are (none for
    514).
    """

    def __init__(self, vocab_size: int, context_length: int):
        self.context_length = context_length
        self.symbol_of_byte = byte_symbols()
        symbols = list(self.symbol_of_byte.values())
        merges = read_merges(vocab_size - BYTES_ONLY) if vocab_size > BYTES_ONLY else []
        self.rank = {pair: i for i, pair in enumerate(merges)}
        words = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in merges]
        self.index = {word: i for i, word in enumerate(words)}
        self.start, self.end = vocab_size - 2, vocab_size - 1
        self._merge = cache(self._merge)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` without start and end."""
        import regex  # \p classes, which `re` lacks

        text = clean(text)
        pattern = (
            r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
        )
        ids = []
        for word in regex.findall(pattern, text, regex.IGNORECASE):
            if word in ("<|startoftext|>", "<|endoftext|>"):
                ids.append(self.start if word == "<|startoftext|>" else self.end)
            else:
                ids += self._merge("".join(self.symbol_of_byte[b] for b in word.encode("utf-8")))
        return ids

    def _merge(self, word: str) -> list[int]:
        """Join the pair of lowest rank everywhere, left to right, until no known pair is left."""
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: self.rank.get(pair, math.inf))
            if best not in self.rank:
                break
            joined, i = [], 0
            while i < len(parts):
                step = 2 if tuple(parts[i : i + 2]) == best else 1
                joined.append("".join(parts[i : i + step]))
                i += step
            parts = joined
        return [self.index[part] for part in parts]

    def __call__(self, texts: list[str]) -> Tensor:
        """Texts -> int64 [N, context_length], zero-padded. UserError if a text does not fit."""
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            ids = [self.start, *self.encode(text), self.end]
            if len(ids) > self.context_length:
                why = f"has {len(ids)} tokens, CLIP reads {self.context_length}"
                raise UserError(f"text {text!r}", why, "shorten the class name or the prompt")
            row[: len(ids)] = torch.tensor(ids)
        return tokens
