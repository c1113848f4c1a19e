"""What a GPU is asked for, on CUDA tensors without values: where the host waits for it, what is
copied, how much memory is held.
"""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from conftest import GPU, tiny_config, tiny_segmenter

import train
from zsseg import evaluate
from zsseg.apps import predict
from zsseg.config import load_config
from zsseg.datasets import dataset
from zsseg.losses import segmentation_losses
from zsseg.maskformer import MaskFormer
from zsseg.matcher import Targets

pytest.importorskip("triton")
from tests.benchmarks.fake_gpu import CUDA, Watch, fake_gpu

STEP_GIB = 5.2  # held after the forward pass


def test_a_training_step_waits_for_nothing_and_stays_within_its_memory(monkeypatch):
    """On VOC: R50, 16 crops of 640, up to 8 classes in each, bf16. There is no backward pass
    without a GPU.
    """
    config = load_config(None, ["model.backbone=R50", "train.batch_size=16"])
    held = []

    def backward(loss: torch.Tensor) -> None:
        held.append(watch.held / 2**30)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with fake_gpu():
        with CUDA:
            model, text = MaskFormer(config.model, 512).train(), torch.empty(15, 512)
        task = object.__new__(train.SegmentTask)
        vars(task).update(config=config, process=GPU, model=model, text=text, clipped=[model])
        vars(task).update(losses=segmentation_losses, compiled=False)
        optimizer = train.build_optimizer(model, config)
        images = torch.empty(16, 3, 640, 640, dtype=torch.uint8)
        ids = torch.empty(16, 8, dtype=torch.int64)
        batch = images, Targets(images[:, 0], ids, ids[:, 0])
        with Watch() as watch:
            parts, norm, bad = train.train_step(task, model, optimizer, [batch], 0.01)
    assert not watch.waits
    # Images, labels, classes, counts, and the counts of all batches of the step
    assert watch.copies.total() == 5 and all("cpu -> cuda" in copy for copy in watch.copies)
    assert all(t.is_cuda for t in (norm, bad, *parts.values()))
    assert STEP_GIB / 2 < held[0] < STEP_GIB, held


@contextlib.contextmanager
def watched(*settings: str) -> Iterator[tuple]:
    """A segmenter as inference has it on a GPU, without values, over the classes of its data set;
    its configuration; a watch.
    """
    config = tiny_config(*settings)
    segmenter = tiny_segmenter(*settings)
    segmenter.set_classes(dataset(config.data).names)
    with fake_gpu():
        segmenter.to_empty(device=CUDA).accelerate(torch.bfloat16)
        for name in ("seen", "text_features", "region_text_features"):
            setattr(segmenter, name, torch.empty_like(getattr(segmenter, name), device=CUDA))
        with Watch() as watch:
            yield segmenter, config, watch


@pytest.mark.parametrize("way", ["crops", "pool"])
def test_an_image_waits_once(way):
    """For the number of its masks; its results come while the next one is computed."""
    image = torch.zeros(3, 96, 128, dtype=torch.uint8)
    with watched(f"clip.regions={way}") as (segmenter, config, watch):
        predict.segment_image(segmenter, config, GPU, [image], (90, 120))
    assert watch.waits == {"zsseg/segmenter.py:Segmenter.propose nonzero": 1}
    put, fetch = (f"zsseg/distributed.py:Process.{name}" for name in ("put", "fetch"))
    assert watch.copies == {f"{put} cpu -> cuda": 1, f"{fetch} cuda -> cpu": 2}


def test_evaluation_waits_once_an_image(shapes_root, monkeypatch):
    """And reads its counts at the end."""
    item = [torch.zeros(3, 64, 96, dtype=torch.uint8)], torch.zeros(60, 90, dtype=torch.uint8), ""
    monkeypatch.setattr(evaluate, "batches", lambda images, numbers, *_: [item for _ in numbers])
    monkeypatch.setattr(evaluate, "summarize_totals", lambda *_: {"images": 4})
    with watched("eval.compare=true") as (segmenter, config, watch):
        segmenter.set_classes = lambda *_: None
        evaluate.evaluate(segmenter, config, shapes_root, GPU, "test")
    assert watch.waits == {"zsseg/segmenter.py:Segmenter.propose nonzero": 4}
    assert watch.copies == {"zsseg/distributed.py:Process.put cpu -> cuda": 8}  # images and labels
