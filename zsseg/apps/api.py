"""The Python interface: a segmenter from a checkpoint, for any image and any words.

from zsseg import load

segmenter = load("runs/shapes/last.pt")
segmenter.set_classes(["star", "cup", "brick"])
labels = segmenter("photo.jpg")
"""

import threading
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from zsseg.apps.predict import segment_image
from zsseg.apps.vocabulary import Words, trained_names
from zsseg.datasets import dataset
from zsseg.distributed import Process, find_device
from zsseg.images import as_rgb, network_inputs, read_image
from zsseg.tokenizer import check_names
from zsseg.utils import expand_path
from zsseg.weights import checkpoint_and_config, find_model, load_segmenter


class Predictor:
    """Segments images one by one, with any words. `names` has the class of each id in a label map,
    those of the configured data set until others are given. Threads may share it, and take turns:
    where several change the classes, each has to give its own with the image.
    """

    def __init__(self, path, config=None, root="datasets", device="auto", settings=()):
        """From a checkpoint of ours or the original's (which needs the `config` file of its
        training), or from the name of a published model, such as "ovseg-swinb", which is
        downloaded; "-" with a `config` that sets model.proposer.

        root: data root, where `{root}` in the configuration points. device: "auto", or one of
        torch's: "cpu", "cuda:1". settings: such as "clip.ensemble_weight=0.6". Precision is chosen
        as by eval.py. Raises UserError.
        """
        self.process = Process(find_device(device))
        self.lock = threading.RLock()
        file, published = find_model(path)
        content, self.config = checkpoint_and_config(file, config or published, settings)
        self.segmenter = load_segmenter(content, self.config, expand_path(root), str(file))
        self.process.accelerate(self.segmenter, self.config.model)
        # Names of the classes of the training, which count as seen
        self.trained = trained_names(content, self.config)
        self.set_classes(dataset(self.config.data).names)

    def set_classes(self, names, synonyms=None):
        """Fix the classes; those that the segmenter was trained on count as seen in the ensemble.

        synonyms: {name: further names of the class}, whose text features are averaged with the
        name's. UserError for names that CLIP cannot tell apart or read; nothing has changed then.
        """
        names = check_names(names if isinstance(names, str) else [*names])
        seen = Words(names, synonyms or {}).among(self.trained)
        with self.lock:
            self.segmenter.set_classes(names, seen, synonyms)
            self.names = names

    @torch.inference_mode()
    def __call__(self, image, return_scores=False, classes=None):
        """The class of every pixel: indices of `names`, uint8 (uint16 above 255 classes) [H, W], of
        the image's size.

        image: a file, a Pillow image or an array that Pillow knows, such as uint8 RGB [H, W, 3] or
        grey [H, W]. With `return_scores`, also the score of that class, fp32 [H, W]: the sum over
        the queries of class score x mask. `classes`: as of `set_classes`, from now on. UserError
        for a file that cannot be read.
        """
        if isinstance(image, str | Path):
            image = read_image(expand_path(image), turn=True)
        elif isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        image = as_rgb(image)
        inputs = network_inputs(image, self.config.data, self.config.eval.sizes)
        parts = (self.segmenter, self.config, self.process, inputs, image.size[::-1])
        with self.lock:
            if classes is not None:
                self.set_classes(classes)
            labels, scores = segment_image(*parts)()
            labels = labels.numpy().astype(np.min_scalar_type(len(self.names)))
        # A copy: what came from a GPU lies in memory that cannot be swapped.
        return (labels, scores.numpy().copy()) if return_scores else labels


load = Predictor
