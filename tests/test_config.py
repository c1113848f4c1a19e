"""Configuration files and overrides."""

import dataclasses
from dataclasses import asdict

import pytest
from conftest import ROOT

from zsseg.config import Config, load_config
from zsseg.prompts import TEMPLATES, FixedPrompt
from zsseg.run import UserError


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda f: f.stem)
def test_every_file_loads_and_says_something(file):
    assert asdict(load_config(str(file))) != asdict(Config())


def test_overrides_come_last_and_need_no_quotes(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('[train]\nsteps = 7\nlr = 1\n[clip]\nprompt = "vild"\n')
    words = ["train.steps=9", "clip.prompt=['a {}']", "data.name=voc", "data.short_edges=[1, 2]", "eval.compare=true"]
    config = load_config(str(file), words)
    assert (config.train.steps, config.train.lr, config.data.name) == (9, 1.0, "voc")
    assert (config.clip.prompt, config.data.short_edges, config.eval.compare) == (["a {}"], [1, 2], True)
    assert isinstance(config.train.lr, float)
    assert load_config(str(file), ["clip.prompt=single"]).clip.prompt == "single"
    assert load_config(None, ["data.name=2012"]).data.name == "2012"


def test_a_checkpoint_s_configuration_round_trips():
    config = load_config(None, ["clip.prompt=['x {}']", "train.lr=0.5"])
    assert asdict(load_config(base=asdict(config))) == asdict(config)
    assert load_config(base=asdict(config), overrides=["train.lr=2"]).train.lr == 2


@pytest.mark.parametrize(
    ("word", "parts"),
    [("train.stps=3", ["train.stps", "train.steps"]),
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
     ("log.wandb=maybe", ["log.wandb", "offline"])],
)  # fmt: skip
def test_mistakes_are_user_errors_that_name_the_key(word, parts):
    with pytest.raises(UserError) as error:
        load_config(None, [word])
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[train\nsteps=1", "steps = 1", "[train]\nsteps = '3'", "[nothing]\nx = 1"])
def test_broken_files_are_user_errors(tmp_path, text):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(UserError, match=r"bad\.toml"):
        load_config(str(tmp_path / "bad.toml"))


def test_defaults_are_the_paper_s_coco_stuff_setting():
    train = {f.name: f.default for f in dataclasses.fields(Config().train)}
    assert (train["steps"], train["batch_size"], train["lr"], train["clip_grad"]) == (60_000, 32, 1e-4, 0.01)


def test_prompt_tables():
    assert {k: len(set(v)) for k, v in TEMPLATES.items()} == {"single": 1, "vild": 14, "imagenet": 80}
    with pytest.raises(UserError, match=r"has no \{\}"):
        FixedPrompt(["a photo"])
