"""The log of a training run: metrics.jsonl, wandb on request, and how fast the run is."""

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zsseg.config import Config
from zsseg.datasets import dataset
from zsseg.distributed import Process
from zsseg.utils import LINE_EVERY, UserError, atomic_write, format_time

MAX_IMAGES = 8  # of an evaluation that wandb gets
MAX_SIDE = 512  # pixels of their longer side
# Seconds that wandb may take to begin and to upload the rest; the environment may say otherwise.
WANDB = {"WANDB_INIT_TIMEOUT": "20", "WANDB_FINISH_TIMEOUT": "20", "WANDB_ERROR_REPORTING": "false"}


class Log:
    """The record of a run: one JSON object a line in `metrics.jsonl`, the same numbers in wandb
    (rank 0 only), and a line now and then. Whatever becomes of wandb, the run goes on.
    """

    def __init__(
        self, folder: Path, process: Process, config: Config, step: int = 0, run_id: str = ""
    ):
        self.process = process
        self.config = config
        self.printed = time.perf_counter()
        self.speed = Speed(process, config.train.batch_size, step)
        self.file = folder / "metrics.jsonl" if process.is_main else None
        self.data = dataset(config.data)
        self.images: list[tuple[str, np.ndarray]] = []
        self.run = None
        self.run_id = run_id
        if not process.is_main:
            return
        # A resumed run repeats the steps after its checkpoint, and the evaluation due then.
        lines = read_lines(self.file) if step else []
        with atomic_write(self.file) as file:
            before = (json.dumps(line) + "\n" for line in lines if is_before(line, step))
            file.write_text("".join(before))
        if config.log.wandb != "disabled":
            self.run = start_wandb(config, folder, run_id)
            self.run_id = self.run.id

    def step(
        self, done: int, loss: Tensor, parts: dict[str, Tensor], norm: Tensor, lr: float
    ) -> str:
        """Log the numbers of the step that was the `done`th, means over the processes; here the
        host waits for the device. What a progress bar shows of them.
        """
        train = self.config.train
        means = torch.stack([loss, *parts.values()]).double()
        means = self.process.sum(means) / self.process.world_size
        values = dict(zip(["loss", *parts], means.tolist(), strict=True))
        values |= {"grad_norm": float(norm), "lr": lr} | self.speed.read(done)
        self.write(done, **values)
        text = f"loss {values['loss']:.3f}, {values['speed/images_per_second']:.1f} images/s"
        now = time.perf_counter()
        due = now - self.printed > LINE_EVERY or done == train.steps
        if self.file and due and not sys.stderr.isatty():
            self.printed = now
            left = format_time(self.speed.pace * (train.steps - done))
            print(f"{train.task} step {done}/{train.steps} {text}, {left} left", flush=True)
        return text

    def write(self, step: int, **values: object) -> None:
        """Log values, nested ones too; nothing with NaN/Inf, which JSON does not know."""
        if self.file is None or not all(map(math.isfinite, scalars(values).values())):
            return
        try:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        except OSError as error:
            why = f"cannot be written ({error.strerror})"
            raise UserError(f"file {self.file}", why, "check the disk; --resume") from None
        self.send(lambda: self.run.log(scalars({"step": step, **values})))

    def send(self, action: Callable[[], None]) -> None:
        """wandb's errors end wandb, not the run."""
        if self.run is None:
            return
        try:
            action()
        except Exception as error:
            print(f"wandb: {reason(error)}; going on without it", flush=True)
            self.run = None

    def evaluation(self, step: int, split: str, result: dict) -> None:
        """Log the result of an evaluation; wandb gets its first images, too."""
        self.write(step, **{f"{split}/{key}": value for key, value in result.items()})
        if self.images:
            self.send(lambda: self.send_images(step, split))
        self.images = []

    def send_images(self, step: int, split: str) -> None:
        import wandb

        names = [*self.data.names[:255], "ignored"]
        labels = dict(enumerate(names))
        images = []
        for name, maps in self.images:
            masks = {
                title: {"mask_data": mask, "class_labels": labels}
                for title, mask in zip(("ground_truth", "prediction"), maps[3:], strict=True)
            }
            images.append(wandb.Image(maps[:3].transpose(1, 2, 0), caption=name, masks=masks))
        self.run.log({"step": step, f"{split}/predictions": images})

    def on_image(
        self,
        number: int,
        name: str,
        image: Tensor,
        labels: Tensor,
        predicted: Tensor,
        matrix: Tensor,
    ) -> None:
        """Collect the first images of an evaluation for wandb, resized: uint8 [5, h, w], the image,
        ground truth and prediction. wandb's masks know the classes 0 to 254; 255, or the number of
        classes, stands for all other pixels.
        """
        if self.run is None or len(self.images) == MAX_IMAGES:
            return
        scale = min(1, MAX_SIDE / max(image.shape[1:]))
        size = [max(round(n * scale), 1) for n in image.shape[1:]]
        other = min(len(self.data.names), 255)
        labels = labels.where(labels != self.data.ignore, other)
        maps = torch.stack([labels, predicted]).clamp(max=other)
        image = F.interpolate(image[None].float(), size, mode="area")
        maps = F.interpolate(maps[None].float(), size, mode="nearest")
        self.images.append((name, torch.cat([image, maps], 1)[0].byte().cpu().numpy()))

    def finish(self) -> None:
        """Give wandb its time to upload the rest; what is left stays in its folder."""
        self.send(lambda: self.run.finish())
        self.run = None


class Speed:
    """How fast a run is: images a second over all processes, its share of time spent waiting for
    data, the memory it has needed. Since the last `read`; evaluations do not count.
    """

    def __init__(self, process: Process, images: int, step: int):
        self.device = process.device
        self.images = images  # a step
        self.step = step
        self.pace = 0.0  # seconds a step, of the last `read`
        self.since = time.perf_counter()
        self.waited = 0.0

    def timed(self, batches: Iterator) -> Iterator:
        """The batches; the time that each takes to come counts as waiting."""
        asked = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def read(self, step: int) -> dict[str, float]:
        """`step` steps are done, and the device has been waited for."""
        now = time.perf_counter()
        seconds = now - self.since
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device) / 2**30
        else:
            unit = 2**30 if sys.platform == "darwin" else 2**20
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        self.pace = seconds / (step - self.step)
        values = {
            "speed/images_per_second": self.images / self.pace,
            "speed/data_wait": 100 * self.waited / seconds,
            "speed/memory_gib": memory,
        }
        self.since = now
        self.waited = 0.0
        self.step = step
        return values


def read_lines(file: Path) -> list[dict]:
    """The complete lines of a metrics.jsonl: after a kill the last one may not be."""
    lines = []
    for text in file.read_text("utf-8", "replace").splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and type(line.get("step")) is int:
                lines.append(line)
    return lines


def is_before(line: dict, step: int) -> bool:
    """Whether a run that goes on from `step` does not repeat what a line of metrics.jsonl is
    about.
    """
    return line["step"] < step or (line["step"] == step and ("loss" in line or "skipped" in line))


def scalars(values: dict, prefix: str = "") -> dict[str, float]:
    """The numbers among nested values as {"test/head_only/hIoU": 12.0}, without the tables of every
    class.
    """
    numbers = {}
    for key, value in values.items():
        if isinstance(value, dict) and not key.endswith("per_class"):
            numbers |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            numbers[f"{prefix}{key}"] = value
    return numbers


def reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def start_wandb(config: Config, folder: Path, run_id: str):
    """wandb's run: a new one or, by its id, the one that is resumed; offline without a login or a
    network. wandb's environment decides where the configuration has its defaults.
    """
    for name, value in WANDB.items():
        os.environ.setdefault(name, value)
    disable = "set log.wandb=disabled"
    try:
        import wandb  # takes seconds, and most runs do without
    except ImportError:
        todo = f"pip install wandb, or {disable}"
        raise UserError("log.wandb", "wandb is not installed", todo) from None
    options = {"config": asdict(config), "dir": str(folder), "id": run_id or None}
    if "WANDB_PROJECT" not in os.environ:
        options["project"] = config.log.project
    mode = os.environ.get("WANDB_MODE", config.log.wandb)
    if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        print("wandb: no login (wandb login), logging offline", flush=True)
        mode = "offline"
    try:
        run = wandb.init(mode=mode, resume="allow", **options)
    except Exception as error:  # no network, no answer, an unknown login, ...
        if mode != "online":
            raise UserError("log.wandb", reason(error), f"try again, or {disable}") from None
        print(f"wandb: {reason(error)}; logging offline (later: wandb sync)", flush=True)
        run = wandb.init(mode="offline", resume="allow", **options)
    run.define_metric("*", step_metric="step")
    return run
