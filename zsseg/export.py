"""Export for a fixed word list: programs of the mask proposer and of CLIP's image tower that run
without this project.
"""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from zsseg import clip as clip_module
from zsseg.clip import cosine_logits
from zsseg.config import Config
from zsseg.distributed import Process
from zsseg.files import MARK, atomic_write, refuse_foreign
from zsseg.files import result as written
from zsseg.regions import token_masks, uses_mask_prompt
from zsseg.segmenter import Segmenter
from zsseg.utils import UserError, print_main
from zsseg.apps.vocabulary import Words

TOLERANCE = 1e-5  # of the largest value
# The sizes and numbers at which programs are compared with the modules.
IMAGES = ((97, 131), (64, 96), (33, 20), (1, 1))
CROPS = (5, 1)
# What the programs take and give, and the method around them; it goes into settings.json.
PROPOSER = {
    "input": (
        "one RGB image in 0..255, fp32 [1, 3, H, W], brought to the input size; normalised and "
        "padded inside"
    ),
    "output 1": "class probabilities of Q queries, fp32 [Q, C]; a row sums up to 1 - p(no object)",
    "output 2": (
        "mask logits, fp32 [Q, h, w] at stride 4 of the input padded to multiples of 32 at the "
        "right and the bottom"
    ),
    "sizes": "any with torch.export.load(...).module(check_guards=False), else sides above 32",
}
CLIP = {
    "input": (
        "P >= 1 crops of the image, fp32 [P, 3, R, R], R = resolution: (RGB / 255 - mean) / "
        "std, 0 outside the mask"
    ),
    "output": (
        "class logits, fp32 [P, C]: 100 x cosine of crop and class name; their softmax is CLIP's "
        "probabilities"
    ),
}
MASKS = [
    "Resize the image (Pillow's bilinear filter): the shorter edge to short_edge, the longer "
    "one to at most longest_edge.",
    "proposer.pt2 gives class probabilities p [Q, C] and mask logits.",
    "Resize the logits by 4 (bilinear, align_corners=False), cut them to the input, sigmoid: "
    "masks [Q, H, W].",
]
REGIONS = [
    "A region is where a mask is above mask_threshold. Its box: tight, scaled by expand_ratio "
    "about its centre, clipped.",
    "Crop: the normalised image times the region, cut to the box, bicubic to R x R "
    "(align_corners=False, no antialiasing).",
    "clip.pt2 and a softmax give CLIP's probabilities c [Q, C]; where a region is empty, c = 1.",
    "Scores s: seen classes p^w c^(1-w), all others p^(1-w) c^w, w = ensemble_weight; for w = 0 "
    "they are c, and 0 where a "
    "region is empty.",
]
MASK_CHANNEL = (
    "A fourth channel of the crop: the region (1, else 0), cut to the box, resized to R x R by "
    "F.interpolate's mode nearest, in fp32."
)
LABELS = [
    "Score map: sum over queries of s x mask, resized to the image's own size (bilinear); the "
    "label is its argmax.",
    "Background words come last in names; the first of them stands for all, and is shown as the "
    "last of shown_names.",
]


class Proposer(nn.Module):
    """Image [1, 3, H, W] -> class probabilities [Q, C] and mask logits [Q, h, w], as
    `Segmenter.propose` computes them.
    """

    def __init__(self, segmenter: Segmenter):
        super().__init__()
        self.maskformer = segmenter.maskformer
        self.register_buffer("text", segmenter.text_features)  # None with a linear class head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        classes, masks = self.maskformer(self.maskformer.prepare(images), self.text)
        return classes[-1, 0].softmax(-1)[:, :-1], masks[-1, 0]


class Tower(nn.Module):
    """Crops [P, 3, R, R] as CLIP sees them, or with a mask prompt [P, 4, R, R], the mask in the
    last channel -> logits [P, C], as `Segmenter.region_logits` computes them.
    """

    def __init__(self, segmenter: Segmenter, bf16: bool):
        super().__init__()
        self.visual, self.bf16 = segmenter.clip.visual, bf16
        self.mask_prompt = uses_mask_prompt(segmenter.clip, segmenter.config)
        self.patch = self.visual.stride
        self.register_buffer("text", segmenter.region_text_features)

    def examples(self, random: torch.Generator) -> list[Tensor]:
        """Inputs of several sizes; of masks, the lower half is empty."""
        R = self.visual.resolution
        crops = [torch.randn(n, 3 + self.mask_prompt, R, R, generator=random) for n in CROPS]
        for crop in crops:
            crop[:, 3:, R // 2 :] = 0
        return crops

    def forward(self, crops: Tensor) -> Tensor:
        shown = []
        if self.mask_prompt:
            shown = [token_masks(crops[:, 3] != 0, self.patch)]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            features = self.visual(crops[:, :3], False, *shown)
        return cosine_logits(features, self.text)


def export(segmenter: Segmenter, config: Config, words: Words, out: Path) -> None:
    """Write proposer.pt2, clip.pt2 (where there is a CLIP whose opinion counts), settings.json and
    example.py.

    `segmenter` is in eval mode and knows its classes, `words`; it stays as it is. Programs are for
    CPUs: fp32, CLIP's products in bf16 where this machine's `model.bf16` says so. Every program is
    loaded again and compared with the module. Raises UserError for what has no programs,
    RuntimeError where one differs.
    """
    with_clip = segmenter.clip is not None and config.clip.ensemble
    bf16 = Process(torch.device("cpu")).bf16(config.model.bf16)
    if not segmenter.two_stage:
        why = "is for mask proposals, not the per-pixel baseline"
        raise UserError("--export", why, "give another checkpoint")
    if with_clip and config.clip.regions != "crops":
        raise UserError(
            "clip.regions",
            f"is {config.clip.regions}, --export knows crops alone",
            "--set clip.regions=crops",
        )
    refuse_foreign(
        *(out / name for name in ("proposer.pt2", "clip.pt2", "settings.json", "example.py"))
    )
    random = torch.Generator().manual_seed(0)
    images = [255 * torch.rand(1, 3, *size, generator=random) for size in IMAGES]
    write(Proposer(segmenter), images, {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}, out / "proposer.pt2")
    settings = {
        "names": segmenter.names,
        "shown_names": words.shown_names,
        "seen": segmenter.seen.nonzero()[:, 0].tolist(),
        "short_edge": config.data.test_short_edge,
        "longest_edge": config.data.max_size,
        "bf16": bf16,
        "proposer": PROPOSER,
        "clip": None,
        "steps": [*MASKS, "Scores s are p.", *LABELS],
    }
    (out / "clip.pt2").unlink(missing_ok=True)
    if with_clip:
        tower = Tower(segmenter, bf16)
        write(tower, tower.examples(random), {0: Dim.DYNAMIC}, out / "clip.pt2")
        settings |= clip_settings(tower, config)
    with written(out / "example.py") as file:
        shutil.copyfile(Path(__file__).with_name("export_example.py"), file)
    with written(out / "settings.json") as file:
        file.write_text(
            json.dumps({"program": MARK} | settings | {"torch": torch.__version__}, indent=1) + "\n"
        )
    print_main(f"try: python {out / 'example.py'} photo.jpg")


def clip_settings(tower: Tower, config: Config) -> dict:
    """What settings.json says of CLIP."""
    clip = {
        "resolution": tower.visual.resolution,
        "mean": clip_module.MEAN,
        "std": clip_module.STD,
        "mask_channel": tower.mask_prompt,
    }
    keys = ("mask_threshold", "expand_ratio", "ensemble_weight")
    channel = [MASK_CHANNEL] * tower.mask_prompt
    steps = [*MASKS, *REGIONS[:2], *channel, *REGIONS[2:], *LABELS]
    return {"clip": clip | CLIP, "steps": steps} | {k: getattr(config.clip, k) for k in keys}


def write(module: nn.Module, inputs: list[Tensor], dynamic: dict, path: Path) -> None:
    """Trace a copy of the module with the first input, whose `dynamic` dimensions may change; save,
    load, compare on all.
    """
    # A copy is never the compiled program.
    module = deepcopy(module).cpu().eval().requires_grad_(False)
    # strict: Python's len(tensor) would otherwise become a constant of the program.
    program = torch.export.export(module, (inputs[0],), dynamic_shapes=(dynamic,), strict=True)
    nodes = [
        node
        for part in program.graph_module.modules()
        if isinstance(part, GraphModule)
        for node in part.graph.nodes
    ]
    libraries = {getattr(node.target, "namespace", "aten") for node in nodes}
    assert libraries <= {"aten", "higher_order"}, f"{path.name} wants operators of {libraries}"
    for node in nodes:
        node.meta.pop("stack_trace", None)  # names of files on this machine
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            # Tracing takes all for fp32 and writes that down, also where autocast gives bf16.
            node.graph.erase_node(node)
    for part in program.graph_module.modules():
        if isinstance(part, GraphModule):
            part.recompile()
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as file:
            torch.export.save(program, file, extra_files={MARK: ""})
        with open(temporary, "rb") as file:
            worst = largest_difference(torch.export.load(file), module, inputs)
        if not worst <= TOLERANCE:
            raise RuntimeError(
                f"{path} differs from the module by {worst:.1g} of the largest value"
            )
    shapes = ", ".join(" x ".join(map(str, x.shape)) for x in inputs)
    print_main(
        f"{path}: {path.stat().st_size / 2**20:.1f} MiB, largest difference from the module "
        f"{worst:.1g} (inputs {shapes})"
    )


@torch.inference_mode()
def largest_difference(program: ExportedProgram, module: nn.Module, inputs: list[Tensor]) -> float:
    """Between what program and module give, relative to an output's largest value."""
    # The guards are what tracing did not prove for sides of one coarse cell, or one crop; these are
    # among the inputs instead.
    run, worst = program.module(check_guards=False), torch.zeros(())
    for x in inputs:
        outputs = [y if isinstance(y, tuple) else (y,) for y in (run(x), module(x))]
        for ours, theirs in zip(*outputs, strict=True):
            worst = torch.maximum(
                worst, (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)
            )
    return float(worst)
