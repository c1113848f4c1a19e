"""Downloads from a server that cuts, lies and stops; broken and hostile archives; kills."""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import random
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trees
from conftest import command, fails_in_one_line
from own_data import files_below

import prepare_data
from zsseg import download
from zsseg.datasets import DATASETS, Archive, find_pairs
from zsseg.download import fetch
from zsseg.prepare.archives import unpack
from zsseg.prepare.official import obtain
from zsseg.utils import UserError

DATA = random.Random(0).randbytes(300_000)


class Server(ThreadingHTTPServer):
    """Serves `files`. cuts: bytes after which each of the next answers ends; ranges False: always
    the complete file; status: of every answer; page: sent in the place of a file.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cuts, self.asked = {}, [], []
        self.ranges, self.status, self.page = True, 200, b""

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range", "")
        server.asked.append((self.path, asked))
        content = server.page or server.files.get(self.path.lstrip("/"))
        given = re.match(r"bytes=(\d+)-", asked)
        start = int(given[1]) if given and server.ranges and not server.page else 0
        if content is None or server.status != 200 or start >= len(content) > 0:
            self.send_error(404 if content is None else 416 if server.status == 200 else 503)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "text/html" if server.page else "x/y")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: server.cuts.pop(0) if server.cuts else None])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.files["data.bin"] = DATA
        yield server
        server.shutdown()


def checksum(content: bytes, method: str = "sha256") -> str:
    return f"{method}:{hashlib.new(method, content).hexdigest()}"


def get(server: Server, path: Path, digest: str = checksum(DATA)) -> bytes:
    return fetch([server.url("data.bin")], path, digest, "data").read_bytes()


def test_a_cut_transfer_goes_on_where_it_was(server, tmp_path):
    """In the next run, too."""
    server.cuts = [70_000, 0, 100_000] + 20 * [0]
    path = tmp_path / "d" / "data.bin"
    with pytest.raises(UserError, match=r"cannot download .* cut.*run it again to go on"):
        get(server, path)
    starts = [f"bytes={start}-" for start in (0, 70_000, 70_000, 170_000, 170_000)]
    assert [asked for _, asked in server.asked] == starts
    server.cuts = []
    assert get(server, path) == DATA
    assert server.asked[-1] == ("/data.bin", "bytes=170000-")
    assert [*path.parent.iterdir()] == [path]
    get(server, path)  # it exists: nothing is requested
    with pytest.raises(UserError, match="replace"):  # but looked at
        get(server, path, "sha256:0")
    assert len(server.asked) == 6 and path.exists()
    (tmp_path / "other.bin.part").write_bytes(DATA)  # whole already
    assert get(server, tmp_path / "other.bin", checksum(DATA, "sha1")) == DATA
    server.ranges = False
    server.cuts = [70_000, 200_000]
    assert get(server, tmp_path / "third.bin") == DATA


@pytest.mark.parametrize("digest", ["sha256:00", "sha1:12"])
def test_a_wrong_file_is_not_kept(server, tmp_path, digest):
    for path in (tmp_path / "data.bin", tmp_path / "mine.bin"):
        with pytest.raises(UserError, match=f"instead of {digest.partition(':')[2]}"):
            get(server, path, digest)
        assert not (tmp_path / "data.bin").exists()
        (tmp_path / "mine.bin").write_bytes(DATA)  # the user's is not deleted
    assert [*tmp_path.iterdir()] == [tmp_path / "mine.bin"]


def test_mirrors_and_servers_that_refuse(server, tmp_path):
    urls = [server.url("absent.bin"), "http://127.0.0.1:9/data.bin", server.url("data.bin")]
    assert fetch(urls, tmp_path / "data.bin", checksum(DATA), "data").read_bytes() == DATA
    server.status = 503
    for url, why in zip(urls, ("HTTP Error 404", "refused", "HTTP Error 503"), strict=True):
        with pytest.raises(UserError, match=rf"{why}.*put the file at .*other\.bin"):
            fetch([url], tmp_path / "other.bin", "", "data")
    assert len([a for a in server.asked if a[0] == "/data.bin"]) == 1 + download.TRIES
    with pytest.raises(UserError, match="cannot write"):
        get(server, tmp_path / "data.bin" / "data.bin")
    # Google Drive sends a page when it asks for a login, or its quota is spent.
    server.status, server.page = 200, b"\n <!DOCTYPE html><html>Quota exceeded</html>"
    (tmp_path / "third.bin.part").write_bytes(DATA[:1000])
    with pytest.raises(UserError, match=r"web page.*open that link in a browser, and put the file"):
        get(server, tmp_path / "third.bin", "")
    server.page = b""
    assert get(server, tmp_path / "third.bin") == DATA


def test_processes_that_want_the_same_file_wait_for_one_another(server, tmp_path):
    """Four at once, as torchrun starts them: one download, one complete file."""
    server.cuts = [1000, 70_000]
    path = tmp_path / "cache" / "data.bin"
    with ThreadPoolExecutor() as pool:
        assert [*pool.map(lambda _: get(server, path), range(4))] == 4 * [DATA]
    assert len(server.asked) == 3 and [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tgz"])
def test_unpacking_takes_what_is_missing(tmp_path, ending):
    folder = tmp_path / "out"
    names = ("top/a/deep/1.txt", "top/b/2.txt", "top/list.txt", "other/3.txt")
    archive = trees.write(tmp_path / f"x{ending}", {name: name.encode() for name in names})
    take = [("top/a", "A"), ("top/b", "deep/B"), ("top/list.txt", "list.txt")]
    (folder / ".unpacking" / "0").mkdir(parents=True)  # left by a kill
    (folder / "list.txt").write_text("mine")
    get = lambda *take: obtain(Archive(archive.name, take), DATASETS["voc"], tmp_path, folder)
    get(*take)
    contents = {"A/deep/1.txt": b"top/a/deep/1.txt", "deep/B/2.txt": b"top/b/2.txt"}
    assert files_below(folder) == contents | {"list.txt": b"mine"}
    with pytest.raises(UserError, match="contains no top/c"):
        get(("top/b", "B2"), ("top/c", "C"))
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 4])
    with pytest.raises(UserError, match=f"x{ending} cannot be unpacked"):
        get(("top/b", "B2"))
    assert not (folder / "B2").exists() and not (folder / ".unpacking").exists()


@pytest.mark.parametrize("ending", [".zip", ".tar"])
@pytest.mark.parametrize("name", ["good/../../../outside.txt", "good/link", "../outside.txt"])
def test_nothing_is_unpacked_outside(tmp_path, ending, name):
    """Of a .tar such names and links are refused, in a .zip ".." and links mean nothing."""
    link = "good/link" if name == "good/link" else ""
    archive = trees.write(tmp_path / f"x{ending}", {"good/a.txt": b"", name: b"owned"}, link)
    is_refused = ending == ".tar" and name.startswith("good")
    error = pytest.raises(UserError, match=r"x\.tar cannot be unpacked .*(outside|link)")
    with error if is_refused else contextlib.nullcontext():
        unpack(archive, {tmp_path / "in/out/good": "good"}, tmp_path / "in/out/.unpacking", "data")
    assert not list(tmp_path.glob("*outside*")) and not list(tmp_path.glob("in/*outside*"))
    assert not any(file.is_symlink() for file in tmp_path.rglob("*"))
    assert (tmp_path / "in/out/good/a.txt").exists() != is_refused


PACKED = {  # the archives of data sets and which folders of a tree they hold
    "voc": {"VOCtrainval_11-May-2012.tar": "VOCdevkit", "benchmark.tgz": "benchmark_RELEASE"},
    "ade20k": {"ADEChallengeData2016.zip": "ADEChallengeData2016"},
}


def official(name: str, server: Server, folder: Path, monkeypatch) -> None:
    """The server has small official archives of a data set, which its row in the table describes."""
    trees.BUILDERS[name](folder / "source")
    rows = []
    for row in DATASETS[name].archives:
        file = folder / "archives" / row.file
        content = trees.pack(folder / "source", file, PACKED[name][row.file]).read_bytes()
        server.files[row.file] = content
        digest = checksum(content, row.checksum.partition(":")[0])
        rows.append(dataclasses.replace(row, urls=[server.url(row.file)], checksum=digest))
    monkeypatch.setitem(DATASETS, name, dataclasses.replace(DATASETS[name], archives=rows))
    monkeypatch.setenv("ZSSEG_CACHE", str(folder / "cache"))


def killed(arguments: list[str], number: int) -> int:
    """How a forked prepare_data ends that kills itself at its rename of this number."""
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    count = itertools.count(1)

    def rename(*paths: object) -> object:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return os.rename(*paths)

    with contextlib.suppress(BaseException):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.replace = Path.rename = Path.replace = rename
        prepare_data.main(arguments)
        os._exit(0)
    os._exit(1)


@pytest.mark.parametrize("name", PACKED)
def test_a_data_set_is_downloaded_whole(name, server, tmp_path, monkeypatch):
    """Killed half-way and repeated it finishes; run again it changes and requests nothing."""
    official(name, server, tmp_path, monkeypatch)
    root = tmp_path / "root"
    words = [name, "--workers", "1", "--root", str(root)]
    files, server.files = server.files, {}
    fails_in_one_line(command("prepare_data.py", *words), "404", "put the file at")
    assert not files_below(root)
    server.files = files
    server.cuts = [500, 1000, 300]
    server.asked.clear()
    ends = [killed(words, number) for number in (1, 2, 3, 0)]
    assert ends == [*3 * [signal.SIGKILL], 0]
    trees.BUILDERS[name](tmp_path / "layout")
    prepare_data.main([name, "--root", str(tmp_path / "layout")])
    pairs = [find_pairs(name, tmp_path / folder, "val") for folder in ("root", "layout")]
    ours, theirs = ([(f.name, f.read_bytes()) for pair in one for f in pair] for one in pairs)
    assert ours == theirs and ours
    before = files_below(root)
    count = len(server.asked)
    prepare_data.main(words)
    assert files_below(root) == before and len(server.asked) == count
