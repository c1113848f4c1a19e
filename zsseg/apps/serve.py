"""A page on this machine to try images and words on. An image passes the networks once; every
change of words is answered from its features. Nothing is written to the disk.
"""

import contextlib
import io
import json
import secrets
import threading
import time
import traceback
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zsseg.apps.predict import colours_of, count_classes, segment_image
from zsseg.apps.vocabulary import Words, parse_words
from zsseg.config import Config
from zsseg.distributed import Process
from zsseg.images import network_inputs, read_image
from zsseg.regions import STRIDE, mask_probabilities
from zsseg.segmenter import Proposals, Segmenter, Size
from zsseg.utils import UserError
from zsseg.visualize import base64_image

PAGE = Path(__file__).with_name("serve.html")
MAX_UPLOAD = 64 * 2**20  # bytes
MAX_IMAGES = 4  # whose proposals are stored
MAX_EDGE = 1280  # of the label map that the page shows
TOP = 5  # classes shown for a pixel


@dataclass
class Session:
    """A segmenter, its words, and the last images. Threads have to take turns."""

    segmenter: Segmenter
    config: Config
    process: Process
    trained: list[str]  # names of the classes of the training, which count as seen
    words: Words
    # {number: (network input uint8 [3, H, W], proposals, size of the label map)}
    images: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.set_words(self.words)

    def set_words(self, words: Words) -> None:
        """Words that are refused leave everything as it was."""
        self.segmenter.set_classes(words.names, words.among(self.trained), words.synonyms)
        self.words = words

    def add(self, content: bytes) -> dict:
        """Pass an image file through the networks. Raises UserError for a broken one."""
        started = time.perf_counter()
        photo = read_image(io.BytesIO(content), shown=True)
        [pixels] = network_inputs(photo, self.config.data)
        pixels = pixels.to(self.process.device)
        with self.process.autocast(self.config.model.bf16):
            proposals = self.segmenter.propose(pixels)
        photo.thumbnail((MAX_EDGE, MAX_EDGE))
        number = secrets.randbits(48)  # a page of an earlier start finds no other image under it
        self.images[number] = (pixels, proposals, (photo.height, photo.width))
        if len(self.images) > MAX_IMAGES:
            del self.images[next(iter(self.images))]
        seconds = round(time.perf_counter() - started, 3)
        return {"image": number, "width": photo.width, "height": photo.height, "seconds": seconds}

    @torch.inference_mode()
    def label(self, image: int, words: str) -> dict:
        """The label map of an image for these words, and what the page shows of it."""
        started = time.perf_counter()
        pixels, proposals, size = self.find(image)
        self.set_words(parse_words(words))
        parts = (self.segmenter, self.config, self.process, [pixels], size)
        names = self.words.shown_names
        ids, rows = count_classes(*segment_image(*parts, proposals=proposals), names)
        rows = {row["id"]: row for row in rows}
        empty = {"pixels": 0, "share": 0, "score": None}
        classes = [rows.get(i, {"id": i, "name": name, **empty}) for i, name in enumerate(names)]
        return {
            "labels": encode_labels(ids),
            "colours": colours_of(self.words).tolist(),
            "classes": classes,
            "milliseconds": round(1000 * (time.perf_counter() - started), 1),
        }

    @torch.inference_mode()
    def pixel(self, image: int, x: int, y: int) -> dict:
        """The classes with the largest scores at a pixel of the label map, and the proposal that
        gives the first one most of its score.
        """
        _, proposals, (height, width) = self.find(image)
        H, W = proposals.input_size
        row = y * H // height
        column = x * W // width
        # All masks at this point, without computing them elsewhere.
        top = max(row // STRIDE - 1, 0)
        left = max(column // STRIDE - 1, 0)
        near = proposals.mask_logits[:, top : top + 3, left : left + 3]
        masks = mask_probabilities(near, (H, W))[:, row - STRIDE * top, column - STRIDE * left]
        scores = self.segmenter.ensemble(self.segmenter.classify(proposals)).float()
        total = masks @ scores
        best = total.topk(min(TOP, len(total))).indices.tolist()
        classes = [{"name": self.words.names[i], "score": float(total[i])} for i in best]
        query = int((masks * scores[:, best[0]]).argmax())
        return {"classes": classes, "query": query, "probability": float(masks[query])}

    def find(self, image: int) -> tuple[Tensor, Proposals, Size]:
        """One of `images`."""
        if image not in self.images:
            raise UserError("image", "is not stored any more", "drop it again")
        return self.images[image]


def encode_labels(ids: np.ndarray) -> str:
    """Class ids [H, W] as a PNG in base64: red + 256 x green."""
    rgb = ids.astype("<u4")[..., None].view(np.uint8)[..., :3]
    return base64_image(Image.fromarray(rgb), "PNG")


class Server(ThreadingHTTPServer):
    """Serves one session to this machine."""

    def run(self, session: Session) -> None:
        """Answer until Ctrl-C."""
        self.session = session
        print(f"open http://127.0.0.1:{self.server_address[1]}/ (Ctrl-C ends it)", flush=True)
        with self, contextlib.suppress(KeyboardInterrupt):
            self.serve_forever()


class Handler(BaseHTTPRequestHandler):
    """GET /: the page; GET /words; GET /pixel?image=1&x=2&y=3; POST /image: a file; POST /label:
    {"image": 1, "words": "cat, dog"}. Answers are JSON; what the user can correct is {"error"}.
    """

    server: Server
    timeout = 60  # seconds that a client may be silent
    lock = threading.Lock()  # one request at a time

    def do_GET(self) -> None:
        with contextlib.suppress(OSError):  # a client that leaves is no error
            status = 422
            try:
                content = self.respond()
                status = 200
            except UserError as error:
                content = json.dumps({"error": str(error)})
            except OSError:
                raise
            except Exception:
                traceback.print_exc()
                content = json.dumps({"error": "the program met an error; its terminal shows it"})
            self.send_response(status)
            kind = "text/html; charset=utf-8" if self.path == "/" else "application/json"
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(content.encode())

    do_POST = do_GET

    def respond(self) -> str:
        """The answer to the page; UserError for anything else. No other page in the same browser
        may ask; a tunnel may come from another port.
        """
        host = self.headers.get("Host", "")
        is_local = host.partition(":")[0] in ("127.0.0.1", "localhost")
        if not is_local or self.headers.get("Origin", f"http://{host}") != f"http://{host}":
            raise UserError("this page", "is not the program's", "open the address it printed")
        size = int(self.headers.get("Content-Length", 0))
        # Read what is too large, too: a browser sends everything before it reads an answer.
        for start in range(0, size + 1, MAX_UPLOAD):
            body = self.rfile.read(min(size - start, MAX_UPLOAD))
        if size >= MAX_UPLOAD:
            raise UserError("this file", "is too large", f"give one below {MAX_UPLOAD >> 20} MiB")
        path, _, query = self.path.partition("?")
        if path == "/":
            return PAGE.read_text("utf-8")
        session = self.server.session
        actions = {
            "/words": lambda: {"words": format_words(session.words)},
            "/pixel": lambda: session.pixel(**{k: int(v) for k, v in parse_qsl(query)}),
            "/image": lambda: session.add(body),
            "/label": lambda: session.label(**json.loads(body)),
        }
        if path not in actions:
            raise UserError(f"page {path}", "does not exist", "open /")
        with self.lock:
            return json.dumps(actions[path](), allow_nan=False)

    def log_message(self, *_: object) -> None:
        pass


def format_words(words: Words) -> str:
    """As `parse_words` reads them."""
    rows = [" = ".join([name, *words.synonyms.get(name, [])]) for name in words.names]
    parts = (rows[: words.shown], rows[words.shown :])
    return "; other: ".join(", ".join(part) for part in parts if part)


def open_server(port: int, config: Config) -> Server:
    """A server on 127.0.0.1 that does not answer yet. UserError for a port that cannot be opened,
    and for what has no page.
    """
    if not config.model.proposals:
        why = "is for models with mask proposals, not for the one-stage baseline"
        raise UserError("--serve", why, "use --images")
    try:
        return Server(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        why = f"port {port} cannot be opened ({error})"
        raise UserError("--serve", why, "give another") from None
