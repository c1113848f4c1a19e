"""A run's checkpoints: written atomically, one before the last, resumed exactly; and the signals
that ask for one. Files of tensors are read by `weights.py`.
"""

import os
import signal

import torch

from zsseg.utils import SIGNALS, UserError, atomic_write, print_main
from zsseg.weights import load_checkpoint


def save(path, previous=None, **content):
    """Write a checkpoint so that one is always complete: `path`, or the one before it, which
    becomes `previous`.
    """
    with atomic_write(path, previous) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(0, str(error).partition("\n")[0]) from None


def load_last(out, resume, process):
    """The checkpoint that a run goes on from, with --resume or after a restart by torchrun; {} for
    a new run. previous.pt takes the place of a last.pt that is broken or gone. Raises UserError.
    """
    files = [file for file in (out / "last.pt", out / "previous.pt") if file.exists()]
    restarted = process.any(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0)
    if resume and not files:
        raise UserError(f"output {out}", "has no run", "leave --resume out to start one")
    if files and not (resume or restarted):
        todo = "add --resume, or give another --out"
        raise UserError(f"output {out}", "has a run already", todo)
    saved = {}
    for file in files:
        try:
            saved = load_checkpoint(file)
            break
        except UserError as error:
            if file == files[-1]:
                raise
            print_main(f"{error}: going on from previous.pt")
            if process.is_main:  # or the next checkpoint would make it the previous one
                file.rename(out / "broken.pt")
    if files and not {"config", "step", "optimizer"} <= saved.keys():
        raise UserError(f"checkpoint {file}", "is not one of a training run", "give another --out")
    if len({*process.gather([saved.get("step", 0)])}) > 1:
        why = "the processes found checkpoints of different steps"
        raise UserError(f"output {out}", why, "put it where all machines see the same files")
    return saved


def restore(optimizer, state, what):
    """Load an optimizer's state; base rates, weight decay and the like stay as configured. Raises
    UserError if it does not fit the parameters.
    """
    configured = [dict(group) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except (KeyError, ValueError) as error:
        raise UserError(what, f"cannot resume ({error})", "undo the last --set") from None
    # The rate itself is the last step's: a run that takes no further step saves what it loaded.
    for group, options in zip(optimizer.param_groups, configured, strict=True):
        group |= options | {"lr": group["lr"]}


class GracefulStop:
    """Inside `with`, SIGTERM, SIGUSR1, Ctrl-C and SIGHUP (a closed terminal; not under nohup) ask
    for a stop at the end of the step. A second Ctrl-C does not wait for that.
    """

    def __init__(self, process):
        self.process = process
        self.received: set[int] = set()

    def __enter__(self) -> "GracefulStop":
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.receive) for number in heard}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        if number == signal.SIGINT and number in self.received:
            raise KeyboardInterrupt
        self.received.add(number)

    def requested(self):
        """Whether any process received a signal: they all stop after the same step."""
        return self.process.any(bool(self.received))
