"""Weight files: our checkpoints, the original's `model_final.pth`, CLIP and backbone weights.

No file is ever executed: `weights_only=True`, TorchScript archives read for their tensors, a restricted unpickler.
"""

import math
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights

from zsseg import run
from zsseg.download import fetch
from zsseg.run import UserError, cache_dir, nearest, nearest_file, replacing

State = dict[str, Tensor]


def save(path: Path, previous: Path | None = None, **content: object) -> None:
    """Write a checkpoint so that `path` is always whole: the old one (kept as `previous`, where given) or the new one."""
    with replacing(path, previous) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(0, str(error).partition("\n")[0]) from None


def load(path: str | Path) -> dict:
    """A checkpoint of ours ({"config", "step", "model", ...}) or the original's ({"model": ...}), on the CPU."""
    content = read_torch(Path(path), f"checkpoint {path}")
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"checkpoint {path}", "holds no model", "give a checkpoint of train.py or a model_final.pth")
    return content


class Unusable(UserError):
    """A file of tensors that is gone or not whole, so that another one must take its place."""


def read_torch(path: Path, what: str) -> object:
    if path.is_dir():
        there = (path / "last.pt").is_file()
        raise Unusable(what, "is a folder", f"did you mean {path / 'last.pt'}?" if there else "give a file")
    if not path.is_file():
        folder = path.parent.is_dir() or path.parent.name == ""
        raise Unusable(what, "no such file", nearest_file(path if folder else path.parent, "check the path"))
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                refuse_compressed(archive.infolist())
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(what, f"cannot be read ({error})", "check the disk") from None
    except MemoryError:
        raise
    except Exception:  # torch raises many kinds, with advice to load such a file all the same
        raise Unusable(what, "cannot be read as tensors (broken, or more than tensors)", "check the file") from None


def refuse_compressed(entries: list[zipfile.ZipInfo]) -> None:
    """torch compresses neither tensors nor what describes them; a small file could fill the memory."""
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED and "/code/" not in entry.filename:
            raise pickle.UnpicklingError(f"{entry.filename} is compressed")


def load_strict(module: nn.Module, state: State, what: str, hint: str) -> None:
    """`load_state_dict` whose complaint is one line: the first few missing, unknown and mis-shaped names."""
    own = module.state_dict()
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(what, "holds something else where a state dict should be", hint)
    problems = [f"{k} is missing" for k in own if k not in state] + [f"{k} is unknown" for k in state if k not in own]
    for k in own.keys() & state.keys():
        if state[k].shape != own[k].shape:
            problems.append(f"{k} has shape {tuple(state[k].shape)}, not {tuple(own[k].shape)}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(what, "does not fit: " + ", ".join(problems[:3]) + more, hint)
    module.load_state_dict(state)


BLOCK = r"backbone\.res(?P<stage>[2-5])\.(?P<block>\d+)\."
BLOCK_TO = "maskformer.backbone.layer{stage-1}.{block}."
PIXEL, PIXEL_TO = r"sem_seg_head\.pixel_decoder\.", "maskformer.pixel_decoder."
HEAD = r"sem_seg_head\.predictor\."
LAYER = HEAD + r"transformer\.decoder\.layers\.(?P<i>\d+)\."
LEAF = r"(?P<leaf>\w+)"
ADAPTER = r"(?P<region>(?:_region_)?)clip_adapter\."
# (pattern of the original's name, our name); {x} is a named group, {x-1} and {2x} a number made from one. Parts:
# "maskformer", "clip" and "prompt", and the last two once more with "region_" for a separate region adapter.
NAMES = [
    (r"backbone\.stem\.conv1\.(?P<leaf>weight)", "maskformer.backbone.conv1.{leaf}"),
    (r"backbone\.stem\.conv1\.norm\." + LEAF, "maskformer.backbone.bn1.{leaf}"),
    (BLOCK + r"conv(?P<i>[123])\.weight", BLOCK_TO + "conv{i}.weight"),
    (BLOCK + r"conv(?P<i>[123])\.norm\." + LEAF, BLOCK_TO + "bn{i}.{leaf}"),
    (BLOCK + r"shortcut\.weight", BLOCK_TO + "downsample.0.weight"),
    (BLOCK + r"shortcut\.norm\." + LEAF, BLOCK_TO + "downsample.1.{leaf}"),
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
    (HEAD + r"(?P<mlp>class_embed|mask_embed)\.layers\.(?P<i>\d)\." + LEAF, "maskformer.{mlp}.{2i}.{leaf}"),
    (HEAD + r"class_embed\." + LEAF, "maskformer.class_embed.{leaf}"),  # fully supervised MaskFormer
    (HEAD + r"(?P<leaf>weight|bias)", "maskformer.pixel_embed.{leaf}"),  # the per-pixel baseline
    (r"clip_adapter\.non_object_embedding", "maskformer.non_object"),
    (ADAPTER + r"clip_model\.(?P<rest>.+)", "{region}clip.{rest}"),
    (ADAPTER + r"prompt_learner\.(?P<rest>prefix|suffix)_prompt", "{region}prompt.{rest}"),
]
DEEP_STEM = [  # R101c: conv1 is a sequence of convolution, norm, relu, and so on
    (rf"backbone\.stem\.conv{i}\.{norm}" + LEAF, f"maskformer.backbone.{ours}.{{leaf}}")
    for (i, norm), ours in {(1, ""): "conv1.0", (1, r"norm\."): "conv1.1", (2, ""): "conv1.3", (2, r"norm\."): "conv1.4",
                            (3, ""): "conv1.6", (3, r"norm\."): "bn1"}.items()
]  # fmt: skip
# Constants of the original's modules that ours hold or compute themselves, and the unused column of the region adapter.
DROPPED = (r"criterion\.empty_weight|_region_clip_adapter\.non_object_embedding|(?:_region_)?clip_adapter\."
           r"(?:pixel_(?:mean|std)|prompt_learner\.(?:start|dot|end|pad)_signal)")  # fmt: skip


def our_name(name: str, deep_stem: bool = False) -> str | None:
    """Our name for a parameter of the original, None where it is dropped. Raises KeyError for an unknown name."""
    if re.fullmatch(DROPPED, name):
        return None
    for pattern, ours in (DEEP_STEM if deep_stem else []) + NAMES:
        if match := re.fullmatch(pattern, name):
            groups = match.groupdict()
            for key, text in match.groupdict().items():
                if text.isdecimal():
                    groups |= {f"{key}-1": str(int(text) - 1), f"2{key}": str(2 * int(text))}
            for key, text in groups.items():
                ours = ours.replace(f"{{{key}}}", text)
            return ours.removeprefix("_")
    raise KeyError(name)


def import_original(state: State, what: str) -> tuple[dict[str, State], list[str]]:
    """The original's state dict -> ({part: state dict of ours}, names that were dropped).

    Parts: "maskformer", "clip", "prompt" and, for a separate region adapter, "region_prompt" (its CLIP must be the
    same, since it is frozen). Raises UserError for a name that is not in the map.
    """
    parts, dropped = {}, []
    deep_stem = "backbone.stem.conv3.weight" in state
    for name, tensor in state.items():
        try:
            ours = our_name(name, deep_stem)
        except KeyError:
            raise UserError(what, f"has an unknown entry {name}", "give a checkpoint of zsseg.baseline") from None
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


def say_loaded(what: str, loaded: int, dropped: list[str]) -> None:
    """One line: how many tensors were used, and every name that was not (many of one module as `module.*`)."""
    modules = Counter(name.rpartition(".")[0].split(".resblocks")[0].split(".layer")[0] for name in dropped)
    names = []
    for name in dropped:
        module = name.rpartition(".")[0].split(".resblocks")[0].split(".layer")[0]
        names.append(name if modules[module] < 4 else f"{module}.* ({modules[module]})")
    run.say(f"{what}: {loaded} tensors loaded, {len(dropped)} dropped" + ": " * bool(names) + ", ".join(dict.fromkeys(names)))


class Kind:
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
        self.fill(data.encode("latin1") if isinstance(data, str) else data, kind, shape, "F" if columns_first else "C")

    def fill(self, data: bytes, kind: Kind, shape: tuple[int, ...], order: str) -> "PickledArray":
        array = np.frombuffer(bytes(data), np.dtype(kind.order + kind.text))
        self.array = array.reshape(shape, order=order).astype(kind.text)
        return self


class ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays and plain containers (detectron2's .pkl) and refuses everything else."""
    def find_class(self, module: str, name: str) -> object:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            if name == "_reconstruct":
                return PickledArray
            if name == "scalar":
                return lambda kind, data: PickledArray().fill(data, kind, (), "C")
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            return lambda data, kind, shape, order: PickledArray().fill(data, kind, shape, order)
        known = {("numpy", "ndarray"): PickledArray, ("numpy", "dtype"): Kind, ("collections", "OrderedDict"): OrderedDict}
        if (module, name) in known:
            return known[module, name]
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode("latin1")
        if (module, name) in (("__builtin__", "bytes"), ("builtins", "bytes")):
            return lambda: b""  # how old protocols write an empty one
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


DETECTRON_MODELS = {  # no checksum is published; the reader executes nothing
    "R-50.pkl": "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/torchvision/R-50.pkl",
    "R-103.pkl": "https://dl.fbaipublicfiles.com/detectron2/DeepLab/R-103.pkl",
}


def load_backbone(backbone: nn.Module, name: str, weights: str) -> None:
    """Initial weights of R50 or R101c: a torchvision `.pth`, a detectron2 `.pkl`, or "imagenet".

    "imagenet" (R50), "R-50.pkl" and "R-103.pkl" (R101c) are downloaded where there is no such file.
    """
    what, hint = f"model.weights {weights}", f"give ImageNet weights of {name}"
    if weights in DETECTRON_MODELS and not Path(weights).exists():
        weights = str(fetch([DETECTRON_MODELS[weights]], cache_dir() / weights, "", what))
    if weights == "imagenet":
        if name != "R50":
            raise UserError(what, f"torchvision has none for {name}", "set model.weights=R-103.pkl")
        try:
            state = ResNet50_Weights.IMAGENET1K_V1.get_state_dict(model_dir=cache_dir(), check_hash=True)
        except OSError as error:
            raise UserError(what, f"cannot be downloaded ({error})", "give a file as model.weights") from None
    elif weights.endswith(".pkl"):
        state = read_detectron(Path(weights), what, hint)
    else:
        state = read_torch(Path(weights), what)
    if not isinstance(state, dict):
        raise UserError(what, "is not a state dict", hint)
    dropped = [k for k in state if re.search(r"(^|\.)fc|num_batches_tracked$", k)]  # classifier, counters
    state = {k: v for k, v in state.items() if k not in dropped}
    load_strict(backbone, state, what, hint)
    say_loaded(what, len(state), dropped)


def read_detectron(path: Path, what: str, hint: str) -> State:
    """A detectron2 model-zoo file, the backbone under our names, everything else under its own."""
    try:
        with open(path, "rb") as file:
            content = ArrayUnpickler(file, encoding="latin1").load()
        arrays = {k.removeprefix("backbone."): torch.from_numpy(v.array) for k, v in content.get("model", content).items()}
    except Exception as error:  # a broken pickle raises anything
        raise UserError(what, f"{path} cannot be read as arrays ({error!r:.200})", f"replace or delete it; {hint}") from None
    other = re.compile(r"(stem\.)?fc|.*num_batches_tracked$")
    state = {f"backbone.{k}": v for k, v in arrays.items() if not other.match(k)}
    state = import_original(state, what)[0].get("maskformer", {})
    return {k.removeprefix("backbone."): v for k, v in state.items()} | {k: v for k, v in arrays.items() if other.match(k)}


OPENAI_MODELS = {  # name: (SHA-256 of the file, its name)
    "RN50": ("afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", "RN50.pt"),
    "RN101": ("8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599", "RN101.pt"),
    "RN50x4": ("7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd", "RN50x4.pt"),
    "RN50x16": ("52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa", "RN50x16.pt"),
    "ViT-B/32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B/16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L/14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
}


def load_clip_state(weights: str, root: Path) -> State:
    """CLIP's state dict from an OpenAI name (downloaded to the cache), an OpenAI archive or a state-dict file."""
    what = f"clip.weights {weights.replace('{root}', str(root))}"
    if weights in OPENAI_MODELS:
        digest, file = OPENAI_MODELS[weights]
        url = f"https://openaipublic.azureedge.net/clip/models/{digest}/{file}"
        path = fetch([url], cache_dir() / file, f"sha256:{digest}", what)
    else:
        path = Path(weights.replace("{root}", str(root)))
        if not path.is_file():
            todo = nearest(weights, OPENAI_MODELS, nearest_file(path, f"give a file or one of {', '.join(OPENAI_MODELS)}"))
            todo = "give the --root where it lies, or run prepare_data.py shapes" if "{root}" in weights else todo
            raise UserError(what, "no such file", todo)
    if is_torchscript(path):
        state = read_torchscript(path, what)
    else:
        state = read_torch(path, what)
        state = state["model"] if isinstance(state, dict) and "model" in state else state
    if not isinstance(state, dict):
        raise UserError(what, "is not a state dict", "give a CLIP of OpenAI's")
    dropped = [k for k in state if k in ("input_resolution", "context_length", "vocab_size")]
    say_loaded(what, len(state) - len(dropped), dropped)
    return {k: v for k, v in state.items() if k not in dropped}


def is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(n.endswith("/constants.pkl") for n in archive.namelist())
    except Exception:  # not a zip file: read_torch says what it is
        return False


STORAGES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "LongStorage": torch.int64}


class ScriptUnpickler(pickle.Unpickler):
    """Reads the object tree of a TorchScript archive: modules become plain attribute holders, nothing is called."""
    class Module:
        def __setstate__(self, state: dict) -> None:
            self.__dict__.update(state)

    def __init__(self, archive: zipfile.ZipFile, prefix: str):
        super().__init__(archive.open(prefix + "data.pkl"))
        self.archive, self.prefix = archive, prefix

    def find_class(self, module: str, name: str) -> object:
        if module.startswith("__torch__"):
            return type(name, (self.Module,), {})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")

    @staticmethod
    def tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: object) -> Tensor:
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
            prefix = next(n for n in archive.namelist() if n.endswith("/constants.pkl"))[: -len("constants.pkl")]
            collect(ScriptUnpickler(archive, prefix).load(), "")
    except Exception as error:  # a broken archive raises anything
        raise UserError(what, f"{path} cannot be read ({error!r:.200})", "delete it to download it again") from None
    return state
