"""What every command shares: user errors, processes and devices, stateless seeds, threads, the log
of a run.
"""

import argparse
import contextlib
import difflib
import functools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)  # that ask a run to stop
ENVIRONMENT = """\
environment: ZSSEG_DATA (data root), ZSSEG_CACHE (downloads, CLIP's weights and text features;
else ~/.cache/zsseg), ZSSEG_VOCAB (CLIP's vocabulary file). A user error is one line on stderr and
exit code 2."""
MANY = 5000  # names that one is compared with, at most: it takes a while
GRACE = 2  # seconds: torchrun ends the other processes sooner once the first has failed
# For processes that wait while one prepares data; a dead one is noticed at once.
PATIENCE = timedelta(hours=1)


class UserError(Exception):
    """Something the user can put right, as (what, why, what to do): one line, exit code 2, no
    traceback.
    """

    def __str__(self) -> str:
        what, why, todo = self.args
        return " ".join(f"{what}: {why}; {todo}".split())


def nearest(word: str, names: Iterable[str], else_: str) -> str:
    """What to do about a name that is none: take the nearest of those there are, or `else_` where
    none is near.
    """
    near = difflib.get_close_matches(word, names, 1, 0.65)
    return f"did you mean {near[0]}?" if near else else_


def nearest_file(path: str | Path, else_: str) -> str:
    """The same for a file that is not there, among the files beside where it would be."""
    path, beside = Path(path), []
    with contextlib.suppress(OSError):
        beside = [name for name in os.listdir(path.parent) if name != path.name]
    near = difflib.get_close_matches(path.name, beside[:MANY], 1, 0.65)
    return f"did you mean {path.with_name(near[0])}?" if near else else_


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line like every other user error."""

    def __init__(self, doc: str):
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=ENVIRONMENT,
        )

    def add_root(self) -> None:
        root = path_of(os.environ.get("ZSSEG_DATA") or "datasets")
        self.add_argument(
            "--root",
            metavar="DIR",
            type=path_of,
            default=root,
            help="data root ($ZSSEG_DATA, else ./datasets)",
        )

    def error(self, message: str):
        names = [
            str(name)
            for action in self._actions
            for name in (*action.option_strings, *(action.choices or ()))
        ]
        found = re.search(r"(?:unrecognized arguments: |invalid choice: ')([\w-]+)", message)
        choices = re.search(r"\(choose from (.*)\)$", message)
        todo, message = f"see {self.prog} --help", message.partition(" (choose from")[0]
        todo = f"choose one of {choices[1]}" if choices else todo
        few = choices and choices[1].count(",") < 3  # "gpu" is not a mistyped "cpu"
        raise UserError(
            "command line", message, nearest(found[1], names, todo) if found and not few else todo
        )


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

    At the end stands what was left out on the way.
    """
    guard_streams()
    try:
        try:
            main(sys.argv[1:])
        finally:
            say_left_out()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(GRACE)  # all processes tend to meet the same error: one line is enough
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


def path_of(text: str | Path) -> Path:
    """A path as a shell would read it: `~` is the home folder, also where the shell has not seen to
    that (--out=~/x).
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        if Path(text).parts[0] == "~":
            raise UserError(
                f"path {text}", "this user has no home folder", "give the whole path"
            ) from None
        return Path(text)  # the name begins with ~, and there is no such user


def cache_dir() -> Path:
    """$ZSSEG_CACHE, else ~/.cache/zsseg; without a home folder, one of this user's below the
    temporary files.
    """
    given = os.environ.get("ZSSEG_CACHE")
    return path_of(given) if given else home_cache()


@functools.cache
def home_cache() -> Path:
    try:
        return Path.home() / ".cache" / "zsseg"
    except RuntimeError:
        folder = Path(tempfile.gettempdir()) / f"zsseg-{os.getuid()}"
        say(
            f"no home folder: downloads and features are kept in {folder} (set ZSSEG_CACHE for "
            f"another place)"
        )
        return folder


LEFT_OUT: list[str] = []


def left_out(what: str) -> None:
    """Have the command say at its end that this was left out: whoever drops data says how much of
    what.
    """
    if os.environ.get("RANK", "0") == "0" and what not in LEFT_OUT:
        LEFT_OUT.append(what)


@functools.cache
def say_once(text: str) -> None:
    say(text)


def say_left_out() -> None:
    if LEFT_OUT:
        say(f"left out: {'; '.join(LEFT_OUT)}")
    LEFT_OUT.clear()


def first_of(names: list[str], most: int) -> str:
    """At most so many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def several(count: int, one: str, many: str = "") -> str:
    """A number and its noun."""
    return f"{count} {one if count == 1 else many or one + 's'}"


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started (one, if it did not)."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any process says so; the devices are not waited for."""
        return bool(self.sum(torch.tensor(float(flag))))

    def first(self, value: int) -> int:
        """The first process's value."""
        return int(self.sum(torch.tensor(value if self.is_main else 0)))

    def agree(self, build: Callable):
        """The first process's build() in every process; where it is a UserError, all end."""
        found = [None]
        if self.is_main:
            try:
                found = [build()]
            except UserError as error:
                found = [error]
        if self.world > 1:
            dist.broadcast_object_list(found)
        if not isinstance(found[0], UserError):
            return found[0]
        if self.is_main:
            raise found[0]
        sys.exit(2)  # the first one says why

    def agree_all(self, check: Callable[[], None]) -> None:
        """check() of a part in every process; where one raises a UserError, all end, and the first
        process says why.
        """
        error = None
        try:
            check()
        except UserError as found:
            error = found
        errors = [e for e in self.gather([error]) if e is not None]
        if self.any(error is not None):
            if self.is_main:
                raise errors[0]
            sys.exit(2)

    def share_of(self, name: str) -> str:
        """The name of work of which each process does a part, beside a count of this one's."""
        return name if self.world == 1 else f"{name}, the first of {self.world} processes"

    def gather(self, values: list) -> list:
        """The values of all processes, one process's after another's, on the first one."""
        parts = [None] * self.world if self.is_main else None
        if self.world == 1:
            return values
        dist.gather_object(values, parts)
        return [value for part in parts or () for value in part]

    def in_turn(self, build: Callable):
        """build() here, after the first process has done it, so that the others find what it
        caches.
        """
        if not self.is_main:
            self.wait()
        built = build()
        if self.is_main:
            self.wait()
        return built

    def wait(self) -> None:
        """Go on when all processes have come here."""
        self.sum(torch.zeros(1, device=self.device)).item()  # reading it makes the host wait, too

    def share(self, module: torch.nn.Module) -> None:
        """Give every process the first one's buffers (batch-norm statistics), so that all evaluate
        the same model.
        """
        for buffer in module.buffers() if self.world > 1 else ():
            dist.broadcast(buffer, 0)

    def autocast(self, setting: str, training: bool = False) -> torch.autocast:
        """The networks' precision as `model.bf16` says, see `bf16`."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.bf16(setting, training)
        )

    def bf16(self, setting: str, training: bool = False) -> bool:
        """Whether products are in bf16. "auto": on CUDA, and on a CPU that multiplies in bf16, but
        for training there.

        At inference on a CPU that is CLIP's image tower alone, nearly all of the work; see
        `Segmenter.propose_masks`.
        """
        if setting != "auto":
            return setting == "on"
        return self.device.type == "cuda" or (not training and cpu_has_bf16())

    def compiles(self, setting: str) -> bool:
        """Whether all of a network is compiled. "auto": on CUDA."""
        return setting == "on" or (setting == "auto" and self.device.type == "cuda")

    def describe(self, setting: str, training: bool = False) -> None:
        """Say what this run computes on, and in which precision: both decide how fast it is, and
        the last digits.
        """
        precision = "bf16" if self.bf16(setting, training) else "fp32"
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            name = (
                f"CPU with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} "
                f"threads"
            )
            precision = (
                "CLIP in bf16, the rest in fp32"
                if precision == "bf16" and not training
                else precision
            )
        say(f"computing on {name}: {precision}")


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies matrices in bf16 (AMX or AVX512-BF16) and PyTorch is not held to
    an older instruction set.
    """
    has = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return has and torch.backends.cpu.get_cpu_capability() == "AVX512"


@functools.cache
def can_compile() -> bool:
    """Whether torch.compile works here: on a CPU it needs a C++ compiler and Python's headers,
    which not every machine has.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8))
    except Exception as error:  # of many kinds, a compiler's own among them
        say(f"not compiled ({str(error).strip().splitlines()[0][:200]})")
        return False
    return True


def start(device: str = "auto", patience: timedelta = PATIENCE) -> Process:
    """Pick the device and join the process group when torchrun started us; processes wait so long
    for one another.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda", "no CUDA device is available", "use --device cpu")
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    rank, world, local = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                "torchrun",
                f"process {local} has no GPU of its own",
                "start as many processes as there are GPUs",
            )
        torch.cuda.set_device(local)
        torch.backends.cudnn.allow_tf32 = False  # where bf16 is off, fp32 means fp32
    if world > 1 and not dist.is_initialized():
        # torchrun keeps its store over restarts, with the addresses of the dead in it: every start
        # takes a place of its own.
        # With several machines its count of restarts differs between them; there, its own way must
        # do.
        store, restarts = None, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(
                f"start {restarts}", next(dist.rendezvous("env://", timeout=patience))[0]
            )
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    return Process(torch.device(kind, local) if kind == "cuda" else torch.device(kind), rank, world)


def say(text: str) -> None:
    """Print on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def seed_of(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several small numbers, e.g. (run seed, step, rank)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the host had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@functools.cache
def commit() -> str:
    """The version of this program as git tells it, with "-dirty" where files were changed; "" where
    there is no git.
    """
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def progress(items: Iterable, name: str, total: int, show: bool = True) -> Iterator:
    """The items, with a progress bar on a terminal; elsewhere with a line every tenth of the way,
    or every minute.
    """
    if sys.stderr.isatty() or not show:
        yield from tqdm(items, name, total, disable=not show)
        return
    started = said = time.perf_counter()
    for i, item in enumerate(items, 1):
        yield item
        now, tenth = time.perf_counter(), 10 * i // total > 10 * (i - 1) // total
        if i == total or now - said > (2 if tenth else 60):
            each, said = (now - started) / i, now
            print(
                f"{name} {i}/{total}, {1 / each:.1f}/s, {clock((total - i) * each)} left",
                flush=True,
            )


def clock(seconds: float) -> str:
    """As 0:22, 3:12 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    return (
        f"{minutes}:{seconds:02}"
        if minutes < 60
        else f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
    )


def parallel(function: Callable, items: Iterable, workers: int, name: str) -> Iterator:
    """function(item) of every item, in order, by threads (Pillow and zlib let go of the
    interpreter), with progress.
    """
    items = list(items)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        try:
            yield from progress(
                pool.map(function, items), name, len(items), os.environ.get("RANK", "0") == "0"
            )
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
