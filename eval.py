"""Measure a segmenter on a data set.

    python eval.py runs/shapes/last.pt
    python eval.py model_final.pth --config configs/voc_r50_single.toml --root datasets --save-predictions
    torchrun --nproc-per-node=8 eval.py CHECKPOINT

CHECKPOINT is one of train.py (its configuration is inside) or an original zsseg.baseline model_final.pth (give its
--config). Writes metrics.json and samples.png to --out (else eval/ beside the checkpoint).
"""

from pathlib import Path

from zsseg import checkpoint, run
from zsseg.config import Config, load_config
from zsseg.datasets import find_pairs
from zsseg.metrics import evaluate, report
from zsseg.segmenter import Segmenter, read_prompts

WORTH_COMPILING = 1000  # pictures a process: for fewer, compiling takes longer than it saves


def main(argv: list[str]) -> None:
    parser = run.parser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--save-predictions", action="store_true", help="write OUT/predictions/<stem>.png, class ids")
    args = parser.parse_args(argv)
    content = checkpoint.load(args.checkpoint)
    if "config" not in content and not args.config:
        raise run.UserError(f"checkpoint {args.checkpoint}", "holds no configuration", "give its --config")
    config = load_config(args.config, args.set, content.get("config"))
    pairs = find_pairs(config.data.name, args.root, config.data.split)  # before anything is downloaded
    process, out = run.start(args.device), Path(args.out or Path(args.checkpoint).parent / "eval")
    segmenter = load_segmenter(content, config, args.root, args.checkpoint).to(process.device)
    many = config.model.compile == "on" or len(pairs) >= WORTH_COMPILING * process.world
    if many and process.enabled(config.model.compile):
        segmenter.compile_parts()
    result = evaluate(segmenter, config, args.root, process, config.data.split, out, args.save_predictions)
    if process.is_main:
        report(result, config, out)


def load_segmenter(content: dict, config: Config, root: Path, name: str) -> Segmenter:
    """The segmenter of a loaded checkpoint, ours or the original's."""
    what = f"checkpoint {name}"
    if "config" in content:
        if "maskformer" not in content["model"]:
            raise run.UserError(what, "holds no segmenter", "give a checkpoint of task segment")
        supervised = config.model.class_head == "linear"
        parts, clip = content["model"], None if supervised else checkpoint.load_clip_state(config.clip.weights, root)
        other_prompts = config.clip.prompts != content["config"]["clip"]["prompts"]  # else the checkpoint holds them
    else:
        parts, dropped = checkpoint.import_original(content["model"], what)
        other_prompts = True
        clip = parts.get("clip") if config.model.class_head == "text" else None
        if clip is None and config.model.class_head == "text":
            raise run.UserError(what, "holds no CLIP", "give a zero-shot checkpoint of zsseg.baseline")
    segmenter = Segmenter(config, clip)
    prompts = read_prompts(config.clip.prompts) if config.clip.prompts and other_prompts else {}
    segmenter.load_learned(parts | prompts, what)
    if "config" not in content:
        used = {*segmenter.learned_state(), "clip"} - ({"clip"} if clip is None else set())
        used -= prompts.keys()
        adapter = [k for k in content["model"] if "clip_adapter" in k]  # where the parts are that a setting may leave unused
        dropped += [k for k in adapter if (checkpoint.our_name(k) or "").partition(".")[0] in parts.keys() - used]
        checkpoint.say_loaded(what, len(content["model"]) - len(dropped), dropped)
    return segmenter


if __name__ == "__main__":
    run.command(main)
