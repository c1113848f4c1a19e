"""Everything that a short time on a GPU should give, in at most 9 minutes: `python -m
kernels.gpu_check [--out DIR]`.

The tests that need a GPU, the benchmark of the kernels, the end-to-end ladder; logs and tables go
to --out as they come, so that a step which runs out of its time still leaves what it had.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

# {log: (seconds at most, words)}
STEPS = {
    "tests.log": (
        120,
        [
            "-m",
            "pytest",
            "-q",
            "--tb=short",
            "-rf",
            "--maxfail=20",
            "tests/test_kernels.py",
            "tests/product/test_compile.py",
        ],
    ),
    "bench.log": (100, ["-m", "tests.benchmarks.kernels", "--csv", "{out}/bench.csv"]),
    "ladder.log": (
        220,
        [
            "-m",
            "tests.benchmarks.ladder",
            "--train",
            "--rounds",
            "1",
            "--csv",
            "{out}/ladder.csv",
            "--plot",
            "{out}/ladder.svg",
        ],
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for log, (limit, words) in STEPS.items():
        words = [sys.executable, *(w.format(out=out) for w in words)]
        with open(out / log, "w") as file:
            process = subprocess.Popen(
                words,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
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
