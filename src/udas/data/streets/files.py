"""Writes the pictures and labels of a streets domain into a folder, once."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from udas.config import StreetsConfig
from udas.data.streets.renderer import render
from udas.errors import DataError
from udas.storage import write_atomically
from udas.taxonomy import load_taxonomy

VERSION = 1
"""Changes whenever the same arguments give other pictures: folders of older versions are refused, not mixed."""

DESCRIPTION = "streets.json"
QUALITY = 95  # of the JPEG files; the look `camera` has its own, stronger compression already in the picture
PER_SPLIT = 10**7  # pictures that a split can have before its indices meet those of another one

Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all)."""


def ensure(config: StreetsConfig, root: Path, progress: Progress | None = None) -> None:
    """Render what is missing of a streets domain into `root`.

    Writes images/{split}/00000.png (look `game`) or .jpg (look `camera`), labels/{split}/00000.png (palette PNG, the
    indices are street11 ids) and streets.json, which says what was rendered. Files appear under their names only when
    they are complete, so an interrupted call is taken up by the next, and several processes may call at once.

    Args:
        config: look, pictures per split, seed and size. More pictures than before are added to those that exist.
        root: folder of the domain; created when absent.
        progress: called after each picture; not at all when nothing is missing.

    Raises:
        DataError: `root` holds other pictures: those of another configuration, more of them, or somebody else's.
        RunError: the folder cannot be written.
    """
    world = {"version": VERSION, "look": config.look, "seed": config.seed, "size": list(config.size)}
    found = _found(root)
    wanted = world | {"pictures": _merged(root, world, config.pictures, found)}
    if wanted != found:
        write_atomically(root / DESCRIPTION, json.dumps(wanted, indent=2).encode())
    missing = [job for job in _jobs(config, root) if not all(file.exists() for file in job[1:])]
    for done, (index, image, label) in enumerate(missing, start=1):
        picture, ids = render(config.look, config.seed, index, config.size)
        write_atomically(label, _encoded(ids, label), durable=False)
        write_atomically(image, _encoded(picture, image), durable=False)
        if progress:
            progress(done, len(missing))


def as_rendered(config: StreetsConfig, root: Path) -> StreetsConfig:
    """The world with as many pictures as `root` holds of it already, so that looking at it renders nothing.

    Raises:
        DataError: `root` holds pictures that are not rendered streets, or cannot be understood.
    """
    return config.model_copy(update={"pictures": _found(root).get("pictures", config.pictures)})


def _found(root: Path) -> dict[str, Any]:
    """What `root` says it holds, {} for a new folder. Raises `DataError` when it holds something else."""
    description, taken = root / DESCRIPTION, (root / "images").exists()
    if not description.exists():
        if taken:
            raise DataError(f"{root}: holds pictures that are not rendered streets; choose another `root`")
        return {}
    try:
        found: dict[str, Any] = json.loads(description.read_text(encoding="utf-8"))
        dict(found["pictures"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{description}: cannot be read; delete the folder {root} or choose another `root`") from None
    return found


def _merged(root: Path, world: Mapping[str, Any], wanted: dict[str, int], found: Mapping[str, Any]) -> dict[str, int]:
    """Pictures per split that `root` is to hold. Raises `DataError` when it holds others, or more."""
    if other := [key for key in world if found and found.get(key) != world[key]]:
        text = ", ".join(f"{key} {found.get(key)} instead of {world[key]}" for key in other)
        raise DataError(f"{root}: holds streets of another kind ({text}); choose another `root` or delete this folder")
    counts: dict[str, int] = found.get("pictures", {})
    for split, count in wanted.items():
        if count < counts.get(split, 0):
            text = f"holds {counts[split]} pictures of split {split}, {count} are configured"
            raise DataError(f"{root}: {text}; choose another `root`, delete this folder, or set streets.pictures")
    return counts | wanted


def _jobs(config: StreetsConfig, root: Path) -> Iterator[tuple[int, Path, Path]]:
    """Index, picture file and label file. The splits share no index, and a split's do not depend on the others."""
    suffix = "jpg" if config.look == "camera" else "png"
    for split, count in config.pictures.items():
        first = zlib.crc32(split.encode()) * PER_SPLIT
        for number in range(count):
            name = f"{split}/{number:05}"
            yield first + number, root / f"images/{name}.{suffix}", root / f"labels/{name}.png"


def _encoded(pixels: NDArray[np.uint8], file: Path) -> bytes:
    """RGB [H, W, 3] or class ids [H, W] as the content of a file."""
    picture, buffer = Image.fromarray(pixels), io.BytesIO()
    if pixels.ndim == 2:
        picture.putpalette(load_taxonomy("street11").palette().tobytes())
    if file.suffix == ".jpg":
        picture.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    else:
        picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
