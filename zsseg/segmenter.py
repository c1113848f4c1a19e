"""The whole method at inference (Xu et al. 2021): proposals, CLIP on the regions, ensemble, label
map.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import semantic_map
from kernels.jit import use_triton
from zsseg import checkpoint
from zsseg.clip import build_clip, cosine_logits
from zsseg.config import Config
from zsseg.datasets import dataset
from zsseg.maskformer import MaskFormer, PerPixel
from zsseg.prompts import LearnedPrompt, build_prompt, text_features
from zsseg.regions import (
    CLASSIFIERS,
    STRIDE,
    dense_features,
    dense_logits,
    expand_boxes,
    mask_pool,
    mask_probabilities,
    region_masks,
)
from zsseg.tokenizer import check_names
from zsseg.utils import UserError

MAX_SCORE_BYTES = 2**28  # of score maps that a label map computes at once


@dataclass
class Proposals:
    """The masks of one image, what both classifiers see in each, and what they make of it; other
    classes, ensembles and label maps follow without another pass of the networks.
    """

    mask_logits: Tensor  # [Q, h, w] fp32, at stride 4 of the padded network input
    input_size: tuple[int, int]  # (H, W) of the network input before padding
    class_probs: Tensor  # [Q, C] class probabilities of the proposer, no-object dropped
    # [Q, C] class probabilities of CLIP, 1 where a mask is empty; None without the ensemble
    clip_probs: Tensor | None
    valid: Tensor  # [Q] bool: the mask has a pixel above the threshold
    # What does not depend on the words, see `Segmenter.classify`
    class_features: Tensor | None = None  # [Q, D] of the proposer
    region_features: Tensor | None = None  # [P, D] of CLIP, fp32, for the P valid masks

    def to(self, device: torch.device) -> "Proposals":
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


class Segmenter(nn.Module):
    """A mask proposer and a frozen CLIP over a vocabulary that `set_classes` fixes and may change
    at any time.

    proposer: any f(image) -> (mask_logits [Q, h, w] fp32 at stride 4 of the image padded to
    multiples of 32, class_features [Q, D] in CLIP's space or None), image RGB [3, H, W] in 0..255;
    by default `MaskFormer.propose`. Without class features CLIP names the masks
    (`clip.ensemble_weight = 0`). The words come later: neither the masks nor CLIP's features of the
    regions depend on them.

    Fully supervised (`model.class_head = "linear"`) there is no CLIP, and the classes are those of
    the data set.
    """

    def __init__(
        self,
        config: Config,
        clip_state: checkpoint.State | None,
        proposer: Callable[[Tensor], tuple[Tensor, Tensor | None]] | None = None,
    ):
        super().__init__()
        self.config = config.clip
        self.text_features = None  # [C, D]
        self.region_text_features = None
        self.names: list[str] = []
        self.two_stage = config.model.proposals
        self.clip = None
        self.prompt = None
        self.region_prompt = None
        self.maskformer = None

        if config.model.class_head == "linear":
            self.maskformer = MaskFormer(config.model, len(dataset(config.data).names) + 1)
        else:
            self.build_clip(config, clip_state)
            if proposer is None:
                model = MaskFormer if self.two_stage else PerPixel
                self.maskformer = model(config.model, self.clip.embed_dim)
        self.proposer = proposer or self.maskformer.propose

    def build_clip(self, config: Config, state: checkpoint.State) -> None:
        """CLIP and the prompts."""
        activation = config.clip.activation.replace("auto", "quickgelu")
        self.clip = build_clip(state, activation, config.clip.heads)
        if config.clip.regions == "tokens" and not hasattr(self.clip.visual, "region_tokens"):
            raise UserError(
                "clip.regions", "is tokens, which needs a ViT as CLIP", "use pool or crops"
            )
        shape = (self.clip.width, config.clip.prompt_prefix)
        self.prompt = build_prompt(config.clip.prompt, *shape)
        # The paper's VOC setting: fixed prompts for the segmenter's head, learned ones for the
        # regions.
        if config.clip.region_prompt:
            self.region_prompt = build_prompt(config.clip.region_prompt, *shape)

    @torch.no_grad()
    def set_classes(
        self, names: list[str], seen: list[int] = (), synonyms: dict[str, list[str]] | None = None
    ) -> None:
        """Fix the vocabulary. `seen` holds the class ids that were trained on; none where there is
        no such split, or with `clip.ensemble_seen = false`.

        The text features of a class are the mean over its name and its `synonyms`.
        """
        self.names = check_names(names)
        device = next(self.parameters()).device
        self.seen = torch.zeros(len(names), dtype=torch.bool, device=device)
        self.seen[list(seen)] = self.config.ensemble_seen
        if self.clip is None:
            if len(names) + 1 != self.maskformer.class_embed.out_features:
                raise UserError(
                    "model.class_head",
                    "is linear, for other classes than these",
                    "evaluate on its own data set",
                )
            return

        texts = [[name, *(synonyms or {}).get(name, [])] for name in self.names]
        self.text_features = self.encode_names(self.prompt, texts)
        self.region_text_features = self.text_features
        if self.region_prompt is not None:
            self.region_text_features = self.encode_names(self.region_prompt, texts)

    def encode_names(self, prompt: nn.Module, texts: list[list[str]]) -> Tensor:
        """The names of each class -> normalised mean of their text features [C, D]."""
        features = text_features(self.clip, prompt, [name for names in texts for name in names])
        counts = [len(names) for names in texts]
        if max(counts) == 1:
            return features
        means = [part.mean(0) for part in features.split(counts)]
        return F.normalize(torch.stack(means), dim=-1)

    def compile_parts(self) -> None:
        """Hand the mask proposer and CLIP's image tower to torch.compile, in place: names in state
        dicts stay as they are.

        One program of the proposer serves images of every size, since they are padded to multiples
        of 32 and no further.
        """
        if self.maskformer is not None:
            self.maskformer.compile_inference()
        self.compile_tower()

    def compile_tower(self) -> None:
        """CLIP's image tower only, which is most of the work: one program for each of a few
        numbers of crops.
        """
        if self.clip is not None:
            self.clip.bucketed = True
            self.clip.visual.compile(fullgraph=True, dynamic=False)

    @torch.inference_mode()
    def propose(self, image: Tensor) -> Proposals:
        """image: RGB uint8 or float in 0..255 [3, H, W] at network-input size."""
        # A CPU computes it in fp32: it is little of the work there, and its masks are decided at a
        # threshold.
        with torch.autocast("cpu", enabled=False):
            if not self.two_stage:
                return self.propose_per_pixel(image)
            mask_logits, class_features = self.proposer(image)

        size = tuple(image.shape[-2:])
        threshold = self.config.mask_threshold
        ensemble = self.config.ensemble and self.clip is not None
        region_features = None
        if ensemble and self.config.regions == "pool":  # straight from the mask logits
            dense = dense_features(self.clip, image, self.config.dense_edge)
            features, valid = mask_pool(dense, mask_logits, size, threshold)
            region_features = features[valid]
        else:
            masks, boxes, valid = region_masks(mask_logits, size, threshold)
        if ensemble and region_features is None:
            boxes = expand_boxes(boxes, self.config.expand_ratio, size)
            region_features = self.encode_regions(image, masks, boxes, valid.nonzero()[:, 0])
        empty = mask_logits.new_zeros(len(mask_logits), 0)
        return self.classify(
            Proposals(mask_logits, size, empty, None, valid, class_features, region_features)
        )

    @torch.inference_mode()
    def classify(self, proposals: Proposals) -> Proposals:
        """The same masks with the probabilities of the present classes: one product with the text
        features each.
        """
        features = proposals.class_features
        if features is None:
            class_probs = proposals.mask_logits.new_ones(len(proposals.valid), len(self.names))
        elif self.maskformer is None:
            class_probs = cosine_logits(features, self.text_features).softmax(-1)
        else:
            logits = self.maskformer.classify(features, self.text_features)
            class_probs = logits.softmax(-1)[:, :-1]  # without no-object

        clip_probs = None
        if proposals.region_features is not None:
            logits = cosine_logits(proposals.region_features, self.region_text_features)
            clip_probs = torch.ones_like(class_probs)
            clip_probs[proposals.valid] = logits.softmax(-1)
        return replace(proposals, class_probs=class_probs, clip_probs=clip_probs)

    def propose_per_pixel(self, image: Tensor) -> Proposals:
        """The one-stage baseline, one proposal a class: the mask of class c is its probability p at
        every pixel, whose logit here is log p, so that its sigmoid p / (1 + p) grows with p and
        never saturates.
        """
        scores = self.maskformer.propose(image, self.text_features).log_softmax(0)  # [C, h, w]
        if self.config.ensemble:
            scores = self.ensemble_per_pixel(image, scores)
        C = len(scores)
        valid = torch.ones(C, dtype=torch.bool, device=scores.device)
        size = tuple(image.shape[-2:])
        return Proposals(scores, size, torch.eye(C, device=scores.device), None, valid)

    @torch.inference_mode()
    def encode_regions(
        self, image: Tensor, masks: Tensor, boxes: Tensor, index: Tensor | None = None
    ) -> Tensor:
        """CLIP's features, fp32 [P, D], of the regions masks [Q, H, W] with boxes [Q, 4] that
        `index` [P] chooses (all).
        """
        if index is None:
            index = torch.arange(len(masks), device=masks.device)
        if not len(index):
            return self.region_text_features.new_zeros(0, self.clip.embed_dim)
        classifier = CLASSIFIERS[self.config.regions]
        return classifier(self.clip, image, masks, boxes, index, self.config)

    def region_logits(
        self, image: Tensor, masks: Tensor, boxes: Tensor, index: Tensor | None = None
    ) -> Tensor:
        """CLIP's class logits, fp32 [P, C], of the same regions."""
        features = self.encode_regions(image, masks, boxes, index)
        return cosine_logits(features, self.region_text_features)

    def ensemble_per_pixel(self, image: Tensor, scores: Tensor) -> Tensor:
        """The one-stage baseline's ensemble: log p of every class [C, h, w], with the probability
        of CLIP's dense feature at the pixel as the second classifier.
        """
        dense = dense_logits(self.clip, image, self.region_text_features, self.config.dense_edge)
        dense = dense.log_softmax(0)  # [C, h', w']
        h, w = scores.shape[-2:]
        inner = [-(-s // STRIDE) for s in image.shape[-2:]]
        dense = F.interpolate(dense[None], inner, mode="bilinear", align_corners=False)
        dense = F.pad(dense, (0, w - inner[1], 0, h - inner[0]), mode="replicate")[0]
        weight = self.config.ensemble_weight
        power = torch.zeros_like(scores)
        if weight:
            power = torch.where(self.seen, weight, 1 - weight).view(-1, 1, 1)
        return power * scores + (1 - power) * dense

    def ensemble(self, proposals: Proposals, weight: float | None = None) -> Tensor:
        """Class scores [Q, C] with ensemble weight w (the configuration's where None).

        p of the proposer, c of CLIP: seen classes p^w c^(1-w), unseen ones p^(1-w) c^w; w = 0 is
        CLIP only, valid queries only.
        """
        w = self.config.ensemble_weight if weight is None else weight
        if proposals.clip_probs is None:
            return proposals.class_probs
        if w == 0:
            return proposals.clip_probs * proposals.valid[:, None]
        power = torch.where(self.seen, w, 1 - w)  # [C], of the proposer
        return proposals.class_probs**power * proposals.clip_probs ** (1 - power)

    def binary_masks(self, proposals: Proposals) -> Tensor:
        """Where each proposal is above the threshold, at network-input size: bool [Q, H, W]."""
        return region_masks(
            proposals.mask_logits, proposals.input_size, self.config.mask_threshold
        )[0].bool()

    def variant_names(self, weights: list[float]) -> list[str]:
        """What `variants` gives."""
        if not self.two_stage or self.clip is None:
            # nothing apart: a pixel's class is the head's and CLIP's at once; or there is no CLIP
            return []
        if not self.config.ensemble:
            return ["head_only"]
        return ["head_only", "clip_only", "clip_objectness", *(f"weight_{w:g}" for w in weights)]

    def variants(self, proposals: Proposals, weights: list[float]) -> dict[str, Tensor]:
        """Class scores [Q, C] of the method's parts and of other ensemble weights, from one
        pass.
        """
        scores = {"head_only": proposals.class_probs}
        if proposals.clip_probs is not None:
            scores["clip_only"] = self.ensemble(proposals, 0)
            # 1 - p(no object).
            scores["clip_objectness"] = scores["clip_only"] * proposals.class_probs.sum(
                1, keepdim=True
            )
            scores |= {f"weight_{w:g}": self.ensemble(proposals, w) for w in weights}
        return scores

    @torch.inference_mode()
    def label_map(
        self, scores: Tensor, proposals: Proposals, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Class scores [Q, C] -> the class with the largest score at every pixel of the original
        `size` (height, width), int64, and that score.
        """
        logits, input_size = proposals.mask_logits, proposals.input_size
        if use_triton(scores) and semantic_map.is_supported(logits):
            sizes = list(input_size), list(size)
            return semantic_map.semantic_map(logits, scores.float(), *sizes, False)[:2]
        return best_class(logits, scores.float(), input_size, size)

    @torch.inference_mode()
    def score_map(self, scores: Tensor, proposals: Proposals, size: tuple[int, int]) -> Tensor:
        """Sum over queries of class score x mask, resized to the original `size` (height, width):
        [C, *size].
        """
        logits, input_size = proposals.mask_logits, proposals.input_size
        if use_triton(scores) and semantic_map.is_supported(logits):
            sizes = list(input_size), list(size)
            return semantic_map.semantic_map(logits, scores.float(), *sizes, True)[2]
        return class_scores(mask_probabilities(logits, input_size), scores.float(), size)

    def forward(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Image [3, H, W] -> label map int64 `size`."""
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


def class_scores(masks: Tensor, scores: Tensor, size: tuple[int, int]) -> Tensor:
    """map[c] = sum over q of scores[q, c] masks[q], resized: masks [Q, H, W], scores [Q, C] ->
    [C, *size].
    """
    maps = torch.einsum("qc,qhw->chw", scores.to(masks.dtype), masks)
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


def best_class(
    mask_logits: Tensor, scores: Tensor, input_size: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Argmax and maximum of `class_scores` over the classes, a few classes at a time: int64 and
    float `size`.
    """
    C = scores.shape[1]
    masks = mask_probabilities(mask_logits, input_size)
    tile = max(MAX_SCORE_BYTES // (4 * max(math.prod(input_size), math.prod(size))), 1)
    if tile >= C:
        best, labels = class_scores(masks, scores, size).max(0)
        return labels, best
    best = masks.new_full(size, -1.0)
    labels = masks.new_zeros(size, dtype=torch.int64)
    for start in range(0, C, tile):
        maps = class_scores(masks, scores[:, start : start + tile], size)
        for c, value in enumerate(maps, start):
            labels.masked_fill_(value > best, c)
            torch.maximum(best, value, out=best)
    return labels, best
