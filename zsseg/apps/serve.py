"""A page on this machine to try images and words on. An image passes the networks once; every
change of words is answered from its features. Nothing is written to the disk.
"""

import html
import inspect
import io
import json
import os
import re
import secrets
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import torch

from zsseg.apps.predict import colours_of, count_classes, prepare, result_files, segment_image
from zsseg.apps.vocabulary import Words, format_words, parse_words
from zsseg.config import Config
from zsseg.distributed import Process
from zsseg.images import read_image
from zsseg.regions import STRIDE, mask_probabilities
from zsseg.segmenter import Segmenter
from zsseg.utils import UserError
from zsseg.visualize import base64_text, encode, tint

PAGE = Path(__file__).with_name("serve.html")
MAX_IMAGES = 4  # whose proposals are stored
MAX_BYTES = 2**28  # of an image file
LOCAL = r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"  # this machine; a tunnel has its own port
TYPES = {"image": int, "words": str, "off": list, "name": str, "x": int, "y": int}


@dataclass
class Session:
    """A segmenter and the last images. Every request names its image and its words; threads have to
    take turns.
    """

    segmenter: Segmenter
    config: Config
    process: Process
    trained: list[str]  # names of the classes of the training, which count as seen
    words: Words  # that the segmenter has now

    def __post_init__(self):
        self.images = {}  # {number: (proposals, size (height, width), preview)}
        self.asked = None  # what `words` were read from
        self.use(self.words)

    def use(self, words):
        """Words that are refused leave everything as it was."""
        self.segmenter.set_classes(words.names, words.among(self.trained), words.synonyms)
        self.words = words

    def add(self, content):
        """Pass an image file through the networks. Raises UserError for a broken one."""
        [pixels], size, preview = prepare(read_image(io.BytesIO(content), turn=True), self.config)
        with self.process.autocast(self.config.model.bf16):
            proposals = self.segmenter.propose(self.process.put(pixels))
        number = secrets.randbits(48)  # a page of an earlier start finds no other image under it
        self.images[number] = proposals, size, preview
        if len(self.images) > MAX_IMAGES:
            del self.images[next(iter(self.images))]
        height, width = size
        return {
            "image": number,
            "width": width,
            "height": height,
            "photo": base64_text(encode(preview)),
        }

    def find(self, image, words, off):
        """One of `images`, for these words but those that are switched `off`."""
        if image not in self.images:
            raise UserError("image", "is not stored any more", "drop it again")
        if self.asked != (words, off):
            self.use(parse_words(words).without(off))
            self.asked = words, off
        return self.images[image]

    def segment(self, proposals, size):
        """The label map at some size, and the classes in it, see `count_classes`."""
        found = segment_image(
            self.segmenter, self.config, self.process, [], size, proposals=proposals
        )()
        return count_classes(*found, self.words.shown_names)

    def label(self, image, words, off):
        """What lies over the preview of an image, a PNG in base64; the names and their colours; the
        classes in it; which words are off; a note.
        """
        proposals, size, preview = self.find(image, words, off)
        labels, classes = self.segment(proposals, min(size, preview.size[::-1]))
        colours = colours_of(self.words)
        typed = parse_words(words)
        return {
            "layer": base64_text(encode(tint(labels, colours, preview.size))),
            "names": self.words.shown_names,
            "colours": colours.tolist(),
            "classes": classes,
            "off": [name for name in typed.names if name in off],
            "note": typed.note,
        }

    def results(self, image, words, off, name):
        """The files that `--images` writes of an image called `name`: {ending: base64}."""
        proposals, size, preview = self.find(image, words, off)
        labels, classes = self.segment(proposals, size)
        content = {"image": name, "classes": classes}
        files = result_files(labels, preview, colours_of(self.words), content)
        return {ending: base64_text(file) for ending, file in files.items()}

    @torch.inference_mode()
    def pixel(self, image, words, off, x, y):
        """The score of every class at a pixel of the photo, and the proposal that gives the first
        one most of its score.
        """
        proposals, (height, width), _ = self.find(image, words, off)
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
        return {
            "classes": [*zip(self.words.names, total.tolist(), strict=True)],
            "query": query,
            "probability": float(masks[query]),
        }


class Server(ThreadingHTTPServer):
    """Serves one session to this machine and, by other names of it, to who has the token."""

    token = secrets.token_urlsafe()  # another one every start

    def run(self, session):
        """Answer until Ctrl-C."""
        self.session = session
        print(f"open http://127.0.0.1:{self.server_port}/?token={self.token} (Ctrl-C ends it)")
        try:
            with self:
                self.serve_forever()
        except KeyboardInterrupt:
            os._exit(0)  # threads that still answer would make the interpreter's own end abort

    def handle_error(self, *client):
        if not isinstance(sys.exception(), OSError):  # a client that leaves is no error
            super().handle_error(*client)


class Handler(BaseHTTPRequestHandler):
    """GET: the page. POST /image: a file; /label: {"image": 1, "words": "cat, dog", "off":
    ["cat"]}; /results: also its "name"; /pixel: also "x" and "y". Answers are JSON; what the user
    can correct is {"error"}.
    """

    timeout = 60  # seconds that a client may be silent
    lock = threading.Lock()  # one request at a time

    def do_GET(self):
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
        """UserError unless a request has the token, or is the page's by one of this machine's own
        names: another page in the same browser has another origin, a name that was led here another
        host.
        """
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin", f"http://{host}")  # a browser's POST always says
        url = urlsplit(self.path)
        local = re.fullmatch(LOCAL, host) and origin == f"http://{host}"
        if not local and f"token={self.server.token}" not in url.query.split("&"):
            why = "is not the program's or lacks its token"
            raise UserError("this page", why, "open the address it printed")
        session = self.server.session
        if self.command == "GET":
            words = html.escape(format_words(session.words))
            return PAGE.read_text("utf-8").replace("{{words}}", words)
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BYTES:
            raise UserError("this file", f"has more than {MAX_BYTES >> 20} MiB", "give another")
        body = self.rfile.read(int(length))
        actions = {"/label": session.label, "/results": session.results, "/pixel": session.pixel}
        with self.lock:
            if url.path == "/image":
                return json.dumps(session.add(body))
            try:
                action = actions[url.path]
                request = inspect.signature(action).bind(**json.loads(body))
                if any(type(value) is not TYPES[k] for k, value in request.arguments.items()):
                    raise TypeError
            except Exception:  # any JSON may have come
                raise UserError("this request", "is not the page's", "load it again") from None
            return json.dumps(action(*request.args), allow_nan=False)

    def log_message(self, *_):
        pass


def open_server(port, config):
    """A server on 127.0.0.1 that does not answer yet. UserError for a port that cannot be opened,
    and for what has no page.
    """
    if config.eval.views or not config.model.proposals:
        why = "needs mask proposals of one view an image (eval.sizes, flip, window)"
        raise UserError("--serve", why, "use --images")
    try:
        return Server(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError("--serve", f"port {port}: {error}", "give another") from None
