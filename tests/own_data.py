"""A small data set of one's own and the commands on it: three classes in blocks, a small CLIP."""

import subprocess
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from PIL import Image

from zsseg.config import load_config

CONFIG = """
[data]
name = "folder"
folder = "a"
images = "images/{split}/{id}.png"
labels = "masks/{split}/{id}.png"
classes = ["cat", "dog", "grass"]
crop = 64
short_edges = [64]
test_short_edge = 64
workers = 0
[model]
backbone = "small"
num_queries = 8
hidden_dim = 32
decoder_layers = 1
[clip]
weights = "{root}/clip.pt"
prompt = ["a {}."]
[train]
steps = 4
batch_size = 2
eval_every = 0
"""


def save_pair(root: Path, split: str, name: str, labels: np.ndarray, **options: object) -> None:
    """An image whose colours are its labels, saved with `options`, and its label map."""
    colours = (labels[..., None] % 3 * np.array([80, 40, 90]) + 30).astype(np.uint8)
    for kind, array, more in (("images", colours, options), ("masks", labels, {})):
        file = root / "a" / kind / split / f"{name}.png"
        touch(file.parent, file.name)
        Image.fromarray(array).save(file, **more)


def blocks() -> np.ndarray:
    labels = np.zeros((48, 60), np.uint8)
    labels[:, 20:40], labels[24:, 40:] = 1, 2
    return labels


def write(folder: Path) -> None:
    """Four images to train on and two to measure, with labels 0, 1, 2 in blocks, a small CLIP and
    `a.toml`.
    """
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            save_pair(folder, split, str(i), blocks())
    torch.save(conftest.tiny_clip_state(), folder / "clip.pt")
    (folder / "a.toml").write_text(CONFIG)


def files_below(folder: Path) -> dict[str, bytes]:
    """But for the mark of a folder of results."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != ".zsseg"]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.fixture
def root(tmp_path) -> Path:
    write(tmp_path)
    return tmp_path


def words(root: Path) -> list:
    return ["--config", root / "a.toml", "--root", root]


def train(root: Path, *more: object) -> subprocess.CompletedProcess:
    out = ["--out", root / "r", "--device", "cpu"]
    return conftest.command("train.py", *words(root), *out, *more)


def measure(model: Path, root: Path, *more: object) -> subprocess.CompletedProcess:
    return conftest.command("eval.py", model, *words(root), "--device", "cpu", *more)


def described(*settings: str):
    """The [data] of a configuration of two classes."""
    return load_config(None, ["data.name=folder", "data.classes=['cat','dog']", *settings]).data
