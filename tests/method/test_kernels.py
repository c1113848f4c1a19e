"""The kernels against the plain PyTorch of zsseg/ with fp64 as judge: in Triton's interpreter
without a GPU, on the GPU if there is one. The launchers are called themselves: the operators are
for CUDA tensors.
"""

import csv
import random
import runpy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, process
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from kernels import assignment, jit, mask_loss, mask_pool, matching_cost, region_crop, semantic_map
from zsseg import losses, matcher, regions
from zsseg.losses import focal_and_dice
from zsseg.matcher import Targets, hungarian
from zsseg.regions import Regions, mask_probabilities

pytest.importorskip("triton")
from tests.benchmarks import compile_check
from tests.benchmarks.compile_check import recorded
from tests.benchmarks.fake_gpu import Watch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRAIN = SimpleNamespace(focal_weight=20.0, dice_weight=1.0, no_object_weight=0.1)


@pytest.fixture
def plain(monkeypatch):
    """CUDA tensors go to plain PyTorch, too, after `plain()`."""
    return lambda: monkeypatch.setattr(jit, "ENABLED", False)


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
    *planes, h, w = shape
    x = 4 * torch.randn(1, torch.Size(planes).numel(), 4, 4)
    flat = F.interpolate(x, (h, w), mode="bicubic")[0]
    flat[0] = -extreme
    if len(flat) > 1:
        flat[-1] = extreme
    return flat.view(shape)


def permuted(masks: torch.Tensor) -> torch.Tensor:
    """As the network's product leaves them: [B, L, Q, h, w] in memory."""
    return masks.transpose(0, 1).contiguous().transpose(0, 1)


def in_all_types(cases: list[tuple]) -> list[tuple]:
    """All in fp32, the last one in fp16 and bf16, too."""
    halves = [(*cases[-1], dtype) for dtype in (torch.float16, torch.bfloat16)]
    return [*((*case, torch.float32) for case in cases), *halves]


# --- matching cost and assignment

COSTS = [(1, 1, 1, 1, 1, 1, 2), (3, 2, 100, 17, 23, 17, 173), (1, 2, 131, 9, 9, 64, 70)]
COSTS += [(2, 1, 5, 40, 41, 0, 4), (1, 1, 256, 9, 16, 5, 1024), (2, 2, 7, 13, 11, 3, 5)]


def matching_costs(L, B, Q, h, w, T, C, dtype, plain) -> tuple[torch.Tensor, ...]:
    """Ours, the fp32 reference, and the exact one."""
    torch.manual_seed(0)
    logits, masks = 5 * torch.randn(L, B, Q, C), rough(L, B, Q, h, w)
    labels = torch.randint(0, T + 1, (B, h, w))
    classes = torch.stack([torch.randperm(C)[:T] for _ in range(B)])
    logits, masks, labels, classes = on_device(logits.to(dtype), masks.to(dtype), labels, classes)
    masks = permuted(masks)
    ours = matching_cost.launch(logits, masks, labels.int(), classes, 20.0, 1.0)
    targets = Targets(labels, classes, torch.full((B,), T))
    plain()
    reference = matcher.matching_cost(logits, masks, targets, 20.0, 1.0)
    exact = matcher.matching_cost(logits.double(), masks.double(), targets, 20.0, 1.0)
    return ours, reference, exact


@pytest.mark.parametrize("case", in_all_types(COSTS))
def test_matching_cost(case, plain):
    no_worse(*matching_costs(*case, plain))


def total(cost: torch.Tensor, matched: torch.Tensor, counts: list[int]) -> list[float]:
    """The cost of each problem's assignment; asserts that it is one."""
    sums = []
    for layer in range(len(cost)):
        for image, count in enumerate(counts):
            query = matched[layer, image, :count].cpu()
            target = torch.arange(count)[query >= 0]
            query = query[query >= 0]
            assert len(set(query.tolist())) == len(query) == min(count, cost.shape[2])
            assert (matched[layer, image, count:] == -1).all()
            sums.append(float(cost[layer, image].cpu()[query, target].double().sum()))
    return sums


PROBLEMS = [("random", 100, 20), ("tied", 30, 10), ("equal", 9, 9), ("random", 1, 1)]
PROBLEMS += [("random", 3, 12), ("related", 24, 15), ("random", 20, 128)]


@pytest.mark.parametrize(("kind", "Q", "T"), PROBLEMS)
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
    expected, _ = hungarian(cost, torch.tensor(counts))
    assert not bad.any()
    best = pytest.approx(total(cost, expected, counts), rel=1e-6, abs=1e-6)
    assert total(cost, matched, counts) == best


def test_assignment_reports_costs_that_are_not_finite():
    torch.manual_seed(0)
    cost = torch.randn(1, 5, 10, 5)
    cost[0, 0, 3, 2] = torch.nan
    cost[0, 1] = torch.inf
    cost[0, 2, :, 1] = -torch.inf
    cost[0, 4, 0, 4] = torch.nan
    counts = torch.tensor([5, 5, 5, 5, 4])  # the last one's lies in the padding
    for function in (assignment.launch, hungarian):
        matched, bad = function(*on_device(cost, counts))
        assert bad.tolist() == [[True, True, True, False, False]]
        assert all(len(set(row.tolist())) == 5 for row in matched[0, :4]) and matched[0, 0, 2] != 3


# --- mask loss

LOSSES = [(1, 1, 1, 1, 1, 1, 4), (1, 1, 2, 34, 33, 1, 2), (1, 1, 256, 3, 5, 2, 4)]
LOSSES += [(1, 2, 4, 6, 9, 3, 2), (1, 2, 4, 6, 6, 0, 4), (2, 1, 5, 3, 4, 2, 4)]


def mask_losses(L, B, Q, h, w, T, R, dtype, gaps: bool = False) -> list[tuple[torch.Tensor, ...]]:
    """(ours, the fp32 reference, the exact one) of focal loss, dice loss and gradient."""
    torch.manual_seed(0)
    masks = permuted(rough(L + gaps, B, Q, h, w).to(dtype))[gaps:]
    labels = torch.randint(0, T + 1, (B, R * h, R * w)).to(torch.uint8)
    classes = torch.stack([torch.randperm(max(T, 1))[:T] for _ in range(B)])
    matched = torch.rand(L, B, Q).argsort(-1)[..., :T].contiguous()
    if T > 1:
        matched[0, 0, 0] = -1
    grads = torch.randn(2, L, B, T)
    masks, labels, classes, matched, grads = on_device(masks, labels, classes, matched, grads)
    focal, dice, sums = mask_loss.launch_forward(masks, matched, labels, classes)
    grad = mask_loss.launch_backward(*grads, sums, masks, matched, labels, classes)
    assert grad.dtype == dtype and (grad.stride() == masks.stride()) != gaps
    results = []
    for precision in (torch.float32, torch.float64):
        x = masks.to(precision).clone().requires_grad_()
        found = torch.stack(focal_and_dice(x, matched, labels, classes))
        (of_masks,) = torch.autograd.grad((found * grads).sum(), x)
        results.append((*found, of_masks))
    return [*zip((focal, dice, grad), *results, strict=True)]


@pytest.mark.parametrize("case", in_all_types(LOSSES))
def test_mask_loss_and_its_gradient(case):
    """One case has gaps in the memory of its masks: the gradient has other strides."""
    for ours, reference, exact in mask_losses(*case, gaps=case[:3] == (1, 2, 4) and case[5] > 0):
        no_worse(ours, reference, exact)


def test_mask_loss_takes_label_maps_of_a_multiple_of_the_logits_size():
    masks = torch.zeros(1, 1, 1, 8, 6)
    for size in ((32, 24), (33, 24), (32, 48), (8, 6), (24, 18)):
        assert mask_loss.is_supported(masks, torch.zeros(1, *size)) is (size == (32, 24))


def test_mask_loss_of_no_image():
    batch = torch.zeros(2, 0, 5, 4, 3), torch.zeros(2, 0, 1, dtype=torch.int64)
    batch += torch.zeros(0, 16, 12), torch.zeros(0, 1, dtype=torch.int64)
    focal, dice, sums = mask_loss.launch_forward(*on_device(*batch))
    grad = mask_loss.launch_backward(focal, dice, sums, *on_device(*batch))
    assert focal.shape == dice.shape == (2, 0, 1) and grad.shape == batch[0].shape


@pytest.mark.skipif(DEVICE == "cuda", reason="the functions themselves run in the tests above")
@pytest.mark.parametrize("sign", [1, -1])
def test_fast_functions_are_accurate_enough(sign, plain, monkeypatch):
    """In their place, functions whose every error is as large as the CUDA programming guide allows
    ("Intrinsic functions"), all to one side.
    """
    tl, step = jit.tl, sign * 2.0**-23

    def fast_expf(x):
        return tl.exp(x) * (1.0 + step * (2.0 + 1.173 * tl.minimum(tl.abs(x), 100.0)))

    fast = SimpleNamespace(
        fast_expf=fast_expf,
        fast_dividef=lambda a, b: a / b * (1.0 + 2.0 * step),
        fast_logf=lambda x: tl.log(x) + sign * 2.0**-21.41,
    )
    monkeypatch.setattr(jit, "FAST", True)
    monkeypatch.setattr(jit, "libdevice", fast)
    results = mask_losses(1, 1, 4, 5, 6, 3, 4, torch.float32)
    for ours, _, exact in (*results, matching_costs(2, 1, 9, 17, 23, 5, 7, torch.float32, plain)):
        error = (ours - exact).abs().max() / exact.abs().max()
        assert 1e-9 < error.item() < 1.2e-6


# --- mask pooling

POOLS = [(1, 1, (1, 1), 8, 8, (1, 1)), (7, 13, (3, 5), 8, 8, (30, 31))]
POOLS += [(20, 70, (5, 35), 8, 16, (29, 64)), (3, 64, (9, 9), 8, 8, (7, 32))]
POOLS += [(131, 8, (2, 2), 2, 2, (8, 8))]


@pytest.mark.parametrize(("threshold", "dtype"), [(0.5, torch.bfloat16), (0.4, torch.float32)])
@pytest.mark.parametrize(("Q", "D", "grid", "h", "w", "size"), POOLS)
def test_mask_pool(Q, D, grid, h, w, size, dtype, threshold, plain):
    """More cells than pixels among the cases, and cells of uneven size."""
    torch.manual_seed(0)
    features, logits = on_device(torch.randn(*grid, D).to(dtype), rough(Q, h, w))
    plain()
    masks = regions.region_masks(logits, size, threshold)[0]
    pooled = mask_pool.launch(features, masks.view(torch.uint8))
    assert not masks[0].any() and (pooled[0] == 0).all()
    reference, exact = (regions.pool_features(x, masks) for x in (features, features.double()))
    no_worse(pooled, reference, exact)


# --- regions and label map

REGIONS = [(2, 8, 8, (1, 1), 7, 0.5), (5, 8, 8, (30, 31), 32, 0.5)]
REGIONS += [(3, 8, 16, (32, 64), 24, 0.3), (1, 16, 24, (61, 93), 31, 0.4)]
REGIONS += [(4, 8, 8, (29, 32), 8, 1.0)]


@pytest.mark.parametrize(("Q", "h", "w", "size", "side", "threshold"), REGIONS)
def test_region_masks_boxes_and_crops(Q, h, w, size, side, threshold, plain):
    torch.manual_seed(0)
    logits, image = on_device(rough(Q, h, w), torch.randint(0, 256, (3, *size), dtype=torch.uint8))
    masks, boxes, valid = region_crop.launch_masks(logits, size, threshold)
    mean, std = [0.5, 0.45, 0.4], [0.25, 0.26, 0.27]
    order = valid.nonzero()[:, 0].flip(0)  # any order, and those with a pixel only
    ours = region_crop.launch_crops(image, masks, boxes, order, mean, std, side, torch.float32)
    plain()
    expected = regions.region_masks(logits, size, threshold)
    assert torch.equal(masks.bool(), expected[0].bool()) and torch.equal(valid, expected[2])
    assert torch.equal(boxes[order], expected[1][order])
    statistics = torch.tensor([mean, std], device=DEVICE)[..., None, None]
    cut = masks[order], boxes[order]
    reference, exact = (crops_of(image, *cut, *x, side) for x in (statistics, statistics.double()))
    no_worse(ours, reference, exact)


def crops_of(image, masks, boxes, mean, std, side):
    """`regions.region_crops`, in the type of `mean`."""
    normalized = (image.to(mean.dtype) / 255 - mean) / std
    crops = normalized.new_empty(len(masks), 3, side, side)
    for crop, mask, (x0, y0, x1, y1) in zip(crops, masks != 0, boxes.tolist(), strict=True):
        region = normalized[None, :, y0:y1, x0:x1] * mask[y0:y1, x0:x1]
        crop[:] = F.interpolate(region, (side, side), mode="bicubic", align_corners=False)[0]
    return crops


MAPS = [(1, 8, 8, 1, (1, 1), (1, 1)), (7, 8, 8, 5, (30, 31), (23, 37))]
MAPS += [(20, 4, 8, 131, (15, 32), (15, 32)), (131, 8, 8, 33, (30, 32), (9, 25))]


def class_scores(logits, classes, input_size, size):
    maps = torch.einsum("qc,qhw->chw", classes, mask_probabilities(logits, input_size))
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize(("Q", "h", "w", "C", "input_size", "size"), MAPS)
def test_semantic_map(Q, h, w, C, input_size, size):
    torch.manual_seed(0)
    logits, classes = on_device(rough(Q, h, w), torch.rand(Q, C) ** 4)
    labels, top, scores = semantic_map.launch(logits, classes, input_size, size, True)
    assert torch.equal(top, scores.amax(0))
    reference = class_scores(logits, classes, input_size, size).double()
    exact = class_scores(logits.double(), classes.double(), input_size, size)
    limit = 2 * float((reference - exact).abs().max() / exact.abs().max())
    apart = (scores.double() - exact).abs().max() / exact.abs().max()
    assert apart < max(limit, 3e-6 if Q > 1 else 3e-5)
    top = exact.gather(0, labels[None])[0]
    assert ((exact.amax(0) - top) <= 2e-5 * exact.amax(0)).all()  # the best class, up to rounding
    again, _, nothing = semantic_map.launch(logits, classes, input_size, size)
    assert torch.equal(again, labels) and nothing.numel() == 0
    equal = (torch.zeros_like(logits), torch.full_like(classes, 0.5))
    assert not semantic_map.launch(*equal, input_size, size)[0].any()  # the first class


def test_semantic_map_of_faint_masks():
    """Probabilities of about 1e-6 and class scores of 1e-4: labels and scores as exact as else."""
    torch.manual_seed(0)
    logits, classes = on_device(rough(7, 8, 8).clamp(-15, -13), 1e-4 * torch.rand(7, 5))
    labels, top, _ = semantic_map.launch(logits, classes, (30, 31), (23, 37))
    exact = class_scores(logits.double(), classes.double(), (30, 31), (23, 37))
    assert torch.allclose(top.double(), exact.amax(0), rtol=2e-5, atol=0)
    assert (exact.gather(0, labels[None])[0] >= (1 - 2e-5) * exact.amax(0)).all()


# --- operators


def operator_calls(T: int = 2, dtype: torch.dtype = torch.float32, order=(0, 1, 2, 3, 4)) -> list:
    """(operator, launcher, *arguments); `order`: of the mask logits' axes in memory."""
    torch.manual_seed(0)
    masks = torch.randn(2, 2, 5, 4, 3, dtype=dtype).permute(order).contiguous()
    masks = masks.permute([order.index(axis) for axis in range(5)])
    labels = torch.randint(0, 3, (2, 16, 12), dtype=torch.uint8)
    classes = torch.tensor([[0, 1], [2, 0]])[:, :T]
    matched = torch.tensor([[[2, 0], [1, -1]]] * 2)[..., :T]
    image, logits = torch.randint(0, 256, (3, 16, 12), dtype=torch.uint8), torch.randn(5, 4, 3)
    binary, boxes = torch.ones(5, 16, 12, dtype=torch.uint8), torch.tensor([[0, 0, 12, 16]] * 5)
    pairs, g = (masks, matched, labels, classes), torch.randn(2, 2, T)
    crops = (image, binary, boxes, torch.arange(T), [0.5] * 3, [0.2] * 3, 8, dtype)
    maps = (logits, torch.rand(5, 6), [15, 11], [20, 10])
    cost = (torch.randn(2, 2, 5, 7), masks, labels[:, ::4, ::4], classes, 20.0, 1.0)
    assigned = (torch.randn(2, 2, 5, T + 1), torch.tensor([T + 1, 1]))
    loss, crop, pool = mask_loss, region_crop, mask_pool
    calls = [
        (matching_cost.matching_cost, matching_cost.launch, *cost),
        (assignment.assignment, assignment.launch, *assigned),
        (loss.mask_loss_op, loss.launch_forward, masks.clone().requires_grad_(), *pairs[1:]),
        (loss.mask_loss_backward, loss.launch_backward, g, g, torch.rand(2, 2, T, 4), *pairs),
        (pool.mask_pool, pool.launch, torch.randn(2, 3, 6, dtype=dtype), binary),
        (crop.region_masks, crop.launch_masks, logits, [15, 11], 0.5),
        (crop.region_crop, crop.launch_crops, *crops),
        *((semantic_map.semantic_map, semantic_map.launch, *maps, x) for x in (True, False)),
    ]
    place = lambda value: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
    return [(*call[:2], *map(place, call[2:])) for call in calls]


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(len(operator_calls())))
def test_operators_are_well_formed(number):
    op, _, *arguments = operator_calls()[number]
    torch.library.opcheck(op, tuple(arguments))


@pytest.mark.gpu
def test_the_program_gives_the_same_with_kernels_and_without(small_clip, plain):
    """Through the functions of zsseg/, which hand CUDA tensors to the kernels."""
    torch.manual_seed(0)
    small_clip.cuda()
    class_logits, masks = torch.randn(2, 2, 20, 7, device="cuda"), rough(2, 2, 20, 16, 12).cuda()
    labels = torch.randint(0, 6, (2, 64, 48), device="cuda")
    image = torch.randint(0, 256, (3, 62, 45), device="cuda", dtype=torch.uint8)
    classes, counts = torch.arange(6, device="cuda").expand(2, 6), torch.tensor([6, 4]).cuda()
    targets = Targets(labels, classes, counts)
    logits = masks[0, 0].contiguous()
    config = SimpleNamespace(mask_threshold=0.5, dense_edge=0, crop_batch_size=32)

    def results() -> list[torch.Tensor]:
        cost = matcher.matching_cost(class_logits, masks, targets, 20.0, 1.0)
        matched, bad = matcher.assign(cost, targets.counts)
        ones = torch.ones(2, device="cuda")
        terms = losses.segmentation_losses(class_logits, masks, targets, ones, TRAIN)
        binary, boxes, valid = regions.region_masks(logits, (62, 45), 0.5)
        found = Regions(binary, boxes, valid.nonzero()[:, 0])
        crops = regions.region_crops(small_clip, image, binary, boxes, found.index)
        pooled = regions.CLASSIFIERS["pool"](small_clip, image, found, config)
        boxes = boxes[valid]  # of the others they mean nothing
        return [cost, matched, bad, *terms.values(), binary, boxes, valid, crops, pooled]

    ours = results()
    plain()
    for a, b in zip(ours, results(), strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-4)


def layouts(op, launch, *arguments) -> list[list[tuple]]:
    """Shapes, strides and types of what a launcher leaves, and of an operator's fake results."""

    def on(device: str) -> list:
        new = lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        return [new(x) if isinstance(x, torch.Tensor) else x for x in arguments]

    results = []
    recorded(lambda: results.append(launch(*on("meta"))))
    with FakeTensorMode():
        results.append(op(*on("cuda")))
    assert all(t.is_cuda for t in tree_leaves(results[1]))
    return [[(t.shape, t.stride(), t.dtype) for t in tree_leaves(found)] for found in results]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (1, 0, 2, 3, 4), (0, 1, 3, 4, 2)])
@pytest.mark.parametrize("T", [0, 2])
def test_fake_results_are_laid_out_like_real_ones(T, order, dtype):
    """torch.compile plans with them, and would read memory by them."""
    for call in operator_calls(T, dtype, order):
        real, fake = layouts(*call)
        assert fake == real, call[0]


def test_an_environment_variable_switches_the_kernels_off(monkeypatch):
    cuda, cpu = SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=False)
    for value, expected in (("0", False), ("1", True), ("", True)):
        monkeypatch.setenv("ZSSEG_KERNELS", value)
        use_triton = runpy.run_path(str(ROOT / "kernels" / "jit.py"))["use_triton"]
        assert use_triton(cuda) is expected and use_triton(cpu) is False


# --- what the launchers launch, without a GPU


def test_grids_stay_within_a_gpu_s_limits():
    """2^31 - 1 blocks on the first axis, 65,535 on the others."""
    sizes = compile_check.Sizes(L=6, B=64, Q=512, T=255, C=1023)
    for call in compile_check.calls(sizes).values():
        for launch in recorded(call):
            first, *others = launch.grid
            assert first < 2**31 and max(others, default=0) <= 65_535, launch.kernel.__name__


def programs(names: list[str], every: list[compile_check.Sizes]) -> Counter:
    """{kernel: programs that Triton compiles}: a new one would stop the run for a second."""
    calls = [compile_check.calls(sizes)[name] for sizes in every for name in names]
    found = {compile_check.program(launch) for call in calls for launch in recorded(call)}
    return Counter(name for name, *_ in found)


def test_few_programs_serve_every_number_of_targets():
    names = ["matching_cost", "assignment", "mask_loss", "mask_loss, backward"]
    found = programs(names, [compile_check.Sizes(T=T) for T in range(1, 41)])
    assert found.pop("matching_cost_sums_kernel") == 2  # by the width of its products
    assert len(found) == 4 and {*found.values()} == {1}


@pytest.mark.parametrize(("classifier", "count"), [("region_crop", 6), ("mask_pool", 7)])
def test_inference_compiles_once_for_all_sizes(classifier, count):
    """Images and grids of features of any size, any number of classes."""
    chance = random.Random(0)
    names = ("h", "w", "C", "grid")
    every = [{name: chance.randint(17, 600) for name in names} for _ in range(100)]
    found = programs(
        ["region_masks", classifier, "semantic_map"], [compile_check.Sizes(**s) for s in every]
    )
    assert len(found) == found.total() == count


def test_no_buffer_of_the_loss_is_larger_than_the_mask_logits():
    """From shapes alone: batch 32, 640 x 640, up to 31 targets an image, bf16. The only other
    buffer that comes near is their gradient.
    """
    sizes = compile_check.Sizes(B=32, T=31)
    logits = 2 * sizes.L * sizes.B * sizes.Q * sizes.h * sizes.w  # bytes
    calls = compile_check.calls(sizes)
    for name in ("matching_cost", "assignment", "mask_loss", "mask_loss, backward"):
        with Watch() as watch:
            recorded(calls[name])
        found = sorted(watch.made, reverse=True)
        if name == "mask_loss, backward":
            assert found.pop(0) == logits  # the gradient
        assert sum(found) < logits / 20, (name, found[:3])  # and nothing is copied


# --- what the compiler makes of them, without a GPU

PIPELINED = {"matching_cost_sums_kernel", "semantic_map_argmax_kernel", "mask_pool_kernel"}
SPILLED = 32  # bytes a thread at most


@pytest.mark.slow
def test_kernels_are_pipelined_and_do_not_spill():
    """For sm_80 and sm_90, without a GPU; at the sizes of COCO.

    A loop that has its tiles in local memory instead of registers (hundreds of bytes a thread) is
    several times slower, and so is one that waits for every tile. How registers are dealt out
    differs between versions of Triton and ptxas: a few values that wait outside the loop cost
    nothing.
    """
    done = process("-m", "tests.benchmarks.compile_check", env={"TRITON_INTERPRET": "0"})
    table = done.stdout.split("\n\n")[0].splitlines()
    rows = list(csv.DictReader(table, delimiter="\t"))
    count = sum(len(recorded(f)) for f in compile_check.calls(compile_check.Sizes()).values())
    assert len(rows) == 2 * count, done.stderr
    assert {row["kernel"] for row in rows} >= PIPELINED
    for row in rows:
        name, found = row.pop("kernel"), {k: float(v) for k, v in row.items()}
        assert found["spilled"] <= SPILLED, (name, found)
        assert found["shared"] <= compile_check.BLOCK_SHARED[found["sm"]], (name, found)
        assert found["warps"] >= 12, (name, found)
        assert found["copies"] + found["tma"] > 0 or name not in PIPELINED, (name, found)
