"""Everything that reads a file of tensors: checkpoints (ours and the original's), CLIP's weights,
ImageNet backbones, learned prompts, published models; and segmenters built from them.

No file is ever executed: `weights_only=True`, and unpicklers that know a list of names.
"""

import gzip
import importlib
import os
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from zsseg.clip import CONSTANTS, build_clip
from zsseg.config import CONFIGS, ClipConfig, load_config
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
    digest,
    expand_path,
    join_some,
    no_such_file,
    print_main,
    read_table,
    warn,
)

# What is published: models, OpenAI's CLIPs, backbones
FILES = read_table("published.toml")
PUBLISHED = FILES["model"]
# With the answer to what it would ask of a large file: that it is not scanned for viruses.
DRIVE = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"

# --- files of tensors


class Dtype:
    """A pickled NumPy dtype, as text: NumPy's own unpickling would follow the pointers of a forged
    one.
    """

    def __init__(self, text, *_):
        self.text = text

    def __setstate__(self, state):
        self.text = f"{state[1]}{self.text}"


class Array(Tensor):
    """A pickled NumPy array as a tensor. NumPy makes no objects of bytes."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        if isinstance(data, str):
            data = data.encode("latin1")
        array = np.frombuffer(bytearray(data), dtype.text)
        self.data = torch.from_numpy(array.reshape(shape, order="F" if fortran else "C"))


class ScriptModule(dict):
    """The attributes of a TorchScript module."""

    __setstate__ = dict.update

    def tensors(self, prefix=""):
        """Those in it and in its submodules, by attribute path."""
        found = {}
        for name, value in self.items():
            if isinstance(value, Tensor):
                found[prefix + name] = value
            elif isinstance(value, ScriptModule):
                found |= value.tensors(f"{prefix}{name}.")
        return found


# What a pickle may name: NumPy's arrays and numbers in its versions 1 and 2,
ALLOWED = {
    "collections.OrderedDict": OrderedDict,
    "numpy.ndarray": Array,
    "numpy.dtype": Dtype,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),
}
for package in ("numpy.core", "numpy._core"):
    ALLOWED |= {
        f"{package}.multiarray._reconstruct": lambda *_: Array(),
        f"{package}.multiarray.scalar": lambda kind, data: np.frombuffer(data, kind.text)[0].item(),
    }


# and in a TorchScript archive.
SCRIPT = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.LongStorage": torch.int64,
    "torch._utils._rebuild_tensor_v2": lambda numbers, start, size, stride, *_: numbers.as_strided(
        size, stride, start
    ),
}


class Unpickler(pickle.Unpickler):
    """Reads detectron2's .pkl, and the object tree of a TorchScript archive (OpenAI's CLIPs).
    KeyError for what such files do not need.
    """

    folder: zipfile.Path  # in the archive

    def find_class(self, module, name):
        if module.startswith("__torch__"):
            return ScriptModule
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        return (ALLOWED | SCRIPT)[f"{module}.{name}"]

    def persistent_load(self, key):
        _, dtype, name, _, _ = key
        return torch.frombuffer(bytearray((self.folder / "data" / name).read_bytes()), dtype=dtype)


def read_torch(path, what, todo="check the path"):
    """The content of a file of `torch.save`, a TorchScript archive (its tensors) or detectron2's
    .pkl, tensors and plain values, on the CPU. Raises UserError.
    """
    if not path.exists():
        raise no_such_file(what, path, todo)
    try:
        if path.suffix == ".safetensors":
            raise ValueError("it is in another format")
        if zipfile.is_zipfile(path):
            folder = next(zipfile.Path(path).iterdir())
            size = sum(entry.file_size for entry in folder.root.infolist())
            if size > 2 * path.stat().st_size:  # torch's are not; it might fill the memory
                raise ValueError("it is compressed")
            if (folder / "constants.pkl").exists():
                reader = Unpickler((folder / "data.pkl").open("rb"))
                reader.folder = folder
                return reader.load().tensors()
        elif path.suffix == ".pkl":
            with open(path, "rb") as file:
                return Unpickler(file, encoding="latin1").load()
        with torch.serialization.safe_globals([(value, name) for name, value in ALLOWED.items()]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types, with advice to load such a file anyway
        known = r"GLOBAL [\w.]+|'[\w.]+\.\w+'|\[Errno.*|it is compressed|it is in another format"
        reason = re.search(known, str(error))
        why = f"cannot be read as tensors ({reason[0] if reason else 'broken'})"
        todo = f"check {path}; it may contain only tensors and plain values"
        raise UserError(what, why, todo) from None


def load_checkpoint(path, what="checkpoint"):
    """A checkpoint of ours ({"config", "step", "model", ...}) or the original's ({"model": ...}),
    on the CPU.
    """
    todo = f"give a file, or one of {', '.join(PUBLISHED)}"
    content = read_torch(Path(path), f"{what} {path}", todo)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        todo = "give a checkpoint of train.py or a model_final.pth"
        raise UserError(f"{what} {path}", "contains no model", todo)
    return content


def find_model(wanted):
    """The file of a checkpoint and, if `wanted` names a published model, its configuration's.

    Such a model is downloaded to the cache once; a file or folder of that name comes first.
    """
    path = expand_path(wanted)
    model = PUBLISHED.get(str(wanted))
    if path.exists() or not model:
        return path, None
    print_main(f"{path}: trained on {model['trained_on']}; licence: {model['licence']}")
    file = fetch(
        [DRIVE.format(model["drive"])], cache_dir() / model["file"], model["checksum"], wanted
    )
    return file, CONFIGS / f"{model['config']}.toml"


def checkpoint_and_config(path, config, settings):
    """The content of a checkpoint, and its configuration with that of a file and settings put over
    it. "-": no checkpoint, for a `model.proposer`. Raises UserError.
    """
    if str(path) == "-":
        config = load_config(config, settings)
        return {"config": asdict(config), "model": {}, "trained": []}, config
    content = load_checkpoint(path)
    if "config" not in content and not config:
        raise UserError(f"checkpoint {path}", "contains no configuration", "give its --config")
    return content, load_config(config, settings, content.get("config"))


# --- state dicts


def strip_prefix(state, what):
    """A state dict, maybe below "model" or "state_dict", without what DataParallel ("module.") and
    torch.compile ("_orig_mod.") put before names. UserError for anything else.
    """
    try:
        for key in ("model", "state_dict"):
            state = state.get(key, state)
        return {
            re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor.as_subclass(Tensor)
            for name, tensor in state.items()
        }
    except (AttributeError, TypeError):
        raise UserError(what, "is not a state dict", "give names and tensors") from None


def read_state(name, table, what, todo):
    """The state dict in a file, given by its path or by a name in a table of published.toml, which
    is downloaded to the cache.
    """
    path = expand_path(name)
    if name in FILES[table]:
        url, checksum = FILES[table][name]
        path = fetch([url], cache_dir() / Path(url).name, checksum, what)
    return strip_prefix(read_torch(path, what, todo), what)


def check_finite(state, what):
    """UserError for weights with NaN/Inf in them, which would give labels all the same."""
    broken = [k for k, v in state.items() if not v.isfinite().all()]
    if broken:
        todo = "take another checkpoint; casts to half precision may do that"
        raise UserError(what, f"contains NaN/Inf, in {join_some(broken, 3)}", todo)


def load_into(module, state, what, todo, must_fit=lambda name: True, dropped=()):
    """Load the tensors of a state dict that fit a module by name and shape; returns the names of
    the others. Prints how many were used, the names of all that were not, with those `dropped`
    before, and which of the module's start afresh.

    Raises UserError for NaN/Inf, if nothing fits or if anything does not fit that, by its name,
    `must_fit`; the module is then as before.
    """
    state = strip_prefix(state, what)
    own = module.state_dict()
    fits = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    missing = [k for k in own if k not in fits]
    unused = [k for k in state if k not in fits]
    wrong = [k for k in own | state if k not in fits and must_fit(k)]
    if wrong:
        shape = lambda tensor: "absent" if tensor is None else [*tensor.shape]
        sizes = [f"{k} is {shape(state.get(k))} instead of {shape(own.get(k))}" for k in wrong]
        raise UserError(what, f"does not fit: {join_some(sizes, 3)}", todo)
    if own and not fits:
        raise UserError(what, "has no weight that fits", todo)
    check_finite(fits, what)
    module.load_state_dict(fits, strict=False)
    log_loaded(what, len(fits), [*dropped, *unused])
    if missing:
        names = join_some(missing, 5)
        print_main(f"{what}: {len(missing)} of the model's tensors start afresh: {names}")
    return unused


def log_loaded(what, count, dropped):
    """One line: how many tensors were used, and the names of all that were not (* for numbers)."""
    names = ", ".join(dict.fromkeys(re.sub(r"\d+", "*", name) for name in dropped))
    print_main(f"{what}: {count} tensors loaded, {len(dropped)} dropped: {names or 'none'}")


# --- the original's names

# The original's name and ours; the first row that fits counts. {i}: a number, {name}:
# anything; "-": a constant or an unused tensor, dropped. Ours begin with a part:
# maskformer, clip or prompt, and the last two also with region_ for a separate region adapter.
NAMES = """
criterion.empty_weight                              -
clip_adapter.pixel_mean                             -
clip_adapter.pixel_std                              -
_region_clip_adapter.pixel_mean                     -
_region_clip_adapter.pixel_std                      -
{adapter}.prompt_learner.{name}_signal              -
{name}.relative_position_index                      -
{name}.attn_mask                                    -
_region_clip_adapter.non_object_embedding           -
clip_adapter.non_object_embedding                   maskformer.non_object
clip_adapter.clip_model.{name}                      clip.{name}
_region_clip_adapter.clip_model.{name}              region_clip.{name}
clip_adapter.prompt_learner.prefix_prompt           prompt.prefix
_region_clip_adapter.prompt_learner.prefix_prompt   region_prompt.prefix
backbone.stem.conv1.weight                          maskformer.backbone.conv1.weight
backbone.stem.conv1.norm.{name}                     maskformer.backbone.bn1.{name}
backbone.res{s}.{b}.conv{i}.weight  maskformer.backbone.layer{s-1}.{b}.conv{i}.weight
backbone.res{s}.{b}.conv{i}.norm.{name}             maskformer.backbone.layer{s-1}.{b}.bn{i}.{name}
backbone.res{s}.{b}.shortcut.weight  maskformer.backbone.layer{s-1}.{b}.downsample.0.weight
backbone.res{s}.{b}.shortcut.norm.{name}  maskformer.backbone.layer{s-1}.{b}.downsample.1.{name}
backbone.patch_embed.proj.{name}                    maskformer.backbone.features.0.0.{name}
backbone.patch_embed.norm.{name}                    maskformer.backbone.features.0.2.{name}
backbone.layers.{i}.blocks.{b}.mlp.fc1.{name}  maskformer.backbone.features.{2i+1}.{b}.mlp.0.{name}
backbone.layers.{i}.blocks.{b}.mlp.fc2.{name}  maskformer.backbone.features.{2i+1}.{b}.mlp.3.{name}
backbone.layers.{i}.blocks.{b}.{name}               maskformer.backbone.features.{2i+1}.{b}.{name}
backbone.layers.{i}.downsample.{name}               maskformer.backbone.features.{2i+2}.{name}
backbone.norm{i}.{name}                             maskformer.backbone.norm{i}.{name}
sem_seg_head.pixel_decoder.adapter_{i}.weight       maskformer.pixel_decoder.lateral.{i-1}.0.weight
sem_seg_head.pixel_decoder.adapter_{i}.norm.{name}  maskformer.pixel_decoder.lateral.{i-1}.1.{name}
sem_seg_head.pixel_decoder.layer_4.weight           maskformer.pixel_decoder.top.0.weight
sem_seg_head.pixel_decoder.layer_4.norm.{name}      maskformer.pixel_decoder.top.1.{name}
sem_seg_head.pixel_decoder.layer_{i}.weight         maskformer.pixel_decoder.output.{i-1}.0.weight
sem_seg_head.pixel_decoder.layer_{i}.norm.{name}    maskformer.pixel_decoder.output.{i-1}.1.{name}
sem_seg_head.pixel_decoder.mask_features.{name}     maskformer.pixel_decoder.mask_features.{name}
sem_seg_head.predictor.transformer.decoder.layers.{i}.multihead_attn.{name}
    maskformer.layers.{i}.cross_attn.{name}
sem_seg_head.predictor.transformer.decoder.layers.{i}.{name}  maskformer.layers.{i}.{name}
sem_seg_head.predictor.transformer.decoder.norm.{name}  maskformer.norm.{name}
sem_seg_head.predictor.query_embed.weight           maskformer.query_embed.weight
sem_seg_head.predictor.input_proj.{name}            maskformer.input_proj.{name}
sem_seg_head.predictor.{name}.layers.{i}.{leaf}     maskformer.{name}.{2i}.{leaf}
sem_seg_head.predictor.class_embed.{name}           maskformer.class_embed.{name}
sem_seg_head.predictor.{name}                       maskformer.pixel_embed.{name}
"""
# R101c: conv1 is a sequence of convolution, norm, relu, and so on.
DEEP_STEM = """
backbone.stem.conv1.weight       maskformer.backbone.conv1.0.weight
backbone.stem.conv1.norm.{name}  maskformer.backbone.conv1.1.{name}
backbone.stem.conv2.weight       maskformer.backbone.conv1.3.weight
backbone.stem.conv2.norm.{name}  maskformer.backbone.conv1.4.{name}
backbone.stem.conv3.weight       maskformer.backbone.conv1.6.weight
backbone.stem.conv3.norm.{name}  maskformer.backbone.bn1.{name}
"""


def our_name(name, deep_stem=False):
    """Our name for a parameter of the original: "-" for one that is dropped, "" for an unknown."""

    def number(brace):
        return str(int(brace[1] or 1) * int(match[brace[2]]) + int(brace[3] or 0))

    words = (DEEP_STEM + NAMES if deep_stem else NAMES).split()
    for theirs, ours in zip(words[::2], words[1::2], strict=True):
        pattern = re.sub(r"\\{(\w)\\}", r"(?P<\1>[0-9]+)", re.escape(theirs))
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", pattern)
        if match := re.fullmatch(pattern, name):
            return re.sub(r"{(\d?)(\w)([-+]\d)?}", number, ours).format(**match.groupdict())
    return ""


def import_original(state, what, strict=True):
    """The original's state dict -> ({part: state dict of ours}, names that were dropped).

    Parts: "maskformer", "clip", "prompt" and, for a separate region adapter, "region_prompt" (its
    CLIP must be the same, since it is frozen). An unknown name is a UserError or, not `strict`,
    dropped.
    """
    parts = {}
    dropped = []
    state = strip_prefix(state, what)
    deep_stem = "backbone.stem.conv3.weight" in state
    for name, tensor in state.items():
        ours = our_name(name, deep_stem)
        if strict and not ours:
            todo = "give a checkpoint of zsseg.baseline"
            raise UserError(what, f"has an unknown entry {name}", todo)
        part, _, key = ours.partition(".")
        if key:
            parts.setdefault(part, {})[key] = tensor
        else:
            dropped.append(name)
    clip = parts.get("clip", {})
    region = parts.pop("region_clip", {})
    if not all(key in clip and torch.equal(clip[key], region[key]) for key in region):
        raise UserError(what, "has two different CLIPs", "only one shared CLIP is supported")
    return parts, dropped + [f"_region_clip_adapter.clip_model.{key}" for key in region]


def model_parts(content, what, strict=True):
    """A checkpoint, ours or the original's -> ({part: state dict}, names that were dropped)."""
    if "config" not in content:
        return import_original(content["model"], what, strict)
    return {part: strip_prefix(state, what) for part, state in content["model"].items()}, []


# --- CLIP

UNTOLD = ("heads", "mean", "std", "scale")  # what no weights tell


def load_clip(section, root):
    """The CLIP of `clip.weights`: an OpenAI name (downloaded to the cache), or a file with OpenAI's
    names, an archive or a state dict; `{root}` is the data root. Of a file that is neither OpenAI's
    nor our small one's, `clip.activation` must be given, and what else is assumed is printed.
    """
    name = section.weights.replace("{root}", str(root))
    what = f"clip.weights {name}"
    # No "did you mean": a name with another digit is another model.
    todo = f"give a file, one of OpenAI's {', '.join(FILES['clip'])}, or the --root of the data"
    state = read_state(name, "clip", what, f"{todo}; or run prepare_data.py shapes")
    if any(re.search(r"(^|\.)(text_model|vision_model)\.", key) for key in state):
        raise UserError(what, "has Hugging Face's names", "give OpenAI's or OpenCLIP's file")
    default = vars(ClipConfig())
    other = [key for key in ("activation", *UNTOLD) if getattr(section, key) != default[key]]
    if name not in FILES["clip"] and "visual.conv1.tokens.weight" not in state:
        if not section.activation:
            todo = "set clip.activation to quickgelu (OpenAI's) or gelu (most of LAION's)"
            raise UserError(what, "does not tell its activation", todo)
        if options := [key for key in UNTOLD if key not in other]:
            print_main(f"{what}: assumed to be OpenAI's: clip.{', clip.'.join(options)}")
    elif other:
        warn(f"{what}: other than OpenAI's: clip.{', clip.'.join(other)}")
    return make_clip(state, section, what)


def make_clip(state, section, what):
    """CLIP from its weights, and from what they do not tell."""
    dropped = [key for key in CONSTANTS if key in state]
    check_finite(state, what)
    log_loaded(what, len(state) - len(dropped), dropped)
    tables = ("token_embedding.weight", "positional_embedding")
    tokenizer = load_tokenizer(*[len(state.get(name, ())) for name in tables])
    options = {key: getattr(section, key) for key in UNTOLD}
    return build_clip(state, tokenizer, section.activation or "quickgelu", **options)


def load_tokenizer(vocab_size, context_length):
    """A tokenizer with the first merges of OpenAI's vocabulary file ($ZSSEG_VOCAB, else in the
    cache; downloaded if it is not there, and checked), as many as `vocab_size` has room for.
    """
    count = vocab_size - BYTES_ONLY
    if count <= 0:
        return Tokenizer(vocab_size, context_length)
    given = os.environ.get("ZSSEG_VOCAB")
    path = expand_path(given or cache_dir() / "bpe_simple_vocab_16e6.txt.gz")
    if given and not path.is_file():
        raise no_such_file("ZSSEG_VOCAB", path)
    fetch(path=path, what="BPE vocabulary", **FILES["vocabulary"])
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : count + 1]]  # the first is a version
    return Tokenizer(vocab_size, context_length, merges)


def clip_digest(clip):
    """16 hex digits of a CLIP's weights, the same on a CPU and a GPU; "" without a CLIP. Of each
    tensor the sum of its bits: no two CLIPs agree in all.
    """
    if clip is None:
        return ""
    sums = {
        name: int(tensor.float().view(torch.int32).sum(dtype=torch.int64))
        for name, tensor in clip.state_dict().items()
    }
    return digest(sums)


def check_clip(content, clip, what):
    """A class head for one CLIP gives labels with another, too: say so."""
    made_for = content.get("clip")
    if made_for and made_for != clip_digest(clip):
        warn(f"{what} was made for another CLIP than clip.weights")


# --- backbones


def load_backbone(backbone, name, weights, clip=None):
    """Initial weights (`model.weights`) of the backbone `name`: a torchvision `.pth`, a detectron2
    `.pkl`, Swin's own `.pth`, "imagenet" (R50, SwinB), the name of a file in published.toml, which
    is downloaded, or, for the small one, "clip": the small CLIP's.

    All of a ResNet's must be there; of a Swin what fits: position biases of windows of 7 do not,
    and the norms of the four maps are in no file.
    """
    what = f"model.weights {weights}"
    if weights == "clip":
        try:
            state = clip.visual.conv1.backbone.state_dict()
        except AttributeError:
            todo = "give a file, or --set model.weights="
            raise UserError(what, "is for the small CLIP", todo) from None
    else:
        file = f"{name}.pth" if weights == "imagenet" else weights
        todo = f"give a file, or one of {', '.join(FILES['backbone'])}"
        state = read_state(file, "backbone", what, todo)
    own = backbone.state_dict()
    renamed = {}
    for key, tensor in state.items():
        theirs = our_name(f"backbone.{key}", "stem.conv3.weight" in state)
        ours = theirs.removeprefix("maskformer.backbone.")
        renamed[ours if ours in own else key] = tensor
    # What is not known is a classifier, or counters.
    must_fit = lambda key: key in own and name != "SwinB"
    load_into(backbone, renamed, what, f"give weights of {name}", must_fit)


# --- segmenters


def build_segmenter(config, root, saved=None):
    """A segmenter to train: the configuration's CLIP, prompts and initial backbone, else fresh
    weights; over them those of the checkpoint `train.init`, as far as they fit.

    With `saved`, the learned parts of a run that is resumed, nothing else is read.
    """
    model = config.model
    if model.proposer:
        raise UserError("model.proposer", "gives masks that nothing trains", "leave it out")
    clip = load_clip(config.clip, root) if model.class_head == "text" else None
    segmenter = assemble(config, clip)
    if saved is not None:
        load_learned(segmenter, {}, saved, [], "last.pt")
        return segmenter
    if model.weights:
        load_backbone(segmenter.maskformer.backbone, model.backbone, model.weights, clip)
    given = load_prompts(segmenter, config.clip.prompts)
    parts = {}
    if config.train.init:
        what = f"train.init {config.train.init}"
        content = load_checkpoint(find_model(config.train.init)[0], "train.init")
        parts, dropped = model_parts(content, what, strict=False)
        load_learned(segmenter, content, parts, dropped, what, given, strict=False)
    if segmenter.learned_modules().keys() - {"maskformer", *given, *parts}:
        raise UserError("clip.prompt", "is learned, but not here", "set clip.prompts")
    return segmenter


def load_segmenter(content, config, root, name):
    """The segmenter of a loaded checkpoint, ours or the original's."""
    what = f"checkpoint {name}"
    parts, dropped = model_parts(content, what)
    clip = None
    if config.model.class_head == "text":
        own = parts.pop("clip", None)
        clip = make_clip(own, config.clip, f"{what}, CLIP") if own else load_clip(config.clip, root)
    segmenter = assemble(config, clip)
    if clip is None:
        segmenter.set_classes(content.get("trained", segmenter.names))
    given = set()
    recorded = content.get("config", {}).get("clip", {}) if parts else {}
    if config.clip.prompts != recorded.get("prompts", ""):  # else the checkpoint contains them
        given = load_prompts(segmenter, config.clip.prompts)
    load_learned(segmenter, content, parts, dropped, what, given)
    return segmenter


def assemble(config, clip):
    """A segmenter with fresh weights and this CLIP (None: the fully supervised MaskFormer)."""
    model = config.model
    section = config.clip
    if clip is None:
        names = dataset(config.data).names
        segmenter = Segmenter(MaskFormer(model, len(names) + 1), None, None, section)
        segmenter.set_classes(names)
        return segmenter
    sizes = (clip.width, section.prompt_prefix)
    prompt = build_prompt(section.prompt, *sizes)
    # The paper's VOC setting: fixed prompts for the segmenter's head, learned ones for the regions.
    region_prompt = build_prompt(section.region_prompt, *sizes) if section.region_prompt else None
    if not model.proposals:
        return OneStage(PerPixel(model, clip.embed_dim, clip.scale), clip, prompt, section)
    proposer = find_proposer(model.proposer) if model.proposer else None
    maskformer = None if proposer else MaskFormer(model, clip.embed_dim, clip.scale)
    return Segmenter(maskformer, clip, prompt, section, region_prompt, proposer)


def find_proposer(name):
    """The function that `model.proposer` names, "package.module:function"; modules in the current
    folder are found, too.
    """
    module, _, function = name.partition(":")
    sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        todo = "give package.module:function"
        raise UserError(f"model.proposer {name}", f"cannot be imported ({error})", todo) from None


def load_learned(segmenter, content, parts, dropped, what, given=(), strict=True):
    """Load the `model_parts` of a checkpoint's content into what the segmenter learns, but for the
    parts in `given`, which come from elsewhere, and say how much was used, what was dropped, and
    whether it was made for another CLIP. Not `strict`: only what fits. Raises UserError.
    """
    modules = {k: module for k, module in segmenter.learned_modules().items() if k not in given}
    state = {f"{part}.{k}": v for part, tensors in parts.items() for k, v in tensors.items()}
    todo = "use the configuration of its training; a learned prompt may come from clip.prompts"
    must_fit = lambda name: strict and name.partition(".")[0] in modules
    load_into(nn.ModuleDict(modules), state, what, todo, must_fit, dropped)
    check_clip(content, segmenter.clip, what)


def load_prompts(segmenter, file):
    """Load the learned prompt of a checkpoint (ours or the original's prompt learning), for head
    and regions alike; returns the parts that have it now.
    """
    if not file:
        return set()
    what = f"clip.prompts {file}"
    content = load_checkpoint(file, "clip.prompts")
    parts, dropped = model_parts(content, what)
    wanted = segmenter.learned_modules().keys() - {"maskformer"}
    prompt = parts.pop("prompt", None) or parts.pop("region_prompt", {})
    parts |= dict.fromkeys(wanted, prompt)
    load_learned(segmenter, content, parts, dropped, what, {"maskformer"})
    return wanted
