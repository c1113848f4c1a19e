"""A run's checkpoints: written atomically, one before the last, resumed exactly; and the signals
that ask for one. Files of tensors are read by `weights.py`.
"""

import contextlib
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
    restarted = process.any(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    if resume and not files:
        raise UserError(f"output {out}", "has no run", "leave --resume out to start one")
    if files and not (resume or restarted):
        raise UserError(f"output {out}", "has a run already", "add --resume, or give another --out")
    saved = {}
    broken = None
    for file in files:
        try:
            saved = load_checkpoint(file)
            break
        except UserError as error:
            if file == files[-1]:
                raise
            broken = error
    if files and not {"config", "step", "optimizer"} <= saved.keys():
        raise UserError(f"checkpoint {file}", "is not one of a training run", "give another --out")
    if len({*process.gather([saved.get("step", 0)])}) > 1:
        why = "the processes found checkpoints of different steps"
        raise UserError(f"output {out}", why, "put it where all machines see the same files")
    if broken:
        print_main(f"{broken}: going on from previous.pt")
        if process.is_main:  # or the next checkpoint would make it the previous one
            files[0].rename(out / "broken.pt")
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


@contextlib.contextmanager
def graceful_stop(process):
    """Inside `with`, SIGTERM, SIGUSR1, Ctrl-C and SIGHUP (a closed terminal; not under nohup) ask
    for a stop at the end of the step, which all processes then make after the same step. A second
    Ctrl-C does not wait for that. Gives a function: whether any process was asked.
    """
    received = set()

    def receive(number, frame):
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.add(number)

    before = {
        number: signal.signal(number, receive)
        for number in SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield lambda: process.any(bool(received))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
