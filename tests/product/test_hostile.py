"""Files from strangers: refused in one line that names them, without harm and without filling the
memory.
"""

import copy
import pickle
import resource
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import PROCESS, ROOT, command, fails_in_one_line, tiny_clip_state, tiny_config
from PIL import Image

import train
from zsseg import checkpoint, weights
from zsseg.clip import build_clip
from zsseg.images import read_image, read_values
from zsseg.utils import UserError


def test_a_image_that_is_a_bomb(tmp_path):
    """A few kilobytes that would become 400 million pixels."""
    for size in ((20000, 20000), (9500, 9500)):  # above Pillow's own limit, and where it only warns
        Image.new("1", size).save(tmp_path / "bomb.png")
        assert (tmp_path / "bomb.png").stat().st_size < 10**5
        for read in (
            lambda: read_image(tmp_path / "bomb.png"),
            lambda: read_values(tmp_path / "bomb.png", 8),
        ):
            with pytest.raises(UserError, match=r"bomb.png: cannot be read .*pixels"):
                read()


def test_a_script_that_is_a_bomb(tmp_path):
    """OpenAI's archives hold their tensors uncompressed; here 256 MiB of zeros in a quarter of one.
    Checkpoints do, too.
    """
    script = torch.jit.script(torch.nn.Linear(2, 2))
    script.save(str(tmp_path / "clip.pt"))
    with (
        zipfile.ZipFile(tmp_path / "clip.pt") as source,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w") as target,
    ):
        for info in source.infolist():
            content = bytes(2**28) if "/data/" in info.filename else source.read(info)
            compression = zipfile.ZIP_DEFLATED if "/data/" in info.filename else zipfile.ZIP_STORED
            target.writestr(info.filename, content, compression)
    assert weights.load_clip_state(str(tmp_path / "clip.pt"), tmp_path).keys() == {"weight", "bias"}
    # Making it took more than reading may.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"bomb.pt cannot be read .*is compressed"):
        weights.load_clip_state(str(tmp_path / "bomb.pt"), tmp_path)
    (tmp_path / "clip.pt").unlink()
    torch.save({"model": {"a": torch.zeros(2**20)}}, tmp_path / "whole.pt")
    deflated = zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "whole.pt") as source, deflated as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    assert checkpoint.load(tmp_path / "whole.pt")["model"]["a"].shape == (2**20,)
    with pytest.raises(UserError, match=r"bomb.pt: cannot be read"):
        checkpoint.load(tmp_path / "bomb.pt")
    expanded = weights.ScriptUnpickler.tensor
    # 32 GiB from one number, by strides of 0.
    with pytest.raises(pickle.UnpicklingError, match="from 1 numbers"):
        expanded(torch.zeros(1), 0, (2**33,), (0,))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB


WORDS = ["--config", "configs/shapes.toml", "--device", "cpu"]


@pytest.fixture(scope="module")
def whole(shapes_root, tmp_path_factory) -> dict:
    """A checkpoint of two steps out of three."""
    out = tmp_path_factory.mktemp("whole")
    config = tiny_config(
        "train.steps=3", "train.checkpoint_every=2", "train.batch_size=2", "eval.compare=false"
    )
    train.train(config, shapes_root, out, PROCESS, {})
    return checkpoint.load(out / "previous.pt")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"optimizer": "short"}, "cannot resume .*exp_avg has shape"),
        ({"optimizer": "less"}, "cannot resume .*entries"),
        ({"optimizer": "renamed"}, "cannot resume .*entries"),
        ({"step": "four"}, "training run"),
        ({"step": -1}, "training run"),
        ({"step": True}, "training run"),
        ({"optimizer": 5}, "training run"),
        ({"best": "much"}, "training run"),
        ({"skipped": None}, "training run"),
        ({"optimizer": {"state": {}, "param_groups": [5]}}, "cannot resume"),
        ({"optimizer": {}}, "cannot resume"),
        ({"optimizer": {"state": {0: {"step": "x"}}, "param_groups": []}}, "cannot resume"),
        ({"config": 5}, "training run"),
        ({"config": {"train": 5}}, "train"),
        ({"config": {"trian": {}}}, "did you mean train"),
        ({"config": {"train": {"steps": "2"}}}, "train.steps"),
        ({"model": {"maskformer": 5}}, "state dict"),
        ({"model": 5}, "no model"),
        ({"model": {"maskformer": {"norm.weight": "x"}}}, "state dict"),
        ({"model": {}}, "is missing"),
    ],
)
def test_a_checkpoint_that_is_nonsense(change, part, whole, shapes_root, tmp_path, monkeypatch):
    """The kinds of its entries are checked before they are used."""
    checkpoint.save(tmp_path / "last.pt", **whole)
    monkeypatch.chdir(ROOT)
    words = [*WORDS, "--root", str(shapes_root), "--out", str(tmp_path), "--resume"]
    # State of another shape, which fused kernels would read beyond.
    if isinstance(change.get("optimizer"), str):
        state = copy.deepcopy(whole["optimizer"])
        entry = state["state"][3]
        if change["optimizer"] == "short":
            entry["exp_avg"] = torch.zeros(1)
        elif change["optimizer"] == "less":
            del entry["exp_avg"]
        else:
            for entry in state["state"].values():
                entry["other"] = entry.pop("exp_avg")
        change = {"optimizer": state}
    checkpoint.save(tmp_path / "last.pt", **whole | change)
    with pytest.raises(UserError, match=part):
        train.main(words)
    assert [f.name for f in tmp_path.iterdir()] == ["last.pt"]


def test_a_clip_of_odd_sizes(shapes_root, tmp_path):
    """Shapes that contradict one another are named, not tripped over."""
    for change in (
        {"text_projection": torch.zeros(3)},
        {"positional_embedding": torch.zeros(2, 2)},
        {"token_embedding.weight": torch.zeros(514, 2)},
    ):
        torch.save(tiny_clip_state() | change, tmp_path / "clip.pt")
        with pytest.raises(UserError, match="CLIP"):
            build_clip(weights.load_clip_state(str(tmp_path / "clip.pt"), tmp_path))


def test_a_quota_that_ends_during_training(shapes_root, tmp_path, monkeypatch):
    """The last checkpoint stays whole, nothing half written is left beside it, and with room the
    run goes on.
    """
    settings = [
        "train.steps=6",
        "train.batch_size=2",
        "train.checkpoint_every=2",
        "data.workers=0",
        "data.crop=64",
        "data.short_edges=[64]",
        "data.test_short_edge=64",
        "eval.compare=false",
        "log.every=1",
    ]
    monkeypatch.chdir(ROOT)
    words = [
        *WORDS,
        "--root",
        shapes_root,
        "--out",
        tmp_path / "run",
        *(x for s in settings for x in ("--set", s)),
    ]
    script = tmp_path / "quota.py"  # a limit on the size of files from the second checkpoint on
    script.write_text(f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from zsseg import checkpoint, command_line
real = checkpoint.save
def save(path, previous=None, **content):
    if content["step"] == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
    real(path, previous, **content)
checkpoint.save = save
command_line.command(train.main)
""")
    fails_in_one_line(command(script, *words), "last.pt", "cannot be written")
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] == 2
    assert {f.name for f in (tmp_path / "run").iterdir()} == {"last.pt", "metrics.jsonl"}
    train.main([*map(str, words), "--resume"])
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] == 6


def test_places_that_cannot_be_written(shapes_root, tmp_path, monkeypatch, capsys):
    """An output folder on a read-only file system is one line; a cache there costs only time."""
    config = tiny_config("train.steps=1", "train.batch_size=1", "eval.compare=false")
    with pytest.raises(
        UserError, match=r"output /proc/run: cannot be written \(No such file or directory\)"
    ):
        train.train(config, shapes_root, Path("/proc/run"), PROCESS, {})
    monkeypatch.setenv("ZSSEG_CACHE", "/proc/cache")
    train.train(config, shapes_root, tmp_path, PROCESS, {})
    assert (
        "not kept in /proc/cache" in capsys.readouterr().out
        and checkpoint.load(tmp_path / "last.pt")["step"] == 1
    )
