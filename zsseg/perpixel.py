"""The one-stage baseline (Xu et al. 2021): every pixel's feature against the class names, no mask proposals."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg.config import ModelConfig
from zsseg.maskformer import PIXEL_MEAN, PIXEL_STD, MaskFormer, PixelDecoder, build_backbone


class PerPixel(nn.Module):
    """Backbone and pixel decoder of MaskFormer, then one embedding of CLIP's width D a pixel."""
    def __init__(self, config: ModelConfig, embed: int):
        super().__init__()
        self.backbone = build_backbone(config)
        self.pixel_decoder = PixelDecoder(self.backbone.channels, config.hidden)
        nn.init.kaiming_uniform_(self.pixel_decoder.mask_features.weight, a=1)
        nn.init.zeros_(self.pixel_decoder.mask_features.bias)
        self.pixel_embed = nn.Conv2d(config.hidden, embed, 1)
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

    prepare = MaskFormer.prepare

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """`prepare`d pictures [B, 3, H, W], text features [C, D] -> class logits, 100 x cosine, fp32 [B, C, h, w]."""
        x = self.pixel_embed(self.pixel_decoder(self.backbone(images)))
        with torch.autocast(x.device.type, enabled=False):
            return 100 * torch.einsum("bdhw,cd->bchw", F.normalize(x.float(), dim=1), text.float())


def per_pixel_loss(logits: Tensor, labels: Tensor, ignore: int) -> Tensor:
    """Cross-entropy at the label maps' size: logits [B, C, h, w], labels [B, H, W] -> the mean over the pixels that count.

    0 where none does.
    """
    full = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(full, labels.long(), ignore_index=ignore, reduction="sum")
    return total / (labels != ignore).sum().clamp(min=1)
