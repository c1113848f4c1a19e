"""CLIP (Radford et al. 2021): ViT and ResNet image towers, text tower; sizes are read off the state
dict.

Parameter names are OpenAI's, so its weights load strictly and without a map. One object knows all
that callers need of a CLIP: pixel statistics, temperature, resolution, patches, tokenizer.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import Bottleneck, conv3x3

from kernels.frozen import Linear, QuickGELU, accelerated, freeze, linear
from zsseg.backbone import SmallResNet
from zsseg.utils import UserError

MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's, of RGB in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
CONSTANTS = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's files
SCALE = 100.0  # where OpenAI's trained temperature ends


ACTIVATIONS = {"quickgelu": QuickGELU, "gelu": nn.GELU}  # OpenAI's; that of most OpenCLIP models


def attend(q, k, v, num_heads, causal=False):
    """Attention of queries [N, n, width] to keys and values [N, m, width] -> [N, n, width]; causal:
    no token sees what follows it.
    """
    # [N, num_heads, length, width/num_heads]
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class Attention(nn.MultiheadAttention):
    """Self-attention with one product for queries, keys and values."""

    def forward(self, x, causal=False, count=None):
        """[N, length, width] -> outputs of the first `count` tokens (all) [N, count, width]."""
        q, k, v = linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        x = attend(q[:, :count], k, v, self.num_heads, causal)
        return linear(x, self.out_proj.weight, self.out_proj.bias)


class Block(nn.Module):
    """Pre-norm transformer block; arguments of `forward` as in `Attention`; `num_heads` 0: width /
    64.
    """

    def __init__(self, width, num_heads, activation):
        super().__init__()
        self.attn = Attention(width, num_heads or width // 64)
        self.ln_1 = nn.LayerNorm(width)
        self.ln_2 = nn.LayerNorm(width)
        wide = 4 * width
        layers = OrderedDict(c_fc=Linear(width, wide), gelu=ACTIVATIONS[activation]())
        self.mlp = nn.Sequential(layers | {"c_proj": Linear(wide, width)})

    def forward(self, x, causal=False, count=None):
        x = x[:, :count] + self.attn(self.ln_1(x), causal, count)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Blocks on [N, length, width]; as a module the text tower's, where no token sees what follows
    it.
    """

    def __init__(self, width, layers, num_heads, activation):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, num_heads, activation) for _ in range(layers))

    def forward(self, x):
        for block in self.resblocks:
            x = block(x, causal=True)
        return x


def cosine_logits(features, text, scale):
    """scale x cosine: features [..., D], normalised text features [..., C, D] -> [..., C], in fp32
    under autocast, too: the steps of bf16 would be 0.1 wide and more.
    """
    with torch.autocast(text.device.type, enabled=False):
        return scale * F.normalize(features.float(), dim=-1) @ text.float().mT


def resize_positions(positions, grid):
    """Position embeddings [1+n*n, D] -> [1+h*w, D] for a grid of h x w: bicubic, the class token as
    it is.
    """
    side = math.isqrt(len(positions) - 1)
    if (side, side) == grid:
        return positions
    cells = positions[1:].T.unflatten(1, (side, side))[None]  # [1, D, n, n]
    cells = F.interpolate(cells, grid, mode="bicubic")
    return torch.cat([positions[:1], cells.flatten(2)[0].T])


class ConvStem(nn.Module):
    """The small CLIP's: a small backbone at stride 8, and a convolution that makes tokens at 16."""

    stride = 16

    def __init__(self, widths, width):
        super().__init__()
        self.backbone = SmallResNet(widths)
        self.tokens = nn.Conv2d(widths[-1], width, 3, 2, 1)

    def forward(self, images):
        return self.tokens(self.backbone(images)[-1])


class VisionTransformer(nn.Module):
    """ViT image tower; `patch` is the number of pixels from a patch to the next. `stem` gives the
    widths of a small backbone in front (the small CLIP); without it, plain patches.
    """

    def __init__(
        self,
        resolution,
        patch,
        width,
        layers,
        embed_dim,
        stem=(),
        num_heads=0,
        activation="quickgelu",
    ):
        super().__init__()
        self.resolution = resolution
        self.patch = patch
        if stem:
            self.conv1 = ConvStem(stem, width)
        else:
            self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        std = width**-0.5
        tokens = (resolution // patch) ** 2 + 1
        self.class_embedding = nn.Parameter(std * torch.randn(width))
        self.positional_embedding = nn.Parameter(std * torch.randn(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.ln_post = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, num_heads, activation)
        self.proj = nn.Parameter(std * torch.randn(width, embed_dim))
        # [depth, T or 1, width]: the mask prompt of a CLIP that was adapted to masks
        self.mask_embedding = None

    def forward(self, images, shown=None, dense=False):
        """Normalised images [N, 3, H, W] -> [N, D], or with `dense` one feature a patch [N, H/p,
        W/p, D].

        shown: bool [N, H/p * W/p], the patches that show the region; the others become the mask
        prompt, in front of each of the first blocks. The class token stays.

        Dense features are from the last block's values only: without the last attention a patch
        retains its own meaning (MaskCLIP, Zhou et al. 2022).
        """
        x = self.conv1(images)  # [N, width, H/p, W/p]
        grid = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2).float()  # fp32 between the blocks under autocast, too
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.hide(x, shown, 0)
        x = self.ln_pre(x + resize_positions(self.positional_embedding, grid))
        *blocks, last = self.transformer.resblocks
        for layer, block in enumerate(blocks, 1):
            x = self.hide(block(x), shown, layer)
        if not dense:
            return self.ln_post(last(x, count=1)[:, 0]) @ self.proj
        attn = last.attn
        x = linear(last.ln_1(x[:, 1:]), attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)[2]
        x = linear(x, attn.out_proj.weight, attn.out_proj.bias)
        return (self.ln_post(x) @ self.proj).unflatten(1, grid)

    def hide(self, x, shown, layer):
        """Tokens [N, 1+T, width], patches that are not `shown` [N, T] replaced by the mask prompt
        after `layer` blocks (Liang et al. 2023, section 3.3).
        """
        if shown is None or layer >= len(self.mask_embedding):
            return x
        patches = torch.where(shown[..., None], x[:, 1:], self.mask_embedding[layer])
        return torch.cat([x[:, :1], patches], 1)


class PooledConv(nn.Conv2d):
    """A convolution of 1x1 whose stride is an average pool in front."""

    def forward(self, x):
        return F.conv2d(F.avg_pool2d(x, self.stride), self.weight)


def bottleneck(channels, planes, stride):
    """ResNet block with `PooledConv`s for strides."""
    out = 4 * planes
    block = Bottleneck(channels, planes)
    block.conv3 = PooledConv(planes, out, 1, stride, bias=False)
    if channels != out:
        conv = PooledConv(channels, out, 1, stride, bias=False)
        block.downsample = nn.Sequential(conv, nn.BatchNorm2d(out))
    return block


class AttentionPool(nn.Module):
    """Attention over the grid and its mean; the mean's output is the image feature."""

    def __init__(self, side, width, embed_dim):
        super().__init__()
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(side * side + 1, width))
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)

    def forward(self, x, dense):
        """[N, width, h, w] -> [N, D], or with `dense` one feature a cell [N, h, w, D]."""
        grid = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # [N, h*w, width]
        x = torch.cat([x.mean(1, keepdim=True), x], 1)
        x = x + resize_positions(self.positional_embedding, grid)
        q = self.q_proj(x[:, 1:] if dense else x[:, :1])
        x = self.c_proj(attend(q, self.k_proj(x), self.v_proj(x), x.shape[-1] // 64))
        return x.unflatten(1, grid) if dense else x[:, 0]


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: three-convolution stem, anti-aliased strides, attention pool."""

    patch = 32
    mask_embedding = None

    def __init__(self, layers, width, resolution, embed_dim):
        super().__init__()
        self.resolution = resolution
        channels = 3
        for i, out in enumerate((width // 2, width // 2, width), 1):
            self.add_module(f"conv{i}", conv3x3(channels, out, 2 if i == 1 else 1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(out))
            channels = out
        for i, depth in enumerate(layers):
            planes = width * 2**i
            blocks = []
            for k in range(depth):
                blocks.append(bottleneck(channels, planes, 1 if k or not i else 2))
                channels = 4 * planes
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool(resolution // 32, channels, embed_dim)

    def forward(self, images, shown=None, dense=False):
        """Normalised images [N, 3, H, W] -> [N, D], or with `dense` [N, H/32, W/32, D]."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.attnpool(x, dense)


class CLIP(nn.Module):
    """Two towers, a tokenizer, and what belongs to them. Image and text features have the same
    width D = `embed_dim`; callers normalise them.

    resolution: side of the square images that the image tower was trained with; patch: pixels from
    a patch to the next; mean, std: of its RGB in 0..1 (buffers [3], not in the state dict), and the
    same as Python numbers in `pixel_stats`, which a kernel takes without waiting for the GPU.
    has_mask_prompt: `encode_image` takes `shown`. scale: factor of the cosines. width: of the text
    tower. The tokenizer is any object with
    `start`, `end`, `encode(text) -> ids` and a call, texts -> int64 [N, context_length].
    """

    def __init__(
        self,
        visual,
        tokenizer,
        embed_dim,
        context_length,
        vocab_size,
        width,
        layers,
        activation="quickgelu",
        mean=MEAN,
        std=STD,
        scale=SCALE,
    ):
        super().__init__()
        self.visual = visual
        self.resolution = visual.resolution
        self.patch = visual.patch
        self.has_mask_prompt = visual.mask_embedding is not None
        self.tokenizer = tokenizer
        self.embed_dim = embed_dim
        self.width = width
        self.scale = scale
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.transformer = Transformer(width, layers, 0, activation)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.pixel_stats = ([*mean], [*std])
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def normalize(self, images):
        """RGB in 0..255 [..., 3, H, W] as the image tower takes it, fp32."""
        return (images / 255 - self.mean.view(3, 1, 1)) / self.std.view(3, 1, 1)

    def encode_image(self, images, shown=None):
        """Normalised images [N, 3, H, W] -> [N, D]. shown: bool [N, H/p * W/p], the patches with
        the region; for a CLIP with a mask prompt (see `VisionTransformer.forward`).
        """
        return self.visual(images, shown)

    def encode_dense(self, images):
        """Normalised images [N, 3, H, W] -> one feature a patch [N, H/p, W/p, D]."""
        return self.visual(images, dense=True)

    def accelerate(self, dtype, graphs=False, compiled=False):
        """Make the image tower, which does not learn from now on, as fast as it can be, with
        products in `dtype`; see `accelerated`.
        """
        freeze(self.visual, dtype, pack=self.mean.device.type == "cpu" and not compiled)
        if graphs or compiled:
            self.encode_image = accelerated(self.encode_image, graphs, compiled)
            self.encode_dense = accelerated(self.encode_dense, graphs)

    def encode_text(self, tokens):
        """int64 [N, length] -> [N, D], read at the end token (the largest id)."""
        return self.encode_embedded(self.token_embedding(tokens), tokens.argmax(-1))

    def encode_embedded(self, x, end):
        """Token embeddings [N, length, width] and the end tokens at [N] -> [N, D]; length at most
        context_length, since no token sees what follows it.
        """
        x = self.transformer(x + self.positional_embedding[: x.shape[1]])
        x = self.ln_final(x[torch.arange(len(x), device=x.device), end])
        return x @ self.text_projection

    def logits(self, features, text):
        """Features [..., D], normalised text features [..., C, D] -> class logits fp32 [..., C]."""
        return cosine_logits(features, text, self.scale)


def build_clip(state, tokenizer, activation="quickgelu", heads=0, **statistics):
    """The model whose weights `state` contains (OpenAI names; any float dtype), in fp32, frozen, in
    eval mode.

    What the weights do not tell: the tokenizer, the MLPs' `activation`, the `heads` of a ViT's
    attention (0: width / 64), and mean, std and scale of `CLIP`. Raises UserError when `state` is
    not a whole CLIP, or its width cannot be shared by so many heads.
    """
    try:
        width, embed_dim = state["text_projection"].shape
        visual = build_visual(state, embed_dim, activation, heads)
        tables = (state["positional_embedding"], state["token_embedding.weight"])
        sizes = (embed_dim, *map(len, tables), width, depth(state, "transformer."))
        clip = CLIP(visual, tokenizer, *sizes, activation, **statistics)
        clip.load_state_dict({k: v for k, v in state.items() if k not in CONSTANTS})
    except Exception as error:  # of many types
        why = f"are not a CLIP state dict with OpenAI's names ({error!r:.200})"
        raise UserError("CLIP weights", why, "check clip.weights and clip.heads") from None
    return clip.eval().requires_grad_(False)


def build_visual(state, embed_dim, activation, num_heads):
    """An image tower for the weights of a CLIP; arguments as of `build_clip`."""
    prefix = "visual." if "visual.proj" in state else "visual.attnpool."
    count, width = state[f"{prefix}positional_embedding"].shape
    side = math.isqrt(count - 1)
    if "visual.proj" not in state:
        layers = [depth(state, f"visual.layer{i}.", ".bn1.weight") for i in (1, 2, 3, 4)]
        return ModifiedResNet(layers, width // 32, 32 * side, embed_dim)
    if "visual.conv1.weight" in state:
        stem = ()
        patch = state["visual.conv1.weight"].shape[-1]
    else:
        stem = [len(state[f"visual.conv1.backbone.stages.{i}.conv1.weight"]) for i in range(4)]
        patch = ConvStem.stride
    sizes = (side * patch, patch, width, depth(state, "visual.transformer."), embed_dim, stem)
    visual = VisionTransformer(*sizes, num_heads, activation)
    if "visual.mask_embedding" in state:
        visual.mask_embedding = nn.Parameter(state["visual.mask_embedding"].float())
    return visual


def depth(state, prefix, leaf=".ln_1.weight"):
    """The number of blocks below `prefix`, each of which has one `leaf`; at least 1, which then
    does not fit.
    """
    return max(sum(k.startswith(prefix) and k.endswith(leaf) for k in state), 1)
