"""The ground: which class and colour every place (x, z) of the street has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from udas.data.streets.camera import Floats
from udas.data.streets.canvas import Label
from udas.data.streets.figures import pick
from udas.data.streets.looks import Look
from udas.data.streets.street import Street
from udas.data.streets.texture import fade, noise, part

KERB = 0.28  # metres
CORNER = 3.0  # radius of the kerb at a crossing, metres
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class GroundPaints:
    """Colours [3] of one picture's ground, in [0, 1]."""

    road: Floats
    marking: Floats
    centre_line: Floats
    walk: Floats
    grass: Floats


def draw_ground(rng: np.random.Generator, look: Look) -> GroundPaints:
    """Draw the colours of one picture's ground."""
    palette, spread = look.palette, look.palette.spread
    road, marking, centre_line = (pick(rng, c, spread) for c in (palette.road, palette.marking, palette.centre_line))
    return GroundPaints(road, marking, centre_line, pick(rng, palette.walk, spread), pick(rng, palette.grass, spread))


@dataclass(frozen=True)
class Ground:
    """Places [P] on the ground: x and z in metres, `aside` the distance from the middle of the straightened road."""

    x: Floats
    z: Floats
    depth: Floats
    aside: Floats

    def at(self, where: NDArray[np.int64]) -> Ground:
        """Some of the places."""
        return Ground(self.x[where], self.z[where], self.depth[where], self.aside[where])


def paint_ground(
    x: Floats, z: Floats, depth: Floats, look: Look, street: Street, paints: GroundPaints
) -> tuple[Floats, NDArray[np.uint8]]:
    """Colour [P, 3] and class [P] of places on the ground, given in metres."""
    straight = x - street.bend / 2 * z * np.abs(z)
    ground = Ground(straight, z, depth, np.abs(straight))
    outside = _outside(ground, street)
    grass = _grass(ground, street, outside)
    kinds = (Label.ROAD, outside <= 0), (Label.SIDEWALK, (outside > 0) & ~grass), (Label.VEGETATION, grass)
    label, colour = np.empty(len(x), np.uint8), np.empty((len(x), 3), np.float32)
    for kind, mask in kinds:
        where = np.flatnonzero(mask)
        places = ground.at(where)
        label[where] = kind
        if kind == Label.ROAD:
            colour[where] = _road(places, street, look, paints)
        elif kind == Label.SIDEWALK:
            colour[where] = _pavement(places, outside[where], look, paints.walk)
        else:
            colour[where] = _lawn(places, look, paints.grass)
    return colour, label


def _outside(ground: Ground, street: Street) -> Floats:
    """How far a place is from the road, in metres; not positive on the road."""
    outside = ground.aside - street.half
    if street.junction is None:
        return outside
    near, far = street.junction
    away = np.maximum(near - ground.z, ground.z - far)
    reach, beyond = np.maximum(CORNER - outside, 0), np.maximum(CORNER - away, 0)
    corner = CORNER - np.sqrt(reach * reach + beyond * beyond)  # kerbs of two roads meet in an arc
    apart: Floats = np.where((outside > 0) & (away > 0), corner, np.minimum(outside, away))
    return apart


def _grass(ground: Ground, street: Street, outside: Floats) -> Mask:
    """The strip along the kerb, and yards behind the front of the plots."""
    grass = np.zeros(len(ground.x), bool)
    for side in (0, 1):
        here = (ground.x > 0) == bool(side)
        strip = (ground.aside > street.half + KERB) & (ground.aside < street.half + street.verge[side])
        yard = (ground.aside > street.front[side]) & street.grassy[side]
        grass |= here & (strip | yard) & (outside > KERB)
    if street.junction:
        near, far = street.junction
        grass &= (ground.z < near - street.walk) | (ground.z > far + street.walk)
    return grass


def _road(ground: Ground, street: Street, look: Look, paints: GroundPaints) -> Floats:
    """Asphalt with grain, stains and patches, polished by tyres in the middle of the lanes; markings on top."""
    grain, x, z = look.light.grain, ground.x, ground.z
    lane = street.half / street.lanes
    tone = 1 + grain * (0.07 * noise(x, z, 14) * fade(ground.depth, 10))
    stains = noise(x, z * 0.5, 1.5)
    tone += grain * (0.06 * stains + 0.05 * np.cos(np.abs(part(ground.aside / lane) - 0.5) * 12) - 0.1 * (stains > 1.7))
    colour = paints.road * tone[:, None]
    _mark(colour, ground, street, look, paints)
    return colour


def _pavement(ground: Ground, outside: Floats, look: Look, walk: Floats) -> Floats:
    """Slabs with joints that vanish in the distance, and the kerb."""
    x, z, near = ground.x, ground.z, fade(ground.depth, 12)
    joints = (part(x / 0.9) < 0.07) | (part(z / 0.9) < 0.07)
    slab = noise(np.floor(x / 0.9), np.floor(z / 0.9), 3.7)
    tone = 1 - 0.22 * joints * near + look.light.grain * (0.05 * noise(x, z, 8) * near + 0.04 * slab)
    colour = walk * tone[:, None]
    kerb = outside < KERB
    colour[kerb] = colour[kerb] * 0.5 + 0.36
    return colour


def _lawn(ground: Ground, look: Look, grass: Floats) -> Floats:
    tone = 1 + look.light.grain * fade(ground.depth, 15) * 0.16 * noise(ground.x, ground.z, 11)
    return grass * tone[:, None]


def _mark(colour: Floats, ground: Ground, street: Street, look: Look, paints: GroundPaints) -> None:
    """Paint centre line, lanes, edges and crossings onto the road, worn by the texture."""
    free, crossing = _main_road(ground, street)
    centre = _centre_line(ground, street) & free
    lines = _lane_lines(ground, street) & free | crossing
    worn = noise(ground.x, ground.z, 3) > 1.9 - look.light.grain * 0.6
    for mask, paint in ((centre, paints.centre_line), (lines, paints.marking)):
        colour[mask & ~worn] = paint


def _main_road(ground: Ground, street: Street) -> tuple[Mask, Mask]:
    """Where lane lines run, and the zebra crossing with its stop line before a junction."""
    on_main = ground.aside < street.half - 0.2
    if street.junction is None:
        return on_main, np.zeros_like(on_main)
    near, far = street.junction
    free = on_main & ((ground.z < near - 4.6) | (ground.z > far + 4.2))
    stripes = (np.abs(ground.z - near + 2.4) < 1.3) & (part(ground.x) < 0.5) & street.zebra
    stop = (np.abs(ground.z - near + 4.6) < 0.25) & (ground.x > 0)
    return free, on_main & (stripes | stop)


def _centre_line(ground: Ground, street: Street) -> Mask:
    if street.double:
        double: Mask = np.abs(ground.aside - 0.16) < 0.07
        return double
    dashed: Mask = (ground.aside < 0.08) & (part(ground.z / 6) < 0.55)
    return dashed


def _lane_lines(ground: Ground, street: Street) -> Mask:
    """The edge of the driving lanes, and a dashed line between two lanes of a direction."""
    drive = np.where(ground.x > 0, street.drive[1], street.drive[0])
    lines: Mask = np.abs(ground.aside - drive + 0.3) < 0.08
    if street.lanes > 1:
        lines |= (np.abs(ground.aside - drive / street.lanes) < 0.08) & (part(ground.z / 8) < 0.4)
    return lines
