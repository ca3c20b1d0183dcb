"""Weak augmentation on the CPU, in the loader's workers: zoom, crop, mirror, colours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode

from udas.config import AugmentConfig
from udas.data.batch import IGNORE


@dataclass(frozen=True)
class _Span:
    """One axis of the crop: source pixels [start, stop) become `kept` pixels between two borders of padding."""

    start: int
    stop: int
    before: int
    kept: int
    after: int


def augment(
    image: Tensor,
    label: Tensor | None,
    confidence: Tensor | None,
    config: AugmentConfig,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Zoom, crop, mirror and recolour one picture; label and confidence follow its geometry.

    The zoom z ~ U(scale) and the crop are one resampling of a window of about 1/z the crop's size: antialiased
    bilinear for the picture, nearest pixel centre for the others. Where the window leaves the picture the result is
    padded. Brightness, contrast, saturation and hue change in that order, before the padding.

    Args:
        image: [3, H, W] uint8 RGB.
        label: [H, W] uint8 ids.
        confidence: [H, W] uint8, 255 = certain.
        config: ranges of the random changes.
        generator: CPU generator; the same number of values is drawn whatever the configuration.

    Returns:
        image: [3, h, w] float32 in [0, 1], padded with 0; (h, w) is the crop, or (H, W) without one.
        label: [h, w] uint8, padded with IGNORE.
        confidence: [h, w] uint8, padded with 0.
    """
    zoom, down, across, mirror, *colours = torch.rand(8, generator=generator, dtype=torch.float64).tolist()
    height, width = config.crop or image.shape[-2:]
    zoom = _between(*config.scale, zoom)
    window = _span(image.shape[-2], height, zoom, down), _span(image.shape[-1], width, zoom, across)
    flip = config.flip and mirror < 0.5

    picture = _cut(image, window, InterpolationMode.BILINEAR)
    picture = _recolour(picture.float().div_(255), config, colours)
    return _frame(picture, window, flip, 0), _follow(label, window, flip, IGNORE), _follow(confidence, window, flip, 0)


def _between(low: float, high: float, draw: float) -> float:
    return low + (high - low) * draw


def _span(length: int, size: int, zoom: float, draw: float) -> _Span:
    """`size` output pixels of an axis of `length` source pixels: the window's place is uniform over all that fit."""
    reach = max(1, round(size / zoom))
    start = min(0, length - reach) + int(draw * (abs(length - reach) + 1))
    first, last = max(0, start), min(length, start + reach)
    before = min(size - 1, round((first - start) * size / reach))
    kept = max(1, round((last - start) * size / reach) - before)
    return _Span(first, last, before, kept, size - before - kept)


def _cut(picture: Tensor, window: tuple[_Span, _Span], interpolation: InterpolationMode) -> Tensor:
    """Resample the visible part of the window: [C, H, W] -> [C, kept, kept]."""
    rows, columns = window
    part = picture[:, rows.start : rows.stop, columns.start : columns.stop].contiguous()
    resized: Tensor = F.resize(part, [rows.kept, columns.kept], interpolation=interpolation, antialias=True)
    return resized


def _frame(picture: Tensor, window: tuple[_Span, _Span], flip: bool, fill: int) -> Tensor:
    """Pad to the crop's size, then mirror."""
    rows, columns = window
    border = [columns.before, columns.after, rows.before, rows.after]
    if any(border):
        picture = torch.nn.functional.pad(picture, border, value=fill)
    return picture.flip(-1) if flip else picture


def _follow(plane: Tensor | None, window: tuple[_Span, _Span], flip: bool, fill: int) -> Tensor | None:
    """The same geometry for a label or a confidence [H, W]; values are picked, never blended."""
    if plane is None:
        return None
    # NEAREST_EXACT takes the source pixel under the output pixel's centre, as bilinear does; NEAREST is off by half.
    return _frame(_cut(plane[None], window, InterpolationMode.NEAREST_EXACT), window, flip, fill)[0]


def _recolour(image: Tensor, config: AugmentConfig, draws: list[float]) -> Tensor:
    """Brightness, contrast, saturation and hue of a [3, h, w] picture in [0, 1]; a strength of 0 leaves it alone."""
    brightness, contrast, saturation, hue = draws
    if config.brightness:
        image = F.adjust_brightness(image, _factor(config.brightness, brightness))
    if config.contrast:
        image = _adjust_contrast(image, _factor(config.contrast, contrast))
    if config.saturation:
        image = F.adjust_saturation(image, _factor(config.saturation, saturation))
    if config.hue:
        image = F.adjust_hue(image, _between(-config.hue, config.hue, hue))
    return image


def _factor(strength: float, draw: float) -> float:
    return _between(max(0.0, 1 - strength), 1 + strength, draw)


def _adjust_contrast(image: Tensor, factor: float) -> Tensor:
    """Blend with the mean grey level, as torchvision does, but with a mean in whole 255ths.

    A sum of integers does not depend on how many threads share it, so that values do not depend on the workers.
    """
    grey = F.rgb_to_grayscale(image).mul_(255).round_()
    level = int(grey.to(torch.uint8).sum()) / (255 * grey.numel())
    return (image * factor).add_((1 - factor) * level).clamp_(0, 1)
