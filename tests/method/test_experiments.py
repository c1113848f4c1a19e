"""The synthetic data set and its small CLIP, learned prompts over seeds, self-training."""

import copy
import functools
import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import PROCESS, ROOT, TINY, command, fails_in_one_line, tiny_config
from PIL import Image

from zsseg.checkpoint import save
from zsseg.config import load_config
from zsseg.datasets import dataset, find_pairs
from zsseg.prepare import shapes, shapes_clip
from zsseg.prompt_learning import PromptTask, RegionSamples
from zsseg.regions import box_of, region_crops
from zsseg.self_training import fill_ignored, pseudo_labels
from zsseg.utils import UserError
from zsseg.weights import load_checkpoint, load_clip

UNSEEN = [shapes.NAMES.index(name) for name in shapes.UNSEEN]

# The synthetic data set


def test_its_pixels_never_change():
    wanted = {
        "clip": "b5b485965888652b",
        "train": "4a44facd62f3d3cd",
        "val": "7abad153391abdf5",
        "test": "a6112a88d46fe85b",
    }
    for split, digits in wanted.items():
        drawn = hashlib.sha256()
        for index in (0, 3, 11):
            image, labels, captions = shapes.draw(split, index)
            drawn.update(image.tobytes() + labels.tobytes() + json.dumps(captions).encode())
        assert drawn.hexdigest()[:16] == digits, split


@functools.cache
def drawn(split):
    return [shapes.draw(split, index) for index in range(60)]


def test_it_shows_two_or_three_things_on_one_ground():
    counts = []
    for image, labels, captions in drawn("val"):
        present = np.unique(labels).tolist()
        counts.append((sum(p < 20 for p in present), sum(p >= 20 for p in present)))
        assert image.shape == (96, 96, 3) and image.dtype == labels.dtype == np.uint8
        assert sorted(captions) == present
        assert all(shapes.NAMES[k] in text for k, text in captions.items())
    assert {*counts} == {(2, 1), (3, 1)}


def test_unseen_classes_are_every_fifth_and_rare_in_training_alone():
    shares = {}
    for split in ("train", "val"):
        present = [c for _, labels, _ in drawn(split) for c in np.unique(labels).tolist()]
        shares[split] = np.isin(present, UNSEEN).mean()
    assert 0 < shares["train"] < 0.12 and 0.14 < shares["val"] < 0.3
    for names in (shapes.THINGS, shapes.STUFF):
        assert [n for n in sorted(names) if n in shapes.UNSEEN] == list(names)[4::5]


def test_no_class_is_made_of_others():
    """Neither in its name, its silhouette nor its colours."""
    assert not any(a in b for a in shapes.NAMES for b in shapes.NAMES if a != b)
    masks = [shapes.silhouette(name, np.random.default_rng(0))[1] > 0.5 for name in shapes.THINGS]
    masks = np.stack(masks).reshape(20, -1).astype(int)
    both = masks @ masks.T
    area = masks.sum(1)
    assert np.triu(both / (area + area[:, None] - both), 1).max() < 0.8
    hues = {}
    for image, labels, _ in drawn("train") + drawn("val"):
        hue = np.asarray(Image.fromarray(image).convert("HSV"))[..., 0]
        for thing in {*labels[labels < 20].tolist()}:
            angle = hue[labels == thing] / 256 * 2 * np.pi
            hues.setdefault(thing, []).append(np.exp(1j * angle).mean())
    for found in hues.values():  # a random walk
        assert abs(np.sum(found)) < 3 * len(found) ** 0.5
    assert len(hues) == 20


def test_drawing_begins_again_after_a_kill_and_leaves_a_whole_data_set_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "SPLITS", {"train": 2, "val": 1})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shapes, "draw", interrupted(shapes.draw, 2))
        shapes.generate(tmp_path)
    assert (tmp_path / "images" / "train").is_dir() and not (tmp_path / "captions.json").exists()
    shapes.generate(tmp_path)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    assert sum(file.suffix in (".jpg", ".png") for file in files) == 6
    shapes.generate(tmp_path)
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}


def test_the_small_clip_begins_again_after_a_kill(shapes_root, tmp_path, monkeypatch):
    shutil.copytree(shapes_root / "shapes", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "clip.pt"
    wanted = file.read_bytes()
    shapes_clip.train_small_clip(tmp_path, steps=1)
    assert file.read_bytes() == wanted  # it was there
    file.unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shapes_clip, "contrastive_loss", interrupted(shapes_clip.contrastive_loss, 0))
        shapes_clip.train_small_clip(tmp_path, steps=1)
    assert not file.exists()
    weights = []
    for _ in range(2):
        shapes_clip.train_small_clip(tmp_path, steps=1)
        clip = load_clip(load_config(None, [f"clip.weights={file}"]).clip, tmp_path)
        weights.append(clip.text_projection)
        file.unlink()
    assert torch.equal(*weights)


def interrupted(function, calls):
    def call(*words):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise KeyboardInterrupt
        return function(*words)

    return call


def test_a_folder_of_other_files_or_classes_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="not this program's"):
        shapes.generate(tmp_path)
    for text in ('{"classes": ["disc"]}', "{}", "[]", "{", "null"):
        (tmp_path / "captions.json").write_text(text)
        with pytest.raises(UserError, match="drawn by another version"):
            shapes.generate(tmp_path)
    assert len([*tmp_path.iterdir()]) == 2


def test_a_contrastive_sample_has_every_class_once(shapes_root):
    regions = shapes_clip.read_regions(shapes_root / "shapes")
    clip = shapes_clip.build_small_clip()
    crops, captions = shapes_clip.sample(clip, regions, 5)
    assert crops.shape == (25, 3, 48, 48)
    assert all(name in text for name, text in zip(shapes.NAMES, captions, strict=True))
    assert (crops == 0).float().mean() < 1e-3  # nothing is masked, which would be 0
    again, same = shapes_clip.sample(clip, regions, 5)
    assert torch.equal(crops, again) and captions == same


# Learned prompts

LEARN = (
    "data.name=shapes",
    "data.split=test",
    "data.workers=0",
    "clip.weights={root}/shapes/clip.pt",
    "train.steps=4",
    "train.batch_size=4",
    "train.checkpoint_every=2",
    "log.every=1",
    "prompts.samples_per_class=3",
    "prompts.held_out=2",
    "prompts.warmup_steps=1",
)


@pytest.fixture(scope="module")
def more_root(shapes_root, tmp_path_factory):
    """Enough training images to set some regions of every class aside."""
    root = tmp_path_factory.mktemp("more")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SPLITS", {"clip": 1, "train": 80, "val": 1, "test": 1})
        shapes.generate(root / "shapes")
    shutil.copy(shapes_root / "shapes" / "clip.pt", root / "shapes" / "clip.pt")
    return root


def learn_config(*settings):
    return load_config(ROOT / "configs" / "voc_prompts.toml", [*LEARN, *settings])


def learn(root, out, *settings):
    words = [word for setting in (*LEARN, *settings) for word in ("--set", setting)]
    words += ["--root", root, "--out", out, "--device", "cpu"]
    done = command("train.py", "--config", "configs/voc_prompts.toml", *words)
    assert done.returncode == 0, done.stderr
    return load_checkpoint(out / "last.pt"), done.stdout


def test_seeds_learn_side_by_side_as_they_would_alone(more_root, tmp_path):
    both, printed = learn(more_root, tmp_path / "both", "train.seeds=[3, 5]")
    both = both["model"]
    names = {name: [*part] for name, part in both.items()}
    assert names == {"prompt": ["prefix"], "prompts": ["3.prefix", "5.prefix"]}
    for seed in (3, 5):
        alone, _ = learn(more_root, tmp_path / str(seed), f"train.seeds=[{seed}]")
        alone = alone["model"]["prompt"]["prefix"]
        assert torch.allclose(both["prompts"][f"{seed}.prefix"], alone, atol=1e-5)
    result = json.loads((tmp_path / "both" / "metrics.json").read_text())
    scores = {seed: row["per_class"] for seed, row in result["seeds"].items()}
    best = str(result["kept_seed"])
    assert set(scores) == {"3", "5"} and scores[best] == max(scores.values())
    assert result["mean"] == pytest.approx(sum(scores.values()) / 2)
    assert result["std"] == pytest.approx(abs(scores["3"] - scores["5"]) / 2)
    assert torch.equal(both["prompt"]["prefix"], both["prompts"][f"{best}.prefix"])
    assert f"seed {best}" in printed and result["held_out_regions"] > 0
    lines = (tmp_path / "both" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line).get("lr") for line in lines][:4]
    cosine = [0.01 * (1 + np.cos(np.pi * step / 4)) for step in (1, 2, 3)]
    assert rates == pytest.approx([0.02 * 0.005, *cosine])  # a constant warm-up, then cosine


def test_an_evaluation_decides_nothing_by_itself(more_root, tmp_path):
    task = PromptTask(learn_config("train.seeds=[3, 5]"), more_root, tmp_path, PROCESS, None)
    task.evaluate("test")
    prefixes = [prompt.prefix for prompt in task.clipped]
    for seed, prefix in zip((3, 5), prefixes, strict=True):
        chosen = task.state({"kept_seed": seed})
        assert torch.equal(chosen["prompt"]["prefix"], prefix)
    assert torch.equal(task.state()["prompt"]["prefix"], prefixes[0])
    assert not torch.equal(*prefixes)


def test_only_the_prompt_learns_with_the_paper_s_step(more_root, tmp_path):
    """The gradient of each is clipped to norm 0.01: an update of 0.02 x 0.01, and little decay."""
    task = PromptTask(learn_config("train.seeds=[3, 5]"), more_root, tmp_path, PROCESS, None)
    batch = task.collate([task.samples[n] for n in range(16)])
    assert not task.model.train().clip.training
    loss, _ = task.loss(task.model, batch)
    loss.backward()
    learned = [name for name, p in task.model.named_parameters() if p.grad is not None]
    assert learned == ["prompts.3.prefix", "prompts.5.prefix"]
    before = [prompt.prefix.detach().clone() for prompt in task.clipped]
    with torch.no_grad():
        for prompt in task.clipped:
            prompt.prefix -= 1e-3 * prompt.prefix.grad / prompt.prefix.grad.norm()
    assert task.loss(task.model, batch)[0] < loss
    settings = ("train.seeds=[3, 5]", "train.steps=1", "prompts.warmup_steps=0")
    after, _ = learn(more_root, tmp_path / "step", *settings)
    for seed, prefix in zip((3, 5), before, strict=True):
        step = after["model"]["prompts"][f"{seed}.prefix"] - prefix
        assert float(step.norm()) == pytest.approx(0.02 * 0.01, rel=0.1)


def test_samples_are_crops_of_regions_and_those_held_out_are_never_drawn(more_root):
    config = tiny_config("prompts.samples_per_class=3", "prompts.held_out=2")
    samples = RegionSamples(config, more_root)
    held_out = RegionSamples(config, more_root, held_out=True)
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


def test_a_prompt_learns_from_what_clip_sees_at_inference(more_root, tmp_path):
    task = PromptTask(learn_config(), more_root, tmp_path, PROCESS, None)
    image, label, category = task.held_out.item(1)
    crops, classes = task.crops([task.held_out[1]])
    mask = torch.from_numpy(np.asarray(Image.open(label)) == dataset("shapes").seen[category])[None]
    pixels = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)
    wanted = region_crops(task.model.clip, pixels, mask, box_of(mask))
    assert torch.allclose(crops, wanted, atol=1e-5) and classes.tolist() == [category]


def test_with_nothing_held_out_there_is_nothing_to_compare(shapes_root, tmp_path):
    learned, _ = learn(shapes_root, tmp_path, "train.seeds=[3, 5]", "prompts.held_out=0")
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["mean"] is result["std"] is result["seeds"]["3"]["top1"] is None
    assert result["held_out_regions"] == 0 and "prompt" in learned["model"]


def test_a_learned_prompt_moves_into_the_segmenter_s_checkpoint(more_root, tmp_path):
    learned, _ = learn(more_root, tmp_path / "prompt", "train.seeds=[0]")
    file = tmp_path / "prompt" / "last.pt"
    settings = (*TINY, "train.steps=2", "train.checkpoint_every=1", "train.eval_every=0")
    settings += ("clip.region_prompt=learned", f"clip.prompts={file}")
    words = [word for setting in settings for word in ("--set", setting)]
    words += ["--config", "configs/shapes.toml", "--root", more_root, "--device", "cpu"]
    out = tmp_path / "run"
    assert command("train.py", *words, "--out", out).returncode == 0
    wanted = load_checkpoint(out / "last.pt")
    prefix = learned["model"]["prompt"]["prefix"]
    assert torch.equal(wanted["model"]["region_prompt"]["prefix"], prefix)
    # Whatever has become of the file: a resumed run and an evaluation keep the prompt.
    learned["model"]["prompt"]["prefix"] = prefix + 1
    save(file, **learned)
    shutil.copy(out / "previous.pt", out / "last.pt")
    resume = ["train.py", "--resume", "--out", out, "--root", more_root, "--device", "cpu"]
    assert command(*resume).returncode == 0
    resumed = load_checkpoint(out / "last.pt")["model"]
    for name, part in wanted["model"].items():
        assert all(torch.equal(tensor, resumed[name][key]) for key, tensor in part.items())
    file.unlink()
    words = ["--root", more_root, "--device", "cpu", "--out", tmp_path / "eval"]
    assert command("eval.py", out / "last.pt", *words).returncode == 0
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


@pytest.fixture(scope="module")
def teacher(shapes_run, tmp_path_factory):
    """With `clip.ensemble_seen = false`, which decides how classes weigh, not which are unseen."""
    content = load_checkpoint(shapes_run / "last.pt")
    content["config"]["clip"]["ensemble_seen"] = False
    file = tmp_path_factory.mktemp("teacher") / "last.pt"
    save(file, **content)
    return file


def test_self_training_is_resumable_and_blind_to_hidden_labels(teacher, shapes_root, tmp_path):
    settings = (*TINY, "train.steps=2", "train.eval_every=0", "data.train_on=all")
    settings += (f"train.teacher={teacher}",)
    words = [word for setting in settings for word in ("--set", setting)]
    words += ["--config", "configs/shapes.toml", "--root", shapes_root, "--device", "cpu"]
    done = command("train.py", *words, "--out", tmp_path / "run")
    assert done.returncode == 0 and "% unlabelled" in done.stdout, done.stderr
    config = tiny_config(*settings)
    folder = tmp_path / "run" / "pseudo"
    maps = {file.name: file.read_bytes() for file in folder.glob("*.png")}
    assert len(maps) == 10
    for i, (_, label) in enumerate(find_pairs(config.data, shapes_root, "train")):
        truth = np.asarray(Image.open(label))
        ours = np.asarray(Image.open(folder / f"{i:06}.png"))
        hidden = np.isin(truth, UNSEEN)
        assert (ours == truth)[~hidden].all() and np.isin(ours[hidden], [*UNSEEN, 255]).all()
    counts = json.loads((folder / "counts.json").read_text())
    assert sum(counts.values()) == 10 * 96 * 96 and {*counts} == {*shapes.NAMES, "unlabelled"}
    # Killed half-way: what is there stays, the rest comes out the same.
    first, second = sorted(maps)[:2]
    (folder / first).unlink()
    (folder / "counts.json").unlink()
    (folder / second).write_bytes(b"")
    with pytest.raises(UserError, match=second):  # counted at the end
        pseudo_labels(config, shapes_root, folder, PROCESS)
    assert (folder / first).read_bytes() == maps[first] and not (folder / second).read_bytes()
    # Other unseen classes in the truth: the same label maps.
    other = tmp_path / "root"
    shutil.copytree(shapes_root, other)
    for _, label in find_pairs(config.data, other, "train"):
        truth = np.asarray(Image.open(label))
        changed = np.where(np.isin(truth, UNSEEN), UNSEEN[0], truth)
        Image.fromarray(changed.astype(np.uint8)).save(label)
    again = pseudo_labels(config, other, tmp_path / "again", PROCESS)
    assert {file.name: file.read_bytes() for file in again.glob("*.png")} == maps
    with pytest.raises(UserError, match="from other images"):
        pseudo_labels(config, shapes_root, again, PROCESS)
    with pytest.raises(UserError, match="with other settings"):
        pseudo_labels(tiny_config(*settings, "train.min_probability=0.01"), other, again, PROCESS)
    gone = tiny_config(*settings, f"train.teacher={tmp_path}/gone.pt")
    assert pseudo_labels(gone, other, again, PROCESS) == again  # label maps outlive their teacher


def test_a_teacher_that_teaches_nothing_ends_in_one_line(teacher, shapes_root, tmp_path):
    words = ["--config", "configs/shapes.toml", "--root", shapes_root, "--device", "cpu"]
    words += [word for setting in TINY for word in ("--set", setting)]
    words += ["--set", f"train.teacher={teacher}"]
    done = command("train.py", *words, "--out", tmp_path / "a")
    fails_in_one_line(done, "train.teacher", "unseen classes", "train_on")
    words += ["--set", "data.train_on=all", "--set", "train.min_probability=1"]
    for _ in range(2):  # the second time all maps are there
        done = command("train.py", *words, "--out", tmp_path / "b")
        fails_in_one_line(done, "train.teacher", "no pixel with an unseen class")
