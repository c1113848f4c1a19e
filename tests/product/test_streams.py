"""Results come before printing; stdout, stderr and the terminal may vanish at any time."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, fails_in_one_line
from own_data import CONFIG, train, training, wait_for_steps

from zsseg import checkpoint


def real(*words: object, **options: object) -> subprocess.CompletedProcess:
    """A command as a process of its own, whose streams are what is tested."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        **options,
    )


@pytest.mark.slow
def test_letters_that_the_terminal_does_not_know(root, trained):
    (root / "a.toml").write_text(CONFIG.replace("grass", "猫"), encoding="utf-8")
    latin = os.environ | {"PYTHONIOENCODING": "latin-1"}
    words = (
        "eval.py",
        trained,
        "--config",
        root / "a.toml",
        "--root",
        root,
        "--out",
        root / "o",
        "--device",
        "cpu",
    )
    done = real(*words, env=latin)
    assert done.returncode == 0, done.stderr
    assert (
        "\\u732b" in done.stdout
        and "猫" in json.loads((root / "o" / "metrics.json").read_text())["per_class"]
    )
    done = real(
        "prepare_data.py",
        "folder",
        "--config",
        root / "a.toml",
        "--root",
        root,
        "--check",
        env=latin,
    )
    assert done.returncode == 0 and "\\u732b" in done.stdout


@pytest.mark.slow
def test_nobody_reads_what_a_run_prints(root):
    settings = ("train.steps=60", "train.checkpoint_every=1000")
    with training(root, *settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        process.stderr.close()
        assert process.wait(timeout=200) == 0
    assert (
        checkpoint.load(root / "r" / "last.pt")["step"] == 60
        and (root / "r" / "metrics.json").exists()
    )


@pytest.mark.slow
@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&- <&-", "> /dev/full"])
def test_streams_that_are_closed_or_full(streams, root, trained):
    words = (
        f"{sys.executable} eval.py {trained} --config {root}/a.toml --root {root} --out {root}/o "
        f"--device cpu {streams}"
    )
    assert subprocess.run(["sh", "-c", words], cwd=ROOT, timeout=200).returncode == 0
    assert json.loads((root / "o" / "metrics.json").read_text())["images"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_is_closed(ignored, root):
    """SIGHUP asks for a checkpoint, as SIGTERM does; under nohup it is nobody's concern."""
    steps = 40 if ignored else 100_000
    start = (lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if ignored else None
    settings = (f"train.steps={steps}", "train.checkpoint_every=1000000")
    with training(root, *settings, preexec_fn=start) as process:
        wait_for_steps(root)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=120) == 0
    step = checkpoint.load(root / "r" / "last.pt")["step"]
    assert step == steps if ignored else 0 < step < steps


def test_a_broken_image_in_an_evaluation_on_the_way_costs_no_step(root):
    (root / "a/images/val/1.png").write_bytes(b"no image")
    done = train(root, "--set", "train.eval_every=2", "--set", "train.checkpoint_every=1000")
    fails_in_one_line(done, "1.png", "the weights are in", "--resume goes on")
    assert checkpoint.load(root / "r" / "last.pt")["step"] == 2
