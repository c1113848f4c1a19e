"""Archives of data sets, unpacked without trusting them."""

import shutil

from zsseg.utils import UserError


def unpack(archive, parts, staging, what):
    """Unpack a .zip or .tar(.gz) and keep parts of it: {path: path in the archive}.

    They get their names only when all has been written to the folder `staging`; nothing is written
    outside. UserError for an archive that is broken, lacks a part, or, a .tar, has a name or a link
    that leads outside.
    """
    # Of a .zip, names that lead outside are left out, and links become files.
    options = {} if archive.suffix == ".zip" else {"filter": "data"}
    try:
        shutil.rmtree(staging, ignore_errors=True)  # what a kill left
        shutil.unpack_archive(archive, staging, **options)
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
