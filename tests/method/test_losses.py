"""Matching, assignment and losses against slow, literal versions, and at the edges."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import PROCESS, tiny_config

import train
from zsseg import losses as module
from zsseg.config import TrainConfig
from zsseg.losses import loss_normalizers, segmentation_losses
from zsseg.matcher import Targets, assign, matching_cost

L, B, Q, C, SIDE = 2, 3, 5, 4, 16
IGNORE = 255
TRAIN = TrainConfig()  # weights 20 (focal), 1 (dice), 0.1 (no object)


def case(labels: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Targets]:
    torch.manual_seed(seed)
    present = [[c for c in x.unique().tolist() if c != IGNORE] for x in labels]
    width = max(map(len, present))
    padded = [p + [0] * (width - len(p)) for p in present]
    classes = torch.tensor(padded, dtype=torch.int64).view(len(labels), width)
    logits = torch.randn(L, len(labels), Q, C + 1) * 3
    masks = torch.randn(L, len(labels), Q, SIDE // 4, SIDE // 4) * 4
    return logits, masks, Targets(labels, classes, torch.tensor([len(p) for p in present]))


def losses_of(logits, masks, targets: Targets) -> dict[str, torch.Tensor]:
    normalizers = loss_normalizers(targets.counts, Q, 0.1, PROCESS.sum, 1)
    return segmentation_losses(logits, masks, targets, normalizers, TRAIN)


def mixed_labels() -> torch.Tensor:
    """Three label maps of 3, 1 and 0 classes; the last is all ignored."""
    torch.manual_seed(1)
    labels = torch.randint(0, 3, (B, SIDE, SIDE))
    labels[0, :3] = IGNORE
    labels[1], labels[1, 5:7] = 3, IGNORE
    labels[2] = IGNORE
    return labels


def literal_cost(logits, masks, labels, cls):
    """One query, one target, the definition word by word."""
    truth = (labels[::4, ::4] == cls).double()
    x = masks.double()
    p = x.sigmoid()
    focal = 0.25 * (1 - p) ** 2 * F.softplus(-x) * truth
    focal = (focal + 0.75 * p**2 * F.softplus(x) * (1 - truth)).mean()
    dice = 1 - (2 * (p * truth).sum() + 1) / (p.sum() + truth.sum() + 1)
    return -logits.double().softmax(-1)[cls] + 20 * focal + dice


def test_matching_cost_is_the_formula():
    logits, masks, targets = case(mixed_labels())
    cost = matching_cost(logits, masks, targets, 20, 1)
    for layer, b, q in itertools.product(range(L), range(B), range(Q)):
        for t in range(targets.counts[b]):
            target = (targets.labels[b], targets.classes[b, t])
            wanted = literal_cost(logits[layer, b, q], masks[layer, b, q], *target)
            assert float(cost[layer, b, q, t]) == pytest.approx(float(wanted), rel=1e-5)


def test_losses_are_the_formulas():
    logits, masks, targets = case(mixed_labels())
    losses = losses_of(logits, masks, targets)
    matched, _ = assign(matching_cost(logits, masks, targets, 20, 1), targets.counts)
    for layer in range(L):
        focal = dice = nll = weight = 0.0
        for b in range(B):
            pairs = zip(matched[layer, b].tolist(), targets.classes[b].tolist(), strict=True)
            of_query = {q: cls for q, cls in pairs if q >= 0}
            for q in range(Q):
                w = 1.0 if q in of_query else 0.1
                nll -= w * float(logits[layer, b, q].double().log_softmax(-1)[of_query.get(q, C)])
                weight += w
            for q, cls in of_query.items():
                x = masks[layer, b, q][None, None]
                p = F.interpolate(x, (SIDE, SIDE), mode="bilinear")[0, 0].double().sigmoid()
                truth = (targets.labels[b] == cls).double()
                pt = p * truth + (1 - p) * (1 - truth)
                alpha = 0.25 * truth + 0.75 * (1 - truth)
                focal -= float((alpha * (1 - pt) ** 2 * pt.log()).mean())
                dice += float(1 - (2 * (p * truth).sum() + 1) / (p.sum() + truth.sum() + 1))
        assert float(losses["class"][layer]) == pytest.approx(nll / weight, rel=1e-5)
        # 4 targets in the batch.
        assert float(losses["focal"][layer]) == pytest.approx(20 * focal / 4, rel=1e-4)
        assert float(losses["dice"][layer]) == pytest.approx(dice / 4, rel=1e-5)


def test_a_batch_without_targets_still_trains_every_output():
    logits, masks, targets = case(torch.full((B, SIDE, SIDE), IGNORE))
    assert targets.classes.shape == (B, 0)
    logits.requires_grad_(), masks.requires_grad_()
    losses = losses_of(logits, masks, targets)
    total = sum(v.sum() for v in losses.values())
    total.backward()
    assert torch.isfinite(total) and float(losses["focal"].detach().sum()) == 0
    assert logits.grad.abs().sum() > 0 and torch.isfinite(masks.grad).all()


def test_a_cost_that_is_not_finite_makes_every_gradient_nan():
    logits, masks, targets = case(mixed_labels())
    logits[1, 0, 2] = math.nan
    masks.requires_grad_()
    losses = losses_of(logits, masks, targets)
    sum(v.sum() for v in losses.values()).backward()
    assert all(v[0].isfinite() and v[1].isnan() for v in losses.values())
    assert masks.grad[1, 0].isnan().any() and masks.grad[0].isfinite().all()


def test_bf16_network_outputs_are_summed_in_fp32():
    logits, masks, targets = case(mixed_labels())
    cost = matching_cost(logits.bfloat16(), masks.bfloat16(), targets, 20, 1)
    exact = matching_cost(logits.bfloat16().float(), masks.bfloat16().float(), targets, 20, 1)
    assert cost.dtype == torch.float32 and torch.equal(cost, exact)


def test_costs_and_losses_run_outside_autocast(shapes_root, tmp_path, monkeypatch):
    dtypes = set()
    cost = module.matching_cost
    spy = lambda *a: dtypes.add(torch.is_autocast_enabled("cpu")) or cost(*a)
    monkeypatch.setattr(module, "matching_cost", spy)
    config = tiny_config("train.steps=1", "model.bf16=on", "eval.compare=false")
    train.train(config, shapes_root, tmp_path, PROCESS, {})
    assert dtypes == {False}
