"""Evaluation: the metrics of a split, its images shared among the processes."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from zsseg.config import Config
from zsseg.data import TestImages, stream
from zsseg.datasets import DataSet, dataset
from zsseg.distributed import Process
from zsseg.files import MARK, PNG_MARK, refuse_foreign
from zsseg.files import result as written
from zsseg.metrics import confusion, method, summarize, table
from zsseg.regions import mask_boxes
from zsseg.segmenter import Segmenter
from zsseg.utils import UserError, progress, several
from zsseg.views import View, all_finite, label_map, segment_views
from zsseg.visualize import comparison_strip, save_label_map

SAMPLES = 8  # images in samples.png
# What is called with an image's number in the split, its name, uint8 [3, h, w] at network-input
# size, class ids int64 [H, W] true (with `ignore`) and predicted, pixel counts [C, C].
OnImage = Callable[[int, str, Tensor, Tensor, Tensor, Tensor], None]


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
    """Metrics of a split, its images shared among the processes; with `out`, written to
    metrics.json there, with a grid of images (rank 0).

    `seen`: ids of the classes that count as seen in the ensemble; those that the set is trained on
    where None. `on_image` is called with every image of this process, see `OnImage`.
    """
    data, wanted, device = dataset(config.data), config.eval, process.device
    images = TestImages(config.data, root, split, wanted.sizes)
    if save_predictions:  # now, not in the middle
        files = [out / "predictions" / f"{name}.png" for name in images.names]
        process.broadcast_object(lambda: refuse_foreign(*files))
    segmenter.eval().set_classes(data.names, data.trained if seen is None else seen)

    C = len(data.names)
    parts = segmenter.variant_names(wanted.weights) if wanted.compare or wanted.weights else []
    counts = Counts.zeros(["", *parts], C, device)
    numbers = range(process.rank, len(images), process.world_size)
    batches, title = stream(images, numbers, 1, config.data.workers), f"evaluate {split}"
    batches = progress(batches, process.progress_label(title), len(numbers), process.is_main)
    samples, started = [], time.perf_counter()
    for number, [(inputs, labels, name)] in zip(numbers, batches, strict=True):
        inputs, labels = [image.to(device) for image in inputs], labels.to(device).long()
        size = tuple(labels.shape)
        with process.autocast(config.model.bf16):
            views = segment_views(segmenter, inputs, size, wanted.flip, wanted.window)
            if wanted.compare and parts:
                counts.regions += gt_mask_accuracy(segmenter, inputs[0], labels, data)
        scores = [segmenter.ensemble(view.proposals) for view in views]
        counts.broken += ~all_finite(views, scores)
        counts.ignored += (labels == data.ignore).sum()

        predicted, _ = label_map(segmenter, views, scores, size)
        matrix = confusion(labels, predicted, C, data.ignore)
        counts.matrices[""] += matrix
        if on_image:
            on_image(number, name, inputs[0], labels, predicted, matrix)
        if save_predictions:
            save_label_map(predicted, out / "predictions" / f"{name}.png", C)
        if process.is_main and len(samples) < SAMPLES:
            known = labels.where(labels != data.ignore, C)
            samples.append(comparison_strip(inputs[0].cpu(), known.cpu(), predicted.cpu(), C))
        count_variants(segmenter, views, labels, wanted.weights, counts, data.ignore)

    rate = len(images) * process.world_size / counts.reduce(process, started)
    result = counts.metrics(data, regions=wanted.compare and bool(parts))
    result |= {"images": len(images), "images_per_second": rate}
    if out is not None and process.is_main:
        write(result, samples, config, out)
    return result


def count_variants(
    segmenter: Segmenter,
    views: list[View],
    labels: Tensor,
    weights: list[float],
    counts: "Counts",
    ignore: int,
) -> None:
    """Count an image's pixels as the method's parts and other weights label them, too."""
    parts = [name for name in counts.matrices if name]
    variants = [segmenter.variants(view.proposals, weights) for view in views if parts]
    for part in parts:
        scores = [variant[part] for variant in variants]
        predicted, _ = label_map(segmenter, views, scores, tuple(labels.shape))
        counts.matrices[part] += confusion(labels, predicted, scores[0].shape[1], ignore)


@dataclass
class Counts:
    """What an evaluation counts, on the device."""

    matrices: dict[
        str, Tensor
        # pixels int64 [C, C]: "" of the evaluation itself, and of parts and other weights
    ]
    regions: Tensor  # int64 [2, 2]: seen, unseen x right, all
    ignored: Tensor  # pixels
    broken: Tensor  # images with scores that are not finite

    @classmethod
    def zeros(cls, names: list[str], classes: int, device: torch.device) -> "Counts":
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.int64, device=device)
        return cls({name: zeros(classes, classes) for name in names}, zeros(2, 2), zeros(), zeros())

    def reduce(self, process: Process, started: float) -> float:
        """Sum over the processes; the seconds that they took together since `started`."""
        seconds = torch.tensor(time.perf_counter() - started, device=process.device).double()
        for tensor in (*self.matrices.values(), self.regions, seconds, self.ignored, self.broken):
            process.sum(tensor)
        return float(seconds)

    def metrics(self, data: DataSet, regions: bool) -> dict:
        """All of them, with `regions` CLIP's accuracy, too; UserError where the model gave no
        numbers.
        """
        if self.broken:
            why = f"gives scores that are not finite in {several(int(self.broken), 'image')}"
            raise UserError("the model", why, "check its weights, or set model.bf16=off")
        pixels = int(self.matrices[""].sum()) + int(self.ignored)
        result = summarize(self.matrices[""], data)
        result["ignored"] = 100 * int(self.ignored) / max(pixels, 1)
        for name, matrix in self.matrices.items():
            if name:
                result[name] = summarize(matrix, data)
        if regions:
            result["clip_true_masks"] = accuracies(self.regions, data)
        return result


def accuracies(regions: Tensor, data: DataSet) -> dict:
    """CLIP's accuracy on ground-truth masks in percent, from what `true_mask_accuracy` counts; null
    where there is none.
    """
    right, total = regions.T.tolist()
    share = lambda part, all_of: 100 * part / all_of if all_of else None
    found = {"accuracy": share(sum(right), sum(total)), "regions": sum(total)}
    if data.seen:
        found |= {
            "accuracy_seen": share(right[0], total[0]),
            "accuracy_unseen": share(right[1], total[1]),
        }
    return found


def write(result: dict, samples: list[np.ndarray], config: Config, out: Path) -> None:
    """OUT/metrics.json and OUT/samples.png."""
    try:
        with written(out / "metrics.json") as file:
            file.write_text(
                json.dumps({"program": MARK} | result, indent=1, allow_nan=False) + "\n"
            )
    except UserError:  # the numbers have cost more than a file
        print(table(result, method(config), dataset(config.data).unseen))
        raise
    with written(out / "samples.png") as file:
        Image.fromarray(np.concatenate(samples, 1)).save(file, "PNG", pnginfo=PNG_MARK)


def gt_masks(image: Tensor, labels: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """The classes of a label map [T] and their masks at the network-input size of `image` [3, H,
    W]: bool [T, H, W].
    """
    labels = F.interpolate(labels[None, None].float(), image.shape[-2:], mode="nearest")[
        0, 0
    ].long()
    classes = labels.unique()
    classes = classes[classes != ignore]
    return classes, labels == classes[:, None, None]


def gt_mask_accuracy(segmenter: Segmenter, image: Tensor, labels: Tensor, data: DataSet) -> Tensor:
    """CLIP only on the ground-truth mask of every class present: int64 [2, 2], rows seen and
    unseen, right and all.
    """
    classes, masks = gt_masks(image, labels, data.ignore)
    right = segmenter.region_logits(image, masks, mask_boxes(masks)[0]).argmax(1) == classes
    seen = segmenter.seen[classes]
    return torch.stack(
        [torch.stack([(right & chosen).sum(), chosen.sum()]) for chosen in (seen, ~seen)]
    )
