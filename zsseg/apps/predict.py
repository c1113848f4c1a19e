"""Segment any images with any words: for each of a list that may be a million long, a label map, an
overlay and a JSON file of its classes.

The list is the same in every process, and each process takes its share. An image is segmented by
itself, so that its results do not depend on the number of processes, nor on how often they were
killed.
"""

import hashlib
import io
import json
import os
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zsseg.apps.vocabulary import Words
from zsseg.config import Config
from zsseg.distributed import Process
from zsseg.images import is_image_name, network_inputs, read_image
from zsseg.segmenter import Proposals, Segmenter
from zsseg.utils import (
    UserError,
    atomic_write,
    claim_folder,
    digest,
    format_table,
    parallel,
    plural,
    split_lines,
    walk,
    write_json,
)
from zsseg.visualize import NEAREST, label_type, overlay, palette, save_label_map

OVERLAY_EDGES = (480, 1280)  # the longer side of an overlay is within these, whatever the image's
MAX_ROWS = 30  # of the summary
MAX_WRITING = 8  # images that are segmented and not written yet
# Settings that matter after `Segmenter.propose` only
LATE = ["prompt", "region_prompt", "prompts", "prompt_prefix", "ensemble_weight", "ensemble_seen"]


def find_images(given: list[str], out: Path) -> list[tuple[str, str]]:
    """(file, name of its results) of the images that `--images` means, sorted: files, all images
    below folders, and for `-` the lines of standard input. A name is the path below the folder that
    contains all of them, without its ending if it stays unique.

    Raises UserError if there is no image, and for images in the folder of the results, which might
    replace them.
    """
    results = os.path.realpath(out)
    files: set[str] = set()
    folders: set[str] = set()
    for word in given:
        path = os.path.abspath(word)
        if os.path.isdir(path):
            found = [file for file in walk(path, results) if is_image_name(file)]
            above = {path}
        else:
            lines = split_lines(os.fsdecode(sys.stdin.buffer.read())) if word == "-" else [path]
            found = [os.path.abspath(line) for line in lines if line.strip()]
            above = set(map(os.path.dirname, found))
        if any(Path(os.path.realpath(folder)).is_relative_to(results) for folder in above):
            raise UserError(f"--images {word}", "is where results go", "give another --out")
        if not found:
            todo = "give images that Pillow reads (.jpg, .png, .webp, .tif, ...)"
            raise UserError(f"--images {word}", "contains no image", todo)
        files.update(found)
        folders |= above
    start = len(os.path.join(os.path.commonpath(folders), ""))
    stems = Counter(os.path.splitext(file)[0] for file in files)
    images = []
    for file in sorted(files):
        stem = os.path.splitext(file)[0]
        unique = stems[stem] == 1 and stem not in files  # beside a.jpg, a.jpg.png is not a.jpg
        images.append((file, (stem if unique else file)[start:]))
    return images


def settings_digest(
    config: Config, process: Process, files: list[Path], words: Words | None = None, seen: list = ()
) -> str:
    """A digest of what results depend on besides the images: settings, files of weights, words.
    Without words, of what `Segmenter.propose` gives.
    """
    clip = {k: v for k, v in vars(config.clip).items() if words or k not in LATE}
    sizes = (config.data.test_short_edge, config.data.max_size)
    settings = [vars(config.model), process.bf16(config.model.bf16), clip, sizes]
    return digest([*settings, vars(config.eval), words and vars(words), seen], files)


def cached_proposals(
    segmenter: Segmenter, config: Config, process: Process, image: Tensor, path: Path, key: str
) -> Proposals:
    """What `Segmenter.propose` gives for an image [3, h, w]; from a file if an earlier call with
    this key wrote it, else computed and written there. No class is part of it.
    """
    if path.exists():
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            print(f"features {path}: broken, computed again", file=sys.stderr, flush=True)
        elif content.startswith(key.encode(), 32):
            buffer = io.BytesIO(content[32 + len(key) :])
            return Proposals(**torch.load(buffer, process.device, weights_only=True))
    with process.autocast(config.model.bf16):
        proposals = segmenter.propose(image.to(process.device))
    buffer = io.BytesIO()
    torch.save(vars(replace(proposals, class_probs=None, clip_probs=None)), buffer)
    content = key.encode() + buffer.getvalue()
    with atomic_write(path) as temporary:
        temporary.write_bytes(hashlib.sha256(content).digest() + content)
    return proposals


def read_photo(file: str, config: Config) -> tuple[str, list[Tensor], tuple, np.ndarray] | None:
    """Of an image as a viewer would show it: the version of the file (`digest`), network inputs
    uint8 [3, h, w], its size (height, width), a preview for the overlay uint8 [h, w, 3]. None, and
    a line on stderr, if it cannot be read.
    """
    version = digest("", [file])  # before it is read: it may change meanwhile
    try:
        image = read_image(file, shown=True)
    except Exception as error:  # whatever a decoder raises must not end a run of a million
        print(f"{file}: {error}", file=sys.stderr, flush=True)
        return None
    scale = np.clip(max(image.size), *OVERLAY_EDGES) / max(image.size)
    size = [max(round(scale * side), 1) for side in image.size]
    preview = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    inputs = network_inputs(image, config.data, config.eval.sizes)
    return version, inputs, image.size[::-1], preview


@torch.inference_mode()
def segment_image(
    segmenter: Segmenter,
    config: Config,
    process: Process,
    inputs: list[Tensor],
    size: tuple[int, int],
    name: str = "this image",
    proposals: Proposals | None = None,
) -> tuple[Tensor, Tensor]:
    """The class of every pixel and its score, int64 and fp32 `size` (height, width); inputs: uint8
    [3, h, w] at each network-input size; proposals: of the only one, if they are known.

    The score is the sum over the queries of class score x mask. Raises UserError for a score that
    is NaN or infinite.
    """
    inputs = [image.to(process.device, non_blocking=True) for image in inputs]
    with process.autocast(config.model.bf16):
        options = (config.eval.flip, config.eval.window)
        found = segmenter.segment(inputs, size, *options, proposals=proposals)
    if not found.finite:
        why = f"gives scores that are not finite for {name}"
        raise UserError("the model", why, "check its weights, or set model.bf16=off")
    return found.labels, found.scores


def count_classes(
    labels: Tensor, scores: Tensor, names: list[str]
) -> tuple[np.ndarray, list[dict]]:
    """Of a label map and its scores [H, W]: ids of `names` uint8 or uint16 [H, W]; the classes that
    it shows, the largest first, each with id, name, pixels, share and mean score.
    """
    labels = labels.clamp(max=len(names) - 1)  # background words come last
    ids = labels.flatten()
    sums = ids.bincount(scores.flatten().double()).tolist()
    classes = [
        {"id": i, "name": names[i], "pixels": n, "share": n / len(ids), "score": sums[i] / n}
        for i, n in enumerate(ids.bincount().tolist())
        if n
    ]
    classes.sort(key=lambda c: -c["pixels"])
    return labels.cpu().numpy().astype(label_type(len(names))), classes


def colours_of(words: Words) -> np.ndarray:
    """The colour of each of `words.shown_names`, uint8 [C, 3]; grey for background words."""
    colours = palette(len(words.shown_names))[:-1]
    colours[words.shown :] = 96
    return colours


def write_results(
    stem: Path, labels: np.ndarray, preview: np.ndarray, colours: np.ndarray, content: dict
) -> None:
    """<stem>.png, .overlay.jpg and, last, .json with `content`."""
    save_label_map(labels, Path(f"{stem}.png"), len(colours), colours)
    small = Image.fromarray(labels).resize(preview.shape[1::-1], NEAREST)
    legend = [(c["id"], f"{c['name']}  {100 * c['share']:.1f}%") for c in content["classes"]]
    drawn = overlay(preview, np.asarray(small), colours, legend)
    with atomic_write(Path(f"{stem}.overlay.jpg")) as temporary:
        drawn.save(temporary, "JPEG", quality=90)
    write_json(Path(f"{stem}.json"), content)


def find_done(images: list[tuple[str, str]], out: Path, made_with: str) -> set[str]:
    """The images whose results are there already. Raises UserError for results of another image,
    whose place those of one of `images` would take.
    """
    done = set()
    for file, name in images:
        path = out / f"{name}.json"
        try:
            content = json.loads(path.read_text("utf-8"))
            other = content["image"]
            made = (content["version"], content["made_with"])
        except (OSError, ValueError, LookupError, TypeError):
            continue  # none, or a broken one
        if other != file and os.path.exists(other):  # else it was moved
            why = f"is the result of another image, {other}, not of {file}"
            raise UserError(f"file {path}", why, "give another --out")
        whole = all((out / f"{name}{ending}").exists() for ending in (".png", ".overlay.jpg"))
        if whole and made == (digest("", [file]), made_with):
            done.add(file)
    return done


def segment_images(
    segmenter: Segmenter,
    config: Config,
    process: Process,
    words: Words,
    images: list[tuple[str, str]],
    out: Path,
    made_with: str,
    resume: bool = False,
    cache: tuple[Path, str] | None = None,
) -> None:
    """Segment all images, as `find_images` gives them, shared among the processes; with `resume`
    those that are not done yet. `segmenter` has its words; made_with: `settings_digest` with them;
    cache: a folder for what `Segmenter.propose` gives, and the `settings_digest` without words.
    Raises UserError at the end for images that cannot be read.
    """
    folders = [out, *(cache or ())[:1]]
    process.broadcast(lambda: [claim_folder(folder) for folder in folders])
    done = process.broadcast(lambda: find_done(images, out, made_with))
    left = [(file, name) for file, name in images if not (resume and file in done)]
    share = left[process.rank :: process.world_size]
    colours = colours_of(words)
    model = (segmenter, config, process)
    covered = Counter()
    failed = 0
    writing: deque = deque()
    started = time.perf_counter()
    workers = config.data.workers
    photos = parallel(lambda image: read_photo(image[0], config), share, workers, "segment")
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for (file, name), photo in zip(share, photos, strict=True):
            if photo is None:
                failed += 1
                continue
            version, inputs, size, preview = photo
            place = cache and (cache[0] / digest(file), cache[1] + version)
            proposals = cache and cached_proposals(*model, inputs[0], *place)
            found = segment_image(*model, inputs, size, file, proposals)
            labels, classes = count_classes(*found, words.shown_names)
            covered.update({c["name"]: c["share"] for c in classes})
            made = {"image": file, "version": version, "made_with": made_with}
            parts = (labels, preview, colours, made | {"classes": classes})
            writing.append(pool.submit(write_results, out / name, *parts))
            if len(writing) > MAX_WRITING:
                writing.popleft().result()
        for future in writing:
            future.result()

    seconds = time.perf_counter() - started
    failed = sum(process.gather([failed]))
    covered = sum(process.gather([covered]), Counter())
    if process.is_main:
        count = len(left) - failed
        rows = [(name, f"{100 * n / count:.1f}%") for name, n in covered.most_common(MAX_ROWS)]
        print(format_table(("class", "share"), rows))
        before = f", {len(images) - len(left)} done before" if resume else ""
        print(f"{plural(count, 'image')} in {seconds:.1f} s{before} -> {out}")
        why = f"{failed} of {len(images)} cannot be read"
        if failed:
            raise UserError("images", why, "mend those named above, or leave them out")
