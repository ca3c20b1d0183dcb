"""Random masks for mixing pictures: boxes and halves of the classes; every picture's follow from its seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from udas.data.sampling import uniform, uniform_rows
from udas.taxonomy import IGNORE

ASPECT = 0.3  # narrowest box, and its inverse the tallest; UniMatch


def cutmix_boxes(seeds: Sequence[int], height: int, width: int, device: torch.device | None = None) -> Tensor:
    """One random CutMix box per picture (Yun et al., ICCV 2019, equation 2).

    Sides r_h = H sqrt(1 - lambda), r_w = W sqrt(1 - lambda) with lambda ~ U(0, 1); the centre is uniform over the
    picture and what sticks out is lost, so that the mean area is 0.32 rather than 0.5 of the picture.

    Args:
        seeds: one seed per picture.
        height: H in pixels.
        width: W in pixels.
        device: where the boxes are wanted; the CPU when None.

    Returns:
        [B, 1, H, W] bool, True inside the box.
    """
    ratio, row, column = uniform(seeds, "cutmix", 3, device)
    share = torch.sqrt(1 - ratio)
    rows, columns = _inside(row, share, height), _inside(column, share, width)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def box_masks(
    seeds: Sequence[int],
    height: int,
    width: int,
    share: float | tuple[float, float] = 0.5,
    device: torch.device | None = None,
) -> Tensor:
    """One box inside each picture that covers a given share of it, of random shape (French et al., BMVC 2020).

    Height s^u of the picture's and width s^(1 - u), u ~ U(0, 1); its place is uniform over all that fit.

    Args:
        seeds: one seed per picture.
        height: H in pixels.
        width: W in pixels.
        share: s, the box's share of the picture's area, or a range to draw it from.
        device: where the boxes are wanted; the CPU when None.

    Returns:
        [B, 1, H, W] bool, True inside the box.
    """
    area, shape, row, column = uniform(seeds, "box", 4, device)
    low, high = share if isinstance(share, tuple) else (share, share)
    area = (low + (high - low) * area).clamp(min=1e-6)
    return _boxes(area**shape, area ** (1 - shape), row, column, height, width)


def sized_boxes(
    seeds: Sequence[int],
    height: int,
    width: int,
    share: tuple[float, float] = (0.02, 0.4),
    probability: float = 1.0,
    device: torch.device | None = None,
) -> Tensor:
    """One box inside each picture with a share and an aspect drawn from ranges (UniMatch, Yang et al., CVPR 2023).

    Height sqrt(s r) of the picture's and width sqrt(s / r): s ~ U(share); r is uniform in [0.3, 1 / 0.3] as far as the
    box fits; its place is uniform over all that fit.

    Args:
        seeds: one seed per picture.
        height: H in pixels.
        width: W in pixels.
        share: smallest and largest s, the box's share of the picture's area.
        probability: of a box; other pictures get none.
        device: where the boxes are wanted; the CPU when None.

    Returns:
        [B, 1, H, W] bool, True inside the box.
    """
    chance, area, aspect, row, column = uniform(seeds, "sized box", 5, device)
    area = share[0] + (share[1] - share[0]) * area
    low, high = area.clamp(min=ASPECT), (1 / area).clamp(max=1 / ASPECT)
    aspect = low + (high - low) * aspect
    boxes = _boxes((area * aspect).sqrt(), (area / aspect).sqrt(), row, column, height, width)
    return boxes & (chance < probability)[:, None, None, None]


def cutout_masks(
    seeds: Sequence[int], height: int, width: int, share: float, device: torch.device | None = None
) -> Tensor:
    """CutOut (DeVries and Taylor, 2017): a square around a uniform pixel, without what sticks out of the picture.

    Args:
        seeds: one seed per picture.
        height: H in pixels.
        width: W in pixels.
        share: side of the square as a share of the shorter side.
        device: where the masks are wanted; the CPU when None.

    Returns:
        [B, H, W] bool, True inside the square.
    """
    row, column = uniform(seeds, "cutout", 2, device)
    side = torch.full_like(row, share * min(height, width))
    rows, columns = _inside(row, side / height, height), _inside(column, side / width, width)
    return rows[:, :, None] & columns[:, None, :]


def _boxes(tall: Tensor, wide: Tensor, row: Tensor, column: Tensor, height: int, width: int) -> Tensor:
    """[B] relative sides and places, 0 = at the top or left border, 1 = at the other -> [B, 1, H, W] bool."""
    rows = _inside(tall / 2 + row * (1 - tall), tall, height)
    columns = _inside(wide / 2 + column * (1 - wide), wide, width)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _inside(centre: Tensor, share: Tensor, length: int) -> Tensor:
    """[B] centres and sides, relative to the axis -> [B, length] bool: pixels whose centre the box covers."""
    pixels = torch.arange(length, device=centre.device) + 0.5
    return (pixels - centre[:, None] * length).abs() < share[:, None] * length / 2


def classmix_masks(labels: Tensor, seeds: Sequence[int], void: bool = False) -> Tensor:
    """The pixels of a random half of the classes of each picture (ClassMix; Olsson et al., WACV 2021, section 3.1).

    Of the n classes that are present in *this* picture, ceil(n / 2) are drawn, all subsets of that size alike.

    Args:
        labels: [B, H, W] int64 class ids or IGNORE.
        seeds: one seed per picture.
        void: IGNORE counts as one of the classes, so that unlabelled pixels can be part of the mask too.

    Returns:
        [B, 1, H, W] bool, True where the class of the pixel was drawn.
    """
    flat = labels.flatten(1)
    present = torch.zeros(len(labels), IGNORE + 1, dtype=torch.bool, device=labels.device).scatter_(1, flat, True)
    if not void:
        present[:, IGNORE] = False
    draws = uniform_rows(seeds, "classmix", IGNORE + 1, labels.device)
    rank = draws.masked_fill(~present, torch.inf).argsort(1).argsort(1)
    drawn = present & (2 * rank < present.sum(1, keepdim=True))
    return drawn.gather(1, flat).view_as(labels)[:, None]
