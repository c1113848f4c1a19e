"""CLIP (Radford et al. 2021): ViT and ResNet image towers, text tower; sizes are read off the state
dict.

Parameter names are OpenAI's, so its weights load strictly and without a map.
"""

import functools
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg.backbone import SmallResNet
from zsseg.tokenizer import Tokenizer
from zsseg.utils import UserError

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
LOGIT_SCALE = 100  # that CLIP's trained temperature ends at


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = (1.702 * x).sigmoid_()
        return y * x if x.requires_grad else y.mul_(x)  # in place: fetching memory costs a CPU more


class Attention(nn.Module):
    """Self-attention with one product for queries, keys and values; parameters as in
    `nn.MultiheadAttention`.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}"

    def forward(self, x: Tensor, mask: Tensor | None, num_out_tokens: int = 0) -> Tensor:
        """[N, length, width] -> the same, or the output of the first `num_out_tokens`
        tokens only.
        """
        if num_out_tokens:
            width = x.shape[-1]
            q = F.linear(
                x[:, :num_out_tokens], self.in_proj_weight[:width], self.in_proj_bias[:width]
            )
            k, v = F.linear(x, self.in_proj_weight[width:], self.in_proj_bias[width:]).chunk(2, -1)
        else:
            q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        # [N, num_heads, length, width/num_heads]
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        mask = None if mask is None else mask[: num_out_tokens or None].to(q.dtype)
        return self.out_proj(
            F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        )


ACTIVATIONS = {"quickgelu": QuickGELU, "gelu": nn.GELU}  # OpenAI's; that of most OpenCLIP models


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int = 0, activation: str = "quickgelu"):
        super().__init__()
        self.attn = Attention(width, num_heads or max(width // 64, 1))
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        gelu = ACTIVATIONS[activation]()
        layers = [
            ("c_fc", nn.Linear(width, 4 * width)),
            ("gelu", gelu),
            ("c_proj", nn.Linear(4 * width, width)),
        ]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, mask: Tensor | None, num_out_tokens: int = 0) -> Tensor:
        y = self.attn(self.ln_1(x), mask, num_out_tokens)
        x = (x[:, :num_out_tokens] if num_out_tokens else x) + y
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Pre-norm blocks on [N, length, width]; `mask` [length, length] is added to the attention
    logits.

    With `num_out_tokens` the last block computes the first so many tokens only: [N, num_out_tokens,
    width]. With `first`, the blocks before that one are left out.
    """

    def __init__(self, width: int, layers: int, num_heads: int = 0, activation: str = "quickgelu"):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, num_heads, activation) for _ in range(layers))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, num_out_tokens: int = 0, first: int = 0
    ) -> Tensor:
        for i, block in enumerate(self.resblocks[first:], first + 1):
            x = block(x, mask, num_out_tokens if i == len(self.resblocks) else 0)
        return x


def cosine_logits(features: Tensor, text: Tensor) -> Tensor:
    """100 x cosine: features [..., D], normalised text features [..., C, D] -> [..., C], in fp32
    under autocast, too: the steps of bf16 would be 0.1 wide and more.
    """
    with torch.autocast(text.device.type, enabled=False):
        return LOGIT_SCALE * F.normalize(features.float(), dim=-1) @ text.float().mT


def resize_positions(positions: Tensor, height: int, width: int) -> Tensor:
    """Position embeddings [1+n*n, D] -> [1+height*width, D]: bicubic on the grid, the class token
    as it is.
    """
    side = math.isqrt(len(positions) - 1)
    if (side, side) == (height, width):
        return positions
    grid = positions[1:].T.reshape(1, -1, side, side)  # [1, D, n, n]
    grid = F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid.flatten(2)[0].T])


class VisionTransformer(nn.Module):
    """ViT image tower. `stem` gives the widths of a small backbone in front (the small CLIP);
    without it, plain patches.
    """

    def __init__(
        self,
        resolution: int,
        patch: int,
        width: int,
        layers: int,
        embed_dim: int,
        stem: list[int] = (),
        num_heads: int = 0,
        activation: str = "quickgelu",
    ):
        super().__init__()
        self.resolution = resolution
        self.conv1 = (
            ConvStem(stem, width) if stem else nn.Conv2d(3, width, patch, patch, bias=False)
        )
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        tokens = (resolution // patch) ** 2 + 1
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(tokens, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, num_heads, activation)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        # [depth, H/p * W/p or 1, width]: the mask prompt, of a CLIP that was adapted to masks
        self.register_parameter("mask_embedding", None)

    def embed_patches(
        self, images: Tensor, token_mask: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """The tokens that enter the transformer [N, 1 + H/p * W/p, width], and (H/p, W/p);
        `token_mask` as in `forward`.
        """
        plain = isinstance(self.conv1, nn.Conv2d)
        # [N, width, H/p, W/p]
        x = patch_tokens(images, self.conv1.weight) if plain else self.conv1(images)
        height, width = x.shape[-2:]
        # [N, H/p * W/p, width]; tokens stay fp32 between the blocks under autocast
        x = self.prompted(x.flatten(2).transpose(1, 2).float(), token_mask, 0)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        return self.ln_pre(x + resize_positions(self.positional_embedding, height, width)), (
            height,
            width,
        )

    def prompted(self, x: Tensor, token_mask: Tensor | None, layer: int) -> Tensor:
        """Patches [N, T, width], those that `token_mask` [N, T] leaves out as the mask prompt has
        them behind `layer` blocks (Liang et al. 2023, section 3.3).
        """
        if token_mask is None:
            return x
        return torch.where(token_mask[..., None], x, self.mask_embedding[layer])

    def forward(
        self, images: Tensor, dense: bool = False, token_mask: Tensor | None = None
    ) -> Tensor:
        """Normalised images [N, 3, H, W] -> [N, D], or with `dense` one feature a patch [N, H/p,
        W/p, D].

        token_mask: bool [N, H/p * W/p], the patches that show the region; the others become the
        mask prompt, in front of each of the first blocks. The class token stays.
        """
        x, grid = self.embed_patches(images, token_mask)
        first = 0 if token_mask is None else len(self.mask_embedding) - 1
        for layer, block in enumerate(self.transformer.resblocks[:first], 1):
            x = block(x, None)
            x = torch.cat([x[:, :1], self.prompted(x[:, 1:], token_mask, layer)], 1)
        x = self.transformer(x, num_out_tokens=0 if dense else 1, first=first)
        if not dense:
            return self.ln_post(x[:, 0]) @ self.proj
        return (self.ln_post(x[:, 1:]) @ self.proj).unflatten(1, grid)

    def values(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] -> features of the patches [N, H/p, W/p, D], from the last
        block's values alone.

        Without the last attention a patch keeps its own meaning (MaskCLIP, Zhou et al. 2022).
        """
        x, grid = self.embed_patches(images)
        *blocks, last = self.transformer.resblocks
        for block in blocks:
            x = block(x, None)
        width, attn = x.shape[-1], last.attn
        x = attn.out_proj(
            F.linear(
                last.ln_1(x[:, 1:]),
                attn.in_proj_weight[2 * width :],
                attn.in_proj_bias[2 * width :],
            )
        )
        return (self.ln_post(x) @ self.proj).unflatten(1, grid)

    def region_tokens(self, image: Tensor, masks: Tensor) -> Tensor:
        """Image [1, 3, H, W], masks [P, h, w] in 0..1 -> one feature a region [P, D], from a single
        pass.

        Each region has a class token of its own, which attends to itself and to the patches that
        are mostly under its mask (at least the one with the largest share). Patches attend to what
        they were trained on: one another and the usual class token. So what the patches become does
        not depend on the regions.
        """
        x, grid = self.embed_patches(image)
        P, N = len(masks), x.shape[1]
        share = F.adaptive_avg_pool2d(masks, grid).flatten(1)  # [P, N - 1]
        under = (share > 0.5) | (share == share.amax(1, keepdim=True))
        bias = torch.full((P + N, P + N), -math.inf, device=x.device)
        bias[:P, :P].fill_diagonal_(0)
        bias[:P, P + 1 :].masked_fill_(under, 0)
        bias[P:, P:] = 0
        x = self.transformer(torch.cat([x[:, :1].expand(-1, P, -1), x], 1), bias, num_out_tokens=P)
        return self.ln_post(x[0]) @ self.proj

    @property
    def stride(self) -> int:
        """Pixels from a patch to the next."""
        stride = self.conv1.stride
        return stride[0] if isinstance(self.conv1, nn.Conv2d) else stride


def patch_tokens(images: Tensor, weight: Tensor) -> Tensor:
    """Non-overlapping patches of images [N, 3, H, W] times weight [width, 3, p, p] -> [N, width,
    H/p, W/p].

    A convolution whose stride is its width, as one matrix product: what tensor cores, and CPUs, do
    best.
    """
    p = weight.shape[-1]
    h, w = images.shape[-2] // p, images.shape[-1] // p
    # [N, h, w, 3, p, p]
    x = images[..., : h * p, : w * p].reshape(-1, 3, h, p, w, p).permute(0, 2, 4, 1, 3, 5)
    return F.linear(x.reshape(-1, h, w, 3 * p * p), weight.flatten(1)).permute(0, 3, 1, 2)


class ConvStem(nn.Module):
    """The small CLIP's: a small backbone at stride 8, and a convolution that makes tokens at 16."""

    stride = 16

    def __init__(self, widths: list[int], width: int):
        super().__init__()
        self.backbone = SmallResNet(widths)
        self.tokens = nn.Conv2d(widths[-1], width, 3, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.tokens(self.backbone(images)[-1])


class Bottleneck(nn.Module):
    """ResNet block whose stride is an average pool, in the main path and in the shortcut."""

    def __init__(self, channels: int, planes: int, stride: int):
        super().__init__()
        out = 4 * planes
        self.conv1, self.bn1 = nn.Conv2d(channels, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = (
            nn.Conv2d(planes, planes, 3, padding=1, bias=False),
            nn.BatchNorm2d(planes),
        )
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(planes, out, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = None
        if stride > 1 or channels != out:
            pool, conv = nn.AvgPool2d(stride), nn.Conv2d(channels, out, 1, bias=False)
            self.downsample = nn.Sequential(
                OrderedDict([("-1", pool), ("0", conv), ("1", nn.BatchNorm2d(out))])
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.pool(F.relu(self.bn2(self.conv2(y))))
        return F.relu(
            self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x))
        )


class AttentionPool(nn.Module):
    """Attention over the grid and its mean; the mean's output is the image feature."""

    def __init__(self, side: int, width: int, num_heads: int, embed_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(side * side + 1, width))
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, embed_dim)

    def forward(self, x: Tensor, dense: bool) -> Tensor:
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # [N, h*w, width]
        x = torch.cat([x.mean(1, keepdim=True), x], 1)
        x = x + resize_positions(self.positional_embedding, height, width).to(x.dtype)
        query = x[:, 1:] if dense else x[:, :1]
        q, k, v = (
            proj(y)
            .unflatten(-1, (self.num_heads, -1))
            .transpose(1, 2)  # [N, num_heads, length, width/num_heads]
            for proj, y in ((self.q_proj, query), (self.k_proj, x), (self.v_proj, x))
        )
        # [N, length, D]
        out = self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out.unflatten(1, (height, width)) if dense else out[:, 0]


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: three-convolution stem, anti-aliased strides, attention pool."""

    stride = 32
    mask_embedding = None

    def __init__(
        self, layers: list[int], width: int, resolution: int, embed_dim: int, num_heads: int = 0
    ):
        super().__init__()
        self.resolution = resolution
        half = width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, 2, 1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = (
            nn.Conv2d(half, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        channels = width
        for i, depth in enumerate(layers):
            planes = width * 2**i
            blocks = [
                Bottleneck(channels if j == 0 else 4 * planes, planes, 1 if i == 0 or j else 2)
                for j in range(depth)
            ]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            channels = 4 * planes
        self.attnpool = AttentionPool(
            resolution // 32, channels, num_heads or channels // 64, embed_dim
        )

    def forward(self, images: Tensor, dense: bool = False) -> Tensor:
        """Normalised images [N, 3, H, W] -> [N, D], or with `dense` [N, H/32, W/32, D]."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.attnpool(x, dense)


class CLIP(nn.Module):
    """Two towers and a temperature. Image and text features have the same width D; callers
    normalise them.
    """

    def __init__(
        self,
        visual: nn.Module,
        embed_dim: int,
        context_length: int,
        vocab_size: int,
        width: int,
        layers: int,
        activation: str = "quickgelu",
    ):
        super().__init__()
        self.visual = visual
        self.embed_dim = embed_dim
        self.width = width  # of the text tower
        self.bucketed = False  # compiled: batches of few sizes, see `regions.encode_crops`
        self.max_batch = 0  # that memory had room for at once, where it ended; 0: not met
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.transformer = Transformer(width, layers, activation=activation)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_buffer(
            "causal_mask",
            torch.full((context_length, context_length), -math.inf).triu(1),
            persistent=False,
        )
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    @property
    def context_length(self) -> int:
        return len(self.positional_embedding)

    @property
    def device(self) -> torch.device:
        return self.text_projection.device

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.token_embedding.num_embeddings, self.context_length)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Both towers, for contrastive training: features [N, D] each."""
        return self.encode_image(images), self.encode_text(tokens)

    def encode_image(
        self, images: Tensor, dense: bool = False, token_mask: Tensor | None = None
    ) -> Tensor:
        """See `VisionTransformer.forward`; `token_mask` wants a mask prompt."""
        return (
            self.visual(images, dense)
            if token_mask is None
            else self.visual(images, dense, token_mask)
        )

    def encode_text(self, tokens: Tensor) -> Tensor:
        """int64 [N, context_length] -> [N, D], read at the end token (the largest id)."""
        return self.encode_embedded(self.token_embedding(tokens), tokens.argmax(-1))

    def encode_embedded(self, x: Tensor, end: Tensor) -> Tensor:
        """Token embeddings [N, length, width] and the end tokens at [N] -> [N, D]; length at most
        context_length, since no token sees what follows it.
        """
        length = x.shape[1]
        mask = self.causal_mask[:length, :length]
        x = self.transformer(x + self.positional_embedding[:length], mask)
        x = self.ln_final(x[torch.arange(len(x), device=x.device), end])
        return x @ self.text_projection


def build_clip(state: dict[str, Tensor], activation: str = "quickgelu", num_heads: int = 0) -> CLIP:
    """The model whose weights `state` holds (OpenAI names; any float dtype), in fp32, frozen, in
    eval mode.

    What the weights do not tell: the MLPs' `activation`, and `num_heads` of the image tower's
    attention (0: width / 64). Raises UserError when `state` is not a whole CLIP, or its width
    cannot be shared by so many heads.
    """
    try:
        state = {
            k: v
            for k, v in state.items()
            if k not in ("input_resolution", "context_length", "vocab_size")
        }
        embed_dim = state["text_projection"].shape[1]
        vocab_size, width = state["token_embedding.weight"].shape
        text = (
            embed_dim,
            len(state["positional_embedding"]),
            vocab_size,
            width,
            depth(state, "transformer.resblocks"),
        )
        visual = build_visual(state, embed_dim, activation, num_heads)
        if "visual.mask_embedding" in state:
            visual.mask_embedding = mask_prompt(visual, state["visual.mask_embedding"])
        clip = CLIP(visual, *text, activation)
        clip.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        )
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            "CLIP weights", f"are not a CLIP state dict ({str(error)[:200]})", "check clip.weights"
        ) from None
    return clip.eval().requires_grad_(False)


def build_visual(
    state: dict[str, Tensor], embed_dim: int, activation: str, num_heads: int
) -> nn.Module:
    """The image tower of a CLIP whose weights `state` holds."""
    widths = [
        len(state[k])
        for k in ("visual.class_embedding", "visual.attnpool.q_proj.weight")
        if k in state
    ]
    if num_heads and widths and widths[0] % num_heads:
        raise UserError(
            "clip.heads",
            f"is {num_heads}, and the image tower's width {widths[0]}",
            "give a divisor of that, or 0",
        )
    if "visual.proj" not in state:
        layers = [depth(state, f"visual.layer{i}") for i in (1, 2, 3, 4)]
        side = math.isqrt(len(state["visual.attnpool.positional_embedding"]) - 1)
        return ModifiedResNet(
            layers, len(state["visual.layer1.0.conv1.weight"]), 32 * side, embed_dim, num_heads
        )
    width, layers = (
        len(state["visual.class_embedding"]),
        depth(state, "visual.transformer.resblocks"),
    )
    side = math.isqrt(len(state["visual.positional_embedding"]) - 1)
    if "visual.conv1.weight" in state:
        patch = state["visual.conv1.weight"].shape[-1]
        return VisionTransformer(
            side * patch, patch, width, layers, embed_dim, (), num_heads, activation
        )
    stages = [f"visual.conv1.backbone.stages.{i}.conv1.weight" for i in range(4)]
    return VisionTransformer(
        ConvStem.stride * side,
        ConvStem.stride,
        width,
        layers,
        embed_dim,
        [len(state[stage]) for stage in stages],
        num_heads,
        activation,
    )


def mask_prompt(visual: VisionTransformer, embedding: Tensor) -> nn.Parameter:
    """Room for a mask prompt [depth, T, width]; ValueError for one that does not fit the tower: T
    is 1 or the number of its patches, depth at most that of its blocks.
    """
    depth, T, width = embedding.shape
    tokens, blocks = len(visual.positional_embedding) - 1, len(visual.transformer.resblocks)
    if not 0 < depth <= blocks or T not in (1, tokens) or width != visual.proj.shape[0]:
        raise ValueError(f"a mask prompt of shape {list(embedding.shape)}")
    return nn.Parameter(torch.empty(embedding.shape))


def depth(state: dict[str, Tensor], prefix: str) -> int:
    """How many numbered modules lie below `prefix`."""
    numbers = {k[len(prefix) + 1 :].split(".")[0] for k in state if k.startswith(prefix + ".")}
    if not numbers:
        raise KeyError(prefix)
    return len(numbers)
