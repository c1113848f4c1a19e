"""Kill the commands at random moments, let them go on, and compare with an undisturbed run.

    python -m tests.benchmarks.kills --kills 100 [--job segment prompts images] [--seed 0]

Lives end by SIGKILL at a random moment or while a file is being written, or by SIGTERM or SIGUSR1,
after which training must have saved and left with code 0. A run that came to its end is compared,
bit for bit, and another begins.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from zsseg.weights import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SMALL = "log.every=2 data.workers=1 train.checkpoint_every=3 data.crop=64 data.short_edges=[64] "
SMALL += "data.test_short_edge=64 train.batch_size=2 train.steps=60"
SEGMENT = "model.num_queries=8 model.decoder_layers=1 eval.compare=false train.eval_every=20"
PROMPTS = "data.name=shapes data.split=test train.seeds=[0,1] clip.prompt_prefix=4 "
PROMPTS += "clip.weights={root}/shapes/clip.pt"
JOBS = {"segment": ("shapes", SEGMENT), "prompts": ("voc_prompts", PROMPTS)}
WAYS = ("write", "SIGTERM", "random", "write", "SIGUSR1")


def words(job: str, root: Path, out: Path) -> list[str]:
    """The command of a job, as a user would type it after whatever became of the last one."""
    if job == "images":
        images = ["--images", str(root / "shapes" / "images" / "train"), "--classes", "star, tree"]
        model = str(root / "model" / "last.pt")
        return ["eval.py", model, "--root", str(root), "--out", str(out), "--resume", *images]
    name, settings = JOBS[job]
    command = ["train.py", "--config", f"configs/{name}.toml", "--root", str(root)]
    command += [word for s in f"{SMALL} {settings}".split() for word in ("--set", s)]
    exists = (out / "last.pt").exists() or (out / "previous.pt").exists()
    return [*command, "--out", str(out), *(["--resume"] if exists else [])]


def life(job: str, root: Path, out: Path, way: str, seconds: float) -> int:
    """The exit code of one life, which ends by itself or `way`."""
    options = {"cwd": ROOT, "start_new_session": True, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(
        [sys.executable, *words(job, root, out), "--device", "cpu"], **options
    )
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if way == "write" and [*out.rglob(".*.tmp")]:
            break
        time.sleep(0.001)
    if process.poll() is None:
        os.killpg(process.pid, getattr(signal, way, signal.SIGKILL))
    return process.wait(120)


def content(out: Path) -> dict[str, object]:
    """What a run has left, without speeds and what depends on the moment of the last kill."""
    found = {}
    for file in sorted(out.rglob("*")):
        name = str(file.relative_to(out))
        if file.suffix == ".pt" and file.name not in ("previous.pt", "broken.pt"):
            found[name] = load_checkpoint(file)
        elif file.name == "metrics.jsonl":
            log = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [
                {k: v for k, v in line.items() if "speed" not in k and "per_second" not in k}
                for line in log
            ]
        elif file.is_file() and file.suffix != ".pt":
            found[name] = re.sub(rb".*_per_second.*", b"", file.read_bytes())
    return found


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def torment(job: str, kills: int, rng: random.Random, root: Path, folder: Path) -> str:
    """Disturb a job `kills` times, and compare whatever comes to its end. Raises AssertionError."""
    started = time.monotonic()
    assert life(job, root, folder / "straight", "", 600) == 0
    seconds = time.monotonic() - started
    expected = content(folder / "straight")
    ends = Counter()
    runs = 0
    while ends.total() < kills or (folder / str(runs)).exists():
        out = folder / str(runs)
        way = WAYS[ends.total() % len(WAYS)] if ends.total() < kills else ""
        limit = rng.uniform(0.02, 1.2) * seconds if way else 600
        code = life(job, root, out, way, limit)
        if code == 0 and (job == "images" or (out / "metrics.json").exists()):
            assert same(content(out), expected), out
            runs += 1
        else:
            assert code in (0, -9, -signal.SIGTERM, -signal.SIGUSR1), (way, code)
            ends[f"{way}, {'saved and left' if code == 0 else 'dead'}"] += 1
    text = ", ".join(f"{n} x {end}" for end, n in sorted(ends.items()))
    return f"{job}: {kills} lives cut short ({text}), {runs} runs came to their end, all equal"


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    jobs = [*JOBS, "images"]
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--job", choices=jobs, nargs="+", default=jobs)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        from zsseg.prepare import shapes, shapes_clip

        shapes.SPLITS = {"clip": 60, "train": 30, "val": 3, "test": 3}
        shapes.generate(root / "shapes")
        model = {"model": shapes_clip.build_small_clip().state_dict()}
        torch.save(model, root / "shapes" / "clip.pt")
        assert life("segment", root, root / "model", "", 600) == 0
        for job in args.job:
            rng = random.Random(args.seed)
            print(torment(job, args.kills, rng, root, Path(folder) / job), flush=True)


if __name__ == "__main__":
    main()
