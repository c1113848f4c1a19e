"""Self-training (Xu et al. 2021): label maps for the training images in which a teacher fills in
the pixels that training ignores.
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


def complete(labels: Tensor, scores: Tensor, unseen: Tensor, reject: float, ignore: int) -> Tensor:
    """Labels [H, W] of seen classes or `ignore`, score maps [C, H, W] -> labels [H, W] with ignored
    pixels filled in.

    A filled-in pixel takes the unseen class (`unseen` bool [C]) with the largest probability, the
    softmax of the scores over all classes; where that is less than `reject` it stays ignored.
    """
    probability, unseen_label = (scores.softmax(0) * unseen[:, None, None]).max(0)
    filled = torch.where(probability >= reject, unseen_label, ignore)
    return torch.where(labels == ignore, filled, labels)


@torch.inference_mode()
def pseudo_labels(config: Config, root: Path, folder: Path, process: Process) -> Path:
    """Write a label map (class ids) for every training image that has none in `folder` yet; returns
    the folder.

    A run that is stopped here has no last.pt yet: the same command, without --resume, continues.
    Seen pixels keep their label; no pixel of an unseen class is read. `folder`/counts.json has the
    number of pixels of each class.
    """
    data = dataset(config.data)
    pairs = find_pairs(config.data, root, "train")
    made_with = folder / "made_with.json"
    expected = process.broadcast_object(lambda: origin(config, root, pairs, process))
    if any(folder.glob("*.png")) or made_with.exists():
        check_origin(made_with, expected)
    missing = [i for i in range(len(pairs)) if not (folder / f"{i:06}.png").exists()]
    process.wait()  # until no process is still listing the folder
    if (folder / "counts.json").exists() and not missing:
        return folder
    if not data.unseen or config.data.train_on != "all":
        todo = 'use a data set with a split and data.train_on = "all"'
        raise UserError("train.teacher", "fills in unseen classes", todo)

    content = checkpoint.load(config.train.teacher, "train.teacher")
    if process.is_main:
        with atomic_write(made_with) as file:
            file.write_text(json.dumps(expected) + "\n", "utf-8")
    theirs = teacher_config(content, config)
    theirs = replace(theirs, data=replace(config.data, train_on="seen"))
    teacher = load_segmenter(content, theirs, root, config.train.teacher).to(process.device).eval()
    teacher.set_classes(data.names, data.seen)
    unseen = ~teacher.seen
    images = TestImages(theirs.data, root, "train")
    images.lut[data.lut(training=True) == data.ignore] = data.ignore  # unseen classes are not read

    numbers = missing[process.rank :: process.world_size]
    batches = stream(images, numbers, 1, config.data.workers)
    label = process.progress_label("pseudo labels")
    batches = progress(batches, label, len(numbers), process.is_main)
    for i, [([image], labels, _)] in zip(numbers, batches, strict=True):
        with process.autocast(theirs.model.bf16):
            proposals = teacher.propose(image.to(process.device))
        scores = teacher.score_map(teacher.ensemble(proposals), proposals, tuple(labels.shape))
        labels = labels.to(process.device)
        labels = complete(labels, scores, unseen, config.train.reject, data.ignore)
        save_label_map(labels, folder / f"{i:06}.png", len(data.names))
    process.wait()
    if process.is_main:
        count(folder, len(pairs), data, config.data.workers)
    return folder


def teacher_config(content: dict[str, object], config: Config) -> Config:
    """The configuration in a checkpoint, or `config` where it has none."""
    return load_config(None, base=content["config"]) if "config" in content else config


def origin(
    config: Config, root: Path, pairs: list[tuple[Path, Path]], process: Process
) -> dict[str, object]:
    """What pseudo labels depend on: images, label maps, settings, and digests of the files that the
    teacher reads. These are left out where the teacher is gone: its labels may still be used.
    """
    data = asdict(config.data)
    # Of training or evaluation only.
    for key in ("workers", "short_edges", "crop", "color_jitter", "split", "train_on"):
        del data[key]
    clip = asdict(config.clip)
    del clip["chunk"]
    result = {
        "reject": config.train.reject,
        "bf16": process.bf16(config.model.bf16),
        "files": files_version(dataset(config.data).folder(root), pairs, b""),
        "data": data,
        "clip": clip,
    }
    if Path(config.train.teacher).is_file():
        content = checkpoint.load(config.train.teacher, "train.teacher")
        theirs = teacher_config(content, config).clip
        files = (config.train.teacher, theirs.weights.replace("{root}", str(root)), theirs.prompts)
        result["teacher"] = [digest(file) for file in files]
    return result


def digest(name: str) -> str:
    """SHA-256 of a file; "" for what is not one, as the name of a published CLIP."""
    if not Path(name).is_file():
        return ""
    with open(name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_origin(file: Path, expected: dict[str, object]) -> None:
    """UserError where existing pseudo labels depend on something else."""
    try:
        made_with = json.loads(file.read_text("utf-8"))
        if "teacher" not in expected:
            del made_with["teacher"]
    except (OSError, ValueError, TypeError, KeyError):
        made_with = None
    if made_with != expected:
        why = "were made by another teacher, with other settings or from other images"
        todo = "delete the folder, or give another --out"
        raise UserError(f"pseudo labels in {file.parent}", why, todo)


def count(folder: Path, images: int, data: DataSet, workers: int) -> None:
    """Print and write how many pixels every class has. Raises UserError for a broken map."""
    bits = 8 if len(data.names) <= 255 else 16

    def pixels(i: int) -> np.ndarray:
        values = read_values(folder / f"{i:06}.png", bits)
        return np.bincount(values.ravel(), minlength=2**bits)

    total = sum(parallel(pixels, range(images), workers, "count pseudo labels"))
    counts = {name: int(total[i]) for i, name in enumerate(data.names)}
    counts["unlabelled"] = int(total[data.ignore])
    for name in [*data.unseen, "unlabelled"]:
        print_main(f"pseudo labels: {100 * counts[name] / total.sum():6.2f}% {name}")
    with atomic_write(folder / "counts.json") as file:
        file.write_text(json.dumps(counts, indent=1) + "\n")
