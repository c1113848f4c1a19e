"""Draw the method as tests/screens/method.svg: `python -m tests.benchmarks.method`."""

from pathlib import Path

BOXES = [  # (x, y, width, height, colour, lines)
    (10, 90, 110, 60, "#e8ecf1", ["image"]),
    (160, 90, 150, 60, "#d7e6f4", ["MaskFormer", "100 queries"]),
    (350, 30, 150, 60, "#d7e6f4", ["masks", "[Q, H, W]"]),
    (350, 150, 150, 60, "#d7e6f4", ["class embeddings", "[Q, D]"]),
    (540, 30, 150, 60, "#f7e3d0", ["masked crops", "224 x 224"]),
    (540, 150, 150, 60, "#d7e6f4", ["class probabilities", "p [Q, C]"]),
    (730, 30, 150, 60, "#f7e3d0", ["CLIP (frozen)", "c [Q, C]"]),
    (540, 250, 150, 60, "#f7e3d0", ["text features", "of any words [C, D]"]),
    (730, 150, 150, 60, "#dcefdc", ["ensemble", "p^w c^(1-w)"]),
    (920, 90, 150, 60, "#dcefdc", ["label map", "argmax sum_q s_q m_q"]),
]
ARROWS = [  # the points of each, from box to box
    [(120, 120), (158, 120)],
    [(310, 110), (348, 65)],
    [(310, 130), (348, 175)],
    [(500, 60), (538, 60)],
    [(500, 180), (538, 180)],
    [(690, 60), (728, 60)],
    [(615, 250), (615, 212)],
    [(690, 265), (745, 92)],
    [(805, 90), (805, 148)],
    [(690, 180), (728, 180)],
    [(880, 175), (918, 140)],
    [(425, 30), (425, 12), (995, 12), (995, 88)],
]


def main() -> None:
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1080 320" font-family="sans-serif" font-size="14">',
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">',
        '<path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs><rect width="1080" height="320" fill="#fff"/>',
    ]
    for points in ARROWS:
        line = " ".join(f"{x},{y}" for x, y in points)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="#555" stroke-width="1.5" marker-end="url(#a)"/>'
        )
    for x, y, width, height, colour, lines in BOXES:
        parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{colour}" stroke="#888"/>'
        )
        for i, line in enumerate(lines):
            weight = ' font-weight="bold"' if i == 0 else ""
            middle = y + height / 2 + 5 + 18 * (i - (len(lines) - 1) / 2)
            parts.append(
                f'<text x="{x + width / 2}" y="{middle:g}" text-anchor="middle"{weight}>{line}</text>'
            )
    (Path(__file__).parents[1] / "screens" / "method.svg").write_text(
        "\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
