"""Downloads that resume and are checked."""

import contextlib
import fcntl
import hashlib
import os
import sys
import time
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

from zsseg.utils import UserError

BLOCK = 1 << 20  # bytes
TRIES = 5  # in a row without a new byte


def fetch(urls: list[str], path: Path, checksum: str, what: str, size: int = 0) -> Path:
    """Download `path` from the first of `urls` that works, unless it exists, and check it.

    An incomplete file stays in `<path>.part`, where the next try or the next run resumes.
    `checksum` is "sha256:<hex>" or the like, of which the first digits do, or "" if none is
    known; `size` in bytes, 0 if not known. Raises UserError.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent):
            if path.exists():
                check_file(path, checksum, what, size)
                return path
            download(urls, part, what, size)
            try:
                check_file(part, checksum, what, size)
            except UserError:
                part.unlink()
                raise
            part.replace(path)
    except OSError as error:
        todo = "check the folder and the disk"
        raise UserError(what, f"cannot write {path} ({error})", todo) from None
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


def check_file(file: Path, checksum: str, what: str, size: int = 0) -> None:
    """UserError for a file that is not what was published."""
    method, _, expected = checksum.partition(":")
    todo = f"run it again, or replace {file}"
    found = file.stat().st_size
    if size and found != size:
        raise UserError(what, f"the file has {found} bytes instead of {size}", todo)
    if checksum:
        with open(file, "rb") as content:
            found = hashlib.file_digest(content, method).hexdigest()
        if not found.startswith(expected):
            raise UserError(what, f"the file has {method} {found} instead of {expected}", todo)


def download(urls: list[str], part: Path, what: str, size: int) -> None:
    """Complete `part` from the first of `urls` that works, trying again while bytes arrive."""
    failures = 0
    while True:
        start = part.stat().st_size if part.exists() else 0
        if size and start >= size:
            return
        try:
            append(urls[0], part, start, what)
            return
        except (OSError, HTTPException) as error:
            code = getattr(error, "code", 500)
            if code == 416 and start:  # there are no bytes after the ones in `part`
                return
            now = part.stat().st_size if part.exists() else 0
            failures = 0 if now > start else failures + 1
            if code >= 500 and failures < TRIES:
                time.sleep(min(0.1 * 2**failures, 5))
                continue
            if urls[1:]:
                urls = urls[1:]
                failures = 0
                continue
            why = f"cannot download {urls[0]} ({error}; {now} bytes are here)"
            todo = f"run it again to go on, or put the file at {part.with_suffix('')}"
            raise UserError(what, why, todo) from None


def append(url: str, part: Path, start: int, what: str) -> None:
    """Request the bytes from `start` on. Raises OSError and HTTPException, also if fewer come than
    the server announced, and UserError for a web page in the place of the file, as Google Drive
    sends it now and then.
    """
    from tqdm import tqdm

    headers = {"User-Agent": "zsseg"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        if answer.status != 206:  # the whole file
            start = 0
        begins = b"" if start else answer.peek(64).lstrip()
        if answer.headers.get_content_type() == "text/html" or begins.startswith(b"<"):
            todo = f"open that link in a browser, and put the file at {part.with_suffix('')}"
            raise UserError(what, f"{url} gives a web page, not the file", todo)
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else None
        options = {"unit": "B", "unit_scale": True, "disable": not sys.stderr.isatty()}
        bar = tqdm(desc=what, total=total, initial=start, **options)
        if bar.disable:
            print(f"{what}: {url}{f', from byte {start} on' if start else ''}", flush=True)
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
