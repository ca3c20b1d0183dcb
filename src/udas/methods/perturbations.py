"""Perturbations of features under which predictions should stay the same (CCT; Ouali et al., CVPR 2020, section 3.2).

Each takes features z, [B, D, h, w], and gives new ones of that size. Those that follow the objects in the picture take
them as [B, h, w] bool or as boxes. Dropout of whole channels is `udas.data.mixing.channel_dropout`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from udas.data.sampling import uniform, uniform_rows
from udas.losses import kl_divergence


def drop_active(z: Tensor, seeds: Sequence[int], low: float, high: float) -> Tensor:
    """F-Drop: zero where the mean over channels reaches u times its largest value, u ~ U(low, high) per picture.

    The places that respond most are lost, the others stay.
    """
    (draw,) = uniform(seeds, "most active features", 1, z.device)
    share = (low + (high - low) * draw).view(-1, 1, 1, 1)
    attention = z.mean(1, keepdim=True)
    threshold = attention.amax((2, 3), keepdim=True) * share
    return z * (attention < threshold)


def add_noise(z: Tensor, strength: float) -> Tensor:
    """F-Noise: z + z n, n ~ U(-strength, strength) for each channel and place, the same n for the whole batch."""
    noise = torch.empty_like(z[0]).uniform_(-strength, strength)
    return z + z * noise


def hide_context(z: Tensor, objects: Tensor) -> Tensor:
    """Con-Msk: zero outside the objects."""
    return z * objects[:, None]


def hide_objects(z: Tensor, objects: Tensor) -> Tensor:
    """Obj-Msk: zero on the objects."""
    return z * ~objects[:, None]


def cut_objects(z: Tensor, boxes: Tensor, seeds: Sequence[int], erase: float) -> Tensor:
    """G-Cutout: zero a window at random inside each box, its sides `erase` times those of the box.

    Args:
        z: [B, D, h, w].
        boxes: [B, K, 4], top, left, bottom, right in cells of z, as `region_boxes` gives them.
        seeds: one seed per picture.
        erase: share of height and width, 0 to 1. A cell is lost when its centre lies in a window.
    """
    count = boxes.shape[1]
    places = uniform_rows(seeds, "cutout", 2 * count, z.device)
    top, left, bottom, right = boxes.unbind(2)
    rows = _windows(top, bottom - top, places[:, :count], erase, z.shape[2])
    columns = _windows(left, right - left, places[:, count:], erase, z.shape[3])
    hidden = torch.einsum("bkh,bkw->bhw", rows, columns) > 0
    return z * ~hidden[:, None]


def _windows(start: Tensor, length: Tensor, place: Tensor, erase: float, cells: int) -> Tensor:
    """[B, K] each -> [B, K, cells] float, 1 where a cell's centre lies in the window; `place` in [0, 1] moves it."""
    begin = (start + place * (1 - erase) * length)[:, :, None]
    centre = torch.arange(cells, device=start.device) + 0.5
    return ((centre >= begin) & (centre < begin + erase * length[:, :, None])).float()


def add_adversarial(z: Tensor, head: Callable[[Tensor], Tensor], length: float) -> Tensor:
    """I-VAT: z + length u, u the unit direction in which `head` changes most (Miyato et al., TPAMI 2018).

        u = H d / ||H d||,   H = d2/dr2 sum KL(p(z) || p(z + r)) at r = 0,   p = softmax(head)

    with one picture's d drawn at random: one step of the power iteration towards H's first eigenvector. Norms are of a
    picture's whole [D, h, w]. The published H d is a difference quotient over 1e-6, which float32 rounds away; here it
    is the exact derivative. No gradient reaches the head's parameters on this way.
    """
    clean = z.detach().float()
    r = torch.zeros_like(clean).requires_grad_()
    d = torch.rand_like(clean) - 0.5
    logits = head(clean + r).float()
    (slope,) = torch.autograd.grad(kl_divergence(logits.detach(), logits).sum(), r, create_graph=True)
    (curved,) = torch.autograd.grad((slope * _unit(d)).sum(), r)
    return z + length * _unit(curved)


def _unit(direction: Tensor) -> Tensor:
    return F.normalize(direction.flatten(1), dim=1, eps=1e-8).view_as(direction)
