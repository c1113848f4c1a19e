"""What must not waste a run: broken checkpoints, a signal to stop, steps whose numbers went wrong,
broken images.
"""

import contextlib
import os
import signal
from collections import deque
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

from zsseg import checkpoint
from zsseg.data import SafeDataset
from zsseg.distributed import Process
from zsseg.files import decode, split_lines
from zsseg.log import Log
from zsseg.utils import SIGNALS, UserError, left_out, print_main

# steps after which a step's flag is read: the device has long passed it, so that the host need not
# wait
FLAG_DELAY = 2


def is_run(content: dict) -> bool:
    """Whether a checkpoint holds what a training run goes on from, of the right kinds."""
    kinds = {"config": dict, "optimizer": dict, "step": int, "skipped": int, "best": list}
    return (
        all(type(({"skipped": 0} | content).get(k)) is kind for k, kind in kinds.items())
        and content["step"] >= 0
    )


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is one of PyTorch's fused ones, which read `found_inf` and trust the
    shapes of their state.
    """
    return all(group.get("fused") for group in optimizer.param_groups)


def restore(optimizer: torch.optim.Optimizer, state: dict, what: str) -> None:
    """Load an optimizer's state; base rates, weight decay and the like stay as the configuration
    says.

    Raises UserError where it does not fit the parameters: the fused optimizers would read and write
    beyond them.
    """
    ours = [
        {k: v for k, v in group.items() if k not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    try:
        optimizer.load_state_dict(state)
        for group, kept in zip(optimizer.param_groups, ours, strict=True):
            group.update(kept)
            for parameter in group["params"] if is_fused(optimizer) else ():
                for name, tensor in optimizer.state.get(parameter, {}).items():
                    shape = () if name == "step" else parameter.shape
                    if (
                        tensor.shape != shape
                        or tensor.dtype != parameter.dtype
                        or not tensor.is_contiguous()
                    ):
                        raise ValueError(
                            f"{name} has shape {tuple(tensor.shape)}, not {tuple(shape)}"
                        )
        names = (
            {frozenset(entry) for entry in optimizer.state.values()}
            if is_fused(optimizer)
            else set()
        )
        if (
            names - {frozenset(("step", "exp_avg", "exp_avg_sq")), frozenset(("momentum_buffer",))}
            or len(names) > 1
        ):
            raise ValueError("its entries are not those of one optimizer")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(what, f"cannot resume ({error})", "undo the last --set") from None


def load_last(folder: Path) -> dict:
    """The checkpoint of a run: last.pt or, where that is broken or gone, the one before it."""
    try:
        return checkpoint.load(folder / "last.pt")
    except checkpoint.UnreadableCheckpoint as error:
        if not (folder / "previous.pt").exists():
            raise
        content = checkpoint.load(folder / "previous.pt")
        if os.environ.get("RANK", "0") == "0" and (folder / "last.pt").exists():
            # Or the next checkpoint would make it the previous one.
            (folder / "last.pt").rename(folder / "broken.pt")
        print_main(f"{error}: going on from previous.pt, step {content.get('step')}")
        return content


class GracefulStop:
    """Inside `with`, SIGTERM, SIGUSR1, Ctrl-C and SIGHUP (a terminal that is closed; not where
    nohup has it ignored) ask for a stop at the end of the step instead of killing the process.

    A second Ctrl-C does not wait for that.
    """

    def __init__(self, process: Process):
        self.process, self.asked, self.before = process, set(), {}

    def __enter__(self) -> "GracefulStop":
        wanted = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.ask) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self.asked:
            raise KeyboardInterrupt
        self.asked.add(number)

    def now(self) -> bool:
        """Whether any process was asked: they all stop after the same step."""
        return self.process.any(bool(self.asked))


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The buffers that a forward pass in training changes."""
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None
    ]
    return [b for m in norms for b in (m.running_mean, m.running_var, m.num_batches_tracked)]


class BadSteps:
    """Counts the steps whose loss, matching cost or gradient was not finite, names their images,
    and gives up in time.

    Such a step changed nothing (`train.train_step`). The first one's batch, all of it, is kept in
    OUT/bad_batch.pt: samples follow from their numbers, so it is read once more for that.
    """

    def __init__(
        self, task: object, out: Path, log: Log, process: Process, allowed: int, count: int = 0
    ):
        self.task, self.out, self.log, self.process, self.allowed = task, out, log, process, allowed
        self.count, self.in_a_row = count, 0
        self.waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, bad: Tensor) -> None:
        """The flag (1 or 0, on the device, equal in all processes) of the step that started from
        `step`.
        """
        event, flag = None, bad.to("cpu", non_blocking=True)
        if bad.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self.waiting.append((step, flag, event))
        self.read(FLAG_DELAY)

    def read(self, late: int = 0) -> bool:
        """Look at all flags but the last `late`. Raises UserError after too many in a row; whether
        the last one was bad.
        """
        while len(self.waiting) > late:
            step, flag, event = self.waiting.popleft()
            if event is not None:
                event.synchronize()
            self.in_a_row = self.in_a_row + 1 if flag else 0
            if flag:
                self.record(step)
        return self.in_a_row > 0

    def record(self, step: int) -> None:
        self.count += 1
        numbers = range(step * self.task.batch_size, (step + 1) * self.task.batch_size)
        names = [self.task.samples.source(n) for n in numbers]
        print_main(
            f"step {step + 1} was skipped, its loss or gradient is not finite ({self.count} so "
            f"far): {', '.join(names)}"
        )
        self.log.write(step + 1, skipped=self.count, images=names)
        file = self.out / "bad_batch.pt"
        if self.process.is_main and not file.exists():
            samples = SafeDataset(self.task.samples, replace=True)
            batch = self.task.collate([samples[n].value for n in numbers])
            batch = [x if isinstance(x, Tensor | tuple) else vars(x) for x in batch]
            checkpoint.save(file, step=step, samples=list(numbers), images=names, batch=batch)
        if self.in_a_row >= self.allowed:
            why = (
                f"loss or gradient not finite in {self.in_a_row} steps in a row, the last one "
                f"step {step + 1}"
            )
            raise UserError(
                "training",
                why,
                f"look at {file}, lower train.lr; --resume goes on from the checkpoint",
            )


class BadFileLog:
    """Says once a run, by name, which training files are broken; OUT/broken.txt lists them."""

    def __init__(self, out: Path):
        self.file, self.known = out / "broken.txt", set()

    def __call__(self, error: UserError) -> None:
        line = str(error)
        if line in self.known:
            return
        if self.file.exists():  # another process or an earlier part of the run may have said it
            self.known.update(split_lines(decode(self.file.read_bytes())))
        if line not in self.known:
            print(f"broken, the next sample takes its place: {line}", flush=True)
            left_out(f"broken training files, which {self.file} lists")
            with contextlib.suppress(OSError):  # it is said, after all
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with open(self.file, "a", encoding="utf-8", errors="surrogateescape") as file:
                    file.write(line + "\n")
        self.known.add(line)
