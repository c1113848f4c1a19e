"""Run the README's first command in an empty folder and time it: `python -m
tests.benchmarks.first_command`.

Prints the seconds and the largest memory of its processes together (PSS: what they share counts
once), which is read every two seconds; what the command writes is deleted.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def memory(folder: str) -> int:
    """Bytes of all processes that work in a folder; 0 where there is no /proc."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd") == folder:
                found = re.search(r"^Pss: +(\d+) kB", (process / "smaps_rollup").read_text(), re.M)
                total += 1024 * int(found[1])
        except OSError:  # it has ended, or is another user's
            continue
    return total


def main() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    line = re.search(r"```bash\n(python prepare_data.py shapes .*)\n```", text)[1]
    print(line, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("prepare_data.py", "train.py", "configs", "zsseg", "kernels"):
            (Path(folder) / name).symlink_to(ROOT / name)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "ZSSEG_DATA": ""}
        started = time.perf_counter()
        running = subprocess.Popen(line, shell=True, cwd=folder, env=environment)
        most = 0
        while running.poll() is None:
            time.sleep(2)
            most = max(most, memory(os.path.realpath(folder)))
        seconds = time.perf_counter() - started
    print(f"exit code {running.returncode}: {seconds:.0f} s, {most / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
