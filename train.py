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
    load_run,
    restore,
    running_statistics,
)
from zsseg.files import hold, release, set_aside
from zsseg.log import Log, Speed
from zsseg.losses import loss_normalizers, per_pixel_loss, segmentation_losses
from zsseg.metrics import report
from zsseg.prompt_learning import Prompts
from zsseg.self_training import pseudo_labels
from zsseg.prepare.shapes_clip import Contrast
from zsseg.utils import UserError, format_time, git_commit, mix_seed, print_main


class Segment:
    """MaskFormer, or the one-stage baseline, on the seen classes of a data set, CLIP frozen."""

    def __init__(
        self, config: Config, root: Path, out: Path, process: Process, saved: dict | None = None
    ):
        self.config = config
        self.root = root
        self.process = process
        train = config.train
        # A missing split is noticed now, not at the end.
        find_pairs(config.data, root, config.data.split)
        if 0 < train.eval_every < train.steps and not has_split(config.data, root, "val"):
            why = f"needs a val split, and {config.data.name} has none"
            raise UserError("train.eval_every", why, "--set train.eval_every=0")

        pseudo = pseudo_labels(config, root, out / "pseudo", process) if train.teacher else None

        self.segmenter = build_segmenter(config, root, saved).to(process.device)
        self.segmenter.set_classes(training_set(config.data).training_names)
        self.text = self.segmenter.text_features
        self.model = self.segmenter.maskformer
        self.state = self.segmenter.learned_state
        self.load = self.segmenter.load_learned
        self.losses = segmentation_losses
        self.compiled = False

        # The first process caches label statistics.
        self.samples = process.main_process_first(lambda: TrainImages(config, root, pseudo))
        self.collate = collate
        self.batch_size = train.batch_size

    def compile(self) -> None:
        self.compiled = True
        self.model.compile(fullgraph=True)
        self.losses = torch.compile(segmentation_losses, fullgraph=True)

    def loss(self, model: nn.Module, batch: tuple) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts, of the last layer by name and of the others as `name/layer_i`.

        Nothing in here makes the host wait for a GPU.
        """
        images, targets = batch
        images = images.to(self.process.device, non_blocking=True)
        targets = targets.to(self.process.device)
        train = self.config.train
        # The network only: costs and losses need fp32.
        with self.process.autocast(self.config.model.bf16, training=True):
            outputs = model(self.model.prepare(images), self.text)
        if not self.config.model.proposals:
            loss = per_pixel_loss(outputs, targets.labels, self.samples.data.ignore)
            return loss, {"class": loss.detach()}

        class_logits, mask_logits = outputs
        normalizers = loss_normalizers(
            targets.counts, self.config.model.queries, train.no_object_weight, self.process
        )
        if self.compiled:
            targets = targets.padded()
        weights = (train.focal_weight, train.dice_weight, train.no_object_weight)
        losses = self.losses(class_logits, mask_logits, targets, normalizers, *weights)
        parts = {name: values[-1].detach() for name, values in losses.items()}
        for name, values in losses.items():
            for i, value in enumerate(values[:-1].detach()):
                parts[f"{name}/layer_{i}"] = value
        return sum(values.sum() for values in losses.values()), parts

    def evaluate(self, split: str, out: Path | None, on_image: Callable) -> dict:
        return evaluate(
            self.segmenter, self.config, self.root, self.process, split, out, on_image=on_image
        )

    def score(self, result: dict) -> list[float]:
        """What best.pt is chosen by: hIoU or, where that is equal or was not measured, mIoU."""
        return [-math.inf if result.get(k) is None else result[k] for k in ("hIoU", "mIoU")]

    def report(self, result: dict, out: Path) -> None:
        report(result, self.config, out)


TASKS = {"segment": Segment, "prompts": Prompts, "clip": Contrast}


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW; no weight decay for norm layers and embeddings, a smaller learning rate for the
    backbone. SGD for prompts.
    """
    train = config.train
    if train.task == "prompts":
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": parameters, "base": train.lr}]
        optimizer = torch.optim.SGD(
            groups, train.lr, config.prompts.momentum, weight_decay=train.weight_decay, fused=True
        )
        # Without this, a first step that is skipped would leave it as the memory was.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer

    groups: dict[tuple[float, float], list] = {}
    for prefix, module in model.named_modules():
        lr = train.lr * (train.backbone_lr if prefix.startswith("backbone") else 1)
        no_decay = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.Embedding))
        key = (lr, 0.0 if no_decay else train.weight_decay)
        for name, parameter in module.named_parameters(recurse=False):
            if name == "relative_position_bias_table":  # Swin's: no decay, as its authors do
                key = (lr, 0.0)
            if parameter.requires_grad:
                groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": lr, "base": lr, "weight_decay": decay}
            for (lr, decay), parameters in groups.items()
        ],
        fused=True,
    )


def lr_factor(step: int, config: Config) -> float:
    """What multiplies every learning rate: polynomial decay; for prompts a constant warm-up, then
    cosine decay.
    """
    progress = step / config.train.steps
    if config.train.task != "prompts":
        return (1 - progress) ** config.train.power
    warmup = config.prompts.warmup_factor if step < config.prompts.warmup_steps else 1.0
    return warmup * (1 + math.cos(math.pi * progress)) / 2


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

    In a bad step the loss or the gradient of some process has NaN/Inf: nothing changes in any of
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
        optimizer.found_inf = bad  # where this is 1, it changes nothing, and the host need not wait
        optimizer.step()
    elif not bad:
        optimizer.step()
    for buffer, old in zip(running, before, strict=True):
        buffer.copy_(torch.where(bad > 0, old, buffer))
    return loss.detach(), parts, norm, bad


def train(config: Config, root: Path, out: Path, process: Process, saved: dict) -> bool:
    """Train as `config` says and evaluate, from the start or from `saved`, the content of a
    checkpoint.

    False where a signal stopped it early, after a checkpoint.
    """
    Switch.on = config.model.kernels
    run = Run(config, root, out, process, saved)
    task = run.task
    start = saved.get("step", 0)
    steps = config.train.steps
    numbers = sample_numbers(start, steps, task.batch_size, process)
    share = task.batch_size // process.world_size
    workers = config.data.workers
    batches = stream(task.samples, numbers, share, workers, task.collate, BadFileLog(out))
    bar = tqdm(
        range(start, steps),
        config.train.task,
        initial=start,
        total=steps,
        disable=None if process.is_main else True,  # None: where there is no terminal
    )
    run.validate(start)
    due = False  # a checkpoint
    with GracefulStop(process) as stop:
        for step, batch in zip(bar, run.speed.timed(batches), strict=True):
            # Dropout: stateless, so resumable.
            torch.manual_seed(mix_seed(config.train.seed, 4, step, process.rank))
            for group in run.optimizer.param_groups:
                group["lr"] = group["base"] * lr_factor(step, config)

            # forward, losses, backward, update; nothing here waits for the GPU
            loss, parts, norm, bad = train_step(
                task, run.model, run.optimizer, batch, config.train.clip_grad
            )
            run.bad_steps.add(step, bad)
            done = step + 1
            stopping = stop.requested()
            last = done == steps or stopping

            # log; the host waits for the GPU
            if done % config.log.every == 0 or done == steps:
                run.bad_steps.read()
                run.log_step(done, loss, parts, norm, bar)

            # One that is due in a bad step waits for a good one: the weights may be the cause.
            due = due or last or done % config.train.checkpoint_every == 0
            if due and (not run.bad_steps.read() or last):
                run.save("last.pt", done)
                due = False
            if stopping and done < steps:
                print_main(f"stopped as asked, after step {done} of {steps}")
                run.log.finish()
                return False

            run.validate(done)
    run.finish()
    return True


def check_batch_size(task: Segment | Prompts | Contrast, config: Config, process: Process) -> None:
    """UserError for a batch that cannot be shared, or leaves batch norm a single value."""
    if task.batch_size % process.world_size:
        why = f"{task.batch_size} cannot be shared by {process.world_size} processes"
        raise UserError("train.batch_size", why, "change it")
    # The deepest feature map has one pixel.
    single = task.batch_size == process.world_size and config.data.crop <= 32
    if single and config.model.backbone == "small" and config.train.task == "segment":
        why = "leaves batch norm one value a channel to take the mean of"
        raise UserError("train.batch_size", why, "raise data.crop above 32, or train.batch_size")


class Run:
    """A training run: its task, model and optimizer; log, checkpoints and evaluations."""

    OUTPUTS = (
        "best.pt",
        "metrics.json",
        "metrics.jsonl",
        "samples.png",
        "broken.txt",
        "bad_batch.pt",
    )

    def __init__(self, config: Config, root: Path, out: Path, process: Process, saved: dict):
        self.config = config
        self.out = out
        self.process = process
        train = config.train
        torch.manual_seed(mix_seed(train.seed, 0))
        self.task = task = TASKS[train.task](config, root, out, process, saved.get("model"))
        check_batch_size(task, config, process)
        self.optimizer = build_optimizer(task.model, config)
        if saved:
            what = f"checkpoint {out / 'last.pt'}"
            task.load(saved["model"], what)
            restore(self.optimizer, saved["optimizer"], what)
        process.describe(config.model.bf16, training=True)

        # compiled before DDP wraps the model, and in place: names in the state dict stay the same
        self.model = task.model.train()
        if process.compiles(config.model.compile):
            task.compile()
        if process.world_size > 1:
            self.model = DistributedDataParallel(task.model)

        process.broadcast_object(lambda: hold(out))
        # What an earlier run has left that came to no checkpoint, or what is not ours.
        if process.is_main and not saved:
            set_aside(out, self.OUTPUTS)
        start = saved.get("step", 0)
        self.log = Log(out, process, config, start, saved.get("wandb"))
        self.speed = Speed(process, task.batch_size, start)
        skipped = saved.get("skipped", 0)
        file = out / "bad_batch.pt"
        self.bad_steps = BadSteps(task, file, self.log, process, train.bad_steps, skipped)
        self.best = saved.get("best", [-math.inf])

    def save(self, name: str, step: int) -> None:
        """All that a run needs to go on. Random numbers follow from (train.seed, step, rank),
        samples from their number.
        """
        if not self.process.is_main:
            return
        checkpoint.save(
            self.out / name,
            self.out / "previous.pt" if name == "last.pt" else None,
            config=asdict(self.config),
            step=step,
            best=self.best,
            wandb=self.log.run_id,
            commit=git_commit(),
            model=self.task.state(),
            optimizer=self.optimizer.state_dict(),
            skipped=self.bad_steps.count,
        )

    def log_step(
        self, done: int, loss: Tensor, parts: dict[str, Tensor], norm: Tensor, bar: tqdm
    ) -> None:
        """The numbers of the step that was the `done`th; here the host waits for the device."""
        steps = self.config.train.steps
        lr = self.config.train.lr
        means = torch.stack([loss, *parts.values()]).double()
        means = self.process.sum(means) / self.process.world_size
        values = dict(zip(["loss", *parts], means.tolist(), strict=True))
        values["grad_norm"] = float(norm)
        values["lr"] = lr * lr_factor(done - 1, self.config)
        for group in self.optimizer.param_groups:
            if group["base"] != lr:
                values["lr_backbone"] = group["lr"]
        values |= self.speed.read(done)
        self.log.write(done, **values)

        text = f"loss {values['loss']:.3f}, {values['speed/images_per_second']:.1f} images/s"
        bar.set_postfix_str(text)
        if not bar.disable or not self.process.is_main:
            return
        if done % (10 * self.config.log.every) == 0 or done == steps:
            left = format_time(self.speed.left(steps))
            print(f"{self.config.train.task} step {done}/{steps} {text}, {left} left", flush=True)

    def evaluate(self, split: str, step: int, out: Path | None = None) -> dict | None:
        """The result, logged; None for a task that is not evaluated."""
        self.process.broadcast_buffers(self.task.model)
        try:
            with self.speed.paused():
                result = self.task.evaluate(split, out, self.log.on_image)
        except UserError as error:  # a broken image, say
            self.save("last.pt", step)
            what, why, todo = error.args
            todo += f"; the weights are in {self.out / 'last.pt'}, --resume goes on"
            raise UserError(what, why, todo) from None
        if result:
            self.log.evaluation(step, split, result)
        self.task.model.train()
        return result

    def validate(self, step: int) -> None:
        """The evaluation during training that is due after a step; a run that goes on from that
        step repeats it.
        """
        every = self.config.train.eval_every
        if not every or step % every or not 0 < step < self.config.train.steps:
            return
        result = self.evaluate("val", step)
        score = self.task.score(result) if result else [-math.inf]
        if score > self.best and max(score) > -math.inf:
            self.best = score
            self.save("best.pt", step)

    def finish(self) -> None:
        """The evaluation at the end."""
        steps = self.config.train.steps
        result = self.evaluate(self.config.data.split, steps, self.out)
        if result:
            if self.config.train.task == "prompts":
                self.save("last.pt", steps)  # now that the best seed is known
            if self.best == [-math.inf]:
                self.save("best.pt", steps)
            if self.process.is_main:
                self.task.report(result, self.out)
        self.log.finish()


def main(argv: list[str]) -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--resume", action="store_true", help="continue OUT/last.pt")
    args = parser.parse_args(argv)
    if not args.config and not (args.resume and args.out):
        parser.error("give --config, or --resume with the --out of a run")
    out = args.out or Path("runs") / args.config.stem
    process = init_distributed(args.device)
    saved = load_run(out, args.resume, process)
    config = load_config(None if saved else args.config, args.set, saved.get("config"))
    if saved:
        print_resumed(out, saved, config, args.set)
    try:
        finished = train(config, args.root, out, process, saved)
    finally:
        release(out)
    if not finished:
        print_main("--resume goes on")


def print_resumed(out: Path, saved: dict, config: Config, settings: list[str]) -> None:
    print_main(
        f"resuming {out} at step {saved['step']} of {config.train.steps}, with the configuration "
        f"in it and --set"
    )
    for key in ("train.init", "model.weights", "clip.prompts"):
        if any(setting.replace(" ", "").startswith(f"{key}=") for setting in settings):
            print_main(f"{key} is not read again: the weights are those of {out / 'last.pt'}")
    before = saved.get("commit") or "unknown"
    now = git_commit() or "unknown"
    if before != now:
        print_main(f"the program has changed since: {before} -> {now}")


if __name__ == "__main__":
    command_line.command(main)
