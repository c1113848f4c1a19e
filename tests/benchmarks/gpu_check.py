"""Everything that a short time on a GPU should give, in at most 9 minutes: `python -m
tests.benchmarks.gpu_check [--out DIR]`.

The tests that need a GPU, the benchmark of the kernels, the end-to-end ladder; logs and tables go
to --out as they come, so that a step which runs out of its time still leaves what it had. At the
end a summary: what agrees with plain PyTorch, what is faster than torch.compile of it and by how
much, what should be dropped.
"""

import argparse
import contextlib
import csv
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

AGREES = 0.01  # the largest relative difference, or share of other labels, that bf16 explains
# What matters most comes first: the time may end before the last.
LADDER = [f"{part}:{row}" for part in ("inference", "training") for row in ("compile", "baseline")]
LADDER += [f"{part}:{row}" for row in ("plain", "kernels") for part in ("inference", "training")]
SPREAD = "-n 8" if importlib.util.find_spec("xdist") else ""
TESTS = "tests/method/test_kernels.py tests/product/test_compile.py"
# {log: (seconds at most, words)}
STEPS = {
    "tests.log": (180, f"-m pytest -q --tb=short -rf --maxfail=20 -o addopts= {SPREAD} {TESTS}"),
    "bench.log": (130, "-m tests.benchmarks.kernels --csv {out}/bench.csv"),
    "ladder.log": (
        200,
        "-m tests.benchmarks.ladder --rounds 1 --csv {out}/ladder.csv --rows " + " ".join(LADDER),
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


def read(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with open(file, newline="") as content:
        return list(csv.DictReader(content))


def summary(out: Path) -> list[str]:
    """What the tables in `out` say, a line for each kernel and each part end to end; those that
    were not measured are named.
    """
    lines = []
    times = {(row["kernel"], row["provider"]): row for row in read(out / "bench.csv")}
    for kernel in dict.fromkeys(kernel for kernel, _ in times):
        ours = times.get((kernel, "ours"))
        base = times.get((kernel, "torch.compile")) or times.get((kernel, "plain"))
        if not ours or not base:
            lines.append(f"{kernel}: not measured in full")
            continue
        agrees = float(ours["difference"]) <= AGREES
        faster = float(base["median_ms"]) / float(ours["median_ms"])
        share = 100 * float(ours["h100_floor_ms"]) / float(ours["median_ms"])
        verdict = "keep" if agrees and faster > 1 else "drop" if agrees else "mend"
        lines.append(
            f"{kernel}: {'agrees' if agrees else 'DIFFERS'} ({ours['difference']}), "
            f"{faster:.2f} x as fast as {base['provider']}, {share:.0f}% of an H100's floor: "
            + verdict
        )
    rows = {(row["part"], row["row"]): row for row in read(out / "ladder.csv")}
    for part, unit in (("inference", "images/s"), ("training", "images/s in steps")):
        found = {name: row for (owner, name), row in rows.items() if owner == part}
        if "compile" not in found:
            lines.append(f"{part}: not measured in full")
            continue
        ours = found["compile"]
        line = f"{part}: {float(ours['per_second']):.1f} {unit}, {ours['peak_MiB']} MiB"
        for name, what in (("plain", "eager fp32"), ("baseline", "bf16 and torch.compile alone")):
            if name in found:
                faster = float(ours["per_second"]) / float(found[name]["per_second"])
                line += f"; {faster:.2f} x {what} ({found[name]['peak_MiB']} MiB)"
        lines.append(line)
    return lines


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for log, (limit, words) in STEPS.items():
        with open(out / log, "w") as file:
            command = [sys.executable, *(word.format(out=out) for word in words.split())]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            process = subprocess.Popen(command, start_new_session=True, **pipes)
            timer = threading.Timer(limit, stop, [process])
            timer.start()
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
                file.flush()
        failed += [log] if process.wait() else []
        timer.cancel()
    lines = summary(out) + [f"{log}: failed or out of time" for log in failed]
    print("", *lines, sep="\n")
    (out / "summary.txt").write_text("\n".join(lines) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
