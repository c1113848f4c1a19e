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
SHAPES = ["train.py", "--config", "configs/shapes.toml"]
DENSE = "clip.dense_edge=192"  # things about as large as in the crops that CLIP was trained on
# Chosen on the validation split of an earlier synthetic data set, with the steps.
LEARNED = ["clip.prompt_prefix=1"]
PROMPTS = [
    "train.py",
    "--config",
    "configs/voc_prompts.toml",
    "data.name=shapes",
    "data.split=test",
    "clip.weights={clip}",
    "train.seeds=[0,1,2,3,4]",
    "train.steps=300",
    *LEARNED,
]
# Trainings: {name: (words, after)}; {seed}, {out} and {clip} are filled in.
RUNS = {
    "base": ([*SHAPES, "train.seed={seed}"], ()),
    "pixel": ([*SHAPES, "train.seed={seed}", "model.proposals=false", DENSE], ()),
    "self": (
        [
            *SHAPES,
            "train.seed={seed}",
            "data.train_on=all",
            "train.teacher={out}/base_{seed}/last.pt",
        ],
        ("base",),
    ),
}
# Evaluations of trained models: {name: (training, settings)}
EVALS = {
    "budget": ("base", ["--budget"]),
    "pool": ("base", ["clip.regions=pool", DENSE]),
    "tokens": ("base", ["clip.regions=tokens", DENSE]),
    "single": ("base", ["clip.region_prompt=single"]),
    "vild": ("base", [f"clip.region_prompt={VILD}"]),
    "learned": (
        "base",
        ["clip.region_prompt=learned", "clip.prompts={out}/prompts/last.pt", *LEARNED],
    ),
    "pixel_alone": ("pixel", ["clip.ensemble=false"]),
}
# The table: (title, folder, part of metrics.json)
ROWS = [
    ("MaskFormer only", "base", "head_only"),
    ("CLIP only", "base", "clip_only"),
    ("CLIP x objectness", "base", "clip_objectness"),
    ("ensemble, weight 0.7", "base", ""),
    ("ensemble, regions: prompt single", "single", ""),
    ("ensemble, regions: ViLD's prompts", "vild", ""),
    ("ensemble, regions: learned prompt", "learned", ""),
    ("ensemble, regions by pooling", "pool", ""),
    ("ensemble, regions by tokens", "tokens", ""),
    ("CLIP only, regions by pooling", "pool", "clip_only"),
    ("CLIP only, regions by tokens", "tokens", "clip_only"),
    ("per-pixel, alone", "pixel_alone", ""),
    ("per-pixel, with dense CLIP", "pixel", ""),
    ("self-training: ensemble", "self", ""),
    ("self-training: MaskFormer only", "self", "head_only"),
]


def run(name: str, words: list[str], args: argparse.Namespace) -> float:
    """Run one command unless its results are there; seconds."""
    folder = args.out / name
    if any((folder / f"{kind}.json").exists() for kind in ("metrics", "budget")):
        return 0.0
    script, *rest = words
    options = ["--root", str(args.out / "datasets"), "--out", str(folder), "--device", "cpu"]
    options += [x for word in rest if "=" in word for x in ("--set", word)]
    if script == "train.py" and (folder / "last.pt").exists():
        options.append("--resume")
    command = [sys.executable, script, *(w for w in rest if "=" not in w), *options]
    folder.mkdir(parents=True, exist_ok=True)
    started, environment = time.perf_counter(), os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder / "log.txt", "a") as log:
        code = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment
        ).returncode
    if code:
        raise SystemExit(f"{' '.join(command)} failed: see {folder / 'log.txt'}")
    print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--jobs", type=int, default=2, help="commands at once, each with one thread"
    )
    parser.add_argument("--only", nargs="+", help="these trainings and evaluations")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.out = args.out.resolve()
    started, root = time.perf_counter(), args.out / "datasets"
    wanted = args.only or [*RUNS, *EVALS]
    subprocess.run(
        [sys.executable, "prepare_data.py", "shapes", "--root", str(root)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    fill = lambda words, seed: [
        w.format(seed=seed, out=args.out, clip=root / "shapes" / "clip.pt") for w in words
    ]

    def stage(jobs: list[tuple[str, list[str]]]) -> None:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: run(*job, args), jobs))

    first = [
        (f"{n}_{s}", fill(RUNS[n][0], s))
        for n in RUNS
        for s in args.seeds
        if n in wanted and not RUNS[n][1]
    ]
    stage([*first, *([("prompts", fill(PROMPTS, 0))] if "learned" in wanted else [])])
    second = [
        (f"{n}_{s}", fill(RUNS[n][0], s))
        for n in RUNS
        for s in args.seeds
        if n in wanted and RUNS[n][1]
    ]
    for name, (training, settings) in EVALS.items():
        for seed in args.seeds if name in wanted else ():
            model = str(args.out / f"{training}_{seed}" / "last.pt")
            second.append((f"{name}_{seed}", ["eval.py", model, *fill(settings, seed)]))
    stage(second)
    print(
        f"{'test split, ' + str(len(args.seeds)) + ' seeds':46}{'seen':>14}{'unseen':>14}{'hIoU':>14}"
    )
    for title, folder, part in ROWS:
        files = [args.out / f"{folder}_{seed}" / "metrics.json" for seed in args.seeds]
        if not all(f.exists() for f in files):
            continue
        results = [json.loads(f.read_text()) for f in files]
        results = [r[part] if part else r for r in results]
        cells = [[r[k] for r in results] for k in ("mIoU_seen", "mIoU_unseen", "hIoU")]
        print(
            f"{title:46}"
            + "".join(f"{statistics.mean(c):7.1f} +-{statistics.pstdev(c):5.1f}" for c in cells)
        )
    files = [args.out / f"budget_{seed}" / "budget.json" for seed in args.seeds]
    if all(f.exists() for f in files):
        recall = [json.loads(f.read_text())["recall"]["0.5"] for f in files]
        print(f"recall of the ground-truth masks at IoU 0.5: {statistics.mean(recall):.1f}")
    print(
        f"{(time.perf_counter() - started) / 60:.0f} minutes, torch {torch.__version__}, "
        f"{args.jobs} jobs at once"
    )


if __name__ == "__main__":
    main()
