"""Configuration files and overrides."""

import dataclasses
import functools
import json
from dataclasses import asdict

import pytest
import torch
from conftest import GOLDEN, ROOT

from zsseg.clip import CLIP, ModifiedResNet, VisionTransformer, build_clip
from zsseg.config import Config, load_config
from zsseg.prompt_learning import PromptClassifier
from zsseg.prompts import TEMPLATES, FixedPrompt, LearnedPrompt
from zsseg.segmenter import Segmenter
from zsseg.utils import UserError


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda f: f.stem)
def test_every_file_loads_and_says_something(file):
    assert asdict(load_config(str(file))) != asdict(Config())


def test_overrides_come_last_and_need_no_quotes(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('[train]\nsteps = 7\nlr = 1\n[clip]\nprompt = "vild"\n')
    words = [
        "train.steps=9",
        "clip.prompt=['a {}']",
        "data.name=voc",
        "data.short_edges=[1, 2]",
        "eval.compare=true",
    ]
    config = load_config(str(file), words)
    assert (config.train.steps, config.train.lr, config.data.name) == (9, 1.0, "voc")
    assert (config.clip.prompt, config.data.short_edges, config.eval.compare) == (
        ["a {}"],
        [1, 2],
        True,
    )
    assert isinstance(config.train.lr, float)
    assert load_config(str(file), ["clip.prompt=single"]).clip.prompt == "single"
    assert load_config(None, ["data.name=2012"]).data.name == "2012"


def test_a_checkpoint_s_configuration_round_trips():
    config = load_config(None, ["clip.prompt=['x {}']", "train.lr=0.5"])
    assert asdict(load_config(base=asdict(config))) == asdict(config)
    assert load_config(base=asdict(config), overrides=["train.lr=2"]).train.lr == 2


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("train.stps=3", ["train.stps", "train.steps"]),
        ("trian.steps=3", ["trian", "train"]),
        ("train.steps=many", ["train.steps", "'many'", "whole number"]),
        ("train.steps=1.5", ["train.steps", "whole number"]),
        ("train.lr=fast", ["train.lr", "a number"]),
        ("eval.compare=1", ["eval.compare", "true or false"]),
        ("data.short_edges=[1, 'a']", ["data.short_edges", "list"]),
        ("steps=3", ["section.key=value"]),
        ("train.steps", ["section.key=value"]),
        ("train.steps=0", ["train.steps", "above 0"]),
        ("clip.ensemble_weight=1.5", ["clip.ensemble_weight", "0 to 1"]),
        ("model.backbone=R18", ["model.backbone", "R50"]),
        ("model.heads=3", ["model.heads", "divisor"]),
        ("model.hidden=63", ["model.hidden", "multiple of 32"]),
        ("model.small_widths=[]", ["model.small_widths"]),
        ("data.short_edges=[0]", ["data.short_edges"]),
        ("clip.prompt=[]", ["clip.prompt", "template"]),
        ("train.lr=nan", ["train.lr"]),
        ("clip.ensemble_weight=nan", ["clip.ensemble_weight"]),
        ("clip.chunk=-1", ["clip.chunk", "0 or more"]),
        ("log.wandb=maybe", ["log.wandb", "offline"]),
    ],
)
def test_mistakes_are_user_errors_that_name_the_key(word, parts):
    with pytest.raises(UserError) as error:
        load_config(None, [word])
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["[train\nsteps=1", "steps = 1", "[train]\nsteps = '3'", "[nothing]\nx = 1"]
)
def test_broken_files_are_user_errors(tmp_path, text):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(UserError, match=r"bad\.toml"):
        load_config(str(tmp_path / "bad.toml"))


@functools.cache
def clip_on_meta(name: str) -> dict[str, torch.Tensor]:
    """The state dict of one of OpenAI's models, without values: (image tower, embed, text
    width).
    """
    towers = {
        "ViT-B/32": (VisionTransformer, (224, 32, 768, 12, 512), 512, 512),
        "ViT-B/16": (VisionTransformer, (224, 16, 768, 12, 512), 512, 512),
        "ViT-L/14": (VisionTransformer, (224, 14, 1024, 24, 768), 768, 768),
        "RN50": (ModifiedResNet, ([3, 4, 6, 3], 64, 224, 1024), 1024, 512),
        "RN101": (ModifiedResNet, ([3, 4, 23, 3], 64, 224, 512), 512, 512),
        "RN50x4": (ModifiedResNet, ([4, 6, 10, 6], 80, 288, 640), 640, 640),
        "RN50x16": (ModifiedResNet, ([6, 8, 18, 8], 96, 384, 768), 768, 768),
    }
    tower, sizes, embed, width = towers[name]
    with torch.device("meta"):
        return CLIP(tower(*sizes), embed, 77, 49408, width, 12).state_dict()


ORIGINAL = json.loads((GOLDEN / "original_configs.json").read_text())
OTHERS = ("shapes", "ovseg")  # configurations that are none of the original's
FILES = {f.stem for f in (ROOT / "configs").glob("*.toml") if not f.stem.startswith(OTHERS)}
R50, SUPERVISED = (
    ["model.backbone=R50", "model.weights=imagenet"],
    ["data.train_on=all", "model.class_head=linear", "clip.ensemble=false"],
)
# The original's other files, as a file here and what is set: (file, settings).
VARIANTS = {
    "voc_r50": ("voc_r101c", R50),
    "voc_r50_supervised": ("voc_r50_single", SUPERVISED),
    "voc_r101c_supervised": ("voc_r101c_single", SUPERVISED),
    "coco_stuff_r50": ("coco_stuff_r101c", R50),
    "coco_stuff_r50_single": ("coco_stuff_r101c_single", R50),
    "coco_stuff_r50_supervised": ("coco_stuff_r101c_single", R50 + SUPERVISED),
    "coco_stuff_r101c_supervised": ("coco_stuff_r101c_single", SUPERVISED),
}
for prompt in ("imagenet", "vild"):
    VARIANTS[f"coco_stuff_r50_{prompt}"] = (
        "coco_stuff_r101c_single",
        [*R50, f"clip.prompt={prompt}"],
    )
    VARIANTS[f"coco_stuff_r101c_{prompt}"] = ("coco_stuff_r101c_single", [f"clip.prompt={prompt}"])
for suffix, clip in {
    "rn50": "RN50",
    "rn101": "RN101",
    "rn50x4": "RN50x4",
    "rn50x16": "RN50x16",
    "vitb32": "ViT-B/32",
    "vitl14": "ViT-L/14",
}.items():
    VARIANTS[f"coco_stuff_r101c_single_{suffix}"] = (
        "coco_stuff_r101c_single",
        [f"clip.weights={clip}"],
    )
NAMES = sorted(FILES | VARIANTS.keys())


def configured(name: str) -> Config:
    """A file of configs/, or a variant."""
    file, settings = VARIANTS.get(name, (name, []))
    return load_config(ROOT / "configs" / f"{file}.toml", settings)


def test_every_configuration_of_the_original_is_here():
    """As a file or by settings; but for one that inherits from a file that does not exist."""
    assert set(NAMES) - set(ORIGINAL) == {"voc_r101c_single", "coco_stuff_r101c_single_vitl14"}
    assert set(ORIGINAL) <= set(NAMES)


def test_a_base_comes_first(tmp_path):
    (tmp_path / "a.toml").write_text("[train]\nsteps = 7\nseed = 3\n")
    (tmp_path / "b.toml").write_text('base = "a"\n[train]\nsteps = 8\n')
    (tmp_path / "c.toml").write_text('base = "b"\n[train]\nlr = 0.5\n')
    train = load_config(tmp_path / "c.toml").train
    assert (train.steps, train.seed, train.lr) == (8, 3, 0.5)
    (tmp_path / "a.toml").write_text('base = "c"\n')
    with pytest.raises(UserError, match="base: is 'c'"):
        load_config(tmp_path / "c.toml")
    (tmp_path / "a.toml").write_text("base = 3\n")
    with pytest.raises(UserError, match=r"a\.toml: base: is 3"):
        load_config(tmp_path / "c.toml")
    (tmp_path / "a.toml").write_text('base = "nowhere"\n')
    with pytest.raises(UserError, match=r"nowhere\.toml"):
        load_config(tmp_path / "c.toml")


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_builds_its_model(name, monkeypatch):
    """On the meta device: sizes fit together, the paper's classes and CLIP are in it."""
    monkeypatch.setattr("zsseg.tokenizer.read_merges", lambda count: [])  # shapes need no words
    config = configured(name)
    state = clip_on_meta(config.clip.weights)
    with torch.device("meta"):
        if config.train.task == "prompts":
            clip = build_clip(state)
            model = PromptClassifier(
                clip, [LearnedPrompt(clip.token_embedding.weight.shape[1])], ["cat"]
            )
            assert {n for n, p in model.named_parameters() if p.requires_grad} == {
                "prompts.0.prefix"
            }
            return
        segmenter = Segmenter(config, None if config.model.class_head == "linear" else state)
    original = ORIGINAL.get(name, {})
    learned = {p for p in ("prompt", "region_prompt") if p in segmenter.learned_state()}
    if config.model.class_head == "linear":
        assert segmenter.clip is None and not learned
        assert (
            segmenter.maskformer.class_embed.out_features
            == original["MODEL.SEM_SEG_HEAD.NUM_CLASSES"] + 1
        )
        return
    embed = segmenter.maskformer.class_embed[-1].out_features
    assert (
        embed
        == state["text_projection"].shape[1]
        == original.get("MODEL.SEM_SEG_HEAD.EMBEDDING_DIM", embed)
    )
    assert learned == {
        k for k in ("prompt", "region_prompt") if getattr(config.clip, k) == "learned"
    }


@pytest.mark.parametrize("name", sorted(ORIGINAL))
def test_values_are_the_original_s(name):
    """Everything that changes numbers, key by key."""
    config, expected = configured(name), ORIGINAL[name]
    solver, adapter = (
        (lambda k: expected[f"SOLVER.{k}"]),
        (lambda k: expected.get(f"MODEL.CLIP_ADAPTER.{k}")),
    )
    prompts, supervised = config.train.task == "prompts", config.model.class_head == "linear"
    assert expected["MODEL.META_ARCHITECTURE"] == (
        "ProposalClipClassifier"
        if prompts
        else "MaskFormer"
        if supervised
        else "ZeroShotMaskFormer"
    )
    learner = {"predefined": "single", "learnable": "learned"}
    if adapter("SEPERATE_ADAPTER"):
        assert config.clip.prompt == "single"
        assert config.clip.region_prompt == learner[adapter("REGION_CLIP_ADAPTER.PROMPT_LEARNER")]
    elif not supervised:
        assert config.clip.prompt == learner.get(
            adapter("PROMPT_LEARNER"), adapter("PROMPT_LEARNER")
        )
        assert not config.clip.region_prompt
    assert (
        config.clip.weights == adapter("CLIP_MODEL_NAME") and adapter("PROMPT_SHAPE") == "(16, 0)"
    )
    sets = {
        "voc": "voc_",
        "coco_stuff": "coco_2017_",
        "ade20k": "ade20k_sem",
        "ade20k_full": "ade20k_full_sem",
        "pcontext": "pcontext_",
        "cityscapes": "cityscapes_",
    }
    assert expected["DATASETS.TEST"].startswith(f'("{sets[config.data.name]}')
    cross = name in ("voc_cross", "ade20k", "ade20k_full", "pcontext", "cityscapes")
    if not cross:
        assert ("_base_" in expected["DATASETS.TRAIN"]) == (config.data.train_on == "seen")
        assert (config.train.steps, config.train.batch_size) == (
            solver("MAX_ITER"),
            solver("IMS_PER_BATCH"),
        )
        assert (config.train.lr, config.train.weight_decay) == (
            solver("BASE_LR"),
            solver("WEIGHT_DECAY"),
        )
    if prompts:
        assert solver("OPTIMIZER") == "SGD" and solver("LR_SCHEDULER_NAME") == "WarmupCosineLR"
        assert config.prompts.samples_per_class == expected["DATASETS.SAMPLE_PER_CLASS"]
        assert (config.prompts.warmup_steps, config.prompts.warmup_factor) == (
            solver("WARMUP_ITERS"),
            solver("WARMUP_FACTOR"),
        )
        return
    assert config.model.backbone == {50: "R50", 101: "R101c"}[expected["MODEL.RESNETS.DEPTH"]]
    assert (config.data.test_short_edge, config.data.max_size) == (
        expected["INPUT.MIN_SIZE_TEST"],
        expected["INPUT.MAX_SIZE_TEST"],
    )
    if not supervised:
        assert config.clip.ensemble and config.clip.ensemble_weight == adapter(
            "CLIP_ENSEMBLE_WEIGHT"
        )
        assert (config.clip.mask_threshold, config.clip.expand_ratio) == (
            adapter("MASK_THR"),
            adapter("MASK_EXPAND_RATIO"),
        )
    if cross:
        return
    crop = f"({config.data.crop}, {config.data.crop})"
    assert (crop, config.data.short_edges) == (
        expected["INPUT.CROP.SIZE"],
        expected["INPUT.MIN_SIZE_TRAIN"],
    )
    assert config.data.max_size == expected["INPUT.MAX_SIZE_TRAIN"]
    assert (
        solver("OPTIMIZER") == "ADAMW"
        and solver("LR_SCHEDULER_NAME") == "WarmupPolyLR"
        and not solver("WARMUP_ITERS")
    )
    assert config.train.backbone_lr == solver("BACKBONE_MULTIPLIER")
    assert config.train.clip_grad == solver("CLIP_GRADIENTS.CLIP_VALUE")
    former, model, train = (
        (lambda k: expected[f"MODEL.MASK_FORMER.{k}"]),
        config.model,
        config.train,
    )
    sizes = (model.queries, model.decoder_layers, model.hidden)
    assert sizes == tuple(map(former, ("NUM_OBJECT_QUERIES", "DEC_LAYERS", "HIDDEN_DIM")))
    weights = (train.focal_weight, train.dice_weight, train.no_object_weight)
    assert weights == tuple(map(former, ("MASK_WEIGHT", "DICE_WEIGHT", "NO_OBJECT_WEIGHT")))


def test_a_configuration_without_an_original():
    """The one that the original ships broken differs from its sibling in the backbone."""
    a, b = (dataclasses.asdict(configured(name)) for name in ("voc_r101c_single", "voc_r50_single"))
    assert {f"{s}.{k}" for s in a for k in a[s] if a[s][k] != b[s][k]} == {
        "model.backbone",
        "model.weights",
    }


def test_defaults_are_the_paper_s_coco_stuff_setting():
    train = {f.name: f.default for f in dataclasses.fields(Config().train)}
    assert (train["steps"], train["batch_size"], train["lr"], train["clip_grad"]) == (
        60_000,
        32,
        1e-4,
        0.01,
    )


def test_prompt_tables():
    assert {k: len(set(v)) for k, v in TEMPLATES.items()} == {
        "single": 1,
        "vild": 14,
        "imagenet": 80,
    }
    with pytest.raises(UserError, match=r"has no \{\}"):
        FixedPrompt(["a photo"])
