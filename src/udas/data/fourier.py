"""Fourier domain adaptation: a picture takes over the low frequencies' amplitudes of a picture of the other domain.

Source: FDA (Yang and Soatto, CVPR 2020, section 3.1).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def swap_amplitude(source: Tensor, target: Tensor, beta: float) -> Tensor:
    """x_{s->t} = F^-1(A, P_s), A = A_t where |u|, |v| <= b and A_s elsewhere; A: amplitude, P: phase, per channel.

    b = floor(beta min(H, W)), so that the window around frequency zero has 2b + 1 rows and columns: with b = 0 the
    mean colour alone is taken over. `beta` = 0 leaves the picture as it is. Nothing is changed in place.

    Args:
        source: [B, 3, H, W] in [0, 1], before normalisation.
        target: [B, 3, h, w] in [0, 1], resized to the size of `source` where it differs.
        beta: size of the window as a share of the shorter side, 0 to 1.

    Returns:
        [B, 3, H, W], clipped to [0, 1].
    """
    if beta == 0:
        return source
    height, width = source.shape[-2:]
    if target.shape[-2:] != source.shape[-2:]:
        target = F.interpolate(target, size=(height, width), mode="bilinear", antialias=True)
    reach = math.floor(beta * min(height, width))
    mine, theirs = torch.fft.rfft2(source), torch.fft.rfft2(target)
    mixed = torch.where(_window(mine, height, reach), torch.polar(theirs.abs(), mine.angle()), mine)
    restyled: Tensor = torch.fft.irfft2(mixed, s=(height, width))
    return restyled.clamp(0, 1)


def _window(spectrum: Tensor, height: int, reach: int) -> Tensor:
    """[H, W // 2 + 1] bool: frequencies of a real picture's half spectrum that lie at most `reach` from zero.

    The half that is not stored mirrors this one, so the window stays symmetric and the picture real.
    """
    rows, columns = (torch.arange(length, device=spectrum.device) for length in spectrum.shape[-2:])
    return (torch.minimum(rows, height - rows) <= reach)[:, None] & (columns <= reach)
