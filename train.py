"""Train a segmenter, a prompt, or the small CLIP of the synthetic data set, as a configuration file
says.

    python train.py --config configs/shapes.toml
    torchrun --nproc-per-node=8 train.py --config configs/voc_r50_single.toml --out runs/voc
    torchrun --nproc-per-node=8 train.py --out runs/voc --resume

Writes last.pt (the one before it: previous.pt), best.pt, metrics.json, metrics.jsonl and
samples.png to --out (else runs/<name of the config>). --resume goes on from last.pt with the
configuration in it; on the CPU the weights come out the same bit for bit. SIGTERM, SIGUSR1, Ctrl-C
or a closed terminal (SIGHUP): a checkpoint at the end of the step, exit code 0.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from kernels.jit import Switch
from zsseg import checkpoint, command_line
from zsseg.build import build_segmenter
from zsseg.config import Config, load_config
from zsseg.data import TrainImages, collate, stream
from zsseg.datasets import find_pairs, has_split, training_set
from zsseg.distributed import Process, init_distributed
from zsseg.evaluate import evaluate
from zsseg.faults import (
    BadFileLog,
    BadSteps,
    GracefulStop,
    is_fused,
    is_run,
    load_last,
    restore,
    running_statistics,
)
from zsseg.files import hold, release, set_aside
from zsseg.log import Log, Speed
from zsseg.losses import loss_normalizers, per_pixel_loss, segmentation_losses
from zsseg.metrics import report
from zsseg.prompt_learning import Prompts
from zsseg.selftrain import pseudo_labels
from zsseg.shapes_clip import Contrast
from zsseg.utils import UserError, format_time, git_commit, mix_seed, print_main


class Segment:
    """MaskFormer, or the one-stage baseline, on the seen classes of a data set, CLIP frozen."""

    def __init__(
        self, config: Config, root: Path, out: Path, process: Process, saved: dict | None = None
    ):
        self.config, self.root, self.process = config, root, process
        # A missing split is noticed now, not at the end.
        find_pairs(config.data, root, config.data.split)
        if 0 < config.train.eval_every < config.train.steps and not has_split(
            config.data, root, "val"
        ):
            todo = "--set train.eval_every=0"
            raise UserError(
                "train.eval_every", f"needs a val split, and {config.data.name} has none", todo
            )
        pseudo = (
            pseudo_labels(config, root, out / "pseudo", process) if config.train.teacher else None
        )
        self.segmenter = build_segmenter(config, root, saved).to(process.device)
        self.segmenter.set_classes(training_set(config.data).training_names)
        self.text = self.segmenter.text_features
        self.model, self.state, self.load = (
            self.segmenter.maskformer,
            self.segmenter.learned_state,
            self.segmenter.load_learned,
        )
        # The first caches label statistics.
        self.samples = process.main_process_first(lambda: TrainImages(config, root, pseudo))
        self.collate, self.batch_size = collate, config.train.batch_size
        self.losses, self.compiled = segmentation_losses, False

    def compile(self) -> None:
        self.compiled = True
        self.model.compile(fullgraph=True)
        self.losses = torch.compile(segmentation_losses, fullgraph=True)

    def loss(self, model: nn.Module, batch: tuple) -> tuple[Tensor, dict[str, Tensor]]:
        """Nothing in here makes the host wait for a GPU."""
        images, targets = batch
        device, train = self.process.device, self.config.train
        images, targets = images.to(device, non_blocking=True), targets.to(device)
        weights = (train.focal_weight, train.dice_weight, train.no_object_weight)
        if not self.config.model.proposals:
            with self.process.autocast(self.config.model.bf16, training=True):
                logits = model(self.model.prepare(images), self.text)
            loss = per_pixel_loss(logits, targets.labels, self.samples.data.ignore)
            return loss, {"class": loss.detach()}
        normalizers = loss_normalizers(
            targets.counts, self.config.model.queries, train.no_object_weight, self.process
        )
        # The network only: costs and losses need fp32.
        with self.process.autocast(self.config.model.bf16, training=True):
            logits, masks = model(self.model.prepare(images), self.text)
        losses = self.losses(
            logits, masks, targets.padded() if self.compiled else targets, normalizers, *weights
        )
        layers = {
            f"{k}/layer_{i}": v.detach()[i] for k, v in losses.items() for i in range(len(v) - 1)
        }
        return sum(v.sum() for v in losses.values()), {
            k: v[-1].detach() for k, v in losses.items()
        } | layers

    def evaluate(self, split: str, out: Path | None, on_image: Callable) -> dict:
        return evaluate(
            self.segmenter, self.config, self.root, self.process, split, out, on_image=on_image
        )

    def score(self, result: dict) -> list[float]:
        """What best.pt is chosen by: hIoU or, where that is equal or was not measured, mIoU."""
        return [-math.inf if result.get(k) is None else result[k] for k in ("hIoU", "mIoU")]

    def report(self, result: dict, out: Path) -> None:
        report(result, self.config, out)


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW; no weight decay for norm layers and embeddings, a smaller rate for the backbone. SGD
    for prompts.
    """
    train = config.train
    if train.task == "prompts":
        groups = [{"params": [p for p in model.parameters() if p.requires_grad], "base": train.lr}]
        optimizer = torch.optim.SGD(
            groups, train.lr, config.prompts.momentum, weight_decay=train.weight_decay, fused=True
        )
        # Without this, a first step that is skipped would leave it as the memory was.
        for parameter in groups[0]["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    groups: dict[tuple, list] = {}
    for prefix, module in model.named_modules():
        plain = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.Embedding))
        for name, parameter in module.named_parameters(recurse=False):
            table = name == "relative_position_bias_table"  # Swin's: no decay, as its authors do
            if parameter.requires_grad:
                rate = train.lr * (train.backbone_lr if prefix.startswith("backbone") else 1)
                groups.setdefault((rate, 0.0 if plain or table else train.weight_decay), []).append(
                    parameter
                )
    groups = [
        {"params": p, "lr": rate, "base": rate, "weight_decay": decay}
        for (rate, decay), p in groups.items()
    ]
    return torch.optim.AdamW(groups, fused=True)


def lr_factor(step: int, config: Config) -> float:
    """What multiplies every learning rate: polynomial decay; for prompts a constant warm-up, then
    cosine decay.
    """
    done = step / config.train.steps
    if config.train.task != "prompts":
        return (1 - done) ** config.train.power
    warm = config.prompts.warmup_factor if step < config.prompts.warmup_steps else 1.0
    return warm * (1 + math.cos(math.pi * done)) / 2


def set_learning_rates(optimizer: torch.optim.Optimizer, config: Config, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * lr_factor(step, config)


def sample_numbers(start: int, steps: int, batch: int, process: Process) -> Iterator[int]:
    """The sample numbers of this process from step `start` on: the global order does not depend on
    the world size.
    """
    share = batch // process.world_size
    for step in range(start, steps):
        first = step * batch + process.rank * share
        yield from range(first, first + share)


def train_step(
    task: Segment | Prompts | Contrast,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: object,
    clip_grad: float,
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """One step; the loss, its parts, the gradient norm and whether it was bad (1 or 0), left on the
    device.

    In a bad step the loss or the gradient of some process is not finite: nothing changes in any of
    them, whatever the optimizer is; for one that is not fused, the host waits for the device in
    every step. `clip_grad` 0: no limit.
    """
    running = running_statistics(task.model)
    before = [buffer.clone() for buffer in running]
    loss, parts = task.loss(model, batch)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_grad or math.inf)
    finite = loss.detach().isfinite() & norm.isfinite()
    bad = task.process.sum(1 - finite.float()).clamp(max=1)
    if is_fused(optimizer):
        optimizer.found_inf = (
            bad  # it leaves everything as it is where this is 1, and the host need not wait
        )
        optimizer.step()
    elif not bad:
        optimizer.step()
    for buffer, old in zip(running, before, strict=True):
        buffer.copy_(torch.where(bad > 0, old, buffer))
    return loss.detach(), parts, norm, bad


def main(argv: list[str]) -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--resume", action="store_true", help="continue OUT/last.pt")
    args = parser.parse_args(argv)
    if not args.config and not (args.resume and args.out):
        parser.error("--config is missing" + ", or --out of the run" * args.resume)
    out, process = args.out or Path("runs") / args.config.stem, init_distributed(args.device)
    there = any((out / name).exists() for name in ("last.pt", "previous.pt"))
    # By torchrun --max-restarts.
    again = process.any(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0)
    if args.resume and not there:
        raise UserError(f"output {out}", "holds no run", "leave --resume out to start one")
    saved = load_last(out) if args.resume or (again and there) else {}
    if not saved and there:
        raise UserError(
            f"output {out}", "holds a run already", "add --resume, or give another --out"
        )
    if saved and not is_run(saved):
        raise UserError(
            f"checkpoint {out / 'last.pt'}", "is not one of a training run", "give another --out"
        )
    if process.any(saved.get("step", 0) != process.from_main(saved.get("step", 0))):
        why = "the processes found checkpoints of different steps"
        raise UserError(f"output {out}", why, "put it where all machines see the same files")
    config = load_config(None if saved else args.config, args.set, saved.get("config"))
    if saved:
        print_main(
            f"resuming {out} at step {saved['step']} of {config.train.steps}, with the "
            f"configuration in it and --set"
        )
        for key in ("train.init", "model.weights", "clip.prompts"):
            if any(item.replace(" ", "").startswith(f"{key}=") for item in args.set):
                print_main(f"{key} is not read again: the weights are those of {out / 'last.pt'}")
        if saved.get("commit") != git_commit():
            print_main(
                f"the program has changed since: {saved.get('commit') or 'unknown'} -> "
                f"{git_commit() or 'unknown'}"
            )
    try:
        finished = train(config, args.root, out, process, saved)
    finally:
        release(out)
    if not finished:
        print_main("--resume goes on")


def train(config: Config, root: Path, out: Path, process: Process, saved: dict) -> bool:
    """Train as `config` says and evaluate, from the start or from `saved`, the content of a
    checkpoint.

    False where a signal stopped it on the way, after a checkpoint.
    """
    Switch.on = config.model.kernels
    task, optimizer, model = set_up(config, root, out, process, saved)
    start, steps = saved.get("step", 0), config.train.steps
    training = Training(task, optimizer, config, out, process, saved)
    training.validate(start)
    numbers = sample_numbers(start, steps, task.batch_size, process)
    batches = stream(
        task.samples,
        numbers,
        task.batch_size // process.world_size,
        config.data.workers,
        task.collate,
        BadFileLog(out),
    )
    bar = tqdm(
        range(start, steps),
        config.train.task,
        initial=start,
        total=steps,
        disable=None if process.is_main else True,
    )
    due = False  # a checkpoint
    with GracefulStop(process) as stop:
        for step, batch in zip(bar, training.speed.timed(batches), strict=True):
            # Dropout: stateless, so resumable.
            torch.manual_seed(mix_seed(config.train.seed, 4, step, process.rank))
            set_learning_rates(optimizer, config, step)

            # Forward, losses, backward, update.
            loss, parts, norm, bad = train_step(
                task, model, optimizer, batch, config.train.clip_grad
            )
            training.bad_steps.add(step, bad)
            done, stopping = step + 1, stop.now()

            if done % config.log.every == 0 or done == steps:
                training.log_step(done, loss, parts, norm, bar)

            # A checkpoint that is due in a bad step waits for a good one: the weights may be the
            # cause.
            due = due or done % config.train.checkpoint_every == 0
            last = done == steps or stopping
            if (due or last) and (not training.bad_steps.read() or last):
                training.save("last.pt", done)
                due = False
            if stopping and done < steps:
                print_main(f"stopped as asked, after step {done} of {steps}")
                training.log.finish()
                return False

            training.validate(done)
    training.finish()
    return True


def set_up(config: Config, root: Path, out: Path, process: Process, saved: dict) -> tuple:
    """The task, its optimizer, and the model as it is called: compiled, wrapped in DDP."""
    torch.manual_seed(mix_seed(config.train.seed, 0))
    task = TASKS[config.train.task](config, root, out, process, saved.get("model"))
    check_batch_size(task, config, process)
    optimizer = build_optimizer(task.model, config)
    if saved:
        task.load(saved["model"], f"checkpoint {out / 'last.pt'}")
        restore(optimizer, saved["optimizer"], f"checkpoint {out / 'last.pt'}")
    process.describe(config.model.bf16, training=True)

    task.model.train()
    if process.compiles(config.model.compile):
        # before DDP wraps the model, and in place: names in the state dict stay as they are
        task.compile()
    model = DistributedDataParallel(task.model) if process.world_size > 1 else task.model
    return task, optimizer, model


TASKS = {"segment": Segment, "prompts": Prompts, "clip": Contrast}


class Training:
    """What goes on around the steps of a training: log, checkpoints, evaluations."""

    def __init__(
        self,
        task: Segment | Prompts | Contrast,
        optimizer: torch.optim.Optimizer,
        config: Config,
        out: Path,
        process: Process,
        saved: dict,
    ):
        self.task, self.optimizer, self.config, self.out, self.process = (
            task,
            optimizer,
            config,
            out,
            process,
        )
        process.broadcast_object(lambda: hold(out))
        # What an earlier run has left that came to no checkpoint, or what is not ours.
        if process.is_main and not saved:
            set_aside(
                out,
                (
                    "best.pt",
                    "metrics.json",
                    "metrics.jsonl",
                    "samples.png",
                    "broken.txt",
                    "bad_batch.pt",
                ),
            )
        start = saved.get("step", 0)
        self.log = Log(out, process, config, start, saved.get("wandb"))
        self.speed = Speed(process, task.batch_size, start)
        self.bad_steps = BadSteps(
            task, out, self.log, process, config.train.bad_steps, saved.get("skipped", 0)
        )
        self.best = saved.get("best", [-math.inf])

    def save(self, name: str, step: int) -> None:
        """All that a run needs to go on. Random numbers follow from (train.seed, step, rank),
        samples from their number.
        """
        if not self.process.is_main:
            return
        states = {
            "model": self.task.state(),
            "optimizer": self.optimizer.state_dict(),
            "skipped": self.bad_steps.count,
        }
        previous = self.out / "previous.pt" if name == "last.pt" else None
        checkpoint.save(
            self.out / name,
            previous,
            config=asdict(self.config),
            step=step,
            best=self.best,
            wandb=self.log.run_id,
            commit=git_commit(),
            **states,
        )

    def log_step(
        self, done: int, loss: Tensor, parts: dict[str, Tensor], norm: Tensor, bar: tqdm
    ) -> None:
        """The numbers of the step that was the `done`th; here the host waits for the device."""
        config, process = self.config, self.process
        means = process.sum(torch.stack([loss, *parts.values()]).double()) / process.world_size
        values = dict(zip(["loss", *parts], means.tolist(), strict=True))
        others = [
            group["lr"] for group in self.optimizer.param_groups if group["base"] != config.train.lr
        ]
        values |= {"grad_norm": float(norm), "lr": config.train.lr * lr_factor(done - 1, config)}
        values |= ({"lr_backbone": others[0]} if others else {}) | self.speed.read(done)
        self.log.write(done, **values)

        text = f"loss {values['loss']:.3f}, {values['speed/images_per_second']:.1f} images/s"
        bar.set_postfix_str(text)
        steps = config.train.steps
        if (
            process.is_main
            and bar.disable
            and (done % (10 * config.log.every) == 0 or done == steps)
        ):
            print(
                f"{config.train.task} step {done}/{steps} {text}, "
                f"{format_time(self.speed.left(steps))} left",
                flush=True,
            )

    def validate(self, step: int) -> None:
        """The evaluation during training that is due after a step; a run that goes on from that
        step repeats it.
        """
        every, steps = self.config.train.eval_every, self.config.train.steps
        if not every or step % every or not 0 < step < steps:
            return
        self.process.broadcast_buffers(self.task.model)
        with self.speed.paused():
            try:
                result = self.task.evaluate("val", None, self.log.on_image)
            except UserError as error:  # a broken image, say
                self.save("last.pt", step)
                what, why, todo = error.args
                raise UserError(
                    what,
                    why,
                    f"{todo}; the weights are in {self.out / 'last.pt'}, --resume goes on",
                ) from None
        if result:
            self.log.evaluation(step, "val", result)
            score = self.task.score(result)
            if score > self.best and max(score) > -math.inf:
                self.best = score
                self.save("best.pt", step)
        self.task.model.train()

    def finish(self) -> None:
        """The evaluation at the end."""
        split, steps = self.config.data.split, self.config.train.steps
        self.process.broadcast_buffers(self.task.model)
        try:
            result = self.task.evaluate(split, self.out, self.log.on_image)
        except UserError as error:
            what, why, todo = error.args
            raise UserError(
                what, why, f"{todo}; the weights are in {self.out / 'last.pt'}, for eval.py"
            ) from None
        if result:
            self.log.evaluation(steps, split, result)
            if self.config.train.task == "prompts":
                self.save("last.pt", steps)  # now that the best seed is known
            if self.best == [-math.inf]:
                self.save("best.pt", steps)
            if self.process.is_main:
                self.task.report(result, self.out)
        self.log.finish()


def check_batch_size(task: Segment | Prompts | Contrast, config: Config, process: Process) -> None:
    """UserError for a batch that cannot be shared, or leaves batch norm a single value."""
    if task.batch_size % process.world_size:
        raise UserError(
            "train.batch_size",
            f"{task.batch_size} cannot be shared by {process.world_size} processes",
            "change it",
        )
    # A deepest map of one pixel.
    single = task.batch_size == process.world_size and config.data.crop <= 32
    if single and config.model.backbone == "small" and config.train.task == "segment":
        todo = "raise data.crop above 32, or train.batch_size"
        raise UserError(
            "train.batch_size", "leaves batch norm one value a channel to take the mean of", todo
        )


if __name__ == "__main__":
    command_line.command(main)
