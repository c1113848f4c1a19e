"""The one-stage baseline (Xu et al. 2021, section 4.1): every pixel's embedding against the text
features, without mask proposals.
"""

import torch
import torch.nn.functional as F
from torch import nn

from zsseg.maskformer import PixelNetwork
from zsseg.segmenter import OpenVocabulary


class PerPixel(PixelNetwork):
    """Backbone and pixel decoder, then one embedding of CLIP's width D a pixel; arguments as of
    `MaskFormer`.
    """

    divisor = 1  # no padding

    def __init__(self, model, embed_dim, scale=100.0):
        super().__init__(model)
        self.scale = scale
        self.pixel_embed = nn.Conv2d(model.hidden_dim, embed_dim, 1)

    def decode(self, images):
        """`prepare`d images [B, 3, H, W] -> embeddings [B, D, h, w] at stride 4."""
        return self.pixel_embed(self.pixel_decoder(self.backbone(images)))

    def forward(self, images, text, size=None):
        """`prepare`d images [B, 3, H, W], text features [C, D] -> class logits fp32 [B, C, H, W] or
        [B, C, *size]; what torch.compile and DDP wrap.

        The cosine of the enlarged embeddings, as in the original; but what is enlarged are their
        dot products with the text and, a few channels at a time, the embeddings for their norms.
        """
        H, W = images.shape[-2:]

        def enlarge(maps):
            maps = F.interpolate(maps, scale_factor=4, mode="bilinear")[..., :H, :W]
            return F.interpolate(maps, size, mode="bilinear") if size else maps

        embeds = self.decode(images).float()
        dots = enlarge(torch.einsum("bdhw,cd->bchw", embeds, text.float()))
        parts = embeds.split(32, 1)
        squares = sum(enlarge(part).square().sum(1, keepdim=True) for part in parts)
        return self.scale * dots / squares.sqrt().clamp(min=1e-12)


class OneStage(OpenVocabulary):
    """The one-stage baseline: a `PerPixel` network, and a frozen CLIP that names the whole
    image.
    """

    @torch.inference_mode()
    def score_map(self, image, size):
        """RGB in 0..255 [3, H, W] -> class scores [C, *size].

        p of the pixel, c of CLIP for the whole image, w the ensemble's weight: seen classes p^w
        c^(1-w), unseen ones p^(1-w) c^w; w = 0 is CLIP only.
        """
        network = self.maskformer
        with torch.autocast("cpu", enabled=False):
            logits = network.forward(network.prepare(image[None]), self.text_features, size)
        p = logits[0].softmax(0)
        if not self.config.ensemble:
            return p
        whole = self.clip.encode_image(self.clip.normalize(image)[None])
        c = self.clip.logits(whole, self.text_features).softmax(-1)[0, :, None, None]
        w = self.config.ensemble_weight
        power = torch.where(self.seen & self.config.ensemble_seen, w, 1 - w if w else 0)
        power = power[:, None, None]
        return p**power * c ** (1 - power)

    @torch.inference_mode()
    def segment(self, inputs, size, flip=False, window=0, weights=None, proposals=None):
        """The label map of one image, with test-time augmentation, see `Segmenter.segment`; it has
        no variants.
        """
        return self.segment_views(inputs, size, flip, window)
