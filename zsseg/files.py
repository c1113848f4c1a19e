"""Files: text that users write, folders that they keep, and results that never take the place of a
file of theirs.
"""

import codecs
import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from PIL.PngImagePlugin import PngInfo

from zsseg.utils import UserError, print_main

# Stands in every result, so that the next run knows that it may replace the file
MARK = "written by zsseg"
EDGE = 4096  # bytes at either end of a file in which it is looked for
PNG_MARK = PngInfo()
PNG_MARK.add_text("Software", MARK)


def decode(content: bytes) -> str:
    """Text as editors and shells save it: UTF-8 with or without a byte-order mark, UTF-16 with one.

    Bytes that are no UTF-8 become surrogates, as in Python's file names; what must be text refuses
    them, see `read_text`.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace")  # half a letter at the end must not raise
    return content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")


def split_lines(text: str) -> list[str]:
    """Lines end at a newline, with or without a carriage return, and at nothing else: a name may
    hold any other sign.

    Where there is no newline at all, carriage returns end lines, as old editors write them.
    """
    if "\n" not in text:
        text = text.replace("\r", "\n")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


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
    """The files below a folder in the order of their names, links followed but for those that lead
    back up.

    What begins with a dot, file or folder, is skipped and put into `hidden`; the folder whose real
    path is `skip` is just skipped. UserError for a folder that cannot be read.
    """

    def below(parent: str, above: tuple[str, ...]) -> Iterator[str]:
        real = os.path.realpath(parent)
        if real in above or real == skip:
            return
        try:
            with os.scandir(parent) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            why = f"cannot be read ({error.strerror})"
            raise UserError(
                f"folder {parent}", why, "check its rights, or give a list (--images -)"
            ) from None
        for entry in entries:
            if entry.name.startswith("."):
                hidden is not None and hidden.append(entry.path)
            elif entry.is_dir():
                yield from below(entry.path, (*above, real))
            else:
                yield entry.path

    yield from below(os.fspath(folder), ())


def is_ours(path: Path) -> bool:
    """Whether a file says that this program wrote it."""
    try:
        with open(path, "rb") as file:
            head = file.read(EDGE)
            file.seek(max(os.fstat(file.fileno()).st_size - EDGE, 0))
            return MARK.encode() in head or MARK.encode() in file.read(EDGE)
    except OSError:
        return False


def refuse_foreign(*paths: Path) -> None:
    """UserError for the first path at which there is something that this program did not write."""
    for path in paths:
        if os.path.lexists(path) and not is_ours(path):
            raise UserError(
                f"file {path}",
                "is there, and not one that this program wrote",
                "give another folder, or move it",
            )


HELD: dict[Path, IO] = {}  # locks, which end with the process


def hold(folder: Path) -> None:
    """Keep other runs out of a folder until `release`, or this process ends. UserError where one is
    writing there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        why = f"cannot be written ({error.strerror})"
        raise UserError(f"output {folder}", why, "check the folder and the disk") from None
    HELD[folder] = file
    try:
        # Not inherited: workers that outlive their parent hold nothing.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        HELD.pop(folder).close()
        raise UserError(
            f"output {folder}", "another run is writing there", "give another --out"
        ) from None
    except OSError:
        pass  # a file system without locks


def release(folder: Path) -> None:
    if file := HELD.pop(folder, None):
        (folder / ".lock").unlink(missing_ok=True)
        file.close()


def check_writable(folder: Path, names: list[str]) -> None:
    """UserError where results of these names cannot be written to a folder, or would replace what
    is not ours.
    """
    refuse_foreign(*(folder / name for name in names))
    there = folder.exists()
    probe = folder / ".writable"  # one name: what a kill leaves, the next try removes
    with atomic_write(probe) as file:
        file.touch()
    probe.unlink(missing_ok=True)
    if not there:
        folder.rmdir()


@contextlib.contextmanager
def result(path: Path) -> Iterator[Path]:
    """As `replacing`, for a result: it must bear MARK, and never replaces a file that does not."""
    refuse_foreign(path)
    with atomic_write(path) as temporary:
        yield temporary


def set_aside(folder: Path, names: tuple[str, ...]) -> None:
    """Give files of these names another one, so that a run may begin in their folder, and say
    so.
    """
    for path in (folder / name for name in names):
        if path.exists() and path.stat().st_size:
            numbered = (path.with_stem(f"{path.stem}.{i}") for i in range(1, 1_000_000))
            other = next(p for p in numbered if not os.path.lexists(p))
            path.rename(other)
            print_main(f"{path} was there already; it is kept as {other.name}")


@contextlib.contextmanager
def atomic_write(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the name only when the block ends without an
    error and is on the disk.

    With `previous`, the file that is there takes that name. Raises UserError where the file system
    refuses. Several processes may write one path at once: each has a temporary file of its own.
    """
    temporary, lock = None, None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, lock = temporary_for(path)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if previous and path.exists():
            second = previous.with_name(f".{previous.name}.tmp")
            second.unlink(missing_ok=True)
            try:
                os.link(path, second)  # so that `path` is there at every moment
            except OSError:  # a file system without links
                os.replace(path, second)
            os.replace(second, previous)
        os.replace(temporary, path)
        temporary = None  # the name is the next writer's
        if previous:  # the names, too, must outlive a power cut
            folder = os.open(path.parent, os.O_RDONLY)
            with contextlib.suppress(OSError):  # not every file system can
                os.fsync(folder)
            os.close(folder)
    except OSError as error:
        raise UserError(
            f"file {path}", f"cannot be written ({error.strerror})", "check the folder and the disk"
        ) from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        if lock is not None:
            os.close(lock)


def temporary_for(path: Path) -> tuple[Path, int]:
    """A temporary file beside `path` that is this process's alone, and the lock on it.

    The name is always the same, so that the next try replaces what a kill has left; while another
    process holds it, a new one.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    lock = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
    # OSError: another one holds it, or has just given it its name; or there are no locks here.
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(temporary)):
            return temporary, lock
    os.close(lock)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    return temporary, os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
