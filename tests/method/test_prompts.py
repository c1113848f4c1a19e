"""Learning a prompt: the command, resuming, using the result; the learning-rate schedule and the
crops.
"""

import copy
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import PROCESS, ROOT, tiny_config

import eval as evaluation
import train
from zsseg import checkpoint
from zsseg.prepare import shapes
from zsseg.config import load_config
from zsseg.prompt_learning import HeldOut, PromptClassifier, Regions, resized_crop_box
from zsseg.prompts import FixedPrompt, text_features

WORDS = ["--config", "configs/voc_prompts.toml", "--device", "cpu"]
for setting in (
    "data.name=shapes",
    "clip.weights={root}/shapes/clip.pt",
    "train.steps=4",
    "train.batch_size=4",
    "log.every=1",
    "train.checkpoint_every=2",
    "prompts.samples_per_class=3",
    "data.workers=0",
    "prompts.warmup_steps=1",
    "data.split=test",
    "train.seeds=[0]",
):
    WORDS += ["--set", setting]


@pytest.fixture(scope="module")
def learned(shapes_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("prompt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        train.main([*WORDS, "--root", str(shapes_root), "--out", str(out)])
    return out


def test_only_the_prompt_learns_and_is_saved(learned):
    content = checkpoint.load(learned / "last.pt")
    assert {k: list(v) for k, v in content["model"].items()} == {
        "prompt_of_seed_0": ["prefix"],
        "prompt": ["prefix"],
    }
    assert content["model"]["prompt"]["prefix"].shape == (16, 64)
    lines = [json.loads(line) for line in (learned / "metrics.jsonl").read_text().splitlines()]
    assert "test/kept_seed" in lines.pop()
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all(
        np.isfinite(line["loss"]) for line in lines
    )
    rates = [0.0001, *(0.01 * (1 + math.cos(math.pi * s / 4)) for s in (1, 2, 3))]
    assert [line["lr"] for line in lines] == pytest.approx(rates)


def test_the_prompt_moves_towards_the_crops(shapes_root, tmp_path):
    """The gradient reaches the prompt, and a step along it lowers the loss of the same batch."""
    settings = [
        "data.name=shapes",
        "clip.weights={root}/shapes/clip.pt",
        "data.workers=0",
        "train.seeds=[0]",
    ]
    config = load_config(str(ROOT / "configs/voc_prompts.toml"), settings)
    task = train.Prompts(config, shapes_root, tmp_path, PROCESS)
    batch = task.collate([task.samples[n] for n in range(16)])
    assert not task.model.train().clip.training
    loss, _ = task.loss(task.model, batch)
    loss.backward()
    prefix = task.model.prompts[0].prefix
    assert [n for n, p in task.model.named_parameters() if p.grad is not None] == [
        "prompts.0.prefix"
    ]
    assert prefix.grad.abs().sum() > 0
    with torch.no_grad():
        prefix -= 1e-3 * prefix.grad / prefix.grad.norm()
    assert task.loss(task.model, batch)[0] < loss


def test_a_learned_prompt_is_used_in_training_and_evaluation(
    learned, shapes_root, tmp_path, capsys
):
    """For head and regions, or for the regions alone; the segmenter's checkpoint then holds it."""
    for settings in (["clip.prompt=learned"], ["clip.region_prompt=learned"]):
        config = tiny_config("train.steps=1", f"clip.prompts={learned / 'last.pt'}", *settings)
        out = tmp_path / settings[0]
        train.train(config, shapes_root, out, PROCESS, {})
        assert "last.pt: 1 tensors loaded, 0 dropped" in capsys.readouterr().out
        part = settings[0].split(".")[1].split("=")[0]
        saved, wanted = (
            checkpoint.load(p)["model"] for p in (out / "last.pt", learned / "last.pt")
        )
        assert torch.equal(saved[part]["prefix"], wanted["prompt"]["prefix"])
        first = json.loads((out / "metrics.json").read_text())
        (tmp_path / "moved").mkdir(exist_ok=True)
        (learned / "last.pt").rename(tmp_path / "moved" / "last.pt")  # evaluation needs it no more
        try:
            evaluation.main(
                [
                    str(out / "last.pt"),
                    "--root",
                    str(shapes_root),
                    "--out",
                    str(out / "eval"),
                    "--device",
                    "cpu",
                ]
            )
        finally:
            (tmp_path / "moved" / "last.pt").rename(learned / "last.pt")
        again = json.loads((out / "eval" / "metrics.json").read_text())
        assert {k: v for k, v in first.items() if "second" not in k} == {
            k: v for k, v in again.items() if "second" not in k
        }


def test_a_resumed_run_keeps_its_prompt(learned, shapes_root, tmp_path):
    """The checkpoint's, whatever has become of the file that it came from."""
    prompt = tmp_path / "prompt.pt"
    prompt.write_bytes((learned / "last.pt").read_bytes())
    config = tiny_config(
        "train.steps=2",
        "train.checkpoint_every=1",
        "clip.region_prompt=learned",
        f"clip.prompts={prompt}",
    )
    kept, original = {}, checkpoint.save

    def save_and_keep(path, *previous, **content):
        original(path, *previous, **content)
        kept[content["step"]] = checkpoint.load(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_keep)
        train.train(config, shapes_root, tmp_path / "a", PROCESS, {})
    wanted = json.loads((tmp_path / "a" / "metrics.json").read_text())
    other = checkpoint.load(prompt)
    other["model"]["prompt"]["prefix"] += 1
    for change in (lambda: checkpoint.save(prompt, **other), prompt.unlink):
        change()
        train.train(
            load_config(None, base=kept[1]["config"]),
            shapes_root,
            tmp_path / "b",
            PROCESS,
            copy.deepcopy(kept[1]),
        )
        resumed = checkpoint.load(tmp_path / "b" / "last.pt")
        for part in kept[2]["model"]:
            assert all(
                torch.equal(v, resumed["model"][part][k]) for k, v in kept[2]["model"][part].items()
            )
        assert resumed["config"] == kept[2]["config"]
        assert json.loads((tmp_path / "b" / "metrics.json").read_text())["hIoU"] == wanted["hIoU"]


def test_schedules():
    config = load_config(None, ["train.task=prompts", "train.steps=1000"])
    factors = [train.lr_factor(s, config) for s in (0, 99, 100, 500, 999)]
    cosine = [(1 + math.cos(math.pi * s / 1000)) / 2 for s in (0, 99, 100, 500, 999)]
    assert factors == pytest.approx([0.005 * cosine[0], 0.005 * cosine[1], *cosine[2:]])
    assert train.lr_factor(500, load_config(None, ["train.steps=1000"])) == pytest.approx(0.5**0.9)


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (500, 3), (224, 224), (64, 48)])
def test_random_resized_crops_stay_inside(size):
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(300):
        left, top, w, h = resized_crop_box(*size, rng)
        assert (
            0 <= left <= left + w <= size[0] and 0 <= top <= top + h <= size[1] and w > 0 and h > 0
        )
        areas.append(w * h / (size[0] * size[1]))
        if min(size) > 40:
            assert 0.7 < w / h < 1.4
    if min(size) > 40:
        assert min(areas) < 0.15 and max(areas) > 0.85


def test_text_features_are_computed_once(small_clip, tmp_path, monkeypatch):
    monkeypatch.setenv("ZSSEG_CACHE", str(tmp_path))
    prompt = FixedPrompt(["a {}."])
    calls, encode = [], small_clip.encode_text
    monkeypatch.setattr(
        small_clip, "encode_text", lambda tokens: calls.append(len(tokens)) or encode(tokens)
    )

    def features(prompt=prompt, names=("cat", "dog")):
        return text_features(small_clip, prompt, list(names))

    first = features()
    assert torch.equal(first, features()) and calls == [2]
    # Other words.
    assert (
        torch.allclose(first.flip(0), features(names=("dog", "cat")), atol=1e-6) and len(calls) == 2
    )
    # Another prompt.
    assert not torch.equal(first, features(FixedPrompt(["the {}."]))) and len(calls) == 3
    with torch.no_grad():
        small_clip.visual.proj.zero_()
        assert torch.equal(first, features()) and len(calls) == 3  # the image tower does not matter
        small_clip.ln_final.bias.add_(torch.randn_like(small_clip.ln_final.bias))
    assert not torch.equal(first, features()) and len(calls) == 4  # other weights
    files = list((tmp_path / "text").iterdir())
    assert len(files) == 4 and all(f.suffix == ".pt" for f in files)
    wanted = features()
    for damage in (b"", b"no tensors"):
        for file in files:
            file.write_bytes(damage)
        assert torch.equal(wanted, features())
        assert torch.equal(wanted, features())
    assert len(calls) == 6


def test_an_unwritable_cache_is_said_and_survived(small_clip, tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_text("a file where the folder should be")
    monkeypatch.setenv("ZSSEG_CACHE", str(tmp_path))
    features = text_features(small_clip, FixedPrompt(["a {}."]), ["cat"])
    assert features.shape == (1, 64) and "not kept" in capsys.readouterr().out


@pytest.fixture(scope="module")
def more_root(shapes_root, tmp_path_factory):
    """Enough training images to set some of every class aside."""
    root = tmp_path_factory.mktemp("more")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SPLITS", {"clip": 1, "train": 80, "val": 1, "test": 1})
        shapes.generate(root / "shapes")
    shutil.copy(shapes_root / "shapes" / "clip.pt", root / "shapes" / "clip.pt")
    return root


def test_seeds_learn_side_by_side_as_they_would_alone(more_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    settings = ["--set", "prompts.held_out=2", "--root", str(more_root)]
    for name, seeds in (("both", "[3, 5]"), ("three", "[3]"), ("five", "[5]")):
        train.main(
            [*WORDS, *settings, "--set", f"train.seeds={seeds}", "--out", str(tmp_path / name)]
        )
    both, three, five = (
        checkpoint.load(tmp_path / n / "last.pt")["model"] for n in ("both", "three", "five")
    )
    for alone, key in ((three, "prompt_of_seed_3"), (five, "prompt_of_seed_5")):
        assert torch.allclose(both[key]["prefix"], alone[key]["prefix"], atol=1e-5)
    assert not torch.allclose(three["prompt"]["prefix"], five["prompt"]["prefix"], atol=1e-3)
    result = json.loads((tmp_path / "both" / "metrics.json").read_text())
    scores = {k: v["per_class"] for k, v in result["seeds"].items()}
    assert set(scores) == {"3", "5"} and scores[str(result["kept_seed"])] == max(scores.values())
    assert (
        result["mean"] == pytest.approx(sum(scores.values()) / 2) and result["held_out_regions"] > 0
    )
    assert result["std"] == pytest.approx(abs(scores["3"] - scores["5"]) / 2, abs=1e-4)
    assert torch.equal(
        both["prompt"]["prefix"], both[f"prompt_of_seed_{result['kept_seed']}"]["prefix"]
    )
    assert f"seed {result['kept_seed']} is kept" in capsys.readouterr().out


def test_held_out_regions_are_never_drawn(more_root):
    samples = Regions(
        tiny_config("prompts.samples_per_class=3", "prompts.held_out=2"), more_root, 32
    )
    assert samples.held_out and not set(samples.held_out) & set(samples.regions)
    assert {c for _, c in samples.held_out} <= set(range(20))
    crop, category = HeldOut(samples)[0]
    assert torch.equal(crop, HeldOut(samples)[0][0]) and category == samples.held_out[0][1]


def test_many_names_are_computed_prompt_by_prompt(shapes_root, tmp_path, monkeypatch):
    """The text tower's activations are computed again in the backward pass; the gradients are the
    same.
    """
    gradients = []
    for together in (512, 0):
        monkeypatch.setattr(PromptClassifier, "GROUP_SIZE", together)
        config = load_config(
            str(ROOT / "configs/voc_prompts.toml"),
            ["data.name=shapes", "clip.weights={root}/shapes/clip.pt", "train.seeds=[0, 1]"],
        )
        task = train.Prompts(config, shapes_root, tmp_path, PROCESS)
        task.loss(task.model, task.collate([task.samples[n] for n in range(4)]))[0].backward()
        gradients.append(torch.stack([p.prefix.grad for p in task.model.prompts]))
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-6) and gradients[0].abs().sum() > 0
