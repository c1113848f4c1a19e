"""CLIPs of others: names, activations, statistics; where a training starts from."""

import pytest
import torch
from conftest import tiny_clip_state

from zsseg import weights
from zsseg.clip import CLIP, VisionTransformer, build_clip
from zsseg.config import ClipConfig, load_config
from zsseg.tokenizer import Tokenizer
from zsseg.utils import UserError
from zsseg.weights import build_segmenter, load_checkpoint, load_clip


@pytest.mark.parametrize("prefix", ["module._orig_mod.", ""])
def test_wrapped_state_dicts_and_arrays_are_taken(prefix, trained, tmp_path):
    """What DataParallel and torch.compile put before names; and all of NumPy."""
    content = load_checkpoint(trained)
    before = content["model"]["maskformer"]
    wrap = lambda state: {prefix + k: v if prefix else v.numpy() for k, v in state.items()}
    clip = {"epoch": 3, "state_dict": wrap(tiny_clip_state())}  # as OpenCLIP's trainer does
    torch.save(clip if prefix else clip["state_dict"], tmp_path / "clip.pt")
    torch.save(content | {"model": {"maskformer": wrap(before)}}, tmp_path / "x.pt")
    read = load_checkpoint(tmp_path / "x.pt")
    segmenter = weights.load_segmenter(read, load_config(base=read["config"]), tmp_path, "x")
    after = segmenter.maskformer.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {type(value) for value in after.values()} == {torch.Tensor}
    state = segmenter.clip.state_dict()
    assert all(torch.equal(state[name], v) for name, v in tiny_clip_state().items())


def test_what_a_file_does_not_tell_must_be_said(tmp_path, capsys):
    """GELU instead of QuickGELU, heads of another width, other statistics; what is not said is
    taken to be OpenAI's, in a line.
    """
    torch.manual_seed(0)
    visual = VisionTransformer(32, 16, 160, 2, 64, num_heads=2, activation="gelu")
    made = CLIP(visual, Tokenizer(514, 40), 64, 40, 514, 64, 1, "gelu").eval()
    state = made.state_dict()
    image = torch.randn(2, 3, 32, 32)
    torch.save(state, tmp_path / "laion.pt")
    file = str(tmp_path / "laion.pt")
    with pytest.raises(UserError, match=r"does not tell its activation; set clip\.activation"):
        load_clip(ClipConfig(weights=file), tmp_path)
    options = {"activation": "gelu", "heads": 2, "mean": [0.5] * 3, "std": [0.5] * 3, "scale": 50.0}
    clip = load_clip(ClipConfig(weights=file, **options), tmp_path)
    assert "assumed" not in capsys.readouterr().out
    load_clip(ClipConfig(weights=file, activation="gelu", heads=2, scale=50.0), tmp_path)
    line = f"clip.weights {file}: assumed to be OpenAI's: clip.mean, clip.std\n"
    assert line in capsys.readouterr().out
    assert clip.scale == 50 and clip.mean.tolist() == clip.std.tolist() == [0.5] * 3
    with torch.no_grad():
        expected = made.encode_image(image)
        assert torch.allclose(clip.encode_image(image), expected, atol=1e-6)
        for others in (("quickgelu", 2), ("gelu", 4)):
            other = build_clip(state, Tokenizer(514, 40), *others)
            assert not torch.allclose(other.encode_image(image), expected, atol=1e-4)
    with pytest.raises(UserError, match=r"clip\.heads"):
        load_clip(ClipConfig(weights=file, activation="gelu", heads=3), tmp_path)
    for names, why in (("text_model.", "has Hugging Face's names"), ("text.", "OpenAI's names")):
        torch.save({f"{names}x": image, "text_projection": torch.zeros(3)}, file)
        with pytest.raises(UserError, match=why):
            load_clip(ClipConfig(weights=file, activation="gelu"), tmp_path)


@pytest.mark.parametrize("name", ["ViT-B/17", "ViT-H/14", "RN50x64x", "ViT-L-14", "{root}/x.pt"])
def test_no_other_clip_is_suggested(name, tmp_path):
    """A name with another digit is another model."""
    with pytest.raises(UserError, match=r"give a file, one of OpenAI's RN50, .*, or the --root"):
        load_clip(ClipConfig(weights=name), tmp_path)


@pytest.mark.parametrize("name", ["ViT-L/14@336px", "RN50x64"])
def test_every_clip_of_openai_s_comes_by_its_name(name, tmp_path, monkeypatch):
    """Its file from the cache, where another one is refused."""
    monkeypatch.setenv("ZSSEG_CACHE", str(tmp_path))
    file = tmp_path / f"{name.replace('/', '-').replace('@', '-')}.pt"
    file.write_bytes(b"another")
    with pytest.raises(UserError, match=f"clip.weights {name}: .*sha256.* instead of .*{file}"):
        load_clip(ClipConfig(weights=name), tmp_path)


def test_the_vocabulary_s_file(tmp_path, monkeypatch):
    monkeypatch.setenv("ZSSEG_VOCAB", str(tmp_path / "bpe.txt.gz"))
    assert weights.load_tokenizer(514, 40).encode("cat")  # needs none
    (tmp_path / "bpe.txt.gz").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"BPE vocabulary: the file has sha256 .*bpe\.txt\.gz"):
        weights.load_tokenizer(49408, 77)


def test_a_digest_knows_a_clip(small_clip):
    digest = weights.clip_digest(small_clip)
    half = {k: v.half() for k, v in small_clip.state_dict().items()}
    small_clip.load_state_dict(half)
    assert weights.clip_digest(small_clip) == weights.clip_digest(small_clip.half()) != digest
    assert weights.clip_digest(None) == ""


def test_training_starts_from_a_segmenter(trained, tmp_path, capsys):
    """All that fits is loaded, whatever the classes are: the head compares with texts. What does
    not fit starts from `model.weights`, which comes first.
    """
    root = trained.parent.parent
    before = load_checkpoint(trained)["model"]["maskformer"]
    torch.save(tiny_clip_state(), tmp_path / "clip.pt")
    classes = ['data.classes=["sheep", "road"]', f"train.init={trained}", "model.weights=clip"]
    with pytest.raises(UserError, match="is learned, but not here"):  # nor in train.init
        build_segmenter(load_config(root / "a.toml", [*classes, "clip.prompt=learned"]), root)
    capsys.readouterr()
    segmenter = build_segmenter(load_config(root / "a.toml", classes), root)
    after = segmenter.maskformer.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    text = capsys.readouterr().out
    assert "model.weights clip: " in text
    assert f"train.init {trained}: {len(before)} tensors loaded, 0 dropped" in text
    part = {k: before[k] for k in ("backbone.stem.0.weight", "query_embed.weight")}
    torch.save({"model": {"maskformer": part}, "config": {}}, tmp_path / "part.pt")
    settings = [*classes, f"train.init={tmp_path}/part.pt", "model.num_queries=9"]
    wider = build_segmenter(load_config(root / "a.toml", settings), root)
    text = capsys.readouterr().out
    assert "start afresh: " in text and "dropped: maskformer.query_embed.weight" in text
    stem = wider.clip.visual.conv1.backbone.state_dict()
    name = "stages.0.conv1.weight"
    assert torch.equal(wider.maskformer.backbone.state_dict()[name], stem[name])


def test_an_original_with_further_entries_starts_a_training(trained, tmp_path, capsys):
    """What fits is loaded; all else is named."""
    embedding = load_checkpoint(trained)["model"]["maskformer"]["non_object"] + 1
    original = {"clip_adapter.non_object_embedding": embedding, "extra.thing": torch.zeros(2)}
    torch.save({"model": original}, tmp_path / "model_final.pth")
    root = trained.parent.parent
    config = load_config(root / "a.toml", [f"train.init={tmp_path}/model_final.pth"])
    assert torch.equal(build_segmenter(config, root).maskformer.non_object, embedding)
    text = capsys.readouterr().out
    assert "1 tensors loaded, 1 dropped: extra.thing" in text and "start afresh" in text
