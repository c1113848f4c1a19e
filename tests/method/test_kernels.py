"""The kernels against the plain PyTorch of zsseg/ with fp64 as judge: in Triton's interpreter
without a GPU, on the GPU where there is one. The launchers are called themselves: the operators are
for CUDA tensors.
"""

import contextlib
import csv
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PROCESS, ROOT, tiny_clip_state, tiny_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import eval as evaluation
import train
from kernels import (
    assignment,
    gpu_check,
    mask_loss,
    mask_pool,
    matching_cost,
    region_crop,
    semantic_map,
)
from kernels.jit import Switch
from tests.benchmarks import kernels as bench
from tests.benchmarks import ladder
from zsseg import clip, losses, matcher, regions
from zsseg.losses import focal_and_dice
from zsseg.matcher import Targets, hungarian
from zsseg.regions import mask_probabilities
from zsseg.segmenter import Segmenter, class_scores

pytest.importorskip("triton")
from tests.benchmarks import compile_check
from tests.benchmarks.compile_check import recorded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
    that is exact), and a step of its own type where that is shorter.
    """
    half = torch.finfo(ours.dtype) if ours.dtype in (torch.float16, torch.bfloat16) else None
    step = half.eps * exact.abs().clamp(min=half.smallest_normal) if half else exact.abs() * 0
    ours, plain, exact, step = (t.detach().double().cpu() for t in (ours, plain, exact, step))
    assert ours.shape == exact.shape
    if exact.numel():
        limit = 2 * float((plain - exact).abs().max()) + 4e-7 * float(exact.abs().max()) + 1e-12
        assert float(((ours - exact).abs() - step).max()) <= limit


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


def permuted(masks: torch.Tensor) -> torch.Tensor:
    """As the network's product leaves them: [B, L, Q, h, w] in memory."""
    return masks.transpose(0, 1).contiguous().transpose(0, 1)


def in_all_types(cases: list[tuple]) -> list[tuple]:
    """All in fp32, the last one in fp16 and bf16, too."""
    halves = [(*cases[-1], dtype) for dtype in (torch.float16, torch.bfloat16)]
    return [*((*case, torch.float32) for case in cases), *halves]


COSTS = [
    (1, 1, 1, 1, 1, 1, 2),
    (3, 2, 100, 17, 23, 17, 173),
    (1, 2, 131, 9, 9, 64, 70),
    (2, 1, 5, 40, 41, 0, 4),
    (1, 1, 256, 9, 16, 5, 1024),
    (2, 2, 7, 13, 11, 3, 5),
]


@pytest.mark.parametrize(("L", "B", "Q", "h", "w", "T", "C", "dtype"), in_all_types(COSTS))
def test_matching_cost(L, B, Q, h, w, T, C, dtype):
    torch.manual_seed(0)
    logits, masks = 5 * torch.randn(L, B, Q, C), rough(L, B, Q, h, w)
    labels = torch.randint(0, T + 1, (B, h, w))
    classes = torch.stack([torch.randperm(C)[:T] for _ in range(B)])
    logits, masks, labels, classes = on_device(logits.to(dtype), masks.to(dtype), labels, classes)
    masks = permuted(masks)
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
    aside = cost.transpose(2, 3).contiguous().transpose(2, 3)  # as matching_cost leaves it
    matched, bad = assignment.launch(*on_device(aside, torch.tensor(counts)))
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


LOSSES = [
    (1, 1, 1, 1, 1, 1, 4),
    (1, 1, 2, 14, 29, 2, 4),
    (1, 1, 256, 3, 5, 2, 4),
    (1, 2, 9, 17, 20, 5, 2),
    (1, 1, 3, 5, 3, 2, 8),
    (1, 2, 4, 6, 6, 0, 4),
    (2, 2, 7, 13, 11, 3, 4),
]


@pytest.mark.parametrize(("L", "B", "Q", "h", "w", "T", "R", "dtype"), in_all_types(LOSSES))
def test_mask_loss_and_its_gradient(L, B, Q, h, w, T, R, dtype):
    torch.manual_seed(0)
    masks = permuted(rough(L, B, Q, h, w).to(dtype))
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
    assert grad.dtype == dtype and grad.stride() == masks.stride()
    results = []
    for kind in (torch.float32, torch.float64):
        x = masks.to(kind).clone().requires_grad_()
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


def test_the_gradient_of_a_part_of_the_layers():
    """Masks whose memory has gaps: the gradient has strides of its own."""
    torch.manual_seed(0)
    whole = permuted(torch.randn(3, 2, 4, 9, 7))
    labels, classes = torch.randint(0, 3, (2, 36, 28)), torch.tensor([[0, 1], [2, 0]])
    matched = torch.tensor([[[2, 0], [1, 3]]])
    masks, matched, labels, classes = on_device(whole[1:2], matched, labels, classes)
    ones = torch.ones(1, 2, 2, device=DEVICE)
    _, _, sums = mask_loss.launch_forward(masks, matched, labels, classes)
    grad = mask_loss.launch_backward(ones, ones, sums, masks, matched, labels, classes)
    x = masks.clone().requires_grad_()
    sum(loss.sum() for loss in focal_and_dice(x, matched, labels, classes)).backward()
    assert torch.allclose(grad, x.grad, atol=1e-7)


@pytest.mark.gpu
def test_more_pairs_than_a_grid_s_second_axis_takes():
    torch.manual_seed(0)
    L, B, Q, T = 6, 64, 256, 255
    masks = torch.randn(L, B, Q, 2, 2, device="cuda", requires_grad=True)
    labels = torch.randint(0, T, (B, 8, 8), device="cuda")
    classes = torch.arange(T, device="cuda").expand(B, T)
    matched = torch.rand(L, B, Q, device="cuda").argsort(-1)[..., :T].contiguous()
    results = []
    for function in (mask_loss.mask_loss, focal_and_dice):
        losses = function(masks, matched, labels, classes)
        results.append((*losses, *torch.autograd.grad(sum(x.sum() for x in losses), masks)))
    for ours, plain in zip(*results, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-6)


def test_mask_loss_takes_label_maps_of_a_multiple_of_the_logits_size():
    assert mask_loss.is_supported(torch.zeros(1, 1, 1, 8, 6), torch.zeros(1, 32, 24))
    for size in ((33, 24), (32, 48), (8, 6), (24, 18)):
        assert not mask_loss.is_supported(torch.zeros(1, 1, 1, 8, 6), torch.zeros(1, *size))


def test_mask_loss_s_gradient_is_a_gradient():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    labels, classes = torch.randint(0, 3, (2, 12, 8)), torch.tensor([[0, 1], [2, 0]])
    matched = torch.tensor([[[2, 0], [1, -1]]])
    assert torch.autograd.gradcheck(lambda x: focal_and_dice(x, matched, labels, classes), x)


# --- mask pooling


@pytest.mark.parametrize("threshold", [0.5, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("Q", "D", "grid", "h", "w", "size"),
    [
        (1, 1, (1, 1), 8, 8, (1, 1)),
        (7, 13, (3, 5), 8, 8, (30, 31)),
        (20, 70, (5, 35), 8, 16, (29, 64)),
        (3, 64, (9, 9), 8, 8, (7, 32)),
        (256, 8, (2, 2), 2, 2, (8, 8)),
    ],
)
def test_mask_pool(Q, D, grid, h, w, size, dtype, threshold):
    """More cells than pixels among the cases, and cells of uneven size."""
    torch.manual_seed(0)
    features, logits = on_device(torch.randn(*grid, D).to(dtype), rough(Q, h, w))
    pooled, valid = mask_pool.launch(features, logits, size, threshold)
    with plain_pytorch():
        masks = regions.region_masks(logits, size, threshold)[0]
        plain, exact = (regions.pool_features(x, masks)[0] for x in (features, features.double()))
        assert torch.equal(valid, masks.flatten(1).any(1))
        assert torch.equal(plain, regions.mask_pool(features, logits, size, threshold)[0])
    no_worse(pooled, plain, exact)
    assert not valid[0] and (pooled[0] == 0).all()


def test_mask_pool_is_a_mean():
    """Of the features of the cells that a mask covers, as far as it covers them."""
    features, logits = torch.randn(4, 5, 3), torch.full((2, 8, 10), -9.0)
    logits[0, 2:4, 4:6], logits[1, 0, 0], logits[1, :2, 2:4] = 9.0, 0.0, 9.0
    pooled, valid = mask_pool.launch(*on_device(features, logits), (32, 40), 0.5)
    assert valid.all() and torch.allclose(pooled[0].cpu(), features[1, 2], atol=1e-6)
    masks = torch.zeros(1, 32, 40)
    masks[0, 8:16, 12:24] = 1  # a cell, and half of its neighbour
    pooled, _ = regions.pool_features(features, masks)
    assert torch.allclose(pooled[0], (2 * features[1, 2] + features[1, 1]) / 3, atol=1e-6)


def test_the_segmenter_pools_straight_from_the_mask_logits():
    """The same as from its binary masks; an empty one leaves the head's classes alone."""
    segmenter = Segmenter(tiny_config("clip.regions=pool"), tiny_clip_state()).to(DEVICE).eval()
    segmenter.set_classes(["star", "tree", "brick"], [0, 1])
    torch.manual_seed(0)
    (image,) = on_device(torch.randint(0, 256, (3, 45, 61), dtype=torch.uint8))
    segmenter.config.mask_threshold = 0.0
    whole = segmenter.propose(image)
    segmenter.config.mask_threshold = float(whole.mask_logits.sigmoid().median())
    proposals = segmenter.propose(image)
    masks = segmenter.binary_masks(proposals)
    valid = masks.flatten(1).any(1)
    assert (
        torch.equal(proposals.valid, valid) and valid.any() and not whole.mask_logits.isnan().any()
    )
    wanted = segmenter.region_logits(image, masks[valid], None).softmax(-1)
    assert torch.allclose(proposals.clip_probs[valid], wanted, atol=1e-4)
    segmenter.config.mask_threshold = 1.0
    nothing = segmenter.propose(image)
    assert not nothing.valid.any() and (nothing.clip_probs == 1).all()


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
        (256, 8, 8, 40, (32, 32), (5, 7)),
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
        (mask_pool.mask_pool, torch.randn(2, 3, 6), logits, [15, 11], 0.5),
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
    assert {row["provider"] for row in rows} == {"plain", "ours"} and len(rows) == 16
    assert all(
        float(row["median_ms"]) > 0 and row["torch"] == torch.__version__ and row["device"] == "CPU"
        for row in rows
    )
    assert "failed" not in capsys.readouterr().err


def test_the_benchmark_compares_like_with_like():
    """Kernel and plain version take the benchmark's inputs and give results of the same shapes, on
    CUDA tensors without values.
    """
    with FakeTensorMode():
        found = bench.cases("cuda", compile_check.Sizes(**bench.SMALL))
        assert {part for *_, parts in found.values() for part in parts} == set(
            compile_check.work(compile_check.Sizes())
        )
        for name in found.keys() - {"mask_loss, both ways", "region_crop", "assignment"}:
            plain, ours, _ = found[name]
            with plain_pytorch():
                plain, ours = (x if isinstance(x, tuple) else (x,) for x in (plain(), ours()))
            assert all(
                a.shape == b.shape and a.is_cuda for a, b in zip(ours, plain, strict=False)
            ), name
        for name in ("region_crop", "assignment"):  # the plain versions read boxes and costs
            assert found[name][1]() is not None


def test_the_summary_of_a_gpu_says_what_to_keep(tmp_path):
    """From tables as the benchmarks write them, of which the last kernel and part are missing."""
    head = "kernel,provider,median_ms,h100_floor_ms,difference"
    rows = [
        "mask_loss,plain,9,0.1,0",
        "mask_loss,torch.compile,3,0.1,0",
        "mask_loss,ours,1.5,0.3,1e-5",
        "mask_pool,torch.compile,1,0.1,0",
        "mask_pool,ours,2,0.1,1e-5",
        "assignment,plain,4,0.1,0",
        "assignment,ours,1,0.1,0.5",
        "region_crop,plain,4,0.1,0",
    ]
    (tmp_path / "bench.csv").write_text("\n".join([head, *rows]) + "\n")
    head = "part,row,per_second,peak_MiB"
    rows = ["inference,plain,5,800", "inference,compile,100,400", "inference,baseline,40,700"]
    (tmp_path / "ladder.csv").write_text("\n".join([head, *rows]) + "\n")
    loss, pooling, assigning, crop, inference, training = gpu_check.summary(tmp_path)
    assert "agrees" in loss and "2.00 x as fast as torch.compile" in loss and "20%" in loss
    assert loss.endswith("keep") and pooling.endswith("drop") and assigning.endswith("mend")
    assert "not measured" in crop and "not measured" in training
    assert "100.0 images/s" in inference and "20.00 x eager" in inference
    assert "2.50 x bf16 and torch.compile alone (700 MiB)" in inference
    assert all("not measured" in line for line in gpu_check.summary(tmp_path / "nothing"))


def test_the_gpu_check_fits_into_nine_minutes_and_runs_what_is_there():
    assert sum(limit + 10 for limit, _ in gpu_check.STEPS.values()) <= 9 * 60
    for _, words in gpu_check.STEPS.values():
        for word in words.split():
            if word.startswith("tests"):
                file = word if word.endswith(".py") else word.replace(".", "/") + ".py"
                assert (ROOT / file).is_file(), word
    for row in gpu_check.LADDER:
        part, name = row.split(":")
        names = {"inference": ladder.INFERENCE, "training": ladder.TRAINING}[part]
        assert name in (*names, "baseline") and name in ladder.WHAT


# --- what the launchers launch, without a GPU


def everything(sizes: compile_check.Sizes) -> list[compile_check.Launch]:
    return [launch for call in compile_check.calls(sizes).values() for launch in recorded(call)]


def test_every_kernel_has_a_name_of_its_own_and_says_what_it_does():
    kernels = {launch.kernel for launch in everything(compile_check.Sizes())}
    assert len({k.__name__ for k in kernels}) == len(kernels) == 9
    for kernel in kernels:
        assert re.fullmatch("[a-z_]+_kernel", kernel.__name__)
        assert "The block owns" in kernel.fn.__doc__ and "=" in kernel.fn.__doc__


def test_grids_stay_within_a_gpu_s_limits():
    """2^31 - 1 blocks on the first axis, 65,535 on the others."""
    sizes = compile_check.Sizes(L=6, B=64, Q=512, T=255, C=1023)
    for launch in everything(sizes):
        first, *others = launch.grid
        assert first < 2**31 and max(others, default=0) <= 65_535, launch.kernel.__name__


class Allocations(TorchDispatchMode):
    """Bytes of every tensor that an operator makes, views left out."""

    def __init__(self):
        super().__init__()
        self.seen: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        known = {t.untyped_storage()._cdata for t in given}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in known:
                self.seen[t.untyped_storage()._cdata] = t.untyped_storage()
        return out

    def sizes(self) -> list[int]:
        return sorted((storage.nbytes() for storage in self.seen.values()), reverse=True)


def test_no_buffer_of_the_loss_is_larger_than_the_mask_logits():
    """From shapes alone: batch 32, 640 x 640, up to 31 targets an image, bf16. The logits take 938
    MiB; the only other buffer that comes near is their gradient.
    """
    sizes = compile_check.Sizes(B=32, T=31)
    L, B, Q, h, w = sizes.L, sizes.B, sizes.Q, sizes.h, sizes.w
    logits = 2 * L * B * Q * h * w
    calls = compile_check.calls(sizes)
    for name in ("matching_cost", "assignment", "mask_loss", "mask_loss, backward"):
        with Allocations() as allocations:
            recorded(calls[name])
        found = allocations.sizes()
        if name == "mask_loss, backward":
            assert found.pop(0) == logits  # the gradient
        assert sum(found) < logits / 20, (name, found[:3])  # and nothing is copied
    with FakeTensorMode(), torch.device("cuda"):
        network = torch.empty(B, L, Q, h, w, dtype=torch.bfloat16, requires_grad=True)
        masks = network.transpose(0, 1)
        class_logits = torch.empty(L, B, Q, 172, requires_grad=True)
        labels = torch.zeros(B, 4 * h, 4 * w, dtype=torch.uint8)
        classes = torch.zeros(B, 31, dtype=torch.int64)
        targets = Targets(labels, classes, torch.zeros(B, dtype=torch.int64))
        with Allocations() as allocations:
            losses.segmentation_losses(class_logits, masks, targets, torch.ones(2), 20.0, 1.0, 0.1)
    assert sum(allocations.sizes()) < logits / 2, allocations.sizes()[:4]


def compile_table() -> list[dict[str, str]]:
    result = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.compile_check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )
    assert result.returncode == 0, result.stderr
    return list(csv.DictReader(result.stdout.split("\n\n")[0].splitlines(), delimiter="\t"))


PIPELINED = ("matching_cost_sums", "semantic_map_argmax", "mask_pool_sums")
SPILLED = 32  # bytes a thread at most


@pytest.mark.slow
def test_kernels_are_pipelined_and_do_not_spill():
    """For sm_80 and sm_90, without a GPU; at the sizes of COCO.

    A loop that keeps its tiles in local memory instead of registers (hundreds of bytes a thread) is
    several times slower, and so is one that waits for every tile. How registers are dealt out
    differs between versions of Triton and ptxas: a few values that wait outside the loop cost
    nothing.
    """
    rows = compile_table()
    assert len(rows) == 2 * 9
    for row in rows:
        name, found = row.pop("kernel"), {k: int(v) for k, v in row.items()}
        assert found["spilled"] <= SPILLED, (name, found)
        assert found["shared"] <= compile_check.BLOCK_SHARED[found["sm"]], (name, found)
        assert found["warps"] >= 12, (name, found)
        assert found["copies"] + found["tma"] > 0 or not name.startswith(PIPELINED), (name, found)


EXTREMES = {
    "larger": {"Q": 256, "C": 1023},
    "fp32": {"dtype": torch.float32},
    "unaligned": {"h": 152, "w": 200, "Q": 99, "T": 15, "C": 150, "D": 513},  # all are padded to 8
    "ones": {"L": 1, "B": 1, "Q": 1, "T": 1, "C": 1, "h": 1, "w": 1, "D": 1, "grid": 1, "side": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("extreme", EXTREMES)
def test_kernels_compile_at_the_extremes(extreme):
    """Triton compiles anew for numbers that are 1 or multiples of 16, and for every type. Of those
    that say little about registers, sm_90 is enough.
    """
    program = (
        "import torch; from tests.benchmarks.compile_check import *\n"
        f"sizes = Sizes(**{EXTREMES[extreme]})\n"
        "for call in calls(sizes).values():\n"
        "    for launch in recorded(call):\n"
        "        for sm in (80, 90)[1 if sizes.Q < 200 else 0:]:\n"
        "            found = compiled(launch, sm)\n"
        "            print(launch.kernel.__name__, sm, found['spilled'], found['shared'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) == (2 if extreme == "larger" else 1) * 9
    for name, sm, spilled, shared in lines:
        assert int(spilled) <= SPILLED, (name, sm, spilled)
        assert int(shared) <= compile_check.BLOCK_SHARED[int(sm)], (name, sm, shared)


def test_residency_follows_from_registers_and_shared_memory():
    """Numbers that NVIDIA's occupancy calculator gives."""
    for registers, shared, warps, wanted in (
        (32, 0, 8, 64),
        (128, 0, 8, 16),
        (129, 0, 8, 8),
        (255, 0, 4, 8),
        (64, 48 * 1024, 4, 12),
    ):
        assert compile_check.resident_warps(registers, shared, warps, 80) == wanted
