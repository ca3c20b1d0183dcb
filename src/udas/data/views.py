"""Views of one picture for labelling: AutoAugment operations, with geometry that can be undone.

Source: Cubuk et al., "AutoAugment: Learning Augmentation Strategies from Data", CVPR 2019: the ImageNet sub-policies
and the magnitude ranges of its Table 6, preceded by a random mirror as in its training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import AutoAugment
from torchvision.transforms.v2 import functional as tv

from udas.data.sampling import seed_of

LEVELS = 10  # magnitudes of the policy are indices into this many even steps
SIGNED_RANGE = {
    "ShearX": 0.3,
    "ShearY": 0.3,
    "TranslateX": 150 / 331,  # the policy was searched on pictures of 331 pixels
    "TranslateY": 150 / 331,
    "Rotate": 30.0,
    "Brightness": 0.9,
    "Color": 0.9,
    "Contrast": 0.9,
    "Sharpness": 0.9,
}
PHOTOMETRIC: dict[str, Callable[[Tensor, float], Tensor]] = {
    "Brightness": lambda image, strength: tv.adjust_brightness(image, 1 + strength),
    "Color": lambda image, strength: tv.adjust_saturation(image, 1 + strength),
    "Contrast": lambda image, strength: tv.adjust_contrast(image, 1 + strength),
    "Sharpness": lambda image, strength: tv.adjust_sharpness(image, 1 + strength),
    "Posterize": lambda image, bits: tv.posterize(image, int(bits)),
    "Solarize": lambda image, threshold: tv.solarize(image, threshold),
    "AutoContrast": lambda image, _: tv.autocontrast(image),
    "Equalize": lambda image, _: tv.equalize(image),
    "Invert": lambda image, _: tv.invert(image),
}


@dataclass(frozen=True, eq=False)
class View:
    """One way of looking at a picture of a known size.

    photometric: operations on the colours as (name, strength), applied first and in order, so that equalising and
        contrast stretching see the picture without the borders that the geometry brings in.
    matrix: [3, 3] float64 on homogeneous pixel coordinates (x, y, 1) with the origin in the picture's centre; the view
        shows at p what the picture has at `matrix @ p`.
    """

    photometric: tuple[tuple[str, float], ...]
    matrix: Tensor

    @property
    def geometric(self) -> bool:
        """Whether pixels move."""
        return not torch.equal(self.matrix, torch.eye(3, dtype=torch.float64))


def draw_views(count: int, seed: int, name: str, size: tuple[int, int]) -> list[View]:
    """`count` views of picture `name` of `size` (height, width): the picture itself, then draws from the policy.

    View k depends on (seed, name, k) and the size alone.
    """
    plain = View((), torch.eye(3, dtype=torch.float64))
    return [plain, *(_draw(seed_of(seed, name, k), size) for k in range(1, count))]


def _draw(seed: int, size: tuple[int, int]) -> View:
    generator = torch.Generator().manual_seed(seed)
    policies = AutoAugment().policies
    policy = policies[int(torch.randint(len(policies), (), generator=generator))]
    mirror, *chances = torch.rand(1 + len(policy), generator=generator).tolist()
    signs = (torch.randint(2, (len(policy),), generator=generator) * 2 - 1).tolist()
    operations = [
        (name, strength(name, level, sign))
        for (name, probability, level), chance, sign in zip(policy, chances, signs, strict=True)
        if chance < probability
    ]
    return compose(operations, size, mirror=mirror < 0.5)


def strength(name: str, level: int | None, sign: int) -> float:
    """What `level` (0 to 9) of an operation means: slope, share of the side, degrees, factor - 1, bits or value."""
    share = (level or 0) / (LEVELS - 1)
    if name in SIGNED_RANGE:
        return sign * share * SIGNED_RANGE[name]
    if name == "Posterize":
        return 8 - round(4 * share)
    return 255 * (1 - share) if name == "Solarize" else 0.0


def compose(operations: Sequence[tuple[str, float]], size: tuple[int, int], mirror: bool = False) -> View:
    """The view that applies a mirror and then `operations` to a picture of `size` (height, width)."""
    matrix = torch.eye(3, dtype=torch.float64)
    if mirror:
        matrix[0, 0] = -1
    for name, amount in operations:
        if name not in PHOTOMETRIC:
            matrix = matrix @ _geometry(name, amount, size)
    return View(tuple((name, amount) for name, amount in operations if name in PHOTOMETRIC), matrix)


def _geometry(name: str, amount: float, size: tuple[int, int]) -> Tensor:
    """Matrix of one operation about the centre of the picture, which keeps the most of it in sight."""
    matrix = torch.eye(3, dtype=torch.float64)
    if name == "Rotate":
        cosine, sine = math.cos(math.radians(amount)), math.sin(math.radians(amount))
        matrix[:2, :2] = torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)
        return matrix
    row, column, value = {
        "ShearX": (0, 1, amount),
        "ShearY": (1, 0, amount),
        "TranslateX": (0, 2, amount * size[1]),
        "TranslateY": (1, 2, amount * size[0]),
    }[name]
    matrix[row, column] = value
    return matrix


def look(image: Tensor, views: Sequence[View]) -> Tensor:
    """The views of one picture.

    Args:
        image: [3, H, W] uint8 RGB.
        views: K views drawn for its size.

    Returns:
        [K, 3, H, W] float32 in [0, 1]. Where a view reaches beyond the picture it shows its mirror image, so that the
        network never sees an artificial edge.
    """
    coloured = torch.stack([_colours(image, view) for view in views]).float() / 255
    return _resample(coloured, views, [view.matrix for view in views], padding="reflection")


def _colours(image: Tensor, view: View) -> Tensor:
    for name, amount in view.photometric:
        image = PHOTOMETRIC[name](image, amount)
    return image


def map_back(maps: Tensor, views: Sequence[View]) -> Tensor:
    """Move what was predicted on each view to the place of the pixels in the picture.

    Args:
        maps: [N, C, H, W] float, class probabilities of N views (of any number of pictures).
        views: the N views.

    Returns:
        [N, C, H, W], bilinear; all zero for pixels of the picture that the view does not show.
    """
    inverses = [torch.linalg.inv(view.matrix) for view in views]
    return _resample(maps, views, inverses, padding="border", hide_outside=True)


def _resample(
    maps: Tensor, views: Sequence[View], matrices: Sequence[Tensor], padding: str, hide_outside: bool = False
) -> Tensor:
    """`maps` at `matrix @ p` for every pixel p; maps of views that move nothing stay bit for bit."""
    moved = [k for k, view in enumerate(views) if view.geometric]
    if not moved:
        return maps
    height, width = maps.shape[-2:]
    to_pixels = torch.diag(torch.tensor([width / 2, height / 2, 1], dtype=torch.float64))
    theta = torch.stack([torch.linalg.inv(to_pixels) @ matrices[k] @ to_pixels for k in moved])[:, :2].to(maps)
    grid = F.affine_grid(theta, [len(moved), 1, height, width], align_corners=False)
    sampled = F.grid_sample(maps[moved], grid, mode="bilinear", padding_mode=padding, align_corners=False)
    if hide_outside:
        sampled = sampled * (grid.abs() <= 1).all(dim=-1).unsqueeze(1)
    result = maps.clone()
    result[moved] = sampled
    return result
