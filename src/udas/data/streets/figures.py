"""People and trees: flat figures that stand upright across the street."""

from __future__ import annotations

from math import cos, pi, sin

import numpy as np

from udas.data.streets.camera import Floats
from udas.data.streets.canvas import Canvas, Label, Layer, Material, Points
from udas.data.streets.looks import Palette, rgb

SHOE = rgb("1c1a1a")[0]
CORNERS = 8
LEAF_CORNERS = 14

BOLE = np.array([[(-0.16, 0.0), (0.16, 0.0), (0.1, 3.0), (-0.1, 3.0)]], np.float32)

Outline = list[tuple[float, float]]


def pick(rng: np.random.Generator, colours: Floats, spread: float) -> Floats:
    """One of the colours [N, 3], slightly lighter or darker and a little off, as [3]."""
    off = rng.standard_normal(4) * spread
    colour = colours[int(rng.random() * len(colours))] + off[0] + 0.4 * off[1:]
    drawn: Floats = np.minimum(np.maximum(colour, 0), 1).astype(np.float32)
    return drawn


def padded(outlines: list[Outline], corners: int) -> Floats:
    """Outlines of few corners as [N, corners, 2]: the last corner is repeated."""
    return np.array([outline + outline[-1:] * (corners - len(outline)) for outline in outlines], np.float32)


def upright(outlines: Floats, place: tuple[float, float], scale: float = 1.0) -> Points:
    """Outlines [N, K, 2] of (x, y) standing at (x, z): [N, K, 3]."""
    points = np.empty((*outlines.shape[:2], 3), np.float32)
    points[..., :2] = outlines * np.float32(scale)
    points[..., 0] += place[0]
    points[..., 2] = place[1]
    return points


def disc(x: float, y: float, radius: float, corners: int = CORNERS) -> Outline:
    """A regular polygon."""
    angles = (np.arange(corners) + 0.5) * 2 * pi / corners
    return list(zip((x + radius * np.cos(angles)).tolist(), (y + radius * np.sin(angles)).tolist(), strict=True))


def person(canvas: Canvas, rng: np.random.Generator, palette: Palette, place: tuple[float, float]) -> None:
    """A pedestrian at (x, z), walking, with legs, arms, head and hair in proportion."""
    top, legs = (pick(rng, palette.cloth, palette.spread) for _ in range(2))
    skin, hair = pick(rng, palette.skin, 0.02), pick(rng, palette.hair, 0.02)
    stride, swing = rng.uniform(-0.13, 0.13), rng.uniform(0.4, 1)
    outlines: list[Outline] = [
        *_leg(-0.045, stride), *_leg(0.045, -stride),
        _arm(-0.1, -stride * swing), _torso(rng.uniform(0.42, 0.5)), _arm(0.1, stride * swing),
        [(-0.02, 0.8), (0.02, 0.8), (0.02, 0.87), (-0.02, 0.87)],
        disc(0, 0.925, 0.062), [(-0.062, 0.92), (0.062, 0.92), (0.055, 0.975), (0.0, 1.0), (-0.055, 0.975)],
    ]  # fmt: skip
    colours = np.stack([legs, SHOE, legs * 0.9, SHOE, top * 0.8, top, top * 0.85, skin, skin, hair])
    height = rng.uniform(1.5, 1.92) * (0.7 if rng.random() < 0.1 else 1)
    canvas.add(upright(padded(outlines, CORNERS), place, height), colours, Label.PERSON, Layer.STREET, place[1])
    _blob_shadow(canvas, place, 0.45)


def _leg(hip: float, stride: float) -> list[Outline]:
    foot = hip + stride
    leg = [(hip - 0.045, 0.5), (hip + 0.045, 0.5), (foot + 0.03, 0.03), (foot - 0.03, 0.03)]
    return [leg, [(foot - 0.035, 0.04), (foot + 0.06, 0.03), (foot + 0.06, 0.0), (foot - 0.035, 0.0)]]


def _torso(hem: float) -> Outline:
    return [
        (-0.1, 0.82),
        (0.1, 0.82),
        (0.115, 0.78),
        (0.095, 0.6),
        (0.1, hem),
        (-0.1, hem),
        (-0.095, 0.6),
        (-0.115, 0.78),
    ]


def _arm(shoulder: float, swing: float) -> Outline:
    hand = shoulder * 1.35 + swing
    return [(shoulder - 0.03, 0.81), (shoulder + 0.03, 0.81), (hand + 0.025, 0.45), (hand - 0.025, 0.45)]


def _blob_shadow(canvas: Canvas, place: tuple[float, float], radius: float) -> None:
    flat = np.array([[(x, 0, y * 0.6) for x, y in disc(0, 0, radius)]], np.float32)
    shift = np.array([place[0], 0, place[1]], np.float32)
    canvas.add(flat + shift, np.full(3, 0.65), Label.ROAD, Layer.SHADOW, place[1], Material.GROUND)


def tree(
    canvas: Canvas,
    rng: np.random.Generator,
    palette: Palette,
    place: tuple[float, float],
    layer: Layer,
    palm: bool = False,
) -> None:
    """A broad tree, a conifer or a palm at (x, z)."""
    leaves, trunk = pick(rng, palette.leaves, palette.spread), pick(rng, palette.trunk, palette.spread)
    if palm:
        outlines, shades = _palm(rng)
    elif rng.random() < 0.2:
        outlines, shades = _conifer(rng)
    else:
        outlines, shades = _crown(rng)
    scale = rng.uniform(0.75, 1.25)
    canvas.add(upright(BOLE, place, scale), trunk, Label.VEGETATION, layer, place[1] + 0.02)
    crown = upright(outlines, place, scale)
    canvas.add(crown, leaves * shades[:, None], Label.VEGETATION, layer, place[1], Material.LEAVES)
    if layer == Layer.STREET:
        _blob_shadow(canvas, place, 1.8 * scale)


def _clumps(rng: np.random.Generator, x: Floats, y: Floats, radius: Floats) -> Floats:
    """Ragged discs around (x, y), each [N], as [N, LEAF_CORNERS, 2]."""
    angles = np.arange(LEAF_CORNERS) * 2 * pi / LEAF_CORNERS + rng.random((len(x), 1))
    radii = radius[:, None] * rng.uniform(0.78, 1.18, (len(x), LEAF_CORNERS))
    corners = np.stack([x[:, None] + radii * np.cos(angles), y[:, None] + 0.9 * radii * np.sin(angles)], -1)
    return corners.astype(np.float32)


def _crown(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Dark clumps at the bottom and the rim, light ones on top: outlines [N, LEAF_CORNERS, 2] and shades [N]."""
    wide, high = rng.uniform(1.2, 2.0), rng.uniform(1.2, 2.2)
    across, up, size, tone = rng.random((4, 7)) * 2 - 1
    across[0], up[0] = 0, 0
    radius = wide * (0.62 + 0.18 * size)
    radius[0] = wide * 1.1
    shades = 0.86 + 0.18 * up + 0.06 * tone
    shades[0] = 0.72
    return _clumps(rng, 0.8 * wide * across, 3.0 + high * (1 + 0.75 * up), radius), shades.astype(np.float32)


def _conifer(rng: np.random.Generator) -> tuple[Floats, Floats]:
    width, tiers = rng.uniform(1.2, 1.8), 4
    outlines: list[Outline] = []
    for tier in range(tiers):
        low, half = 1.2 + 1.5 * tier, width * (1 - tier / (tiers + 0.6))
        skirt = [(-half, low), (-half * 0.5, low - 0.12), (0.0, low - 0.25), (half * 0.5, low - 0.12), (half, low)]
        outlines.append([*skirt, (half * 0.45, low + 1.0), (0.0, low + 2.3), (-half * 0.45, low + 1.0)])
    return padded(outlines, LEAF_CORNERS), np.linspace(0.7, 1.0, tiers, dtype=np.float32)


def _palm(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """A tall stem (drawn as part of the crown) and drooping fronds."""
    top = rng.uniform(5.5, 7.5)
    outlines: list[Outline] = [[(-0.14, 2.5), (0.14, 2.5), (0.1, top), (-0.1, top)]]
    for angle in np.linspace(-0.35, pi + 0.35, 9).tolist():
        x, y = 2.2 * cos(angle), sin(angle)
        tip = (x, top + y * 0.6 - 0.7)
        outlines.append([(0, top - 0.12), (x * 0.55, top + y + 0.1), tip, (x * 0.55, top + y - 0.4)])
    shades = rng.uniform(0.8, 1.1, len(outlines)).astype(np.float32)
    shades[0] = 0.62
    return padded(outlines, LEAF_CORNERS), shades


def hedge(
    canvas: Canvas, rng: np.random.Generator, palette: Palette, side: float, x: float, span: tuple[float, float]
) -> None:
    """A row of bushes along the front x of a plot, for z in `span`."""
    leaves = pick(rng, palette.leaves, palette.spread)
    low = rng.uniform(0.8, 1.6)
    face = np.array([[(x, 0, span[0]), (x, 0, span[1]), (x, low, span[1]), (x, low, span[0])]], np.float32)
    end = np.array([[(x, 0, span[0]), (x + side, 0, span[0]), (x + side, low, span[0]), (x, low, span[0])]], np.float32)
    canvas.add(np.concatenate([end, face]), leaves, Label.VEGETATION, Layer.PLOT, span[0], Material.LEAVES)
    stops = np.arange(span[1], span[0], -rng.uniform(1.2, 2.2)).tolist()
    bushes = _clumps(
        rng, np.full(len(stops), 0.3 * side), np.full(len(stops), 0.9 * low), rng.uniform(0.4, 0.7, len(stops))
    )
    for z, bush in zip(stops, bushes, strict=True):
        shade = leaves * rng.uniform(0.85, 1.1)
        canvas.add(upright(bush[None], (x, z)), shade, Label.VEGETATION, Layer.PLOT, z, Material.LEAVES)
