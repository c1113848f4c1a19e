"""The kernels against the plain PyTorch of zsseg/ with fp64 as judge: in Triton's interpreter
without a GPU, on the GPU where there is one. The launchers are called themselves: the operators are
for CUDA tensors.
"""

import contextlib
import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PROCESS, ROOT, tiny_clip_state, tiny_config
from torch._subclasses.fake_tensor import FakeTensorMode

import eval as evaluation
import train
from kernels import assignment, mask_loss, mask_pool, matching_cost, region_crop, semantic_map
from kernels.jit import Switch
from tests.benchmarks import kernels as bench
from zsseg import clip, losses, matcher, regions
from zsseg.losses import focal_and_dice
from zsseg.matcher import Targets, hungarian
from zsseg.regions import mask_probabilities
from zsseg.segmenter import Segmenter, class_scores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")


@contextlib.contextmanager
def plain_pytorch():
    """In here, CUDA tensors go to plain PyTorch, too."""
    before, Switch.on = Switch.on, False
    try:
        yield
    finally:
        Switch.on = before


def on_device(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.to(DEVICE) for t in tensors]


def no_worse(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """The kernel's error is at most twice that of the fp32 reference (and of rounding to fp32 where
    that is exact).
    """
    ours, plain, exact = (t.detach().double().cpu() for t in (ours, plain, exact))
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    limit = 2 * float((plain - exact).abs().max() if exact.numel() else 0) + 4e-7 * scale + 1e-12
    assert (
        ours.shape == exact.shape
        and float((ours - exact).abs().max() if exact.numel() else 0) <= limit
    )


def rough(*shape: int, extreme: float = 90.0) -> torch.Tensor:
    """Smooth mask logits, with an empty mask, a full one and extreme values among them."""
    x = (
        F.interpolate(
            4 * torch.randn(1, int(np.prod(shape[:-2])), 4, 4), shape[-2:], mode="bicubic"
        )[0]
        .view(shape)
        .clone()
    )
    flat = x.view(-1, *shape[-2:])
    flat[0] = -extreme
    flat[-1] = extreme if len(flat) > 1 else flat[-1]
    return x


# --- matching cost and assignment


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("L", "B", "Q", "h", "w", "T", "C"),
    [
        (1, 1, 1, 1, 1, 1, 2),
        (2, 2, 7, 13, 11, 3, 5),
        (3, 2, 100, 17, 23, 17, 173),
        (1, 2, 131, 9, 9, 64, 70),
        (2, 1, 5, 40, 41, 0, 4),
    ],
)
def test_matching_cost(L, B, Q, h, w, T, C, dtype):
    torch.manual_seed(0)
    logits, masks = 5 * torch.randn(L, B, Q, C), rough(L, B, Q, h, w)
    labels = torch.randint(0, T + 1, (B, h, w))
    classes = torch.stack([torch.randperm(C)[:T] for _ in range(B)])
    logits, masks, labels, classes = on_device(logits.to(dtype), masks.to(dtype), labels, classes)
    masks = masks.transpose(-1, -2).contiguous().transpose(-1, -2)  # permuted strides
    ours = matching_cost.launch(logits, masks, labels.int(), classes, 20.0, 1.0)
    targets = Targets(labels, classes, torch.full((B,), T))
    with plain_pytorch():
        plain = matcher.matching_cost(logits, masks, targets, 20.0, 1.0)
        exact = matcher.matching_cost(logits.double(), masks.double(), targets, 20.0, 1.0)
    no_worse(ours, plain, exact)


def total(cost: torch.Tensor, matched: torch.Tensor, counts: list[int]) -> list[float]:
    """What each problem's assignment costs; it must be one."""
    sums = []
    for layer in range(len(cost)):
        for image, count in enumerate(counts):
            queries = matched[layer, image, :count].cpu()
            there = queries >= 0
            assert len(set(queries[there].tolist())) == there.sum() == min(count, cost.shape[2])
            assert (matched[layer, image, count:] == -1).all()
            sums.append(
                float(
                    cost[layer, image]
                    .cpu()[queries[there], torch.arange(count)[there]]
                    .double()
                    .sum()
                )
            )
    return sums


@pytest.mark.parametrize(
    ("kind", "Q", "T"),
    [
        ("random", 100, 20),
        ("tied", 30, 10),
        ("equal", 9, 9),
        ("random", 1, 1),
        ("random", 3, 12),
        ("related", 40, 25),
        ("random", 128, 64),
    ],
)
def test_assignment_is_minimal(kind, Q, T):
    torch.manual_seed(0)
    cost = torch.randn(2, 3, Q, T)
    if kind == "tied":
        cost = cost.round()
    elif kind == "equal":
        cost = torch.zeros_like(cost)
    elif kind == "related":
        cost = torch.rand(2, 3, Q, 1) + torch.rand(2, 3, 1, T) + 0.01 * cost
    counts = [T, (T + 1) // 2, 0]
    matched, bad = assignment.launch(*on_device(cost, torch.tensor(counts)))
    wanted, _ = hungarian(cost, torch.tensor(counts))
    assert not bad.any()
    assert total(cost, matched, counts) == pytest.approx(
        total(cost, wanted, counts), rel=1e-6, abs=1e-6
    )


def test_assignment_reports_what_is_not_finite():
    torch.manual_seed(0)
    cost = torch.randn(1, 5, 10, 5)
    cost[0, 0, 3, 2], cost[0, 1], cost[0, 2, :, 1], cost[0, 4, 0, 4] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        torch.nan,
    )
    counts = torch.tensor([5, 5, 5, 5, 4])  # the last one's lies in the padding
    for function in (assignment.launch, hungarian):
        matched, bad = function(*on_device(cost, counts))
        assert bad.tolist() == [[True, True, True, False, False]]
        assert all(len(set(row.tolist())) == 5 for row in matched[0, :4]) and matched[0, 0, 2] != 3


# --- mask loss


@pytest.mark.parametrize(
    ("L", "B", "Q", "h", "w", "T", "R"),
    [
        (1, 1, 1, 1, 1, 1, 4),
        (2, 2, 7, 13, 11, 3, 4),
        (1, 2, 9, 17, 20, 5, 2),
        (1, 1, 3, 5, 3, 2, 8),
        (1, 2, 4, 6, 6, 0, 4),
    ],
)
def test_mask_loss_and_its_gradient(L, B, Q, h, w, T, R):
    torch.manual_seed(0)
    masks = rough(L, B, Q, h, w)
    labels = torch.randint(0, T + 1, (B, R * h, R * w)).to(torch.uint8)
    classes = torch.stack([torch.randperm(max(T, 1))[:T] for _ in range(B)])
    matched = torch.stack(
        [torch.stack([torch.randperm(Q)[:T] for _ in range(B)]) for _ in range(L)]
    )
    if T > 1:
        matched[0, 0, 0] = -1
    grads = torch.randn(2, L, B, T)
    masks, labels, classes, matched, grads = on_device(masks, labels, classes, matched, grads)
    focal, dice, sums = mask_loss.launch_forward(masks, matched, labels, classes)
    grad = mask_loss.launch_backward(*grads, sums, masks, matched, labels, classes)
    results = []
    for kind in (torch.float32, torch.float64):
        x = masks.to(kind).requires_grad_()
        losses = torch.stack(focal_and_dice(x, matched, labels, classes))
        results.append(
            (
                losses,
                torch.autograd.grad((losses * grads).sum(), x)[0] if T else torch.zeros_like(x),
            )
        )
    (plain, plain_grad), (exact, exact_grad) = results
    no_worse(focal, plain[0], exact[0])
    no_worse(dice, plain[1], exact[1])
    no_worse(grad, plain_grad, exact_grad)


def test_mask_loss_takes_label_maps_of_a_multiple_of_the_logits_size():
    assert mask_loss.fits(torch.zeros(1, 1, 1, 8, 6), torch.zeros(1, 32, 24))
    for size in ((33, 24), (32, 48), (8, 6), (24, 18)):
        assert not mask_loss.fits(torch.zeros(1, 1, 1, 8, 6), torch.zeros(1, *size))


def test_mask_loss_s_gradient_is_a_gradient():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    labels, classes = torch.randint(0, 3, (2, 12, 8)), torch.tensor([[0, 1], [2, 0]])
    matched = torch.tensor([[[2, 0], [1, -1]]])
    assert torch.autograd.gradcheck(lambda x: focal_and_dice(x, matched, labels, classes), x)


# --- mask pooling


@pytest.mark.parametrize("threshold", [-1.0, 0.4])
@pytest.mark.parametrize(
    ("B", "Q", "D", "h", "w"),
    [(1, 1, 1, 1, 1), (2, 7, 13, 11, 9), (1, 131, 173, 7, 29), (1, 20, 64, 40, 33)],
)
def test_mask_pool_and_its_gradients(B, Q, D, h, w, threshold):
    torch.manual_seed(0)
    features, masks = on_device(torch.randn(B, D, h, w), rough(B, Q, h, w, extreme=30.0))
    pooled, weight = mask_pool.launch_forward(features, masks, threshold)
    grad = torch.randn_like(pooled)
    of_features, of_masks = mask_pool.launch_backward(
        grad, pooled, weight, features, masks, threshold
    )
    results = []
    for kind in (torch.float32, torch.float64):
        f, m = features.to(kind).requires_grad_(), masks.to(kind).requires_grad_()
        out = pool(f, m, threshold)
        gradients = torch.autograd.grad(out, (f, m), grad.to(kind), allow_unused=True)
        results.append(
            (out, gradients[0], torch.zeros_like(m) if gradients[1] is None else gradients[1])
        )
    for ours, plain, exact in zip((pooled, of_features, of_masks), *results, strict=True):
        no_worse(ours, plain, exact)
    if threshold > 0:
        assert (pooled[0, 0] == 0).all()  # nothing is above the threshold


def pool(features: torch.Tensor, masks: torch.Tensor, threshold: float) -> torch.Tensor:
    """Mean features under masks, soft or thresholded: the definition."""
    weights = (
        masks.sigmoid()
        if threshold < 0
        else (masks > np.log(threshold / (1 - threshold))).to(masks.dtype)
    )
    weights = weights.flatten(2)
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bqn,bdn->bqd", weights, features.flatten(2)) / total.where(total > 0, 1)


def test_mask_pool_is_a_mean():
    features, masks = torch.randn(1, 3, 4, 5), torch.full((1, 2, 4, 5), -9.0)
    masks[0, 0, 1, 2] = 9.0
    pooled, _ = mask_pool.launch_forward(*on_device(features, masks), 0.5)
    assert torch.equal(pooled[0, 0].cpu(), features[0, :, 1, 2]) and (pooled[0, 1] == 0).all()


# --- regions and label map


@pytest.mark.parametrize(
    ("Q", "h", "w", "size", "side", "threshold"),
    [
        (2, 8, 8, (1, 1), 7, 0.5),
        (5, 8, 8, (30, 31), 32, 0.5),
        (3, 8, 16, (32, 64), 24, 0.3),
        (1, 16, 24, (61, 93), 31, 0.4),
        (4, 8, 8, (29, 32), 8, 1.0),
    ],
)
def test_region_masks_boxes_and_crops(Q, h, w, size, side, threshold):
    torch.manual_seed(0)
    mean, std = list(clip.MEAN), list(clip.STD)
    logits, image = on_device(rough(Q, h, w), torch.randint(0, 256, (3, *size), dtype=torch.uint8))
    masks, boxes, valid = region_crop.launch_masks(logits, size, threshold)
    with plain_pytorch():
        wanted = regions.region_masks(logits, size, threshold)
    assert [t.tolist() for t in (masks, boxes, valid)] == [t.tolist() for t in wanted]
    index = torch.arange(Q, device=DEVICE).flip(0)
    ours = region_crop.launch_crops(image, masks, index, boxes, mean, std, side, torch.float32)
    with plain_pytorch():
        plain, exact = (
            regions.region_crops(x, masks, boxes, side, index) for x in (image, image.double())
        )
    no_worse(ours, plain, exact)
    assert (ours[~valid[index]] == 0).all()


@pytest.mark.parametrize(
    ("Q", "h", "w", "C", "cut", "size"),
    [
        (1, 8, 8, 1, (1, 1), (1, 1)),
        (7, 8, 8, 5, (30, 31), (45, 77)),
        (20, 8, 16, 131, (31, 64), (31, 64)),
        (131, 8, 8, 33, (32, 32), (17, 50)),
    ],
)
def test_semantic_map(Q, h, w, C, cut, size):
    torch.manual_seed(0)
    logits, classes = on_device(rough(Q, h, w), torch.rand(Q, C) ** 4)
    labels, top, scores = semantic_map.launch(logits, classes, cut, size, True)
    assert torch.equal(top, scores.amax(0))
    plain, exact = (
        class_scores(mask_probabilities(x, cut), y, size)
        for x, y in ((logits, classes), (logits.double(), classes.double()))
    )
    apart = (scores.double() - exact).abs().max() / exact.abs().max()
    assert apart < max(
        2 * float((plain.double() - exact).abs().max() / exact.abs().max()), 3e-6 if Q > 1 else 3e-5
    )
    top = exact.gather(0, labels[None])[0]
    assert ((exact.amax(0) - top) <= 2e-5 * exact.amax(0)).all()  # the best class, up to rounding
    again, _, nothing = semantic_map.launch(logits, classes, cut, size)
    assert torch.equal(again, labels) and nothing.numel() == 0


def test_equal_scores_give_the_first_class():
    logits, classes = on_device(torch.zeros(2, 8, 8), torch.full((2, 40), 0.5))
    labels, *_ = semantic_map.launch(logits, classes, (32, 32), (9, 9))
    assert (labels == 0).all()


# --- operators and compilation


def operator_calls() -> list[tuple]:
    torch.manual_seed(0)
    masks, labels, classes = (
        torch.randn(2, 2, 5, 4, 3),
        torch.randint(0, 3, (2, 16, 12)),
        torch.tensor([[0, 1], [2, 0]]),
    )
    matched = torch.tensor([[[2, 0], [1, -1]]]).expand(2, -1, -1).contiguous()
    image, logits = torch.randint(0, 256, (3, 16, 12), dtype=torch.uint8), torch.randn(5, 4, 3)
    crop = (
        torch.ones(5, 16, 12, dtype=torch.uint8),
        torch.tensor([3, 1]),
        torch.tensor([[0, 0, 12, 16]] * 5),
    )
    calls = [
        (
            matching_cost.matching_cost,
            torch.randn(2, 2, 5, 7),
            masks,
            labels[:, ::4, ::4],
            classes,
            20.0,
            1.0,
        ),
        (assignment.assignment, torch.randn(2, 2, 5, 3), torch.tensor([3, 1])),
        (mask_loss.mask_loss_op, masks.clone().requires_grad_(), matched, labels, classes),
        (
            mask_pool.mask_pool_op,
            *(torch.randn(2, n, 4, 3, requires_grad=True) for n in (6, 5)),
            -1.0,
        ),
        (region_crop.region_masks, logits, [15, 11], 0.5),
        (region_crop.region_crop, image, *crop, [0.5] * 3, [0.2] * 3, 8, torch.float32),
        (semantic_map.semantic_map, logits, torch.rand(5, 6), [15, 11], [20, 10], True),
    ]
    return [
        (op, *(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in arguments))
        for op, *arguments in calls
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(7))
def test_operators_are_well_formed(number):
    op, *arguments = operator_calls()[number]
    torch.library.opcheck(op, tuple(arguments))


@pytest.mark.gpu
def test_the_program_gives_the_same_with_kernels_and_without():
    """Through the functions of zsseg/, which hand CUDA tensors to the kernels."""
    torch.manual_seed(0)
    class_logits, masks = torch.randn(2, 2, 20, 7, device="cuda"), rough(2, 2, 20, 16, 12).cuda()
    labels, image = (
        torch.randint(0, 6, (2, 64, 48), device="cuda"),
        torch.randint(0, 256, (3, 62, 45), device="cuda"),
    )
    targets = Targets(
        labels, torch.arange(6, device="cuda").expand(2, 6), torch.tensor([6, 4], device="cuda")
    )
    logits, one = masks[0, 0].contiguous(), torch.ones(2, device="cuda")

    def results() -> list[torch.Tensor]:
        cost = matcher.matching_cost(class_logits, masks, targets, 20.0, 1.0)
        matched, bad = matcher.assign(cost, targets.counts)
        found = [*regions.region_masks(logits, (62, 45), 0.5)]
        crops = regions.region_crops(image.to(torch.uint8), *found[:2], 32)
        return [
            cost,
            matched,
            bad,
            *losses.mask_losses(masks, matched, targets, one[0]),
            *found,
            crops,
        ]

    ours = results()
    with plain_pytorch():
        plain = results()
    for a, b in zip(ours, plain, strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-4)


def test_fake_results_have_the_shapes_of_real_ones():
    """What torch.compile plans with, on CUDA tensors without values."""
    with FakeTensorMode() as mode:
        for op, *arguments in operator_calls():
            values = [
                mode.from_tensor(a).cuda() if isinstance(a, torch.Tensor) else a for a in arguments
            ]
            found = op(*values)
            assert all(t.is_cuda for t in (found if isinstance(found, tuple) else (found,)))


def test_kernels_can_be_switched_off(shapes_root, tmp_path):
    """`model.kernels` decides for the whole process, once, at the start of a command; a segmenter
    that is built does not.
    """
    try:
        for on in (False, True):
            Switch.on = not on
            Segmenter(tiny_config(f"model.kernels={str(on).lower()}"), tiny_clip_state())
            assert Switch.on is not on
            settings = ("train.steps=1", "train.eval_every=0", "eval.compare=false")
            config = tiny_config(f"model.kernels={str(on).lower()}", *settings)
            train.train(config, shapes_root, tmp_path / str(on), PROCESS, {})
            assert Switch.on is on
            Switch.on = not on
            evaluation.main(
                [str(tmp_path / str(on) / "last.pt"), "--root", str(shapes_root), "--device", "cpu"]
            )
            assert Switch.on is on
    finally:
        Switch.on = True


def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    """On small sizes; one row for every kernel and provider, with machine and versions."""
    monkeypatch.setattr(
        sys, "argv", ["bench", "--device", "cpu", "--csv", str(tmp_path / "bench.csv")]
    )
    bench.main()
    with open(tmp_path / "bench.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["provider"] for row in rows} == {"plain", "ours"} and len(rows) == 14
    assert all(
        float(row["median_ms"]) > 0 and row["torch"] == torch.__version__ and row["device"] == "CPU"
        for row in rows
    )
    assert "failed" not in capsys.readouterr().err


SPILLED = 32  # bytes a thread at most


@pytest.mark.slow
def test_no_kernel_loses_its_speed_to_spills():
    """For sm_80 and sm_90, without a GPU; shared memory within the architecture's.

    A loop that keeps its tiles in local memory instead of registers (hundreds of bytes a thread) is
    several times slower. How registers are dealt out differs between versions of Triton and ptxas:
    a few values that wait outside the loop cost nothing.
    """
    from kernels.compile_check import ARCHITECTURES, KERNELS, SHARED

    result = subprocess.run(
        [sys.executable, "-m", "kernels.compile_check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )
    assert result.returncode == 0, result.stderr
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert [(name, arch) for name, arch, _ in lines] == [
        (k, f"sm_{a}") for k in KERNELS for a in ARCHITECTURES
    ]
    for name, architecture, text in lines:
        found = json.loads(text)
        assert found["spilled"] <= SPILLED, (name, architecture, found)
        assert found["shared"] <= SHARED[int(architecture[3:])], (name, architecture, found)
