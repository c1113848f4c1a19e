"""Backbones: image -> features at strides 4, 8, 16, 32; R50, R101c, or a small one that learns from
scratch; their weights.

To add one: a module whose forward gives the four maps and whose `channels` says how wide they are,
and a row in BACKBONES.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import ops
from torchvision.models import ResNet50_Weights
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from zsseg.checkpoint import State, load_strict, read_torch, say_loaded, unwrapped
from zsseg.config import ModelConfig
from zsseg.download import fetch
from zsseg.utils import UserError, cache_dir
from zsseg.weights import ArrayUnpickler, import_original


class FrozenBatchNorm2d(ops.FrozenBatchNorm2d):
    """Batch norm whose four tensors are buffers (eps 1e-5), as one operator: torchvision's own
    reads the map twice.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class DeepResNet(ResNet):
    """torchvision's ResNet (stride in the 3x3 convolution) with frozen batch norm, without the
    classifier.

    "R101c": a stem of three 3x3 convolutions, and dilations 1, 2, 4 in res5, whose stride stays 2
    (DeepLab).
    """

    def __init__(self, name: str):
        super().__init__(
            Bottleneck,
            [3, 4, 6, 3] if name == "R50" else [3, 4, 23, 3],
            norm_layer=FrozenBatchNorm2d,
        )
        del self.fc, self.avgpool
        self.channels = [256, 512, 1024, 2048]
        if name == "R50":
            return
        stem, channels = [], 3
        for width, stride in ((64, 2), (64, 1), (128, 1)):
            stem += [
                nn.Conv2d(channels, width, 3, stride, 1, bias=False),
                FrozenBatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.conv1, self.bn1, self.relu = nn.Sequential(*stem[:-2]), stem[-2], stem[-1]
        self.layer1[0].conv1 = nn.Conv2d(128, 64, 1, bias=False)
        self.layer1[0].downsample[0] = nn.Conv2d(128, 256, 1, bias=False)
        for block, dilation in zip(self.layer4, (1, 2, 4), strict=True):
            block.conv2.dilation = block.conv2.padding = (dilation, dilation)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return [x := layer(x) for layer in (self.layer1, self.layer2, self.layer3, self.layer4)]


class SmallResNet(nn.Module):
    """One basic block a stage, batch norm: learns from scratch on 64 x 64 images in minutes."""

    def __init__(self, widths: list[int]):
        super().__init__()
        self.channels = list(widths)
        w = widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(3, w, 3, 2, 1, bias=False),
            nn.BatchNorm2d(w),
            nn.ReLU(inplace=True),
            nn.Conv2d(w, w, 3, 2, 1, bias=False),
            nn.BatchNorm2d(w),
            nn.ReLU(inplace=True),
        )
        stages, channels = [], w
        for i, width in enumerate(widths):
            shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, 2, bias=False), nn.BatchNorm2d(width)
            )
            stages.append(
                BasicBlock(channels, width, 2, shortcut) if i else BasicBlock(channels, width)
            )
            channels = width
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        return [x := stage(x) for stage in self.stages]


BACKBONES: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "R50": lambda config: DeepResNet("R50"),
    "R101c": lambda config: DeepResNet("R101c"),
    "small": lambda config: SmallResNet(config.small_widths),
}


def build_backbone(config: ModelConfig) -> nn.Module:
    """Images [B, 3, H, W] -> res2..res5 at strides 4, 8, 16, 32; `channels` says how wide they
    are.
    """
    return BACKBONES[config.backbone](config)


DETECTRON_MODELS = {  # no checksum is published; the reader executes nothing
    "R-50.pkl": "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/torchvision/R-50.pkl",
    "R-103.pkl": "https://dl.fbaipublicfiles.com/detectron2/DeepLab/R-103.pkl",
}


def load_backbone(backbone: nn.Module, name: str, weights: str) -> None:
    """Initial weights of R50 or R101c: a torchvision `.pth`, a detectron2 `.pkl`, or "imagenet".

    "imagenet" (R50), "R-50.pkl" and "R-103.pkl" (R101c) are downloaded where there is no such file.
    """
    what, hint = f"model.weights {weights}", f"give ImageNet weights of {name}"
    if weights in DETECTRON_MODELS and not Path(weights).exists():
        weights = str(fetch([DETECTRON_MODELS[weights]], cache_dir() / weights, "", what))
    if weights == "imagenet":
        if name != "R50":
            raise UserError(what, f"torchvision has none for {name}", "set model.weights=R-103.pkl")
        try:
            state = ResNet50_Weights.IMAGENET1K_V1.get_state_dict(
                model_dir=cache_dir(), check_hash=True
            )
        except OSError as error:
            raise UserError(
                what, f"cannot be downloaded ({error})", "give a file as model.weights"
            ) from None
    elif weights.endswith(".pkl"):
        state = read_detectron(Path(weights), what, hint)
    else:
        state = read_torch(Path(weights), what)
    for key in ("model", "state_dict"):
        state = (
            state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
        )
    if not isinstance(state, dict):
        raise UserError(what, "is not a state dict", hint)
    state = unwrapped(state, what)
    # Classifier, counters.
    dropped = [k for k in state if re.search(r"(^|\.)fc|num_batches_tracked$", k)]
    state = {k: v for k, v in state.items() if k not in dropped}
    load_strict(backbone, state, what, hint)
    say_loaded(what, len(state), dropped)


def read_detectron(path: Path, what: str, hint: str) -> State:
    """A detectron2 model-zoo file, the backbone under our names, everything else under its own."""
    try:
        with open(path, "rb") as file:
            content = ArrayUnpickler(file, encoding="latin1").load()
        arrays = {
            k.removeprefix("backbone."): torch.as_tensor(v)
            for k, v in content.get("model", content).items()
        }
    except Exception as error:  # a broken pickle raises anything
        raise UserError(
            what,
            f"{path} cannot be read as arrays ({error!r:.200})",
            f"replace or delete it; {hint}",
        ) from None
    other = re.compile(r"(stem\.)?fc|.*num_batches_tracked$")
    state = {f"backbone.{k}": v for k, v in arrays.items() if not other.match(k)}
    state = import_original(state, what)[0].get("maskformer", {})
    return {k.removeprefix("backbone."): v for k, v in state.items()} | {
        k: v for k, v in arrays.items() if other.match(k)
    }
