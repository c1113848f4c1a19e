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

from zsseg.apps.predict import segment_image
from zsseg.apps.vocabulary import Words, trained_names
from zsseg.config import Config
from zsseg.datasets import dataset
from zsseg.distributed import Process
from zsseg.images import as_rgb, network_inputs, read_image
from zsseg.segmenter import Segmenter
from zsseg.utils import UserError, expand_path
from zsseg.visualize import label_type
from zsseg.weights import checkpoint_and_config, find_model, load_segmenter


def load(
    path: str | Path,
    config: str | Path | None = None,
    root: str | Path = "datasets",
    device: str = "auto",
    settings: list[str] = (),
) -> "Predictor":
    """A segmenter from a checkpoint of ours or the original's (which needs the `config` file of its
    training), or from the name of a published model, such as "ovseg-swinb", which is downloaded;
    "-" with a `config` that sets model.proposer.

    root: data root, where `{root}` in the configuration points. device: "auto", "cpu", "cuda" or
    "cuda:1". settings: such as "clip.ensemble_weight=0.6". Precision is chosen as by eval.py.
    Raises UserError.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    names = ["cpu", *gpus, *["cuda"][: len(gpus)]]
    device = names[-1] if device == "auto" else device
    if device not in names:
        raise UserError(f"device {device!r}", "is not on this machine", f"give {names[-1]!r}")
    file, published = find_model(path)
    content, loaded = checkpoint_and_config(file, config or published, settings)
    process = Process(torch.device(device))
    segmenter = load_segmenter(content, loaded, expand_path(root), str(file))
    segmenter = segmenter.to(process.device).eval()
    return Predictor(segmenter, loaded, process, trained_names(content, loaded))


class Predictor:
    """Segments images one by one. Its classes are those of the configured data set until
    `set_classes` gives others. Threads may share it as long as none changes the classes.
    """

    def __init__(self, segmenter: Segmenter, config: Config, process: Process, trained: list[str]):
        self.segmenter = segmenter
        self.config = config
        self.process = process
        self.trained = trained  # names of the classes of the training
        self.set_classes(dataset(config.data).names)

    @property
    def names(self) -> list[str]:
        """The class of each id in a label map."""
        return self.segmenter.names

    def set_classes(self, names: list[str], synonyms: dict[str, list[str]] | None = None) -> None:
        """Fix the classes; those that the segmenter was trained on count as seen in the ensemble.

        synonyms: {name: further names of the class}, whose text features are averaged with the
        name's. UserError for names that CLIP cannot tell apart or read; nothing has changed then.
        """
        seen = Words(names, synonyms or {}, len(names)).among(self.trained)
        self.segmenter.set_classes(names, seen, synonyms)

    @torch.inference_mode()
    def __call__(self, image: str | Path | Image.Image | np.ndarray, return_scores: bool = False):
        """The class of every pixel: indices of `names`, uint8 (uint16 above 255 classes) [H, W], of
        the image's size.

        image: a file, a Pillow image or an array, uint8 RGB [H, W, 3] or grey [H, W]. With
        `return_scores`, also the score of that class, fp32 [H, W]: the sum over the queries of
        class score x mask.
        """
        if isinstance(image, str | Path):
            image = read_image(expand_path(image), shown=True)
        else:
            image = as_image(image)
        inputs = network_inputs(image, self.config.data, self.config.eval.sizes)
        parts = (self.segmenter, self.config, self.process, inputs, image.size[::-1])
        labels, scores = segment_image(*parts)
        labels = labels.cpu().numpy().astype(label_type(len(self.names)))
        return (labels, scores.float().cpu().numpy()) if return_scores else labels


def as_image(image: Image.Image | np.ndarray) -> Image.Image:
    """An array or a Pillow image as RGB, transparent parts on white. Raises UserError."""
    if isinstance(image, Image.Image):
        return as_rgb(image)
    array = np.asarray(image)
    channels = array.shape[2:] or (3,)
    known = array.dtype == np.uint8 and array.ndim in (2, 3) and channels[0] in (3, 4)
    if not (known and array.size):
        why = f"is an array of {array.dtype} {list(array.shape)}"
        raise UserError("image", why, "give uint8 [H, W, 3] in RGB, [H, W, 4] or [H, W]")
    return as_rgb(Image.fromarray(array))
