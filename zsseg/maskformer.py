"""MaskFormer with zero-shot classification (Cheng et al. 2021): image -> masks and class
embeddings.

Backbone -> FPN pixel decoder -> transformer decoder over learned queries -> heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from kernels.frozen import accelerated, freeze
from zsseg.backbone import BACKBONES
from zsseg.clip import cosine_logits

# Of RGB in 0..255
PIXELS = {"pixel_mean": (123.675, 116.28, 103.53), "pixel_std": (58.395, 57.12, 57.375)}


def conv_norm(channels, out, kernel):
    """Convolution without bias, then GroupNorm; Kaiming-uniform weights (a=1)."""
    conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, GroupNorm(min(32, out // 2), out))


def kaiming(conv):
    """The convolution with Kaiming-uniform weights (a=1) and no bias at first."""
    nn.init.kaiming_uniform_(conv.weight, a=1)
    nn.init.zeros_(conv.bias)
    return conv


class GroupNorm(nn.GroupNorm):
    """In the type of its input, with sums in fp32; autocast would keep all of it in fp32."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, self.bias.to(x.dtype), self.eps)


class PixelDecoder(nn.Module):
    """FPN: res2..res5 -> mask features [B, hidden_dim, h, w] at stride 4."""

    def __init__(self, channels, hidden_dim):
        super().__init__()
        self.top = conv_norm(channels[-1], hidden_dim, 3)
        self.lateral = nn.ModuleList(conv_norm(c, hidden_dim, 1) for c in channels[:-1])
        self.output = nn.ModuleList(conv_norm(hidden_dim, hidden_dim, 3) for _ in channels[:-1])
        self.mask_features = kaiming(nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1))

    def forward(self, features):
        y = F.relu(self.top(features[-1]))
        for i in (2, 1, 0):
            x = self.lateral[i](features[i])
            y = F.relu(self.output[i](x + F.interpolate(y, x.shape[-2:])))
        return self.mask_features(y)


def sine_positions(x):
    """Normalised sine position encoding for a map [B, hidden_dim, h, w]: [h*w, hidden_dim], y
    before x (DETR; temperature 10000, scale 2 pi).
    """
    _, dim, height, width = x.shape
    steps = torch.arange(dim // 2, device=x.device)
    frequency = 10000 ** (4 * (steps // 2) / dim)

    def axis(n):  # [n, hidden_dim/2]
        angle = torch.arange(1, n + 1, device=x.device)[:, None] / (n + 1e-6) * math.tau / frequency
        return torch.where(steps % 2 == 0, angle.sin(), angle.cos())

    return torch.cat([axis(height).repeat_interleave(width, 0), axis(width).repeat(height, 1)], 1)


class DecoderLayer(nn.Module):
    """Post-norm decoder layer; positions are added to queries and keys, never to values."""

    def __init__(self, model):
        super().__init__()
        dim = model.hidden_dim
        sizes = (dim, model.num_heads, model.dropout)
        self.self_attn = nn.MultiheadAttention(*sizes)
        self.cross_attn = nn.MultiheadAttention(*sizes)
        self.linear1 = nn.Linear(dim, model.feedforward)
        self.linear2 = nn.Linear(model.feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(model.dropout)

    def forward(self, x, query_pos, memory, keys):
        """x and query_pos [Q, B, D], memory and keys (memory + positions) [h*w, B, D] -> like x,
        D = hidden_dim.
        """
        q = x + query_pos
        x = self.norm1(x + self.dropout(self.self_attn(q, q, x, need_weights=False)[0]))
        y = self.cross_attn(x + query_pos, keys, memory, need_weights=False)[0]
        x = self.norm2(x + self.dropout(y))
        y = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.norm3(x + self.dropout(y))


class PixelNetwork(nn.Module):
    """Backbone and pixel decoder, which MaskFormer and the one-stage baseline share. `model` is the
    section [model] of the configuration.
    """

    divisor = 32  # image sides are padded to a multiple of the coarsest stride

    def __init__(self, model):
        super().__init__()
        self.backbone = BACKBONES[model.backbone](model)
        self.pixel_decoder = PixelDecoder(self.backbone.channels, model.hidden_dim)
        for name, values in PIXELS.items():
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def prepare(self, images):
        """RGB in 0..255 [B, 3, H, W], any dtype and size -> normalised, zero-padded at the right
        and bottom to multiples of `divisor`, fp32.
        """
        x = (images - self.pixel_mean) / self.pixel_std
        x = F.pad(x, (0, -x.shape[-1] % self.divisor, 0, -x.shape[-2] % self.divisor))
        if torch.is_autocast_enabled("cuda"):
            return x.contiguous(memory_format=torch.channels_last)  # as tensor cores read it
        return x

    def accelerate(self, dtype, graphs=False, compiled=False):
        """Make inference fast, after which nothing is learned: products in `dtype`, on a CPU in
        fp32; see `accelerated`. One program serves images of every size.
        """
        freeze(self, dtype if self.pixel_mean.is_cuda else torch.float32)
        graphs = graphs and self.divisor > 1  # else every image has a size of its own
        if graphs or compiled:
            self.decode = accelerated(self.decode, graphs, compiled)


class MaskFormer(PixelNetwork):
    """Everything of the segmenter that learns.

    embed_dim: CLIP's feature width D, or with a linear class head C + 1; scale: factor of the
    cosines.
    """

    def __init__(self, model, embed_dim, scale=100.0):
        super().__init__(model)
        self.scale = scale
        dim = model.hidden_dim
        self.input_proj = kaiming(nn.Conv2d(self.backbone.channels[-1], dim, 1))
        self.layers = nn.ModuleList(DecoderLayer(model) for _ in range(model.decoder_layers))
        self.norm = nn.LayerNorm(dim)
        for p in self.layers.parameters():
            if p.ndim > 1:
                nn.init.xavier_uniform_(p)
        self.query_embed = nn.Embedding(model.num_queries, dim)
        relu = nn.ReLU(inplace=True)
        layers = [nn.Linear(dim, dim), relu, nn.Linear(dim, dim), relu, nn.Linear(dim, dim)]
        self.mask_embed = nn.Sequential(*layers)
        self.non_object = None
        if model.class_head == "linear":  # fully supervised: the embeddings are the logits
            self.class_embed = nn.Linear(dim, embed_dim)
        else:
            hidden = model.class_hidden_dim
            layers = [nn.Linear(dim, hidden), relu, nn.Linear(hidden, embed_dim)]
            self.class_embed = nn.Sequential(*layers)
            self.non_object = nn.Parameter(embed_dim**-0.5 * torch.randn(1, embed_dim))

    def decode(self, images):
        """Queries of `prepare`d images [B, 3, H, W].

        Returns class embeddings [L, B, Q, D] and mask logits [L, B, Q, h, w] at stride 4; in eval
        mode of the last layer only (L = 1).
        """
        features = self.backbone(images)
        pixels = self.pixel_decoder(features)  # [B, hidden_dim, h, w]
        memory = self.input_proj(features[-1])  # [B, hidden_dim, H/32, W/32]
        positions = sine_positions(memory)
        memory = memory.flatten(2).permute(2, 0, 1)  # [H/32 * W/32, B, hidden_dim]
        keys = memory + positions[:, None]
        query_pos = self.query_embed.weight[:, None].expand(-1, len(images), -1)
        y = torch.zeros_like(query_pos)  # [Q, B, hidden_dim]
        outputs = [y := layer(y, query_pos, memory, keys) for layer in self.layers]
        # [L, B, Q, hidden_dim]
        y = self.norm(torch.stack(outputs if self.training else outputs[-1:])).transpose(1, 2)
        return self.class_embed(y), torch.einsum("lbqc,bchw->lbqhw", self.mask_embed(y), pixels)

    def classify(self, embeds, text):
        """Class embeddings [..., D], text features [C, D] -> logits [..., C+1], the last column no
        object; fp32.
        """
        if self.non_object is None:
            return embeds.float()
        text = torch.cat([text, F.normalize(self.non_object, dim=-1)])
        return cosine_logits(embeds, text, self.scale)

    def forward(self, images, text):
        """`prepare`d images [B, 3, H, W] and text features [C, D], what torch.compile and DDP wrap.

        Class logits [L, B, Q, C+1] and mask logits [L, B, Q, h, w]; see `decode` and `classify`.
        """
        embeds, mask_logits = self.decode(images)
        return self.classify(embeds, text), mask_logits

    def propose(self, image):
        """Inference on RGB in 0..255 [3, H, W]: mask logits fp32 [Q, h, w] and class features
        [Q, D] for `classify`.
        """
        embeds, mask_logits = self.decode(self.prepare(image[None]))
        return mask_logits[-1, 0].float(), embeds[-1, 0]
