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
from zsseg.clip import CLIP, ConvStem, VisionTransformer
from zsseg.config import Config, ContrastConfig
from zsseg.data import to_tensor
from zsseg.datasets import dataset, find_pairs
from zsseg.distributed import Process
from zsseg.images import read_image, read_labels
from zsseg.regions import expand_boxes, mask_boxes, region_crops
from zsseg.utils import mix_seed


class Contrast:
    """The small CLIP of the synthetic data set, from regions and captions of all classes."""

    def __init__(
        self, config: Config, root: Path, out: Path, process: Process, saved: dict | None = None
    ):
        self.config = config
        self.process = process
        self.model = build_small_clip(config.contrast).to(process.device)
        self.samples = RegionsWithCaptions(config, root)
        self.collate = list
        self.batch_size = config.contrast.groups

    def compile(self) -> None:
        self.model.compile(fullgraph=True)

    def loss(self, model: nn.Module, batch: list) -> tuple[Tensor, dict[str, Tensor]]:
        """G groups of N pairs: (crops [N, 3, R, R], N captions)."""
        device = self.process.device
        crops = torch.stack([crops for crops, _ in batch]).to(device)  # [G, N, 3, R, R]
        G, N = crops.shape[:2]
        tokens = self.model.tokenizer([text for _, captions in batch for text in captions]).to(
            device
        )
        with self.process.autocast(self.config.model.bf16, training=True):
            image, text = model(crops.flatten(0, 1), tokens)  # [G*N, D] each
        image = image.float().view(G, N, -1)
        text = text.float().view(G, N, -1)
        correct = (image @ F.normalize(text, dim=-1).mT).argmax(-1) == torch.arange(
            N, device=device
        )
        loss = contrastive_loss(image, text, self.model.logit_scale)
        return loss, {"accuracy": 100 * correct.float().mean()}

    def state(self) -> dict:
        return self.model.state_dict()

    def load(self, state: dict, what: str) -> None:
        checkpoint.load_strict(self.model, state, what, "use the configuration of its run")

    def evaluate(self, split: str, out: Path | None, on_image: Callable) -> None:
        """Nothing: the segmenter's evaluation measures CLIP on ground-truth masks."""


def build_small_clip(config: ContrastConfig) -> CLIP:
    """A CLIP with a small backbone for a stem (plain patches learn too slowly) and the 514 byte
    tokens.
    """
    visual = VisionTransformer(
        config.resolution,
        ConvStem.stride,
        config.vision_width,
        config.vision_layers,
        config.embed,
        config.stem,
    )
    return CLIP(visual, config.embed, config.context, 514, config.text_width, config.text_layers)


class RegionsWithCaptions(Dataset):
    """Sample n: one region of every class (so no two of them match each other's caption), for
    contrastive training.

    Item: (crops fp32 [N, 3, R, R], captions, a list of N). A crop is the box around the region and
    a little more or less; nothing is masked in it, as in what the real CLIP was trained on.
    """

    def __init__(self, config: Config, root: Path):
        self.seed = config.train.seed
        self.resolution = config.contrast.resolution
        data = dataset(config.data)
        captions = json.loads((data.folder(root) / "captions.json").read_text("utf-8"))
        self.images = []
        self.regions = [[] for _ in data.names]  # (image, box [1, 4], caption) of each class
        for i, (image_file, label_file) in enumerate(find_pairs(config.data, root, "clip")):
            image = to_tensor(read_image(image_file))
            size = (image.shape[2], image.shape[1])
            labels = torch.from_numpy(read_labels(label_file, data.lut(), size))
            self.images.append(image)
            for c, caption in captions[label_file.stem].items():
                box, _ = mask_boxes((labels == int(c))[None])
                self.regions[int(c)].append((i, box, caption))

    def __getitem__(self, n: int) -> tuple[Tensor, list[str]]:
        rng = np.random.default_rng(mix_seed(self.seed, 3, n))
        crops = []
        captions = []
        for regions in self.regions:
            i, box, caption = regions[int(rng.integers(len(regions)))]
            image = self.images[i]
            box = expand_boxes(box, float(rng.uniform(0.9, 1.3)), image.shape[1:])
            crop = region_crops(image, torch.ones_like(image[:1]), box, self.resolution)
            crops.append(crop.flip(-1) if rng.random() < 0.5 else crop)
            captions.append(caption)
        return torch.cat(crops), captions

    def source(self, n: int) -> str:
        return f"sample {n}"  # a region of many images each


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of groups whose N pairs are all distinct: image, text [G, N, D] ->
    scalar.
    """
    # [G, N, N]
    logits = scale.exp().clamp(max=100) * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).mT
    target = torch.arange(logits.shape[-1], device=logits.device).expand(len(logits), -1)
    return (F.cross_entropy(logits.mT, target) + F.cross_entropy(logits, target)) / 2
