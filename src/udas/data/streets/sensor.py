"""What the air, the lens, the chip and the file format do to a picture of the `camera` look."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from udas.data.streets.camera import Floats
from udas.data.streets.looks import Look, Sensor

GRAIN = 512  # side of the noise tile, pixels
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Fog:
    """density: 1 / metres; colour: [3] in [0, 1]."""

    density: float
    colour: Floats


def draw_fog(rng: np.random.Generator, look: Look) -> Fog | None:
    """Draw the fog of one picture; a game has none."""
    if look.sensor is None:
        return None
    low, high = look.sensor.fog
    colour = look.palette.horizon.mean(0) * np.float32(rng.uniform(0.85, 1.0))
    return Fog(low * (high / low) ** rng.random(), colour)


def in_fog(colour: Floats, depth: Floats, fog: Fog | None) -> Floats:
    """Koschmieder's law: c exp(-k d) + fog (1 - exp(-k d)); colour [..., 3], depth [...] in metres."""
    if fog is None:
        return colour
    clear = np.exp(np.float32(-fog.density) * np.minimum(depth, 150))[..., None]
    veiled = colour - fog.colour
    veiled *= clear
    veiled += fog.colour
    return veiled


def photograph(colour: Floats, sensor: Sensor, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Exposure, white balance, vignetting, blur, noise and JPEG compression; [H, W, 3] in [0, 1] to bytes."""
    height, width = colour.shape[:2]
    exposed = (colour.reshape(-1, 3) @ _response(sensor, rng)).reshape(colour.shape)
    exposed *= _vignette(height, width, rng.uniform(*sensor.vignette))
    image = Image.fromarray(_developed(exposed, rng.uniform(*sensor.gamma)))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*sensor.blur) * width / 256))
    grain = _grain(height, width, rng) * np.float32(255 * rng.uniform(*sensor.noise))
    noisy = np.clip(np.asarray(image, np.float32) + grain, 0, 255).astype(np.uint8)
    return _compressed(noisy, int(rng.integers(*sensor.jpeg)))


@cache
def _grain_tile() -> Floats:
    return np.random.default_rng(11).standard_normal((GRAIN, GRAIN, 3), np.float32)


def _grain(height: int, width: int, rng: np.random.Generator) -> Floats:
    """Normal noise [H, W, 3]: a random cut of a tile that is drawn once, since drawing takes longer than rendering."""
    top, left = rng.integers(GRAIN, size=2)
    return (
        _grain_tile()
        .take(range(top, top + height), axis=0, mode="wrap")
        .take(range(left, left + width), axis=1, mode="wrap")
    )


def _developed(exposed: Floats, gamma: float) -> NDArray[np.uint8]:
    """The tone curve, from a table of 1024 steps."""
    table = (255 * np.linspace(0, 1, 1024) ** gamma).astype(np.uint8)
    return table[np.clip(exposed * 1023, 0, 1023).astype(np.int16)]


def _response(sensor: Sensor, rng: np.random.Generator) -> Floats:
    """Exposure, white balance and saturation as one matrix [3, 3] on row vectors (red, green, blue)."""
    warmth, tint = rng.uniform(*sensor.warmth), rng.normal(0, sensor.tint / 2)
    gains = rng.uniform(*sensor.exposure) * np.array([1 + warmth / 2, 1 + tint, 1 - warmth / 2])
    saturation = rng.uniform(*sensor.saturation)
    mixed = saturation * np.eye(3) + (1 - saturation) * LUMA[:, None]  # towards the grey of equal luma
    return (gains[:, None] * mixed).astype(np.float32)


def _vignette(height: int, width: int, strength: float) -> Floats:
    """Light falls off towards the corners, [H, W, 1]."""
    rows, columns = np.linspace(-1, 1, height, dtype=np.float32), np.linspace(-1, 1, width, dtype=np.float32)
    return (1 - np.float32(strength / 2) * (rows[:, None] ** 2 + columns[None, :] ** 2))[..., None]


def _compressed(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"))
