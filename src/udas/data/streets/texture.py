"""Noise and hashes that textures are made of."""

from __future__ import annotations

from functools import cache

import numpy as np

from udas.data.streets.camera import Floats

TILE = 256  # cells along a side of the noise tile
GRAIN, CLOUDS = 0.7, 1.7  # exponents of the spectrum: rough and smooth


@cache
def noise_tile(steepness: float) -> Floats:
    """[TILE * TILE] periodic noise with amplitude 1 / frequency^steepness, mean 0, standard deviation 1."""
    rng = np.random.default_rng(7)
    frequency = np.fft.fftfreq(TILE)
    radius = np.hypot(frequency[:, None], frequency[None, :])
    radius[0, 0] = np.inf
    spectrum = np.fft.fft2(rng.standard_normal((TILE, TILE))) / radius**steepness
    rough = np.fft.ifft2(spectrum).real
    tile: Floats = (rough / rough.std()).astype(np.float32).ravel()
    return tile


def noise(u: Floats, v: Floats, scale: float, steepness: float = GRAIN) -> Floats:
    """The noise tile at coordinates in metres, `scale` cells a metre."""
    rows = (u * scale).astype(np.int32) & (TILE - 1)
    columns = (v * scale).astype(np.int32) & (TILE - 1)
    return noise_tile(steepness)[rows * TILE + columns]


def hashed(*parts: Floats) -> Floats:
    """Pseudo-random numbers in [0, 1) from whole numbers."""
    total = np.zeros(len(parts[0]), np.uint32)
    for part in parts:
        total += part.astype(np.int32).view(np.uint32)
        total *= np.uint32(2654435761)  # Knuth's multiplicative hash; wraps at 2^32
        total ^= total >> np.uint32(15)
    return (total & np.uint32(1023)).astype(np.float32) / np.float32(1024)


def part(x: Floats) -> Floats:
    """The part after the point, x - floor(x): many times faster than x % 1."""
    return x - np.floor(x)


def fade(depth: Floats, reach: float) -> Floats:
    """1 close by, towards 0 where a texture is finer than a pixel."""
    return reach / (reach + depth)
