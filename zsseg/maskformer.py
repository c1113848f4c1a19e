"""MaskFormer with zero-shot classification (Cheng et al. 2021): image -> masks and class
embeddings.

Backbone -> FPN pixel decoder -> transformer decoder over learned queries -> heads.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg.backbone import build_backbone
from zsseg.clip import cosine_logits

PIXEL_MEAN = (123.675, 116.28, 103.53)  # of RGB in 0..255
PIXEL_STD = (58.395, 57.12, 57.375)


def conv_norm(channels: int, out: int, kernel: int) -> nn.Sequential:
    """Convolution without bias, then GroupNorm; Kaiming-uniform weights (a=1)."""
    conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, nn.GroupNorm(min(32, out // 2), out))


class PixelDecoder(nn.Module):
    """FPN: res2..res5 -> mask features [B, hidden_dim, h, w] at stride 4."""

    def __init__(self, channels: list[int], hidden_dim: int):
        super().__init__()
        self.top = conv_norm(channels[-1], hidden_dim, 3)
        self.lateral = nn.ModuleList(conv_norm(c, hidden_dim, 1) for c in channels[:-1])
        self.output = nn.ModuleList(conv_norm(hidden_dim, hidden_dim, 3) for _ in channels[:-1])
        self.mask_features = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1)

    def forward(self, features: list[Tensor]) -> Tensor:
        y = F.relu(self.top(features[-1]))
        levels = zip(features[:-1], self.lateral, self.output, strict=True)
        for x, lateral, output in reversed([*levels]):
            x = lateral(x)
            y = F.relu(output(x + F.interpolate(y, x.shape[-2:], mode="nearest")))
        return self.mask_features(y)


def sine_positions(height: int, width: int, hidden_dim: int, device: torch.device) -> Tensor:
    """Normalised sine position encoding [height*width, hidden_dim], y before x (DETR; temperature
    10000, scale 2 pi).
    """
    axis = hidden_dim // 2
    frequency = 10000 ** (2 * (torch.arange(axis, device=device, dtype=torch.float32) // 2) / axis)

    axes = []
    for n in (height, width):
        position = torch.arange(1, n + 1, device=device, dtype=torch.float32)
        angle = (position / (n + 1e-6) * (2 * math.pi))[:, None] / frequency
        waves = [angle[:, 0::2].sin(), angle[:, 1::2].cos()]
        axes.append(torch.stack(waves, 2).flatten(1))  # [n, axis]
    y = axes[0][:, None].expand(height, width, axis)
    x = axes[1][None].expand(height, width, axis)
    return torch.cat([y, x], 2).flatten(0, 1)


class DecoderLayer(nn.Module):
    """Post-norm decoder layer; positions are added to queries and keys, never to values."""

    def __init__(self, hidden_dim: int, num_heads: int, feedforward: int, dropout: float):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(hidden_dim, num_heads, dropout)
        self.cross_attn = nn.MultiheadAttention(hidden_dim, num_heads, dropout)
        self.linear1 = nn.Linear(hidden_dim, feedforward)
        self.linear2 = nn.Linear(feedforward, hidden_dim)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.norm3 = nn.LayerNorm(hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, query_pos: Tensor, memory: Tensor, keys: Tensor) -> Tensor:
        """x and query_pos [Q, B, D], memory and keys (memory + positions) [h*w, B, D] -> like x,
        D = hidden_dim.
        """
        q = x + query_pos
        x = self.norm1(x + self.dropout(self.self_attn(q, q, x, need_weights=False)[0]))
        y = self.cross_attn(x + query_pos, keys, memory, need_weights=False)[0]
        x = self.norm2(x + self.dropout(y))
        y = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.norm3(x + self.dropout(y))


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with relu between them."""
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class PixelNetwork(nn.Module):
    """Backbone and pixel decoder, which MaskFormer and the one-stage baseline share. `model` is the
    section [model] of the configuration.
    """

    divisor = 32  # image sides are padded to a multiple of the coarsest stride

    def __init__(self, model: object):
        super().__init__()
        self.backbone = build_backbone(model)
        self.pixel_decoder = PixelDecoder(self.backbone.channels, model.hidden_dim)
        mean = torch.tensor(PIXEL_MEAN).view(3, 1, 1)
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

    def prepare(self, images: Tensor) -> Tensor:
        """RGB in 0..255 [B, 3, H, W], any dtype and size -> normalised, zero-padded at the right
        and bottom to multiples of `divisor`, fp32.
        """
        x = (images - self.pixel_mean) / self.pixel_std
        x = F.pad(x, (0, -x.shape[-1] % self.divisor, 0, -x.shape[-2] % self.divisor))
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            return x.contiguous(memory_format=torch.channels_last)  # as tensor cores read it
        return x


class MaskFormer(PixelNetwork):
    """Everything of the segmenter that learns.

    embed_dim: CLIP's feature width D, or with a linear class head C + 1; scale: factor of the
    cosines.
    """

    def __init__(self, model: object, embed_dim: int, scale: float = 100.0):
        super().__init__(model)
        self.scale = scale
        self.inference = self.decode
        dim = model.hidden_dim
        self.input_proj = nn.Conv2d(self.backbone.channels[-1], dim, 1)
        layer = (dim, model.num_heads, model.feedforward, model.dropout)
        self.layers = nn.ModuleList(DecoderLayer(*layer) for _ in range(model.decoder_layers))
        self.norm = nn.LayerNorm(dim)
        for p in self.layers.parameters():
            if p.ndim > 1:
                nn.init.xavier_uniform_(p)
        for conv in (self.input_proj, self.pixel_decoder.mask_features):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)
        self.query_embed = nn.Embedding(model.num_queries, dim)
        self.mask_embed = mlp(dim, dim, dim, dim)
        # Fully supervised MaskFormer: the embeddings are the logits.
        if model.class_head == "linear":
            self.class_embed = nn.Linear(dim, embed_dim)
            self.non_object = None
        else:
            self.class_embed = mlp(dim, model.class_hidden_dim, embed_dim)
            self.non_object = nn.Parameter(torch.empty(1, embed_dim))
            nn.init.normal_(self.non_object, std=embed_dim**-0.5)

    def decode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Queries of `prepare`d images [B, 3, H, W].

        Returns class embeddings [L, B, Q, D] and mask logits [L, B, Q, h, w] at stride 4; in eval
        mode of the last layer only (L = 1).
        """
        features = self.backbone(images)
        mask_features = self.pixel_decoder(features)  # [B, hidden_dim, h, w]
        memory = self.input_proj(features[-1])  # [B, hidden_dim, H/32, W/32]
        positions = sine_positions(*memory.shape[-2:], memory.shape[1], memory.device)
        memory = memory.flatten(2).permute(2, 0, 1)  # [H/32 * W/32, B, hidden_dim]
        keys = memory + positions[:, None]
        query_pos = self.query_embed.weight[:, None].expand(-1, len(images), -1)
        y = torch.zeros_like(query_pos)  # [Q, B, hidden_dim]
        outputs = []
        for layer in self.layers:
            y = layer(y, query_pos, memory, keys)
            outputs.append(y)
        # [L, B, Q, hidden_dim]
        y = self.norm(torch.stack(outputs if self.training else outputs[-1:])).transpose(1, 2)
        masks = torch.einsum("lbqc,bchw->lbqhw", self.mask_embed(y), mask_features)
        return self.class_embed(y), masks

    def classify(self, embeds: Tensor, text: Tensor | None) -> Tensor:
        """Class embeddings [..., D], text features [C, D] -> logits [..., C+1], the last column no
        object; fp32.
        """
        if self.non_object is None:
            return embeds.float()
        non_object = F.normalize(self.non_object.float(), dim=-1)
        return cosine_logits(embeds, torch.cat([text.float(), non_object]), self.scale)

    def forward(self, images: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor]:
        """`prepare`d images [B, 3, H, W] and text features [C, D], what torch.compile and DDP wrap.

        Class logits [L, B, Q, C+1] and mask logits [L, B, Q, h, w]; see `decode` and `classify`.
        """
        embeds, mask_logits = self.decode(images)
        return self.classify(embeds, text), mask_logits

    def propose(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Inference on RGB in 0..255 [3, H, W]: mask logits fp32 [Q, h, w] and class features
        [Q, D] for `classify`.
        """
        embeds, mask_logits = self.inference(self.prepare(image[None]))
        return mask_logits[-1, 0].float(), embeds[-1, 0]

    def compile_inference(self) -> None:
        """Compile what inference uses, for images of any size; another program than the one that
        training compiles.
        """
        program = torch.compile(self.decode, fullgraph=True)

        def inference(images: Tensor) -> tuple[Tensor, Tensor]:
            for dim in (2, 3):
                torch._dynamo.maybe_mark_dynamic(images, dim)
            return program(images)

        self.inference = inference
