"""torch.compile takes each part whole and once; the training step never makes the host wait for a
GPU.

AOTAutograd stands in for Inductor, which follows the same path and needs minutes more.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import GPU, PROCESS, tiny_config, tiny_segmenter
from torch._dynamo.utils import counters

import train
from zsseg.distributed import Process
from zsseg.losses import loss_normalizers, segmentation_losses
from zsseg.matcher import Targets
from zsseg.regions import encode_crops

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TRAIN = SimpleNamespace(focal_weight=20.0, dice_weight=1.0, no_object_weight=0.1)


@pytest.fixture
def aot_eager(monkeypatch):
    """AOTAutograd in place of Inductor; nothing is remembered from other tests."""
    torch._dynamo.reset()
    counters.clear()
    inductor = torch.compile  # Module.compile goes through it
    replaced = lambda f, **options: inductor(f, backend="aot_eager", **options)
    monkeypatch.setattr(torch, "compile", replaced)


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_one_program_serves_images_of_all_sizes(aot_eager):
    """And another one CLIP's tower, for all numbers of crops."""
    segmenter = tiny_segmenter("clip.crop_batch_size=8")
    # A CPU's convolutions distinguish maps smaller than these, and batches above 15.
    sizes = ((448, 640), (640, 449), (512, 500))
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    expected = [segmenter.segment([image], (90, 70)).labels for image in images]
    side = segmenter.clip.resolution
    with torch.inference_mode():
        crops = torch.randn(39, 3, side, side)
        features = encode_crops(segmenter.clip, crops, 8)
    segmenter.accelerate(torch.float32, compiled=True)
    segmenter.config.ensemble = False
    for image in images:
        segmenter.propose(image)
    assert graphs() == 1
    segmenter.config.ensemble = True
    with torch.inference_mode():
        for count in (1, 2, 3, 7, 8, 9, 12, 13, 31, 39, 5, 30):
            few = encode_crops(segmenter.clip, crops[:count], 8)
            assert torch.allclose(few, features[:count], atol=1e-4)
    assert graphs() == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        for image, labels in zip(images, expected, strict=True):
            found = segmenter.segment([image], (90, 70)).labels
            assert (found == labels).float().mean() > 0.999
    assert not any("_orig_mod" in k for k in segmenter.state_dict())


def loss_case(T: int, counts: list[int], device: str = "cpu") -> tuple:
    torch.manual_seed(T)
    B = len(counts)
    logits = torch.randn(2, B, 20, 32, device=device, requires_grad=True)
    masks = torch.randn(2, B, 20, 8, 8, device=device, requires_grad=True)
    labels = torch.randint(0, max(T, 1), (B, 32, 32), dtype=torch.uint8, device=device)
    classes = torch.arange(T, device=device).expand(B, T)
    targets = Targets(labels, classes, torch.tensor(counts, device=device))
    normalizers = loss_normalizers(targets.counts, 20, 0.1, PROCESS.sum, 1)
    return logits, masks, targets, normalizers


@pytest.mark.parametrize("device", DEVICES)
def test_one_program_serves_all_numbers_of_targets(device, aot_eager):
    compiled = torch.compile(segmentation_losses, fullgraph=True)
    for T, counts in [(5, [5, 3]), (1, [1, 0]), (15, [15, 2]), (0, [0, 0])]:
        results = []
        for function in (segmentation_losses, compiled):
            logits, masks, targets, normalizers = loss_case(T, counts, device)
            targets = targets.padded() if function is compiled else targets
            losses = function(logits, masks, targets, normalizers, TRAIN)
            sum(v.sum() for v in losses.values()).backward()
            results.append([*(v.detach() for v in losses.values()), logits.grad, masks.grad])
        for ours, expected in zip(*results, strict=True):
            assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-6)
    assert graphs() == 1
    logits, masks, targets, normalizers = loss_case(16, [16, 9], device)
    assert targets.padded().classes.shape[1] == 31
    compiled(logits, masks, targets.padded(), normalizers, TRAIN)
    assert graphs() == 2


def segment_task(root, device: torch.device, *settings: str) -> tuple:
    task = train.SegmentTask(tiny_config(*settings), root, root / "out", Process(device), None)
    task.model.train()
    return task, train.build_optimizer(task.model, task.config)


@pytest.mark.slow
def test_the_compiled_step_is_the_eager_step(shapes_root, aot_eager):
    steps = []
    for compiled in (False, True):
        torch.manual_seed(0)
        task, optimizer = segment_task(shapes_root, PROCESS.device, "model.dropout=0.0")
        names = list(task.state(None)["maskformer"])
        if compiled:
            task.compile()
        for step in range(3):
            batch = task.collate([task.samples[n] for n in range(4 * step, 4 * step + 4)])
            values, norm, _ = train.train_step(task, task.model, optimizer, [batch], 0.01)
        steps.append([*values.values(), norm])
        assert list(task.state(None)["maskformer"]) == names
    assert graphs() == 2  # the network and its losses
    for eager, ours in zip(*steps, strict=True):
        assert float(ours) == pytest.approx(float(eager), rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])  # by Inductor
def test_a_training_step_never_waits_for_the_gpu(shapes_root, compiled):
    task, optimizer = segment_task(shapes_root, torch.device("cuda"))
    if compiled:
        task.compile()
    for step in range(4):
        images, targets = task.collate([task.samples[n] for n in range(4 * step, 4 * step + 4)])
        batch = images.pin_memory(), Targets(*(t.pin_memory() for t in targets))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            values, _, bad = train.train_step(task, task.model, optimizer, [batch], 0.01)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.isfinite(values["loss"]) and bad == 0


@pytest.mark.gpu
def test_graphs_give_the_labels_of_the_eager_networks():
    """Each size comes as it is, is captured, and replayed."""
    eager, fast = (tiny_segmenter().cuda() for _ in range(2))
    fast.accelerate(torch.bfloat16, graphs=True)
    make = lambda *size: torch.randint(0, 256, (3, *size), dtype=torch.uint8, device="cuda")
    for segmenter in (eager, fast):
        segmenter.set_classes(segmenter.names, [0, 1])
    with GPU.autocast("on"):
        for size in 3 * [(96, 128), (64, 80)]:
            image = make(*size)
            labels, ours = (s.segment([image], (90, 120)).labels for s in (eager, fast))
            assert (ours == labels).float().mean() > 0.99
