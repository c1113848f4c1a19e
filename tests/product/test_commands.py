"""The three commands as users run them: what they leave, several processes, mistakes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import own_data
import pytest
import torch
from conftest import ROOT, command, fails_in_one_line, logged, process, shapes_words, succeed
from PIL import Image

from zsseg.datasets import DATASETS
from zsseg.utils import expand_path
from zsseg.weights import load_checkpoint

SHAPES = ["--config", "configs/shapes.toml", "--device", "cpu"]
METRICS = "mIoU mIoU_gt fwIoU mAcc pAcc mIoU_seen mIoU_unseen hIoU pAcc_seen pAcc_unseen"
METRICS += " per_class images images_per_second head_only clip_only clip_objectness"


def without_speed(file: Path) -> str:
    return re.sub(r".*images_per_second.*\n", "", file.read_text())


def test_training_leaves_what_the_contract_says(shapes_run):
    """last.pt, best.pt, metrics.jsonl with every step and evaluation, metrics.json."""
    names = {"last.pt", "previous.pt", "best.pt", "metrics.jsonl", "metrics.json", "samples.png"}
    assert {file.name for file in shapes_run.iterdir()} == names | {".zsseg"}
    lines = logged(shapes_run)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        parts = [v for k, v in line.items() if k.split("/")[0] in ("class", "focal", "dice")]
        assert line["loss"] == pytest.approx(sum(parts), rel=1e-5) and len(parts) == 9
        assert 0 < line["speed/data_wait"] < 100 and line["speed/images_per_second"] > 0
    assert [line["step"] for line in lines if "val/hIoU" in line] == [2]
    assert "test/hIoU" in lines[-1]
    content = load_checkpoint(shapes_run / "last.pt")
    assert content["step"] == 4 and content["config"]["train"]["batch_size"] == 4
    seen = DATASETS["shapes"].training_names
    assert content["trained"] == seen and len(seen) == 20
    assert load_checkpoint(shapes_run / "best.pt")["step"] == 2


def test_evaluation_repeats_the_numbers_of_training(shapes_run, shapes_root, tmp_path):
    """From one process and from two, to the same confusion matrix; predictions are saved. The first
    image alone, too, where the second process has none.
    """
    words = [shapes_run / "last.pt", "--root", shapes_root, "--device", "cpu"]
    first = ["--set", "eval.max_images=1", "--set", "eval.weights=[0.5]"]
    for n in (1, 2):
        succeed("eval.py", *words, "--save-predictions", "--out", tmp_path / str(n), processes=n)
        succeed("eval.py", *words, *first, "--out", tmp_path / f"first{n}", processes=n)
    for folders in ((shapes_run, tmp_path / "1", tmp_path / "2"), tmp_path.glob("first*")):
        files = [folder / "metrics.json" for folder in folders]
        assert len(files) > 1 and len({*map(without_speed, files)}) == 1
        result = json.loads(files[0].read_text())
        assert {*METRICS.split()} <= result.keys()
        assert result["images"] == (1 if "weight_0.5" in result else 4)
    maps = sorted((tmp_path / "1" / "predictions").iterdir())
    assert [file.name for file in maps] == [f"test0000{i}.png" for i in range(4)]
    for file in maps:
        labels = np.array(Image.open(file))
        assert labels.shape == (64, 64) and labels.max() < 25


def test_supervised_training_needs_no_clip(shapes_root, tmp_path):
    """All classes, a linear head, no CLIP file; evaluation too."""
    root = tmp_path / "root"
    shutil.copytree(shapes_root, root)
    (root / "shapes" / "clip.pt").unlink()
    settings = ("model.class_head=linear", "clip.ensemble=false", "model.weights=", "train.steps=2")
    words = shapes_words(root, tmp_path / "out", *settings)
    fails_in_one_line(command("train.py", *words), "data.train_on")
    succeed("train.py", *words, "--set", "data.train_on=all")
    last = tmp_path / "out" / "last.pt"
    succeed("eval.py", last, "--root", root, "--out", tmp_path / "eval", "--device", "cpu")
    first, second = (without_speed(tmp_path / f / "metrics.json") for f in ("out", "eval"))
    assert first == second and "head_only" not in first


# --- starting


STARTS = [(f"{name}.py --help", "") for name in ("train", "eval", "prepare_data")]
STARTS += [(f"{name}.py --hlep x", "--hlep") for name in ("train", "eval", "prepare_data")]
STARTS += [
    ("train.py --config absent", "no such file"),
    ("prepare_data.py absent", "absent"),
    ("eval.py zsseg-coco-vld", "or give one of zsseg-coco-vild, "),
    ("eval.py eval.py --images tests --classes words.txt", "is no name, but a file"),
    ("eval.py eval.py --config nowhere.toml", "no such file"),
    ("eval.py eval.py --set clip.ensembl=1", "did you mean clip.ensemble?"),
]


@pytest.mark.parametrize(("words", "part"), STARTS)
def test_help_and_mistakes_answer_before_heavy_imports(words, part):
    """Measured by what is imported, not by the clock: none of torch, SciPy and NumPy."""
    code = (
        "import atexit, runpy, sys; sys.argv = sys.argv[1:]; atexit.register(lambda: print("
        "'imported', {'torch', 'scipy', 'numpy'} & sys.modules.keys()));"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = process("-c", code, *words.split())
    assert done.returncode == (2 if part else 0) and part in done.stderr, done.stderr
    assert "imported set()" in done.stdout


def test_the_package_works_from_any_folder(tmp_path):
    """Also beside another package named kernels."""
    (tmp_path / "kernels").mkdir()
    code = "from zsseg import load; import kernels; print(kernels.__file__)"
    words = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(ROOT / "kernels" / "__init__.py")


def test_home_is_a_tilde(root):
    home = {"HOME": str(root)}
    done = succeed("prepare_data.py", "folder", "--config=~/a.toml", "--root=~", env=home)
    assert "val: 2 images" in done.stdout
    nobody = "~nobody-of-this-name/x"
    assert str(expand_path(nobody)) == nobody


# --- mistakes


def test_mistakes_in_training(shapes_root, tmp_path):
    shapes = [*SHAPES, "--root", shapes_root]
    long = f"clip.prompt=['{'a ' * 30}{{}}']"
    empty = ["--root", tmp_path / "nothing"]
    for words, *parts in (
        ([*SHAPES, *empty], "shapes", "prepare_data.py shapes"),
        (["--config", "configs/voc_r50_single.toml", *empty], "prepare_data.py voc"),
        (["--config", "configs/shape.toml"], "did you mean configs/shapes.toml?"),
        ([], "--config"),
        ([*shapes, "--device", "gpu"], "gpu", "cuda"),
        ([*shapes, "--resme"], "--resme", "did you mean --resume?"),
        ([*shapes, "--resume"], "has no run", "leave --resume out"),
        ([*shapes, "--set", "data.split=nope"], "nope", "val, test"),
        ([*shapes, "--set", long], "tokens", "shorten"),
    ):
        fails_in_one_line(command("train.py", *words, "--out", tmp_path / "out"), *parts)
    assert not (tmp_path / "out" / "last.pt").exists()


def test_the_output_folder_must_be_one(shapes_root, shapes_run, tmp_path):
    """A file, a folder with the user's files, and another run's are refused and stay."""
    run = lambda out: command("train.py", *shapes_words(shapes_root, out))
    (tmp_path / "file").write_text("a file")
    fails_in_one_line(run(tmp_path / "file"), "cannot be written")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metrics.json").write_text("mine")
    fails_in_one_line(run(tmp_path / "mine"), "not this program's")
    assert (tmp_path / "mine" / "metrics.json").read_text() == "mine"
    before = (shapes_run / "last.pt").read_bytes()
    fails_in_one_line(run(shapes_run), "has a run", "--resume")
    assert (shapes_run / "last.pt").read_bytes() == before


def test_a_resumed_run_must_fit_its_checkpoint(shapes_run, shapes_root, tmp_path):
    shutil.copytree(shapes_run, tmp_path / "run")
    words = ["--root", shapes_root, "--out", tmp_path / "run", "--resume", "--device", "cpu"]
    done = command("train.py", *words, "--set", "train.weight_decay=0")
    fails_in_one_line(done, "last.pt", "cannot resume")
    done = command("train.py", *words, "--set", "model.num_queries=9")
    fails_in_one_line(done, "last.pt", "query_embed.weight")
    clip = torch.load(shapes_root / "shapes" / "clip.pt")
    torch.save(clip | {"text_projection": 2 * clip["text_projection"]}, tmp_path / "clip.pt")
    done = command("train.py", *words, "--set", f"clip.weights={tmp_path / 'clip.pt'}")
    assert "run/last.pt was made for another CLIP than clip.weights" in done.stdout


def test_own_data_without_val_is_validated_on_what_is_measured(root, shapes_root):
    """Roboflow's names; a split that is not there is named, and the option. No other data set is
    validated on its test split.
    """
    for kind in ("images", "masks"):
        (root / "a" / kind / "val").rename(root / "a" / kind / "valid")
    words = ["--set", "train.eval_every=2"]
    fails_in_one_line(own_data.train(root, *words), "for val", "data.split")
    done = own_data.train(root, *words, "--set", "data.split=valid")
    assert "no split val: best.pt will be the best on data.split, valid" in done.stdout
    assert [line["step"] for line in logged(root / "r") if "valid/mIoU" in line] == [2, 4]
    assert load_checkpoint(root / "r" / "best.pt")["step"] == 2
    (root / "shapes" / "images").mkdir(parents=True)
    for name in ("labels", "images/train", "images/test"):
        (root / "shapes" / name).symlink_to(shapes_root / "shapes" / name)
    done = command("train.py", *SHAPES, *words, "--root", root, "--out", root / "s")
    fails_in_one_line(done, "data set shapes: no 'val' images")


def test_mistakes_in_evaluation(shapes_run, shapes_root, tmp_path):
    out = ["--out", tmp_path / "out", "--root", shapes_root, "--device", "cpu"]
    theirs = tmp_path / "theirs.pth"
    torch.save({"model": {"backbone.stem.conv1.weight": torch.zeros(1)}}, theirs)
    (tmp_path / "junk.pt").write_bytes(b"PK\x03\x04junk")
    last = shapes_run / "last.pt"
    for words, *parts in (
        ([tmp_path / "no.pt"], "no.pt", "no such file"),
        ([tmp_path / "junk.pt"], "junk.pt", "cannot be read"),
        ([theirs], "give its --config"),
        ([last, "--set", "model.num_queries=9"], "query_embed.weight", "shape"),
        ([last, "--set", "clip.prompt=learned"], "may come from clip.prompts"),
        ([last, "--export", "x"], "--export is not an option"),
    ):
        fails_in_one_line(command("eval.py", *words, *out), *parts)
    assert not (tmp_path / "out" / "metrics.json").exists()


# --- streams


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["> /dev/full", "| head -c 1"])
def test_printing_never_ends_a_run(streams, trained, tmp_path):
    """A full disk, a reader that is gone, a terminal that cannot encode a character."""
    folder = tmp_path / "own"
    shutil.copytree(trained.parent.parent, folder)
    config = folder / "a.toml"
    config.write_text(config.read_text().replace("grass", "猫"), encoding="utf-8")
    words = f"{sys.executable} eval.py {folder}/run/last.pt --config {config} --root {folder}"
    words += f" --out {folder}/o --device cpu {streams}"
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", words], cwd=ROOT, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert "猫" in json.loads((folder / "o" / "metrics.json").read_text())["per_class"]
