"""The page of --serve: any image, any words, over HTTP and in a real browser."""

import base64
import http.client
import io
import json
import re
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from chromium import browser, window  # noqa: F401  a fixture
from conftest import PROCESS, command, fails_in_one_line, start, succeed, tiny_config
from PIL import Image

from zsseg.apps import serve
from zsseg.apps.api import load
from zsseg.apps.predict import prepare
from zsseg.apps.vocabulary import Words, format_words, parse_words
from zsseg.images import read_image
from zsseg.utils import UserError
from zsseg.visualize import ALPHA, LUMINANCE, overlay

DROP = """files => {
    const data = new DataTransfer();
    for (const [name, bytes] of files)
        if (name) data.items.add(new File([Uint8Array.from(bytes)], name));
        else data.setData("text/uri-list", bytes);
    document.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
}"""

# The first image that comes next is answered last.
SLOW = """() => {
    const real = window.fetch;
    let count = 0;
    window.fetch = async (path, options) => {
        const answer = await real(path, options);
        if (path === "/image" && count++ === 0) await new Promise(done => setTimeout(done, 1000));
        return answer;
    };
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


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_words_change_without_a_pass(port, session, monkeypatch):
    """Words that are refused change nothing, however often they are given."""
    status, stored = ask(port, "/image", photo())
    assert status == 200 and (stored["width"], stored["height"]) == (64, 48)
    about = {"image": stored["image"], "off": []}
    monkeypatch.setattr(session.segmenter, "propose", None)  # nothing passes the networks again
    for words in ("cat, dog", "cat", "a bird, sofa = couch; other: sky, wall"):
        status, found = ask(port, "/label", {**about, "words": words})
        assert status == 200, found
        assert found["names"] == parse_words(words).shown_names
        assert bool(found["note"]) == (words == "cat")
        layer = np.array(opened(found["layer"]))
        drawn = [(layer == [*colour, ALPHA]).all(-1).any() for colour in found["colours"]]
        assert {row["id"] for row in found["classes"]} == {*np.flatnonzero(drawn)}
    assert len(found["colours"]) == 3 and found["colours"][-1] == [96] * 3
    for bad in ("star, " + "very " * 90, "cat, cat", "cat, cat", ",", "other: sky", "photo.jpg"):
        status, refused = ask(port, "/label", {**about, "words": bad})
        assert status == 422 and len(refused["error"].splitlines()) == 1, bad
        assert parse_words(format_words(session.words)) == parse_words(words)
    assert ask(port, "/label", {**about, "words": words})[1] == found


def test_every_request_says_which_words_it_is_about(port, session):
    """Another page, with the same image or not, has others."""
    _, stored = ask(port, "/image", photo())
    mine = {"image": stored["image"], "words": "a bird, sofa = couch; other: sky, wall", "off": []}
    _, first = ask(port, "/label", mine)
    ask(port, "/label", {**mine, "words": "moon, cup"})
    _, pixel = ask(port, "/pixel", {**mine, "x": 3, "y": 40})
    assert [name for name, _ in pixel["classes"]] == ["a bird", "sofa", "sky", "wall"]
    ask(port, "/label", {**mine, "words": "moon, cup"})
    _, files = ask(port, "/results", {**mine, "name": "a.png"})
    classes = json.loads(base64.b64decode(files[".json"]))["classes"]
    assert {c["name"] for c in classes} <= {"a bird", "sofa", "other"}
    _, without = ask(port, "/label", {**mine, "off": ["sofa", "gone"]})
    assert without["names"] == ["a bird", "other"] and without["off"] == ["sofa"]
    assert without["colours"][0] == first["colours"][0]
    status, refused = ask(port, "/label", {**mine, "off": ["sofa", "a bird"]})
    assert status == 422 and "all switched off" in refused["error"]


@pytest.mark.parametrize(("kind", "size"), [("PNG", (120, 90)), ("TIFF", (1100, 40))])
def test_what_is_shown_and_saved_is_what_images_writes(trained, tmp_path, kind, size):
    """Of transparent images and formats that no browser shows, too; small ones to the last bit."""
    rng = np.random.default_rng(2)
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 4), np.uint8))
    image.save(tmp_path / "my photo.x", kind)
    words = "cat, dog; other: grass"
    found = load(trained, root=trained.parents[1], device="cpu")
    parts = (found.segmenter, found.config, found.process, found.trained)
    session = serve.Session(*parts, parse_words("cat"))
    stored = session.add((tmp_path / "my photo.x").read_bytes())
    answer = session.label(stored["image"], words, [])
    files = session.results(stored["image"], words, [], "my photo.x")
    more = ("--root", trained.parents[1], "--device", "cpu", "--classes", words)
    file = tmp_path / "my photo.x"
    succeed("eval.py", trained, "--images", file, "--out", tmp_path / "o", *more)
    for ending in (".png", ".overlay.jpg"):
        written = (tmp_path / "o" / f"my photo{ending}").read_bytes()
        assert base64.b64decode(files[ending]) == written, ending
    labels = np.array(opened(files[".png"]))
    assert labels.shape == size[::-1] and opened(files[".png"]).mode == "P"
    counted = json.loads((tmp_path / "o" / "my photo.json").read_text())["classes"]
    saved = json.loads(base64.b64decode(files[".json"]))
    assert saved == {"image": "my photo.x", "classes": counted}
    seen = opened(stored["photo"])
    assert np.array_equal(seen, prepare(read_image(tmp_path / "my photo.x"), found.config)[2])
    shown = np.array(overlay(seen, labels, np.array(answer["colours"], np.uint8))).astype(int)
    drawn = Image.alpha_composite(
        seen.convert("L", LUMINANCE).convert("RGBA"), opened(answer["layer"])
    )
    differs = (shown != np.array(drawn.convert("RGB"))).any(-1).mean()
    assert differs == 0 if max(size) <= 960 else differs < 0.05


def test_the_class_named_at_a_pixel_is_drawn_there(session):
    number = session.add(photo(90, 120))["image"]
    words = "star, tree, brick"
    labels = np.array(opened(session.results(number, words, [], "")[".png"]))
    same = []
    for x, y in ((x, y) for x in [*range(0, 120, 12), 119] for y in [*range(0, 90, 9), 89]):
        classes = dict(session.pixel(number, words, [], x, y)["classes"])
        same.append(max(classes, key=classes.get) == ("star", "tree", "brick")[labels[y, x]])
    assert np.mean(same) > 0.9


def test_the_server_refuses(port, session, monkeypatch):
    """Other pages, what is no image, images that it has forgotten, scores that are not finite."""
    monkeypatch.setattr(serve, "MAX_IMAGES", 2)
    for host in (f"localhost:{port}", "localhost:9", "127.0.0.1"):  # tunnels
        _, stored = ask(port, "/image", photo(), Host=host, Origin=f"http://{host}")
    assert len(session.images) == 2
    about = {"words": "cat, dog", "off": []}
    forgotten = ask(port, "/label", {**about, "image": 1})
    monkeypatch.setattr(serve, "MAX_BYTES", 200_000)
    with torch.inference_mode():
        session.images[stored["image"]][0].mask_logits[0, 0, 0] = torch.nan
    refused = {
        "not the program's": ask(port, "/image", photo(), Origin="http://evil.example"),
        "this image: ": ask(port, "/image", photo()[:-99]),
        "not finite": ask(port, "/label", {**about, "image": stored["image"]}),
        "more than 0 MiB": ask(port, "/image", bytes(200_001)),
        "not the page's": ask(port, "/label", b"[" * 100_000),
        "this request": ask(port, "/label", b"cat"),
        "load it again": ask(port, "/pixel", {**about, "image": stored["image"]}),
        "is not the": ask(port, "/label", {**about, "image": stored["image"], "off": "cat"}),
        "not stored": forgotten,
    }
    for text, (status, content) in refused.items():
        assert status == 422 and text in content["error"] and "\n" not in content["error"]


def test_the_command(port, trained):
    """It answers until Ctrl-C; what has no page ends in one line before anything is loaded."""
    for setting in ("model.proposals=false", "eval.flip=true"):
        with pytest.raises(UserError, match="use --images"):
            serve.open_server(0, tiny_config(setting))
    words = ("eval.py", trained, "--root", trained.parents[1], "--device", "cpu", "--serve")
    fails_in_one_line(command(*words, port), "--serve", f"port {port}")
    running = start(*words, 0, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        while not (line := running.stdout.readline().decode()).startswith("open http"):
            assert line
        address = ("127.0.0.1", int(line.split(":")[2].split("/")[0]))
        with socket.create_connection(address) as client:  # which leaves in the midst of an upload
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(b"POST /image HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 99\r\n\r\nGIF")
        token = re.search(r"\?token=\S+", line)[0]
        for query, host, origin, served in (
            ("", "[::1]:9", "http://[::1]:9", True),  # a tunnel
            ("", "localhost:9", "http://localhost:8", False),  # another program's page
            ("", "localhost.box", "http://localhost.box", False),  # a name that was led here
            ("?token=x", "m\xfcbox", "http://m\xfcbox", False),
            (f"{token}&x=1", "localhost", "https://mybox", True),  # a proxy
        ):
            _, found = ask(address[1], f"/label{query}", b"", Host=host, Origin=origin)
            assert ("lacks its token" in found["error"]) != served, host
        assert ask(address[1], "/", Host="mybox")[0] == 422
        _, page = ask(address[1], f"/{token}", Host="mybox")
        assert page.startswith("<!doctype html>") and ">cat, dog, grass</textarea>" in page
        running.send_signal(signal.SIGINT)
        assert (running.wait(30), running.stdout.read()) == (0, b"")
    finally:
        running.kill()


@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_in_a_browser(browser, port, width):  # noqa: F811
    """Choose or drop an image, change words, point, switch a word off, save; by two addresses."""
    from playwright.sync_api import expect

    with window(browser, width, dark=width == 360) as page:
        other = f"http://mybox.localhost:{port}/?token={serve.Server.token}"
        page.goto(other if width == 360 else f"http://127.0.0.1:{port}/")
        expect(page.locator("#words")).to_have_value("star, tree")
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert back == ("rgb(22, 23, 26)" if width == 360 else "rgb(246, 246, 244)")
        page.click("button.main")
        expect(page.locator("#status.bad")).to_contain_text("image first")
        if width == 360:
            page.evaluate(DROP, [["a.png", list(photo())]])
        else:
            file = {"name": "a.png", "mimeType": "image/png", "buffer": photo(480, 640)}
            page.locator("#file").set_input_files(file)
        names = page.locator("#legend .name")
        expect(names).to_have_count(2, timeout=30_000)
        page.fill("#words", 'cat, "red,  bird"\ndog')
        expect(names).to_have_count(3)
        page.click("#absent summary:text('2 classes have no pixel')")
        assert {*names.all_inner_texts()} == {"cat", "red, bird", "dog"}
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        expect(page.locator("#pixel li")).to_have_count(3)
        before = page.inner_text("#pixel small")
        page.focus("#view")
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#pixel small")).not_to_have_text(before)
        page.locator("#legend input").first.click()
        off = page.locator("#legend .share:text('off')")
        expect(off).to_have_count(1)
        expect(names).to_have_count(3)
        with page.expect_download() as download:
            page.click("text=Label map")
        assert download.value.suggested_filename == "a.png"
        assert np.array(Image.open(download.value.path())).max() <= 1
        page.click("#legend [title='Remove dog']")
        expect(page.locator("#words")).to_have_value('cat, "red,  bird"')
        page.fill("#words", "moon")
        expect(off).to_have_count(0)
        expect(page.locator("#status")).to_contain_text("1 class: 'moon'")
        page.focus("#choose")
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "words"


def test_what_fails_leaves_the_page_as_it_was(browser, port, tmp_path):  # noqa: F811
    """Refused words, broken images, no files, two at once; of two images the one chosen last stays."""
    from playwright.sync_api import expect

    with window(browser) as page:
        page.goto(f"http://127.0.0.1:{port}/")
        page.evaluate(DROP, [["a.png", list(photo())]])
        names = page.locator("#legend .name")
        expect(names).to_have_count(2, timeout=30_000)
        shown = lambda: page.evaluate("[photo.src, layer.src, $('legend').innerText]")
        before = shown()
        bad = page.locator("#status.bad")
        page.evaluate(DROP, [["broken.png", [1, 2, 3]]])
        expect(bad).to_have_text("broken.png cannot be read (no image). Give another.")
        page.evaluate(DROP, [])
        expect(bad).to_contain_text("save the image first")
        page.evaluate(DROP, [["", "http://localhost/a.png"]])
        expect(bad).to_contain_text("on another page")
        folder = {"items": [], "files": [str(tmp_path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            event = {"type": kind, "x": 99, "y": 99, "data": folder}
            page.context.new_cdp_session(page).send("Input.dispatchDragEvent", event)
        expect(bad).to_contain_text(f"{tmp_path.name} is a folder")
        page.fill("#words", "cat, cat")
        expect(bad).to_contain_text("cat")
        page.evaluate(DROP, [["b.png", list(photo(seed=2))]])
        expect(bad).to_contain_text("given twice")
        assert shown() == before
        page.fill("#words", "cat, dog")
        expect(names.first).to_have_text(re.compile("cat|dog"))
        second = shown()
        assert second[0] != before[0]
        page.evaluate(DROP, [["c.png", list(photo(seed=3))], ["d.png", list(photo(seed=4))]])
        expect(page.locator("#status")).to_contain_text("the first of 2 files")
        expect(page.locator("#status")).to_contain_text("words to overlay")
        page.evaluate(SLOW)
        page.evaluate(DROP, [["slow.png", list(photo(seed=5))]])
        expect(page.locator("#status")).to_contain_text("slow.png: segmenting, about ")
        expect(page.locator("#progress")).to_be_visible()
        page.evaluate(DROP, [["last.png", list(photo(seed=6))]])
        expect(page.locator("#status")).to_contain_text(re.compile(r"last\.png: \d"))
        last = shown()
        page.wait_for_timeout(1500)
        assert shown() == last


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_several_images(browser, port, session, tmp_path, monkeypatch, width, height):  # noqa: F811
    """All in view, nothing moves with the words; the first of three is forgotten; a pin; they go."""
    from playwright.sync_api import expect

    monkeypatch.setattr(serve, "MAX_IMAGES", 2)
    for i, file in enumerate(files := [tmp_path / f"{i}.png" for i in range(3)]):
        file.write_bytes(photo(96, 40, seed=i))
    with window(browser, width) as page:
        page.set_viewport_size({"width": width, "height": height})
        page.goto(f"http://127.0.0.1:{port}/")
        page.locator("#file").set_input_files(files)
        images = page.locator("#strip [aria-current]")
        numbers = []
        for i in (0, 1, 2, 1, 0):
            images.nth(i).click()
            page.wait_for_selector(f"#status:text('{i}.png'):text('words to overlay')")
            numbers.append([*session.images])
        assert numbers[2] == numbers[3] and numbers[4] == [numbers[3][1], numbers[4][1]]
        page.locator("#file").set_input_files(files[0])
        expect(images).to_have_count(3)
        box = "i => { const b = $(i).getBoundingClientRect(); return [b.x, b.y + scrollY, b.width, b.height]; }"
        boxes = lambda: [page.evaluate(box, name) for name in ("drop", "view", "classes")]
        drop, view, classes = before = boxes()
        assert view[3] <= 0.7 * height and view[2] / view[3] == pytest.approx(40 / 96, rel=0.01)
        assert drop[1] + drop[3] <= height and classes[1] + classes[3] <= height
        side = int(width < 800)  # beside the photo, or below it
        assert classes[side] >= drop[side] + drop[side + 2] and classes[1 - side] == drop[1 - side]
        page.fill("#words", ", ".join(f"thing {i}" for i in range(40)))
        expect(page.locator("summary")).to_have_text(re.compile(r"3\d classes have no pixel"))
        assert page.evaluate("$('words').clientHeight") > 60 and boxes() == before
        page.fill("#words", "cat, cat")
        expect(page.locator("#status.bad")).to_contain_text("Class 'cat' is given twice.")
        assert boxes() == before
        said = page.locator("#said")
        page.click("#view", position={"x": 50, "y": 60})
        expect(said).to_have_text(re.compile(r"\d+, \d+: thing \d+: 0"))
        pinned = said.inner_text()
        page.hover("#view", position={"x": 90, "y": 60})
        page.keyboard.press("ArrowDown")
        expect(said).not_to_have_text(pinned)
        assert said.inner_text().split(",")[0] == pinned.split(",")[0]  # the same column
        page.click("#view", position={"x": 50, "y": 60})
        expect(said).to_have_text("no pin")
        page.fill("#words", "cat, dog")
        for i, left, text in (("1", "0.png", "words"), ("0", "2.png", "2.png: w"), ("2", "", "")):
            page.locator(f"[aria-label='Remove {i}.png']").press("Enter")
            expect(page.locator(f"[title='{left}']" if left else "#choose")).to_be_focused()
            expect(page.locator("#status")).to_contain_text(text)
        expect(page.locator("#view")).to_be_hidden()
        page.locator("#file").set_input_files(files[1])
        expect(images).to_have_count(1)
