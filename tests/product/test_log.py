"""The log of training: metrics.jsonl and wandb, whose faults never end a run."""

import math
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import PROCESS, process, shapes_words, tiny_config
from conftest import logged as lines

import train
from zsseg.log import Log, scalars
from zsseg.utils import UserError
from zsseg.weights import load_checkpoint

SETTINGS = ("train.steps=4", "train.eval_every=2", "eval.compare=false", "log.wandb=online")


@pytest.fixture
def wandb(monkeypatch):
    """A module of that name that records what it is given; `fails_at`: rows until a run raises;
    `refuses`: modes in which init raises.
    """
    module = SimpleNamespace(runs=[], fails_at=math.inf, refuses=())

    def init(**options) -> Mock:
        if options["mode"] in module.refuses:
            raise ConnectionError("no answer")
        run = Mock(id=options["id"] or "abc", options=options, rows=[])

        def log(values: dict) -> None:
            if len(run.rows) >= module.fails_at:
                raise ConnectionError("the network is gone\nand more")
            run.rows.append(values)

        run.log = log
        module.runs.append(run)
        return run

    module.init = init
    module.api = SimpleNamespace(api_key="key")
    module.Image = lambda pixels, caption, masks: (pixels, caption, masks)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("MODE", "PROJECT", "DIR", "DISABLED"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    return module


def test_wandb_gets_the_configuration_every_number_and_images(wandb, shapes_root, tmp_path):
    """A resumed run under the same id; metrics.jsonl forgets what is repeated, and a line that a
    kill cut.
    """
    config = tiny_config(*SETTINGS, "train.checkpoint_every=2")
    train.train(config, shapes_root, tmp_path, PROCESS, {})
    [run] = wandb.runs
    assert run.options["config"]["train"]["steps"] == 4 and run.options["project"] == "zsseg"
    run.finish.assert_called_once()
    run.define_metric.assert_called_once_with("*", step_metric="step")
    numbers = [row for row in run.rows if not any("predictions" in key for key in row)]
    assert numbers == [scalars(line) for line in lines(tmp_path)]
    images = next(row for row in run.rows if "val/predictions" in row)
    pixels, name, masks = images["val/predictions"][0]
    assert images["step"] == 2 and len(images["val/predictions"]) == 6
    assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8 and name == "val00000"
    truth = masks["ground_truth"]
    assert truth["mask_data"].shape == (64, 64) and truth["class_labels"][255] == "ignored"

    saved = load_checkpoint(tmp_path / "previous.pt")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    train.train(config, shapes_root, tmp_path, PROCESS, saved)
    assert wandb.runs[1].options["id"] == "abc" and wandb.runs[1].options["resume"] == "allow"
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines(tmp_path) if "val/mIoU" in line] == [2]


@pytest.mark.parametrize(("fails_at", "refuses"), [(1, ()), (math.inf, ("online",))])
def test_no_fault_of_wandb_ends_a_run(wandb, fails_at, refuses, shapes_root, tmp_path, capsys):
    wandb.fails_at = fails_at
    wandb.refuses = refuses
    train.train(tiny_config(*SETTINGS), shapes_root, tmp_path, PROCESS, {})
    text = capsys.readouterr().out
    assert len([line for line in text.splitlines() if line.startswith("wandb: ")]) == 1
    assert ("the network is gone; going on" in text) == (fails_at == 1)
    assert wandb.runs[0].options["mode"] == ("offline" if refuses else "online")
    assert len([line for line in lines(tmp_path) if "loss" in line]) == 4


ENVIRONMENTS = [("", "offline", "offline"), ("MODE=online", "offline", "offline")]
ENVIRONMENTS += [(f"MODE={mode}", "online", mode) for mode in ("offline", "dryrun")]
ENVIRONMENTS += [(case, "online", "") for case in ("MODE=disabled", "DISABLED=True")]
ENVIRONMENTS += [("MODE=disabled", "offline", ""), ("MODE=online", "disabled", "")]


@pytest.mark.parametrize(("variable", "wanted", "mode"), ENVIRONMENTS)
def test_wandb_s_environment_decides(wandb, variable, wanted, mode, tmp_path, monkeypatch):
    """On the mode where it says less than the configuration; always on project and folder."""
    for pair in filter(None, ("PROJECT=mine", "DIR=here", variable)):
        monkeypatch.setenv("WANDB_" + pair.split("=")[0], pair.split("=")[1])
    log = Log(tmp_path, PROCESS, tiny_config(f"log.wandb={wanted}"), run_id="old")
    assert log.run_id == "old"
    assert [run.options["mode"] for run in wandb.runs] == [mode] * bool(mode)
    assert not any({"project", "dir"} & run.options.keys() for run in wandb.runs)


def test_a_run_that_cannot_go_on_loses_no_line(wandb, tmp_path):
    """Those of the steps after its checkpoint, which it would repeat. NaN/Inf are no JSON; null
    stands for what was not measured.
    """
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n')
    wandb.refuses = ("offline",)
    with pytest.raises(UserError, match=r"log\.wandb: no answer; try again"):
        Log(tmp_path, PROCESS, tiny_config("log.wandb=offline"), 1)
    assert len(lines(tmp_path)) == 2
    log = Log(tmp_path, PROCESS, tiny_config(), 1)
    log.write(1, loss=math.nan)
    log.write(2, loss=1.0, hIoU=None)
    assert lines(tmp_path) == [{"step": 1, "loss": 2}, {"step": 2, "loss": 1.0, "hIoU": None}]


def test_time_left_is_that_of_the_last_steps(tmp_path, monkeypatch, capsys):
    """Not of a mean since the start, which a slow beginning or a resumed run would spoil."""
    now = iter([0.0, 100.0, 101.0, 131.0])  # of the start, then of each logged step
    monkeypatch.setattr("zsseg.log.time.perf_counter", lambda: next(now))
    log = Log(tmp_path, PROCESS, tiny_config("train.steps=100", "train.accumulate=2"), 10)
    for done in (20, 30, 40):
        log.step(done, {"loss": torch.tensor(1.0)}, torch.tensor(1.0), 0.1)
    wanted = "segment step 40/100 loss 1.000, 2.7 images/s, 0:03:00 left"
    assert capsys.readouterr().out.splitlines()[-1] == wanted


@pytest.mark.slow
def test_the_real_wandb_offline(shapes_root, tmp_path):
    pytest.importorskip("wandb")
    words = shapes_words(shapes_root, tmp_path / "run", *SETTINGS, "log.wandb=offline")
    environment = {"HOME": str(tmp_path), "WANDB__DISABLE_VIEWER": "true"}
    done = process("train.py", *words, env=environment)
    assert done.returncode == 0, done.stderr
    assert [*(tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")]
