"""Shared by all tests: the stand-in weights and images of the reference values, small data sets,
the command line.
"""

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import recipe
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are defined

from zsseg import distributed, utils
from zsseg.prepare import shapes
from zsseg.clip import build_clip
from zsseg.config import load_config
from zsseg.segmenter import Segmenter
from zsseg.tokenizer import read_merges

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = utils.cache_dir() / "bpe_simple_vocab_16e6.txt.gz"
if VOCABULARY.exists():
    os.environ.setdefault("ZSSEG_VOCAB", str(VOCABULARY))
CACHE = tempfile.TemporaryDirectory()  # nothing that another run computed
os.environ["ZSSEG_CACHE"] = CACHE.name
GOLDEN = Path(__file__).parent / "golden"
PROCESS = distributed.Process(torch.device("cpu"))
GPU = distributed.Process(torch.device("cuda", 0))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def relative_error(ours: torch.Tensor, reference: np.ndarray) -> float:
    """Largest difference relative to the reference's largest absolute value."""
    return float(np.abs(ours.detach().cpu().numpy() - reference).max() / np.abs(reference).max())


def golden(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / name))


def original_state(
    keys: dict[str, list[int]],
    arrays: dict[str, np.ndarray] = {},  # noqa: B006
) -> dict[str, torch.Tensor]:
    """An original checkpoint of stand-in weights: {name: shape} plus the arrays stored as
    `override/<name>`.
    """
    state = {
        k: torch.as_tensor(recipe.make_tensor(k.split("clip_model.")[-1], shape))
        for k, shape in keys.items()
    }
    state |= {
        k.removeprefix("override/"): torch.from_numpy(v)
        for k, v in arrays.items()
        if k.startswith("override/")
    }
    return state


def keys(name: str, entry: str | None = None) -> dict[str, list[int]]:
    content = json.loads((GOLDEN / name).read_text())
    return content[entry] if entry else content


def tiny_config(*overrides: str, task: str = "segment"):
    """The synthetic data set's configuration with a few steps and smaller still."""
    sizes = [
        "train.steps=6",
        "train.batch_size=4",
        "data.workers=0",
        "log.every=1",
        "model.queries=8",
        "contrast.groups=2",
    ]
    sizes += ["data.short_edges=[64]", "data.crop=64", "data.test_short_edge=64"]
    file = ROOT / "configs" / ("shapes.toml" if task == "segment" else "shapes_clip.toml")
    return load_config(str(file), [*sizes, *overrides])


def tiny_clip_state(seed: int = 0) -> dict[str, torch.Tensor]:
    from zsseg.prepare.shapes_clip import build_small_clip

    torch.manual_seed(seed)
    return build_small_clip(load_config().contrast).state_dict()


@pytest.fixture(scope="session")
def vocabulary() -> None:
    """Tests with OpenAI's vocabulary: $ZSSEG_VOCAB, the cache or the network must provide it."""
    try:
        read_merges(48894)
    except utils.UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory) -> Path:
    """A data root with a few images of the synthetic data set and an untrained small CLIP."""
    folder = tmp_path_factory.mktemp("root")
    counts, shapes.SPLITS = shapes.SPLITS, {"clip": 60, "train": 10, "val": 6, "test": 4}
    try:
        shapes.generate(folder / "shapes")
    finally:
        shapes.SPLITS = counts
    torch.save(tiny_clip_state(), folder / "shapes" / "clip.pt")
    return folder


@pytest.fixture
def segmenter() -> Segmenter:
    """A small untrained segmenter over three classes, the first two seen."""
    torch.manual_seed(0)
    segmenter = Segmenter(tiny_config(), tiny_clip_state()).eval()
    segmenter.set_classes(["star", "tree", "brick"], [0, 1])
    return segmenter


@pytest.fixture
def small_clip():
    return build_clip(tiny_clip_state())


def command(
    *arguments: object,
    env: dict[str, str] = {},  # noqa: B006
    processes: int = 1,
) -> subprocess.CompletedProcess:
    """Run `python SCRIPT ...` as a user would, from the repository; several processes as torchrun
    would start them.
    """
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        env = env | {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder) / name) for name in ("stdout", "stderr")}
        request = {
            "words": [*map(str, arguments)],
            "folder": str(ROOT),
            "environment": dict(os.environ) | env,
            "processes": processes,
        } | files
        print(json.dumps(request), file=zygote().stdin, flush=True)
        code = int(zygote().stdout.readline())
        output = {name: Path(file).read_text() for name, file in files.items()}
    return subprocess.CompletedProcess(request["words"], code, **output)


@functools.cache
def zygote() -> subprocess.Popen:
    words, path = (
        [sys.executable, str(ROOT / "tests" / "zygote.py")],
        f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    )
    return subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
    )


def fails_in_one_line(result: subprocess.CompletedProcess, *parts: str) -> None:
    """Exit code 2 and exactly `error: ...` on stderr with all `parts` in it."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for part in parts:
        assert part in lines[0]


from own_data import root, trained  # noqa: E402, F401  fixtures, which want what is above
