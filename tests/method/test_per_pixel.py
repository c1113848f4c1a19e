"""The one-stage baseline: the original's reference values, its definition, its way through the
program.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PROCESS, golden, keys, original_state, tiny_config, tiny_segmenter
from recipe import relative_error

from zsseg import load
from zsseg.config import Config
from zsseg.datasets import dataset
from zsseg.losses import per_pixel_loss
from zsseg.per_pixel import OneStage
from zsseg.weights import load_segmenter

SIZE = (200, 280)  # of the reference label maps


@pytest.fixture(scope="module")
def reference(vocabulary) -> tuple[dict[str, np.ndarray], OneStage, torch.Tensor]:
    """The reference values of an image through the original, its model, and the image."""
    arrays = golden("per_pixel_coco_r101c.npz")
    config = Config()
    config.data.name = "coco_stuff"
    config.clip.ensemble_weight = 0.7
    config.model.proposals = False
    content = {"model": original_state(keys("per_pixel_keys.json"), arrays)}
    model = load_segmenter(content, config, Path(), "reference").eval()
    data = dataset(config.data)
    model.set_classes(data.names, data.trained)
    return arrays, model, torch.from_numpy(arrays["image"])


@torch.inference_mode()
def test_features_labels_and_scores_are_the_original_s(reference, monkeypatch):
    arrays, model, image = reference
    network = model.maskformer
    features = network.decode(network.prepare(image[None]))[0]
    assert relative_error(features, arrays["features"]) < 1e-4
    monkeypatch.setattr(model.config, "ensemble", False)
    scores = model.score_map(image, SIZE)
    assert relative_error(scores[:, ::20, ::20], arrays["scores_at"]) < 1e-4
    found = model.segment([image], SIZE)
    assert (found.labels.numpy() == arrays["labels"]).mean() > 0.999
    assert (
        torch.equal(found.scores, scores.amax(0))
        and (found.scores >= 0).all()
        and not found.variants
    )


@torch.inference_mode()
def test_the_ensemble_is_the_original_s(reference):
    """One feature of the whole image at every pixel; seen classes p^w c^(1-w), unseen p^(1-w)
    c^w.
    """
    arrays, model, image = reference
    whole = model.clip.encode_image(model.clip.normalize(image)[None])
    logits = model.clip.logits(whole, model.text_features)[0]
    for cell in arrays["clip_logits_w07"].reshape(-1, 171):
        assert relative_error(logits, cell) < 1e-4
    labels = model.segment([image], SIZE).labels
    assert (labels.numpy() == arrays["labels_w07"]).mean() > 0.99


def test_training_compares_interpolated_features():
    """Cross-entropy at full size, of every pixel that is not ignored."""
    model = tiny_segmenter("model.proposals=false")
    network = model.maskformer.train()
    images = network.prepare(torch.randint(0, 256, (2, 3, 37, 50), dtype=torch.uint8))
    assert images.shape[-2:] == (37, 50)
    logits = network(images, model.text_features)
    embeds = F.interpolate(network.decode(images), scale_factor=4, mode="bilinear")[..., :37, :50]
    one = F.normalize(embeds[1, :, 30, 41], dim=0) @ model.text_features.T
    assert logits.shape == (2, 3, 37, 50)
    assert torch.allclose(logits[1, :, 30, 41], 100 * one, atol=1e-3)
    labels = torch.full((2, 37, 50), 255, dtype=torch.uint8)
    assert per_pixel_loss(logits, labels, 1).item() == 0
    labels[1, 30, 41] = 2
    loss = per_pixel_loss(logits, labels, 2)
    wanted = -logits[1, :, 30, 41].log_softmax(0)[2].item() / 2
    assert loss.item() == pytest.approx(wanted, rel=1e-4)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("size", [(16, 200), (64, 64)])
def test_images_of_any_size(size):
    """And several views of one; CLIP alone names all of it."""
    model = tiny_segmenter("model.proposals=false", "clip.ensemble_weight=0.5")
    images = [torch.randint(0, 256, (3, *s), dtype=torch.uint8) for s in (size, (48, 48))]
    maps = [model.score_map(image, (30, 20)) for image in images]
    maps += [model.score_map(image.flip(-1), (30, 20)).flip(-1) for image in images]
    found = model.segment(images, (30, 20), flip=True)
    assert found.labels.shape == (30, 20) and (found.scores >= 0).all()
    assert torch.allclose(found.scores, torch.stack(maps).mean(0).amax(0), atol=1e-5)
    model.config.ensemble_weight = 0
    scores = model.score_map(images[0], (30, 20))
    assert torch.allclose(scores, scores[:, :1, :1])
    assert torch.allclose(scores.sum(0), torch.ones(30, 20))


def test_it_trains_and_evaluates(shapes_root, tmp_path):
    import train

    config = tiny_config("model.proposals=false", "train.steps=2", "train.eval_every=1")
    train.train(config, shapes_root, tmp_path, PROCESS, {})
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    assert "pixel_embed.weight" in content["model"]["maskformer"]
    assert (tmp_path / "metrics.json").exists()
    segmenter = load(tmp_path / "last.pt", root=shapes_root, device="cpu")
    assert segmenter(shapes_root / "shapes/images/test/test00000.jpg").shape == (64, 64)
