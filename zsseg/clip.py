"""CLIP (Radford et al. 2021): ViT and ResNet image towers, text tower; sizes are read off the state
dict.

Parameter names are OpenAI's, so its weights load strictly and without a map. One object knows all
that callers need of a CLIP: pixel statistics, temperature, resolution, patches, tokenizer.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet

from zsseg.backbone import SmallResNet
from zsseg.tokenizer import Tokenizer
from zsseg.utils import UserError

MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's, of RGB in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
SCALE = 100.0  # where OpenAI's trained temperature ends


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (1.702 * x).sigmoid_() * x


ACTIVATIONS = {"quickgelu": QuickGELU, "gelu": nn.GELU}  # OpenAI's; that of most OpenCLIP models


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

    def forward(self, x: Tensor, mask: Tensor | None = None, count: int | None = None) -> Tensor:
        """[N, length, width] -> outputs of the first `count` tokens (all) [N, count, width]; `mask`
        [length, length] is added to the logits.
        """
        weight = self.in_proj_weight
        bias = self.in_proj_bias
        width = x.shape[-1]
        if count is None:
            q, k, v = F.linear(x, weight, bias).chunk(3, -1)
        else:
            q = F.linear(x[:, :count], weight[:width], bias[:width])
            k, v = F.linear(x, weight[width:], bias[width:]).chunk(2, -1)
        # [N, num_heads, count or length, width/num_heads]
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        mask = None if mask is None else mask.to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block; arguments of `forward` as in `Attention`."""

    def __init__(self, width: int, num_heads: int = 0, activation: str = "quickgelu"):
        super().__init__()
        self.attn = Attention(width, num_heads or max(width // 64, 1))
        self.ln_1 = nn.LayerNorm(width)
        self.ln_2 = nn.LayerNorm(width)
        fc = nn.Linear(width, 4 * width)
        proj = nn.Linear(4 * width, width)
        layers = OrderedDict(c_fc=fc, gelu=ACTIVATIONS[activation](), c_proj=proj)
        self.mlp = nn.Sequential(layers)

    def forward(self, x: Tensor, mask: Tensor | None = None, count: int | None = None) -> Tensor:
        x = x[:, :count] + self.attn(self.ln_1(x), mask, count)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Blocks on [N, length, width]; `mask` [length, length] is added to the attention logits."""

    def __init__(self, width: int, layers: int, num_heads: int = 0, activation: str = "quickgelu"):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, num_heads, activation) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


def cosine_logits(features: Tensor, text: Tensor, scale: float) -> Tensor:
    """scale x cosine: features [..., D], normalised text features [..., C, D] -> [..., C], in fp32
    under autocast, too: the steps of bf16 would be 0.1 wide and more.
    """
    with torch.autocast(text.device.type, enabled=False):
        return scale * F.normalize(features.float(), dim=-1) @ text.float().mT


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


class ConvStem(nn.Module):
    """The small CLIP's: a small backbone at stride 8, and a convolution that makes tokens at 16."""

    stride = 16

    def __init__(self, widths: Sequence[int], width: int):
        super().__init__()
        self.backbone = SmallResNet(widths)
        self.tokens = nn.Conv2d(widths[-1], width, 3, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.tokens(self.backbone(images)[-1])


class VisionTransformer(nn.Module):
    """ViT image tower; `patch` is the number of pixels from a patch to the next. `stem` gives the
    widths of a small backbone in front (the small CLIP); without it, plain patches.
    """

    def __init__(
        self,
        resolution: int,
        patch: int,
        width: int,
        layers: int,
        embed_dim: int,
        stem: Sequence[int] = (),
        num_heads: int = 0,
        activation: str = "quickgelu",
    ):
        super().__init__()
        self.resolution = resolution
        self.patch = patch
        if stem:
            self.conv1 = ConvStem(stem, width)
        else:
            self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        tokens = (resolution // patch) ** 2 + 1
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.ln_post = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, num_heads, activation)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        # [depth, T or 1, width]: the mask prompt of a CLIP that was adapted to masks
        self.register_parameter("mask_embedding", None)

    def forward(self, images: Tensor, shown: Tensor | None = None, dense: bool = False) -> Tensor:
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
        if shown is not None:
            x = self.hide(x, shown, 0)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.ln_pre(x + resize_positions(self.positional_embedding, *grid))
        *blocks, last = self.transformer.resblocks
        for layer, block in enumerate(blocks, 1):
            x = block(x)
            if shown is not None and layer < len(self.mask_embedding):
                x = torch.cat([x[:, :1], self.hide(x[:, 1:], shown, layer)], 1)
        if not dense:
            return self.ln_post(last(x, count=1)[:, 0]) @ self.proj
        rows = slice(-x.shape[-1], None)  # of the values
        attn = last.attn
        x = F.linear(last.ln_1(x[:, 1:]), attn.in_proj_weight[rows], attn.in_proj_bias[rows])
        return (self.ln_post(attn.out_proj(x)) @ self.proj).unflatten(1, grid)

    def hide(self, x: Tensor, shown: Tensor, layer: int) -> Tensor:
        """Patches [N, T, width], those not `shown` [N, T] replaced by the mask prompt after `layer`
        blocks (Liang et al. 2023, section 3.3).
        """
        return torch.where(shown[..., None], x, self.mask_embedding[layer])


class Bottleneck(resnet.Bottleneck):
    """ResNet block whose stride is an average pool, in the main path and in the shortcut."""

    def __init__(self, channels: int, planes: int, stride: int):
        super().__init__(channels, planes)
        self.pool = nn.AvgPool2d(stride)
        out = 4 * planes
        if stride > 1 or channels != out:
            conv = nn.Conv2d(channels, out, 1, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.pool(F.relu(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (self.downsample(self.pool(x)) if self.downsample else x))


class AttentionPool(nn.Module):
    """Attention over the grid and its mean; the mean's output is the image feature."""

    def __init__(self, side: int, width: int, num_heads: int, embed_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(side * side + 1, width))
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)

    def forward(self, x: Tensor, dense: bool) -> Tensor:
        """[N, width, h, w] -> [N, D], or with `dense` one feature a cell [N, h, w, D]."""
        grid = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # [N, h*w, width]
        x = torch.cat([x.mean(1, keepdim=True), x], 1)
        x = x + resize_positions(self.positional_embedding, *grid)
        q = self.q_proj(x[:, 1:] if dense else x[:, :1])
        # [N, num_heads, length, width/num_heads]
        q, k, v = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for y in (q, self.k_proj(x), self.v_proj(x))
        )
        y = F.scaled_dot_product_attention(q, k, v)
        out = self.c_proj(y.transpose(1, 2).flatten(2))
        return out.unflatten(1, grid) if dense else out[:, 0]


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: three-convolution stem, anti-aliased strides, attention pool."""

    patch = 32
    mask_embedding = None

    def __init__(
        self, layers: list[int], width: int, resolution: int, embed_dim: int, num_heads: int = 0
    ):
        super().__init__()
        self.resolution = resolution
        stem = pairwise((3, width // 2, width // 2, width))
        for i, (channels, out) in enumerate(stem, 1):
            conv = nn.Conv2d(channels, out, 3, 2 if i == 1 else 1, 1, bias=False)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", nn.BatchNorm2d(out))
        channels = width
        for i, depth in enumerate(layers):
            planes = width * 2**i
            blocks = [Bottleneck(channels, planes, 2 if i else 1)]
            channels = 4 * planes
            blocks += [Bottleneck(channels, planes, 1) for _ in range(depth - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        heads = num_heads or channels // 64
        self.attnpool = AttentionPool(resolution // 32, channels, heads, embed_dim)

    def forward(self, images: Tensor, dense: bool = False) -> Tensor:
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
        visual: nn.Module,
        tokenizer: Tokenizer,
        embed_dim: int,
        context_length: int,
        vocab_size: int,
        width: int,
        layers: int,
        activation: str = "quickgelu",
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        scale: float = SCALE,
    ):
        super().__init__()
        self.visual = visual
        self.resolution = visual.resolution
        self.patch = visual.patch
        self.has_mask_prompt = visual.mask_embedding is not None
        self.tokenizer = tokenizer
        self.embed_dim = embed_dim
        self.context_length = context_length
        self.width = width
        self.scale = scale
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.transformer = Transformer(width, layers, activation=activation)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        causal = torch.full((context_length, context_length), -math.inf).triu(1)
        self.register_buffer("causal_mask", causal, persistent=False)
        self.pixel_stats = (list(mean), list(std))
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    @property
    def device(self) -> torch.device:
        return self.text_projection.device

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Both towers, for contrastive training: features [N, D] each."""
        return self.encode_image(images), self.encode_text(tokens)

    def normalize(self, images: Tensor) -> Tensor:
        """RGB in 0..255 [..., 3, H, W] as the image tower takes it, fp32."""
        return (images / 255 - self.mean.view(3, 1, 1)) / self.std.view(3, 1, 1)

    def encode_image(self, images: Tensor, shown: Tensor | None = None) -> Tensor:
        """Normalised images [N, 3, H, W] -> [N, D]. shown: bool [N, H/p * W/p], the patches with
        the region; for a CLIP with a mask prompt (see `VisionTransformer.forward`).
        """
        return self.visual(images) if shown is None else self.visual(images, shown)

    def encode_dense(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] -> one feature a patch [N, H/p, W/p, D]."""
        return self.visual.forward(images, dense=True)  # compiled for no size

    def encode_text(self, tokens: Tensor) -> Tensor:
        """int64 [N, length] -> [N, D], read at the end token (the largest id)."""
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

    def logits(self, features: Tensor, text: Tensor) -> Tensor:
        """Features [..., D], normalised text features [..., C, D] -> class logits fp32 [..., C]."""
        return cosine_logits(features, text, self.scale)


def build_clip(
    state: dict[str, Tensor],
    tokenizer: Tokenizer,
    activation: str = "quickgelu",
    num_heads: int = 0,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    scale: float = SCALE,
) -> CLIP:
    """The model whose weights `state` contains (OpenAI names; any float dtype), in fp32, frozen, in
    eval mode.

    What the weights do not tell: the tokenizer, the MLPs' `activation`, `num_heads` of the image
    tower's attention (0: width / 64), and the statistics of `CLIP`. Raises UserError when `state`
    is not a whole CLIP, or its width cannot be shared by so many heads.
    """
    try:
        constants = ("input_resolution", "context_length", "vocab_size")
        state = {k: v for k, v in state.items() if k not in constants}
        embed_dim = state["text_projection"].shape[1]
        visual = build_visual(state, embed_dim, activation, num_heads)
        context_length = len(state["positional_embedding"])
        vocab_size, width = state["token_embedding.weight"].shape
        sizes = (embed_dim, context_length, vocab_size, width)
        layers = depth(state, "transformer.")
        clip = CLIP(visual, tokenizer, *sizes, layers, activation, mean, std, scale)
        clip.load_state_dict({k: v.float() for k, v in state.items()})
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        missing = "no " if isinstance(error, KeyError) else ""
        why = f"are not a CLIP state dict with OpenAI's names ({missing}{str(error)[:200]})"
        raise UserError("CLIP weights", why, "check clip.weights") from None
    return clip.eval().requires_grad_(False)


def build_visual(
    state: dict[str, Tensor], embed_dim: int, activation: str, num_heads: int
) -> nn.Module:
    """An image tower for the weights of a CLIP."""
    is_vit = "visual.proj" in state
    positions = "visual.positional_embedding" if is_vit else "visual.attnpool.positional_embedding"
    count, width = state[positions].shape
    side = math.isqrt(count - 1)
    if num_heads and width % num_heads:
        why = f"is {num_heads}, and the image tower's width {width}"
        raise UserError("clip.heads", why, "give a divisor of that, or 0")
    if not is_vit:
        layers = [depth(state, f"visual.layer{i}.", ".bn1.weight") for i in (1, 2, 3, 4)]
        return ModifiedResNet(layers, width // 32, 32 * side, embed_dim, num_heads)

    layers = depth(state, "visual.transformer.")
    patch = ConvStem.stride
    stem = ()
    if "visual.conv1.weight" in state:
        patch = state["visual.conv1.weight"].shape[-1]
    else:
        stem = [len(state[f"visual.conv1.backbone.stages.{i}.conv1.weight"]) for i in range(4)]
    sizes = (side * patch, patch, width, layers, embed_dim, stem)
    visual = VisionTransformer(*sizes, num_heads, activation)
    if "visual.mask_embedding" in state:
        shape = state["visual.mask_embedding"].shape
        if not 0 < shape[0] <= layers or shape[1:] not in ((1, width), (count - 1, width)):
            raise ValueError(f"a mask prompt of shape {list(shape)}")
        visual.mask_embedding = nn.Parameter(torch.empty(shape))
    return visual


def depth(state: dict[str, Tensor], prefix: str, leaf: str = ".ln_1.weight") -> int:
    """The number of blocks below `prefix`, each of which has one `leaf`; at least 1, which then
    does not fit.
    """
    return max(sum(k.startswith(prefix) and k.endswith(leaf) for k in state), 1)
