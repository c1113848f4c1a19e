"""Self-training (Xu et al. 2021): label maps for the training images in which a teacher fills in
what training hides.
"""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zsseg import checkpoint
from zsseg.build import load_segmenter
from zsseg.config import Config, load_config
from zsseg.data import TestImages, stream
from zsseg.datasets import DataSet, dataset, find_pairs
from zsseg.distributed import Process
from zsseg.files import atomic_write
from zsseg.images import read_values
from zsseg.label_statistics import files_version
from zsseg.utils import UserError, parallel, print_main, progress
from zsseg.visualize import save_label_map


def complete(known: Tensor, scores: Tensor, unseen: Tensor, reject: float, ignore: int) -> Tensor:
    """Labels [H, W] of seen classes or `ignore`, score maps [C, H, W] -> the same with ignored
    pixels filled in.

    A filled-in pixel takes the unseen class (`unseen` [C] bool) with the largest probability, the
    softmax of the scores over all classes; where that is less than `reject` it stays ignored.
    """
    probability, label = (scores.softmax(0) * unseen[:, None, None]).max(0)
    filled = torch.where(probability >= reject, label, ignore)
    return torch.where(known == ignore, filled, known)


@torch.inference_mode()
def pseudo_labels(config: Config, root: Path, folder: Path, process: Process) -> Path:
    """Write a label map (class ids) for every training image that has none in `folder` yet; returns
    the folder.

    A run that was stopped here has no last.pt yet: the same command, without --resume, goes on.

    Seen pixels keep their label; no pixel of an unseen class is read. `folder`/counts.json says how
    many pixels each class has.
    """
    data, pairs = dataset(config.data), find_pairs(config.data, root, "train")
    made = folder / "made_with.json"
    wanted = process.broadcast_object(lambda: origin(config, root, pairs, process))
    if (made.exists() or any(folder.glob("*.png"))) and not same_origin(made, wanted):
        why = "were made by another teacher, with other settings or from other images"
        raise UserError(
            f"pseudo labels in {folder}", why, "delete the folder, or give another --out"
        )
    missing = [i for i in range(len(pairs)) if not (folder / f"{i:06}.png").exists()]
    process.wait()  # all have looked before any writes
    if (folder / "counts.json").exists() and not missing:
        return folder
    if not data.unseen or config.data.train_on != "all":
        raise UserError(
            "train.teacher",
            "fills in unseen classes",
            'use a data set with a split and data.train_on = "all"',
        )
    content = checkpoint.load(config.train.teacher, "train.teacher")
    if process.is_main:
        with atomic_write(made) as file:
            file.write_text(json.dumps(wanted) + "\n", "utf-8")
    theirs = load_config(None, base=content["config"]) if "config" in content else config
    theirs.data = replace(config.data, train_on="seen")
    teacher = load_segmenter(content, theirs, root, config.train.teacher).to(process.device).eval()
    teacher.set_classes(data.names, data.seen)
    unseen = ~teacher.seen
    images = TestImages(theirs.data, root, "train")
    hidden = data.lut(training=True)  # whatever is unseen is the ignore value from here on
    kept = np.full(max(len(data.trained), data.ignore) + 1, data.ignore)
    kept[: len(data.trained)] = data.trained
    images.lut = np.where(hidden == data.ignore, data.ignore, kept[hidden]).astype(hidden.dtype)
    numbers = missing[process.rank :: process.world_size]
    batches, name = (
        stream(images, numbers, 1, config.data.workers),
        process.progress_label("pseudo labels"),
    )
    batches = progress(batches, name, len(numbers), process.is_main)
    for i, [([image], known, _)] in zip(numbers, batches, strict=True):
        with process.autocast(theirs.model.bf16):
            proposals = teacher.propose(image.to(process.device))
        scores = teacher.score_map(teacher.ensemble(proposals), proposals, tuple(known.shape))
        labels = complete(
            known.to(process.device), scores, unseen, config.train.reject, data.ignore
        )
        save_label_map(labels, folder / f"{i:06}.png", len(data.names))
    process.wait()
    if process.is_main:
        count(folder, len(pairs), data, config.data.workers)
    return folder


def origin(
    config: Config, root: Path, pairs: list[tuple[Path, Path]], process: Process
) -> dict[str, object]:
    """What pseudo labels depend on: the teacher's content, the settings that shape its predictions,
    images and label maps.

    The teacher is "", without further files, where it is gone: the labels that it made may still be
    used.
    """
    teacher = ""
    if Path(config.train.teacher).is_file():
        with open(config.train.teacher, "rb") as file:
            teacher = hashlib.file_digest(file, "sha256").hexdigest()
    data, clip = asdict(config.data), asdict(config.clip)
    # Of training, or of evaluation.
    for key in ("workers", "short_edges", "crop", "color_jitter", "split", "train_on"):
        del data[key]
    del clip["chunk"]
    version = files_version(dataset(config.data).folder(root), pairs, b"")
    content = checkpoint.load(config.train.teacher, "train.teacher") if teacher else {}
    theirs = load_config(None, [], content["config"]).clip if "config" in content else config.clip
    others = {}  # files that the teacher reads besides its checkpoint
    for name in (theirs.weights.replace("{root}", str(root)), theirs.prompts):
        if name and Path(name).is_file():
            with open(name, "rb") as file:
                others[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "teacher": teacher,
        "reject": config.train.reject,
        "bf16": process.bf16(config.model.bf16),
        "files": version,
        "data": data,
        "clip": clip,
        "others": others,
    }


def same_origin(made: Path, wanted: dict[str, object]) -> bool:
    """Whether pseudo labels are what `wanted` says, their teacher apart where it is gone."""
    try:
        found = json.loads(made.read_text("utf-8"))
        return found | ({} if wanted["teacher"] else {"teacher": "", "others": {}}) == wanted
    except (OSError, ValueError, TypeError):
        return False


def count(folder: Path, images: int, data: DataSet, workers: int) -> None:
    """Say and write how many pixels every class has. Raises UserError for a broken map."""
    total, bits = np.zeros(65536, np.int64), 8 if len(data.names) <= 255 else 16
    pixels = lambda i: np.bincount(
        read_values(folder / f"{i:06}.png", bits).ravel(), minlength=2**bits
    )
    for found in parallel(pixels, range(images), workers, "count pseudo labels"):
        total[: len(found)] += found
    counts = {name: int(total[i]) for i, name in enumerate(data.names)} | {
        "unlabelled": int(total[data.ignore])
    }
    for name in [*data.unseen, "unlabelled"]:
        print_main(f"pseudo labels: {100 * counts[name] / total.sum():6.2f}% {name}")
    with atomic_write(folder / "counts.json") as file:
        file.write_text(json.dumps(counts, indent=1) + "\n")
