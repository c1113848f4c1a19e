"""The three commands as users run them: training, resuming, several processes, evaluation,
mistakes.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROCESS, ROOT, command, fails_in_one_line, tiny_config
from PIL import Image

import eval as evaluation
import prepare_data
import train
from zsseg import checkpoint, command_line, losses
from zsseg.datasets import DATASETS, DataSet

TINY = ["--config", "configs/shapes.toml", "--device", "cpu"]
for setting in (
    "train.batch_size=4",
    "train.steps=4",
    "train.checkpoint_every=2",
    "log.every=1",
    "data.workers=0",
    "data.crop=64",
    "data.short_edges=[64]",
    "data.test_short_edge=64",
    "model.queries=8",
    "model.decoder_layers=2",
):
    TINY += ["--set", setting]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(path)["model"]["maskformer"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def trained(shapes_root, tmp_path_factory) -> Path:
    """Four steps of training through the command line, with an evaluation on the way."""
    out = tmp_path_factory.mktemp("run")
    result = command(
        "train.py", *TINY, "--root", shapes_root, "--out", out, "--set", "train.eval_every=2"
    )
    assert result.returncode == 0, result.stderr
    assert (
        "CLIP on the ground-truth masks" in result.stdout
        and "MaskFormer only" in result.stdout
        and "hIoU" in result.stdout
    )
    return out


def test_training_leaves_what_the_contract_says(trained):
    names = {"last.pt", "previous.pt", "best.pt", "metrics.jsonl", "metrics.json", "samples.png"}
    assert {f.name for f in trained.iterdir()} == names
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert [line["step"] for line in lines if "val/hIoU" in line] == [2] and "test/hIoU" in lines[
        -1
    ]
    content = checkpoint.load(trained / "last.pt")
    assert content["step"] == 4 and content["config"]["train"]["batch_size"] == 4
    assert checkpoint.load(trained / "best.pt")["step"] == 2
    assert Image.open(trained / "samples.png").size == (4 * 160, 3 * 160)


def test_evaluation_repeats_the_numbers_of_training(trained, shapes_root, tmp_path):
    """Also from two and three processes, with the exact same confusion matrix, and with its
    predictions saved.
    """
    arguments = [trained / "last.pt", "--root", shapes_root, "--device", "cpu"]
    for n in (1, 2, 3):
        words = [
            *arguments,
            "--out",
            tmp_path / str(n),
            *(["--save-predictions"] if n == 1 else []),
        ]
        result = command("eval.py", *words, processes=n, env={"OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
    texts = [
        (folder / "metrics.json").read_text()
        for folder in (trained, *(tmp_path / n for n in "123"))
    ]
    same = [
        "\n".join(line for line in text.splitlines() if "images_per_second" not in line)
        for text in texts
    ]
    assert same[0] == same[1] == same[2] == same[3] and '"images": 4' in same[0]
    results = [json.loads(text) for text in texts]
    assert {
        "mIoU",
        "mIoU_gt",
        "fwIoU",
        "mAcc",
        "pAcc",
        "mIoU_seen",
        "mIoU_unseen",
        "hIoU",
        "pAcc_seen",
        "pAcc_unseen",
        "per_class",
        "images",
        "head_only",
        "clip_only",
        "clip_objectness",
        "clip_true_masks",
    } == set(results[1]) - {"images_per_second", "program", "ignored"}
    maps = sorted((tmp_path / "1" / "predictions").iterdir())
    assert [m.name for m in maps] == [f"test0000{i}.png" for i in range(4)]
    assert all(
        np.array(Image.open(m)).shape == (96, 96) and np.array(Image.open(m)).max() < 25
        for m in maps
    )


def test_supervised_training_needs_no_clip(shapes_root, tmp_path, monkeypatch, capsys):
    """All classes, a linear head, no CLIP file; evaluation too."""
    root = tmp_path / "root"
    shutil.copytree(shapes_root, root)
    (root / "shapes" / "clip.pt").unlink()
    monkeypatch.chdir(ROOT)
    words = [*TINY, "--root", str(root), "--out", str(tmp_path / "out")]
    for setting in (
        "model.class_head=linear",
        "data.train_on=all",
        "clip.ensemble=false",
        "model.weights=",
        "train.steps=2",
    ):
        words += ["--set", setting]
    train.main(words)
    evaluation.main(
        [str(tmp_path / "out" / "last.pt"), "--root", str(root), "--out", str(tmp_path / "eval")]
    )
    results = [json.loads((tmp_path / f / "metrics.json").read_text()) for f in ("out", "eval")]
    assert results[0]["mIoU"] == results[1]["mIoU"] and "head_only" not in results[0]
    assert weights(tmp_path / "out" / "last.pt")["class_embed.weight"].shape == (26, 64)
    words[words.index("data.train_on=all")] = "data.train_on=seen"
    words[words.index(str(tmp_path / "out"))] = str(tmp_path / "other")
    fails(capsys, monkeypatch, train.main, words, "data.train_on", "linear head")


def test_costs_and_losses_run_outside_autocast(shapes_root, tmp_path, monkeypatch):
    dtypes, cost = set(), losses.matching_cost
    monkeypatch.setattr(
        losses, "matching_cost", lambda *a: dtypes.add(torch.is_autocast_enabled("cpu")) or cost(*a)
    )
    train.train(
        tiny_config("train.steps=1", "model.bf16=on", "eval.compare=false"),
        shapes_root,
        tmp_path,
        PROCESS,
        {},
    )
    assert dtypes == {False}


def test_check_reports_histogram_and_absence_of_unseen_pixels(shapes_root, capsys):
    prepare_data.main(["shapes", "--root", str(shapes_root), "--check"])
    text = capsys.readouterr().out
    assert "shapes train: 10 images" in text and "shapes val: 6 images" in text
    assert "pixels of the 5 unseen classes (cup" in text and "brick" in text


# --- mistakes


def fails(capsys, monkeypatch, main, arguments: list[str], *parts: str) -> None:
    """In this process: command_line.command must end with code 2 and one line."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        command_line.command(main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert (
        stop.value.code == 2
        and len(lines) == 1
        and lines[0].startswith("error: ")
        and lines[0].count("; ") >= 1
    )
    assert all(part in lines[0] for part in parts), lines[0]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["--root", "{empty}", "--config", "configs/shapes.toml"],
            ["shapes", "prepare_data.py shapes"],
        ),
        (["--config", "configs/absent.toml"], ["absent.toml", "No such file"]),
        (["--config", "shapes"], ["did you mean configs/shapes.toml?"]),
        (["--config", "configs/shapes.toml", "--device", "gpu"], ["choose one of", "cuda"]),
        (
            [
                "--config",
                "configs/shapes.toml",
                "--root",
                "{root}",
                "--set",
                "clip.weights=ViT-B/31",
            ],
            ["did you mean ViT-B/32?"],
        ),
        (
            [
                "--config",
                "configs/shapes.toml",
                "--root",
                "{root}",
                "--set",
                "train.eval_every=1",
                "--set",
                "data.name=voc",
                "--set",
                "data.split=val",
            ],
            ["data set voc"],
        ),
        ([], ["--config"]),
        (["--config", "configs/shapes.toml", "--colour"], ["--colour"]),
        (
            ["--config", "configs/voc_r50_single.toml", "--set", "train.stps=1"],
            ["train.stps", "train.steps"],
        ),
        (
            ["--config", "configs/shapes.toml", "--root", "{root}", "--set", "data.name=pets"],
            ["pets", "voc"],
        ),
        (
            [
                "--config",
                "configs/shapes.toml",
                "--root",
                "{root}",
                "--set",
                "data.name=voc",
                "--set",
                "data.split=val",
            ],
            ["voc", "prepare_data.py voc"],
        ),
        (
            ["--config", "configs/shapes.toml", "--root", "{root}", "--set", "clip.prompt=poem"],
            ["clip.prompt", "imagenet"],
        ),
        (
            ["--config", "configs/shapes.toml", "--root", "{root}", "--set", "data.split=nope"],
            ["nope", "val, test"],
        ),
        (
            ["--config", "configs/shapes.toml", "--root", "{root}", "--set", "clip.prompt=learned"],
            ["no learned prompt"],
        ),
        (
            ["--config", "configs/shapes.toml", "--root", "{root}", "--resume"],
            ["holds no run", "leave --resume out"],
        ),
        (
            [
                "--config",
                "configs/shapes.toml",
                "--root",
                "{root}",
                "--set",
                "clip.prompt=['a very long and winding description of one single {} on a wall']",
            ],
            ["tokens", "shorten"],
        ),
    ],
)
def test_mistakes_in_training(capsys, monkeypatch, shapes_root, tmp_path, arguments, parts):
    words = [
        a.format(empty=tmp_path / "nothing", root=shapes_root) if a[0] == "{" else a
        for a in arguments
    ]
    fails(capsys, monkeypatch, train.main, [*words, "--out", tmp_path / "out"], *parts)
    assert not (tmp_path / "out").exists()


def test_the_output_folder_must_be_one(capsys, monkeypatch, shapes_root, tmp_path):
    (tmp_path / "out").write_text("a file")
    fails(
        capsys,
        monkeypatch,
        train.main,
        [*TINY, "--root", shapes_root, "--out", tmp_path / "out"],
        "cannot be written",
    )
    assert (tmp_path / "out").read_text() == "a file"


def test_a_resumed_run_must_fit_its_checkpoint(capsys, monkeypatch, trained, shapes_root):
    arguments = [
        *TINY[:4],
        "--root",
        shapes_root,
        "--out",
        trained,
        "--resume",
        "--set",
        "train.weight_decay=0",
    ]
    fails(capsys, monkeypatch, train.main, arguments, "last.pt", "cannot resume")


def test_check_finds_an_unseen_pixel(monkeypatch, shapes_root):
    """The check would notice a table that lets an unseen class through."""
    real = DataSet.lut

    def leaky(self: DataSet, training: bool = False) -> np.ndarray:
        table = real(self, training)
        table[self.values[self.names.index(self.unseen[0])]] = 0
        return table

    monkeypatch.setattr(DataSet, "lut", leaky)
    with pytest.raises(AssertionError, match="unseen class survived"):
        prepare_data.main(["shapes", "--root", str(shapes_root), "--check"])


def test_a_missing_class_name_is_noticed(capsys, monkeypatch, trained, shapes_root, tmp_path):
    names = ["", *DATASETS["shapes"].names[1:]]
    monkeypatch.setitem(DATASETS, "shapes", dataclasses.replace(DATASETS["shapes"], names=names))
    arguments = [trained / "last.pt", "--root", shapes_root, "--out", tmp_path / "out"]
    fails(capsys, monkeypatch, evaluation.main, arguments, "class 0: has no name")


def test_a_run_is_not_overwritten(capsys, monkeypatch, trained, shapes_root):
    before = (trained / "last.pt").read_bytes()
    fails(
        capsys,
        monkeypatch,
        train.main,
        [*TINY, "--root", shapes_root, "--out", trained],
        "--resume",
    )
    assert (trained / "last.pt").read_bytes() == before


def test_mistakes_in_evaluation(capsys, monkeypatch, trained, shapes_root, tmp_path):
    out = ["--out", tmp_path / "out", "--root", shapes_root]
    fails(capsys, monkeypatch, evaluation.main, [tmp_path / "no.pt", *out], "no.pt", "no such file")
    (tmp_path / "junk.pt").write_bytes(b"PK\x03\x04junk")
    fails(
        capsys,
        monkeypatch,
        evaluation.main,
        [tmp_path / "junk.pt", *out],
        "junk.pt",
        "cannot be read",
    )
    torch.save({"model": {"backbone.stem.conv1.weight": torch.zeros(1)}}, tmp_path / "theirs.pth")
    fails(
        capsys, monkeypatch, evaluation.main, [tmp_path / "theirs.pth", *out], "give its --config"
    )
    theirs = [
        tmp_path / "theirs.pth",
        "--config",
        "configs/voc_r50_single.toml",
        "--set",
        "data.name=shapes",
        *out,
    ]
    fails(capsys, monkeypatch, evaluation.main, theirs, "holds no CLIP")
    wrong = [trained / "last.pt", *out, "--set", "model.queries=9"]
    fails(capsys, monkeypatch, evaluation.main, wrong, "query_embed.weight has shape")
    checkpoint.save(
        tmp_path / "clip.pt",
        model={"text_projection": torch.zeros(1)},
        config=asdict(tiny_config(task="clip")),
    )
    fails(capsys, monkeypatch, evaluation.main, [tmp_path / "clip.pt", *out], "holds no segmenter")
    learned = [trained / "last.pt", *out, "--set", "clip.prompt=learned"]
    fails(capsys, monkeypatch, evaluation.main, learned, "no learned prompt")
    assert not (tmp_path / "out").exists()


def test_broken_data_stops_evaluation_and_names_the_file(
    capsys, monkeypatch, trained, shapes_root, tmp_path
):
    root = tmp_path / "root"
    subprocess.run(["cp", "-r", str(shapes_root), str(root)], check=True)
    Image.new("L", (10, 10)).save(root / "shapes" / "labels" / "test" / "test00001.png")
    arguments = [trained / "last.pt", "--root", root, "--out", tmp_path / "out"]
    fails(
        capsys,
        monkeypatch,
        evaluation.main,
        arguments,
        "test00001.png",
        "is 10 x 10, its image 96 x 96",
    )
    (root / "shapes" / "labels" / "test" / "test00001.png").write_bytes(b"")
    fails(capsys, monkeypatch, evaluation.main, arguments, "test00001.png", "cannot be read")
    assert not (tmp_path / "out").exists()


def test_broken_data_in_a_worker_is_one_line_too(trained, shapes_root, tmp_path):
    root = tmp_path / "root"
    subprocess.run(["cp", "-r", str(shapes_root), str(root)], check=True)
    (root / "shapes" / "images" / "test" / "test00002.jpg").write_bytes(b"junk")
    result = command(
        "eval.py",
        trained / "last.pt",
        "--root",
        root,
        "--out",
        tmp_path / "out",
        "--set",
        "data.workers=2",
    )
    fails_in_one_line(result, "test00002.jpg", "cannot be read")


def test_missing_vocabulary(capsys, monkeypatch, tmp_path, shapes_root):
    from zsseg.clip import CLIP, VisionTransformer

    big = CLIP(VisionTransformer(32, 16, 64, 1, 16), 16, 77, 49408, 64, 1)
    torch.save(big.state_dict(), tmp_path / "clip.pt")
    monkeypatch.setenv("ZSSEG_VOCAB", str(tmp_path / "vocab.gz"))
    arguments = [
        *TINY,
        "--root",
        shapes_root,
        "--out",
        tmp_path / "out",
        "--set",
        f"clip.weights={tmp_path / 'clip.pt'}",
        "--set",
        "model.weights=",
    ]
    fails(capsys, monkeypatch, train.main, arguments, "vocab.gz", "no such file")
    monkeypatch.delenv("ZSSEG_VOCAB")
    monkeypatch.setenv("ZSSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("zsseg.tokenizer.VOCABULARY", ("http://127.0.0.1:9/vocab.gz", "0" * 64))
    fails(
        capsys,
        monkeypatch,
        train.main,
        arguments,
        "BPE vocabulary",
        "cannot download",
        str(tmp_path / "cache"),
    )
    assert not list((tmp_path / "cache").glob("*"))
