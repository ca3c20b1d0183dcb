"""A pinhole camera: world metres (x right, y up, z along the street) to pixels and back to rays."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, radians, sin, tan
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Camera:
    """A pinhole camera above the origin of the street.

    position: [3] metres. rotation: [3, 3], rows are the camera's right, down and forward in the world.
    focal: pixels. height, width: pixels.
    """

    position: Floats
    rotation: Floats
    focal: float
    height: int
    width: int

    def to_view(self, points: Floats) -> Floats:
        """[N, 3] world points to [N, 3] camera coordinates: right, down, depth (metres)."""
        return (points - self.position) @ self.rotation.T

    def to_pixels(self, view: Floats) -> Floats:
        """[N, 3] camera coordinates with positive depth to [N, 2] pixel coordinates (column, row)."""
        scaled = view[:, :2] * (self.focal / view[:, 2:])
        return scaled + np.array([self.width / 2, self.height / 2], np.float32)

    def grid(self) -> tuple[Floats, Floats]:
        """Right [1, W] and down [H, 1] of the pixels at one metre of depth."""
        columns = (np.arange(self.width, dtype=np.float32) + 0.5 - self.width / 2) / self.focal
        rows = (np.arange(self.height, dtype=np.float32) + 0.5 - self.height / 2) / self.focal
        return columns[None, :], rows[:, None]

    def rays(self) -> tuple[Floats, Floats, Floats]:
        """World direction x, y, z of every pixel, each [H, W], for one metre of depth."""
        columns, rows = self.grid()
        right, down, forward = self.rotation
        x, y, z = (columns * right[axis] + (rows * down[axis] + forward[axis]) for axis in range(3))
        return x, y, z


def make_camera(
    position: tuple[float, float, float],
    angles: tuple[float, float, float],
    field_of_view: float,
    size: tuple[int, int],
) -> Camera:
    """A camera looking along the street.

    Args:
        position: x, y, z in metres.
        angles: yaw (to the right), pitch (downwards) and roll, in degrees.
        field_of_view: horizontal, in degrees.
        size: height, width in pixels.
    """
    yaw, pitch, roll = (radians(angle) for angle in angles)
    turn = np.array([[cos(yaw), 0, -sin(yaw)], [0, -1, 0], [sin(yaw), 0, cos(yaw)]])
    nod = np.array([[1, 0, 0], [0, cos(pitch), -sin(pitch)], [0, sin(pitch), cos(pitch)]])
    tilt = np.array([[cos(roll), -sin(roll), 0], [sin(roll), cos(roll), 0], [0, 0, 1]])
    rotation = (tilt @ nod @ turn).astype(np.float32)
    focal = size[1] / 2 / tan(radians(field_of_view) / 2)
    return Camera(np.array(position, np.float32), rotation, focal, *size)
