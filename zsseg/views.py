"""Test-time augmentation: several sizes, flipped images and sliding windows of one image, and the
mean of their score maps.

Of every view only the proposals are kept (masks at stride 4 and class scores: 10 MB for 100 queries
on 640 x 640), those beyond `BUDGET` in a temporary file. Score maps, the large part, are summed a
few classes at a time with a running maximum: they never take more than `BUDGET`, however many
classes and views there are.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from zsseg.segmenter import Proposals, Segmenter

BUDGET = 2**28  # bytes that a tile of score maps may take, and the masks of all views


@dataclass
class View:
    """A part of an image that was segmented by itself."""

    proposals: Proposals
    # Where it lies in the image at its own size: top, left, bottom, right.
    box: tuple[int, int, int, int]
    flipped: bool


def windows(height: int, width: int, side: int) -> Iterator[tuple[int, int, int, int]]:
    """Squares of `side` that overlap by two thirds and cover an image: top, left, bottom, right.
    All of it for side 0.
    """
    step = -(-side // 3)

    def starts(length: int) -> list[int]:
        last = max(length - side, 0) if side else 0
        return [*range(0, last, step), last] if last else [0]

    for top in starts(height):
        for left in starts(width):
            yield (
                top,
                left,
                min(top + side, height) if side else height,
                min(left + side, width) if side else width,
            )


def all_finite(views: list[View], scores: list[Tensor]) -> Tensor:
    """Whether an image's masks and class scores are numbers, a bool on the device: argmax would
    make labels of NaN, too.
    """
    found = [view.proposals.mask_logits for view in views] + scores
    return torch.stack([tensor.isfinite().all().to(scores[0].device) for tensor in found]).all()


def segment_views(
    segmenter: Segmenter, images: list[Tensor], size: tuple[int, int], flip: bool, window: int
) -> list[View]:
    """The views of an image whose own (height, width) is `size`, given at one or more network-input
    sizes [3, H, W].
    """
    views, held = [], 0
    for image in images:
        H, W = image.shape[-2:]
        for top, left, bottom, right in windows(H, W, window):
            part = image[:, top:bottom, left:right]
            box = (
                top * size[0] // H,
                left * size[1] // W,
                -(-bottom * size[0] // H),
                -(-right * size[1] // W),
            )
            for flipped in (False, True) if flip else (False,):
                proposals = segmenter.propose(part.flip(-1) if flipped else part)
                held += proposals.mask_logits.nbytes
                if held > BUDGET:
                    proposals = replace(proposals, mask_logits=offloaded(proposals.mask_logits))
                views.append(View(proposals, box, flipped))
    return views


def offloaded(tensor: Tensor) -> Tensor:
    """The same numbers on the CPU, in a file that is gone with them: the system takes the memory
    back when it must.
    """
    with tempfile.TemporaryFile() as file:
        array = np.memmap(file, np.float32, "w+", shape=tuple(tensor.shape))
    array[:] = tensor.cpu().numpy()
    return torch.from_numpy(array)


def loaded(proposals: Proposals, device: torch.device) -> Proposals:
    return replace(proposals, mask_logits=proposals.mask_logits.to(device))


@torch.inference_mode()
def label_map(
    segmenter: Segmenter, views: list[View], scores: list[Tensor], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The class with the largest mean score over the views at every pixel, int64 `size`, and that
    score.

    `scores` [Q, C] are those of every view.
    """
    C, device = scores[0].shape[1], scores[0].device
    if len(views) == 1:
        return segmenter.label_map(scores[0], loaded(views[0].proposals, device), size)
    tile = max(BUDGET // (4 * size[0] * size[1]), 1)
    coverage = torch.zeros(size, device=device)
    for top, left, bottom, right in (view.box for view in views):
        coverage[top:bottom, left:right] += 1
    best, labels = (
        torch.full(size, -1.0, device=device),
        torch.zeros(size, dtype=torch.int64, device=device),
    )
    for first in range(0, C, tile):
        # As many views cover a pixel for one class as for another, so that the sum decides as the
        # mean would.
        total = torch.zeros(min(tile, C - first), *size, device=device)
        for view, classes in zip(views, scores, strict=True):
            top, left, bottom, right = view.box
            proposals, place = loaded(view.proposals, device), (bottom - top, right - left)
            part = segmenter.score_map(classes[:, first : first + tile], proposals, place)
            total[:, top:bottom, left:right] += part.flip(-1) if view.flipped else part
        value, index = total.max(0)
        labels = torch.where(value > best, index + first, labels)
        best = torch.maximum(value, best)
    return labels, best / coverage
