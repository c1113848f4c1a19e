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

Ask for other words without computing again: keep what the networks make of images, then read that:
    python eval.py CHECKPOINT --images photos/ --features DIR
    python eval.py CHECKPOINT --features DIR --classes "cat, dog"

Try words on a page of this machine:
    python eval.py CHECKPOINT --serve

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
from zsseg import command_line
from zsseg.analysis import oracle_analysis, write_analysis
from zsseg.apps.api import checkpoint_and_config
from zsseg.build import load_segmenter
from zsseg.config import Config
from zsseg.datasets import dataset, find_pairs
from zsseg.distributed import Process, can_compile, init_distributed
from zsseg.evaluate import evaluate
from zsseg.export import export
from zsseg.features import FeatureFiles, KeptFeatures, features_digest, find_features
from zsseg.files import check_writable
from zsseg.metrics import report
from zsseg.models import MODELS, find_model
from zsseg.apps.predict import InputImages, Names, Results, find_images, made_with, segment_images
from zsseg.published import compare
from zsseg.apps.report import Report
from zsseg.segmenter import Segmenter
from zsseg.apps.serve import Session, open_port, serve
from zsseg.utils import UserError, path_of
from zsseg.apps.vocabulary import Words, read_words, seen_classes, trained_names, words_of

MIN_IMAGES_TO_COMPILE = 1000  # images a process: for fewer, compiling takes longer than it saves
# For processes whose share of many images takes longer than the others'.
DIST_TIMEOUT = timedelta(days=30)
MEASURING = {
    "--save-predictions": "write OUT/predictions/<stem>.png, class ids",
    "--budget": "what masks and classes cost: oracles, recall, confusions",
    "--report": "write OUT/report.html: metrics, confusions, curves, images",
    "--reproduce": "print the paper's numbers beside ours",
}
USES_OWN = "is for images of your own"


def main(argv: list[str]) -> None:
    args = parse(argv)
    named = args.checkpoint
    args.checkpoint, published = find_model(named)
    if published:
        segmented = args.images or args.features
        args.config = args.config or published
        args.out = args.out or Path("runs") / named / ("segmented" if segmented else "eval")
    content, config = checkpoint_and_config(args.checkpoint, args.config, args.set)
    Switch.on = config.model.kernels
    if args.images or args.features:
        segment(args, content, config)
    elif args.serve is not None:
        serve_page(args, content, config)
    elif args.export:
        if init_distributed("cpu").is_main:
            words = requested_words(args, config)
            segmenter = load_segmenter(content, config, args.root, args.checkpoint).eval()
            set_words(segmenter, words, content, config)
            export(segmenter, config, words, args.export)
    else:
        measure(args, content, config)


def parse(argv: list[str]) -> Namespace:
    """The command line."""
    parser = command_line.parser(__doc__)
    names = f"a file, or a published model: {', '.join(MODELS)}"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=path_of, help=names)
    measuring = parser.add_argument_group("measuring")
    for option, text in MEASURING.items():
        measuring.add_argument(option, action="store_true", help=text)
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
        "--features",
        metavar="DIR",
        type=path_of,
        help="with --images keep features there, without them label the images kept there",
    )
    own.add_argument(
        "--serve",
        metavar="PORT",
        type=int,
        nargs="?",
        const=8000,
        help="a page on 127.0.0.1 (port 8000) to try images and words on",
    )
    own.add_argument(
        "--export",
        metavar="DIR",
        type=path_of,
        help="write programs for these words that run without this project",
    )
    args = parser.parse_args(argv)
    check_options(args)
    return args


def check_options(args: Namespace) -> None:
    """UserError for options that do not go together."""
    tasks = {
        "--images": args.images or args.features,
        "--serve": args.serve is not None,
        "--export": args.export,
    }
    own = [name for name, given in tasks.items() if given]
    measures = args.save_predictions or args.budget or args.report or args.reproduce
    both = " and ".join(own)
    keeps = args.images and args.features
    conflicts = [
        (args.classes is not None and not own, "--classes", USES_OWN, "add --images or --export"),
        (
            own and measures,
            ", ".join(tasks),
            "measure nothing",
            "leave out what belongs to measuring",
        ),
        (len(own) > 1, both, "are two things", "give one after the other"),
        (args.resume and not args.images, "--resume", USES_OWN, "add --images"),
        (
            keeps and args.classes is not None,
            "--classes",
            "is for features that are kept already",
            "give --images and --features first",
        ),
    ]
    for conflict, what, why, todo in conflicts:
        if conflict:
            raise UserError(what, why, todo)


def requested_words(args: Namespace, config: Config) -> Words:
    return words_of(dataset(config.data)) if args.classes is None else read_words(args.classes)


def set_words(segmenter: Segmenter, words: Words, content: dict, config: Config) -> None:
    """The words that the checkpoint was trained on count as seen."""
    segmenter.set_classes(words.names, words.among(trained_names(content, config)), words.synonyms)


def load_compiled(
    args: Namespace, content: dict, config: Config, process: Process, images: int
) -> Segmenter:
    """The segmenter on its device, see `compile_for`."""
    segmenter = load_segmenter(content, config, args.root, args.checkpoint).to(process.device)
    compile_for(images, segmenter, config, process)
    return segmenter.eval()


def compile_for(images: int, segmenter: Segmenter, config: Config, process: Process) -> None:
    """Compile what pays for it with so many images, and print what the run computes on."""
    process.describe(config.model.bf16)
    many = config.model.compile == "on" or images >= MIN_IMAGES_TO_COMPILE * process.world_size
    if many and process.compiles(config.model.compile):
        segmenter.compile_parts()
    elif many and config.model.compile == "auto" and segmenter.clip is not None and can_compile():
        segmenter.compile_tower()  # on a CPU all else is little beside it


def segment(args: Namespace, content: dict, config: Config) -> None:
    """Images of the user's own: label maps, or with --features what they follow from; without
    --images label maps of what was kept.
    """
    kept = args.features and not args.images
    keep = args.features and args.images
    out = args.features if keep else args.out or args.checkpoint.parent / "segmented"
    words = requested_words(args, config)
    process = init_distributed(args.device, DIST_TIMEOUT)
    # Before anything is downloaded.
    find = (lambda: find_features(args.features)) if kept else lambda: find_images(args.images, out)
    names = Names(process.broadcast_object(find))
    segmenter = load_compiled(args, content, config, process, 0 if kept else len(names))
    set_words(segmenter, words, content, config)
    digest = ""
    if args.features:
        digest = process.broadcast_object(lambda: features_digest(segmenter, config, process))
    items = KeptFeatures(names.files, digest) if kept else InputImages(names.files, config)
    if keep:
        results = FeatureFiles(out, names, digest)
    else:
        made = process.broadcast_object(lambda: made_with(segmenter, config, words, process))
        results = Results(out, names, words, made)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    segment_images(segmenter, config, results, items, process, args.resume or restarted)


def serve_page(args: Namespace, content: dict, config: Config) -> None:
    """A page to try images and words on, until it is interrupted."""
    words = requested_words(args, config)
    process = init_distributed(args.device)
    if process.world_size > 1:
        raise UserError("--serve", "is for one process", "start it without torchrun")
    server = open_port(args.serve)  # before anything is downloaded
    segmenter = load_compiled(args, content, config, process, 0)
    session = Session(segmenter, config, process, trained_names(content, config), words)
    serve(server, session)


def measure(args: Namespace, content: dict, config: Config) -> None:
    """The metrics on a split of a data set, and what belongs to them."""
    split = config.data.split
    pairs = find_pairs(config.data, args.root, split)  # before anything is downloaded
    process = init_distributed(args.device)
    out = args.out or args.checkpoint.parent / "eval"
    metrics = args.report or not args.budget
    files = ["report.html"] if args.report else []
    files += ["budget.json", "budget.png"] if args.budget else []
    files += ["metrics.json", "samples.png"] if metrics else []
    process.broadcast_object(lambda: check_writable(out, files))  # now, and not after hours
    if "config" not in content and config.model.bf16 == "auto" and process.device.type == "cpu":
        # What an original checkpoint gives is compared with the original's numbers.
        config.model.bf16 = "off"
    segmenter = load_compiled(args, content, config, process, len(pairs))
    seen = seen_classes(dataset(config.data), content, config)

    if args.budget:
        result = oracle_analysis(segmenter, config, args.root, process, split, seen)
        if process.is_main:
            write_analysis(result, out)
    if not metrics:
        return
    page = Report(config, process) if args.report else None
    result = evaluate(
        segmenter, config, args.root, process, split, out, args.save_predictions, page, seen
    )
    if process.is_main:
        report(result, config, out)
    if page:
        page.write(result, args.checkpoint, content.get("step"), out)
    if process.is_main and args.reproduce:
        print(compare(result, config))


if __name__ == "__main__":
    command_line.command(main)
