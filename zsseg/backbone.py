"""Backbones: image -> features at strides 4, 8, 16, 32; R50, R101c, SwinB, or a small one that
learns within minutes.

To add one: a module whose forward gives the four maps and whose `channels` says how wide they are,
and a row in BACKBONES.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet, conv1x1, conv3x3
from torchvision.models.swin_transformer import (
    ShiftedWindowAttention,
    SwinTransformer,
    SwinTransformerBlock,
)

from kernels.frozen import FrozenBatchNorm2d, convolve, pairs


class FrozenBottleneck(Bottleneck):
    """torchvision's block, with its frozen norms folded into the convolutions."""

    def forward(self, x):
        y = convolve(self.conv1, self.bn1, x).relu_()
        y = convolve(self.conv2, self.bn2, y).relu_()
        y = convolve(self.conv3, self.bn3, y)
        return (y + (convolve(*self.downsample, x) if self.downsample else x)).relu_()


def conv_stem(norm, *sizes):
    """Convolutions of 3x3, each with norm and ReLU; sizes: (channels, width, stride) of each."""
    layers = []
    for channels, width, stride in sizes:
        layers += [conv3x3(channels, width, stride), norm(width), nn.ReLU(inplace=True)]
    return layers


class DeepResNet(ResNet):
    """torchvision's ResNet (stride in the 3x3 convolution) with frozen batch norm, without the
    classifier; depths: blocks of the four stages.
    """

    def __init__(self, depths=(3, 4, 6, 3)):
        super().__init__(FrozenBottleneck, depths, norm_layer=FrozenBatchNorm2d)
        del self.fc, self.avgpool
        self.channels = [256, 512, 1024, 2048]

    def forward(self, x):
        for conv, norm in pairs(self.conv1, self.bn1):
            x = convolve(conv, norm, x).relu_()
        x = self.maxpool(x)
        return [x := layer(x) for layer in (self.layer1, self.layer2, self.layer3, self.layer4)]


class R101c(DeepResNet):
    """DeepLab's: a stem of three 3x3 convolutions, and dilations 1, 2, 4 in res5, whose stride
    stays 2.
    """

    def __init__(self):
        super().__init__((3, 4, 23, 3))
        stem = conv_stem(FrozenBatchNorm2d, (3, 64, 2), (64, 64, 1), (64, 128, 1))
        *layers, self.bn1, self.relu = stem
        self.conv1 = nn.Sequential(*layers)
        self.layer1[0].conv1 = conv1x1(128, 64)
        self.layer1[0].downsample[0] = conv1x1(128, 256)
        for i in (1, 2):
            conv = self.layer4[i].conv2
            conv.dilation = conv.padding = (2 * i, 2 * i)


class WindowAttention(ShiftedWindowAttention):
    """torchvision's, except that odd blocks shift maps of a single window, too, as Swin's own code
    does (Liu et al. 2021); torchvision's do not, which changes such maps by more than half of their
    largest value.
    """

    def define_relative_position_index(self):
        super().define_relative_position_index()
        index = self.relative_position_index
        self.register_buffer("relative_position_index", index, persistent=False)  # computed

    def forward(self, x):
        """[B, H, W, C] -> the same; padding takes part in the attention."""
        B, H, W, C = x.shape
        w = self.window_size[0]
        shift = self.shift_size[0]
        rows = -(-H // w)  # of windows
        columns = -(-W // w)
        x = F.pad(x, (0, 0, 0, columns * w - W, 0, rows * w - H)).roll((-shift, -shift), (1, 2))
        bias = self.get_relative_position_bias()  # [1, heads, w*w, w*w]
        if shift:
            bias = bias + shift_mask(rows, columns, w, shift, x.device).repeat(B, 1, 1)[:, None]

        x = x.view(B, rows, w, columns, w, C).transpose(2, 3)
        layout = x.shape
        x = self.qkv(x.reshape(B * rows * columns, w * w, C))
        # [B * windows, heads, w*w, C/heads]
        q, k, v = x.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype)).transpose(1, 2)

        x = self.proj(x.flatten(2)).view(layout).transpose(2, 3)
        x = x.reshape(B, rows * w, columns * w, C)
        return x.roll((shift, shift), (1, 2))[:, :H, :W]


def shift_mask(rows, columns, w, shift, device):
    """What keeps tokens of a rolled map apart that are not neighbours in the image: 0 or -100,
    [rows * columns, w*w, w*w].
    """
    # What was rolled in from the other end; in every window but the last ones it is nothing.
    y, x = (torch.arange(n * w, device=device).view(n, w) >= n * w - shift for n in (rows, columns))
    part = 2 * y[:, None, :, None] + x[:, None]  # [rows, columns, w, w]
    part = part.reshape(rows * columns, w * w)
    return -100.0 * (part[:, None] != part[:, :, None])


class Swin(SwinTransformer):
    """torchvision's Swin, by default Swin-B, with windows of 12, without the classifier, with a
    layer norm of its own for each of the four maps.
    """

    def __init__(self, width=128, depths=(2, 2, 18, 2)):
        channels = [width * 2**i for i in range(4)]
        super().__init__(
            [4, 4],
            width,
            list(depths),
            [c // 32 for c in channels],
            [12, 12],
            stochastic_depth_prob=0.3,
            block=partial(SwinTransformerBlock, attn_layer=WindowAttention),
        )
        del self.norm, self.permute, self.avgpool, self.flatten, self.head
        self.channels = channels
        for i, c in enumerate(channels):
            self.add_module(f"norm{i}", nn.LayerNorm(c))

    def forward(self, x):
        H, W = x.shape[-2:]
        x = F.pad(x, (0, -W % 4, 0, -H % 4))  # or torchvision would cut the rest off
        maps = []
        for i in range(4):
            x = self.features[2 * i : 2 * i + 2](x)  # patches or merging, stage
            maps.append(self.get_submodule(f"norm{i}")(x).permute(0, 3, 1, 2))
        return maps


class SmallResNet(nn.Module):
    """One basic block a stage, batch norm: the small CLIP's and, from there, the segmenter's, for
    images of 64 x 64.

    The last two stages stay at stride 8: at stride 32 such an image would be four tokens, too few
    for queries to find objects by.
    """

    def __init__(self, widths):
        super().__init__()
        self.channels = list(widths)
        first = widths[0]
        self.stem = nn.Sequential(*conv_stem(nn.BatchNorm2d, (3, first, 2), (first, first, 2)))
        self.stages = nn.ModuleList()
        for channels, width, stride in zip((first, *widths[:3]), widths, (1, 2, 1, 1), strict=True):
            shortcut = None
            if (channels, 1) != (width, stride):
                conv = conv1x1(channels, width, stride)
                shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))
            self.stages.append(BasicBlock(channels, width, stride, shortcut))

    def forward(self, x):
        x = self.stem(x)
        return [x := stage(x) for stage in self.stages]


# model.backbone -> a module from the section [model], images [B, 3, H, W] -> res2..res5 at strides
# 4, 8, 16, 32 (the small one: 4, 8, 8, 8); its `channels` says how wide they are.
BACKBONES = {
    "R50": lambda model: DeepResNet(),
    "R101c": lambda model: R101c(),
    "SwinB": lambda model: Swin(),
    "small": lambda model: SmallResNet(model.small_widths),
}
