"""Checkpoints: written atomically, read without being executed, loaded strictly. Other people's
weights are in `weights.py`.
"""

import os
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from zsseg.files import atomic_write
from zsseg.utils import UserError, did_you_mean_file, first_of, print_main

State = dict[str, Tensor]


def save(path: Path, previous: Path | None = None, **content: object) -> None:
    """Write a checkpoint so that `path` is always complete: the old one (kept as `previous`, where
    given) or the new one.
    """
    with atomic_write(path, previous) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(0, str(error).partition("\n")[0]) from None


def load(path: str | Path, what: str = "checkpoint") -> dict:
    """A checkpoint of ours ({"config", "step", "model", ...}) or the original's ({"model": ...}),
    on the CPU.
    """
    content = read_torch(Path(path), f"{what} {path}")
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        todo = "give a checkpoint of train.py or a model_final.pth"
        raise UserError(f"{what} {path}", "contains no model", todo)
    return content


class UnreadableCheckpoint(UserError):
    """A file of tensors that is missing or broken, so that another one must take its place."""


def read_torch(path: Path, what: str) -> object:
    """The content of a file of `torch.save`, tensors and plain values, on the CPU."""
    if path.is_dir():
        last = path / "last.pt"
        todo = f"did you mean {last}?" if last.is_file() else "give a file"
        raise UnreadableCheckpoint(what, "is a folder", todo)
    if not path.is_file():
        missing = path if path.parent.is_dir() else path.parent
        raise UnreadableCheckpoint(
            what, "no such file", did_you_mean_file(missing, "check the path")
        )
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                refuse_compressed(archive.infolist())
        with torch.serialization.safe_globals(NUMPY):
            return without_arrays(torch.load(path, map_location="cpu", weights_only=True))
    except OSError as error:
        raise UserError(what, f"cannot be read ({error})", "check the disk") from None
    except MemoryError:
        raise
    except Exception as error:  # torch raises many types, with advice to load such a file anyway
        reason = re.search(r"[Uu]nsupported \w+:? (GLOBAL )?[\w.]+|an array of [^;\n]+", str(error))
        why = f"cannot be read as tensors ({reason[0] if reason else 'broken'})"
        todo = "check the file; it may contain only tensors and plain values"
        raise UnreadableCheckpoint(what, why, todo) from None


def refuse_compressed(entries: list[zipfile.ZipInfo]) -> None:
    """torch compresses neither tensors nor what describes them; a small file could fill the
    memory.
    """
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED and "/code/" not in entry.filename:
            raise pickle.UnpicklingError(f"{entry.filename} is compressed")


def load_strict(module: nn.Module, state: State, what: str, hint: str) -> None:
    """`load_state_dict` whose complaint is one line: the first few missing, unknown and mis-shaped
    names.

    Raises UserError also for weights with NaN/Inf, which would give labels all the same.
    """
    if not is_state_dict(state):
        raise UserError(what, "contains something else instead of a state dict", hint)
    state = unwrapped(state, what)
    own = module.state_dict()
    problems = [f"{k} is missing" for k in own if k not in state]
    problems += [f"{k} is unknown" for k in state if k not in own]
    for k in own.keys() & state.keys():
        if state[k].shape != own[k].shape:
            problems.append(f"{k} has shape {tuple(state[k].shape)}, not {tuple(own[k].shape)}")
    if problems:
        raise UserError(what, f"does not fit: {first_of(problems, 3)}", hint)
    check_finite(state, what)
    module.load_state_dict(state)


def is_state_dict(state: object) -> bool:
    return isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())


def unwrapped(state: State, what: str) -> State:
    """A state dict without what DataParallel ("module."), torch.compile ("_orig_mod.") or a trainer
    put before every name.
    """
    prefix = re.match(r"(module\.|_orig_mod\.)*", os.path.commonprefix(list(state)))[0]  # noqa: RUF071
    if prefix:
        print_main(f"{what}: prefix {prefix!r} removed from all names")
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def check_finite(state: State, what: str) -> None:
    """UserError for weights with NaN/Inf in them."""
    broken = [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all()
    ]
    if broken:
        todo = "take another checkpoint; casts to half precision may do that"
        raise UserError(what, f"contains NaN/Inf, in {first_of(broken, 3)}", todo)


def say_loaded(what: str, loaded: int, dropped: list[str]) -> None:
    """One line: how many tensors were used, and every name that was not (many of one module as
    `module.*`).
    """
    modules = [re.split(r"\.resblocks|\.layer|\.\w+$", name)[0] for name in dropped]
    counts = Counter(modules)
    names = dict.fromkeys(
        name if counts[module] < 4 else f"{module}.* ({counts[module]})"
        for name, module in zip(dropped, modules, strict=True)
    )
    text = f": {', '.join(names)}" if names else ""
    print_main(f"{what}: {loaded} tensors loaded, {len(dropped)} dropped{text}")


class PickledType:
    """A pickled NumPy dtype, numbers only. Nothing of NumPy's own reads what the file says."""

    def __init__(self, text: str, *_: object):
        if not re.fullmatch(r"[fiu][1248]|b1", str(text)):
            raise pickle.UnpicklingError(f"an array of dtype {text!r}")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple) -> None:
        _, byte_order, *_ = state
        self.dtype = self.dtype.newbyteorder(byte_order)


class PickledArray:
    """A pickled NumPy array: shape, dtype and bytes, checked against each other."""

    def __init__(self, *_: object):
        self.tensor = torch.empty(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        if isinstance(data, str):
            data = data.encode("latin1")
        self.tensor = rebuild_array(data, dtype, shape, "F" if fortran else "C")


def rebuild_array(data: bytes, dtype: PickledType, shape: tuple[int, ...], order: str) -> Tensor:
    array = np.frombuffer(bytes(data), dtype.dtype).reshape(shape, order=order)
    return torch.from_numpy(array.astype(dtype.dtype.newbyteorder("=")))


def rebuild_scalar(dtype: PickledType, data: bytes) -> float | int | bool:
    return rebuild_array(data, dtype, (), "C").item()


def say_fresh(what: str, names: list[str]) -> None:
    """One line: the model's tensors that a file gave nothing for."""
    if names:
        print_main(
            f"{what}: {len(names)} of the model's tensors are not in it, or of another shape, and "
            f"start afresh: {first_of(names, 5)}"
        )


def encode_latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


def no_bytes() -> bytes:
    """How old protocols write an empty array's bytes."""
    return b""


# NumPy's arrays and numbers in checkpoints, under the names that its versions gave them.
NUMPY = [
    PickledArray,
    PickledType,
    (PickledArray, "numpy.ndarray"),
    (PickledType, "numpy.dtype"),
    (encode_latin1, "_codecs.encode"),
    (no_bytes, "builtins.bytes"),
    (no_bytes, "__builtin__.bytes"),
]
for package in ("numpy.core", "numpy._core"):
    NUMPY += [
        (PickledArray, f"{package}.multiarray._reconstruct"),
        (rebuild_scalar, f"{package}.multiarray.scalar"),
        (rebuild_array, f"{package}.numeric._frombuffer"),
    ]


def without_arrays(content: object) -> object:
    """A checkpoint's content with tensors in the place of NumPy's arrays."""
    if isinstance(content, PickledArray):
        return content.tensor
    if type(content) in (dict, OrderedDict):
        return type(content)((k, without_arrays(v)) for k, v in content.items())
    if type(content) in (list, tuple):
        return type(content)(map(without_arrays, content))
    return content
