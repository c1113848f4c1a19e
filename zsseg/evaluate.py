"""Evaluation: the metrics of a split, its images shared among the processes."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from zsseg.config import Config
from zsseg.data import TestImages, batches
from zsseg.datasets import DataSet, dataset
from zsseg.distributed import Process
from zsseg.metrics import confusion, summarize, table
from zsseg.regions import box_of
from zsseg.segmenter import Segmenter
from zsseg.utils import UserError, atomic_write, plural, progress, write_json
from zsseg.visualize import comparison_strip, save_label_map

SAMPLES = 8  # images in samples.png
# Called for every image: (index in the split, name, uint8 [3, h, w] at network-input size, class
# ids int64 [H, W] true (with `ignore`) and predicted, pixel counts [C, C]).
OnImage = Callable[[int, str, Tensor, Tensor, Tensor, Tensor], None]


def own_images(
    images: TestImages, process: Process, workers: int, title: str
) -> Iterator[tuple[int, list[Tensor], Tensor, str]]:
    """This process's part of a split, on its device, with progress: (index, network inputs, labels
    int64 [H, W], name).
    """
    numbers = range(process.rank, len(images), process.world_size)
    samples = batches(images, numbers, None, workers)
    samples = progress(samples, title, len(numbers), process.is_main)
    for number, (inputs, labels, name) in zip(numbers, samples, strict=True):
        inputs = [image.to(process.device) for image in inputs]
        yield number, inputs, labels.to(process.device).long(), name


@torch.inference_mode()
def evaluate(
    segmenter: Segmenter,
    config: Config,
    root: Path,
    process: Process,
    split: str,
    out: Path | None = None,
    save_predictions: bool = False,
    on_image: OnImage | None = None,
    seen: list[int] | None = None,
) -> dict:
    """Metrics of a split; with `out`, written to metrics.json there, with a grid of images
    samples.png (rank 0). `segmenter` may be a `OneStage`.

    `seen`: ids of the classes that count as seen in the ensemble; None: those that the set is
    trained on. `on_image`: see `OnImage`. UserError if the model gives no numbers.
    """
    data = dataset(config.data)
    options = config.eval
    C = len(data.names)
    images = TestImages(config.data, root, split, options.sizes)
    segmenter.eval().set_classes(data.names, data.trained if seen is None else seen)
    weights = options.weights if options.compare or options.weights else None
    on_truth = options.compare and segmenter.clip is not None and config.model.proposals

    totals: dict[str, Tensor] = {}  # int64; confusion matrices and other counts
    strips = []
    started = time.perf_counter()
    for number, inputs, labels, name in own_images(
        images, process, config.data.workers, f"evaluate {split}"
    ):
        with process.autocast(config.model.bf16):
            size = tuple(labels.shape)
            found = segmenter.segment(inputs, size, options.flip, options.window, weights)
            maps = {"ensemble": found.labels} | found.variants
            counts = {k: confusion(labels, v, C, data.ignore) for k, v in maps.items()}
            if on_truth:
                counts["regions"] = gt_mask_accuracy(segmenter, inputs, labels, data)
        counts["ignored"] = (labels == data.ignore).sum()  # pixels
        counts["broken"] = (~found.finite).long()  # images
        totals = {k: totals.get(k, 0) + v for k, v in counts.items()}
        if on_image:
            on_image(number, name, inputs[0], labels, found.labels, counts["ensemble"])
        if save_predictions:
            save_label_map(found.labels, out / "predictions" / f"{name}.png", C)
        if process.is_main and len(strips) < SAMPLES:
            known = labels.where(labels != data.ignore, C)
            shown = [x.cpu() for x in (inputs[0], known, found.labels)]
            strips.append(comparison_strip(*shown, C))

    result = summarize_totals(totals, data, process)
    seconds = torch.tensor(time.perf_counter() - started, device=process.device).double()
    rate = len(images) * process.world_size / float(process.sum(seconds))
    result |= {"images": len(images), "images_per_second": rate}
    if out and process.is_main:
        write(result, strips, config, out)
    return result


def summarize_totals(totals: dict[str, Tensor], data: DataSet, process: Process) -> dict:
    """The metrics from what all processes have counted. The first one counts all that others do."""
    shapes = process.broadcast(lambda: {name: count.shape for name, count in totals.items()})
    for name, shape in shapes.items():
        nothing = torch.zeros(shape, dtype=torch.int64, device=process.device)
        totals[name] = process.sum(totals.get(name, nothing))
    regions = totals.pop("regions", None)
    ignored = int(totals.pop("ignored"))
    if broken := int(totals.pop("broken")):
        why = f"gives scores that are not finite in {plural(broken, 'image')}"
        raise UserError("the model", why, "check its weights, or set model.bf16=off")
    matrix = totals.pop("ensemble")
    result = summarize(matrix, data)
    result["ignored"] = 100 * ignored / max(ignored + int(matrix.sum()), 1)
    result |= {name: summarize(variant, data) for name, variant in totals.items()}
    if regions is not None:
        result["clip_true_masks"] = accuracies(regions, data)
    return result


def accuracies(regions: Tensor, data: DataSet) -> dict:
    """CLIP's accuracy on ground-truth masks in percent, from what `gt_mask_accuracy` counts; None
    for nothing to measure.
    """
    percent = lambda right, total: 100 * right / total if total else None
    right, total = regions.T.tolist()
    found = {"accuracy": percent(sum(right), sum(total)), "regions": sum(total)}
    if data.seen:
        found["accuracy_seen"] = percent(right[0], total[0])
        found["accuracy_unseen"] = percent(right[1], total[1])
    return found


def write(result: dict, strips: list[np.ndarray], config: Config, out: Path) -> None:
    """OUT/metrics.json and OUT/samples.png."""
    try:
        write_json(out / "metrics.json", result)
    except UserError:  # the numbers have cost more than a file
        print(table(result, config))
        raise
    with atomic_write(out / "samples.png") as file:
        Image.fromarray(np.concatenate(strips, 1)).save(file, "PNG")


def gt_masks(image: Tensor, labels: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """The classes of a label map [T] and their masks at the network-input size of `image` [3, H,
    W]: bool [T, H, W].
    """
    labels = F.interpolate(labels[None, None].float(), image.shape[-2:], mode="nearest")
    labels = labels[0, 0].long()
    classes = labels.unique()
    classes = classes[classes != ignore]
    return classes, labels == classes[:, None, None]


def gt_mask_accuracy(
    segmenter: Segmenter, inputs: list[Tensor], labels: Tensor, data: DataSet
) -> Tensor:
    """CLIP only on the ground-truth mask of every class present, in the largest network input:
    int64 [2, 2], rows seen and unseen, right and all.
    """
    image = max(inputs, key=Tensor.numel)
    classes, masks = gt_masks(image, labels, data.ignore)
    right = segmenter.region_logits(image, masks, box_of(masks)).argmax(1) == classes
    seen = torch.isin(classes, classes.new_tensor(data.seen))
    counts = [torch.stack([(right & part).sum(), part.sum()]) for part in (seen, ~seen)]
    return torch.stack(counts)
