"""Losses, each with its formula. Labels are [B, H, W] int64 with IGNORE for pixels that count nowhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from udas.taxonomy import IGNORE


def cross_entropy(
    logits: Tensor,
    label: Tensor,
    class_weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
    hard_share: float = 1.0,
) -> Tensor:
    """Mean of -w_y log softmax(logits)_y over the pixels that have a label; 0 where none has one.

    Args:
        logits: [B, C, H, W].
        label: [B, H, W].
        class_weight: [C] w; the mean stays over pixels.
        pixel_weight: [B, H, W] factor per pixel, such as a confidence.
        hard_share: share of the labelled pixels with the largest loss that counts (online hard example mining).
            Ignored pixels never take part in the ranking.
    """
    loss = F.cross_entropy(logits, label, weight=class_weight, ignore_index=IGNORE, reduction="none")
    valid = label != IGNORE
    if hard_share < 1:
        valid = valid & (loss.detach() >= _hardest(loss.detach(), valid, hard_share))
    if pixel_weight is not None:
        loss = loss * pixel_weight
    return (loss * valid).sum() / valid.sum().clamp(min=1)


def outputs_cross_entropy(
    outputs: Sequence[Tensor],
    label: Tensor,
    class_weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
    hard_share: float = 1.0,
    auxiliary: float = 0.1,
) -> Tensor:
    """`cross_entropy` of the main output plus `auxiliary` times that of every further one."""
    main, *others = (cross_entropy(output, label, class_weight, pixel_weight, hard_share) for output in outputs)
    return main + auxiliary * torch.stack(others).sum() if others else main


def _hardest(loss: Tensor, valid: Tensor, share: float) -> Tensor:
    """The loss value above which `share` of the valid pixels lie, without a host sync."""
    ranked = torch.where(valid, loss, torch.inf).flatten().sort().values
    count = valid.sum()
    index = ((1 - share) * count).long().clamp(max=ranked.numel() - 1)
    return ranked.gather(0, index.view(1))


def squared_distance(output: Tensor, target: float) -> Tensor:
    """Least-squares GAN: E[(D(x) - a)^2] (Mao et al., ICCV 2017, Eq. 2)."""
    return (output - target).square().mean()


def binary_cross_entropy(output: Tensor, target: float) -> Tensor:
    """Vanilla GAN on logits: -E[a log s(D(x)) + (1 - a) log(1 - s(D(x)))]."""
    return F.binary_cross_entropy_with_logits(output, torch.full_like(output, target))
