"""Checkpoints: written whole, read without being executed, loaded strictly. Other people's weights
are in `weights.py`.
"""

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
WRAPPERS = ("module.", "_orig_mod.")


def save(path: Path, previous: Path | None = None, **content: object) -> None:
    """Write a checkpoint so that `path` is always whole: the old one (kept as `previous`, where
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
        raise UserError(
            f"{what} {path}", "holds no model", "give a checkpoint of train.py or a model_final.pth"
        )
    return content


class UnreadableCheckpoint(UserError):
    """A file of tensors that is gone or not whole, so that another one must take its place."""


def read_torch(path: Path, what: str) -> object:
    if path.is_dir():
        there = (path / "last.pt").is_file()
        raise UnreadableCheckpoint(
            what, "is a folder", f"did you mean {path / 'last.pt'}?" if there else "give a file"
        )
    if not path.is_file():
        folder = path.parent.is_dir() or path.parent.name == ""
        raise UnreadableCheckpoint(
            what,
            "no such file",
            did_you_mean_file(path if folder else path.parent, "check the path"),
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
    except (
        Exception
    ) as error:  # torch raises many kinds, with advice to load such a file all the same
        if found := re.search(
            r"[Uu]nsupported (?:global|class|operand|type)\S*(?: GLOBAL)? ?([\w.]+\.\w+)",
            str(error),
        ):
            why = f"cannot be read as tensors (it holds a {found[1]}, which would have to be run)"
            raise UnreadableCheckpoint(
                what, why, "where it was written, save tensors and plain values alone"
            ) from None
        if found := re.search(r"an array of [^;\n]{1,60}", str(error)):
            raise UnreadableCheckpoint(
                what, f"cannot be read as tensors (it holds {found[0]})", "save it as numbers"
            ) from None
        raise UnreadableCheckpoint(
            what, "cannot be read as tensors (broken, or more than tensors)", "check the file"
        ) from None


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

    Raises UserError also for weights that are not finite, which would give labels all the same.
    """
    own = module.state_dict()
    if not isinstance(state, dict) or not all(
        isinstance(tensor, Tensor) for tensor in state.values()
    ):
        raise UserError(what, "holds something else where a state dict should be", hint)
    state = unwrapped(state, what)
    problems = [f"{k} is missing" for k in own if k not in state] + [
        f"{k} is unknown" for k in state if k not in own
    ]
    for k in own.keys() & state.keys():
        if state[k].shape != own[k].shape:
            problems.append(f"{k} has shape {tuple(state[k].shape)}, not {tuple(own[k].shape)}")
    if problems:
        raise UserError(what, f"does not fit: {first_of(problems, 3)}", hint)
    check_finite(state, what)
    module.load_state_dict(state)


def unwrapped(state: State, what: str) -> State:
    """A state dict without what DataParallel ("module."), torch.compile ("_orig_mod.") or a trainer
    put before every name.
    """
    prefix = ""
    while all(name.startswith(WRAPPERS) for name in state) and state:
        first = next(wrapper for wrapper in WRAPPERS if next(iter(state)).startswith(wrapper))
        if not all(name.startswith(first) for name in state):
            break
        state, prefix = (
            {name.removeprefix(first): tensor for name, tensor in state.items()},
            prefix + first,
        )
    if prefix:
        print_main(f"{what}: {prefix!r} is taken off all names")
    return state


def check_finite(state: State, what: str) -> None:
    """UserError for weights with NaN or infinity in them."""
    known = {
        k: tensor
        for k, tensor in state.items()
        if tensor.is_floating_point() and not tensor.is_meta
    }
    broken = [k for k, tensor in known.items() if not tensor.isfinite().all()]
    if broken:
        why = f"holds numbers that are not finite, in {first_of(broken, 3)}"
        raise UserError(what, why, "take another checkpoint; casts to half precision may do that")


def say_loaded(what: str, loaded: int, dropped: list[str]) -> None:
    """One line: how many tensors were used, and every name that was not (many of one module as
    `module.*`).
    """
    modules = Counter(
        name.rpartition(".")[0].split(".resblocks")[0].split(".layer")[0] for name in dropped
    )
    names = []
    for name in dropped:
        module = name.rpartition(".")[0].split(".resblocks")[0].split(".layer")[0]
        names.append(name if modules[module] < 4 else f"{module}.* ({modules[module]})")
    print_main(
        f"{what}: {loaded} tensors loaded, {len(dropped)} dropped"
        + ": " * bool(names)
        + ", ".join(dict.fromkeys(names))
    )


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


class CheckpointKind:
    """A pickled NumPy dtype, as text: nothing of NumPy's own reads what the file says."""

    def __init__(self, text: str, *_: object):
        if not re.fullmatch(r"[fiu][1248]|b1", str(text)):
            raise pickle.UnpicklingError(f"an array of kind {text!r}")
        self.text, self.order = text, "="

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "|", "=") or any(state[2:5]):
            raise pickle.UnpicklingError("an array of a structured kind")
        self.order = state[1]


class PickledArray:
    """A pickled NumPy array: shape, kind and bytes, checked against each other."""

    def __init__(self, *_: object):
        self.array = np.zeros(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, columns_first, data = state
        self.fill(
            data.encode("latin1") if isinstance(data, str) else data,
            kind,
            shape,
            "F" if columns_first else "C",
        )

    def fill(
        self, data: bytes, kind: CheckpointKind, shape: tuple[int, ...], order: str
    ) -> "PickledArray":
        # frombuffer refuses an empty one.
        array = (
            np.frombuffer(bytes(data), np.dtype(kind.order + kind.text)) if data else np.zeros(0)
        )
        self.array = array.reshape(shape, order=order).astype(kind.text)
        return self


class PickledNumber(PickledArray):
    """A pickled NumPy number."""


def rebuild_scalar(kind: CheckpointKind, data: bytes) -> PickledArray:
    return PickledNumber().fill(data, kind, (), "C")


def rebuild_array(
    data: bytes, kind: CheckpointKind, shape: tuple[int, ...], order: str
) -> PickledArray:
    return PickledArray().fill(data, kind, shape, order)


# NumPy's arrays and numbers in checkpoints, under the names that its versions gave them.
NUMPY = [
    PickledArray,
    PickledNumber,
    CheckpointKind,
    (PickledArray, "numpy.ndarray"),
    (CheckpointKind, "numpy.dtype"),
]
NUMPY += [
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
    """A checkpoint's content with tensors in the place of NumPy's arrays, and plain numbers in that
    of its numbers.
    """
    if isinstance(content, PickledNumber):
        return content.array.item()
    if isinstance(content, PickledArray):
        return torch.from_numpy(content.array)
    if type(content) in (dict, OrderedDict):
        return type(content)((k, without_arrays(v)) for k, v in content.items())
    if type(content) in (list, tuple):
        return type(content)(map(without_arrays, content))
    return content
