"""The small CLIP of the synthetic data set: its sizes, its data and its contrastive training."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from zsseg import checkpoint
from zsseg.clip import CLIP, VisionTransformer
from zsseg.config import Config, ContrastConfig
from zsseg.data import to_tensor
from zsseg.datasets import dataset, find_pairs
from zsseg.distributed import Process
from zsseg.images import read_image, read_labels
from zsseg.regions import mask_boxes, region_crops
from zsseg.tokenizer import Tokenizer
from zsseg.utils import mix_seed


class Contrast:
    """The small CLIP of the synthetic data set, from regions and captions of all classes."""

    def __init__(
        self, config: Config, root: Path, out: Path, process: Process, saved: dict | None = None
    ):
        self.config, self.process = config, process
        self.model = build_small_clip(config.contrast).to(process.device)
        self.tokenizer = Tokenizer(
            self.model.token_embedding.num_embeddings, self.model.context_length
        )
        self.samples, self.collate, self.batch_size = (
            RegionsWithCaptions(config, root),
            list,
            config.contrast.groups,
        )

    def compile(self) -> None:
        self.model.compile(fullgraph=True)

    def loss(self, model: nn.Module, batch: list) -> tuple[Tensor, dict[str, Tensor]]:
        crops, captions = zip(*batch, strict=True)
        G, N = len(crops), len(crops[0])
        tokens = self.tokenizer([text for group in captions for text in group]).to(
            self.process.device
        )
        with self.process.autocast(self.config.model.bf16, training=True):
            image, text = model(torch.cat(crops).to(self.process.device), tokens)  # [G*N, D] each
        image, text = image.float().view(G, N, -1), text.float().view(G, N, -1)
        loss = contrastive_loss(image, text, self.model.logit_scale)
        right = (image @ F.normalize(text, dim=-1).mT).argmax(-1) == torch.arange(
            N, device=image.device
        )
        return loss, {"accuracy": 100 * right.float().mean()}

    def state(self) -> dict:
        return self.model.state_dict()

    def load(self, state: dict, what: str) -> None:
        checkpoint.load_strict(self.model, state, what, "use the configuration of its run")

    def evaluate(self, split: str, out: Path | None, on_image: Callable) -> None:
        """Nothing: the segmenter's evaluation tells how CLIP does on true masks."""


def build_small_clip(config: ContrastConfig) -> CLIP:
    """A CLIP with a convolutional stem (plain patches learn too slowly) and the 514 byte tokens."""
    patch = 2 ** (len(config.stem) + 1)
    sizes = (
        config.resolution,
        patch,
        config.vision_width,
        config.vision_layers,
        config.embed,
        config.stem,
    )
    return CLIP(
        VisionTransformer(*sizes),
        config.embed,
        config.context,
        514,
        config.text_width,
        config.text_layers,
    )


class RegionsWithCaptions(Dataset):
    """Sample n: one region of every class (so no two of them match each other's caption), for
    contrastive training.

    Item: (crops fp32 [N, 3, R, R], captions, a list of N). Some of the regions are masked crops,
    the others plain boxes.
    """

    def __init__(self, config: Config, root: Path):
        self.seed, self.resolution = config.train.seed, config.contrast.resolution
        self.masked_share = config.contrast.masked_share
        data = dataset(config.data)
        pairs = find_pairs(config.data, root, "clip")
        self.images = [to_tensor(read_image(image)) for image, _ in pairs]
        sizes = [(image.shape[2], image.shape[1]) for image in self.images]
        self.labels = [
            torch.from_numpy(read_labels(p[1], data.lut(), s))
            for p, s in zip(pairs, sizes, strict=True)
        ]
        captions = json.loads((data.folder(root) / "captions.json").read_text("utf-8"))
        self.captions = [{int(k): v for k, v in captions[label.stem].items()} for _, label in pairs]
        self.where = [
            [i for i, c in enumerate(self.captions) if k in c] for k in range(len(data.names))
        ]

    def __getitem__(self, n: int) -> tuple[Tensor, list[str]]:
        rng = np.random.default_rng(mix_seed(self.seed, 3, n))
        crops, texts = [], []
        for k, where in enumerate(self.where):
            i = int(rng.choice(where))
            mask = rough_mask(self.labels[i] == k, rng)[None]
            boxes, _ = mask_boxes(mask, float(rng.uniform(0.9, 1.3)))
            seen = mask if rng.random() < self.masked_share else torch.ones_like(mask)
            crop = region_crops(self.images[i], seen, boxes, self.resolution)
            crops.append(crop.flip(-1) if rng.random() < 0.5 else crop)
            texts.append(self.captions[i][k])
        return torch.cat(crops), texts

    def source(self, n: int) -> str:
        return f"sample {n}"  # a region of many images each


def rough_mask(mask: Tensor, rng: np.random.Generator) -> Tensor:
    """A mask [H, W] as a segmenter might propose it: blurred, cut at a random level, never
    empty.
    """
    height, width = mask.shape
    coarse = F.avg_pool2d(mask[None, None].float(), int(rng.choice([1, 2, 4])))
    smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)[0, 0]
    return smooth > min(float(rng.uniform(0.15, 0.75)), 0.9 * float(smooth.max()))


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of groups whose N pairs are all distinct: image, text [G, N, D] ->
    scalar.
    """
    # [G, N, N]
    logits = scale.exp().clamp(max=100) * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).mT
    truth = torch.arange(logits.shape[-1], device=logits.device).expand(len(logits), -1)
    return (F.cross_entropy(logits.mT, truth) + F.cross_entropy(logits, truth)) / 2
