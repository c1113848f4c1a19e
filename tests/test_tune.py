"""Launch parameters: every choice gives the same result, and the fastest that is right is kept."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from kernels import bench, jit, mask_loss, mask_pool, matching_cost, region_crop, semantic_map, tune

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")


@pytest.fixture
def parameters(monkeypatch):
    """An empty table of launch parameters for this device."""
    table = {}
    jit.asked.clear()
    monkeypatch.setattr(jit, "table", lambda: table)
    return table.setdefault(jit.device_name(torch.device(DEVICE)), {})


def launches() -> dict[str, object]:
    """{kernel: a launch of it}, small and with ragged sizes."""
    torch.manual_seed(0)
    h, w = 6, 10
    masks, labels = 4 * torch.randn(9, h, w, device=DEVICE), torch.randint(0, 5, (1, 4 * h, 4 * w), device=DEVICE)
    stack, classes = masks[None, None], torch.arange(5, device=DEVICE)[None]
    matched = classes[None]
    image = torch.randint(0, 256, (3, 23, 37), dtype=torch.uint8, device=DEVICE)
    features, logits = torch.randn(1, 70, h, w, device=DEVICE), torch.randn(1, 1, 9, 8, device=DEVICE)
    scores, ones = torch.rand(9, 40, device=DEVICE), torch.ones(1, 1, 5, device=DEVICE)
    sums = ones[..., None].expand(1, 1, 5, 4)
    regions = (masks[:, :1].repeat_interleave(23, 1).repeat(1, 1, 4)[..., :37] > 0).byte()
    boxes = torch.tensor([[0, 0, 37, 23]], device=DEVICE).expand(9, 4)
    crop = (image, regions, torch.arange(3, device=DEVICE), boxes, [0.5] * 3, [0.2] * 3, 17, torch.float32)
    return {
        "matching_cost": lambda: matching_cost.launch(logits, stack, labels[:, ::4, ::4].contiguous(), classes, 20.0, 1.0),
        "mask_loss.forward": lambda: mask_loss.launch_forward(stack, matched, labels, classes),
        "mask_loss.backward": lambda: mask_loss.launch_backward(ones, ones, sums, stack, matched, labels, classes),
        "mask_pool": lambda: mask_pool.launch_forward(features, masks[None], -1.0),
        "region_crop.masks": lambda: region_crop.launch_masks(masks, (23, 37), 0.5),
        "region_crop.crops": lambda: region_crop.launch_crops(*crop),
        "semantic_map": lambda: semantic_map.launch(masks, scores, (23, 37), (20, 31), True),
    }


@pytest.mark.parametrize("kernel", tune.SPACE)
def test_other_launch_parameters_give_the_same(kernel, parameters):
    function, (first, *_, last) = launches()[kernel], tune.choices(kernel)
    safe = tune.results(function)
    [key] = [k for k in jit.asked if k.split()[0] == kernel]
    for choice in (first, last):
        parameters[key] = choice
        for ours, wanted in zip(tune.results(function), safe, strict=True):
            assert torch.allclose(ours, wanted, rtol=1e-4, atol=1e-5)


def test_tuning_keeps_the_fastest_that_is_right(parameters, monkeypatch, capsys):
    monkeypatch.setitem(tune.SPACE, "mask_loss.forward", {"CELLS": [64, 128, 256, 512], "num_warps": [2, 4]})
    times = {64: 1, 128: 3, 256: 9, 512: 2}
    x, asked = torch.ones(3, device=DEVICE), []

    def kernel() -> torch.Tensor:
        asked.append(jit.tuned("mask_loss.forward", x, 1000, CELLS=256, num_warps=4))
        if asked[-1]["CELLS"] == 512:
            raise RuntimeError("out of resources")
        return x * 2 if asked[-1]["CELLS"] == 64 else x

    def measure(function, device, duration):
        function()
        return [0, times[asked[-1]["CELLS"]] * asked[-1]["num_warps"], 0], 0

    monkeypatch.setattr(bench, "measure", measure)
    tune.tune(kernel, DEVICE)
    assert parameters == {"mask_loss.forward float32 1024": {"CELLS": 128, "num_warps": 2}}
    assert "failed: RuntimeError" in capsys.readouterr().out
    assert jit.tuned("mask_loss.forward", x, 600, CELLS=256, num_warps=4) == {"CELLS": 128, "num_warps": 2}
    safe = {"CELLS": 256, "num_warps": 4}
    assert jit.tuned("mask_loss.forward", x, 9000, **safe) == {"CELLS": 128, "num_warps": 2}  # the nearest size
    assert jit.tuned("mask_loss.forward", x.half(), 600, **safe) == jit.tuned("mask_loss", x, 600, **safe) == safe
    times[256] = 1
    tune.tune(kernel, DEVICE)  # now the safe ones are the fastest (but for their warps)
    assert parameters == {"mask_loss.forward float32 1024": {"CELLS": 256, "num_warps": 2}}


def test_tuning_needs_a_gpu():
    if DEVICE == "cuda":
        pytest.skip("there is one")
    result = subprocess.run([sys.executable, "-m", "kernels.tune"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0 and "no GPU" in result.stderr and "Traceback" not in result.stderr
