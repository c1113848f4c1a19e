"""Measure a segmenter on a data set, or segment any images with any words.

Measure it:
    python eval.py runs/shapes/last.pt
    python eval.py model_final.pth --config configs/voc_r50_single.toml --save-predictions
    python eval.py runs/shapes/last.pt --report              a page to look at: OUT/report.html
    torchrun --nproc-per-node=8 eval.py CHECKPOINT

Segment images: files, folders, patterns, or - for a list on standard input. Each gets a label map
(.png), an overlay with a legend (.overlay.jpg) and its classes with pixels, share and mean score
(.json):
    python eval.py CHECKPOINT --images photo.jpg --classes "cat, dog, grass"
    python eval.py CHECKPOINT --images photos/ more/*.png --classes words.txt --out segmented
    torchrun --nproc-per-node=8 eval.py CHECKPOINT --images photos/ --classes words.txt --resume
Lines of words.txt: `cat`, with synonyms `sofa = couch, settee`, or `other: sky, wall` for what is
predicted but shown as "other". Without --classes, the classes are the data set's.

Export programs that run without this one:
    python eval.py CHECKPOINT --export DIR --classes "cat, dog, grass"

CHECKPOINT is one of train.py (its configuration is inside), an original zsseg.baseline
model_final.pth (give its --config), or the name of a published model, which is downloaded. Results
go to --out (else eval/ or, of images, segmented/ beside the checkpoint, or in runs/NAME/), and
never take the place of a file that this program did not write.
"""

import os
from argparse import Namespace
from datetime import timedelta
from pathlib import Path

from kernels.jit import Switch
from zsseg import checkpoint, command_line
from zsseg.analysis import budget, report_budget
from zsseg.build import load_segmenter
from zsseg.config import Config, load_config
from zsseg.datasets import dataset, find_pairs
from zsseg.distributed import Process, can_compile, init_distributed
from zsseg.evaluate import evaluate
from zsseg.export import export
from zsseg.files import check_writable
from zsseg.metrics import report
from zsseg.models import MODELS, find_model
from zsseg.predict import Names, Results, find_images, made_with, segment_images
from zsseg.published import compare
from zsseg.report import Report
from zsseg.segmenter import Segmenter
from zsseg.utils import UserError, path_of
from zsseg.vocabulary import Words, read_words, seen_classes, trained_names, words_of

MIN_IMAGES_TO_COMPILE = 1000  # images a process: for fewer, compiling takes longer than it saves
# For processes whose share of many images takes longer than the others'.
DIST_TIMEOUT = timedelta(days=30)


def main(argv: list[str]) -> None:
    args = parse(argv)
    name = args.checkpoint
    args.checkpoint, config = find_model(name)
    if config:
        args.config = args.config or config
        args.out = args.out or Path("runs") / name / ("segmented" if args.images else "eval")
    content = checkpoint.load(args.checkpoint)
    if "config" not in content and not args.config:
        raise UserError(
            f"checkpoint {args.checkpoint}", "holds no configuration", "give its --config"
        )
    config = load_config(args.config, args.set, content.get("config"))
    Switch.on = config.model.kernels
    if args.images:
        segment(args, content, config)
    elif args.export:
        if init_distributed("cpu").is_main:
            words = words_wanted(args, config)
            segmenter = load_segmenter(content, config, args.root, args.checkpoint).eval()
            set_words(segmenter, words, content, config)
            export(segmenter, config, words, args.export)
    else:
        measure(args, content, config)


def parse(argv: list[str]) -> Namespace:
    """The command line; UserError for options that do not go together."""
    parser = command_line.parser(__doc__)
    names = f"a file, or a published model: {', '.join(MODELS)}"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=path_of, help=names)
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument(
        "--save-predictions",
        action="store_true",
        help="write OUT/predictions/<stem>.png, class ids",
    )
    measuring.add_argument(
        "--budget",
        action="store_true",
        help="what masks and classes cost: oracles, recall, confusions",
    )
    measuring.add_argument(
        "--report",
        action="store_true",
        help="write OUT/report.html: metrics, confusions, curves, images",
    )
    measuring.add_argument(
        "--reproduce", action="store_true", help="print the paper's numbers beside ours"
    )
    own = parser.add_argument_group("any images, any words")
    own.add_argument(
        "--images", metavar="IMAGE", nargs="+", help="files, folders, patterns, or - for a list"
    )
    own.add_argument(
        "--classes",
        metavar="WORDS",
        help='what to look for: "cat, dog, grass; other: sky" or a text file',
    )
    own.add_argument(
        "--resume", action="store_true", help="segment only the images that are not done yet"
    )
    own.add_argument(
        "--export",
        metavar="DIR",
        type=path_of,
        help="write programs for these words that run without this project",
    )
    args = parser.parse_args(argv)
    if args.classes is not None and not (args.images or args.export):
        raise UserError("--classes", "is for images of your own", "add --images or --export")
    if (args.images or args.export) and (
        args.save_predictions or args.budget or args.report or args.reproduce
    ):
        raise UserError(
            "--images and --export", "measure nothing", "leave the options for measuring out"
        )
    if args.images and args.export:
        raise UserError("--images and --export", "are two things", "give one after the other")
    if args.resume and not args.images:
        raise UserError("--resume", "is for images of your own", "add --images")
    return args


def words_wanted(args: Namespace, config: Config) -> Words:
    return words_of(dataset(config.data)) if args.classes is None else read_words(args.classes)


def set_words(segmenter: Segmenter, words: Words, content: dict, config: Config) -> None:
    """The words that the checkpoint was trained on count as seen."""
    segmenter.set_classes(words.names, words.among(trained_names(content, config)), words.synonyms)


def compile_for(images: int, segmenter: Segmenter, config: Config, process: Process) -> None:
    """Compile what pays for it, and say what the run computes on."""
    process.describe(config.model.bf16)
    many = config.model.compile == "on" or images >= MIN_IMAGES_TO_COMPILE * process.world_size
    if many and process.compiles(config.model.compile):
        segmenter.compile_parts()
    elif many and config.model.compile == "auto" and segmenter.clip is not None and can_compile():
        segmenter.compile_tower()  # on a CPU all else is little beside it


def segment(args: Namespace, content: dict, config: Config) -> None:
    """Images of the user's own."""
    out, words = args.out or args.checkpoint.parent / "segmented", words_wanted(args, config)
    process = init_distributed(args.device, DIST_TIMEOUT)
    # Before anything is downloaded.
    names = Names(process.broadcast_object(lambda: find_images(args.images, out)))
    segmenter = (
        load_segmenter(content, config, args.root, args.checkpoint).to(process.device).eval()
    )
    compile_for(len(names), segmenter, config, process)
    set_words(segmenter, words, content, config)
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun --max-restarts
    results = Results(
        out,
        names,
        words,
        process.broadcast_object(lambda: made_with(segmenter, config, words, process)),
    )
    segment_images(segmenter, config, results, process, args.resume or again)


def measure(args: Namespace, content: dict, config: Config) -> None:
    """The metrics on a split of a data set, and what belongs to them."""
    pairs = find_pairs(config.data, args.root, config.data.split)  # before anything is downloaded
    process, out = init_distributed(args.device), args.out or args.checkpoint.parent / "eval"
    writes = ["metrics.json", "samples.png", *["report.html"] * args.report]
    writes = [
        *["budget.json", "budget.png"] * args.budget,
        *writes * (not args.budget or args.report),
    ]
    process.broadcast_object(lambda: check_writable(out, writes))  # now, and not after hours
    if "config" not in content and config.model.bf16 == "auto" and process.device.type == "cpu":
        config.model.bf16 = (
            "off"  # what an original checkpoint gives is compared with the original's numbers
        )
    segmenter = (
        load_segmenter(content, config, args.root, args.checkpoint).to(process.device).eval()
    )
    compile_for(len(pairs), segmenter, config, process)
    seen = seen_classes(dataset(config.data), content, config)
    if args.budget:
        result = budget(segmenter, config, args.root, process, config.data.split, seen)
        if process.is_main:
            report_budget(result, out)
        if not args.report:
            return
    page = Report(config, process) if args.report else None
    result = evaluate(
        segmenter,
        config,
        args.root,
        process,
        config.data.split,
        out,
        args.save_predictions,
        page,
        seen,
    )
    if page:
        page.gather()
    if process.is_main:
        report(result, config, out)
        if page:
            page.write(result, args.checkpoint, content.get("step"), out)
        if args.reproduce:
            print(compare(result, config))


if __name__ == "__main__":
    command_line.command(main)
