"""The log of a training run: metrics.jsonl, wandb on request, and how fast the run is."""

import contextlib
import json
import math
import os
import sys
import time
from dataclasses import asdict

import torch
import torch.nn.functional as F

from zsseg.datasets import dataset
from zsseg.utils import LINE_EVERY, UserError, atomic_write, format_time, print_main

MAX_IMAGES = 8  # of an evaluation that wandb gets
# Seconds that wandb may take to begin and to upload the rest; the environment may say otherwise.
WANDB = {"WANDB_INIT_TIMEOUT": "20", "WANDB_FINISH_TIMEOUT": "20", "WANDB_ERROR_REPORTING": "false"}


class Log:
    """The record of a run: one JSON object a line in `metrics.jsonl`, the same numbers in wandb
    (rank 0 only), and a line now and then. Whatever becomes of wandb, the run goes on.
    """

    def __init__(self, folder, process, config, step=0, run_id=""):
        self.process = process
        self.config = config
        self.file = folder / "metrics.jsonl"
        self.images = []  # of an evaluation, as wandb's
        self.run = None
        self.run_id = run_id
        self.done = step
        self.since = time.perf_counter()  # of the last logged step, evaluations left out
        self.waited = 0.0  # for data since then
        self.printed = self.since
        if not process.is_main:
            return
        mode = wandb_mode(config.log.wandb)
        if mode != "disabled":
            self.run = start_wandb(config, folder, run_id, mode)
            self.run_id = self.run.id
        # A resumed run repeats the steps after its checkpoint, and the evaluation due then.
        with atomic_write(self.file) as temporary, open(temporary, "w") as file:
            for line in read_lines(self.file) if step else ():
                is_step = "loss" in line or "skipped" in line
                if line["step"] < step + is_step:
                    file.write(json.dumps(line) + "\n")

    def timed(self, batches):
        """The batches; the time that each takes to come counts as waiting."""
        asked = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def step(self, done, values, norm, lr):
        """Log the numbers of the step that was the `done`th, means over the processes; here the
        host waits for the device. What a progress bar shows of them.
        """
        train = self.config.train
        means = torch.stack([*values.values()]).double()
        means = self.process.sum(means) / self.process.world_size
        values = dict(zip(values, means.tolist(), strict=True))
        now = time.perf_counter()
        seconds = now - self.since
        pace = seconds / (done - self.done)
        speed = train.batch_size * train.accumulate / pace
        values |= {"grad_norm": float(norm), "lr": lr, "speed/images_per_second": speed}
        values["speed/data_wait"] = 100 * self.waited / seconds
        if self.process.device.type == "cuda":
            values["speed/memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.since = now
        self.waited = 0.0
        self.done = done
        self.write(done, **values)
        text = f"loss {values['loss']:.3f}, {speed:.1f} images/s"
        due = now - self.printed > LINE_EVERY or done == train.steps
        if due and not sys.stderr.isatty():
            self.printed = now
            left = f"{format_time(pace * (train.steps - done))} left"
            print_main(f"{train.task} step {done}/{train.steps} {text}, {left}")
        return text

    def write(self, step, **values):
        """Log values, nested ones too; nothing with NaN/Inf, which JSON does not know."""
        line = {"step": step, **values}
        numbers = scalars(line)
        if not self.process.is_main or not all(map(math.isfinite, numbers.values())):
            return
        try:
            with open(self.file, "a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            why = f"cannot be written ({error.strerror})"
            raise UserError(f"file {self.file}", why, "check the disk; --resume") from None
        self.send(lambda: self.run.log(numbers))

    def send(self, action):
        """wandb's errors end wandb, not the run."""
        try:
            if self.run:
                action()
        except Exception as error:
            print_main(f"wandb: {first_line(error)}; going on without it")
            self.run = None

    def evaluation(self, step, split, evaluate):
        """The result of `evaluate(on_image)`, logged; wandb gets its first images, too."""
        began = time.perf_counter()
        result = evaluate(self.on_image)
        self.since += time.perf_counter() - began
        self.write(step, **{f"{split}/{key}": value for key, value in result.items()})
        self.send(lambda: self.run.log({"step": step, f"{split}/predictions": self.images}))
        self.images = []
        return result

    def on_image(self, number, name, image, labels, predicted, matrix):
        """Collect the first images of an evaluation for wandb, at network-input size; its masks
        know the classes 0 to 254, 255 is all else.
        """
        if self.run and len(self.images) < MAX_IMAGES:
            import wandb

            classes = dict(enumerate(dataset(self.config.data).names[:255])) | {255: "ignored"}
            maps = torch.stack([labels, predicted])[None].clamp(max=255).float()
            maps = F.interpolate(maps, image.shape[1:], mode="nearest")[0].byte().cpu().numpy()
            pairs = zip(("ground_truth", "prediction"), maps, strict=True)
            masks = {kind: {"mask_data": ids, "class_labels": classes} for kind, ids in pairs}
            pixels = image.permute(1, 2, 0).cpu().numpy()
            self.send(lambda: self.images.append(wandb.Image(pixels, caption=name, masks=masks)))

    def finish(self):
        """Give wandb its time to upload the rest; what is left stays in its folder."""
        self.send(lambda: self.run.finish())


def read_lines(file):
    """The complete lines of a metrics.jsonl: after a kill the last one may not be."""
    lines = []
    for text in file.read_text("utf-8", "replace").splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and type(line.get("step")) is int:
                lines.append(line)
    return lines


def scalars(values, prefix=""):
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


def first_line(error):
    return (str(error) or type(error).__name__).partition("\n")[0]


def wandb_mode(wanted):
    """`log.wandb`, or what wandb's environment says, if that is less."""
    said = os.environ.get("WANDB_MODE")
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return "disabled"
    modes = ("disabled", "dryrun", "offline")  # dryrun: another name of offline
    return next((mode for mode in modes if mode in (wanted, said)), "online")


def start_wandb(config, folder, run_id, mode):
    """wandb's run: a new one or, by its id, the one that is resumed; offline without a login or a
    network. wandb's environment decides on the project, the folder and how to resume.
    """
    os.environ.update(WANDB | os.environ)
    disable = "set log.wandb=disabled"
    try:
        import wandb  # takes seconds, and most runs do without
    except ImportError:
        raise UserError("log.wandb", "wandb is not installed", disable) from None
    options = {"project": config.log.project, "dir": str(folder), "resume": "allow"}
    options = {k: v for k, v in options.items() if f"WANDB_{k.upper()}" not in os.environ}
    options |= {"config": asdict(config), "id": run_id or None}
    if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        print_main("wandb: no login (wandb login), logging offline")
        mode = "offline"
    try:
        run = wandb.init(mode=mode, **options)
    except Exception as error:  # no network, no answer, an unknown login, ...
        if mode != "online":
            raise UserError("log.wandb", first_line(error), f"try again, or {disable}") from None
        print_main(f"wandb: {first_line(error)}; logging offline (later: wandb sync)")
        return start_wandb(config, folder, run_id, "offline")
    run.define_metric("*", step_metric="step")
    return run
