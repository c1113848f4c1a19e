"""What every part shares: user errors, the command line, files, stateless seeds, progress."""

import argparse
import contextlib
import difflib
import functools
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)  # that ask a run to stop

LINE_EVERY = 10  # seconds; then the next line of progress comes where there is no terminal
EXIT_DELAY = 2  # seconds: torchrun ends the other processes sooner once the first has failed
ENVIRONMENT = """\
environment: ZSSEG_DATA (data root), ZSSEG_CACHE (downloads and CLIP's weights; else
~/.cache/zsseg), ZSSEG_VOCAB (CLIP's vocabulary file), ZSSEG_KERNELS=0 (plain PyTorch instead of
Triton kernels). A user error is one line on stderr and exit code 2."""


class UserError(Exception):
    """An error that the user can correct, as (what, why, what to do): one line, exit code 2."""

    def __str__(self):
        what, why, todo = self.args
        return " ".join(f"{what}: {why}; {todo}".split())


# --- messages


def did_you_mean(word, names, default):
    """What to do about an unknown name: take the nearest of `names`, else `default`."""
    near = difflib.get_close_matches(word, names, 1, 0.65)
    return f"did you mean {near[0]}?" if near else default


def no_such_file(what, path, todo="check the path"):
    """The error of a missing file; it names a file beside it with a similar name."""
    beside = map(str, path.parent.glob("*"))
    return UserError(what, "no such file", did_you_mean(str(path), beside, todo))


def is_main():
    """Whether this is the first process, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def print_main(text):
    """Print on the first process only."""
    if is_main():
        print(text)


@functools.cache
def warn(text):
    """Print a warning, each text once."""
    print_main(f"warning: {text}")


def join_some(names, most):
    """At most so many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def plural(count, noun):
    """A number and its noun."""
    return f"{count} {noun}{'s' * (count != 1)}"


def format_table(heads, rows):
    """Lines of a table of strings: the first column aligned to the left, the others to the
    right.
    """
    lines = [heads, *rows]
    width = max(len(line[0]) for line in lines)
    return "\n".join(
        title.ljust(width) + "".join(f" {cell:>9}" for cell in cells) for title, *cells in lines
    )


def format_time(seconds):
    """As 0:03:12."""
    return str(timedelta(seconds=round(seconds)))


# --- the command line


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line like every other user error."""

    def parse_args(self, argv):
        args, unknown = self.parse_known_args(argv)
        if unknown:
            todo = did_you_mean(unknown[0], self._option_string_actions, f"see {self.prog} --help")
            raise UserError("command line", f"{unknown[0]} is not an option", todo)
        return args

    def error(self, message):
        raise UserError("command line", message, f"see {self.prog} --help")


def parser(doc):
    """The options that all scripts share; `doc` is the docstring of one."""
    layout = argparse.RawDescriptionHelpFormatter
    shared = Parser(description=doc, epilog=ENVIRONMENT, formatter_class=layout, allow_abbrev=False)
    text = "TOML file of options, or of your own data set; a checkpoint holds its configuration"
    shared.add_argument("--config", metavar="FILE", type=expand_path, help=text)
    root = os.environ.get("ZSSEG_DATA") or "datasets"
    text = "data root ($ZSSEG_DATA, else ./datasets)"
    shared.add_argument("--root", metavar="DIR", type=expand_path, default=root, help=text)
    return shared


def run_parser(doc):
    """The options that train.py and eval.py share."""
    shared = parser(doc)
    add = shared.add_argument
    text = "override one option, e.g. train.steps=100; may be repeated (see zsseg/config.py)"
    add("--set", metavar="KEY=VALUE", action="append", default=[], help=text)
    add("--out", metavar="DIR", type=expand_path, help="where results go (default: see above)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return shared


class Stream(io.TextIOWrapper):
    """stdout or stderr: what a reader that is gone or a full disk does not take is lost."""

    lost = contextlib.suppress(OSError, ValueError)

    def write(self, text):
        with self.lost:
            super().write(text)
        return len(text)

    def flush(self):
        with self.lost:
            super().flush()


def command(main):
    """Run `main(argv)`; a UserError becomes `error: ...` on stderr and exit code 2."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:
            options = (stream.encoding, "backslashreplace")
            setattr(sys, name, Stream(stream.buffer, *options, line_buffering=True))
    try:
        main(sys.argv[1:])
    except UserError as error:
        if not is_main():
            time.sleep(EXIT_DELAY)  # all processes tend to meet the same error: one line is enough
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        distributed = sys.modules.get("torch.distributed")
        if distributed and distributed.is_initialized():
            distributed.destroy_process_group()


# --- files


def expand_path(text):
    """A path as a shell would read it: `~` is the home folder, also in --out=~/x; what begins with
    ~ and is no user's stays.
    """
    return Path(os.path.expanduser(text))


def cache_dir():
    """$ZSSEG_CACHE, else ~/.cache/zsseg."""
    return expand_path(os.environ.get("ZSSEG_CACHE") or "~/.cache/zsseg")


def read_text(file, what, todo):
    """A text file of the user's in UTF-8, with or without a mark. Raises UserError."""
    try:
        text = file.read_text("utf-8-sig")
        if "\0" not in text:  # else UTF-16
            return text
    except FileNotFoundError:
        raise no_such_file(what, file, todo) from None
    except OSError as error:
        raise UserError(what, f"cannot be read ({error.strerror})", todo) from None
    except UnicodeError:
        pass
    raise UserError(what, "is not UTF-8 text", "save it as UTF-8")


def read_table(name):
    """A TOML file of this package."""
    return tomllib.loads((Path(__file__).parent / name).read_text("utf-8"))


def split_lines(text):
    """The lines but the empty ones; they end at newlines and carriage returns, and at nothing else:
    a name may contain any other character.
    """
    return re.findall("[^\r\n]+", text)


def walk(folder, skip=""):
    """The files below a folder, if it exists, sorted; hidden ones are ignored, every folder is
    entered once, whatever links to it. `skip`: the real path of a folder to leave out.
    """

    def refuse(error):
        if not isinstance(error, FileNotFoundError):
            why = f"cannot be read ({error.strerror})"
            raise UserError(f"folder {error.filename}", why, "check its rights")

    visited = {skip}
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        yield from (os.path.join(parent, name) for name in sorted(files) if name[0] != ".")


@contextlib.contextmanager
def atomic_write(path, previous=None):
    """Yield a temporary path beside `path`, which takes its place when the block ends without an
    error and the content is on the disk. `previous`: the new name of the old file. The temporary
    name is always the same, so that the next try replaces what a kill has left. Raises UserError.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"file {path}", f"cannot be written ({error.strerror})", "check the folder and the disk"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path, content):
    """Write JSON whole or not at all; ValueError for NaN/Inf in it."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")


def claim_folder(out):
    """Make a folder of results. UserError for one that contains files and was not made by this
    program, so that no file of the user's is ever replaced.
    """
    mark = out / ".zsseg"
    with atomic_write(mark) as temporary:
        if not mark.exists() and {*out.iterdir()} - {temporary}:
            why = "contains files that are not this program's"
            raise UserError(f"output {out}", why, "give a new or an empty folder")
        temporary.write_text("Results of zsseg, which may write them again.\n")


def digest(settings, files=()):
    """16 hex digits of all that something depends on: settings, as JSON, and files, by path, size
    and times of change.
    """
    result = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for file in files:
        stat = os.stat(file) if os.path.exists(file) else None
        state = stat and (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        result.update(f"{file} {state}\n".encode(errors="surrogateescape"))
    return result.hexdigest()[:16]


@functools.cache
def git_commit():
    """The program's git commit, with "-dirty" if files were changed; "" without git."""
    words = "git describe --always --dirty --abbrev=40 --exclude=*"
    try:
        return subprocess.run(
            words.split(), cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


# --- seeds and progress


def mix_seed(*numbers):
    """One well-mixed 63-bit seed from several small numbers, e.g. (run seed, step, rank)."""
    import numpy as np

    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def progress(items, name, total):
    """The items, with a progress bar on a terminal, else with a line every LINE_EVERY seconds."""
    if sys.stderr.isatty() or not is_main():
        from tqdm import tqdm

        yield from tqdm(items, name, total, disable=not is_main())
        return
    printed = time.perf_counter()
    done = 0  # when the last line was printed: the pace is that since then
    for i, item in enumerate(items, 1):
        yield item
        seconds = time.perf_counter() - printed
        if i == total or seconds > LINE_EVERY:
            pace = (i - done) / seconds
            left = format_time((total - i) / pace)
            print(f"{name} {i}/{total}, {pace:.1f}/s, {left} left")
            printed += seconds
            done = i


def parallel(function, items, workers, name):
    """function(item) of every item, in order, by threads (Pillow and zlib release the
    interpreter), a few ahead, with progress.
    """
    waiting = deque()

    def results():
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        try:
            yield from progress(results(), name, len(items))
        finally:
            pool.shutdown(cancel_futures=True)
