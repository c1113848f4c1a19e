"""A page on this machine to try images and words on. An image passes the networks once; every
change of words is answered from its features. Nothing is written to the disk.
"""

import contextlib
import html
import io
import json
import secrets
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image

from zsseg.apps.predict import colours_of, count_classes, segment_image
from zsseg.apps.vocabulary import Words, parse_words
from zsseg.config import Config
from zsseg.distributed import Process
from zsseg.images import network_inputs, read_image
from zsseg.regions import STRIDE, mask_probabilities
from zsseg.segmenter import Segmenter
from zsseg.utils import UserError
from zsseg.visualize import base64_image

PAGE = Path(__file__).with_name("serve.html")
MAX_IMAGES = 4  # whose proposals are stored
MAX_EDGE = 1280  # of the label map that the page shows


@dataclass
class Session:
    """A segmenter, its words, and the last images. Threads have to take turns."""

    segmenter: Segmenter
    config: Config
    process: Process
    trained: list[str]  # names of the classes of the training, which count as seen
    words: Words

    def __post_init__(self):
        # {number: (network input uint8 [3, H, W], proposals, size of the label map)}
        self.images = {}
        self.set_words(self.words)

    def set_words(self, words):
        """Words that are refused leave everything as it was."""
        self.segmenter.set_classes(words.names, words.among(self.trained), words.synonyms)
        self.words = words

    def add(self, content):
        """Pass an image file through the networks. Raises UserError for a broken one."""
        photo = read_image(io.BytesIO(content), turn=True)
        [pixels] = network_inputs(photo, self.config.data)
        with self.process.autocast(self.config.model.bf16):
            proposals = self.segmenter.propose(pixels.to(self.process.device))
        photo.thumbnail((MAX_EDGE, MAX_EDGE))
        number = secrets.randbits(48)  # a page of an earlier start finds no other image under it
        self.images[number] = (pixels, proposals, photo.size[::-1])
        if len(self.images) > MAX_IMAGES:
            del self.images[next(iter(self.images))]
        return {"image": number, "width": photo.width, "height": photo.height}

    def label(self, image, words):
        """The label map of an image for these words, as red + 256 x green of a PNG in base64; all
        names and their colours; the classes in it, see `count_classes`.
        """
        pixels, proposals, size = self.find(image)
        if words:  # else those from the start, which may have commas in them
            self.set_words(parse_words(words))
        parts = (self.segmenter, self.config, self.process, [pixels], size)
        names = self.words.shown_names
        ids, classes = count_classes(*segment_image(*parts, proposals=proposals), names)
        rgb = Image.fromarray(ids.astype("<u4")[..., None].view(np.uint8)[..., :3])
        colours = colours_of(self.words).tolist()
        return {"labels": base64_image(rgb), "names": names, "colours": colours, "classes": classes}

    @torch.inference_mode()
    def pixel(self, image, x, y):
        """The score of every class at a pixel of the label map, and the proposal that gives the
        first one most of its score.
        """
        _, proposals, (height, width) = self.find(image)
        H, W = proposals.input_size
        row = y * H // height
        column = x * W // width
        # All masks at this point, without computing them elsewhere
        top = max(row // STRIDE - 1, 0)
        left = max(column // STRIDE - 1, 0)
        near = proposals.mask_logits[:, top : top + 3, left : left + 3]
        masks = mask_probabilities(near, (H, W))[:, row - STRIDE * top, column - STRIDE * left]
        scores = self.segmenter.ensemble(self.segmenter.classify(proposals))
        total = masks @ scores
        query = int((masks * scores[:, total.argmax()]).argmax())
        classes = dict(zip(self.words.names, total.tolist(), strict=True))
        return {"classes": classes, "query": query, "probability": float(masks[query])}

    def find(self, image):
        """One of `images`."""
        if image not in self.images:
            raise UserError("image", "is not stored any more", "drop it again")
        return self.images[image]


class Server(ThreadingHTTPServer):
    """Serves one session to this machine."""

    def run(self, session):
        """Answer until Ctrl-C."""
        self.session = session
        print(f"open http://127.0.0.1:{self.server_port}/ (Ctrl-C ends it)")
        with self, contextlib.suppress(KeyboardInterrupt):
            self.serve_forever()


class Handler(BaseHTTPRequestHandler):
    """GET: the page. POST /image: a file; /label: {"image": 1, "words": "cat, dog"}; /pixel:
    {"image": 1, "x": 2, "y": 3}. Answers are JSON; what the user can correct is {"error"}.
    """

    timeout = 60  # seconds that a client may be silent
    lock = threading.Lock()  # one request at a time

    def do_GET(self):
        with contextlib.suppress(OSError):  # a client that leaves is no error
            status = 200
            try:
                content = self.respond()
            except UserError as error:
                content = json.dumps({"error": str(error)})
                status = 422
            self.send_response(status)
            kind = "text/html" if self.command == "GET" else "application/json"
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.end_headers()
            self.wfile.write(content.encode())

    do_POST = do_GET

    def respond(self):
        """UserError for other pages in the same browser; a tunnel may come from another port."""
        origin = urlsplit(self.headers.get("Origin", "//localhost"))  # a browser's POST always says
        if origin.hostname not in ("127.0.0.1", "localhost"):
            raise UserError("this page", "is not the program's", "open the address it printed")
        session = self.server.session
        if self.command == "GET":
            words = html.escape(format_words(session.words))
            return PAGE.read_text("utf-8").replace("{{words}}", words)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        actions = {
            "/image": lambda: session.add(body),
            "/label": lambda: session.label(**json.loads(body)),
            "/pixel": lambda: session.pixel(**json.loads(body)),
        }
        with self.lock:
            return json.dumps(actions[self.path](), allow_nan=False)

    def log_message(self, *_):
        pass


def format_words(words):
    """As `parse_words` reads them; "" for names with commas in them."""
    if any("," in name for name in words.names):
        return ""
    rows = [" = ".join([name, *words.synonyms.get(name, [])]) for name in words.names]
    if words.shown < len(rows):
        rows[words.shown] = f"other: {rows[words.shown]}"
    return ", ".join(rows)


def open_server(port, config) -> Server:
    """A server on 127.0.0.1 that does not answer yet. UserError for a port that cannot be opened,
    and for what has no page.
    """
    if not config.model.proposals:
        why = "is for models with mask proposals, not for the one-stage baseline"
        raise UserError("--serve", why, "use --images")
    try:
        return Server(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError("--serve", f"port {port}: {error}", "give another") from None
