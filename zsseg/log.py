"""The log of a training run: metrics.jsonl, wandb where asked for, and how fast the run is."""

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
from zsseg.files import atomic_write
from zsseg.utils import UserError

MAX_IMAGES = 8  # of an evaluation that wandb gets
MAX_SIDE = 512  # pixels of their longer side
# Seconds that wandb may take to begin and to upload what is left at the end; its telemetry would
# wait for a dead network once more. The environment can say otherwise.
WANDB = {"WANDB_INIT_TIMEOUT": "20", "WANDB_FINISH_TIMEOUT": "20", "WANDB_ERROR_REPORTING": "false"}


class Log:
    """The record of a run: one JSON object a line in `metrics.jsonl`, and wandb where asked for
    (rank 0 only).

    wandb gets the same numbers; whatever becomes of it, the run goes on.
    """

    def __init__(
        self,
        folder: Path,
        process: Process,
        config: Config,
        step: int = 0,
        run_id: str | None = None,
    ):
        self.file = folder / "metrics.jsonl" if process.is_main else None
        self.data = dataset(config.data)
        self.run_id = run_id
        self.images: list[tuple[str, np.ndarray]] = []
        self.wandb = None
        self.sent: set[tuple[int, str]] = set()  # (step, key) that wandb has from before
        self.min_step = 0  # wandb drops what is logged for an earlier one
        if not process.is_main:
            return
        # A resumed run repeats the steps after its checkpoint, and the evaluation that was due
        # then: forget what was logged about them, and the last line if a kill has cut it.
        lines = read_lines(self.file) if step else []
        with atomic_write(self.file) as file:
            file.write_text(
                "".join(json.dumps(line) + "\n" for line in lines if is_before(line, step))
            )
        if config.log.wandb != "disabled":
            if run_id:
                self.sent = {(line["step"], key) for line in lines for key in line}
                self.min_step = max((line["step"] + 1 for line in lines), default=0)
            self.wandb = start_wandb(config, folder, run_id)
            self.run_id = self.wandb.id

    def write(self, step: int, **values: object) -> None:
        """Log values, nested ones too; nothing where there is NaN/Inf, which JSON does not know."""
        if self.file is None or not all(map(math.isfinite, scalars(values).values())):
            return
        try:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        except OSError as error:
            why = f"cannot be written ({error.strerror})"
            raise UserError(f"file {self.file}", why, "check the disk; --resume") from None
        new = {key: value for key, value in values.items() if (step, key) not in self.sent}
        self.send(step, lambda: scalars(new))

    def evaluation(self, step: int, split: str, result: dict) -> None:
        """Log the result of an evaluation; for wandb also its images and a table of the classes."""
        self.write(step, **{f"{split}/{k}": v for k, v in result.items()})
        if "per_class" in result and (step, f"{split}/per_class") not in self.sent:
            self.send(step, lambda: {f"{split}/predictions": self.wandb_images()})
            # Unlike all else, it asks the network, which may be away for a while.
            table = lambda: {f"{split}/per_class_table": self.table(result["per_class"])}
            self.send(step, table, "a table")
        self.images = []

    def send(self, step: int, build: Callable[[], dict], cost: str = "wandb") -> None:
        """Give wandb the values that `build` returns. An error costs the run wandb, or only
        `cost`.
        """
        if self.wandb is None:
            return
        try:
            if values := build():
                self.wandb.log(values, step=max(step, self.min_step, self.wandb.step))
        except Exception as error:
            print(
                f"wandb: {reason(error)}; going on without {cost}, metrics.jsonl has the numbers",
                flush=True,
            )
            if cost == "wandb":
                self.wandb = None

    def wandb_images(self) -> list:
        """The images as wandb's, with masks; of one size, or it would show them distorted."""
        import wandb

        names = self.data.names
        others = "ignored" if len(names) <= 255 else "ignored, others"
        labels = dict(enumerate([*names[:255], others]))
        height, width = np.max([maps.shape[1:] for _, maps in self.images], 0)
        images = []
        for name, maps in self.images:
            padding = [(0, height - maps.shape[1]), (0, width - maps.shape[2])]
            masks = {
                title: {
                    "mask_data": np.pad(mask, padding, constant_values=max(labels)),
                    "class_labels": labels,
                }
                for title, mask in zip(("ground_truth", "prediction"), maps[3:], strict=True)
            }
            pixels = np.pad(maps[:3].transpose(1, 2, 0), [*padding, (0, 0)])
            images.append(wandb.Image(pixels, caption=name, masks=masks))
        return images

    def table(self, classes: dict[str, dict]):
        """The metrics of each class; whether it is seen, where the data set has unseen ones."""
        import wandb

        unseen = self.data.unseen
        rows = [[name, name not in unseen, v["IoU"], v["Acc"]] for name, v in classes.items()]
        titles = ["class", "seen", "IoU", "Acc"]
        if not unseen:
            for row in (titles, *rows):
                del row[1]
        return wandb.Table(titles, rows)

    def on_image(
        self,
        number: int,
        name: str,
        image: Tensor,
        labels: Tensor,
        predicted: Tensor,
        matrix: Tensor,
    ) -> None:
        """Keep the first images of an evaluation for wandb, resized: uint8 [5, h, w], the image,
        ground truth and prediction.

        wandb's masks know the classes 0 to 254; 255, or the number of classes, stands for all other
        pixels.
        """
        if self.wandb is None or len(self.images) == MAX_IMAGES:
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
        """Give wandb its time to upload what is left; the rest stays in its folder."""
        self.send(0, lambda: self.wandb.finish())
        self.wandb = None


class Speed:
    """How fast a run is: images a second over all processes, how long it waits for data, the memory
    it has needed.

    Since the last `read`; evaluations do not count.
    """

    def __init__(self, process: Process, images: int, step: int):
        self.device = process.device
        self.images = images  # a step
        self.first_step = step
        self.step = step
        self.started = time.perf_counter()
        self.since = self.started
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
        values = {
            "speed/images_per_second": self.images * (step - self.step) / seconds,
            "speed/data_wait": 100 * self.waited / seconds,
            "speed/memory_gib": memory,
        }
        self.since = now
        self.waited = 0.0
        self.step = step
        return values

    def left(self, steps: int) -> float:
        """Seconds to go until `steps`, at the pace since the start, evaluations included."""
        pace = (time.perf_counter() - self.started) / (self.step - self.first_step)
        return pace * (steps - self.step)


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


def start_wandb(config: Config, folder: Path, run_id: str | None):
    """wandb's run: a new one or, by its id, the one that is resumed; offline where there is no
    login or no network.
    """
    for name, value in WANDB.items():
        os.environ.setdefault(name, value)
    disable = "set log.wandb=disabled"
    try:
        import wandb  # takes seconds, and most runs do without
    except ImportError:
        why = "wandb is not installed"
        raise UserError("log.wandb", why, f"pip install wandb, or {disable}") from None
    mode = config.log.wandb
    why = ""
    if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        mode = "offline"
        why = "no login (wandb login)"
    run = None
    while run is None:
        try:
            run = wandb.init(
                project=config.log.project,
                config=asdict(config),
                dir=str(folder),
                mode=mode,
                id=run_id,
                resume="allow",
            )
        except Exception as error:  # no network, no answer, an unknown login, ...
            if mode == "offline":
                raise UserError("log.wandb", reason(error), f"try again, or {disable}") from None
            mode = "offline"
            why = f"cannot go online ({reason(error)})"
    if why:
        folder = Path(run.dir).parent
        print(f"wandb: {why}, logging offline (later: wandb sync {folder})", flush=True)
    return run
