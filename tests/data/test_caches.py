"""What a cache is asked by holds all that its content follows from."""

import os

import pytest
import torch
from conftest import command, fails_in_one_line, tiny_clip_state
from own_data import blocks, save_pair, train
from PIL import Image

from zsseg.config import load_config
from zsseg.label_statistics import label_statistics


def test_text_features_depend_on_activation_heads_and_vocabulary(root, monkeypatch):
    """What the cache is asked by must hold all that its content follows from."""
    from zsseg.clip import build_clip
    from zsseg.prompts import FixedPrompt, text_features

    state, prompt = tiny_clip_state(), FixedPrompt(["a {}."])
    found = [
        text_features(build_clip(state, activation), prompt, ["cat"])
        for activation in ("quickgelu", "gelu")
    ]
    assert not torch.equal(*found)
    clip = build_clip(state)
    encode = clip.tokenizer.encode
    clip.tokenizer.encode = lambda text: encode(text[::-1])  # another vocabulary
    assert not torch.equal(text_features(clip, prompt, ["cat"]), found[0])


def test_label_statistics_follow_every_change(root):
    """A label map that is replaced by one of the same size and an older date, as `cp -p` and
    archives do.
    """
    config = load_config(root / "a.toml").data
    before = label_statistics(config, root, "train").histogram(3)
    file = root / "a/masks/train/0.png"
    size, dates = file.stat().st_size, file.stat()
    other = (blocks() + 1) % 3
    Image.fromarray(other).save(file)
    file.write_bytes(file.read_bytes().ljust(size, b"\0")[: max(size, file.stat().st_size)])
    os.utime(file, ns=(dates.st_atime_ns, dates.st_mtime_ns - 10**12))
    after = label_statistics(config, root, "train").histogram(3)
    assert after.tolist() != before.tolist()


@pytest.mark.slow
def test_pseudo_labels_follow_images_and_settings(root, trained):
    """They are numbered: one image more, and each would belong to another."""
    settings = ["--set", "data.unseen=['grass']"]
    assert train(root, *settings).returncode == 0
    words = [*settings, "--set", "data.train_on=all", "--set", f"train.teacher={root}/r/last.pt"]
    own = (
        "train.py",
        "--config",
        root / "a.toml",
        "--root",
        root,
        "--out",
        root / "self",
        "--device",
        "cpu",
        *words,
    )
    assert command(*own).returncode == 0
    (root / "self" / "last.pt").unlink()
    (root / "self" / "best.pt").unlink()
    assert command(*own).returncode == 0  # as they were
    for name in ("last.pt", "best.pt", "previous.pt"):
        (root / "self" / name).unlink(missing_ok=True)
    save_pair(root, "train", "00", blocks())
    fails_in_one_line(command(*own), "pseudo labels", "other images")
