"""RandAugment for whole batches on the device, with geometry that labels and maps can follow.

Source: the strong augmentation of FixMatch (Sohn et al., NeurIPS 2020, Table 12) as ProDA uses it: a mirror with
probability 1/2, two operations of the pool, each carried out with probability 1/2, and a grey square (Cutout).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from udas.data.batch import IGNORE
from udas.data.sampling import seed_of
from udas.data.views import PHOTOMETRIC, View, compose

OPERATIONS = 2
CHANCE = 0.5  # that a drawn operation is carried out
STEPS = 10  # strengths are drawn from 1 .. STEPS - 1
HOLE = 1 / 3  # side of the grey square, as a share of the picture's shorter side
GREY = 127 / 255

POOL: dict[str, Callable[[int], float]] = {
    "AutoContrast": lambda v: 0.0,
    "Brightness": lambda v: 0.09 * v + 0.05 - 1,
    "Color": lambda v: 0.09 * v + 0.05 - 1,
    "Contrast": lambda v: 0.09 * v + 0.05 - 1,
    "Equalize": lambda v: 0.0,
    "Identity": lambda v: 0.0,
    "Posterize": lambda v: 4 + 4 * v // 10,
    "Rotate": lambda v: 3.0 * v,
    "Sharpness": lambda v: 0.09 * v + 0.05 - 1,
    "ShearX": lambda v: 0.03 * v,
    "ShearY": lambda v: 0.03 * v,
    "Solarize": lambda v: 256 - 256 * v // 10,
    "TranslateX": lambda v: 0.03 * v,
    "TranslateY": lambda v: 0.03 * v,
}
"""Operation -> what strength v means as `udas.data.views` counts: factor - 1, bits, value, degrees, slope or share.

A factor is below 1: colours only fade. Geometric operations go either way, as a coin decides.
"""
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


@dataclass(frozen=True, eq=False)
class StrongViews:
    """One strong view per picture of a batch.

    colours: per picture, the operations on its colours as (name, strength).
    theta: [B, 2, 3] float32, where the view looks: from its places to the picture's, both in [-1, 1].
    holes: [B, 4] float32, top, bottom, left and right of the grey square as shares of height and width.
    """

    colours: tuple[tuple[tuple[str, float], ...], ...]
    theta: Tensor
    holes: Tensor

    def picture(self, image: Tensor) -> Tensor:
        """The views: [B, 3, H, W] in [0, 1] -> the same, with grey beyond the picture and in the square."""
        pixels = (image * 255).round().to(torch.uint8)
        coloured = torch.stack([_recolour(*pair) for pair in zip(pixels, self.colours, strict=True)]).float() / 255
        moved = self._move(coloured - GREY, "bilinear") + GREY  # zeros beyond the picture are grey
        return torch.where(self._hidden(image)[:, None], GREY, moved).clamp(0, 1)

    def label(self, label: Tensor) -> Tensor:
        """Labels [B, H, W] moved alike; IGNORE beyond the picture and in the square."""
        moved = self._move(label[:, None].float() - IGNORE, "nearest")[:, 0].round().long() + IGNORE
        return moved.masked_fill(self._hidden(label), IGNORE)

    def maps(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Maps [B, K, h, w] of any resolution moved alike, and which pixels of the views they cover, [B, h, w] bool.

        Values are those of the nearest place, so that what is a distribution over K stays one.
        """
        covered = self._move(torch.ones_like(maps[:, :1]), "nearest")[:, 0] > 0
        return self._move(maps, "nearest"), covered & ~self._hidden(maps)

    def _move(self, maps: Tensor, mode: Literal["nearest", "bilinear"]) -> Tensor:
        """[B, K, h, w] seen from the views; zero beyond the picture."""
        with torch.autocast(maps.device.type, enabled=False):
            grid = F.affine_grid(self.theta, [len(maps), 1, *maps.shape[-2:]], align_corners=False)
            return F.grid_sample(maps.float(), grid, mode=mode, padding_mode="zeros", align_corners=False)

    def _hidden(self, like: Tensor) -> Tensor:
        """[B, h, w] bool: pixels whose centre is in the square."""
        top, bottom, left, right = self.holes[:, :, None].unbind(1)
        row, column = (_centres(length, like.device) for length in like.shape[-2:])
        rows, columns = (row >= top) & (row < bottom), (column >= left) & (column < right)
        return rows[:, :, None] & columns[:, None, :]


def draw_strong(image: Tensor, seeds: Sequence[int]) -> StrongViews:
    """One view per picture [B, 3, H, W]; each depends on its picture's seed and the size alone."""
    height, width = image.shape[-2:]
    drawn = [_draw(seed_of(seed, "randaugment"), (height, width)) for seed in seeds]
    colours = tuple(view.photometric for view, _ in drawn)
    theta = torch.stack([_relative(view.matrix, height, width) for view, _ in drawn])
    holes = torch.tensor([hole for _, hole in drawn])
    return StrongViews(colours, theta.to(image.device, non_blocking=True), holes.to(image.device, non_blocking=True))


def unchanged(image: Tensor) -> StrongViews:
    """Views that show the pictures [B, 3, H, W] as they are, in steps of 1 / 255."""
    count, device = len(image), image.device
    theta = torch.eye(2, 3, device=device).expand(count, 2, 3)
    return StrongViews(((),) * count, theta, torch.zeros(count, 4, device=device))


def _draw(seed: int, size: tuple[int, int]) -> tuple[View, tuple[float, float, float, float]]:
    generator = torch.Generator().manual_seed(seed)
    names, steps = list(POOL), torch.randint(1, STEPS, (OPERATIONS,), generator=generator).tolist()
    chosen = torch.randint(len(names), (OPERATIONS,), generator=generator).tolist()
    mirror, row, column, *draws = torch.rand(3 + 2 * OPERATIONS, generator=generator).tolist()
    operations = [
        _operation(names[k], step, sign < 0.5)
        for k, step, chance, sign in zip(chosen, steps, draws[:OPERATIONS], draws[OPERATIONS:], strict=True)
        if chance < CHANCE and names[k] != "Identity"
    ]
    return compose(operations, size, mirror=mirror < 0.5), _hole(row, column, size)


def _operation(name: str, step: int, backwards: bool) -> tuple[str, float]:
    amount = POOL[name](step)
    return name, -amount if backwards and name in GEOMETRIC else amount


def _hole(row: float, column: float, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Top, bottom, left and right of a square around (row, column), all as shares of the sides."""
    height, width = size
    side = HOLE * min(size)
    top, left = max(0.0, row - side / height / 2), max(0.0, column - side / width / 2)
    return top, top + side / height, left, left + side / width


def _relative(matrix: Tensor, height: int, width: int) -> Tensor:
    """A [3, 3] matrix on pixels from the centre as one on [-1, 1], for maps of any resolution: [2, 3] float32."""
    to_pixels = torch.diag(torch.tensor([width / 2, height / 2, 1], dtype=torch.float64))
    relative: Tensor = torch.linalg.inv(to_pixels) @ matrix @ to_pixels
    return relative[:2].float()


def _recolour(image: Tensor, operations: Sequence[tuple[str, float]]) -> Tensor:
    for name, amount in operations:
        image = PHOTOMETRIC[name](image, amount)
    return image


def _centres(length: int, device: torch.device) -> Tensor:
    return (torch.arange(length, device=device) + 0.5) / length
