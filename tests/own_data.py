"""A small data set of one's own and the commands on it: three classes in blocks, a small CLIP."""

import subprocess
import sys
import time
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
queries = 8
hidden = 32
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
    shades = np.array([80, 40, 90])
    for kind, array in (
        ("images", (labels[..., None] % 3 * shades + 30).astype(np.uint8)),
        ("masks", labels),
    ):
        file = root / "a" / kind / split / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(file, **(options if kind == "images" else {}))


def blocks() -> np.ndarray:
    labels = np.zeros((48, 60), np.uint8)
    labels[:, 20:40], labels[24:, 40:] = 1, 2
    return labels


@pytest.fixture
def root(tmp_path) -> Path:
    """Four images to train on and two to measure, with labels 0, 1, 2 in blocks, and a small
    CLIP.
    """
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            save_pair(tmp_path, split, str(i), blocks())
    torch.save(conftest.tiny_clip_state(), tmp_path / "clip.pt")
    (tmp_path / "a.toml").write_text(CONFIG)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The checkpoint of a run on such images; its files stand as a run leaves them."""
    folder = tmp_path_factory.mktemp("trained")
    for split in ("train", "val"):
        save_pair(folder, split, "0", blocks())
    torch.save(conftest.tiny_clip_state(), folder / "clip.pt")
    (folder / "a.toml").write_text(CONFIG)
    done = conftest.command(
        "train.py",
        "--config",
        folder / "a.toml",
        "--root",
        folder,
        "--out",
        folder / "run",
        "--device",
        "cpu",
    )
    assert done.returncode == 0, done.stderr
    return folder / "run" / "last.pt"


def train(root: Path, *more: object):
    return conftest.command(
        "train.py",
        "--config",
        root / "a.toml",
        "--root",
        root,
        "--out",
        root / "r",
        "--device",
        "cpu",
        *more,
    )


def training(root: Path, *settings: str, **options: object) -> subprocess.Popen:
    """`train` as a process of its own, which goes on."""
    words = [sys.executable, "train.py", "--config", root / "a.toml", "--root", root, "--out"]
    words += [root / "r", "--device", "cpu"]
    words += [word for setting in ("log.every=1", *settings) for word in ("--set", setting)]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | options
    return subprocess.Popen([*map(str, words)], cwd=conftest.ROOT, **options)


def wait_for_steps(root: Path) -> None:
    """Until a `training` has logged one."""
    file, until = root / "r" / "metrics.jsonl", time.time() + 120
    while not (file.exists() and file.stat().st_size) and time.time() < until:
        time.sleep(0.1)


def measure(model: Path, root: Path, *more: object):
    return conftest.command(
        "eval.py", model, "--config", root / "a.toml", "--root", root, "--device", "cpu", *more
    )


def check(root: Path, *more: object):
    return conftest.command(
        "prepare_data.py", "folder", "--config", root / "a.toml", "--root", root, "--check", *more
    )


def described(*settings: str):
    return load_config(None, ["data.name=folder", "data.classes=['cat','dog']", *settings]).data
