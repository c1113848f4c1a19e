"""Downloads that resume, and archives that are unpacked without trusting them."""

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
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tqdm import tqdm

from zsseg.utils import UserError

BLOCK = 1 << 20  # bytes
TRIES = 5  # in a row without a new byte
PAGES = {  # words in web pages of Google Drive
    "quota": "its quota is spent for now",
    "virus": "it asks for a confirmation",
    "sign in": "it asks for a login",
}
MAX_RATIO = 50  # an archive that unpacks to more than this many times its size is a bomb


def fetch(urls: list[str], path: Path, checksum: str, what: str, size: int = 0) -> Path:
    """Download `path` from the first of `urls` that works, unless it exists, and check it.

    An incomplete file stays in `<path>.part`, where the next try or the next run resumes.
    `checksum` is "sha256:<hex>" or the like, of which the first digits do, or "" where none is
    known; `size` in bytes, 0 where not known. Raises UserError.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent):
            if path.exists():
                check_file(path, checksum, what, size, delete=False)
                return path
            for url in urls:
                try:
                    transfer(url, part, what, size)
                    break
                except (OSError, http.client.HTTPException) as error:
                    if url == urls[-1]:
                        kept = f"; {part.stat().st_size} bytes are kept" if part.exists() else ""
                        why = f"cannot download {url} ({error}{kept})"
                        todo = f"run it again to go on, or put the file at {path}"
                        raise UserError(what, why, todo) from None
            check_file(part, checksum, what, size)
            part.replace(path)
    except OSError as error:
        why = f"cannot write {path} ({error})"
        raise UserError(what, why, "check the folder and the disk") from None
    return path


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time: all those of torchrun need the same file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_file(file: Path, checksum: str, what: str, size: int = 0, delete: bool = True) -> None:
    """UserError where a file is not what was published; with `delete`, it is removed first."""
    method, _, expected = checksum.partition(":")
    why = ""
    if size and file.stat().st_size != size:
        why = f"the file has {file.stat().st_size} bytes instead of {size}"
    elif checksum:
        with open(file, "rb") as content:
            digest = hashlib.file_digest(content, method).hexdigest()
        if not digest.startswith(expected):
            why = f"the file has {method} {digest} instead of {expected}"
    if why and delete:
        file.unlink()
        raise UserError(what, why, "it was deleted: run it again")
    if why:
        raise UserError(what, why, f"replace {file}, or unpack it yourself")


def transfer(url: str, part: Path, what: str, size: int) -> None:
    """Append the rest of `url` to `part`, trying again while bytes arrive. Raises OSError and
    HTTPException.
    """
    failures = 0
    while True:
        start = part.stat().st_size if part.exists() else 0
        if size and start >= size:
            return
        try:
            append(url, part, start, what)
            return
        except (OSError, http.client.HTTPException) as error:
            code = getattr(error, "code", 500)
            if code == 416 and start:  # there are no bytes after the ones in `part`
                return
            progressed = part.exists() and part.stat().st_size > start
            failures = 0 if progressed else failures + 1
            refused = isinstance(getattr(error, "reason", None), ConnectionRefusedError)
            if code < 500 or refused or failures == TRIES:
                raise
        time.sleep(min(0.1 * 2**failures, 5))


def refuse_page(answer: BinaryIO, start: int, url: str, path: Path, what: str) -> None:
    """UserError where a web page comes instead of a file, as Google Drive does it now and then."""
    begins = b"" if start else answer.peek(64).lstrip()
    if answer.headers.get_content_type() != "text/html" and not begins.startswith(b"<"):
        return
    text = answer.read(BLOCK).decode("utf-8", "replace").lower()
    why = next((why for word, why in PAGES.items() if word in text), "it does not say why")
    todo = f"open that link in a browser, and put the file at {path}"
    raise UserError(what, f"{url} gives a web page, not the file ({why})", todo)


def append(url: str, part: Path, start: int, what: str) -> None:
    """Request the bytes from `start` on. Raises OSError and HTTPException, also where fewer come
    than the server announced.
    """
    headers = {"User-Agent": "zsseg"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        if answer.status != 206:  # the whole file
            start = 0
        refuse_page(answer, start, url, part.with_suffix(""), what)
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else None
        resumed = f", going on at byte {start}" if start else ""
        options = {"unit": "B", "unit_scale": True, "disable": not sys.stderr.isatty()}
        bar = tqdm(desc=what, total=total, initial=start, **options)
        if bar.disable:
            print(f"{what}: {url}{resumed}", flush=True)
        with bar, open(part, "ab" if start else "wb", buffering=0) as file:
            while block := answer.read(BLOCK):
                try:
                    file.write(block)
                except OSError as error:  # not the network: another try would not help
                    why = f"cannot write {part} ({error.strerror})"
                    raise UserError(what, why, "check the disk") from None
                bar.update(len(block))
    if total not in (None, part.stat().st_size):
        raise ConnectionError("the transfer was cut")


def unpack(
    archive: Path, take: list[tuple[str, str]], folder: Path, what: str, verified: bool = False
) -> None:
    """Unpack parts of a .zip or .tar(.gz): each (path in the archive, path below `folder`) that
    does not exist yet.

    Files get their final names only when all have been written. An archive that is broken, lacks a
    part, or has a name that leads outside is a UserError that names it, and nothing is unpacked.
    `verified`: its checksum was right.
    """
    missing = [(inside, folder / path) for inside, path in take if not (folder / path).exists()]
    if not missing:
        return
    staging = folder / ".unpacking"
    new_folder = not folder.exists()
    try:
        shutil.rmtree(staging, ignore_errors=True)  # what a kill left
        stage(archive, [inside for inside, _ in missing], staging, verified)
        for i, (_, target) in enumerate(missing):
            target.parent.mkdir(parents=True, exist_ok=True)
            (staging / str(i)).rename(target)
    except OSError as error:  # gzip.BadGzipFile is one, too
        why = f"archive {archive} cannot be unpacked to {folder} ({error})"
        raise UserError(what, why, "check disk and file") from None
    except Exception as error:  # broken archives raise many types
        why = f"archive {archive} cannot be unpacked ({error})"
        raise UserError(what, why, "delete it to fetch it again") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if new_folder:
            with contextlib.suppress(OSError):  # it stays if something is in it
                folder.rmdir()


def stage(archive: Path, parts: list[str], staging: Path, verified: bool) -> None:
    """Unpack part i of an archive to `staging`/i. Raises any exception for a broken archive."""
    limit = MAX_RATIO * archive.stat().st_size + BLOCK
    for name, size, open_member in members(archive, verified):
        path = safe_path(name)
        limit -= size
        if limit < 0:
            raise ValueError(f"unpacks to more than {MAX_RATIO} times its size")
        for i, part in enumerate(parts):
            if path.is_relative_to(part):
                if open_member is None:
                    raise ValueError(f"{name!r} is a link or a device")
                target = staging / str(i) / path.relative_to(part)
                target.parent.mkdir(parents=True, exist_ok=True)
                with open_member() as source, open(target, "wb") as file:
                    shutil.copyfileobj(source, file, BLOCK)
    for i, part in enumerate(parts):
        if not (staging / str(i)).exists():
            raise ValueError(f"contains no {part}")


def safe_path(name: str) -> PurePosixPath:
    """A name in an archive as a path; ValueError for one that leads outside."""
    path = PurePosixPath(name)
    odd = not path.parts or path.is_absolute() or "\\" in name
    if odd or ".." in path.parts or ":" in path.parts[0]:
        raise ValueError(f"{name!r} leads outside")
    return path


def members(
    archive: Path, verified: bool
) -> Iterator[tuple[str, int, Callable[[], BinaryIO] | None]]:
    """(name, size, function that opens it; None for a link or a device) of everything but folders
    in an archive.
    """
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as content:
            for info in content.infolist():
                if not info.is_dir():
                    yield info.filename, info.file_size, partial(content.open, info)
        return
    compressed = archive.suffix in (".tgz", ".gz")
    opener = gzip.open if compressed else open
    with opener(archive, "rb") as stream, tarfile.open(fileobj=stream, mode="r|") as content:
        for info in content:
            if not info.isdir():
                open_member = partial(content.extractfile, info) if info.isfile() else None
                yield info.name, info.size, open_member
        while compressed and stream.read(BLOCK):
            pass  # to the end, where the checksum is
        # A tar that was cut between two files would pass for a complete one.
        if not compressed and not verified:
            stream.seek(-512, 2)
            if stream.read(512).strip(b"\0"):
                raise EOFError("it was cut")
