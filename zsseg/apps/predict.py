"""Segment any images with any words: for each of a list that may be a million long, a label map, an
overlay and a JSON file of its classes.

The list is the same in every process, and each process takes its share. An image is segmented by
itself, so that its results do not depend on the number of processes, nor on how often they were
killed.
"""

import contextlib
import glob
import hashlib
import json
import os
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from zsseg.config import Config
from zsseg.data import network_inputs, stream, to_tensor
from zsseg.datasets import endings
from zsseg.distributed import Process
from zsseg.download import locked
from zsseg.files import MARK, atomic_write, decode, refuse_foreign, result, split_lines, walk
from zsseg.images import image_endings, read_image, remarks_on
from zsseg.segmenter import Proposals, Segmenter
from zsseg.utils import (
    UserError,
    did_you_mean_file,
    first_of,
    format_table,
    left_out,
    parallel,
    path_of,
    progress,
    several,
)
from zsseg.views import all_finite, label_map, segment_views
from zsseg.visualize import label_type, overlay, palette, save_label_map
from zsseg.apps.vocabulary import Words

RESULT_ENDINGS = (
    ".png",
    ".overlay.jpg",
    ".json",
)  # of an image's results; the last is written last
OVERLAY_EDGES = (480, 1280)  # the longer side of an overlay is within these, whatever the image's
MAX_NAME_BYTES = 200  # of a file's name; 255 less what endings and temporary names add
MAX_PENDING_WRITES = 16  # images that are segmented and not yet written
MAX_CLASSES_PRINTED = 30
RESUME_THREADS = 16  # that look for the results of other runs


# --- which images, and what their results are called


class Names:
    """The images to segment and the name of each one's results: its path below the folder that
    contains all of them, without its ending where the name stays unique.
    """

    def __init__(self, found: list[str]):
        base, *self.files = found
        stems = [os.path.splitext(file)[0] for file in self.files]
        counts = Counter(stems)
        names = [
            stem if counts[stem] == 1 else file
            for stem, file in zip(stems, self.files, strict=True)
        ]
        if len(set(names)) < len(names):  # a.jpg, a.png and a.jpg.png
            names = self.files
        self.names = [shorten(name[len(base) :].lstrip(os.sep)) for name in names]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> str:
        return self.names[i]


def shorten(name: str) -> str:
    """A path whose last part has at most MAX_NAME_BYTES bytes; a digest keeps it unique."""
    folder, last = os.path.split(name)
    content = os.fsencode(last)
    if len(content) <= MAX_NAME_BYTES:
        return name
    kept = content[: MAX_NAME_BYTES - 17].decode(errors="ignore")
    return os.path.join(folder, f"{kept}-{hashlib.sha256(content).hexdigest()[:16]}")


def find_images(given: list[str], out: Path) -> list[str]:
    """The images that `--images` means, sorted, after the folder that contains all of them.

    Files, folders (all below them that Pillow reads), patterns, `-` for a list on standard input.
    The command says at its end what was left out. Raises UserError where something does not exist,
    and where images are in the folder of the results, which might replace them.
    """
    results = os.path.realpath(out)
    files: set[str] = set()
    bases: list[str] = []
    for word in given:
        path = os.fspath(path_of(word))
        matches = [os.path.abspath(file) for file in images_of(word, path, results)]
        folders = {os.path.dirname(file) for file in matches}
        checked = folders if word == "-" else folders | {path}
        if any(is_below(folder, results) for folder in checked):
            why = f"lies in {out}, where results go"
            raise UserError(f"--images {word}", why, "give another --out")
        if not matches:
            todo = "give images that Pillow reads (.jpg, .png, .webp, .tif, ...)"
            raise UserError(f"--images {word}", "contains no image", todo)
        files.update(matches)
        bases += [os.path.abspath(path)] if os.path.isdir(path) else folders
    return [os.path.commonpath(bases), *sorted(files)]


def images_of(word: str, path: str, results: str) -> list[str]:
    """The images of one argument of `--images`; see `find_images`."""
    if word == "-":
        if may_restart():
            todo = "give folders or patterns"
            raise UserError("--images -", "cannot be read again after a restart", todo)
        text = decode(sys.stdin.buffer.read() if sys.stdin else b"")
        lines = text.split("\0") if "\0" in text else split_lines(text)
        return [line for line in lines if line.strip()]
    if os.path.isdir(path):
        return images_below(path, results)
    if os.path.isfile(path):
        return [path]
    if glob.has_magic(path):
        return images_matching(path, results, word)
    todo = did_you_mean_file(path, "give images, folders, patterns or -")
    raise UserError(f"--images {word}", "no such file or folder", todo)


def images_below(folder: str, results: str) -> list[str]:
    """The images below a folder, but for those below the folder `results`."""
    dotted: list[str] = []
    images, others = [], []
    for file in walk(folder, results, dotted):
        (images if is_image_name(file) else others).append(file)
    if others:
        count = several(len(others), "file")
        left_out(f"{count} that Pillow does not read as images ({endings(others)})")
    if dotted:
        left_out(several(len(dotted), "hidden file or folder", "hidden files and folders"))

    if os.path.isdir(results) and is_below(results, os.path.realpath(folder)):
        files = set(walk(results))
        stems = [file.removesuffix(".json") for file in files if file.endswith(".json")]
        ours = {stem + ending for stem in stems for ending in RESULT_ENDINGS}
        if foreign := list(filter(is_image_name, files - ours)):
            left_out(f"{several(len(foreign), 'image')} in {results}, where results go")
    return images


def images_matching(pattern: str, results: str, word: str) -> list[str]:
    """The files that match a pattern, each once, but for those below the folder `results`."""
    matches = glob.glob(pattern, recursive=True)
    if "**" not in pattern and (folders := sum(map(os.path.isdir, matches))):
        left_out(f"{several(folders, 'folder')} that {word} names (** looks into folders)")
    files = [file for file in matches if os.path.isfile(file) and not is_below(file, results)]
    # Links may loop: of all names of a file the shortest.
    unique = {os.path.realpath(file): file for file in sorted(files, key=len, reverse=True)}
    if links := len(files) - len(unique):
        left_out(f"{several(links, 'link')} to images that {word} names already")
    return list(unique.values())


def is_image_name(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in image_endings()


def is_below(path: str, folder: str) -> bool:
    """Whether a path, its links followed, is a folder or lies in it."""
    return Path(os.path.realpath(path)).is_relative_to(folder)


def may_restart() -> bool:
    """Whether torchrun starts the command again when it fails."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


# --- reading images, writing results


@dataclass
class InputImage:
    """An image as the network and the overlay need it; only `error` where it cannot be read."""

    number: int
    inputs: list[Tensor] = field(default_factory=list)  # uint8 [3, H, W] at each network-input size
    preview: Tensor | None = None  # uint8 [3, h, w] of the overlay
    size: tuple[int, int] = (0, 0)  # (height, width) of the image itself
    version: list[int] = field(default_factory=list)  # see `version_of`
    extra_pages: int = 0  # pages or frames after the first
    proposals: Proposals | None = None  # where the features were kept
    error: str = ""


class InputImages(Dataset):
    """Item i: the InputImage of a file, as a viewer would show it."""

    def __init__(self, files: list[str], config: Config):
        self.files = files
        self.config = config

    def __getitem__(self, i: int) -> InputImage:
        file = self.files[i]
        try:
            version = version_of(file)
            image = read_image(file, shown=True)
        except Exception as error:  # whatever a decoder raises must not end a run of a million
            why = error.args[1] if isinstance(error, UserError) else repr(error)
            return InputImage(i, error=why if os.path.exists(file) else "no such file")

        longest = max(image.size)
        scale = np.clip(longest, *OVERLAY_EDGES) / longest
        size = [max(round(scale * side), 1) for side in image.size]
        return InputImage(
            number=i,
            inputs=network_inputs(image, self.config.data, self.config.eval.sizes),
            preview=to_tensor(image.resize(size, Image.Resampling.BILINEAR)),
            size=image.size[::-1],
            version=version,
            extra_pages=remarks_on(Path(file))[1],
        )


def version_of(file: str) -> list[int]:
    """A file's size in bytes and time of change in ns: another image of that name has others."""
    stat = os.stat(file)
    return [stat.st_size, stat.st_mtime_ns]


class Results:
    """Writes an image's OUT/<name>.png, .overlay.jpg and, last, .json. Safe to call from threads.

    made_with: digest of the model, words and settings, see `made_with`.
    """

    def __init__(self, out: Path, names: Names, words: Words, made_with: str):
        self.out = out
        self.names = names
        self.words = words
        self.made_with = made_with
        C = len(words.shown_names)
        self.colours = palette(C)[:-1]
        if words.shown < C:
            self.colours[-1] = 96  # background words are grey

    def files(self, number: int) -> list[Path]:
        return [self.out / (self.names[number] + ending) for ending in RESULT_ENDINGS]

    def refuse_foreign(self, numbers: range) -> None:
        """UserError where a result would replace a file that this program did not write, or the
        result of another image.
        """
        if not any(self.out.iterdir()):
            return
        read_failed(self.out)
        for number in numbers:
            refuse_foreign(*self.files(number))
            image = self.names.files[number]
            other = str(self.read(number).get("image", image))
            if other != image and os.path.exists(other):  # else it was moved
                why = f"is the result of another image, {other}, not of {image}"
                raise UserError(f"file {self.files(number)[-1]}", why, "give another --out")

    def read(self, number: int) -> dict:
        """What the JSON file says; {} where there is none, or a broken one."""
        try:
            content = json.loads(self.files(number)[-1].read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def pixels(self, number: int) -> dict[int, int] | None:
        """{class id: pixels} of an image that is done as it is now, with these words and settings;
        else None.
        """
        content = self.read(number)
        try:
            done = (
                content["made_with"] == self.made_with
                and content["version"] == version_of(self.names.files[number])
                and all(file.exists() for file in self.files(number))
            )
            return {c["id"]: c["pixels"] for c in content["classes"]} if done else None
        except (OSError, KeyError, TypeError):
            return None

    def segment(
        self, segmenter: Segmenter, config: Config, process: Process, item: InputImage
    ) -> tuple[np.ndarray, dict[int, int], list[float]]:
        """The label map, as `count_classes` gives it."""
        if item.proposals is None:
            file = self.names.files[item.number]
            labels, top = segment_image(segmenter, config, process, item.inputs, item.size, file)
        else:
            proposals = segmenter.classify(item.proposals.to(process.device))
            labels, top = segmenter.label_map(segmenter.ensemble(proposals), proposals, item.size)
        return count_classes(labels, top, len(self.words.shown_names))

    def count(self, found: tuple[np.ndarray, dict[int, int], list[float]]) -> dict[int, int]:
        """{class id: pixels} of what `segment` gives."""
        return found[1]

    def write(
        self, item: InputImage, found: tuple[np.ndarray, dict[int, int], list[float]]
    ) -> None:
        """What `segment` gives."""
        labels, pixels, scores = found
        names = self.words.shown_names
        label_file, overlay_file, json_file = self.files(item.number)
        save_label_map(labels, label_file, len(names), self.colours)

        classes = [
            {
                "id": i,
                "name": names[i],
                "pixels": count,
                "share": round(count / labels.size, 6),
                "score": round(scores[i] / count, 4),
            }
            for i, count in Counter(pixels).most_common()
        ]
        legend = [
            (c["id"], f"{c['name']}  {100 * c['pixels'] / labels.size:.1f}%") for c in classes
        ]
        image = item.preview.permute(1, 2, 0).numpy()
        small = Image.fromarray(labels).resize(image.shape[1::-1], Image.Resampling.NEAREST)
        with result(overlay_file) as file:
            drawn = overlay(image, np.asarray(small), self.colours, legend)
            drawn.save(file, "JPEG", quality=90, comment=MARK)

        content = {
            "program": MARK,
            "image": self.names.files[item.number],
            "height": labels.shape[0],
            "width": labels.shape[1],
            "version": item.version,
            "classes": classes,
            "made_with": self.made_with,
        }
        with result(json_file) as file:
            file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def made_with(segmenter: Segmenter, config: Config, words: Words, process: Process) -> str:
    """A digest of all that results depend on besides the images; `segmenter` has its vocabulary."""
    # None: what is a matter of memory and time only, and files whose content is in the weights.
    clip = asdict(config.clip) | dict.fromkeys(["chunk", "weights", "prompts"])
    model = asdict(config.model) | dict.fromkeys(["compile", "kernels", "weights"])
    model["bf16"] = process.bf16(config.model.bf16)
    sizes = (config.data.test_short_edge, config.data.max_size)
    # Of the tokenizer's vocabulary, what it makes of these words.
    tokens = (
        [segmenter.clip.tokenizer.encode(name) for name in words.names] if segmenter.clip else []
    )
    seen = segmenter.seen.tolist()
    settings = [clip, model, asdict(config.eval), sizes, asdict(words), seen, tokens]
    return digest_of(settings, segmenter)


def digest_of(settings: list, *parts: nn.Module) -> str:
    """A digest of settings and of all weights."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for part in parts:
        for name, tensor in part.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# --- segmenting


def segment_image(
    segmenter: Segmenter,
    config: Config,
    process: Process,
    inputs: list[Tensor],
    size: tuple[int, int],
    name: str = "this image",
) -> tuple[Tensor, Tensor]:
    """The class of every pixel and its score, int64 and fp32 `size` (height, width).

    inputs: uint8 [3, H, W] at each network-input size. The score is the sum over the queries of
    class score x mask. Raises UserError where a score is NaN or infinite.
    """
    inputs = [image.to(process.device, non_blocking=True) for image in inputs]
    with process.autocast(config.model.bf16):
        views = segment_views(segmenter, inputs, size, config.eval.flip, config.eval.window)
    scores = [segmenter.ensemble(view.proposals) for view in views]
    if not all_finite(views, scores):
        why = f"gives scores that are not finite for {name}"
        raise UserError("the model", why, "check its weights, or set model.bf16=off")
    return label_map(segmenter, views, scores, size)


@torch.inference_mode()
def segment_images(
    segmenter: Segmenter,
    config: Config,
    results: Results,
    items: Dataset,
    process: Process,
    resume: bool,
) -> None:
    """Segment all images, shared among the processes; with `resume` those that are not done yet.

    results: `Results`, or `features.FeatureFiles`; items: `InputImages` or `features.KeptFeatures`
    of the files that `results` names. `segmenter` has its vocabulary. At the end, OUT/failed.txt
    lists images that cannot be read: a UserError unless torchrun would start again for it.
    """
    names = results.names
    share = range(process.rank, len(names), process.world_size)
    create_output(results.out, process)
    process.check_all(lambda: results.refuse_foreign(share))

    summary = Summary()
    done = torch.zeros(len(names), dtype=torch.uint8)
    if resume:
        label = process.progress_label("look for results")
        found = parallel(results.pixels, share, RESUME_THREADS, label)
        for number, pixels in zip(share, found, strict=True):
            if pixels is not None:
                done[number] = 1
                summary.add("done", pixels)
    left = (process.sum(done) == 0).nonzero()[:, 0]  # what is left is shared anew
    numbers = left[process.rank :: process.world_size].tolist()

    started = time.perf_counter()
    workers = config.data.workers
    items = (item for [item] in stream(items, numbers, 1, workers))
    label = process.progress_label("segment")
    writing: deque = deque()
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for item in progress(items, label, len(numbers), process.is_main):
            file = names.files[item.number]
            if item.error:
                summary.failed.append(f"{file}: {item.error}")
                continue
            found = results.segment(segmenter, config, process, item)
            summary.add("segmented", results.count(found))
            summary.counts["extra pages"] += item.extra_pages
            writing.append(pool.submit(results.write, item, found))
            if len(writing) > MAX_PENDING_WRITES:
                writing.popleft().result()
        for future in writing:
            future.result()

    summary = sum(process.gather([summary]), Summary())
    seconds = time.perf_counter() - started
    if process.is_main:
        note_failed(results.out, names, summary.failed)
        summary.report(results, seconds)


def count_classes(
    labels: Tensor, top: Tensor, classes: int
) -> tuple[np.ndarray, dict[int, int], list[float]]:
    """Of the label map and its scores [H, W]: ids of shown classes uint8 or uint16 [H, W]; {class
    id: its pixels}, without those that have none; the sum of scores of each class's pixels.
    """
    labels = labels.clamp(max=classes - 1)  # background words come last
    ids = labels.flatten()
    counts = torch.bincount(ids).tolist()
    pixels = {i: count for i, count in enumerate(counts) if count}
    scores = torch.bincount(ids, top.flatten().double())
    labels = labels.int().cpu().numpy().astype(label_type(classes))
    return labels, pixels, scores.tolist()


def create_output(out: Path, process: Process) -> None:
    """Make the folder of the results; UserError where it cannot be written, or is not one folder
    for all processes.
    """
    file = out / ".shared"
    with contextlib.ExitStack() as stack:
        temporary = process.broadcast_object(lambda: stack.enter_context(atomic_write(file)))
        shared = temporary.exists()
        process.wait()
    if process.is_main:
        file.unlink(missing_ok=True)
    if process.any(not shared):
        why = "is not one folder for all processes"
        raise UserError(f"output {out}", why, "put it where all machines see the same files")


def read_failed(out: Path) -> list[str]:
    """The lines of OUT/failed.txt, "image: reason"; UserError for one that this program did not
    write.
    """
    file = out / "failed.txt"
    if not file.exists():
        return []
    lines = split_lines(decode(file.read_bytes()))
    if not lines or not all(line.startswith("/") and ": " in line for line in lines):
        why = "is there, and not one that this program wrote"
        raise UserError(f"file {file}", why, "give another --out, or move it")
    return lines


def note_failed(out: Path, names: Names, failed: list[str]) -> None:
    """Bring OUT/failed.txt up to date: a line for every image that could not be read. Lines of
    images that only other runs were given are kept.
    """

    def escape(text: str) -> str:
        return text.replace("\n", "\\n")

    file = out / "failed.txt"
    given = {escape(name) for name in names.files}
    with locked(out):
        lines = {escape(line) for line in failed}
        for line in read_failed(out):
            image = line.partition(": ")[0]
            if image not in given and os.path.exists(image):
                lines.add(line)
        if not lines:
            file.unlink(missing_ok=True)
            return
        with atomic_write(file) as temporary:
            text = "\n".join(sorted(lines)) + "\n"
            temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


@dataclass
class Summary:
    """What is printed at the end, of one process or, added up, of all."""

    pixels: Counter = field(default_factory=Counter)  # of each class id
    images: Counter = field(default_factory=Counter)  # that show each class id
    counts: Counter = field(default_factory=Counter)  # images segmented, done; extra pages
    failed: list[str] = field(default_factory=list)  # "image: reason"

    def add(self, count: str, pixels: dict[int, int]) -> None:
        self.counts[count] += 1
        self.pixels.update(pixels)
        self.images.update(pixels.keys())

    def __add__(self, other: "Summary") -> "Summary":
        return Summary(
            self.pixels + other.pixels,
            self.images + other.images,
            self.counts + other.counts,
            self.failed + other.failed,
        )

    def report(self, results: Results, seconds: float) -> None:
        """Print how much of the images each class covers. Images that could not be read are a
        UserError unless torchrun would start again for it.
        """
        out = results.out
        segmented, done = self.counts["segmented"], self.counts["done"]
        if pages := self.counts["extra pages"]:
            count = several(pages, "page or frame", "pages or frames")
            left_out(f"{count} of images that have more than one")

        if self.pixels:
            names = results.words.shown_names
            total = self.pixels.total()
            rows = [
                (names[i][:31], f"{100 * count / total:.1f}%", self.images[i])
                for i, count in self.pixels.most_common(MAX_CLASSES_PRINTED)
            ]
            print(format_table(("class", "share", "images"), rows))
            if len(self.pixels) > MAX_CLASSES_PRINTED:
                print(f"and {len(self.pixels) - MAX_CLASSES_PRINTED} more")
            if absent := [name for i, name in enumerate(names) if i not in self.pixels]:
                print("not found:", first_of(absent, 20))
        before = f", {done} done before" if done else ""
        speed = f"{seconds:.1f} s, {segmented / seconds:.2f} images/s"
        print(f"{several(segmented, 'image')} in {speed}{before} -> {out}")

        if self.failed:
            count = f"{len(self.failed)} of {segmented + done + len(self.failed)} failed"
            why = f"{count}, the first: {min(self.failed)}"
            error = UserError("images", why, f"see {out / 'failed.txt'}")
            if not may_restart():
                raise error
            print(f"error: {error}", file=sys.stderr)  # torchrun would start all over again
