"""Shared by all tests: the stand-in weights and images of the reference values, small data sets,
trained models, the commands.
"""

import contextlib
import fcntl
import importlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

sys.modules["conftest"] = sys.modules[__name__]  # tests import it by this name
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread each, before torch counts the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import recipe
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are defined

from zsseg import data, distributed, utils
from zsseg.config import load_config

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
VOCABULARY = utils.cache_dir() / "bpe_simple_vocab_16e6.txt.gz"
if VOCABULARY.exists():
    os.environ.setdefault("ZSSEG_VOCAB", str(VOCABULARY))
CACHE = tempfile.TemporaryDirectory()  # nothing that another run computed
os.environ["ZSSEG_CACHE"] = CACHE.name
PROCESS = distributed.Process(torch.device("cpu"))
GPU = distributed.Process(torch.device("cuda", 0))
SECONDS = 240  # that a process may take


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


# Reference values


def golden(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / name))


def keys(name: str, entry: str | None = None) -> dict:
    content = json.loads((GOLDEN / name).read_text())
    return content[entry] if entry else content


def original_state(keys: dict, arrays=()) -> dict[str, torch.Tensor]:
    """An original checkpoint of stand-in weights: {name: shape} plus the arrays stored as
    `override/<name>`.
    """
    make = lambda name, shape: torch.as_tensor(recipe.make_tensor(name, shape))
    state = {name: make(name.split("clip_model.")[-1], shape) for name, shape in keys.items()}
    stored = [name for name in arrays if name.startswith("override/")]
    return state | {name.removeprefix("override/"): torch.tensor(arrays[name]) for name in stored}


@pytest.fixture(scope="session")
def vocabulary() -> None:
    """Tests with OpenAI's vocabulary: $ZSSEG_VOCAB, the cache or the network must provide it."""
    from zsseg.weights import load_tokenizer

    try:
        load_tokenizer(49408, 77)
    except utils.UserError as error:
        pytest.skip(str(error))


# Small models and data

TINY = (
    "train.steps=6",
    "train.batch_size=4",
    "log.every=1",
    "model.num_queries=8",
    "data.workers=0",
    "data.short_edges=[64]",
    "data.crop=64",
    "data.test_short_edge=64",
)


def tiny_config(*settings: str):
    """The synthetic data set's configuration with a few steps and smaller still."""
    return load_config(ROOT / "configs" / "shapes.toml", [*TINY, *settings])


def tiny_clip_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """An untrained small CLIP of the synthetic data set."""
    from zsseg.prepare.shapes_clip import build_small_clip

    torch.manual_seed(seed)
    return build_small_clip().state_dict()


def tiny_clip():
    from zsseg.clip import build_clip
    from zsseg.tokenizer import Tokenizer

    state = tiny_clip_state()
    return build_clip(state, Tokenizer(514, len(state["positional_embedding"])))


def tiny_segmenter(*settings: str):
    """A small untrained segmenter over three classes, the first two seen, with decided masks."""
    from zsseg.weights import assemble

    clip = tiny_clip()
    torch.manual_seed(0)
    segmenter = assemble(tiny_config(*settings), clip).eval()
    if hasattr(segmenter.maskformer, "mask_embed"):
        with torch.no_grad():
            segmenter.maskformer.mask_embed[-1].weight.mul_(20)
    segmenter.set_classes(["star", "tree", "brick"], [0, 1])
    return segmenter


@pytest.fixture
def small_clip():
    return tiny_clip()


@pytest.fixture
def segmenter():
    return tiny_segmenter()


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder that `make(folder)` fills, one for all processes of a session: read it, and write
    nothing into it.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / name
    done = base / f"{name}.done"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory) -> Path:
    """A data root with a few images of the synthetic data set and an untrained small CLIP."""
    from zsseg.prepare import shapes

    def make(folder: Path) -> None:
        with patch.object(shapes, "SPLITS", {"clip": 60, "train": 10, "val": 6, "test": 4}):
            shapes.generate(folder / "shapes")
        torch.save(tiny_clip_state(), folder / "shapes" / "clip.pt")

    return once(tmp_path_factory, "root", make)


@pytest.fixture(scope="session")
def shapes_run(shapes_root, tmp_path_factory) -> Path:
    """The folder of a run of four steps on the synthetic data, with an evaluation on the way."""

    def make(folder: Path) -> None:
        settings = ("train.steps=4", "train.checkpoint_every=2", "train.eval_every=2")
        succeed("train.py", *shapes_words(shapes_root, folder, *settings))

    return once(tmp_path_factory, "shapes_run", make)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The checkpoint `run/last.pt` of a run on a folder like that of the fixture `root`, with its
    own `a.toml`, images and CLIP.
    """
    import own_data

    def make(folder: Path) -> None:
        own_data.write(folder)
        words = ["--config", folder / "a.toml", "--root", folder, "--device", "cpu"]
        succeed("train.py", *words, "--out", folder / "run")

    return once(tmp_path_factory, "trained", make) / "run" / "last.pt"


# Commands


def overrides(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def shapes_words(shapes_root: Path, out: Path, *settings: str) -> list:
    """Arguments of train.py for a few steps on the synthetic data set."""
    words = ["--config", "configs/shapes.toml", "--device", "cpu", "--out", out]
    return [*words, "--root", shapes_root, *overrides(*TINY, *settings)]


def logged(out: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    text = (out / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def command(*words, env=None, processes=1, stdin="") -> subprocess.CompletedProcess:
    """Run `python SCRIPT ...` from the repository, in this process: with its own arguments, working
    directory, environment, streams, signal handlers and random numbers. Several processes are real
    ones.
    """
    if processes > 1:
        return process(*words, env=env, processes=processes, stdin=stdin)
    words = [*map(str, words)]
    main = importlib.import_module(Path(words[0]).stem).main
    with tempfile.TemporaryDirectory() as folder:
        files = stream_files(Path(folder), stdin)
        with isolated(words, os.environ | (env or {}), files):
            code = 0
            try:
                utils.command(main)
            except SystemExit as end:
                code = end.code or 0
            except Exception:
                traceback.print_exc()
                code = 1
        output = [file.read_text("utf-8") for file in files[1:]]
    return subprocess.CompletedProcess(words, code, *output)


def succeed(*words, **options) -> subprocess.CompletedProcess:
    """`command` without an error."""
    done = command(*words, **options)
    assert done.returncode == 0, done.stderr
    return done


def stream_files(folder: Path, stdin: str) -> list[Path]:
    files = [folder / name for name in ("stdin", "stdout", "stderr")]
    for file in files:
        file.write_text(stdin if file == files[0] else "", "utf-8")
    return files


@contextlib.contextmanager
def isolated(words: list[str], environment: dict[str, str], files: list[Path]) -> Iterator[None]:
    """Inside `with`, what a process finds at its start; afterwards, what was here before."""
    precision = torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(torch.random.fork_rng(devices=()))
        stack.enter_context(contextlib.chdir(ROOT))
        stack.enter_context(patch.object(sys, "argv", words))
        stack.enter_context(patch.dict(os.environ, environment, clear=True))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.callback(torch.set_float32_matmul_precision, precision)
        torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or torch.get_num_threads()))
        for number in utils.SIGNALS:
            stack.callback(signal.signal, number, signal.getsignal(number))
        default_signals()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stack.enter_context(redirected(files))
        for say in (utils.warn, data.print_once):  # a process has not printed it yet
            say.cache_clear()
        yield


@contextlib.contextmanager
def redirected(files: list[Path]) -> Iterator[None]:
    """Standard streams are these files, for child processes too."""
    before = sys.stdin, sys.stdout, sys.stderr
    saved = [os.dup(number) for number in range(3)]
    for number, file in enumerate(files):
        opened = os.open(file, os.O_RDWR | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    sys.stdin, sys.stdout, sys.stderr = stdin, stdout, stderr
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr, stdout, stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = before
        for number, copy in enumerate(saved):
            os.dup2(copy, number)
            os.close(copy)


def process(*words, env=None, processes=1, stdin="") -> subprocess.CompletedProcess:
    """Run `python SCRIPT ...` as a user would, from the repository; several processes as torchrun
    would start them.
    """
    env = dict(env or {})
    if processes > 1:
        env |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
        env["MASTER_PORT"] = str(free_port())
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        files = stream_files(Path(folder), stdin)
        streams = {file.name: stack.enter_context(open(file, "a+")) for file in files}
        streams["stdin"].seek(0)
        running = []
        for rank in range(processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            running.append(start(*words, env=env | ranks, **streams))
            stack.callback(running[-1].kill)
        codes = [started.wait(SECONDS) for started in running]
        output = [file.read_text("utf-8", "replace") for file in files[1:]]
    return subprocess.CompletedProcess([*map(str, words)], max(codes, key=abs), *output)


def start(*words, env=None, **options) -> subprocess.Popen:
    """A process that goes on, with the default signal handlers whatever the shell has set (it lets
    a job in the background ignore Ctrl-C). Its output is thrown away unless `options` say more.
    """
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT} | options
    options |= {"env": os.environ | (env or {}), "preexec_fn": default_signals}
    return subprocess.Popen([sys.executable, *map(str, words)], **options)


def default_signals() -> None:
    for number in utils.SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def fails_in_one_line(result: subprocess.CompletedProcess, *parts: str) -> None:
    """Exit code 2 and exactly `error: ...` on stderr with all `parts` in it."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for part in parts:
        assert part in lines[0]


from own_data import root  # noqa: F401  a fixture, which needs what is above
