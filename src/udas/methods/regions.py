"""Connected regions of masks and the boxes around them, found on the device without a host sync."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def connected_regions(mask: Tensor) -> Tensor:
    """One number per connected region: the index of its last cell in reading order.

    Cells that touch at a side or a corner are connected. In each round a cell takes the largest number around it, hands
    it to the cell its own number names, and then takes that cell's number, so that numbers travel in leaps (as in
    FastSV; Zhang, Azad and Hu, 2020). The rounds made here, log2(h w) + 2, are more than spirals and mazes take.

    Args:
        mask: [B, h, w] bool, h w < 2^24.

    Returns:
        [B, h, w] int64 indices below h w; cells outside the mask have their own.
    """
    count, height, width = mask.shape
    cells = height * width
    number = torch.arange(cells, device=mask.device).expand(count, cells)
    flat = mask.flatten(1)
    for _ in range(math.ceil(math.log2(max(cells, 2))) + 2):
        inside = torch.where(flat, number, -1).view(mask.shape).float()
        near = F.max_pool2d(inside[:, None], 3, stride=1, padding=1).flatten(1).long()
        near = torch.where(flat, near, number)
        number = torch.maximum(number.scatter_reduce(1, number, near, "amax"), near)
        number = number.gather(1, number)
    return number.view(mask.shape)


def region_boxes(mask: Tensor, count: int, minimum: float) -> Tensor:
    """Boxes around the regions of each mask, those with the longest outline first.

    Args:
        mask: [B, h, w] bool.
        count: K, how many boxes are wanted per mask.
        minimum: outline in cells, 2 (height + width) of the box, above which a region has a box.

    Returns:
        [B, K', 4] float32, K' = min(K, h w): top, left, bottom, right in cells, the last two exclusive; zeros where a
        mask has fewer regions.
    """
    number = connected_regions(mask).flatten(1)
    index = torch.arange(number.shape[1], device=mask.device).expand_as(number)
    rows, columns = index // mask.shape[2], index % mask.shape[2]
    low = [_per_region(number, value, "amin") for value in (rows, columns)]
    high = [_per_region(number, value, "amax") + 1 for value in (rows, columns)]
    box = torch.stack([*low, *high], 2).float()
    outline = 2 * (box[..., 2:] - box[..., :2]).sum(2)
    outline = torch.where(mask.flatten(1) & (number == index) & (outline > minimum), outline, 0.0)
    longest, order = outline.sort(dim=1, descending=True, stable=True)
    chosen = box.gather(1, order[:, :count, None].expand(-1, -1, 4))
    return torch.where(longest[:, :count, None] > 0, chosen, 0.0)


def _per_region(number: Tensor, value: Tensor, extreme: str) -> Tensor:
    """[B, n]: at a region's number, the extreme `value` of its cells."""
    return value.scatter_reduce(1, number, value, extreme)
