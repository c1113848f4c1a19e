"""Matching of queries and targets (MaskFormer, Cheng et al. 2021, section 3.2): cost, and
assignment of minimum cost.

Plain PyTorch and SciPy; CUDA tensors go to kernels that compute the same.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from kernels import assignment
from kernels import matching_cost as kernel
from kernels.jit import use_triton

LIMIT = 1e6  # costs that are not finite count as this much


class Targets(NamedTuple):
    """The classes in each image, padded to the largest count T; a target's mask is `labels ==
    class`.
    """

    labels: Tensor  # [B, H, W], class ids and the ignore value
    classes: Tensor  # [B, T] int64, padded with 0
    counts: Tensor  # [B] int64

    def to(self, device):
        """A copy on `device`; the host does not wait for it."""
        return Targets(*(t.to(device, non_blocking=True) for t in self))

    def padded(self):
        """T raised to 15, 31, 63 or more: a compiled program serves one T, and the matching kernel
        a power of two less one.
        """
        T = self.classes.shape[1]
        wide = max(2 ** T.bit_length() - 1, 15)
        return self._replace(classes=F.pad(self.classes, (0, wide - T)))


def matching_cost(class_logits, mask_logits, targets, focal_weight, dice_weight):
    """Cost of every query for every target, all layers and images at once:

        -p[class] + focal_weight * focal(mask, target) + dice_weight * dice(mask, target)

    class_logits [L, B, Q, C+1], mask_logits [L, B, Q, h, w] -> [L, B, Q, T], fp32, or fp64 for
    fp64 masks; columns beyond an image's count mean nothing. Label maps are brought to h x w by
    nearest sampling. No gradient is needed.
    """
    h, w = mask_logits.shape[-2:]
    labels = F.interpolate(targets.labels[:, None].float(), (h, w), mode="nearest")[:, 0].int()
    classes = targets.classes
    if use_triton(mask_logits):
        return kernel.matching_cost(
            class_logits, mask_logits, labels, classes, focal_weight, dice_weight
        )
    dtype = torch.promote_types(mask_logits.dtype, torch.float32)
    target = (labels[:, None] == classes[:, :, None, None]).flatten(2).to(dtype)  # [B, T, hw]
    x = mask_logits.to(dtype).flatten(3)  # [L, B, Q, hw]
    p = x.sigmoid()

    # Focal loss (alpha 0.25, gamma 2) where the target is 1, and where it is 0.
    positive = 0.25 * (1 - p) ** 2 * F.softplus(-x)
    negative = 0.75 * p**2 * F.softplus(x)
    over_pixels = "lbqn,btn->lbqt"
    focal = torch.einsum(over_pixels, positive, target)
    focal = focal + torch.einsum(over_pixels, negative, 1 - target)

    overlap = torch.einsum(over_pixels, p, target)
    dice = 1 - (2 * overlap + 1) / (p.sum(-1)[..., None] + target.sum(-1)[:, None] + 1)

    class_prob = class_logits.to(dtype).softmax(-1).take_along_dim(classes[None, :, None], -1)
    return -class_prob + focal_weight * focal / (h * w) + dice_weight * dice


def assign(cost, counts):
    """Minimum-cost assignment per layer and image: cost [L, B, Q, T], counts [B] -> the query of
    each target, int64 [L, B, T].

    -1 for padding, and for targets without a query, if there are fewer queries than targets. Costs
    that are not finite count as a million; bool [L, B] says where there were any.
    """
    if use_triton(cost) and assignment.is_supported(cost):
        return assignment.assignment(cost, counts)
    return hungarian(cost, counts)


@torch.library.custom_op("zsseg::hungarian", mutates_args=())  # torch.compile takes it as one
def hungarian(cost: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """`assign` by SciPy, on the host."""
    L, B, _, T = cost.shape
    matched = torch.full((L, B, T), -1)
    bad = torch.zeros(L, B, dtype=torch.bool)
    costs = cost.cpu()  # one transfer
    for layer in range(L):
        for image, count in enumerate(counts.tolist()):
            problem = costs[layer, image, :, :count]
            bad[layer, image] = not problem.isfinite().all()
            query, target = linear_sum_assignment(problem.nan_to_num(LIMIT).clamp(-LIMIT, LIMIT))
            matched[layer, image, target] = torch.from_numpy(query)
    return matched.to(cost.device), bad.to(cost.device)


@hungarian.register_fake
def _(cost, counts):
    L, B, _, T = cost.shape
    return cost.new_empty(L, B, T, dtype=torch.int64), cost.new_empty(L, B, dtype=torch.bool)
