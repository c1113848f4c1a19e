"""Every option of the program with its default, read from a TOML file and `--set
section.key=value`.

An unknown option is an error that names the nearest one, an impossible value one that says what is
possible.
Numbers are those of the paper's COCO-Stuff setting unless a file in `configs/` says otherwise.
"""

import tomllib
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

from zsseg.files import read_text
from zsseg.utils import UserError, did_you_mean, did_you_mean_file, path_of

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
    # shapes | voc | coco_stuff | ade20k | ade20k_full | pcontext | cityscapes | folder (your own)
    name: str = "shapes"
    # Of "folder" only, below the data root:
    folder: str = ""  # the folder of the data set
    # e.g. "images/{split}/{id}.jpg"; without {split}, <split>.txt lists the ids; ".*" is any ending
    images: str = ""
    labels: str = ""  # e.g. "masks/{split}/{id}.png": one channel of 8 or 16 bits
    classes: list[str] = field(default_factory=list)  # names
    unseen: list[str] = field(default_factory=list)  # the unseen ones, ignored in training
    # The label value of each class, all others are ignored; []: 0, 1, 2, ...
    values: list[int] = field(default_factory=list)
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
    queries: PositiveInt = 100
    hidden: PositiveInt = 256  # width of pixel decoder, transformer and mask embedding
    heads: PositiveInt = 8
    feedforward: PositiveInt = 2048
    decoder_layers: PositiveInt = 6
    dropout: Fraction = 0.1
    proposals: bool = True  # false: the one-stage baseline, a class for every pixel
    # text: any words; linear: fully supervised MaskFormer, the data set's classes, no CLIP
    class_head: Literal["text", "linear"] = "text"
    class_hidden: PositiveInt = 1024  # hidden width of the class-embedding MLP
    # Triton kernels on CUDA; false: the PyTorch reference that they are tested against
    kernels: bool = True
    # auto: on CUDA in training and for many images; on CPUs CLIP, for many images
    compile: Literal["auto", "on", "off"] = "auto"
    # auto: on CUDA; on CPUs that multiply in bf16 only CLIP, and not in training
    bf16: Literal["auto", "on", "off"] = "auto"


@dataclass
class ClipConfig:
    weights: str = "ViT-B/16"  # an OpenAI model name or a state-dict file; {root} is the data root
    # auto (known files' own, else "quickgelu" with a message) | quickgelu | gelu
    activation: Literal["auto", "quickgelu", "gelu"] = "auto"
    # of the image tower's attention; 0: width / 64. Nothing in a file tells (ViT-H/14 has 16 of 80)
    heads: NonNegativeInt = 0
    prompt: str | list[str] = "single"  # single | imagenet | vild | learned | a list of templates
    region_prompt: str | list[str] = ""  # a prompt of its own for the regions ("" = the same)
    prompts: str = ""  # checkpoint that holds the learned prompt
    prompt_prefix: NonNegativeInt = 16  # learned tokens before the name
    ensemble: bool = True  # False: only the segmenter's own class probabilities
    # w: seen classes head^w clip^(1-w), unseen the other way round; 0: CLIP only
    ensemble_weight: Fraction = 0.8
    # False: all classes are weighted as unseen ones (OVSeg, which is trained on all)
    ensemble_seen: bool = True
    mask_threshold: Fraction = 0.5
    expand_ratio: PositiveFloat = 1.0
    # crops (the paper's) | pool | tokens: one pass over the image (zsseg/regions.py)
    regions: Literal["crops", "pool", "tokens"] = "crops"
    # of a CLIP that was adapted to masked crops (OVSeg) and holds one; others have none
    mask_prompt: bool = True
    dense_edge: PositiveInt = 224  # of the image's shorter side in that pass
    chunk: NonNegativeInt = 0  # region crops in one pass through CLIP; 0: what suits the device


@dataclass
class TrainConfig:
    # prompts: learn CLIP's prompt; clip: contrastive, for the synthetic data set
    task: Literal["segment", "prompts", "clip"] = "segment"
    steps: PositiveInt = 60_000
    batch_size: PositiveInt = 32  # over all processes
    seed: NonNegativeInt = 0
    # Prompts: one is learned for each seed, in parallel, and the best one is kept.
    seeds: list[int] = field(default_factory=list)
    lr: PositiveFloat = 1e-4
    weight_decay: NonNegativeFloat = 1e-4
    backbone_lr: float = 0.1  # multiplies lr for the backbone
    power: NonNegativeFloat = 0.9  # polynomial decay
    clip_grad: NonNegativeFloat = 0.01  # norm over all parameters; 0: no limit
    focal_weight: float = 20.0
    dice_weight: float = 1.0
    no_object_weight: float = 0.1
    # a segmenter's checkpoint, ours or the original's, or the name of a published model, whose
    # weights training starts from (fine-tuning)
    init: str = ""
    # self-training: a checkpoint whose predictions label the ignored pixels
    teacher: str = ""
    # Pixels whose best unseen class is less probable than this stay unlabelled. A softmax over
    # scores from 0 to about 1: for C classes probabilities lie between 1/C and 3/C, roughly.
    reject: Fraction = 0.0
    checkpoint_every: PositiveInt = 5000
    eval_every: NonNegativeInt = (
        5000  # during training, on val (best.pt is the best of these); 0: only at the end
    )
    # skipped steps in a row (NaN/Inf in the loss or gradient) before the run stops
    bad_steps: PositiveInt = 20


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
class ContrastConfig:
    """The small CLIP of the synthetic data set: sizes of a model that is built rather than
    loaded.
    """

    embed: int = 64
    resolution: int = 48
    stem: list[int] = field(default_factory=lambda: [32, 64, 96, 128])  # a small backbone's widths
    vision_width: int = 96
    vision_layers: int = 3
    text_width: int = 64
    text_layers: int = 2
    context: int = 40
    groups: int = 4  # sets of distinct classes a step


@dataclass
class EvalConfig:
    # also measure MaskFormer only, CLIP only, CLIP x objectness, and CLIP on the ground-truth masks
    compare: bool = False
    # Also measure the ensemble with these weights, in the same pass.
    weights: list[Fraction] = field(default_factory=list)
    # Short edges whose score maps are averaged; [] = data.test_short_edge.
    sizes: list[PositiveInt] = field(default_factory=list)
    flip: bool = False  # average with the mirror image's score map
    # side of sliding windows that overlap by 2/3, in pixels of the network input; 0: none
    window: NonNegativeInt = 0


@dataclass
class LogConfig:
    wandb: Literal["online", "offline", "disabled"] = "disabled"  # online | offline | disabled
    project: str = "zsseg"
    every: PositiveInt = 20


@dataclass
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)


def load_config(
    file: str | None = None, overrides: list[str] = (), base: dict | None = None
) -> Config:
    """The configuration of a run: `base` (a checkpoint's), then the TOML `file`, then
    `section.key=value` overrides.

    Raises UserError for a missing or broken file, an unknown key, a wrong type or an impossible
    value.
    """
    config = Config()
    update(config, base or {}, "checkpoint's configuration")
    for name, values in read_toml(Path(file)) if file else ():
        update(config, values, name)
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign or key.count(".") != 1:
            todo = "write e.g. train.steps=100"
            raise UserError(f"--set {item}", "is not of the form section.key=value", todo)
        section, name = key.strip().split(".")
        update(config, {section: {name: text.strip()}}, "--set", parse_text=True)
    check_combinations(config)
    return config


def check_combinations(config: Config) -> None:
    """UserError for values that do not go together."""
    data = config.data
    model = config.model
    clip = config.clip
    train = config.train
    text_head = model.class_head == "text"
    rules = [  # (option, whether it is right, what to do)
        ("data.short_edges", data.short_edges, "give at least one"),
        ("data.train_on", data.train_on == "all" or text_head, 'a linear head needs "all"'),
        ("model.hidden", model.hidden % 32 == 0, "give a multiple of 32"),
        ("model.heads", model.hidden % model.heads == 0, "give a divisor of model.hidden"),
        ("model.small_widths", len(model.small_widths) == 4, "give four widths"),
        ("model.proposals", model.proposals or text_head, 'false needs class_head = "text"'),
        ("clip.ensemble", not clip.ensemble or text_head, "a linear head needs false"),
        ("clip.prompt", clip.prompt, "give at least one template"),
        (
            "eval.weights",
            not config.eval.weights or (clip.ensemble and model.proposals),
            "they need clip.ensemble and model.proposals",
        ),
        (
            "train.seeds",
            not train.seeds or train.task == "prompts",
            "only task prompts learns several at once",
        ),
        (
            "train.init",
            not train.init or train.task == "segment",
            "only task segment starts from a segmenter",
        ),
    ]
    for name, right, todo in rules:
        if not right:
            section, key = name.split(".")
            raise UserError(name, f"is {getattr(getattr(config, section), key)!r}", todo)


def read_toml(file: Path, derived: tuple[Path, ...] = ()) -> list[tuple[str, dict]]:
    """(name, its tables) of a file and of the one that its `base` names, a file beside it, which
    comes first. `derived`: the files that led here.
    """
    todo = did_you_mean_file(file, "give the path of a TOML file")
    in_configs = Path("configs") / f"{file.stem}.toml"
    if in_configs.is_file() and in_configs != file:
        todo = f"did you mean {in_configs}?"
    text = read_text(file, f"config {file}", todo)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"config {file}", f"is not TOML: {error}", "correct that line") from None

    base = values.pop("base", None)
    if base is None:
        return [(str(file), values)]
    derived = (*derived, file)
    path = file.with_name(f"{base}.toml")
    if not isinstance(base, str) or path in derived:
        todo = "name another file beside this one, without .toml"
        raise UserError(f"config {file}: base", f"is {base!r}", todo)
    return [*read_toml(path, derived), (str(file), values)]


def update(config: Config, values: dict, source: str, parse_text: bool = False) -> None:
    """Set options of `config` from {section: {key: value}}; with `parse_text`, values are text."""
    if not isinstance(values, dict):
        raise UserError(source, "is not a table of sections", "give a checkpoint of train.py")
    options = {
        f"{section}.{key}": option.type
        for section, part in vars(config).items()
        for key, option in part.__dataclass_fields__.items()
    }
    for section, fields in values.items():
        if section not in vars(config):
            raise unknown(source, section, list(vars(config)))
        if not isinstance(fields, dict):
            todo = f"write [{section}] with keys below it"
            raise UserError(f"{source}: {section}", "is a section, not a value", todo)
        for key, value in fields.items():
            name = f"{section}.{key}"
            if name not in options:
                raise unknown(source, name, list(options))
            expected = options[name]
            if parse_text:
                value = parse(value, expected)
            if not matches(value, expected):
                why = f"is {value!r}, not {describe(expected)}"
                raise UserError(f"{source}: {name}", why, "correct it")
            part = getattr(config, section)
            if isinstance(getattr(part, key), float):
                value = float(value)
            elif isinstance(value, str) and value.startswith("~"):
                value = str(path_of(value))
            setattr(part, key, value)


def unknown(source: str, name: str, options: list[str]) -> UserError:
    todo = did_you_mean(name, options, "all options are in zsseg/config.py")
    return UserError(f"{source}: {name}", "is not a known option", todo)


def parse(text: str, expected: object) -> object:
    """A command-line value: the text itself for a string, else TOML where it is that (so strings
    need no quotes).
    """
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if expected is str and not isinstance(value, str) else value


def matches(value: object, expected: object) -> bool:
    """Whether a value is of a field's type and in its range; a whole number may stand for a
    float.
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
    return type(value) is expected or (expected is float and type(value) is int)


def describe(expected: object) -> str:
    origin = get_origin(expected)
    arguments = get_args(expected)
    if origin is Annotated:
        base, interval = arguments
        return f"{describe(base)} {interval}"
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is types.UnionType:
        return " or ".join(map(describe, arguments))
    if origin is list:
        return f"a list, each {describe(*arguments)}"
    return {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}[
        expected
    ]
