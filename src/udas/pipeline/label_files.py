"""What labelling writes: PNGs that are whole or absent, a journal that survives a kill, previews."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image

from udas.errors import RunError
from udas.storage import write_atomically, write_picture

Pixels = npt.NDArray[np.uint8]


def write_png(path: Path, pixels: Pixels, palette: Pixels | None = None) -> None:
    """Write [H, W] (ids or grey) or [H, W, 3]; a palette [256, 3] makes ids readable for the eye."""
    image = Image.fromarray(pixels)
    if palette is not None:
        image.putpalette(palette.tobytes())
    write_picture(path, image)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON."""
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False).encode())


def write_array(path: Path, values: npt.NDArray[np.int32]) -> None:
    """Write a NumPy array."""
    coded = io.BytesIO()
    np.save(coded, values)
    write_atomically(path, coded.getvalue())


def in_colours(values: npt.NDArray[np.float32], colours: str) -> Pixels:
    """[H, W] in [0, 1] -> [H, W, 3] by a perceptually even colour map of matplotlib."""
    painted: Pixels = matplotlib.colormaps[colours](values, bytes=True)
    return painted[..., :3]


class Journal:
    """One line of JSON per finished picture, in a file per process; all processes' lines are read."""

    def __init__(self, folder: Path, title: str, rank: int) -> None:
        self.folder, self.title = folder, title
        self.path = folder / f"{title}-{rank}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._end_torn_line()

    def lines(self) -> Iterator[dict[str, Any]]:
        """The lines of all processes, one per picture. A line torn by a kill does not count."""
        seen: set[str] = set()
        for path in sorted(self.folder.glob(f"{self.title}-*.jsonl")):
            with path.open(encoding="utf-8", errors="replace") as file:
                for line in filter(None, map(_parsed, file)):
                    if line["name"] not in seen:
                        seen.add(line["name"])
                        yield line

    def names(self) -> set[str]:
        """Pictures that have a line."""
        return {line["name"] for line in self.lines()}

    def sums(self, *keys: str) -> dict[str, npt.NDArray[np.int64]]:
        """The sum over all pictures of the whole numbers (nested lists) under each key."""
        total: dict[str, npt.NDArray[np.int64]] = {}
        for line in self.lines():
            for key in keys:
                total[key] = total.get(key, 0) + np.asarray(line[key], np.int64)
        return total

    def append(self, line: dict[str, Any]) -> None:
        """Add the line of one finished picture. Raises `RunError` when the disk is full."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, separators=(",", ":")) + "\n")
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror}); finished pictures are kept") from error

    def _end_torn_line(self) -> None:
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError:
        return None
    return line
