"""Configuration files and overrides; the original's configurations, key by key."""

import json
import re
from dataclasses import asdict

import pytest
from conftest import GOLDEN, ROOT

from zsseg.config import OPTIONS, Config, load_config
from zsseg.utils import UserError


def test_every_file_loads_and_says_something():
    for file in (ROOT / "configs").glob("*.toml"):
        assert asdict(load_config(file)) != asdict(Config()), file


def test_overrides_come_last_and_need_no_quotes(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('[train]\nsteps = 7\nlr = 1\n[clip]\nprompt = "vild"\n')
    words = ["train.steps=9", "clip.prompt=['a {}']", "data.name=voc", "data.short_edges=[1, 2]"]
    config = load_config(file, [*words, "eval.compare=true"])
    assert (config.train.steps, config.train.lr, config.data.name) == (9, 1.0, "voc")
    assert (config.clip.prompt, config.data.short_edges) == (["a {}"], [1, 2])
    assert isinstance(config.train.lr, float) and config.eval.compare
    assert load_config(file, ["clip.prompt=single"]).clip.prompt == "single"
    assert load_config(None, ["data.name=2012"]).data.name == "2012"
    assert load_config(None, "train.steps=9").train.steps == 9


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("train.stps=3", ["train.stps", "train.steps"]),
        ("trian.steps=3", ["trian", "train"]),
        ("model.kernels=false", ["model.kernels", "not a known option"]),
        ("train.steps=many", ["train.steps", "'many', not int above 0"]),
        ("train.steps=1.5", ["train.steps", "int"]),
        ("eval.compare=1", ["eval.compare", "not bool"]),
        ("steps=3", ["section.key=value"]),
        ("train.steps=0", ["train.steps", "above 0"]),
        ("clip.ensemble_weight=1.5", ["clip.ensemble_weight", "0 to 1"]),
        ("clip.mean=[0.5]", ["clip.mean", "three"]),
        ("model.backbone=R18", ["model.backbone", "R50"]),
        ("model.num_heads=3", ["model.hidden_dim", "multiple"]),
        ("clip.prompt=[]", ["clip.prompt", "template"]),
        ("log.wandb=maybe", ["log.wandb", "offline"]),
        ("data.short_edges=[]", ["data.short_edges", "give some"]),
        ("data.short_edges=[64, 5000]", ["data.short_edges", "none above data.max_size"]),
        ("train.seeds=[1, 2, 1];train.task=prompts", ["train.seeds", "each once"]),
        ("train.seeds=[1, 2]", ["train.seeds", "to task prompts"]),
        ("train.teacher=a.pt;train.task=prompts", ["train.teacher", "task segment"]),
    ],
)
def test_mistakes_are_user_errors_that_name_the_key(word, parts):
    with pytest.raises(UserError) as error:
        load_config(None, word.split(";"))
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", [k for k, v in OPTIONS.items() if re.search("int|float", str(v))])
def test_every_number_has_a_range(name, tmp_path):
    """From the command line or a file; in lists, too."""
    section, key = name.split(".")
    for value in ("-1", "nan", "-inf", "inf", "1e400", "true", "'1'", "1979-05-27"):
        text = f"[1, {value}]" if "list" in str(OPTIONS[name]) else value
        (tmp_path / "a.toml").write_text(f"[{section}]\n{key} = {text}\n")
        for source in ((None, [f"{name}={text}"]), (tmp_path / "a.toml", [])):
            with pytest.raises(UserError, match=rf"{name}: is .*, not (list\[)?(int|float) "):
                load_config(*source)


@pytest.mark.parametrize(
    "text", ["[train\nsteps=1", "steps = 1", "[train]\nsteps = '3'", "[nothing]\nx = 1"]
)
def test_broken_files_are_user_errors(tmp_path, text):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(UserError, match=r"bad\.toml"):
        load_config(tmp_path / "bad.toml")


def test_a_base_comes_first(tmp_path):
    """By its path, beside the file or in configs/, with or without .toml."""
    (tmp_path / "a.toml").write_text("[train]\nsteps = 7\nseed = 3\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.toml").write_text('base = "../a"\n[train]\nsteps = 8\n')
    (tmp_path / "c.toml").write_text('base = "sub/b.toml"\n[train]\nlr = 0.5\n')
    train = load_config(tmp_path / "c.toml").train
    assert (train.steps, train.seed, train.lr) == (8, 3, 0.5)
    (tmp_path / "d.toml").write_text('base = "shapes"\n')
    assert load_config(tmp_path / "d.toml").model.num_queries == 16
    for base, why in (('"c"', "base: is 'c'"), ("3", r"a\.toml: base: is 3"), ('"x"', "config x")):
        (tmp_path / "a.toml").write_text(f"base = {base}\n")
        with pytest.raises(UserError, match=why):
            load_config(tmp_path / "c.toml")


def test_a_description_inherits_nothing(tmp_path):
    """Neither from a checkpoint nor from a `base`: of a data set (name or folder), of a CLIP."""
    own = tmp_path / "own.toml"
    own.write_text(
        '[data]\nname = "folder"\nfolder = "a"\nclasses = ["cat", "dog"]\nvalues = [1, 2]\n'
        'unseen = ["dog"]\nexif_turn = true\nsplit = "test"\n[clip]\nweights = "a.pt"\nheads = 16\n'
        'activation = "gelu"\n'
    )
    base = asdict(load_config(own))
    (tmp_path / "b.toml").write_text('base = "own"\n[data]\nfolder = "b"\nclasses = ["cat"]\n')
    for config in (load_config(tmp_path / "b.toml"), load_config(tmp_path / "b.toml", (), base)):
        data = config.data
        assert (data.name, data.folder, data.classes, data.values) == ("folder", "b", ["cat"], [])
        assert (data.unseen, data.exif_turn, data.split) == ([], False, "val")
        assert (config.clip.heads, config.clip.activation) == (16, "gelu")
    other = load_config(None, ["clip.weights=b.pt", "data.name=voc"], base)
    assert (other.clip.heads, other.clip.activation) == (0, "")
    assert (other.data.split, other.data.classes, other.data.values) == ("val", [], [])
    # --set completes the description of the file beside it.
    completed = load_config(own, ["data.folder=c", "clip.weights=c.pt"])
    assert (completed.data.folder, completed.data.values, completed.clip.heads) == ("c", [1, 2], 16)


# The original's configurations: a file here, and what is set.

ORIGINAL = json.loads((GOLDEN / "original_configs.json").read_text())
OTHERS = ("shapes", "ovseg", "pcontext_full")
FILES = {f.stem for f in (ROOT / "configs").glob("*.toml") if not f.stem.startswith(OTHERS)}
R50 = ["model.backbone=R50", "model.weights=imagenet"]
SUPERVISED = ["data.train_on=all", "model.class_head=linear", "clip.ensemble=false"]
SINGLE = "coco_stuff_r101c_single"
VARIANTS = {
    "voc_r50": ("voc_r101c", R50),
    "voc_r50_supervised": ("voc_r50_single", SUPERVISED),
    "voc_r101c_supervised": ("voc_r101c_single", SUPERVISED),
    "coco_stuff_r50": ("coco_stuff_r101c", R50),
    "coco_stuff_r50_single": (SINGLE, R50),
    "coco_stuff_r50_supervised": (SINGLE, R50 + SUPERVISED),
    "coco_stuff_r101c_supervised": (SINGLE, SUPERVISED),
}
for prompt in ("imagenet", "vild"):
    VARIANTS[f"coco_stuff_r50_{prompt}"] = (SINGLE, [*R50, f"clip.prompt={prompt}"])
    VARIANTS[f"coco_stuff_r101c_{prompt}"] = (SINGLE, [f"clip.prompt={prompt}"])
for clip in ("RN50", "RN101", "RN50x4", "RN50x16", "ViT-B/32", "ViT-L/14"):
    suffix = clip.lower().replace("-", "").replace("/", "")
    VARIANTS[f"{SINGLE}_{suffix}"] = (SINGLE, [f"clip.weights={clip}"])
CROSS = ("voc_cross", "ade20k", "ade20k_full", "pcontext", "cityscapes")
PREFIX = {"voc": "voc_", "coco_stuff": "coco_2017_", "pcontext": "pcontext_"}
PREFIX |= {name: f"{name}_" for name in ("ade20k_full", "cityscapes")} | {"ade20k": "ade20k_sem"}


def test_every_configuration_of_the_original_is_here():
    """As a file or by settings; but for one that inherits from a file that does not exist."""
    names = FILES | VARIANTS.keys()
    assert names - ORIGINAL.keys() == {"voc_r101c_single", f"{SINGLE}_vitl14"}
    assert ORIGINAL.keys() <= names


@pytest.mark.parametrize("name", sorted(ORIGINAL))
def test_values_are_the_original_s(name):
    """Everything that changes numbers, key by key."""
    file, settings = VARIANTS.get(name, (name, []))
    config = load_config(ROOT / "configs" / f"{file}.toml", settings)
    data, model, clip, train = config.data, config.model, config.clip, config.train
    expected = ORIGINAL[name]
    solver = {k.removeprefix("SOLVER."): v for k, v in expected.items()}
    adapter = {k.removeprefix("MODEL.CLIP_ADAPTER."): v for k, v in expected.items()}
    prompts = train.task == "prompts"
    supervised = model.class_head == "linear"
    kind = "MaskFormer" if supervised else "ZeroShotMaskFormer"
    assert expected["MODEL.META_ARCHITECTURE"] == ("ProposalClipClassifier" if prompts else kind)
    learner = {"predefined": "single", "learnable": "learned", "vild": "vild"}
    learner["imagenet"] = "imagenet"
    if adapter.get("SEPERATE_ADAPTER"):
        assert clip.prompt == "single"
        assert clip.region_prompt == learner[adapter["REGION_CLIP_ADAPTER.PROMPT_LEARNER"]]
    elif not supervised:
        assert clip.prompt == learner[adapter["PROMPT_LEARNER"]] and not clip.region_prompt
    assert clip.weights == adapter["CLIP_MODEL_NAME"] and adapter["PROMPT_SHAPE"] == "(16, 0)"
    assert expected["DATASETS.TEST"].startswith(f'("{PREFIX[data.name]}')
    if name not in CROSS:
        assert ("_base_" in expected["DATASETS.TRAIN"]) == (data.train_on == "seen")
        numbers = (train.steps, train.batch_size, train.lr, train.weight_decay)
        keys = ("MAX_ITER", "IMS_PER_BATCH", "BASE_LR", "WEIGHT_DECAY")
        assert numbers == tuple(solver[key] for key in keys)
    if prompts:
        assert (solver["OPTIMIZER"], solver["LR_SCHEDULER_NAME"]) == ("SGD", "WarmupCosineLR")
        numbers = (config.prompts.warmup_steps, config.prompts.warmup_factor, train.clip_grad)
        keys = ("WARMUP_ITERS", "WARMUP_FACTOR", "CLIP_GRADIENTS.CLIP_VALUE")
        assert numbers == tuple(solver[key] for key in keys)
        assert config.prompts.samples_per_class == expected["DATASETS.SAMPLE_PER_CLASS"]
        return
    assert model.backbone == {50: "R50", 101: "R101c"}[expected["MODEL.RESNETS.DEPTH"]]
    sizes = (expected["INPUT.MIN_SIZE_TEST"], expected["INPUT.MAX_SIZE_TEST"])
    assert (data.test_short_edge, data.max_size) == sizes
    if not supervised:
        assert clip.ensemble and clip.ensemble_weight == adapter["CLIP_ENSEMBLE_WEIGHT"]
        assert clip.mask_threshold == adapter["MASK_THR"] and adapter["MASK_EXPAND_RATIO"] == 1
    if name in CROSS:
        return
    assert expected["INPUT.CROP.SIZE"] == f"({data.crop}, {data.crop})"
    assert data.short_edges == expected["INPUT.MIN_SIZE_TRAIN"]
    assert data.max_size == expected["INPUT.MAX_SIZE_TRAIN"]
    schedule = (solver["OPTIMIZER"], solver["LR_SCHEDULER_NAME"], solver["WARMUP_ITERS"])
    assert schedule == ("ADAMW", "WarmupPolyLR", 0)
    assert train.backbone_lr == solver["BACKBONE_MULTIPLIER"]
    assert train.clip_grad == solver["CLIP_GRADIENTS.CLIP_VALUE"]
    numbers = (model.num_queries, model.decoder_layers, model.hidden_dim)
    numbers += (train.focal_weight, train.dice_weight, train.no_object_weight)
    keys = "NUM_OBJECT_QUERIES DEC_LAYERS HIDDEN_DIM MASK_WEIGHT DICE_WEIGHT NO_OBJECT_WEIGHT"
    assert numbers == tuple(expected[f"MODEL.MASK_FORMER.{key}"] for key in keys.split())
