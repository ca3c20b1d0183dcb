"""Poles and what hangs on them: lamps, signs, traffic lights."""

from __future__ import annotations

import numpy as np

from udas.data.streets.camera import Floats
from udas.data.streets.canvas import Canvas, Label, Layer
from udas.data.streets.figures import Outline, disc, padded, pick, upright
from udas.data.streets.looks import Look, rgb

CORNERS = 10
WHITE, RED, BLUE, YELLOW, BLACK, GREEN, BOX = rgb("f0f0f0", "cc1e22", "1e50b4", "ffc814", "141414", "0a7850", "1c1e1c")
LAMPS = rgb("ff3020", "ffb020", "28e070")

Place = tuple[float, float]


def _rectangle(x: float, y: float, wide: float, high: float) -> Outline:
    left, right, low, top = x - wide / 2, x + wide / 2, y - high / 2, y + high / 2
    return [(left, low), (right, low), (right, top), (left, top)]


def pole(canvas: Canvas, colour: Floats, place: Place, height: float, wide: float = 0.2) -> None:
    """A post with a lit and a dark half, so that it looks round."""
    light = [(-wide / 2, 0.0), (0.0, 0.0), (0.0, height), (-wide / 2, height)]
    dark = [(0.0, 0.0), (wide / 2, 0.0), (wide / 2, height), (0.0, height)]
    base = _rectangle(0, 0.25, wide * 1.35, 0.5)
    shades = np.stack([colour, colour * 0.68, colour * 0.8])
    canvas.add(upright(padded([light, dark, base], 4), place), shades, Label.POLE, Layer.STREET, place[1])


def lamp(canvas: Canvas, rng: np.random.Generator, place: Place, colour: Floats) -> None:
    """A street lamp whose arm reaches over the road (towards x = 0)."""
    height, reach = rng.uniform(6.0, 8.5), rng.uniform(1.4, 2.6) * (-1 if place[0] > 0 else 1)
    pole(canvas, colour, place, height, 0.24)
    arm = [(0.0, height - 0.12), (reach, height + 0.3), (reach, height + 0.46), (0.0, height + 0.08)]
    head = _rectangle(reach, height + 0.32, 0.9, 0.24)
    canvas.add(
        upright(padded([arm, head], 4), place),
        np.stack([colour * 0.9, colour * 0.6]),
        Label.POLE,
        Layer.STREET,
        place[1],
    )


def sign(canvas: Canvas, rng: np.random.Generator, look: Look, place: Place, colour: Floats) -> None:
    """One or two road signs on a post."""
    height = rng.uniform(2.2, 3.0)
    pole(canvas, colour, place, height + 0.3, 0.14)
    faces = _american if look.layout.american else _european
    outlines, colours = faces(rng, height)
    canvas.add(upright(padded(outlines, CORNERS), place), np.stack(colours), Label.SIGN, Layer.STREET, place[1] - 0.1)


def _european(rng: np.random.Generator, y: float) -> tuple[list[Outline], list[Floats]]:
    kind, r = int(rng.integers(5)), 0.48
    if kind == 0:
        return [_triangle(y, 0.62), _triangle(y - 0.02, 0.38)], [RED, WHITE]
    if kind == 1:
        return [disc(0, y, r, CORNERS), disc(0, y, r * 0.68, CORNERS), _rectangle(0, y, 0.26, 0.3)], [RED, WHITE, BLACK]
    if kind == 2:
        return [disc(0, y, r, CORNERS), _rectangle(0, y, 0.18, 0.5)], [BLUE, WHITE]
    if kind == 3:
        return [disc(0, y, r, CORNERS), _rectangle(0, y, 0.66, 0.18)], [RED, WHITE]
    letter = [_rectangle(-0.05, y + 0.02, 0.18, 0.55), _rectangle(0.1, y + 0.16, 0.26, 0.24)]
    return [_rectangle(0, y, 0.85, 0.85), *letter], [BLUE, WHITE, WHITE]


def _american(rng: np.random.Generator, y: float) -> tuple[list[Outline], list[Floats]]:
    kind, r = int(rng.integers(4)), 0.55
    if kind == 0:
        return [disc(0, y, r, 8), disc(0, y, r * 0.88, 8), _rectangle(0, y, 0.6, 0.2)], [WHITE, RED, WHITE]
    if kind == 1:
        diamond = [(0.0, y - 0.65), (0.65, y), (0.0, y + 0.65), (-0.65, y)]
        return [diamond, _rectangle(0, y, 0.14, 0.55)], [YELLOW, BLACK]
    if kind == 2:
        text = [_rectangle(0, y + 0.2, 0.5, 0.12), _rectangle(0, y - 0.15, 0.4, 0.35)]
        return [_rectangle(0, y, 0.75, 1.0), *text], [WHITE, BLACK, BLACK]
    return [_rectangle(0, y, 1.7, 0.6), _rectangle(0, y, 1.4, 0.14)], [GREEN, WHITE]


def _triangle(y: float, size: float) -> Outline:
    return [(-size, y - size * 0.6), (size, y - size * 0.6), (0.0, y + size)]


def traffic_light(canvas: Canvas, rng: np.random.Generator, place: Place, colour: Floats) -> None:
    """A signal beside the road and, on tall posts, a second one on an arm above it."""
    tall = rng.random() < 0.5
    height = rng.uniform(5.2, 6.0) if tall else 3.4
    pole(canvas, colour, place, height, 0.2)
    lit = int(rng.integers(3))
    _signal(canvas, place, (0.0, 2.9), lit)
    if tall:
        reach = rng.uniform(2.0, 3.6) * (-1 if place[0] > 0 else 1)
        arm = [_rectangle(reach / 2, height, abs(reach), 0.16)]
        canvas.add(upright(padded(arm, 4), place), colour * 0.9, Label.POLE, Layer.STREET, place[1])
        _signal(canvas, place, (reach, height - 0.2), lit)


def _signal(canvas: Canvas, place: Place, at: Place, lit: int) -> None:
    x, y = at
    outlines = [_rectangle(x, y, 0.48, 1.2), *(disc(x, y + up, 0.16, CORNERS) for up in (0.38, 0.0, -0.38))]
    colours = np.concatenate([BOX[None], LAMPS * np.where(np.arange(3) == lit, 1.0, 0.22)[:, None]])
    canvas.add(upright(padded(outlines, CORNERS), place), colours, Label.SIGN, Layer.STREET, place[1] - 0.1)


def pole_colour(rng: np.random.Generator, look: Look) -> Floats:
    """All the poles of one street share a colour."""
    return pick(rng, look.palette.pole, look.palette.spread)
