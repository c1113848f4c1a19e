"""An evaluation on one page that contains its images and fetches nothing: report.html."""

import bisect
import json
from pathlib import Path

import numpy as np
import torch

from zsseg.datasets import dataset
from zsseg.log import read_lines
from zsseg.metrics import rows, shown, summarize
from zsseg.utils import atomic_write, git_commit
from zsseg.visualize import base64_text, comparison, encode, palette

TEMPLATE = Path(__file__).with_name("report.html")
MAX_CARDS = 12  # worst images, and as many best ones
MAX_CONFUSIONS = 12
MAX_POINTS = 600  # of a curve
CURVES = "loss class focal dice val/mIoU_seen val/mIoU_unseen val/hIoU val/mIoU"  # of metrics.jsonl


class Report:
    """The `on_image` of `evaluate`: the confusion matrix of all images, and the worst and the best
    of them, ready for the page.
    """

    def __init__(self, config, process):
        self.config = config
        self.process = process
        self.data = dataset(config.data)
        C = len(self.data.names)
        self.matrix = torch.zeros(C, C, dtype=torch.int64, device=process.device)
        self.cards = []  # (score, number, what is shown), sorted

    def __call__(self, number, name, image, labels, predicted, matrix):
        """See `evaluate`. An image's score is the mean IoU of the classes in its ground truth;
        without any, it is left out.
        """
        self.matrix += matrix
        score = summarize(matrix, self.data)["mIoU_gt"]
        if score is None:
            return
        strip = comparison(image, labels, predicted, len(matrix))
        classes = (matrix.sum(0) + matrix.sum(1)).nonzero()[:, 0].tolist()
        card = {"name": name, "picture": base64_text(encode(strip)), "classes": classes}
        bisect.insort(self.cards, (score, number, card))
        del self.cards[MAX_CARDS:-MAX_CARDS]

    def write(self, result, checkpoint, step, out):
        """Write OUT/report.html, on the first process, about the metrics `result` of a checkpoint
        saved after `step`, with the curves in the metrics.jsonl beside it.
        """
        matrix = self.process.sum(self.matrix).cpu().numpy()
        cards = sorted(self.process.gather(self.cards))
        if not self.process.is_main:
            return
        data = self.data
        images = f"{data.name}, {self.config.data.split} split, {result['images']} images"
        keys = shown(result)
        page = {
            "facts": [f"{checkpoint}, step {step}", images, f"commit {git_commit()}"],
            "classes": data.names,
            "unseen": data.unseen,
            "colours": palette(len(data.names)).tolist(),
            "per_class": [values["IoU"] for values in result["per_class"].values()],
            "keys": keys,
            "rows": [(title, [values[key] for key in keys]) for title, values in rows(result)],
            "confusions": confusions(matrix),
            "curves": curves(checkpoint.parent / "metrics.jsonl"),
            "worst": cards[:MAX_CARDS],
            "best": cards[-MAX_CARDS:],
        }
        # So that no name can end the script block.
        text = json.dumps(page, allow_nan=False).replace("<", "\\u003c")
        with atomic_write(out / "report.html") as file:
            file.write_text(TEMPLATE.read_text("utf-8").replace("{{data}}", text), "utf-8")
        print(f"-> {out / 'report.html'}")


def confusions(matrix):
    """The pixels of [C, C] whose confusion costs most: (class, predicted as, pixels, by how many
    points the class's IoU would rise if they were right).
    """
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    gain = 100 * matrix / np.maximum(union, 1)[:, None]
    np.fill_diagonal(gain, 0)
    worst = np.argsort(-gain, axis=None, kind="stable")[:MAX_CONFUSIONS]
    i, j = np.unravel_index(worst, gain.shape)
    return np.stack([i, j, matrix[i, j], gain[i, j]], 1).tolist()


def curves(file):
    """What a run logged, {key: (step, value), the last one first}, about MAX_POINTS of each."""
    lines = read_lines(file)
    series = {}
    for key in CURVES.split():
        points = [(line["step"], line[key]) for line in lines if key in line]
        series[key] = points[:: -(len(points) // MAX_POINTS + 1)]
    return series
