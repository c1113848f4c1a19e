"""The paper's experiments on the synthetic data set, over several seeds: mean +- standard deviation
of seen, unseen and hIoU.

    python -m tests.benchmarks.table [--out runs/table] [--seeds 0 1 2] [--jobs 2] [--only base ...]

Every training and evaluation is one of the project's commands; what is finished in --out is not run
again. The test split is measured; settings were chosen on the validation split. One CLIP (and one
prompt run) serves all seeds, so that the deviation is the segmenter's alone. --out must be a new
folder when settings change.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from zsseg.prompts import TEMPLATES

# The small CLIP reads 40 tokens, which are letters: 13 of ViLD's 14 templates have room for every
# name.
VILD = [t.replace("{}", "{{}}") for t in TEMPLATES["vild"] if len(t.replace(" ", "")) <= 26]
SHAPES = ["train.py", "--config", "configs/shapes.toml", "train.seed={seed}"]
# Chosen on the validation split of an earlier synthetic data set, with the steps.
LEARNED = ["clip.prompt_prefix=1"]
PROMPTS = ["train.py", "--config", "configs/voc_prompts.toml", "data.name=shapes"]
PROMPTS += ["data.split=test", "clip.weights={clip}", "train.seeds=[0,1,2,3,4]"]
PROMPTS += ["train.steps=300", *LEARNED]
TEACHER = "train.teacher={out}/base_{seed}/last.pt"
# {name: (words, the training that comes before)}; {seed}, {out} and {clip} are filled in.
TRAININGS = {
    "base": (SHAPES, ""),
    "pixel": ([*SHAPES, "model.proposals=false"], ""),
    "self": ([*SHAPES, "data.train_on=all", TEACHER], "base"),
}
# Evaluations of trained models: {name: (training, settings)}; things are about as large at an edge
# of 192 as in the crops that CLIP was trained on.
PROMPT = "clip.region_prompt="
EVALUATIONS = {
    "budget": ("base", ["--budget"]),
    "pool": ("base", ["clip.regions=pool", "clip.dense_edge=192"]),
    "single": ("base", [f"{PROMPT}single"]),
    "vild": ("base", [f"{PROMPT}{VILD}"]),
    "learned": ("base", [f"{PROMPT}learned", "clip.prompts={out}/prompts/last.pt", *LEARNED]),
    "pixel_alone": ("pixel", ["clip.ensemble=false"]),
}
# The table: (title, folder, part of metrics.json)
ROWS = [
    ("head only", "base", "head_only"),
    ("CLIP only", "base", "clip_only"),
    ("CLIP x objectness", "base", "clip_objectness"),
    ("ensemble, weight 0.7", "base", ""),
    ("ensemble, regions: prompt single", "single", ""),
    ("ensemble, regions: ViLD's prompts", "vild", ""),
    ("ensemble, regions: learned prompt", "learned", ""),
    ("ensemble, regions by pooling", "pool", ""),
    ("CLIP only, regions by pooling", "pool", "clip_only"),
    ("per-pixel, alone", "pixel_alone", ""),
    ("per-pixel, with CLIP", "pixel", ""),
    ("self-training: ensemble", "self", ""),
    ("self-training: head only", "self", "head_only"),
]
KEYS = ("mIoU_seen", "mIoU_unseen", "hIoU")


def run(name: str, words: list[str], args: argparse.Namespace) -> None:
    """Run one command unless its results are there."""
    folder = args.out / name
    if any((folder / f"{kind}.json").exists() for kind in ("metrics", "budget")):
        return
    options = ["--root", args.out / "datasets", "--out", folder, "--device", "cpu"]
    options += [x for word in words if "=" in word for x in ("--set", word)]
    if words[0] == "train.py" and (folder / "last.pt").exists():
        options.append("--resume")
    command = [sys.executable, *(word for word in words if "=" not in word), *map(str, options)]
    started = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(args.out / f"{name}.txt", "a") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: see {log.name}")
    print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


def run_all(args: argparse.Namespace, names: list[str]) -> None:
    """Every training and evaluation of these names, for every seed; first what others need."""
    values = {"out": args.out, "clip": args.out / "datasets" / "shapes" / "clip.pt"}
    stages = ([], [], [])
    if "learned" in names:
        stages[0].append(("prompts", [word.format(**values) for word in PROMPTS]))
    for seed in args.seeds:
        values["seed"] = seed
        for name in names:
            if name in TRAININGS:
                words, before = TRAININGS[name]
                stage = stages[1 if before else 0]
            else:
                training, words = EVALUATIONS[name]
                words = ["eval.py", f"{{out}}/{training}_{{seed}}/last.pt", *words]
                stage = stages[2]
            stage.append((f"{name}_{seed}", [word.format(**values) for word in words]))
    for stage in stages:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: run(*job, args), stage))


def print_table(args: argparse.Namespace) -> None:
    def read(folder: str, file: str) -> list[dict]:
        files = [args.out / f"{folder}_{seed}" / file for seed in args.seeds]
        return [json.loads(f.read_text()) for f in files] if all(f.exists() for f in files) else []

    heads = "".join(f"{head:>14}" for head in ("seen", "unseen", "hIoU"))
    print(f"{f'test split, {len(args.seeds)} seeds':46}{heads}")
    for title, folder, part in ROWS:
        results = [result[part] if part else result for result in read(folder, "metrics.json")]
        cells = [[result[key] for result in results] for key in KEYS] if results else []
        cells = [f"{statistics.mean(c):7.1f} +-{statistics.pstdev(c):5.1f}" for c in cells]
        if cells:
            print(f"{title:46}{''.join(cells)}")
    if recall := [result["recall"]["0.5"] for result in read("budget", "budget.json")]:
        print(f"recall of the ground-truth masks at IoU 0.5: {statistics.mean(recall):.1f}")


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--out", type=Path, default=Path("runs/table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="commands at once, a thread each")
    parser.add_argument("--only", nargs="+", help="these trainings and evaluations")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    prepare = [sys.executable, "prepare_data.py", "shapes", "--root", args.out / "datasets"]
    subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
    run_all(args, args.only or [*TRAININGS, *EVALUATIONS])
    print_table(args)
    minutes = (time.perf_counter() - started) / 60
    print(f"{minutes:.0f} minutes, torch {torch.__version__}, {args.jobs} jobs at once")


if __name__ == "__main__":
    main()
