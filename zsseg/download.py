"""Downloads that go on where they were cut, and archives that are unpacked without trusting
them.
"""

import contextlib
import fcntl
import gzip
import hashlib
import http.client
import os
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from zsseg.utils import UserError

BLOCK = 1 << 20
TRIES = 5  # in a row without a single new byte
PAGES = {  # what Google's say, in lower case
    "quota": "its quota is spent for now",
    "virus": "it asks for a confirmation",
    "sign in": "it asks for a login",
}
RATIO = 50  # an archive that unpacks to more than this many times its size is a bomb


def fetch(urls: list[str], path: Path, checksum: str, what: str, size: int = 0) -> Path:
    """Download the first of `urls` that answers to `path` unless it is there, and check it either
    way.

    What has arrived stays in `<path>.part`, and the next try or the next run goes on from there.
    `checksum` is "sha256:<hex>" or the like, of which the first digits do, or "" where none is
    known; `size` in bytes, 0 where
    not known. Raises UserError.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent):
            if path.exists():
                check_file(path, checksum, what, size, delete=False)
                return path
            for i, url in enumerate(urls):
                try:
                    transfer(url, part, what, size)
                    break
                except (OSError, http.client.HTTPException) as error:
                    if i + 1 == len(urls):
                        kept = f"; {part.stat().st_size} bytes are kept" if part.exists() else ""
                        todo = f"run it again to go on, or put the file at {path}"
                        raise UserError(
                            what, f"cannot download {url} ({error}{kept})", todo
                        ) from None
            check_file(part, checksum, what, size)
            part.replace(path)
    except OSError as error:
        raise UserError(
            what, f"cannot write {path} ({error})", "check the folder and the disk"
        ) from None
    return path


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time: those of torchrun all want the same file at once."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_file(file: Path, checksum: str, what: str, size: int = 0, delete: bool = True) -> None:
    """UserError where a file is not what was published; with `delete`, the file is removed
    first.
    """
    problem = ""
    if size and file.stat().st_size != size:
        problem = f"has {file.stat().st_size} bytes instead of {size}"
    elif checksum:
        method, _, wanted = checksum.partition(":")
        with open(file, "rb") as content:
            found = hashlib.file_digest(content, method).hexdigest()
        problem = "" if found.startswith(wanted) else f"has {method} {found} instead of {wanted}"
    if problem:
        if delete:
            file.unlink()
        todo = (
            "it was deleted: run it again" if delete else f"replace {file}, or unpack it yourself"
        )
        raise UserError(what, f"the file {problem}", todo)


def transfer(url: str, part: Path, what: str, size: int) -> None:
    """Append the rest of `url` to `part`, trying again while bytes arrive. Raises OSError and
    HTTPException.
    """
    failures = 0
    while True:
        had = part.stat().st_size if part.exists() else 0
        if size and had >= size:
            return
        try:
            if append(url, part, had, what):
                return
            error: Exception = ConnectionError("the transfer was cut")
        except urllib.error.HTTPError as caught:
            if caught.code == 416 and had:  # nothing lies beyond what we have
                return
            if caught.code < 500:
                raise
            error = caught
        except (OSError, http.client.HTTPException) as caught:
            error = caught
        failures = 0 if part.exists() and part.stat().st_size > had else failures + 1
        if failures == TRIES or isinstance(getattr(error, "reason", None), ConnectionRefusedError):
            raise error
        time.sleep(min(0.1 * 2**failures, 5))


def refuse_page(answer: IO[bytes], url: str, path: Path, what: str, resumed: bool) -> None:
    """UserError where a web page comes in the place of a file, as Google Drive answers now and
    then.
    """
    begins = b"" if resumed else answer.peek(64).lstrip()
    if answer.headers.get_content_type() != "text/html" and not begins.startswith(b"<"):
        return
    text = answer.read(BLOCK).decode("utf-8", "replace").lower()
    why = next((why for sign, why in PAGES.items() if sign in text), "it does not say why")
    todo = f"open that link in a browser, and put the file at {path}"
    raise UserError(what, f"{url} gives a web page, not the file ({why})", todo)


def append(url: str, part: Path, had: int, what: str) -> bool:
    """One request for the bytes from `had` on; True when the server sent all that it announced."""
    request = urllib.request.Request(
        url, headers={"Range": f"bytes={had}-", "User-Agent": "zsseg"} if had else {}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        resumed = had > 0 and answer.status == 206
        refuse_page(answer, url, part.with_suffix(""), what, resumed)
        announced = answer.headers.get("Content-Length")
        start = had if resumed else 0
        total = start + int(announced) if announced else None
        bar = tqdm(
            desc=what,
            total=total,
            initial=start,
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
        )
        if bar.disable:
            print(f"{what}: {url}" + (f", going on at byte {had}" if resumed else ""), flush=True)
        with bar, open(part, "ab" if resumed else "wb", buffering=0) as file:
            while block := answer.read(BLOCK):
                try:
                    file.write(block)
                except OSError as error:  # no fault of the network: trying again would not help
                    raise UserError(
                        what, f"cannot write {part} ({error.strerror})", "check the disk"
                    ) from None
                bar.update(len(block))
        return total is None or part.stat().st_size == total


def unpack(
    archive: Path, take: list[tuple[str, str]], folder: Path, what: str, verified: bool = False
) -> None:
    """Unpack parts of a .zip or .tar(.gz): each (path in the archive, path below `folder`) that is
    not there yet.

    Files appear under their final names only when all have been written. An archive that is broken,
    that lacks a part, or that holds a name which leads outside is a UserError that names it, and
    nothing is unpacked. `verified`: its checksum was right.
    """
    wanted = [
        (PurePosixPath(inside), folder / outside)
        for inside, outside in take
        if not (folder / outside).exists()
    ]
    if not wanted:
        return
    staging = folder / ".unpacking"
    new_folder = not folder.exists()
    try:
        limit = RATIO * archive.stat().st_size + BLOCK
        shutil.rmtree(staging, ignore_errors=True)  # what a kill left
        for name, size, open_member in members(archive, verified):
            path = inside_path(name)
            limit -= size
            if limit < 0:
                raise ValueError(f"unpacks to more than {RATIO} times its size")
            for i, (inside, _) in enumerate(wanted):
                if path.is_relative_to(inside):
                    if open_member is None:
                        raise ValueError(f"{name!r} is a link or a device")
                    target = staging / str(i) / path.relative_to(inside)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with open_member() as source, open(target, "wb") as file:
                        shutil.copyfileobj(source, file, BLOCK)
        for i, (inside, _) in enumerate(wanted):
            if not (staging / str(i)).exists():
                raise ValueError(f"holds no {inside}")
        for i, (_, target) in enumerate(wanted):
            target.parent.mkdir(parents=True, exist_ok=True)
            (staging / str(i)).rename(target)
    except OSError as error:  # gzip.BadGzipFile is one, too
        raise UserError(
            what,
            f"archive {archive} cannot be unpacked to {folder} ({error})",
            "check disk and file",
        ) from None
    except Exception as error:  # broken archives raise many kinds
        raise UserError(
            what, f"archive {archive} cannot be unpacked ({error})", "delete it to fetch it again"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if new_folder:
            with contextlib.suppress(OSError):  # it stays if something is in it
                folder.rmdir()


def inside_path(name: str) -> PurePosixPath:
    """A name in an archive; ValueError for one that leads outside."""
    path = PurePosixPath(name)
    odd = not path.parts or path.is_absolute() or "\\" in name
    if odd or ".." in path.parts or ":" in path.parts[0]:
        raise ValueError(f"{name!r} leads outside")
    return path


def members(archive: Path, verified: bool) -> Iterator[tuple[str, int, object]]:
    """(name, size, function that opens it; None for a link or a device) of everything but folders
    in an archive.
    """
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as content:
            for info in content.infolist():
                if not info.is_dir():
                    yield info.filename, info.file_size, lambda info=info: content.open(info)
        return
    compressed = archive.suffix in (".tgz", ".gz")
    opener = gzip.open if compressed else open
    with opener(archive, "rb") as stream, tarfile.open(fileobj=stream, mode="r|") as content:
        for info in content:
            if not info.isdir():
                yield (
                    info.name,
                    info.size,
                    (lambda info=info: whole(content, info)) if info.isfile() else None,
                )
        while compressed and stream.read(BLOCK):
            pass  # to the end, where the checksum is
        # A tar cut between two files would pass for a whole one.
        if not compressed and not verified:
            stream.seek(-512, 2)
            if stream.read(512).strip(b"\0"):
                raise EOFError("it was cut")


@contextlib.contextmanager
def whole(content: tarfile.TarFile, info: tarfile.TarInfo) -> Iterator[IO[bytes]]:
    with content.extractfile(info) as source:
        yield source
