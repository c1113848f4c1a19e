"""The paper's experiments: parts and weights from one pass, views, the one-stage baseline,
self-training, the oracle analysis.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PROCESS, ROOT, keys, tiny_clip_state, tiny_config
from PIL import Image

import eval as evaluation
import train
from zsseg import checkpoint, published, views
from zsseg.analysis import mask_iou, oracle_analysis, write_analysis
from zsseg.checkpoint import load_strict
from zsseg.clip import cosine_logits
from zsseg.config import ModelConfig, load_config
from zsseg.datasets import dataset, find_pairs
from zsseg.distributed import Process
from zsseg.evaluate import evaluate
from zsseg.losses import per_pixel_loss
from zsseg.maskformer import PerPixel
from zsseg.segmenter import Segmenter
from zsseg.self_training import complete, pseudo_labels
from zsseg.utils import UserError
from zsseg.weights import import_original


@pytest.fixture(scope="module")
def trained(shapes_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    train.train(tiny_config("train.steps=3"), shapes_root, out, PROCESS, {})
    return out / "last.pt"


def random_segmenter(*settings: str) -> Segmenter:
    torch.manual_seed(0)
    segmenter = Segmenter(tiny_config(*settings), tiny_clip_state()).eval()
    with torch.no_grad():
        if segmenter.two_stage:
            segmenter.maskformer.mask_embed[-1].weight.mul_(20)  # masks that are decided
    return segmenter


def test_a_sweep_equals_separate_evaluations(shapes_root):
    config = tiny_config("eval.weights=[0.2, 0.5]", "eval.compare=true")
    once = evaluate(random_segmenter(), config, shapes_root, PROCESS, "test")
    for setting, name in (
        ("clip.ensemble_weight=0.2", "weight_0.2"),
        ("clip.ensemble_weight=0.5", "weight_0.5"),
        ("clip.ensemble_weight=0.0", "clip_only"),
        ("clip.ensemble=false", "head_only"),
    ):
        alone = evaluate(
            random_segmenter(setting),
            tiny_config(setting, "eval.compare=false"),
            shapes_root,
            PROCESS,
            "test",
        )
        assert {k: alone[k] for k in once[name]} == once[name], name
    segmenter = random_segmenter()
    segmenter.set_classes(["star", "tree"], [0])
    proposals = segmenter.propose(torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8))
    objectness = segmenter.variants(proposals, [])["clip_objectness"]
    assert torch.allclose(
        objectness,
        proposals.clip_probs
        * proposals.class_probs.sum(1, keepdim=True)
        * proposals.valid[:, None],
    )


def test_predictions_do_not_depend_on_the_truth(trained, shapes_root, tmp_path):
    """The score is only ever computed against true labels, and nothing of them reaches the
    prediction.
    """
    other = tmp_path / "root"
    shutil.copytree(shapes_root, other)
    for _, label in find_pairs("shapes", other, "test"):
        values = np.asarray(Image.open(label))
        Image.fromarray(np.where(values == 255, 255, (values + 7) % 25).astype(np.uint8)).save(
            label
        )
    for name, root in (("a", shapes_root), ("b", other)):
        words = ["--root", str(root), "--out", str(tmp_path / name), "--device", "cpu"]
        evaluation.main([str(trained), *words, "--save-predictions"])
    maps = [sorted((tmp_path / n / "predictions").iterdir()) for n in ("a", "b")]
    assert len(maps[0]) == 4 and all(
        a.read_bytes() == b.read_bytes() for a, b in zip(*maps, strict=True)
    )
    scores = [json.loads((tmp_path / n / "metrics.json").read_text())["pAcc"] for n in ("a", "b")]
    assert scores[0] != scores[1]


# --- views


@pytest.mark.parametrize(
    ("size", "side"), [((1, 1), 30), ((64, 64), 64), ((65, 130), 64), ((40, 200), 64), ((7, 9), 0)]
)
def test_windows_cover_the_image_and_overlap(size, side):
    boxes = list(views.windows(*size, side))
    count = np.zeros(size, int)
    for top, left, bottom, right in boxes:
        assert 0 <= top < bottom <= size[0] and 0 <= left < right <= size[1]
        assert side == 0 or (
            bottom - top == min(side, size[0]) and right - left == min(side, size[1])
        )
        count[top:bottom, left:right] += 1
    assert count.min() >= 1 and (len(boxes) == 1) == (side == 0 or max(size) <= side)


@pytest.mark.parametrize("ways", [{"clip.regions": w} for w in ("crops", "pool", "tokens")])
def test_views_are_the_mean_of_score_maps(ways, monkeypatch):
    segmenter = random_segmenter(*(f"{k}={v}" for k, v in ways.items()), "clip.dense_edge=32")
    segmenter.set_classes(["star", "tree", "brick", "sand", "cup"], [0, 1])
    torch.manual_seed(1)
    images = [torch.randint(0, 256, (3, *s), dtype=torch.uint8) for s in ((64, 80), (96, 120))]
    size = (50, 61)
    found = views.segment_views(segmenter, images, size, True, 64)
    assert len(found) == 2 * (1 * 2 + 3 * 4) and {v.flipped for v in found} == {False, True}
    assert all(segmenter.ensemble(v.proposals).shape == (8, 5) for v in found)
    # An untrained segmenter's favour one class everywhere.
    scores = [torch.rand(8, 5) ** 4 for _ in found]
    total, count = torch.zeros(5, *size), torch.zeros(size)
    for view, s in zip(found, scores, strict=True):
        top, left, bottom, right = view.box
        part = segmenter.score_map(s, view.proposals, (bottom - top, right - left))
        total[:, top:bottom, left:right] += part.flip(-1) if view.flipped else part
        count[top:bottom, left:right] += 1
    mean = total / count
    wanted = mean.argmax(0)
    for tile in (1, 2, 5, 64):  # classes at once
        monkeypatch.setattr(views, "BUDGET", 4 * size[0] * size[1] * tile)
        labels, top = views.label_map(segmenter, found, scores, size)
        assert torch.equal(labels, wanted) and torch.allclose(top, mean.amax(0), atol=1e-6)
    assert len(wanted.unique()) > 1
    # Room for the first; the others wait in files.
    monkeypatch.setattr(views, "BUDGET", found[0].proposals.mask_logits.nbytes)
    waiting = views.segment_views(segmenter, images, size, True, 64)
    assert all(
        torch.equal(a.proposals.mask_logits, b.proposals.mask_logits)
        for a, b in zip(found, waiting, strict=True)
    )
    assert Path("/proc/self/maps").read_text().count("(deleted)") >= len(found) - 1
    [alone] = views.segment_views(segmenter, images[:1], size, False, 0)
    score = segmenter.ensemble(alone.proposals)
    ours = views.label_map(segmenter, [alone], [score], size)
    assert all(map(torch.equal, ours, segmenter.label_map(score, alone.proposals, size)))


def test_evaluation_with_views(trained, shapes_root, tmp_path):
    settings = ["eval.sizes=[64, 96]", "eval.flip=true", "eval.window=64"]
    evaluation.main(
        [
            str(trained),
            "--root",
            str(shapes_root),
            "--out",
            str(tmp_path),
            "--device",
            "cpu",
            *(x for s in settings for x in ("--set", s)),
        ]
    )
    assert json.loads((tmp_path / "metrics.json").read_text())["images"] == 4


# --- region classifiers


def test_one_pass_classifiers_see_the_region():
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    masks = torch.zeros(3, 64, 64, dtype=torch.uint8)
    masks[0], masks[1, :32], masks[2, 5, 9] = 1, 1, 1
    for way in ("pool", "tokens"):
        segmenter = random_segmenter(f"clip.regions={way}", "clip.dense_edge=128")
        segmenter.set_classes(["star", "tree", "brick"], [0, 1])
        logits = segmenter.region_logits(image, masks, None)
        assert (
            logits.shape == (3, 3)
            and torch.isfinite(logits).all()
            and not torch.allclose(logits[0], logits[1], atol=1e-2)
        )
        index = torch.tensor([2, 0])
        few = segmenter.encode_regions(image, masks, None, index)
        few = cosine_logits(few, segmenter.region_text_features)
        assert torch.allclose(few, logits[[2, 0]], atol=1e-3)
        assert segmenter.region_logits(image, masks[:0], None).shape == (0, 3)
        if way == "pool":
            from zsseg.regions import resize_for_clip

            dense = segmenter.clip.visual.values(resize_for_clip(segmenter.clip, image, 128))[0]
            for i, patches in ((1, dense[:4].flatten(0, 1)), (2, dense[0, 1:2])):
                wanted = (
                    100 * F.normalize(patches.mean(0), dim=0) @ segmenter.region_text_features.T
                )
                assert torch.allclose(logits[i], wanted, atol=2e-2), i


# --- the one-stage baseline


def test_the_original_s_per_pixel_checkpoint_fits():
    with torch.device("meta"):
        state = {
            k: torch.empty(shape)
            for k, shape in keys("upstream_keys.json", "coco_perpixel_r101c").items()
        }
        parts, _ = import_original(state, "perpixel")
        load_strict(PerPixel(ModelConfig("R101c"), 512), parts["maskformer"], "perpixel", "")


def test_per_pixel_forward_and_loss_are_the_definition():
    torch.manual_seed(0)
    model = PerPixel(tiny_config().model, 16)
    images, text = torch.randint(0, 256, (2, 3, 40, 64)), F.normalize(torch.randn(3, 16), dim=-1)
    logits = model(model.prepare(images), text)
    assert logits.shape == (2, 3, 16, 16)
    features = model.pixel_decoder(model.backbone(model.prepare(images)))[1, :, 3, 5]
    pixel = model.pixel_embed.weight[:, :, 0, 0] @ features + model.pixel_embed.bias
    assert torch.allclose(logits[1, :, 3, 5], 100 * text @ pixel / pixel.norm(), atol=1e-3)
    labels = torch.randint(0, 3, (2, 64, 64))
    labels[0, :30] = 255
    full = F.interpolate(logits, (64, 64), mode="bilinear").double().log_softmax(1)
    terms = [
        -full[b, labels[b, y, x], y, x]
        for b in range(2)
        for y in range(64)
        for x in range(64)
        if labels[b, y, x] != 255
    ]
    assert float(per_pixel_loss(logits, labels, 255)) == pytest.approx(
        float(sum(terms) / len(terms)), rel=1e-4
    )
    assert float(per_pixel_loss(logits, torch.full_like(labels, 255), 255)) == 0


def test_per_pixel_label_map_is_the_argmax_of_its_logits():
    segmenter = random_segmenter("model.proposals=false", "clip.ensemble=false")
    segmenter.set_classes(["star", "tree", "brick"], [0, 1])
    torch.manual_seed(1)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        logits = segmenter.maskformer(
            segmenter.maskformer.prepare(image[None]), segmenter.text_features
        )
    wanted = F.interpolate(logits.log_softmax(1), (64, 64), mode="bilinear")[0].argmax(0)
    assert (segmenter(image, (64, 64)) == wanted).float().mean() > 0.999 and len(
        wanted.unique()
    ) > 1
    segmenter.config.ensemble = True
    for weight in (0.0, 0.3, 1.0):
        segmenter.config.ensemble_weight = weight
        assert segmenter(image[:, :50, :33], (20, 31)).shape == (20, 31)
    first = segmenter(image, (64, 64))
    assert (first[segmenter.seen[first]] == wanted[segmenter.seen[first]]).float().mean() > 0.5


def test_per_pixel_trains_and_evaluates(shapes_root, tmp_path):
    config = tiny_config("model.proposals=false", "train.steps=2")
    train.train(config, shapes_root, tmp_path, PROCESS, {})
    assert "pixel_embed.weight" in checkpoint.load(tmp_path / "last.pt")["model"]["maskformer"]
    evaluation.main(
        [
            str(tmp_path / "last.pt"),
            "--root",
            str(shapes_root),
            "--out",
            str(tmp_path / "e"),
            "--device",
            "cpu",
        ]
    )
    ours, again = (json.loads((p / "metrics.json").read_text()) for p in (tmp_path, tmp_path / "e"))
    assert ours["hIoU"] == again["hIoU"]


# --- self-training


def test_only_hidden_pixels_are_filled_in_and_only_with_unseen_classes():
    scores = torch.tensor([[9.0, 9, 9], [1, 5, 0], [2, 1, 0]])[..., None]  # [C = 3, 3, 1]
    known, unseen = torch.tensor([[0], [255], [255]]), torch.tensor([False, True, True])
    assert complete(known, scores, unseen, 0.0, 255).tolist() == [[0], [1], [1]]
    # The third: 1.2e-4.
    assert complete(known, scores, unseen, 0.01, 255).tolist() == [[0], [1], [255]]


def test_self_training_is_resumable_and_blind_to_hidden_labels(
    trained, shapes_root, tmp_path, capsys
):
    words = ["train.steps=2", "data.train_on=all", f"train.teacher={trained}"]
    train.train(tiny_config(*words), shapes_root, tmp_path / "run", PROCESS, {})
    assert "unlabelled" in capsys.readouterr().out
    folder, data = tmp_path / "run" / "pseudo", dataset("shapes")
    maps = {f.name: f.read_bytes() for f in folder.glob("*.png")}
    assert len(maps) == 10
    unseen = [i for i in range(25) if i not in data.seen]
    for i, (_, label) in enumerate(find_pairs("shapes", shapes_root, "train")):
        truth, ours = np.asarray(Image.open(label)), np.asarray(Image.open(folder / f"{i:06}.png"))
        seen = np.isin(truth, data.seen)
        assert (ours[seen] == truth[seen]).all() and np.isin(ours[~seen], [*unseen, 255]).all()
    counts = json.loads((folder / "counts.json").read_text())
    assert sum(counts.values()) == 10 * 96 * 96 and set(counts) == {*data.names, "unlabelled"}
    # Killed half-way: what is there stays, the rest comes out the same.
    first, second = sorted(maps)[:2]
    with pytest.raises(UserError, match="another teacher, with other settings"):
        pseudo_labels(tiny_config(*words, "train.reject=0.01"), shapes_root, folder, PROCESS)
    (folder / first).unlink()
    (folder / "counts.json").unlink()
    (folder / second).write_bytes(b"kept")
    # Counted at the end.
    with pytest.raises(UserError, match=f"{second} cannot be read|{second}: cannot be read"):
        pseudo_labels(tiny_config(*words), shapes_root, folder, PROCESS)
    assert (folder / first).read_bytes() == maps[first] and (
        folder / second
    ).read_bytes() == b"kept"
    # Other unseen classes in the truth: the same pseudo labels.
    other = tmp_path / "root"
    shutil.copytree(shapes_root, other)
    for _, label in find_pairs("shapes", other, "train"):
        truth = np.asarray(Image.open(label))
        Image.fromarray(np.where(np.isin(truth, unseen), unseen[0], truth).astype(np.uint8)).save(
            label
        )
    again = pseudo_labels(tiny_config(*words), other, tmp_path / "again", PROCESS)
    assert {f.name: f.read_bytes() for f in again.glob("*.png")} == maps


# --- oracle analysis


def test_overlaps_are_iou_over_known_pixels():
    ours, truth = torch.zeros(2, 4, 4, dtype=torch.bool), torch.zeros(1, 4, 4, dtype=torch.bool)
    ours[0, :2], ours[1, 3], truth[0, 1:3] = True, True, True
    known = torch.ones(4, 4, dtype=torch.bool)
    assert mask_iou(ours, truth, known)[:, 0].tolist() == pytest.approx([4 / 12, 0])
    known[0] = False
    assert float(mask_iou(ours, truth, known)[0, 0]) == pytest.approx(4 / 8)


def test_the_budget_s_oracles(trained, shapes_root, tmp_path, capsys):
    config = load_config(None, base=checkpoint.load(trained)["config"])
    segmenter = random_segmenter()
    result = oracle_analysis(segmenter, config, shapes_root, PROCESS, "test")
    plain = evaluate(segmenter, config, shapes_root, PROCESS, "test")
    assert result["as_is"] == {k: plain[k] for k in result["as_is"]}
    assert all(result["both"][k] == 100 for k in ("mIoU_gt", "pAcc"))
    assert result["both"]["mIoU_seen"] == 100 and 0 <= result["true_classes"]["mIoU"] <= 100
    assert result["recall"]["0.5"] >= result["recall"]["0.7"] >= result["recall"]["0.9"]
    assert result["masks"] == plain["clip_true_masks"]["regions"]
    assert result["clip_accuracy"] == pytest.approx(plain["clip_true_masks"]["accuracy"])
    write_analysis(result, tmp_path)
    assert "GT masks, predicted classes" in capsys.readouterr().out
    assert (
        json.loads((tmp_path / "budget.json").read_text()) == result
        and Image.open(tmp_path / "budget.png").width == 760
    )


def test_with_perfect_masks_only_classes_cost(shapes_root, monkeypatch):
    """A segmenter whose proposals are the ground-truth masks: GT classes give 100."""
    import zsseg.analysis as module

    settings = ("model.queries=25", "data.test_short_edge=96")
    segmenter, config = random_segmenter(*settings), tiny_config(*settings)
    truth, original = {}, module.oracle_labels

    def remember(segmenter, image, labels, *rest):
        truth["labels"] = labels
        return original(segmenter, image, labels, *rest)

    propose = segmenter.propose

    def perfect(image):
        proposals = propose(image)
        small = F.interpolate(
            truth["labels"][None, None].float(), proposals.mask_logits.shape[-2:], mode="nearest"
        )[0]
        proposals.mask_logits = 40 * (small == torch.arange(25)[:, None, None]).float() - 20
        return proposals

    monkeypatch.setattr(module, "oracle_labels", remember)
    monkeypatch.setattr(segmenter, "propose", perfect)
    result = oracle_analysis(segmenter, config, shapes_root, PROCESS, "test")
    assert (
        result["true_classes"]["mIoU_gt"] > 75 > result["as_is"]["mIoU_gt"]
        and result["average_best_overlap"] > 75
    )


# --- the paper's numbers


def test_every_published_row_has_its_configuration():
    for row in published.ROWS:
        config = load_config(str(ROOT / "configs" / f"{row['config']}.toml"), row.get("set", []))
        assert published.differences(config, row) == []
        result = {k: 1.0 for k in ("pAcc", "mIoU_seen", "mIoU_unseen", "hIoU", "mIoU")}
        text = published.compare(result, config)
        assert f"the paper's row: {row['name']} (" in text and "all settings are the same" in text
        assert f"{row.get('hIoU', row.get('mIoU')):9.1f}" in text


def test_differing_settings_are_named():
    config = load_config(
        ROOT / "configs" / "voc_r101c.toml",
        [
            "model.backbone=R50",
            "model.weights=imagenet",
            "clip.ensemble_weight=0.5",
            "data.workers=0",
        ],
    )
    text = published.compare({"hIoU": 12.0}, config)
    assert (
        "model.backbone: R50 (R101c)" in text
        and "clip.ensemble_weight: 0.5 (0.7)" in text
        and "workers" not in text
    )
    config = load_config(
        str(ROOT / "configs" / "voc_r101c.toml"), ["clip.weights=RN50", "data.train_on=all"]
    )
    text = published.compare({"hIoU": 12.0}, config)
    assert "clip.weights: RN50 (ViT-B/16)" in text and (
        "train.teacher: False" in text or "data.train_on: all" in text
    )
    assert "no result on shapes" in published.compare({}, tiny_config())


@pytest.mark.parametrize(
    "setting", ["clip.ensemble=true", "clip.ensemble=false", "model.proposals=false"]
)
def test_a_process_without_images_sums_the_same_matrices(setting, shapes_root, monkeypatch):
    """More processes than images: the ones without any must not wait for sums that the others do
    not make.
    """
    config, sums = (
        tiny_config(
            setting, "eval.compare=true", *(["eval.weights=[0.5]"] if "=true" in setting else [])
        ),
        [],
    )
    monkeypatch.setattr(
        Process, "sum", lambda self, tensor: sums[-1].append(tuple(tensor.shape)) or tensor
    )
    for process in (Process(PROCESS.device, 0, 5), Process(PROCESS.device, 4, 5)):
        sums.append([])
        evaluate(random_segmenter(setting), config, shapes_root, process, "test")
    assert sums[0] == sums[1] and len(sums[0]) == {
        "clip.ensemble=true": 9,
        "clip.ensemble=false": 6,
    }.get(setting, 5)
