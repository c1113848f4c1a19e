"""Published models by name, from a server on this machine that answers as Google Drive does."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import trees
from conftest import ROOT, command, fails_in_one_line, keys, original_state
from PIL import Image

import eval as evaluation
import prepare_data
import zsseg
from zsseg import models
from zsseg.prepare import shapes
from zsseg.build import start_from
from zsseg.config import load_config
from zsseg.models import DRIVE, MODELS, find_model
from zsseg.segmenter import Segmenter
from zsseg.utils import UserError, cache_dir
from zsseg.weights import import_original

PAGES = {
    "confirmation": b"<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title></html>",
    "quota": b"<html><title>Google Drive - Quota exceeded</title>Too many users ... Sign in</html>",
    "login": b"\n <!doctype html><title>Sign in - Google Accounts</title>",
}


class Drive:
    """Serves one file; `page`: an HTML page in its place; `cut`: bytes after which the next answer
    ends; `kind`: the page's content type.
    """

    def __init__(self, content: bytes):
        self.content, self.page, self.cut, self.kind = content, b"", 0, "text/html; charset=utf-8"
        self.starts = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                given = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
                start = int(given[1]) if given and not outer.page else 0
                outer.starts.append(start)
                body = outer.page or outer.content[start:]
                self.send_response(206 if start else 200)
                kind = outer.kind if outer.page else "application/octet-stream"
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: outer.cut or None])
                if outer.cut:
                    outer.cut, outer.page = 0, PAGES["quota"]

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/download?id={{}}&confirm=t"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def served(monkeypatch, tmp_path, content: bytes, checksum: str = "") -> Drive:
    """A drive with `content` as ovseg-r101c, and an empty cache."""
    drive = Drive(content)
    monkeypatch.setattr(models, "DRIVE", drive.url)
    monkeypatch.setenv("ZSSEG_CACHE", str(tmp_path / "cache"))
    checksum = checksum or f"md5:{hashlib.md5(content).hexdigest()[:6]}"
    monkeypatch.setitem(MODELS["ovseg-r101c"], "checksum", checksum)
    return drive


def test_the_table_is_whole():
    assert set(MODELS) == {"zsseg-coco-vild", "zsseg-coco-learned", "ovseg-swinb", "ovseg-r101c"}
    for model in MODELS.values():
        load_config(str(ROOT / "configs" / f"{model['config']}.toml"))
        assert model["licence"] and model["trained_on"]
    ids = [model["drive"] for model in MODELS.values()]
    assert len({*ids}) == 4 and all(len(one) == 33 for one in ids)
    assert DRIVE.format("X").endswith("/download?id=X&export=download&confirm=t")


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream"])
def test_a_web_page_is_never_saved_as_weights(page, kind, monkeypatch, tmp_path):
    drive = served(monkeypatch, tmp_path, b"PK weights")
    drive.page, drive.kind = PAGES[page], kind
    with pytest.raises(UserError) as error:
        find_model("ovseg-r101c")
    text, file = str(error.value), tmp_path / "cache" / MODELS["ovseg-r101c"]["file"]
    assert page in text and "\n" not in text
    assert f"open that link in a browser, and put the file at {file}" in text
    assert drive.url.format(MODELS["ovseg-r101c"]["drive"]) in text
    assert not [*(tmp_path / "cache").iterdir()]
    file.write_bytes(b"PK weights")  # as it says
    assert find_model("ovseg-r101c")[0] == file and len(drive.starts) == 1


def test_a_download_goes_on_where_it_was_cut(monkeypatch, tmp_path):
    """Also when the quota ended in between."""
    content = bytes(range(256)) * 400
    drive = served(monkeypatch, tmp_path, content)
    drive.cut = 30_000
    with pytest.raises(UserError, match="quota"):
        find_model("ovseg-r101c")
    part = tmp_path / "cache" / (MODELS["ovseg-r101c"]["file"] + ".part")
    assert part.read_bytes() == content[:30_000]
    drive.page, drive.starts = b"", []
    path, config = find_model("ovseg-r101c")
    assert path.read_bytes() == content and drive.starts == [30_000] and not part.exists()
    assert config.endswith("ovseg_r101c_ade20k.toml")


def test_a_wrong_file_is_refused(monkeypatch, tmp_path):
    served(monkeypatch, tmp_path, b"PK other weights", "md5:c746f4")
    with pytest.raises(UserError, match=r"instead of c746f4.*deleted"):
        find_model("ovseg-r101c")
    assert not [*(tmp_path / "cache").iterdir()]


def test_no_network(monkeypatch, tmp_path):
    drive = served(monkeypatch, tmp_path, b"PK")
    drive.server.shutdown()
    drive.server.server_close()
    with pytest.raises(UserError, match=r"cannot download .*put the file at .*\.pth"):
        find_model("ovseg-r101c")


def test_names_that_are_none(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for what, call in (
        ("checkpoint ovseg-swinl", lambda: zsseg.load("ovseg-swinl")),
        ("train.init ovseg-swinl", lambda: find_model("ovseg-swinl", "train.init")),
    ):
        with pytest.raises(UserError, match=what) as error:
            call()
        assert all(name in str(error.value) for name in MODELS)
    assert find_model("runs/last.pt")[1] is find_model("last.pt")[1] is None
    (tmp_path / "ovseg-swinb").mkdir()
    assert find_model("ovseg-swinb")[1] is None
    with pytest.raises(SystemExit):
        evaluation.parse(["--help"])
    text = "".join(capsys.readouterr().out.split())
    assert all(name in text for name in MODELS)


def test_a_wrong_name_is_one_line():
    fails_in_one_line(command("eval.py", "ovseg-swinl"), "checkpoint ovseg-swinl", *MODELS)


@pytest.mark.usefixtures("vocabulary")
def test_a_photo_and_words(monkeypatch, tmp_path, capsys):
    """By name alone, the configuration included: on the command line, in Python, in train.init."""
    names = keys("keys_coco_r101c_tinyclip.json")
    torch.save({"model": original_state(names)}, tmp_path / "weights.pth")
    drive = served(monkeypatch, tmp_path, (tmp_path / "weights.pth").read_bytes())
    monkeypatch.chdir(tmp_path)
    Image.fromarray(shapes.draw("test", 5)[0]).save("photo.jpg")
    settings = ["data.test_short_edge=64", "model.bf16=off"]
    evaluation.main(
        ["ovseg-r101c", "--images", "photo.jpg", "--classes", "cat, sofa", "--device", "cpu"]
        + [word for setting in settings for word in ("--set", setting)]
    )
    text = capsys.readouterr().out
    assert "CC BY-NC 4.0" in text and "171 classes" in text
    labels = Image.open(tmp_path / "runs" / "ovseg-r101c" / "segmented" / "photo.png")
    predictor = zsseg.load("ovseg-r101c", device="cpu", settings=settings)
    assert predictor.config.clip.ensemble_weight == 0.7 and len(drive.starts) == 1
    predictor.set_classes(["cat", "sofa"])
    assert (predictor("photo.jpg") == labels).all() and not predictor.segmenter.seen.any()
    assert cache_dir() == tmp_path / "cache"


@pytest.mark.usefixtures("vocabulary")
def test_measured_beside_the_published_row(monkeypatch, tmp_path, capsys):
    """By name alone it is ADE20K's; the settings that differ are named."""
    names = keys("keys_coco_r101c_tinyclip.json")
    torch.save({"model": original_state(names)}, tmp_path / "weights.pth")
    served(monkeypatch, tmp_path, (tmp_path / "weights.pth").read_bytes())
    monkeypatch.chdir(tmp_path)
    trees.ade20k(tmp_path)
    prepare_data.main(["ade20k", "--root", str(tmp_path)])
    settings = ["--set", "data.test_short_edge=64", "--set", "data.max_size=64"]
    words = ["ovseg-r101c", "--root", str(tmp_path), "--device", "cpu", "--reproduce", *settings]
    evaluation.main(words)
    text = capsys.readouterr().out
    assert "OVSeg, R101c -> ADE20K-150 (configs/ovseg_r101c_ade20k.toml)" in text
    assert re.search(r"the paper +24\.8\n", text)
    assert "data.test_short_edge: 64 (512)" in text
    result = json.loads((tmp_path / "runs" / "ovseg-r101c" / "eval" / "metrics.json").read_text())
    assert len(result["per_class"]) == 150


@pytest.mark.usefixtures("vocabulary")
def test_training_starts_from_a_published_model(monkeypatch, tmp_path, capsys):
    names = keys("keys_coco_r101c_tinyclip.json")
    state = original_state(names)
    torch.save({"model": state}, tmp_path / "weights.pth")
    served(monkeypatch, tmp_path, (tmp_path / "weights.pth").read_bytes())
    config = load_config(
        str(ROOT / "configs" / "ovseg_r101c.toml"), ["train.init=ovseg-r101c", "model.weights="]
    )
    clip = import_original(state, "reference")[0]["clip"]
    segmenter = Segmenter(config, clip)
    start_from(segmenter, config.train.init, {})
    expected = state["sem_seg_head.predictor.query_embed.weight"]
    assert torch.equal(segmenter.maskformer.query_embed.weight, expected)
    assert "train.init ovseg-r101c" in capsys.readouterr().out
