"""Train a segmenter or a prompt, as a configuration file says.

    python train.py --config configs/shapes.toml
    torchrun --nproc-per-node=8 train.py --config configs/voc_r50_single.toml --out runs/voc
    torchrun --nproc-per-node=8 train.py --out runs/voc --resume

Writes last.pt (the one before it: previous.pt), best.pt, metrics.json, metrics.jsonl and
samples.png to --out (else runs/<name of the config>). --resume goes on from last.pt with the
configuration in it; on the CPU the weights come out the same bit for bit. SIGTERM, SIGUSR1, Ctrl-C
or a closed terminal (SIGHUP): a checkpoint at the end of the step, exit code 0.
"""

from pathlib import Path

from zsseg.config import load_config
from zsseg.utils import UserError, command, run_parser


def parse(argv):
    parser = run_parser(__doc__)
    parser.add_argument("--resume", action="store_true", help="continue OUT/last.pt")
    args = parser.parse_args(argv)
    if args.config and not args.resume:
        load_config(args.config, args.set)
    elif not (args.resume and (args.out or args.config)):
        parser.error("give --config, or --resume with the --out of a run")
    return args


if __name__ == "__main__":
    command(parse)  # --help and mistakes need not wait for these:

import gc
import math
import shlex
from dataclasses import asdict

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from zsseg import checkpoint
from zsseg.apps.vocabulary import Words, format_words
from zsseg.data import TestImages, TrainImages, batches, collate
from zsseg.datasets import MissingSplit, dataset, find_pairs, training_set
from zsseg.distributed import init_distributed
from zsseg.evaluate import evaluate
from zsseg.log import Log
from zsseg.losses import loss_normalizers, per_pixel_loss, segmentation_losses
from zsseg.prompt_learning import PromptTask
from zsseg.self_training import pseudo_labels
from zsseg.utils import claim_folder, git_commit, mix_seed, print_main
from zsseg.weights import build_segmenter, check_clip, clip_digest


class SegmentTask:
    """MaskFormer, or the one-stage baseline, on the seen classes of a data set, CLIP frozen."""

    def __init__(self, config, root, out, process, saved):
        self.config = config
        self.root = root
        self.process = process
        pseudo = out / "pseudo" if config.train.teacher else None
        if pseudo and not saved:
            pseudo_labels(config, root, pseudo, process)
            gc.collect()  # the teacher and its graphs
        self.segmenter = build_segmenter(config, root, saved).to(process.device)
        self.segmenter.set_classes(training_set(config.data).training_names)
        self.text = self.segmenter.text_features  # an evaluation sets other classes
        self.clip = self.segmenter.clip
        self.model = self.segmenter.maskformer
        self.clipped = [self.model]  # modules whose gradients are clipped, each by itself
        self.losses = segmentation_losses
        self.compiled = False
        # The first process caches the counts of labels.
        self.samples = process.main_first(lambda: TrainImages(config, root, pseudo))
        self.collate = collate

    def compile(self):
        self.compiled = True
        self.model.compile(fullgraph=True)
        self.losses = torch.compile(segmentation_losses, fullgraph=True)

    def normalizers(self, batches):
        """The divisors of the losses, as if the batches of a step were one."""
        model = self.config.model
        counts = [
            targets.counts if model.proposals else (targets.labels < len(self.text)).sum((1, 2))
            for _, targets in batches
        ]
        counts = self.process.put(torch.cat(counts))
        sizes = (counts, model.num_queries, self.config.train.no_object_weight)
        return loss_normalizers(*sizes, self.process.sum, self.process.world_size)

    def loss(self, model, batch, normalizers):
        """The share of a batch in the "loss" of a step, and its parts, of the last layer by name
        and of the others as `name/layer_i`. Nothing in here makes the host wait for a GPU.
        """
        images, targets = batch
        images = self.process.put(images)
        targets = targets.to(self.process.device)
        # The network only: costs and losses need fp32.
        with self.process.autocast(self.config.model.bf16, training=True):
            outputs = model(self.model.prepare(images), self.text)
        if not self.config.model.proposals:
            return {"loss": per_pixel_loss(outputs, targets.labels, normalizers[0])}
        if self.compiled:
            targets = targets.padded()
        losses = self.losses(*outputs, targets, normalizers, self.config.train)
        parts = {"loss": sum(values.sum() for values in losses.values())}
        for name, values in losses.items():
            *early, parts[name] = values
            for i, value in enumerate(early):
                parts[f"{name}/layer_{i}"] = value
        return parts

    def evaluate(self, split, out, on_image):
        where = (self.root, self.process, split, out)
        return evaluate(self.segmenter, self.config, *where, on_image=on_image)

    def score(self, result):
        """What best.pt is chosen by: hIoU or, if that is equal or was not measured, mIoU; []
        without any.
        """
        return [] if result["mIoU"] is None else [result.get("hIoU") or 0.0, result["mIoU"]]

    def state(self, result):
        return self.segmenter.learned_state()


def build_optimizer(model, config):
    """AdamW; no weight decay for norm layers and embeddings, a smaller learning rate for the
    backbone. SGD for prompts.
    """
    train = config.train
    groups = {}
    for prefix, module in model.named_modules():
        lr = train.lr * (train.backbone_lr if prefix.startswith("backbone") else 1)
        norm = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.Embedding))
        for name, parameter in module.named_parameters(recurse=False):
            # Swin's position biases, too, as its authors do.
            no_decay = norm or name == "relative_position_bias_table"
            key = (lr, 0.0 if no_decay else train.weight_decay)
            if parameter.requires_grad:
                groups.setdefault(key, []).append(parameter)
    options = [
        {"params": parameters, "lr": lr, "base": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]
    if train.task == "prompts":
        return torch.optim.SGD(options, momentum=config.prompts.momentum)
    return torch.optim.AdamW(options, fused=True)


def lr_factor(step, config):
    """What multiplies every learning rate: polynomial decay; for prompts a constant warm-up, then
    cosine decay.
    """
    progress = step / config.train.steps
    if config.train.task != "prompts":
        return (1 - progress) ** config.train.power
    if step < config.prompts.warmup_steps:
        return config.prompts.warmup_factor
    return (1 + math.cos(math.pi * progress)) / 2


def train_step(task, model, optimizer, batches, clip_grad):
    """One step, as of one large batch: the loss and its parts by name, the gradient norm and
    whether it was bad (1 or 0), left on the device.

    In a bad step the loss or the gradient of some process has NaN/Inf: nothing changes in any of
    them, whatever the optimizer is; for one that is not fused, the host waits for the device in
    every step. `clip_grad` 0: no limit.
    """
    layers = (m for m in task.model.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
    running = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]

    optimizer.zero_grad(set_to_none=True)
    normalizers = task.normalizers(batches)
    total = 0
    for batch in batches:
        parts = task.loss(model, batch, normalizers)
        parts["loss"].backward()
        total = total + torch.stack([*parts.values()]).detach()
    total = dict(zip(parts, total, strict=True))
    limit = clip_grad or math.inf
    norms = [nn.utils.clip_grad_norm_(part.parameters(), limit) for part in task.clipped]
    norm = torch.stack(norms).max()

    finite = total["loss"].isfinite() & norm.isfinite()
    bad = task.process.sum(1 - finite.float()).clamp(max=1)
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = bad  # PyTorch's own: where this is 1, a fused step changes nothing
        optimizer.step()
    elif not bad:
        optimizer.step()
    for buffer, old in running:
        buffer.copy_(torch.where(bad > 0, old, buffer))
    return total, norm, bad


class BadSteps:
    """Counts the steps with NaN/Inf in the loss, the matching cost or the gradient, which changed
    nothing, and names their images; UserError after too many in a row.
    """

    def __init__(self, samples, log, count):
        self.samples = samples
        self.log = log
        self.train = log.config.train
        self.count = count
        self.in_a_row = 0
        self.flags = []  # (step, whether it was bad), not waited for

    def read(self):
        """Whether the last step was bad; the host waits for the device."""
        size = self.train.batch_size * self.train.accumulate
        read = torch.stack([bad for _, bad in self.flags]).tolist() if self.flags else []
        for (step, _), bad in zip(self.flags, read, strict=True):
            if not bad:
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            self.count += 1
            names = [self.samples.source(n) for n in range(step * size, (step + 1) * size)]
            text = f"step {step + 1} was skipped, NaN/Inf in its loss or gradient"
            print_main(f"{text} ({self.count} so far): {', '.join(names)}")
            self.log.write(step + 1, skipped=self.count, images=names)
            if self.in_a_row >= self.train.max_bad_steps:
                why = f"NaN/Inf in {self.in_a_row} steps in a row, the last one step {step + 1}"
                raise UserError("training", why, "lower train.lr; --resume goes on")
        self.flags.clear()
        return self.in_a_row > 0


def validation_split(config, root):
    """The split val or, for a data set of one's own without it, the one that is measured."""
    try:
        find_pairs(config.data, root, "val")
    except MissingSplit:
        if config.data.name != "folder":
            raise
        split = config.data.split
        print_main(f"there is no split val: best.pt will be the best on data.split, {split}")
        return split
    return "val"


def train(config, root, out, process, saved):
    """Train as `config` says and evaluate, from the start or from `saved`, the content of a
    checkpoint. A signal stops it early, after a checkpoint.
    """
    settings = config.train
    steps = settings.steps
    start = saved.get("step", 0)
    best = saved.get("best", [])  # score
    size = settings.batch_size
    share, left = divmod(size, process.world_size)
    if left:
        why = f"{size} cannot be shared by {process.world_size} processes"
        raise UserError("train.batch_size", why, "change it")
    count = settings.accumulate  # batches of a step
    every = settings.eval_every or steps
    find_pairs(config.data, root, config.data.split)  # a missing one is noticed now
    validation = validation_split(config, root) if every < steps else ""
    process.broadcast(lambda: None if saved else claim_folder(out))

    # model and optimizer; compiled before DDP wraps it, in place: names in the state dict stay
    torch.manual_seed(mix_seed(settings.seed, 0))
    kind = SegmentTask if settings.task == "segment" else PromptTask
    task = kind(config, root, out, process, saved.get("model"))
    optimizer = build_optimizer(task.model, config)
    if saved:
        what = f"checkpoint {out / 'last.pt'}"
        check_clip(saved, task.clip, what)
        checkpoint.restore(optimizer, saved["optimizer"], what)
    clip = clip_digest(task.clip)  # which is frozen
    process.describe(config.model.bf16, training=True)
    if process.compiles(config.model.compile):
        task.compile()
    model = task.model.train()
    if process.world_size > 1:
        model = DistributedDataParallel(model)

    # data: the order of samples over all processes does not depend on their number
    numbers = range(start * count * size, steps * count * size)
    numbers = (n for n in numbers if n // share % process.world_size == process.rank)
    loader = batches(task.samples, numbers, share, config.data.workers, task.collate)

    log = Log(out, process, config, start, saved.get("wandb", ""))
    bad_steps = BadSteps(task.samples, log, saved.get("skipped", 0))
    chunked = zip(*[log.timed(loader)] * count, strict=True)
    # None: shown on a terminal
    bar = tqdm(chunked, settings.task, steps, initial=start, disable=not process.is_main or None)

    def save(name, step, result=None):
        """All that a run needs to go on: random numbers follow from (seed, step, rank), samples
        from their number.
        """
        if process.is_main:
            names = training_set(config.data).training_names
            content = {"trained": names, "clip": clip, "commit": git_commit(), "best": best}
            content |= {"step": step, "skipped": bad_steps.count, "wandb": log.run_id}
            content |= {"model": task.state(result), "optimizer": optimizer.state_dict()}
            previous = out / "previous.pt" if name == "last.pt" else None
            checkpoint.save(out / name, previous, config=asdict(config), **content)

    def measure(split, step, folder=None):
        process.broadcast_buffers(task.model)
        result = log.evaluation(step, split, lambda watch: task.evaluate(split, folder, watch))
        task.model.train()
        return result

    def is_due(step):
        """Whether an evaluation follows a step."""
        return step % every == 0 and 0 < step < steps

    due = False  # a checkpoint
    with checkpoint.graceful_stop(process) as asked_to_stop:
        for step, chunks in enumerate(bar, start):
            if is_due(step):  # a run that goes on from here repeats it
                result = measure(validation, step)
                if (score := task.score(result)) > best:
                    best = score
                    save("best.pt", step, result)

            torch.manual_seed(mix_seed(settings.seed, 4, step, process.rank))  # dropout
            factor = lr_factor(step, config)
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * factor

            # Nothing waits for the GPU but a step that is logged or saved.
            values, norm, bad = train_step(task, model, optimizer, chunks, settings.clip_grad)
            bad_steps.flags.append((step, bad))
            done = step + 1
            stopping = asked_to_stop()
            last = done == steps or stopping
            if done % config.log.every == 0 or done == steps:
                bad_steps.read()
                bar.set_postfix_str(log.step(done, values, norm, settings.lr * factor))
            # A checkpoint that is due in a bad step waits for a good one: the weights may be why.
            due = due or last or done % settings.checkpoint_every == 0 or is_due(done)
            if due and (not bad_steps.read() or last):
                save("last.pt", done)
                due = False
            if stopping:
                print_main(f"stopped as asked, after step {done} of {steps}; --resume goes on")
                return log.finish()

    result = measure(config.data.split, steps, out)
    if settings.task == "prompts":
        save("last.pt", steps, result)  # now that the best seed is known
    if not best:
        save("best.pt", steps, result)
    log.finish()
    two_stages = config.clip.ensemble and config.model.proposals
    if settings.task == "segment" and two_stages and not config.eval.views:
        print_commands(config, root, out / "last.pt")


def print_commands(config, root, file):
    """What to do with a trained segmenter: look for the classes of a test image in it, the page,
    the report.
    """
    images = TestImages(config.data, root, config.data.split)
    _, labels, _ = images[0]
    names = dataset(config.data).names
    shown = [names[k] for k in labels.unique() if k < len(names)]
    words = Words(shown if len(shown) > 1 else names)
    place = [] if str(root) == "datasets" else ["--root", root]
    print_main("now, for instance:")
    photo = ["--images", images.pairs[0][0], "--classes", format_words(words)]
    for options in (photo, ["--serve"], ["--report"]):
        line = ["python", "eval.py", file, *options, *place]
        print_main(f"    {shlex.join(map(str, line))}")


def main(argv):
    args = parse(argv)
    out = args.out or Path("runs") / args.config.stem
    process = init_distributed(args.device)
    saved = checkpoint.load_last(out, args.resume, process)
    config = load_config(None if saved else args.config, args.set, saved.get("config"))
    if saved:
        step = f"step {saved['step']} of {config.train.steps}"
        print_main(f"resuming {out} at {step}: weights and options are those in it, and --set")
    train(config, args.root, out, process, saved)


if __name__ == "__main__":
    command(main)
