"""Learning a prompt (Xu et al. 2021, first stage): masked crops of the seen classes against their
names, CLIP frozen.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms import RandomHorizontalFlip, RandomResizedCrop
from torchvision.transforms.functional import crop

from zsseg.data import EndlessSamples, batches, shown_classes
from zsseg.datasets import find_pairs, training_set
from zsseg.images import read_pair, to_tensor
from zsseg.prompts import LearnedPrompt
from zsseg.regions import region_crops
from zsseg.utils import mix_seed, write_json
from zsseg.weights import load_clip, load_into


class PromptClassifier(nn.Module):
    """Region crops -> cosine logits with the text features of learned prompts, over a frozen CLIP.

    The prompts, one a seed, learn side by side from the same crops: one pass of each tower for all.
    """

    def __init__(self, clip, config):
        super().__init__()
        self.clip = clip
        self.prompts = nn.ModuleDict()
        for seed in config.train.seeds or [config.train.seed]:
            torch.manual_seed(mix_seed(seed, 0))
            prompt = LearnedPrompt(clip.width, config.clip.prompt_prefix)
            self.prompts[str(seed)] = prompt.to(clip.mean.device)
        self.tokens, ends = prompt.layout(clip, training_set(config.data).training_names)
        self.ends = ends.repeat(len(self.prompts))

    def forward(self, crops):
        """Crops [B, 3, R, R] -> logits [S, B, C] of every prompt."""
        inputs = torch.cat([p.embed(self.clip, self.tokens) for p in self.prompts.values()])
        text = self.clip.encode_embedded(inputs, self.ends).float()
        text = F.normalize(text, dim=-1).unflatten(0, (len(self.prompts), -1))
        return self.clip.logits(self.clip.encode_image(crops), text)

    def train(self, mode=True):
        return self  # a frozen CLIP stays in eval mode


class PromptTask:
    """The training of learned prompts, see train.py.

    Results vary with the seed, so that several prompts may learn side by side; the best is the one
    that names held-out regions of the seen classes best.
    """

    collate = list

    def __init__(self, config, root, out, process, saved):
        self.config = config
        self.process = process
        self.clip = load_clip(config.clip, root).to(process.device)
        self.model = PromptClassifier(self.clip, config)
        self.prompts = self.model.prompts
        self.clipped = self.prompts.values()  # the gradient of each by itself
        if saved:
            what = f"checkpoint {out / 'last.pt'}"
            load_into(self.prompts, saved.get("prompts"), what, "use the configuration of its run")
        self.samples = process.main_first(lambda: RegionSamples(config, root))
        self.held_out = RegionSamples(config, root, held_out=True)

    def compile(self):
        for tower in (self.clip.visual, self.clip.transformer):
            tower.compile(fullgraph=True)

    def crops(self, batch):
        """Samples of `RegionSamples` -> what CLIP sees of them [B, 3, R, R], classes [B]."""
        crops = []
        for region, _ in batch:
            region = self.process.put(region)
            _, h, w = region.shape
            box = self.process.put(torch.tensor([[0, 0, w, h]]))
            crops.append(region_crops(self.clip, region[:3], region[3:], box))
        classes = self.process.put(torch.tensor([category for _, category in batch]))
        return torch.cat(crops), classes

    def normalizers(self, batches):
        """Their number: all are of one size."""
        return len(batches)

    def loss(self, model, batch, count):
        """The share of one of `count` batches in the loss of a step, the sum over the seeds, each
        of which has separate parameters, and in the accuracy.
        """
        crops, classes = self.crops(batch)
        with self.process.autocast(self.config.model.bf16, training=True):
            logits = model(crops)  # [S, B, C]
        accuracy = 100 * (logits.argmax(-1) == classes).float().mean()
        loss = sum(F.cross_entropy(part, classes) for part in logits)
        return {"loss": loss / count, "accuracy": accuracy / count}

    def state(self, result):
        """The prompts of all seeds and, as "prompt", that of `result["best_seed"]`."""
        best = result["best_seed"] if result else next(iter(self.prompts))
        return {"prompt": self.prompts[best].state_dict(), "prompts": self.prompts.state_dict()}

    @torch.no_grad()
    def evaluate(self, split, out, on_image):
        """Accuracy of every seed on the held-out regions in percent, None if there are none, and
        the "best_seed"; every process measures all. With `out`, metrics.json and a line.
        """
        count = len(self.held_out)
        hits = torch.zeros(len(self.prompts), device=self.process.device)
        for batch in batches(self.held_out, range(count), 64, self.config.data.workers):
            crops, classes = self.crops(batch)
            hits += (self.model(crops).argmax(-1) == classes).sum(1)
        best = [*self.prompts][hits.argmax()]
        pairs = zip(self.prompts, hits.tolist(), strict=True)
        seeds = {seed: round(100 * n / count, 2) if count else None for seed, n in pairs}
        result = {"best_seed": best, "seeds": seeds}
        if out and self.process.is_main:
            write_json(out / "metrics.json", result)
            print(f"accuracy on {count} held-out regions by seed: {seeds}; the best is {best}")
        return result

    def score(self, result):
        return [result["seeds"][result["best_seed"]] or 0.0]


class RegionSamples(EndlessSamples):
    """Single regions (Xu et al. 2021, first stage): all of a class in an image.

    Item: (RGB and mask uint8 [4, h, w], index among the training classes). The region's box gets a
    random resized crop (scale 0.08..1, ratio 3/4..4/3) and a flip. With `held_out`, the regions
    that are set aside, each the whole of its box.
    """

    def __init__(self, config, root, held_out=False):
        data = training_set(config.data)
        self.seed = config.train.seed
        self.turn = config.data.exif_turn
        self.held_out = held_out
        self.lut = data.lut(training=True)
        pairs = find_pairs(config.data, root, "train")
        rng = np.random.default_rng(self.seed)
        self.items = []  # (image, label map, class)
        for i, shown in enumerate(shown_classes(config, root).T):
            images = rng.permutation(np.flatnonzero(shown))
            aside = min(config.prompts.held_out, len(images) // 5)
            end = aside + config.prompts.samples_per_class
            images = images[:aside] if held_out else images[aside:end]
            self.items += [(*pairs[image], i) for image in images]

    def load(self, n):
        *files, category = self.item(n)
        image, labels = read_pair(*files, self.lut, self.turn)
        image.putalpha(Image.fromarray((labels == category).astype(np.uint8)))
        region = to_tensor(image.crop(image.getbbox()))  # the box of what is not transparent
        if self.held_out:
            return region, category
        torch.manual_seed(mix_seed(self.seed, 6, n))
        part = crop(region, *RandomResizedCrop.get_params(region, (0.08, 1), (3 / 4, 4 / 3)))
        region = part if part[3].any() else region
        return RandomHorizontalFlip()(region).contiguous(), category
