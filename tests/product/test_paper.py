"""The published results, measured by tests/benchmarks/paper.py."""

import numpy as np
import pytest
import torch
import trees
from conftest import keys, original_state

from tests.benchmarks import paper
from zsseg.datasets import DATASETS
from zsseg.utils import UserError

ROW = "OVSeg, R101c -> VOC 2012, 20 classes"
TABLE = f"""| | pAcc | ours |
|---|---|---|
| VOC 2012, self-training | 88.7 | - |
| {ROW} (`ovseg_r101c`) | | - |

| | mIoU |
|---|---|
| {ROW} | 92.6 |
"""


@pytest.mark.usefixtures("vocabulary")
def test_what_is_at_hand_is_measured_once(tmp_path, monkeypatch, capsys):
    """One image of VOC, stand-in weights and, before them, a file that is none."""
    folder = tmp_path / "VOC2012"
    trees.image(folder / "JPEGImages" / "a.jpg", (48, 48), 0, 0)
    trees.save_map(np.full((48, 48), 17), folder / "SegmentationClassAug" / "a.png")
    (folder / "val.txt").write_text("a\n")
    state = original_state(keys("keys_coco_r101c_tinyclip.json"))
    torch.save({"model": state}, tmp_path / "ovseg_r101c.pth")
    broken = tmp_path / "coco-stuff-voc-2012-20-classes.pt"
    broken.write_text("no tensors")
    readme, out = tmp_path / "README.md", tmp_path / "out"
    readme.write_text(TABLE)
    words = ["--root", tmp_path, "--checkpoints", tmp_path, "--out", out, "--device", "cpu"]
    start = lambda: paper.main([*map(str, words)], readme)
    with pytest.raises(UserError, match="failed, or none"):
        start()
    lines = {line[:45].strip(): line[45:] for line in capsys.readouterr().out.splitlines()}
    assert {row["name"] for row in paper.FILES["row"]} < {*lines}
    assert "not all images" in lines[ROW] and readme.read_text() == TABLE
    assert "cannot be read as tensors" in lines["COCO-Stuff -> VOC 2012, 20 classes"]
    assert "cannot be read as tensors" in (out / f"{broken.stem}.txt").read_text()
    assert "none is named voc-2012-learned-prompts or" in lines["VOC 2012, learned prompts"]
    assert "prepare_data.py coco_stuff" in lines["COCO-Stuff, learned prompts"]

    broken.unlink()
    log = out / "ovseg-r101c-voc-2012-20-classes.txt"
    content = log.read_text()
    for part in ("eval.py", "commit: ", "torch 2", "computing on a CPU", "exit code 0: "):
        assert part in content
    monkeypatch.setitem(DATASETS["voc"].counts, "val", 1)
    start()
    assert log.read_text() == content
    assert readme.read_text() == TABLE.replace("| | - |", f"| | {lines[ROW].split()[1]} |")
    taught = {"VOC 2012, learned prompts, self-training": "1.0 / 2.0"}
    assert paper.fill(TABLE, taught) == TABLE.replace("88.7 | -", "88.7 | 1.0 / 2.0")
