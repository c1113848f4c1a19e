"""Evaluation: the metrics of a split, its images shared among the processes."""

import time
from collections import Counter

import torch

from zsseg.data import TestImages, batches
from zsseg.datasets import dataset
from zsseg.metrics import confusion, report, summarize
from zsseg.utils import UserError, atomic_write, plural, progress, warn
from zsseg.visualize import comparison, palette, samples, save_label_map

SAMPLES = 8  # images in samples.png


def own_images(config, root, process, split, title):
    """This process's share of the images of a split that are measured, see `own_share`."""
    images = TestImages(config.data, root, split, config.eval.sizes)
    numbers = range(len(images))[: config.eval.max_images or None]
    if len(numbers) < len(images):
        warn(f"eval.max_images: the first {len(numbers)} of {len(images)} images")
    return own_share(images, numbers, config, process, f"{title} {split}")


def own_share(images, numbers, config, process, title):
    """This process's share of the `TestImages` with these numbers, on its device, with progress:
    (number, name, network inputs, labels int64 [H, W]).
    """
    numbers = numbers[process.rank :: process.world_size]
    items = batches(images, numbers, None, config.data.workers)
    items = progress(items, title, len(numbers))
    for number, (inputs, labels, name) in zip(numbers, items, strict=True):
        yield number, name, [*map(process.put, inputs)], process.put(labels).long()


@torch.inference_mode()
def evaluate(
    segmenter,
    config,
    root,
    process,
    split,
    out=None,
    save_predictions=False,
    on_image=None,
    seen=None,
):
    """Metrics of a split; with `out`, also on the screen and in metrics.json there, and some images
    in samples.png (rank 0). `segmenter`: a `Segmenter` or a `OneStage`.

    `seen`: ids of the classes that count as seen in the ensemble; None: those that the set is
    trained on. `on_image`: called for every image with its index in the split, its name, uint8
    [3, h, w] at network-input size, class ids int64 [H, W] true (with `ignore`) and predicted,
    pixel counts [C, C]. UserError if the model gives no numbers.
    """
    data = dataset(config.data)
    options = config.eval
    C = len(data.names)
    segmenter.eval().set_classes(data.names, data.trained if seen is None else seen)
    weights = options.weights if options.compare or options.weights else None

    totals = Counter()  # int64: confusion matrices [C, C] and other counts
    comparisons = []
    shown = 0  # pixels of each class in them [C, C], true and predicted
    started = time.perf_counter()
    images = own_images(config, root, process, split, "evaluate")
    for number, name, inputs, labels in images:
        with process.autocast(config.model.bf16):
            size = tuple(labels.shape)
            found = segmenter.segment(inputs, size, options.flip, options.window, weights)
        maps = {"ensemble": found.labels} | found.variants
        counts = {k: confusion(labels, v, C, data.ignore) for k, v in maps.items()}
        matrix = counts["ensemble"]
        if on_image:
            on_image(number, name, inputs[0], labels, found.labels, matrix)
        counts["ignored"] = (labels == data.ignore).sum()  # pixels
        counts["broken"] = 1 - (found.scores >= 0).all().long()  # images
        counts["images"] = torch.tensor(1)
        totals.update(counts)
        if save_predictions:
            save_label_map(found.labels, out / "predictions" / f"{name}.png", C)
        if out and process.is_main and len(comparisons) < SAMPLES:
            comparisons.append(comparison(inputs[0], labels, found.labels, C))
            shown = shown + matrix + matrix.T

    seconds = sum(process.gather([time.perf_counter() - started]))
    result = summarize_totals(totals, data, process)
    result["images_per_second"] = result["images"] * process.world_size / seconds
    if out and process.is_main:
        names = [name + " *" * (name in data.unseen) for name in data.names]
        legend = [(palette(C)[i], name) for i, name in enumerate(names) if shown[i].any()]
        with atomic_write(out / "samples.png") as file:
            samples(comparisons, legend).save(file, "PNG")
        report(result, config, out)
    return result


def summarize_totals(totals, data, process):
    """The metrics from what all processes have counted, some maybe nothing."""
    parts = process.gather([{name: count.cpu() for name, count in totals.items()}])
    totals = Counter()
    for part in parts:
        totals.update(part)
    ignored, broken, images = (int(totals.pop(name)) for name in ("ignored", "broken", "images"))
    if broken:
        why = f"gives scores that are not finite in {plural(broken, 'image')}"
        raise UserError("the model", why, "check its weights, or set model.bf16=off")
    pixels = ignored + int(totals["ensemble"].sum())
    results = {name: summarize(matrix, data) for name, matrix in totals.items()}
    result = results.pop("ensemble") | {"ignored": 100 * ignored / max(pixels, 1)}
    return result | results | {"images": images}
