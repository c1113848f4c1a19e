"""Checkpoints of ours and of the original, backbones, prompts: what is read, and what is refused."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
import torchvision
from conftest import keys, original_state, tiny_clip_state, tiny_config

from zsseg import weights
from zsseg.backbone import DeepResNet, R101c
from zsseg.config import ModelConfig, load_config
from zsseg.maskformer import MaskFormer
from zsseg.prompts import LearnedPrompt
from zsseg.utils import UserError
from zsseg.weights import build_segmenter, import_original, load_checkpoint, load_segmenter

LISTS = keys("upstream_keys.json")


@pytest.mark.filterwarnings("ignore:.*meta parameter")
@pytest.mark.parametrize("name", LISTS)
def test_every_key_of_the_original_is_used_or_dropped(name):
    """Each name goes to one place of ours, shapes fit, nothing of ours is left without a value."""
    state = {k: torch.zeros(()).expand(shape) for k, shape in LISTS[name].items()}
    parts, dropped = import_original(state, name)
    assert len(state) == len(dropped) + sum(len(part) for part in parts.values())
    constants = ("_signal", "pixel_", "empty_weight", "_region")
    assert all(any(word in k for word in constants) for k in dropped)
    assert ("maskformer" in parts) == (name != "coco_prompt_learning")
    assert ("prompt" in parts) == ("learn" in name)
    assert ("region_prompt" in parts) == ("separate" in name)
    with torch.device("meta"):
        modules = {k: LearnedPrompt(parts[k]["prefix"].shape[1]) for k in parts if "prompt" in k}
        if "non_object" in parts.get("maskformer", ()):
            backbone = "R50" if name.startswith("voc_r50") else "R101c"
            width = parts["maskformer"]["non_object"].shape[1]
            modules["maskformer"] = MaskFormer(ModelConfig(backbone), width)
    for part, module in modules.items():
        assert weights.load_into(module, parts[part], name, "") == []


def test_entries_that_have_no_place_are_refused():
    with pytest.raises(UserError, match=r"unknown entry sem_seg_head\.extra"):
        import_original({"sem_seg_head.extra": torch.zeros(1)}, "file")
    end = "clip_model.ln_final.weight"
    for clip in ({}, {f"clip_adapter.{end}": torch.zeros(3)}):
        with pytest.raises(UserError, match="two different CLIPs"):
            import_original({f"_region_clip_adapter.{end}": torch.ones(3)} | clip, "file")


def test_what_does_not_fit_is_listed(capsys):
    module = torch.nn.Linear(2, 3)
    before = module.weight.clone()
    state = {"weight": torch.zeros(3, 5), "extra": torch.zeros(1)}
    wrong = r"weight is \[3, 5\] instead of \[3, 2\], bias is absent .*, extra is \[1\] instead"
    with pytest.raises(UserError, match=wrong):
        weights.load_into(module, state, "file", "hint")
    assert torch.equal(module.weight, before)
    for broken in (5, {"weight": 5}, {5: before}):
        with pytest.raises(UserError, match="is not a state dict"):
            weights.load_into(module, broken, "file", "hint")
    state = {"weight": torch.ones(3, 2), "bias": torch.zeros(4), "extra": torch.zeros(1)}
    assert weights.load_into(module, state, "file", "hint", lambda _: False) == ["bias", "extra"]
    assert (module.weight == 1).all()
    assert "file: 1 of the model's tensors start afresh: bias" in capsys.readouterr().out
    with pytest.raises(UserError, match="no weight that fits; hint"):
        weights.load_into(module, {"extra": torch.zeros(1)}, "file", "hint", lambda _: False)


def to_detectron(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """torchvision's ResNet names -> detectron2's, the other way round than the importer."""
    out = {}
    for key, value in state.items():
        key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        for i in "1234":
            key = key.replace(f"bn{i}", f"conv{i}.norm")
            key = key.replace(f"layer{i}", f"res{int(i) + 1}")
        out[key if key.startswith("res") else f"stem.{key}"] = value.numpy()
    return out


def test_backbone_weights_from_torchvision_and_detectron2(tmp_path, capsys, monkeypatch):
    """Detectron2's converted files have torchvision's classifier as `stem.fc` and maybe batch
    counters; by its name such a file comes from the cache.
    """
    torch.manual_seed(0)
    source = torchvision.models.resnet50(weights=None)
    state = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    torch.save(source.state_dict(), tmp_path / "r50.pth")
    arrays = to_detectron(state) | {"stem.conv1.norm.num_batches_tracked": np.array(7)}
    content = {"model": arrays, "matching_heuristics": True, "__author__": "torchvision"}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content))
    monkeypatch.setenv("ZSSEG_CACHE", str(tmp_path))
    for name, count, part in (
        (str(tmp_path / "r50.pth"), 2 + 53, "bn*.num_batches_tracked, "),
        ("R-50.pkl", 3, "stem.fc.weight, stem.fc.bias"),
    ):
        backbone = DeepResNet()
        weights.load_backbone(backbone, "R50", name)
        assert all(torch.equal(v, state[k]) for k, v in backbone.state_dict().items())
        text = capsys.readouterr().out
        assert f"{name}: 265 tensors loaded, {count} dropped: " in text and part in text
        with pytest.raises(UserError, match="does not fit"):
            weights.load_backbone(R101c(), "R101c", name)
    with pytest.raises(UserError, match=r"imagenet: no such file; .*R-103\.pkl"):
        weights.load_backbone(R101c(), "R101c", "imagenet")


def test_the_small_backbone_starts_from_the_small_clip_s(shapes_root, capsys):
    built = build_segmenter(tiny_config(), shapes_root)
    stem = built.clip.visual.conv1.backbone.state_dict()
    own = built.maskformer.backbone.state_dict()
    assert all(torch.equal(own[name], stem[name]) for name in own) and own
    assert f"model.weights clip: {len(own)} tensors loaded, 0 dropped" in capsys.readouterr().out
    for setting in ("model.backbone=R50", "model.small_widths=[8, 8, 8, 8]"):
        with pytest.raises(UserError, match=r"^model\.weights clip: "):
            build_segmenter(tiny_config(setting), shapes_root)


@pytest.mark.parametrize("protocol", [2, 4])
def test_arrays_are_read(protocol, tmp_path):
    arrays = {
        "f4": np.arange(6, dtype=np.float32).reshape(2, 3),
        "order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "scalar": np.float64(3),
        "half": np.ones(2, np.float16),
        "flags": np.array([True, False]),
    }
    dump = pickle.dumps({"model": {}} | arrays, protocol)
    old = dump.replace(b"numpy._core", b"numpy.core") if protocol == 2 else dump  # NumPy 1's
    for name, content in (("new.pkl", dump), ("old.pkl", old), ("a.pt", b"")):
        (tmp_path / name).write_bytes(content)
        if not content:
            torch.save({"model": {}} | arrays, tmp_path / name)
        read = load_checkpoint(tmp_path / name)
        for key, array in arrays.items():
            values = np.asarray(read[key])
            assert np.array_equal(values, array) and values.dtype == array.dtype


def test_what_is_no_checkpoint_is_refused(tmp_path):
    file = tmp_path / "last.pt"
    for content in ({"model": 3}, [1, 2], {"state": {}}):
        torch.save(content, file)
        with pytest.raises(UserError, match="contains no model"):
            load_checkpoint(file)
    for size in (0, 100, 600):  # empty, cut
        file.write_bytes(file.read_bytes()[:size] if size else b"")
        with pytest.raises(UserError, match=r"last\.pt: cannot be read"):
            load_checkpoint(file)
        torch.save({"model": {"w": torch.zeros(1000)}}, file)
    with pytest.raises(UserError, match=r"cannot be read .*Is a directory"):
        load_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"lst\.pt: no such file; did you mean .*last\.pt\?"):
        load_checkpoint(tmp_path / "lst.pt")


@pytest.fixture
def content(trained):
    """A run's checkpoint and its configuration."""
    content = load_checkpoint(trained)
    return content, load_config(base=content["config"])


def test_another_clip_is_said(content, trained, tmp_path, capsys):
    """A class head for one CLIP gives labels with another of the same width, too."""
    content, config = content
    load_segmenter(content, config, trained.parent.parent, "x")
    assert "another CLIP" not in capsys.readouterr().out
    torch.save(tiny_clip_state(1), tmp_path / "clip.pt")
    load_segmenter(content, config, tmp_path, "x")
    config = load_config(settings=[f"train.init={trained}"], base=content["config"])
    build_segmenter(config, tmp_path)
    text = capsys.readouterr().out
    for what in ("checkpoint x", f"train.init {trained}"):
        assert f"{what} was made for another CLIP than clip.weights" in text


def test_a_proposer_needs_no_maskformer(content, trained, tmp_path, monkeypatch):
    """By its name, from the current folder too, with a checkpoint and without any."""
    code = "def propose(image):\n    return image[:1, ::4, ::4] * 0 + 1, None\n"
    (tmp_path / "boxes.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    setting = "model.proposer=boxes:propose"
    root = trained.parent.parent
    loaded, _ = content
    del loaded["model"]["maskformer"]
    for name, saved, config in (
        (trained, loaded, load_config(settings=[setting], base=loaded["config"])),
        ("-", *weights.checkpoint_and_config("-", root / "a.toml", [setting])),
    ):
        segmenter = load_segmenter(saved, config, root, name)
        segmenter.set_classes(["cat", "dog"])
        labels = segmenter.segment([torch.zeros(3, 64, 64)], (64, 64)).labels
        assert labels.shape == (64, 64) and segmenter.learned_state() == {}
    with pytest.raises(UserError, match="gives masks that nothing trains"):
        build_segmenter(config, root)
    with pytest.raises(UserError, match=r"checkpoint -: does not fit: maskformer\."):
        load_segmenter(*weights.checkpoint_and_config("-", root / "a.toml", []), root, "-")
    for wrong in ("boxes", "boxes:other", "nowhere:f", ":f", "a.py:f"):
        with pytest.raises(UserError, match=rf"model\.proposer {wrong}: cannot be imported"):
            weights.find_proposer(wrong)


def test_learned_prompts_come_from_their_checkpoint(content, trained, tmp_path, capsys):
    """Of ours or the original's, for the head and the regions; afterwards the segmenter's has
    them.
    """
    loaded, config = content
    root = trained.parent.parent
    prompt = {"prefix": torch.randn(16, 64)}
    torch.save({"model": {"prompt": prompt}, "config": {}}, tmp_path / "ours.pt")
    name = "clip_adapter.prompt_learner.prefix_prompt"
    torch.save({"model": {name: prompt["prefix"]}}, tmp_path / "theirs.pt")
    for file in ("ours.pt", "theirs.pt"):
        name = f"clip.prompts={tmp_path / file}"
        config = load_config(root / "a.toml", ["clip.prompt=learned", name])
        built = build_segmenter(config, root)
        assert torch.equal(built.prompt.prefix, prompt["prefix"])
        text = capsys.readouterr().out
        assert f"clip.prompts {tmp_path / file}: 1 tensors loaded, 0 dropped" in text
        regions = load_config(root / "a.toml", ["clip.region_prompt=learned", name])
        assert torch.equal(build_segmenter(regions, root).region_prompt.prefix, prompt["prefix"])
    saved = {"model": built.learned_state(), "config": dataclasses.asdict(config)}
    (tmp_path / "theirs.pt").unlink()
    again = load_segmenter(saved, config, root, "x")
    assert torch.equal(again.prompt.prefix, prompt["prefix"])
    learned = load_config(settings=["clip.prompt=learned"], base=loaded["config"])
    with pytest.raises(UserError, match=r"does not fit: prompt\.prefix is absent"):
        load_segmenter(loaded, learned, root, "x")
    with pytest.raises(UserError, match=r"clip\.prompt: is learned"):
        build_segmenter(learned, root)


def test_a_supervised_checkpoint_of_the_original(capsys, tmp_path):
    """MaskFormer's own head: a linear layer over classes and no object, no CLIP in the file."""
    names = LISTS["voc_r50_vild"].items()
    names = {k: v for k, v in names if "clip_adapter" not in k and "class_embed" not in k}
    embed = "sem_seg_head.predictor.class_embed"
    names |= {f"{embed}.weight": [21, 256], f"{embed}.bias": [21]}
    state = original_state(names)
    settings = ["data.train_on=all", "model.class_head=linear", "clip.ensemble=false"]
    config = load_config("voc_r50_single", settings)
    segmenter = load_segmenter({"model": state}, config, tmp_path, "x")
    text = f"checkpoint x: {len(names) - 1} tensors loaded, 1 dropped: criterion.empty_weight"
    assert text in capsys.readouterr().out
    assert torch.equal(segmenter.maskformer.class_embed.bias, state[f"{embed}.bias"])
    assert segmenter.learned_state().keys() == {"maskformer"} and segmenter.clip is None
