"""Nothing wastes a run: kills, NaN/Inf, broken files, processes that die, a
lack of memory.
"""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import PROCESS, ROOT, command, tiny_config
from PIL import Image
from torch.nn.functional import normalize

import train
from zsseg import checkpoint, command_line, metrics, segmenter
from zsseg.clip import CLIP, cosine_logits
from zsseg.faults import restore
from zsseg.label_statistics import label_statistics
from zsseg.regions import encode_crops

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(out / "last.pt")["model"]["maskformer"]


@pytest.mark.slow
def test_kills_cost_nothing(shapes_root):
    """Every training task, the preparation of data, and labelling; `python -m tests.kills` does it
    a hundred times each.
    """
    words = [
        sys.executable,
        "-m",
        "tests.kills",
        "--kills",
        "3",
        "--root",
        str(shapes_root),
        "--job",
    ]
    drivers = [
        subprocess.Popen(
            [*words, *jobs], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for jobs in (("segment", "prompts"), ("clip", "prepare", "label"))
    ]
    for driver, count in zip(drivers, (2, 3), strict=True):
        output, errors = driver.communicate(timeout=250)
        assert driver.returncode == 0, errors
        assert output.count("all equal to the bit") == output.count("1 x write, dead") == count, (
            output
        )


def test_a_broken_last_checkpoint_costs_one_interval(shapes_root, tmp_path, capsys):
    config = tiny_config("train.steps=4", "train.checkpoint_every=1", "eval.compare=false")
    train.train(config, shapes_root, tmp_path, PROCESS, {})
    expected = weights(tmp_path)
    words = [
        "--config",
        str(ROOT / "configs/shapes.toml"),
        "--root",
        str(shapes_root),
        "--out",
        str(tmp_path),
        "--resume",
    ]
    whole = (tmp_path / "last.pt").read_bytes()
    for content in (whole[: len(whole) // 2], b"", None):
        (tmp_path / "last.pt").unlink()
        if content is not None:
            (tmp_path / "last.pt").write_bytes(content)
        before = checkpoint.load(tmp_path / "previous.pt")
        assert before["step"] == 3
        train.main(words)
        assert "going on from previous.pt, step 3" in capsys.readouterr().out
        assert all(torch.equal(v, expected[k]) for k, v in weights(tmp_path).items())
        checkpoint.save(tmp_path / "previous.pt", **before)


def spoil(monkeypatch, steps: set[int], how: str) -> None:
    """The numbers of these steps go wrong in the network's output, the gradient, or the loss."""
    real, count = train.segmentation_losses, iter(range(10**6))

    def losses(logits, masks, *rest):
        bad = next(count) in steps
        if bad and how == "masks":
            masks = masks * torch.inf
        values = real(logits, masks, *rest)
        if bad and how == "gradient":
            values["class"].register_hook(lambda gradient: gradient * torch.nan)
        if bad and how == "loss":
            values["class"] = values["class"].detach() + torch.inf  # its gradient is finite
        return values

    monkeypatch.setattr(train, "segmentation_losses", losses)


@pytest.mark.parametrize("how", ["masks", "gradient", "loss"])
def test_a_bad_step_changes_nothing(how, shapes_root, tmp_path, monkeypatch):
    """Neither weights nor the optimizer's state nor batch norm's statistics."""
    spoil(monkeypatch, {1}, how)
    torch.manual_seed(0)
    task = train.Segment(tiny_config(), shapes_root, tmp_path, PROCESS)
    optimizer = train.build_optimizer(task.model.train(), task.config)
    states = []
    for step in range(3):
        batch = task.collate([task.samples[n] for n in range(4 * step, 4 * step + 4)])
        bad = train.train_step(task, task.model, optimizer, batch, 0.01)[-1]
        assert bad == (step == 1)
        states.append(
            [
                *task.model.state_dict().values(),
                *(t for s in optimizer.state.values() for t in s.values()),
            ]
        )
        states[-1] = [t.clone() for t in states[-1]]
    first, second, third = states
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(second, third, strict=True))
    assert all(t.isfinite().all() for t in third)


class Lion(torch.optim.Optimizer):
    """An optimizer of somebody's own, which knows nothing of bad steps."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("m", torch.zeros_like(p))
                p.sub_((0.9 * momentum + 0.1 * p.grad).sign(), alpha=group["lr"])
                momentum.lerp_(p.grad, 0.01)


@pytest.mark.parametrize(
    "optimizer_class", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, Lion]
)
def test_any_optimizer_may_be_put_in(optimizer_class, shapes_root, tmp_path, monkeypatch):
    """A bad step changes nothing, whether or not the optimizer reads `found_inf`; its state is
    saved and resumed.
    """
    spoil(monkeypatch, {1}, "gradient")
    torch.manual_seed(0)
    task = train.Segment(tiny_config(), shapes_root, tmp_path, PROCESS)
    groups = train.build_optimizer(task.model.train(), task.config).param_groups
    optimizer = optimizer_class([{"params": group["params"]} for group in groups])
    states = []
    for step in range(3):
        batch = task.collate([task.samples[n] for n in range(4 * step, 4 * step + 4)])
        assert train.train_step(task, task.model, optimizer, batch, 0.01)[-1] == (step == 1)
        states.append([t.clone() for t in [*task.model.state_dict().values(), *tensors(optimizer)]])
    assert all(torch.equal(a, b) for a, b in zip(*states[:2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(*states[1:], strict=True))
    other = optimizer_class([{"params": group["params"]} for group in groups])
    restore(other, optimizer.state_dict(), "checkpoint")
    assert all(torch.equal(a, b) for a, b in zip(tensors(optimizer), tensors(other), strict=True))


def tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [
        t
        for state in optimizer.state.values()
        for t in state.values()
        if isinstance(t, torch.Tensor)
    ]


def test_bad_steps_are_counted_named_and_kept(shapes_root, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, {1, 4}, "loss")
    config = tiny_config("train.steps=6", "train.checkpoint_every=2", "eval.compare=false")
    train.train(config, shapes_root, tmp_path, PROCESS, {})
    said = [line for line in capsys.readouterr().out.splitlines() if "was skipped" in line]
    assert (
        len(said) == 2
        and "step 2 was skipped" in said[0]
        and "2 so far" in said[1]
        and ".jpg" in said[0]
    )
    skipped = [line for line in lines(tmp_path) if "skipped" in line]
    assert [(line["step"], line["skipped"], len(line["images"])) for line in skipped] == [
        (2, 1, 4),
        (5, 2, 4),
    ]
    kept = torch.load(tmp_path / "bad_batch.pt", weights_only=True)
    assert (
        kept["step"] == 1
        and kept["samples"] == [4, 5, 6, 7]
        and kept["images"] == skipped[0]["images"]
    )
    assert kept["batch"][0].shape == (4, 3, 64, 64) and kept["batch"][1]["labels"].shape == (
        4,
        64,
        64,
    )
    assert checkpoint.load(tmp_path / "last.pt")["skipped"] == 2


def test_too_many_bad_steps_stop_the_run(shapes_root, tmp_path, monkeypatch):
    """The checkpoint from before is kept, and goes on once the cause is gone."""
    spoil(monkeypatch, set(range(3, 100)), "gradient")
    config = tiny_config(
        "train.steps=12", "train.checkpoint_every=1", "train.bad_steps=4", "eval.compare=false"
    )
    with pytest.raises(
        train.UserError, match=r"NaN/Inf in 4 steps in a row, the last one step 7; .*--resume"
    ):
        train.train(config, shapes_root, tmp_path, PROCESS, {})
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 3
    assert all(
        np.isfinite(v) for line in lines(tmp_path) for v in line.values() if isinstance(v, float)
    )
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    train.main(
        [
            "--config",
            "configs/shapes.toml",
            "--root",
            str(shapes_root),
            "--out",
            str(tmp_path),
            "--resume",
        ]
    )
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 12
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == list(range(1, 13))


def test_a_checkpoint_that_was_due_in_a_bad_step_is_made_up_for(shapes_root, tmp_path, monkeypatch):
    spoil(monkeypatch, {3, 4}, "loss")
    steps, real = [], checkpoint.save
    keep = lambda path, *rest, **content: (
        real(path, *rest, **content) or steps.append((path.name, content["step"]))
    )
    monkeypatch.setattr(checkpoint, "save", keep)
    config = tiny_config("train.steps=9", "train.checkpoint_every=4", "eval.compare=false")
    train.train(config, shapes_root, tmp_path, PROCESS, {})
    assert [step for name, step in steps if name == "last.pt"] == [6, 8, 9]


def test_an_error_ends_the_process_and_its_workers(shapes_root, tmp_path):
    """Workers leave signals to the main process; they must not keep it alive when it fails."""
    script = tmp_path / "fail.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
def fail(*arguments):
    raise ZeroDivisionError
train.train_step = fail
train.command_line.command(train.main)
""")
    started = time.monotonic()
    result = command(
        script,
        *PAIR[:4],
        "--set",
        "data.workers=2",
        "--root",
        shapes_root,
        "--out",
        tmp_path / "run",
    )
    assert (
        result.returncode == 1
        and "ZeroDivisionError" in result.stderr
        and time.monotonic() - started < 60
    )


# --- broken training files


@pytest.fixture
def broken_root(shapes_root, tmp_path) -> Path:
    root = tmp_path / "root"
    shutil.copytree(shapes_root, root)
    (root / "shapes" / "images" / "train" / "train00003.jpg").write_bytes(b"junk")
    (root / "shapes" / "labels" / "train" / "train00006.png").write_bytes(b"")
    return root


def test_a_broken_training_file_is_named_once_and_replaced(broken_root, tmp_path, capfd):
    """The same whatever reads it, and the label map that cannot be counted is left out."""
    results = []
    for workers in (0, 2):
        out = tmp_path / str(workers)
        config = tiny_config("train.steps=6", "eval.compare=false", f"data.workers={workers}")
        train.train(config, broken_root, out, PROCESS, {})
        results.append(weights(out))
        text = capfd.readouterr().out
        for event, file in (
            ("the next sample takes its place", "train00003.jpg"),
            ("left out: ", "train00006.png"),
        ):
            assert [file in line for line in text.splitlines() if event in line] == [True]
        assert "train00003.jpg" in (out / "broken.txt").read_text()
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())
    shutil.copyfile(
        broken_root / "shapes/labels/train/train00005.png",
        broken_root / "shapes/labels/train/train00006.png",
    )
    assert not len(label_statistics("shapes", broken_root, "train").broken)  # fixed: counted again
    (broken_root / "shapes" / "labels" / "train" / "train00006.png").write_bytes(b"")
    statistics = label_statistics("shapes", broken_root, "train")
    assert len(statistics.broken) == 1 and not (statistics.image == 6).any()


def test_only_broken_training_images(broken_root, tmp_path, capsys):
    for file in (broken_root / "shapes" / "images" / "train").iterdir():
        file.write_bytes(b"junk")
    with pytest.raises(train.UserError, match="cannot be read"):
        train.train(tiny_config(), broken_root, tmp_path / "out", PROCESS, {})
    # Every one of those that are drawn.
    assert len((tmp_path / "out" / "broken.txt").read_text().splitlines()) == 9


# --- many processes

FOLDER = tempfile.TemporaryDirectory()
R50 = Path(FOLDER.name) / "r50.pth"
# R50 has no batch statistics, which are per process.
PAIR = ["--config", "configs/shapes.toml", "--device", "cpu"]
for setting in (
    "train.batch_size=4",
    "train.steps=20",
    "train.checkpoint_every=20",
    "log.every=1",
    "data.workers=0",
    "data.crop=64",
    "data.short_edges=[64]",
    "data.test_short_edge=64",
    "model.queries=8",
    "model.dropout=0",
    "model.decoder_layers=1",
    "model.backbone=R50",
    f"model.weights={R50}",
    "train.lr=3e-6",
    "eval.compare=false",
):
    PAIR += ["--set", setting]


@pytest.fixture(scope="module")
def pair(shapes_root, tmp_path_factory) -> Path:
    """Twenty steps of the same run by one process and by two."""
    out = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    # Untrained and without batch statistics, residuals would grow from block to block.
    calm = torchvision.models.resnet50()
    for name, norm in calm.named_modules():
        if name.endswith("bn3"):
            norm.weight.data.fill_(0.2)
    torch.save(calm.state_dict(), R50)
    for n in (1, 2):
        words = [*PAIR, "--root", shapes_root, "--out", out / str(n)]
        result = command("train.py", *words, processes=n, env={"OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
    return out


@pytest.mark.slow
def test_two_processes_train_as_one(pair, shapes_root):
    """The same global batches; losses and normalisers averaged over both."""
    one, two = (lines(pair / name)[:20] for name in "12")
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "class", "focal", "dice"):
            assert b[key] == pytest.approx(a[key], rel=1e-5), (a["step"], key)
    torch.manual_seed(train.mix_seed(0, 0))
    start = train.Segment(
        train.load_config(str(ROOT / PAIR[1]), PAIR[5::2]), shapes_root, pair, PROCESS
    ).model.state_dict()
    one, two = weights(pair / "1"), weights(pair / "2")
    moved = max(float((v - start[k]).abs().max()) for k, v in one.items())
    apart = max(float((v - two[k]).abs().max()) for k, v in one.items())
    assert apart < 5e-6 < 2e-5 < moved, (apart, moved)


def workers_of(torchrun: subprocess.Popen) -> list[int]:
    """The processes that torchrun started."""
    file = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children")
    children = [int(pid) for pid in file.read_text().split()]
    return [pid for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def at_step(out: Path, step: int, run: subprocess.Popen) -> None:
    """Wait until a run has logged a step."""
    end = time.monotonic() + 120
    while time.monotonic() < end and run.poll() is None:
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count(
            '"loss"'
        ) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(run.communicate())


def start_two(
    shapes_root: Path, out: Path, *options: str, settings: tuple[str, ...] = ()
) -> subprocess.Popen:
    words = [*TORCHRUN, *options, "train.py", *PAIR, "--root", str(shapes_root), "--out", str(out)]
    words += [x for setting in settings for x in ("--set", setting)]
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_a_dead_process_restarts_the_run_or_ends_it(pair, shapes_root, tmp_path, monkeypatch):
    """With --max-restarts the run goes on from its checkpoint; when no restart is left, torchrun
    ends it with a message. One process may then finish what two began: the global batches stay the
    same.
    """
    out = tmp_path / "run"
    run = start_two(shapes_root, out, "--max-restarts=1", settings=("train.checkpoint_every=6",))
    at_step(out, 8, run)
    os.kill(workers_of(run)[1], signal.SIGKILL)
    at_step(out, 15, run)
    started = time.monotonic()
    os.kill(workers_of(run)[0], signal.SIGKILL)
    output, errors = run.communicate(timeout=60)
    assert (
        run.returncode == 1
        and "resuming" in output
        and "Signal 9" in errors
        and time.monotonic() - started < 40
    )
    monkeypatch.chdir(ROOT)
    train.main([*PAIR[:4], "--root", str(shapes_root), "--out", str(out), "--resume"])
    two, again = (lines(folder)[:20] for folder in (pair / "2", out))
    assert [line["step"] for line in again] == list(range(1, 21))
    # To the bit: two processes, too.
    assert [line["loss"] for line in again[:12]] == [line["loss"] for line in two[:12]]
    assert all(
        b["loss"] == pytest.approx(a["loss"], rel=1e-5) for a, b in zip(two, again, strict=True)
    )


@pytest.mark.parametrize("patient", [True, False])
def test_ctrl_c_saves_and_a_second_one_leaves(shapes_root, tmp_path, monkeypatch, patient):
    step, counter = train.train_step, itertools.count()

    def interrupted(*arguments):
        if next(counter) == 2:
            for _ in range(1 if patient else 2):
                os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(train, "train_step", interrupted)
    if patient:
        assert not train.train(tiny_config(), shapes_root, tmp_path, PROCESS, {})
        assert checkpoint.load(tmp_path / "last.pt")["step"] == 3
    else:
        with pytest.raises(SystemExit, match="130"):
            command_line.command(
                lambda _: train.train(tiny_config(), shapes_root, tmp_path, PROCESS, {})
            )
        assert not (tmp_path / "last.pt").exists()


@pytest.mark.slow
def test_processes_stop_together_and_need_no_targets(shapes_root, tmp_path):
    """Most crops show no class that is trained on: batches of a process, or of all, are without
    targets. Then a signal to one process makes both save and leave with 0.
    """
    root = tmp_path / "root"
    shutil.copytree(shapes_root, root)
    for file in (root / "shapes" / "labels" / "train").iterdir():
        labels = np.full((96, 96), 255, np.uint8)
        labels[0, 0] = 0
        Image.fromarray(labels).save(file)
    run = start_two(
        root,
        tmp_path / "run",
        settings=(
            "data.crop=32",
            "train.steps=5000",
            "train.checkpoint_every=5000",
            "model.backbone=small",
            "model.weights=",
        ),
    )
    at_step(tmp_path / "run", 4, run)
    os.kill(workers_of(run)[1], signal.SIGUSR1)
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 0 and "stopped as asked" in output, errors
    logged = lines(tmp_path / "run")
    assert (
        checkpoint.load(tmp_path / "run" / "last.pt")["step"] == logged[-1]["step"] == len(logged)
    )
    assert all(np.isfinite(line["loss"]) for line in logged) and any(
        line["dice"] == 0 for line in logged
    )


# --- memory


def test_chunks_shrink_where_memory_ends(small_clip, monkeypatch, capsys):
    """A limit of four crops at once, as a full device would set it; then nothing is tried that
    failed before.
    """
    crops = torch.randn(21, 3, 32, 32)
    text = normalize(torch.randn(5, 64), dim=-1)
    wanted, real, sizes = (
        cosine_logits(encode_crops(small_clip, crops, 16), text),
        CLIP.encode_image,
        [],
    )

    def limited(self: CLIP, images: torch.Tensor, **options: bool) -> torch.Tensor:
        sizes.append(len(images))
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, images, **options)

    monkeypatch.setattr(CLIP, "encode_image", limited)
    for _ in range(2):
        assert torch.allclose(
            cosine_logits(encode_crops(small_clip, crops, 16), text), wanted, atol=1e-4
        )
    assert (
        sizes == [16, 8, *2 * [4, 4, 4, 4, 4, 1]]
        and capsys.readouterr().out.count("out of memory") == 2
    )

    def none(self: CLIP, images: torch.Tensor, **options: bool) -> torch.Tensor:
        raise torch.OutOfMemoryError("always")

    monkeypatch.setattr(CLIP, "encode_image", none)
    with pytest.raises(torch.OutOfMemoryError):
        cosine_logits(encode_crops(small_clip, crops, 16), text)


def test_label_maps_in_pieces_are_the_same(monkeypatch):
    torch.manual_seed(0)
    logits, classes = torch.randn(6, 8, 12), torch.rand(6, 11)
    whole, best = segmenter.best_class(logits, classes, (30, 45), (61, 37))
    monkeypatch.setattr(segmenter, "MAX_SCORE_BYTES", 4 * 61 * 37 * 3)  # three classes at once
    labels, top = segmenter.best_class(logits, classes, (30, 45), (61, 37))
    assert torch.equal(labels, whole) and torch.allclose(top, best)
    labels, predicted = torch.randint(0, 11, (61, 37)), whole
    labels[:3] = 255
    matrix = metrics.confusion(labels, predicted, 11, 255)
    monkeypatch.setattr(metrics, "MAX_PIXELS", 100)
    assert (
        torch.equal(metrics.confusion(labels, predicted, 11, 255), matrix)
        and matrix.sum() == 58 * 37
    )
