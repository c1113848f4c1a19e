"""Zero-shot semantic segmentation in two stages (Xu et al. 2021): `from zsseg import load`."""


def __getattr__(name):
    if name == "load":  # on demand: it imports the whole program
        from zsseg.apps.api import load

        return load
    raise AttributeError(f"module 'zsseg' has no attribute {name!r}")
