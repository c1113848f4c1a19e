"""The Python interface: a segmenter from a checkpoint, for any image and any words.

from zsseg import load

segmenter = load("runs/shapes/last.pt")
segmenter.set_classes(["star", "cup", "brick"])
labels = segmenter("photo.jpg")
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from zsseg import checkpoint
from zsseg.build import load_segmenter
from zsseg.config import Config, load_config
from zsseg.data import network_inputs
from zsseg.datasets import dataset
from zsseg.distributed import Process, init_distributed
from zsseg.images import as_rgb, read_image
from zsseg.models import find_model
from zsseg.apps.predict import segment_image
from zsseg.segmenter import Segmenter
from zsseg.utils import UserError, path_of
from zsseg.visualize import label_type
from zsseg.apps.vocabulary import Words, trained_names


def load(
    path: str | Path,
    config: str | Path | None = None,
    root: str | Path = "datasets",
    device: str = "auto",
    settings: list[str] = (),
) -> "Predictor":
    """A segmenter from a checkpoint of ours or the original's (which needs the `config` file of its
    training), or from the name of a published model, such as "ovseg-swinb", which is downloaded.

    root: data root, where `{root}` in the configuration points. device: "auto", "cpu" or "cuda".
    settings: overrides such as "clip.ensemble_weight=0.6". Device and precision are chosen as by
    eval.py. Raises UserError.
    """
    path, published = find_model(path)
    content, loaded = checkpoint_and_config(path, config or published, settings)
    process = init_distributed(device)
    segmenter = load_segmenter(content, loaded, path_of(root), path).to(process.device).eval()
    return Predictor(segmenter, loaded, process, trained_names(content, loaded))


def checkpoint_and_config(
    path: Path, config: str | Path | None, settings: list[str]
) -> tuple[dict, Config]:
    """The content of a checkpoint, and its configuration with that of a file and settings put
    over it. UserError where there is none.
    """
    content = checkpoint.load(path)
    if "config" not in content and not config:
        raise UserError(f"checkpoint {path}", "contains no configuration", "give its --config")
    return content, load_config(config, settings, content.get("config"))


class Predictor:
    """Segments images one by one. Its classes are those of the configured data set until
    `set_classes` gives others, at any time.
    """

    def __init__(self, segmenter: Segmenter, config: Config, process: Process, trained: list[str]):
        self.segmenter = segmenter
        self.config = config
        self.process = process
        self.trained = trained  # names of the classes of the training
        self.set_classes(dataset(config.data).names)

    def set_classes(self, names: list[str], synonyms: dict[str, list[str]] | None = None) -> None:
        """Fix the classes; those that the segmenter was trained on count as seen in the ensemble.

        synonyms: {name: further names of the class}, whose text features are averaged with the
        name's.
        """
        words = Words(list(names), synonyms or {}, len(names))
        self.names = words.names
        self.segmenter.set_classes(words.names, words.among(self.trained), words.synonyms)

    @torch.inference_mode()
    def __call__(self, image: str | Path | Image.Image | np.ndarray, return_scores: bool = False):
        """The class of every pixel: indices of `names`, uint8 (uint16 above 255 classes) [H, W], of
        the image's own size.

        image: a file, a Pillow image or an array, uint8 RGB [H, W, 3] or grey [H, W]. With
        `return_scores`, also the score of that class, fp32 [H, W]: the sum over the queries of
        class score x mask.
        """
        if isinstance(image, str | Path):
            image = read_image(path_of(image), shown=True)
        else:
            image = as_image(image)
        inputs = network_inputs(image, self.config.data, self.config.eval.sizes)
        labels, scores = segment_image(
            self.segmenter, self.config, self.process, inputs, image.size[::-1]
        )
        labels = labels.cpu().numpy().astype(label_type(len(self.names)))
        return (labels, scores.float().cpu().numpy()) if return_scores else labels


def as_image(image: Image.Image | np.ndarray) -> Image.Image:
    """An array or a Pillow image as RGB, transparent parts on white."""
    if isinstance(image, Image.Image):
        return as_rgb(image)
    array = np.asarray(image)
    channels = array.shape[2:] if array.ndim == 3 else ()
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or channels not in ((), (3,), (4,))
        or not array.size
    ):
        why = f"is an array of {array.dtype} {list(array.shape)}"
        todo = "give uint8 [H, W, 3] in RGB, [H, W, 4] or [H, W], a Pillow image or a file"
        raise UserError("image", why, todo)
    return as_rgb(Image.fromarray(array))
