"""Any images: a label map, an overlay and counts for each of a list that may be a million long.

The list is the same in every process, and cut into groups whose regions share CLIP's batches. A
group is segmented as a whole or not at all, so that what comes out does not depend on how many
processes there are or how often they were killed.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from zsseg.config import Config
from zsseg.data import stream, test_size, to_tensor
from zsseg.datasets import endings
from zsseg.distributed import Process
from zsseg.download import locked
from zsseg.files import MARK, atomic_write, decode, refuse_foreign, result, split_lines, walk
from zsseg.images import image_endings, read_image, remarks_on
from zsseg.segmenter import Segmenter
from zsseg.utils import UserError, did_you_mean_file, left_out, path_of, progress, several
from zsseg.views import all_finite, label_map, segment_views, whole
from zsseg.visualize import label_type, overlay, palette, save_label_map
from zsseg.vocabulary import Words

GROUP_SIZE = 8  # images in a group, at most
EDGES = 480, 1280  # the longer side of an overlay is within these, whatever the image's
MAX_NAME_BYTES = 200  # bytes of a file's name; 255 less what endings and temporary names add
MAX_PENDING_WRITES = 16  # images segmented and not yet written, at most


class Names:
    """The images to segment and the name of each one's results: its path below the folder that all
    of them are in.

    Endings are left out where the name stays unique without.
    """

    def __init__(self, found: list[str]):
        self.base, *self.files = found
        plain = [os.path.splitext(file)[0] for file in self.files]
        self.shared = {name for name, count in Counter(plain).items() if count > 1}
        if len({self[i] for i in range(len(self))}) < len(self):  # a.jpg, a.png and a.jpg.png
            self.shared = set(plain)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> str:
        name = os.path.splitext(self.files[i])[0]
        name = (self.files[i] if name in self.shared else name)[len(self.base) :].lstrip(os.sep)
        folder, last = os.path.split(os.fsencode(name))
        if len(last) > MAX_NAME_BYTES:
            last = (
                last[: MAX_NAME_BYTES - 17].decode(errors="ignore").encode()
                + b"-"
                + hashlib.sha256(last).hexdigest()[:16].encode()
            )
        return os.fsdecode(os.path.join(folder, last))


def find_images(given: list[str], out: Path) -> list[str]:
    """The images that `--images` means, sorted, after the folder that all of them are in.

    Files, folders (all below them that Pillow reads), patterns, `-` for a list on standard input.
    The command says at its end what in the folders was left out. Raises UserError where something
    is not there.
    """
    files, bases, known = set(), [], image_endings()
    results = os.path.join(os.path.realpath(out), "")
    for word in given:
        path = os.fspath(path_of(word))
        if word == "-":
            if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
                raise UserError(
                    "--images -", "cannot be read again after a restart", "give folders or patterns"
                )
            found = listed()
        elif os.path.isdir(path):
            hidden: list[str] = []
            there = list(walk(path, results.rstrip(os.sep), hidden))
            found = [file for file in there if os.path.splitext(file)[1].lower() in known]
            say_what_is_not_taken(sorted({*there}.difference(found)), hidden, out, path)
            bases.append(os.path.abspath(path))
        elif os.path.isfile(path):
            found = [path]
        elif glob.has_magic(path):
            found = matching(path, results, word)
        else:
            raise UserError(
                f"--images {word}",
                "no such file or folder",
                did_you_mean_file(path, "give images, folders, patterns or -"),
            )
        asked = {*map(os.path.dirname, found), *([path] if word != "-" else [])}
        # Label maps might replace images.
        if any(os.path.join(os.path.realpath(f), "").startswith(results) for f in asked):
            raise UserError(
                f"--images {word}", f"lies in {out}, where results go", "give another --out"
            )
        if not found:
            why = "holds no image" if os.path.isdir(path) else "names no image"
            raise UserError(
                f"--images {word}",
                why,
                "give images that Pillow reads (.jpg, .png, .webp, .tif, ...)",
            )
        found = [os.path.abspath(file) for file in found]
        files.update(found)
        if not os.path.isdir(path):
            bases += {os.path.dirname(file) for file in found}
    return [os.path.commonpath(bases), *sorted(files)]


def listed() -> list[str]:
    """The names on standard input, separated by newlines or, if there are any, by zeros."""
    text = decode(sys.stdin.buffer.read() if sys.stdin else b"")
    lines = text.split("\0") if "\0" in text else split_lines(text)
    return [line for line in lines if line.strip()]


def matching(pattern: str, results: str, word: str) -> list[str]:
    """The files that match a pattern, each once, without those below the folder `results`."""
    matches = glob.glob(pattern, recursive=True)
    links = {file: os.path.realpath(file) for file in matches if os.path.isfile(file)}
    files_in = sorted(
        (file for file in links if not links[file].startswith(results)), key=len, reverse=True
    )
    found = list({links[file]: file for file in files_in}.values())  # links may loop
    if "**" not in pattern and (folders := sum(map(os.path.isdir, matches))):
        left_out(f"{several(folders, 'folder')} that {word} names (** looks into folders)")
    if twice := len(files_in) - len(found):
        left_out(f"{several(twice, 'link')} to images that {word} names already")
    return found


def say_what_is_not_taken(others: list[str], hidden: list[str], out: Path, folder: str) -> None:
    """Have the command say what in a folder is left out: files of other kinds, hidden ones, images
    among the results.
    """
    if others:
        left_out(
            f"{several(len(others), 'file')} that Pillow does not read as images "
            f"({endings(others)})"
        )
    if hidden:
        left_out(several(len(hidden), "hidden file or folder", "hidden files and folders"))
    if (
        os.path.realpath(out).startswith(os.path.join(os.path.realpath(folder), ""))
        and out.is_dir()
    ):
        files = set(walk(out))
        # Results have one beside them.
        made = {file.removesuffix(".json") for file in files if file.endswith(".json")}
        stem = lambda file: (
            file.removesuffix(".overlay.jpg")
            if file.endswith(".overlay.jpg")
            else os.path.splitext(file)[0]
        )
        foreign = [
            f
            for f in files
            if os.path.splitext(f)[1].lower() in image_endings() and stem(f) not in made
        ]
        if foreign:
            left_out(f"{several(len(foreign), 'image')} in {out}, where results go")


@dataclass
class InputImage:
    """What an image's label map and overlay are made of; only the error where it cannot be
    read.
    """

    number: int
    images: list[Tensor]  # uint8 [3, h, w] at each network-input size
    shown: Tensor | None  # uint8 [3, h, w] of the overlay
    size: tuple[int, int]  # (H, W) of its own
    version: list[int]  # see `version_of`
    pages: int = 0  # beside the first
    error: str = ""

    def pin_memory(self) -> "InputImage":
        return replace(self, images=[image.pin_memory() for image in self.images])


class InputImages(Dataset):
    """Images as a viewer would show them, at the network's sizes."""

    def __init__(self, files: list[str], config: Config):
        self.files, self.config = files, config

    def __getitem__(self, i: int) -> InputImage:
        try:
            version = version_of(self.files[i])
            image = read_image(self.files[i], shown=True)
        except (
            Exception
        ) as error:  # whatever a decoder makes of a file must not end a run of a million
            why = error.args[1] if isinstance(error, UserError) else repr(error)
            return InputImage(
                i,
                [],
                None,
                (0, 0),
                [],
                error=why if os.path.exists(self.files[i]) else "no such file",
            )
        data, edges = self.config.data, self.config.eval.sizes or [self.config.data.test_short_edge]
        resized = lambda size: to_tensor(image.resize(size, Image.Resampling.BILINEAR))
        longest = max(image.size)
        scale = min(max(longest, EDGES[0]), EDGES[1]) / longest
        shown = tuple(max(round(scale * side), 1) for side in image.size)
        images = [resized(test_size(*image.size, edge, data.max_size)) for edge in edges]
        return InputImage(
            i, images, resized(shown), image.size[::-1], version, remarks_on(Path(self.files[i]))[1]
        )


def version_of(file: str) -> list[int]:
    """A file's size in bytes and when it was changed, in ns: another image, or a new one of that
    name, has others.
    """
    stat = os.stat(file)
    return [stat.st_size, stat.st_mtime_ns]


class Results:
    """Writes what was found in an image: OUT/<name>.png, .overlay.jpg and, last, .json. Safe to
    call from threads.
    """

    def __init__(self, out: Path, names: Names, words: Words, made_with: str):
        self.out, self.names, self.words, self.made_with = out, names, words, made_with
        C = len(words.shown_names)
        self.colours = palette(C)[:-1]
        if words.shown < C:
            self.colours[-1] = 96  # grey

    def file(self, number: int, ending: str) -> Path:
        return self.out / (self.names[number] + ending)

    def refuse_foreign(self, numbers: list[int]) -> None:
        """UserError where a result would take the place of a file that this program did not write,
        or of another image's.
        """
        if not any(self.out.iterdir()):
            return
        read_failed(self.out)
        for number in numbers:
            refuse_foreign(
                *(self.file(number, ending) for ending in (".png", ".overlay.jpg", ".json"))
            )
            other, image = self.image(number), self.names.files[number]
            if other not in ("", image) and os.path.exists(other):  # else it was moved
                why = f"is the result of another image, {other}, not of {image}"
                raise UserError(f"file {self.file(number, '.json')}", why, "give another --out")

    def image(self, number: int) -> str:
        """The image whose result there is; "" where there is none, or a broken one."""
        try:
            return str(json.loads(self.file(number, ".json").read_text("utf-8"))["image"])
        except (OSError, ValueError, TypeError, KeyError):
            return ""

    def counts(self, number: int) -> dict[int, int] | None:
        """The pixels of each class in an image that is done as it is, with these words and
        settings; else None.
        """
        try:
            content = json.loads(self.file(number, ".json").read_text("utf-8"))
            # Else it was moved.
            if content["image"] != self.names.files[number] and os.path.exists(content["image"]):
                return None
            if content["made_with"] != self.made_with or content["version"] != version_of(
                self.names.files[number]
            ):
                return None
            if not all(self.file(number, ending).exists() for ending in (".png", ".overlay.jpg")):
                return None
            return {c["id"]: c["pixels"] for c in content["classes"]}
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write(
        self, item: InputImage, labels: np.ndarray, pixels: list[int], scores: list[float]
    ) -> None:
        """labels uint8 or uint16 [H, W]; pixels and the sum of scores of each class that is
        shown.
        """
        shown, total = self.words.shown_names, labels.size
        order = sorted((i for i, n in enumerate(pixels) if n), key=lambda i: -pixels[i])
        save_label_map(labels, self.file(item.number, ".png"), len(shown), self.colours)
        image = item.shown.permute(1, 2, 0).numpy()
        small = np.asarray(
            Image.fromarray(labels).resize(image.shape[1::-1], Image.Resampling.NEAREST)
        )
        legend = [(i, f"{shown[i]}  {100 * pixels[i] / total:.1f}%") for i in order]
        with result(self.file(item.number, ".overlay.jpg")) as file:
            overlay(image, small, self.colours, legend).save(file, "JPEG", quality=90, comment=MARK)
        classes = [
            {
                "id": i,
                "name": shown[i],
                "pixels": pixels[i],
                "share": round(pixels[i] / total, 6),
                "score": round(scores[i] / pixels[i], 4),
            }
            for i in order
        ]
        content = {
            "program": MARK,
            "image": self.names.files[item.number],
            "height": labels.shape[0],
            "width": labels.shape[1],
            "version": item.version,
        }
        with result(self.file(item.number, ".json")) as file:
            text = json.dumps(
                content | {"classes": classes, "made_with": self.made_with},
                indent=1,
                allow_nan=False,
            )
            file.write_text(text + "\n")


def made_with(segmenter: Segmenter, config: Config, words: Words, process: Process) -> str:
    """A digest of all that results depend on, the images apart; `segmenter` has its vocabulary."""
    clip, model, data = (
        asdict(config.clip),
        asdict(config.model),
        (config.data.test_short_edge, config.data.max_size),
    )
    del clip["chunk"], model["compile"], model["kernels"]  # a matter of memory and time
    del clip["weights"], clip["prompts"], model["weights"]  # what was read from there is below
    model["bf16"] = process.bf16(config.model.bf16)
    # Of the vocabulary file, what it makes of these words.
    tokens = (
        []
        if segmenter.clip is None
        else [segmenter.clip.tokenizer.encode(name) for name in words.names]
    )
    settings = [
        clip,
        model,
        asdict(config.eval),
        data,
        asdict(words),
        segmenter.seen.tolist(),
        tokens,
    ]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in segmenter.state_dict().items():
        digest.update(
            name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def group_size(segmenter: Segmenter, config: Config, device: torch.device) -> int:
    """Images whose crops fill a batch of CLIP's."""
    if segmenter.clip is None or config.clip.regions != "crops" or not config.model.proposals:
        return 1
    if device.type == "cuda":
        return GROUP_SIZE  # many queries have no region
    return 1


@torch.inference_mode()
def segment_images(
    segmenter: Segmenter, config: Config, results: Results, process: Process, resume: bool
) -> None:
    """Segment all images, each once, shared among the processes; with `resume` those that are not
    done yet.

    `segmenter` has its vocabulary. At the end, OUT/failed.txt lists images that cannot be read,
    which are a UserError unless torchrun would start again for it.
    """
    names, words, out, device = results.names, results.words, results.out, process.device
    C, size, failed = len(words.shown_names), group_size(segmenter, config, device), []
    totals = np.zeros((C, 2), np.int64)  # pixels, images that show the class
    # Segmented, done before, failed, pages beside the first of an image.
    tally = torch.zeros(4, dtype=torch.int64)
    groups = [range(i, min(i + size, len(names))) for i in range(0, len(names), size)]
    missing = torch.zeros(len(groups), dtype=torch.uint8)
    share_out(out, process)
    process.check_all(
        lambda: results.refuse_foreign(range(process.rank, len(names), process.world_size))
    )
    if resume:
        look_for_results(results, groups, missing, totals, tally, process)
    else:
        missing[process.rank :: process.world_size] = 1
    left = process.sum(missing).nonzero()[:, 0]  # what is left is shared anew
    mine = left[process.rank :: process.world_size].tolist()
    numbers = [i for g in mine for i in groups[g]]
    started, writing = time.perf_counter(), deque()
    batches = stream(InputImages(names.files, config), numbers, size, config.data.workers)
    with ThreadPoolExecutor(max(config.data.workers, 1)) as pool:
        segmented = segment_groups(segmenter, config, batches, process, words, names)
        for image, labels, pixels, scores in progress(
            segmented, process.progress_label("segment"), len(numbers), process.is_main
        ):
            tally[2 if image.error else 0] += 1
            tally[3] += image.pages
            if image.error:
                failed.append(f"{names.files[image.number]}: {image.error}")
                continue
            totals += np.stack([pixels, pixels > 0], 1)
            writing.append(
                pool.submit(results.write, image, labels, pixels.tolist(), scores.tolist())
            )
            while len(writing) > MAX_PENDING_WRITES:
                writing.popleft().result()
        for future in writing:
            future.result()
    for tensor in (torch.from_numpy(totals), tally):  # which share their memory
        process.sum(tensor)
    seconds = time.perf_counter() - started
    failed = process.gather(failed)
    if process.is_main:
        note_failed(out, names, failed)
        report(totals, tally.tolist(), words, out, seconds, failed)


def look_for_results(
    results: Results,
    groups: list[range],
    missing: Tensor,
    totals: np.ndarray,
    tally: Tensor,
    process: Process,
) -> None:
    """Add what is done already to `totals` and `tally`; `missing` is 1 for groups that are not."""
    share = range(process.rank, len(groups), process.world_size)
    with ThreadPoolExecutor() as pool:
        for g in progress(
            share, process.progress_label("look for results"), len(share), process.is_main
        ):
            before = list(pool.map(results.counts, groups[g]))
            if None in before:
                missing[g] = 1
                continue
            tally[1] += len(groups[g])
            for found in before:
                for i, pixels in found.items():
                    totals[i] += pixels, 1


def share_out(out: Path, process: Process) -> None:
    """Make the folder of the results; UserError where it cannot be filled or shared."""
    locks = []

    def fill() -> str:
        """Write a file of this run's own, since others may use the folder, too; remove those that a
        kill has left.
        """
        try:
            out.mkdir(parents=True, exist_ok=True)
            for left in out.glob(".shared-*"):
                with contextlib.suppress(OSError), open(left, "w") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    left.unlink()
            token = f".shared-{uuid.uuid4().hex}"
            locks.append(open(out / token, "w"))  # noqa: SIM115
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(locks[0], fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"output {out}",
                f"cannot be written ({error.strerror})",
                "check the folder and the disk",
            ) from None
        return token

    token = out / process.broadcast_object(fill)
    shared = token.exists()
    process.wait()
    if process.is_main:
        token.unlink(missing_ok=True)
        locks[0].close()
    if process.any(not shared):
        raise UserError(
            f"output {out}",
            "is not one folder for all processes",
            "put it where all machines see the same files",
        )


def read_failed(out: Path) -> list[str]:
    """The lines of OUT/failed.txt, "image: reason"; UserError for one that this program did not
    write.
    """
    file = out / "failed.txt"
    if not file.exists():
        return []
    lines = split_lines(decode(file.read_bytes()))
    if not lines or not all(line.startswith("/") and ": " in line for line in lines):
        raise UserError(
            f"file {file}",
            "is there, and not one that this program wrote",
            "give another --out, or move it",
        )
    return lines


def note_failed(out: Path, names: Names, failed: list[str]) -> None:
    """Bring OUT/failed.txt up to date: a line for every image that could not be read, those of
    other runs are kept.
    """
    file, mine = out / "failed.txt", {name.replace("\n", "\\n") for name in names.files}
    failed = [line.replace("\n", "\\n") for line in failed]
    with locked(out):
        lines = read_failed(out)
        others = [(line, line.partition(": ")[0]) for line in lines]
        lines = {
            line for line, image in others if image not in mine and os.path.exists(image)
        } | set(failed)
        if not lines:
            file.unlink(missing_ok=True)
            return
        with atomic_write(file) as temporary:
            text = "\n".join(sorted(lines)) + "\n"
            temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def segment_groups(
    segmenter: Segmenter,
    config: Config,
    batches: Iterator,
    process: Process,
    words: Words,
    names: Names,
) -> Iterator:
    """For every image (it, labels uint8 or uint16 [H, W], pixels [C] and sum of scores [C] of the
    shown classes).
    """
    C, wanted = len(words.shown_names), config.eval
    alone = bool(wanted.sizes or wanted.flip or wanted.window)
    for group in batches:
        whole_ones = [item for item in group if not item.error]
        images = [
            [image.to(process.device, non_blocking=True) for image in p.images] for p in whole_ones
        ]
        with process.autocast(config.model.bf16):
            if alone:
                views = [
                    segment_views(segmenter, i, p.size, wanted.flip, wanted.window)
                    for i, p in zip(images, whole_ones, strict=True)
                ]
            else:
                proposals = [segmenter.propose(i[0]) for i in images]
                views = [
                    [whole(p, item.size)] for p, item in zip(proposals, whole_ones, strict=True)
                ]
        found = iter(views)
        for item in group:
            if item.error:
                yield item, None, None, None
                continue
            parts = next(found)
            scores = [segmenter.ensemble(v.proposals) for v in parts]
            if not all_finite(parts, scores):
                todo = "check the checkpoint, or set model.bf16=off"
                raise UserError(
                    "the model",
                    f"gives scores that are not finite for {names.files[item.number]}",
                    todo,
                )
            labels, top = label_map(segmenter, parts, scores, item.size)
            # Background words come last.
            labels = labels.clamp(max=C - 1) if words.shown < len(words.names) else labels
            pixels = torch.bincount(labels.flatten(), minlength=C)
            scores = torch.bincount(labels.flatten(), top.flatten().double(), minlength=C)
            kind = torch.uint8 if label_type(C) is np.uint8 else torch.int32
            yield (
                item,
                labels.to(kind).cpu().numpy().astype(label_type(C)),
                pixels.cpu().numpy(),
                scores.cpu(),
            )


def report(
    totals: np.ndarray, tally: list[int], words: Words, out: Path, seconds: float, failed: list[str]
) -> None:
    """Print how much of the images each class covers. Images that could not be read are a UserError
    unless torchrun would start again for it.
    """
    segmented, before, broken, pages = tally
    if pages:
        left_out(
            f"{several(pages, 'page or frame', 'pages or frames')} of images that have more "
            f"than one"
        )
    pixels = max(int(totals[:, 0].sum()), 1)
    rows = sorted(
        (row for row in zip(totals.tolist(), words.shown_names, strict=True) if row[0][0]),
        reverse=True,
    )
    if rows:
        print(f"{'class':32}{'share':>8}{'images':>10}")
    for (share, images), name in rows[:30]:
        print(f"{name[:31]:32}{100 * share / pixels:7.1f}%{images:10}")
    if len(rows) > 30:
        print(f"and {len(rows) - 30} more")
    absent = [
        name for name, pixels in zip(words.shown_names, totals[:, 0], strict=True) if not pixels
    ]
    if rows and absent:
        print("not found:", ", ".join(absent) if len(absent) <= 20 else f"{len(absent)} classes")
    done = f", {before} done before" if before else ""
    counted = f"{segmented} image{'s' * (segmented != 1)}"
    print(f"{counted} in {seconds:.1f} s, {segmented / seconds:.2f} images/s{done} -> {out}")
    if failed:
        why = f"{broken} of {segmented + before + broken} failed, the first: {min(failed)}"
        problem = UserError("images", why, f"see {out / 'failed.txt'}")
        if not int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            raise problem
        print(f"error: {problem}", file=sys.stderr)  # torchrun would start all over again
