"""Networks that learn no more, made fast: weights in the type of the products, on a CPU packed for
them; CUDA graphs, which a single launch replays.
"""

import itertools
import threading
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchvision import ops

from kernels.jit import on_device

ROWS = 8 * 197  # that packed weights are laid out for: 8 crops of a ViT-B/16
MAX_GRAPHS = 64  # that a function keeps; those used last


def linear(x, weight, bias):
    """F.linear, also with a weight that `freeze` has packed."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """A layer whose weight `freeze` may pack."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class QuickGELU(nn.Module):
    """OpenAI's, x sigmoid(1.702 x)."""

    def forward(self, x):
        return (1.702 * x).sigmoid_() * x


class FrozenBatchNorm2d(ops.FrozenBatchNorm2d):
    """torchvision's, which `convolve` applies: x * scale + shift, both made when it is loaded."""

    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("scale", torch.empty(channels), persistent=False)
        self.register_buffer("shift", torch.empty(channels), persistent=False)
        self.prepare()

    def prepare(self):
        self.scale.copy_(self.weight * (self.running_var + self.eps).rsqrt())
        self.shift.copy_(self.bias - self.running_mean * self.scale)

    def _load_from_state_dict(self, *arguments):
        super()._load_from_state_dict(*arguments)
        self.prepare()


def pairs(*parts):
    """Every frozen batch norm in there, with the convolution that it follows."""
    for layer in itertools.chain(*(part.modules() for part in parts)):
        if isinstance(layer, nn.Conv2d):
            conv = layer
        elif isinstance(layer, FrozenBatchNorm2d):
            yield conv, layer


def folded(conv, norm):
    """The weight of a convolution with the scale of its frozen batch norm. Its own weight gets the
    gradient that it would have without.
    """
    return conv.weight * norm.scale.view(-1, 1, 1, 1)


def convolve(conv, norm, x):
    """norm(conv(x)) of a frozen batch norm, of which training keeps nothing: with the norm an
    operator of its own, it would keep its input.
    """
    if conv.bias is not None:  # `freeze` has been here
        return conv(x)
    y = F.conv2d(x, folded(conv, norm), None, conv.stride, conv.padding, conv.dilation)
    return y.add_(norm.shift.view(-1, 1, 1))


@torch.no_grad()
def freeze(network, dtype, pack=False):
    """End a network's learning. Frozen batch norms go into its convolutions and QuickGELU's factor
    into the layers beside it; weights of products are in `dtype` once, as autocast would have them
    in every pass, all others stay fp32. `pack`: matrices in oneDNN's own layout; all that use them
    call `linear` then.
    """
    for conv, norm in pairs(network):
        for name, weight in (("weight", folded(conv, norm)), ("bias", norm.shift.clone())):
            conv.register_parameter(name, nn.Parameter(weight))
        norm.load_state_dict(FrozenBatchNorm2d(len(norm.shift)).state_dict())  # now does nothing
    layers = [*network.requires_grad_(False).modules()]
    for mlp in layers:
        if isinstance(mlp, nn.Sequential) and any(isinstance(part, QuickGELU) for part in mlp):
            before, _, after = mlp  # one pass of three: silu(1.702 x) / 1.702
            before.weight.mul_(1.702)
            before.bias.mul_(1.702)
            after.weight.div_(1.702)
            mlp[1] = nn.SiLU()
    packs = pack and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    if packs and dtype == torch.bfloat16:
        packs = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    packed = (Linear, nn.MultiheadAttention, NonDynamicallyQuantizableLinear)
    for layer in layers:
        if not isinstance(layer, nn.Linear | nn.Conv2d | nn.MultiheadAttention):
            continue
        for name, weight in [*layer.named_parameters(recurse=False)]:
            ready = weight.to(dtype)
            if weight.ndim == 4 and weight.is_cuda:  # as tensor cores read them
                ready = ready.contiguous(memory_format=torch.channels_last)
            if packs and isinstance(layer, packed) and weight.ndim == 2:
                ready = torch.ops.mkldnn._reorder_linear_weight(ready, ROWS)
            layer.register_parameter(name, nn.Parameter(ready, requires_grad=False))


class Graphs:
    """A function of CUDA tensors (or None) as CUDA graphs: one for each kind of inputs that came
    twice, so that the host launches once what were hundreds of kernels. A function that reads
    something back is warned of and called as it is.

    Its results are new tensors: they stay when it is called again.
    """

    one_at_a_time = threading.Lock()

    def __init__(self, function):
        self.function = function
        self.seen = set()
        self.graphs = {}  # kind of inputs -> inputs, graph, results
        self.pool = torch.cuda.graph_pool_handle()  # one for all, since one runs at a time

    @torch.inference_mode()
    def __call__(self, *inputs):
        kind = tuple(None if x is None else (x.shape, x.stride(), x.dtype) for x in inputs)
        if kind not in self.seen:  # it may stay the only one, and compiles
            self.seen.add(kind)
            return self.function(*inputs)
        held, graph, results = self.graphs.pop(kind, None) or self.capture(inputs)
        self.graphs[kind] = held, graph, results  # the last one
        if len(self.graphs) > MAX_GRAPHS:
            self.graphs.pop(next(iter(self.graphs)))
        if graph is None:
            return self.function(*inputs)
        for place, x in zip(held, inputs, strict=True):
            if x is not None:
                place.copy_(x)
        graph.replay()
        return results.clone() if torch.is_tensor(results) else [x.clone() for x in results]

    def capture(self, inputs):
        held = [None if x is None else x.clone() for x in inputs]
        self.function(*held)  # what each thread makes once cannot be made in a capture
        graph = torch.cuda.CUDAGraph()
        # A stream of its own: PyTorch's is that of the first device. Other threads may copy.
        options = {"stream": torch.cuda.Stream(), "capture_error_mode": "thread_local"}
        try:
            with self.one_at_a_time, torch.cuda.graph(graph, self.pool, **options):
                results = self.function(*held)
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph, which is slower: {error}", stacklevel=2)
            return None, None, None
        return held, graph, results


def accelerated(function, graphs=False, compiled=False):
    """A function of tensors for inference, through torch.compile (one program for all sizes) and as
    CUDA graphs if wanted.
    """
    if compiled:
        function = torch.compile(function, fullgraph=True, dynamic=True)
    return on_device(Graphs(function)) if graphs else function
