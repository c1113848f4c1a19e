"""Measure a segmenter on a data set, or segment any images with any words.

Measure it:
    python eval.py runs/shapes/last.pt
    python eval.py model_final.pth --config configs/voc_r50_single.toml --save-predictions
    python eval.py runs/shapes/last.pt --report              and a page: OUT/report.html
    python eval.py runs/shapes/last.pt --budget              instead, what masks and classes cost
    torchrun --nproc-per-node=8 eval.py CHECKPOINT

Segment images: files, folders, or - for a list on standard input. Each gets a label map (.png), an
overlay with a legend (.overlay.jpg) and its classes with pixels, share and mean score (.json):
    python eval.py CHECKPOINT --images photo.jpg --classes "cat, dog, grass"
    python eval.py CHECKPOINT --images photos/ more/a.png --classes words.txt --out segmented
    torchrun --nproc-per-node=8 eval.py CHECKPOINT --images photos/ --classes words.txt --resume
Lines of words.txt: `cat`, with synonyms `sofa = couch, settee`, `"bread, sliced"` for a name with a
comma in it, or `other: sky, wall` for what is predicted but shown as "other". Without --classes,
the classes are the data set's.

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

import inspect
import operator
import os
from dataclasses import replace
from pathlib import Path

from zsseg.apps.vocabulary import Words, read_words, seen_classes, trained_names
from zsseg.config import load_config
from zsseg.utils import (
    UserError,
    claim_folder,
    command,
    digest,
    expand_path,
    no_such_file,
    read_table,
    run_parser,
    warn,
)

PUBLISHED = read_table("published.toml")
# The settings that a published number is of, besides section clip and whether there was a teacher
PUBLISHED_FOR = """\
data.name data.split data.train_on data.test_short_edge data.max_size
model.backbone model.proposals model.proposer model.num_queries model.class_head
eval.sizes eval.flip eval.window eval.max_images"""
MODELS = [*PUBLISHED["model"]]


def parse(argv):
    """The command line; UserError for what can be told without loading anything."""
    parser = run_parser(__doc__)
    text = f"a file, a published model ({', '.join(MODELS)}), or -"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=text)
    add = parser.add_argument
    add("--save-predictions", action="store_true", help="also OUT/predictions/<stem>.png")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--report", action="store_true", help="also OUT/report.html: confusions, curves, images")
    add("--budget", action="store_true", help="instead, what masks and classes cost: oracles")
    add("--images", metavar="IMAGE", nargs="+", default=[], help="files, folders, or - for a list")
    add("--serve", metavar="PORT", type=int, nargs="?", const=8000, help="a page on 127.0.0.1")
    add = parser.add_argument
    add("--classes", metavar="WORDS", type=read_words, help='"cat, dog; other: sky", or a file')
    add("--resume", action="store_true", help="only the images that are not done yet")
    add("--features", metavar="DIR", type=expand_path, help="cache what serves other words, too")
    args = parser.parse_args(argv)

    args.own = args.images or args.serve is not None
    if args.save_predictions and (args.own or args.budget):
        raise UserError("--save-predictions", "is for measuring", "leave it out")
    if (args.classes and not args.own) or ((args.resume or args.features) and not args.images):
        options = "--classes, --resume, --features"
        raise UserError(options, "are for images of your own", "add --images")
    for text in (args.checkpoint, *args.images):
        path = expand_path(text)
        if not path.exists() and text not in (*MODELS, "-"):
            models = f", or give one of {', '.join(MODELS)}" if text == args.checkpoint else ""
            raise no_such_file(f"file {text}", path, f"check the path{models}")
    load_config(args.config, args.set)
    return args


def main(argv):
    args = parse(argv)
    from zsseg.distributed import init_distributed
    from zsseg.weights import checkpoint_and_config, find_model, load_segmenter

    named = args.checkpoint
    args.checkpoint, published = find_model(named)
    content, config = checkpoint_and_config(args.checkpoint, args.config or published, args.set)
    folder = Path("runs", named) if published else args.checkpoint.parent
    args.out = args.out or folder / ("segmented" if args.images else "eval")
    process = init_distributed(args.device)
    if "config" not in content and not args.own and process.device.type == "cpu":
        # What an original checkpoint gives is compared with the original's numbers.
        config = load_config(args.config or published, ["model.bf16=off", *args.set])

    def load(images):
        """The segmenter, made fast for so many images; says what it runs on."""
        segmenter = load_segmenter(content, config, args.root, args.checkpoint)
        process.describe(config.model.bf16)
        process.accelerate(segmenter, config.model, images)
        return segmenter

    use = use_words if args.own else measure
    use(args, content, config, process, load)


def use_words(args, content, config, process, load):
    """Images of the user's: a page to try them on, or a label map, an overlay and a JSON file each.
    What can fail does before anything is downloaded.
    """
    from zsseg.apps.predict import find_images, segment_images
    from zsseg.apps.serve import Session, open_server
    from zsseg.datasets import dataset

    words = args.classes or Words(dataset(config.data).names)
    if words.note:
        warn(words.note)
    trained = trained_names(content, config)
    if args.serve is not None:
        server = open_server(args.serve, config)
        return server.run(Session(load(0), config, process, trained, words))

    if args.features and (config.eval.views or not config.model.proposals):
        why = "caches mask proposals, of one view an image (eval.sizes, flip, window)"
        raise UserError("--features", why, "leave it out")
    images = process.broadcast(lambda: find_images(args.images, args.out))
    folders = [folder for folder in (args.out, args.features) if folder]
    process.broadcast(lambda: [claim_folder(folder) for folder in folders])
    segmenter = load(len(images))
    segmenter.set_classes(words.names, words.among(trained), words.synonyms)
    weights = config.clip.weights.replace("{root}", str(args.root))
    files = [args.checkpoint, weights, config.clip.prompts]
    if config.model.proposer:
        files.append(inspect.getsourcefile(inspect.unwrap(segmenter.proposer)))
    sizes = (config.data.test_short_edge, config.data.max_size)
    model = digest([config.model, config.clip, config.eval, sizes], files)
    parts = (segmenter, config, process, words, images)
    resume = args.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    segment_images(*parts, args.out, model, resume, args.features)


def measure(args, content, config, process, load):
    """The metrics on a split of a data set, and what belongs to them."""
    from zsseg.analysis import oracle_analysis, write_analysis
    from zsseg.apps.report import Report
    from zsseg.datasets import dataset, find_pairs
    from zsseg.evaluate import evaluate

    split = config.data.split
    pairs = find_pairs(config.data, args.root, split)  # before anything is downloaded
    process.broadcast(lambda: claim_folder(args.out))
    seen = seen_classes(dataset(config.data), content, config)
    measured = (load(len(pairs)), config, args.root, process, split)
    if args.budget:
        result = oracle_analysis(*measured, seen)
        return write_analysis(result, args.out) if process.is_main else None
    page = Report(config, process) if args.report else None
    result = evaluate(*measured, args.out, args.save_predictions, page, seen)
    if process.is_main:
        print(published_row(config), end="")
    if page:
        page.write(result, args.checkpoint, content.get("step"), args.out)


def published_for(config):
    """All that a published number depends on."""
    values = operator.attrgetter(*PUBLISHED_FOR.split())(config)
    clip = replace(config.clip, prompts="", crop_batch_size=1)
    return values, clip, bool(config.train.teacher)


def published_row(config):
    """A line with the published numbers for the settings that are measured, or ""."""
    for row in PUBLISHED["row"]:
        if published_for(load_config(row["config"], row.get("set", []))) == published_for(config):
            found = [f"{key} {value}" for key, value in row.items() if isinstance(value, float)]
            return f"published ({row['name']}): {', '.join(found)}\n"
    return ""


if __name__ == "__main__":
    command(main)
