"""Measure every row of zsseg/published.toml whose data set and checkpoint are at hand, by eval.py:
`python -m tests.benchmarks.paper --root datasets --checkpoints DIR [--download]`.

A checkpoint is DIR/NAME.pth, DIR/NAME.pt or DIR/NAME/last.pt. NAME is the row's
(coco-stuff-learned-prompts), its configuration's (coco_stuff_r101c; coco_stuff_r101c_self after
self-training) or its published model's (zsseg-coco-learned), which may be in the cache instead.
Nothing is downloaded without --download; data sets never are. --out (runs/paper) gets a log a row:
command, commit, versions, device, time. What ended well with this command and checkpoint is not
measured again. Numbers of all images with the published settings go into the README's column
"ours". Exit code 2 if a row failed, or none could be measured.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from zsseg import utils
from zsseg.config import load_config
from zsseg.datasets import dataset, find_listing
from zsseg.weights import FILES, find_model

ROOT = Path(__file__).parents[2]
# Configurations that are measured with the published model of another one
SHARED = dict.fromkeys(("ade20k_full", "cityscapes", "pcontext"), "ade20k")
SHARED["voc_cross"] = "coco_stuff_r101c"
DONE = "exit code 0: "  # how a log ends well
# Nothing listens at this port, so that every download fails.
OFFLINE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}


def numbers(row: dict, result: dict) -> str:
    """The metrics that are published of a row, from `result`: "90.0 / 83.5 / 72.5 / 77.5"."""
    values = [result[key] for key in row if isinstance(row[key], float)]
    return " / ".join("-" if value is None else f"{value:.1f}" for value in values)


def find_checkpoint(name: str, row: dict, args: argparse.Namespace) -> Path:
    """A row's checkpoint; UserError if it is not at hand."""
    after = "_self" * any("train.teacher=" in setting for setting in row.get("set", []))
    config = SHARED.get(row["config"], row["config"]) + after
    models = [key for key, model in FILES["model"].items() if model["config"] == config]
    names = [name, row["config"] + after, *models]
    files = [args.checkpoints / f"{n}{end}" for n in names for end in (".pth", ".pt", "/last.pt")]
    files += [utils.cache_dir() / FILES["model"][model]["file"] for model in models]
    if models and args.download and not any(map(Path.is_file, files)):
        find_model(models[0])
    if found := next(filter(Path.is_file, files), None):
        return found.resolve()
    raise utils.UserError("checkpoint", f"none is named {' or '.join(names)}", "see --help")


def measure(checkpoint: Path, row: dict, out: Path, args: argparse.Namespace) -> list[str]:
    """The lines of the log of eval.py, which runs unless it ended well before."""
    words = [sys.executable, "eval.py", checkpoint, "--config", f"configs/{row['config']}.toml"]
    words += ["--root", args.root.resolve(), "--out", out, "--device", args.device]
    words += [x for setting in [*row.get("set", []), *args.set] for x in ("--set", setting)]
    head = [shlex.join(map(str, words)), f"digest: {utils.digest(words, [checkpoint])}"]
    log = out.with_suffix(".txt")
    lines = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
    if lines[:2] == head and lines[-1].startswith(DONE) and (out / "metrics.json").exists():
        return lines
    versions = sorted(f"{d.name} {d.version}" for d in importlib.metadata.distributions())
    head += [f"commit: {utils.git_commit()}", f"python {sys.version}, {', '.join(versions)}"]
    options = {"cwd": ROOT, "env": os.environ | ({} if args.download else OFFLINE)}
    started = time.perf_counter()
    with open(log, "w", encoding="utf-8") as file:
        print(*head, time.strftime("%Y-%m-%d %H:%M:%S %z"), sep="\n", file=file, flush=True)
        code = subprocess.call(words, stdout=file, stderr=subprocess.STDOUT, **options)
        print(f"exit code {code}: {time.perf_counter() - started:.1f} s", file=file)
    return log.read_text("utf-8", "replace").splitlines()


def fill(text: str, ours: dict[str, str]) -> str:
    """The README with the numbers of rows in its column "ours"; "A, C" may mean row "A, B, C"."""
    column = 0
    for i, line in enumerate(lines := text.split("\n")):
        cells = line.split("|")
        column = cells.index(" ours ") if " ours " in cells else column * (len(cells) > 1)
        parts = {*re.sub(r" \(.*\)", "", "".join(cells[1:2])).strip().split(", ")}
        found = [row["name"] for row in FILES["row"] if parts <= {*row["name"].split(", ")}]
        if column and (name := min(found, key=len, default="")) in ours:
            cells[column] = f" {ours[name]} "
            lines[i] = "|".join(cells)
    return "\n".join(lines)


def main(argv: list[str], readme: Path = ROOT / "README.md") -> None:
    parser = utils.run_parser(__doc__)
    parser.add_argument("--checkpoints", type=utils.expand_path, default=Path("checkpoints"))
    parser.add_argument("--download", action="store_true")
    args = parser.parse_args(argv)
    if args.config:
        raise utils.UserError("--config", "is given by each row", "leave it out")
    utils.claim_folder(folder := (args.out or Path("runs", "paper")).resolve())
    ends = []
    ours = {}
    print(f"{'':45}{'published':>26}{'ours':>26}{'seconds':>9}")
    for row in FILES["row"]:
        print(f"{row['name']:45}{numbers(row, row):>26}", end="", flush=True)
        out = folder / re.sub(r"\W+", "-", row["name"].lower())
        try:
            data = load_config(row["config"], [*row.get("set", []), *args.set]).data
            find_listing(data, args.root, data.split)
            lines = measure(find_checkpoint(out.name, row, args), row, out, args)
            ends.append(lines[-1])
            if not lines[-1].startswith(DONE):
                raise utils.UserError(lines[-1], lines[-2], f"see {out}.txt")
        except utils.UserError as error:
            print(f"  {error}")
            continue
        result = json.loads((out / "metrics.json").read_text("utf-8"))
        same = any(line.startswith(f"published ({row['name']}): ") for line in lines)
        if same and result["images"] == dataset(data).counts[data.split]:
            ours[row["name"]] = numbers(row, result)
        note = "" if row["name"] in ours else "  not all images, or other settings"
        print(f"{numbers(row, result):>26}{lines[-1].removeprefix(DONE):>9}{note}")
    readme.write_text(fill(readme.read_text("utf-8"), ours), "utf-8")
    if not ends or not all(end.startswith(DONE) for end in ends):
        raise utils.UserError("rows", "failed, or none could be measured", "see above")


if __name__ == "__main__":
    utils.command(main)
