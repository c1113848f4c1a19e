"""Downloads from a server on this machine that cuts, lies and stops; archives that are broken or
hostile; kills.
"""

import dataclasses
import hashlib
import os
import random
import re
import resource
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trees
from PIL import Image
from test_commands import fails

import prepare_data
from zsseg import download
from zsseg.datasets import DATASETS, Archive
from zsseg.download import fetch, unpack
from zsseg.utils import UserError

DATA = random.Random(0).randbytes(300_000)


class Server:
    """Serves `files`; `cuts` bytes after which each of the next answers ends; `ranges` False:
    always the complete file.
    """

    def __init__(self):
        self.files, self.cuts, self.ranges, self.asked, self.status = {}, [], True, [], 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                content = outer.files.get(self.path.lstrip("/"))
                given = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
                start = int(given[1]) if given and outer.ranges else 0
                outer.asked.append((self.path, self.headers.get("Range")))
                if content is None or outer.status != 200:
                    self.send_error(404 if content is None else outer.status)
                    return
                if start >= len(content) > 0:
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                body = content[start:]
                if outer.cuts:
                    body = body[: outer.cuts.pop(0)]
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/{name}"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "BLOCK", 10_000)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server = Server()
    server.files["data.bin"] = DATA
    yield server
    server.http.shutdown()
    server.http.server_close()


def checksum(content: bytes, method: str = "sha256") -> str:
    return f"{method}:{hashlib.new(method, content).hexdigest()}"


def test_a_cut_transfer_goes_on_where_it_was(server, tmp_path):
    server.cuts = [70_000, 0, 100_000]
    path = fetch(
        [server.url("data.bin")], tmp_path / "d" / "data.bin", checksum(DATA), "data", len(DATA)
    )
    assert path.read_bytes() == DATA and [f.name for f in path.parent.iterdir()] == ["data.bin"]
    assert [r for _, r in server.asked] == [None, "bytes=70000-", "bytes=70000-", "bytes=170000-"]
    fetch([server.url("data.bin")], path, checksum(DATA), "data")  # it exists: nothing is requested
    with pytest.raises(UserError, match="replace"):  # but looked at
        fetch([server.url("data.bin")], path, "sha256:0", "data")
    assert len(server.asked) == 4 and path.exists()


def test_the_next_run_goes_on_too(server, tmp_path):
    server.cuts = [70_000] + 20 * [0]
    with pytest.raises(
        UserError, match=r"cannot download .* cut; 70000 bytes are kept\); run it again to go on"
    ):
        fetch([server.url("data.bin")], tmp_path / "data.bin", checksum(DATA), "data")
    assert [f.name for f in tmp_path.iterdir()] == ["data.bin.part"]
    server.cuts, server.asked = [], []
    assert (
        fetch([server.url("data.bin")], tmp_path / "data.bin", checksum(DATA), "data").read_bytes()
        == DATA
    )
    assert server.asked == [("/data.bin", "bytes=70000-")]


def test_a_server_without_ranges(server, tmp_path):
    server.ranges, server.cuts = False, [70_000, 200_000]
    assert (
        fetch([server.url("data.bin")], tmp_path / "data.bin", checksum(DATA), "data").read_bytes()
        == DATA
    )


def test_a_part_that_is_whole_already(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(DATA)
    assert (
        fetch(
            [server.url("data.bin")], tmp_path / "data.bin", checksum(DATA, "sha1"), "data"
        ).read_bytes()
        == DATA
    )


@pytest.mark.parametrize(
    ("digest", "size", "why"),
    [
        ("sha256:" + "0" * 64, 0, "instead of 0000"),
        ("sha1:12", 0, "sha1"),
        ("", 299_999, "300000 bytes instead of 299999"),
    ],
)
def test_a_wrong_file_is_not_kept(server, tmp_path, digest, size, why):
    with pytest.raises(UserError, match=why):
        fetch([server.url("data.bin")], tmp_path / "data.bin", digest, "data", size)
    assert not list(tmp_path.iterdir())


def test_mirrors_and_servers_that_refuse(server, tmp_path):
    urls = [server.url("absent.bin"), "http://127.0.0.1:9/data.bin", server.url("data.bin")]
    assert fetch(urls, tmp_path / "data.bin", checksum(DATA), "data").read_bytes() == DATA
    with pytest.raises(UserError, match=r"absent\.bin \(HTTP Error 404"):
        fetch(urls[:1], tmp_path / "other.bin", "", "data")
    server.status = 503
    with pytest.raises(UserError, match="HTTP Error 503"):
        fetch(urls[2:], tmp_path / "other.bin", "", "data")
    assert len([a for a in server.asked if a[0] == "/data.bin"]) == 1 + download.TRIES
    assert [f.name for f in tmp_path.iterdir()] == ["data.bin"]


def test_a_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        fetch([server.url("data.bin")], tmp_path / "file" / "data.bin", "", "data")


# --- archives


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tgz"])
def test_unpacking_takes_what_is_missing(tmp_path, ending):
    source, folder = tmp_path / "source", tmp_path / "out"
    for name in ("top/a/1.txt", "top/a/deep/2.txt", "top/b/3.txt", "top/list.txt", "other/4.txt"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    archive = trees.pack(source, tmp_path / f"x{ending}")
    take = [("top/a", "A"), ("top/b", "deep/B"), ("top/list.txt", "list.txt")]
    folder.mkdir()
    (folder / "list.txt").write_text("mine")
    (folder / ".unpacking" / "0").mkdir(parents=True)
    (folder / ".unpacking" / "0" / "left by a kill").write_text("")
    unpack(archive, take, folder, "data")
    unpacked = {
        f.relative_to(folder).as_posix(): f.read_text() for f in folder.rglob("*") if f.is_file()
    }
    expected = {
        "A/1.txt": "top/a/1.txt",
        "A/deep/2.txt": "top/a/deep/2.txt",
        "deep/B/3.txt": "top/b/3.txt",
    }
    assert unpacked == expected | {"list.txt": "mine"}
    assert not (folder / ".unpacking").exists()
    with pytest.raises(UserError, match="contains no top/c"):
        unpack(archive, [("top/b", "B2"), ("top/c", "C")], folder, "data")
    assert not (folder / "B2").exists()


@pytest.mark.parametrize(
    ("ending", "name", "link"),
    [
        (".zip", "../outside.txt", False),
        (".zip", "{root}/outside.txt", False),
        (".tar", "../outside.txt", False),
        (".tar", "{root}/outside.txt", False),
        (".tar", "good/link", True),
        (".zip", "good/../../outside.txt", False),
        (".zip", "good\\..\\outside.txt", False),
        (".zip", "C:/outside.txt", False),
    ],
)
def test_names_that_lead_outside_are_refused(tmp_path, ending, name, link):
    archive = trees.hostile(tmp_path / f"x{ending}", name.format(root=tmp_path), link)
    with pytest.raises(UserError, match=r"leads outside|is a link") as error:
        unpack(archive, [("good", "good")], tmp_path / "in" / "out", "data")
    assert f"x{ending}" in str(error.value)
    assert not list(tmp_path.rglob("outside.txt"))
    assert not (tmp_path / "in" / "out").exists()


def test_links_that_are_not_wanted_do_no_harm(tmp_path):
    archive = trees.hostile(tmp_path / "x.tar", "elsewhere/link", link=True)
    unpack(archive, [("good", "good")], tmp_path / "out", "data")
    assert [f.name for f in tmp_path.rglob("out/**/*")] == ["good", "a.txt"]


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tgz"])
def test_cut_archives_leave_nothing(tmp_path, ending):
    source = tmp_path / "source"
    for i in range(4):
        (source / "top").mkdir(parents=True, exist_ok=True)
        (source / "top" / f"{i}.bin").write_bytes(DATA[: 5000 * i + 512])
    archive = trees.pack(source, tmp_path / f"x{ending}")
    complete = archive.read_bytes()
    lengths = [0, 10, 512, 1024, len(complete) // 2, len(complete) - 12_000, len(complete) - 12_288]
    # Between two files; in the checksum.
    lengths += [complete.find(b"top/3.bin")] if ending == ".tar" else [len(complete) - 1]
    for length in lengths:
        archive.write_bytes(complete[:length])
        with pytest.raises(UserError, match=f"x{ending} cannot be unpacked"):
            unpack(archive, [("top", "top")], tmp_path / "out", "data")
        assert not list((tmp_path / "out").rglob("*"))


def test_a_bomb_is_not_unpacked(tmp_path):
    (tmp_path / "source" / "top").mkdir(parents=True)
    (tmp_path / "source" / "top" / "zeros").write_bytes(bytes(40_000_000))
    archive = trees.pack(tmp_path / "source", tmp_path / "x.tgz")
    with pytest.raises(UserError, match="more than 50 times"):
        unpack(archive, [("top", "top")], tmp_path / "out", "data")
    assert not list((tmp_path / "out").rglob("*"))


# --- complete data sets

PACKED = {  # the archives of each data set and which top-level folders of its tree they hold
    "voc": {"VOCtrainval_11-May-2012.tar": "VOCdevkit", "benchmark.tgz": "benchmark_RELEASE"},
    "coco_stuff": {
        "train2017.zip": "coco",
        "val2017.zip": "coco",
        "stuffthingmaps_trainval2017.zip": "coco/stuffthingmaps",
    },
    "ade20k": {"ADEChallengeData2016.zip": ""},
    "pcontext": {"VOCtrainval_03-May-2010.tar": "VOCdevkit"},
    "cityscapes": {
        "leftImg8bit_trainvaltest.zip": "cityscapes",
        "gtFine_trainvaltest.zip": "cityscapes",
    },
}


def archives_of(name: str, folder: Path, source: Path) -> dict[str, bytes]:
    """A data set's official archives, small."""
    if name == "pcontext":
        trees.pcontext(source, "VOCdevkit/VOC2010")
    else:
        trees.BUILDERS[name](source)
    packed = {}
    for archive, below in PACKED[name].items():
        base, only = source, [below] if below else []
        if name in ("coco_stuff", "cityscapes"):
            base, only = (
                source / below,
                [] if "stuff" in below else [archive.split("_")[0].removesuffix(".zip")],
            )
        packed[archive] = trees.pack(base, folder / archive, *only).read_bytes()
    if name == "pcontext":
        packed["trainval_merged.json"] = (
            source / "VOCdevkit/VOC2010/trainval_merged.json"
        ).read_bytes()
    return packed


def redirected(name: str, packed: dict[str, bytes], url, keep_url: bool = True) -> object:
    """The data set's row with the sizes, checksums and addresses of the small archives."""
    rows = []
    for archive in DATASETS[name].archives:
        content = packed[archive.file]
        urls = [url(archive.file)] if archive.urls and keep_url else []
        rows.append(
            Archive(
                archive.file,
                archive.take,
                urls,
                archive.bytes and len(content),
                archive.checksum and checksum(content, archive.checksum.split(":")[0]),
            )
        )
    return dataclasses.replace(DATASETS[name], archives=rows)


def content(root: Path) -> dict[str, bytes]:
    # The statistics know when files were changed.
    return {
        f.relative_to(root).as_posix(): f.read_bytes()
        for f in root.rglob("*")
        if f.is_file() and ".zsseg" not in f.parts
    }


@pytest.mark.parametrize("name", ["voc", "coco_stuff", "ade20k", "pcontext"])
def test_a_data_set_is_downloaded_whole(name, server, tmp_path, monkeypatch, capsys):
    packed = archives_of(name, tmp_path / "archives", tmp_path / "source")
    server.files |= packed
    server.cuts = [500, 1000, 300]
    monkeypatch.setitem(DATASETS, name, redirected(name, packed, server.url))
    monkeypatch.setenv("ZSSEG_CACHE", str(tmp_path / "cache"))
    prepare_data.main([name, "--root", str(tmp_path / "root")])
    assert {f.name: f.read_bytes() for f in (tmp_path / "cache" / "downloads").iterdir()} == packed
    official = tmp_path / "official"
    trees.BUILDERS[name](official)
    prepare_data.main([name, "--root", str(official)])
    pairs, expected = (
        prepare_data.find_pairs(name, root, "val") for root in (tmp_path / "root", official)
    )
    assert [[p.name for p in pair] for pair in pairs] == [
        [p.name for p in pair] for pair in expected
    ]
    assert all(
        a.read_bytes() == b.read_bytes()
        for x, y in zip(pairs, expected, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    before, asked = content(tmp_path / "root"), len(server.asked)
    prepare_data.main([name, "--root", str(tmp_path / "root")])
    assert content(tmp_path / "root") == before and len(server.asked) == asked


def test_archives_that_the_user_brought(tmp_path, monkeypatch, capsys):
    """Cityscapes cannot be downloaded; its archives are unpacked from the data root, if they are
    the right ones.
    """
    packed = archives_of("cityscapes", tmp_path / "root", tmp_path / "source")
    monkeypatch.setitem(
        DATASETS, "cityscapes", redirected("cityscapes", packed, None, keep_url=False)
    )
    prepare_data.main(["cityscapes", "--root", str(tmp_path / "root")])
    assert "cityscapes val: 3 images" in capsys.readouterr().out
    monkeypatch.undo()
    root = tmp_path / "wrong"
    root.mkdir()
    (root / "leftImg8bit_trainvaltest.zip").write_bytes(packed["leftImg8bit_trainvaltest.zip"])
    fails(
        capsys,
        monkeypatch,
        prepare_data.main,
        ["cityscapes", "--root", root],
        "leftImg8bit_trainvaltest.zip",
        "sha1",
    )
    # The user's file is not deleted.
    assert [f.name for f in root.iterdir()] == ["leftImg8bit_trainvaltest.zip"]


@pytest.mark.parametrize("harm", ["gone", "cut", "truncated", "hostile", "wrong"])
def test_what_goes_wrong_is_one_line(harm, server, tmp_path, monkeypatch, capsys):
    packed = archives_of("ade20k", tmp_path / "archives", tmp_path / "source")
    file = "ADEChallengeData2016.zip"
    if harm == "hostile":
        packed[file] = trees.hostile(tmp_path / "x.zip", "../../owned").read_bytes()
    if harm == "truncated":
        packed[file] = packed[file][:-500]
    row = redirected("ade20k", packed, server.url)
    if harm == "wrong":
        packed[file] = packed[file][:-1] + b"?"
    server.files |= {} if harm == "gone" else packed
    server.cuts = 20 * [0] if harm == "cut" else []
    monkeypatch.setitem(DATASETS, "ade20k", row)
    monkeypatch.setenv("ZSSEG_CACHE", str(tmp_path / "cache"))
    parts = {
        "gone": ["404", "put the file at"],
        "cut": ["the transfer was cut", "run it again"],
        "wrong": ["sha256", "deleted"],
        "truncated": ["cannot be unpacked", "delete it"],
        "hostile": ["leads outside"],
    }[harm]
    fails(
        capsys,
        monkeypatch,
        prepare_data.main,
        ["ade20k", "--root", tmp_path / "root"],
        file,
        *parts,
    )
    assert not content(tmp_path / "root") and not (tmp_path / "owned").exists()


# --- kills


def run_and_kill(arguments: list[str], moment: str) -> int:
    """prepare_data in a forked process that kills itself (SIGKILL) at its first step of a kind;
    returns how it ended.

    "after": a file or folder has just got its final name; "before": it is about to; "within": half
    of an image is written.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

        def dying(real, when: str):
            def call(*args, **kwargs):
                if moment == "before" == when:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = real(*args, **kwargs)
                if moment == "within" and when == "within":
                    path = Path(args[1])
                    os.truncate(path, path.stat().st_size // 2)
                if (
                    moment in ("after", "within")
                    and when == {"after": "before", "within": "within"}[moment]
                ):
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

        os.replace, Path.rename = dying(os.replace, "before"), dying(Path.rename, "before")
        Image.Image.save = dying(Image.Image.save, "within")
        prepare_data.main(arguments)
        os._exit(0)
    except BaseException:
        os._exit(9)


@pytest.mark.parametrize("name", ["voc", "pcontext", "ade20k_full"])
def test_killed_at_every_step_and_repeated_gives_the_same_bytes(name, tmp_path, monkeypatch):
    """From the archives on: killed after each single rename, and before and within many of them."""
    complete, killed = tmp_path / "complete", tmp_path / "killed"
    if name == "ade20k_full":
        for root in (complete, killed):
            trees.ade20k_full(root)
    else:
        packed = archives_of(name, tmp_path / "archives", tmp_path / "source")
        monkeypatch.setitem(DATASETS, name, redirected(name, packed, None, keep_url=False))
        for root in (complete, killed):
            root.mkdir()
            for file, data in packed.items():
                (root / file).write_bytes(data)
    assert run_and_kill([name, "--workers", "1", "--root", str(complete)], "never") == 0
    arguments, kills = [name, "--workers", "2", "--root", str(killed)], 0
    for moments in 40 * [("before", "after"), ("within", "after")]:
        statuses = [run_and_kill(arguments, moment) for moment in moments]
        kills += statuses.count(signal.SIGKILL)
        if statuses[-1] == 0:
            break
        assert statuses[-1] == signal.SIGKILL
    assert kills >= 4 and content(killed) == content(complete)


def test_processes_that_want_the_same_file_wait_for_one_another(server, tmp_path):
    """Four at once, as torchrun starts them: one download, one complete file."""
    server.cuts = [1000, 70_000]
    children = []
    for _ in range(4):
        children.append(os.fork())
        if not children[-1]:
            try:
                fetch(
                    [server.url("data.bin")],
                    tmp_path / "cache" / "data.bin",
                    checksum(DATA),
                    "data",
                )
                os._exit(0)
            except BaseException:
                os._exit(1)
    assert [os.waitpid(child, 0)[1] for child in children] == 4 * [0]
    assert (tmp_path / "cache" / "data.bin").read_bytes() == DATA and len(server.asked) == 3
    assert [f.name for f in (tmp_path / "cache").iterdir()] == ["data.bin"]


def test_a_full_disk_is_not_the_network_s_fault(server, tmp_path):
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            fetch([server.url("data.bin")], tmp_path / "data.bin", checksum(DATA), "data")
        except UserError as error:
            os._exit(7 if "data.bin.part (File too large)" in str(error) else 1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 7 << 8
    assert len(server.asked) == 1
