"""Kept features: other words without another pass, and the page that answers from them."""

import http.client
import io
import json
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import command, fails_in_one_line, tiny_clip_state, tiny_config
from PIL import Image

from zsseg.apps import serve as serve_module
from zsseg.distributed import Process
from zsseg.features import read_arrays
from zsseg.segmenter import Segmenter
from zsseg.apps.serve import Session, format_words, open_port
from zsseg.apps.vocabulary import Words, parse_words

CPU = Process(torch.device("cpu"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, size in (("a.png", (50, 70)), ("b.jpg", (64, 40)), ("c.png", (33, 90))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)
    (folder / "broken.png").write_text("no image")
    return folder


def segment(trained: Path, *more: object):
    config = trained.parents[1] / "a.toml"
    root = ("--root", trained.parents[1], "--device", "cpu")
    return command("eval.py", trained, "--config", config, *root, *more)


def test_features_give_the_label_maps_of_a_fresh_pass(trained, photos, tmp_path):
    """All but for pixels that fp16 decides otherwise; files as those of images."""
    kept = segment(trained, "--images", photos, "--features", tmp_path / "f")
    assert kept.returncode == 2 and "1 of 4 failed" in kept.stderr  # the broken image
    files = sorted(p.name for p in (tmp_path / "f").iterdir() if p.suffix == ".npz")
    assert files == ["a.npz", "b.npz", "c.npz"]
    words = ("--classes", "cat, sofa = couch; other: sky")
    fresh = segment(trained, "--images", photos, *words, "--out", tmp_path / "fresh")
    assert fresh.returncode == 2
    late = segment(trained, "--features", tmp_path / "f", *words, "--out", tmp_path / "late")
    assert late.returncode == 0, late.stderr
    for name in ("a", "b", "c"):
        one, two = (np.array(Image.open(tmp_path / d / f"{name}.png")) for d in ("fresh", "late"))
        assert one.shape == two.shape and (one == two).mean() > 0.99
        content = json.loads((tmp_path / "late" / f"{name}.json").read_text())
        assert {c["name"] for c in content["classes"]} <= {"cat", "sofa", "other"}
        assert (tmp_path / "late" / f"{name}.overlay.jpg").exists()


def test_features_are_resumed_and_belong_to_a_model(trained, photos, tmp_path):
    folder = tmp_path / "f"
    run = ("--images", photos / "a.png", photos / "b.jpg", "--features", folder)
    assert segment(trained, *run).returncode == 0
    (folder / "a.npz").unlink()
    before = (folder / "b.npz").stat().st_mtime_ns
    again = segment(trained, *run, "--resume")
    assert again.returncode == 0 and "1 done before" in again.stdout, again.stderr
    assert (folder / "b.npz").stat().st_mtime_ns == before and (folder / "a.npz").exists()
    other = ("--features", folder, "--classes", "cat, dog", "--set", "clip.mask_threshold=0.4")
    refused = segment(trained, *other, "--out", tmp_path / "o")
    fails_in_one_line(refused, "2 of 2 failed", "another model or other settings")


def test_mistakes_with_features(trained, photos, tmp_path):
    words = ("--classes", "cat, dog")
    fails_in_one_line(segment(trained, "--features", tmp_path, *words), "contains no features")
    both = ("--images", photos, "--features", tmp_path / "f", *words)
    fails_in_one_line(segment(trained, *both), "--classes")
    views = ("--images", photos, "--features", tmp_path / "f", "--set", "eval.flip=true")
    fails_in_one_line(segment(trained, *views), "keeps one view")
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "a.npz").write_bytes(b"mine")
    foreign = ("--images", photos / "a.png", "--features", tmp_path / "g")
    fails_in_one_line(segment(trained, *foreign), "a.npz")
    assert (tmp_path / "g" / "a.npz").read_bytes() == b"mine"


def test_files_that_are_no_features_are_named(trained, photos, tmp_path):
    assert (
        segment(trained, "--images", photos / "a.png", "--features", tmp_path / "f").returncode == 0
    )
    good = (tmp_path / "f" / "a.npz").read_bytes()
    arrays = read_arrays(tmp_path / "f" / "a.npz")
    bad = {
        "cut": good[: len(good) // 2],
        "short": {**arrays, "valid": arrays["valid"][:-1]},
        "missing": {k: v for k, v in arrays.items() if k != "preview"},
        "pickled": {**arrays, "preview": np.array([{}], object)},
        "huge": {**arrays, "size": np.array([2**40, 2**40])},
        "NaN": {**arrays, "class_features": np.full_like(arrays["class_features"], np.nan)},
        "no preview": {**arrays, "preview": np.zeros(9, np.uint8)},
    }
    for content in bad.values():
        if isinstance(content, dict):
            file = io.BytesIO()
            np.savez(file, **content)
            with zipfile.ZipFile(file, "a") as archive:
                archive.comment = b"written by zsseg"
            content = file.getvalue()
        (tmp_path / "f" / "a.npz").write_bytes(content + b" written by zsseg")
        result = segment(trained, "--features", tmp_path / "f", "--out", tmp_path / "o")
        fails_in_one_line(result, "1 of 1 failed")


# --- the page


@pytest.fixture(scope="module")
def session() -> Session:
    torch.manual_seed(0)
    segmenter = Segmenter(tiny_config(), tiny_clip_state()).eval()
    words = Words(["star", "tree"], {}, 2)
    return Session(segmenter, tiny_config(), CPU, ["star"], words)


@pytest.fixture(scope="module")
def port(session) -> int:
    server = open_port(0)
    server.session = session
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


def photo(height: int = 48, width: int = 64) -> bytes:
    file = io.BytesIO()
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def ask(port: int, method: str, path: str, body: object = None, **headers: str):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    if not isinstance(body, bytes | None):
        body = json.dumps(body).encode()
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content) if b"html" not in content[:30] else content


def test_words_change_without_a_pass(port, session, monkeypatch):
    status, kept = ask(port, "POST", "/image", photo())
    assert status == 200 and (kept["width"], kept["height"]) == (64, 48)
    monkeypatch.setattr(session.segmenter, "propose", None)  # nothing may pass the networks again
    for words in ("cat, dog", "a bird, sofa = couch; other: sky", "cat"):
        status, found = ask(port, "POST", "/label", {"image": kept["image"], "words": words})
        assert status == 200, found
        names = parse_words(words.split(";")).shown_names
        assert [c["name"] for c in found["classes"]] == names
        assert sum(c["pixels"] for c in found["classes"]) == 64 * 48
        assert len(found["colours"]) == len(names)
    _, pixel = ask(port, "GET", f"/pixel?image={kept['image']}&x=3&y=40")
    assert pixel["classes"][0]["name"] == "cat" and 0 <= pixel["query"] < 8


def test_a_label_map_is_that_of_a_fresh_pass(session):
    kept = session.add(photo())
    found = session.label(kept["image"], "star, tree, brick")
    import base64

    rgb = np.array(Image.open(io.BytesIO(base64.b64decode(found["labels"]))))
    labels = session.segmenter(session.images[kept["image"]].image, (48, 64))
    assert (rgb[..., 0] == labels.numpy()).mean() > 0.999


def test_the_server_refuses(port):
    page = ask(port, "GET", "/")
    assert page[0] == 200 and b"<!doctype html>" in page[1]
    assert ask(port, "GET", "/", Host="evil.example")[0] == 403
    assert ask(port, "POST", "/image", photo(), Origin="http://evil.example")[0] == 403
    assert ask(port, "GET", "/../../etc/passwd")[0] == 404
    assert ask(port, "POST", "/image", b"no image")[0] == 422
    too_large = {"Content-Length": str(serve_module.MAX_UPLOAD + 1)}
    assert ask(port, "POST", "/image", b"", **too_large)[0] == 413
    for request in ({"image": 10**6, "words": "cat"}, {"image": 1, "words": ""}):
        status, found = ask(port, "POST", "/label", request)
        assert status == 422 and len(found["error"].splitlines()) == 1
    for request in (b"{", b"[]", b'{"image": "x", "words": 3}'):
        assert ask(port, "POST", "/label", request)[0] == 400
    assert ask(port, "GET", "/pixel?image=1&x=-5&y=0")[0] == 422


def test_images_are_forgotten(session, monkeypatch):
    monkeypatch.setattr(serve_module, "MAX_IMAGES", 2)
    numbers = [session.add(photo())["image"] for _ in range(3)]
    assert list(session.images)[-2:] == numbers[1:] and numbers[0] not in session.images


def test_the_one_stage_baseline_has_a_page_too():
    torch.manual_seed(0)
    config = tiny_config("model.proposals=false", "clip.ensemble=false")
    segmenter = Segmenter(config, tiny_clip_state()).eval()
    words = Words(["star", "tree"], {}, 2)
    session = Session(segmenter, config, CPU, [], words)
    number = session.add(photo())["image"]
    for text in ("star, tree", "cat, dog", "a, b, c"):
        found = session.label(number, text)
        fresh = segmenter(session.images[number].image, (48, 64))
        counts = torch.bincount(fresh.flatten(), minlength=len(found["classes"])).tolist()
        assert [c["pixels"] for c in found["classes"]] == counts


def test_words_as_they_are_read():
    words = Words(["cat", "sofa", "sky", "wall"], {"sofa": ["couch"]}, 2)
    assert format_words(words) == "cat, sofa = couch; other: sky, wall"
    assert parse_words(format_words(words).split(";")) == words


def test_a_port_that_is_taken(port, trained):
    fails_in_one_line(segment(trained, "--serve", port), "--serve", "cannot be opened")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_in_a_browser(port, tmp_path):
    """Drop an image, change words, point at a pixel, switch a word off, a broken file."""
    drop = """(bytes, name) => {
        const data = new DataTransfer();
        data.items.add(new File([Uint8Array.from(bytes)], name, {type: "image/png"}));
        document.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
    }"""

    def wait(expression: str) -> object:
        until = time.time() + 30
        while not (value := browser.value(expression)) and time.time() < until:
            time.sleep(0.05)
        assert value, browser.value("document.getElementById('status').textContent")
        return value

    legend = "[...document.querySelectorAll('#legend .name')].map(e => e.textContent).sort().join()"
    with Browser() as browser:
        browser.open(f"http://127.0.0.1:{port}/", 360, dark=True)
        wait("document.getElementById('words').value")
        browser.value(f"({drop})({list(photo(480, 640))}, 'a.png')")
        wait("document.body.dataset.answer")
        browser.value(
            "words.value = 'cat, dog, bird'; words.dispatchEvent(new Event('input')); true"
        )
        wait(f"{legend} === 'bird,cat,dog'")
        assert browser.value("document.documentElement.scrollWidth <= innerWidth")
        browser.value(
            "view.focus(), view.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'})); true"
        )
        wait("document.querySelectorAll('#pixel li').length === 3")
        browser.value("[...document.querySelectorAll('#legend input')][0].click(); true")
        wait("document.querySelectorAll('#legend .share')[2].textContent === 'off'")
        assert not browser.value("png.disabled || json.disabled")
        browser.value(f"({drop})([1, 2, 3], 'broken.png')")
        wait("document.getElementById('status').className === 'bad'")
        assert browser.value("document.getElementById('status').textContent").startswith(
            "this image"
        )
