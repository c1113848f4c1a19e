"""Every option of the program with its default, read from a TOML file and `--set
section.key=value`.

A field exists here or it is an error: an unknown key or a wrong type names the nearest known key.
Numbers are those of the paper's COCO-Stuff setting unless a file in `configs/` says otherwise.
"""

import difflib
import tomllib
import types
import typing
from dataclasses import asdict, dataclass, field
from pathlib import Path

from zsseg.files import read_text
from zsseg.utils import UserError, did_you_mean, did_you_mean_file, path_of


@dataclass
class DataConfig:
    # shapes | voc | coco_stuff | ade20k | ade20k_full | pcontext | cityscapes | folder (your own)
    name: str = "shapes"
    # Of "folder" only, below the data root:
    folder: str = ""  # where it lies
    # e.g. "images/{split}/{id}.jpg"; without {split}, <split>.txt lists the ids; ".*" is any ending
    images: str = ""
    labels: str = ""  # e.g. "masks/{split}/{id}.png": one channel of 8 or 16 bits
    classes: list[str] = field(default_factory=list)  # names
    unseen: list[str] = field(default_factory=list)  # those that training hides
    # The label value of each class, all others are ignored; []: 0, 1, 2, ...
    values: list[int] = field(default_factory=list)
    exif_turn: bool = (
        False  # turn images as their camera says, which labelling tools do and COCO's labels do not
    )
    split: str = "val"  # the split that train.py (at its end) and eval.py measure on
    train_on: str = "seen"  # seen | all: the classes that training targets show
    # Drawn at training.
    short_edges: list[int] = field(default_factory=lambda: list(range(320, 961, 64)))
    max_size: int = 2560  # longest edge after resizing, at training and at test
    crop: int = 640  # side of the square training crop
    color_jitter: bool = True
    test_short_edge: int = 640
    workers: int = 4


@dataclass
class ModelConfig:
    backbone: str = (
        # R50 | R101c | SwinB (window 12) | small (a few layers with batch norm, from scratch)
        "R101c"
    )
    # initial backbone: "" (random), a file (torchvision .pth, detectron2 .pkl, Swin's own .pth) or
    # "imagenet"
    weights: str = ""
    small_widths: list[int] = field(default_factory=lambda: [32, 64, 96, 128])
    queries: int = 100
    hidden: int = 256  # width of pixel decoder, transformer and mask embedding
    heads: int = 8
    feedforward: int = 2048
    decoder_layers: int = 6
    dropout: float = 0.1
    proposals: bool = True  # false: the one-stage baseline, a class for every pixel
    # text (any words) | linear (fully supervised MaskFormer: the data set's classes, no CLIP)
    class_head: str = "text"
    class_hidden: int = 1024  # hidden width of the class-embedding MLP
    kernels: bool = (
        True  # Triton kernels on CUDA; false: the plain PyTorch that they are tested against
    )
    # auto (on CUDA: training, and evaluation of many images; on CPUs CLIP, for many) | on | off
    compile: str = "auto"
    # auto (on CUDA; except in training on CPUs that multiply in bf16, CLIP only) | on | off
    bf16: str = "auto"


@dataclass
class ClipConfig:
    weights: str = "ViT-B/16"  # an OpenAI model name or a state-dict file; {root} is the data root
    # auto (OpenAI's files are known; "quickgelu" for others, which is said) | quickgelu | gelu
    activation: str = "auto"
    # of the image tower's attention; 0: width / 64. Nothing in a file tells (ViT-H/14 has 16 of 80)
    heads: int = 0
    prompt: str | list[str] = "single"  # single | imagenet | vild | learned | a list of templates
    region_prompt: str | list[str] = ""  # a prompt of its own for the regions ("" = the same)
    prompts: str = ""  # checkpoint that holds the learned prompt
    prompt_prefix: int = 16  # learned tokens before the name
    ensemble: bool = True  # False: the segmenter's own class probabilities alone
    ensemble_weight: float = (
        0.8  # w: seen classes head^w clip^(1-w), unseen the other way round; 0: CLIP only
    )
    # False: all classes are weighted as unseen ones (OVSeg, which is trained on all)
    ensemble_seen: bool = True
    mask_threshold: float = 0.5
    expand_ratio: float = 1.0
    regions: str = (
        "crops"  # crops (the paper's) | pool | tokens: one pass over the image (zsseg/regions.py)
    )
    # of a CLIP that was adapted to masked crops (OVSeg) and holds one; others have none
    mask_prompt: bool = True
    dense_edge: int = 224  # of the image's shorter side in that pass
    chunk: int = 0  # region crops in one pass through CLIP; 0: what suits the device


@dataclass
class TrainConfig:
    # segment | prompts (learning CLIP's prompt) | clip (contrastive, for the synthetic data set)
    task: str = "segment"
    steps: int = 60_000
    batch_size: int = 32  # over all processes
    seed: int = 0
    # Prompts: these are learned side by side, and the best one is kept.
    seeds: list[int] = field(default_factory=list)
    lr: float = 1e-4
    weight_decay: float = 1e-4
    backbone_lr: float = 0.1  # multiplies lr for the backbone
    power: float = 0.9  # polynomial decay
    clip_grad: float = 0.01  # norm over all parameters; 0: no limit
    focal_weight: float = 20.0
    dice_weight: float = 1.0
    no_object_weight: float = 0.1
    # a segmenter's checkpoint, ours or the original's, or the name of a published model, whose
    # weights training starts from (fine-tuning)
    init: str = ""
    teacher: str = (
        ""  # self-training: a checkpoint whose predictions label what the training labels hide
    )
    # Pixels whose best unseen class is less probable than this stay unlabelled; a softmax over
    # scores from 0 to about 1, so
    # that for C classes probabilities lie between 1/C and 3/C, roughly.
    reject: float = 0.0
    checkpoint_every: int = 5000
    eval_every: int = 5000  # on the way, on val (best.pt is the best of these); 0: only at the end
    # steps in a row whose loss or gradient is not finite (they change nothing) before the run stops
    bad_steps: int = 20


@dataclass
class PromptsConfig:
    """Learning a prompt: SGD with a cosine schedule, on crops of single regions."""

    samples_per_class: int = 32  # at most; drawn with train.seed
    held_out: int = (
        16  # more of each class, at most a fifth of its regions, on which the seeds are compared
    )
    momentum: float = 0.9
    warmup_steps: int = 100
    warmup_factor: float = 0.005  # of the rate, constant


@dataclass
class ContrastConfig:
    """The small CLIP of the synthetic data set: sizes of a model that is built rather than
    loaded.
    """

    embed: int = 64
    resolution: int = 32
    stem: list[int] = field(default_factory=lambda: [24, 48])
    vision_width: int = 96
    vision_layers: int = 3
    text_width: int = 64
    text_layers: int = 2
    context: int = 40
    groups: int = 4  # sets of distinct classes a step
    masked_share: float = 0.5  # of crops that are masked; the others are plain boxes


@dataclass
class EvalConfig:
    # also measure MaskFormer only, CLIP only, CLIP x objectness, and CLIP on the true masks
    compare: bool = False
    # Also measure the ensemble with these weights, in the same pass.
    weights: list[float] = field(default_factory=list)
    # Short edges whose score maps are averaged; [] = data.test_short_edge.
    sizes: list[int] = field(default_factory=list)
    flip: bool = False  # average with the mirror image's score map
    window: int = (
        0  # side of sliding windows that overlap by 2/3, in pixels of the network input; 0: none
    )


@dataclass
class LogConfig:
    wandb: str = "disabled"  # online | offline | disabled
    project: str = "zsseg"
    every: int = 20


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


# What the type of a field does not say.
CHOICES = {
    "data.train_on": ("seen", "all"),
    "model.class_head": ("text", "linear"),
    "clip.activation": ("auto", "quickgelu", "gelu"),
    "clip.regions": ("crops", "pool", "tokens"),
    "model.backbone": ("R50", "R101c", "SwinB", "small"),
    "model.compile": ("auto", "on", "off"),
    "model.bf16": ("auto", "on", "off"),
    "train.task": ("segment", "prompts", "clip"),
    "log.wandb": ("online", "offline", "disabled"),
}
POSITIVE = (
    "train.steps",
    "train.batch_size",
    "train.lr",
    "train.checkpoint_every",
    "train.bad_steps",
    "log.every",
    "data.crop",
    "data.max_size",
    "data.test_short_edge",
    "model.queries",
    "model.heads",
    "model.feedforward",
    "model.decoder_layers",
    "model.class_hidden",
    "clip.expand_ratio",
    "clip.dense_edge",
    "prompts.samples_per_class",
)
PATHS = (
    "data.folder",
    "data.labels",
    "data.images",
    "model.weights",
    "clip.weights",
    "clip.prompts",
    "train.init",
    "train.teacher",
)
UNIT = (
    "clip.ensemble_weight",
    "clip.mask_threshold",
    "model.dropout",
    "prompts.momentum",
    "prompts.warmup_factor",
    "contrast.masked_share",
    "train.reject",
)
COUNTS = (
    "clip.chunk",
    "clip.heads",
    "clip.prompt_prefix",
    "data.workers",
    "train.eval_every",
    "train.seed",
    "eval.window",
    "train.weight_decay",
    "train.power",
    "train.clip_grad",
    "prompts.warmup_steps",
    "prompts.held_out",
)


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
    for name, values in [] if file is None else read_toml(file):
        update(config, values, name)
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign or key.count(".") != 1:
            raise UserError(
                f"--set {item}",
                "is not of the form section.key=value",
                "write e.g. train.steps=100",
            )
        section, name = key.strip().split(".")
        update(config, {section: {name: text.strip()}}, "--set", text_values=True)
    check_values(config)
    for name in PATHS:
        section, key = name.split(".")
        part = getattr(config, section)
        if getattr(part, key).startswith("~"):
            setattr(part, key, str(path_of(getattr(part, key))))
    return config


def check_values(config: Config) -> None:
    """UserError for a value that cannot be."""
    values = {f"{s}.{k}": v for s, part in asdict(config).items() for k, v in part.items()}
    for name, allowed in CHOICES.items():
        if values[name] not in allowed:
            raise UserError(
                name,
                f"is {values[name]!r}",
                did_you_mean(values[name], allowed, f"choose one of {', '.join(allowed)}"),
            )
    for name in (*POSITIVE, *UNIT, *COUNTS):
        if (
            not values[name] >= 0
            or (name in POSITIVE and not values[name])
            or (name in UNIT and values[name] > 1)
        ):
            allowed = (
                "above 0" if name in POSITIVE else "from 0 to 1" if name in UNIT else "of 0 or more"
            )
            raise UserError(name, f"is {values[name]}", f"give a number {allowed}")
    for name, (right, todo) in rules(config).items():
        if not right:
            raise UserError(name, f"is {values[name]}", todo)


def rules(config: Config) -> dict[str, tuple[bool, str]]:
    """What values must be together: {key: (whether it is right, what to do)}."""
    return {
        "model.hidden": (
            config.model.hidden > 0 and config.model.hidden % 32 == 0,
            "give a multiple of 32",
        ),
        "model.heads": (
            config.model.hidden % config.model.heads == 0,
            "give a divisor of model.hidden",
        ),
        "model.small_widths": (
            len(config.model.small_widths) == 4 and min(config.model.small_widths) > 0,
            "give four widths",
        ),
        "data.short_edges": (min(config.data.short_edges, default=0) > 0, "give sizes above 0"),
        "eval.sizes": (min(config.eval.sizes, default=1) > 0, "give sizes above 0"),
        "eval.weights": (
            all(
                0 <= w <= 1 and config.clip.ensemble and config.model.proposals
                for w in config.eval.weights
            ),
            "give numbers from 0 to 1; they want clip.ensemble and model.proposals",
        ),
        "data.train_on": (
            config.data.train_on == "all" or config.model.class_head == "text",
            'a linear head needs "all"',
        ),
        "train.seeds": (
            config.train.task == "prompts" or not config.train.seeds,
            "only task prompts learns several at once",
        ),
        "model.proposals": (
            config.model.proposals or config.model.class_head == "text",
            'pixels want class_head = "text"',
        ),
        "clip.ensemble": (
            not config.clip.ensemble or config.model.class_head == "text",
            "a linear head needs false",
        ),
        "clip.prompt": (config.clip.prompt != [], "give at least one template"),
        "train.init": (
            not config.train.init or config.train.task == "segment",
            "only task segment starts from a segmenter",
        ),
    }


def read_toml(file: str | Path, above: tuple[Path, ...] = ()) -> list[tuple[str, dict]]:
    """(name, its tables) of a file and of the one that its `base` names, a file beside it, which
    comes first.
    """
    other, todo = (
        Path("configs") / f"{Path(file).stem}.toml",
        did_you_mean_file(file, "give the path of a TOML file"),
    )
    todo = f"did you mean {other}?" if other.is_file() and other != Path(file) else todo
    text = read_text(file, f"config {file}", todo)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"config {file}", f"is not TOML: {error}", "correct that line") from None
    base = values.pop("base", None)
    if base is None:
        return [(str(file), values)]
    path = Path(file).with_name(f"{base}.toml")
    if not isinstance(base, str) or path in (*above, Path(file)):
        raise UserError(
            f"config {file}: base",
            f"is {base!r}",
            "name another file beside this one, without .toml",
        )
    return [*read_toml(path, (*above, Path(file))), (str(file), values)]


def update(config: Config, values: dict, source: str, text_values: bool = False) -> None:
    """Set known fields of `config` from {section: {key: value}}; with `text_values`, values are
    parsed from text.
    """
    sections = asdict(config)
    if not isinstance(values, dict):
        raise UserError(source, "is not a table of sections", "give a checkpoint of train.py")
    for section, fields in values.items():
        if section not in sections:
            raise unknown(source, section, list(sections))
        if not isinstance(fields, dict):
            raise UserError(
                f"{source}: {section}",
                "is a section, not a value",
                f"write [{section}] with keys below it",
            )
        part = getattr(config, section)
        kinds = typing.get_type_hints(type(part))
        for key, value in fields.items():
            name = f"{section}.{key}"
            if key not in kinds:
                raise unknown(source, name, [f"{s}.{k}" for s in sections for k in sections[s]])
            if text_values:
                value = parse(value, kinds[key])
            if type(value) is int and kinds[key] is float:
                value = float(value)
            if not matches(value, kinds[key]):
                raise UserError(
                    f"{source}: {name}",
                    f"is {value!r}, not {describe(kinds[key])}",
                    "correct its type",
                )
            setattr(part, key, value)


def parse(text: str, kind: object) -> object:
    """A command-line value: TOML where that gives the field's type, else the text itself (so
    strings need no quotes).
    """
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if matches(value, kind) or kind is not str else text


def matches(value: object, kind: object) -> bool:
    if isinstance(kind, types.UnionType):
        return any(matches(value, k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(matches(v, typing.get_args(kind)[0]) for v in value)
    return type(value) is kind or (kind is float and type(value) is int)


def describe(kind: object) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(describe(k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"a list, each {describe(typing.get_args(kind)[0])}"
    return {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}[kind]


def unknown(source: str, name: str, choices: list[str]) -> UserError:
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0)[0]
    return UserError(f"{source}: {name}", "is not a known key", f"did you mean {near}?")
