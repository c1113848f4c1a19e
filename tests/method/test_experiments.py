"""The synthetic data set and its small CLIP, learned prompts over seeds, self-training."""

import copy
import hashlib
import json
import shutil
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock, patch

import numpy as np
import pytest
import torch
from conftest import PROCESS, TINY, command, fails_in_one_line, overrides, succeed, tiny_config
from conftest import logged as lines_of
from PIL import Image

from zsseg.checkpoint import save
from zsseg.config import load_config
from zsseg.datasets import dataset, find_pairs
from zsseg.prepare import shapes, shapes_clip
from zsseg.prompt_learning import PromptTask
from zsseg.regions import box_of, region_crops
from zsseg.self_training import fill_ignored, missing_maps, pseudo_labels
from zsseg.utils import UserError
from zsseg.weights import load_checkpoint

UNSEEN = [shapes.NAMES.index(name) for name in shapes.UNSEEN]

# The synthetic data set


def test_its_pixels_never_change():
    wanted = {"clip": "fd3590b17ae92e6d", "train": "404ff90baea83bac"}
    wanted |= {"val": "e3abad95f5c97858", "test": "ebf70868ee322185"}
    for split, digits in wanted.items():
        drawn = hashlib.sha256()
        for index in (0, 3, 11):
            image, labels, captions = shapes.draw(split, index)
            drawn.update(image.tobytes() + labels.tobytes() + json.dumps(captions).encode())
        assert drawn.hexdigest()[:16] == digits, split


def test_it_begins_again_after_a_kill_and_leaves_a_whole_data_set_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "SPLITS", {"clip": 60, "train": 2})
    clip = tmp_path / "shapes" / "clip.pt"

    def make():
        shapes.generate(clip.parent)
        shapes_clip.train_small_clip(clip.parent, steps=1)

    for module, name, calls in ((shapes, "draw", 61), (torch, "save", 0)):
        results = calls * [DEFAULT] + 9 * [KeyboardInterrupt]
        killed = Mock(wraps=getattr(module, name), side_effect=results)
        with patch.object(module, name, killed), pytest.raises(KeyboardInterrupt):
            make()
        assert not clip.exists()
    make()
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    assert sum(file.suffix in (".jpg", ".png") for file in files) == 2 * 62
    make()
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    weights = torch.load(clip)
    clip.unlink()
    make()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in torch.load(clip).items())
    with patch.object(shapes, "SIDE", 96), pytest.raises(UserError, match="an earlier version"):
        make()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="not this program's"):
        shapes.generate(tmp_path)


# Learned prompts

SETTINGS = """data.name=shapes data.split=test data.workers=0 clip.weights={root}/shapes/clip.pt
train.steps=4 train.batch_size=4 train.checkpoint_every=2 log.every=1 prompts.samples_per_class=3
prompts.held_out=2 prompts.warmup_steps=1"""
LEARN = SETTINGS.split()


@pytest.fixture(scope="module")
def more_root(shapes_root, tmp_path_factory):
    """Enough training images to set some regions of every class aside."""
    root = tmp_path_factory.mktemp("more")
    with patch.object(shapes, "SPLITS", {"clip": 1, "train": 80, "val": 1, "test": 1}):
        shapes.generate(root / "shapes")
    shutil.copy(shapes_root / "shapes" / "clip.pt", root / "shapes" / "clip.pt")
    return root


def train(config, root, out, *settings):
    words = ["train.py", "--config", f"configs/{config}.toml", "--root", root, "--out", out]
    return command(*words, "--device", "cpu", *overrides(*settings))


def learn(root, out, *settings):
    done = train("voc_prompts", root, out, *LEARN, *settings)
    assert done.returncode == 0, done.stderr
    return load_checkpoint(out / "last.pt")["model"], done.stdout


def test_seeds_learn_side_by_side_as_they_would_alone(more_root, tmp_path):
    both, printed = learn(more_root, tmp_path / "both", "train.seeds=[3, 5]")
    names = {name: [*part] for name, part in both.items()}
    assert names == {"prompt": ["prefix"], "prompts": ["3.prefix", "5.prefix"]}
    settings = ("train.seeds=[3, 5]", "train.batch_size=1", "train.accumulate=4")
    parts, _ = learn(more_root, tmp_path / "parts", *settings)
    for seed in (3, 5):
        alone, _ = learn(more_root, tmp_path / str(seed), f"train.seeds=[{seed}]")
        prefix = both["prompts"][f"{seed}.prefix"]
        assert torch.allclose(prefix, alone["prompt"]["prefix"], atol=1e-5)
        assert torch.allclose(prefix, parts["prompts"][f"{seed}.prefix"], atol=1e-6)
    result = json.loads((tmp_path / "both" / "metrics.json").read_text())
    best = result["best_seed"]
    assert {*result["seeds"]} == {"3", "5"}
    assert result["seeds"][best] == max(result["seeds"].values())
    assert torch.equal(both["prompt"]["prefix"], both["prompts"][f"{best}.prefix"])
    assert f"the best is {best}" in printed
    lines, summed = (lines_of(tmp_path / name)[:4] for name in ("both", "parts"))
    for one, four in zip(lines, summed, strict=True):
        for key in ("loss", "accuracy", "grad_norm"):
            assert four[key] == pytest.approx(one[key], rel=1e-4)
    rates = [line["lr"] for line in lines]
    cosine = [0.01 * (1 + np.cos(np.pi * step / 4)) for step in (1, 2, 3)]
    assert rates == pytest.approx([0.02 * 0.005, *cosine])  # a constant warm-up, then cosine


def test_samples_are_crops_of_regions_as_clip_sees_them_at_inference(more_root, tmp_path):
    task = PromptTask(load_config("voc_prompts", LEARN), more_root, tmp_path, PROCESS, None)
    samples, held_out = task.samples, task.held_out
    assert held_out.items and not {*held_out.items} & {*samples.items}
    boxes = copy.copy(samples)
    boxes.held_out = True
    shares = []
    for n in range(60):
        region, category = samples[n]
        again, _ = samples[n]
        assert torch.equal(region, again) and category == samples.item(n)[2]
        assert region[3].any() and {*region[3].unique().tolist()} <= {0, 1}
        shares.append(region.numel() / boxes[n][0].numel())
    assert min(shares) < 0.2 and 0.8 < max(shares) <= 1
    image, label, category = held_out.item(1)
    crops, classes = task.crops([held_out[1]])
    mask = torch.from_numpy(np.asarray(Image.open(label)) == dataset("shapes").seen[category])[None]
    pixels = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)
    wanted = region_crops(task.clip, pixels, mask, box_of(mask))
    assert torch.allclose(crops, wanted, atol=1e-5) and classes.tolist() == [category]


def test_with_nothing_held_out_there_is_nothing_to_compare(shapes_root, tmp_path):
    settings = ("train.seeds=[3, 5]", "prompts.held_out=0", "prompts.warmup_steps=4")
    learned, _ = learn(shapes_root, tmp_path, *settings)
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["seeds"] == {"3": None, "5": None} and "prompt" in learned


def test_a_learned_prompt_moves_into_the_segmenter_s_checkpoint(more_root, tmp_path):
    learned, _ = learn(more_root, tmp_path / "prompt", "train.seeds=[0]")
    file = tmp_path / "prompt" / "last.pt"
    settings = (*TINY, "train.steps=2", "train.checkpoint_every=1", "train.eval_every=0")
    settings += ("clip.region_prompt=learned", f"clip.prompts={file}")
    out = tmp_path / "run"
    train("shapes", more_root, out, *settings)
    wanted = load_checkpoint(out / "last.pt")["model"]
    assert torch.equal(wanted["region_prompt"]["prefix"], learned["prompt"]["prefix"])
    # Whatever becomes of the file: a resumed run keeps the prompt, and so does an evaluation.
    file.unlink()
    shutil.copy(out / "previous.pt", out / "last.pt")
    words = ["--root", more_root, "--device", "cpu", "--out"]
    succeed("train.py", "--resume", *words, out)
    resumed = load_checkpoint(out / "last.pt")["model"]
    for name, part in wanted.items():
        assert all(torch.equal(tensor, resumed[name][key]) for key, tensor in part.items())
    succeed("eval.py", out / "last.pt", *words, tmp_path / "eval")
    results = [json.loads((f / "metrics.json").read_text()) for f in (out, tmp_path / "eval")]
    assert results[0]["hIoU"] == results[1]["hIoU"]


# Self-training


def test_only_ignored_pixels_are_filled_in_and_only_with_unseen_classes():
    scores = torch.tensor([[9.0, 9, 9], [1, 5, 0], [2, 1, 0]])[..., None]  # [C = 3, 3, 1]
    known = torch.tensor([[0], [255], [255]])
    unseen = torch.tensor([False, True, True])
    assert fill_ignored(known, scores, unseen, 0.0, 255).tolist() == [[0], [1], [1]]
    # The third: 1.2e-4.
    assert fill_ignored(known, scores, unseen, 0.01, 255).tolist() == [[0], [1], [255]]


def test_label_maps_of_another_teacher_are_found_in_every_folder(tmp_path):
    """Images may have folders in their names; without a map the folder may have any mark."""
    teacher = tmp_path / "teacher.pt"
    teacher.touch()
    config = load_config(None, [f"train.teacher={teacher}", "data.train_on=all"])
    images = SimpleNamespace(pairs=[(teacher.with_name("a"), teacher.with_name("b"))])
    folder = tmp_path / "pseudo"
    files = [folder / "a" / "0.png", folder / "b" / "0.png"]
    assert missing_maps(config, images, folder, files) == [0, 1]
    files[1].parent.mkdir()
    files[1].touch()
    assert missing_maps(config, images, folder, files) == [0]
    teacher.write_bytes(b"another")
    with pytest.raises(UserError, match=r"pseudo: were made by another teacher; delete"):
        missing_maps(config, images, folder, files)
    files[1].unlink()
    assert missing_maps(config, images, folder, files) == [0, 1]


def test_self_training_is_resumable_and_blind_to_hidden_labels(shapes_run, shapes_root, tmp_path):
    content = load_checkpoint(shapes_run / "last.pt")
    content["config"]["clip"]["ensemble_seen"] = False  # says how classes weigh, not who is unseen
    teacher = tmp_path / "teacher.pt"
    save(teacher, **content)
    settings = (*TINY, "train.steps=2", "train.eval_every=0", f"train.teacher={teacher}")
    done = train("shapes", shapes_root, tmp_path / "a", *settings)
    fails_in_one_line(done, "train.teacher", "unseen classes", "train_on")
    settings += ("data.train_on=all",)
    # A teacher that is not there has left no label maps.
    done = train("shapes", shapes_root, tmp_path / "run", *settings, "train.teacher=no.pt")
    fails_in_one_line(done, "no.pt", "no such file")
    done = train("shapes", shapes_root, tmp_path / "run", *settings)
    assert "pixels filled in" in done.stdout, done.stderr
    words = ["--root", shapes_root, "--device", "cpu", "--out", tmp_path / "eval"]
    succeed("eval.py", tmp_path / "run" / "last.pt", *words)
    # Who is unseen is for the data set to say, and not for what is trained on, either.
    results = [json.loads((tmp_path / f / "metrics.json").read_text()) for f in ("run", "eval")]
    assert all(results[0][key] == results[1][key] for key in ("hIoU", "mIoU", "per_class"))
    config = tiny_config(*settings)
    folder = tmp_path / "run" / "pseudo"
    maps = {file.name: file.read_bytes() for file in folder.glob("*.png")}
    assert len(maps) == 10
    for image, label in find_pairs(config.data, shapes_root, "train"):
        truth = np.asarray(Image.open(label))
        ours = np.asarray(Image.open(folder / f"{image.stem}.png"))
        hidden = np.isin(truth, UNSEEN)
        assert (ours == truth)[~hidden].all() and np.isin(ours[hidden], [*UNSEEN, 255]).all()
    # Killed half-way: what is there stays, the rest comes out the same.
    first, second, third = sorted(maps)[:3]
    (folder / first).unlink()
    (folder / second).write_bytes(maps[third])
    pseudo_labels(config, shapes_root, folder, PROCESS)
    assert (folder / first).read_bytes() == maps[first]
    assert (folder / second).read_bytes() == maps[third]
    # Other unseen classes in the truth: the same label maps.
    other = tmp_path / "root"
    shutil.copytree(shapes_root, other)
    for _, label in find_pairs(config.data, other, "train"):
        truth = np.asarray(Image.open(label))
        changed = np.where(np.isin(truth, UNSEEN), UNSEEN[0], truth)
        Image.fromarray(changed.astype(np.uint8)).save(label)
    again = tmp_path / "again"
    pseudo_labels(config, other, again, PROCESS)
    assert {file.name: file.read_bytes() for file in again.glob("*.png")} == maps
    for root, setting, how in (
        (shapes_root, "train.steps=3", "from other images"),
        (other, "train.min_probability=0.01", "with other settings"),
        (other, f"train.teacher={shapes_run / 'last.pt'}", "by another teacher"),
        (shapes_root, "data.max_size=99", "with other settings, from other images"),
    ):
        with pytest.raises(UserError, match=rf"pseudo labels .*: were made {how}; delete the fold"):
            pseudo_labels(tiny_config(*settings, setting), root, again, PROCESS)


def test_a_teacher_that_fills_in_nothing_ends_the_run(shapes_run, shapes_root, tmp_path):
    """Also the second time, when all label maps are there, or all but one."""
    settings = (*TINY, "data.train_on=all", "train.min_probability=1")
    settings += (f"train.teacher={shapes_run / 'last.pt'}",)
    for again in range(3):
        done = train("shapes", shapes_root, tmp_path / "run", *settings)
        fails_in_one_line(done, "have no pixel of an unseen class; delete the folder; lower")
        maps = [*(tmp_path / "run" / "pseudo").glob("*.png")]
        assert len(maps) == 10 and not (tmp_path / "run" / "last.pt").exists()
        if again:
            maps[0].unlink()
