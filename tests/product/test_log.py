"""The log of training: metrics.jsonl, wandb's files read back, networks that die, resumed runs,
what the terminal shows.
"""

import json
import math
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROCESS, ROOT, command, fails_in_one_line, tiny_config
from PIL import Image

from zsseg import checkpoint, utils
from zsseg.datasets import dataset, find_pairs
from zsseg.images import read_values
from zsseg.log import Log, Speed, scalars

WORDS = ["--config", "configs/shapes.toml", "--device", "cpu"]
for setting in (
    "train.batch_size=4",
    "train.steps=6",
    "train.checkpoint_every=4",
    "train.eval_every=2",
    "log.every=1",
    "data.workers=0",
    "data.crop=64",
    "data.short_edges=[64]",
    "data.test_short_edge=64",
    "model.queries=8",
    "model.decoder_layers=3",
    "train.backbone_lr=0.1",
    "eval.compare=false",
):
    WORDS += ["--set", setting]
LAYERS = {f"{k}/layer_{i}" for k in ("class", "focal", "dice") for i in (0, 1)}
NOWHERE = "http://127.0.0.1:9"  # refuses


def environment(home: Path, **more: str) -> dict[str, str]:
    """wandb has a login and little patience, and a home of its own."""
    return {
        "HOME": str(home),
        "WANDB_API_KEY": 40 * "a",
        "WANDB_BASE_URL": NOWHERE,
        "WANDB_INIT_TIMEOUT": "1",
        "WANDB_FINISH_TIMEOUT": "2",
        "WANDB__DISABLE_VIEWER": "true",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def lines(out: Path) -> list[dict]:
    return [
        json.loads(line, parse_constant=pytest.fail)
        for line in (out / "metrics.jsonl").read_text().splitlines()
    ]


def records(folder: Path) -> Iterator:
    """What a run's .wandb file holds: a log as LevelDB's, in blocks of 32 KiB, of protobuf
    records.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    [file] = folder.glob("*.wandb")
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 < len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, record_type = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if record_type in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def history(folder: Path) -> list[dict]:
    """The rows of a run's history; what is in a table's or image's entry as {(its key, key in
    it): value}.
    """
    rows = [record.history.item for record in records(folder) if record.HasField("history")]
    name = lambda item: (
        item.key or (item.nested_key[0] if len(item.nested_key) == 1 else tuple(item.nested_key))
    )
    return [{name(item): json.loads(item.value_json) for item in row} for row in rows]


def altered(tmp_path: Path, what: str, first: str = "") -> Path:
    """A script that trains, but does `first` at its start and `what` before step `n` (from 0)."""
    script = tmp_path / "altered.py"
    script.write_text(f"""
import itertools, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
{first}
import train
real, count = train.train_step, itertools.count()
def step(*arguments):
    n = next(count)
    {what}
    return real(*arguments)
train.train_step = step
train.command_line.command(train.main)
""")
    return script


# --- offline


@pytest.fixture(scope="module")
def offline(shapes_root, tmp_path_factory) -> tuple[Path, str, str]:
    """A run without a network that fails before step 6, after the checkpoint of step 4, and is then
    resumed; what both said.
    """
    pytest.importorskip("wandb")
    out, home = tmp_path_factory.mktemp("offline"), tmp_path_factory.mktemp("home")
    script = altered(home, "assert n < 5")
    words = [*WORDS, "--root", shapes_root, "--out", out, "--set", "log.wandb=online"]
    words += ["--set", "data.test_short_edge=96"]  # the images' own
    first = command(script, *words, env=environment(home))
    assert first.returncode == 1 and "AssertionError" in first.stderr
    assert [line["step"] for line in lines(out) if "loss" in line] == [1, 2, 3, 4, 5]
    second = command(
        "train.py", *words, "--resume", "--set", "log.wandb=offline", env=environment(home)
    )
    assert second.returncode == 0, second.stderr
    return out, first.stdout, second.stdout


def offline_runs(out: Path) -> list[Path]:
    return sorted((out / "wandb").glob("offline-run-*"))


@pytest.mark.slow
def test_a_run_without_a_network_is_logged_offline(offline):
    out, said, _ = offline
    [line] = [line for line in said.splitlines() if line.startswith("wandb: ")]
    assert (
        "cannot go online (" in line
        and f"logging offline (later: wandb sync {offline_runs(out)[0]})" in line
    )


def test_wandb_gets_the_configuration_and_every_number_once(offline):
    """A resumed run has the same id; the step that it repeats is not logged again."""
    out, *_ = offline
    first, second = map(history, offline_runs(out))
    assert [row["_step"] for row in first] == [1, 2, 3, 4, 5] and [
        row["_step"] for row in second
    ] == [6]
    ids = [
        record.run.run_id
        for run_folder in offline_runs(out)
        for record in records(run_folder)
        if record.HasField("run")
    ]
    assert set(ids) == {checkpoint.load(out / "last.pt")["wandb"]}
    [started, *_] = [
        record.run for record in records(offline_runs(out)[0]) if record.HasField("run")
    ]
    config = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert (
        config["train"]["steps"] == 6
        and config["log"]["wandb"] == "online"
        and started.project == "zsseg"
    )
    rows = {row["_step"]: row for row in first + second}
    for line in lines(out):
        for key, value in scalars(line).items():
            # At another pace.
            repeated = line["step"] in (4, 5) and (
                "images_per_second" in key or key.startswith("speed/")
            )
            assert (
                key == "step"
                or repeated
                or rows[line["step"]][key] == pytest.approx(value, rel=1e-9)
            ), key


def test_a_step_is_logged_in_full(offline):
    out, *_ = offline
    steps = [line for line in lines(out) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        assert line.keys() == {
            "step",
            "loss",
            "class",
            "focal",
            "dice",
            *LAYERS,
            "grad_norm",
            "lr",
            "lr_backbone",
            "speed/images_per_second",
            "speed/data_wait",
            "speed/memory_gib",
        }
        parts = sum(v for k, v in line.items() if k.partition("/")[0] in ("class", "focal", "dice"))
        assert line["loss"] == pytest.approx(parts, rel=1e-5) and line[
            "lr_backbone"
        ] == pytest.approx(0.1 * line["lr"])
        assert 0 < line["speed/data_wait"] < 100 and 0 < line["speed/images_per_second"] < 1e4
        assert 0.1 < line["speed/memory_gib"] < 16
    assert steps[0]["lr"] > steps[-1]["lr"]


def test_evaluations_are_logged_in_full(offline):
    """On the way as at the end: all metrics in metrics.jsonl, in wandb a table of the classes,
    too.
    """
    out, *_ = offline
    result = {
        k: v for k, v in json.loads((out / "metrics.json").read_text()).items() if k != "program"
    }
    by_split = {
        f"{split}/mIoU_unseen": line
        for line in lines(out)
        for split in ("val", "test")
        if f"{split}/mIoU" in line
    }
    assert {k: v for k, v in lines(out)[-1].items() if k != "step"} == {
        f"test/{k}": v for k, v in result.items()
    }
    assert by_split["val/mIoU_unseen"].keys() == {
        k.replace("test/", "val/") for k in by_split["test/mIoU_unseen"]
    }
    assert [line["step"] for line in lines(out) if "val/hIoU" in line] == [2, 4]
    [row] = [row for row in history(offline_runs(out)[0]) if row["_step"] == 4]
    assert not any("per_class/" in key for key in row)
    table = json.loads(
        (offline_runs(out)[0] / "files" / row["val/per_class_table", "path"]).read_text()
    )
    data, classes = dataset("shapes"), by_split["val/mIoU_unseen"]["val/per_class"]
    assert table["columns"] == ["class", "seen", "IoU", "Acc"] and len(classes) == 25
    expected = [
        [name, i in data.seen, classes[name]["IoU"], classes[name]["Acc"]]
        for i, name in enumerate(data.names)
    ]
    assert (
        table["data"] == expected
        and any(row[2] is None for row in expected)
        and any(row[2] is not None for row in expected)
    )


def test_images_with_masks(offline, shapes_root):
    """The same ones each time: the photo, its prediction and its ground truth, with the classes'
    names.
    """
    out, *_ = offline
    folder, rows = (
        offline_runs(out)[0] / "files",
        {row["_step"]: row for row in history(offline_runs(out)[0])},
    )
    pairs, data, read = (
        find_pairs("shapes", shapes_root, "val"),
        dataset("shapes"),
        lambda path: np.asarray(Image.open(path)),
    )
    for step in (2, 4):
        entry = {key[1]: value for key, value in rows[step].items() if key[0] == "val/predictions"}
        assert entry["captions"] == [label.stem for _, label in pairs]
        for (image, label), name, masks in zip(
            pairs, entry["filenames"], entry["all_masks"], strict=True
        ):
            photo, values = read(folder / name), read_values(label, 8)
            assert np.abs(photo.astype(int) - read(image)).max() <= 1
            ground_truth, prediction = (
                read(folder / masks[title]["path"]) for title in ("ground_truth", "prediction")
            )
            assert np.array_equal(ground_truth, np.where(values == data.ignore, 25, values))
            assert prediction.shape == ground_truth.shape and prediction.max() < 25
    update = [
        item.value_json
        for record in records(offline_runs(out)[0])
        if record.HasField("config")
        for item in record.config.update
        if item.key == "_wandb"
    ][-1]
    for title in ("ground_truth", "prediction"):
        classes = json.loads(update)["mask/class_labels"][
            f"val/predictions_wandb_delimeter_{title}"
        ]["value"]
        assert classes == {str(i): name for i, name in enumerate([*data.names, "ignored"])}


def test_large_images_and_many_classes_are_made_to_fit(tmp_path):
    wandb = pytest.importorskip("wandb")
    log = Log(tmp_path, PROCESS, tiny_config("data.name=ade20k_full"))
    log.wandb = wandb  # whatever it is, it is there
    torch.manual_seed(0)
    for size in ((1000, 2000), (640, 320)):
        labels = torch.randint(0, 847, (size[0] // 2, size[1] // 2))
        labels[:9] = log.data.ignore
        for number in range(5):
            log.on_image(
                number,
                f"p{number}",
                torch.randint(0, 256, (3, *size), dtype=torch.uint8),
                labels,
                labels,
                None,
            )
    assert [maps.shape for _, maps in log.images] == 5 * [(5, 256, 512)] + 3 * [(5, 512, 256)]
    table = log.table({name: {"IoU": 1.0, "Acc": None} for name in log.data.names})
    # No split.
    assert table.columns == ["class", "IoU", "Acc"] and table.data[846][1:] == [1.0, None]
    for image in log.wandb_images():
        masks = [np.asarray(Image.open(mask._path)) for mask in image._masks.values()]
        assert image.image.size == (512, 512) and all(mask.shape == (512, 512) for mask in masks)
        assert masks[0].max() == 255 and len(np.unique(masks[0])) == 256


# --- networks and wandb itself that fail


class Server(ThreadingHTTPServer):
    """As much of wandb's server as a run needs; once it is `dead` it takes requests and never
    answers.
    """

    daemon_threads, request_queue_size = True, 100

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.dead, self.over, self.rows = False, threading.Event(), []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        pass  # a client that has gone


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body, logged = (
            self.rfile.read(int(self.headers.get("Content-Length") or 0)),
            self.server.rows,
        )
        if self.path == "/die":
            self.server.dead = True
        elif self.server.dead:
            self.server.over.wait()
        query = json.loads(body) if self.path == "/graphql" else {"query": "", "variables": {}}
        words, asked = (
            query.get("variables") or {},
            re.findall(r"(?:query|mutation) (\w+)", query["query"]),
        )
        if self.path.endswith("file_stream"):
            part = (
                json.loads(body)
                .get("files", {})
                .get("wandb-history.jsonl", {"offset": len(logged), "content": []})
            )
            logged[part["offset"] :] = part["content"]
        project = {"id": "p", "name": "zsseg", "entity": {"id": "e", "name": "me"}}
        bucket = {
            "id": "b",
            "name": words.get("name"),
            "displayName": "d",
            "config": "{}",
            "project": project,
            "tags": [],
            "historyLineCount": len(logged),
            "historyTail": json.dumps(logged[-1:]),
            "summaryMetrics": "{}",
            "logLineCount": 0,
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "wandbConfig": '{"t": 1}',
        }
        files = [
            {"name": name, "uploadUrl": f"{self.server.url}/{name}"}
            for name in words.get("files") or []
        ]
        answers = {
            "Viewer": {
                "viewer": {
                    "id": "u",
                    "entity": "me",
                    "username": "me",
                    "flags": "{}",
                    "teams": {"edges": []},
                }
            },
            "RunResumeStatus": {"model": project | {"bucket": bucket if logged else None}},
            "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": not logged}},
            "CreateRunFiles": {
                "createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}
            },
        }
        answer = json.dumps({"data": answers.get(*asked, {})} if asked else {}).encode()
        self.send_response(200 if not asked or asked[0] in answers else 400)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_PUT = do_POST  # of files


@pytest.fixture
def server() -> Iterator[Server]:
    pytest.importorskip("wandb")
    server = Server()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_resumed_run_goes_on_online(server, shapes_root, tmp_path):
    """Every step once, in order, where the server has seen steps that the resumed run repeats; then
    the network dies.
    """
    words = [*WORDS, "--root", shapes_root, "--out", tmp_path / "run", "--set", "log.wandb=online"]
    env = environment(
        tmp_path, WANDB_BASE_URL=server.url, WANDB_INIT_TIMEOUT="10", WANDB_FINISH_TIMEOUT="10"
    )
    first = command(altered(tmp_path, "assert n < 5"), *words, env=env)
    assert first.returncode == 1 and [json.loads(row)["_step"] for row in server.rows] == [
        1,
        2,
        3,
        4,
        5,
    ]
    second = command("train.py", *words, "--resume", env=env)
    assert second.returncode == 0 and "offline" not in second.stdout, second.stderr
    rows = [json.loads(row) for row in server.rows]
    assert (
        [row["_step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        and "test/hIoU" in rows[-1]
        and rows[-1].keys() > LAYERS
    )


@pytest.mark.slow
def test_a_network_that_dies_on_the_way_does_not_stop_the_run(server, shapes_root, tmp_path):
    script = altered(
        tmp_path,
        f"n == 2 and __import__('urllib.request').request.urlopen('{server.url}/die', b'', 5)",
    )
    words = [*WORDS, "--root", shapes_root, "--out", tmp_path / "run", "--set", "log.wandb=online"]
    started = time.monotonic()
    env = environment(
        tmp_path, WANDB_BASE_URL=server.url, WANDB_INIT_TIMEOUT="10", WANDB_HTTP_TIMEOUT="1"
    )
    result = command(script, *words, env=env)
    assert result.returncode == 0 and server.dead and time.monotonic() - started < 30, result.stderr
    [folder] = (tmp_path / "run" / "wandb").glob("run-*")
    steps = [line["step"] for line in lines(tmp_path / "run") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6] == [row["_step"] for row in history(folder)]


@pytest.mark.slow
def test_a_network_that_never_answers(shapes_root, tmp_path):
    pytest.importorskip("wandb")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        env = environment(tmp_path, WANDB_BASE_URL=f"http://127.0.0.1:{silent.getsockname()[1]}")
        words = [
            *WORDS,
            "--root",
            shapes_root,
            "--out",
            tmp_path / "run",
            "--set",
            "log.wandb=online",
        ]
        started = time.monotonic()
        result = command("train.py", *words, "--set", "train.steps=1", env=env)
    assert result.returncode == 0 and time.monotonic() - started < 30, result.stderr
    assert "wandb: cannot go online" in result.stdout
    assert [row["_step"] for row in history(offline_runs(tmp_path / "run")[0])] == [1]


@pytest.mark.slow
def test_without_a_login_a_run_is_logged_offline(shapes_root, tmp_path):
    pytest.importorskip("wandb")
    words = [
        *WORDS,
        "--root",
        shapes_root,
        "--out",
        tmp_path / "run",
        "--set",
        "log.wandb=online",
        "--set",
        "train.steps=1",
    ]
    result = command("train.py", *words, env=environment(tmp_path, WANDB_API_KEY=""))
    assert (
        result.returncode == 0
        and "wandb: no login (wandb login), logging offline (later: wandb sync" in result.stdout
    )
    assert (
        checkpoint.load(tmp_path / "run" / "last.pt")["wandb"]
        in offline_runs(tmp_path / "run")[0].name
    )


@pytest.mark.slow
def test_a_run_goes_on_without_wandb_where_that_breaks(shapes_root, tmp_path):
    """Its service is killed."""
    pytest.importorskip("wandb")
    kill = (
        "n == 2 and [os.kill(int(p), signal.SIGKILL) for p in "
        "open(f'/proc/{os.getpid()}/task/{os.getpid()}/children')"
        ".read().split() if 'wandb-core' in open(f'/proc/{p}/comm').read()] and "
        "__import__('time').sleep(0.5)"
    )
    words = [*WORDS, "--root", shapes_root, "--out", tmp_path / "run", "--set", "log.wandb=offline"]
    result = command(altered(tmp_path, kill), *words, env=environment(tmp_path))
    assert result.returncode == 0 and result.stdout.count("going on without wandb") == 1, (
        result.stdout + result.stderr
    )
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_wandb_may_be_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    Log(tmp_path, PROCESS, tiny_config("log.wandb=disabled")).evaluation(
        1, "val", {"mIoU": 1.0, "per_class": {}}
    )
    with pytest.raises(
        utils.UserError, match=r"log.wandb: wandb is not installed; pip install wandb"
    ):
        Log(tmp_path, PROCESS, tiny_config("log.wandb=offline"))


def test_where_wandb_cannot_begin_the_user_is_told(shapes_root, tmp_path):
    pytest.importorskip("wandb")
    words = [
        *WORDS,
        "--root",
        shapes_root,
        "--out",
        tmp_path,
        "--set",
        "log.wandb=offline",
        "--set",
        "log.project=a/b",
    ]
    fails_in_one_line(
        command("train.py", *words, env=environment(tmp_path, WANDB_SILENT="true")),
        "log.wandb",
        "project",
    )


# --- metrics.jsonl and the terminal


def test_only_finite_numbers_are_logged_and_junk_is_forgotten(tmp_path):
    log = Log(tmp_path, PROCESS, tiny_config())
    log.write(1, loss=1.0, parts={"a": 2})
    log.write(2, loss=math.nan)
    log.write(2, loss=1.0, parts={"a": {"b": math.inf}})
    log.write(3, skipped=1, images=["a.jpg"])
    assert lines(tmp_path) == [
        {"step": 1, "loss": 1.0, "parts": {"a": 2}},
        {"step": 3, "skipped": 1, "images": ["a.jpg"]},
    ]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(
            '[1]\n7\n{"step": "x"}\n{"loss": 2}\n{"step": 3, "val/mIoU": 1.0}\n{"step": 4, "loss": 1}\n{"step": 1, "lo'
        )
    Log(tmp_path, PROCESS, tiny_config(), 3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]


def test_speed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    speed, pass_time = Speed(PROCESS, 32, 10), lambda seconds: now.__setitem__(0, now[0] + seconds)
    batches = speed.timed(pass_time(1.0) or n for n in range(4))
    for _ in range(2):
        next(batches)
        pass_time(3.0)
    with speed.paused():
        pass_time(100.0)
    values = speed.read(12)
    assert (
        values["speed/images_per_second"] == 8
        and values["speed/data_wait"] == 25
        and speed.left(20) == 108 / 2 * 8
    )
    next(batches)
    assert speed.read(13)["speed/data_wait"] == 100


def test_plain_lines_tell_the_time_left(offline):
    *_, said = offline
    assert (
        len(
            re.findall(
                r"^segment step 6/6 loss \d+\.\d{3}, \d+\.\d images/s, 0:00 left$", said, re.M
            )
        )
        == 1
    )
    assert len(re.findall(r"^evaluate test 4/4, \d+\.\d/s, 0:00 left$", said, re.M)) == 1
    assert [utils.format_time(s) for s in (0.4, 21.6, 192, 3599.6, 36723)] == [
        "0:00",
        "0:22",
        "3:12",
        "1:00:00",
        "10:12:03",
    ]


def test_a_terminal_shows_a_bar_and_nothing_wants_wandb(shapes_root, tmp_path):
    script = altered(
        tmp_path, "pass", "sys.modules['wandb'] = None; sys.stderr.isatty = lambda: True"
    )
    result = command(
        script, *WORDS, "--root", shapes_root, "--out", tmp_path / "run", env=environment(tmp_path)
    )
    assert result.returncode == 0 and "segment step" not in result.stdout, result.stderr
    assert re.search(r"segment: 100%.* 6/6 \[.*loss \d+\.\d{3}, \d+\.\d images/s\]", result.stderr)
    assert "evaluate test: 100%" in result.stderr
