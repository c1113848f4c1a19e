"""Our numbers beside the paper's, with the settings that differ."""

import tomllib
from dataclasses import asdict
from pathlib import Path

from zsseg.config import Config, load_config
from zsseg.metrics import percent

ROWS = tomllib.loads((Path(__file__).parent / "published.toml").read_text("utf-8"))["row"]
CONFIGS = Path(__file__).parent.parent / "configs"
# What does not change a number, or says only where files are.
SILENT = (
    "data.workers",
    "log.",
    "model.kernels",
    "model.compile",
    "model.bf16",
    "clip.chunk",
    "clip.prompts",
    "train.checkpoint_every",
    "train.eval_every",
    "eval.compare",
    "eval.weights",
    "clip.activation",
)


def flat(config: Config) -> dict[str, object]:
    values = {
        f"{section}.{key}": value
        for section, part in asdict(config).items()
        for key, value in part.items()
    }
    values["train.teacher"] = bool(values["train.teacher"])
    return {k: v for k, v in values.items() if not k.startswith(SILENT)}


def differences(config: Config, row: dict) -> list[str]:
    """The settings that are not those of a published row, as "key: ours (theirs)"."""
    theirs = flat(load_config(str(CONFIGS / f"{row['config']}.toml"), row.get("set", [])))
    return [f"{k}: {v} ({theirs[k]})" for k, v in flat(config).items() if v != theirs[k]]


def nearest(config: Config) -> tuple[dict, list[str]] | None:
    """The published row on the same data set with the fewest settings that differ, and those; None
    where there is no row.
    """
    rows = [
        row
        for row in ROWS
        if load_config(str(CONFIGS / f"{row['config']}.toml")).data.name == config.data.name
    ]
    return min(
        ((row, differences(config, row)) for row in rows),
        key=lambda found: len(found[1]),
        default=None,
    )


def compare(result: dict, config: Config) -> str:
    """A table of our metrics and those of the nearest published row on the same data set."""
    if not (found := nearest(config)):
        return f"the paper has no result on {config.data.name}"
    row, differing = found
    keys = [
        k for k in ("pAcc", "mIoU_seen", "mIoU_unseen", "hIoU", "mIoU") if k in row and k in result
    ]
    lines = ["".join([f"{'':12}", *(f"{k.removeprefix('mIoU_'):>9}" for k in keys)])]
    for who, values in (("the paper", row), ("ours", result)):
        lines.append("".join([f"{who:12}", *(percent(values[k], 9) for k in keys)]))
    lines += [f"the paper's row: {row['name']} (configs/{row['config']}.toml)"]
    return "\n".join(
        [
            *lines,
            "settings that differ, ours (theirs):" if differing else "all settings are the same",
            *differing,
        ]
    )
