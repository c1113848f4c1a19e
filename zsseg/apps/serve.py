"""A page on this machine to try images and words on. An image passes the networks once; every
change of words is answered from its features. Nothing is written to the disk.
"""

import base64
import io
import json
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from zsseg.config import Config
from zsseg.data import network_inputs
from zsseg.distributed import Process
from zsseg.images import read_image
from zsseg.regions import mask_probabilities
from zsseg.segmenter import Proposals, Segmenter
from zsseg.utils import UserError
from zsseg.visualize import palette
from zsseg.apps.vocabulary import Words, parse_words

PAGE = Path(__file__).parent / "serve.html"
MAX_UPLOAD = 64 * 2**20  # bytes
MAX_TEXT = 2**16  # bytes of words
MAX_IMAGES = 4  # whose features are kept at once
MAX_EDGE = 1280  # of the map that the page shows
TOP = 5  # classes shown for a pixel


class NamedFeatures:
    """Text features of single names, computed once each: a change of words costs the new ones."""

    def __init__(self, prompt: nn.Module):
        self.prompt = prompt
        self.known: dict[str, Tensor] = {}

    @torch.inference_mode()
    def features(self, clip: nn.Module, texts: list[list[str]]) -> Tensor:
        """The names of each class -> normalised mean of their features [C, D]."""
        names = {name for names in texts for name in names}
        if new := sorted(names - self.known.keys()):
            self.known |= zip(new, self.prompt(clip, new), strict=True)
        means = [torch.stack([self.known[name] for name in names]).mean(0) for names in texts]
        return F.normalize(torch.stack(means), dim=-1)


@dataclass
class Kept:
    """An image that the page was given."""

    image: Tensor  # uint8 [3, H, W] at network-input size
    size: tuple[int, int]  # (height, width) of the map that the page shows
    proposals: Proposals
    masks: Tensor | None = None  # see `Session.masks`, of the image that was asked for last
    words: Words | None = None  # that the proposals of the one-stage baseline are of


class Session:
    """The segmenter, its words, and the images that were given; one request at a time."""

    def __init__(
        self,
        segmenter: Segmenter,
        config: Config,
        process: Process,
        trained: list[str],
        words: Words,
    ):
        self.segmenter = segmenter
        self.config = config
        self.process = process
        self.trained = trained
        self.words = words
        self.images: OrderedDict[int, Kept] = OrderedDict()
        self.count = 0
        self.lock = threading.Lock()
        self.caches = {}
        if segmenter.clip is not None:
            prompts = {segmenter.prompt, segmenter.region_prompt} - {None}
            self.caches = {prompt: NamedFeatures(prompt) for prompt in prompts}
            # In place of the features kept on the disk, by list of words.
            segmenter.encode_names = lambda prompt, texts: self.caches[prompt].features(
                segmenter.clip, texts
            )
        self.set_words(words)

    def set_words(self, words: Words) -> None:
        self.words = words
        self.segmenter.set_classes(words.names, words.among(self.trained), words.synonyms)

    def add(self, content: bytes) -> dict:
        """Pass an image file through the networks; UserError for a broken one."""
        image = decode_image(content)
        [pixels] = network_inputs(image, self.config.data)
        pixels = pixels.to(self.process.device)
        scale = min(MAX_EDGE / max(image.size), 1)
        width, height = (max(round(scale * side), 1) for side in image.size)
        started = time.perf_counter()
        with self.lock, self.process.autocast(self.config.model.bf16):
            proposals = self.segmenter.propose(pixels)
            self.count += 1
            self.images[self.count] = Kept(pixels, (height, width), proposals)
            if len(self.images) > MAX_IMAGES:
                self.images.popitem(last=False)
            number = self.count
        seconds = time.perf_counter() - started
        return {"image": number, "width": width, "height": height, "seconds": round(seconds, 3)}

    @torch.inference_mode()
    def label(self, number: int, text: str) -> dict:
        """The label map of an image for these words, and what the page shows of it."""
        words = parse_words(text.split(";"))
        started = time.perf_counter()
        with self.lock:
            kept = self.get(number)
            if words != self.words:
                self.set_words(words)
            maps = self.score_maps(kept)
            if not maps.isfinite().all():
                why = "gives scores that are not finite"
                raise UserError("the model", why, "check its weights, or set model.bf16=off")
            top, labels = maps.max(0)

        names = words.shown_names
        C = len(names)
        labels = labels.clamp(max=C - 1)  # background words come last
        pixels = torch.bincount(labels.flatten(), minlength=C).tolist()
        scores = torch.bincount(labels.flatten(), top.flatten().double(), minlength=C).tolist()
        classes = [
            {
                "id": i,
                "name": names[i],
                "pixels": pixels[i],
                "share": pixels[i] / labels.numel(),
                "score": scores[i] / pixels[i] if pixels[i] else None,
            }
            for i in range(C)
        ]
        colours = palette(C)[:-1]
        if words.shown < len(words.names):
            colours[-1] = 96  # background words are grey
        return {
            "labels": encode_labels(labels.cpu().numpy()),
            "colours": colours.tolist(),
            "classes": classes,
            "milliseconds": round(1000 * (time.perf_counter() - started), 1),
        }

    @torch.inference_mode()
    def pixel(self, number: int, x: int, y: int) -> dict:
        """The classes with the largest scores at a pixel of the map, and the proposal that gives
        the first one most of its score.
        """
        with self.lock:
            kept = self.get(number)
            height, width = kept.size
            if not (0 <= x < width and 0 <= y < height):
                raise UserError("pixel", "is outside the image", "choose another")
            scores = self.scores(kept)
            masks = self.masks(kept)
            at = masks[:, y, x]  # [Q]
            total = at @ scores  # [C]
            names = self.words.shown_names
            values, ids = total.topk(min(TOP, len(total)))
            query = int((at * scores[:, ids[0]]).argmax())
        classes = [
            {"name": names[min(i, len(names) - 1)], "score": value}
            for i, value in zip(ids.tolist(), values.tolist(), strict=True)
        ]
        return {"classes": classes, "query": query, "probability": float(at[query])}

    def get(self, number: int) -> Kept:
        if number not in self.images:
            raise UserError("image", "is not kept any more", "drop it again")
        self.images.move_to_end(number)
        return self.images[number]

    def scores(self, kept: Kept) -> Tensor:
        """Class scores [Q, C] for the present words. The one-stage baseline's masks depend on the
        words: it computes them again.
        """
        if self.segmenter.two_stage:
            kept.proposals = self.segmenter.classify(kept.proposals)
        elif kept.words != self.words:
            kept.proposals = self.segmenter.propose(kept.image)
            kept.masks = None
            kept.words = self.words
        return self.segmenter.ensemble(kept.proposals).float()

    def masks(self, kept: Kept) -> Tensor:
        """Its mask probabilities at the size of the map [Q, height, width], kept for one image at a
        time. Resizing masks or, as `class_scores` does, their weighted sums is the same.
        """
        if kept.masks is None:
            for other in self.images.values():
                other.masks = None
            proposals = kept.proposals
            masks = mask_probabilities(proposals.mask_logits, proposals.input_size)[None]
            kept.masks = F.interpolate(masks, kept.size, mode="bilinear", align_corners=False)[0]
        return kept.masks

    def score_maps(self, kept: Kept) -> Tensor:
        """[C, height, width] for the present words."""
        scores = self.scores(kept)
        return torch.einsum("qc,qhw->chw", scores, self.masks(kept))


def decode_image(content: bytes) -> Image.Image:
    """An image file as a viewer would show it; UserError for a broken one."""
    try:
        return read_image(io.BytesIO(content), shown=True)
    except Exception as error:  # whatever a decoder raises
        why = error.args[1] if isinstance(error, UserError) else f"cannot be read ({error})"
        raise UserError("this image", why, "give another") from None


def encode_labels(labels: np.ndarray) -> str:
    """Class ids [H, W] as a PNG in base64: red + 256 x green."""
    rgb = np.zeros((*labels.shape, 3), np.uint8)
    rgb[..., 0] = labels % 256
    rgb[..., 1] = labels // 256
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


class Server(ThreadingHTTPServer):
    """Of one session, for this machine only."""

    daemon_threads = True
    session: Session


class Handler(BaseHTTPRequestHandler):
    """GET /: the page; GET /words; GET /pixel?image=1&x=2&y=3; POST /image: a file; POST /label:
    {"image": 1, "words": "cat, dog"}. Answers are JSON; what the user can put right is {"error"}.
    """

    server: Server
    timeout = 60  # seconds that a client may keep a connection silent

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if not self.is_local():
            return
        if url.path == "/":
            self.answer(HTTPStatus.OK, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif url.path == "/words":
            self.reply(lambda: {"words": format_words(self.server.session.words)})
        elif url.path == "/pixel":
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            self.reply(
                lambda: self.server.session.pixel(*(int(query[key]) for key in ("image", "x", "y")))
            )
        else:
            self.fail(HTTPStatus.NOT_FOUND, "no such page")

    def do_POST(self) -> None:
        if not self.is_local():
            return
        limits = {"/image": MAX_UPLOAD, "/label": MAX_TEXT}
        length = self.headers.get("Content-Length", "")
        if self.path not in limits:
            self.fail(HTTPStatus.NOT_FOUND, "no such page")
        elif not length.isdecimal():
            self.fail(HTTPStatus.LENGTH_REQUIRED, "the request has no length")
        elif int(length) > limits[self.path]:
            most = f"{limits[self.path] // 2**20 or 1} MiB"
            self.fail(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"too large; at most {most}")
        else:
            content = self.rfile.read(int(length))
            session = self.server.session
            if self.path == "/image":
                self.reply(lambda: session.add(content))
            else:
                self.reply(lambda: session.label(*read_request(content)))

    def is_local(self) -> bool:
        """Whether the page itself asks, and not another page in the same browser."""
        port = self.server.server_address[1]
        hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in hosts and (
            origin is None or origin in {f"http://{host}" for host in hosts}
        ):
            return True
        self.fail(HTTPStatus.FORBIDDEN, "only this machine's own page may ask")
        return False

    def reply(self, action) -> None:
        try:
            content = action()
        except UserError as error:
            self.fail(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        except (KeyError, TypeError, ValueError):
            self.fail(HTTPStatus.BAD_REQUEST, "not a request of the page")
        else:
            self.answer(HTTPStatus.OK, json.dumps(content).encode(), "application/json")

    def fail(self, status: HTTPStatus, text: str) -> None:
        self.close_connection = True
        self.answer(status, json.dumps({"error": text}).encode(), "application/json")

    def answer(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header(
            "Content-Security-Policy",
            "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
            "img-src 'self' blob: data:; connect-src 'self'; frame-ancestors 'none'",
        )
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def read_request(content: bytes) -> tuple[int, str]:
    request = json.loads(content)
    number, text = request["image"], request["words"]
    if not isinstance(number, int) or not isinstance(text, str):
        raise TypeError
    return number, text


def format_words(words: Words) -> str:
    """As `parse_words` reads them."""
    shown = [" = ".join([n, *words.synonyms.get(n, [])]) for n in words.names[: words.shown]]
    background = words.names[words.shown :]
    return ", ".join(shown) + (f"; other: {', '.join(background)}" if background else "")


def open_port(port: int) -> Server:
    """A server on 127.0.0.1; UserError where the port is taken, or is none."""
    try:
        return Server(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(
            "--serve", f"port {port} cannot be opened ({error})", "give another"
        ) from None


def serve(server: Server, session: Session) -> None:
    """Until it is interrupted."""
    server.session = session
    print(f"open http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C ends it)", flush=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")
