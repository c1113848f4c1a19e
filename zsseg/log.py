"""The log of a run: metrics.jsonl, and wandb where asked for."""

import json
import os
from pathlib import Path

from zsseg.run import Process, UserError, replacing


def is_before(line: str, step: int) -> bool:
    """Whether a line of metrics.jsonl tells of something that a run which goes on from `step` does not repeat."""
    try:
        values = json.loads(line)
        return values["step"] < step or (values["step"] == step and ("loss" in values or "skipped" in values))
    except (ValueError, TypeError, KeyError):
        return False


class Log:
    """The record of a run: one JSON object a line in `metrics.jsonl`, and wandb where asked for (rank 0 only)."""
    def __init__(self, folder: Path, process: Process, config: dict, step: int = 0, run_id: str | None = None):
        self.file = folder / "metrics.jsonl" if process.is_main else None
        self.wandb, self.run_id = None, run_id
        if not process.is_main:
            return
        # A resumed run repeats the steps after its checkpoint, and the evaluation that was due then: forget what was logged
        # about them, and a line that a kill cut short.
        lines = self.file.read_text(errors="replace").splitlines() if step and self.file.exists() else []
        kept = [line for line in lines if is_before(line, step)]
        with replacing(self.file) as file:
            file.write_text("".join(line + "\n" for line in kept))
        if config["log"]["wandb"] != "disabled":
            self.wandb = start_wandb(config, folder, run_id)
            self.run_id = self.wandb.id

    def write(self, step: int, **values: object) -> None:
        if self.file is None:
            return
        try:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise UserError(f"file {self.file}", f"cannot be written ({error.strerror})", "check the disk; --resume") from None
        if self.wandb is not None:
            self.wandb.log(values, step=max(step, self.wandb.step))  # it drops what comes late


def start_wandb(config: dict, folder: Path, run_id: str | None):
    try:
        import wandb  # here: it takes seconds to import and most runs do without
    except ImportError:
        raise UserError("log.wandb", "wandb is not installed", "pip install wandb, or set log.wandb=disabled") from None
    mode, project = config["log"]["wandb"], config["log"]["project"]
    if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        print("wandb: no login found, logging offline (later: wandb login; wandb sync)")
        mode = "offline"
    return wandb.init(project=project, config=config, dir=str(folder), mode=mode, id=run_id, resume="allow")
