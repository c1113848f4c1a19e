"""Archives of data sets, unpacked without trusting them."""

import shutil
import tarfile
import zipfile
from pathlib import PurePosixPath

from zsseg.utils import UserError


def unpack(archive, parts, staging, what):
    """Unpack parts of a .zip or .tar(.gz): {path: path in the archive}.

    They get their names only when all have been written to the folder `staging`; nothing is written
    outside. UserError for an archive that is broken, lacks a part, or, a .tar, has a name or a link
    that leads outside.
    """

    def wanted(name):
        return any(map(PurePosixPath(name).is_relative_to, parts.values()))

    try:
        shutil.rmtree(staging, ignore_errors=True)  # what a kill left
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as content:
                # drops the ".." of names, and writes links as files
                content.extractall(staging, filter(wanted, content.namelist()))
        else:
            with tarfile.open(archive) as content:
                members = [member for member in content if wanted(member.name)]
                content.extractall(staging, members, filter="data")
        for inside in parts.values():
            if not (staging / inside).exists():
                raise ValueError(f"contains no {inside}")
        for target, inside in parts.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            (staging / inside).rename(target)
    except Exception as error:  # broken archives raise many types
        why = f"archive {archive} cannot be unpacked to {staging.parent} ({error})"
        raise UserError(what, why, "check the disk, or delete it to fetch it again") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
