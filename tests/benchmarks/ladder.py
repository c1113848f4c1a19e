"""End to end from the plain version to the fastest, one optimisation more in every row.

    python -m tests.benchmarks.ladder [--rows inference:plain training:bf16 ...] [--csv FILE]

Inference: an image of soft colours, R101c, ViT-B/16, 100 live regions, random weights, from the
decoded image to the label map at its own size; last, what bf16 and torch.compile give without
kernels, to compare with, and the one-pass region classifier. Training: steps of R50. Every row runs
in another process; the share of pixels whose label is that of the first row is printed, too.
"""

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F

from tests.benchmarks.hardware import MadeUpTask, random_clip
from tests.benchmarks.kernels import machine, measure

INFERENCE = ("plain", "isa", "kernels", "bf16", "fast", "graphs", "compile")
TRAINING = ("plain", "kernels", "bf16", "compile")
WHAT = {
    "plain": "plain eager fp32, all crops in one batch (on a CPU: held to AVX2)",
    "isa": "+ all instructions that the processor has",
    "kernels": "+ Triton kernels",
    "bf16": "+ bf16 autocast",
    "fast": "+ weights cast and packed once, norms and QuickGELU's factor folded",
    "fast32": "the same without bf16",
    "graphs": "+ CUDA graphs",
    "compile": "+ torch.compile",
    "baseline": "the same without Triton kernels: bf16 and torch.compile of plain PyTorch",
    "pool": "one pass of CLIP, dense features pooled under the masks, with all of these",
}
ROWS = [f"inference:{name}" for name in (*INFERENCE, "fast32", "baseline", "pool")]
ROWS += [f"training:{name}" for name in (*TRAINING, "baseline")]
# Left out on these, unless asked for.
ELSEWHERE = {"cpu": ("kernels", "graphs", "compile", "baseline"), "cuda": ("isa", "fast", "fast32")}
HELD = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
SIZES = {"cpu": (480, 640, 20), "cuda": (640, 853, 171)}  # height, width, words


@torch.inference_mode()
def vary(segmenter, image: torch.Tensor) -> None:
    """Random weights give all queries one mask and all regions one class: take what is common out,
    and make masks decided.
    """
    model = segmenter.maskformer
    generator = torch.Generator().manual_seed(2)
    last = model.pixel_decoder.mask_features
    seen = []
    hook = last.register_forward_hook(lambda module, inputs, output: seen.append(output))
    embeds, _ = model.decode(model.prepare(image[None]))
    last.bias.copy_(-seen[0].mean((0, 2, 3)))
    scale = 10 / model.decode(model.prepare(image[None]))[1].std()
    for tensor in last.parameters():
        tensor.mul_(scale)
    hook.remove()
    ends = torch.rand(64, 3, 2, 1, 1, generator=generator).to(image.device)
    ramp = torch.linspace(0, 1, 224, device=image.device)
    crops = 3 * (ends[:, :, 0] * ramp + ends[:, :, 1] * ramp[:, None]) - 3

    def directions(x: torch.Tensor) -> torch.Tensor:
        """Random words [C, D] among the directions in which x [N, D] varies."""
        words = torch.randn(len(segmenter.names), len(x), generator=generator).to(x.device)
        words = words @ (x - x.mean(0))
        common = F.normalize(x.mean(0), dim=0)
        return F.normalize(words - words @ common[:, None] * common, dim=-1)

    segmenter.text_features = directions(embeds[-1, 0])
    segmenter.region_text_features = directions(segmenter.clip.encode_image(crops))


def inference(done: set[str], args: argparse.Namespace) -> dict:
    """Seconds an image; `done` holds the optimisations up to this row."""
    from zsseg import regions
    from zsseg.apps.predict import segment_image
    from zsseg.config import load_config
    from zsseg.distributed import init_distributed
    from zsseg.weights import assemble

    process = init_distributed(args.device)
    cuda = process.device.type == "cuda"
    bf16 = "on" if "bf16" in done else "off"
    way = "pool" if args.row == "inference:pool" else "crops"
    settings = ["clip.prompt=single", f"model.bf16={bf16}", f"clip.regions={way}"]
    config = load_config(None, settings)
    segmenter = assemble(config, random_clip()).to(process.device).eval()
    # Their text features come below, so that no tokenizer is needed.
    segmenter.names = [f"thing {i}" for i in range(args.words)]
    segmenter.seen = torch.arange(args.words, device=process.device) < args.words * 3 // 4
    generator = torch.Generator().manual_seed(1)
    sizes = ((args.height, args.width), (args.width, args.height))[: 2 if cuda else 1]
    coarse = torch.rand(1, 3, 6, 6, generator=generator)
    images = [(255 * F.interpolate(coarse, size, mode="bilinear")[0]).byte() for size in sizes]
    vary(segmenter, images[0].to(process.device))
    with process.autocast(config.model.bf16):
        valid = int(segmenter.propose(images[0].to(process.device)).valid.sum())
    if not done:
        at_once = lambda clip, crops, _, shown=None: clip.encode_image(crops, shown).float()
        regions.encode_crops = at_once
    if "fast" in done:
        dtype = torch.bfloat16 if "bf16" in done else torch.float32
        segmenter.accelerate(dtype, cuda and "graphs" in done, "compile" in done)

    def go() -> list:
        parts = (segmenter, config, process)
        results = [segment_image(*parts, [x], tuple(x.shape[1:])) for x in images]
        return [result()[0] for result in results]

    for _ in range(3 if cuda else 1):
        maps = go()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(20 if cuda else 1):
        started = time.perf_counter()
        go()
        times.append((time.perf_counter() - started) / len(images))
    torch.save([m.to(torch.int16) for m in maps], args.maps)
    found = {"seconds": median(times), "regions": valid, "peak_MiB": peak(cuda)}
    if cuda:
        crops = torch.randn(100, 3, 224, 224, device=process.device)
        with torch.inference_mode(), process.autocast(config.model.bf16):
            (_, milliseconds, _), _ = measure(lambda: segmenter.clip.encode_image(crops), "cuda")
        found["tower_TFLOP_per_s"] = 3.27e3 / milliseconds  # 32.7 GFLOP a crop
    return found


def training(done: set[str], args: argparse.Namespace) -> dict:
    """Seconds an image of training steps."""
    from zsseg.config import load_config
    from zsseg.distributed import init_distributed

    process = init_distributed(args.device)
    cuda = process.device.type == "cuda"
    torch.manual_seed(0)
    B, side = (16, 512) if cuda else (2, 128)
    bf16 = "on" if "bf16" in done else "off"
    settings = ["model.backbone=R50", f"model.bf16={bf16}", f"train.batch_size={B}"]
    task = MadeUpTask(load_config(None, settings), process, side, 15)
    if "compile" in done:
        task.compile()
    batches = [task.batch(T) for T in (3, 6, 1, 9)]
    step = lambda i: task.step(batches[i % 4])
    for i in range(6 if cuda else 1):
        step(i)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(5 if cuda else 2):
        started = time.perf_counter()
        for i in range(8 if cuda else 1):  # the host may run ahead
            loss = step(i)[0]["loss"]
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / (8 * B if cuda else B))
    assert torch.isfinite(loss)
    return {"seconds": median(times), "regions": B, "peak_MiB": peak(cuda)}


def peak(cuda: bool) -> float:
    """MiB: of the GPU's memory, or of the process."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def optimisations(row: str, device: str) -> set[str]:
    """All that a row has."""
    part, name = row.split(":")
    names = TRAINING if part == "training" else INFERENCE
    if name == "baseline":
        return set(names) - {"plain", "kernels"}
    if name == "fast32":
        return {"isa", "fast"}
    if name == "pool":
        name = "fast" if device == "cpu" else "compile"
    return set(names[: names.index(name) + 1]) - {"plain"}


def run_row(row: str, args: argparse.Namespace, folder: Path) -> dict | None:
    """One row in a process of its own; None if it failed."""
    words = [sys.executable, "-m", "tests.benchmarks.ladder", "--row", row]
    words += ["--maps", f"{folder}/{row}.pt"]
    for name in ("device", "height", "width", "words"):
        words += [f"--{name}", str(getattr(args, name))]
    done = optimisations(row, args.device)
    held = HELD if row == "inference:plain" and args.device == "cpu" else {}
    environment = os.environ | held | {"ZSSEG_KERNELS": str(int("kernels" in done))}
    options = {"capture_output": True, "text": True, "timeout": 600, "env": environment}
    result = subprocess.run(words, **options)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [result.returncode]
        print(f"{row} failed: {lines[-1]}", file=sys.stderr)
        return None
    return json.loads(result.stdout.splitlines()[-1])


def equal(row: str, first: str, folder: Path) -> float | None:
    """Percent of the pixels whose label is that of the first row."""
    if row.startswith("training"):
        return None
    pairs = zip(*(torch.load(folder / f"{r}.pt") for r in (row, first)), strict=True)
    return 100 * mean(float((a == b).double().mean()) for a, b in pairs)


def parse() -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="default: all of this device")
    parser.add_argument("--csv", type=Path)
    for i, name in enumerate(("height", "width", "words")):
        text = f"{SIZES['cpu'][i]} on a CPU, {SIZES['cuda'][i]} on a GPU"
        parser.add_argument(f"--{name}", type=int, help=text)
    parser.add_argument("--row", help=argparse.SUPPRESS)  # this process measures one row
    parser.add_argument("--maps", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name, value in zip(("height", "width", "words"), SIZES[args.device], strict=True):
        setattr(args, name, getattr(args, name) or value)
    return args


def main() -> None:
    args = parse()
    if args.row:
        measured = training if args.row.startswith("training") else inference
        print(json.dumps(measured(optimisations(args.row, args.device), args)))
        return
    rows = args.rows or [r for r in ROWS if r.split(":")[1] not in ELSEWHERE[args.device]]
    about = machine(args.device)
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            if not (found := run_row(row, args, Path(folder))):
                continue
            part, name = row.split(":")
            base = next((line for line in table if line["part"] == part), found)
            first = f"{part}:{base.get('row', name)}"
            found |= {"part": part, "row": name, "per_second": 1 / found["seconds"]}
            found["times_faster"] = base["seconds"] / found["seconds"]
            found["equal_labels_percent"] = equal(row, first, Path(folder))
            table.append(found)
            print(f"{part:10}{WHAT[name]:85}{found['seconds']:9.4f} s", end="")
            print(f"{found['times_faster']:7.2f}x  {found['peak_MiB']:6.0f} MiB", end="")
            print(f"  equal {found['equal_labels_percent']} %", flush=True)
            if args.csv:  # there may be no time for the next row
                with open(args.csv, "w", newline="") as out:
                    writer = csv.DictWriter(out, [*table[0], *about])
                    writer.writeheader()
                    writer.writerows(line | about for line in table)


if __name__ == "__main__":
    main()
