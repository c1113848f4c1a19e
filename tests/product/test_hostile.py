"""Files from strangers: refused in one line that names them, without harm."""

import pickle
import resource
import zipfile

import numpy as np
import pytest
import torch
from numpy._core import multiarray

from zsseg import checkpoint
from zsseg.utils import UserError
from zsseg.weights import checkpoint_and_config, load_checkpoint, load_segmenter, read_torch


class Call:
    """Pickles as a call of a function with arguments of our choice."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def files() -> dict[str, object]:
    """Contents that no reader may take, or bytes."""
    flags = (3, "|", None, None, None, -1, -1, 0)
    pointer = Call(np.dtype, ("O8", False, True), flags)
    fields = (3, "|", None, ("a",), {"a": (pointer, 0)}, 8, 8, 0)
    forged = Call(np.dtype, ("f8", False, True), fields)
    rebuilt = (np.ndarray, (0,), b"b")
    array = lambda *state: Call(multiarray._reconstruct, rebuilt, (1, *state))
    return {
        "code": Call(open, ("pwned", "w")),
        "pointer": Call(multiarray.scalar, (pointer, b"A" * 8)),
        "pointers": array((8,), pointer, False, b"A" * 64),
        "object": np.array([[], "x"], dtype=object),
        "text": np.array(["text"]),
        "structured": np.zeros(3, [("a", "f4")]),
        "short": array((1000, 1000), np.dtype("float32"), False, b"1234"),
        "fields": array((2,), forged, False, b"A" * 8),
        "html": b"<html>Not Found</html>",
        "garbage": b"\x80\xff",
        "not a zip": b"PK\x03\x04junk",
    }


@pytest.mark.parametrize("ending", ["pkl", "pt"])
@pytest.mark.parametrize("name", files())
def test_hostile_and_broken_files_are_one_line(name, ending, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = files()[name]
    path = tmp_path / f"x.{ending}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif ending == "pt":
        torch.save({"model": {"w": content}}, path)
    else:
        path.write_bytes(pickle.dumps({"model": {"w": content}}))
    with pytest.raises(UserError, match=rf"x\.{ending}: (cannot be read|contains no model)"):
        load_checkpoint(path)
    assert not (tmp_path / "pwned").exists()


def test_other_formats_and_compressed_archives_are_refused(tmp_path):
    """torch compresses nothing; here are 256 MiB of zeros in a quarter of one."""
    (tmp_path / "x.safetensors").write_bytes(b"\x08")
    with pytest.raises(UserError, match=r"cannot be read as tensors \(it is in another format\)"):
        read_torch(tmp_path / "x.safetensors", "file")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    torch.save({"model": {"a": torch.zeros(2**20)}}, tmp_path / "whole.pt")
    assert read_torch(tmp_path / "script.pt", "file").keys() == {"weight", "bias"}
    for name, size in (("script.pt", 2**28), ("whole.pt", 2**22)):
        bomb = zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED)
        with zipfile.ZipFile(tmp_path / name) as source, bomb:
            for info in source.infolist():
                is_tensor = "/data/" in info.filename
                bomb.writestr(info.filename, bytes(size) if is_tensor else source.read(info))
        with pytest.raises(UserError, match=r"cannot be read .*is compressed"):
            read_torch(tmp_path / "bomb.pt", "file")


def test_a_checkpoint_that_is_nonsense(trained, tmp_path):
    """The kinds of its entries are checked before they are used."""
    content = load_checkpoint(trained)
    for change, part in (
        ({"config": 5}, "not a table"),
        ({"config": {"trian": {}}}, "did you mean train"),
        ({"model": {"maskformer": 5}}, "state dict"),
        ({"model": {"maskformer": {"norm.weight": "x"}}}, "state dict"),
        ({"model": {}}, "does not fit"),
        ({"model": 5}, "no model"),
    ):
        checkpoint.save(tmp_path / "x.pt", **content | change)
        with pytest.raises(UserError, match=part):
            read, config = checkpoint_and_config(tmp_path / "x.pt", None, [])
            load_segmenter(read, config, trained.parent.parent, "x")


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """Nothing half written is left beside it."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, model={"w": torch.ones(2)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"last\.pt: cannot be written"):
            checkpoint.save(path, tmp_path / "previous.pt", model={"w": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(load_checkpoint(path)["model"]["w"]) == 2 and [*tmp_path.iterdir()] == [path]
