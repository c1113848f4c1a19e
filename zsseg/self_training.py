"""Self-training (Xu et al. 2021): label maps for the training images in which a teacher fills in
the pixels that training ignores.
"""

import json
from itertools import chain

import numpy as np
import torch

from zsseg.data import TestImages
from zsseg.datasets import dataset
from zsseg.evaluate import own_share
from zsseg.images import read_values
from zsseg.utils import UserError, digest, print_main, write_json
from zsseg.visualize import save_label_map
from zsseg.weights import checkpoint_and_config, find_model, load_segmenter


def fill_ignored(labels, scores, unseen, min_probability, ignore):
    """Labels [H, W] of seen classes or `ignore`, score maps [C, H, W] -> labels int64 [H, W] with
    ignored pixels filled in.

    A filled-in pixel takes the unseen class (`unseen` bool [C]) with the largest probability, the
    softmax of the scores over all classes; below `min_probability` it stays ignored.
    """
    probability, best = (scores.softmax(0) * unseen[:, None, None]).max(0)
    filled = torch.where(probability >= min_probability, best, ignore)
    return torch.where(labels == ignore, filled, labels)


@torch.inference_mode()
def pseudo_labels(config, root, folder, process):
    """Write a label map (class ids) for every training image that has none in `folder` yet.

    A run that is stopped here has no last.pt yet: the same command, without --resume, continues.
    Seen pixels keep their label; no pixel of an unseen class is read. Raises UserError for maps
    that were made from something else.
    """
    data = dataset(config.data)
    train = config.train
    if not data.unseen or config.data.train_on != "all":
        todo = 'use a data set with a split and data.train_on = "all"'
        raise UserError("train.teacher", "fills in unseen classes", todo)
    images = TestImages(config.data, root, "train")
    images.lut[data.lut(training=True) == data.ignore] = data.ignore  # unseen ones are not read
    content, settings = checkpoint_and_config(*find_model(train.teacher), [])
    teacher = load_segmenter(content, settings, root, train.teacher)
    process.accelerate(teacher, settings.model, len(images))
    teacher.set_classes(data.names, data.seen)
    files = [folder / f"{name}.png" for name in images.names]
    missing = process.broadcast(lambda: missing_maps(config, images, folder, files))
    unseen = ~teacher.seen
    count = torch.zeros(1, device=process.device)  # of pixels filled in
    for number, _, [image], labels in own_share(images, missing, config, process, "pseudo labels"):
        with process.autocast(settings.model.bf16):
            scores = teacher.score_map(image, tuple(labels.shape))
        filled = fill_ignored(labels, scores, unseen, train.min_probability, data.ignore)
        count += (filled != labels).sum()
        save_label_map(filled, files[number], len(data.names))
    process.sum(count)  # waits for all processes
    print_main(f"pseudo labels: {int(count)} pixels filled in")
    ids = unseen.nonzero().cpu()
    if not any(np.isin(read_values(file, 16), ids).any() for file in files):
        todo = "delete the folder; lower train.min_probability, or take another teacher"
        raise UserError(f"pseudo labels {folder}", "have no pixel of an unseen class", todo)


def missing_maps(config, images, folder, files):
    """The numbers of the images whose label map, of `files`, is not there; UserError if others in
    the folder were made from something else.
    """
    data = config.data
    settings = [dataset(data), data.test_short_edge, data.max_size, data.exif_turn]
    settings += [config.train.min_probability]
    made = {
        "by another teacher": digest([], [config.train.teacher]),
        "with other settings": digest(settings),
        "from other images": digest([], chain(*images.pairs)),
    }
    mark = folder / "made.json"
    before = json.loads(mark.read_text()) if mark.exists() else {}
    other = [how for how, value in made.items() if before.get(how) != value]
    if other and any(file.exists() for file in files):
        todo = "delete the folder, or give another --out"
        raise UserError(f"pseudo labels {folder}", f"were made {', '.join(other)}", todo)
    write_json(mark, made)
    return [i for i, file in enumerate(files) if not file.exists()]
