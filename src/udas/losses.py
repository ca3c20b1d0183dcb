"""Losses, each with its formula. Labels are [B, H, W] int64 with IGNORE for pixels that count nowhere."""

from __future__ import annotations

import math
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
    counted = _counted(loss.detach(), label, hard_share)
    if pixel_weight is not None:
        loss = loss * pixel_weight
    return masked_mean(loss, counted)


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


def _counted(loss: Tensor, label: Tensor, share: float) -> Tensor:
    """[B, H, W] bool: the `share` of the labelled pixels with the largest loss."""
    valid = label != IGNORE
    return valid if share >= 1 else valid & (loss >= _hardest(loss, valid, share))


def _hardest(loss: Tensor, valid: Tensor, share: float) -> Tensor:
    """The loss value above which `share` of the valid pixels lie, without a host sync."""
    ranked = torch.where(valid, loss, torch.inf).flatten().sort().values
    count = valid.sum()
    index = ((1 - share) * count).long().clamp(max=ranked.numel() - 1)
    return ranked.gather(0, index.view(1))


def masked_mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of `values` over the pixels where `counted` is True, both [B, H, W]; 0 where none is."""
    return (values * counted).sum() / counted.sum().clamp(min=1)


def sure_share(sure: Tensor, counted: Tensor, over: tuple[int, ...] = (1, 2)) -> Tensor:
    """Share of the pixels where `counted`, [B, H, W], that are `sure`: one number per picture, [B, 1, 1].

    With `over` = (0, 1, 2) one for the batch, [1, 1, 1]; 0 where none is counted.
    """
    return (sure & counted).sum(over, keepdim=True) / counted.sum(over, keepdim=True).clamp(min=1)


def squared_distance(output: Tensor, target: float) -> Tensor:
    """Least-squares GAN: E[(D(x) - a)^2] (Mao et al., ICCV 2017, Eq. 2)."""
    return (output - target).square().mean()


def binary_cross_entropy(output: Tensor, target: float) -> Tensor:
    """Vanilla GAN on logits: -E[a log s(D(x)) + (1 - a) log(1 - s(D(x)))]."""
    return F.binary_cross_entropy_with_logits(output, torch.full_like(output, target))


def self_information(probabilities: Tensor) -> Tensor:
    """Weighted self-information I = -P log2(P) / log2(C) per class (ADVENT, Vu et al., CVPR 2019, section 3.2).

    [B, C, H, W] probabilities -> [B, C, H, W] in [0, 1]; 0 for P of 0 or 1, and the sum over classes is `entropy`.
    """
    tiny = 1e-30  # log2 and its gradient stay finite at P = 0
    return -probabilities * (probabilities + tiny).log2() / math.log2(probabilities.shape[1])


def entropy(logits: Tensor) -> Tensor:
    """Normalised entropy E = -1/log(C) sum_c P log P of P = softmax(logits) (Vu et al., CVPR 2019, section 3.1).

    [B, C, H, W] -> [B, H, W] in [0, 1]: 0 where one class is sure, 1 where all are equal.
    """
    log_probabilities = logits.log_softmax(1)
    return -(log_probabilities.exp() * log_probabilities).sum(1) / math.log(logits.shape[1])


def robust_entropy(logits: Tensor, eta: float = 2.0) -> Tensor:
    """rho(e) = (e^2 + 1e-8)^eta, e = `entropy`(logits), [B, H, W] (FDA, Yang and Soatto, CVPR 2020, Eq. 4).

    With eta > 1/2 the gradient of rho vanishes where the network is sure: uncertain pixels count most.
    """
    robust: Tensor = (entropy(logits).square() + 1e-8).pow(eta)
    return robust


def balanced_cross_entropy(logits: Tensor, label: Tensor, class_weight: Tensor, hard_share: float = 1.0) -> Tensor:
    """sum_i w_{y_i} l_i / sum_i w_{y_i}, l_i = -log softmax(logits)_{y_i}; 0 where no pixel has a label.

    The mean of PyTorch's weighted cross-entropy: other than in `cross_entropy`, larger weights of all classes change
    nothing. Arguments as there; w > 0. `hard_share` ranks the weighted losses.
    """
    loss = F.cross_entropy(logits, label, weight=class_weight, ignore_index=IGNORE, reduction="none")
    counted = _counted(loss.detach(), label, hard_share)
    weight = class_weight[torch.where(counted, label, 0)] * counted
    return (loss * counted).sum() / torch.where(counted.any(), weight.sum(), 1.0)


def kl_divergence(target: Tensor, logits: Tensor) -> Tensor:
    """KL(q || p) = sum_c q_c (log q_c - log p_c) of q = softmax(target), p = softmax(logits).

    [B, C, H, W] logits -> [B, H, W] >= 0. Gradients flow into both.
    """
    log_q, log_p = target.log_softmax(1), logits.log_softmax(1)
    return (log_q.exp() * (log_q - log_p)).sum(1)


def rectified_cross_entropy(logits: Tensor, other: Tensor, label: Tensor, class_weight: Tensor | None = None) -> Tensor:
    """Mean over labelled pixels of exp(-D) w_y l + D, D = KL(q || p) (Zheng and Yang, IJCV 2021).

    Pixels on which two classifiers disagree count less, and disagreement costs. Equal classifiers give `cross_entropy`.

    Args:
        logits: [B, C, H, W], p = softmax(logits), l = -log p_y.
        other: [B, C, H, W], q = softmax(other), the other classifier's. Gradients flow into both.
        label: [B, H, W].
        class_weight: [C] w.
    """
    loss = F.cross_entropy(logits, label, weight=class_weight, ignore_index=IGNORE, reduction="none")
    variance = kl_divergence(other, logits)
    valid = label != IGNORE
    return masked_mean((-variance).exp() * loss + variance, valid)


def symmetric_cross_entropy(logits: Tensor, target: Tensor, valid: Tensor, alpha: float, beta: float) -> Tensor:
    """Mean over valid pixels of alpha CE(y, p) + beta CE(p, y) (Wang et al., ICCV 2019, with the clamps of ProDA).

    CE(y, p) = -sum_k y_k log p_k and, reversed, CE(p, y) = -sum_k max(p_k, 1e-7) log max(y_k, 1e-4): a wrong label
    costs at most -log 1e-4 there.

    Args:
        logits: [B, C, H, W]; p is their softmax.
        target: y, [B, C, H, W] distributions; one-hot for labels.
        valid: [B, H, W] bool, pixels that count.
        alpha: weight of the cross-entropy.
        beta: weight of the reversed one.
    """
    forward = F.cross_entropy(logits, target, reduction="none")
    reverse = -(logits.softmax(1).clamp(min=1e-7) * target.clamp(min=1e-4).log()).sum(1)
    return masked_mean(alpha * forward + beta * reverse, valid)


def distillation(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Knowledge distillation: mean over valid pixels and classes of KL(teacher || student) = sum_k t_k log(t_k / s_k).

    The mean is over classes too, as in ProDA's code, to which its weights belong.

    Args:
        student: [B, C, h, w] log-probabilities.
        teacher: [B, C, h, w] probabilities; no gradient flows into them.
        valid: [B, h, w] bool, pixels that count; all when None.
    """
    divergence = F.kl_div(student, teacher.detach(), reduction="none").mean(1)
    if valid is None:
        return divergence.mean()
    return masked_mean(divergence, valid)


def uniformity(logits: Tensor) -> Tensor:
    """KLD model regularisation: -mean of log p over pixels and classes, least for equal p (Zou et al., ICCV 2019)."""
    return -logits.log_softmax(1).mean()
