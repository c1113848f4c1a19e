"""Self-training (Xu et al. 2021): label maps for the training images in which a teacher fills in
the pixels that training ignores.
"""

from itertools import chain

import torch

from zsseg.data import TestImages, batches
from zsseg.datasets import dataset
from zsseg.utils import UserError, digest, print_main, progress, write_json
from zsseg.visualize import save_label_map
from zsseg.weights import checkpoint_and_config, load_segmenter


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
    lut = data.lut()
    lut[data.lut(training=True) == data.ignore] = data.ignore  # unseen classes are not read
    images = TestImages(config.data, root, "train", lut=lut)
    missing = process.broadcast(lambda: missing_maps(config, images, folder))

    content, settings = checkpoint_and_config(train.teacher, None, [])
    teacher = load_segmenter(content, settings, root, train.teacher).to(process.device).eval()
    teacher.set_classes(data.names, data.seen)
    count = torch.zeros(1, device=process.device)  # of pixels filled in
    numbers = missing[process.rank :: process.world_size]
    samples = batches(images, numbers, None, config.data.workers)
    samples = progress(samples, "pseudo labels", len(numbers), process.is_main)
    for number, ([image], labels, _) in zip(numbers, samples, strict=True):
        image = image.to(process.device)
        labels = labels.to(process.device)
        size = tuple(labels.shape)
        with process.autocast(settings.model.bf16):
            scores = teacher.score_map(image, size)
        filled = fill_ignored(labels, scores, ~teacher.seen, train.min_probability, data.ignore)
        count += (filled != labels).sum()
        save_label_map(filled, folder / f"{number:06}.png", len(data.names))
    process.sum(count)  # waits for all processes
    print_main(f"pseudo labels: {int(count)} pixels filled in")
    if len(missing) == len(images) and not count:
        todo = "delete the folder; lower train.min_probability, or take another teacher"
        raise UserError(f"pseudo labels {folder}", "have no pixel of an unseen class", todo)


def missing_maps(config, images, folder):
    """The numbers of the images without a label map; UserError if those in the folder depend on
    something else.
    """
    data = config.data
    settings = [dataset(data), data.test_short_edge, data.max_size, data.exif_turn]
    settings.append(config.train.min_probability)
    files = [config.train.teacher, *chain(*images.pairs)]
    mark = folder / f"{digest(settings, files)}.json"
    if folder.exists() and not mark.exists():
        why = "were made by another teacher, with other settings or from other images"
        todo = "delete the folder, or give another --out"
        raise UserError(f"pseudo labels {folder}", why, todo)
    write_json(mark, config.train.teacher)
    return [i for i in range(len(images)) if not (folder / f"{i:06}.png").exists()]
