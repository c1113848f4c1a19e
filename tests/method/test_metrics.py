"""Metrics against counting by hand."""

import dataclasses

import numpy as np
import pytest
import torch

from zsseg.datasets import DATASETS, DataSet
from zsseg.metrics import confusion, summarize, table
from zsseg.visualize import palette, save_label_map

PLAIN = DataSet("plain", ["a", "b", "c", "d"], [], "", [], {}, [0, 1, 2, 3])
SPLIT = dataclasses.replace(PLAIN, unseen=["c", "d"])


def literal_iou(labels: np.ndarray, predicted: np.ndarray, c: int) -> float:
    valid = labels != 255
    both = ((labels == c) & (predicted == c) & valid).sum()
    either = (((labels == c) | (predicted == c)) & valid).sum()
    return 100 * both / either


def test_confusion_and_iou_on_random_maps():
    rng = np.random.default_rng(0)
    labels, predicted = rng.choice([0, 1, 2, 3, 255], (40, 50)), rng.integers(0, 4, (40, 50))
    matrix = confusion(torch.from_numpy(labels), torch.from_numpy(predicted), 4, 255)
    assert matrix.sum() == (labels != 255).sum() and matrix.dtype == torch.int64
    result = summarize(matrix, SPLIT)
    ious = [literal_iou(labels, predicted, c) for c in range(4)]
    assert [v["IoU"] for v in result["per_class"].values()] == pytest.approx(ious)
    assert result["mIoU"] == pytest.approx(np.mean(ious))
    assert (result["mIoU_seen"], result["mIoU_unseen"]) == pytest.approx(
        (np.mean(ious[:2]), np.mean(ious[2:]))
    )
    seen, unseen = np.mean(ious[:2]), np.mean(ious[2:])
    assert result["hIoU"] == pytest.approx(2 * seen * unseen / (seen + unseen))
    valid = labels != 255
    assert result["pAcc"] == pytest.approx(100 * (labels == predicted)[valid].mean())
    accuracies = [100 * (predicted == labels)[labels == c].mean() for c in range(4)]
    assert result["mAcc"] == pytest.approx(np.mean(accuracies))
    weights = [(labels == c).sum() / valid.sum() for c in range(4)]
    assert result["fwIoU"] == pytest.approx(np.dot(weights, ious))


def test_a_class_predicted_but_absent_counts_in_the_originals_rule_only():
    matrix = torch.zeros(4, 4, dtype=torch.int64)
    matrix[0, 0], matrix[0, 3] = 75, 25  # class 3 has no ground truth
    result = summarize(matrix, PLAIN)
    assert result["mIoU"] == pytest.approx(75 / 2) and result["mIoU_gt"] == pytest.approx(75)
    assert result["per_class"]["d"] == {"IoU": None, "Acc": None}
    assert "hIoU" not in result


def test_nothing_but_ignored_pixels():
    ignored = torch.full((3, 3), 255)
    result = summarize(confusion(ignored, torch.zeros(3, 3, dtype=torch.int64), 4, 255), SPLIT)
    assert all(
        result[k] is None for k in ("mIoU", "mIoU_gt", "fwIoU", "hIoU", "pAcc", "pAcc_unseen")
    )


def test_a_perfect_prediction_is_100():
    labels = torch.arange(4).repeat(5, 1)
    result = summarize(confusion(labels, labels, 4, 255), SPLIT)
    assert all(
        result[k] == 100
        for k in ("mIoU", "mIoU_gt", "fwIoU", "mAcc", "pAcc", "hIoU", "pAcc_unseen")
    )


def test_table_shows_the_parts_side_by_side():
    result = summarize(torch.eye(4, dtype=torch.int64) * 7, SPLIT)
    result |= {
        "head_only": result,
        "clip_true_masks": {"accuracy": 91.25, "regions": 12, "accuracy_seen": 93.0},
    }
    lines = table(result).splitlines()
    assert lines[0].split() == ["seen", "unseen", "hIoU", "mIoU", "pAcc"]
    assert [line[:10] for line in lines[1:4]] == ["MaskFormer", "ensemble  ", "CLIP on th"]
    assert "91.2" in lines[3] and "d " in lines[-1]


@pytest.mark.parametrize(("classes", "dtype"), [(255, np.uint8), (847, np.uint16)])
def test_label_maps_keep_every_id(tmp_path, classes, dtype):
    from PIL import Image

    ids = torch.arange(classes).view(1, -1)
    save_label_map(ids, tmp_path / "map.png", classes)
    stored = np.array(Image.open(tmp_path / "map.png"))
    assert (
        stored.astype(np.int64).tolist() == ids.tolist()
        and stored.dtype.itemsize == np.dtype(dtype).itemsize
    )


def test_palette_colours_differ():
    colours = palette(171)
    assert len(np.unique(colours, axis=0)) >= 150 and colours[-1].tolist() == [0, 0, 0]


def test_the_table_of_data_sets_is_consistent():
    sizes = {
        "shapes": (25, 5),
        "voc": (20, 5),
        "coco_stuff": (171, 15),
        "ade20k": (150, 0),
        "ade20k_full": (847, 0),
        "pcontext": (59, 0),
        "cityscapes": (19, 0),
    }
    assert DATASETS.keys() == sizes.keys()
    for name, data in DATASETS.items():
        assert (len(data.names), len(data.unseen)) == sizes[name]
        assert len(set(data.names)) == len(data.names) == len(data.values) and set(
            data.unseen
        ) <= set(data.names)
        assert not data.unseen or sorted([*data.seen, *map(data.names.index, data.unseen)]) == list(
            range(len(data.names))
        )
        assert [data.names[i] for i in data.trained] == data.training_names
        for i, value in enumerate(data.values):
            unseen = data.names[i] in data.unseen
            assert data.lut()[value] == i
            assert data.lut(training=True)[value] == (
                data.ignore if unseen else data.training_names.index(data.names[i])
            )
        assert (np.delete(data.lut(), data.values) == data.ignore).all()
