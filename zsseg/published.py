"""Our numbers beside the paper's, with the settings that differ."""

import tomllib
from dataclasses import asdict
from pathlib import Path

from zsseg.config import Config, load_config
from zsseg.metrics import metric_table

ROWS = tomllib.loads((Path(__file__).parent / "published.toml").read_text("utf-8"))["row"]
CONFIGS = Path(__file__).parent.parent / "configs"
# What does not change a number, or only says where files are.
IGNORED = (
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
METRICS = ("pAcc", "mIoU_seen", "mIoU_unseen", "hIoU", "mIoU")


def config_of(row: dict, settings: list[str] = ()) -> Config:
    """The configuration in configs/ that stands for a published row."""
    return load_config(str(CONFIGS / f"{row['config']}.toml"), settings)


def flatten(config: Config) -> dict[str, object]:
    """{"section.key": value} of the settings that may change a number."""
    sections = asdict(config).items()
    values = {f"{name}.{key}": v for name, part in sections for key, v in part.items()}
    values["train.teacher"] = bool(values["train.teacher"])
    return {key: v for key, v in values.items() if not key.startswith(IGNORED)}


def differences(config: Config, row: dict) -> list[str]:
    """The settings that are not those of a published row, as "key: ours (theirs)"."""
    theirs = flatten(config_of(row, row.get("set", [])))
    return [f"{k}: {v} ({theirs[k]})" for k, v in flatten(config).items() if v != theirs[k]]


def nearest(result: dict, config: Config) -> dict | None:
    """The published row on the same data set with the fewest settings that differ, those, and its
    values of the metrics in `result`; None where there is no row.
    """
    rows = [row for row in ROWS if config_of(row).data.name == config.data.name]
    if not rows:
        return None
    row = min(rows, key=lambda row: len(differences(config, row)))
    return {
        "name": row["name"],
        "config": f"configs/{row['config']}.toml",
        "differing": differences(config, row),
        "values": {key: row[key] for key in METRICS if key in row and key in result},
    }


def compare(result: dict, config: Config) -> str:
    """A table of our metrics and those of the nearest published row on the same data set."""
    if not (row := nearest(result, config)):
        return f"the paper has no result on {config.data.name}"
    lines = [
        metric_table(list(row["values"]), [("the paper", row["values"]), ("ours", result)]),
        f"the paper's row: {row['name']} ({row['config']})",
        "settings that differ, ours (theirs):" if row["differing"] else "all settings are the same",
    ]
    return "\n".join(lines + row["differing"])
