"""What limits the accuracy: the masks or the classes? Oracles that replace one of them by the
truth.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from zsseg.config import Config
from zsseg.data import TestImages, stream
from zsseg.datasets import DataSet, dataset
from zsseg.distributed import Process
from zsseg.evaluate import true_masks
from zsseg.files import MARK, PNG_MARK
from zsseg.files import result as written
from zsseg.metrics import confusion, percent, summarize
from zsseg.regions import mask_boxes
from zsseg.segmenter import Proposals, Segmenter
from zsseg.utils import UserError, progress

ROWS = {
    "as_is": "as it is",
    "true_classes": "predicted masks, true classes",
    "true_masks": "true masks, predicted classes",
    "both": "true masks, true classes",
}
OVERLAPS = (0.5, 0.7, 0.9)


def overlaps(ours: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """IoU of masks bool [Q, H, W] with true masks bool [T, H, W], over the pixels `known` bool [H,
    W]: fp32 [Q, T].
    """
    ours, truth = (ours & known).flatten(1).float(), truth.flatten(1).float()
    both = ours @ truth.T
    return both / (ours.sum(1)[:, None] + truth.sum(1) - both).clamp(min=1)


def oracle_labels(
    segmenter: Segmenter, image: Tensor, labels: Tensor, data: DataSet, autocast: Callable
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """One image: a label map for every row of ROWS, each true mask's best overlap [T], and what
    CLIP says [2, T].

    "true_classes": each true mask's proposal (best total overlap, one to one) gets its class, all
    others none. "true_masks": the pixels of a true mask get the class that its proposal's head and
    CLIP, on the true mask, decide together. Masks are those at network-input size: a class that
    vanishes there counts as wrong in both rows with true masks.
    """
    with autocast():
        proposals, size = segmenter.propose(image), tuple(labels.shape)
    classes, masks = true_masks(image, labels, data.ignore)  # [T], [T, H, W]
    maps = {"as_is": segmenter.label_map(segmenter.ensemble(proposals), proposals, size)[0]}
    known = masks.any(0)
    overlap = overlaps(segmenter.binary_masks(proposals), masks, known)
    query, target = (
        torch.from_numpy(x).to(image.device) for x in linear_sum_assignment(-overlap.cpu().numpy())
    )
    scores = torch.zeros_like(proposals.class_probs)
    scores[query, classes[target]] = (overlap[query, target] > 0).float()
    maps["true_classes"] = segmenter.label_map(scores, proposals, size)[0]
    # A true mask without proposal: CLIP decides alone.
    head = proposals.class_probs.new_ones(len(classes), len(data.names))
    touching = overlap[query, target] > 0
    head[target[touching]] = proposals.class_probs[query[touching]]
    region = None
    if segmenter.clip is not None:
        with autocast():
            region = segmenter.region_logits(image, masks, mask_boxes(masks)[0]).softmax(-1)
    valid = torch.ones(len(classes), dtype=torch.bool, device=image.device)
    both = Proposals(
        proposals.mask_logits,
        proposals.input_size,
        head,
        region if segmenter.config.ensemble else None,
        valid,
    )
    chosen = segmenter.ensemble(both).argmax(1)
    for row, decided in (("true_masks", chosen), ("both", classes)):
        table = (
            torch.arange(max(data.ignore, len(data.names)) + 1, device=image.device) + 1
        ) % len(data.names)
        table[classes] = decided
        maps[row] = table[labels]
    named = region.argmax(1) if region is not None else chosen
    return (
        maps,
        overlap.amax(0) if len(overlap) else overlap.new_zeros(len(classes)),
        torch.stack([classes, named]),
    )


@torch.inference_mode()
def budget(
    segmenter: Segmenter,
    config: Config,
    root: Path,
    process: Process,
    split: str,
    seen: list[int] | None = None,
) -> dict:
    """The metrics of every row, the recall of the proposals, and CLIP's confusions on true masks,
    over a split.

    `seen`: ids of the classes that count as seen in the ensemble; those that the set is trained on
    where None.
    """
    if not config.model.proposals:
        raise UserError(
            "--budget", "needs mask proposals", "give a checkpoint with model.proposals = true"
        )
    if config.eval.sizes or config.eval.flip or config.eval.window:
        raise UserError(
            "--budget",
            "measures one view of an image",
            "leave eval.sizes, eval.flip and eval.window out",
        )
    data, images = dataset(config.data), TestImages(config.data, root, split)
    C, device = len(data.names), process.device
    segmenter.set_classes(data.names, data.trained if seen is None else seen)
    segmenter.eval()
    matrices = {row: torch.zeros(C, C, dtype=torch.int64, device=device) for row in ROWS}
    named = torch.zeros(C, C, dtype=torch.int64, device=device)
    # Of every overlap, the masks recalled; then the sum of overlaps, and the masks.
    best = torch.zeros(len(OVERLAPS) + 2, dtype=torch.float64, device=device)
    numbers = range(process.rank, len(images), process.world_size)
    batches, name = (
        stream(images, numbers, 1, config.data.workers),
        process.progress_label(f"budget {split}"),
    )
    batches = progress(batches, name, len(numbers), process.is_main)
    for [([image], labels, _)] in batches:
        image, labels = image.to(device), labels.to(device).long()
        if not (labels != data.ignore).any():
            continue
        autocast = functools.partial(process.autocast, config.model.bf16)  # the networks only
        maps, overlap, pairs = oracle_labels(segmenter, image, labels, data, autocast)
        for row, labelled in maps.items():
            matrices[row] += confusion(labels, labelled, C, data.ignore)
        named += confusion(*pairs, C, -1)
        recalled = [(overlap >= o).sum() for o in OVERLAPS]
        best += torch.stack(
            [*recalled, overlap.sum(), torch.tensor(len(overlap), device=device)]
        ).double()
    for tensor in (*matrices.values(), named, best):
        process.sum(tensor)
    return in_percent(matrices, named, best, data)


def in_percent(
    matrices: dict[str, Tensor], named: Tensor, best: Tensor, data: DataSet
) -> dict[str, object]:
    """The result of `budget` from what it counted; null where there is nothing to measure."""
    C = len(data.names)
    *recalled, total, masks = best.tolist()
    wrong = named - named.diag().diag()
    top = wrong.flatten().topk(min(10, C * C))
    share = lambda part, all_of: 100 * part / all_of if all_of else None
    return (
        {"program": MARK}
        | {row: summarize(matrix, data) for row, matrix in matrices.items()}
        | {
            "recall": {str(o): share(r, masks) for o, r in zip(OVERLAPS, recalled, strict=True)},
            "average_best_overlap": share(total, masks),
            "masks": int(masks),
            "clip_accuracy": share(int(named.diag().sum()), int(named.sum())),
            "confusions": [
                [data.names[int(i) // C], data.names[int(i) % C], int(n)]
                for n, i in zip(*top, strict=True)
                if n
            ],
        }
    )


def report_budget(result: dict, out: Path) -> None:
    """Write budget.json and budget.png, and print the table."""
    keys = [k for k in ("mIoU_seen", "mIoU_unseen", "hIoU", "mIoU") if k in result["as_is"]]
    main = "hIoU" if "hIoU" in keys else "mIoU"
    with written(out / "budget.json") as file:
        file.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    with written(out / "budget.png") as file:
        chart(result, keys).save(file, "PNG", pnginfo=PNG_MARK)
    print(
        "".join(
            [f"{'':32}", *(f"{k.removeprefix('mIoU_'):>9}" for k in keys), f"{main + ' gains':>13}"]
        )
    )
    for row, title in ROWS.items():
        both = result[row][main], result["as_is"][main]
        gain = f"{'-':>13}" if None in both else f"{both[0] - both[1]:+13.1f}"
        print("".join([f"{title:32}", *(percent(result[row][k], 9) for k in keys), gain]))
    recall = ", ".join(
        f"{percent(value, 0)} at {overlap}" for overlap, value in result["recall"].items()
    )
    overlap = percent(result["average_best_overlap"], 0)
    print(f"recall of {result['masks']} true masks: {recall}; average best overlap {overlap}")
    print(
        f"CLIP on the true masks: {percent(result['clip_accuracy'], 0)}% right"
        + "".join(
            f"\n  {n:5} x {truth} taken for {taken}" for truth, taken, n in result["confusions"]
        )
    )
    print(f"-> {out / 'budget.json'}, {out / 'budget.png'}")


def chart(result: dict, keys: list[str]) -> Image.Image:
    """Bars of the metrics of every row, and of the proposals' recall."""
    bars = {
        title: [(k.removeprefix("mIoU_"), result[row][k]) for k in keys]
        for row, title in ROWS.items()
    }
    bars["recall of the true masks"] = [
        (f"IoU {o}", value) for o, value in result["recall"].items()
    ]
    colours = ("#4477aa", "#ee6677", "#228833", "#bbbbbb")
    canvas = Image.new("RGB", (760, 20 + 96 * len(bars)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.font = ImageFont.load_default(14)
    for i, (title, values) in enumerate(bars.items()):
        draw.text((12, 14 + 96 * i), title, "black")
        for j, (name, value) in enumerate(values):
            y = 14 + 96 * i + 20 * j
            draw.text((250, y), name, "black")
            draw.rectangle((320, y, 320 + 3.6 * (value or 0), y + 14), colours[j])
            draw.text((326 + 3.6 * (value or 0), y + 1), percent(value, 0), "black")
    return canvas
