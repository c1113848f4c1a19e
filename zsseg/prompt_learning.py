"""Learning a prompt (Xu et al. 2021, first stage): masked crops of the seen classes against their
names, CLIP frozen.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import Dataset

from zsseg import checkpoint
from zsseg.build import load_clip
from zsseg.clip import CLIP, build_clip, cosine_logits
from zsseg.config import Config
from zsseg.data import stream, to_tensor, training_statistics
from zsseg.datasets import find_pairs, training_set
from zsseg.distributed import Process
from zsseg.files import MARK
from zsseg.files import result as written
from zsseg.images import read_image, read_labels
from zsseg.metrics import percent
from zsseg.prompts import LearnedPrompt, build_prompt
from zsseg.regions import mask_boxes, region_crops
from zsseg.utils import UserError, mix_seed, print_main


class PromptClassifier(nn.Module):
    """Region crops -> 100 x cosine with the text features of one or more learned prompts, over a
    frozen CLIP.

    The prompts learn side by side from the same crops: one pass of each tower for all of them.
    """

    # names x prompts in one pass of the text tower; for more, each prompt's activations are
    # computed twice
    GROUP_SIZE = 512

    def __init__(self, clip: CLIP, prompts: list[LearnedPrompt], names: list[str]):
        super().__init__()
        self.clip = clip
        self.prompts = nn.ModuleList(prompts)
        self.names = names
        tokens, ends = prompts[0].layout(clip.tokenizer, names)
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("ends", ends, persistent=False)

    def text(self) -> Tensor:
        """Normalised text features of every prompt [S, C, D]."""
        inputs = [prompt.embed(self.clip, self.tokens) for prompt in self.prompts]
        if len(inputs) * len(self.names) <= self.GROUP_SIZE:
            features = self.clip.encode_embedded(torch.cat(inputs), self.ends.repeat(len(inputs)))
        else:
            features = torch.cat(
                [
                    recompute(self.clip.encode_embedded, x, self.ends, use_reentrant=False)
                    for x in inputs
                ]
            )
        return F.normalize(features.float(), dim=-1).unflatten(0, (len(inputs), -1))

    def forward(self, crops: Tensor) -> Tensor:
        """Crops [B, 3, R, R] -> logits [S, B, C]."""
        with torch.no_grad():
            features = self.clip.encode_image(crops)
        return cosine_logits(features, self.text())

    def train(self, mode: bool = True) -> "PromptClassifier":
        return self  # a frozen CLIP stays in eval mode


class Prompts:
    """The learned prompt (Xu et al. 2021, first stage): masked crops of the seen classes against
    their text features.

    Results vary with the seed, so that several prompts may learn side by side; the one that names
    held-out regions of the seen classes best (mean accuracy over the classes) is kept.
    """

    def __init__(
        self, config: Config, root: Path, out: Path, process: Process, saved: dict | None = None
    ):
        self.config, self.process = config, process
        clip = build_clip(load_clip(config, root), config.clip.activation, config.clip.heads)
        self.seeds, prompts = config.train.seeds or [config.train.seed], []
        for seed in self.seeds:
            torch.manual_seed(mix_seed(seed, 0))
            prompts.append(LearnedPrompt(clip.width, config.clip.prompt_prefix))
        self.model = PromptClassifier(clip, prompts, training_set(config.data).training_names).to(
            process.device
        )
        self.samples = process.main_process_first(
            lambda: Regions(config, root, clip.visual.resolution)
        )
        self.collate, self.batch_size, self.kept = (
            torch.utils.data.default_collate,
            config.train.batch_size,
            0,
        )

    def compile(self) -> None:
        for part in (self.model.clip.visual, self.model.clip.transformer):
            part.compile(fullgraph=True)

    def loss(self, model: nn.Module, batch: list) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over the seeds, each of which has parameters of its own."""
        crops, classes = (x.to(self.process.device, non_blocking=True) for x in batch)
        with self.process.autocast(self.config.model.bf16, training=True):
            logits = model(crops)  # [S, B, C]
        accuracy = 100 * (logits.argmax(-1) == classes).float().mean()
        S = len(logits)
        return S * F.cross_entropy(logits.float().flatten(0, 1), classes.repeat(S)), {
            "accuracy": accuracy
        }

    def state(self) -> dict:
        states = {
            f"prompt_of_seed_{seed}": p.state_dict()
            for seed, p in zip(self.seeds, self.model.prompts, strict=True)
        }
        return states | {"prompt": self.model.prompts[self.kept].state_dict()}

    def load(self, state: dict, what: str) -> None:
        for seed, prompt in zip(self.seeds, self.model.prompts, strict=True):
            checkpoint.load_strict(
                prompt,
                state.get(f"prompt_of_seed_{seed}", {}),
                what,
                "use the configuration of its run",
            )

    @torch.no_grad()
    def evaluate(self, split: str, out: Path | None, on_image: Callable) -> dict:
        """Accuracy of every seed on the held-out regions in percent: over regions ("top1") and its
        mean over classes.
        """
        single = build_prompt("single", 0)(self.model.clip, self.model.names)
        S, C, device = len(self.seeds), len(self.model.names), self.process.device
        text = torch.cat([self.model.text(), single[None]])  # a fixed prompt for comparison
        right, count = torch.zeros(S + 1, C, device=device), torch.zeros(C, device=device)
        held = HeldOut(self.samples)
        numbers = range(self.process.rank, len(self.samples.held_out), self.process.world_size)
        workers = self.config.data.workers
        for crops, classes in stream(
            held, numbers, 64, workers, self.collate, lambda error: print_main(f"left out: {error}")
        ):
            classes = classes.to(device)
            features = self.model.clip.encode_image(crops.to(device))
            named = cosine_logits(features, text).argmax(-1)  # [S + 1, B]
            right.index_add_(1, classes, (named == classes).float())
            count.index_add_(0, classes, torch.ones_like(classes, dtype=torch.float))
        right, count = self.process.sum(right), self.process.sum(count)
        there = count > 0
        # Nothing is held out where every class has fewer than five regions.
        top1 = mean = [None] * (S + 1)
        spread = average = None
        if there.any():
            top1 = (100 * right.sum(1) / count.sum()).tolist()
            mean = (100 * right[:, there] / count[there]).mean(1).tolist()
            self.kept = max(range(S), key=lambda i: mean[i])
            average, spread = sum(mean[:S]) / S, float(torch.tensor(mean[:S]).std(correction=0))
        return {
            "held_out_regions": int(count.sum()),
            "kept_seed": self.seeds[self.kept],
            "std": spread,
            "mean": average,
            "single": {"top1": top1[S], "per_class": mean[S]},
            "seeds": {
                str(s): {"top1": top1[i], "per_class": mean[i]} for i, s in enumerate(self.seeds)
            },
        }

    def score(self, result: dict) -> list[float]:
        kept = result["seeds"][str(result["kept_seed"])]["per_class"]
        return [-math.inf if kept is None else kept]

    def report(self, result: dict, out: Path) -> None:
        with written(out / "metrics.json") as file:
            file.write_text(
                json.dumps({"program": MARK} | result, indent=1, allow_nan=False) + "\n"
            )
        rows = {"single (fixed)": result["single"]} | {
            f"seed {k}": v for k, v in result["seeds"].items()
        }
        print(f"{'held-out regions':20}{'top-1':>8}{'per class':>11}")
        for name, row in rows.items():
            print(f"{name:20}{percent(row['top1'], 8)}{percent(row['per_class'], 11)}")
        print(
            f"{percent(result['mean'], 0)} +- {percent(result['std'], 0)} over the seeds; seed "
            f"{result['kept_seed']} is kept "
            f"({result['held_out_regions']} regions of seen classes) -> {out / 'last.pt'}"
        )


class Regions(Dataset):
    """Sample n of an endless stream of single regions, for learning a prompt (Xu et al. 2021, first
    stage).

    Item: (crop fp32 [3, R, R] as CLIP sees it at inference, index among the training classes). A
    region is all of a class in an image; its box gets a random resized crop (scale 0.08..1, ratio
    3/4..4/3) and a flip. `held_out` regions of each class are set aside and never drawn.
    """

    def __init__(self, config: Config, root: Path, resolution: int):
        self.data, self.seed, self.resolution = (
            training_set(config.data),
            config.train.seed,
            resolution,
        )
        self.turn = config.data.exif_turn
        self.pairs, self.lut = find_pairs(config.data, root, "train"), self.data.lut(training=True)
        statistics = training_statistics(config.data, root)
        rng, few = np.random.default_rng(self.seed), config.prompts.samples_per_class
        self.regions, self.held_out = [], []  # (image, class)
        for i, category in enumerate(self.data.trained):
            shown = statistics.image[statistics.category == category]
            drawn, aside = rng.permutation(shown), min(config.prompts.held_out, len(shown) // 5)
            self.held_out += [(int(image), i) for image in drawn[:aside]]
            self.regions += [(int(image), i) for image in drawn[aside:][:few]]
        if not self.regions:
            raise UserError(
                f"data set {config.data.name}",
                "no training image shows a class that is trained on",
                "check it",
            )

    def __getitem__(self, n: int) -> tuple[Tensor, int]:
        return self.crop(*self.region(n), np.random.default_rng(mix_seed(self.seed, 6, n)))

    def region(self, n: int) -> tuple[int, int]:
        """(image, class) of sample n: all regions in a fresh order every epoch."""
        epoch, i = divmod(n, len(self.regions))
        return self.regions[
            np.random.default_rng(mix_seed(self.seed, 5, epoch)).permutation(len(self.regions))[i]
        ]

    def source(self, n: int) -> str:
        """The image that sample n shows."""
        return str(self.pairs[self.region(n)[0]][0])

    def crop(
        self, number: int, category: int, rng: np.random.Generator | None = None
    ) -> tuple[Tensor, int]:
        """A region as `__getitem__` gives it; without `rng` all of its box, as at inference."""
        image = read_image(self.pairs[number][0], turn=self.turn)
        mask = read_labels(self.pairs[number][1], self.lut, image.size) == category
        x0, y0, x1, y1 = mask_boxes(torch.from_numpy(mask)[None])[0][0].tolist()
        R, box = self.resolution, (x0, y0, x1, y1)
        if rng is None:
            return region_crops(
                to_tensor(image), torch.from_numpy(mask)[None], torch.tensor([box]), R
            )[0], category
        mirrored = rng.random() < 0.5
        for _ in range(10):  # until some of the region is in the crop
            left, top, w, h = resized_crop_box(x1 - x0, y1 - y0, rng)
            box = (x0 + left, y0 + top, x0 + left + w, y0 + top + h)
            if np.asarray(
                Image.fromarray(mask).resize((R, R), Image.Resampling.NEAREST, box)
            ).any():
                break
        else:  # around one of its pixels, at most R wide, so that sampling cannot miss it
            y, x = rng.choice(np.argwhere(mask))
            box = (
                max(x - R // 2, x0),
                max(y - R // 2, y0),
                min(x + (R + 1) // 2, x1),
                min(y + (R + 1) // 2, y1),
            )
        crop = region_crops(to_tensor(image), torch.from_numpy(mask)[None], torch.tensor([box]), R)[
            0
        ]
        return crop.flip(-1) if mirrored else crop, category


class HeldOut(Dataset):
    """The held-out regions of `Regions`, each all of its box; after the last one comes the
    first.
    """

    def __init__(self, regions: Regions):
        self.regions = regions

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.regions.crop(*self.regions.held_out[i % len(self.regions.held_out)])


def resized_crop_box(
    width: int, height: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random part of an image: area 0.08..1 of it, aspect 3/4..4/3
    (Inception's crop).
    """
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w, h = min(width, max(round(height * 4 / 3), 1)), min(height, max(round(width * 4 / 3), 1))
    return (width - w) // 2, (height - h) // 2, w, h
