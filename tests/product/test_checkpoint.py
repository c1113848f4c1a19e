"""Import of original checkpoints, backbone weights, and files that are not what they should be."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
import trees
from conftest import ROOT, keys, tiny_config

import eval as evaluation
import prepare_data
from zsseg import checkpoint, weights
from zsseg.backbone import BACKBONE_FILES, DeepResNet, load_backbone
from zsseg.build import build_segmenter
from zsseg.checkpoint import load_strict
from zsseg.clip import build_clip
from zsseg.config import ModelConfig
from zsseg.maskformer import MaskFormer
from zsseg.prompts import LearnedPrompt
from zsseg.segmenter import Segmenter
from zsseg.utils import UserError
from zsseg.weights import import_original, our_name

LISTS = keys("upstream_keys.json")


@pytest.mark.parametrize("name", LISTS)
def test_every_key_of_the_original_is_used_or_dropped(name):
    """Each name goes to one place of ours, shapes fit, nothing of ours is left without a value."""
    with torch.device("meta"):
        state = {k: torch.empty(shape) for k, shape in LISTS[name].items()}
    region = {k for k in state if k.startswith("_region_clip_adapter.clip_model.")}
    parts, dropped = import_original({k: v for k, v in state.items() if k not in region}, name)
    assert len(state) - len(region) == len(dropped) + sum(len(p) for p in parts.values())
    assert all(
        any(word in k for word in ("_signal", "pixel_", "empty_weight", "_region")) for k in dropped
    )
    maskformer = parts.get("maskformer", {})
    assert ("maskformer" in parts) == (name != "coco_prompt_learning")
    if "pixel_embed.weight" in maskformer:
        assert maskformer["pixel_embed.weight"].shape == (512, 256, 1, 1)
    elif maskformer:
        embed = maskformer["non_object"].shape[1]
        with torch.device("meta"):
            model = MaskFormer(ModelConfig("R50" if name.startswith("voc_r50") else "R101c"), embed)
            load_strict(model, maskformer, name, "")
    for part in ("prompt", "region_prompt"):
        if part in parts:
            with torch.device("meta"):
                load_strict(LearnedPrompt(parts[part]["prefix"].shape[1]), parts[part], name, "")
    assert ("prompt" in parts) == ("learn" in name) and ("region_prompt" in parts) == (
        "separate" in name
    )


def test_region_adapter_must_share_the_clip():
    names = [
        "clip_adapter.clip_model.ln_final.weight",
        "_region_clip_adapter.clip_model.ln_final.weight",
    ]
    parts, dropped = import_original({n: torch.ones(3) for n in names}, "file")
    assert list(parts) == ["clip"] and dropped == names[1:]
    with pytest.raises(UserError, match="two different CLIPs"):
        import_original({n: torch.full((3,), float(i)) for i, n in enumerate(names)}, "file")


def test_unknown_names_are_refused():
    for name in (
        "backbone.stem.conv9.weight",
        "sem_seg_head.extra",
        "backbone.res2.0.conv4.weight",
        "x.backbone.stem",
    ):
        with pytest.raises(KeyError):
            our_name(name)
    with pytest.raises(UserError, match=r"unknown entry sem_seg_head\.extra"):
        import_original({"sem_seg_head.extra": torch.zeros(1)}, "file")


def test_strict_loading_lists_what_does_not_fit():
    module = torch.nn.Linear(2, 3)
    state = {"weight": torch.zeros(3, 5), "extra": torch.zeros(1)}
    before = module.weight.clone()
    with pytest.raises(
        UserError,
        match=r"bias is missing, extra is unknown, weight has shape \(3, 5\), not \(3, 2\)",
    ):
        load_strict(module, state, "file", "hint")
    assert torch.equal(module.weight, before)


def test_frozen_batch_norm_equals_batch_norm_with_and_without_gradients():
    torch.manual_seed(0)
    model = DeepResNet("R50")
    frozen = model.bn1
    for buffer in (frozen.weight, frozen.bias, frozen.running_mean, frozen.running_var):
        buffer.uniform_(0.5, 2)
    x = torch.randn(2, 64, 5, 5)
    expected = torch.nn.functional.batch_norm(
        x, frozen.running_mean, frozen.running_var, frozen.weight, frozen.bias, eps=1e-5
    )
    assert torch.equal(frozen(x), expected)
    assert torch.allclose(frozen(x.clone().requires_grad_()), expected, atol=1e-5)
    assert not list(frozen.parameters())


def to_detectron(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """torchvision's ResNet names -> detectron2's, the other way round than the importer."""
    out = {}
    for key, value in state.items():
        key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        for i in "123":
            key = key.replace(f"bn{i}", f"conv{i}.norm")
            key = key.replace(f"layer{i}", f"res{int(i) + 1}")
        key = key.replace("layer4", "res5")
        out[key if key.startswith("res") else f"stem.{key}"] = value.numpy()
    return out


def test_backbone_weights_from_torchvision_and_detectron2(tmp_path, capsys):
    """Detectron2's converted files hold torchvision's classifier as `stem.fc` and may hold batch
    counters.
    """
    torch.manual_seed(0)
    source = torchvision.models.resnet50(weights=None)
    state = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    torch.save(source.state_dict(), tmp_path / "r50.pth")
    arrays = to_detectron(state) | {"stem.conv1.norm.num_batches_tracked": np.array(7)}
    assert {
        "stem.fc.weight",
        "res2.0.conv1.norm.bias",
        "res5.0.shortcut.norm.weight",
    } <= arrays.keys()
    with open(tmp_path / "R-50.pkl", "wb") as file:
        pickle.dump(
            {"model": arrays, "matching_heuristics": True, "__author__": "torchvision"}, file
        )
    reports = {
        "r50.pth": (2 + 53, "bn1.num_batches_tracked, "),
        "R-50.pkl": (3, "stem.fc.weight, stem.fc.bias"),
    }
    for name in ("r50.pth", "R-50.pkl"):
        backbone = DeepResNet("R50")
        load_backbone(backbone, "R50", str(tmp_path / name))
        assert all(torch.equal(v, state[k]) for k, v in backbone.state_dict().items())
        dropped, names = reports[name]
        text = capsys.readouterr().out
        assert f"{name}: 265 tensors loaded, {dropped} dropped: " in text and names in text
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            y = source.eval().maxpool(source.relu(source.bn1(source.conv1(x))))
            expected = source.layer2(source.layer1(y))
            assert torch.allclose(backbone.eval()(x)[1], expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(UserError, match="does not fit"):
            load_backbone(DeepResNet("R101c"), "R101c", str(tmp_path / name))
    with pytest.raises(UserError, match="none for R101c"):
        load_backbone(DeepResNet("R101c"), "R101c", "imagenet")


def test_detectron_files_are_downloaded_by_name(tmp_path, monkeypatch):
    torch.manual_seed(0)
    state = {
        k: v
        for k, v in torchvision.models.resnet50(weights=None).state_dict().items()
        if "num_batches" not in k
    }
    (tmp_path / "server").mkdir()
    with open(tmp_path / "server" / "R-50.pkl", "wb") as file:
        pickle.dump({"model": to_detectron(state)}, file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZSSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(BACKBONE_FILES, "R-50.pkl", (tmp_path / "server" / "R-50.pkl").as_uri())
    backbone = DeepResNet("R50")
    load_backbone(backbone, "R50", "R-50.pkl")
    assert (
        torch.equal(backbone.conv1.weight, state["conv1.weight"])
        and (tmp_path / "cache" / "R-50.pkl").exists()
    )


SUPERVISED = [
    w
    for s in ("data.train_on=all", "model.class_head=linear", "clip.ensemble=false")
    for w in ("--set", s)
]


def test_a_supervised_checkpoint_of_the_original(tmp_path, capsys):
    """MaskFormer's own head: a linear layer over classes and no object, no CLIP in the file."""
    config = tiny_config("model.class_head=linear", "data.train_on=all", "clip.ensemble=false")
    segmenter = Segmenter(config, None)
    names = {
        k: v
        for k, v in LISTS["voc_r50_vild"].items()
        if "clip_adapter" not in k and "class_embed" not in k
    }
    names |= {
        "sem_seg_head.predictor.class_embed.weight": [21, 256],
        "sem_seg_head.predictor.class_embed.bias": [21],
    }
    state = {k: torch.rand(shape) * 0.02 for k, shape in names.items()}
    torch.save({"model": state}, tmp_path / "model_final.pth")
    trees.voc(tmp_path)
    prepare_data.main(["voc", "--root", str(tmp_path)])
    words = [
        "--config",
        str(ROOT / "configs/voc_r50_single.toml"),
        *SUPERVISED,
        "--root",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
    ]
    evaluation.main(
        [
            str(tmp_path / "model_final.pth"),
            *words,
            "--set",
            "data.test_short_edge=64",
            "--device",
            "cpu",
        ]
    )
    loaded = len(names) - 1
    assert (
        f"model_final.pth: {loaded} tensors loaded, 1 dropped: criterion.empty_weight"
        in capsys.readouterr().out
    )
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert result["images"] == 3 and "hIoU" in result and "clip_true_masks" not in result
    assert segmenter.maskformer.class_embed.weight.shape == (26, 64) and list(
        segmenter.learned_state()
    ) == ["maskformer"]
    with pytest.raises(UserError, match="for other classes"):
        segmenter.set_classes(["cat", "dog"])


class Evil:
    def __reduce__(self):
        return (open, ("pwned", "w"))


@pytest.mark.parametrize("ending", [".pkl", ".pth"])
def test_files_with_code_are_refused_and_not_run(tmp_path, monkeypatch, ending):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"evil{ending}").write_bytes(pickle.dumps({"model": Evil()}))
    with pytest.raises(UserError, match="evil"):
        load_backbone(DeepResNet("R50"), "R50", f"evil{ending}")
    torch.save({"model": Evil()}, "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt: cannot be read as tensors"):
        checkpoint.load("evil.pt")
    assert not (tmp_path / "pwned").exists()


class Raw:
    """Pickles as a call of one of NumPy's rebuilding functions with arguments of our choice."""

    def __init__(self, function, arguments: tuple, state: object = None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


def malicious_pickles() -> dict[str, bytes]:
    from numpy._core import multiarray

    pointer = Raw(np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0))
    rebuilt = (np.ndarray, (0,), b"b")
    float32 = np.dtype("float32")
    return {
        "pointer": pickle.dumps({"w": Raw(multiarray.scalar, (pointer, b"A" * 8))}),
        "objects": pickle.dumps({"w": np.array([[], "x"], dtype=object)}),
        "structured": pickle.dumps({"w": np.zeros(3, [("a", "f4")])}),
        "short": pickle.dumps(
            {"w": Raw(multiarray._reconstruct, rebuilt, (1, (1000, 1000), float32, False, b"1234"))}
        ),
        "negative": pickle.dumps(
            {"w": Raw(multiarray._reconstruct, rebuilt, (1, (-4,), float32, False, b"1" * 17))}
        ),
        "html": b"<html>Not Found</html>",
        "text": b"Internal Server Error\n",
        "garbage": b"\x80\xff",
        "not a dict": pickle.dumps([1, 2]),
        "not arrays": pickle.dumps({"model": {"stem.conv1.weight": 3}}),
    }


@pytest.mark.parametrize("name", malicious_pickles())
def test_malicious_and_broken_pickles_are_one_line(name, tmp_path):
    (tmp_path / "R-50.pkl").write_bytes(malicious_pickles()[name])
    with pytest.raises(UserError, match=r"R-50\.pkl"):
        load_backbone(DeepResNet("R50"), "R50", str(tmp_path / "R-50.pkl"))


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_every_protocol_are_read(protocol, tmp_path):
    arrays = {
        "f4": np.arange(6, dtype=np.float32).reshape(2, 3),
        "order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
        "none": np.zeros((0, 2)),
        "scalar": np.float64(3),
        "half": np.ones(2, np.float16),
    }
    with open(tmp_path / "a.pkl", "wb") as file:
        pickle.dump({"model": arrays}, file, protocol)
    with open(tmp_path / "a.pkl", "rb") as file:
        read = weights.ArrayUnpickler(file, encoding="latin1").load()["model"]
    for name, array in arrays.items():
        values = np.asarray(read[name])
        assert np.array_equal(values, array) and values.dtype.kind == array.dtype.kind


@pytest.mark.parametrize("content", [b"PK\x03\x04junk", b"<html>", b"", b"\x80\x02}q\x00."])
def test_a_clip_that_is_none_is_one_line(content, tmp_path):
    (tmp_path / "clip.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"clip\.pt|CLIP"):
        build_clip(weights.load_clip_state(str(tmp_path / "clip.pt"), tmp_path))


def test_empty_and_cut_files_are_named(tmp_path):
    (tmp_path / "x.pt").touch()
    with pytest.raises(UserError, match=r"x\.pt: cannot be read"):
        checkpoint.load(tmp_path / "x.pt")
    torch.save({"model": {"w": torch.zeros(1000)}}, tmp_path / "x.pt")
    for size in (100, 3000):
        (tmp_path / "y.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:size])
        with pytest.raises(UserError, match=r"y\.pt: cannot be read"):
            checkpoint.load(tmp_path / "y.pt")


def test_a_full_disk_is_a_user_error_and_keeps_the_old_file(tmp_path):
    script = f"""
import resource, sys, signal, torch
sys.path.insert(0, {str(ROOT)!r})
from zsseg import checkpoint
from pathlib import Path
path = Path(sys.argv[1]) / "last.pt"
checkpoint.save(path, model={{"w": torch.ones(2)}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    checkpoint.save(path, model={{"w": torch.ones(100_000)}})
except checkpoint.UserError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True
    )
    assert "last.pt: cannot be written" in result.stdout, result.stderr
    assert len(checkpoint.load(tmp_path / "last.pt")["model"]["w"]) == 2
    assert [f.name for f in tmp_path.iterdir()] == ["last.pt"]


def test_saving_replaces_or_leaves_the_file(tmp_path):
    path = tmp_path / "new" / "last.pt"
    checkpoint.save(path, model={"w": torch.ones(2)}, step=1)
    with pytest.raises(AttributeError):
        checkpoint.save(path, model=lambda: None)  # cannot be pickled
    assert checkpoint.load(path)["step"] == 1 and [f.name for f in path.parent.iterdir()] == [
        "last.pt"
    ]


@pytest.mark.parametrize("content", [{"model": 3}, [1, 2], {"state": {}}])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="contains no model"):
        checkpoint.load(tmp_path / "x.pt")


def test_the_small_backbone_starts_from_the_small_clip_s(shapes_root):
    built = build_segmenter(tiny_config(), shapes_root)
    stem = built.clip.visual.conv1.backbone.state_dict()
    own = built.maskformer.backbone.state_dict()
    assert all(torch.equal(own[name], stem[name]) for name in own) and own
    assert all(p.requires_grad for p in built.maskformer.backbone.parameters())
    assert not any(p.requires_grad for p in built.clip.parameters())
    maps = built.maskformer.backbone(torch.zeros(1, 3, 96, 64))
    assert [m.shape[2:] for m in maps] == [(24, 16), (12, 8), (12, 8), (12, 8)]
    for settings in (["model.backbone=R50"], ["model.small_widths=[8, 8, 8, 8]"]):
        with pytest.raises(UserError, match=r"^model\.weights clip: "):
            build_segmenter(tiny_config(*settings), shapes_root)
