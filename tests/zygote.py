"""A process that has imported the program and computed nothing: every command of the tests is a
fork of it.

Importing takes seconds, forking milliseconds; otherwise such a command is a process of its own,
with its own environment, working directory, exit code and output. Requests are lines of JSON on
stdin, the answer to each is its exit code (the largest of several processes, which get what
torchrun would tell them).
"""

import json
import os
import runpy
import sys


def child(request: dict) -> None:
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if threads := os.environ.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads))
    sys.argv = request["words"]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    import train  # noqa: F401

    for line in sys.stdin:
        request, running = json.loads(line), []
        for rank in range(request["processes"]):
            if request["processes"] > 1:
                request["environment"] |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            running.append(os.fork())
            if running[-1] == 0:
                child(request)
                sys.exit(0)  # as any process ends: with what is registered for that
        print(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in running), flush=True)


if __name__ == "__main__":
    main()
