"""The plots along a street: houses, gardens, yards behind walls and fences, and what lies beyond."""

from __future__ import annotations

import numpy as np

from udas.data.streets.buildings import building, fence, wall
from udas.data.streets.canvas import Label, Layer, Material
from udas.data.streets.figures import hedge, pick, tree
from udas.data.streets.street import Site, Span

BEHIND = -6.0  # metres: plots begin behind the camera so that wide pictures are filled
DEPTH = 12.0  # metres from the front of a building to its back
HILLS = 240.0  # metres: where the wooded hills of the horizon stand


def backdrop(site: Site) -> None:
    """The far end of the street, and hills beyond everything."""
    rng, palette = site.rng, site.look.palette
    places = np.arange(-260, 260, 26.0)
    mounds = np.full((len(places), 4, 3), HILLS, np.float32)
    mounds[..., 0] = places[:, None] + np.array([-20, 24, 16, -8])
    mounds[..., 1] = rng.uniform(4, 15, (len(places), 1)) * np.array([0, 0, 1, 1.1]) - np.array([2, 2, 0, 0])
    leaves = pick(rng, palette.leaves, palette.spread)
    site.canvas.add(mounds, leaves, Label.VEGETATION, Layer.BACKDROP, HILLS, Material.LEAVES)
    x, end = -60.0, site.street.end
    while x < 60:
        wide = rng.uniform(8, 18)
        if site.chance(0.8):
            building(site.canvas, rng, site.look, (x, x + wide), (end, end + 8), Layer.BACKDROP)
        else:
            tree(site.canvas, rng, palette, (x + wide / 2, end), Layer.BACKDROP)
        x += wide + (3.0 if site.chance(1 / 3) else 0.0)


def nearby_kinds(rng: np.random.Generator) -> dict[int, list[str]]:
    """What the first two plots in view hold, left and right: a wall and a fence are always among them."""
    first = rng.permutation(["wall", "fence", "building", "building"]).tolist()
    return {-1: [first[0], first[1]], 1: [first[2], first[3]]}


def plots(site: Site, side: int, kinds: list[str]) -> None:
    """The row of plots along one side up to the end of the street; `kinds` are used up by the first in view."""
    street, layout = site.street, site.look.layout
    seen = 1.35 * site.first_visible(side * street.front[side > 0])
    z = BEHIND + site.rng.uniform(0, 5)
    while z < street.end - 4:
        far = min(z + site.rng.uniform(*layout.plot), street.end)
        if street.junction and far > street.junction[0] - street.walk and z < street.junction[1]:
            _house(site, side, (z, max(street.junction[0] - street.walk, z + 2)))
            z = street.junction[1] + street.walk
            continue
        _plot(site, side, (z, far), kinds.pop() if far > seen and kinds else _random_kind(site))
        z = far + (1.5 if site.chance(0.25) else 0.0)


def _random_kind(site: Site) -> str:
    if not site.chance(site.look.layout.parks):
        return "building"
    return ("wall", "fence", "hedge", "open")[int(site.rng.integers(4))]


def _plot(site: Site, side: int, span: Span, kind: str) -> None:
    front = side * site.street.front[side > 0]
    if kind == "building":
        _house(site, side, span)
        return
    _yard(site, side, front, span)
    if kind == "wall":
        wall(site.canvas, site.rng, site.look, (front, front + side), span)
    elif kind == "fence":
        fence(site.canvas, site.rng, site.look, front, span, Layer.PLOT)
    elif kind == "hedge":
        hedge(site.canvas, site.rng, site.look.palette, side, front, span)


def _house(site: Site, side: int, span: Span) -> None:
    front = side * site.street.front[side > 0]
    if site.chance(0.25):
        front = _garden(site, side, front, span)
    height = building(site.canvas, site.rng, site.look, (front, front + side * DEPTH), span)
    _cast_shadow(site, front, span, height)


def _yard(site: Site, side: int, front: float, span: Span) -> None:
    """Trees, and mostly a house at the back."""
    back = front + side * site.rng.uniform(9, 16)
    if site.chance(0.75):
        building(site.canvas, site.rng, site.look, (back, back + side * DEPTH), (span[0] + 1, span[1]))
    for _ in range(int(site.rng.integers(1, 4))):
        place = (front + side * site.rng.uniform(2, 8), site.rng.uniform(*span))
        tree(site.canvas, site.rng, site.look.palette, place, Layer.PLOT, site.chance(site.look.layout.palms))


def _garden(site: Site, side: int, front: float, span: Span) -> float:
    """A low wall or a fence before a house; returns the x of the house behind it."""
    if site.chance(0.5):
        wall(site.canvas, site.rng, site.look, (front, front + side), span, (0.7, 1.3))
    else:
        fence(site.canvas, site.rng, site.look, front, span, Layer.PLOT)
    return front + side * site.rng.uniform(2.0, 3.5)


def _cast_shadow(site: Site, front: float, span: Span, height: float) -> None:
    """What a building keeps the sun from: its street side, moved along the light onto the ground."""
    sun, (near, far) = site.street.sun, span
    if not site.street.sunny or sun[0] * front < 0:
        return
    dx, dz = (float(-sun[axis] / sun[1] * height) for axis in (0, 2))
    corners = [(front, 0, near), (front, 0, far), (front + dx, 0, far + dz), (front + dx, 0, near + dz)]
    shade = np.full(3, site.street.ambient * 0.85, np.float32)
    site.canvas.add(np.array([corners], np.float32), shade, Label.ROAD, Layer.SHADOW, near, Material.GROUND)
