"""Folders that several tests of data sets read."""

from __future__ import annotations

from pathlib import Path

import pytest

from little_domain import make_domain
from picture_files import noise, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_domain(tmp_path / "set")


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for number in range(20):
        write(folder / f"images/{number:02}.png", noise(2, 2))
    return folder
