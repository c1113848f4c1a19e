"""Measure a segmenter on a data set.

    python eval.py runs/shapes/last.pt
    python eval.py model_final.pth --config configs/voc_r50_single.toml --root datasets --save-predictions
    torchrun --nproc-per-node=8 eval.py CHECKPOINT

CHECKPOINT is one of train.py (its configuration is inside) or an original zsseg.baseline model_final.pth (give its
--config). Writes metrics.json and samples.png to --out (else eval/ beside the checkpoint).
"""

from pathlib import Path

from zsseg import checkpoint, run
from zsseg.budget import budget, report_budget
from zsseg.config import load_config
from zsseg.datasets import find_pairs
from zsseg.metrics import evaluate, report
from zsseg.published import compare
from zsseg.segmenter import load_segmenter

WORTH_COMPILING = 1000  # pictures a process: for fewer, compiling takes longer than it saves


def main(argv: list[str]) -> None:
    parser = run.parser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--budget", action="store_true", help="what masks and classes cost: oracles, recall, confusions")
    parser.add_argument("--reproduce", action="store_true", help="print the paper's numbers beside ours")
    parser.add_argument("--save-predictions", action="store_true", help="write OUT/predictions/<stem>.png, class ids")
    args = parser.parse_args(argv)
    content = checkpoint.load(args.checkpoint)
    if "config" not in content and not args.config:
        raise run.UserError(f"checkpoint {args.checkpoint}", "holds no configuration", "give its --config")
    config = load_config(args.config, args.set, content.get("config"))
    pairs = find_pairs(config.data, args.root, config.data.split)  # before anything is downloaded
    process, out = run.start(args.device), Path(args.out or Path(args.checkpoint).parent / "eval")
    segmenter = load_segmenter(content, config, args.root, args.checkpoint).to(process.device)
    many = config.model.compile == "on" or len(pairs) >= WORTH_COMPILING * process.world
    if many and process.enabled(config.model.compile):
        segmenter.compile_parts()
    if args.budget:
        result = budget(segmenter, config, args.root, process, config.data.split)
        return report_budget(result, out) if process.is_main else None
    result = evaluate(segmenter, config, args.root, process, config.data.split, out, args.save_predictions)
    if process.is_main:
        report(result, config, out)
        if args.reproduce:
            print(compare(result, config))


if __name__ == "__main__":
    run.command(main)
