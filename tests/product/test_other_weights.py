"""Checkpoints and CLIPs of others: NumPy, prefixes, activations; where a training starts from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, fails_in_one_line, tiny_clip_state
from own_data import CONFIG, measure, train

from zsseg import checkpoint, utils, weights
from zsseg.build import load_segmenter
from zsseg.config import load_config


def test_checkpoints_with_numbers_and_arrays_of_numpy(tmp_path):
    content = {
        "score": np.float64(0.5),
        "step": np.int64(7),
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "model": {"w": np.ones((2, 2)), "flags": np.array([True, False])},
        "list": [np.float32(2), (np.int8(1),)],
    }
    torch.save(content, tmp_path / "np.pt")
    content = checkpoint.load(tmp_path / "np.pt")
    assert content["score"] == 0.5 and content["step"] == 7 and content["list"] == [2.0, (1,)]
    assert (
        torch.equal(content["array"], torch.arange(6.0).reshape(2, 3))
        and content["model"]["w"].dtype == torch.float64
    )
    assert content["model"]["flags"].tolist() == [True, False]


def test_what_cannot_be_read_is_named(tmp_path):
    torch.save({"model": {}, "config": Path("x")}, tmp_path / "path.pt")
    torch.save({"model": {}, "array": np.array(["text"])}, tmp_path / "text.pt")
    for name, part in (("path.pt", "pathlib"), ("text.pt", "")):
        with pytest.raises(utils.UserError, match=rf"{name}: .*{part}"):
            checkpoint.load(tmp_path / name)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_state_dicts_are_unwrapped(prefix, root, trained, capsys):
    content = checkpoint.load(trained)
    before = content["model"]["maskformer"]
    content["model"]["maskformer"] = {prefix + k: v for k, v in before.items()}
    torch.save(content, root / "wrapped.pt")
    assert measure(root / "wrapped.pt", root, "--out", root / "o").returncode == 0
    clip = {prefix + k: v for k, v in torch.load(root / "clip.pt").items()}
    torch.save({"epoch": 3, "state_dict": clip}, root / "trainer.pt")  # as OpenCLIP's trainer saves
    assert (
        weights.load_clip_state(str(root / "trainer.pt"), root).keys()
        == torch.load(root / "clip.pt").keys()
    )


def test_training_starts_from_a_segmenter(root, trained):
    """All that fits is loaded, whatever the classes are: the head compares with texts."""
    (root / "b.toml").write_text(CONFIG.replace('"cat", "dog", "grass"', '"sheep", "road", "tree"'))
    words = (
        "train.py",
        "--config",
        root / "b.toml",
        "--root",
        root,
        "--device",
        "cpu",
        "--set",
        f"train.init={trained}",
    )
    done = command(
        *words, "--out", root / "r", "--set", "train.lr=1e-30", "--set", "train.weight_decay=0"
    )
    assert done.returncode == 0, done.stderr
    before, after = (
        checkpoint.load(file)["model"]["maskformer"] for file in (trained, root / "r" / "last.pt")
    )
    assert f"train.init {trained}: {len(before)} tensors loaded, 0 dropped" in done.stdout
    same = [
        torch.equal(before[k], after[k])
        for k in before
        if "running" not in k and "num_batches" not in k
    ]
    assert all(same) and len(same) > 50
    done = command(*words, "--out", root / "wider", "--set", "model.queries=9")
    assert done.returncode == 0 and "start afresh: " in done.stdout and "query" in done.stdout
    fails_in_one_line(
        command(*words, "--out", root / "x", "--set", "train.init=nowhere.pt"),
        "train.init nowhere.pt",
        "no such file",
    )
    torch.save({"model": {"maskformer": {"x": torch.zeros(1)}}, "config": {}}, root / "other.pt")
    fails_in_one_line(
        command(*words, "--out", root / "x", "--set", f"train.init={root}/other.pt"),
        "holds no weight that fits",
    )


def test_clips_that_are_not_openai_s(root, monkeypatch, capsys):
    """GELU instead of QuickGELU, heads of another width: nothing in the file tells."""
    from zsseg.clip import CLIP, VisionTransformer, build_clip

    torch.manual_seed(0)
    made = CLIP(
        VisionTransformer(32, 16, 160, 2, 64, num_heads=2, activation="gelu"),
        64,
        40,
        514,
        64,
        1,
        "gelu",
    ).eval()
    state, image = made.state_dict(), torch.randn(2, 3, 32, 32)
    torch.save(state, root / "laion.pt")
    with torch.no_grad():
        expected = made.encode_image(image)
        assert torch.allclose(build_clip(state, "gelu", 2).encode_image(image), expected, atol=1e-6)
        for other in (build_clip(state, "quickgelu", 2), build_clip(state, "gelu", 4)):
            assert not torch.allclose(other.encode_image(image), expected, atol=1e-4)
    with pytest.raises(utils.UserError, match=r"clip\.heads: is 3"):
        build_clip(state, "gelu", 3)
    words = [
        "train.py",
        "--config",
        root / "a.toml",
        "--root",
        root,
        "--device",
        "cpu",
        "--set",
        f"clip.weights={root}/laion.pt",
    ]
    words += ["--set", "clip.heads=2"]
    done = command(*words, "--out", root / "r1")
    assert done.returncode == 0 and "taken for one with quickgelu and 2 heads" in done.stdout, (
        done.stderr
    )
    done = command(*words, "--set", "clip.activation=gelu", "--out", root / "r2")
    assert done.returncode == 0 and "taken for" not in done.stdout
    recorded = checkpoint.load(root / "r2" / "last.pt")["config"]["clip"]
    assert recorded["activation"] == "gelu" and recorded["heads"] == 2
    assert checkpoint.load(root / "r1" / "last.pt")["config"]["clip"]["activation"] == "quickgelu"
    digest = weights.hashlib.sha256((root / "laion.pt").read_bytes()).hexdigest()
    monkeypatch.setitem(weights.KNOWN_ACTIVATIONS, "gelu", (digest[:8],))
    config = load_config(root / "a.toml", [f"clip.weights={root}/laion.pt"])
    assert weights.find_shape(config.clip, state, root) == ("gelu", 0)


def test_another_clip_has_heads_of_its_own(root, trained):
    content = checkpoint.load(trained)
    content["config"]["clip"] |= {"heads": 3, "activation": "gelu"}
    torch.save(tiny_clip_state(1), root / "other.pt")
    config = load_config(None, [f"clip.weights={root}/other.pt"], content["config"])
    segmenter = load_segmenter(content, config, root, "x")
    assert {block.attn.num_heads for block in segmenter.clip.visual.transformer.resblocks} == {1}
    assert config.clip.activation == "quickgelu" and config.clip.heads == 0


def test_a_resumed_run_starts_from_its_own_weights(root):
    assert train(root).returncode == 0
    done = train(root, "--resume", "--set", "train.init=nowhere.pt", "--set", "train.steps=5")
    assert done.returncode == 0 and "train.init is not read again" in done.stdout, done.stderr


def test_checkpoints_all_of_numpy(root, trained):
    numpy = lambda part: {k: v.numpy() for k, v in part.items()}
    content = checkpoint.load(trained)
    content["model"] = {part: numpy(state) for part, state in content["model"].items()}
    torch.save(content, root / "np.pt")
    torch.save(numpy(torch.load(root / "clip.pt")), root / "clip.pt")
    assert measure(root / "np.pt", root, "--out", root / "o").returncode == 0
    torch.save({"model": {"x": np.zeros((0, 3)), "y": np.array(7)}}, root / "odd.pt")
    model = checkpoint.load(root / "odd.pt")["model"]
    assert model["x"].shape == (0, 3) and isinstance(model["y"], torch.Tensor) and model["y"] == 7
    torch.save({"model": {"x": np.zeros(2, np.complex64)}}, root / "odd.pt")
    with pytest.raises(utils.UserError, match="an array of dtype 'c8'"):
        checkpoint.load(root / "odd.pt")


def test_an_original_with_further_entries_starts_a_training(root, trained):
    """What fits is loaded; all else is named."""
    content = checkpoint.load(trained)
    original = {
        "clip_adapter.non_object_embedding": content["model"]["maskformer"]["non_object"],
        "extra.thing": torch.zeros(2),
    }
    torch.save({"model": original}, root / "model_final.pth")
    done = train(root, "--set", f"train.init={root}/model_final.pth")
    assert done.returncode == 0, done.stderr
    assert (
        "1 tensors loaded, 1 dropped: extra.thing" in done.stdout and "start afresh" in done.stdout
    )
