"""Prompts: class names -> text features: fixed templates or learned (Xu et al. 2021)."""

import torch
import torch.nn.functional as F
from torch import nn

from zsseg.utils import UserError

# The prompt templates of the paper, verbatim, one a line; {} stands for the class name.
TEMPLATES = {
    "single": ["a sculpture of a {}."],
    "imagenet": """\
a bad photo of a {}.
a photo of many {}.
a sculpture of a {}.
a photo of the hard to see {}.
a low resolution photo of the {}.
a rendering of a {}.
graffiti of a {}.
a bad photo of the {}.
a cropped photo of the {}.
a tattoo of a {}.
the embroidered {}.
a photo of a hard to see {}.
a bright photo of a {}.
a photo of a clean {}.
a photo of a dirty {}.
a dark photo of the {}.
a drawing of a {}.
a photo of my {}.
the plastic {}.
a photo of the cool {}.
a close-up photo of a {}.
a black and white photo of the {}.
a painting of the {}.
a painting of a {}.
a pixelated photo of the {}.
a sculpture of the {}.
a bright photo of the {}.
a cropped photo of a {}.
a plastic {}.
a photo of the dirty {}.
a jpeg corrupted photo of a {}.
a blurry photo of the {}.
a photo of the {}.
a good photo of the {}.
a rendering of the {}.
a {} in a video game.
a photo of one {}.
a doodle of a {}.
a close-up photo of the {}.
a photo of a {}.
the origami {}.
the {} in a video game.
a sketch of a {}.
a doodle of the {}.
a origami {}.
a low resolution photo of a {}.
the toy {}.
a rendition of the {}.
a photo of the clean {}.
a photo of a large {}.
a rendition of a {}.
a photo of a nice {}.
a photo of a weird {}.
a blurry photo of a {}.
a cartoon {}.
art of a {}.
a sketch of the {}.
a embroidered {}.
a pixelated photo of a {}.
itap of the {}.
a jpeg corrupted photo of the {}.
a good photo of a {}.
a plushie {}.
a photo of the nice {}.
a photo of the small {}.
a photo of the weird {}.
the cartoon {}.
art of the {}.
a drawing of the {}.
a photo of the large {}.
a black and white photo of a {}.
the plushie {}.
a dark photo of a {}.
itap of a {}.
graffiti of the {}.
a toy {}.
itap of my {}.
a photo of a cool {}.
a photo of a small {}.
a tattoo of the {}.""".splitlines(),
    "vild": """\
a photo of a {}.
This is a photo of a {}
There is a {} in the scene
There is the {} in the scene
a photo of a {} in the scene
a photo of a small {}.
a photo of a medium {}.
a photo of a large {}.
This is a photo of a small {}.
This is a photo of a medium {}.
This is a photo of a large {}.
There is a small {} in the scene.
There is a medium {} in the scene.
There is a large {} in the scene.""".splitlines(),
}


def tokenize(clip, texts):
    """Texts -> token ids [N, length], the longest as far as its end token since nothing reads what
    follows, and where each ends [N], on CLIP's device. UserError for a text that does not fit.
    """
    tokens = clip.tokenizer(texts).to(clip.mean.device)
    ends = tokens.argmax(-1)
    return tokens[:, : int(ends.max()) + 1], ends


class FixedPrompt(nn.Module):
    """Templates with `{}` for the name: encode, normalise, average over the templates,
    normalise.
    """

    def __init__(self, templates):
        super().__init__()
        for template in templates or [""]:
            if "{}" not in template:
                todo = "write e.g. 'a photo of a {}.'"
                raise UserError(f"prompt {template!r}", "has no {} for the class name", todo)
        self.templates = templates

    def forward(self, clip, names):
        """Names -> normalised features [C, D]."""
        texts = [template.replace("{}", name) for template in self.templates for name in names]
        tokens, _ = tokenize(clip, texts)
        features = torch.cat([clip.encode_text(chunk) for chunk in tokens.split(256)])
        features = F.normalize(features, dim=-1).view(len(self.templates), len(names), -1)
        return F.normalize(features.mean(0), dim=-1)


class LearnedPrompt(nn.Module):
    """`[start] prefix name . [end]` with learned token embeddings (CoOp, Zhou et al. 2021)."""

    def __init__(self, width, prefix=16):
        super().__init__()
        self.prefix = nn.Parameter(0.02 * torch.randn(prefix, width))

    def layout(self, clip, names):
        """`tokenize`d names in the prompt, with a token that `embed` replaces for each of its
        prefix.
        """
        return tokenize(clip, ["x " * len(self.prefix) + f"{name} ." for name in names])

    def embed(self, clip, tokens):
        """What enters the text tower for the tokens of a `layout`: [C, length, width]."""
        x = clip.token_embedding(tokens)
        prefix = self.prefix.expand(len(x), -1, -1)
        return torch.cat([x[:, :1], prefix, x[:, 1 + len(self.prefix) :]], 1)

    def forward(self, clip, names):
        """Names -> normalised features [C, D]; differentiable in the prompt."""
        tokens, ends = self.layout(clip, names)
        return F.normalize(clip.encode_embedded(self.embed(clip, tokens), ends), dim=-1)


def build_prompt(spec, width, prefix=16):
    """The prompt that `clip.prompt` names; `width` is the text tower's, `prefix` the number of
    learned tokens. Raises UserError for an unknown name.
    """
    if spec == "learned":
        return LearnedPrompt(width, prefix)
    if isinstance(spec, str):
        if spec not in TEMPLATES:
            todo = f"choose {', '.join(TEMPLATES)} or learned, or give a list of templates"
            raise UserError("clip.prompt", f"is {spec!r}", todo)
        spec = TEMPLATES[spec]
    return FixedPrompt(spec)
