"""Measure a segmenter on a data set, or segment any images with any words.

Measure it:
    python eval.py runs/shapes/last.pt
    python eval.py model_final.pth --config configs/voc_r50_single.toml --save-predictions
    python eval.py runs/shapes/last.pt --report              a page to look at: OUT/report.html
    torchrun --nproc-per-node=8 eval.py CHECKPOINT

Segment images: files, folders, or - for a list on standard input. Each gets a label map (.png), an
overlay with a legend (.overlay.jpg) and its classes with pixels, share and mean score (.json):
    python eval.py CHECKPOINT --images photo.jpg --classes "cat, dog, grass"
    python eval.py CHECKPOINT --images photos/ more/a.png --classes words.txt --out segmented
    torchrun --nproc-per-node=8 eval.py CHECKPOINT --images photos/ --classes words.txt --resume
Lines of words.txt: `cat`, with synonyms `sofa = couch, settee`, or `other: sky, wall` for what is
predicted but shown as "other". Without --classes, the classes are the data set's.

Ask for other words without computing again: the first command caches what the networks make of each
image, the second reads it:
    python eval.py CHECKPOINT --images photos/ --features DIR --classes "cat, dog"
    python eval.py CHECKPOINT --images photos/ --features DIR --classes "tree, sky"

Try words on a page of this machine:
    python eval.py CHECKPOINT --serve

CHECKPOINT is one of train.py (its configuration is inside), an original zsseg.baseline
model_final.pth (give its --config), the name of a published model, which is downloaded, or - for
none, with a --config that sets model.proposer. Results go to --out (else eval/ or, of images,
segmented/ beside the checkpoint, or in runs/NAME/): a folder that is new, empty, or made by this
program.
"""

import operator
import os
import tomllib
from argparse import Namespace
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from zsseg.apps.vocabulary import Words, read_words, seen_classes, trained_names
from zsseg.config import CONFIGS, Config, load_config
from zsseg.utils import (
    UserError,
    claim_folder,
    command,
    did_you_mean,
    expand_path,
    no_such_file,
    run_parser,
)

MIN_IMAGES_TO_COMPILE = 1000  # images a process: for fewer, compiling takes longer than it saves
# For processes whose share of many images takes longer than the others'.
DIST_TIMEOUT = timedelta(days=30)
PUBLISHED = tomllib.loads((CONFIGS.parent / "zsseg/published.toml").read_text("utf-8"))
# The settings that a published number is of, besides whether there was a teacher
PUBLISHED_FOR = operator.attrgetter(
    *("data.name", "data.split", "data.train_on", "data.test_short_edge", "model.backbone"),
    *("model.proposals", "clip.weights", "clip.prompt", "clip.region_prompt", "clip.ensemble"),
    *("clip.ensemble_weight", "clip.mask_threshold", "eval.sizes", "eval.flip", "eval.window"),
)
MODELS = [*PUBLISHED["model"]]
MEASURING = {
    "--save-predictions": "write OUT/predictions/<stem>.png, class ids",
    "--budget": "what masks and classes cost: oracles, recall, confusions",
    "--report": "write OUT/report.html: metrics, confusions, curves, images",
}
METRICS = ("pAcc", "mIoU_seen", "mIoU_unseen", "hIoU", "mIoU")


def parse(argv: list[str]) -> Namespace:
    """The command line; UserError for what can be told without loading anything."""
    parser = run_parser(__doc__)
    text = f"a file, a published model ({', '.join(MODELS)}), or -"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=text)
    add = parser.add_argument_group("measuring").add_argument
    for name, text in MEASURING.items():
        add(name, action="store_true", help=text)
    add = parser.add_argument_group("any images, any words").add_argument
    text = "files, folders, or - for a list"
    add("--images", metavar="IMAGE", nargs="+", help=text)
    text = 'what to look for: "cat, dog, grass; other: sky" or a text file'
    add("--classes", metavar="WORDS", type=read_words, help=text)
    text = "segment only the images that are not done yet"
    add("--resume", action="store_true", help=text)
    text = "cache there what the networks make of each image, whatever the words"
    add("--features", metavar="DIR", type=expand_path, help=text)
    text = "a page on 127.0.0.1 (port 8000) to try images and words on"
    add("--serve", metavar="PORT", type=int, nargs="?", const=8000, help=text)
    args = parser.parse_args(argv)

    serves = args.serve is not None
    own = args.images or serves
    measures = args.save_predictions or args.budget or args.report
    for is_wrong, *error in [
        (args.images and serves, "--images and --serve", "are two things", "give one"),
        (own and measures, "--images, --serve", "measure nothing", "leave out what measures"),
        (args.classes and not own, "--classes", "is for other images", "add --images or --serve"),
        (args.resume and not args.images, "--resume", "works with --images", "add it"),
        (args.features and not args.images, "--features", "works with --images", "add it"),
    ]:
        if is_wrong:
            raise UserError(*error)
    files = [("checkpoint", args.checkpoint), *(("--images", text) for text in args.images or [])]
    for what, text in files:
        path = expand_path(text)
        if not path.exists() and text not in (*MODELS, "-"):
            todo = did_you_mean(text, MODELS, "check the path")
            raise no_such_file(f"{what} {text}", path, todo)
    load_config(args.config, args.set)
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    from zsseg.distributed import init_distributed
    from zsseg.weights import checkpoint_and_config, find_model

    named = args.checkpoint
    args.checkpoint, published = find_model(named)
    content, config = checkpoint_and_config(args.checkpoint, args.config or published, args.set)
    folder = Path("runs", named) if published else args.checkpoint.parent
    args.out = args.out or folder / ("segmented" if args.images else "eval")
    process = init_distributed(args.device, DIST_TIMEOUT)
    use = measure if args.images is args.serve is None else use_words
    use(args, content, config, process)


def load(args: Namespace, content: dict, config: Config, process, images: int):
    """The segmenter on its device, compiled if that saves time with so many images; prints what the
    run computes on.
    """
    from zsseg.distributed import can_compile
    from zsseg.weights import load_segmenter

    segmenter = load_segmenter(content, config, args.root, args.checkpoint)
    segmenter = segmenter.to(process.device).eval()
    process.describe(config.model.bf16)
    setting = config.model.compile
    if setting == "on" or images >= MIN_IMAGES_TO_COMPILE * process.world_size:
        if process.compiles(setting):
            segmenter.compile_parts()
        elif setting == "auto" and segmenter.clip is not None and can_compile():
            segmenter.compile_tower()  # on a CPU all else is little beside it
    return segmenter


def use_words(args: Namespace, content: dict, config: Config, process) -> None:
    """Images of the user's: a page to try them on, or a label map, an overlay and a JSON file each.
    What can fail does before anything is downloaded.
    """
    from zsseg.apps.predict import find_images, segment_images, settings_digest

    words = args.classes
    if words is None:
        from zsseg.datasets import dataset

        words = Words(dataset(config.data).names)
    trained = trained_names(content, config)
    if args.serve is not None:
        from zsseg.apps.serve import Session, open_server

        if process.world_size > 1:
            raise UserError("--serve", "is for one process", "start it without torchrun")
        server = open_server(args.serve, config)
        segmenter = load(args, content, config, process, 0)
        return server.run(Session(segmenter, config, process, trained, words))

    views = config.eval.sizes or config.eval.flip or config.eval.window
    if args.features and (views or not config.model.proposals):
        todo = "leave it out, or eval.sizes, eval.flip, eval.window and model.proposals=false"
        raise UserError("--features", "caches mask proposals, of one view an image", todo)
    images = process.broadcast(lambda: find_images(args.images, args.out))
    segmenter = load(args, content, config, process, len(images))
    seen = words.among(trained)
    segmenter.set_classes(words.names, seen, words.synonyms)
    weights = (config.clip.weights, config.clip.prompts)
    files = [args.checkpoint, *(w.replace("{root}", str(args.root)) for w in weights)]
    made_with = settings_digest(config, process, files, words, seen)
    cache = args.features and (args.features, settings_digest(config, process, files))
    resume = args.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    parts = (segmenter, config, process, words, images, args.out, made_with)
    segment_images(*parts, resume, cache)


def measure(args: Namespace, content: dict, config: Config, process) -> None:
    """The metrics on a split of a data set, and what belongs to them."""
    from zsseg.datasets import dataset, find_pairs
    from zsseg.evaluate import evaluate
    from zsseg.metrics import report

    split = config.data.split
    pairs = find_pairs(config.data, args.root, split)  # before anything is downloaded
    process.broadcast(lambda: claim_folder(args.out))
    if "config" not in content and config.model.bf16 == "auto" and process.device.type == "cpu":
        # What an original checkpoint gives is compared with the original's numbers.
        config = replace(config, model=replace(config.model, bf16="off"))
    segmenter = load(args, content, config, process, len(pairs))
    seen = seen_classes(dataset(config.data), content, config)
    measured = (segmenter, config, args.root, process, split)
    if args.budget:
        from zsseg.analysis import oracle_analysis, write_analysis

        result = oracle_analysis(*measured, seen)
        if process.is_main:
            write_analysis(result, args.out)
    if args.budget and not args.report:
        return
    page = None
    if args.report:
        from zsseg.apps.report import Report

        page = Report(config, process)
    result = evaluate(*measured, args.out, args.save_predictions, page, seen)
    if process.is_main:
        report(result, config, args.out)
        print(published_row(config), end="")
    if page:
        page.write(result, args.checkpoint, content.get("step"), args.out)


def published_row(config: Config) -> str:
    """A line with the published numbers for the settings that are measured, or ""."""
    for row in PUBLISHED["row"]:
        other = load_config(row["config"], row.get("set", []))
        same = PUBLISHED_FOR(other) == PUBLISHED_FOR(config)
        if same and bool(other.train.teacher) == bool(config.train.teacher):
            found = [f"{key} {row[key]}" for key in METRICS if key in row]
            return f"published ({row['name']}): {', '.join(found)}\n"
    return ""


if __name__ == "__main__":
    command(main)
