"""The whole method at inference (Xu et al. 2021): proposals, CLIP on the regions, ensemble, label
map.
"""

import itertools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import semantic_map
from kernels.jit import use_triton
from zsseg.regions import CLASSIFIERS, Regions, mask_probabilities, region_masks
from zsseg.tokenizer import check_names
from zsseg.utils import UserError

MAX_SCORE_BYTES = 2**28  # of score maps that a label map computes at once
Size = tuple[int, int]  # height, width


@dataclass
class Proposals:
    """The masks of one image, what both classifiers see in each, and their predictions; other
    classes, ensembles and label maps follow without another pass of the networks.
    """

    mask_logits: Tensor  # [Q, h, w] fp32, at stride 4 of the padded network input
    input_size: Size  # of the network input before padding
    valid: Tensor  # [Q] bool: the mask has a pixel above the threshold
    class_features: Tensor | None = None  # [Q, D] of the proposer
    region_features: Tensor | None = None  # [P, D] of CLIP, fp32, for the P valid masks
    # What the present classes make of them, see `Segmenter.classify`
    class_probs: Tensor | None = None  # [Q, C] of the proposer, no-object dropped
    clip_probs: Tensor | None = None  # [Q, C] of CLIP, 1 for an empty mask


@dataclass
class Segmentation:
    """What `Segmenter.segment` finds in an image."""

    labels: Tensor  # class ids int64 [H, W]
    # The score of each pixel's class, fp32 [H, W]; below 0 or NaN where the labels mean nothing,
    # since masks or scores were no numbers
    scores: Tensor
    variants: dict[str, Tensor]  # other label maps, see `Segmenter.variants`


class OpenVocabulary(nn.Module):
    """A network and a frozen CLIP over a vocabulary that `set_classes` fixes and may change at any
    time; `config` is the section `clip`. Not for several threads, if one of them changes it.

    Fully supervised (`model.class_head = "linear"`) there is no CLIP, and the classes are those of
    the data set.
    """

    def __init__(self, maskformer, clip, prompt, config, region_prompt=None, proposer=None):
        super().__init__()
        self.maskformer = maskformer
        self.clip = clip
        self.prompt = prompt
        self.region_prompt = region_prompt  # the paper's VOC: learned for the regions only
        self.config = config
        self.proposer = proposer or getattr(maskformer, "propose", None)
        self.text_cache = {}  # prompt -> word -> feature [D]

    @torch.no_grad()
    def set_classes(self, names, seen=(), synonyms=None):
        """Fix the vocabulary. `seen` are the ids of the classes that were trained on; empty for
        data without such a split.

        The text features of a class are the mean over its name and its `synonyms`. UserError for
        names that CLIP cannot tell apart or read; nothing has changed then.
        """
        words = {name: [name] for name in check_names(names)}
        for name, others in (synonyms or {}).items():
            if isinstance(others, str) or name.strip() not in words:
                what = f"synonyms of {name!r}"
                raise UserError(what, f"are {others!r}", "give lists of words, by names of classes")
            words[name.strip()] += others
        check_names([*itertools.chain(*words.values())])
        text = region_text = None
        if self.clip is not None:
            text = self.encode_words(self.prompt, words.values())
            region_text = self.encode_words(self.region_prompt or self.prompt, words.values())
        elif [*words] != getattr(self, "names", [*words]):  # fixed by the first call
            todo = "evaluate on its own data set"
            raise UserError("model.class_head", "is linear, for other classes than these", todo)
        device = next(self.parameters()).device
        self.seen = torch.tensor([i in seen for i in range(len(words))], device=device)  # [C]
        self.names = [*words]
        self.text_features = text  # [C, D], for the network's features
        self.region_text_features = region_text  # [C, D], for CLIP's image features

    def encode_words(self, prompt, words):
        """The words for each class -> normalised mean of their text features [C, D]. Each word is
        encoded once in the life of a segmenter.
        """
        known = self.text_cache.setdefault(prompt, {})
        if new := [w for w in itertools.chain(*words) if w not in known]:
            known |= zip(new, prompt(self.clip, new).cpu(), strict=True)
        features = [F.normalize(sum(known[w] for w in row), dim=0) for row in words]
        return torch.stack(features).to(self.clip.mean.device)

    def segment_views(self, inputs, size, flip, window):
        """Test-time augmentation: the mean of the score maps of one image over its `inputs`
        [3, H, W] of several sizes, each the mean over its windows of side `window` (0: none) and,
        with `flip`, their mirror images.
        """
        mean = 0
        for image in inputs:
            H, W = image.shape[-2:]
            count = torch.zeros(size, device=image.device)
            total = count.repeat(len(self.names), 1, 1)
            places = itertools.product(windows(H, window, size[0]), windows(W, window, size[1]))
            for (rows, top), (columns, left) in places:
                part = image[:, rows, columns]
                place = count[top, left]
                maps = self.score_map(part, place.shape)
                if flip:
                    maps = (maps + self.score_map(part.flip(-1), place.shape).flip(-1)) / 2
                place += 1
                total[:, top, left] += maps
            mean = mean + total / count / len(inputs)
        best, labels = mean.max(0)
        return Segmentation(labels, best, {})

    def accelerate(self, dtype, graphs=False, compiled=False):
        """Make the networks, which learn no more, fast: products in `dtype`, as CUDA graphs and
        through torch.compile if wanted. Results stay the same up to rounding.
        """
        for network in filter(None, (self.maskformer, self.clip)):
            network.accelerate(dtype, graphs, compiled)

    def learned_modules(self):
        """The parts with something learned besides CLIP."""
        others = ("clip", "proposer")
        parts = self.named_children()
        return {k: part for k, part in parts if k not in others and [*part.parameters()]}

    def learned_state(self):
        """What a checkpoint must hold besides CLIP."""
        return {name: part.state_dict() for name, part in self.learned_modules().items()}


class Segmenter(OpenVocabulary):
    """The paper's two stages: a mask proposer, and CLIP on its regions.

    proposer: any f(image) -> (mask_logits [Q, h, w] fp32 at stride 4 of the image padded to
    multiples of 32, class_features [Q, D] in CLIP's space or None), image RGB [3, H, W] in 0..255;
    by default `maskformer.propose`. Without class features CLIP alone names the masks. The words
    come later: neither the masks nor CLIP's features of the regions depend on them.
    """

    @torch.inference_mode()
    def propose(self, image):
        """One pass of the networks; image: RGB uint8 or float in 0..255 [3, H, W] at network-input
        size.
        """
        # fp32 on a CPU: masks are thresholded, and this is little of the work.
        with torch.autocast("cpu", enabled=False):
            mask_logits, class_features = self.proposer(image)
        size = tuple(image.shape[-2:])
        masks, boxes, valid = region_masks(mask_logits, size, self.config.mask_threshold)
        proposals = Proposals(mask_logits, size, valid, class_features)
        if self.clip is not None and (self.config.ensemble or class_features is None):
            index = valid.nonzero()[:, 0]  # once: a GPU is waited for
            proposals.region_features = self.encode_regions(image, Regions(masks, boxes, index))
        return self.classify(proposals)

    @torch.inference_mode()
    def classify(self, proposals):
        """The same masks with the probabilities of the present classes: one product with the text
        features each.
        """
        p = c = None
        C = len(self.names)
        if (features := proposals.class_features) is not None:
            logits = self.clip.logits if self.maskformer is None else self.maskformer.classify
            p = logits(features, self.text_features).softmax(-1)[:, :C]  # without no-object
        if (features := proposals.region_features) is not None:
            probs = self.clip.logits(features, self.region_text_features).softmax(-1)
            valid = proposals.valid[:, None]
            c = probs.new_ones(len(valid), C).masked_scatter(valid, probs)
        return replace(proposals, class_probs=p, clip_probs=c)

    def encode_regions(self, image, regions):
        """CLIP's features, fp32 [P, D], of the regions of an image [3, H, W]."""
        if not len(regions.index):
            return image.new_zeros(0, self.clip.embed_dim, dtype=torch.float32)
        return CLASSIFIERS[self.config.regions](self.clip, image, regions, self.config)

    def region_logits(self, image, masks, boxes):
        """CLIP's class logits, fp32 [P, C], of regions: masks [P, H, W], none empty, and their
        boxes [P, 4].
        """
        index = torch.arange(len(masks), device=masks.device)
        features = self.encode_regions(image, Regions(masks, boxes, index))
        return self.clip.logits(features, self.region_text_features)

    def ensemble(self, proposals, weight=None):
        """Class scores [Q, C] with ensemble weight w (None: the configuration's).

        p of the proposer, c of CLIP: seen classes p^w c^(1-w), unseen ones p^(1-w) c^w; w = 0, and
        a proposer without class features, is CLIP only, valid queries only.
        """
        w = self.config.ensemble_weight if weight is None else weight
        p, c = proposals.class_probs, proposals.clip_probs
        if c is None:
            return p
        if w == 0 or p is None:
            return c * proposals.valid[:, None]
        power = torch.where(self.seen & self.config.ensemble_seen, w, 1 - w)  # [C], of the proposer
        return p**power * c ** (1 - power)

    def variants(self, proposals, weights):
        """Class scores [Q, C] of the method's parts and of other ensemble weights, from one pass;
        none if there is one part only.
        """
        p = proposals.class_probs
        if p is None or self.clip is None:
            return {}
        scores = {"head_only": p}
        if proposals.clip_probs is not None:
            alone = scores["clip_only"] = self.ensemble(proposals, 0)
            scores["clip_objectness"] = alone * p.sum(1, keepdim=True)  # 1 - p(no object)
            scores |= {f"weight_{w:g}": self.ensemble(proposals, w) for w in weights}
        return scores

    def binary_masks(self, proposals):
        """Where each proposal is above the threshold, at network-input size: bool [Q, H, W]."""
        masks, size = proposals.mask_logits, proposals.input_size
        return region_masks(masks, size, self.config.mask_threshold)[0].bool()

    def label_map(self, scores, proposals, size, all_scores=False):
        """The sum over queries of class score [Q, C] x mask, resized to the original `size`, fp32
        under autocast, too: the class with the largest at every pixel, int64, that score and, with
        `all_scores`, those of all classes [C, *size]; else a few classes at a time are computed.
        """
        logits = proposals.mask_logits
        inside = proposals.input_size
        if use_triton(scores) and semantic_map.is_supported(logits, inside):
            return semantic_map.semantic_map(logits, scores, inside, size, all_scores)
        pixels = math.prod(inside) + math.prod(size)
        tile = scores.shape[1] if all_scores else max(MAX_SCORE_BYTES // (4 * pixels), 1)
        masks = mask_probabilities(logits, inside)
        labels = 0
        best = torch.full(size, -math.inf, device=scores.device)
        for i, part in enumerate(scores.split(tile, 1)):
            with torch.autocast(masks.device.type, enabled=False):
                maps = torch.einsum("qc,qhw->chw", part.float(), masks)
            maps = F.interpolate(maps[None], size, mode="bilinear")[0]
            score, index = maps.max(0)
            labels = torch.where(score > best, index + i * tile, labels)
            best = torch.maximum(score, best)
        return labels, best, maps

    def score_map(self, image, size):
        """All class scores [C, *size] of an image [3, H, W] in 0..255."""
        found = self.propose(image)
        return self.label_map(self.ensemble(found), found, size, True)[2]

    def segment(self, inputs, size, flip=False, window=0, weights=None, proposals=None):
        """The label map, at the original `size`, of one image [3, H, W] in 0..255, and with
        `weights` those of all `variants`. `proposals`: of its only input, from an earlier
        `propose`; they are classified anew, without augmentation.

        Test-time augmentation by several inputs, `flip` or `window`: see `segment_views`; it has
        no variants.
        """
        if proposals is None and (flip or window or len(inputs) > 1):
            return self.segment_views(inputs, size, flip, window)
        found = self.classify(proposals) if proposals else self.propose(inputs[0])
        labels, best, _ = self.label_map(self.ensemble(found), found, size)
        others = {} if weights is None else self.variants(found, weights)
        maps = {name: self.label_map(part, found, size)[0] for name, part in others.items()}
        return Segmentation(labels, best, maps)


def windows(length, side, size):
    """Windows of `side` that overlap by two thirds and cover `length` pixels, all of them for side
    0; and their places in a label map of `size` pixels.
    """
    side = min(side or length, length)
    starts = [*range(0, length - side, -(-side // 3)), length - side]
    windows = [slice(start, start + side) for start in starts]
    return [(w, slice(w.start * size // length, -(-w.stop * size // length))) for w in windows]
