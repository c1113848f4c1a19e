"""Everything that a short time on a GPU should give, in one command: `python -m kernels.gpu_check [--out DIR]`.

The kernels' tests on the GPU, then their benchmark; the logs and the table of times go to --out.
"""

import argparse
import subprocess
import sys
from pathlib import Path

STEPS = {
    "tests.log": ["-m", "pytest", "-q", "-x", "--maxfail=20", "tests/test_kernels.py"],
    "bench.log": ["-m", "kernels.bench", "--csv", "{out}/bench.csv"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for log, words in STEPS.items():
        words = [sys.executable, *(w.format(out=out) for w in words)]
        with open(out / log, "w") as file:
            process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
        failed += [log] if process.wait() else []
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
