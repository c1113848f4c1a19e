"""What the networks make of an image before any word is known, kept in a file: mask logits, the
proposer's class features and CLIP's features of the regions. Other words need one product with
their text features.
"""

import io
import os
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from zsseg.config import Config
from zsseg.data import to_tensor
from zsseg.distributed import Process
from zsseg.files import MARK, is_ours, refuse_foreign, result
from zsseg.apps.predict import InputImage, Names, digest_of, version_of
from zsseg.segmenter import Proposals, Segmenter
from zsseg.utils import UserError

ENDING = ".npz"
TODO = "write them again with --images"
# name: (dtype, dimensions)
ARRAYS = {
    "mask_logits": (np.float16, 3),  # [Q, h, w] at stride 4
    "class_features": (np.float16, 2),  # [Q, D]
    "region_features": (np.float16, 2),  # [P, D] of the P valid masks; [0, 0] without the ensemble
    "valid": (np.bool_, 1),  # [Q]
    "input_size": (np.int64, 1),  # (H, W) of the network input
    "size": (np.int64, 1),  # (H, W) of the image
    "version": (np.int64, 1),  # the image file's size and time, see `version_of`
    "preview": (np.uint8, 1),  # a JPEG file
    "made_with": (np.uint8, 1),  # the digest, in bytes
}


def features_digest(segmenter: Segmenter, config: Config, process: Process) -> str:
    """A digest of all that kept features depend on besides the images: not on words or prompts.

    UserError where there are none to keep.
    """
    if config.eval.sizes or config.eval.flip or config.eval.window:
        todo = "leave eval.sizes, eval.flip and eval.window out"
        raise UserError("--features", "keeps one view an image", todo)
    if segmenter.clip is None or not segmenter.two_stage:
        raise UserError("--features", "needs mask proposals and CLIP", "give another checkpoint")
    # Words, prompts and weights of the ensemble come later.
    late = ("prompt", "region_prompt", "prompts", "prompt_prefix", "ensemble_weight")
    late += ("ensemble_seen", "chunk", "weights")
    clip = asdict(config.clip) | dict.fromkeys(late)
    model = asdict(config.model) | dict.fromkeys(["compile", "kernels", "weights", "bf16"])
    sizes = (config.data.test_short_edge, config.data.max_size)
    settings = [clip, model, process.bf16(config.model.bf16), sizes]
    return digest_of(settings, segmenter.maskformer, segmenter.clip.visual)


class FeatureFiles:
    """Writes an image's DIR/<name>.npz, as `predict.Results` writes label maps. Safe to call from
    threads.
    """

    def __init__(self, out: Path, names: Names, made_with: str):
        self.out = out
        self.names = names
        self.made_with = made_with

    def file(self, number: int) -> Path:
        return self.out / (self.names[number] + ENDING)

    def refuse_foreign(self, numbers: range) -> None:
        refuse_foreign(*map(self.file, numbers))

    def pixels(self, number: int) -> dict[int, int] | None:
        """{} where the file is there, of the image as it is now and with these settings."""
        try:
            arrays = read_arrays(self.file(number))
            same = arrays["made_with"].tobytes().decode() == self.made_with
            current = version_of(self.names.files[number]) == arrays["version"].tolist()
            return {} if same and current else None
        except (OSError, UserError):
            return None

    def segment(
        self, segmenter: Segmenter, config: Config, process: Process, item: InputImage
    ) -> Proposals:
        with process.autocast(config.model.bf16):
            proposals = segmenter.propose(item.inputs[0].to(process.device))
        parts = (proposals.mask_logits, proposals.class_features, proposals.region_features)
        if any(part is not None and part.isnan().any() for part in parts):
            why = f"gives NaN for {self.names.files[item.number]}"
            raise UserError("the model", why, "check its weights, or set model.bf16=off")
        return proposals

    def count(self, proposals: Proposals) -> dict[int, int]:
        return {}

    def write(self, item: InputImage, proposals: Proposals) -> None:
        preview = io.BytesIO()
        image = Image.fromarray(item.preview.permute(1, 2, 0).numpy())
        image.save(preview, "JPEG", quality=90)
        regions = proposals.region_features
        values = {
            "mask_logits": half(proposals.mask_logits),
            "class_features": half(proposals.class_features),
            "region_features": np.zeros((0, 0), np.float16) if regions is None else half(regions),
            "valid": proposals.valid.cpu().numpy(),
            "input_size": np.array(proposals.input_size),
            "size": np.array(item.size),
            "version": np.array(item.version),
            "preview": np.frombuffer(preview.getvalue(), np.uint8),
            "made_with": np.frombuffer(self.made_with.encode(), np.uint8),
        }
        with result(self.file(item.number)) as path:
            with open(path, "wb") as file:
                np.savez(file, **values)
            with zipfile.ZipFile(path, "a") as archive:
                archive.comment = MARK.encode()


class KeptFeatures(Dataset):
    """Item i: the InputImage of a file of features, with its `proposals`, as `InputImages` gives it
    of an image.
    """

    def __init__(self, files: list[str], made_with: str):
        self.files = files
        self.made_with = made_with

    def __getitem__(self, i: int) -> InputImage:
        try:
            arrays = read_arrays(Path(self.files[i]))
            if arrays["made_with"].tobytes().decode(errors="replace") != self.made_with:
                raise UserError("", "is of another model or other settings", TODO)
            with Image.open(io.BytesIO(arrays["preview"].tobytes()), formats=["JPEG"]) as preview:
                preview = to_tensor(preview.convert("RGB"))
        except Exception as error:  # of many kinds: a file may contain anything
            why = error.args[1] if isinstance(error, UserError) else repr(error)
            return InputImage(i, error=why)
        return InputImage(
            number=i,
            preview=preview,
            size=tuple(arrays["size"].tolist()),
            version=version_of(self.files[i]),
            proposals=to_proposals(arrays),
        )


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file of features; UserError for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise ValueError("it is compressed")
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in ARRAYS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"features {path}", f"cannot be read ({error})", TODO) from None
    for name, (dtype, dimensions) in ARRAYS.items():
        if arrays[name].dtype != dtype or arrays[name].ndim != dimensions:
            raise UserError(f"features {path}", f"contains no {name}", TODO)
        if dtype == np.float16 and np.isnan(arrays[name]).any():
            raise UserError(f"features {path}", f"contains NaN in {name}", TODO)
    Q = len(arrays["mask_logits"])
    regions = arrays["region_features"]
    sizes = [*arrays["input_size"], *arrays["size"]]
    if (
        (len(arrays["valid"]), len(arrays["class_features"])) != (Q, Q)
        or (regions.shape[1] and len(regions) != arrays["valid"].sum())
        or len(sizes) != 4
        or not all(0 < size <= 2**16 for size in sizes)
        or any(4 * a < b for a, b in zip(arrays["mask_logits"].shape[1:], sizes, strict=False))
    ):
        raise UserError(f"features {path}", "contains arrays that do not fit", TODO)
    return arrays


def half(tensor: Tensor) -> np.ndarray:
    """In 16 bits, the largest values clamped to what they have room for."""
    most = torch.finfo(torch.float16).max
    return tensor.float().clamp(-most, most).half().cpu().numpy()


def to_proposals(arrays: dict[str, np.ndarray]) -> Proposals:
    """As `Segmenter.classify` takes them."""
    mask_logits, class_features, regions = (
        torch.from_numpy(arrays[name]).float()
        for name in ("mask_logits", "class_features", "region_features")
    )
    return Proposals(
        mask_logits=mask_logits,
        input_size=tuple(arrays["input_size"].tolist()),
        class_probs=torch.zeros(len(mask_logits), 0),
        clip_probs=None,
        valid=torch.from_numpy(arrays["valid"]),
        class_features=class_features,
        region_features=regions if regions.shape[1] else None,
    )


def find_features(folder: Path) -> list[str]:
    """The files of features below a folder, after the folder; UserError where there are none."""
    files = [os.path.abspath(file) for file in sorted(folder.rglob(f"*{ENDING}")) if is_ours(file)]
    if not files:
        raise UserError(f"--features {folder}", "contains no features", TODO)
    return [os.path.abspath(folder), *files]
