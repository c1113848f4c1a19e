"""What an image and a training step ask of the host and of the memory of a GPU: `python -m
tests.benchmarks.hardware [image step ...] [--repeat 5]`.

Prints kernels launched (a CUDA graph counts as one), places where the host waits, CPU time of the
thread and peak memory, at real sizes and with random weights; `image` and its stages: R101c,
ViT-B/16, 100 regions, 171 words, 640 x 853; `step`: R50, 16 crops of 640, 8 classes in each, `coco`:
R101c, 32 crops, 20 of 156 classes. On a real GPU launches come from the profiler. It also runs
under a stand-in for the CUDA libraries that computes nothing and exports its counters
(`null_launches` and others): what the host does and the allocator are real there, results and the
time of kernels are not.
"""

import argparse
import collections
import contextlib
import ctypes
import gc
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

import train
from zsseg.apps.predict import segment_image
from zsseg.clip import CLIP, VisionTransformer
from zsseg.config import load_config
from zsseg.distributed import Process
from zsseg.losses import segmentation_losses
from zsseg.maskformer import MaskFormer
from zsseg.matcher import Targets
from zsseg.tokenizer import Tokenizer
from zsseg.weights import assemble

ROOT = Path(__file__).parents[2]
COUNTERS = [f"null_{name}" for name in ("launches", "gemms", "convs", "memsets", "triton")]
GPU = torch.device("cuda", 0)


def stand_in() -> Callable[[], int] | None:
    """The number of launches so far, where the CUDA libraries are a stand-in that counts."""
    libraries = [ctypes.CDLL(name) for name in (None, "libcuda.so.1")]
    if not hasattr(libraries[0], COUNTERS[0]):
        return None
    homes = [next(lib for lib in libraries if hasattr(lib, name)) for name in COUNTERS]
    counters = [ctypes.c_long.in_dll(lib, n) for lib, n in zip(homes, COUNTERS, strict=True)]
    torch.backends.cuda.enable_cudnn_sdp(False)  # it knows no attention of cuDNN's
    return lambda: sum(counter.value for counter in counters)


def launches(run: Callable[[], object]) -> int:
    """Kernels, memory sets and graphs that `run` launches."""
    replayed = []
    replay = torch.cuda.CUDAGraph.replay
    count = stand_in()
    if count:
        counted = lambda graph: (replayed.append(1), replay(graph))
        with patch.object(torch.cuda.CUDAGraph, "replay", counted):
            before = count()
            run()
        return count() - before + len(replayed)
    with torch.profiler.profile() as profiler:
        run()
    starts = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemset")
    return sum(e.count for e in profiler.key_averages() if e.key.startswith(starts))


@contextlib.contextmanager
def waits() -> Iterator[collections.Counter]:
    """The lines of this project where PyTorch makes the host wait for the GPU."""
    found = collections.Counter()

    def note(message: object, *_: object) -> None:
        if "synchroniz" in str(message):
            frames = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(ROOT)]
            last = next(f for f in reversed(frames) if f.filename != __file__)
            found[f"{Path(last.filename).relative_to(ROOT)}:{last.lineno}  {last.line}"] += 1

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(), patch.object(warnings, "showwarning", note):
        warnings.simplefilter("always")
        yield found
    torch.cuda.set_sync_debug_mode("default")


def row(title: str, run: Callable[[], object], repeat: int) -> None:
    """Print what `run` costs once it is warm."""
    for _ in range(3):
        run()
    count = launches(run)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeat):
        started = time.thread_time()
        run()
        times.append(1000 * (time.thread_time() - started))
    with waits() as found:
        run()
    peak = torch.cuda.max_memory_allocated() / 2**20
    numbers = f"{count:9d}{sum(found.values()):7d}{min(times):9.1f}{peak:9.0f}"
    print(f"{title:44}{numbers}", flush=True)
    for place, times_waited in found.items():
        print(f"    waits {times_waited} x {place}")


def random_clip():
    """A ViT-B/16 with random weights; bytes as tokens, so that no vocabulary is needed."""
    torch.manual_seed(0)
    visual = VisionTransformer(224, 16, 768, 12, 512)
    clip = CLIP(visual, Tokenizer(514, 160), 512, 160, 514, 64, 1)
    return clip.eval().requires_grad_(False)


def image(how: str, repeat: int) -> None:
    """An image from the host's memory to the host's memory, and its stages."""
    process = Process(GPU)
    config = load_config(None, ["model.backbone=R101c", "clip.prompt=single"])
    segmenter = assemble(config, random_clip()).to(GPU).eval()
    segmenter.accelerate(torch.bfloat16, how != "eager", how == "compiled")
    segmenter.names = [f"thing {i}" for i in range(171)]
    segmenter.seen = torch.arange(171, device=GPU) < 128
    text = F.normalize(torch.randn(171, 512, device=GPU), dim=-1)
    segmenter.text_features = segmenter.region_text_features = text
    size = (640, 853)
    photo = torch.zeros(3, *size, dtype=torch.uint8)
    row(f"image, {how}", lambda: segment_image(segmenter, config, process, [photo], size), repeat)
    with torch.inference_mode(), process.autocast(config.model.bf16):
        x = photo.to(GPU)
        found = segmenter.propose(x)
        crops = torch.zeros(100, 3, 224, 224, device=GPU, dtype=torch.bfloat16)
        tower = segmenter.clip.encode_image
        row("  proposer", lambda: segmenter.proposer(x), repeat)
        row("  masks, crops and CLIP", lambda: segmenter.propose(x), repeat)
        row("  CLIP's tower, 4 x 25 crops", lambda: [tower(c) for c in crops.split(25)], repeat)
        row("  label map", lambda: segmenter.label_map(found.class_probs, found, size), repeat)


class MadeUpTask(train.SegmentTask):
    """The real training step on made-up images [B, 3, side, side] with T of `classes` in each."""

    def __init__(self, config, process, side, classes):
        self.config = config
        self.process = process
        self.losses = segmentation_losses
        self.model = MaskFormer(config.model, 512).to(process.device).train()
        self.clipped = [self.model]
        self.text = F.normalize(torch.randn(classes, 512), dim=-1).to(process.device)
        self.compiled = False
        self.side = side
        self.optimizer = train.build_optimizer(self.model, config)

    def batch(self, T):
        B, side = self.config.train.batch_size, self.side
        coarse = torch.randint(0, T, (B, 1, 8, 8)).float()
        labels = F.interpolate(coarse, (side, side), mode="nearest")[:, 0].to(torch.uint8)
        targets = (labels, torch.arange(T).expand(B, T).contiguous(), torch.full((B,), T))
        images = torch.randint(0, 256, (B, 3, side, side), dtype=torch.uint8)
        if self.process.device.type == "cuda":
            return images.pin_memory(), Targets(*(t.pin_memory() for t in targets))
        return images, Targets(*targets)

    def step(self, batch):
        return train.train_step(self, self.model, self.optimizer, [batch], 0.01)


def step(backbone: str, B: int, T: int, classes: int, compiled: bool, repeat: int) -> None:
    """A training step, after its batch is loaded."""
    settings = [f"model.backbone={backbone}", f"train.batch_size={B}"]
    task = MadeUpTask(load_config(None, settings), Process(GPU), 640, classes)
    if compiled:
        task.compile()
    batch = task.batch(T)
    title = f"step, {backbone}, {B} x 640{', compiled' * compiled}"
    row(title, lambda: task.step(batch), repeat)


SCENES = {
    "image": lambda n: image("graphs", n),
    "eager": lambda n: image("eager", n),
    "compiled": lambda n: image("compiled", n),
    "step": lambda n: step("R50", 16, 8, 15, False, n),
    "step-compiled": lambda n: step("R50", 16, 8, 15, True, n),
    "coco": lambda n: step("R101c", 32, 20, 156, False, n),
}


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("scenes", nargs="*", choices=[*SCENES, []], default=["image", "step"])
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    stand_in()
    print(f"{'':44} launches  waits  host ms  peak MiB")
    for name in args.scenes:
        SCENES[name](args.repeat)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
