"""A small domain on disk, and the ways the tests open it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from picture_files import noise, write
from udas.config import DomainConfig
from udas.data.dataset import Domain, load_domain
from udas.taxonomy import Taxonomy, load_taxonomy

COUNTS = {"train": 5, "val": 2}


def street() -> Taxonomy:
    return load_taxonomy("street11")


def described(folder: Path, **changes: object) -> DomainConfig:
    return load_domain(
        {
            "name": "mine",
            "root": str(folder),
            "images": "images/{split}/**/*.png",
            "labels": "masks/{split}/**/{stem}_mask.png",
            "splits": {"train": "train", "val": "val"},
            "taxonomy": "street11",
            "map": {"road": 7, "sky": [1, [9, 9, 9]], "ignore": 0},
        }
        | changes
    )


def opened(folder: Path, **changes: object) -> Domain:
    return Domain(described(folder, **changes), street())


def mask(height: int = 6, width: int = 8) -> np.ndarray:
    values = np.full((height, width), 7, np.uint8)
    values[0] = 1
    return values


def make_domain(folder: Path) -> Path:
    """Five train and two val pictures images/{split}/{day|night/wet}/{number}.png with masks of the same places."""
    for split, count in COUNTS.items():
        for number in range(count):
            place = f"{split}/{'day' if number % 2 else 'night/wet'}/{number:03}"
            write(folder / f"images/{place}.png", noise(seed=number))
            write(folder / f"masks/{place}_mask.png", mask())
    return folder


def message(error: type[Exception], call: Callable[..., object], *arguments: object) -> str:
    """What the call raises, which must be one line."""
    with pytest.raises(error) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)
