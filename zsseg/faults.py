"""What must not waste a run: broken checkpoints, a signal to stop, skipped steps, broken images."""

import os
import signal
from dataclasses import dataclass, field
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


def load_run(out: Path, resume: bool, process: Process) -> dict:
    """The checkpoint that a run goes on from, with --resume or after a restart by torchrun; {} for
    a new run.

    Raises UserError where there is none to resume, where one must not be overwritten, and where the
    file is not one of a training run.
    """
    exists = any((out / name).exists() for name in ("last.pt", "previous.pt"))
    restarted = process.any(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0)
    if resume and not exists:
        raise UserError(f"output {out}", "holds no run", "leave --resume out to start one")
    if exists and not (resume or restarted):
        todo = "add --resume, or give another --out"
        raise UserError(f"output {out}", "holds a run already", todo)
    saved = load_last(out) if exists else {}
    if exists and not is_run(saved):
        what = f"checkpoint {out / 'last.pt'}"
        raise UserError(what, "is not one of a training run", "give another --out")
    step = saved.get("step", 0)
    if process.any(step != process.from_main(step)):
        why = "the processes found checkpoints of different steps"
        raise UserError(f"output {out}", why, "put it where all machines see the same files")
    return saved


def load_last(folder: Path) -> dict:
    """The checkpoint of a run: last.pt or, where that is broken or gone, the one before it."""
    last = folder / "last.pt"
    previous = folder / "previous.pt"
    try:
        return checkpoint.load(last)
    except checkpoint.UnreadableCheckpoint as error:
        if not previous.exists():
            raise
        content = checkpoint.load(previous)
        if os.environ.get("RANK", "0") == "0" and last.exists():
            # Or the next checkpoint would make it the previous one.
            last.rename(folder / "broken.pt")
        print_main(f"{error}: going on from previous.pt, step {content.get('step')}")
        return content


def is_run(content: dict) -> bool:
    """Whether a checkpoint has the entries of a training run, of the right types."""
    types = {"config": dict, "optimizer": dict, "step": int, "skipped": int, "best": list}
    return all(type(content.get(k)) is t for k, t in types.items()) and content["step"] >= 0


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is one of PyTorch's fused ones, which read `found_inf` and trust the
    shapes of their state.
    """
    return all(group.get("fused") for group in optimizer.param_groups)


def restore(optimizer: torch.optim.Optimizer, state: dict, what: str) -> None:
    """Load an optimizer's state; base rates, weight decay and the like stay as configured.

    Raises UserError where it does not fit the parameters.
    """
    # The rate itself is the last step's: a run that takes no further step saves what it loaded.
    configured = [
        {k: v for k, v in group.items() if k not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    try:
        optimizer.load_state_dict(state)
        for group, options in zip(optimizer.param_groups, configured, strict=True):
            group.update(options)
        if is_fused(optimizer):
            check_state(optimizer)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(what, f"cannot resume ({error})", "undo the last --set") from None


# Of the optimizers that `train.build_optimizer` makes.
STATE_ENTRIES = {
    torch.optim.AdamW: frozenset(("step", "exp_avg", "exp_avg_sq")),
    torch.optim.SGD: frozenset(("momentum_buffer",)),
}


def check_state(optimizer: torch.optim.Optimizer) -> None:
    """ValueError where the state does not fit the parameters: a fused kernel would read and write
    beyond them.
    """
    names = {frozenset(entries) for entries in optimizer.state.values()}
    expected = STATE_ENTRIES.get(type(optimizer))
    if len(names) > 1 or (expected and names - {expected}):
        raise ValueError("its entries are not those of the optimizer")
    for parameter, entries in optimizer.state.items():
        for name, tensor in entries.items():
            shape = () if name == "step" else parameter.shape
            if tensor.shape != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(shape)}")
            if tensor.dtype != parameter.dtype or not tensor.is_contiguous():
                raise ValueError(f"{name} is not contiguous {parameter.dtype}")


class GracefulStop:
    """Inside `with`, SIGTERM, SIGUSR1, Ctrl-C and SIGHUP (a terminal that is closed; not where
    nohup has it ignored) ask for a stop at the end of the step instead of killing the process.

    A second Ctrl-C does not wait for that.
    """

    def __init__(self, process: Process):
        self.process = process
        self.received: set[int] = set()
        self.handlers: dict = {}  # those from before

    def __enter__(self) -> "GracefulStop":
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self.received:
            raise KeyboardInterrupt
        self.received.add(number)

    def requested(self) -> bool:
        """Whether any process received a signal: they all stop after the same step."""
        return self.process.any(bool(self.received))


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The buffers that a forward pass in training changes: those of batch norm."""
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
    return [buffer for norm in norms for buffer in norm.buffers()]


@dataclass
class BadSteps:
    """Counts the steps with NaN/Inf in the loss, the matching cost or the gradient, names their
    images, and gives up in time.

    Such a step changed nothing (`train.train_step`). The first one's batch is kept in `file`:
    samples follow from their numbers, so it is read once more for that.
    """

    task: object
    file: Path
    log: Log
    process: Process
    max_in_a_row: int
    count: int = 0
    in_a_row: int = 0
    flags: list[tuple[int, Tensor]] = field(default_factory=list)

    def add(self, step: int, bad: Tensor) -> None:
        """The flag (1 or 0, on the device, equal in all processes) of the step that started from
        `step`; it is not waited for.
        """
        self.flags.append((step, bad))

    def read(self) -> bool:
        """Whether the last step was bad; the host waits for the device. UserError after too many
        in a row.
        """
        for step, bad in self.flags:
            self.in_a_row = self.in_a_row + 1 if bad else 0
            if bad:
                self.record(step)
        self.flags.clear()
        return self.in_a_row > 0

    def record(self, step: int) -> None:
        self.count += 1
        size = self.task.batch_size
        numbers = list(range(step * size, (step + 1) * size))
        names = [self.task.samples.source(n) for n in numbers]
        print_main(
            f"step {step + 1} was skipped, NaN/Inf in its loss or gradient ({self.count} so far): "
            f"{', '.join(names)}"
        )
        self.log.write(step + 1, skipped=self.count, images=names)
        if self.process.is_main and not self.file.exists():
            samples = SafeDataset(self.task.samples, replace=True)
            batch = self.task.collate([samples[n].value for n in numbers])
            batch = [x if isinstance(x, Tensor | tuple) else vars(x) for x in batch]
            checkpoint.save(self.file, step=step, samples=numbers, images=names, batch=batch)
        if self.in_a_row >= self.max_in_a_row:
            raise UserError(
                "training",
                f"NaN/Inf in {self.in_a_row} steps in a row, the last one step {step + 1}",
                f"look at {self.file}, lower train.lr; --resume goes on from the checkpoint",
            )


class BadFileLog:
    """Reports each broken training file once a run, by name; OUT/broken.txt lists them."""

    def __init__(self, out: Path):
        self.file = out / "broken.txt"
        self.reported: set[str] = set()

    def __call__(self, error: UserError) -> None:
        line = str(error)
        if line not in self.reported and self.file.exists():
            # by another process, or an earlier part of the run
            self.reported.update(split_lines(decode(self.file.read_bytes())))
        if line in self.reported:
            return
        self.reported.add(line)
        print(f"broken, the next sample takes its place: {line}", flush=True)
        left_out(f"broken training files, which {self.file} lists")
        try:
            with open(self.file, "a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(line + "\n")
        except OSError:
            pass  # it is printed, after all
