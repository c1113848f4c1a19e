"""Published models by name, from a server on this machine in the place of Google Drive."""

import hashlib
import re

import pytest
import torch
from conftest import ROOT, keys, original_state, succeed, tiny_config
from PIL import Image
from test_download import Server, server  # noqa: F401  a fixture

import zsseg
from zsseg import weights
from zsseg.config import load_config
from zsseg.prepare import shapes
from zsseg.utils import UserError
from zsseg.weights import DRIVE, PUBLISHED, build_segmenter, find_model


@pytest.fixture
def drive(server, monkeypatch, tmp_path) -> Server:  # noqa: F811
    """A drive with stand-in weights as ovseg-r101c, and an empty cache."""
    state = original_state(keys("keys_coco_r101c_tinyclip.json"))
    torch.save({"model": state}, tmp_path / "weights.pth")
    content = (tmp_path / "weights.pth").read_bytes()
    server.files = {"model?id=" + PUBLISHED["ovseg-r101c"]["drive"]: content}
    monkeypatch.setattr(weights, "DRIVE", server.url("model?id={}"))
    monkeypatch.setenv("ZSSEG_CACHE", str(tmp_path / "cache"))
    checksum = f"md5:{hashlib.md5(content).hexdigest()[:6]}"
    monkeypatch.setitem(PUBLISHED["ovseg-r101c"], "checksum", checksum)
    monkeypatch.chdir(tmp_path)
    return server


def test_the_table_is_whole():
    assert {*PUBLISHED} == {"zsseg-coco-vild", "zsseg-coco-learned", "ovseg-swinb", "ovseg-r101c"}
    for model in PUBLISHED.values():
        load_config(ROOT / "configs" / f"{model['config']}.toml")
        assert model["licence"] and model["trained_on"] and len(model["drive"]) == 33
    assert DRIVE.format("X").endswith("/download?id=X&export=download&confirm=t")


def test_a_model_is_downloaded_once(drive, tmp_path, capsys):
    file = tmp_path / "cache" / PUBLISHED["ovseg-r101c"]["file"]
    path, config = find_model("ovseg-r101c")
    assert path == file and config.name == "ovseg_r101c.toml"
    assert file.read_bytes() == (tmp_path / "weights.pth").read_bytes()
    count = len(drive.asked)
    assert find_model("ovseg-r101c")[0] == file and len(drive.asked) == count
    assert "CC BY-NC 4.0" in capsys.readouterr().out
    file.write_bytes(b"PK other weights")
    with pytest.raises(UserError, match=rf"md5 .*replace {re.escape(str(file))}"):
        find_model("ovseg-r101c")


def test_names_that_are_none(monkeypatch, tmp_path, shapes_root):
    monkeypatch.chdir(tmp_path)
    loads = {
        "checkpoint": lambda name: zsseg.load(name),
        "train.init": lambda name: build_segmenter(tiny_config(f"train.init={name}"), shapes_root),
    }
    for what, load in loads.items():
        with pytest.raises(UserError, match=f"{what} ovseg-swinl: no such file") as error:
            load("ovseg-swinl")
        assert all(name in str(error.value) for name in PUBLISHED)
    (tmp_path / "ovseg-swinb").mkdir()  # a file or folder comes first
    assert find_model("ovseg-swinb")[1] is find_model("-")[1] is find_model("last.pt")[1] is None


@pytest.mark.usefixtures("vocabulary")
def test_a_photo_and_words(drive, tmp_path):
    """By name alone, the configuration included: on the command line and in Python."""
    Image.fromarray(shapes.draw("test", 5)[0]).save("photo.jpg")
    settings = ["data.test_short_edge=64", "model.bf16=off"]
    words = ["eval.py", "ovseg-r101c", "--images", tmp_path / "photo.jpg"]
    words += ["--classes", "cat, sofa", "--device", "cpu", "--out", tmp_path / "out"]
    done = succeed(*words, *(word for setting in settings for word in ("--set", setting)))
    assert "CC BY-NC 4.0" in done.stdout and "171 classes" in done.stdout
    [file] = (tmp_path / "out").rglob("photo.png")
    predictor = zsseg.load("ovseg-r101c", device="cpu", settings=settings)
    assert predictor.config.clip.ensemble_weight == 0.7 and len(drive.asked) == 1
    predictor.set_classes(["cat", "sofa"])
    assert (predictor("photo.jpg") == Image.open(file)).all()
