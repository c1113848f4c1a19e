"""The paper's experiments on the synthetic data set, over several seeds: mean +- standard deviation
of seen, unseen and hIoU.

    python -m tests.benchmarks.table [--out runs/table] [--seeds 0 1 2] [--only base ...]

Every training and evaluation is one of the project's commands, on two processes as in the README;
what is finished in --out is not run again. The data set is the same for all seeds; CLIP and what is
trained on it begin anew for each. The test split is measured. --out must be a new folder when
settings change.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from zsseg.prepare import shapes
from zsseg.prepare.shapes_clip import train_small_clip
from zsseg.prompts import TEMPLATES

# The small CLIP reads 40 tokens, which are letters: 13 of ViLD's 14 templates have room for every
# name.
VILD = [t.replace("{}", "{{}}") for t in TEMPLATES["vild"] if len(t.replace(" ", "")) <= 26]
SHAPES = ["train.py", "--config", "configs/shapes.toml", "train.seed={seed}"]
# Chosen on the validation split of an earlier synthetic data set, with the steps.
LEARNED = ["clip.prompt_prefix=1"]
PROMPTS = ["train.py", "--config", "configs/voc_prompts.toml", "data.name=shapes"]
PROMPTS += ["data.split=test", "clip.weights={{root}}/shapes/clip.pt", "train.seeds=[0,1,2,3,4]"]
PROMPTS += ["train.steps=300", "data.workers=0", *LEARNED]
TEACHER = "train.teacher={out}/base_{seed}/last.pt"
# Evaluations; things are about as large at an edge of 128 as in the crops that CLIP was trained on.
BASE = ["eval.py", "{out}/base_{seed}/last.pt"]
PROMPT = "clip.region_prompt="
# {name: words}, in this order; {seed} and {out} are filled in.
RUNS = {
    "base": SHAPES,
    "budget": [*BASE, "--budget"],
    "pool": [*BASE, "clip.regions=pool", "clip.dense_edge=128"],
    "single": [*BASE, f"{PROMPT}single"],
    "vild": [*BASE, f"{PROMPT}{VILD}"],
    "prompts": PROMPTS,
    "learned": [*BASE, f"{PROMPT}learned", "clip.prompts={out}/prompts_{seed}/last.pt", *LEARNED],
    "self": [*SHAPES, "data.train_on=all", TEACHER],
    "pixel": [*SHAPES, "model.proposals=false"],
    "pixel_alone": ["eval.py", "{out}/pixel_{seed}/last.pt", "clip.ensemble=false"],
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


def run(name: str, words: list[str], seed: int, out: Path) -> None:
    """Run one command unless its results are there."""
    folder = out / f"{name}_{seed}"
    if any((folder / f"{kind}.json").exists() for kind in ("metrics", "budget")):
        return
    words = [word.format(seed=seed, out=out) for word in words]
    options = ["--root", out / f"datasets_{seed}", "--out", folder, "--device", "cpu"]
    options += [x for word in words if "=" in word for x in ("--set", word)]
    if words[0] == "train.py" and (folder / "last.pt").exists():
        options.append("--resume")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += [*(word for word in words if "=" not in word), *map(str, options)]
    started = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder.with_suffix(".txt"), "a") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: see {log.name}")
    print(f"{folder.name}: {time.perf_counter() - started:.0f} s", flush=True)


def prepare(seed: int, out: Path) -> None:
    """The data root of a seed: the drawings, which all share, and a CLIP."""
    shapes.generate(out / "datasets" / "shapes", workers=2)
    folder = out / f"datasets_{seed}" / "shapes"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("images", "labels", "captions.json"):
        link = folder / name
        if not link.is_symlink():
            link.symlink_to(out / "datasets" / "shapes" / name)
    train_small_clip(folder, seed=seed)


def print_table(args: argparse.Namespace, seeds: list[int]) -> None:
    def read(folder: str, file: str) -> list[dict]:
        files = [args.out / f"{folder}_{seed}" / file for seed in seeds]
        return [json.loads(f.read_text()) for f in files] if all(f.exists() for f in files) else []

    heads = "".join(f"{head:>14}" for head in ("seen", "unseen", "hIoU"))
    print(f"{f'test split, {len(seeds)} seeds':46}{heads}")
    for title, folder, part in ROWS:
        results = [result[part] if part else result for result in read(folder, "metrics.json")]
        cells = [[result[key] for result in results] for key in KEYS] if results else []
        cells = [f"{statistics.mean(c):7.1f} +-{statistics.pstdev(c):5.1f}" for c in cells]
        if cells:
            print(f"{title:46}{''.join(cells)}")
    budgets = read("budget", "budget.json")
    for seed, base, budget in zip(seeds, read("base", "metrics.json"), budgets, strict=False):
        print(f"seed {seed}: CLIP names {budget['clip_accuracy']:.1f}% of the true masks rightly")
        for title, part in (
            ("head", base["head_only"]),
            ("CLIP", base["clip_only"]),
            ("both", base),
        ):
            print(f"  {title}: hIoU {part['hIoU']:.1f}, unseen {part['mIoU_unseen']:.1f}")
    if budgets:
        recall = statistics.mean(budget["recall"]["0.5"] for budget in budgets)
        print(f"recall of the true masks at IoU 0.5: {recall:.1f}")
        for name in ("true_classes", "true_masks"):
            means = [statistics.mean(budget[name][key] for budget in budgets) for key in KEYS[:2]]
            print("{}: {:.1f} seen, {:.1f} unseen".format(name, *means))


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--out", type=Path, default=Path("runs/table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=RUNS, help="these alone; some need others")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for i, seed in enumerate(args.seeds):
        prepare(seed, args.out)
        for name in RUNS:
            if not args.only or name in args.only:
                run(name, RUNS[name], seed, args.out)
        print_table(args, args.seeds[: i + 1])
    minutes = (time.perf_counter() - started) / 60
    print(f"{minutes:.0f} minutes, torch {torch.__version__}, 2 processes")


if __name__ == "__main__":
    main()
