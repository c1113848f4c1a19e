"""Watch a program on CUDA tensors without values, so that no GPU is needed: where the host would
wait for one, what is copied between the two, and how much memory is held.

PyTorch's fake tensors know shapes, strides and types. Most reads of a value (`item`, `bincount`)
are an error there by themselves. Backward does not run without a GPU.
"""

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.device("cuda", 0)


@contextlib.contextmanager
def fake_gpu() -> Iterator[FakeTensorMode]:
    """In here, new tensors have no values and may be on CUDA; autocast works as on a GPU."""
    event = SimpleNamespace(synchronize=lambda: None)
    stand_ins = [
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch.cuda, "current_stream", lambda *_: SimpleNamespace(record_event=lambda: event)),
        (Tensor, "pin_memory", lambda tensor: tensor),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in stand_ins:
            stack.enter_context(patch.object(owner, name, stand_in))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


def tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def place() -> str:
    """The function of the program that runs, as file:name."""
    frame = sys._getframe(2)
    while frame:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and "tests" not in file.relative_to(ROOT).parts:
            name = frame.f_code.co_qualname.split(".<locals>")[0]
            return f"{file.relative_to(ROOT)}:{name}"
        frame = frame.f_back
    return "elsewhere"


class Watch(TorchDispatchMode):
    """While it is entered:

    waits: {"file:function operator": times that the host waits for the device}; a copy waits
        unless it is `non_blocking`. What is read of masks is answered as if all were true.
    copies: {"file:function device -> device": times}.
    made: bytes of every new tensor that is not on the CPU; views are none.
    held, peak: bytes of those that are alive, now and at most.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.copies = Counter(), Counter()
        self.made = []
        self.held = self.peak = 0
        self.known = set()  # storages

    def see(self, tensor: Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if new else 0
        if tensor.device.type == "cpu" or key in self.known:
            return
        self.known.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        self.made += [size] if new else []
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.held -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and function.namespace == "aten":
            with self:  # operators made of others come here whole
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = function.name().removeprefix("aten::").split(".")[0]
        given = tensors((args, kwargs))
        for tensor in given:
            self.see(tensor, new=False)
        on_device = any(tensor.is_cuda for tensor in given)
        if name in ("index", "index_put", "index_put_") and on_device:
            bad = [t for t in tensors(args[1]) if t.dtype == torch.bool or not t.is_cuda]
            if bad:  # counted or copied
                self.waits[f"{place()} {name}"] += 1
        if name == "nonzero" and on_device:
            self.waits[f"{place()} nonzero"] += 1
            shape = args[0].numel(), args[0].dim()
            result = args[0].new_empty(shape, dtype=torch.int64)
        else:
            result = function(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            self.count(name, args, kwargs, result)
        for tensor in tensors(result):
            self.see(tensor, new=True)
        return result

    def count(self, name: str, args: tuple, kwargs: dict, result: Tensor) -> None:
        """A copy."""
        source, target = args[name == "copy_"].device.type, result.device.type
        if source == target:
            return
        self.copies[f"{place()} {source} -> {target}"] += 1
        if not (kwargs.get("non_blocking") or args[2:3] == (True,)):
            self.waits[f"{place()} {source} -> {target}"] += 1
