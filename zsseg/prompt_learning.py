"""Learning a prompt (Xu et al. 2021, first stage): masked crops of the seen classes against their
names, CLIP frozen.
"""

import statistics
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import RandomResizedCrop

from zsseg.clip import CLIP
from zsseg.config import Config
from zsseg.data import EndlessSamples, batches, training_counts
from zsseg.datasets import find_pairs, training_set
from zsseg.distributed import Process
from zsseg.images import read_image, read_labels, to_tensor
from zsseg.metrics import mean, percent
from zsseg.prompts import LearnedPrompt, build_prompt
from zsseg.regions import region_crops
from zsseg.utils import UserError, format_table, mix_seed, write_json
from zsseg.weights import load_clip, load_into


class PromptClassifier(nn.Module):
    """Region crops -> cosine logits with the text features of one or more learned prompts, over a
    frozen CLIP.

    The prompts learn side by side from the same crops: one pass of each tower for all of them.
    """

    def __init__(self, clip: CLIP, prompts: dict[str, LearnedPrompt], names: list[str]):
        super().__init__()
        self.clip = clip
        self.prompts = nn.ModuleDict(prompts)
        tokens, ends = next(iter(prompts.values())).layout(clip.tokenizer, names)
        tokens = tokens[:, : int(ends.max()) + 1]  # nothing reads what follows the last end token
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("ends", ends.repeat(len(prompts)), persistent=False)

    def text(self) -> Tensor:
        """Normalised text features of every prompt [S, C, D]."""
        inputs = torch.cat([p.embed(self.clip, self.tokens) for p in self.prompts.values()])
        features = self.clip.encode_embedded(inputs, self.ends).float()
        return F.normalize(features, dim=-1).unflatten(0, (len(self.prompts), -1))

    def forward(self, crops: Tensor) -> Tensor:
        """Crops [B, 3, R, R] -> logits [S, B, C]."""
        with torch.no_grad():
            features = self.clip.encode_image(crops)
        return self.clip.logits(features, self.text())

    def train(self, mode: bool = True) -> "PromptClassifier":
        return self  # a frozen CLIP stays in eval mode


class PromptTask:
    """The training of learned prompts, see train.py.

    Results vary with the seed, so that several prompts may learn side by side; the best is the one
    that names held-out regions of the seen classes best (mean accuracy over the classes).
    """

    collate = list

    def __init__(self, config: Config, root: Path, out: Path, process: Process, saved: dict | None):
        self.config = config
        self.process = process
        clip = load_clip(config.clip, root)
        self.names = training_set(config.data).training_names
        prompts = {}
        for seed in config.train.seeds or [config.train.seed]:
            torch.manual_seed(mix_seed(seed, 0))
            prompts[str(seed)] = LearnedPrompt(clip.width, config.clip.prompt_prefix)
        self.model = PromptClassifier(clip, prompts, self.names).to(process.device)
        self.prompts = self.model.prompts
        self.clipped = self.prompts.values()  # the gradient of each by itself
        self.samples = process.main_first(lambda: RegionSamples(config, root))
        self.held_out = RegionSamples(config, root, held_out=True)

    def compile(self) -> None:
        self.model.clip.visual.compile(fullgraph=True)
        self.model.clip.transformer.compile(fullgraph=True)

    def crops(self, batch: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """Samples of `RegionSamples` -> what CLIP sees of them [B, 3, R, R], classes [B]."""
        device = self.process.device
        crops = []
        for region, _ in batch:
            region = region.to(device, non_blocking=True)
            box = torch.tensor([[0, 0, region.shape[2], region.shape[1]]], device=device)
            crops.append(region_crops(self.model.clip, region[:3], region[3:], box))
        return torch.cat(crops), torch.tensor([category for _, category in batch], device=device)

    def loss(self, model: nn.Module, batch: list) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over the seeds, each of which has separate parameters, and the accuracy."""
        crops, classes = self.crops(batch)
        with self.process.autocast(self.config.model.bf16, training=True):
            logits = model(crops)  # [S, B, C]
        accuracy = 100 * (logits.argmax(-1) == classes).float().mean()
        loss = F.cross_entropy(logits.flatten(0, 1), classes.repeat(len(logits)))
        return len(logits) * loss, {"accuracy": accuracy}

    def state(self, result: dict | None = None) -> dict[str, dict[str, Tensor]]:
        """The prompts of all seeds and, as "prompt", that of `result["kept_seed"]`."""
        best = result["kept_seed"] if result else next(iter(self.prompts))
        return {
            "prompt": self.prompts[str(best)].state_dict(),
            "prompts": self.prompts.state_dict(),
        }

    def load(self, state: dict[str, dict[str, Tensor]], what: str) -> None:
        load_into(self.prompts, state.get("prompts"), what, "use the configuration of its run")

    @torch.no_grad()
    def evaluate(self, split: str, out: Path | None = None, on_image: object = None) -> dict:
        """Accuracy of every seed on the held-out regions in percent: over regions ("top1") and its
        mean over classes; "kept_seed" is the best. With `out`, metrics.json and a table.
        """
        clip = self.model.clip
        single = build_prompt("single", clip.width)(clip, self.names)  # for comparison
        text = torch.cat([self.model.text(), single[None]])  # [S + 1, C, D]
        # Of each class: hits of each prompt and, last, regions.
        counts = torch.zeros(len(text) + 1, text.shape[1], device=text.device)
        numbers = range(self.process.rank, len(self.held_out), self.process.world_size)
        for batch in batches(self.held_out, numbers, 64, self.config.data.workers):
            crops, classes = self.crops(batch)
            hits = clip.logits(clip.encode_image(crops), text).argmax(-1) == classes  # [S + 1, B]
            counts.index_add_(1, classes, F.pad(hits.float(), (0, 0, 0, 1), value=1))
        *hits, total = self.process.sum(counts).double().cpu().numpy()
        rows = {}
        for name, hit in zip([*self.prompts, "single"], hits, strict=True):
            right = 100 * hit / np.maximum(total, 1)
            rows[name] = {"top1": mean(right, total), "per_class": mean(right, total > 0)}
        scores = [rows[seed]["per_class"] or 0.0 for seed in self.prompts]
        result = {
            "held_out_regions": int(total.sum()),
            "kept_seed": int([*self.prompts][scores.index(max(scores))]),
            "mean": statistics.mean(scores) if total.any() else None,
            "std": statistics.pstdev(scores) if total.any() else None,
            "single": rows["single"],
            "seeds": {seed: rows[seed] for seed in self.prompts},
        }
        if out and self.process.is_main:
            write_json(out / "metrics.json", result)
            cells = [[name, *map(percent, row.values())] for name, row in rows.items()]
            print(format_table(["prompt of seed", "top-1", "per class"], cells))
            print(f"the prompt is that of seed {result['kept_seed']}")
        return result

    def score(self, result: dict) -> list[float]:
        return [result["seeds"][str(result["kept_seed"])]["per_class"] or 0.0]


class RegionSamples(EndlessSamples):
    """Single regions (Xu et al. 2021, first stage): all of a class in an image.

    Item: (RGB and mask uint8 [4, h, w], index among the training classes). The region's box gets a
    random resized crop (scale 0.08..1, ratio 3/4..4/3) and a flip. With `held_out`, the regions
    that are set aside, each the whole of its box.
    """

    def __init__(self, config: Config, root: Path, held_out: bool = False):
        data = training_set(config.data)
        self.seed = config.train.seed
        self.turn = config.data.exif_turn
        self.held_out = held_out
        self.lut = data.lut(training=True)
        pairs = find_pairs(config.data, root, "train")
        counts = training_counts(config, root)
        rng = np.random.default_rng(self.seed)
        self.items = []  # (image, label map, class)
        for i, category in enumerate(data.trained):
            images = rng.permutation(np.flatnonzero(counts[:, category] > 0)).tolist()
            aside = min(config.prompts.held_out, len(images) // 5)
            last = aside + config.prompts.samples_per_class
            chosen = images[:aside] if held_out else images[aside:last]
            self.items += [(*pairs[image], i) for image in chosen]
        if not self.items and not held_out:
            why = "no training image shows a class that is trained on"
            raise UserError(f"data set {config.data.name}", why, "check it")

    def load(self, n: int) -> tuple[Tensor, int]:
        image_file, label_file, category = self.item(n)
        image = read_image(image_file, turn=self.turn)
        mask = read_labels(label_file, self.lut, image.size) == category
        y, x = np.nonzero(mask)
        pixels = np.dstack([image, mask])[y.min() : y.max() + 1, x.min() : x.max() + 1]
        region = to_tensor(pixels)
        if self.held_out:
            return region, category
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(mix_seed(self.seed, 6, n))
            top, left, h, w = RandomResizedCrop.get_params(region, (0.08, 1), (3 / 4, 4 / 3))
            mirrored = torch.rand(()) < 0.5
        part = region[:, top : top + h, left : left + w]
        region = part if part[3].any() else region
        return (region.flip(-1) if mirrored else region).contiguous(), category
