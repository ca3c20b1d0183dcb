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

from udas.data.sampling import uniform, uniform_rows
from udas.errors import ConfigError

BLUR_SIGMA = (0.1, 2.0)  # pixels; UniMatch and SimCLR
BLUR_KERNEL = 13  # reaches three of the largest sigma to each side


def partners(names: Sequence[str], device: torch.device | None = None) -> Tensor:
    """Which picture of the batch each one is mixed with: the next one, and among those the first of another name.

    Where a data set is smaller than a batch, or a new pass through it begins, a batch can hold a picture twice; only
    when it holds nothing else is a picture mixed with another crop of itself.

    Args:
        names: the pictures' names, `Block.names`.
        device: where the result is wanted; the CPU when None.

    Returns:
        [B] int64, positions in the batch, never its own.

    Raises:
        ConfigError: a batch of one.
    """
    if len(names) < 2:
        raise ConfigError(
            "a batch of one cannot be mixed with another picture: let training.batch give every process two"
        )
    found = torch.tensor([_next(names, place) for place in range(len(names))])
    return found.to(device or torch.device("cpu"), non_blocking=True)


def _next(names: Sequence[str], place: int) -> int:
    following = [(place + step) % len(names) for step in range(1, len(names))]
    return next((other for other in following if names[other] != names[place]), following[0])


def inside_picture(image: Tensor) -> Tensor:
    """Pixels that show something: neither in a row nor in a column that is black throughout.

    A random zoom can leave a picture smaller than its crop; the loader then adds rows and columns of zeros, which are
    no place to learn at. Where there are labels, IGNORE says so.

    Args:
        image: [B, 3, H, W] as the loader gives it.

    Returns:
        [B, H, W] bool.
    """
    rows, columns = image.amax((1, 3)) > 0, image.amax((1, 2)) > 0
    return rows[:, :, None] & columns[:, None, :]


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
    bright, contra, satur, turn = uniform(seeds, "jitter", 4, image.device)
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
    *chances, width = uniform(seeds, "strong", 4)
    if_jittered, if_grey, if_blurred = (chance.to(image.device, non_blocking=True) for chance in chances)
    image = _where(if_jittered < jittered, jitter(image, seeds, brightness, contrast, saturation, hue), image)
    image = _where(if_grey < grey, rgb_to_grayscale(image).expand_as(image), image)
    return _where(if_blurred < blurred, _blur(image, sigma[0] + (sigma[1] - sigma[0]) * width), image)


def _blur(image: Tensor, width: Tensor) -> Tensor:
    """Gaussian blur with one sigma per picture, in full precision whatever the method's autocast says.

    The sigmas are on the CPU: kornia looks at them, which on a device would wait for it.
    """
    sigma = width[:, None].expand(-1, 2)
    with torch.autocast(image.device.type, enabled=False):
        blurred: Tensor = gaussian_blur2d(image, (BLUR_KERNEL, BLUR_KERNEL), sigma, border_type="replicate")
    return blurred


def _where(chosen: Tensor, changed: Tensor, image: Tensor) -> Tensor:
    return torch.where(chosen[:, None, None, None], changed, image)


def _factor(strength: float, draw: Tensor) -> Tensor:
    low = max(0.0, 1 - strength)
    return low + (1 + strength - low) * draw


def channel_dropout(features: Tensor, seeds: Sequence[int], rate: float, purpose: str) -> Tensor:
    """Dropout of whole channels (Tompson et al., CVPR 2015), drawn for each picture from its own seed.

    Args:
        features: [B, D, h, w].
        seeds: one seed per picture.
        rate: probability in [0, 1) that a channel becomes 0; the others grow by 1 / (1 - rate).
        purpose: names the draw; maps of different purposes lose different channels.

    Returns:
        [B, D, h, w].
    """
    kept = uniform_rows(seeds, f"channels {purpose}", features.shape[1], features.device) >= rate
    return features * (kept.to(features.dtype) / (1 - rate))[:, :, None, None]
