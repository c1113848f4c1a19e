"""Everything that reads a file of tensors: checkpoints (ours and the original's), CLIP's weights,
ImageNet backbones, learned prompts, published models; and segmenters built from them.

No file is ever executed: `weights_only=True`, TorchScript archives read for their tensors,
unpicklers that allow a list of names.
"""

import gzip
import importlib
import math
import os
import pickle
import re
import sys
import tomllib
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, Swin_B_Weights

from zsseg.backbone import SmallResNet
from zsseg.clip import CLIP, ConvStem, build_clip
from zsseg.config import CONFIGS, ClipConfig, Config, load_config
from zsseg.datasets import dataset
from zsseg.download import fetch
from zsseg.maskformer import MaskFormer
from zsseg.per_pixel import OneStage, PerPixel
from zsseg.prompts import build_prompt
from zsseg.segmenter import Segmenter
from zsseg.tokenizer import BYTES_ONLY, Tokenizer
from zsseg.utils import (
    UserError,
    cache_dir,
    did_you_mean,
    digest,
    expand_path,
    join_some,
    no_such_file,
    print_main,
    warn,
)

State = dict[str, Tensor]

# --- files of tensors


class UnreadableFile(UserError):
    """A file of tensors that is missing or broken, so that another one may take its place."""


class NumberType:
    """A pickled NumPy dtype, numbers only. NumPy's own unpickling would follow the pointers of a
    forged one.
    """

    def __init__(self, text: str, *_: object):
        if not re.fullmatch(r"[fiu][1248]|b1", str(text)):
            raise pickle.UnpicklingError(f"an array of dtype {text!r}")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """A pickled NumPy array: shape, dtype and bytes, checked against each other."""

    def __init__(self, *_: object):
        self.tensor = torch.empty(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        self.tensor = read_array(data, dtype, shape, "F" if fortran else "C")


def read_array(data: bytes, kind: NumberType, shape: tuple[int, ...], order: str) -> Tensor:
    array = np.frombuffer(bytes(data), kind.dtype).reshape(shape, order=order)
    return torch.from_numpy(array.astype(kind.dtype.newbyteorder("=")))


# NumPy's arrays and numbers in pickles of every protocol, by the names of its versions 1 and 2.
ARRAYS = {
    "numpy.ndarray": Array,
    "numpy.dtype": NumberType,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),
    "builtins.bytes": lambda: b"",  # of an empty array
    "__builtin__.bytes": lambda: b"",
}
for package in ("numpy.core", "numpy._core"):
    ARRAYS |= {
        f"{package}.multiarray._reconstruct": Array,
        f"{package}.multiarray.scalar": lambda kind, data: read_array(data, kind, (), "C").item(),
        f"{package}.numeric._frombuffer": read_array,
    }


def with_tensors(content: object) -> object:
    """Plain containers with tensors in the place of arrays."""
    if isinstance(content, Array):
        return content.tensor
    if isinstance(content, dict):
        return {key: with_tensors(value) for key, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(map(with_tensors, content))
    return content


def read_torch(path: Path, what: str) -> object:
    """The content of a file of `torch.save`, tensors and plain values, on the CPU. Raises
    UnreadableFile, or UserError for a disk that fails.
    """
    if path.is_dir():
        last = path / "last.pt"
        todo = f"did you mean {last}?" if last.is_file() else "give a file"
        raise UnreadableFile(what, "is a folder", todo)
    if not path.is_file():
        raise UnreadableFile(*no_such_file(what, path).args)
    allowed = [(value, name) for name, value in ARRAYS.items()]
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                refuse_compressed(archive.infolist())
        with torch.serialization.safe_globals(allowed):
            return with_tensors(torch.load(path, map_location="cpu", weights_only=True))
    except OSError as error:
        raise UserError(what, f"cannot be read ({error})", "check the disk") from None
    except MemoryError:
        raise
    except Exception as error:  # torch raises many types, with advice to load such a file anyway
        reason = re.search(r"[Uu]nsupported \w+:? (GLOBAL )?[\w.]+|an array of [^;\n]+", str(error))
        why = f"cannot be read as tensors ({reason[0] if reason else 'broken'})"
        todo = "check the file; it may contain only tensors and plain values"
        raise UnreadableFile(what, why, todo) from None


def refuse_compressed(entries: list[zipfile.ZipInfo]) -> None:
    """torch compresses neither tensors nor what describes them; a small file could fill the
    memory.
    """
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED and "/code/" not in entry.filename:
            raise pickle.UnpicklingError(f"{entry.filename} is compressed")


class ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays and plain containers (detectron2's .pkl) and refuses everything else."""

    def find_class(self, module: str, name: str) -> object:
        allowed = ARRAYS | {"collections.OrderedDict": OrderedDict}
        if f"{module}.{name}" not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return allowed[f"{module}.{name}"]


def read_pickle(path: Path, what: str) -> object:
    """A detectron2 model-zoo file with tensors in the place of arrays."""
    try:
        with open(path, "rb") as file:
            return with_tensors(ArrayUnpickler(file, encoding="latin1").load())
    except FileNotFoundError:
        raise no_such_file(what, path) from None
    except Exception as error:  # a broken pickle raises anything
        why = f"{path} cannot be read as arrays ({error!r:.200})"
        raise UserError(what, why, "replace or delete it") from None


STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.LongStorage": torch.int64,
}


def is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # not a zip file: read_torch says what it is
        return False


class ScriptUnpickler(pickle.Unpickler):
    """Reads the object tree of a TorchScript archive: modules become plain attribute holders,
    nothing is called.
    """

    class Module:
        def __setstate__(self, state: dict) -> None:
            self.__dict__.update(state)

    def __init__(self, archive: zipfile.ZipFile, prefix: str):
        super().__init__(archive.open(prefix + "data.pkl"))
        self.archive, self.prefix = archive, prefix

    def find_class(self, module: str, name: str) -> object:
        if module.startswith("__torch__"):
            return type(name, (self.Module,), {})
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        allowed = STORAGES | {
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "collections.OrderedDict": OrderedDict,
        }
        if f"{module}.{name}" not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return allowed[f"{module}.{name}"]

    @staticmethod
    def tensor(
        storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: object
    ) -> Tensor:
        if math.prod(size) > len(storage):
            raise pickle.UnpicklingError(f"a tensor of shape {size} from {len(storage)} numbers")
        return torch.as_strided(storage, size, stride, offset).clone()

    def persistent_load(self, key: tuple) -> Tensor:
        _, dtype, name, _, _ = key
        data = bytearray(self.archive.read(f"{self.prefix}data/{name}"))
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def read_torchscript(path: Path, what: str) -> State:
    """Every tensor of a TorchScript archive under its attribute path."""
    state = {}

    def collect(module: object, name: str) -> None:
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                state[name + key] = value
            elif isinstance(value, ScriptUnpickler.Module):
                collect(value, f"{name}{key}.")

    try:
        with zipfile.ZipFile(path) as archive:
            refuse_compressed([entry for entry in archive.infolist() if "/data" in entry.filename])
            constants = next(n for n in archive.namelist() if n.endswith("/constants.pkl"))
            collect(ScriptUnpickler(archive, constants.removesuffix("constants.pkl")).load(), "")
    except Exception as error:  # a broken archive raises anything
        why = f"{path} cannot be read ({error!r:.200})"
        raise UserError(what, why, "delete it to download it again") from None
    return state


# --- state dicts


def load_checkpoint(path: str | Path, what: str = "checkpoint") -> dict:
    """A checkpoint of ours ({"config", "step", "model", ...}) or the original's ({"model": ...}),
    on the CPU.
    """
    content = read_torch(Path(path), f"{what} {path}")
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        todo = "give a checkpoint of train.py or a model_final.pth"
        raise UserError(f"{what} {path}", "contains no model", todo)
    return content


def strip_prefix(state: object, what: str) -> State:
    """A state dict without what DataParallel ("module."), torch.compile ("_orig_mod.") or a trainer
    put before every name. UserError for anything else than a state dict.
    """
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(what, "is not a state dict", "give a file of names and tensors")
    prefix = re.match(r"(module\.|_orig_mod\.)*", os.path.commonprefix(list(state)))[0]  # noqa: RUF071
    if prefix:
        print_main(f"{what}: prefix {prefix!r} removed from all names")
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def inner_state(content: object, what: str) -> State:
    """The state dict in a file of others', which may put it below "model" or "state_dict"."""
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    return strip_prefix(content, what)


def check_finite(state: State, what: str) -> None:
    """UserError for weights with NaN/Inf in them, which would give labels all the same."""
    broken = [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all()
    ]
    if broken:
        todo = "take another checkpoint; casts to half precision may do that"
        raise UserError(what, f"contains NaN/Inf, in {join_some(broken, 3)}", todo)


def load_into(
    module: nn.Module, state: object, what: str, todo: str, strict: bool = True
) -> list[str]:
    """Load the tensors of a state dict that fit a module by name and shape; returns the names of
    the others, and prints which of the module's start afresh.

    Raises UserError for NaN/Inf, if nothing fits or, with `strict`, if anything does not fit; the
    module is then as before.
    """
    state = strip_prefix(state, what)
    own = module.state_dict()
    fits = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    missing = [k for k in own if k not in fits]
    unused = [k for k in state if k not in fits]
    if strict and (missing or unused):
        problems = [f"{k} is missing" for k in missing if k not in state]
        problems += [f"{k} is unknown" for k in unused if k not in own]
        for k in own.keys() & set(unused):
            shapes = (tuple(state[k].shape), tuple(own[k].shape))
            problems.append("{} has shape {}, not {}".format(k, *shapes))
        raise UserError(what, f"does not fit: {join_some(problems, 3)}", todo)
    if not fits:
        raise UserError(what, "has no weight that fits", todo)
    check_finite(fits, what)
    module.load_state_dict(fits, strict=False)
    if missing:
        names = join_some(missing, 5)
        print_main(f"{what}: {len(missing)} of the model's tensors start afresh: {names}")
    return unused


def log_loaded(what: str, count: int, dropped: list[str]) -> None:
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
    print_main(f"{what}: {count} tensors loaded, {len(dropped)} dropped{text}")


# --- names of the original

BLOCK = r"backbone\.res(?P<stage>[2-5])\.(?P<block>\d+)\."
BLOCK_TO = "maskformer.backbone.layer{stage-1}.{block}."
SWIN = r"backbone\.layers\.(?P<i>\d)\.blocks\.(?P<block>\d+)\."
SWIN_TO = "maskformer.backbone.features.{2i+1}.{block}."
PIXEL, PIXEL_TO = r"sem_seg_head\.pixel_decoder\.", "maskformer.pixel_decoder."
HEAD = r"sem_seg_head\.predictor\."
LAYER = HEAD + r"transformer\.decoder\.layers\.(?P<i>\d+)\."
LEAF = r"(?P<leaf>\w+)"
ADAPTER = r"(?P<region>(?:_region_)?)clip_adapter\."
# (pattern of the original's name, our name); {x} is a named group, {x-1} and {2x} a number made
# from one. Our names begin with a part: "maskformer", "clip" or "prompt", and the last two also
# with "region_" for a separate region adapter.
NAMES = [
    (r"backbone\.stem\.conv1\.(?P<leaf>weight)", "maskformer.backbone.conv1.{leaf}"),
    (r"backbone\.stem\.conv1\.norm\." + LEAF, "maskformer.backbone.bn1.{leaf}"),
    (BLOCK + r"conv(?P<i>[123])\.weight", BLOCK_TO + "conv{i}.weight"),
    (BLOCK + r"conv(?P<i>[123])\.norm\." + LEAF, BLOCK_TO + "bn{i}.{leaf}"),
    (BLOCK + r"shortcut\.weight", BLOCK_TO + "downsample.0.weight"),
    (BLOCK + r"shortcut\.norm\." + LEAF, BLOCK_TO + "downsample.1.{leaf}"),
    (r"backbone\.patch_embed\.proj\." + LEAF, "maskformer.backbone.features.0.0.{leaf}"),
    (r"backbone\.patch_embed\.norm\." + LEAF, "maskformer.backbone.features.0.2.{leaf}"),
    (SWIN + r"mlp\.fc1\." + LEAF, SWIN_TO + "mlp.0.{leaf}"),
    (SWIN + r"mlp\.fc2\." + LEAF, SWIN_TO + "mlp.3.{leaf}"),
    (SWIN + r"(?P<rest>(?:norm[12]|attn\.qkv|attn\.proj|attn)\.\w+)", SWIN_TO + "{rest}"),
    (
        r"backbone\.layers\.(?P<i>\d)\.downsample\.(?P<rest>.+)",
        "maskformer.backbone.features.{2i+2}.{rest}",
    ),
    (r"backbone\.(?P<rest>norm[0-3]\.\w+)", "maskformer.backbone.{rest}"),
    (PIXEL + r"adapter_(?P<i>[123])\.weight", PIXEL_TO + "lateral.{i-1}.0.weight"),
    (PIXEL + r"adapter_(?P<i>[123])\.norm\." + LEAF, PIXEL_TO + "lateral.{i-1}.1.{leaf}"),
    (PIXEL + r"layer_(?P<i>[123])\.weight", PIXEL_TO + "output.{i-1}.0.weight"),
    (PIXEL + r"layer_(?P<i>[123])\.norm\." + LEAF, PIXEL_TO + "output.{i-1}.1.{leaf}"),
    (PIXEL + r"layer_4\.weight", PIXEL_TO + "top.0.weight"),
    (PIXEL + r"layer_4\.norm\." + LEAF, PIXEL_TO + "top.1.{leaf}"),
    (PIXEL + r"mask_features\." + LEAF, PIXEL_TO + "mask_features.{leaf}"),
    (LAYER + r"(?P<rest>(?:self_attn|linear[12]|norm[123])\..+)", "maskformer.layers.{i}.{rest}"),
    (LAYER + r"multihead_attn\.(?P<rest>.+)", "maskformer.layers.{i}.cross_attn.{rest}"),
    (HEAD + r"transformer\.decoder\.norm\." + LEAF, "maskformer.norm.{leaf}"),
    (HEAD + r"(?P<rest>(?:query_embed|input_proj)\.\w+)", "maskformer.{rest}"),
    (
        HEAD + r"(?P<mlp>class_embed|mask_embed)\.layers\.(?P<i>\d)\." + LEAF,
        "maskformer.{mlp}.{2i}.{leaf}",
    ),
    (HEAD + r"class_embed\." + LEAF, "maskformer.class_embed.{leaf}"),
    (HEAD + r"(?P<leaf>weight|bias)", "maskformer.pixel_embed.{leaf}"),  # the per-pixel baseline
    (r"clip_adapter\.non_object_embedding", "maskformer.non_object"),
    (ADAPTER + r"clip_model\.(?P<rest>.+)", "{region}clip.{rest}"),
    (ADAPTER + r"prompt_learner\.(?P<rest>prefix)_prompt", "{region}prompt.{rest}"),
]
DEEP_STEM = [  # R101c: conv1 is a sequence of convolution, norm, relu, and so on
    (rf"backbone\.stem\.conv{i}\.{norm}" + LEAF, f"maskformer.backbone.{ours}.{{leaf}}")
    for (i, norm), ours in {
        (1, ""): "conv1.0",
        (1, r"norm\."): "conv1.1",
        (2, ""): "conv1.3",
        (2, r"norm\."): "conv1.4",
        (3, ""): "conv1.6",
        (3, r"norm\."): "bn1",
    }.items()
]
# Constants of the original's modules that ours contain or compute, and the unused column of
# the region adapter.
DROPPED = (
    r"criterion\.empty_weight|_region_clip_adapter\.non_object_embedding|(?:_region_)?clip_adapter\."
    r"(?:pixel_(?:mean|std)|prompt_learner\.(?:start|dot|end|pad)_signal)"
    r"|.+\.(?:relative_position_index|attn_mask)"
)


def our_name(name: str, deep_stem: bool = False) -> str | None:
    """Our name for a parameter of the original, None where it is dropped. Raises KeyError for an
    unknown name.
    """
    if re.fullmatch(DROPPED, name):
        return None
    for pattern, ours in DEEP_STEM + NAMES if deep_stem else NAMES:
        if match := re.fullmatch(pattern, name):
            groups = match.groupdict()
            numbers = {key: int(text) for key, text in groups.items() if text.isdecimal()}
            for key, number in numbers.items():
                groups[f"{key}-1"] = number - 1
                for n in ("", 1, 2):
                    groups[f"2{key}+{n}".removesuffix("+")] = 2 * number + (n or 0)
            return ours.format(**groups).removeprefix("_")
    raise KeyError(name)


def import_original(state: State, what: str, strict: bool = True) -> tuple[dict, list[str]]:
    """The original's state dict -> ({part: state dict of ours}, names that were dropped).

    Parts: "maskformer", "clip", "prompt" and, for a separate region adapter, "region_prompt" (its
    CLIP must be the same, since it is frozen). An unknown name is a UserError or, not `strict`,
    dropped.
    """
    parts: dict[str, State] = {}
    dropped = []
    state = strip_prefix(state, what)
    deep_stem = "backbone.stem.conv3.weight" in state
    for name, tensor in state.items():
        try:
            ours = our_name(name, deep_stem)
        except KeyError:
            if strict:
                todo = "give a checkpoint of zsseg.baseline"
                raise UserError(what, f"has an unknown entry {name}", todo) from None
            ours = None
        if ours is None:
            dropped.append(name)
        else:
            part, _, key = ours.partition(".")
            parts.setdefault(part, {})[key] = tensor
    for key, tensor in parts.pop("region_clip", {}).items():
        if not torch.equal(tensor, parts.get("clip", {}).get(key, torch.empty(0))):
            raise UserError(what, "has two different CLIPs", "only one shared CLIP is supported")
        dropped.append(f"_region_clip_adapter.clip_model.{key}")
    return parts, dropped


def model_parts(content: dict, what: str, strict: bool = True) -> tuple[dict, list[str], str]:
    """A checkpoint, ours or the original's -> ({part: state dict}, names that were dropped, the
    digest of the CLIP that it was made for, "" if unknown).
    """
    if "config" in content:
        parts = {part: strip_prefix(state, what) for part, state in content["model"].items()}
        return parts, [], content.get("clip", "")
    parts, dropped = import_original(content["model"], what, strict)
    return parts, dropped, clip_digest(parts.get("clip"))


# --- CLIP

OPENAI = "https://openaipublic.azureedge.net/clip/models"
OPENAI_MODELS = {  # name: SHA-256 of the file
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
CONSTANTS = ("input_resolution", "context_length", "vocab_size")  # that OpenAI's files hold
VOCABULARY = (
    "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
    "sha256:924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
)


def load_clip(section: ClipConfig, root: Path) -> CLIP:
    """The CLIP of `clip.weights`: an OpenAI name (downloaded to the cache), or a file with OpenAI's
    names, an archive or a state dict; `{root}` is the data root. Of a file that is neither OpenAI's
    nor our small one's, `clip.activation` must be given.
    """
    name = section.weights.replace("{root}", str(root))
    what = f"clip.weights {name}"
    path = clip_file(section.weights, Path(name), what)
    content = read_torchscript(path, what) if is_torchscript(path) else read_torch(path, what)
    state = inner_state(content, what)
    known = section.weights in OPENAI_MODELS or "visual.conv1.tokens.weight" in state
    if not known and not section.activation:
        todo = "set clip.activation to quickgelu (OpenAI's) or gelu (most of LAION's)"
        raise UserError(what, "does not tell its activation", todo)
    dropped = [key for key in CONSTANTS if key in state]
    check_finite(state, what)
    log_loaded(what, len(state) - len(dropped), dropped)
    if not known:
        options = ("activation", "heads", "mean", "std", "scale")
        taken = ", ".join(f"clip.{key} = {getattr(section, key)}" for key in options)
        print_main(f"{what}: taken for a CLIP with {taken}")
    return make_clip(state, section)


def clip_file(weights: str, path: Path, what: str) -> Path:
    if weights in OPENAI_MODELS:
        checksum = OPENAI_MODELS[weights]
        file = re.sub("[/@]", "-", f"{weights}.pt")
        return fetch(
            [f"{OPENAI}/{checksum}/{file}"], cache_dir() / file, f"sha256:{checksum}", what
        )
    if not path.is_file():
        todo = did_you_mean(weights, OPENAI_MODELS, "give a file or the name of OpenAI's model")
        if "{root}" in weights:
            todo = "give the --root that contains it, or run prepare_data.py shapes"
        raise UserError(what, "no such file", todo)
    return path


def make_clip(state: State, section: ClipConfig) -> CLIP:
    """CLIP from its weights, and from what they do not tell."""
    sizes = []
    for name in ("token_embedding.weight", "positional_embedding"):
        sizes += [*state.get(name, torch.empty(0)).shape, 0][:1]
    options = (section.heads, section.mean, section.std, section.scale)
    return build_clip(state, load_tokenizer(*sizes), section.activation or "quickgelu", *options)


def load_tokenizer(vocab_size: int, context_length: int) -> Tokenizer:
    """A tokenizer with the first merges of OpenAI's vocabulary file ($ZSSEG_VOCAB, else the cache,
    else downloaded), as many as `vocab_size` has room for.
    """
    count = max(vocab_size - BYTES_ONLY, 0)
    if not count:
        return Tokenizer(vocab_size, context_length)
    given = os.environ.get("ZSSEG_VOCAB")
    path = expand_path(given or cache_dir() / "bpe_simple_vocab_16e6.txt.gz")
    what = f"BPE vocabulary {path}"
    url, checksum = VOCABULARY
    if not given:
        fetch([url], path, checksum, "BPE vocabulary")
    todo = "set ZSSEG_VOCAB to bpe_simple_vocab_16e6.txt.gz, or delete it to download it again"
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(what, f"cannot be read ({error})", todo) from None
    merges = [tuple(line.split()) for line in lines[1 : count + 1]]  # the first line is a version
    if len(merges) < count or any(len(merge) != 2 for merge in merges):
        raise UserError(what, f"has fewer than {count} merges", todo)
    return Tokenizer(vocab_size, context_length, merges)


def clip_digest(clip: CLIP | State | None) -> str:
    """16 hex digits of a CLIP's weights, the same in half precision and fp32, on a CPU and a GPU;
    "" without a CLIP. A sum of the bits of each tensor: no two CLIPs agree in all.
    """
    if not clip:
        return ""
    state = clip if isinstance(clip, dict) else clip.state_dict()
    sums = {
        name: [list(tensor.shape), int(tensor.float().view(torch.int32).sum(dtype=torch.int64))]
        for name, tensor in state.items()
        if name not in CONSTANTS
    }
    return digest(sums)


def check_clip(what: str, made_for: str, clip: CLIP | None) -> None:
    """Say it if weights that compare with CLIP's features were made for another CLIP."""
    if clip is not None and made_for and made_for != clip_digest(clip):
        warn(f"{what} was made for another CLIP than clip.weights")


# --- backbones

BACKBONE_FILES = {  # no checksum is published; the reader executes nothing
    "R-50.pkl": "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/torchvision/R-50.pkl",
    "R-103.pkl": "https://dl.fbaipublicfiles.com/detectron2/DeepLab/R-103.pkl",
    "swin_base_patch4_window12_384_22k.pth": (
        "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
        "swin_base_patch4_window12_384_22k.pth"
    ),
}
IMAGENET = {"R50": ResNet50_Weights.IMAGENET1K_V1, "SwinB": Swin_B_Weights.IMAGENET1K_V1}


def load_backbone(backbone: nn.Module, name: str, weights: str, clip: CLIP | None = None) -> None:
    """Initial weights (`model.weights`) of the backbone `name`: a torchvision `.pth`, a detectron2
    `.pkl`, Swin's own `.pth`, "imagenet" or, for the small one, "clip": the small CLIP's.

    "imagenet" (R50, SwinB) and the names in `BACKBONE_FILES`, unless there is such a file, are
    downloaded. All of a ResNet's must be there; of a Swin what fits: position biases of windows of
    7 do not, and the norms of the four maps are in no file.
    """
    what = f"model.weights {weights}"
    dropped = []
    if weights == "clip":
        stem = getattr(clip.visual, "conv1", None) if clip else None
        if not isinstance(stem, ConvStem) or not isinstance(backbone, SmallResNet):
            todo = "give a file, or leave it out: --set model.weights="
            raise UserError(what, "is for the small backbone and the small CLIP", todo)
        state = stem.backbone.state_dict()
    else:
        state = inner_state(read_backbone(name, weights, what), what)
    if "stem.conv1.weight" in state or "patch_embed.proj.weight" in state:  # others' names
        state = {f"backbone.{key}": tensor for key, tensor in state.items()}
        parts, dropped = import_original(state, what, strict=False)
        state = parts["maskformer"]
    state = {key.removeprefix("backbone."): tensor for key, tensor in state.items()}
    own = backbone.state_dict()
    others = [key for key in state if key not in own]  # a classifier, counters
    used = {key: tensor for key, tensor in state.items() if key in own}
    others += load_into(backbone, used, what, f"give weights of {name}", strict=name != "SwinB")
    others += [key.removeprefix("backbone.") for key in dropped]
    log_loaded(what, len(state) + len(dropped) - len(others), others)


def read_backbone(name: str, weights: str, what: str) -> object:
    """The content of a backbone's file."""
    path = Path(weights)
    if weights in BACKBONE_FILES and not path.exists():
        path = fetch([BACKBONE_FILES[weights]], cache_dir() / weights, "", what)
    if weights != "imagenet":
        return read_pickle(path, what) if path.suffix == ".pkl" else read_torch(path, what)
    if name not in IMAGENET:
        raise UserError(what, f"torchvision has none for {name}", "set model.weights=R-103.pkl")
    try:
        return IMAGENET[name].get_state_dict(model_dir=cache_dir(), check_hash=True)
    except OSError as error:
        todo = "give a file as model.weights"
        raise UserError(what, f"cannot be downloaded ({error})", todo) from None


# --- segmenters


def build_segmenter(
    config: Config, root: Path, saved: dict[str, State] | None = None
) -> Segmenter | OneStage:
    """A segmenter to train: the configuration's CLIP, prompts and initial backbone, else fresh
    weights; over them those of the checkpoint `train.init`, as far as they fit.

    With `saved`, the learned parts of a run that is resumed, nothing else is read.
    """
    if config.model.proposer:
        why = "gives masks that nothing trains"
        raise UserError("model.proposer", why, "leave it out of a training")
    clip = load_clip(config.clip, root) if config.model.class_head == "text" else None
    segmenter = assemble(config, clip)
    if saved is not None:
        load_learned(segmenter, saved, "last.pt")
        return segmenter
    model = config.model
    if model.weights:
        load_backbone(segmenter.maskformer.backbone, model.backbone, model.weights, clip)
    parts = start_from(segmenter, config.train.init) if config.train.init else {}
    if config.clip.prompts:
        parts |= read_prompts(config.clip.prompts, clip)
    load_learned(segmenter, parts | {"maskformer": segmenter.maskformer.state_dict()}, "prompts")
    return segmenter


def load_segmenter(
    content: dict, config: Config, root: Path, name: str | Path
) -> Segmenter | OneStage:
    """The segmenter of a loaded checkpoint, ours or the original's."""
    what = f"checkpoint {name}"
    ours = "config" in content
    parts, dropped, made_for = model_parts(content, what)
    clip = None
    if config.model.class_head == "text":
        if not ours and "clip" not in parts:
            todo = "give a zero-shot checkpoint of zsseg.baseline"
            raise UserError(what, "contains no CLIP", todo)
        clip = load_clip(config.clip, root) if ours else make_clip(parts["clip"], config.clip)
    segmenter = assemble(config, clip)
    recorded = load_config(base=content["config"]).clip.prompts if ours and parts else ""
    prompts = {}
    if config.clip.prompts != recorded:  # else the checkpoint contains them
        prompts = read_prompts(config.clip.prompts, clip) if config.clip.prompts else {}
    load_learned(segmenter, parts | prompts, what)
    if ours:
        check_clip(what, made_for, clip)
        return segmenter
    used = segmenter.learned_modules().keys() - prompts.keys()
    used |= {"clip"} if clip else set()
    dropped += [f"{part}.{key}" for part in parts.keys() - used for key in parts[part]]
    log_loaded(what, len(content["model"]) - len(dropped), dropped)
    return segmenter


def assemble(config: Config, clip: CLIP | None) -> Segmenter | OneStage:
    """A segmenter with fresh weights and this CLIP (None: the fully supervised MaskFormer)."""
    model = config.model
    section = config.clip
    if clip is None:
        num_classes = len(dataset(config.data).names)
        return Segmenter(MaskFormer(model, num_classes + 1), None, None, section)
    sizes = (clip.width, section.prompt_prefix)
    prompt = build_prompt(section.prompt, *sizes)
    # The paper's VOC setting: fixed prompts for the segmenter's head, learned ones for the regions.
    region_prompt = build_prompt(section.region_prompt, *sizes) if section.region_prompt else None
    if not model.proposals:
        return OneStage(PerPixel(model, clip.embed_dim, clip.scale), clip, prompt, section)
    proposer = find_proposer(model.proposer) if model.proposer else None
    maskformer = None if proposer else MaskFormer(model, clip.embed_dim, clip.scale)
    return Segmenter(maskformer, clip, prompt, section, region_prompt, proposer)


def find_proposer(name: str) -> Callable:
    """The function that `model.proposer` names, "package.module:function"; modules in the current
    folder are found, too.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        todo = "give package.module:function"
        raise UserError(f"model.proposer {name}", f"cannot be imported ({error})", todo) from None
    if not callable(found):
        raise UserError(f"model.proposer {name}", "is not a function", "give one")
    return found


def load_learned(segmenter: Segmenter | OneStage, parts: dict[str, State], what: str) -> None:
    """Load the parts of a checkpoint; strict about every part that the segmenter learns."""
    for part, module in segmenter.learned_modules().items():
        todo = "use the configuration of its training"
        if part != "maskformer":
            todo = f"set clip.prompts and clip.prompt_prefix, or clip.{part} to a fixed prompt"
        if part not in parts:
            learned = "segmenter" if part == "maskformer" else f"learned {part}"
            raise UserError(what, f"has no {learned}", todo)
        load_into(module, parts[part], what, todo)


def start_from(segmenter: Segmenter | OneStage, file: str) -> dict[str, State]:
    """Load all weights of `train.init`, a segmenter's checkpoint, ours, the original's or a
    published model's, that fit by name and shape, and say which do not; returns its other parts.
    """
    what = f"train.init {file}"
    content = load_checkpoint(find_model(file, "train.init")[0], "train.init")
    parts, dropped, made_for = model_parts(content, what, strict=False)
    count = len(dropped) + sum(map(len, parts.values()))
    todo = "give a segmenter's checkpoint, and its [model]"
    maskformer = parts.pop("maskformer", {})
    unused = load_into(segmenter.maskformer, maskformer, what, todo, strict=False)
    dropped += [f"maskformer.{key}" for key in unused]
    for part in parts.keys() - segmenter.learned_modules().keys():
        dropped += [f"{part}.{key}" for key in parts[part]]
    log_loaded(what, count - len(dropped), dropped)
    check_clip(what, made_for, segmenter.clip)
    return parts


def read_prompts(path: str, clip: CLIP | None) -> dict[str, State]:
    """The learned prompt of a checkpoint (ours or the original's prompt learning), for head and
    regions alike.
    """
    what = f"clip.prompts {path}"
    parts, dropped, made_for = model_parts(load_checkpoint(path, "clip.prompts"), what)
    name = "prompt" if "prompt" in parts else "region_prompt"
    if name not in parts:
        raise UserError(what, "has no learned prompt", "give a checkpoint of prompt learning")
    others = [part for part in parts if part != name and "of_seed" not in part]
    dropped += [f"{part}.{key}" for part in others for key in parts[part]]
    log_loaded(what, len(parts[name]), dropped)
    check_clip(what, made_for, clip)
    return {"prompt": parts[name], "region_prompt": parts[name]}


# --- checkpoints by name

PUBLISHED = tomllib.loads((Path(__file__).parent / "published.toml").read_text("utf-8"))["model"]
# With the answer to what it would ask of a large file: that it is not scanned for viruses.
DRIVE = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"


def find_model(wanted: str | Path, what: str = "checkpoint") -> tuple[Path, Path | None]:
    """The file of a checkpoint and, if `wanted` names a published model, its configuration's.

    Such a model is downloaded to the cache once; a file or folder of that name comes first. "-"
    stands for no checkpoint. Raises UserError.
    """
    path = expand_path(wanted)
    name = str(wanted)
    given = name == "-" or path.suffix or len(path.parts) > 1
    if path.exists() or (name not in PUBLISHED and given):
        return path, None
    if name not in PUBLISHED:
        todo = f"give a file, or one of {', '.join(PUBLISHED)}"
        raise UserError(f"{what} {name}", "no such file or published model", todo)
    model = PUBLISHED[name]
    print_main(f"{name}: trained on {model['trained_on']}; licence: {model['licence']}")
    url = DRIVE.format(model["drive"])
    file = fetch([url], cache_dir() / model["file"], model["checksum"], name)
    return file, CONFIGS / f"{model['config']}.toml"


def checkpoint_and_config(
    path: str | Path, config: str | Path | None, settings: list[str]
) -> tuple[dict, Config]:
    """The content of a checkpoint, and its configuration with that of a file and settings put over
    it. "-": no checkpoint, for a `model.proposer`. Raises UserError.
    """
    if str(path) == "-":
        loaded = load_config(config, settings)
        if not loaded.model.proposer:
            todo = "give a checkpoint, or set model.proposer"
            raise UserError("checkpoint -", "stands for none", todo)
        return {"config": asdict(loaded), "model": {}, "trained": []}, loaded
    content = load_checkpoint(path)
    if "config" not in content and not config:
        raise UserError(f"checkpoint {path}", "contains no configuration", "give its --config")
    return content, load_config(config, settings, content.get("config"))
