"""The log of a training run: metrics.jsonl, wandb where asked for, and how fast the run is."""

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
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

IMAGES = 8  # of an evaluation that wandb gets
SIDE = 512  # pixels of their longer side, at most
# Seconds that wandb may take to begin and to upload what is left at the end; its telemetry would
# wait for a dead network once
# more. The environment can say otherwise.
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
        self.data, self.wandb, self.run_id = dataset(config.data), None, run_id
        self.known, self.next, self.images = set(), 0, []
        if not process.is_main:
            return
        # A resumed run repeats the steps after its checkpoint, and the evaluation that was due
        # then: forget what was logged
        # about them, and a line that a kill cut short.
        lines = read_lines(self.file) if step else []
        with atomic_write(self.file) as file:
            file.write_text(
                "".join(json.dumps(line) + "\n" for line in lines if is_before(line, step))
            )
        if config.log.wandb != "disabled":
            # wandb forgets nothing: what it knows is not repeated, what it missed comes after the
            # last step
            if run_id:
                self.known = {(line["step"], key) for line in lines for key in line}
                self.next = max((line["step"] + 1 for line in lines), default=0)
            self.wandb = start_wandb(config, folder, run_id)
            self.run_id = self.wandb.id

    def write(self, step: int, **values: object) -> None:
        """Log values, nested ones too; nothing where a number is not finite, which JSON does not
        know.
        """
        if self.file is None or not all(math.isfinite(v) for v in scalars(values).values()):
            return
        try:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(
                f"file {self.file}",
                f"cannot be written ({error.strerror})",
                "check the disk; --resume",
            ) from None
        with self.may_fail():
            self.send(
                step, scalars({k: v for k, v in values.items() if (step, k) not in self.known})
            )

    def evaluation(self, step: int, split: str, result: dict) -> None:
        """Log the result of an evaluation; for wandb also the images that were looked at and a
        table of the classes.
        """
        self.write(step, **{f"{split}/{k}": v for k, v in result.items()})
        if (
            self.wandb is not None
            and "per_class" in result
            and (step, f"{split}/per_class") not in self.known
        ):
            with self.may_fail():
                self.send(step, {f"{split}/predictions": self.wandb_images()})
            # Unlike all else, it asks the network, which may be away for a while.
            with self.may_fail("a table"):
                self.send(step, {f"{split}/per_class_table": self.table(result["per_class"])})
        self.images = []

    def wandb_images(self) -> list:
        """The images as wandb's, with masks; of one size, or it would show them distorted."""
        import wandb

        names, size, images = (
            self.data.names,
            np.max([maps.shape[1:] for _, maps in self.images], 0),
            [],
        )
        labels = dict(enumerate(names[:255])) | {
            min(len(names), 255): "ignored" if len(names) <= 255 else "ignored, others"
        }
        for stem, maps in self.images:
            room = [(0, n) for n in size - maps.shape[1:]]
            masks = {
                name: {
                    "mask_data": np.pad(values, room, constant_values=max(labels)),
                    "class_labels": labels,
                }
                for name, values in zip(("ground_truth", "prediction"), maps[3:], strict=True)
            }
            images.append(
                wandb.Image(
                    np.pad(maps[:3], [(0, 0), *room]).transpose(1, 2, 0), caption=stem, masks=masks
                )
            )
        return images

    def table(self, classes: dict[str, dict]):
        import wandb

        unseen = self.data.unseen
        rows = [
            [name, *([name not in unseen] if unseen else []), v["IoU"], v["Acc"]]
            for name, v in classes.items()
        ]
        return wandb.Table(["class", *(["seen"] if unseen else []), "IoU", "Acc"], rows)

    def on_image(
        self,
        number: int,
        name: str,
        image: Tensor,
        labels: Tensor,
        predicted: Tensor,
        matrix: Tensor,
    ) -> None:
        """Keep the first images of an evaluation for wandb, small: uint8 [5, h, w], the image,
        truth and prediction.

        wandb's masks know the classes 0 to 254; 255, or the number of classes, stands for all other
        pixels.
        """
        if self.wandb is None or len(self.images) == IMAGES:
            return
        scale, last = min(1, SIDE / max(image.shape[1:])), min(len(self.data.names), 255)
        size = [max(round(n * scale), 1) for n in image.shape[1:]]
        maps = torch.stack([labels.where(labels != self.data.ignore, last), predicted]).clamp(
            max=last
        )
        small = [
            F.interpolate(image[None].float(), size, mode="area"),
            F.interpolate(maps[None].float(), size, mode="nearest"),
        ]
        self.images.append((name, torch.cat(small, 1)[0].byte().cpu().numpy()))

    def send(self, step: int, values: dict) -> None:
        if self.wandb is not None and values:
            # It drops what comes late.
            self.wandb.log(values, step=max(step, self.next, self.wandb.step))

    @contextlib.contextmanager
    def may_fail(self, cost: str = "wandb") -> Iterator[None]:
        """What raises in here costs the run wandb, or as little as `cost`."""
        try:
            yield
        except Exception as error:
            print(
                f"wandb: {reason(error)}; going on without {cost}, metrics.jsonl has the numbers",
                flush=True,
            )
            self.wandb = None if cost == "wandb" else self.wandb

    def finish(self) -> None:
        """Give wandb its time to upload what is left; what it does not manage stays in its
        folder.
        """
        if self.wandb is not None:
            with self.may_fail():
                self.wandb.finish()
            self.wandb = None


class Speed:
    """How fast a run is: images a second over all processes, how long it waits for data, the memory
    it has needed.

    Since the last `read`; evaluations do not count.
    """

    def __init__(self, process: Process, images: int, step: int):
        self.device, self.images, self.step, self.first = process.device, images, step, step
        self.since, self.waited, self.started = time.perf_counter(), 0.0, time.perf_counter()

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
        seconds, images = now - self.since, self.images * (step - self.step)
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device) / 2**30
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (
                30 if sys.platform == "darwin" else 20
            )
        values = {
            "images_per_second": images / seconds,
            "data_wait": 100 * self.waited / seconds,
            "memory_gib": memory,
        }
        self.since, self.waited, self.step = now, 0.0, step
        return {f"speed/{k}": v for k, v in values.items()}

    def left(self, steps: int) -> float:
        """Seconds to go until `steps`, at the pace since the start, evaluations included."""
        return (time.perf_counter() - self.started) / (self.step - self.first) * (steps - self.step)


def read_lines(file: Path) -> list[dict]:
    """The lines of a metrics.jsonl, without those that are none, as a kill may leave them."""
    lines = []
    for text in file.read_text("utf-8", "replace").splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and type(line.get("step")) is int:
                lines.append(line)
    return lines


def is_before(line: dict, step: int) -> bool:
    """Whether a line of metrics.jsonl tells of something that a run which goes on from `step` does
    not repeat.
    """
    return line["step"] < step or (line["step"] == step and ("loss" in line or "skipped" in line))


def scalars(values: dict, prefix: str = "") -> dict[str, float]:
    """The numbers among nested values as {"test/head_only/hIoU": 12.0}, but for tables of every
    class.
    """
    found = {}
    for key, value in values.items():
        if isinstance(value, dict) and not key.endswith("per_class"):
            found |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found[f"{prefix}{key}"] = value
    return found


def reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def start_wandb(config: Config, folder: Path, run_id: str | None):
    """wandb's run: a new one or, by its id, the one that is resumed; offline where there is no
    login or no network.
    """
    for name, value in WANDB.items():
        os.environ.setdefault(name, value)
    try:
        import wandb  # here: it takes seconds to import and most runs do without
    except ImportError:
        raise UserError(
            "log.wandb", "wandb is not installed", "pip install wandb, or set log.wandb=disabled"
        ) from None
    mode, why = config.log.wandb, ""
    start = lambda: wandb.init(
        project=config.log.project,
        config=asdict(config),
        dir=str(folder),
        mode=mode,
        id=run_id,
        resume="allow",
    )
    if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        mode, why = "offline", "no login (wandb login)"
    try:
        started = start()
    # a network that is not there, that does not answer, that does not know the login, ...
    except Exception as error:
        if mode != "online":
            raise UserError(
                "log.wandb", reason(error), "try again, or set log.wandb=disabled"
            ) from None
        mode, why = "offline", f"cannot go online ({reason(error)})"
        try:
            started = start()
        except Exception as error:
            raise UserError(
                "log.wandb", reason(error), "try again, or set log.wandb=disabled"
            ) from None
    if why:
        print(
            f"wandb: {why}, logging offline (later: wandb sync {Path(started.dir).parent})",
            flush=True,
        )
    return started
