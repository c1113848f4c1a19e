"""Every option of the program with its default, read from a TOML file and `--set
section.key=value`.

An unknown option is an error that names the nearest one, an impossible value one that says what is
possible. Numbers are those of the paper's COCO-Stuff setting unless a file in `configs/` says
otherwise.
"""

import operator
import re
import sys
import tomllib
import types
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

from zsseg.utils import UserError, did_you_mean, expand_path, no_such_file, read_text

CONFIGS = Path(__file__).parent.parent / "configs"
# Types that say which values are possible (`matches`).
RANGES = {
    "above 0": lambda value: value > 0,
    "of 0 or more": lambda value: value >= 0,
    "from 0 to 1": lambda value: 0 <= value <= 1,
}
PositiveInt = Annotated[int, "above 0"]
PositiveFloat = Annotated[float, "above 0"]
NonNegativeInt = Annotated[int, "of 0 or more"]
NonNegativeFloat = Annotated[float, "of 0 or more"]
Fraction = Annotated[float, "from 0 to 1"]


@dataclass
class DataConfig:
    # shapes | voc | coco_stuff | ade20k | ade20k_full | pcontext | pcontext_full | cityscapes |
    # folder (your own)
    name: str = "shapes"
    # Of "folder" only, below the data root:
    folder: str = ""  # the folder of the data set
    # e.g. "images/{split}/{id}.jpg"; without {split}, <split>.txt lists the ids; ".*" is any ending
    images: str = ""
    labels: str = ""  # e.g. "masks/{split}/{id}.png": one channel of 8 or 16 bits
    classes: list[str] = field(default_factory=list)  # names
    unseen: list[str] = field(default_factory=list)  # the unseen ones, ignored in training
    # The label value of each class, all others are ignored; []: 0, 1, 2, ...
    values: list[NonNegativeInt] = field(default_factory=list)
    # Turn images as their camera says, which labelling tools do and COCO's labels do not.
    exif_turn: bool = False
    split: str = "val"  # the split that train.py (at its end) and eval.py measure on
    train_on: Literal["seen", "all"] = "seen"  # the classes that training targets show
    # Drawn at training.
    short_edges: list[PositiveInt] = field(default_factory=lambda: list(range(320, 961, 64)))
    max_size: PositiveInt = 2560  # longest edge after resizing, at training and at test
    crop: PositiveInt = 640  # side of the square training crop
    color_jitter: bool = True
    test_short_edge: PositiveInt = 640
    workers: NonNegativeInt = 4


@dataclass
class ModelConfig:
    # SwinB: window 12; small: a few layers with batch norm, for the synthetic data set
    backbone: Literal["R50", "R101c", "SwinB", "small"] = "R101c"
    # initial backbone: "" (random), a file (torchvision .pth, detectron2 .pkl, Swin's own .pth),
    # "imagenet" or, for the small one, "clip": the small CLIP's
    weights: str = ""
    small_widths: list[PositiveInt] = field(default_factory=lambda: [32, 64, 96, 128])
    num_queries: PositiveInt = 100
    hidden_dim: PositiveInt = 256  # of pixel decoder, transformer and mask embedding
    num_heads: PositiveInt = 8
    feedforward: PositiveInt = 2048
    decoder_layers: PositiveInt = 6
    dropout: Fraction = 0.1
    proposals: bool = True  # false: the one-stage baseline, a class for every pixel
    # text: any words; linear: fully supervised MaskFormer, the data set's classes, no CLIP
    class_head: Literal["text", "linear"] = "text"
    class_hidden_dim: PositiveInt = 1024  # of the class-embedding MLP
    # "package.module:function" gives the masks instead of MaskFormer:
    # f(image RGB 0..255 [3, H, W]) -> (mask logits [Q, h, w] at stride 4 of the image padded to
    # multiples of 32, class features [Q, D] in CLIP's space or None)
    proposer: str = ""
    # auto: on CUDA in training and for many images; on CPUs CLIP, for many images
    compile: Literal["auto", "on", "off"] = "auto"
    # auto: on CUDA; on CPUs that multiply in bf16 only CLIP, and not in training
    bf16: Literal["auto", "on", "off"] = "auto"


@dataclass
class ClipConfig:
    weights: str = "ViT-B/16"  # an OpenAI model name or a state-dict file; {root} is the data root
    # What no weights tell, of a file that is not OpenAI's: activation of the MLPs,
    activation: Literal["", "quickgelu", "gelu"] = ""
    heads: NonNegativeInt = 0  # of the image tower's attention (ViT-H/14: 16); 0: width / 64,
    # RGB in 0..1 that the images were normalised by,
    mean: list[Fraction] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    std: list[Fraction] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    scale: PositiveFloat = 100.0  # and the factor of the cosines, the inverse temperature.
    prompt: str | list[str] = "single"  # single | imagenet | vild | learned | a list of templates
    region_prompt: str | list[str] = ""  # another prompt for the regions; "": the same
    prompts: str = ""  # checkpoint with the learned prompt
    prompt_prefix: PositiveInt = 16  # learned tokens before the name
    ensemble: bool = True  # false: only the segmenter's class probabilities
    # w: seen classes head^w clip^(1-w), unseen the other way round; 0: CLIP only
    ensemble_weight: Fraction = 0.8
    # false: all classes are weighted as unseen ones (OVSeg, which is trained on all)
    ensemble_seen: bool = True
    mask_threshold: Fraction = 0.5
    # crops: of each region (the paper's); pool: mean features, one pass over the image
    regions: Literal["crops", "pool"] = "crops"
    mask_prompt: bool = True  # used if the CLIP has one, adapted to masked crops (OVSeg)
    dense_edge: PositiveInt = 224  # of the image's shorter side for "pool"
    crop_batch_size: PositiveInt = 32  # region crops in one pass through CLIP


@dataclass
class TrainConfig:
    task: Literal["segment", "prompts"] = "segment"  # prompts: learn CLIP's prompt
    steps: PositiveInt = 60_000
    batch_size: PositiveInt = 32  # over all processes
    accumulate: PositiveInt = 1  # batches a step, which learns as from one large batch
    seed: NonNegativeInt = 0
    # Prompts: one is learned for each seed, in parallel, and the best is used.
    seeds: list[NonNegativeInt] = field(default_factory=list)
    lr: PositiveFloat = 1e-4
    weight_decay: NonNegativeFloat = 1e-4
    backbone_lr: NonNegativeFloat = 0.1  # multiplies lr for the backbone
    power: NonNegativeFloat = 0.9  # polynomial decay
    clip_grad: NonNegativeFloat = 0.01  # norm over all parameters; 0: no limit
    focal_weight: NonNegativeFloat = 20.0
    dice_weight: NonNegativeFloat = 1.0
    no_object_weight: NonNegativeFloat = 0.1
    # a segmenter's checkpoint, ours or the original's, or the name of a published model, whose
    # weights training starts from (fine-tuning)
    init: str = ""
    # self-training: a checkpoint whose predictions label the ignored pixels
    teacher: str = ""
    # Pixels whose best unseen class is less probable than this stay unlabelled. A softmax over
    # scores from 0 to about 1: for C classes probabilities lie between 1/C and 3/C, roughly.
    min_probability: Fraction = 0.0
    checkpoint_every: PositiveInt = 5000
    # during training, on val, or on data.split if own data has no val (best.pt is the best of
    # these); 0: only at the end
    eval_every: NonNegativeInt = 5000
    # skipped steps in a row (NaN/Inf in the loss or gradient) before the run stops
    max_bad_steps: PositiveInt = 20


@dataclass
class PromptsConfig:
    """Learning a prompt: SGD with a cosine schedule, on crops of single regions."""

    samples_per_class: PositiveInt = 32  # at most; drawn with train.seed
    # more of each class, at most a fifth of its regions, on which the seeds are compared
    held_out: NonNegativeInt = 16
    momentum: Fraction = 0.9
    warmup_steps: NonNegativeInt = 100
    warmup_factor: Fraction = 0.005  # of the rate, constant


@dataclass
class EvalConfig:
    # also measure MaskFormer only, CLIP only and CLIP x objectness (not of several views)
    compare: bool = False
    # Also measure the ensemble with these weights, in the same pass.
    weights: list[Fraction] = field(default_factory=list)
    # Short edges whose score maps are averaged; [] = data.test_short_edge.
    sizes: list[PositiveInt] = field(default_factory=list)
    flip: bool = False  # average with the mirror image's score map
    # side of sliding windows that overlap by 2/3, in pixels of the network input; 0: none
    window: NonNegativeInt = 0
    max_images: NonNegativeInt = 0  # the first ones of the split; 0: all

    @property
    def views(self):
        """Whether scores are a mean over several views of an image."""
        return self.sizes or self.flip or self.window


@dataclass
class LogConfig:
    wandb: Literal["online", "offline", "disabled"] = "disabled"
    project: str = "zsseg"
    every: PositiveInt = 20


@dataclass
class Config:
    data: DataConfig
    model: ModelConfig
    clip: ClipConfig
    train: TrainConfig
    prompts: PromptsConfig
    eval: EvalConfig
    log: LogConfig

    def __init__(self):
        """Every section with its defaults."""
        for section in fields(self):
            setattr(self, section.name, section.type())


# Options that begin the description of one thing, and the rest of it, which then starts from the
# defaults and inherits nothing from a checkpoint or a `base`.
DATA = "folder images labels classes unseen values exif_turn split"
CLIP = "activation heads mean std scale"
DESCRIBED = {"data.name": DATA, "data.folder": DATA, "clip.weights": CLIP}
OPTIONS = {
    f"{section.name}.{option.name}": option.type
    for section in fields(Config)
    for option in fields(section.type)
}


def load_config(file=None, settings=(), base=None):
    """The configuration of a run: `base` (a checkpoint's), then the TOML `file`, then settings
    "section.key=value".

    Raises UserError for a missing or broken file, an unknown key, a wrong type or an impossible
    value.
    """
    config = Config()
    update(config, base or {}, "checkpoint's configuration")
    sources = read_toml(find_config(file, Path())) if file else []
    given = {}
    for setting in [settings] if isinstance(settings, str) else settings:
        parts = re.fullmatch(r"\s*(\w+)\.([^=]*?)\s*=\s*(.*?)\s*", setting, re.DOTALL)
        if not parts:
            todo = "write e.g. train.steps=100"
            raise UserError(f"--set {setting}", "is not of the form section.key=value", todo)
        section, key, text = parts.groups()
        given.setdefault(section, {})[key] = parse(text, OPTIONS.get(f"{section}.{key}"))
    values = {}
    for name, values in sources:
        update(config, values, name)
    # What the command line adds to its file describes the same things.
    update(config, given, "--set", values)
    check_combinations(config)
    return config


def described(section, values):
    """The options of a section that belong to the descriptions which begin in `values`."""
    names = (f"{section}.{key}" for key in values.get(section, ()))
    return {key for name in names for key in DESCRIBED.get(name, "").split()}


def update(config, values, source, before=None):
    """Set options of `config` from {section: {key: value}}; descriptions that begin in `values`,
    and not in the `before` that they complete, begin with the defaults.
    """
    if not isinstance(values, dict):
        raise UserError(source, "is not a table of sections", "give a checkpoint of train.py")
    for section, options in values.items():
        part = vars(config).get(section)
        if part is None:
            raise unknown(source, section, vars(config))
        if not isinstance(options, dict):
            todo = f"write [{section}] with keys below it"
            raise UserError(f"{source}: {section}", "is a section, not a value", todo)
        defaults = vars(type(part)())
        for key in described(section, values) - described(section, before or {}):
            setattr(part, key, defaults[key])
        for key, value in options.items():
            name = f"{section}.{key}"
            if name not in OPTIONS:
                raise unknown(source, name, OPTIONS)
            if not matches(value, OPTIONS[name]):
                why = f"is {value!r}, not {describe(OPTIONS[name])}"
                raise UserError(f"{source}: {name}", why, "correct it")
            if isinstance(getattr(part, key), float):
                value = float(value)
            elif isinstance(value, str) and value.startswith("~"):
                value = str(expand_path(value))
            setattr(part, key, value)


def unknown(source, name, names):
    todo = did_you_mean(name, names, "all options are in zsseg/config.py")
    return UserError(f"{source}: {name}", "is not a known option", todo)


def check_combinations(config):
    """UserError for values that do not go together."""
    data = config.data
    model = config.model
    clip = config.clip
    train = config.train
    segments = train.task == "segment"
    text = model.class_head == "text"
    parts = clip.ensemble and model.proposals and not config.eval.views
    shared = model.hidden_dim % 32 or model.hidden_dim % model.num_heads
    largest = max(data.short_edges, default=0)
    rules = {  # option: (whether it is right, what to do)
        "data.short_edges": (0 < largest <= data.max_size, "give some, none above data.max_size"),
        "data.train_on": (data.train_on == "all" or text, 'a linear head needs "all"'),
        "model.hidden_dim": (not shared, "give a multiple of 32 and of model.num_heads"),
        "model.small_widths": (len(model.small_widths) == 4, "give four widths"),
        "model.proposals": (model.proposals or text, 'false needs class_head = "text"'),
        "model.proposer": (not model.proposer or text, 'it needs class_head = "text"'),
        "clip.ensemble": (not clip.ensemble or text, "a linear head needs false"),
        "clip.prompt": (clip.prompt, "give at least one template"),
        "clip.mean": (len(clip.mean) == 3, "give three, of red, green and blue"),
        "clip.std": (len(clip.std) == 3 and all(clip.std), "give three above 0"),
        "eval.weights": (not config.eval.weights or parts, "it needs an ensemble and one view"),
        "train.seeds": (
            len({*train.seeds}) == len(train.seeds) and not (segments and train.seeds),
            "give each once, to task prompts",
        ),
        "train.init": (not train.init or segments, "only task segment starts from one"),
        "train.teacher": (not train.teacher or segments, "only task segment has one"),
    }
    for name, (right, todo) in rules.items():
        if not right:
            raise UserError(name, f"is {operator.attrgetter(name)(config)!r}", todo)


def find_config(name, folder):
    """A configuration file by its path, with or without .toml, below a folder or in configs/."""
    for parent in (folder, CONFIGS):
        for path in (parent / name, parent / f"{name}.toml"):
            if path.is_file():
                return path
    raise no_such_file(f"config {name}", folder / name, "give the path of a TOML file")


def read_toml(file):
    """(name, tables) of a file, after those of the files that `base` names, from one to the next.
    Raises UserError.
    """
    sources = {}
    while file.resolve() not in sources:
        what = f"config {file}"
        try:
            values = tomllib.loads(read_text(file, what, "check the file"))
        except tomllib.TOMLDecodeError as error:
            raise UserError(what, f"is not TOML: {error}", "correct that line") from None
        sources[file.resolve()] = (str(file), values)
        base = values.pop("base", None)
        if base is None:
            return [*reversed(sources.values())]
        if isinstance(base, str):
            file = find_config(base, file.parent)
    raise UserError(f"{what}: base", f"is {base!r}", "name another file")


def parse(text, expected):
    """A command-line value: the text itself for a string, else TOML if it is that (so strings need
    no quotes).
    """
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if expected is str and not isinstance(value, str) else value


def matches(value, expected):
    """Whether a value is of a field's type and in its range; a whole number may stand for a float,
    NaN and infinity for none.
    """
    origin = get_origin(expected)
    arguments = get_args(expected)
    if origin is Annotated:
        base, interval = arguments
        return matches(value, base) and RANGES[interval](value)
    if origin is Literal:
        return value in arguments
    if origin is types.UnionType:
        return any(matches(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(matches(item, *arguments) for item in value)
    if expected is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is expected


def describe(expected):
    """A field's type, as "int above 0" or "Literal['online', 'offline']"."""
    text = re.sub(r"typing\.|<class '(\w+)'>", r"\1", str(expected))
    return re.sub(r"Annotated\[(\w+), '([^']+)'\]", r"\1 \2", text)
