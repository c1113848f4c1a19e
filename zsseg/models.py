"""Published models by name: their files on Google Drive, and configurations (published.toml)."""

import tomllib
from pathlib import Path

from zsseg.download import fetch
from zsseg.utils import UserError, cache_dir, path_of, print_main

FOLDER = Path(__file__).parent
MODELS = tomllib.loads((FOLDER / "published.toml").read_text("utf-8"))["model"]
# With the answer to what it would ask of a large file: that it is not scanned for viruses.
DRIVE = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"


def find_model(wanted: str | Path, what: str = "checkpoint") -> tuple[Path, str | None]:
    """The file of a checkpoint and, where `wanted` names a published model, its configuration's.

    Such a model is downloaded to the cache once; a file or folder of that name comes first. Raises
    UserError, for a name that is neither with the names there are.
    """
    path, name = path_of(wanted), str(wanted)
    if path.exists() or (name not in MODELS and (path.suffix or len(path.parts) > 1)):
        return path, None
    if name not in MODELS:
        todo = f"give a file, or one of {', '.join(MODELS)}"
        raise UserError(f"{what} {name}", "no such file or published model", todo)
    model = MODELS[name]
    print_main(f"{name}: trained on {model['trained_on']}; licence: {model['licence']}")
    url = DRIVE.format(model["drive"])
    file = fetch([url], cache_dir() / model["file"], model["checksum"], name)
    return file, str(FOLDER.parent / "configs" / f"{model['config']}.toml")
