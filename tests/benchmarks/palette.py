"""The palette of `zsseg/visualize.py`: `python -m tests.benchmarks.palette` writes it anew and prints
how far apart its colours are, in CIEDE2000 (Sharma, Wu and Dalal 2005).
"""

from pathlib import Path

import numpy as np

from zsseg import visualize

FILE = Path(visualize.__file__).with_name("palette.txt")
COUNT = 255
TAKEN = [(0, 0, 0), (255, 255, 255), (96, 96, 96)]  # ignored pixels, outlines, background words


def lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in 0..255 [..., 3] -> CIELAB under D65."""
    c = np.asarray(rgb) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750]]
    to_xyz = np.array([*to_xyz, [0.0193339, 0.1191920, 0.9503041]])
    t = linear @ to_xyz.T / [0.95047, 1, 1.08883]
    x, y, z = np.moveaxis(np.where(t > (6 / 29) ** 3, np.cbrt(t), t * 841 / 108 + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def ciede2000(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The difference of CIELAB colours [..., 3]."""
    l1, a1, b1 = np.moveaxis(first, -1, 0)
    l2, a2, b2 = np.moveaxis(second, -1, 0)
    c7 = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    g = 1.5 - np.sqrt(c7 / (c7 + 25**7)) / 2
    c1, c2 = np.hypot(g * a1, b1), np.hypot(g * a2, b2)
    h1, h2 = np.degrees(np.arctan2(b1, g * a1)) % 360, np.degrees(np.arctan2(b2, g * a2)) % 360
    turn = (h2 - h1 + 180) % 360 - 180
    turn = np.where(c1 * c2 == 0, 0, turn)
    hue = np.where(c1 * c2 == 0, h1 + h2, h1 + turn / 2) % 360
    dh = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn) / 2)
    c = (c1 + c2) / 2
    l50 = ((l1 + l2) / 2 - 50) ** 2
    cos = lambda degrees: np.cos(np.radians(degrees))
    t = 1 - 0.17 * cos(hue - 30) + 0.24 * cos(2 * hue)
    t += 0.32 * cos(3 * hue + 6) - 0.2 * cos(4 * hue - 63)
    sl = (l2 - l1) / (1 + 0.015 * l50 / np.sqrt(20 + l50))
    sc = (c2 - c1) / (1 + 0.045 * c)
    sh = dh / (1 + 0.015 * c * t)
    rotation = 2 * np.sqrt(c**7 / (c**7 + 25**7))
    rotation *= -np.sin(np.radians(60 * np.exp(-(((hue - 275) / 25) ** 2))))
    return np.sqrt(sl**2 + sc**2 + sh**2 + rotation * sc * sh)


def spread(colours: np.ndarray) -> float:
    """The smallest difference between two of some colours, uint8 [N, 3]."""
    points = lab(colours)
    distance = ciede2000(points[:, None], points[None])
    return float(distance[np.triu_indices(len(points), 1)].min())


def grid(steps: int) -> np.ndarray:
    """Colours on a grid of `steps` along each of red, green and blue: uint8 [steps^3, 3]."""
    levels = np.linspace(0, 255, steps).round()
    return np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3).astype(np.uint8)


def pack(colours: np.ndarray, least: float) -> np.ndarray:
    """As many of some colours as differ by `least` from each other and from TAKEN: each the one
    that rules out the fewest of those that are still free.
    """
    points = lab(colours)
    distance = np.stack([ciede2000(points, point) for point in points])
    free = np.all([ciede2000(points, lab(colour)) >= least for colour in TAKEN], 0)
    chosen = []
    while free.any():
        left = np.flatnonzero(free)
        best = left[(distance[np.ix_(left, left)] < least).sum(1).argmin()]
        chosen.append(best)
        free &= distance[best] >= least
    return colours[chosen]


def in_order(colours: np.ndarray, first: np.ndarray, count: int) -> np.ndarray:
    """`count` of some colours, each the farthest from all before it and from `first`."""
    points = lab(colours)
    nearest = np.min([ciede2000(points, lab(colour)) for colour in first], 0)
    chosen = []
    for _ in range(count):
        chosen.append(nearest.argmax())
        nearest = np.minimum(nearest, ciede2000(points, points[chosen[-1]]))
    return colours[chosen]


def choose() -> np.ndarray:
    """COUNT colours; the first DISTINCT differ by 20 or more: uint8 [COUNT, 3]."""
    packed = pack(grid(18), 20.3)
    assert len(packed) == visualize.DISTINCT, len(packed)
    packed = in_order(packed, TAKEN, len(packed))
    more = in_order(grid(26), [*TAKEN, *packed], COUNT - len(packed))
    return np.concatenate([packed, more])


def main() -> None:
    colours = choose()
    np.savetxt(FILE, colours, "%d")
    for count in (10, 25, visualize.DISTINCT, 50, 100, 171, COUNT):
        print(f"the first {count}: {spread(colours[:count]):.1f}")


if __name__ == "__main__":
    main()
