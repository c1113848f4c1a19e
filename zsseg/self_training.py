"""Self-training (Xu et al. 2021): label maps for the training images in which a teacher fills in
the pixels that training ignores.
"""

from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from zsseg.config import Config, load_config
from zsseg.data import TestImages, batches, label_counter
from zsseg.datasets import DataSet, dataset, find_pairs
from zsseg.distributed import Process
from zsseg.per_pixel import OneStage
from zsseg.utils import UserError, digest, parallel, print_main, progress, read_text, write_json
from zsseg.visualize import save_label_map
from zsseg.weights import load_checkpoint, load_segmenter


def fill_ignored(
    labels: Tensor, scores: Tensor, unseen: Tensor, min_probability: float, ignore: int
) -> Tensor:
    """Labels [H, W] of seen classes or `ignore`, score maps [C, H, W] -> labels int64 [H, W] with
    ignored pixels filled in.

    A filled-in pixel takes the unseen class (`unseen` bool [C]) with the largest probability, the
    softmax of the scores over all classes; below `min_probability` it stays ignored.
    """
    probability, best = (scores.softmax(0) * unseen[:, None, None]).max(0)
    filled = torch.where(probability >= min_probability, best, ignore)
    return torch.where(labels == ignore, filled, labels)


@torch.inference_mode()
def pseudo_labels(config: Config, root: Path, folder: Path, process: Process) -> Path:
    """Write a label map (class ids) for every training image that has none in `folder` yet; returns
    the folder.

    A run that is stopped here has no last.pt yet: the same command, without --resume, continues.
    Seen pixels keep their label; no pixel of an unseen class is read. `folder`/counts.json contains
    the number of pixels of each class. Raises UserError for maps that were made from something
    else, and for a teacher that finds no unseen class.
    """
    data = dataset(config.data)
    if not data.unseen or config.data.train_on != "all":
        todo = 'use a data set with a split and data.train_on = "all"'
        raise UserError("train.teacher", "fills in unseen classes", todo)
    pairs = find_pairs(config.data, root, "train")
    files = [folder / f"{i:06}.png" for i in range(len(pairs))]
    process.broadcast(lambda: check_origin(config, pairs, folder))
    missing = [i for i, file in enumerate(files) if not file.exists()]
    process.wait()  # until no process is still listing the folder
    if not missing and (folder / "counts.json").exists():
        return folder

    content = load_checkpoint(config.train.teacher, "train.teacher")
    settings = load_config(base=content.get("config", asdict(config)))
    teacher = load_segmenter(content, settings, root, config.train.teacher)
    teacher.to(process.device).eval().set_classes(data.names, data.seen)
    lut = data.lut()
    lut[data.lut(training=True) == data.ignore] = data.ignore  # unseen classes are not read
    images = TestImages(config.data, root, "train", lut=lut)
    least = config.train.min_probability
    numbers = missing[process.rank :: process.world_size]
    items = batches(images, numbers, None, config.data.workers)
    items = progress(items, "pseudo labels", len(numbers), process.is_main)
    for i, ([image], labels, _) in zip(numbers, items, strict=True):
        image = image.to(process.device)
        labels = labels.to(process.device)
        size = tuple(labels.shape)
        with process.autocast(settings.model.bf16):
            if isinstance(teacher, OneStage):
                scores = teacher.score_map(image, size)
            else:
                proposals = teacher.propose(image)
                scores = teacher.score_map(teacher.ensemble(proposals), proposals, size)
        labels = fill_ignored(labels, scores, ~teacher.seen, least, data.ignore)
        save_label_map(labels, files[i], len(data.names))
    process.wait()
    process.broadcast(lambda: count_pixels(files, data, config.data.workers))
    return folder


def check_origin(config: Config, pairs: list[tuple[Path, Path]], folder: Path) -> None:
    """Write what the label maps depend on to `folder`/made_with.json; UserError if those in the
    folder depend on something else. Without the teacher, its label maps may still be used.
    """
    clip = replace(config.clip, crop_batch_size=1)  # of a teacher that brings no configuration
    sizes = (config.data.test_short_edge, config.data.max_size, config.data.exif_turn)
    settings = [dataset(config.data), sizes, clip, config.train.min_probability]
    made_with = [digest(settings, chain(*pairs))]
    if Path(config.train.teacher).exists():
        made_with.append(digest("", [config.train.teacher]))
    file = folder / "made_with.json"
    if not file.exists() and not any(folder.glob("*.png")):
        write_json(file, made_with)
    what = f"pseudo labels ({file})"
    todo = "delete the folder, or give another --out"
    text = read_text(file, what, todo)
    if any(part not in text for part in made_with):
        why = "were made by another teacher, with other settings or from other images"
        raise UserError(what, why, todo)


def count_pixels(files: list[Path], data: DataSet, workers: int) -> None:
    """Print the share of each unseen class, and write the pixels of every class to counts.json.
    Raises UserError for a broken map, and if no pixel has an unseen class.
    """
    C = len(data.names)
    count = label_counter(replace(data, values=list(range(C)), bits=8 if C <= 255 else 16))
    total = sum(parallel(count, files, workers, "count pseudo labels")).tolist()
    counts = dict(zip([*data.names, "unlabelled"], total, strict=True))
    for name in [*data.unseen, "unlabelled"]:
        print_main(f"pseudo labels: {100 * counts[name] / sum(total):6.2f}% {name}")
    if not any(counts[name] for name in data.unseen):
        why = "filled no pixel with an unseen class"
        raise UserError("train.teacher", why, "lower train.min_probability, or train it longer")
    write_json(files[0].with_name("counts.json"), counts)
