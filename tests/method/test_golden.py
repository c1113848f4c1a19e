"""Agreement with the original implementation: every file of golden/, at 1e-4 of the largest value
unless said otherwise.

The reference values are a CPU's, in fp32; other CPUs agree whatever their instruction set, a GPU
without TF32 to 1e-3.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, GPU, PROCESS, golden, keys, original_state, succeed
from PIL import Image
from recipe import check_proposals, make_labels, make_tensor, random_image, relative_error

from train import build_optimizer, train_step
from zsseg.clip import build_clip
from zsseg.config import Config, TrainConfig, load_config
from zsseg.datasets import dataset
from zsseg.distributed import Process
from zsseg.losses import loss_normalizers, segmentation_losses
from zsseg.matcher import Targets, assign, matching_cost
from zsseg.metrics import confusion, summarize
from zsseg.prompt_learning import PromptClassifier, PromptTask
from zsseg.regions import box_of, region_crops
from zsseg.segmenter import Segmenter
from zsseg.weights import load_segmenter, load_tokenizer, our_name

pytestmark = pytest.mark.usefixtures("vocabulary")
on_cpu_and_gpu = pytest.mark.parametrize(
    "process", [PROCESS, pytest.param(GPU, marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)


def tolerance(process: Process, on_cpu: float = 1e-4) -> float:
    """Of the largest value of an array."""
    return on_cpu if process.device.type == "cpu" else 10 * on_cpu


@pytest.fixture(autouse=True)
def fp32_is_fp32(monkeypatch):
    """As `distributed.init_distributed` sets it on a GPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def build(state: dict, backbone: str, **clip: object) -> Segmenter:
    config = Config()
    config.model.backbone, config.model.dropout = backbone, 0.0
    for key, value in clip.items():
        setattr(config.clip, key, value)
    return load_segmenter({"model": state}, config, Path(), "reference").eval()


def test_tokens():
    arrays = golden("tokens.npz")
    tokens = load_tokenizer(49408, 77)([str(t) for t in arrays["texts"]])
    assert np.array_equal(tokens.numpy(), arrays["tokens"])


@on_cpu_and_gpu
@pytest.mark.parametrize("name", ["vitb32", "vitb16", "rn50"])
def test_clip(name, process):
    arrays, device, most = golden(f"clip_{name}.npz"), process.device, tolerance(process)
    tokenizer = load_tokenizer(49408, 77)
    clip = build_clip(original_state(keys(f"clip_{name}_keys.json")), tokenizer).to(device)
    image = clip.normalize(random_image((224, 224), arrays["image_seed"])[None].to(device))
    tokens = tokenizer(["a photo of a cat.", "a sculpture of a potted plant."]).to(device)
    with torch.no_grad():
        entered = []
        if name != "rn50":
            last = clip.visual.transformer.resblocks[-1]
            hook = last.register_forward_pre_hook(lambda m, words: entered.append(words[0]))
        assert relative_error(clip.encode_image(image), arrays["image_features"]) < most
        assert relative_error(clip.encode_text(tokens), arrays["text_features"]) < most
        if name == "rn50":
            dense = clip.encode_dense(image)
        else:  # all of the last block, of which our encode_dense takes the values only
            hook.remove()
            dense = clip.visual.ln_post(last(*entered)[:, 1:]) @ clip.visual.proj
            dense = dense.unflatten(1, [224 // clip.patch] * 2)
        assert relative_error(dense[:, ::4, ::4], arrays["dense_features"]) < most


@on_cpu_and_gpu
def test_learned_prompt(process):
    arrays = golden("prompt_learnable.npz")
    state = original_state(keys("upstream_keys.json", "voc_r50_learnable"))
    segmenter = build(state, "R50", prompt="learned").to(process.device)
    segmenter.set_classes([str(n) for n in arrays["names"]])
    features = torch.cat([segmenter.text_features, F.normalize(segmenter.maskformer.non_object)])
    assert relative_error(features, arrays["features"]) < tolerance(process)


@pytest.fixture(scope="module")
def inference() -> tuple[dict[str, np.ndarray], Segmenter]:
    """The reference values of an image through the whole model, and that model."""
    arrays = golden("eval_voc_r50.npz")
    state = original_state(keys("keys_voc_r50_tinyclip.json"), arrays)
    return arrays, build(state, "R50", ensemble_weight=0.7)


def prepared(inference: tuple, process: Process) -> tuple[dict, Segmenter, torch.Tensor]:
    """The same on a device, with its classes, and the image."""
    arrays, segmenter = inference
    names = [str(n) for n in arrays["class_names"]]
    segmenter.to(process.device).set_classes(names, list(range(15)))
    image = random_image(arrays["image_size"], arrays["image_seed"])
    return arrays, segmenter, image.to(process.device)


def stored_masks(arrays: dict[str, np.ndarray], process: Process) -> torch.Tensor:
    """The original's binary masks bool [Q, H, W]."""
    masks = np.unpackbits(arrays["region_masks"], axis=-1)[..., : arrays["image_size"][1]]
    return torch.from_numpy(masks).bool().to(process.device)


@on_cpu_and_gpu
def test_proposals(inference, process):
    """Class embeddings, masks and text features; the binary masks differ in at most 1 pixel of
    100,000.
    """
    (arrays, segmenter, image), most = prepared(inference, process), tolerance(process)
    check_proposals(segmenter, image, arrays, most)
    region_text = arrays["region_text_features"][:-1]
    assert relative_error(segmenter.region_text_features, region_text) < most
    proposals = segmenter.propose(image)
    assert np.array_equal(proposals.valid.cpu().numpy(), arrays["valid"])
    differ = segmenter.binary_masks(proposals) != stored_masks(arrays, process)
    assert int(differ.sum()) <= tolerance(process, 1e-5) * differ.numel()


@on_cpu_and_gpu
def test_regions(inference, process):
    """From the original's masks: crops and CLIP's logits, and from its logits score maps and the
    label map.
    """
    (arrays, segmenter, image), most = prepared(inference, process), tolerance(process)
    valid = torch.from_numpy(arrays["valid"]).to(process.device)
    masks = stored_masks(arrays, process)[valid]
    boxes = box_of(masks)
    crops = region_crops(segmenter.clip, image, masks, boxes)
    assert relative_error(crops.mean((2, 3)), arrays["region_mean"]) < most
    assert relative_error(crops.std((2, 3)), arrays["region_std"]) < most
    assert relative_error(crops[:2, :, ::4, ::4], arrays["region_first_stride4"]) < most
    reference = arrays["clip_logits"][:, :-1]
    assert relative_error(segmenter.region_logits(image, masks, boxes), reference) < most

    proposals = segmenter.propose(image)
    proposals.valid, proposals.clip_probs = valid, torch.ones_like(proposals.clip_probs)
    proposals.clip_probs[valid] = torch.from_numpy(reference).to(process.device).softmax(-1)
    size, classes = tuple(arrays["output_size"].tolist()), segmenter.ensemble(proposals)
    scores = segmenter.label_map(classes, proposals, size, all_scores=True)[2]
    assert relative_error(scores[:, ::4, ::4], arrays["sem_seg_stride4"]) < most
    labels, top, _ = segmenter.label_map(classes, proposals, size)
    assert relative_error(top, scores.amax(0).cpu().numpy()) < most
    share = (labels.cpu().numpy() == arrays["label_map"]).mean()
    assert share >= (0.999 if process.device.type == "cpu" else 0.995)


@on_cpu_and_gpu
@pytest.mark.parametrize(("data_set", "backbone"), [("voc", "R50"), ("coco", "R101c")])
def test_training_step(data_set, backbone, process):
    name = f"{data_set}_{backbone.lower()}"
    arrays, device, most = golden(f"train_{name}.npz"), process.device, tolerance(process)
    state = original_state(keys(f"keys_{name}_tinyclip.json"), arrays)
    segmenter = build(state, backbone).to(device)
    segmenter.set_classes([str(n) for n in arrays["class_names"]])
    seed, size = int(arrays["image_seed"]), arrays["image_size"]
    present = arrays["classes"].tolist()
    images = torch.stack([random_image(size, seed + i) for i in range(2)]).to(device)
    maps = [make_labels(*size, present[: 4 - i], seed + i) for i in range(2)]
    labels = torch.from_numpy(np.stack(maps))
    classes = torch.tensor([present, [*present[:3], 0]])
    targets = Targets(labels, classes, torch.tensor([4, 3])).to(device)
    model = segmenter.maskformer.train()
    logits, masks = model(model.prepare(images), segmenter.text_features)

    cost = matching_cost(logits.detach(), masks.detach(), targets, 20, 1)
    matched, _ = assign(cost, targets.counts)
    for call in range(6):  # 0 is the last layer, 1..5 are layers 0..4
        layer = call - 1 if call else 5
        for i in range(2):
            query, target = arrays[f"match/{call}/{i}/query"], arrays[f"match/{call}/{i}/target"]
            assert matched[layer, i, target].tolist() == query.tolist()

    normalizers = loss_normalizers(targets.counts, 100, 0.1, process.sum, 1)
    losses = segmentation_losses(logits, masks, targets, normalizers, TrainConfig())
    names, values = arrays["loss_names"].tolist(), arrays["loss_values"].tolist()
    reference = dict(zip(names, values, strict=True))
    for ours, theirs in (("class", "loss_ce"), ("focal", "loss_mask"), ("dice", "loss_dice")):
        for layer in range(6):
            value = reference[theirs if layer == 5 else f"{theirs}_{layer}"]
            assert float(losses[ours][layer].detach()) == pytest.approx(value, rel=most)
    total = sum(v.sum() for v in losses.values())
    assert float(total.detach()) == pytest.approx(float(arrays["total"]), rel=most)

    total.backward()
    parameters = dict(model.named_parameters())
    names, norms = arrays["grad_names"].tolist(), arrays["grad_norms"].tolist()
    for name, norm in zip(names, norms, strict=True):
        ours = parameters[our_name(name, backbone == "R101c").removeprefix("maskformer.")]
        assert float(ours.grad.norm()) == pytest.approx(norm, rel=tolerance(process, 1e-3))
    if backbone == "R50":
        trainable = {our_name(k).removeprefix("maskformer.") for k in keys("trainable_keys.json")}
        assert trainable == {k for k, p in parameters.items() if p.grad is not None}


@on_cpu_and_gpu
@pytest.mark.parametrize("seeds", [[0], [0, 1]], ids=["alone", "beside another"])
def test_prompt_learning(seeds, inference, process):
    """Three steps of the original; each prompt is clipped by itself, and nothing else learns."""
    arrays, device, most = golden("prompt_step.npz"), process.device, tolerance(process)
    config = load_config("voc_prompts", [f"train.seeds={seeds}", "model.bf16=off"])
    clip = inference[1].clip.to(device)
    task = PromptTask.__new__(PromptTask)  # without data
    task.config, task.process, task.model = config, process, PromptClassifier(clip, config)
    task.prompts, task.crops = task.model.prompts, lambda batch: batch
    task.clipped = task.prompts.values()
    prefix = task.prompts["0"].prefix
    prefix.data.copy_(0.4 * torch.from_numpy(make_tensor("prefix_prompt", (16, 128))))
    assert relative_error(prefix, arrays["before"]) == 0
    images = torch.stack([random_image((224, 224), 70 + i) for i in range(8)])
    maps = [make_labels(224, 224, [i, 3, 5], 70 + i) == i for i in range(8)]
    masks = torch.from_numpy(np.stack(maps))[:, None].to(device)
    crops = torch.where(masks, clip.normalize(images.to(device)), clip.mean.view(3, 1, 1))
    batch = crops, torch.arange(8, device=device)

    optimizer = build_optimizer(task.model.train(), config)
    assert not clip.training
    names = ("losses", "gradient_norms", "prompts")
    for step, (loss, norm, prompt) in enumerate(zip(*map(arrays.get, names), strict=True)):
        values, ours, bad = train_step(task, task.model, optimizer, [batch], config.train.clip_grad)
        assert not bad
        if len(seeds) == 1:
            assert float(values["loss"]) == pytest.approx(loss, rel=most)
            assert float(ours) == pytest.approx(norm, rel=most)
        if step == 0:  # it is clipped in place
            learned = [name for name, p in task.model.named_parameters() if p.grad is not None]
            assert learned == [f"prompts.{seed}.prefix" for seed in seeds]
            assert relative_error(prefix.grad * norm / 0.01, arrays["gradient"]) < most
        assert relative_error(prefix, prompt) < most
        # The steps are small, as small as fp32 allows to compare them.
        moved = prefix.detach().cpu() - torch.from_numpy(arrays["before"])
        assert relative_error(moved, prompt - arrays["before"]) < 10 * most


@pytest.mark.parametrize("settings", [["model.bf16=off"], pytest.param([], marks=pytest.mark.slow)])
def test_end_to_end(tmp_path, settings):
    arrays = {f"override/{k}": v for k, v in golden("e2e/voc_r50_single_override.npz").items()}
    state = original_state(keys("e2e/voc_r50_single_keys.json"), arrays)
    torch.save({"model": state}, tmp_path / "model_final.pth")
    shutil.copytree(GOLDEN / "e2e" / "VOC2012", tmp_path / "VOC2012")
    result = succeed("prepare_data.py", "voc", "--root", tmp_path)
    assert "voc val: 3 images" in result.stdout
    words = ["--config", "configs/voc_r50_single.toml", "--root", tmp_path, "--out"]
    words += [tmp_path / "out", "--save-predictions", "--device", "cpu"]
    for setting in ("data.test_short_edge=160", *settings):
        words += ["--set", setting]
    result = succeed("eval.py", tmp_path / "model_final.pth", *words)
    assert "fp32\n" in result.stdout  # by itself: its numbers are compared with the original's
    assert "tensors loaded, " in result.stdout and " dropped: " in result.stdout
    data = dataset("voc")
    matrix = torch.zeros(20, 20, dtype=torch.int64)
    for stem, reference in golden("e2e/voc_r50_single_predictions.npz").items():
        ours = np.array(Image.open(tmp_path / "out" / "predictions" / f"{stem}.png"))
        assert (ours == reference).mean() >= 0.985
        file = tmp_path / "VOC2012" / "SegmentationClassAug" / f"{stem}.png"
        labels = torch.from_numpy(data.lut()[np.array(Image.open(file))]).long()
        matrix += confusion(labels, torch.from_numpy(reference).long(), 20, data.ignore)
    ours = json.loads((tmp_path / "out" / "metrics.json").read_text())
    theirs = json.loads((GOLDEN / "e2e" / "voc_r50_single_metrics.json").read_text())
    same = summarize(matrix, data)  # the original's predictions, measured by us
    names = {"mIoU": "mIoU", "fwIoU": "fwIoU", "mAcc": "mACC", "pAcc": "pACC", "hIoU": "hIoU-base"}
    names |= {"mIoU_seen": "mIoU-base", "mIoU_unseen": "mIoU-unbase"}
    names |= {"pAcc_seen": "pAcc-base", "pAcc_unseen": "pAcc-unbase"}
    for our, their in names.items():
        assert ours[our] == pytest.approx(theirs[their], abs=1.0)
        assert same[our] == pytest.approx(theirs[their], abs=1e-9)
    for name, values in same["per_class"].items():
        for our, their in (("IoU", "IoU"), ("Acc", "ACC")):
            reference = theirs[f"{their}-{name}"]
            wanted = None if reference is None else pytest.approx(reference, abs=1e-9)
            assert values[our] == wanted
