"""The amplitude swap: the formula on the whole, shifted spectrum in NumPy, and what it must leave alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from udas.data.fourier import swap_amplitude

SIZES = [(32, 48), (33, 47), (31, 20), (20, 31)]


def pictures(seed, height, width, count=2, low=0.4, high=0.6):
    """Noise around grey: little enough for no value to leave [0, 1], so that nothing is clipped."""
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(count, 3, height, width, generator=generator)


def by_hand(source, target, beta):
    """One plane after the other: zero frequency moved to the middle, the square around it copied pixel by pixel."""
    height, width = source.shape[-2:]
    reach, middle = int(np.floor(beta * min(height, width))), (height // 2, width // 2)
    result = np.zeros(source.shape)
    for plane in np.ndindex(source.shape[:2]):
        mine, theirs = (np.fft.fftshift(np.fft.fft2(x[plane].double().numpy())) for x in (source, target))
        amplitude = np.abs(mine)
        for y, x in np.ndindex(height, width):
            if abs(y - middle[0]) <= reach and abs(x - middle[1]) <= reach:
                amplitude[y, x] = np.abs(theirs[y, x])
        spectrum = amplitude * np.exp(1j * np.angle(mine))
        result[plane] = np.real(np.fft.ifft2(np.fft.ifftshift(spectrum)))
    return torch.from_numpy(result).float()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("beta", [0.001, 0.05, 0.1, 0.3])
def test_is_the_formula(size, beta):
    source, target = pictures(1, *size), pictures(2, *size)
    torch.testing.assert_close(swap_amplitude(source, target, beta), by_hand(source, target, beta), rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
def test_the_window_is_centred_and_the_phase_stays(size):
    source, target, beta = pictures(1, *size), pictures(2, *size), 0.15
    reach = int(beta * min(size))
    mine, theirs, made = (torch.fft.fft2(x.double()) for x in (source, target, swap_amplitude(source, target, beta)))
    rows, columns = (torch.fft.fftfreq(length) * length for length in size)
    window = (rows.abs() <= reach + 0.5)[:, None] & (columns.abs() <= reach + 0.5)
    assert window.sum() == (2 * reach + 1) ** 2
    expected = torch.where(window, theirs.abs(), mine.abs()) * mine / mine.abs()
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_nothing_happens_without_a_window_or_a_difference(size):
    source, target = torch.rand(2, 3, *size), torch.rand(2, 3, *size)
    assert torch.equal(swap_amplitude(source, target, 0), source)
    torch.testing.assert_close(swap_amplitude(source, source, 0.3), source)


def test_the_smallest_window_is_the_mean_colour():
    source, target = pictures(1, 24, 40), pictures(2, 24, 40, low=0.2, high=0.3)
    moved = swap_amplitude(source, target, 1e-6)
    torch.testing.assert_close(moved.mean((2, 3)), target.mean((2, 3)))
    torch.testing.assert_close(moved - source, (target - source).mean((2, 3), keepdim=True).expand_as(source))


def test_the_largest_window_takes_every_amplitude():
    source, target = pictures(1, 24, 41), pictures(2, 24, 41)
    made = swap_amplitude(source, target, 1.0)
    torch.testing.assert_close(torch.fft.fft2(made).abs(), torch.fft.fft2(target).abs(), rtol=0, atol=1e-3)


def test_a_black_picture_takes_the_mean_colour_on():
    """Its phases are undefined; they count as zero."""
    target = pictures(2, 16, 16)
    made = swap_amplitude(torch.zeros_like(target), target, 0.01)
    torch.testing.assert_close(made, target.mean((2, 3), keepdim=True).expand_as(target))


def test_another_size_is_fitted_and_pictures_are_kept():
    source, target = torch.rand(2, 3, 24, 40), torch.rand(2, 3, 48, 60)
    kept = source.clone(), target.clone()
    made = swap_amplitude(source, target, 0.1)
    assert made.shape == source.shape
    assert 0 <= made.min() <= made.max() <= 1
    torch.testing.assert_close((source, target), kept, rtol=0, atol=0)
    flat = torch.full((2, 3, 48, 60), 0.25)  # a sum over four times the pixels would be four times as bright
    torch.testing.assert_close(swap_amplitude(pictures(1, 24, 30), flat, 1e-6).mean(), torch.tensor(0.25))


def test_a_larger_target_is_averaged_instead_of_skipped():
    stripes = torch.tensor([0.8, 0.2, 0.2, 0.8]).repeat(40).expand(2, 3, 96, 160)
    made = swap_amplitude(pictures(1, 24, 40), stripes, 1e-6)
    torch.testing.assert_close(made.mean(), torch.tensor(0.5), rtol=0, atol=0.02)


def test_pictures_do_not_see_each_other_or_the_autocast():
    source, target = pictures(1, 24, 40, 3), pictures(2, 24, 40, 3)
    together = swap_amplitude(source, target, 0.1)
    for k in range(3):
        torch.testing.assert_close(swap_amplitude(source[k : k + 1], target[k : k + 1], 0.1), together[k : k + 1])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(swap_amplitude(source, target, 0.1), together)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_the_device_computes_the_same():
    source, target = pictures(1, 33, 47), pictures(2, 40, 60)
    here, there = swap_amplitude(source, target, 0.1), swap_amplitude(source.cuda(), target.cuda(), 0.1)
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-5)
