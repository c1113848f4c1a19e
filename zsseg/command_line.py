"""What every command shares: options, one-line errors, streams that may vanish."""

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Callable
from typing import TextIO

import torch.distributed as dist

from zsseg.utils import UserError, did_you_mean, path_of, print_left_out

ENVIRONMENT = """\
environment: ZSSEG_DATA (data root), ZSSEG_CACHE (downloads, CLIP's weights and text features;
else ~/.cache/zsseg), ZSSEG_VOCAB (CLIP's vocabulary file). A user error is one line on stderr and
exit code 2."""
EXIT_DELAY = 2  # seconds: torchrun ends the other processes sooner once the first has failed


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line like every other user error."""

    def __init__(self, doc: str):
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=ENVIRONMENT,
        )

    def add_root(self) -> None:
        self.add_argument(
            "--root",
            metavar="DIR",
            type=path_of,
            default=os.environ.get("ZSSEG_DATA") or "datasets",
            help="data root ($ZSSEG_DATA, else ./datasets)",
        )

    def error(self, message: str):
        message, _, choices = message.partition(" (choose from ")
        names = re.findall(r"[\w-]+", choices) or list(self._option_string_actions)
        todo = f"choose one of {', '.join(names)}" if choices else f"see {self.prog} --help"
        word = re.search(r"(?:unrecognized arguments: |invalid choice: ')([\w-]+)", message)
        if word and len(names) > 3:  # "gpu" is not a mistyped "cpu"
            todo = did_you_mean(word[1], names, todo)
        raise UserError("command line", message, todo)


class Stream:
    """stdout or stderr that may vanish at any time, with a reader, a terminal or a disk, and may
    not know a letter: what is printed is then lost or written as \\u1234, and the run goes on.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, action: Callable, *values: str) -> None:
        try:
            action(*values)
        except (OSError, ValueError):  # ValueError: it was closed
            # What is buffered would fail again at the end.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)
            self.stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def guard_streams() -> None:
    """Put a `Stream` in the place of stdout and stderr, and something where one was closed before
    the start.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # Or the next file that is opened would be taken for it.
            with contextlib.suppress(OSError):
                os.fstat(descriptor)
                continue
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        setattr(sys, name, stream if isinstance(stream, Stream) else Stream(stream))


def command(main: Callable[[list[str]], None]) -> None:
    """Run a script's `main(argv)`; a UserError becomes `error: ...` on stderr and exit code 2.

    What was left out is printed at the end.
    """
    guard_streams()
    try:
        try:
            main(sys.argv[1:])
        finally:
            print_left_out()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(EXIT_DELAY)  # all processes tend to meet the same error: one line is enough
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def parser(doc: str) -> Parser:
    """The options that train.py and eval.py share; `doc` is the script's docstring."""
    shared = Parser(doc)
    shared.add_argument(
        "--config",
        metavar="FILE",
        type=path_of,
        help="TOML file of options; a checkpoint holds its own",
    )
    shared.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help=(
            "override one option, e.g. train.steps=100; may be repeated (all are in "
            "zsseg/config.py)"
        ),
    )
    shared.add_root()
    shared.add_argument(
        "--out", metavar="DIR", type=path_of, help="where results go (default: see above)"
    )
    shared.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return shared
