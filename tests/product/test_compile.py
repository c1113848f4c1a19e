"""torch.compile takes each part whole and once; the training step never makes the host wait for a
GPU.

AOTAutograd stands in for Inductor, which follows the same path and needs minutes more.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import PROCESS, tiny_config
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import train
from zsseg import checkpoint, distributed
from zsseg.clip import cosine_logits
from zsseg.losses import loss_normalizers, segmentation_losses
from zsseg.maskformer import MaskFormer
from zsseg.matcher import Targets
from zsseg.regions import encode_crops

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def forget():
    """Nothing is remembered from other tests."""
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def aot_eager(monkeypatch):
    """AOTAutograd in place of Inductor."""
    inductor = torch.compile  # Module.compile goes through it
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: inductor(f, backend="aot_eager", **options)
    )


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_one_program_serves_images_of_all_sizes(segmenter, aot_eager):
    """And CLIP's tower needs one for each of four numbers of crops."""
    # A CPU's convolutions distinguish maps smaller than these.
    sizes = ((480, 480), (448, 640), (640, 449), (512, 500))
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    segmenter.config.chunk = 16
    wanted = [segmenter(image, (90, 70)) for image in images]
    text, side = segmenter.text_features, segmenter.clip.visual.resolution
    crops = torch.randn(39, 3, side, side)
    logits = cosine_logits(encode_crops(segmenter.clip, crops), text)
    segmenter.config.ensemble = False
    segmenter.compile_parts()
    for image in images:
        segmenter.propose(image)
    assert graphs() == 1
    segmenter.config.ensemble = True
    with torch.inference_mode():
        for count in (1, 2, 3, 7, 8, 9, 16, 17, 31, 39, 5, 30):
            few = cosine_logits(encode_crops(segmenter.clip, crops[:count], 16), text)
            assert few.shape == (count, 3) and torch.allclose(few, logits[:count], atol=1e-3)
    assert graphs() == 1 + 4
    with torch._dynamo.config.patch(error_on_recompile=True):
        for image, labels in zip(images, wanted, strict=True):
            assert (segmenter(image, (90, 70)) == labels).float().mean() > 0.999
    assert not any("_orig_mod" in k for k in segmenter.state_dict())


def loss_case(T: int, counts: list[int], device: str = "cpu") -> tuple:
    torch.manual_seed(T)
    logits = torch.randn(2, len(counts), 20, 32, device=device, requires_grad=True)
    masks = torch.randn(2, len(counts), 20, 8, 8, device=device, requires_grad=True)
    labels = torch.randint(0, max(T, 1), (len(counts), 32, 32), dtype=torch.uint8, device=device)
    targets = Targets(
        labels,
        torch.arange(T, device=device).expand(len(counts), T),
        torch.tensor(counts, device=device),
    )
    return (
        logits,
        masks,
        targets,
        loss_normalizers(targets.counts, 20, 0.1, PROCESS),
        20.0,
        1.0,
        0.1,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_one_program_serves_all_numbers_of_targets(device, aot_eager):
    compiled = torch.compile(segmentation_losses, fullgraph=True)
    cases = [(5, [5, 3]), (1, [1, 0]), (15, [15, 2]), (0, [0, 0]), (8, [2, 8])]
    for T, counts in 2 * cases:
        results = []
        for function in (segmentation_losses, compiled):
            logits, masks, targets, *rest = loss_case(T, counts, device)
            losses = function(
                logits, masks, targets.padded() if function is compiled else targets, *rest
            )
            sum(v.sum() for v in losses.values()).backward()
            results.append([*(v.detach() for v in losses.values()), logits.grad, masks.grad])
        for ours, wanted in zip(*results, strict=True):
            assert torch.allclose(ours, wanted, rtol=1e-4, atol=1e-6)
    assert graphs() == 1
    logits, masks, targets, *rest = loss_case(16, [16, 9], device)
    assert targets.padded().classes.shape[1] == 31
    compiled(logits, masks, targets.padded(), *rest)
    assert graphs() == 2


def segment_task(root, device: torch.device, *overrides: str) -> tuple:
    task = train.Segment(tiny_config(*overrides), root, root, distributed.Process(device))
    task.model.train()
    return task, train.build_optimizer(task.model, task.config)


@pytest.mark.slow
def test_the_compiled_step_is_the_eager_step(shapes_root, aot_eager):
    weights = []
    for setting in ("off", "on"):
        torch.manual_seed(0)
        task, optimizer = segment_task(shapes_root, PROCESS.device, "model.dropout=0.0")
        if setting == "on":
            task.compile()
        for step in range(3):
            batch = task.collate([task.samples[n] for n in range(4 * step, 4 * step + 4)])
            values = train.train_step(task, task.model, optimizer, batch, 0.01)
        weights.append([values[0], *values[1].values(), values[2]])
    assert graphs() == 2  # the network and its losses
    for eager, compiled in zip(*weights, strict=True):
        assert float(compiled) == pytest.approx(float(eager), rel=1e-3)


@pytest.mark.slow
def test_compiled_before_ddp_keeps_names_and_gradients(tmp_path, aot_eager):
    """`compile` in place, then DDP around it: train.py's order."""
    torch.manual_seed(0)
    model = MaskFormer(tiny_config("model.dropout=0.0", "model.feedforward=1024").model, 16)
    images, text = torch.randn(2, 3, 64, 64), F.normalize(torch.randn(3, 16), dim=-1)
    names, gradients = list(model.state_dict()), []
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        for wrap in (
            lambda m: m,
            lambda m: m.compile(fullgraph=True) or DistributedDataParallel(m, bucket_cap_mb=1),
        ):
            logits, masks = wrap(model)(images, text)
            model.zero_grad()
            (logits.square().mean() + masks.square().mean()).backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
    finally:
        torch.distributed.destroy_process_group()
    assert list(model.state_dict()) == names and graphs() == 1
    for eager, compiled in zip(*gradients, strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-3, atol=1e-5 * float(eager.abs().max() + 1))


class Transfers(TorchDispatchMode):
    """Counts copies between host and device, either way."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if function._schema.name in ("aten::_to_copy", "aten::copy_") and isinstance(
            result, torch.Tensor
        ):
            source = arguments[1] if function._schema.name == "aten::copy_" else arguments[0]
            self.count += source.device.type != result.device.type
        return result


def test_the_losses_read_nothing_back(shapes_root):
    """On CUDA tensors without values, so that no GPU is needed: whoever asks for one (`item`,
    `nonzero`) fails.
    """
    task, _ = segment_task(shapes_root, PROCESS.device)
    images, targets = task.collate([task.samples[n] for n in range(4)])
    transfers = Transfers()
    with FakeTensorMode() as mode:
        for part in task.model.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in [(k, v) for k, v in tensors.items() if v is not None]:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    tensors[name] = (
                        torch.nn.Parameter(empty) if tensors is part._parameters else empty
                    )
        task.text, task.process = (
            torch.empty(task.text.shape, device="cuda"),
            distributed.Process(torch.device("cuda")),
        )
        images, *targets = map(
            mode.from_tensor, (images, targets.labels, targets.classes, targets.counts)
        )
        with transfers:
            loss, parts = task.loss(task.model, (images, Targets(*targets)))
        assert loss.is_cuda and loss.requires_grad and all(v.is_cuda for v in parts.values())
        with pytest.raises(DataDependentOutputException):
            loss.item()
    # Images, labels, classes, counts: from pinned memory, and no others.
    assert transfers.count == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])  # by Inductor
def test_a_training_step_never_waits_for_the_gpu(shapes_root, compiled):
    task, optimizer = segment_task(shapes_root, torch.device("cuda"))
    if compiled:
        task.compile()
    for step in range(4):
        images, targets = task.collate([task.samples[n] for n in range(4 * step, 4 * step + 4)])
        batch = images.pin_memory(), targets.pin_memory()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            loss, _, _, bad = train.train_step(task, task.model, optimizer, batch, 0.01)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.isfinite(loss) and bad == 0


@pytest.mark.parametrize("task", ["clip", "prompts"])
def test_the_other_tasks_compile_whole(task, shapes_root, tmp_path, aot_eager):
    file = {"clip": "configs/shapes_clip.toml", "prompts": "configs/voc_prompts.toml"}[task]
    words = [
        "data.name=shapes",
        "clip.weights={root}/shapes/clip.pt",
        "train.steps=2",
        "train.batch_size=4",
        "data.workers=0",
        "contrast.groups=2",
        "prompts.samples_per_class=3",
        "model.compile=on",
    ]
    train.main(
        [
            "--config",
            file,
            "--root",
            str(shapes_root),
            "--out",
            str(tmp_path),
            "--device",
            "cpu",
            *(x for word in words for x in ("--set", word)),
        ]
    )
    assert "_orig_mod" not in str(checkpoint.load(tmp_path / "last.pt")["model"].keys())
    # Prompts: 3 for texts, since those of the fixed prompt are shorter.
    assert graphs() == {"clip": 1, "prompts": 4}[task]
