"""Other people's weights: the original's `model_final.pth`, CLIP's, ImageNet backbones.

No file is ever executed: `weights_only=True`, TorchScript archives read for their tensors, a
restricted unpickler.
"""

import hashlib
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from zsseg.checkpoint import (
    NUMPY,
    State,
    check_finite,
    is_state_dict,
    read_torch,
    refuse_compressed,
    say_loaded,
    unwrapped,
    without_arrays,
)
from zsseg.config import ClipConfig
from zsseg.download import fetch
from zsseg.utils import UserError, cache_dir, did_you_mean, did_you_mean_file, path_of, print_main

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
# Constants of the original's modules that ours hold or compute themselves, and the unused column of
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


def import_original(
    state: State, what: str, unknown: list[str] | None = None
) -> tuple[dict[str, State], list[str]]:
    """The original's state dict -> ({part: state dict of ours}, names that were dropped).

    Parts: "maskformer", "clip", "prompt" and, for a separate region adapter, "region_prompt" (its
    CLIP must be the same, since it is frozen). A name that is not in the map is put into `unknown`,
    or a UserError without that list.
    """
    parts, dropped = {}, []
    state = unwrapped(state, what)
    deep_stem = "backbone.stem.conv3.weight" in state
    for name, tensor in state.items():
        try:
            ours = our_name(name, deep_stem)
        except KeyError:
            if unknown is None:
                todo = "give a checkpoint of zsseg.baseline"
                raise UserError(what, f"has an unknown entry {name}", todo) from None
            unknown.append(name)
            continue
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


class ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays and plain containers (detectron2's .pkl) and refuses everything else."""

    def find_class(self, module: str, name: str) -> object:
        allowed = {entry[1]: entry[0] for entry in NUMPY if isinstance(entry, tuple)}
        allowed["collections.OrderedDict"] = OrderedDict
        if f"{module}.{name}" not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return allowed[f"{module}.{name}"]

    def load(self) -> object:
        """The content with tensors in the place of arrays."""
        return without_arrays(super().load())


OPENAI_MODELS = {  # name: SHA-256 of the file
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
}


# Beginnings of the SHA-256 of files whose activation is known: OpenAI's, OpenCLIP's releases,
# MetaCLIP.
KNOWN_ACTIVATIONS = {
    "gelu": ("55e67d44", "00efa78f", "8fb26589", "699c4b84", "3d133497", "69988bb6", "af8dbd0c"),
    "quickgelu": (
        "d867053b",
        "46683a32",
        "8a00ab3c",
        "f000538c",
        "455df137",
        "3e04b30e",
        "68dfb599",
        "512ea0fb",
        "3c686425",
        "885b7ec1",
        *OPENAI_MODELS.values(),
    ),
}


def load_clip_state(weights: str, root: Path) -> State:
    """CLIP's state dict from an OpenAI name (downloaded to the cache), an OpenAI archive or a
    state-dict file.
    """
    what, path = clip_file(weights, root)
    state = read_torchscript(path, what) if is_torchscript(path) else read_torch(path, what)
    for key in ("model", "state_dict"):  # ours, OpenCLIP's trainer's
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not is_state_dict(state):
        raise UserError(what, "is not a state dict", "give a CLIP of OpenAI's")
    state = unwrapped(state, what)
    dropped = [k for k in ("input_resolution", "context_length", "vocab_size") if k in state]
    for key in dropped:
        del state[key]
    check_finite(state, what)
    say_loaded(what, len(state), dropped)
    return state


def clip_file(weights: str, root: Path) -> tuple[str, Path]:
    """What messages call `clip.weights`, and its file, which is downloaded where it is OpenAI's."""
    what = f"clip.weights {weights.replace('{root}', str(root))}"
    if weights in OPENAI_MODELS:
        digest = OPENAI_MODELS[weights]
        file = f"{weights.replace('/', '-')}.pt"
        url = f"https://openaipublic.azureedge.net/clip/models/{digest}/{file}"
        return what, fetch([url], cache_dir() / file, f"sha256:{digest}", what)
    path = path_of(weights.replace("{root}", str(root)))
    if not path.is_file():
        todo = did_you_mean_file(path, f"give a file or one of {', '.join(OPENAI_MODELS)}")
        todo = did_you_mean(weights, OPENAI_MODELS, todo)
        if "{root}" in weights:
            todo = "give the --root that contains it, or run prepare_data.py shapes"
        raise UserError(what, "no such file", todo)
    return what, path


def find_shape(
    config: ClipConfig, state: State, root: Path, changed: bool = False
) -> tuple[str, int]:
    """What a CLIP's weights do not tell: its activation, "quickgelu" or "gelu", and its image
    tower's number of heads (0: width / 64).

    As configured or, for "auto", by the SHA-256 of the file. `changed`: what is configured is
    another CLIP's, and counts only where the file is not known, with a message.
    """
    if config.activation != "auto" and not changed:
        return config.activation, config.heads
    heads = 0 if changed else config.heads
    # The last is our own small CLIP.
    if config.weights in OPENAI_MODELS or "visual.conv1.tokens.weight" in state:
        return "quickgelu", heads
    what, path = clip_file(config.weights, root)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    for activation, digests in KNOWN_ACTIVATIONS.items():
        if digest.startswith(digests):
            return activation, heads
    activation = config.activation.replace("auto", "quickgelu")
    number = f" and {config.heads} heads" if config.heads else ""
    print_main(
        f"{what}: not a known file; taken for one with {activation}{number} (quickgelu is "
        f"OpenAI's; most of LAION's need clip.activation=gelu)"
    )
    return activation, config.heads


def is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(n.endswith("/constants.pkl") for n in archive.namelist())
    except Exception:  # not a zip file: read_torch says what it is
        return False


STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.LongStorage": torch.int64,
}


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
