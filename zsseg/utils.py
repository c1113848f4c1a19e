"""What every part shares: user errors, paths, messages, stateless seeds, progress."""

import difflib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)  # that ask a run to stop
MAX_NAMES_COMPARED = 5000  # of a folder, since it takes a while


class UserError(Exception):
    """An error that the user can correct, as (what, why, what to do): one line, exit code 2, no
    traceback.
    """

    def __str__(self) -> str:
        what, why, todo = self.args
        return " ".join(f"{what}: {why}; {todo}".split())


def did_you_mean(word: str, names: Iterable[str], else_: str) -> str:
    """What to do about an unknown name: take the nearest of `names`, or `else_` where none is
    near.
    """
    near = difflib.get_close_matches(word, names, 1, 0.65)
    return f"did you mean {near[0]}?" if near else else_


def did_you_mean_file(path: str | Path, else_: str) -> str:
    """The same for a missing file, among the files of its folder."""
    path = Path(path)
    try:
        names = [str(path.with_name(name)) for name in os.listdir(path.parent)]
    except OSError:
        return else_
    return did_you_mean(str(path), names[:MAX_NAMES_COMPARED], else_)


def path_of(text: str | Path) -> Path:
    """A path as a shell would read it: `~` is the home folder, also in --out=~/x."""
    path = Path(text)
    try:
        return path.expanduser()
    except RuntimeError:
        if path.parts[0] == "~":
            why = "this user has no home folder"
            raise UserError(f"path {text}", why, "give the absolute path") from None
        return path  # the name begins with ~, and there is no such user


def cache_dir() -> Path:
    """$ZSSEG_CACHE, else ~/.cache/zsseg; without a home folder, one of this user's below the
    temporary files.
    """
    given = os.environ.get("ZSSEG_CACHE")
    return path_of(given) if given else home_cache()


@functools.cache
def home_cache() -> Path:
    try:
        return Path.home() / ".cache" / "zsseg"
    except RuntimeError:
        folder = Path(tempfile.gettempdir()) / f"zsseg-{os.getuid()}"
        print_main(
            f"no home folder: downloads and features are kept in {folder} (set ZSSEG_CACHE for "
            f"another place)"
        )
        return folder


LEFT_OUT: list[str] = []


def left_out(what: str) -> None:
    """Have the command print at its end that this was left out: whoever drops data reports how much
    of what.
    """
    if os.environ.get("RANK", "0") == "0" and what not in LEFT_OUT:
        LEFT_OUT.append(what)


@functools.cache
def print_once(text: str) -> None:
    print_main(text)


def print_left_out() -> None:
    if LEFT_OUT:
        print_main(f"left out: {'; '.join(LEFT_OUT)}")
    LEFT_OUT.clear()


def first_of(names: list[str], most: int) -> str:
    """At most so many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def format_table(heads: Iterable, rows: Iterable[Iterable]) -> str:
    """Lines of a table: the first column aligned to the left, the others to the right."""
    lines = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        first.ljust(widths[0])
        + "".join(
            f"{cell:>{max(width + 2, 9)}}" for cell, width in zip(cells, widths[1:], strict=True)
        )
        for first, *cells in lines
    )


def several(count: int, one: str, many: str = "") -> str:
    """A number and its noun."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def print_main(text: str) -> None:
    """Print on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def mix_seed(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several small numbers, e.g. (run seed, step, rank)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the host had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@functools.cache
def git_commit() -> str:
    """The program's git commit, with "-dirty" where files were changed; "" without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        return subprocess.check_output(
            command, cwd=folder, stderr=subprocess.DEVNULL, text=True, timeout=10
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def progress(items: Iterable, name: str, total: int, show: bool = True) -> Iterator:
    """The items, with a progress bar on a terminal; elsewhere with a line after every tenth of
    them, or every minute.
    """
    if sys.stderr.isatty() or not show:
        yield from tqdm(items, name, total, disable=not show)
        return
    started = time.perf_counter()
    printed = started
    for i, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        is_tenth = 10 * i // total > 10 * (i - 1) // total
        if i == total or now - printed > (2 if is_tenth else 60):
            printed = now
            each = (now - started) / i
            left = format_time((total - i) * each)
            print(f"{name} {i}/{total}, {1 / each:.1f}/s, {left} left", flush=True)


def format_time(seconds: float) -> str:
    """As 0:22, 3:12 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def parallel(function: Callable, items: Iterable, workers: int, name: str) -> Iterator:
    """function(item) of every item, in order, by threads (Pillow and zlib let go of the
    interpreter), with progress.
    """
    items = list(items)
    parts = (items[i : i + 256] for i in range(0, len(items), 256))  # there may be a million
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        results = (result for part in parts for result in pool.map(function, part))
        try:
            yield from progress(results, name, len(items), os.environ.get("RANK", "0") == "0")
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
