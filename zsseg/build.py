"""Segmenters from a configuration, from checkpoints of ours and of the original, and from the
weights of another segmenter.
"""

from pathlib import Path

from torch import Tensor

from zsseg import checkpoint, weights
from zsseg.backbone import SmallResNet, load_backbone
from zsseg.clip import ConvStem
from zsseg.config import Config, load_config
from zsseg.models import find_model
from zsseg.segmenter import Segmenter
from zsseg.utils import UserError


def build_segmenter(
    config: Config, root: Path, saved: dict[str, checkpoint.State] | None = None
) -> Segmenter:
    """A segmenter to train: the configuration's CLIP, prompts and initial backbone, else fresh
    weights; then those of the checkpoint `train.init`, as far as they fit.

    With `saved`, the learned parts of a run that is resumed, prompts and backbone are in there and
    not read again.
    """
    supervised = config.model.class_head == "linear"
    segmenter = Segmenter(config, None if supervised else load_clip(config, root))
    if saved is not None:
        segmenter.load_learned(saved, "last.pt")
        return segmenter
    prompts = read_prompts(config.clip.prompts) if config.clip.prompts else {}
    found = start_from(segmenter, config.train.init, prompts) if config.train.init else {}
    segmenter.load_prompts(
        found | prompts, f"train.init {config.train.init}" if found else "configuration"
    )
    if config.model.weights and not any(
        name.startswith("backbone.") for name in found.get("maskformer", ())
    ):
        if config.model.weights == "clip":
            copy_backbone(segmenter)
        else:
            name = config.model.backbone
            load_backbone(segmenter.maskformer.backbone, name, config.model.weights)
    return segmenter


def copy_backbone(segmenter: Segmenter) -> None:
    """Start the small backbone from the small CLIP's, as the paper's starts from ImageNet."""
    stem = getattr(segmenter.clip.visual, "conv1", None) if segmenter.clip else None
    what = "model.weights clip"
    if not isinstance(stem, ConvStem) or not isinstance(segmenter.maskformer.backbone, SmallResNet):
        todo = "give a file, or leave it out: --set model.weights="
        raise UserError(what, "is for the small backbone and the small CLIP", todo)
    state = stem.backbone.state_dict()
    todo = "give model.small_widths that are contrast.stem"
    checkpoint.load_strict(segmenter.maskformer.backbone, state, what, todo)


def load_clip(config: Config, root: Path, changed: bool = False) -> checkpoint.State:
    """The state dict of the configured CLIP; its activation goes into the configuration, and so
    into checkpoints.

    `changed`: the configuration's activation and heads are those of another CLIP.
    """
    state = weights.load_clip_state(config.clip.weights, root)
    config.clip.activation, config.clip.heads = weights.find_shape(
        config.clip, state, root, changed
    )
    return state


def start_from(
    segmenter: Segmenter, file: str, prompts: dict[str, checkpoint.State]
) -> dict[str, checkpoint.State]:
    """Load all weights of another segmenter's checkpoint, ours, the original's or a published
    model's, that fit
    `segmenter` by name and shape; of its learned prompts those that are not among `prompts`.

    Returns them by part, and prints how many were used, which were not, and which of the model's
    start afresh. UserError where none fits.
    """
    what, content = (
        f"train.init {file}",
        checkpoint.load(find_model(file, "train.init")[0], "train.init"),
    )
    unknown: list[str] = []
    parts = (
        content["model"]
        if "config" in content
        else weights.import_original(content["model"], what, unknown)[0]
    )
    parts = {
        part: checkpoint.unwrapped(state, what)
        for part, state in parts.items()
        if isinstance(state, dict)
    }
    own, used, dropped, fresh = segmenter.learned_state(), {}, unknown, []
    for part, state in parts.items():
        fits = own.get(part, {}) if part not in prompts else {}
        used[part] = {
            k: v
            for k, v in state.items()
            if k in fits and isinstance(v, Tensor) and v.shape == fits[k].shape
        }
        dropped += [f"{part}.{k}" for k in state if k not in used[part]]
        checkpoint.check_finite(used[part], what)
    if not used.get("maskformer"):
        raise UserError(
            what,
            "holds no weight that fits this model",
            "give a segmenter's checkpoint, and its [model]",
        )
    for name, tensor in own["maskformer"].items():
        if name in used["maskformer"]:
            tensor.copy_(used["maskformer"][name])
        else:
            fresh.append(name)
    checkpoint.say_loaded(what, sum(map(len, used.values())), dropped)
    checkpoint.say_fresh(what, fresh)
    return {part: state for part, state in used.items() if state}


def read_prompts(path: str) -> dict[str, checkpoint.State]:
    """The learned prompt of a checkpoint (ours or the original's prompt learning), for head and
    regions alike.
    """
    content, what = checkpoint.load(path, "clip.prompts"), f"clip.prompts {path}"
    ours = "config" in content
    parts, dropped = (
        (content["model"], []) if ours else weights.import_original(content["model"], what)
    )
    name = "prompt" if "prompt" in parts else "region_prompt"
    if name not in parts:
        raise UserError(what, "holds no learned prompt", "give a checkpoint of prompt learning")
    dropped += [
        f"{part}.{k}"
        for part in parts
        if part != name and "of_seed" not in part
        for k in parts[part]
    ]
    checkpoint.say_loaded(what, len(parts[name]), dropped)
    return {"prompt": parts[name], "region_prompt": parts[name]}


def load_segmenter(content: dict, config: Config, root: Path, name: str) -> Segmenter:
    """The segmenter of a loaded checkpoint, ours or the original's."""
    what = f"checkpoint {name}"
    if "config" in content:
        if "maskformer" not in content["model"]:
            raise UserError(what, "holds no segmenter", "give a checkpoint of task segment")
        supervised = config.model.class_head == "linear"
        recorded = load_config(None, [], content["config"]).clip
        same = (config.clip.activation, config.clip.heads) == (recorded.activation, recorded.heads)
        changed = config.clip.weights != recorded.weights and same
        parts, clip = content["model"], None if supervised else load_clip(config, root, changed)
        other_prompts = config.clip.prompts != recorded.prompts  # else the checkpoint holds them
    else:
        content = content | {"model": checkpoint.unwrapped(content["model"], what)}
        parts, dropped = weights.import_original(content["model"], what)
        other_prompts = True
        clip = parts.get("clip") if config.model.class_head == "text" else None
        if clip is None and config.model.class_head == "text":
            raise UserError(what, "holds no CLIP", "give a zero-shot checkpoint of zsseg.baseline")
    segmenter = Segmenter(config, clip)
    prompts = read_prompts(config.clip.prompts) if config.clip.prompts and other_prompts else {}
    segmenter.load_learned(parts | prompts, what)
    if "config" not in content:
        used = {*segmenter.learned_state(), "clip"} - ({"clip"} if clip is None else set())
        used -= prompts.keys()
        # Where the parts are that a setting may leave unused.
        adapter = [k for k in content["model"] if "clip_adapter" in k]
        dropped += [
            k
            for k in adapter
            if (weights.our_name(k) or "").partition(".")[0] in parts.keys() - used
        ]
        checkpoint.say_loaded(what, len(content["model"]) - len(dropped), dropped)
    return segmenter
