"""Everything that a short time on a GPU should give, in at most 9 minutes: `python -m
tests.benchmarks.gpu_check [--out DIR]`.

The tests that need a GPU, the benchmark of the kernels (does each agree with plain PyTorch, is it
faster than torch.compile of it?), the end-to-end ladder; logs and tables go to --out as they come,
so that a step which runs out of its time still leaves what it had.
"""

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

# What matters most comes first: the time may end before the last.
LADDER = [f"{part}:{row}" for part in ("inference", "training") for row in ("compile", "baseline")]
LADDER += ["inference:graphs"]
LADDER += [f"{part}:{row}" for row in ("plain", "kernels") for part in ("inference", "training")]
has = importlib.util.find_spec
SPREAD = "-n 8" if has("xdist") else ""
TESTS_SECONDS = 160 if SPREAD else 240
TESTS = "tests/method/test_kernels.py tests/product/test_compile.py"
# {log: (seconds at most, words)}; each may take 10 seconds more to stop
STEPS = {
    "tests.log": (
        TESTS_SECONDS,
        f"-m pytest -q --tb=short -rf --maxfail=20 -o addopts= {SPREAD} {TESTS}",
    ),
    "bench.log": (140, "-m tests.benchmarks.kernels --csv {out}/bench.csv"),
    "ladder.log": (
        370 - TESTS_SECONDS,
        "-m tests.benchmarks.ladder --csv {out}/ladder.csv --rows " + " ".join(LADDER),
    ),
}


def stop(process: subprocess.Popen) -> None:
    """Interrupt a step and all that it started, as Ctrl-C would, so that it reports what it has;
    kill what stays.
    """
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    paths = [os.environ.get("PYTHONPATH", "")]
    if not has("ftfy"):  # class names are ASCII here, which it leaves as they are
        paths.append(str(out.resolve() / "modules"))
        (out / "modules").mkdir(exist_ok=True)
        (out / "modules" / "ftfy.py").write_text("fix_text = str\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    failed = []
    for log, (limit, words) in STEPS.items():
        with open(out / log, "w") as file:
            command = [sys.executable, *(word.format(out=out) for word in words.split())]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            options = {"start_new_session": True, "env": environment}
            process = subprocess.Popen(command, **options, **pipes)
            timer = threading.Timer(limit, stop, [process])
            timer.start()
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
                file.flush()
        failed += [log] if process.wait() else []
        timer.cancel()
    sys.exit(f"failed or out of time: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
