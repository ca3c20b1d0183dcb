"""Polygons in space, painted from far to near into a picture of surface numbers.

Colour, depth and class are looked up per pixel afterwards (deferred shading), so the label is exact by construction:
it is the class of the very surface that gave the pixel its colour.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from udas.data.streets.camera import Camera, Floats

NEAR = 0.3  # metres: nothing closer is drawn
TINY = 1.6  # pixels: nothing smaller is drawn

Points = Floats  # [N, K, 3]: N polygons of K corners


class Label(IntEnum):
    """The classes of the taxonomy street11."""

    ROAD = 0
    SIDEWALK = 1
    BUILDING = 2
    WALL = 3
    FENCE = 4
    POLE = 5
    SIGN = 6
    VEGETATION = 7
    SKY = 8
    PERSON = 9
    VEHICLE = 10


class Material(IntEnum):
    """How a surface is shaded."""

    SKY = 0
    GROUND = 1
    PLAIN = 2
    FACADE = 3
    MASONRY = 4
    BOARDS = 5
    LEAVES = 6


class Layer(IntEnum):
    """What is painted first; within a layer the farther comes first."""

    BACKDROP = 0
    SHADOW = 1
    PLOT = 2
    STREET = 3


@dataclass(frozen=True)
class Patch:
    """Polygons of one object. points [N, K, 3] metres, colours [N, 3] in [0, 1], pattern [6]: see `shading`."""

    points: Points
    colours: Floats
    label: Label
    material: Material
    order: tuple[int, float]
    pattern: Floats
    centre: Floats | None


@dataclass(frozen=True)
class Surfaces:
    """One row per surface; rows 0 and 1 are the sky and the ground.

    normal [S, 3] towards the camera, offset [S] = normal . (point - camera), origin [S, 3] the first corner,
    colour [S, 3], pattern [S, 6], label [S] uint8, material [S] uint8.
    """

    normal: Floats
    offset: Floats
    origin: Floats
    colour: Floats
    pattern: Floats
    label: NDArray[np.uint8]
    material: NDArray[np.uint8]


NO_PATTERN = np.zeros(6, np.float32)
OPEN = np.full(3, np.nan, np.float32)  # the centre of what is not a closed body: nothing of it is hidden
WHITE = np.ones((1, 3), np.float32)


class Canvas:
    """Collects the polygons of a scene."""

    def __init__(self) -> None:
        """An empty scene: sky above, ground below."""
        self.patches: list[Patch] = []

    def add(
        self,
        points: Points,
        colours: Floats,
        label: Label,
        layer: Layer,
        distance: float,
        material: Material = Material.PLAIN,
        pattern: Floats = NO_PATTERN,
        centre: Floats | None = None,
    ) -> None:
        """Add N polygons of one object that are painted in the given order.

        Args:
            points: [N, K, 3] corners in metres; short polygons repeat their last corner.
            colours: [N, 3] or [3] in [0, 1].
            label: class of all of them.
            layer: painted in this order.
            distance: metres; the farther is painted first within the layer.
            material: how they are shaded.
            pattern: [6] parameters of the material.
            centre: [3] a point inside a closed body; polygons of its far side are left out.
        """
        if colours.ndim == 1:
            colours = colours[None].repeat(len(points), axis=0)
        self.patches.append(Patch(points, colours, label, material, (layer, -distance), pattern, centre))

    def finish(self, camera: Camera, bend: float) -> tuple[NDArray[np.int32], Surfaces]:
        """Paint everything. The street bends to the right by x = bend z^2 / 2.

        Returns:
            [H, W] surface numbers of the camera's size, and the table they index.
        """
        self.patches.sort(key=lambda patch: patch.order)
        sizes = [len(patch.points) for patch in self.patches]
        points = np.concatenate([patch.points.reshape(-1, 3) for patch in self.patches])
        points[:, 0] += bend / 2 * points[:, 2] * np.abs(points[:, 2])
        counts = np.repeat([patch.points.shape[1] for patch in self.patches], sizes)
        starts = np.cumsum(counts) - counts
        normal, origin = _normals(points, starts, counts), points[starts]
        towards = ((camera.position - origin) * normal).sum(1)
        hidden = self._outwards(normal, origin, sizes, bend) * towards < 0
        normal[towards < 0] *= -1
        return _paint(camera, points, starts, counts, hidden), self._surfaces(normal, origin, sizes, camera)

    def _outwards(self, normal: Floats, origin: Floats, sizes: list[int], bend: float) -> Floats:
        """How far the normals of closed bodies lead outwards, [N]; NaN for all others."""
        centres = [OPEN if patch.centre is None else patch.centre for patch in self.patches]
        bodies = np.concatenate(centres).reshape(-1, 3)
        bodies[:, 0] += bend / 2 * bodies[:, 2] * np.abs(bodies[:, 2])
        outwards: Floats = ((origin - bodies.repeat(sizes, axis=0)) * normal).sum(1)
        return outwards

    def _surfaces(self, normal: Floats, origin: Floats, sizes: list[int], camera: Camera) -> Surfaces:
        up = np.array([[0, 0, 1], [0, 1, 0]], np.float32)  # the sky has no plane; the ground lies at y = 0
        normal = np.concatenate([up, normal])
        origin = np.concatenate([np.zeros((2, 3), np.float32), origin])
        labels = np.array([Label.SKY, Label.ROAD, *(patch.label for patch in self.patches)], np.uint8)
        materials = np.array([Material.SKY, Material.GROUND, *(patch.material for patch in self.patches)], np.uint8)
        patterns = np.concatenate([NO_PATTERN, NO_PATTERN, *(patch.pattern for patch in self.patches)]).reshape(-1, 6)
        return Surfaces(
            normal,
            ((origin - camera.position) * normal).sum(1),
            origin,
            np.concatenate([WHITE, WHITE, *(patch.colours for patch in self.patches)]),
            patterns.repeat([1, 1, *sizes], axis=0),
            labels.repeat([1, 1, *sizes]),
            materials.repeat([1, 1, *sizes]),
        )


def _normals(points: Floats, starts: NDArray[np.int64], counts: NDArray[np.int64]) -> Floats:
    """Unit normals of all polygons (Newell: the sum of the cross products of neighbouring corners)."""
    origin = np.repeat(points[starts], counts, axis=0)
    local = points - origin
    following = np.roll(local, -1, axis=0)
    following[starts + counts - 1] = 0  # the polygon closes at its first corner, the local origin
    sums = np.add.reduceat(np.cross(local, following), starts, axis=0)
    normal: Floats = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9)
    return normal


def _paint(
    camera: Camera,
    points: Floats,
    starts: NDArray[np.int64],
    counts: NDArray[np.int64],
    hidden: NDArray[np.bool_],
) -> NDArray[np.int32]:
    view = camera.to_view(points)
    nearest, farthest = np.minimum.reduceat(view[:, 2], starts), np.maximum.reduceat(view[:, 2], starts)
    pixels = camera.to_pixels(np.maximum(view, [-np.inf, -np.inf, NEAR]).astype(np.float32))
    low, high = np.minimum.reduceat(pixels, starts), np.maximum.reduceat(pixels, starts)
    outside = (high < 0).any(1) | (low > [camera.width, camera.height]).any(1) | ((high - low) < TINY).all(1)
    cut = nearest < NEAR
    seen = ~hidden & (farthest > NEAR) & (cut | ~outside)
    image = Image.fromarray(_sky_and_ground(camera))
    draw = ImageDraw.Draw(image)
    flat = (pixels + 0.5).ravel().tolist()  # Pillow cuts coordinates down to whole pixels
    for row in np.flatnonzero(seen).tolist():
        start, count = int(starts[row]), int(counts[row])
        corners = flat[2 * start : 2 * (start + count)]
        if cut[row]:
            corners = _clipped(camera, view[start : start + count])
        if len(corners) >= 6:
            draw.polygon(corners, fill=row + 2)
    return np.asarray(image)


def _sky_and_ground(camera: Camera) -> NDArray[np.int32]:
    """Surface 1 (ground) below the horizon, 0 (sky) above."""
    return (camera.rays()[1] < 0).astype(np.int32)


def _clipped(camera: Camera, corners: Floats) -> list[float]:
    """The part of one polygon beyond the near plane (Sutherland and Hodgman, 1974), as flat pixel coordinates."""
    kept: list[Floats] = []
    for here, there in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if here[2] >= NEAR:
            kept.append(here)
        if (here[2] >= NEAR) != (there[2] >= NEAR):
            share = (NEAR - here[2]) / (there[2] - here[2])
            kept.append(here + share * (there - here))
    if len(kept) < 3:
        return []
    pixels = camera.to_pixels(np.maximum(np.stack(kept), [-np.inf, -np.inf, NEAR]).astype(np.float32))
    flat: list[float] = (pixels + 0.5).ravel().tolist()
    return flat
