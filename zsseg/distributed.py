"""The processes that torchrun started, the device of each, and its precision."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from zsseg.utils import UserError, cache_dir, plural, print_main

# For processes whose share of the work takes less long; a dead one is noticed at once.
DIST_TIMEOUT = timedelta(days=30)
MIN_IMAGES_TO_COMPILE = 1000  # images a process: for fewer, compiling takes longer than it saves


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started (one, if it did not)."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        torch.backends.cudnn.allow_tf32 = False  # where bf16 is off, fp32 means fp32

    @property
    def is_main(self):
        return self.rank == 0

    def sum(self, tensor):
        """Sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag):
        """Whether the flag is set in any process; the devices are not waited for."""
        return bool(self.sum(torch.tensor(float(flag))))

    def broadcast(self, build):
        """The first process's build() in every process; its UserError ends all of them."""
        try:
            box = [build() if self.is_main else None]
        except UserError as error:
            box = [error]
        first = self.gather(box)[0]
        if isinstance(first, UserError):
            raise first
        return first

    def gather(self, values):
        """The values of all processes, one process's after another's."""
        parts = [values] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]

    def main_first(self, build):
        """build() in every process, in the first one before the others, which find what it
        caches.
        """
        results = []
        self.broadcast(lambda: results.append(build()))  # its UserError ends all
        return results[0] if self.is_main else build()

    def broadcast_buffers(self, module):
        """Give every process the first one's buffers (batch-norm statistics), so that all evaluate
        the same model.
        """
        for buffer in module.buffers() if self.world_size > 1 else ():
            dist.broadcast(buffer, 0)

    def put(self, tensor):
        """A copy on the device; the host does not wait for it."""
        pinned = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return pinned.to(self.device, non_blocking=True)

    def fetch(self, *tensors):
        """Start to copy tensors to the host; the result, called, waits for the copies."""
        copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        if self.device.type != "cuda":
            return lambda: copies
        done = torch.cuda.current_stream(self.device).record_event()
        return lambda: done.synchronize() or copies

    def accelerate(self, segmenter, model, images=0):
        """Bring a segmenter to this device, as fast as the section [model] allows with so many
        images, and for inference only from now on.
        """
        segmenter.to(self.device).eval()
        setting = model.compile
        many = images >= MIN_IMAGES_TO_COMPILE * self.world_size
        compiled = (many or setting == "on") and self.compiles(setting)
        dtype = torch.bfloat16 if self.bf16(model.bf16) else torch.float32
        graphs = self.device.type == "cuda" and setting != "off"
        segmenter.accelerate(dtype, graphs, compiled)

    def autocast(self, setting, training=False):
        """The networks' precision as `model.bf16` says, see `bf16`."""
        kind = self.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.bf16(setting, training))

    def bf16(self, setting, training=False):
        """Whether products are in bf16. "auto": on CUDA, and at inference on a CPU that multiplies
        in bf16 (AMX or AVX512-BF16).

        At inference on a CPU only CLIP's image tower is, nearly all of the work.
        """
        if setting != "auto" or self.device.type == "cuda":
            return setting != "off"
        has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return has_bf16 and not training

    def compiles(self, setting):
        """Whether networks are compiled, which is said, since it takes long. "auto": on CUDA."""
        found = setting == "on" or (setting == "auto" and self.device.type == "cuda")
        if found:
            folder = os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{cache_dir()}/compiled")
            print_main(f"compiling for some minutes, or less with what is in {folder}")
        return found

    def describe(self, setting, training=False):
        """Print the device and the precision of this run: both decide how fast it is, and the last
        digits.
        """
        precision = "bf16" if self.bf16(setting, training) else "fp32"
        name = f"a CPU, {plural(torch.get_num_threads(), 'thread')}"
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        print_main(f"computing on {name}: {precision}")


def find_device(name):
    """A device by "auto" (a GPU, else the CPU) or by torch's name. UserError for one that is not
    here.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    names = ["auto", "cpu", *["cuda"] * bool(gpus), *gpus]
    if str(name) not in names:
        raise UserError(f"device {name}", "is not here", f"give one of {', '.join(names)}")
    return torch.device(("cuda" if gpus else "cpu") if name == "auto" else name)


def init_distributed(device="auto"):
    """Pick the device and join the process group if torchrun started this process."""
    cuda = find_device(device).type == "cuda"
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(local_rank)
    if world_size > 1:
        # torchrun keeps its store over restarts, with the addresses of dead processes in it: every
        # start gets a prefix of its own. With several machines the count of restarts differs
        # between them; there, torchrun's own way must do.
        store = None
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store, _, _ = next(dist.rendezvous("env://", timeout=DIST_TIMEOUT))
            store = dist.PrefixStore(f"start {restarts}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, None, DIST_TIMEOUT, world_size, rank, store)
    return Process(torch.device(f"cuda:{local_rank}" if cuda else "cpu"), rank, world_size)
