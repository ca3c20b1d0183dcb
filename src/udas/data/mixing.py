"""Mixing and strong augmentation of whole batches on the device; every picture's randomness follows from its seed.

All pictures are [B, 3, H, W] float32 RGB in [0, 1]. Nothing here changes its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from kornia.color import rgb_to_grayscale
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_hue,
    adjust_saturation_with_gray_subtraction,
)
from kornia.filters import gaussian_blur2d
from torch import Tensor

from udas.data.sampling import seed_of
from udas.errors import ConfigError
from udas.taxonomy import IGNORE

BLUR_SIGMA = (0.1, 2.0)  # pixels; UniMatch and SimCLR
BLUR_KERNEL = 13  # reaches three of the largest sigma to each side


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
    ratio, row, column = _uniform(seeds, "cutmix", 3, device)
    share = torch.sqrt(1 - ratio)
    rows, columns = _inside(row, share, height), _inside(column, share, width)
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
    draws = torch.stack(_uniform(seeds, "classmix", IGNORE + 1, labels.device), 1)
    rank = draws.masked_fill(~present, torch.inf).argsort(1).argsort(1)
    drawn = present & (2 * rank < present.sum(1, keepdim=True))
    return drawn.gather(1, flat).view_as(labels)[:, None]


def paste(base: Tensor, patch: Tensor, mask: Tensor) -> Tensor:
    """A new tensor with `patch` where `mask` is True and `base` elsewhere.

    Args:
        base: [B, C, H, W] pictures or [B, H, W] labels.
        patch: like `base`.
        mask: [B, 1, H, W] bool, for both kinds (or [B, H, W] for labels).

    Raises:
        ConfigError: the two differ in size.
    """
    if base.shape[-2:] != patch.shape[-2:]:
        sizes = " x ".join(map(str, patch.shape[-2:])), " x ".join(map(str, base.shape[-2:]))
        raise ConfigError(f"{sizes[0]} pixels cannot be mixed into {sizes[1]}: give both streams one augment.crop")
    mask = mask.to(base.device, non_blocking=True)
    return torch.where(mask.squeeze(1) if mask.ndim > base.ndim else mask, patch, base)


def jitter(
    image: Tensor, seeds: Sequence[int], brightness: float, contrast: float, saturation: float, hue: float
) -> Tensor:
    """Random brightness, contrast, saturation and hue, in that order, with factors of its own for every picture.

    Args:
        image: [B, 3, H, W] in [0, 1].
        seeds: one seed per picture.
        brightness: the factor on the values is drawn from [max(0, 1 - b), 1 + b]; 0 leaves them alone.
        contrast: the factor on the distance to the mean grey level, likewise.
        saturation: the factor on the distance to the pixel's grey, likewise.
        hue: the shift is drawn from [-h, h] turns of the colour circle, h <= 0.5.

    Returns:
        [B, 3, H, W] in [0, 1].
    """
    bright, contra, satur, turn = _uniform(seeds, "jitter", 4, image.device)
    if brightness:
        image = adjust_brightness_accumulative(image, _factor(brightness, bright))
    if contrast:
        image = adjust_contrast_with_mean_subtraction(image, _factor(contrast, contra))
    if saturation:
        image = adjust_saturation_with_gray_subtraction(image, _factor(saturation, satur))
    if hue:
        image = adjust_hue(image, (2 * turn - 1) * hue * 2 * math.pi)
    return image.clamp(0, 1)


def strong(
    image: Tensor,
    seeds: Sequence[int],
    brightness: float = 0.5,
    contrast: float = 0.5,
    saturation: float = 0.5,
    hue: float = 0.25,
    jittered: float = 0.8,
    grey: float = 0.2,
    blurred: float = 0.5,
    sigma: tuple[float, float] = BLUR_SIGMA,
) -> Tensor:
    """The strong view of UniMatch (Yang et al., CVPR 2023): colour jitter, random greyscale, Gaussian blur.

    A second, independent view of the same pictures needs other seeds: `seed_of(seed, "second")`.

    Args:
        image: [B, 3, H, W] in [0, 1].
        seeds: one seed per picture.
        brightness: strength, see `jitter`.
        contrast: strength, see `jitter`.
        saturation: strength, see `jitter`.
        hue: strength, see `jitter`.
        jittered: probability that a picture's colours are changed.
        grey: probability that a picture becomes grey.
        blurred: probability that a picture is blurred.
        sigma: smallest and largest standard deviation of the blur in pixels, drawn uniformly; at most 2.

    Returns:
        [B, 3, H, W] in [0, 1].
    """
    if_jittered, if_grey, if_blurred, width = _uniform(seeds, "strong", 4, image.device)
    image = _where(if_jittered < jittered, jitter(image, seeds, brightness, contrast, saturation, hue), image)
    image = _where(if_grey < grey, rgb_to_grayscale(image).expand_as(image), image)
    return _where(if_blurred < blurred, _blur(image, sigma[0] + (sigma[1] - sigma[0]) * width), image)


def _blur(image: Tensor, width: Tensor) -> Tensor:
    """Gaussian blur with one sigma per picture, in full precision whatever the method's autocast says."""
    sigma = width[:, None].expand(-1, 2)
    with torch.autocast(image.device.type, enabled=False):
        blurred: Tensor = gaussian_blur2d(image, (BLUR_KERNEL, BLUR_KERNEL), sigma, border_type="replicate")
    return blurred


def _where(chosen: Tensor, changed: Tensor, image: Tensor) -> Tensor:
    return torch.where(chosen[:, None, None, None], changed, image)


def _factor(strength: float, draw: Tensor) -> Tensor:
    low = max(0.0, 1 - strength)
    return low + (1 + strength - low) * draw


def _uniform(seeds: Sequence[int], purpose: str, count: int, device: torch.device | None) -> tuple[Tensor, ...]:
    """`count` values ~ U(0, 1) per picture, as `count` tensors [B]; different purposes are independent."""
    generators = [torch.Generator().manual_seed(seed_of(seed, purpose)) for seed in seeds]
    draws = torch.stack([torch.rand(count, generator=generator) for generator in generators])
    return draws.to(device or torch.device("cpu"), non_blocking=True).unbind(1)
