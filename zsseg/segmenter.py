"""The whole method at inference (Xu et al. 2021): proposals, CLIP on the regions, ensemble, label
map.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import semantic_map
from kernels.jit import use_triton
from zsseg import checkpoint, weights
from zsseg.backbone import load_backbone
from zsseg.clip import build_clip, cosine_logits
from zsseg.config import Config, load_config
from zsseg.datasets import dataset
from zsseg.maskformer import MaskFormer, PerPixel
from zsseg.prompts import LearnedPrompt, build_prompt, text_features
from zsseg.regions import (
    STRIDE,
    classify_crops,
    classify_in_one_pass,
    dense_features,
    dense_logits,
    expand_boxes,
    mask_pool,
    mask_probabilities,
    region_crops,
    region_masks,
)
from zsseg.run import UserError, first_of, say
from zsseg.tokenizer import Tokenizer, check_names

BUDGET = 2**28  # bytes of score maps that a label map holds at once


@dataclass
class Proposals:
    """What one image gives before the classes are decided; kept so that ensembles can be tried
    without new passes.
    """

    logits: Tensor  # [Q, h, w] of the masks, fp32, at stride 4 of the padded network input
    size: tuple[int, int]  # (H, W) of the network input before padding
    head: Tensor  # [Q, C] class probabilities of the segmenter, no-object dropped
    # [Q, C] CLIP's class probabilities, 1 where invalid; None without the ensemble
    region: Tensor | None
    valid: Tensor  # [Q] bool: the mask has a pixel above the threshold


class Segmenter(nn.Module):
    """MaskFormer and a frozen CLIP over a vocabulary that `set_classes` fixes and may change at any
    time.

    Fully supervised (`model.class_head = "linear"`) there is no CLIP, and the classes are those of
    the data set.
    """

    def __init__(self, config: Config, clip_state: checkpoint.State | None):
        super().__init__()
        self.config = config.clip
        self.text = self.region_text = None  # [C, D]
        self.names: list[str] = []
        self.compiled = self.few_sizes = (
            False  # the proposer; CLIP's image tower, which then takes few sizes of batches
        )
        self.proposing = True
        self.clip = self.prompt = self.region_prompt = None
        if config.model.class_head == "linear":
            self.maskformer = MaskFormer(config.model, len(dataset(config.data).names) + 1)
            return
        self.clip = build_clip(
            clip_state, config.clip.activation.replace("auto", "quickgelu"), config.clip.heads
        )
        if config.clip.regions == "tokens" and not hasattr(self.clip.visual, "region_tokens"):
            raise UserError(
                "clip.regions", "is tokens, which wants a ViT as CLIP", "use pool or crops"
            )
        vocab_size, width = self.clip.token_embedding.weight.shape
        self.tokenizer = Tokenizer(vocab_size, self.clip.context)
        self.proposing = config.model.proposals
        self.maskformer = (MaskFormer if self.proposing else PerPixel)(
            config.model, self.clip.text_projection.shape[1]
        )
        learned = (width, config.clip.prompt_prefix)
        self.prompt = build_prompt(config.clip.prompt, *learned)
        # The paper's VOC setting: fixed prompts for the segmenter's head, learned ones for the
        # regions.
        self.region_prompt = (
            build_prompt(config.clip.region_prompt, *learned) if config.clip.region_prompt else None
        )

    @torch.no_grad()
    def set_classes(
        self, names: list[str], seen: list[int] = (), synonyms: dict[str, list[str]] | None = None
    ) -> None:
        """Fix the vocabulary. `seen` holds the class ids that were trained on; none where there is
        no such split.

        The text features of a class are the mean over its name and its `synonyms`.
        """
        self.names = check_names(names)
        self.seen = torch.zeros(
            len(names), dtype=torch.bool, device=self.maskformer.pixel_mean.device
        )
        self.seen[list(seen)] = True
        if self.clip is None:
            if len(names) + 1 != self.maskformer.class_embed.out_features:
                raise UserError(
                    "model.class_head",
                    "is linear, for other classes than these",
                    "evaluate on its own data set",
                )
            return
        texts = [
            (i, text)
            for i, name in enumerate(self.names)
            for text in (name, *(synonyms or {}).get(name, []))
        ]

        def features(prompt: nn.Module) -> Tensor:
            found = text_features(self.clip, self.tokenizer, prompt, [text for _, text in texts])
            if len(texts) == len(self.names):
                return found
            index = torch.tensor([i for i, _ in texts], device=found.device)
            return F.normalize(
                found.new_zeros(len(self.names), found.shape[1]).index_add(0, index, found), dim=-1
            )

        self.text = features(self.prompt)
        self.region_text = self.text if self.region_prompt is None else features(self.region_prompt)

    def compile_parts(self) -> None:
        """Hand the mask proposer and CLIP's image tower to torch.compile, in place: names in state
        dicts stay as they are.

        One program of the proposer serves images of every size, since they are padded to multiples
        of 32 and no further.
        """
        self.compiled = True
        self.maskformer.compile(fullgraph=True)
        self.compile_tower()

    def compile_tower(self) -> None:
        """CLIP's image tower alone, which is most of the work: one program for each of a few
        numbers of crops.
        """
        if self.clip is not None:
            self.few_sizes = True
            self.clip.visual.compile(fullgraph=True, dynamic=False)

    def propose(self, image: Tensor) -> Proposals:
        """image: RGB uint8 or float in 0..255 [3, H, W] at network-input size."""
        return self.propose_together([image])[0]

    @torch.inference_mode()
    def propose_together(self, images: list[Tensor]) -> list[Proposals]:
        """`propose` for several images, whose region crops share CLIP's batches."""
        found, crops, indices = [], [], []
        for image in images:
            proposals, masks = self.propose_masks(image)
            found.append(proposals)
            if proposals.region is None or not masks:
                continue
            # The one wait for a GPU: it sizes CLIP's batch.
            index = proposals.valid.nonzero()[:, 0]
            if self.config.regions == "crops":
                crops.append(region_crops(image, *masks, self.clip.visual.resolution, index))
                indices.append(index)
            else:
                logits = self.region_logits(image, *masks, index)
                proposals.region[index] = logits.softmax(-1)
        if crops:
            logits = classify_crops(
                self.clip, torch.cat(crops), self.region_text, self.config.chunk, self.few_sizes
            )
            parts = logits.split([len(c) for c in crops])
            for proposals, index, part in zip(found, indices, parts, strict=True):
                proposals.region[index] = part.softmax(-1)
        return found

    def propose_masks(self, image: Tensor) -> tuple[Proposals, tuple[Tensor, Tensor]]:
        """The proposals of an image, `region` still 1 everywhere, and their masks [Q, H, W] and
        boxes [Q, 4]; where regions are pooled, `region` is final and nothing else is needed.
        """
        height, width = image.shape[-2:]
        prepared = self.maskformer.prepare(image[None])
        for side in (2, 3) if self.compiled else ():
            torch._dynamo.maybe_mark_dynamic(prepared, side)
        # Not the program that training compiled.
        proposer = self.maskformer if self.compiled else self.maskformer.forward
        # A CPU computes it in fp32: it is little of the work there, and its masks are decided at a
        # threshold.
        with torch.autocast("cpu", enabled=False):
            outputs = proposer(prepared, self.text)
        if not self.proposing:
            return self.per_pixel(image, outputs[0]), ()
        classes, masks = outputs
        head = classes[-1, 0].softmax(-1)[:, :-1]  # [Q, C]
        logits, cut = masks[-1, 0].float(), (height, width)
        region = torch.ones_like(head) if self.config.ensemble and self.clip is not None else None
        if region is not None and self.config.regions == "pool":
            dense = dense_features(self.clip, image, self.config.dense_edge)  # [h', w', D]
            pooled, valid = mask_pool(dense, logits, cut, self.config.mask_threshold)
            found = cosine_logits(pooled, self.region_text).softmax(-1)
            return Proposals(logits, cut, head, found.where(valid[:, None], region), valid), ()
        binary, boxes, valid = region_masks(logits, cut, self.config.mask_threshold)
        return Proposals(logits, cut, head, region, valid), (
            binary,
            expand_boxes(boxes, self.config.expand_ratio, cut),
        )

    def per_pixel(self, image: Tensor, logits: Tensor) -> Proposals:
        """The one-stage baseline's class logits [C, h, w] as proposals, one a class: the mask of
        class c is its probability p, whose logit here is log p, so that its sigmoid p / (1 + p)
        grows with p and never saturates.

        With the ensemble, p is that of the pixel and of CLIP's dense feature there.
        """
        size, C = tuple(image.shape[-2:]), len(logits)
        scores = logits.log_softmax(0)
        if self.config.ensemble:
            # [C, h', w']
            dense = dense_logits(
                self.clip, image, self.region_text, self.config.dense_edge
            ).log_softmax(0)
            H, W = (STRIDE * s for s in logits.shape[-2:])
            inner = [-(-s // STRIDE) for s in size]
            dense = F.interpolate(dense[None], inner, mode="bilinear", align_corners=False)[0]
            dense = F.pad(
                dense[None],
                (0, W // STRIDE - inner[1], 0, H // STRIDE - inner[0]),
                mode="replicate",
            )[0]
            w = self.config.ensemble_weight
            power = (
                torch.where(self.seen, w, 1 - w).view(-1, 1, 1) if w else torch.zeros_like(scores)
            )
            scores = power * scores + (1 - power) * dense
        valid = torch.ones(C, dtype=torch.bool, device=image.device)
        return Proposals(scores, size, torch.eye(C, device=image.device), None, valid)

    @torch.inference_mode()
    def region_logits(
        self, image: Tensor, masks: Tensor, boxes: Tensor, index: Tensor | None = None
    ) -> Tensor:
        """CLIP's class logits [P, C] of the regions masks [Q, H, W] with boxes [Q, 4] that `index`
        [P] chooses (all).
        """
        if self.config.regions != "crops":
            chosen = masks if index is None else masks[index]
            return classify_in_one_pass(
                self.clip,
                image,
                chosen,
                self.region_text,
                self.config.regions,
                self.config.dense_edge,
            )
        crops = region_crops(image, masks, boxes, self.clip.visual.resolution, index)
        return classify_crops(self.clip, crops, self.region_text, self.config.chunk, self.few_sizes)

    def ensemble(self, proposals: Proposals, weight: float | None = None) -> Tensor:
        """Class scores [Q, C] with ensemble weight w (the configuration's where None).

        Seen classes head^w region^(1-w), unseen ones head^(1-w) region^w; w = 0 is CLIP only, valid
        queries only.
        """
        w = self.config.ensemble_weight if weight is None else weight
        if proposals.region is None:
            return proposals.head
        if w == 0:
            return proposals.region * proposals.valid[:, None]
        power = torch.where(self.seen, w, 1 - w)  # [C], of the head
        return proposals.head**power * proposals.region ** (1 - power)

    def binary_masks(self, proposals: Proposals) -> Tensor:
        """Where each proposal is above the threshold, at network-input size: bool [Q, H, W]."""
        return region_masks(proposals.logits, proposals.size, self.config.mask_threshold)[0] != 0

    def variant_names(self, weights: list[float]) -> list[str]:
        """What `variants` gives."""
        if not self.proposing or self.clip is None:
            # nothing apart: a pixel's class is the head's and CLIP's at once; or there is no CLIP
            return []
        if not self.config.ensemble:
            return ["head_only"]
        return ["head_only", "clip_only", "clip_objectness", *(f"weight_{w:g}" for w in weights)]

    def variants(self, proposals: Proposals, weights: list[float]) -> dict[str, Tensor]:
        """Class scores [Q, C] of the method's parts and of other ensemble weights, from one
        pass.
        """
        found = {"head_only": proposals.head}
        if proposals.region is not None:
            found["clip_only"] = self.ensemble(proposals, 0)
            # 1 - p(no object).
            found["clip_objectness"] = found["clip_only"] * proposals.head.sum(1, keepdim=True)
            found |= {f"weight_{w:g}": self.ensemble(proposals, w) for w in weights}
        return found

    @torch.inference_mode()
    def label_map(
        self, classes: Tensor, proposals: Proposals, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """The class with the largest score at every pixel of the original `size` (height, width),
        int64, and that score.
        """
        if use_triton(classes) and semantic_map.is_supported(proposals.logits):
            sizes = list(proposals.size), list(size)
            return semantic_map.semantic_map(proposals.logits, classes.float(), *sizes, False)[:2]
        return best_class(proposals.logits, classes.float(), proposals.size, size)

    @torch.inference_mode()
    def score_map(self, classes: Tensor, proposals: Proposals, size: tuple[int, int]) -> Tensor:
        """Sum over queries of class score x mask, resized to the original `size` (height, width):
        [C, *size].
        """
        if use_triton(classes) and semantic_map.is_supported(proposals.logits):
            sizes = list(proposals.size), list(size)
            return semantic_map.semantic_map(proposals.logits, classes.float(), *sizes, True)[2]
        return class_scores(
            mask_probabilities(proposals.logits, proposals.size), classes.float(), size
        )

    def forward(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Picture [3, H, W] -> label map int64 `size`."""
        proposals = self.propose(image)
        return self.label_map(self.ensemble(proposals), proposals, size)[0]

    def learned_state(self) -> dict[str, checkpoint.State]:
        """What a checkpoint must hold besides CLIP."""
        parts = {
            "maskformer": self.maskformer,
            "prompt": self.prompt,
            "region_prompt": self.region_prompt,
        }
        return {
            k: m.state_dict()
            for k, m in parts.items()
            if isinstance(m, (MaskFormer, PerPixel, LearnedPrompt))
        }

    def load_learned(self, parts: dict[str, checkpoint.State], what: str) -> None:
        """Load `learned_state` or the parts of an original checkpoint; strict about every part that
        is in use.
        """
        checkpoint.load_strict(
            self.maskformer,
            parts.get("maskformer", {}),
            what,
            "use the configuration of its training",
        )
        self.load_prompts(parts, what)

    def load_prompts(self, parts: dict[str, checkpoint.State], what: str) -> None:
        """Load the learned prompts that are in use."""
        for name, module in (("prompt", self.prompt), ("region_prompt", self.region_prompt)):
            if isinstance(module, LearnedPrompt):
                if name not in parts:
                    raise UserError(
                        what,
                        f"has no learned {name}",
                        f"set clip.prompts, or clip.{name} to a fixed prompt",
                    )
                checkpoint.load_strict(module, parts[name], what, "set clip.prompt_prefix")


def class_scores(masks: Tensor, classes: Tensor, size: tuple[int, int]) -> Tensor:
    """score[c] = sum over q of classes[q, c] masks[q], resized: masks [Q, H, W], classes [Q, C] ->
    [C, *size].
    """
    scores = torch.einsum("qc,qhw->chw", classes.to(masks.dtype), masks)
    return F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]


def best_class(
    logits: Tensor, classes: Tensor, input_size: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Argmax and maximum of `class_scores` over the classes, a few classes at a time: int64 and
    float `size`.
    """
    C, masks = classes.shape[1], mask_probabilities(logits, input_size)
    tile = max(BUDGET // (4 * max(math.prod(input_size), math.prod(size))), 1)
    best, labels = masks.new_full(size, -1.0), masks.new_zeros(size, dtype=torch.int64)
    for first in range(0, C, tile):
        scores = class_scores(masks, classes[:, first : first + tile], size)
        if tile >= C:
            top, labels = scores.max(0)
            return labels, top
        for i, value in enumerate(scores, first):
            labels.masked_fill_(value > best, i)
            torch.maximum(best, value, out=best)
    return labels, best


def build_segmenter(
    config: Config, root: Path, saved: dict[str, checkpoint.State] | None = None
) -> Segmenter:
    """A segmenter to train: the configuration's CLIP, prompts and initial backbone, else fresh
    weights; then those of the checkpoint `train.init`, as far as they fit.

    With `saved`, the learned parts of a run that is resumed, prompts and backbone are in there and
    not read again.
    """
    supervised = config.model.class_head == "linear"
    segmenter = Segmenter(config, None if supervised else load_clip(config, root))
    if saved is not None:
        segmenter.load_learned(saved, "last.pt")
        return segmenter
    prompts = read_prompts(config.clip.prompts) if config.clip.prompts else {}
    found = start_from(segmenter, config.train.init, prompts) if config.train.init else {}
    segmenter.load_prompts(
        found | prompts, f"train.init {config.train.init}" if found else "configuration"
    )
    if config.model.weights and not any(
        name.startswith("backbone.") for name in found.get("maskformer", ())
    ):
        load_backbone(segmenter.maskformer.backbone, config.model.backbone, config.model.weights)
    return segmenter


def load_clip(config: Config, root: Path, changed: bool = False) -> checkpoint.State:
    """The state dict of the configured CLIP; its activation goes into the configuration, and so
    into checkpoints.

    `changed`: the configuration's activation and heads are those of another CLIP.
    """
    state = weights.load_clip_state(config.clip.weights, root)
    config.clip.activation, config.clip.heads = weights.find_shape(
        config.clip, state, root, changed
    )
    return state


def start_from(
    segmenter: Segmenter, file: str, prompts: dict[str, checkpoint.State]
) -> dict[str, checkpoint.State]:
    """Load all weights of another segmenter's checkpoint, ours or the original's, that fit
    `segmenter` by name and shape; of its learned prompts those that are not among `prompts`.

    Returns them by part, and prints how many were used, which were not, and which of the model's
    start afresh. UserError where none fits.
    """
    what, content = f"train.init {file}", checkpoint.load(file, "train.init")
    unknown: list[str] = []
    parts = (
        content["model"]
        if "config" in content
        else weights.import_original(content["model"], what, unknown)[0]
    )
    parts = {
        part: checkpoint.unwrapped(state, what)
        for part, state in parts.items()
        if isinstance(state, dict)
    }
    own, used, dropped, fresh = segmenter.learned_state(), {}, unknown, []
    for part, state in parts.items():
        fits = own.get(part, {}) if part not in prompts else {}
        used[part] = {
            k: v
            for k, v in state.items()
            if k in fits and isinstance(v, Tensor) and v.shape == fits[k].shape
        }
        dropped += [f"{part}.{k}" for k in state if k not in used[part]]
        checkpoint.check_finite(used[part], what)
    if not used.get("maskformer"):
        raise UserError(
            what,
            "holds no weight that fits this model",
            "give a segmenter's checkpoint, and its [model]",
        )
    for name, tensor in own["maskformer"].items():
        if name in used["maskformer"]:
            tensor.copy_(used["maskformer"][name])
        else:
            fresh.append(name)
    checkpoint.say_loaded(what, sum(map(len, used.values())), dropped)
    if fresh:
        names = first_of(fresh, 5)
        say(
            f"{what}: {len(fresh)} of the model's tensors are not in it, or of another shape, and "
            f"start afresh: {names}"
        )
    return {part: state for part, state in used.items() if state}


def read_prompts(path: str) -> dict[str, checkpoint.State]:
    """The learned prompt of a checkpoint (ours or the original's prompt learning), for head and
    regions alike.
    """
    content, what = checkpoint.load(path, "clip.prompts"), f"clip.prompts {path}"
    ours = "config" in content
    parts, dropped = (
        (content["model"], []) if ours else weights.import_original(content["model"], what)
    )
    name = "prompt" if "prompt" in parts else "region_prompt"
    if name not in parts:
        raise UserError(what, "holds no learned prompt", "give a checkpoint of prompt learning")
    dropped += [
        f"{part}.{k}"
        for part in parts
        if part != name and "of_seed" not in part
        for k in parts[part]
    ]
    checkpoint.say_loaded(what, len(parts[name]), dropped)
    return {"prompt": parts[name], "region_prompt": parts[name]}


def load_segmenter(content: dict, config: Config, root: Path, name: str) -> Segmenter:
    """The segmenter of a loaded checkpoint, ours or the original's."""
    what = f"checkpoint {name}"
    if "config" in content:
        if "maskformer" not in content["model"]:
            raise UserError(what, "holds no segmenter", "give a checkpoint of task segment")
        supervised = config.model.class_head == "linear"
        recorded = load_config(None, [], content["config"]).clip
        same = (config.clip.activation, config.clip.heads) == (recorded.activation, recorded.heads)
        changed = config.clip.weights != recorded.weights and same
        parts, clip = content["model"], None if supervised else load_clip(config, root, changed)
        other_prompts = config.clip.prompts != recorded.prompts  # else the checkpoint holds them
    else:
        content = content | {"model": checkpoint.unwrapped(content["model"], what)}
        parts, dropped = weights.import_original(content["model"], what)
        other_prompts = True
        clip = parts.get("clip") if config.model.class_head == "text" else None
        if clip is None and config.model.class_head == "text":
            raise UserError(what, "holds no CLIP", "give a zero-shot checkpoint of zsseg.baseline")
    segmenter = Segmenter(config, clip)
    prompts = read_prompts(config.clip.prompts) if config.clip.prompts and other_prompts else {}
    segmenter.load_learned(parts | prompts, what)
    if "config" not in content:
        used = {*segmenter.learned_state(), "clip"} - ({"clip"} if clip is None else set())
        used -= prompts.keys()
        # Where the parts are that a setting may leave unused.
        adapter = [k for k in content["model"] if "clip_adapter" in k]
        dropped += [
            k
            for k in adapter
            if (weights.our_name(k) or "").partition(".")[0] in parts.keys() - used
        ]
        checkpoint.say_loaded(what, len(content["model"]) - len(dropped), dropped)
    return segmenter
