"""End to end from the plain version to the fastest, one optimisation more in every row.

    python -m tests.benchmarks.ladder [--rounds 3] [--csv FILE] [--plot FILE.svg] [--train] [--regions] [--device cuda]

Inference: an image of soft colours, R101c, ViT-B/16, 100 live regions, random weights, from the
decoded image to the label map at its own size; last, what bf16 and torch.compile give without
kernels, to compare with. With --train, a training step of R50 as well; with
--regions, the one-pass region classifiers. Every row runs in a process of its own, in turn for
every round; medians are printed, with the share of pixels whose label is that of the first row.
"""

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from tests.benchmarks.kernels import bounds, machine, measure

INFERENCE = ("plain", "chunks", "towers", "isa", "kernels", "bf16", "compile")
TRAINING = ("plain", "kernels", "bf16", "compile")
REGIONS = ("crops", "pool", "tokens")  # with everything that this device has by default
WHAT = {
    "plain": "plain eager fp32: regions cropped one at a time, one batch through CLIP",
    "chunks": "+ crops through CLIP in chunks",
    "towers": "+ attention in one product, the last block for one token",
    "isa": "+ all instructions that the processor has (held to AVX2 above)",
    "kernels": "+ Triton kernels",
    "bf16": "+ bf16 autocast",
    "compile": "+ torch.compile",
    "baseline": "the same without Triton kernels: bf16 and torch.compile of plain PyTorch",
    "crops": "all 100 crops through CLIP",
    "pool": "one pass of CLIP, dense features pooled under the masks",
    "tokens": "one pass of CLIP, a class token for each region",
}
# Left out on these, unless asked for.
ELSEWHERE = {"cpu": ("kernels", "compile", "baseline"), "cuda": ("chunks", "isa")}
HELD = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def plain_attention(self, x, mask, first=0):
    """`nn.MultiheadAttention`, with PyTorch's own fast path for inference."""
    if not hasattr(self, "plain"):
        layer = torch.nn.MultiheadAttention(
            x.shape[-1], self.num_heads, batch_first=True, device="meta"
        ).eval()
        layer.in_proj_weight, layer.in_proj_bias, layer.out_proj = (
            self.in_proj_weight,
            self.in_proj_bias,
            self.out_proj,
        )
        self.__dict__["plain"] = layer.requires_grad_(False)
    return self.plain(x, x, x, need_weights=False, attn_mask=mask)[0]


@torch.inference_mode()
def vary(segmenter, image: torch.Tensor) -> None:
    """Random weights give all queries one mask and all regions one class: take what is common out,
    and make masks decided.
    """
    model, generator = segmenter.maskformer, torch.Generator().manual_seed(2)
    seen = []
    hook = model.pixel_decoder.mask_features.register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    embeds, _ = model.decode(model.prepare(image[None]))
    model.pixel_decoder.mask_features.bias.copy_(-seen[0].mean((0, 2, 3)))
    scale = 10 / model.decode(model.prepare(image[None]))[1].std()
    for tensor in model.pixel_decoder.mask_features.parameters():
        tensor.mul_(scale)
    hook.remove()
    ends = torch.rand(64, 3, 2, 1, 1, generator=generator).to(image.device)
    ramp = torch.linspace(0, 1, 224, device=image.device)
    crops = 3 * (ends[:, :, 0] * ramp + ends[:, :, 1] * ramp[:, None]) - 3
    features = segmenter.clip.encode_image(crops)

    def directions(x: torch.Tensor) -> torch.Tensor:
        """Random words [C, D] among the directions in which x [N, D] varies."""
        words = torch.randn(len(segmenter.text_features), len(x), generator=generator).to(
            x.device
        ) @ (x - x.mean(0))
        return F.normalize(
            words - words @ F.normalize(x.mean(0), dim=0)[:, None] * F.normalize(x.mean(0), dim=0),
            dim=-1,
        )

    segmenter.text_features, segmenter.region_text_features = (
        directions(embeds[-1, 0]),
        directions(features),
    )


def inference(done: set[str], args: argparse.Namespace) -> dict:
    """Seconds of every round for one row; `done` holds the optimisations up to it."""
    from zsseg import clip, distributed
    from zsseg.config import load_config
    from zsseg.segmenter import Segmenter

    process, (part, way) = distributed.init_distributed(args.device), args.row.split(":")
    cuda = process.device.type == "cuda"
    torch.manual_seed(0)
    model = clip.CLIP(clip.VisionTransformer(224, 16, 768, 12, 512), 512, 77, 514, 512, 12)
    settings = [
        f"model.kernels={str('kernels' in done).lower()}",
        f"model.bf16={'on' if 'bf16' in done else 'off'}",
    ]
    config = load_config(
        None,
        [
            *settings,
            f"clip.chunk={0 if 'chunks' in done else 10_000}",
            f"clip.regions={way if part == 'regions' else 'crops'}",
        ],
    )
    segmenter = Segmenter(config, model.state_dict()).to(process.device).eval()
    segmenter.set_classes(
        [f"thing {i}" for i in range(args.words)], list(range(args.words * 3 // 4))
    )
    generator = torch.Generator().manual_seed(1)
    sizes = ((args.height, args.width), (args.width, args.height))[: 2 if cuda else 1]
    coarse = torch.rand(1, 3, 6, 6, generator=generator)
    images = [
        (255 * F.interpolate(coarse, size, mode="bilinear")[0]).to(torch.uint8) for size in sizes
    ]
    vary(segmenter, images[0].to(process.device))
    if "compile" in done:
        (segmenter.compile_parts if cuda else segmenter.compile_tower)()
    if "towers" not in done:
        whole = clip.Transformer.forward
        clip.Attention.forward = plain_attention
        clip.Transformer.forward = lambda self, x, mask=None, num_out_tokens=0: whole(self, x, mask)
        clip.QuickGELU.forward = lambda self, x: x * torch.sigmoid(1.702 * x)
        clip.patch_tokens = lambda images, weight: F.conv2d(images, weight, stride=weight.shape[-1])

    def go() -> list[torch.Tensor]:
        with process.autocast(config.model.bf16):
            return [segmenter(image.to(process.device), tuple(image.shape[1:])) for image in images]

    for _ in range(3 if cuda else 1):
        maps = go()
    segmenter.config.ensemble = False
    with process.autocast(config.model.bf16):
        valid = int(segmenter.propose(images[0].to(process.device)).valid.sum())
    segmenter.config.ensemble = True
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(20 if cuda else 1):
        started = time.perf_counter()
        go()
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / len(images))
    torch.save([m.to(torch.int16).cpu() for m in maps], args.maps)
    labels = len(torch.cat([m.flatten() for m in maps]).unique())
    found = {"seconds": times, "regions": valid, "memory": peak(cuda), "labels": labels}
    if cuda:
        crops = torch.randn(100, 3, 224, 224, device=process.device)
        with torch.inference_mode(), process.autocast(config.model.bf16):
            (_, milliseconds, _), _ = measure(lambda: segmenter.clip.encode_image(crops), "cuda")
        # TFLOP/s: 35.1 GFLOP a crop, or 32.7.
        found["tower"] = (3.27e3 if "towers" in done else 3.51e3) / milliseconds
    return found


def training(done: set[str], args: argparse.Namespace) -> dict:
    """Seconds an image of training steps."""
    import train
    from zsseg import distributed
    from zsseg.config import load_config
    from zsseg.losses import segmentation_losses
    from zsseg.maskformer import MaskFormer
    from zsseg.matcher import Targets

    process = distributed.init_distributed(args.device)
    cuda = process.device.type == "cuda"
    torch.manual_seed(0)
    B, side, classes = (16, 512, 15) if cuda else (2, 128, 15)
    config = load_config(
        None,
        [
            "model.backbone=R50",
            f"model.kernels={str('kernels' in done).lower()}",
            f"model.bf16={'on' if 'bf16' in done else 'off'}",
            f"train.batch_size={B}",
        ],
    )
    from kernels.jit import Switch

    Switch.on = config.model.kernels

    class Step(train.Segment):
        """The real step on made-up images."""

        def __init__(self):
            self.config, self.process, self.losses = config, process, segmentation_losses
            self.model = MaskFormer(config.model, 512).to(process.device).train()
            self.text = F.normalize(torch.randn(classes, 512, device=process.device), dim=-1)
            self.compiled = False

    def batch(T: int) -> tuple:
        coarse = torch.randint(0, T, (B, 1, 8, 8)).float()
        labels = F.interpolate(coarse, (side, side), mode="nearest")[:, 0].to(torch.uint8)
        targets = Targets(labels, torch.arange(T).expand(B, T).contiguous(), torch.full((B,), T))
        images = torch.randint(0, 256, (B, 3, side, side), dtype=torch.uint8)
        return (images.pin_memory(), targets.pin_memory()) if cuda else (images, targets)

    task = Step()
    optimizer = train.build_optimizer(task.model, config)
    if "compile" in done:
        task.compile()
    batches = [batch(T) for T in (3, 6, 1, 9)]
    step = lambda i: train.train_step(task, task.model, optimizer, batches[i % 4], 0.01)
    for i in range(6 if cuda else 1):
        step(i)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(5 if cuda else 2):
        started = time.perf_counter()
        for i in range(8 if cuda else 1):  # the host may run ahead
            loss = step(i)[0]
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / (8 * B if cuda else B))
    assert torch.isfinite(loss)
    return {"seconds": times, "regions": B, "memory": peak(cuda)}


def peak(cuda: bool) -> float:
    """MiB: of the GPU's memory, or of the process."""
    return (
        torch.cuda.max_memory_allocated() / 2**20
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    )


def plot(rows: list[dict], file: Path) -> None:
    """Bars of images a second, as SVG."""
    top, height = max(float(r["per_second"]) for r in rows), 26
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{height * len(rows) + 40}" font-family="sans-serif" '
        f'font-size="12"><text x="8" y="18">images a second, {rows[0]["device"]}</text>'
    ]
    for i, row in enumerate(rows):
        y, length = 30 + height * i, 330 * float(row["per_second"]) / top
        lines.append(
            f'<text x="8" y="{y + 14}">{row["part"]}: {WHAT[row["row"]][:70]}</text>'
            f'<rect x="500" y="{y}" height="20" width="{length:.1f}" fill="#4477aa"/>'
            f'<text x="{505 + length:.1f}" y="{y + 14}">{row["per_second"]}</text>'
        )
    file.write_text("\n".join([*lines, "</svg>"]) + "\n")


def child(args: argparse.Namespace) -> None:
    part, row = args.row.split(":")
    names = TRAINING if part == "training" else INFERENCE
    if row == "baseline":
        done = set(names) - {"plain", "kernels"}
    else:
        last = row if part != "regions" else "isa" if args.device == "cpu" else "compile"
        done = set(names[: names.index(last) + 1]) - {"plain"}
    print(json.dumps((training if part == "training" else inference)(done, args)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--train", action="store_true", help="a training step, too")
    parser.add_argument("--regions", action="store_true", help="the region classifiers, too")
    parser.add_argument("--rows", nargs="+", help="only these, e.g. inference:plain inference:bf16")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    for name, cpu, cuda in (("height", 480, 640), ("width", 640, 853), ("words", 20, 171)):
        parser.add_argument(f"--{name}", type=int, help=f"{cpu} on a CPU, {cuda} on a GPU")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # this process measures one row
    parser.add_argument("--maps", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cuda = args.device == "cuda"
    for name, value in (
        ("height", 640 if cuda else 480),
        ("width", 853 if cuda else 640),
        ("words", 171 if cuda else 20),
    ):
        setattr(args, name, getattr(args, name) or value)
    if args.row:
        child(args)
        return
    rows = [f"inference:{r}" for r in (*INFERENCE, "baseline")]
    rows += [f"training:{r}" for r in (*TRAINING, "baseline") if args.train]
    rows += [f"regions:{r}" for r in REGIONS if args.regions]
    rows = args.rows or [r for r in rows if r.split(":")[1] not in ELSEWHERE[args.device]]
    found: dict[str, list[dict]] = {row: [] for row in rows}
    about, rate = machine(args.device), bounds(args.device)[1] if cuda else ""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for row in rows:
                words = [
                    sys.executable,
                    "-m",
                    "tests.benchmarks.ladder",
                    "--row",
                    row,
                    "--maps",
                    f"{folder}/{row}.pt",
                ]
                words += [
                    x
                    for n in ("device", "height", "width", "words")
                    for x in (f"--{n}", str(getattr(args, n)))
                ]
                held = (
                    args.device == "cpu"
                    and row.removeprefix("inference:") in INFERENCE[: INFERENCE.index("isa")]
                )
                environment = os.environ | (HELD if held else {})
                result = subprocess.run(
                    words, capture_output=True, text=True, timeout=600, env=environment
                )
                if result.returncode:
                    print(
                        f"{row} failed: "
                        f"{(result.stderr.strip().splitlines() or [result.returncode])[-1]}",
                        file=sys.stderr,
                    )
                    continue
                found[row].append(json.loads(result.stdout.splitlines()[-1]))
                print(
                    f"round {number + 1}, {row}: "
                    f"{statistics.median(found[row][-1]['seconds']):.4f} s",
                    flush=True,
                )
                table = [
                    summary(r, found, Path(folder)) | {"matrix_TFLOP_per_s": rate} | about
                    for r in rows
                    if found[r]
                ]
                # After every row: there may be no time for the next.
                write(table, args.csv, args.plot)
    for row in table:
        print(
            f"{row['part']:10}{WHAT[row['row']]:76}{row['seconds']:>9} s {row['times_faster']:>6}x"
            f"  equal {row['equal_labels_percent']:>7}%  {row['peak_MiB']:>6} MiB"
        )


def summary(row: str, found: dict[str, list[dict]], folder: Path) -> dict[str, object]:
    """Medians of a row over the rounds, beside the first row of its part."""
    part, name = row.split(":")
    first = next(r for r in found if found[r] and r.startswith(part))
    seconds, base = (
        statistics.median(s for f in found[r] for s in f["seconds"]) for r in (row, first)
    )
    last, equal = found[row][-1], ""
    if part != "training":
        maps = zip(
            torch.load(folder / f"{row}.pt"), torch.load(folder / f"{first}.pt"), strict=True
        )
        equal = f"{100 * statistics.mean(float((a == b).double().mean()) for a, b in maps):.3f}"
    return {
        "part": part,
        "row": name,
        "seconds": f"{seconds:.4f}",
        "per_second": f"{1 / seconds:.3f}",
        "times_faster": f"{base / seconds:.2f}",
        "equal_labels_percent": equal,
        "labels": last.get("labels", ""),
        "peak_MiB": f"{max(f['memory'] for f in found[row]):.0f}",
        "regions": last["regions"],
        "tower_TFLOP_per_s": last.get("tower", ""),
    }


def write(table: list[dict], file: Path | None, image: Path | None) -> None:
    if file:
        with open(file, "w", newline="") as out:
            writer = csv.DictWriter(out, table[0])
            writer.writeheader()
            writer.writerows(table)
    if image:
        plot(table, image)


if __name__ == "__main__":
    main()
