"""Writers of small picture files in the exact forms in which data sets are distributed."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def write(path: Path, pixels: np.ndarray, **options: object) -> Path:
    """A picture file of the kind that the suffix says; makes the folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def noise(height: int = 6, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_palette(path: Path, ids: np.ndarray) -> Path:
    """GTA5: an 8-bit palette PNG whose indices are the ids, and whose colours are something else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(ids.astype(np.uint8), mode="P")
    picture.putpalette([(7 * entry + shift) % 256 for entry in range(256) for shift in (3, 50, 120)])
    picture.save(path)
    return path


def write_png16(path: Path, pixels: np.ndarray) -> Path:
    """SYNTHIA: a PNG with three (or two, or four) channels of 16 bits, which Pillow cannot write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks))
    return path


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
