"""Files: text that users write, folders, and results that never replace a file of the user's."""

import codecs
import contextlib
import fcntl
import itertools
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from PIL.PngImagePlugin import PngInfo

from zsseg.utils import UserError, print_main

MARK = "written by zsseg"  # in every result: the next run may replace the file
EDGE = 4096  # bytes at either end of a file in which the mark is searched
PNG_MARK = PngInfo()
PNG_MARK.add_text("Software", MARK)


def decode(content: bytes) -> str:
    """Text as editors and shells save it: UTF-8 with or without a byte-order mark, UTF-16 with one.

    Other bytes become surrogates, as in Python's file names; `read_text` refuses them.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace")  # half a letter at the end must not raise
    return content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")


def split_lines(text: str) -> list[str]:
    """Lines end at a newline, with or without a carriage return, and at nothing else: a name may
    contain any other character.

    Without any newline, carriage returns end lines, as old editors write them.
    """
    if "\n" not in text:
        text = text.replace("\r", "\n")
    lines = text.removesuffix("\n").split("\n") if text else []
    return [line.removesuffix("\r") for line in lines]


def read_text(file: str | Path, what: str, todo: str) -> str:
    """A text file of the user's; UserError(what, ..., todo) where it cannot be read or is not
    text.
    """
    try:
        text = decode(Path(file).read_bytes())
        text.encode("utf-8")
        if "\0" in text:  # UTF-16 without a mark
            raise UnicodeError
    except OSError as error:
        raise UserError(what, f"cannot be read ({error.strerror})", todo) from None
    except UnicodeError:
        raise UserError(what, "is not UTF-8 text", "save it as UTF-8") from None
    return text


def walk(folder: str | Path, skip: str = "", hidden: list[str] | None = None) -> Iterator[str]:
    """The files below a folder in the order of their names. Links are followed, except those that
    lead back up.

    Files and folders that begin with a dot are skipped and added to `hidden`; the folder whose real
    path is `skip` is only skipped. UserError for a folder that cannot be read.
    """
    hidden = [] if hidden is None else hidden

    def below(parent: str, above: tuple[str, ...]) -> Iterator[str]:
        real = os.path.realpath(parent)
        if real in above or real == skip:
            return
        try:
            with os.scandir(parent) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            why = f"cannot be read ({error.strerror})"
            todo = "check its rights, or give a list (--images -)"
            raise UserError(f"folder {parent}", why, todo) from None
        for entry in entries:
            if entry.name.startswith("."):
                hidden.append(entry.path)
            elif entry.is_dir():
                yield from below(entry.path, (*above, real))
            else:
                yield entry.path

    yield from below(os.fspath(folder), ())


def is_ours(path: Path) -> bool:
    """Whether this program wrote a file, by its mark."""
    try:
        with open(path, "rb") as file:
            head = file.read(EDGE)
            file.seek(max(os.fstat(file.fileno()).st_size - EDGE, 0))
            return MARK.encode() in head or MARK.encode() in file.read(EDGE)
    except OSError:
        return False


def refuse_foreign(*paths: Path) -> None:
    """UserError for the first path that exists and was not written by this program."""
    for path in paths:
        if os.path.lexists(path) and not is_ours(path):
            why = "is there, and not one that this program wrote"
            raise UserError(f"file {path}", why, "give another folder, or move it")


LOCKS: dict[Path, IO] = {}  # of folders; they end with the process


def hold(folder: Path) -> None:
    """Keep other runs out of a folder until `release`, or until this process ends. UserError where
    another run is writing to it, or where it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        LOCKS[folder] = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        why = f"cannot be written ({error.strerror})"
        raise UserError(f"output {folder}", why, "check the folder and the disk") from None
    try:
        # Not inherited: workers that outlive their parent have no lock.
        fcntl.lockf(LOCKS[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        LOCKS.pop(folder).close()
        why = "another run is writing there"
        raise UserError(f"output {folder}", why, "give another --out") from None
    except OSError:
        pass  # a file system without locks


def release(folder: Path) -> None:
    if file := LOCKS.pop(folder, None):
        (folder / ".lock").unlink(missing_ok=True)
        file.close()


def check_writable(folder: Path, names: list[str]) -> None:
    """UserError where results of these names cannot be written to a folder, or would replace a file
    of the user's.
    """
    refuse_foreign(*(folder / name for name in names))
    existed = folder.exists()
    probe = folder / ".writable"  # always one name: the next try removes what a kill leaves
    with atomic_write(probe) as file:
        file.touch()
    probe.unlink(missing_ok=True)
    if not existed:
        folder.rmdir()


@contextlib.contextmanager
def result(path: Path) -> Iterator[Path]:
    """As `atomic_write`, for a result: it must contain MARK, and never replaces a file without."""
    refuse_foreign(path)
    with atomic_write(path) as temporary:
        yield temporary


def set_aside(folder: Path, names: tuple[str, ...]) -> None:
    """Rename files of these names, so that a run may begin in their folder, and print that."""
    for path in (folder / name for name in names):
        if path.exists() and path.stat().st_size:
            numbered = (path.with_stem(f"{path.stem}.{i}") for i in itertools.count(1))
            other = next(p for p in numbered if not os.path.lexists(p))
            path.rename(other)
            print_main(f"{path} was there already; it is kept as {other.name}")


@contextlib.contextmanager
def atomic_write(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which is renamed to `path` when the block ends without
    an error and its content is on the disk.

    With `previous`, the old file is renamed to that. Raises UserError where the file system
    refuses. Several processes may write one path at once: each has its own temporary file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, lock = lock_temporary(path)
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            if previous and path.exists():
                keep_as(path, previous)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        finally:
            os.close(lock)
        if previous:  # the names, too, must outlive a power cut
            folder = os.open(path.parent, os.O_RDONLY)
            with contextlib.suppress(OSError):  # not every file system can
                os.fsync(folder)
            os.close(folder)
    except OSError as error:
        why = f"cannot be written ({error.strerror})"
        raise UserError(f"file {path}", why, "check the folder and the disk") from None


def keep_as(path: Path, previous: Path) -> None:
    """Give a file a second name, replacing that one, so that both exist at every moment."""
    second = previous.with_name(f".{previous.name}.tmp")
    second.unlink(missing_ok=True)
    try:
        os.link(path, second)
    except OSError:  # a file system without links
        os.replace(path, second)
    os.replace(second, previous)


def lock_temporary(path: Path) -> tuple[Path, int]:
    """A temporary file beside `path` and the lock on it, which no other process has.

    The name is always the same, so that the next try replaces what a kill has left, except while
    another process has the lock.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    lock = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
    # OSError: another process has the lock or has just renamed the file; or there are no locks.
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(temporary)):
            return temporary, lock
    os.close(lock)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    return temporary, os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
