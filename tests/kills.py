"""Kill the commands at random moments, let them go on, and compare with a life that nobody
disturbed.

    python -m tests.kills --kills 100 [--job segment prompts clip prepare label images] [--seed 0]
    python -m tests.kills --folder 2000    a folder segmented by two processes that are killed twice, and once in one go

Lives end by SIGKILL at a random moment, by SIGKILL while a checkpoint (or an image) is being
written, or by SIGTERM or SIGUSR1, after which training must have saved and left with code 0. A life
that came to its end is compared, and another run begins. Every life is a fork of a process that has
imported everything and computed nothing, so that it starts at once.
"""

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 120  # seconds that a life may take
COMMON = ["log.every=1", "data.workers=1", "train.checkpoint_every=3"]
SMALL = [
    *COMMON,
    "data.crop=64",
    "data.short_edges=[64]",
    "data.test_short_edge=64",
    "train.batch_size=2",
]
JOBS = {  # name: (configuration, settings)
    "segment": (
        "shapes",
        [
            *SMALL,
            "train.steps=30",
            "model.queries=8",
            "model.decoder_layers=1",
            "eval.compare=false",
            "train.eval_every=10",
            "log.every=2",
        ],
    ),
    "prompts": (
        "voc_prompts",
        [
            *SMALL,
            "train.steps=30",
            "data.name=shapes",
            "data.split=test",
            "train.seeds=[0,1]",
            "clip.weights={root}/shapes/clip.pt",
            "clip.prompt_prefix=4",
        ],
    ),
    "clip": ("shapes_clip", [*COMMON, "train.steps=15", "contrast.groups=2"]),
}


CHOICES = [*JOBS, "prepare", "label", "images"]


@dataclass
class Lives:
    """How the lives of a job ended."""

    ends: Counter = field(default_factory=Counter)
    written: int = 0  # of those killed, how many left a file half written
    runs: int = 0  # that came to their end


def fork(action, log: Path) -> int:
    """Run action() in a child whose output goes to `log`; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        action()
        code = 0
    except SystemExit as stop:
        code = 1 if isinstance(stop.code, str) else stop.code or 0
        print(stop.code if isinstance(stop.code, str) else "")
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(child: int, seconds: float) -> int | None:
    """The child's exit code (negative: a signal), None where it still lives after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.0005)


def temporary(folder: Path) -> set[tuple[Path, int]]:
    """The half-written files in a folder, and when they changed."""
    found = set()
    for file in folder.rglob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # renamed just now
            found.add((file, file.stat().st_mtime_ns))
    return found


def written(folder: Path, before: set[tuple[Path, int]]) -> bool:
    return bool(temporary(folder) - before)


def life(action, folder: Path, log: Path, way: str, seconds: float) -> tuple[int, bool]:
    """One life that ends by itself or `way`: after `seconds` or, "write", once a temporary file is
    there.
    """
    before = temporary(folder)  # what an earlier life left says nothing about this one
    child = fork(action, log)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (code := wait(child, 0)) is not None:
            return code, False
        if way == "write" and written(folder, before):
            break
        time.sleep(0.0003)
    number = {"SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1}.get(way, signal.SIGKILL)
    if number == signal.SIGKILL:
        os.kill(child, number)
    else:
        os.killpg(child, number)  # workers too, as a scheduler does
    code = wait(child, LIMIT)
    if code is None:
        os.kill(child, signal.SIGKILL)
        raise AssertionError(f"{way}: still there after {LIMIT} s")
    return code, written(folder, before)


def torment(
    action,
    folder: Path,
    log: Path,
    kills: int,
    rng: random.Random,
    seconds: float,
    ways: list[str],
    first: int,
) -> Lives:
    """Disturb at most `kills` lives until one ends by itself. `seconds`: how long an undisturbed
    one takes.
    """
    lives = Lives()
    while lives.ends.total() < kills:
        way = ways[(first + lives.ends.total()) % len(ways)]
        code, half = life(action, folder, log, way, rng.uniform(0.02, 1) * seconds)
        # A signal that comes before or after the training loop ends the process as ever: nothing is
        # at stake there.
        stopped = log.exists() and log.read_text().rstrip().endswith(
            ("--resume goes on", "run it again to go on")
        )
        assert code in (0, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGUSR1) or (
            stopped and code == 1
        ), f"{way}: exit code {code}\n{log.read_text()[-2000:]}"
        if code == 0 and not stopped:
            return lives
        lives.ends[f"{way}, {'saved and left' if code >= 0 else 'dead'}"] += 1
        lives.written += half
    assert wait(fork(action, log), LIMIT) == 0, f"see {log}"
    return lives


def training(job: str, root: Path, out: Path):
    """The command of a training job, as a user would type it after whatever became of the last
    one.
    """
    import train
    from zsseg import command_line

    name, settings = JOBS[job]
    words = [
        "--config",
        str(ROOT / "configs" / f"{name}.toml"),
        "--root",
        str(root),
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    words += [x for setting in settings for x in ("--set", setting)]

    def action() -> None:
        there = (out / "last.pt").exists() or (out / "previous.pt").exists()
        sys.argv = ["train.py", *words, *(["--resume"] if there else [])]
        command_line.command(train.main)

    return action


def preparing(root: Path):
    import prepare_data
    from zsseg import command_line
    from zsseg.prepare import shapes
    from zsseg.config import load_config

    shapes.SPLITS = {"clip": 60, "train": 30, "val": 3, "test": 3}
    short = ["train.steps=12", "train.checkpoint_every=2", "contrast.groups=1"]
    prepare_data.load_config = lambda file, settings: load_config(file, [*settings, *short])

    def action() -> None:
        sys.argv = ["prepare_data.py", "shapes", "--root", str(root), "--workers", "1"]
        command_line.command(prepare_data.main)

    return action


def labelling(root: Path, model: Path, out: Path, *more: str):
    """Evaluation that saves a label map for every image; with other options, images that are no
    data set's.
    """
    import eval as evaluation
    from zsseg import command_line

    def action() -> None:
        sys.argv = [
            "eval.py",
            str(model),
            "--root",
            str(root),
            "--out",
            str(out),
            "--device",
            "cpu",
        ]
        sys.argv += more or ["--save-predictions"]
        command_line.command(evaluation.main)

    return action


def same(a: object, b: object, path: str = "") -> None:
    """Raises AssertionError where two checkpoints differ by a single bit; times and run ids are not
    in them.
    """
    import torch

    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def compare_runs(a: Path, b: Path) -> None:
    """Two runs left the same weights, optimizer, settings, and log."""
    import json

    from zsseg import checkpoint

    for name in ("last.pt", "best.pt"):
        assert (a / name).exists() == (b / name).exists()
        if (a / name).exists():
            same(checkpoint.load(a / name), checkpoint.load(b / name), name)
    logs = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (a, b)
    ]
    for log in logs:
        for line in log:
            for key in [
                k for k in line if k.startswith("speed/") or k.endswith("images_per_second")
            ]:
                del line[key]
    same(*logs, "metrics.jsonl")


def compare_trees(a: Path, b: Path) -> None:
    """Two folders hold the same files, weights to the bit and everything else to the byte, but for
    speeds.
    """
    from zsseg import checkpoint

    # Whenever that was saved.
    names = lambda root: (f for f in root.rglob("*") if f.is_file() and f.name != "previous.pt")
    files = [sorted(f.relative_to(root) for f in names(root)) for root in (a, b)]
    assert files[0] == files[1], set(files[0]) ^ set(files[1])
    for file in files[0]:
        if file.suffix == ".pt":
            same(*(checkpoint.load(root / file) for root in (a, b)), str(file))
        elif file.suffix not in (".npz", ".jsonl"):
            x, y = ((root / file).read_bytes() for root in (a, b))
            assert re.sub(rb".*_per_second.*", b"", x) == re.sub(rb".*_per_second.*", b"", y), file


def trial(job: str, kills: int, seed: int, root: Path, folder: Path) -> Lives:
    """Disturb a job `kills` times, again from the start whenever it is done, and compare what it
    leaves each time with an undisturbed one's. Raises AssertionError.
    """
    straight, rng, lives = folder / "straight", random.Random(seed), Lives()
    model = folder / "model" / "last.pt"
    images = (
        "--images",
        str(root / "shapes" / "images"),
        "--classes",
        "star, tree; other: wall",
        "--resume",
    )
    make = {
        "prepare": preparing,
        "label": lambda out: labelling(root, model, out),
        "images": lambda out: labelling(root, model, out, *images),
    }.get(job, lambda out: training(job, root, out))
    if job in ("label", "images"):
        folder.mkdir()
        assert (
            wait(fork(training("segment", root, folder / "model"), folder / "model.log"), LIMIT)
            == 0
        )
    ways = ["write", "SIGTERM", "random", "write", "SIGUSR1"]
    straight.mkdir(parents=True)
    started = time.monotonic()
    assert wait(fork(make(straight), folder / "straight.log"), LIMIT) == 0, (
        folder / "straight.log"
    ).read_text()
    seconds = time.monotonic() - started
    while lives.ends.total() < kills:
        out = folder / f"disturbed{lives.runs}"
        out.mkdir()
        more = torment(
            make(out),
            out,
            folder / f"{out.name}.log",
            kills - lives.ends.total(),
            rng,
            seconds,
            ways,
            lives.ends.total(),
        )
        (compare_runs if job in JOBS else compare_trees)(straight, out)
        lives = Lives(lives.ends + more.ends, lives.written + more.written, lives.runs + 1)
    return lives


def folder_of_images(count: int, root: Path, folder: Path, rng: random.Random) -> str:
    """Segment images in two processes that are killed twice, and in one that is not. Raises
    AssertionError.
    """
    import numpy as np
    from PIL import Image

    from zsseg.prepare import shapes

    assert wait(fork(training("segment", root, folder / "model"), folder / "model.log"), LIMIT) == 0
    sizes = np.random.default_rng(0).integers(40, 140, (count, 2)).tolist()
    for i, size in enumerate(sizes):
        file = folder / "photos" / f"{i % 7}" / f"{i}.{'jpg' if i % 3 else 'png'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shapes.draw("test", i)[0]).resize(size).save(file)
    (folder / "photos" / "broken.jpg").write_bytes(b"junk")
    words = [
        str(ROOT / "eval.py"),
        str(folder / "model" / "last.pt"),
        "--root",
        str(root),
        "--device",
        "cpu",
        "--images",
        str(folder / "photos"),
        "--classes",
        "star, tree = azure box, wall; other: cup",
    ]
    settings = ["--set", "data.workers=1", "--set", "data.test_short_edge=64"]

    def life(out: str, processes: int, enough: int) -> int:
        """Segment into folder/out until the end or until so many are done; how many then are."""
        start = [
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={processes}",
            f"--master-port={rng.randint(20000, 40000)}",
        ]
        place = ["--out", str(folder / out), "--resume"]
        with open(folder / f"{out}.log", "a") as log:
            child = subprocess.Popen(
                [sys.executable, *start, *words, *settings, *place],
                stdout=log,
                stderr=log,
                cwd=ROOT,
            )
        done = lambda: sum(1 for _ in (folder / out).rglob("*.json"))
        while child.poll() is None and done() < enough:
            time.sleep(0.05)
        if child.poll() is None:
            for number in [*descendants(child.pid), child.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
        child.wait()
        return done()

    assert life("straight", 1, count + 1) == count, (folder / "straight.log").read_text()
    kills = [life("disturbed", 2, enough) for enough in (count // 4, count // 2)]
    assert 0 < kills[0] < kills[1] < count, kills
    assert life("disturbed", 2, count + 1) == count, (folder / "disturbed.log").read_text()
    compare_trees(folder / "straight", folder / "disturbed")
    files = sum(1 for f in (folder / "disturbed").rglob("*") if f.is_file())
    assert files == 3 * count + 1, files
    first, second = kills
    return (
        f"{count} images: two processes, killed with {first} and {second} done, left the "
        f"{files} files of one process"
    )


def descendants(number: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    children = [int(n) for n in Path(f"/proc/{number}/task/{number}/children").read_text().split()]
    return [n for child in children for n in [*descendants(child), child]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--job", choices=CHOICES, nargs="+", default=CHOICES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--root",
        type=Path,
        help="a data root with the synthetic data set (else a small one is made)",
    )
    parser.add_argument(
        "--folder", type=int, metavar="IMAGES", help="only segment a folder of so many images"
    )
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = (
        "1"  # before torch is there: no thread pool may exist when lives are forked
    )
    import train  # noqa: F401  what every life needs

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        root = args.root or folder / "root"
        if args.root is None:
            assert wait(fork(preparing(root), folder / "prepare.log"), LIMIT) == 0, (
                folder / "prepare.log"
            ).read_text()
        if args.folder:
            (folder / "folder").mkdir()
            print(folder_of_images(args.folder, root, folder / "folder", random.Random(args.seed)))
            return
        for job in args.job:
            started = time.monotonic()
            lives = trial(job, args.kills, args.seed, root, folder / job)
            ends = ", ".join(f"{n} x {end}" for end, n in sorted(lives.ends.items()))
            print(
                f"{job}: {args.kills} lives cut short ({ends}; {lives.written} left a file half "
                f"written), {lives.runs} runs "
                f"came to their end, all equal to the bit; {time.monotonic() - started:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
