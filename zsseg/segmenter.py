"""The whole method at inference (Xu et al. 2021): proposals, CLIP on the regions, ensemble, label
map.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import semantic_map
from kernels.jit import use_triton
from zsseg.clip import CLIP
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
class View:
    """A part of an image that is segmented by itself; see `make_views`."""

    image: Tensor  # [3, h, w], mirrored if flipped
    place: tuple[slice, slice]  # of the label map: rows, columns
    flipped: bool
    cover: Tensor  # [H, W]: by how much to divide score maps, for the mean over all views

    @property
    def size(self) -> Size:
        """Of its place."""
        return tuple(self.cover[self.place].shape)

    def add(self, maps: Tensor, mean: Tensor) -> None:
        """Add its score maps [n, *size] to those that are the mean over all views, [n, H, W]."""
        maps = maps.flip(-1) if self.flipped else maps
        mean[:, *self.place] += maps / self.cover[self.place]


@dataclass
class Segmentation:
    """What `Segmenter.segment` finds in an image."""

    labels: Tensor  # class ids int64 [H, W]
    scores: Tensor  # the score of each pixel's class, fp32 [H, W]
    finite: Tensor  # bool []: all masks and scores are numbers; else the labels mean nothing
    variants: dict[str, Tensor] = field(default_factory=dict)  # other label maps, see `variants`


class OpenVocabulary(nn.Module):
    """A network and a frozen CLIP over a vocabulary that `set_classes` fixes and may change at any
    time; `config` is the section `clip`. Not for several threads, if one of them changes it.

    Fully supervised (`model.class_head = "linear"`) there is no CLIP, and the classes are those of
    the data set.
    """

    def __init__(
        self,
        maskformer: nn.Module | None,
        clip: CLIP | None,
        prompt: nn.Module | None,
        config: object,
        region_prompt: nn.Module | None = None,
    ):
        super().__init__()
        self.maskformer = maskformer
        self.clip = clip
        self.prompt = prompt
        self.region_prompt = region_prompt  # the paper's VOC: learned for the regions only
        self.config = config
        self.names: list[str] = []
        self.seen = torch.zeros(0, dtype=torch.bool)  # [C]
        self.text_features = None  # [C, D], for the network's features
        self.region_text_features = None  # [C, D], for CLIP's image features
        self.text_cache: dict[str, dict[str, Tensor]] = {}  # prompt -> word -> feature [D]

    @torch.no_grad()
    def set_classes(
        self, names: list[str], seen: list[int] = (), synonyms: dict[str, list[str]] | None = None
    ) -> None:
        """Fix the vocabulary. `seen` are the ids of the classes that were trained on; empty for
        data without such a split.

        The text features of a class are the mean over its name and its `synonyms`. UserError for
        names that CLIP cannot tell apart or read; nothing has changed then.
        """
        names = check_names(names)
        flags = torch.zeros(len(names), dtype=torch.bool)
        flags[list(seen)] = True
        synonyms = {name.strip(): words for name, words in (synonyms or {}).items()}
        for name, words in synonyms.items():
            if isinstance(words, str) or name not in names:
                what = f"synonyms of {name!r}"
                raise UserError(what, f"are {words!r}", "give lists of words, by names of classes")
        words = [[name, *synonyms.get(name, [])] for name in names]
        check_names([word for row in words for word in row])
        text = region_text = None
        if self.clip is not None:
            text = region_text = self.encode_words("prompt", words)
            if self.region_prompt is not None:
                region_text = self.encode_words("region_prompt", words)
        elif len(names) + 1 != self.maskformer.class_embed.out_features:
            todo = "evaluate on its own data set"
            raise UserError("model.class_head", "is linear, for other classes than these", todo)
        self.names = names
        self.seen = flags.to(next(self.parameters()).device)
        self.text_features = text
        self.region_text_features = region_text

    def encode_words(self, prompt: str, words: list[list[str]]) -> Tensor:
        """The words for each class -> normalised mean of their text features [C, D], with the
        prompt of that name. Each word is encoded once in the life of a segmenter.
        """
        known = self.text_cache.setdefault(prompt, {})
        new = [w for w in dict.fromkeys(w for row in words for w in row) if w not in known]
        if new:
            features = getattr(self, prompt)(self.clip, new).cpu()
            known.update(zip(new, features, strict=True))
        rows = [[known[w] for w in row] for row in words]
        means = [row[0] if len(row) == 1 else F.normalize(sum(row), dim=0) for row in rows]
        return torch.stack(means).to(self.clip.device)

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
        """CLIP's image tower only, which is most of the work."""
        if self.clip is not None:
            self.clip.visual.compile(fullgraph=True, dynamic=False)

    def learned_modules(self) -> dict[str, nn.Module]:
        """The parts with something learned besides CLIP."""
        parts = {name: getattr(self, name) for name in ("maskformer", "prompt", "region_prompt")}
        return {k: part for k, part in parts.items() if part and [*part.parameters()]}

    def learned_state(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint must hold besides CLIP."""
        return {name: part.state_dict() for name, part in self.learned_modules().items()}


class Segmenter(OpenVocabulary):
    """The paper's two stages: a mask proposer, and CLIP on its regions.

    proposer: any f(image) -> (mask_logits [Q, h, w] fp32 at stride 4 of the image padded to
    multiples of 32, class_features [Q, D] in CLIP's space or None), image RGB [3, H, W] in 0..255;
    by default `maskformer.propose`. Without class features CLIP alone names the masks. The words
    come later: neither the masks nor CLIP's features of the regions depend on them.
    """

    def __init__(self, maskformer, clip, prompt, config, region_prompt=None, proposer=None):
        super().__init__(maskformer, clip, prompt, config, region_prompt)
        self.proposer: Callable[[Tensor], tuple] = proposer or maskformer.propose

    @torch.inference_mode()
    def propose(self, image: Tensor) -> Proposals:
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
            parts = (masks[index], boxes[index], mask_logits[index])
            proposals.region_features = self.encode_regions(image, *parts)
        return self.classify(proposals)

    @torch.inference_mode()
    def classify(self, proposals: Proposals) -> Proposals:
        """The same masks with the probabilities of the present classes: one product with the text
        features each.
        """
        class_probs = clip_probs = None
        valid = proposals.valid
        C = len(self.names)
        if (features := proposals.class_features) is not None:
            logits = self.clip.logits if self.maskformer is None else self.maskformer.classify
            probs = logits(features, self.text_features).softmax(-1)
            class_probs = probs[:, :C]  # without no-object
        if (features := proposals.region_features) is not None:
            logits = self.clip.logits(features, self.region_text_features)
            ones = logits.new_ones(len(valid), C)
            clip_probs = ones.masked_scatter(valid[:, None], logits.softmax(-1))
        return replace(proposals, class_probs=class_probs, clip_probs=clip_probs)

    @torch.inference_mode()
    def encode_regions(
        self, image: Tensor, masks: Tensor, boxes: Tensor, mask_logits: Tensor | None = None
    ) -> Tensor:
        """CLIP's features, fp32 [P, D], of the regions of an image [3, H, W]: masks [P, H, W], none
        empty, their boxes [P, 4] and, if there are any, mask logits [P, h, w].
        """
        if not len(masks):
            return image.new_zeros(0, self.clip.embed_dim, dtype=torch.float32)
        regions = Regions(mask_logits, masks, boxes)
        return CLASSIFIERS[self.config.regions](self.clip, image, regions, self.config)

    def region_logits(self, image: Tensor, masks: Tensor, boxes: Tensor) -> Tensor:
        """CLIP's class logits, fp32 [P, C], of such regions."""
        features = self.encode_regions(image, masks, boxes)
        return self.clip.logits(features, self.region_text_features)

    def ensemble(self, proposals: Proposals, weight: float | None = None) -> Tensor:
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

    def variants(self, proposals: Proposals, weights: list[float] | None) -> dict[str, Tensor]:
        """Class scores [Q, C] of the method's parts and of other ensemble weights, from one
        pass; none for `weights` None, or if there is one part only.
        """
        p, c = proposals.class_probs, proposals.clip_probs
        if weights is None or p is None or self.clip is None:
            return {}
        scores = {"head_only": p}
        if c is not None:
            scores["clip_only"] = self.ensemble(proposals, 0)
            # 1 - p(no object)
            scores["clip_objectness"] = scores["clip_only"] * p.sum(1, keepdim=True)
            scores |= {f"weight_{w:g}": self.ensemble(proposals, w) for w in weights}
        return scores

    def binary_masks(self, proposals: Proposals) -> Tensor:
        """Where each proposal is above the threshold, at network-input size: bool [Q, H, W]."""
        logits, size = proposals.mask_logits, proposals.input_size
        return region_masks(logits, size, self.config.mask_threshold)[0].bool()

    @torch.inference_mode()
    def label_map(self, scores: Tensor, proposals: Proposals, size: Size) -> tuple[Tensor, Tensor]:
        """Class scores [Q, C] -> the class with the largest score at every pixel of the original
        `size`, int64, and that score.
        """
        logits, inside = proposals.mask_logits, proposals.input_size
        if use_triton(scores) and semantic_map.is_supported(logits):
            sizes = ([*inside], [*size])
            return semantic_map.semantic_map(logits, scores.float(), *sizes, False)[:2]
        maps = lambda part: self.score_map(scores[:, part], proposals, size)
        return best_class(maps, scores.shape[1], max(math.prod(inside), math.prod(size)))

    @torch.inference_mode()
    def score_map(self, scores: Tensor, proposals: Proposals, size: Size) -> Tensor:
        """Sum over queries of class score x mask, resized to the original `size`: [C, *size]; fp32
        under autocast, too.
        """
        logits, inside = proposals.mask_logits, proposals.input_size
        if use_triton(scores) and semantic_map.is_supported(logits):
            sizes = ([*inside], [*size])
            return semantic_map.semantic_map(logits, scores.float(), *sizes, True)[2]
        masks = mask_probabilities(logits, inside)
        with torch.autocast(masks.device.type, enabled=False):
            maps = torch.einsum("qc,qhw->chw", scores.to(masks.dtype), masks)
        return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]

    @torch.inference_mode()
    def segment(
        self,
        inputs: list[Tensor],
        size: Size,
        flip: bool = False,
        window: int = 0,
        weights: list[float] | None = None,
        proposals: Proposals | None = None,
    ) -> Segmentation:
        """The label map, at the original `size`, of one image [3, H, W] in 0..255. `proposals`: of
        its only input, from an earlier `propose`; they are classified anew, without augmentation.

        Test-time augmentation: the mean score over `inputs` of several sizes, each the mean over
        its windows of side `window` (0: none) and, with `flip`, their mirror images. With `weights`
        the label maps of all `variants`, too. Score maps are computed a few classes at a time.
        """
        options = (False, 0) if proposals else (flip, window)
        views = make_views(inputs, size, *options)
        found = [self.classify(proposals) if proposals else self.propose(v.image) for v in views]
        scores = [{"ensemble": self.ensemble(p)} | self.variants(p, weights) for p in found]
        finite = [p.mask_logits.isfinite().all() for p in found]
        finite += [s["ensemble"].isfinite().all() for s in scores]
        maps = {
            name: self.mean_label_map(views, found, [s[name] for s in scores], size)
            for name in scores[0]
        }
        labels, best = maps.pop("ensemble")
        others = {name: labels for name, (labels, _) in maps.items()}
        return Segmentation(labels, best, torch.stack(finite).all(), others)

    def mean_label_map(
        self, views: list[View], proposals: list[Proposals], scores: list[Tensor], size: Size
    ) -> tuple[Tensor, Tensor]:
        """`label_map` of the mean score over the views of an image."""
        if len(views) == 1:
            return self.label_map(scores[0], proposals[0], size)

        def mean(part: slice) -> Tensor:
            maps = scores[0].new_zeros(len(self.names[part]), *size)
            for view, found, classes in zip(views, proposals, scores, strict=True):
                view.add(self.score_map(classes[:, part], found, view.size), maps)
            return maps

        return best_class(mean, len(self.names), math.prod(size))


def make_views(inputs: list[Tensor], size: Size, flip: bool, window: int) -> list[View]:
    """All windows of side `window` (0: none) of one image [3, H, W] in several sizes, whose label
    map has the `size`, and with `flip` their mirror images. Each input counts once.
    """
    views = []
    for image in inputs:
        H, W = image.shape[-2:]
        cover = torch.zeros(size, device=image.device)
        spans = itertools.product(windows(H, window, size[0]), windows(W, window, size[1]))
        for (rows, top), (columns, left) in spans:
            place = (top, left)
            cover[place] += len(inputs) * (1 + flip)
            part = image[:, rows, columns]
            views.append(View(part, place, False, cover))
            if flip:
                views.append(View(part.flip(-1), place, True, cover))
    return views


def windows(length: int, side: int, size: int) -> list[tuple[slice, slice]]:
    """Windows of `side` that overlap by two thirds and cover `length` pixels, all of them for side
    0, and their places in a label map of `size` pixels.
    """
    side = side or length
    last = max(length - side, 0)
    pairs = []
    for start in [*range(0, last, -(-side // 3)), last]:
        end = min(start + side, length)
        place = slice(start * size // length, -(-end * size // length))
        pairs.append((slice(start, end), place))
    return pairs


def best_class(maps: Callable[[slice], Tensor], C: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Argmax and maximum of the score maps of C classes; maps(some classes) makes as many at a
    time as there is room for with so many `pixels` each.
    """
    tile = max(MAX_SCORE_BYTES // (4 * pixels), 1)
    best, labels = maps(slice(tile)).max(0)
    for start in range(tile, C, tile):
        value, index = maps(slice(start, start + tile)).max(0)
        labels = torch.where(value > best, index + start, labels)
        best = torch.maximum(value, best)
    return labels, best
