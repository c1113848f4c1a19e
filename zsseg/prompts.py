"""Prompts: class names -> text features: fixed templates or learned (Xu et al. 2021)."""

import contextlib
import hashlib
import io
import json
import os
import tempfile
import tomllib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg import clip as clip_module
from zsseg import tokenizer as tokenizer_module
from zsseg.checkpoint import read_torch
from zsseg.clip import CLIP
from zsseg.tokenizer import Tokenizer
from zsseg.utils import UserError, cache_dir, print_main

# Single, vild, imagenet.
TEMPLATES = tomllib.loads((Path(__file__).parent / "prompts.toml").read_text("utf-8"))


class FixedPrompt(nn.Module):
    """Templates with `{}` for the name: encode, normalise, average over the templates,
    normalise.
    """

    def __init__(self, templates: list[str]):
        super().__init__()
        for template in templates:
            if "{}" not in template:
                raise UserError(
                    f"prompt {template!r}",
                    "has no {} for the class name",
                    "write e.g. 'a photo of a {}.'",
                )
        self.templates = templates

    def forward(self, clip: CLIP, names: list[str]) -> Tensor:
        """Names -> normalised features [C, D]."""
        texts = [template.replace("{}", name) for template in self.templates for name in names]
        tokens = clip.tokenizer(texts)
        length = int(tokens.argmax(-1).max()) + 1  # nothing reads what follows the last end token
        tokens = tokens[:, :length].to(clip.device)
        features = torch.cat([clip.encode_text(chunk) for chunk in tokens.split(256)])
        features = F.normalize(features, dim=-1).view(len(self.templates), len(names), -1)
        return F.normalize(features.mean(0), dim=-1)


class LearnedPrompt(nn.Module):
    """`[start] prefix name . [end]` with learned token embeddings (CoOp, Zhou et al. 2021)."""

    def __init__(self, width: int, prefix: int = 16):
        super().__init__()
        self.prefix = nn.Parameter(0.02 * torch.randn(prefix, width))

    def layout(self, tokenizer: Tokenizer, names: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids [C, context] with zeros where the prompt goes, and the position of the end
        token [C], on the CPU.
        """
        tokens = torch.zeros(len(names), tokenizer.context_length, dtype=torch.int64)
        ends = []
        for row, name in zip(tokens, names, strict=True):
            ids = tokenizer.encode(name)
            ids = [
                tokenizer.start,
                *[0] * len(self.prefix),
                *ids,
                *tokenizer.encode("."),
                tokenizer.end,
            ]
            if len(ids) > tokenizer.context_length:
                most = tokenizer.context_length
                why = f"needs {len(ids)} tokens with its prompt, CLIP reads {most}"
                raise UserError(f"class name {name!r}", why, "shorten it")
            row[: len(ids)] = torch.tensor(ids)
            ends.append(len(ids) - 1)
        return tokens, torch.tensor(ends)

    def embed(self, clip: CLIP, tokens: Tensor) -> Tensor:
        """What enters the text tower for the tokens of a `layout`: [C, context, width]."""
        x = clip.token_embedding(tokens)
        return torch.cat(
            [x[:, :1], self.prefix.expand(len(x), -1, -1), x[:, 1 + len(self.prefix) :]], 1
        )

    def forward(self, clip: CLIP, names: list[str]) -> Tensor:
        """Names -> normalised features [C, D]; differentiable in the prompt."""
        tokens, ends = (t.to(self.prefix.device) for t in self.layout(clip.tokenizer, names))
        return F.normalize(clip.encode_embedded(self.embed(clip, tokens), ends), dim=-1)


def build_prompt(spec: str | list[str], width: int, prefix: int = 16) -> nn.Module:
    """The prompt that `clip.prompt` names; `width` is the text tower's. Raises UserError for an
    unknown name.
    """
    if spec == "learned":
        return LearnedPrompt(width, prefix)
    if isinstance(spec, str) and spec not in TEMPLATES:
        raise UserError(
            "clip.prompt",
            f"is {spec!r}",
            f"choose {', '.join(TEMPLATES)} or learned, or give a list of templates",
        )
    return FixedPrompt(TEMPLATES[spec] if isinstance(spec, str) else spec)


@torch.no_grad()
def text_features(clip: CLIP, prompt: nn.Module, names: list[str]) -> Tensor:
    """`prompt`'s features [C, D], kept in the cache under a digest of all that they depend on."""
    # Of this vocabulary file.
    tokens = [clip.tokenizer.encode(text) for text in (*names, *getattr(prompt, "templates", ()))]
    words = [
        getattr(prompt, "templates", None),
        names,
        tokens,
        clip.context_length,
        clip.device.type,
        torch.__version__,
        str(clip),
    ]
    digest = hashlib.sha256(json.dumps(words).encode())
    # Another program may compute other features.
    for code in (__file__, clip_module.__file__, tokenizer_module.__file__):
        digest.update(Path(code).read_bytes())
    for part in (clip, prompt):
        for name, tensor in part.state_dict().items():
            if not name.startswith("visual."):
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().numpy())
    file = cache_dir() / "text" / f"{digest.hexdigest()}.pt"
    with contextlib.suppress(UserError):  # not there, or damaged: computed again
        features = read_torch(file, "text features")
        if isinstance(features, Tensor) and features.shape == (len(names), clip.embed_dim):
            return features.to(clip.device)
    features = prompt(clip, names)
    content = io.BytesIO()
    torch.save(features.cpu(), content)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:  # processes may write at once
            (Path(folder) / file.name).write_bytes(content.getvalue())
            os.replace(Path(folder) / file.name, file)
    except OSError as error:
        print_main(f"text features are not kept in {file.parent} ({error.strerror})")
    return features
