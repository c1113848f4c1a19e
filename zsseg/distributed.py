"""The processes that torchrun started, the device of each, and its precision."""

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from zsseg.utils import UserError, print_main

# For processes that wait while one prepares data; a dead one is noticed at once.
DIST_TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started (one, if it did not)."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any process says so; the devices are not waited for."""
        return bool(self.sum(torch.tensor(float(flag))))

    def from_main(self, value: int) -> int:
        """The first process's value."""
        return int(self.sum(torch.tensor(value if self.is_main else 0)))

    def broadcast_object(self, build: Callable):
        """The first process's build() in every process; where it is a UserError, all end."""
        found = [None]
        if self.is_main:
            try:
                found = [build()]
            except UserError as error:
                found = [error]
        if self.world_size > 1:
            dist.broadcast_object_list(found)
        if not isinstance(found[0], UserError):
            return found[0]
        if self.is_main:
            raise found[0]
        sys.exit(2)  # the first one says why

    def check_all(self, check: Callable[[], None]) -> None:
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

    def progress_label(self, name: str) -> str:
        """The name of work of which each process does a part, beside a count of this one's."""
        return name if self.world_size == 1 else f"{name}, the first of {self.world_size} processes"

    def gather(self, values: list) -> list:
        """The values of all processes, one process's after another's, on the first one."""
        parts = [None] * self.world_size if self.is_main else None
        if self.world_size == 1:
            return values
        dist.gather_object(values, parts)
        return [value for part in parts or () for value in part]

    def main_process_first(self, build: Callable):
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

    def broadcast_buffers(self, module: torch.nn.Module) -> None:
        """Give every process the first one's buffers (batch-norm statistics), so that all evaluate
        the same model.
        """
        for buffer in module.buffers() if self.world_size > 1 else ():
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
        `Segmenter.propose`.
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
        print_main(f"computing on {name}: {precision}")


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
        print_main(f"not compiled ({str(error).strip().splitlines()[0][:200]})")
        return False
    return True


def init_distributed(device: str = "auto", patience: timedelta = DIST_TIMEOUT) -> Process:
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
