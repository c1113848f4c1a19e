"""Segment any images with any words: for each of a list that may be a million long, a label map, an
overlay and a JSON file of its classes.

The list is the same in every process, and each process takes its share. An image is segmented by
itself, so that its results do not depend on the number of processes, nor on how often they were
killed.
"""

import contextlib
import json
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from zsseg.checkpoint import save
from zsseg.images import is_image_name, network_inputs, read_image
from zsseg.segmenter import Proposals
from zsseg.utils import UserError, atomic_write, digest, parallel, plural, split_lines, walk
from zsseg.visualize import GREY, encode, overlay, with_legend, word_colours

OVERLAY_EDGE = 960  # the longer side of an overlay, whatever the image's


def find_images(given, out):
    """(file, name of its results) of the images that `--images` means, sorted: files, all images
    below folders, for `-` those on the lines of standard input. A name is the path below the folder
    that contains all of them, without its ending if it stays unique.

    Raises UserError if there is no image, and for images in the folder of the results, which might
    replace them.
    """
    results = os.path.realpath(out)
    if given == ["-"]:
        given = split_lines(os.fsdecode(sys.stdin.buffer.read().replace(b"\0", b"\n")))
    files = set()
    folders = set()
    for path in [os.path.abspath(word) for word in given if word.strip()]:
        is_folder = os.path.isdir(path)
        files.update(filter(is_image_name, walk(path, results)) if is_folder else [path])
        folders.add(path if is_folder else os.path.dirname(path))
    for folder in folders:
        if Path(os.path.realpath(folder)).is_relative_to(results):
            raise UserError(f"images in {folder}", "are where results go", "give another --out")
    if not files:
        todo = "give images that Pillow reads (.jpg, .png, .webp, .tif, ...)"
        raise UserError("--images", "no image is there", todo)
    base = os.path.commonpath(folders)
    stems = Counter(os.path.splitext(file)[0] for file in files)
    images = []
    for file in sorted(files):
        stem = os.path.splitext(file)[0]
        # Beside a.jpg, a.jpg.png is not a.jpg; nor is a.jpg a beside a folder a.png.
        taken = filter(os.path.isdir, (f"{stem}.png", f"{stem}.overlay.jpg", f"{stem}.json"))
        unique = stems[stem] == 1 and stem not in files and not any(taken)
        images.append((file, os.path.relpath(stem if unique else file, base)))
    return images


def cached_proposals(segmenter, image, path, key):
    """What `Segmenter.propose` gives for an image [3, h, w] on its device; from a file if an
    earlier call with this key wrote it, else computed and written there. It serves any classes.
    """
    with contextlib.suppress(Exception):  # missing, or broken in any way
        found = torch.load(path, image.device, weights_only=True)
        if found.pop("key") == key:
            return Proposals(**found)
    proposals = segmenter.propose(image)
    save(path, key=key, **vars(proposals))
    return proposals


def prepare(image, config):
    """Of an RGB image: network inputs uint8 [3, h, w], its size (height, width), and a preview for
    the overlay.
    """
    scale = OVERLAY_EDGE / max(image.size)
    size = [max(round(scale * side), 1) for side in image.size]
    preview = image.resize(size, Image.Resampling.BILINEAR)
    return network_inputs(image, config.data, config.eval.sizes), image.size[::-1], preview


def read_photo(file, config):
    """The version of an image file (`digest`), and what `prepare` makes of it as a viewer would
    show it. None, and a line on stderr, if it cannot be read.
    """
    version = digest("", [file])  # before it is read: it may change meanwhile
    try:
        return version, *prepare(read_image(file, turn=True), config)
    except Exception as error:  # whatever a decoder raises must not end a run of a million
        print(f"{file}: {error}", file=sys.stderr, flush=True)
        return None


@torch.inference_mode()
def segment_image(segmenter, config, process, inputs, size, name="this image", proposals=None):
    """Start to compute the class of every pixel and its score; inputs: uint8 [3, h, w] at each
    network-input size; proposals: of the only one, if they are known. The result, called, waits for
    both: int64 and fp32 `size` (height, width), on the host.

    The score is the sum over the queries of class score x mask. Raises UserError for a score that
    is NaN or infinite.
    """
    inputs = [*map(process.put, inputs)]
    with process.autocast(config.model.bf16):
        views = (config.eval.flip, config.eval.window)
        found = segmenter.segment(inputs, size, *views, None, proposals)
    fetched = process.fetch(found.labels, found.scores)

    def result():
        labels, scores = fetched()
        if not (scores >= 0).all():  # NaN is not
            why = f"gives scores that are not finite for {name}"
            raise UserError("the model", why, "check its weights, or set model.bf16=off")
        return labels, scores

    return result


def count_classes(labels, scores, names):
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
    return labels.numpy().astype(np.min_scalar_type(len(names))), classes


def colours_of(words):
    """The colour of each of `words.shown_names`, uint8 [C, 3]; grey for background words."""
    colours = word_colours(words.names[: words.shown])
    others = len(words.shown_names) - len(colours)
    return np.pad(colours, ((0, others), (0, 0)), constant_values=GREY)


def result_files(labels, preview, colours, content):
    """The content of an image's results, {ending: bytes}: the last one says that all are there."""
    text = "{name}  {share:.1%}"
    legend = [(colours[c["id"]], text.format(**c)) for c in content["classes"]]
    drawn = with_legend(overlay(preview, labels, colours), legend)
    label_map = Image.fromarray(labels)
    if label_map.mode == "L":
        label_map.putpalette(colours.tobytes())
    return {
        ".png": encode(label_map),
        ".overlay.jpg": encode(drawn, "JPEG", quality=90),
        ".json": json.dumps(content, indent=1, allow_nan=False).encode(),
    }


def write_results(stem, result, preview, words, content):
    """Wait for a `result` of `segment_image` and write its files."""
    labels, classes = count_classes(*result(), words.shown_names)
    parts = (preview, colours_of(words), content | {"classes": classes})
    for ending, content in result_files(labels, *parts).items():
        with atomic_write(Path(f"{stem}{ending}")) as temporary:
            temporary.write_bytes(content)


def is_done(file, stem, made_with):
    """Whether the results of an image are there: .json, the last one, says so. Raises UserError for
    those of another image.
    """
    path = Path(f"{stem}.json")
    try:
        content = json.loads(path.read_text("utf-8"))
        other = content.get("image", file)
    except (AttributeError, OSError, ValueError):
        return False  # none, or a broken one
    if other != file and os.path.exists(other):  # else it was moved
        why = f"is the result of another image, {other}, not of {file}"
        raise UserError(f"file {path}", why, "give another --out")
    same = content.get("made_with") == made_with + digest("", [file])
    return same and os.path.exists(f"{stem}.png")


def segment_images(segmenter, config, process, words, images, out, model, resume, cache):
    """Segment all images, as `find_images` gives them, shared among the processes; with `resume`
    those that are not done yet. `segmenter` has its words; model: a digest of what its proposals
    depend on besides the image; cache: a folder for these.

    Raises UserError at the end for images that cannot be read.
    """
    made_with = digest([model, words, segmenter.seen.tolist()])
    is_ready = lambda file, name: is_done(file, out / name, made_with) and resume
    left = process.broadcast(lambda: [image for image in images if not is_ready(*image)])
    read = 0
    started = time.perf_counter()
    share = left[process.rank :: process.world_size]
    read_one = lambda image: read_photo(image[0], config)
    photos = parallel(read_one, share, config.data.workers, "segment")
    with ThreadPoolExecutor(1) as writer:
        written = writer.submit(bool)
        for (file, name), photo in zip(share, photos, strict=True):
            if photo is None:
                continue
            version, inputs, size, preview = photo
            with process.autocast(config.model.bf16):
                place = cache and (cache / digest(file), model + version)
                proposals = cache and cached_proposals(segmenter, process.put(inputs[0]), *place)
            result = segment_image(segmenter, config, process, inputs, size, file, proposals)
            content = {"image": file, "made_with": made_with + version}
            written.result()  # raises the last one's error
            # What waits for a GPU is another thread: the next image follows at once.
            written = writer.submit(write_results, out / name, result, preview, words, content)
            read += 1
        written.result()

    read = sum(process.gather([read]))
    if process.is_main:
        seconds = time.perf_counter() - started
        print(f"{plural(read, 'image')} in {seconds:.1f} s -> {out}")
        if read < len(left):
            why = f"{len(left) - read} of {len(left)} cannot be read"
            raise UserError("images", why, "mend those named above, or leave them out")
