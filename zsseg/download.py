"""Downloads that resume and are checked."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
import urllib.request
from http.client import HTTPException

from zsseg.utils import UserError

TRIES = 5  # of each address


def fetch(urls, path, checksum, what):
    """Download `path` from the first of `urls` that works, unless it exists, and check it.

    An incomplete file stays in `<path>.part`, where the next try or the next run resumes; other
    processes of torchrun wait meanwhile. `checksum` is "sha256:<hex>" or the like, of which the
    first digits do, or "" if none is known. Raises UserError.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(folder, fcntl.LOCK_EX)
            if path.exists():
                check_file(path, checksum, what)
                return path
            download(urls, part, what)
            try:
                check_file(part, checksum, what)
            except UserError:
                part.unlink()
                raise
            return part.replace(path)
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(
            what, f"cannot write {path} ({error})", "check the folder and the disk"
        ) from None


def check_file(file, checksum, what):
    """UserError for a file that is not what was published."""
    method, _, expected = checksum.partition(":")
    with open(file, "rb") as content:
        found = hashlib.file_digest(content, method or "sha256").hexdigest()
    if not found.startswith(expected):
        why = f"the file has {method} {found} instead of {expected}"
        raise UserError(what, why, f"run it again, or replace {file}")


def download(urls, part, what):
    """Complete `part` from the first of `urls` that works."""
    todo = f"run it again to go on, or put the file at {part.with_suffix('')}"
    for url in urls:
        print(f"{what}: {url}")
        for _ in range(TRIES):
            try:
                append(url, part, what)
                return
            except (OSError, HTTPException) as error:
                why = f"cannot download {url} ({error})"
                code = getattr(error, "code", 500)
                if code == 416:  # there are no bytes after the ones in `part`
                    return
                if code < 500:
                    break
                time.sleep(1)
    raise UserError(what, why, todo)


def append(url, part, what):
    """Request the bytes that `part` lacks. Raises OSError and HTTPException, also if fewer come
    than the server announced, and UserError for a web page in the place of the file, as Google
    Drive sends it now and then.
    """
    from tqdm import tqdm

    with open(part, "ab") as file:
        headers = {"User-Agent": "zsseg", "Range": f"bytes={file.tell()}-"}
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            if answer.headers.get_content_type() == "text/html":
                todo = f"open that link in a browser, and put the file at {part.with_suffix('')}"
                raise UserError(what, f"{url} gives a web page, not the file", todo)
            if answer.status != 206:  # the whole file
                file.truncate(0)
            # A bar on a terminal.
            with tqdm.wrapattr(answer, "read", answer.length, desc=what, disable=None) as content:
                shutil.copyfileobj(content, file)
            if answer.length:
                raise ConnectionError("the transfer was cut")
