"""Backbones: image -> features at strides 4, 8, 16, 32; R50, R101c, SwinB, or a small one that
learns within minutes; their weights.

To add one: a module whose forward gives the four maps and whose `channels` says how wide they are,
and a row in BACKBONES.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import ops
from torchvision.models import ResNet50_Weights, Swin_B_Weights
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.swin_transformer import (
    ShiftedWindowAttention,
    SwinTransformer,
    SwinTransformerBlock,
)

from zsseg.checkpoint import (
    State,
    check_finite,
    load_strict,
    read_torch,
    say_fresh,
    say_loaded,
    unwrapped,
)
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


class WindowAttention(ShiftedWindowAttention):
    """torchvision's, except that odd blocks shift maps of a single window, too, as Swin's own code
    does (Liu et al. 2021); torchvision's do not, which changes such maps by more than half of their
    largest value.
    """

    def define_relative_position_index(self) -> None:
        super().define_relative_position_index()
        # Computed, so in no checkpoint.
        self.register_buffer(
            "relative_position_index", self.relative_position_index, persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> the same; padding takes part in the attention."""
        B, H, W, C = x.shape
        w, shift = self.window_size[0], self.shift_size[0]
        rows, columns = -(-H // w), -(-W // w)  # of windows
        x = F.pad(x, (0, 0, 0, columns * w - W, 0, rows * w - H)).roll((-shift, -shift), (1, 2))
        bias = self.get_relative_position_bias()  # [1, heads, w*w, w*w]
        if shift:
            bias = bias + shift_mask(rows, columns, w, shift, x.device).repeat(B, 1, 1)[:, None]

        x = x.view(B, rows, w, columns, w, C).transpose(2, 3)
        x = x.reshape(B * rows * columns, w * w, C)
        # [B * windows, heads, w*w, C/heads]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype)).transpose(1, 2)

        x = self.proj(x.flatten(2)).view(B, rows, columns, w, w, C).transpose(2, 3)
        x = x.reshape(B, rows * w, columns * w, C)
        return x.roll((shift, shift), (1, 2))[:, :H, :W]


def shift_mask(rows: int, columns: int, w: int, shift: int, device: torch.device) -> Tensor:
    """What keeps tokens of a rolled map apart that are not neighbours in the image: 0 or -100,
    [rows * columns, w*w, w*w].
    """
    # 0, 1 or 2: before the last window, in its first part, in what was rolled in
    within = torch.arange(w, device=device) >= w - shift
    y, x = (
        (torch.arange(1, count + 1, device=device) >= count)[:, None] * (1 + within.int())
        for count in (rows, columns)
    )
    part = 3 * y[:, None, :, None] + x[:, None]  # [rows, columns, w, w]
    part = part.reshape(rows * columns, w * w)
    return -100.0 * (part[:, None] != part[:, :, None])


class Swin(SwinTransformer):
    """torchvision's Swin, by default Swin-B, with windows of 12, without the classifier, with a
    layer norm of its own for each of the four maps.
    """

    def __init__(self, width: int = 128, depths: tuple[int, ...] = (2, 2, 18, 2)):
        super().__init__(
            [4, 4],
            width,
            list(depths),
            [width // 32 * 2**i for i in range(4)],
            [12, 12],
            stochastic_depth_prob=0.3,
            block=partial(SwinTransformerBlock, attn_layer=WindowAttention),
        )
        del self.norm, self.permute, self.avgpool, self.flatten, self.head
        self.channels = [width * 2**i for i in range(4)]
        for i, channels in enumerate(self.channels):
            self.add_module(f"norm{i}", nn.LayerNorm(channels))

    def forward(self, x: Tensor) -> list[Tensor]:
        H, W = x.shape[-2:]
        x = F.pad(x, (0, -W % 4, 0, -H % 4))  # or torchvision would cut the rest off
        maps = []
        for i, layer in enumerate(self.features):  # patches, stage, merging, stage, ...
            x = layer(x)
            if i % 2:
                maps.append(self.get_submodule(f"norm{i // 2}")(x).permute(0, 3, 1, 2))
        return maps


class SmallResNet(nn.Module):
    """One basic block a stage, batch norm: the small CLIP's and, from there, the segmenter's, for
    images of 96 x 96.

    The last two stages keep stride 8: at stride 32 such an image would be nine tokens, too few for
    queries to find objects by.
    """

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
        for width, stride in zip(widths, (1, 2, 1, 1), strict=True):
            shortcut = None
            if (channels, 1) != (width, stride):
                shortcut = nn.Sequential(
                    nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
                )
            stages.append(BasicBlock(channels, width, stride, shortcut))
            channels = width
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        return [x := stage(x) for stage in self.stages]


BACKBONES: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "R50": lambda config: DeepResNet("R50"),
    "R101c": lambda config: DeepResNet("R101c"),
    "SwinB": lambda config: Swin(),
    "small": lambda config: SmallResNet(config.small_widths),
}


def build_backbone(config: ModelConfig) -> nn.Module:
    """Images [B, 3, H, W] -> res2..res5 at strides 4, 8, 16, 32 (the small one: 4, 8, 8, 8);
    `channels` says how wide they are.
    """
    return BACKBONES[config.backbone](config)


BACKBONE_FILES = {  # no checksum is published; the reader executes nothing
    "R-50.pkl": "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/torchvision/R-50.pkl",
    "R-103.pkl": "https://dl.fbaipublicfiles.com/detectron2/DeepLab/R-103.pkl",
    "swin_base_patch4_window12_384_22k.pth": (
        "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
        "swin_base_patch4_window12_384_22k.pth"
    ),
}
IMAGENET = {"R50": ResNet50_Weights.IMAGENET1K_V1, "SwinB": Swin_B_Weights.IMAGENET1K_V1}


def load_backbone(backbone: nn.Module, name: str, weights: str) -> None:
    """Initial weights of R50, R101c or SwinB: a torchvision `.pth`, a detectron2 `.pkl`, Swin's own
    `.pth`, or "imagenet".

    "imagenet" (R50, SwinB) and the names in `BACKBONE_FILES` are downloaded where there is no such
    file.
    """
    what, hint = f"model.weights {weights}", f"give ImageNet weights of {name}"
    if weights in BACKBONE_FILES and not Path(weights).exists():
        weights = str(fetch([BACKBONE_FILES[weights]], cache_dir() / weights, "", what))
    if weights == "imagenet":
        if name not in IMAGENET:
            raise UserError(what, f"torchvision has none for {name}", "set model.weights=R-103.pkl")
        try:
            state = IMAGENET[name].get_state_dict(model_dir=cache_dir(), check_hash=True)
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
    if name == "SwinB":
        load_swin(backbone, state, what, hint)
        return
    # Classifier, counters.
    dropped = [k for k in state if re.search(r"(^|\.)fc|num_batches_tracked$", k)]
    state = {k: v for k, v in state.items() if k not in dropped}
    load_strict(backbone, state, what, hint)
    say_loaded(what, len(state), dropped)


def load_swin(backbone: nn.Module, state: State, what: str, hint: str) -> None:
    """Weights of torchvision or of Swin's own code, as far as they fit: position biases of windows
    of 7 do not, and the norms of the four maps are not among them.
    """
    if "patch_embed.proj.weight" in state:
        state = {f"backbone.{name}": tensor for name, tensor in state.items()}
        parts, dropped = import_original(state, what, unknown := [])
        state = parts["maskformer"] | dict.fromkeys([*dropped, *unknown])
    state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    own = backbone.state_dict()
    used = {
        k: v
        for k, v in state.items()
        if k in own and isinstance(v, Tensor) and v.shape == own[k].shape
    }
    if not used:
        raise UserError(what, "holds no weight that fits", hint)
    check_finite(used, what)
    backbone.load_state_dict(used, strict=False)
    say_loaded(what, len(used), [k for k in state if k not in used])
    say_fresh(what, [k for k in own if k not in used])


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
