"""Nothing wastes a run: kills, signals, NaN/Inf, broken files, processes that die."""

import itertools
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import PROCESS, command, fails_in_one_line, process, start, succeed, tiny_config
from conftest import logged as lines
from conftest import shapes_words as words
from PIL import Image

import train
from zsseg import checkpoint, data, utils
from zsseg.weights import load_checkpoint

PLAIN = "eval.compare=false"


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(out / "last.pt")["model"]["maskformer"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("at", ["before", "middle", "after"])
def test_a_kill_while_a_checkpoint_is_written_costs_nothing(at, shapes_root, tmp_path):
    """SIGKILL around the replacement of last.pt, --resume, and the weights of an undisturbed run,
    bit for bit; several seeds of a prompt: test_experiments.py, kills at random: benchmarks/kills.
    """
    settings = ("train.steps=4", "train.checkpoint_every=1", "train.eval_every=2", PLAIN)
    train.train(tiny_config(*settings), shapes_root, tmp_path / "whole", PROCESS, {})
    script = tmp_path / "killed.py"
    script.write_text(f"""
import os, signal, sys
sys.path.insert(0, os.getcwd())
import train
from zsseg import utils
real, count = os.replace, iter(range(100))
def replace(source, target):
    last = str(target).endswith("last.pt") and next(count) == 2
    if last and {at!r} == "before":
        os.truncate(source, 1000)
    elif last and {at!r} == "after":
        real(source, target)
    if last:
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
utils.os.replace = replace
utils.command(train.main)
""")
    arguments = words(shapes_root, tmp_path / "run", *settings)
    assert process(script, *arguments).returncode == -signal.SIGKILL
    done = succeed("train.py", "--out", tmp_path / "run", "--root", shapes_root, "--resume")
    assert f"at step {3 if at == 'after' else 2} of 4" in done.stdout
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_broken_last_checkpoint_costs_one_interval(shapes_root, tmp_path):
    config = tiny_config("train.steps=4", "train.checkpoint_every=1", PLAIN)
    train.train(config, shapes_root, tmp_path, PROCESS, {})
    expected = weights(tmp_path)
    whole = (tmp_path / "last.pt").read_bytes()
    before = (tmp_path / "previous.pt").read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        (tmp_path / "last.pt").write_bytes(content)
        (tmp_path / "previous.pt").write_bytes(before)
        done = succeed("train.py", "--root", shapes_root, "--out", tmp_path, "--resume")
        assert "going on from previous.pt" in done.stdout and "at step 3 of 4" in done.stdout
        assert same(weights(tmp_path), expected)
        assert (tmp_path / "broken.pt").read_bytes() == content
    (tmp_path / "broken.pt").unlink()
    for name in ("last.pt", "previous.pt"):  # nothing goes on, and nothing is moved
        (tmp_path / name).write_bytes(b"")
    done = command("train.py", "--root", shapes_root, "--out", tmp_path, "--resume")
    fails_in_one_line(done, "previous.pt")
    assert (tmp_path / "last.pt").exists() and not (tmp_path / "broken.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_saves_and_leaves(number, shapes_root, tmp_path):
    settings = ("train.steps=100000", "train.checkpoint_every=100000", PLAIN)
    arguments = words(shapes_root, tmp_path / "r", *settings)
    with start("train.py", *arguments) as run:
        at_step(tmp_path / "r", 2, run)
        run.send_signal(number)
        assert run.wait(timeout=120) == 0
    assert load_checkpoint(tmp_path / "r" / "last.pt")["step"] == len(lines(tmp_path / "r"))


@pytest.mark.parametrize("patient", [True, False])
def test_ctrl_c_saves_and_a_second_one_leaves(shapes_root, tmp_path, monkeypatch, patient):
    step = train.train_step
    counter = itertools.count()

    def interrupted(*arguments):
        if next(counter) == 2:
            for _ in range(1 if patient else 2):
                os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(train, "train_step", interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if patient:
            assert not train.train(tiny_config(), shapes_root, tmp_path, PROCESS, {})
        else:
            with pytest.raises(KeyboardInterrupt):
                train.train(tiny_config(), shapes_root, tmp_path, PROCESS, {})
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (tmp_path / "last.pt").exists() == patient
    assert not patient or load_checkpoint(tmp_path / "last.pt")["step"] == 3


def spoil(monkeypatch, steps: set[int], how: str) -> None:
    """The numbers of these steps go wrong in the network's output, the gradient, or the loss."""
    real = train.segmentation_losses
    count = itertools.count()

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


@pytest.mark.parametrize(
    ("optimizer_class", "how"),
    [(None, "masks"), (None, "gradient"), (None, "loss")]
    + [(kind, "gradient") for kind in (torch.optim.RMSprop, torch.optim.Adagrad)],
)
def test_a_bad_step_changes_nothing(optimizer_class, how, shapes_root, tmp_path, monkeypatch):
    """Neither weights nor batch norm's statistics nor the state of any optimizer, fused or not."""
    spoil(monkeypatch, {1}, how)
    torch.manual_seed(0)
    config = tiny_config()
    task = train.SegmentTask(config, shapes_root, tmp_path, PROCESS, None)
    optimizer = train.build_optimizer(task.model.train(), config)
    if optimizer_class:
        groups = [{"params": group["params"]} for group in optimizer.param_groups]
        optimizer = optimizer_class(groups)
    states = []
    for step in range(3):
        batch = task.collate([task.samples[n] for n in range(4 * step, 4 * step + 4)])
        bad = train.train_step(task, task.model, optimizer, [batch], 0.01)[-1]
        assert bad == (step == 1)
        state = [task.model.state_dict(), *optimizer.state.values()]
        values = [value for part in state for value in part.values()]
        states.append([value.clone() for value in values if torch.is_tensor(value)])
    first, second, third = states
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(second, third, strict=True))
    assert all(tensor.isfinite().all() for tensor in third)


@pytest.mark.parametrize(("batches", "spoiled"), [(1, {1, 3}), (2, {3, 6})])
def test_bad_steps_are_counted_and_named(
    batches, spoiled, shapes_root, tmp_path, monkeypatch, capsys
):
    """A checkpoint that was due in one waits for the next good step. Any batch spoils its step."""
    spoil(monkeypatch, spoiled, "loss")
    saved = []
    real = checkpoint.save

    def save(path, *rest, **content):
        saved.append((path.name, content["step"]))
        return real(path, *rest, **content)

    monkeypatch.setattr(checkpoint, "save", save)
    settings = ("train.steps=6", "train.checkpoint_every=2", f"train.accumulate={batches}")
    config = tiny_config(*settings, PLAIN)
    train.train(config, shapes_root, tmp_path, PROCESS, {})
    said = [line for line in capsys.readouterr().out.splitlines() if "was skipped" in line]
    assert len(said) == 2 and "step 2 was skipped" in said[0] and "2 so far" in said[1]
    samples = data.TrainImages(config, shapes_root)
    names = [samples.source(n) for n in range(4 * batches, 8 * batches)]
    assert said[0].endswith(f"(1 so far): {', '.join(names)}")
    skipped = [line for line in lines(tmp_path) if "skipped" in line]
    assert [(line["step"], line["skipped"]) for line in skipped] == [(2, 1), (4, 2)]
    assert [step for name, step in saved if name == "last.pt"] == [3, 5, 6]
    assert load_checkpoint(tmp_path / "last.pt")["skipped"] == 2


def test_too_many_bad_steps_stop_the_run(shapes_root, tmp_path, monkeypatch):
    """The checkpoint from before stays, and goes on once the cause is gone."""
    spoil(monkeypatch, set(range(3, 100)), "gradient")
    settings = ("train.steps=8", "train.checkpoint_every=1", "train.max_bad_steps=3", PLAIN)
    with pytest.raises(utils.UserError, match=r"NaN/Inf in 3 steps in a row.*step 6; .*--resume"):
        train.train(tiny_config(*settings), shapes_root, tmp_path, PROCESS, {})
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 3
    monkeypatch.undo()
    succeed("train.py", "--root", shapes_root, "--out", tmp_path, "--resume")
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == list(range(1, 9))


def test_a_broken_training_file_is_named_once_and_replaced(shapes_root, tmp_path, capfd):
    """The same whatever reads it; a label map that cannot be counted is left out, and said."""
    root = tmp_path / "root"
    shutil.copytree(shapes_root, root)
    (root / "shapes" / "images" / "train" / "train00003.jpg").write_bytes(b"junk")
    (root / "shapes" / "labels" / "train" / "train00006.png").write_bytes(b"")
    results = []
    for workers in (0, 1):
        utils.warn.cache_clear()
        data.print_once.cache_clear()
        out = tmp_path / str(workers)
        config = tiny_config("train.steps=6", PLAIN, f"data.workers={workers}")
        train.train(config, root, out, PROCESS, {})
        results.append(weights(out))
        text = capfd.readouterr().out
        assert text.count("train00003.jpg") == 1 and text.count("train00006.png") == 1
    assert same(*results)
    for file in (root / "shapes" / "images" / "train").iterdir():
        file.write_bytes(b"junk")
    with pytest.raises(utils.UserError, match="cannot be read"):
        train.train(tiny_config(), root, tmp_path / "out", PROCESS, {})


def test_a_broken_image_in_an_evaluation_on_the_way_costs_no_step(shapes_root, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(shapes_root, root)
    (root / "shapes" / "images" / "val" / "val00001.jpg").write_bytes(b"no image")
    settings = ("train.eval_every=2", "train.checkpoint_every=1000", PLAIN)
    done = command("train.py", *words(root, tmp_path / "r", *settings))
    assert done.returncode == 2 and "val00001.jpg" in done.stderr
    assert load_checkpoint(tmp_path / "r" / "last.pt")["step"] == 2


# R50 has no batch statistics, which are per process.
PAIR = ("train.steps=20", "train.checkpoint_every=6", "model.dropout=0", "model.decoder_layers=1")
PAIR += ("model.backbone=R50", "train.lr=3e-6", PLAIN)
HALVES = ("train.accumulate=2", "train.batch_size=2")


@pytest.mark.parametrize("proposals", ["true", "false"])
def test_four_batches_a_step_learn_as_one(proposals, shapes_root, tmp_path):
    """Every loss is over all of them; prompts, and which samples: test_experiments.py."""
    config = tiny_config(*PAIR, f"model.proposals={proposals}", "model.weights=")
    found = []
    for size in (8, 2):
        torch.manual_seed(0)
        task = train.SegmentTask(config, shapes_root, tmp_path, PROCESS, None)
        optimizer = train.build_optimizer(task.model.train(), config)
        numbers = []
        for step in range(3):
            firsts = range(8 * step, 8 * step + 8, size)
            chunks = [task.collate([task.samples[n + i] for i in range(size)]) for n in firsts]
            values, norm, _ = train.train_step(task, task.model, optimizer, chunks, 0.01)
            numbers += torch.stack([*values.values(), norm]).tolist()
        found.append((numbers, task.model.state_dict()))
    (one, before), (four, after) = found
    assert four == pytest.approx(one, rel=1e-4)
    assert all(torch.allclose(after[name], value, atol=1e-5) for name, value in before.items())


@pytest.fixture(scope="module")
def pair(shapes_root, tmp_path_factory) -> Path:
    """Twenty steps of the same run by one process and by two, whose batches are halves of one's;
    r50.pth is where both start.
    """
    out = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    # Untrained and without batch statistics, residuals would grow from block to block.
    calm = torchvision.models.resnet50()
    for name, norm in calm.named_modules():
        if name.endswith("bn3"):
            norm.weight.data.fill_(0.2)
    torch.save(calm.state_dict(), out / "r50.pth")
    for n in (1, 2):
        settings = (*PAIR, f"model.weights={out / 'r50.pth'}", *(HALVES if n == 2 else ()))
        arguments = words(shapes_root, out / str(n), *settings)
        done = process("train.py", *arguments, processes=n, env={"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_two_processes_train_as_one(pair):
    """The same global batches, in halves; losses and normalisers averaged over both."""
    one, two = (lines(pair / name)[:20] for name in "12")
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "class", "focal", "dice"):
            assert b[key] == pytest.approx(a[key], rel=1e-5), (a["step"], key)
    one, two = weights(pair / "1"), weights(pair / "2")
    apart = max(float((value - two[key]).abs().max()) for key, value in one.items())
    start = torch.load(pair / "r50.pth", weights_only=True)["layer4.2.conv2.weight"]
    moved = float((one["backbone.layer4.2.conv2.weight"] - start).abs().max())
    assert apart < 5e-6 and moved > 1e-6, (apart, moved)


def workers_of(torchrun: subprocess.Popen) -> list[int]:
    """The processes that torchrun started."""
    file = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children")
    children = [int(pid) for pid in file.read_text().split()]
    return [pid for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def at_step(out: Path, step: int, run: subprocess.Popen) -> None:
    """Wait until a run has logged a step."""
    file = out / "metrics.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and run.poll() is None:
        if file.exists() and file.read_text().count('"loss"') >= step:
            return
        time.sleep(0.01)
    raise AssertionError(run.communicate())


def start_two(root: Path, out: Path, *settings: str, options: tuple = ()) -> subprocess.Popen:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    arguments = [*torchrun, "train.py", *words(root, out, *settings)]
    return start(*arguments, env={"OMP_NUM_THREADS": "1"}, **pipes)


@pytest.mark.slow
def test_a_dead_process_restarts_the_run_or_ends_it(pair, shapes_root, tmp_path):
    """With --max-restarts the run goes on from its checkpoint; when no restart is left, torchrun
    ends it with a message. One process may then finish what two began.
    """
    out = tmp_path / "run"
    settings = (*PAIR, f"model.weights={pair / 'r50.pth'}", *HALVES)
    run = start_two(shapes_root, out, *settings, options=("--max-restarts=1",))
    at_step(out, 8, run)
    os.kill(workers_of(run)[1], signal.SIGKILL)
    at_step(out, 15, run)
    os.kill(workers_of(run)[0], signal.SIGKILL)
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 1 and "resuming" in output and "Signal 9" in errors
    succeed("train.py", "--root", shapes_root, "--out", out, "--resume", "--device", "cpu")
    two, again = (lines(folder)[:20] for folder in (pair / "2", out))
    assert [line["step"] for line in again] == list(range(1, 21))
    # To the bit: two processes, too.
    assert [line["loss"] for line in again[:12]] == [line["loss"] for line in two[:12]]
    for a, b in zip(two, again, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


@pytest.mark.slow
def test_processes_stop_together_and_need_no_targets(shapes_root, tmp_path):
    """Most crops show no class that is trained on: batches of a process, or of all, are without
    targets. Then a signal to one process makes both save and leave with 0.
    """
    root = tmp_path / "root"
    shutil.copytree(shapes_root, root)
    for file in (root / "shapes" / "labels" / "train").iterdir():
        labels = np.full((64, 64), 255, np.uint8)
        labels[0, 0] = 0
        Image.fromarray(labels).save(file)
    settings = ("data.crop=32", "train.steps=5000", "train.checkpoint_every=5000", "model.weights=")
    run = start_two(root, tmp_path / "run", *settings)
    at_step(tmp_path / "run", 4, run)
    os.kill(workers_of(run)[1], signal.SIGUSR1)
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 0 and "stopped as asked" in output, errors
    logged = lines(tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == len(logged)
    assert all(np.isfinite(line["loss"]) for line in logged)
    assert any(line["dice"] == 0 for line in logged)
