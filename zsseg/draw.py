"""Label maps as pictures."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from zsseg.run import replacing


def palette(count: int) -> np.ndarray:
    """`count` distinct colours and, last, black for ignored pixels: uint8 [count + 1, 3]."""
    hue = (np.arange(count) * 0.618034) % 1  # golden-ratio steps keep neighbours apart
    value = 0.95 - 0.35 * ((np.arange(count) // 7) % 3) / 2
    phase = (hue[:, None] * 6 + np.array([5, 3, 1])) % 6
    rgb = value[:, None] * (1 - 0.75 * np.clip(np.minimum(phase, 4 - phase), 0, 1))
    return np.concatenate([(255 * rgb).astype(np.uint8), np.zeros((1, 3), np.uint8)])


def column(image: Tensor, labels: Tensor, predicted: Tensor, classes: int, height: int = 160) -> np.ndarray:
    """Picture, truth (`classes` where ignored) and prediction below one another, each `height` pixels high."""
    colours, width = palette(classes), min(max(round(height * image.shape[2] / image.shape[1]), 1), 4 * height)
    small = lambda array: np.array(Image.fromarray(array).resize((width, height), Image.Resampling.NEAREST))
    kind = np.uint8 if classes <= 255 else np.int32
    maps = [colours[small(m.numpy().astype(kind))] for m in (labels, predicted)]
    return np.concatenate([small(image.permute(1, 2, 0).numpy()), *maps])


def save_label_map(predicted: Tensor, path: Path, classes: int) -> None:
    """Class ids as a PNG of 8 bits, 16 above 255 classes."""
    array = predicted.cpu().numpy().astype(np.uint8 if classes <= 255 else np.uint16)
    with replacing(path) as temporary:
        Image.fromarray(array).save(temporary, "PNG")
