"""The page of --serve: any image, any words, over HTTP and in a real browser."""

import base64
import http.client
import io
import json
import signal
import subprocess
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from chromium import browser, window  # noqa: F401  a fixture
from conftest import PROCESS, command, fails_in_one_line, start, tiny_config
from PIL import Image

from zsseg.apps import serve
from zsseg.apps.vocabulary import Words, parse_words
from zsseg.images import network_inputs, read_image
from zsseg.utils import UserError

DROP = """([bytes, name]) => {
    const data = new DataTransfer();
    data.items.add(new File([Uint8Array.from(bytes)], name, {type: "image/png"}));
    document.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
}"""


@pytest.fixture
def session(segmenter) -> serve.Session:
    words = Words(["star", "tree"], {}, 2)
    return serve.Session(segmenter, tiny_config(), PROCESS, ["star"], words)


@pytest.fixture
def port(session) -> Iterator[int]:
    server = serve.open_server(0, tiny_config())
    threading.Thread(target=server.run, args=[session], daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


def photo(height: int = 48, width: int = 64, seed: int = 1) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def ask(port: int, path: str, body: object = None, **headers: str) -> tuple[int, object]:
    """Status and content of the answer to a GET or, with a body, to a POST."""
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET" if content is None else "POST", path, content, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    return answer.status, text if content is None else json.loads(text)


def label_map(found: dict) -> np.ndarray:
    rgb = np.array(Image.open(io.BytesIO(base64.b64decode(found["labels"]))))
    return rgb[..., 0] + 256 * rgb[..., 1].astype(np.int64)


def test_words_change_without_a_pass(port, session, monkeypatch):
    """Words that are refused change nothing, however often they are given."""
    status, stored = ask(port, "/image", photo())
    assert status == 200 and (stored["width"], stored["height"]) == (64, 48)
    monkeypatch.setattr(session.segmenter, "propose", None)  # nothing passes the networks again
    for words in ("cat, dog", "cat", "a bird, sofa = couch; other: sky, wall"):
        status, found = ask(port, "/label", {"image": stored["image"], "words": words})
        assert status == 200, found
        assert found["names"] == parse_words(words).shown_names
        counts = np.bincount(label_map(found).ravel())
        assert {i: n for i, n in enumerate(counts) if n} == {
            row["id"]: row["pixels"] for row in found["classes"]
        }
    assert len(found["colours"]) == 3 and found["colours"][-1] == [96] * 3
    for bad in ("star, " + "very " * 90, "cat, cat", "cat, cat", ",", "other: sky", "photo.jpg"):
        status, refused = ask(port, "/label", {"image": stored["image"], "words": bad})
        assert status == 422 and len(refused["error"].splitlines()) == 1, bad
        assert parse_words(serve.format_words(session.words)) == parse_words(words)
    assert ask(port, "/label", {"image": stored["image"], "words": words})[1] == found
    _, pixel = ask(port, "/pixel", {"image": stored["image"], "x": 3, "y": 40})
    assert {*pixel["classes"]} == {"a bird", "sofa", "sky", "wall"}


def test_a_label_map_is_that_of_a_fresh_pass(session):
    """And the class named at a pixel is the one that is drawn there."""
    number = session.add(photo(90, 120))["image"]
    labels = label_map(session.label(number, "star, tree, brick"))
    inputs = network_inputs(read_image(io.BytesIO(photo(90, 120)), turn=True), tiny_config().data)
    fresh = session.segmenter.segment(inputs, (90, 120)).labels.numpy()
    assert (labels == fresh).mean() > 0.999
    same = []
    for x, y in ((x, y) for x in [*range(0, 120, 12), 119] for y in [*range(0, 90, 9), 89]):
        classes = session.pixel(number, x, y)["classes"]
        same.append(max(classes, key=classes.get) == ("star", "tree", "brick")[labels[y, x]])
    assert np.mean(same) > 0.9


def test_the_server_refuses(port, session, monkeypatch):
    """Other pages, what is no image, images that it has forgotten, scores that are not finite."""
    monkeypatch.setattr(serve, "MAX_IMAGES", 2)
    for origin in (f"http://localhost:{port}", "http://localhost:9", "http://127.0.0.1"):  # tunnels
        _, stored = ask(port, "/image", photo(), Origin=origin)
    assert len(session.images) == 2
    forgotten = ask(port, "/label", {"image": 1, "words": "cat"})
    with torch.inference_mode():
        session.images[stored["image"]][1].mask_logits[0, 0, 0] = torch.nan
    refused = {
        "not the program's": ask(port, "/image", photo(), Origin="http://evil.example"),
        "this image: ": ask(port, "/image", photo()[:-99]),
        "not finite": ask(port, "/label", {"image": stored["image"], "words": "cat, dog"}),
        "not stored": forgotten,
    }
    for text, (status, content) in refused.items():
        assert status == 422 and text in content["error"] and "\n" not in content["error"]


def test_the_command(port, trained):
    """It answers until Ctrl-C; what has no page ends in one line before anything is loaded."""
    with pytest.raises(UserError, match="one-stage"):
        serve.open_server(0, tiny_config("model.proposals=false"))
    words = ("eval.py", trained, "--root", trained.parents[1], "--device", "cpu", "--serve")
    fails_in_one_line(command(*words, port), "--serve", f"port {port}")
    running = start(*words, 0, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        while not (line := running.stdout.readline().decode()).startswith("open http"):
            assert line
        _, page = ask(int(line.split(":")[2].split("/")[0]), "/")
        assert page.startswith("<!doctype html>") and 'value="cat, dog, grass"' in page
        running.send_signal(signal.SIGINT)
        assert running.wait(30) == 0 and running.stdout.read() == b""
    finally:
        running.kill()


@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_in_a_browser(browser, port, width):  # noqa: F811
    """Choose or drop an image, change words, point, switch a word off, save, a broken file."""
    from playwright.sync_api import expect

    with window(browser, width, dark=width == 360) as page:
        page.goto(f"http://127.0.0.1:{port}/")
        expect(page.locator("#words")).to_have_value("star, tree")
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert back == ("rgb(22, 23, 26)" if width == 360 else "rgb(246, 246, 244)")
        if width == 360:
            page.evaluate(DROP, [list(photo()), "a.png"])
        else:
            file = {"name": "a.png", "mimeType": "image/png", "buffer": photo(480, 640)}
            page.locator("#file").set_input_files(file)
        names = page.locator("#legend .name")
        expect(names).to_have_count(2, timeout=30_000)
        page.fill("#words", "cat, dog, bird")
        expect(names).to_have_count(3)
        assert {*names.all_inner_texts()} == {"cat", "dog", "bird"}
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        expect(page.locator("#pixel li")).to_have_count(3)
        before = page.inner_text("#pixel small")
        page.focus("#view")
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#pixel small")).not_to_have_text(before)
        page.locator("#legend input").first.click()
        expect(page.locator("#legend .share").last).to_have_text("off")
        with page.expect_download() as download:
            page.click("#png")
        labels = np.array(Image.open(download.value.path()).convert("RGB"))
        assert labels[..., 0].max() <= 1 and labels[..., 1:].max() == 0
        page.evaluate(DROP, [[1, 2, 3], "broken.png"])
        expect(page.locator("#status.bad")).to_contain_text("this image: ")
        page.fill("#words", "cat, cat")
        expect(page.locator("#status.bad")).to_contain_text("cat")
        page.focus("#choose")
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "words"
