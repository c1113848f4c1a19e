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
from zsseg.metrics import confusion, summarize
from zsseg.regions import box_of
from zsseg.segmenter import Segmenter
from zsseg.utils import UserError, atomic_write, plural, progress
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
    """Metrics of a split; with `out`, some images in samples.png there (rank 0). `segmenter` may be
    a `OneStage`.

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

    totals: dict[str, Tensor] = {}  # int64: confusion matrices [C, C] and other counts
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
            if on_truth:  # in the largest input
                image = max(inputs, key=Tensor.numel)
                classes, _, probs = name_gt_masks(segmenter, image, labels, data.ignore)
                counts["regions"] = confusion(classes, probs.argmax(1), C, data.ignore)
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
    if out and process.is_main:
        with atomic_write(out / "samples.png") as file:
            Image.fromarray(np.concatenate(strips, 1)).save(file, "PNG")
    return result | {"images": len(images), "images_per_second": rate}


def summarize_totals(totals: dict[str, Tensor], data: DataSet, process: Process) -> dict:
    """The metrics from what all processes have counted. The first one counts all that others do."""
    shapes = process.broadcast(lambda: {name: count.shape for name, count in totals.items()})
    for name, shape in shapes.items():
        nothing = torch.zeros(shape, dtype=torch.int64, device=process.device)
        totals[name] = process.sum(totals.get(name, nothing))
    if broken := int(totals.pop("broken")):
        why = f"gives scores that are not finite in {plural(broken, 'image')}"
        raise UserError("the model", why, "check its weights, or set model.bf16=off")
    ignored = int(totals.pop("ignored"))
    pixels = ignored + int(totals["ensemble"].sum())
    results = {name: summarize(matrix, data) for name, matrix in totals.items()}
    result = results.pop("ensemble") | {"ignored": 100 * ignored / max(pixels, 1)}
    if regions := results.pop("regions", None):  # CLIP's accuracy on ground-truth masks
        shares = {k.replace("pAcc", "accuracy"): v for k, v in regions.items() if "pAcc" in k}
        result["clip_true_masks"] = shares | {"regions": int(totals["regions"].sum())}
    return result | results


def name_gt_masks(
    segmenter: Segmenter, image: Tensor, labels: Tensor, ignore: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The classes of a label map [T], their masks at the network-input size of `image` [3, H, W],
    bool [T, H, W], and CLIP's class probabilities on these [T, C].
    """
    labels = F.interpolate(labels[None, None].float(), image.shape[-2:], mode="nearest")
    labels = labels[0, 0].long()
    classes = labels.unique()
    classes = classes[classes != ignore]
    masks = labels == classes[:, None, None]
    if segmenter.clip is None:
        return classes, masks, None
    return classes, masks, segmenter.region_logits(image, masks, box_of(masks)).softmax(-1)
