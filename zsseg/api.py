"""The Python interface: a segmenter from a checkpoint, for any image and any words.

from zsseg import load

segmenter = load("runs/shapes/last.pt")
segmenter.set_classes(["red square", "blue disc", "striped wall"])
labels = segmenter("photo.jpg")
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zsseg import checkpoint
from zsseg.build import load_segmenter
from zsseg.config import Config, load_config
from zsseg.data import test_size, to_tensor
from zsseg.datasets import dataset
from zsseg.distributed import Process, init_distributed
from zsseg.images import as_rgb, read_image
from zsseg.models import find_model
from zsseg.segmenter import Segmenter
from zsseg.utils import UserError, path_of
from zsseg.views import all_finite, label_map, segment_views
from zsseg.visualize import label_type
from zsseg.vocabulary import Words, trained_names


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
    config = config or published
    content = checkpoint.load(path)
    if "config" not in content and config is None:
        raise UserError(f"checkpoint {path}", "holds no configuration", "give its config")
    loaded = load_config(config, settings, content.get("config"))
    process = init_distributed(device)
    segmenter = load_segmenter(content, loaded, path_of(root), path).to(process.device).eval()
    return Predictor(segmenter, loaded, process, trained_names(content, loaded))


class Predictor:
    """Segments images one by one; its classes, at first those of the configured data set, may be
    changed at any time.
    """

    def __init__(self, segmenter: Segmenter, config: Config, process: Process, trained: list[str]):
        self.segmenter, self.config, self.process, self.trained = (
            segmenter,
            config,
            process,
            trained,
        )
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
        image = (
            read_image(path_of(image), shown=True)
            if isinstance(image, str | Path)
            else as_image(image)
        )
        data, wanted = self.config.data, self.config.eval
        edges, size = wanted.sizes or [data.test_short_edge], image.size[::-1]
        inputs = [
            self.resized(image, test_size(*image.size, edge, data.max_size)) for edge in edges
        ]
        with self.process.autocast(self.config.model.bf16):
            views = segment_views(self.segmenter, inputs, size, wanted.flip, wanted.window)
        scores = [self.segmenter.ensemble(view.proposals) for view in views]
        if not all_finite(views, scores):
            raise UserError(
                "the model",
                "gives scores that are not finite",
                "check its weights, or set model.bf16=off",
            )
        labels, top = label_map(self.segmenter, views, scores, size)
        labels = labels.cpu().numpy().astype(label_type(len(self.names)))
        return (labels, top.float().cpu().numpy()) if return_scores else labels

    def resized(self, image: Image.Image, size: tuple[int, int]) -> Tensor:
        """uint8 [3, h, w] on the device, for a network input of `size` (width, height)."""
        return to_tensor(image.resize(size, Image.Resampling.BILINEAR)).to(self.process.device)


def as_image(image: Image.Image | np.ndarray) -> Image.Image:
    """An array or a Pillow image as RGB, transparent parts on white."""
    if isinstance(image, Image.Image):
        return as_rgb(image)
    array = np.asarray(image)
    if (
        array.dtype != np.uint8
        or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)))
        or not array.size
    ):
        why = f"is an array of {array.dtype} {list(array.shape)}"
        raise UserError(
            "image",
            why,
            "give uint8 [H, W, 3] in RGB, [H, W, 4] or [H, W], a Pillow image or a file",
        )
    return as_rgb(Image.fromarray(array))
